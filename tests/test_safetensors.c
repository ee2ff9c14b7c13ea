/* SPDX-License-Identifier: Apache-2.0 */
/* Safetensors files: what is written is read back, and no file, however malformed, gets past the header's checks. */
#include "tensorfile/safetensors.h"

#include <criterion/criterion.h>
#include <dirent.h>
#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

/* A fresh directory for the test, and a path in it. */
static char directory[64];
static char path[96];

static void make_directory(void) {
    strcpy(directory, "/tmp/loglin-safetensors-XXXXXX");
    cr_assert_not_null(mkdtemp(directory));
    snprintf(path, sizeof path, "%s/file.safetensors", directory);
}

static size_t count_directory(void) {
    size_t count = 0;
    DIR *entries = opendir(directory);
    cr_assert_not_null(entries);
    for (const struct dirent *entry = readdir(entries); entry != NULL; entry = readdir(entries)) {
        count += entry->d_name[0] != '.';
    }
    closedir(entries);
    return count;
}

static void remove_directory(void) {
    unlink(path);
    cr_expect_eq(rmdir(directory), 0, "something is left in %s", directory);
}

/* A file of a header and `data_size` bytes of data, in memory of exactly its size. */
static unsigned char *make_file(const char *header, size_t data_size, size_t *size) {
    const size_t length = strlen(header);
    *size = 8 + length + data_size;
    unsigned char *bytes = calloc(*size, 1);
    cr_assert_not_null(bytes);
    for (size_t i = 0; i < 8; ++i) {
        bytes[i] = (unsigned char)((uint64_t)length >> (8 * i));
    }
    memcpy(bytes + 8, header, length);
    return bytes;
}

static void expect_error(const char *header, size_t data_size, const char *expected) {
    size_t size;
    unsigned char *bytes = make_file(header, data_size, &size);
    loglin_safetensors *file = NULL;
    loglin_tensor_error error = {""};
    cr_expect_not(loglin_safetensors_parse(bytes, size, &file, &error), "accepted: %s", header);
    cr_expect_null(file);
    cr_expect_not_null(strstr(error.text, expected), "\"%s\" is not in \"%s\"", expected, error.text);
    free(bytes);
}

static void expect_good(const char *header, size_t data_size) {
    size_t size;
    unsigned char *bytes = make_file(header, data_size, &size);
    loglin_safetensors *file = NULL;
    loglin_tensor_error error = {""};
    cr_expect(loglin_safetensors_parse(bytes, size, &file, &error), "%s: %s", header, error.text);
    loglin_safetensors_close(file);
    free(bytes);
}

