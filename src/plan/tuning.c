/* SPDX-License-Identifier: Apache-2.0 */
/* Entries, their JSON, and the files of the cache directory. */
#include "plan/tuning.h"

#include "runtime/cache.h"
#include "runtime/log.h"
#include "runtime/status.h"
#include "tensorfile/safetensors.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

static const int format_version = 1;
static const size_t max_file_size = (size_t)4 << 20; /* some ten thousand entries */
static const size_t kept_stamps = 4;

/* ---- Names ------------------------------------------------------------------------------------------------------- */

static const char *const op_names[] = {[LOGLIN_MAMBA2] = "mamba2", [LOGLIN_GATED_DELTA] = "gated_delta"};
static const char *const dtype_names[] = {[LOGLIN_F32] = "f32", [LOGLIN_F16] = "f16", [LOGLIN_BF16] = "bf16"};
static const char *const phase_names[] = {[LOGLIN_FORWARD] = "forward", [LOGLIN_BACKWARD] = "backward"};
static const char *const engine_names[] = {
    [LOGLIN_ENGINE_AUTO] = NULL, [LOGLIN_ENGINE_BLAS] = "blas", [LOGLIN_ENGINE_FUSED] = "fused"};
static const char *const kind_names[] = {
    [LOGLIN_ENTRY_CLASS] = "class", [LOGLIN_ENTRY_GEMM] = "gemm", [LOGLIN_ENTRY_FAILED] = "failed"};

#define COUNT_OF(array) (sizeof(array) / sizeof(array)[0])

loglin_class loglin_class_of(const loglin_problem *problem) {
    unsigned length = 1;
    while (length <= problem->max_length / 2) {
        length *= 2;
    }
    return (loglin_class){
        .op = problem->op,
        .dtype = problem->dtype,
        .dim_k = (unsigned)problem->dim_k,
        .dim_v = (unsigned)problem->dim_v,
        .length = length,
        .shared = problem->groups == 1,
        .phase = (problem->phases & LOGLIN_BACKWARD) != 0 ? LOGLIN_BACKWARD : LOGLIN_FORWARD,
    };
}

void loglin_class_name(const loglin_class *class, char *text, size_t capacity) {
    (void)snprintf(text, capacity, "%s %s K%u V%u %s T%u %s", op_names[class->op], dtype_names[class->dtype],
                   class->dim_k, class->dim_v, class->shared ? "shared" : "apart", class->length,
                   phase_names[class->phase]);
}

loglin_identity loglin_identity_of(const loglin_device_info *info) {
    loglin_identity identity;
    memset(&identity, 0, sizeof identity);
    (void)snprintf(identity.device, sizeof identity.device, "%s", info->name);
    (void)snprintf(identity.vendor, sizeof identity.vendor, "%s", info->vendor);
    (void)snprintf(identity.platform, sizeof identity.platform, "%s", info->platform_name);
    (void)snprintf(identity.type, sizeof identity.type, "%s",
                   (info->type & CL_DEVICE_TYPE_GPU) != 0   ? "GPU"
                   : (info->type & CL_DEVICE_TYPE_CPU) != 0 ? "CPU"
                                                            : "accelerator");
    return identity;
}

loglin_stamp loglin_stamp_of(const loglin_device_info *info) {
    loglin_stamp stamp;
    memset(&stamp, 0, sizeof stamp);
    (void)snprintf(stamp.driver, sizeof stamp.driver, "%s", info->driver);
    (void)snprintf(stamp.version, sizeof stamp.version, "%s", info->version);
    (void)snprintf(stamp.library, sizeof stamp.library, "%s", loglin_version());
    (void)snprintf(stamp.source, sizeof stamp.source, "%s", loglin_source_hash);
    return stamp;
}

/* ---- Entries ----------------------------------------------------------------------------------------------------- */

