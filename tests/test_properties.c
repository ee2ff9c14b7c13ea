/* SPDX-License-Identifier: Apache-2.0 */
/* What the operators must satisfy whatever the inputs. */
#include "support_criterion.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const int32_t POSITIONS[] = {21, 0};

/* ---- Causality -------------------------------------------------------------------------------------------------- */

static void change_from(double *x, size_t sequences, size_t length, size_t row, size_t first) {
    for (size_t i = 0; x != NULL && i < sequences * length * row; i++) {
        if (i / row % length >= first) {
            x[i] *= 0.5; /* exact in every storage type */
        }
    }
}

/* The outputs of tokens before `first` are the same bits whatever comes at `first` and later. */
static const char *causal_at(const support_data *data, const support_results *before, size_t first) {
    const support_case *c = &data->c;
    support_data *changed = support_slice(data, 0, c->length);
    support_results *after = support_results_make(changed);
    changed->engine = data->engine;
    if (data->initial != NULL) {
        support_set_initial(changed, data->positions, data->initial);
    }
    change_from(changed->q, c->batch, c->length, c->groups * c->dim_k, first);
    change_from(changed->k, c->batch, c->length, c->groups * c->dim_k, first);
    change_from(changed->v, c->batch, c->length, c->heads * c->dim_v, first);
    change_from(changed->g, c->batch, c->length, c->heads, first);
    change_from(changed->level_scales, c->batch, c->length, c->heads * data->levels, first);
    change_from(changed->beta, c->batch, c->length, c->heads, first);
    const char *failure = support_forward(changed, after);
    const size_t row = c->heads * c->dim_v;
    for (size_t n = 0; failure == NULL && n < c->batch; n++) {
        if (memcmp(before->o + n * c->length * row, after->o + n * c->length * row, first * row * sizeof(double)) !=
            0) {
            failure = support_failure(data, "inputs from token %zu on change outputs before it", first);
        }
    }
    if (failure == NULL && memcmp(before->o, after->o, data->n_v * sizeof(double)) == 0) {
        failure = support_failure(data, "inputs from token %zu on change nothing", first);
    }
    support_results_free(after);
    support_data_free(changed);
    return failure;
}

static const char *check_causal(const support_case *c) {
    static const size_t firsts[] = {1, 15, 16, 17, 63, 64, 65, 100, 149};
    support_data *data = support_data_make(c);
    support_results *results = support_results_make(data);
    data->engine = LOGLIN_ENGINE_BLAS;
    const char *failure = support_forward(data, results);
    for (size_t i = 0; failure == NULL && i < sizeof firsts / sizeof firsts[0]; i++) {
        failure = causal_at(data, results, firsts[i]);
    }
    support_results_free(results);
    support_data_free(data);
    return failure;
}

Test(properties, causality) {
    for (size_t chunk = 16; chunk <= 256; chunk *= 4) {
        expect_everywhere(check_causal, (support_case){.length = 150, .batch = 2, .chunk = chunk});
    }
    expect_everywhere(
        check_causal,
        (support_case){
            .length = 150, .batch = 2, .chunk = 32, .positions = POSITIONS, .normalize_qk = 1, .dtype = LOGLIN_BF16});
}

/* ---- Linearity in v --------------------------------------------------------------------------------------------- */

static const char *check_linear(const support_case *c) {
    support_data *data = support_data_make(c);
    data->engine = LOGLIN_ENGINE_BLAS;
    support_results *first = support_results_make(data);
    support_results *second = support_results_make(data);
    support_results *sum = support_results_make(data);
    double *v = support_alloc(data->n_v, sizeof *v);
    memcpy(v, data->v, data->n_v * sizeof *v);
    const char *failure = support_forward(data, first);
    for (size_t i = 0; i < data->n_v; i++) {
        data->v[i] = support_round(LOGLIN_F32, v[data->n_v - 1 - i]);
    }
    failure = failure != NULL ? failure : support_forward(data, second);
    for (size_t i = 0; i < data->n_v; i++) {
        data->v[i] = support_round(LOGLIN_F32, 2.0 * v[i] - 0.5 * data->v[i]);
        first->o[i] = 2.0 * first->o[i] - 0.5 * second->o[i];
    }
    failure = failure != NULL ? failure : support_forward(data, sum);
    if (failure == NULL) {
        failure = support_compare(data, "o of a sum", sum->o, first->o, data->n_v, SUPPORT_OUTPUT);
    }
    free(v);
    support_results_free(sum);
    support_results_free(second);
    support_results_free(first);
    support_data_free(data);
    return failure;
}

Test(properties, linearity_in_v) {
    expect_everywhere(check_linear, (support_case){.length = 200, .dim_v = 11});
}

/* ---- All level weights 1 ---------------------------------------------------------------------------------------- */

static void weights_of_one(support_data *data) {
    for (size_t i = 0; i < data->n_levels; i++) {
        data->level_scales[i] = 1.0;
    }
}

/* One token of plain (gated, delta rule) linear attention: S [K, V] takes k, v in, and o = S^T q. */
static void plain_token(const support_case *c, double *s, const double *q, const double *k, const double *v, double g,
                        const double *beta, double *o) {
    for (size_t j = 0; j < c->dim_v; j++) {
        double held = 0.0;
        for (size_t i = 0; i < c->dim_k; i++) {
            held += k[i] * s[i * c->dim_v + j];
        }
        o[j] = 0.0;
        for (size_t i = 0; i < c->dim_k; i++) {
            double *cell = &s[i * c->dim_v + j];
            *cell = beta == NULL ? exp(g) * *cell + k[i] * v[j]
                                 : exp(g) * (*cell - *beta * k[i] * held) + *beta * k[i] * v[j];
            o[j] += *cell * q[i];
        }
    }
}

