/* SPDX-License-Identifier: Apache-2.0 */
/* The oracle and the test support against themselves: nothing here touches a device or the library's operators. */
#include "support_criterion.h"
#include "support_golden.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const double EXACT = 1e-12;

static void for_both(void (*run)(const support_case *c), support_case c) {
    for (int op = 0; op < 2; op++) {
        for (int partition = 0; partition < 2; partition++) {
            c.op = (loglin_op)op;
            c.partition = (loglin_partition)partition;
            run(&c);
        }
    }
}

/* ---- Levels ----------------------------------------------------------------------------------------------------- */

/* The oracle's recurrence, one key at a time: which level holds key s when the query stands at t. */
Test(oracle, recurrence_moves_keys_to_their_level) {
    enum { LENGTH = 600 };
    for (int strong = 0; strong < 2; strong++) {
        size_t level[LENGTH] = {0};
        for (size_t t = 1; t < LENGTH; t++) {
            size_t z = 0;
            while (((t >> z) & 1) == 0) {
                z++;
            }
            for (size_t s = 0; s < t; s++) {
                if (strong ? level[s] <= z + 1 : level[s] <= z) {
                    level[s] = strong ? level[s] + 1 : z + 1;
                }
            }
            for (size_t s = 0; s <= t; s++) {
                cr_assert_eq(level[s], oracle_level(strong, t, s), "strong %d, level(%zu, %zu): %zu, not %zu", strong,
                             t, s, level[s], oracle_level(strong, t, s));
            }
        }
    }
}

Test(oracle, level_exists_where_a_key_has_it) {
    for (int strong = 0; strong < 2; strong++) {
        for (size_t position = 0; position < 300; position++) {
            bool seen[LOGLIN_MAX_LEVELS] = {false};
            for (size_t s = 0; s < position; s++) {
                seen[oracle_level(strong, position - 1, s)] = true;
            }
            for (size_t l = 0; l < LOGLIN_MAX_LEVELS; l++) {
                cr_assert_eq(seen[l], oracle_level_exists(strong, position, l), "strong %d, position %zu, level %zu",
                             strong, position, l);
            }
        }
    }
}

/* ---- The two forms ---------------------------------------------------------------------------------------------- */

static void parallel_equals_recurrence(const support_case *c) {
    support_data *data = support_data_make(c);
    const oracle_problem problem = support_oracle_problem(data);
    const oracle_inputs in = support_oracle_inputs(data);
    double *parallel = support_alloc(data->n_v, sizeof *parallel);
    double *recurrence = support_alloc(data->n_v, sizeof *recurrence);
    oracle_parallel(&problem, &in, parallel);
    oracle_recurrence(&problem, &in, recurrence, NULL);
    const double error = support_error(recurrence, parallel, data->n_v);
    cr_expect(error <= EXACT, "%s", support_failure(data, "parallel and recurrence differ by %g", error));
    free(recurrence);
    free(parallel);
    support_data_free(data);
}

Test(oracle, parallel_equals_recurrence) {
    static const size_t lengths[] = {1, 0, 2, 37, 64};
    const support_case cases[] = {
        {.length = 1},
        {.length = 150, .heads = 4, .groups = 2, .dim_k = 3, .dim_v = 5, .scale = 0.5f},
        {.length = 65, .no_gates = true, .normalize_qk = 1, .extra_levels = 3},
        {.batch = 3, .length = 33},
        {.lengths = lengths, .sequences = 5},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        for_both(parallel_equals_recurrence, cases[i]);
    }
}