bool loglin_class_is(const loglin_class *a, const loglin_class *b) {
    return a->op == b->op && a->dtype == b->dtype && a->dim_k == b->dim_k && a->dim_v == b->dim_v &&
           a->length == b->length && a->shared == b->shared && a->phase == b->phase;
}

static bool same_stamp(const loglin_stamp *a, const loglin_stamp *b) {
    return strcmp(a->driver, b->driver) == 0 && strcmp(a->version, b->version) == 0 &&
           strcmp(a->library, b->library) == 0 && strcmp(a->source, b->source) == 0;
}

/* Are the entries about the same, whatever their stamps? */
static bool same_subject(const loglin_entry *a, const loglin_entry *b) {
    if (a->kind != b->kind) {
        return false;
    }
    switch (a->kind) {
    case LOGLIN_ENTRY_CLASS:
        return a->configuration.engine == b->configuration.engine && loglin_class_is(&a->class, &b->class);
    case LOGLIN_ENTRY_FAILED:
        return strcmp(a->candidate, b->candidate) == 0;
    default:
        return true;
    }
}

static bool is_newer(const loglin_entry *a, const loglin_entry *b) {
    return a->tuned_at > b->tuned_at || (a->tuned_at == b->tuned_at && a->ms < b->ms);
}

static void remove_entry(loglin_tuning *tuning, size_t at) {
    tuning->count--;
    memmove(&tuning->entries[at], &tuning->entries[at + 1], (tuning->count - at) * sizeof tuning->entries[0]);
}

/* Drops the oldest entry about a subject if there are too many. */
static void drop_oldest(loglin_tuning *tuning, const loglin_entry *subject) {
    size_t found = 0, oldest = 0;
    for (size_t i = 0; i < tuning->count; i++) {
        if (same_subject(&tuning->entries[i], subject)) {
            if (found == 0 || is_newer(&tuning->entries[oldest], &tuning->entries[i])) {
                oldest = i;
            }
            found++;
        }
    }
    if (found > kept_stamps) {
        remove_entry(tuning, oldest);
    }
}

loglin_status loglin_tuning_add(loglin_tuning *tuning, const loglin_entry *entry) {
    for (size_t i = 0; i < tuning->count; i++) {
        loglin_entry *old = &tuning->entries[i];
        if (same_subject(old, entry) && same_stamp(&old->stamp, &entry->stamp)) {
            if (is_newer(entry, old)) {
                *old = *entry;
            }
            return LOGLIN_OK;
        }
    }
    if ((tuning->count & (tuning->count - 1)) == 0) { /* room for a power of two, all of it taken */
        const size_t room = tuning->count > 0 ? 2 * tuning->count : 1;
        loglin_entry *grown = realloc(tuning->entries, room * sizeof *grown);
        if (grown == NULL) {
            return loglin_fail(LOGLIN_OUT_OF_MEMORY, "tuning: out of host memory");
        }
        tuning->entries = grown;
    }
    const loglin_entry added = *entry;
    tuning->entries[tuning->count++] = added;
    drop_oldest(tuning, &added);
    return LOGLIN_OK;
}

void loglin_tuning_free(loglin_tuning *tuning) {
    free(tuning->entries);
    *tuning = (loglin_tuning){.entries = NULL};
}

/* ---- Entries to JSON --------------------------------------------------------------------------------------------- */

static json_t *print_values(const loglin_configuration *configuration) {
    json_t *values = json_object();
    for (size_t i = 0; i < LOGLIN_TUNABLE_COUNT; i++) {
        if (loglin_tunable_is_read(&loglin_tunables[i], configuration->engine)) {
            (void)json_object_set_new(values, loglin_tunables[i].name, json_integer(configuration->values[i]));
        }
    }
    return values;
}

static json_t *print_gemm(const loglin_gemm_parameters *gemm) {
    json_t *values = json_object();
    for (size_t i = 0; i < LOGLIN_GEMM_PARAMETER_COUNT && !loglin_gemm_parameters_absent(gemm); i++) {
        (void)json_object_set_new(values, loglin_gemm_parameter_names[i], json_integer(gemm->values[i]));
    }
    return values;
}