Test(safetensors, round_trip, .init = make_directory, .fini = remove_directory) {
    const float f32[6] = {0.0F, -1.5F, 3.25F, INFINITY, 1e-40F, -0.0F};
    const uint16_t f16[3] = {0x3c00, 0xfbff, 0x0001};
    const uint16_t bf16[1] = {0x3f80};
    const int32_t i32[2] = {INT32_MIN, INT32_MAX};
    const int64_t i64[2] = {INT64_MIN, INT64_MAX};
    const loglin_tensor tensors[] = {
        {"half", LOGLIN_TENSOR_F16, 1, {3}, f16, sizeof f16},
        {"floats", LOGLIN_TENSOR_F32, 2, {2, 3}, f32, sizeof f32},
        {"scalar", LOGLIN_TENSOR_BF16, 0, {0}, bf16, sizeof bf16},
        {"empty", LOGLIN_TENSOR_F32, 3, {4, 0, 5}, NULL, 0},
        {"ints", LOGLIN_TENSOR_I32, 1, {2}, i32, sizeof i32},
        {"longs \"quoted\" \xc3\xa9", LOGLIN_TENSOR_I64, 1, {2}, i64, sizeof i64},
        {"eight", LOGLIN_TENSOR_I64, 8, {1, 1, 1, 2, 1, 1, 1, 1}, i64, sizeof i64},
    };
    const size_t count = sizeof tensors / sizeof tensors[0];
    const loglin_tensor_metadata metadata[] = {{"format", "pt"}, {"note", "two\nlines"}};
    loglin_tensor_error error = {""};
    cr_assert(loglin_safetensors_write(path, tensors, count, metadata, 2, &error), "%s", error.text);
    cr_expect_eq(count_directory(), 1);

    loglin_safetensors *file;
    cr_assert(loglin_safetensors_open(path, &file, &error), "%s", error.text);
    cr_expect_eq(loglin_safetensors_count(file), count);
    for (size_t i = 0; i < count; ++i) {
        const loglin_tensor *read = loglin_safetensors_find(file, tensors[i].name);
        cr_assert_not_null(read, "%s", tensors[i].name);
        cr_expect_str_eq(read->name, tensors[i].name);
        cr_expect_eq(read->dtype, tensors[i].dtype);
        cr_expect_eq(read->rank, tensors[i].rank);
        cr_expect_eq(read->size, tensors[i].size);
        cr_expect_eq(memcmp(read->shape, tensors[i].shape, read->rank * sizeof read->shape[0]), 0);
        cr_expect(read->size == 0 || memcmp(read->data, tensors[i].data, read->size) == 0);
        cr_expect_eq((uintptr_t)read->data % loglin_tensor_dtype_size(read->dtype), 0, "%s", read->name);
        cr_expect_eq(loglin_tensor_count(read), read->size / loglin_tensor_dtype_size(read->dtype));
    }
    for (size_t i = 1; i < count; ++i) {
        cr_expect_lt(strcmp(loglin_safetensors_at(file, i - 1)->name, loglin_safetensors_at(file, i)->name), 0);
    }
    cr_expect_null(loglin_safetensors_find(file, "absent"));
    cr_expect_str_eq(loglin_safetensors_metadata(file, "note"), "two\nlines");
    cr_expect_null(loglin_safetensors_metadata(file, "absent"));
    loglin_safetensors_close(file);
}

Test(safetensors, no_tensors, .init = make_directory, .fini = remove_directory) {
    loglin_tensor_error error = {""};
    cr_assert(loglin_safetensors_write(path, NULL, 0, NULL, 0, &error), "%s", error.text);
    loglin_safetensors *file;
    cr_assert(loglin_safetensors_open(path, &file, &error), "%s", error.text);
    cr_expect_eq(loglin_safetensors_count(file), 0);
    cr_expect_null(loglin_safetensors_find(file, "q"));
    cr_expect_null(loglin_safetensors_metadata(file, "format"));
    loglin_safetensors_close(file);
}

Test(safetensors, real_file) {
    loglin_safetensors *file;
    loglin_tensor_error error = {""};
    cr_assert(loglin_safetensors_open(TEST_DATA_DIR "/mamba2_real_activations.safetensors", &file, &error), "%s",
              error.text);
    const loglin_tensor *q = loglin_safetensors_find(file, "q");
    cr_assert_not_null(q);
    cr_expect_eq(q->rank, 4);
    cr_expect_eq(q->shape[1], 777);
    cr_expect_eq(q->shape[3], 64);
    loglin_safetensors_close(file);
}

Test(safetensors, accepted_headers) {
    expect_good("{}", 0);
    expect_good("{}      ", 0);
    expect_good("{\"__metadata__\":{}}", 0);
    expect_good("{\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]}}", 4);
    expect_good("{\"a\":{\"data_offsets\":[0,0],\"dtype\":\"F32\",\"shape\":[0,3]},"
                "\"b\":{\"dtype\":\"F16\",\"shape\":[1],\"data_offsets\":[0,2]},"
                "\"c\":{\"dtype\":\"I64\",\"shape\":[0],\"data_offsets\":[2,2]}}",
                2);
    /* An extent of 0 makes any other harmless. */
    expect_good("{\"a\":{\"dtype\":\"F32\",\"shape\":[0,4611686018427387904],\"data_offsets\":[0,0]}}", 0);
}

