/* SPDX-License-Identifier: Apache-2.0 */
/* Plans: what they refuse and how they say it, what calls refuse, and what plans tell about themselves. */
#include "engine/engine.h"
#include "plan/problem.h"
#include "runtime/device.h"
#include "support_criterion.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- Problems --------------------------------------------------------------------------------------------------- */

static const loglin_problem GOOD = {.batch = 2,
                                    .length = 64,
                                    .heads = 4,
                                    .groups = 2,
                                    .dim_k = 8,
                                    .dim_v = 6,
                                    .levels = 9,
                                    .phases = LOGLIN_FORWARD | LOGLIN_BACKWARD | LOGLIN_STEP};

static loglin_plan *make_plan(const loglin_problem *problem) {
    loglin_plan *plan = NULL;
    support_require(loglin_plan_create(support_open()->device, problem, &plan), "loglin_plan_create");
    return plan;
}

/* The problem is refused, and the text has the word. */
static void expect_refused(const loglin_problem *problem, const char *word) {
    loglin_plan *plan = (loglin_plan *)&GOOD;
    const loglin_status status = loglin_plan_create(support_open()->device, problem, &plan);
    cr_expect_eq(status, LOGLIN_INVALID_ARGUMENT, "%s: %s", word, loglin_strerror(status));
    cr_expect_null(plan, "%s: a refused plan is NULL", word);
    cr_expect(strstr(loglin_last_error(), word) != NULL, "the text lacks \"%s\": %s", word, loglin_last_error());
}

Test(plan, refuses_bad_sizes) {
    const struct {
        const char *name;
        size_t field, value;
    } bad[] = {
        {"batch", offsetof(loglin_problem, batch), 0},
        {"batch", offsetof(loglin_problem, batch), SIZE_MAX},
        {"batch", offsetof(loglin_problem, batch), SIZE_MAX / 64 + 2},
        {"length", offsetof(loglin_problem, length), 0},
        {"length", offsetof(loglin_problem, length), SIZE_MAX},
        {"length", offsetof(loglin_problem, length), SIZE_MAX / 2 + 2},
        {"heads", offsetof(loglin_problem, heads), 0},
        {"heads", offsetof(loglin_problem, heads), SIZE_MAX - 1},
        {"groups", offsetof(loglin_problem, groups), 0},
        {"groups", offsetof(loglin_problem, groups), 3},
        {"groups", offsetof(loglin_problem, groups), 8},
        {"groups", offsetof(loglin_problem, groups), SIZE_MAX},
        {"dim_k", offsetof(loglin_problem, dim_k), 0},
        {"dim_k", offsetof(loglin_problem, dim_k), LOGLIN_MAX_DIM + 1},
        {"dim_k", offsetof(loglin_problem, dim_k), SIZE_MAX},
        {"dim_v", offsetof(loglin_problem, dim_v), 0},
        {"dim_v", offsetof(loglin_problem, dim_v), LOGLIN_MAX_DIM + 1},
        {"levels", offsetof(loglin_problem, levels), 0},
        {"levels", offsetof(loglin_problem, levels), 6},
        {"levels", offsetof(loglin_problem, levels), LOGLIN_MAX_LEVELS + 1},
        {"levels", offsetof(loglin_problem, levels), SIZE_MAX},
        {"levels", offsetof(loglin_problem, max_position), 193},
        {"max_position", offsetof(loglin_problem, max_position), SIZE_MAX},
        {"max_length", offsetof(loglin_problem, max_length), SIZE_MAX},
        {"max_length", offsetof(loglin_problem, max_length), 1}, /* without packing */
        {"sequences", offsetof(loglin_problem, sequences), SIZE_MAX},
        {"batch", offsetof(loglin_problem, sequences), 2}, /* packing with a batch of 2 */
        {"chunk", offsetof(loglin_problem, chunk), 1},
        {"chunk", offsetof(loglin_problem, chunk), 8},
        {"chunk", offsetof(loglin_problem, chunk), 48},
        {"chunk", offsetof(loglin_problem, chunk), 512},
        {"chunk", offsetof(loglin_problem, chunk), SIZE_MAX},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        loglin_problem problem = GOOD;
        memcpy((char *)&problem + bad[i].field, &bad[i].value, sizeof bad[i].value);
        expect_refused(&problem, bad[i].name);
    }
}

