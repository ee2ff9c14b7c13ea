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
    loglin_lane_schedule schedule;
} row;

/*
 * The work-groups and tiles are those that scripts/vendorcheck finds without spills and with two or more waves in flight
 * on the architectures that have the instruction.
 */
static const row table[LOGLIN_LANE_ROWS] = {
    {"Advanced Micro Devices", true, 12288, {"mma_amd.cl", "MFMA_32X32X8", 256, 32, 2}},
    {"Advanced Micro Devices", true, 12288, {"mma_amd.cl", "WMMA_GFX11", 256, 32, 4}},
    {"Advanced Micro Devices", true, 12288, {"mma_amd.cl", "WMMA_GFX12", 256, 32, 4}},
    {"Intel", true, 12288, {"mma_intel.cl", "DPAS_8X16X16", 256, 32, 4}},
    {"Intel", true, 12288, {"mma_intel.cl", "DPAS_8X8X16", 256, 32, 4}},
    {"Intel", false, 16384, {"mma_intel.cl", "FMA_8X16X16", 256, 32, 4}},
    {NULL, false, 20480, {"mma_portable.cl", NULL, 256, 32, 4}},
    {NULL, false, 20480, {"mma_portable.cl", NULL, 128, 32, 2}},
    {NULL, false, 12288, {"mma_portable.cl", NULL, 64, 16, 2}},
};

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
            return LOGLIN_OK;
        }
    }
    return loglin_fail(LOGLIN_UNSUPPORTED,
                       "the device has %zu work-items a group and %llu bytes of local memory, expected at least 64 and "
                       "12288",
                       device->info.max_work_group_size, (unsigned long long)device->info.local_memory);
}

void loglin_lanes_options(const loglin_lane_schedule *schedule, char options[LOGLIN_LANE_OPTIONS]) {
    (void)snprintf(options, LOGLIN_LANE_OPTIONS, "-DLANE_ITEMS=%u -DSLAB_DEPTH=%u -DTEAMS_ROWS=%u%s%s", schedule->items,
                   schedule->slab_depth, schedule->teams_rows,
                   schedule->instruction != NULL ? " -DMMA_INSTRUCTION=" : "",
                   schedule->instruction != NULL ? schedule->instruction : "");
}
