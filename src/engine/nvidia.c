/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The engine for NVIDIA's matrix units: the scalar-gated forward pass in four launches, see cl/nvidia_mamba2.cl.  The
 * backward pass is nvidia_backward.c's, and the blas engine's where that does not do.
 */
#include "engine/nvidia.h"

#include "engine/engine.h"
#include "engine/nvidia_backward.h"
#include "engine/nvidia_launch.h"
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
    KERNEL_STATES,
    KERNEL_TREE,
    KERNEL_OUTPUTS,
    KERNEL_FINAL,
    KERNEL_COUNT
} nvidia_kernel;

/* How the work is cut; the names are those of cl/nvidia_mamba2.cl. */
typedef struct nvidia_schedule {
    size_t super_bits, state_count, output_count, stages;
    bool cross_local, wgmma;
} nvidia_schedule;

struct loglin_engine_state {
    loglin_nvidia_kernel kernels[KERNEL_COUNT];
    nvidia_schedule schedule;
    loglin_nvidia_call call;
    size_t workspace;                 /* bytes */
    loglin_nvidia_backward *backward; /* or NULL */
    loglin_engine_state *blas;        /* for other backward passes, or NULL */
};

/* dim_k as the tiles hold it. */
static size_t padded_k(const loglin_problem *problem) {
    return ceil_div(problem->dim_k, 64) * 64;
}

static size_t tiles_of_v(const loglin_problem *problem) {
    return ceil_div(problem->dim_v, NV_TILE_V);
}

static size_t state_bytes(const loglin_problem *problem) {
    return padded_k(problem) * NV_TILE_V * 2;
}

static size_t segments_of(const loglin_problem *problem) {
    return ceil_div(problem->length, NV_SEGMENT);
}

/* What the heads of a group and the tiles of V make together. */
static size_t items_of_group(const loglin_problem *problem) {
    return problem->heads / problem->groups * tiles_of_v(problem);
}

/* ---- Which problems ---------------------------------------------------------------------------------------------- */

