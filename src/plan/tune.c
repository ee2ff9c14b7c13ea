/* SPDX-License-Identifier: Apache-2.0 */
/* The tuner: CLBlast's parameters for the device, then engine and tunables for one class after the other. */
#include "plan/candidates.h"
#include "plan/journal.h"
#include "plan/problem.h"
#include "plan/search.h"
#include "plan/tuning.h"
#include "plan/worker.h"
#include "runtime/cache.h"
#include "runtime/status.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <xxhash.h>

enum { MAX_PROBLEMS = 64, MAX_SUBJECT_PROBLEMS = 4 };

static const char gemm_subject[] = "CLBlast";
static const double usual_limit = 180; /* seconds: a cold compilation of CLBlast takes up to 123 on a slow CPU */
static const double quick_limit = 105; /* seconds, after which a quick run begins nothing */
static const double quick_grace = 10; /* seconds more, after which it gives up what is in flight: two minutes are all */

typedef struct tuner {
    loglin_device_info info;
    size_t place; /* among the devices of its name */
    loglin_tune_options options;
    loglin_stamp stamp;
    char *cache;
    loglin_journal *journal;
    loglin_tuning known;         /* what the cache held when the tuner started */
    loglin_tuning results;       /* since the last merge */
    loglin_gemm_parameters gemm; /* what plans take */
    int stopped;                 /* the caller has wished so */
    double begin;
    double live_since, live_share; /* when the first child was asked, and the share that the journal had done by then */
    loglin_status status;          /* of what no candidate is to blame for */
    /* What is being searched. */
    char subject[LOGLIN_CLASS_NAME_SIZE];
    unsigned stage;                                /* of the subject's searches */
    loglin_problem problems[MAX_SUBJECT_PROBLEMS]; /* that it is measured on */
    size_t problem_count;
    loglin_candidates candidates;
    size_t last_default; /* the candidates up to this one are defaults */
    double share_before, share_of;
    loglin_tune_event event;
    char best[LOGLIN_CANDIDATE_TEXT_SIZE], failure[240]; /* failure: of the last candidate that failed */
} tuner;

