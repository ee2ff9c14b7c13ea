/* SPDX-License-Identifier: Apache-2.0 */
/* Implementation of support_case.h. */
#include "support_case.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const loglin_engine ENGINES[] = {LOGLIN_ENGINE_BLAS, LOGLIN_ENGINE_FUSED};
enum { ENGINE_COUNT = sizeof ENGINES / sizeof ENGINES[0] };

/* ---- Failures --------------------------------------------------------------------------------------------------- */

const char *support_failure(const support_data *data, const char *format, ...) {
    static char text[1024];
    const support_case *c = &data->c;
    int length =
        snprintf(text, sizeof text, "[%s %s %s/%s N=%zu T=%zu H=%zu G=%zu K=%zu V=%zu L=%zu%s chunk=%zu%s%s%s%s] ",
                 c->op == LOGLIN_GATED_DELTA ? "delta" : "mamba2", c->partition == LOGLIN_STRONG ? "strong" : "weak",
                 support_dtype_name(c->dtype), support_dtype_name(c->weight_dtype), data->sequences, data->tokens,
                 c->heads, c->groups, c->dim_k, c->dim_v, data->levels, c->lengths != NULL ? " packed" : "", c->chunk,
                 data->engine == LOGLIN_ENGINE_AUTO ? " auto" : "", data->initial != NULL ? " initial" : "",
                 c->normalize_qk ? " normalize" : "", c->no_gates ? " no gates" : "");
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text + length, sizeof text - (size_t)length, format, arguments);
    va_end(arguments);
    return text;
}

/* ---- Inputs ----------------------------------------------------------------------------------------------------- */

static size_t or_default(size_t value, size_t fallback) {
    return value == 0 ? fallback : value;
}

static support_case with_defaults(const support_case *given) {
    support_case c = *given;
    c.batch = c.lengths != NULL ? 1 : or_default(c.batch, 1);
    c.length = or_default(c.length, 40);
    c.heads = or_default(c.heads, 2);
    c.groups = or_default(c.groups, 1);
    c.dim_k = or_default(c.dim_k, 8);
    c.dim_v = or_default(c.dim_v, 8);
    return c;
}

/* Sequences, tokens, levels and the sizes of all arrays. */
static void lay_out(support_data *data) {
    const support_case *c = &data->c;
    data->sequences = c->lengths != NULL ? c->sequences : c->batch;
    data->starts = support_alloc(data->sequences + 1, sizeof(size_t));
    data->positions = support_alloc(data->sequences, sizeof(size_t));
    size_t longest = 0;
    size_t farthest = 0;
    for (size_t n = 0; n < data->sequences; n++) {
        const size_t length = c->lengths != NULL ? c->lengths[n] : c->length;
        data->positions[n] = c->positions != NULL ? (size_t)c->positions[n] : 0;
        data->starts[n + 1] = data->starts[n] + length;
        longest = length > longest ? length : longest;
        farthest = data->positions[n] > farthest ? data->positions[n] : farthest;
    }
    data->tokens = data->starts[data->sequences];
    data->levels = 1 + c->extra_levels;
    for (size_t reach = 1; reach < longest + farthest; reach *= 2) {
        data->levels++;
    }
    data->n_k = data->tokens * c->groups * c->dim_k;
    data->n_gates = data->tokens * c->heads;
    data->n_v = data->n_gates * c->dim_v;
    data->n_levels = data->n_gates * data->levels;
    data->n_states = data->sequences * c->heads * data->levels * c->dim_k * c->dim_v;
}

static double *normals(support_random *random, size_t count, double deviation) {
    double *values = support_alloc(count, sizeof *values);
    for (size_t i = 0; i < count; i++) {
        values[i] = deviation * support_normal(random);
    }
    return values;
}

static double *uniforms(support_random *random, size_t count, double end) {
    double *values = support_alloc(count, sizeof *values);
    for (size_t i = 0; i < count; i++) {
        values[i] = end * support_uniform(random);
    }
    return values;
}

static void make_unit_rows(double *x, size_t rows, size_t dim) {
    for (size_t row = 0; row < rows; row++) {
        double sum = 0.0;
        for (size_t i = 0; i < dim; i++) {
            sum += x[row * dim + i] * x[row * dim + i];
        }
        for (size_t i = 0; i < dim; i++) {
            x[row * dim + i] /= sqrt(sum);
        }
    }
}

/* Half of the heads forget within some ten tokens, the others remember hundreds; one gate in eight is exactly 0. */
static double *random_gates(support_random *random, const support_data *data) {
    static const double strengths[] = {-0.5, -0.02};
    double *g = uniforms(random, data->n_gates, 1.0);
    for (size_t i = 0; i < data->n_gates; i++) {
        g[i] = support_uniform(random) < 0.125 ? 0.0 : g[i] * strengths[i % data->c.heads % 2];
    }
    return g;
}

static void round_all(loglin_dtype dtype, double *values, size_t count) {
    for (size_t i = 0; values != NULL && i < count; i++) {
        values[i] = support_round(dtype, values[i]);
    }
}

