/* SPDX-License-Identifier: Apache-2.0 */
/* Tensors as the architectures list them, and those of the MLP that both have. */
#include "model/architecture.h"

#include <stdio.h>

loglin_lm_tensor loglin_lm_matrix_tensor(const char *prefix, const char *name, size_t rows, size_t columns,
                                         loglin_matrix_id matrix, size_t at) {
    loglin_lm_tensor tensor = {
        .rank = 2, .shape = {rows, columns}, .is_matrix = true, .matrix = matrix, .at = at, .repeat = 1, .tile = 1};
    (void)snprintf(tensor.name, sizeof tensor.name, "%s%s", prefix, name);
    return tensor;
}

loglin_lm_tensor loglin_lm_vector_tensor(const char *prefix, const char *name, size_t count, loglin_vector_id vector,
                                         size_t at) {
    loglin_lm_tensor tensor = {.rank = 1, .shape = {count}, .vector = vector, .at = at, .repeat = 1, .tile = 1};
    (void)snprintf(tensor.name, sizeof tensor.name, "%s%s", prefix, name);
    return tensor;
}

size_t loglin_lm_mlp_tensors(const loglin_lm *lm, const char *prefix, loglin_lm_tensor *tensors) {
    const size_t hidden = lm->hidden;
    const size_t width = lm->intermediate;
    size_t n = 0;
    tensors[n++] = loglin_lm_vector_tensor(prefix, "mlp_norm.weight", hidden, LOGLIN_VECTOR_MLP_NORM, 0);
    tensors[n++] = loglin_lm_matrix_tensor(prefix, "mlp.gate_proj.weight", width, hidden, LOGLIN_MATRIX_GATE_UP, 0);
    tensors[n] = loglin_lm_matrix_tensor(prefix, "mlp.up_proj.weight", width, hidden, LOGLIN_MATRIX_GATE_UP, 0);
    tensors[n++].interleave_odd = true;
    tensors[n++] = loglin_lm_matrix_tensor(prefix, "mlp.down_proj.weight", hidden, width, LOGLIN_MATRIX_DOWN, 0);
    return n;
}
