/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The fused engine for CPUs, and for GPUs without an engine of their own: one launch, a work-group a lane
 * (cl/portable_layout.cl), tiles held in registers (cl/mma_*.cl), intermediate results in the caches of the lane's
 * core.
 */
#include "engine/engine.h"
#include "engine/lanes.h"
#include "plan/problem.h"
#include "runtime/device.h"
#include "runtime/program.h"
#include "runtime/status.h"

#include "../../cl/portable_layout.cl"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

/* Lanes of a core that share the chunks of a head: several, so that the cores end together. */
static const size_t spread_lanes = 4;

/* Of the maps that are made before a walk. */
static const size_t most_map_floats = (size_t)64 << 20;

/* X(name): the kernels: of the slots, of the forward pass, of the spread one and of that with maps, of the backward pass. */
#define PORTABLE_KERNELS(X)                                                                                            \
    X(chunk_layout)                                                                                                    \
    X(chunk_keep)                                                                                                      \
    X(chunk_positions)                                                                                                 \
    X(portable_forward)                                                                                                \
    X(portable_own)                                                                                                    \
    X(portable_merge)                                                                                                  \
    X(portable_read)                                                                                                   \
    X(portable_maps)                                                                                                   \
    X(portable_walk)                                                                                                   \
    X(portable_backward)                                                                                               \
    X(portable_reduce)

typedef enum portable_kernel {
#define PORTABLE_KERNEL_ENUM(name) KERNEL_##name,
    PORTABLE_KERNELS(PORTABLE_KERNEL_ENUM)
#undef PORTABLE_KERNEL_ENUM
        KERNEL_COUNT
} portable_kernel;

/* How the work is divided, and what the kernels are compiled with. */
typedef struct lane_shape {
    size_t heads;                   /* of a lane */
    size_t pad_k, pad_v;            /* whole vectors; pad_v of the values of a lane */
    size_t columns;                 /* of the panel, at least 1 */
    size_t pool;                    /* places for states */
    size_t head_parts, value_parts; /* of a group, of its values */
    size_t lanes;
    size_t spread;            /* lanes that share the chunks of a head; 0: a lane walks over all of them */
    size_t map_lanes;         /* lanes that make the maps of a head before the walk; 0: each lane its own */
    size_t segment, segments; /* backward: chunks, and how many of them a sequence has at most; 0: forward */
} lane_shape;

/* Where the parts of the workspace begin, in floats from its start. */
typedef struct workspace_layout {
    size_t lanes, pools, maps;
    size_t q_parts, k_parts, g_parts, beta_parts, level_parts; /* backward */
    size_t floats;
} workspace_layout;

struct loglin_engine_state {
    cl_kernel kernels[KERNEL_COUNT];
    loglin_panel panel; /* table from the workspace's start */
    loglin_lane_schedule schedule;
    size_t waves; /* at most, of a sequence */
    lane_shape shape, backward_shape;
    workspace_layout forward, backward;
    loglin_engine_state *blas; /* for the backward pass where this engine has none, or NULL */
    const char *obstacle;      /* why, where there is one */
};

/* ---- Which problems ---------------------------------------------------------------------------------------------- */

static const char *cpu_refuses(const loglin_device *device, const loglin_problem *problem) {
    (void)problem;
    return device->is_cpu ? NULL : "its lanes are a CPU's threads";
}

static const char *gpu_refuses(const loglin_device *device, const loglin_problem *problem) {
    (void)problem;
    return device->is_cpu ? "its lanes are work-groups of a GPU" : NULL;
}

/* ---- Division into lanes ----------------------------------------------------------------------------------------- */

static size_t ceil_div(size_t a, size_t b) {
    return (a + b - 1) / b;
}

static size_t smaller(size_t a, size_t b) {
    return a < b ? a : b;
}

static size_t larger(size_t a, size_t b) {
    return a > b ? a : b;
}

static size_t pad(size_t count) {
    return ceil_div(count, 16) * 16;
}

