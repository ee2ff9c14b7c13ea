/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Training with loglin: multi-query associative recall.  A sequence lists pairs "key value" and then asks for keys; at
 * each of these the model has to name the value.  Attention and its gradient are loglin's, all else is plain C here:
 *
 *     x_0 = embedding of the token;  two layers x += W_out mixer(u), u_t = [rmsnorm(x_t), rmsnorm(x_{t-1})];
 *     mixer: q, k, v and, per head, g = -0.1 softplus(.) and level weights softplus(.) from u W_in + bias;
 *     logits = rmsnorm(x_2) W_logits, cross-entropy at the positions that ask.
 *
 * The mixer "loglinear" has a weight for each level.  "linear" projects as many values, but gives all levels of a token
 * and head one weight, softplus of their mean: that is linear attention, with one state, of exactly the same size.
 *
 *     recall [--steps N] [--seed S] [--mixer linear|loglinear|both] [--pairs P] [--length T] [--check]
 *
 * Exits with 1 if the loss has not fallen below 0.9 of guessing.  --check instead compares the gradients of the whole
 * model with finite differences.
 */
#include <loglin.h>

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    NUM_KEYS = 32,
    NUM_VALUES = 32, /* value v is token NUM_KEYS + v */
    BATCH = 16,
    MAX_LENGTH = 4096,
    LAYERS = 2,
    WIDTH = 64,
    HEADS = 2,
    DIM_K = 16,
    DIM_V = 16,
    MIXED = HEADS * DIM_V,
    GATES_BEGIN = 2 * DIM_K + MIXED, /* columns of a layer's projection: q, k, v, gates, level weights */
    LEVELS_BEGIN = GATES_BEGIN + HEADS,
    EVALUATIONS = 10, /* lines printed while it learns */
};

static const float GATE_SIZE = 0.1F;
static const float LEARNING_RATE = 3e-3F;
static const double GOOD_LOSS = 0.9; /* of log(NUM_VALUES) */

/* ---- Small things ------------------------------------------------------------------------------------------------ */

static void check(loglin_status status, const char *what) {
    if (status != LOGLIN_OK) {
        fprintf(stderr, "recall: %s: %s: %s\n", what, loglin_strerror(status), loglin_last_error());
        exit(1);
    }
}

static float *allocate(size_t count) {
    float *values = calloc(count, sizeof *values);
    if (values == NULL) {
        fprintf(stderr, "recall: out of memory\n");
        exit(1);
    }
    return values;
}

/* splitmix64 */
static uint64_t random_bits(uint64_t *state) {
    uint64_t x = *state += 0x9E3779B97F4A7C15U;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9U;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBU;
    return x ^ (x >> 31);
}

static size_t random_below(uint64_t *state, size_t bound) {
    return (size_t)(random_bits(state) % bound);
}

static float random_normal(uint64_t *state) {
    const double u = ((double)(random_bits(state) >> 11) + 0.5) * 0x1p-53;
    const double v = (double)(random_bits(state) >> 11) * 0x1p-53;
    return (float)(sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v));
}

static float softplus(float x) {
    return x > 20.0F ? x : log1pf(expf(x));
}

static float sigmoid(float x) {
    return 1.0F / (1.0F + expf(-x));
}

/* c [n, m] += a [n, k] b [k, m] */
static void multiply(float *c, const float *a, const float *b, size_t n, size_t k, size_t m) {
    for (size_t i = 0; i < n; i++) {
        for (size_t j = 0; j < k; j++) {
            for (size_t l = 0; l < m; l++) {
                c[i * m + l] += a[i * k + j] * b[j * m + l];
            }
        }
    }
}

/* The gradients of multiply: da += dc b^T, db += a^T dc. */
static void multiply_backward(float *da, float *db, const float *dc, const float *a, const float *b, size_t n, size_t k,
                              size_t m) {
    for (size_t i = 0; i < n; i++) {
        for (size_t j = 0; j < k; j++) {
            float sum = 0.0F;
            for (size_t l = 0; l < m; l++) {
                sum += dc[i * m + l] * b[j * m + l];
                db[j * m + l] += a[i * k + j] * dc[i * m + l];
            }
            da[i * k + j] += sum;
        }
    }
}

static float inverse_rms(const float *x) {
    float sum = 0.0F;
    for (size_t i = 0; i < WIDTH; i++) {
        sum += x[i] * x[i];
    }
    return 1.0F / sqrtf(sum / WIDTH + 1e-5F);
}