static void round_inputs(support_data *data) {
    const support_case *c = &data->c;
    round_all(c->dtype, data->q, data->n_k);
    round_all(c->dtype, data->k, data->n_k);
    round_all(c->dtype, data->v, data->n_v);
    round_all(c->dtype, data->d_o, data->n_v);
    round_all(LOGLIN_F32, data->g, data->n_gates);
    round_all(c->weight_dtype, data->level_scales, data->n_levels);
    round_all(c->weight_dtype, data->beta, data->n_gates);
}

void support_blank_missing_levels(const support_data *data, bool at_end, double blank, double *states) {
    const size_t matrix = data->c.dim_k * data->c.dim_v;
    for (size_t row = 0; row < data->n_states / matrix; row++) {
        const size_t n = row / (data->c.heads * data->levels);
        const size_t end = data->positions[n] + (at_end ? data->starts[n + 1] - data->starts[n] : 0);
        if (!oracle_level_exists(data->c.partition == LOGLIN_STRONG, end, row % data->levels)) {
            for (size_t i = 0; i < matrix; i++) {
                states[row * matrix + i] = blank;
            }
        }
    }
}

static double *copied(const double *values, size_t count) {
    double *copy = support_alloc(count, sizeof *copy);
    memcpy(copy, values, count * sizeof *copy);
    return copy;
}

/* Splits the initial states into values and log_decay, as far as float holds them. */
static void store_initial(support_data *data) {
    const size_t matrix = data->c.dim_k * data->c.dim_v;
    support_blank_missing_levels(data, false, (double)NAN, data->initial);
    data->initial_values = support_alloc(data->n_states, sizeof(double));
    data->initial_log_decay = data->c.log_decay ? support_alloc(data->n_states / matrix, sizeof(double)) : NULL;
    for (size_t i = 0; i < data->n_states; i++) {
        double decay = 1.0;
        if (data->initial_log_decay != NULL) {
            const double log_decay = isnan(data->initial[i]) ? (double)NAN : -0.25 * (double)(i / matrix % 5);
            data->initial_log_decay[i / matrix] = log_decay;
            decay = exp(log_decay);
        }
        data->initial_values[i] = support_round(LOGLIN_F32, data->initial[i] / decay);
        data->initial[i] = decay * data->initial_values[i];
    }
}

static void drop_initial(support_data *data) {
    free(data->initial);
    free(data->initial_values);
    free(data->initial_log_decay);
    data->initial = NULL;
    data->initial_values = NULL;
    data->initial_log_decay = NULL;
}

void support_set_initial(support_data *data, const size_t *positions, const double *states) {
    drop_initial(data);
    memcpy(data->positions, positions, data->sequences * sizeof *positions);
    data->initial = copied(states, data->n_states);
    store_initial(data);
}

void support_set_dfinal(support_data *data, const double *states) {
    free(data->dfinal);
    data->dfinal = copied(states, data->n_states);
    support_blank_missing_levels(data, true, (double)NAN, data->dfinal);
    round_all(LOGLIN_F32, data->dfinal, data->n_states);
    data->c.final_states = true;
}

support_data *support_data_make(const support_case *given) {
    support_data *data = support_alloc(1, sizeof *data);
    data->c = with_defaults(given);
    lay_out(data);
    const support_case *c = &data->c;
    const bool delta = c->op == LOGLIN_GATED_DELTA;
    const double deviation = delta || c->normalize_qk ? 1.0 : pow((double)c->dim_k, -0.25);
    support_random random = {.state = c->seed + 1000003u * data->tokens + 31u * c->dim_k + c->dim_v};
    data->q = normals(&random, data->n_k, deviation);
    data->k = normals(&random, data->n_k, deviation);
    if (delta && !c->normalize_qk) {
        make_unit_rows(data->q, data->n_k / c->dim_k, c->dim_k);
        make_unit_rows(data->k, data->n_k / c->dim_k, c->dim_k);
    }
    data->v = normals(&random, data->n_v, 1.0);
    data->d_o = normals(&random, data->n_v, 1.0);
    data->g = c->no_gates ? NULL : random_gates(&random, data);
    data->level_scales = uniforms(&random, data->n_levels, 1.5);
    data->beta = delta ? uniforms(&random, data->n_gates, 1.0) : NULL;
    if (c->positions != NULL) {
        data->initial = normals(&random, data->n_states, 1.0);
        store_initial(data);
    }
    if (c->final_states) {
        double *dfinal = normals(&random, data->n_states, 1.0);
        support_set_dfinal(data, dfinal);
        free(dfinal);
    }
    if (c->adjust != NULL) {
        c->adjust(data);
    }
    round_inputs(data);
    return data;
}

void support_data_free(support_data *data) {
    drop_initial(data);
    free(data->starts);
    free(data->positions);
    free(data->q);
    free(data->k);
    free(data->v);
    free(data->d_o);
    free(data->g);
    free(data->level_scales);
    free(data->beta);
    free(data->dfinal);
    free(data);
}

