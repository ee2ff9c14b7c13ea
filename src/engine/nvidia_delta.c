/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The delta rule on NVIDIA's matrix units: see cl/nvidia_delta.cl and cl/nvidia_delta_backward.cl.  A backward pass that is
 * given a gradient of the final states is the blas engine's.
 */
#include "engine/engine.h"
#include "engine/nvidia.h"
#include "engine/nvidia_launch.h"
#include "plan/problem.h"
#include "runtime/device.h"
#include "runtime/program.h"
#include "runtime/status.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../cl/nvidia_delta_layout.cl"

/* The most local memory of a work-group that is asked for, in bytes; the trial run says whether the device has it. */
static const size_t local_limit = 227 * (size_t)1024;

/* Columns of V to a work-group that walks, or twice as many. */
static const size_t narrow_slice = 16;

/* Tiles of a lower triangle of a chunk, in bytes. */
static const size_t own_bytes = (size_t)10 * 512;

typedef enum delta_kernel {
    KERNEL_PREPARE,
    KERNEL_WALK,
    KERNEL_FINAL, /* forward only */
    FORWARD_COUNT,
    KERNEL_RETREAT = KERNEL_FINAL, /* these backward only */
    KERNEL_LEVELS,
    KERNEL_KEYS,
    KERNEL_SUM,
    BACKWARD_COUNT
} delta_kernel;

/* What one phase runs. */
typedef struct delta_phase {
    loglin_nvidia_kernel kernels[BACKWARD_COUNT];
    loglin_delta_call call;
    size_t columns;   /* of V to a work-group that walks */
    size_t workspace; /* bytes */
    bool wgmma;
} delta_phase;

struct loglin_engine_state {
    delta_phase forward, backward;
    loglin_engine_state *blas; /* for the backward phase, else NULL */
};

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

/* Local memory that a work-group needs to walk with `columns` columns of V; the walk backwards needs more. */
static size_t walk_bytes(const loglin_problem *problem, bool backward, size_t columns) {
    const size_t state = problem->dim_k * columns * 2 * 2, update = (size_t)ND_CHUNK * columns * 2;
    const size_t values = ND_CHUNK * (columns + 8) * 2, rows = count_rows(problem) * sizeof(float);
    return count_states(problem) * (state + (backward ? 2 : 1) * update) + 2 * (values + rows);
}

/* Local memory that a work-group needs for a chunk's map or, backwards, for what its keys do. */
static size_t chunk_bytes(const loglin_problem *problem, bool backward) {
    const size_t chunk = ND_CHUNK, keys = 2 * chunk * (problem->dim_k + 8) * 2, square = chunk * (chunk + 8) * 2;
    const size_t inverse = chunk * (chunk + 4) * sizeof(float), factors = chunk * sizeof(float[15]);
    const size_t own = backward ? 6 * square + chunk * sizeof(float[10]) : 2 * square + own_bytes;
    return keys + inverse + factors + own;
}

/* Local memory that a work-group needs to find what a chunk's states hand back: of the map, and of the states two turns. */
static size_t levels_bytes(const loglin_problem *problem) {
    return (3 + 2 * 2) * ceil_div(problem->dim_k, 64) * 64 * ND_CHUNK * 2;
}

static bool goes_back(const loglin_problem *problem) {
    return (problem->phases & LOGLIN_BACKWARD) != 0;
}

/* ---- Which problems ---------------------------------------------------------------------------------------------- */

