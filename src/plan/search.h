/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The search for the fastest candidate, whatever a candidate is: successive halving.  All challengers are measured a few
 * times, the faster third of them again with twice as many runs, and so on.  The last one then meets candidate 0, the one
 * to beat, in two duels, and must win both by more than the spread that was measured.  Candidate 0 may be a mere
 * yardstick, which cannot be chosen but is measured with the duels: then candidate 1 is the one to beat.
 */
#ifndef LOGLIN_PLAN_SEARCH_H
#define LOGLIN_PLAN_SEARCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum loglin_outcome {
    LOGLIN_OUTCOME_OK,
    LOGLIN_OUTCOME_FAILED,  /* refused, wrong, crashed, hung: never tried again */
    LOGLIN_OUTCOME_STOPPED, /* the search must end: its time is up, or so the caller wishes */
} loglin_outcome;

enum { LOGLIN_SEARCH_MAX_RUNS = 16 };

/* Times of a candidate's runs. */
typedef struct loglin_sample {
    double ms[LOGLIN_SEARCH_MAX_RUNS];
    unsigned runs;
} loglin_sample;

typedef struct loglin_search {
    size_t count;   /* of candidates, at least 1 */
    uint64_t seed;  /* of the order in which they are measured */
    unsigned runs;  /* of the first round, at least 1 */
    bool one_round; /* the first round chooses the challenger */
    bool sift;      /* there are no duels: the fastest is the winner */
    bool yardstick; /* candidate 0 is one; there is a candidate 1 */
    /* Runs a candidate so many times.  `round` tells measurements of one candidate apart. */
    loglin_outcome (*measure)(void *context, size_t candidate, unsigned round, unsigned runs, loglin_sample *sample);
    /* A share of the search is done, 0 to 1; `best` is the fastest of the round so far.  May be NULL. */
    void (*advance)(void *context, double share, size_t best, double ms);
    void *context;
} loglin_search;

typedef struct loglin_search_result {
    bool found;        /* false: all failed, or there was no time */
    bool complete;     /* false: the search was stopped */
    size_t winner;     /* candidate 0 (1 with a yardstick) unless a challenger has won */
    double ms, spread; /* the winner's time and spread, by its samples in the duels */
    double first_ms;   /* candidate 0's time in the duels; 0 if it failed or there were none */
    double first_spread;
} loglin_search_result;

loglin_search_result loglin_search_run(const loglin_search *search);

/*
 * The lower quartile of a sample, for what disturbs a run only ever slows it down, by a factor of two where another program
 * takes a core; and its distance to the least.
 */
double loglin_sample_time(const loglin_sample *sample);
double loglin_sample_spread(const loglin_sample *sample);

/* The geometric mean of some samples, at least one: of their least times, of the next ones, and so on. */
loglin_sample loglin_sample_mean(const loglin_sample *samples, size_t count);

/* The next number of a sequence that the state fixes. */
uint64_t loglin_search_random(uint64_t *state);

#endif