support_results *support_results_make(const support_data *data) {
    support_results *results = support_alloc(1, sizeof *results);
    results->o = support_alloc(data->n_v, sizeof(double));
    results->final = support_alloc(data->n_states, sizeof(double));
    results->final_position = support_alloc(data->sequences, sizeof(int32_t));
    results->dq = support_alloc(data->n_k, sizeof(double));
    results->dk = support_alloc(data->n_k, sizeof(double));
    results->dv = support_alloc(data->n_v, sizeof(double));
    results->dg = support_alloc(data->n_gates, sizeof(double));
    results->dlevel_scales = support_alloc(data->n_levels, sizeof(double));
    results->dbeta = support_alloc(data->n_gates, sizeof(double));
    results->dinitial = support_alloc(data->n_states, sizeof(double));
    return results;
}

void support_results_free(support_results *results) {
    free(results->o);
    free(results->final);
    free(results->final_position);
    free(results->dq);
    free(results->dk);
    free(results->dv);
    free(results->dg);
    free(results->dlevel_scales);
    free(results->dbeta);
    free(results->dinitial);
    free(results);
}

/* Rows [first, first + count) of each of `sequences` arrays of `length` rows; NULL stays NULL. */
static double *sliced(const double *x, size_t sequences, size_t length, size_t row, size_t first, size_t count) {
    if (x == NULL) {
        return NULL;
    }
    double *slice = support_alloc(sequences * count * row, sizeof *slice);
    for (size_t n = 0; n < sequences; n++) {
        memcpy(slice + n * count * row, x + (n * length + first) * row, count * row * sizeof *slice);
    }
    return slice;
}

support_data *support_slice(const support_data *data, size_t first, size_t count) {
    support_data *piece = support_alloc(1, sizeof *piece);
    const size_t sequences = data->sequences;
    const size_t length = data->c.length;
    const size_t heads = data->c.heads;
    piece->c = data->c;
    piece->c.length = count;
    piece->c.positions = NULL;
    piece->c.final_states = false;
    lay_out(piece);
    piece->levels = data->levels;
    piece->n_levels = piece->n_gates * data->levels;
    piece->n_states = data->n_states;
    piece->q = sliced(data->q, sequences, length, data->c.groups * data->c.dim_k, first, count);
    piece->k = sliced(data->k, sequences, length, data->c.groups * data->c.dim_k, first, count);
    piece->v = sliced(data->v, sequences, length, heads * data->c.dim_v, first, count);
    piece->d_o = sliced(data->d_o, sequences, length, heads * data->c.dim_v, first, count);
    piece->g = sliced(data->g, sequences, length, heads, first, count);
    piece->level_scales = sliced(data->level_scales, sequences, length, heads * data->levels, first, count);
    piece->beta = sliced(data->beta, sequences, length, heads, first, count);
    return piece;
}

/* ---- The oracle's side ------------------------------------------------------------------------------------------ */

oracle_problem support_oracle_problem(const support_data *data) {
    const support_case *c = &data->c;
    return (oracle_problem){.delta = c->op == LOGLIN_GATED_DELTA,
                            .strong = c->partition == LOGLIN_STRONG,
                            .sequences = data->sequences,
                            .starts = data->starts,
                            .positions = data->positions,
                            .heads = c->heads,
                            .groups = c->groups,
                            .dim_k = c->dim_k,
                            .dim_v = c->dim_v,
                            .levels = data->levels,
                            .scale = c->scale == 0.0f ? 1.0 : (double)c->scale,
                            .normalize_qk = c->normalize_qk != 0};
}

oracle_inputs support_oracle_inputs(const support_data *data) {
    return (oracle_inputs){.q = data->q,
                           .k = data->k,
                           .v = data->v,
                           .g = data->g,
                           .level_scales = data->level_scales,
                           .beta = data->beta,
                           .initial = data->initial};
}

void support_oracle_forward(const support_data *data, support_results *results) {
    const oracle_problem problem = support_oracle_problem(data);
    const oracle_inputs in = support_oracle_inputs(data);
    oracle_recurrence(&problem, &in, results->o, results->final);
}

void support_oracle_backward(const support_data *data, support_results *results) {
    const oracle_problem problem = support_oracle_problem(data);
    const oracle_inputs in = support_oracle_inputs(data);
    const oracle_gradients out = {.dq = results->dq,
                                  .dk = results->dk,
                                  .dv = results->dv,
                                  .dg = results->dg,
                                  .dlevel_scales = results->dlevel_scales,
                                  .dbeta = results->dbeta,
                                  .dinitial = data->initial != NULL ? results->dinitial : NULL};
    oracle_backward(&problem, &in, data->d_o, data->dfinal, &out);
}

/* ---- The device's side ------------------------------------------------------------------------------------------ */

