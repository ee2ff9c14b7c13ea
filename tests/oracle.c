/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The oracle: float64, one thread, no cleverness beyond skipping levels that do not exist.
 *
 * Queries and keys are normalised and scaled first, for all functions alike; then each (sequence, head) is worked on
 * alone.  A token of the recurrence is: levels move (advance), states decay and take the token in (consume), the
 * query reads them.  The backward pass keeps the moved states of a segment of about sqrt(T) tokens, recomputed from
 * checkpoints, and undoes the three parts in reverse.
 */
#include "oracle.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const double NORM_EPSILON = 1e-6;

static double *zeros(size_t count) {
    double *values = calloc(count > 0 ? count : 1, sizeof *values);
    if (values == NULL) {
        fprintf(stderr, "oracle: out of memory for %zu numbers\n", count);
        abort();
    }
    return values;
}

/* ---- Levels ----------------------------------------------------------------------------------------------------- */

static size_t bit_length(size_t x) {
    size_t bits = 0;
    for (; x != 0; x >>= 1) {
        bits++;
    }
    return bits;
}

static size_t trailing_zeros(size_t x) {
    size_t zeros_seen = 0;
    for (; (x & 1) == 0; x >>= 1) {
        zeros_seen++;
    }
    return zeros_seen;
}

static size_t strong_level(size_t t, size_t s) {
    if (t == s) {
        return 0;
    }
    const size_t l = bit_length(t) - 1;
    const size_t v = (size_t)1 << (l > 1 ? l - 1 : 0);
    const size_t r = t - ((size_t)1 << l);
    if (s < v || (s < 2 * v && r >= v)) {
        return l + 1;
    }
    return s < 2 * v ? strong_level(t - v, s - v) : strong_level(t - 2 * v, s - 2 * v);
}

size_t oracle_level(bool strong, size_t t, size_t s) {
    return strong ? strong_level(t, s) : bit_length(t ^ s);
}

bool oracle_level_exists(bool strong, size_t position, size_t level) {
    if (position == 0) {
        return false;
    }
    if (strong) {
        return level <= bit_length(position - 1);
    }
    return level == 0 || (((position - 1) >> (level - 1)) & 1) != 0;
}

/* ---- What all functions start with ------------------------------------------------------------------------------ */

static size_t token_count(const oracle_problem *p) {
    return p->starts[p->sequences];
}

static double norm_factor(const double *x, size_t n) {
    double sum = NORM_EPSILON;
    for (size_t i = 0; i < n; i++) {
        sum += x[i] * x[i];
    }
    return 1.0 / sqrt(sum);
}

/* x [tokens, G, K], normalised if the problem says so, times scale. */
static double *prepared(const oracle_problem *p, const double *x, double scale) {
    const size_t rows = token_count(p) * p->groups;
    double *y = zeros(rows * p->dim_k);
    for (size_t row = 0; row < rows; row++) {
        const double *from = x + row * p->dim_k;
        const double factor = p->normalize_qk ? scale * norm_factor(from, p->dim_k) : scale;
        for (size_t i = 0; i < p->dim_k; i++) {
            y[row * p->dim_k + i] = factor * from[i];
        }
    }
    return y;
}

/* Turns dy, the gradient to prepared(x), into the gradient to x. */
static void unprepare_gradient(const oracle_problem *p, const double *x, double scale, double *dy) {
    const size_t rows = token_count(p) * p->groups;
    for (size_t row = 0; row < rows; row++) {
        const double *from = x + row * p->dim_k;
        double *d = dy + row * p->dim_k;
        const double factor = p->normalize_qk ? norm_factor(from, p->dim_k) : 1.0;
        double along = 0.0;
        for (size_t i = 0; p->normalize_qk && i < p->dim_k; i++) {
            along += from[i] * d[i];
        }
        for (size_t i = 0; i < p->dim_k; i++) {
            d[i] = scale * (factor * d[i] - factor * factor * factor * along * from[i]);
        }
    }
}

/* One head of one sequence: where its rows lie. */
typedef struct head {
    const oracle_problem *p;
    size_t sequence, index, first, length, position;
} head;

static head make_head(const oracle_problem *p, size_t sequence, size_t index) {
    return (head){.p = p,
                  .sequence = sequence,
                  .index = index,
                  .first = p->starts[sequence],
                  .length = p->starts[sequence + 1] - p->starts[sequence],
                  .position = p->positions == NULL ? 0 : p->positions[sequence]};
}

