/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Smaller devices than the one that is there (support_limits.h): the answers are right there too, or what does not fit is
 * refused when it is planned, in words; never by a driver's error in the middle.
 */
#define _GNU_SOURCE /* setenv */
#include "loglin_model.h"
#include "support_criterion.h"
#include "support_limits.h"

#include <stdlib.h>
#include <string.h>

/* All of it at once: what a small GPU without any extension has.  test_lanes has the engine that a GPU takes. */
#define SMALLEST "local=16384,group=64,allocation=1073741824,no-double,no-half,no-subgroups"

/* ---- What is run ------------------------------------------------------------------------------------------------- */

static void expect_operator(const char *limits) {
    /* Each operator, partition and type once: what a limit keeps a kernel from does not depend on how they meet. */
    static const support_case cases[] = {
        {.op = LOGLIN_MAMBA2, .partition = LOGLIN_STRONG, .dtype = LOGLIN_F32},
        {.op = LOGLIN_GATED_DELTA, .partition = LOGLIN_STRONG, .dtype = LOGLIN_F32},
        {.op = LOGLIN_MAMBA2, .partition = LOGLIN_WEAK, .dtype = LOGLIN_F16},
        {.op = LOGLIN_GATED_DELTA, .partition = LOGLIN_WEAK, .dtype = LOGLIN_BF16},
    };
    support_build_fast();
    support_limit_device(limits);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        support_case c = cases[i];
        c.heads = 1;
        c.dim_k = c.dim_v = 64;
        c.length = 100;
        expect_pass(support_check_forward(&c));
        expect_pass(support_check_backward(&c));
        c.length = 9;
        expect_pass(support_check_decode(&c));
    }
}

static const char *const models[] = {TEST_DATA_DIR "/kjv-loglin-mamba2", TEST_DATA_DIR "/kjv-loglin-gdn"};

/*
 * A model's prefill and steps on the limited device give what its score gives.  With the blas engine: PoCL takes many minutes
 * to compile the work-group lanes of a GPU at these dimensions.
 */
static void expect_model(const char *folder) {
    enum { LENGTH = 7, VOCABULARY = 256 };
    static const int32_t ids[LENGTH] = {73, 110, 32, 116, 104, 101, 32};
    const support_device *device = support_open();
    const loglin_model_options options = {.engine = LOGLIN_ENGINE_BLAS};
    loglin_model *model = NULL;
    loglin_session *session = NULL;
    support_require(loglin_model_open(device->device, device->queue, folder, &options, &model), folder);
    support_require(loglin_session_create(model, device->queue, 1, &session), "loglin_session_create");
    float *scored = support_alloc(LENGTH * VOCABULARY, sizeof *scored),
          *stepped = support_alloc(VOCABULARY, sizeof *stepped);
    support_require(loglin_session_score(session, ids, LENGTH, scored), "loglin_session_score");
    support_require(loglin_session_reset(session, 0), "loglin_session_reset");
    support_require(loglin_session_prefill(session, 0, ids, LENGTH - 2, NULL), "loglin_session_prefill");
    for (size_t i = LENGTH - 2; i < LENGTH; i++) {
        support_require(loglin_session_step(session, ids + i, stepped), "loglin_session_step");
        for (size_t id = 0; id < VOCABULARY; id++) {
            cr_assert_float_eq(stepped[id], scored[i * VOCABULARY + id], 1e-3, "%s: token %zu, logit %zu", folder, i,
                               id);
        }
    }
    loglin_session_destroy(session);
    loglin_model_close(model);
    free(scored);
    free(stepped);
}

static void expect_models(const char *limits) {
    support_limit_device(limits);
    for (size_t i = 0; i < sizeof models / sizeof models[0]; i++) {
        expect_model(models[i]);
    }
}

/* ---- Devices that lack one thing --------------------------------------------------------------------------------- */

Test(limits, local_memory_of_32_KiB) {
    expect_operator("local=32768");
}

Test(limits, local_memory_of_16_KiB) {
    expect_operator("local=16384");
}

/* Nor is anything tried that the device has told to be beyond it, as CLBlast's parameters of a larger device of its kind. */
Test(limits, work_groups_of_64) {
    expect_operator("group=64");
    cr_expect_eq(support_refusals(), 0u);
}

Test(limits, no_double) {
    expect_operator("no-double");
}

Test(limits, no_half_and_no_subgroups) {
    expect_operator("no-half,no-subgroups");
}

