/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A session: the states of its sequences, and the two ways through the layers.
 *
 * The fast step takes one token of every sequence of a small session through six launches a layer, or all layers in
 * one launch; their arguments were all set when the session was made.  The pass takes any number of tokens through the
 * layers, as products of matrices.
 */
#ifndef LOGLIN_MODEL_SESSION_H
#define LOGLIN_MODEL_SESSION_H

#include "engine/nvidia_product.h"
#include "model/kernels.h"

enum { LOGLIN_SESSION_PLANS = 8 };

/* Of a matrix's weights that are unpacked for CLBlast at once: at least a block of rows, however wide. */
enum { LOGLIN_UNPACKED_FLOATS = 16 << 20 };

/* What the layers work in, for so many tokens at once.  Strides count elements from a token to the next. */
typedef struct loglin_activations {
    size_t rows;
    size_t x_stride, h_stride, p_stride, y_stride, logits_stride;
    size_t logit_rows; /* of logits */
    cl_mem ids;
    cl_mem x;                                 /* the residual stream */
    cl_mem h;                                 /* a product's input; NULL for the fast step */
    cl_mem p;                                 /* all input projections */
    cl_mem conv_v;                            /* v behind the convolution */
    cl_mem q, k, v, g, level_scales, beta, o; /* of the attention */
    cl_mem y;                                 /* of the MLP */
    cl_mem unpacked;                          /* matrices as CLBlast reads them; NULL where they are not needed */
    cl_mem both; /* halves of the MLP, or parts of a product's sums: [rows, 2 y_stride]; NULL on CPUs */
    cl_mem logits;
} loglin_activations;

/* The states of a layer. */
typedef struct loglin_layer_state {
    cl_mem tails;     /* [N, taps - 1, channels]: the last inputs of the convolution */
    cl_mem values;    /* as in loglin_state, and so the others */
    cl_mem log_decay; /* LOGLIN_MAMBA2 only */
    cl_mem position;
} loglin_layer_state;

/* The launches of a layer in the fast step; attention comes behind mix. */
typedef enum loglin_step_launch {
    LOGLIN_STEP_IN,
    LOGLIN_STEP_MIX,
    LOGLIN_STEP_OUT,
    LOGLIN_STEP_GATE_UP,
    LOGLIN_STEP_DOWN,
    LOGLIN_STEP_LAUNCHES,
} loglin_step_launch;

typedef struct loglin_step_layer {
    loglin_launch launches[LOGLIN_STEP_LAUNCHES];
} loglin_step_layer;

/* Memory that the host and the device see at once: what a step of one launch takes and gives. */
typedef struct loglin_shared_words { /* as in cl/token.cl */
    atomic_uint arrived;             /* sequences that are through */
    atomic_uint asked;               /* number of the token that is asked for */
    atomic_uint looks;               /* of the kernel for the next token */
} loglin_shared_words;

typedef struct loglin_shared_step {
    loglin_shared_words *words;
    cl_int *ids;
    float *logits;    /* rows of logits_stride */
    unsigned number;  /* of the last token */
    int64_t answered; /* when, in nanoseconds */
} loglin_shared_step;

/* What a step of one launch needs beside the session's other buffers, see streamed_step.c. */
typedef struct loglin_streamed_step {
    cl_mem told;    /* what groups tell each other */
    cl_mem answer;  /* the logits; whether groups have waited in vain */
    float *mapped;  /* answer, between steps */
    cl_uint number; /* the next that no launch had */
} loglin_streamed_step;

/* A plan for pieces of a shape. */
typedef struct loglin_piece_plan {
    loglin_plan *plan;
    size_t batch, length;
    uint64_t used; /* when, as a count of uses of all */
} loglin_piece_plan;

struct loglin_session {
    loglin_model *model;
    cl_command_queue queue;
    size_t sequences;
    size_t *positions; /* of the sequences, as the device has them */
    cl_int *ids;       /* on their way to the device: sequences or model->options.piece, whichever is more */
    loglin_layer_state *layers;
    loglin_layer_buffers all_tails, all_values, all_log_decays, all_positions;
    loglin_model_program program;
    cl_kernel kernels[LOGLIN_MODEL_KERNEL_COUNT]; /* for passes */

