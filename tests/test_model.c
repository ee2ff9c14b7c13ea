/* SPDX-License-Identifier: Apache-2.0 */
/* Language models: two trained ones against their recorded outputs, small ones against float64, and bad checkpoints. */
#include "loglin_model.h"

#include "runtime/device.h"
#include "support.h"
#include "support_lm.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAMBA2 TEST_DATA_DIR "/kjv-loglin-mamba2"
#define GATED_DELTA TEST_DATA_DIR "/kjv-loglin-gdn"

static const char *const trained[] = {MAMBA2, GATED_DELTA};

enum { VOCABULARY = 256 };

/* ---- Helpers ----------------------------------------------------------------------------------------------------- */

static loglin_model *open_model(const char *folder, const loglin_model_options *options) {
    const support_device *device = support_open();
    loglin_model *model = NULL;
    support_require(loglin_model_open(device->device, device->queue, folder, options, &model), folder);
    return model;
}

static loglin_session *start(loglin_model *model, size_t sequences) {
    loglin_session *session = NULL;
    support_require(loglin_session_create(model, support_open()->queue, sequences, &session), "loglin_session_create");
    return session;
}

enum { ENGINES = 2 };

static const loglin_engine engines[ENGINES] = {LOGLIN_ENGINE_BLAS, LOGLIN_ENGINE_FUSED};

/* The blas engine takes every model; the fused engine may refuse one, for its steps or for its passes. */
static bool has_engine(const char *folder, loglin_engine engine) {
    const support_device *device = support_open();
    const loglin_model_options options = {.engine = engine};
    const int32_t ids[2] = {65, 66};
    loglin_model *model = open_model(folder, &options);
    loglin_session *session = NULL;
    loglin_status status = loglin_session_create(model, device->queue, 1, &session);
    if (status == LOGLIN_OK) {
        status = loglin_session_prefill(session, 0, ids, 2, NULL);
    }
    if (status != LOGLIN_OK) {
        cr_expect_eq(engine, LOGLIN_ENGINE_FUSED, "%s", loglin_last_error());
        cr_expect_eq(status, LOGLIN_UNSUPPORTED, "%s", loglin_last_error());
    }
    loglin_session_destroy(session);
    loglin_model_close(model);
    return status == LOGLIN_OK;
}

static loglin_safetensors *open_expected(const char *folder) {
    char path[512];
    loglin_tensor_error error;
    loglin_safetensors *file = NULL;
    (void)snprintf(path, sizeof path, "%s/expected.safetensors", folder);
    if (!loglin_safetensors_open(path, &file, &error)) {
        support_die("%s: %s", path, error.text);
    }
    return file;
}

/* A copy of a tensor's data, aligned, to be freed. */
static void *copy_of(const loglin_safetensors *file, const char *name, size_t *count) {
    const loglin_tensor *tensor = loglin_safetensors_find(file, name);
    if (tensor == NULL) {
        support_die("no tensor %s", name);
    }
    void *data = support_alloc(tensor->size, 1);
    memcpy(data, tensor->data, tensor->size);
    *count = loglin_tensor_count(tensor);
    return data;
}

static double error_of(const float *got, const float *expected, size_t count) {
    double difference = 0;
    double sum = 0;
    for (size_t i = 0; i < count; i++) {
        const double distance = (double)got[i] - (double)expected[i];
        difference += distance * distance;
        sum += (double)expected[i] * (double)expected[i];
    }
    return isfinite(difference) ? sqrt(difference / sum) : HUGE_VAL;
}

static size_t best_of(const float *logits, float *lead) {
    size_t best = 0;
    float second = -HUGE_VALF;
    for (size_t i = 1; i < VOCABULARY; i++) {
        if (logits[i] > logits[best]) {
            second = logits[best];
            best = i;
        } else {
            second = fmaxf(second, logits[i]);
        }
    }
    *lead = logits[best] - second;
    return best;
}

/* ---- Trained models ---------------------------------------------------------------------------------------------- */

static void check_logits(const char *folder, const loglin_model_options *options, double threshold) {
    loglin_safetensors *file = open_expected(folder);
    size_t length = 0;
    size_t count = 0;
    int32_t *ids = copy_of(file, "input_ids", &length);
    float *expected = copy_of(file, "logits", &count);
    float *logits = support_alloc(count, sizeof *logits);
    loglin_model *model = open_model(folder, options);
    loglin_session *session = start(model, 1);
    support_require(loglin_session_score(session, ids, length, logits), "loglin_session_score");
    const double error = error_of(logits, expected, count);
    cr_expect_leq(error, threshold, "%s: error %g", folder, error);
    loglin_session_destroy(session);
    loglin_model_close(model);
    loglin_safetensors_close(file);
    free(ids);
    free(expected);
    free(logits);
}

