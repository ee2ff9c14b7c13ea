/* SPDX-License-Identifier: Apache-2.0 */
/* A session's states as a safetensors file; reading checks everything before it changes anything. */
#include "model/session.h"

#include "runtime/status.h"
#include "tensorfile/safetensors.h"
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char format_name[] = "loglin-session";
static const char format_version[] = "1";

/* One array of the states: its tensor, and its place on the device. */
typedef struct state_array {
    char name[32];
    loglin_tensor_dtype dtype;
    size_t rank, shape[5], size; /* size in bytes */
    cl_mem mem;
} state_array;

enum { ARRAYS_OF_LAYER = 3 };

static state_array describe_array(const char *kind, size_t layer, cl_mem mem, size_t rank, const size_t *shape) {
    state_array array = {.dtype = LOGLIN_TENSOR_F32, .rank = rank, .size = sizeof(float), .mem = mem};
    (void)snprintf(array.name, sizeof array.name, "%s.%zu", kind, layer);
    for (size_t i = 0; i < rank; i++) {
        array.shape[i] = shape[i];
        array.size *= shape[i];
    }
    return array;
}

/* All arrays of floats, layer after layer: conv, values, log_decay.  How many. */
static size_t describe_arrays(const loglin_session *session, state_array *arrays) {
    const loglin_lm *lm = &session->model->lm;
    const size_t conv[] = {session->sequences, lm->conv_kernel - 1, lm->conv_channels};
    const size_t values[] = {session->sequences, lm->heads, lm->levels, lm->dim_k, lm->dim_v};
    size_t n = 0;
    for (size_t layer = 0; layer < lm->layers; layer++) {
        const loglin_layer_state *state = &session->layers[layer];
        arrays[n++] = describe_array("conv", layer, state->tails, 3, conv);
        arrays[n++] = describe_array("values", layer, state->values, 5, values);
        if (state->log_decay != NULL) {
            arrays[n++] = describe_array("log_decay", layer, state->log_decay, 3, values);
        }
    }
    return n;
}

/* ---- Saving ----------------------------------------------------------------------------------------------------- */

/* Does a level hold a key after so many tokens? */
static bool level_exists(size_t level, size_t tokens) {
    return tokens > 0 && (level == 0 || (((tokens - 1) >> (level - 1)) & 1) != 0);
}

/* Zeros the levels of [N, H, L, ...] that do not exist; `each` floats a level. */
static void clear_levels(const loglin_session *session, float *values, size_t each) {
    const loglin_lm *lm = &session->model->lm;
    for (size_t n = 0; n < session->sequences; n++) {
        for (size_t head = 0; head < lm->heads; head++) {
            for (size_t level = 0; level < lm->levels; level++) {
                if (!level_exists(level, session->positions[n])) {
                    memset(values + ((n * lm->heads + head) * lm->levels + level) * each, 0, each * sizeof *values);
                }
            }
        }
    }
}

static loglin_status read_array(const loglin_session *session, const state_array *array, loglin_tensor *tensor) {
    void *data = malloc(array->size + 1);
    if (data == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "%s: out of memory", array->name);
    }
    *tensor = (loglin_tensor){
        .name = array->name, .dtype = array->dtype, .rank = array->rank, .data = data, .size = array->size};
    memcpy(tensor->shape, array->shape, sizeof array->shape);
    if (array->size > 0) {
        RETURN_IF_CL_ERROR(
            clEnqueueReadBuffer(session->queue, array->mem, CL_TRUE, 0, array->size, data, 0, NULL, NULL));
    }
    if (array->rank == 5) {
        clear_levels(session, data, array->shape[3] * array->shape[4]);
    } else if (strncmp(array->name, "log_decay", 9) == 0) {
        clear_levels(session, data, 1);
    }
    return LOGLIN_OK;
}

static loglin_status write_file(const char *path, const loglin_tensor *tensors, size_t count) {
    const loglin_tensor_metadata metadata[] = {{"format", format_name}, {"version", format_version}};
    loglin_tensor_error error;
    if (!loglin_safetensors_write(path, tensors, count, metadata, 2, &error)) {
        return loglin_fail(LOGLIN_IO, "%s: %s", path, error.text);
    }
    return LOGLIN_OK;
}

