/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The fast step: products with one vector each, at the speed at which the weights can be read.
 *
 * norm_product (all input projections), mix, the attention's step, gated_product, norm_swiglu, add_product: norms and
 * gates are part of the product that reads them, so that nothing but the weights costs time and launches are few.  On a
 * CPU with a small model, and on NVIDIA's GPUs, all of a step is one launch: cl/token.cl and cl/nvidia_token.cl.
 */
#include "model/session.h"

#include "runtime/device.h"
#include "runtime/status.h"
#include <stdlib.h>

/* Sequences up to which reading the weights for each of them is faster than products of matrices. */
enum { MAX_SEQUENCES_CPU = 2, MAX_SEQUENCES_GPU = 16 };

/* Columns of a slice of add_product. */
enum { SLICE = 4096 };

bool loglin_fast_step_applies(const loglin_session *session) {
    return session->sequences <= (session->model->device->is_cpu ? MAX_SEQUENCES_CPU : MAX_SEQUENCES_GPU);
}

size_t loglin_widest_input(const loglin_session *session) {
    const loglin_lm *lm = &session->model->lm;
    const size_t slice = lm->intermediate < SLICE ? lm->intermediate : SLICE;
    const size_t widest = lm->hidden > lm->inner ? lm->hidden : lm->inner;
    return loglin_fast_step_applies(session) && slice > widest ? slice : widest;
}

/* The range of a product with one vector: `blocks` of rows are shared among groups. */
static void set_range(const loglin_session *session, size_t blocks, cl_kernel kernel, loglin_launch *launch) {
    const loglin_model_program *program = &session->program;
    const size_t groups = program->groups == 0 || blocks < program->groups ? blocks : program->groups;
    *launch = (loglin_launch){
        .kernel = kernel,
        .global = {groups * program->local, session->sequences},
        .local = {program->local, 1},
    };
}

static loglin_status set_norm_product(const loglin_session *session, cl_mem norm, size_t norm_at, cl_mem w, size_t rows,
                                      cl_mem bias, size_t bias_at, cl_mem y, size_t stride, loglin_launch *launch) {
    const loglin_activations *a = &session->step_activations;
    const loglin_lm *lm = &session->model->lm;
    const cl_ulong x_at = 0;
    const cl_ulong x_stride = a->x_stride;
    const cl_ulong y_stride = stride;
    const cl_uint norm_offset = (cl_uint)norm_at;
    const cl_uint bias_offset = (cl_uint)bias_at;
    const cl_uint blocks = (cl_uint)(loglin_whole_blocks(rows) / LOGLIN_BLOCK);
    const cl_uint columns = (cl_uint)lm->hidden;
    const loglin_kernel_argument arguments[] = {
        KERNEL_ARGUMENT(a->x),
        KERNEL_ARGUMENT(x_at),
        KERNEL_ARGUMENT(x_stride),
        KERNEL_ARGUMENT(norm),
        KERNEL_ARGUMENT(norm_offset),
        KERNEL_ARGUMENT(lm->norm_eps),
        KERNEL_ARGUMENT(w),
        KERNEL_ARGUMENT(blocks),
        KERNEL_ARGUMENT(columns),
        KERNEL_ARGUMENT(bias),
        KERNEL_ARGUMENT(bias_offset),
        KERNEL_ARGUMENT(y),
        KERNEL_ARGUMENT(y_stride),
        KERNEL_LOCAL(loglin_prepared_bytes(lm->hidden)),
        KERNEL_LOCAL(loglin_scratch_bytes(&session->program)),
    };
    set_range(session, blocks, launch->kernel, launch);
    return loglin_set_arguments(launch->kernel, arguments, sizeof arguments / sizeof arguments[0]);
}

