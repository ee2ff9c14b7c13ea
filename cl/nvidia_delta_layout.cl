/* SPDX-License-Identifier: Apache-2.0 */
/* What the host tells the delta rule's kernels on NVIDIA: this file is C and OpenCL C alike, included by both. */

/* Tokens of a chunk. */
#define ND_CHUNK 64

/* Work-items that prepare a chunk, and that walk along a sequence. */
#define ND_PREPARE_ITEMS 128
#define ND_WALK_ITEMS 256

/* A call.  Places in the workspace are bytes from its start. */
typedef struct loglin_delta_call {
    unsigned long maps;  /* of each sequence, head and chunk: its map as tiles */
    unsigned long rows;  /* likewise: level weights of its rows, and its decay */
    unsigned int batch, length, chunks;
    float scale;
} loglin_delta_call;