static loglin_status save(const loglin_session *session, const char *path, const state_array *arrays, size_t count,
                          loglin_tensor *tensors, int32_t *positions) {
    for (size_t i = 0; i < count; i++) {
        RETURN_IF_ERROR(read_array(session, &arrays[i], &tensors[i]));
    }
    for (size_t n = 0; n < session->sequences; n++) {
        positions[n] = (int32_t)session->positions[n];
    }
    tensors[count] = (loglin_tensor){.name = "position",
                                     .dtype = LOGLIN_TENSOR_I32,
                                     .rank = 1,
                                     .shape = {session->sequences},
                                     .data = positions,
                                     .size = session->sequences * sizeof *positions};
    return write_file(path, tensors, count + 1);
}

loglin_status loglin_session_save(loglin_session *session, const char *path) {
    if (session == NULL || path == NULL) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "%s is NULL", session == NULL ? "session" : "path");
    }
    const size_t room = session->model->lm.layers * ARRAYS_OF_LAYER + 1;
    state_array *arrays = calloc(room, sizeof *arrays);
    loglin_tensor *tensors = calloc(room, sizeof *tensors);
    int32_t *positions = calloc(session->sequences, sizeof *positions);
    size_t count = 0;
    loglin_status status = LOGLIN_OK;
    if (arrays == NULL || tensors == NULL || positions == NULL) {
        status = loglin_fail(LOGLIN_OUT_OF_MEMORY, "%s: out of memory", path);
    } else {
        count = describe_arrays(session, arrays);
        status = save(session, path, arrays, count, tensors, positions);
    }
    for (size_t i = 0; i < count; i++) {
        free((void *)tensors[i].data);
    }
    free(positions);
    free(tensors);
    free(arrays);
    return status;
}

/* ---- Loading ---------------------------------------------------------------------------------------------------- */

static loglin_status check_format(const char *path, const loglin_safetensors *file) {
    const char *format = loglin_safetensors_metadata(file, "format");
    const char *version = loglin_safetensors_metadata(file, "version");
    if (format == NULL || strcmp(format, format_name) != 0) {
        return loglin_fail(LOGLIN_BAD_FILE, "%s: format is \"%.64s\", expected \"%s\"", path,
                           format != NULL ? format : "", format_name);
    }
    if (version == NULL || strcmp(version, format_version) != 0) {
        return loglin_fail(LOGLIN_BAD_FILE, "%s: version is \"%.64s\", expected \"%s\"", path,
                           version != NULL ? version : "", format_version);
    }
    return LOGLIN_OK;
}

static loglin_status check_array(const char *path, const loglin_safetensors *file, const state_array *array) {
    const loglin_tensor *tensor = loglin_safetensors_find(file, array->name);
    if (tensor == NULL) {
        return loglin_fail(LOGLIN_BAD_FILE, "%s: tensor \"%s\" is missing", path, array->name);
    }
    if (tensor->dtype != array->dtype || tensor->rank != array->rank ||
        memcmp(tensor->shape, array->shape, array->rank * sizeof *array->shape) != 0) {
        char is[LOGLIN_TENSOR_SHAPE_TEXT];
        char expected[LOGLIN_TENSOR_SHAPE_TEXT];
        loglin_tensor_print_shape(tensor->rank, tensor->shape, is, sizeof is);
        loglin_tensor_print_shape(array->rank, array->shape, expected, sizeof expected);
        return loglin_fail(LOGLIN_BAD_FILE, "%s: tensor \"%s\" is %s %s, expected %s %s", path, array->name,
                           loglin_tensor_dtype_name(tensor->dtype), is, loglin_tensor_dtype_name(array->dtype),
                           expected);
    }
    for (size_t i = 0; tensor->dtype == LOGLIN_TENSOR_F32 && i < loglin_tensor_count(tensor); i++) {
        float value;
        memcpy(&value, (const char *)tensor->data + i * sizeof value, sizeof value);
        if (!isfinite(value)) {
            return loglin_fail(LOGLIN_BAD_FILE, "%s: tensor \"%s\": value %zu is not finite", path, array->name, i);
        }
    }
    return LOGLIN_OK;
}

