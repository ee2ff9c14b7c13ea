/* SPDX-License-Identifier: Apache-2.0 */
/* Runs cl/nvidia_probe.cl once and remembers the outcome. */
#include "engine/nvidia.h"
#include "runtime/device.h"
#include "runtime/program.h"
#include "runtime/status.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { ROWS = 64, INNER = 64, COLUMNS = 64, GROUPS = 256 };

/* The trial run itself holds a and b in local memory. */
static const size_t least_bytes = sizeof(uint16_t[ROWS + COLUMNS][INNER]);

typedef struct probe_buffers {
    cl_mem a, b, products, faults;
} probe_buffers;

/* Small whole numbers, exact in every type and product. */
static int a_at(int row, int column) {
    return (row * 5 + column * 3) % 7 - 3;
}

static int b_at(int row, int column) {
    return (row * 2 + column * 7) % 5 - 2;
}

/* A whole number of at most 4 in size, as half or bfloat16. */
static uint16_t encode(int x, loglin_dtype dtype) {
    static const uint16_t half[] = {0, 0x3c00, 0x4000, 0x4200, 0x4400};
    static const uint16_t bfloat[] = {0, 0x3f80, 0x4000, 0x4040, 0x4080};
    const uint16_t size = (dtype == LOGLIN_F16 ? half : bfloat)[x < 0 ? -x : x];
    return x < 0 ? (uint16_t)(size | 0x8000u) : size;
}

static loglin_status make_buffer(const loglin_device *device, size_t size, void *contents, cl_mem *buffer) {
    cl_int code = CL_SUCCESS;
    const cl_mem_flags flags = CL_MEM_READ_WRITE | (contents != NULL ? CL_MEM_COPY_HOST_PTR : 0);
    *buffer = clCreateBuffer(device->context, flags, size, contents, &code);
    return code == CL_SUCCESS ? LOGLIN_OK : loglin_fail(code, "clCreateBuffer: %s", loglin_strerror(code));
}

static loglin_status make_buffers(const loglin_device *device, loglin_dtype dtype, probe_buffers *buffers) {
    uint16_t a[ROWS * INNER], b[INNER * COLUMNS];
    for (int row = 0; row < ROWS; row++) {
        for (int column = 0; column < INNER; column++) {
            a[row * INNER + column] = encode(a_at(row, column), dtype);
        }
    }
    for (int row = 0; row < INNER; row++) {
        for (int column = 0; column < COLUMNS; column++) {
            b[row * COLUMNS + column] = encode(b_at(row, column), dtype);
        }
    }
    RETURN_IF_ERROR(make_buffer(device, sizeof a, a, &buffers->a));
    RETURN_IF_ERROR(make_buffer(device, sizeof b, b, &buffers->b));
    RETURN_IF_ERROR(make_buffer(device, sizeof(float) * GROUPS * ROWS * COLUMNS, NULL, &buffers->products));
    return make_buffer(device, sizeof(cl_uint) * GROUPS * NV_ITEMS, NULL, &buffers->faults);
}

/* So that a kernel that writes nothing does not pass with what the one before it has left in memory. */
static loglin_status spoil(cl_command_queue queue, const probe_buffers *buffers) {
    static const float not_a_product = NAN;
    static const cl_uint fault = 1;
    RETURN_IF_CL_ERROR(clEnqueueFillBuffer(queue, buffers->products, &not_a_product, sizeof not_a_product, 0,
                                           sizeof(float) * GROUPS * ROWS * COLUMNS, 0, NULL, NULL));
    RETURN_IF_CL_ERROR(clEnqueueFillBuffer(queue, buffers->faults, &fault, sizeof fault, 0,
                                           sizeof(cl_uint) * GROUPS * NV_ITEMS, 0, NULL, NULL));
    return LOGLIN_OK;
}

static loglin_status compare(cl_command_queue queue, const probe_buffers *buffers) {
    static const size_t group_size = (size_t)ROWS * COLUMNS;
    float products[ROWS * COLUMNS];
    cl_uint faults[NV_ITEMS];
    for (size_t group = 0; group < GROUPS; group++) {
        RETURN_IF_CL_ERROR(clEnqueueReadBuffer(queue, buffers->products, CL_TRUE, group * group_size * sizeof(float),
                                               sizeof products, products, 0, NULL, NULL));
        RETURN_IF_CL_ERROR(clEnqueueReadBuffer(queue, buffers->faults, CL_TRUE, group * sizeof faults, sizeof faults,
                                               faults, 0, NULL, NULL));
        for (int i = 0; i < ROWS * COLUMNS; i++) {
            int expected = 0;
            for (int inner = 0; inner < INNER; inner++) {
                expected += a_at(i / COLUMNS, inner) * b_at(inner, i % COLUMNS);
            }
            if (products[i] != (float)expected) {
                return loglin_fail(LOGLIN_UNSUPPORTED, "the matrix units give %g, expected %d", (double)products[i],
                                   expected);
            }
        }
        for (int i = 0; i < NV_ITEMS; i++) {
            if (faults[i] != 0) {
                return loglin_fail(LOGLIN_UNSUPPORTED, "local memory or PTX instructions give wrong numbers");
            }
        }
    }
    return LOGLIN_OK;
}

