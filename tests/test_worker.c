/* SPDX-License-Identifier: Apache-2.0 */
/* Measurements in child processes, and the reference that they are compared with. */
#include "oracle.h"
#include "plan/reference.h"
#include "plan/tuning.h"
#include "plan/worker.h"
#include "support.h"
#include "support_tuning.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

TestSuite(worker, .init = support_make_cache, .fini = support_remove_cache);

/* ---- Children --------------------------------------------------------------------------------------------------- */

static loglin_reply ask_script(const char *script, double limit) {
    char path[96];
    snprintf(path, sizeof path, "%s/worker", support_cache);
    support_write_file(path, script, strlen(script));
    cr_assert_eq(chmod(path, 0700), 0);
    return loglin_worker_ask(path, "{}", limit, NULL, NULL);
}

Test(worker, children_that_hang_crash_or_babble_cost_one_candidate) {
    loglin_reply reply = ask_script("#!/bin/sh\nsleep 1000\n", 0.5);
    cr_expect(reply.outcome == LOGLIN_OUTCOME_FAILED && strcmp(reply.reason, "hung") == 0, "%s", reply.reason);
    reply = ask_script("#!/bin/sh\nexec >&-\nsleep 1000\n", 60); /* closes its output and stays */
    cr_expect(reply.outcome == LOGLIN_OUTCOME_FAILED && strcmp(reply.reason, "crashed") == 0, "%s", reply.reason);
    reply = ask_script("#!/bin/sh\nkill -SEGV $$\n", 60);
    cr_expect(reply.outcome == LOGLIN_OUTCOME_FAILED && strcmp(reply.reason, "crashed") == 0, "%s", reply.reason);
    cr_expect(strstr(reply.detail, "signal 11") != NULL, "%s", reply.detail);
    reply = ask_script("#!/bin/sh\nyes babble | head -c 100000\n", 60);
    cr_expect(reply.outcome == LOGLIN_OUTCOME_FAILED && strcmp(reply.reason, "crashed") == 0, "%s", reply.reason);
    reply = ask_script("#!/bin/sh\necho '{\"ok\":true,\"reason\":\"\",\"detail\":\"\",\"ms\":[2.5]}'\n", 60);
    cr_expect(reply.outcome == LOGLIN_OUTCOME_OK && reply.sample.runs == 1 && reply.sample.ms[0] == 2.5);
    reply = loglin_worker_ask("/nowhere/at/all", "{}", 1, NULL, NULL);
    cr_expect_eq(reply.outcome, LOGLIN_OUTCOME_STOPPED);
}

/* An error text may be cut within a character, or be of a driver that knows no UTF-8: the rest of the reply counts. */
Test(worker, a_reply_is_told_without_a_text_that_is_none) {
    const loglin_reply refused = {
        .outcome = LOGLIN_OUTCOME_FAILED, .reason = "refused", .detail = "no room in /home/j\xc3"};
    char *text = loglin_reply_print(&refused);
    cr_assert_not_null(text);
    const loglin_reply read = loglin_reply_parse(text);
    cr_expect_str_eq(read.reason, "refused");
    cr_expect_str_eq(read.detail, "");
    free(text);
}

/* What keeps a child from being started is not a candidate's fault. */
Test(worker, no_descriptors_are_nobodys_fault) {
    (void)ask_script("#!/bin/sh\n", 60);
    char path[96];
    snprintf(path, sizeof path, "%s/worker", support_cache);
    struct rlimit all;
    cr_assert_eq(getrlimit(RLIMIT_NOFILE, &all), 0);
    const struct rlimit few = {.rlim_cur = 3, .rlim_max = all.rlim_max};
    cr_assert_eq(setrlimit(RLIMIT_NOFILE, &few), 0);
    const loglin_reply reply = loglin_worker_ask(path, "{}", 60, NULL, NULL);
    cr_assert_eq(setrlimit(RLIMIT_NOFILE, &all), 0);
    cr_expect_eq(reply.outcome, LOGLIN_OUTCOME_STOPPED);
    cr_expect(strstr(reply.detail, "worker") != NULL, "%s", reply.detail);
}

/* Is suspended once, for longer than the child's limit. */
static int sleep_once(void *context) {
    bool *slept = context;
    if (!*slept) {
        (void)nanosleep(&(struct timespec){.tv_sec = 1}, NULL);
    }
    *slept = true;
    return 0;
}

/* A tuner that was suspended takes the answer that came meanwhile; one that never ends is late all the same. */
Test(worker, a_suspended_tuner_takes_the_answer) {
    bool slept = false;
    (void)ask_script("#!/bin/sh\necho '{\"ok\":true,\"reason\":\"\",\"detail\":\"\",\"ms\":[2.5]}'\n", 60);
    char path[96];
    snprintf(path, sizeof path, "%s/worker", support_cache);
    loglin_reply reply = loglin_worker_ask(path, "{}", 0.2, sleep_once, &slept);
    cr_expect_eq(reply.outcome, LOGLIN_OUTCOME_OK, "%s", reply.reason);
    reply = ask_script("#!/bin/sh\nexec yes babble\n", 0.5);
    cr_expect_str_eq(reply.reason, "hung");
}

