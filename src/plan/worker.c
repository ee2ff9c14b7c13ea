/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The measurement: random inputs, outputs between guards and full of NaN, one call whose results are compared with
 * float64, and then the calls that are timed.  It runs in a process of its own, whose end frees what a failure leaves.
 */
#define _DEFAULT_SOURCE /* madvise; NOLINT(bugprone-reserved-identifier,cert-dcl37-c,cert-dcl51-cpp) */
#include "plan/worker.h"

#include "plan/plan.h"
#include "plan/problem.h"
#include "plan/reference.h"
#include "runtime/device.h"
#include "runtime/program.h"
#include "runtime/status.h"
#include "tensorfile/dtype.h"

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { GUARD = 64 };                          /* elements before and behind an array */
enum { SAMPLES = 1048573 };                   /* random numbers of an array */
static const double reference_budget = 1.5e8; /* multiplications that the comparison may take */
static const double short_call = 200;         /* ms: longer calls do not feel what the caches held before */
static const double enough_ms = 2000;         /* no further run is timed behind so many */

/* ---- Arrays ------------------------------------------------------------------------------------------------------ */

/* Like malloc; in huge pages where the system has them, for arrays of a gigabyte that are touched once. */
static void *reserve(size_t bytes) {
    const size_t page = (size_t)2 << 20;
    void *memory = NULL;
    if (bytes < page) {
        return malloc(bytes);
    }
    if (posix_memalign(&memory, page, bytes) != 0) {
        return NULL;
    }
    (void)madvise(memory, bytes, MADV_HUGEPAGE);
    return memory;
}

/* The same, cleared. */
static void *reserve_zeros(size_t bytes) {
    void *memory = reserve(bytes);
    return memory != NULL ? memset(memory, 0, bytes) : NULL;
}

enum { IN_Q, IN_K, IN_V, IN_G, IN_SCALES, IN_BETA, IN_DO, INPUT_COUNT };
enum { OUT_Q, OUT_K, OUT_V, OUT_G, OUT_SCALES, OUT_BETA, OUT_O, OUTPUT_COUNT };

/* An array of the host in double, and on the device in its own type. */
typedef struct array {
    size_t count;
    loglin_dtype dtype;
    double *values;
    cl_mem mem;
} array;

typedef struct measurement {
    const loglin_request *request;
    loglin_problem problem;
    loglin_counts counts;
    cl_context context;
    cl_command_queue queue;
    loglin_device *device;
    bool is_cpu;
    loglin_plan *plan;
    array in[INPUT_COUNT], out[OUTPUT_COUNT];
    array workspace;
    uint64_t random;
} measurement;

static loglin_tensor_dtype stored(loglin_dtype dtype) {
    return dtype == LOGLIN_F16 ? LOGLIN_TENSOR_F16 : dtype == LOGLIN_BF16 ? LOGLIN_TENSOR_BF16 : LOGLIN_TENSOR_F32;
}

/*
 * `count` random numbers as the device stores them, in double and in that type.  Long arrays repeat their first
 * SAMPLES numbers, a prime: they are made at the speed of memory, and no two rows are alike.
 */
static void draw(measurement *at, double *values, unsigned char *content, size_t count, loglin_dtype dtype, double low,
                 double high) {
    const size_t size = loglin_dtype_size(dtype), fresh = count < SAMPLES ? count : SAMPLES;
    for (size_t i = 0; i < fresh; i++) {
        const double uniform = (double)(loglin_search_random(&at->random) >> 11) * 0x1p-53;
        float value = (float)(low + (high - low) * uniform);
        loglin_tensor_from_float(stored(dtype), &value, 1, content + i * size);
        loglin_tensor_to_float(stored(dtype), content + i * size, 1, &value);
        values[i] = (double)value;
    }
    for (size_t first = fresh; first < count; first += fresh) {
        const size_t again = count - first < fresh ? count - first : fresh;
        memcpy(values + first, values, again * sizeof *values);
        memcpy(content + first * size, content, again * size);
    }
}

