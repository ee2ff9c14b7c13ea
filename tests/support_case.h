/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A case is a problem with random inputs: it is run on the device and by the oracle, and the answers are compared.
 *
 * Functions that run or compare return NULL, or what is wrong, in a text that lives until the next failure.
 */
#ifndef LOGLIN_TESTS_SUPPORT_CASE_H
#define LOGLIN_TESTS_SUPPORT_CASE_H

#include "oracle.h"
#include "support.h"

typedef struct support_data support_data;

/* A member of 0 is its default. */
typedef struct support_case {
    loglin_op op;
    loglin_partition partition;
    loglin_dtype dtype, weight_dtype;
    size_t batch, length, heads, groups, dim_k, dim_v; /* 0: 1, 40, 2, 1, 8, 8 */
    size_t extra_levels;                               /* beyond those that the longest sequence and position need */
    float scale;
    int normalize_qk;      /* without it the delta rule's queries and keys have length 1 */
    const size_t *lengths; /* [sequences]: packed, with cu_seqlens; batch and length are ignored then */
    size_t sequences;
    const int32_t *positions; /* [N]: with initial states at these positions */
    bool final_states;        /* forward: wanted; backward: their gradient is given */
    bool in_place;            /* final states over the initial ones */
    bool log_decay;           /* states have one */
    bool no_gates;
    bool skip_optional; /* backward writes dq, dk and dv only */
    bool out_of_order;  /* on an out-of-order queue */
    bool events;        /* waits for an event that is set after the call */
    size_t offset;      /* elements before every array in its buffer */
    size_t chunk;
    bool automatic;                       /* the plan chooses the engine; else every engine in turn */
    loglin_engine only;                   /* this engine alone, which must take the problem; 0: every one in turn */
    void (*adjust)(support_data *inputs); /* changes the random inputs */
    bool small_gate_gradient;             /* dg cancels to nothing: it is measured against dk . k, its terms */
    uint64_t seed;
} support_case;

/* The inputs of a case, as the device's storage rounds them, in the oracle's layout. */
struct support_data {
    support_case c;       /* with its defaults filled in */
    loglin_engine engine; /* what it runs on */
    size_t sequences, tokens, levels;
    size_t *starts;                               /* [sequences + 1] */
    size_t *positions;                            /* [sequences] */
    size_t n_k, n_v, n_gates, n_levels, n_states; /* elements of q; v; g; level_scales; states */
    double *q, *k, *v, *d_o;
    double *g; /* NULL without gates */
    double *level_scales;
    double *beta;                               /* NULL but for the delta rule */
    double *initial;                            /* NULL without; NaN in levels that do not exist; so for dfinal */
    double *initial_values, *initial_log_decay; /* initial = exp(log_decay) * values; the latter may be NULL */
    double *dfinal;
};

/* Answers; arrays of zeros to begin with. */
typedef struct support_results {
    double *o, *final;
    int32_t *final_position; /* device only */
    double *dq, *dk, *dv, *dg, *dlevel_scales, *dbeta, *dinitial;
} support_results;

support_data *support_data_make(const support_case *c);
void support_data_free(support_data *data);
support_results *support_results_make(const support_data *data);
void support_results_free(support_results *results);

/* Tokens [first, first + count) of every sequence of a batch that is not packed; without initial states and dfinal. */
support_data *support_slice(const support_data *data, size_t first, size_t count);

/* Gives data initial states, copied; levels that do not exist become NaN.  positions [N]. */
void support_set_initial(support_data *data, const size_t *positions, const double *states);

/* The same for the gradient to the final states. */
void support_set_dfinal(support_data *data, const double *states);

/* Zero, or NaN, in the levels that do not exist at position + length of each sequence (or at position). */
void support_blank_missing_levels(const support_data *data, bool at_end, double blank, double *states);

/* The library's problem for the phases given. */
loglin_problem support_problem(const support_data *data, unsigned phases);

oracle_problem support_oracle_problem(const support_data *data);
oracle_inputs support_oracle_inputs(const support_data *data);

/* Forward: o, and final where the case wants it.  Backward: the gradients.  Decode: o and final, token by token. */
void support_oracle_forward(const support_data *data, support_results *results);
void support_oracle_backward(const support_data *data, support_results *results);
const char *support_forward(const support_data *data, support_results *results);
const char *support_backward(const support_data *data, support_results *results);
const char *support_decode(const support_data *data, support_results *results);

/* Compares one tensor within the case's threshold. */
const char *support_compare(const support_data *data, const char *tensor, const double *got, const double *expected,
                            size_t count, support_kind kind);

/* Compares all that the case's forward, or backward, writes. */
const char *support_compare_forward(const support_data *data, const support_results *got,
                                    const support_results *expected);
const char *support_compare_backward(const support_data *data, const support_results *got,
                                     const support_results *expected);

/* A failure text, which begins with the case. */
const char *support_failure(const support_data *data, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Device against oracle, for every engine. */
const char *support_check_forward(const support_case *c);
const char *support_check_backward(const support_case *c);
const char *support_check_decode(const support_case *c);

#endif
