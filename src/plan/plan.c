/* SPDX-License-Identifier: Apache-2.0 */
/* Plans: a validated problem, the engine that runs it, and the checks of every call. */
#include "plan/plan.h"
#include "engine/engine.h"
#include "engine/step.h"
#include "plan/problem.h"
#include "plan/tuning.h"
#include "runtime/device.h"
#include "runtime/status.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct loglin_plan {
    loglin_device *device;
    loglin_problem problem; /* filled in */
    bool chunk_given;
    const loglin_engine_class *engine;
    char engine_reason[256];    /* why this engine */
    char chunk_reason[256];     /* why this chunk size, and with it the other tunables */
    loglin_engine_state *state; /* forward and backward; NULL if only steps are planned */
    loglin_stepper *stepper;    /* NULL if no steps are planned */
};

/* ---- Creation ---------------------------------------------------------------------------------------------------- */

static bool plans(const loglin_plan *plan, unsigned phases) {
    return (plan->problem.phases & phases) != 0;
}

/* Bytes; of a plan that is not for steps alone. */
static size_t workspace_of(const loglin_plan *plan, loglin_phase phase) {
    return plan->engine->workspace_size(plan->state, phase);
}

static loglin_status check_allocation(const loglin_plan *plan, loglin_phase phase) {
    const size_t size = plans(plan, phase) ? workspace_of(plan, phase) : 0;
    if (size > plan->device->info.max_allocation) {
        return loglin_fail(LOGLIN_UNSUPPORTED,
                           "workspace: the %s call needs %zu bytes, expected at most the device's largest allocation "
                           "of %llu bytes",
                           phase == LOGLIN_BACKWARD ? "backward" : "forward", size,
                           (unsigned long long)plan->device->info.max_allocation);
    }
    return LOGLIN_OK;
}

/* What a plan is made from: given values, or (knowledge) what is known about the device. */
typedef struct wish {
    const loglin_configuration *configuration; /* NULL: to be looked up */
    loglin_knowledge knowledge;
} wish;

/* The engine's values: as given, as asked, or as known to be good. */
static loglin_configuration choose_values(loglin_plan *plan, const wish *from, loglin_engine engine) {
    if (from->configuration != NULL) {
        plan->problem.chunk = from->configuration->values[LOGLIN_TUNABLE_CHUNK];
        return *from->configuration;
    }
    const loglin_choice choice = loglin_knowledge_choose(&from->knowledge, &plan->problem, engine);
    if (!plan->chunk_given) {
        plan->problem.chunk = choice.configuration.values[LOGLIN_TUNABLE_CHUNK];
    }
    (void)snprintf(plan->chunk_reason, sizeof plan->chunk_reason, "%s", plan->chunk_given ? "as asked" : choice.where);
    return choice.configuration;
}

/* The engine and its state are the plan's then, unless its workspace is too large. */
static loglin_status create_state(loglin_plan *plan, const loglin_engine_class *engine,
                                  const loglin_configuration *configuration) {
    RETURN_IF_ERROR(engine->create(plan->device, &plan->problem, configuration, &plan->state));
    plan->engine = engine;
    loglin_status status = check_allocation(plan, LOGLIN_FORWARD);
    if (status == LOGLIN_OK) {
        status = check_allocation(plan, LOGLIN_BACKWARD);
    }
    if (status != LOGLIN_OK) {
        engine->destroy(plan->state);
        plan->state = NULL;
    }
    return status;
}

/* What keeps an engine from the plan, "" if nothing does: then it is the plan's. */
static loglin_status try_engine(loglin_plan *plan, const loglin_engine_class *engine,
                                const loglin_configuration *configuration, char *refusal, size_t capacity) {
    const char *reason = engine->refuses(plan->device, &plan->problem);
    loglin_status status = reason == NULL ? LOGLIN_OK : LOGLIN_UNSUPPORTED;
    if (status == LOGLIN_OK) {
        status = create_state(plan, engine, configuration);
        reason = status == LOGLIN_OK ? "" : loglin_last_error();
    }
    (void)snprintf(refusal, capacity, "%s", reason);
    return status;
}

static const struct {
    loglin_engine choice;
    const loglin_engine_class *engine;
} engines[] = {{LOGLIN_ENGINE_FUSED, &loglin_nvidia_engine},
               {LOGLIN_ENGINE_FUSED, &loglin_nvidia_delta_engine},
               {LOGLIN_ENGINE_FUSED, &loglin_cpu_engine},
               {LOGLIN_ENGINE_FUSED, &loglin_gpu_engine},
               {LOGLIN_ENGINE_BLAS, &loglin_blas_engine}};