static void normalize(float *y, const float *x, const float *weight) {
    const float r = inverse_rms(x);
    for (size_t i = 0; i < WIDTH; i++) {
        y[i] = x[i] * r * weight[i];
    }
}

/* dx and dweight += the gradients of normalize. */
static void normalize_backward(float *dx, float *dweight, const float *dy, const float *x, const float *weight) {
    const float r = inverse_rms(x);
    float mean = 0.0F;
    for (size_t i = 0; i < WIDTH; i++) {
        dweight[i] += dy[i] * x[i] * r;
        mean += dy[i] * weight[i] * x[i] * r / WIDTH;
    }
    for (size_t i = 0; i < WIDTH; i++) {
        dx[i] += r * (dy[i] * weight[i] - x[i] * r * mean);
    }
}

/* ---- The task ---------------------------------------------------------------------------------------------------- */

typedef struct task {
    size_t pairs, length;
    size_t *tokens;  /* [BATCH, length] */
    size_t *answers; /* [BATCH, length]: the value to name, from position 2 pairs on */
} task;

static void draw_sequence(const task *t, size_t *tokens, size_t *answers, uint64_t *state) {
    size_t keys[NUM_KEYS];
    size_t value_of[NUM_KEYS];
    for (size_t i = 0; i < NUM_KEYS; i++) {
        keys[i] = i;
    }
    for (size_t i = 0; i < t->pairs; i++) {
        const size_t j = i + random_below(state, NUM_KEYS - i);
        const size_t key = keys[j];
        keys[j] = keys[i];
        keys[i] = key;
        value_of[key] = random_below(state, NUM_VALUES);
        tokens[2 * i] = key;
        tokens[2 * i + 1] = NUM_KEYS + value_of[key];
    }
    for (size_t i = 2 * t->pairs; i < t->length; i++) {
        tokens[i] = keys[random_below(state, t->pairs)];
        answers[i] = value_of[tokens[i]];
    }
}

static void draw_batch(const task *t, uint64_t *state) {
    for (size_t b = 0; b < BATCH; b++) {
        draw_sequence(t, t->tokens + b * t->length, t->answers + b * t->length, state);
    }
}

/* ---- Attention: the plan, and each array on the device and on the host -------------------------------------------- */

enum { Q, K, V, G, LEVEL_SCALES, O, ARRAYS };

typedef struct array {
    size_t row; /* elements of a token */
    cl_mem mem;
    float *host;
} array;

typedef struct attention {
    size_t tokens, levels;
    cl_context context;
    cl_command_queue queue;
    loglin_device *device;
    loglin_plan *plan;
    loglin_buffer workspace;
    array value[ARRAYS], gradient[ARRAYS];
} attention;

static cl_mem create_buffer(cl_context context, size_t size) {
    cl_int code;
    cl_mem mem = clCreateBuffer(context, CL_MEM_READ_WRITE, size, NULL, &code);
    check(code, "clCreateBuffer");
    return mem;
}

static void attention_create(attention *a, size_t length) {
    cl_device_id id;
    cl_int code;
    check(loglin_select_device(NULL, &id), "loglin_select_device");
    a->context = clCreateContext(NULL, 1, &id, NULL, NULL, &code);
    check(code, "clCreateContext");
    a->queue = clCreateCommandQueueWithProperties(a->context, id, NULL, &code);
    check(code, "clCreateCommandQueueWithProperties");

    a->tokens = BATCH * length;
    a->levels = loglin_num_levels(length);
    const loglin_problem problem = {.op = LOGLIN_MAMBA2,
                                    .batch = BATCH,
                                    .length = length,
                                    .heads = HEADS,
                                    .groups = 1,
                                    .dim_k = DIM_K,
                                    .dim_v = DIM_V,
                                    .levels = a->levels,
                                    .normalize_qk = 1,
                                    .phases = LOGLIN_FORWARD | LOGLIN_BACKWARD};
    check(loglin_device_create(a->context, id, &a->device), "loglin_device_create");
    check(loglin_plan_create(a->device, &problem, &a->plan), "loglin_plan_create");

    const size_t forward = loglin_workspace_size(a->plan, LOGLIN_FORWARD);
    const size_t backward = loglin_workspace_size(a->plan, LOGLIN_BACKWARD);
    a->workspace.mem = create_buffer(a->context, (forward > backward ? forward : backward) + sizeof(float));
    const size_t rows[ARRAYS] = {DIM_K, DIM_K, MIXED, HEADS, HEADS * a->levels, MIXED};
    for (size_t i = 0; i < ARRAYS; i++) {
        const size_t count = a->tokens * rows[i];
        a->value[i] = (array){rows[i], create_buffer(a->context, count * sizeof(float)), allocate(count)};
        a->gradient[i] = (array){rows[i], create_buffer(a->context, count * sizeof(float)), allocate(count)};
    }
}

