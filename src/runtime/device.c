/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Finding devices and holding one.  A driver that fails does not hide the devices of the others: what it does not
 * answer is left out, with a warning.
 */
#include "runtime/device.h"
#include "runtime/cache.h"
#include "runtime/environment.h"
#include "runtime/log.h"
#include "runtime/program.h"
#include "runtime/status.h"
#include <CL/cl_ext.h>
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

/* ---- What a device says about itself ---- */

/* Copies what is between leading and trailing blanks, cut to capacity. */
static void copy_trimmed(char *to, size_t capacity, const char *from) {
    while (isspace((unsigned char)*from)) {
        from++;
    }
    size_t length = strlen(from);
    while (length > 0 && isspace((unsigned char)from[length - 1])) {
        length--;
    }
    length = length < capacity ? length : capacity - 1;
    memcpy(to, from, length);
    to[length] = '\0';
}

static cl_int device_text(cl_device_id id, cl_device_info what, char *text, size_t capacity) {
    size_t size = 0;
    cl_int code = clGetDeviceInfo(id, what, 0, NULL, &size);
    if (code != CL_SUCCESS) {
        return code;
    }
    char *whole = calloc(size + 1, 1);
    if (whole == NULL) {
        return CL_OUT_OF_HOST_MEMORY;
    }
    code = clGetDeviceInfo(id, what, size, whole, NULL);
    copy_trimmed(text, capacity, whole);
    free(whole);
    return code;
}

static cl_int platform_name(cl_platform_id platform, char *text, size_t capacity) {
    size_t size = 0;
    cl_int code = clGetPlatformInfo(platform, CL_PLATFORM_NAME, 0, NULL, &size);
    if (code != CL_SUCCESS) {
        return code;
    }
    char *whole = calloc(size + 1, 1);
    if (whole == NULL) {
        return CL_OUT_OF_HOST_MEMORY;
    }
    code = clGetPlatformInfo(platform, CL_PLATFORM_NAME, size, whole, NULL);
    copy_trimmed(text, capacity, whole);
    free(whole);
    return code;
}

static loglin_status describe_device(cl_device_id id, loglin_device_info *info) {
    memset(info, 0, sizeof *info);
    info->id = id;
    cl_device_type type = 0;
    cl_uint compute_units = 0;
    cl_ulong global_memory = 0;
    cl_ulong max_allocation = 0;
    cl_ulong local_memory = 0;
    RETURN_IF_CL_ERROR(clGetDeviceInfo(id, CL_DEVICE_PLATFORM, sizeof info->platform, &info->platform, NULL));
    RETURN_IF_CL_ERROR(clGetDeviceInfo(id, CL_DEVICE_TYPE, sizeof type, &type, NULL));
    RETURN_IF_CL_ERROR(device_text(id, CL_DEVICE_NAME, info->name, sizeof info->name));
    RETURN_IF_CL_ERROR(device_text(id, CL_DEVICE_VENDOR, info->vendor, sizeof info->vendor));
    RETURN_IF_CL_ERROR(device_text(id, CL_DEVICE_VERSION, info->version, sizeof info->version));
    RETURN_IF_CL_ERROR(device_text(id, CL_DRIVER_VERSION, info->driver, sizeof info->driver));
    RETURN_IF_CL_ERROR(platform_name(info->platform, info->platform_name, sizeof info->platform_name));
    RETURN_IF_CL_ERROR(clGetDeviceInfo(id, CL_DEVICE_MAX_COMPUTE_UNITS, sizeof compute_units, &compute_units, NULL));
    RETURN_IF_CL_ERROR(clGetDeviceInfo(id, CL_DEVICE_GLOBAL_MEM_SIZE, sizeof global_memory, &global_memory, NULL));
    RETURN_IF_CL_ERROR(clGetDeviceInfo(id, CL_DEVICE_MAX_MEM_ALLOC_SIZE, sizeof max_allocation, &max_allocation, NULL));
    RETURN_IF_CL_ERROR(clGetDeviceInfo(id, CL_DEVICE_LOCAL_MEM_SIZE, sizeof local_memory, &local_memory, NULL));
    RETURN_IF_CL_ERROR(clGetDeviceInfo(id, CL_DEVICE_MAX_WORK_GROUP_SIZE, sizeof info->max_work_group_size,
                                       &info->max_work_group_size, NULL));
    info->type = type & (CL_DEVICE_TYPE_GPU | CL_DEVICE_TYPE_CPU | CL_DEVICE_TYPE_ACCELERATOR);
    info->compute_units = compute_units;
    info->global_memory = global_memory;
    info->max_allocation = max_allocation;
    info->local_memory = local_memory;
    return LOGLIN_OK;
}

