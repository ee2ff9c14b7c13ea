/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The blas engine: every pass is a kernel or a batch of CLBlast products over a panel of chunks, and a call goes panel by
 * panel.  The intermediate results of one panel are in memory at a time; the level states go from panel to panel.  The
 * backward call goes through the panels twice: forwards to save the states at each panel's start, then backwards.
 */
#include "engine/engine.h"
#include "engine/gemm.h"
#include "plan/problem.h"
#include "runtime/program.h"
#include "runtime/status.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>

/* Slots times heads of a panel: a launch's third dimension, which some drivers limit to 65535. */
static const size_t max_matrices = 65535;

/* The panel's shape and the workspace's layout for one phase. */
typedef struct phase_layout {
    loglin_panel panel; /* at[] and table from the workspace's start */
    size_t tiles, panel_waves, panels;
    size_t slots;                         /* of the whole call */
    size_t saved_e, saved_v, saved_write; /* backward: what each panel starts from */
    size_t carried_v, carried_write;      /* backward: matrices of a wave */
    size_t regions, floats;               /* the regions are what CLBlast reaches */
} phase_layout;

struct loglin_engine_state {
    const loglin_operator *rule;
    bool normalize, packed;
    cl_kernel kernels[CHUNK_KERNEL_COUNT];
    phase_layout forward, backward;
};

static size_t minimum(size_t a, size_t b) {
    return a < b ? a : b;
}

static size_t maximum(size_t a, size_t b) {
    return a > b ? a : b;
}

/* ---- Layout ------------------------------------------------------------------------------------------------------ */

static size_t matrix_floats(const loglin_panel *panel, int region) {
    const loglin_region_shape shape = loglin_region_shape_of(panel, region);
    return shape.rows * shape.columns * shape.count;
}

/* Floats of all regions for a panel of so many waves; sets at[]. */
static size_t place_regions(loglin_panel *panel, size_t waves, bool gradients, bool normalize) {
    size_t end = 0;
    for (int region = 0; region < REGION_COUNT; region++) {
        const loglin_region_need need = loglin_region_need_of(panel, region, gradients, normalize);
        const size_t wave = matrix_floats(panel, region) * panel->batch_width;
        panel->at[region] = end + (need.needed ? need.front * wave : 0);
        end += need.needed ? (need.front + waves + need.back) * wave : 0;
    }
    return end;
}

static size_t reserve(size_t *end, size_t floats) {
    const size_t at = *end;
    *end += floats;
    return at;
}

