/* SPDX-License-Identifier: Apache-2.0 */
/* The element types of stored tensors: their names, their sizes, and the 16-bit ones to and from float. */
#ifndef LOGLIN_TENSORFILE_DTYPE_H
#define LOGLIN_TENSORFILE_DTYPE_H

#include <stdbool.h>
#include <stddef.h>

typedef enum loglin_tensor_dtype {
    LOGLIN_TENSOR_F32,
    LOGLIN_TENSOR_F16,
    LOGLIN_TENSOR_BF16,
    LOGLIN_TENSOR_I32,
    LOGLIN_TENSOR_I64,
} loglin_tensor_dtype;

/* "F32", "F16", "BF16", "I32" or "I64". */
const char *loglin_tensor_dtype_name(loglin_tensor_dtype dtype);

/* Bytes of an element. */
size_t loglin_tensor_dtype_size(loglin_tensor_dtype dtype);

/* The type of a name; false if there is none. */
bool loglin_tensor_dtype_from_name(const char *name, loglin_tensor_dtype *dtype);

/* Reads `count` F32, F16 or BF16 elements; `from` may be unaligned. */
void loglin_tensor_to_float(loglin_tensor_dtype dtype, const void *from, size_t count, float *to);

/* Writes `count` F32, F16 or BF16 elements, rounded to nearest even; `to` may be unaligned. */
void loglin_tensor_from_float(loglin_tensor_dtype dtype, const float *from, size_t count, void *to);

#endif
