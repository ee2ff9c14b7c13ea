/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What CLBlast reaches in the chunk products of the blas engine, against what the device can do at all: the rate of a
 * kernel of nothing but fused multiply-adds.  Medians of 7 runs each, alternating.
 */
#include "engine/gemm.h"
#include "loglin.h"
#include "runtime/device.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { runs = 7 };

#define CHECK(expression)                                                                                              \
    do {                                                                                                               \
        const loglin_status check_status = (expression);                                                               \
        if (check_status != LOGLIN_OK) {                                                                               \
            (void)fprintf(stderr, "%s: %s %s\n", #expression, loglin_strerror(check_status), loglin_last_error());     \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

/* Eight independent chains of float16, so that neither latency nor memory limits it. */
static const char peak_source[] = "__kernel void peak(__global float *out, float a, float b) {\n"
                                  "    float16 x[8];\n"
                                  "    #pragma unroll\n"
                                  "    for (int i = 0; i < 8; i++) { x[i] = (float16)(a + (float)i); }\n"
                                  "    for (int n = 0; n < 4096; n++) {\n"
                                  "        #pragma unroll\n"
                                  "        for (int i = 0; i < 8; i++) { x[i] = fma(x[i], (float16)a, (float16)b); }\n"
                                  "    }\n"
                                  "    float16 sum = 0.0f;\n"
                                  "    #pragma unroll\n"
                                  "    for (int i = 0; i < 8; i++) { sum += x[i]; }\n"
                                  "    out[get_global_id(0)] = sum.s0 + sum.s7 + sum.sf;\n"
                                  "}\n";

static double seconds(void) {
    struct timespec time;
    (void)timespec_get(&time, TIME_UTC);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values) {
    qsort(values, runs, sizeof values[0], ascending);
    return values[runs / 2];
}

typedef struct fma_peak {
    cl_kernel kernel;
    size_t items;
} fma_peak;

static fma_peak make_peak(cl_context context, cl_device_id id, cl_mem out, size_t items) {
    const char *source = peak_source;
    cl_int code;
    cl_program program = clCreateProgramWithSource(context, 1, &source, NULL, &code);
    CHECK(code);
    CHECK(clBuildProgram(program, 1, &id, "", NULL, NULL));
    cl_kernel kernel = clCreateKernel(program, "peak", &code);
    CHECK(code);
    const float a = 0.999f, b = 0.001f;
    CHECK(clSetKernelArg(kernel, 0, sizeof(cl_mem), &out));
    CHECK(clSetKernelArg(kernel, 1, sizeof a, &a));
    CHECK(clSetKernelArg(kernel, 2, sizeof b, &b));
    CHECK(clReleaseProgram(program));
    return (fma_peak){kernel, items};
}

/* Flops a second of one run. */
static double run_peak(const fma_peak *peak, cl_command_queue queue) {
    const double start = seconds();
    CHECK(clEnqueueNDRangeKernel(queue, peak->kernel, 1, NULL, &peak->items, NULL, 0, NULL, NULL));
    CHECK(clFinish(queue));
    return (double)peak->items * 4096 * 8 * 16 * 2 / (seconds() - start);
}

static double run_product(const loglin_gemm *gemm, cl_command_queue queue) {
    const double start = seconds();
    CHECK(loglin_gemm_enqueue(gemm, queue));
    CHECK(clFinish(queue));
    return 2.0 * (double)(gemm->m * gemm->n * gemm->k * gemm->batch) / (seconds() - start);
}

static loglin_gemm product(cl_mem buffer, size_t m, size_t n, size_t k, size_t batch, bool transpose_a,
                           bool transpose_b) {
    return (loglin_gemm){
        .transpose_a = transpose_a,
        .transpose_b = transpose_b,
        .m = m,
        .n = n,
        .k = k,
        .batch = batch,
        .alpha = 1.0f,
        .a = {buffer, 0, transpose_a ? m : k, m * k},
        .b = {buffer, m * k * batch, transpose_b ? k : n, k * n},
        .c = {buffer, (m * k + k * n) * batch, n, m * n},
    };
}

int main(void) {
    enum { chunk = 64, dim_k = 128, dim_v = 64, columns = 6, batch = 256 };
    cl_device_id id;
    loglin_device *device;
    cl_int code;
    CHECK(loglin_select_device(NULL, &id));
    cl_context context = clCreateContext(NULL, 1, &id, NULL, NULL, &code);
    CHECK(code);
    cl_command_queue queue = clCreateCommandQueue(context, id, 0, &code);
    CHECK(code);
    CHECK(loglin_device_create(context, id, &device));
    const loglin_gemm_parameters own = {{0}};
    CHECK(loglin_gemm_prepare(device, &own));
    const size_t floats = (size_t)batch * (chunk * dim_k + dim_k * dim_v * columns + chunk * dim_v * columns);
    cl_mem buffer = clCreateBuffer(context, CL_MEM_READ_WRITE, floats * sizeof(float), NULL, &code);
    CHECK(code);
    const float value = 0.5f;
    CHECK(clEnqueueFillBuffer(queue, buffer, &value, sizeof value, 0, floats * sizeof(float), 0, NULL, NULL));
    const fma_peak limit = make_peak(context, id, buffer, device->is_cpu ? 256 : 1 << 18);

    const struct {
        const char *name;
        loglin_gemm gemm;
    } products[] = {
        {"Q K^T", product(buffer, chunk, chunk, dim_k, batch, false, true)},
        {"MZ V", product(buffer, chunk, dim_v, chunk, batch, false, false)},
        {"WRITE^T V (chunk states)", product(buffer, dim_k, dim_v, chunk, batch, true, false)},
        {"READ E (level reads)", product(buffer, chunk, dim_v * columns, dim_k, batch, false, false)},
        {"a linear layer, prefill", product(buffer, 1024, 704, 128, 1, false, false)},
    };
    (void)printf("%s, %u compute units: CLBlast in batches of %d, medians of %d runs\n", device->info.name,
                 device->info.compute_units, batch, runs);
    (void)printf("%-26s %5s %5s %5s %10s %10s %8s\n", "product", "m", "n", "k", "GFLOP/s", "limit", "share");
    for (size_t i = 0; i < sizeof products / sizeof products[0]; i++) {
        const loglin_gemm *gemm = &products[i].gemm;
        double rate[runs], most[runs];
        (void)run_product(gemm, queue);
        (void)run_peak(&limit, queue);
        for (int run = 0; run < runs; run++) {
            rate[run] = run_product(gemm, queue);
            most[run] = run_peak(&limit, queue);
        }
        const double reached = median(rate), possible = median(most);
        (void)printf("%-26s %5zu %5zu %5zu %10.1f %10.1f %7.1f%%\n", products[i].name, gemm->m, gemm->n, gemm->k,
                     reached * 1e-9, possible * 1e-9, 100.0 * reached / possible);
    }
    clReleaseKernel(limit.kernel);
    clReleaseMemObject(buffer);
    loglin_device_destroy(device);
    clReleaseCommandQueue(queue);
    clReleaseContext(context);
    return 0;
}
