/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The matrix instructions that this machine has not got: cl/mma_amd.cl and cl/mma_intel.cl with the instruction
 * emulated, by the table of cl/mma_layouts.cl, against double; and that an error in any entry of the table is noticed.
 *
 * On a CPU: the emulated kernels have a barrier around every product, and NVIDIA's compiler breaks down over the larger ones.
 */
#include "engine/lanes.h"
#include "runtime/source.h"
#include "support_criterion.h"
#include "support_limits.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 80, COLUMNS = 112, DEPTH = 48 }; /* as cl/mma_probe.cl has them */

typedef struct instruction {
    const char *name, *file;
    unsigned items, teams_rows; /* of the work-group that multiplies */
    bool is_float;
    bool has_copies; /* of the operands, in lanes 16 apart */
} instruction;

static const instruction instructions[] = {
    {"MFMA_32X32X8", "mma_amd.cl", 64, 1, false, false},   {"WMMA_GFX11", "mma_amd.cl", 128, 2, false, true},
    {"WMMA_GFX12", "mma_amd.cl", 128, 2, false, false},    {"DPAS_8X8X16", "mma_intel.cl", 64, 2, false, false},
    {"DPAS_8X16X16", "mma_intel.cl", 64, 2, false, false}, {"FMA_8X16X16", "mma_intel.cl", 64, 2, true, false},
    {"FMA_8X8X8", "mma_intel.cl", 64, 2, true, false},
};

enum { INSTRUCTIONS = sizeof instructions / sizeof instructions[0] };

static void skip_on_gpu(void) {
    if (support_is_gpu()) {
        cr_skip_test("instructions are emulated on CPUs only");
    }
}

/* ---- One product ------------------------------------------------------------------------------------------------- */

/* An entry of the table, and what its value is combined with by exclusive or: "1" exchanges neighbours. */
typedef struct planted_error {
    const char *entry, *change;
} planted_error;

/* The file's text with the entry's lines "#define ENTRY(...) VALUE" changed to "((VALUE) ^ (CHANGE) * WHEN)", for free(). */
static char *plant(const char *text, const planted_error *error, const char *when) {
    char *changed = support_alloc(2 * strlen(text) + 1, 1), *to = changed;
    char head[32];
    const size_t length = (size_t)snprintf(head, sizeof head, "#define %s(", error->entry);
    size_t planted = 0;
    for (const char *line = text; *line != '\0';) {
        const size_t whole = strcspn(line, "\n") + 1;
        if (strncmp(line, head, length) == 0) {
            const size_t name = strcspn(line, ")") + 1;
            to += sprintf(to, "%.*s ((%.*s) ^ (%s) * %s)\n", (int)name, line, (int)(whole - 1 - name), line + name,
                          error->change, when);
            planted++;
        } else {
            memcpy(to, line, whole);
            to += whole;
        }
        line += whole;
    }
    cr_assert_gt(planted, 0, "cl/mma_layouts.cl has no entry %s", error->entry);
    return changed;
}

/* One program for all errors: the place in the range of work-items says which of them is there, the first at work-group 1. */
static char *plant_by_offset(const char *text, const planted_error *errors, size_t count, unsigned items) {
    char *changed = strdup(text);
    for (size_t i = 0; i < count; i++) {
        char when[64];
        (void)snprintf(when, sizeof when, "(get_global_offset(0) == %zu)", (i + 1) * items);
        char *more = plant(changed, &errors[i], when);
        free(changed);
        changed = more;
    }
    return changed;
}

/* For a device with an extension (an option that defines its name) or without (""). */
static cl_program build(const instruction *of, loglin_dtype dtype, const planted_error *errors, size_t count,
                        const char *extension) {
    const char *const files[] = {"common.cl",        "portable_items.cl",   "mma_layouts.cl", of->file,
                                 "mma_fragments.cl", "portable_product.cl", "mma_probe.cl"};
    enum { FILES = sizeof files / sizeof files[0] };
    const support_device *device = support_open();
    const char *texts[FILES];
    char *changed = NULL;
    for (size_t i = 0; i < FILES; i++) {
        size_t length = 0;
        texts[i] = loglin_kernel_source(files[i], &length);
        cr_assert_not_null(texts[i], "%s", files[i]);
        if (strcmp(files[i], "mma_layouts.cl") == 0) {
            texts[i] = changed = plant_by_offset(texts[i], errors, count, of->items);
        }
    }
    char options[256];
    (void)snprintf(options, sizeof options,
                   "-cl-std=CL1.2 -DSTORAGE=%d -DMMA_INSTRUCTION=%s -DMMA_EMULATED=%s -DLANE_ITEMS=%u -DTEAMS_ROWS=%u "
                   "-DSLAB_ROWS=32 -DSLAB_COLUMNS=32 -DSLAB_DEPTH=16 " /* compiles faster */ "%s",
                   (int)dtype, of->name, of->name, of->items, of->teams_rows, extension);
    cl_program program = clCreateProgramWithSource(device->context, FILES, texts, NULL, NULL);
    const cl_int code = clBuildProgram(program, 1, &device->id, options, NULL, NULL);
    if (code != CL_SUCCESS) {
        char log[2048] = "";
        (void)clGetProgramBuildInfo(program, device->id, CL_PROGRAM_BUILD_LOG, sizeof log - 1, log, NULL);
        cr_assert_fail("%s: %s", of->name, log);
    }
    free(changed);
    return program;
}

