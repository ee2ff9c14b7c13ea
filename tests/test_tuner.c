/* SPDX-License-Identifier: Apache-2.0 */
/* The whole tuner with a worker that is a script: a device whose times, and whose failures, the test knows. */
#include "plan/candidates.h"
#include "plan/problem.h"
#include "plan/tuning.h"
#include "support.h"
#include "support_tuning.h"

#include <criterion/criterion.h>
#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* ---- The worker -------------------------------------------------------------------------------------------------- */

static char worker[96], log_path[96];

static void make_places(void) {
    support_make_cache();
    snprintf(worker, sizeof worker, "%s/worker", support_cache);
    snprintf(log_path, sizeof log_path, "%s/asked", support_cache);
}

TestSuite(tuner, .init = make_places, .fini = support_remove_cache);

/*
 * Cases of a request's text, as the shell matches them, with what happens: "answer MS", "wrong", "refused", or any
 * command.  Each request is a line of log_path.
 */
static void set_worker(const char *cases) {
    FILE *stream = fopen(worker, "w");
    cr_assert_not_null(stream);
    fprintf(
        stream,
        "#!/bin/sh\n"
        "echo x >> '%s'\n"
        "answer() { echo '{\"ok\":true,\"reason\":\"\",\"detail\":\"\",\"gflops\":1,\"gbytes\":1,\"ms\":['$1,$1,$1,$1,"
        "$1']}'; }\n"
        "refused() { echo '{\"ok\":false,\"reason\":\"refused\",\"detail\":\"\",\"gflops\":0,\"gbytes\":0,\"ms\":[]}'; "
        "}\n"
        "wrong() { echo '{\"ok\":false,\"reason\":\"wrong\",\"detail\":\"\",\"gflops\":0,\"gbytes\":0,\"ms\":[]}'; }\n"
        "case \"$2\" in\n%s\n*) answer 10;;\nesac\n",
        log_path, cases);
    cr_assert_eq(fclose(stream), 0);
    cr_assert_eq(chmod(worker, 0700), 0);
}

/* How many requests there were. */
static size_t asked(void) {
    FILE *stream = fopen(log_path, "r");
    size_t count = 0;
    for (int c; stream != NULL && (c = fgetc(stream)) != EOF;) {
        count += c == '\n';
    }
    if (stream != NULL) {
        fclose(stream);
    }
    return count;
}

/* ---- A run ------------------------------------------------------------------------------------------------------- */

static const loglin_problem PROBLEM = {.batch = 1,
                                       .length = 1024,
                                       .heads = 4,
                                       .groups = 1,
                                       .dim_k = 128,
                                       .dim_v = 64,
                                       .levels = 11,
                                       .phases = LOGLIN_FORWARD};

/* What a run has told, and when it is to be stopped: at the n-th measurement, or at the n-th event. */
typedef struct run {
    size_t measured, events, stop_measured, stop_events; /* 0: never */
    size_t finished, without;                            /* subjects with a choice, and those that have none */
    bool complete;
    double best_ms, default_ms, last_share, most_left;
    char best[LOGLIN_CANDIDATE_TEXT_SIZE];
} run;

static int watch(void *context, const loglin_tune_event *event) {
    run *at = context;
    at->events++;
    at->measured += event->candidate != NULL;
    at->complete = event->complete != 0;
    cr_expect(event->share >= at->last_share && event->share <= 1 + 1e-9, "share %g after %g", event->share,
              at->last_share);
    at->last_share = event->share;
    cr_expect((event->candidate != NULL) == (event->outcome != NULL));
    cr_expect(event->candidate != NULL || event->finished != 0 || event->detail == NULL);
    cr_expect(isfinite(event->best_ms) && isfinite(event->seconds_left) && event->seconds_left >= 0);
    at->most_left = fmax(at->most_left, event->seconds_left);
    at->without += event->finished != 0 && event->best == NULL && event->detail != NULL;
    if (event->finished != 0 && event->best != NULL) {
        at->finished++;
        at->best_ms = event->ms;
        at->default_ms = event->default_ms;
        snprintf(at->best, sizeof at->best, "%s", event->best);
    }
    return (event->candidate != NULL && at->measured == at->stop_measured) || at->events == at->stop_events;
}

static run tune(const loglin_tune_options *options, run at) {
    loglin_tune_options all = *options;
    all.problems = &PROBLEM;
    all.problem_count = 1;
    all.worker = worker;
    all.seed = 7;
    all.progress = watch;
    all.context = &at;
    const loglin_status status = loglin_tune(support_open()->id, &all);
    cr_assert_eq(status, LOGLIN_OK, "%s", loglin_last_error());
    return at;
}

static loglin_tuning stored(void) {
    const loglin_device_info info = support_device_info();
    const loglin_identity identity = loglin_identity_of(&info);
    loglin_tuning tuning = {.entries = NULL};
    cr_assert_eq(loglin_tuning_load(support_cache, &identity, &tuning), LOGLIN_OK);
    return tuning;
}

static size_t count_failures(const loglin_tuning *tuning, const char *reason) {
    size_t count = 0;
    for (size_t i = 0; i < tuning->count; i++) {
        count += tuning->entries[i].kind == LOGLIN_ENTRY_FAILED && strcmp(tuning->entries[i].reason, reason) == 0;
    }
    return count;
}