loglin_problem support_problem(const support_data *data, unsigned phases) {
    const support_case *c = &data->c;
    loglin_problem problem = {.op = c->op,
                              .partition = c->partition,
                              .dtype = c->dtype,
                              .weight_dtype = c->weight_dtype,
                              .batch = c->batch,
                              .length = c->lengths != NULL ? data->tokens : c->length,
                              .heads = c->heads,
                              .groups = c->groups,
                              .dim_k = c->dim_k,
                              .dim_v = c->dim_v,
                              .levels = data->levels,
                              .scale = c->scale,
                              .normalize_qk = c->normalize_qk,
                              .sequences = c->lengths != NULL ? c->sequences : 0,
                              .phases = phases,
                              .engine = data->engine,
                              .chunk = c->chunk};
    for (size_t n = 0; n < data->sequences; n++) {
        const size_t length = data->starts[n + 1] - data->starts[n];
        if (c->lengths != NULL && length > problem.max_length) {
            problem.max_length = length;
        }
        if (data->initial != NULL && data->positions[n] > problem.max_position) {
            problem.max_position = data->positions[n];
        }
    }
    if (data->initial != NULL && problem.max_position == 0) {
        problem.max_position = 1; /* 0 would mean: no initial states */
    }
    return problem;
}

/* Everything a call may need on the device; members that were never made are absent. */
typedef struct device_arrays {
    support_array q, k, v, g, level_scales, beta, cu_seqlens, d_o, dfinal;
    support_array initial_values, initial_log_decay, initial_position;
    support_array o, final_values, final_log_decay, final_position;
    support_array dq, dk, dv, dg, dlevel_scales, dbeta, dinitial;
} device_arrays;

static void free_arrays(device_arrays *a) {
    support_array *all = (support_array *)a;
    for (size_t i = 0; i < sizeof *a / sizeof *all; i++) {
        support_array_free(&all[i]);
    }
}

static support_array float_input(const support_data *data, loglin_dtype dtype, const double *values, size_t count) {
    return values == NULL ? (support_array){0} : support_input(dtype, values, count, data->c.offset);
}

static support_array int_input(const support_data *data, const size_t *values, size_t count) {
    int32_t *ints = support_alloc(count, sizeof *ints);
    for (size_t i = 0; i < count; i++) {
        ints[i] = (int32_t)values[i];
    }
    const support_array array = support_inout_ints(ints, count, data->c.offset);
    free(ints);
    return array;
}

static size_t decay_count(const support_data *data) {
    return data->n_states / (data->c.dim_k * data->c.dim_v);
}

static void upload_inputs(const support_data *data, device_arrays *a) {
    const support_case *c = &data->c;
    a->q = float_input(data, c->dtype, data->q, data->n_k);
    a->k = float_input(data, c->dtype, data->k, data->n_k);
    a->v = float_input(data, c->dtype, data->v, data->n_v);
    a->g = float_input(data, LOGLIN_F32, data->g, data->n_gates);
    a->level_scales = float_input(data, c->weight_dtype, data->level_scales, data->n_levels);
    a->beta = float_input(data, c->weight_dtype, data->beta, data->n_gates);
    if (c->lengths != NULL) {
        a->cu_seqlens = int_input(data, data->starts, data->sequences + 1);
    }
    if (data->initial != NULL) {
        a->initial_values = support_inout(LOGLIN_F32, data->initial_values, data->n_states, c->offset);
        a->initial_position = int_input(data, data->positions, data->sequences);
    }
    if (data->initial_log_decay != NULL) {
        a->initial_log_decay = support_inout(LOGLIN_F32, data->initial_log_decay, decay_count(data), c->offset);
    }
}

static loglin_inputs input_arguments(const device_arrays *a) {
    return (loglin_inputs){.q = support_buffer(&a->q),
                           .k = support_buffer(&a->k),
                           .v = support_buffer(&a->v),
                           .g = support_buffer(&a->g),
                           .level_scales = support_buffer(&a->level_scales),
                           .beta = support_buffer(&a->beta),
                           .cu_seqlens = support_buffer(&a->cu_seqlens)};
}

static loglin_state initial_argument(const device_arrays *a) {
    return (loglin_state){.values = support_buffer(&a->initial_values),
                          .log_decay = support_buffer(&a->initial_log_decay),
                          .position = support_buffer(&a->initial_position)};
}

static loglin_state final_argument(const device_arrays *a) {
    return (loglin_state){.values = support_buffer(&a->final_values),
                          .log_decay = support_buffer(&a->final_log_decay),
                          .position = support_buffer(&a->final_position)};
}

/* Where a call is enqueued, and how its input may be late. */
typedef struct launch {
    cl_command_queue queue;
    cl_event gate;      /* a user event; NULL: the input is there */
    cl_event delivered; /* of the copy that brings v */
    support_array late; /* where v waits */
} launch;

/* With `events`: v is NaN until the gate opens, and comes through the other queue. */
static launch begin_launch(const support_data *data, device_arrays *a) {
    const support_device *device = support_open();
    launch l = {.queue = device->queue};
    if (data->c.out_of_order && device->out_of_order != NULL) {
        l.queue = device->out_of_order;
    }
    if (!data->c.events || device->out_of_order == NULL) {
        return l;
    }
    cl_int status = CL_SUCCESS;
    l.late = a->v;
    a->v = support_output(data->c.dtype, data->n_v, data->c.offset);
    l.gate = clCreateUserEvent(device->context, &status);
    support_require(status, "clCreateUserEvent");
    const size_t element = a->v.element;
    support_require(clEnqueueCopyBuffer(device->out_of_order, l.late.mem, a->v.mem, data->c.offset * element,
                                        data->c.offset * element, data->n_v * element, 1, &l.gate, &l.delivered),
                    "clEnqueueCopyBuffer");
    support_require(clFlush(device->out_of_order), "clFlush");
    return l;
}

