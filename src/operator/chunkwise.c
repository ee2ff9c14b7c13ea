/* SPDX-License-Identifier: Apache-2.0 */
#include "operator/chunkwise.h"

static size_t head_matrices(const loglin_tape *tape) {
    return (size_t)tape->panel.slots * tape->panel.heads;
}

static size_t group_matrices(const loglin_tape *tape) {
    return (size_t)tape->panel.slots * tape->panel.groups;
}

static void gather_values(loglin_tape *tape, loglin_buffer from, int region) {
    const loglin_panel *p = &tape->panel;
    loglin_tape_launch(tape, CHUNK_gather_v, p->dim_v, p->chunk, head_matrices(tape),
                       ARGUMENTS(BUFFER(from), ULONG(p->at[region])));
}

static void gather(loglin_tape *tape, const loglin_call *call) {
    const loglin_panel *p = &tape->panel;
    if (call->normalize) {
        loglin_tape_launch(tape, CHUNK_norms, p->chunk, 1, group_matrices(tape),
                           ARGUMENTS(BUFFER(call->in.q), BUFFER(call->in.k)));
    }
    loglin_tape_launch(tape, CHUNK_gather_qk, p->dim_k, p->chunk, group_matrices(tape),
                       ARGUMENTS(BUFFER(call->in.q), BUFFER(call->in.k), UINT(call->normalize)));
    gather_values(tape, call->in.v, REGION_V);
    loglin_tape_launch(tape, CHUNK_gather_gates, head_matrices(tape), 1, 1,
                       ARGUMENTS(BUFFER(call->in.g), BUFFER(call->in.beta)));
}

void loglin_chunkwise_states(loglin_tape *tape, const loglin_operator *rule, const loglin_call *call) {
    const loglin_panel *p = &tape->panel;
    gather(tape, call);
    loglin_tape_product(
        tape, (loglin_product){.c = REGION_QK, .a = REGION_Q, .b = REGION_KEY, .transpose_b = true, .alpha = 1.0f});
    if (p->delta) {
        loglin_tape_product(
            tape,
            (loglin_product){.c = REGION_KK, .a = REGION_KEY, .b = REGION_KEY, .transpose_b = true, .alpha = 1.0f});
    }
    rule->map(tape);
    if (p->columns > 0) {
        loglin_tape_product(
            tape,
            (loglin_product){.c = REGION_OWN, .a = REGION_WRITE, .b = REGION_V, .transpose_a = true, .alpha = 1.0f});
        loglin_tape_launch(tape, CHUNK_begin, p->dim_v, p->dim_k, head_matrices(tape),
                           ARGUMENTS(BUFFER(call->initial.values), BUFFER(call->initial.log_decay)));
        rule->walk(tape);
    }
}

static void weigh(loglin_tape *tape, const loglin_call *call, int from, int to) {
    const loglin_panel *p = &tape->panel;
    loglin_tape_launch(tape, CHUNK_weigh, p->chunk, p->chunk, head_matrices(tape),
                       ARGUMENTS(BUFFER(call->in.level_scales), ULONG(p->at[from]), ULONG(p->at[to])));
}

static void weigh_near(loglin_tape *tape, const loglin_call *call, int from, int to) {
    const loglin_panel *p = &tape->panel;
    loglin_tape_launch(tape, CHUNK_weigh_near, p->chunk, p->chunk, head_matrices(tape),
                       ARGUMENTS(BUFFER(call->in.level_scales), ULONG(p->at[from]), ULONG(p->at[to])));
}

/* MZ, MZ_NEAR and Y: all that the output is a sum of. */
static void reads(loglin_tape *tape, const loglin_call *call) {
    weigh(tape, call, REGION_Z, REGION_MZ);
    if (tape->panel.near) {
        loglin_tape_product(tape, (loglin_product){.c = REGION_Z_NEAR,
                                                   .a = REGION_READ,
                                                   .b = REGION_WRITE,
                                                   .transpose_b = true,
                                                   .alpha = 1.0f,
                                                   .b_before = true});
        weigh_near(tape, call, REGION_Z_NEAR, REGION_MZ_NEAR);
    }
    if (tape->panel.columns > 0) {
        loglin_tape_product(tape, (loglin_product){.c = REGION_Y, .a = REGION_READ, .b = REGION_E, .alpha = 1.0f});
    }
}

