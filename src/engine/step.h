/* SPDX-License-Identifier: Apache-2.0 */
/* One token of every sequence against its level states, in one or two launches; for both operators and partitions. */
#ifndef LOGLIN_ENGINE_STEP_H
#define LOGLIN_ENGINE_STEP_H

#include "loglin.h"

typedef struct loglin_stepper loglin_stepper;

/*
 * The options with which cl/step.cl takes a problem on a device; for kernels that hold its functions.  A text of at most
 * LOGLIN_STEP_OPTIONS bytes.
 */
enum { LOGLIN_STEP_OPTIONS = 640 }; /* 16 numbers of at most 20 digits and their names */
void loglin_stepper_options(const loglin_device *device, const loglin_problem *problem, char *options);

/* problem has been validated and its defaults filled in (scale is not 0). */
loglin_status loglin_stepper_create(loglin_device *device, const loglin_problem *problem, loglin_stepper **stepper);
void loglin_stepper_destroy(loglin_stepper *stepper);

/* As loglin_step of loglin.h, arguments already checked. */
loglin_status loglin_stepper_enqueue(loglin_stepper *stepper, const loglin_inputs *in, const loglin_state *state,
                                     loglin_buffer o, cl_command_queue queue, cl_uint num_wait, const cl_event *wait,
                                     cl_event *event);

#endif
