/* SPDX-License-Identifier: Apache-2.0 */
#include "engine/nvidia_launch.h"

#include "runtime/device.h"
#include "runtime/program.h"
#include "runtime/status.h"

#include <string.h>

/* All of NVIDIA's devices have work-groups of 1024; this engine's are smaller. */
static const size_t most_items = 1024;

const char *loglin_nvidia_refuses(const loglin_device *device) {
    if (strstr(device->info.vendor, "NVIDIA") == NULL) {
        return "the device is not NVIDIA's";
    }
    return device->info.max_work_group_size < most_items ? "it takes devices with work-groups of 1024" : NULL;
}

loglin_status loglin_nvidia_kernels_get(loglin_device *device, const char *const *files, const char *options,
                                        const char *const *names, size_t count, loglin_nvidia_kernel *kernels) {
    for (size_t i = 0; i < count; i++) {
        RETURN_IF_ERROR(loglin_kernels_get(device, files, options, &names[i], 1, &kernels[i].kernel));
    }
    return LOGLIN_OK;
}

void loglin_nvidia_kernels_release(const loglin_nvidia_kernel *kernels, size_t count) {
    for (size_t i = 0; i < count; i++) {
        if (kernels[i].kernel != NULL) {
            clReleaseKernel(kernels[i].kernel);
        }
    }
}

void loglin_nvidia_set_launch(loglin_nvidia_kernel *kernel, size_t groups, size_t group) {
    kernel->items = groups * group;
    kernel->group = group;
}

loglin_status loglin_nvidia_begin(const void *call, size_t call_size, loglin_buffer workspace, cl_command_queue queue,
                                  cl_uint num_wait, const cl_event *wait, loglin_nvidia_run *run) {
    cl_command_queue_properties properties = 0;
    RETURN_IF_CL_ERROR(clGetCommandQueueInfo(queue, CL_QUEUE_PROPERTIES, sizeof properties, &properties, NULL));
    *run = (loglin_nvidia_run){
        .call = call,
        .call_size = call_size,
        .workspace = workspace,
        .queue = queue,
        .in_order = (properties & CL_QUEUE_OUT_OF_ORDER_EXEC_MODE_ENABLE) == 0,
        .num_wait = num_wait,
        .wait = wait,
    };
    return LOGLIN_OK;
}

static cl_int set_buffer(cl_kernel kernel, cl_uint *count, loglin_buffer buffer) {
    const cl_ulong offset = buffer.offset;
    const cl_int code = clSetKernelArg(kernel, (*count)++, sizeof(cl_mem), buffer.mem != NULL ? &buffer.mem : NULL);
    return code == CL_SUCCESS ? clSetKernelArg(kernel, (*count)++, sizeof offset, &offset) : code;
}

static cl_int set_arguments(const loglin_nvidia_run *run, cl_kernel kernel, const loglin_buffer *buffers,
                            size_t num_buffers, const loglin_nvidia_argument *last) {
    cl_uint count = 0;
    cl_int code = clSetKernelArg(kernel, count++, run->call_size, run->call);
    if (code == CL_SUCCESS) {
        code = set_buffer(kernel, &count, run->workspace);
    }
    for (size_t i = 0; code == CL_SUCCESS && i < num_buffers; i++) {
        code = set_buffer(kernel, &count, buffers[i]);
    }
    return code == CL_SUCCESS && last != NULL ? clSetKernelArg(kernel, count, last->size, last->value) : code;
}

static loglin_status fail(cl_kernel kernel, cl_int code) {
    char name[64] = "";
    (void)clGetKernelInfo(kernel, CL_KERNEL_FUNCTION_NAME, sizeof name, name, NULL);
    return loglin_fail(code, "NVIDIA engine, kernel %s: %s", name, loglin_strerror(code));
}

loglin_status loglin_nvidia_launch(loglin_nvidia_run *run, const loglin_nvidia_kernel *kernel,
                                   const loglin_buffer *buffers, size_t num_buffers, const loglin_nvidia_argument *last,
                                   cl_event *event) {
    if (kernel->items == 0) {
        return LOGLIN_OK;
    }
    cl_int code = set_arguments(run, kernel->kernel, buffers, num_buffers, last);
    if (code == CL_SUCCESS && !run->in_order && run->num_wait == 0) {
        code = clEnqueueBarrierWithWaitList(run->queue, 0, NULL, NULL);
    }
    if (code == CL_SUCCESS) {
        code = clEnqueueNDRangeKernel(run->queue, kernel->kernel, 1, NULL, &kernel->items, &kernel->group,
                                      run->num_wait, run->num_wait > 0 ? run->wait : NULL, event);
    }
    run->num_wait = 0;
    return code == CL_SUCCESS ? LOGLIN_OK : fail(kernel->kernel, code);
}

bool loglin_nvidia_is_aligned(loglin_buffer buffer) {
    return buffer.offset % 8 == 0;
}

unsigned long loglin_nvidia_reserve(size_t *end, size_t bytes) {
    const size_t at = *end;
    *end += (bytes + 127) / 128 * 128;
    return at;
}

size_t loglin_nvidia_workspace(size_t end) {
    return end + 16;
}
