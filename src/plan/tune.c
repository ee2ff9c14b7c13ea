/* SPDX-License-Identifier: Apache-2.0 */
/* The tuner: CLBlast's parameters for the device, then engine and tunables for one class after the other. */
#include "plan/journal.h"
#include "plan/problem.h"
#include "plan/search.h"
#include "plan/tuning.h"
#include "plan/worker.h"
#include "runtime/cache.h"
#include "runtime/status.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_CANDIDATES = 128, MAX_PROBLEMS = 64 };

static const double candidate_limit = 180; /* seconds: a cold compilation of CLBlast takes 25 on a slow CPU */

typedef struct tuner {
    loglin_device_info info;
    size_t place; /* in loglin_list_devices */
    loglin_tune_options options;
    loglin_stamp stamp;
    char *cache;
    loglin_journal *journal;
    loglin_tuning known;   /* what the cache held when the tuner started */
    loglin_tuning results; /* since the last merge */
    loglin_gemm_parameters gemm;
    double begin;
    loglin_status status; /* of what no candidate is to blame for */
    /* What is being searched. */
    char subject[LOGLIN_CLASS_NAME_SIZE];
    loglin_problem problem;
    loglin_configuration candidates[MAX_CANDIDATES];
    size_t count;
    double share_before, share_of;
    loglin_tune_event event;
    char best[256];
} tuner;

