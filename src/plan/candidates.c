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
        const bool is_plain = i != LOGLIN_TUNABLE_CHUNK && of->values[i] == loglin_tunables[i].fallback;
        if (!is_plain && loglin_tunable_is_read(&loglin_tunables[i], of->engine)) {
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
    {{32, 16, 8, 16, 8, 2, 2, 2, 1, 1}},   {{64, 32, 8, 32, 8, 2, 2, 2, 1, 1}}, {{64, 8, 8, 8, 8, 2, 1, 8, 0, 0}},
    {{64, 4, 16, 4, 16, 2, 1, 4, 0, 0}},   {{64, 8, 16, 8, 16, 2, 1, 4, 0, 0}}, {{32, 8, 8, 8, 8, 2, 1, 4, 0, 0}},
    {{64, 16, 16, 16, 16, 2, 4, 4, 1, 1}},
};

static bool fits(const loglin_device_info *info, const loglin_gemm_parameters *parameters) {
    return loglin_gemm_parameters_possible(parameters) && loglin_gemm_parameters_fit(parameters, info);
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

void loglin_candidates_of_gemm(const loglin_device_info *info, const loglin_gemm_parameters *built_in,
                               const loglin_tuning *known, uint64_t seed, loglin_candidates *candidates) {
    const size_t random_count = info->type == CL_DEVICE_TYPE_CPU ? 6 : 24;
    const loglin_configuration untuned = loglin_configuration_default(LOGLIN_ENGINE_BLAS);
    candidates->count = 0;
    add(candidates, &untuned);
    add_gemm(info, built_in, candidates);
    for (size_t i = 0; i < known->count; i++) {
        if (known->entries[i].kind == LOGLIN_ENTRY_GEMM) {
            add_gemm(info, &known->entries[i].configuration.gemm, candidates);
        }
    }
    for (size_t i = 0; i < sizeof winners / sizeof winners[0]; i++) {
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

/* In a quick run, the chunk sizes that win somewhere, and else what costs no compiling. */
static bool is_tried(size_t tunable, unsigned value, bool quick) {
    const bool other = tunable == LOGLIN_TUNABLE_CHUNK       ? value == 32 || value == 128
                       : tunable == LOGLIN_TUNABLE_PANEL_MIB ? value == 16
                                                             : false;
    return !quick || other || value == loglin_tunables[tunable].fallback;
}

/* The untuned default, and the same with CLBlast's parameters if they differ: only the blas engine's default has own. */
static void add_defaults(loglin_engine engine, const loglin_gemm_parameters *gemm, loglin_candidates *candidates) {
    loglin_configuration configuration = loglin_configuration_default(engine);
    candidates->count = 0;
    if (engine == LOGLIN_ENGINE_BLAS) {
        add(candidates, &configuration);
    }
    configuration.gemm = *gemm;
    add(candidates, &configuration);
}

void loglin_candidates_of_engine(loglin_engine engine, const loglin_gemm_parameters *gemm, bool quick,
                                 loglin_candidates *candidates) {
    const loglin_tunable *chunk = &loglin_tunables[LOGLIN_TUNABLE_CHUNK];
    loglin_configuration configuration = loglin_configuration_default(engine);
    configuration.gemm = *gemm;
    add_defaults(engine, gemm, candidates);
    for (size_t i = 0; i < chunk->value_count; i++) {
        if (is_tried(LOGLIN_TUNABLE_CHUNK, chunk->values[i], quick)) {
            configuration.values[LOGLIN_TUNABLE_CHUNK] = chunk->values[i];
            add(candidates, &configuration);
        }
    }
}

void loglin_candidates_near(const loglin_configuration *from, cl_device_type device, loglin_phase phase, bool quick,
                            loglin_candidates *candidates) {
    add_defaults(from->engine, &from->gemm, candidates);
    const size_t first = candidates->count;
    add(candidates, from);
    for (size_t t = LOGLIN_TUNABLE_CHUNK + 1; t < LOGLIN_TUNABLE_COUNT; t++) {
        const loglin_tunable *tunable = &loglin_tunables[t];
        if (!loglin_tunable_is_read(tunable, from->engine) || (tunable->devices & device) == 0 ||
            (tunable->phases & phase) == 0) {
            continue;
        }
        const size_t end = candidates->count; /* each value with all that is listed by now */
        for (size_t i = first < end ? first : end - 1; i < end; i++) {
            loglin_configuration configuration = candidates->items[i];
            for (size_t v = 0; v < tunable->value_count; v++) {
                configuration.values[t] = tunable->values[v];
                if (is_tried(t, tunable->values[v], quick)) {
                    add(candidates, &configuration);
                }
            }
        }
    }
}

void loglin_candidates_of_class(const loglin_tuning *known, const loglin_class *class, const loglin_configuration *from,
                                loglin_candidates *candidates) {
    for (size_t i = 0; i < known->count; i++) {
        const loglin_entry *entry = &known->entries[i];
        if (entry->kind == LOGLIN_ENTRY_CLASS && entry->configuration.engine == from->engine &&
            loglin_class_is(&entry->class, class)) {
            loglin_configuration configuration = entry->configuration;
            configuration.gemm = from->gemm;
            add(candidates, &configuration);
        }
    }
}
