/* SPDX-License-Identifier: Apache-2.0 */
/* The only file that knows CLBlast. */
#include "engine/gemm.h"

#include "runtime/device.h"
#include "runtime/log.h"
#include "runtime/status.h"

#include <clblast_c.h>
#include <limits.h>
#include <pthread.h>
#include <stdlib.h>

/*
 * CLBlast takes its direct kernels, which neither allocate nor copy, where m n k is below this number cubed,
 * which its 64-bit arithmetic holds: always.
 */
static const size_t always_direct = 1u << 20;

/* OpenCL's codes, which CLBlast passes on, have names; its own lie far below them. */
static loglin_status gemm_status(CLBlastStatusCode code) {
    if (code == CLBlastSuccess) {
        return LOGLIN_OK;
    }
    const bool is_opencl = (int)code > -1000;
    return loglin_fail(LOGLIN_BLAS_FAILED, "CLBlast: status %d%s%s", (int)code, is_opencl ? ", " : "",
                       is_opencl ? loglin_strerror((int)code) : "");
}

/* One past the last element that a matrix of a batch reaches. */
static size_t matrix_end(const loglin_matrix *matrix, size_t rows, size_t columns, size_t batch) {
    return matrix->offset + (batch - 1) * matrix->stride + (rows - 1) * matrix->row + columns;
}

loglin_status loglin_gemm_enqueue(const loglin_gemm *gemm, cl_command_queue queue) {
    const size_t m = gemm->m, n = gemm->n, k = gemm->k;
    const size_t ends[] = {
        matrix_end(&gemm->a, gemm->transpose_a ? k : m, gemm->transpose_a ? m : k, gemm->batch),
        matrix_end(&gemm->b, gemm->transpose_b ? n : k, gemm->transpose_b ? k : n, gemm->batch),
        matrix_end(&gemm->c, m, n, gemm->batch),
    };
    for (size_t i = 0; i < 3; i++) {
        if (ends[i] > (size_t)INT_MAX) {
            return loglin_fail(LOGLIN_UNSUPPORTED,
                               "CLBlast: a product's operand ends at element %zu, expected below 2^31", ends[i]);
        }
    }
    return gemm_status(CLBlastSgemmStridedBatched(
        CLBlastLayoutRowMajor, gemm->transpose_a ? CLBlastTransposeYes : CLBlastTransposeNo,
        gemm->transpose_b ? CLBlastTransposeYes : CLBlastTransposeNo, m, n, k, gemm->alpha, gemm->a.mem, gemm->a.offset,
        gemm->a.row, gemm->a.stride, gemm->b.mem, gemm->b.offset, gemm->b.row, gemm->b.stride, gemm->beta, gemm->c.mem,
        gemm->c.offset, gemm->c.row, gemm->c.stride, gemm->batch, &queue, NULL));
}

/* A first product of every kind, so that none compiles later. */
static loglin_status warm_up(loglin_device *device) {
    const size_t size = 4;
    cl_int code;
    cl_command_queue queue = clCreateCommandQueue(device->context, device->id, 0, &code);
    RETURN_IF_CL_ERROR(code);
    const float zeros[3 * 4 * 4] = {0};
    cl_mem buffer =
        clCreateBuffer(device->context, CL_MEM_READ_WRITE | CL_MEM_COPY_HOST_PTR, sizeof zeros, (void *)zeros, &code);
    loglin_status status = LOGLIN_OK;
    if (code != CL_SUCCESS) {
        status = loglin_fail(code, "clCreateBuffer: %s", loglin_strerror(code));
    }
    for (int kind = 0; kind < 3 && status == LOGLIN_OK; kind++) {
        status = loglin_gemm_enqueue(&(loglin_gemm){.transpose_a = kind == 1,
                                                    .transpose_b = kind == 2,
                                                    .m = size,
                                                    .n = size,
                                                    .k = size,
                                                    .batch = 1,
                                                    .alpha = 1.0f,
                                                    .a = {buffer, 0, size, size * size},
                                                    .b = {buffer, size * size, size, size * size},
                                                    .c = {buffer, 2 * size * size, size, size * size}},
                                     queue);
    }
    if (status == LOGLIN_OK) {
        code = clFinish(queue);
        status = code == CL_SUCCESS ? LOGLIN_OK : loglin_fail(code, "clFinish: %s", loglin_strerror(code));
    }
    if (buffer != NULL) {
        clReleaseMemObject(buffer);
    }
    clReleaseCommandQueue(queue);
    return status;
}