Test(safetensors, malformed_headers) {
    expect_error("", 0, "does not begin with '{'");
    expect_error(" {}", 0, "does not begin with '{'");
    expect_error("[]", 0, "does not begin with '{'");
    expect_error("{", 0, "is not JSON");
    expect_error("{}x", 0, "is not JSON");
    expect_error("{\"a\":\"\xff\"}", 0, "is not JSON");
    expect_error("{\"a\":\"\\u0000\"}", 0, "is not JSON");
    expect_error("{\"a\":1,\"a\":2}", 0, "duplicate");
    expect_error("{\"__metadata__\":[]}", 0, "__metadata__ is not an object");
    expect_error("{\"__metadata__\":{\"k\":1}}", 0, "\"k\" is not a string");
    expect_error("{\"a\":[]}", 0, "is not an object");
    expect_error("{\"a\":{}}", 0, "is not an object of dtype, shape and data_offsets");
    expect_error("{\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4],\"x\":0}}", 4, "is not an object of");
    expect_error("{\"\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]}}", 4, "empty name");
}

Test(safetensors, malformed_tensors) {
    expect_error("{\"a\":{\"dtype\":1,\"shape\":[],\"data_offsets\":[0,4]}}", 4, "has no dtype");
    expect_error("{\"a\":{\"dtype\":\"F8\",\"shape\":[],\"data_offsets\":[0,4]}}", 4, "dtype \"F8\", expected F32");
    expect_error("{\"a\":{\"dtype\":\"F32\",\"shape\":4,\"data_offsets\":[0,4]}}", 4, "has no shape");
    expect_error("{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}", 4, "shape[0]");
    expect_error("{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1.0],\"data_offsets\":[0,4]}}", 4, "shape[1]");
    expect_error("{\"a\":{\"dtype\":\"F32\",\"shape\":[99999999999999999999],\"data_offsets\":[0,4]}}", 4, "not JSON");
    expect_error("{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,4]}}", 4,
                 "9 dimensions, expected at most 8");
    /* 2^62 * 4 bytes = 2^64, and 2^32 * 2^32 * 2^32 elements: 0 if it wrapped around. */
    expect_error("{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904],\"data_offsets\":[0,0]}}", 0, "overflows");
    expect_error("{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296,4294967296],\"data_offsets\":[0,0]}}", 0,
                 "overflows");
}

