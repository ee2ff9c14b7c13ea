/* SPDX-License-Identifier: Apache-2.0 */
/* The command as its users run it: a child process, files in and out, exit statuses and messages. */
#include "tensorfile/safetensors.h"

#include <criterion/criterion.h>
#include <dirent.h>
#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* ---- Files of a test -------------------------------------------------------------------------------------------- */

/* A fresh directory, and the paths that tests use in it. */
static char directory[64];
static char in_path[96], out_path[96], other_path[96], stdout_path[96], stderr_path[96];

static void make_directory(void) {
    strcpy(directory, "/tmp/loglin-command-XXXXXX");
    cr_assert_not_null(mkdtemp(directory));
    snprintf(in_path, sizeof in_path, "%s/in.safetensors", directory);
    snprintf(out_path, sizeof out_path, "%s/out.safetensors", directory);
    snprintf(other_path, sizeof other_path, "%s/other.safetensors", directory);
    snprintf(stdout_path, sizeof stdout_path, "%s/stdout", directory);
    snprintf(stderr_path, sizeof stderr_path, "%s/stderr", directory);
}

static void remove_directory(void) {
    unlink(in_path);
    unlink(out_path);
    unlink(other_path);
    unlink(stdout_path);
    unlink(stderr_path);
    cr_expect_eq(rmdir(directory), 0, "something is left in %s", directory);
}

TestSuite(command, .init = make_directory, .fini = remove_directory);

static char *read_text(const char *path) {
    static char text[2][16384];
    char *buffer = text[path == stderr_path];
    FILE *stream = fopen(path, "rb");
    cr_assert_not_null(stream);
    buffer[fread(buffer, 1, sizeof text[0] - 1, stream)] = '\0';
    fclose(stream);
    return buffer;
}