static loglin_status set_out(const loglin_session *session, size_t layer, loglin_launch *launch) {
    const loglin_activations *a = &session->step_activations;
    const loglin_model *model = session->model;
    const cl_ulong p_stride = a->p_stride;
    const cl_ulong x_stride = a->x_stride;
    const cl_uint d_at = (cl_uint)model->vector_at[LOGLIN_VECTOR_D];
    const cl_uint norm_at = (cl_uint)model->vector_at[LOGLIN_VECTOR_OUT_NORM];
    const cl_uint bias_at = (cl_uint)model->vector_at[LOGLIN_VECTOR_OUT_BIAS];
    const cl_uint blocks = (cl_uint)(a->x_stride / LOGLIN_BLOCK);
    const cl_uint columns = (cl_uint)model->lm.inner;
    const loglin_kernel_argument arguments[] = {
        KERNEL_ARGUMENT(a->o),
        KERNEL_ARGUMENT(a->p),
        KERNEL_ARGUMENT(p_stride),
        KERNEL_ARGUMENT(a->conv_v),
        KERNEL_ARGUMENT(model->layers[layer].vectors),
        KERNEL_ARGUMENT(d_at),
        KERNEL_ARGUMENT(norm_at),
        KERNEL_ARGUMENT(bias_at),
        KERNEL_ARGUMENT(model->lm.norm_eps),
        KERNEL_ARGUMENT(model->layers[layer].matrices[LOGLIN_MATRIX_OUT]),
        KERNEL_ARGUMENT(blocks),
        KERNEL_ARGUMENT(columns),
        KERNEL_ARGUMENT(a->x),
        KERNEL_ARGUMENT(x_stride),
        KERNEL_LOCAL(loglin_prepared_bytes(model->lm.inner)),
        KERNEL_LOCAL(loglin_scratch_bytes(&session->program)),
    };
    set_range(session, blocks, launch->kernel, launch);
    return loglin_set_arguments(launch->kernel, arguments, sizeof arguments / sizeof arguments[0]);
}

static loglin_status set_gate_up(const loglin_session *session, size_t layer, loglin_launch *launch) {
    const loglin_activations *a = &session->step_activations;
    const loglin_model *model = session->model;
    const cl_ulong x_stride = a->x_stride;
    const cl_ulong y_stride = a->y_stride;
    const cl_uint norm_at = (cl_uint)model->vector_at[LOGLIN_VECTOR_MLP_NORM];
    const cl_uint blocks = (cl_uint)(a->y_stride / LOGLIN_BLOCK);
    const cl_uint columns = (cl_uint)model->lm.hidden;
    const loglin_kernel_argument arguments[] = {
        KERNEL_ARGUMENT(a->x),
        KERNEL_ARGUMENT(x_stride),
        KERNEL_ARGUMENT(model->layers[layer].vectors),
        KERNEL_ARGUMENT(norm_at),
        KERNEL_ARGUMENT(model->lm.norm_eps),
        KERNEL_ARGUMENT(model->layers[layer].matrices[LOGLIN_MATRIX_GATE_UP]),
        KERNEL_ARGUMENT(blocks),
        KERNEL_ARGUMENT(columns),
        KERNEL_ARGUMENT(a->y),
        KERNEL_ARGUMENT(y_stride),
        KERNEL_LOCAL(loglin_prepared_bytes(model->lm.hidden)),
        KERNEL_LOCAL(loglin_scratch_bytes(&session->program)),
    };
    set_range(session, blocks, launch->kernel, launch);
    return loglin_set_arguments(launch->kernel, arguments, sizeof arguments / sizeof arguments[0]);
}

