/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The delta rule on NVIDIA's matrix units: the forward pass in two launches, see cl/nvidia_delta.cl.  The backward pass is
 * the blas engine's.
 */
#include "engine/engine.h"
#include "engine/nvidia.h"
#include "plan/problem.h"
#include "runtime/device.h"
#include "runtime/program.h"
#include "runtime/status.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../cl/nvidia_delta_layout.cl"

/* Local memory of a work-group, in bytes: the chip's, less what the driver keeps. */
static const size_t local_limit = 227 * (size_t)1024;

typedef enum delta_kernel { KERNEL_PREPARE, KERNEL_WALK, KERNEL_FINAL, KERNEL_COUNT } delta_kernel;

struct loglin_engine_state {
    cl_kernel kernels[KERNEL_COUNT];
    loglin_delta_call call;
    size_t items[KERNEL_COUNT];    /* of each launch */
    size_t group[KERNEL_COUNT];    /* of each work-group */
    size_t workspace;              /* bytes */
    loglin_engine_state *backward; /* the blas engine's, or NULL */
};

/* A launch goes behind the one before it. */
typedef struct delta_run {
    const loglin_engine_state *state;
    loglin_buffer workspace;
    cl_command_queue queue;
    bool in_order;
    cl_uint num_wait; /* for the first launch */
    const cl_event *wait;
} delta_run;

static size_t ceil_div(size_t a, size_t b) {
    return (a + b - 1) / b;
}

/* ---- Sizes ------------------------------------------------------------------------------------------------------- */

/* Levels between chunks: those that a chunk's number has a bit for. */
static size_t count_states(const loglin_problem *problem) {
    const size_t chunks = ceil_div(problem->length, ND_CHUNK);
    const size_t levels = loglin_num_levels(chunks) - 1;
    return levels > 0 ? levels : 1;
}

/* Floats of the weights and the decay of a chunk's rows. */
static size_t count_rows(const loglin_problem *problem) {
    return ND_CHUNK * count_states(problem) + 4;
}

/* Local memory that a work-group needs to walk with `columns` columns of V. */
static size_t walk_bytes(const loglin_problem *problem, size_t columns) {
    const size_t state = problem->dim_k * columns * 2 * 2, update = (size_t)ND_CHUNK * columns * 2;
    const size_t values = ND_CHUNK * (columns + 8) * 2, rows = count_rows(problem) * sizeof(float);
    return count_states(problem) * (state + update) + 2 * (values + rows);
}

/* Columns of V to a work-group: as many as its states leave room for; 0 if they never fit. */
static size_t count_columns(const loglin_problem *problem) {
    for (size_t columns = problem->dim_v > 16 ? 32 : 16; columns >= 16; columns -= 16) {
        if (walk_bytes(problem, columns) <= local_limit) {
            return columns;
        }
    }
    return 0;
}

/* ---- Which problems ---------------------------------------------------------------------------------------------- */

static const char *refuses(const loglin_device *device, const loglin_problem *problem) {
    if (strstr(device->info.vendor, "NVIDIA") == NULL) {
        return "the device is not NVIDIA's";
    }
    if (problem->op != LOGLIN_GATED_DELTA || problem->partition != LOGLIN_WEAK) {
        return "it has the delta rule with the weak partition only";
    }
    if (problem->dtype == LOGLIN_F32) {
        return "it takes 16-bit storage only";
    }
    if (problem->sequences > 0 || problem->max_position > 0) {
        return "it takes neither packed sequences nor initial states";
    }
    if (problem->dim_k % 16 != 0 || problem->dim_v % 16 != 0 || problem->dim_k > 256) {
        return "it takes dim_k and dim_v that are multiples of 16, dim_k up to 256";
    }
    if (problem->chunk != ND_CHUNK) {
        return "its chunk is 64";
    }
    if (count_columns(problem) == 0) {
        return "the level states of so long a sequence do not fit in local memory";
    }
    return NULL;
}

/* ---- Creation ---------------------------------------------------------------------------------------------------- */

static unsigned long reserve(size_t *end, size_t bytes) {
    const size_t at = *end;
    *end += ceil_div(bytes, 128) * 128;
    return at;
}