static void attention_destroy(attention *a) {
    for (size_t i = 0; i < ARRAYS; i++) {
        clReleaseMemObject(a->value[i].mem);
        clReleaseMemObject(a->gradient[i].mem);
        free(a->value[i].host);
        free(a->gradient[i].host);
    }
    clReleaseMemObject(a->workspace.mem);
    loglin_plan_destroy(a->plan);
    loglin_device_destroy(a->device);
    clReleaseCommandQueue(a->queue);
    clReleaseContext(a->context);
}

static void upload(const attention *a, const array *x) {
    const size_t size = a->tokens * x->row * sizeof(float);
    check(clEnqueueWriteBuffer(a->queue, x->mem, CL_TRUE, 0, size, x->host, 0, NULL, NULL), "clEnqueueWriteBuffer");
}

static void download(const attention *a, const array *x) {
    const size_t size = a->tokens * x->row * sizeof(float);
    check(clEnqueueReadBuffer(a->queue, x->mem, CL_TRUE, 0, size, x->host, 0, NULL, NULL), "clEnqueueReadBuffer");
}

static loglin_inputs upload_inputs(const attention *a) {
    for (size_t i = 0; i < O; i++) {
        upload(a, &a->value[i]);
    }
    return (loglin_inputs){.q.mem = a->value[Q].mem,
                           .k.mem = a->value[K].mem,
                           .v.mem = a->value[V].mem,
                           .g.mem = a->value[G].mem,
                           .level_scales.mem = a->value[LEVEL_SCALES].mem};
}

/* value[O] from the other values. */
static void attention_forward(const attention *a) {
    const loglin_inputs in = upload_inputs(a);
    const loglin_buffer o = {.mem = a->value[O].mem};
    check(loglin_forward(a->plan, &in, NULL, o, NULL, a->workspace, a->queue, 0, NULL, NULL), "loglin_forward");
    download(a, &a->value[O]);
}

/* The other gradients from gradient[O] and the values. */
static void attention_backward(const attention *a) {
    const loglin_inputs in = upload_inputs(a);
    const loglin_buffer d_o = {.mem = a->gradient[O].mem};
    const loglin_gradients out = {.dq.mem = a->gradient[Q].mem,
                                  .dk.mem = a->gradient[K].mem,
                                  .dv.mem = a->gradient[V].mem,
                                  .dg.mem = a->gradient[G].mem,
                                  .dlevel_scales.mem = a->gradient[LEVEL_SCALES].mem};
    upload(a, &a->gradient[O]);
    check(loglin_backward(a->plan, &in, NULL, d_o, (loglin_buffer){.mem = NULL}, &out, a->workspace, a->queue, 0, NULL,
                          NULL),
          "loglin_backward");
    for (size_t i = 0; i < O; i++) {
        download(a, &a->gradient[i]);
    }
}

/* ---- The model --------------------------------------------------------------------------------------------------- */

/* The tensors, in the order in which they lie in the one array of parameters; a layer's are repeated. */
enum { NORM, IN, BIAS, OUT, LAYER_TENSORS };
enum { EMBEDDING = LAYERS * LAYER_TENSORS, FINAL_NORM, LOGITS, TENSORS };
static const char *const LAYER_NAMES[LAYER_TENSORS] = {"norm", "in", "bias", "out"};
static const char *const MIXER_NAMES[] = {"linear", "log-linear"};
static const char *const OTHER_NAMES[TENSORS - EMBEDDING] = {"embedding", "final_norm", "logits"};

typedef struct model {
    const task *task;
    attention *attention;
    bool tied;                                /* all levels of a token and head have one weight */
    size_t columns;                           /* of the projection: q, k, v, g, level weights */
    size_t offset[TENSORS + 1];               /* of the tensors; the last: the number of parameters */
    float *parameters, *gradients;            /* [offset[TENSORS]] */
    float *first_moments, *second_moments;    /* of Adam */
    size_t updates;                           /* of Adam, so far */
    float *x[LAYERS + 1];                     /* [tokens, WIDTH]: before each layer, and after the last */
    float *u[LAYERS], *z[LAYERS], *o[LAYERS]; /* of a layer: shifted input, projections, output of attention */
    float *dx, *du, *dz;                      /* gradients of the layer at work */
} model;

