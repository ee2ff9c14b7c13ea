/* SPDX-License-Identifier: Apache-2.0 */
/* A device of a context: its limits, and the programs that were built for it. */
#ifndef LOGLIN_RUNTIME_DEVICE_H
#define LOGLIN_RUNTIME_DEVICE_H

#include "loglin.h"
#include <stdatomic.h>
#include <stdbool.h>
#include <threads.h>

struct loglin_program; /* program.c */

/* Bytes of local memory with which the NVIDIA engine's trial run passed, and failed; 0: not tried. */
struct loglin_nvidia_probe {
    size_t passed, failed;
};

/* Whether matrix units have given right products, for each row of engine/lanes.c's table and each storage type. */
enum { LOGLIN_LANE_ROWS = 11 };
enum loglin_probe_outcome { LOGLIN_PROBE_UNKNOWN, LOGLIN_PROBE_PASSED, LOGLIN_PROBE_FAILED };

struct loglin_device {
    atomic_uint references;
    cl_context context;
    cl_device_id id;
    loglin_device_info info;
    bool is_cpu;
    bool shares_memory;    /* the host may look into a buffer while a kernel writes it: fine grain, with atomics */
    char *cache_directory; /* NULL: no cache on disk */
    char *build_options;   /* LOGLIN_BUILD_OPTIONS, never NULL */
    mtx_t meetings; /* held while groups of a kernel wait for each other: two such kernels may block each other */
    mtx_t lock;     /* of all below */
    struct loglin_program *programs;
    struct loglin_nvidia_probe nvidia_probe[2][2]; /* of bfloat16, of half; with mma.sync, with wgmma */
    enum loglin_probe_outcome lane_probes[LOGLIN_LANE_ROWS][LOGLIN_BF16 + 1];
    bool gemm_ready; /* engine/gemm.c has set CLBlast up for this device */
};

/* A plan keeps its device alive with these. */
void loglin_device_retain(loglin_device *device);
void loglin_device_release(loglin_device *device);

/* Is the queue of the device and its context? */
loglin_status loglin_device_check_queue(const loglin_device *device, cl_command_queue queue);

#endif
