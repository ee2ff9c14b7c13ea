/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The pass: many tokens through the layers at once.
 *
 * Products of matrices go through a kernel of cl/model.cl that reads the weights as they are stored on CPUs, where it is
 * many times faster than CLBlast; through NVIDIA's matrix units where the weights are bfloat16; and elsewhere through
 * CLBlast, the weights unpacked to floats before each product.
 */
#include "model/session.h"

#include "engine/gemm.h"
#include "plan/tuning.h"
#include "runtime/device.h"
#include "runtime/status.h"

/* Tokens that a work-item of product_tiles takes, a multiple of all its tiles. */
enum { RUN = 48 };

/* Floats of logits that are on the device at once. */
enum { LOGIT_FLOATS = 16 << 20 };

/* On a GPU: NVIDIA's matrix units or CLBlast. */
static loglin_status prepare_products(loglin_session *session) {
    loglin_device *device = session->model->device;
    if (session->model->matrix_dtype == LOGLIN_BF16 && session->matrix_units.product == NULL &&
        loglin_nvidia_product_create(device, &session->matrix_units) != LOGLIN_OK) {
        loglin_nvidia_product_destroy(&session->matrix_units);
    }
    if (session->matrix_units.product != NULL) {
        return LOGLIN_OK;
    }
    const loglin_gemm_parameters parameters = loglin_tuning_gemm(device->cache_directory, &device->info);
    return loglin_gemm_prepare(device, &parameters);
}

loglin_status loglin_pass_create(loglin_session *session) {
    const loglin_model *model = session->model;
    const size_t piece = model->options.piece > session->sequences ? model->options.piece : session->sequences;
    const size_t fit = LOGIT_FLOATS / loglin_whole_blocks(model->lm.vocabulary);
    const size_t logit_rows = fit < 1 ? 1 : fit < piece ? fit : piece;
    if (!model->device->is_cpu) {
        RETURN_IF_ERROR(prepare_products(session));
    }
    const loglin_status status =
        loglin_activations_create(session, piece, logit_rows, true, &session->pass_activations);
    if (status != LOGLIN_OK) {
        loglin_activations_destroy(&session->pass_activations); /* the next pass tries again */
    }
    return status;
}

void loglin_pass_destroy(loglin_session *session) {
    for (size_t i = 0; i < LOGLIN_SESSION_PLANS; i++) {
        loglin_plan_destroy(session->plans[i].plan);
    }
    if (session->workspace != NULL) {
        (void)clReleaseMemObject(session->workspace);
    }
    loglin_nvidia_product_destroy(&session->matrix_units);
    loglin_activations_destroy(&session->pass_activations);
}

/* ---- Launches --------------------------------------------------------------------------------------------------- */

/* Sets the arguments of a pass's kernel and enqueues it over x times y work-items; a local_x of 0: grouped in any way. */
static loglin_status launch(loglin_session *session, loglin_model_kernel id, const loglin_kernel_argument *arguments,
                            size_t count, size_t x, size_t y, size_t local_x) {
    loglin_launch what = {.kernel = session->kernels[id], .global = {x, y}, .local = {local_x, 1}};
    if (local_x == 0) {
        loglin_set_free_range(&session->program, x, y, &what);
    }
    RETURN_IF_ERROR(loglin_set_arguments(what.kernel, arguments, count));
    return loglin_launch_enqueue(&what, session->queue);
}

#define LAUNCH(session, id, arguments, x, y, local_x)                                                                  \
    launch(session, id, arguments, sizeof(arguments) / sizeof(arguments)[0], x, y, local_x)

/* h = norm(x) for `rows` rows from element x_at on, `skip` elements from one to the next. */
static loglin_status enqueue_norm(loglin_session *session, cl_mem norm, size_t norm_offset, size_t x_offset,
                                  size_t skip, size_t rows) {
    const loglin_activations *a = &session->pass_activations;
    const cl_ulong x_at = x_offset;
    const cl_ulong x_stride = skip;
    const cl_uint norm_at = (cl_uint)norm_offset;
    const cl_uint count = (cl_uint)session->model->lm.hidden;
    const cl_ulong h_stride = a->h_stride;
    const loglin_kernel_argument arguments[] = {
        KERNEL_ARGUMENT(a->x),
        KERNEL_ARGUMENT(x_at),
        KERNEL_ARGUMENT(x_stride),
        KERNEL_ARGUMENT(norm),
        KERNEL_ARGUMENT(norm_at),
        KERNEL_ARGUMENT(count),
        KERNEL_ARGUMENT(session->model->lm.norm_eps),
        KERNEL_ARGUMENT(a->h),
        KERNEL_ARGUMENT(h_stride),
        KERNEL_LOCAL(loglin_prepared_bytes(count)),
        KERNEL_LOCAL(loglin_scratch_bytes(&session->program)),
    };
    const size_t local = session->program.local;
    return LAUNCH(session, LOGLIN_KERNEL_prepare_norm, arguments, rows * local, 1, local);
}