static double now(void) {
    struct timespec time;
    (void)clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* ---- Events ------------------------------------------------------------------------------------------------------ */

static double seconds_left(const tuner *at) {
    const double live = now() - at->live_since, share = at->event.share - at->live_share;
    const bool known = at->live_since > 0 && share > 0.01;
    const double left = known ? live * (1 - at->event.share) / share : INFINITY, limit = at->options.time_limit;
    return limit > 0 ? fmin(left, fmax(limit - (now() - at->begin), 0)) : known ? left : 0;
}

/* Not 0: the caller wants to stop. */
static int tell(tuner *at) {
    at->event.subject = at->subject;
    at->event.seed = at->options.seed;
    at->event.seconds = now() - at->begin;
    at->event.seconds_left = at->event.complete != 0 ? 0 : seconds_left(at);
    if (at->options.progress != NULL && at->options.progress(at->options.context, &at->event) != 0) {
        at->stopped = 1;
    }
    return at->stopped;
}

static int wait_patiently(void *context) {
    tuner *at = context;
    const bool late = at->options.quick != 0 && now() - at->begin > at->options.time_limit + quick_grace;
    return tell(at) != 0 || late;
}

/* ---- One measurement --------------------------------------------------------------------------------------------- */

/* What hung is tried again by a run that has more patience: the machine may have been busy, or the limit too low. */
static bool is_failure(const tuner *at, const loglin_entry *entry, const char *candidate) {
    return entry->kind == LOGLIN_ENTRY_FAILED && strcmp(entry->candidate, candidate) == 0 &&
           memcmp(&entry->stamp, &at->stamp, sizeof at->stamp) == 0 &&
           (strcmp(entry->reason, "hung") != 0 || entry->ms >= 999 * at->options.candidate_limit); /* files round */
}

/* What this version on this driver has seen it fail for, in an earlier run or this one; NULL if it has not. */
static const loglin_entry *known_failure(const tuner *at, const char *candidate) {
    const loglin_tuning *const both[] = {&at->known, &at->results};
    for (size_t which = 0; which < 2; which++) {
        for (size_t i = 0; i < both[which]->count; i++) {
            if (is_failure(at, &both[which]->entries[i], candidate)) {
                return &both[which]->entries[i];
            }
        }
    }
    return NULL;
}

static void remember_failure(tuner *at, const char *candidate, const loglin_reply *reply) {
    loglin_entry entry = {.kind = LOGLIN_ENTRY_FAILED,
                          .stamp = at->stamp,
                          .ms = 1e3 * at->options.candidate_limit,
                          .tuned_at = (int64_t)time(NULL)};
    (void)snprintf(entry.candidate, sizeof entry.candidate, "%s", candidate);
    (void)snprintf(entry.reason, sizeof entry.reason, "%s", reply->reason);
    (void)loglin_tuning_add(&at->results, &entry);
}

/* What hung has done so in its limit alone, which is the key's end then: a run with more patience asks again. */
static loglin_status note(tuner *at, const char *key, const char *key_hung, const loglin_reply *reply) {
    if (reply->outcome == LOGLIN_OUTCOME_STOPPED) {
        return reply->detail[0] != '\0' ? loglin_fail(LOGLIN_IO, "tuner: %s", reply->detail)
                                        : loglin_journal_withdraw(at->journal, key);
    }
    if (strcmp(reply->reason, "hung") != 0) {
        return loglin_journal_end(at->journal, key, reply);
    }
    RETURN_IF_ERROR(loglin_journal_withdraw(at->journal, key));
    return loglin_journal_end(at->journal, key_hung, reply);
}

/* Asks a child, with the journal told before and after. */
static loglin_reply ask(tuner *at, const char *key, const loglin_request *request, double limit) {
    loglin_reply reply = {.outcome = LOGLIN_OUTCOME_STOPPED};
    char key_hung[480];
    (void)snprintf(key_hung, sizeof key_hung, "%s: %g s", key, limit);
    if (loglin_journal_find(at->journal, key, &reply) || loglin_journal_find(at->journal, key_hung, &reply)) {
        return reply;
    }
    if (at->stopped != 0 || (at->options.time_limit > 0 && now() - at->begin > at->options.time_limit)) {
        return reply;
    }
    char *text = loglin_request_print(request);
    at->status = text == NULL ? loglin_fail(LOGLIN_OUT_OF_MEMORY, "tuner: out of host memory")
                              : loglin_journal_begin(at->journal, key);
    if (at->live_since == 0) {
        at->live_since = now();
        at->live_share = at->event.share;
    }
    if (at->status == LOGLIN_OK) {
        reply = loglin_worker_ask(at->options.worker, text, limit, wait_patiently, at);
        at->status = note(at, key, key_hung, &reply);
    }
    free(text);
    if (at->status != LOGLIN_OK) {
        reply.outcome = LOGLIN_OUTCOME_STOPPED;
    }
    return reply;
}

/*
 * A default that runs out of time gets twice as much, once: of a busy machine's slow compilation, much of which is cached
 * by then, no challenger is to win unopposed.
 */
static loglin_reply try_candidate(tuner *at, size_t candidate, const char *key, const loglin_request *request) {
    const double limit = at->options.candidate_limit;
    const loglin_reply reply = ask(at, key, request, limit);
    if (candidate > at->last_default || reply.outcome != LOGLIN_OUTCOME_FAILED || strcmp(reply.reason, "hung") != 0) {
        return reply;
    }
    char again[440];
    (void)snprintf(again, sizeof again, "%s again", key);
    return ask(at, again, request, 2 * limit);
}

static void tell_problem(tuner *at, const loglin_configuration *configuration) {
    at->event.problem = at->problems[0];
    at->event.problem.engine = configuration->engine;
    at->event.problem.chunk = configuration->values[LOGLIN_TUNABLE_CHUNK];
}

static loglin_request request_for(const tuner *at, loglin_request_kind kind, const loglin_problem *problem) {
    loglin_request request = {.kind = kind, .device = at->place, .problem = *problem};
    (void)snprintf(request.name, sizeof request.name, "%s", at->info.name);
    return request;
}

/* The candidate on one of the subject's problems. */
static loglin_reply measure_one(tuner *at, size_t candidate, const char *subject, const loglin_problem *problem,
                                unsigned round, unsigned runs) {
    char key[380];
    (void)snprintf(key, sizeof key, "%s: stage %u round %u of %u, op %d phases %u K %zu", subject, at->stage, round,
                   runs, (int)problem->op, problem->phases, problem->dim_k);
    loglin_request request = request_for(at, LOGLIN_REQUEST_TIME, problem);
    request.configuration = at->candidates.items[candidate];
    request.runs = runs;
    const loglin_reply reply = try_candidate(at, candidate, key, &request);
    if (reply.outcome == LOGLIN_OUTCOME_FAILED && strcmp(reply.reason, "refused") != 0) {
        remember_failure(at, subject, &reply);
    }
    return reply;
}

/* On all problems of the subject; in the first round of many candidates one problem has to do. */
static loglin_reply measure_all(tuner *at, size_t candidate, const char *subject, unsigned round, unsigned runs) {
    const size_t count = round == 0 && at->candidates.count > 2 ? 1 : at->problem_count;
    loglin_reply reply = {.outcome = LOGLIN_OUTCOME_OK};
    loglin_sample samples[MAX_SUBJECT_PROBLEMS] = {{.runs = 0}};
    for (size_t i = 0; i < count && reply.outcome == LOGLIN_OUTCOME_OK; i++) {
        reply = measure_one(at, candidate, subject, &at->problems[i], round, runs);
        samples[i] = reply.sample;
    }
    reply.sample = loglin_sample_mean(samples, count);
    return reply;
}

static loglin_outcome measure(void *context, size_t candidate, unsigned round, unsigned runs, loglin_sample *sample) {
    tuner *at = context;
    const loglin_configuration *configuration = &at->candidates.items[candidate];
    char text[LOGLIN_CANDIDATE_TEXT_SIZE], subject[264];
    loglin_candidate_text(configuration, text);
    (void)snprintf(subject, sizeof subject, "%s: %s", at->subject, text);
    loglin_reply reply = {.outcome = LOGLIN_OUTCOME_FAILED};
    const loglin_entry *failure = known_failure(at, subject);
    if (failure != NULL) {
        (void)snprintf(reply.reason, sizeof reply.reason, "%.15s", failure->reason);
        (void)snprintf(reply.detail, sizeof reply.detail, "%s when it was tried before", reply.reason);
    } else {
        reply = measure_all(at, candidate, subject, round, runs);
    }
    *sample = reply.sample;
    if (reply.outcome == LOGLIN_OUTCOME_FAILED) {
        (void)snprintf(at->failure, sizeof at->failure, "%s", reply.detail[0] != '\0' ? reply.detail : reply.reason);
    }
    if (reply.outcome != LOGLIN_OUTCOME_STOPPED) {
        at->event.candidate = text;
        at->event.outcome = reply.outcome == LOGLIN_OUTCOME_OK ? "ok" : reply.reason;
        at->event.detail = reply.detail;
        at->event.ms = sample->runs > 0 ? loglin_sample_time(sample) : 0;
        at->event.spread = sample->runs > 0 ? loglin_sample_spread(sample) : 0;
        tell_problem(at, configuration);
        const bool stop = tell(at) != 0;
        at->event.candidate = at->event.outcome = at->event.detail = NULL;
        if (stop) {
            return LOGLIN_OUTCOME_STOPPED;
        }
    }
    return reply.outcome;
}

static void advance(void *context, double share, size_t best, double ms) {
    tuner *at = context;
    at->event.share = at->share_before + share * at->share_of;
    loglin_candidate_text(&at->candidates.items[best], at->best);
    at->event.best = isfinite(ms) ? at->best : NULL;
    at->event.best_ms = isfinite(ms) ? ms : 0;
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
                          .configuration = at->candidates.items[result->winner],
                          .ms = result->ms,
                          .spread = result->spread,
                          .default_ms = result->first_ms,
                          .seed = (int64_t)at->options.seed,
                          .tuned_at = (int64_t)time(NULL)};
    if (kind == LOGLIN_ENTRY_CLASS) {
        loglin_problem filled;
        RETURN_IF_ERROR(loglin_problem_validate(&at->problems[0], &filled));
        entry.class = loglin_class_of(&filled);
    }
    return loglin_tuning_add(&at->results, &entry);
}

