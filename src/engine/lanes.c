/* SPDX-License-Identifier: Apache-2.0 */
#include "engine/lanes.h"

#include "runtime/device.h"
#include "runtime/status.h"

/* What a schedule needs of a device, and the schedule: the best first. */
static const struct {
    size_t local_bytes;
    loglin_lane_schedule schedule;
} table[] = {
    {20480, {.mma = "mma_portable.cl", .items = 256, .slab_depth = 32, .teams_rows = 4}},
    {20480, {.mma = "mma_portable.cl", .items = 128, .slab_depth = 32, .teams_rows = 2}},
    {12288, {.mma = "mma_portable.cl", .items = 64, .slab_depth = 16, .teams_rows = 2}},
};

loglin_status loglin_lanes_choose(loglin_device *device, loglin_lane_schedule *schedule) {
    if (device->is_cpu) {
        *schedule = (loglin_lane_schedule){.mma = "mma_portable.cl", .items = 1};
        return LOGLIN_OK;
    }
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        if (table[i].schedule.items <= device->info.max_work_group_size &&
            table[i].local_bytes <= device->info.local_memory) {
            *schedule = table[i].schedule;
            return LOGLIN_OK;
        }
    }
    return loglin_fail(LOGLIN_UNSUPPORTED,
                       "the device has %zu work-items a group and %llu bytes of local memory, expected at least 64 and "
                       "12288",
                       device->info.max_work_group_size, (unsigned long long)device->info.local_memory);
}
