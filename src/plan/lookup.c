/* SPDX-License-Identifier: Apache-2.0 */
/* Looking up: every entry has a rank, the lowest wins. */
#include "plan/tuning.h"

#include "runtime/device.h"
#include "runtime/log.h"
#include "runtime/status.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static unsigned log2_of(unsigned x) {
    unsigned bits = 0;
    while (x > 1) {
        x /= 2;
        bits++;
    }
    return bits;
}

static unsigned log2_distance(unsigned a, unsigned b) {
    const unsigned x = log2_of(a), y = log2_of(b);
    return x > y ? x - y : y - x;
}

/* 0: the same class; UINT_MAX: nothing to be learned from it. */
static unsigned class_distance(const loglin_class *a, const loglin_class *b) {
    static const unsigned farthest = 12;
    if (a->op != b->op || a->phase != b->phase) {
        return UINT_MAX;
    }
    const unsigned distance = log2_distance(a->length, b->length) + 2 * log2_distance(a->dim_k, b->dim_k) +
                              2 * log2_distance(a->dim_v, b->dim_v) + (a->shared != b->shared ? 1 : 0) +
                              (a->dtype != b->dtype ? 4 : 0);
    return distance > farthest ? UINT_MAX : loglin_class_is(a, b) ? 0 : distance + 1;
}

static bool is_stale(const loglin_entry *entry, const loglin_stamp *stamp) {
    return strcmp(entry->stamp.driver, stamp->driver) != 0 || strcmp(entry->stamp.version, stamp->version) != 0 ||
           strcmp(entry->stamp.library, stamp->library) != 0 || strcmp(entry->stamp.source, stamp->source) != 0;
}

static bool is_other_device(loglin_source_kind kind) {
    return kind == LOGLIN_SOURCE_FAMILY || kind == LOGLIN_SOURCE_FOREIGN;
}

/* Other vendors last, then family, then neighbours, then what is built in, then what is stale, then distance. */
static unsigned rank_of(loglin_source_kind kind, bool stale, unsigned distance) {
    return (kind == LOGLIN_SOURCE_FOREIGN  ? 8192u
            : kind == LOGLIN_SOURCE_FAMILY ? 4096u
                                           : 0) +
           (distance > 0 ? 1024u : 0) +
           (kind != LOGLIN_SOURCE_OWN ? 512u
            : stale                   ? 256u
                                      : 0) +
           distance;
}

/* The best entry so far. */
typedef struct best_entry {
    const loglin_entry *entry;
    const loglin_source *source;
    unsigned rank, distance;
} best_entry;

static void consider(best_entry *best, const loglin_source *source, const loglin_entry *entry,
                     const loglin_stamp *stamp, unsigned distance) {
    const unsigned rank = rank_of(source->kind, is_stale(entry, stamp), distance);
    if (best->entry == NULL || rank < best->rank || (rank == best->rank && entry->ms < best->entry->ms)) {
        *best = (best_entry){.entry = entry, .source = source, .rank = rank, .distance = distance};
    }
}

static best_entry find_class(const loglin_source *sources, size_t count, const loglin_stamp *stamp,
                             const loglin_class *class, loglin_engine engine) {
    best_entry best = {.entry = NULL};
    for (size_t s = 0; s < count; s++) {
        for (size_t i = 0; i < sources[s].tuning->count; i++) {
            const loglin_entry *entry = &sources[s].tuning->entries[i];
            if (entry->kind != LOGLIN_ENTRY_CLASS || engine != entry->configuration.engine) {
                continue;
            }
            const unsigned distance = class_distance(&entry->class, class);
            if (distance != UINT_MAX) {
                consider(&best, &sources[s], entry, stamp, distance);
            }
        }
    }
    return best;
}

/* The faster of the engines, if the same tuner has measured them for the same class: else nothing is known of which. */
static best_entry find_engine(const loglin_source *sources, size_t count, const loglin_stamp *stamp,
                              const loglin_class *class) {
    const best_entry blas = find_class(sources, count, stamp, class, LOGLIN_ENGINE_BLAS),
                     fused = find_class(sources, count, stamp, class, LOGLIN_ENGINE_FUSED);
    if (blas.entry == NULL || fused.entry == NULL || blas.rank != fused.rank || blas.source != fused.source ||
        class_distance(&blas.entry->class, &fused.entry->class) != 0) {
        return (best_entry){.entry = NULL};
    }
    return blas.entry->ms < fused.entry->ms ? blas : fused;
}

static best_entry find_gemm(const loglin_source *sources, size_t count, const loglin_stamp *stamp) {
    best_entry best = {.entry = NULL};
    for (size_t s = 0; s < count; s++) {
        for (size_t i = 0; i < sources[s].tuning->count; i++) {
            if (sources[s].tuning->entries[i].kind == LOGLIN_ENTRY_GEMM) {
                consider(&best, &sources[s], &sources[s].tuning->entries[i], stamp, 0);
            }
        }
    }
    return best;
}