/* The error of A B by the emulated instruction, from the program with all planted errors, at a place in its range. */
static double product_error(const instruction *of, loglin_dtype dtype, cl_program program, size_t place) {
    static double a[ROWS * DEPTH], b[DEPTH * COLUMNS], expected[ROWS * COLUMNS], got[ROWS * COLUMNS];
    support_random random = {.state = 7};
    for (size_t i = 0; i < ROWS * DEPTH; i++) {
        a[i] = support_round(dtype, support_normal(&random));
    }
    for (size_t i = 0; i < DEPTH * COLUMNS; i++) {
        b[i] = support_round(dtype, support_normal(&random));
    }
    for (size_t i = 0; i < (size_t)ROWS * COLUMNS; i++) {
        expected[i] = 0;
        for (size_t k = 0; k < DEPTH; k++) {
            expected[i] += a[i / COLUMNS * DEPTH + k] * b[k * COLUMNS + i % COLUMNS];
        }
    }
    cl_kernel kernel = clCreateKernel(program, "mma_probe", NULL);
    const int32_t waves[2] = {0};
    support_array arrays[] = {support_input(LOGLIN_F32, a, ROWS * DEPTH, 0),
                              support_input(LOGLIN_F32, b, DEPTH * COLUMNS, 0),
                              support_output(LOGLIN_F32, (size_t)ROWS * COLUMNS, 0), support_inout_ints(waves, 2, 0)};
    for (cl_uint i = 0; i < 4; i++) {
        support_require(clSetKernelArg(kernel, i, sizeof(cl_mem), &arrays[i].mem), "clSetKernelArg");
    }
    const size_t items = of->items, offset = place * items;
    support_require(clEnqueueNDRangeKernel(support_open()->queue, kernel, 1, &offset, &items, &items, 0, NULL, NULL),
                    "mma_probe");
    cr_expect(support_read(&arrays[2], got), "%s writes out of bounds", of->name);
    for (size_t i = 0; i < 4; i++) {
        support_array_free(&arrays[i]);
    }
    clReleaseKernel(kernel);
    return support_error(got, expected, (size_t)ROWS * COLUMNS);
}

/* ---- Tests ------------------------------------------------------------------------------------------------------- */

static double right_error(const instruction *of, loglin_dtype dtype, const char *extension) {
    cl_program program = build(of, dtype, NULL, 0, extension);
    const double error = product_error(of, dtype, program, 0);
    clReleaseProgram(program);
    return error;
}

Test(mma, products) {
    skip_on_gpu();
    for (size_t i = 0; i < INSTRUCTIONS; i++) {
        for (int dtype = instructions[i].is_float ? LOGLIN_F32 : LOGLIN_F16; dtype <= LOGLIN_BF16; dtype++) {
            const double error = right_error(&instructions[i], (loglin_dtype)dtype, "");
            cr_expect_leq(error, 1e-6, "%s, %s: %g", instructions[i].name, support_dtype_name((loglin_dtype)dtype),
                          error);
        }
    }
}

/* Intel's GPUs without matrix units, where a sub-group reads local memory in blocks. */
Test(mma, products_of_block_reads) {
    skip_on_gpu();
    for (size_t i = 0; i < INSTRUCTIONS; i++) {
        if (instructions[i].is_float) {
            const double error = right_error(&instructions[i], LOGLIN_F32, "-Dcl_intel_subgroup_local_block_io=1");
            cr_expect_leq(error, 1e-6, "%s: %g", instructions[i].name, error);
        }
    }
}

/* Without its errors the program is right, with any of them it is wrong. */
static void expect_noticed(const instruction *of, const planted_error *errors, size_t count) {
    cl_program program = build(of, LOGLIN_BF16, errors, count, "");
    const double right = product_error(of, LOGLIN_BF16, program, count + 1);
    cr_expect_leq(right, 1e-6, "%s: %g", of->name, right);
    for (size_t i = 0; i < count; i++) {
        const double error = product_error(of, LOGLIN_BF16, program, i + 1);
        cr_expect_gt(error, 1e-2, "%s: %s ^ %s is not noticed: %g", of->name, errors[i].entry, errors[i].change, error);
    }
    clReleaseProgram(program);
}