Test(model, logits) {
    for (size_t i = 0; i < 2; i++) {
        check_logits(trained[i], NULL, 1e-4);
    }
}

Test(model, logits_on_every_engine) {
    for (size_t i = 0; i < 2; i++) {
        for (size_t e = 0; e < ENGINES; e++) {
            if (has_engine(trained[i], engines[e])) {
                const loglin_model_options options = {.engine = engines[e]};
                check_logits(trained[i], &options, 1e-4);
            }
        }
    }
}

Test(model, logits_in_pieces) {
    const loglin_model_options options = {.piece = 100};
    for (size_t i = 0; i < 2; i++) {
        check_logits(trained[i], &options, 1e-4);
    }
}

Test(model, logits_in_16_bit_storage) {
    const loglin_model_options half = {.dtype = LOGLIN_F16};
    const loglin_model_options bfloat = {.dtype = LOGLIN_BF16};
    for (size_t i = 0; i < 2; i++) {
        check_logits(trained[i], &half, 5e-3);
        check_logits(trained[i], &bfloat, 4e-2);
    }
}

static void check_greedy(const char *folder, const loglin_model_options *options) {
    loglin_safetensors *file = open_expected(folder);
    size_t prompt = 0;
    size_t total = 0;
    int32_t *ids = copy_of(file, "prompt_ids", &prompt);
    int32_t *expected = copy_of(file, "greedy_ids", &total);
    loglin_model *model = open_model(folder, options);
    loglin_session *session = start(model, 1);
    float logits[VOCABULARY];
    support_require(loglin_session_prefill(session, 0, ids, prompt, logits), "loglin_session_prefill");
    for (size_t i = prompt; i < total; i++) {
        float lead = 0;
        const int32_t id = (int32_t)best_of(logits, &lead);
        if (id != expected[i]) {
            cr_expect_lt((double)lead, 1e-3, "%s: byte %zu is %d, expected %d", folder, i, (int)id, (int)expected[i]);
            break;
        }
        support_require(loglin_session_step(session, &id, logits), "loglin_session_step");
    }
    loglin_session_destroy(session);
    loglin_model_close(model);
    loglin_safetensors_close(file);
    free(ids);
    free(expected);
}

Test(model, greedy_continuation) {
    check_greedy(MAMBA2, NULL);
    check_greedy(GATED_DELTA, NULL);
}

/* Where the states of all layers do not fit into one buffer a step takes many launches, on a small model too. */
Test(model, layers_in_buffers_of_their_own) {
    const loglin_model_options options = {.piece = 64};
    support_open()->device->info.max_allocation = (uint64_t)2 << 20;
    check_greedy(MAMBA2, &options);
}

/* Bits per byte of a window's bytes but the first. */
static double bits_of_window(loglin_session *session, const int32_t *ids, size_t window, float *logits) {
    double bits = 0;
    support_require(loglin_session_reset(session, 0), "loglin_session_reset");
    support_require(loglin_session_score(session, ids, window, logits), "loglin_session_score");
    for (size_t i = 1; i < window; i++) {
        const float *row = logits + (i - 1) * VOCABULARY;
        double sum = 0;
        for (size_t j = 0; j < VOCABULARY; j++) {
            sum += exp((double)row[j] - (double)row[ids[i]]);
        }
        bits += log2(sum);
    }
    return bits / (double)(window - 1);
}

static void check_bits_per_byte(const char *folder, size_t window) {
    enum { WINDOWS = 8, BYTES = 16384 };
    static unsigned char text[BYTES];
    FILE *stream = fopen(TEST_DATA_DIR "/kjv-val.txt", "rb");
    cr_assert_not_null(stream);
    cr_assert_eq(fread(text, 1, BYTES, stream), BYTES);
    (void)fclose(stream);
    loglin_safetensors *file = open_expected(folder);
    size_t one = 0;
    float *expected = copy_of(file, "val_bpb", &one);
    loglin_model *model = open_model(folder, NULL);
    loglin_session *session = start(model, 1);
    int32_t *ids = support_alloc(window, sizeof *ids);
    float *logits = support_alloc(window * VOCABULARY, sizeof *logits);
    double bits = 0;
    for (size_t i = 0; i < WINDOWS; i++) {
        for (size_t j = 0; j < window; j++) {
            ids[j] = text[i * window + j];
        }
        bits += bits_of_window(session, ids, window, logits) / WINDOWS;
    }
    cr_expect_float_eq(bits, (double)expected[0], 1e-4, "%s: %g bits, expected %g", folder, bits, (double)expected[0]);
    loglin_session_destroy(session);
    loglin_model_close(model);
    loglin_safetensors_close(file);
    free(expected);
    free(ids);
    free(logits);
}

