/* SPDX-License-Identifier: Apache-2.0 */
/* The far ends of the inputs' ranges, long sequences, and arrays far inside huge buffers. */
#define _DEFAULT_SOURCE /* MAP_ANONYMOUS, MAP_NORESERVE */

#include "support_criterion.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* ---- Gates ------------------------------------------------------------------------------------------------------ */

static void gates_of_minus_50(support_data *data) {
    for (size_t i = 0; i < data->n_gates; i++) {
        data->g[i] = -50.0;
    }
}

static void gates_of_minus_50_now_and_then(support_data *data) {
    for (size_t i = 0; i < data->n_gates; i++) {
        data->g[i] = i % 13 == 0 ? -50.0 : i % 3 == 0 ? 0.0 : -0.001;
    }
}

enum { LENGTH = 300 }; /* of most tests: they share their programs */
enum { DEEP = 150 };   /* tokens of -50 in front of tokens that forget hardly anything */

static void gates_deep_then_flat(support_data *data) {
    for (size_t i = 0; i < data->n_gates; i++) {
        data->g[i] = i / data->c.heads % data->c.length < DEEP ? -50.0 : -0.01 * (double)(i % 7);
    }
}

static void expect_gates(void (*adjust)(support_data *)) {
    for (size_t chunk = 16; chunk <= 256; chunk *= 4) {
        const support_case c = {.length = LENGTH, .chunk = chunk, .final_states = true, .adjust = adjust};
        expect_everywhere(support_check_forward, c);
        expect_everywhere(support_check_backward, c);
    }
    expect_everywhere(support_check_decode, (support_case){.length = 100, .final_states = true, .adjust = adjust});
}

Test(numerics, gates_of_minus_50) {
    expect_gates(gates_of_minus_50);
}

Test(numerics, gates_of_minus_50_now_and_then) {
    expect_gates(gates_of_minus_50_now_and_then);
}

Test(numerics, gates_deep_then_flat) {
    expect_gates(gates_deep_then_flat);
}

/* The tokens behind the deep run alone: a running sum near -7500 must not cost them their digits. */
static const char *check_behind_deep_gates(const support_case *c) {
    support_data *data = support_data_make(c);
    data->engine = LOGLIN_ENGINE_BLAS;
    support_results *expected = support_results_make(data);
    support_results *got = support_results_make(data);
    support_oracle_forward(data, expected);
    support_oracle_backward(data, expected);
    const char *failure = support_forward(data, got);
    failure = failure != NULL ? failure : support_backward(data, got);
    const size_t row = DEEP * data->c.heads;
    const size_t v_row = row * data->c.dim_v;
    const size_t k_row = DEEP * data->c.groups * data->c.dim_k;
    const struct {
        const char *name;
        const double *got, *expected;
        size_t first, count;
        support_kind kind;
    } tensors[] = {
        {"late o", got->o, expected->o, v_row, data->n_v, SUPPORT_OUTPUT},
        {"late dq", got->dq, expected->dq, k_row, data->n_k, SUPPORT_GRADIENT},
        {"late dk", got->dk, expected->dk, k_row, data->n_k, SUPPORT_GRADIENT},
        {"late dv", got->dv, expected->dv, v_row, data->n_v, SUPPORT_GRADIENT},
        {"late dg", got->dg, expected->dg, row + data->c.heads, data->n_gates, SUPPORT_GRADIENT},
        {"late dlevel_scales", got->dlevel_scales, expected->dlevel_scales, row * data->levels, data->n_levels,
         SUPPORT_GRADIENT},
    };
    for (size_t i = 0; failure == NULL && i < sizeof tensors / sizeof tensors[0]; i++) {
        failure = support_compare(data, tensors[i].name, tensors[i].got + tensors[i].first,
                                  tensors[i].expected + tensors[i].first, tensors[i].count - tensors[i].first,
                                  tensors[i].kind);
    }
    support_results_free(got);
    support_results_free(expected);
    support_data_free(data);
    return failure;
}

Test(numerics, tokens_behind_deep_gates) {
    for (size_t chunk = 16; chunk <= 256; chunk *= 2) {
        expect_everywhere(check_behind_deep_gates,
                          (support_case){.length = 240, .chunk = chunk, .adjust = gates_deep_then_flat});
    }
}

/* ---- Weights, keys and betas ------------------------------------------------------------------------------------ */