Test(limits, cpu_of_small_work_groups) {
    expect_operator("local=16384,group=64,no-double,no-half");
}

Test(limits, all_at_once) {
    expect_operator(SMALLEST);
}

/* The smallest of the GPU's schedules. */
static void expect_small_gpu(loglin_op op) {
    setenv("LOGLIN_BUILD_OPTIONS", "-cl-opt-disable", 1); /* compiles faster */
    support_limit_device("gpu," SMALLEST);
    const support_case c = {
        .op = op, .length = 50, .heads = 1, .dim_k = 40, .dim_v = 24, .chunk = 16, .only = LOGLIN_ENGINE_FUSED};
    expect_pass(support_check_forward(&c));
    cr_expect_gt(support_launches("portable_forward", 64), 0, "the kernels with groups of 64 have not run");
    cr_expect_eq(support_refusals(), 0u);
}

Test(limits, all_at_once_on_a_gpu) {
    expect_small_gpu(LOGLIN_MAMBA2);
}

Test(limits, all_at_once_on_a_gpu_delta) {
    expect_small_gpu(LOGLIN_GATED_DELTA);
}

Test(limits, models) {
    expect_models("gpu," SMALLEST);
}

/*
 * The widest input of a product is the MLP's, which a step reads in slices.  Here it needs 13180 bytes; a GPU's own work-groups
 * may need less, and then a step must run.
 */
Test(limits, local_memory_of_a_step) {
    support_limit_device("gpu,local=11000,allocation=1073741824,memory=1073741824");
    const support_device *device = support_open();
    loglin_model *model = NULL;
    loglin_session *session = NULL;
    support_require(loglin_model_open(device->device, device->queue, models[0], NULL, &model), models[0]);
    const loglin_status status = loglin_session_create(model, device->queue, 1, &session);
    if (support_is_gpu() && status == LOGLIN_OK) {
        static const int32_t id = 73;
        float *logits = support_alloc(256, sizeof *logits);
        support_require(loglin_session_step(session, &id, logits), "loglin_session_step");
        free(logits);
    } else {
        cr_expect_eq(status, LOGLIN_UNSUPPORTED);
        cr_expect_not_null(strstr(loglin_last_error(), "local memory"), "%s", loglin_last_error());
    }
    cr_expect_eq(support_refusals(), 0u);
    loglin_session_destroy(session);
    loglin_model_close(model);
}

/* The NVIDIA engine says so before it tries anything out.  Local memory: too little for all others. */
Test(limits, nvidia_engine_needs_large_work_groups) {
    support_limit_device("gpu,vendor=NVIDIA Corporation,group=512,local=8192");
    const loglin_problem problem = {.batch = 1,
                                    .length = 64,
                                    .heads = 1,
                                    .groups = 1,
                                    .dim_k = 64,
                                    .dim_v = 64,
                                    .levels = loglin_num_levels(64),
                                    .dtype = LOGLIN_BF16,
                                    .phases = LOGLIN_FORWARD,
                                    .engine = LOGLIN_ENGINE_FUSED};
    loglin_plan *plan = NULL;
    cr_expect_eq(loglin_plan_create(support_open()->device, &problem, &plan), LOGLIN_UNSUPPORTED);
    cr_expect_not_null(strstr(loglin_last_error(), "work-groups of 1024"), "%s", loglin_last_error());
    cr_expect_eq(support_refusals(), 0u);
    loglin_plan_destroy(plan);
}

/* ---- What does not fit ------------------------------------------------------------------------------------------- */

/* The widest states: every phase is planned, and then also runs, or the plan says what it lacks. */
Test(limits, widest_states) {
    support_limit_device(SMALLEST);
    const support_case c = {.length = 3, .heads = 1, .dim_k = 512, .dim_v = 512};
    expect_everywhere(support_check_decode, c);
    expect_operators(support_check_forward, c);
}

static loglin_status plan_long(size_t length, unsigned phases, loglin_engine engine) {
    const loglin_problem problem = {.batch = 4,
                                    .length = length,
                                    .heads = 16,
                                    .groups = 1,
                                    .dim_k = 128,
                                    .dim_v = 128,
                                    .levels = loglin_num_levels(length),
                                    .phases = phases,
                                    .engine = engine};
    loglin_plan *plan = NULL;
    const loglin_status status = loglin_plan_create(support_open()->device, &problem, &plan);
    if (status == LOGLIN_OK) {
        for (unsigned phase = LOGLIN_FORWARD; phase <= LOGLIN_BACKWARD; phase <<= 1) {
            cr_expect_leq(loglin_workspace_size(plan, (loglin_phase)phase), (size_t)1 << 30);
        }
    }
    loglin_plan_destroy(plan);
    return status;
}

