/* SPDX-License-Identifier: Apache-2.0 */
/* Sessions: several sequences, files of their states, arguments that are refused. */
#include "runtime/device.h"
#include "support.h"
#include "support_lm.h"
#include "support_model.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MANY = 5, STEPS = 12 };

static const size_t lengths[MANY] = {17, 1, 64, 3, 40};

/* What each sequence alone gives after its prompt and STEPS steps. */
static void run_alone(loglin_model *model, const int32_t *ids, size_t sequences, float *logits) {
    loglin_session *session = support_session_start(model, 1);
    for (size_t n = 0; n < sequences; n++) {
        support_require(loglin_session_reset(session, 0), "loglin_session_reset");
        support_require(
            loglin_session_prefill(session, 0, ids + n, lengths[n] + STEPS, logits + n * SUPPORT_VOCABULARY),
            "loglin_session_prefill");
    }
    loglin_session_destroy(session);
}

/* Prefills and steps all of them together; a save and a load into another session between the steps. */
static void run_together(loglin_model *model, const int32_t *ids, size_t sequences, const char *path, float *logits) {
    loglin_session *session = support_session_start(model, sequences);
    for (size_t n = 0; n < sequences; n++) {
        support_require(loglin_session_prefill(session, n, ids + n, lengths[n], NULL), "loglin_session_prefill");
    }
    for (size_t i = 0; i < STEPS; i++) {
        int32_t next[MANY];
        for (size_t n = 0; n < sequences; n++) {
            next[n] = ids[n + lengths[n] + i];
        }
        support_require(loglin_session_step(session, next, logits), "loglin_session_step");
        if (path != NULL && i == STEPS / 2) {
            support_require(loglin_session_save(session, path), "loglin_session_save");
            loglin_session_destroy(session);
            session = support_session_start(model, sequences);
            support_require(loglin_session_load(session, path), "loglin_session_load");
        }
    }
    for (size_t n = 0; n < sequences; n++) {
        cr_expect_eq(loglin_session_position(session, n), lengths[n] + STEPS);
    }
    loglin_session_destroy(session);
}

static void check_many(const char *folder, const loglin_model_options *options, size_t sequences, const char *path) {
    loglin_safetensors *file = support_expected_open(folder);
    size_t length = 0;
    int32_t *ids = support_copy_of(file, "input_ids", &length);
    loglin_model *model = support_model_open(folder, options);
    float alone[MANY * SUPPORT_VOCABULARY];
    float together[MANY * SUPPORT_VOCABULARY];
    run_alone(model, ids, sequences, alone);
    run_together(model, ids, sequences, path, together);
    for (size_t n = 0; n < sequences; n++) {
        const double error =
            support_float_error(together + n * SUPPORT_VOCABULARY, alone + n * SUPPORT_VOCABULARY, SUPPORT_VOCABULARY);
        cr_expect_leq(error, 1e-5, "%s: sequence %zu of %zu: error %g", folder, n, sequences, error);
    }
    loglin_model_close(model);
    loglin_safetensors_close(file);
    free(ids);
}

Test(session, sequences_at_different_positions) {
    const loglin_model_options small = {.piece = 2}; /* fewer tokens than sequences */
    for (size_t i = 0; i < 2; i++) {
        check_many(support_trained[i], NULL, 2, NULL);
        check_many(support_trained[i], NULL, MANY, NULL);
        check_many(support_trained[i], &small, MANY, NULL);
    }
}

Test(session, save_and_load) {
    char folder[64];
    char path[128];
    support_make_folder(folder, sizeof folder);
    (void)snprintf(path, sizeof path, "%s/session.safetensors", folder);
    for (size_t i = 0; i < 2; i++) {
        check_many(support_trained[i], NULL, 1, path);
        check_many(support_trained[i], NULL, MANY, path);
    }
    support_remove_folder(folder);
}