enum { ENGINE_COUNT = sizeof engines / sizeof engines[0] };

/* The engine that is known to be the fastest, LOGLIN_ENGINE_AUTO if none is. */
static loglin_engine find_favourite(loglin_plan *plan, const wish *from) {
    if (plan->problem.engine != LOGLIN_ENGINE_AUTO || from->configuration != NULL) {
        (void)snprintf(plan->engine_reason, sizeof plan->engine_reason, "as asked");
        return plan->problem.engine;
    }
    const loglin_choice choice = loglin_knowledge_choose(&from->knowledge, &plan->problem, LOGLIN_ENGINE_AUTO);
    (void)snprintf(plan->engine_reason, sizeof plan->engine_reason, "%s", choice.where);
    return choice.configuration.engine;
}

/* The first engine that takes the problem, of those asked for; the favourite before the others. */
static loglin_status choose_engine(loglin_plan *plan, const wish *from) {
    const loglin_engine asked = plan->problem.engine, favourite = find_favourite(plan, from);
    loglin_engine first_refused = LOGLIN_ENGINE_AUTO;
    loglin_status status = LOGLIN_UNSUPPORTED;
    char refusals[1024] = "";
    for (size_t i = 0; i < 2 * (size_t)ENGINE_COUNT; i++) {
        const size_t at = i % ENGINE_COUNT, used = strlen(refusals);
        if ((engines[at].choice == favourite) != (i < ENGINE_COUNT) ||
            (asked != LOGLIN_ENGINE_AUTO && asked != engines[at].choice)) {
            continue;
        }
        const loglin_configuration configuration = choose_values(plan, from, engines[at].choice);
        char refusal[512];
        status = try_engine(plan, engines[at].engine, &configuration, refusal, sizeof refusal);
        if (status == LOGLIN_OK) {
            if (used > 0 && first_refused != engines[at].choice) {
                (void)snprintf(plan->engine_reason, sizeof plan->engine_reason, "not %.*s",
                               (int)sizeof plan->engine_reason - 8, refusals);
            }
            return LOGLIN_OK;
        }
        first_refused = used == 0 ? engines[at].choice : first_refused;
        (void)snprintf(refusals + used, sizeof refusals - used, "%s%s: %s", used > 0 ? "; " : "",
                       engines[at].engine->name, refusal);
        if (status != LOGLIN_UNSUPPORTED && status != LOGLIN_BUILD_FAILED) {
            break;
        }
    }
    return loglin_fail(
        status, "%s%s",
        asked == LOGLIN_ENGINE_FUSED ? "problem.engine is fused, which does not take this problem: " : "", refusals);
}

static loglin_status create_parts(loglin_plan *plan, const wish *from) {
    if (plans(plan, LOGLIN_FORWARD | LOGLIN_BACKWARD)) {
        RETURN_IF_ERROR(choose_engine(plan, from));
    }
    if (plans(plan, LOGLIN_STEP)) {
        RETURN_IF_ERROR(loglin_stepper_create(plan->device, &plan->problem, &plan->stepper));
    }
    return LOGLIN_OK;
}

static loglin_status create_plan(loglin_device *device, const loglin_problem *problem,
                                 const loglin_configuration *configuration, loglin_plan **plan) {
    if (device == NULL || plan == NULL) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "%s is NULL", device == NULL ? "device" : "plan");
    }
    *plan = NULL;
    loglin_problem filled;
    RETURN_IF_ERROR(loglin_problem_validate(problem, &filled));
    loglin_plan *made = calloc(1, sizeof *made);
    if (made == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "plan: out of host memory");
    }
    loglin_device_retain(device);
    made->device = device;
    made->problem = filled;
    made->chunk_given = filled.chunk != 0;
    wish from = {.configuration = configuration};
    if (configuration == NULL) {
        loglin_knowledge_gather(device->cache_directory, &device->info, &from.knowledge);
    } else {
        made->problem.engine = configuration->engine;
    }
    const loglin_status status = create_parts(made, &from);
    loglin_knowledge_free(&from.knowledge);
    if (status != LOGLIN_OK) {
        loglin_plan_destroy(made);
        return status;
    }
    *plan = made;
    return LOGLIN_OK;
}

loglin_status loglin_plan_create(loglin_device *device, const loglin_problem *problem, loglin_plan **plan) {
    return create_plan(device, problem, NULL, plan);
}

loglin_status loglin_plan_create_configured(loglin_device *device, const loglin_problem *problem,
                                            const loglin_configuration *configuration, loglin_plan **plan) {
    return create_plan(device, problem, configuration, plan);
}

