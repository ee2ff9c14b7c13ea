/* SPDX-License-Identifier: Apache-2.0 */
/* model_type h_gated_deltanet: projections to q, k, v, the gate and the gates, which are read here as one matrix. */
#include "model/architecture.h"

#include "runtime/status.h"
#include <math.h>
#include <stdio.h>

static loglin_status parse_dim_v(const loglin_config *config, loglin_lm *lm) {
    double expand = 2;
    size_t v_heads = lm->heads;
    RETURN_IF_ERROR(loglin_config_real(config, "expand_v", 1.0 / LOGLIN_MAX_DIM, LOGLIN_MAX_DIM, &expand));
    RETURN_IF_ERROR(loglin_config_size(config, "num_v_heads", 1, 65536, &v_heads));
    if (v_heads != lm->heads) {
        return loglin_fail(LOGLIN_UNSUPPORTED, "%s: num_v_heads is %zu, only num_heads = %zu is supported",
                           config->path, v_heads, lm->heads);
    }
    const double dim_v = (double)lm->dim_k * expand;
    lm->dim_v = (size_t)(dim_v + 0.5);
    if (lm->dim_v < 1 || lm->dim_v > LOGLIN_MAX_DIM || fabs(dim_v - (double)lm->dim_v) > 1e-6 * dim_v) {
        return loglin_fail(LOGLIN_BAD_FILE, "%s: head_dim * expand_v is %g, expected an integer from 1 to %d",
                           config->path, dim_v, LOGLIN_MAX_DIM);
    }
    return LOGLIN_OK;
}

static loglin_status parse(const loglin_config *config, loglin_lm *lm) {
    lm->conv_kernel = 4;
    RETURN_IF_ERROR(loglin_config_need_size(config, "head_dim", 1, LOGLIN_MAX_DIM, &lm->dim_k));
    RETURN_IF_ERROR(loglin_config_size(config, "conv_size", 1, 16, &lm->conv_kernel));
    RETURN_IF_ERROR(loglin_config_bool(config, "conv_bias", &lm->conv_bias));
    RETURN_IF_ERROR(loglin_config_must_be(config, "use_gate", true));
    RETURN_IF_ERROR(loglin_config_must_be(config, "use_short_conv", true));
    RETURN_IF_ERROR(loglin_config_must_be(config, "allow_neg_eigval", false));
    RETURN_IF_ERROR(loglin_config_must_be_null(config, "attn"));
    RETURN_IF_ERROR(parse_dim_v(config, lm));
    lm->groups = lm->heads;
    lm->inner = lm->heads * lm->dim_v;
    lm->segment = lm->dim_v;
    lm->conv_channels = 2 * lm->heads * lm->dim_k + lm->inner;
    return LOGLIN_OK;
}

static void layout(const loglin_lm *lm, loglin_lm_layout *out) {
    out->conv = 0;
    out->z = lm->conv_channels;
    out->beta = out->z + lm->inner;
    out->dt = out->beta + lm->heads;
    out->level = out->dt + lm->heads;
    out->columns = out->level + lm->heads * lm->levels;
    out->q = 0;
    out->k = lm->heads * lm->dim_k;
    out->v = 2 * lm->heads * lm->dim_k;
}

/* The projection and the convolution of q, k or v. */
static size_t stream_tensors(const loglin_lm *lm, const char *prefix, char stream, size_t channels, size_t at,
                             loglin_lm_tensor *tensors) {
    char name[32];
    size_t n = 0;
    (void)snprintf(name, sizeof name, "attn.%c_proj.weight", stream);
    tensors[n++] = loglin_lm_matrix_tensor(prefix, name, channels, lm->hidden, LOGLIN_MATRIX_IN, at);
    (void)snprintf(name, sizeof name, "attn.%c_conv1d.weight", stream);
    tensors[n] = loglin_lm_vector_tensor(prefix, name, channels, LOGLIN_VECTOR_CONV, at);
    tensors[n].rank = 3;
    tensors[n].shape[1] = 1;
    tensors[n++].shape[2] = lm->conv_kernel;
    if (lm->conv_bias) {
        (void)snprintf(name, sizeof name, "attn.%c_conv1d.bias", stream);
        tensors[n++] = loglin_lm_vector_tensor(prefix, name, channels, LOGLIN_VECTOR_CONV_BIAS, at);
    }
    return n;
}

static size_t layer_tensors(const loglin_lm *lm, const char *prefix, loglin_lm_tensor *tensors) {
    loglin_lm_layout in;
    layout(lm, &in);
    const loglin_matrix_id matrix = LOGLIN_MATRIX_IN;
    const size_t hidden = lm->hidden;
    size_t n = loglin_lm_mlp_tensors(lm, prefix, tensors);
    tensors[n++] = loglin_lm_vector_tensor(prefix, "attn_norm.weight", hidden, LOGLIN_VECTOR_MIXER_NORM, 0);
    n += stream_tensors(lm, prefix, 'q', lm->heads * lm->dim_k, in.q, tensors + n);
    n += stream_tensors(lm, prefix, 'k', lm->heads * lm->dim_k, in.k, tensors + n);
    n += stream_tensors(lm, prefix, 'v', lm->inner, in.v, tensors + n);
    tensors[n++] = loglin_lm_matrix_tensor(prefix, "attn.g_proj.weight", lm->inner, hidden, matrix, in.z);
    tensors[n++] = loglin_lm_matrix_tensor(prefix, "attn.b_proj.weight", lm->heads, hidden, matrix, in.beta);
    tensors[n++] = loglin_lm_matrix_tensor(prefix, "attn.a_proj.weight", lm->heads, hidden, matrix, in.dt);
    tensors[n++] =
        loglin_lm_matrix_tensor(prefix, "attn.l_proj.weight", lm->heads * lm->levels, hidden, matrix, in.level);
    tensors[n++] = loglin_lm_matrix_tensor(prefix, "attn.o_proj.weight", hidden, lm->inner, LOGLIN_MATRIX_OUT, 0);
    tensors[n++] = loglin_lm_vector_tensor(prefix, "attn.dt_bias", lm->heads, LOGLIN_VECTOR_DT_BIAS, 0);
    tensors[n++] = loglin_lm_vector_tensor(prefix, "attn.A_log", lm->heads, LOGLIN_VECTOR_A, 0);
    tensors[n] = loglin_lm_vector_tensor(prefix, "attn.L", lm->heads, LOGLIN_VECTOR_LEVEL, 0);
    tensors[n].rank = 2;
    tensors[n++].shape[1] = lm->levels;
    tensors[n] = loglin_lm_vector_tensor(prefix, "attn.o_norm.weight", lm->dim_v, LOGLIN_VECTOR_OUT_NORM, 0);
    tensors[n++].tile = lm->heads;
    return n;
}

const loglin_architecture loglin_gated_delta_lm = {
    .op = LOGLIN_GATED_DELTA,
    .embedding = "model.embeddings.weight",
    .final_norm = "model.norm.weight",
    .layers = "model.layers.",
    .level = "attn.L",
    .gate = "mlp.gate_proj.weight",
    .parse = parse,
    .layer_tensors = layer_tensors,
    .layout = layout,
};