static json_t *print_subject(const loglin_entry *entry) {
    const loglin_class *class = &entry->class;
    switch (entry->kind) {
    case LOGLIN_ENTRY_CLASS:
        return json_pack("{s:s, s:s, s:i, s:i, s:i, s:b, s:s, s:s, s:o}", "op", op_names[class->op], "dtype",
                         dtype_names[class->dtype], "dim_k", (int)class->dim_k, "dim_v", (int)class->dim_v, "length",
                         (int)class->length, "shared", class->shared, "phase", phase_names[class->phase], "engine",
                         engine_names[entry->configuration.engine], "values", print_values(&entry->configuration));
    case LOGLIN_ENTRY_GEMM:
        return json_pack("{s:o}", "parameters", print_gemm(&entry->configuration.gemm));
    default:
        return json_pack("{s:s, s:s}", "candidate", entry->candidate, "reason", entry->reason);
    }
}

static json_t *print_entry(const loglin_entry *entry) {
    json_t *printed = json_pack("{s:s}", "kind", kind_names[entry->kind]);
    json_t *subject = print_subject(entry);
    json_t *rest = json_pack("{s:f, s:f, s:f, s:I, s:I, s:s, s:s, s:s, s:s}", "ms", entry->ms, "spread", entry->spread,
                             "default_ms", entry->default_ms, "seed", (json_int_t)entry->seed, "tuned_at",
                             (json_int_t)entry->tuned_at, "driver", entry->stamp.driver, "version",
                             entry->stamp.version, "library", entry->stamp.library, "source", entry->stamp.source);
    const bool whole = printed != NULL && subject != NULL && rest != NULL &&
                       json_object_update(printed, subject) == 0 && json_object_update(printed, rest) == 0;
    json_decref(subject);
    json_decref(rest);
    if (!whole) {
        json_decref(printed);
        return NULL;
    }
    return printed;
}

enum { REAL_DIGITS = 9 };

/* The hash of a document without its own member "checksum". */
static bool checksum_of(const json_t *document, char text[33]) {
    json_t *bare = json_copy((json_t *)document);
    (void)json_object_del(bare, "checksum");
    char *compact = json_dumps(bare, JSON_COMPACT | JSON_SORT_KEYS | JSON_REAL_PRECISION(REAL_DIGITS));
    json_decref(bare);
    if (compact == NULL) {
        return false;
    }
    const XXH128_hash_t hash = XXH3_128bits(compact, strlen(compact));
    (void)snprintf(text, 33, "%016llx%016llx", (unsigned long long)hash.high64, (unsigned long long)hash.low64);
    free(compact);
    return true;
}

char *loglin_tuning_print(const loglin_tuning *tuning) {
    json_t *entries = json_array();
    for (size_t i = 0; i < tuning->count; i++) {
        if (json_array_append_new(entries, print_entry(&tuning->entries[i])) != 0) {
            json_decref(entries);
            return NULL;
        }
    }
    json_t *document =
        json_pack("{s:s, s:i, s:s, s:s, s:s, s:s, s:o}", "format", "loglin-tuning", "format_version", format_version,
                  "device", tuning->identity.device, "vendor", tuning->identity.vendor, "platform",
                  tuning->identity.platform, "type", tuning->identity.type, "entries", entries);
    char checksum[33];
    char *text = NULL;
    /* The checksum is of what a reader parses: numbers are rounded by printing them. */
    char *first = document != NULL ? json_dumps(document, JSON_REAL_PRECISION(REAL_DIGITS)) : NULL;
    json_t *rounded = first != NULL ? json_loads(first, 0, NULL) : NULL;
    if (rounded != NULL && checksum_of(rounded, checksum) &&
        json_object_set_new(rounded, "checksum", json_string(checksum)) == 0) {
        text = json_dumps(rounded, JSON_INDENT(1) | JSON_REAL_PRECISION(REAL_DIGITS));
    }
    free(first);
    json_decref(rounded);
    json_decref(document);
    return text;
}