/* ---- All devices ---- */

typedef struct device_list {
    loglin_device_info *infos;
    size_t count;
} device_list;

static bool can_compile(cl_device_id id) {
    cl_bool available = CL_FALSE;
    cl_bool compiler = CL_FALSE;
    return clGetDeviceInfo(id, CL_DEVICE_AVAILABLE, sizeof available, &available, NULL) == CL_SUCCESS &&
           clGetDeviceInfo(id, CL_DEVICE_COMPILER_AVAILABLE, sizeof compiler, &compiler, NULL) == CL_SUCCESS &&
           available == CL_TRUE && compiler == CL_TRUE;
}

static loglin_status append_device(device_list *list, cl_device_id id) {
    loglin_device_info info;
    if (describe_device(id, &info) != LOGLIN_OK) {
        loglin_log(LOGLIN_LOG_WARN, "a device is left out: %s", loglin_last_error());
        return LOGLIN_OK;
    }
    if (info.type == 0 || !can_compile(id)) {
        loglin_log(LOGLIN_LOG_INFO, "device %s is left out: it cannot compile and run OpenCL C", info.name);
        return LOGLIN_OK;
    }
    loglin_device_info *grown = realloc(list->infos, (list->count + 1) * sizeof *grown);
    if (grown == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "no memory for a list of %zu devices", list->count + 1);
    }
    grown[list->count++] = info;
    list->infos = grown;
    return LOGLIN_OK;
}

static loglin_status append_platform(device_list *list, cl_platform_id platform, cl_device_type type) {
    cl_uint count = 0;
    cl_int code = clGetDeviceIDs(platform, type, 0, NULL, &count);
    if (code == CL_DEVICE_NOT_FOUND || (code == CL_SUCCESS && count == 0)) {
        return LOGLIN_OK;
    }
    cl_device_id *ids = calloc((size_t)count + 1, sizeof *ids);
    if (ids == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "no memory for a list of %u devices", count);
    }
    if (code == CL_SUCCESS) {
        code = clGetDeviceIDs(platform, type, count, ids, NULL);
    }
    loglin_status status = LOGLIN_OK;
    if (code != CL_SUCCESS) {
        loglin_log(LOGLIN_LOG_WARN, "a platform is left out: clGetDeviceIDs: %s", loglin_strerror(code));
        count = 0;
    }
    for (cl_uint i = 0; i < count && status == LOGLIN_OK; i++) {
        status = append_device(list, ids[i]);
    }
    free(ids);
    return status;
}

static loglin_status append_platforms(device_list *list, const cl_platform_id *platforms, cl_uint count) {
    const cl_device_type preference[] = {CL_DEVICE_TYPE_GPU, CL_DEVICE_TYPE_ACCELERATOR, CL_DEVICE_TYPE_CPU};
    for (size_t rank = 0; rank < sizeof preference / sizeof preference[0]; rank++) {
        for (cl_uint i = 0; i < count; i++) {
            RETURN_IF_ERROR(append_platform(list, platforms[i], preference[rank]));
        }
    }
    return LOGLIN_OK;
}