/* The share of the cores' time that equal lanes keep busy. */
static double busy_share(size_t lanes, size_t cores) {
    return (double)lanes / (double)(ceil_div(lanes, cores) * cores);
}

/*
 * As few parts as keep the cores busy: of the heads of a group first, as they only share q k^T, then of the values.  A
 * lane has most_heads at most: more share q k^T, but their states leave the core's cache.
 */
static lane_shape divide(const loglin_problem *problem, const loglin_panel *panel, size_t cores, size_t most_heads) {
    const size_t matrices = loglin_problem_sequences(problem) * problem->groups,
                 heads = problem->heads / problem->groups;
    lane_shape best = {0};
    for (size_t value_parts = 1; value_parts <= ceil_div(problem->dim_v, 32); value_parts *= 2) {
        for (size_t head_parts = ceil_div(heads, most_heads); head_parts <= heads; head_parts++) {
            const size_t lanes = matrices * head_parts * value_parts;
            if (heads % head_parts == 0 &&
                (best.lanes == 0 || busy_share(lanes, cores) > busy_share(best.lanes, cores) + 0.1)) {
                best = (lane_shape){.heads = heads / head_parts,
                                    .pad_k = pad(problem->dim_k),
                                    .pad_v = pad(ceil_div(problem->dim_v, value_parts)),
                                    .columns = panel->columns > 0 ? panel->columns : 1,
                                    .pool = panel->columns + 2};
                best.head_parts = head_parts;
                best.value_parts = ceil_div(problem->dim_v, best.pad_v);
                best.lanes = matrices * head_parts * best.value_parts;
            }
        }
    }
    return best;
}

static bool is_backward(const lane_shape *shape) {
    return shape->segment > 0 && shape->spread == 0;
}

/* Floats of a lane's memory, and of its parts. */
typedef struct lane_size {
    size_t all, map, pool;
} lane_size;

