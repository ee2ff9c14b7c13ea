/* SPDX-License-Identifier: Apache-2.0 */
/* Problems: whether they can be had, with defaults filled in; and whether a call's buffers fit them. */
#ifndef LOGLIN_PLAN_PROBLEM_H
#define LOGLIN_PLAN_PROBLEM_H

#include "loglin.h"

/* Checks every field; *filled is the problem with its defaults in place, but for engine and chunk, which a plan chooses. */
loglin_status loglin_problem_validate(const loglin_problem *problem, loglin_problem *filled);

/* N: the sequences of a filled-in problem. */
size_t loglin_problem_sequences(const loglin_problem *problem);

/* Bytes of an element. */
size_t loglin_dtype_size(loglin_dtype dtype);

/* Shapes of a filled-in problem's arrays, counted in elements. */
typedef struct loglin_counts {
    size_t tokens, sequences;
    size_t qk, vo, gates, level_scales; /* of `tokens` tokens */
    size_t states;
} loglin_counts;

/* For forward and backward, or for one token of every sequence. */
loglin_counts loglin_problem_counts(const loglin_problem *problem, int one_token);

/*
 * Is the buffer one of the context that holds `count` elements of `size` bytes from its offset on?  A missing buffer is
 * an error if it is required.
 */
loglin_status loglin_buffer_check(cl_context context, const char *name, loglin_buffer buffer, size_t count, size_t size,
                                  int required);

#endif