static loglin_status set_down(const loglin_session *session, size_t layer, loglin_launch *launch) {
    const loglin_activations *a = &session->step_activations;
    const loglin_model *model = session->model;
    const cl_ulong x_stride = a->x_stride;
    const cl_ulong y_stride = a->y_stride;
    const cl_uint blocks = (cl_uint)(a->x_stride / LOGLIN_BLOCK);
    const cl_uint columns = (cl_uint)model->lm.intermediate;
    const cl_uint slice = columns < SLICE ? columns : SLICE;
    const loglin_kernel_argument arguments[] = {
        KERNEL_ARGUMENT(a->y),
        KERNEL_ARGUMENT(y_stride),
        KERNEL_ARGUMENT(model->layers[layer].matrices[LOGLIN_MATRIX_DOWN]),
        KERNEL_ARGUMENT(blocks),
        KERNEL_ARGUMENT(columns),
        KERNEL_ARGUMENT(slice),
        KERNEL_ARGUMENT(a->x),
        KERNEL_ARGUMENT(x_stride),
        KERNEL_LOCAL(loglin_prepared_bytes(slice)),
        KERNEL_LOCAL(loglin_scratch_bytes(&session->program)),
    };
    set_range(session, blocks, launch->kernel, launch);
    return loglin_set_arguments(launch->kernel, arguments, sizeof arguments / sizeof arguments[0]);
}

static loglin_status set_embed(const loglin_session *session, loglin_launch *launch) {
    const loglin_activations *a = &session->step_activations;
    const cl_ulong x_stride = a->x_stride;
    const loglin_kernel_argument arguments[] = {
        KERNEL_ARGUMENT(a->ids),
        KERNEL_ARGUMENT(session->model->embedding),
        KERNEL_ARGUMENT(a->x),
        KERNEL_ARGUMENT(x_stride),
    };
    loglin_set_free_range(&session->program, session->model->lm.hidden, session->sequences, launch);
    return loglin_set_arguments(launch->kernel, arguments, sizeof arguments / sizeof arguments[0]);
}

/* All layers in one launch, on a CPU. */
static loglin_status set_token(const loglin_session *session, loglin_launch *launch) {
    const loglin_activations *a = &session->step_activations;
    const loglin_model *model = session->model;
    const loglin_lm *lm = &model->lm;
    const loglin_model_program *program = &session->program;
    const cl_mem log_decay = session->all_log_decays.all;
    const cl_uint layers = (cl_uint)lm->layers;
    const cl_uint hidden = (cl_uint)lm->hidden;
    const cl_uint inner = (cl_uint)lm->inner;
    const cl_uint intermediate = (cl_uint)lm->intermediate;
    const cl_uint slice = intermediate < SLICE ? intermediate : SLICE;
    const loglin_kernel_argument arguments[] = {
        KERNEL_ARGUMENT(a->ids),
        KERNEL_ARGUMENT(model->embedding),
        KERNEL_ARGUMENT(a->x),
        KERNEL_ARGUMENT(a->p),
        KERNEL_ARGUMENT(a->y),
        KERNEL_ARGUMENT(layers),
        KERNEL_MODEL_ARRAYS(model),
        KERNEL_ARGUMENT(model->no_bias),
        KERNEL_ARGUMENT(a->logits),
        KERNEL_ARGUMENT(hidden),
        KERNEL_ARGUMENT(inner),
        KERNEL_ARGUMENT(intermediate),
        KERNEL_ARGUMENT(slice),
        KERNEL_ARGUMENT(lm->norm_eps),
        KERNEL_ARGUMENT(lm->dt_min),
        KERNEL_ARGUMENT(lm->dt_max),
        KERNEL_ARGUMENT(session->all_tails.all),
        KERNEL_ARGUMENT(a->q),
        KERNEL_ARGUMENT(a->k),
        KERNEL_ARGUMENT(a->v),
        KERNEL_ARGUMENT(a->conv_v),
        KERNEL_ARGUMENT(a->g),
        KERNEL_ARGUMENT(a->level_scales),
        KERNEL_ARGUMENT(a->beta),
        KERNEL_ARGUMENT(session->all_values.all),
        {sizeof log_decay, log_decay != NULL ? &log_decay : NULL},
        KERNEL_ARGUMENT(session->all_positions.all),
        KERNEL_ARGUMENT(a->o),
        {sizeof(cl_mem), NULL}, /* see shared_step.c */
        KERNEL_LOCAL(loglin_prepared_bytes(loglin_widest_input(session))),
        KERNEL_LOCAL(loglin_scratch_bytes(program)),
    };
    RETURN_IF_ERROR(loglin_model_create_kernel(program, LOGLIN_KERNEL_token, &launch->kernel));
    launch->global[0] = 1;
    launch->global[1] = session->sequences;
    launch->local[0] = 1;
    launch->local[1] = 1;
    return loglin_set_arguments(launch->kernel, arguments, sizeof arguments / sizeof arguments[0]);
}