static void fill_normal(float *values, size_t count, float deviation, uint64_t *state) {
    for (size_t i = 0; i < count; i++) {
        values[i] = deviation * random_normal(state);
    }
}

static void initialize_parameters(model *m, uint64_t state) {
    float *p = m->parameters;
    const size_t *offset = m->offset;
    fill_normal(p + offset[EMBEDDING], (NUM_KEYS + NUM_VALUES) * WIDTH, 1.0F, &state);
    fill_normal(p + offset[LOGITS], WIDTH * NUM_VALUES, 1.0F / sqrtf(WIDTH), &state);
    for (size_t i = 0; i < WIDTH; i++) {
        p[offset[FINAL_NORM] + i] = 1.0F;
    }
    for (size_t layer = 0; layer < LAYERS; layer++) {
        const size_t *at = offset + layer * LAYER_TENSORS;
        for (size_t i = 0; i < WIDTH; i++) {
            p[at[NORM] + i] = 1.0F;
        }
        fill_normal(p + at[IN], 2 * WIDTH * m->columns, 1.0F / sqrtf(2 * WIDTH), &state);
        fill_normal(p + at[OUT], MIXED * WIDTH, 1.0F / sqrtf(MIXED), &state);
        float *bias = p + at[BIAS] + GATES_BEGIN;
        for (size_t i = 0; i < HEADS; i++) {
            bias[i] = -2.0F; /* little forgetting at first */
        }
        for (size_t i = 0; i < HEADS * m->attention->levels; i++) {
            bias[HEADS + i] = 0.5413F; /* level weights of 1 */
        }
    }
}

static void model_create(model *m, const task *t, attention *a, bool tied, uint64_t seed) {
    *m = (model){.task = t, .attention = a, .tied = tied};
    m->columns = LEVELS_BEGIN + HEADS * a->levels;
    const size_t layer_sizes[LAYER_TENSORS] = {WIDTH, 2 * WIDTH * m->columns, m->columns, MIXED * WIDTH};
    const size_t other_sizes[] = {(NUM_KEYS + NUM_VALUES) * WIDTH, WIDTH, WIDTH * NUM_VALUES};
    for (size_t i = 0; i < TENSORS; i++) {
        m->offset[i + 1] = m->offset[i] + (i < EMBEDDING ? layer_sizes[i % LAYER_TENSORS] : other_sizes[i - EMBEDDING]);
    }
    float **const arrays[] = {&m->parameters, &m->gradients, &m->first_moments, &m->second_moments};
    for (size_t i = 0; i < sizeof arrays / sizeof arrays[0]; i++) {
        *arrays[i] = allocate(m->offset[TENSORS]);
    }
    for (size_t layer = 0; layer < LAYERS; layer++) {
        m->x[layer] = allocate(a->tokens * WIDTH);
        m->u[layer] = allocate(a->tokens * 2 * WIDTH);
        m->z[layer] = allocate(a->tokens * m->columns);
        m->o[layer] = allocate(a->tokens * MIXED);
    }
    m->x[LAYERS] = allocate(a->tokens * WIDTH);
    m->dx = allocate(a->tokens * WIDTH);
    m->du = allocate(a->tokens * 2 * WIDTH);
    m->dz = allocate(a->tokens * m->columns);
    initialize_parameters(m, seed);
}

static void model_destroy(model *m) {
    float *const arrays[] = {m->parameters, m->gradients, m->first_moments, m->second_moments, m->x[LAYERS], m->dx,
                             m->du,         m->dz};
    for (size_t i = 0; i < sizeof arrays / sizeof arrays[0]; i++) {
        free(arrays[i]);
    }
    for (size_t layer = 0; layer < LAYERS; layer++) {
        free(m->x[layer]);
        free(m->u[layer]);
        free(m->z[layer]);
        free(m->o[layer]);
    }
}

static float mean_of(const float *values, size_t count) {
    float sum = 0.0F;
    for (size_t i = 0; i < count; i++) {
        sum += values[i];
    }
    return sum / (float)count;
}

/* The level weights of a token and head from their projections; tied: all from the mean of these. */
static void set_level_scales(const model *m, float *scales, const float *projected) {
    const size_t levels = m->attention->levels;
    const float mean = mean_of(projected, levels);
    for (size_t l = 0; l < levels; l++) {
        scales[l] = softplus(m->tied ? mean : projected[l]);
    }
}

