/* SPDX-License-Identifier: Apache-2.0 */
/* Opening a model and telling about it. */
#include "model/model.h"

#include "runtime/device.h"
#include "runtime/status.h"
#include <stdlib.h>

enum { DEFAULT_PIECE = 1024, MAX_PIECE = 65536 };

static loglin_status check_options(const loglin_model_options *options) {
    if (options->dtype != LOGLIN_F32 && options->dtype != LOGLIN_F16 && options->dtype != LOGLIN_BF16) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "options->dtype is %d, expected a loglin_dtype",
                           (int)options->dtype);
    }
    if ((int)options->engine < LOGLIN_ENGINE_AUTO || (int)options->engine > LOGLIN_ENGINE_FUSED) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "options->engine is %d, expected a loglin_engine",
                           (int)options->engine);
    }
    if (options->piece > MAX_PIECE) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "options->piece is %zu, expected at most %d", options->piece,
                           MAX_PIECE);
    }
    return LOGLIN_OK;
}

static loglin_status load(loglin_model *model, const loglin_checkpoint *checkpoint, cl_command_queue queue) {
    RETURN_IF_ERROR(loglin_checkpoint_describe(checkpoint, &model->lm));
    model->layout = loglin_lm_get_layout(&model->lm);
    model->layers = calloc(model->lm.layers, sizeof *model->layers);
    if (model->layers == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "out of memory");
    }
    return loglin_model_upload(model, checkpoint, queue);
}

loglin_status loglin_model_open(loglin_device *device, cl_command_queue queue, const char *folder,
                                const loglin_model_options *options, loglin_model **model) {
    if (device == NULL || queue == NULL || folder == NULL || model == NULL) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "%s is NULL",
                           device == NULL   ? "device"
                           : queue == NULL  ? "queue"
                           : folder == NULL ? "folder"
                                            : "model");
    }
    const loglin_model_options defaults = {0};
    *model = NULL;
    RETURN_IF_ERROR(check_options(options != NULL ? options : &defaults));
    RETURN_IF_ERROR(loglin_device_check_queue(device, queue));
    loglin_checkpoint *checkpoint = NULL;
    RETURN_IF_ERROR(loglin_checkpoint_open(folder, &checkpoint));
    loglin_model *opened = calloc(1, sizeof *opened);
    if (opened == NULL) {
        loglin_checkpoint_close(checkpoint);
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "%s: out of memory", folder);
    }
    loglin_device_retain(device);
    opened->device = device;
    opened->options = options != NULL ? *options : defaults;
    opened->options.piece = opened->options.piece != 0 ? opened->options.piece : DEFAULT_PIECE;
    atomic_init(&opened->references, 1);
    const loglin_status status = load(opened, checkpoint, queue);
    loglin_checkpoint_close(checkpoint);
    if (status != LOGLIN_OK) {
        loglin_model_close(opened);
        return status;
    }
    *model = opened;
    return LOGLIN_OK;
}

static void release_buffer(cl_mem mem) {
    if (mem != NULL) {
        (void)clReleaseMemObject(mem);
    }
}

void loglin_model_retain(loglin_model *model) {
    (void)atomic_fetch_add(&model->references, 1);
}

void loglin_model_close(loglin_model *model) {
    if (model == NULL || atomic_fetch_sub(&model->references, 1) != 1) {
        return;
    }
    for (size_t layer = 0; model->layers != NULL && layer < model->lm.layers; layer++) {
        for (size_t id = 0; id < LOGLIN_LAYER_MATRICES; id++) {
            release_buffer(model->layers[layer].matrices[id]);
        }
        release_buffer(model->layers[layer].vectors);
    }
    for (size_t id = 0; id < LOGLIN_LAYER_MATRICES; id++) {
        release_buffer(model->matrices[id].all);
    }
    release_buffer(model->vectors.all);
    release_buffer(model->embedding);
    release_buffer(model->head);
    release_buffer(model->final_norm);
    release_buffer(model->no_bias);
    loglin_device_release(model->device);
    free(model->layers);
    free(model);
}

void loglin_model_get_info(const loglin_model *model, loglin_model_info *info) {
    if (model == NULL) {
        *info = (loglin_model_info){0};
        return;
    }
    const loglin_lm *lm = &model->lm;
    const size_t gates = lm->op == LOGLIN_MAMBA2 ? lm->heads * lm->levels : 0;
    const size_t floats =
        lm->heads * lm->levels * lm->dim_k * lm->dim_v + gates + (lm->conv_kernel - 1) * lm->conv_channels;
    *info = (loglin_model_info){
        .op = lm->op,
        .vocabulary = lm->vocabulary,
        .layers = lm->layers,
        .hidden = lm->hidden,
        .heads = lm->heads,
        .groups = lm->groups,
        .dim_k = lm->dim_k,
        .dim_v = lm->dim_v,
        .levels = lm->levels,
        .intermediate = lm->intermediate,
        .max_length = loglin_lm_max_length(lm),
        .parameters = model->parameters,
        .weight_bytes = model->weight_bytes,
        .weight_dtype = model->matrix_dtype,
        .state_bytes = (uint64_t)lm->layers * (floats * sizeof(float) + sizeof(cl_int)),
    };
}
