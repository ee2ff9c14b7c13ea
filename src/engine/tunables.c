/* SPDX-License-Identifier: Apache-2.0 */
/* The tables of tunables.h, and which values of them go together. */
#include "engine/tunables.h"

#define LOGLIN_TUNABLE_VALUES(NAME, name, engines, devices, phases, fallback, ...)                                     \
    static const unsigned name##_values[] = {__VA_ARGS__};
LOGLIN_TUNABLES(LOGLIN_TUNABLE_VALUES)
#undef LOGLIN_TUNABLE_VALUES

const loglin_tunable loglin_tunables[LOGLIN_TUNABLE_COUNT] = {
#define LOGLIN_TUNABLE_ROW(NAME, name, engines, devices, phases, fallback, ...)                                        \
    {#name, engines, devices, phases, fallback, name##_values, sizeof name##_values / sizeof name##_values[0]},
    LOGLIN_TUNABLES(LOGLIN_TUNABLE_ROW)
#undef LOGLIN_TUNABLE_ROW
};

const char *const loglin_gemm_parameter_names[LOGLIN_GEMM_PARAMETER_COUNT] = {
#define LOGLIN_GEMM_NAME(NAME) #NAME,
    LOGLIN_GEMM_PARAMETERS(LOGLIN_GEMM_NAME)
#undef LOGLIN_GEMM_NAME
};

loglin_configuration loglin_configuration_default(loglin_engine engine) {
    loglin_configuration configuration = {.engine = engine};
    for (size_t i = 0; i < LOGLIN_TUNABLE_COUNT; i++) {
        configuration.values[i] = loglin_tunables[i].fallback;
    }
    return configuration;
}

bool loglin_tunable_is_read(const loglin_tunable *tunable, loglin_engine engine) {
    return (tunable->engines & 1u << engine) != 0;
}

bool loglin_tunable_takes(const loglin_tunable *tunable, unsigned value) {
    if (value == tunable->fallback) {
        return true;
    }
    for (size_t i = 0; i < tunable->value_count; i++) {
        if (tunable->values[i] == value) {
            return true;
        }
    }
    return false;
}

bool loglin_gemm_parameters_absent(const loglin_gemm_parameters *parameters) {
    for (size_t i = 0; i < LOGLIN_GEMM_PARAMETER_COUNT; i++) {
        if (parameters->values[i] != 0) {
            return false;
        }
    }
    return true;
}

static bool divides(unsigned part, unsigned whole) {
    return part > 0 && whole % part == 0;
}

/* The constraints that CLBlast's own tuner puts on the direct kernels. */
bool loglin_gemm_parameters_possible(const loglin_gemm_parameters *parameters) {
    const unsigned *p = parameters->values;
    const unsigned tile = p[LOGLIN_GEMM_WGD], limit = 128;
    for (size_t i = 0; i < LOGLIN_GEMM_PARAMETER_COUNT; i++) {
        const bool is_padding = i == LOGLIN_GEMM_PADA || i == LOGLIN_GEMM_PADB;
        if (is_padding ? p[i] > 1 : p[i] == 0 || p[i] > limit || (p[i] & (p[i] - 1)) != 0) {
            return false;
        }
    }
    const unsigned group = p[LOGLIN_GEMM_MDIMCD] * p[LOGLIN_GEMM_NDIMCD];
    return p[LOGLIN_GEMM_VWMD] <= 8 && p[LOGLIN_GEMM_VWND] <= 8 && divides(p[LOGLIN_GEMM_KWID], tile) &&
           divides(p[LOGLIN_GEMM_MDIMCD] * p[LOGLIN_GEMM_VWMD], tile) &&
           divides(p[LOGLIN_GEMM_NDIMCD] * p[LOGLIN_GEMM_VWND], tile) &&
           divides(p[LOGLIN_GEMM_MDIMAD] * p[LOGLIN_GEMM_VWMD], tile) &&
           divides(p[LOGLIN_GEMM_NDIMBD] * p[LOGLIN_GEMM_VWND], tile) && divides(p[LOGLIN_GEMM_MDIMAD], group) &&
           divides(p[LOGLIN_GEMM_NDIMBD], group) && divides(group / p[LOGLIN_GEMM_MDIMAD], tile) &&
           divides(group / p[LOGLIN_GEMM_NDIMBD], tile);
}

bool loglin_gemm_parameters_fit(const loglin_gemm_parameters *parameters, const loglin_device_info *info) {
    const unsigned *p = parameters->values;
    const size_t items = (size_t)p[LOGLIN_GEMM_MDIMCD] * p[LOGLIN_GEMM_NDIMCD], tile = p[LOGLIN_GEMM_WGD];
    const size_t floats = tile * (2 * tile + p[LOGLIN_GEMM_PADA] + p[LOGLIN_GEMM_PADB]);
    return items <= info->max_work_group_size && floats * sizeof(float) <= info->local_memory;
}