Test(safetensors, malformed_offsets) {
    expect_error("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":4}}", 4, "data_offsets is not");
    expect_error("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0]}}", 4, "data_offsets is not");
    expect_error("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4,8]}}", 8, "data_offsets is not");
    expect_error("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4.0]}}", 4, "data_offsets is not");
    expect_error("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[-4,0]}}", 4, "data_offsets is not");
    expect_error("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}}", 4, "data_offsets is [4, 0]");
    expect_error("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 3, "<= end <= 3");
    expect_error("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[9223372036854775803,9223372036854775807]}}",
                 4, "<= end <= 4");
    expect_error("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}", 4, "has 4 bytes, expected 8");
    expect_error("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
                 "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[2,6]}}",
                 6, "\"b\" begins at byte 2 and overlaps tensor \"a\"");
    expect_error("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
                 "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}",
                 4, "overlaps");
    expect_error("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
                 "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[6,10]}}",
                 10, "\"b\" begins at byte 6, expected 4");
    expect_error("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 5, "5 bytes, expected 4");
}

/* Control characters of a name do not reach the terminal. */
Test(safetensors, names_in_errors_are_printable) {
    expect_error("{\"a\\u001b[2J\":{}}", 0, "\"a?[2J\"");
}

Test(safetensors, header_lengths) {
    static const struct {
        unsigned char bytes[10];
        const char *expected;
    } files[] = {
        {{3, 0, 0, 0, 0, 0, 0, 0, '{', '}'}, "only 2 follow"},
        {{1, 0xe1, 0xf5, 5, 0, 0, 0, 0, '{', '}'}, "expected at most 100000000"},
        {{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, '{', '}'}, "expected at most 100000000"},
    };
    for (size_t i = 0; i < sizeof files / sizeof files[0]; ++i) {
        loglin_safetensors *file;
        loglin_tensor_error error = {""};
        cr_expect_not(loglin_safetensors_parse(files[i].bytes, sizeof files[i].bytes, &file, &error));
        cr_expect_not_null(strstr(error.text, files[i].expected), "%s", error.text);
    }
}

/* Every prefix of a file is an error; each is in memory of its own size, so that a sanitizer sees reads beyond it. */
Test(safetensors, every_truncation) {
    size_t size;
    unsigned char *bytes = make_file("{\"__metadata__\":{\"format\":\"pt\"},"
                                     "\"a\":{\"dtype\":\"F32\",\"shape\":[2,1],\"data_offsets\":[2,10]},"
                                     "\"b\":{\"dtype\":\"BF16\",\"shape\":[1],\"data_offsets\":[0,2]}}",
                                     10, &size);
    for (size_t length = 0; length < size; ++length) {
        unsigned char *prefix = malloc(length + 1);
        cr_assert_not_null(prefix);
        unsigned char *exact = prefix + 1; /* ends with the allocation */
        memcpy(exact, bytes, length);
        loglin_safetensors *file;
        loglin_tensor_error error;
        cr_expect_not(loglin_safetensors_parse(exact, length, &file, &error), "%zu bytes of %zu", length, size);
        free(prefix);
    }
    free(bytes);
}

/* Every single byte of a header changed to each of some values: an error or a file, never a crash. */
Test(safetensors, every_byte_changed) {
    static const unsigned char values[] = {0, '"', '{', '}', '[', ']', ',', '9', '-', 0x7f, 0xff};
    size_t size;
    unsigned char *bytes = make_file("{\"a\":{\"dtype\":\"F32\",\"shape\":[2,1],\"data_offsets\":[2,10]},"
                                     "\"b\":{\"dtype\":\"BF16\",\"shape\":[1],\"data_offsets\":[0,2]}}",
                                     10, &size);
    for (size_t i = 0; i < size - 10; ++i) {
        const unsigned char original = bytes[i];
        for (size_t j = 0; j < sizeof values; ++j) {
            bytes[i] = values[j];
            loglin_safetensors *file;
            loglin_tensor_error error;
            if (loglin_safetensors_parse(bytes, size, &file, &error)) {
                for (size_t k = 0; k < loglin_safetensors_count(file); ++k) {
                    const loglin_tensor *tensor = loglin_safetensors_at(file, k);
                    const unsigned char *data = tensor->data;
                    cr_expect(data >= bytes && data + tensor->size <= bytes + size);
                }
                loglin_safetensors_close(file);
            }
        }
        bytes[i] = original;
    }
    free(bytes);
}

static void expect_open_error(const char *name, const char *expected) {
    loglin_safetensors *file;
    loglin_tensor_error error = {""};
    cr_expect_not(loglin_safetensors_open(name, &file, &error), "%s", name);
    cr_expect_not_null(strstr(error.text, expected), "%s", error.text);
}

Test(safetensors, unreadable_files, .init = make_directory, .fini = remove_directory) {
    expect_open_error(path, "cannot be opened");
    expect_open_error(directory, "is not a regular file");
    expect_open_error("/dev/zero", "is not a regular file");
    cr_assert_eq(mkfifo(path, 0600), 0);
    expect_open_error(path, "is not a regular file");
    cr_assert_eq(unlink(path), 0);
    FILE *empty = fopen(path, "wb");
    cr_assert_not_null(empty);
    fclose(empty);
    expect_open_error(path, "0 bytes, expected at least 8");
}

/* ---- Writing ---------------------------------------------------------------------------------------------------- */

static void expect_write_error(loglin_tensor tensor, size_t count, const char *expected) {
    const loglin_tensor tensors[] = {tensor, tensor};
    loglin_tensor_error error = {""};
    cr_expect_not(loglin_safetensors_write(path, tensors, count, NULL, 0, &error));
    cr_expect_not_null(strstr(error.text, expected), "%s", error.text);
    cr_expect_eq(count_directory(), 0);
}

Test(safetensors, unwritable_tensors, .init = make_directory, .fini = remove_directory) {
    const float data[2] = {1.0F, 2.0F};
    expect_write_error((loglin_tensor){"", LOGLIN_TENSOR_F32, 1, {2}, data, 8}, 1, "cannot have the name");
    expect_write_error((loglin_tensor){"__metadata__", LOGLIN_TENSOR_F32, 1, {2}, data, 8}, 1, "cannot have the name");
    expect_write_error((loglin_tensor){"\xff", LOGLIN_TENSOR_F32, 1, {2}, data, 8}, 1, "is not UTF-8");
    expect_write_error((loglin_tensor){"a", LOGLIN_TENSOR_F32, 1, {2}, data, 4}, 1, "has 4 bytes");
    expect_write_error((loglin_tensor){"a", LOGLIN_TENSOR_F32, 2, {SIZE_MAX, 4}, data, 8}, 1, "has 8 bytes");
    expect_write_error((loglin_tensor){"a", LOGLIN_TENSOR_F32, 9, {1}, data, 4}, 1, "9 dimensions");
    expect_write_error((loglin_tensor){"a", LOGLIN_TENSOR_F32, 1, {2}, data, 8}, 2, "is there twice");
}

/* A write that fails half-way leaves neither a temporary file nor a changed one. */
Test(safetensors, failed_write_changes_nothing, .init = make_directory, .fini = remove_directory) {
    static const float data[4096];
    const loglin_tensor tensor = {"a", LOGLIN_TENSOR_F32, 1, {4096}, data, sizeof data};
    loglin_tensor_error error = {""};
    struct rlimit limit;
    cr_assert_eq(getrlimit(RLIMIT_FSIZE, &limit), 0);
    cr_assert_neq(signal(SIGXFSZ, SIG_IGN), SIG_ERR);
    const struct rlimit small = {.rlim_cur = 4096, .rlim_max = limit.rlim_max};
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &small), 0);
    const bool written = loglin_safetensors_write(path, &tensor, 1, NULL, 0, &error);
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
    cr_expect_not(written);
    cr_expect_not_null(strstr(error.text, "cannot be written"), "%s", error.text);
    cr_expect_eq(count_directory(), 0);

    char elsewhere[128];
    snprintf(elsewhere, sizeof elsewhere, "%s/absent/file", directory);
    cr_expect_not(loglin_safetensors_write(elsewhere, &tensor, 1, NULL, 0, &error));
    cr_expect_not_null(strstr(error.text, "cannot be created"), "%s", error.text);
    cr_expect_not(loglin_safetensors_write("/dev/null", &tensor, 1, NULL, 0, &error));
    cr_expect_not_null(strstr(error.text, "not a regular file"), "%s", error.text);
}

