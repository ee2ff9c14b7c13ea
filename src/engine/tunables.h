/* SPDX-License-Identifier: Apache-2.0 */
/* What can be tuned, in one table that an engine adds its own to, and CLBlast's parameters, which belong to a device. */
#ifndef LOGLIN_ENGINE_TUNABLES_H
#define LOGLIN_ENGINE_TUNABLES_H

#include "loglin.h"
#include <stdbool.h>

/*
 * X(NAME, name, engines, devices, phases, fallback, ...): the engines (a bit each, 1 << loglin_engine), the types of
 * devices and the phases that it matters to, the value where nothing is known, and the values that the tuner tries.
 */
#define LOGLIN_TUNABLES(X)                                                                                             \
    X(CHUNK, chunk, LOGLIN_ANY, CL_DEVICE_TYPE_ALL, LOGLIN_ANY, 64, 16, 32, 64, 128, 256)                              \
    X(PANEL_MIB, panel_mib, 1u << LOGLIN_ENGINE_BLAS, CL_DEVICE_TYPE_ALL, LOGLIN_ANY, 256, 4, 16, 64, 256)             \
    X(LANE_HEADS, lane_heads, 1u << LOGLIN_ENGINE_FUSED, CL_DEVICE_TYPE_CPU, LOGLIN_ANY, 4, 2, 4, 8)                   \
    X(TILE_ROWS, tile_rows, 1u << LOGLIN_ENGINE_FUSED, CL_DEVICE_TYPE_CPU, LOGLIN_ANY, 0, 4, 8)                        \
    X(SEGMENT_CHUNKS, segment_chunks, 1u << LOGLIN_ENGINE_FUSED, CL_DEVICE_TYPE_CPU, LOGLIN_BACKWARD, 32, 16, 32, 64)

#define LOGLIN_ANY (~0u)

enum {
#define LOGLIN_TUNABLE_ENUM(NAME, ...) LOGLIN_TUNABLE_##NAME,
    LOGLIN_TUNABLES(LOGLIN_TUNABLE_ENUM)
#undef LOGLIN_TUNABLE_ENUM
        LOGLIN_TUNABLE_COUNT
};

typedef struct loglin_tunable {
    const char *name;
    unsigned engines;
    cl_device_type devices;
    unsigned phases, fallback;
    const unsigned *values; /* ascending */
    size_t value_count;
} loglin_tunable;

extern const loglin_tunable loglin_tunables[LOGLIN_TUNABLE_COUNT];

/* The parameters of CLBlast's direct products, as CLBlast names them. */
#define LOGLIN_GEMM_PARAMETERS(X) X(WGD) X(MDIMCD) X(NDIMCD) X(MDIMAD) X(NDIMBD) X(KWID) X(VWMD) X(VWND) X(PADA) X(PADB)

enum {
#define LOGLIN_GEMM_ENUM(NAME) LOGLIN_GEMM_##NAME,
    LOGLIN_GEMM_PARAMETERS(LOGLIN_GEMM_ENUM)
#undef LOGLIN_GEMM_ENUM
        LOGLIN_GEMM_PARAMETER_COUNT
};

extern const char *const loglin_gemm_parameter_names[LOGLIN_GEMM_PARAMETER_COUNT];

/* All 0: CLBlast's own choice. */
typedef struct loglin_gemm_parameters {
    unsigned values[LOGLIN_GEMM_PARAMETER_COUNT];
} loglin_gemm_parameters;

/* An engine with the values of its tunables, and what CLBlast is set to. */
typedef struct loglin_configuration {
    loglin_engine engine; /* LOGLIN_ENGINE_AUTO: not decided */
    unsigned values[LOGLIN_TUNABLE_COUNT];
    loglin_gemm_parameters gemm;
} loglin_configuration;

/* Every tunable at its fallback, CLBlast's own parameters. */
loglin_configuration loglin_configuration_default(loglin_engine engine);

/* Does an engine read it? */
bool loglin_tunable_is_read(const loglin_tunable *tunable, loglin_engine engine);

/* Is the value one that the table lists? */
bool loglin_tunable_takes(const loglin_tunable *tunable, unsigned value);

/* Does CLBlast have kernels with these parameters?  What the device allows is not looked at. */
bool loglin_gemm_parameters_possible(const loglin_gemm_parameters *parameters);

/* Has a device of these limits the work-items of a group and the local memory for them? */
bool loglin_gemm_parameters_fit(const loglin_gemm_parameters *parameters, const loglin_device_info *info);

/* Are all parameters CLBlast's own? */
bool loglin_gemm_parameters_absent(const loglin_gemm_parameters *parameters);

#endif
