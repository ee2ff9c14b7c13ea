/* SPDX-License-Identifier: Apache-2.0 */
/* Products of floats with bfloat16 weights on NVIDIA's matrix units against double. */
#include "engine/nvidia_product.h"
#include "support_criterion.h"

#include <math.h>
#include <stdlib.h>

enum { BLOCK = 16 };

typedef struct product_case {
    size_t tokens, columns, blocks;
    bool parts; /* is there room for parts of sums? */
} product_case;

/* What is multiplied, as doubles. */
typedef struct operands {
    double *x, *w, *bias, *y;
    size_t x_stride, y_stride, rows;
} operands;

/* Numbers of many sizes in x, and NaN behind its columns. */
static operands make_operands(const product_case *c, size_t outputs) {
    support_random random = {.state = c->tokens * 1000003 + c->columns * 1009 + c->blocks};
    operands o = {.x_stride = (c->columns + BLOCK - 1) / BLOCK * BLOCK + BLOCK,
                  .y_stride = outputs + BLOCK,
                  .rows = c->blocks * BLOCK};
    o.x = support_alloc(c->tokens * o.x_stride, sizeof *o.x);
    o.w = support_alloc(o.rows * c->columns, sizeof *o.w);
    o.bias = support_alloc(o.rows, sizeof *o.bias);
    o.y = support_alloc(c->tokens * o.y_stride, sizeof *o.y);
    for (size_t i = 0; i < c->tokens * o.x_stride; i++) {
        const double x = ldexp(support_normal(&random), (int)(8 * support_uniform(&random)) - 4);
        o.x[i] = i % o.x_stride < c->columns ? support_round(LOGLIN_F32, x) : (double)NAN;
    }
    for (size_t i = 0; i < o.rows * c->columns; i++) {
        o.w[i] = support_round(LOGLIN_BF16, support_normal(&random) / sqrt((double)c->columns));
    }
    for (size_t i = 0; i < o.rows; i++) {
        o.bias[i] = support_round(LOGLIN_F32, support_normal(&random));
    }
    for (size_t i = 0; i < c->tokens * o.y_stride; i++) {
        o.y[i] = support_round(LOGLIN_F32, support_normal(&random));
    }
    return o;
}

static void free_operands(operands *o) {
    free(o->x);
    free(o->w);
    free(o->bias);
    free(o->y);
}

/* W x of a token and a row. */
static double multiply(const product_case *c, const operands *o, size_t token, size_t row) {
    double sum = 0;
    for (size_t k = 0; k < c->columns; k++) {
        sum += o->x[token * o->x_stride + k] * o->w[(row / BLOCK * c->columns + k) * BLOCK + row % BLOCK];
    }
    return sum;
}

static double expected_at(const product_case *c, const operands *o, int mode, size_t token, size_t i) {
    if (mode == PRODUCT_SWIGLU) {
        const size_t row = i / BLOCK * 2 * BLOCK + i % BLOCK;
        const double gate = multiply(c, o, token, row);
        return gate / (1 + exp(-gate)) * multiply(c, o, token, row + BLOCK);
    }
    return multiply(c, o, token, i) + o->bias[i] + (mode == PRODUCT_ADD ? o->y[token * o->y_stride + i] : 0);
}

/* As much as double says, and nothing between the rows. */
static void compare(const product_case *c, const operands *o, int mode, size_t outputs, const double *y) {
    double *got = support_alloc(c->tokens * outputs, sizeof *got);
    double *expected = support_alloc(c->tokens * outputs, sizeof *expected);
    bool kept = true;
    for (size_t token = 0; token < c->tokens; token++) {
        for (size_t i = 0; i < o->y_stride; i++) {
            const double x = y[token * o->y_stride + i];
            if (i >= outputs) {
                kept = kept && x == o->y[token * o->y_stride + i];
                continue;
            }
            got[token * outputs + i] = x;
            expected[token * outputs + i] = expected_at(c, o, mode, token, i);
        }
    }
    const double error = support_error(got, expected, c->tokens * outputs);
    cr_expect_leq(error, 1e-6, "%zu tokens, %zu columns, %zu blocks, parts %d, mode %d: error %g", c->tokens,
                  c->columns, c->blocks, c->parts, mode, error);
    cr_expect(kept, "%zu tokens, %zu columns, %zu blocks, mode %d: written between the rows of y", c->tokens,
              c->columns, c->blocks, mode);
    free(got);
    free(expected);
}