/* The subject is done: its choice is kept and told, or that there is none and why. */
static loglin_status finish(tuner *at, loglin_entry_kind kind, const loglin_search_result *result, bool *over) {
    const loglin_configuration *choice = &at->candidates.items[result->winner];
    if (result->found) {
        RETURN_IF_ERROR(add_result(at, kind, result));
        at->gemm = kind == LOGLIN_ENTRY_GEMM ? choice->gemm : at->gemm;
    }
    RETURN_IF_ERROR(keep(at));
    advance(at, 1, result->winner, result->found ? result->ms : INFINITY);
    at->event.detail = result->found ? NULL : at->failure;
    at->event.ms = result->found ? result->ms : 0;
    at->event.spread = result->found ? result->spread : 0;
    at->event.default_ms = result->first_ms;
    tell_problem(at, choice);
    at->event.finished = 1;
    *over = tell(at) != 0;
    at->event.finished = 0;
    return LOGLIN_OK;
}

/* Searches the candidates, as a stage of the subject. */
static loglin_search_result search_stage(tuner *at, unsigned stage, unsigned runs, bool sift) {
    const loglin_configuration *first = &at->candidates.items[0], *second = &at->candidates.items[1];
    const bool is_class = strcmp(at->subject, gemm_subject) != 0;
    /* CLBlast is set for a whole device: its own parameters are no choice for a class */
    const bool yardstick =
        is_class && at->candidates.count > 1 && memcmp(&first->gemm, &second->gemm, sizeof first->gemm) != 0;
    const loglin_search search = {.count = at->candidates.count,
                                  .seed = at->options.seed,
                                  .runs = runs,
                                  .one_round = at->options.quick != 0,
                                  .sift = sift,
                                  .yardstick = yardstick,
                                  .measure = measure,
                                  .advance = advance,
                                  .context = at};
    at->stage = stage;
    at->last_default = yardstick ? 1 : 0;
    at->event = (loglin_tune_event){.share = at->share_before};
    return loglin_search_run(&search);
}

