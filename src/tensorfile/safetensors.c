/* SPDX-License-Identifier: Apache-2.0 */
/* Reading: map, check the header against the file, keep pointers.  Writing: all or nothing, by a rename. */
#include "tensorfile/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PREFIX_SIZE = 8, MAX_HEADER_SIZE = 100000000 };

struct loglin_safetensors {
    json_t *header; /* owns the names and the metadata */
    loglin_tensor *tensors;
    size_t count;
    void *mapping; /* NULL if the bytes are the caller's */
    size_t mapping_size;
};

/* Always false, so that it can be returned.  Names in files may hold anything: control characters are replaced. */
__attribute__((format(printf, 2, 3))) static bool fail(loglin_tensor_error *error, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(error->text, sizeof error->text, format, arguments);
    va_end(arguments);
    for (char *c = error->text; *c != '\0'; ++c) {
        if ((unsigned char)*c < ' ' || *c == '\x7f') {
            *c = '?';
        }
    }
    return false;
}

static bool multiply(size_t a, size_t b, size_t *product) {
    return !__builtin_mul_overflow(a, b, product);
}

/* ---- Reading ---------------------------------------------------------------------------------------------------- */

static bool parse_dtype(const json_t *entry, loglin_tensor *tensor, loglin_tensor_error *error) {
    const char *name = json_string_value(json_object_get(entry, "dtype"));
    if (name == NULL) {
        return fail(error, "tensor \"%.128s\" has no dtype, expected a string", tensor->name);
    }
    if (!loglin_tensor_dtype_from_name(name, &tensor->dtype)) {
        return fail(error, "tensor \"%.128s\" has dtype \"%.32s\", expected F32, F16, BF16, I32 or I64", tensor->name,
                    name);
    }
    return true;
}

static bool parse_shape(const json_t *entry, loglin_tensor *tensor, loglin_tensor_error *error) {
    const json_t *shape = json_object_get(entry, "shape");
    if (!json_is_array(shape)) {
        return fail(error, "tensor \"%.128s\" has no shape, expected an array of sizes", tensor->name);
    }
    tensor->rank = json_array_size(shape);
    if (tensor->rank > LOGLIN_TENSOR_MAX_RANK) {
        return fail(error, "tensor \"%.128s\" has %zu dimensions, expected at most %d", tensor->name, tensor->rank,
                    LOGLIN_TENSOR_MAX_RANK);
    }
    tensor->size = loglin_tensor_dtype_size(tensor->dtype);
    bool fits = true;
    for (size_t i = 0; i < tensor->rank; ++i) {
        const json_t *extent = json_array_get(shape, i);
        if (!json_is_integer(extent) || json_integer_value(extent) < 0) {
            return fail(error, "tensor \"%.128s\": shape[%zu] is not an integer of 0 or more", tensor->name, i);
        }
        tensor->shape[i] = (size_t)json_integer_value(extent);
        fits = multiply(tensor->size, tensor->shape[i], &tensor->size) && fits;
    }
    if (!fits) {
        return fail(error, "tensor \"%.128s\": the size of its shape overflows", tensor->name);
    }
    return true;
}

static bool parse_offsets(const json_t *entry, const unsigned char *data, size_t data_size, loglin_tensor *tensor,
                          loglin_tensor_error *error) {
    const json_t *offsets = json_object_get(entry, "data_offsets");
    const json_t *first = json_array_get(offsets, 0);
    const json_t *last = json_array_get(offsets, 1);
    if (json_array_size(offsets) != 2 || !json_is_integer(first) || !json_is_integer(last) ||
        json_integer_value(first) < 0) {
        return fail(error, "tensor \"%.128s\": data_offsets is not [begin, end], two integers of 0 or more",
                    tensor->name);
    }
    const json_int_t begin = json_integer_value(first);
    const json_int_t end = json_integer_value(last);
    if (begin > end || (uint64_t)end > data_size) {
        return fail(error, "tensor \"%.128s\": data_offsets is [%lld, %lld], expected 0 <= begin <= end <= %zu",
                    tensor->name, (long long)begin, (long long)end, data_size);
    }
    if ((uint64_t)(end - begin) != tensor->size) {
        return fail(error, "tensor \"%.128s\" has %lld bytes, expected %zu from its shape and dtype %s", tensor->name,
                    (long long)(end - begin), tensor->size, loglin_tensor_dtype_name(tensor->dtype));
    }
    tensor->data = data + begin;
    return true;
}