Test(plan, refuses_bad_choices) {
    const struct {
        const char *name;
        size_t field;
        int value;
    } bad[] = {
        {"op", offsetof(loglin_problem, op), 2},
        {"op", offsetof(loglin_problem, op), -1},
        {"partition", offsetof(loglin_problem, partition), 2},
        {"dtype", offsetof(loglin_problem, dtype), 3},
        {"dtype", offsetof(loglin_problem, dtype), -1},
        {"weight_dtype", offsetof(loglin_problem, weight_dtype), 3},
        {"weight_dtype", offsetof(loglin_problem, weight_dtype), LOGLIN_F16}, /* beside f32 */
        {"engine", offsetof(loglin_problem, engine), 1000},
        {"engine", offsetof(loglin_problem, engine), -1},
        {"phases", offsetof(loglin_problem, phases), 8},
        {"phases", offsetof(loglin_problem, phases), -1},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        loglin_problem problem = GOOD;
        memcpy((char *)&problem + bad[i].field, &bad[i].value, sizeof bad[i].value);
        expect_refused(&problem, bad[i].name);
    }
    loglin_problem problem = GOOD;
    problem.dtype = LOGLIN_BF16;
    problem.weight_dtype = LOGLIN_F16;
    expect_refused(&problem, "weight_dtype");
    problem = GOOD;
    problem.scale = NAN;
    expect_refused(&problem, "scale");
    problem.scale = INFINITY;
    expect_refused(&problem, "scale");
}

Test(plan, refuses_missing_arguments) {
    loglin_plan *plan = NULL;
    cr_expect_eq(loglin_plan_create(NULL, &GOOD, &plan), LOGLIN_INVALID_ARGUMENT);
    cr_expect(strstr(loglin_last_error(), "device") != NULL, "%s", loglin_last_error());
    cr_expect_eq(loglin_plan_create(support_open()->device, NULL, &plan), LOGLIN_INVALID_ARGUMENT);
    cr_expect(strstr(loglin_last_error(), "problem") != NULL, "%s", loglin_last_error());
    cr_expect_eq(loglin_plan_create(support_open()->device, &GOOD, NULL), LOGLIN_INVALID_ARGUMENT);
    cr_expect(strstr(loglin_last_error(), "plan") != NULL, "%s", loglin_last_error());
    loglin_plan_destroy(NULL);
}

/* Sizes whose products go beyond 64 bits, or beyond any memory, are refused one way or the other. */
Test(plan, refuses_products_that_overflow) {
    const loglin_problem huge[] = {
        {.batch = (size_t)1 << 31,
         .length = (size_t)1 << 31,
         .heads = 1,
         .groups = 1,
         .dim_k = 512,
         .dim_v = 512,
         .levels = 32},
        {.batch = (size_t)1 << 33,
         .length = 1,
         .heads = (size_t)1 << 31,
         .groups = 1,
         .dim_k = 512,
         .dim_v = 512,
         .levels = 32},
        {.batch = 1, .length = 2147483647, .heads = 65535, .groups = 65535, .dim_k = 512, .dim_v = 512, .levels = 32},
        {.batch = 2147483647, .length = 1, .heads = 65535, .groups = 65535, .dim_k = 512, .dim_v = 512, .levels = 32},
    };
    for (size_t i = 0; i < sizeof huge / sizeof huge[0]; i++) {
        loglin_plan *plan = NULL;
        const loglin_status status = loglin_plan_create(support_open()->device, &huge[i], &plan);
        cr_expect(status > 0, "problem %zu: %s", i, loglin_strerror(status));
        cr_expect(strlen(loglin_last_error()) > 0);
        loglin_plan_destroy(plan);
    }
}

/* ---- What plans tell -------------------------------------------------------------------------------------------- */

Test(plan, describes_itself) {
    loglin_problem problem = GOOD;
    problem.chunk = 32;
    problem.engine = LOGLIN_ENGINE_BLAS;
    loglin_plan *plan = make_plan(&problem);
    char whole[1024];
    const size_t length = loglin_plan_describe(plan, whole, sizeof whole);
    cr_expect_eq(length, strlen(whole));
    cr_expect(strstr(whole, "engine blas (as asked)") != NULL && strstr(whole, "32") != NULL &&
                  strstr(whole, "workspace") != NULL,
              "%s", whole);
    char cut[8];
    cr_expect_eq(loglin_plan_describe(plan, cut, sizeof cut), length);
    cr_expect_eq(strlen(cut), sizeof cut - 1);
    cr_expect_eq(strncmp(cut, whole, sizeof cut - 1), 0);
    cr_expect_eq(loglin_plan_describe(plan, NULL, 0), length);
    cr_expect_eq(loglin_state_size(plan), 4 * 2 * 4 * 9 * 8 * 6);
    cr_expect_eq(loglin_workspace_size(plan, LOGLIN_STEP), 0);
    loglin_plan_destroy(plan);
}

