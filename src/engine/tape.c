/* SPDX-License-Identifier: Apache-2.0 */
#include "engine/tape.h"

#include "engine/gemm.h"
#include "runtime/status.h"

enum { DELTA = 1, GRAD = 2, LEVELS = 4, NEAR = 8, NORM = 16, FRONT = 32, BACK = 64 };
typedef enum { DIM_1, DIM_2, DIM_C, DIM_K, DIM_V, DIM_JV } region_dimension;
enum { COUNT_HEAD, COUNT_GROUP };

static const struct {
    int count;
    region_dimension rows, columns;
    unsigned when;
} regions[REGION_COUNT] = {
#define LOGLIN_REGION_ROW(name, count, rows, columns, when) {COUNT_##count, DIM_##rows, DIM_##columns, when},
    LOGLIN_REGIONS(LOGLIN_REGION_ROW)
#undef LOGLIN_REGION_ROW
};

static size_t dimension_of(const loglin_panel *panel, region_dimension dimension) {
    switch (dimension) {
    case DIM_1:
        return 1;
    case DIM_2:
        return 2;
    case DIM_C:
        return panel->chunk;
    case DIM_K:
        return panel->dim_k;
    case DIM_V:
        return panel->dim_v;
    default:
        return (size_t)panel->columns * panel->dim_v;
    }
}

loglin_region_shape loglin_region_shape_of(const loglin_panel *panel, int region) {
    return (loglin_region_shape){
        .rows = dimension_of(panel, regions[region].rows),
        .columns = dimension_of(panel, regions[region].columns),
        .count = regions[region].count == COUNT_HEAD ? panel->heads : panel->groups,
    };
}

loglin_region_need loglin_region_need_of(const loglin_panel *panel, int region, bool gradients, bool normalize) {
    const unsigned have = (panel->delta ? DELTA : 0u) | (gradients ? GRAD : 0u) | (panel->columns > 0 ? LEVELS : 0u) |
                          (panel->near ? NEAR : 0u) | (normalize ? NORM : 0u) | FRONT | BACK;
    const unsigned when = regions[region].when;
    return (loglin_region_need){
        .needed = (when & ~have) == 0,
        .front = (when & FRONT) != 0 && panel->near ? 1 : 0,
        .back = (when & BACK) != 0 ? 1 : 0,
    };
}

/* What is enqueued next must see what was enqueued before. */
static void barrier(loglin_tape *tape) {
    if (!tape->in_order && tape->status == LOGLIN_OK) {
        const cl_int code = clEnqueueBarrierWithWaitList(tape->queue, 0, NULL, NULL);
        if (code != CL_SUCCESS) {
            tape->status = loglin_fail(code, "clEnqueueBarrierWithWaitList: %s", loglin_strerror(code));
        }
    }
}

/* Sets one argument, or two for a buffer; counts them on. */
static cl_int set_argument(cl_kernel kernel, const loglin_argument *argument, cl_uint *index) {
    if (argument->kind == ARGUMENT_BUFFER) {
        const cl_ulong offset = argument->buffer.offset;
        const cl_int code = clSetKernelArg(kernel, (*index)++, sizeof(cl_mem),
                                           argument->buffer.mem != NULL ? &argument->buffer.mem : NULL);
        return code != CL_SUCCESS ? code : clSetKernelArg(kernel, (*index)++, sizeof offset, &offset);
    }
    if (argument->kind == ARGUMENT_UINT) {
        const cl_uint number = (cl_uint)argument->number;
        return clSetKernelArg(kernel, (*index)++, sizeof number, &number);
    }
    const cl_ulong number = argument->number;
    return clSetKernelArg(kernel, (*index)++, sizeof number, &number);
}