static const char *refuses(const loglin_device *device, const loglin_problem *problem) {
    if (loglin_nvidia_refuses(device) != NULL) {
        return loglin_nvidia_refuses(device);
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
    if (problem->length > max_segments * NV_SEGMENT) {
        return "it takes up to 2097152 tokens";
    }
    return NULL;
}

/* ---- Creation ---------------------------------------------------------------------------------------------------- */

static void lay_out(const loglin_problem *problem, loglin_engine_state *state) {
    const nvidia_schedule *schedule = &state->schedule;
    const size_t segments = segments_of(problem), tiles = tiles_of_v(problem), items = items_of_group(problem);
    const size_t matrices = problem->batch * problem->heads, groups = problem->batch * problem->groups;
    const size_t record_bytes = (2 * (padded_k(problem) + 36) + 64) * 512;
    size_t end = 0;
    state->call = (loglin_nvidia_call){
        .maps = loglin_nvidia_reserve(&end, ((size_t)NV_MAPS + 1) * 128),
        .products = loglin_nvidia_reserve(&end, groups * segments * record_bytes),
        .gates = loglin_nvidia_reserve(&end, matrices * segments * 2 * NV_GATES),
        .nodes = loglin_nvidia_reserve(&end, matrices * tiles * segments * state_bytes(problem)),
        .sums = loglin_nvidia_reserve(&end, matrices * segments * sizeof(float)),
        .blocks = loglin_nvidia_reserve(&end, matrices * segments * sizeof(float)),
        .batch = (unsigned)problem->batch,
        .length = (unsigned)problem->length,
        .segments = (unsigned)segments,
        .scale = problem->scale,
    };
    state->workspace = loglin_nvidia_workspace(end);
    const size_t supers = ceil_div(segments, (size_t)1 << schedule->super_bits);
    loglin_nvidia_kernel *kernels = state->kernels;
    loglin_nvidia_set_launch(&kernels[KERNEL_PREPARE],
                             (3 * groups + 2 * problem->batch * ceil_div(problem->heads, NV_GATE_HEADS)) * segments,
                             NV_PREPARE_ITEMS);
    loglin_nvidia_set_launch(&kernels[KERNEL_STATES], supers * groups * ceil_div(items, schedule->state_count),
                             128 * schedule->state_count);
    loglin_nvidia_set_launch(
        &kernels[KERNEL_TREE],
        segments > (size_t)2 << schedule->super_bits ? matrices * tiles * (state_bytes(problem) / 512) : 0, NV_ITEMS);
    loglin_nvidia_set_launch(&kernels[KERNEL_OUTPUTS], segments * groups * ceil_div(items, schedule->output_count),
                             NV_OUTPUT_ITEMS);
    loglin_nvidia_set_launch(&kernels[KERNEL_FINAL], matrices * problem->dim_k, NV_ITEMS);
}

static loglin_status create_kernels(loglin_device *device, const loglin_problem *problem, loglin_engine_state *state) {
    static const char *const names[KERNEL_COUNT] = {"nvidia_prepare", "nvidia_states", "nvidia_tree", "nvidia_outputs",
                                                    "nvidia_final"};
    static const char *const files[] = {"common.cl",
                                        "mma_nvidia.cl",
                                        "nvidia_layout.cl",
                                        "nvidia_mamba2.cl",
                                        "nvidia_mamba2_states.cl",
                                        "nvidia_mamba2_outputs.cl",
                                        NULL};
    const nvidia_schedule *schedule = &state->schedule;
    char options[640]; /* 15 numbers of at most 20 digits and their names */
    (void)snprintf(options, sizeof options,
                   "-DNV_K=%zu -DDIM_K=%zu -DDIM_V=%zu -DHEADS=%zu -DGROUPS=%zu -DLEVELS=%zu -DUSED=%zu -DNORMALIZE=%d"
                   " -DSTORAGE=%d -DWEIGHT_STORAGE=%d -DNV_SUPER_BITS=%zu -DNV_STATE_COUNT=%zu -DNV_OUTPUT_COUNT=%zu"
                   " -DNV_STAGES=%zu -DNV_CROSS_LOCAL=%d %s",
                   padded_k(problem), problem->dim_k, problem->dim_v, problem->heads, problem->groups, problem->levels,
                   loglin_num_levels(problem->length), problem->normalize_qk != 0, (int)problem->dtype,
                   (int)problem->weight_dtype, schedule->super_bits, schedule->state_count, schedule->output_count,
                   schedule->stages, (int)schedule->cross_local, schedule->wgmma ? LOGLIN_HIDDEN_INSTRUCTIONS : "");
    return loglin_nvidia_kernels_get(device, files, options, names, KERNEL_COUNT, state->kernels);
}

static void destroy(loglin_engine_state *state) {
    if (state == NULL) {
        return;
    }
    loglin_nvidia_kernels_release(state->kernels, KERNEL_COUNT);
    loglin_nvidia_backward_destroy(state->backward);
    loglin_blas_engine.destroy(state->blas);
    free(state);
}

/* Bytes of local memory of a work-group of outputs, which takes the most. */
static size_t local_bytes(const loglin_problem *problem, const nvidia_schedule *schedule) {
    const size_t row = (size_t)NV_TILE_V * 2, tile = 512;
    const size_t values = (size_t)(schedule->wgmma ? 2 : 1) * NV_SEGMENT * row;
    const size_t states = schedule->stages * 64 * row;
    const size_t products = (72 + (size_t)(schedule->cross_local ? 64 : 0)) * tile;
    const size_t levels = loglin_num_levels(problem->length);
    const size_t scale = problem->weight_dtype == LOGLIN_F32 ? sizeof(float) : 2, piece = 16 / scale;
    const size_t pieces = (levels + 2 * piece - 2) / piece, scales = NV_SEGMENT * (pieces > 4 ? pieces : 4) * 16;
    const size_t tables = (schedule->output_count + 2) * NV_SEGMENTS_BITS * 4 + schedule->stages * 16 + 192;
    const bool o_boxes = schedule->wgmma && scale == 2 && problem->heads * problem->levels % 8 == 0;
    const size_t rounded = o_boxes ? (size_t)NV_OUTPUT_ITEMS * 32 : 0; /* half of o */
    return values + states + products + 2 * scales + (size_t)4 * NV_GATES + rounded + tables;
}

/*
 * How many of a group's `items` a work-group of outputs takes, one after another, where there are `times` such groups of
 * work-groups: few enough that all units are busy to the end, and many, since a work-group's start takes as long as an item.
 */
static size_t items_of_work_group(size_t items, size_t times, size_t units) {
    size_t best = 1, least = SIZE_MAX;
    for (size_t work_groups = 1; work_groups <= items; work_groups *= 2) {
        const size_t count = ceil_div(items, work_groups);
        const size_t cost = ceil_div(times * work_groups, units) * (2 * count + 2) + count;
        if (count <= 48 && cost < least) {
            least = cost;
            best = count;
        }
    }
    return best;
}

static nvidia_schedule choose_schedule(const loglin_device *device, const loglin_problem *problem) {
    const size_t items = items_of_group(problem), units = device->info.compute_units;
    const size_t groups = problem->batch * problem->groups, segments = segments_of(problem);
    nvidia_schedule schedule = {.state_count = 1, .output_count = items_of_work_group(items, segments * groups, units)};
    while (schedule.super_bits < 3 && groups * items * (segments >> (schedule.super_bits + 1)) >= units) {
        schedule.super_bits++;
    }
    return schedule;
}

/* wgmma where it is, else mma.sync, which needs less local memory; as much in local memory as the device has. */
static loglin_status choose_units(loglin_device *device, const loglin_problem *problem, nvidia_schedule *schedule) {
    loglin_status status = LOGLIN_UNSUPPORTED;
    for (int attempt = 0; attempt < 4 && status != LOGLIN_OK; attempt++) {
        schedule->wgmma = attempt < 2;
        schedule->cross_local = attempt % 2 == 0;
        schedule->stages = schedule->wgmma ? NV_MOST_STAGES : NV_LEAST_STAGES;
        while (schedule->stages > NV_LEAST_STAGES && local_bytes(problem, schedule) > NV_MOST_LOCAL) {
            schedule->stages--;
        }
        const size_t bytes = local_bytes(problem, schedule);
        status = schedule->wgmma ? loglin_nvidia_probe_wgmma(device, problem->dtype, bytes)
                                 : loglin_nvidia_probe(device, problem->dtype, bytes);
    }
    return status;
}

static loglin_status prepare(loglin_device *device, const loglin_problem *problem,
                             const loglin_configuration *configuration, loglin_engine_state *state) {
    state->schedule = choose_schedule(device, problem);
    RETURN_IF_ERROR(choose_units(device, problem, &state->schedule));
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

static loglin_status enqueue(const loglin_engine_state *state, loglin_nvidia_run *run, const loglin_call *call,
                             cl_event *event) {
    const loglin_nvidia_kernel *kernels = state->kernels;
    const cl_uint qk_aligned = loglin_nvidia_is_aligned(call->in.q) && loglin_nvidia_is_aligned(call->in.k);
    const cl_uint v_aligned = loglin_nvidia_is_aligned(call->in.v);
    const cl_uint all_aligned = v_aligned | (cl_uint)loglin_nvidia_is_aligned(call->o) << 1 |
                                (cl_uint)loglin_nvidia_is_aligned(call->in.level_scales) << 2;
    const loglin_nvidia_argument sums = {state->call.segments * sizeof(float), NULL};
    const bool has_final = call->final.values.mem != NULL;
    const loglin_buffer prepare_buffers[] = {call->in.q, call->in.k, call->in.g, call->in.v, call->in.level_scales,
                                             call->o};
    RETURN_IF_ERROR(loglin_nvidia_launch(run, &kernels[KERNEL_PREPARE], prepare_buffers, 6,
                                         &(loglin_nvidia_argument){sizeof qk_aligned, &qk_aligned}, NULL));
    RETURN_IF_ERROR(loglin_nvidia_launch(run, &kernels[KERNEL_STATES], &call->in.v, 1,
                                         &(loglin_nvidia_argument){sizeof v_aligned, &v_aligned}, NULL));
    RETURN_IF_ERROR(loglin_nvidia_launch(run, &kernels[KERNEL_TREE], NULL, 0, &sums, NULL));
    const loglin_buffer outputs_buffers[] = {call->in.v, call->in.level_scales, call->o};
    RETURN_IF_ERROR(loglin_nvidia_launch(run, &kernels[KERNEL_OUTPUTS], outputs_buffers, 3,
                                         &(loglin_nvidia_argument){sizeof all_aligned, &all_aligned},
                                         has_final ? NULL : event));
    if (!has_final) {
        return LOGLIN_OK;
    }
    const loglin_buffer final_buffers[] = {call->in.v, call->final.values, call->final.log_decay, call->final.position};
    return loglin_nvidia_launch(run, &kernels[KERNEL_FINAL], final_buffers, 4, NULL, event);
}

static loglin_status forward(loglin_engine_state *state, const loglin_call *call, loglin_buffer workspace,
                             cl_command_queue queue, cl_uint num_wait, const cl_event *wait, cl_event *event) {
    loglin_nvidia_run run;
    RETURN_IF_ERROR(loglin_nvidia_begin(&state->call, sizeof state->call, workspace, queue, num_wait, wait, &run));
    return enqueue(state, &run, call, event);
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