static void expect_said(const char *word) {
    cr_expect(strstr(loglin_last_error(), word) != NULL, "the text lacks \"%s\": %s", word, loglin_last_error());
}

Test(plan, what_there_is_not_has_no_size) {
    char text[8] = "before";
    cr_expect_eq(loglin_workspace_size(NULL, LOGLIN_FORWARD), 0);
    expect_said("plan is NULL");
    cr_expect_eq(loglin_state_size(NULL), 0);
    cr_expect_eq(loglin_plan_describe(NULL, text, sizeof text), 0);
    cr_expect_eq(text[0], '\0');
    cr_expect_eq(loglin_plan_describe(NULL, NULL, sizeof text), 0);

    loglin_problem problem = GOOD;
    problem.phases = LOGLIN_BACKWARD | LOGLIN_STEP;
    loglin_plan *plan = make_plan(&problem);
    cr_expect_eq(loglin_plan_describe(plan, NULL, sizeof text), loglin_plan_describe(plan, NULL, 0));
    cr_expect_gt(loglin_workspace_size(plan, LOGLIN_BACKWARD), 0);
    const int not_planned[] = {0, LOGLIN_FORWARD, LOGLIN_BACKWARD | LOGLIN_STEP, 8, -1};
    for (size_t i = 0; i < sizeof not_planned / sizeof *not_planned; i++) {
        (void)loglin_workspace_size(NULL, LOGLIN_FORWARD);
        cr_expect_eq(loglin_workspace_size(plan, (loglin_phase)not_planned[i]), 0, "phase %d", not_planned[i]);
        expect_said("expected one of those planned, 0x6");
    }
    loglin_plan_destroy(plan);
}

/* is_blas: whose it is. */
static size_t workspace_of(loglin_op op, loglin_phase phase, size_t length, loglin_engine engine, bool *is_blas) {
    const loglin_problem problem = {.op = op,
                                    .batch = 1,
                                    .length = length,
                                    .heads = 2,
                                    .groups = 1,
                                    .dim_k = 16,
                                    .dim_v = 16,
                                    .levels = 24,
                                    .phases = phase,
                                    .engine = engine};
    loglin_plan *plan = make_plan(&problem);
    const size_t size = loglin_workspace_size(plan, phase);
    char text[1024];
    (void)loglin_plan_describe(plan, text, sizeof text);
    *is_blas =
        strstr(text, "engine blas") != NULL || (phase == LOGLIN_BACKWARD && strstr(text, "by the blas engine") != NULL);
    loglin_plan_destroy(plan);
    return size;
}

/*
 * The blas engine takes what makes its products large, up to 256 MiB however long the sequence is.  Of the others, four times the
 * tokens take about as much more workspace, and a token of a long sequence no more than one of a short.
 */
static void expect_growth(loglin_op op, loglin_phase phase, loglin_engine engine) {
    bool is_blas = false;
    const size_t first = workspace_of(op, phase, 1024, engine, &is_blas);
    size_t before = first;
    for (size_t length = 4096; length <= 1 << 20; length *= 4) {
        const size_t size = workspace_of(op, phase, length, engine, &is_blas);
        cr_expect(engine != LOGLIN_ENGINE_BLAS || is_blas);
        if (is_blas) {
            cr_expect_leq(size, (size_t)256 << 20, "op %d, phase %d, T %zu: %zu", op, phase, length, size);
        } else {
            cr_expect_leq(size, before * 17 / 4 + 65536, "op %d, phase %d, T %zu: %zu after %zu", op, phase, length,
                          size, before);
            cr_expect_leq(size, 2 * first * (length / 1024), "op %d, phase %d, T %zu: %zu, %zu at 1024", op, phase,
                          length, size, first);
        }
        before = size;
    }
}

Test(plan, workspace_grows_linearly) {
    for (int op = 0; op < 2; op++) {
        for (int phase = LOGLIN_FORWARD; phase <= LOGLIN_BACKWARD; phase *= 2) {
            expect_growth((loglin_op)op, (loglin_phase)phase, LOGLIN_ENGINE_AUTO);
            expect_growth((loglin_op)op, (loglin_phase)phase, LOGLIN_ENGINE_BLAS);
        }
    }
}

static size_t engine_workspace(loglin_engine engine) {
    loglin_problem problem = GOOD;
    problem.phases = LOGLIN_FORWARD;
    problem.engine = engine;
    loglin_plan *plan = make_plan(&problem);
    const size_t size = loglin_workspace_size(plan, LOGLIN_FORWARD);
    loglin_plan_destroy(plan);
    return size;
}