Test(safetensors, can_write, .init = make_directory, .fini = remove_directory) {
    loglin_tensor_error error = {""};
    char elsewhere[128];
    cr_expect(loglin_safetensors_can_write(path, &error), "%s", error.text);
    cr_expect_eq(count_directory(), 0);
    snprintf(elsewhere, sizeof elsewhere, "%s/absent/file", directory);
    cr_expect_not(loglin_safetensors_can_write(elsewhere, &error));
    cr_expect_not_null(strstr(error.text, "cannot be created"), "%s", error.text);
    cr_expect_not(loglin_safetensors_can_write("/dev/null", &error));
    cr_expect_not_null(strstr(error.text, "not a regular file"), "%s", error.text);
    cr_expect_not(loglin_safetensors_can_write("", &error));
    cr_expect_not_null(strstr(error.text, "its name is empty"), "%s", error.text);
}

/* /dev/stdout is such a link: it must not be what is replaced. */
Test(safetensors, links_are_followed, .init = make_directory, .fini = remove_directory) {
    const float data = 1.0F;
    const loglin_tensor tensor = {"a", LOGLIN_TENSOR_F32, 1, {1}, &data, 4};
    loglin_tensor_error error = {""};
    char link[128];
    struct stat status;
    snprintf(link, sizeof link, "%s/link", directory);
    cr_assert_eq(symlink("file.safetensors", link), 0);
    cr_expect_not(loglin_safetensors_can_write(link, &error));
    cr_expect_not_null(strstr(error.text, "cannot be replaced: No such file"), "%s", error.text);
    cr_assert(loglin_safetensors_write(path, NULL, 0, NULL, 0, &error), "%s", error.text);
    cr_expect(loglin_safetensors_can_write(link, &error), "%s", error.text);
    cr_assert(loglin_safetensors_write(link, &tensor, 1, NULL, 0, &error), "%s", error.text);
    cr_expect(lstat(link, &status) == 0 && S_ISLNK(status.st_mode), "the link was replaced");
    loglin_safetensors *file;
    cr_assert(loglin_safetensors_open(path, &file, &error), "%s", error.text);
    cr_expect_eq(loglin_safetensors_count(file), 1);
    loglin_safetensors_close(file);
    unlink(link);
}

