/* SPDX-License-Identifier: Apache-2.0 */
/*
 * list_programs [--all] TARGET FOLDER: the programs that the library builds on a GPU that is not there.
 *
 * Plans are made, and models opened, as on a device of that kind; for this some of OpenCL's functions are defined here, in
 * front of the loader's: the device describes itself as the target, programs are written to FOLDER in place of being built,
 * and nothing runs.  What a device is asked by a trial run (the --wrap options in CMakeLists.txt) is answered by the table
 * of targets.  For each program there is FOLDER/HASH.cl, and a line on standard output:
 *     HASH, what it was first wanted for, its build options        with tabs between
 */
#define _GNU_SOURCE /* RTLD_NEXT */

#include "engine/gemm.h"
#include "engine/lanes.h"
#include "engine/nvidia.h"
#include "engine/nvidia_product.h"
#include "loglin_model.h"
#include "support.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- The targets ------------------------------------------------------------------------------------------------- */

typedef struct target {
    const char *name, *vendor;
    size_t group, local;
    size_t most_local; /* NVIDIA: what the driver gives a group that has mma.sync with bfloat16 and cp.async, or 0 */
    bool has_wgmma;    /* hidden from the OpenCL compiler: src/runtime/program.c */
    const char *instruction; /* of cl/mma_layouts.cl, or NULL */
    const char *shuffles;    /* Intel: for floats, or NULL */
} target;

static const target targets[] = {
    {"gfx90a", "Advanced Micro Devices, Inc.", 256, 65536, 0, false, "MFMA_32X32X8", NULL},
    {"gfx942", "Advanced Micro Devices, Inc.", 256, 65536, 0, false, "MFMA_32X32X8", NULL},
    {"gfx950", "Advanced Micro Devices, Inc.", 256, 65536, 0, false, "MFMA_32X32X8", NULL},
    {"gfx1030", "Advanced Micro Devices, Inc.", 256, 65536, 0, false, NULL, NULL},
    {"gfx1100", "Advanced Micro Devices, Inc.", 256, 65536, 0, false, "WMMA_GFX11", NULL},
    {"gfx1201", "Advanced Micro Devices, Inc.", 256, 65536, 0, false, "WMMA_GFX12", NULL},
    {"skl", "Intel(R) Corporation", 256, 65536, 0, false, NULL, "FMA_8X8X8"},
    {"tgllp", "Intel(R) Corporation", 512, 65536, 0, false, NULL, "FMA_8X8X8"},
    {"dg2", "Intel(R) Corporation", 512, 65536, 0, false, "DPAS_8X8X16", "FMA_8X8X8"},
    {"pvc", "Intel(R) Corporation", 512, 131072, 0, false, "DPAS_8X16X16", "FMA_8X16X16"},
    {"sm_70", "NVIDIA Corporation", 1024, 49152, 0, false, NULL, NULL},
    {"sm_80", "NVIDIA Corporation", 1024, 49152, 166912, false, NULL, NULL},
    {"sm_90", "NVIDIA Corporation", 1024, 49152, 232448, true, NULL, NULL},
    {"sm_120", "NVIDIA Corporation", 1024, 49152, 101376, false, NULL, NULL},
    {"spirv", "any", 256, 32768, 0, false, NULL, NULL}, /* what a driver that knows nothing better is given */
};

static const target *the_target;

/* ---- The device that is not there -------------------------------------------------------------------------------- */

#pragma GCC visibility push(default)

CL_API_ENTRY cl_int CL_API_CALL clGetDeviceInfo(cl_device_id device, cl_device_info what, size_t capacity, void *value,
                                                size_t *size) {
    static __typeof__(&clGetDeviceInfo) next;
    *(void **)&next = dlsym(RTLD_NEXT, "clGetDeviceInfo");
    const cl_device_type type = CL_DEVICE_TYPE_GPU;
    const cl_ulong local = the_target->local, memory = (cl_ulong)64 << 30;
    const cl_uint units = 64, width = 1;
    const struct {
        cl_device_info what;
        const void *value;
        size_t size;
    } answers[] = {{CL_DEVICE_TYPE, &type, sizeof type},
                   {CL_DEVICE_NAME, the_target->name, strlen(the_target->name) + 1},
                   {CL_DEVICE_VENDOR, the_target->vendor, strlen(the_target->vendor) + 1},
                   {CL_DEVICE_MAX_WORK_GROUP_SIZE, &the_target->group, sizeof(size_t)},
                   {CL_DEVICE_LOCAL_MEM_SIZE, &local, sizeof local},
                   {CL_DEVICE_MAX_MEM_ALLOC_SIZE, &memory, sizeof memory},
                   {CL_DEVICE_GLOBAL_MEM_SIZE, &memory, sizeof memory},
                   {CL_DEVICE_MAX_COMPUTE_UNITS, &units, sizeof units},
                   {CL_DEVICE_NATIVE_VECTOR_WIDTH_FLOAT, &width, sizeof width}};
    for (size_t i = 0; i < sizeof answers / sizeof answers[0]; i++) {
        if (answers[i].what == what) {
            if (value != NULL) {
                memcpy(value, answers[i].value, answers[i].size < capacity ? answers[i].size : capacity);
            }
            if (size != NULL) {
                *size = answers[i].size;
            }
            return CL_SUCCESS;
        }
    }
    return next(device, what, capacity, value, size);
}