static size_t k_row(const head *h, size_t t) {
    const oracle_problem *p = h->p;
    return ((h->first + t) * p->groups + h->index / (p->heads / p->groups)) * p->dim_k;
}

static size_t gate_row(const head *h, size_t t) {
    return (h->first + t) * h->p->heads + h->index;
}

static size_t v_row(const head *h, size_t t) {
    return gate_row(h, t) * h->p->dim_v;
}

static size_t level_row(const head *h, size_t t) {
    return gate_row(h, t) * h->p->levels;
}

static size_t state_offset(const head *h) {
    const oracle_problem *p = h->p;
    return (h->sequence * p->heads + h->index) * p->levels * p->dim_k * p->dim_v;
}

static double dot(const double *a, const double *b, size_t n) {
    double sum = 0.0;
    for (size_t i = 0; i < n; i++) {
        sum += a[i] * b[i];
    }
    return sum;
}

static void add_scaled(double *y, double factor, const double *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        y[i] += factor * x[i];
    }
}

/* y [V] += factor M^T x, M [K, V]. */
static void add_transposed_product(double *y, double factor, const double *m, const double *x, size_t k, size_t v) {
    for (size_t i = 0; i < k; i++) {
        add_scaled(y, factor * x[i], m + i * v, v);
    }
}

/* y [K] += factor M x, M [K, V]. */
static void add_product(double *y, double factor, const double *m, const double *x, size_t k, size_t v) {
    for (size_t i = 0; i < k; i++) {
        y[i] += factor * dot(m + i * v, x, v);
    }
}

/* M [K, V] += factor x y^T. */
static void add_outer(double *m, double factor, const double *x, const double *y, size_t k, size_t v) {
    for (size_t i = 0; i < k; i++) {
        add_scaled(m + i * v, factor * x[i], y, v);
    }
}

/* ---- The parallel form ------------------------------------------------------------------------------------------ */

/* c_t of a head, with c_t = g_0 + ... + g_t. */
static void gate_sums(const head *h, const double *g, double *c) {
    double sum = 0.0;
    for (size_t t = 0; t < h->length; t++) {
        sum += g == NULL ? 0.0 : g[gate_row(h, t)];
        c[t] = sum;
    }
}

/* row[s] = (tril(Q K^T) X^-1)[t, s] of the delta rule: solves row X = q_t K^T from its last entry to its first. */
static void delta_row(const head *h, const double *q, const double *k, const double *beta, size_t t, double *row) {
    const size_t dim = h->p->dim_k;
    for (size_t s = t + 1; s-- > 0;) {
        row[s] = dot(q + k_row(h, t), k + k_row(h, s), dim);
        for (size_t r = s + 1; r <= t; r++) {
            row[s] -= row[r] * beta[gate_row(h, r)] * dot(k + k_row(h, r), k + k_row(h, s), dim);
        }
    }
}

static void parallel_head(const head *h, const oracle_inputs *in, const double *q, const double *k, double *o) {
    const oracle_problem *p = h->p;
    double *c = zeros(h->length);
    double *row = zeros(h->length);
    gate_sums(h, in->g, c);
    for (size_t t = 0; t < h->length; t++) {
        if (p->delta) {
            delta_row(h, q, k, in->beta, t, row);
        }
        for (size_t s = 0; s <= t; s++) {
            const double product =
                p->delta ? row[s] * in->beta[gate_row(h, s)] : dot(q + k_row(h, t), k + k_row(h, s), p->dim_k);
            const double mask = in->level_scales[level_row(h, t) + oracle_level(p->strong, t, s)] * exp(c[t] - c[s]);
            add_scaled(o + v_row(h, t), product * mask, in->v + v_row(h, s), p->dim_v);
        }
    }
    free(row);
    free(c);
}

void oracle_parallel(const oracle_problem *p, const oracle_inputs *in, double *o) {
    double *q = prepared(p, in->q, p->scale);
    double *k = prepared(p, in->k, 1.0);
    memset(o, 0, token_count(p) * p->heads * p->dim_v * sizeof *o);
    for (size_t n = 0; n < p->sequences; n++) {
        for (size_t i = 0; i < p->heads; i++) {
            const head h = make_head(p, n, i);
            parallel_head(&h, in, q, k, o);
        }
    }
    free(k);
    free(q);
}

