/* SPDX-License-Identifier: Apache-2.0 */
/* Small random language models as folders, and their logits in float64. */
#ifndef LOGLIN_TESTS_SUPPORT_LM_H
#define LOGLIN_TESTS_SUPPORT_LM_H

#include "tensorfile/safetensors.h"

#include <stddef.h>
#include <stdint.h>

enum { SUPPORT_LM_MAX_TENSORS = 256 };

/* Texts of small configs. */
#define SUPPORT_MAMBA2_CONFIG(more)                                                                                    \
    "{\"model_type\": \"log_linear_mamba2\", \"num_hidden_layers\": 2, \"vocab_size\": 37, " more "}"
#define SUPPORT_DELTA_CONFIG(more)                                                                                     \
    "{\"model_type\": \"h_gated_deltanet\", \"num_hidden_layers\": 2, \"vocab_size\": 37, " more "}"

/* A model in memory, whose tensors a test may change before it writes them. */
typedef struct support_lm {
    const char *config; /* text of config.json */
    loglin_tensor tensors[SUPPORT_LM_MAX_TENSORS];
    size_t count;
} support_lm;

/* All tensors that a config asks for, random; `dtype` is that of the matrices. */
support_lm support_lm_make(const char *config, loglin_tensor_dtype dtype, size_t levels, size_t intermediate,
                           uint64_t seed);
void support_lm_free(support_lm *lm);

loglin_tensor *support_lm_find(support_lm *lm, const char *name);

/* Writes config.json and model.safetensors to a folder; in more than one shard, with an index file. */
void support_lm_write(const support_lm *lm, const char *folder, size_t shards);
void support_write_text(const char *folder, const char *name, const char *text);

/* logits [length, vocabulary] of the formulas of both architectures. */
void support_lm_logits(support_lm *lm, const int32_t *ids, size_t length, double *logits);

/* A fresh folder under /tmp, and its removal with the plain files in it. */
void support_make_folder(char *folder, size_t capacity);
void support_remove_folder(const char *folder);

#endif