void loglin_tape_enqueue(loglin_tape *tape, int id, const size_t global[3], const size_t local[3],
                         const loglin_argument *arguments) {
    if (tape->status != LOGLIN_OK || global[0] == 0 || global[1] == 0 || global[2] == 0) {
        return;
    }
    cl_kernel kernel = tape->kernels[id];
    cl_uint index = 0;
    cl_int code = clSetKernelArg(kernel, index++, sizeof tape->panel, &tape->panel);
    if (code == CL_SUCCESS) {
        code = clSetKernelArg(kernel, index++, sizeof(cl_mem), &tape->workspace);
    }
    for (; code == CL_SUCCESS && arguments->kind != ARGUMENT_END; arguments++) {
        code = set_argument(kernel, arguments, &index);
    }
    if (code == CL_SUCCESS) {
        code = clEnqueueNDRangeKernel(tape->queue, kernel, 3, NULL, global, local, 0, NULL, NULL);
    }
    if (code != CL_SUCCESS) {
        tape->status = loglin_fail(code, "kernel %d, argument %u: %s", id, index, loglin_strerror(code));
    }
    barrier(tape);
}

void loglin_tape_launch(loglin_tape *tape, int id, size_t x, size_t y, size_t z, const loglin_argument *arguments) {
    const size_t local[3] = {x <= 16 ? 16 : 64, 1, 1};
    const size_t global[3] = {(x + local[0] - 1) / local[0] * local[0], y, z};
    loglin_tape_enqueue(tape, id, global, local, arguments);
}

loglin_tape loglin_tape_start(const loglin_panel *panel, const cl_kernel *kernels, loglin_buffer workspace,
                              cl_command_queue queue, cl_uint num_wait, const cl_event *wait) {
    loglin_tape tape = {.queue = queue, .workspace = workspace.mem, .kernels = kernels, .panel = *panel};
    tape.panel.table += workspace.offset;
    cl_command_queue_properties properties = 0;
    cl_int code = clGetCommandQueueInfo(queue, CL_QUEUE_PROPERTIES, sizeof properties, &properties, NULL);
    if (code == CL_SUCCESS && num_wait > 0) {
        code = clEnqueueBarrierWithWaitList(queue, num_wait, wait, NULL);
    }
    if (code != CL_SUCCESS) {
        tape.status = loglin_fail(code, "queue: %s", loglin_strerror(code));
    }
    tape.in_order = (properties & CL_QUEUE_OUT_OF_ORDER_EXEC_MODE_ENABLE) == 0;
    return tape;
}

loglin_status loglin_tape_finish(loglin_tape *tape, cl_event *event) {
    if (tape->status == LOGLIN_OK && event != NULL) {
        const cl_int code = clEnqueueMarkerWithWaitList(tape->queue, 0, NULL, event);
        if (code != CL_SUCCESS) {
            return loglin_fail(code, "clEnqueueMarkerWithWaitList: %s", loglin_strerror(code));
        }
    }
    return tape->status;
}

/* A region's matrices from a slot on. */
static loglin_matrix region_matrices(const loglin_tape *tape, int region, size_t first_slot, bool before) {
    const loglin_region_shape shape = loglin_region_shape_of(&tape->panel, region);
    const size_t size = shape.rows * shape.columns;
    const size_t back = before ? tape->panel.batch_width * shape.count * size : 0;
    return (loglin_matrix){
        .mem = tape->workspace,
        .offset = tape->panel.at[region] + first_slot * shape.count * size - back,
        .row = shape.columns,
        .stride = size,
    };
}

void loglin_tape_product(loglin_tape *tape, loglin_product product) {
    if (tape->status != LOGLIN_OK) {
        return;
    }
    const loglin_region_shape a = loglin_region_shape_of(&tape->panel, product.a);
    const loglin_region_shape c = loglin_region_shape_of(&tape->panel, product.c);
    const size_t slots = product.slots > 0 ? product.slots : tape->panel.slots;
    tape->status = loglin_gemm_enqueue(
        &(loglin_gemm){
            .transpose_a = product.transpose_a,
            .transpose_b = product.transpose_b,
            .m = c.rows,
            .n = c.columns,
            .k = product.transpose_a ? a.rows : a.columns,
            .batch = slots * c.count,
            .alpha = product.alpha,
            .beta = product.beta,
            .a = region_matrices(tape, product.a, product.first_slot, product.a_before),
            .b = region_matrices(tape, product.b, product.first_slot, product.b_before),
            .c = region_matrices(tape, product.c, product.first_slot, product.c_before),
        },
        tape->queue);
    barrier(tape);
}