/* panel_budget: bytes of intermediate results that a panel should not exceed. */
static loglin_status lay_out(const loglin_problem *problem, size_t panel_budget, bool gradients, phase_layout *layout) {
    loglin_panel panel = loglin_panel_of(problem);
    const size_t waves = loglin_count_waves(problem), sequences = panel.packed ? 1 : panel.sequences;
    panel.batch_width = 1;
    const size_t slot_bytes = place_regions(&panel, 1, gradients, problem->normalize_qk) * sizeof(float);
    /* Side by side as many sequences as leave room for some waves; at least as many waves as there are states. */
    const size_t least_waves = minimum(waves, gradients ? panel.columns + 1u : 1u);
    const size_t most_slots = maximum(1, minimum(panel_budget / slot_bytes, max_matrices / panel.heads));
    const size_t some_waves = maximum(1, maximum(least_waves, minimum(waves, 8)));
    panel.batch_width = (unsigned)maximum(1, minimum(sequences, most_slots / some_waves));
    panel.waves = (unsigned)waves;
    const size_t most_waves = max_matrices / ((size_t)panel.batch_width * panel.heads);
    const size_t wanted_waves = minimum(waves, maximum(least_waves, most_slots / panel.batch_width));
    layout->panel_waves = maximum(1, minimum(wanted_waves, most_waves));
    layout->panels = (waves + layout->panel_waves - 1) / layout->panel_waves;
    layout->tiles = (sequences + panel.batch_width - 1) / panel.batch_width;
    layout->slots = layout->tiles * waves * panel.batch_width;
    panel.slots = (unsigned)(layout->panel_waves * panel.batch_width);

    size_t end = place_regions(&panel, layout->panel_waves, gradients, problem->normalize_qk);
    if (end > (size_t)INT_MAX) {
        return loglin_fail(LOGLIN_UNSUPPORTED,
                           "problem: one panel of the blas engine takes %zu floats, expected below 2^31 (a limit of "
                           "CLBlast): use fewer heads or smaller dim_k, dim_v",
                           end);
    }
    layout->regions = end;
    if (gradients) {
        const size_t saves = layout->panels > 1 ? layout->panels : 0;
        const size_t e = panel.columns > 0 ? matrix_floats(&panel, REGION_E) * panel.batch_width : 0;
        const size_t v = matrix_floats(&panel, REGION_V) * panel.batch_width;
        const size_t write = matrix_floats(&panel, REGION_WRITE) * panel.batch_width;
        layout->saved_e = reserve(&end, saves * e);
        layout->saved_v = reserve(&end, saves * panel.near * v);
        layout->saved_write = reserve(&end, saves * panel.near * write);
        layout->carried_v = reserve(&end, panel.near * v);
        layout->carried_write = reserve(&end, panel.near * write);
    }
    panel.table = reserve(&end, layout->slots * SLOT_INTS);
    layout->floats = end;
    layout->panel = panel;
    return LOGLIN_OK;
}

/* ---- Creation ---------------------------------------------------------------------------------------------------- */

static void destroy(loglin_engine_state *state) {
    if (state == NULL) {
        return;
    }
    for (int i = 0; i < CHUNK_KERNEL_COUNT; i++) {
        if (state->kernels[i] != NULL) {
            clReleaseKernel(state->kernels[i]);
        }
    }
    free(state);
}

static loglin_status create_kernels(loglin_device *device, const loglin_problem *problem, loglin_engine_state *state) {
    static const char *const names[CHUNK_KERNEL_COUNT] = {
#define LOGLIN_CHUNK_KERNEL_NAME(name) "chunk_" #name,
        LOGLIN_CHUNK_KERNELS(LOGLIN_CHUNK_KERNEL_NAME)
#undef LOGLIN_CHUNK_KERNEL_NAME
    };
    static const char *const files[] = {
        "panel.cl",           "common.cl",       "chunk_layout.cl",   "chunk_gather.cl",    "chunk_levels.cl",
        "chunk_operators.cl", "chunk_states.cl", "chunk_adjoints.cl", "chunk_gradients.cl", NULL};
    char options[128];
    (void)snprintf(options, sizeof options, "-DSTORAGE=%d -DWEIGHT_STORAGE=%d -DSTRONG=%d", (int)problem->dtype,
                   (int)problem->weight_dtype, problem->partition == LOGLIN_STRONG);
    return loglin_kernels_get(device, files, options, names, CHUNK_KERNEL_COUNT, state->kernels);
}

static loglin_status prepare(loglin_device *device, const loglin_problem *problem,
                             const loglin_configuration *configuration, loglin_engine_state *state) {
    const size_t panel_budget = (size_t)configuration->values[LOGLIN_TUNABLE_PANEL_MIB] << 20;
    RETURN_IF_ERROR(lay_out(problem, panel_budget, false, &state->forward));
    if ((problem->phases & LOGLIN_BACKWARD) != 0) {
        RETURN_IF_ERROR(lay_out(problem, panel_budget, true, &state->backward));
    }
    RETURN_IF_ERROR(create_kernels(device, problem, state));
    return loglin_gemm_prepare(device, &configuration->gemm);
}

