/* SPDX-License-Identifier: Apache-2.0 */
/* The input file of forward, backward and decode: read, checked to the last element, and turned into a problem. */
#ifndef LOGLIN_CLI_PROBLEM_H
#define LOGLIN_CLI_PROBLEM_H

#include "cli/arguments.h"
#include "tensorfile/safetensors.h"

typedef struct loglin_cli_problem {
    const char *path;
    loglin_safetensors *file;
    const loglin_tensor *q, *k, *v, *level_scales;
    const loglin_tensor *g, *beta, *cu_seqlens;     /* NULL if absent */
    const loglin_tensor *initial_states, *position; /* both or none */
    const loglin_tensor *d_o, *dfinal_states;       /* LOGLIN_BACKWARD only, else NULL */
    size_t sequences;                               /* N */
    int32_t *bounds;                                /* cu_seqlens as int32, N + 1 of them; NULL if absent */
    int32_t *positions;                             /* of the initial states, N of them; 0 if there are none */
    loglin_problem description;                     /* as forward and backward need it */
} loglin_cli_problem;

/* Problems are told on standard error.  loglin_cli_problem_close is due in any case. */
loglin_cli_status loglin_cli_problem_read(const loglin_cli_arguments *arguments, loglin_phase phase,
                                          loglin_cli_problem *problem);
void loglin_cli_problem_close(loglin_cli_problem *problem);

/* Tokens of sequence n of N. */
size_t loglin_cli_sequence_length(const loglin_cli_problem *problem, size_t n);

/* The storage type of a problem's type. */
loglin_tensor_dtype loglin_cli_stored_dtype(loglin_dtype dtype);

/* Fails unless the tensor has this shape; `letters` names the sizes. */
loglin_cli_status loglin_cli_expect_shape(const char *path, const loglin_tensor *tensor, const char *letters,
                                          size_t rank, const size_t *shape);

#endif
