/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Log-linear attention on buffers and a queue of one's own.  All gates are 0, all level weights 1, all keys and queries
 * (1, 0, ...), and v_t = 1: then o_t counts the tokens up to t, which this program checks.
 */
#include <loglin.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { LENGTH = 1000, HEADS = 2, DIM_K = 16, DIM_V = 8, LEVELS = 11 };

static void check(loglin_status status, const char *what) {
    if (status != LOGLIN_OK) {
        fprintf(stderr, "%s: %s: %s\n", what, loglin_strerror(status), loglin_last_error());
        exit(1);
    }
}

/* A buffer of floats: ones at every `step`-th element, zeros between them. */
static loglin_buffer upload(cl_context context, size_t count, size_t step) {
    float *values = calloc(count, sizeof *values);
    if (values == NULL) {
        exit(1);
    }
    for (size_t i = 0; i < count; i += step) {
        values[i] = 1.0F;
    }
    cl_int code;
    cl_mem mem =
        clCreateBuffer(context, CL_MEM_READ_WRITE | CL_MEM_COPY_HOST_PTR, count * sizeof *values, values, &code);
    check(code, "clCreateBuffer");
    free(values);
    return (loglin_buffer){.mem = mem};
}

int main(void) {
    cl_device_id id;
    cl_int code;
    check(loglin_select_device(NULL, &id), "loglin_select_device");
    cl_context context = clCreateContext(NULL, 1, &id, NULL, NULL, &code);
    check(code, "clCreateContext");
    cl_command_queue queue = clCreateCommandQueueWithProperties(context, id, NULL, &code);
    check(code, "clCreateCommandQueueWithProperties");

    loglin_device *device;
    loglin_plan *plan;
    const loglin_problem problem = {
        .batch = 1, .length = LENGTH, .heads = HEADS, .groups = 1, .dim_k = DIM_K, .dim_v = DIM_V, .levels = LEVELS};
    check(loglin_device_create(context, id, &device), "loglin_device_create");
    check(loglin_plan_create(device, &problem, &plan), "loglin_plan_create");

    const loglin_inputs in = {.q = upload(context, LENGTH * DIM_K, DIM_K),
                              .k = upload(context, LENGTH * DIM_K, DIM_K),
                              .v = upload(context, (size_t)LENGTH * HEADS * DIM_V, 1),
                              .level_scales = upload(context, (size_t)LENGTH * HEADS * LEVELS, 1)};
    const loglin_buffer o = upload(context, (size_t)LENGTH * HEADS * DIM_V, 1);
    const loglin_buffer workspace = upload(context, loglin_workspace_size(plan, LOGLIN_FORWARD) / sizeof(float) + 1, 1);
    static float result[LENGTH][HEADS][DIM_V];
    check(loglin_forward(plan, &in, NULL, o, NULL, workspace, queue, 0, NULL, NULL), "loglin_forward");
    check(clEnqueueReadBuffer(queue, o.mem, CL_TRUE, 0, sizeof result, result, 0, NULL, NULL), "clEnqueueReadBuffer");

    float worst = 0.0F;
    for (size_t t = 0; t < LENGTH; t++) {
        for (size_t i = 0; i < (size_t)HEADS * DIM_V; i++) {
            worst = fmaxf(worst, fabsf(result[t][i / DIM_V][i % DIM_V] - (float)(t + 1)));
        }
    }
    printf("o_%d = %g, largest error %g\n", LENGTH - 1, (double)result[LENGTH - 1][0][0], (double)worst);

    const cl_mem buffers[] = {in.q.mem, in.k.mem, in.v.mem, in.level_scales.mem, o.mem, workspace.mem};
    for (size_t i = 0; i < sizeof buffers / sizeof buffers[0]; i++) {
        clReleaseMemObject(buffers[i]);
    }
    loglin_plan_destroy(plan);
    loglin_device_destroy(device);
    clReleaseCommandQueue(queue);
    clReleaseContext(context);
    return worst < 1e-2F ? 0 : 1;
}
