/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The engine for NVIDIA's matrix units: the scalar-gated forward pass in four launches, see cl/nvidia_mamba2.cl.  The
 * backward pass is nvidia_backward.c's, and the blas engine's where that does not do.
 */
#include "engine/nvidia.h"

#include "engine/engine.h"
#include "engine/nvidia_backward.h"
#include "plan/problem.h"
#include "runtime/device.h"
#include "runtime/program.h"
#include "runtime/status.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The tree keeps a number for every segment in local memory. */
static const size_t max_segments = 8192;

typedef enum nvidia_kernel {
    KERNEL_PREPARE,
    KERNEL_SEGMENTS,
    KERNEL_TREE,
    KERNEL_WALK,
    KERNEL_FINAL,
    KERNEL_COUNT
} nvidia_kernel;

struct loglin_engine_state {
    cl_kernel kernels[KERNEL_COUNT];
    loglin_nvidia_call call;
    size_t items[KERNEL_COUNT];       /* of each launch */
    size_t workspace;                 /* bytes */
    loglin_nvidia_backward *backward; /* or NULL */
    loglin_engine_state *blas;        /* for other backward passes, or NULL */
};

/* A launch goes behind the one before it. */
typedef struct nvidia_run {
    const loglin_engine_state *state;
    loglin_buffer workspace;
    cl_command_queue queue;
    bool in_order;
    cl_uint num_wait; /* for the first launch */
    const cl_event *wait;
} nvidia_run;

static size_t ceil_div(size_t a, size_t b) {
    return (a + b - 1) / b;
}

/* dim_k as the tiles hold it. */
static size_t padded_k(const loglin_problem *problem) {
    return ceil_div(problem->dim_k, 32) * 32;
}

static size_t state_bytes(const loglin_problem *problem) {
    return padded_k(problem) * NV_TILE_V * 2;
}

/* Blocks of segments in local memory: worth it where most segments have some before them. */
static size_t cached_blocks(const loglin_problem *problem) {
    return problem->length > (size_t)8 * NV_SEGMENT * NV_CHUNK ? 2 : 0;
}

/* ---- Which problems ---------------------------------------------------------------------------------------------- */