/* The gradients of set_level_scales: tied, each projection gets an equal part of what all weights pass to the mean. */
static void set_level_gradients(const model *m, float *dprojected, const float *dscales, const float *projected) {
    const size_t levels = m->attention->levels;
    const float mean = mean_of(projected, levels);
    const float share = mean_of(dscales, levels);
    for (size_t l = 0; l < levels; l++) {
        dprojected[l] = m->tied ? sigmoid(mean) * share : sigmoid(projected[l]) * dscales[l];
    }
}

/* The values of attention from a layer's projections z. */
static void set_attention_values(const model *m, const float *z) {
    const attention *a = m->attention;
    for (size_t t = 0; t < a->tokens; t++, z += m->columns) {
        memcpy(a->value[Q].host + t * DIM_K, z, DIM_K * sizeof(float));
        memcpy(a->value[K].host + t * DIM_K, z + DIM_K, DIM_K * sizeof(float));
        memcpy(a->value[V].host + t * MIXED, z + 2 * DIM_K, MIXED * sizeof(float));
        for (size_t h = 0; h < HEADS; h++) {
            a->value[G].host[t * HEADS + h] = -GATE_SIZE * softplus(z[GATES_BEGIN + h]);
            float *scales = a->value[LEVEL_SCALES].host + (t * HEADS + h) * a->levels;
            set_level_scales(m, scales, z + LEVELS_BEGIN + h * a->levels);
        }
    }
}

/* dz from the gradients of attention. */
static void collect_attention_gradients(const model *m, float *dz, const float *z) {
    const attention *a = m->attention;
    for (size_t t = 0; t < a->tokens; t++, z += m->columns, dz += m->columns) {
        memcpy(dz, a->gradient[Q].host + t * DIM_K, DIM_K * sizeof(float));
        memcpy(dz + DIM_K, a->gradient[K].host + t * DIM_K, DIM_K * sizeof(float));
        memcpy(dz + 2 * DIM_K, a->gradient[V].host + t * MIXED, MIXED * sizeof(float));
        for (size_t h = 0; h < HEADS; h++) {
            dz[GATES_BEGIN + h] = -GATE_SIZE * sigmoid(z[GATES_BEGIN + h]) * a->gradient[G].host[t * HEADS + h];
            const size_t weights = LEVELS_BEGIN + h * a->levels;
            set_level_gradients(m, dz + weights, a->gradient[LEVEL_SCALES].host + (t * HEADS + h) * a->levels,
                                z + weights);
        }
    }
}

static void layer_forward(model *m, size_t layer) {
    const attention *a = m->attention;
    const float *const p = m->parameters;
    const size_t *at = m->offset + layer * LAYER_TENSORS;
    float *u = m->u[layer];
    float *z = m->z[layer];
    for (size_t t = 0; t < a->tokens; t++) {
        normalize(u + t * 2 * WIDTH, m->x[layer] + t * WIDTH, p + at[NORM]);
        if (t % m->task->length > 0) { /* the previous token; zeros before the first */
            memcpy(u + (t * 2 + 1) * WIDTH, u + (t - 1) * 2 * WIDTH, WIDTH * sizeof(float));
        }
        memcpy(z + t * m->columns, p + at[BIAS], m->columns * sizeof(float));
    }
    multiply(z, u, p + at[IN], a->tokens, 2 * WIDTH, m->columns);
    set_attention_values(m, z);
    attention_forward(a);
    memcpy(m->o[layer], a->value[O].host, a->tokens * MIXED * sizeof(float));
    memcpy(m->x[layer + 1], m->x[layer], a->tokens * WIDTH * sizeof(float));
    multiply(m->x[layer + 1], m->o[layer], p + at[OUT], a->tokens, MIXED, WIDTH);
}

/* Turns dx, the gradient after the layer, into that before it; adds to the gradients of the parameters. */
static void layer_backward(model *m, size_t layer) {
    const attention *a = m->attention;
    const float *const p = m->parameters;
    float *const dp = m->gradients;
    const size_t *at = m->offset + layer * LAYER_TENSORS;
    const size_t length = m->task->length;

    memset(a->gradient[O].host, 0, a->tokens * MIXED * sizeof(float));
    multiply_backward(a->gradient[O].host, dp + at[OUT], m->dx, m->o[layer], p + at[OUT], a->tokens, MIXED, WIDTH);
    set_attention_values(m, m->z[layer]);
    attention_backward(a);
    collect_attention_gradients(m, m->dz, m->z[layer]);

    memset(m->du, 0, a->tokens * 2 * WIDTH * sizeof(float));
    multiply_backward(m->du, dp + at[IN], m->dz, m->u[layer], p + at[IN], a->tokens, 2 * WIDTH, m->columns);
    for (size_t t = 0; t < a->tokens; t++) {
        for (size_t i = 0; i < m->columns; i++) {
            dp[at[BIAS] + i] += m->dz[t * m->columns + i];
        }
        float *du = m->du + t * 2 * WIDTH;
        for (size_t i = 0; i < WIDTH && t % length + 1 < length; i++) { /* as the next token's previous one */
            du[i] += du[3 * WIDTH + i];
        }
        normalize_backward(m->dx + t * WIDTH, dp + at[NORM], du, m->x[layer] + t * WIDTH, p + at[NORM]);
    }
}

