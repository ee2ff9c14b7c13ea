/* SPDX-License-Identifier: Apache-2.0 */
/* How the command ends: its exit statuses, and a line on standard error that says why. */
#ifndef LOGLIN_CLI_STATUS_H
#define LOGLIN_CLI_STATUS_H

#include "loglin.h"

typedef enum loglin_cli_status {
    LOGLIN_CLI_OK = 0,
    LOGLIN_CLI_FAILED = 1,    /* the run failed, or --check found too large an error */
    LOGLIN_CLI_BAD_INPUT = 2, /* the command line or the input file is wrong */
} loglin_cli_status;

/* Prints "loglin: " and the text, and returns `status`. */
loglin_cli_status loglin_cli_fail(loglin_cli_status status, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* Prints what a call of the library reported; an invalid argument came from the command line or the file. */
loglin_cli_status loglin_cli_fail_library(loglin_status status);

/* Prints an OpenCL error; `what` says what was tried. */
loglin_cli_status loglin_cli_fail_opencl(cl_int code, const char *what);

#define RETURN_IF_FAILED(expression)                                                                                   \
    do {                                                                                                               \
        const loglin_cli_status return_if_failed_status = (expression);                                                \
        if (return_if_failed_status != LOGLIN_CLI_OK) {                                                                \
            return return_if_failed_status;                                                                            \
        }                                                                                                              \
    } while (0)

#endif
