/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The measurement: random inputs, outputs between guards and full of NaN, one call whose results are compared with
 * float64, and then the calls that are timed.  It runs in a process of its own, whose end frees what a failure leaves.
 */
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
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { GUARD = 64 };                          /* elements before and behind an array */
static const double reference_budget = 1.5e8; /* multiplications that the comparison may take */
static const double short_call = 200;         /* ms: longer calls do not feel what the caches held before */
static const double enough_ms = 2000;         /* no further run is timed behind so many */

/* ---- Arrays ------------------------------------------------------------------------------------------------------ */

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

static double uniform(measurement *at) {
    return (double)(loglin_search_random(&at->random) >> 11) * 0x1p-53;
}

/* Rounded as the device stores it. */
static double rounded(loglin_dtype dtype, double x) {
    float value = (float)x;
    unsigned char bytes[sizeof(float)];
    loglin_tensor_from_float(stored(dtype), &value, 1, bytes);
    loglin_tensor_to_float(stored(dtype), bytes, 1, &value);
    return (double)value;
}

static loglin_status make_buffer(measurement *at, array *made, bool guarded) {
    const size_t size = loglin_dtype_size(made->dtype), guards = guarded ? (size_t)2 * GUARD : 0;
    const size_t bytes = (made->count + guards) * size;
    unsigned char *content = malloc(bytes + 1);
    float *floats = malloc((made->count + 1) * sizeof *floats);
    loglin_status status = LOGLIN_OK;
    if (content == NULL || floats == NULL) {
        status = loglin_fail(LOGLIN_OUT_OF_MEMORY, "measurement: out of host memory");
    } else {
        memset(content, 0xff, bytes);
        for (size_t i = 0; i < made->count && !guarded; i++) {
            floats[i] = (float)made->values[i];
        }
        if (!guarded) {
            loglin_tensor_from_float(stored(made->dtype), floats, made->count, content);
        }
        cl_int code;
        made->mem = clCreateBuffer(at->context, CL_MEM_READ_WRITE | CL_MEM_COPY_HOST_PTR, bytes > 0 ? bytes : 1,
                                   content, &code);
        status = code == CL_SUCCESS ? LOGLIN_OK : loglin_fail(code, "clCreateBuffer: %s", loglin_strerror(code));
    }
    free(content);
    free(floats);
    return status;
}

static loglin_status make_input(measurement *at, int which, loglin_dtype dtype, size_t count, double low, double high) {
    array *made = &at->in[which];
    *made = (array){.count = count, .dtype = dtype, .values = calloc(count + 1, sizeof(double))};
    if (made->values == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "measurement: out of host memory");
    }
    for (size_t i = 0; i < count; i++) {
        made->values[i] = rounded(dtype, low + (high - low) * uniform(at));
    }
    return which == IN_DO ? LOGLIN_OK : make_buffer(at, made, false); /* do depends on the rows that are compared */
}

static loglin_status make_output(measurement *at, int which, loglin_dtype dtype, size_t count) {
    array *made = &at->out[which];
    *made = (array){.count = count, .dtype = dtype, .values = calloc(count + 1, sizeof(double))};
    return made->values == NULL ? loglin_fail(LOGLIN_OUT_OF_MEMORY, "measurement: out of host memory")
                                : make_buffer(at, made, true);
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
    return make_input(at, IN_DO, p->dtype, n->vo, -1, 1);
}