/* WRITE_NEAR: the keys of the chunk before, through this chunk. */
static void near_keys(loglin_tape *tape) {
    const loglin_panel *p = &tape->panel;
    loglin_tape_launch(tape, CHUNK_near_keys, p->dim_k, p->chunk, head_matrices(tape), ARGUMENTS(UINT(0)));
    if (p->delta) {
        loglin_tape_product(tape, (loglin_product){.c = REGION_M_NEAR,
                                                   .a = REGION_WRITE,
                                                   .b = REGION_K_START,
                                                   .transpose_b = true,
                                                   .alpha = 1.0f,
                                                   .a_before = true});
        loglin_tape_product(
            tape, (loglin_product){
                      .c = REGION_WRITE_NEAR, .a = REGION_M_NEAR, .b = REGION_WRITE, .alpha = -1.0f, .beta = 1.0f});
    }
}

void loglin_chunkwise_outputs(loglin_tape *tape, const loglin_call *call) {
    const loglin_panel *p = &tape->panel;
    reads(tape, call);
    loglin_tape_product(tape, (loglin_product){.c = REGION_O, .a = REGION_MZ, .b = REGION_V, .alpha = 1.0f});
    if (tape->panel.near) {
        loglin_tape_product(
            tape,
            (loglin_product){
                .c = REGION_O, .a = REGION_MZ_NEAR, .b = REGION_V, .alpha = 1.0f, .beta = 1.0f, .b_before = true});
    }
    loglin_tape_launch(tape, CHUNK_combine, p->dim_v, p->chunk, head_matrices(tape),
                       ARGUMENTS(BUFFER(call->in.level_scales), BUFFER(call->o)));
    if (call->final.values.mem != NULL) {
        if (tape->panel.near) {
            near_keys(tape);
        }
        loglin_tape_launch(tape, CHUNK_final, p->dim_v, p->dim_k, head_matrices(tape),
                           ARGUMENTS(BUFFER(call->final.values)));
    }
}

static void zero(loglin_tape *tape, int region) {
    const loglin_region_shape shape = loglin_region_shape_of(&tape->panel, region);
    const size_t at = tape->panel.at[region], count = shape.rows * shape.columns;
    loglin_tape_launch(tape, CHUNK_carry, count, 1, tape->panel.slots * shape.count,
                       ARGUMENTS(ULONG(at), ULONG(at), UINT(count), UINT(CARRY_ZERO)));
}

/* D_MZ, D_MZ_NEAR, D_V, D_READ and D_E from dO; dlevel_scales on the way. */
static void read_gradients(loglin_tape *tape, const loglin_call *call) {
    const loglin_panel *p = &tape->panel;
    const bool near = tape->panel.near;
    gather_values(tape, call->d_o, REGION_D_O);
    loglin_tape_product(
        tape, (loglin_product){.c = REGION_D_MZ, .a = REGION_D_O, .b = REGION_V, .transpose_b = true, .alpha = 1.0f});
    if (near) {
        loglin_tape_product(tape, (loglin_product){.c = REGION_D_MZ_NEAR,
                                                   .a = REGION_D_O,
                                                   .b = REGION_V,
                                                   .transpose_b = true,
                                                   .alpha = 1.0f,
                                                   .b_before = true});
    }
    if (call->out.dlevel_scales.mem != NULL) {
        loglin_tape_launch(tape, CHUNK_level_gradients, p->chunk, 1, head_matrices(tape),
                           ARGUMENTS(BUFFER(call->out.dlevel_scales)));
    }
    weigh(tape, call, REGION_D_MZ, REGION_D_MZ);
    loglin_tape_product(
        tape, (loglin_product){.c = REGION_D_V, .a = REGION_MZ, .b = REGION_D_O, .transpose_a = true, .alpha = 1.0f});
    if (p->columns > 0) {
        loglin_tape_launch(tape, CHUNK_spread, p->dim_v, p->chunk, head_matrices(tape),
                           ARGUMENTS(BUFFER(call->in.level_scales)));
        loglin_tape_product(
            tape,
            (loglin_product){.c = REGION_D_READ, .a = REGION_Y, .b = REGION_E, .transpose_b = true, .alpha = 1.0f});
        loglin_tape_product(
            tape,
            (loglin_product){.c = REGION_D_E, .a = REGION_READ, .b = REGION_Y, .transpose_a = true, .alpha = 1.0f});
    } else {
        zero(tape, REGION_D_READ);
    }
    if (near) {
        weigh_near(tape, call, REGION_D_MZ_NEAR, REGION_D_MZ_NEAR);
        loglin_tape_product(tape, (loglin_product){.c = REGION_D_READ,
                                                   .a = REGION_D_MZ_NEAR,
                                                   .b = REGION_WRITE,
                                                   .alpha = 1.0f,
                                                   .beta = 1.0f,
                                                   .b_before = true});
    }
}

