/* SPDX-License-Identifier: Apache-2.0 */
/* loglin_step: a sequence token by token is the sequence in one pass.  All steps are enqueued before any is waited for. */
#include "support_criterion.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const int32_t POSITIONS[] = {5, 0, 62};

Test(step, equals_forward) {
    expect_everywhere(support_check_decode, (support_case){.length = 1, .final_states = true});
    expect_everywhere(support_check_decode, (support_case){.length = 140, .batch = 2, .final_states = true});
    expect_everywhere(support_check_decode,
                      (support_case){.length = 40, .heads = 6, .groups = 3, .dim_k = 3, .dim_v = 5});
    expect_everywhere(support_check_decode,
                      (support_case){.length = 20, .heads = 4, .groups = 4, .dim_k = 48, .dim_v = 72});
    expect_everywhere(support_check_decode, (support_case){.length = 9, .dim_k = 192, .dim_v = 384});
    expect_everywhere(support_check_decode, (support_case){.length = 20, .dim_k = 1, .dim_v = 1, .final_states = true});
}

Test(step, dtypes) {
    expect_dtypes(support_check_decode,
                  (support_case){.length = 40, .batch = 2, .dim_k = 16, .dim_v = 24, .final_states = true});
}

Test(step, options) {
    expect_everywhere(support_check_decode, (support_case){.length = 40, .no_gates = true, .final_states = true});
    expect_everywhere(support_check_decode, (support_case){.length = 40, .normalize_qk = 1, .scale = 0.3f});
    expect_everywhere(support_check_decode, (support_case){.length = 40, .extra_levels = 9, .final_states = true});
    expect_everywhere(support_check_decode, (support_case){.length = 40, .offset = 13, .final_states = true});
    expect_everywhere(support_check_decode,
                      (support_case){.length = 40, .batch = 3, .out_of_order = true, .final_states = true});
}

/* Levels that do not exist hold NaN at the start of every case; these start in the middle of things. */
Test(step, positions_differ) {
    expect_everywhere(support_check_decode,
                      (support_case){.length = 40, .batch = 3, .positions = POSITIONS, .final_states = true});
    expect_everywhere(support_check_decode, (support_case){.length = 40,
                                                           .batch = 3,
                                                           .heads = 4,
                                                           .groups = 2,
                                                           .positions = POSITIONS,
                                                           .final_states = true,
                                                           .extra_levels = 4,
                                                           .dtype = LOGLIN_F16});
}

Test(step, log_decay) {
    for (int partition = 0; partition < 2; partition++) {
        support_case c = {.partition = (loglin_partition)partition,
                          .length = 140,
                          .batch = 3,
                          .log_decay = true,
                          .final_states = true};
        expect_pass(support_check_decode(&c));
        c.positions = POSITIONS;
        expect_pass(support_check_decode(&c));
        c.no_gates = true;
        expect_pass(support_check_decode(&c));
    }
}

static void fall_deep(support_data *data) {
    for (size_t i = 0; i < data->n_gates; i++) {
        data->g[i] = i % 3 == 0 ? -50.0 : -0.01;
    }
}

Test(step, log_decay_far_below_zero) {
    for (int partition = 0; partition < 2; partition++) {
        const support_case c = {.partition = (loglin_partition)partition,
                                .length = 140,
                                .log_decay = true,
                                .final_states = true,
                                .adjust = fall_deep};
        expect_pass(support_check_decode(&c));
    }
}

/* ---- Steps by hand ---------------------------------------------------------------------------------------------- */

/* A plan for steps with its state on the device; tokens come from the case's data. */
typedef struct session {
    support_data *data;
    loglin_plan *plan;
    support_array values, log_decay, position, o;
} session;