static loglin_status set_layer(loglin_session *session, size_t layer) {
    static const loglin_model_kernel ids[LOGLIN_STEP_LAUNCHES] = {
        [LOGLIN_STEP_IN] = LOGLIN_KERNEL_norm_product,   [LOGLIN_STEP_MIX] = LOGLIN_KERNEL_attention_inputs,
        [LOGLIN_STEP_OUT] = LOGLIN_KERNEL_gated_product, [LOGLIN_STEP_GATE_UP] = LOGLIN_KERNEL_norm_swiglu,
        [LOGLIN_STEP_DOWN] = LOGLIN_KERNEL_add_product,
    };
    const loglin_model *model = session->model;
    const loglin_activations *a = &session->step_activations;
    loglin_launch *launches = session->step_layers[layer].launches;
    for (size_t i = 0; i < LOGLIN_STEP_LAUNCHES; i++) {
        RETURN_IF_ERROR(loglin_model_create_kernel(&session->program, ids[i], &launches[i].kernel));
    }
    const cl_mem vectors = model->layers[layer].vectors;
    RETURN_IF_ERROR(set_norm_product(
        session, vectors, model->vector_at[LOGLIN_VECTOR_MIXER_NORM], model->layers[layer].matrices[LOGLIN_MATRIX_IN],
        a->p_stride, vectors, model->vector_at[LOGLIN_VECTOR_IN_BIAS], a->p, a->p_stride, &launches[LOGLIN_STEP_IN]));
    RETURN_IF_ERROR(loglin_mix_launch(session, a, layer, 0, session->sequences, 1, launches[LOGLIN_STEP_MIX].kernel,
                                      &launches[LOGLIN_STEP_MIX]));
    RETURN_IF_ERROR(set_out(session, layer, &launches[LOGLIN_STEP_OUT]));
    RETURN_IF_ERROR(set_gate_up(session, layer, &launches[LOGLIN_STEP_GATE_UP]));
    return set_down(session, layer, &launches[LOGLIN_STEP_DOWN]);
}

static loglin_status create_launches(loglin_session *session) {
    const loglin_model *model = session->model;
    const loglin_activations *a = &session->step_activations;
    session->step_layers = calloc(model->lm.layers, sizeof *session->step_layers);
    if (session->step_layers == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "out of memory");
    }
    for (size_t layer = 0; layer < model->lm.layers; layer++) {
        RETURN_IF_ERROR(set_layer(session, layer));
    }
    RETURN_IF_ERROR(loglin_model_create_kernel(&session->program, LOGLIN_KERNEL_embed, &session->step_embed.kernel));
    RETURN_IF_ERROR(set_embed(session, &session->step_embed));
    RETURN_IF_ERROR(
        loglin_model_create_kernel(&session->program, LOGLIN_KERNEL_norm_product, &session->step_head.kernel));
    return set_norm_product(session, model->final_norm, 0, model->head, a->logits_stride, model->no_bias, 0, a->logits,
                            a->logits_stride, &session->step_head);
}

static void release_kernel(cl_kernel kernel) {
    if (kernel != NULL) {
        (void)clReleaseKernel(kernel);
    }
}

void loglin_fast_step_destroy(loglin_session *session) {
    for (size_t layer = 0; session->step_layers != NULL && layer < session->model->lm.layers; layer++) {
        for (size_t i = 0; i < LOGLIN_STEP_LAUNCHES; i++) {
            release_kernel(session->step_layers[layer].launches[i].kernel);
        }
    }
    free(session->step_layers);
    loglin_shared_step_destroy(session);
    loglin_streamed_step_destroy(session);
    release_kernel(session->step_embed.kernel);
    release_kernel(session->step_head.kernel);
    release_kernel(session->step_token.kernel);
    loglin_activations_destroy(&session->step_activations);
}