static loglin_status create(loglin_device *device, const loglin_problem *problem,
                            const loglin_configuration *configuration, loglin_engine_state **state) {
    loglin_engine_state *made = calloc(1, sizeof *made);
    if (made == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "blas engine: out of host memory");
    }
    made->rule = problem->op == LOGLIN_GATED_DELTA ? &loglin_gated_delta : &loglin_mamba2;
    made->normalize = problem->normalize_qk != 0;
    made->packed = problem->sequences > 0;
    const loglin_status status = prepare(device, problem, configuration, made);
    if (status != LOGLIN_OK) {
        destroy(made);
        return status;
    }
    *state = made;
    return LOGLIN_OK;
}

static size_t workspace_size(const loglin_engine_state *state, loglin_phase phase) {
    return (phase == LOGLIN_BACKWARD ? state->backward.floats : state->forward.floats) * sizeof(float);
}

/* ---- Execution --------------------------------------------------------------------------------------------------- */

/* Before anything is enqueued: a product would fail behind other commands. */
static loglin_status check_reach(const phase_layout *layout, loglin_buffer workspace) {
    const size_t most = (size_t)INT_MAX - layout->regions;
    if (workspace.offset > most) {
        return loglin_fail(LOGLIN_UNSUPPORTED, "workspace.offset is %zu, expected at most %zu (CLBlast counts in int)",
                           workspace.offset, most);
    }
    return LOGLIN_OK;
}

/* A tape on the workspace, started behind the caller's events, with the slot table filled in. */
static loglin_tape start(loglin_engine_state *state, const phase_layout *layout, const loglin_call *call,
                         loglin_buffer workspace, cl_command_queue queue, cl_uint num_wait, const cl_event *wait) {
    loglin_tape tape = loglin_tape_start(&layout->panel, state->kernels, workspace, queue, num_wait, wait);
    for (int region = 0; region < REGION_COUNT; region++) {
        tape.panel.at[region] += workspace.offset;
    }
    loglin_tape_launch(&tape, CHUNK_layout, layout->slots, 1, 1,
                       ARGUMENTS(BUFFER(call->in.cu_seqlens), BUFFER(call->initial.position), UINT(layout->slots)));
    return tape;
}

static void enter_panel(loglin_tape *tape, const phase_layout *layout, size_t tile, size_t panel) {
    const size_t waves = layout->panel.waves, first = panel * layout->panel_waves;
    tape->panel.first_slot = (tile * waves + first) * layout->panel.batch_width;
    tape->panel.slots = (unsigned)(minimum(layout->panel_waves, waves - first) * layout->panel.batch_width);
}

/* The matrices of one wave of a region, between places in the workspace. */
static void carry(loglin_tape *tape, int region, size_t from, size_t to, unsigned how) {
    const loglin_region_shape shape = loglin_region_shape_of(&tape->panel, region);
    const size_t count = shape.rows * shape.columns;
    loglin_tape_launch(tape, CHUNK_carry, count, 1, tape->panel.batch_width * shape.count,
                       ARGUMENTS(ULONG(from), ULONG(to), UINT(count), UINT(how)));
}

/* Where the wave of a region stands; -1 is the one before the panel. */
static size_t wave_at(const loglin_tape *tape, int region, long wave) {
    const size_t size = matrix_floats(&tape->panel, region) * tape->panel.batch_width;
    return wave < 0 ? tape->panel.at[region] - size : tape->panel.at[region] + (size_t)wave * size;
}

static long panel_waves(const loglin_tape *tape) {
    return (long)(tape->panel.slots / tape->panel.batch_width);
}

/* What the first panel of a tile starts from: no states, no chunk before. */
static void begin_tile(loglin_tape *tape) {
    if (tape->panel.columns > 0) {
        carry(tape, REGION_E, 0, wave_at(tape, REGION_E, 0), CARRY_ZERO);
    }
    if (tape->panel.near) {
        carry(tape, REGION_V, 0, wave_at(tape, REGION_V, -1), CARRY_ZERO);
        carry(tape, REGION_WRITE, 0, wave_at(tape, REGION_WRITE, -1), CARRY_ZERO);
    }
}