/* Every entry that the kernels use, and every one of the documents, wrong: numbers are exchanged. */
Test(mma, planted_errors) {
    skip_on_gpu();
    static const planted_error errors[] = {{"A_ROW", "1"},    {"A_K", "MMA_DEPTH / 2"}, {"B_K", "MMA_DEPTH / 2"},
                                           {"B_COLUMN", "1"}, {"C_ROW", "1"},           {"C_COLUMN", "1"},
                                           {"A_LANE", "1"},   {"A_INDEX", "1"},         {"B_LANE", "1"},
                                           {"B_INDEX", "1"},  {"C_LANE", "1"},          {"C_INDEX", "1"}};
    for (size_t i = 0; i < INSTRUCTIONS; i++) {
        expect_noticed(&instructions[i], errors, sizeof errors / sizeof errors[0]);
    }
}

/* Lanes 16 apart must hold the same. */
Test(mma, planted_errors_in_copies) {
    skip_on_gpu();
    static const planted_error errors[] = {{"A_ROW", "(lane) / 16"}, {"B_COLUMN", "(lane) / 16"}};
    for (size_t i = 0; i < INSTRUCTIONS; i++) {
        if (instructions[i].has_copies) {
            expect_noticed(&instructions[i], errors, 2);
        }
    }
}

/*
 * ---- The fused kernels -------------------------------------------------------------------------------------------
 *
 * The forward pass, by the library's own plan.  PoCL takes minutes for the backward one: that, and data races, are for
 * `scripts/oclgrind build/release/tests/test_small INSTRUCTION`.
 */

/* The library tries the instruction out, and takes it. */
static void be_gpu_with(const char *name, loglin_dtype dtype) {
    skip_on_gpu();
    support_emulate(name, "-cl-opt-disable"); /* compiles faster */
    loglin_lane_schedule schedule;
    support_require(loglin_lanes_choose(support_open()->device, dtype, &schedule), "loglin_lanes_choose");
    cr_assert_not_null(schedule.instruction);
    cr_assert_str_eq(schedule.instruction, name);
}

/* Larger than what small tiles without matrix units cover, so every product is by the instruction. */
static support_case fused_case(loglin_op op, loglin_dtype dtype) {
    return (support_case){.op = op,
                          .dtype = dtype,
                          .length = 50,
                          .heads = 1,
                          .dim_k = 40,
                          .dim_v = 24,
                          .chunk = 16,
                          .final_states = true,
                          .only = LOGLIN_ENGINE_FUSED};
}

static void expect_fused(const char *name, loglin_op op, loglin_dtype dtype) {
    be_gpu_with(name, dtype);
    const support_case c = fused_case(op, dtype);
    expect_pass(support_check_forward(&c));
    cr_expect_gt(support_launches("portable_forward", 256), 0, "%s: the fused kernel has not run", name);
}