static loglin_status enqueue_layer(const loglin_session *session, size_t layer) {
    const loglin_launch *launches = session->step_layers[layer].launches;
    const loglin_activations *a = &session->step_activations;
    const loglin_inputs inputs = loglin_session_inputs(session, a);
    const loglin_state state = loglin_session_state(session, layer, 0);
    const loglin_buffer o = {.mem = a->o};
    RETURN_IF_ERROR(loglin_launch_enqueue(&launches[LOGLIN_STEP_IN], session->queue));
    RETURN_IF_ERROR(loglin_launch_enqueue(&launches[LOGLIN_STEP_MIX], session->queue));
    RETURN_IF_ERROR(loglin_step(session->step_plan, &inputs, &state, o, session->queue, 0, NULL, NULL));
    RETURN_IF_ERROR(loglin_launch_enqueue(&launches[LOGLIN_STEP_OUT], session->queue));
    RETURN_IF_ERROR(loglin_launch_enqueue(&launches[LOGLIN_STEP_GATE_UP], session->queue));
    return loglin_launch_enqueue(&launches[LOGLIN_STEP_DOWN], session->queue);
}

static loglin_status enqueue_step(const loglin_session *session) {
    if (session->step_token.kernel != NULL) {
        return loglin_launch_enqueue(&session->step_token, session->queue);
    }
    RETURN_IF_ERROR(loglin_launch_enqueue(&session->step_embed, session->queue));
    for (size_t layer = 0; layer < session->model->lm.layers; layer++) {
        RETURN_IF_ERROR(enqueue_layer(session, layer));
    }
    return loglin_launch_enqueue(&session->step_head, session->queue);
}

/* From the ids to the logits. */
static loglin_status enqueue_all(loglin_session *session, float *logits) {
    const size_t vocabulary = session->model->lm.vocabulary;
    const size_t n = session->sequences;
    const loglin_activations *a = &session->step_activations;
    const size_t origin[3] = {0, 0, 0};
    const size_t region[3] = {vocabulary * sizeof(float), n, 1};
    RETURN_IF_CL_ERROR(
        clEnqueueWriteBuffer(session->queue, a->ids, CL_FALSE, 0, n * sizeof(cl_int), session->ids, 0, NULL, NULL));
    RETURN_IF_ERROR(enqueue_step(session));
    if (logits != NULL) {
        RETURN_IF_CL_ERROR(clEnqueueReadBufferRect(session->queue, a->logits, CL_FALSE, origin, origin, region,
                                                   a->logits_stride * sizeof(float), 0, vocabulary * sizeof(float), 0,
                                                   logits, 0, NULL, NULL));
    }
    return LOGLIN_OK;
}

loglin_status loglin_fast_step_run(loglin_session *session, float *logits) {
    if (session->shared.words != NULL) {
        return loglin_shared_step_run(session, logits);
    }
    if (session->streamed.told != NULL) {
        return loglin_streamed_step_run(session, logits);
    }
    const loglin_status status = enqueue_all(session, logits);
    const cl_int code = clFinish(session->queue); /* also behind an error: ids and logits must stay until then */
    RETURN_IF_ERROR(status);
    if (code != CL_SUCCESS) {
        return loglin_fail(code, "clFinish: %s", loglin_strerror(code));
    }
    return LOGLIN_OK;
}

loglin_status loglin_fast_step_create(loglin_session *session) {
    RETURN_IF_ERROR(
        loglin_activations_create(session, session->sequences, session->sequences, false, &session->step_activations));
    if (session->program.token_groups > 1) {
        RETURN_IF_ERROR(loglin_streamed_step_create(session));
    }
    if (session->program.token_groups == 1) {
        RETURN_IF_ERROR(set_token(session, &session->step_token));
        RETURN_IF_ERROR(loglin_shared_step_create(session));
    }
    return session->step_token.kernel != NULL ? LOGLIN_OK : create_launches(session);
}
