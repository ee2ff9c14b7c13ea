/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A step of one launch on NVIDIA's GPUs, cl/nvidia_token.cl.
 *
 * The token's id is an argument.  The logits, and behind them whether groups have waited for each other in vain, come in
 * pinned memory, mapped between steps: a command that writes the id, and those that read to the program's own memory, take
 * 0.1 ms more.
 */
#include "model/session.h"

#include "runtime/device.h"
#include "runtime/status.h"
#include <string.h>

/* The places of the kernel's arguments that each step sets. */
enum { ID_ARGUMENT = 0, NUMBER_ARGUMENT = 3 };

/* Floats that groups tell each other, each with its number. */
static size_t told_words(const loglin_session *session) {
    const loglin_activations *a = &session->step_activations;
    const size_t inner = session->model->lm.inner;
    return a->p_stride + a->y_stride + inner + inner / 8 + (size_t)(2 * NT_PARTS + 2) * a->x_stride;
}

static size_t answer_words(const loglin_session *session) {
    return session->step_activations.logits_stride + 1;
}

static loglin_status set_kernel(const loglin_session *session, loglin_launch *launch) {
    const loglin_model *model = session->model;
    const loglin_lm *lm = &model->lm;
    const loglin_streamed_step *streamed = &session->streamed;
    const loglin_model_program *program = &session->program;
    const cl_mem log_decay = session->all_log_decays.all;
    const cl_int id = 0;
    const cl_uint layers = (cl_uint)lm->layers;
    const loglin_kernel_argument arguments[] = {
        KERNEL_ARGUMENT(id),
        KERNEL_ARGUMENT(model->embedding),
        KERNEL_ARGUMENT(streamed->told),
        KERNEL_ARGUMENT(streamed->number),
        KERNEL_ARGUMENT(layers),
        KERNEL_MODEL_ARRAYS(model),
        KERNEL_ARGUMENT(streamed->answer),
        KERNEL_ARGUMENT(lm->norm_eps),
        KERNEL_ARGUMENT(lm->dt_min),
        KERNEL_ARGUMENT(lm->dt_max),
        KERNEL_ARGUMENT(session->all_tails.all),
        KERNEL_ARGUMENT(session->all_values.all),
        {sizeof log_decay, log_decay != NULL ? &log_decay : NULL},
        KERNEL_ARGUMENT(session->all_positions.all),
    };
    RETURN_IF_ERROR(loglin_model_create_kernel(program, LOGLIN_KERNEL_token, &launch->kernel));
    launch->local[0] = program->local + NT_HELPERS + NT_COPIERS;
    launch->local[1] = 1;
    launch->global[0] = program->token_groups * launch->local[0];
    launch->global[1] = 1;
    return loglin_set_arguments(launch->kernel, arguments, sizeof arguments / sizeof arguments[0]);
}

static loglin_status create_answer(loglin_session *session) {
    const loglin_device *device = session->model->device;
    cl_int code = CL_SUCCESS;
    session->streamed.answer = clCreateBuffer(device->context, CL_MEM_READ_WRITE | CL_MEM_ALLOC_HOST_PTR,
                                              answer_words(session) * sizeof(float), NULL, &code);
    if (code != CL_SUCCESS) {
        session->streamed.answer = NULL;
        return loglin_fail(code, "the logits in pinned memory: %s", loglin_strerror(code));
    }
    return LOGLIN_OK;
}

static loglin_status unmap(loglin_session *session) {
    loglin_streamed_step *streamed = &session->streamed;
    float *mapped = streamed->mapped;
    streamed->mapped = NULL;
    if (mapped != NULL) {
        RETURN_IF_CL_ERROR(clEnqueueUnmapMemObject(session->queue, streamed->answer, mapped, 0, NULL, NULL));
    }
    return LOGLIN_OK;
}