/* h = gated(o). */
static loglin_status enqueue_gated(loglin_session *session, size_t layer, size_t rows) {
    const loglin_model *model = session->model;
    const loglin_activations *a = &session->pass_activations;
    const cl_ulong p_stride = a->p_stride;
    const cl_ulong h_stride = a->h_stride;
    const cl_uint d_at = (cl_uint)model->vector_at[LOGLIN_VECTOR_D];
    const cl_uint norm_at = (cl_uint)model->vector_at[LOGLIN_VECTOR_OUT_NORM];
    const loglin_kernel_argument arguments[] = {
        KERNEL_ARGUMENT(a->o),
        KERNEL_ARGUMENT(a->p),
        KERNEL_ARGUMENT(p_stride),
        KERNEL_ARGUMENT(a->conv_v),
        KERNEL_ARGUMENT(model->layers[layer].vectors),
        KERNEL_ARGUMENT(d_at),
        KERNEL_ARGUMENT(norm_at),
        KERNEL_ARGUMENT(model->lm.norm_eps),
        KERNEL_ARGUMENT(a->h),
        KERNEL_ARGUMENT(h_stride),
        KERNEL_LOCAL(loglin_prepared_bytes(model->lm.inner)),
        KERNEL_LOCAL(loglin_scratch_bytes(&session->program)),
    };
    const size_t local = session->program.local;
    return LAUNCH(session, LOGLIN_KERNEL_prepare_gated, arguments, rows * local, 1, local);
}

/* ---- Products of matrices --------------------------------------------------------------------------------------- */

/* y = W in + bias, or y += where `add`: `columns` of `in`, `blocks` of rows of W. */
typedef struct product {
    cl_mem in, w, bias, y;
    size_t in_stride, y_stride, rows, columns, blocks, bias_at;
    bool add;
} product;

static loglin_status enqueue_tiles(loglin_session *session, const product *p) {
    const cl_ulong in_stride = p->in_stride;
    const cl_ulong y_stride = p->y_stride;
    const cl_uint tokens = (cl_uint)p->rows;
    const cl_uint run = RUN;
    const cl_uint columns = (cl_uint)p->columns;
    const cl_uint bias_at = (cl_uint)p->bias_at;
    const cl_int add = p->add;
    const loglin_kernel_argument arguments[] = {
        KERNEL_ARGUMENT(p->in), KERNEL_ARGUMENT(in_stride), KERNEL_ARGUMENT(tokens),   KERNEL_ARGUMENT(run),
        KERNEL_ARGUMENT(p->w),  KERNEL_ARGUMENT(columns),   KERNEL_ARGUMENT(p->bias),  KERNEL_ARGUMENT(bias_at),
        KERNEL_ARGUMENT(add),   KERNEL_ARGUMENT(p->y),      KERNEL_ARGUMENT(y_stride),
    };
    return LAUNCH(session, LOGLIN_KERNEL_product_tiles, arguments, p->blocks, (p->rows + RUN - 1) / RUN, 1);
}

static loglin_status enqueue_unpack(loglin_session *session, const product *p, size_t first, size_t count) {
    const cl_uint first_row = (cl_uint)first;
    const cl_uint columns = (cl_uint)p->columns;
    const loglin_kernel_argument arguments[] = {
        KERNEL_ARGUMENT(p->w),
        KERNEL_ARGUMENT(first_row),
        KERNEL_ARGUMENT(columns),
        KERNEL_ARGUMENT(session->pass_activations.unpacked),
    };
    return LAUNCH(session, LOGLIN_KERNEL_unpack_rows, arguments, count, p->columns, 0);
}