static void parallel_gradients_head(const head *h, const oracle_inputs *in, const double *d_o,
                                    const oracle_gradients *out) {
    const oracle_problem *p = h->p;
    double *c = zeros(h->length);
    double *dc = zeros(h->length);
    gate_sums(h, in->g, c);
    for (size_t t = 0; t < h->length; t++) {
        for (size_t s = 0; s <= t; s++) {
            const size_t level = level_row(h, t) + oracle_level(p->strong, t, s);
            const double decay = exp(c[t] - c[s]);
            const double mask = in->level_scales[level] * decay;
            const double product = p->scale * dot(in->q + k_row(h, t), in->k + k_row(h, s), p->dim_k);
            const double ds = dot(d_o + v_row(h, t), in->v + v_row(h, s), p->dim_v);
            add_scaled(out->dv + v_row(h, s), product * mask, d_o + v_row(h, t), p->dim_v);
            add_scaled(out->dq + k_row(h, t), p->scale * ds * mask, in->k + k_row(h, s), p->dim_k);
            add_scaled(out->dk + k_row(h, s), p->scale * ds * mask, in->q + k_row(h, t), p->dim_k);
            out->dlevel_scales[level] += ds * product * decay;
            dc[t] += ds * product * mask;
            dc[s] -= ds * product * mask;
        }
    }
    double sum = 0.0;
    for (size_t t = h->length; t-- > 0;) {
        sum += dc[t];
        out->dg[gate_row(h, t)] = sum;
    }
    free(dc);
    free(c);
}

void oracle_parallel_gradients(const oracle_problem *p, const oracle_inputs *in, const double *d_o,
                               const oracle_gradients *out) {
    const size_t tokens = token_count(p);
    memset(out->dq, 0, tokens * p->groups * p->dim_k * sizeof(double));
    memset(out->dk, 0, tokens * p->groups * p->dim_k * sizeof(double));
    memset(out->dv, 0, tokens * p->heads * p->dim_v * sizeof(double));
    memset(out->dlevel_scales, 0, tokens * p->heads * p->levels * sizeof(double));
    for (size_t n = 0; n < p->sequences; n++) {
        for (size_t i = 0; i < p->heads; i++) {
            const head h = make_head(p, n, i);
            parallel_gradients_head(&h, in, d_o, out);
        }
    }
}

/* ---- The recurrence --------------------------------------------------------------------------------------------- */

/* The states of one head, [L, K, V]. */
static double *level_of(const oracle_problem *p, double *states, size_t level) {
    return states + level * p->dim_k * p->dim_v;
}

static void copy_existing(const oracle_problem *p, size_t position, const double *from, double *to) {
    const size_t matrix = p->dim_k * p->dim_v;
    for (size_t l = 0; l < p->levels; l++) {
        if (oracle_level_exists(p->strong, position, l)) {
            memcpy(to + l * matrix, from + l * matrix, matrix * sizeof *to);
        }
    }
}

/* Keys change their level as the query goes on to position t > 0; level 0 is empty then. */
static void advance(const oracle_problem *p, double *states, size_t t) {
    const size_t matrix = p->dim_k * p->dim_v;
    const size_t z = trailing_zeros(t);
    if (p->strong) {
        if (z + 2 < p->levels) {
            add_scaled(level_of(p, states, z + 2), 1.0, level_of(p, states, z + 1), matrix);
        }
        memmove(level_of(p, states, 1), states, (z + 1) * matrix * sizeof *states);
        memset(states, 0, matrix * sizeof *states);
        return;
    }
    for (size_t l = 0; l <= z; l++) {
        add_scaled(level_of(p, states, z + 1), 1.0, level_of(p, states, l), matrix);
    }
    memset(states, 0, (z + 1) * matrix * sizeof *states);
}

/* The adjoint of advance: from the gradient to the moved states to the gradient to the states before. */
static void advance_adjoint(const oracle_problem *p, double *d, size_t t) {
    const size_t matrix = p->dim_k * p->dim_v;
    const size_t z = trailing_zeros(t);
    if (p->strong) {
        memmove(d, level_of(p, d, 1), (z + 1) * matrix * sizeof *d);
        if (z + 2 < p->levels) {
            memcpy(level_of(p, d, z + 1), level_of(p, d, z + 2), matrix * sizeof *d);
        }
        return;
    }
    for (size_t l = 0; l <= z; l++) {
        memcpy(level_of(p, d, l), level_of(p, d, z + 1), matrix * sizeof *d);
    }
}

