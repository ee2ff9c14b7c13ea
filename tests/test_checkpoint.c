/* SPDX-License-Identifier: Apache-2.0 */
/* Checkpoints that are not what they should be. */
#include "support.h"
#include "support_lm.h"

#include "loglin_model.h"
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static const char good_config[] =
    SUPPORT_MAMBA2_CONFIG("\"hidden_size\": 16, \"expand\": 2, \"num_heads\": 2, \"head_dim\": 16, \"state_size\": 8");

/* Opening fails with this status, and the error text holds `text`. */
static void expect_refused(const char *folder, loglin_status status, const char *text) {
    const support_device *device = support_open();
    loglin_model *model = NULL;
    cr_expect_eq(loglin_model_open(device->device, device->queue, folder, NULL, &model), status, "%s: %s", text,
                 loglin_last_error());
    cr_expect_null(model);
    cr_expect_not_null(strstr(loglin_last_error(), text), "\"%s\", expected \"%s\" in it", loglin_last_error(), text);
}

Test(checkpoint, bad_configs) {
    static const struct {
        const char *config;
        loglin_status status;
        const char *text;
    } cases[] = {
        {"", LOGLIN_BAD_FILE, "line"},
        {"[]", LOGLIN_BAD_FILE, "not an object"},
        {"{}", LOGLIN_BAD_FILE, "model_type is missing"},
        {"{\"model_type\": 7}", LOGLIN_BAD_FILE, "model_type is 7, expected a string"},
        {"{\"model_type\": \"llama\"}", LOGLIN_UNSUPPORTED, "llama"},
        {SUPPORT_MAMBA2_CONFIG("\"hidden_size\": 16, \"hidden_size\": 16"), LOGLIN_BAD_FILE, "duplicate"},
        {SUPPORT_MAMBA2_CONFIG("\"hidden_size\": -1"), LOGLIN_BAD_FILE, "hidden_size is -1"},
        {SUPPORT_MAMBA2_CONFIG("\"hidden_size\": 99999999999"), LOGLIN_BAD_FILE, "hidden_size is 99999999999"},
        {SUPPORT_MAMBA2_CONFIG("\"hidden_size\": 1.5"), LOGLIN_BAD_FILE, "hidden_size is 1.5, expected an integer"},
        {SUPPORT_MAMBA2_CONFIG("\"hidden_size\": \"16\""), LOGLIN_BAD_FILE,
         "hidden_size is \"16\", expected an integer"},
        {SUPPORT_MAMBA2_CONFIG("\"hidden_size\": 16"), LOGLIN_BAD_FILE, "num_heads is missing"},
        {SUPPORT_MAMBA2_CONFIG("\"hidden_size\": 16, \"num_heads\": 2, \"head_dim\": 1000, \"state_size\": 8"),
         LOGLIN_BAD_FILE, "head_dim is 1000, expected 1 to 512"},
        {SUPPORT_MAMBA2_CONFIG("\"hidden_size\": 16, \"num_heads\": 2, \"head_dim\": 8, \"state_size\": 8"),
         LOGLIN_BAD_FILE, "expand * hidden_size is 32, expected num_heads * head_dim = 16"},
        {SUPPORT_MAMBA2_CONFIG(
             "\"hidden_size\": 16, \"num_heads\": 4, \"head_dim\": 8, \"state_size\": 8, \"n_groups\": 3"),
         LOGLIN_BAD_FILE, "n_groups is 3"},
        {SUPPORT_MAMBA2_CONFIG(
             "\"hidden_size\": 16, \"num_heads\": 4, \"head_dim\": 8, \"state_size\": 8, \"norm_eps\": 0"),
         LOGLIN_BAD_FILE, "norm_eps is 0"},
        {SUPPORT_MAMBA2_CONFIG(
             "\"hidden_size\": 16, \"num_heads\": 4, \"head_dim\": 8, \"state_size\": 8, \"conv_kernel\": 0"),
         LOGLIN_BAD_FILE, "conv_kernel is 0"},
        {SUPPORT_MAMBA2_CONFIG(
             "\"hidden_size\": 16, \"num_heads\": 4, \"head_dim\": 8, \"state_size\": 8, \"rmsnorm\": false"),
         LOGLIN_UNSUPPORTED, "rmsnorm is false"},
        {SUPPORT_MAMBA2_CONFIG("\"hidden_size\": 16, \"num_heads\": 4, \"head_dim\": 8, \"state_size\": 8, "
                               "\"dt_limit\": [2, 1]"),
         LOGLIN_BAD_FILE, "dt_limit is [2,1], expected [min, max]"},
        {SUPPORT_MAMBA2_CONFIG("\"hidden_size\": 16, \"num_heads\": 4, \"head_dim\": 8, \"state_size\": 8, "
                               "\"dt_limit\": [1e300, 1e301]"),
         LOGLIN_BAD_FILE, "dt_limit is [1e300,1e301], expected [min, max]"},
        {SUPPORT_MAMBA2_CONFIG("\"hidden_size\": 16, \"num_heads\": 4, \"head_dim\": 8, \"state_size\": 8, "
                               "\"hidden_act\": \"gelu\""),
         LOGLIN_UNSUPPORTED, "gelu"},
        {SUPPORT_MAMBA2_CONFIG("\"hidden_size\": 16, \"num_heads\": 4, \"head_dim\": 8, \"state_size\": 8, "
                               "\"hidden_act\": 4"),
         LOGLIN_BAD_FILE, "hidden_act is 4, expected a string"},
        {SUPPORT_DELTA_CONFIG("\"hidden_size\": 16, \"num_heads\": 4, \"head_dim\": 5, \"expand_v\": 1.5"),
         LOGLIN_BAD_FILE, "head_dim * expand_v is 7.5"},
        {SUPPORT_DELTA_CONFIG("\"hidden_size\": 16, \"num_heads\": 4, \"head_dim\": 5, \"expand_v\": 1e9"),
         LOGLIN_BAD_FILE, "expand_v is 1e+09"},
        {SUPPORT_DELTA_CONFIG("\"hidden_size\": 16, \"num_heads\": 4, \"head_dim\": 5, \"attn\": {}"),
         LOGLIN_UNSUPPORTED, "attn is set"},
        {SUPPORT_DELTA_CONFIG("\"hidden_size\": 16, \"num_heads\": 4, \"head_dim\": 5, \"use_gate\": 1"),
         LOGLIN_BAD_FILE, "use_gate is 1, expected true or false"},
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

Test(checkpoint, bad_tensors) {
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

Test(checkpoint, bad_levels) {
    char folder[64];
    support_make_folder(folder, sizeof folder);
    support_lm lm = support_lm_make(good_config, LOGLIN_TENSOR_F32, 7, 20, 3);
    loglin_tensor *levels = support_lm_find(&lm, "backbone.layers.0.mixer.L");
    levels->shape[0] = 14;
    levels->shape[1] = 1;
    support_lm_write(&lm, folder, 1);
    expect_refused(folder, LOGLIN_BAD_FILE, "mixer.L\" is [14, 1], expected [");
    support_lm_free(&lm);
    support_remove_folder(folder);
}

Test(checkpoint, bad_indexes) {
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

static const char first_file[] = "model-00001-of-00002.safetensors";
static const char second_file[] = "model-00002-of-00002.safetensors";

/* An index of two tensors. */
static void write_index(const char *folder, const char *tensor, const char *file, const char *other,
                        const char *other_file) {
    char index[512];
    (void)snprintf(index, sizeof index, "{\"weight_map\": {\"%s\": \"%s\", \"%s\": \"%s\"}}", tensor, file, other,
                   other_file);
    support_write_text(folder, "model.safetensors.index.json", index);
}

/* Indexes that say otherwise than the files. */
Test(checkpoint, wrong_indexes) {
    char folder[64];
    support_make_folder(folder, sizeof folder);
    support_lm lm = support_lm_make(good_config, LOGLIN_TENSOR_F32, 7, 20, 3);
    const char *of_first = lm.tensors[0].name;
    const char *of_second = lm.tensors[lm.count - 1].name;
    support_lm_write(&lm, folder, 2);
    write_index(folder, of_first, first_file, "ghost", second_file);
    expect_refused(folder, LOGLIN_BAD_FILE,
                   "weight_map[\"ghost\"] is \"model-00002-of-00002.safetensors\", which has no such tensor");
    write_index(folder, of_first, second_file, of_second, first_file);
    expect_refused(folder, LOGLIN_BAD_FILE, "which has no such tensor");
    write_index(folder, of_first, first_file, of_second, second_file);
    expect_refused(folder, LOGLIN_BAD_FILE, "weight_map has no entry for tensor");
    support_lm_free(&lm);
    support_remove_folder(folder);
}

/* A tensor in two shards, once in the index. */
Test(checkpoint, duplicate_tensor) {
    char folder[64];
    char path[128];
    loglin_tensor_error error;
    support_make_folder(folder, sizeof folder);
    support_lm lm = support_lm_make(good_config, LOGLIN_TENSOR_F32, 7, 20, 3);
    const size_t begin = lm.count / 2; /* of the second file */
    support_lm_write(&lm, folder, 2);
    lm.tensors[lm.count] = lm.tensors[0];
    (void)snprintf(path, sizeof path, "%s/%s", folder, second_file);
    cr_assert(loglin_safetensors_write(path, lm.tensors + begin, lm.count + 1 - begin, NULL, 0, &error), "%s",
              error.text);
    expect_refused(folder, LOGLIN_BAD_FILE, "is in two files");
    support_lm_free(&lm);
    support_remove_folder(folder);
}