/* ---- Tests ------------------------------------------------------------------------------------------------------- */

static const loglin_tune_options BLAS = {.engine = LOGLIN_ENGINE_BLAS, .candidate_limit = 0.3};
static const loglin_tune_options FUSED = {.engine = LOGLIN_ENGINE_FUSED};
static const loglin_tune_options FUSED_RESUMED = {.engine = LOGLIN_ENGINE_FUSED, .resume = 1};

/* Candidates that hang, crash, babble or compute wrongly cost themselves, and are not tried again. */
Test(tuner, finds_the_planted_optimum_among_candidates_that_fail) {
    set_worker("*'\"values\":[32,'*) sleep 100;;\n"
               "*'\"values\":[256,'*) wrong;;\n"
               "*'\"values\":[16,'*) echo nonsense;;\n"
               "*'\"values\":[128,4,'*|*'\"values\":[128,4]'*) kill -SEGV $$;;\n"
               "*'\"values\":[128,16,'*|*'\"values\":[128,16]'*) answer 5;;\n"
               "*'\"values\":[128,'*) answer 7;;");
    run first = tune(&BLAS, (run){0});
    cr_expect(first.complete && first.finished == 2, "%zu finished", first.finished); /* CLBlast and the class */
    cr_expect(strstr(first.best, "chunk=128 panel_mib=16") != NULL, "%s", first.best);
    cr_expect(first.best_ms == 5 && first.default_ms == 10, "%g, %g", first.best_ms, first.default_ms);
    loglin_tuning tuning = stored();
    cr_expect_eq(count_failures(&tuning, "hung"), 1u);
    cr_expect_eq(count_failures(&tuning, "crashed"), 2u);
    cr_expect_eq(count_failures(&tuning, "wrong"), 1u);
    loglin_tuning_free(&tuning);
    const size_t before = asked();
    set_worker(
        "*'\"values\":[32,'*|*'\"values\":[256,'*|*'\"values\":[16,'*) exit 1;;\n*'\"values\":[128'*) answer 7;;");
    const run second = tune(&BLAS, (run){0});
    cr_expect(second.complete);
    cr_expect_lt(asked() - before, before, "what has failed was asked for again");
    tuning = stored();
    cr_expect_eq(count_failures(&tuning, "crashed"), 2u);
    loglin_tuning_free(&tuning);
}

/* A default whose first compilation takes too long is not beaten unopposed; one that hangs twice is. */
Test(tuner, a_default_that_was_late_is_tried_again) {
    char cases[400];
    snprintf(cases, sizeof cases, "*'\"values\":[64'*'\"gemm\":[0,0'*) mkdir '%s/compiled' && sleep 100; answer 5;;",
             support_cache);
    set_worker(cases);
    run at = tune(&BLAS, (run){0});
    cr_expect(at.complete && at.finished == 2, "%zu finished", at.finished);
    cr_expect(strstr(at.best, "chunk=64 gemm=own") != NULL && at.default_ms == 5, "%s: %g", at.best, at.default_ms);
    loglin_tuning tuning = stored();
    cr_expect_eq(count_failures(&tuning, "hung"), 0u);
    loglin_tuning_free(&tuning);
    set_worker("*'\"values\":[64'*'\"gemm\":[0,0'*) sleep 100;;");
    at = tune(&(loglin_tune_options){.engine = LOGLIN_ENGINE_BLAS, .quick = 1, .candidate_limit = 0.1}, (run){0});
    cr_expect(at.complete && strstr(at.best, "chunk=64") == NULL && at.default_ms == 0, "%s", at.best);
    tuning = stored();
    cr_expect_eq(count_failures(&tuning, "hung"), 1u);
    loglin_tuning_free(&tuning);
}

/* What ran out of a low limit's time, and on a busy machine that is anything, is not lost to a run with a higher one. */
Test(tuner, what_hung_is_tried_again_with_more_patience) {
    char cases[400];
    snprintf(cases, sizeof cases, "*'\"values\":[32,'*) mkdir '%s/compiled' && sleep 100; answer 5;;", support_cache);
    for (int resumed = 0; resumed < 2; resumed++) {
        loglin_tune_options options = {.engine = LOGLIN_ENGINE_FUSED, .candidate_limit = 0.3};
        set_worker(cases);
        const run hasty = tune(&options, (run){0});
        cr_expect(hasty.complete && hasty.best_ms == 10, "%g", hasty.best_ms);
        options.candidate_limit = 60;
        options.resume = resumed;
        const run patient = tune(&options, (run){0});
        cr_expect(patient.complete && patient.best_ms == 5, "resumed %d: %g", resumed, patient.best_ms);
        support_remove_cache();
        make_places();
        snprintf(cases, sizeof cases, "*'\"values\":[32,'*) mkdir '%s/compiled' && sleep 100; answer 5;;",
                 support_cache);
    }
}

/* Nor is one that has failed among the chunk sizes tried again among the other values. */
Test(tuner, a_default_that_crashes_does_so_once) {
    char cases[400];
    snprintf(cases, sizeof cases, "*'\"values\":[64'*) echo x >> '%s/crashes'; kill -SEGV $$;;", support_cache);
    set_worker(cases);
    const run at = tune(&FUSED, (run){0});
    cr_expect(at.complete && at.finished == 1 && at.default_ms == 0);
    char line[160];
    snprintf(line, sizeof line, "test $(wc -l < '%s/crashes') -eq 1", support_cache);
    cr_expect_eq(system(line), 0);
}

