/* SPDX-License-Identifier: Apache-2.0 */
/* The backward pass of the NVIDIA engine: ten launches, see cl/nvidia_backward.cl. */
#include "engine/nvidia_backward.h"

#include "engine/nvidia.h"
#include "engine/nvidia_launch.h"
#include "plan/problem.h"
#include "runtime/device.h"
#include "runtime/program.h"
#include "runtime/status.h"

#include "../../cl/nvidia_backward_layout.cl"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

/* Work-groups of a kernel whose groups last equally long, one on a multiprocessor, that keep a large device busy. */
static const size_t enough_groups = 120;

/* Those of the sums last differently long: so many, but each with so many heads, where there are enough without. */
static const size_t enough_sum_groups = 2000, enough_sum_turns = 6;

/* X(name): the kernels, in the order of their launches. */
#define BACKWARD_KERNELS(X)                                                                                            \
    X(nb_prepare)                                                                                                      \
    X(nb_since) X(nb_weights) X(nb_sums) X(nb_tree) X(nb_rows) X(nb_tiles) X(nb_crossings) X(nb_gates) X(nb_reduce)

typedef enum backward_kernel {
#define BACKWARD_ENUM(name) KERNEL_##name,
    BACKWARD_KERNELS(BACKWARD_ENUM)
#undef BACKWARD_ENUM
        KERNEL_COUNT
} backward_kernel;

struct loglin_nvidia_backward {
    loglin_nvidia_kernel kernels[KERNEL_COUNT];
    loglin_nvidia_gradients call;
    size_t workspace; /* bytes */
};

/* What the kernels are compiled for. */
typedef struct backward_shape {
    size_t padded_k, tiles_v;
    size_t chunks, chunk_levels;
    size_t unit_bits, unit_count;   /* chunks of a unit of the sums; units of a level */
    size_t sum_turns;               /* heads and tiles of V of a work-group of the sums */
    size_t row_heads, block_heads;  /* heads of a work-group of rows, of tiles */
    size_t row_blocks, head_blocks; /* of a group */
    size_t scale_bytes;             /* of a level scale */
    size_t tile_stages;             /* heads that a work-group of the tiles has room for */
    bool wgmma;
} backward_shape;

const char *loglin_nvidia_backward_refuses(const loglin_problem *problem) {
    return problem->dim_k > 128 || problem->dim_v > 128 ? "dim_k or dim_v is above 128" : NULL;
}

/* ---- Creation ---------------------------------------------------------------------------------------------------- */

/* As few blocks of a group's heads, all alike, as make at least so many work-groups. */
static size_t blocks_of_heads(size_t group_heads, size_t groups, size_t least) {
    size_t blocks = 1;
    while (blocks < group_heads && (groups * blocks < least || group_heads % blocks != 0)) {
        blocks++;
    }
    return blocks;
}

/* Work-groups of the sums that share the rows of a unit. */
static size_t sum_blocks(const loglin_problem *problem, const backward_shape *shape) {
    return ceil_div(problem->heads / problem->groups * shape->tiles_v, shape->sum_turns);
}

/*
 * Blocks of a group's heads such that all turns of work-groups, one on each compute unit, are short; a work-group begins
 * and ends in the time of two heads or so.
 */
static size_t find_tile_blocks(size_t groups, size_t group_heads, size_t units) {
    size_t best = 1, least = SIZE_MAX;
    for (size_t blocks = 1; blocks <= group_heads; blocks++) {
        const size_t time = ceil_div(groups * blocks, units) * (group_heads / blocks + 2);
        if (group_heads % blocks == 0 && time < least) {
            best = blocks;
            least = time;
        }
    }
    return best;
}