/* An engine whose workspace the device cannot allocate gives way to one that needs less. */
Test(plan, takes_an_engine_whose_workspace_fits) {
    const size_t fused = engine_workspace(LOGLIN_ENGINE_FUSED), blas = engine_workspace(LOGLIN_ENGINE_BLAS);
    const size_t smaller = fused < blas ? fused : blas, larger = fused < blas ? blas : fused;
    cr_assert_lt(smaller, larger);
    uint64_t *limit = &support_open()->device->info.max_allocation;
    *limit = larger - 1;
    cr_expect_eq(engine_workspace(LOGLIN_ENGINE_AUTO), smaller);
    *limit = smaller - 1;
    loglin_problem problem = GOOD;
    problem.phases = LOGLIN_FORWARD;
    loglin_plan *plan = NULL;
    cr_expect_eq(loglin_plan_create(support_open()->device, &problem, &plan), LOGLIN_UNSUPPORTED);
    cr_expect(strstr(loglin_last_error(), "workspace: the forward call needs") != NULL, "%s", loglin_last_error());
}

Test(plan, counts_levels) {
    static const size_t expected[][2] = {{0, 1},        {1, 1},      {2, 2},      {3, 3},
                                         {4, 3},        {5, 4},      {8, 4},      {9, 5},
                                         {16384, 15},   {16385, 16}, {65536, 17}, {(size_t)1 << 31, 32},
                                         {SIZE_MAX, 65}};
    for (size_t i = 0; i < sizeof expected / sizeof expected[0]; i++) {
        cr_expect_eq(loglin_num_levels(expected[i][0]), expected[i][1], "levels of %zu: %zu", expected[i][0],
                     loglin_num_levels(expected[i][0]));
    }
}

Test(plan, checks_gates) {
    const float good[] = {0.0f, -0.0f, -1e-45f, -50.0f, -3e38f};
    cr_expect_eq(loglin_check_gates(good, 5), 5);
    cr_expect_eq(loglin_check_gates(NULL, 0), 0);
    cr_expect_eq(loglin_check_gates(NULL, 3), 0);
    const float bad[] = {NAN, INFINITY, -INFINITY, 1e-45f, 1.0f};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        float gates[4] = {-1.0f, -2.0f, bad[i], bad[i]};
        cr_expect_eq(loglin_check_gates(gates, 4), 2, "gate %g", (double)bad[i]);
        cr_expect_eq(loglin_check_gates(gates, 2), 2);
    }
}

/* ---- Calls ------------------------------------------------------------------------------------------------------ */

/* Every argument of a call; each buffer is exactly as large as it must be. */
typedef struct arguments {
    loglin_inputs in;
    loglin_state initial, final;
    loglin_buffer o, d_o, dfinal, workspace;
    loglin_gradients out;
} arguments;

typedef struct call_fixture {
    loglin_problem problem;
    loglin_plan *plan;
    arguments good;
} call_fixture;

static loglin_buffer exact_buffer(size_t bytes) {
    cl_int status = CL_SUCCESS;
    cl_mem mem = clCreateBuffer(support_open()->context, CL_MEM_READ_WRITE, bytes, NULL, &status);
    support_require(status, "clCreateBuffer");
    return (loglin_buffer){.mem = mem};
}

static call_fixture open_calls(loglin_op op) {
    call_fixture f = {.problem = GOOD};
    f.problem.op = op;
    f.problem.max_position = 100;
    f.plan = make_plan(&f.problem);
    const size_t rows = f.problem.batch * f.problem.length;
    const size_t qk = 4 * rows * f.problem.groups * f.problem.dim_k;
    const size_t v = 4 * rows * f.problem.heads * f.problem.dim_v;
    const size_t gates = 4 * rows * f.problem.heads;
    const size_t weights = gates * f.problem.levels;
    const size_t states = loglin_state_size(f.plan);
    const size_t forward = loglin_workspace_size(f.plan, LOGLIN_FORWARD);
    const size_t backward = loglin_workspace_size(f.plan, LOGLIN_BACKWARD);
    const bool delta = op == LOGLIN_GATED_DELTA;
    const loglin_buffer absent = {0};
    f.good = (arguments){
        .in = {.q = exact_buffer(qk),
               .k = exact_buffer(qk),
               .v = exact_buffer(v),
               .g = exact_buffer(gates),
               .level_scales = exact_buffer(weights),
               .beta = delta ? exact_buffer(gates) : absent},
        .initial = {.values = exact_buffer(states), .position = exact_buffer(4 * f.problem.batch)},
        .final = {.values = exact_buffer(states), .position = exact_buffer(4 * f.problem.batch)},
        .o = exact_buffer(v),
        .d_o = exact_buffer(v),
        .dfinal = exact_buffer(states),
        .workspace = exact_buffer(forward > backward ? forward : backward),
        .out = {.dq = exact_buffer(qk),
                .dk = exact_buffer(qk),
                .dv = exact_buffer(v),
                .dg = exact_buffer(gates),
                .dlevel_scales = exact_buffer(weights),
                .dbeta = delta ? exact_buffer(gates) : absent,
                .dinitial_states = exact_buffer(states)},
    };
    return f;
}

