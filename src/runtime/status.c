/* SPDX-License-Identifier: Apache-2.0 */
/* The texts of the statuses, and the text of each thread's last error. */
#include "runtime/status.h"
#include <CL/cl_ext.h>
#include <CL/cl_gl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

enum { ERROR_TEXT_SIZE = 2048 };

static _Thread_local char last_error[ERROR_TEXT_SIZE];

typedef struct status_text {
    loglin_status status;
    const char *text;
} status_text;

#define OWN_TEXT(name, value, text) {name, text},
#define CODE_NAME(code)                                                                                                \
    { code, #code }

static const status_text status_texts[] = {
    LOGLIN_STATUS_LIST(OWN_TEXT) /* comment keeps the formatter from joining the lines */
    CODE_NAME(CL_DEVICE_NOT_FOUND),
    CODE_NAME(CL_DEVICE_NOT_AVAILABLE),
    CODE_NAME(CL_COMPILER_NOT_AVAILABLE),
    CODE_NAME(CL_MEM_OBJECT_ALLOCATION_FAILURE),
    CODE_NAME(CL_OUT_OF_RESOURCES),
    CODE_NAME(CL_OUT_OF_HOST_MEMORY),
    CODE_NAME(CL_PROFILING_INFO_NOT_AVAILABLE),
    CODE_NAME(CL_MEM_COPY_OVERLAP),
    CODE_NAME(CL_IMAGE_FORMAT_MISMATCH),
    CODE_NAME(CL_IMAGE_FORMAT_NOT_SUPPORTED),
    CODE_NAME(CL_BUILD_PROGRAM_FAILURE),
    CODE_NAME(CL_MAP_FAILURE),
    CODE_NAME(CL_MISALIGNED_SUB_BUFFER_OFFSET),
    CODE_NAME(CL_EXEC_STATUS_ERROR_FOR_EVENTS_IN_WAIT_LIST),
    CODE_NAME(CL_COMPILE_PROGRAM_FAILURE),
    CODE_NAME(CL_LINKER_NOT_AVAILABLE),
    CODE_NAME(CL_LINK_PROGRAM_FAILURE),
    CODE_NAME(CL_DEVICE_PARTITION_FAILED),
    CODE_NAME(CL_KERNEL_ARG_INFO_NOT_AVAILABLE),
    CODE_NAME(CL_INVALID_VALUE),
    CODE_NAME(CL_INVALID_DEVICE_TYPE),
    CODE_NAME(CL_INVALID_PLATFORM),
    CODE_NAME(CL_INVALID_DEVICE),
    CODE_NAME(CL_INVALID_CONTEXT),
    CODE_NAME(CL_INVALID_QUEUE_PROPERTIES),
    CODE_NAME(CL_INVALID_COMMAND_QUEUE),
    CODE_NAME(CL_INVALID_HOST_PTR),
    CODE_NAME(CL_INVALID_MEM_OBJECT),
    CODE_NAME(CL_INVALID_IMAGE_FORMAT_DESCRIPTOR),
    CODE_NAME(CL_INVALID_IMAGE_SIZE),
    CODE_NAME(CL_INVALID_SAMPLER),
    CODE_NAME(CL_INVALID_BINARY),
    CODE_NAME(CL_INVALID_BUILD_OPTIONS),
    CODE_NAME(CL_INVALID_PROGRAM),
    CODE_NAME(CL_INVALID_PROGRAM_EXECUTABLE),
    CODE_NAME(CL_INVALID_KERNEL_NAME),
    CODE_NAME(CL_INVALID_KERNEL_DEFINITION),
    CODE_NAME(CL_INVALID_KERNEL),
    CODE_NAME(CL_INVALID_ARG_INDEX),
    CODE_NAME(CL_INVALID_ARG_VALUE),
    CODE_NAME(CL_INVALID_ARG_SIZE),
    CODE_NAME(CL_INVALID_KERNEL_ARGS),
    CODE_NAME(CL_INVALID_WORK_DIMENSION),
    CODE_NAME(CL_INVALID_WORK_GROUP_SIZE),
    CODE_NAME(CL_INVALID_WORK_ITEM_SIZE),
    CODE_NAME(CL_INVALID_GLOBAL_OFFSET),
    CODE_NAME(CL_INVALID_EVENT_WAIT_LIST),
    CODE_NAME(CL_INVALID_EVENT),
    CODE_NAME(CL_INVALID_OPERATION),
    CODE_NAME(CL_INVALID_GL_OBJECT),
    CODE_NAME(CL_INVALID_BUFFER_SIZE),
    CODE_NAME(CL_INVALID_MIP_LEVEL),
    CODE_NAME(CL_INVALID_GLOBAL_WORK_SIZE),
    CODE_NAME(CL_INVALID_PROPERTY),
    CODE_NAME(CL_INVALID_IMAGE_DESCRIPTOR),
    CODE_NAME(CL_INVALID_COMPILER_OPTIONS),
    CODE_NAME(CL_INVALID_LINKER_OPTIONS),
    CODE_NAME(CL_INVALID_DEVICE_PARTITION_COUNT),
    CODE_NAME(CL_INVALID_PIPE_SIZE),
    CODE_NAME(CL_INVALID_DEVICE_QUEUE),
    CODE_NAME(CL_INVALID_SPEC_ID),
    CODE_NAME(CL_MAX_SIZE_RESTRICTION_EXCEEDED),
    CODE_NAME(CL_INVALID_GL_SHAREGROUP_REFERENCE_KHR),
    CODE_NAME(CL_PLATFORM_NOT_FOUND_KHR),
};

const char *loglin_strerror(loglin_status status) {
    for (size_t i = 0; i < sizeof status_texts / sizeof status_texts[0]; i++) {
        if (status_texts[i].status == status) {
            return status_texts[i].text;
        }
    }
    return status < 0 ? "an OpenCL error without a name" : "an unknown status";
}

/* What would move a terminal's cursor or change its colours; the log of a compiler has lines. */
static bool is_control(char c) {
    return ((unsigned char)c < ' ' && c != '\n' && c != '\t') || c == '\x7f';
}

loglin_status loglin_fail(loglin_status status, const char *format, ...) {
    char text[ERROR_TEXT_SIZE]; /* the arguments may hold the text of the error before */
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    for (char *c = text; *c != '\0'; c++) {
        if (is_control(*c)) {
            *c = '?';
        }
    }
    memcpy(last_error, text, sizeof text);
    return status;
}

const char *loglin_last_error(void) {
    return last_error;
}
