/* SPDX-License-Identifier: Apache-2.0 */
/* Packed sequences of any lengths, through cu_seqlens. */
#include "support_criterion.h"
#include "support_limits.h"

#include <stdlib.h>

static const size_t MIXED[] = {0, 1, 0, 63, 64, 65, 1, 2, 0, 130, 0};
static const int32_t MIXED_POSITIONS[] = {0, 3, 17, 0, 64, 1, 200, 15, 5, 100, 31};
enum { MIXED_COUNT = sizeof MIXED / sizeof MIXED[0] };

static void expect_lengths(const size_t *lengths, size_t sequences, size_t chunk) {
    const support_case c = {.lengths = lengths, .sequences = sequences, .chunk = chunk, .final_states = true};
    expect_everywhere(support_check_forward, c);
    expect_everywhere(support_check_backward, c);
}

Test(varlen, mixed_lengths) {
    expect_lengths(MIXED, MIXED_COUNT, 16);
    expect_lengths(MIXED, MIXED_COUNT, 64);
}

Test(varlen, single_tokens_and_empty_sequences) {
    support_build_fast();
    static const size_t ones[] = {1, 1, 1, 1, 1, 1, 1};
    static const size_t mostly_empty[] = {0, 0, 0, 0, 0, 1, 0, 0};
    static const size_t one_sequence[] = {100};
    static const size_t around_empty[] = {5, 0, 0, 20};
    expect_lengths(ones, sizeof ones / sizeof ones[0], 16);
    expect_lengths(mostly_empty, sizeof mostly_empty / sizeof mostly_empty[0], 16);
    expect_lengths(one_sequence, 1, 64);
    expect_lengths(around_empty, sizeof around_empty / sizeof around_empty[0], 16);
}

Test(varlen, states_at_positions) {
    support_build_fast();
    for (size_t chunk = 16; chunk <= 64; chunk *= 4) {
        const support_case c = {.lengths = MIXED,
                                .sequences = MIXED_COUNT,
                                .positions = MIXED_POSITIONS,
                                .chunk = chunk,
                                .final_states = true};
        expect_everywhere(support_check_forward, c);
        expect_everywhere(support_check_backward, c);
    }
}

Test(varlen, states_in_place) {
    expect_everywhere(support_check_forward, (support_case){.lengths = MIXED,
                                                            .sequences = MIXED_COUNT,
                                                            .positions = MIXED_POSITIONS,
                                                            .final_states = true,
                                                            .in_place = true});
}

Test(varlen, options) {
    const support_case c = {.lengths = MIXED,
                            .sequences = MIXED_COUNT,
                            .positions = MIXED_POSITIONS,
                            .heads = 4,
                            .groups = 2,
                            .dim_k = 5,
                            .dim_v = 3,
                            .normalize_qk = 1,
                            .scale = 0.5f,
                            .extra_levels = 3,
                            .offset = 7,
                            .out_of_order = true,
                            .final_states = true};
    expect_everywhere(support_check_forward, c);
    expect_everywhere(support_check_backward, c);
    support_case half = c;
    half.dtype = LOGLIN_BF16;
    half.no_gates = true;
    expect_operators(support_check_forward, half);
    expect_operators(support_check_backward, half);
}

/*
 * Sequences longer than max_length at positions beyond max_position: the numbers are undefined, but nothing is written
 * outside the buffers.
 */
