/* SPDX-License-Identifier: Apache-2.0 */
/* Implementation of support_golden.h. */
#include "support_golden.h"

#include "tensorfile/safetensors.h"

#include <stdio.h>
#include <stdlib.h>

static const loglin_tensor *tensor_of(const loglin_safetensors *file, const char *name) {
    const loglin_tensor *tensor = loglin_safetensors_find(file, name);
    if (tensor == NULL || tensor->dtype != LOGLIN_TENSOR_F32) {
        support_die("golden file: no F32 tensor %s", name);
    }
    return tensor;
}

static void copy_tensor(const loglin_safetensors *file, const char *name, double *values, size_t count) {
    const loglin_tensor *tensor = tensor_of(file, name);
    if (loglin_tensor_count(tensor) != count) {
        support_die("golden file: %s has %zu elements, not %zu", name, loglin_tensor_count(tensor), count);
    }
    float *singles = support_alloc(count, sizeof *singles);
    loglin_tensor_to_float(tensor->dtype, tensor->data, count, singles);
    for (size_t i = 0; i < count; i++) {
        values[i] = (double)singles[i];
    }
    free(singles);
}

static support_case case_of(const loglin_safetensors *file) {
    const loglin_tensor *q = tensor_of(file, "q");                       /* [B, T, G, K] */
    const loglin_tensor *v = tensor_of(file, "v");                       /* [B, T, H, V] */
    const loglin_tensor *level_scales = tensor_of(file, "level_scales"); /* [B, T, H, L] */
    const bool delta = loglin_safetensors_find(file, "beta") != NULL;
    return (support_case){.op = delta ? LOGLIN_GATED_DELTA : LOGLIN_MAMBA2,
                          .batch = q->shape[0],
                          .length = q->shape[1],
                          .groups = q->shape[2],
                          .dim_k = q->shape[3],
                          .heads = v->shape[2],
                          .dim_v = v->shape[3],
                          .extra_levels = level_scales->shape[3] - loglin_num_levels(q->shape[1])};
}

support_data *support_golden(const char *name, support_results **expected) {
    char path[1024];
    snprintf(path, sizeof path, "%s/%s.safetensors", TEST_DATA_DIR, name);
    loglin_safetensors *file = NULL;
    loglin_tensor_error error;
    if (!loglin_safetensors_open(path, &file, &error)) {
        support_die("%s", error.text);
    }
    const support_case c = case_of(file);
    support_data *data = support_data_make(&c);
    support_results *results = support_results_make(data);
    data->c.final_states = true;
    copy_tensor(file, "q", data->q, data->n_k);
    copy_tensor(file, "k", data->k, data->n_k);
    copy_tensor(file, "v", data->v, data->n_v);
    copy_tensor(file, "do", data->d_o, data->n_v);
    copy_tensor(file, "g", data->g, data->n_gates);
    copy_tensor(file, "level_scales", data->level_scales, data->n_levels);
    copy_tensor(file, "o", results->o, data->n_v);
    copy_tensor(file, "final_states", results->final, data->n_states);
    copy_tensor(file, "dq", results->dq, data->n_k);
    copy_tensor(file, "dk", results->dk, data->n_k);
    copy_tensor(file, "dv", results->dv, data->n_v);
    copy_tensor(file, "dg", results->dg, data->n_gates);
    copy_tensor(file, "dlevel_scales", results->dlevel_scales, data->n_levels);
    if (c.op == LOGLIN_GATED_DELTA) {
        copy_tensor(file, "beta", data->beta, data->n_gates);
        copy_tensor(file, "dbeta", results->dbeta, data->n_gates);
    }
    for (size_t n = 0; n < data->sequences; n++) {
        results->final_position[n] = (int32_t)(data->starts[n + 1] - data->starts[n]);
    }
    loglin_safetensors_close(file);
    *expected = results;
    return data;
}
