/* SPDX-License-Identifier: Apache-2.0 */
/* The backward pass of the NVIDIA engine, see cl/nvidia_backward.cl. */
#ifndef LOGLIN_ENGINE_NVIDIA_BACKWARD_H
#define LOGLIN_ENGINE_NVIDIA_BACKWARD_H

#include "operator/chunkwise.h"

typedef struct loglin_nvidia_backward loglin_nvidia_backward;

/* NULL if it takes the problem, which the NVIDIA engine takes, else why not. */
const char *loglin_nvidia_backward_refuses(const loglin_problem *problem);

loglin_status loglin_nvidia_backward_create(loglin_device *device, const loglin_problem *problem,
                                            loglin_nvidia_backward **backward);
void loglin_nvidia_backward_destroy(loglin_nvidia_backward *backward);

/* Bytes. */
size_t loglin_nvidia_backward_workspace(const loglin_nvidia_backward *backward);

/* All gradients; not of final states. */
loglin_status loglin_nvidia_backward_enqueue(loglin_nvidia_backward *backward, const loglin_call *call,
                                             loglin_buffer workspace, cl_command_queue queue, cl_uint num_wait,
                                             const cl_event *wait, cl_event *event);

#endif