/* What the next panel starts from: the states behind the last wave, and that wave's keys and values. */
static void leave_panel(loglin_tape *tape) {
    const long waves = panel_waves(tape);
    if (tape->panel.columns > 0) {
        carry(tape, REGION_E, wave_at(tape, REGION_E, waves), wave_at(tape, REGION_E, 0), CARRY_COPY);
    }
    if (tape->panel.near) {
        carry(tape, REGION_V, wave_at(tape, REGION_V, waves - 1), wave_at(tape, REGION_V, -1), CARRY_COPY);
        carry(tape, REGION_WRITE, wave_at(tape, REGION_WRITE, waves - 1), wave_at(tape, REGION_WRITE, -1), CARRY_COPY);
    }
}

/* Sequences without tokens: `to` = `from` where its levels exist. */
static void keep_states(loglin_tape *tape, const loglin_call *call, loglin_buffer from, loglin_buffer log_decay,
                        loglin_buffer to) {
    const loglin_panel *p = &tape->panel;
    loglin_tape_launch(tape, CHUNK_keep, (size_t)p->sequences * p->heads, p->dim_k, p->dim_v,
                       ARGUMENTS(BUFFER(call->in.cu_seqlens), BUFFER(call->initial.position), BUFFER(from),
                                 BUFFER(log_decay), BUFFER(to)));
}

static loglin_status forward(loglin_engine_state *state, const loglin_call *call, loglin_buffer workspace,
                             cl_command_queue queue, cl_uint num_wait, const cl_event *wait, cl_event *event) {
    const phase_layout *layout = &state->forward;
    RETURN_IF_ERROR(check_reach(layout, workspace));
    loglin_tape tape = start(state, layout, call, workspace, queue, num_wait, wait);
    for (size_t tile = 0; tile < layout->tiles; tile++) {
        begin_tile(&tape);
        for (size_t panel = 0; panel < layout->panels; panel++) {
            enter_panel(&tape, layout, tile, panel);
            loglin_chunkwise_states(&tape, state->rule, call);
            loglin_chunkwise_outputs(&tape, call);
            leave_panel(&tape);
        }
    }
    if (call->final.values.mem != NULL) {
        if (state->packed) {
            keep_states(&tape, call, call->initial.values, call->initial.log_decay, call->final.values);
        }
        loglin_tape_launch(&tape, CHUNK_positions, tape.panel.sequences, 1, 1,
                           ARGUMENTS(BUFFER(call->in.cu_seqlens), BUFFER(call->initial.position),
                                     BUFFER(call->final.position), BUFFER(call->final.log_decay)));
    }
    return loglin_tape_finish(&tape, event);
}

/* The wave of a region that a panel starts from, saved. */
static size_t saved_at(const loglin_tape *tape, size_t workspace, size_t saved, int region, size_t panel) {
    return workspace + saved + panel * matrix_floats(&tape->panel, region) * tape->panel.batch_width;
}

/* Saves what a panel starts from, or (restore) starts it from there. */
static void save_panel(loglin_tape *tape, const phase_layout *layout, size_t workspace, size_t panel, bool restore) {
    const struct {
        int region;
        long wave;
        size_t saved;
        bool needed;
    } parts[] = {
        {REGION_E, 0, layout->saved_e, tape->panel.columns > 0},
        {REGION_V, -1, layout->saved_v, tape->panel.near},
        {REGION_WRITE, -1, layout->saved_write, tape->panel.near},
    };
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        if (parts[i].needed) {
            const size_t here = wave_at(tape, parts[i].region, parts[i].wave);
            const size_t there = saved_at(tape, workspace, parts[i].saved, parts[i].region, panel);
            carry(tape, parts[i].region, restore ? there : here, restore ? here : there, CARRY_COPY);
        }
    }
}

/* What goes from a panel to the one before it, backwards. */
typedef struct handover {
    const phase_layout *layout;
    size_t workspace;
    bool first; /* the tile's last panel, which is handed nothing */
} handover;

