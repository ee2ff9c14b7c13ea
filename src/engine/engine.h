/* SPDX-License-Identifier: Apache-2.0 */
/* An engine: a way to execute an operator's passes. */
#ifndef LOGLIN_ENGINE_ENGINE_H
#define LOGLIN_ENGINE_ENGINE_H

#include "engine/tunables.h"
#include "operator/chunkwise.h"

/* What an engine has decided and compiled for one problem. */
typedef struct loglin_engine_state loglin_engine_state;

typedef struct loglin_engine_class {
    const char *name;
    /* NULL if the engine takes the problem on this device, else why not. */
    const char *(*refuses)(const loglin_device *device, const loglin_problem *problem);
    /* problem: filled in, chunk chosen.  The chunk of the configuration does not count, its other values do. */
    loglin_status (*create)(loglin_device *device, const loglin_problem *problem,
                            const loglin_configuration *configuration, loglin_engine_state **state);
    void (*destroy)(loglin_engine_state *state);
    /* What runs the backward pass if not this engine, and why; NULL if it does, or none is planned.  May be NULL. */
    const char *(*backward_remark)(const loglin_engine_state *state);
    size_t (*workspace_size)(const loglin_engine_state *state, loglin_phase phase); /* bytes */
    /* Arguments are checked; the work starts after the events of `wait`. */
    loglin_status (*forward)(loglin_engine_state *state, const loglin_call *call, loglin_buffer workspace,
                             cl_command_queue queue, cl_uint num_wait, const cl_event *wait, cl_event *event);
    loglin_status (*backward)(loglin_engine_state *state, const loglin_call *call, loglin_buffer workspace,
                              cl_command_queue queue, cl_uint num_wait, const cl_event *wait, cl_event *event);
} loglin_engine_class;

extern const loglin_engine_class loglin_blas_engine, loglin_nvidia_engine, loglin_cpu_engine, loglin_gpu_engine;

#endif
