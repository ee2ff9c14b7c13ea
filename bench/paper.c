/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The paper's kernel benchmark: the forward pass at 2 sequences, 48 heads that share q and k, K 128, V 64, bfloat16, and one
 * run of 1,048,576 tokens with 8 heads.  Medians of 21 runs by device events, from the queue's readiness to the last
 * kernel's end; inputs are random, and each run takes the next of several sets.  Rows of the output of the last run are
 * checked against the sum over all keys in double.
 *
 *     bench_paper [--json FILE]      on the device that LOGLIN_DEVICE names, or the first
 */
#include "loglin.h"

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { RUNS = 21, WARM_UP = 3, MOST_SETS = 3, CHECKED_ROWS = 8, POOL = 1 << 22 };

typedef struct bench_case {
    size_t batch, length, heads, sets;
} bench_case;

static const size_t dim_k = 128, dim_v = 64;

typedef struct bench {
    cl_context context;
    cl_command_queue queue;
    loglin_device *device;
    cl_mem values, gates, weights; /* pools of random numbers: bfloat16, float, float */
} bench;

typedef struct bench_result {
    double median, least, error;
} bench_result;

static void check(int status, const char *what) {
    if (status != 0) {
        (void)fprintf(stderr, "%s: %s: %s\n", what, loglin_strerror(status), loglin_last_error());
        exit(EXIT_FAILURE);
    }
}

static void *allocate(size_t bytes) {
    void *memory = malloc(bytes);
    if (memory == NULL) {
        (void)fprintf(stderr, "out of memory for %zu bytes\n", bytes);
        exit(EXIT_FAILURE);
    }
    return memory;
}

/* ---- Random inputs ----------------------------------------------------------------------------------------------- */