static void weights_to_1000(support_data *data) {
    for (size_t i = 0; i < data->n_levels; i++) {
        data->level_scales[i] *= i % 5 == 0 ? 0.0 : 1000.0 / 1.5;
    }
}

Test(numerics, level_weights_to_1000) {
    const support_case c = {.length = LENGTH, .chunk = 64, .adjust = weights_to_1000, .final_states = true};
    expect_everywhere(support_check_forward, c);
    expect_everywhere(support_check_backward, c);
    expect_everywhere(support_check_decode, c);
}

static void equal_keys(support_data *data) {
    for (size_t i = 0; i < data->n_k; i++) {
        data->k[i] = data->k[i % data->c.dim_k];
    }
}

static void equal_keys_full_betas(support_data *data) {
    equal_keys(data);
    for (size_t i = 0; data->beta != NULL && i < data->n_gates; i++) {
        data->beta[i] = 1.0;
    }
}

static void betas_of_0_and_1(support_data *data) {
    for (size_t i = 0; data->beta != NULL && i < data->n_gates; i++) {
        data->beta[i] = i / data->c.heads % 3 == 0 ? 0.0 : 1.0;
    }
}

static void betas_of_0(support_data *data) {
    for (size_t i = 0; data->beta != NULL && i < data->n_gates; i++) {
        data->beta[i] = 0.0;
    }
}

Test(numerics, equal_keys) {
    for (size_t chunk = 16; chunk <= 256; chunk *= 4) {
        support_case c = {.length = LENGTH, .chunk = chunk, .adjust = equal_keys, .final_states = true};
        expect_everywhere(support_check_forward, c);
        expect_everywhere(support_check_backward, c);
        c.adjust = equal_keys_full_betas; /* every token erases the past: dg is a difference of equal terms */
        c.small_gate_gradient = true;
        expect_everywhere(support_check_forward, c);
        expect_everywhere(support_check_backward, c);
        c.no_gates = true;
        expect_everywhere(support_check_forward, c);
    }
}

Test(numerics, betas_of_exactly_0_and_1) {
    for (size_t chunk = 16; chunk <= 256; chunk *= 4) {
        support_case c = {.op = LOGLIN_GATED_DELTA,
                          .length = LENGTH,
                          .chunk = chunk,
                          .adjust = betas_of_0_and_1,
                          .final_states = true};
        expect_pass(support_check_forward(&c));
        expect_pass(support_check_backward(&c));
        c.adjust = betas_of_0;
        expect_pass(support_check_forward(&c));
        expect_pass(support_check_backward(&c));
    }
}

/* ---- Long sequences --------------------------------------------------------------------------------------------- */

static void gates_near_0(support_data *data) {
    for (size_t i = 0; i < data->n_gates; i++) {
        data->g[i] *= 1e-4;
    }
}

Test(numerics, length_65536) {
    expect_operators(support_check_forward, (support_case){.length = 65536,
                                                           .heads = 1,
                                                           .dim_k = 8,
                                                           .dim_v = 8,
                                                           .chunk = 64,
                                                           .adjust = gates_near_0,
                                                           .final_states = true});
}

/* ---- Huge offsets ----------------------------------------------------------------------------------------------- */

/* One sparse buffer that holds every array of a call, behind 2^31 elements of the storage type. */
typedef struct arena {
    unsigned char *bytes;
    size_t size, used;
    cl_mem mem;
} arena;

static const size_t ARENA_ROOM = (size_t)1 << 24;

/* PoCL allows a quarter of the memory that hwloc tells it of; the buffer is sparse, so it may be told of more. */
static void allow_large_allocations(void) {
    support_require(setenv("HWLOC_SYNTHETIC", "numa:1(memory=64GB) core:2 pu:1", 1), "setenv");
    support_require(setenv("HWLOC_THISSYSTEM", "1", 1), "setenv");
}