/* ---- Entries from JSON ------------------------------------------------------------------------------------------- */

/* Where something is being read, and whether all was good so far. */
typedef struct reader {
    const char *name; /* of the file */
    size_t entry;
    loglin_status status;
} reader;

static void complain(reader *in, const char *member, const char *expected) {
    if (in->status == LOGLIN_OK) {
        in->status = loglin_fail(LOGLIN_BAD_FILE, "%s: entry %zu: \"%s\" is missing or wrong, expected %s", in->name,
                                 in->entry, member, expected);
    }
}

static void read_text(reader *in, const json_t *object, const char *member, char *text, size_t capacity) {
    const json_t *value = json_object_get(object, member);
    if (!json_is_string(value) || json_string_length(value) >= capacity) {
        complain(in, member, "a text that is not too long");
        return;
    }
    (void)snprintf(text, capacity, "%s", json_string_value(value));
}

static int read_choice(reader *in, const json_t *object, const char *member, const char *const *names, size_t count) {
    const char *text = json_string_value(json_object_get(object, member));
    for (size_t i = 0; i < count && text != NULL; i++) {
        if (names[i] != NULL && strcmp(names[i], text) == 0) {
            return (int)i;
        }
    }
    complain(in, member, "a known name");
    return 0;
}

static int64_t read_integer(reader *in, const json_t *object, const char *member, int64_t low, int64_t high) {
    const json_t *value = json_object_get(object, member);
    const int64_t number = json_integer_value(value);
    if (!json_is_integer(value) || number < low || number > high) {
        complain(in, member, "an integer in its range");
        return low;
    }
    return number;
}

static double read_time(reader *in, const json_t *object, const char *member) {
    const json_t *value = json_object_get(object, member);
    const double number = json_number_value(value);
    if (!json_is_number(value) || !isfinite(number) || number < 0) {
        complain(in, member, "a time in milliseconds");
        return 0;
    }
    return number;
}

static void read_class(reader *in, const json_t *object, loglin_class *class) {
    class->op = (loglin_op)read_choice(in, object, "op", op_names, COUNT_OF(op_names));
    class->dtype = (loglin_dtype)read_choice(in, object, "dtype", dtype_names, COUNT_OF(dtype_names));
    class->phase = (loglin_phase)read_choice(in, object, "phase", phase_names, COUNT_OF(phase_names));
    class->dim_k = (unsigned)read_integer(in, object, "dim_k", 1, LOGLIN_MAX_DIM);
    class->dim_v = (unsigned)read_integer(in, object, "dim_v", 1, LOGLIN_MAX_DIM);
    class->length = (unsigned)read_integer(in, object, "length", 1, (int64_t)1 << 30);
    class->shared = json_is_true(json_object_get(object, "shared"));
    if (!json_is_boolean(json_object_get(object, "shared"))) {
        complain(in, "shared", "true or false");
    }
    if ((class->length & (class->length - 1)) != 0) {
        complain(in, "length", "a power of two");
    }
}

/* Tunables that the file does not name have their fallback. */
static void read_values(reader *in, const json_t *object, loglin_configuration *configuration) {
    *configuration = loglin_configuration_default(
        (loglin_engine)read_choice(in, object, "engine", engine_names, COUNT_OF(engine_names)));
    json_t *values = json_object_get(object, "values");
    size_t known = 0;
    for (size_t i = 0; i < LOGLIN_TUNABLE_COUNT; i++) {
        const loglin_tunable *tunable = &loglin_tunables[i];
        if (json_object_get(values, tunable->name) == NULL) {
            continue;
        }
        known++;
        configuration->values[i] = (unsigned)read_integer(in, values, tunable->name, 0, INT32_MAX);
        if (!loglin_tunable_takes(tunable, configuration->values[i])) {
            complain(in, tunable->name, "a value that it can have");
        }
    }
    if (!json_is_object(values) || known != json_object_size(values)) {
        complain(in, "values", "an object of known tunables");
    }
}