/* All devices in order of preference; at least one, or LOGLIN_NO_DEVICE.  The caller frees list->infos. */
static loglin_status collect_devices(device_list *list) {
    *list = (device_list){0};
    cl_uint count = 0;
    const cl_int code = clGetPlatformIDs(0, NULL, &count);
    if (code == CL_PLATFORM_NOT_FOUND_KHR || (code == CL_SUCCESS && count == 0)) {
        return loglin_fail(LOGLIN_NO_DEVICE, "no OpenCL platform was found: install the OpenCL driver of the GPU, or "
                                             "pocl-opencl-icd to run on the CPU (clinfo lists what is there)");
    }
    RETURN_IF_CL_ERROR(code);
    cl_platform_id *platforms = calloc(count, sizeof *platforms);
    if (platforms == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "no memory for a list of %u platforms", count);
    }
    loglin_status status = clGetPlatformIDs(count, platforms, NULL);
    if (status == CL_SUCCESS) {
        status = append_platforms(list, platforms, count);
    } else {
        loglin_fail(status, "clGetPlatformIDs: %s", loglin_strerror(status));
    }
    free(platforms);
    if (status == LOGLIN_OK && list->count == 0) {
        status = loglin_fail(LOGLIN_NO_DEVICE,
                             "%u OpenCL platforms, but no device that can be used: check the driver and the right to "
                             "open its device files (PoCL: to write to HOME or POCL_CACHE_DIR), or install "
                             "pocl-opencl-icd to run on the CPU",
                             count);
    }
    if (status != LOGLIN_OK) {
        free(list->infos);
    }
    return status;
}

loglin_status loglin_list_devices(loglin_device_info *infos, size_t capacity, size_t *count) {
    if (count == NULL) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "loglin_list_devices: count is NULL");
    }
    *count = 0;
    if (infos == NULL && capacity > 0) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "loglin_list_devices: infos is NULL, but capacity is %zu",
                           capacity);
    }
    device_list list;
    RETURN_IF_ERROR(collect_devices(&list));
    *count = list.count;
    const size_t written = capacity < list.count ? capacity : list.count;
    if (written > 0) {
        memcpy(infos, list.infos, written * sizeof *infos);
    }
    free(list.infos);
    return LOGLIN_OK;
}

/* ---- Choosing one ---- */

static bool contains_in_any_case(const char *text, const char *part) {
    const size_t length = strlen(part);
    for (; strlen(text) >= length; text++) {
        if (strncasecmp(text, part, length) == 0) {
            return true;
        }
    }
    return false;
}

/* The position that the selector means, list->count if none. */
static size_t find_device(const device_list *list, const char *selector) {
    if (selector[strspn(selector, "0123456789")] == '\0') {
        errno = 0;
        const unsigned long long position = strtoull(selector, NULL, 10);
        return errno == 0 && position < list->count ? (size_t)position : list->count;
    }
    size_t position = 0;
    while (position < list->count && !contains_in_any_case(list->infos[position].name, selector) &&
           !contains_in_any_case(list->infos[position].platform_name, selector)) {
        position++;
    }
    return position;
}

static loglin_status fail_unknown_device(const device_list *list, const char *source, const char *selector) {
    char devices[1024] = "";
    size_t length = 0;
    for (size_t i = 0; i < list->count && length < sizeof devices; i++) {
        length += (size_t)snprintf(devices + length, sizeof devices - length, "%s%zu: %s (%s)", i > 0 ? ", " : "", i,
                                   list->infos[i].name, list->infos[i].platform_name);
    }
    return loglin_fail(LOGLIN_INVALID_ARGUMENT,
                       "%s is \"%.200s\", expected a position or a part of a device's or platform's name of: %s",
                       source, selector, devices);
}

loglin_status loglin_select_device(const char *selector, cl_device_id *id) {
    if (id == NULL) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "loglin_select_device: id is NULL");
    }
    const char *source = "the device selector";
    if (selector == NULL || selector[0] == '\0') {
        source = "LOGLIN_DEVICE";
        selector = loglin_environment(LOGLIN_VARIABLE_DEVICE);
    }
    if (selector == NULL || selector[0] == '\0') {
        selector = "0";
    }
    device_list list;
    RETURN_IF_ERROR(collect_devices(&list));
    const size_t position = find_device(&list, selector);
    loglin_status status = LOGLIN_OK;
    if (position < list.count) {
        *id = list.infos[position].id;
    } else {
        status = fail_unknown_device(&list, source, selector);
    }
    free(list.infos);
    return status;
}