static void expect_kept_inside(loglin_op op, loglin_partition partition, loglin_engine engine) {
    enum { LENGTH = 303, HEADS = 1, DIM = 64, SEQUENCES = 1, POSITION = 1, CHUNK = 16, MAX_LENGTH = 2 };
    static const int32_t bounds[SEQUENCES + 1] = {0, LENGTH}, positions[SEQUENCES] = {2000000000};
    const bool delta = op == LOGLIN_GATED_DELTA;
    const loglin_problem problem = {.op = op,
                                    .partition = partition,
                                    .batch = 1,
                                    .length = LENGTH,
                                    .heads = HEADS,
                                    .groups = 1,
                                    .dim_k = DIM,
                                    .dim_v = DIM,
                                    .levels = loglin_num_levels(MAX_LENGTH + POSITION),
                                    .sequences = SEQUENCES,
                                    .max_length = MAX_LENGTH,
                                    .max_position = POSITION,
                                    .phases = LOGLIN_FORWARD | LOGLIN_BACKWARD,
                                    .engine = engine,
                                    .chunk = CHUNK};
    const support_device *device = support_open();
    loglin_plan *plan = NULL;
    support_require(loglin_plan_create(device->device, &problem, &plan), "loglin_plan_create");
    const size_t keys = (size_t)LENGTH * DIM, values = (size_t)LENGTH * HEADS * DIM, gates = (size_t)LENGTH * HEADS,
                 scales = gates * problem.levels, states = loglin_state_size(plan) / sizeof(float);
    double *zeros = support_alloc(values + scales + states, sizeof *zeros);
    support_array in[] = {
        support_input(LOGLIN_F32, zeros, keys, 0),   support_input(LOGLIN_F32, zeros, keys, 0),
        support_input(LOGLIN_F32, zeros, values, 0), support_input(LOGLIN_F32, zeros, scales, 0),
        support_input(LOGLIN_F32, zeros, gates, 0),  support_input_ints(bounds, SEQUENCES + 1, 0),
        support_input(LOGLIN_F32, zeros, states, 0), support_input_ints(positions, SEQUENCES, 0),
    };
    support_array out[] = {
        support_output(LOGLIN_F32, values, 0), support_output(LOGLIN_F32, states, 0),
        support_output(LOGLIN_F32, keys, 0),   support_output(LOGLIN_F32, keys, 0),
        support_output(LOGLIN_F32, values, 0), support_output(LOGLIN_F32, gates, 0),
        support_output(LOGLIN_F32, scales, 0), support_output(LOGLIN_F32, gates, 0),
        support_output(LOGLIN_F32, states, 0),
    };
    const loglin_buffer absent = {0};
    const loglin_inputs inputs = {.q = support_buffer(&in[0]),
                                  .k = support_buffer(&in[1]),
                                  .v = support_buffer(&in[2]),
                                  .level_scales = support_buffer(&in[3]),
                                  .beta = delta ? support_buffer(&in[4]) : absent,
                                  .cu_seqlens = support_buffer(&in[5])};
    const loglin_state initial = {.values = support_buffer(&in[6]), .position = support_buffer(&in[7])},
                       final = {.values = support_buffer(&out[1])};
    const loglin_gradients gradients = {.dq = support_buffer(&out[2]),
                                        .dk = support_buffer(&out[3]),
                                        .dv = support_buffer(&out[4]),
                                        .dg = support_buffer(&out[5]),
                                        .dlevel_scales = support_buffer(&out[6]),
                                        .dbeta = delta ? support_buffer(&out[7]) : absent,
                                        .dinitial_states = support_buffer(&out[8])};
    for (int phase = LOGLIN_FORWARD; phase <= LOGLIN_BACKWARD; phase++) {
        support_workspace workspace = support_workspace_make(loglin_workspace_size(plan, (loglin_phase)phase));
        const loglin_buffer place = {.mem = workspace.mem};
        support_require(phase == LOGLIN_FORWARD
                            ? loglin_forward(plan, &inputs, &initial, support_buffer(&out[0]), &final, place,
                                             device->queue, 0, NULL, NULL)
                            : loglin_backward(plan, &inputs, &initial, support_buffer(&in[2]), support_buffer(&in[6]),
                                              &gradients, place, device->queue, 0, NULL, NULL),
                        "the call");
        support_require(clFinish(device->queue), "clFinish");
        cr_expect(support_workspace_intact(&workspace), "operator %d, partition %d, engine %d: phase %d's workspace",
                  (int)op, (int)partition, (int)engine, phase);
        support_workspace_free(&workspace);
    }
    double *got = support_alloc(values + scales + states, sizeof *got);
    for (size_t i = 0; i < sizeof out / sizeof out[0]; i++) {
        cr_expect(support_read(&out[i], got), "operator %d, partition %d, engine %d: output %zu", (int)op,
                  (int)partition, (int)engine, i);
        support_array_free(&out[i]);
    }
    for (size_t i = 0; i < sizeof in / sizeof in[0]; i++) {
        support_array_free(&in[i]);
    }
    free(got);
    free(zeros);
    loglin_plan_destroy(plan);
}

Test(varlen, bounds_and_positions_beyond_the_problem) {
    support_build_fast();
    expect_kept_inside(LOGLIN_MAMBA2, LOGLIN_WEAK, LOGLIN_ENGINE_FUSED);
    expect_kept_inside(LOGLIN_GATED_DELTA, LOGLIN_WEAK, LOGLIN_ENGINE_FUSED);
    expect_kept_inside(LOGLIN_MAMBA2, LOGLIN_STRONG, LOGLIN_ENGINE_FUSED);
    expect_kept_inside(LOGLIN_MAMBA2, LOGLIN_STRONG, LOGLIN_ENGINE_BLAS);
}