/* D_WRITE, D_V and D_K_START through the states. */
static void state_gradients(loglin_tape *tape, const loglin_operator *rule, const loglin_call *call) {
    const loglin_panel *p = &tape->panel;
    zero(tape, REGION_D_WRITE);
    if (p->delta) {
        zero(tape, REGION_D_K_START);
    }
    if (p->columns == 0) {
        return;
    }
    rule->retreat(tape, call->dfinal_states);
    loglin_tape_product(
        tape,
        (loglin_product){
            .c = REGION_D_WRITE, .a = REGION_V, .b = REGION_D_OWN, .transpose_b = true, .alpha = 1.0f, .beta = 1.0f});
    loglin_tape_product(
        tape, (loglin_product){.c = REGION_D_V, .a = REGION_WRITE, .b = REGION_D_OWN, .alpha = 1.0f, .beta = 1.0f});
}

/* What the keys of the chunk before get of this chunk's reads. */
static void near_gradients(loglin_tape *tape) {
    loglin_tape_product(tape, (loglin_product){.c = REGION_D_WRITE,
                                               .a = REGION_D_MZ_NEAR,
                                               .b = REGION_READ,
                                               .transpose_a = true,
                                               .alpha = 1.0f,
                                               .beta = 1.0f,
                                               .c_before = true});
    loglin_tape_product(tape, (loglin_product){.c = REGION_D_V,
                                               .a = REGION_MZ_NEAR,
                                               .b = REGION_D_O,
                                               .transpose_a = true,
                                               .alpha = 1.0f,
                                               .beta = 1.0f,
                                               .c_before = true});
}

/* And of the final states that hold them: the adjoint of near_keys. */
static void near_key_gradients(loglin_tape *tape) {
    const loglin_panel *p = &tape->panel;
    loglin_tape_launch(tape, CHUNK_near_keys, p->dim_k, p->chunk, head_matrices(tape), ARGUMENTS(UINT(1)));
    if (!p->delta) {
        return;
    }
    const loglin_product products[] = {
        {.c = REGION_D_M_NEAR, .a = REGION_D_WRITE_NEAR, .b = REGION_WRITE, .transpose_b = true, .alpha = -1.0f},
        {.c = REGION_D_WRITE,
         .a = REGION_M_NEAR,
         .b = REGION_D_WRITE_NEAR,
         .transpose_a = true,
         .alpha = -1.0f,
         .beta = 1.0f},
        {.c = REGION_D_WRITE, .a = REGION_D_M_NEAR, .b = REGION_K_START, .alpha = 1.0f, .beta = 1.0f, .c_before = true},
        {.c = REGION_D_K_START,
         .a = REGION_D_M_NEAR,
         .b = REGION_WRITE,
         .transpose_a = true,
         .alpha = 1.0f,
         .beta = 1.0f,
         .b_before = true},
    };
    for (size_t i = 0; i < sizeof products / sizeof products[0]; i++) {
        loglin_tape_product(tape, products[i]);
    }
}