static loglin_status run(cl_command_queue queue, cl_kernel kernel, const probe_buffers *buffers) {
    const size_t items = (size_t)GROUPS * NV_ITEMS, group = NV_ITEMS;
    const cl_mem arguments[] = {buffers->a, buffers->b, buffers->products, buffers->faults};
    for (cl_uint i = 0; i < sizeof arguments / sizeof arguments[0]; i++) {
        RETURN_IF_CL_ERROR(clSetKernelArg(kernel, i, sizeof arguments[i], &arguments[i]));
    }
    RETURN_IF_ERROR(spoil(queue, buffers));
    RETURN_IF_CL_ERROR(clEnqueueNDRangeKernel(queue, kernel, 1, NULL, &items, &group, 0, NULL, NULL));
    return compare(queue, buffers);
}

static loglin_status try_out(loglin_device *device, loglin_dtype dtype, bool wgmma, size_t local_bytes) {
    static const char *const files[] = {"common.cl", "mma_nvidia.cl", "nvidia_layout.cl", "nvidia_probe.cl", NULL};
    char options[128];
    (void)snprintf(options, sizeof options, "-DSTORAGE=%d -DPROBE_BYTES=%zu %s", (int)dtype, local_bytes,
                   wgmma ? LOGLIN_HIDDEN_INSTRUCTIONS : "");
    cl_program program;
    RETURN_IF_ERROR(loglin_program_get(device, files, options, &program));
    cl_int code = CL_SUCCESS;
    cl_kernel kernel = clCreateKernel(program, "nvidia_probe", &code);
    if (code != CL_SUCCESS) {
        return loglin_fail(code, "clCreateKernel(nvidia_probe): %s", loglin_strerror(code));
    }
    probe_buffers buffers = {NULL, NULL, NULL, NULL};
    cl_command_queue queue = clCreateCommandQueue(device->context, device->id, 0, &code);
    loglin_status status = code == CL_SUCCESS ? make_buffers(device, dtype, &buffers)
                                              : loglin_fail(code, "clCreateCommandQueue: %s", loglin_strerror(code));
    if (status == LOGLIN_OK) {
        status = run(queue, kernel, &buffers);
    }
    const cl_mem made[] = {buffers.a, buffers.b, buffers.products, buffers.faults};
    for (size_t i = 0; i < sizeof made / sizeof made[0]; i++) {
        if (made[i] != NULL) {
            clReleaseMemObject(made[i]);
        }
    }
    if (queue != NULL) {
        clReleaseCommandQueue(queue);
    }
    clReleaseKernel(kernel);
    return status;
}

static loglin_status probe(loglin_device *device, loglin_dtype dtype, bool wgmma, size_t local_bytes) {
    const size_t step = 1024, wanted = local_bytes > least_bytes ? local_bytes : least_bytes;
    const size_t bytes = ceil_div(wanted, step) * step;
    mtx_lock(&device->lock);
    const struct loglin_nvidia_probe known = device->nvidia_probe[dtype == LOGLIN_F16][wgmma];
    mtx_unlock(&device->lock);
    if (bytes <= known.passed) {
        return LOGLIN_OK;
    }
    if (known.failed == 0 || bytes < known.failed) {
        const loglin_status status = try_out(device, dtype, wgmma, bytes);
        mtx_lock(&device->lock);
        struct loglin_nvidia_probe *now = &device->nvidia_probe[dtype == LOGLIN_F16][wgmma];
        if (status == LOGLIN_OK) {
            now->passed = bytes > now->passed ? bytes : now->passed;
        } else {
            now->failed = now->failed == 0 || bytes < now->failed ? bytes : now->failed;
        }
        mtx_unlock(&device->lock);
        if (status == LOGLIN_OK) {
            return LOGLIN_OK;
        }
        char reason[512];
        (void)snprintf(reason, sizeof reason, "%s", loglin_last_error());
        return loglin_fail(LOGLIN_UNSUPPORTED, "%s", reason);
    }
    return loglin_fail(LOGLIN_UNSUPPORTED,
                       "the device did not pass the engine's trial run with %zu bytes of local memory", bytes);
}

loglin_status loglin_nvidia_probe(loglin_device *device, loglin_dtype dtype, size_t local_bytes) {
    return probe(device, dtype, false, local_bytes);
}

loglin_status loglin_nvidia_probe_wgmma(loglin_device *device, loglin_dtype dtype, size_t local_bytes) {
    return probe(device, dtype, true, local_bytes);
}