static void check(const loglin_nvidia_product_kernels *kernels, const product_case *c, int mode) {
    const support_device *device = support_open();
    const size_t rows = c->blocks * BLOCK, outputs = mode == PRODUCT_SWIGLU ? rows / 2 : rows;
    const size_t part_floats = c->parts ? 32 * c->tokens * rows : 0;
    operands o = make_operands(c, outputs);
    support_array x = support_input(LOGLIN_F32, o.x, c->tokens * o.x_stride, 0);
    support_array w = support_input(LOGLIN_BF16, o.w, rows * c->columns, 0);
    support_array bias = support_input(LOGLIN_F32, o.bias, rows, BLOCK);
    support_array y = support_inout(LOGLIN_F32, o.y, c->tokens * o.y_stride, 0);
    support_workspace parts = support_workspace_make(part_floats * sizeof(float));
    const loglin_nvidia_product what = {
        .x = x.mem,
        .w = w.mem,
        .bias = mode == PRODUCT_SWIGLU ? NULL : bias.mem,
        .y = y.mem,
        .x_stride = o.x_stride,
        .y_stride = o.y_stride,
        .tokens = c->tokens,
        .columns = c->columns,
        .blocks = c->blocks,
        .bias_at = BLOCK,
        .mode = mode,
        .parts = parts.mem,
        .part_floats = part_floats,
    };
    support_require(loglin_nvidia_product_enqueue(kernels, &what, device->queue), "loglin_nvidia_product_enqueue");
    double *got = support_alloc(c->tokens * o.y_stride, sizeof *got);
    cr_expect(support_read(&y, got), "written beside y");
    cr_expect(support_workspace_intact(&parts), "written beside the parts");
    compare(c, &o, mode, outputs, got);
    free(got);
    free_operands(&o);
    support_workspace_free(&parts);
    support_array *const arrays[] = {&x, &w, &bias, &y};
    for (size_t i = 0; i < sizeof arrays / sizeof arrays[0]; i++) {
        support_array_free(arrays[i]);
    }
}

static void open_kernels(loglin_nvidia_product_kernels *kernels) {
    const loglin_status status = loglin_nvidia_product_create(support_open()->device, kernels);
    if (status == LOGLIN_UNSUPPORTED) {
        cr_skip_test("%s", loglin_last_error());
    }
    support_require(status, "loglin_nvidia_product_create");
}

/* Each case in every mode. */
static void check_all(const product_case *cases, size_t count) {
    loglin_nvidia_product_kernels kernels;
    open_kernels(&kernels);
    for (size_t i = 0; i < count; i++) {
        for (int mode = PRODUCT_SET; mode <= PRODUCT_SWIGLU; mode++) {
            check(&kernels, &cases[i], mode);
        }
    }
    loglin_nvidia_product_destroy(&kernels);
}

Test(nvidia_product, few_tokens) {
    loglin_nvidia_product_kernels kernels;
    open_kernels(&kernels);
    for (size_t tokens = 1; tokens <= 17; tokens++) {
        for (int mode = PRODUCT_SET; mode <= PRODUCT_SWIGLU; mode++) {
            check(&kernels, &(product_case){.tokens = tokens, .columns = 96, .blocks = 10}, mode);
        }
    }
    loglin_nvidia_product_destroy(&kernels);
}

Test(nvidia_product, across_the_tiles) {
    static const product_case cases[] = {
        {.tokens = 64, .columns = 64, .blocks = 8},    {.tokens = 65, .columns = 1, .blocks = 2},
        {.tokens = 127, .columns = 65, .blocks = 18},  {.tokens = 128, .columns = 130, .blocks = 4},
        {.tokens = 129, .columns = 255, .blocks = 6},  {.tokens = 200, .columns = 257, .blocks = 26},
        {.tokens = 31, .columns = 1000, .blocks = 12}, {.tokens = 300, .columns = 77, .blocks = 34},
    };
    check_all(cases, sizeof cases / sizeof cases[0]);
}

/* Sums in parts, and long ones. */
Test(nvidia_product, long_sums) {
    static const product_case cases[] = {
        {.tokens = 40, .columns = 4096, .blocks = 12},
        {.tokens = 40, .columns = 4096, .blocks = 12, .parts = true},
        {.tokens = 3, .columns = 777, .blocks = 10, .parts = true},
        {.tokens = 150, .columns = 1540, .blocks = 6, .parts = true},
    };
    check_all(cases, sizeof cases / sizeof cases[0]);
}