/*
 * A workspace is one buffer: it stays below the largest one, or the plan tells both numbers.  Of a GPU by the blas engine
 * alone, as for models.
 */
static void expect_bounded_workspaces(const char *limits, int first, int last) {
    support_limit_device(limits);
    size_t refused = 0;
    for (size_t length = (size_t)1 << 14; length <= (size_t)1 << 22; length <<= 4) {
        for (int engine = first; engine <= last; engine++) {
            const loglin_status status = plan_long(length, LOGLIN_FORWARD | LOGLIN_BACKWARD, (loglin_engine)engine);
            if (status != LOGLIN_OK) {
                refused++;
                cr_expect_eq(status, LOGLIN_UNSUPPORTED, "length %zu: %s", length, loglin_last_error());
                cr_expect(engine == LOGLIN_ENGINE_FUSED || strstr(loglin_last_error(), "1073741824") != NULL,
                          "length %zu: %s", length, loglin_last_error());
            }
        }
    }
    cr_expect_gt(refused, 0);
}

Test(limits, largest_allocation) {
    expect_bounded_workspaces("allocation=1073741824", LOGLIN_ENGINE_AUTO, LOGLIN_ENGINE_FUSED);
}

Test(limits, largest_allocation_of_a_gpu) {
    expect_bounded_workspaces("gpu,allocation=1073741824", LOGLIN_ENGINE_BLAS, LOGLIN_ENGINE_BLAS);
}

/* The limits themselves: without them the tests above show nothing. */
Test(limits, hold) {
    support_limit_device("gpu," SMALLEST);
    const support_device *device = support_open();
    loglin_device_info infos[8];
    size_t count = 0;
    support_require(loglin_list_devices(infos, 8, &count), "loglin_list_devices");
    for (size_t i = 0; i < count && i < 8; i++) {
        if (infos[i].id == device->id) {
            cr_expect_eq(infos[i].type, CL_DEVICE_TYPE_GPU);
            cr_expect_eq(infos[i].local_memory, 16384);
            cr_expect_eq(infos[i].max_work_group_size, 64);
            cr_expect_eq(infos[i].max_allocation, (size_t)1 << 30);
        }
    }
    static const char *const sources[] = {"__kernel void f(__global float *x) { x[0] = (float)(double)x[1]; }",
                                          "__kernel void f(__global float *x) { __local float y[5000];\n"
                                          "y[get_local_id(0)] = x[get_local_id(0)]; barrier(CLK_LOCAL_MEM_FENCE);\n"
                                          "x[0] = y[1] + y[4999]; }"};
    cl_program programs[2];
    for (size_t i = 0; i < 2; i++) {
        programs[i] = clCreateProgramWithSource(device->context, 1, (const char **)&sources[i], NULL, NULL);
        cr_assert_eq(clBuildProgram(programs[i], 1, &device->id, "", NULL, NULL) == CL_SUCCESS, i == 1);
    }
    cl_int code = CL_SUCCESS;
    cl_kernel kernel = clCreateKernel(programs[1], "f", NULL);
    cl_mem buffer = clCreateBuffer(device->context, CL_MEM_READ_WRITE, 65536, NULL, NULL);
    cr_assert_eq(clSetKernelArg(kernel, 0, sizeof(cl_mem), &buffer), CL_SUCCESS);
    size_t items = 64;
    cr_expect_eq(clEnqueueNDRangeKernel(device->queue, kernel, 1, NULL, &items, &items, 0, NULL, NULL),
                 CL_OUT_OF_RESOURCES);
    items = 128;
    cr_expect_eq(clEnqueueNDRangeKernel(device->queue, kernel, 1, NULL, &items, &items, 0, NULL, NULL),
                 CL_INVALID_WORK_GROUP_SIZE);
    cr_expect_null(clCreateBuffer(device->context, CL_MEM_READ_WRITE, ((size_t)1 << 30) + 1, NULL, &code));
    cr_expect_eq(code, CL_INVALID_BUFFER_SIZE);
    clReleaseKernel(kernel);
    clReleaseMemObject(buffer);
    for (size_t i = 0; i < 2; i++) {
        clReleaseProgram(programs[i]);
    }
}