/* What a token brings to a head. */
typedef struct token_input {
    size_t t; /* absolute position */
    const double *q, *k, *v, *level_scales;
    double decay, beta;
} token_input;

static token_input make_token(const head *h, const oracle_inputs *in, const double *q, const double *k, size_t i) {
    return (token_input){.t = h->position + i,
                         .q = q + k_row(h, i),
                         .k = k + k_row(h, i),
                         .v = in->v + v_row(h, i),
                         .level_scales = in->level_scales + level_row(h, i),
                         .decay = in->g == NULL ? 1.0 : exp(in->g[gate_row(h, i)]),
                         .beta = h->p->delta ? in->beta[gate_row(h, i)] : 1.0};
}

static bool older_level(const oracle_problem *p, const token_input *x, size_t level) {
    return level > 0 && oracle_level_exists(p->strong, x->t + 1, level);
}

/* Decays the moved states and takes the token in.  u [V] is scratch. */
static void consume(const oracle_problem *p, const token_input *x, double *states, double *u) {
    const size_t matrix = p->dim_k * p->dim_v;
    for (size_t l = 1; l < p->levels; l++) {
        if (!older_level(p, x, l)) {
            continue;
        }
        double *state = level_of(p, states, l);
        if (p->delta) {
            memset(u, 0, p->dim_v * sizeof *u);
            add_transposed_product(u, 1.0, state, x->k, p->dim_k, p->dim_v);
            add_outer(state, -x->beta, x->k, u, p->dim_k, p->dim_v);
        }
        for (size_t i = 0; i < matrix; i++) {
            state[i] *= x->decay;
        }
    }
    memset(states, 0, matrix * sizeof *states);
    add_outer(states, x->beta, x->k, x->v, p->dim_k, p->dim_v);
}

static void recurrence_head(const head *h, const oracle_inputs *in, const double *q, const double *k, double *o,
                            double *final) {
    const oracle_problem *p = h->p;
    const size_t matrix = p->dim_k * p->dim_v;
    double *states = zeros(p->levels * matrix);
    double *u = zeros(p->dim_v);
    if (in->initial != NULL) {
        copy_existing(p, h->position, in->initial + state_offset(h), states);
    }
    for (size_t i = 0; i < h->length; i++) {
        const token_input x = make_token(h, in, q, k, i);
        if (x.t > 0) {
            advance(p, states, x.t);
        }
        consume(p, &x, states, u);
        for (size_t l = 0; l < p->levels; l++) {
            if (oracle_level_exists(p->strong, x.t + 1, l)) {
                add_transposed_product(o + v_row(h, i), x.level_scales[l], level_of(p, states, l), x.q, p->dim_k,
                                       p->dim_v);
            }
        }
    }
    if (final != NULL) {
        memcpy(final + state_offset(h), states, p->levels * matrix * sizeof *final);
    }
    free(u);
    free(states);
}

void oracle_recurrence(const oracle_problem *p, const oracle_inputs *in, double *o, double *final) {
    double *q = prepared(p, in->q, p->scale);
    double *k = prepared(p, in->k, 1.0);
    memset(o, 0, token_count(p) * p->heads * p->dim_v * sizeof *o);
    for (size_t n = 0; n < p->sequences; n++) {
        for (size_t i = 0; i < p->heads; i++) {
            const head h = make_head(p, n, i);
            recurrence_head(&h, in, q, k, o, final);
        }
    }
    free(k);
    free(q);
}

/* ---- Reverse mode ----------------------------------------------------------------------------------------------- */

/* Where a token's gradients go, and the adjoint of the states after it. */
typedef struct token_gradients {
    double *dq, *dk, *dv, *dlevel_scales;
    double dg, dbeta;
} token_gradients;

