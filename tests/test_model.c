/* SPDX-License-Identifier: Apache-2.0 */
/* The two trained models against their recorded outputs. */
#include "model/session.h"
#include "runtime/device.h"
#include "support.h"
#include "support_model.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ENGINES = 2 };

static const loglin_engine engines[ENGINES] = {LOGLIN_ENGINE_BLAS, LOGLIN_ENGINE_FUSED};

/* The blas engine takes every model; the fused engine may refuse one, for its steps or for its passes. */
static bool has_engine(const char *folder, loglin_engine engine) {
    const support_device *device = support_open();
    const loglin_model_options options = {.engine = engine};
    const int32_t ids[2] = {65, 66};
    loglin_model *model = support_model_open(folder, &options);
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

static size_t best_of(const float *logits, float *lead) {
    size_t best = 0;
    float second = -HUGE_VALF;
    for (size_t i = 1; i < SUPPORT_VOCABULARY; i++) {
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

/* ---- Logits and text --------------------------------------------------------------------------------------------- */

static void check_logits(const char *folder, const loglin_model_options *options, double threshold) {
    loglin_safetensors *file = support_expected_open(folder);
    size_t length = 0;
    size_t count = 0;
    int32_t *ids = support_copy_of(file, "input_ids", &length);
    float *expected = support_copy_of(file, "logits", &count);
    float *logits = support_alloc(count, sizeof *logits);
    loglin_model *model = support_model_open(folder, options);
    loglin_session *session = support_session_start(model, 1);
    support_require(loglin_session_score(session, ids, length, logits), "loglin_session_score");
    const double error = support_float_error(logits, expected, count);
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
        check_logits(support_trained[i], NULL, 1e-4);
    }
}

Test(model, logits_on_every_engine) {
    for (size_t i = 0; i < 2; i++) {
        for (size_t e = 0; e < ENGINES; e++) {
            if (has_engine(support_trained[i], engines[e])) {
                const loglin_model_options options = {.engine = engines[e]};
                check_logits(support_trained[i], &options, 1e-4);
            }
        }
    }
}

Test(model, logits_in_pieces) {
    const loglin_model_options options = {.piece = 100};
    for (size_t i = 0; i < 2; i++) {
        check_logits(support_trained[i], &options, 1e-4);
    }
}

Test(model, logits_in_16_bit_storage) {
    const loglin_model_options half = {.dtype = LOGLIN_F16};
    const loglin_model_options bfloat = {.dtype = LOGLIN_BF16};
    for (size_t i = 0; i < 2; i++) {
        check_logits(support_trained[i], &half, 5e-3);
        check_logits(support_trained[i], &bfloat, 4e-2);
    }
}

/* The session's text after the prompt is the expected one. */
static void check_text(const char *folder, loglin_session *session) {
    loglin_safetensors *file = support_expected_open(folder);
    size_t prompt = 0;
    size_t total = 0;
    int32_t *ids = support_copy_of(file, "prompt_ids", &prompt);
    int32_t *expected = support_copy_of(file, "greedy_ids", &total);
    float logits[SUPPORT_VOCABULARY];
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
    loglin_safetensors_close(file);
    free(ids);
    free(expected);
}

static void check_greedy(const char *folder) {
    loglin_model *model = support_model_open(folder, NULL);
    loglin_session *session = support_session_start(model, 1);
    check_text(folder, session);
    loglin_session_destroy(session);
    loglin_model_close(model);
}

Test(model, greedy_continuation) {
    check_greedy(SUPPORT_MAMBA2);
    check_greedy(SUPPORT_GATED_DELTA);
}

/* Where the host cannot look into memory that a kernel writes. */
Test(model, steps_in_memory_of_the_device) {
    support_open()->device->shares_memory = false;
    check_greedy(SUPPORT_MAMBA2);
}

/*
 * Where the states of all layers do not fit into one buffer a step takes many launches, on a small model too.  The limit is
 * the states' alone: a GPU's prefill needs larger buffers, for which the device has to do.
 */
Test(model, layers_in_buffers_of_their_own) {
    uint64_t *limit = &support_open()->device->info.max_allocation;
    const uint64_t own = *limit;
    loglin_model *model = support_model_open(SUPPORT_MAMBA2, NULL);
    *limit = (uint64_t)2 << 20;
    loglin_session *session = support_session_start(model, 1);
    *limit = own;
    cr_expect_null(session->all_values.all);
    check_text(SUPPORT_MAMBA2, session);
    loglin_session_destroy(session);
    loglin_model_close(model);
}

/* Bits per byte of a window's bytes but the first. */
static double bits_of_window(loglin_session *session, const int32_t *ids, size_t window, float *logits) {
    double bits = 0;
    support_require(loglin_session_reset(session, 0), "loglin_session_reset");
    support_require(loglin_session_score(session, ids, window, logits), "loglin_session_score");
    for (size_t i = 1; i < window; i++) {
        const float *row = logits + (i - 1) * SUPPORT_VOCABULARY;
        double sum = 0;
        for (size_t j = 0; j < SUPPORT_VOCABULARY; j++) {
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
    loglin_safetensors *file = support_expected_open(folder);
    size_t one = 0;
    float *expected = support_copy_of(file, "val_bpb", &one);
    loglin_model *model = support_model_open(folder, NULL);
    loglin_session *session = support_session_start(model, 1);
    int32_t *ids = support_alloc(window, sizeof *ids);
    float *logits = support_alloc(window * SUPPORT_VOCABULARY, sizeof *logits);
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
    check_bits_per_byte(SUPPORT_MAMBA2, 2048);
    check_bits_per_byte(SUPPORT_GATED_DELTA, 1024);
}

/* Prefill of the first n bytes, then steps, at every n: the logits after the last byte are those of one pass. */
static void check_splits(const char *folder, loglin_engine engine) {
    enum { LENGTH = 200 };
    const loglin_model_options options = {.engine = engine};
    loglin_safetensors *file = support_expected_open(folder);
    size_t length = 0;
    int32_t *ids = support_copy_of(file, "input_ids", &length);
    loglin_model *model = support_model_open(folder, &options);
    loglin_session *session = support_session_start(model, 1);
    float whole[SUPPORT_VOCABULARY];
    float parts[SUPPORT_VOCABULARY];
    support_require(loglin_session_prefill(session, 0, ids, LENGTH, whole), "loglin_session_prefill");
    for (size_t n = 0; n < LENGTH; n++) {
        support_require(loglin_session_reset(session, 0), "loglin_session_reset");
        if (n > 0) {
            support_require(loglin_session_prefill(session, 0, ids, n, NULL), "loglin_session_prefill");
        }
        for (size_t i = n; i < LENGTH; i++) {
            support_require(loglin_session_step(session, &ids[i], i + 1 == LENGTH ? parts : NULL), "step");
        }
        const double error = support_float_error(parts, whole, SUPPORT_VOCABULARY);
        cr_expect_leq(error, 1e-5, "%s: split at %zu: error %g", folder, n, error);
    }
    loglin_session_destroy(session);
    loglin_model_close(model);
    loglin_safetensors_close(file);
    free(ids);
}

Test(model, every_split_of_mamba2) {
    check_splits(SUPPORT_MAMBA2, LOGLIN_ENGINE_BLAS);
}

Test(model, every_split_of_gated_delta) {
    check_splits(SUPPORT_GATED_DELTA, LOGLIN_ENGINE_BLAS);
}

Test(model, every_split_on_the_fused_engine) {
    bool any = false;
    for (size_t i = 0; i < 2; i++) {
        if (has_engine(support_trained[i], LOGLIN_ENGINE_FUSED)) {
            check_splits(support_trained[i], LOGLIN_ENGINE_FUSED);
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
        loglin_safetensors *file = support_expected_open(support_trained[m]);
        size_t length = 0;
        int32_t *ids = support_copy_of(file, "input_ids", &length);
        loglin_model *model = support_model_open(support_trained[m], NULL);
        loglin_session *session = support_session_start(model, 1);
        float whole[SUPPORT_VOCABULARY];
        float parts[SUPPORT_VOCABULARY];
        support_require(loglin_session_prefill(session, 0, ids, LENGTH, whole), "loglin_session_prefill");
        for (size_t i = 0; i < sizeof splits / sizeof splits[0]; i++) {
            const size_t n = splits[i];
            support_require(loglin_session_reset(session, 0), "loglin_session_reset");
            support_require(loglin_session_prefill(session, 0, ids, n, NULL), "first piece");
            support_require(loglin_session_prefill(session, 0, ids + n, LENGTH - n, parts), "second piece");
            const double error = support_float_error(parts, whole, SUPPORT_VOCABULARY);
            cr_expect_leq(error, 1e-5, "%s: pieces of %zu and %zu: error %g", support_trained[m], n, LENGTH - n, error);
        }
        loglin_session_destroy(session);
        loglin_model_close(model);
        loglin_safetensors_close(file);
        free(ids);
    }
}

/*
 * The model's kernels and products for GPUs, on whatever device is here: the same answers.  With the blas engine: PoCL takes
 * many minutes to compile the work-group lanes of a GPU at these dimensions, which are test_lanes' anyway.
 */
Test(model, as_on_a_gpu) {
    const loglin_model_options options = {.engine = LOGLIN_ENGINE_BLAS};
    loglin_device *device = support_open()->device;
    device->is_cpu = false;
    device->info.vendor[0] = '\0'; /* Intel's GPUs have build options of their own, and NVIDIA's a product */
    for (size_t i = 0; i < 2; i++) {
        check_logits(support_trained[i], &options, 1e-4);
    }
}
