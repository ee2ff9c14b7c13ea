/* SPDX-License-Identifier: Apache-2.0 */
/* One row: opens what it compares, measures by turns, checks the outputs. */
#include "cli/bench.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* What a row measures, and what it is compared with. */
typedef struct measured {
    const loglin_bench_row *row;
    loglin_bench_load load, partner;
    loglin_bench_stepper stepper;
    loglin_bench_work works[2]; /* the row's own, and its partner's */
    size_t count;
} measured;

static void set_number(json_t *row, const char *key, double number) {
    (void)json_object_set_new(row, key, isfinite(number) ? json_real(number) : json_null());
}

void loglin_cli_bench_set_value(json_t *row, double value, const char *unit, double required, double aim,
                                bool at_most) {
    set_number(row, "value", value);
    (void)json_object_set_new(row, "unit", json_string(unit));
    (void)json_object_set_new(row, "at_most", json_boolean(at_most));
    set_number(row, "required", required > 0 ? required : NAN);
    set_number(row, "aim", aim > 0 ? aim : NAN);
    if (required > 0 && isfinite(value)) {
        (void)json_object_set_new(row, "met", json_boolean(at_most ? value <= required : value >= required));
    }
}

/* ---- What is wrong with a row ------------------------------------------------------------------------------------ */

static bool is_memory(loglin_status status) {
    return status == CL_MEM_OBJECT_ALLOCATION_FAILURE || status == CL_INVALID_BUFFER_SIZE ||
           status == CL_OUT_OF_RESOURCES || status == CL_OUT_OF_HOST_MEMORY || status == LOGLIN_OUT_OF_MEMORY;
}

static void set_failure(json_t *json, const char *failure, loglin_status status, bool *good) {
    char note[640];
    const bool refused = status == LOGLIN_UNSUPPORTED;
    (void)snprintf(note, sizeof note, "%s: %s",
                   refused             ? "refused"
                   : is_memory(status) ? "does not fit"
                                       : "failed",
                   failure);
    (void)json_object_set_new(json, "note", json_string(note));
    *good = *good && (refused || is_memory(status));
}

/* Outputs of the row's own load against float64. */
static loglin_status check_outputs(loglin_bench_machine *machine, const measured *m, json_t *json, bool *good) {
    static const double limits[][2] = {
        [LOGLIN_F32] = {1e-5, 5e-5}, [LOGLIN_F16] = {2e-3, 2e-3}, [LOGLIN_BF16] = {1e-2, 1e-2}};
    const loglin_problem *p = &m->load.problem;
    const double limit = limits[p->dtype][(p->phases & LOGLIN_BACKWARD) != 0];
    double error = NAN;
    const loglin_status status = loglin_cli_bench_check(machine, &m->load, &error);
    if (status != LOGLIN_OK) {
        return status;
    }
    set_number(json, "error", error);
    set_number(json, "error_limit", limit);
    if (!(error <= limit)) {
        char note[128];
        (void)snprintf(note, sizeof note, "WRONG: the outputs' relative error is %.2e, at most %.0e is allowed", error,
                       limit);
        (void)json_object_set_new(json, "note", json_string(note));
        *good = false;
    }
    return LOGLIN_OK;
}

/* ---- Forward and backward ---------------------------------------------------------------------------------------- */

static loglin_bench_work load_work(loglin_bench_load *load) {
    return (loglin_bench_work){
        .run = loglin_cli_bench_load_run, .data = load, .amount = loglin_cli_bench_nominal_work(&load->problem)};
}

/* The load that the row's is compared with; false if there is none. */
static bool partner_problem(const loglin_bench_row *row, loglin_problem *problem) {
    switch (row->kind) {
    case LOGLIN_BENCH_BLAS:
        problem->engine = LOGLIN_ENGINE_BLAS;
        return true;
    case LOGLIN_BENCH_F32:
        problem->dtype = problem->weight_dtype = LOGLIN_F32;
        return true;
    case LOGLIN_BENCH_GROWTH:
        problem->length /= 16;
        return true;
    default:
        return false;
    }
}

static loglin_status open_loads(loglin_bench_machine *machine, const loglin_problem *problem, loglin_bench_sgemm *sgemm,
                                measured *m) {
    loglin_problem other = *problem;
    loglin_status status = loglin_cli_bench_load_open(machine, problem, &m->load);
    m->works[m->count++] = load_work(&m->load);
    if (status == LOGLIN_OK && partner_problem(m->row, &other)) {
        status = loglin_cli_bench_load_open(machine, &other, &m->partner);
        m->works[m->count++] = load_work(&m->partner);
    } else if (m->row->kind == LOGLIN_BENCH_SGEMM && sgemm != NULL) {
        m->works[m->count++] = (loglin_bench_work){
            .run = loglin_cli_bench_sgemm_run, .data = sgemm, .amount = loglin_cli_bench_sgemm_work()};
    }
    return status;
}

static loglin_status open_steps(loglin_bench_machine *machine, const loglin_problem *problem, measured *m) {
    const loglin_status status =
        loglin_cli_bench_stepper_open(machine, problem, (int32_t)m->row->position, m->row->steps, &m->stepper);
    m->works[m->count++] = (loglin_bench_work){
        .run = loglin_cli_bench_stepper_run, .data = &m->stepper, .amount = loglin_cli_bench_step_bytes(&m->stepper)};
    if (m->row->kind == LOGLIN_BENCH_COPY) {
        m->works[m->count++] = (loglin_bench_work){
            .run = loglin_cli_bench_copy_run, .data = &m->stepper, .amount = loglin_cli_bench_copy_bytes(&m->stepper)};
    }
    return status;
}

/* ---- The row's number --------------------------------------------------------------------------------------------- */