static void close_calls(call_fixture *f) {
    support_require(clFinish(support_open()->queue), "clFinish");
    const loglin_buffer *all = (const loglin_buffer *)&f->good;
    for (size_t i = 0; i < sizeof f->good / sizeof *all; i++) {
        if (all[i].mem != NULL) {
            clReleaseMemObject(all[i].mem);
        }
    }
    loglin_plan_destroy(f->plan);
}

typedef loglin_status call_function(loglin_plan *plan, const arguments *a, cl_command_queue queue, cl_uint num_wait,
                                    const cl_event *wait, cl_event *event);

static loglin_status call_forward(loglin_plan *plan, const arguments *a, cl_command_queue queue, cl_uint num_wait,
                                  const cl_event *wait, cl_event *event) {
    return loglin_forward(plan, &a->in, &a->initial, a->o, &a->final, a->workspace, queue, num_wait, wait, event);
}

static loglin_status call_backward(loglin_plan *plan, const arguments *a, cl_command_queue queue, cl_uint num_wait,
                                   const cl_event *wait, cl_event *event) {
    return loglin_backward(plan, &a->in, &a->initial, a->d_o, a->dfinal, &a->out, a->workspace, queue, num_wait, wait,
                           event);
}

static loglin_status call_step(loglin_plan *plan, const arguments *a, cl_command_queue queue, cl_uint num_wait,
                               const cl_event *wait, cl_event *event) {
    return loglin_step(plan, &a->in, &a->final, a->o, queue, num_wait, wait, event);
}

/* The call fails with the status, enqueues nothing, and its text has the word. */
static void expect_call_refused(call_function *call, loglin_plan *plan, const arguments *a, loglin_status expected,
                                const char *word) {
    cl_event event = NULL;
    const loglin_status status = call(plan, a, support_open()->queue, 0, NULL, &event);
    cr_expect_eq(status, expected, "%s: %s (%s)", word, loglin_strerror(status), loglin_last_error());
    cr_expect_null(event, "%s: a refused call gives no event", word);
    cr_expect(strstr(loglin_last_error(), word) != NULL, "the text lacks \"%s\": %s", word, loglin_last_error());
}

typedef struct argument_name {
    const char *name;
    size_t field;
    bool required;
} argument_name;

#define ARGUMENT(name, field, required)                                                                                \
    { name, offsetof(arguments, field), required }

static const argument_name INPUT_NAMES[] = {
    ARGUMENT("q", in.q, true),
    ARGUMENT("k", in.k, true),
    ARGUMENT("v", in.v, true),
    ARGUMENT("g", in.g, false),
    ARGUMENT("level_scales", in.level_scales, true),
    ARGUMENT("beta", in.beta, true),
};
static const argument_name FORWARD_NAMES[] = {
    ARGUMENT("initial.values", initial.values, true),
    ARGUMENT("initial.position", initial.position, true),
    ARGUMENT("final.values", final.values, true),
    ARGUMENT("final.position", final.position, false),
    ARGUMENT("o", o, true),
    ARGUMENT("workspace", workspace, true),
};
static const argument_name BACKWARD_NAMES[] = {
    ARGUMENT("initial.values", initial.values, true),
    ARGUMENT("initial.position", initial.position, true),
    ARGUMENT("d_o", d_o, true),
    ARGUMENT("dfinal_states", dfinal, false),
    ARGUMENT("dq", out.dq, true),
    ARGUMENT("dk", out.dk, true),
    ARGUMENT("dv", out.dv, true),
    ARGUMENT("dg", out.dg, false),
    ARGUMENT("dlevel_scales", out.dlevel_scales, false),
    ARGUMENT("dbeta", out.dbeta, false),
    ARGUMENT("dinitial_states", out.dinitial_states, false),
    ARGUMENT("workspace", workspace, true),
};