/* A quick run, or one with a new driver, begins with what an earlier one has found. */
Test(tuner, old_choices_are_candidates) {
    const loglin_device_info info = support_device_info();
    loglin_problem filled;
    cr_assert_eq(loglin_problem_validate(&PROBLEM, &filled), LOGLIN_OK);
    loglin_entry entry = {.kind = LOGLIN_ENTRY_CLASS,
                          .stamp = loglin_stamp_of(&info),
                          .class = loglin_class_of(&filled),
                          .configuration = loglin_configuration_default(LOGLIN_ENGINE_FUSED),
                          .ms = 1};
    entry.configuration.values[LOGLIN_TUNABLE_CHUNK] = 32;
    entry.configuration.values[LOGLIN_TUNABLE_LANE_HEADS] = 2;
    snprintf(entry.stamp.driver, sizeof entry.stamp.driver, "old");
    loglin_tuning tuning = {.identity = loglin_identity_of(&info)};
    cr_assert_eq(loglin_tuning_add(&tuning, &entry), LOGLIN_OK);
    cr_assert_eq(loglin_tuning_merge(support_cache, &tuning), LOGLIN_OK);
    loglin_tuning_free(&tuning);
    set_worker("*'\"values\":[32,4,2,'*) answer 5;;\n*'\"values\":[32,256,2,'*) answer 5;;");
    const run at = tune(&(loglin_tune_options){.engine = LOGLIN_ENGINE_FUSED, .quick = 1}, (run){0});
    cr_expect(at.complete && strcmp(at.best, "fused chunk=32 lane_heads=2") == 0, "%s", at.best);
}

/* An engine that takes nothing, or all of whose candidates fail, does not end the run. */
Test(tuner, goes_on_where_an_engine_has_no_candidate) {
    set_worker("*'\"engine\":1'*) wrong;;\n*'\"engine\":2'*) refused;;");
    run at = tune(&(loglin_tune_options){0}, (run){0});
    cr_expect(at.complete && at.finished == 0 && at.without == 3, "%zu, %zu", at.finished, at.without);
    loglin_tuning tuning = stored();
    cr_expect_eq(count_failures(&tuning, "refused"), 0u, "a refusal depends on the problem");
    loglin_tuning_free(&tuning);
    set_worker("*'\"engine\":2'*'\"values\":[64'*) refused;;\n*'\"engine\":2'*'\"values\":[32'*) answer 4;;");
    at = tune(&FUSED, (run){0});
    cr_expect(at.finished == 1 && at.best_ms == 4 && at.default_ms == 0, "%zu: %g", at.finished, at.best_ms);
}

/* Stopped behind any measurement, or every `step`th, a run that goes on repeats none. */
static void expect_resumed(loglin_tune_options options, size_t step) {
    options.resume = 0;
    const run whole = tune(&options, (run){0});
    const size_t total = asked();
    cr_expect(whole.complete && whole.best_ms == 5, "%g", whole.best_ms);
    for (size_t stop = 1; stop < whole.measured; stop += step) {
        support_remove_cache();
        make_places();
        set_worker("*'\"values\":[128'*|*'[64,4,16,'*) answer 5;;");
        options.resume = 0;
        const run first = tune(&options, (run){.stop_measured = stop});
        cr_expect_not(first.complete);
        options.resume = 1;
        const run second = tune(&options, (run){0});
        cr_expect(second.complete && second.best_ms == 5 && strcmp(second.best, whole.best) == 0, "%s", second.best);
        cr_expect_eq(asked(), total, "stopped at %zu: %zu asked, expected %zu", stop, asked(), total);
    }
}

Test(tuner, resumes_behind_every_measurement) {
    set_worker("*'\"values\":[128'*|*'[64,4,16,'*) answer 5;;");
    expect_resumed(FUSED, 1);
}

Test(tuner, resumes_a_run_with_blas) {
    set_worker("*'\"values\":[128'*|*'[64,4,16,'*) answer 5;;");
    expect_resumed(BLAS, 5);
}

/* Stopped again and again within one and the same measurement, it is not taken for one that hangs. */
Test(tuner, is_patient_with_what_was_interrupted) {
    set_worker("*'\"values\":[64'*) answer 5;;");
    loglin_tune_options options = FUSED;
    for (int attempt = 0; attempt < 4; attempt++) {
        const run at = tune(&options, (run){.stop_events = 3});
        cr_expect_not(at.complete);
        options.resume = 1;
    }
    const run at = tune(&options, (run){0});
    cr_expect(at.complete && strstr(at.best, "chunk=64") != NULL && at.default_ms == 5, "%s: %g", at.best,
              at.default_ms);
    loglin_tuning tuning = stored();
    cr_expect_eq(count_failures(&tuning, "hung"), 0u);
    loglin_tuning_free(&tuning);
}

Test(tuner, a_time_limit_ends_it_and_resume_goes_on) {
    set_worker("*) sleep 0.2; answer 10;;");
    loglin_tune_options options = {.engine = LOGLIN_ENGINE_FUSED, .time_limit = 0.5};
    run at = tune(&options, (run){0});
    cr_expect(!at.complete && at.measured > 0 && at.measured < 4, "%zu measured", at.measured);
    options.resume = 1;
    for (int attempt = 0; attempt < 40 && !at.complete; attempt++) {
        at = tune(&options, (run){0});
    }
    cr_expect(at.complete && at.finished == 1);
}

