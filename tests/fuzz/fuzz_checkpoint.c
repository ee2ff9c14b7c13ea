/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libFuzzer target over everything that is read from a model's folder.  The first byte of an input chooses: a safetensors
 * file, a config.json, or an index of shards.  What is accepted is used, so that the sanitizer sees every byte of it.
 */
#include "model/checkpoint.h"
#include "model/lm.h"
#include "tensorfile/safetensors.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

static void require(bool condition) {
    if (!condition) {
        abort();
    }
}

static void fuzz_safetensors(const uint8_t *bytes, size_t size) {
    loglin_safetensors *file = NULL;
    loglin_tensor_error error;
    if (!loglin_safetensors_parse(bytes, size, &file, &error)) {
        require(memchr(error.text, '\0', sizeof error.text) != NULL);
        return;
    }
    uint8_t sum = 0;
    for (size_t i = 0; i < loglin_safetensors_count(file); i++) {
        const loglin_tensor *tensor = loglin_safetensors_at(file, i);
        require(loglin_safetensors_find(file, tensor->name) == tensor);
        for (size_t j = 0; j < tensor->size; j++) {
            sum = (uint8_t)(sum + ((const uint8_t *)tensor->data)[j]);
        }
    }
    (void)sum;
    (void)loglin_safetensors_metadata(file, "format");
    loglin_safetensors_close(file);
}

static void fuzz_config(const uint8_t *bytes, size_t size) {
    loglin_lm lm;
    loglin_lm_tensor tensors[LOGLIN_LM_MAX_LAYER_TENSORS];
    if (loglin_lm_parse("config.json", (const char *)bytes, size, &lm) != LOGLIN_OK) {
        return;
    }
    lm.levels = 15;
    lm.intermediate = lm.intermediate != 0 ? lm.intermediate : 1;
    const loglin_lm_layout layout = loglin_lm_get_layout(&lm);
    require(lm.heads * lm.dim_v == lm.inner && lm.heads % lm.groups == 0 && lm.inner % lm.segment == 0);
    require(layout.v < lm.conv_channels && layout.level + lm.heads * lm.levels == layout.columns);
    require(loglin_lm_layer_tensors(&lm, lm.layers - 1, tensors) <= LOGLIN_LM_MAX_LAYER_TENSORS);
    require(loglin_lm_model_tensors(&lm, tensors) <= LOGLIN_LM_MODEL_TENSORS);
}

static void fuzz_index(const uint8_t *bytes, size_t size) {
    loglin_shard_names shards;
    if (loglin_shard_names_parse("index.json", (const char *)bytes, size, &shards) != LOGLIN_OK) {
        return;
    }
    for (size_t i = 0; i < shards.count; i++) {
        require(strchr(shards.names[i], '/') == NULL && shards.names[i][0] != '.');
        require(i == 0 || strcmp(shards.names[i - 1], shards.names[i]) < 0);
    }
    loglin_shard_names_free(&shards);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    static void (*const targets[])(const uint8_t *, size_t) = {fuzz_safetensors, fuzz_config, fuzz_index};
    if (size > 0) {
        targets[bytes[0] % 3](bytes + 1, size - 1);
    }
    return 0;
}
