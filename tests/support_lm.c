/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The reference shares with the library the parser of config.json and the list of tensors, which other tests check
 * against real checkpoints; every formula is written down again here, from the definition of the layers.
 */
#include "support_lm.h"

#include "model/lm.h"
#include "oracle.h"
#include "support.h"

#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- Making ------------------------------------------------------------------------------------------------------ */

static loglin_lm parse_config(const char *config, size_t levels, size_t intermediate) {
    loglin_lm lm;
    support_require(loglin_lm_parse("config.json", config, strlen(config), &lm), "loglin_lm_parse");
    lm.levels = levels;
    lm.intermediate = lm.intermediate != 0 ? lm.intermediate : intermediate;
    return lm;
}

/* Matrices keep the scale of their input, norms are near 1, the rest is small. */
static double random_value(const loglin_lm_tensor *place, support_random *random) {
    const double x = support_normal(random);
    if (place->is_matrix) {
        return place->matrix == LOGLIN_MATRIX_EMBEDDING ? x : x / sqrt((double)place->shape[1]);
    }
    switch (place->vector) {
    case LOGLIN_VECTOR_MIXER_NORM:
    case LOGLIN_VECTOR_MLP_NORM:
    case LOGLIN_VECTOR_OUT_NORM:
    case LOGLIN_VECTOR_FINAL_NORM:
    case LOGLIN_VECTOR_LEVEL:
        return 1 + 0.2 * x;
    case LOGLIN_VECTOR_DT_BIAS:
        return x - 2;
    default:
        return 0.5 * x;
    }
}

static loglin_tensor make_tensor(const loglin_lm_tensor *place, loglin_tensor_dtype dtype, support_random *random) {
    loglin_tensor tensor = {.dtype = dtype, .rank = place->rank};
    size_t count = 1;
    for (size_t i = 0; i < place->rank; i++) {
        tensor.shape[i] = place->shape[i];
        count *= place->shape[i];
    }
    char *name = support_alloc(strlen(place->name) + 1, 1);
    strcpy(name, place->name);
    float *values = support_alloc(count, sizeof *values);
    for (size_t i = 0; i < count; i++) {
        values[i] = (float)random_value(place, random);
    }
    tensor.size = count * loglin_tensor_dtype_size(dtype);
    void *data = support_alloc(tensor.size, 1);
    loglin_tensor_from_float(dtype, values, count, data);
    free(values);
    tensor.name = name;
    tensor.data = data;
    return tensor;
}

static void add_tensors(support_lm *lm, const loglin_lm_tensor *places, size_t count, loglin_tensor_dtype dtype,
                        support_random *random) {
    for (size_t i = 0; i < count; i++) {
        lm->tensors[lm->count++] = make_tensor(&places[i], places[i].is_matrix ? dtype : LOGLIN_TENSOR_F32, random);
    }
}

support_lm support_lm_make(const char *config, loglin_tensor_dtype dtype, size_t levels, size_t intermediate,
                           uint64_t seed) {
    const loglin_lm shape = parse_config(config, levels, intermediate);
    support_lm lm = {.config = config};
    support_random random = {seed};
    loglin_lm_tensor places[LOGLIN_LM_MAX_LAYER_TENSORS];
    add_tensors(&lm, places, loglin_lm_model_tensors(&shape, places), dtype, &random);
    for (size_t layer = 0; layer < shape.layers; layer++) {
        add_tensors(&lm, places, loglin_lm_layer_tensors(&shape, layer, places), dtype, &random);
    }
    return lm;
}

void support_lm_free(support_lm *lm) {
    for (size_t i = 0; i < lm->count; i++) {
        free((void *)lm->tensors[i].name);
        free((void *)lm->tensors[i].data);
    }
    lm->count = 0;
}

loglin_tensor *support_lm_find(support_lm *lm, const char *name) {
    for (size_t i = 0; i < lm->count; i++) {
        if (strcmp(lm->tensors[i].name, name) == 0) {
            return &lm->tensors[i];
        }
    }
    support_die("no tensor %s", name);
}

/* ---- Files ------------------------------------------------------------------------------------------------------- */