/* What programs and kernels are here. */
typedef struct listed {
    char *text; /* NULL: a kernel, or made of a binary */
} listed;

CL_API_ENTRY cl_program CL_API_CALL clCreateProgramWithSource(cl_context context, cl_uint count, const char **strings,
                                                              const size_t *lengths, cl_int *code) {
    (void)context;
    size_t length = 0;
    listed *made = support_alloc(1, sizeof *made);
    for (cl_uint i = 0; i < count; i++) {
        const size_t more = lengths != NULL && lengths[i] > 0 ? lengths[i] : strlen(strings[i]);
        char *grown = realloc(made->text, length + more + 1);
        if (grown == NULL) {
            support_die("out of memory for %zu bytes", length + more);
        }
        memcpy(grown + length, strings[i], more);
        length += more;
        grown[length] = '\0';
        made->text = grown;
    }
    *code = CL_SUCCESS;
    return (cl_program)made;
}

CL_API_ENTRY cl_program CL_API_CALL clCreateProgramWithBinary(cl_context context, cl_uint count,
                                                              const cl_device_id *devices, const size_t *lengths,
                                                              const unsigned char **binaries, cl_int *loaded,
                                                              cl_int *code) {
    (void)context, (void)count, (void)devices, (void)lengths, (void)binaries;
    *loaded = CL_SUCCESS;
    *code = CL_SUCCESS;
    return (cl_program)support_alloc(1, sizeof(listed));
}

static const char *folder, *purpose;
static cl_device_id built_for; /* the device of all programs */

/* A binary is as much PTX as src/runtime/program.c needs to see. */
CL_API_ENTRY cl_int CL_API_CALL clGetProgramInfo(cl_program program, cl_program_info what, size_t capacity, void *value,
                                                 size_t *size) {
    static const char ptx[] = ".target sm_90,";
    (void)program, (void)capacity;
    if (what == CL_PROGRAM_BINARIES) {
        memcpy(*(unsigned char **)value, ptx, sizeof ptx);
    } else if (value != NULL && what == CL_PROGRAM_BINARY_SIZES) {
        *(size_t *)value = sizeof ptx;
    } else if (value != NULL) {
        *(cl_device_id *)value = built_for;
    }
    if (size != NULL) {
        *size = what == CL_PROGRAM_DEVICES ? sizeof built_for : sizeof(size_t);
    }
    return CL_SUCCESS;
}

CL_API_ENTRY cl_int CL_API_CALL clBuildProgram(cl_program program, cl_uint count, const cl_device_id *devices,
                                               const char *options,
                                               void(CL_CALLBACK *notify)(cl_program program, void *data), void *data) {
    (void)count, (void)notify, (void)data;
    const listed *of = (const listed *)program;
    built_for = devices[0];
    if (of->text == NULL) { /* listed when it was built of its source */
        return CL_SUCCESS;
    }
    uint64_t hash = 0xcbf29ce484222325u; /* FNV-1a */
    const char *const parts[] = {of->text, options};
    for (size_t i = 0; i < 2; i++) {
        for (const char *at = parts[i]; *at != '\0'; at++) {
            hash = (hash ^ (unsigned char)*at) * 0x100000001b3u;
        }
    }
    char path[512];
    (void)snprintf(path, sizeof path, "%s/%016llx.cl", folder, (unsigned long long)hash);
    FILE *file = fopen(path, "wx");
    if (file != NULL) { /* else it was listed before */
        (void)fputs(of->text, file);
        (void)fclose(file);
        (void)printf("%016llx\t%s\t%s\n", (unsigned long long)hash, purpose, options);
    }
    return CL_SUCCESS;
}

CL_API_ENTRY cl_kernel CL_API_CALL clCreateKernel(cl_program program, const char *name, cl_int *code) {
    (void)program, (void)name;
    *code = CL_SUCCESS;
    return (cl_kernel)support_alloc(1, sizeof(listed));
}

CL_API_ENTRY cl_int CL_API_CALL clReleaseKernel(cl_kernel kernel) {
    free(kernel);
    return CL_SUCCESS;
}