static backward_shape find_shape(const loglin_device *device, const loglin_problem *problem, size_t unit_bits) {
    const size_t group_heads = problem->heads / problem->groups;
    backward_shape shape = {
        .padded_k = ceil_div(problem->dim_k, 64) * 64,
        .tiles_v = ceil_div(problem->dim_v, NB_COLUMNS),
        .chunks = ceil_div(problem->length, NB_CHUNK),
        .unit_bits = unit_bits,
        .scale_bytes = problem->weight_dtype == LOGLIN_F32 ? 4 : 2,
    };
    for (size_t last = shape.chunks - 1; last > 0; last /= 2) {
        shape.chunk_levels++;
    }
    shape.unit_count = ceil_div(ceil_div(shape.chunks, 2), (size_t)1 << shape.unit_bits);
    const size_t groups = problem->batch * problem->groups, matrices = group_heads * shape.tiles_v;
    shape.sum_turns = matrices;
    const size_t sums = groups * 2 * ceil_div(shape.chunks, (size_t)1 << shape.unit_bits);
    while (shape.sum_turns > 1 && sums * sum_blocks(problem, &shape) <
                                      (shape.sum_turns > enough_sum_turns ? enough_sum_groups : enough_groups)) {
        shape.sum_turns--;
    }
    shape.sum_turns = ceil_div(matrices, sum_blocks(problem, &shape));
    shape.row_blocks = blocks_of_heads(group_heads, groups * ceil_div(shape.chunks, 2), enough_groups);
    shape.row_heads = group_heads / shape.row_blocks;
    shape.head_blocks = find_tile_blocks(groups * shape.chunks, group_heads, device->info.compute_units);
    shape.block_heads = group_heads / shape.head_blocks;
    return shape;
}

static void lay_out(const loglin_problem *problem, const backward_shape *shape, loglin_nvidia_backward *backward) {
    const size_t chunks = shape->chunks, heads = problem->batch * problem->heads,
                 groups = problem->batch * problem->groups;
    const size_t head_tokens = heads * chunks * NB_CHUNK, group_rows = groups * chunks * NB_CHUNK * shape->padded_k;
    const size_t state = shape->padded_k * NB_COLUMNS * 2, matrices = heads * shape->tiles_v;
    const size_t slices = shape->padded_k / 4;
    size_t end = 0;
    backward->call = (loglin_nvidia_gradients){
        .maps = loglin_nvidia_reserve(&end, ((size_t)NB_MAPS + 1) * 128),
        .queries = loglin_nvidia_reserve(&end, group_rows * 2),
        .keys = loglin_nvidia_reserve(&end, group_rows * 2),
        .gates = loglin_nvidia_reserve(&end, head_tokens * sizeof(float[2])),
        .factors = loglin_nvidia_reserve(&end, head_tokens * sizeof(float[4])),
        .since = loglin_nvidia_reserve(&end, heads * (chunks + 1) * sizeof(float[2])),
        .kept = loglin_nvidia_reserve(&end, heads * chunks * shape->chunk_levels * sizeof(float)),
        .weights = loglin_nvidia_reserve(&end, head_tokens * (1 + shape->chunk_levels) * 2),
        .decays = loglin_nvidia_reserve(&end, heads * chunks * sizeof(float)),
        .states = loglin_nvidia_reserve(&end, matrices * chunks * state),
        .adjoints = loglin_nvidia_reserve(&end, matrices * chunks * state),
        .parts = loglin_nvidia_reserve(&end, matrices * shape->chunk_levels * shape->unit_count * state),
        .crossings = loglin_nvidia_reserve(&end, matrices * slices * chunks * sizeof(float)),
        .level_dots = loglin_nvidia_reserve(&end, heads * chunks * shape->chunk_levels * sizeof(float[NB_LEVEL_DOTS])),
        .suffixes = loglin_nvidia_reserve(&end, heads * chunks * (shape->chunk_levels + 1) * sizeof(float)),
        .dots = loglin_nvidia_reserve(&end, NB_DOTS * head_tokens * sizeof(float)),
        .row_parts = loglin_nvidia_reserve(&end, shape->row_blocks * group_rows * sizeof(float)),
        .query_parts = loglin_nvidia_reserve(&end, shape->head_blocks * group_rows * sizeof(float)),
        .key_parts = loglin_nvidia_reserve(&end, shape->head_blocks * group_rows * sizeof(float)),
        .batch = (unsigned)problem->batch,
        .length = (unsigned)problem->length,
        .chunks = (unsigned)chunks,
        .units = (unsigned)shape->unit_count,
        .scale = problem->scale,
    };
    backward->workspace = loglin_nvidia_workspace(end);
}

