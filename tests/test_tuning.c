/* SPDX-License-Identifier: Apache-2.0 */
/* The tuner: the search on a synthetic device, the files of results, the journal, looking up, children, the reference. */
#include "oracle.h"
#include "plan/journal.h"
#include "plan/reference.h"
#include "plan/search.h"
#include "plan/tuning.h"
#include "plan/worker.h"
#include "support.h"

#include <criterion/criterion.h>
#include <dirent.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- The search on a synthetic device --------------------------------------------------------------------------- */

enum { MOST = 64 };

/* Candidates with true times, noise, and some that fail. */
typedef struct synthetic {
    double ms[MOST], noise; /* noise: the standard deviation, as a share */
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
            reply.sample.ms[i] = device->ms[candidate] * (1 + device->noise * fabs(support_normal(&device->random)));
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

/* ---- Files of results ------------------------------------------------------------------------------------------- */

static char directory[64];

static void make_directory(void) {
    strcpy(directory, "/tmp/loglin-tuning-XXXXXX");
    cr_assert_not_null(mkdtemp(directory));
    setenv("LOGLIN_CACHE_DIR", directory, 1);
    setenv("LOGLIN_LOG", "error", 1);
}

static void remove_directory(void) {
    char command[96];
    snprintf(command, sizeof command, "rm -rf '%s'", directory);
    cr_expect_eq(system(command), 0);
}

TestSuite(tuning, .init = make_directory, .fini = remove_directory);

static const loglin_identity GADGET = {"Gadget 7", "Makers", "Platform", "GPU"};
static const loglin_stamp NOW = {"1.0", "OpenCL 3.0", "0.1.0", "abc"};

static loglin_entry class_entry(unsigned length, unsigned chunk, double ms, int64_t at) {
    loglin_entry entry = {
        .kind = LOGLIN_ENTRY_CLASS,
        .stamp = NOW,
        .class =
            {.op = LOGLIN_MAMBA2, .dim_k = 128, .dim_v = 64, .length = length, .shared = true, .phase = LOGLIN_FORWARD},
        .configuration = loglin_configuration_default(LOGLIN_ENGINE_BLAS),
        .ms = ms,
        .spread = 0.123456789123,
        .default_ms = 2 * ms,
        .seed = 1234567890123,
        .tuned_at = at};
    entry.configuration.values[LOGLIN_TUNABLE_CHUNK] = chunk;
    return entry;
}

static loglin_tuning one_class(unsigned length, unsigned chunk) {
    loglin_tuning tuning = {.identity = GADGET};
    const loglin_entry entry = class_entry(length, chunk, 1.5, 100);
    cr_assert_eq(loglin_tuning_add(&tuning, &entry), LOGLIN_OK);
    return tuning;
}

static loglin_tuning all_kinds(void) {
    loglin_tuning tuning = one_class(1024, 128);
    loglin_entry gemm = {.kind = LOGLIN_ENTRY_GEMM, .stamp = NOW, .ms = 2};
    gemm.configuration.gemm = (loglin_gemm_parameters){{64, 8, 16, 8, 16, 2, 1, 2, 0, 0}};
    cr_assert_eq(loglin_tuning_add(&tuning, &gemm), LOGLIN_OK);
    loglin_entry failed = {.kind = LOGLIN_ENTRY_FAILED, .stamp = NOW, .candidate = "blas \"x\"", .reason = "hung"};
    cr_assert_eq(loglin_tuning_add(&tuning, &failed), LOGLIN_OK);
    return tuning;
}

static void merge(unsigned length, unsigned chunk) {
    loglin_tuning tuning = one_class(length, chunk);
    cr_assert_eq(loglin_tuning_merge(directory, &tuning), LOGLIN_OK, "%s", loglin_last_error());
    loglin_tuning_free(&tuning);
}

static size_t stored(void) {
    loglin_tuning tuning;
    cr_assert_eq(loglin_tuning_load(directory, &GADGET, &tuning), LOGLIN_OK);
    const size_t count = tuning.count;
    loglin_tuning_free(&tuning);
    return count;
}

/* Files in the folder of results whose names have the word. */
static size_t count_files(const char *word) {
    char folder[96];
    snprintf(folder, sizeof folder, "%s/tuning-1", directory);
    DIR *stream = opendir(folder);
    size_t count = 0;
    for (struct dirent *file; stream != NULL && (file = readdir(stream)) != NULL;) {
        count += strstr(file->d_name, word) != NULL;
    }
    if (stream != NULL) {
        closedir(stream);
    }
    return count;
}

static void write_text(const char *path, const char *text, size_t length) {
    FILE *stream = fopen(path, "wb");
    cr_assert_not_null(stream);
    cr_assert_eq(fwrite(text, 1, length, stream), length);
    cr_assert_eq(fclose(stream), 0);
}

Test(tuning, what_is_printed_is_read) {
    loglin_tuning tuning = all_kinds(), read;
    char *text = loglin_tuning_print(&tuning);
    cr_assert_eq(loglin_tuning_parse("text", text, strlen(text), &read), LOGLIN_OK, "%s", loglin_last_error());
    cr_assert_eq(read.count, 3u);
    cr_expect_str_eq(read.identity.device, "Gadget 7");
    cr_expect_eq(read.entries[0].configuration.values[LOGLIN_TUNABLE_CHUNK], 128u);
    cr_expect_eq(read.entries[0].seed, 1234567890123);
    cr_expect_eq(read.entries[1].configuration.gemm.values[LOGLIN_GEMM_NDIMCD], 16u);
    cr_expect_str_eq(read.entries[2].candidate, "blas \"x\"");
    char *again = loglin_tuning_print(&read);
    cr_expect_str_eq(again, text);
    free(again);
    free(text);
    loglin_tuning_free(&tuning);
    loglin_tuning_free(&read);
}

Test(tuning, every_truncation_and_every_changed_byte_is_noticed) {
    loglin_tuning tuning = all_kinds(), read;
    char *text = loglin_tuning_print(&tuning);
    const size_t length = strlen(text);
    for (size_t i = 0; i < length; i++) {
        cr_expect_eq(loglin_tuning_parse("text", text, i, &read), LOGLIN_BAD_FILE, "cut to %zu bytes", i);
        text[i] ^= 1;
        cr_expect_eq(loglin_tuning_parse("text", text, length, &read), LOGLIN_BAD_FILE, "byte %zu changed", i);
        text[i] ^= 1;
    }
    free(text);
    loglin_tuning_free(&tuning);
}

Test(tuning, a_damaged_file_is_kept_aside_and_not_trusted) {
    merge(1024, 128);
    char *path = loglin_tuning_path(directory, &GADGET, ".json");
    write_text(path, "{\"format\": \"loglin-tuning\"", 26);
    cr_expect_eq(stored(), 0u);
    cr_expect_eq(count_files(".damaged-"), 1u, "the damaged file is lost");
    merge(2048, 128);
    cr_expect_eq(stored(), 1u);
    write_text(path, "", 0);
    merge(4096, 128); /* a writer meets it first */
    cr_expect_eq(stored(), 1u);
    cr_expect_eq(count_files(".damaged-"), 2u);
    free(path);
}

Test(tuning, newer_results_replace_older_ones_and_stamps_stay_apart) {
    loglin_tuning tuning = {.identity = GADGET};
    for (int64_t at = 10; at > 0; at--) { /* newest first: the order must not matter */
        const loglin_entry entry = class_entry(1024, at == 10 ? 256 : 32, 1, at);
        cr_assert_eq(loglin_tuning_add(&tuning, &entry), LOGLIN_OK);
    }
    cr_expect_eq(tuning.count, 1u);
    cr_expect_eq(tuning.entries[0].configuration.values[LOGLIN_TUNABLE_CHUNK], 256u);
    for (int driver = 0; driver < 9; driver++) {
        loglin_entry entry = class_entry(1024, 64, 1, 100 + driver);
        snprintf(entry.stamp.driver, sizeof entry.stamp.driver, "2.%d", driver);
        cr_assert_eq(loglin_tuning_add(&tuning, &entry), LOGLIN_OK);
    }
    cr_expect_eq(tuning.count, 4u, "%zu stamps are kept", tuning.count);
    loglin_tuning_free(&tuning);
}

Test(tuning, tuners_that_finish_at_once_lose_nothing) {
    enum { PROCESSES = 6, MERGES = 5 };
    for (int n = 0; n < PROCESSES; n++) {
        if (fork() == 0) {
            bool good = true;
            for (int i = 0; i < MERGES; i++) {
                loglin_tuning tuning = one_class(1u << (n * MERGES + i), 64);
                good = loglin_tuning_merge(directory, &tuning) == LOGLIN_OK && good;
                loglin_tuning_free(&tuning);
            }
            _exit(good ? 0 : 1);
        }
    }
    for (int n = 0; n < PROCESSES; n++) {
        int status;
        cr_assert_gt(wait(&status), 0);
        cr_expect_eq(status, 0);
    }
    cr_expect_eq(stored(), (size_t)(PROCESSES * MERGES));
    cr_expect_eq(count_files(".new-"), 0u);
}

/* A child merges where no file may grow beyond a limit; killed there, or told so.  Its exit status. */
static int merge_limited(rlim_t limit, bool killed) {
    const pid_t child = fork();
    if (child == 0) {
        const struct rlimit size = {limit, limit};
        (void)signal(SIGXFSZ, killed ? SIG_DFL : SIG_IGN);
        (void)setrlimit(RLIMIT_FSIZE, &size);
        loglin_tuning tuning = one_class(4096, 256);
        _exit(loglin_tuning_merge(directory, &tuning) == LOGLIN_OK ? 0 : 1);
    }
    int status;
    cr_assert_eq(waitpid(child, &status, 0), child);
    return status;
}

Test(tuning, a_full_disk_loses_nothing) {
    merge(1024, 128);
    const int status = merge_limited(100, false);
    cr_expect(WIFEXITED(status) && WEXITSTATUS(status) == 1, "the error is not reported");
    cr_expect_eq(stored(), 1u);
    cr_expect_eq(count_files(".new-"), 0u, "a part of a file is left");
    cr_expect_eq(merge_limited(1 << 20, false), 0);
    cr_expect_eq(stored(), 2u);
}

/* Killed at any byte that it writes, a merge leaves the old file or the new one. */
Test(tuning, an_interrupted_merge_leaves_a_whole_file) {
    merge(1024, 128);
    bool ended = false;
    for (rlim_t limit = 0; limit < 8192 && !ended; limit += 61) {
        const int status = merge_limited(limit, true);
        ended = status == 0;
        cr_expect(ended || (WIFSIGNALED(status) && WTERMSIG(status) == SIGXFSZ));
        cr_expect_eq(stored(), ended ? 2u : 1u, "limit %d", (int)limit);
    }
    cr_expect(ended);
    cr_expect_eq(count_files(".damaged-"), 0u);
}

Test(tuning, places_that_cannot_be_written_are_reported) {
    loglin_tuning tuning = one_class(1024, 128);
    cr_expect_eq(loglin_tuning_merge("/dev/null/nowhere", &tuning), LOGLIN_IO);
    cr_expect(strstr(loglin_last_error(), "LOGLIN_CACHE_DIR") != NULL, "%s", loglin_last_error());
    loglin_tuning read;
    cr_expect_eq(loglin_tuning_load("/dev/null/nowhere", &GADGET, &read), LOGLIN_OK);
    cr_expect_eq(read.count, 0u);
    if (geteuid() != 0) {
        cr_assert_eq(chmod(directory, 0500), 0);
        cr_expect_eq(loglin_tuning_merge(directory, &tuning), LOGLIN_IO);
        cr_assert_eq(chmod(directory, 0700), 0);
    }
    setenv("LOGLIN_CACHE_DIR", "", 1);
    cr_expect_eq(loglin_tune(support_open()->id, NULL), LOGLIN_IO);
    loglin_tuning_free(&tuning);
}

/* ---- Import and export ------------------------------------------------------------------------------------------ */

Test(tuning, an_import_is_whole_or_nothing) {
    char path[96];
    snprintf(path, sizeof path, "%s/shared.json", directory);
    loglin_tuning tuning = all_kinds();
    cr_assert_eq(loglin_tuning_write(path, &tuning), LOGLIN_OK);
    cr_expect_eq(loglin_tuning_import(path), LOGLIN_OK, "%s", loglin_last_error());
    cr_expect_eq(stored(), 3u);
    loglin_entry bad = class_entry(65536, 48, 1, 200); /* a chunk size that there is not, with a good checksum */
    cr_assert_eq(loglin_tuning_add(&tuning, &bad), LOGLIN_OK);
    cr_assert_eq(loglin_tuning_write(path, &tuning), LOGLIN_OK);
    cr_expect_eq(loglin_tuning_import(path), LOGLIN_BAD_FILE);
    cr_expect(strstr(loglin_last_error(), "chunk") != NULL, "%s", loglin_last_error());
    cr_expect_eq(stored(), 3u);
    cr_expect_eq(loglin_tuning_import("/nowhere/at/all"), LOGLIN_IO);
    loglin_tuning_free(&tuning);
}

Test(tuning, an_export_can_be_imported) {
    loglin_device_info info;
    size_t count = 0;
    cr_assert_eq(loglin_list_devices(&info, 1, &count), LOGLIN_OK);
    char path[96];
    snprintf(path, sizeof path, "%s/shared.json", directory);
    cr_expect_eq(loglin_tuning_export(info.id, path), LOGLIN_IO, "there is nothing to export");
    loglin_tuning tuning = {.identity = loglin_identity_of(&info)}, read;
    const loglin_entry entry = class_entry(1024, 32, 1, 1);
    cr_assert_eq(loglin_tuning_add(&tuning, &entry), LOGLIN_OK);
    cr_assert_eq(loglin_tuning_merge(directory, &tuning), LOGLIN_OK);
    cr_expect_eq(loglin_tuning_export(info.id, path), LOGLIN_OK, "%s", loglin_last_error());
    cr_assert_eq(loglin_tuning_read(path, &read), LOGLIN_OK);
    cr_expect_eq(read.count, 1u);
    struct stat status;
    cr_expect(stat(path, &status) == 0 && (status.st_mode & 0777) == 0644, "an export is to be shared");
    cr_expect_eq(loglin_tuning_export(info.id, directory), LOGLIN_IO, "a directory was replaced");
    snprintf(path, sizeof path, "%s/fifo", directory);
    cr_assert_eq(mkfifo(path, 0600), 0);
    cr_expect_eq(loglin_tuning_export(info.id, path), LOGLIN_IO);
    cr_expect(stat(path, &status) == 0 && S_ISFIFO(status.st_mode), "a device file was replaced");
    loglin_tuning_free(&read);
    loglin_tuning_free(&tuning);
}

/* ---- Looking up ------------------------------------------------------------------------------------------------- */

static loglin_choice find(const loglin_source *sources, size_t count, unsigned length) {
    const loglin_class class = class_entry(length, 64, 1, 1).class;
    return loglin_tuning_find(sources, count, &NOW, &class, LOGLIN_ENGINE_BLAS);
}

static void expect_choice(const loglin_source *sources, size_t count, unsigned length, unsigned chunk,
                          const char *where) {
    const loglin_choice choice = find(sources, count, length);
    cr_expect_eq(choice.configuration.values[LOGLIN_TUNABLE_CHUNK], chunk, "chunk %u, expected %u (%s)",
                 choice.configuration.values[LOGLIN_TUNABLE_CHUNK], chunk, choice.where);
    cr_expect(strstr(choice.where, where) != NULL, "\"%s\" lacks \"%s\"", choice.where, where);
}

Test(tuning, lookups_go_from_the_class_to_the_default) {
    loglin_tuning own = one_class(1024, 128), table = one_class(4096, 256), family = one_class(8192, 32);
    loglin_entry stale = class_entry(2048, 16, 0.1, 1);
    strcpy(stale.stamp.driver, "0.9");
    cr_assert_eq(loglin_tuning_add(&own, &stale), LOGLIN_OK);
    const loglin_source sources[] = {
        {LOGLIN_SOURCE_FAMILY, &family}, {LOGLIN_SOURCE_BUILT_IN, &table}, {LOGLIN_SOURCE_OWN, &own}};
    expect_choice(sources, 3, 1024, 128, "tuned");
    expect_choice(sources, 3, 2048, 16, "stale");
    expect_choice(sources, 3, 4096, 256, "built-in table");
    expect_choice(sources, 3, 512, 128, "tuned for mamba2 f32 K128 V64 shared T1024 forward");
    expect_choice(sources, 3, 8192, 128, "tuned for"); /* a neighbour of the device before its family's own class */
    expect_choice(sources, 2, 16384, 256, "built-in table for");
    expect_choice(sources, 1, 8192, 32, "built-in table of Gadget 7");
    expect_choice(sources, 1, 4096, 32, "built-in table of Gadget 7 for");
    expect_choice(NULL, 0, 1024, 64, "default");
    const loglin_class other = {
        .op = LOGLIN_GATED_DELTA, .dim_k = 128, .dim_v = 64, .length = 1024, .phase = LOGLIN_FORWARD};
    cr_expect_not(loglin_tuning_find(sources, 3, &NOW, &other, LOGLIN_ENGINE_BLAS).found);
    const loglin_class class = class_entry(1024, 64, 1, 1).class;
    cr_expect_not(loglin_tuning_find(sources, 3, &NOW, &class, LOGLIN_ENGINE_FUSED).found);
    loglin_tuning_free(&own);
    loglin_tuning_free(&table);
    loglin_tuning_free(&family);
}

/* One engine's results say nothing of which is the faster: both must be known, for the same class. */
Test(tuning, an_engine_is_preferred_where_both_are_known) {
    loglin_tuning own = one_class(1024, 128);
    const loglin_source source = {LOGLIN_SOURCE_OWN, &own};
    loglin_entry fused = class_entry(2048, 64, 0.1, 1);
    const loglin_class class = class_entry(1024, 64, 1, 1).class;
    fused.configuration.engine = LOGLIN_ENGINE_FUSED;
    cr_expect_not(loglin_tuning_find(&source, 1, &NOW, &class, LOGLIN_ENGINE_AUTO).found);
    cr_assert_eq(loglin_tuning_add(&own, &fused), LOGLIN_OK);
    cr_expect_not(loglin_tuning_find(&source, 1, &NOW, &class, LOGLIN_ENGINE_AUTO).found);
    fused.class.length = 1024;
    for (int faster = 0; faster < 2; faster++) {
        fused.ms = faster != 0 ? 0.1 : 10;
        fused.tuned_at++;
        cr_assert_eq(loglin_tuning_add(&own, &fused), LOGLIN_OK);
        const loglin_choice choice = loglin_tuning_find(&source, 1, &NOW, &class, LOGLIN_ENGINE_AUTO);
        cr_expect(choice.found);
        cr_expect_eq(choice.configuration.engine, faster != 0 ? LOGLIN_ENGINE_FUSED : LOGLIN_ENGINE_BLAS);
    }
    loglin_tuning_free(&own);
}

/* A plan finds what was written for its device, says so, and what is asked for goes first. */
Test(tuning, plans_follow_results) {
    const support_device *device = support_open();
    loglin_device_info info;
    size_t count = 0;
    cr_assert_eq(loglin_list_devices(&info, 1, &count), LOGLIN_OK);
    loglin_problem problem = {.engine = LOGLIN_ENGINE_BLAS,
                              .batch = 1,
                              .length = 64,
                              .heads = 2,
                              .groups = 1,
                              .dim_k = 8,
                              .dim_v = 8,
                              .levels = 7};
    loglin_tuning tuning = {.identity = loglin_identity_of(&info)};
    loglin_entry entry = class_entry(64, 32, 1, 1);
    entry.stamp = loglin_stamp_of(&info);
    entry.class.dim_k = entry.class.dim_v = 8;
    cr_assert_eq(loglin_tuning_add(&tuning, &entry), LOGLIN_OK);
    cr_assert_eq(loglin_tuning_merge(directory, &tuning), LOGLIN_OK);
    loglin_device *fresh;
    support_require(loglin_device_create(device->context, device->id, &fresh), "loglin_device_create");
    for (size_t asked = 0; asked <= 16; asked += 16) {
        loglin_plan *plan;
        char text[1024];
        problem.chunk = asked;
        support_require(loglin_plan_create(fresh, &problem, &plan), "loglin_plan_create");
        (void)loglin_plan_describe(plan, text, sizeof text);
        cr_expect(strstr(text, asked == 0 ? "chunk 32 (tuned)" : "chunk 16 (as asked)") != NULL, "%s", text);
        loglin_plan_destroy(plan);
    }
    loglin_device_destroy(fresh);
    loglin_tuning_free(&tuning);
}

Test(tuning, built_in_tables_are_good) {
    size_t length = 0, count = 0;
    for (const char *text; (text = loglin_built_in_tuning(count, &length)) != NULL; count++) {
        loglin_tuning table;
        cr_expect_eq(loglin_tuning_parse("table", text, length, &table), LOGLIN_OK, "%s", loglin_last_error());
        cr_expect_gt(table.count, 0u);
        loglin_tuning_free(&table);
    }
    cr_expect_gt(count, 0u);
}

/* ---- The journal ------------------------------------------------------------------------------------------------ */

static loglin_journal *open_journal(bool resume, uint64_t *seed) {
    char path[96];
    snprintf(path, sizeof path, "%s/journal", directory);
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
    snprintf(path, sizeof path, "%s/journal", directory);
    FILE *stream = fopen(path, "r");
    size_t count = 0;
    while (fgets(line, sizeof line, stream) != NULL) {
        count += strncmp(line, "{\"end\"", 6) == 0 && line[strlen(line) - 1] == '\n';
    }
    fclose(stream);
    return count;
}

/* Killed at any write, a run that goes on repeats at most the measurement that it was at. */
Test(tuning, an_interrupted_search_loses_only_what_it_was_at) {
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

Test(tuning, what_takes_the_tuner_down_twice_is_not_tried_again) {
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
    cr_expect_eq(reply.outcome, LOGLIN_OUTCOME_FAILED);
    cr_expect_not(loglin_journal_find(journal, "others", &reply));
    loglin_journal_close(journal);
}

/* ---- Children --------------------------------------------------------------------------------------------------- */

static loglin_reply ask_script(const char *script, double limit) {
    char path[96];
    snprintf(path, sizeof path, "%s/worker", directory);
    write_text(path, script, strlen(script));
    cr_assert_eq(chmod(path, 0700), 0);
    return loglin_worker_ask(path, "{}", limit, NULL, NULL);
}

Test(tuning, children_that_hang_crash_or_babble_cost_one_candidate) {
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

/* Some loaders of OpenCL take OCL_ICD_FILENAMES apart in place; a child gets the list that the process was given. */
Test(tuning, children_see_all_drivers) {
    char *list = getenv("OCL_ICD_FILENAMES");
    if (list == NULL || strcmp(list, "one:two") != 0) { /* the list must be there from the start: once more, with it */
        char self[512], line[700];
        const ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
        cr_assert_gt(length, 0);
        self[length] = '\0';
        snprintf(line, sizeof line,
                 "env -u BXFI_MAP OCL_ICD_FILENAMES=one:two '%s' --filter tuning/children_see_all_drivers > '%s/log'",
                 self, directory);
        cr_expect_eq(system(line), 0);
        return;
    }
    list[3] = '\0';
    const loglin_reply reply = ask_script(
        "#!/bin/sh\necho '{\"ok\":true,\"reason\":\"\",\"detail\":\"'\"$OCL_ICD_FILENAMES\"'\",\"ms\":[1]}'\n", 60);
    cr_expect_str_eq(reply.detail, "one:two");
}

/* The real worker: both operators and phases are right and timed; an impossible request is refused. */
Test(tuning, the_worker_measures) {
    for (int which = 0; which < 4; which++) {
        loglin_device_info info;
        size_t count = 0;
        cr_assert_eq(loglin_list_devices(&info, 1, &count), LOGLIN_OK);
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

/* Whatever the fused engine of a CPU is tuned to, its results are right; the odd shape meets the ends of segments. */
Test(tuning, all_values_of_the_fused_engine_are_right) {
    loglin_device_info info;
    size_t count = 0;
    cr_assert_eq(loglin_list_devices(&info, 1, &count), LOGLIN_OK);
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

Test(tuning, the_reference_agrees_with_the_oracle) {
    for (int which = 0; which < 4; which++) {
        expect_reference(which % 2 != 0, which / 2 != 0);
    }
}