/* A buffer of the device, a copy of content unless that is NULL. */
static loglin_status make_buffer(measurement *at, cl_mem *made, size_t bytes, void *content) {
    cl_int code;
    *made = clCreateBuffer(at->context, CL_MEM_READ_WRITE | (content != NULL ? CL_MEM_COPY_HOST_PTR : 0), bytes,
                           content, &code);
    return code == CL_SUCCESS ? LOGLIN_OK : loglin_fail(code, "clCreateBuffer: %s", loglin_strerror(code));
}

/* How far apart the rows [b, t, h] are that are compared, counted from the last: as near as the budget allows. */
static size_t row_step(const measurement *at) {
    const loglin_problem *p = &at->problem;
    const double row =
        (double)(p->length + 1) / 2 *
        (p->phases == LOGLIN_FORWARD ? (double)(2 * p->dim_k + p->dim_v) : (double)(6 * p->dim_k + 3 * p->dim_v));
    const double rows = (double)(p->batch * p->length * p->heads), affordable = reference_budget / row;
    const size_t step = affordable >= rows ? 1 : (size_t)(rows / (affordable > 4 ? affordable : 4));
    return step | 1; /* odd, so that all heads have their turn */
}

/* do is 0 but in the compared rows: then every gradient depends on those alone. */
static void draw_compared_rows(measurement *at, double *values, unsigned char *content) {
    const loglin_problem *p = &at->problem;
    const size_t rows = p->batch * p->length * p->heads, step = row_step(at);
    for (size_t i = 0; i < rows; i += step) {
        const size_t first = (rows - 1 - i) * p->dim_v;
        draw(at, values + first, content + first * loglin_dtype_size(p->dtype), p->dim_v, p->dtype, -1, 1);
    }
}

static loglin_status make_input(measurement *at, int which, loglin_dtype dtype, size_t count, double low, double high) {
    void *(*const get)(size_t) = which == IN_DO ? reserve_zeros : reserve;
    const size_t bytes = count * loglin_dtype_size(dtype);
    array *made = &at->in[which];
    *made = (array){.count = count, .dtype = dtype, .values = get(count * sizeof(double))};
    unsigned char *content = get(bytes);
    loglin_status status;
    if (made->values == NULL || content == NULL) {
        status = loglin_fail(LOGLIN_OUT_OF_MEMORY, "measurement: out of host memory");
    } else {
        if (which == IN_DO) {
            draw_compared_rows(at, made->values, content);
        } else {
            draw(at, made->values, content, count, dtype, low, high);
        }
        status = make_buffer(at, &made->mem, bytes, content);
    }
    free(content);
    return status;
}

/* Between guards, full of NaN. */
static loglin_status make_output(measurement *at, array *made, loglin_dtype dtype, size_t count) {
    const size_t bytes = (count + (size_t)2 * GUARD) * loglin_dtype_size(dtype);
    const cl_uchar byte = 0xff;
    *made = (array){.count = count, .dtype = dtype};
    RETURN_IF_ERROR(make_buffer(at, &made->mem, bytes, NULL));
    RETURN_IF_CL_ERROR(clEnqueueFillBuffer(at->queue, made->mem, &byte, sizeof byte, 0, bytes, 0, NULL, NULL));
    return LOGLIN_OK;
}

static loglin_status make_inputs(measurement *at) {
    const loglin_problem *p = &at->problem;
    const loglin_counts *n = &at->counts;
    const double width = sqrt(3.0 / (double)p->dim_k); /* of rows of length 1 */
    RETURN_IF_ERROR(make_input(at, IN_Q, p->dtype, n->qk, -width, width));
    RETURN_IF_ERROR(make_input(at, IN_K, p->dtype, n->qk, -width, width));
    RETURN_IF_ERROR(make_input(at, IN_V, p->dtype, n->vo, -1, 1));
    RETURN_IF_ERROR(make_input(at, IN_G, LOGLIN_F32, n->gates, -0.1, -0.001));
    RETURN_IF_ERROR(make_input(at, IN_SCALES, p->weight_dtype, n->level_scales, 0.1, 1));
    if (p->op == LOGLIN_GATED_DELTA) {
        RETURN_IF_ERROR(make_input(at, IN_BETA, p->weight_dtype, n->gates, 0.1, 0.9));
    }
    return p->phases == LOGLIN_BACKWARD ? make_input(at, IN_DO, p->dtype, n->vo, -1, 1) : LOGLIN_OK;
}

