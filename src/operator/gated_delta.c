/* SPDX-License-Identifier: Apache-2.0 */
/* The gated delta rule: a triangular inverse for every chunk, and states that pass through every chunk in turn. */
#include "operator/chunkwise.h"

static void map(loglin_tape *tape) {
    const loglin_panel *p = &tape->panel;
    const size_t matrices = (size_t)p->slots * p->heads;
    loglin_tape_launch(tape, CHUNK_decay_products, p->chunk, p->chunk, matrices, NO_ARGUMENTS);
    loglin_tape_launch(tape, CHUNK_decay_rows, p->dim_k, p->chunk, matrices, NO_ARGUMENTS);
    loglin_tape_launch(tape, CHUNK_solve, p->chunk, 1, matrices, NO_ARGUMENTS);
    loglin_tape_product(tape, (loglin_product){.c = REGION_Z, .a = REGION_A, .b = REGION_T, .alpha = 1.0f});
    loglin_tape_product(
        tape, (loglin_product){.c = REGION_READ, .a = REGION_Z, .b = REGION_K_START, .alpha = -1.0f, .beta = 1.0f});
    loglin_tape_product(
        tape,
        (loglin_product){.c = REGION_WRITE, .a = REGION_T, .b = REGION_K_END, .transpose_a = true, .alpha = 1.0f});
}

static void walk(loglin_tape *tape) {
    const loglin_panel *p = &tape->panel;
    for (size_t slot = 0; slot < p->slots; slot += p->batch_width) {
        loglin_tape_product(tape, (loglin_product){.c = REGION_E_SEEN,
                                                   .a = REGION_K_START,
                                                   .b = REGION_E,
                                                   .alpha = 1.0f,
                                                   .first_slot = slot,
                                                   .slots = p->batch_width});
        loglin_tape_product(tape, (loglin_product){.c = REGION_E_LOST,
                                                   .a = REGION_WRITE,
                                                   .b = REGION_E_SEEN,
                                                   .transpose_a = true,
                                                   .alpha = 1.0f,
                                                   .first_slot = slot,
                                                   .slots = p->batch_width});
        const size_t wave = slot / p->batch_width;
        loglin_tape_launch(tape, CHUNK_walk, p->dim_v, p->dim_k, (size_t)p->batch_width * p->heads,
                           ARGUMENTS(UINT(wave), UINT(wave + 1)));
    }
}

static void retreat(loglin_tape *tape, loglin_buffer dfinal_states) {
    const loglin_panel *p = &tape->panel;
    const size_t lanes = (size_t)p->batch_width * p->heads;
    for (size_t wave = p->slots / p->batch_width; wave-- > 0;) {
        const size_t slot = wave * p->batch_width;
        loglin_tape_launch(tape, CHUNK_retreat, p->dim_v, p->dim_k, lanes,
                           ARGUMENTS(BUFFER(dfinal_states), UINT(wave), UINT(wave + 1), UINT(0)));
        loglin_tape_product(tape, (loglin_product){.c = REGION_D_E_SEEN,
                                                   .a = REGION_WRITE,
                                                   .b = REGION_D_E_END,
                                                   .alpha = 1.0f,
                                                   .first_slot = slot,
                                                   .slots = p->batch_width});
        loglin_tape_product(tape, (loglin_product){.c = REGION_D_E_LOST,
                                                   .a = REGION_K_START,
                                                   .b = REGION_D_E_SEEN,
                                                   .transpose_a = true,
                                                   .alpha = 1.0f,
                                                   .first_slot = slot,
                                                   .slots = p->batch_width});
        loglin_tape_launch(tape, CHUNK_retreat_end, p->dim_v, p->dim_k, lanes, ARGUMENTS(UINT(wave)));
    }
    loglin_tape_product(
        tape, (loglin_product){
                  .c = REGION_D_WRITE, .a = REGION_E_SEEN, .b = REGION_D_E_END, .transpose_b = true, .alpha = -1.0f});
    loglin_tape_product(tape, (loglin_product){.c = REGION_D_K_START,
                                               .a = REGION_D_E_SEEN,
                                               .b = REGION_E,
                                               .transpose_b = true,
                                               .alpha = -1.0f,
                                               .beta = 1.0f});
}

/* Through READ = exp(a) Q - Z K_START, WRITE = T^T K_END, Z = A T and T = (I + X)^-1 diag(beta). */
static void map_gradients(loglin_tape *tape) {
    const loglin_product products[] = {
        {.c = REGION_D_MZ, .a = REGION_D_READ, .b = REGION_K_START, .transpose_b = true, .alpha = -1.0f, .beta = 1.0f},
        {.c = REGION_D_K_START, .a = REGION_Z, .b = REGION_D_READ, .transpose_a = true, .alpha = -1.0f, .beta = 1.0f},
        {.c = REGION_D_T, .a = REGION_K_END, .b = REGION_D_WRITE, .transpose_b = true, .alpha = 1.0f},
        {.c = REGION_D_K_END, .a = REGION_T, .b = REGION_D_WRITE, .alpha = 1.0f},
        {.c = REGION_D_A, .a = REGION_D_MZ, .b = REGION_T, .transpose_b = true, .alpha = 1.0f},
        {.c = REGION_D_T, .a = REGION_A, .b = REGION_D_MZ, .transpose_a = true, .alpha = 1.0f, .beta = 1.0f},
        {.c = REGION_TT, .a = REGION_D_T, .b = REGION_T, .transpose_b = true, .alpha = 1.0f},
        {.c = REGION_D_X, .a = REGION_XINV, .b = REGION_TT, .transpose_a = true, .alpha = -1.0f},
    };
    for (size_t i = 0; i < sizeof products / sizeof products[0]; i++) {
        loglin_tape_product(tape, products[i]);
    }
}

const loglin_operator loglin_gated_delta = {map, walk, retreat, map_gradients};
