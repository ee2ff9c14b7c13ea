/* SPDX-License-Identifier: Apache-2.0 */
/* Error messages of the command. */
#include "cli/status.h"

#include <stdarg.h>
#include <stdio.h>

loglin_cli_status loglin_cli_fail(loglin_cli_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    (void)fputs("loglin: ", stderr);
    (void)vfprintf(stderr, format, arguments);
    (void)fputc('\n', stderr);
    va_end(arguments);
    return status;
}

loglin_cli_status loglin_cli_fail_library(loglin_status status) {
    return loglin_cli_fail(status == LOGLIN_INVALID_ARGUMENT ? LOGLIN_CLI_BAD_INPUT : LOGLIN_CLI_FAILED, "%s: %s",
                           loglin_strerror(status), loglin_last_error());
}

loglin_cli_status loglin_cli_fail_opencl(cl_int code, const char *what) {
    return loglin_cli_fail(LOGLIN_CLI_FAILED, "%s: %s", what, loglin_strerror(code));
}
