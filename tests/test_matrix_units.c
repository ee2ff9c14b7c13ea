/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Shapes that NVIDIA's engines on matrix units take, in 16-bit storage, across the boundaries of their tiles and segments.
 * Elsewhere the first shape of each test is run, in bf16: what takes it there has its boundaries in the other tests.
 */
#include "support_criterion.h"
#include "support_limits.h"

#include "engine/nvidia.h"

#include <stdlib.h>
#include <string.h>

static bool has_boundaries(void) {
    char vendor[256] = "";
    (void)clGetDeviceInfo(support_open()->id, CL_DEVICE_VENDOR, sizeof vendor, vendor, NULL);
    return strstr(vendor, "NVIDIA") != NULL;
}

/* How many of these shapes are run. */
static size_t some(size_t count) {
    return has_boundaries() ? count : 1;
}

/* On NVIDIA the engine's own kernels have run: where a program does not build, another engine gives the answers. */
static void expect_launched(check_function *check, loglin_op op) {
    const char *forward = op == LOGLIN_GATED_DELTA ? "nvidia_delta_walk" : "nvidia_outputs";
    const char *backward = op == LOGLIN_GATED_DELTA ? "nvidia_delta_keys" : "nb_prepare";
    const char *kernel = check == support_check_backward ? backward : forward;
    cr_expect(!has_boundaries() || support_launches(kernel, 0) > 0, "%s was not launched", kernel);
}

/*
 * Without wgmma everything is right still, and half as fast, so it is noticed here alone: devices 9.x have it, unless it is
 * not wanted.
 */
Test(matrix_units, wgmma_passes_its_trial_run) {
    const cl_device_info compute_capability_major = 0x4000; /* CL_DEVICE_COMPUTE_CAPABILITY_MAJOR_NV */
    const char *options = getenv("LOGLIN_BUILD_OPTIONS");
    const bool wanted = options == NULL || strstr(options, "NV_NO_WGMMA") == NULL;
    cl_uint major = 0;
    (void)clGetDeviceInfo(support_open()->id, compute_capability_major, sizeof major, &major, NULL);
    for (int dtype = LOGLIN_F16; has_boundaries() && major == 9 && dtype <= LOGLIN_BF16; dtype++) {
        cr_expect_eq(loglin_nvidia_probe_wgmma(support_open()->device, (loglin_dtype)dtype, 1 << 16),
                     wanted ? LOGLIN_OK : LOGLIN_UNSUPPORTED, "%s", loglin_last_error());
    }
}

static void expect_16_bit_of(check_function *check, support_case c) {
    for (int dtype = has_boundaries() ? LOGLIN_F16 : LOGLIN_BF16; dtype <= LOGLIN_BF16; dtype++) {
        c.dtype = (loglin_dtype)dtype;
        expect_pass(check(&c));
        expect_launched(check, c.op);
    }
}

static void expect_16_bit(support_case c) {
    expect_16_bit_of(support_check_forward, c);
}

Test(matrix_units, lengths) {
    static const size_t lengths[] = {777, 1, 63, 64, 65, 127, 200, 511, 512, 513};
    for (size_t i = 0; i < some(sizeof lengths / sizeof lengths[0]); i++) {
        expect_16_bit((support_case){
            .length = lengths[i], .dim_k = 32, .dim_v = 64, .final_states = true, .log_decay = i % 2 == 1});
    }
}

Test(matrix_units, dimensions) {
    static const struct {
        size_t heads, k, v; /* four heads: level scales in rows of multiples of 16 bytes, which are copied as boxes */
    } shapes[] = {{4, 128, 64}, {1, 16, 16}, {4, 32, 192}, {4, 64, 48}, {1, 192, 128}, {1, 224, 16}, {1, 256, 256}};
    for (size_t i = 0; i < some(sizeof shapes / sizeof shapes[0]); i++) {
        expect_16_bit((support_case){
            .length = 600, .heads = shapes[i].heads, .dim_k = shapes[i].k, .dim_v = shapes[i].v, .final_states = true});
    }
}

