/* SPDX-License-Identifier: Apache-2.0 */
/* Criterion's face of the checks in support_case.h. */
#ifndef LOGLIN_TESTS_SUPPORT_CRITERION_H
#define LOGLIN_TESTS_SUPPORT_CRITERION_H

#include "support_case.h"

#include <criterion/criterion.h>

/* The test goes on after a failure, so that one run shows all of them. */
static inline void expect_pass(const char *failure) {
    cr_expect(failure == NULL, "%s", failure == NULL ? "" : failure);
}

/* The test ends at a failure. */
static inline void require_pass(const char *failure) {
    cr_assert(failure == NULL, "%s", failure == NULL ? "" : failure);
}

typedef const char *check_function(const support_case *c);

/* Both operators. */
static inline void expect_operators(check_function *check, support_case c) {
    c.op = LOGLIN_MAMBA2;
    expect_pass(check(&c));
    c.op = LOGLIN_GATED_DELTA;
    expect_pass(check(&c));
}

/* Both operators, both partitions. */
static inline void expect_everywhere(check_function *check, support_case c) {
    c.partition = LOGLIN_WEAK;
    expect_operators(check, c);
    c.partition = LOGLIN_STRONG;
    expect_operators(check, c);
}

/* Every storage type, with level_scales and beta in float and in the same type. */
static inline void expect_dtypes(check_function *check, support_case c) {
    for (int dtype = LOGLIN_F32; dtype <= LOGLIN_BF16; dtype++) {
        c.dtype = (loglin_dtype)dtype;
        c.weight_dtype = LOGLIN_F32;
        expect_everywhere(check, c);
        if (c.dtype != LOGLIN_F32) {
            c.weight_dtype = c.dtype;
            expect_everywhere(check, c);
        }
    }
}

#endif