/* Each buffer in turn: missing, too short by one, and with an offset that wraps around. */
static void expect_arguments_checked(const call_fixture *f, call_function *call, const argument_name *names,
                                     size_t count) {
    for (size_t i = 0; i < count; i++) {
        arguments a = f->good;
        loglin_buffer *buffer = (loglin_buffer *)((char *)&a + names[i].field);
        if (buffer->mem == NULL) {
            continue; /* beta of the scalar-gated operator */
        }
        buffer->offset = 1;
        expect_call_refused(call, f->plan, &a, LOGLIN_BUFFER_TOO_SMALL, names[i].name);
        buffer->offset = SIZE_MAX;
        expect_call_refused(call, f->plan, &a, LOGLIN_BUFFER_TOO_SMALL, names[i].name);
        if (names[i].required) {
            *buffer = (loglin_buffer){0};
            expect_call_refused(call, f->plan, &a, LOGLIN_INVALID_ARGUMENT, names[i].name);
        }
    }
}

#define COUNT(array) (sizeof(array) / sizeof *(array))

Test(plan, calls_check_their_buffers) {
    for (int op = 0; op < 2; op++) {
        call_fixture f = open_calls((loglin_op)op);
        if (loglin_workspace_size(f.plan, LOGLIN_FORWARD) < loglin_workspace_size(f.plan, LOGLIN_BACKWARD)) {
            arguments a = f.good;
            a.workspace.offset = loglin_workspace_size(f.plan, LOGLIN_BACKWARD) / 4 -
                                 loglin_workspace_size(f.plan, LOGLIN_FORWARD) / 4 + 1;
            expect_call_refused(call_forward, f.plan, &a, LOGLIN_BUFFER_TOO_SMALL, "workspace");
        }
        expect_arguments_checked(&f, call_forward, INPUT_NAMES, COUNT(INPUT_NAMES));
        expect_arguments_checked(&f, call_forward, FORWARD_NAMES, COUNT(FORWARD_NAMES) - 1);
        expect_arguments_checked(&f, call_backward, INPUT_NAMES, COUNT(INPUT_NAMES));
        expect_arguments_checked(&f, call_backward, BACKWARD_NAMES, COUNT(BACKWARD_NAMES));
        close_calls(&f);
    }
}

Test(plan, calls_check_their_other_arguments) {
    call_fixture f = open_calls(LOGLIN_MAMBA2);
    call_function *const calls[] = {call_forward, call_backward, call_step};
    const loglin_buffer extra = exact_buffer(65536);
    cl_event event = NULL;
    for (size_t i = 0; i < COUNT(calls); i++) {
        cr_expect_eq(calls[i](NULL, &f.good, support_open()->queue, 0, NULL, &event), LOGLIN_INVALID_ARGUMENT);
        cr_expect(strstr(loglin_last_error(), "plan") != NULL, "%s", loglin_last_error());
        cr_expect_eq(calls[i](f.plan, &f.good, NULL, 0, NULL, &event), LOGLIN_INVALID_ARGUMENT);
        cr_expect(strstr(loglin_last_error(), "queue") != NULL, "%s", loglin_last_error());
        cr_expect_eq(calls[i](f.plan, &f.good, support_open()->queue, 1, NULL, &event), LOGLIN_INVALID_ARGUMENT);
        cr_expect(strstr(loglin_last_error(), "wait") != NULL, "%s", loglin_last_error());
        arguments a = f.good;
        a.in.beta = extra;
        expect_call_refused(calls[i], f.plan, &a, LOGLIN_INVALID_ARGUMENT, "beta");
        a = f.good;
        a.in.cu_seqlens = extra;
        expect_call_refused(calls[i], f.plan, &a, LOGLIN_INVALID_ARGUMENT, "cu_seqlens");
    }
    arguments a = f.good;
    a.out.dbeta = extra;
    expect_call_refused(call_backward, f.plan, &a, LOGLIN_INVALID_ARGUMENT, "dbeta");
    a = f.good;
    a.final.log_decay = (loglin_buffer){.mem = extra.mem, .offset = 16384 - 71};
    expect_call_refused(call_forward, f.plan, &a, LOGLIN_BUFFER_TOO_SMALL, "log_decay");
    expect_call_refused(call_step, f.plan, &a, LOGLIN_BUFFER_TOO_SMALL, "log_decay");
    cr_expect_eq(
        loglin_forward(f.plan, NULL, NULL, f.good.o, NULL, f.good.workspace, support_open()->queue, 0, NULL, NULL),
        LOGLIN_INVALID_ARGUMENT);
    cr_expect_eq(loglin_backward(f.plan, &f.good.in, NULL, f.good.d_o, f.good.dfinal, NULL, f.good.workspace,
                                 support_open()->queue, 0, NULL, NULL),
                 LOGLIN_INVALID_ARGUMENT);
    cr_expect_eq(loglin_step(f.plan, &f.good.in, NULL, f.good.o, support_open()->queue, 0, NULL, NULL),
                 LOGLIN_INVALID_ARGUMENT);
    cr_expect(strstr(loglin_last_error(), "state") != NULL, "%s", loglin_last_error());
    clReleaseMemObject(extra.mem);
    close_calls(&f);
}