static void describe(const best_entry *best, const loglin_stamp *stamp, char *where, size_t capacity) {
    char class[LOGLIN_CLASS_NAME_SIZE + 8] = "", device[140] = "";
    if (best->distance > 0) {
        (void)snprintf(class, sizeof class, " for ");
        loglin_class_name(&best->entry->class, class + strlen(class), sizeof class - strlen(class));
    }
    if (is_other_device(best->source->kind)) {
        (void)snprintf(device, sizeof device, " of %s", best->source->tuning->identity.device);
    }
    if (best->source->kind == LOGLIN_SOURCE_OWN) {
        (void)snprintf(where, capacity, "tuned%s%s", class, is_stale(best->entry, stamp) ? ", stale" : "");
    } else {
        (void)snprintf(where, capacity, "built-in table%s%s", device, class);
    }
}

loglin_choice loglin_tuning_find(const loglin_source *sources, size_t count, const loglin_stamp *stamp,
                                 const loglin_class *class, loglin_engine engine) {
    loglin_choice choice = {.configuration = loglin_configuration_default(engine), .where = "default"};
    const best_entry best = engine == LOGLIN_ENGINE_AUTO ? find_engine(sources, count, stamp, class)
                                                         : find_class(sources, count, stamp, class, engine);
    if (best.entry != NULL) {
        choice.configuration = best.entry->configuration;
        choice.found = true;
        describe(&best, stamp, choice.where, sizeof choice.where);
    }
    const best_entry gemm = find_gemm(sources, count, stamp);
    if (gemm.entry != NULL) {
        choice.configuration.gemm = gemm.entry->configuration.gemm;
    }
    return choice;
}

/* ---- All that is known about a device ---------------------------------------------------------------------------- */

static size_t count_tables(void) {
    size_t count = 0, length;
    while (loglin_built_in_tuning(count, &length) != NULL) {
        count++;
    }
    return count;
}

bool loglin_tuning_relate(const loglin_identity *table, const loglin_identity *device, loglin_source_kind *kind) {
    if (strcmp(table->platform, device->platform) != 0 || strcmp(table->type, device->type) != 0) {
        return false;
    }
    *kind = strcmp(table->device, device->device) == 0   ? LOGLIN_SOURCE_BUILT_IN
            : strcmp(table->vendor, device->vendor) == 0 ? LOGLIN_SOURCE_FAMILY
                                                         : LOGLIN_SOURCE_FOREIGN;
    return true;
}

static void add_tables(loglin_knowledge *knowledge, const loglin_identity *identity) {
    for (size_t n = 0; n < knowledge->table_count; n++) {
        size_t length = 0;
        const char *text = loglin_built_in_tuning(n, &length);
        loglin_tuning *table = &knowledge->tables[n];
        loglin_source_kind kind;
        if (loglin_tuning_parse("built-in table", text, length, table) != LOGLIN_OK) {
            loglin_log(LOGLIN_LOG_ERROR, "%s", loglin_last_error());
        } else if (loglin_tuning_relate(&table->identity, identity, &kind)) {
            knowledge->sources[knowledge->count++] = (loglin_source){.kind = kind, .tuning = table};
        }
    }
}

void loglin_knowledge_gather(const char *cache, const loglin_device_info *info, loglin_knowledge *knowledge) {
    const loglin_identity identity = loglin_identity_of(info);
    const size_t table_count = count_tables();
    *knowledge = (loglin_knowledge){.stamp = loglin_stamp_of(info),
                                    .tables = calloc(table_count + 1, sizeof(loglin_tuning)),
                                    .sources = calloc(table_count + 1, sizeof(loglin_source))};
    if (knowledge->tables == NULL || knowledge->sources == NULL) {
        return;
    }
    knowledge->table_count = table_count;
    if (cache != NULL && loglin_tuning_load(cache, &identity, &knowledge->own) == LOGLIN_OK) {
        knowledge->sources[knowledge->count++] = (loglin_source){.kind = LOGLIN_SOURCE_OWN, .tuning = &knowledge->own};
    }
    add_tables(knowledge, &identity);
}

void loglin_knowledge_free(loglin_knowledge *knowledge) {
    for (size_t n = 0; n < knowledge->table_count; n++) {
        loglin_tuning_free(&knowledge->tables[n]);
    }
    loglin_tuning_free(&knowledge->own);
    free(knowledge->tables);
    free(knowledge->sources);
    *knowledge = (loglin_knowledge){.count = 0};
}

loglin_choice loglin_knowledge_choose(const loglin_knowledge *knowledge, const loglin_problem *problem,
                                      loglin_engine engine) {
    const loglin_class class = loglin_class_of(problem);
    return loglin_tuning_find(knowledge->sources, knowledge->count, &knowledge->stamp, &class, engine);
}

loglin_gemm_parameters loglin_tuning_gemm(const char *cache, const loglin_device_info *info) {
    loglin_knowledge knowledge;
    loglin_knowledge_gather(cache, info, &knowledge);
    const best_entry gemm = find_gemm(knowledge.sources, knowledge.count, &knowledge.stamp);
    const loglin_gemm_parameters parameters =
        gemm.entry != NULL ? gemm.entry->configuration.gemm : (loglin_gemm_parameters){{0}};
    loglin_knowledge_free(&knowledge);
    return parameters;
}
