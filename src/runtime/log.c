/* SPDX-License-Identifier: Apache-2.0 */
/* LOGLIN_LOG is read at the first message; a message is written in one piece even where threads write at once. */
#include "runtime/log.h"
#include "runtime/environment.h"
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <threads.h>

static const char *const level_names[] = {
    [LOGLIN_LOG_ERROR] = "error",
    [LOGLIN_LOG_WARN] = "warn",
    [LOGLIN_LOG_INFO] = "info",
    [LOGLIN_LOG_DEBUG] = "debug",
};

static once_flag level_once = ONCE_FLAG_INIT;
static loglin_log_level highest_level = LOGLIN_LOG_WARN;

static void read_level(void) {
    const char *value = loglin_environment(LOGLIN_VARIABLE_LOG);
    if (value == NULL || value[0] == '\0') {
        return;
    }
    for (loglin_log_level level = LOGLIN_LOG_ERROR; level <= LOGLIN_LOG_DEBUG; level++) {
        if (strcmp(value, level_names[level]) == 0) {
            highest_level = level;
            return;
        }
    }
    fprintf(stderr, "loglin: warn: LOGLIN_LOG is \"%s\", expected error, warn, info or debug\n", value);
}

void loglin_log(loglin_log_level level, const char *format, ...) {
    call_once(&level_once, read_level);
    if (level > highest_level) {
        return;
    }
    va_list arguments;
    va_start(arguments, format);
    flockfile(stderr);
    fprintf(stderr, "loglin: %s: ", level_names[level]);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    funlockfile(stderr);
    va_end(arguments);
}