static void add_carried(loglin_tape *tape, void *context) {
    const handover *from = context;
    if (tape->panel.near == 0 || from->first) {
        return;
    }
    const long last = panel_waves(tape) - 1;
    carry(tape, REGION_D_V, from->workspace + from->layout->carried_v, wave_at(tape, REGION_D_V, last), CARRY_ADD);
    carry(tape, REGION_D_WRITE, from->workspace + from->layout->carried_write, wave_at(tape, REGION_D_WRITE, last),
          CARRY_ADD);
}

static void begin_gradients(loglin_tape *tape) {
    if (tape->panel.near) {
        carry(tape, REGION_D_V, 0, wave_at(tape, REGION_D_V, -1), CARRY_ZERO);
        carry(tape, REGION_D_WRITE, 0, wave_at(tape, REGION_D_WRITE, -1), CARRY_ZERO);
    }
}

static void hand_over(loglin_tape *tape, const handover *to) {
    if (tape->panel.columns > 0) {
        carry(tape, REGION_D_E, wave_at(tape, REGION_D_E, 0), wave_at(tape, REGION_D_E, (long)to->layout->panel_waves),
              CARRY_COPY);
    }
    if (tape->panel.near) {
        carry(tape, REGION_D_V, wave_at(tape, REGION_D_V, -1), to->workspace + to->layout->carried_v, CARRY_COPY);
        carry(tape, REGION_D_WRITE, wave_at(tape, REGION_D_WRITE, -1), to->workspace + to->layout->carried_write,
              CARRY_COPY);
    }
}

/* The panels of a tile forwards, for the states that each one starts from. */
static void save_tile(loglin_tape *tape, const loglin_engine_state *state, const loglin_call *call, size_t workspace,
                      size_t tile) {
    const phase_layout *layout = &state->backward;
    for (size_t panel = 0; panel < layout->panels; panel++) {
        enter_panel(tape, layout, tile, panel);
        save_panel(tape, layout, workspace, panel, false);
        if (panel + 1 < layout->panels) {
            loglin_chunkwise_states(tape, state->rule, call);
            leave_panel(tape);
        }
    }
}

static loglin_status backward(loglin_engine_state *state, const loglin_call *call, loglin_buffer workspace,
                              cl_command_queue queue, cl_uint num_wait, const cl_event *wait, cl_event *event) {
    const phase_layout *layout = &state->backward;
    RETURN_IF_ERROR(check_reach(layout, workspace));
    loglin_tape tape = start(state, layout, call, workspace, queue, num_wait, wait);
    for (size_t tile = 0; tile < layout->tiles; tile++) {
        begin_tile(&tape);
        if (layout->panels > 1) {
            save_tile(&tape, state, call, workspace.offset, tile);
        }
        handover between = {layout, workspace.offset, true};
        for (size_t panel = layout->panels; panel-- > 0;) {
            enter_panel(&tape, layout, tile, panel);
            if (layout->panels > 1) {
                save_panel(&tape, layout, workspace.offset, panel, true);
            }
            begin_gradients(&tape);
            loglin_chunkwise_states(&tape, state->rule, call);
            loglin_chunkwise_gradients(&tape, state->rule, call, add_carried, &between);
            hand_over(&tape, &between);
            between.first = false;
        }
    }
    if (call->out.dinitial_states.mem != NULL && state->packed) {
        keep_states(&tape, call, call->dfinal_states, (loglin_buffer){0}, call->out.dinitial_states);
    }
    return loglin_tape_finish(&tape, event);
}

/* It takes every problem; too large a panel is found when the plan lays it out. */
static const char *refuses(const loglin_device *device, const loglin_problem *problem) {
    (void)device;
    (void)problem;
    return NULL;
}

const loglin_engine_class loglin_blas_engine = {
    .name = "blas",
    .refuses = refuses,
    .create = create,
    .destroy = destroy,
    .workspace_size = workspace_size,
    .forward = forward,
    .backward = backward,
};
