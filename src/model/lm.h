/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A language model as numbers: what config.json and the tensors say, in terms that both architectures share.
 *
 * Per layer: p = in(RMSNorm(x)), one matrix with all input projections; a causal convolution and silu over some columns
 * of p give q, k, v; other columns give the gates; attention gives o; y = o (+ D * v before its gate), gated by the z
 * columns and normalised in segments; x += out(y); x += down(silu(gate h) * (up h)) with h = RMSNorm(x).
 */
#ifndef LOGLIN_MODEL_LM_H
#define LOGLIN_MODEL_LM_H

#include "loglin.h"
#include <stdbool.h>

typedef struct loglin_lm {
    loglin_op op;
    size_t vocabulary, layers, hidden, intermediate; /* intermediate 0: not in the config, the tensors tell */
    size_t heads, groups, dim_k, dim_v;
    size_t levels;        /* 0 until the tensors tell */
    size_t inner;         /* heads * dim_v */
    size_t conv_kernel;   /* taps */
    size_t conv_channels; /* q, k and v together */
    size_t segment;       /* channels of inner that are normalised together */
    bool gate_first;      /* gate, then normalise */
    bool tied;            /* lm_head is the embedding */
    bool bias, conv_bias; /* of in and out (LOGLIN_MAMBA2), of the convolution */
    bool wide_d;          /* D per channel, not per head */
    float norm_eps;
    float dt_min, dt_max; /* the time step is clamped */
} loglin_lm;

/* Where things are among the columns of p, and q, k, v among the channels of the convolution. */
typedef struct loglin_lm_layout {
    size_t columns;                  /* of p */
    size_t z, conv, dt, beta, level; /* beta: LOGLIN_GATED_DELTA only */
    size_t q, k, v;
} loglin_lm_layout;

/* Tokens that the levels reach. */
static inline size_t loglin_lm_max_length(const loglin_lm *lm) {
    return (size_t)1 << (lm->levels - 1);
}

loglin_lm_layout loglin_lm_get_layout(const loglin_lm *lm);

/* Reads and checks the text of a config.json; `path` is for messages.  Sets neither levels nor, maybe, intermediate. */
loglin_status loglin_lm_parse(const char *path, const char *text, size_t size, loglin_lm *lm);

/* ---- The tensors that a checkpoint must hold ---- */

/* The matrices and the vectors of floats that tensors go to; one of each for a layer, or for the model. */
typedef enum loglin_matrix_id {
    LOGLIN_MATRIX_IN,
    LOGLIN_MATRIX_OUT,
    LOGLIN_MATRIX_GATE_UP, /* blocks of rows of gate and of up in turn */
    LOGLIN_MATRIX_DOWN,
    LOGLIN_LAYER_MATRICES,
    LOGLIN_MATRIX_EMBEDDING = LOGLIN_LAYER_MATRICES,
    LOGLIN_MATRIX_HEAD,
} loglin_matrix_id;

typedef enum loglin_vector_id {
    LOGLIN_VECTOR_MIXER_NORM,
    LOGLIN_VECTOR_IN_BIAS,
    LOGLIN_VECTOR_CONV, /* [taps, channels] */
    LOGLIN_VECTOR_CONV_BIAS,
    LOGLIN_VECTOR_DT_BIAS,
    LOGLIN_VECTOR_A, /* -exp(A_log) */
    LOGLIN_VECTOR_LEVEL,
    LOGLIN_VECTOR_D,        /* per channel of inner */
    LOGLIN_VECTOR_OUT_NORM, /* per channel of inner */
    LOGLIN_VECTOR_OUT_BIAS,
    LOGLIN_VECTOR_MLP_NORM,
    LOGLIN_LAYER_VECTORS,
    LOGLIN_VECTOR_FINAL_NORM = LOGLIN_LAYER_VECTORS,
} loglin_vector_id;

/* One tensor of the checkpoint and its place. */
typedef struct loglin_lm_tensor {
    char name[160];
    size_t rank, shape[3];
    loglin_matrix_id matrix;
    loglin_vector_id vector;
    size_t at;           /* first row of the matrix, first element of the vector (channel of LOGLIN_VECTOR_CONV) */
    size_t repeat, tile; /* of vectors: each element so often, then the whole so often */
    bool is_matrix;      /* else a vector */
    bool interleave_odd; /* of LOGLIN_MATRIX_GATE_UP: the blocks of up */
} loglin_lm_tensor;

enum { LOGLIN_LM_MAX_LAYER_TENSORS = 24, LOGLIN_LM_MODEL_TENSORS = 3 };

/* The tensors of a layer; how many. */
size_t loglin_lm_layer_tensors(const loglin_lm *lm, size_t layer, loglin_lm_tensor *tensors);

/* The tensors outside the layers; how many. */
size_t loglin_lm_model_tensors(const loglin_lm *lm, loglin_lm_tensor *tensors);

/* Rows and columns of a matrix; elements of a vector. */
void loglin_lm_matrix_shape(const loglin_lm *lm, loglin_matrix_id id, size_t *rows, size_t *columns);
size_t loglin_lm_vector_size(const loglin_lm *lm, loglin_vector_id id);

/* The name of the tensor [heads, levels] of layer 0, and of [intermediate, hidden]. */
void loglin_lm_level_tensor_name(const loglin_lm *lm, char *name, size_t capacity);
void loglin_lm_gate_tensor_name(const loglin_lm *lm, char *name, size_t capacity);

#endif
