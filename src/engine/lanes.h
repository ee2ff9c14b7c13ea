/* SPDX-License-Identifier: Apache-2.0 */
/* How the work-items of a lane multiply on a device: one table for all architectures. */
#ifndef LOGLIN_ENGINE_LANES_H
#define LOGLIN_ENGINE_LANES_H

#include "loglin.h"

/* A lane's work-items, and how they share a product out: see cl/portable_product.cl. */
typedef struct loglin_lane_schedule {
    const char *mma; /* the implementation of the tile interface, a file of cl/ */
    unsigned items;
    unsigned slab_depth, teams_rows; /* of no meaning to a single item */
} loglin_lane_schedule;

/* The first schedule of the table that the device can run; LOGLIN_UNSUPPORTED if it can run none. */
loglin_status loglin_lanes_choose(loglin_device *device, loglin_lane_schedule *schedule);

#endif
