/* SPDX-License-Identifier: Apache-2.0 */
/* The tuner's search on a synthetic device, and the journal that lets an interrupted one go on. */
#include "plan/journal.h"
#include "plan/search.h"
#include "support.h"
#include "support_tuning.h"

#include <criterion/criterion.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- The search on a synthetic device --------------------------------------------------------------------------- */

enum { MOST = 64 };

/* Candidates with true times, noise, and some that fail. */
typedef struct synthetic {
    double ms[MOST], noise; /* noise: the standard deviation, as a share */
    double drift;           /* how much slower each measurement is than the one before, as a share */
    double bursts;          /* how many of the runs take twice their time, as a share */
    bool fails[MOST];
    size_t calls[MOST], total, stop_after; /* stop_after 0: never */
    support_random random;
    loglin_journal *journal; /* may be NULL */
} synthetic;

static loglin_outcome simulate(void *context, size_t candidate, unsigned round, unsigned runs, loglin_sample *sample) {
    synthetic *device = context;
    char key[64];
    loglin_reply reply = {.outcome = LOGLIN_OUTCOME_FAILED, .reason = "hung"};
    snprintf(key, sizeof key, "%zu round %u of %u", candidate, round, runs);
    if (device->journal != NULL && loglin_journal_find(device->journal, key, &reply)) {
        *sample = reply.sample;
        return reply.outcome;
    }
    if (device->stop_after > 0 && device->total == device->stop_after) {
        return LOGLIN_OUTCOME_STOPPED;
    }
    if (device->journal != NULL && loglin_journal_begin(device->journal, key) != LOGLIN_OK) {
        return LOGLIN_OUTCOME_STOPPED;
    }
    device->calls[candidate]++;
    device->total++;
    if (!device->fails[candidate]) {
        reply = (loglin_reply){.outcome = LOGLIN_OUTCOME_OK, .sample = {.runs = runs}};
        for (unsigned i = 0; i < runs; i++) {
            reply.sample.ms[i] = device->ms[candidate] * (1 + device->noise * fabs(support_normal(&device->random))) *
                                 (1 + device->drift * (double)device->total) *
                                 (support_uniform(&device->random) < device->bursts ? 2 : 1);
        }
    }
    if (device->journal != NULL && loglin_journal_end(device->journal, key, &reply) != LOGLIN_OK) {
        return LOGLIN_OUTCOME_STOPPED;
    }
    *sample = reply.sample;
    return reply.outcome;
}

static loglin_search_result search(synthetic *device, size_t count, uint64_t seed) {
    const loglin_search what = {.count = count, .seed = seed, .runs = 3, .measure = simulate, .context = device};
    return loglin_search_run(&what);
}

/* Times from 10 to 30, the optimum at 6, noise of 5 %. */
static synthetic plant(size_t count, size_t optimum, uint64_t seed) {
    synthetic device = {.noise = 0.05, .random = {seed}};
    for (size_t i = 0; i < count; i++) {
        device.ms[i] = 10 + 20 * support_uniform(&device.random);
    }
    device.ms[0] = 15;
    device.ms[optimum] = 6;
    return device;
}

Test(search, finds_a_planted_optimum_under_noise) {
    for (uint64_t seed = 1; seed <= 50; seed++) {
        const size_t optimum = 1 + (size_t)seed % 39;
        synthetic device = plant(40, optimum, seed);
        const loglin_search_result result = search(&device, 40, seed);
        cr_expect(result.found && result.complete);
        cr_expect_eq(result.winner, optimum, "seed %d: %zu has won, expected %zu", (int)seed, result.winner, optimum);
        cr_expect(result.ms >= 6 && result.ms < 7.5 && result.first_ms >= 15 && result.first_ms < 18);
        cr_expect_lt(device.total, 40u * 3u, "%zu measurements: the search is exhaustive", device.total);
    }
}

