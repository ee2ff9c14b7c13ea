/* SPDX-License-Identifier: Apache-2.0 */
#include "plan/search.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const size_t kept_share = 3; /* of how many candidates one stays */

uint64_t loglin_search_random(uint64_t *state) {
    uint64_t x = (*state += 0x9e3779b97f4a7c15u);
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* ---- Samples ----------------------------------------------------------------------------------------------------- */

static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The value below which a share of the sample lies. */
static double quantile(const loglin_sample *sample, double share) {
    double sorted[LOGLIN_SEARCH_MAX_RUNS];
    if (sample->runs == 0) {
        return INFINITY;
    }
    memcpy(sorted, sample->ms, sample->runs * sizeof sorted[0]);
    qsort(sorted, sample->runs, sizeof sorted[0], ascending);
    const double at = share * (double)(sample->runs - 1);
    const size_t low = (size_t)at, high = low + 1 < sample->runs ? low + 1 : low;
    return sorted[low] + (at - (double)low) * (sorted[high] - sorted[low]);
}

double loglin_sample_time(const loglin_sample *sample) {
    return quantile(sample, 0.25);
}

double loglin_sample_spread(const loglin_sample *sample) {
    return quantile(sample, 0.25) - quantile(sample, 0);
}

loglin_sample loglin_sample_mean(const loglin_sample *samples, size_t count) {
    loglin_sample mean = {.runs = samples[0].runs};
    for (size_t n = 0; n < count; n++) {
        mean.runs = samples[n].runs < mean.runs ? samples[n].runs : mean.runs;
    }
    for (unsigned i = 0; i < mean.runs; i++) {
        mean.ms[i] = 1;
    }
    for (size_t n = 0; n < count; n++) {
        loglin_sample sorted = samples[n];
        qsort(sorted.ms, sorted.runs, sizeof sorted.ms[0], ascending);
        for (unsigned i = 0; i < mean.runs; i++) {
            mean.ms[i] *= pow(sorted.ms[i], 1 / (double)count);
        }
    }
    return mean;
}

/* ---- Rounds ------------------------------------------------------------------------------------------------------ */

/* A candidate in a round. */
typedef struct runner {
    size_t candidate;
    double ms;
} runner;

typedef struct race {
    const loglin_search *search;
    runner *runners;
    size_t count; /* of those still in it */
    unsigned round;
    size_t measured, expected; /* measurements, for the share that is done */
    runner best;
    bool rival_failed, stopped;
} race;

/* The one to beat. */
static size_t rival_of(const loglin_search *search) {
    return search->yardstick ? 1 : 0;
}

static int faster(const void *a, const void *b) {
    return ascending(&((const runner *)a)->ms, &((const runner *)b)->ms);
}

static loglin_outcome measure(race *at, size_t candidate, unsigned runs, loglin_sample *sample) {
    const loglin_search *search = at->search;
    const unsigned allowed = runs < LOGLIN_SEARCH_MAX_RUNS ? runs : LOGLIN_SEARCH_MAX_RUNS;
    *sample = (loglin_sample){.runs = 0};
    const loglin_outcome outcome = search->measure(search->context, candidate, at->round, allowed, sample);
    at->measured++;
    at->stopped = at->stopped || outcome == LOGLIN_OUTCOME_STOPPED;
    at->rival_failed = at->rival_failed || (candidate == rival_of(search) && outcome == LOGLIN_OUTCOME_FAILED);
    if (outcome == LOGLIN_OUTCOME_OK && loglin_sample_time(sample) < at->best.ms) {
        at->best = (runner){.candidate = candidate, .ms = loglin_sample_time(sample)};
    }
    if (search->advance != NULL) {
        const double share = at->measured < at->expected ? (double)at->measured / (double)at->expected : 1.0;
        search->advance(search->context, share, at->best.candidate, at->best.ms);
    }
    return outcome;
}

static void shuffle(race *at, uint64_t *random) {
    for (size_t i = at->count; i > 1; i--) {
        const size_t j = (size_t)(loglin_search_random(random) % i);
        const runner moved = at->runners[i - 1];
        at->runners[i - 1] = at->runners[j];
        at->runners[j] = moved;
    }
}

/* Measures all that are in the race, sorts them, and drops those that failed. */
static void run_round(race *at, unsigned runs) {
    size_t good = 0;
    at->best.ms = INFINITY;
    for (size_t i = 0; i < at->count && !at->stopped; i++) {
        loglin_sample sample;
        runner entered = at->runners[i];
        if (measure(at, entered.candidate, runs, &sample) == LOGLIN_OUTCOME_OK) {
            entered.ms = loglin_sample_time(&sample);
            at->runners[good++] = entered;
        }
    }
    at->count = good;
    qsort(at->runners, good, sizeof at->runners[0], faster);
    at->round++;
}

static size_t kept_of(size_t count) {
    return (count + kept_share - 1) / kept_share;
}

/* Rounds until one candidate is left. */
static void halve(race *at) {
    unsigned runs = at->search->runs;
    uint64_t random = at->search->seed;
    while (at->count > 1 && !at->stopped) {
        shuffle(at, &random);
        run_round(at, runs);
        if (at->search->one_round) {
            return;
        }
        at->count = at->count > 0 ? kept_of(at->count) : 0;
        runs *= 2;
    }
}

/* Those that run in the rounds.  Before a duel the one to beat need not: it is in the duel in any case. */
static size_t first_runner(const loglin_search *search) {
    return search->sift ? rival_of(search) : rival_of(search) + 1;
}

static size_t expected_measurements(const loglin_search *search) {
    size_t left = search->count - first_runner(search), expected = search->sift ? 0 : search->yardstick ? 6 : 4;
    while (left > 1) {
        expected += left;
        left = search->one_round ? 1 : kept_of(left);
    }
    return expected;
}

/* ---- The duels --------------------------------------------------------------------------------------------------- */

static void append(loglin_sample *all, const loglin_sample *more) {
    for (unsigned i = 0; i < more->runs && all->runs < LOGLIN_SEARCH_MAX_RUNS; i++) {
        all->ms[all->runs++] = more->ms[i];
    }
}

enum { YARDSTICK, RIVAL, CHALLENGER, CONTESTANTS };

/*
 * One duel with the rival, the one that is chosen if nobody beats it; true if the challenger has won.  The second duel goes
 * backwards, so that a device that grows slower or faster favours nobody; who has lost the first is not in it.
 */
static bool fight(race *at, size_t challenger, bool backwards, loglin_sample all[CONTESTANTS]) {
    const size_t candidates[CONTESTANTS] = {0, rival_of(at->search), challenger};
    const unsigned runs =
        2 * at->search->runs < LOGLIN_SEARCH_MAX_RUNS / 2 ? 2 * at->search->runs + 1 : LOGLIN_SEARCH_MAX_RUNS / 2;
    loglin_sample now[CONTESTANTS] = {{.runs = 0}};
    for (int i = 0; i < CONTESTANTS && !at->stopped; i++) {
        const int which = backwards ? CONTESTANTS - 1 - i : i;
        const bool absent = which == YARDSTICK ? !at->search->yardstick
                            : which == RIVAL   ? at->rival_failed
                                               : challenger == candidates[RIVAL];
        if (!absent) {
            (void)measure(at, candidates[which], runs, &now[which]);
            append(&all[which], &now[which]);
        }
    }
    at->round++;
    const double spread = fmax(loglin_sample_spread(&now[RIVAL]), loglin_sample_spread(&now[CHALLENGER]));
    return loglin_sample_time(&now[CHALLENGER]) + spread < loglin_sample_time(&now[RIVAL]);
}

static void settle(race *at, loglin_search_result *result) {
    loglin_sample all[CONTESTANTS] = {{.runs = 0}};
    at->best.ms = INFINITY;
    const size_t rival = rival_of(at->search), challenger = at->count > 0 ? at->runners[0].candidate : rival;
    bool won = fight(at, challenger, false, all);
    won = fight(at, won ? challenger : rival, true, all) && won;
    const loglin_sample *winner = &all[won ? CHALLENGER : RIVAL];
    const loglin_sample *first = &all[at->search->yardstick ? YARDSTICK : RIVAL];
    result->winner = won ? challenger : rival;
    result->found = winner->runs > 0 && !at->stopped;
    result->ms = loglin_sample_time(winner);
    result->spread = loglin_sample_spread(winner);
    result->first_ms = first->runs > 0 ? loglin_sample_time(first) : 0;
    result->first_spread = first->runs > 0 ? loglin_sample_spread(first) : 0;
}

loglin_search_result loglin_search_run(const loglin_search *search) {
    loglin_search_result result = {.found = false};
    const size_t first = first_runner(search);
    race at = {.search = search,
               .runners = calloc(search->count, sizeof(runner)),
               .count = search->count - first,
               .expected = expected_measurements(search),
               .best = {.ms = INFINITY}};
    if (at.runners == NULL) {
        return result;
    }
    for (size_t i = 0; i < at.count; i++) {
        at.runners[i].candidate = i + first;
    }
    halve(&at);
    if (!at.stopped && !search->sift) {
        settle(&at, &result);
    } else if (!at.stopped && at.count > 0) {
        result.found = true;
        result.winner = at.runners[0].candidate;
        result.ms = at.runners[0].ms;
    }
    result.complete = !at.stopped;
    free(at.runners);
    return result;
}
