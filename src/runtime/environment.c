/* SPDX-License-Identifier: Apache-2.0 */
/* The table of environment variables. */
#include "runtime/environment.h"
#include <stdlib.h>

static const char *const names[] = {
    [LOGLIN_VARIABLE_LOG] = "LOGLIN_LOG",
    [LOGLIN_VARIABLE_DEVICE] = "LOGLIN_DEVICE",
    [LOGLIN_VARIABLE_BUILD_OPTIONS] = "LOGLIN_BUILD_OPTIONS",
    [LOGLIN_VARIABLE_CACHE_DIR] = "LOGLIN_CACHE_DIR",
    [LOGLIN_VARIABLE_XDG_CACHE_HOME] = "XDG_CACHE_HOME",
    [LOGLIN_VARIABLE_HOME] = "HOME",
};

const char *loglin_environment(loglin_variable variable) {
    return getenv(names[variable]);
}
