/* SPDX-License-Identifier: Apache-2.0 */
/* What the host tells the kernels of the NVIDIA engine: this file is C and OpenCL C alike, included by both. */

/* Tokens of a chunk; of a half of a segment, for which q, k and q k^T are prepared; and of a segment. */
#define NV_CHUNK 64
#define NV_HALF 128
#define NV_SEGMENT 256

/* Segments of a sequence: fewer than 2 to the power of this. */
#define NV_SEGMENTS_BITS 14

/* Columns of V that a warpgroup makes: an item of work is a head's tile of so many columns. */
#define NV_TILE_V 64

/* Pieces of states that are on their way to the matrix units. */
#define NV_LEAST_STAGES 3
#define NV_MOST_STAGES 5

/* Work-items of the groups: a warpgroup has 128. */
#define NV_PREPARE_ITEMS 256
#define NV_OUTPUT_ITEMS 512
#define NV_ITEMS 128

/* Heads whose gates a work-group of prepare makes. */
#define NV_GATE_HEADS 16

/* Bytes of a half's gates: sums and three tables of decays of its tokens, four decays of its tiles, and its own sum. */
#define NV_GATES (NV_HALF * (4 + 3 * 2) + (NV_HALF / 16 + 1) * 16)

/*
 * Maps for copies of boxes (heads_map in mma_nvidia.cl), of a segment's tokens: of 64 columns of values; of level scales, as
 * many as a row of them has in local memory, from a multiple of 16 bytes on; and of 16 tokens of o, 32 columns.
 */
#define NV_MAP_V 0
#define NV_MAP_SCALES 1
#define NV_MAP_O 2
#define NV_MAPS 3

/* A call.  Places in the workspace are bytes from its start. */
typedef struct loglin_nvidia_call {
    unsigned long maps;     /* NV_MAPS heads_map, from a multiple of 128 bytes on */
    unsigned long products; /* of each sequence, group and segment: q, k and q k^T as tiles */
    unsigned long gates;    /* of each sequence, head and half: NV_GATES bytes */
    unsigned long nodes;    /* of each sequence, head, tile of V and segment: a state */
    unsigned long sums;     /* of each sequence, head and segment: the sum of the gates of its node's block, by states */
    unsigned long blocks;   /* the same when the tree is done */
    unsigned int batch, length, segments;
    float scale;
} loglin_nvidia_call;