/* Ends a subject; *over: no time is left, or the caller wishes so. */
static loglin_status conclude(tuner *at, loglin_entry_kind kind, const loglin_search_result *result, bool *over) {
    RETURN_IF_ERROR(at->status);
    *over = !result->complete;
    return result->complete ? finish(at, kind, result, over) : keep(at); /* keep: failures, which are remembered */
}

/* With as many heads as keep the device busy. */
static loglin_problem standard_problem(const tuner *at, loglin_op op, loglin_phase phase, size_t length) {
    const bool is_cpu = at->info.type == CL_DEVICE_TYPE_CPU;
    return (loglin_problem){.op = op,
                            .batch = is_cpu ? 1 : 4,
                            .length = length,
                            .heads = is_cpu ? 4 : 32,
                            .groups = 1,
                            .dim_k = 128,
                            .dim_v = 64,
                            .levels = loglin_num_levels(length),
                            .phases = phase};
}

/* Every head its own q and k. */
static loglin_problem apart_problem(const tuner *at, loglin_op op, loglin_phase phase) {
    loglin_problem problem = standard_problem(at, op, phase, 1024);
    problem.groups = problem.heads;
    problem.dim_k = 64;
    return problem;
}

static void tune_peak(tuner *at) {
    (void)snprintf(at->subject, sizeof at->subject, "peak");
    at->event = (loglin_tune_event){.share = 0};
    const loglin_request request = request_for(at, LOGLIN_REQUEST_PEAK, &(loglin_problem){.batch = 0});
    const loglin_reply reply = ask(at, "peak", &request, at->options.candidate_limit);
    if (reply.outcome == LOGLIN_OUTCOME_OK) {
        at->event.gflops = reply.gflops;
        at->event.gbytes = reply.gbytes;
        at->event.finished = 1;
        (void)tell(at);
    }
}

/* Classes that differ in their products, by which CLBlast's parameters are chosen: those that the device does not refuse. */
static void list_gemm_classes(tuner *at, unsigned runs) {
    const loglin_problem classes[MAX_SUBJECT_PROBLEMS] = {
        standard_problem(at, LOGLIN_MAMBA2, LOGLIN_FORWARD, 1024),
        standard_problem(at, LOGLIN_MAMBA2, LOGLIN_BACKWARD, 1024),
        standard_problem(at, LOGLIN_GATED_DELTA, LOGLIN_BACKWARD, 1024),
        apart_problem(at, LOGLIN_GATED_DELTA, LOGLIN_FORWARD)};
    at->candidates = (loglin_candidates){.items = {loglin_configuration_default(LOGLIN_ENGINE_BLAS)}, .count = 1};
    at->event = (loglin_tune_event){.share = at->share_before};
    at->last_default = 0;
    at->stage = 0;
    at->problem_count = 0;
    char text[LOGLIN_CANDIDATE_TEXT_SIZE], subject[264];
    loglin_candidate_text(&at->candidates.items[0], text);
    (void)snprintf(subject, sizeof subject, "%s: %s", at->subject, text);
    for (size_t i = 0; i < MAX_SUBJECT_PROBLEMS; i++) {
        const bool failed = known_failure(at, subject) != NULL; /* a refusal is none */
        const loglin_reply reply = failed ? (loglin_reply){.outcome = LOGLIN_OUTCOME_FAILED}
                                          : measure_one(at, 0, subject, &classes[i], 0, runs);
        if (reply.outcome != LOGLIN_OUTCOME_FAILED || strcmp(reply.reason, "refused") != 0) {
            at->problems[at->problem_count++] = classes[i];
        }
    }
    if (at->problem_count == 0) { /* so it is told why there is no choice */
        at->problems[at->problem_count++] = classes[0];
    }
}