static void read_gemm(reader *in, const json_t *object, loglin_gemm_parameters *gemm) {
    json_t *values = json_object_get(object, "parameters");
    if (json_is_object(values) && json_object_size(values) == 0) {
        return; /* CLBlast's own are the best */
    }
    for (size_t i = 0; i < LOGLIN_GEMM_PARAMETER_COUNT; i++) {
        gemm->values[i] = (unsigned)read_integer(in, values, loglin_gemm_parameter_names[i], 0, 1024);
    }
    if (json_object_size(values) != LOGLIN_GEMM_PARAMETER_COUNT || !loglin_gemm_parameters_possible(gemm)) {
        complain(in, "parameters", "parameters that CLBlast can have");
    }
}

static void read_entry(reader *in, const json_t *object, loglin_entry *entry) {
    *entry =
        (loglin_entry){.kind = (loglin_entry_kind)read_choice(in, object, "kind", kind_names, COUNT_OF(kind_names))};
    read_text(in, object, "driver", entry->stamp.driver, sizeof entry->stamp.driver);
    read_text(in, object, "version", entry->stamp.version, sizeof entry->stamp.version);
    read_text(in, object, "library", entry->stamp.library, sizeof entry->stamp.library);
    read_text(in, object, "source", entry->stamp.source, sizeof entry->stamp.source);
    entry->ms = read_time(in, object, "ms");
    entry->spread = read_time(in, object, "spread");
    entry->default_ms = read_time(in, object, "default_ms");
    entry->seed = read_integer(in, object, "seed", 0, INT64_MAX);
    entry->tuned_at = read_integer(in, object, "tuned_at", 0, INT64_MAX);
    switch (entry->kind) {
    case LOGLIN_ENTRY_CLASS:
        read_class(in, object, &entry->class);
        read_values(in, object, &entry->configuration);
        break;
    case LOGLIN_ENTRY_GEMM:
        read_gemm(in, object, &entry->configuration.gemm);
        break;
    default:
        read_text(in, object, "candidate", entry->candidate, sizeof entry->candidate);
        read_text(in, object, "reason", entry->reason, sizeof entry->reason);
    }
}

static loglin_status check_document(const char *name, const json_t *document) {
    const char *format = json_string_value(json_object_get(document, "format"));
    if (format == NULL || strcmp(format, "loglin-tuning") != 0) {
        return loglin_fail(LOGLIN_BAD_FILE, "%s: \"format\" is %.64s, expected \"loglin-tuning\"", name,
                           format != NULL ? format : "missing");
    }
    const json_t *version = json_object_get(document, "format_version");
    if (!json_is_integer(version) || json_integer_value(version) != format_version) {
        return loglin_fail(LOGLIN_BAD_FILE, "%s: \"format_version\" is %lld, expected %d", name,
                           (long long)json_integer_value(version), format_version);
    }
    const char *checksum = json_string_value(json_object_get(document, "checksum"));
    char expected[33];
    if (!checksum_of(document, expected)) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "%s: out of host memory", name);
    }
    if (checksum == NULL || strcmp(checksum, expected) != 0) {
        return loglin_fail(LOGLIN_BAD_FILE, "%s: the checksum is %s, expected %s: the file was changed", name,
                           checksum != NULL ? checksum : "missing", expected);
    }
    return LOGLIN_OK;
}