static void plain_attention(const support_data *data, double *o) {
    const support_case *c = &data->c;
    for (size_t h = 0; h < c->heads; h++) {
        double *s = support_alloc(c->dim_k * c->dim_v, sizeof *s);
        for (size_t t = 0; t < c->length; t++) {
            const size_t row = t * c->heads + h;
            const size_t k_row = (t * c->groups + h / (c->heads / c->groups)) * c->dim_k;
            plain_token(c, s, data->q + k_row, data->k + k_row, data->v + row * c->dim_v,
                        data->g == NULL ? 0.0 : data->g[row], data->beta == NULL ? NULL : &data->beta[row],
                        o + row * c->dim_v);
        }
        free(s);
    }
}

static const char *check_plain(const support_case *c) {
    support_data *data = support_data_make(c);
    data->engine = LOGLIN_ENGINE_BLAS;
    support_results *got = support_results_make(data);
    double *expected = support_alloc(data->n_v, sizeof *expected);
    plain_attention(data, expected);
    const char *failure = support_forward(data, got);
    if (failure == NULL) {
        failure = support_compare(data, "o with all weights 1", got->o, expected, data->n_v, SUPPORT_OUTPUT);
    }
    free(expected);
    support_results_free(got);
    support_data_free(data);
    return failure;
}

Test(properties, level_weights_of_one_are_plain_attention) {
    expect_everywhere(check_plain, (support_case){.length = 300, .heads = 4, .groups = 2, .adjust = weights_of_one});
    expect_everywhere(check_plain, (support_case){.length = 300, .no_gates = true, .adjust = weights_of_one});
}

/* ---- Level gradients -------------------------------------------------------------------------------------------- */

/* sum_l lambda dlambda = do . o, and columns without a key have gradient exactly 0. */
static const char *check_level_gradients(const support_case *c) {
    support_data *data = support_data_make(c);
    data->engine = LOGLIN_ENGINE_BLAS;
    support_results *got = support_results_make(data);
    double *from_levels = support_alloc(data->n_gates, sizeof *from_levels);
    double *from_output = support_alloc(data->n_gates, sizeof *from_output);
    const char *failure = support_forward(data, got);
    failure = failure != NULL ? failure : support_backward(data, got);
    for (size_t row = 0; failure == NULL && row < data->n_gates; row++) {
        const size_t t = row / c->heads;
        const size_t n = t / data->c.length;
        const size_t position = data->positions[n] + t % data->c.length;
        for (size_t l = 0; l < data->levels; l++) {
            const double gradient = got->dlevel_scales[row * data->levels + l];
            from_levels[row] += data->level_scales[row * data->levels + l] * gradient;
            if (gradient != 0.0 && !oracle_level_exists(c->partition == LOGLIN_STRONG, position + 1, l)) {
                failure = support_failure(data, "dlevel_scales of unused level %zu at position %zu is %g", l, position,
                                          gradient);
            }
        }
        for (size_t i = 0; i < data->c.dim_v; i++) {
            from_output[row] += data->d_o[row * data->c.dim_v + i] * got->o[row * data->c.dim_v + i];
        }
    }
    if (failure == NULL) {
        failure =
            support_compare(data, "sum of lambda dlambda", from_levels, from_output, data->n_gates, SUPPORT_GRADIENT);
    }
    free(from_output);
    free(from_levels);
    support_results_free(got);
    support_data_free(data);
    return failure;
}

Test(properties, level_gradients) {
    expect_everywhere(check_level_gradients, (support_case){.length = 200, .heads = 2, .extra_levels = 6, .chunk = 32});
    expect_everywhere(check_level_gradients,
                      (support_case){.length = 100, .heads = 2, .batch = 2, .positions = POSITIONS, .extra_levels = 1});
    expect_everywhere(check_level_gradients, (support_case){.length = 1, .heads = 2, .extra_levels = 4});
}

/* ---- Determinism ------------------------------------------------------------------------------------------------ */

static const char *check_deterministic(const support_case *c) {
    support_data *data = support_data_make(c);
    data->engine = LOGLIN_ENGINE_BLAS;
    support_results *first = support_results_make(data);
    support_results *second = support_results_make(data);
    const char *failure = support_forward(data, first);
    failure = failure != NULL ? failure : support_forward(data, second);
    if (failure == NULL && (memcmp(first->o, second->o, data->n_v * sizeof(double)) != 0 ||
                            memcmp(first->final, second->final, data->n_states * sizeof(double)) != 0)) {
        failure = support_failure(data, "two runs differ");
    }
    support_results_free(second);
    support_results_free(first);
    support_data_free(data);
    return failure;
}

Test(properties, determinism) {
    expect_everywhere(check_deterministic, (support_case){.length = 300,
                                                          .batch = 2,
                                                          .heads = 4,
                                                          .groups = 2,
                                                          .dim_k = 16,
                                                          .dim_v = 24,
                                                          .positions = POSITIONS,
                                                          .final_states = true});
}