static loglin_status make_outputs(measurement *at) {
    const loglin_problem *p = &at->problem;
    const loglin_counts *n = &at->counts;
    array *out = at->out;
    if (p->phases == LOGLIN_FORWARD) {
        return make_output(at, &out[OUT_O], p->dtype, n->vo);
    }
    RETURN_IF_ERROR(make_output(at, &out[OUT_Q], p->dtype, n->qk));
    RETURN_IF_ERROR(make_output(at, &out[OUT_K], p->dtype, n->qk));
    RETURN_IF_ERROR(make_output(at, &out[OUT_V], p->dtype, n->vo));
    RETURN_IF_ERROR(make_output(at, &out[OUT_G], LOGLIN_F32, n->gates));
    RETURN_IF_ERROR(make_output(at, &out[OUT_SCALES], p->weight_dtype, n->level_scales));
    return p->op == LOGLIN_GATED_DELTA ? make_output(at, &out[OUT_BETA], p->weight_dtype, n->gates) : LOGLIN_OK;
}

/* ---- The call ---------------------------------------------------------------------------------------------------- */

static loglin_buffer input(const measurement *at, int which) {
    return (loglin_buffer){at->in[which].mem, 0};
}

static loglin_buffer output(const measurement *at, int which) {
    return (loglin_buffer){at->out[which].mem, at->out[which].mem != NULL ? (size_t)GUARD : 0};
}

static double now_ms(void) {
    struct timespec time;
    (void)clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e3 + (double)time.tv_nsec * 1e-6;
}

/* One call from its enqueuing to its end. */
static loglin_status run_call(measurement *at, double *ms) {
    const loglin_inputs in = {.q = input(at, IN_Q),
                              .k = input(at, IN_K),
                              .v = input(at, IN_V),
                              .g = input(at, IN_G),
                              .level_scales = input(at, IN_SCALES),
                              .beta = input(at, IN_BETA)};
    const loglin_gradients out = {.dq = output(at, OUT_Q),
                                  .dk = output(at, OUT_K),
                                  .dv = output(at, OUT_V),
                                  .dg = output(at, OUT_G),
                                  .dlevel_scales = output(at, OUT_SCALES),
                                  .dbeta = output(at, OUT_BETA)};
    const loglin_buffer workspace = {at->workspace.mem, GUARD}, none = {NULL, 0};
    const double begin = now_ms();
    if (at->problem.phases == LOGLIN_FORWARD) {
        RETURN_IF_ERROR(
            loglin_forward(at->plan, &in, NULL, output(at, OUT_O), NULL, workspace, at->queue, 0, NULL, NULL));
    } else {
        RETURN_IF_ERROR(
            loglin_backward(at->plan, &in, NULL, input(at, IN_DO), none, &out, workspace, at->queue, 0, NULL, NULL));
    }
    RETURN_IF_CL_ERROR(clFinish(at->queue));
    *ms = now_ms() - begin;
    return LOGLIN_OK;
}

/* Are the bytes of a guard, which starts at this byte, as they were made? */
static loglin_status check_guard(measurement *at, const array *of, size_t start, bool *intact) {
    unsigned char content[GUARD * sizeof(float)];
    const size_t bytes = GUARD * loglin_dtype_size(of->dtype);
    RETURN_IF_CL_ERROR(clEnqueueReadBuffer(at->queue, of->mem, CL_TRUE, start, bytes, content, 0, NULL, NULL));
    for (size_t i = 0; i < bytes; i++) {
        *intact = *intact && content[i] == 0xff;
    }
    return LOGLIN_OK;
}