static double now(void) {
    struct timespec time;
    (void)clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* ---- Events ------------------------------------------------------------------------------------------------------ */

/* Not 0: the caller wants to stop. */
static int tell(tuner *at) {
    loglin_tune_event *event = &at->event;
    event->subject = at->subject;
    event->seconds = now() - at->begin;
    event->seconds_left = event->share > 0.01 ? event->seconds * (1 - event->share) / event->share : 0;
    return at->options.progress != NULL ? at->options.progress(at->options.context, event) : 0;
}

static int wait_patiently(void *context) {
    tuner *at = context;
    at->event.candidate = at->event.outcome = NULL;
    return tell(at);
}

/* "blas chunk=64 panel_mib=256 gemm=own", of the tunables that the engine reads. */
static void candidate_text(const loglin_configuration *of, char *text, size_t capacity) {
    size_t used = (size_t)snprintf(text, capacity, "%s", of->engine == LOGLIN_ENGINE_FUSED ? "fused" : "blas");
    for (size_t i = 0; i < LOGLIN_TUNABLE_COUNT && used < capacity; i++) {
        if ((loglin_tunables[i].engines & 1u << of->engine) != 0) {
            used += (size_t)snprintf(text + used, capacity - used, " %s=%u", loglin_tunables[i].name, of->values[i]);
        }
    }
    for (size_t i = 0; i < LOGLIN_GEMM_PARAMETER_COUNT && used < capacity; i++) {
        if (loglin_gemm_parameters_absent(&of->gemm)) {
            (void)snprintf(text + used, capacity - used, " gemm=own");
            return;
        }
        used += (size_t)snprintf(text + used, capacity - used, i == 0 ? " gemm=%u" : "/%u", of->gemm.values[i]);
    }
}

/* ---- One measurement --------------------------------------------------------------------------------------------- */

static bool is_known_to_fail(const tuner *at, const char *candidate) {
    for (size_t i = 0; i < at->known.count; i++) {
        const loglin_entry *entry = &at->known.entries[i];
        if (entry->kind == LOGLIN_ENTRY_FAILED && strcmp(entry->candidate, candidate) == 0 &&
            memcmp(&entry->stamp, &at->stamp, sizeof at->stamp) == 0) {
            return true;
        }
    }
    return false;
}

static void remember_failure(tuner *at, const char *candidate, const loglin_reply *reply) {
    loglin_entry entry = {.kind = LOGLIN_ENTRY_FAILED, .stamp = at->stamp, .tuned_at = (int64_t)time(NULL)};
    (void)snprintf(entry.candidate, sizeof entry.candidate, "%s", candidate);
    (void)snprintf(entry.reason, sizeof entry.reason, "%s", reply->reason);
    (void)loglin_tuning_add(&at->results, &entry);
}

/* Asks a child, with the journal told before and after. */
static loglin_reply ask(tuner *at, const char *key, const loglin_request *request) {
    loglin_reply reply = {.outcome = LOGLIN_OUTCOME_STOPPED};
    if (loglin_journal_find(at->journal, key, &reply)) {
        return reply;
    }
    if (at->options.time_limit > 0 && now() - at->begin > at->options.time_limit) {
        return reply;
    }
    char *text = loglin_request_print(request);
    at->status = text == NULL ? loglin_fail(LOGLIN_OUT_OF_MEMORY, "tuner: out of host memory")
                              : loglin_journal_begin(at->journal, key);
    if (at->status == LOGLIN_OK) {
        reply = loglin_worker_ask(at->options.worker, text, candidate_limit, wait_patiently, at);
        if (reply.outcome != LOGLIN_OUTCOME_STOPPED) {
            at->status = loglin_journal_end(at->journal, key, &reply);
        } else if (reply.detail[0] != '\0') {
            at->status = loglin_fail(LOGLIN_IO, "tuner: %s", reply.detail);
        }
    }
    free(text);
    if (at->status != LOGLIN_OK) {
        reply.outcome = LOGLIN_OUTCOME_STOPPED;
    }
    return reply;
}

static loglin_request request_for(const tuner *at, loglin_request_kind kind) {
    loglin_request request = {.kind = kind, .device = at->place, .problem = at->problem};
    (void)snprintf(request.name, sizeof request.name, "%s", at->info.name);
    return request;
}

static loglin_outcome measure(void *context, size_t candidate, unsigned round, unsigned runs, loglin_sample *sample) {
    tuner *at = context;
    const loglin_configuration *configuration = &at->candidates[candidate];
    char text[150], subject[256], key[300];
    candidate_text(configuration, text, sizeof text);
    (void)snprintf(subject, sizeof subject, "%s: %s", at->subject, text);
    (void)snprintf(key, sizeof key, "%s: round %u of %u", subject, round, runs);
    loglin_request request = request_for(at, LOGLIN_REQUEST_TIME);
    request.configuration = *configuration;
    request.runs = runs;
    loglin_reply reply = {.outcome = LOGLIN_OUTCOME_FAILED, .reason = "failed", .detail = "as in an earlier run"};
    if (!is_known_to_fail(at, subject)) {
        reply = ask(at, key, &request);
        if (reply.outcome == LOGLIN_OUTCOME_FAILED && strcmp(reply.reason, "refused") != 0) {
            remember_failure(at, subject, &reply);
        }
    }
    *sample = reply.sample;
    if (reply.outcome != LOGLIN_OUTCOME_STOPPED) {
        at->event.candidate = text;
        at->event.outcome = reply.outcome == LOGLIN_OUTCOME_OK ? "ok" : reply.reason;
        at->event.detail = reply.detail;
        at->event.ms = sample->runs > 0 ? loglin_sample_median(sample) : 0;
        at->event.spread = sample->runs > 0 ? loglin_sample_spread(sample) : 0;
        at->event.problem = at->problem;
        at->event.problem.engine = configuration->engine;
        at->event.problem.chunk = configuration->values[LOGLIN_TUNABLE_CHUNK];
        if (tell(at) != 0) {
            return LOGLIN_OUTCOME_STOPPED;
        }
        at->event.candidate = at->event.outcome = NULL;
    }
    return reply.outcome;
}

static void advance(void *context, double share, size_t best, double ms) {
    tuner *at = context;
    at->event.share = at->share_before + share * at->share_of;
    candidate_text(&at->candidates[best], at->best, sizeof at->best);
    at->event.best = at->best;
    at->event.best_ms = ms;
}

/* ---- Candidates -------------------------------------------------------------------------------------------------- */

/* Each candidate once. */
static void add_candidate(tuner *at, const loglin_configuration *configuration) {
    for (size_t i = 0; i < at->count; i++) {
        if (memcmp(&at->candidates[i], configuration, sizeof *configuration) == 0) {
            return;
        }
    }
    if (at->count < MAX_CANDIDATES) {
        at->candidates[at->count++] = *configuration;
    }
}

/* Parameters that have won somewhere. */
static const loglin_gemm_parameters known_parameters[] = {
    {{64, 8, 8, 8, 8, 2, 1, 8, 0, 0}}, {{64, 4, 16, 4, 16, 2, 1, 4, 0, 0}},   {{64, 8, 16, 8, 16, 2, 1, 4, 0, 0}},
    {{32, 8, 8, 8, 8, 2, 1, 4, 0, 0}}, {{64, 16, 16, 16, 16, 2, 4, 4, 1, 1}},
};

static bool fits(const tuner *at, const loglin_gemm_parameters *parameters) {
    return loglin_gemm_parameters_possible(parameters) &&
           loglin_gemm_group_size(parameters) <= at->info.max_work_group_size &&
           loglin_gemm_local_memory(parameters) <= at->info.local_memory;
}

static loglin_gemm_parameters random_parameters(const tuner *at, uint64_t *random) {
    loglin_gemm_parameters made;
    do {
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
    } while (!fits(at, &made));
    return made;
}

static void list_parameters(tuner *at) {
    const size_t random_count = at->options.quick != 0 ? 0 : at->info.type == CL_DEVICE_TYPE_CPU ? 6 : 24;
    const size_t known_count = at->options.quick != 0 ? 1 : sizeof known_parameters / sizeof known_parameters[0];
    uint64_t random = at->options.seed;
    loglin_configuration configuration = loglin_configuration_default(LOGLIN_ENGINE_BLAS);
    at->count = 0;
    add_candidate(at, &configuration);
    for (size_t i = 0; i < known_count + random_count; i++) {
        configuration.gemm = i < known_count ? known_parameters[i] : random_parameters(at, &random);
        if (fits(at, &configuration.gemm)) {
            add_candidate(at, &configuration);
        }
    }
}

/* In a quick run, values next to nothing but the fallback. */
static bool is_tried(const tuner *at, size_t tunable, unsigned value) {
    const unsigned fallback = loglin_tunables[tunable].fallback;
    return at->options.quick == 0 || value == fallback ||
           (tunable == LOGLIN_TUNABLE_CHUNK ? value == 32 || value == 128 : value == 16);
}

/* All values of the engine's tunables from the given one on. */
static void list_values(tuner *at, loglin_configuration *configuration, size_t tunable) {
    if (tunable == LOGLIN_TUNABLE_COUNT) {
        add_candidate(at, configuration);
        return;
    }
    const loglin_tunable *of = &loglin_tunables[tunable];
    if ((of->engines & 1u << configuration->engine) == 0) {
        list_values(at, configuration, tunable + 1);
        return;
    }
    for (size_t i = 0; i < of->value_count; i++) {
        if (is_tried(at, tunable, of->values[i])) {
            configuration->values[tunable] = of->values[i];
            list_values(at, configuration, tunable + 1);
        }
    }
    configuration->values[tunable] = of->fallback;
}

/* The untuned default first: it is the one to beat. */
static void list_configurations(tuner *at) {
    static const loglin_engine engines[] = {LOGLIN_ENGINE_BLAS, LOGLIN_ENGINE_FUSED};
    const loglin_configuration untuned = loglin_configuration_default(LOGLIN_ENGINE_BLAS);
    at->count = 0;
    add_candidate(at, &untuned);
    for (size_t i = 0; i < sizeof engines / sizeof engines[0]; i++) {
        if (at->problem.engine == LOGLIN_ENGINE_AUTO || at->problem.engine == engines[i]) {
            loglin_configuration configuration = loglin_configuration_default(engines[i]);
            configuration.gemm = at->gemm;
            list_values(at, &configuration, 0);
        }
    }
}

/* ---- Stages ------------------------------------------------------------------------------------------------------ */

static loglin_status keep(tuner *at) {
    if (at->results.count == 0) {
        return LOGLIN_OK;
    }
    const loglin_status status = loglin_tuning_merge(at->cache, &at->results);
    const loglin_identity identity = at->results.identity;
    loglin_tuning_free(&at->results);
    at->results.identity = identity;
    return status;
}

static loglin_status add_result(tuner *at, loglin_entry_kind kind, const loglin_search_result *result) {
    loglin_entry entry = {.kind = kind,
                          .stamp = at->stamp,
                          .configuration = at->candidates[result->winner],
                          .ms = result->ms,
                          .spread = result->spread,
                          .default_ms = result->first_ms,
                          .seed = (int64_t)at->options.seed,
                          .tuned_at = (int64_t)time(NULL)};
    if (kind == LOGLIN_ENTRY_CLASS) {
        loglin_problem filled;
        RETURN_IF_ERROR(loglin_problem_validate(&at->problem, &filled));
        entry.class = loglin_class_of(&filled);
    }
    return loglin_tuning_add(&at->results, &entry);
}

/* Searches what is listed; *over: no time is left, or the caller wishes so. */
static loglin_status search_subject(tuner *at, loglin_entry_kind kind, unsigned runs, bool *over) {
    const loglin_search search = {.count = at->count,
                                  .seed = at->options.seed,
                                  .runs = runs,
                                  .one_round = at->options.quick != 0,
                                  .measure = measure,
                                  .advance = advance,
                                  .context = at};
    at->event = (loglin_tune_event){.share = at->share_before};
    const loglin_search_result result = loglin_search_run(&search);
    RETURN_IF_ERROR(at->status);
    *over = !result.complete && !result.found;
    if (result.found && result.complete) {
        RETURN_IF_ERROR(add_result(at, kind, &result));
        if (kind == LOGLIN_ENTRY_GEMM) {
            at->gemm = at->candidates[result.winner].gemm;
        }
        advance(at, 1, result.winner, result.ms);
        at->event.ms = result.ms;
        at->event.spread = result.spread;
        at->event.default_ms = result.first_ms;
        at->event.problem = at->problem;
        at->event.problem.engine = at->candidates[result.winner].engine;
        at->event.problem.chunk = at->candidates[result.winner].values[LOGLIN_TUNABLE_CHUNK];
        at->event.finished = 1;
        *over = tell(at) != 0;
        at->event.finished = 0;
    }
    return keep(at);
}

static loglin_problem standard_problem(const tuner *at, loglin_op op, loglin_phase phase, size_t length) {
    const size_t heads = at->info.type == CL_DEVICE_TYPE_CPU ? 4 : 32;
    return (loglin_problem){.op = op,
                            .batch = 1,
                            .length = length,
                            .heads = heads,
                            .groups = 1,
                            .dim_k = 128,
                            .dim_v = 64,
                            .levels = loglin_num_levels(length),
                            .phases = phase};
}

static void tune_peak(tuner *at) {
    (void)snprintf(at->subject, sizeof at->subject, "peak");
    at->event = (loglin_tune_event){.share = 0};
    const loglin_request request = request_for(at, LOGLIN_REQUEST_PEAK);
    const loglin_reply reply = ask(at, "peak", &request);
    if (reply.outcome == LOGLIN_OUTCOME_OK) {
        at->event.gflops = reply.gflops;
        at->event.gbytes = reply.gbytes;
        at->event.finished = 1;
        (void)tell(at);
    }
}

static loglin_status tune_gemm(tuner *at, bool *over) {
    (void)snprintf(at->subject, sizeof at->subject, "CLBlast");
    at->problem = standard_problem(at, LOGLIN_MAMBA2, LOGLIN_FORWARD, 1024);
    at->share_before = 0.02;
    at->share_of = 0.28;
    list_parameters(at);
    return search_subject(at, LOGLIN_ENTRY_GEMM, 3, over);
}

static size_t list_standard(const tuner *at, loglin_problem problems[MAX_PROBLEMS]) {
    static const size_t lengths[] = {1024, 4096, 16384};
    const size_t length_count = at->options.quick != 0 ? 1 : sizeof lengths / sizeof lengths[0];
    const int dtype_count = at->info.type == CL_DEVICE_TYPE_CPU ? 1 : 2;
    size_t count = 0;
    for (int dtype = 0; dtype < dtype_count; dtype++) {
        for (size_t i = 0; i < length_count; i++) {
            for (int which = 0; which < 4; which++) {
                problems[count] = standard_problem(at, which % 2 != 0 ? LOGLIN_GATED_DELTA : LOGLIN_MAMBA2,
                                                   which / 2 != 0 ? LOGLIN_BACKWARD : LOGLIN_FORWARD, lengths[i]);
                problems[count++].dtype = dtype == 0 ? LOGLIN_F32 : LOGLIN_BF16;
            }
        }
    }
    for (int which = 0; which < 4 && at->options.quick == 0; which++) { /* every head its own q and k */
        problems[count] = standard_problem(at, which % 2 != 0 ? LOGLIN_GATED_DELTA : LOGLIN_MAMBA2,
                                           which / 2 != 0 ? LOGLIN_BACKWARD : LOGLIN_FORWARD, 1024);
        problems[count].groups = problems[count].heads;
        problems[count++].dim_k = 64;
    }
    return count;
}

static loglin_status tune_classes(tuner *at, const loglin_problem *problems, size_t count, bool *over) {
    for (size_t i = 0; i < count && !*over; i++) {
        loglin_problem filled;
        RETURN_IF_ERROR(loglin_problem_validate(&problems[i], &filled));
        const loglin_class class = loglin_class_of(&filled);
        loglin_class_name(&class, at->subject, sizeof at->subject);
        at->problem = problems[i];
        at->share_before = 0.3 + 0.7 * (double)i / (double)count;
        at->share_of = 0.7 / (double)count;
        list_configurations(at);
        RETURN_IF_ERROR(search_subject(at, LOGLIN_ENTRY_CLASS, 2, over));
    }
    return LOGLIN_OK;
}

static loglin_status run(tuner *at) {
    loglin_problem standard[MAX_PROBLEMS];
    const loglin_problem *problems = at->options.problems;
    size_t count = at->options.problem_count;
    bool over = false;
    if (problems == NULL) {
        count = list_standard(at, standard);
        problems = standard;
    }
    tune_peak(at);
    RETURN_IF_ERROR(at->status);
    RETURN_IF_ERROR(tune_gemm(at, &over));
    return over ? LOGLIN_OK : tune_classes(at, problems, count, &over);
}

/* ---- The interface ----------------------------------------------------------------------------------------------- */

static loglin_status find_device(cl_device_id id, size_t *place, loglin_device_info *info) {
    enum { MOST = 64 };
    loglin_device_info infos[MOST];
    size_t count = 0;
    RETURN_IF_ERROR(loglin_list_devices(infos, MOST, &count));
    for (size_t i = 0; i < count && i < MOST; i++) {
        if (infos[i].id == id) {
            *place = i;
            *info = infos[i];
            return LOGLIN_OK;
        }
    }
    return loglin_fail(LOGLIN_INVALID_ARGUMENT, "id is not a device that loglin_list_devices lists");
}

static loglin_status require_cache(char **cache) {
    *cache = loglin_cache_directory();
    return *cache != NULL
               ? LOGLIN_OK
               : loglin_fail(LOGLIN_IO, "LOGLIN_CACHE_DIR is empty, or there is no home: expected a place for results");
}

/* The journal is of one kind of run: device, versions and problems. */
static loglin_status open_journal(tuner *at) {
    char settings[512];
    (void)snprintf(settings, sizeof settings, "%s %s %s %s quick %d", at->info.name, at->stamp.driver,
                   at->stamp.library, at->stamp.source, at->options.quick != 0);
    char *path = loglin_tuning_path(at->cache, &at->results.identity, ".journal");
    const loglin_status status =
        path == NULL ? loglin_fail(LOGLIN_OUT_OF_MEMORY, "tuner: out of host memory")
                     : loglin_journal_open(path, at->options.resume != 0, settings, &at->options.seed, &at->journal);
    free(path);
    return status;
}

static loglin_status prepare(tuner *at) {
    RETURN_IF_ERROR(require_cache(&at->cache));
    at->stamp = loglin_stamp_of(&at->info);
    at->results.identity = loglin_identity_of(&at->info);
    RETURN_IF_ERROR(loglin_tuning_merge(at->cache, &at->results)); /* before long work: can results be kept? */
    RETURN_IF_ERROR(loglin_tuning_load(at->cache, &at->results.identity, &at->known));
    return open_journal(at);
}

static loglin_status check_options(const loglin_tune_options *options) {
    for (size_t i = 0; options->problems != NULL && i < options->problem_count; i++) {
        const loglin_problem *problem = &options->problems[i];
        loglin_problem filled;
        RETURN_IF_ERROR(loglin_problem_validate(problem, &filled));
        if ((problem->phases != LOGLIN_FORWARD && problem->phases != LOGLIN_BACKWARD) || problem->sequences > 0 ||
            problem->max_position > 0 || problem->normalize_qk != 0 || problem->scale != 0) {
            return loglin_fail(LOGLIN_INVALID_ARGUMENT,
                               "options.problems[%zu]: expected phases forward or backward, and sequences, "
                               "max_position, normalize_qk and scale 0",
                               i);
        }
    }
    return LOGLIN_OK;
}

loglin_status loglin_tune(cl_device_id id, const loglin_tune_options *options) {
    tuner *at = calloc(1, sizeof *at);
    if (at == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "tuner: out of host memory");
    }
    at->options = options != NULL ? *options : (loglin_tune_options){.quick = 0};
    at->options.worker = at->options.worker != NULL ? at->options.worker : "loglin";
    at->options.seed = (at->options.seed != 0 ? at->options.seed : (uint64_t)time(NULL)) & INT64_MAX;
    at->begin = now();
    loglin_status status = check_options(&at->options);
    status = status != LOGLIN_OK ? status : find_device(id, &at->place, &at->info);
    status = status != LOGLIN_OK ? status : prepare(at);
    status = status != LOGLIN_OK ? status : run(at);
    loglin_journal_close(at->journal);
    loglin_tuning_free(&at->known);
    loglin_tuning_free(&at->results);
    free(at->cache);
    free(at);
    return status;
}