void loglin_plan_destroy(loglin_plan *plan) {
    if (plan == NULL) {
        return;
    }
    if (plan->state != NULL) {
        plan->engine->destroy(plan->state);
    }
    loglin_stepper_destroy(plan->stepper);
    loglin_device_release(plan->device);
    free(plan);
}

/* ---- What a plan can tell ---------------------------------------------------------------------------------------- */

/* False, with the error's text, for NULL. */
static bool is_given(const loglin_plan *plan) {
    if (plan == NULL) {
        (void)loglin_fail(LOGLIN_INVALID_ARGUMENT, "plan is NULL");
    }
    return plan != NULL;
}

size_t loglin_plan_describe(const loglin_plan *plan, char *text, size_t capacity) {
    static const char *const dtypes[] = {"f32", "f16", "bf16"};
    capacity = text != NULL ? capacity : 0;
    if (!is_given(plan)) {
        return (size_t)snprintf(text, capacity, "%s", "");
    }
    const loglin_problem *p = &plan->problem;
    char calls[768] = "";
    if (plan->state != NULL) {
        (void)snprintf(calls, sizeof calls, ", engine %s (%s), chunk %zu (%s), workspace %zu bytes forward",
                       plan->engine->name, plan->engine_reason, p->chunk, plan->chunk_reason,
                       workspace_of(plan, LOGLIN_FORWARD));
        const size_t used = strlen(calls);
        if (plans(plan, LOGLIN_BACKWARD)) {
            const char *remark =
                plan->engine->backward_remark == NULL ? NULL : plan->engine->backward_remark(plan->state);
            (void)snprintf(calls + used, sizeof calls - used, ", %zu backward%s%s%s",
                           workspace_of(plan, LOGLIN_BACKWARD), remark == NULL ? "" : " (",
                           remark == NULL ? "" : remark, remark == NULL ? "" : ")");
        }
    }
    const int length =
        snprintf(text, capacity, "%s, %s partition, %s, %zu heads in %zu groups, K %zu, V %zu%s%s on %s",
                 p->op == LOGLIN_GATED_DELTA ? "gated delta rule" : "scalar-gated",
                 p->partition == LOGLIN_STRONG ? "strong" : "weak", dtypes[p->dtype], p->heads, p->groups, p->dim_k,
                 p->dim_v, calls, plan->stepper != NULL ? ", steps" : "", plan->device->info.name);
    return length > 0 ? (size_t)length : 0;
}

size_t loglin_workspace_size(const loglin_plan *plan, loglin_phase phase) {
    if (!is_given(plan)) {
        return 0;
    }
    const bool is_one = phase == LOGLIN_FORWARD || phase == LOGLIN_BACKWARD || phase == LOGLIN_STEP;
    if (!is_one || !plans(plan, phase)) {
        (void)loglin_fail(LOGLIN_INVALID_ARGUMENT, "phase is 0x%x, expected one of those planned, 0x%x",
                          (unsigned)phase, plan->problem.phases);
        return 0;
    }
    return phase == LOGLIN_STEP ? 0 : workspace_of(plan, phase);
}

size_t loglin_state_size(const loglin_plan *plan) {
    return is_given(plan) ? loglin_problem_counts(&plan->problem, 0).states * sizeof(float) : 0;
}

/* ---- Checks of a call -------------------------------------------------------------------------------------------- */

/* A buffer of a call: what it is called, where, how many elements of how many bytes, and whether it must be there. */
typedef struct checked_buffer {
    const char *name;
    loglin_buffer buffer;
    size_t count, size;
    bool required;
} checked_buffer;

static loglin_status check_buffers(const loglin_plan *plan, const checked_buffer *buffers, size_t count) {
    for (size_t i = 0; i < count; i++) {
        RETURN_IF_ERROR(loglin_buffer_check(plan->device->context, buffers[i].name, buffers[i].buffer, buffers[i].count,
                                            buffers[i].size, buffers[i].required));
    }
    return LOGLIN_OK;
}

#define CHECK_BUFFERS(plan, ...)                                                                                       \
    check_buffers(plan, (const checked_buffer[]){__VA_ARGS__},                                                         \
                  sizeof((const checked_buffer[]){__VA_ARGS__}) / sizeof(checked_buffer))

