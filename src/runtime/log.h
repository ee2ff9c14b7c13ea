/* SPDX-License-Identifier: Apache-2.0 */
/* Messages on standard error, as LOGLIN_LOG asks for (error, warn, info, debug; warn is the default). */
#ifndef LOGLIN_RUNTIME_LOG_H
#define LOGLIN_RUNTIME_LOG_H

typedef enum loglin_log_level { LOGLIN_LOG_ERROR, LOGLIN_LOG_WARN, LOGLIN_LOG_INFO, LOGLIN_LOG_DEBUG } loglin_log_level;

void loglin_log(loglin_log_level level, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