Test(model, bits_per_byte) {
    check_bits_per_byte(MAMBA2, 2048);
    check_bits_per_byte(GATED_DELTA, 1024);
}

/* Prefill of the first n bytes, then steps, at every n: the logits after the last byte are those of one pass. */
static void check_splits(const char *folder, loglin_engine engine) {
    enum { LENGTH = 200 };
    const loglin_model_options options = {.engine = engine};
    loglin_safetensors *file = open_expected(folder);
    size_t length = 0;
    int32_t *ids = copy_of(file, "input_ids", &length);
    loglin_model *model = open_model(folder, &options);
    loglin_session *session = start(model, 1);
    float whole[VOCABULARY];
    float parts[VOCABULARY];
    support_require(loglin_session_prefill(session, 0, ids, LENGTH, whole), "loglin_session_prefill");
    for (size_t n = 0; n < LENGTH; n++) {
        support_require(loglin_session_reset(session, 0), "loglin_session_reset");
        if (n > 0) {
            support_require(loglin_session_prefill(session, 0, ids, n, NULL), "loglin_session_prefill");
        }
        for (size_t i = n; i < LENGTH; i++) {
            support_require(loglin_session_step(session, &ids[i], i + 1 == LENGTH ? parts : NULL), "step");
        }
        const double error = error_of(parts, whole, VOCABULARY);
        cr_expect_leq(error, 1e-5, "%s: split at %zu: error %g", folder, n, error);
    }
    loglin_session_destroy(session);
    loglin_model_close(model);
    loglin_safetensors_close(file);
    free(ids);
}

Test(model, every_split_of_mamba2) {
    check_splits(MAMBA2, LOGLIN_ENGINE_BLAS);
}

Test(model, every_split_of_gated_delta) {
    check_splits(GATED_DELTA, LOGLIN_ENGINE_BLAS);
}

Test(model, every_split_on_the_fused_engine) {
    bool any = false;
    for (size_t i = 0; i < 2; i++) {
        if (has_engine(trained[i], LOGLIN_ENGINE_FUSED)) {
            check_splits(trained[i], LOGLIN_ENGINE_FUSED);
            any = true;
        }
    }
    if (!any) {
        cr_skip_test("the fused engine takes neither model on this device");
    }
}

/* Prefill in two pieces, also of fewer tokens than the convolution looks back. */
Test(model, prefill_in_two_pieces) {
    enum { LENGTH = 200 };
    static const size_t splits[] = {1, 2, 3, 4, 63, 64, 65, 100, 197, 198, 199};
    for (size_t m = 0; m < 2; m++) {
        loglin_safetensors *file = open_expected(trained[m]);
        size_t length = 0;
        int32_t *ids = copy_of(file, "input_ids", &length);
        loglin_model *model = open_model(trained[m], NULL);
        loglin_session *session = start(model, 1);
        float whole[VOCABULARY];
        float parts[VOCABULARY];
        support_require(loglin_session_prefill(session, 0, ids, LENGTH, whole), "loglin_session_prefill");
        for (size_t i = 0; i < sizeof splits / sizeof splits[0]; i++) {
            const size_t n = splits[i];
            support_require(loglin_session_reset(session, 0), "loglin_session_reset");
            support_require(loglin_session_prefill(session, 0, ids, n, NULL), "first piece");
            support_require(loglin_session_prefill(session, 0, ids + n, LENGTH - n, parts), "second piece");
            const double error = error_of(parts, whole, VOCABULARY);
            cr_expect_leq(error, 1e-5, "%s: pieces of %zu and %zu: error %g", trained[m], n, LENGTH - n, error);
        }
        loglin_session_destroy(session);
        loglin_model_close(model);
        loglin_safetensors_close(file);
        free(ids);
    }
}

/* ---- Sessions ---------------------------------------------------------------------------------------------------- */

enum { MANY = 5, STEPS = 12 };

static const size_t lengths[MANY] = {17, 1, 64, 3, 40};