/* What is left of it is told from the start, when nothing else is known of how long the run will take. */
Test(tuner, a_time_limit_bounds_what_is_left) {
    set_worker("*) sleep 100;;");
    const run at =
        tune(&(loglin_tune_options){.engine = LOGLIN_ENGINE_FUSED, .time_limit = 1000}, (run){.stop_events = 1});
    cr_expect(at.most_left > 900 && at.most_left <= 1000, "%g", at.most_left);
}

/* Even where a measurement takes very long, a quick run has an end; the measurement is not to blame. */
Test(tuner, a_quick_run_does_not_wait_for_what_is_slow) {
    struct timespec begin, end;
    loglin_tune_options options = {.engine = LOGLIN_ENGINE_FUSED, .quick = 1, .time_limit = 0.5};
    set_worker("*) sleep 100;;");
    (void)support_open();
    (void)clock_gettime(CLOCK_MONOTONIC, &begin);
    run at = tune(&options, (run){0});
    (void)clock_gettime(CLOCK_MONOTONIC, &end);
    cr_expect(!at.complete && end.tv_sec - begin.tv_sec < 60, "it took %d s", (int)(end.tv_sec - begin.tv_sec));
    loglin_tuning tuning = stored();
    cr_expect_eq(tuning.count, 0u);
    loglin_tuning_free(&tuning);
    set_worker("");
    options.resume = 1;
    options.time_limit = 100;
    at = tune(&options, (run){0});
    cr_expect(at.complete && at.finished == 1);
}

/* Another problem, engine or kind is another run. */
Test(tuner, does_not_resume_another_run) {
    set_worker("");
    const run whole = tune(&FUSED, (run){0});
    const size_t before = asked();
    loglin_tune_options options = FUSED_RESUMED;
    options.quick = 1;
    cr_expect(tune(&options, (run){0}).complete && whole.complete);
    cr_expect_gt(asked(), before);
}

/* A seed that the results cannot hold is none of a tuner's: the journal is not resumed, and the results can be read. */
Test(tuner, does_not_resume_with_a_bad_seed) {
    static char text[65536];
    const char seed[] = "\"seed\":7";
    set_worker("");
    cr_expect(tune(&FUSED, (run){0}).complete);
    const size_t before = asked();
    const loglin_device_info info = support_device_info();
    const loglin_identity identity = loglin_identity_of(&info);
    char *path = loglin_tuning_path(support_cache, &identity, ".journal");
    FILE *stream = fopen(path, "r+");
    cr_assert_not_null(stream);
    text[fread(text, 1, sizeof text - 1, stream)] = '\0';
    const char *place = strstr(text, seed);
    cr_assert_not_null(place);
    rewind(stream);
    fprintf(stream, "%.*s\"seed\":-7%s", (int)(place - text), text, place + strlen(seed));
    cr_assert_eq(fclose(stream), 0);
    cr_expect(tune(&FUSED_RESUMED, (run){0}).complete);
    cr_expect_eq(asked(), 2 * before);
    loglin_tuning tuning = stored();
    cr_expect_gt(tuning.count, 0u);
    loglin_tuning_free(&tuning);
    free(path);
}

static void pause_briefly(void) {
    (void)nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
}

Test(tuner, two_at_once_do_not_disturb_each_other) {
    set_worker("*) sleep 1; answer 10;;");
    const pid_t child = fork();
    cr_assert_geq(child, 0);
    if (child == 0) {
        (void)tune(&FUSED, (run){.stop_measured = 2});
        _exit(0);
    }
    for (int i = 0; i < 100 && asked() == 0; i++) {
        pause_briefly();
    }
    loglin_tune_options options = FUSED;
    options.worker = worker;
    cr_expect_eq(loglin_tune(support_open()->id, &options), LOGLIN_IO);
    cr_expect(strstr(loglin_last_error(), "another tuner") != NULL, "%s", loglin_last_error());
    int status;
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_expect_eq(status, 0);
}

/* A run in which no file may grow beyond a limit; in this process, since drivers do not work in a fork of one that uses them. */
static loglin_status tune_limited(rlim_t limit) {
    loglin_tune_options options = FUSED;
    options.problems = &PROBLEM;
    options.problem_count = 1;
    options.worker = worker;
    options.seed = 7;
    struct rlimit usual;
    cr_assert_eq(getrlimit(RLIMIT_FSIZE, &usual), 0);
    const struct rlimit small = {.rlim_cur = limit, .rlim_max = usual.rlim_max};
    (void)signal(SIGXFSZ, SIG_IGN);
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &small), 0);
    const loglin_status status = loglin_tune(support_open()->id, &options);
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &usual), 0);
    return status;
}

/* Where a file can grow no more the run ends with a word, and the next one goes on from there. */
Test(tuner, a_full_disk_loses_nothing) {
    set_worker("*'\"values\":[128'*) answer 5;;");
    (void)tune(&FUSED, (run){0});
    const size_t total = asked();
    for (rlim_t limit = 300; limit < 2000; limit += 333) {
        const size_t before = asked();
        cr_expect_eq(tune_limited(limit), LOGLIN_IO, "limit %d: the run does not say that the disk is full",
                     (int)limit);
        const run at = tune(&FUSED_RESUMED, (run){0});
        cr_expect(at.complete && at.best_ms == 5);
        cr_expect_leq(asked() - before, total + 1, "limit %d: %zu asked", (int)limit, asked() - before);
        loglin_tuning tuning = stored();
        cr_expect_gt(tuning.count, 0u);
        loglin_tuning_free(&tuning);
    }
}

