/* SPDX-License-Identifier: Apache-2.0 */
/* A sequence cut into pieces, each by a forward call or by steps, is the sequence in one pass; so are its gradients. */
#include "support_criterion.h"
#include "support_limits.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const int32_t POSITIONS[] = {5, 0, 64};

typedef enum method {
    BY_FORWARD,
    BY_STEPS,
} method;

typedef struct piece {
    size_t first, count;
    method method;
} piece;

/* Rows of a piece of every sequence to their place in the whole. */
static void place(const support_data *data, const piece *p, size_t row, const double *from, double *whole) {
    for (size_t n = 0; n < data->sequences; n++) {
        memcpy(whole + (n * data->c.length + p->first) * row, from + n * p->count * row,
               p->count * row * sizeof *whole);
    }
}

/* A piece as a problem of its own, from the states after the tokens before it; states NULL at the very beginning. */
static support_data *cut(const support_data *data, const piece *p, const double *states) {
    support_data *part = support_slice(data, p->first, p->count);
    part->c.final_states = true;
    part->engine = LOGLIN_ENGINE_BLAS;
    if (states != NULL) {
        size_t *positions = support_alloc(data->sequences, sizeof *positions);
        for (size_t n = 0; n < data->sequences; n++) {
            positions[n] = data->positions[n] + p->first;
        }
        support_set_initial(part, positions, states);
        free(positions);
    }
    return part;
}

/* Runs the pieces one after another; results are those of the whole.  states [pieces + 1]: before and after each. */
static const char *run_pieces(const support_data *data, const piece *pieces, size_t count, support_results *whole,
                              double **states) {
    const char *failure = NULL;
    for (size_t i = 0; failure == NULL && i < count; i++) {
        support_data *part = cut(data, &pieces[i], states[i]);
        support_results *got = support_results_make(part);
        failure = pieces[i].method == BY_STEPS ? support_decode(part, got) : support_forward(part, got);
        place(data, &pieces[i], data->c.heads * data->c.dim_v, got->o, whole->o);
        states[i + 1] = support_alloc(data->n_states, sizeof(double));
        memcpy(states[i + 1], got->final, data->n_states * sizeof(double));
        memcpy(whole->final, got->final, data->n_states * sizeof(double));
        memcpy(whole->final_position, got->final_position, data->sequences * sizeof(int32_t));
        support_results_free(got);
        support_data_free(part);
    }
    return failure;
}

/* The gradients of the pieces, last to first, each handing the gradient of its initial states back. */
static const char *run_gradients(const support_data *data, const piece *pieces, size_t count, double **states,
                                 support_results *whole) {
    const support_case *c = &data->c;
    const char *failure = NULL;
    double *dstates = NULL;
    if (data->dfinal != NULL) {
        dstates = support_alloc(data->n_states, sizeof *dstates);
        memcpy(dstates, data->dfinal, data->n_states * sizeof *dstates);
    }
    for (size_t i = count; failure == NULL && i-- > 0;) {
        support_data *part = cut(data, &pieces[i], states[i]);
        support_results *got = support_results_make(part);
        if (dstates != NULL) {
            support_set_dfinal(part, dstates);
        }
        failure = support_backward(part, got);
        place(data, &pieces[i], c->groups * c->dim_k, got->dq, whole->dq);
        place(data, &pieces[i], c->groups * c->dim_k, got->dk, whole->dk);
        place(data, &pieces[i], c->heads * c->dim_v, got->dv, whole->dv);
        place(data, &pieces[i], c->heads, got->dg, whole->dg);
        place(data, &pieces[i], c->heads, got->dbeta, whole->dbeta);
        place(data, &pieces[i], c->heads * data->levels, got->dlevel_scales, whole->dlevel_scales);
        free(dstates);
        dstates = support_alloc(data->n_states, sizeof *dstates);
        memcpy(dstates, got->dinitial, data->n_states * sizeof *dstates);
        support_results_free(got);
        support_data_free(part);
    }
    memcpy(whole->dinitial, dstates, data->n_states * sizeof *dstates);
    free(dstates);
    return failure;
}