/* y += W in, so many rows of W at once as fit unpacked. */
static loglin_status enqueue_blas(loglin_session *session, const product *p, float beta) {
    const size_t all = p->blocks * LOGLIN_BLOCK;
    const size_t fit = LOGLIN_UNPACKED_FLOATS / p->columns / LOGLIN_BLOCK * LOGLIN_BLOCK;
    for (size_t first = 0; first < all; first += fit) {
        const size_t count = all - first < fit ? all - first : fit;
        RETURN_IF_ERROR(enqueue_unpack(session, p, first, count));
        const loglin_gemm gemm = {
            .m = p->rows,
            .n = count,
            .k = p->columns,
            .batch = 1,
            .alpha = 1,
            .beta = beta,
            .a = {.mem = p->in, .row = p->in_stride, .stride = p->rows * p->in_stride},
            .b = {.mem = session->pass_activations.unpacked, .row = count, .stride = p->columns * count},
            .c = {.mem = p->y, .offset = first, .row = p->y_stride, .stride = p->rows * p->y_stride},
        };
        RETURN_IF_ERROR(loglin_gemm_enqueue(&gemm, session->queue));
    }
    return LOGLIN_OK;
}

static loglin_status enqueue_matrix_units(loglin_session *session, const product *p, int mode) {
    const loglin_activations *a = &session->pass_activations;
    const loglin_nvidia_product what = {
        .x = p->in,
        .w = p->w,
        .bias = p->bias,
        .y = p->y,
        .x_stride = p->in_stride,
        .y_stride = p->y_stride,
        .tokens = p->rows,
        .columns = p->columns,
        .blocks = p->blocks,
        .bias_at = p->bias_at,
        .mode = mode,
        .parts = a->both,
        .part_floats = a->rows * 2 * a->y_stride,
    };
    return loglin_nvidia_product_enqueue(&session->matrix_units, &what, session->queue);
}

static loglin_status enqueue_product(loglin_session *session, const product *p) {
    if (session->model->device->is_cpu) {
        return enqueue_tiles(session, p);
    }
    if (session->matrix_units.product != NULL) {
        return enqueue_matrix_units(session, p, p->add ? PRODUCT_ADD : PRODUCT_SET);
    }
    const cl_ulong y_stride = p->y_stride;
    const cl_uint bias_at = (cl_uint)p->bias_at;
    const cl_int add = p->add;
    const loglin_kernel_argument arguments[] = {
        KERNEL_ARGUMENT(p->bias), KERNEL_ARGUMENT(bias_at),  KERNEL_ARGUMENT(add),
        KERNEL_ARGUMENT(p->y),    KERNEL_ARGUMENT(y_stride),
    };
    RETURN_IF_ERROR(LAUNCH(session, LOGLIN_KERNEL_begin_product, arguments, p->blocks * LOGLIN_BLOCK, p->rows, 0));
    return enqueue_blas(session, p, 1);
}

/* y = silu(gate h) * (up h). */
static loglin_status enqueue_swiglu(loglin_session *session, size_t layer, size_t rows) {
    const loglin_activations *a = &session->pass_activations;
    const cl_mem w = session->model->layers[layer].matrices[LOGLIN_MATRIX_GATE_UP];
    const cl_ulong h_stride = a->h_stride;
    const cl_ulong y_stride = a->y_stride;
    const cl_ulong both_stride = 2 * a->y_stride;
    const cl_uint tokens = (cl_uint)rows;
    const cl_uint run = RUN;
    const cl_uint columns = (cl_uint)session->model->lm.hidden;
    if (session->model->device->is_cpu) {
        const loglin_kernel_argument arguments[] = {
            KERNEL_ARGUMENT(a->h), KERNEL_ARGUMENT(h_stride), KERNEL_ARGUMENT(tokens), KERNEL_ARGUMENT(run),
            KERNEL_ARGUMENT(w),    KERNEL_ARGUMENT(columns),  KERNEL_ARGUMENT(a->y),   KERNEL_ARGUMENT(y_stride),
        };
        return LAUNCH(session, LOGLIN_KERNEL_swiglu_tiles, arguments, a->y_stride / LOGLIN_BLOCK,
                      (rows + RUN - 1) / RUN, 1);
    }
    product both = {.in = a->h,
                    .w = w,
                    .y = a->both,
                    .in_stride = a->h_stride,
                    .y_stride = both_stride,
                    .rows = rows,
                    .columns = columns,
                    .blocks = both_stride / LOGLIN_BLOCK};
    if (session->matrix_units.product != NULL) {
        both.y = a->y;
        both.y_stride = a->y_stride;
        return enqueue_matrix_units(session, &both, PRODUCT_SWIGLU);
    }
    RETURN_IF_ERROR(enqueue_blas(session, &both, 0));
    const loglin_kernel_argument arguments[] = {
        KERNEL_ARGUMENT(a->both),
        KERNEL_ARGUMENT(both_stride),
        KERNEL_ARGUMENT(a->y),
        KERNEL_ARGUMENT(y_stride),
    };
    return LAUNCH(session, LOGLIN_KERNEL_finish_swiglu, arguments, a->y_stride, rows, 0);
}

