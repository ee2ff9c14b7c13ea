/* SPDX-License-Identifier: Apache-2.0 */
/* Every environment variable that the library reads, in one table. */
#ifndef LOGLIN_RUNTIME_ENVIRONMENT_H
#define LOGLIN_RUNTIME_ENVIRONMENT_H

typedef enum loglin_variable {
    LOGLIN_VARIABLE_LOG,            /* LOGLIN_LOG: error, warn, info or debug */
    LOGLIN_VARIABLE_DEVICE,         /* LOGLIN_DEVICE: what loglin_select_device(NULL) takes */
    LOGLIN_VARIABLE_BUILD_OPTIONS,  /* LOGLIN_BUILD_OPTIONS: appended to the OpenCL build options */
    LOGLIN_VARIABLE_CACHE_DIR,      /* LOGLIN_CACHE_DIR: where caches are kept; empty: nowhere */
    LOGLIN_VARIABLE_XDG_CACHE_HOME, /* XDG_CACHE_HOME, if there is no LOGLIN_CACHE_DIR */
    LOGLIN_VARIABLE_HOME,           /* HOME, if there is neither */
} loglin_variable;

/* The value as it is now, NULL if the variable is not set. */
const char *loglin_environment(loglin_variable variable);

#endif