static loglin_status check_guards(measurement *at, const array *of, bool *intact) {
    const size_t size = loglin_dtype_size(of->dtype);
    RETURN_IF_ERROR(check_guard(at, of, 0, intact));
    return check_guard(at, of, (GUARD + of->count) * size, intact);
}

/* Numbers as they are stored, in double; *finite becomes false if one is not a number. */
static void widen(loglin_dtype dtype, const unsigned char *content, size_t count, double *values, bool *finite) {
    enum { PIECE = 1 << 12 };
    float floats[PIECE];
    for (size_t first = 0; first < count; first += PIECE) {
        const size_t piece = count - first < PIECE ? count - first : PIECE;
        loglin_tensor_to_float(stored(dtype), content + first * loglin_dtype_size(dtype), piece, floats);
        for (size_t i = 0; i < piece; i++) {
            values[first + i] = (double)floats[i];
            *finite = *finite && isfinite(floats[i]);
        }
    }
}

/* Reads an array's values from between its guards. */
static loglin_status read_back(measurement *at, array *from, bool *finite) {
    const size_t size = loglin_dtype_size(from->dtype), bytes = from->count * size;
    unsigned char *content = reserve(bytes);
    from->values = reserve(from->count * sizeof *from->values);
    if (content == NULL || from->values == NULL) {
        free(content);
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "measurement: out of host memory");
    }
    const cl_int code = clEnqueueReadBuffer(at->queue, from->mem, CL_TRUE, GUARD * size, bytes, content, 0, NULL, NULL);
    if (code == CL_SUCCESS) {
        widen(from->dtype, content, from->count, from->values, finite);
    }
    free(content);
    return code == CL_SUCCESS ? LOGLIN_OK : loglin_fail(code, "clEnqueueReadBuffer: %s", loglin_strerror(code));
}

/* ---- Comparison with float64 ------------------------------------------------------------------------------------- */

/* ||got - expected|| / ||expected||; infinite where got is not a number. */
static double error_of(const double *got, const double *expected, size_t count) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < count; i++) {
        difference += (got[i] - expected[i]) * (got[i] - expected[i]);
        size += expected[i] * expected[i];
    }
    return isfinite(difference) ? sqrt(difference / (size > 0 ? size : 1)) : INFINITY;
}

static double allowed_error(const measurement *at) {
    static const double outputs[] = {1e-5, 2e-3, 1e-2}, gradients[] = {5e-5, 2e-3, 1e-2};
    return (at->problem.phases == LOGLIN_FORWARD ? outputs : gradients)[at->problem.dtype];
}

/* The sequence b of the arrays. */
static loglin_reference reference_of(const measurement *at, size_t b) {
    const loglin_problem *p = &at->problem;
    const size_t kept = b * p->length * p->heads;
    return (loglin_reference){.length = p->length,
                              .heads = p->heads,
                              .groups = p->groups,
                              .dim_k = p->dim_k,
                              .dim_v = p->dim_v,
                              .levels = p->levels,
                              .partition = p->partition,
                              .q = at->in[IN_Q].values + b * p->length * p->groups * p->dim_k,
                              .k = at->in[IN_K].values + b * p->length * p->groups * p->dim_k,
                              .v = at->in[IN_V].values + kept * p->dim_v,
                              .g = at->in[IN_G].values + kept,
                              .level_scales = at->in[IN_SCALES].values + kept * p->levels,
                              .beta = at->in[IN_BETA].values != NULL ? at->in[IN_BETA].values + kept : NULL};
}

/* o in the compared rows, one behind the other. */
static loglin_status compare_output(measurement *at, double *error) {
    const loglin_problem *p = &at->problem;
    const size_t rows = p->batch * p->length * p->heads, step = row_step(at), width = p->dim_v;
    double *got = calloc((rows / step + 1) * width, sizeof *got);
    double *expected = calloc((rows / step + 1) * width + p->dim_k, sizeof *expected);
    if (got == NULL || expected == NULL) {
        free(got);
        free(expected);
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "measurement: out of host memory");
    }
    double *scratch = expected + (rows / step + 1) * width;
    size_t count = 0;
    for (size_t i = 0; i < rows; i += step, count++) {
        const size_t row = rows - 1 - i;
        const loglin_reference in = reference_of(at, row / (p->length * p->heads));
        loglin_reference_row(&in, row / p->heads % p->length, row % p->heads, scratch, expected + count * width);
        memcpy(got + count * width, at->out[OUT_O].values + row * width, width * sizeof *got);
    }
    *error = error_of(got, expected, count * width);
    free(got);
    free(expected);
    return LOGLIN_OK;
}

