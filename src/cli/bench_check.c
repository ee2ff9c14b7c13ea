/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows of outputs from their definition, in double, each in O(T (K + V)).  With A_t = exp(g_t) (I - beta_t k_t k_t^T), for
 * the scalar-gated operator exp(g_t), and b_s = beta_s, for that operator 1, and w_ts = lambda_t[level(t, s)]:
 *
 *     o_t  = sum_{s <= t} w_ts b_s (k_s . x_s) v_s,    x_t = q_t,          x_{s-1} = A_s x_s
 *     dv_s = sum_{t >= s} w_ts b_s (q_t . y_t) do_t,   y_s = k_s,          y_t = A_t y_{t-1}
 *     dq_t = sum over the group's heads of z_t,        z_s = A_s z_{s-1} + w_ts b_s (do_t . v_s) k_s
 */
#include "cli/bench.h"

#include "tensorfile/dtype.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS_OF_O = 8, ROWS_OF_DV = 8, ROWS_OF_DQ = 2 };

/* The tensors of the last sequence on the host. */
typedef struct sequence {
    const loglin_problem *problem;
    void *data[LOGLIN_BENCH_TENSORS]; /* NULL: not needed */
} sequence;

static loglin_status read_sequence(loglin_bench_machine *machine, const loglin_bench_load *load, sequence *s) {
    const loglin_problem *p = &load->problem;
    for (loglin_bench_tensor t = 0; t < LOGLIN_BENCH_WORKSPACE; ++t) {
        const cl_mem mem = load->mem[t < LOGLIN_BENCH_INPUTS ? load->last : 0][t];
        const size_t size = p->length * loglin_cli_bench_width(p, t) * loglin_cli_bench_element(p, t);
        if (mem == NULL || t == LOGLIN_BENCH_DK || t > LOGLIN_BENCH_DV) {
            continue;
        }
        s->data[t] = malloc(size);
        if (s->data[t] == NULL) {
            return loglin_cli_bench_fail(machine, LOGLIN_OUT_OF_MEMORY, "out of memory for the check");
        }
        const cl_int code =
            clEnqueueReadBuffer(machine->queue, mem, CL_TRUE, (p->batch - 1) * size, size, s->data[t], 0, NULL, NULL);
        if (code != CL_SUCCESS) {
            return loglin_cli_bench_fail(machine, code, "reading for the check: %s", loglin_strerror(code));
        }
    }
    return LOGLIN_OK;
}

/* `count` elements of token t from element `at` of it on. */
static void read_row(const sequence *s, loglin_bench_tensor tensor, size_t t, size_t at, size_t count, float *row) {
    static const loglin_tensor_dtype types[] = {LOGLIN_TENSOR_F32, LOGLIN_TENSOR_F16, LOGLIN_TENSOR_BF16};
    const loglin_tensor_dtype type = types[loglin_cli_bench_dtype(s->problem, tensor)];
    const size_t first = t * loglin_cli_bench_width(s->problem, tensor) + at;
    loglin_tensor_to_float(type, (const char *)s->data[tensor] + first * loglin_tensor_dtype_size(type), count, row);
}

static double read_one(const sequence *s, loglin_bench_tensor tensor, size_t t, size_t at) {
    float value = 0.0F;
    read_row(s, tensor, t, at, 1, &value);
    return (double)value;
}

/* q, k: of the head's group; v, do, o, dv: of the head. */
static void read_head(const sequence *s, loglin_bench_tensor tensor, size_t t, size_t head, float *row) {
    const loglin_problem *p = s->problem;
    const bool grouped = tensor == LOGLIN_BENCH_Q || tensor == LOGLIN_BENCH_K || tensor == LOGLIN_BENCH_DQ;
    const size_t width = grouped ? p->dim_k : p->dim_v;
    read_row(s, tensor, t, (grouped ? head / (p->heads / p->groups) : head) * width, width, row);
}

static double beta_of(const sequence *s, size_t t, size_t head) {
    return s->problem->op == LOGLIN_GATED_DELTA ? read_one(s, LOGLIN_BENCH_BETA, t, head) : 1.0;
}

/* lambda_t[level(t, s)] */
static double weight_of(const sequence *all, size_t t, size_t s, size_t head) {
    size_t level = 0;
    for (size_t bits = t ^ s; bits != 0; bits >>= 1) {
        level++;
    }
    return read_one(all, LOGLIN_BENCH_LEVEL_SCALES, t, head * all->problem->levels + level);
}

static double dot(const double *x, const float *y, size_t count) {
    double sum = 0.0;
    for (size_t i = 0; i < count; ++i) {
        sum += x[i] * (double)y[i];
    }
    return sum;
}

static void add(double *x, double factor, const float *y, size_t count) {
    for (size_t i = 0; i < count; ++i) {
        x[i] += factor * (double)y[i];
    }
}

/* x = A_t x, k being k_t */
static void transition(const sequence *s, size_t t, size_t head, const float *k, double *x) {
    const size_t count = s->problem->dim_k;
    if (s->problem->op == LOGLIN_GATED_DELTA) {
        add(x, -beta_of(s, t, head) * dot(x, k, count), k, count);
    }
    const double decay = exp(read_one(s, LOGLIN_BENCH_G, t, head));
    for (size_t i = 0; i < count; ++i) {
        x[i] *= decay;
    }
}