static loglin_status make_outputs(measurement *at) {
    const loglin_problem *p = &at->problem;
    const loglin_counts *n = &at->counts;
    if (p->phases == LOGLIN_FORWARD) {
        return make_output(at, OUT_O, p->dtype, n->vo);
    }
    RETURN_IF_ERROR(make_output(at, OUT_Q, p->dtype, n->qk));
    RETURN_IF_ERROR(make_output(at, OUT_K, p->dtype, n->qk));
    RETURN_IF_ERROR(make_output(at, OUT_V, p->dtype, n->vo));
    RETURN_IF_ERROR(make_output(at, OUT_G, LOGLIN_F32, n->gates));
    RETURN_IF_ERROR(make_output(at, OUT_SCALES, p->weight_dtype, n->level_scales));
    return p->op == LOGLIN_GATED_DELTA ? make_output(at, OUT_BETA, p->weight_dtype, n->gates) : LOGLIN_OK;
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

/* Are the bytes of both guards as they were made? */
static bool guards_are_intact(const unsigned char *content, size_t bytes, size_t guard) {
    for (size_t i = 0; i < guard; i++) {
        if (content[i] != 0xff || content[bytes - 1 - i] != 0xff) {
            return false;
        }
    }
    return true;
}

/* Reads an array with its guards into content; floats receives the array in between. */
static loglin_status read_content(measurement *at, const array *from, unsigned char *content, size_t bytes,
                                  float *floats, bool *intact) {
    const size_t guard = GUARD * loglin_dtype_size(from->dtype);
    if (content == NULL || floats == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "measurement: out of host memory");
    }
    RETURN_IF_CL_ERROR(clEnqueueReadBuffer(at->queue, from->mem, CL_TRUE, 0, bytes, content, 0, NULL, NULL));
    *intact = *intact && guards_are_intact(content, bytes, guard);
    loglin_tensor_to_float(stored(from->dtype), content + guard, from->count, floats);
    return LOGLIN_OK;
}

/* Reads an array back, its values unless NULL; *intact becomes false if a guard was overwritten. */
static loglin_status read_back(measurement *at, const array *from, double *values, bool *intact) {
    const size_t bytes = (from->count + (size_t)2 * GUARD) * loglin_dtype_size(from->dtype);
    unsigned char *content = malloc(bytes + 1);
    float *floats = malloc((from->count + 1) * sizeof *floats);
    const loglin_status status = read_content(at, from, content, bytes, floats, intact);
    for (size_t i = 0; i < from->count && values != NULL && status == LOGLIN_OK; i++) {
        values[i] = (double)floats[i];
    }
    free(content);
    free(floats);
    return status;
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

static bool all_finite(const array *values) {
    for (size_t i = 0; i < values->count; i++) {
        if (!isfinite(values->values[i])) {
            return false;
        }
    }
    return true;
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

/* do stays in the compared rows and is 0 in all others: then every gradient depends on those alone. */
static loglin_status finish_do(measurement *at) {
    const loglin_problem *p = &at->problem;
    const size_t rows = p->batch * p->length * p->heads, step = row_step(at);
    for (size_t row = 0; row < rows; row++) {
        if ((rows - 1 - row) % step != 0) {
            memset(at->in[IN_DO].values + row * p->dim_v, 0, p->dim_v * sizeof(double));
        }
    }
    return make_buffer(at, &at->in[IN_DO], false);
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
        expected[i] = calloc(at->out[i].count + 1, sizeof *expected[i]);
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
    RETURN_IF_ERROR(read_back(at, &at->workspace, NULL, &intact));
    for (int i = 0; i < OUTPUT_COUNT; i++) {
        if (at->out[i].mem != NULL) {
            RETURN_IF_ERROR(read_back(at, &at->out[i], at->out[i].values, &intact));
            finite = finite && all_finite(&at->out[i]);
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
    at->workspace.count = loglin_workspace_size(at->plan, (loglin_phase)at->problem.phases) / sizeof(float);
    RETURN_IF_ERROR(make_buffer(at, &at->workspace, true));
    RETURN_IF_ERROR(make_inputs(at));
    RETURN_IF_ERROR(finish_do(at));
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
    at->workspace = (array){.count = bytes / sizeof(float)};
    cl_mem to = NULL;
    loglin_status status = make_buffer(at, &at->workspace, true);
    if (status == LOGLIN_OK) {
        to = clCreateBuffer(at->context, CL_MEM_READ_WRITE, bytes, NULL, &code);
        status = code == CL_SUCCESS ? LOGLIN_OK : loglin_fail(code, "clCreateBuffer: %s", loglin_strerror(code));
    }
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
