/* SPDX-License-Identifier: Apache-2.0 */
/* Buffers of a session, and the launch that both ways through the layers share. */
#include "model/session.h"

#include "runtime/device.h"
#include "runtime/status.h"

enum { SLACK = LOGLIN_BLOCK };

loglin_status loglin_session_buffer(const loglin_session *session, const char *name, size_t count, size_t element,
                                    cl_mem *mem) {
    const loglin_device *device = session->model->device;
    size_t bytes = 0;
    if (__builtin_mul_overflow(count > 0 ? count : 1, element, &bytes) || bytes > device->info.max_allocation) {
        return loglin_fail(LOGLIN_UNSUPPORTED,
                           "%s needs a buffer of %zu elements of %zu bytes, the device allows %llu bytes", name, count,
                           element, (unsigned long long)device->info.max_allocation);
    }
    cl_int code = CL_SUCCESS;
    *mem = clCreateBuffer(device->context, CL_MEM_READ_WRITE, bytes, NULL, &code);
    if (code != CL_SUCCESS) {
        *mem = NULL;
        return loglin_fail(code, "%s: a buffer of %zu bytes: %s", name, bytes, loglin_strerror(code));
    }
    return LOGLIN_OK;
}

static loglin_status create_attention(const loglin_session *session, loglin_activations *a) {
    const loglin_lm *lm = &session->model->lm;
    const size_t storage = session->model->options.dtype == LOGLIN_F32 ? 4 : 2;
    const size_t qk = a->rows * lm->groups * lm->dim_k;
    RETURN_IF_ERROR(loglin_session_buffer(session, "q", qk, storage, &a->q));
    RETURN_IF_ERROR(loglin_session_buffer(session, "k", qk, storage, &a->k));
    RETURN_IF_ERROR(loglin_session_buffer(session, "v", a->rows * lm->inner, storage, &a->v));
    RETURN_IF_ERROR(loglin_session_buffer(session, "o", a->rows * lm->inner, storage, &a->o));
    RETURN_IF_ERROR(loglin_session_buffer(session, "g", a->rows * lm->heads, sizeof(float), &a->g));
    RETURN_IF_ERROR(loglin_session_buffer(session, "beta", a->rows * lm->heads, sizeof(float), &a->beta));
    return loglin_session_buffer(session, "level_scales", a->rows * lm->heads * lm->levels, sizeof(float),
                                 &a->level_scales);
}

static loglin_status create_products(const loglin_session *session, loglin_activations *a) {
    RETURN_IF_ERROR(loglin_session_buffer(session, "h", a->rows * a->h_stride, sizeof(float), &a->h));
    if (!session->model->device->is_cpu && session->matrix_units.product == NULL) {
        RETURN_IF_ERROR(
            loglin_session_buffer(session, "unpacked", LOGLIN_UNPACKED_FLOATS, sizeof(float), &a->unpacked));
    }
    if (!session->model->device->is_cpu) {
        RETURN_IF_ERROR(loglin_session_buffer(session, "both", a->rows * 2 * a->y_stride, sizeof(float), &a->both));
    }
    return LOGLIN_OK;
}

loglin_status loglin_activations_create(const loglin_session *session, size_t rows, size_t logit_rows, bool pass,
                                        loglin_activations *a) {
    const loglin_lm *lm = &session->model->lm;
    a->rows = rows;
    a->logit_rows = logit_rows;
    a->x_stride = loglin_whole_blocks(lm->hidden);
    a->h_stride = loglin_whole_blocks(lm->hidden > lm->inner ? lm->hidden : lm->inner);
    a->p_stride = loglin_whole_blocks(session->model->layout.columns);
    a->y_stride = loglin_whole_blocks(lm->intermediate);
    a->logits_stride = loglin_whole_blocks(lm->vocabulary);
    RETURN_IF_ERROR(loglin_session_buffer(session, "ids", rows, sizeof(cl_int), &a->ids));
    RETURN_IF_ERROR(loglin_session_buffer(session, "x", rows * a->x_stride, sizeof(float), &a->x));
    RETURN_IF_ERROR(loglin_session_buffer(session, "p", rows * a->p_stride + SLACK, sizeof(float), &a->p));
    RETURN_IF_ERROR(loglin_session_buffer(session, "conv_v", rows * lm->inner, sizeof(float), &a->conv_v));
    RETURN_IF_ERROR(loglin_session_buffer(session, "y", rows * a->y_stride, sizeof(float), &a->y));
    RETURN_IF_ERROR(loglin_session_buffer(session, "logits", logit_rows * a->logits_stride, sizeof(float), &a->logits));
    RETURN_IF_ERROR(create_attention(session, a));
    return pass ? create_products(session, a) : LOGLIN_OK;
}

