/* SPDX-License-Identifier: Apache-2.0 */
/* Buffers of the same size for all layers, as parts of one where the device allows it. */
#include "model/model.h"

#include "runtime/device.h"
#include "runtime/status.h"

/* From a layer to the next: whole pages, which every device takes as an alignment of parts. */
enum { PART_ALIGNMENT = 4096 };

static loglin_status create(const loglin_device *device, const char *name, cl_mem_flags flags, size_t bytes,
                            cl_mem *mem) {
    if (bytes > device->info.max_allocation) {
        return loglin_fail(LOGLIN_UNSUPPORTED, "%s needs a buffer of %zu bytes, the device allows %llu", name, bytes,
                           (unsigned long long)device->info.max_allocation);
    }
    cl_int code = CL_SUCCESS;
    *mem = clCreateBuffer(device->context, flags, bytes, NULL, &code);
    if (code != CL_SUCCESS) {
        *mem = NULL;
        return loglin_fail(code, "%s: a buffer of %zu bytes: %s", name, bytes, loglin_strerror(code));
    }
    return LOGLIN_OK;
}

static loglin_status create_part(const char *name, const loglin_layer_buffers *buffers, size_t layer, size_t bytes,
                                 cl_mem *mem) {
    const cl_buffer_region region = {.origin = layer * buffers->next, .size = bytes};
    cl_int code = CL_SUCCESS;
    *mem = clCreateSubBuffer(buffers->all, 0, CL_BUFFER_CREATE_TYPE_REGION, &region, &code);
    if (code != CL_SUCCESS) {
        *mem = NULL;
        return loglin_fail(code, "%s of layer %zu: clCreateSubBuffer: %s", name, layer, loglin_strerror(code));
    }
    return LOGLIN_OK;
}

loglin_status loglin_layer_buffers_create(const loglin_device *device, const char *name, cl_mem_flags flags,
                                          size_t bytes, size_t count, cl_mem *parts, size_t stride,
                                          loglin_layer_buffers *buffers) {
    size_t all = 0;
    bytes = bytes > 0 ? bytes : 1;
    buffers->next = (bytes + PART_ALIGNMENT - 1) / PART_ALIGNMENT * PART_ALIGNMENT;
    if (!__builtin_mul_overflow(buffers->next, count, &all) && all <= device->info.max_allocation) {
        RETURN_IF_ERROR(create(device, name, flags, all, &buffers->all));
    }
    for (size_t layer = 0; layer < count; layer++) {
        cl_mem *part = (cl_mem *)((char *)parts + layer * stride);
        RETURN_IF_ERROR(buffers->all != NULL ? create_part(name, buffers, layer, bytes, part)
                                             : create(device, name, flags, bytes, part));
    }
    return LOGLIN_OK;
}
