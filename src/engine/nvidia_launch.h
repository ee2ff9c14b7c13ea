/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The launches of the NVIDIA engine.  All its kernels take the same arguments: the call (a structure of cl/nvidia_*layout.cl),
 * the workspace, the caller's buffers, each buffer as memory object and element offset, and some a last one of their own.
 */
#ifndef LOGLIN_ENGINE_NVIDIA_LAUNCH_H
#define LOGLIN_ENGINE_NVIDIA_LAUNCH_H

#include "loglin.h"

#include <stdbool.h>

/* A kernel, and what its launch runs. */
typedef struct loglin_nvidia_kernel {
    cl_kernel kernel;
    size_t items, group; /* work-items, and those of a work-group; no items: no launch */
} loglin_nvidia_kernel;

/* Why the device is none for this engine, or NULL. */
const char *loglin_nvidia_refuses(const loglin_device *device);

/* The kernels `names` of a program; on failure those already made are the caller's too. */
loglin_status loglin_nvidia_kernels_get(loglin_device *device, const char *const *files, const char *options,
                                        const char *const *names, size_t count, loglin_nvidia_kernel *kernels);
/* Those that were made. */
void loglin_nvidia_kernels_release(const loglin_nvidia_kernel *kernels, size_t count);

void loglin_nvidia_set_launch(loglin_nvidia_kernel *kernel, size_t groups, size_t group);

/* A call that is on its way: a launch goes behind the one before it, the first one behind the caller's events. */
typedef struct loglin_nvidia_run {
    const void *call;
    size_t call_size;
    loglin_buffer workspace;
    cl_command_queue queue;
    bool in_order;
    cl_uint num_wait; /* for the next launch */
    const cl_event *wait;
} loglin_nvidia_run;

loglin_status loglin_nvidia_begin(const void *call, size_t call_size, loglin_buffer workspace, cl_command_queue queue,
                                  cl_uint num_wait, const cl_event *wait, loglin_nvidia_run *run);

/* The last argument of a kernel; value NULL: so many bytes of local memory. */
typedef struct loglin_nvidia_argument {
    size_t size;
    const void *value;
} loglin_nvidia_argument;

/* last: NULL for none. */
loglin_status loglin_nvidia_launch(loglin_nvidia_run *run, const loglin_nvidia_kernel *kernel,
                                   const loglin_buffer *buffers, size_t num_buffers, const loglin_nvidia_argument *last,
                                   cl_event *event);

/* Can its rows be moved 16 bytes at a time? */
bool loglin_nvidia_is_aligned(loglin_buffer buffer);

/* A place of so many bytes in the workspace, behind the others; *end: of them all. */
unsigned long loglin_nvidia_reserve(size_t *end, size_t bytes);

/* Bytes of a workspace with its places up to `end`: its start is rounded up to 16 bytes. */
size_t loglin_nvidia_workspace(size_t end);

#endif