/* What each sequence alone gives after its prompt and STEPS steps. */
static void run_alone(loglin_model *model, const int32_t *ids, size_t sequences, float *logits) {
    loglin_session *session = start(model, 1);
    for (size_t n = 0; n < sequences; n++) {
        support_require(loglin_session_reset(session, 0), "loglin_session_reset");
        support_require(loglin_session_prefill(session, 0, ids + n, lengths[n] + STEPS, logits + n * VOCABULARY),
                        "loglin_session_prefill");
    }
    loglin_session_destroy(session);
}

/* Prefills and steps all of them together; a save and a load into another session between the steps. */
static void run_together(loglin_model *model, const int32_t *ids, size_t sequences, const char *path, float *logits) {
    loglin_session *session = start(model, sequences);
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
            session = start(model, sequences);
            support_require(loglin_session_load(session, path), "loglin_session_load");
        }
    }
    for (size_t n = 0; n < sequences; n++) {
        cr_expect_eq(loglin_session_position(session, n), lengths[n] + STEPS);
    }
    loglin_session_destroy(session);
}

static void check_many(const char *folder, const loglin_model_options *options, size_t sequences, const char *path) {
    loglin_safetensors *file = open_expected(folder);
    size_t length = 0;
    int32_t *ids = copy_of(file, "input_ids", &length);
    loglin_model *model = open_model(folder, options);
    float alone[MANY * VOCABULARY];
    float together[MANY * VOCABULARY];
    run_alone(model, ids, sequences, alone);
    run_together(model, ids, sequences, path, together);
    for (size_t n = 0; n < sequences; n++) {
        const double error = error_of(together + n * VOCABULARY, alone + n * VOCABULARY, VOCABULARY);
        cr_expect_leq(error, 1e-5, "%s: sequence %zu of %zu: error %g", folder, n, sequences, error);
    }
    loglin_model_close(model);
    loglin_safetensors_close(file);
    free(ids);
}

Test(model, sequences_at_different_positions) {
    const loglin_model_options small = {.piece = 2}; /* fewer tokens than sequences */
    for (size_t i = 0; i < 2; i++) {
        check_many(trained[i], NULL, 2, NULL);
        check_many(trained[i], NULL, MANY, NULL);
        check_many(trained[i], &small, MANY, NULL);
    }
}