Test(oracle, parallel_gradients_equal_recurrence) {
    for (int partition = 0; partition < 2; partition++) {
        const support_case c = {.partition = (loglin_partition)partition,
                                .batch = 2,
                                .length = 75,
                                .heads = 4,
                                .groups = 2,
                                .dim_k = 3,
                                .dim_v = 5,
                                .scale = 0.5f};
        support_data *data = support_data_make(&c);
        support_results *expected = support_results_make(data);
        support_results *got = support_results_make(data);
        const oracle_problem problem = support_oracle_problem(data);
        const oracle_inputs in = support_oracle_inputs(data);
        const oracle_gradients out = {.dq = expected->dq,
                                      .dk = expected->dk,
                                      .dv = expected->dv,
                                      .dg = expected->dg,
                                      .dlevel_scales = expected->dlevel_scales};
        oracle_parallel_gradients(&problem, &in, data->d_o, &out);
        support_oracle_backward(data, got);
        cr_expect_leq(support_error(got->dq, expected->dq, data->n_k), EXACT);
        cr_expect_leq(support_error(got->dk, expected->dk, data->n_k), EXACT);
        cr_expect_leq(support_error(got->dv, expected->dv, data->n_v), EXACT);
        cr_expect_leq(support_error(got->dg, expected->dg, data->n_gates), EXACT);
        cr_expect_leq(support_error(got->dlevel_scales, expected->dlevel_scales, data->n_levels), EXACT);
        support_results_free(got);
        support_results_free(expected);
        support_data_free(data);
    }
}

/* ---- Real data -------------------------------------------------------------------------------------------------- */

static void expect_golden(const char *name) {
    support_results *expected = NULL;
    support_data *data = support_golden(name, &expected);
    support_results *got = support_results_make(data);
    support_oracle_forward(data, got);
    support_oracle_backward(data, got);
    const struct {
        const char *tensor;
        const double *got, *expected;
        size_t count;
    } tensors[] = {
        {"o", got->o, expected->o, data->n_v},
        {"final_states", got->final, expected->final, data->n_states},
        {"dq", got->dq, expected->dq, data->n_k},
        {"dk", got->dk, expected->dk, data->n_k},
        {"dv", got->dv, expected->dv, data->n_v},
        {"dg", got->dg, expected->dg, data->n_gates},
        {"dlevel_scales", got->dlevel_scales, expected->dlevel_scales, data->n_levels},
        {"dbeta", got->dbeta, expected->dbeta, data->n_gates},
    };
    for (size_t i = 0; i < sizeof tensors / sizeof tensors[0]; i++) {
        const double error = support_error(tensors[i].got, tensors[i].expected, tensors[i].count);
        cr_expect(error <= 1e-6, "%s", support_failure(data, "%s: error %g", tensors[i].tensor, error));
    }
    support_results_free(got);
    support_results_free(expected);
    support_data_free(data);
}

Test(oracle, golden_mamba2) {
    expect_golden("mamba2_real_activations");
}

Test(oracle, golden_gated_delta) {
    expect_golden("gated_delta_real_activations");
}

/* ---- Finite differences ----------------------------------------------------------------------------------------- */

/* The loss whose gradients backward gives. */
static double loss(const support_data *data, support_results *scratch) {
    support_oracle_forward(data, scratch);
    double sum = 0.0;
    for (size_t i = 0; i < data->n_v; i++) {
        sum += data->d_o[i] * scratch->o[i];
    }
    for (size_t i = 0; data->dfinal != NULL && i < data->n_states; i++) {
        sum += isnan(data->dfinal[i]) ? 0.0 : data->dfinal[i] * scratch->final[i];
    }
    return sum;
}

static void expect_derivative(const support_data *data, support_results *scratch, const char *name, double *x,
                              const double *gradient, size_t count) {
    static const double step = 1e-5;
    for (size_t i = 0; x != NULL && i < count; i++) {
        const double kept = x[i];
        if (isnan(kept)) { /* a level that does not exist */
            cr_expect_eq(gradient[i], 0.0);
            continue;
        }
        x[i] = kept + step;
        const double above = loss(data, scratch);
        x[i] = kept - step;
        const double below = loss(data, scratch);
        x[i] = kept;
        const double difference = (above - below) / (2.0 * step);
        cr_expect(fabs(difference - gradient[i]) <= 1e-7 * (1.0 + fabs(gradient[i])), "%s",
                  support_failure(data, "%s[%zu]: gradient %.12g, difference %.12g", name, i, gradient[i], difference));
    }
}

