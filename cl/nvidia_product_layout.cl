/* SPDX-License-Identifier: Apache-2.0 */
/* What the host and cl/nvidia_product.cl agree on: this file is C and OpenCL C alike, included by both. */

/* The tile of a work-group, and its work-items. */
#define PRODUCT_TOKENS 128
#define PRODUCT_ROWS 128
#define PRODUCT_ITEMS 256

/* What becomes of W x: y = W x + bias; y += W x + bias; y = silu(gate) * up, whose blocks take turns; a part of the sum. */
#define PRODUCT_SET 0
#define PRODUCT_ADD 1
#define PRODUCT_SWIGLU 2
#define PRODUCT_PART 3
