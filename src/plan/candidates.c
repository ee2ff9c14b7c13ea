/* SPDX-License-Identifier: Apache-2.0 */
#include "plan/candidates.h"

#include "plan/search.h"

#include <stdio.h>
#include <string.h>

void loglin_candidate_text(const loglin_configuration *of, char text[LOGLIN_CANDIDATE_TEXT_SIZE]) {
    const size_t capacity = LOGLIN_CANDIDATE_TEXT_SIZE;
    const bool is_blas = of->engine == LOGLIN_ENGINE_BLAS, is_own = loglin_gemm_parameters_absent(&of->gemm);
    size_t used = (size_t)snprintf(text, capacity, "%s", is_blas ? "blas" : "fused");
    for (size_t i = 0; i < LOGLIN_TUNABLE_COUNT && used < capacity; i++) {
        if ((loglin_tunables[i].engines & 1u << of->engine) != 0) {
            used += (size_t)snprintf(text + used, capacity - used, " %s=%u", loglin_tunables[i].name, of->values[i]);
        }
    }
    if (is_blas && is_own && used < capacity) {
        (void)snprintf(text + used, capacity - used, " gemm=own");
    }
    for (size_t i = 0; i < LOGLIN_GEMM_PARAMETER_COUNT && is_blas && !is_own && used < capacity; i++) {
        used += (size_t)snprintf(text + used, capacity - used, i == 0 ? " gemm=%u" : "/%u", of->gemm.values[i]);
    }
}

/* Each candidate once. */
static void add(loglin_candidates *candidates, const loglin_configuration *configuration) {
    for (size_t i = 0; i < candidates->count; i++) {
        if (memcmp(&candidates->items[i], configuration, sizeof *configuration) == 0) {
            return;
        }
    }
    if (candidates->count < LOGLIN_MAX_CANDIDATES) {
        candidates->items[candidates->count++] = *configuration;
    }
}

/* ---- CLBlast's parameters ---------------------------------------------------------------------------------------- */

static const loglin_gemm_parameters winners[] = {
    {{64, 8, 8, 8, 8, 2, 1, 8, 0, 0}}, {{64, 4, 16, 4, 16, 2, 1, 4, 0, 0}},   {{64, 8, 16, 8, 16, 2, 1, 4, 0, 0}},
    {{32, 8, 8, 8, 8, 2, 1, 4, 0, 0}}, {{64, 16, 16, 16, 16, 2, 4, 4, 1, 1}},
};

static bool fits(const loglin_device_info *info, const loglin_gemm_parameters *parameters) {
    return loglin_gemm_parameters_possible(parameters) &&
           loglin_gemm_group_size(parameters) <= info->max_work_group_size &&
           loglin_gemm_local_memory(parameters) <= info->local_memory;
}

static void add_gemm(const loglin_device_info *info, const loglin_gemm_parameters *parameters,
                     loglin_candidates *candidates) {
    loglin_configuration configuration = loglin_configuration_default(LOGLIN_ENGINE_BLAS);
    configuration.gemm = *parameters;
    if (fits(info, parameters)) {
        add(candidates, &configuration);
    }
}

static loglin_gemm_parameters draw_parameters(uint64_t *random) {
    loglin_gemm_parameters made;
    for (size_t i = 0; i < LOGLIN_GEMM_PARAMETER_COUNT; i++) {
        const bool padding = i == LOGLIN_GEMM_PADA || i == LOGLIN_GEMM_PADB,
                   vector = i == LOGLIN_GEMM_VWMD || i == LOGLIN_GEMM_VWND;
        const unsigned draw = (unsigned)(loglin_search_random(random) >> 32);
        made.values[i] = padding                 ? draw % 2
                         : vector                ? 1u << draw % 4
                         : i == LOGLIN_GEMM_KWID ? 1u << (1 + draw % 4)
                         : i == LOGLIN_GEMM_WGD  ? 16u << draw % 3
                                                 : 8u << draw % 3;
    }
    return made;
}

void loglin_candidates_of_gemm(const loglin_device_info *info, const loglin_tuning *known, bool quick, uint64_t seed,
                               loglin_candidates *candidates) {
    const size_t random_count = quick ? 0 : info->type == CL_DEVICE_TYPE_CPU ? 6 : 24;
    const size_t winner_count = quick ? 1 : sizeof winners / sizeof winners[0];
    const loglin_configuration untuned = loglin_configuration_default(LOGLIN_ENGINE_BLAS);
    candidates->count = 0;
    add(candidates, &untuned);
    for (size_t i = 0; i < known->count; i++) {
        if (known->entries[i].kind == LOGLIN_ENTRY_GEMM) {
            add_gemm(info, &known->entries[i].configuration.gemm, candidates);
        }
    }
    for (size_t i = 0; i < winner_count; i++) {
        add_gemm(info, &winners[i], candidates);
    }
    size_t fitting = 0;
    const size_t most_draws = 100000; /* a device may have room for none */
    for (size_t i = 0; i < most_draws && fitting < random_count; i++) {
        const loglin_gemm_parameters drawn = draw_parameters(&seed);
        fitting += fits(info, &drawn);
        add_gemm(info, &drawn, candidates);
    }
}

/* ---- An engine's tunables ---------------------------------------------------------------------------------------- */

/* In a quick run, values next to nothing but the fallback. */
static bool is_tried(size_t tunable, unsigned value, bool quick) {
    const unsigned fallback = loglin_tunables[tunable].fallback;
    return !quick || value == fallback || (tunable == LOGLIN_TUNABLE_CHUNK ? value == 32 || value == 128 : value == 16);
}

/* All values of the engine's tunables from the given one on. */
static void add_values(loglin_configuration *configuration, size_t tunable, bool quick, loglin_candidates *candidates) {
    if (tunable == LOGLIN_TUNABLE_COUNT) {
        add(candidates, configuration);
        return;
    }
    const loglin_tunable *of = &loglin_tunables[tunable];
    if ((of->engines & 1u << configuration->engine) == 0) {
        add_values(configuration, tunable + 1, quick, candidates);
        return;
    }
    for (size_t i = 0; i < of->value_count; i++) {
        if (is_tried(tunable, of->values[i], quick)) {
            configuration->values[tunable] = of->values[i];
            add_values(configuration, tunable + 1, quick, candidates);
        }
    }
    configuration->values[tunable] = of->fallback;
}

void loglin_candidates_of_engine(loglin_engine engine, const loglin_gemm_parameters *gemm, bool quick,
                                 loglin_candidates *candidates) {
    loglin_configuration configuration = loglin_configuration_default(engine);
    candidates->count = 0;
    if (engine == LOGLIN_ENGINE_BLAS) {
        add(candidates, &configuration);
    }
    configuration.gemm = *gemm;
    add(candidates, &configuration);
    add_values(&configuration, 0, quick, candidates);
}
