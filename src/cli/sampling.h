/* SPDX-License-Identifier: Apache-2.0 */
/* Choosing the next token from logits. */
#ifndef LOGLIN_CLI_SAMPLING_H
#define LOGLIN_CLI_SAMPLING_H

#include <stddef.h>
#include <stdint.h>

typedef struct loglin_cli_sampling {
    double temperature; /* 0: the most probable token */
    size_t top_k;       /* only among so many; 0: among all */
    double top_p;       /* only among the most probable that have so much together, from above 0 to 1 */
    uint64_t random;    /* state; the seed to begin with */
} loglin_cli_sampling;

/* `order` is room for `count` ids. */
int32_t loglin_cli_sample(loglin_cli_sampling *sampling, float *logits, size_t count, int32_t *order);

#endif