/*
 * CLBlast's parameters hold for the whole device, so they are chosen by several classes together, in the geometric mean; in
 * each of these CLBlast's own then challenge the choice, and if they win there, they win: nowhere is a choice to be slower.
 */
static loglin_status tune_gemm(tuner *at, double share, bool *over) {
    const unsigned runs = 3;
    const loglin_gemm_parameters built_in = loglin_tuning_gemm(NULL, &at->info);
    (void)snprintf(at->subject, sizeof at->subject, "%s", gemm_subject);
    at->share_before = 0;
    at->share_of = 0.75 * share;
    list_gemm_classes(at, runs);
    loglin_candidates_of_gemm(&at->info, &built_in, &at->known, at->options.seed, &at->candidates);
    loglin_search_result result = search_stage(at, 1, runs, false);
    const loglin_configuration own = at->candidates.items[0], choice = at->candidates.items[result.winner];
    const loglin_problem first = at->problems[0];
    const size_t count = at->problem_count;
    bool is_own = result.winner == 0;
    at->candidates = (loglin_candidates){.items = {choice, own}, .count = 2};
    at->problem_count = 1;
    for (unsigned i = 0; i < count && result.complete && !is_own; i++) {
        at->problems[0] = at->problems[i];
        at->share_before += at->share_of;
        at->share_of = 0.06 * share;
        const loglin_search_result other = search_stage(at, 2 + i, runs, false);
        result.complete = other.complete;
        is_own = other.winner == 1 && result.first_ms > 0;
    }
    at->problems[0] = first;
    at->share_before = share;
    at->share_of = 0;
    result.ms = is_own ? result.first_ms : result.ms;
    result.spread = is_own ? result.first_spread : result.spread;
    result.winner = is_own ? 1 : 0;
    return conclude(at, LOGLIN_ENTRY_GEMM, &result, over);
}

/* Were CLBlast's parameters tuned before, by this version on this driver? */
static bool has_gemm(const tuner *at) {
    for (size_t i = 0; i < at->known.count; i++) {
        const loglin_entry *entry = &at->known.entries[i];
        if (entry->kind == LOGLIN_ENTRY_GEMM && memcmp(&entry->stamp, &at->stamp, sizeof at->stamp) == 0) {
            return true;
        }
    }
    return false;
}

static size_t list_standard(const tuner *at, loglin_problem problems[MAX_PROBLEMS]) {
    static const size_t lengths[] = {1024, 4096, 16384};
    const size_t length_count = at->options.quick != 0 ? 1 : sizeof lengths / sizeof lengths[0];
    const bool is_cpu = at->info.type == CL_DEVICE_TYPE_CPU;
    const loglin_dtype dtypes[] = {is_cpu ? LOGLIN_F32 : LOGLIN_BF16, LOGLIN_F32}; /* GPUs have units for 16 bits */
    size_t count = 0;
    for (int dtype = 0; dtype < (is_cpu ? 1 : 2); dtype++) {
        for (size_t i = 0; i < length_count; i++) {
            for (int which = 0; which < 4; which++) {
                problems[count] = standard_problem(at, which % 2 != 0 ? LOGLIN_GATED_DELTA : LOGLIN_MAMBA2,
                                                   which / 2 != 0 ? LOGLIN_BACKWARD : LOGLIN_FORWARD, lengths[i]);
                problems[count++].dtype = dtypes[dtype];
            }
        }
    }
    for (int which = 0; which < 4 && at->options.quick == 0; which++) {
        problems[count++] = apart_problem(at, which % 2 != 0 ? LOGLIN_GATED_DELTA : LOGLIN_MAMBA2,
                                          which / 2 != 0 ? LOGLIN_BACKWARD : LOGLIN_FORWARD);
    }
    return count;
}