static bool arena_open(arena *a, size_t element) {
    cl_ulong largest = 0;
    const support_device *device = support_open();
    support_require(clGetDeviceInfo(device->id, CL_DEVICE_MAX_MEM_ALLOC_SIZE, sizeof largest, &largest, NULL),
                    "clGetDeviceInfo");
    const size_t beyond = ((size_t)1 << 31) * element + 4096;
    if (largest < beyond + ARENA_ROOM) {
        return false;
    }
    *a = (arena){.size = beyond + ARENA_ROOM, .used = beyond};
    a->bytes = mmap(NULL, a->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (a->bytes == MAP_FAILED) {
        return false;
    }
    memset(a->bytes + a->used, 0xFF, ARENA_ROOM);
    cl_int status = CL_SUCCESS;
    a->mem = clCreateBuffer(device->context, CL_MEM_READ_WRITE | CL_MEM_USE_HOST_PTR, a->size, a->bytes, &status);
    support_require(status, "clCreateBuffer");
    return true;
}

static void arena_close(arena *a) {
    clReleaseMemObject(a->mem);
    munmap(a->bytes, a->size);
}

/* Where an array of a support_array's contents lies in the arena. */
static loglin_buffer arena_take(arena *a, support_array *array) {
    const size_t bytes = array->count * array->element;
    const loglin_buffer buffer = {.mem = a->mem, .offset = (a->used + array->element - 1) / array->element};
    support_require(clEnqueueCopyBuffer(support_open()->queue, array->mem, a->mem, 0, buffer.offset * array->element,
                                        bytes, 0, NULL, NULL),
                    "clEnqueueCopyBuffer");
    a->used = buffer.offset * array->element + bytes;
    support_array_free(array);
    return buffer;
}

static loglin_buffer arena_floats(arena *a, loglin_dtype dtype, const double *values, size_t count) {
    if (values == NULL) {
        return (loglin_buffer){0};
    }
    support_array array = support_input(dtype, values, count, 0);
    return arena_take(a, &array);
}

/* An output's place; element offset as for the type. */
static loglin_buffer arena_output(arena *a, loglin_dtype dtype, size_t count) {
    support_array array = support_output(dtype, count, 0);
    return arena_take(a, &array);
}

static void arena_read(const arena *a, loglin_dtype dtype, loglin_buffer from, size_t count, double *values) {
    support_array array = support_output(dtype, count, 0);
    support_require(clEnqueueCopyBuffer(support_open()->queue, a->mem, array.mem, from.offset * array.element, 0,
                                        count * array.element, 0, NULL, NULL),
                    "clEnqueueCopyBuffer");
    support_read(&array, values);
    support_array_free(&array);
}

static void expect_far_offsets(const support_case *c) {
    allow_large_allocations();
    arena a;
    if (!arena_open(&a, support_dtype_size(c->dtype))) {
        cr_skip("the device does not allocate 2^31 elements of %s at once", support_dtype_name(c->dtype));
    }
    const loglin_dtype dtype = c->dtype;
    support_data *data = support_data_make(c);
    data->engine = LOGLIN_ENGINE_BLAS;
    support_results *expected = support_results_make(data);
    support_results *got = support_results_make(data);
    support_oracle_forward(data, expected);
    support_oracle_backward(data, expected);
    const loglin_problem problem = support_problem(data, LOGLIN_FORWARD | LOGLIN_BACKWARD);
    loglin_plan *plan = NULL;
    support_require(loglin_plan_create(support_open()->device, &problem, &plan), "loglin_plan_create");

    const loglin_inputs in = {.q = arena_floats(&a, dtype, data->q, data->n_k),
                              .k = arena_floats(&a, dtype, data->k, data->n_k),
                              .v = arena_floats(&a, dtype, data->v, data->n_v),
                              .g = arena_floats(&a, LOGLIN_F32, data->g, data->n_gates),
                              .level_scales = arena_floats(&a, LOGLIN_F32, data->level_scales, data->n_levels),
                              .beta = arena_floats(&a, LOGLIN_F32, data->beta, data->n_gates)};
    const loglin_buffer d_o = arena_floats(&a, dtype, data->d_o, data->n_v);
    const loglin_buffer dfinal = arena_floats(&a, LOGLIN_F32, data->dfinal, data->n_states);
    const loglin_buffer o = arena_output(&a, dtype, data->n_v);
    const loglin_state final = {.values = arena_output(&a, LOGLIN_F32, data->n_states),
                                .position = arena_output(&a, LOGLIN_F32, data->sequences)};
    const loglin_gradients out = {.dq = arena_output(&a, dtype, data->n_k),
                                  .dk = arena_output(&a, dtype, data->n_k),
                                  .dv = arena_output(&a, dtype, data->n_v),
                                  .dg = arena_output(&a, LOGLIN_F32, data->n_gates),
                                  .dlevel_scales = arena_output(&a, LOGLIN_F32, data->n_levels),
                                  .dbeta = data->beta == NULL ? (loglin_buffer){0}
                                                              : arena_output(&a, LOGLIN_F32, data->n_gates)};
    const size_t forward_bytes = loglin_workspace_size(plan, LOGLIN_FORWARD);
    const size_t backward_bytes = loglin_workspace_size(plan, LOGLIN_BACKWARD);
    support_workspace workspace =
        support_workspace_make(forward_bytes > backward_bytes ? forward_bytes : backward_bytes);
    const loglin_buffer work = {.mem = workspace.mem};
    cl_command_queue queue = support_open()->queue;
    support_require(loglin_forward(plan, &in, NULL, o, &final, work, queue, 0, NULL, NULL), "loglin_forward");
    support_require(loglin_backward(plan, &in, NULL, d_o, dfinal, &out, work, queue, 0, NULL, NULL), "loglin_backward");
    support_require(clFinish(queue), "clFinish");

    arena_read(&a, dtype, o, data->n_v, got->o);
    arena_read(&a, LOGLIN_F32, final.values, data->n_states, got->final);
    arena_read(&a, dtype, out.dq, data->n_k, got->dq);
    arena_read(&a, dtype, out.dk, data->n_k, got->dk);
    arena_read(&a, dtype, out.dv, data->n_v, got->dv);
    arena_read(&a, LOGLIN_F32, out.dg, data->n_gates, got->dg);
    arena_read(&a, LOGLIN_F32, out.dlevel_scales, data->n_levels, got->dlevel_scales);
    if (data->beta != NULL) {
        arena_read(&a, LOGLIN_F32, out.dbeta, data->n_gates, got->dbeta);
    }
    support_require(clEnqueueReadBuffer(queue, a.mem, CL_TRUE, final.position.offset * sizeof(int32_t),
                                        data->sequences * sizeof(int32_t), got->final_position, 0, NULL, NULL),
                    "clEnqueueReadBuffer");
    expect_pass(support_compare_forward(data, got, expected));
    expect_pass(support_compare_backward(data, got, expected));

    support_workspace_free(&workspace);
    loglin_plan_destroy(plan);
    support_results_free(got);
    support_results_free(expected);
    support_data_free(data);
    arena_close(&a);
}

Test(numerics, offsets_beyond_2_to_the_31_f16) {
    for (int op = 0; op < 2; op++) {
        const support_case c = {.op = (loglin_op)op, .length = 70, .dtype = LOGLIN_F16, .final_states = true};
        expect_far_offsets(&c);
    }
}

Test(numerics, offsets_beyond_2_to_the_31_f32) {
    for (int op = 0; op < 2; op++) {
        const support_case c = {.op = (loglin_op)op, .length = 70, .final_states = true};
        expect_far_offsets(&c);
    }
}

/* A workspace that no single allocation can hold is refused when the plan is made, in words. */
Test(numerics, workspace_beyond_the_largest_allocation) {
    cl_ulong largest = 0;
    support_require(clGetDeviceInfo(support_open()->id, CL_DEVICE_MAX_MEM_ALLOC_SIZE, sizeof largest, &largest, NULL),
                    "clGetDeviceInfo");
    for (unsigned phase = LOGLIN_FORWARD; phase <= LOGLIN_BACKWARD; phase *= 2) {
        const loglin_problem problem = {.batch = 1,
                                        .length = INT32_MAX,
                                        .heads = 64,
                                        .groups = 64,
                                        .dim_k = 64,
                                        .dim_v = 64,
                                        .levels = 32,
                                        .phases = phase};
        loglin_plan *plan = NULL;
        const loglin_status status = loglin_plan_create(support_open()->device, &problem, &plan);
        if (status == LOGLIN_OK) { /* on a device with very large allocations */
            cr_expect_leq(loglin_workspace_size(plan, (loglin_phase)phase), largest);
            loglin_plan_destroy(plan);
            continue;
        }
        cr_expect_eq(status, LOGLIN_UNSUPPORTED, "%s", loglin_strerror(status));
        cr_expect(strstr(loglin_last_error(), "workspace") != NULL, "the text: %s", loglin_last_error());
    }
}