static void finish_launch(launch *l, loglin_status status, cl_event done) {
    if (l->gate != NULL) {
        support_require(clSetUserEventStatus(l->gate, CL_COMPLETE), "clSetUserEventStatus");
    }
    if (status == LOGLIN_OK) {
        support_require(clWaitForEvents(1, &done), "clWaitForEvents");
        clReleaseEvent(done);
    }
    support_require(clFinish(l->queue), "clFinish");
    if (l->gate != NULL) {
        support_require(clFinish(support_open()->out_of_order), "clFinish");
        clReleaseEvent(l->gate);
        clReleaseEvent(l->delivered);
        support_array_free(&l->late);
    }
}

static const char *call_failure(const support_data *data, const char *call, loglin_status status) {
    return support_failure(data, "%s: %s (%s)", call, loglin_strerror(status), loglin_last_error());
}

/* Reads `array`, if it was made, and checks its guards. */
static const char *fetch(const support_data *data, const char *tensor, const support_array *array, double *values) {
    if (array->mem == NULL || support_read(array, values)) {
        return NULL;
    }
    return support_failure(data, "%s: written outside its array", tensor);
}

static const char *first_failure(const char *const *failures, size_t count) {
    for (size_t i = 0; i < count; i++) {
        if (failures[i] != NULL) {
            return failures[i];
        }
    }
    return NULL;
}

/* values * exp(log_decay); levels that do not exist become 0 where the library leaves in them what there was. */
static void apply_log_decay(const support_data *data, const double *log_decay, double *states) {
    const size_t matrix = data->c.dim_k * data->c.dim_v;
    for (size_t i = 0; i < data->n_states; i++) {
        states[i] *= exp(log_decay[i / matrix]);
    }
}

static const char *fetch_final(const support_data *data, const device_arrays *a, support_results *results) {
    const char *failure = fetch(data, "final states", &a->final_values, results->final);
    if (failure != NULL || a->final_values.mem == NULL) {
        return failure;
    }
    if (!support_read_ints(&a->final_position, results->final_position)) {
        return support_failure(data, "final position: written outside its array");
    }
    if (a->final_log_decay.mem != NULL) {
        double *log_decay = support_alloc(decay_count(data), sizeof *log_decay);
        failure = fetch(data, "final log_decay", &a->final_log_decay, log_decay);
        for (size_t i = 0; failure == NULL && i < decay_count(data); i++) {
            if (log_decay[i] != 0.0) {
                failure = support_failure(data, "final log_decay[%zu] is %g, not 0", i, log_decay[i]);
            }
        }
        free(log_decay);
    }
    return failure;
}

static void make_final(const support_data *data, device_arrays *a) {
    const support_case *c = &data->c;
    if (!c->final_states) {
        return;
    }
    if (c->in_place) {
        a->final_values = a->initial_values;
        a->final_position = a->initial_position;
        a->final_log_decay = a->initial_log_decay;
        a->initial_values = a->initial_position = a->initial_log_decay = (support_array){0};
        return;
    }
    a->final_values = support_output(LOGLIN_F32, data->n_states, c->offset);
    a->final_position = support_output_ints(data->sequences, c->offset);
    if (c->log_decay) {
        a->final_log_decay = support_output(LOGLIN_F32, decay_count(data), c->offset);
    }
}

const char *support_forward(const support_data *data, support_results *results) {
    const loglin_problem problem = support_problem(data, LOGLIN_FORWARD);
    loglin_plan *plan = NULL;
    loglin_status status = loglin_plan_create(support_open()->device, &problem, &plan);
    if (status != LOGLIN_OK) {
        return call_failure(data, "loglin_plan_create", status);
    }
    device_arrays a = {0};
    upload_inputs(data, &a);
    a.o = support_output(data->c.dtype, data->n_v, data->c.offset);
    make_final(data, &a);
    support_workspace workspace = support_workspace_make(loglin_workspace_size(plan, LOGLIN_FORWARD));
    launch l = begin_launch(data, &a);
    const loglin_inputs in = input_arguments(&a);
    const loglin_state final = final_argument(&a);
    const loglin_state initial = data->c.in_place ? final : initial_argument(&a);
    cl_event done = NULL;
    status = loglin_forward(plan, &in, data->initial != NULL ? &initial : NULL, support_buffer(&a.o),
                            data->c.final_states ? &final : NULL, (loglin_buffer){.mem = workspace.mem}, l.queue,
                            l.delivered != NULL, l.delivered != NULL ? &l.delivered : NULL, &done);
    const char *failure = status == LOGLIN_OK ? NULL : call_failure(data, "loglin_forward", status);
    finish_launch(&l, status, done);
    if (failure == NULL) {
        const char *const failures[] = {
            fetch(data, "o", &a.o, results->o), fetch_final(data, &a, results),
            support_workspace_intact(&workspace) ? NULL : support_failure(data, "written outside the workspace")};
        failure = first_failure(failures, sizeof failures / sizeof failures[0]);
    }
    support_workspace_free(&workspace);
    free_arrays(&a);
    loglin_plan_destroy(plan);
    return failure;
}

