/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The operators in float64 for the tuner, one output row at a time: it shares nothing with kernels and engines.
 *
 * A row's query goes back through the tokens: at token s it meets k_s, adds lambda beta_s (k_s . w) v_s to the row, and
 * passes through the token's transition.  The gradients are the reverse of that walk.
 */
#ifndef LOGLIN_PLAN_REFERENCE_H
#define LOGLIN_PLAN_REFERENCE_H

#include "loglin.h"

/* Arrays of one sequence, laid out as loglin.h says; beta NULL: the scalar-gated operator. */
typedef struct loglin_reference {
    size_t length, heads, groups, dim_k, dim_v, levels;
    loglin_partition partition;
    const double *q, *k, *v, *g, *level_scales, *beta;
} loglin_reference;

typedef struct loglin_reference_gradients {
    double *dq, *dk, *dv, *dg, *dlevel_scales, *dbeta; /* dbeta NULL as beta */
} loglin_reference_gradients;

/* The level of key s for query t >= s, from its definition. */
size_t loglin_reference_level(loglin_partition partition, size_t t, size_t s);

/* o of one token and head; scratch holds dim_k numbers. */
void loglin_reference_row(const loglin_reference *in, size_t t, size_t h, double *scratch, double *o);

/* Adds the gradients of a loss whose derivative to o of one token and head is d_o; scratch: (t + 3) dim_k numbers. */
void loglin_reference_row_gradients(const loglin_reference *in, size_t t, size_t h, const double *d_o, double *scratch,
                                    const loglin_reference_gradients *out);

#endif
