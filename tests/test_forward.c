/* SPDX-License-Identifier: Apache-2.0 */
/* loglin_forward against the oracle, over shapes that cross every boundary. */
#include "support_criterion.h"
#include "support_golden.h"
#include "support_limits.h"

Test(forward, lengths) {
    static const size_t lengths[] = {1, 2, 3, 63, 64, 65, 127, 200};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        expect_everywhere(support_check_forward, (support_case){.length = lengths[i], .final_states = true});
    }
}

Test(forward, long_sequence) {
    expect_everywhere(support_check_forward,
                      (support_case){.length = 4097, .dim_k = 4, .dim_v = 4, .final_states = true});
}

Test(forward, every_length_mod_64) {
    for (size_t i = 0; i < 64; i++) {
        expect_operators(support_check_forward, (support_case){.partition = i % 4 == 1 ? LOGLIN_STRONG : LOGLIN_WEAK,
                                                               .length = 129 + i,
                                                               .chunk = 64,
                                                               .heads = 1,
                                                               .final_states = true});
    }
}

Test(forward, chunk_sizes) {
    support_build_fast();
    for (size_t chunk = 16; chunk <= 256; chunk *= 2) {
        expect_everywhere(support_check_forward, (support_case){.length = 200, .chunk = chunk, .final_states = true});
    }
    expect_everywhere(support_check_forward, (support_case){.length = 7, .chunk = 256, .final_states = true});
}

Test(forward, groups) {
    for (size_t groups = 1; groups <= 4; groups *= 2) {
        expect_everywhere(support_check_forward, (support_case){.length = 90, .heads = 4, .groups = groups});
    }
    expect_everywhere(support_check_forward, (support_case){.length = 90, .heads = 6, .groups = 3});
    expect_everywhere(support_check_forward, (support_case){.length = 150, .heads = 1});
}

Test(forward, dimensions) {
    support_build_fast();
    static const struct {
        size_t k, v, length;
    } shapes[] = {{1, 1, 70},   {3, 5, 70},   {48, 72, 130},  {5, 128, 70},
                  {128, 1, 70}, {33, 31, 70}, {192, 384, 20}, {512, 512, 5}};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        expect_everywhere(support_check_forward, (support_case){.length = shapes[i].length,
                                                                .dim_k = shapes[i].k,
                                                                .dim_v = shapes[i].v,
                                                                .final_states = true});
    }
}

Test(forward, dtypes) {
    support_build_fast();
    /* Rows of 16-bit elements that begin at no whole word. */
    for (size_t offset = 0; offset < 2; offset++) {
        expect_dtypes(
            support_check_forward,
            (support_case){.length = 100, .dim_k = 17, .dim_v = 21, .offset = offset, .final_states = offset == 0});
    }
}

Test(forward, levels_beyond_need) {
    for (size_t extra = 1; extra <= 24; extra += 23) {
        expect_everywhere(support_check_forward,
                          (support_case){.length = 100, .extra_levels = extra, .final_states = true});
    }
    expect_everywhere(support_check_forward, (support_case){.length = 1, .extra_levels = 31, .final_states = true});
}

Test(forward, options) {
    expect_everywhere(support_check_forward, (support_case){.length = 100, .no_gates = true, .final_states = true});
    expect_everywhere(support_check_forward, (support_case){.length = 100, .scale = 0.125f});
    expect_everywhere(support_check_forward, (support_case){.length = 100, .scale = -3.0f});
    expect_everywhere(support_check_forward, (support_case){.length = 100, .normalize_qk = 1, .final_states = true});
    expect_everywhere(support_check_forward, (support_case){.length = 70,
                                                            .heads = 4,
                                                            .groups = 2,
                                                            .dim_k = 24,
                                                            .normalize_qk = 1,
                                                            .scale = 0.3f,
                                                            .no_gates = true,
                                                            .dtype = LOGLIN_BF16});
}

Test(forward, batches) {
    expect_everywhere(support_check_forward, (support_case){.batch = 3, .length = 77, .final_states = true});
    expect_everywhere(support_check_forward, (support_case){.batch = 5, .length = 1, .final_states = true});
    expect_everywhere(
        support_check_forward,
        (support_case){.batch = 2, .length = 130, .heads = 4, .groups = 2, .chunk = 16, .final_states = true});
}

Test(forward, offsets_into_buffers) {
    static const size_t offsets[] = {1, 3, 64, 1021};
    for (size_t i = 0; i < sizeof offsets / sizeof offsets[0]; i++) {
        expect_everywhere(support_check_forward,
                          (support_case){.length = 70, .offset = offsets[i], .final_states = true});
    }
    expect_everywhere(support_check_forward,
                      (support_case){.dtype = LOGLIN_F16, .weight_dtype = LOGLIN_F16, .length = 70, .offset = 5});
}

Test(forward, queues_and_events) {
    expect_operators(support_check_forward, (support_case){.length = 150, .chunk = 16, .out_of_order = true});
    expect_operators(support_check_forward, (support_case){.length = 150, .chunk = 16, .events = true});
    expect_everywhere(
        support_check_forward,
        (support_case){.length = 150, .chunk = 16, .out_of_order = true, .events = true, .final_states = true});
}

Test(forward, automatic_engine) {
    expect_everywhere(support_check_forward, (support_case){.length = 100, .automatic = true, .final_states = true});
}

static void expect_golden(const char *name) {
    support_results *expected = NULL;
    support_data *data = support_golden(name, &expected);
    for (size_t chunk = 0; chunk <= 256; chunk = chunk == 0 ? 16 : chunk * 4) {
        support_results *got = support_results_make(data);
        data->c.chunk = chunk;
        require_pass(support_forward(data, got));
        expect_pass(support_compare_forward(data, got, expected));
        support_results_free(got);
    }
    support_results_free(expected);
    support_data_free(data);
}

Test(forward, real_activations_mamba2) {
    expect_golden("mamba2_real_activations");
}

Test(forward, real_activations_gated_delta) {
    expect_golden("gated_delta_real_activations");
}