Test(matrix_units, many_segments) {
    expect_16_bit((support_case){.length = 4609, .heads = 1, .dim_k = 16, .dim_v = 16, .final_states = true});
}

Test(matrix_units, groups_and_batch) {
    for (size_t i = 0; i < some(3); i++) {
        const size_t groups = (size_t)4 >> i;
        expect_16_bit(
            (support_case){.batch = 2, .length = 580, .heads = 4, .groups = groups, .dim_k = 32, .dim_v = 32});
    }
}

Test(matrix_units, options) {
    const support_case c = {.length = 700, .heads = 4, .dim_k = 64, .dim_v = 64};
    for (size_t i = 0; i < some(6); i++) {
        support_case one = c;
        one.normalize_qk = i == 0;
        one.scale = i == 1 ? 0.125f : 0.0f;
        one.no_gates = i == 2;
        one.offset = i == 3 ? 3 : 0;
        one.extra_levels = i == 4 ? 5 : 0;
        one.out_of_order = one.events = i == 5;
        expect_16_bit(one);
        one.weight_dtype = LOGLIN_BF16;
        one.dtype = LOGLIN_BF16;
        expect_pass(support_check_forward(&one));
    }
}

static void expect_16_bit_gradients(support_case c) {
    expect_16_bit_of(support_check_backward, c);
}

Test(matrix_units, backward_lengths) {
    static const size_t lengths[] = {513, 1, 65, 128, 129};
    for (size_t i = 0; i < some(sizeof lengths / sizeof lengths[0]); i++) {
        expect_16_bit_gradients((support_case){.length = lengths[i], .dim_k = 32, .dim_v = 64});
    }
}

Test(matrix_units, backward_dimensions) {
    static const struct { size_t k, v; } shapes[] = {{128, 64}, {16, 16}, {80, 112}, {192, 32}};
    for (size_t i = 0; i < some(sizeof shapes / sizeof shapes[0]); i++) {
        expect_16_bit_gradients((support_case){.length = 300, .heads = 1, .dim_k = shapes[i].k, .dim_v = shapes[i].v});
    }
}

Test(matrix_units, backward_many_chunks) {
    const support_case c = {.dtype = LOGLIN_BF16, .length = 4609, .heads = 1, .dim_k = 16, .dim_v = 16};
    expect_pass(support_check_backward(&c));
    expect_launched(support_check_backward, c.op);
}

Test(matrix_units, backward_groups_and_batch) {
    for (size_t i = 0; i < some(3); i++) {
        const size_t groups = (size_t)4 >> i;
        expect_16_bit_gradients(
            (support_case){.batch = 2, .length = 200, .heads = 4, .groups = groups, .dim_k = 32, .dim_v = 32});
    }
}

Test(matrix_units, backward_options) {
    for (size_t i = 0; i < some(8); i++) {
        const support_case c = {
            .length = 300,
            .dim_k = 32,
            .dim_v = 32,
            .weight_dtype = i % 4 == 1 ? LOGLIN_BF16 : LOGLIN_F32,
            .dtype = i % 4 < 2 ? LOGLIN_BF16 : LOGLIN_F16,
            .normalize_qk = i == 0,
            .scale = i == 1 ? 0.125f : 0.0f,
            .no_gates = i == 2,
            .offset = i == 3 ? 3 : 0,
            .extra_levels = i == 4 ? 5 : 0,
            .out_of_order = i == 5,
            .events = i == 5,
            .skip_optional = i == 6,
            .final_states = i == 7,
        };
        expect_pass(support_check_backward(&c));
        expect_launched(support_check_backward, c.op);
    }
}