/* o = sum_l lambda[l] S[l]^T q: takes the states after the token and adds to their adjoint d. */
static void read_adjoint(const oracle_problem *p, const token_input *x, double *states, const double *d_o, double *d,
                         token_gradients *out, double *u) {
    for (size_t l = 0; l < p->levels; l++) {
        if (!oracle_level_exists(p->strong, x->t + 1, l)) {
            continue;
        }
        memset(u, 0, p->dim_v * sizeof *u);
        add_transposed_product(u, 1.0, level_of(p, states, l), x->q, p->dim_k, p->dim_v);
        out->dlevel_scales[l] = dot(u, d_o, p->dim_v);
        add_product(out->dq, x->level_scales[l], level_of(p, states, l), d_o, p->dim_k, p->dim_v);
        add_outer(level_of(p, d, l), x->level_scales[l], x->q, d_o, p->dim_k, p->dim_v);
    }
}

/* consume() in reverse: `moved` and `states` are before and after it, d is turned into the adjoint of `moved`. */
static void consume_adjoint(const oracle_problem *p, const token_input *x, double *moved, const double *states,
                            double *d, token_gradients *out, double *u, double *w) {
    const size_t matrix = p->dim_k * p->dim_v;
    double *kd = w; /* k^T d[0] */
    memset(kd, 0, p->dim_v * sizeof *kd);
    add_transposed_product(kd, 1.0, d, x->k, p->dim_k, p->dim_v);
    add_scaled(out->dv, x->beta, kd, p->dim_v);
    out->dbeta = dot(kd, x->v, p->dim_v);
    add_product(out->dk, x->beta, d, x->v, p->dim_k, p->dim_v);
    memset(d, 0, matrix * sizeof *d);

    out->dg = 0.0;
    for (size_t l = 1; l < p->levels; l++) {
        if (!older_level(p, x, l)) {
            continue;
        }
        double *dl = level_of(p, d, l);
        out->dg += dot(dl, states + l * matrix, matrix);
        for (size_t i = 0; i < matrix; i++) {
            dl[i] *= x->decay;
        }
        if (p->delta) { /* moved - beta k u^T with u = moved^T k, and w = d^T k */
            double *state = level_of(p, moved, l);
            memset(u, 0, p->dim_v * sizeof *u);
            memset(w, 0, p->dim_v * sizeof *w);
            add_transposed_product(u, 1.0, state, x->k, p->dim_k, p->dim_v);
            add_transposed_product(w, 1.0, dl, x->k, p->dim_k, p->dim_v);
            out->dbeta -= dot(u, w, p->dim_v);
            add_product(out->dk, -x->beta, dl, u, p->dim_k, p->dim_v);
            add_product(out->dk, -x->beta, state, w, p->dim_k, p->dim_v);
            add_outer(dl, -x->beta, x->k, w, p->dim_k, p->dim_v);
        }
    }
}

/* The buffers of one head's backward pass. */
typedef struct tape {
    size_t segment;      /* tokens between checkpoints */
    size_t size;         /* numbers of one set of states */
    double *checkpoints; /* states before each segment */
    double *moved;       /* of each token of a segment, between advance and consume */
    double *states, *d, *u, *w;
} tape;

static tape make_tape(const head *h) {
    const oracle_problem *p = h->p;
    tape x = {.segment = 1, .size = p->levels * p->dim_k * p->dim_v};
    while (x.segment * x.segment < h->length) {
        x.segment++;
    }
    x.checkpoints = zeros((h->length / x.segment + 1) * x.size);
    x.moved = zeros(x.segment * x.size);
    x.states = zeros(x.size);
    x.d = zeros(x.size);
    x.u = zeros(p->dim_v);
    x.w = zeros(p->dim_v);
    return x;
}

static void free_tape(tape *x) {
    free(x->checkpoints);
    free(x->moved);
    free(x->states);
    free(x->d);
    free(x->u);
    free(x->w);
}

/* Walks the tokens [first, end) from x->states; writes checkpoints, or the moved states where `keep`. */
static void replay(const head *h, const oracle_inputs *in, const double *q, const double *k, tape *x, size_t first,
                   size_t end, bool keep) {
    const oracle_problem *p = h->p;
    for (size_t i = first; i < end; i++) {
        const token_input token = make_token(h, in, q, k, i);
        if (!keep && i % x->segment == 0) {
            memcpy(x->checkpoints + i / x->segment * x->size, x->states, x->size * sizeof(double));
        }
        if (token.t > 0) {
            advance(p, x->states, token.t);
        }
        if (keep) {
            copy_existing(p, token.t + 1, x->states, x->moved + (i - first) * x->size);
        }
        consume(p, &token, x->states, x->u);
    }
}