void support_write_text(const char *folder, const char *name, const char *text) {
    char path[512];
    (void)snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "wb");
    if (file == NULL || fputs(text, file) < 0 || fclose(file) != 0) {
        support_die("%s cannot be written", path);
    }
}

static void write_tensors(const char *folder, const char *name, const loglin_tensor *tensors, size_t count) {
    char path[512];
    loglin_tensor_error error;
    (void)snprintf(path, sizeof path, "%s/%s", folder, name);
    if (!loglin_safetensors_write(path, tensors, count, NULL, 0, &error)) {
        support_die("%s: %s", path, error.text);
    }
}

void support_lm_write(const support_lm *lm, const char *folder, size_t shards) {
    support_write_text(folder, "config.json", lm->config);
    if (shards == 1) {
        write_tensors(folder, "model.safetensors", lm->tensors, lm->count);
        return;
    }
    char *index = support_alloc(lm->count * 256 + 64, 1);
    size_t length = (size_t)sprintf(index, "{\"weight_map\": {");
    for (size_t shard = 0; shard < shards; shard++) {
        char name[64];
        const size_t first = lm->count * shard / shards;
        const size_t last = lm->count * (shard + 1) / shards;
        (void)snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", shard + 1, shards);
        write_tensors(folder, name, lm->tensors + first, last - first);
        for (size_t i = first; i < last; i++) {
            length += (size_t)sprintf(index + length, "%s\"%s\": \"%s\"", i > 0 ? ", " : "", lm->tensors[i].name, name);
        }
    }
    (void)sprintf(index + length, "}}");
    support_write_text(folder, "model.safetensors.index.json", index);
    free(index);
}

void support_make_folder(char *folder, size_t capacity) {
    (void)snprintf(folder, capacity, "/tmp/loglin-model-XXXXXX");
    if (mkdtemp(folder) == NULL) {
        support_die("no folder %s", folder);
    }
}

void support_remove_folder(const char *folder) {
    DIR *directory = opendir(folder);
    if (directory == NULL) {
        return;
    }
    for (const struct dirent *entry; (entry = readdir(directory)) != NULL;) {
        char path[512];
        (void)snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        (void)unlink(path);
    }
    (void)closedir(directory);
    (void)rmdir(folder);
}

/* ---- The formulas ------------------------------------------------------------------------------------------------ */

typedef struct reference {
    support_lm *model;
    loglin_lm lm;
    size_t length;
    char prefix[64]; /* of the layer's mixer */
    double *x;       /* [length, hidden] */
} reference;

/* A tensor's values, to be freed. */
static double *values_of(support_lm *lm, const char *prefix, const char *name) {
    char full[256];
    (void)snprintf(full, sizeof full, "%s%s", prefix, name);
    const loglin_tensor *tensor = support_lm_find(lm, full);
    const size_t count = loglin_tensor_count(tensor);
    float *floats = support_alloc(count, sizeof *floats);
    double *values = support_alloc(count, sizeof *values);
    loglin_tensor_to_float(tensor->dtype, tensor->data, count, floats);
    for (size_t i = 0; i < count; i++) {
        values[i] = (double)floats[i];
    }
    free(floats);
    return values;
}

/* Zeros where `present` is not set. */
static double *optional_values(support_lm *lm, const char *prefix, const char *name, bool present, size_t count) {
    return present ? values_of(lm, prefix, name) : support_alloc(count, sizeof(double));
}

static double sigmoid(double x) {
    return 1 / (1 + exp(-x));
}

static double softplus(double x) {
    return x > 30 ? x : log1p(exp(x));
}

/* x W^T, to be freed. */
static double *multiply(reference *r, const char *prefix, const char *name, const double *x, size_t columns,
                        size_t rows) {
    double *w = values_of(r->model, prefix, name);
    double *y = support_alloc(r->length * rows, sizeof *y);
    for (size_t t = 0; t < r->length; t++) {
        for (size_t i = 0; i < rows; i++) {
            for (size_t k = 0; k < columns; k++) {
                y[t * rows + i] += w[i * columns + k] * x[t * columns + k];
            }
        }
    }
    free(w);
    return y;
}

