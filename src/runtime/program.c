/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A program is found by its file names and options among the device's programs; else its binary is looked for in the
 * cache directory; else it is built from source and its binary stored.  The device's lock is held throughout, so a
 * program that several threads ask for is built once.
 */
#include "runtime/program.h"
#include "runtime/cache.h"
#include "runtime/device.h"
#include "runtime/log.h"
#include "runtime/source.h"
#include "runtime/status.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct loglin_program {
    struct loglin_program *next;
    char *key; /* file names and options */
    cl_program program;
};

void loglin_programs_release(struct loglin_program *programs) {
    while (programs != NULL) {
        struct loglin_program *next = programs->next;
        clReleaseProgram(programs->program);
        free(programs->key);
        free(programs);
        programs = next;
    }
}

/* ---- Texts that grow ---- */

typedef struct text {
    char *bytes; /* NULL without memory, and it stays so; else it ends with a NUL */
    size_t length;
} text;

static text text_new(void) {
    return (text){.bytes = calloc(1, 1)};
}

static void text_append(text *to, const char *bytes, size_t length) {
    if (to->bytes == NULL) {
        return;
    }
    char *grown = realloc(to->bytes, to->length + length + 1);
    if (grown == NULL) {
        free(to->bytes);
        to->bytes = NULL;
        return;
    }
    memcpy(grown + to->length, bytes, length);
    grown[to->length + length] = '\0';
    to->bytes = grown;
    to->length += length;
}

static void text_append_string(text *to, const char *string) {
    text_append(to, string, strlen(string));
}

/* A field of a key; the length keeps one field from looking like two. */
static void text_append_field(text *to, const char *name, const char *value) {
    char head[64];
    snprintf(head, sizeof head, "%s %zu ", name, strlen(value));
    text_append_string(to, head);
    text_append_string(to, value);
    text_append_string(to, "\n");
}

static loglin_status check_text(const text *made) {
    if (made->bytes == NULL) {
        loglin_fail(LOGLIN_OUT_OF_MEMORY, "no memory for the text of a program");
        return LOGLIN_OUT_OF_MEMORY;
    }
    return LOGLIN_OK;
}

/* ---- What is built: sources, options, keys ---- */

typedef struct recipe {
    text files;   /* "cl/a.cl+b.cl", for messages */
    text source;  /* the files one behind the other */
    text options; /* all of them */
    bool hides;   /* the source hides instructions in comments */
} recipe;

static text memory_key(const char *const *names, const char *options) {
    text key = text_new();
    for (size_t i = 0; names[i] != NULL; i++) {
        text_append_field(&key, "file", names[i]);
    }
    text_append_field(&key, "options", options);
    return key;
}

/* #line gives the compiler's messages the name of the file. */
static loglin_status load_sources(const char *const *names, text *source) {
    for (size_t i = 0; names[i] != NULL; i++) {
        size_t length = 0;
        const char *file = loglin_kernel_source(names[i], &length);
        if (file == NULL) {
            return loglin_fail(LOGLIN_INTERNAL, "there is no kernel file cl/%s in the library", names[i]);
        }
        text_append_string(source, "#line 1 \"");
        text_append_string(source, names[i]);
        text_append_string(source, "\"\n");
        text_append(source, file, length);
        text_append_string(source, "\n");
    }
    return LOGLIN_OK;
}

static text describe_files(const char *const *names) {
    text described = text_new();
    for (size_t i = 0; names[i] != NULL; i++) {
        text_append_string(&described, i == 0 ? "cl/" : "+");
        text_append_string(&described, names[i]);
    }
    return described;
}

/* Intel's compiler addresses a buffer with 32 bits unless it is told that one may be larger. */
static bool needs_large_buffer_option(const loglin_device_info *info) {
    const uint64_t four_gigabytes = (uint64_t)1 << 32;
    return info->type == CL_DEVICE_TYPE_GPU && strstr(info->vendor, "Intel") != NULL &&
           (info->max_allocation > four_gigabytes || info->global_memory > four_gigabytes);
}

static text build_options(const loglin_device *device, const char *options) {
    text all = text_new();
    text_append_string(&all, "-cl-std=CL1.2");
    const char *const parts[] = {
        options,
        needs_large_buffer_option(&device->info) ? "-cl-intel-greater-than-4GB-buffer-required" : "",
        device->build_options,
    };
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        if (parts[i][0] != '\0') {
            text_append_string(&all, " ");
            text_append_string(&all, parts[i]);
        }
    }
    return all;
}

