/* SPDX-License-Identifier: Apache-2.0 */
/* Every shape of a model, random weights, against float64. */
#include "runtime/device.h"
#include "support.h"
#include "support_lm.h"
#include "support_model.h"

#include <criterion/criterion.h>
#include <stdlib.h>

typedef struct shape_case {
    const char *config;
    loglin_tensor_dtype dtype;
    size_t levels, intermediate, shards;
} shape_case;

static const shape_case shapes[] = {
    {SUPPORT_MAMBA2_CONFIG(
         "\"hidden_size\": 10, \"expand\": 1.5, \"num_heads\": 3, \"head_dim\": 5, \"state_size\": 7"),
     LOGLIN_TENSOR_F32, 7, 11, 1},
    {SUPPORT_MAMBA2_CONFIG(
         "\"hidden_size\": 48, \"expand\": 2, \"num_heads\": 6, \"head_dim\": 16, \"state_size\": 24, "
         "\"n_groups\": 2, \"norm_before_gate\": true, \"D_has_hdim\": true, \"use_bias\": true, "
         "\"tie_word_embeddings\": true, \"conv_kernel\": 3"),
     LOGLIN_TENSOR_BF16, 7, 40, 3},
    {SUPPORT_MAMBA2_CONFIG(
         "\"hidden_size\": 16, \"expand\": 2, \"num_heads\": 2, \"head_dim\": 16, \"state_size\": 16, "
         "\"use_conv_bias\": false, \"conv_kernel\": 1, \"dt_limit\": [0.01, 0.2], "
         "\"intermediate_size\": 33"),
     LOGLIN_TENSOR_F16, 8, 0, 1},
    {SUPPORT_MAMBA2_CONFIG("\"hidden_size\": 1, \"expand\": 1, \"num_heads\": 1, \"head_dim\": 1, \"state_size\": 1, "
                           "\"dt_limit\": [0.0, Infinity]"),
     LOGLIN_TENSOR_F32, 7, 1, 1},
    {"{\"model_type\": \"hattention\", \"num_hidden_layers\": 1, \"vocab_size\": 5, \"hidden_size\": 32, "
     "\"num_heads\": 4, \"head_dim\": 16, \"state_size\": 16, \"n_groups\": 4}",
     LOGLIN_TENSOR_F32, 7, 16, 2},
    {SUPPORT_DELTA_CONFIG(
         "\"hidden_size\": 20, \"num_heads\": 3, \"head_dim\": 6, \"expand_v\": 1.5, \"conv_size\": 4"),
     LOGLIN_TENSOR_F32, 7, 21, 1},
    {SUPPORT_DELTA_CONFIG(
         "\"hidden_size\": 32, \"num_heads\": 2, \"head_dim\": 48, \"expand_v\": 1.5, \"conv_size\": 2, "
         "\"conv_bias\": true, \"tie_word_embeddings\": true, \"intermediate_size\": null"),
     LOGLIN_TENSOR_BF16, 7, 64, 4},
    {SUPPORT_DELTA_CONFIG("\"hidden_size\": 7, \"num_heads\": 1, \"head_dim\": 1, \"expand_v\": 3"), LOGLIN_TENSOR_F16,
     7, 5, 1},
};

static void check_shape(const shape_case *shape, const loglin_model_options *options) {
    enum { LENGTH = 45, SPLIT = 20 };
    char folder[64];
    int32_t ids[LENGTH];
    support_random random = {5};
    support_make_folder(folder, sizeof folder);
    support_lm lm = support_lm_make(shape->config, shape->dtype, shape->levels, shape->intermediate, 3);
    support_lm_write(&lm, folder, shape->shards);
    loglin_model *model = support_model_open(folder, options);
    loglin_session *session = support_session_start(model, 1);
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

Test(shapes, every_shape) {
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        check_shape(&shapes[i], NULL);
    }
}

/*
 * The model's kernels and products for GPUs, on whatever device is here: the same answers.  With the blas engine: PoCL takes
 * many minutes to compile the work-group lanes of a GPU at these dimensions, which are test_lanes' anyway.
 */
Test(shapes, as_on_a_gpu) {
    const loglin_model_options options = {.engine = LOGLIN_ENGINE_BLAS};
    loglin_device *device = support_open()->device;
    device->is_cpu = false;
    device->info.vendor[0] = '\0'; /* Intel's GPUs have build options of their own, and NVIDIA's a product */
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i += 3) {
        check_shape(&shapes[i], &options);
    }
}

/* A sequence ends where the levels end, and the whole of it is right. */
Test(shapes, full_length) {
    enum { LENGTH = 8 };
    char folder[64];
    const int32_t ids[LENGTH + 1] = {3, 1, 4, 1, 5, 9, 2, 6, 5};
    support_make_folder(folder, sizeof folder);
    support_lm lm = support_lm_make(shapes[0].config, LOGLIN_TENSOR_F32, 4, 11, 3);
    support_lm_write(&lm, folder, 1);
    loglin_model *model = support_model_open(folder, NULL);
    loglin_session *session = support_session_start(model, 1);
    float logits[LENGTH * 37];
    support_require(loglin_session_score(session, ids, LENGTH, logits), "loglin_session_score");
    cr_expect_eq(loglin_session_step(session, ids + LENGTH, logits), LOGLIN_INVALID_ARGUMENT);
    support_require(loglin_session_reset(session, 0), "loglin_session_reset");
    cr_expect_eq(loglin_session_prefill(session, 0, ids, LENGTH + 1, logits), LOGLIN_INVALID_ARGUMENT);
    for (size_t i = 0; i < LENGTH; i++) {
        float step[37];
        support_require(loglin_session_step(session, &ids[i], step), "loglin_session_step");
        cr_expect_leq(support_float_error(step, logits + i * 37, 37), 1e-5);
    }
    loglin_session_destroy(session);
    loglin_model_close(model);
    support_lm_free(&lm);
    support_remove_folder(folder);
}