static void add_gradients(const measurement *at, double *const expected[], double *scratch) {
    const loglin_problem *p = &at->problem;
    const size_t rows = p->batch * p->length * p->heads, step = row_step(at);
    for (size_t i = 0; i < rows; i += step) {
        const size_t row = rows - 1 - i, b = row / (p->length * p->heads), kept = b * p->length * p->heads;
        const loglin_reference in = reference_of(at, b);
        const loglin_reference_gradients out = {.dq = expected[OUT_Q] + b * p->length * p->groups * p->dim_k,
                                                .dk = expected[OUT_K] + b * p->length * p->groups * p->dim_k,
                                                .dv = expected[OUT_V] + kept * p->dim_v,
                                                .dg = expected[OUT_G] + kept,
                                                .dlevel_scales = expected[OUT_SCALES] + kept * p->levels,
                                                .dbeta = expected[OUT_BETA] + kept};
        loglin_reference_row_gradients(&in, row / p->heads % p->length, row % p->heads,
                                       at->in[IN_DO].values + row * p->dim_v, scratch, &out);
    }
}

/* The largest error of all gradients. */
static loglin_status compare_gradients(measurement *at, double *error) {
    double *expected[OUTPUT_COUNT];
    double *scratch = calloc((at->problem.length + 4) * at->problem.dim_k, sizeof *scratch);
    bool whole = scratch != NULL;
    for (int i = 0; i < OUTPUT_COUNT; i++) {
        expected[i] = reserve_zeros((at->out[i].count + 1) * sizeof *expected[i]);
        whole = whole && expected[i] != NULL;
    }
    if (whole) {
        add_gradients(at, expected, scratch);
        *error = 0;
        for (int i = 0; i < OUTPUT_COUNT; i++) {
            *error =
                fmax(*error, at->out[i].mem != NULL ? error_of(at->out[i].values, expected[i], at->out[i].count) : 0);
        }
    }
    for (int i = 0; i < OUTPUT_COUNT; i++) {
        free(expected[i]);
    }
    free(scratch);
    return whole ? LOGLIN_OK : loglin_fail(LOGLIN_OUT_OF_MEMORY, "measurement: out of host memory");
}

/* Is the first call's result right?  *reason stays empty if it is. */
static loglin_status validate(measurement *at, loglin_reply *reply) {
    bool intact = true, finite = true;
    double error = INFINITY;
    RETURN_IF_ERROR(check_guards(at, &at->workspace, &intact));
    for (int i = 0; i < OUTPUT_COUNT; i++) {
        if (at->out[i].mem != NULL) {
            RETURN_IF_ERROR(check_guards(at, &at->out[i], &intact));
            RETURN_IF_ERROR(read_back(at, &at->out[i], &finite));
        }
    }
    if (intact && finite) {
        RETURN_IF_ERROR(at->problem.phases == LOGLIN_FORWARD ? compare_output(at, &error)
                                                             : compare_gradients(at, &error));
    }
    if (!intact || !(error <= allowed_error(at))) {
        (void)snprintf(reply->reason, sizeof reply->reason, "wrong");
        (void)snprintf(reply->detail, sizeof reply->detail, "%s: error %.2e, expected at most %.0e",
                       !intact   ? "it writes outside its arrays"
                       : !finite ? "not all outputs are numbers"
                                 : "outputs",
                       error, allowed_error(at));
    }
    return LOGLIN_OK;
}

/* ---- The measurement --------------------------------------------------------------------------------------------- */