/* The loss -log(probability of the answer) of one token; adds weight times its gradients to dx and the parameters'. */
static double token_loss(model *m, size_t t, float weight, size_t *correct) {
    const float *x = m->x[LAYERS] + t * WIDTH;
    const float *norm = m->parameters + m->offset[FINAL_NORM];
    const float *matrix = m->parameters + m->offset[LOGITS];
    const size_t answer = m->task->answers[t];
    float y[WIDTH];
    float dy[WIDTH] = {0};
    float logits[NUM_VALUES] = {0};
    normalize(y, x, norm);
    multiply(logits, y, matrix, 1, WIDTH, NUM_VALUES);

    size_t best = 0;
    for (size_t i = 1; i < NUM_VALUES; i++) {
        best = logits[i] > logits[best] ? i : best;
    }
    *correct += best == answer;
    double sum = 0.0;
    for (size_t i = 0; i < NUM_VALUES; i++) {
        sum += exp((double)(logits[i] - logits[best]));
    }
    const double loss = log(sum) - (double)(logits[answer] - logits[best]);

    float dlogits[NUM_VALUES];
    for (size_t i = 0; i < NUM_VALUES; i++) {
        const float probability = (float)(exp((double)(logits[i] - logits[best])) / sum);
        dlogits[i] = weight * (probability - (i == answer ? 1.0F : 0.0F));
    }
    multiply_backward(dy, m->gradients + m->offset[LOGITS], dlogits, y, matrix, 1, WIDTH, NUM_VALUES);
    normalize_backward(m->dx + t * WIDTH, m->gradients + m->offset[FINAL_NORM], dy, x, norm);
    return loss;
}

typedef struct score {
    double loss, accuracy; /* means of the tokens that ask */
} score;

/* Runs the model on the task's batch.  Sets dx and the gradients as far as the last norm and the logits reach. */
static score model_forward(model *m) {
    const task *const asking = m->task;
    const size_t tokens = m->attention->tokens;
    for (size_t t = 0; t < tokens; t++) {
        memcpy(m->x[0] + t * WIDTH, m->parameters + m->offset[EMBEDDING] + asking->tokens[t] * WIDTH,
               WIDTH * sizeof(float));
    }
    for (size_t layer = 0; layer < LAYERS; layer++) {
        layer_forward(m, layer);
    }
    memset(m->dx, 0, tokens * WIDTH * sizeof(float));
    memset(m->gradients, 0, m->offset[TENSORS] * sizeof(float));
    const size_t asked = BATCH * (asking->length - 2 * asking->pairs);
    size_t correct = 0;
    double loss = 0.0;
    for (size_t t = 0; t < tokens; t++) {
        if (t % asking->length >= 2 * asking->pairs) {
            loss += token_loss(m, t, 1.0F / (float)asked, &correct);
        }
    }
    return (score){loss / (double)asked, (double)correct / (double)asked};
}

/* After model_forward: the gradients of all parameters. */
static void model_backward(model *m) {
    for (size_t layer = LAYERS; layer-- > 0;) {
        layer_backward(m, layer);
    }
    for (size_t t = 0; t < m->attention->tokens; t++) {
        for (size_t i = 0; i < WIDTH; i++) {
            m->gradients[m->offset[EMBEDDING] + m->task->tokens[t] * WIDTH + i] += m->dx[t * WIDTH + i];
        }
    }
}

