/* SPDX-License-Identifier: Apache-2.0 */
/* What is known about devices: entries, their files, import and export, looking up. */
#include "plan/tuning.h"
#include "runtime/cache.h"
#include "support.h"
#include "support_tuning.h"

#include <criterion/criterion.h>
#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- Files of results ------------------------------------------------------------------------------------------- */

TestSuite(tuning, .init = support_make_cache, .fini = support_remove_cache);

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
    cr_assert_eq(loglin_tuning_merge(support_cache, &tuning), LOGLIN_OK, "%s", loglin_last_error());
    loglin_tuning_free(&tuning);
}

static size_t stored(void) {
    loglin_tuning tuning;
    cr_assert_eq(loglin_tuning_load(support_cache, &GADGET, &tuning), LOGLIN_OK);
    const size_t count = tuning.count;
    loglin_tuning_free(&tuning);
    return count;
}

/* Files in a cache directory's folder whose names have the word. */
static size_t count_files_of(const char *cache, const char *subfolder, const char *word) {
    char folder[120];
    snprintf(folder, sizeof folder, "%s/%s", cache, subfolder);
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

static size_t count_files(const char *word) {
    return count_files_of(support_cache, "tuning-1", word);
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
    char *path = loglin_tuning_path(support_cache, &GADGET, ".json");
    support_write_file(path, "{\"format\": \"loglin-tuning\"", 26);
    cr_expect_eq(stored(), 0u);
    cr_expect_eq(count_files(".damaged-"), 1u, "the damaged file is lost");
    merge(2048, 128);
    cr_expect_eq(stored(), 1u);
    support_write_file(path, "", 0);
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
                good = loglin_tuning_merge(support_cache, &tuning) == LOGLIN_OK && good;
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
        _exit(loglin_tuning_merge(support_cache, &tuning) == LOGLIN_OK ? 0 : 1);
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

/* Is the last error of a full disk, at a place on it? */
static bool says_full(loglin_status status) {
    return status == LOGLIN_IO && strstr(loglin_last_error(), support_disk) != NULL &&
           strstr(loglin_last_error(), "No space left on device") != NULL;
}

static size_t stored_on_disk(void) {
    loglin_tuning tuning;
    const bool loaded = loglin_tuning_load(support_disk, &GADGET, &tuning) == LOGLIN_OK;
    const size_t count = tuning.count;
    loglin_tuning_free(&tuning);
    return loaded ? count : 0;
}

/* What is merged, imported, exported and cached where there is no room. */
static const char *fill_and_merge(void) {
    loglin_tuning first = one_class(1024, 128), second = one_class(4096, 256);
    char path[120], text[4096];
    if (loglin_tuning_merge(support_disk, &first) != LOGLIN_OK) {
        return "a disk that is not full takes no results";
    }
    snprintf(path, sizeof path, "%s/export", support_cache);
    if (loglin_tuning_write(path, &second) != LOGLIN_OK) {
        return "no file to import";
    }
    support_fill_disk(0);
    if (!says_full(loglin_tuning_merge(support_disk, &second)) || !says_full(loglin_tuning_import(path))) {
        return "a merge or an import does not say what is full";
    }
    snprintf(path, sizeof path, "%s/export", support_disk);
    if (!says_full(loglin_tuning_write(path, &second)) || access(path, F_OK) == 0) {
        return "an export does not say what is full, or leaves a part";
    }
    if (stored_on_disk() != 1) {
        return "the old results are lost";
    }
    size_t size = 0;
    memset(text, 'x', sizeof text);
    loglin_cache_store(support_disk, "key", text, sizeof text);
    if (loglin_cache_load(support_disk, "key", &size) != NULL) {
        return "a program is read that there was no room for";
    }
    if (count_files_of(support_disk, "", "new-") + count_files_of(support_disk, "tuning-1", "new-") > 0) {
        return "a part of a file is left";
    }
    support_empty_disk();
    if (loglin_tuning_merge(support_disk, &second) != LOGLIN_OK || stored_on_disk() != 2) {
        return "results are not kept when there is room again";
    }
    loglin_tuning_free(&first);
    loglin_tuning_free(&second);
    return NULL;
}

Test(tuning, a_file_system_without_room_loses_nothing) {
    const int status = support_on_small_disk(fill_and_merge);
    if (status == SUPPORT_NO_DISK) {
        cr_skip_test("no file system may be mounted here");
    }
    cr_expect_eq(status, 0);
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
        cr_assert_eq(chmod(support_cache, 0500), 0);
        cr_expect_eq(loglin_tuning_merge(support_cache, &tuning), LOGLIN_IO);
        cr_assert_eq(chmod(support_cache, 0700), 0);
    }
    setenv("LOGLIN_CACHE_DIR", "", 1);
    cr_expect_eq(loglin_tune(support_open()->id, NULL), LOGLIN_IO);
    loglin_tuning_free(&tuning);
}

/* What could not be read again is not written over what can. */
Test(tuning, too_many_results_are_refused_and_lose_nothing) {
    loglin_tuning tuning = one_class(1024, 128);
    cr_assert_eq(loglin_tuning_merge(support_cache, &tuning), LOGLIN_OK);
    loglin_entry failed = {.kind = LOGLIN_ENTRY_FAILED, .stamp = NOW, .reason = "hung"};
    for (int i = 0; i < 12000; i++) {
        snprintf(failed.candidate, sizeof failed.candidate, "%-200d", i);
        cr_assert_eq(loglin_tuning_add(&tuning, &failed), LOGLIN_OK);
    }
    cr_expect_eq(loglin_tuning_merge(support_cache, &tuning), LOGLIN_IO);
    cr_expect_eq(stored(), 1u);
    loglin_tuning_free(&tuning);
}

/* ---- Import and export ------------------------------------------------------------------------------------------ */

Test(tuning, an_import_is_whole_or_nothing) {
    char path[96];
    snprintf(path, sizeof path, "%s/shared.json", support_cache);
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

/* What is no file of results at all is named for what it is. */
Test(tuning, an_import_says_what_a_file_is) {
    static const char *const texts[][2] = {
        {"", "empty"}, {"[]", "array"}, {" \n\n", "line 3"}, {"{}", "\"format\" is missing"}};
    char path[96];
    snprintf(path, sizeof path, "%s/shared.json", support_cache);
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        support_write_file(path, texts[i][0], strlen(texts[i][0]));
        cr_expect_eq(loglin_tuning_import(path), LOGLIN_BAD_FILE);
        cr_expect(strstr(loglin_last_error(), texts[i][1]) != NULL && strstr(loglin_last_error(), "line -") == NULL,
                  "%s", loglin_last_error());
    }
}

/* `from` becomes `to`, which is as long, in the text of a file, and its checksum is good again. */
static void forge(char *text, const char *from, const char *to) {
    loglin_tuning none;
    char *place = strstr(text, from);
    cr_assert_not_null(place);
    memcpy(place, to, strlen(to));
    cr_assert_eq(loglin_tuning_parse("forged", text, strlen(text), &none), LOGLIN_BAD_FILE);
    const char *wanted = strstr(loglin_last_error(), "expected ");
    char *checksum = strstr(text, "\"checksum\": \"");
    cr_assert(wanted != NULL && checksum != NULL, "%s", loglin_last_error());
    memcpy(checksum + strlen("\"checksum\": \""), wanted + strlen("expected "), 32);
}

/* What an import takes can be written and read again: else it would cost all results that are there. */
Test(tuning, an_import_cannot_spoil_what_is_there) {
    char path[96];
    snprintf(path, sizeof path, "%s/shared.json", support_cache);
    merge(1024, 128);
    loglin_tuning tuning = one_class(1u << 30, 64);
    char *text = loglin_tuning_print(&tuning);
    forge(text, "1073741824", "2147483648");
    support_write_file(path, text, strlen(text));
    cr_expect_eq(loglin_tuning_import(path), LOGLIN_BAD_FILE);
    cr_expect(strstr(loglin_last_error(), "length") != NULL, "%s", loglin_last_error());
    cr_expect_eq(stored(), 1u);
    cr_expect_eq(count_files(".damaged-"), 0u);
    free(text);
    loglin_tuning_free(&tuning);
}

Test(tuning, an_export_can_be_imported) {
    const loglin_device_info info = support_device_info();
    char path[96];
    snprintf(path, sizeof path, "%s/shared.json", support_cache);
    cr_expect_eq(loglin_tuning_export(info.id, path), LOGLIN_IO, "there is nothing to export");
    loglin_tuning tuning = {.identity = loglin_identity_of(&info)}, read;
    const loglin_entry entry = class_entry(1024, 32, 1, 1);
    cr_assert_eq(loglin_tuning_add(&tuning, &entry), LOGLIN_OK);
    cr_assert_eq(loglin_tuning_merge(support_cache, &tuning), LOGLIN_OK);
    cr_expect_eq(loglin_tuning_export(info.id, path), LOGLIN_OK, "%s", loglin_last_error());
    cr_assert_eq(loglin_tuning_read(path, &read), LOGLIN_OK);
    cr_expect_eq(read.count, 1u);
    struct stat status;
    cr_expect(stat(path, &status) == 0 && (status.st_mode & 0777) == 0644, "an export is to be shared");
    char link[96];
    snprintf(link, sizeof link, "%s/link", support_cache);
    cr_assert_eq(symlink("shared.json", link), 0);
    cr_expect_eq(loglin_tuning_export(info.id, link), LOGLIN_OK, "%s", loglin_last_error());
    cr_expect(lstat(link, &status) == 0 && S_ISLNK(status.st_mode), "a link was replaced");
    cr_assert_eq(unlink(path), 0);
    cr_expect_eq(loglin_tuning_export(info.id, link), LOGLIN_IO, "a link that leads nowhere was replaced");
    cr_expect_eq(loglin_tuning_export(info.id, support_cache), LOGLIN_IO, "a directory was replaced");
    snprintf(path, sizeof path, "%s/fifo", support_cache);
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
    const loglin_source others[] = {{LOGLIN_SOURCE_FOREIGN, &own}, {LOGLIN_SOURCE_FAMILY, &family}};
    expect_choice(others, 2, 1024, 32,
                  "built-in table of Gadget 7 for"); /* a neighbour of its vendor before a foreign class */
    expect_choice(others, 1, 1024, 128, "built-in table of Gadget 7");
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

/* A processor that no table names takes that of its vendor before another's, and another's before nothing. */
Test(tuning, tables_of_the_vendor_come_first) {
    const loglin_identity xeon = {"pthread-Xeon", "GenuineIntel", "PoCL", "CPU"};
    const loglin_identity other_xeon = {"pthread-Xeon 2", "GenuineIntel", "PoCL", "CPU"};
    const loglin_identity epyc = {"pthread-EPYC", "AuthenticAMD", "PoCL", "CPU"};
    const loglin_identity gpu = {"pthread-Xeon", "GenuineIntel", "PoCL", "GPU"};
    loglin_source_kind kind;
    cr_expect(loglin_tuning_relate(&xeon, &xeon, &kind) && kind == LOGLIN_SOURCE_BUILT_IN);
    cr_expect(loglin_tuning_relate(&xeon, &other_xeon, &kind) && kind == LOGLIN_SOURCE_FAMILY);
    cr_expect(loglin_tuning_relate(&xeon, &epyc, &kind) && kind == LOGLIN_SOURCE_FOREIGN);
    cr_expect_not(loglin_tuning_relate(&xeon, &gpu, &kind));
    /* Their times are no reason: they are of different machines. */
    loglin_tuning intel = {.identity = xeon}, amd = {.identity = epyc};
    loglin_entry gemm = {.kind = LOGLIN_ENTRY_GEMM, .stamp = NOW, .ms = 1};
    gemm.configuration.gemm = (loglin_gemm_parameters){{64, 8, 8, 8, 8, 2, 1, 8, 0, 0}};
    cr_assert_eq(loglin_tuning_add(&intel, &gemm), LOGLIN_OK);
    gemm.ms = 2;
    gemm.configuration.gemm = (loglin_gemm_parameters){{64, 32, 8, 16, 8, 2, 2, 2, 1, 1}};
    cr_assert_eq(loglin_tuning_add(&amd, &gemm), LOGLIN_OK);
    const loglin_source sources[] = {{LOGLIN_SOURCE_FOREIGN, &intel}, {LOGLIN_SOURCE_FAMILY, &amd}};
    cr_expect_eq(find(sources, 2, 1024).configuration.gemm.values[LOGLIN_GEMM_MDIMCD], 32u);
    cr_expect_eq(find(sources, 1, 1024).configuration.gemm.values[LOGLIN_GEMM_MDIMCD], 8u);
    loglin_tuning_free(&intel);
    loglin_tuning_free(&amd);
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

/* A problem, and the result for its class that a plan for it is to find. */
static const loglin_problem FOUND = {.engine = LOGLIN_ENGINE_BLAS,
                                     .batch = 1,
                                     .length = 64,
                                     .heads = 2,
                                     .groups = 1,
                                     .dim_k = 8,
                                     .dim_v = 8,
                                     .levels = 7};

static loglin_status merge_found(const char *cache) {
    const loglin_device_info info = support_device_info();
    loglin_tuning tuning = {.identity = loglin_identity_of(&info)};
    loglin_entry entry = class_entry(64, 32, 1, 1);
    entry.stamp = loglin_stamp_of(&info);
    entry.class.dim_k = entry.class.dim_v = 8;
    loglin_status status = loglin_tuning_add(&tuning, &entry);
    status = status == LOGLIN_OK ? loglin_tuning_merge(cache, &tuning) : status;
    loglin_tuning_free(&tuning);
    return status;
}

/* Does a new plan say so of its chunk size? */
static bool plan_says(size_t chunk, const char *expected) {
    const support_device *device = support_open();
    loglin_problem problem = FOUND;
    loglin_device *fresh;
    loglin_plan *plan;
    char text[1024];
    problem.chunk = chunk;
    support_require(loglin_device_create(device->context, device->id, &fresh), "loglin_device_create");
    support_require(loglin_plan_create(fresh, &problem, &plan), "loglin_plan_create");
    (void)loglin_plan_describe(plan, text, sizeof text);
    loglin_plan_destroy(plan);
    loglin_device_destroy(fresh);
    return strstr(text, expected) != NULL;
}

/* A plan finds what was written for its device, says so, and what is asked for goes first. */
Test(tuning, plans_follow_results) {
    cr_assert_eq(merge_found(support_cache), LOGLIN_OK);
    cr_expect(plan_says(0, "chunk 32 (tuned)"));
    cr_expect(plan_says(16, "chunk 16 (as asked)"));
}

/* Plans are made with what a home holds that cannot be written; a tuner says at once that it cannot keep anything. */
static const char *freeze_and_plan(void) {
    if (merge_found(support_disk) != LOGLIN_OK) {
        return "a disk that is not full takes no results";
    }
    support_freeze_disk();
    if (!plan_says(0, "chunk 32 (tuned)")) {
        return "a plan does not find the results";
    }
    const loglin_status status = loglin_tune(support_open()->id, NULL);
    if (status != LOGLIN_IO || strstr(loglin_last_error(), support_disk) == NULL ||
        strstr(loglin_last_error(), "Read-only file system") == NULL) {
        return "the tuner does not say what cannot be written";
    }
    char path[120];
    snprintf(path, sizeof path, "%s/export", support_cache);
    return loglin_tuning_export(support_open()->id, path) != LOGLIN_OK ? "the results cannot be exported" : NULL;
}

Test(tuning, a_home_may_be_read_only) {
    const int status = support_on_small_disk(freeze_and_plan);
    if (status == SUPPORT_NO_DISK) {
        cr_skip_test("no file system may be mounted here");
    }
    cr_expect_eq(status, 0);
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