static void make_gradients(const support_data *data, device_arrays *a) {
    const support_case *c = &data->c;
    a->d_o = float_input(data, c->dtype, data->d_o, data->n_v);
    a->dfinal = float_input(data, LOGLIN_F32, data->dfinal, data->n_states);
    a->dq = support_output(c->dtype, data->n_k, c->offset);
    a->dk = support_output(c->dtype, data->n_k, c->offset);
    a->dv = support_output(c->dtype, data->n_v, c->offset);
    if (c->skip_optional) {
        return;
    }
    a->dg = support_output(LOGLIN_F32, data->n_gates, c->offset);
    a->dlevel_scales = support_output(c->weight_dtype, data->n_levels, c->offset);
    if (c->op == LOGLIN_GATED_DELTA) {
        a->dbeta = support_output(c->weight_dtype, data->n_gates, c->offset);
    }
    if (data->initial != NULL) {
        a->dinitial = support_output(LOGLIN_F32, data->n_states, c->offset);
    }
}

static loglin_gradients gradient_arguments(const device_arrays *a) {
    return (loglin_gradients){.dq = support_buffer(&a->dq),
                              .dk = support_buffer(&a->dk),
                              .dv = support_buffer(&a->dv),
                              .dg = support_buffer(&a->dg),
                              .dlevel_scales = support_buffer(&a->dlevel_scales),
                              .dbeta = support_buffer(&a->dbeta),
                              .dinitial_states = support_buffer(&a->dinitial)};
}

const char *support_backward(const support_data *data, support_results *results) {
    const loglin_problem problem = support_problem(data, LOGLIN_BACKWARD);
    loglin_plan *plan = NULL;
    loglin_status status = loglin_plan_create(support_open()->device, &problem, &plan);
    if (status != LOGLIN_OK) {
        return call_failure(data, "loglin_plan_create", status);
    }
    device_arrays a = {0};
    upload_inputs(data, &a);
    make_gradients(data, &a);
    support_workspace workspace = support_workspace_make(loglin_workspace_size(plan, LOGLIN_BACKWARD));
    launch l = begin_launch(data, &a);
    const loglin_inputs in = input_arguments(&a);
    const loglin_state initial = initial_argument(&a);
    const loglin_gradients out = gradient_arguments(&a);
    cl_event done = NULL;
    status = loglin_backward(plan, &in, data->initial != NULL ? &initial : NULL, support_buffer(&a.d_o),
                             support_buffer(&a.dfinal), &out, (loglin_buffer){.mem = workspace.mem}, l.queue,
                             l.delivered != NULL, l.delivered != NULL ? &l.delivered : NULL, &done);
    const char *failure = status == LOGLIN_OK ? NULL : call_failure(data, "loglin_backward", status);
    finish_launch(&l, status, done);
    if (failure == NULL) {
        const char *const failures[] = {
            fetch(data, "dq", &a.dq, results->dq),
            fetch(data, "dk", &a.dk, results->dk),
            fetch(data, "dv", &a.dv, results->dv),
            fetch(data, "dg", &a.dg, results->dg),
            fetch(data, "dlevel_scales", &a.dlevel_scales, results->dlevel_scales),
            fetch(data, "dbeta", &a.dbeta, results->dbeta),
            fetch(data, "dinitial_states", &a.dinitial, results->dinitial),
            support_workspace_intact(&workspace) ? NULL : support_failure(data, "written outside the workspace")};
        failure = first_failure(failures, sizeof failures / sizeof failures[0]);
    }
    support_workspace_free(&workspace);
    free_arrays(&a);
    loglin_plan_destroy(plan);
    return failure;
}

/* ---- Token by token --------------------------------------------------------------------------------------------- */

/* [outer, inner, row] to [inner, outer, row]; NULL stays NULL. */
static double *transposed(const double *x, size_t outer, size_t inner, size_t row) {
    if (x == NULL) {
        return NULL;
    }
    double *y = support_alloc(outer * inner * row, sizeof *y);
    for (size_t i = 0; i < outer; i++) {
        for (size_t j = 0; j < inner; j++) {
            memcpy(y + (j * outer + i) * row, x + (i * inner + j) * row, row * sizeof *y);
        }
    }
    return y;
}

/* [B, T, row] is uploaded as [T, B, row], so that every token's part is one array. */
static support_array token_major(const support_data *data, loglin_dtype dtype, const double *x, size_t row) {
    double *y = transposed(x, data->sequences, data->c.length, row);
    const support_array array = float_input(data, dtype, y, data->tokens * row);
    free(y);
    return array;
}

static loglin_buffer token_part(const support_data *data, const support_array *array, size_t t) {
    loglin_buffer buffer = support_buffer(array);
    buffer.offset += array->count / data->c.length * t;
    return buffer;
}