/* All that decides whether a binary is the right one. */
static text cache_key(const loglin_device *device, const char *source, const char *options) {
    const loglin_device_info *info = &device->info;
    char platform_version[256] = "";
    clGetPlatformInfo(info->platform, CL_PLATFORM_VERSION, sizeof platform_version, platform_version, NULL);
    text key = text_new();
    text_append_field(&key, "loglin", loglin_version());
    text_append_field(&key, "platform", info->platform_name);
    text_append_field(&key, "platform version", platform_version);
    text_append_field(&key, "device", info->name);
    text_append_field(&key, "vendor", info->vendor);
    text_append_field(&key, "device version", info->version);
    text_append_field(&key, "driver", info->driver);
    text_append_field(&key, "options", options);
    text_append_field(&key, "source", source);
    return key;
}

/* ---- Building ---- */

/* For the caller to free; NULL if there is none. */
static char *build_log(cl_program program, cl_device_id id) {
    size_t size = 0;
    if (clGetProgramBuildInfo(program, id, CL_PROGRAM_BUILD_LOG, 0, NULL, &size) != CL_SUCCESS) {
        return NULL;
    }
    char *log = calloc(size + 1, 1);
    if (log != NULL && clGetProgramBuildInfo(program, id, CL_PROGRAM_BUILD_LOG, size, log, NULL) != CL_SUCCESS) {
        log[0] = '\0';
    }
    return log;
}

/* The first line with "error" in it, or the first line that is not empty, or "". */
static const char *first_error(const char *log, int *length) {
    const char *line = strstr(log, "error");
    if (line != NULL) {
        while (line > log && line[-1] != '\n') {
            line--;
        }
    } else {
        line = log + strspn(log, " \t\r\n");
    }
    const size_t whole = strcspn(line, "\r\n");
    *length = (int)(whole < 1500 ? whole : 1500);
    return line;
}

static void report_build(const loglin_device *device, const recipe *what, cl_program program, cl_int code) {
    char *log = build_log(program, device->id);
    int length = 0;
    const char *line = log != NULL ? first_error(log, &length) : "";
    loglin_fail(LOGLIN_BUILD_FAILED, "%s (options %.200s): %.*s%s%s", what->files.bytes, what->options.bytes, length,
                line, length > 0 ? ": " : "", loglin_strerror(code));
    loglin_log(LOGLIN_LOG_DEBUG, "build log of %s on %s, options %s:\n%s", what->files.bytes, device->info.name,
               what->options.bytes, log != NULL ? log : "");
    free(log);
}

static loglin_status build_source(const loglin_device *device, const recipe *what, cl_program *program) {
    cl_int code = CL_SUCCESS;
    const char *bytes = what->source.bytes;
    cl_program made = clCreateProgramWithSource(device->context, 1, &bytes, &what->source.length, &code);
    if (code != CL_SUCCESS) {
        return loglin_fail(code, "clCreateProgramWithSource: %s", loglin_strerror(code));
    }
    code = clBuildProgram(made, 1, &device->id, what->options.bytes, NULL, NULL);
    if (code != CL_SUCCESS) {
        report_build(device, what, made, code);
        clReleaseProgram(made);
        return LOGLIN_BUILD_FAILED;
    }
    *program = made;
    return LOGLIN_OK;
}

/* ---- The cache directory ---- */

/* NULL if the driver does not take it. */
static cl_program program_of_binary(const loglin_device *device, const unsigned char *bytes, size_t size,
                                    const char *options) {
    cl_int code = CL_SUCCESS;
    cl_int loaded = CL_SUCCESS;
    cl_program program = clCreateProgramWithBinary(device->context, 1, &device->id, &size, &bytes, &loaded, &code);
    if (code == CL_SUCCESS && loaded == CL_SUCCESS) {
        code = clBuildProgram(program, 1, &device->id, options, NULL, NULL);
    }
    if (code == CL_SUCCESS && loaded == CL_SUCCESS) {
        return program;
    }
    loglin_log(LOGLIN_LOG_INFO, "the driver does not take a stored program: %s",
               loglin_strerror(code != CL_SUCCESS ? code : loaded));
    if (program != NULL) {
        clReleaseProgram(program);
    }
    return NULL;
}

