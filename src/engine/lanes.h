/* SPDX-License-Identifier: Apache-2.0 */
/* How the work-items of a lane multiply on a device: one table for all architectures. */
#ifndef LOGLIN_ENGINE_LANES_H
#define LOGLIN_ENGINE_LANES_H

#include "loglin.h"

#include <stdbool.h>

/* A lane's work-items, and how they share a product out: see cl/portable_product.cl. */
typedef struct loglin_lane_schedule {
    const char *mma;         /* the implementation of the tile interface, a file of cl/ */
    const char *instruction; /* a name of cl/mma_layouts.cl, or NULL */
    unsigned items;
    unsigned slab_depth, teams_rows;  /* of no meaning to a single item */
    unsigned slab_rows, slab_columns; /* 0: those of cl/portable_items.cl */
    const char *options;              /* of the vendor's compiler, or NULL */
    bool forward_only;                /* the backward pass's registers would be spilled */
    bool few_registers; /* so would the delta rule's, the strong partition's, those of small tiles and of wide values */
} loglin_lane_schedule;

/* Intel: twice the registers for half the threads, for GPUs with matrix units and kernels that spill with fewer. */
#define LOGLIN_INTEL_REGISTERS "-cl-intel-256-GRF-per-thread"

/* The most columns of V for which few registers do: with 128, a thread of tgllp spills 512 bytes. */
enum { LOGLIN_FEW_REGISTERS_DIM_V = 64 };

/* Intel's pvc alone has so much local memory. */
enum { LOGLIN_PVC_LOCAL_BYTES = 131072 };

enum { LOGLIN_LANE_OPTIONS = 192 }; /* room for the text below */

/*
 * The first schedule of the table that the device can run with storage of this type: matrix units are tried out before they
 * are trusted.  LOGLIN_UNSUPPORTED if it can run none.
 */
loglin_status loglin_lanes_choose(loglin_device *device, loglin_dtype dtype, loglin_lane_schedule *schedule);

/* The build options of a schedule. */
void loglin_lanes_options(const loglin_lane_schedule *schedule, char options[LOGLIN_LANE_OPTIONS]);

/*
 * Multiplies two small matrices on the device by a schedule with an instruction, cl/mma_probe.cl: LOGLIN_OK if the product is
 * right, and the sub-groups are the size that the instruction needs.
 */
loglin_status loglin_lanes_probe(loglin_device *device, loglin_dtype dtype, const loglin_lane_schedule *schedule);

/* One team on one tile, for matrices of up to 32 by 32, which would leave most of a larger slab empty. */
extern const loglin_lane_schedule loglin_small_lanes;

#endif
