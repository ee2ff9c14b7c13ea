/* SPDX-License-Identifier: Apache-2.0 */
/* The host's view of cl/panel.cl. */
#ifndef LOGLIN_ENGINE_PANEL_H
#define LOGLIN_ENGINE_PANEL_H

#include <assert.h>

#include "../../cl/panel.cl"

static_assert(sizeof(unsigned long) == 8 && sizeof(unsigned int) == 4, "the panel is laid out as on the device");
static_assert(sizeof(loglin_panel) <= 1024, "a kernel takes the panel by value");

#endif