/* A run, and the same one resumed, on a disk that is full or becomes so. */
static const char *fill_and_tune(void) {
    loglin_tune_options options = FUSED;
    options.problems = &PROBLEM;
    options.problem_count = 1;
    options.worker = worker;
    options.seed = 7;
    if (loglin_tune(support_open()->id, &options) != LOGLIN_OK) {
        return "a disk that is not full takes no results";
    }
    const size_t total = asked();
    const loglin_device_info info = support_device_info();
    const loglin_identity identity = loglin_identity_of(&info);
    char *journal = loglin_tuning_path(support_disk, &identity, ".journal");
    size_t full = 0;
    for (size_t left = 0; left < 4; left++) { /* room for nothing, half of the journal, all of it, the results too */
        const size_t before = asked();
        if (unlink(journal) != 0) {
            return "there is no journal";
        }
        support_fill_disk(left);
        options.resume = 0;
        const loglin_status status = loglin_tune(support_open()->id, &options);
        const bool named = strstr(loglin_last_error(), support_disk) != NULL &&
                           strstr(loglin_last_error(), "No space left on device") != NULL;
        full += status == LOGLIN_IO;
        if (status != LOGLIN_OK && (status != LOGLIN_IO || !named)) {
            return "the run does not say which place is full";
        }
        loglin_tuning tuning;
        if (loglin_tuning_load(support_disk, &identity, &tuning) != LOGLIN_OK || tuning.count == 0) {
            return "the old results are lost";
        }
        loglin_tuning_free(&tuning);
        support_empty_disk();
        options.resume = 1;
        if (loglin_tune(support_open()->id, &options) != LOGLIN_OK || asked() - before > total + 1) {
            return "the resumed run fails, or measures again what was measured";
        }
    }
    free(journal);
    return full < 2 ? "the disk was not full before the run and during it" : NULL;
}

Test(tuner, a_file_system_without_room_loses_nothing) {
    set_worker("*'\"values\":[128'*) answer 5;;");
    const int status = support_on_small_disk(fill_and_tune);
    if (status == SUPPORT_NO_DISK) {
        cr_skip_test("no file system may be mounted here");
    }
    cr_expect_eq(status, 0);
}

/* ---- Candidates -------------------------------------------------------------------------------------------------- */

/* Where CLBlast's own parameters are the faster ones for a class, what a plan will run is told, not what it won't. */
static void expect_options_refused(const loglin_tune_options *options, const char *message) {
    loglin_tune_options all = *options;
    all.worker = worker;
    cr_expect_eq(loglin_tune(support_open()->id, &all), LOGLIN_INVALID_ARGUMENT, "%s", message);
    cr_expect(strstr(loglin_last_error(), message) != NULL, "\"%s\" is not in: %s", message, loglin_last_error());
    cr_expect_eq(asked(), 0u);
}

Test(tuner, bad_options_are_refused_at_once) {
    expect_options_refused(&(loglin_tune_options){.time_limit = -1}, "options.time_limit is -1");
    expect_options_refused(&(loglin_tune_options){.time_limit = NAN}, "options.time_limit is nan");
    expect_options_refused(&(loglin_tune_options){.candidate_limit = INFINITY}, "options.candidate_limit is inf");
    expect_options_refused(&(loglin_tune_options){.engine = (loglin_engine)3}, "options.engine is 3");
    expect_options_refused(&(loglin_tune_options){.engine = (loglin_engine)-1}, "options.engine is -1");
    expect_options_refused(&(loglin_tune_options){.problem_count = 2}, "options.problems is NULL with problem_count 2");
    expect_options_refused(&(loglin_tune_options){.problems = &PROBLEM}, "options.problems is given");
}

Test(tuner, the_gain_of_a_class_is_that_of_the_device_s_parameters) {
    const loglin_device_info info = support_device_info();
    loglin_tuning tuning = {.identity = loglin_identity_of(&info)};
    loglin_entry entry = {.kind = LOGLIN_ENTRY_GEMM, .stamp = loglin_stamp_of(&info), .ms = 1};
    entry.configuration.gemm = (loglin_gemm_parameters){{64, 8, 8, 8, 8, 2, 1, 8, 0, 0}};
    cr_assert_eq(loglin_tuning_add(&tuning, &entry), LOGLIN_OK);
    cr_assert_eq(loglin_tuning_merge(support_cache, &tuning), LOGLIN_OK);
    loglin_tuning_free(&tuning);
    set_worker("*'[0,0,0,0,0,0,0,0,0,0]'*) answer 8;;");
    const run at = tune(&BLAS, (run){0});
    cr_expect(at.best_ms == 10 && at.default_ms == 8, "%g, %g", at.best_ms, at.default_ms);
    cr_expect(strstr(at.best, "gemm=64/8") != NULL, "%s", at.best);
}

