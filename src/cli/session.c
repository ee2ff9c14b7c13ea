/* SPDX-License-Identifier: Apache-2.0 */
/* The OpenCL side of the command. */
#include "cli/session.h"

#include "cli/waiting.h"

#include <stdlib.h>
#include <time.h>

double loglin_cli_now_ms(void) {
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
}

loglin_cli_status loglin_cli_find_info(cl_device_id id, loglin_device_info *info) {
    size_t count = 0;
    loglin_status status = loglin_list_devices(NULL, 0, &count);
    if (status != LOGLIN_OK) {
        return loglin_cli_fail_library(status);
    }
    loglin_device_info *infos = calloc(count, sizeof *infos);
    if (infos == NULL) {
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "out of memory");
    }
    size_t found = 0;
    status = loglin_list_devices(infos, count, &found);
    for (size_t i = 0; i < count && i < found; ++i) {
        if (infos[i].id == id) {
            *info = infos[i];
        }
    }
    free(infos);
    return status == LOGLIN_OK ? LOGLIN_CLI_OK : loglin_cli_fail_library(status);
}

static loglin_cli_status open_queue(loglin_cli_session *session, cl_device_id id) {
    const cl_context_properties properties[] = {CL_CONTEXT_PLATFORM, (cl_context_properties)session->info.platform, 0};
    cl_int code;
    session->context = clCreateContext(properties, 1, &id, NULL, NULL, &code);
    if (code != CL_SUCCESS) {
        return loglin_cli_fail_opencl(code, "clCreateContext");
    }
    session->queue = clCreateCommandQueueWithProperties(session->context, id, NULL, &code);
    return code == CL_SUCCESS ? LOGLIN_CLI_OK : loglin_cli_fail_opencl(code, "clCreateCommandQueueWithProperties");
}

loglin_cli_status loglin_cli_session_open(loglin_cli_session *session, const char *selector,
                                          const loglin_problem *problem) {
    cl_device_id id;
    loglin_status status = loglin_select_device(selector, &id);
    if (status != LOGLIN_OK) {
        return loglin_cli_fail_library(status);
    }
    RETURN_IF_FAILED(loglin_cli_find_info(id, &session->info));
    RETURN_IF_FAILED(open_queue(session, id));
    const double begin = loglin_cli_now_ms();
    loglin_cli_waiting_begin();
    status = loglin_device_create(session->context, id, &session->device);
    if (status == LOGLIN_OK) {
        status = loglin_plan_create(session->device, problem, &session->plan);
    }
    loglin_cli_waiting_end();
    session->prepare_ms = loglin_cli_now_ms() - begin;
    return status == LOGLIN_OK ? LOGLIN_CLI_OK : loglin_cli_fail_library(status);
}

void loglin_cli_session_close(loglin_cli_session *session) {
    for (size_t i = 0; i < session->buffer_count; ++i) {
        (void)clReleaseMemObject(session->buffers[i]);
    }
    loglin_plan_destroy(session->plan);
    loglin_device_destroy(session->device);
    if (session->queue != NULL) {
        (void)clReleaseCommandQueue(session->queue);
    }
    if (session->context != NULL) {
        (void)clReleaseContext(session->context);
    }
    *session = (loglin_cli_session){0};
}

loglin_cli_status loglin_cli_create_buffer(loglin_cli_session *session, const char *name, size_t size,
                                           loglin_buffer *buffer) {
    if (size > session->info.max_allocation) {
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "%s needs a buffer of %zu bytes, the device allows at most %llu",
                               name, size, (unsigned long long)session->info.max_allocation);
    }
    if (session->buffer_count == LOGLIN_CLI_MAX_BUFFERS) {
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "%s: too many buffers", name);
    }
    cl_int code;
    const cl_mem mem = clCreateBuffer(session->context, CL_MEM_READ_WRITE, size > 0 ? size : 1, NULL, &code);
    if (code != CL_SUCCESS) {
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "%s: no buffer of %zu bytes: %s", name, size, loglin_strerror(code));
    }
    session->buffers[session->buffer_count++] = mem;
    *buffer = (loglin_buffer){.mem = mem};
    return LOGLIN_CLI_OK;
}

loglin_cli_status loglin_cli_write(const loglin_cli_session *session, const char *name, const void *data, size_t size,
                                   loglin_buffer buffer) {
    const cl_int code = clEnqueueWriteBuffer(session->queue, buffer.mem, CL_TRUE, 0, size, data, 0, NULL, NULL);
    return code == CL_SUCCESS ? LOGLIN_CLI_OK : loglin_cli_fail_opencl(code, name);
}

loglin_cli_status loglin_cli_write_zeros(const loglin_cli_session *session, const char *name, size_t size,
                                         loglin_buffer buffer) {
    static const cl_float zero = 0.0F;
    const cl_int code = clEnqueueFillBuffer(session->queue, buffer.mem, &zero, sizeof zero, 0, size, 0, NULL, NULL);
    return code == CL_SUCCESS ? LOGLIN_CLI_OK : loglin_cli_fail_opencl(code, name);
}

loglin_cli_status loglin_cli_upload(loglin_cli_session *session, const char *name, const void *data, size_t size,
                                    loglin_buffer *buffer) {
    RETURN_IF_FAILED(loglin_cli_create_buffer(session, name, size, buffer));
    return loglin_cli_write(session, name, data, size, *buffer);
}

loglin_cli_status loglin_cli_upload_tensor(loglin_cli_session *session, const loglin_tensor *tensor,
                                           loglin_buffer *buffer) {
    if (tensor == NULL) {
        *buffer = (loglin_buffer){0};
        return LOGLIN_CLI_OK;
    }
    return loglin_cli_upload(session, tensor->name, tensor->data, tensor->size, buffer);
}

loglin_cli_status loglin_cli_finish(const loglin_cli_session *session) {
    const cl_int code = clFinish(session->queue);
    return code == CL_SUCCESS ? LOGLIN_CLI_OK : loglin_cli_fail_opencl(code, "the run");
}