/* Both operators, and both 16-bit types, with every instruction. */
#define FUSED(name, of_scalar, of_delta)                                                                               \
    Test(mma, scalar_##name) {                                                                                         \
        expect_fused(#name, LOGLIN_MAMBA2, of_scalar);                                                                 \
    }                                                                                                                  \
    Test(mma, delta_##name) {                                                                                          \
        expect_fused(#name, LOGLIN_GATED_DELTA, of_delta);                                                             \
    }

FUSED(MFMA_32X32X8, LOGLIN_F16, LOGLIN_BF16)
FUSED(WMMA_GFX11, LOGLIN_BF16, LOGLIN_F16)
FUSED(WMMA_GFX12, LOGLIN_F16, LOGLIN_BF16)
FUSED(DPAS_8X8X16, LOGLIN_BF16, LOGLIN_F16)
FUSED(DPAS_8X16X16, LOGLIN_F16, LOGLIN_BF16)
FUSED(FMA_8X16X16, LOGLIN_F32, LOGLIN_F32)

/* Of the fused engine, for what a plan says. */
static loglin_problem small_problem(loglin_op op, loglin_partition partition, loglin_dtype dtype, unsigned phases) {
    return (loglin_problem){.op = op,
                            .partition = partition,
                            .batch = 1,
                            .length = 20,
                            .heads = 1,
                            .groups = 1,
                            .dim_k = 16,
                            .dim_v = 16,
                            .levels = loglin_num_levels(20),
                            .chunk = 16,
                            .dtype = dtype,
                            .engine = LOGLIN_ENGINE_FUSED,
                            .phases = phases};
}

/* GPUs with few registers: all types, but the scalar-gated operator in the weak partition alone. */
Test(mma, scalar_FMA_8X8X8) {
    skip_on_gpu();
    expect_fused("FMA_8X8X8", LOGLIN_MAMBA2, LOGLIN_BF16);
    for (int kind = 1; kind < 4; kind++) {
        const loglin_problem problem =
            small_problem(kind & 1 ? LOGLIN_GATED_DELTA : LOGLIN_MAMBA2, kind & 2 ? LOGLIN_STRONG : LOGLIN_WEAK,
                          LOGLIN_F32, LOGLIN_FORWARD);
        loglin_plan *plan = NULL;
        cr_expect_eq(loglin_plan_create(support_open()->device, &problem, &plan), LOGLIN_UNSUPPORTED);
        cr_expect_not_null(strstr(loglin_last_error(), "too few registers"), "%s", loglin_last_error());
    }
}

/* In what is built from now on. */
static const planted_error *fused_error;

static char *plant_fused(const char *source) {
    return strstr(source, "#define A_ROW(") != NULL ? plant(source, fused_error, "1") : NULL;
}

/* The library's trial of the instruction has passed when the table goes wrong, so only the answers can tell. */
static void expect_fused_error(const char *name, planted_error error) {
    be_gpu_with(name, LOGLIN_BF16);
    fused_error = &error;
    support_edit_sources(plant_fused);
    const support_case c = fused_case(LOGLIN_MAMBA2, LOGLIN_BF16);
    const char *failure = support_check_forward(&c);
    cr_expect_gt(support_launches("portable_forward", 256), 0, "%s: the fused kernel has not run", name);
    cr_assert_not_null(failure, "%s: %s ^ %s is not noticed", name, error.entry, error.change);
    cr_expect_not_null(strstr(failure, "o: error"), "%s", failure);
}

Test(mma, planted_error_in_fused_WMMA_GFX12) {
    expect_fused_error("WMMA_GFX12", (planted_error){"A_K", "8"});
}

Test(mma, planted_error_in_fused_DPAS_8X16X16) {
    expect_fused_error("DPAS_8X16X16", (planted_error){"C_ROW", "1"});
}

/* And one that the trial sees: the instruction is not used. */
Test(mma, planted_error_in_trial) {
    skip_on_gpu();
    static const planted_error error = {"B_COLUMN", "1"};
    fused_error = &error;
    support_edit_sources(plant_fused);
    support_emulate("MFMA_32X32X8", "-cl-opt-disable");
    loglin_lane_schedule schedule;
    support_require(loglin_lanes_choose(support_open()->device, LOGLIN_BF16, &schedule), "loglin_lanes_choose");
    cr_expect_null(schedule.instruction);
}

static char *double_waves(const char *source) {
    static const char wave[] = "waves[0] = MMA_WAVE;";
    const char *at = strstr(source, wave);
    if (at == NULL) {
        return NULL;
    }
    char *changed = support_alloc(strlen(source) + 8, 1);
    (void)sprintf(changed, "%.*swaves[0] = 2 * MMA_WAVE;%s", (int)(at - source), source, at + strlen(wave));
    return changed;
}

/* Nor is it where the compiler has chosen other sub-groups, though the product is right. */
Test(mma, other_sub_groups) {
    skip_on_gpu();
    support_edit_sources(double_waves);
    support_emulate("DPAS_8X16X16", "-cl-opt-disable");
    loglin_lane_schedule schedule;
    cr_expect_eq(loglin_lanes_choose(support_open()->device, LOGLIN_BF16, &schedule), LOGLIN_UNSUPPORTED);
    cr_expect_not_null(strstr(loglin_last_error(), "too few registers"), "%s", loglin_last_error());
}

/*
 * Which backward passes are fused on a GPU: the scalar-gated one of the weak partition, but for pvc's compiler, also where small
 * tiles take the place of its instruction.  test_small runs it with the instructions of the others, under Oclgrind.
 */
Test(mma, backward_passes_of_blas) {
    skip_on_gpu();
    support_emulate("DPAS_8X16X16", "-cl-opt-disable");
    static const char *const remarks[] = {"the fused one needs more registers", "takes minutes for the delta rule's",
                                          "the strong partition's fused one has not run on a GPU"};
    for (int kind = 0; kind < 3; kind++) {
        const loglin_problem problem =
            small_problem(kind == 1 ? LOGLIN_GATED_DELTA : LOGLIN_MAMBA2, kind == 2 ? LOGLIN_STRONG : LOGLIN_WEAK,
                          LOGLIN_BF16, LOGLIN_BACKWARD);
        loglin_plan *plan = NULL;
        support_require(loglin_plan_create(support_open()->device, &problem, &plan), "loglin_plan_create");
        char text[1024];
        (void)loglin_plan_describe(plan, text, sizeof text);
        cr_expect(strstr(text, remarks[kind]) != NULL, "%s", text);
        loglin_plan_destroy(plan);
    }
}