/* Drivers may list their devices in another order in another process, so a device is known by its name. */
static loglin_status find_device(const loglin_request *request, loglin_device_info *found) {
    enum { MOST = 64 };
    loglin_device_info infos[MOST];
    size_t count = 0, same = 0;
    RETURN_IF_ERROR(loglin_list_devices(infos, MOST, &count));
    for (size_t i = 0; i < count && i < MOST; i++) {
        if (strcmp(infos[i].name, request->name) == 0 && same++ == request->device) {
            *found = infos[i];
            return LOGLIN_OK;
        }
    }
    return loglin_fail(LOGLIN_NO_DEVICE, "request: no device %zu is called \"%s\"; the first of %zu is \"%s\"",
                       request->device, request->name, count, count > 0 ? infos[0].name : "");
}

static loglin_status open_device(measurement *at) {
    loglin_device_info info = {.id = NULL};
    cl_int code;
    RETURN_IF_ERROR(find_device(at->request, &info));
    at->is_cpu = info.type == CL_DEVICE_TYPE_CPU;
    at->context = clCreateContext(NULL, 1, &info.id, NULL, NULL, &code);
    RETURN_IF_CL_ERROR(code);
    at->queue = clCreateCommandQueue(at->context, info.id, 0, &code);
    RETURN_IF_CL_ERROR(code);
    return loglin_device_create(at->context, info.id, &at->device);
}

static loglin_status prepare(measurement *at) {
    RETURN_IF_ERROR(
        loglin_plan_create_configured(at->device, &at->request->problem, &at->request->configuration, &at->plan));
    RETURN_IF_ERROR(loglin_problem_validate(&at->request->problem, &at->problem));
    at->counts = loglin_problem_counts(&at->problem, 0);
    const size_t workspace = loglin_workspace_size(at->plan, (loglin_phase)at->problem.phases);
    RETURN_IF_ERROR(make_output(at, &at->workspace, LOGLIN_F32, workspace / sizeof(float)));
    RETURN_IF_ERROR(make_inputs(at));
    return make_outputs(at);
}

static loglin_status time_configuration(measurement *at, loglin_reply *reply) {
    double ms = 0;
    RETURN_IF_ERROR(prepare(at));
    RETURN_IF_ERROR(run_call(at, &ms));
    RETURN_IF_ERROR(validate(at, reply));
    if (reply->reason[0] == '\0' && ms < short_call) {
        RETURN_IF_ERROR(run_call(at, &ms)); /* the comparison has emptied the processor's caches */
    }
    double sum = 0;
    while (reply->reason[0] == '\0' && reply->sample.runs < at->request->runs && sum < enough_ms) {
        RETURN_IF_ERROR(run_call(at, &ms));
        reply->sample.ms[reply->sample.runs++] = ms;
        sum += ms;
    }
    reply->outcome = reply->reason[0] == '\0' ? LOGLIN_OUTCOME_OK : LOGLIN_OUTCOME_FAILED;
    return LOGLIN_OK;
}

/* ---- The device's rates ------------------------------------------------------------------------------------------ */

static loglin_status time_peak(measurement *at, cl_kernel kernel, size_t items, double *gflops) {
    const cl_int rounds = 4096;
    const cl_float a = 0.999f, b = 0.001f;
    RETURN_IF_CL_ERROR(clSetKernelArg(kernel, 0, sizeof(cl_mem), &at->workspace.mem));
    RETURN_IF_CL_ERROR(clSetKernelArg(kernel, 1, sizeof a, &a));
    RETURN_IF_CL_ERROR(clSetKernelArg(kernel, 2, sizeof b, &b));
    RETURN_IF_CL_ERROR(clSetKernelArg(kernel, 3, sizeof rounds, &rounds));
    for (int run = 0; run < 6; run++) {
        const double begin = now_ms();
        RETURN_IF_CL_ERROR(clEnqueueNDRangeKernel(at->queue, kernel, 1, NULL, &items, NULL, 0, NULL, NULL));
        RETURN_IF_CL_ERROR(clFinish(at->queue));
        const double operations = 2.0 * 8 * 16 * rounds * (double)items;
        *gflops = run > 0 ? fmax(*gflops, operations * 1e-6 / (now_ms() - begin)) : 0;
    }
    return LOGLIN_OK;
}

