/* SPDX-License-Identifier: Apache-2.0 */
/* Opening a folder: nothing in it is believed before it is checked. */
#define _DEFAULT_SOURCE /* madvise; NOLINT(bugprone-reserved-identifier,cert-dcl37-c,cert-dcl51-cpp) */
#include "model/checkpoint.h"

#include "model/config.h"
#include "runtime/status.h"
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_CONFIG_SIZE = 1 << 20, MAX_INDEX_SIZE = 1 << 26, MAX_SHARDS = 4096 };

struct loglin_checkpoint {
    char *folder;
    loglin_safetensors **files;
    size_t file_count;
    const loglin_tensor **tensors; /* sorted by name */
    size_t tensor_count;
};

/* ---- Small files ------------------------------------------------------------------------------------------------ */

/* A folder's file, to be freed; NULL if memory ran out. */
static char *join(const char *folder, const char *name) {
    const size_t size = strlen(folder) + strlen(name) + 2;
    char *path = malloc(size);
    if (path != NULL) {
        (void)snprintf(path, size, "%s/%s", folder, name);
    }
    return path;
}

static loglin_status read_descriptor(int descriptor, const char *path, size_t max_size, char **text, size_t *size) {
    struct stat status;
    if (fstat(descriptor, &status) != 0) {
        return loglin_fail(LOGLIN_IO, "%s: %s", path, strerror(errno));
    }
    if (!S_ISREG(status.st_mode)) {
        return loglin_fail(LOGLIN_BAD_FILE, "%s is not a regular file", path);
    }
    if (status.st_size < 0 || (uint64_t)status.st_size > max_size) {
        return loglin_fail(LOGLIN_BAD_FILE, "%s has %lld bytes, expected at most %zu", path, (long long)status.st_size,
                           max_size);
    }
    *text = malloc((size_t)status.st_size + 1);
    if (*text == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "%s: out of memory", path);
    }
    *size = 0;
    while (*size < (size_t)status.st_size) {
        const ssize_t got = read(descriptor, *text + *size, (size_t)status.st_size - *size);
        if (got == 0 || (got < 0 && errno != EINTR)) {
            free(*text);
            *text = NULL;
            return loglin_fail(LOGLIN_IO, "%s: %s", path, got == 0 ? "the file was shortened" : strerror(errno));
        }
        *size += got > 0 ? (size_t)got : 0;
    }
    return LOGLIN_OK;
}

static loglin_status read_text(const char *path, size_t max_size, char **text, size_t *size) {
    const int descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor < 0) {
        return loglin_fail(LOGLIN_IO, "%s: %s", path, strerror(errno));
    }
    const loglin_status status = read_descriptor(descriptor, path, max_size, text, size);
    (void)close(descriptor);
    return status;
}

/* ---- The index of shards ---------------------------------------------------------------------------------------- */

static int compare_strings(const void *left, const void *right) {
    return strcmp(*(char *const *)left, *(char *const *)right);
}

/* A name in the folder itself. */
static bool is_plain_name(const char *name) {
    static const char extension[] = ".safetensors";
    const size_t length = strlen(name);
    return length > strlen(extension) && length <= NAME_MAX && name[0] != '.' && strchr(name, '/') == NULL &&
           strchr(name, '\\') == NULL && strcmp(name + length - strlen(extension), extension) == 0;
}

/* Copies the names of a weight_map, sorts them and keeps each once. */
static loglin_status collect_names(const char *path, json_t *map, loglin_shard_names *shards) {
    const char *tensor;
    json_t *entry;
    json_object_foreach(map, tensor, entry) {
        const char *name = json_string_value(entry);
        if (name == NULL || !is_plain_name(name)) {
            return loglin_fail(LOGLIN_BAD_FILE,
                               "%s: weight_map[\"%.128s\"] is \"%.128s\", expected the name of a .safetensors file "
                               "beside it, without folder",
                               path, tensor, name != NULL ? name : "not a string");
        }
        shards->names[shards->count] = strdup(name);
        if (shards->names[shards->count] == NULL) {
            return loglin_fail(LOGLIN_OUT_OF_MEMORY, "%s: out of memory", path);
        }
        shards->count++;
    }
    qsort(shards->names, shards->count, sizeof *shards->names, compare_strings);
    size_t kept = 0;
    for (size_t i = 0; i < shards->count; i++) {
        if (kept > 0 && strcmp(shards->names[kept - 1], shards->names[i]) == 0) {
            free(shards->names[i]);
        } else {
            shards->names[kept++] = shards->names[i];
        }
    }
    shards->count = kept;
    if (kept > MAX_SHARDS) {
        return loglin_fail(LOGLIN_BAD_FILE, "%s names %zu files, expected at most %d", path, kept, MAX_SHARDS);
    }
    return LOGLIN_OK;
}

