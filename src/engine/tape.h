/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What an operator writes its passes on: kernels and products over the panel's regions, enqueued in order.  The first
 * error stays in `status`, and everything behind it is skipped, so a list of passes reads without checks.
 */
#ifndef LOGLIN_ENGINE_TAPE_H
#define LOGLIN_ENGINE_TAPE_H

#include "loglin.h"
#include "panel.h"

#include <stdbool.h>

/* X(name): the kernels of cl/chunk_*.cl. */
#define LOGLIN_CHUNK_KERNELS(X)                                                                                        \
    X(layout)                                                                                                          \
    X(norms)                                                                                                           \
    X(gather_qk)                                                                                                       \
    X(gather_v)                                                                                                        \
    X(gather_gates)                                                                                                    \
    X(scatter_v)                                                                                                       \
    X(norm_dots)                                                                                                       \
    X(scatter_qk)                                                                                                      \
    X(decay_products)                                                                                                  \
    X(decay_rows)                                                                                                      \
    X(solve)                                                                                                           \
    X(weigh)                                                                                                           \
    X(weigh_near)                                                                                                      \
    X(combine)                                                                                                         \
    X(level_gradients)                                                                                                 \
    X(spread)                                                                                                          \
    X(begin)                                                                                                           \
    X(walk)                                                                                                            \
    X(carry)                                                                                                           \
    X(final)                                                                                                           \
    X(keep)                                                                                                            \
    X(positions)                                                                                                       \
    X(retreat)                                                                                                         \
    X(retreat_end)                                                                                                     \
    X(initial_gradient)                                                                                                \
    X(final_to_keys)                                                                                                   \
    X(final_to_values)                                                                                                 \
    X(near_keys)                                                                                                       \
    X(decay_gradient)                                                                                                  \
    X(gate_gradients)                                                                                                  \
    X(scatter_gates)                                                                                                   \
    X(scatter_beta)                                                                                                    \
    X(pair_gradients)                                                                                                  \
    X(row_gradients)

#define LOGLIN_CHUNK_KERNEL_ENUM(name) CHUNK_##name,
typedef enum loglin_chunk_kernel {
    LOGLIN_CHUNK_KERNELS(LOGLIN_CHUNK_KERNEL_ENUM) CHUNK_KERNEL_COUNT
} loglin_chunk_kernel;

typedef struct loglin_tape {
    loglin_status status;
    cl_command_queue queue;
    bool in_order; /* of the queue: otherwise every command is followed by a barrier */
    cl_mem workspace;
    const cl_kernel *kernels;
    loglin_panel panel;
} loglin_tape;

/* Arguments of a kernel behind the panel and the workspace. */
typedef struct loglin_argument {
    enum { ARGUMENT_END, ARGUMENT_BUFFER, ARGUMENT_UINT, ARGUMENT_ULONG } kind;
    loglin_buffer buffer; /* two arguments: the memory, and its element offset */
    size_t number;
} loglin_argument;

#define BUFFER(value) ((loglin_argument){.kind = ARGUMENT_BUFFER, .buffer = (value)})
#define UINT(value) ((loglin_argument){.kind = ARGUMENT_UINT, .number = (value)})
#define ULONG(value) ((loglin_argument){.kind = ARGUMENT_ULONG, .number = (value)})
#define ARGUMENTS(...) ((const loglin_argument[]){__VA_ARGS__, {.kind = ARGUMENT_END}})
#define NO_ARGUMENTS ((const loglin_argument[]){{.kind = ARGUMENT_END}})

/* A tape that starts behind the caller's events; the panel's table lies behind the workspace's start. */
loglin_tape loglin_tape_start(const loglin_panel *panel, const cl_kernel *kernels, loglin_buffer workspace,
                              cl_command_queue queue, cl_uint num_wait, const cl_event *wait);

/* The tape's status; *event, unless NULL, is one of its end. */
loglin_status loglin_tape_finish(loglin_tape *tape, cl_event *event);

/* Enqueues a kernel of the tape's; nothing if there are no work-items. */
void loglin_tape_enqueue(loglin_tape *tape, int id, const size_t global[3], const size_t local[3],
                         const loglin_argument *arguments);

/* The same over x times y times z work-items; x is rounded up to whole work-groups. */
void loglin_tape_launch(loglin_tape *tape, int id, size_t x, size_t y, size_t z, const loglin_argument *arguments);

typedef struct loglin_product {
    int c, a, b; /* regions, the same number of matrices each */
    bool transpose_a, transpose_b;
    float alpha, beta;
    size_t first_slot, slots;          /* slots 0: the whole panel */
    bool a_before, b_before, c_before; /* the operand belongs to the slot one wave before */
} loglin_product;

/* C = alpha op(A) op(B) + beta C for every matrix of the panel's slots. */
void loglin_tape_product(loglin_tape *tape, loglin_product product);

/* Shape of a region's matrices in this panel; matrices of a slot. */
typedef struct loglin_region_shape {
    size_t rows, columns, count;
} loglin_region_shape;

loglin_region_shape loglin_region_shape_of(const loglin_panel *panel, int region);

/* Is the region needed for such a panel, and with how many waves of room before and behind? */
typedef struct loglin_region_need {
    bool needed;
    size_t front, back;
} loglin_region_need;

loglin_region_need loglin_region_need_of(const loglin_panel *panel, int region, bool gradients, bool normalize);

#endif