CL_API_ENTRY cl_int CL_API_CALL clReleaseProgram(cl_program program) {
    free(((listed *)program)->text);
    free(program);
    return CL_SUCCESS;
}

CL_API_ENTRY cl_int CL_API_CALL clSetKernelArg(cl_kernel kernel, cl_uint index, size_t size, const void *value) {
    (void)kernel, (void)index, (void)size, (void)value;
    return CL_SUCCESS;
}

CL_API_ENTRY cl_int CL_API_CALL clEnqueueNDRangeKernel(cl_command_queue queue, cl_kernel kernel, cl_uint dimensions,
                                                       const size_t *offset, const size_t *global, const size_t *local,
                                                       cl_uint num_wait, const cl_event *wait, cl_event *event) {
    (void)queue, (void)kernel, (void)dimensions, (void)offset, (void)global, (void)local, (void)num_wait, (void)wait;
    if (event != NULL) {
        *event = NULL;
    }
    return CL_SUCCESS;
}

#pragma GCC visibility pop

/* ---- What a device is asked by a trial run ----------------------------------------------------------------------- */

loglin_status __real_loglin_nvidia_probe(loglin_device *device, loglin_dtype dtype, size_t local_bytes);
loglin_status __wrap_loglin_nvidia_probe(loglin_device *device, loglin_dtype dtype, size_t local_bytes);
loglin_status __real_loglin_nvidia_probe_wgmma(loglin_device *device, loglin_dtype dtype, size_t local_bytes);
loglin_status __wrap_loglin_nvidia_probe_wgmma(loglin_device *device, loglin_dtype dtype, size_t local_bytes);
loglin_status __real_loglin_lanes_probe(loglin_device *device, loglin_dtype dtype,
                                        const loglin_lane_schedule *schedule);
loglin_status __wrap_loglin_lanes_probe(loglin_device *device, loglin_dtype dtype,
                                        const loglin_lane_schedule *schedule);
loglin_status __wrap_loglin_gemm_prepare(loglin_device *device, const loglin_gemm_parameters *parameters);

/* The trial run's program is listed; its answer means nothing here. */
loglin_status __wrap_loglin_nvidia_probe(loglin_device *device, loglin_dtype dtype, size_t local_bytes) {
    if (local_bytes > the_target->most_local) {
        return LOGLIN_UNSUPPORTED;
    }
    (void)__real_loglin_nvidia_probe(device, dtype, local_bytes);
    return LOGLIN_OK;
}

loglin_status __wrap_loglin_nvidia_probe_wgmma(loglin_device *device, loglin_dtype dtype, size_t local_bytes) {
    if (!the_target->has_wgmma || local_bytes > the_target->most_local) {
        return LOGLIN_UNSUPPORTED;
    }
    (void)__real_loglin_nvidia_probe_wgmma(device, dtype, local_bytes);
    return LOGLIN_OK;
}

loglin_status __wrap_loglin_lanes_probe(loglin_device *device, loglin_dtype dtype,
                                        const loglin_lane_schedule *schedule) {
    const char *const own[] = {the_target->instruction, the_target->shuffles};
    bool has = false;
    for (size_t i = 0; i < sizeof own / sizeof own[0]; i++) {
        has = has || (own[i] != NULL && strcmp(schedule->instruction, own[i]) == 0);
    }
    if (!has) {
        return LOGLIN_UNSUPPORTED;
    }
    (void)__real_loglin_lanes_probe(device, dtype, schedule);
    return LOGLIN_OK;
}

/* CLBlast's kernels are CLBlast's. */
loglin_status __wrap_loglin_gemm_prepare(loglin_device *device, const loglin_gemm_parameters *parameters) {
    (void)device, (void)parameters;
    return LOGLIN_OK;
}

/* ---- What is planned --------------------------------------------------------------------------------------------- */

static void plan(loglin_device *device, loglin_problem problem, loglin_engine engine) {
    static const char *const dtypes[] = {"f32", "f16", "bf16"};
    static const char *const phases[] = {
        [LOGLIN_FORWARD] = "forward", [LOGLIN_FORWARD | LOGLIN_BACKWARD] = "backward", [LOGLIN_STEP] = "step"};
    char text[128];
    (void)snprintf(text, sizeof text, "%s %s %s %s K%zu V%zu H%zu%s", problem.op == LOGLIN_MAMBA2 ? "mamba2" : "delta",
                   problem.partition == LOGLIN_STRONG ? "strong" : "weak", dtypes[problem.dtype],
                   phases[problem.phases], problem.dim_k, problem.dim_v, problem.heads,
                   problem.normalize_qk ? " normalised" : "");
    purpose = text;
    problem.engine = engine;
    loglin_plan *made = NULL;
    const loglin_status status = loglin_plan_create(device, &problem, &made);
    if (status != LOGLIN_OK && status != LOGLIN_UNSUPPORTED) {
        support_die("%s: %s", text, loglin_last_error());
    }
    loglin_plan_destroy(made);
}