static void count_items(const loglin_problem *problem, const backward_shape *shape, loglin_nvidia_backward *backward) {
    const size_t chunks = shape->chunks, heads = problem->batch * problem->heads,
                 groups = problem->batch * problem->groups;
    const size_t matrices = heads * shape->tiles_v, warps = NB_ITEMS / 32, rows = groups * chunks * NB_CHUNK;
    /* Units of adjoints and of states; none for a single chunk. */
    const size_t units = chunks > 1 ? 2 * ceil_div(chunks, (size_t)1 << shape->unit_bits) : 0;
    loglin_nvidia_kernel *kernels = backward->kernels;
    loglin_nvidia_set_launch(&kernels[KERNEL_nb_prepare],
                             2 * rows / (warps * NB_PREPARE_ROWS) + ceil_div(heads * chunks, warps), NB_ITEMS);
    loglin_nvidia_set_launch(&kernels[KERNEL_nb_since], heads, 32);
    loglin_nvidia_set_launch(&kernels[KERNEL_nb_weights],
                             chunks > 1 ? problem->batch * chunks * ceil_div(problem->heads, warps) : 0, NB_ITEMS);
    loglin_nvidia_set_launch(&kernels[KERNEL_nb_sums], groups * units * sum_blocks(problem, shape), NB_ITEMS);
    loglin_nvidia_set_launch(&kernels[KERNEL_nb_tree], chunks > 1 ? matrices * (shape->padded_k / 4) : 0, NB_ITEMS);
    loglin_nvidia_set_launch(&kernels[KERNEL_nb_rows], groups * shape->row_blocks * ceil_div(chunks, 2), NB_ITEMS);
    loglin_nvidia_set_launch(&kernels[KERNEL_nb_tiles], groups * shape->head_blocks * chunks, NB_TILE_ITEMS);
    loglin_nvidia_set_launch(&kernels[KERNEL_nb_crossings], chunks > 1 ? heads : 0, NB_ITEMS);
    loglin_nvidia_set_launch(&kernels[KERNEL_nb_gates],
                             problem->batch * ceil_div(chunks, NB_SPAN) * ceil_div(problem->heads, warps), NB_ITEMS);
    loglin_nvidia_set_launch(&kernels[KERNEL_nb_reduce], 2 * rows / warps, NB_ITEMS);
}

static loglin_status create_kernels(loglin_device *device, const loglin_problem *problem, const backward_shape *shape,
                                    loglin_nvidia_backward *backward) {
#define BACKWARD_NAME(name) #name,
    static const char *const names[KERNEL_COUNT] = {BACKWARD_KERNELS(BACKWARD_NAME)};
#undef BACKWARD_NAME
    static const char *const files[] = {"common.cl",
                                        "mma_nvidia.cl",
                                        "nvidia_backward_layout.cl",
                                        "nvidia_backward.cl",
                                        "nvidia_backward_sums.cl",
                                        "nvidia_backward_rows.cl",
                                        "nvidia_backward_tiles.cl",
                                        "nvidia_backward_ends.cl",
                                        NULL};
    char options[576]; /* 16 numbers of at most 20 digits and their names */
    (void)snprintf(options, sizeof options,
                   "-DNV_K=%zu -DDIM_K=%zu -DDIM_V=%zu -DHEADS=%zu -DGROUPS=%zu -DLEVELS=%zu -DCHUNK_LEVELS=%zu"
                   " -DNORMALIZE=%d -DSTORAGE=%d -DWEIGHT_STORAGE=%d -DUNIT_BITS=%zu"
                   " -DSUM_TURNS=%zu -DROW_HEADS=%zu -DBLOCK_HEADS=%zu -DTILE_STAGES=%zu %s",
                   shape->padded_k, problem->dim_k, problem->dim_v, problem->heads, problem->groups, problem->levels,
                   shape->chunk_levels, problem->normalize_qk != 0, (int)problem->dtype, (int)problem->weight_dtype,
                   shape->unit_bits, shape->sum_turns, shape->row_heads, shape->block_heads, shape->tile_stages,
                   shape->wgmma ? LOGLIN_HIDDEN_INSTRUCTIONS : "");
    return loglin_nvidia_kernels_get(device, files, options, names, KERNEL_COUNT, backward->kernels);
}