static const char *refuses(const loglin_device *device, const loglin_problem *problem) {
    if (loglin_nvidia_refuses(device) != NULL) {
        return loglin_nvidia_refuses(device);
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
    if (walk_bytes(problem, goes_back(problem), narrow_slice) > local_limit) {
        return "the level states of so long a sequence do not fit in local memory";
    }
    return NULL;
}

/* ---- Creation ---------------------------------------------------------------------------------------------------- */

/* Level states at the starts of all chunks of a sequence and head: a chunk has one for every bit of its number. */
static size_t count_saved(size_t chunks) {
    size_t count = 0;
    for (size_t n = 0; n < chunks; n++) {
        for (size_t bits = n; bits != 0; bits &= bits - 1) {
            count++;
        }
    }
    for (size_t bits = chunks - 1; bits != 0; bits &= bits - 1) {
        count++;
    }
    return count;
}

static void lay_out(const loglin_problem *problem, bool backward, delta_phase *phase) {
    const size_t chunks = ceil_div(problem->length, ND_CHUNK), matrices = problem->batch * problem->heads;
    const size_t maps = matrices * chunks, tokens = problem->batch * problem->length;
    const size_t part_bytes = ND_CHUNK * problem->dim_k * 2;
    const size_t blocks = ceil_div(problem->dim_k, (size_t)64 * ND_LEVELS_UNITS);
    const size_t slices = matrices * ceil_div(problem->dim_v, phase->columns);
    size_t end = 0;
    phase->call = (loglin_delta_call){
        .maps = loglin_nvidia_reserve(&end, maps * ((backward ? 6 : 3) * part_bytes + own_bytes)),
        .rows = loglin_nvidia_reserve(&end, maps * count_rows(problem) * sizeof(float)),
        .batch = (unsigned)problem->batch,
        .length = (unsigned)problem->length,
        .chunks = (unsigned)chunks,
        .scale = problem->scale,
    };
    loglin_nvidia_set_launch(&phase->kernels[KERNEL_PREPARE], maps, ND_PREPARE_ITEMS);
    loglin_nvidia_set_launch(&phase->kernels[KERNEL_WALK], slices, ND_WALK_ITEMS);
    if (backward) {
        const size_t saved_bytes = matrices * count_saved(chunks) * problem->dim_k * problem->dim_v * 2;
        const size_t sum_bytes = tokens * problem->heads * problem->dim_k * sizeof(float);
        phase->call.states = loglin_nvidia_reserve(&end, saved_bytes);
        phase->call.adjoints = loglin_nvidia_reserve(&end, saved_bytes);
        phase->call.map_gradients = loglin_nvidia_reserve(&end, maps * 3 * part_bytes);
        phase->call.decays = loglin_nvidia_reserve(&end, maps * blocks * 4 * sizeof(float));
        phase->call.dq = loglin_nvidia_reserve(&end, sum_bytes);
        phase->call.dk = loglin_nvidia_reserve(&end, sum_bytes);
        loglin_nvidia_set_launch(&phase->kernels[KERNEL_RETREAT], slices, ND_WALK_ITEMS);
        loglin_nvidia_set_launch(&phase->kernels[KERNEL_LEVELS], maps * blocks, ND_LEVELS_ITEMS);
        loglin_nvidia_set_launch(&phase->kernels[KERNEL_KEYS], maps, ND_KEYS_ITEMS);
        loglin_nvidia_set_launch(&phase->kernels[KERNEL_SUM], ceil_div(tokens * problem->groups, ND_KEYS_ITEMS / 32),
                                 ND_KEYS_ITEMS);
    } else {
        loglin_nvidia_set_launch(&phase->kernels[KERNEL_FINAL], matrices * problem->dim_k, ND_PREPARE_ITEMS);
    }
    phase->workspace = loglin_nvidia_workspace(end);
}

static loglin_status create_kernels(loglin_device *device, const loglin_problem *problem, bool backward,
                                    delta_phase *phase) {
    static const char *const forward_names[] = {"nvidia_delta_prepare", "nvidia_delta_walk", "nvidia_delta_final"};
    static const char *const backward_names[] = {"nvidia_delta_prepare", "nvidia_delta_walk", "nvidia_delta_retreat",
                                                 "nvidia_delta_levels",  "nvidia_delta_keys", "nvidia_delta_sum"};
    const char *const files[] = {"common.cl",
                                 "mma_nvidia.cl",
                                 "nvidia_delta_layout.cl",
                                 "nvidia_delta.cl",
                                 "nvidia_delta_walk.cl",
                                 backward ? "nvidia_delta_backward.cl" : NULL, /* the end of a forward pass's */
                                 "nvidia_delta_keys.cl",
                                 NULL};
    char options[480]; /* 11 numbers of at most 20 digits and their names */
    (void)snprintf(options, sizeof options,
                   "-DDIM_K=%zu -DDIM_V=%zu -DHEADS=%zu -DGROUPS=%zu -DLEVELS=%zu -DSTATES=%zu -DNORMALIZE=%d"
                   " -DSTORAGE=%d -DWEIGHT_STORAGE=%d -DND_V=%zu -DBACKWARD=%d %s",
                   problem->dim_k, problem->dim_v, problem->heads, problem->groups, problem->levels,
                   count_states(problem), problem->normalize_qk != 0, (int)problem->dtype, (int)problem->weight_dtype,
                   phase->columns, (int)backward, phase->wgmma ? LOGLIN_HIDDEN_INSTRUCTIONS : "");
    return loglin_nvidia_kernels_get(device, files, options, backward ? backward_names : forward_names,
                                     backward ? BACKWARD_COUNT : FORWARD_COUNT, phase->kernels);
}

static void destroy(loglin_engine_state *state) {
    if (state == NULL) {
        return;
    }
    loglin_nvidia_kernels_release(state->forward.kernels, BACKWARD_COUNT);
    loglin_nvidia_kernels_release(state->backward.kernels, BACKWARD_COUNT);
    loglin_blas_engine.destroy(state->blas);
    free(state);
}

/* Columns of V to a work-group that walks: as many as its states leave room for. */
static loglin_status find_columns(loglin_device *device, const loglin_problem *problem, bool backward,
                                  size_t *columns) {
    const size_t levels = backward ? levels_bytes(problem) : 0, wide_slice = 2 * narrow_slice;
    const size_t chunk = chunk_bytes(problem, backward) > levels ? chunk_bytes(problem, backward) : levels;
    const size_t wide = walk_bytes(problem, backward, wide_slice), narrow = walk_bytes(problem, backward, narrow_slice);
    *columns = wide_slice;
    if (problem->dim_v > narrow_slice && wide <= local_limit &&
        loglin_nvidia_probe(device, problem->dtype, wide > chunk ? wide : chunk) == LOGLIN_OK) {
        return LOGLIN_OK;
    }
    *columns = narrow_slice;
    return loglin_nvidia_probe(device, problem->dtype, narrow > chunk ? narrow : chunk);
}

static loglin_status create_phase(loglin_device *device, const loglin_problem *problem, bool backward,
                                  delta_phase *phase) {
    RETURN_IF_ERROR(find_columns(device, problem, backward, &phase->columns));
    phase->wgmma = backward && loglin_nvidia_probe_wgmma(device, problem->dtype, levels_bytes(problem)) == LOGLIN_OK;
    lay_out(problem, backward, phase);
    return create_kernels(device, problem, backward, phase);
}

static loglin_status create_phases(loglin_device *device, const loglin_problem *problem,
                                   const loglin_configuration *configuration, loglin_engine_state *state) {
    if ((problem->phases & LOGLIN_FORWARD) != 0) {
        RETURN_IF_ERROR(create_phase(device, problem, false, &state->forward));
    }
    if (goes_back(problem)) {
        RETURN_IF_ERROR(create_phase(device, problem, true, &state->backward));
        return loglin_blas_engine.create(device, problem, configuration, &state->blas);
    }
    return LOGLIN_OK;
}

static loglin_status create(loglin_device *device, const loglin_problem *problem,
                            const loglin_configuration *configuration, loglin_engine_state **state) {
    loglin_engine_state *made = calloc(1, sizeof *made);
    if (made == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "NVIDIA delta engine: out of host memory");
    }
    const loglin_status status = create_phases(device, problem, configuration, made);
    if (status != LOGLIN_OK) {
        destroy(made);
        return status;
    }
    *state = made;
    return LOGLIN_OK;
}