static loglin_status read_document(const char *name, const json_t *document, loglin_tuning *tuning) {
    RETURN_IF_ERROR(check_document(name, document));
    reader in = {.name = name};
    read_text(&in, document, "device", tuning->identity.device, sizeof tuning->identity.device);
    read_text(&in, document, "vendor", tuning->identity.vendor, sizeof tuning->identity.vendor);
    read_text(&in, document, "platform", tuning->identity.platform, sizeof tuning->identity.platform);
    read_text(&in, document, "type", tuning->identity.type, sizeof tuning->identity.type);
    const json_t *entries = json_object_get(document, "entries");
    if (!json_is_array(entries)) {
        complain(&in, "entries", "an array");
    }
    for (size_t i = 0; i < json_array_size(entries) && in.status == LOGLIN_OK; i++) {
        loglin_entry entry;
        in.entry = i;
        read_entry(&in, json_array_get(entries, i), &entry);
        if (in.status == LOGLIN_OK) {
            in.status = loglin_tuning_add(tuning, &entry);
        }
    }
    return in.status;
}

loglin_status loglin_tuning_parse(const char *name, const char *text, size_t length, loglin_tuning *tuning) {
    *tuning = (loglin_tuning){.entries = NULL};
    if (length == 0) {
        return loglin_fail(LOGLIN_BAD_FILE, "%s: empty, expected a JSON object", name);
    }
    json_error_t error;
    json_t *document = json_loadb(text, length, JSON_REJECT_DUPLICATES, &error);
    if (document == NULL) {
        return loglin_fail(LOGLIN_BAD_FILE, "%s: not a JSON object: line %d: %s", name, error.line, error.text);
    }
    if (!json_is_object(document)) {
        json_decref(document);
        return loglin_fail(LOGLIN_BAD_FILE, "%s: a JSON array, expected an object", name);
    }
    const loglin_status status = read_document(name, document, tuning);
    json_decref(document);
    if (status != LOGLIN_OK) {
        loglin_tuning_free(tuning);
    }
    return status;
}

/* ---- Files ------------------------------------------------------------------------------------------------------- */

static loglin_status fail_io(const char *what, const char *path) {
    char reason[128];
    const int code = errno;
    if (strerror_r(code, reason, sizeof reason) != 0) {
        (void)snprintf(reason, sizeof reason, "error %d", code);
    }
    return loglin_fail(LOGLIN_IO, "%s %s: %s", what, path, reason);
}

/* For the caller to free. */
static loglin_status read_file(const char *path, char **text, size_t *length) {
    const int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO of that name must not block */
    if (file < 0) {
        return fail_io("cannot open", path);
    }
    struct stat status;
    if (fstat(file, &status) != 0 || !S_ISREG(status.st_mode) || (size_t)status.st_size > max_file_size) {
        close(file);
        return loglin_fail(LOGLIN_BAD_FILE, "%s: not a file of at most %zu bytes", path, max_file_size);
    }
    const size_t capacity = (size_t)status.st_size;
    *text = malloc(capacity + 1);
    *length = 0;
    ssize_t got = *text != NULL ? 1 : 0;
    while (got > 0 && *length < capacity) {
        got = read(file, *text + *length, capacity - *length);
        *length += got > 0 ? (size_t)got : 0;
    }
    const loglin_status result = *text == NULL ? loglin_fail(LOGLIN_OUT_OF_MEMORY, "%s: out of host memory", path)
                                 : got < 0     ? fail_io("cannot read", path)
                                               : LOGLIN_OK;
    close(file);
    if (result != LOGLIN_OK) {
        free(*text);
    }
    return result;
}

loglin_status loglin_tuning_read(const char *path, loglin_tuning *tuning) {
    *tuning = (loglin_tuning){.entries = NULL};
    char *text = NULL;
    size_t length = 0;
    RETURN_IF_ERROR(read_file(path, &text, &length));
    const loglin_status status = loglin_tuning_parse(path, text, length, tuning);
    free(text);
    return status;
}

