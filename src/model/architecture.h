/* SPDX-License-Identifier: Apache-2.0 */
/* What tells the two architectures apart: the keys of their config and the names of their tensors. */
#ifndef LOGLIN_MODEL_ARCHITECTURE_H
#define LOGLIN_MODEL_ARCHITECTURE_H

#include "model/config.h"
#include "model/lm.h"

typedef struct loglin_architecture {
    loglin_op op;
    const char *embedding, *final_norm; /* tensor names */
    const char *layers;       /* what the names of a layer's tensors begin with; its number and a dot follow */
    const char *level, *gate; /* of the level weights and the MLP's gate, behind the dot */
    /* Reads all keys that are the architecture's own; those that both have are there already. */
    loglin_status (*parse)(const loglin_config *config, loglin_lm *lm);
    /* The tensors of a layer; how many. */
    size_t (*layer_tensors)(const loglin_lm *lm, const char *prefix, loglin_lm_tensor *tensors);
    void (*layout)(const loglin_lm *lm, loglin_lm_layout *layout);
} loglin_architecture;

extern const loglin_architecture loglin_mamba2_lm;
extern const loglin_architecture loglin_gated_delta_lm;

/* Rows at..  of a matrix. */
loglin_lm_tensor loglin_lm_matrix_tensor(const char *prefix, const char *name, size_t rows, size_t columns,
                                         loglin_matrix_id matrix, size_t at);

/* Elements at.. of a vector. */
loglin_lm_tensor loglin_lm_vector_tensor(const char *prefix, const char *name, size_t count, loglin_vector_id vector,
                                         size_t at);

/* The norm and the three matrices of the MLP, which both architectures have; how many. */
size_t loglin_lm_mlp_tensors(const loglin_lm *lm, const char *prefix, loglin_lm_tensor *tensors);

#endif
