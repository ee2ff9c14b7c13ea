/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A language model: host memory and time to load it, and the speeds of its prefill and of its step at batch 1.
 *
 * The step stands against its floor: the bytes of the weights and of the level states, each moved once at the rate of a
 * device copy (bytes read and bytes written) of as many bytes in the same run, the two alternating.  A prefill of one
 * product a parameter stands beside it in GFLOP/s.
 *
 * And the logits behind the same tokens are compared, taken one by one and at once.
 *
 *     bench_model FOLDER [PREFILL [PIECE]]      the device that LOGLIN_DEVICE names, or the first
 */
#include "loglin_model.h"

#include "model/model.h"
#include <ctype.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>

enum {
    RUNS = 9,
    LEAST_RUNS = 3,
    SLOW_PREFILL = 5 /* seconds */,
    MOST_STEPS = 64,
    LEAST_STEPS = 4,
    DEFAULT_PREFILL = 2048,
    MOST_TOKENS = 1 << 24,
    MAX_COPY = 256 << 20
};

static const double MOST_ERROR = 1e-4;

typedef struct bench {
    cl_context context;
    cl_command_queue queue;
    loglin_device *device;
    loglin_model *model;
    loglin_session *session;
    loglin_model_info info;
    size_t prefill, steps; /* tokens of a run */
    int32_t *ids;
    float *logits;
    cl_mem copy_from, copy_to;
    size_t copy_bytes;
} bench;

static void check(int status, const char *what) {
    if (status != 0) {
        fprintf(stderr, "%s: %s: %s\n", what, loglin_strerror(status), loglin_last_error());
        exit(EXIT_FAILURE);
    }
}