/* One step of Adam at the given rate, the gradient cut to a norm of 1. */
static void update_parameters(model *m, float rate) {
    const size_t count = m->offset[TENSORS];
    double squares = 0.0;
    for (size_t i = 0; i < count; i++) {
        squares += (double)m->gradients[i] * (double)m->gradients[i];
    }
    const float cut = squares > 1.0 ? (float)(1.0 / sqrt(squares)) : 1.0F;
    m->updates++;
    const float first_sum = 1.0F - powf(0.9F, (float)m->updates);
    const float second_sum = 1.0F - powf(0.99F, (float)m->updates);
    for (size_t i = 0; i < count; i++) {
        const float gradient = cut * m->gradients[i];
        m->first_moments[i] += 0.1F * (gradient - m->first_moments[i]);
        m->second_moments[i] += 0.01F * (gradient * gradient - m->second_moments[i]);
        m->parameters[i] -=
            rate * (m->first_moments[i] / first_sum) / (sqrtf(m->second_moments[i] / second_sum) + 1e-8F);
    }
}

/* ---- Training, evaluation, check --------------------------------------------------------------------------------- */

static score evaluate(model *m, size_t batches, uint64_t *state) {
    score mean = {0.0, 0.0};
    for (size_t i = 0; i < batches; i++) {
        draw_batch(m->task, state);
        const score s = model_forward(m);
        mean.loss += s.loss / (double)batches;
        mean.accuracy += s.accuracy / (double)batches;
    }
    return mean;
}

/* Trains a new model and returns its score on sequences that it was not trained on. */
static score train(const task *t, attention *a, bool tied, size_t steps, uint64_t seed) {
    model m;
    uint64_t training_state = 3 * seed;
    uint64_t evaluation_state = 3 * seed + 1;
    model_create(&m, t, a, tied, 3 * seed + 2);
    printf("%s: %zu parameters\n", MIXER_NAMES[!tied], m.offset[TENSORS]);
    const time_t start = time(NULL);
    for (size_t step = 1; step <= steps; step++) {
        draw_batch(t, &training_state);
        const score s = model_forward(&m);
        model_backward(&m);
        const float warm = fminf(1.0F, (float)step / 20.0F);
        const float left = 1.0F - 0.9F * (float)step / (float)steps;
        update_parameters(&m, LEARNING_RATE * warm * left);
        if (step % ((steps + EVALUATIONS - 1) / EVALUATIONS) == 0) {
            const double accuracy = evaluate(&m, 2, &evaluation_state).accuracy;
            printf("step %5zu  loss %.4f  accuracy %.3f  %.0f s\n", step, s.loss, accuracy,
                   difftime(time(NULL), start));
            fflush(stdout);
        }
    }
    const score result = evaluate(&m, 16, &evaluation_state);
    model_destroy(&m);
    return result;
}

static void print_tensor_name(size_t tensor) {
    if (tensor < EMBEDDING) {
        printf("layer %zu %-10s", tensor / LAYER_TENSORS, LAYER_NAMES[tensor % LAYER_TENSORS]);
    } else {
        printf("%-18s", OTHER_NAMES[tensor - EMBEDDING]);
    }
}

/* Compares gradient[i], given as expected, with a central difference of the loss. */
static bool check_parameter(model *m, size_t i, float expected) {
    const float value = m->parameters[i];
    const float step = 4e-3F;
    m->parameters[i] = value + step;
    const double above = model_forward(m).loss;
    m->parameters[i] = value - step;
    const double below = model_forward(m).loss;
    m->parameters[i] = value;
    const double found = (above - below) / (2.0 * (double)step);
    const double error = fabs(found - (double)expected);
    const bool good = error <= 1e-2 * fabs(found) + 2e-5; /* the latter for rounding of the loss */
    printf("  [%zu] %.6f %.6f%s", i, (double)expected, found, good ? "" : " WRONG");
    return good;
}

/* Checks, of the parameters from `begin` to before `end`, the one with the largest gradient. */
static bool check_range(model *m, const float *gradients, size_t begin, size_t end) {
    size_t largest = begin;
    for (size_t i = begin; i < end; i++) {
        largest = fabsf(gradients[i]) > fabsf(gradients[largest]) ? i : largest;
    }
    return check_parameter(m, largest, gradients[largest]);
}