static void final_gradients(loglin_tape *tape, const loglin_call *call) {
    const loglin_panel *p = &tape->panel;
    const bool near = tape->panel.near;
    if (near) {
        near_keys(tape);
    }
    loglin_tape_launch(tape, CHUNK_final_to_keys, p->dim_k, p->chunk, head_matrices(tape),
                       ARGUMENTS(BUFFER(call->dfinal_states)));
    loglin_tape_launch(tape, CHUNK_final_to_values, p->dim_v, p->chunk, head_matrices(tape),
                       ARGUMENTS(BUFFER(call->dfinal_states)));
    if (near) {
        near_key_gradients(tape);
    }
}

/* From the adjoints of the chunks' maps to the caller's gradients. */
static void scatter_gradients(loglin_tape *tape, const loglin_call *call) {
    const loglin_panel *p = &tape->panel;
    loglin_tape_launch(tape, CHUNK_scatter_v, p->dim_v, p->chunk, head_matrices(tape),
                       ARGUMENTS(BUFFER(call->out.dv), ULONG(p->at[REGION_D_V])));
    if (call->out.dg.mem != NULL) {
        loglin_tape_launch(tape, CHUNK_gate_gradients, p->chunk, 1, head_matrices(tape), NO_ARGUMENTS);
        loglin_tape_launch(tape, CHUNK_scatter_gates, head_matrices(tape), 1, 1, ARGUMENTS(BUFFER(call->out.dg)));
    }
    if (call->out.dbeta.mem != NULL) {
        loglin_tape_launch(tape, CHUNK_scatter_beta, p->chunk, 1, head_matrices(tape),
                           ARGUMENTS(BUFFER(call->out.dbeta)));
    }
    loglin_tape_launch(tape, CHUNK_pair_gradients, p->chunk, p->chunk, group_matrices(tape), NO_ARGUMENTS);
    loglin_tape_product(tape, (loglin_product){.c = REGION_D_Q, .a = REGION_D_QK, .b = REGION_KEY, .alpha = 1.0f});
    loglin_tape_product(
        tape, (loglin_product){.c = REGION_D_KEY, .a = REGION_D_QK, .b = REGION_Q, .transpose_a = true, .alpha = 1.0f});
    if (p->delta) {
        loglin_tape_product(
            tape, (loglin_product){.c = REGION_D_KEY, .a = REGION_D_KK, .b = REGION_KEY, .alpha = 1.0f, .beta = 1.0f});
    }
    loglin_tape_launch(tape, CHUNK_row_gradients, p->dim_k, p->chunk, group_matrices(tape), NO_ARGUMENTS);
    if (call->normalize) {
        loglin_tape_launch(tape, CHUNK_norm_dots, p->chunk, 1, group_matrices(tape), NO_ARGUMENTS);
    }
    loglin_tape_launch(tape, CHUNK_scatter_qk, p->dim_k, p->chunk, group_matrices(tape),
                       ARGUMENTS(BUFFER(call->out.dq), BUFFER(call->out.dk), UINT(call->normalize)));
}

void loglin_chunkwise_gradients(loglin_tape *tape, const loglin_operator *rule, const loglin_call *call,
                                void (*add_carried)(loglin_tape *tape, void *context), void *context) {
    const loglin_panel *p = &tape->panel;
    const bool dfinal = call->dfinal_states.mem != NULL;
    reads(tape, call);
    read_gradients(tape, call);
    state_gradients(tape, rule, call);
    if (tape->panel.near) {
        near_gradients(tape);
    }
    if (dfinal) {
        final_gradients(tape, call);
    }
    add_carried(tape, context);
    if (p->columns > 0) {
        loglin_tape_launch(tape, CHUNK_decay_gradient, p->dim_k, 1, head_matrices(tape),
                           ARGUMENTS(UINT(dfinal && tape->panel.near)));
        if (call->out.dinitial_states.mem != NULL) {
            loglin_tape_launch(tape, CHUNK_initial_gradient, p->dim_v, p->dim_k, head_matrices(tape),
                               ARGUMENTS(BUFFER(call->out.dinitial_states)));
        }
    }
    rule->map_gradients(tape);
    scatter_gradients(tape, call);
}
