/* SPDX-License-Identifier: Apache-2.0 */
/* From the tensors of a checkpoint to the arrays that the kernels read. */
#include "model/model.h"

#include "runtime/device.h"
#include "runtime/status.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Rows are rearranged on the host in portions of so many bytes, so that a model needs no second copy of itself. */
enum { PORTION = 4 << 20 };

typedef struct upload {
    loglin_model *model;
    const loglin_checkpoint *checkpoint;
    cl_command_queue queue;
} upload;

static size_t element_size(const loglin_model *model) {
    return model->matrix_dtype == LOGLIN_F32 ? 4 : 2;
}

static loglin_tensor_dtype tensor_dtype(loglin_dtype dtype) {
    switch (dtype) {
    case LOGLIN_F16:
        return LOGLIN_TENSOR_F16;
    case LOGLIN_BF16:
        return LOGLIN_TENSOR_BF16;
    case LOGLIN_F32:
        break;
    }
    return LOGLIN_TENSOR_F32;
}

static loglin_status create_buffer(const upload *up, const char *name, size_t bytes, cl_mem *mem) {
    const loglin_device *device = up->model->device;
    if (bytes > device->info.max_allocation) {
        return loglin_fail(LOGLIN_UNSUPPORTED, "%s needs a buffer of %zu bytes, the device allows %llu", name, bytes,
                           (unsigned long long)device->info.max_allocation);
    }
    cl_int code = CL_SUCCESS;
    *mem = clCreateBuffer(device->context, CL_MEM_READ_ONLY, bytes, NULL, &code);
    if (code != CL_SUCCESS) {
        *mem = NULL;
        return loglin_fail(code, "%s: a buffer of %zu bytes: %s", name, bytes, loglin_strerror(code));
    }
    up->model->weight_bytes += bytes;
    return LOGLIN_OK;
}

/* ---- Matrices --------------------------------------------------------------------------------------------------- */

/* The row of the matrix that a tensor's row becomes. */
static size_t target_row(const loglin_lm_tensor *place, size_t row) {
    if (place->matrix != LOGLIN_MATRIX_GATE_UP) {
        return place->at + row;
    }
    return row / LOGLIN_BLOCK * 2 * LOGLIN_BLOCK + row % LOGLIN_BLOCK + (place->interleave_odd ? LOGLIN_BLOCK : 0);
}

