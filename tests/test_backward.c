/* SPDX-License-Identifier: Apache-2.0 */
/* loglin_backward against the oracle's reverse mode: every gradient of every input. */
#include "support_criterion.h"
#include "support_golden.h"
#include "support_limits.h"

#include <string.h>

static const int32_t POSITIONS[] = {37, 0, 64};

Test(backward, lengths) {
    static const size_t lengths[] = {1, 2, 3, 63, 64, 65, 127, 200};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        expect_everywhere(support_check_backward, (support_case){.length = lengths[i]});
        expect_everywhere(support_check_backward, (support_case){.length = lengths[i], .final_states = true});
    }
}

Test(backward, long_sequence) {
    expect_operators(support_check_backward, (support_case){.length = 2049, .heads = 1, .dim_k = 4, .dim_v = 4});
}

Test(backward, every_length_mod_16) {
    for (size_t i = 0; i < 16; i++) {
        expect_everywhere(support_check_backward,
                          (support_case){.length = 81 + i, .chunk = 16, .heads = 1, .final_states = true});
    }
}

Test(backward, chunk_sizes) {
    support_build_fast();
    for (size_t chunk = 16; chunk <= 256; chunk *= 2) {
        expect_everywhere(support_check_backward, (support_case){.length = 200, .chunk = chunk, .final_states = true});
    }
    expect_operators(support_check_backward, (support_case){.length = 7, .chunk = 256, .final_states = true});
}

Test(backward, groups) {
    for (size_t groups = 1; groups <= 4; groups *= 2) {
        expect_everywhere(support_check_backward, (support_case){.length = 90, .heads = 4, .groups = groups});
    }
    expect_everywhere(support_check_backward, (support_case){.length = 90, .heads = 6, .groups = 3});
}

Test(backward, dimensions) {
    support_build_fast();
    static const struct {
        size_t k, v, length;
    } shapes[] = {{1, 1, 70}, {3, 5, 70}, {48, 72, 70}, {5, 128, 40}, {128, 1, 40}, {192, 384, 5}, {512, 512, 2}};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        expect_everywhere(support_check_backward,
                          (support_case){.length = shapes[i].length, .dim_k = shapes[i].k, .dim_v = shapes[i].v});
    }
}

Test(backward, dtypes) {
    support_build_fast();
    expect_dtypes(support_check_backward,
                  (support_case){.length = 100, .dim_k = 16, .dim_v = 24, .final_states = true, .chunk = 32});
}

Test(backward, states) {
    expect_everywhere(support_check_backward, (support_case){.length = 1, .batch = 3, .positions = POSITIONS});
    expect_everywhere(support_check_backward,
                      (support_case){.length = 90, .batch = 3, .positions = POSITIONS, .chunk = 32});
    expect_everywhere(support_check_backward, (support_case){.length = 90,
                                                             .batch = 3,
                                                             .heads = 4,
                                                             .groups = 2,
                                                             .positions = POSITIONS,
                                                             .final_states = true,
                                                             .chunk = 16});
    expect_everywhere(support_check_backward, (support_case){.length = 70,
                                                             .batch = 3,
                                                             .positions = POSITIONS,
                                                             .final_states = true,
                                                             .normalize_qk = 1,
                                                             .dtype = LOGLIN_BF16});
    for (int partition = 0; partition < 2; partition++) {
        const support_case c = {.partition = (loglin_partition)partition,
                                .length = 70,
                                .batch = 3,
                                .positions = POSITIONS,
                                .final_states = true,
                                .log_decay = true};
        expect_pass(support_check_backward(&c));
    }
}