static const loglin_engine engines[] = {LOGLIN_ENGINE_BLAS, LOGLIN_ENGINE_FUSED};

enum { ENGINE_COUNT = sizeof engines / sizeof engines[0] };

/* In a quick run on a CPU blas must be asked for: CLBlast compiles for minutes, and is many times slower than fused. */
static bool is_searched(const tuner *at, const loglin_problem *problem, loglin_engine engine) {
    const bool is_brief = at->options.quick != 0 && at->info.type == CL_DEVICE_TYPE_CPU;
    const loglin_engine asked = problem->engine != LOGLIN_ENGINE_AUTO ? problem->engine : at->options.engine;
    const bool fits = at->options.engine == LOGLIN_ENGINE_AUTO || at->options.engine == engine;
    return fits && (asked == engine || (asked == LOGLIN_ENGINE_AUTO && !(is_brief && engine == LOGLIN_ENGINE_BLAS)));
}

/* A guess at a search's time, for the share that it is of all. */
static double cost_of(const loglin_problem *problem, loglin_engine engine) {
    return (1 + (double)problem->length / 2048) * ((problem->phases & LOGLIN_BACKWARD) != 0 ? 3 : 1) *
           (engine == LOGLIN_ENGINE_BLAS ? 4 : 1);
}

static double cost_of_all(const tuner *at, const loglin_problem *problems, size_t count) {
    double cost = 0;
    for (size_t i = 0; i < count * ENGINE_COUNT; i++) {
        const loglin_problem *problem = &problems[i / ENGINE_COUNT];
        const loglin_engine engine = engines[i % ENGINE_COUNT];
        cost += is_searched(at, problem, engine) ? cost_of(problem, engine) : 0;
    }
    return cost;
}

/* An engine's chunk size for a class, and then its other values: they depend little on each other. */
static loglin_status tune_class(tuner *at, loglin_engine engine, const loglin_class *class, bool *over) {
    const bool quick = at->options.quick != 0;
    const unsigned runs = 2;
    at->share_of /= 2;
    loglin_candidates_of_engine(engine, &at->gemm, quick, &at->candidates);
    loglin_search_result result = search_stage(at, 1, runs, true);
    at->share_before += at->share_of;
    if (result.found && result.complete && at->status == LOGLIN_OK) {
        const loglin_configuration best = at->candidates.items[result.winner];
        loglin_candidates_near(&best, at->info.type, (loglin_phase)at->problems[0].phases, quick, &at->candidates);
        loglin_candidates_of_class(&at->known, class, &best, &at->candidates);
        result = search_stage(at, 2, runs, false);
    }
    return conclude(at, LOGLIN_ENTRY_CLASS, &result, over);
}

/* The best values of each engine for each class; `share` of all work is done. */
static loglin_status tune_classes(tuner *at, const loglin_problem *problems, size_t count, double share, bool *over) {
    const double rest = 1 - share, whole = cost_of_all(at, problems, count);
    for (size_t i = 0; i < count * ENGINE_COUNT && !*over; i++) {
        const loglin_engine engine = engines[i % ENGINE_COUNT];
        loglin_problem filled;
        at->problems[0] = problems[i / ENGINE_COUNT];
        at->problem_count = 1;
        if (!is_searched(at, &at->problems[0], engine)) {
            continue;
        }
        RETURN_IF_ERROR(loglin_problem_validate(&at->problems[0], &filled));
        const loglin_class class = loglin_class_of(&filled);
        loglin_class_name(&class, at->subject, sizeof at->subject);
        at->share_before = share;
        at->share_of = rest * cost_of(&at->problems[0], engine) / whole;
        share += at->share_of;
        RETURN_IF_ERROR(tune_class(at, engine, &class, over));
    }
    return LOGLIN_OK;
}

static bool uses_blas(const tuner *at, const loglin_problem *problems, size_t count) {
    for (size_t i = 0; i < count; i++) {
        if (is_searched(at, &problems[i], LOGLIN_ENGINE_BLAS)) {
            return true;
        }
    }
    return false;
}

