/* SPDX-License-Identifier: Apache-2.0 */
/* The parts of the NVIDIA engine. */
#ifndef LOGLIN_ENGINE_NVIDIA_H
#define LOGLIN_ENGINE_NVIDIA_H

#include "loglin.h"

#include <assert.h>

#include "../../cl/nvidia_layout.cl"

static_assert(sizeof(unsigned long) == 8 && sizeof(unsigned int) == 4, "a call is laid out as on the device");

/* The most local memory of a work-group that is asked for, in bytes; the trial run says whether the device has it. */
enum { NV_MOST_LOCAL = 226 << 10 };

static inline size_t ceil_div(size_t a, size_t b) {
    return (a + b - 1) / b;
}

/*
 * Runs a small program on the device: LOGLIN_OK if its matrix units take this type, through mma.sync or through wgmma, and
 * work-groups get so many bytes of local memory, else LOGLIN_UNSUPPORTED.  The device remembers.
 */
loglin_status loglin_nvidia_probe(loglin_device *device, loglin_dtype dtype, size_t local_bytes);
loglin_status loglin_nvidia_probe_wgmma(loglin_device *device, loglin_dtype dtype, size_t local_bytes);

#endif