/* ---- Attention -------------------------------------------------------------------------------------------------- */

/* The plan of a shape; the least recently used one makes room for it. */
static loglin_status get_plan(loglin_session *session, size_t batch, size_t length, loglin_plan **plan) {
    const loglin_model *model = session->model;
    const loglin_lm *lm = &model->lm;
    loglin_piece_plan *oldest = &session->plans[0];
    for (size_t i = 0; i < LOGLIN_SESSION_PLANS; i++) {
        loglin_piece_plan *entry = &session->plans[i];
        if (entry->plan != NULL && entry->batch == batch && entry->length == length) {
            entry->used = ++session->plan_uses;
            *plan = entry->plan;
            return LOGLIN_OK;
        }
        oldest = entry->used < oldest->used ? entry : oldest;
    }
    loglin_plan_destroy(oldest->plan);
    *oldest = (loglin_piece_plan){0};
    const loglin_problem problem = {
        .op = lm->op,
        .dtype = model->options.dtype,
        .batch = batch,
        .length = length,
        .heads = lm->heads,
        .groups = lm->groups,
        .dim_k = lm->dim_k,
        .dim_v = lm->dim_v,
        .levels = lm->levels,
        .normalize_qk = lm->op == LOGLIN_GATED_DELTA,
        .max_position = loglin_lm_max_length(lm) - length,
        .phases = LOGLIN_FORWARD,
        .engine = model->options.engine,
    };
    RETURN_IF_ERROR(loglin_plan_create(model->device, &problem, &oldest->plan));
    oldest->batch = batch;
    oldest->length = length;
    oldest->used = ++session->plan_uses;
    *plan = oldest->plan;
    return LOGLIN_OK;
}

static loglin_status reserve_workspace(loglin_session *session, size_t size) {
    if (size <= session->workspace_size) {
        return LOGLIN_OK;
    }
    if (session->workspace != NULL) {
        RETURN_IF_CL_ERROR(clReleaseMemObject(session->workspace));
        session->workspace = NULL;
        session->workspace_size = 0;
    }
    RETURN_IF_ERROR(loglin_session_buffer(session, "the attention's workspace", size, 1, &session->workspace));
    session->workspace_size = size;
    return LOGLIN_OK;
}

/* Is every sequence of the pass empty? */
static bool is_fresh(const loglin_session *session, const loglin_pass *pass) {
    for (size_t i = pass->first; i < pass->first + pass->count; i++) {
        if (session->positions[i] != 0) {
            return false;
        }
    }
    return true;
}

static loglin_status enqueue_attention(loglin_session *session, const loglin_pass *pass, size_t layer) {
    const loglin_activations *a = &session->pass_activations;
    const loglin_inputs inputs = loglin_session_inputs(session, a);
    const loglin_state state = loglin_session_state(session, layer, pass->first);
    const loglin_buffer o = {.mem = a->o};
    if (pass->length == 1 && pass->count == session->sequences) {
        return loglin_step(session->step_plan, &inputs, &state, o, session->queue, 0, NULL, NULL);
    }
    loglin_plan *plan = NULL;
    RETURN_IF_ERROR(get_plan(session, pass->count, pass->length, &plan));
    const loglin_buffer workspace = {.mem = session->workspace};
    return loglin_forward(plan, &inputs, is_fresh(session, pass) ? NULL : &state, o, &state, workspace, session->queue,
                          0, NULL, NULL);
}

static loglin_status enqueue_mix(loglin_session *session, const loglin_pass *pass, size_t layer) {
    loglin_launch mix;
    RETURN_IF_ERROR(loglin_mix_launch(session, &session->pass_activations, layer, pass->first, pass->count,
                                      pass->length, session->kernels[LOGLIN_KERNEL_attention_inputs], &mix));
    return loglin_launch_enqueue(&mix, session->queue);
}