static void start_with(double *x, const float *row, size_t count) {
    for (size_t i = 0; i < count; ++i) {
        x[i] = (double)row[i];
    }
}

static void expect_o(const sequence *all, size_t t, size_t head, double *o) {
    const loglin_problem *p = all->problem;
    double x[LOGLIN_MAX_DIM] = {0};
    float k[LOGLIN_MAX_DIM] = {0};
    float row[LOGLIN_MAX_DIM] = {0};
    read_head(all, LOGLIN_BENCH_Q, t, head, row);
    start_with(x, row, p->dim_k);
    for (size_t s = t + 1; s-- > 0;) {
        read_head(all, LOGLIN_BENCH_K, s, head, k);
        read_head(all, LOGLIN_BENCH_V, s, head, row);
        const double factor = weight_of(all, t, s, head) * beta_of(all, s, head);
        add(o, factor * dot(x, k, p->dim_k), row, p->dim_v);
        transition(all, s, head, k, x);
    }
}

static void expect_dv(const sequence *all, size_t s, size_t head, double *dv) {
    const loglin_problem *p = all->problem;
    const double beta = beta_of(all, s, head);
    double y[LOGLIN_MAX_DIM] = {0};
    float k[LOGLIN_MAX_DIM] = {0};
    float row[LOGLIN_MAX_DIM] = {0};
    read_head(all, LOGLIN_BENCH_K, s, head, k);
    start_with(y, k, p->dim_k);
    for (size_t t = s; t < p->length; ++t) {
        if (t > s) {
            read_head(all, LOGLIN_BENCH_K, t, head, k);
            transition(all, t, head, k, y);
        }
        read_head(all, LOGLIN_BENCH_Q, t, head, row);
        const double factor = weight_of(all, t, s, head) * beta * dot(y, row, p->dim_k);
        read_head(all, LOGLIN_BENCH_D_O, t, head, row);
        add(dv, factor, row, p->dim_v);
    }
}

/* Of the group of a head. */
static void expect_dq(const sequence *all, size_t t, size_t head, double *dq) {
    const loglin_problem *p = all->problem;
    const size_t share = p->heads / p->groups;
    float k[LOGLIN_MAX_DIM] = {0};
    float v[LOGLIN_MAX_DIM] = {0};
    float row[LOGLIN_MAX_DIM] = {0};
    for (size_t h = head / share * share; h < (head / share + 1) * share; ++h) {
        double d_o[LOGLIN_MAX_DIM] = {0};
        double z[LOGLIN_MAX_DIM] = {0};
        read_head(all, LOGLIN_BENCH_D_O, t, h, row);
        start_with(d_o, row, p->dim_v);
        for (size_t s = 0; s <= t; ++s) {
            read_head(all, LOGLIN_BENCH_K, s, h, k);
            read_head(all, LOGLIN_BENCH_V, s, h, v);
            transition(all, s, h, k, z);
            const double factor = weight_of(all, t, s, h) * beta_of(all, s, h);
            add(z, factor * dot(d_o, v, p->dim_v), k, p->dim_k);
        }
        for (size_t i = 0; i < p->dim_k; ++i) {
            dq[i] += z[i];
        }
    }
}

static size_t random_below(loglin_bench_machine *machine, size_t bound) {
    return (size_t)((double)loglin_cli_bench_random(machine, 0.0F, 1.0F) * (double)bound);
}

/* |found - expected| / |expected| over `rows` rows of random tokens and heads, the first that of the last token. */
static double find_error(loglin_bench_machine *machine, const sequence *s, loglin_bench_tensor tensor, size_t rows,
                         void (*expect)(const sequence *, size_t, size_t, double *)) {
    const loglin_problem *p = s->problem;
    const size_t width = tensor == LOGLIN_BENCH_DQ ? p->dim_k : p->dim_v;
    double difference = 0.0;
    double norm = 0.0;
    for (size_t i = 0; i < rows; ++i) {
        const size_t t = i == 0 ? p->length - 1 : random_below(machine, p->length);
        const size_t head = random_below(machine, p->heads);
        double expected[LOGLIN_MAX_DIM] = {0};
        float found[LOGLIN_MAX_DIM] = {0};
        expect(s, t, head, expected);
        read_head(s, tensor, t, head, found);
        for (size_t j = 0; j < width; ++j) {
            const double distance = (double)found[j] - expected[j];
            difference += distance * distance;
            norm += expected[j] * expected[j];
        }
    }
    return sqrt(difference / norm);
}

/* NaN if one of them is. */
static double larger(double x, double y) {
    return isnan(x) || x > y ? x : y;
}

loglin_status loglin_cli_bench_check(loglin_bench_machine *machine, const loglin_bench_load *load, double *error) {
    sequence s = {.problem = &load->problem};
    const loglin_status status = read_sequence(machine, load, &s);
    if (status == LOGLIN_OK) {
        *error = find_error(machine, &s, LOGLIN_BENCH_O, ROWS_OF_O, expect_o);
        if ((load->problem.phases & LOGLIN_BACKWARD) != 0) {
            *error = larger(*error, find_error(machine, &s, LOGLIN_BENCH_DV, ROWS_OF_DV, expect_dv));
            *error = larger(*error, find_error(machine, &s, LOGLIN_BENCH_DQ, ROWS_OF_DQ, expect_dq));
        }
    }
    for (size_t i = 0; i < LOGLIN_BENCH_TENSORS; ++i) {
        free(s.data[i]);
    }
    return status;
}
