/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The fast step: products with one vector each, at the speed at which the weights can be read.
 *
 * norm_product (all input projections), mix, the attention's step, gated_product, norm_swiglu, add_product: norms and
 * gates are part of the product that reads them, so that nothing but the weights costs time and launches are few.
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

loglin_status loglin_fast_step_create(loglin_session *session) {
    const loglin_model *model = session->model;
    loglin_activations *a = &session->step_activations;
    RETURN_IF_ERROR(loglin_activations_create(session, session->sequences, session->sequences, false, a));
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
    release_kernel(session->step_embed.kernel);
    release_kernel(session->step_head.kernel);
    loglin_activations_destroy(&session->step_activations);
}

static loglin_status enqueue_layer(loglin_session *session, size_t layer) {
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

loglin_status loglin_fast_step_enqueue(loglin_session *session) {
    RETURN_IF_ERROR(loglin_launch_enqueue(&session->step_embed, session->queue));
    for (size_t layer = 0; layer < session->model->lm.layers; layer++) {
        RETURN_IF_ERROR(enqueue_layer(session, layer));
    }
    return loglin_launch_enqueue(&session->step_head, session->queue);
}