static void expect_pieces(const support_data *data, const support_results *expected, const piece *pieces, size_t count,
                          bool gradients) {
    support_results *got = support_results_make(data);
    double **states = support_alloc(count + 1, sizeof *states);
    if (data->initial != NULL) {
        states[0] = support_alloc(data->n_states, sizeof(double));
        memcpy(states[0], data->initial, data->n_states * sizeof(double));
    }
    const char *failure = run_pieces(data, pieces, count, got, states);
    if (failure == NULL) {
        failure = support_compare_forward(data, got, expected);
    }
    if (failure == NULL && gradients) {
        failure = run_gradients(data, pieces, count, states, got);
        if (failure == NULL) {
            failure = support_compare_backward(data, got, expected);
        }
    }
    cr_expect(failure == NULL, "%zu pieces, the first of %zu tokens: %s", count, pieces[0].count, failure);
    for (size_t i = 0; i <= count; i++) {
        free(states[i]);
    }
    free(states);
    support_results_free(got);
}

typedef void pieces_test(const support_data *data, const support_results *expected);

static void with_expectation(support_case c, bool gradients, pieces_test *run) {
    for (int op = 0; op < 2; op++) {
        for (int partition = 0; partition < 2; partition++) {
            c.op = (loglin_op)op;
            c.partition = (loglin_partition)partition;
            support_data *data = support_data_make(&c);
            support_results *expected = support_results_make(data);
            support_oracle_forward(data, expected);
            if (gradients) {
                support_oracle_backward(data, expected);
            }
            run(data, expected);
            support_results_free(expected);
            support_data_free(data);
        }
    }
}

/* ---- Two pieces: every split point ------------------------------------------------------------------------------ */

static void split_everywhere(const support_data *data, const support_results *expected) {
    for (size_t first = 1; first < data->c.length; first++) {
        const piece pieces[] = {{0, first, BY_FORWARD}, {first, data->c.length - first, BY_FORWARD}};
        expect_pieces(data, expected, pieces, 2, false);
    }
}

Test(states, every_split_with_chunk_16) {
    with_expectation(
        (support_case){.length = 67, .batch = 2, .chunk = 16, .final_states = true, .positions = POSITIONS}, false,
        split_everywhere);
}

Test(states, every_split_with_chunk_32) {
    with_expectation((support_case){.length = 130, .heads = 1, .chunk = 32, .final_states = true}, false,
                     split_everywhere);
}

static void split_somewhere(const support_data *data, const support_results *expected) {
    static const size_t splits[] = {1, 16, 63, 64, 65, 96, 127, 128, 129, 150};
    for (size_t i = 0; i < sizeof splits / sizeof splits[0]; i++) {
        const size_t rest = data->c.length - splits[i];
        const piece forwards[] = {{0, splits[i], BY_FORWARD}, {splits[i], rest, BY_FORWARD}};
        expect_pieces(data, expected, forwards, 2, false);
    }
}

Test(states, splits_with_chunk_64) {
    with_expectation(
        (support_case){.length = 200, .batch = 3, .chunk = 64, .final_states = true, .positions = POSITIONS}, false,
        split_somewhere);
    with_expectation(
        (support_case){
            .length = 200, .chunk = 64, .final_states = true, .normalize_qk = 1, .scale = 0.5f, .no_gates = true},
        false, split_somewhere);
}

static void forward_and_steps(const support_data *data, const support_results *expected) {
    for (size_t first = 1; first < data->c.length; first += 6) {
        const size_t rest = data->c.length - first;
        const piece steps_last[] = {{0, first, BY_FORWARD}, {first, rest, BY_STEPS}};
        const piece steps_first[] = {{0, first, BY_STEPS}, {first, rest, BY_FORWARD}};
        expect_pieces(data, expected, steps_last, 2, false);
        expect_pieces(data, expected, steps_first, 2, false);
    }
}

