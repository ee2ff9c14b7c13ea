/* SPDX-License-Identifier: Apache-2.0 */
/* What both architectures share: the common keys of the config, the shapes of matrices and vectors. */
#include "model/lm.h"

#include "model/architecture.h"
#include "runtime/status.h"
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

static const struct {
    const char *model_type;
    const loglin_architecture *architecture;
} model_types[] = {
    {"log_linear_mamba2", &loglin_mamba2_lm},
    {"hattention", &loglin_mamba2_lm},
    {"h_gated_deltanet", &loglin_gated_delta_lm},
};

static const loglin_architecture *architecture_of(const loglin_lm *lm) {
    return lm->op == LOGLIN_GATED_DELTA ? &loglin_gated_delta_lm : &loglin_mamba2_lm;
}

/* ---- The config ------------------------------------------------------------------------------------------------- */

static loglin_status find_architecture(const loglin_config *config, const loglin_architecture **architecture) {
    const char *type = "";
    RETURN_IF_ERROR(loglin_config_need_string(config, "model_type", &type));
    for (size_t i = 0; i < sizeof model_types / sizeof model_types[0]; i++) {
        if (strcmp(type, model_types[i].model_type) == 0) {
            *architecture = model_types[i].architecture;
            return LOGLIN_OK;
        }
    }
    return loglin_fail(LOGLIN_UNSUPPORTED,
                       "%s: model_type is \"%.64s\", expected log_linear_mamba2, hattention or h_gated_deltanet",
                       config->path, type);
}

static loglin_status parse_keys(const loglin_config *config, loglin_lm *lm) {
    const loglin_architecture *architecture = &loglin_mamba2_lm;
    RETURN_IF_ERROR(find_architecture(config, &architecture));
    double norm_eps = architecture == &loglin_mamba2_lm ? 1e-5 : 1e-6;
    *lm = (loglin_lm){.op = architecture->op, .dt_min = 0, .dt_max = INFINITY};
    RETURN_IF_ERROR(loglin_config_need_size(config, "hidden_size", 1, 65536, &lm->hidden));
    RETURN_IF_ERROR(loglin_config_need_size(config, "num_hidden_layers", 1, 1024, &lm->layers));
    RETURN_IF_ERROR(loglin_config_need_size(config, "vocab_size", 1, 16777216, &lm->vocabulary));
    RETURN_IF_ERROR(loglin_config_need_size(config, "num_heads", 1, 1024, &lm->heads));
    RETURN_IF_ERROR(loglin_config_size(config, "intermediate_size", 1, 1048576, &lm->intermediate));
    RETURN_IF_ERROR(loglin_config_real(config, "norm_eps", FLT_MIN, 1, &norm_eps));
    RETURN_IF_ERROR(loglin_config_bool(config, "tie_word_embeddings", &lm->tied));
    RETURN_IF_ERROR(loglin_config_check_activation(config));
    lm->norm_eps = (float)norm_eps;
    return architecture->parse(config, lm);
}

loglin_status loglin_lm_parse(const char *path, const char *text, size_t size, loglin_lm *lm) {
    loglin_config config;
    RETURN_IF_ERROR(loglin_config_parse(path, text, size, &config));
    const loglin_status status = parse_keys(&config, lm);
    loglin_config_free(&config);
    return status;
}

loglin_lm_layout loglin_lm_get_layout(const loglin_lm *lm) {
    loglin_lm_layout layout;
    architecture_of(lm)->layout(lm, &layout);
    return layout;
}

/* ---- Tensors ---------------------------------------------------------------------------------------------------- */

static void layer_prefix(const loglin_lm *lm, size_t layer, char *prefix, size_t capacity) {
    (void)snprintf(prefix, capacity, "%s%zu.", architecture_of(lm)->layers, layer);
}

size_t loglin_lm_layer_tensors(const loglin_lm *lm, size_t layer, loglin_lm_tensor *tensors) {
    char prefix[64];
    layer_prefix(lm, layer, prefix, sizeof prefix);
    return architecture_of(lm)->layer_tensors(lm, prefix, tensors);
}

size_t loglin_lm_model_tensors(const loglin_lm *lm, loglin_lm_tensor *tensors) {
    const loglin_architecture *architecture = architecture_of(lm);
    size_t n = 0;
    tensors[n++] =
        loglin_lm_matrix_tensor("", architecture->embedding, lm->vocabulary, lm->hidden, LOGLIN_MATRIX_EMBEDDING, 0);
    tensors[n++] = loglin_lm_vector_tensor("", architecture->final_norm, lm->hidden, LOGLIN_VECTOR_FINAL_NORM, 0);
    if (!lm->tied) {
        tensors[n++] = loglin_lm_matrix_tensor("", "lm_head.weight", lm->vocabulary, lm->hidden, LOGLIN_MATRIX_HEAD, 0);
    }
    return n;
}

void loglin_lm_level_tensor_name(const loglin_lm *lm, char *name, size_t capacity) {
    char prefix[64];
    layer_prefix(lm, 0, prefix, sizeof prefix);
    (void)snprintf(name, capacity, "%s%s", prefix, architecture_of(lm)->level);
}

void loglin_lm_gate_tensor_name(const loglin_lm *lm, char *name, size_t capacity) {
    char prefix[64];
    layer_prefix(lm, 0, prefix, sizeof prefix);
    (void)snprintf(name, capacity, "%s%s", prefix, architecture_of(lm)->gate);
}

void loglin_lm_matrix_shape(const loglin_lm *lm, loglin_matrix_id id, size_t *rows, size_t *columns) {
    *columns = lm->hidden;
    switch (id) {
    case LOGLIN_MATRIX_IN:
        *rows = loglin_lm_get_layout(lm).columns;
        break;
    case LOGLIN_MATRIX_OUT:
        *rows = lm->hidden;
        *columns = lm->inner;
        break;
    case LOGLIN_MATRIX_GATE_UP:
        *rows = (lm->intermediate + 15) / 16 * 32;
        break;
    case LOGLIN_MATRIX_DOWN:
        *rows = lm->hidden;
        *columns = lm->intermediate;
        break;
    case LOGLIN_MATRIX_EMBEDDING:
    case LOGLIN_MATRIX_HEAD:
        *rows = lm->vocabulary;
        break;
    }
}

size_t loglin_lm_vector_size(const loglin_lm *lm, loglin_vector_id id) {
    switch (id) {
    case LOGLIN_VECTOR_IN_BIAS:
        return loglin_lm_get_layout(lm).columns;
    case LOGLIN_VECTOR_CONV:
        return lm->conv_kernel * lm->conv_channels;
    case LOGLIN_VECTOR_CONV_BIAS:
        return lm->conv_channels;
    case LOGLIN_VECTOR_DT_BIAS:
    case LOGLIN_VECTOR_A:
        return lm->heads;
    case LOGLIN_VECTOR_LEVEL:
        return lm->heads * lm->levels;
    case LOGLIN_VECTOR_D:
    case LOGLIN_VECTOR_OUT_NORM:
        return lm->inner;
    case LOGLIN_VECTOR_MIXER_NORM:
    case LOGLIN_VECTOR_OUT_BIAS:
    case LOGLIN_VECTOR_MLP_NORM:
    case LOGLIN_VECTOR_FINAL_NORM:
        break;
    }
    return lm->hidden;
}