static session open_session(const support_case *c) {
    session s = {.data = support_data_make(c)};
    const loglin_problem problem = support_problem(s.data, LOGLIN_STEP);
    support_require(loglin_plan_create(support_open()->device, &problem, &s.plan), "loglin_plan_create");
    int32_t *positions = support_alloc(s.data->sequences, sizeof *positions);
    for (size_t n = 0; n < s.data->sequences; n++) {
        positions[n] = (int32_t)s.data->positions[n];
    }
    s.position = support_inout_ints(positions, s.data->sequences, 0);
    s.values = support_output(LOGLIN_F32, s.data->n_states, 0);
    if (c->log_decay) {
        s.log_decay = support_output(LOGLIN_F32, s.data->n_states / (s.data->c.dim_k * s.data->c.dim_v), 0);
    }
    s.o = support_output(c->dtype, s.data->sequences * s.data->c.heads * s.data->c.dim_v, 0);
    free(positions);
    return s;
}

static void close_session(session *s) {
    support_array_free(&s->values);
    support_array_free(&s->log_decay);
    support_array_free(&s->position);
    support_array_free(&s->o);
    loglin_plan_destroy(s->plan);
    support_data_free(s->data);
}

/* Takes token t of every sequence; o [N, H, V] comes back. */
static void step_once(const session *s, size_t t, double *o) {
    support_data *token = support_slice(s->data, t, 1);
    const loglin_dtype dtype = token->c.dtype;
    const loglin_dtype weights = token->c.weight_dtype;
    support_array q = support_input(dtype, token->q, token->n_k, 0);
    support_array k = support_input(dtype, token->k, token->n_k, 0);
    support_array v = support_input(dtype, token->v, token->n_v, 0);
    support_array g = support_input(LOGLIN_F32, token->g, token->n_gates, 0);
    support_array level_scales = support_input(weights, token->level_scales, token->n_levels, 0);
    support_array beta = {0};
    if (token->beta != NULL) {
        beta = support_input(weights, token->beta, token->n_gates, 0);
    }
    const loglin_inputs in = {.q = support_buffer(&q),
                              .k = support_buffer(&k),
                              .v = support_buffer(&v),
                              .g = support_buffer(&g),
                              .level_scales = support_buffer(&level_scales),
                              .beta = support_buffer(&beta)};
    const loglin_state state = {.values = support_buffer(&s->values),
                                .log_decay = support_buffer(&s->log_decay),
                                .position = support_buffer(&s->position)};
    cl_event done = NULL;
    support_require(loglin_step(s->plan, &in, &state, support_buffer(&s->o), support_open()->queue, 0, NULL, &done),
                    "loglin_step");
    support_require(clWaitForEvents(1, &done), "clWaitForEvents");
    clReleaseEvent(done);
    cr_expect(support_read(&s->o, o), "o: written outside its array");
    support_array_free(&q);
    support_array_free(&k);
    support_array_free(&v);
    support_array_free(&g);
    support_array_free(&level_scales);
    support_array_free(&beta);
    support_data_free(token);
}

static void set_position(const session *s, size_t n, int32_t position) {
    support_require(clEnqueueWriteBuffer(support_open()->queue, s->position.mem, CL_TRUE, n * sizeof position,
                                         sizeof position, &position, 0, NULL, NULL),
                    "clEnqueueWriteBuffer");
}

/* Sequence 1 is reset after RESET tokens: from there on it is the sequence that begins there. */
static void expect_reset(const support_case *c) {
    enum { RESET = 13 };
    session s = open_session(c);
    const support_data *data = s.data;
    const size_t row = data->c.heads * data->c.dim_v;
    support_results *whole = support_results_make(data);
    support_oracle_forward(data, whole);
    support_data *late = support_slice(data, RESET, data->c.length - RESET);
    support_results *restarted = support_results_make(late);
    support_oracle_forward(late, restarted);
    double *o = support_alloc(data->sequences * row, sizeof *o);
    for (size_t t = 0; t < data->c.length; t++) {
        if (t == RESET) {
            set_position(&s, 1, 0);
        }
        step_once(&s, t, o);
        for (size_t n = 0; n < data->sequences; n++) {
            const double *expected = n == 1 && t >= RESET ? restarted->o + (n * late->c.length + t - RESET) * row
                                                          : whole->o + (n * data->c.length + t) * row;
            expect_pass(support_compare(data, "o", o + n * row, expected, row, SUPPORT_OUTPUT));
        }
    }
    free(o);
    support_results_free(restarted);
    support_data_free(late);
    support_results_free(whole);
    close_session(&s);
}