/* In place, over segments. */
static void normalize(double *x, size_t count, size_t segment, double eps) {
    for (size_t start = 0; start < count; start += segment) {
        double sum = 0;
        for (size_t i = start; i < start + segment; i++) {
            sum += x[i] * x[i];
        }
        for (size_t i = start; i < start + segment; i++) {
            x[i] /= sqrt(sum / (double)segment + eps);
        }
    }
}

static double *norm(reference *r, const char *prefix, const char *name) {
    const size_t hidden = r->lm.hidden;
    double *weight = values_of(r->model, prefix, name);
    double *h = support_alloc(r->length * hidden, sizeof *h);
    memcpy(h, r->x, r->length * hidden * sizeof *h);
    normalize(h, r->length * hidden, hidden, (double)r->lm.norm_eps);
    for (size_t i = 0; i < r->length * hidden; i++) {
        h[i] *= weight[i % hidden];
    }
    free(weight);
    return h;
}

/* silu(conv(x)) of columns at.. of rows of `stride`, to be freed. */
static double *convolve(reference *r, const char *name, const double *x, size_t stride, size_t at, size_t channels) {
    char tensor[64];
    (void)snprintf(tensor, sizeof tensor, "%s.weight", name);
    double *taps = values_of(r->model, r->prefix, tensor);
    (void)snprintf(tensor, sizeof tensor, "%s.bias", name);
    double *bias = optional_values(r->model, r->prefix, tensor, r->lm.conv_bias, channels);
    const size_t kernel = r->lm.conv_kernel;
    double *y = support_alloc(r->length * channels, sizeof *y);
    for (size_t t = 0; t < r->length; t++) {
        for (size_t c = 0; c < channels; c++) {
            double sum = bias[c];
            for (size_t tap = 0; tap < kernel && tap <= t; tap++) {
                sum += taps[c * kernel + kernel - 1 - tap] * x[(t - tap) * stride + at + c];
            }
            y[t * channels + c] = sum * sigmoid(sum);
        }
    }
    free(taps);
    free(bias);
    return y;
}

static double *attend(const reference *r, const oracle_inputs *in) {
    const loglin_lm *lm = &r->lm;
    const size_t starts[2] = {0, r->length};
    const bool delta = lm->op == LOGLIN_GATED_DELTA;
    const oracle_problem problem = {
        .delta = delta,
        .sequences = 1,
        .starts = starts,
        .heads = lm->heads,
        .groups = lm->groups,
        .dim_k = lm->dim_k,
        .dim_v = lm->dim_v,
        .levels = lm->levels,
        .scale = 1,
        .normalize_qk = delta,
    };
    double *o = support_alloc(r->length * lm->inner, sizeof *o);
    oracle_recurrence(&problem, in, o, NULL);
    return o;
}

/* The columns at .. at+count-1 of every row, to be freed. */
static double *columns_of(const reference *r, const double *x, size_t stride, size_t at, size_t count) {
    double *y = support_alloc(r->length * count, sizeof *y);
    for (size_t t = 0; t < r->length; t++) {
        memcpy(y + t * count, x + t * stride + at, count * sizeof *y);
    }
    return y;
}

/* g from the time steps, and softplus(L * dl). */
static void make_gates(reference *r, double *dt, double *g, double *level) {
    const loglin_lm *lm = &r->lm;
    double *bias = values_of(r->model, r->prefix, "dt_bias");
    double *a_log = values_of(r->model, r->prefix, "A_log");
    double *weights = values_of(r->model, r->prefix, "L");
    for (size_t i = 0; i < r->length * lm->heads; i++) {
        dt[i] = fmin(fmax(softplus(dt[i] + bias[i % lm->heads]), (double)lm->dt_min), (double)lm->dt_max);
        g[i] = -exp(a_log[i % lm->heads]) * dt[i];
    }
    for (size_t i = 0; i < r->length * lm->heads * lm->levels; i++) {
        level[i] = softplus(weights[i % (lm->heads * lm->levels)] * level[i]);
    }
    free(bias);
    free(a_log);
    free(weights);
}

