/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A model on a device.
 *
 * Matrices are stored for the kernels of cl/model.cl: blocks of 16 rows, in a block column after column,
 * [rows / 16][columns][16], the last block filled up with zeros.  Vectors are floats, all of a layer in one buffer.
 * Every array whose index is a row of a matrix has room for whole blocks.
 */
#ifndef LOGLIN_MODEL_MODEL_H
#define LOGLIN_MODEL_MODEL_H

#include "loglin_model.h"
#include "model/checkpoint.h"
#include "model/lm.h"
#include <stdatomic.h>

enum { LOGLIN_BLOCK = 16 };

/* Rounded up to whole blocks. */
static inline size_t loglin_whole_blocks(size_t rows) {
    return (rows + LOGLIN_BLOCK - 1) / LOGLIN_BLOCK * LOGLIN_BLOCK;
}

/* Buffers of the same size for all layers: one that holds them all, which a launch may take, and each as a part of it. */
typedef struct loglin_layer_buffers {
    cl_mem all;  /* NULL where the device does not allow so large a buffer */
    size_t next; /* bytes from a layer to the next */
} loglin_layer_buffers;

typedef struct loglin_layer {
    cl_mem matrices[LOGLIN_LAYER_MATRICES];
    cl_mem vectors;
} loglin_layer;

struct loglin_model {
    atomic_uint references;
    loglin_device *device;
    loglin_model_options options;
    loglin_lm lm;
    loglin_lm_layout layout;
    loglin_dtype matrix_dtype;
    loglin_layer *layers;
    loglin_layer_buffers matrices[LOGLIN_LAYER_MATRICES], vectors;
    cl_mem embedding;
    cl_mem head;                            /* the embedding, retained once more, where they are tied */
    size_t vector_at[LOGLIN_LAYER_VECTORS]; /* element offsets in a layer's vectors */
    cl_mem final_norm;
    cl_mem no_bias; /* zeros, for the head and the MLP */
    uint64_t parameters, weight_bytes;
};

/*
 * Creates a buffer of `bytes` for each of `count` layers, in parts[0], parts[stride], ... (counted in bytes of host
 * memory); `name` is for messages.
 */
loglin_status loglin_layer_buffers_create(const loglin_device *device, const char *name, cl_mem_flags flags,
                                          size_t bytes, size_t count, cl_mem *parts, size_t stride,
                                          loglin_layer_buffers *buffers);

void loglin_model_retain(loglin_model *model);

/* Uploads a checkpoint that has been checked; model->lm and layout are set, the layers are zero. */
loglin_status loglin_model_upload(loglin_model *model, const loglin_checkpoint *checkpoint, cl_command_queue queue);

#endif