static uint64_t random_bits(void) {
    static uint64_t state = 88172645463325252u;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static float uniform(float low, float high) {
    return low + (high - low) * (float)(random_bits() >> 40) / 16777216.0f;
}

static cl_mem make_buffer(const bench *b, size_t bytes, void *contents) {
    cl_int code = CL_SUCCESS;
    const cl_mem_flags flags = CL_MEM_READ_WRITE | (contents != NULL ? CL_MEM_COPY_HOST_PTR : 0);
    cl_mem mem = clCreateBuffer(b->context, flags, bytes, contents, &code);
    check(code, "clCreateBuffer");
    return mem;
}

static void make_pools(bench *b) {
    uint16_t *values = allocate(POOL * sizeof *values);
    float *floats = allocate(POOL * sizeof *floats);
    for (size_t i = 0; i < POOL; i++) {
        const float x = uniform(-1.0f, 1.0f) + uniform(-1.0f, 1.0f) + uniform(-1.0f, 1.0f);
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        values[i] = (uint16_t)(bits >> 16);
        floats[i] = uniform(-0.1f, 0.0f);
    }
    b->values = make_buffer(b, POOL * sizeof *values, values);
    b->gates = make_buffer(b, POOL * sizeof *floats, floats);
    for (size_t i = 0; i < POOL; i++) {
        floats[i] = uniform(0.0f, 1.0f);
    }
    b->weights = make_buffer(b, POOL * sizeof *floats, floats);
    free(values);
    free(floats);
}

/* Filled piece by piece from random places of the pool. */
static cl_mem make_random(const bench *b, cl_mem pool, size_t count, size_t size) {
    const size_t most = POOL / 2;
    cl_mem mem = make_buffer(b, count * size, NULL);
    for (size_t at = 0; at < count; at += most) {
        const size_t part = count - at < most ? count - at : most;
        const size_t from = (size_t)(random_bits() >> 20) % (POOL - most);
        check(clEnqueueCopyBuffer(b->queue, pool, mem, from * size, at * size, part * size, 0, NULL, NULL),
              "clEnqueueCopyBuffer");
    }
    return mem;
}

static loglin_inputs make_inputs(const bench *b, const loglin_problem *p) {
    const size_t tokens = p->batch * p->length;
    return (loglin_inputs){
        .q.mem = make_random(b, b->values, tokens * p->dim_k, 2),
        .k.mem = make_random(b, b->values, tokens * p->dim_k, 2),
        .v.mem = make_random(b, b->values, tokens * p->heads * p->dim_v, 2),
        .g.mem = make_random(b, b->gates, tokens * p->heads, sizeof(float)),
        .level_scales.mem = make_random(b, b->weights, tokens * p->heads * p->levels, sizeof(float)),
    };
}

static void release_inputs(const loglin_inputs *in) {
    const cl_mem buffers[] = {in->q.mem, in->k.mem, in->v.mem, in->g.mem, in->level_scales.mem};
    for (size_t i = 0; i < sizeof buffers / sizeof buffers[0]; i++) {
        clReleaseMemObject(buffers[i]);
    }
}

/* ---- The check --------------------------------------------------------------------------------------------------- */

/* Rows of one sequence and head: `width` elements of each token, `stride` elements apart. */
static void *read_rows(const bench *b, cl_mem mem, size_t first, size_t width, size_t stride, size_t count,
                       size_t size) {
    void *rows = allocate(width * count * size);
    const size_t from[3] = {first * size % (stride * size), first / stride, 0}, to[3] = {0, 0, 0};
    const size_t region[3] = {width * size, count, 1};
    check(clEnqueueReadBufferRect(b->queue, mem, CL_TRUE, from, to, region, stride * size, 0, width * size, 0, rows, 0,
                                  NULL, NULL),
          "clEnqueueReadBufferRect");
    return rows;
}

static double bfloat(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return (double)value;
}

static size_t level_of(size_t t, size_t s) {
    size_t level = 0;
    for (size_t bits = t ^ s; bits != 0; bits >>= 1) {
        level++;
    }
    return level;
}

/* |o - expected| / |expected| over some rows of the last sequence and head. */
static double find_error(const bench *b, const loglin_problem *p, const loglin_inputs *in, cl_mem o) {
    const size_t head = p->heads - 1, first = (p->batch - 1) * p->length, T = p->length, L = p->levels;
    const size_t row_v = p->heads * p->dim_v, from_v = first * row_v + head * p->dim_v;
    uint16_t *q = read_rows(b, in->q.mem, first * p->dim_k, p->dim_k, p->dim_k, T, 2);
    uint16_t *k = read_rows(b, in->k.mem, first * p->dim_k, p->dim_k, p->dim_k, T, 2);
    uint16_t *v = read_rows(b, in->v.mem, from_v, p->dim_v, row_v, T, 2);
    uint16_t *got = read_rows(b, o, from_v, p->dim_v, row_v, T, 2);
    float *g = read_rows(b, in->g.mem, first * p->heads + head, 1, p->heads, T, sizeof(float));
    float *scales =
        read_rows(b, in->level_scales.mem, (first * p->heads + head) * L, L, p->heads * L, T, sizeof(float));
    double difference = 0.0, size = 0.0;
    for (size_t row = 0; row < CHECKED_ROWS; row++) {
        const size_t t = row == 0 ? T - 1 : (size_t)(random_bits() >> 20) % T;
        double expected[64] = {0.0}, since = 0.0;
        for (size_t s = t + 1; s-- > 0;) {
            double product = 0.0;
            for (size_t i = 0; i < p->dim_k; i++) {
                product += bfloat(q[t * p->dim_k + i]) * bfloat(k[s * p->dim_k + i]);
            }
            const double weight = (double)scales[t * L + level_of(t, s)] * exp(since) * product;
            for (size_t i = 0; i < p->dim_v; i++) {
                expected[i] += weight * bfloat(v[s * p->dim_v + i]);
            }
            since += (double)g[s];
        }
        for (size_t i = 0; i < p->dim_v; i++) {
            const double miss = bfloat(got[t * p->dim_v + i]) - expected[i];
            difference += miss * miss;
            size += expected[i] * expected[i];
        }
    }
    void *const arrays[] = {q, k, v, got, g, scales};
    for (size_t i = 0; i < sizeof arrays / sizeof arrays[0]; i++) {
        free(arrays[i]);
    }
    return sqrt(difference / size);
}

/* ---- A run ------------------------------------------------------------------------------------------------------- */

static int compare_doubles(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static cl_ulong end_of(cl_event event) {
    cl_ulong time = 0;
    check(clGetEventProfilingInfo(event, CL_PROFILING_COMMAND_END, sizeof time, &time, NULL),
          "clGetEventProfilingInfo");
    clReleaseEvent(event);
    return time;
}

/* Milliseconds. */
static double time_forward(const bench *b, loglin_plan *plan, const loglin_inputs *in, cl_mem o, cl_mem workspace) {
    cl_event ready = NULL, done = NULL;
    check(clEnqueueMarkerWithWaitList(b->queue, 0, NULL, &ready), "clEnqueueMarkerWithWaitList");
    check(loglin_forward(plan, in, NULL, (loglin_buffer){o, 0}, NULL, (loglin_buffer){workspace, 0}, b->queue, 0, NULL,
                         &done),
          "loglin_forward");
    check(clFinish(b->queue), "clFinish");
    const cl_ulong start = end_of(ready);
    return (double)(end_of(done) - start) * 1e-6;
}

static bench_result run_case(const bench *b, const bench_case *c, char *engine, size_t capacity) {
    const loglin_problem problem = {.dtype = LOGLIN_BF16,
                                    .batch = c->batch,
                                    .length = c->length,
                                    .heads = c->heads,
                                    .groups = 1,
                                    .dim_k = dim_k,
                                    .dim_v = dim_v,
                                    .levels = loglin_num_levels(c->length)};
    loglin_plan *plan = NULL;
    check(loglin_plan_create(b->device, &problem, &plan), "loglin_plan_create");
    (void)loglin_plan_describe(plan, engine, capacity);
    loglin_inputs sets[MOST_SETS];
    for (size_t i = 0; i < c->sets; i++) {
        sets[i] = make_inputs(b, &problem);
    }
    cl_mem o = make_buffer(b, c->batch * c->length * c->heads * dim_v * 2, NULL);
    cl_mem workspace = make_buffer(b, loglin_workspace_size(plan, LOGLIN_FORWARD), NULL);
    double times[RUNS];
    for (size_t i = 0; i < WARM_UP + RUNS; i++) {
        const double time = time_forward(b, plan, &sets[i % c->sets], o, workspace);
        if (i >= WARM_UP) {
            times[i - WARM_UP] = time;
        }
    }
    qsort(times, RUNS, sizeof times[0], compare_doubles);
    const bench_result result = {
        .median = times[RUNS / 2],
        .least = times[0],
        .error = find_error(b, &problem, &sets[(WARM_UP + RUNS - 1) % c->sets], o),
    };
    for (size_t i = 0; i < c->sets; i++) {
        release_inputs(&sets[i]);
    }
    clReleaseMemObject(o);
    clReleaseMemObject(workspace);
    loglin_plan_destroy(plan);
    return result;
}

static void open_bench(bench *b, char *name, size_t capacity) {
    static const cl_queue_properties properties[] = {CL_QUEUE_PROPERTIES, CL_QUEUE_PROFILING_ENABLE, 0};
    cl_device_id id;
    cl_int code = CL_SUCCESS;
    check(loglin_select_device(NULL, &id), "loglin_select_device");
    check(clGetDeviceInfo(id, CL_DEVICE_NAME, capacity, name, NULL), "clGetDeviceInfo");
    b->context = clCreateContext(NULL, 1, &id, NULL, NULL, &code);
    check(code, "clCreateContext");
    b->queue = clCreateCommandQueueWithProperties(b->context, id, properties, &code);
    check(code, "clCreateCommandQueueWithProperties");
    check(loglin_device_create(b->context, id, &b->device), "loglin_device_create");
    make_pools(b);
}

static void close_bench(bench *b) {
    clReleaseMemObject(b->values);
    clReleaseMemObject(b->gates);
    clReleaseMemObject(b->weights);
    loglin_device_destroy(b->device);
    clReleaseCommandQueue(b->queue);
    clReleaseContext(b->context);
}

int main(int count, char **arguments) {
    static const bench_case cases[] = {{2, 2048, 48, 3},  {2, 8192, 48, 3},   {2, 16384, 48, 3},
                                       {2, 65536, 48, 2}, {2, 131072, 48, 2}, {1, 1048576, 8, 2}};
    static const double most_error = 1e-2;
    const char *path = NULL;
    if (count == 3 && strcmp(arguments[1], "--json") == 0) {
        path = arguments[2];
    } else if (count != 1) {
        (void)fprintf(stderr, "usage: %s [--json FILE]\n", arguments[0]);
        return EXIT_FAILURE;
    }
    FILE *json = path != NULL ? fopen(path, "w") : NULL;
    if (path != NULL && json == NULL) {
        perror(path);
        return EXIT_FAILURE;
    }
    bench b = {0};
    char name[256] = "", plan[512] = "";
    bool good = true;
    open_bench(&b, name, sizeof name);
    printf("%s, K %zu, V %zu, G 1, bfloat16, forward, median of %d\n", name, dim_k, dim_v, RUNS);
    printf("batch  heads        T   median ms    least ms      error\n");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const bench_case *c = &cases[i];
        const bench_result r = run_case(&b, c, plan, sizeof plan);
        good = good && r.error <= most_error;
        printf("%5zu  %5zu  %7zu  %10.4f  %10.4f  %9.2e\n", c->batch, c->heads, c->length, r.median, r.least, r.error);
        (void)fflush(stdout);
        if (json != NULL) {
            (void)fprintf(
                json,
                "%s{\"batch\": %zu, \"heads\": %zu, \"length\": %zu, \"median_ms\": %.5f, \"least_ms\": %.5f, "
                "\"error\": %.3e}",
                i == 0 ? "[\n" : ",\n", c->batch, c->heads, c->length, r.median, r.least, r.error);
        }
    }
    printf("%s\n", plan);
    if (json != NULL) {
        (void)fprintf(json, "\n]\n");
        good = fclose(json) == 0 && good;
    }
    close_bench(&b);
    return good ? EXIT_SUCCESS : EXIT_FAILURE;
}