static loglin_status override_parameters(cl_device_id id, const char *kernel, size_t count, const char *const *names,
                                         const size_t *values) {
    return gemm_status(
        CLBlastOverrideParameters(id, kernel, CLBlastPrecisionSingle, count, (const char **)names, values));
}

static loglin_status set_direct_parameters(cl_device_id id, const loglin_gemm_parameters *parameters) {
    size_t values[LOGLIN_GEMM_PARAMETER_COUNT];
    for (size_t i = 0; i < LOGLIN_GEMM_PARAMETER_COUNT; i++) {
        values[i] = parameters->values[i];
    }
    return override_parameters(id, "XgemmDirect", LOGLIN_GEMM_PARAMETER_COUNT, loglin_gemm_parameter_names, values);
}

/*
 * CLBlast keeps parameters and programs for the process, by device.  To set them again would throw away programs that
 * another context's plans rely on, so a device is set once.
 */
typedef struct set_device {
    struct set_device *next;
    cl_device_id id;
} set_device;

static pthread_mutex_t set_lock = PTHREAD_MUTEX_INITIALIZER;
static set_device *set_devices;

/* With set_lock held. */
static loglin_status set_once(cl_device_id id, const loglin_gemm_parameters *parameters, bool *is_new) {
    for (const set_device *known = set_devices; known != NULL; known = known->next) {
        if (known->id == id) {
            return LOGLIN_OK;
        }
    }
    set_device *made = malloc(sizeof *made);
    if (made == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "CLBlast: out of host memory");
    }
    static const char *const name = "XGEMM_MIN_INDIRECT_SIZE";
    loglin_status status = override_parameters(id, "GemmRoutine", 1, &name, &always_direct);
    if (status == LOGLIN_OK && !loglin_gemm_parameters_absent(parameters)) {
        status = set_direct_parameters(id, parameters);
    }
    if (status != LOGLIN_OK) {
        free(made);
        return status;
    }
    *made = (set_device){.next = set_devices, .id = id};
    set_devices = made;
    *is_new = true;
    return LOGLIN_OK;
}

/* What every device compiles: no vectors, few work-items. */
static const loglin_gemm_parameters plain_parameters = {{[LOGLIN_GEMM_WGD] = 32,
                                                         [LOGLIN_GEMM_MDIMCD] = 8,
                                                         [LOGLIN_GEMM_NDIMCD] = 8,
                                                         [LOGLIN_GEMM_MDIMAD] = 8,
                                                         [LOGLIN_GEMM_NDIMBD] = 8,
                                                         [LOGLIN_GEMM_KWID] = 2,
                                                         [LOGLIN_GEMM_VWMD] = 1,
                                                         [LOGLIN_GEMM_VWND] = 1,
                                                         [LOGLIN_GEMM_PADA] = 1,
                                                         [LOGLIN_GEMM_PADB] = 1}};

static loglin_status set_and_compile(loglin_device *device, const loglin_gemm_parameters *parameters) {
    bool is_new = false;
    if (!loglin_gemm_parameters_fit(parameters, &device->info)) {
        loglin_log(LOGLIN_LOG_INFO, "%s: tuned parameters of CLBlast are beyond its limits and not used",
                   device->info.name);
        parameters = &plain_parameters;
    }
    RETURN_IF_ERROR(set_once(device->id, parameters, &is_new));
    loglin_status status = warm_up(device);
    if (status != LOGLIN_OK && is_new && parameters != &plain_parameters) {
        loglin_log(LOGLIN_LOG_WARN, "%s: %s fail and are not used: %s", device->info.name,
                   loglin_gemm_parameters_absent(parameters) ? "CLBlast's own parameters"
                                                             : "tuned parameters of CLBlast",
                   loglin_last_error());
        RETURN_IF_ERROR(set_direct_parameters(device->id, &plain_parameters));
        status = warm_up(device);
    }
    return status;
}

loglin_status loglin_gemm_prepare(loglin_device *device, const loglin_gemm_parameters *parameters) {
    loglin_status status = LOGLIN_OK;
    mtx_lock(&device->lock);
    if (!device->gemm_ready) {
        (void)pthread_mutex_lock(&set_lock);
        status = set_and_compile(device, parameters);
        (void)pthread_mutex_unlock(&set_lock);
        device->gemm_ready = status == LOGLIN_OK;
    }
    mtx_unlock(&device->lock);
    return status;
}