/* CLBlast's parameters hold for a whole device: those that win one class and lose another are not taken. */
Test(tuner, parameters_that_lose_a_class_are_not_taken) {
    static const char *const losses[] = {"\"op\":7", "\"op\":0'*'\"phases\":2", "\"op\":1'*'\"phases\":2",
                                         "\"op\":1'*'\"phases\":1"};
    for (size_t i = 0; i < sizeof losses / sizeof losses[0]; i++) {
        char cases[200];
        snprintf(cases, sizeof cases, "*'%s'*'[64,4,16,'*) answer 11;;\n*'[64,4,16,'*) answer 5;;", losses[i]);
        set_worker(cases);
        const run at = tune(&BLAS, (run){0});
        cr_expect(at.complete && at.finished == 2);
        cr_expect_eq(at.best_ms, i == 0 ? 5 : 10, "%zu: %g", i, at.best_ms);
        cr_expect(strstr(at.best, i == 0 ? "gemm=64/4/16" : "gemm=own") != NULL, "%zu: %s", i, at.best);
        support_remove_cache();
        make_places();
    }
}

/* And of two that lose nowhere, the one that wins more in all classes together is. */
Test(tuner, parameters_are_chosen_by_several_classes) {
    set_worker("*'\"op\":0'*'\"phases\":1'*'[64,4,16,'*) answer 5;;\n"
               "*'\"op\":0'*'\"phases\":1'*'[64,8,16,'*) answer 6;;\n"
               "*'[64,8,16,'*) answer 5;;");
    const run at = tune(&BLAS, (run){0});
    cr_expect(at.complete && at.best_ms == 6 && strstr(at.best, "gemm=64/8/16") != NULL, "%s", at.best);
}

/* A class that the device refuses, for want of memory, has no say. */
Test(tuner, parameters_are_chosen_by_the_classes_that_are_taken) {
    set_worker("*'\"op\":1'*'\"phases\":2'*) refused;;\n*'[64,4,16,'*) answer 5;;");
    run at = tune(&BLAS, (run){0});
    cr_expect(at.complete && at.best_ms == 5 && strstr(at.best, "gemm=64/4/16") != NULL, "%s", at.best);
    support_remove_cache();
    make_places();
    set_worker("*'\"engine\":1'*) refused;;");
    at = tune(&BLAS, (run){0});
    cr_expect(at.complete && at.finished == 0 && at.without == 2, "%zu, %zu", at.finished, at.without);
}

/* A quick run takes CLBlast's parameters as they are, and on a CPU nothing of its engine unless it is asked for. */
Test(tuner, a_quick_run_leaves_blas_alone) {
    set_worker("*'\"engine\":1'*'[64,4,16,'*) answer 1;;\n*'\"engine\":2'*) answer 5;;");
    run at = tune(&(loglin_tune_options){.quick = 1}, (run){0});
    cr_expect_eq(at.finished, support_device_info().type == CL_DEVICE_TYPE_CPU ? 1u : 2u);
    cr_expect(at.complete && strcmp(at.best, "fused chunk=64") == 0, "%s", at.best);
    at = tune(&(loglin_tune_options){.quick = 1, .engine = LOGLIN_ENGINE_BLAS}, (run){0});
    cr_expect(at.complete && at.finished == 1 && strncmp(at.best, "blas", 4) == 0, "%s", at.best);
    loglin_tuning tuning = stored();
    for (size_t i = 0; i < tuning.count; i++) {
        cr_expect_neq(tuning.entries[i].kind, LOGLIN_ENTRY_GEMM);
    }
    loglin_tuning_free(&tuning);
}

/* Results of an old driver are a start: its parameters of CLBlast are tried. */
Test(tuner, stale_parameters_are_candidates) {
    const loglin_device_info info = {.type = CL_DEVICE_TYPE_CPU, .max_work_group_size = 4096, .local_memory = 1 << 20};
    loglin_tuning known = {.entries = NULL};
    loglin_entry entry = {.kind = LOGLIN_ENTRY_GEMM, .stamp = {.driver = "old"}};
    entry.configuration.gemm = (loglin_gemm_parameters){{32, 16, 16, 16, 16, 4, 2, 2, 1, 1}};
    cr_assert_eq(loglin_tuning_add(&known, &entry), LOGLIN_OK);
    loglin_candidates list;
    const loglin_gemm_parameters present = {{32, 16, 16, 16, 16, 8, 2, 2, 1, 1}};
    loglin_candidates_of_gemm(&info, &present, &known, 1, &list);
    cr_assert_gt(list.count, 3u);
    cr_expect(loglin_gemm_parameters_absent(&list.items[0].gemm));
    cr_expect_eq(list.items[1].gemm.values[LOGLIN_GEMM_KWID], 8u);
    cr_expect_eq(list.items[2].gemm.values[LOGLIN_GEMM_KWID], 4u);
    const loglin_device_info tiny = {.type = CL_DEVICE_TYPE_GPU, .max_work_group_size = 16, .local_memory = 1024};
    loglin_candidates_of_gemm(&tiny, &present, &known, 1, &list); /* no room for any */
    cr_expect_eq(list.count, 1u);
    loglin_tuning_free(&known);
}