/* Some loaders of OpenCL take OCL_ICD_FILENAMES apart in place; a child gets the list that the process was given. */
Test(worker, children_see_all_drivers) {
    char *list = getenv("OCL_ICD_FILENAMES");
    if (list == NULL || strcmp(list, "one:two") != 0) { /* the list must be there from the start: once more, with it */
        char self[512], line[700];
        const ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
        cr_assert_gt(length, 0);
        self[length] = '\0';
        snprintf(line, sizeof line,
                 "env -u BXFI_MAP OCL_ICD_FILENAMES=one:two '%s' --filter worker/children_see_all_drivers > '%s/log'",
                 self, support_cache);
        cr_expect_eq(system(line), 0);
        return;
    }
    list[3] = '\0';
    const loglin_reply reply = ask_script(
        "#!/bin/sh\necho '{\"ok\":true,\"reason\":\"\",\"detail\":\"'\"$OCL_ICD_FILENAMES\"'\",\"ms\":[1]}'\n", 60);
    cr_expect_str_eq(reply.detail, "one:two");
}

/* The real worker: both operators and phases are right and timed; an impossible request is refused. */
Test(worker, the_worker_measures) {
    for (int which = 0; which < 4; which++) {
        const loglin_device_info info = support_device_info();
        loglin_request request = {
            .problem = {.batch = 2, .length = 70, .heads = 2, .groups = 1, .dim_k = 16, .dim_v = 8, .levels = 8},
            .configuration = loglin_configuration_default(LOGLIN_ENGINE_BLAS),
            .runs = 2};
        snprintf(request.name, sizeof request.name, "%s", info.name);
        request.problem.op = which % 2 != 0 ? LOGLIN_GATED_DELTA : LOGLIN_MAMBA2;
        request.problem.phases = which / 2 != 0 ? LOGLIN_BACKWARD : LOGLIN_FORWARD;
        char *text = loglin_request_print(&request);
        loglin_reply reply = loglin_worker_ask(LOGLIN_COMMAND, text, 300, NULL, NULL);
        cr_expect_eq(reply.outcome, LOGLIN_OUTCOME_OK, "%s: %s", reply.reason, reply.detail);
        cr_expect(reply.sample.runs == 2 && reply.sample.ms[0] > 0);
        free(text);
        request.configuration.values[LOGLIN_TUNABLE_CHUNK] = 64;
        request.problem.levels = 2;
        text = loglin_request_print(&request);
        reply = loglin_worker_ask(LOGLIN_COMMAND, text, 300, NULL, NULL);
        cr_expect_eq(reply.outcome, LOGLIN_OUTCOME_FAILED);
        cr_expect(strstr(reply.detail, "levels") != NULL, "%s", reply.detail);
        free(text);
    }
}

/* Kernels that compute something else, or write behind an array, are noticed before they are timed. */
Test(worker, wrong_kernels_are_noticed) {
    static const struct {
        const char *options; /* of the build, behind the engine's own */
        loglin_dtype dtype;
        size_t length;
        unsigned phases;
        const char *detail;
    } cases[] = {{"-DSTRONG=1", LOGLIN_F32, 70, LOGLIN_FORWARD, "outputs: error"},
                 {"-DSTRONG=1", LOGLIN_F32, 70, LOGLIN_BACKWARD, "outputs: error"},
                 {"-DSTORAGE=0", LOGLIN_F16, 4, LOGLIN_FORWARD, "it writes outside its arrays"}};
    const loglin_device_info info = support_device_info();
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        loglin_request request = {.problem = {.dtype = cases[i].dtype,
                                              .batch = 1,
                                              .length = cases[i].length,
                                              .heads = 1,
                                              .groups = 1,
                                              .dim_k = 8,
                                              .dim_v = 8,
                                              .levels = 8,
                                              .phases = cases[i].phases},
                                  .configuration = loglin_configuration_default(LOGLIN_ENGINE_BLAS),
                                  .runs = 2};
        snprintf(request.name, sizeof request.name, "%s", info.name);
        setenv("LOGLIN_BUILD_OPTIONS", cases[i].options, 1);
        char *text = loglin_request_print(&request);
        const loglin_reply reply = loglin_worker_ask(LOGLIN_COMMAND, text, 300, NULL, NULL);
        cr_expect(reply.outcome == LOGLIN_OUTCOME_FAILED && strcmp(reply.reason, "wrong") == 0 &&
                      strstr(reply.detail, cases[i].detail) != NULL,
                  "%s: %s: %s", cases[i].options, reply.reason, reply.detail);
        cr_expect_eq(reply.sample.runs, 0u);
        free(text);
    }
}

