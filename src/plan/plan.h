/* SPDX-License-Identifier: Apache-2.0 */
/* A plan with a given configuration: what the tuner measures. */
#ifndef LOGLIN_PLAN_PLAN_H
#define LOGLIN_PLAN_PLAN_H

#include "engine/tunables.h"

/* loglin_plan_create that looks nothing up: problem.engine and problem.chunk do not count. */
loglin_status loglin_plan_create_configured(loglin_device *device, const loglin_problem *problem,
                                            const loglin_configuration *configuration, loglin_plan **plan);

#endif