static bool parse_tensor(const char *name, const json_t *entry, const unsigned char *data, size_t data_size,
                         loglin_tensor *tensor, loglin_tensor_error *error) {
    tensor->name = name;
    if (name[0] == '\0') {
        return fail(error, "a tensor has an empty name");
    }
    if (!json_is_object(entry) || json_object_size(entry) != 3) {
        return fail(error, "tensor \"%.128s\" is not an object of dtype, shape and data_offsets", name);
    }
    return parse_dtype(entry, tensor, error) && parse_shape(entry, tensor, error) &&
           parse_offsets(entry, data, data_size, tensor, error);
}

static bool check_metadata(json_t *metadata, loglin_tensor_error *error) {
    if (!json_is_object(metadata)) {
        return fail(error, "__metadata__ is not an object of strings");
    }
    const char *key;
    json_t *value;
    json_object_foreach(metadata, key, value) {
        if (!json_is_string(value)) {
            return fail(error, "__metadata__: the value of \"%.128s\" is not a string", key);
        }
    }
    return true;
}

static int compare_places(const void *left, const void *right) {
    const loglin_tensor *a = left;
    const loglin_tensor *b = right;
    if (a->data != b->data) {
        return (const char *)a->data < (const char *)b->data ? -1 : 1;
    }
    return (a->size > b->size) - (a->size < b->size);
}

static int compare_names(const void *left, const void *right) {
    return strcmp(((const loglin_tensor *)left)->name, ((const loglin_tensor *)right)->name);
}

/* Every byte of the data belongs to one tensor. */
static bool check_places(loglin_safetensors *file, const unsigned char *data, size_t data_size,
                         loglin_tensor_error *error) {
    qsort(file->tensors, file->count, sizeof *file->tensors, compare_places);
    size_t expected = 0;
    for (size_t i = 0; i < file->count; ++i) {
        const loglin_tensor *tensor = &file->tensors[i];
        const size_t begin = (size_t)((const unsigned char *)tensor->data - data);
        if (begin < expected) {
            return fail(error, "tensor \"%.128s\" begins at byte %zu and overlaps tensor \"%.128s\", which ends at %zu",
                        tensor->name, begin, file->tensors[i - 1].name, expected);
        }
        if (begin > expected) {
            return fail(error, "tensor \"%.128s\" begins at byte %zu, expected %zu: no tensor holds the bytes between",
                        tensor->name, begin, expected);
        }
        expected = begin + tensor->size;
    }
    if (expected != data_size) {
        return fail(error, "the data has %zu bytes, expected %zu: no tensor holds the rest", data_size, expected);
    }
    return true;
}

static bool parse_tensors(loglin_safetensors *file, const unsigned char *data, size_t data_size,
                          loglin_tensor_error *error) {
    file->tensors = calloc(json_object_size(file->header) + 1, sizeof *file->tensors);
    if (file->tensors == NULL) {
        return fail(error, "out of memory");
    }
    const char *name;
    json_t *entry;
    json_object_foreach(file->header, name, entry) {
        if (strcmp(name, "__metadata__") == 0) {
            if (!check_metadata(entry, error)) {
                return false;
            }
        } else {
            if (!parse_tensor(name, entry, data, data_size, &file->tensors[file->count], error)) {
                return false;
            }
            ++file->count;
        }
    }
    if (!check_places(file, data, data_size, error)) {
        return false;
    }
    qsort(file->tensors, file->count, sizeof *file->tensors, compare_names);
    return true;
}

static bool parse_file(loglin_safetensors *file, const unsigned char *bytes, size_t size, loglin_tensor_error *error) {
    if (size < PREFIX_SIZE) {
        return fail(error, "the file has %zu bytes, expected at least %d", size, PREFIX_SIZE);
    }
    uint64_t header_size = 0;
    for (int i = PREFIX_SIZE - 1; i >= 0; --i) {
        header_size = header_size << 8 | bytes[i];
    }
    if (header_size > MAX_HEADER_SIZE) {
        return fail(error, "the header has %llu bytes, expected at most %d", (unsigned long long)header_size,
                    MAX_HEADER_SIZE);
    }
    if (header_size > size - PREFIX_SIZE) {
        return fail(error, "the header has %llu bytes, but only %zu follow its length", (unsigned long long)header_size,
                    size - PREFIX_SIZE);
    }
    const unsigned char *header = bytes + PREFIX_SIZE;
    if (header_size == 0 || header[0] != '{') {
        return fail(error, "the header does not begin with '{'");
    }
    json_error_t json_error;
    file->header = json_loadb((const char *)header, (size_t)header_size, JSON_REJECT_DUPLICATES, &json_error);
    if (file->header == NULL) {
        return fail(error, "the header is not JSON: %s (byte %d)", json_error.text, json_error.position);
    }
    return parse_tensors(file, header + header_size, size - PREFIX_SIZE - (size_t)header_size, error);
}