/* An event of another context may be taken by a driver that then does not wait for it. */
static loglin_status check_wait(const loglin_plan *plan, cl_uint num_wait, const cl_event *wait) {
    if ((num_wait > 0) != (wait != NULL)) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "wait is %s with num_wait %u", wait != NULL ? "given" : "NULL",
                           num_wait);
    }
    for (cl_uint i = 0; i < num_wait; i++) {
        if (wait[i] == NULL) {
            return loglin_fail(LOGLIN_INVALID_ARGUMENT, "wait[%u] is NULL, expected an event", i);
        }
        cl_context context = NULL;
        RETURN_IF_CL_ERROR(clGetEventInfo(wait[i], CL_EVENT_CONTEXT, sizeof(cl_context), &context, NULL));
        if (context != plan->device->context) {
            return loglin_fail(LOGLIN_INVALID_ARGUMENT, "wait[%u] is of another context than the loglin_device", i);
        }
    }
    return LOGLIN_OK;
}

static loglin_status check_call(const loglin_plan *plan, loglin_phase phase, const void *in, cl_command_queue queue,
                                cl_uint num_wait, const cl_event *wait) {
    if (plan == NULL || in == NULL || queue == NULL) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "%s is NULL", plan == NULL ? "plan" : in == NULL ? "in" : "queue");
    }
    if (!plans(plan, phase)) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "problem.phases is 0x%x, expected 0x%x in it for this call",
                           plan->problem.phases, (unsigned)phase);
    }
    RETURN_IF_ERROR(check_wait(plan, num_wait, wait));
    return loglin_device_check_queue(plan->device, queue);
}

static loglin_status check_inputs(const loglin_plan *plan, const loglin_inputs *in, bool one_token) {
    const loglin_problem *p = &plan->problem;
    const loglin_counts n = loglin_problem_counts(p, one_token);
    const size_t size = loglin_dtype_size(p->dtype), weight = loglin_dtype_size(p->weight_dtype);
    const bool delta = p->op == LOGLIN_GATED_DELTA, packed = p->sequences > 0 && !one_token;
    if (!delta && in->beta.mem != NULL) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "beta is given, expected none for the scalar-gated operator");
    }
    if (!packed && in->cu_seqlens.mem != NULL) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "cu_seqlens is given, expected none: %s",
                           one_token ? "a step takes one token of every sequence" : "problem.sequences is 0");
    }
    return CHECK_BUFFERS(plan, {"q", in->q, n.qk, size, true}, {"k", in->k, n.qk, size, true},
                         {"v", in->v, n.vo, size, true}, {"g", in->g, n.gates, sizeof(float), false},
                         {"level_scales", in->level_scales, n.level_scales, weight, true},
                         {"beta", in->beta, n.gates, weight, delta},
                         {"cu_seqlens", in->cu_seqlens, n.sequences + 1, sizeof(cl_int), packed});
}

static loglin_status check_state(const loglin_plan *plan, const char *name, const loglin_state *state,
                                 bool needs_position) {
    const loglin_problem *p = &plan->problem;
    const loglin_counts n = loglin_problem_counts(p, 0);
    char values[64], log_decay[64], position[64];
    (void)snprintf(values, sizeof values, "%s.values", name);
    (void)snprintf(log_decay, sizeof log_decay, "%s.log_decay", name);
    (void)snprintf(position, sizeof position, "%s.position", name);
    if (p->op == LOGLIN_GATED_DELTA && state->log_decay.mem != NULL) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "%s is given, expected none for the delta rule", log_decay);
    }
    return CHECK_BUFFERS(plan, {values, state->values, n.states, sizeof(float), true},
                         {log_decay, state->log_decay, n.sequences * p->heads * p->levels, sizeof(float), false},
                         {position, state->position, n.sequences, sizeof(cl_int), needs_position});
}

/* Checks the initial states, and puts them into the call. */
static loglin_status take_initial(const loglin_plan *plan, const loglin_state *initial, loglin_call *call) {
    if (initial == NULL) {
        return LOGLIN_OK;
    }
    if (plan->problem.max_position == 0) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT,
                           "initial is given, expected NULL: problem.max_position is 0, so no sequence has a past");
    }
    call->initial = *initial;
    return check_state(plan, "initial", initial, true);
}

static loglin_status check_workspace(const loglin_plan *plan, loglin_phase phase, loglin_buffer workspace) {
    return CHECK_BUFFERS(
        plan, {"workspace", workspace, loglin_workspace_size(plan, phase) / sizeof(float), sizeof(float), true});
}

/* ---- Calls ------------------------------------------------------------------------------------------------------- */

