/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The decode step against the memory: bytes of the levels that exist, read once, plus two states written, over the time
 * of a step, as a part of the rate of a device copy (bytes read and bytes written) in the same run, the two alternating.
 * Then, on GPUs, the time of a step of one sequence, steps being enqueued back to back.
 *
 *     bench_step           the device that LOGLIN_DEVICE names, or the first
 */
#include "loglin.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { RUNS = 11, STEPS = 8 };

typedef struct bench_case {
    const char *name;
    size_t batch, heads, dim_k, dim_v, levels;
    loglin_dtype dtype;
    int32_t position;
} bench_case;

typedef struct bench {
    cl_context context;
    cl_command_queue queue;
    loglin_device *device;
    loglin_plan *plan;
    loglin_inputs in;
    loglin_state state;
    loglin_buffer o;
    cl_mem copy_from, copy_to;
    size_t copy_bytes;
} bench;

static void check(int status, const char *what) {
    if (status != 0) {
        fprintf(stderr, "%s: %s: %s\n", what, loglin_strerror(status), loglin_last_error());
        exit(EXIT_FAILURE);
    }
}

static double seconds(void) {
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int compare_doubles(const void *a, const void *b) {
    const double x = *(const double *)a;
    const double y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, size_t count) {
    qsort(values, count, sizeof(*values), compare_doubles);
    return values[count / 2];
}

/* A buffer whose bytes all are `byte`: 0x3c gives 0.0115 in float and bfloat16, 0xbc its negative. */
static cl_mem make_buffer(const bench *b, size_t bytes, uint8_t byte) {
    cl_int code;
    cl_mem mem = clCreateBuffer(b->context, CL_MEM_READ_WRITE, bytes, NULL, &code);
    check(code, "clCreateBuffer");
    check(clEnqueueFillBuffer(b->queue, mem, &byte, 1, 0, bytes, 0, NULL, NULL), "clEnqueueFillBuffer");
    return mem;
}

static void set_positions(const bench *b, const bench_case *c) {
    check(clEnqueueFillBuffer(b->queue, b->state.position.mem, &c->position, sizeof(c->position), 0,
                              c->batch * sizeof(c->position), 0, NULL, NULL),
          "clEnqueueFillBuffer");
}

static void set_up(bench *b, const bench_case *c) {
    const loglin_problem problem = {
        .dtype = c->dtype,
        .batch = c->batch,
        .length = 1,
        .heads = c->heads,
        .groups = 1,
        .dim_k = c->dim_k,
        .dim_v = c->dim_v,
        .levels = c->levels,
        .max_position = (size_t)1 << (c->levels - 2),
        .phases = LOGLIN_STEP,
    };
    const size_t element = c->dtype == LOGLIN_F32 ? 4 : 2;
    const size_t heads = c->batch * c->heads;
    check(loglin_plan_create(b->device, &problem, &b->plan), "loglin_plan_create");
    b->in = (loglin_inputs){
        .q.mem = make_buffer(b, element * c->batch * c->dim_k, 0x3c),
        .k.mem = make_buffer(b, element * c->batch * c->dim_k, 0x3c),
        .v.mem = make_buffer(b, element * heads * c->dim_v, 0x3c),
        .g.mem = make_buffer(b, 4 * heads, 0xbc),
        .level_scales.mem = make_buffer(b, 4 * heads * c->levels, 0x3c),
    };
    b->state = (loglin_state){
        .values.mem = make_buffer(b, loglin_state_size(b->plan), 0x3c),
        .log_decay.mem = make_buffer(b, 4 * heads * c->levels, 0),
        .position.mem = make_buffer(b, 4 * c->batch, 0),
    };
    b->o.mem = make_buffer(b, element * heads * c->dim_v, 0);
    b->copy_bytes = loglin_state_size(b->plan) / 2;
    b->copy_from = make_buffer(b, b->copy_bytes, 1);
    b->copy_to = make_buffer(b, b->copy_bytes, 2);
}

static void tear_down(bench *b) {
    const cl_mem buffers[] = {
        b->in.q.mem,
        b->in.k.mem,
        b->in.v.mem,
        b->in.g.mem,
        b->in.level_scales.mem,
        b->state.values.mem,
        b->state.log_decay.mem,
        b->state.position.mem,
        b->o.mem,
        b->copy_from,
        b->copy_to,
    };
    check(clFinish(b->queue), "clFinish");
    for (size_t i = 0; i < sizeof(buffers) / sizeof(buffers[0]); ++i) {
        clReleaseMemObject(buffers[i]);
    }
    loglin_plan_destroy(b->plan);
}

static void enqueue_steps(const bench *b, size_t count) {
    for (size_t i = 0; i < count; ++i) {
        check(loglin_step(b->plan, &b->in, &b->state, b->o, b->queue, 0, NULL, NULL), "loglin_step");
    }
}

/* States read and written by `count` steps from a position on: the levels that exist, and two. */
static size_t states_moved(uint32_t position, size_t count) {
    size_t states = 0;
    for (size_t i = 0; i < count; ++i) {
        for (uint32_t bits = position + (uint32_t)i - 1; bits != 0; bits &= bits - 1) {
            ++states;
        }
        states += 3; /* level 0 read, two levels written */
    }
    return states;
}

static void compare_with_copy(bench *b, const bench_case *c) {
    double step_time[RUNS], copy_time[RUNS];
    set_up(b, c);
    enqueue_steps(b, 1);
    for (size_t run = 0; run < RUNS; ++run) {
        set_positions(b, c);
        check(clFinish(b->queue), "clFinish");
        double start = seconds();
        enqueue_steps(b, STEPS);
        check(clFinish(b->queue), "clFinish");
        step_time[run] = seconds() - start;
        start = seconds();
        for (size_t i = 0; i < STEPS; ++i) {
            check(clEnqueueCopyBuffer(b->queue, b->copy_from, b->copy_to, 0, 0, b->copy_bytes, 0, NULL, NULL),
                  "clEnqueueCopyBuffer");
        }
        check(clFinish(b->queue), "clFinish");
        copy_time[run] = seconds() - start;
    }
    const size_t state_bytes = 4 * c->batch * c->heads * c->dim_k * c->dim_v;
    const double moved = (double)(states_moved((uint32_t)c->position, STEPS) * state_bytes);
    const double step_rate = moved / median(step_time, RUNS);
    const double copy_rate = 2.0 * STEPS * (double)b->copy_bytes / median(copy_time, RUNS);
    printf("%-28s step %8.1f us  %8.2f GB/s  copy %8.2f GB/s  ratio %.3f\n", c->name,
           1e6 * median(step_time, RUNS) / STEPS, 1e-9 * step_rate, 1e-9 * copy_rate, step_rate / copy_rate);
    tear_down(b);
}

static void time_back_to_back(bench *b, const bench_case *c) {
    const size_t steps = 512;
    double time[RUNS];
    set_up(b, c);
    enqueue_steps(b, 1);
    for (size_t run = 0; run < RUNS; ++run) {
        set_positions(b, c);
        check(clFinish(b->queue), "clFinish");
        const double start = seconds();
        enqueue_steps(b, steps);
        check(clFinish(b->queue), "clFinish");
        time[run] = (seconds() - start) / (double)steps;
    }
    printf("%-28s step %8.1f us, %zu back to back\n", c->name, 1e6 * median(time, RUNS), steps);
    tear_down(b);
}

int main(void) {
    static const bench_case cpu_case = {"B 8 H 8 K 128 V 64 f32", 8, 8, 128, 64, 15, LOGLIN_F32, 8000};
    static const bench_case gpu_case = {"B 64 H 48 K 128 V 64 bf16", 64, 48, 128, 64, 15, LOGLIN_BF16, 8192};
    static const bench_case single_case = {"B 1 H 48 K 128 V 64 bf16", 1, 48, 128, 64, 15, LOGLIN_BF16, 8192};
    cl_device_id id;
    cl_device_type type;
    char name[256] = "";
    cl_int code;
    bench b = {0};
    check(loglin_select_device(NULL, &id), "loglin_select_device");
    check(clGetDeviceInfo(id, CL_DEVICE_NAME, sizeof(name) - 1, name, NULL), "clGetDeviceInfo");
    check(clGetDeviceInfo(id, CL_DEVICE_TYPE, sizeof(type), &type, NULL), "clGetDeviceInfo");
    b.context = clCreateContext(NULL, 1, &id, NULL, NULL, &code);
    check(code, "clCreateContext");
    b.queue = clCreateCommandQueueWithProperties(b.context, id, NULL, &code);
    check(code, "clCreateCommandQueueWithProperties");
    check(loglin_device_create(b.context, id, &b.device), "loglin_device_create");

    printf("%s, medians of %d runs of %d steps from the case's position\n", name, RUNS, STEPS);
    compare_with_copy(&b, &cpu_case);
    if ((type & CL_DEVICE_TYPE_GPU) != 0) {
        compare_with_copy(&b, &gpu_case);
        time_back_to_back(&b, &single_case);
    }
    loglin_device_destroy(b.device);
    clReleaseCommandQueue(b.queue);
    clReleaseContext(b.context);
    return EXIT_SUCCESS;
}
