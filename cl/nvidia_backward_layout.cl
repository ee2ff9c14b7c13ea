/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the host tells the kernels of the NVIDIA engine's backward pass: C and OpenCL C alike, included by both.
 *
 * N chunks; a tile is half a chunk.  Places in the workspace are bytes from its start.
 */

/* Tokens of a tile, which masked products are made of, and of a chunk, which has a state. */
#define NB_TILE 64
#define NB_CHUNK 128

/* Columns of V that are held together. */
#define NB_COLUMNS 64

/* Chunks of a span, inside which dg is a running sum. */
#define NB_SPAN_BITS 2
#define NB_SPAN (1 << NB_SPAN_BITS)

/* Rows of q or k that a warp prepares. */
#define NB_PREPARE_ROWS 4

/* Work-items of a group; of the tiles, which need many registers; the sums have 128 for a head. */
#define NB_ITEMS 256
#define NB_TILE_ITEMS 384

/* States of the levels above a chunk that are on their way to the matrix units. */
#define NB_ROW_STAGES 4

/* Sums of level_scales . dlevel_scales of a chunk and level, of 16 tokens each. */
#define NB_LEVEL_DOTS 8

/* Arrays of a float for each token and head, of which dc is the sum: of the levels above a chunk, and of the chunk, less
 * v . dv. */
#define NB_DOTS 2

/*
 * Maps for copies of boxes (heads_map in mma_nvidia.cl): of v and dO, 64 columns of a chunk; of dv, those of 16 tokens; of the
 * level scales of a chunk's tokens, from a multiple of 16 bytes on, twelve floats or sixteen others, among which are a head's
 * eight inside a chunk.
 */
#define NB_MAP_V 0
#define NB_MAP_D_O 1
#define NB_MAP_DV 2
#define NB_MAP_SCALES 3
#define NB_MAPS 4

/* A token's level scales inside a chunk. */
#define NB_SCALES 8

typedef struct loglin_nvidia_gradients {
    unsigned long maps;          /* NB_MAPS heads_map, from a multiple of 128 bytes on */
    unsigned long queries, keys; /* [b][group][128 N][NV_K] normalised, with zeros behind the last token and column */
    unsigned long gates;         /* [b][head][128 N] the gates' running sum from the chunk's start, and its remainder */
    unsigned long factors;       /* [b][head][N][4][128] decays, see sum_gates */
    unsigned long since;         /* [b][head][N + 1] the sum of all gates before a chunk, and its remainder */
    unsigned long kept;          /* [b][head][N][level] decay, times scale, from the block that is read to the chunk */
    unsigned long weights;       /* [b][head][N][1 + level][128] of tokens in states and adjoints, see nb_weights */
    unsigned long decays;        /* [b][head][N] of a chunk */
    unsigned long states;        /* [b][head][tile of V][N] of the block that ends with a chunk */
    unsigned long adjoints;      /* likewise: first from the block's right neighbour, then of everything behind it */
    unsigned long parts;         /* [b][head][tile of V][level][unit]: parts of such sums for large blocks */
    unsigned long crossings;     /* [b][head][part][N] of blocks that end with a span: the share of dc across, in parts */
    unsigned long level_dots;    /* [b][head][N][level][NB_LEVEL_DOTS] */
    unsigned long suffixes;      /* [b][head][N][level] of these, from a chunk to its block's end */
    unsigned long dots;          /* [NB_DOTS][b][head][128 N] */
    unsigned long row_parts;     /* [block of heads of rows][b][group][128 N][NV_K] of dq: levels above a chunk */
    unsigned long query_parts;   /* [block of heads][b][group][128 N][NV_K] of dq: of the chunk */
    unsigned long key_parts;     /* [block of heads][b][group][128 N][NV_K] */
    unsigned int batch, length, chunks, units;
    float scale;
} loglin_nvidia_gradients;
