/* SPDX-License-Identifier: Apache-2.0 */
/* A Hugging Face folder, open: the text of its config, and the tensors of its one or many files. */
#ifndef LOGLIN_MODEL_CHECKPOINT_H
#define LOGLIN_MODEL_CHECKPOINT_H

#include "loglin.h"
#include "model/lm.h"
#include "tensorfile/safetensors.h"
#include <jansson.h>

typedef struct loglin_checkpoint loglin_checkpoint;

/* Opens the folder and checks that every tensor is there exactly once. */
loglin_status loglin_checkpoint_open(const char *folder, loglin_checkpoint **checkpoint);
void loglin_checkpoint_close(loglin_checkpoint *checkpoint);

/* The tensors of all files, in the order of their names. */
size_t loglin_checkpoint_count(const loglin_checkpoint *checkpoint);
const loglin_tensor *loglin_checkpoint_at(const loglin_checkpoint *checkpoint, size_t index);
const loglin_tensor *loglin_checkpoint_find(const loglin_checkpoint *checkpoint, const char *name);

/* Drops a tensor's pages of the file from memory; they come back when they are read. */
void loglin_checkpoint_forget(const loglin_tensor *tensor);

/*
 * Reads the config, completes it by what only the tensors tell, and checks all tensors against it: names, shapes, types,
 * and that they are finite.
 */
loglin_status loglin_checkpoint_describe(const loglin_checkpoint *checkpoint, loglin_lm *lm);

/* What an index (the text of a model.safetensors.index.json) says. */
typedef struct loglin_shard_names {
    char **names; /* of the files, sorted, each once */
    size_t count;
    json_t *map; /* from tensors to these names */
} loglin_shard_names;
loglin_status loglin_shard_names_parse(const char *path, const char *text, size_t size, loglin_shard_names *shards);
void loglin_shard_names_free(loglin_shard_names *shards);

#endif