/* Writes a session's file again with one tensor or the metadata changed. */
typedef struct state_change {
    const char *what;
    const char *version; /* NULL: as it was */
    const char *drop;    /* a tensor to leave out */
    int32_t position;    /* -2: as it was */
    bool not_finite, extra;
} state_change;

static void write_changed(const char *from, const char *to, const state_change *change) {
    loglin_safetensors *file = NULL;
    loglin_tensor_error error;
    loglin_tensor tensors[32];
    size_t count = 0;
    const int32_t position = change->position;
    const float extra = 0;
    if (!loglin_safetensors_open(from, &file, &error)) {
        support_die("%s", error.text);
    }
    float *values = NULL;
    for (size_t i = 0; i < loglin_safetensors_count(file); i++) {
        loglin_tensor tensor = *loglin_safetensors_at(file, i);
        if (change->drop != NULL && strcmp(tensor.name, change->drop) == 0) {
            continue;
        }
        if (strcmp(tensor.name, "position") == 0 && change->position != -2) {
            tensor.data = &position;
        }
        if (strcmp(tensor.name, "values.0") == 0 && change->not_finite) {
            values = support_alloc(tensor.size, 1);
            memcpy(values, tensor.data, tensor.size);
            values[7] = NAN;
            tensor.data = values;
        }
        tensors[count++] = tensor;
    }
    if (change->extra) {
        tensors[count++] = (loglin_tensor){.name = "more", .rank = 1, .shape = {1}, .data = &extra, .size = 4};
    }
    const loglin_tensor_metadata metadata[] = {{"format", "loglin-session"},
                                               {"version", change->version != NULL ? change->version : "1"}};
    if (!loglin_safetensors_write(to, tensors, count, metadata, 2, &error)) {
        support_die("%s", error.text);
    }
    loglin_safetensors_close(file);
    free(values);
}

/*
 * Steps that follow each other closely, other calls between them, and pauses: on a CPU the kernel of a step may still wait
 * for the next token then, which must not reach it before what the other calls have changed.
 */
Test(session, steps_in_quick_succession) {
    enum { ROUNDS = 40, COUNT = 6 };
    static const int32_t ids[COUNT] = {73, 110, 32, 116, 104, 101};
    for (size_t i = 0; i < 2; i++) {
        loglin_model *model = support_model_open(support_trained[i], NULL);
        loglin_session *session = support_session_start(model, 1);
        loglin_session *other = support_session_start(model, 1);
        float expected[SUPPORT_VOCABULARY];
        float logits[SUPPORT_VOCABULARY];
        support_require(loglin_session_prefill(session, 0, ids, COUNT, expected), "loglin_session_prefill");
        for (size_t round = 0; round < ROUNDS; round++) {
            const size_t prompt = round % 3; /* 0: none */
            support_require(loglin_session_reset(session, 0), "loglin_session_reset");
            if (prompt > 0) {
                support_require(loglin_session_prefill(session, 0, ids, prompt, NULL), "loglin_session_prefill");
            }
            for (size_t t = prompt; t < COUNT; t++) {
                support_require(loglin_session_step(session, &ids[t], logits), "loglin_session_step");
                if (round % 4 == 1) {
                    (void)nanosleep(&(struct timespec){.tv_nsec = 100000 * (long)(round % 8)}, NULL);
                } else if (round % 4 == 2) {
                    support_require(loglin_session_reset(other, 0), "loglin_session_reset");
                    support_require(loglin_session_step(other, ids, NULL), "loglin_session_step");
                }
            }
            const double error = support_float_error(logits, expected, SUPPORT_VOCABULARY);
            cr_assert_leq(error, 1e-5, "%s: round %zu: error %g", support_trained[i], round, error);
        }
        loglin_session_destroy(other);
        loglin_session_destroy(session);
        loglin_model_close(model);
    }
}