static const char *backward_remark(const loglin_engine_state *state) {
    return state->blas == NULL ? NULL : "with a gradient of the final states by the blas engine";
}

static size_t workspace_size(const loglin_engine_state *state, loglin_phase phase) {
    if (phase == LOGLIN_FORWARD) {
        return state->forward.workspace;
    }
    const size_t blas = state->blas != NULL ? loglin_blas_engine.workspace_size(state->blas, phase) : 0;
    return blas > state->backward.workspace ? blas : state->backward.workspace;
}

/* ---- Execution --------------------------------------------------------------------------------------------------- */

static loglin_status prepare_maps(const delta_phase *phase, loglin_nvidia_run *run, const loglin_inputs *in) {
    const cl_uint is_aligned = loglin_nvidia_is_aligned(in->q) && loglin_nvidia_is_aligned(in->k);
    const loglin_nvidia_argument aligned = {sizeof is_aligned, &is_aligned};
    const loglin_buffer buffers[] = {in->q, in->k, in->g, in->level_scales, in->beta};
    return loglin_nvidia_launch(run, &phase->kernels[KERNEL_PREPARE], buffers, 5, &aligned, NULL);
}

static loglin_status forward(loglin_engine_state *state, const loglin_call *call, loglin_buffer workspace,
                             cl_command_queue queue, cl_uint num_wait, const cl_event *wait, cl_event *event) {
    const delta_phase *phase = &state->forward;
    loglin_nvidia_run run;
    RETURN_IF_ERROR(loglin_nvidia_begin(&phase->call, sizeof phase->call, workspace, queue, num_wait, wait, &run));
    RETURN_IF_ERROR(prepare_maps(phase, &run, &call->in));
    const cl_uint is_aligned = loglin_nvidia_is_aligned(call->in.v) && loglin_nvidia_is_aligned(call->o);
    const loglin_nvidia_argument aligned = {sizeof is_aligned, &is_aligned};
    const bool has_final = call->final.values.mem != NULL;
    const loglin_buffer walk_buffers[] = {call->in.v, call->o, call->final.values};
    RETURN_IF_ERROR(
        loglin_nvidia_launch(&run, &phase->kernels[KERNEL_WALK], walk_buffers, 3, &aligned, has_final ? NULL : event));
    if (!has_final) {
        return LOGLIN_OK;
    }
    const loglin_buffer final_buffers[] = {call->in.v, call->final.values, call->final.position};
    return loglin_nvidia_launch(&run, &phase->kernels[KERNEL_FINAL], final_buffers, 3, NULL, event);
}