/* Level scales of 16 bits, as boxes where there are eight heads, as o is then, else a row starts anywhere in its words. */
Test(matrix_units, scales_of_16_bits) {
    static const struct {
        size_t heads, groups, v, offset, extra;
    } shapes[] = {{8, 1, 64, 0, 0}, {8, 1, 64, 1, 0}, {3, 1, 64, 0, 0}, {3, 1, 64, 1, 0}, {8, 2, 96, 0, 3}};
    for (size_t i = 0; i < some(sizeof shapes / sizeof shapes[0]); i++) {
        for (int dtype = has_boundaries() ? LOGLIN_F16 : LOGLIN_BF16; dtype <= LOGLIN_BF16; dtype++) {
            const support_case c = {.dtype = (loglin_dtype)dtype,
                                    .weight_dtype = (loglin_dtype)dtype,
                                    .batch = shapes[i].groups,
                                    .length = 700,
                                    .heads = shapes[i].heads,
                                    .groups = shapes[i].groups,
                                    .dim_k = 128,
                                    .dim_v = shapes[i].v,
                                    .offset = shapes[i].offset,
                                    .extra_levels = shapes[i].extra};
            expect_pass(support_check_forward(&c));
            expect_launched(support_check_forward, c.op);
            expect_pass(support_check_backward(&c));
            expect_launched(support_check_backward, c.op);
        }
    }
}

/* The delta rule: tokens across the boundaries of chunks, levels that end together, slices of V. */
Test(matrix_units, delta_lengths) {
    static const size_t lengths[] = {640, 1, 63, 64, 65, 129, 200, 448, 513};
    for (size_t i = 0; i < some(sizeof lengths / sizeof lengths[0]); i++) {
        expect_16_bit((support_case){
            .op = LOGLIN_GATED_DELTA, .length = lengths[i], .dim_k = 32, .dim_v = 48, .final_states = true});
    }
}

Test(matrix_units, delta_dimensions) {
    static const struct { size_t k, v; } shapes[] = {{128, 128}, {16, 16}, {32, 192}, {192, 384}, {256, 16}};
    for (size_t i = 0; i < some(sizeof shapes / sizeof shapes[0]); i++) {
        expect_16_bit((support_case){.op = LOGLIN_GATED_DELTA,
                                     .length = 330,
                                     .heads = 1,
                                     .dim_k = shapes[i].k,
                                     .dim_v = shapes[i].v,
                                     .final_states = true});
    }
}

Test(matrix_units, delta_options) {
    const support_case c = {
        .op = LOGLIN_GATED_DELTA, .batch = 2, .length = 230, .heads = 4, .groups = 2, .dim_k = 64, .dim_v = 32};
    for (size_t i = 0; i < some(7); i++) {
        support_case one = c;
        one.normalize_qk = i == 0;
        one.scale = i == 1 ? 0.125f : 0.0f;
        one.no_gates = i == 2;
        one.offset = i == 3 ? 3 : 0;
        one.extra_levels = i == 4 ? 5 : 0;
        one.out_of_order = one.events = i == 5;
        one.skip_optional = i == 6;
        expect_16_bit(one);
        expect_16_bit_gradients(one);
        one.weight_dtype = LOGLIN_BF16;
        one.dtype = LOGLIN_BF16;
        expect_pass(support_check_forward(&one));
        expect_pass(support_check_backward(&one));
    }
}

Test(matrix_units, delta_backward_lengths) {
    static const size_t lengths[] = {513, 1, 64, 65, 200, 448};
    for (size_t i = 0; i < some(sizeof lengths / sizeof lengths[0]); i++) {
        expect_16_bit_gradients(
            (support_case){.op = LOGLIN_GATED_DELTA, .length = lengths[i], .dim_k = 32, .dim_v = 48});
    }
}

Test(matrix_units, delta_backward_dimensions) {
    static const struct { size_t k, v; } shapes[] = {{128, 128}, {16, 16}, {32, 192}, {192, 384}, {256, 16}};
    for (size_t i = 0; i < some(sizeof shapes / sizeof shapes[0]); i++) {
        expect_16_bit_gradients((support_case){
            .op = LOGLIN_GATED_DELTA, .length = 200, .heads = 1, .dim_k = shapes[i].k, .dim_v = shapes[i].v});
    }
    expect_16_bit_gradients(
        (support_case){.op = LOGLIN_GATED_DELTA, .length = 130, .dim_k = 16, .dim_v = 16, .final_states = true});
}