/* Checks a parameter of each third of every tensor, and one of the biases of every head's level weights. */
static bool check_gradients(const task *t, attention *a, bool tied, uint64_t seed) {
    model m;
    bool good = true;
    model_create(&m, t, a, tied, 3 * seed + 2);
    draw_batch(t, &seed);
    model_forward(&m);
    model_backward(&m);
    float *gradients = allocate(m.offset[TENSORS]);
    memcpy(gradients, m.gradients, m.offset[TENSORS] * sizeof(float));
    printf("%s, %zu parameters: parameter, gradient, difference quotient\n", MIXER_NAMES[!tied], m.offset[TENSORS]);
    for (size_t tensor = 0; tensor < TENSORS; tensor++) {
        const size_t begin = m.offset[tensor];
        const size_t size = m.offset[tensor + 1] - begin;
        print_tensor_name(tensor);
        for (size_t third = 0; third < 3; third++) {
            const size_t end = begin + (third + 1) * size / 3;
            good = check_range(&m, gradients, begin + third * size / 3, end) && good;
        }
        printf("\n");
    }
    for (size_t layer = 0; layer < LAYERS; layer++) {
        printf("layer %zu level bias", layer);
        for (size_t h = 0; h < HEADS; h++) {
            const size_t begin = m.offset[layer * LAYER_TENSORS + BIAS] + LEVELS_BEGIN + h * a->levels;
            good = check_range(&m, gradients, begin, begin + a->levels) && good;
        }
        printf("\n");
    }
    free(gradients);
    model_destroy(&m);
    return good;
}

/* ---- Options ------------------------------------------------------------------------------------------------------ */

typedef struct options {
    size_t steps, seed, pairs, length;
    bool linear, loglinear, check;
} options;

static void fail_usage(void) {
    fprintf(stderr,
            "usage: recall [--steps N] [--seed S] [--mixer linear|loglinear|both] [--pairs P] [--length T] [--check]\n"
            "       1 <= N; 1 <= P <= %d; 2 P < T <= %d\n",
            NUM_KEYS, MAX_LENGTH);
    exit(2);
}

static size_t parse_number(const char *text) {
    char *end;
    const unsigned long number = strtoul(text, &end, 10);
    if (*text < '0' || *text > '9' || *end != '\0' || number > 1000000) {
        fail_usage();
    }
    return number;
}

static options parse_options(int argc, char **argv) {
    options o = {.steps = 500, .seed = 1, .pairs = 16, .length = 64, .linear = true, .loglinear = true};
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--check") == 0) {
            o.check = true;
            continue;
        }
        const char *name = argv[i++];
        if (i == argc) {
            fail_usage();
        }
        if (strcmp(name, "--steps") == 0) {
            o.steps = parse_number(argv[i]);
        } else if (strcmp(name, "--seed") == 0) {
            o.seed = parse_number(argv[i]);
        } else if (strcmp(name, "--pairs") == 0) {
            o.pairs = parse_number(argv[i]);
        } else if (strcmp(name, "--length") == 0) {
            o.length = parse_number(argv[i]);
        } else if (strcmp(name, "--mixer") == 0) {
            o.linear = strcmp(argv[i], "loglinear") != 0;
            o.loglinear = strcmp(argv[i], "linear") != 0;
            if (o.linear && o.loglinear && strcmp(argv[i], "both") != 0) {
                fail_usage();
            }
        } else {
            fail_usage();
        }
    }
    if (o.steps < 1 || o.pairs < 1 || o.pairs > NUM_KEYS || o.length <= 2 * o.pairs || o.length > MAX_LENGTH) {
        fail_usage();
    }
    return o;
}

int main(int argc, char **argv) {
    const options chosen = parse_options(argc, argv);
    const bool mixers[] = {chosen.linear, chosen.loglinear};
    attention a = {0};
    attention_create(&a, chosen.length);
    task t = {.pairs = chosen.pairs, .length = chosen.length};
    t.tokens = calloc(a.tokens, sizeof *t.tokens);
    t.answers = calloc(a.tokens, sizeof *t.answers);
    if (t.tokens == NULL || t.answers == NULL) {
        fprintf(stderr, "recall: out of memory\n");
        exit(1);
    }

    bool good = true;
    double accuracy[2] = {0.0, 0.0};
    for (size_t i = 0; i < 2; i++) {
        if (mixers[i] && chosen.check) {
            good = check_gradients(&t, &a, i == 0, chosen.seed) && good;
        } else if (mixers[i]) {
            const score s = train(&t, &a, i == 0, chosen.steps, chosen.seed);
            accuracy[i] = s.accuracy;
            good = good && s.loss < GOOD_LOSS * log(NUM_VALUES);
        }
    }
    if (chosen.check) {
        printf("gradients %s\n", good ? "agree" : "DISAGREE");
    } else {
        const char *separator = "";
        for (size_t i = 0; i < 2; i++) {
            if (mixers[i]) {
                printf("%s%s accuracy %.3f", separator, MIXER_NAMES[i], accuracy[i]);
                separator = ", ";
            }
        }
        printf("\n");
    }
    free(t.tokens);
    free(t.answers);
    attention_destroy(&a);
    return good ? 0 : 1;
}