bool loglin_safetensors_parse(const void *bytes, size_t size, loglin_safetensors **file, loglin_tensor_error *error) {
    *file = calloc(1, sizeof **file);
    if (*file == NULL) {
        (void)fail(error, "out of memory");
    } else if (!parse_file(*file, bytes, size, error)) {
        loglin_safetensors_close(*file);
        *file = NULL;
    }
    return *file != NULL;
}

static bool open_mapping(int descriptor, loglin_safetensors **file, loglin_tensor_error *error) {
    struct stat status;
    if (fstat(descriptor, &status) != 0) {
        return fail(error, "cannot be examined: %s", strerror(errno));
    }
    if (!S_ISREG(status.st_mode)) {
        return fail(error, "is not a regular file");
    }
    if (status.st_size < PREFIX_SIZE) {
        return fail(error, "the file has %lld bytes, expected at least %d", (long long)status.st_size, PREFIX_SIZE);
    }
    const size_t size = (size_t)status.st_size;
    void *mapping = mmap(NULL, size, PROT_READ, MAP_PRIVATE, descriptor, 0);
    if (mapping == MAP_FAILED) {
        return fail(error, "cannot be mapped: %s", strerror(errno));
    }
    if (!loglin_safetensors_parse(mapping, size, file, error)) {
        (void)munmap(mapping, size);
        return false;
    }
    (*file)->mapping = mapping;
    (*file)->mapping_size = size;
    return true;
}

bool loglin_safetensors_open(const char *path, loglin_safetensors **file, loglin_tensor_error *error) {
    *file = NULL;
    /* Not to hang on a pipe without a writer. */
    const int descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor < 0) {
        return fail(error, "cannot be opened: %s", strerror(errno));
    }
    const bool opened = open_mapping(descriptor, file, error);
    (void)close(descriptor);
    return opened;
}

void loglin_safetensors_close(loglin_safetensors *file) {
    if (file == NULL) {
        return;
    }
    if (file->mapping != NULL) {
        (void)munmap(file->mapping, file->mapping_size);
    }
    free(file->tensors);
    json_decref(file->header);
    free(file);
}

size_t loglin_safetensors_count(const loglin_safetensors *file) {
    return file->count;
}

const loglin_tensor *loglin_safetensors_at(const loglin_safetensors *file, size_t index) {
    return &file->tensors[index];
}

const loglin_tensor *loglin_safetensors_find(const loglin_safetensors *file, const char *name) {
    const loglin_tensor key = {.name = name};
    return bsearch(&key, file->tensors, file->count, sizeof *file->tensors, compare_names);
}

const char *loglin_safetensors_metadata(const loglin_safetensors *file, const char *key) {
    return json_string_value(json_object_get(json_object_get(file->header, "__metadata__"), key));
}

size_t loglin_tensor_count(const loglin_tensor *tensor) {
    return tensor->size / loglin_tensor_dtype_size(tensor->dtype);
}

void loglin_tensor_print_shape(size_t rank, const size_t *shape, char *text, size_t capacity) {
    size_t length = (size_t)snprintf(text, capacity, "[");
    for (size_t i = 0; i < rank && length < capacity; i++) {
        length += (size_t)snprintf(text + length, capacity - length, "%s%zu", i > 0 ? ", " : "", shape[i]);
    }
    if (length < capacity) {
        (void)snprintf(text + length, capacity - length, "]");
    }
}

/* ---- Writing ---------------------------------------------------------------------------------------------------- */