static loglin_status read_positions(const loglin_session *session, const char *path, const loglin_safetensors *file,
                                    int32_t *positions) {
    const size_t max_length = loglin_lm_max_length(&session->model->lm);
    const state_array expected = {
        .name = "position", .dtype = LOGLIN_TENSOR_I32, .rank = 1, .shape = {session->sequences}};
    RETURN_IF_ERROR(check_array(path, file, &expected));
    memcpy(positions, loglin_safetensors_find(file, "position")->data, session->sequences * sizeof *positions);
    for (size_t n = 0; n < session->sequences; n++) {
        if (positions[n] < 0 || (size_t)positions[n] > max_length) {
            return loglin_fail(LOGLIN_BAD_FILE, "%s: tensor \"position\": value %zu is %d, expected 0 to %zu", path, n,
                               (int)positions[n], max_length);
        }
    }
    return LOGLIN_OK;
}

static loglin_status upload(loglin_session *session, const loglin_safetensors *file, const state_array *arrays,
                            size_t count, const int32_t *positions) {
    loglin_shared_step_dismiss(session);
    for (size_t i = 0; i < count; i++) {
        const loglin_tensor *tensor = loglin_safetensors_find(file, arrays[i].name);
        if (tensor->size > 0) {
            RETURN_IF_CL_ERROR(clEnqueueWriteBuffer(session->queue, arrays[i].mem, CL_TRUE, 0, tensor->size,
                                                    tensor->data, 0, NULL, NULL));
        }
    }
    for (size_t layer = 0; layer < session->model->lm.layers; layer++) {
        RETURN_IF_CL_ERROR(clEnqueueWriteBuffer(session->queue, session->layers[layer].position, CL_TRUE, 0,
                                                session->sequences * sizeof *positions, positions, 0, NULL, NULL));
    }
    for (size_t n = 0; n < session->sequences; n++) {
        session->positions[n] = (size_t)positions[n];
    }
    return LOGLIN_OK;
}

static loglin_status load(loglin_session *session, const char *path, const loglin_safetensors *file,
                          state_array *arrays, int32_t *positions) {
    const size_t count = describe_arrays(session, arrays);
    RETURN_IF_ERROR(check_format(path, file));
    RETURN_IF_ERROR(read_positions(session, path, file, positions));
    for (size_t i = 0; i < count; i++) {
        RETURN_IF_ERROR(check_array(path, file, &arrays[i]));
    }
    if (loglin_safetensors_count(file) != count + 1) {
        return loglin_fail(LOGLIN_BAD_FILE, "%s has %zu tensors, expected %zu", path, loglin_safetensors_count(file),
                           count + 1);
    }
    return upload(session, file, arrays, count, positions);
}

loglin_status loglin_session_load(loglin_session *session, const char *path) {
    if (session == NULL || path == NULL) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "%s is NULL", session == NULL ? "session" : "path");
    }
    if (access(path, R_OK) != 0) {
        return loglin_fail(LOGLIN_IO, "%s: %s", path, strerror(errno));
    }
    loglin_safetensors *file = NULL;
    loglin_tensor_error error;
    if (!loglin_safetensors_open(path, &file, &error)) {
        return loglin_fail(LOGLIN_BAD_FILE, "%s: %s", path, error.text);
    }
    state_array *arrays = calloc(session->model->lm.layers * ARRAYS_OF_LAYER, sizeof *arrays);
    int32_t *positions = calloc(session->sequences, sizeof *positions);
    const loglin_status status = arrays == NULL || positions == NULL
                                     ? loglin_fail(LOGLIN_OUT_OF_MEMORY, "%s: out of memory", path)
                                     : load(session, path, file, arrays, positions);
    free(positions);
    free(arrays);
    loglin_safetensors_close(file);
    return status;
}