Test(model, save_and_load) {
    char folder[64];
    char path[128];
    support_make_folder(folder, sizeof folder);
    (void)snprintf(path, sizeof path, "%s/session.safetensors", folder);
    for (size_t i = 0; i < 2; i++) {
        check_many(trained[i], NULL, 1, path);
        check_many(trained[i], NULL, MANY, path);
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

Test(model, bad_session_files) {
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
    loglin_model *model = open_model(MAMBA2, NULL);
    loglin_session *session = start(model, 1);
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
    loglin_session *pair = start(model, 2);
    support_require(loglin_session_save(pair, path), "loglin_session_save");
    cr_expect_eq(loglin_session_load(session, path), LOGLIN_BAD_FILE, "two sequences into one");
    loglin_session_destroy(pair);
    loglin_session_destroy(session);
    loglin_model_close(model);
    support_remove_folder(folder);
}

Test(model, bad_arguments) {
    loglin_model *model = open_model(GATED_DELTA, NULL);
    loglin_session *session = start(model, 2);
    float logits[2 * VOCABULARY];
    const int32_t good[] = {1, 2};
    const int32_t bad[] = {1, 256};
    const int32_t negative[] = {-1, 2};
    loglin_session *none = NULL;
    cr_expect_eq(loglin_session_create(model, support_open()->queue, 0, &none), LOGLIN_INVALID_ARGUMENT);
    cr_expect_null(none);
    if (support_open()->out_of_order != NULL) {
        cr_expect_eq(loglin_session_create(model, support_open()->out_of_order, 1, &none), LOGLIN_INVALID_ARGUMENT);
    }
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

/* ---- Every shape, against float64 -------------------------------------------------------------------------------- */

#define MAMBA2_CONFIG(more)                                                                                            \
    "{\"model_type\": \"log_linear_mamba2\", \"num_hidden_layers\": 2, \"vocab_size\": 37, " more "}"
#define DELTA_CONFIG(more)                                                                                             \
    "{\"model_type\": \"h_gated_deltanet\", \"num_hidden_layers\": 2, \"vocab_size\": 37, " more "}"

typedef struct shape_case {
    const char *config;
    loglin_tensor_dtype dtype;
    size_t levels, intermediate, shards;
} shape_case;

static const shape_case shapes[] = {
    {MAMBA2_CONFIG("\"hidden_size\": 10, \"expand\": 1.5, \"num_heads\": 3, \"head_dim\": 5, \"state_size\": 7"),
     LOGLIN_TENSOR_F32, 7, 11, 1},
    {MAMBA2_CONFIG("\"hidden_size\": 48, \"expand\": 2, \"num_heads\": 6, \"head_dim\": 16, \"state_size\": 24, "
                   "\"n_groups\": 2, \"norm_before_gate\": true, \"D_has_hdim\": true, \"use_bias\": true, "
                   "\"tie_word_embeddings\": true, \"conv_kernel\": 3"),
     LOGLIN_TENSOR_BF16, 7, 40, 3},
    {MAMBA2_CONFIG("\"hidden_size\": 16, \"expand\": 2, \"num_heads\": 2, \"head_dim\": 16, \"state_size\": 16, "
                   "\"use_conv_bias\": false, \"conv_kernel\": 1, \"dt_limit\": [0.01, 0.2], "
                   "\"intermediate_size\": 33"),
     LOGLIN_TENSOR_F16, 8, 0, 1},
    {MAMBA2_CONFIG("\"hidden_size\": 1, \"expand\": 1, \"num_heads\": 1, \"head_dim\": 1, \"state_size\": 1, "
                   "\"dt_limit\": [0.0, Infinity]"),
     LOGLIN_TENSOR_F32, 7, 1, 1},
    {"{\"model_type\": \"hattention\", \"num_hidden_layers\": 1, \"vocab_size\": 5, \"hidden_size\": 32, "
     "\"num_heads\": 4, \"head_dim\": 16, \"state_size\": 16, \"n_groups\": 4}",
     LOGLIN_TENSOR_F32, 7, 16, 2},
    {DELTA_CONFIG("\"hidden_size\": 20, \"num_heads\": 3, \"head_dim\": 6, \"expand_v\": 1.5, \"conv_size\": 4"),
     LOGLIN_TENSOR_F32, 7, 21, 1},
    {DELTA_CONFIG("\"hidden_size\": 32, \"num_heads\": 2, \"head_dim\": 48, \"expand_v\": 1.5, \"conv_size\": 2, "
                  "\"conv_bias\": true, \"tie_word_embeddings\": true, \"intermediate_size\": null"),
     LOGLIN_TENSOR_BF16, 7, 64, 4},
    {DELTA_CONFIG("\"hidden_size\": 7, \"num_heads\": 1, \"head_dim\": 1, \"expand_v\": 3"), LOGLIN_TENSOR_F16, 7, 5,
     1},
};

static void check_shape(const shape_case *shape, const loglin_model_options *options) {
    enum { LENGTH = 45, SPLIT = 20 };
    char folder[64];
    int32_t ids[LENGTH];
    support_random random = {5};
    support_make_folder(folder, sizeof folder);
    support_lm lm = support_lm_make(shape->config, shape->dtype, shape->levels, shape->intermediate, 3);
    support_lm_write(&lm, folder, shape->shards);
    loglin_model *model = open_model(folder, options);
    loglin_session *session = start(model, 1);
    loglin_model_info info;
    loglin_model_get_info(model, &info);
    for (size_t i = 0; i < LENGTH; i++) {
        ids[i] = (int32_t)(support_uniform(&random) * (double)info.vocabulary);
    }
    double *expected = support_alloc(LENGTH * info.vocabulary, sizeof *expected);
    double *got = support_alloc(LENGTH * info.vocabulary, sizeof *got);
    float *logits = support_alloc(LENGTH * info.vocabulary, sizeof *logits);
    support_lm_logits(&lm, ids, LENGTH, expected);
    support_require(loglin_session_score(session, ids, SPLIT, logits), "loglin_session_score");
    for (size_t i = SPLIT; i < LENGTH; i++) {
        support_require(loglin_session_step(session, &ids[i], logits + i * info.vocabulary), "loglin_session_step");
    }
    for (size_t i = 0; i < LENGTH * info.vocabulary; i++) {
        got[i] = (double)logits[i];
    }
    const double error = support_error(got, expected, LENGTH * info.vocabulary);
    cr_expect_leq(error, 1e-5, "%s: error %g", shape->config, error);
    loglin_session_destroy(session);
    loglin_model_close(model);
    support_lm_free(&lm);
    support_remove_folder(folder);
    free(expected);
    free(got);
    free(logits);
}

Test(model, every_shape) {
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        check_shape(&shapes[i], NULL);
    }
}

/*
 * The model's kernels and products for GPUs, on whatever device is here: the same answers.  With the blas engine: PoCL takes
 * many minutes to compile the work-group lanes of a GPU at these dimensions, which are test_lanes' anyway.
 */
Test(model, as_on_a_gpu) {
    const loglin_model_options options = {.engine = LOGLIN_ENGINE_BLAS};
    support_open()->device->is_cpu = false;
    for (size_t i = 0; i < 2; i++) {
        check_logits(trained[i], &options, 1e-4);
        check_many(trained[i], &options, MANY, NULL);
    }
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i += 3) {
        check_shape(&shapes[i], &options);
    }
}

/* A sequence ends where the levels end, and the whole of it is right. */
Test(model, full_length) {
    enum { LENGTH = 8 };
    char folder[64];
    const int32_t ids[LENGTH + 1] = {3, 1, 4, 1, 5, 9, 2, 6, 5};
    support_make_folder(folder, sizeof folder);
    support_lm lm = support_lm_make(shapes[0].config, LOGLIN_TENSOR_F32, 4, 11, 3);
    support_lm_write(&lm, folder, 1);
    loglin_model *model = open_model(folder, NULL);
    loglin_session *session = start(model, 1);
    float logits[LENGTH * 37];
    support_require(loglin_session_score(session, ids, LENGTH, logits), "loglin_session_score");
    cr_expect_eq(loglin_session_step(session, ids + LENGTH, logits), LOGLIN_INVALID_ARGUMENT);
    support_require(loglin_session_reset(session, 0), "loglin_session_reset");
    cr_expect_eq(loglin_session_prefill(session, 0, ids, LENGTH + 1, logits), LOGLIN_INVALID_ARGUMENT);
    for (size_t i = 0; i < LENGTH; i++) {
        float step[37];
        support_require(loglin_session_step(session, &ids[i], step), "loglin_session_step");
        cr_expect_leq(error_of(step, logits + i * 37, 37), 1e-5);
    }
    loglin_session_destroy(session);
    loglin_model_close(model);
    support_lm_free(&lm);
    support_remove_folder(folder);
}

/* ---- Bad checkpoints --------------------------------------------------------------------------------------------- */

static const char good_config[] =
    MAMBA2_CONFIG("\"hidden_size\": 16, \"expand\": 2, \"num_heads\": 2, \"head_dim\": 16, \"state_size\": 8");

/* Opening fails with this status, and the error text holds `text`. */
static void expect_refused(const char *folder, loglin_status status, const char *text) {
    const support_device *device = support_open();
    loglin_model *model = NULL;
    cr_expect_eq(loglin_model_open(device->device, device->queue, folder, NULL, &model), status, "%s: %s", text,
                 loglin_last_error());
    cr_expect_null(model);
    cr_expect_not_null(strstr(loglin_last_error(), text), "\"%s\", expected \"%s\" in it", loglin_last_error(), text);
}

Test(model, bad_configs) {
    static const struct {
        const char *config;
        loglin_status status;
        const char *text;
    } cases[] = {
        {"", LOGLIN_BAD_FILE, "line"},
        {"[]", LOGLIN_BAD_FILE, "not an object"},
        {"{}", LOGLIN_BAD_FILE, "model_type is missing"},
        {"{\"model_type\": \"llama\"}", LOGLIN_UNSUPPORTED, "llama"},
        {MAMBA2_CONFIG("\"hidden_size\": 16, \"hidden_size\": 16"), LOGLIN_BAD_FILE, "duplicate"},
        {MAMBA2_CONFIG("\"hidden_size\": -1"), LOGLIN_BAD_FILE, "hidden_size is -1"},
        {MAMBA2_CONFIG("\"hidden_size\": 99999999999"), LOGLIN_BAD_FILE, "hidden_size is 99999999999"},
        {MAMBA2_CONFIG("\"hidden_size\": 1.5"), LOGLIN_BAD_FILE, "hidden_size is not an integer"},
        {MAMBA2_CONFIG("\"hidden_size\": \"16\""), LOGLIN_BAD_FILE, "hidden_size is not an integer"},
        {MAMBA2_CONFIG("\"hidden_size\": 16"), LOGLIN_BAD_FILE, "num_heads is missing"},
        {MAMBA2_CONFIG("\"hidden_size\": 16, \"num_heads\": 2, \"head_dim\": 1000, \"state_size\": 8"), LOGLIN_BAD_FILE,
         "head_dim is 1000, expected 1 to 512"},
        {MAMBA2_CONFIG("\"hidden_size\": 16, \"num_heads\": 2, \"head_dim\": 8, \"state_size\": 8"), LOGLIN_BAD_FILE,
         "expand * hidden_size is 32, expected num_heads * head_dim = 16"},
        {MAMBA2_CONFIG("\"hidden_size\": 16, \"num_heads\": 4, \"head_dim\": 8, \"state_size\": 8, \"n_groups\": 3"),
         LOGLIN_BAD_FILE, "n_groups is 3"},
        {MAMBA2_CONFIG("\"hidden_size\": 16, \"num_heads\": 4, \"head_dim\": 8, \"state_size\": 8, \"norm_eps\": 0"),
         LOGLIN_BAD_FILE, "norm_eps is 0"},
        {MAMBA2_CONFIG("\"hidden_size\": 16, \"num_heads\": 4, \"head_dim\": 8, \"state_size\": 8, \"conv_kernel\": 0"),
         LOGLIN_BAD_FILE, "conv_kernel is 0"},
        {MAMBA2_CONFIG("\"hidden_size\": 16, \"num_heads\": 4, \"head_dim\": 8, \"state_size\": 8, \"rmsnorm\": false"),
         LOGLIN_UNSUPPORTED, "rmsnorm is false"},
        {MAMBA2_CONFIG("\"hidden_size\": 16, \"num_heads\": 4, \"head_dim\": 8, \"state_size\": 8, "
                       "\"dt_limit\": [2, 1]"),
         LOGLIN_BAD_FILE, "dt_limit"},
        {MAMBA2_CONFIG("\"hidden_size\": 16, \"num_heads\": 4, \"head_dim\": 8, \"state_size\": 8, "
                       "\"hidden_act\": \"gelu\""),
         LOGLIN_UNSUPPORTED, "gelu"},
        {DELTA_CONFIG("\"hidden_size\": 16, \"num_heads\": 4, \"head_dim\": 5, \"expand_v\": 1.5"), LOGLIN_BAD_FILE,
         "head_dim * expand_v is 7.5"},
        {DELTA_CONFIG("\"hidden_size\": 16, \"num_heads\": 4, \"head_dim\": 5, \"expand_v\": 1e9"), LOGLIN_BAD_FILE,
         "expand_v is 1e+09"},
        {DELTA_CONFIG("\"hidden_size\": 16, \"num_heads\": 4, \"head_dim\": 5, \"attn\": {}"), LOGLIN_UNSUPPORTED,
         "attn is set"},
        {DELTA_CONFIG("\"hidden_size\": 16, \"num_heads\": 4, \"head_dim\": 5, \"use_gate\": 1"), LOGLIN_BAD_FILE,
         "use_gate is not true or false"},
    };
    char folder[64];
    support_make_folder(folder, sizeof folder);
    support_lm lm = support_lm_make(good_config, LOGLIN_TENSOR_F32, 7, 20, 3);
    support_lm_write(&lm, folder, 1);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        support_write_text(folder, "config.json", cases[i].config);
        expect_refused(folder, cases[i].status, cases[i].text);
    }
    support_lm_free(&lm);
    support_remove_folder(folder);
}