/* CLBlast counts in int; such a buffer is too large for a test, so the engine is called without a plan's checks. */
Test(plan, a_workspace_out_of_reach_is_refused_at_once) {
    const support_device *device = support_open();
    const loglin_configuration configuration = loglin_configuration_default(LOGLIN_ENGINE_BLAS);
    loglin_problem problem = {0};
    support_require(loglin_problem_validate(&GOOD, &problem), "loglin_problem_validate");
    problem.chunk = 64;
    loglin_engine_state *state = NULL;
    support_require(loglin_blas_engine.create(device->device, &problem, &configuration, &state), "create");
    const loglin_buffer far = {.mem = exact_buffer(64).mem, .offset = INT32_MAX};
    const loglin_call call = {.d_o = far};
    cl_event event = NULL;
    cr_expect_eq(loglin_blas_engine.forward(state, &call, far, device->queue, 0, NULL, &event), LOGLIN_UNSUPPORTED);
    cr_expect(strstr(loglin_last_error(), "workspace.offset is 2147483647") != NULL, "%s", loglin_last_error());
    cr_expect_eq(loglin_blas_engine.backward(state, &call, far, device->queue, 0, NULL, &event), LOGLIN_UNSUPPORTED);
    cr_expect(strstr(loglin_last_error(), "workspace.offset is 2147483647") != NULL, "%s", loglin_last_error());
    cr_expect_null(event);
    loglin_blas_engine.destroy(state);
    clReleaseMemObject(far.mem);
}

Test(plan, delta_rule_has_no_log_decay) {
    call_fixture f = open_calls(LOGLIN_GATED_DELTA);
    const loglin_buffer extra = exact_buffer(65536);
    arguments a = f.good;
    a.final.log_decay = extra;
    expect_call_refused(call_forward, f.plan, &a, LOGLIN_INVALID_ARGUMENT, "log_decay");
    expect_call_refused(call_step, f.plan, &a, LOGLIN_INVALID_ARGUMENT, "log_decay");
    a = f.good;
    a.initial.log_decay = extra;
    expect_call_refused(call_backward, f.plan, &a, LOGLIN_INVALID_ARGUMENT, "log_decay");
    clReleaseMemObject(extra.mem);
    close_calls(&f);
}

Test(plan, calls_need_their_phase) {
    call_function *const calls[] = {call_forward, call_backward, call_step};
    call_fixture f = open_calls(LOGLIN_MAMBA2);
    for (unsigned planned = 0; planned < 3; planned++) {
        loglin_problem problem = f.problem;
        problem.phases = 1u << planned;
        loglin_plan *plan = make_plan(&problem);
        for (size_t i = 0; i < 3; i++) {
            if (i != planned) {
                expect_call_refused(calls[i], plan, &f.good, LOGLIN_INVALID_ARGUMENT, "phases");
            }
        }
        loglin_plan_destroy(plan);
    }
    close_calls(&f);
}

Test(plan, initial_states_must_be_planned) {
    call_fixture f = open_calls(LOGLIN_MAMBA2);
    loglin_problem problem = f.problem;
    problem.max_position = 0;
    loglin_plan *plan = make_plan(&problem);
    expect_call_refused(call_forward, plan, &f.good, LOGLIN_INVALID_ARGUMENT, "initial");
    expect_call_refused(call_backward, plan, &f.good, LOGLIN_INVALID_ARGUMENT, "initial");
    loglin_plan_destroy(plan);
    close_calls(&f);
}

static cl_context other_context(void) {
    cl_int status = CL_SUCCESS;
    cl_context context = clCreateContext(NULL, 1, &support_open()->id, NULL, NULL, &status);
    support_require(status, "clCreateContext");
    return context;
}