/* NULL if there is no entry, or the driver does not take it. */
static cl_program load_binary(const loglin_device *device, const char *key, const char *options) {
    size_t size = 0;
    unsigned char *binary = loglin_cache_load(device->cache_directory, key, &size);
    if (binary == NULL) {
        return NULL;
    }
    cl_program program = program_of_binary(device, binary, size, options);
    free(binary);
    return program;
}

/* The device's place in the arrays that OpenCL gives for a program, and their length; false if it fails. */
static bool find_in_program(cl_program program, cl_device_id id, size_t *place, size_t *count) {
    size_t size = 0;
    if (clGetProgramInfo(program, CL_PROGRAM_DEVICES, 0, NULL, &size) != CL_SUCCESS) {
        return false;
    }
    cl_device_id *ids = calloc(size + 1, 1);
    if (ids == NULL) {
        return false;
    }
    *count = size / sizeof *ids;
    *place = *count;
    if (clGetProgramInfo(program, CL_PROGRAM_DEVICES, size, ids, NULL) == CL_SUCCESS) {
        for (*place = 0; *place < *count && ids[*place] != id; (*place)++) {
        }
    }
    free(ids);
    return *place < *count;
}

/* For the caller to free, with a NUL behind it; NULL if the driver gives none. */
static unsigned char *program_binary(cl_program program, cl_device_id id, size_t *size) {
    size_t place = 0;
    size_t count = 0;
    if (!find_in_program(program, id, &place, &count)) {
        return NULL;
    }
    size_t *sizes = calloc(count, sizeof *sizes);
    unsigned char **binaries = calloc(count, sizeof *binaries); /* NULL: that device's binary is not wanted */
    unsigned char *binary = NULL;
    if (sizes != NULL && binaries != NULL &&
        clGetProgramInfo(program, CL_PROGRAM_BINARY_SIZES, count * sizeof *sizes, sizes, NULL) == CL_SUCCESS &&
        sizes[place] > 0) {
        *size = sizes[place];
        binary = calloc(*size + 1, 1);
        binaries[place] = binary;
    }
    if (binary != NULL &&
        clGetProgramInfo(program, CL_PROGRAM_BINARIES, count * sizeof *binaries, binaries, NULL) != CL_SUCCESS) {
        free(binary);
        binary = NULL;
    }
    free(sizes);
    free(binaries);
    return binary;
}

static void store_binary(const loglin_device *device, const char *key, cl_program program) {
    if (!loglin_cache_is_writable(device->cache_directory)) {
        return; /* before the binary: it costs some drivers another compilation */
    }
    size_t size = 0;
    unsigned char *binary = program_binary(program, device->id, &size);
    if (binary != NULL) {
        loglin_cache_store(device->cache_directory, key, binary, size);
        free(binary);
    }
}

/* ---- Hidden instructions ---- */

/* The PTX with its hidden instructions uncovered and its target set to what has them; it is empty if this is no such PTX. */
static text uncover(const char *ptx) {
    static const char mark[] = "//WG ", target[] = ".target sm_90,";
    text uncovered = text_new();
    const char *found = strstr(ptx, target);
    if (found == NULL) {
        return uncovered;
    }
    text_append(&uncovered, ptx, (size_t)(found - ptx));
    text_append_string(&uncovered, ".target sm_90a,");
    const char *rest = found + strlen(target);
    while ((found = strstr(rest, mark)) != NULL) {
        text_append(&uncovered, rest, (size_t)(found - rest));
        rest = found + strlen(mark);
    }
    text_append_string(&uncovered, rest);
    return uncovered;
}