static void gradients_equal_differences(const support_case *c) {
    support_data *data = support_data_make(c);
    support_results *got = support_results_make(data);
    support_results *scratch = support_results_make(data);
    support_oracle_backward(data, got);
    expect_derivative(data, scratch, "q", data->q, got->dq, data->n_k);
    expect_derivative(data, scratch, "k", data->k, got->dk, data->n_k);
    expect_derivative(data, scratch, "v", data->v, got->dv, data->n_v);
    expect_derivative(data, scratch, "g", data->g, got->dg, data->n_gates);
    expect_derivative(data, scratch, "level_scales", data->level_scales, got->dlevel_scales, data->n_levels);
    expect_derivative(data, scratch, "beta", data->beta, got->dbeta, data->n_gates);
    expect_derivative(data, scratch, "initial", data->initial, got->dinitial, data->n_states);
    support_results_free(scratch);
    support_results_free(got);
    support_data_free(data);
}

Test(oracle, gradients_equal_finite_differences) {
    static const int32_t positions[] = {5, 0};
    static const int32_t late_positions[] = {16, 3, 31};
    static const size_t lengths[] = {3, 0, 9};
    const support_case cases[] = {
        {.length = 1, .dim_k = 2, .dim_v = 3},
        {.length = 19, .dim_k = 2, .dim_v = 3, .scale = 0.7f, .normalize_qk = 1},
        {.batch = 2, .length = 12, .dim_k = 2, .dim_v = 2, .positions = positions, .final_states = true},
        {.lengths = lengths, .sequences = 3, .dim_k = 2, .dim_v = 2, .positions = late_positions, .final_states = true},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        for_both(gradients_equal_differences, cases[i]);
    }
}

static void level_gradients_give_the_output(const support_case *c) {
    support_data *data = support_data_make(c);
    support_results *got = support_results_make(data);
    support_oracle_forward(data, got);
    support_oracle_backward(data, got);
    for (size_t row = 0; row < data->n_gates; row++) {
        double from_levels = 0.0;
        double from_output = 0.0;
        for (size_t l = 0; l < data->levels; l++) {
            from_levels += data->level_scales[row * data->levels + l] * got->dlevel_scales[row * data->levels + l];
        }
        for (size_t i = 0; i < data->c.dim_v; i++) {
            from_output += data->d_o[row * data->c.dim_v + i] * got->o[row * data->c.dim_v + i];
        }
        cr_expect_float_eq(from_levels, from_output, EXACT * (1.0 + fabs(from_output)));
    }
    support_results_free(got);
    support_data_free(data);
}

Test(oracle, level_gradients_give_the_output) {
    for_both(level_gradients_give_the_output, (support_case){.length = 70, .extra_levels = 2});
}

/* ---- The support ------------------------------------------------------------------------------------------------ */

Test(support, half_conversions_are_exact) {
    for (unsigned bits = 0; bits < 0x10000; bits++) {
        const float half = support_from_f16((uint16_t)bits);
        const float brain = support_from_bf16((uint16_t)bits);
        cr_assert(isnan(half) || support_to_f16(half) == bits, "f16 %#x gives %g gives %#x", bits, (double)half,
                  support_to_f16(half));
        cr_assert(isnan(brain) || support_to_bf16(brain) == bits, "bf16 %#x gives %g gives %#x", bits, (double)brain,
                  support_to_bf16(brain));
        cr_assert(!isnan(half) || isnan(support_from_f16(support_to_f16(half))));
        cr_assert(!isnan(brain) || isnan(support_from_bf16(support_to_bf16(brain))));
    }
    cr_expect_eq(support_from_f16(0x3C00), 1.0f);
    cr_expect_eq(support_from_f16(0x0001), 0x1p-24f);
    cr_expect_eq(support_from_bf16(0x3F80), 1.0f);
}