/* Local memory of the sums: a unit's rows of q or k and of v or dO, and its weights; a state on its way to the other half. */
static size_t sums_bytes(const backward_shape *shape) {
    const size_t unit = (size_t)1 << shape->unit_bits, slots = shape->chunk_levels > 2 ? shape->chunk_levels : 2;
    const size_t state = shape->padded_k * NB_COLUMNS * 2, others = 128; /* what is not in registers */
    return unit * NB_CHUNK * (shape->padded_k + NB_COLUMNS + slots) * 2 + state + others;
}

/* Local memory of a work-group of the rows. */
static size_t rows_bytes(const backward_shape *shape) {
    const size_t state = shape->padded_k * NB_COLUMNS * 2, slots = shape->chunk_levels > 0 ? shape->chunk_levels : 1;
    const size_t d_o = (size_t)16 * NB_COLUMNS * 2, scales = 16 * (slots | 1) * sizeof(float);
    const size_t warp = 2 * (d_o + sizeof(float[16][2]) + slots * sizeof(float)) + 3 * scales + 16;
    return NB_ROW_STAGES * (state + 16) + NB_ITEMS / 32 * warp;
}

/* And of the tiles. */
static size_t tiles_bytes(const backward_shape *shape) {
    const size_t chunk = NB_CHUNK, row = (size_t)NB_COLUMNS * 2, tile = NB_TILE * row,
                 level = (chunk + 4) * sizeof(float);
    const size_t head = shape->tiles_v * (2 * chunk + shape->padded_k) * row + chunk * sizeof(float[6]);
    const size_t scales = chunk * (NB_SCALES * shape->scale_bytes + (shape->wgmma ? 16 : 0));
    const size_t dots = 12 * level + sizeof(float[3][NB_TILE]) + sizeof(float[2][16]);
    const size_t others = 640; /* places and arrivals */
    return shape->tile_stages * (head + scales + dots) + scales + chunk * shape->padded_k * 2 + 6 * tile + others;
}

/* The most that a work-group takes. */
static size_t local_bytes(const backward_shape *shape) {
    const size_t sums = sums_bytes(shape), rows = rows_bytes(shape), tiles = tiles_bytes(shape);
    const size_t more = rows > tiles ? rows : tiles;
    return sums > more ? sums : more;
}

/* wgmma where it is; units of four chunks and two heads at a time where local memory has room for them, else fewer. */
static loglin_status choose_shape(loglin_device *device, const loglin_problem *problem, backward_shape *shape) {
    loglin_status status = LOGLIN_UNSUPPORTED;
    for (size_t i = 8; status == LOGLIN_UNSUPPORTED && i-- > 0;) {
        *shape = find_shape(device, problem, 1 + i % 4 / 2);
        shape->tile_stages = 1 + i % 2;
        shape->wgmma = i >= 4;
        const size_t bytes = local_bytes(shape);
        if (bytes <= NV_MOST_LOCAL || i % 4 == 0) {
            status = shape->wgmma ? loglin_nvidia_probe_wgmma(device, problem->dtype, bytes)
                                  : loglin_nvidia_probe(device, problem->dtype, bytes);
        }
    }
    return status;
}

loglin_status loglin_nvidia_backward_create(loglin_device *device, const loglin_problem *problem,
                                            loglin_nvidia_backward **backward) {
    backward_shape shape;
    RETURN_IF_ERROR(choose_shape(device, problem, &shape));
    loglin_nvidia_backward *made = calloc(1, sizeof *made);
    if (made == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "NVIDIA engine: out of host memory");
    }
    lay_out(problem, &shape, made);
    count_items(problem, &shape, made);
    const loglin_status status = create_kernels(device, problem, &shape, made);
    if (status != LOGLIN_OK) {
        loglin_nvidia_backward_destroy(made);
        return status;
    }
    *backward = made;
    return LOGLIN_OK;
}

