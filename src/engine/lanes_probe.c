/* SPDX-License-Identifier: Apache-2.0 */
/* Runs cl/mma_probe.cl: a product by a schedule's instruction, compared with the same on the host. */
#include "engine/lanes.h"

#include "runtime/device.h"
#include "runtime/program.h"
#include "runtime/status.h"

#include <stdio.h>

/* Whole slabs and parts of them. */
enum { ROWS = 80, COLUMNS = 112, DEPTH = 48 };

/* Small whole numbers, exact in every type and product, with nothing alike in neighbouring rows and columns. */
static float element(size_t row, size_t column) {
    const unsigned mixed = ((unsigned)row * 40503u + (unsigned)column * 30011u + 77u) * 2654435761u;
    return (float)(mixed >> 29) - 4.0f;
}

typedef struct probe_buffers {
    cl_mem a, b, c, waves;
} probe_buffers;

static loglin_status make_buffer(const loglin_device *device, size_t size, void *contents, cl_mem *buffer) {
    cl_int code = CL_SUCCESS;
    *buffer = clCreateBuffer(device->context, CL_MEM_READ_WRITE | CL_MEM_COPY_HOST_PTR, size, contents, &code);
    return code == CL_SUCCESS ? LOGLIN_OK : loglin_fail(code, "clCreateBuffer: %s", loglin_strerror(code));
}

static loglin_status make_buffers(const loglin_device *device, probe_buffers *buffers) {
    float a[ROWS * DEPTH], b[DEPTH * COLUMNS], c[ROWS * COLUMNS] = {0};
    cl_uint waves[2] = {0, 0}; /* that the compiler has chosen, and that the instruction needs */
    for (size_t i = 0; i < (size_t)ROWS * DEPTH; i++) {
        a[i] = element(i / DEPTH, i % DEPTH);
    }
    for (size_t i = 0; i < (size_t)DEPTH * COLUMNS; i++) {
        b[i] = element(i % COLUMNS + ROWS, i / COLUMNS);
    }
    RETURN_IF_ERROR(make_buffer(device, sizeof a, a, &buffers->a));
    RETURN_IF_ERROR(make_buffer(device, sizeof b, b, &buffers->b));
    RETURN_IF_ERROR(make_buffer(device, sizeof c, c, &buffers->c));
    return make_buffer(device, sizeof waves, waves, &buffers->waves);
}

static loglin_status compare(cl_command_queue queue, const probe_buffers *buffers) {
    float c[ROWS * COLUMNS];
    cl_uint waves[2];
    RETURN_IF_CL_ERROR(clEnqueueReadBuffer(queue, buffers->c, CL_TRUE, 0, sizeof c, c, 0, NULL, NULL));
    RETURN_IF_CL_ERROR(clEnqueueReadBuffer(queue, buffers->waves, CL_TRUE, 0, sizeof waves, waves, 0, NULL, NULL));
    if (waves[0] != waves[1]) {
        return loglin_fail(LOGLIN_UNSUPPORTED, "sub-groups have %u work-items, expected %u", waves[0], waves[1]);
    }
    for (size_t i = 0; i < (size_t)ROWS * COLUMNS; i++) {
        float expected = 0.0f;
        for (size_t k = 0; k < DEPTH; k++) {
            expected += element(i / COLUMNS, k) * element(i % COLUMNS + ROWS, k);
        }
        if (c[i] != expected) {
            return loglin_fail(LOGLIN_UNSUPPORTED, "row %zu, column %zu of a product is %g, expected %g", i / COLUMNS,
                               i % COLUMNS, (double)c[i], (double)expected);
        }
    }
    return LOGLIN_OK;
}

static loglin_status run(cl_command_queue queue, cl_kernel kernel, size_t items, const probe_buffers *buffers) {
    const cl_mem arguments[] = {buffers->a, buffers->b, buffers->c, buffers->waves};
    for (cl_uint i = 0; i < sizeof arguments / sizeof arguments[0]; i++) {
        RETURN_IF_CL_ERROR(clSetKernelArg(kernel, i, sizeof arguments[i], &arguments[i]));
    }
    RETURN_IF_CL_ERROR(clEnqueueNDRangeKernel(queue, kernel, 1, NULL, &items, &items, 0, NULL, NULL));
    return compare(queue, buffers);
}

static loglin_status run_on_queue(loglin_device *device, cl_kernel kernel, size_t items) {
    cl_int code = CL_SUCCESS;
    cl_command_queue queue = clCreateCommandQueue(device->context, device->id, 0, &code);
    if (code != CL_SUCCESS) {
        return loglin_fail(code, "clCreateCommandQueue: %s", loglin_strerror(code));
    }
    probe_buffers buffers = {NULL, NULL, NULL, NULL};
    loglin_status status = make_buffers(device, &buffers);
    if (status == LOGLIN_OK) {
        status = run(queue, kernel, items, &buffers);
    }
    const cl_mem made[] = {buffers.a, buffers.b, buffers.c, buffers.waves};
    for (size_t i = 0; i < sizeof made / sizeof made[0]; i++) {
        if (made[i] != NULL) {
            clReleaseMemObject(made[i]);
        }
    }
    clReleaseCommandQueue(queue);
    return status;
}

loglin_status loglin_lanes_probe(loglin_device *device, loglin_dtype dtype, const loglin_lane_schedule *schedule) {
    const char *const files[] = {"common.cl",        "portable_items.cl",   "mma_layouts.cl", schedule->mma,
                                 "mma_fragments.cl", "portable_product.cl", "mma_probe.cl",   NULL};
    static const char *const name = "mma_probe";
    char options[LOGLIN_LANE_OPTIONS], all[LOGLIN_LANE_OPTIONS + 32];
    loglin_lanes_options(schedule, options);
    (void)snprintf(all, sizeof all, "-DSTORAGE=%d %s", (int)dtype, options);
    cl_kernel kernel = NULL;
    RETURN_IF_ERROR(loglin_kernels_get(device, files, all, &name, 1, &kernel));
    const loglin_status status = run_on_queue(device, kernel, schedule->items);
    clReleaseKernel(kernel);
    return status;
}
