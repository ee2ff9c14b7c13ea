/* SPDX-License-Identifier: Apache-2.0 */
/* Reporting errors: a status to return, and a text for the calling thread. */
#ifndef LOGLIN_RUNTIME_STATUS_H
#define LOGLIN_RUNTIME_STATUS_H

#include "loglin.h"

/*
 * Sets loglin_last_error() of this thread and returns `status`.  Control characters are replaced: what comes from a file may
 * hold any.
 */
loglin_status loglin_fail(loglin_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

#define RETURN_IF_ERROR(expression)                                                                                    \
    do {                                                                                                               \
        const loglin_status return_if_error_status = (expression);                                                     \
        if (return_if_error_status != LOGLIN_OK) {                                                                     \
            return return_if_error_status;                                                                             \
        }                                                                                                              \
    } while (0)

/* For an OpenCL call that returns its code: names the call in the error text. */
#define RETURN_IF_CL_ERROR(expression)                                                                                 \
    do {                                                                                                               \
        const cl_int return_if_cl_error_code = (expression);                                                           \
        if (return_if_cl_error_code != CL_SUCCESS) {                                                                   \
            return loglin_fail(return_if_cl_error_code, "%s: %s", #expression,                                         \
                               loglin_strerror(return_if_cl_error_code));                                              \
        }                                                                                                              \
    } while (0)

#endif