static loglin_status enqueue_tails(loglin_session *session, const loglin_pass *pass, size_t layer) {
    const loglin_activations *a = &session->pass_activations;
    const loglin_lm *lm = &session->model->lm;
    const cl_ulong p_stride = a->p_stride;
    const cl_uint length = (cl_uint)pass->length;
    const cl_ulong tails_at = pass->first * (lm->conv_kernel - 1) * lm->conv_channels;
    const loglin_kernel_argument arguments[] = {
        KERNEL_ARGUMENT(a->p),     KERNEL_ARGUMENT(p_stride),
        KERNEL_ARGUMENT(length),   KERNEL_ARGUMENT(session->layers[layer].tails),
        KERNEL_ARGUMENT(tails_at),
    };
    return LAUNCH(session, LOGLIN_KERNEL_conv_tail, arguments, lm->conv_channels / session->program.mix, pass->count,
                  0);
}

/* ---- Layers ----------------------------------------------------------------------------------------------------- */

static loglin_status enqueue_mixer(loglin_session *session, const loglin_pass *pass, size_t layer) {
    const loglin_model *model = session->model;
    const loglin_activations *a = &session->pass_activations;
    const loglin_layer *weights = &model->layers[layer];
    const size_t rows = pass->count * pass->length;
    const product in = {.in = a->h,
                        .w = weights->matrices[LOGLIN_MATRIX_IN],
                        .bias = weights->vectors,
                        .y = a->p,
                        .in_stride = a->h_stride,
                        .y_stride = a->p_stride,
                        .rows = rows,
                        .columns = model->lm.hidden,
                        .blocks = a->p_stride / LOGLIN_BLOCK,
                        .bias_at = model->vector_at[LOGLIN_VECTOR_IN_BIAS]};
    const product out = {.in = a->h,
                         .w = weights->matrices[LOGLIN_MATRIX_OUT],
                         .bias = weights->vectors,
                         .y = a->x,
                         .in_stride = a->h_stride,
                         .y_stride = a->x_stride,
                         .rows = rows,
                         .columns = model->lm.inner,
                         .blocks = a->x_stride / LOGLIN_BLOCK,
                         .bias_at = model->vector_at[LOGLIN_VECTOR_OUT_BIAS],
                         .add = true};
    RETURN_IF_ERROR(
        enqueue_norm(session, weights->vectors, model->vector_at[LOGLIN_VECTOR_MIXER_NORM], 0, a->x_stride, rows));
    RETURN_IF_ERROR(enqueue_product(session, &in));
    RETURN_IF_ERROR(enqueue_mix(session, pass, layer));
    if (pass->length > 1) {
        RETURN_IF_ERROR(enqueue_tails(session, pass, layer));
    }
    RETURN_IF_ERROR(enqueue_attention(session, pass, layer));
    RETURN_IF_ERROR(enqueue_gated(session, layer, rows));
    return enqueue_product(session, &out);
}

static loglin_status enqueue_mlp(loglin_session *session, size_t layer, size_t rows) {
    const loglin_model *model = session->model;
    const loglin_activations *a = &session->pass_activations;
    const loglin_layer *weights = &model->layers[layer];
    const product down = {.in = a->y,
                          .w = weights->matrices[LOGLIN_MATRIX_DOWN],
                          .bias = model->no_bias,
                          .y = a->x,
                          .in_stride = a->y_stride,
                          .y_stride = a->x_stride,
                          .rows = rows,
                          .columns = model->lm.intermediate,
                          .blocks = a->x_stride / LOGLIN_BLOCK,
                          .add = true};
    RETURN_IF_ERROR(
        enqueue_norm(session, weights->vectors, model->vector_at[LOGLIN_VECTOR_MLP_NORM], 0, a->x_stride, rows));
    RETURN_IF_ERROR(enqueue_swiglu(session, layer, rows));
    return enqueue_product(session, &down);
}

/* ---- Logits ----------------------------------------------------------------------------------------------------- */

/* The logits of `rows` <= logit_rows rows of x, `skip` elements from one to the next, to host memory. */
static loglin_status read_logits(loglin_session *session, size_t x_at, size_t skip, size_t rows, float *to,
                                 size_t to_stride) {
    const loglin_model *model = session->model;
    const loglin_activations *a = &session->pass_activations;
    const product head = {.in = a->h,
                          .w = model->head,
                          .bias = model->no_bias,
                          .y = a->logits,
                          .in_stride = a->h_stride,
                          .y_stride = a->logits_stride,
                          .rows = rows,
                          .columns = model->lm.hidden,
                          .blocks = a->logits_stride / LOGLIN_BLOCK};
    RETURN_IF_ERROR(enqueue_norm(session, model->final_norm, 0, x_at, skip, rows));
    RETURN_IF_ERROR(enqueue_product(session, &head));
    const size_t origin[3] = {0, 0, 0};
    const size_t region[3] = {model->lm.vocabulary * sizeof(float), rows, 1};
    RETURN_IF_CL_ERROR(clEnqueueReadBufferRect(session->queue, a->logits, CL_TRUE, origin, origin, region,
                                               a->logits_stride * sizeof(float), 0, to_stride * sizeof(float), 0, to, 0,
                                               NULL, NULL));
    return LOGLIN_OK;
}

