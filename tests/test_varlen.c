/* SPDX-License-Identifier: Apache-2.0 */
/* Packed sequences of any lengths, through cu_seqlens. */
#include "support_criterion.h"
#include "support_limits.h"

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
