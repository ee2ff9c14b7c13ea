/* SPDX-License-Identifier: Apache-2.0 */
/* Batched products of row-major float matrices by CLBlast: C = alpha op(A) op(B) + beta C. */
#ifndef LOGLIN_ENGINE_GEMM_H
#define LOGLIN_ENGINE_GEMM_H

#include "engine/tunables.h"
#include <stdbool.h>

/* One matrix of a batch: element offset of the first, elements from a row to the next, elements from one to the next. */
typedef struct loglin_matrix {
    cl_mem mem;
    size_t offset, row, stride;
} loglin_matrix;

typedef struct loglin_gemm {
    bool transpose_a, transpose_b; /* op(A) is m x k, op(B) is k x n, C is m x n */
    size_t m, n, k, batch;
    float alpha, beta;
    loglin_matrix a, b, c;
} loglin_gemm;

/*
 * Compiles CLBlast's kernels for the device, once; later calls return at once.  Slow: plan creation, not enqueue.
 * The parameters are CLBlast's for the whole process, so those of a device's first call stay.  Parameters beyond the
 * device's limits give way to plain ones, and so, with a warning, do those that do not compile.
 */
loglin_status loglin_gemm_prepare(loglin_device *device, const loglin_gemm_parameters *parameters);

/*
 * Enqueues behind what is in an in-order queue.  Never allocates: only CLBlast's direct kernels are used.  All offsets
 * and the last element must lie below 2^31 (CLBlast counts in int): LOGLIN_UNSUPPORTED otherwise.
 */
loglin_status loglin_gemm_enqueue(const loglin_gemm *gemm, cl_command_queue queue);

#endif
