/* SPDX-License-Identifier: Apache-2.0 */
/* Sessions: creation, checks of the calls, and inputs cut into pieces. */
#include "model/session.h"

#include "plan/problem.h"
#include "runtime/device.h"
#include "runtime/status.h"
#include <stdlib.h>
#include <string.h>

enum { MAX_SEQUENCES = 65536 };

/* ---- Creation --------------------------------------------------------------------------------------------------- */

static loglin_status fill_zero(const loglin_session *session, cl_mem mem, size_t at, size_t size) {
    const cl_int zero = 0;
    if (size > 0) {
        RETURN_IF_CL_ERROR(clEnqueueFillBuffer(session->queue, mem, &zero, sizeof zero, at, size, 0, NULL, NULL));
    }
    return LOGLIN_OK;
}

/* Buffers of `bytes` for each layer, zero; parts is the first layer's. */
static loglin_status create_layer_buffers(const loglin_session *session, const char *name, size_t bytes, cl_mem *parts,
                                          loglin_layer_buffers *buffers) {
    const size_t layers = session->model->lm.layers;
    RETURN_IF_ERROR(loglin_layer_buffers_create(session->model->device, name, CL_MEM_READ_WRITE, bytes, layers, parts,
                                                sizeof *session->layers, buffers));
    for (size_t layer = 0; layer < layers; layer++) {
        RETURN_IF_ERROR(fill_zero(session, *(cl_mem *)((char *)parts + layer * sizeof *session->layers), 0, bytes));
    }
    return LOGLIN_OK;
}

static loglin_status create_states(loglin_session *session) {
    const loglin_lm *lm = &session->model->lm;
    loglin_layer_state *first = session->layers;
    const size_t n = session->sequences;
    const size_t gates = n * lm->heads * lm->levels;
    size_t values = 0;
    if (__builtin_mul_overflow(gates * sizeof(float), lm->dim_k * lm->dim_v, &values)) {
        return loglin_fail(LOGLIN_UNSUPPORTED, "%zu sequences have too many states", n);
    }
    const size_t tails = n * (lm->conv_kernel - 1) * lm->conv_channels * sizeof(float);
    RETURN_IF_ERROR(
        create_layer_buffers(session, "the convolution's state", tails, &first->tails, &session->all_tails));
    RETURN_IF_ERROR(create_layer_buffers(session, "the level states", values, &first->values, &session->all_values));
    RETURN_IF_ERROR(
        create_layer_buffers(session, "the positions", n * sizeof(cl_int), &first->position, &session->all_positions));
    if (lm->op == LOGLIN_MAMBA2) {
        RETURN_IF_ERROR(create_layer_buffers(session, "the states' decays", gates * sizeof(float), &first->log_decay,
                                             &session->all_log_decays));
    }
    return LOGLIN_OK;
}

static loglin_problem step_problem(const loglin_session *session) {
    const loglin_model *model = session->model;
    const loglin_lm *lm = &model->lm;
    return (loglin_problem){
        .op = lm->op,
        .dtype = model->options.dtype,
        .batch = session->sequences,
        .length = 1,
        .heads = lm->heads,
        .groups = lm->groups,
        .dim_k = lm->dim_k,
        .dim_v = lm->dim_v,
        .levels = lm->levels,
        .normalize_qk = lm->op == LOGLIN_GATED_DELTA,
        .max_position = loglin_lm_max_length(lm) - 1,
        .phases = LOGLIN_STEP,
        .engine = model->options.engine,
    };
}

/* The products keep their input in local memory. */
static loglin_status check_local_memory(const loglin_session *session) {
    const size_t widest = loglin_widest_input(session);
    const size_t need = loglin_prepared_bytes(widest) + loglin_scratch_bytes(&session->program);
    const uint64_t have = session->model->device->info.local_memory;
    if (need > have) {
        return loglin_fail(LOGLIN_UNSUPPORTED, "%zu channels need %zu bytes of local memory, the device has %llu",
                           widest, need, (unsigned long long)have);
    }
    return LOGLIN_OK;
}

static loglin_status create_parts(loglin_session *session) {
    const loglin_model *model = session->model;
    const size_t piece = model->options.piece;
    session->positions = calloc(session->sequences, sizeof *session->positions);
    session->ids = calloc(piece > session->sequences ? piece : session->sequences, sizeof *session->ids);
    session->layers = calloc(model->lm.layers, sizeof *session->layers);
    if (session->positions == NULL || session->ids == NULL || session->layers == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "out of memory");
    }
    RETURN_IF_ERROR(create_states(session));
    const loglin_problem problem = step_problem(session);
    loglin_problem filled;
    RETURN_IF_ERROR(loglin_problem_validate(&problem, &filled));
    RETURN_IF_ERROR(loglin_session_build(session, &filled));
    RETURN_IF_ERROR(check_local_memory(session));
    for (size_t id = 0; id < LOGLIN_MODEL_KERNEL_COUNT; id++) {
        RETURN_IF_ERROR(loglin_model_create_kernel(&session->program, (loglin_model_kernel)id, &session->kernels[id]));
    }
    RETURN_IF_ERROR(loglin_plan_create(model->device, &problem, &session->step_plan));
    if (loglin_fast_step_applies(session)) {
        RETURN_IF_ERROR(loglin_fast_step_create(session));
        RETURN_IF_ERROR(loglin_session_reset(session, 0));
    }
    RETURN_IF_CL_ERROR(clFinish(session->queue));
    return LOGLIN_OK;
}