Test(states, forward_and_steps) {
    with_expectation(
        (support_case){.length = 70, .batch = 3, .chunk = 16, .final_states = true, .positions = POSITIONS}, false,
        forward_and_steps);
    with_expectation((support_case){.length = 70,
                                    .batch = 2,
                                    .chunk = 32,
                                    .final_states = true,
                                    .dtype = LOGLIN_BF16,
                                    .weight_dtype = LOGLIN_BF16},
                     false, forward_and_steps);
}

/* ---- Many pieces, with gradients -------------------------------------------------------------------------------- */

static void many_pieces(const support_data *data, const support_results *expected) {
    static const piece pieces[] = {{0, 1, BY_FORWARD},   {1, 2, BY_FORWARD},   {3, 13, BY_FORWARD},
                                   {16, 17, BY_FORWARD}, {33, 40, BY_FORWARD}, {73, 27, BY_FORWARD}};
    expect_pieces(data, expected, pieces, sizeof pieces / sizeof pieces[0], true);
    for (size_t first = 1; first < data->c.length; first += 11) {
        const piece halves[] = {{0, first, BY_FORWARD}, {first, data->c.length - first, BY_FORWARD}};
        expect_pieces(data, expected, halves, 2, true);
    }
}

Test(states, gradients_of_pieces) {
    with_expectation(
        (support_case){.length = 100, .batch = 3, .chunk = 16, .positions = POSITIONS, .final_states = true}, true,
        many_pieces);
    with_expectation((support_case){.length = 100,
                                    .heads = 4,
                                    .groups = 2,
                                    .chunk = 32,
                                    .normalize_qk = 1,
                                    .scale = 0.7f,
                                    .final_states = true},
                     true, many_pieces);
}

/* ---- One call --------------------------------------------------------------------------------------------------- */

Test(states, initial_positions) {
    support_build_fast();
    static const int32_t positions[][3] = {{1, 2, 3}, {0, 0, 0}, {15, 16, 17}, {63, 100, 64}, {1000, 7, 129}};
    for (size_t i = 0; i < sizeof positions / sizeof positions[0]; i++) {
        for (size_t chunk = 16; chunk <= 64; chunk *= 4) {
            expect_everywhere(
                support_check_forward,
                (support_case){
                    .length = 100, .batch = 3, .chunk = chunk, .positions = positions[i], .final_states = true});
        }
        expect_everywhere(
            support_check_forward,
            (support_case){
                .length = 1, .batch = 3, .positions = positions[i], .final_states = true, .extra_levels = 2});
    }
}

Test(states, initial_states_only_and_in_place) {
    expect_everywhere(support_check_forward, (support_case){.length = 70, .batch = 3, .positions = POSITIONS});
    expect_everywhere(support_check_forward, (support_case){.length = 70,
                                                            .batch = 3,
                                                            .heads = 4,
                                                            .groups = 2,
                                                            .dim_k = 24,
                                                            .dim_v = 10,
                                                            .positions = POSITIONS,
                                                            .final_states = true,
                                                            .in_place = true});
    expect_dtypes(
        support_check_forward,
        (support_case){
            .length = 70, .batch = 3, .positions = POSITIONS, .final_states = true, .in_place = true, .offset = 9});
}

Test(states, log_decay) {
    for (int partition = 0; partition < 2; partition++) {
        support_case c = {.partition = (loglin_partition)partition,
                          .length = 70,
                          .batch = 3,
                          .positions = POSITIONS,
                          .final_states = true,
                          .log_decay = true};
        expect_pass(support_check_forward(&c));
        c.in_place = true;
        expect_pass(support_check_forward(&c));
        c.in_place = false;
        c.positions = NULL;
        expect_pass(support_check_forward(&c));
    }
}