void loglin_activations_destroy(loglin_activations *a) {
    const cl_mem buffers[] = {a->ids,          a->x,    a->h, a->p,        a->conv_v, a->q,     a->k, a->v, a->g, a->o,
                              a->level_scales, a->beta, a->y, a->unpacked, a->both,   a->logits};
    for (size_t i = 0; i < sizeof buffers / sizeof buffers[0]; i++) {
        if (buffers[i] != NULL) {
            (void)clReleaseMemObject(buffers[i]);
        }
    }
    *a = (loglin_activations){0};
}

loglin_inputs loglin_session_inputs(const loglin_session *session, const loglin_activations *a) {
    return (loglin_inputs){
        .q = {.mem = a->q},
        .k = {.mem = a->k},
        .v = {.mem = a->v},
        .g = {.mem = a->g},
        .level_scales = {.mem = a->level_scales},
        .beta = {.mem = session->model->lm.op == LOGLIN_GATED_DELTA ? a->beta : NULL},
    };
}

loglin_state loglin_session_state(const loglin_session *session, size_t layer, size_t first) {
    const loglin_lm *lm = &session->model->lm;
    const loglin_layer_state *state = &session->layers[layer];
    return (loglin_state){
        .values = {state->values, first * lm->heads * lm->levels * lm->dim_k * lm->dim_v},
        .log_decay = {state->log_decay, state->log_decay != NULL ? first * lm->heads * lm->levels : 0},
        .position = {state->position, first},
    };
}

loglin_status loglin_mix_launch(const loglin_session *session, const loglin_activations *a, size_t layer, size_t first,
                                size_t count, size_t length, cl_kernel kernel, loglin_launch *launch) {
    const loglin_model *model = session->model;
    const loglin_lm *lm = &model->lm;
    const loglin_model_program *program = &session->program;
    const cl_ulong p_stride = a->p_stride;
    const cl_uint tokens = (cl_uint)length;
    const cl_ulong tails_at = first * (lm->conv_kernel - 1) * lm->conv_channels;
    const cl_uint conv = (cl_uint)model->vector_at[LOGLIN_VECTOR_CONV];
    const cl_uint conv_bias = (cl_uint)model->vector_at[LOGLIN_VECTOR_CONV_BIAS];
    const cl_uint dt_bias = (cl_uint)model->vector_at[LOGLIN_VECTOR_DT_BIAS];
    const cl_uint decay = (cl_uint)model->vector_at[LOGLIN_VECTOR_A];
    const cl_uint level = (cl_uint)model->vector_at[LOGLIN_VECTOR_LEVEL];
    const loglin_kernel_argument arguments[] = {
        KERNEL_ARGUMENT(a->p),
        KERNEL_ARGUMENT(p_stride),
        KERNEL_ARGUMENT(tokens),
        KERNEL_ARGUMENT(session->layers[layer].tails),
        KERNEL_ARGUMENT(tails_at),
        KERNEL_ARGUMENT(model->layers[layer].vectors),
        KERNEL_ARGUMENT(conv),
        KERNEL_ARGUMENT(conv_bias),
        KERNEL_ARGUMENT(dt_bias),
        KERNEL_ARGUMENT(decay),
        KERNEL_ARGUMENT(level),
        KERNEL_ARGUMENT(lm->dt_min),
        KERNEL_ARGUMENT(lm->dt_max),
        KERNEL_ARGUMENT(a->q),
        KERNEL_ARGUMENT(a->k),
        KERNEL_ARGUMENT(a->v),
        KERNEL_ARGUMENT(a->conv_v),
        KERNEL_ARGUMENT(a->g),
        KERNEL_ARGUMENT(a->level_scales),
        KERNEL_ARGUMENT(a->beta),
    };
    const size_t runs = lm->conv_channels / program->mix + lm->heads * lm->levels + lm->heads; /* on a GPU */
    const size_t items = program->local == 1 ? 1 : runs;
    *launch = (loglin_launch){
        .kernel = kernel,
        .global = {(items + program->local - 1) / program->local * program->local, count * length},
        .local = {program->local, 1},
    };
    return loglin_set_arguments(kernel, arguments, sizeof arguments / sizeof arguments[0]);
}

size_t loglin_prepared_bytes(size_t columns) {
    return (columns + LOGLIN_BLOCK) * sizeof(float);
}

size_t loglin_scratch_bytes(const loglin_model_program *program) {
    return (program->shuffles ? program->local + 48 : 18 * program->local + 96) *
           sizeof(float); /* cl/model.cl: SCRATCH */
}