static void backward_token(const head *h, const oracle_inputs *in, const double *q, const double *k, const double *d_o,
                           const oracle_gradients *out, tape *x, double *moved, size_t i) {
    const oracle_problem *p = h->p;
    const token_input token = make_token(h, in, q, k, i);
    token_gradients grads = {.dq = out->dq + k_row(h, i),
                             .dk = out->dk + k_row(h, i),
                             .dv = out->dv + v_row(h, i),
                             .dlevel_scales = out->dlevel_scales + level_row(h, i)};
    copy_existing(p, token.t + 1, moved, x->states);
    consume(p, &token, x->states, x->u);
    read_adjoint(p, &token, x->states, d_o + v_row(h, i), x->d, &grads, x->u);
    consume_adjoint(p, &token, moved, x->states, x->d, &grads, x->u, x->w);
    if (token.t > 0) {
        advance_adjoint(p, x->d, token.t);
    }
    out->dg[gate_row(h, i)] = grads.dg;
    if (p->delta) {
        out->dbeta[gate_row(h, i)] = grads.dbeta;
    }
}

static void backward_head(const head *h, const oracle_inputs *in, const double *q, const double *k, const double *d_o,
                          const double *dfinal, const oracle_gradients *out) {
    const oracle_problem *p = h->p;
    tape x = make_tape(h);
    if (in->initial != NULL) {
        copy_existing(p, h->position, in->initial + state_offset(h), x.states);
    }
    replay(h, in, q, k, &x, 0, h->length, false);
    if (dfinal != NULL) {
        copy_existing(p, h->position + h->length, dfinal + state_offset(h), x.d);
    }
    for (size_t end = h->length; end > 0;) {
        const size_t first = (end - 1) / x.segment * x.segment;
        memcpy(x.states, x.checkpoints + first / x.segment * x.size, x.size * sizeof(double));
        replay(h, in, q, k, &x, first, end, true);
        for (size_t i = end; i-- > first;) {
            backward_token(h, in, q, k, d_o, out, &x, x.moved + (i - first) * x.size, i);
        }
        end = first;
    }
    if (out->dinitial != NULL) {
        memset(out->dinitial + state_offset(h), 0, x.size * sizeof(double));
        copy_existing(p, h->position, x.d, out->dinitial + state_offset(h));
    }
    free_tape(&x);
}

/* The caller's array, or one of our own where the caller wants none. */
static double *gradient_array(double *wanted, size_t count) {
    if (wanted == NULL) {
        return zeros(count);
    }
    memset(wanted, 0, count * sizeof *wanted);
    return wanted;
}

static void release_unwanted(const double *wanted, double *array) {
    if (wanted == NULL) {
        free(array);
    }
}

void oracle_backward(const oracle_problem *p, const oracle_inputs *in, const double *d_o, const double *dfinal,
                     const oracle_gradients *wanted) {
    const size_t tokens = token_count(p);
    double *q = prepared(p, in->q, p->scale);
    double *k = prepared(p, in->k, 1.0);
    const oracle_gradients out = {.dq = gradient_array(wanted->dq, tokens * p->groups * p->dim_k),
                                  .dk = gradient_array(wanted->dk, tokens * p->groups * p->dim_k),
                                  .dv = gradient_array(wanted->dv, tokens * p->heads * p->dim_v),
                                  .dg = gradient_array(wanted->dg, tokens * p->heads),
                                  .dlevel_scales = gradient_array(wanted->dlevel_scales, tokens * p->heads * p->levels),
                                  .dbeta = gradient_array(wanted->dbeta, tokens * p->heads),
                                  .dinitial = wanted->dinitial};
    for (size_t n = 0; n < p->sequences; n++) {
        for (size_t i = 0; i < p->heads; i++) {
            const head h = make_head(p, n, i);
            backward_head(&h, in, q, k, d_o, dfinal, &out);
        }
    }
    unprepare_gradient(p, in->q, p->scale, out.dq);
    unprepare_gradient(p, in->k, 1.0, out.dk);
    release_unwanted(wanted->dq, out.dq);
    release_unwanted(wanted->dk, out.dk);
    release_unwanted(wanted->dv, out.dv);
    release_unwanted(wanted->dg, out.dg);
    release_unwanted(wanted->dlevel_scales, out.dlevel_scales);
    release_unwanted(wanted->dbeta, out.dbeta);
    free(k);
    free(q);
}