static lane_size size_lane(const lane_shape *shape, const loglin_panel *panel, bool strong) {
    const bool gradients = is_backward(shape);
    enum {
        ALWAYS,
        DELTA,
        SCALAR,
        STRONG,
        NEAR,
        MAPS,
        PAIRS,
        SPREAD,
        MOMENTS,
        GRADIENTS,
        DELTA_GRADIENTS,
        NEAR_GRADIENTS,
        WHEN_COUNT
    };
    enum {
        SIZE_1,
        SIZE_2,
        SIZE_C,
        SIZE_K,
        SIZE_V,
        SIZE_L,
        SIZE_D,
        SIZE_P,
        SIZE_KV,
        SIZE_J,
        SIZE_SJ,
        SIZE_M,
        SIZE_A,
        SIZE_COUNT
    };
    enum { ONE, HEAD };
    const bool when[WHEN_COUNT] = {
        [ALWAYS] = true,
        [DELTA] = panel->delta,
        [SCALAR] = !panel->delta,
        [STRONG] = strong,
        [NEAR] = panel->near,
        [MAPS] = panel->delta || panel->near || gradients,
        [PAIRS] = panel->delta || gradients,
        [SPREAD] = shape->spread > 0,
        [MOMENTS] = gradients || shape->spread > 0,
        [GRADIENTS] = gradients,
        [DELTA_GRADIENTS] = panel->delta && gradients,
        [NEAR_GRADIENTS] = panel->near && gradients,
    };
    const size_t sizes[SIZE_COUNT] = {
        [SIZE_1] = 1,
        [SIZE_2] = 2,
        [SIZE_C] = panel->chunk,
        [SIZE_K] = shape->pad_k,
        [SIZE_V] = shape->pad_v,
        [SIZE_L] = PORTABLE_WEIGHTS,
        [SIZE_D] = pad(shape->pool),
        [SIZE_P] = shape->pool,
        [SIZE_KV] = shape->pad_k * shape->pad_v,
        [SIZE_J] = shape->columns,
        [SIZE_SJ] = shape->segments * shape->columns,
        [SIZE_A] = 2 * shape->columns,
        [SIZE_M] = shape->segments + shape->segment,
    };
    const size_t counts[] = {[ONE] = 1, [HEAD] = shape->heads};
    size_t floats = 0;
#define PORTABLE_ADD(name, count, rows, columns, condition)                                                            \
    floats += when[condition] ? counts[count] * sizes[SIZE_##rows] * sizes[SIZE_##columns] : 0;
    PORTABLE_ARRAYS(PORTABLE_ADD)
    const size_t own = floats;
    PORTABLE_MAP_ARRAYS(PORTABLE_ADD)
    const size_t before_pool = floats;
    PORTABLE_POOL_ARRAYS(PORTABLE_ADD)
#undef PORTABLE_ADD
    return (lane_size){.all = pad(floats), .map = before_pool - own, .pool = pad(floats - before_pool)};
}

static size_t reserve(size_t *end, size_t floats) {
    const size_t at = *end;
    *end += ceil_div(floats, 16) * 16;
    return at;
}

/*
 * The shape of the forward pass's lanes: parts of the values would all make the same maps, so where nothing but the
 * states ties the chunks together they are spread instead.
 */
static lane_shape spread(const loglin_problem *problem, const loglin_engine_state *state, lane_shape shape,
                         size_t cores) {
    const size_t heads = loglin_problem_sequences(problem) * problem->heads;
    if (shape.value_parts == 1 || heads * state->waves < cores || state->panel.delta ||
        problem->partition == LOGLIN_STRONG) {
        return shape;
    }
    shape.heads = 1;
    shape.head_parts = problem->heads / problem->groups;
    shape.value_parts = 1;
    shape.pad_v = pad(problem->dim_v);
    size_t waves = 1; /* a power of two: many lengths share the kernels */
    while (waves < state->waves) {
        waves *= 2;
    }
    shape.spread = smaller(ceil_div(spread_lanes * cores, heads), waves);
    shape.lanes = heads * shape.spread;
    shape.segment = waves;
    shape.pool = shape.columns + waves;
    return shape;
}

/* The same for the delta rule, whose states tie the chunks together: their maps are made before, where there is room. */
static lane_shape make_maps_before(const loglin_problem *problem, const loglin_engine_state *state, lane_shape shape,
                                   size_t cores) {
    if (shape.value_parts == 1 || state->waves == 1 || !state->panel.delta || problem->partition == LOGLIN_STRONG) {
        return shape;
    }
    const size_t heads = loglin_problem_sequences(problem) * problem->heads;
    if (heads * state->waves * size_lane(&shape, &state->panel, false).map > most_map_floats) {
        return shape;
    }
    shape.heads = 1;
    shape.head_parts = problem->heads / problem->groups;
    shape.lanes = heads * shape.value_parts;
    shape.map_lanes = smaller(ceil_div(cores, heads), state->waves);
    return shape;
}

/* The shape of the backward pass's lanes: they hold the states of `chunks`; twice as many save a second walk. */
static lane_shape divide_backward(const loglin_engine_state *state, lane_shape shape, size_t chunks, bool strong) {
    shape.segment = state->waves <= 2 * chunks ? state->waves : chunks;
    shape.segments = ceil_div(state->waves, shape.segment);
    /*
     * Those at a segment's start, and what each of its chunks makes: its own, and anew all others for the delta rule.
     * Where states of the strong partition meet, a sum; in chunks that begin or end at odd positions several.
     */
    const size_t made = state->panel.delta ? shape.columns + 1 : strong ? 2 : 1;
    shape.pool = shape.columns + shape.segment * made + (strong ? shape.columns : 0);
    return shape;
}

/* The workspace behind the slot table: the lanes, and backwards the parts of the gradients. */
static loglin_status lay_out_workspace(const loglin_problem *problem, const loglin_panel *panel, size_t waves,
                                       const lane_shape *shape, workspace_layout *layout) {
    const lane_size size = size_lane(shape, panel, problem->partition == LOGLIN_STRONG);
    const size_t heads = loglin_problem_sequences(problem) * problem->heads;
    if (size.all > INT32_MAX) {
        return loglin_fail(LOGLIN_UNSUPPORTED, "a lane takes %zu floats, expected below 2^31", size.all);
    }
    size_t end = 0;
    (void)reserve(&end, (size_t)panel->slots * SLOT_INTS);
    layout->lanes = reserve(&end, larger(shape->lanes, heads * shape->map_lanes) *
                                      (shape->spread > 0 ? size.all - size.pool : size.all));
    layout->pools = reserve(&end, shape->spread > 0 ? shape->lanes / shape->spread * size.pool : 0);
    layout->maps = reserve(&end, shape->map_lanes > 0 ? heads * waves * size.map : 0);
    if (is_backward(shape)) {
        const size_t tokens = problem->batch * problem->length, values = tokens * problem->heads * shape->value_parts;
        const size_t keys = tokens * problem->groups * problem->dim_k * shape->head_parts * shape->value_parts;
        layout->q_parts = reserve(&end, keys);
        layout->k_parts = reserve(&end, keys);
        layout->g_parts = reserve(&end, values);
        layout->beta_parts = reserve(&end, panel->delta ? values : 0);
        layout->level_parts = reserve(&end, values * problem->levels);
    }
    layout->floats = end + 16; /* its start is rounded up */
    return LOGLIN_OK;
}

/* What keeps this engine's backward pass from the problem, NULL if nothing does. */
static const char *backward_obstacle(const loglin_device *device, const loglin_problem *problem,
                                     const loglin_lane_schedule *schedule) {
    if (problem->partition == LOGLIN_STRONG && !device->is_cpu) {
        return "by the blas engine: the strong partition's fused one has not run on a GPU";
    }
    if (problem->op == LOGLIN_GATED_DELTA && !device->is_cpu) {
        return "by the blas engine: a GPU's compiler takes minutes for the delta rule's fused one";
    }
    if (schedule->forward_only) {
        return "by the blas engine: the fused one needs more registers than the device has";
    }
    return NULL;
}

static bool has_backward(const loglin_device *device, const loglin_problem *problem,
                         const loglin_lane_schedule *schedule) {
    return (problem->phases & LOGLIN_BACKWARD) != 0 && backward_obstacle(device, problem, schedule) == NULL;
}

static loglin_status lay_out(const loglin_device *device, const loglin_problem *problem, const unsigned *tuned,
                             loglin_engine_state *state) {
    loglin_panel *panel = &state->panel;
    *panel = loglin_panel_of(problem);
    panel->batch_width = panel->packed ? 1 : panel->sequences;
    panel->waves = (unsigned)loglin_count_waves(problem);
    panel->slots = panel->waves * panel->batch_width;
    state->waves = problem->sequences > 0 ? problem->max_length / problem->chunk + 2 : panel->waves;
    const lane_shape shape = divide(problem, panel, device->info.compute_units, tuned[LOGLIN_TUNABLE_LANE_HEADS]);
    state->shape = spread(problem, state, shape, device->info.compute_units);
    state->shape = make_maps_before(problem, state, state->shape, device->info.compute_units);
    RETURN_IF_ERROR(lay_out_workspace(problem, panel, state->waves, &state->shape, &state->forward));
    if (has_backward(device, problem, &state->schedule)) {
        state->backward_shape =
            divide_backward(state, shape, tuned[LOGLIN_TUNABLE_SEGMENT_CHUNKS], problem->partition == LOGLIN_STRONG);
        RETURN_IF_ERROR(lay_out_workspace(problem, panel, state->waves, &state->backward_shape, &state->backward));
    }
    return LOGLIN_OK;
}

/* ---- Creation ---------------------------------------------------------------------------------------------------- */

static void destroy(loglin_engine_state *state) {
    if (state == NULL) {
        return;
    }
    for (int i = 0; i < KERNEL_COUNT; i++) {
        if (state->kernels[i] != NULL) {
            clReleaseKernel(state->kernels[i]);
        }
    }
    loglin_blas_engine.destroy(state->blas);
    free(state);
}

/* Floats of a vector register. */
static int vector_width(const loglin_device *device) {
    cl_uint width = 0;
    (void)clGetDeviceInfo(device->id, CL_DEVICE_NATIVE_VECTOR_WIDTH_FLOAT, sizeof width, &width, NULL);
    return width >= 16 ? 16 : 8;
}

/* Creates the kernels first .. end - 1 of a program. */
static loglin_status create_kernels(loglin_device *device, const char *const *files, const char *options,
                                    portable_kernel first, portable_kernel end, loglin_engine_state *state) {
    static const char *const names[KERNEL_COUNT] = {
#define PORTABLE_KERNEL_NAME(name) #name,
        PORTABLE_KERNELS(PORTABLE_KERNEL_NAME)
#undef PORTABLE_KERNEL_NAME
    };
    return loglin_kernels_get(device, files, options, names + first, end - first, state->kernels + first);
}

/* The kernels that know nothing of the lanes: the same for all shapes, so they are compiled once. */
static loglin_status create_slot_kernels(loglin_device *device, const loglin_problem *problem,
                                         loglin_engine_state *state) {
    static const char *const files[] = {"panel.cl", "common.cl", "chunk_layout.cl", NULL};
    const char *options = problem->partition == LOGLIN_STRONG ? "-DSTRONG=1" : "-DSTRONG=0";
    return create_kernels(device, files, options, KERNEL_chunk_layout, KERNEL_portable_forward, state);
}

static loglin_status create_lane_kernels(loglin_device *device, const loglin_problem *problem, const lane_shape *shape,
                                         unsigned tile_rows, portable_kernel first, portable_kernel end,
                                         loglin_engine_state *state) {
    const char *const files[] = {"panel.cl",
                                 "common.cl",
                                 "chunk_layout.cl",
                                 "portable_items.cl",
                                 "mma_layouts.cl",
                                 state->schedule.mma,
                                 "mma_fragments.cl",
                                 "portable_product.cl",
                                 "portable_layout.cl",
                                 "portable_chunk.cl",
                                 "portable_head.cl",
                                 "portable_states.cl",
                                 "portable_forward.cl",
                                 "portable_spread.cl",
                                 "portable_maps.cl",
                                 "portable_gradients.cl",
                                 "portable_backward.cl",
                                 NULL};
    char lanes[LOGLIN_LANE_OPTIONS], options[LOGLIN_LANE_OPTIONS + 640];
    loglin_lanes_options(&state->schedule, lanes);
    (void)snprintf(options, sizeof options,
                   "-DSTORAGE=%d -DWEIGHT_STORAGE=%d -DSTRONG=%d %s -DVECTOR=%d -DTILE_ROWS=%u -DDIM_K=%zu -DDIM_V=%zu "
                   "-DCHUNK=%zu "
                   "-DPAD_K=%zu -DPAD_V=%zu -DLANE_HEADS=%zu -DCOLUMNS=%zu -DPOOL=%zu -DIS_DELTA=%u -DIS_NEAR=%u "
                   "-DIS_NORMALIZED=%d -DGRADIENTS=%d -DSPREAD=%zu -DMAPS_BEFORE=%d -DSEGMENT=%zu -DSEGMENTS=%zu "
                   "-cl-denorms-are-zero",
                   (int)problem->dtype, (int)problem->weight_dtype, problem->partition == LOGLIN_STRONG, lanes,
                   vector_width(device), tile_rows, problem->dim_k, problem->dim_v, problem->chunk, shape->pad_k,
                   shape->pad_v, shape->heads, shape->columns, shape->pool, state->panel.delta, state->panel.near,
                   problem->normalize_qk != 0, is_backward(shape), shape->spread, shape->map_lanes > 0, shape->segment,
                   shape->segments);
    return create_kernels(device, files, options, first, end, state);
}

/* Do small tiles cover the lane's matrices? */
static bool is_small(const loglin_problem *problem, const lane_shape *shape) {
    return problem->chunk <= 32 && shape->pad_k <= 32 && shape->pad_v <= 32;
}

static loglin_status prepare(loglin_device *device, const loglin_problem *problem,
                             const loglin_configuration *configuration, loglin_engine_state *state) {
    RETURN_IF_ERROR(loglin_lanes_choose(device, problem->dtype, &state->schedule));
    const char *too_much = problem->op == LOGLIN_GATED_DELTA             ? "the delta rule"
                           : problem->partition == LOGLIN_STRONG         ? "the strong partition"
                           : problem->dim_v > LOGLIN_FEW_REGISTERS_DIM_V ? "dim_v above 64"
                                                                         : NULL;
    if (state->schedule.few_registers && too_much != NULL) {
        return loglin_fail(LOGLIN_UNSUPPORTED, "%s: it has too few registers for the fused kernels of %s",
                           device->info.name, too_much);
    }
    RETURN_IF_ERROR(lay_out(device, problem, configuration->values, state));
    if (state->schedule.items > loglin_small_lanes.items && !state->schedule.few_registers &&
        is_small(problem, &state->shape)) {
        const loglin_lane_schedule of_device = state->schedule;
        state->schedule = loglin_small_lanes;
        state->schedule.options = of_device.options;
        state->schedule.forward_only = of_device.forward_only;
    }
    RETURN_IF_ERROR(create_slot_kernels(device, problem, state));
    const portable_kernel first = state->shape.spread > 0      ? KERNEL_portable_own
                                  : state->shape.map_lanes > 0 ? KERNEL_portable_maps
                                                               : KERNEL_portable_forward;
    const portable_kernel end = state->shape.spread > 0      ? KERNEL_portable_maps
                                : state->shape.map_lanes > 0 ? KERNEL_portable_backward
                                                             : KERNEL_portable_own;
    const unsigned tile_rows = configuration->values[LOGLIN_TUNABLE_TILE_ROWS];
    if ((problem->phases & LOGLIN_FORWARD) != 0) {
        RETURN_IF_ERROR(create_lane_kernels(device, problem, &state->shape, tile_rows, first, end, state));
    }
    if (has_backward(device, problem, &state->schedule)) {
        return create_lane_kernels(device, problem, &state->backward_shape, tile_rows, KERNEL_portable_backward,
                                   KERNEL_COUNT, state);
    }
    state->obstacle = backward_obstacle(device, problem, &state->schedule);
    return (problem->phases & LOGLIN_BACKWARD) == 0
               ? LOGLIN_OK
               : loglin_blas_engine.create(device, problem, configuration, &state->blas);
}

static loglin_status create(loglin_device *device, const loglin_problem *problem,
                            const loglin_configuration *configuration, loglin_engine_state **state) {
    loglin_engine_state *made = calloc(1, sizeof *made);
    if (made == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "fused engine: out of host memory");
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
    return state->blas == NULL ? NULL : state->obstacle;
}

static size_t workspace_size(const loglin_engine_state *state, loglin_phase phase) {
    if (phase == LOGLIN_BACKWARD && state->blas != NULL) {
        return loglin_blas_engine.workspace_size(state->blas, phase);
    }
    return (phase == LOGLIN_BACKWARD ? state->backward.floats : state->forward.floats) * sizeof(float);
}

/* ---- Execution --------------------------------------------------------------------------------------------------- */

/* The workspace from its first whole vector on. */
static loglin_buffer align(loglin_buffer workspace) {
    return (loglin_buffer){workspace.mem, ceil_div(workspace.offset, 16) * 16};
}

/* A tape with the slot table filled in. */
static loglin_tape start(const loglin_engine_state *state, const loglin_call *call, loglin_buffer workspace,
                         cl_command_queue queue, cl_uint num_wait, const cl_event *wait) {
    loglin_tape tape = loglin_tape_start(&state->panel, state->kernels, workspace, queue, num_wait, wait);
    loglin_tape_launch(
        &tape, KERNEL_chunk_layout, state->panel.slots, 1, 1,
        ARGUMENTS(BUFFER(call->in.cu_seqlens), BUFFER(call->initial.position), UINT(state->panel.slots)));
    return tape;
}

/* Sequences without tokens: `to` = `from` where its levels exist. */
static void keep_states(loglin_tape *tape, const loglin_call *call, loglin_buffer from, loglin_buffer log_decay,
                        loglin_buffer to) {
    const loglin_panel *p = &tape->panel;
    loglin_tape_launch(tape, KERNEL_chunk_keep, (size_t)p->sequences * p->heads, p->dim_k, p->dim_v,
                       ARGUMENTS(BUFFER(call->in.cu_seqlens), BUFFER(call->initial.position), BUFFER(from),
                                 BUFFER(log_decay), BUFFER(to)));
}

static void launch_lanes(loglin_tape *tape, portable_kernel kernel, size_t lanes, size_t items,
                         const loglin_argument *arguments) {
    const size_t global[3] = {lanes * items, 1, 1}, local[3] = {items, 1, 1};
    loglin_tape_enqueue(tape, (int)kernel, global, local, arguments);
}

static void walk_spread(const loglin_engine_state *state, const loglin_call *call, loglin_buffer workspace,
                        loglin_tape *tape) {
    const lane_shape *shape = &state->shape;
    const size_t items = state->schedule.items;
    const size_t lanes = workspace.offset + state->forward.lanes, pools = workspace.offset + state->forward.pools;
    launch_lanes(tape, KERNEL_portable_own, shape->lanes, items,
                 ARGUMENTS(ULONG(lanes), ULONG(pools), BUFFER(call->in.cu_seqlens), BUFFER(call->in.k),
                           BUFFER(call->in.v), BUFFER(call->in.g), BUFFER(call->initial.values),
                           BUFFER(call->initial.log_decay)));
    launch_lanes(tape, KERNEL_portable_merge, shape->lanes / shape->spread * PORTABLE_SLICES, items,
                 ARGUMENTS(ULONG(lanes), ULONG(pools), BUFFER(call->in.cu_seqlens)));
    launch_lanes(tape, KERNEL_portable_read, shape->lanes, items,
                 ARGUMENTS(ULONG(lanes), ULONG(pools), BUFFER(call->in.cu_seqlens), BUFFER(call->in.q),
                           BUFFER(call->in.k), BUFFER(call->in.v), BUFFER(call->in.g), BUFFER(call->in.level_scales),
                           BUFFER(call->o), BUFFER(call->final.values)));
}

static void walk_with_maps(const loglin_engine_state *state, const loglin_call *call, loglin_buffer workspace,
                           loglin_tape *tape) {
    const lane_shape *shape = &state->shape;
    const size_t heads = shape->lanes / shape->value_parts, items = state->schedule.items;
    const size_t lanes = workspace.offset + state->forward.lanes, maps = workspace.offset + state->forward.maps;
    launch_lanes(tape, KERNEL_portable_maps, heads * shape->map_lanes, items,
                 ARGUMENTS(ULONG(lanes), ULONG(maps), UINT(state->waves), UINT(shape->map_lanes),
                           BUFFER(call->in.cu_seqlens), BUFFER(call->in.q), BUFFER(call->in.k), BUFFER(call->in.g),
                           BUFFER(call->in.level_scales), BUFFER(call->in.beta)));
    launch_lanes(tape, KERNEL_portable_walk, shape->lanes, items,
                 ARGUMENTS(ULONG(lanes), ULONG(maps), UINT(state->waves), BUFFER(call->in.cu_seqlens),
                           BUFFER(call->in.v), BUFFER(call->initial.values), BUFFER(call->initial.log_decay),
                           BUFFER(call->o), BUFFER(call->final.values)));
}

static loglin_status forward(loglin_engine_state *state, const loglin_call *call, loglin_buffer workspace,
                             cl_command_queue queue, cl_uint num_wait, const cl_event *wait, cl_event *event) {
    workspace = align(workspace);
    loglin_tape tape = start(state, call, workspace, queue, num_wait, wait);
    if (state->shape.spread > 0) {
        walk_spread(state, call, workspace, &tape);
    } else if (state->shape.map_lanes > 0) {
        walk_with_maps(state, call, workspace, &tape);
    } else {
        launch_lanes(&tape, KERNEL_portable_forward, state->shape.lanes, state->schedule.items,
                     ARGUMENTS(ULONG(workspace.offset + state->forward.lanes), BUFFER(call->in.cu_seqlens),
                               BUFFER(call->in.q), BUFFER(call->in.k), BUFFER(call->in.v), BUFFER(call->in.g),
                               BUFFER(call->in.level_scales), BUFFER(call->in.beta), BUFFER(call->initial.values),
                               BUFFER(call->initial.log_decay), BUFFER(call->o), BUFFER(call->final.values)));
    }
    if (call->final.values.mem != NULL) {
        if (state->panel.packed) {
            keep_states(&tape, call, call->initial.values, call->initial.log_decay, call->final.values);
        }
        loglin_tape_launch(&tape, KERNEL_chunk_positions, state->panel.sequences, 1, 1,
                           ARGUMENTS(BUFFER(call->in.cu_seqlens), BUFFER(call->initial.position),
                                     BUFFER(call->final.position), BUFFER(call->final.log_decay)));
    }
    return loglin_tape_finish(&tape, event);
}

static loglin_status backward(loglin_engine_state *state, const loglin_call *call, loglin_buffer workspace,
                              cl_command_queue queue, cl_uint num_wait, const cl_event *wait, cl_event *event) {
    if (state->blas != NULL) {
        return loglin_blas_engine.backward(state->blas, call, workspace, queue, num_wait, wait, event);
    }
    workspace = align(workspace);
    const workspace_layout *layout = &state->backward;
    const size_t at = workspace.offset, tokens = state->panel.packed ? 1 : state->panel.sequences;
    loglin_tape tape = start(state, call, workspace, queue, num_wait, wait);
    launch_lanes(&tape, KERNEL_portable_backward, state->backward_shape.lanes, state->schedule.items,
                 ARGUMENTS(ULONG(at + layout->lanes), ULONG(at + layout->q_parts), ULONG(at + layout->k_parts),
                           ULONG(at + layout->g_parts), ULONG(at + layout->beta_parts), ULONG(at + layout->level_parts),
                           BUFFER(call->in.cu_seqlens), BUFFER(call->in.q), BUFFER(call->in.k), BUFFER(call->in.v),
                           BUFFER(call->in.g), BUFFER(call->in.level_scales), BUFFER(call->in.beta),
                           BUFFER(call->initial.values), BUFFER(call->initial.log_decay), BUFFER(call->d_o),
                           BUFFER(call->dfinal_states), BUFFER(call->out.dv), BUFFER(call->out.dinitial_states)));
    loglin_tape_launch(&tape, KERNEL_portable_reduce, tokens * state->panel.length, 1, 1,
                       ARGUMENTS(ULONG(at + layout->q_parts), ULONG(at + layout->k_parts), ULONG(at + layout->g_parts),
                                 ULONG(at + layout->beta_parts), ULONG(at + layout->level_parts), BUFFER(call->in.q),
                                 BUFFER(call->in.k), BUFFER(call->out.dq), BUFFER(call->out.dk), BUFFER(call->out.dg),
                                 BUFFER(call->out.dbeta), BUFFER(call->out.dlevel_scales)));
    if (call->out.dinitial_states.mem != NULL && state->panel.packed) {
        keep_states(&tape, call, call->dfinal_states, (loglin_buffer){0}, call->out.dinitial_states);
    }
    return loglin_tape_finish(&tape, event);
}

/* Both classes are one engine with another count of work-items to a lane. */
#define PORTABLE_ENGINE(of_device, refuses_of_device)                                                                  \
    {                                                                                                                  \
        .name = "fused (" of_device ")", .refuses = (refuses_of_device), .create = create, .destroy = destroy,         \
        .backward_remark = backward_remark, .workspace_size = workspace_size, .forward = forward,                      \
        .backward = backward,                                                                                          \
    }

const loglin_engine_class loglin_cpu_engine = PORTABLE_ENGINE("cpu", cpu_refuses);
const loglin_engine_class loglin_gpu_engine = PORTABLE_ENGINE("gpu", gpu_refuses);
