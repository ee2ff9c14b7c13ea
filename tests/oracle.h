/* SPDX-License-Identifier: Apache-2.0 */
/* The operators of loglin.h in float64, written down twice from their definitions: what every test compares with. */
#ifndef LOGLIN_TESTS_ORACLE_H
#define LOGLIN_TESTS_ORACLE_H

#include <stdbool.h>
#include <stddef.h>

/* Shapes as in loglin.h with the batch flattened: N sequences lie behind one another in `tokens` = starts[N] tokens. */
typedef struct oracle_problem {
    bool delta;              /* the gated delta rule, else the scalar-gated operator */
    bool strong;             /* the partition */
    size_t sequences;        /* N */
    const size_t *starts;    /* [N + 1] first token of each sequence, from 0, ascending */
    const size_t *positions; /* [N] tokens consumed before the first; NULL: 0 */
    size_t heads, groups, dim_k, dim_v, levels;
    double scale; /* multiplies q */
    bool normalize_qk;
} oracle_problem;

typedef struct oracle_inputs {
    const double *q, *k;        /* [tokens, G, K] */
    const double *v;            /* [tokens, H, V] */
    const double *g;            /* [tokens, H]; NULL: 0 */
    const double *level_scales; /* [tokens, H, L] */
    const double *beta;         /* [tokens, H], delta rule only */
    const double *initial;      /* [N, H, L, K, V]; NULL: 0.  Levels that do not exist are not read */
} oracle_inputs;

/* Every member may be NULL: not wanted. */
typedef struct oracle_gradients {
    double *dq, *dk, *dv, *dg, *dlevel_scales, *dbeta, *dinitial;
} oracle_gradients;

/* The level of key s for query t >= s, from its definition. */
size_t oracle_level(bool strong, size_t t, size_t s);

/* Whether a state after `position` tokens has a level, that is, whether a key of that level exists. */
bool oracle_level_exists(bool strong, size_t position, size_t level);

/* The O(T^2) form (delta rule: O(T^3)) of all sequences from position 0, without initial states: o [tokens, H, V]. */
void oracle_parallel(const oracle_problem *problem, const oracle_inputs *in, double *o);

/* Gradients of the O(T^2) form; scalar-gated operator, position 0, no normalisation. */
void oracle_parallel_gradients(const oracle_problem *problem, const oracle_inputs *in, const double *d_o,
                               const oracle_gradients *out);

/* Token by token with the states of all levels.  final [N, H, L, K, V] may be NULL; 0 in levels that do not exist. */
void oracle_recurrence(const oracle_problem *problem, const oracle_inputs *in, double *o, double *final);

/* Reverse mode through the recurrence.  dfinal may be NULL; its levels that do not exist are not read. */
void oracle_backward(const oracle_problem *problem, const oracle_inputs *in, const double *d_o, const double *dfinal,
                     const oracle_gradients *out);

#endif