/* The gate and the norm of the output, in place; `tile` times the same weights. */
static void finish_output(reference *r, const char *name, const double *z, size_t tile, double *y) {
    const loglin_lm *lm = &r->lm;
    const size_t width = lm->inner / tile;
    double *weight = values_of(r->model, r->prefix, name);
    for (size_t i = 0; i < r->length * lm->inner && lm->gate_first; i++) {
        y[i] *= z[i] * sigmoid(z[i]);
    }
    normalize(y, r->length * lm->inner, lm->segment, (double)lm->norm_eps);
    for (size_t i = 0; i < r->length * lm->inner; i++) {
        y[i] *= weight[i % width] * (lm->gate_first ? 1 : z[i] * sigmoid(z[i]));
    }
    free(weight);
}

static void add_to(double *x, const double *y, size_t count) {
    for (size_t i = 0; i < count; i++) {
        x[i] += y[i];
    }
}

static void run_mamba2(reference *r, const double *h) {
    const loglin_lm *lm = &r->lm;
    const size_t n = r->length;
    const size_t qk = lm->groups * lm->dim_k;
    const size_t channels = lm->inner + 2 * qk;
    const size_t columns = lm->inner + channels + lm->heads + lm->heads * lm->levels;
    double *p = multiply(r, r->prefix, "in_proj.weight", h, lm->hidden, columns);
    double *bias = optional_values(r->model, r->prefix, "in_proj.bias", lm->bias, columns);
    for (size_t i = 0; i < n * columns; i++) {
        p[i] += bias[i % columns];
    }
    double *z = columns_of(r, p, columns, 0, lm->inner);
    double *xbc = convolve(r, "conv1d", p, columns, lm->inner, channels);
    double *x = columns_of(r, xbc, channels, 0, lm->inner);
    double *b = columns_of(r, xbc, channels, lm->inner, qk);
    double *c = columns_of(r, xbc, channels, lm->inner + qk, qk);
    double *dt = columns_of(r, p, columns, lm->inner + channels, lm->heads);
    double *level = columns_of(r, p, columns, lm->inner + channels + lm->heads, lm->heads * lm->levels);
    double *g = support_alloc(n * lm->heads, sizeof *g);
    double *v = support_alloc(n * lm->inner, sizeof *v);
    double *d = values_of(r->model, r->prefix, "D");
    make_gates(r, dt, g, level);
    for (size_t i = 0; i < n * lm->inner; i++) {
        v[i] = x[i] * dt[i / lm->dim_v];
    }
    const oracle_inputs in = {.q = c, .k = b, .v = v, .g = g, .level_scales = level};
    double *y = attend(r, &in);
    for (size_t i = 0; i < n * lm->inner; i++) {
        y[i] += x[i] * d[lm->wide_d ? i % lm->inner : i % lm->inner / lm->dim_v];
    }
    finish_output(r, "norm.weight", z, 1, y);
    double *out = multiply(r, r->prefix, "out_proj.weight", y, lm->inner, lm->hidden);
    double *out_bias = optional_values(r->model, r->prefix, "out_proj.bias", lm->bias, lm->hidden);
    for (size_t i = 0; i < n * lm->hidden; i++) {
        r->x[i] += out[i] + out_bias[i % lm->hidden];
    }
    double *all[] = {p, bias, z, xbc, x, b, c, dt, level, g, v, d, y, out, out_bias};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        free(all[i]);
    }
}

static double *stream(reference *r, const double *h, char which, size_t channels) {
    char name[32];
    (void)snprintf(name, sizeof name, "%c_proj.weight", which);
    double *p = multiply(r, r->prefix, name, h, r->lm.hidden, channels);
    (void)snprintf(name, sizeof name, "%c_conv1d", which);
    double *y = convolve(r, name, p, channels, 0, channels);
    free(p);
    return y;
}