/* The first row of a tensor whose target is `target` or more. */
static size_t first_row(const loglin_lm_tensor *place, size_t target) {
    size_t low = 0;
    size_t high = place->shape[0];
    while (low < high) {
        const size_t middle = low + (high - low) / 2;
        if (target_row(place, middle) < target) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

/* Spreads a row over its block: 16 elements from one column to the next. */
static void place_row_16(const uint16_t *row, size_t columns, uint16_t *to) {
    for (size_t k = 0; k < columns; k++) {
        to[k * LOGLIN_BLOCK] = row[k];
    }
}

static void place_row_32(const float *row, size_t columns, float *to) {
    for (size_t k = 0; k < columns; k++) {
        to[k * LOGLIN_BLOCK] = row[k];
    }
}

/* The rows of a tensor that belong to the target rows first .. last-1, which are those in `portion`. */
static void place_tensor(const loglin_model *model, const loglin_tensor *tensor, const loglin_lm_tensor *place,
                         size_t first, size_t last, void *row_buffer, void *portion) {
    const size_t columns = place->shape[1];
    const size_t source_size = columns * loglin_tensor_dtype_size(tensor->dtype);
    for (size_t row = first_row(place, first); row < place->shape[0]; row++) {
        const size_t target = target_row(place, row);
        if (target >= last) {
            break;
        }
        const unsigned char *source = (const unsigned char *)tensor->data + row * source_size;
        const size_t at = (target - first) / LOGLIN_BLOCK * columns * LOGLIN_BLOCK + target % LOGLIN_BLOCK;
        if (tensor_dtype(model->matrix_dtype) == tensor->dtype) {
            memcpy(row_buffer, source, source_size); /* the source may be unaligned */
        } else {
            loglin_tensor_to_float(tensor->dtype, source, columns, row_buffer);
        }
        if (model->matrix_dtype == LOGLIN_F32) {
            place_row_32(row_buffer, columns, (float *)portion + at);
        } else {
            place_row_16(row_buffer, columns, (uint16_t *)portion + at);
        }
    }
}

typedef struct matrix_upload {
    const loglin_lm_tensor *places;
    size_t place_count;
    loglin_matrix_id id;
    size_t rows, columns;
} matrix_upload;

static loglin_status write_portions(const upload *up, const matrix_upload *what, cl_mem mem, size_t portion_blocks,
                                    void *row_buffer, void *portion) {
    const size_t block_bytes = what->columns * LOGLIN_BLOCK * element_size(up->model);
    const size_t blocks = what->rows / LOGLIN_BLOCK;
    for (size_t block = 0; block < blocks; block += portion_blocks) {
        const size_t count = blocks - block < portion_blocks ? blocks - block : portion_blocks;
        memset(portion, 0, count * block_bytes);
        for (size_t i = 0; i < what->place_count; i++) {
            const loglin_lm_tensor *place = &what->places[i];
            if (place->is_matrix && place->matrix == what->id) {
                const loglin_tensor *tensor = loglin_checkpoint_find(up->checkpoint, place->name);
                place_tensor(up->model, tensor, place, block * LOGLIN_BLOCK, (block + count) * LOGLIN_BLOCK, row_buffer,
                             portion);
            }
        }
        RETURN_IF_CL_ERROR(clEnqueueWriteBuffer(up->queue, mem, CL_TRUE, block * block_bytes, count * block_bytes,
                                                portion, 0, NULL, NULL));
    }
    return LOGLIN_OK;
}

/* Bytes of a matrix on the device. */
static size_t matrix_bytes(const loglin_model *model, loglin_matrix_id id) {
    size_t rows = 0;
    size_t columns = 0;
    loglin_lm_matrix_shape(&model->lm, id, &rows, &columns);
    return loglin_whole_blocks(rows) * columns * element_size(model);
}

static loglin_status upload_matrix(const upload *up, const loglin_lm_tensor *places, size_t place_count,
                                   loglin_matrix_id id, cl_mem mem) {
    matrix_upload what = {.places = places, .place_count = place_count, .id = id};
    loglin_lm_matrix_shape(&up->model->lm, id, &what.rows, &what.columns);
    what.rows = loglin_whole_blocks(what.rows);
    const size_t block_bytes = what.columns * LOGLIN_BLOCK * element_size(up->model);
    const size_t portion_blocks = block_bytes > PORTION ? 1 : PORTION / block_bytes;
    void *row_buffer = malloc(what.columns * sizeof(float));
    void *portion = malloc(portion_blocks * block_bytes);
    const loglin_status status = row_buffer == NULL || portion == NULL
                                     ? loglin_fail(LOGLIN_OUT_OF_MEMORY, "%s: out of memory", places[0].name)
                                     : write_portions(up, &what, mem, portion_blocks, row_buffer, portion);
    free(row_buffer);
    free(portion);
    return status;
}

/* ---- Vectors ---------------------------------------------------------------------------------------------------- */

/* Rearranges a tensor's values, `repeat` times each and `tile` times all; the taps of a convolution channel by channel. */
static void place_vector(const loglin_lm *lm, const loglin_lm_tensor *place, const float *values, size_t count,
                         float *vector) {
    if (place->vector == LOGLIN_VECTOR_CONV) {
        for (size_t channel = 0; channel < place->shape[0]; channel++) {
            for (size_t tap = 0; tap < lm->conv_kernel; tap++) {
                vector[tap * lm->conv_channels + place->at + channel] = values[channel * lm->conv_kernel + tap];
            }
        }
        return;
    }
    size_t at = place->at;
    for (size_t tile = 0; tile < place->tile; tile++) {
        for (size_t i = 0; i < count; i++) {
            for (size_t repeat = 0; repeat < place->repeat; repeat++) {
                vector[at++] = place->vector == LOGLIN_VECTOR_A ? (float)-exp((double)values[i]) : values[i];
            }
        }
    }
}

static loglin_status read_vector(const upload *up, const loglin_lm_tensor *place, float *vector) {
    const loglin_tensor *tensor = loglin_checkpoint_find(up->checkpoint, place->name);
    const size_t count = loglin_tensor_count(tensor);
    float *values = malloc(count * sizeof *values);
    if (values == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "%s: out of memory", place->name);
    }
    loglin_tensor_to_float(tensor->dtype, tensor->data, count, values);
    place_vector(&up->model->lm, place, values, count, vector);
    free(values);
    return LOGLIN_OK;
}

static loglin_status upload_floats(const upload *up, const char *name, const float *values, size_t count, cl_mem *mem) {
    RETURN_IF_ERROR(create_buffer(up, name, count * sizeof *values, mem));
    RETURN_IF_CL_ERROR(
        clEnqueueWriteBuffer(up->queue, *mem, CL_TRUE, 0, count * sizeof *values, values, 0, NULL, NULL));
    return LOGLIN_OK;
}

/* Sets the offsets of a layer's vectors; how many floats they take.  A kernel may read a block beyond a vector's end. */
static size_t place_vectors(loglin_model *model) {
    size_t at = 0;
    for (size_t id = 0; id < LOGLIN_LAYER_VECTORS; id++) {
        model->vector_at[id] = at;
        at += loglin_whole_blocks(loglin_lm_vector_size(&model->lm, (loglin_vector_id)id)) + LOGLIN_BLOCK;
    }
    return at;
}

static loglin_status upload_layer_vectors(const upload *up, const loglin_lm_tensor *places, size_t count, size_t floats,
                                          cl_mem mem) {
    float *vectors = calloc(floats, sizeof *vectors);
    if (vectors == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "%s: out of memory", places[0].name);
    }
    loglin_status status = LOGLIN_OK;
    for (size_t i = 0; i < count && status == LOGLIN_OK; i++) {
        if (!places[i].is_matrix) {
            status = read_vector(up, &places[i], vectors + up->model->vector_at[places[i].vector]);
        }
    }
    if (status == LOGLIN_OK) {
        const cl_int code =
            clEnqueueWriteBuffer(up->queue, mem, CL_TRUE, 0, floats * sizeof *vectors, vectors, 0, NULL, NULL);
        status = code == CL_SUCCESS ? LOGLIN_OK : loglin_fail(code, "%s: %s", places[0].name, loglin_strerror(code));
    }
    free(vectors);
    return status;
}