static loglin_status time_copy(measurement *at, cl_mem to, size_t bytes, double *gbytes) {
    for (int run = 0; run < 6; run++) {
        const double begin = now_ms();
        RETURN_IF_CL_ERROR(clEnqueueCopyBuffer(at->queue, at->workspace.mem, to, 0, 0, bytes, 0, NULL, NULL));
        RETURN_IF_CL_ERROR(clFinish(at->queue));
        *gbytes = run > 0 ? fmax(*gbytes, 2e-6 * (double)bytes / (now_ms() - begin)) : 0;
    }
    return LOGLIN_OK;
}

static loglin_status time_rates(measurement *at, loglin_reply *reply) {
    static const char *const files[] = {"peak.cl", NULL};
    const size_t items = at->is_cpu ? 4096 : 262144, bytes = (size_t)256 << 20;
    cl_program program;
    cl_int code;
    RETURN_IF_ERROR(loglin_program_get(at->device, files, "", &program));
    cl_kernel kernel = clCreateKernel(program, "peak", &code);
    RETURN_IF_CL_ERROR(code);
    cl_mem to = NULL;
    loglin_status status = make_output(at, &at->workspace, LOGLIN_F32, bytes / sizeof(float));
    status = status != LOGLIN_OK ? status : make_buffer(at, &to, bytes, NULL);
    status = status != LOGLIN_OK ? status : time_peak(at, kernel, items, &reply->gflops);
    status = status != LOGLIN_OK ? status : time_copy(at, to, bytes, &reply->gbytes);
    reply->outcome = status == LOGLIN_OK ? LOGLIN_OUTCOME_OK : LOGLIN_OUTCOME_FAILED;
    if (to != NULL) {
        clReleaseMemObject(to);
    }
    clReleaseKernel(kernel);
    return status;
}

/* ---- The process ------------------------------------------------------------------------------------------------- */

static void release(array *which) {
    free(which->values);
    if (which->mem != NULL) {
        clReleaseMemObject(which->mem);
    }
}

static void close_measurement(measurement *at) {
    for (int i = 0; i < INPUT_COUNT; i++) {
        release(&at->in[i]);
    }
    for (int i = 0; i < OUTPUT_COUNT; i++) {
        release(&at->out[i]);
    }
    release(&at->workspace);
    loglin_plan_destroy(at->plan);
    loglin_device_destroy(at->device);
    if (at->queue != NULL) {
        clReleaseCommandQueue(at->queue);
    }
    if (at->context != NULL) {
        clReleaseContext(at->context);
    }
}

int loglin_tune_worker(const char *text) {
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL); /* a call that hangs must not outlive the tuner */
    /* PoCL's threads, where nobody has pinned them, may share a core for the first few hundred milliseconds. */
    (void)setenv("POCL_AFFINITY", "1", 0); // NOLINT(concurrency-mt-unsafe): there is no other thread yet
    loglin_request request;
    loglin_reply reply = {.outcome = LOGLIN_OUTCOME_FAILED};
    loglin_status status = loglin_request_parse(text, &request);
    measurement at = {.request = &request, .random = 1};
    status = status != LOGLIN_OK ? status : open_device(&at);
    if (status == LOGLIN_OK) {
        status = request.kind == LOGLIN_REQUEST_PEAK ? time_rates(&at, &reply) : time_configuration(&at, &reply);
    }
    if (status != LOGLIN_OK) {
        (void)snprintf(reply.reason, sizeof reply.reason, "refused");
        (void)snprintf(reply.detail, sizeof reply.detail, "%s: %.180s", loglin_strerror(status), loglin_last_error());
    }
    char *printed = loglin_reply_print(&reply);
    const bool said = printed != NULL && puts(printed) >= 0 && fflush(stdout) == 0;
    free(printed);
    close_measurement(&at);
    return said ? 0 : 1;
}