/* Every pair of neighbouring numbers: their middle goes to the even one, what is beside the middle to the nearer. */
Test(support, half_conversions_round_to_nearest_even) {
    for (unsigned bits = 0; bits < 0x7BFF; bits++) {
        const double low = (double)support_from_f16((uint16_t)bits);
        const double high = (double)support_from_f16((uint16_t)(bits + 1));
        const float middle = (float)(0.5 * (low + high));
        cr_assert_eq(support_to_f16(middle), bits + (bits & 1));
        cr_assert_eq(support_to_f16(nextafterf(middle, 0.0f)), bits);
        cr_assert_eq(support_to_f16(-nextafterf(middle, INFINITY)), 0x8000 + bits + 1);
    }
    for (unsigned bits = 0; bits < 0x7F7F; bits++) {
        const double low = (double)support_from_bf16((uint16_t)bits);
        const double high = (double)support_from_bf16((uint16_t)(bits + 1));
        const float middle = (float)(0.5 * (low + high));
        cr_assert_eq(support_to_bf16(middle), bits + (bits & 1));
        cr_assert_eq(support_to_bf16(nextafterf(middle, 0.0f)), bits);
        cr_assert_eq(support_to_bf16(-nextafterf(middle, INFINITY)), 0x8000 + bits + 1);
    }
    cr_expect_eq(support_to_f16(65519.996f), 0x7BFF);
    cr_expect_eq(support_to_f16(65520.0f), 0x7C00);
}

Test(support, metric_sees_a_planted_error) {
    const support_case c = {.length = 20, .final_states = true};
    support_data *data = support_data_make(&c);
    support_results *expected = support_results_make(data);
    support_results *got = support_results_make(data);
    support_oracle_forward(data, expected);
    support_oracle_forward(data, got);
    got->final_position[0] = 20;
    cr_expect_null(support_compare_forward(data, got, expected));
    const double kept = got->o[7];
    got->o[7] = kept + 1e-3;
    cr_expect_not_null(support_compare_forward(data, got, expected), "an error of 1e-3 in one element");
    got->o[7] = (double)NAN;
    cr_expect_not_null(support_compare_forward(data, got, expected), "a NaN");
    got->o[7] = kept;
    got->final[3] += 1e-2;
    cr_expect_not_null(support_compare_forward(data, got, expected), "an error in the final states");
    got->final[3] = expected->final[3];
    got->final_position[0] = 19;
    cr_expect_not_null(support_compare_forward(data, got, expected), "a wrong position");
    support_results_free(got);
    support_results_free(expected);
    support_data_free(data);

    const double zeros[2] = {0.0, 0.0};
    const double tiny[2] = {0.0, 1e-30};
    cr_expect_eq(support_error(zeros, zeros, 2), 0.0);
    cr_expect(isinf(support_error(tiny, zeros, 2)), "nothing but zero equals a zero reference");
}

static void write_byte(cl_mem mem, size_t byte) {
    const unsigned char zero = 0;
    support_require(clEnqueueWriteBuffer(support_open()->queue, mem, CL_TRUE, byte, 1, &zero, 0, NULL, NULL),
                    "clEnqueueWriteBuffer");
}

Test(support, guards_see_a_planted_write) {
    double values[10];
    for (size_t offset = 0; offset < 4; offset += 3) {
        support_array array = support_output(LOGLIN_BF16, 10, offset);
        cr_expect(support_read(&array, values));
        cr_expect(isnan(values[0]) && isnan(values[9]), "outputs are poisoned");
        write_byte(array.mem, (offset + 9) * 2);
        cr_expect(support_read(&array, values), "the array itself may be written");
        write_byte(array.mem, (offset + 10) * 2);
        cr_expect_not(support_read(&array, values), "behind the array");
        support_array_free(&array);
    }
    support_array array = support_output(LOGLIN_F32, 10, 3);
    write_byte(array.mem, 11);
    cr_expect_not(support_read(&array, values), "in front of the array");
    support_array_free(&array);

    support_workspace workspace = support_workspace_make(100);
    cr_expect(support_workspace_intact(&workspace));
    write_byte(workspace.mem, 99);
    cr_expect(support_workspace_intact(&workspace), "the workspace itself may be written");
    write_byte(workspace.whole, 4096 + 100);
    cr_expect_not(support_workspace_intact(&workspace), "behind the workspace");
    support_workspace_free(&workspace);
}