Test(backward, options) {
    expect_everywhere(support_check_backward, (support_case){.length = 100, .no_gates = true});
    expect_everywhere(support_check_backward, (support_case){.length = 100, .scale = -0.25f});
    expect_everywhere(support_check_backward, (support_case){.length = 100, .normalize_qk = 1});
    expect_everywhere(support_check_backward, (support_case){.length = 70,
                                                             .heads = 4,
                                                             .groups = 2,
                                                             .normalize_qk = 1,
                                                             .scale = 0.3f,
                                                             .extra_levels = 5,
                                                             .final_states = true});
    expect_everywhere(support_check_backward, (support_case){.length = 70, .extra_levels = 24, .final_states = true});
    expect_everywhere(support_check_backward, (support_case){.batch = 3, .length = 77});
    expect_everywhere(support_check_backward, (support_case){.length = 70, .automatic = true});
}

Test(backward, optional_outputs) {
    expect_everywhere(support_check_backward, (support_case){.length = 70, .skip_optional = true});
    expect_everywhere(
        support_check_backward,
        (support_case){.length = 70, .batch = 3, .positions = POSITIONS, .final_states = true, .skip_optional = true});
}

Test(backward, offsets_queues_and_events) {
    expect_everywhere(support_check_backward, (support_case){.length = 70, .offset = 3, .final_states = true});
    expect_operators(support_check_backward, (support_case){.dtype = LOGLIN_F16,
                                                            .weight_dtype = LOGLIN_F16,
                                                            .length = 70,
                                                            .batch = 3,
                                                            .offset = 77,
                                                            .positions = POSITIONS,
                                                            .final_states = true});
    expect_operators(support_check_backward, (support_case){.length = 150, .chunk = 16, .out_of_order = true});
    expect_operators(support_check_backward,
                     (support_case){.length = 150, .chunk = 16, .out_of_order = true, .events = true});
    expect_operators(support_check_backward, (support_case){.length = 150, .chunk = 16, .events = true});
}

/* The same call twice gives the same bits: results are compared as they were stored. */
static const char *check_deterministic(const support_case *c) {
    support_data *data = support_data_make(c);
    support_results *first = support_results_make(data);
    support_results *second = support_results_make(data);
    const char *failure = support_backward(data, first);
    if (failure == NULL) {
        failure = support_backward(data, second);
    }
    if (failure == NULL && (memcmp(first->dq, second->dq, data->n_k * sizeof(double)) != 0 ||
                            memcmp(first->dk, second->dk, data->n_k * sizeof(double)) != 0 ||
                            memcmp(first->dv, second->dv, data->n_v * sizeof(double)) != 0 ||
                            memcmp(first->dg, second->dg, data->n_gates * sizeof(double)) != 0 ||
                            memcmp(first->dlevel_scales, second->dlevel_scales, data->n_levels * sizeof(double)) != 0 ||
                            memcmp(first->dbeta, second->dbeta, data->n_gates * sizeof(double)) != 0 ||
                            memcmp(first->dinitial, second->dinitial, data->n_states * sizeof(double)) != 0)) {
        failure = support_failure(data, "two runs differ");
    }
    support_results_free(second);
    support_results_free(first);
    support_data_free(data);
    return failure;
}

Test(backward, deterministic) {
    expect_everywhere(check_deterministic, (support_case){.length = 90,
                                                          .batch = 3,
                                                          .heads = 4,
                                                          .groups = 2,
                                                          .positions = POSITIONS,
                                                          .final_states = true,
                                                          .chunk = 16});
}

static void expect_golden(const char *name) {
    support_results *expected = NULL;
    support_data *data = support_golden(name, &expected);
    for (size_t chunk = 0; chunk <= 128; chunk += 64) {
        support_results *got = support_results_make(data);
        data->c.chunk = chunk;
        require_pass(support_backward(data, got));
        expect_pass(support_compare_backward(data, got, expected));
        support_results_free(got);
    }
    support_results_free(expected);
    support_data_free(data);
}

Test(backward, real_activations_mamba2) {
    expect_golden("mamba2_real_activations");
}

Test(backward, real_activations_gated_delta) {
    expect_golden("gated_delta_real_activations");
}
