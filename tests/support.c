/* SPDX-License-Identifier: Apache-2.0 */
/* Implementation of support.h; shares no code with the library. */
#include "support.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD = 64 }; /* elements behind an output */
enum { WORKSPACE_GUARD = 4096 };

void support_die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    abort();
}

void *support_alloc(size_t count, size_t size) {
    void *memory = calloc(count > 0 ? count : 1, size);
    if (memory == NULL) {
        support_die("out of memory for %zu elements of %zu bytes", count, size);
    }
    return memory;
}

/* ---- Device ----------------------------------------------------------------------------------------------------- */

void support_require(loglin_status status, const char *what) {
    if (status != LOGLIN_OK) {
        support_die("%s: %s (%s)", what, loglin_strerror(status), loglin_last_error());
    }
}

static void open_device(support_device *opened) {
    cl_int status = CL_SUCCESS;
    support_require(loglin_select_device(NULL, &opened->id), "loglin_select_device");
    opened->context = clCreateContext(NULL, 1, &opened->id, NULL, NULL, &status);
    support_require(status, "clCreateContext");
    opened->queue = clCreateCommandQueueWithProperties(opened->context, opened->id, NULL, &status);
    support_require(status, "clCreateCommandQueueWithProperties");
    const cl_queue_properties properties[] = {CL_QUEUE_PROPERTIES, CL_QUEUE_OUT_OF_ORDER_EXEC_MODE_ENABLE, 0};
    opened->out_of_order = clCreateCommandQueueWithProperties(opened->context, opened->id, properties, &status);
    if (status != CL_SUCCESS) {
        opened->out_of_order = NULL;
    }
    support_require(loglin_device_create(opened->context, opened->id, &opened->device), "loglin_device_create");
}

static support_device the_device;

const support_device *support_open(void) {
    if (the_device.device == NULL) {
        open_device(&the_device); /* to the end of the process: some drivers are gone when exit handlers run */
    }
    return &the_device;
}

/* ---- Random numbers --------------------------------------------------------------------------------------------- */