static double seconds(void) {
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int compare_doubles(const void *a, const void *b) {
    const double x = *(const double *)a;
    const double y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, size_t count) {
    qsort(values, count, sizeof(*values), compare_doubles);
    return values[count / 2];
}

/* The most memory that the process has had so far, in bytes. */
static double peak_memory(void) {
    struct rusage usage;
    return getrusage(RUSAGE_SELF, &usage) == 0 ? 1024.0 * (double)usage.ru_maxrss : 0;
}

static double file_size(const char *folder) {
    char path[4096];
    struct stat info;
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    return stat(path, &info) == 0 ? (double)info.st_size : 0;
}

static void open_device(bench *b) {
    cl_device_id id;
    char name[256] = "";
    cl_int code;
    check(loglin_select_device(NULL, &id), "loglin_select_device");
    check(clGetDeviceInfo(id, CL_DEVICE_NAME, sizeof(name) - 1, name, NULL), "clGetDeviceInfo");
    b->context = clCreateContext(NULL, 1, &id, NULL, NULL, &code);
    check(code, "clCreateContext");
    b->queue = clCreateCommandQueueWithProperties(b->context, id, NULL, &code);
    check(code, "clCreateCommandQueueWithProperties");
    check(loglin_device_create(b->context, id, &b->device), "loglin_device_create");
    printf("%s\n", name);
}

static void load(bench *b, const char *folder, size_t piece) {
    const loglin_model_options options = {.piece = piece};
    const double size = file_size(folder);
    const double before = peak_memory();
    const double start = seconds();
    check(loglin_model_open(b->device, b->queue, folder, &options, &b->model), folder);
    const double time = seconds() - start;
    const double grown = peak_memory() - before;
    loglin_model_get_info(b->model, &b->info);
    printf("%s: %.1f M parameters, %zu layers, hidden %zu\n", folder, 1e-6 * (double)b->info.parameters, b->info.layers,
           b->info.hidden);
    printf("load     %8.2f s, host memory %.1f MB = %.3f of the file's %.1f MB\n", time, 1e-6 * grown, grown / size,
           1e-6 * size);
}

static cl_mem make_buffer(const bench *b, size_t bytes, uint8_t byte) {
    cl_int code;
    cl_mem mem = clCreateBuffer(b->context, CL_MEM_READ_WRITE, bytes, NULL, &code);
    check(code, "clCreateBuffer");
    check(clEnqueueFillBuffer(b->queue, mem, &byte, 1, 0, bytes, 0, NULL, NULL), "clEnqueueFillBuffer");
    return mem;
}

static void start_session(bench *b) {
    b->ids = calloc(b->prefill, sizeof *b->ids);
    b->logits = calloc(b->info.vocabulary, sizeof *b->logits);
    if (b->ids == NULL || b->logits == NULL) {
        fprintf(stderr, "out of memory\n");
        exit(EXIT_FAILURE);
    }
    for (size_t i = 0; i < b->prefill; i++) {
        b->ids[i] = (int32_t)(i * 7919 % b->info.vocabulary);
    }
    check(loglin_session_create(b->model, b->queue, 1, &b->session), "loglin_session_create");
    b->copy_bytes = b->info.weight_bytes / 2 < MAX_COPY ? b->info.weight_bytes / 2 : MAX_COPY;
    b->copy_from = make_buffer(b, b->copy_bytes, 1);
    b->copy_to = make_buffer(b, b->copy_bytes, 2);
}

/* Bytes that the steps behind the prefill move, of each on average: all weights but the rows of the embedding that are
   not asked for, the levels that exist read, and two levels written. */
static double step_bytes(const bench *b) {
    const loglin_lm *lm = &b->model->lm;
    const double state = (double)(lm->layers * lm->heads * lm->dim_k * lm->dim_v) * sizeof(float);
    const double element = b->info.weight_dtype == LOGLIN_F32 ? 4 : 2;
    const double embedding = lm->tied ? 0 : element * (double)(lm->vocabulary * lm->hidden);
    double states = 0;
    for (size_t i = 0; i < b->steps; i++) {
        for (size_t bits = b->prefill + i - 1; bits != 0; bits &= bits - 1) {
            states += 1;
        }
        states += 3;
    }
    return (double)b->info.weight_bytes - embedding + state * states / (double)b->steps;
}

static double time_prefill(const bench *b) {
    check(loglin_session_reset(b->session, 0), "loglin_session_reset");
    const double start = seconds();
    check(loglin_session_prefill(b->session, 0, b->ids, b->prefill, b->logits), "loglin_session_prefill");
    return seconds() - start;
}

static double time_step(const bench *b) {
    const double start = seconds();
    for (size_t i = 0; i < b->steps; i++) {
        check(loglin_session_step(b->session, &b->ids[i % b->prefill], b->logits), "loglin_session_step");
    }
    return (seconds() - start) / (double)b->steps;
}

/* Seconds that the copy takes for a byte read or written. */
static double time_copy(const bench *b) {
    const size_t times = (size_t)MAX_COPY / b->copy_bytes < MOST_STEPS ? (size_t)MAX_COPY / b->copy_bytes : MOST_STEPS;
    const double start = seconds();
    for (size_t i = 0; i < times; i++) {
        check(clEnqueueCopyBuffer(b->queue, b->copy_from, b->copy_to, 0, 0, b->copy_bytes, 0, NULL, NULL),
              "clEnqueueCopyBuffer");
    }
    check(clFinish(b->queue), "clFinish");
    return (seconds() - start) / (2.0 * (double)times * (double)b->copy_bytes);
}

/* ||steps - prefill|| / ||prefill|| of the logits behind the same tokens, taken one by one and at once. */
static double compare_logits(const bench *b) {
    const size_t vocabulary = b->info.vocabulary;
    const size_t count = b->prefill < MOST_STEPS ? b->prefill : MOST_STEPS;
    double difference = 0, size = 0;
    float *stepped = calloc(vocabulary, sizeof *stepped);
    if (stepped == NULL) {
        fprintf(stderr, "out of memory\n");
        exit(EXIT_FAILURE);
    }
    check(loglin_session_reset(b->session, 0), "loglin_session_reset");
    for (size_t i = 0; i < count; i++) {
        check(loglin_session_step(b->session, &b->ids[i], stepped), "loglin_session_step");
    }
    check(loglin_session_reset(b->session, 0), "loglin_session_reset");
    check(loglin_session_prefill(b->session, 0, b->ids, count, b->logits), "loglin_session_prefill");
    for (size_t i = 0; i < vocabulary; i++) {
        difference += ((double)stepped[i] - b->logits[i]) * ((double)stepped[i] - b->logits[i]);
        size += (double)b->logits[i] * b->logits[i];
    }
    free(stepped);
    return sqrt(difference / size);
}

static void measure(bench *b) {
    double prefill[RUNS], step[RUNS], copy[RUNS], floors[RUNS], gains[RUNS];
    b->steps = LEAST_STEPS;
    (void)time_step(b);
    const double quarter = 0.25 / time_step(b);
    b->steps = quarter < LEAST_STEPS ? LEAST_STEPS : quarter > MOST_STEPS ? MOST_STEPS : (size_t)quarter;
    const double warm = time_prefill(b); /* a plan is made */
    const size_t runs = warm > SLOW_PREFILL ? LEAST_RUNS : RUNS;
    const double bytes = step_bytes(b);
    for (size_t run = 0; run < runs; run++) {
        prefill[run] = time_prefill(b) / (double)b->prefill;
        step[run] = time_step(b);
        copy[run] = time_copy(b);
        floors[run] = step[run] / (bytes * copy[run] + 30e-6);
        gains[run] = step[run] / prefill[run];
    }
    const double token = median(prefill, runs);
    const double products = 2.0 * ((double)b->info.parameters - (double)(b->info.vocabulary * b->info.hidden));
    const double rate = median(copy, runs);
    printf("prefill  %8.2f us a token of %zu, %.1f tokens/s, %.0f GFLOP/s of products with weights\n", 1e6 * token,
           b->prefill, 1 / token, 1e-9 * products / token);
    printf("step     %8.2f us; floor %.2f us for %.2f MB at a copy's %.1f GB/s; step / (floor + 30 us) = %.2f\n",
           1e6 * median(step, runs), 1e6 * bytes * rate, 1e-6 * bytes, 1e-9 / rate, median(floors, runs));
    printf("a token of the prefill is %.1f times faster than a step\n", median(gains, runs));
    const double error = compare_logits(b);
    printf("the logits of steps and of a prefill differ by %.1e\n", error);
    if (!(error < MOST_ERROR)) {
        fprintf(stderr, "that is more than %.0e\n", MOST_ERROR);
        exit(EXIT_FAILURE);
    }
}

/* A number of tokens; 0 if it is none. */
static size_t read_count(const char *text) {
    char *end;
    const unsigned long count = strtoul(text, &end, 10);
    return isdigit((unsigned char)text[0]) && *end == '\0' && count < MOST_TOKENS ? count : 0;
}

int main(int argc, char **argv) {
    bench b = {.prefill = argc > 2 ? read_count(argv[2]) : DEFAULT_PREFILL};
    const size_t piece = argc > 3 ? read_count(argv[3]) : 0;
    if (argc < 2 || argc > 4 || b.prefill == 0 || (argc > 3 && piece == 0)) {
        fprintf(stderr, "usage: %s FOLDER [PREFILL [PIECE]]: a model's folder, tokens from 1 to %d\n", argv[0],
                MOST_TOKENS - 1);
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    open_device(&b);
    load(&b, argv[1], piece);
    start_session(&b);
    measure(&b);
    clReleaseMemObject(b.copy_from);
    clReleaseMemObject(b.copy_to);
    loglin_session_destroy(b.session);
    loglin_model_close(b.model);
    loglin_device_destroy(b.device);
    clReleaseCommandQueue(b.queue);
    clReleaseContext(b.context);
    free(b.ids);
    free(b.logits);
    return EXIT_SUCCESS;
}
