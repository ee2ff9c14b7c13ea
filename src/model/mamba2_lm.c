/* SPDX-License-Identifier: Apache-2.0 */
/* model_type log_linear_mamba2: one input projection to z, x, B, C, dt and the level weights. */
#include "model/architecture.h"

#include "runtime/status.h"
#include <math.h>

static loglin_status parse_inner(const loglin_config *config, loglin_lm *lm) {
    double expand = 2;
    RETURN_IF_ERROR(loglin_config_real(config, "expand", 1.0 / 1024, 1024, &expand));
    const double inner = expand * (double)lm->hidden;
    lm->inner = lm->heads * lm->dim_v;
    if (fabs(inner - (double)lm->inner) > 1e-6 * inner) {
        return loglin_fail(LOGLIN_BAD_FILE, "%s: expand * hidden_size is %g, expected num_heads * head_dim = %zu",
                           config->path, inner, lm->inner);
    }
    if (lm->heads % lm->groups != 0) {
        return loglin_fail(LOGLIN_BAD_FILE, "%s: n_groups is %zu, expected a divisor of num_heads = %zu", config->path,
                           lm->groups, lm->heads);
    }
    return LOGLIN_OK;
}

static loglin_status parse(const loglin_config *config, loglin_lm *lm) {
    bool norm_before_gate = false;
    lm->groups = 1;
    lm->conv_kernel = 4;
    lm->conv_bias = true;
    RETURN_IF_ERROR(loglin_config_need_size(config, "head_dim", 1, LOGLIN_MAX_DIM, &lm->dim_v));
    RETURN_IF_ERROR(loglin_config_need_size(config, "state_size", 1, LOGLIN_MAX_DIM, &lm->dim_k));
    RETURN_IF_ERROR(loglin_config_size(config, "n_groups", 1, lm->heads, &lm->groups));
    RETURN_IF_ERROR(loglin_config_size(config, "conv_kernel", 1, 16, &lm->conv_kernel));
    RETURN_IF_ERROR(loglin_config_bool(config, "norm_before_gate", &norm_before_gate));
    RETURN_IF_ERROR(loglin_config_bool(config, "D_has_hdim", &lm->wide_d));
    RETURN_IF_ERROR(loglin_config_bool(config, "use_bias", &lm->bias));
    RETURN_IF_ERROR(loglin_config_bool(config, "use_conv_bias", &lm->conv_bias));
    RETURN_IF_ERROR(loglin_config_limits(config, "dt_limit", &lm->dt_min, &lm->dt_max));
    RETURN_IF_ERROR(loglin_config_limits(config, "time_step_limit", &lm->dt_min, &lm->dt_max));
    RETURN_IF_ERROR(loglin_config_must_be(config, "rmsnorm", true));
    RETURN_IF_ERROR(parse_inner(config, lm));
    lm->gate_first = !norm_before_gate;
    lm->segment = lm->inner / lm->groups;
    lm->conv_channels = lm->inner + 2 * lm->groups * lm->dim_k;
    return LOGLIN_OK;
}

static void layout(const loglin_lm *lm, loglin_lm_layout *out) {
    out->z = 0;
    out->conv = lm->inner;
    out->dt = out->conv + lm->conv_channels;
    out->beta = out->dt;
    out->level = out->dt + lm->heads;
    out->columns = out->level + lm->heads * lm->levels;
    out->v = 0;
    out->k = lm->inner;
    out->q = lm->inner + lm->groups * lm->dim_k;
}

static size_t layer_tensors(const loglin_lm *lm, const char *prefix, loglin_lm_tensor *tensors) {
    loglin_lm_layout in;
    layout(lm, &in);
    const size_t columns = in.columns;
    size_t n = loglin_lm_mlp_tensors(lm, prefix, tensors);
    tensors[n++] = loglin_lm_vector_tensor(prefix, "mixer_norm.weight", lm->hidden, LOGLIN_VECTOR_MIXER_NORM, 0);
    tensors[n++] = loglin_lm_matrix_tensor(prefix, "mixer.in_proj.weight", columns, lm->hidden, LOGLIN_MATRIX_IN, 0);
    tensors[n++] =
        loglin_lm_matrix_tensor(prefix, "mixer.out_proj.weight", lm->hidden, lm->inner, LOGLIN_MATRIX_OUT, 0);
    if (lm->bias) {
        tensors[n++] = loglin_lm_vector_tensor(prefix, "mixer.in_proj.bias", columns, LOGLIN_VECTOR_IN_BIAS, 0);
        tensors[n++] = loglin_lm_vector_tensor(prefix, "mixer.out_proj.bias", lm->hidden, LOGLIN_VECTOR_OUT_BIAS, 0);
    }
    tensors[n] = loglin_lm_vector_tensor(prefix, "mixer.conv1d.weight", lm->conv_channels, LOGLIN_VECTOR_CONV, 0);
    tensors[n].rank = 3;
    tensors[n].shape[1] = 1;
    tensors[n++].shape[2] = lm->conv_kernel;
    if (lm->conv_bias) {
        tensors[n++] =
            loglin_lm_vector_tensor(prefix, "mixer.conv1d.bias", lm->conv_channels, LOGLIN_VECTOR_CONV_BIAS, 0);
    }
    tensors[n++] = loglin_lm_vector_tensor(prefix, "mixer.dt_bias", lm->heads, LOGLIN_VECTOR_DT_BIAS, 0);
    tensors[n++] = loglin_lm_vector_tensor(prefix, "mixer.A_log", lm->heads, LOGLIN_VECTOR_A, 0);
    tensors[n] = loglin_lm_vector_tensor(prefix, "mixer.L", lm->heads, LOGLIN_VECTOR_LEVEL, 0);
    tensors[n].rank = 2;
    tensors[n++].shape[1] = lm->levels;
    tensors[n] = loglin_lm_vector_tensor(prefix, "mixer.D", lm->wide_d ? lm->inner : lm->heads, LOGLIN_VECTOR_D, 0);
    tensors[n++].repeat = lm->wide_d ? 1 : lm->dim_v;
    tensors[n++] = loglin_lm_vector_tensor(prefix, "mixer.norm.weight", lm->inner, LOGLIN_VECTOR_OUT_NORM, 0);
    return n;
}

const loglin_architecture loglin_mamba2_lm = {
    .op = LOGLIN_MAMBA2,
    .embedding = "backbone.embeddings.weight",
    .final_norm = "backbone.norm_f.weight",
    .layers = "backbone.layers.",
    .level = "mixer.L",
    .gate = "mlp.gate_proj.weight",
    .parse = parse,
    .layer_tensors = layer_tensors,
    .layout = layout,
};
