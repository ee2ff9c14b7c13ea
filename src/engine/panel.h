/* SPDX-License-Identifier: Apache-2.0 */
/* The host's view of cl/panel.cl. */
#ifndef LOGLIN_ENGINE_PANEL_H
#define LOGLIN_ENGINE_PANEL_H

#include "loglin.h"

#include <assert.h>

#include "../../cl/panel.cl"

static_assert(sizeof(unsigned long) == 8 && sizeof(unsigned int) == 4, "the panel is laid out as on the device");
static_assert(sizeof(loglin_panel) <= 1024, "a kernel takes the panel by value");

/* The panel of a problem, but for its division into waves. */
loglin_panel loglin_panel_of(const loglin_problem *problem);

/* Waves of the longest sequence; all slots of packed sequences in a row. */
size_t loglin_count_waves(const loglin_problem *problem);

#endif