static const char *refuses(const loglin_device *device, const loglin_problem *problem) {
    if (strstr(device->info.vendor, "NVIDIA") == NULL) {
        return "the device is not NVIDIA's";
    }
    if (problem->op != LOGLIN_MAMBA2 || problem->partition != LOGLIN_WEAK) {
        return "it has the scalar-gated operator with the weak partition only";
    }
    if (problem->dtype == LOGLIN_F32) {
        return "it takes 16-bit storage only";
    }
    if (problem->sequences > 0 || problem->max_position > 0) {
        return "it takes neither packed sequences nor initial states";
    }
    if (problem->dim_k % 16 != 0 || problem->dim_v % 16 != 0 || problem->dim_k > 256 || problem->dim_v > 256) {
        return "it takes dim_k and dim_v that are multiples of 16 up to 256";
    }
    if (problem->chunk != NV_CHUNK) {
        return "its chunk is 64";
    }
    if (problem->length > max_segments * NV_SEGMENT * NV_CHUNK) {
        return "it takes up to 4194304 tokens";
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
    const size_t chunks = ceil_div(problem->length, NV_CHUNK), segments = ceil_div(chunks, NV_SEGMENT);
    const size_t matrices = problem->batch * problem->heads, tiles = ceil_div(problem->dim_v, NV_TILE_V);
    const size_t records = problem->batch * problem->groups * chunks;
    const size_t record_bytes = (padded_k(problem) / 16 * 8 + 10) * 512, gate_bytes = sizeof(float[2 * NV_CHUNK]);
    size_t end = 0;
    state->call = (loglin_nvidia_call){
        .products = reserve(&end, records * record_bytes),
        .gates = reserve(&end, matrices * chunks * gate_bytes),
        .nodes = reserve(&end, matrices * tiles * segments * state_bytes(problem)),
        .sums = reserve(&end, matrices * segments * sizeof(float)),
        .blocks = reserve(&end, matrices * segments * sizeof(float)),
        .batch = (unsigned)problem->batch,
        .length = (unsigned)problem->length,
        .chunks = (unsigned)chunks,
        .segments = (unsigned)segments,
        .scale = problem->scale,
    };
    state->workspace = end + 16; /* its start is rounded up */
    state->items[KERNEL_PREPARE] = records * NV_ITEMS;
    state->items[KERNEL_SEGMENTS] = matrices * tiles * segments * NV_ITEMS;
    state->items[KERNEL_TREE] = segments > 1 ? matrices * tiles * (state_bytes(problem) / 512) * NV_ITEMS : 0;
    state->items[KERNEL_WALK] = matrices * tiles * segments * NV_ITEMS;
    state->items[KERNEL_FINAL] = matrices * problem->dim_k * NV_ITEMS;
}

/* The largest divisor of `steps` up to `most`. */
static size_t block_of(size_t steps, size_t most) {
    size_t block = most < steps ? most : steps;
    while (steps % block != 0) {
        block--;
    }
    return block;
}

static loglin_status create_kernels(loglin_device *device, const loglin_problem *problem, loglin_engine_state *state) {
    static const char *const names[KERNEL_COUNT] = {"nvidia_prepare", "nvidia_segments", "nvidia_tree", "nvidia_walk",
                                                    "nvidia_final"};
    static const char *const files[] = {"common.cl", "mma_nvidia.cl", "nvidia_layout.cl", "nvidia_mamba2.cl", NULL};
    const size_t steps = padded_k(problem) / 16;
    char options[512]; /* 13 numbers of at most 20 digits and their names */
    (void)snprintf(options, sizeof options,
                   "-DNV_K=%zu -DDIM_K=%zu -DDIM_V=%zu -DHEADS=%zu -DGROUPS=%zu -DLEVELS=%zu -DUSED=%zu -DNORMALIZE=%d"
                   " -DSTORAGE=%d -DWEIGHT_STORAGE=%d -DQ_STEPS=%zu -DU_STEPS=%zu -DNV_CACHED=%zu",
                   padded_k(problem), problem->dim_k, problem->dim_v, problem->heads, problem->groups, problem->levels,
                   loglin_num_levels(problem->length), problem->normalize_qk != 0, (int)problem->dtype,
                   (int)problem->weight_dtype, block_of(steps, 8), block_of(steps / 2, 4), cached_blocks(problem));
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
    loglin_nvidia_backward_destroy(state->backward);
    loglin_blas_engine.destroy(state->blas);
    free(state);
}

static loglin_status prepare(loglin_device *device, const loglin_problem *problem,
                             const loglin_configuration *configuration, loglin_engine_state *state) {
    const size_t columns = loglin_num_levels(problem->length) | 1;
    const size_t walk_bytes =
        (NV_SEGMENT_BITS + cached_blocks(problem)) * state_bytes(problem) +
        (size_t)2 * NV_CHUNK * ((size_t)NV_TILE_V * 2 + columns * sizeof(float) + sizeof(float[2]));
    RETURN_IF_ERROR(loglin_nvidia_probe(device, problem->dtype, walk_bytes));
    lay_out(problem, state);
    RETURN_IF_ERROR(create_kernels(device, problem, state));
    if ((problem->phases & LOGLIN_BACKWARD) == 0) {
        return LOGLIN_OK;
    }
    if (loglin_nvidia_backward_refuses(problem) == NULL) {
        RETURN_IF_ERROR(loglin_nvidia_backward_create(device, problem, &state->backward));
    }
    return loglin_blas_engine.create(device, problem, configuration, &state->blas);
}

static loglin_status create(loglin_device *device, const loglin_problem *problem,
                            const loglin_configuration *configuration, loglin_engine_state **state) {
    loglin_engine_state *made = calloc(1, sizeof *made);
    if (made == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "NVIDIA engine: out of host memory");
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
    if (state->blas == NULL) {
        return NULL;
    }
    return state->backward != NULL ? "by the blas engine where gradients of final states are given"
                                   : "by the blas engine: the fused pass takes dim_k and dim_v up to 128";
}

static size_t workspace_size(const loglin_engine_state *state, loglin_phase phase) {
    if (phase == LOGLIN_FORWARD) {
        return state->workspace;
    }
    const size_t fused = state->backward != NULL ? loglin_nvidia_backward_workspace(state->backward) : 0;
    const size_t blas = state->blas != NULL ? loglin_blas_engine.workspace_size(state->blas, phase) : 0;
    return fused > blas ? fused : blas;
}

/* ---- Execution --------------------------------------------------------------------------------------------------- */

/* Sets the call, the workspace, and the caller's buffers as memory object and element offset; `count` is what came. */
static cl_int set_common(const nvidia_run *run, cl_kernel kernel, const loglin_buffer *buffers, size_t num_buffers,
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

/* extra: a last argument of so many bytes, NULL for local memory; none if the size is 0. */
static loglin_status launch(nvidia_run *run, nvidia_kernel id, const loglin_buffer *buffers, size_t num_buffers,
                            size_t extra_size, const void *extra, cl_event *event) {
    cl_kernel kernel = run->state->kernels[id];
    cl_uint count = 0;
    cl_int code = set_common(run, kernel, buffers, num_buffers, &count);
    if (code == CL_SUCCESS && extra_size > 0) {
        code = clSetKernelArg(kernel, count, extra_size, extra);
    }
    if (code == CL_SUCCESS && !run->in_order && run->num_wait == 0) {
        code = clEnqueueBarrierWithWaitList(run->queue, 0, NULL, NULL);
    }
    if (code == CL_SUCCESS) {
        const size_t group = NV_ITEMS;
        code = clEnqueueNDRangeKernel(run->queue, kernel, 1, NULL, &run->state->items[id], &group, run->num_wait,
                                      run->num_wait > 0 ? run->wait : NULL, event);
    }
    run->num_wait = 0;
    return code == CL_SUCCESS ? LOGLIN_OK
                              : loglin_fail(code, "NVIDIA engine, kernel %d: %s", (int)id, loglin_strerror(code));
}

/* Can its rows be moved 16 bytes at a time? */
static bool is_aligned(loglin_buffer buffer) {
    return buffer.offset % 8 == 0;
}

static loglin_status enqueue(nvidia_run *run, const loglin_call *call, cl_event *event) {
    const loglin_nvidia_call *layout = &run->state->call;
    const cl_uint v_aligned = is_aligned(call->in.v), all_aligned = v_aligned && is_aligned(call->o);
    const bool has_final = call->final.values.mem != NULL;
    const loglin_buffer prepare_buffers[] = {call->in.q, call->in.k};
    RETURN_IF_ERROR(launch(run, KERNEL_PREPARE, prepare_buffers, 2, 0, NULL, NULL));
    const loglin_buffer segments_buffers[] = {call->in.v, call->in.g};
    RETURN_IF_ERROR(launch(run, KERNEL_SEGMENTS, segments_buffers, 2, sizeof v_aligned, &v_aligned, NULL));
    if (layout->segments > 1) {
        RETURN_IF_ERROR(launch(run, KERNEL_TREE, NULL, 0, layout->segments * sizeof(float), NULL, NULL));
    }
    const loglin_buffer walk_buffers[] = {call->in.v, call->in.level_scales, call->o};
    RETURN_IF_ERROR(
        launch(run, KERNEL_WALK, walk_buffers, 3, sizeof all_aligned, &all_aligned, has_final ? NULL : event));
    if (!has_final) {
        return LOGLIN_OK;
    }
    const loglin_buffer final_buffers[] = {call->in.v, call->final.values, call->final.log_decay, call->final.position};
    return launch(run, KERNEL_FINAL, final_buffers, 4, 0, NULL, event);
}

static loglin_status forward(loglin_engine_state *state, const loglin_call *call, loglin_buffer workspace,
                             cl_command_queue queue, cl_uint num_wait, const cl_event *wait, cl_event *event) {
    cl_command_queue_properties properties = 0;
    RETURN_IF_CL_ERROR(clGetCommandQueueInfo(queue, CL_QUEUE_PROPERTIES, sizeof properties, &properties, NULL));
    nvidia_run run = {
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
    if (state->backward != NULL && call->dfinal_states.mem == NULL) {
        return loglin_nvidia_backward_enqueue(state->backward, call, workspace, queue, num_wait, wait, event);
    }
    return loglin_blas_engine.backward(state->blas, call, workspace, queue, num_wait, wait, event);
}

const loglin_engine_class loglin_nvidia_engine = {
    .name = "fused (nvidia)",
    .refuses = refuses,
    .create = create,
    .destroy = destroy,
    .backward_remark = backward_remark,
    .workspace_size = workspace_size,
    .forward = forward,
    .backward = backward,
};