loglin_status loglin_shard_names_parse(const char *path, const char *text, size_t size, loglin_shard_names *shards) {
    *shards = (loglin_shard_names){0};
    loglin_config config;
    RETURN_IF_ERROR(loglin_config_parse(path, text, size, &config));
    json_t *map = json_object_get(config.root, "weight_map");
    loglin_status status = LOGLIN_OK;
    if (json_object_size(map) == 0) {
        status = loglin_fail(LOGLIN_BAD_FILE, "%s: weight_map is missing or empty, expected an object", path);
    } else {
        shards->names = calloc(json_object_size(map), sizeof *shards->names);
        status = shards->names == NULL ? loglin_fail(LOGLIN_OUT_OF_MEMORY, "%s: out of memory", path)
                                       : collect_names(path, map, shards);
        shards->map = json_incref(map);
    }
    if (status != LOGLIN_OK) {
        loglin_shard_names_free(shards);
    }
    loglin_config_free(&config);
    return status;
}

void loglin_shard_names_free(loglin_shard_names *shards) {
    for (size_t i = 0; i < shards->count; i++) {
        free(shards->names[i]);
    }
    free(shards->names);
    json_decref(shards->map);
    *shards = (loglin_shard_names){0};
}

/* ---- Opening ---------------------------------------------------------------------------------------------------- */

static loglin_status open_file(loglin_checkpoint *checkpoint, const char *name) {
    loglin_tensor_error error;
    char *path = join(checkpoint->folder, name);
    if (path == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "%s: out of memory", name);
    }
    loglin_status status = LOGLIN_OK;
    if (access(path, R_OK) != 0) {
        status = loglin_fail(LOGLIN_IO, "%s: %s", path, strerror(errno));
    } else if (!loglin_safetensors_open(path, &checkpoint->files[checkpoint->file_count], &error)) {
        status = loglin_fail(LOGLIN_BAD_FILE, "%s: %s", path, error.text);
    } else {
        checkpoint->file_count++;
    }
    free(path);
    return status;
}

static loglin_status open_files(loglin_checkpoint *checkpoint, char *const *names, size_t count) {
    checkpoint->files = calloc(count, sizeof(loglin_safetensors *));
    if (checkpoint->files == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "%s: out of memory", checkpoint->folder);
    }
    for (size_t i = 0; i < count; i++) {
        RETURN_IF_ERROR(open_file(checkpoint, names[i]));
    }
    return LOGLIN_OK;
}

/* Every tensor of an index is in the file that it names. */
static loglin_status check_mapped(const loglin_checkpoint *checkpoint, const char *index,
                                  const loglin_shard_names *shards) {
    const char *tensor;
    json_t *entry;
    json_object_foreach(shards->map, tensor, entry) {
        const char *name = json_string_value(entry);
        char *const *found = bsearch(&name, shards->names, shards->count, sizeof *shards->names, compare_strings);
        if (loglin_safetensors_find(checkpoint->files[found - shards->names], tensor) == NULL) {
            return loglin_fail(LOGLIN_BAD_FILE, "%s: weight_map[\"%.128s\"] is \"%.128s\", which has no such tensor",
                               index, tensor, name);
        }
    }
    return LOGLIN_OK;
}

/* Every tensor of the files is in the index. */
static loglin_status check_unmapped(const loglin_checkpoint *checkpoint, const char *index,
                                    const loglin_shard_names *shards) {
    for (size_t i = 0; i < checkpoint->file_count; i++) {
        for (size_t j = 0; j < loglin_safetensors_count(checkpoint->files[i]); j++) {
            const char *tensor = loglin_safetensors_at(checkpoint->files[i], j)->name;
            if (json_object_get(shards->map, tensor) == NULL) {
                return loglin_fail(LOGLIN_BAD_FILE, "%s: weight_map has no entry for tensor \"%.128s\" of \"%.128s\"",
                                   index, tensor, shards->names[i]);
            }
        }
    }
    return LOGLIN_OK;
}