/* Every token's logits, sequence after sequence, or those of the last token of each. */
static loglin_status read_all_logits(loglin_session *session, const loglin_pass *pass) {
    const loglin_activations *a = &session->pass_activations;
    const size_t vocabulary = session->model->lm.vocabulary;
    if (!pass->every_logit) {
        for (size_t i = 0; i < pass->count; i += a->logit_rows) {
            const size_t rows = pass->count - i < a->logit_rows ? pass->count - i : a->logit_rows;
            const size_t last = i * pass->length + pass->length - 1;
            RETURN_IF_ERROR(read_logits(session, last * a->x_stride, pass->length * a->x_stride, rows,
                                        pass->logits + i * pass->sequence_stride, pass->sequence_stride));
        }
        return LOGLIN_OK;
    }
    for (size_t i = 0; i < pass->count; i++) {
        for (size_t t = 0; t < pass->length; t += a->logit_rows) {
            const size_t rows = pass->length - t < a->logit_rows ? pass->length - t : a->logit_rows;
            RETURN_IF_ERROR(read_logits(session, (i * pass->length + t) * a->x_stride, a->x_stride, rows,
                                        pass->logits + i * pass->sequence_stride + t * vocabulary, vocabulary));
        }
    }
    return LOGLIN_OK;
}

static loglin_status enqueue_embed(loglin_session *session, size_t rows) {
    const loglin_activations *a = &session->pass_activations;
    const cl_ulong x_stride = a->x_stride;
    const loglin_kernel_argument arguments[] = {
        KERNEL_ARGUMENT(a->ids),
        KERNEL_ARGUMENT(session->model->embedding),
        KERNEL_ARGUMENT(a->x),
        KERNEL_ARGUMENT(x_stride),
    };
    RETURN_IF_CL_ERROR(
        clEnqueueWriteBuffer(session->queue, a->ids, CL_FALSE, 0, rows * sizeof(cl_int), session->ids, 0, NULL, NULL));
    return LAUNCH(session, LOGLIN_KERNEL_embed, arguments, session->model->lm.hidden, rows, 0);
}

/* Plans and workspace first: what is enqueued keeps its buffers. */
static loglin_status prepare(loglin_session *session, const loglin_pass *pass) {
    if (session->pass_activations.rows == 0) {
        RETURN_IF_ERROR(loglin_pass_create(session));
    }
    if (pass->length == 1 && pass->count == session->sequences) {
        return LOGLIN_OK;
    }
    loglin_plan *plan = NULL;
    RETURN_IF_ERROR(get_plan(session, pass->count, pass->length, &plan));
    return reserve_workspace(session, loglin_workspace_size(plan, LOGLIN_FORWARD));
}

static loglin_status enqueue_layers(loglin_session *session, const loglin_pass *pass) {
    const size_t rows = pass->count * pass->length;
    RETURN_IF_ERROR(enqueue_embed(session, rows));
    for (size_t layer = 0; layer < session->model->lm.layers; layer++) {
        RETURN_IF_ERROR(enqueue_mixer(session, pass, layer));
        RETURN_IF_ERROR(enqueue_mlp(session, layer, rows));
    }
    return pass->logits != NULL ? read_all_logits(session, pass) : LOGLIN_OK;
}

loglin_status loglin_pass_run(loglin_session *session, const loglin_pass *pass) {
    loglin_shared_step_dismiss(session);
    RETURN_IF_ERROR(prepare(session, pass));
    const loglin_status status = enqueue_layers(session, pass);
    const cl_int code = clFinish(session->queue); /* also behind an error: the ids must stay until they are read */
    RETURN_IF_ERROR(status);
    if (code != CL_SUCCESS) {
        return loglin_fail(code, "clFinish: %s", loglin_strerror(code));
    }
    for (size_t i = pass->first; i < pass->first + pass->count; i++) {
        session->positions[i] += pass->length;
    }
    return LOGLIN_OK;
}