Test(plan, queue_must_be_of_its_context) {
    call_fixture f = open_calls(LOGLIN_MAMBA2);
    cl_context context = other_context();
    cl_int status = CL_SUCCESS;
    cl_command_queue queue = clCreateCommandQueueWithProperties(context, support_open()->id, NULL, &status);
    support_require(status, "clCreateCommandQueueWithProperties");
    cr_expect_eq(call_forward(f.plan, &f.good, queue, 0, NULL, NULL), LOGLIN_INVALID_ARGUMENT);
    expect_said("queue");
    clReleaseCommandQueue(queue);
    clReleaseContext(context);
    close_calls(&f);
}

/* Drivers take some of these without a word: the step's kernels were enqueued behind nothing. */
Test(plan, events_must_be_of_the_context) {
    call_function *const calls[] = {call_forward, call_backward, call_step};
    call_fixture f = open_calls(LOGLIN_MAMBA2);
    cl_context context = other_context();
    cl_int status = CL_SUCCESS;
    cl_event own = clCreateUserEvent(support_open()->context, &status);
    support_require(status, "clCreateUserEvent");
    cl_event foreign = clCreateUserEvent(context, &status);
    support_require(status, "clCreateUserEvent");
    for (size_t i = 0; i < COUNT(calls); i++) {
        cl_event event = NULL;
        cl_command_queue queue = support_open()->queue;
        cr_expect_eq(calls[i](f.plan, &f.good, queue, 2, (cl_event[]){own, NULL}, &event), LOGLIN_INVALID_ARGUMENT);
        expect_said("wait[1] is NULL");
        cr_expect_eq(calls[i](f.plan, &f.good, queue, 2, (cl_event[]){own, foreign}, &event), LOGLIN_INVALID_ARGUMENT);
        expect_said("wait[1] is of another context");
        cr_expect_null(event);
    }
    clReleaseEvent(foreign);
    clReleaseEvent(own);
    clReleaseContext(context);
    close_calls(&f);
}

Test(plan, buffers_must_be_of_the_context) {
    call_fixture f = open_calls(LOGLIN_MAMBA2);
    cl_context context = other_context();
    cl_int status = CL_SUCCESS;
    cl_mem foreign = clCreateBuffer(context, CL_MEM_READ_WRITE, 1 << 20, NULL, &status);
    support_require(status, "clCreateBuffer");
    arguments a = f.good;
    a.in.v.mem = foreign;
    expect_call_refused(call_forward, f.plan, &a, LOGLIN_INVALID_ARGUMENT, "v: the buffer is of another context");
    expect_call_refused(call_step, f.plan, &a, LOGLIN_INVALID_ARGUMENT, "v: the buffer is of another context");
    a = f.good;
    a.out.dg.mem = foreign;
    expect_call_refused(call_backward, f.plan, &a, LOGLIN_INVALID_ARGUMENT, "dg: the buffer is of another context");
    clReleaseMemObject(foreign);
    clReleaseContext(context);
    close_calls(&f);
}

Test(plan, packed_problems_need_their_bounds) {
    static const size_t lengths[] = {10, 20};
    const support_case c = {.lengths = lengths, .sequences = 2};
    support_data *data = support_data_make(&c);
    const loglin_problem problem = support_problem(data, LOGLIN_FORWARD);
    loglin_plan *plan = make_plan(&problem);
    arguments a = {.in = {.q = exact_buffer(4 * data->n_k),
                          .k = exact_buffer(4 * data->n_k),
                          .v = exact_buffer(4 * data->n_v),
                          .level_scales = exact_buffer(4 * data->n_levels)},
                   .o = exact_buffer(4 * data->n_v),
                   .workspace = exact_buffer(loglin_workspace_size(plan, LOGLIN_FORWARD))};
    cl_command_queue queue = support_open()->queue;
    cr_expect_eq(loglin_forward(plan, &a.in, NULL, a.o, NULL, a.workspace, queue, 0, NULL, NULL),
                 LOGLIN_INVALID_ARGUMENT);
    cr_expect(strstr(loglin_last_error(), "cu_seqlens") != NULL, "%s", loglin_last_error());
    a.in.cu_seqlens = exact_buffer(2 * sizeof(int32_t));
    cr_expect_eq(loglin_forward(plan, &a.in, NULL, a.o, NULL, a.workspace, queue, 0, NULL, NULL),
                 LOGLIN_BUFFER_TOO_SMALL);
    cr_expect(strstr(loglin_last_error(), "cu_seqlens") != NULL, "%s", loglin_last_error());
    const loglin_buffer *all = (const loglin_buffer *)&a;
    for (size_t i = 0; i < sizeof a / sizeof *all; i++) {
        if (all[i].mem != NULL) {
            clReleaseMemObject(all[i].mem);
        }
    }
    loglin_plan_destroy(plan);
    support_data_free(data);
}
