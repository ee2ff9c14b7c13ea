/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Safetensors files: a JSON header that names tensors, then their bytes.
 *
 *     8 bytes     n, little-endian
 *     n bytes     {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ..., "__metadata__": {...}}
 *     the rest    the data, every byte of it in exactly one tensor
 *
 * A file is hostile until it is open: loglin_safetensors_open checks the whole header, so a tensor's shape, size and
 * data can be relied on.  Files are mapped, not read: data shares the page cache and costs no memory of its own;
 * the file must not be shortened while it is open.
 */
#ifndef LOGLIN_TENSORFILE_SAFETENSORS_H
#define LOGLIN_TENSORFILE_SAFETENSORS_H

#include "tensorfile/dtype.h"

#define LOGLIN_TENSOR_MAX_RANK 8

typedef struct loglin_tensor {
    const char *name; /* UTF-8, not empty */
    loglin_tensor_dtype dtype;
    size_t rank;
    size_t shape[LOGLIN_TENSOR_MAX_RANK];
    const void *data; /* of a read tensor: may be unaligned, so copy elements out of it */
    size_t size;      /* bytes: the product of the shape times the dtype's size */
} loglin_tensor;

typedef struct loglin_tensor_metadata {
    const char *key, *value;
} loglin_tensor_metadata;

/* What went wrong: which tensor or file, what it was, what was expected. */
typedef struct loglin_tensor_error {
    char text[512];
} loglin_tensor_error;

/* An open file.  Read-only, so it may be shared by threads. */
typedef struct loglin_safetensors loglin_safetensors;

/* Maps a file and checks its header; false, with `error` filled in, if it cannot be read or is malformed. */
bool loglin_safetensors_open(const char *path, loglin_safetensors **file, loglin_tensor_error *error);

/* The same for a file's bytes in memory, which must outlive `file`. */
bool loglin_safetensors_parse(const void *bytes, size_t size, loglin_safetensors **file, loglin_tensor_error *error);

/* Tensors and metadata of the file end with it.  NULL is allowed. */
void loglin_safetensors_close(loglin_safetensors *file);

/* Tensors, in the order of their names. */
size_t loglin_safetensors_count(const loglin_safetensors *file);
const loglin_tensor *loglin_safetensors_at(const loglin_safetensors *file, size_t index);

/* NULL if there is none of that name. */
const loglin_tensor *loglin_safetensors_find(const loglin_safetensors *file, const char *name);

/* The value of a key of __metadata__; NULL if there is none. */
const char *loglin_safetensors_metadata(const loglin_safetensors *file, const char *key);

/* Elements of a tensor. */
size_t loglin_tensor_count(const loglin_tensor *tensor);

/* A shape for a message, "[2, 3]", in whole with LOGLIN_TENSOR_SHAPE_TEXT bytes of room. */
enum { LOGLIN_TENSOR_SHAPE_TEXT = 22 * LOGLIN_TENSOR_MAX_RANK + 3 };
void loglin_tensor_print_shape(size_t rank, const size_t *shape, char *text, size_t capacity);

/*
 * The name to rename a file to that is to replace `path`: where links lead, or a link itself would be replaced.  For the
 * caller to free; NULL, with errno, if a link leads nowhere or memory ran out.
 */
char *loglin_follow_links(const char *path);

/*
 * Writes a file: to a temporary one beside it, which then takes its name.  On failure false, and `path` is as it was.
 * Data is aligned to its element size.
 */
bool loglin_safetensors_write(const char *path, const loglin_tensor *tensors, size_t count,
                              const loglin_tensor_metadata *metadata, size_t metadata_count,
                              loglin_tensor_error *error);

/* Whether a file can be written there as things stand, so that this need not be found out after a long computation. */
bool loglin_safetensors_can_write(const char *path, loglin_tensor_error *error);

#endif