static loglin_status check_queue(const loglin_model *model, cl_command_queue queue) {
    cl_command_queue_properties properties = 0;
    RETURN_IF_ERROR(loglin_device_check_queue(model->device, queue));
    RETURN_IF_CL_ERROR(clGetCommandQueueInfo(queue, CL_QUEUE_PROPERTIES, sizeof properties, &properties, NULL));
    if ((properties & CL_QUEUE_OUT_OF_ORDER_EXEC_MODE_ENABLE) != 0) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "queue is out of order, expected an in-order queue");
    }
    return LOGLIN_OK;
}

loglin_status loglin_session_create(loglin_model *model, cl_command_queue queue, size_t sequences,
                                    loglin_session **session) {
    if (model == NULL || queue == NULL || session == NULL) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "%s is NULL",
                           model == NULL   ? "model"
                           : queue == NULL ? "queue"
                                           : "session");
    }
    *session = NULL;
    if (sequences < 1 || sequences > MAX_SEQUENCES) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "sequences is %zu, expected 1 to %d", sequences, MAX_SEQUENCES);
    }
    RETURN_IF_ERROR(check_queue(model, queue));
    loglin_session *created = calloc(1, sizeof *created);
    if (created == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "out of memory");
    }
    loglin_model_retain(model);
    (void)clRetainCommandQueue(queue);
    created->model = model;
    created->queue = queue;
    created->sequences = sequences;
    const loglin_status status = create_parts(created);
    if (status != LOGLIN_OK) {
        loglin_session_destroy(created);
        return status;
    }
    *session = created;
    return LOGLIN_OK;
}

static void release_buffer(cl_mem mem) {
    if (mem != NULL) {
        (void)clReleaseMemObject(mem);
    }
}

void loglin_session_destroy(loglin_session *session) {
    if (session == NULL) {
        return;
    }
    loglin_shared_step_dismiss(session);
    (void)clFinish(session->queue);
    loglin_fast_step_destroy(session);
    loglin_pass_destroy(session);
    loglin_plan_destroy(session->step_plan);
    for (size_t id = 0; id < LOGLIN_MODEL_KERNEL_COUNT; id++) {
        if (session->kernels[id] != NULL) {
            (void)clReleaseKernel(session->kernels[id]);
        }
    }
    for (size_t layer = 0; session->layers != NULL && layer < session->model->lm.layers; layer++) {
        release_buffer(session->layers[layer].tails);
        release_buffer(session->layers[layer].values);
        release_buffer(session->layers[layer].log_decay);
        release_buffer(session->layers[layer].position);
    }
    release_buffer(session->all_tails.all);
    release_buffer(session->all_values.all);
    release_buffer(session->all_log_decays.all);
    release_buffer(session->all_positions.all);
    free(session->layers);
    free(session->ids);
    free(session->positions);
    (void)clReleaseCommandQueue(session->queue);
    loglin_model_close(session->model);
    free(session);
}

/* ---- Positions -------------------------------------------------------------------------------------------------- */

static loglin_status check_sequence(const loglin_session *session, size_t sequence) {
    if (session == NULL) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "session is NULL");
    }
    if (sequence >= session->sequences) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "sequence is %zu, expected less than %zu", sequence,
                           session->sequences);
    }
    return LOGLIN_OK;
}

size_t loglin_session_position(const loglin_session *session, size_t sequence) {
    return session != NULL && sequence < session->sequences ? session->positions[sequence] : 0;
}

loglin_status loglin_session_reset(loglin_session *session, size_t sequence) {
    RETURN_IF_ERROR(check_sequence(session, sequence));
    loglin_shared_step_dismiss(session);
    const loglin_lm *lm = &session->model->lm;
    const size_t tail = (lm->conv_kernel - 1) * lm->conv_channels * sizeof(float);
    for (size_t layer = 0; layer < lm->layers; layer++) {
        const loglin_layer_state *state = &session->layers[layer];
        RETURN_IF_ERROR(fill_zero(session, state->tails, sequence * tail, tail));
        RETURN_IF_ERROR(fill_zero(session, state->position, sequence * sizeof(cl_int), sizeof(cl_int)));
    }
    session->positions[sequence] = 0;
    return LOGLIN_OK;
}