static bool check_tensor(const loglin_tensor *tensor, loglin_tensor_error *error) {
    if (tensor->rank > LOGLIN_TENSOR_MAX_RANK) {
        return fail(error, "tensor \"%.128s\" has %zu dimensions, expected at most %d", tensor->name, tensor->rank,
                    LOGLIN_TENSOR_MAX_RANK);
    }
    size_t size = loglin_tensor_dtype_size(tensor->dtype);
    bool fits = true;
    for (size_t i = 0; i < tensor->rank; ++i) {
        fits = multiply(size, tensor->shape[i], &size) && fits;
    }
    if (!fits || size != tensor->size) {
        return fail(error, "tensor \"%.128s\" has %zu bytes, which is not what its shape and dtype %s need",
                    tensor->name, tensor->size, loglin_tensor_dtype_name(tensor->dtype));
    }
    if (tensor->name[0] == '\0' || strcmp(tensor->name, "__metadata__") == 0) {
        return fail(error, "a tensor cannot have the name \"%s\"", tensor->name);
    }
    return true;
}

/* Larger elements first: so every tensor is aligned to its own. */
static size_t sort_by_alignment(const loglin_tensor *tensors, size_t count, loglin_tensor *order) {
    size_t sorted = 0;
    for (size_t element = 8; element > 0; element /= 2) {
        for (size_t i = 0; i < count; ++i) {
            if (loglin_tensor_dtype_size(tensors[i].dtype) == element) {
                order[sorted++] = tensors[i];
            }
        }
    }
    return sorted;
}

static json_t *tensor_entry(const loglin_tensor *tensor, size_t begin) {
    json_t *shape = json_array();
    for (size_t i = 0; i < tensor->rank; ++i) {
        if (json_array_append_new(shape, json_integer((json_int_t)tensor->shape[i])) != 0) {
            json_decref(shape);
            return NULL;
        }
    }
    const size_t end = begin + tensor->size;
    return json_pack("{s:s, s:o, s:[I, I]}", "dtype", loglin_tensor_dtype_name(tensor->dtype), "shape", shape,
                     "data_offsets", (json_int_t)begin, (json_int_t)end);
}

static bool add_metadata(json_t *header, const loglin_tensor_metadata *metadata, size_t count,
                         loglin_tensor_error *error) {
    if (count == 0) {
        return true;
    }
    json_t *object = json_object();
    if (json_object_set_new(header, "__metadata__", object) != 0) {
        return fail(error, "out of memory");
    }
    for (size_t i = 0; i < count; ++i) {
        if (json_object_set_new(object, metadata[i].key, json_string(metadata[i].value)) != 0) {
            return fail(error, "metadata \"%.128s\" is not UTF-8, or memory ran out", metadata[i].key);
        }
    }
    return true;
}

static bool add_tensors(json_t *header, const loglin_tensor *order, size_t count, loglin_tensor_error *error) {
    size_t begin = 0;
    for (size_t i = 0; i < count; ++i) {
        if (!check_tensor(&order[i], error)) {
            return false;
        }
        if (order[i].size > (size_t)INT64_MAX - begin) {
            return fail(error, "tensor \"%.128s\": the size of the file overflows", order[i].name);
        }
        if (json_object_get(header, order[i].name) != NULL) {
            return fail(error, "tensor \"%.128s\" is there twice", order[i].name);
        }
        if (json_object_set_new(header, order[i].name, tensor_entry(&order[i], begin)) != 0) {
            return fail(error, "tensor \"%.128s\": its name is not UTF-8, or memory ran out", order[i].name);
        }
        begin += order[i].size;
    }
    return true;
}

/* The header's text, a string to free. */
static char *build_header(const loglin_tensor *order, size_t count, const loglin_tensor_metadata *metadata,
                          size_t metadata_count, loglin_tensor_error *error) {
    char *text = NULL;
    json_t *header = json_object();
    if (header != NULL && add_metadata(header, metadata, metadata_count, error) &&
        add_tensors(header, order, count, error)) {
        text = json_dumps(header, JSON_COMPACT);
        if (text == NULL) {
            (void)fail(error, "out of memory");
        }
    }
    json_decref(header);
    return text;
}

static bool write_bytes(int descriptor, const void *bytes, size_t size, loglin_tensor_error *error) {
    const unsigned char *next = bytes;
    while (size > 0) {
        const ssize_t written = write(descriptor, next, size);
        if (written < 0 && errno != EINTR) {
            return fail(error, "cannot be written: %s", strerror(errno));
        }
        if (written > 0) {
            next += written;
            size -= (size_t)written;
        }
    }
    return true;
}