Test(model, bad_tensors) {
    static const char in_proj[] = "backbone.layers.1.mixer.in_proj.weight";
    char folder[64];
    support_make_folder(folder, sizeof folder);
    support_lm lm = support_lm_make(good_config, LOGLIN_TENSOR_F32, 7, 20, 3);
    loglin_tensor *tensor = support_lm_find(&lm, in_proj);
    const loglin_tensor kept = *tensor;

    tensor->shape[0] = kept.shape[1];
    tensor->shape[1] = kept.shape[0];
    support_lm_write(&lm, folder, 1);
    expect_refused(folder, LOGLIN_BAD_FILE, in_proj);
    *tensor = kept;

    tensor->name = "backbone.layers.1.mixer.extra";
    support_lm_write(&lm, folder, 1);
    expect_refused(folder, LOGLIN_BAD_FILE, "in_proj.weight\" is missing");
    *tensor = kept;

    tensor->dtype = LOGLIN_TENSOR_I32;
    support_lm_write(&lm, folder, 1);
    expect_refused(folder, LOGLIN_BAD_FILE, "is I32, expected F32, F16 or BF16");
    *tensor = kept;

    float *values = (float *)(uintptr_t)tensor->data;
    const float value = values[5];
    values[5] = NAN;
    support_lm_write(&lm, folder, 1);
    expect_refused(folder, LOGLIN_BAD_FILE, "value 5 is not finite");
    values[5] = -HUGE_VALF;
    support_lm_write(&lm, folder, 1);
    expect_refused(folder, LOGLIN_BAD_FILE, "value 5 is not finite");
    values[5] = value;

    const float number = 1;
    lm.tensors[lm.count++] =
        (loglin_tensor){.name = "surplus", .rank = 1, .shape = {1}, .data = &number, .size = sizeof number};
    support_lm_write(&lm, folder, 1);
    expect_refused(folder, LOGLIN_BAD_FILE, "\"surplus\" is not one that the config asks for");
    lm.count--;

    support_lm_write(&lm, folder, 1);
    char path[128];
    (void)snprintf(path, sizeof path, "%s/model.safetensors", folder);
    cr_expect_eq(truncate(path, 4000), 0);
    expect_refused(folder, LOGLIN_BAD_FILE, "model.safetensors");
    cr_expect_eq(truncate(path, 3), 0);
    expect_refused(folder, LOGLIN_BAD_FILE, "model.safetensors");
    cr_expect_eq(unlink(path), 0);
    expect_refused(folder, LOGLIN_IO, "model.safetensors");
    support_lm_free(&lm);
    support_remove_folder(folder);
    expect_refused(folder, LOGLIN_IO, folder);
}