/* ---- Holding one ---- */

static loglin_status check_context_holds(cl_context context, cl_device_id id) {
    size_t size = 0;
    RETURN_IF_CL_ERROR(clGetContextInfo(context, CL_CONTEXT_DEVICES, 0, NULL, &size));
    cl_device_id *ids = calloc(size + 1, 1);
    if (ids == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "no memory for the devices of the context");
    }
    const cl_int code = clGetContextInfo(context, CL_CONTEXT_DEVICES, size, ids, NULL);
    bool held = false;
    for (size_t i = 0; i < size / sizeof *ids; i++) {
        held = held || ids[i] == id;
    }
    free(ids);
    RETURN_IF_CL_ERROR(code);
    if (!held) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "loglin_device_create: the device is not one of the context's %zu",
                           size / sizeof *ids);
    }
    return LOGLIN_OK;
}

static bool shares_memory(cl_device_id id) {
    const cl_device_svm_capabilities needed = CL_DEVICE_SVM_FINE_GRAIN_BUFFER | CL_DEVICE_SVM_ATOMICS;
    cl_device_svm_capabilities has = 0;
    return clGetDeviceInfo(id, CL_DEVICE_SVM_CAPABILITIES, sizeof has, &has, NULL) == CL_SUCCESS &&
           (has & needed) == needed;
}

/* What a destroyed device owns beside the context and the id. */
static void free_device(loglin_device *device) {
    free(device->cache_directory);
    free(device->build_options);
    free(device);
}

loglin_status loglin_device_create(cl_context context, cl_device_id id, loglin_device **device) {
    if (device == NULL) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "loglin_device_create: device is NULL");
    }
    *device = NULL;
    if (context == NULL || id == NULL) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "loglin_device_create: %s is NULL",
                           context == NULL ? "context" : "id");
    }
    RETURN_IF_ERROR(check_context_holds(context, id));
    loglin_device_info info;
    RETURN_IF_ERROR(describe_device(id, &info));

    const char *options = loglin_environment(LOGLIN_VARIABLE_BUILD_OPTIONS);
    loglin_device *made = calloc(1, sizeof *made);
    if (made == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "no memory for a device");
    }
    made->context = context;
    made->id = id;
    made->info = info;
    made->is_cpu = info.type == CL_DEVICE_TYPE_CPU;
    made->shares_memory = shares_memory(id);
    made->cache_directory = loglin_cache_directory();
    made->build_options = strdup(options != NULL ? options : "");
    atomic_init(&made->references, 1);
    if (made->build_options == NULL || mtx_init(&made->lock, mtx_plain) != thrd_success ||
        mtx_init(&made->meetings, mtx_plain) != thrd_success) {
        free_device(made);
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "no memory for a device");
    }
    clRetainContext(context);
    clRetainDevice(id);
    *device = made;
    return LOGLIN_OK;
}

void loglin_device_retain(loglin_device *device) {
    atomic_fetch_add(&device->references, 1);
}

void loglin_device_release(loglin_device *device) {
    if (atomic_fetch_sub(&device->references, 1) > 1) {
        return;
    }
    loglin_programs_release(device->programs);
    mtx_destroy(&device->lock);
    mtx_destroy(&device->meetings);
    clReleaseDevice(device->id);
    clReleaseContext(device->context);
    free_device(device);
}

void loglin_device_destroy(loglin_device *device) {
    if (device != NULL) {
        loglin_device_release(device);
    }
}

loglin_status loglin_device_check_queue(const loglin_device *device, cl_command_queue queue) {
    cl_context context = NULL;
    cl_device_id id = NULL;
    RETURN_IF_CL_ERROR(clGetCommandQueueInfo(queue, CL_QUEUE_CONTEXT, sizeof(cl_context), &context, NULL));
    RETURN_IF_CL_ERROR(clGetCommandQueueInfo(queue, CL_QUEUE_DEVICE, sizeof(cl_device_id), &id, NULL));
    if (context != device->context || id != device->id) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "queue is of another %s than the loglin_device",
                           context != device->context ? "context" : "device");
    }
    return LOGLIN_OK;
}
