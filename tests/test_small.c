/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Small shapes of everything in one process, without a test framework: made to run under Oclgrind, which checks every
 * access of the kernels and interprets them at a few million operations a second.
 *
 *     test_small [INSTRUCTION]
 *
 * With a name of cl/mma_layouts.cl: the fused engine's kernels with that instruction, emulated.
 */
#include "engine/lanes.h"
#include "support_case.h"
#include "support_limits.h"

#include <stdio.h>
#include <string.h>

static const size_t LENGTHS[] = {0, 1, 20, 0, 3};
static const int32_t POSITIONS[] = {5, 0};
static const int32_t PACKED_POSITIONS[] = {0, 3, 16, 7, 1};

static size_t passed;
static size_t failed;

static void count_result(const char *failure) {
    if (failure == NULL) {
        passed++;
        return;
    }
    failed++;
    fprintf(stderr, "%s\n", failure);
}

static void check_calls(const support_case *c) {
    count_result(support_check_forward(c));
    count_result(support_check_backward(c));
    if (c->lengths == NULL) {
        count_result(support_check_decode(c));
    }
}

/*
 * With two compute units, as scripts/oclgrind has it, no kernel of the fused engine is left out: the chunks of a single
 * head with many values are spread over the lanes, or its maps are, all other cases have lanes enough.
 */
static void check_launches(void) {
    static const char *const kernels[] = {"portable_forward", "portable_own",  "portable_merge",    "portable_read",
                                          "portable_maps",    "portable_walk", "portable_backward", "portable_reduce"};
    cl_uint units = 0;
    support_require(clGetDeviceInfo(support_open()->id, CL_DEVICE_MAX_COMPUTE_UNITS, sizeof units, &units, NULL),
                    "CL_DEVICE_MAX_COMPUTE_UNITS");
    for (size_t i = 0; units == 2 && i < sizeof kernels / sizeof kernels[0]; i++) {
        if (support_launches(kernels[i], 0) == 0) {
            fprintf(stderr, "no case has launched %s\n", kernels[i]);
            failed++;
        }
    }
}

static void check_everything(void) {
    const support_case cases[] = {
        {.length = 1, .heads = 1, .dim_k = 1, .dim_v = 1},
        {.length = 37, .dim_k = 3, .dim_v = 5, .chunk = 16, .final_states = true},
        {.length = 20, .heads = 4, .groups = 2, .batch = 2, .dim_k = 4, .dim_v = 4, .chunk = 16, .normalize_qk = 1},
        {.length = 19, .batch = 2, .dim_k = 4, .dim_v = 3, .chunk = 16, .positions = POSITIONS, .final_states = true},
        {.length = 17, .dim_k = 16, .dim_v = 8, .chunk = 16, .dtype = LOGLIN_BF16, .no_gates = true, .offset = 3},
        {.lengths = LENGTHS,
         .sequences = 5,
         .dim_k = 4,
         .dim_v = 3,
         .chunk = 16,
         .positions = PACKED_POSITIONS,
         .final_states = true},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        for (int op = 0; op < 2; op++) {
            support_case c = cases[i];
            c.op = (loglin_op)op;
            c.partition = (i + (size_t)op) % 2 == 0 ? LOGLIN_WEAK : LOGLIN_STRONG;
            check_calls(&c);
        }
    }
    support_case spread = {.length = 20,
                           .heads = 1,
                           .dim_k = 4,
                           .dim_v = 33,
                           .chunk = 16,
                           .positions = POSITIONS,
                           .final_states = true,
                           .only = LOGLIN_ENGINE_FUSED};
    count_result(support_check_forward(&spread));
    spread.op = LOGLIN_GATED_DELTA;
    count_result(support_check_forward(&spread));
    support_case decaying = {.length = 20, .final_states = true, .log_decay = true, .dim_k = 4, .dim_v = 4};
    count_result(support_check_decode(&decaying));
    check_launches();
}

/* Shapes beyond what small tiles without matrix units cover. */
static void check_emulated(const char *instruction) {
    const loglin_dtype dtype = strncmp(instruction, "FMA", 3) == 0 ? LOGLIN_F32 : LOGLIN_BF16;
    loglin_lane_schedule schedule;
    support_emulate(instruction, "-fno-inline"); /* which leaves calls that Oclgrind does not know */
    support_require(loglin_lanes_choose(support_open()->device, dtype, &schedule), "loglin_lanes_choose");
    if (schedule.instruction == NULL || strcmp(schedule.instruction, instruction) != 0) {
        count_result("the instruction was not taken");
        return;
    }
    support_case c = {
        .length = 17, .heads = 1, .dim_k = 33, .dim_v = 17, .chunk = 16, .dtype = dtype, .only = LOGLIN_ENGINE_FUSED};
    count_result(support_check_forward(&c));
    if (!schedule.forward_only) {
        count_result(support_check_backward(&c));
    }
    if (!schedule.few_registers) {
        c.partition = LOGLIN_STRONG;
        count_result(support_check_forward(&c));
        c.op = LOGLIN_GATED_DELTA;
        count_result(support_check_forward(&c));
        c.partition = LOGLIN_WEAK;
        count_result(support_check_forward(&c));
    }
    if (support_launches("portable_forward", 256) == 0 ||
        (!schedule.forward_only && support_launches("portable_backward", 256) == 0)) {
        count_result("the kernels of matrix units were not launched");
    }
}

int main(int count, char **arguments) {
    if (count > 1) {
        check_emulated(arguments[1]);
    } else {
        check_everything();
    }
    printf("%zu passed, %zu failed\n", passed, failed);
    fflush(stdout); /* whatever becomes of the process when libraries clean up */
    return failed == 0 ? 0 : 1;
}
