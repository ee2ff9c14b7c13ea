/* SPDX-License-Identifier: Apache-2.0 */
/* What the host tells the delta rule's kernels on NVIDIA: this file is C and OpenCL C alike, included by both. */

/* Tokens of a chunk. */
#define ND_CHUNK 64

/* Work-items that prepare a chunk, walk along a sequence, find what a chunk's states hand back, and what its keys do. */
#define ND_PREPARE_ITEMS 128
#define ND_WALK_ITEMS 256
#define ND_LEVELS_ITEMS 384
#define ND_KEYS_ITEMS 128

/* 64 columns of K each, of which a work-group finds what the states hand back. */
#define ND_LEVELS_UNITS 2

/* A call.  Places in the workspace are bytes from its start. */
typedef struct loglin_delta_call {
    unsigned long maps;     /* of each sequence, head and chunk: its map as tiles */
    unsigned long rows;     /* likewise: level weights of its rows, and its decay */
    /* For the backward pass only: */
    unsigned long states;        /* of each sequence, head and chunk: the level states at its start */
    unsigned long adjoints;      /* likewise: the adjoints of the level states at its end */
    unsigned long map_gradients; /* of each sequence, head and chunk: dREAD, dK_START, dWRITE as tiles */
    unsigned long decays;        /* likewise: parts of the gradient of its decay */
    unsigned long dq, dk;        /* of each token and head: floats */
    unsigned int batch, length, chunks;
    float scale;
} loglin_delta_call;