static loglin_status build_hidden(const loglin_device *device, const recipe *what, cl_program *program) {
    cl_program covered = NULL;
    RETURN_IF_ERROR(build_source(device, what, &covered));
    size_t size = 0;
    char *ptx = (char *)program_binary(covered, device->id, &size); /* ends with a NUL */
    clReleaseProgram(covered);
    text uncovered = uncover(ptx != NULL ? ptx : "");
    free(ptx);
    loglin_status status = check_text(&uncovered);
    if (status == LOGLIN_OK) {
        *program = uncovered.length == 0 ? NULL
                                         : program_of_binary(device, (const unsigned char *)uncovered.bytes,
                                                             uncovered.length + 1, what->options.bytes);
        status = *program != NULL ? LOGLIN_OK
                                  : loglin_fail(LOGLIN_BUILD_FAILED, "%s (options %.200s): hidden instructions: %s",
                                                what->files.bytes, what->options.bytes,
                                                uncovered.length == 0 ? "the program binary is not PTX for sm_90"
                                                                      : "the driver does not take the program");
    }
    free(uncovered.bytes);
    return status;
}

/* ---- The program ---- */

static loglin_status build(const loglin_device *device, const recipe *what, cl_program *program) {
    return what->hides ? build_hidden(device, what, program) : build_source(device, what, program);
}

static loglin_status load_or_build(const loglin_device *device, const recipe *what, cl_program *program) {
    if (device->cache_directory == NULL) {
        return build(device, what, program);
    }
    text key = cache_key(device, what->source.bytes, what->options.bytes);
    loglin_status status = check_text(&key);
    if (status == LOGLIN_OK) {
        *program = load_binary(device, key.bytes, what->options.bytes);
        if (*program == NULL) {
            status = build(device, what, program);
            if (status == LOGLIN_OK) {
                store_binary(device, key.bytes, *program);
            }
        }
    }
    free(key.bytes);
    return status;
}

static loglin_status write_recipe(const loglin_device *device, const char *const *names, const char *options,
                                  recipe *what) {
    what->files = describe_files(names);
    what->options = build_options(device, options);
    what->hides = strstr(what->options.bytes != NULL ? what->options.bytes : "", LOGLIN_HIDDEN_INSTRUCTIONS) != NULL;
    what->source = text_new();
    RETURN_IF_ERROR(load_sources(names, &what->source));
    RETURN_IF_ERROR(check_text(&what->files));
    RETURN_IF_ERROR(check_text(&what->options));
    return check_text(&what->source);
}

static loglin_status make_program(const loglin_device *device, const char *const *names, const char *options,
                                  cl_program *program) {
    recipe what;
    loglin_status status = write_recipe(device, names, options, &what);
    if (status == LOGLIN_OK) {
        status = load_or_build(device, &what, program);
    }
    free(what.files.bytes);
    free(what.options.bytes);
    free(what.source.bytes);
    return status;
}

/* With the device's lock held; takes key. */
static loglin_status find_or_make(loglin_device *device, char *key, const char *const *names, const char *options,
                                  cl_program *program) {
    for (const struct loglin_program *known = device->programs; known != NULL; known = known->next) {
        if (strcmp(known->key, key) == 0) {
            *program = known->program;
            free(key);
            return LOGLIN_OK;
        }
    }
    struct loglin_program *made = calloc(1, sizeof *made);
    if (made == NULL) {
        free(key);
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "no memory for a program");
    }
    const loglin_status status = make_program(device, names, options, &made->program);
    if (status != LOGLIN_OK) {
        free(made);
        free(key);
        return status;
    }
    made->key = key;
    made->next = device->programs;
    device->programs = made;
    *program = made->program;
    return LOGLIN_OK;
}

loglin_status loglin_program_get(loglin_device *device, const char *const *names, const char *options,
                                 cl_program *program) {
    text key = memory_key(names, options);
    RETURN_IF_ERROR(check_text(&key));
    mtx_lock(&device->lock);
    const loglin_status status = find_or_make(device, key.bytes, names, options, program);
    mtx_unlock(&device->lock);
    return status;
}

loglin_status loglin_kernels_get(loglin_device *device, const char *const *names, const char *options,
                                 const char *const *kernels, size_t count, cl_kernel *made) {
    cl_program program = NULL;
    RETURN_IF_ERROR(loglin_program_get(device, names, options, &program));
    for (size_t i = 0; i < count; i++) {
        cl_int code = CL_SUCCESS;
        made[i] = clCreateKernel(program, kernels[i], &code);
        if (code != CL_SUCCESS) {
            made[i] = NULL;
            return loglin_fail(code, "clCreateKernel(%s): %s", kernels[i], loglin_strerror(code));
        }
    }
    return LOGLIN_OK;
}