/* A string for the caller to free, NULL without memory. */
static char *join(const char *first, const char *second) {
    const size_t size = strlen(first) + strlen(second) + 1;
    char *text = malloc(size);
    if (text != NULL) {
        (void)snprintf(text, size, "%s%s", first, second);
    }
    return text;
}

static loglin_status replace_file(const char *path, char *temporary, const char *text) {
    const int file = mkstemp(temporary);
    if (file < 0) {
        return fail_io("cannot create", temporary);
    }
    const mode_t mode = 0644; /* results may be shared */
    const bool written = fchmod(file, mode) == 0 && loglin_write_all(file, text, strlen(text)) &&
                         loglin_write_all(file, "\n", 1) && fsync(file) == 0;
    loglin_status status = written ? LOGLIN_OK : fail_io("cannot write", path);
    if (close(file) != 0 && written) {
        status = fail_io("cannot write", path);
    }
    if (status == LOGLIN_OK && rename(temporary, path) != 0) {
        status = fail_io("cannot replace", path);
    }
    if (status != LOGLIN_OK) {
        (void)unlink(temporary);
    }
    return status;
}

loglin_status loglin_tuning_write(const char *path, const loglin_tuning *tuning) {
    struct stat there;
    if (stat(path, &there) == 0 && !S_ISREG(there.st_mode)) {
        return loglin_fail(LOGLIN_IO, "cannot replace %s: it is not a regular file", path);
    }
    char *target = loglin_follow_links(path);
    if (target == NULL) {
        return fail_io("cannot replace", path);
    }
    char *text = loglin_tuning_print(tuning);
    char *temporary = join(target, ".new-XXXXXX");
    loglin_status status = LOGLIN_OK;
    if (text == NULL || temporary == NULL) {
        status = loglin_fail(LOGLIN_OUT_OF_MEMORY, "%s: out of host memory", path);
    } else if (strlen(text) >= max_file_size) {
        status = loglin_fail(LOGLIN_IO, "cannot write %s: its %zu bytes are more than the %zu that are read again",
                             path, strlen(text), max_file_size);
    } else {
        status = replace_file(target, temporary, text);
    }
    free(target);
    free(text);
    free(temporary);
    return status;
}

/* ---- The cache directory ----------------------------------------------------------------------------------------- */

static const char folder[] = "/tuning-1";

char *loglin_tuning_path(const char *cache, const loglin_identity *identity, const char *suffix) {
    char name[48];
    size_t length = 0;
    for (const char *c = identity->device; *c != '\0' && length < sizeof name - 1; c++) {
        const bool plain = isalnum((unsigned char)*c) != 0;
        if (plain || (length > 0 && name[length - 1] != '-')) {
            name[length++] = (char)(plain ? *c : '-');
        }
    }
    name[length] = '\0';
    char whole[sizeof *identity + 4];
    const int whole_length = snprintf(whole, sizeof whole, "%s\n%s\n%s\n%s", identity->device, identity->vendor,
                                      identity->platform, identity->type);
    const size_t size = strlen(cache) + sizeof folder + sizeof name + strlen(suffix) + 32;
    char *path = malloc(size);
    if (path != NULL) {
        (void)snprintf(path, size, "%s%s/%s-%016llx%s", cache, folder, name,
                       (unsigned long long)XXH3_64bits(whole, (size_t)whole_length), suffix);
    }
    return path;
}

/* The descriptor that holds the lock, -1 if it cannot be had; closing it gives the lock back. */
static int lock_file(const char *path) {
    char *name = join(path, ".lock");
    const int file = name != NULL ? open(name, O_RDWR | O_CREAT | O_CLOEXEC | O_NONBLOCK, 0600) : -1;
    free(name);
    int result = -1;
    while (file >= 0 && (result = flock(file, LOCK_EX)) != 0 && errno == EINTR) {
    }
    if (file >= 0 && result != 0) {
        close(file);
        return -1;
    }
    return file;
}