static loglin_status run(tuner *at, const loglin_problem *problems, size_t count) {
    const bool keeps_gemm = at->options.quick != 0 || (at->options.problems != NULL && has_gemm(at));
    const double share = !keeps_gemm && uses_blas(at, problems, count) ? 0.3 : 0;
    bool over = false;
    tune_peak(at);
    RETURN_IF_ERROR(at->status);
    if (share > 0) {
        RETURN_IF_ERROR(tune_gemm(at, share, &over));
    }
    if (!over) {
        RETURN_IF_ERROR(tune_classes(at, problems, count, share, &over));
    }
    if (!over) {
        at->event = (loglin_tune_event){.share = 1, .complete = 1};
        (void)tell(at);
    }
    return LOGLIN_OK;
}

/* ---- The interface ----------------------------------------------------------------------------------------------- */

/* The device, and how many of its name come before it. */
static loglin_status find_device(cl_device_id id, size_t *place, loglin_device_info *info) {
    enum { MOST = 64 };
    loglin_device_info infos[MOST];
    size_t count = 0, at = 0;
    RETURN_IF_ERROR(loglin_list_devices(infos, MOST, &count));
    count = count < MOST ? count : MOST;
    while (at < count && infos[at].id != id) {
        at++;
    }
    if (at == count) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "id is not a device that loglin_list_devices lists");
    }
    *info = infos[at];
    *place = 0;
    for (size_t i = 0; i < at; i++) {
        *place += strcmp(infos[i].name, info->name) == 0;
    }
    return LOGLIN_OK;
}

static loglin_status require_cache(char **cache) {
    *cache = loglin_cache_directory();
    return *cache != NULL
               ? LOGLIN_OK
               : loglin_fail(LOGLIN_IO, "LOGLIN_CACHE_DIR is empty, or there is no home: expected a place for results");
}

/* The journal is of one kind of run: device, versions, problems, and what is done about them. */
static loglin_status open_journal(tuner *at, const loglin_problem *problems, size_t count) {
    XXH64_hash_t hash = 0;
    for (size_t i = 0; i < count; i++) {
        const loglin_request request = {.problem = problems[i], .configuration = {.engine = problems[i].engine}};
        char *text = loglin_request_print(&request);
        hash = text != NULL ? XXH3_64bits_withSeed(text, strlen(text), hash) : 0;
        free(text);
    }
    char settings[640];
    (void)snprintf(settings, sizeof settings, "%s %s %s %s quick %d engine %d problems %016llx", at->info.name,
                   at->stamp.driver, at->stamp.library, at->stamp.source, at->options.quick != 0,
                   (int)at->options.engine, (unsigned long long)hash);
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
    at->gemm = loglin_tuning_gemm(at->cache, &at->info);
    return LOGLIN_OK;
}

static loglin_status prepare_and_run(tuner *at, cl_device_id id) {
    loglin_problem standard[MAX_PROBLEMS];
    const loglin_problem *problems = at->options.problems;
    size_t count = at->options.problem_count;
    RETURN_IF_ERROR(find_device(id, &at->place, &at->info));
    RETURN_IF_ERROR(prepare(at));
    if (problems == NULL) {
        count = list_standard(at, standard);
        problems = standard;
    }
    RETURN_IF_ERROR(open_journal(at, problems, count));
    return run(at, problems, count);
}

static loglin_status check_seconds(const char *name, double seconds) {
    if (!isfinite(seconds) || seconds < 0) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "options.%s is %g, expected a finite number, 0 or more", name,
                           seconds);
    }
    return LOGLIN_OK;
}

static loglin_status check_options(const loglin_tune_options *options) {
    RETURN_IF_ERROR(check_seconds("time_limit", options->time_limit));
    RETURN_IF_ERROR(check_seconds("candidate_limit", options->candidate_limit));
    if ((int)options->engine < 0 || options->engine > LOGLIN_ENGINE_FUSED) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "options.engine is %d, expected 0 to %d", (int)options->engine,
                           (int)LOGLIN_ENGINE_FUSED);
    }
    if ((options->problems != NULL) != (options->problem_count > 0)) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "options.problems is %s with problem_count %zu",
                           options->problems != NULL ? "given" : "NULL", options->problem_count);
    }
    for (size_t i = 0; i < options->problem_count; i++) {
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
    loglin_status status = check_options(&at->options);
    at->options.candidate_limit = at->options.candidate_limit > 0 ? at->options.candidate_limit : usual_limit;
    at->options.time_limit =
        at->options.quick != 0 && at->options.time_limit <= 0 ? quick_limit : at->options.time_limit;
    at->begin = now();
    status = status != LOGLIN_OK ? status : prepare_and_run(at, id);
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