loglin_status loglin_tuning_import(const char *path) {
    if (path == NULL) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "path is NULL");
    }
    char *cache;
    loglin_tuning tuning;
    RETURN_IF_ERROR(require_cache(&cache));
    loglin_status status = loglin_tuning_read(path, &tuning);
    if (status == LOGLIN_OK) {
        status = loglin_tuning_merge(cache, &tuning);
        loglin_tuning_free(&tuning);
    }
    free(cache);
    return status;
}

loglin_status loglin_tuning_export(cl_device_id id, const char *path) {
    if (path == NULL) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "path is NULL");
    }
    size_t place;
    loglin_device_info info;
    char *cache;
    loglin_tuning tuning;
    RETURN_IF_ERROR(find_device(id, &place, &info));
    RETURN_IF_ERROR(require_cache(&cache));
    const loglin_identity identity = loglin_identity_of(&info);
    loglin_status status = loglin_tuning_load(cache, &identity, &tuning);
    if (status == LOGLIN_OK && tuning.count == 0) {
        status = loglin_fail(LOGLIN_IO, "there are no tuning results for %s", info.name);
    }
    status = status != LOGLIN_OK ? status : loglin_tuning_write(path, &tuning);
    loglin_tuning_free(&tuning);
    free(cache);
    return status;
}