/* Work a second of the row's own over that of its partner; NaN without one. */
static double rate_ratio(const measured *m) {
    const loglin_bench_work *own = &m->works[0];
    const loglin_bench_work *other = &m->works[1];
    return m->count < 2 ? NAN : own->amount / own->median_ms / (other->amount / other->median_ms);
}

static void set_times(const measured *m, json_t *json) {
    static const char *const rates[] = {"giga_per_s", "partner_giga_per_s"};
    static const char *const times[] = {"median_ms", "partner_median_ms"};
    static const char *const runs[] = {"runs", "partner_runs"};
    for (size_t i = 0; i < m->count && i < 2; ++i) {
        const loglin_bench_work *work = &m->works[i];
        set_number(json, times[i], work->median_ms);
        set_number(json, rates[i], work->amount / work->median_ms * 1e-6);
        (void)json_object_set_new(json, runs[i], json_integer((json_int_t)work->runs));
    }
    set_number(json, "least_ms", m->works[0].least_ms);
}

static void set_result(const measured *m, json_t *json) {
    static const char *const units[] = {[LOGLIN_BENCH_TIME] = "ms",          [LOGLIN_BENCH_STEP_TIME] = "us a step",
                                        [LOGLIN_BENCH_SGEMM] = "x OpenBLAS", [LOGLIN_BENCH_BLAS] = "x blas engine",
                                        [LOGLIN_BENCH_F32] = "x f32",        [LOGLIN_BENCH_COPY] = "x copy",
                                        [LOGLIN_BENCH_GROWTH] = "x work"};
    const loglin_bench_kind kind = m->row->kind;
    double value = rate_ratio(m);
    bool at_most = false;
    if (kind == LOGLIN_BENCH_TIME || kind == LOGLIN_BENCH_STEP_TIME) {
        value = kind == LOGLIN_BENCH_TIME ? m->works[0].median_ms : 1e3 * m->works[0].median_ms / (double)m->row->steps;
        at_most = true;
    } else if (kind == LOGLIN_BENCH_GROWTH) {
        value = 1.0 / value;
        at_most = true;
    }
    set_times(m, json);
    loglin_cli_bench_set_value(json, value, units[kind], m->row->required, m->row->aim, at_most);
    if (kind == LOGLIN_BENCH_SGEMM && m->count < 2) {
        (void)json_object_set_new(json, "note", json_string("libopenblas.so.0 is missing: no yardstick"));
    }
}

static loglin_status measure_workspace(loglin_bench_machine *machine, const loglin_problem *problem, measured *m,
                                       json_t *json) {
    const loglin_status status = loglin_plan_create(machine->device, problem, &m->load.plan);
    if (status != LOGLIN_OK) {
        return loglin_cli_bench_fail(machine, status, "%s", loglin_last_error());
    }
    size_t bytes = 0;
    static const loglin_bench_tensor tensors[] = {LOGLIN_BENCH_Q, LOGLIN_BENCH_K, LOGLIN_BENCH_V, LOGLIN_BENCH_O};
    for (size_t i = 0; i < sizeof tensors / sizeof tensors[0]; ++i) {
        bytes += problem->batch * problem->length * loglin_cli_bench_width(problem, tensors[i]) *
                 loglin_cli_bench_element(problem, tensors[i]);
    }
    const double ratio = (double)loglin_cli_bench_workspace(m->load.plan) / (double)bytes;
    loglin_cli_bench_set_value(json, ratio, "x q, k, v, o", m->row->required, m->row->aim, true);
    return LOGLIN_OK;
}

static loglin_status measure(loglin_bench_machine *machine, const loglin_bench_options *options,
                             loglin_bench_sgemm *sgemm, const loglin_problem *problem, measured *m, json_t *json,
                             bool *good) {
    if (m->row->kind == LOGLIN_BENCH_WORKSPACE_SIZE) {
        return measure_workspace(machine, problem, m, json);
    }
    const bool steps = m->row->steps > 0;
    loglin_status status = steps ? open_steps(machine, problem, m) : open_loads(machine, problem, sgemm, m);
    if (status != LOGLIN_OK) {
        return status;
    }
    (void)json_object_set_new(json, "engine", json_string(steps ? "step" : m->load.engine));
    (void)json_object_set_new(json, "plan", json_string(steps ? m->stepper.plan_text : m->load.plan_text));
    status = loglin_cli_bench_measure(machine, m->works, m->count,
                                      options->repetitions > 0 ? options->repetitions : options->suite->repetitions,
                                      options->suite->warm_up, options->repetitions > 0);
    if (status != LOGLIN_OK) {
        return status;
    }
    set_result(m, json);
    return steps ? LOGLIN_OK : check_outputs(machine, m, json, good);
}

json_t *loglin_cli_bench_row(loglin_bench_machine *machine, const loglin_bench_options *options,
                             loglin_bench_sgemm *sgemm, const loglin_bench_row *row, bool *good) {
    json_t *json = json_pack("{s:s}", "name", row->name);
    if (json == NULL) {
        return NULL;
    }
    measured m = {.row = row};
    loglin_problem problem = row->problem;
    problem.engine = options->engine;
    problem.levels = problem.levels > 0 ? problem.levels : loglin_num_levels(problem.length);
    machine->events = options->suite->events;
    const loglin_status status = measure(machine, options, sgemm, &problem, &m, json, good);
    if (status != LOGLIN_OK) {
        loglin_cli_bench_set_value(json, NAN, "", row->required, row->aim, false);
        set_failure(json, machine->failure, status, good);
    }
    (void)clFinish(machine->queue);
    loglin_cli_bench_load_close(&m.load);
    loglin_cli_bench_load_close(&m.partner);
    loglin_cli_bench_stepper_close(&m.stepper);
    return json;
}