/* Nobody has told anything yet, nor waited in vain. */
static loglin_status clear_told(loglin_session *session) {
    static const cl_uint zero;
    loglin_streamed_step *streamed = &session->streamed;
    streamed->number = 1;
    RETURN_IF_ERROR(unmap(session));
    RETURN_IF_CL_ERROR(clEnqueueFillBuffer(session->queue, streamed->told, &zero, sizeof zero, 0,
                                           told_words(session) * sizeof(cl_ulong), 0, NULL, NULL));
    RETURN_IF_CL_ERROR(clEnqueueFillBuffer(session->queue, streamed->answer, &zero, sizeof zero, 0,
                                           answer_words(session) * sizeof(float), 0, NULL, NULL));
    return LOGLIN_OK;
}

/* From the id to the answer. */
static loglin_status take_token(loglin_session *session) {
    loglin_streamed_step *streamed = &session->streamed;
    const cl_kernel kernel = session->step_token.kernel;
    cl_int code = CL_SUCCESS;
    RETURN_IF_ERROR(unmap(session));
    RETURN_IF_CL_ERROR(clSetKernelArg(kernel, ID_ARGUMENT, sizeof session->ids[0], &session->ids[0]));
    RETURN_IF_CL_ERROR(clSetKernelArg(kernel, NUMBER_ARGUMENT, sizeof streamed->number, &streamed->number));
    streamed->number += (cl_uint)session->model->lm.layers + 1;
    RETURN_IF_ERROR(loglin_launch_enqueue(&session->step_token, session->queue));
    streamed->mapped = clEnqueueMapBuffer(session->queue, streamed->answer, CL_TRUE, CL_MAP_READ, 0,
                                          answer_words(session) * sizeof(float), 0, NULL, NULL, &code);
    if (code != CL_SUCCESS) {
        streamed->mapped = NULL;
        (void)clFinish(session->queue);
        return loglin_fail(code, "clEnqueueMapBuffer: %s", loglin_strerror(code));
    }
    return LOGLIN_OK;
}

loglin_status loglin_streamed_step_run(loglin_session *session, float *logits) {
    const loglin_streamed_step *streamed = &session->streamed;
    cl_uint waited_in_vain = 0;
    mtx_lock(&session->model->device->meetings);
    const loglin_status status = take_token(session);
    mtx_unlock(&session->model->device->meetings);
    RETURN_IF_ERROR(status);
    if (streamed->mapped == NULL) {
        return loglin_fail(LOGLIN_INTERNAL, "the logits of a step are not mapped");
    }
    memcpy(&waited_in_vain, streamed->mapped + session->step_activations.logits_stride, sizeof waited_in_vain);
    if (waited_in_vain != 0) {
        RETURN_IF_ERROR(clear_told(session));
        return loglin_fail(LOGLIN_INTERNAL, "the work-groups of a step waited for each other in vain");
    }
    if (logits != NULL) {
        memcpy(logits, streamed->mapped, session->model->lm.vocabulary * sizeof *logits);
    }
    return LOGLIN_OK;
}

void loglin_streamed_step_destroy(loglin_session *session) {
    loglin_streamed_step *streamed = &session->streamed;
    if (streamed->answer != NULL) {
        (void)unmap(session);
        (void)clReleaseMemObject(streamed->answer);
    }
    if (streamed->told != NULL) {
        (void)clReleaseMemObject(streamed->told);
    }
    *streamed = (loglin_streamed_step){0};
}

loglin_status loglin_streamed_step_create(loglin_session *session) {
    RETURN_IF_ERROR(create_answer(session));
    RETURN_IF_ERROR(
        loglin_session_buffer(session, "a step", told_words(session), sizeof(cl_ulong), &session->streamed.told));
    RETURN_IF_ERROR(set_kernel(session, &session->step_token));
    RETURN_IF_ERROR(clear_told(session));
    const loglin_status status = loglin_streamed_step_run(session, NULL); /* session->ids are 0 */
    if (status != LOGLIN_INTERNAL) {
        return status;
    }
    (void)clReleaseKernel(session->step_token.kernel);
    session->step_token.kernel = NULL;
    loglin_streamed_step_destroy(session);
    return LOGLIN_OK;
}