Test(session, bad_session_files) {
    static const state_change changes[] = {
        {.what = "version", .version = "2", .position = -2},
        {.what = "missing tensor", .drop = "conv.1", .position = -2},
        {.what = "negative position", .position = -1},
        {.what = "position beyond the levels", .position = 16385},
        {.what = "NaN", .position = -2, .not_finite = true},
        {.what = "extra tensor", .position = -2, .extra = true},
    };
    char folder[64];
    char path[128];
    char other[128];
    support_make_folder(folder, sizeof folder);
    (void)snprintf(path, sizeof path, "%s/session.safetensors", folder);
    (void)snprintf(other, sizeof other, "%s/other.safetensors", folder);
    loglin_model *model = support_model_open(SUPPORT_MAMBA2, NULL);
    loglin_session *session = support_session_start(model, 1);
    const int32_t ids[] = {65, 66, 67};
    support_require(loglin_session_prefill(session, 0, ids, 3, NULL), "loglin_session_prefill");
    support_require(loglin_session_save(session, path), "loglin_session_save");
    for (size_t i = 0; i < sizeof changes / sizeof changes[0]; i++) {
        write_changed(path, other, &changes[i]);
        cr_expect_eq(loglin_session_load(session, other), LOGLIN_BAD_FILE, "%s", changes[i].what);
        cr_expect_eq(loglin_session_position(session, 0), 3);
    }
    cr_expect_eq(truncate(path, 1000), 0);
    cr_expect_eq(loglin_session_load(session, path), LOGLIN_BAD_FILE);
    loglin_session *pair = support_session_start(model, 2);
    support_require(loglin_session_save(pair, path), "loglin_session_save");
    cr_expect_eq(loglin_session_load(session, path), LOGLIN_BAD_FILE, "two sequences into one");
    cr_expect_not_null(strstr(loglin_last_error(), "\"position\" is I32 [2], expected I32 [1]"), "%s",
                       loglin_last_error());
    loglin_session_destroy(pair);
    loglin_session_destroy(session);
    loglin_model_close(model);
    support_remove_folder(folder);
}

/* A model and a session are of the device that their queue is of. */
static void expect_other_queues_refused(loglin_model *model) {
    const support_device *device = support_open();
    cl_int status = CL_SUCCESS;
    cl_context context = clCreateContext(NULL, 1, &device->id, NULL, NULL, &status);
    support_require(status, "clCreateContext");
    cl_command_queue queue = clCreateCommandQueueWithProperties(context, device->id, NULL, &status);
    support_require(status, "clCreateCommandQueueWithProperties");
    loglin_model *no_model = NULL;
    loglin_session *no_session = NULL;
    cr_expect_eq(loglin_model_open(device->device, queue, SUPPORT_GATED_DELTA, NULL, &no_model),
                 LOGLIN_INVALID_ARGUMENT);
    cr_expect_not_null(strstr(loglin_last_error(), "queue is of another context"), "%s", loglin_last_error());
    cr_expect_eq(loglin_session_create(model, queue, 1, &no_session), LOGLIN_INVALID_ARGUMENT);
    cr_expect_not_null(strstr(loglin_last_error(), "queue is of another context"), "%s", loglin_last_error());
    cr_expect(no_model == NULL && no_session == NULL);
    clReleaseCommandQueue(queue);
    clReleaseContext(context);
}

static void expect_bad_options_refused(void) {
    const support_device *device = support_open();
    const loglin_model_options bad[] = {{.dtype = (loglin_dtype)3}, {.engine = (loglin_engine)3}, {.piece = 65537}};
    const char *const words[] = {"options->dtype is 3", "options->engine is 3", "options->piece is 65537"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        loglin_model *none = NULL;
        cr_expect_eq(loglin_model_open(device->device, device->queue, SUPPORT_GATED_DELTA, &bad[i], &none),
                     LOGLIN_INVALID_ARGUMENT);
        cr_expect_not_null(strstr(loglin_last_error(), words[i]), "%s", loglin_last_error());
        cr_expect_null(none);
    }
}