static uint64_t next_bits(support_random *random) /* splitmix64 */
{
    random->state += 0x9E3779B97F4A7C15u;
    uint64_t x = random->state;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

double support_uniform(support_random *random) {
    return (double)(next_bits(random) >> 11) * 0x1p-53;
}

double support_normal(support_random *random) /* Box-Muller */
{
    const double radius = sqrt(-2.0 * log(1.0 - support_uniform(random)));
    return radius * cos(6.283185307179586 * support_uniform(random));
}

/* ---- Storage types ---------------------------------------------------------------------------------------------- */

size_t support_dtype_size(loglin_dtype dtype) {
    return dtype == LOGLIN_F32 ? 4 : 2;
}

const char *support_dtype_name(loglin_dtype dtype) {
    return dtype == LOGLIN_F32 ? "f32" : dtype == LOGLIN_F16 ? "f16" : "bf16";
}

static uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static float bits_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

uint16_t support_to_bf16(float x) {
    const uint32_t bits = float_bits(x);
    if (isnan(x)) {
        return (uint16_t)((bits >> 16) | 0x40);
    }
    return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

float support_from_bf16(uint16_t bits) {
    return bits_float((uint32_t)bits << 16);
}

uint16_t support_to_f16(float x) {
    const uint16_t sign = (uint16_t)((float_bits(x) >> 16) & 0x8000);
    const double magnitude = fabs((double)x);
    if (isnan(x)) {
        return (uint16_t)(sign | 0x7E00);
    }
    if (magnitude >= 65520.0) { /* halfway from the largest number to the next power of two */
        return (uint16_t)(sign | 0x7C00);
    }
    int exponent = -14; /* of subnormals too, whose unit is 2^-24 */
    if (magnitude >= 0x1p-14) {
        exponent = ilogb(magnitude);
    }
    const double units = nearbyint(ldexp(magnitude, 10 - exponent)); /* ties to even; exact before */
    const unsigned biased = (unsigned)(exponent + 14) * 1024u + (unsigned)units;
    return (uint16_t)(sign | biased); /* a carry out of the units is the next exponent */
}

float support_from_f16(uint16_t bits) {
    const int exponent = (bits >> 10) & 0x1F;
    const int units = bits & 0x3FF;
    float magnitude;
    if (exponent == 0x1F) {
        magnitude = units == 0 ? INFINITY : NAN;
    } else if (exponent == 0) {
        magnitude = ldexpf((float)units, -24);
    } else {
        magnitude = ldexpf((float)(units + 1024), exponent - 25);
    }
    return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

static void store(loglin_dtype dtype, double x, void *to) {
    const float single = (float)x;
    if (dtype == LOGLIN_F32) {
        memcpy(to, &single, sizeof single);
        return;
    }
    const uint16_t bits = dtype == LOGLIN_F16 ? support_to_f16(single) : support_to_bf16(single);
    memcpy(to, &bits, sizeof bits);
}

static double load(loglin_dtype dtype, const void *from) {
    if (dtype == LOGLIN_F32) {
        float single;
        memcpy(&single, from, sizeof single);
        return (double)single;
    }
    uint16_t bits;
    memcpy(&bits, from, sizeof bits);
    return (double)(dtype == LOGLIN_F16 ? support_from_f16(bits) : support_from_bf16(bits));
}

double support_round(loglin_dtype dtype, double x) {
    float bytes;
    store(dtype, x, &bytes);
    return load(dtype, &bytes);
}

/* ---- Buffers ---------------------------------------------------------------------------------------------------- */

static cl_mem make_buffer(size_t bytes, void *contents) {
    cl_int status = CL_SUCCESS;
    cl_mem mem =
        clCreateBuffer(support_open()->context, CL_MEM_READ_WRITE | CL_MEM_COPY_HOST_PTR, bytes, contents, &status);
    support_require(status, "clCreateBuffer");
    return mem;
}

/* The whole buffer of an array in host memory, all guard. */
static size_t array_elements(const support_array *array) {
    const size_t elements = array->offset + array->count + (array->guarded ? GUARD : 0);
    return elements > 0 ? elements : 1; /* a buffer cannot be empty */
}

static unsigned char *blank_contents(const support_array *array) {
    const size_t bytes = array_elements(array) * array->element;
    unsigned char *contents = support_alloc(bytes, 1);
    memset(contents, 0xFF, bytes);
    return contents;
}

static support_array make_array(support_array array, unsigned char *contents) {
    array.mem = make_buffer(array_elements(&array) * array.element, contents);
    free(contents);
    return array;
}

static support_array float_array(support_array array, const double *values) {
    array.element = support_dtype_size(array.dtype);
    unsigned char *contents = blank_contents(&array);
    for (size_t i = 0; i < array.count; i++) {
        store(array.dtype, values[i], contents + (array.offset + i) * array.element);
    }
    return make_array(array, contents);
}

static support_array int_array(support_array array, const int32_t *values) {
    array.element = sizeof *values;
    unsigned char *contents = blank_contents(&array);
    if (array.count > 0) {
        memcpy(contents + array.offset * array.element, values, array.count * array.element);
    }
    return make_array(array, contents);
}

support_array support_input(loglin_dtype dtype, const double *values, size_t count, size_t offset) {
    return float_array((support_array){.offset = offset, .count = count, .dtype = dtype}, values);
}

support_array support_input_ints(const int32_t *values, size_t count, size_t offset) {
    return int_array((support_array){.offset = offset, .count = count}, values);
}

support_array support_inout(loglin_dtype dtype, const double *values, size_t count, size_t offset) {
    return float_array((support_array){.offset = offset, .count = count, .dtype = dtype, .guarded = true}, values);
}

support_array support_inout_ints(const int32_t *values, size_t count, size_t offset) {
    return int_array((support_array){.offset = offset, .count = count, .guarded = true}, values);
}

support_array support_output(loglin_dtype dtype, size_t count, size_t offset) {
    const support_array array = {
        .offset = offset, .count = count, .element = support_dtype_size(dtype), .dtype = dtype, .guarded = true};
    return make_array(array, blank_contents(&array));
}

support_array support_output_ints(size_t count, size_t offset) {
    const support_array array = {.offset = offset, .count = count, .element = sizeof(int32_t), .guarded = true};
    return make_array(array, blank_contents(&array));
}

loglin_buffer support_buffer(const support_array *array) {
    return (loglin_buffer){.mem = array->mem, .offset = array->offset};
}

static bool all_ones(const unsigned char *bytes, size_t count) {
    for (size_t i = 0; i < count; i++) {
        if (bytes[i] != 0xFF) {
            return false;
        }
    }
    return true;
}

static unsigned char *download(cl_mem mem, size_t bytes) {
    unsigned char *contents = support_alloc(bytes, 1);
    support_require(clEnqueueReadBuffer(support_open()->queue, mem, CL_TRUE, 0, bytes, contents, 0, NULL, NULL),
                    "clEnqueueReadBuffer");
    return contents;
}

static bool guards_intact(const support_array *array, const unsigned char *contents) {
    const size_t end = array->offset + array->count;
    return all_ones(contents, array->offset * array->element) &&
           (!array->guarded || all_ones(contents + end * array->element, GUARD * array->element));
}

bool support_read(const support_array *array, double *values) {
    unsigned char *contents = download(array->mem, array_elements(array) * array->element);
    for (size_t i = 0; i < array->count; i++) {
        values[i] = load(array->dtype, contents + (array->offset + i) * array->element);
    }
    const bool intact = guards_intact(array, contents);
    free(contents);
    return intact;
}

bool support_read_ints(const support_array *array, int32_t *values) {
    unsigned char *contents = download(array->mem, array_elements(array) * array->element);
    memcpy(values, contents + array->offset * array->element, array->count * array->element);
    const bool intact = guards_intact(array, contents);
    free(contents);
    return intact;
}

support_workspace support_workspace_make(size_t bytes) {
    support_workspace workspace = {.bytes = bytes};
    if (bytes == 0) {
        return workspace;
    }
    const size_t whole = bytes + 2 * WORKSPACE_GUARD;
    unsigned char *contents = support_alloc(whole, 1);
    memset(contents, 0xFF, whole);
    workspace.whole = make_buffer(whole, contents);
    free(contents);
    cl_int status = CL_SUCCESS;
    const cl_buffer_region region = {.origin = WORKSPACE_GUARD, .size = bytes};
    workspace.mem =
        clCreateSubBuffer(workspace.whole, CL_MEM_READ_WRITE, CL_BUFFER_CREATE_TYPE_REGION, &region, &status);
    support_require(status, "clCreateSubBuffer");
    return workspace;
}

bool support_workspace_intact(const support_workspace *workspace) {
    if (workspace->bytes == 0) {
        return true;
    }
    unsigned char *contents = download(workspace->whole, workspace->bytes + 2 * WORKSPACE_GUARD);
    const bool intact =
        all_ones(contents, WORKSPACE_GUARD) && all_ones(contents + WORKSPACE_GUARD + workspace->bytes, WORKSPACE_GUARD);
    free(contents);
    return intact;
}

void support_workspace_free(support_workspace *workspace) {
    if (workspace->bytes > 0) {
        clReleaseMemObject(workspace->mem);
        clReleaseMemObject(workspace->whole);
    }
    *workspace = (support_workspace){0};
}

void support_array_free(support_array *array) {
    if (array->mem != NULL) {
        clReleaseMemObject(array->mem);
    }
    *array = (support_array){0};
}

/* ---- The metric ------------------------------------------------------------------------------------------------- */

double support_error(const double *got, const double *expected, size_t count) {
    double difference = 0.0;
    double norm = 0.0;
    for (size_t i = 0; i < count; i++) {
        difference += (got[i] - expected[i]) * (got[i] - expected[i]);
        norm += expected[i] * expected[i];
    }
    if (difference == 0.0) {
        return 0.0;
    }
    return norm > 0.0 && isfinite(difference) ? sqrt(difference / norm) : INFINITY;
}

double support_threshold(loglin_dtype dtype, support_kind kind) {
    static const double thresholds[][2] = {
        [LOGLIN_F32] = {[SUPPORT_OUTPUT] = 1e-5, [SUPPORT_GRADIENT] = 5e-5},
        [LOGLIN_F16] = {[SUPPORT_OUTPUT] = 2e-3, [SUPPORT_GRADIENT] = 2e-3},
        [LOGLIN_BF16] = {[SUPPORT_OUTPUT] = 1e-2, [SUPPORT_GRADIENT] = 1e-2},
    };
    return thresholds[dtype][kind];
}