static loglin_status open_named(loglin_checkpoint *checkpoint, const char *index, const loglin_shard_names *shards) {
    RETURN_IF_ERROR(open_files(checkpoint, shards->names, shards->count));
    RETURN_IF_ERROR(check_mapped(checkpoint, index, shards));
    return check_unmapped(checkpoint, index, shards);
}

static loglin_status open_shards(loglin_checkpoint *checkpoint, const char *index) {
    char *text = NULL;
    size_t size = 0;
    loglin_shard_names shards;
    RETURN_IF_ERROR(read_text(index, MAX_INDEX_SIZE, &text, &size));
    loglin_status status = loglin_shard_names_parse(index, text, size, &shards);
    free(text);
    RETURN_IF_ERROR(status);
    status = open_named(checkpoint, index, &shards);
    loglin_shard_names_free(&shards);
    return status;
}

/* One file if it is there, else the shards of the index. */
static loglin_status open_tensor_files(loglin_checkpoint *checkpoint) {
    char single[] = "model.safetensors";
    char *names[] = {single};
    char *path = join(checkpoint->folder, single);
    char *index = join(checkpoint->folder, "model.safetensors.index.json");
    loglin_status status = LOGLIN_OK;
    if (path == NULL || index == NULL) {
        status = loglin_fail(LOGLIN_OUT_OF_MEMORY, "%s: out of memory", checkpoint->folder);
    } else if (access(path, F_OK) != 0 && access(index, F_OK) == 0) {
        status = open_shards(checkpoint, index);
    } else {
        status = open_files(checkpoint, names, 1);
    }
    free(path);
    free(index);
    return status;
}

static int compare_tensors(const void *left, const void *right) {
    const loglin_tensor *const *a = left;
    const loglin_tensor *const *b = right;
    return strcmp((*a)->name, (*b)->name);
}

static loglin_status sort_tensors(loglin_checkpoint *checkpoint) {
    size_t count = 0;
    for (size_t i = 0; i < checkpoint->file_count; i++) {
        count += loglin_safetensors_count(checkpoint->files[i]);
    }
    checkpoint->tensors = calloc(count + 1, sizeof(loglin_tensor *));
    if (checkpoint->tensors == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "%s: out of memory", checkpoint->folder);
    }
    for (size_t i = 0; i < checkpoint->file_count; i++) {
        for (size_t j = 0; j < loglin_safetensors_count(checkpoint->files[i]); j++) {
            checkpoint->tensors[checkpoint->tensor_count++] = loglin_safetensors_at(checkpoint->files[i], j);
        }
    }
    qsort(checkpoint->tensors, count, sizeof(loglin_tensor *), compare_tensors);
    for (size_t i = 1; i < count; i++) {
        if (strcmp(checkpoint->tensors[i - 1]->name, checkpoint->tensors[i]->name) == 0) {
            return loglin_fail(LOGLIN_BAD_FILE, "%s: tensor \"%.128s\" is in two files", checkpoint->folder,
                               checkpoint->tensors[i]->name);
        }
    }
    return LOGLIN_OK;
}

static loglin_status open_folder(loglin_checkpoint *checkpoint, const char *folder) {
    checkpoint->folder = strdup(folder);
    if (checkpoint->folder == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "%s: out of memory", folder);
    }
    RETURN_IF_ERROR(open_tensor_files(checkpoint));
    return sort_tensors(checkpoint);
}

loglin_status loglin_checkpoint_open(const char *folder, loglin_checkpoint **checkpoint) {
    *checkpoint = NULL;
    loglin_checkpoint *opened = calloc(1, sizeof *opened);
    if (opened == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "%s: out of memory", folder);
    }
    const loglin_status status = open_folder(opened, folder);
    if (status != LOGLIN_OK) {
        loglin_checkpoint_close(opened);
        return status;
    }
    *checkpoint = opened;
    return LOGLIN_OK;
}

void loglin_checkpoint_close(loglin_checkpoint *checkpoint) {
    if (checkpoint == NULL) {
        return;
    }
    for (size_t i = 0; i < checkpoint->file_count; i++) {
        loglin_safetensors_close(checkpoint->files[i]);
    }
    free(checkpoint->files);
    free(checkpoint->tensors);
    free(checkpoint->folder);
    free(checkpoint);
}

size_t loglin_checkpoint_count(const loglin_checkpoint *checkpoint) {
    return checkpoint->tensor_count;
}