static void lay_out(const loglin_problem *problem, loglin_engine_state *state) {
    const size_t chunks = ceil_div(problem->length, ND_CHUNK), matrices = problem->batch * problem->heads;
    const size_t map_bytes = (3 * (size_t)ND_CHUNK * problem->dim_k + (size_t)10 * 256) * 2;
    size_t end = 0;
    state->call = (loglin_delta_call){
        .maps = reserve(&end, matrices * chunks * map_bytes),
        .rows = reserve(&end, matrices * chunks * count_rows(problem) * sizeof(float)),
        .batch = (unsigned)problem->batch,
        .length = (unsigned)problem->length,
        .chunks = (unsigned)chunks,
        .scale = problem->scale,
    };
    state->workspace = end + 16; /* its start is rounded up */
    state->group[KERNEL_PREPARE] = state->group[KERNEL_FINAL] = ND_PREPARE_ITEMS;
    state->group[KERNEL_WALK] = ND_WALK_ITEMS;
    state->items[KERNEL_PREPARE] = matrices * chunks * ND_PREPARE_ITEMS;
    state->items[KERNEL_WALK] = matrices * ceil_div(problem->dim_v, count_columns(problem)) * ND_WALK_ITEMS;
    state->items[KERNEL_FINAL] = matrices * problem->dim_k * ND_PREPARE_ITEMS;
}

static loglin_status create_kernels(loglin_device *device, const loglin_problem *problem, loglin_engine_state *state) {
    static const char *const names[KERNEL_COUNT] = {"nvidia_delta_prepare", "nvidia_delta_walk", "nvidia_delta_final"};
    static const char *const files[] = {"common.cl", "mma_nvidia.cl", "nvidia_delta_layout.cl", "nvidia_delta.cl",
                                        NULL};
    char options[400]; /* 10 numbers of at most 20 digits and their names */
    (void)snprintf(options, sizeof options,
                   "-DDIM_K=%zu -DDIM_V=%zu -DHEADS=%zu -DGROUPS=%zu -DLEVELS=%zu -DSTATES=%zu -DNORMALIZE=%d"
                   " -DSTORAGE=%d -DWEIGHT_STORAGE=%d -DND_V=%zu",
                   problem->dim_k, problem->dim_v, problem->heads, problem->groups, problem->levels,
                   count_states(problem), problem->normalize_qk != 0, (int)problem->dtype, (int)problem->weight_dtype,
                   count_columns(problem));
    return loglin_kernels_get(device, files, options, names, KERNEL_COUNT, state->kernels);
}

static void destroy(loglin_engine_state *state) {
    if (state == NULL) {
        return;
    }
    for (int i = 0; i < KERNEL_COUNT; i++) {
        if (state->kernels[i] != NULL) {
            clReleaseKernel(state->kernels[i]);
        }
    }
    loglin_blas_engine.destroy(state->backward);
    free(state);
}

static loglin_status prepare(loglin_device *device, const loglin_problem *problem,
                             const loglin_configuration *configuration, loglin_engine_state *state) {
    RETURN_IF_ERROR(loglin_nvidia_probe(device, problem->dtype, walk_bytes(problem, count_columns(problem))));
    lay_out(problem, state);
    RETURN_IF_ERROR(create_kernels(device, problem, state));
    if ((problem->phases & LOGLIN_BACKWARD) != 0) {
        return loglin_blas_engine.create(device, problem, configuration, &state->backward);
    }
    return LOGLIN_OK;
}

static loglin_status create(loglin_device *device, const loglin_problem *problem,
                            const loglin_configuration *configuration, loglin_engine_state **state) {
    loglin_engine_state *made = calloc(1, sizeof *made);
    if (made == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "NVIDIA delta engine: out of host memory");
    }
    const loglin_status status = prepare(device, problem, configuration, made);
    if (status != LOGLIN_OK) {
        destroy(made);
        return status;
    }
    *state = made;
    return LOGLIN_OK;
}

static const char *backward_remark(const loglin_engine_state *state) {
    return state->backward == NULL ? NULL : "by the blas engine: only the forward pass is fused";
}

static size_t workspace_size(const loglin_engine_state *state, loglin_phase phase) {
    if (phase == LOGLIN_FORWARD) {
        return state->workspace;
    }
    return state->backward != NULL ? loglin_blas_engine.workspace_size(state->backward, phase) : 0;
}

/* ---- Execution --------------------------------------------------------------------------------------------------- */

