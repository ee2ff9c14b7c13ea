/* SPDX-License-Identifier: Apache-2.0 */
#include "engine/panel.h"

#include "plan/problem.h"

#include <stdbool.h>

/* Everything of the panel but the division into waves. */
loglin_panel loglin_panel_of(const loglin_problem *problem) {
    unsigned bits = 0;
    while (((size_t)1 << bits) < problem->chunk) {
        bits++;
    }
    const bool strong = problem->partition == LOGLIN_STRONG, initial = problem->max_position > 0;
    const unsigned near_levels = bits + (strong ? 1 : 0);
    const unsigned first_level = initial ? 1 : near_levels + 1;
    const unsigned levels = (unsigned)loglin_num_levels(problem->max_length + problem->max_position);
    const unsigned columns = levels > first_level ? levels - first_level : 0;
    const bool near = strong && (initial || problem->max_length > problem->chunk);
    return (loglin_panel){
        .sequences = (unsigned)loglin_problem_sequences(problem),
        .heads = (unsigned)problem->heads,
        .groups = (unsigned)problem->groups,
        .dim_k = (unsigned)problem->dim_k,
        .dim_v = (unsigned)problem->dim_v,
        .levels = (unsigned)problem->levels,
        .chunk = (unsigned)problem->chunk,
        .chunk_bits = bits,
        .columns = columns + (near ? 1 : 0),
        .first_level = first_level,
        .near_levels = near_levels,
        .near = near,
        .delta = problem->op == LOGLIN_GATED_DELTA,
        .packed = problem->sequences > 0,
        .max_length = (unsigned)problem->max_length,
        .max_position = (unsigned)problem->max_position,
        .scale = problem->scale,
        .length = problem->length,
    };
}

/* Waves of the longest sequence; all slots of packed sequences in a row. */
size_t loglin_count_waves(const loglin_problem *problem) {
    if (problem->sequences > 0) {
        return problem->length / problem->chunk + 2 * problem->sequences + 1;
    }
    return (problem->length + problem->chunk - 1) / problem->chunk + (problem->max_position > 0 ? 1 : 0);
}
