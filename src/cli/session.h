/* SPDX-License-Identifier: Apache-2.0 */
/* A device that a problem runs on: context, queue, plan, and the buffers, which end with the session. */
#ifndef LOGLIN_CLI_SESSION_H
#define LOGLIN_CLI_SESSION_H

#include "cli/status.h"
#include "tensorfile/safetensors.h"

enum { LOGLIN_CLI_MAX_BUFFERS = 32 };

typedef struct loglin_cli_session {
    loglin_device_info info;
    cl_context context;
    cl_command_queue queue; /* in order */
    loglin_device *device;
    loglin_plan *plan;
    double prepare_ms; /* what making the device and the plan took */
    cl_mem buffers[LOGLIN_CLI_MAX_BUFFERS];
    size_t buffer_count;
} loglin_cli_session;

/* selector as of loglin_select_device.  loglin_cli_session_close is due in any case; *session must be zero before. */
loglin_cli_status loglin_cli_session_open(loglin_cli_session *session, const char *selector,
                                          const loglin_problem *problem);
void loglin_cli_session_close(loglin_cli_session *session);

/* A buffer of `size` bytes; `name` is what it is called if the device cannot have it. */
loglin_cli_status loglin_cli_create_buffer(loglin_cli_session *session, const char *name, size_t size,
                                           loglin_buffer *buffer);

/* A buffer that holds `size` bytes of data. */
loglin_cli_status loglin_cli_upload(loglin_cli_session *session, const char *name, const void *data, size_t size,
                                    loglin_buffer *buffer);

/* A buffer that holds a tensor's data; NULL leaves *buffer absent. */
loglin_cli_status loglin_cli_upload_tensor(loglin_cli_session *session, const loglin_tensor *tensor,
                                           loglin_buffer *buffer);

/* Writes to a buffer: `size` bytes of data, or of zeros, then a multiple of 4. */
loglin_cli_status loglin_cli_write(const loglin_cli_session *session, const char *name, const void *data, size_t size,
                                   loglin_buffer buffer);
loglin_cli_status loglin_cli_write_zeros(const loglin_cli_session *session, const char *name, size_t size,
                                         loglin_buffer buffer);

/* Waits until everything enqueued is done. */
loglin_cli_status loglin_cli_finish(const loglin_cli_session *session);

/* The entry of a device in loglin_list_devices. */
loglin_cli_status loglin_cli_find_info(cl_device_id id, loglin_device_info *info);

/* Milliseconds of a steady clock. */
double loglin_cli_now_ms(void);

#endif