/* Can the rows of all 16-bit arrays be moved 16 bytes at a time? */
static bool all_are_aligned(const loglin_call *call) {
    const loglin_buffer buffers[] = {call->in.q, call->in.k, call->in.v, call->d_o, call->out.dv};
    bool aligned = true;
    for (size_t i = 0; i < sizeof buffers / sizeof buffers[0]; i++) {
        aligned = aligned && loglin_nvidia_is_aligned(buffers[i]);
    }
    return aligned;
}

static loglin_status backward(loglin_engine_state *state, const loglin_call *call, loglin_buffer workspace,
                              cl_command_queue queue, cl_uint num_wait, const cl_event *wait, cl_event *event) {
    if (call->dfinal_states.mem != NULL) {
        return loglin_blas_engine.backward(state->blas, call, workspace, queue, num_wait, wait, event);
    }
    const loglin_inputs *in = &call->in;
    const loglin_gradients *out = &call->out;
    const loglin_buffer none = {NULL, 0};
    const delta_phase *phase = &state->backward;
    const loglin_nvidia_kernel *kernels = phase->kernels;
    const cl_uint is_aligned = all_are_aligned(call);
    const loglin_nvidia_argument aligned = {sizeof is_aligned, &is_aligned};
    loglin_nvidia_run run;
    RETURN_IF_ERROR(loglin_nvidia_begin(&phase->call, sizeof phase->call, workspace, queue, num_wait, wait, &run));
    RETURN_IF_ERROR(prepare_maps(phase, &run, in));
    const loglin_buffer walk_buffers[] = {in->v, none, none};
    RETURN_IF_ERROR(loglin_nvidia_launch(&run, &kernels[KERNEL_WALK], walk_buffers, 3, &aligned, NULL));
    const loglin_buffer retreat_buffers[] = {call->d_o, out->dv};
    RETURN_IF_ERROR(loglin_nvidia_launch(&run, &kernels[KERNEL_RETREAT], retreat_buffers, 2, &aligned, NULL));
    const loglin_buffer levels_buffers[] = {in->v, call->d_o, out->dlevel_scales};
    RETURN_IF_ERROR(loglin_nvidia_launch(&run, &kernels[KERNEL_LEVELS], levels_buffers, 3, &aligned, NULL));
    const loglin_buffer keys_buffers[] = {
        in->q, in->k, in->v, in->g, in->level_scales, in->beta, call->d_o, out->dg, out->dlevel_scales, out->dbeta};
    RETURN_IF_ERROR(loglin_nvidia_launch(&run, &kernels[KERNEL_KEYS], keys_buffers, 10, &aligned, NULL));
    const loglin_buffer sum_buffers[] = {in->q, in->k, out->dq, out->dk};
    return loglin_nvidia_launch(&run, &kernels[KERNEL_SUM], sum_buffers, 4, NULL, event);
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