static void run_gated_delta(reference *r, const double *h) {
    const loglin_lm *lm = &r->lm;
    double *q = stream(r, h, 'q', lm->heads * lm->dim_k);
    double *k = stream(r, h, 'k', lm->heads * lm->dim_k);
    double *v = stream(r, h, 'v', lm->inner);
    double *beta = multiply(r, r->prefix, "b_proj.weight", h, lm->hidden, lm->heads);
    double *dt = multiply(r, r->prefix, "a_proj.weight", h, lm->hidden, lm->heads);
    double *level = multiply(r, r->prefix, "l_proj.weight", h, lm->hidden, lm->heads * lm->levels);
    double *z = multiply(r, r->prefix, "g_proj.weight", h, lm->hidden, lm->inner);
    double *g = support_alloc(r->length * lm->heads, sizeof *g);
    make_gates(r, dt, g, level);
    for (size_t i = 0; i < r->length * lm->heads; i++) {
        beta[i] = sigmoid(beta[i]);
    }
    const oracle_inputs in = {.q = q, .k = k, .v = v, .g = g, .level_scales = level, .beta = beta};
    double *y = attend(r, &in);
    finish_output(r, "o_norm.weight", z, lm->heads, y);
    double *out = multiply(r, r->prefix, "o_proj.weight", y, lm->inner, lm->hidden);
    add_to(r->x, out, r->length * lm->hidden);
    double *all[] = {q, k, v, beta, dt, level, z, g, y, out};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        free(all[i]);
    }
}

static void run_mlp(reference *r, const char *prefix) {
    const size_t width = r->lm.intermediate;
    double *h = norm(r, prefix, "mlp_norm.weight");
    double *gate = multiply(r, prefix, "mlp.gate_proj.weight", h, r->lm.hidden, width);
    double *up = multiply(r, prefix, "mlp.up_proj.weight", h, r->lm.hidden, width);
    for (size_t i = 0; i < r->length * width; i++) {
        gate[i] *= sigmoid(gate[i]) * up[i];
    }
    double *down = multiply(r, prefix, "mlp.down_proj.weight", gate, width, r->lm.hidden);
    add_to(r->x, down, r->length * r->lm.hidden);
    free(h);
    free(gate);
    free(up);
    free(down);
}

static void run_layer(reference *r, size_t layer) {
    const bool delta = r->lm.op == LOGLIN_GATED_DELTA;
    char prefix[48];
    (void)snprintf(prefix, sizeof prefix, delta ? "model.layers.%zu." : "backbone.layers.%zu.", layer);
    (void)snprintf(r->prefix, sizeof r->prefix, "%s%s.", prefix, delta ? "attn" : "mixer");
    double *h = norm(r, prefix, delta ? "attn_norm.weight" : "mixer_norm.weight");
    if (delta) {
        run_gated_delta(r, h);
    } else {
        run_mamba2(r, h);
    }
    free(h);
    run_mlp(r, prefix);
}

void support_lm_logits(support_lm *model, const int32_t *ids, size_t length, double *logits) {
    const bool delta = strstr(model->config, "h_gated_deltanet") != NULL;
    const char *outer = delta ? "model." : "backbone.";
    char name[64];
    (void)snprintf(name, sizeof name, delta ? "model.layers.0.attn.L" : "backbone.layers.0.mixer.L");
    const size_t levels = support_lm_find(model, name)->shape[1];
    (void)snprintf(name, sizeof name, "%slayers.0.mlp.gate_proj.weight", outer);
    reference r = {.model = model,
                   .lm = parse_config(model->config, levels, support_lm_find(model, name)->shape[0]),
                   .length = length};
    double *embedding = values_of(model, outer, "embeddings.weight");
    r.x = support_alloc(length * r.lm.hidden, sizeof *r.x);
    for (size_t t = 0; t < length; t++) {
        memcpy(r.x + t * r.lm.hidden, embedding + (size_t)ids[t] * r.lm.hidden, r.lm.hidden * sizeof *r.x);
    }
    for (size_t layer = 0; layer < r.lm.layers; layer++) {
        run_layer(&r, layer);
    }
    double *h = norm(&r, outer, delta ? "norm.weight" : "norm_f.weight");
    double *out = multiply(&r, r.lm.tied ? outer : "", r.lm.tied ? "embeddings.weight" : "lm_head.weight", h,
                           r.lm.hidden, r.lm.vocabulary);
    memcpy(logits, out, length * r.lm.vocabulary * sizeof *logits);
    free(embedding);
    free(r.x);
    free(h);
    free(out);
}
