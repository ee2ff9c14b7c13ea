/* SPDX-License-Identifier: Apache-2.0 */
/* Products of many vectors of floats with a matrix of bfloat16 on NVIDIA's matrix units: cl/nvidia_product.cl. */
#ifndef LOGLIN_ENGINE_NVIDIA_PRODUCT_H
#define LOGLIN_ENGINE_NVIDIA_PRODUCT_H

#include "loglin.h"

#include "../../cl/nvidia_product_layout.cl"

typedef struct loglin_nvidia_product_kernels {
    cl_kernel product, sum; /* NULL: not made */
    size_t units;           /* of the device */
} loglin_nvidia_product_kernels;

/* LOGLIN_UNSUPPORTED where the device has no such matrix units. */
loglin_status loglin_nvidia_product_create(loglin_device *device, loglin_nvidia_product_kernels *kernels);
void loglin_nvidia_product_destroy(loglin_nvidia_product_kernels *kernels);

/*
 * What becomes of W x for each of `tokens` vectors x: see PRODUCT_SET, _ADD and _SWIGLU.  W has `blocks` blocks of 16 rows,
 * block after block [columns][16].  Strides are elements from a vector to the next, multiples of 4 and at least `columns`
 * in whole blocks.  `bias` has an element for each row, from bias_at on; PRODUCT_SWIGLU has none.
 */
typedef struct loglin_nvidia_product {
    cl_mem x, w, bias, y;
    size_t x_stride, y_stride, tokens, columns, blocks, bias_at;
    int mode;
    cl_mem parts; /* room for `part_floats` floats, where the work is cut so fine that a sum is made in parts */
    size_t part_floats;
} loglin_nvidia_product;

loglin_status loglin_nvidia_product_enqueue(const loglin_nvidia_product_kernels *kernels,
                                            const loglin_nvidia_product *what, cl_command_queue queue);

#endif