const loglin_tensor *loglin_checkpoint_at(const loglin_checkpoint *checkpoint, size_t index) {
    return checkpoint->tensors[index];
}

const loglin_tensor *loglin_checkpoint_find(const loglin_checkpoint *checkpoint, const char *name) {
    const loglin_tensor tensor = {.name = name};
    const loglin_tensor *key = &tensor;
    const loglin_tensor **found =
        bsearch(&key, checkpoint->tensors, checkpoint->tensor_count, sizeof(loglin_tensor *), compare_tensors);
    return found != NULL ? *found : NULL;
}

/* ---- Checking --------------------------------------------------------------------------------------------------- */

static loglin_status find_tensor(const loglin_checkpoint *checkpoint, const char *name, const loglin_tensor **tensor) {
    *tensor = loglin_checkpoint_find(checkpoint, name);
    if (*tensor == NULL) {
        return loglin_fail(LOGLIN_BAD_FILE, "%s: tensor \"%s\" is missing", checkpoint->folder, name);
    }
    return LOGLIN_OK;
}

static loglin_status check_shape(const loglin_checkpoint *checkpoint, const loglin_tensor *tensor, size_t rank,
                                 const size_t *shape) {
    if (tensor->rank == rank && memcmp(tensor->shape, shape, rank * sizeof *shape) == 0) {
        return LOGLIN_OK;
    }
    char is[LOGLIN_TENSOR_SHAPE_TEXT];
    char expected[LOGLIN_TENSOR_SHAPE_TEXT];
    loglin_tensor_print_shape(tensor->rank, tensor->shape, is, sizeof is);
    loglin_tensor_print_shape(rank, shape, expected, sizeof expected);
    return loglin_fail(LOGLIN_BAD_FILE, "%s: tensor \"%s\" is %s, expected %s", checkpoint->folder, tensor->name, is,
                       expected);
}

/* Index of the first value that is not finite; count if there is none. */
static size_t find_not_finite(const loglin_tensor *tensor) {
    const size_t count = loglin_tensor_count(tensor);
    const unsigned char *bytes = tensor->data;
    if (tensor->dtype == LOGLIN_TENSOR_F32) {
        for (size_t i = 0; i < count; i++) {
            uint32_t bits;
            memcpy(&bits, bytes + i * sizeof bits, sizeof bits);
            if ((bits & 0x7f800000U) == 0x7f800000U) {
                return i;
            }
        }
        return count;
    }
    const unsigned exponent = tensor->dtype == LOGLIN_TENSOR_F16 ? 0x7c00U : 0x7f80U;
    for (size_t i = 0; i < count; i++) {
        uint16_t bits;
        memcpy(&bits, bytes + i * sizeof bits, sizeof bits);
        if ((bits & exponent) == exponent) {
            return i;
        }
    }
    return count;
}

void loglin_checkpoint_forget(const loglin_tensor *tensor) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    const unsigned char *data = tensor->data;
    const size_t skip = (page - (uintptr_t)data % page) % page; /* to the first page that is all the tensor's */
    if (tensor->size >= skip + page) {
        (void)madvise((void *)(data + skip), (tensor->size - skip) / page * page, MADV_DONTNEED);
    }
}

static loglin_status check_tensor(const loglin_checkpoint *checkpoint, const loglin_lm_tensor *expected) {
    const loglin_tensor *tensor = NULL;
    RETURN_IF_ERROR(find_tensor(checkpoint, expected->name, &tensor));
    RETURN_IF_ERROR(check_shape(checkpoint, tensor, expected->rank, expected->shape));
    if (tensor->dtype != LOGLIN_TENSOR_F32 && tensor->dtype != LOGLIN_TENSOR_F16 &&
        tensor->dtype != LOGLIN_TENSOR_BF16) {
        return loglin_fail(LOGLIN_BAD_FILE, "%s: tensor \"%s\" is %s, expected F32, F16 or BF16", checkpoint->folder,
                           tensor->name, loglin_tensor_dtype_name(tensor->dtype));
    }
    const size_t bad = find_not_finite(tensor);
    loglin_checkpoint_forget(tensor);
    if (bad < loglin_tensor_count(tensor)) {
        return loglin_fail(LOGLIN_BAD_FILE, "%s: tensor \"%s\": value %zu is not finite", checkpoint->folder,
                           tensor->name, bad);
    }
    return LOGLIN_OK;
}