/* ---- The whole -------------------------------------------------------------------------------------------------- */

static void count_parameters(const upload *up, const loglin_lm_tensor *places, size_t count) {
    for (size_t i = 0; i < count; i++) {
        const loglin_tensor *tensor = loglin_checkpoint_find(up->checkpoint, places[i].name);
        up->model->parameters += loglin_tensor_count(tensor);
        loglin_checkpoint_forget(tensor);
    }
}

/* The buffers of all layers; how many floats the vectors of one take. */
static loglin_status create_layers(const upload *up, size_t *floats) {
    loglin_model *model = up->model;
    const size_t layers = model->lm.layers;
    for (size_t id = 0; id < LOGLIN_LAYER_MATRICES; id++) {
        const size_t bytes = matrix_bytes(model, (loglin_matrix_id)id);
        RETURN_IF_ERROR(loglin_layer_buffers_create(model->device, "the weights", CL_MEM_READ_ONLY, bytes, layers,
                                                    &model->layers[0].matrices[id], sizeof *model->layers,
                                                    &model->matrices[id]));
        model->weight_bytes += layers * bytes;
    }
    *floats = place_vectors(model);
    model->weight_bytes += layers * *floats * sizeof(float);
    return loglin_layer_buffers_create(model->device, "the vectors", CL_MEM_READ_ONLY, *floats * sizeof(float), layers,
                                       &model->layers[0].vectors, sizeof *model->layers, &model->vectors);
}