/* A yardstick is never chosen, not even as the fastest, and is what the winner is compared with. */
Test(search, a_yardstick_only_measures) {
    for (uint64_t seed = 1; seed <= 20; seed++) {
        synthetic device = plant(20, 7, seed);
        device.ms[0] = 1;
        device.ms[1] = 15;
        loglin_search what = {
            .count = 20, .seed = seed, .runs = 3, .yardstick = true, .measure = simulate, .context = &device};
        loglin_search_result result = loglin_search_run(&what);
        cr_expect(result.complete && result.winner == 7 && result.first_ms < 1.5, "%zu has won", result.winner);
        device.ms[1] = 3;
        result = loglin_search_run(&what);
        cr_expect(result.winner == 1 && result.ms < 4 && result.first_ms < 1.5, "%zu has won", result.winner);
        what.count = 2;
        cr_expect_eq(loglin_search_run(&what).winner, 1u);
    }
}

/* Candidates that differ by nothing but noise must not unseat the first. */
Test(search, noise_alone_does_not_win) {
    size_t lost = 0;
    for (uint64_t seed = 1; seed <= 200; seed++) {
        synthetic device = {.noise = 0.1, .random = {seed}};
        for (size_t i = 0; i < 20; i++) {
            device.ms[i] = 10;
        }
        lost += search(&device, 20, seed).winner != 0;
    }
    cr_expect_leq(lost, 20u, "noise has won %zu times of 200", lost);
}

/* On a device that grows slower or faster, the order of the measurements decides nothing. */
Test(search, drift_alone_does_not_win_or_lose) {
    for (int faster = 0; faster < 2; faster++) {
        synthetic device = {.drift = faster != 0 ? -0.02 : 0.02, .ms = {10, 10}};
        cr_expect_eq(search(&device, 2, 1).winner, 0u, "drift has won");
        device.total = 0;
        device.ms[1] = 8;
        cr_expect_eq(search(&device, 2, 1).winner, 1u, "drift has hidden the faster one");
    }
}

/* Another program takes a core for a while, so that some of the runs take twice their time: the faster one is found still. */
Test(search, bursts_hide_nothing) {
    size_t found = 0;
    for (uint64_t seed = 1; seed <= 50; seed++) {
        synthetic device = {.ms = {10, 7}, .noise = 0.02, .bursts = 0.35, .random = {seed}};
        found += search(&device, 2, seed).winner == 1;
    }
    cr_expect_geq(found, 40u, "found %zu times of 50", found);
}

/* A challenger alone gets its duel, whatever a first look at it would have been. */
Test(search, a_lone_challenger_gets_its_duel) {
    synthetic device = {.ms = {10, 8}};
    const loglin_search_result result = search(&device, 2, 1);
    cr_expect(result.winner == 1 && result.first_ms == 10 && result.ms == 8);
    cr_expect(device.calls[0] == 2 && device.calls[1] == 2, "%zu and %zu measurements", device.calls[0],
              device.calls[1]);
}

Test(search, what_fails_is_measured_once_and_never_wins) {
    for (uint64_t seed = 1; seed <= 20; seed++) {
        synthetic device = plant(30, 7, seed);
        for (size_t i = 8; i < 20; i++) {
            device.ms[i] = 0.001; /* fast because it is wrong, or hung */
            device.fails[i] = true;
        }
        const loglin_search_result result = search(&device, 30, seed);
        cr_expect_eq(result.winner, 7u);
        for (size_t i = 8; i < 20; i++) {
            cr_expect_eq(device.calls[i], 1u, "candidate %zu was tried %zu times", i, device.calls[i]);
        }
    }
}

Test(search, survives_a_first_candidate_that_fails_and_a_device_where_all_do) {
    synthetic device = plant(10, 3, 1);
    device.fails[0] = true;
    loglin_search_result result = search(&device, 10, 1);
    cr_expect(result.found && result.winner == 3);
    for (size_t i = 0; i < 10; i++) {
        device.fails[i] = true;
    }
    result = search(&device, 10, 1);
    cr_expect_not(result.found);
}

Test(search, stops_wherever_it_is_told_to) {
    synthetic whole = plant(12, 5, 1);
    (void)search(&whole, 12, 1);
    for (size_t stop = 1; stop < whole.total; stop++) {
        synthetic device = plant(12, 5, 1);
        device.stop_after = stop;
        const loglin_search_result result = search(&device, 12, 1);
        cr_expect_not(result.complete, "stopped after %zu of %zu, and called complete", stop, whole.total);
        cr_expect_eq(device.total, stop);
    }
}