void loglin_nvidia_backward_destroy(loglin_nvidia_backward *backward) {
    if (backward == NULL) {
        return;
    }
    loglin_nvidia_kernels_release(backward->kernels, KERNEL_COUNT);
    free(backward);
}

size_t loglin_nvidia_backward_workspace(const loglin_nvidia_backward *backward) {
    return backward->workspace;
}

/* ---- Execution --------------------------------------------------------------------------------------------------- */

static loglin_status enqueue(const loglin_nvidia_backward *backward, loglin_nvidia_run *run, const loglin_call *call,
                             cl_event *event) {
    const loglin_nvidia_kernel *kernels = backward->kernels;
    const loglin_inputs *in = &call->in;
    const loglin_gradients *out = &call->out;
    const cl_uint inputs_are = loglin_nvidia_is_aligned(in->v) && loglin_nvidia_is_aligned(call->d_o);
    const cl_uint all_are = inputs_are | (cl_uint)loglin_nvidia_is_aligned(out->dv) << 1 |
                            (cl_uint)loglin_nvidia_is_aligned(in->level_scales) << 2;
    const loglin_nvidia_argument inputs_aligned = {sizeof inputs_are, &inputs_are};
    const loglin_nvidia_argument all_aligned = {sizeof all_are, &all_are};
    const loglin_buffer prepare[] = {in->q, in->k, in->g};
    const loglin_buffer since[] = {in->v, call->d_o, out->dv, in->level_scales};
    const loglin_buffer sums[] = {in->v, call->d_o};
    const loglin_buffer rows[] = {call->d_o, in->level_scales, out->dlevel_scales};
    const loglin_buffer tiles[] = {in->v, call->d_o, in->level_scales, out->dv, out->dlevel_scales};
    const loglin_buffer reduce[] = {in->q, in->k, out->dq, out->dk};
    RETURN_IF_ERROR(loglin_nvidia_launch(run, &kernels[KERNEL_nb_prepare], prepare, 3, NULL, NULL));
    RETURN_IF_ERROR(loglin_nvidia_launch(run, &kernels[KERNEL_nb_since], since, 4, NULL, NULL));
    RETURN_IF_ERROR(loglin_nvidia_launch(run, &kernels[KERNEL_nb_weights], &in->level_scales, 1, NULL, NULL));
    RETURN_IF_ERROR(loglin_nvidia_launch(run, &kernels[KERNEL_nb_sums], sums, 2, &inputs_aligned, NULL));
    RETURN_IF_ERROR(loglin_nvidia_launch(run, &kernels[KERNEL_nb_tree], NULL, 0, NULL, NULL));
    RETURN_IF_ERROR(loglin_nvidia_launch(run, &kernels[KERNEL_nb_rows], rows, 3, &inputs_aligned, NULL));
    RETURN_IF_ERROR(loglin_nvidia_launch(run, &kernels[KERNEL_nb_tiles], tiles, 5, &all_aligned, NULL));
    if (out->dg.mem != NULL) {
        RETURN_IF_ERROR(loglin_nvidia_launch(run, &kernels[KERNEL_nb_crossings], NULL, 0, NULL, NULL));
        RETURN_IF_ERROR(loglin_nvidia_launch(run, &kernels[KERNEL_nb_gates], &out->dg, 1, NULL, NULL));
    }
    return loglin_nvidia_launch(run, &kernels[KERNEL_nb_reduce], reduce, 4, NULL, event);
}

loglin_status loglin_nvidia_backward_enqueue(loglin_nvidia_backward *backward, const loglin_call *call,
                                             loglin_buffer workspace, cl_command_queue queue, cl_uint num_wait,
                                             const cl_event *wait, cl_event *event) {
    loglin_nvidia_run run;
    RETURN_IF_ERROR(
        loglin_nvidia_begin(&backward->call, sizeof backward->call, workspace, queue, num_wait, wait, &run));
    return enqueue(backward, &run, call, event);
}
