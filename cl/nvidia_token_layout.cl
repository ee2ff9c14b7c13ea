/* SPDX-License-Identifier: Apache-2.0 */
/* What the host and cl/nvidia_token.cl agree on: this file is C and OpenCL C alike, included by both. */

/* Work-items of a group beside those that compute: who reads and writes the states, and a warp that copies the weights. */
#define NT_HELPERS 128
#define NT_COPIERS 32

/* Parts of the columns of a product that adds to x, at most. */
#define NT_PARTS 4

/* Runs of 8 columns of v that a group attends to at once, at most. */
#define NT_OCTETS 4

/* A slot of the ring of weights: so many columns of a block of 16 rows. */
#define NT_SLOT_COLUMNS 512
#define NT_COLUMN_BYTES 32
#define NT_SLOT_BYTES (NT_SLOT_COLUMNS * NT_COLUMN_BYTES)

/* Warps that multiply a slot; slots that are multiplied before the warps' sums are added up, and floats of these sums. */
#define NT_CREW 4
#define NT_PIECE_SLOTS 32
#define NT_PARTIALS (NT_PIECE_SLOTS * NT_CREW * 16)

/* Columns of a product or of a part of it, at most: two blocks are multiplied together. */
#define NT_MOST_COLUMNS (NT_PIECE_SLOTS / 2 * NT_SLOT_COLUMNS)