/* Length, header, spaces up to a multiple of 8, data. */
static bool write_file(int descriptor, const char *header, const loglin_tensor *order, size_t count,
                       loglin_tensor_error *error) {
    const size_t length = strlen(header);
    const size_t padded = (length + 7) / 8 * 8;
    if (padded > MAX_HEADER_SIZE) {
        return fail(error, "the header has %zu bytes, expected at most %d", padded, MAX_HEADER_SIZE);
    }
    unsigned char prefix[PREFIX_SIZE];
    for (size_t i = 0; i < PREFIX_SIZE; ++i) {
        prefix[i] = (unsigned char)((uint64_t)padded >> (8 * i));
    }
    if (!write_bytes(descriptor, prefix, PREFIX_SIZE, error) || !write_bytes(descriptor, header, length, error) ||
        !write_bytes(descriptor, "       ", padded - length, error)) {
        return false;
    }
    for (size_t i = 0; i < count; ++i) {
        if (!write_bytes(descriptor, order[i].data, order[i].size, error)) {
            return false;
        }
    }
    if (fsync(descriptor) != 0 && errno != EINVAL) {
        return fail(error, "cannot be written: %s", strerror(errno));
    }
    return true;
}

/* Creates a new file beside `path`, with the permissions that the umask leaves; its name goes to `name`. */
static int create_temporary(const char *path, char *name, size_t capacity) {
    int descriptor = -1;
    errno = EEXIST;
    for (unsigned attempt = 0; descriptor < 0 && errno == EEXIST && attempt < 1000; ++attempt) {
        (void)snprintf(name, capacity, "%s.%ld-%u.tmp", path, (long)getpid(), attempt);
        descriptor = open(name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    }
    return descriptor;
}

/* A file that is being written beside the one that it is to replace; the names are to be freed. */
typedef struct replacement {
    int descriptor;
    char *target, *temporary;
} replacement;

char *loglin_follow_links(const char *path) {
    struct stat status;
    return lstat(path, &status) == 0 ? realpath(path, NULL) : strdup(path);
}

static void free_names(replacement *file) {
    free(file->target);
    free(file->temporary);
}

/* False, with `error` filled in and nothing to free, if `path` cannot be replaced. */
static bool open_replacement(const char *path, replacement *file, loglin_tensor_error *error) {
    struct stat status;
    if (path[0] == '\0') {
        return fail(error, "cannot be created: its name is empty");
    }
    if (stat(path, &status) == 0 && !S_ISREG(status.st_mode)) {
        return fail(error, "cannot be replaced: it is not a regular file");
    }
    *file = (replacement){.descriptor = -1, .target = loglin_follow_links(path)};
    if (file->target == NULL) {
        return fail(error, "cannot be replaced: %s", strerror(errno));
    }
    const size_t capacity = strlen(file->target) + 64;
    file->temporary = malloc(capacity);
    if (file->temporary == NULL) {
        (void)fail(error, "out of memory");
    } else {
        file->descriptor = create_temporary(file->target, file->temporary, capacity);
        if (file->descriptor < 0) {
            (void)fail(error, "cannot be created: %s", strerror(errno));
        }
    }
    if (file->descriptor < 0) {
        free_names(file);
    }
    return file->descriptor >= 0;
}

bool loglin_safetensors_can_write(const char *path, loglin_tensor_error *error) {
    replacement file;
    if (!open_replacement(path, &file, error)) {
        return false;
    }
    (void)close(file.descriptor);
    (void)unlink(file.temporary);
    free_names(&file);
    return true;
}

static bool write_and_rename(const char *path, const char *header, const loglin_tensor *order, size_t count,
                             loglin_tensor_error *error) {
    replacement file;
    if (!open_replacement(path, &file, error)) {
        return false;
    }
    bool written = write_file(file.descriptor, header, order, count, error);
    if (close(file.descriptor) != 0 && written) {
        written = fail(error, "cannot be written: %s", strerror(errno));
    }
    if (written && rename(file.temporary, file.target) != 0) {
        written = fail(error, "cannot be renamed: %s", strerror(errno));
    }
    if (!written) {
        (void)unlink(file.temporary);
    }
    free_names(&file);
    return written;
}

bool loglin_safetensors_write(const char *path, const loglin_tensor *tensors, size_t count,
                              const loglin_tensor_metadata *metadata, size_t metadata_count,
                              loglin_tensor_error *error) {
    loglin_tensor *order = calloc(count + 1, sizeof *order);
    if (order == NULL) {
        return fail(error, "out of memory");
    }
    const size_t sorted = sort_by_alignment(tensors, count, order);
    char *header = build_header(order, sorted, metadata, metadata_count, error);
    const bool written = header != NULL && write_and_rename(path, header, order, sorted, error);
    free(header);
    free(order);
    return written;
}