Test(safetensors, write_replaces_and_honours_umask, .init = make_directory, .fini = remove_directory) {
    const float data[2] = {1.0F, 2.0F};
    const loglin_tensor first = {"a", LOGLIN_TENSOR_F32, 1, {2}, data, 8};
    const loglin_tensor second = {"b", LOGLIN_TENSOR_F32, 1, {1}, data + 1, 4};
    loglin_tensor_error error = {""};
    umask(027);
    cr_assert(loglin_safetensors_write(path, &first, 1, NULL, 0, &error), "%s", error.text);
    loglin_safetensors *before;
    cr_assert(loglin_safetensors_open(path, &before, &error), "%s", error.text);
    cr_assert(loglin_safetensors_write(path, &second, 1, NULL, 0, &error), "%s", error.text);
    struct stat status;
    cr_assert_eq(stat(path, &status), 0);
    cr_expect_eq(status.st_mode & 0777, 0640);
    loglin_safetensors *after;
    cr_assert(loglin_safetensors_open(path, &after, &error), "%s", error.text);
    cr_expect_not_null(loglin_safetensors_find(after, "b"));
    /* The replaced file can still be read by who has it open. */
    cr_expect_eq(memcmp(loglin_safetensors_find(before, "a")->data, data, 8), 0);
    loglin_safetensors_close(after);
    loglin_safetensors_close(before);
}

/* ---- Elements --------------------------------------------------------------------------------------------------- */

static float to_float(loglin_tensor_dtype dtype, uint16_t bits) {
    float value;
    loglin_tensor_to_float(dtype, &bits, 1, &value);
    return value;
}

static uint16_t from_float(loglin_tensor_dtype dtype, float value) {
    uint16_t bits;
    loglin_tensor_from_float(dtype, &value, 1, &bits);
    return bits;
}

/* Every 16-bit pattern survives, and a value between two neighbours goes to the nearer, a tie to the even one. */
static void check_all_patterns(loglin_tensor_dtype dtype, uint16_t infinity) {
    for (uint32_t i = 0; i <= UINT16_MAX; ++i) {
        const uint16_t bits = (uint16_t)i;
        const uint16_t magnitude = bits & 0x7fff;
        const float value = to_float(dtype, bits);
        if (magnitude > infinity) {
            cr_assert(isnan(value) && isnan(to_float(dtype, from_float(dtype, value))));
            continue;
        }
        cr_assert_eq(from_float(dtype, value), bits, "%#x", i);
        if (magnitude + 1 >= infinity) {
            continue;
        }
        const float next = to_float(dtype, (uint16_t)(bits + 1));
        const float middle = (float)(((double)value + (double)next) / 2);
        if (((double)middle) * 2 == (double)value + (double)next) { /* half the least BF16 is not a normal case */
            cr_assert_eq(from_float(dtype, middle), bits + (bits & 1), "%#x", i);
            cr_assert_eq(from_float(dtype, nextafterf(middle, value)), bits, "%#x", i);
            cr_assert_eq(from_float(dtype, nextafterf(middle, next)), bits + 1, "%#x", i);
        }
    }
}

Test(safetensors, half_precision) {
    check_all_patterns(LOGLIN_TENSOR_F16, 0x7c00);
    cr_expect_eq(to_float(LOGLIN_TENSOR_F16, 0x3555), 0.333251953125F);
    cr_expect_eq(to_float(LOGLIN_TENSOR_F16, 0x0001), 0x1p-24F);
    cr_expect_eq(from_float(LOGLIN_TENSOR_F16, 65519.0F), 0x7bff);
    cr_expect_eq(from_float(LOGLIN_TENSOR_F16, 65520.0F), 0x7c00);
    cr_expect_eq(from_float(LOGLIN_TENSOR_F16, -1e30F), 0xfc00);
}

Test(safetensors, bfloat16) {
    check_all_patterns(LOGLIN_TENSOR_BF16, 0x7f80);
    cr_expect_eq(to_float(LOGLIN_TENSOR_BF16, 0x3fc0), 1.5F);
    cr_expect_eq(from_float(LOGLIN_TENSOR_BF16, 3.4e38F), 0x7f80);
}