/* Sets the call, the workspace, and the caller's buffers as memory object and element offset; `count` is what came. */
static cl_int set_common(const delta_run *run, cl_kernel kernel, const loglin_buffer *buffers, size_t num_buffers,
                         cl_uint *count) {
    cl_int code = clSetKernelArg(kernel, (*count)++, sizeof run->state->call, &run->state->call);
    if (code == CL_SUCCESS) {
        code = clSetKernelArg(kernel, (*count)++, sizeof(cl_mem), &run->workspace.mem);
    }
    cl_ulong offset = run->workspace.offset;
    if (code == CL_SUCCESS) {
        code = clSetKernelArg(kernel, (*count)++, sizeof offset, &offset);
    }
    for (size_t i = 0; code == CL_SUCCESS && i < num_buffers; i++) {
        offset = buffers[i].offset;
        code = clSetKernelArg(kernel, (*count)++, sizeof(cl_mem), buffers[i].mem != NULL ? &buffers[i].mem : NULL);
        if (code == CL_SUCCESS) {
            code = clSetKernelArg(kernel, (*count)++, sizeof offset, &offset);
        }
    }
    return code;
}

/* aligned: a last argument, NULL for none. */
static loglin_status launch(delta_run *run, delta_kernel id, const loglin_buffer *buffers, size_t num_buffers,
                            const cl_uint *aligned, cl_event *event) {
    cl_kernel kernel = run->state->kernels[id];
    cl_uint count = 0;
    cl_int code = set_common(run, kernel, buffers, num_buffers, &count);
    if (code == CL_SUCCESS && aligned != NULL) {
        code = clSetKernelArg(kernel, count, sizeof *aligned, aligned);
    }
    if (code == CL_SUCCESS && !run->in_order && run->num_wait == 0) {
        code = clEnqueueBarrierWithWaitList(run->queue, 0, NULL, NULL);
    }
    if (code == CL_SUCCESS) {
        code = clEnqueueNDRangeKernel(run->queue, kernel, 1, NULL, &run->state->items[id], &run->state->group[id],
                                      run->num_wait, run->num_wait > 0 ? run->wait : NULL, event);
    }
    run->num_wait = 0;
    return code == CL_SUCCESS ? LOGLIN_OK
                              : loglin_fail(code, "NVIDIA delta engine, kernel %d: %s", (int)id, loglin_strerror(code));
}

/* Can its rows be moved 16 bytes at a time? */
static bool is_aligned(loglin_buffer buffer) {
    return buffer.offset % 8 == 0;
}

static loglin_status enqueue(delta_run *run, const loglin_call *call, cl_event *event) {
    const cl_uint keys_aligned = is_aligned(call->in.q) && is_aligned(call->in.k);
    const cl_uint values_aligned = is_aligned(call->in.v) && is_aligned(call->o);
    const bool has_final = call->final.values.mem != NULL;
    const loglin_buffer prepare_buffers[] = {call->in.q, call->in.k, call->in.g, call->in.level_scales, call->in.beta};
    RETURN_IF_ERROR(launch(run, KERNEL_PREPARE, prepare_buffers, 5, &keys_aligned, NULL));
    const loglin_buffer walk_buffers[] = {call->in.v, call->o, call->final.values};
    RETURN_IF_ERROR(launch(run, KERNEL_WALK, walk_buffers, 3, &values_aligned, has_final ? NULL : event));
    if (!has_final) {
        return LOGLIN_OK;
    }
    const loglin_buffer final_buffers[] = {call->in.v, call->final.values, call->final.log_decay, call->final.position};
    return launch(run, KERNEL_FINAL, final_buffers, 4, NULL, event);
}

static loglin_status forward(loglin_engine_state *state, const loglin_call *call, loglin_buffer workspace,
                             cl_command_queue queue, cl_uint num_wait, const cl_event *wait, cl_event *event) {
    cl_command_queue_properties properties = 0;
    RETURN_IF_CL_ERROR(clGetCommandQueueInfo(queue, CL_QUEUE_PROPERTIES, sizeof properties, &properties, NULL));
    delta_run run = {
        .state = state,
        .workspace = workspace,
        .queue = queue,
        .in_order = (properties & CL_QUEUE_OUT_OF_ORDER_EXEC_MODE_ENABLE) == 0,
        .num_wait = num_wait,
        .wait = wait,
    };
    return enqueue(&run, call, event);
}

static loglin_status backward(loglin_engine_state *state, const loglin_call *call, loglin_buffer workspace,
                              cl_command_queue queue, cl_uint num_wait, const cl_event *wait, cl_event *event) {
    return loglin_blas_engine.backward(state->backward, call, workspace, queue, num_wait, wait, event);
}

const loglin_engine_class loglin_nvidia_delta_engine = {
    .name = "fused (nvidia)",
    .refuses = refuses,
    .create = create,
    .destroy = destroy,
    .backward_remark = backward_remark,
    .workspace_size = workspace_size,
    .forward = forward,
    .backward = backward,
};