/* Fewer lanes than the device has compute units, whose chunks or values are spread over more, and lanes enough. */
enum { FEW_HEADS = 8, MANY_HEADS = 64 };

/* Every phase of a problem on every engine; a step's and the blas engine's programs do not depend on the heads. */
static void plan_phases(loglin_device *device, loglin_problem problem) {
    static const unsigned phases[] = {LOGLIN_FORWARD, LOGLIN_FORWARD | LOGLIN_BACKWARD, LOGLIN_STEP};
    for (size_t i = 0; i < sizeof phases / sizeof phases[0]; i++) {
        problem.phases = phases[i];
        if (problem.heads == FEW_HEADS || phases[i] != LOGLIN_STEP) {
            plan(device, problem, LOGLIN_ENGINE_FUSED);
        }
        if (problem.heads == FEW_HEADS) {
            plan(device, problem, LOGLIN_ENGINE_BLAS);
        }
    }
}

typedef struct dimensions {
    size_t k, v;
} dimensions;

/*
 * The paper's shape, with few heads and with many, and those with weights in f32; with `all`, every shape class.  Every
 * operator, partition and type, of which one partition is normalised, with weights in f32, and in the next shape the other.
 */
static void plan_classes(loglin_device *device, bool all) {
    static const dimensions shapes[] = {{128, 64}, {128, 128}, {64, 64}, {256, 256}, {20, 24}};
    for (size_t shape = 0; shape < (all ? sizeof shapes / sizeof shapes[0] : 1); shape++) {
        for (int kind = 0; kind < (shape == 0 ? 24 : 12); kind++) {
            loglin_problem problem = {.op = kind % 2 == 0 ? LOGLIN_MAMBA2 : LOGLIN_GATED_DELTA,
                                      .partition = kind / 2 % 2 == 0 ? LOGLIN_WEAK : LOGLIN_STRONG,
                                      .dtype = (loglin_dtype)(kind / 4 % 3),
                                      .batch = 2,
                                      .length = 8192,
                                      .heads = kind / 12 == 0 ? FEW_HEADS : MANY_HEADS,
                                      .groups = 1,
                                      .dim_k = shapes[shape].k,
                                      .dim_v = shapes[shape].v,
                                      .levels = loglin_num_levels(8192)};
            problem.normalize_qk = (problem.partition == LOGLIN_STRONG) == (shape % 2 == 0);
            problem.weight_dtype = problem.normalize_qk || problem.heads == MANY_HEADS ? LOGLIN_F32 : problem.dtype;
            if (all || problem.partition == LOGLIN_WEAK || problem.dtype == LOGLIN_BF16) {
                plan_phases(device, problem);
            }
        }
    }
}

/* What a model's first pass builds beside its plans is CLBlast's, but for NVIDIA's products. */
static void open_models(loglin_device *device, cl_command_queue queue) {
    static const char *const models[] = {TEST_DATA_DIR "/kjv-loglin-mamba2", TEST_DATA_DIR "/kjv-loglin-gdn"};
    loglin_nvidia_product_kernels products;
    purpose = "model products";
    const loglin_status status = loglin_nvidia_product_create(device, &products);
    if (status != LOGLIN_OK && status != LOGLIN_UNSUPPORTED) {
        support_die("%s: %s", purpose, loglin_last_error());
    }
    loglin_nvidia_product_destroy(&products);
    for (size_t i = 0; i < sizeof models / sizeof models[0]; i++) {
        loglin_model *model = NULL;
        loglin_session *session = NULL;
        purpose = i == 0 ? "model mamba2" : "model delta";
        support_require(loglin_model_open(device, queue, models[i], NULL, &model), models[i]);
        support_require(loglin_session_create(model, queue, 1, &session), models[i]);
        loglin_session_destroy(session);
        loglin_model_close(model);
    }
}

static int list(bool all) {
    (void)setenv("LOGLIN_CACHE_DIR", "", 1); /* a stored program is not built */
    const support_device *device = support_open();
    plan_classes(device->device, all);
    open_models(device->device, device->queue);
    return 0;
}

int main(int count, char **arguments) {
    const bool all = count > 1 && strcmp(arguments[1], "--all") == 0;
    if (count != (all ? 4 : 3)) {
        support_die("usage: %s [--all] TARGET FOLDER", arguments[0]);
    }
    folder = arguments[count - 1];
    for (size_t i = 0; i < sizeof targets / sizeof targets[0]; i++) {
        if (strcmp(targets[i].name, arguments[count - 2]) == 0) {
            the_target = &targets[i];
            return list(all);
        }
    }
    support_die("there is no target %s", arguments[count - 2]);
}