/* The state that steps start from; NaN everywhere without initial states. */
static void upload_decode_state(const support_data *data, device_arrays *a) {
    const size_t offset = data->c.offset;
    a->final_position = int_input(data, data->positions, data->sequences);
    a->final_values = data->initial != NULL ? support_inout(LOGLIN_F32, data->initial_values, data->n_states, offset)
                                            : support_output(LOGLIN_F32, data->n_states, offset);
    if (data->c.log_decay) {
        a->final_log_decay = data->initial != NULL
                                 ? support_inout(LOGLIN_F32, data->initial_log_decay, decay_count(data), offset)
                                 : support_output(LOGLIN_F32, decay_count(data), offset);
    }
}

static const char *fetch_decode(const support_data *data, const device_arrays *a, support_results *results) {
    double *o = support_alloc(data->n_v, sizeof *o);
    double *log_decay = support_alloc(decay_count(data), sizeof *log_decay);
    const char *const failures[] = {fetch(data, "o", &a->o, o),
                                    fetch(data, "state values", &a->final_values, results->final),
                                    fetch(data, "state log_decay", &a->final_log_decay, log_decay),
                                    support_read_ints(&a->final_position, results->final_position)
                                        ? NULL
                                        : support_failure(data, "state position: written outside its array")};
    double *rows = transposed(o, data->c.length, data->sequences, data->c.heads * data->c.dim_v);
    memcpy(results->o, rows, data->n_v * sizeof *rows);
    apply_log_decay(data, log_decay, results->final);
    support_blank_missing_levels(data, true, 0.0, results->final);
    free(rows);
    free(log_decay);
    free(o);
    return first_failure(failures, sizeof failures / sizeof failures[0]);
}

const char *support_decode(const support_data *data, support_results *results) {
    const support_case *c = &data->c;
    const loglin_problem problem = support_problem(data, LOGLIN_STEP);
    loglin_plan *plan = NULL;
    loglin_status status = loglin_plan_create(support_open()->device, &problem, &plan);
    if (status != LOGLIN_OK) {
        return call_failure(data, "loglin_plan_create", status);
    }
    device_arrays a = {.q = token_major(data, c->dtype, data->q, c->groups * c->dim_k),
                       .k = token_major(data, c->dtype, data->k, c->groups * c->dim_k),
                       .v = token_major(data, c->dtype, data->v, c->heads * c->dim_v),
                       .g = token_major(data, LOGLIN_F32, data->g, c->heads),
                       .level_scales = token_major(data, c->weight_dtype, data->level_scales, c->heads * data->levels),
                       .beta = token_major(data, c->weight_dtype, data->beta, c->heads),
                       .o = support_output(c->dtype, data->n_v, c->offset)};
    upload_decode_state(data, &a);
    const loglin_state state = final_argument(&a);
    const support_device *device = support_open();
    const bool loose = c->out_of_order && device->out_of_order != NULL;
    cl_command_queue queue = loose ? device->out_of_order : device->queue;
    cl_event last = NULL;
    for (size_t t = 0; status == LOGLIN_OK && t < c->length; t++) {
        const loglin_inputs in = {.q = token_part(data, &a.q, t),
                                  .k = token_part(data, &a.k, t),
                                  .v = token_part(data, &a.v, t),
                                  .g = token_part(data, &a.g, t),
                                  .level_scales = token_part(data, &a.level_scales, t),
                                  .beta = token_part(data, &a.beta, t)};
        cl_event previous = last;
        last = NULL;
        status = loglin_step(plan, &in, &state, token_part(data, &a.o, t), queue, previous != NULL,
                             previous != NULL ? &previous : NULL, loose ? &last : NULL);
        if (previous != NULL) {
            clReleaseEvent(previous);
        }
    }
    if (last != NULL) {
        clReleaseEvent(last);
    }
    support_require(clFinish(queue), "clFinish");
    const char *failure =
        status == LOGLIN_OK ? fetch_decode(data, &a, results) : call_failure(data, "loglin_step", status);
    free_arrays(&a);
    loglin_plan_destroy(plan);
    return failure;
}

/* ---- Comparing -------------------------------------------------------------------------------------------------- */

const char *support_compare(const support_data *data, const char *tensor, const double *got, const double *expected,
                            size_t count, support_kind kind) {
    const double threshold = support_threshold(data->c.dtype, kind);
    const double error = support_error(got, expected, count);
    if (error <= threshold) {
        return NULL;
    }
    size_t worst = 0;
    for (size_t i = 0; i < count; i++) {
        if (!(fabs(got[i] - expected[i]) <= fabs(got[worst] - expected[worst]))) {
            worst = i;
            if (isnan(got[i])) {
                break;
            }
        }
    }
    return support_failure(data, "%s: error %.3g, allowed %.3g; worst of %zu elements is %zu: got %.9g, expected %.9g",
                           tensor, error, threshold, count, worst, got[worst], expected[worst]);
}