Test(model, bad_levels) {
    char folder[64];
    support_make_folder(folder, sizeof folder);
    support_lm lm = support_lm_make(good_config, LOGLIN_TENSOR_F32, 7, 20, 3);
    loglin_tensor *levels = support_lm_find(&lm, "backbone.layers.0.mixer.L");
    levels->shape[0] = 14;
    levels->shape[1] = 1;
    support_lm_write(&lm, folder, 1);
    expect_refused(folder, LOGLIN_BAD_FILE, "mixer.L");
    support_lm_free(&lm);
    support_remove_folder(folder);
}

Test(model, bad_indexes) {
    static const struct {
        const char *index;
        const char *text;
    } cases[] = {
        {"{", "line"},
        {"{}", "weight_map"},
        {"{\"weight_map\": {}}", "weight_map"},
        {"{\"weight_map\": {\"a\": 3}}", "not a string"},
        {"{\"weight_map\": {\"a\": \"../model.safetensors\"}}", "without folder"},
        {"{\"weight_map\": {\"a\": \"/etc/passwd\"}}", "without folder"},
        {"{\"weight_map\": {\"a\": \"..\"}}", "without folder"},
        {"{\"weight_map\": {\"a\": \".hidden.safetensors\"}}", "without folder"},
        {"{\"weight_map\": {\"a\": \"sub/model.safetensors\"}}", "without folder"},
        {"{\"weight_map\": {\"a\": \"pytorch_model.bin\"}}", "without folder"},
    };
    char folder[64];
    support_make_folder(folder, sizeof folder);
    support_lm lm = support_lm_make(good_config, LOGLIN_TENSOR_F32, 7, 20, 3);
    support_lm_write(&lm, folder, 3);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        support_write_text(folder, "model.safetensors.index.json", cases[i].index);
        expect_refused(folder, LOGLIN_BAD_FILE, cases[i].text);
    }
    support_write_text(folder, "model.safetensors.index.json", "{\"weight_map\": {\"a\": \"none.safetensors\"}}");
    expect_refused(folder, LOGLIN_IO, "none.safetensors");
    support_lm_write(&lm, folder, 3);
    char path[128];
    (void)snprintf(path, sizeof path, "%s/model-00002-of-00003.safetensors", folder);
    cr_expect_eq(truncate(path, 5000), 0);
    expect_refused(folder, LOGLIN_BAD_FILE, "model-00002-of-00003.safetensors");
    support_lm_free(&lm);
    support_remove_folder(folder);
}

/* A tensor in two shards. */
Test(model, duplicate_tensor) {
    char folder[64];
    support_make_folder(folder, sizeof folder);
    support_lm lm = support_lm_make(good_config, LOGLIN_TENSOR_F32, 7, 20, 3);
    lm.tensors[lm.count] = lm.tensors[0];
    lm.count++;
    support_lm_write(&lm, folder, 2);
    char index[512];
    (void)snprintf(index, sizeof index,
                   "{\"weight_map\": {\"a\": \"model-00001-of-00002.safetensors\", "
                   "\"b\": \"model-00002-of-00002.safetensors\"}}");
    support_write_text(folder, "model.safetensors.index.json", index);
    expect_refused(folder, LOGLIN_BAD_FILE, "is in two files");
    lm.count--;
    support_lm_free(&lm);
    support_remove_folder(folder);
}