Test(step, resets_one_sequence) {
    for (int partition = 0; partition < 2; partition++) {
        support_case c = {.partition = (loglin_partition)partition, .batch = 3, .length = 30};
        expect_reset(&c);
        c.log_decay = true;
        expect_reset(&c);
        c.log_decay = false;
        c.op = LOGLIN_GATED_DELTA;
        expect_reset(&c);
    }
}

/* Levels that no key has reached yet still hold the NaN they were filled with. */
static void expect_untouched_levels(const support_case *c) {
    enum { TOKENS = 6 };
    session s = open_session(c);
    const support_data *data = s.data;
    const size_t matrix = data->c.dim_k * data->c.dim_v;
    double *o = support_alloc(data->sequences * data->c.heads * data->c.dim_v, sizeof *o);
    double *values = support_alloc(data->n_states, sizeof *values);
    for (size_t t = 0; t < TOKENS; t++) {
        step_once(&s, t, o);
        cr_expect(support_read(&s.values, values));
        for (size_t i = 0; i < data->n_states; i++) {
            const size_t level = i / matrix % data->levels;
            bool reached = false;
            for (size_t position = 1; position <= t + 1; position++) {
                reached = reached || oracle_level_exists(c->partition == LOGLIN_STRONG, position, level);
            }
            if (reached != !isnan(values[i])) {
                expect_pass(support_failure(data, "after token %zu: level %zu is %g", t, level, values[i]));
                break;
            }
        }
    }
    free(values);
    free(o);
    close_session(&s);
}

Test(step, touches_existing_levels_only) {
    for (int op = 0; op < 2; op++) {
        for (int partition = 0; partition < 2; partition++) {
            const support_case c = {.op = (loglin_op)op,
                                    .partition = (loglin_partition)partition,
                                    .batch = 2,
                                    .length = 40,
                                    .extra_levels = 3};
            expect_untouched_levels(&c);
        }
    }
}

/* 2^(L-1) tokens fill the levels: the next step of that sequence is refused, the others go on. */
static void expect_refusal_beyond_levels(const support_case *c) {
    session s = open_session(c);
    const support_data *data = s.data;
    const size_t row = data->c.heads * data->c.dim_v;
    double *o = support_alloc(data->sequences * row, sizeof *o);
    double *before = support_alloc(data->n_states, sizeof *before);
    double *after = support_alloc(data->n_states, sizeof *after);
    int32_t positions[2];
    for (size_t t = 0; t < 5; t++) {
        step_once(&s, t, o);
    }
    const int32_t end = 1 << (data->levels - 1);
    for (int32_t beyond = 0; beyond <= 1; beyond++) {
        set_position(&s, 0, end + beyond);
        support_read(&s.values, before);
        step_once(&s, 5 + (size_t)beyond, o);
        support_read(&s.values, after);
        cr_expect(support_read_ints(&s.position, positions));
        cr_expect_eq(positions[0], end + beyond, "the position of a refused sequence stays");
        cr_expect_eq(positions[1], 6 + beyond, "the other sequence goes on");
        cr_expect(memcmp(before, after, data->n_states / 2 * sizeof *before) == 0, "the refused state was written");
        for (size_t i = 0; i < row; i++) {
            cr_expect(isnan(o[i]), "o[%zu] of the refused sequence is %g", i, o[i]);
            cr_expect(isfinite(o[row + i]), "o[%zu] of the other sequence is %g", i, o[row + i]);
        }
    }
    set_position(&s, 0, end - 1); /* the last position that is allowed */
    step_once(&s, 7, o);
    cr_expect(support_read_ints(&s.position, positions));
    cr_expect_eq(positions[0], end);
    free(after);
    free(before);
    free(o);
    close_session(&s);
}

Test(step, position_beyond_levels) {
    for (int partition = 0; partition < 2; partition++) {
        support_case c = {.partition = (loglin_partition)partition, .batch = 2, .length = 16};
        expect_refusal_beyond_levels(&c);
        c.log_decay = true;
        expect_refusal_beyond_levels(&c);
        c.log_decay = false;
        c.op = LOGLIN_GATED_DELTA;
        c.dtype = LOGLIN_F16;
        expect_refusal_beyond_levels(&c);
    }
}