Test(tuner, the_default_of_an_engine_comes_first) {
    const loglin_gemm_parameters tuned = {{64, 8, 8, 8, 8, 2, 1, 8, 0, 0}};
    const loglin_configuration untuned = loglin_configuration_default(LOGLIN_ENGINE_BLAS);
    loglin_candidates list;
    for (int which = 0; which < 4; which++) {
        loglin_candidates_of_engine(LOGLIN_ENGINE_BLAS, &tuned, which % 2 != 0, &list);
        if (which / 2 != 0) {
            const loglin_configuration from = list.items[2];
            loglin_candidates_near(&from, CL_DEVICE_TYPE_CPU, LOGLIN_BACKWARD, which % 2 != 0, &list);
            cr_expect_eq(memcmp(&list.items[2], &from, sizeof from), 0);
        }
        cr_expect_eq(memcmp(&list.items[0], &untuned, sizeof untuned), 0);
        cr_expect_eq(memcmp(&list.items[1].gemm, &tuned, sizeof tuned), 0);
        cr_expect_eq(memcmp(list.items[1].values, untuned.values, sizeof untuned.values), 0);
        cr_expect_geq(list.count, which % 2 != 0 ? 3u : 5u);
        for (size_t i = 0; i < list.count; i++) {
            char text[LOGLIN_CANDIDATE_TEXT_SIZE], other[LOGLIN_CANDIDATE_TEXT_SIZE];
            loglin_candidate_text(&list.items[i], text);
            for (size_t j = 0; j < i; j++) {
                loglin_candidate_text(&list.items[j], other);
                cr_expect_str_neq(text, other, "two candidates are called \"%s\"", text);
            }
        }
    }
    loglin_candidates_of_engine(LOGLIN_ENGINE_FUSED, &tuned, false, &list);
    cr_expect_eq(list.items[0].values[LOGLIN_TUNABLE_CHUNK], 64u);
}

/* ---- The command ------------------------------------------------------------------------------------------------- */

static char printed[1 << 20]; /* a slow machine draws the live lines often */

/* Runs "loglin tune" with the arguments, its standard output into `printed`; the exit status. */
static int command(const char *arguments) {
    char line[512];
    snprintf(line, sizeof line, "%s tune %s > '%s/out' 2> '%s/err'", LOGLIN_COMMAND, arguments, support_cache,
             support_cache);
    const int status = system(line);
    snprintf(line, sizeof line, "%s/out", support_cache);
    FILE *stream = fopen(line, "r");
    cr_assert_not_null(stream);
    printed[fread(printed, 1, sizeof printed - 1, stream)] = '\0';
    fclose(stream);
    cr_assert(WIFEXITED(status));
    return WEXITSTATUS(status);
}

Test(tuner, the_command_refuses_what_does_not_go_together) {
    static const char *const wrong[] = {"--op gated_delta",
                                        "--import x --export y",
                                        "--import x --quick",
                                        "--export x --all",
                                        "--all --device 0",
                                        "--import x --device 0",
                                        "--length 64 --seed 0",
                                        "--length 64 --time-limit 1 --seed 1.5",
                                        "--time-limit 0",
                                        "--engine cuda",
                                        "--length 1e12",
                                        "--length 64 --dim-k x",
                                        "table"};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        cr_expect_eq(command(wrong[i]), 2, "%s", wrong[i]);
        cr_expect_str_empty(printed);
    }
}

/* Before anything is measured, which would take longer than this test may. */
Test(tuner, the_command_refuses_a_report_that_cannot_be_written, .timeout = 60) {
    cr_expect_eq(command("--report /dev/null/page"), 1);
    cr_expect_str_empty(printed);
    cr_expect_eq(command("--report \"it's\""), 2);
    cr_expect_str_empty(printed);
}

static const char SMALL[] = "--length 64 --dim-k 16 --dim-v 16 --engine fused";

/* Not on a terminal: a head, a row, a sum, and no control characters; as JSON: nothing but that. */
Test(tuner, the_command_prints_plain_rows_and_json) {
    char arguments[160];
    cr_assert_eq(command(SMALL), 0);
    size_t lines = 0;
    for (const char *c = printed; *c != '\0'; c++) {
        lines += *c == '\n';
        cr_expect(*c == '\n' || (*c >= ' ' && *c <= '~'), "character %d", *c);
    }
    cr_expect_eq(lines, 3u, "%s", printed);
    cr_expect(strstr(printed, "mamba2 f32 K16 V16 shared T64 forward") != NULL, "%s", printed);
    snprintf(arguments, sizeof arguments, "%s --resume --json", SMALL);
    cr_assert_eq(command(arguments), 0);
    json_t *report = json_loads(printed, 0, NULL);
    cr_assert_not_null(report);
    cr_expect(json_is_true(json_object_get(report, "complete")));
    cr_expect_eq(json_array_size(json_object_get(report, "choices")), 1u);
    cr_expect_gt(json_array_size(json_object_get(report, "measurements")), 4u);
    cr_expect_gt(json_integer_value(json_object_get(report, "seed")), 0);
    json_decref(report);
    snprintf(arguments, sizeof arguments, "%s --resume --all --json", SMALL);
    cr_assert_eq(command(arguments), 0);
    report = json_loads(printed, 0, NULL);
    cr_expect_gt(json_array_size(report), 0u, "%s", printed);
    json_decref(report);
}