/* With the lock held: keeps a damaged file under a name of its own. */
static loglin_status set_aside(const char *path) {
    char *aside = join(path, ".damaged-XXXXXX");
    const int file = aside != NULL ? mkstemp(aside) : -1;
    loglin_status status = LOGLIN_OK;
    if (file >= 0 && rename(path, aside) == 0) {
        loglin_log(LOGLIN_LOG_WARN, "the damaged file is now %s", aside);
    } else {
        status = fail_io("cannot set aside the damaged file", path);
        if (file >= 0) {
            (void)unlink(aside);
        }
    }
    if (file >= 0) {
        close(file);
    }
    free(aside);
    return status;
}

/* LOGLIN_BAD_FILE: it is damaged, or another device's. */
static loglin_status read_own(const char *path, const loglin_identity *identity, loglin_tuning *tuning) {
    loglin_status status = loglin_tuning_read(path, tuning);
    if (status == LOGLIN_OK && memcmp(&tuning->identity, identity, sizeof *identity) != 0) {
        status = loglin_fail(LOGLIN_BAD_FILE, "%s: of device %s, expected %s", path, tuning->identity.device,
                             identity->device);
        loglin_tuning_free(tuning);
    }
    if (status != LOGLIN_OK) {
        tuning->identity = *identity;
    }
    return status;
}

/* With the lock held.  LOGLIN_IO: there is a file that can neither be read nor set aside. */
static loglin_status read_or_set_aside(const char *path, const loglin_identity *identity, loglin_tuning *tuning) {
    const loglin_status status = read_own(path, identity, tuning);
    if (status == LOGLIN_BAD_FILE) {
        loglin_log(LOGLIN_LOG_WARN, "tuning results are not used: %s", loglin_last_error());
        return set_aside(path);
    }
    return status == LOGLIN_IO && access(path, F_OK) != 0 ? LOGLIN_OK : status;
}

loglin_status loglin_tuning_load(const char *cache, const loglin_identity *identity, loglin_tuning *tuning) {
    *tuning = (loglin_tuning){.identity = *identity};
    char *path = loglin_tuning_path(cache, identity, ".json");
    if (path == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "tuning: out of host memory");
    }
    if (read_own(path, identity, tuning) == LOGLIN_BAD_FILE) {
        const int lock = lock_file(path);
        if (lock >= 0) {
            (void)read_or_set_aside(path, identity, tuning); /* another process may have replaced it by now */
            close(lock);
        } else {
            loglin_log(LOGLIN_LOG_WARN, "tuning results are not used: %s", loglin_last_error());
        }
    }
    free(path);
    return LOGLIN_OK;
}

/* With the lock held. */
static loglin_status merge_into(const char *path, const loglin_tuning *more) {
    loglin_tuning all = {.entries = NULL};
    loglin_status status = read_or_set_aside(path, &more->identity, &all);
    for (size_t i = 0; i < more->count && status == LOGLIN_OK; i++) {
        status = loglin_tuning_add(&all, &more->entries[i]);
    }
    if (status == LOGLIN_OK) {
        status = loglin_tuning_write(path, &all);
    }
    loglin_tuning_free(&all);
    return status;
}

loglin_status loglin_tuning_merge(const char *cache, const loglin_tuning *more) {
    char *directory = join(cache, folder);
    char *path = loglin_tuning_path(cache, &more->identity, ".json");
    loglin_status status = LOGLIN_OK;
    int lock = -1;
    if (directory == NULL || path == NULL) {
        status = loglin_fail(LOGLIN_OUT_OF_MEMORY, "tuning: out of host memory");
    } else if (!loglin_cache_make(directory) || (lock = lock_file(path)) < 0) {
        status =
            fail_io("tuning results cannot be kept (LOGLIN_CACHE_DIR names another place): cannot write to", directory);
    } else {
        status = merge_into(path, more);
        close(lock);
    }
    free(directory);
    free(path);
    return status;
}