    loglin_plan *step_plan;
    loglin_activations step_activations; /* rows 0: the session is too large for the fast step */
    loglin_step_layer *step_layers;
    loglin_launch step_embed, step_head;
    loglin_launch step_token;      /* all of these in one, where the program has it */
    loglin_streamed_step streamed; /* of a step_token that several groups take; NULL elsewhere */
    loglin_shared_step shared;     /* of a step_token that one group takes; NULL where the device shares no memory */

    loglin_activations pass_activations;        /* rows 0 until the first pass */
    loglin_nvidia_product_kernels matrix_units; /* of passes; not made where others make their products */
    loglin_piece_plan plans[LOGLIN_SESSION_PLANS];
    uint64_t plan_uses;
    cl_mem workspace; /* the largest that a plan needed */
    size_t workspace_size;
};

/* Buffers of the session's context; `name` is for messages. */
loglin_status loglin_session_buffer(const loglin_session *session, const char *name, size_t count, size_t element,
                                    cl_mem *mem);

/* For so many rows, with h and what CLBlast needs where `pass`. */
loglin_status loglin_activations_create(const loglin_session *session, size_t rows, size_t logit_rows, bool pass,
                                        loglin_activations *activations);
void loglin_activations_destroy(loglin_activations *activations);

/* The attention's arrays, and a layer's states from a sequence on. */
loglin_inputs loglin_session_inputs(const loglin_session *session, const loglin_activations *activations);
loglin_state loglin_session_state(const loglin_session *session, size_t layer, size_t first);

/* The launch of mix in a layer, for `length` tokens each of `count` sequences from `first` on. */
loglin_status loglin_mix_launch(const loglin_session *session, const loglin_activations *activations, size_t layer,
                                size_t first, size_t count, size_t length, cl_kernel kernel, loglin_launch *launch);

/* Bytes of local memory that a prepared vector takes, and what sums over a group take. */
size_t loglin_prepared_bytes(size_t columns);
size_t loglin_scratch_bytes(const loglin_model_program *program);

/* fast_step.c */
bool loglin_fast_step_applies(const loglin_session *session);
/* Columns of the widest input that a product keeps in local memory. */
size_t loglin_widest_input(const loglin_session *session);
/* May leave sequence 0 behind a trial step. */
loglin_status loglin_fast_step_create(loglin_session *session);
void loglin_fast_step_destroy(loglin_session *session);
/* Takes session->ids, one token of every sequence, through the layers and waits; logits [N, vocabulary] may be NULL. */
loglin_status loglin_fast_step_run(loglin_session *session, float *logits);

/* streamed_step.c; step_token stays without a kernel where the groups are not on the device together */
loglin_status loglin_streamed_step_create(loglin_session *session);
void loglin_streamed_step_destroy(loglin_session *session);
loglin_status loglin_streamed_step_run(loglin_session *session, float *logits);

/* shared_step.c, for a session with a step_token of one group */
loglin_status loglin_shared_step_create(loglin_session *session);
void loglin_shared_step_destroy(loglin_session *session);
loglin_status loglin_shared_step_run(loglin_session *session, float *logits);
/* Behind a step, before other commands change what the next one reads: a kernel that looks for a token takes none. */
void loglin_shared_step_dismiss(loglin_session *session);

/* pass.c */
loglin_status loglin_pass_create(loglin_session *session);
void loglin_pass_destroy(loglin_session *session);

typedef struct loglin_pass {
    size_t first, count, length; /* `length` tokens each of the sequences first .. first+count-1 */
    bool every_logit;            /* of every token, else of the last one of each sequence */
    float *logits; /* NULL: none; [count, length or 1, vocabulary] with sequence_stride between sequences */
    size_t sequence_stride;
} loglin_pass;

/* Runs session->ids, [count, length], through the layers and waits; at most model->options.piece tokens. */
loglin_status loglin_pass_run(loglin_session *session, const loglin_pass *pass);

#endif
