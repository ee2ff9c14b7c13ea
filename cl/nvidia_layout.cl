/* SPDX-License-Identifier: Apache-2.0 */
/* What the host tells the kernels of the NVIDIA engine: this file is C and OpenCL C alike, included by both. */

/* Tokens of a chunk, and the largest number of chunks of a segment. */
#define NV_CHUNK 64
#define NV_SEGMENT_BITS 3
#define NV_SEGMENT (1 << NV_SEGMENT_BITS)

/* Segments of a sequence: fewer than 2 to the power of this. */
#define NV_SEGMENTS_BITS 14

/* Columns of V that a work-group makes. */
#define NV_TILE_V 64

/* Work-items of a group: four warps. */
#define NV_ITEMS 128

/* A call.  Places in the workspace are bytes from its start. */
typedef struct loglin_nvidia_call {
    unsigned long products; /* of each sequence, group and chunk: q, k and q k^T as tiles */
    unsigned long gates;    /* of each sequence, head and chunk: running sums of the gates, then their remainders */
    unsigned long nodes;    /* of each sequence, head, tile of V and segment: a state */
    unsigned long sums;     /* of each sequence, head and segment: the sum of its gates */
    unsigned long blocks;   /* likewise: the sum of the gates of the block whose state the segment's node is */
    unsigned int batch, length, chunks, segments;
    float scale;
} loglin_nvidia_call;