Test(search, one_seed_gives_one_search) {
    synthetic a = plant(20, 5, 3), b = plant(20, 5, 3);
    const loglin_search_result first = search(&a, 20, 9), second = search(&b, 20, 9);
    cr_expect_eq(memcmp(a.calls, b.calls, sizeof a.calls), 0);
    cr_expect(first.winner == second.winner && first.ms == second.ms);
}

/* ---- The journal ------------------------------------------------------------------------------------------------ */

TestSuite(journal, .init = support_make_cache, .fini = support_remove_cache);

static loglin_journal *open_journal(bool resume, uint64_t *seed) {
    char path[96];
    snprintf(path, sizeof path, "%s/journal", support_cache);
    loglin_journal *journal = NULL;
    cr_assert_eq(loglin_journal_open(path, resume, "settings", seed, &journal), LOGLIN_OK, "%s", loglin_last_error());
    return journal;
}

/* A search in a child that is killed when its journal has reached a size; true if it came to its end. */
static bool search_limited(rlim_t limit) {
    const pid_t child = fork();
    if (child == 0) {
        const struct rlimit size = {limit, limit};
        (void)signal(SIGXFSZ, SIG_DFL);
        uint64_t seed = 5;
        synthetic device = plant(9, 4, 2);
        device.journal = open_journal(false, &seed);
        (void)setrlimit(RLIMIT_FSIZE, &size);
        _exit(search(&device, 9, seed).winner == 4 ? 0 : 1);
    }
    int status;
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_assert(WIFSIGNALED(status) || WEXITSTATUS(status) == 0);
    return WIFEXITED(status);
}

/* Lines of finished measurements in the journal. */
static size_t count_ends(void) {
    char path[96], line[1024];
    snprintf(path, sizeof path, "%s/journal", support_cache);
    FILE *stream = fopen(path, "r");
    size_t count = 0;
    while (fgets(line, sizeof line, stream) != NULL) {
        count += strncmp(line, "{\"end\"", 6) == 0 && line[strlen(line) - 1] == '\n';
    }
    fclose(stream);
    return count;
}

/* Killed at any write, a run that goes on repeats at most the measurement that it was at. */
Test(journal, an_interrupted_search_loses_only_what_it_was_at) {
    synthetic whole = plant(9, 4, 2);
    (void)search(&whole, 9, 5);
    bool ended = false;
    for (rlim_t limit = 100; limit < 20000 && !ended; limit += 97) {
        ended = search_limited(limit);
        const size_t known = count_ends();
        uint64_t seed = 77; /* the journal knows better */
        synthetic device = plant(9, 4, 2);
        device.journal = open_journal(true, &seed);
        const loglin_search_result result = search(&device, 9, seed);
        loglin_journal_close(device.journal);
        cr_expect_eq(seed, 5u);
        cr_expect_eq(result.winner, 4u);
        cr_expect_eq(device.total, whole.total - known, "limit %d: %zu measured, %zu known of %zu", (int)limit,
                     device.total, known, whole.total);
    }
    cr_expect(ended);
}

Test(journal, what_takes_the_tuner_down_twice_is_not_tried_again) {
    uint64_t seed = 1;
    loglin_reply reply;
    for (int attempt = 0; attempt < 2; attempt++) {
        loglin_journal *journal = open_journal(true, &seed);
        cr_expect_not(loglin_journal_find(journal, "hangs", &reply));
        cr_expect_eq(loglin_journal_begin(journal, "hangs"), LOGLIN_OK);
        loglin_journal_close(journal);
    }
    loglin_journal *journal = open_journal(true, &seed);
    cr_expect(loglin_journal_find(journal, "hangs", &reply));
    cr_expect(reply.outcome == LOGLIN_OUTCOME_FAILED && strcmp(reply.reason, "crashed") == 0, "%s", reply.reason);
    cr_expect_not(loglin_journal_find(journal, "others", &reply));
    loglin_journal_close(journal);
}