loglin_status loglin_forward(loglin_plan *plan, const loglin_inputs *in, const loglin_state *initial, loglin_buffer o,
                             const loglin_state *final, loglin_buffer workspace, cl_command_queue queue,
                             cl_uint num_wait, const cl_event *wait, cl_event *event) {
    RETURN_IF_ERROR(check_call(plan, LOGLIN_FORWARD, in, queue, num_wait, wait));
    RETURN_IF_ERROR(check_inputs(plan, in, false));
    loglin_call call = {.in = *in, .o = o, .normalize = plan->problem.normalize_qk != 0};
    RETURN_IF_ERROR(take_initial(plan, initial, &call));
    if (final != NULL) {
        RETURN_IF_ERROR(check_state(plan, "final", final, false));
        call.final = *final;
    }
    const loglin_counts n = loglin_problem_counts(&plan->problem, 0);
    RETURN_IF_ERROR(CHECK_BUFFERS(plan, {"o", o, n.vo, loglin_dtype_size(plan->problem.dtype), true}));
    RETURN_IF_ERROR(check_workspace(plan, LOGLIN_FORWARD, workspace));
    return plan->engine->forward(plan->state, &call, workspace, queue, num_wait, wait, event);
}

static loglin_status check_gradients(const loglin_plan *plan, const loglin_gradients *out, bool has_initial) {
    const loglin_problem *p = &plan->problem;
    const loglin_counts n = loglin_problem_counts(p, 0);
    const size_t size = loglin_dtype_size(p->dtype), weight = loglin_dtype_size(p->weight_dtype);
    if (p->op != LOGLIN_GATED_DELTA && out->dbeta.mem != NULL) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "dbeta is given, expected none for the scalar-gated operator");
    }
    if (!has_initial && out->dinitial_states.mem != NULL) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "dinitial_states is given, expected none without initial states");
    }
    return CHECK_BUFFERS(plan, {"dq", out->dq, n.qk, size, true}, {"dk", out->dk, n.qk, size, true},
                         {"dv", out->dv, n.vo, size, true}, {"dg", out->dg, n.gates, sizeof(float), false},
                         {"dlevel_scales", out->dlevel_scales, n.level_scales, weight, false},
                         {"dbeta", out->dbeta, n.gates, weight, false},
                         {"dinitial_states", out->dinitial_states, n.states, sizeof(float), false});
}

loglin_status loglin_backward(loglin_plan *plan, const loglin_inputs *in, const loglin_state *initial,
                              loglin_buffer d_o, loglin_buffer dfinal_states, const loglin_gradients *out,
                              loglin_buffer workspace, cl_command_queue queue, cl_uint num_wait, const cl_event *wait,
                              cl_event *event) {
    RETURN_IF_ERROR(check_call(plan, LOGLIN_BACKWARD, in, queue, num_wait, wait));
    RETURN_IF_ERROR(check_inputs(plan, in, false));
    if (out == NULL) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "out is NULL");
    }
    loglin_call call = {.in = *in,
                        .d_o = d_o,
                        .dfinal_states = dfinal_states,
                        .out = *out,
                        .normalize = plan->problem.normalize_qk != 0};
    RETURN_IF_ERROR(take_initial(plan, initial, &call));
    const loglin_counts n = loglin_problem_counts(&plan->problem, 0);
    RETURN_IF_ERROR(CHECK_BUFFERS(plan, {"d_o", d_o, n.vo, loglin_dtype_size(plan->problem.dtype), true},
                                  {"dfinal_states", dfinal_states, n.states, sizeof(float), false}));
    RETURN_IF_ERROR(check_gradients(plan, out, initial != NULL));
    RETURN_IF_ERROR(check_workspace(plan, LOGLIN_BACKWARD, workspace));
    return plan->engine->backward(plan->state, &call, workspace, queue, num_wait, wait, event);
}

loglin_status loglin_step(loglin_plan *plan, const loglin_inputs *in, const loglin_state *state, loglin_buffer o,
                          cl_command_queue queue, cl_uint num_wait, const cl_event *wait, cl_event *event) {
    RETURN_IF_ERROR(check_call(plan, LOGLIN_STEP, in, queue, num_wait, wait));
    RETURN_IF_ERROR(check_inputs(plan, in, true));
    if (state == NULL) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "state is NULL");
    }
    RETURN_IF_ERROR(check_state(plan, "state", state, true));
    const loglin_counts n = loglin_problem_counts(&plan->problem, 1);
    RETURN_IF_ERROR(CHECK_BUFFERS(plan, {"o", o, n.vo, loglin_dtype_size(plan->problem.dtype), true}));
    return loglin_stepper_enqueue(plan->stepper, in, state, o, queue, num_wait, wait, event);
}
