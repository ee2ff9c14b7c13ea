/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The fused engine as a GPU runs it, on whatever device is there: it says that it is a GPU, so a lane is a work-group with
 * barriers.  The kernels are compiled without optimisation: with it this takes minutes where barriers become loops.  The
 * backward pass, and data races, are test_small's under Oclgrind.  The states' shapes have the constants of packed sequences,
 * so each operator is compiled once for both.
 */
#define _GNU_SOURCE /* setenv */
#include "support_criterion.h"
#include "support_limits.h"

#include <stdlib.h>
#include <string.h>

static void be_gpu(const char *limits) {
    setenv("LOGLIN_BUILD_OPTIONS", "-cl-opt-disable", 1);
    support_limit_device(limits);
}

static const int32_t POSITIONS[] = {5, 30};
static const size_t LENGTHS[] = {0, 1, 20, 0, 33};
static const int32_t PACKED_POSITIONS[] = {0, 3, 16, 7, 1};

Test(lanes, the_plan_names_the_engine) {
    be_gpu("gpu");
    const loglin_problem problem = {.batch = 1,
                                    .length = 40,
                                    .heads = 2,
                                    .groups = 1,
                                    .dim_k = 16,
                                    .dim_v = 16,
                                    .levels = 7,
                                    .engine = LOGLIN_ENGINE_FUSED,
                                    .phases = LOGLIN_FORWARD};
    loglin_plan *plan = NULL;
    support_require(loglin_plan_create(support_open()->device, &problem, &plan), "loglin_plan_create");
    char text[1024];
    (void)loglin_plan_describe(plan, text, sizeof text);
    cr_expect(strstr(text, "engine fused (gpu)") != NULL, "%s", text);
    loglin_plan_destroy(plan);
}

Test(lanes, states) {
    be_gpu("gpu");
    expect_operators(support_check_forward, (support_case){.batch = 2,
                                                           .length = 21,
                                                           .heads = 4,
                                                           .groups = 2,
                                                           .dim_k = 4,
                                                           .dim_v = 3,
                                                           .chunk = 16,
                                                           .positions = POSITIONS,
                                                           .final_states = true,
                                                           .only = LOGLIN_ENGINE_FUSED});
}

Test(lanes, packed) {
    be_gpu("gpu");
    expect_operators(support_check_forward, (support_case){.lengths = LENGTHS,
                                                           .sequences = 5,
                                                           .heads = 4,
                                                           .groups = 2,
                                                           .dim_k = 4,
                                                           .dim_v = 3,
                                                           .chunk = 16,
                                                           .positions = PACKED_POSITIONS,
                                                           .final_states = true,
                                                           .only = LOGLIN_ENGINE_FUSED});
}

/* The other operator of each type is test_mma's. */
Test(lanes, dtypes) {
    be_gpu("gpu");
    for (int dtype = LOGLIN_F16; dtype <= LOGLIN_BF16; dtype++) {
        const support_case c = {.op = dtype == LOGLIN_F16 ? LOGLIN_MAMBA2 : LOGLIN_GATED_DELTA,
                                .dtype = (loglin_dtype)dtype,
                                .weight_dtype = (loglin_dtype)dtype,
                                .length = 20,
                                .dim_k = 16,
                                .dim_v = 8,
                                .chunk = 16,
                                .normalize_qk = 1,
                                .only = LOGLIN_ENGINE_FUSED};
        expect_pass(support_check_forward(&c));
    }
}