/* The page and its plots name nothing beside each other, so that they open without a network. */
Test(tuner, the_report_opens_from_disk) {
    if (system("gnuplot --version > /dev/null 2>&1") != 0) {
        cr_skip_test("gnuplot, which draws it, is not installed");
    }
    char arguments[160];
    cr_assert_eq(chdir(support_cache), 0);
    snprintf(arguments, sizeof arguments, "%s --report '|page'",
             SMALL); /* to gnuplot a command, but for the user a name */
    cr_assert_eq(command(arguments), 0);
    cr_assert_eq(rename("|page", "page"), 0);
    char line[400];
    snprintf(line, sizeof line, "cat '%s'/page/index.html '%s'/page/*.svg > '%s/all'", support_cache, support_cache,
             support_cache);
    cr_assert_eq(system(line), 0);
    snprintf(line, sizeof line, "grep -o 'https*://[^\"'\\'' >]*' '%s/all' | grep -v '^http://www.w3.org/' | grep .",
             support_cache);
    cr_expect_neq(system(line), 0, "the page names an address");
    snprintf(line, sizeof line, "test $(grep -c '<polyline\\|<path' '%s'/page/speed-*.svg) -gt 0", support_cache);
    cr_expect_eq(system(line), 0);
    snprintf(line, sizeof line,
             "cd '%s/page' && grep -q 'limit by arithmetic' speed-*.svg && grep -q 'limit by bandwidth' speed-*.svg && "
             "grep -q 'tokens of a chunk' chunks-*.svg && grep -q 'img src=\"speed-' index.html && "
             "grep -q 'img src=\"chunks-' index.html",
             support_cache);
    cr_expect_eq(system(line), 0);
}

/* Starts the command on a terminal of its own, `columns` wide; the terminal's other end. */
static int start_on_terminal(char *const *arguments, unsigned short columns, pid_t *child) {
    const int terminal = posix_openpt(O_RDWR | O_NOCTTY);
    cr_assert(terminal >= 0 && grantpt(terminal) == 0 && unlockpt(terminal) == 0);
    const int inner = open(ptsname(terminal), O_RDWR | O_NOCTTY);
    const struct winsize size = {.ws_row = 24, .ws_col = columns};
    cr_assert(inner >= 0 && ioctl(inner, TIOCSWINSZ, &size) == 0);
    *child = fork();
    cr_assert_geq(*child, 0);
    if (*child == 0) {
        setenv("TERM", "xterm", 1);
        (void)dup2(inner, STDOUT_FILENO);
        close(terminal);
        execv(LOGLIN_COMMAND, arguments);
        _exit(127);
    }
    close(inner);
    return terminal;
}

/* On a terminal: the best so far and a bar with the time left, drawn over and over, never wider than it is. */
Test(tuner, the_command_draws_on_a_terminal) {
    enum { COLUMNS = 70 };
    char *const arguments[] = {LOGLIN_COMMAND, "tune", "--length", "64",    "--dim-k", "16",
                               "--dim-v",      "16",   "--engine", "fused", NULL};
    pid_t child;
    const int terminal = start_on_terminal(arguments, COLUMNS, &child);
    size_t length = 0;
    for (ssize_t got;
         length < sizeof printed - 1 && (got = read(terminal, printed + length, sizeof printed - 1 - length)) > 0;) {
        length += (size_t)got;
    }
    printed[length] = '\0';
    int status;
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_expect_eq(status, 0);
    close(terminal);
    cr_expect(strstr(printed, "so far") != NULL && strstr(printed, "[##") != NULL && strstr(printed, " left") != NULL,
              "%s", printed);
    size_t drawn = 0;
    for (const char *at = strstr(printed, "\033[J"); at != NULL; at = strstr(at + 1, "\033[J")) {
        const char *row = at + 3, *bar = strstr(row, "\r\n[");
        if (bar != NULL && strcspn(row, "\r") == (size_t)(bar - row)) {
            drawn++;
            cr_expect_lt(bar - row, COLUMNS);
            cr_expect_lt(strcspn(bar + 2, "\033\r"), (size_t)COLUMNS);
        }
    }
    cr_expect_gt(drawn, 0u);
    const char *last = strrchr(printed, '\033');
    cr_expect(last != NULL && strstr(last, "geometric mean") != NULL, "live lines are left behind the sum");
}

/* A second interrupt does no harm either: the first has ended the run in good order. */
/* Also under nohup, whose signal changes nothing. */
Test(tuner, the_command_can_be_interrupted) {
    char *const arguments[] = {LOGLIN_COMMAND, "tune", "--quick", "--json", NULL};
    char path[96];
    snprintf(path, sizeof path, "%s/out", support_cache);
    const pid_t child = fork();
    cr_assert_geq(child, 0);
    if (child == 0) {
        (void)freopen(path, "w", stdout);
        (void)signal(SIGINT, SIG_DFL);
        (void)signal(SIGHUP, SIG_IGN);
        execv(LOGLIN_COMMAND, arguments);
        _exit(127);
    }
    int status;
    for (int i = 0; i < 80; i++) {
        pause_briefly();
        if (i == 40) {
            (void)kill(child, SIGHUP);
        }
    }
    cr_expect_eq(waitpid(child, &status, WNOHANG), 0);
    (void)kill(child, SIGINT);
    (void)kill(child, SIGINT);
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_expect(WIFEXITED(status) && WEXITSTATUS(status) == 1, "status %d", status);
    json_t *report = json_load_file(path, 0, NULL);
    cr_expect(json_is_false(json_object_get(report, "complete")));
    json_decref(report);
}
