/* SPDX-License-Identifier: Apache-2.0 */
/* Implementation of support_limits.h. */
#define _GNU_SOURCE /* RTLD_NEXT, setenv */

#include "support_limits.h"
#include "support.h"

#include <CL/cl_ext.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- The limits -------------------------------------------------------------------------------------------------- */

typedef struct device_limits {
    bool given; /* any of those below */
    bool cpu, gpu, no_double, no_half, no_subgroups;
    size_t local, group, allocation, memory; /* 0: the device's own */
    char vendor[64];                         /* "": the device's own */
} device_limits;

static device_limits limits;
static bool limits_known;

static void parse_word(const char *word) {
    const struct {
        const char *name;
        bool *flag;
    } flags[] = {{"cpu", &limits.cpu},
                 {"gpu", &limits.gpu},
                 {"no-double", &limits.no_double},
                 {"no-half", &limits.no_half},
                 {"no-subgroups", &limits.no_subgroups}};
    const struct {
        const char *name;
        size_t *size;
    } sizes[] = {{"local=", &limits.local},
                 {"group=", &limits.group},
                 {"allocation=", &limits.allocation},
                 {"memory=", &limits.memory}};
    for (size_t i = 0; i < sizeof flags / sizeof flags[0]; i++) {
        if (strcmp(word, flags[i].name) == 0) {
            *flags[i].flag = true;
            return;
        }
    }
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        const size_t length = strlen(sizes[i].name);
        if (strncmp(word, sizes[i].name, length) == 0) {
            char *end;
            *sizes[i].size = strtoull(word + length, &end, 10);
            if (*sizes[i].size > 0 && *end == '\0') {
                return;
            }
        }
    }
    if (strncmp(word, "vendor=", 7) == 0 && strlen(word + 7) < sizeof limits.vendor) {
        (void)snprintf(limits.vendor, sizeof limits.vendor, "%s", word + 7);
        return;
    }
    support_die("the limits of the device have \"%s\", which support_limits.h does not know", word);
}

void support_limit_device(const char *text) {
    limits = (device_limits){.given = text != NULL && text[0] != '\0'};
    limits_known = true;
    char *copy = strdup(text != NULL ? text : ""), *rest = copy;
    for (char *word = strtok_r(rest, ",", &rest); word != NULL; word = strtok_r(NULL, ",", &rest)) {
        parse_word(word);
    }
    free(copy);
}

/* The one that the device emulates, or "". */
static char emulated[32];

void support_emulate(const char *instruction, const char *options) {
    const bool intel = strncmp(instruction, "DPAS", 4) == 0 || strncmp(instruction, "FMA", 3) == 0;
    /* With more memory the library adds an option that Intel's compiler alone knows. */
    static const size_t gigabyte = (size_t)1 << 30;
    char text[160];
    (void)snprintf(text, sizeof text, "gpu,vendor=%s,memory=%zu,allocation=%zu",
                   intel ? "Intel" : "Advanced Micro Devices", gigabyte, gigabyte);
    support_limit_device(text);
    (void)snprintf(text, sizeof text, "-DMMA_EMULATED=%s %s", instruction, options);
    (void)setenv("LOGLIN_BUILD_OPTIONS", text, 1);
    (void)snprintf(emulated, sizeof emulated, "%s", instruction);
}

/* Would its compiler know the instruction that these options name?  cl/mma_layouts.cl asks too, but to Oclgrind a build that
 * fails is a fault. */
static bool has_instruction(const char *options) {
    static const char wanted[] = "-DMMA_INSTRUCTION=";
    const char *at = options != NULL ? strstr(options, wanted) : NULL;
    const size_t length = strlen(emulated);
    return at == NULL || length == 0 ||
           (strncmp(at + strlen(wanted), emulated, length) == 0 && strcspn(at + strlen(wanted), " ") == length);
}

static const device_limits *get_limits(void) {
    if (!limits_known) {
        support_limit_device(getenv("LOGLIN_TEST_LIMITS"));
    }
    return &limits;
}