const char *support_compare_forward(const support_data *data, const support_results *got,
                                    const support_results *expected) {
    const char *failure = support_compare(data, "o", got->o, expected->o, data->n_v, SUPPORT_OUTPUT);
    if (failure != NULL || !data->c.final_states) {
        return failure;
    }
    for (size_t n = 0; n < data->sequences; n++) {
        const size_t end = data->positions[n] + data->starts[n + 1] - data->starts[n];
        if (got->final_position[n] != (int32_t)end) {
            return support_failure(data, "final position[%zu] is %d, not %zu", n, got->final_position[n], end);
        }
    }
    return support_compare(data, "final states", got->final, expected->final, data->n_states, SUPPORT_OUTPUT);
}

/* dg against the size of the terms that it is the difference of. */
static const char *compare_small_gates(const support_data *data, const double *dg, const support_results *expected) {
    double difference = 0.0;
    double terms = 0.0;
    for (size_t i = 0; i < data->n_gates; i++) {
        difference += (dg[i] - expected->dg[i]) * (dg[i] - expected->dg[i]);
    }
    for (size_t i = 0; i < data->n_k; i++) {
        terms += data->k[i] * expected->dk[i] * data->k[i] * expected->dk[i];
    }
    const double error = sqrt(difference / terms);
    return error <= support_threshold(data->c.dtype, SUPPORT_GRADIENT)
               ? NULL
               : support_failure(data, "dg: error %.3g of its terms", error);
}

const char *support_compare_backward(const support_data *data, const support_results *got,
                                     const support_results *expected) {
    const struct {
        const char *name;
        const double *got, *expected;
        size_t count;
        bool optional;
    } tensors[] = {
        {"dq", got->dq, expected->dq, data->n_k, false},
        {"dk", got->dk, expected->dk, data->n_k, false},
        {"dv", got->dv, expected->dv, data->n_v, false},
        {"dg", got->dg, expected->dg, data->n_gates, true},
        {"dlevel_scales", got->dlevel_scales, expected->dlevel_scales, data->n_levels, true},
        {"dbeta", got->dbeta, expected->dbeta, data->c.op == LOGLIN_GATED_DELTA ? data->n_gates : 0, true},
        {"dinitial_states", got->dinitial, expected->dinitial, data->initial != NULL ? data->n_states : 0, true},
    };
    for (size_t i = 0; i < sizeof tensors / sizeof tensors[0]; i++) {
        if (tensors[i].optional && data->c.skip_optional) {
            continue;
        }
        if (data->c.small_gate_gradient && tensors[i].got == got->dg) {
            const char *failure = compare_small_gates(data, got->dg, expected);
            if (failure != NULL) {
                return failure;
            }
            continue;
        }
        const char *failure = support_compare(data, tensors[i].name, tensors[i].got, tensors[i].expected,
                                              tensors[i].count, SUPPORT_GRADIENT);
        if (failure != NULL) {
            return failure;
        }
    }
    return NULL;
}

/* ---- Checks ----------------------------------------------------------------------------------------------------- */

typedef void oracle_function(const support_data *data, support_results *results);
typedef const char *device_function(const support_data *data, support_results *results);
typedef const char *compare_function(const support_data *data, const support_results *got,
                                     const support_results *expected);

/* Fused engines do not take every problem on every device. */
static bool takes(support_data *data, loglin_engine engine, unsigned phases) {
    data->engine = engine;
    const loglin_problem problem = support_problem(data, phases);
    loglin_plan *plan = NULL;
    const loglin_status status = loglin_plan_create(support_open()->device, &problem, &plan);
    loglin_plan_destroy(plan);
    return status != LOGLIN_UNSUPPORTED;
}

static const char *check_engine(support_data *data, loglin_engine engine, const support_results *expected,
                                device_function *run, compare_function *compare) {
    support_results *got = support_results_make(data);
    data->engine = engine;
    const char *failure = run(data, got);
    if (failure == NULL) {
        failure = compare(data, got, expected);
    }
    support_results_free(got);
    return failure;
}

static const char *check(const support_case *c, unsigned phases, oracle_function *oracle, device_function *run,
                         compare_function *compare) {
    support_data *data = support_data_make(c);
    support_results *expected = support_results_make(data);
    oracle(data, expected);
    const char *failure = c->automatic ? check_engine(data, LOGLIN_ENGINE_AUTO, expected, run, compare) : NULL;
    for (size_t i = 0; !c->automatic && failure == NULL && i < ENGINE_COUNT; i++) {
        if (c->only != LOGLIN_ENGINE_AUTO ? ENGINES[i] == c->only
                                          : ENGINES[i] == LOGLIN_ENGINE_BLAS || takes(data, ENGINES[i], phases)) {
            failure = check_engine(data, ENGINES[i], expected, run, compare);
        }
    }
    support_results_free(expected);
    support_data_free(data);
    return failure;
}

const char *support_check_forward(const support_case *c) {
    return check(c, LOGLIN_FORWARD, support_oracle_forward, support_forward, support_compare_forward);
}

const char *support_check_backward(const support_case *c) {
    return check(c, LOGLIN_BACKWARD, support_oracle_backward, support_backward, support_compare_backward);
}

const char *support_check_decode(const support_case *c) {
    return check(c, LOGLIN_STEP, support_oracle_forward, support_decode, support_compare_forward);
}