Test(session, bad_arguments) {
    loglin_model *model = support_model_open(SUPPORT_GATED_DELTA, NULL);
    loglin_session *session = support_session_start(model, 2);
    float logits[2 * SUPPORT_VOCABULARY];
    const int32_t good[] = {1, 2};
    const int32_t bad[] = {1, 256};
    const int32_t negative[] = {-1, 2};
    loglin_session *none = NULL;
    loglin_model_info info = {.layers = 3};
    loglin_model_get_info(NULL, &info);
    cr_expect_eq(info.layers, 0);
    cr_expect_eq(loglin_session_create(model, support_open()->queue, 0, &none), LOGLIN_INVALID_ARGUMENT);
    cr_expect_null(none);
    if (support_open()->out_of_order != NULL) {
        cr_expect_eq(loglin_session_create(model, support_open()->out_of_order, 1, &none), LOGLIN_INVALID_ARGUMENT);
    }
    expect_other_queues_refused(model);
    expect_bad_options_refused();
    cr_expect_eq(loglin_session_step(session, bad, logits), LOGLIN_INVALID_ARGUMENT);
    cr_expect_not_null(strstr(loglin_last_error(), "ids[1] is 256, expected 0 to 255"), "%s", loglin_last_error());
    cr_expect_eq(loglin_session_step(session, negative, logits), LOGLIN_INVALID_ARGUMENT);
    cr_expect_eq(loglin_session_prefill(session, 2, good, 2, logits), LOGLIN_INVALID_ARGUMENT);
    cr_expect_eq(loglin_session_prefill(session, 0, good, 0, logits), LOGLIN_INVALID_ARGUMENT);
    cr_expect_eq(loglin_session_prefill(session, 0, good, 16385, logits), LOGLIN_INVALID_ARGUMENT);
    cr_expect_eq(loglin_session_score(session, good, 1, NULL), LOGLIN_INVALID_ARGUMENT);
    cr_expect_eq(loglin_session_position(session, 0), 0);
    cr_expect_eq(loglin_session_step(session, good, logits), LOGLIN_OK);
    loglin_session_destroy(session);
    loglin_model_close(model);
}

/* A pass that found too little memory is tried anew by the next one. */
Test(session, too_little_memory_for_a_pass) {
    loglin_device *device = support_open()->device;
    loglin_model *model = support_model_open(SUPPORT_MAMBA2, NULL);
    loglin_session *session = support_session_start(model, 1);
    const int32_t ids[] = {65, 66, 67};
    const uint64_t max_allocation = device->info.max_allocation;
    float logits[SUPPORT_VOCABULARY];
    device->info.max_allocation = 65536;
    for (int attempt = 0; attempt < 2; attempt++) {
        cr_expect_eq(loglin_session_prefill(session, 0, ids, 3, logits), LOGLIN_UNSUPPORTED);
        cr_expect_not_null(strstr(loglin_last_error(), "needs a buffer"), "%s", loglin_last_error());
    }
    device->info.max_allocation = max_allocation;
    support_require(loglin_session_reset(session, 0), "loglin_session_reset");
    support_require(loglin_session_prefill(session, 0, ids, 3, logits), "loglin_session_prefill");
    cr_expect_eq(loglin_session_position(session, 0), 3);
    loglin_session_destroy(session);
    loglin_model_close(model);
}

/*
 * The model's kernels and products for GPUs, on whatever device is here: the same answers.  With the blas engine: PoCL takes
 * many minutes to compile the work-group lanes of a GPU at these dimensions, which are test_lanes' anyway.
 */
Test(session, as_on_a_gpu) {
    const loglin_model_options options = {.engine = LOGLIN_ENGINE_BLAS};
    loglin_device *device = support_open()->device;
    device->is_cpu = false;
    device->info.vendor[0] = '\0'; /* Intel's GPUs have build options of their own, and NVIDIA's a product */
    for (size_t i = 0; i < 2; i++) {
        check_many(support_trained[i], &options, MANY, NULL);
    }
}