/* ---- Tokens ----------------------------------------------------------------------------------------------------- */

static loglin_status check_tokens(const loglin_session *session, const int32_t *ids, size_t count) {
    const size_t vocabulary = session->model->lm.vocabulary;
    if (ids == NULL) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "ids is NULL");
    }
    for (size_t i = 0; i < count; i++) {
        if (ids[i] < 0 || (size_t)ids[i] >= vocabulary) {
            return loglin_fail(LOGLIN_INVALID_ARGUMENT, "ids[%zu] is %d, expected 0 to %zu", i, (int)ids[i],
                               vocabulary - 1);
        }
    }
    return LOGLIN_OK;
}

/* Is there room for `length` more tokens in each of `count` sequences? */
static loglin_status check_room(const loglin_session *session, size_t first, size_t count, size_t length) {
    const size_t max_length = loglin_lm_max_length(&session->model->lm);
    if (length == 0) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "the number of tokens is 0, expected at least 1");
    }
    for (size_t i = first; i < first + count; i++) {
        if (length > max_length || session->positions[i] > max_length - length) {
            return loglin_fail(LOGLIN_INVALID_ARGUMENT,
                               "sequence %zu would have %zu + %zu tokens, the model's %zu levels reach %zu", i,
                               session->positions[i], length, session->model->lm.levels, max_length);
        }
    }
    return LOGLIN_OK;
}

/* Tokens of each sequence that one pass takes. */
static size_t piece_of(const loglin_session *session, size_t sequences) {
    const size_t piece = session->model->options.piece / sequences;
    return piece > 0 ? piece : 1;
}

loglin_status loglin_session_prefill(loglin_session *session, size_t sequence, const int32_t *ids, size_t count,
                                     float *logits) { /* NOLINT(readability-non-const-parameter) */
    RETURN_IF_ERROR(check_sequence(session, sequence));
    RETURN_IF_ERROR(check_room(session, sequence, 1, count));
    RETURN_IF_ERROR(check_tokens(session, ids, count));
    const size_t piece = piece_of(session, 1);
    for (size_t done = 0; done < count; done += piece) {
        const size_t length = count - done < piece ? count - done : piece;
        const loglin_pass pass = {.first = sequence,
                                  .count = 1,
                                  .length = length,
                                  .logits = done + length == count ? logits : NULL,
                                  .sequence_stride = session->model->lm.vocabulary};
        memcpy(session->ids, ids + done, length * sizeof *ids);
        RETURN_IF_ERROR(loglin_pass_run(session, &pass));
    }
    return LOGLIN_OK;
}

/* NOLINTNEXTLINE(readability-non-const-parameter) */
loglin_status loglin_session_score(loglin_session *session, const int32_t *ids, size_t length, float *logits) {
    RETURN_IF_ERROR(check_sequence(session, 0));
    RETURN_IF_ERROR(check_room(session, 0, session->sequences, length));
    RETURN_IF_ERROR(check_tokens(session, ids, session->sequences * length));
    if (logits == NULL) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "logits is NULL");
    }
    const size_t vocabulary = session->model->lm.vocabulary;
    const size_t piece = piece_of(session, session->sequences);
    for (size_t done = 0; done < length; done += piece) {
        const size_t now = length - done < piece ? length - done : piece;
        const loglin_pass pass = {.first = 0,
                                  .count = session->sequences,
                                  .length = now,
                                  .every_logit = true,
                                  .logits = logits + done * vocabulary,
                                  .sequence_stride = length * vocabulary};
        for (size_t i = 0; i < session->sequences; i++) {
            memcpy(session->ids + i * now, ids + i * length + done, now * sizeof *ids);
        }
        RETURN_IF_ERROR(loglin_pass_run(session, &pass));
    }
    return LOGLIN_OK;
}

loglin_status loglin_session_step(loglin_session *session, const int32_t *ids, float *logits) {
    RETURN_IF_ERROR(check_sequence(session, 0));
    const size_t n = session->sequences;
    RETURN_IF_ERROR(check_room(session, 0, n, 1));
    RETURN_IF_ERROR(check_tokens(session, ids, n));
    memcpy(session->ids, ids, n * sizeof *ids);
    if (session->step_activations.rows == 0) {
        const loglin_pass pass = {
            .first = 0, .count = n, .length = 1, .logits = logits, .sequence_stride = session->model->lm.vocabulary};
        return loglin_pass_run(session, &pass);
    }
    RETURN_IF_ERROR(loglin_fast_step_run(session, logits));
    for (size_t i = 0; i < n; i++) {
        session->positions[i]++;
    }
    return LOGLIN_OK;
}
