/* SPDX-License-Identifier: Apache-2.0 */
#include "engine/lanes.h"

#include "runtime/device.h"
#include "runtime/log.h"
#include "runtime/status.h"

#include <stdio.h>
#include <string.h>

/* What a schedule needs of a device and a type, and the schedule: the best first. */
typedef struct row {
    const char *vendor; /* a part of its name, or NULL: any */
    bool is_16_bit;     /* for f16 and bf16 only */
    size_t local_bytes;
    loglin_lane_schedule schedule; /* no mma: there is none for these devices, and the rows below are not for them */
} row;

/*
 * What scripts/vendorcheck prints decides here: no spills, and two waves or more in flight (docs/implementations.md).  What
 * spills on Intel's GPUs with every slab that was tried is the blas engine's.
 */
static const row table[LOGLIN_LANE_ROWS] = {
    {"Advanced Micro Devices",
     true,
     12288,
     {.mma = "mma_amd.cl", .instruction = "MFMA_32X32X8", .items = 256, .slab_depth = 32, .teams_rows = 2}},
    {"Advanced Micro Devices",
     true,
     12288,
     {.mma = "mma_amd.cl", .instruction = "WMMA_GFX11", .items = 256, .slab_depth = 32, .teams_rows = 4}},
    {"Advanced Micro Devices",
     true,
     12288,
     {.mma = "mma_amd.cl", .instruction = "WMMA_GFX12", .items = 256, .slab_depth = 32, .teams_rows = 4}},
    {"Intel",
     true,
     12288,
     {.mma = "mma_intel.cl",
      .instruction = "DPAS_8X16X16",
      .items = 256,
      .slab_depth = 32,
      .teams_rows = 4,
      .options = LOGLIN_INTEL_REGISTERS,
      .forward_only = true}},
    {"Intel",
     true,
     12288,
     {.mma = "mma_intel.cl",
      .instruction = "DPAS_8X8X16",
      .items = 256,
      .slab_depth = 32,
      .teams_rows = 4,
      .options = LOGLIN_INTEL_REGISTERS}},
    {"Intel",
     false,
     LOGLIN_PVC_LOCAL_BYTES,
     {.mma = "mma_intel.cl",
      .instruction = "FMA_8X16X16",
      .items = 256,
      .slab_depth = 16,
      .teams_rows = 4,
      .options = LOGLIN_INTEL_REGISTERS,
      .forward_only = true}},
    {"Intel",
     false,
     8192,
     {.mma = "mma_intel.cl",
      .instruction = "FMA_8X8X8",
      .items = 256,
      .slab_depth = 16,
      .teams_rows = 4,
      .slab_rows = 32,
      .slab_columns = 64,
      .options = LOGLIN_INTEL_REGISTERS,
      .forward_only = true,
      .few_registers = true}},
    {"Intel", false, 0, {.mma = NULL}},
    {NULL, false, 20480, {.mma = "mma_portable.cl", .items = 256, .slab_depth = 32, .teams_rows = 4}},
    {NULL, false, 20480, {.mma = "mma_portable.cl", .items = 128, .slab_depth = 32, .teams_rows = 2}},
    {NULL, false, 12288, {.mma = "mma_portable.cl", .items = 64, .slab_depth = 16, .teams_rows = 2}},
};

const loglin_lane_schedule loglin_small_lanes = {
    .mma = "mma_portable.cl", .items = 32, .slab_depth = 16, .teams_rows = 1, .slab_rows = 16, .slab_columns = 32};

/* Are the matrix units right?  The device remembers. */
static bool passes_probe(loglin_device *device, loglin_dtype dtype, size_t at) {
    mtx_lock(&device->lock);
    enum loglin_probe_outcome outcome = device->lane_probes[at][dtype];
    mtx_unlock(&device->lock);
    if (outcome == LOGLIN_PROBE_UNKNOWN) {
        const loglin_status status = loglin_lanes_probe(device, dtype, &table[at].schedule);
        outcome = status == LOGLIN_OK ? LOGLIN_PROBE_PASSED : LOGLIN_PROBE_FAILED;
        if (status != LOGLIN_OK) {
            loglin_log(LOGLIN_LOG_INFO, "%s: %s is not used: %s", device->info.name, table[at].schedule.instruction,
                       loglin_last_error());
        }
        mtx_lock(&device->lock);
        device->lane_probes[at][dtype] = outcome;
        mtx_unlock(&device->lock);
    }
    return outcome == LOGLIN_PROBE_PASSED;
}

static bool can_run(loglin_device *device, loglin_dtype dtype, size_t at) {
    const row *of = &table[at];
    const loglin_device_info *info = &device->info;
    return of->schedule.items <= info->max_work_group_size && of->local_bytes <= info->local_memory &&
           (of->vendor == NULL || strstr(info->vendor, of->vendor) != NULL) &&
           (!of->is_16_bit || dtype != LOGLIN_F32) &&
           (of->schedule.instruction == NULL || passes_probe(device, dtype, at));
}

loglin_status loglin_lanes_choose(loglin_device *device, loglin_dtype dtype, loglin_lane_schedule *schedule) {
    if (device->is_cpu) {
        *schedule = (loglin_lane_schedule){.mma = "mma_portable.cl", .items = 1};
        return LOGLIN_OK;
    }
    for (size_t at = 0; at < LOGLIN_LANE_ROWS; at++) {
        if (can_run(device, dtype, at)) {
            *schedule = table[at].schedule;
            return schedule->mma != NULL
                       ? LOGLIN_OK
                       : loglin_fail(LOGLIN_UNSUPPORTED, "%s: it has too few registers for the fused kernels",
                                     device->info.name);
        }
    }
    return loglin_fail(LOGLIN_UNSUPPORTED,
                       "the device has %zu work-items a group and %llu bytes of local memory, expected at least 64 and "
                       "12288",
                       device->info.max_work_group_size, (unsigned long long)device->info.local_memory);
}

void loglin_lanes_options(const loglin_lane_schedule *schedule, char options[LOGLIN_LANE_OPTIONS]) {
    int length = snprintf(options, LOGLIN_LANE_OPTIONS, "-DLANE_ITEMS=%u -DSLAB_DEPTH=%u -DTEAMS_ROWS=%u",
                          schedule->items, schedule->slab_depth, schedule->teams_rows);
    if (schedule->slab_rows > 0) {
        length += snprintf(options + length, LOGLIN_LANE_OPTIONS - (size_t)length, " -DSLAB_ROWS=%u -DSLAB_COLUMNS=%u",
                           schedule->slab_rows, schedule->slab_columns);
    }
    if (schedule->instruction != NULL) {
        length += snprintf(options + length, LOGLIN_LANE_OPTIONS - (size_t)length, " -DMMA_INSTRUCTION=%s",
                           schedule->instruction);
    }
    if (schedule->options != NULL) {
        (void)snprintf(options + length, LOGLIN_LANE_OPTIONS - (size_t)length, " %s", schedule->options);
    }
}