/* Whatever the fused engine of a CPU is tuned to, its results are right; the odd shape meets the ends of segments. */
Test(worker, all_values_of_the_fused_engine_are_right) {
    const loglin_device_info info = support_device_info();
    for (size_t t = LOGLIN_TUNABLE_CHUNK + 1; t < LOGLIN_TUNABLE_COUNT && info.type == CL_DEVICE_TYPE_CPU; t++) {
        const loglin_tunable *tunable = &loglin_tunables[t];
        for (size_t i = 0; i < tunable->value_count && loglin_tunable_is_read(tunable, LOGLIN_ENGINE_FUSED); i++) {
            loglin_request request = {.problem = {.op = i % 2 != 0 ? LOGLIN_GATED_DELTA : LOGLIN_MAMBA2,
                                                  .batch = 1,
                                                  .length = 1085,
                                                  .heads = 8,
                                                  .groups = 1,
                                                  .dim_k = 16,
                                                  .dim_v = 24,
                                                  .levels = 12,
                                                  .phases = LOGLIN_BACKWARD},
                                      .configuration = loglin_configuration_default(LOGLIN_ENGINE_FUSED),
                                      .runs = 1};
            snprintf(request.name, sizeof request.name, "%s", info.name);
            request.configuration.values[LOGLIN_TUNABLE_CHUNK] = 16;
            request.configuration.values[t] = tunable->values[i];
            char *text = loglin_request_print(&request);
            const loglin_reply reply = loglin_worker_ask(LOGLIN_COMMAND, text, 300, NULL, NULL);
            cr_expect_eq(reply.outcome, LOGLIN_OUTCOME_OK, "%s %u: %s: %s", tunable->name, tunable->values[i],
                         reply.reason, reply.detail);
            free(text);
        }
    }
}

/* ---- The tuner's reference -------------------------------------------------------------------------------------- */

enum { T = 37, H = 2, G = 1, K = 5, V = 3, L = 8 };

static void fill(support_random *random, double *values, size_t count, double low, double high) {
    for (size_t i = 0; i < count; i++) {
        values[i] = low + (high - low) * support_uniform(random);
    }
}

/* Rows and their gradients against the tests' own oracle. */
static void expect_reference(bool delta, bool strong) {
    double q[T * G * K], k[T * G * K], v[T * H * V], g[T * H], scales[T * H * L], beta[T * H], d_o[T * H * V];
    support_random random = {11};
    fill(&random, q, T * G * K, -1, 1);
    fill(&random, k, T * G * K, -0.5, 0.5);
    fill(&random, v, T * H * V, -1, 1);
    fill(&random, g, T * H, -0.5, 0);
    fill(&random, scales, T * H * L, 0, 1);
    fill(&random, beta, T * H, 0, 1);
    fill(&random, d_o, T * H * V, -1, 1);
    const size_t starts[] = {0, T};
    const oracle_problem problem = {.delta = delta,
                                    .strong = strong,
                                    .sequences = 1,
                                    .starts = starts,
                                    .heads = H,
                                    .groups = G,
                                    .dim_k = K,
                                    .dim_v = V,
                                    .levels = L,
                                    .scale = 1};
    const oracle_inputs in = {.q = q, .k = k, .v = v, .g = g, .level_scales = scales, .beta = delta ? beta : NULL};
    const loglin_reference mine = {.length = T,
                                   .heads = H,
                                   .groups = G,
                                   .dim_k = K,
                                   .dim_v = V,
                                   .levels = L,
                                   .partition = strong ? LOGLIN_STRONG : LOGLIN_WEAK,
                                   .q = q,
                                   .k = k,
                                   .v = v,
                                   .g = g,
                                   .level_scales = scales,
                                   .beta = delta ? beta : NULL};
    static double expected[7][T * H * L], got[7][T * H * L], o[T * H * V], row[V], scratch[(T + 4) * K];
    memset(got, 0, sizeof got);
    memset(expected, 0, sizeof expected);
    oracle_recurrence(&problem, &in, o, NULL);
    const oracle_gradients theirs = {
        expected[0], expected[1], expected[2], expected[3], expected[4], delta ? expected[5] : NULL, NULL};
    oracle_backward(&problem, &in, d_o, NULL, &theirs);
    const loglin_reference_gradients ours = {got[0], got[1], got[2], got[3], got[4], delta ? got[5] : NULL};
    for (size_t i = 0; i < (size_t)T * H; i++) {
        loglin_reference_row(&mine, i / H, i % H, scratch, row);
        cr_expect_lt(support_error(row, o + i * V, V), 1e-12);
        loglin_reference_row_gradients(&mine, i / H, i % H, d_o + i * V, scratch, &ours);
    }
    for (size_t i = 0; i < (delta ? 6u : 5u); i++) {
        cr_expect_lt(support_error(got[i], expected[i], T * H * L), 1e-12, "delta %d strong %d gradient %zu", delta,
                     strong, i);
    }
}

Test(worker, the_reference_agrees_with_the_oracle) {
    for (int which = 0; which < 4; which++) {
        expect_reference(which % 2 != 0, which / 2 != 0);
    }
}