/* The number of levels, and the width of the MLP where the config does not say it. */
static loglin_status complete(const loglin_checkpoint *checkpoint, loglin_lm *lm) {
    char name[160];
    char is[LOGLIN_TENSOR_SHAPE_TEXT];
    const loglin_tensor *tensor = NULL;
    loglin_lm_level_tensor_name(lm, name, sizeof name);
    RETURN_IF_ERROR(find_tensor(checkpoint, name, &tensor));
    if (tensor->rank != 2 || tensor->shape[0] != lm->heads || tensor->shape[1] < 1 ||
        tensor->shape[1] > LOGLIN_MAX_LEVELS - 1) {
        loglin_tensor_print_shape(tensor->rank, tensor->shape, is, sizeof is);
        return loglin_fail(LOGLIN_BAD_FILE, "%s: tensor \"%s\" is %s, expected [%zu, levels] with 1 to %d levels",
                           checkpoint->folder, name, is, lm->heads, LOGLIN_MAX_LEVELS - 1);
    }
    lm->levels = tensor->shape[1];
    if (lm->intermediate == 0) {
        loglin_lm_gate_tensor_name(lm, name, sizeof name);
        RETURN_IF_ERROR(find_tensor(checkpoint, name, &tensor));
        if (tensor->rank != 2 || tensor->shape[0] < 1 || tensor->shape[0] > 1048576) {
            loglin_tensor_print_shape(tensor->rank, tensor->shape, is, sizeof is);
            return loglin_fail(LOGLIN_BAD_FILE, "%s: tensor \"%s\" is %s, expected [1 to 1048576, hidden_size]",
                               checkpoint->folder, name, is);
        }
        lm->intermediate = tensor->shape[0];
    }
    return LOGLIN_OK;
}

static void mark_used(const loglin_checkpoint *checkpoint, const char *name, bool *used) {
    const loglin_tensor tensor = {.name = name};
    const loglin_tensor *key = &tensor;
    const loglin_tensor **found =
        bsearch(&key, checkpoint->tensors, checkpoint->tensor_count, sizeof(loglin_tensor *), compare_tensors);
    if (found != NULL) {
        used[found - checkpoint->tensors] = true;
    }
}

static loglin_status check_tensors(const loglin_checkpoint *checkpoint, const loglin_lm_tensor *tensors, size_t count,
                                   bool *used) {
    for (size_t i = 0; i < count; i++) {
        RETURN_IF_ERROR(check_tensor(checkpoint, &tensors[i]));
        mark_used(checkpoint, tensors[i].name, used);
    }
    return LOGLIN_OK;
}

static loglin_status check_all(const loglin_checkpoint *checkpoint, const loglin_lm *lm, bool *used) {
    loglin_lm_tensor tensors[LOGLIN_LM_MAX_LAYER_TENSORS];
    RETURN_IF_ERROR(check_tensors(checkpoint, tensors, loglin_lm_model_tensors(lm, tensors), used));
    for (size_t layer = 0; layer < lm->layers; layer++) {
        RETURN_IF_ERROR(check_tensors(checkpoint, tensors, loglin_lm_layer_tensors(lm, layer, tensors), used));
    }
    for (size_t i = 0; i < checkpoint->tensor_count; i++) {
        if (!used[i]) {
            return loglin_fail(LOGLIN_BAD_FILE, "%s: tensor \"%.128s\" is not one that the config asks for",
                               checkpoint->folder, checkpoint->tensors[i]->name);
        }
    }
    return LOGLIN_OK;
}

static loglin_status read_config(const loglin_checkpoint *checkpoint, loglin_lm *lm) {
    char *text = NULL;
    size_t size = 0;
    char *path = join(checkpoint->folder, "config.json");
    if (path == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "%s: out of memory", checkpoint->folder);
    }
    loglin_status status = read_text(path, MAX_CONFIG_SIZE, &text, &size);
    if (status == LOGLIN_OK) {
        status = loglin_lm_parse(path, text, size, lm);
        free(text);
    }
    free(path);
    return status;
}

loglin_status loglin_checkpoint_describe(const loglin_checkpoint *checkpoint, loglin_lm *lm) {
    RETURN_IF_ERROR(read_config(checkpoint, lm));
    RETURN_IF_ERROR(complete(checkpoint, lm));
    bool *used = calloc(checkpoint->tensor_count + 1, sizeof *used);
    if (used == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "%s: out of memory", checkpoint->folder);
    }
    const loglin_status status = check_all(checkpoint, lm, used);
    free(used);
    return status;
}
