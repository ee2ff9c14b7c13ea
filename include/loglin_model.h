/* SPDX-License-Identifier: Apache-2.0 */
/*
 * loglin_model: language models with log-linear attention, on the operators of loglin.h.
 *
 * A model is a Hugging Face folder: config.json and model.safetensors, or model.safetensors.index.json with its shards.
 * Its model_type is one of
 *     log_linear_mamba2, hattention    log-linear Mamba-2
 *     h_gated_deltanet                 log-linear Gated DeltaNet
 * Token ids go in and logits come out; turning text into ids is the caller's (a byte-level model, vocabulary 256, needs
 * no tokenizer: ids are bytes).
 *
 * The shortest program:
 *
 *     loglin_model *model;
 *     loglin_session *session;
 *     loglin_model_open(device, queue, "folder", NULL, &model);          // slow: checks and uploads the weights
 *     loglin_session_create(model, queue, 1, &session);                  // slow: compiles
 *     loglin_session_prefill(session, 0, prompt, prompt_length, logits); // logits of the token after the prompt
 *     for (;;) {
 *         int32_t id = ... choose from logits ...;
 *         loglin_session_step(session, &id, logits);
 *     }
 *
 * A session holds N sequences.  What it remembers of a sequence does not grow with the sequence's length: for each
 * layer the last inputs of the convolution and the level states, H * L * K * V floats.  A sequence may be as long as the
 * model's levels reach: 2^(L-1) tokens.
 *
 * Unlike the calls of loglin.h, these calls block: when they return, what they gave is in host memory.
 *
 * Errors are reported as in loglin.h.  A file that is not what it should be gives LOGLIN_BAD_FILE (LOGLIN_IO if it cannot
 * be read) and loglin_last_error() names the file and the tensor or the key, what it was and what was expected.
 *
 * Threads.  A model may be used by any number of sessions in any number of threads.  A session by one thread at a time.
 */
#ifndef LOGLIN_MODEL_H
#define LOGLIN_MODEL_H

#include "loglin.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Models ----------------------------------------------------------------------------------------------------- */

/* The weights of a model, on a device. */
typedef struct loglin_model loglin_model;

/* A field of 0 is its default. */
typedef struct loglin_model_options {
    loglin_dtype dtype;   /* storage of q, k, v and o between the layers' kernels; arithmetic and states are float */
    loglin_engine engine; /* of the attention */
    size_t piece;         /* tokens that go through the layers at once, 1 to 65536; 0: 1024.  Longer inputs are cut into
                             pieces of this size; the memory of a session's activations grows with it. */
} loglin_model_options;

typedef struct loglin_model_info {
    loglin_op op;
    size_t vocabulary; /* ids are 0 .. vocabulary-1 */
    size_t layers;
    size_t hidden;
    size_t heads, groups, dim_k, dim_v, levels; /* of the attention, as in loglin_problem */
    size_t intermediate;                        /* width of the MLP */
    size_t max_length;                          /* tokens of a sequence at most: 2^(levels-1) */
    uint64_t parameters;
    uint64_t weight_bytes; /* on the device */
    loglin_dtype
        weight_dtype;     /* of the matrices on the device: as in the file, LOGLIN_F32 where the file mixes types */
    uint64_t state_bytes; /* that a session keeps for a sequence */
} loglin_model_info;

/*
 * Checks everything in the folder, then uploads it.  Weights stay in the type of the file.  Every tensor that config.json
 * asks for must be there once, with its shape, in F32, F16 or BF16 and finite; there may be no other.  `queue` belongs to
 * the device and its context; it is used during the call only.  options may be NULL.
 */
LOGLIN_API loglin_status loglin_model_open(loglin_device *device, cl_command_queue queue, const char *folder,
                                           const loglin_model_options *options, loglin_model **model);

/* Sessions keep their model alive.  NULL is allowed. */
LOGLIN_API void loglin_model_close(loglin_model *model);

/* All zero where model is NULL. */
LOGLIN_API void loglin_model_get_info(const loglin_model *model, loglin_model_info *info);

/* ---- Sessions --------------------------------------------------------------------------------------------------- */

/* N sequences at positions of their own. */
typedef struct loglin_session loglin_session;

/*
 * `sequences` is 1 to 65536; all of them are empty.  `queue` belongs to the model's device, is in order, and is retained.
 * Attention plans are made when they are first needed: one for steps here, one for each length of a piece at its first
 * use.  The first compiles (seconds on a device that has not seen the model, milliseconds from the program cache); the
 * others cost milliseconds.
 */
LOGLIN_API loglin_status loglin_session_create(loglin_model *model, cl_command_queue queue, size_t sequences,
                                               loglin_session **session);

/* NULL is allowed. */
LOGLIN_API void loglin_session_destroy(loglin_session *session);

/* Tokens that a sequence has had; 0 if there is no such sequence. */
LOGLIN_API size_t loglin_session_position(const loglin_session *session, size_t sequence);

/* Makes a sequence empty. */
LOGLIN_API loglin_status loglin_session_reset(loglin_session *session, size_t sequence);

/*
 * In the calls below an id out of the vocabulary or a sequence that would become too long is LOGLIN_INVALID_ARGUMENT, and
 * nothing has happened.  After any other error the states are undefined: reset the sequences.
 */

/* Appends `count` >= 1 tokens to one sequence; logits [vocabulary] (may be NULL) are those after the last of them. */
LOGLIN_API loglin_status loglin_session_prefill(loglin_session *session, size_t sequence, const int32_t *ids,
                                                size_t count, float *logits);

/* Appends `length` >= 1 tokens to every sequence, ids [N, length]; logits [N, length, vocabulary] of all, never NULL. */
LOGLIN_API loglin_status loglin_session_score(loglin_session *session, const int32_t *ids, size_t length,
                                              float *logits);

/*
 * Appends one token to every sequence, ids [N]; logits [N, vocabulary] may be NULL.  Where steps follow each other closely,
 * a CPU may go on looking for the next one, and the queue is not idle, for about 0.1 ms.
 */
LOGLIN_API loglin_status loglin_session_step(loglin_session *session, const int32_t *ids, float *logits);

/*
 * Writes the states of all sequences to a file, which appears whole or not at all; and reads them back, into a session
 * with as many sequences of a model of the same architecture and shape (the weights are not compared).
 * A file that does not fit is LOGLIN_BAD_FILE (LOGLIN_IO if it cannot be read or written) and leaves the session as it was.
 *
 * The file is safetensors, with "format" = "loglin-session" and "version" = "1" in its metadata.  Tensors: position
 * I32 [N]; for each layer I conv.I F32 [N, kernel-1, channels], values.I F32 [N, H, L, K, V], levels without a key zero,
 * and log_decay.I F32 [N, H, L], for which see loglin_state (only where the operator is LOGLIN_MAMBA2).
 */
LOGLIN_API loglin_status loglin_session_save(loglin_session *session, const char *path);
LOGLIN_API loglin_status loglin_session_load(loglin_session *session, const char *path);

#ifdef __cplusplus
}
#endif

#endif