bool support_is_limited(void) {
    return get_limits()->given;
}

/* ---- What the device says of itself ------------------------------------------------------------------------------ */

/* For CLBlast, a shared library, to find the functions below. */
#pragma GCC visibility push(default)

/* The loader's function of this name, behind the one here. */
#define NEXT(name)                                                                                                     \
    static __typeof__(&name) next;                                                                                     \
    if (next == NULL) {                                                                                                \
        *(void **)&next = dlsym(RTLD_NEXT, #name);                                                                     \
    }                                                                                                                  \
    if (next == NULL) {                                                                                                \
        support_die("the OpenCL loader has no " #name);                                                                \
    }

bool support_is_gpu(void) {
    NEXT(clGetDeviceInfo)
    cl_device_id id = NULL;
    cl_device_type type = 0;
    support_require(loglin_select_device(NULL, &id), "loglin_select_device");
    support_require(next(id, CL_DEVICE_TYPE, sizeof type, &type, NULL), "CL_DEVICE_TYPE");
    return (type & CL_DEVICE_TYPE_GPU) != 0;
}

void support_build_fast(void) {
    if (!support_is_gpu()) {
        (void)setenv("LOGLIN_BUILD_OPTIONS", "-cl-opt-disable", 1);
    }
}

static void cap_size(void *value, size_t most) {
    size_t size;
    memcpy(&size, value, sizeof size);
    if (most > 0 && size > most) {
        memcpy(value, &most, sizeof most);
    }
}

static void cap_ulong(void *value, cl_ulong most) {
    cl_ulong size;
    memcpy(&size, value, sizeof size);
    if (most > 0 && size > most) {
        memcpy(value, &most, sizeof most);
    }
}

/* Overwrites the names of missing extensions by blanks. */
static void remove_extensions(char *text, const device_limits *of) {
    const struct {
        bool missing;
        const char *part;
    } parts[] = {{of->no_double, "cl_khr_fp64"},
                 {of->no_half, "cl_khr_fp16"},
                 {of->no_subgroups, "cl_khr_subgroup"},
                 {of->no_subgroups, "cl_intel_subgroup"}};
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        for (char *at = text; parts[i].missing && (at = strstr(at, parts[i].part)) != NULL;) {
            while (*at != '\0' && *at != ' ') {
                *at++ = ' ';
            }
        }
    }
}

static void limit_answer(cl_device_info what, size_t size, void *value, const device_limits *of) {
    switch (what) {
    case CL_DEVICE_TYPE:
        if (of->cpu || of->gpu) {
            memcpy(value, &(cl_device_type){of->cpu ? CL_DEVICE_TYPE_CPU : CL_DEVICE_TYPE_GPU}, sizeof(cl_device_type));
        }
        return;
    case CL_DEVICE_NATIVE_VECTOR_WIDTH_FLOAT:
    case CL_DEVICE_PREFERRED_VECTOR_WIDTH_FLOAT:
        if (of->gpu) {
            memcpy(value, &(cl_uint){1}, sizeof(cl_uint));
        }
        return;
    case CL_DEVICE_LOCAL_MEM_SIZE:
        cap_ulong(value, of->local);
        return;
    case CL_DEVICE_MAX_MEM_ALLOC_SIZE:
        cap_ulong(value, of->allocation);
        return;
    case CL_DEVICE_GLOBAL_MEM_SIZE:
        cap_ulong(value, of->memory);
        return;
    case CL_DEVICE_MAX_WORK_GROUP_SIZE:
        cap_size(value, of->group);
        return;
    case CL_DEVICE_MAX_WORK_ITEM_SIZES:
        for (size_t at = 0; at < size; at += sizeof(size_t)) {
            cap_size((char *)value + at, of->group);
        }
        return;
    case CL_DEVICE_EXTENSIONS:
        remove_extensions(value, of);
        return;
    case CL_DEVICE_DOUBLE_FP_CONFIG:
        if (of->no_double) {
            memset(value, 0, size);
        }
        return;
    case CL_DEVICE_HALF_FP_CONFIG:
        if (of->no_half) {
            memset(value, 0, size);
        }
        return;
    case CL_DEVICE_MAX_NUM_SUB_GROUPS:
        if (of->no_subgroups) {
            memset(value, 0, size);
        }
        return;
    default:
        return;
    }
}

static cl_int answer_text(const char *text, size_t capacity, char *value, size_t *size) {
    const size_t whole = strlen(text) + 1;
    if (value != NULL && capacity < whole) {
        return CL_INVALID_VALUE;
    }
    if (value != NULL) {
        memcpy(value, text, whole);
    }
    if (size != NULL) {
        *size = whole;
    }
    return CL_SUCCESS;
}

CL_API_ENTRY cl_int CL_API_CALL clGetDeviceInfo(cl_device_id device, cl_device_info what, size_t capacity, void *value,
                                                size_t *size) {
    NEXT(clGetDeviceInfo)
    if (what == CL_DEVICE_VENDOR && get_limits()->vendor[0] != '\0') {
        return answer_text(limits.vendor, capacity, value, size);
    }
    if (what == CL_DEVICE_VENDOR && limits.gpu) {
        cl_device_type type = 0; /* "GenuineIntel", a processor's, would be taken for a GPU of Intel's */
        const cl_int code = next(device, CL_DEVICE_TYPE, sizeof type, &type, NULL);
        if (code != CL_SUCCESS || type == CL_DEVICE_TYPE_CPU) {
            return code != CL_SUCCESS ? code : answer_text("none", capacity, value, size);
        }
    }
    size_t written = 0;
    const cl_int code = next(device, what, capacity, value, &written);
    if (code == CL_SUCCESS && value != NULL && support_is_limited()) {
        limit_answer(what, written, value, &limits);
    }
    if (size != NULL) {
        *size = written;
    }
    return code;
}

CL_API_ENTRY cl_int CL_API_CALL clGetKernelWorkGroupInfo(cl_kernel kernel, cl_device_id device,
                                                         cl_kernel_work_group_info what, size_t capacity, void *value,
                                                         size_t *size) {
    NEXT(clGetKernelWorkGroupInfo)
    const cl_int code = next(kernel, device, what, capacity, value, size);
    if (code == CL_SUCCESS && value != NULL && what == CL_KERNEL_WORK_GROUP_SIZE) {
        cap_size(value, get_limits()->group);
    }
    return code;
}

/* ---- What its driver refuses ------------------------------------------------------------------------------------- */

static size_t refusals;

size_t support_refusals(void) {
    return refusals;
}

/* Says on standard error which limit it was: a refusal that the library should have made itself is hard to find. */
static cl_int refuse(cl_int code, const char *what, size_t wanted, size_t most) {
    refusals++;
    fprintf(stderr, "the limited device refuses %s: %zu, at most %zu\n", what, wanted, most);
    return code;
}

CL_API_ENTRY cl_mem CL_API_CALL clCreateBuffer(cl_context context, cl_mem_flags flags, size_t size, void *contents,
                                               cl_int *code) {
    NEXT(clCreateBuffer)
    const size_t most = get_limits()->allocation;
    if (most > 0 && size > most) {
        const cl_int refused = refuse(CL_INVALID_BUFFER_SIZE, "a buffer of bytes", size, most);
        if (code != NULL) {
            *code = refused;
        }
        return NULL;
    }
    return next(context, flags, size, contents, code);
}

static char *(*edit_source)(const char *source);

void support_edit_sources(char *(*edit)(const char *source)) {
    edit_source = edit;
}

/* The text, edited or as it is, for free(). */
static char *copy_source(const char *source, size_t length) {
    char *copy = length > 0 ? strndup(source, length) : strdup(source);
    char *edited = edit_source != NULL ? edit_source(copy) : NULL;
    if (edited == NULL) {
        return copy;
    }
    free(copy);
    return edited;
}

CL_API_ENTRY cl_program CL_API_CALL clCreateProgramWithSource(cl_context context, cl_uint count, const char **strings,
                                                              const size_t *lengths, cl_int *code) {
    NEXT(clCreateProgramWithSource)
    char **all = support_alloc(count, sizeof *all);
    for (cl_uint i = 0; i < count; i++) {
        all[i] = copy_source(strings[i], lengths != NULL ? lengths[i] : 0);
    }
    cl_program program = next(context, count, (const char **)all, NULL, code);
    for (cl_uint i = 0; i < count; i++) {
        free(all[i]);
    }
    free(all);
    return program;
}

/*
 * Does the program build where double is a name that tells why it does not?  A trial of its own, so that the program itself
 * is the one that the driver's cache has from devices with double.
 */
static cl_int build_without_double(__typeof__(&clBuildProgram) build, cl_program program, cl_uint count,
                                   const cl_device_id *devices, const char *options) {
    NEXT(clCreateProgramWithSource)
    static const char without_double[] = "#define double this_device_has_no_double\n";
    cl_context context = NULL;
    size_t size = 0;
    support_require(clGetProgramInfo(program, CL_PROGRAM_CONTEXT, sizeof(cl_context), &context, NULL), "context");
    support_require(clGetProgramInfo(program, CL_PROGRAM_SOURCE, 0, NULL, &size), "CL_PROGRAM_SOURCE");
    char *source = support_alloc(size + 1, 1);
    support_require(clGetProgramInfo(program, CL_PROGRAM_SOURCE, size, source, NULL), "CL_PROGRAM_SOURCE");
    cl_int code = CL_SUCCESS;
    cl_program trial = next(context, 2, (const char *[]){without_double, source}, NULL, &code);
    support_require(code, "clCreateProgramWithSource");
    code = build(trial, count, devices, options, NULL, NULL);
    clReleaseProgram(trial);
    free(source);
    return code;
}

/* Options without those that Intel's compiler alone knows: the device may only say that it is a GPU of theirs. */
static void copy_known(const char *options, char *known, size_t capacity) {
    static const char prefix[] = "-cl-intel-";
    if (strlen(options) >= capacity) {
        support_die("build options of %zu characters", strlen(options));
    }
    known[0] = '\0';
    for (const char *word = options; *word != '\0';) {
        const size_t of_word = strcspn(word, " "), length = of_word + strspn(word + of_word, " ");
        if (strncmp(word, prefix, strlen(prefix)) != 0) {
            (void)strncat(known, word, length);
        }
        word += length;
    }
}

CL_API_ENTRY cl_int CL_API_CALL clBuildProgram(cl_program program, cl_uint count, const cl_device_id *devices,
                                               const char *options, void(CL_CALLBACK *notify)(cl_program, void *),
                                               void *data) {
    NEXT(clBuildProgram)
    char known[2048];
    if (!has_instruction(options)) {
        return CL_BUILD_PROGRAM_FAILURE;
    }
    if (options != NULL && (get_limits()->gpu || get_limits()->vendor[0] != '\0')) {
        copy_known(options, known, sizeof known);
        options = known;
    }
    if (get_limits()->no_double) {
        const cl_int code = build_without_double(next, program, count, devices, options);
        if (code != CL_SUCCESS) {
            fprintf(stderr, "the limited device, which has no double, does not build a program\n");
            return code;
        }
    }
    return next(program, count, devices, options, notify, data);
}

/* A binary would go past the check of the source. */
CL_API_ENTRY cl_program CL_API_CALL clCreateProgramWithBinary(cl_context context, cl_uint count,
                                                              const cl_device_id *devices, const size_t *lengths,
                                                              const unsigned char **binaries, cl_int *loaded,
                                                              cl_int *code) {
    NEXT(clCreateProgramWithBinary)
    if (support_is_limited() || edit_source != NULL) {
        if (code != NULL) {
            *code = CL_INVALID_BINARY;
        }
        return NULL;
    }
    return next(context, count, devices, lengths, binaries, loaded, code);
}

/* Nor does it give one, only an empty one: PoCL would compile all of a program's kernels for it, and CLBlast always asks. */
CL_API_ENTRY cl_int CL_API_CALL clGetProgramInfo(cl_program program, cl_program_info what, size_t capacity, void *value,
                                                 size_t *size) {
    NEXT(clGetProgramInfo)
    if (!support_is_limited() || (what != CL_PROGRAM_BINARY_SIZES && what != CL_PROGRAM_BINARIES)) {
        return next(program, what, capacity, value, size);
    }
    if (what == CL_PROGRAM_BINARY_SIZES && value != NULL) {
        memset(value, 0, capacity);
    }
    if (size != NULL) {
        *size = sizeof(void *);
    }
    return CL_SUCCESS;
}

static size_t local_memory_of(cl_command_queue queue, cl_kernel kernel) {
    cl_device_id device = NULL;
    cl_ulong bytes = 0;
    support_require(clGetCommandQueueInfo(queue, CL_QUEUE_DEVICE, sizeof(cl_device_id), &device, NULL), "queue");
    support_require(clGetKernelWorkGroupInfo(kernel, device, CL_KERNEL_LOCAL_MEM_SIZE, sizeof bytes, &bytes, NULL),
                    "CL_KERNEL_LOCAL_MEM_SIZE");
    return (size_t)bytes;
}

/* ---- What was launched ------------------------------------------------------------------------------------------- */

typedef struct launch {
    char kernel[48];
    size_t items, count;
} launch;

static launch launches[64]; /* those beyond are not counted */
static pthread_mutex_t launches_lock = PTHREAD_MUTEX_INITIALIZER;

static void count_launch(cl_kernel kernel, size_t items) {
    char name[sizeof launches[0].kernel];
    if (clGetKernelInfo(kernel, CL_KERNEL_FUNCTION_NAME, sizeof name, name, NULL) != CL_SUCCESS) {
        return; /* a longer name */
    }
    pthread_mutex_lock(&launches_lock);
    size_t at = 0;
    while (at < sizeof launches / sizeof launches[0] && launches[at].count > 0 &&
           (launches[at].items != items || strcmp(launches[at].kernel, name) != 0)) {
        at++;
    }
    if (at < sizeof launches / sizeof launches[0]) {
        memcpy(launches[at].kernel, name, sizeof name);
        launches[at].items = items;
        launches[at].count++;
    }
    pthread_mutex_unlock(&launches_lock);
}

size_t support_launches(const char *kernel, size_t items) {
    size_t count = 0;
    pthread_mutex_lock(&launches_lock);
    for (size_t at = 0; at < sizeof launches / sizeof launches[0]; at++) {
        if (strcmp(launches[at].kernel, kernel) == 0 && (items == 0 || launches[at].items == items)) {
            count += launches[at].count;
        }
    }
    pthread_mutex_unlock(&launches_lock);
    return count;
}

CL_API_ENTRY cl_int CL_API_CALL clEnqueueNDRangeKernel(cl_command_queue queue, cl_kernel kernel, cl_uint dimensions,
                                                       const size_t *offset, const size_t *global, const size_t *local,
                                                       cl_uint num_wait, const cl_event *wait, cl_event *event) {
    NEXT(clEnqueueNDRangeKernel)
    const device_limits *of = get_limits();
    size_t items = 1;
    for (cl_uint i = 0; i < dimensions && local != NULL; i++) {
        items *= local[i];
    }
    if (of->group > 0 && items > of->group) {
        return refuse(CL_INVALID_WORK_GROUP_SIZE, "a work-group of items", items, of->group);
    }
    if (of->local > 0 && local_memory_of(queue, kernel) > of->local) {
        return refuse(CL_OUT_OF_RESOURCES, "bytes of local memory", local_memory_of(queue, kernel), of->local);
    }
    count_launch(kernel, items);
    return next(queue, kernel, dimensions, offset, global, local, num_wait, wait, event);
}

#pragma GCC visibility pop