static loglin_status upload_layer(const upload *up, size_t index, size_t floats) {
    loglin_lm_tensor places[LOGLIN_LM_MAX_LAYER_TENSORS];
    const size_t count = loglin_lm_layer_tensors(&up->model->lm, index, places);
    loglin_layer *layer = &up->model->layers[index];
    for (size_t id = 0; id < LOGLIN_LAYER_MATRICES; id++) {
        RETURN_IF_ERROR(upload_matrix(up, places, count, (loglin_matrix_id)id, layer->matrices[id]));
    }
    RETURN_IF_ERROR(upload_layer_vectors(up, places, count, floats, layer->vectors));
    count_parameters(up, places, count);
    return LOGLIN_OK;
}

static loglin_status upload_final_vectors(const upload *up, const loglin_lm_tensor *norm) {
    const size_t hidden = loglin_whole_blocks(up->model->lm.hidden) + LOGLIN_BLOCK;
    const size_t vocabulary = loglin_whole_blocks(up->model->lm.vocabulary);
    const size_t room = hidden > vocabulary ? hidden : vocabulary;
    float *values = calloc(room, sizeof *values);
    if (values == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "%s: out of memory", norm->name);
    }
    loglin_status status = upload_floats(up, "the zero bias", values, room, &up->model->no_bias);
    if (status == LOGLIN_OK) {
        status = read_vector(up, norm, values);
    }
    if (status == LOGLIN_OK) {
        status = upload_floats(up, norm->name, values, hidden, &up->model->final_norm);
    }
    free(values);
    return status;
}

static loglin_status upload_outer(const upload *up) {
    loglin_lm_tensor places[LOGLIN_LM_MODEL_TENSORS];
    loglin_model *model = up->model;
    const size_t count = loglin_lm_model_tensors(&model->lm, places);
    RETURN_IF_ERROR(create_buffer(up, places[0].name, matrix_bytes(model, LOGLIN_MATRIX_EMBEDDING), &model->embedding));
    RETURN_IF_ERROR(upload_matrix(up, places, count, LOGLIN_MATRIX_EMBEDDING, model->embedding));
    RETURN_IF_ERROR(upload_final_vectors(up, &places[1]));
    if (model->lm.tied) {
        RETURN_IF_CL_ERROR(clRetainMemObject(model->embedding));
        model->head = model->embedding;
    } else {
        RETURN_IF_ERROR(create_buffer(up, places[2].name, matrix_bytes(model, LOGLIN_MATRIX_HEAD), &model->head));
        RETURN_IF_ERROR(upload_matrix(up, places + 2, 1, LOGLIN_MATRIX_HEAD, model->head));
    }
    count_parameters(up, places, count);
    return LOGLIN_OK;
}

/* The type that all matrices have, else LOGLIN_F32. */
static loglin_dtype common_dtype(const loglin_checkpoint *checkpoint) {
    const loglin_tensor *first = NULL;
    for (size_t i = 0; i < loglin_checkpoint_count(checkpoint); i++) {
        const loglin_tensor *tensor = loglin_checkpoint_at(checkpoint, i);
        const size_t length = strlen(tensor->name);
        if (tensor->rank == 2 && length > 7 && strcmp(tensor->name + length - 7, ".weight") == 0) {
            if (first != NULL && first->dtype != tensor->dtype) {
                return LOGLIN_F32;
            }
            first = tensor;
        }
    }
    if (first != NULL && first->dtype == LOGLIN_TENSOR_F16) {
        return LOGLIN_F16;
    }
    return first != NULL && first->dtype == LOGLIN_TENSOR_BF16 ? LOGLIN_BF16 : LOGLIN_F32;
}

loglin_status loglin_model_upload(loglin_model *model, const loglin_checkpoint *checkpoint, cl_command_queue queue) {
    const upload up = {.model = model, .checkpoint = checkpoint, .queue = queue};
    model->matrix_dtype = common_dtype(checkpoint);
    size_t floats = 0;
    RETURN_IF_ERROR(upload_outer(&up));
    RETURN_IF_ERROR(create_layers(&up, &floats));
    for (size_t layer = 0; layer < model->lm.layers; layer++) {
        RETURN_IF_ERROR(upload_layer(&up, layer, floats));
    }
    return LOGLIN_OK;
}