/* Starts the command; what it prints goes to stdout_path and stderr_path. */
static pid_t start_command(char *const *arguments) {
    const pid_t child = fork();
    cr_assert_geq(child, 0);
    if (child == 0) {
        const int out = open(stdout_path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
        const int err = open(stderr_path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
        if (out < 0 || err < 0 || dup2(out, STDOUT_FILENO) < 0 || dup2(err, STDERR_FILENO) < 0) {
            _exit(126);
        }
        execv(LOGLIN_COMMAND, arguments);
        _exit(127);
    }
    return child;
}

/* Runs the command once: its exit status. */
static int execute(char *const *arguments) {
    const pid_t child = start_command(arguments);
    int status;
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_assert(WIFEXITED(status), "the command ended with signal %d", WTERMSIG(status));
    return WEXITSTATUS(status);
}

/* LeakSanitizer's tracer now and then crashes on PoCL's threads at the end of a process, which says nothing of it. */
static bool leak_check_crashed(void) {
    return strstr(read_text(stderr_path), "LeakSanitizer has encountered a fatal error") != NULL;
}

/* Runs the command with arguments up to NULL; what it prints is in stdout_path and stderr_path.  Its exit status. */
static int run(const char *first, ...) {
    char *arguments[24] = {LOGLIN_COMMAND, (char *)first};
    size_t count = 1;
    va_list list;
    va_start(list, first);
    while (arguments[count] != NULL) {
        cr_assert_lt(++count, 23);
        arguments[count] = va_arg(list, char *);
    }
    va_end(list);
    int status;
    int attempts = 0;
    do {
        status = execute(arguments);
    } while (leak_check_crashed() && ++attempts < 3);
    return status;
}

/* ---- Inputs ----------------------------------------------------------------------------------------------------- */

enum { MAX_TENSORS = 16 };

/* The tensors of an input file that is being made. */
typedef struct input {
    loglin_tensor tensors[MAX_TENSORS];
    size_t count;
} input;

static loglin_tensor *get(input *file, const char *name) {
    for (size_t i = 0; i < file->count; ++i) {
        if (strcmp(file->tensors[i].name, name) == 0) {
            return &file->tensors[i];
        }
    }
    cr_assert(file->count < MAX_TENSORS);
    loglin_tensor *tensor = &file->tensors[file->count++];
    *tensor = (loglin_tensor){.name = name};
    return tensor;
}

static void drop(input *file, const char *name) {
    loglin_tensor *tensor = get(file, name);
    free((void *)tensor->data);
    *tensor = file->tensors[--file->count];
}

/* Adds or replaces a tensor, its elements 0. */
static void *set(input *file, const char *name, loglin_tensor_dtype dtype, size_t rank, const size_t *shape) {
    loglin_tensor *tensor = get(file, name);
    free((void *)tensor->data);
    tensor->dtype = dtype;
    tensor->rank = rank;
    tensor->size = loglin_tensor_dtype_size(dtype);
    for (size_t i = 0; i < rank; ++i) {
        tensor->shape[i] = shape[i];
        tensor->size *= shape[i];
    }
    void *data = calloc(tensor->size + 1, 1);
    cr_assert_not_null(data);
    tensor->data = data;
    return data;
}

#define SHAPE(...)                                                                                                     \
    sizeof((size_t[]){__VA_ARGS__}) / sizeof(size_t), (size_t[]) {                                                     \
        __VA_ARGS__                                                                                                    \
    }

static float random_unit(void) {
    static uint32_t state = 12345;
    state = state * 1664525U + 1013904223U;
    return (float)(state >> 8) * 0x1p-24F;
}

/* Adds a tensor with elements between `least` and `most`. */
static void set_random(input *file, const char *name, loglin_tensor_dtype dtype, float least, float most, size_t rank,
                       const size_t *shape) {
    char *data = set(file, name, dtype, rank, shape);
    const loglin_tensor *tensor = get(file, name);
    for (size_t i = 0; i < loglin_tensor_count(tensor); ++i) {
        const float value = least + (most - least) * random_unit();
        loglin_tensor_from_float(dtype, &value, 1, data + i * loglin_tensor_dtype_size(dtype));
    }
}

enum { HEADS = 4, GROUPS = 2, DIM_K = 3, DIM_V = 5, LEVELS = 6 };

/* A good file; with beta if delta. */
static input make_input(loglin_tensor_dtype dtype, size_t batch, size_t length, bool delta) {
    input file = {.count = 0};
    set_random(&file, "q", dtype, -0.5F, 0.5F, SHAPE(batch, length, GROUPS, DIM_K));
    set_random(&file, "k", dtype, -0.5F, 0.5F, SHAPE(batch, length, GROUPS, DIM_K));
    set_random(&file, "v", dtype, -1.0F, 1.0F, SHAPE(batch, length, HEADS, DIM_V));
    set_random(&file, "g", LOGLIN_TENSOR_F32, -1.0F, 0.0F, SHAPE(batch, length, HEADS));
    set_random(&file, "level_scales", LOGLIN_TENSOR_F32, 0.0F, 1.0F, SHAPE(batch, length, HEADS, LEVELS));
    if (delta) {
        set_random(&file, "beta", LOGLIN_TENSOR_F32, 0.0F, 1.0F, SHAPE(batch, length, HEADS));
    }
    return file;
}

static void write_input(const input *file, const char *path) {
    loglin_tensor_error error = {""};
    cr_assert(loglin_safetensors_write(path, file->tensors, file->count, NULL, 0, &error), "%s", error.text);
}

static void free_input(input *file) {
    for (size_t i = 0; i < file->count; ++i) {
        free((void *)file->tensors[i].data);
    }
    file->count = 0;
}

static loglin_safetensors *open_file(const char *path) {
    loglin_safetensors *file;
    loglin_tensor_error error = {""};
    cr_assert(loglin_safetensors_open(path, &file, &error), "%s: %s", path, error.text);
    return file;
}

/* ---- Command line ----------------------------------------------------------------------------------------------- */

/* Runs, and expects exit status 2, a message, and that nothing but what was there before is in the directory. */
#define EXPECT_BAD(message, ...)                                                                                       \
    do {                                                                                                               \
        cr_expect_eq(run(__VA_ARGS__, NULL), 2, "expected failure: %s", message);                                      \
        cr_expect_not_null(strstr(read_text(stderr_path), message), "\"%s\" is not in \"%s\"", message,                \
                           read_text(stderr_path));                                                                    \
        cr_expect_neq(access(out_path, F_OK), 0, "%s: an output file is left", message);                               \
    } while (0)

Test(command, help_and_version) {
    cr_expect_eq(run("--version", NULL), 0);
    cr_expect_eq(strncmp(read_text(stdout_path), "loglin 0.", 9), 0);
    cr_expect_eq(run("help", NULL), 0);
    cr_expect_not_null(strstr(read_text(stdout_path), "backward"));
    cr_expect_eq(run("--help", NULL), 0);
    static const char *const commands[] = {"devices", "forward", "backward", "decode"};
    for (size_t i = 0; i < 4; ++i) {
        char usage[64];
        snprintf(usage, sizeof usage, "usage: loglin %s", commands[i]);
        cr_expect_eq(run(commands[i], "--help", NULL), 0);
        cr_expect_not_null(strstr(read_text(stdout_path), usage));
    }
}

Test(command, bad_usage) {
    cr_expect_eq(run(NULL), 2);
    cr_expect_not_null(strstr(read_text(stderr_path), "usage: loglin"));
    EXPECT_BAD("unknown command \"fly\"", "fly");
    EXPECT_BAD("\"x\" is not expected", "devices", "x");
    EXPECT_BAD("1 files are named, expected 2", "forward", in_path);
    EXPECT_BAD("3 files are named, expected 2", "decode", in_path, out_path, out_path);
    EXPECT_BAD("--fly: no such option", "forward", in_path, out_path, "--fly");
    EXPECT_BAD("-x: no such option", "forward", in_path, out_path, "-xy");
    EXPECT_BAD("--check=yes: no value is expected", "forward", in_path, out_path, "--check=yes");
    EXPECT_BAD("--chunk: a value is missing", "forward", in_path, out_path, "--chunk");
    EXPECT_BAD("--chunk is \"48\"", "forward", in_path, out_path, "--chunk", "48");
    EXPECT_BAD("--chunk is \"512\"", "forward", in_path, out_path, "--chunk", "512");
    EXPECT_BAD("--engine is \"warp\"", "forward", in_path, out_path, "--engine", "warp");
    EXPECT_BAD("--partition is \"firm\"", "forward", in_path, out_path, "--partition", "firm");
    EXPECT_BAD("--scale is \"1x\"", "forward", in_path, out_path, "--scale", "1x");
    EXPECT_BAD("--scale is \"0\"", "forward", in_path, out_path, "--scale", "0");
    EXPECT_BAD("--scale is \"nan\"", "forward", in_path, out_path, "--scale", "nan");
}

Test(command, devices) {
    cr_expect_eq(run("devices", NULL), 0, "%s", read_text(stderr_path));
    cr_expect_not_null(strstr(read_text(stdout_path), "compute units"));
    cr_expect_eq(run("devices", "--json", NULL), 0);
    json_t *report = json_loads(read_text(stdout_path), 0, NULL);
    const json_t *device = json_array_get(json_object_get(report, "devices"), 0);
    cr_expect_not_null(json_string_value(json_object_get(device, "name")));
    cr_expect_gt(json_integer_value(json_object_get(device, "max_allocation")), 0);
    json_decref(report);
}

/* Runs the command by the shell, for what only redirections do: its exit status.  Without a check for leaks, see above. */
static int run_in_shell(const char *arguments) {
    char command[512];
    snprintf(command, sizeof command, "ASAN_OPTIONS=detect_leaks=0 '%s' %s", LOGLIN_COMMAND, arguments);
    const int status = system(command); /* NOLINT: the text is of this file */
    cr_assert(WIFEXITED(status), "%s: status %#x", arguments, (unsigned)status);
    return WEXITSTATUS(status);
}

/* What cannot be printed fails, and no file is taken for a standard stream that was closed. */
Test(command, unwritable_standard_output) {
    char arguments[320];
    static const char *const commands[] = {"--version", "help", "devices", "devices --json"};
    for (size_t i = 0; i < sizeof commands / sizeof commands[0]; ++i) {
        snprintf(arguments, sizeof arguments, "%s >/dev/full 2>'%s'", commands[i], stderr_path);
        cr_expect_eq(run_in_shell(arguments), 1, "%s", commands[i]);
        cr_expect_not_null(strstr(read_text(stderr_path), "standard output: "), "%s", read_text(stderr_path));
    }
    input file = make_input(LOGLIN_TENSOR_F32, 1, 5, false);
    write_input(&file, in_path);
    cr_assert_eq(run("forward", in_path, other_path, NULL), 0, "%s", read_text(stderr_path));
    snprintf(arguments, sizeof arguments, "forward '%s' '%s' <&- >&- 2>&-", in_path, out_path);
    cr_expect_eq(run_in_shell(arguments), 1);
    snprintf(arguments, sizeof arguments, "cmp '%s' '%s'", out_path, other_path);
    cr_expect_eq(system(arguments), 0, "the outputs differ"); /* NOLINT: as above */
    free_input(&file);
}

Test(command, no_such_device) {
    input file = make_input(LOGLIN_TENSOR_F32, 1, 5, false);
    write_input(&file, in_path);
    cr_expect_neq(run("forward", in_path, out_path, "--device", "no such device", NULL), 0);
    cr_expect_not_null(strstr(read_text(stderr_path), "no such device"), "%s", read_text(stderr_path));
    cr_expect_neq(access(out_path, F_OK), 0);
    free_input(&file);
}

/* ---- Bad files -------------------------------------------------------------------------------------------------- */

Test(command, unreadable_input) {
    EXPECT_BAD("cannot be opened", "forward", in_path, out_path);
    FILE *stream = fopen(in_path, "wb");
    cr_assert_not_null(stream);
    fputs("truncated", stream);
    fclose(stream);
    EXPECT_BAD("in.safetensors: the header has", "forward", in_path, out_path);
}

static void write_and_expect(const input *file, const char *command, const char *message) {
    write_input(file, in_path);
    EXPECT_BAD(message, command, in_path, out_path);
}

/* A good file with one tensor of other type or shape, or none. */
static void expect_with(const char *name, loglin_tensor_dtype dtype, size_t rank, const size_t *shape,
                        const char *message) {
    input file = make_input(LOGLIN_TENSOR_F32, 1, 7, true);
    set(&file, name, dtype, rank, shape);
    write_and_expect(&file, "forward", message);
    free_input(&file);
}

static void expect_without(const char *name, const char *command) {
    input file = make_input(LOGLIN_TENSOR_F32, 1, 7, true);
    set(&file, "do", LOGLIN_TENSOR_F32, SHAPE(1, 7, HEADS, DIM_V));
    set(&file, "initial_states", LOGLIN_TENSOR_F32, SHAPE(1, HEADS, LEVELS, DIM_K, DIM_V));
    set(&file, "position", LOGLIN_TENSOR_I32, SHAPE(1));
    drop(&file, name);
    char message[64];
    snprintf(message, sizeof message, "tensor \"%s\" is missing", name);
    write_and_expect(&file, command, message);
    free_input(&file);
}

Test(command, missing_and_extra_tensors) {
    expect_without("q", "forward");
    expect_without("k", "backward");
    expect_without("v", "decode");
    expect_without("level_scales", "forward");
    expect_without("do", "backward");
    expect_without("initial_states", "forward");
    expect_without("position", "decode");
    expect_with("gate", LOGLIN_TENSOR_F32, SHAPE(1), "unexpected tensor \"gate\"");
}

Test(command, wrong_dtypes) {
    expect_with("q", LOGLIN_TENSOR_I32, SHAPE(1, 7, GROUPS, DIM_K), "\"q\" has dtype I32, expected F32, F16 or BF16");
    expect_with("q", LOGLIN_TENSOR_F16, SHAPE(1, 7, GROUPS, DIM_K), "\"k\" has dtype F32, expected F16");
    expect_with("v", LOGLIN_TENSOR_BF16, SHAPE(1, 7, HEADS, DIM_V), "\"v\" has dtype BF16, expected F32");
    expect_with("g", LOGLIN_TENSOR_F16, SHAPE(1, 7, HEADS), "\"g\" has dtype F16, expected F32");
    expect_with("level_scales", LOGLIN_TENSOR_F16, SHAPE(1, 7, HEADS, LEVELS), "\"level_scales\" has dtype F16");
    expect_with("beta", LOGLIN_TENSOR_F16, SHAPE(1, 7, HEADS), "\"beta\" has dtype F16, expected F32");
    expect_with("cu_seqlens", LOGLIN_TENSOR_F32, SHAPE(2), "\"cu_seqlens\" has dtype F32, expected I32 or I64");
}

Test(command, wrong_shapes) {
    expect_with("q", LOGLIN_TENSOR_F32, SHAPE(7, GROUPS, DIM_K), "\"q\" has shape [7, 2, 3], expected [B, T, G, K]");
    expect_with("q", LOGLIN_TENSOR_F32, SHAPE(1, 0, GROUPS, DIM_K), "\"q\" has shape [1, 0, 2, 3]");
    expect_with("k", LOGLIN_TENSOR_F32, SHAPE(1, 7, GROUPS, 4),
                "\"k\" has shape [1, 7, 2, 4], expected [B, T, G, K] = [1, 7, 2, 3]");
    expect_with("v", LOGLIN_TENSOR_F32, SHAPE(1, 6, HEADS, DIM_V), "\"v\" has shape [1, 6, 4, 5]");
    expect_with("v", LOGLIN_TENSOR_F32, SHAPE(1, 7, HEADS, 0), "\"v\" has shape [1, 7, 4, 0]");
    expect_with("g", LOGLIN_TENSOR_F32, SHAPE(1, 7), "\"g\" has shape [1, 7], expected [B, T, H] = [1, 7, 4]");
    expect_with("beta", LOGLIN_TENSOR_F32, SHAPE(1, 7, 3), "\"beta\" has shape [1, 7, 3]");
    expect_with("level_scales", LOGLIN_TENSOR_F32, SHAPE(1, 7, 3, LEVELS), "\"level_scales\" has shape [1, 7, 3, 6]");
    expect_with("level_scales", LOGLIN_TENSOR_F32, SHAPE(1, 7, HEADS, 3), "has L = 3, expected at least 4");
    expect_with("level_scales", LOGLIN_TENSOR_F32, SHAPE(1, 7, HEADS, 33), "has L = 33, expected at most 32");
    expect_with("cu_seqlens", LOGLIN_TENSOR_I32, SHAPE(1), "has 1 element, expected at least 2");
    expect_with("cu_seqlens", LOGLIN_TENSOR_I32, SHAPE(2, 1), "\"cu_seqlens\" has shape [2, 1]");
}

Test(command, wrong_sizes) {
    input file = make_input(LOGLIN_TENSOR_F32, 1, 7, false);
    set(&file, "q", LOGLIN_TENSOR_F32, SHAPE(1, 7, 3, DIM_K));
    set(&file, "k", LOGLIN_TENSOR_F32, SHAPE(1, 7, 3, DIM_K));
    write_and_expect(&file, "forward", "H = 4 heads, expected a multiple of the G = 3 groups");
    set(&file, "q", LOGLIN_TENSOR_F32, SHAPE(1, 7, 1, 513));
    set(&file, "k", LOGLIN_TENSOR_F32, SHAPE(1, 7, 1, 513));
    write_and_expect(&file, "forward", "K = 513, expected at most 512");
    free_input(&file);
    file = make_input(LOGLIN_TENSOR_F32, 1, 7, false);
    set(&file, "v", LOGLIN_TENSOR_F32, SHAPE(1, 7, HEADS, 513));
    write_and_expect(&file, "forward", "V = 513, expected at most 512");
    free_input(&file);
    file = make_input(LOGLIN_TENSOR_F32, 2, 7, false);
    set(&file, "cu_seqlens", LOGLIN_TENSOR_I32, SHAPE(3));
    write_and_expect(&file, "forward", "B = 2, expected 1 with \"cu_seqlens\"");
    free_input(&file);
}

/* One element of a good file changed. */
static void expect_element(const char *name, size_t index, float value, const char *message) {
    input file = make_input(LOGLIN_TENSOR_F32, 1, 7, true);
    set(&file, "do", LOGLIN_TENSOR_F32, SHAPE(1, 7, HEADS, DIM_V));
    float *data = (float *)get(&file, name)->data;
    data[index] = value;
    write_and_expect(&file, "backward", message);
    free_input(&file);
}

Test(command, wrong_elements) {
    expect_element("g", 10, 0.5F, "g[0,2,2] is 0.5, expected a finite number <= 0");
    expect_element("g", 0, NAN, "g[0,0,0] is nan");
    expect_element("g", 27, -INFINITY, "g[0,6,3] is -inf");
    expect_element("q", 41, NAN, "q[0,6,1,2] is nan, expected a finite number");
    expect_element("k", 0, INFINITY, "k[0,0,0,0] is inf");
    expect_element("v", 1, NAN, "v[0,0,0,1] is nan");
    expect_element("level_scales", 6, NAN, "level_scales[0,0,1,0] is nan");
    expect_element("beta", 1, NAN, "beta[0,0,1] is nan");
    expect_element("do", 1, NAN, "do[0,0,0,1] is nan");
}

static void expect_bounds(size_t count, const int64_t *bounds, const char *message) {
    input file = make_input(LOGLIN_TENSOR_F32, 1, 7, false);
    int64_t *data = set(&file, "cu_seqlens", LOGLIN_TENSOR_I64, 1, &count);
    memcpy(data, bounds, count * sizeof *data);
    write_and_expect(&file, "forward", message);
    free_input(&file);
}

Test(command, wrong_bounds_and_positions) {
    expect_bounds(3, (int64_t[]){1, 3, 7}, "cu_seqlens[0] is 1");
    expect_bounds(3, (int64_t[]){0, 8, 7}, "cu_seqlens[1] is 8");
    expect_bounds(4, (int64_t[]){0, 4, 3, 7}, "cu_seqlens[2] is 3");
    expect_bounds(3, (int64_t[]){0, 3, 6}, "cu_seqlens[2] is 6");
    expect_bounds(2, (int64_t[]){0, INT64_C(0x100000007)}, "cu_seqlens[1] is 4294967303");
    input file = make_input(LOGLIN_TENSOR_F32, 1, 7, false);
    set(&file, "initial_states", LOGLIN_TENSOR_F32, SHAPE(1, HEADS, LEVELS, DIM_K, DIM_V));
    int32_t *position = set(&file, "position", LOGLIN_TENSOR_I32, SHAPE(1));
    *position = -1;
    write_and_expect(&file, "forward", "position[0] is -1, expected 0 or more");
    *position = INT32_MAX - 6;
    write_and_expect(&file, "forward", "expected a sum of at most 2147483647");
    *position = 26;
    write_and_expect(&file, "decode", "has L = 6, expected at least 7 for a sequence of 33 tokens");
    set(&file, "initial_states", LOGLIN_TENSOR_F32, SHAPE(1, HEADS, LEVELS, DIM_V, DIM_K));
    write_and_expect(&file, "forward", "\"initial_states\" has shape [1, 4, 6, 5, 3]");
    free_input(&file);
}

/* ---- Runs ------------------------------------------------------------------------------------------------------- */

/* Reads a tensor's elements as floats; positions, which are small, as well. */
static float *read_floats(const char *path, const char *name, size_t *count) {
    loglin_safetensors *file = open_file(path);
    const loglin_tensor *tensor = loglin_safetensors_find(file, name);
    cr_assert_not_null(tensor, "%s is not in %s", name, path);
    *count = loglin_tensor_count(tensor);
    float *values = calloc(*count + 1, sizeof *values);
    cr_assert_not_null(values);
    if (tensor->dtype == LOGLIN_TENSOR_I32) {
        for (size_t i = 0; i < *count; ++i) {
            int32_t integer;
            memcpy(&integer, (const char *)tensor->data + i * sizeof integer, sizeof integer);
            values[i] = (float)integer;
        }
    } else {
        loglin_tensor_to_float(tensor->dtype, tensor->data, *count, values);
    }
    loglin_safetensors_close(file);
    return values;
}

static void expect_close(const float *got, const float *expected, size_t count, double tolerance, const char *what) {
    double difference = 0.0;
    double norm = 0.0;
    for (size_t i = 0; i < count; ++i) {
        difference += ((double)got[i] - (double)expected[i]) * ((double)got[i] - (double)expected[i]);
        norm += (double)expected[i] * (double)expected[i];
    }
    cr_expect(sqrt(difference) <= tolerance * sqrt(norm), "%s: the relative error is %g", what,
              sqrt(difference / norm));
}

static void expect_same(const char *name, double tolerance) {
    size_t count;
    size_t other_count;
    float *got = read_floats(out_path, name, &count);
    float *expected = read_floats(other_path, name, &other_count);
    cr_assert_eq(count, other_count);
    expect_close(got, expected, count, tolerance, name);
    free(got);
    free(expected);
}

static void expect_decode_equals_forward(const input *file, const char *partition, double tolerance) {
    write_input(file, in_path);
    cr_assert_eq(run("forward", in_path, other_path, "--partition", partition, NULL), 0, "%s", read_text(stderr_path));
    cr_assert_eq(run("decode", in_path, out_path, "--partition", partition, NULL), 0, "%s", read_text(stderr_path));
    expect_same("o", tolerance);
    expect_same("final_states", tolerance);
    expect_same("position", 0.0);
}

Test(command, decode_equals_forward) {
    static const struct {
        loglin_tensor_dtype dtype;
        double tolerance;
    } types[] = {{LOGLIN_TENSOR_F32, 1e-5}, {LOGLIN_TENSOR_F16, 2e-3}, {LOGLIN_TENSOR_BF16, 1e-2}};
    for (size_t i = 0; i < 3; ++i) {
        for (size_t batch = 1; batch <= 3; batch += 2) {
            input file = make_input(types[i].dtype, batch, 19, i == 1);
            expect_decode_equals_forward(&file, "weak", types[i].tolerance);
            free_input(&file);
        }
    }
}

Test(command, decode_equals_forward_strong) {
    input file = make_input(LOGLIN_TENSOR_F32, 2, 19, false);
    expect_decode_equals_forward(&file, "strong", 1e-5);
    free_input(&file);
}

/* Packed sequences with initial states, one of them empty, one at position 0. */
Test(command, decode_equals_forward_packed) {
    input file = make_input(LOGLIN_TENSOR_F32, 1, 17, true);
    int64_t *bounds = set(&file, "cu_seqlens", LOGLIN_TENSOR_I64, SHAPE(5));
    memcpy(bounds, (int64_t[]){0, 5, 5, 6, 17}, 5 * sizeof *bounds);
    set_random(&file, "initial_states", LOGLIN_TENSOR_F32, -1.0F, 1.0F, SHAPE(4, HEADS, LEVELS, DIM_K, DIM_V));
    int32_t *positions = set(&file, "position", LOGLIN_TENSOR_I32, SHAPE(4));
    memcpy(positions, (int32_t[]){11, 3, 0, 20}, 4 * sizeof *positions);
    expect_decode_equals_forward(&file, "weak", 1e-5);
    size_t count;
    float *final = read_floats(out_path, "position", &count);
    cr_assert_eq(count, 4);
    expect_close(final, (float[]){16, 3, 1, 31}, 4, 0.0, "position");
    free(final);
    free_input(&file);
}

/* Rows [begin, end) of every tensor of B = 1. */
static input slice(const input *whole, size_t begin, size_t end) {
    input part = {.count = 0};
    for (size_t i = 0; i < whole->count; ++i) {
        const loglin_tensor *tensor = &whole->tensors[i];
        const size_t row = tensor->size / tensor->shape[1];
        size_t shape[LOGLIN_TENSOR_MAX_RANK];
        memcpy(shape, tensor->shape, sizeof shape);
        shape[1] = end - begin;
        void *data = set(&part, tensor->name, tensor->dtype, tensor->rank, shape);
        memcpy(data, (const char *)tensor->data + begin * row, (end - begin) * row);
    }
    return part;
}

/* The states that one run writes are the next run's initial states. */
Test(command, states_can_be_fed_back) {
    enum { LENGTH = 21, SPLIT = 13 };
    input whole = make_input(LOGLIN_TENSOR_F32, 1, LENGTH, false);
    write_input(&whole, in_path);
    cr_assert_eq(run("forward", in_path, other_path, NULL), 0, "%s", read_text(stderr_path));
    size_t count;
    float *expected = read_floats(other_path, "o", &count);

    input first = slice(&whole, 0, SPLIT);
    write_input(&first, in_path);
    cr_assert_eq(run("forward", in_path, out_path, NULL), 0, "%s", read_text(stderr_path));
    float *states = read_floats(out_path, "final_states", &count);
    input second = slice(&whole, SPLIT, LENGTH);
    void *initial = set(&second, "initial_states", LOGLIN_TENSOR_F32, SHAPE(1, HEADS, LEVELS, DIM_K, DIM_V));
    memcpy(initial, states, count * sizeof *states);
    int32_t *position = set(&second, "position", LOGLIN_TENSOR_I32, SHAPE(1));
    *position = SPLIT;
    write_input(&second, in_path);
    cr_assert_eq(run("forward", in_path, out_path, NULL), 0, "%s", read_text(stderr_path));
    float *got = read_floats(out_path, "o", &count);
    expect_close(got, expected + SPLIT * HEADS * DIM_V, count, 1e-5, "o");
    expect_same("final_states", 1e-5);
    expect_same("position", 0.0);
    free(got);
    free(states);
    free(expected);
    free_input(&second);
    free_input(&first);
    free_input(&whole);
}

/* The options reach the computation: scale 2 doubles o, normalisation makes o independent of the length of q. */
Test(command, options) {
    input file = make_input(LOGLIN_TENSOR_F32, 1, 9, false);
    drop(&file, "g");
    write_input(&file, in_path);
    size_t count;
    cr_assert_eq(run("forward", in_path, out_path, "--engine", "blas", "--chunk", "16", NULL), 0);
    float *plain = read_floats(out_path, "o", &count);
    cr_assert_eq(run("forward", in_path, out_path, "--scale", "2", "--device", "0", NULL), 0);
    float *scaled = read_floats(out_path, "o", &count);
    for (size_t i = 0; i < count; ++i) {
        plain[i] *= 2.0F;
    }
    expect_close(scaled, plain, count, 1e-6, "--scale");
    cr_assert_eq(run("forward", in_path, other_path, "--normalize-qk", NULL), 0);
    float *q = (float *)get(&file, "q")->data;
    for (size_t i = 0; i < loglin_tensor_count(get(&file, "q")); ++i) {
        q[i] *= 64.0F;
    }
    write_input(&file, in_path);
    cr_assert_eq(run("forward", in_path, out_path, "--normalize-qk", NULL), 0);
    expect_same("o", 1e-3);
    free(plain);
    free(scaled);
    free_input(&file);
}

/* ---- Real data -------------------------------------------------------------------------------------------------- */

static const char *const real_files[] = {TEST_DATA_DIR "/mamba2_real_activations.safetensors",
                                         TEST_DATA_DIR "/gated_delta_real_activations.safetensors"};

Test(command, forward_on_real_data) {
    for (size_t i = 0; i < 2; ++i) {
        cr_expect_eq(run("forward", real_files[i], out_path, "--check", NULL), 0, "%s", read_text(stderr_path));
        cr_expect_not_null(strstr(read_text(stdout_path), "final_states"), "%s", read_text(stdout_path));
    }
}

Test(command, decode_on_real_data) {
    for (size_t i = 0; i < 2; ++i) {
        cr_expect_eq(run("decode", real_files[i], out_path, "--check", NULL), 0, "%s", read_text(stderr_path));
    }
}

Test(command, backward_on_real_data) {
    for (size_t i = 0; i < 2; ++i) {
        cr_expect_eq(run("backward", real_files[i], out_path, "--check", NULL), 0, "%s", read_text(stderr_path));
        loglin_safetensors *file = open_file(out_path);
        cr_expect_eq(loglin_safetensors_count(file), 5 + i);
        loglin_safetensors_close(file);
    }
}

/* At position 0 no level exists, so the gradient is there and zero. */
Test(command, gradient_of_states_that_do_not_exist) {
    input file = make_input(LOGLIN_TENSOR_F32, 1, 5, false);
    set_random(&file, "do", LOGLIN_TENSOR_F32, -1.0F, 1.0F, SHAPE(1, 5, HEADS, DIM_V));
    set_random(&file, "initial_states", LOGLIN_TENSOR_F32, -1.0F, 1.0F, SHAPE(1, HEADS, LEVELS, DIM_K, DIM_V));
    set(&file, "position", LOGLIN_TENSOR_I32, SHAPE(1));
    write_input(&file, in_path);
    cr_assert_eq(run("backward", in_path, out_path, NULL), 0, "%s", read_text(stderr_path));
    size_t count;
    float *gradient = read_floats(out_path, "dinitial_states", &count);
    for (size_t i = 0; i < count; ++i) {
        cr_expect_eq(gradient[i], 0.0F);
    }
    free(gradient);
    free_input(&file);
}

Test(command, json_report) {
    cr_assert_eq(run("forward", real_files[0], out_path, "--check", "--json", NULL), 0, "%s", read_text(stderr_path));
    json_t *report = json_loads(read_text(stdout_path), 0, NULL);
    cr_assert_not_null(report, "%s", read_text(stdout_path));
    cr_expect_str_eq(json_string_value(json_object_get(report, "command")), "forward");
    cr_expect_str_eq(json_string_value(json_object_get(report, "op")), "mamba2");
    cr_expect_eq(json_integer_value(json_object_get(json_object_get(report, "shape"), "length")), 777);
    cr_expect_gt(json_real_value(json_object_get(report, "run_ms")), 0.0);
    const json_t *checks = json_object_get(report, "check");
    cr_expect_eq(json_array_size(checks), 2);
    cr_expect(json_is_true(json_object_get(json_array_get(checks, 0), "passed")));
    json_decref(report);
}

/* A wrong reference: the output is there, the exit status says that it differs. */
Test(command, failed_check) {
    input file = make_input(LOGLIN_TENSOR_F32, 1, 7, false);
    write_input(&file, in_path);
    EXPECT_BAD("--check expects at least one of the outputs", "forward", in_path, out_path, "--check");
    set(&file, "o", LOGLIN_TENSOR_F32, SHAPE(1, 7, HEADS, 1));
    write_input(&file, in_path);
    EXPECT_BAD("\"o\" has shape [1, 7, 4, 1]", "forward", in_path, out_path, "--check");
    set(&file, "o", LOGLIN_TENSOR_F32, SHAPE(1, 7, HEADS, DIM_V));
    write_input(&file, in_path);
    cr_expect_eq(run("forward", in_path, out_path, "--check", NULL), 1);
    cr_expect_not_null(strstr(read_text(stderr_path), "o: the relative error is inf"), "%s", read_text(stderr_path));
    cr_expect_eq(access(out_path, F_OK), 0);
    cr_expect_eq(run("forward", in_path, out_path, "--check", "--json", NULL), 1);
    json_t *report = json_loads(read_text(stdout_path), 0, NULL);
    cr_expect_not_null(report, "%s", read_text(stdout_path));
    json_decref(report);
    free_input(&file);
}

/* A buffer that no device allows: the error says which tensor needs it. */
Test(command, too_large_a_buffer) {
    enum { MANY_HEADS = 4096, LARGEST = 512, MOST_LEVELS = 32 }; /* final_states: 128 GiB */
    input file = {.count = 0};
    set(&file, "q", LOGLIN_TENSOR_F32, SHAPE(1, 1, 1, LARGEST));
    set(&file, "k", LOGLIN_TENSOR_F32, SHAPE(1, 1, 1, LARGEST));
    set(&file, "v", LOGLIN_TENSOR_F32, SHAPE(1, 1, MANY_HEADS, LARGEST));
    set(&file, "level_scales", LOGLIN_TENSOR_F32, SHAPE(1, 1, MANY_HEADS, MOST_LEVELS));
    write_input(&file, in_path);
    cr_expect_eq(run("decode", in_path, out_path, NULL), 1);
    cr_expect_not_null(strstr(read_text(stderr_path), "final_states needs a buffer of 137438953472 bytes"), "%s",
                       read_text(stderr_path));
    cr_expect_neq(access(out_path, F_OK), 0);
    free_input(&file);
}

Test(command, unwritable_output) {
    input file = make_input(LOGLIN_TENSOR_F32, 1, 5, false);
    write_input(&file, in_path);
    cr_expect_eq(run("forward", in_path, directory, NULL), 1);
    cr_expect_not_null(strstr(read_text(stderr_path), "not a regular file"), "%s", read_text(stderr_path));
    free_input(&file);
}

/* ---- bench ------------------------------------------------------------------------------------------------------- */

Test(command, bench_options) {
    EXPECT_BAD("--suite is missing", "bench");
    EXPECT_BAD("--suite is \"gpu\", expected cpu or paper", "bench", "--suite", "gpu");
    EXPECT_BAD("--row is \"none\", expected a row of the suite paper: forward-2048", "bench", "--suite", "paper",
               "--row", "none");
    EXPECT_BAD("--repetitions is \"0\", expected an integer from 1", "bench", "--suite", "cpu", "--repetitions", "0");
    EXPECT_BAD("--threads is \"x\"", "bench", "--suite", "cpu", "--threads", "x");
    EXPECT_BAD("expected only with --suite cpu", "bench", "--suite", "paper", "--threads", "1");
    EXPECT_BAD("--engine is \"fast\"", "bench", "--suite", "cpu", "--engine", "fast");
    EXPECT_BAD("\"more\" is not expected", "bench", "--suite", "cpu", "more");
}

static const json_t *bench_row(const json_t *part, const char *name) {
    size_t i;
    json_t *row;
    json_array_foreach(json_object_get(part, "rows"), i, row) {
        if (strcmp(json_string_value(json_object_get(row, "name")), name) == 0) {
            return row;
        }
    }
    cr_assert_fail("no row %s", name);
    return NULL;
}

/* One process for each number of threads, each with the threads that it says; chosen rows only, outputs checked. */
Test(command, bench_cpu) {
    cr_assert_eq(run("bench", "--suite", "cpu", "--device", "portable computing", "--engine", "blas", "--row", "single",
                     "--row", "scalar-workspace", "--repetitions", "1", "--json", NULL),
                 0, "%s", read_text(stderr_path));
    json_t *report = json_loads(read_text(stdout_path), 0, NULL);
    cr_assert_not_null(report, "%s", read_text(stdout_path));
    const json_t *parts = json_object_get(report, "parts");
    cr_assert_eq(json_array_size(parts), 2);
    for (size_t i = 0; i < 2; ++i) {
        const json_t *part = json_array_get(parts, i);
        cr_expect_eq(json_integer_value(json_object_get(part, "threads")), (json_int_t)i + 1);
        cr_expect_eq(json_integer_value(json_object_get(part, "compute_units")), (json_int_t)i + 1);
        cr_expect_eq(json_array_size(json_object_get(part, "rows")), 2);
        const json_t *row = bench_row(part, "single");
        cr_expect_str_eq(json_string_value(json_object_get(row, "engine")), "blas");
        cr_expect_gt(json_number_value(json_object_get(row, "giga_per_s")), 0.0);
        cr_expect_eq(json_integer_value(json_object_get(row, "runs")), 1);
        const double error = json_number_value(json_object_get(row, "error"));
        cr_expect(error > 0.0 && error <= 1e-5, "%g", error);
        cr_expect_gt(json_number_value(json_object_get(bench_row(part, "scalar-workspace"), "value")), 0.0);
    }
    cr_expect_gt(json_number_value(json_object_get(json_object_get(report, "single_two_cores"), "value")), 0.0);
    json_decref(report);
}

Test(command, bench_paper) {
    cr_assert_eq(run("bench", "--suite", "paper", "--row", "step-1", "--repetitions", "1", "--json", NULL), 0, "%s",
                 read_text(stderr_path));
    json_t *report = json_loads(read_text(stdout_path), 0, NULL);
    cr_assert_not_null(report, "%s", read_text(stdout_path));
    const json_t *row = bench_row(report, "step-1");
    cr_expect_gt(json_number_value(json_object_get(row, "value")), 0.0);
    cr_expect_float_eq(json_number_value(json_object_get(row, "required")), 15.0, 1e-12);
    json_decref(report);
}

/* ---- Language models -------------------------------------------------------------------------------------------- */

#define MAMBA2 TEST_DATA_DIR "/kjv-loglin-mamba2"
#define GATED_DELTA TEST_DATA_DIR "/kjv-loglin-gdn"

static const char *const models[] = {MAMBA2, GATED_DELTA};

Test(command, generate_continues_as_recorded) {
    for (size_t m = 0; m < 2; ++m) {
        char path[256];
        char prompt[512];
        char expected[1024];
        snprintf(path, sizeof path, "%s/expected.safetensors", models[m]);
        loglin_safetensors *file = open_file(path);
        const loglin_tensor *ids = loglin_safetensors_find(file, "greedy_ids");
        const size_t total = loglin_tensor_count(ids);
        const size_t length = loglin_tensor_count(loglin_safetensors_find(file, "prompt_ids"));
        cr_assert(length < sizeof prompt && total - length + 2 <= sizeof expected);
        for (size_t i = 0; i < total; ++i) {
            int32_t id;
            memcpy(&id, (const char *)ids->data + i * sizeof id, sizeof id);
            (i < length ? prompt : expected)[i < length ? i : i - length] = (char)id;
        }
        prompt[length] = '\0';
        expected[total - length] = '\n';
        expected[total - length + 1] = '\0';
        char tokens[32];
        snprintf(tokens, sizeof tokens, "%zu", total - length);
        cr_expect_eq(run("generate", "--model", models[m], "--prompt", prompt, "--tokens", tokens, NULL), 0);
        cr_expect_str_eq(read_text(stdout_path), expected);
        cr_expect_not_null(strstr(read_text(stderr_path), "tokens/s"));
        loglin_safetensors_close(file);
    }
}

/* The same seed gives the same bytes, another seed others; one token to choose from is greedy. */
Test(command, generate_samples) {
    char first[256];
    char greedy[256];
#define GENERATE(...) run("generate", "--model", GATED_DELTA, "--prompt", "And ", "--tokens", "60", __VA_ARGS__, NULL)
    cr_expect_eq(GENERATE("--temperature", "1.5", "--seed", "7"), 0);
    snprintf(first, sizeof first, "%s", read_text(stdout_path));
    cr_expect_eq(GENERATE("--temperature", "1.5", "--seed", "7"), 0);
    cr_expect_str_eq(read_text(stdout_path), first);
    cr_expect_eq(GENERATE("--temperature", "1.5", "--seed", "8"), 0);
    cr_expect_str_neq(read_text(stdout_path), first);
    cr_expect_eq(GENERATE("--temperature", "0"), 0);
    snprintf(greedy, sizeof greedy, "%s", read_text(stdout_path));
    cr_expect_eq(GENERATE("--temperature", "1.5", "--top-k", "1"), 0);
    cr_expect_str_eq(read_text(stdout_path), greedy);
    cr_expect_eq(GENERATE("--temperature", "1.5", "--top-p", "0.000001"), 0);
    cr_expect_str_eq(read_text(stdout_path), greedy);
#undef GENERATE
}

Test(command, generate_on_an_engine) {
    cr_expect_eq(run("generate", "--model", MAMBA2, "--ids", "73,110,32", "--tokens", "4", "--engine", "blas", NULL),
                 0);
    cr_expect_eq(strlen(read_text(stdout_path)), 5); /* and the line's end */
    EXPECT_BAD("--engine is \"cublas\"", "generate", "--model", MAMBA2, "--ids", "73", "--tokens", "4", "--engine",
               "cublas");
    EXPECT_BAD("--top-k has no effect without a --temperature", "generate", "--model", MAMBA2, "--ids", "73",
               "--tokens", "4", "--top-k", "3");
    EXPECT_BAD("--ids: at \"256\"", "generate", "--model", MAMBA2, "--ids", "256", "--tokens", "4");
    EXPECT_BAD("--tokens is \"0\"", "generate", "--model", MAMBA2, "--ids", "1", "--tokens", "0");
}

static size_t size_of(const char *path) {
    FILE *stream = fopen(path, "rb");
    cr_assert_not_null(stream);
    cr_assert_eq(fseek(stream, 0, SEEK_END), 0);
    const long size = ftell(stream);
    fclose(stream);
    return (size_t)size;
}

Test(command, generate_says_where_the_levels_end) {
    enum { REACH = 16384, PROMPT = REACH - 4 };
    static char prompt[PROMPT + 1];
    memset(prompt, 'a', PROMPT);
    cr_assert_eq(run("generate", "--model", models[1], "--prompt", prompt, "--tokens", "100", NULL), 0, "%s",
                 read_text(stderr_path));
    cr_expect_not_null(strstr(read_text(stderr_path), "generated  5 tokens"), "%s", read_text(stderr_path));
    cr_expect_not_null(strstr(read_text(stderr_path), "ended      at 16384 tokens"), "%s", read_text(stderr_path));
}

/* Interrupted between tokens: the line is ended, the speed is told, and the shell sees an interrupt. */
Test(command, generate_is_interrupted_cleanly) {
    char *const arguments[] = {LOGLIN_COMMAND, "generate",   "--model", (char *)models[1], "--prompt", "In the ",
                               "--tokens",     "1000000000", NULL};
    const pid_t child = start_command(arguments);
    int status = 0;
    for (int i = 0; i < 12000 && (access(stdout_path, F_OK) != 0 || size_of(stdout_path) < 20); ++i) {
        nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
        cr_assert_eq(waitpid(child, &status, WNOHANG), 0, "it ended by itself: %s", read_text(stderr_path));
    }
    cr_assert_eq(kill(child, SIGINT), 0);
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_expect(WIFSIGNALED(status) && WTERMSIG(status) == SIGINT, "status %#x", (unsigned)status);
    const char *out = read_text(stdout_path);
    const size_t length = size_of(stdout_path);
    cr_assert_gt(length, 20);
    cr_assert_lt(length, 16384);
    cr_expect_eq(out[length - 1], '\n');
    const char *report = strstr(read_text(stderr_path), "generated  ");
    cr_assert_not_null(report, "%s", read_text(stderr_path));
    char *end;
    cr_expect_eq(strtoul(report + strlen("generated  "), &end, 10), length - 1);
    cr_assert_eq(strncmp(end, " tokens, ", 9), 0, "%s", report);
    const double rate = strtod(end + 9, &end);
    cr_expect_str_eq(end, " tokens/s\n");
    cr_expect_gt(rate, 0);
}

Test(command, logits_as_recorded) {
    char path[256];
    for (size_t m = 0; m < 2; ++m) {
        snprintf(path, sizeof path, "%s/expected.safetensors", models[m]);
        cr_expect_eq(run("logits", "--model", models[m], "--check", path, out_path, NULL), 0, "%s",
                     read_text(stderr_path));
        loglin_safetensors *file = open_file(out_path);
        const loglin_tensor *logits = loglin_safetensors_find(file, "logits");
        cr_expect(logits != NULL && loglin_tensor_count(logits) == (size_t)777 * 256);
        loglin_safetensors_close(file);
    }
}

Test(command, perplexity_as_recorded) {
    static const char *const windows[] = {"2048", "1024"};
    for (size_t m = 0; m < 2; ++m) {
        char path[256];
        float expected;
        snprintf(path, sizeof path, "%s/expected.safetensors", models[m]);
        loglin_safetensors *file = open_file(path);
        memcpy(&expected, loglin_safetensors_find(file, "val_bpb")->data, sizeof expected);
        loglin_safetensors_close(file);
        FILE *text = fopen(TEST_DATA_DIR "/kjv-val.txt", "rb");
        FILE *part = fopen(in_path, "wb");
        cr_assert(text != NULL && part != NULL);
        for (long left = 8 * strtol(windows[m], NULL, 10); left > 0; --left) {
            putc(getc(text), part);
        }
        fclose(text);
        fclose(part);
        cr_expect_eq(run("perplexity", "--model", models[m], in_path, "--window", windows[m], NULL), 0);
        const char *score = strstr(read_text(stdout_path), "score");
        cr_assert_not_null(score);
        const double bits = strtod(score + strlen("score"), NULL);
        cr_expect_float_eq(bits, (double)expected, 1e-4);
    }
}

/* Values that are finite in the file and overflow on the way to the logits. */
static void write_overflowing_model(const char *folder) {
    char path[256];
    char text[4096];
    loglin_tensor tensors[128];
    loglin_tensor_error error;
    snprintf(path, sizeof path, "%s/config.json", MAMBA2);
    FILE *config = fopen(path, "rb");
    cr_assert_not_null(config);
    const size_t size = fread(text, 1, sizeof text, config);
    fclose(config);
    snprintf(path, sizeof path, "%s/config.json", folder);
    config = fopen(path, "wb");
    cr_assert(config != NULL && fwrite(text, 1, size, config) == size && fclose(config) == 0);
    loglin_safetensors *file = open_file(MAMBA2 "/model.safetensors");
    const size_t count = loglin_safetensors_count(file);
    static uint16_t norm[128]; /* BF16, 2^127 each */
    cr_assert_leq(count, 128);
    for (size_t i = 0; i < count; ++i) {
        tensors[i] = *loglin_safetensors_at(file, i);
        if (strcmp(tensors[i].name, "backbone.norm_f.weight") == 0) {
            memset(norm, 0x7f, sizeof norm);
            cr_assert_eq(tensors[i].size, sizeof norm);
            tensors[i].data = norm;
        }
    }
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    cr_assert(loglin_safetensors_write(path, tensors, count, NULL, 0, &error), "%s", error.text);
    loglin_safetensors_close(file);
}

/* Logits that are no numbers are told, not turned into tokens. */
Test(command, logits_that_overflow) {
    char folder[96];
    char path[128];
    snprintf(folder, sizeof folder, "%s/model", directory);
    cr_assert_eq(mkdir(folder, 0700), 0);
    write_overflowing_model(folder);
    cr_expect_eq(run("generate", "--model", folder, "--prompt", "In the", "--tokens", "3", NULL), 1);
    cr_expect_not_null(strstr(read_text(stderr_path), "the logits after 6 tokens are not finite"), "%s",
                       read_text(stderr_path));
    cr_expect_eq(run("perplexity", "--model", folder, TEST_DATA_DIR "/kjv-val.txt", "--window", "64", NULL), 1);
    cr_expect_not_null(strstr(read_text(stderr_path), "the logits of byte 0 are not finite"), "%s",
                       read_text(stderr_path));
    cr_expect_eq(run("logits", "--model", folder, MAMBA2 "/expected.safetensors", out_path, NULL), 1);
    cr_expect_not_null(strstr(read_text(stderr_path), "input_ids[0,0] are not finite"), "%s", read_text(stderr_path));
    cr_expect_neq(access(out_path, F_OK), 0);
    snprintf(path, sizeof path, "%s/config.json", folder);
    unlink(path);
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    unlink(path);
    cr_expect_eq(rmdir(folder), 0);
}

/* An id that no vocabulary has is told as it is. */
Test(command, ids_beyond_every_vocabulary) {
    const int64_t ids[] = {1, 5000000000, 2};
    const loglin_tensor tensor = {
        .name = "input_ids", .dtype = LOGLIN_TENSOR_I64, .rank = 2, .shape = {1, 3}, .data = ids, .size = sizeof ids};
    loglin_tensor_error error;
    cr_assert(loglin_safetensors_write(in_path, &tensor, 1, NULL, 0, &error), "%s", error.text);
    EXPECT_BAD("value 1 is 5000000000", "logits", "--model", MAMBA2, in_path, out_path);
}
