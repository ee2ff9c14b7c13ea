/* SPDX-License-Identifier: Apache-2.0 */
/* The scalar-gated operator: a chunk's map needs no product beyond QK, and states only decay. */
#include "operator/chunkwise.h"

static size_t waves_of(const loglin_tape *tape) {
    return tape->panel.slots / tape->panel.batch_width;
}

static void map(loglin_tape *tape) {
    const loglin_panel *p = &tape->panel;
    const size_t matrices = (size_t)p->slots * p->heads;
    loglin_tape_launch(tape, CHUNK_decay_products, p->chunk, p->chunk, matrices, NO_ARGUMENTS);
    loglin_tape_launch(tape, CHUNK_decay_rows, p->dim_k, p->chunk, matrices, NO_ARGUMENTS);
}

static void walk(loglin_tape *tape) {
    const loglin_panel *p = &tape->panel;
    loglin_tape_launch(tape, CHUNK_walk, p->dim_v, p->dim_k, (size_t)p->batch_width * p->heads,
                       ARGUMENTS(UINT(0), UINT(waves_of(tape))));
}

static void retreat(loglin_tape *tape, loglin_buffer dfinal_states) {
    const loglin_panel *p = &tape->panel;
    loglin_tape_launch(tape, CHUNK_retreat, p->dim_v, p->dim_k, (size_t)p->batch_width * p->heads,
                       ARGUMENTS(BUFFER(dfinal_states), UINT(0), UINT(waves_of(tape)), UINT(1)));
}

static void map_gradients(loglin_tape *tape) {
    (void)tape; /* the adjoints of Z, READ and WRITE are all that gates and keys need */
}

const loglin_operator loglin_mamba2 = {map, walk, retreat, map_gradients};
