/* SPDX-License-Identifier: Apache-2.0 */
#include "plan/reference.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

static size_t bit_length(size_t x) {
    size_t bits = 0;
    for (; x > 0; x >>= 1) {
        bits++;
    }
    return bits;
}

size_t loglin_reference_level(loglin_partition partition, size_t t, size_t s) {
    while (partition == LOGLIN_STRONG && s < t) {
        const size_t l = bit_length(t) - 1, v = (size_t)1 << (l > 1 ? l - 1 : 0), r = t - ((size_t)1 << l);
        if (s < v || (s < 2 * v && r >= v)) {
            return l + 1;
        }
        const size_t step = s < 2 * v ? v : 2 * v;
        t -= step;
        s -= step;
    }
    return s == t ? 0 : bit_length(t ^ s);
}

static double dot(const double *a, const double *b, size_t count) {
    double sum = 0;
    for (size_t i = 0; i < count; i++) {
        sum += a[i] * b[i];
    }
    return sum;
}

/* What a token is to a head. */
typedef struct token {
    const double *k, *v;
    double decay, beta;
    size_t kept; /* index of g and beta */
} token;

static token token_at(const loglin_reference *in, size_t s, size_t h) {
    const size_t group = h / (in->heads / in->groups), kept = s * in->heads + h;
    return (token){.k = in->k + (s * in->groups + group) * in->dim_k,
                   .v = in->v + kept * in->dim_v,
                   .decay = exp(in->g[kept]),
                   .beta = in->beta != NULL ? in->beta[kept] : 1,
                   .kept = kept};
}

/* The query before the token's transition becomes the one behind it. */
static void pass(const loglin_reference *in, const token *at, double meeting, const double *before, double *behind) {
    const double removed = in->beta != NULL ? at->beta * meeting : 0;
    for (size_t i = 0; i < in->dim_k; i++) {
        behind[i] = at->decay * (before[i] - removed * at->k[i]);
    }
}

static const double *query_at(const loglin_reference *in, size_t t, size_t h) {
    return in->q + (t * in->groups + h / (in->heads / in->groups)) * in->dim_k;
}

void loglin_reference_row(const loglin_reference *in, size_t t, size_t h, double *scratch, double *o) {
    memcpy(scratch, query_at(in, t, h), in->dim_k * sizeof *scratch);
    memset(o, 0, in->dim_v * sizeof *o);
    const double *scales = in->level_scales + (t * in->heads + h) * in->levels;
    for (size_t s = t + 1; s-- > 0;) {
        const token at = token_at(in, s, h);
        const double meeting = dot(at.k, scratch, in->dim_k);
        const double weight = scales[loglin_reference_level(in->partition, t, s)] * at.beta * meeting;
        for (size_t j = 0; j < in->dim_v; j++) {
            o[j] += weight * at.v[j];
        }
        pass(in, &at, meeting, scratch, scratch);
    }
}

/* Token s backwards: w is the query that met it, adjoint that of the query behind it, and then of w. */
static void reverse(const loglin_reference *in, size_t t, size_t h, size_t s, const double *d_o, const double *w,
                    double *adjoint, const loglin_reference_gradients *out) {
    const token at = token_at(in, s, h);
    const bool delta = in->beta != NULL;
    const size_t scale = (t * in->heads + h) * in->levels + loglin_reference_level(in->partition, t, s);
    const double lambda = in->level_scales[scale], meeting = dot(at.k, w, in->dim_k);
    const double value = dot(at.v, d_o, in->dim_v), back = dot(at.k, adjoint, in->dim_k);
    const double behind = dot(w, adjoint, in->dim_k) - (delta ? at.beta * meeting * back : 0);
    const double removed = delta ? at.decay * at.beta : 0;
    const double d_meeting = lambda * at.beta * value - removed * back;
    double *dk = out->dk + (at.k - in->k), *dv = out->dv + (at.v - in->v);
    out->dg[at.kept] += at.decay * behind;
    out->dlevel_scales[scale] += at.beta * meeting * value;
    if (delta) {
        out->dbeta[at.kept] += lambda * meeting * value - at.decay * meeting * back;
    }
    for (size_t j = 0; j < in->dim_v; j++) {
        dv[j] += lambda * at.beta * meeting * d_o[j];
    }
    for (size_t i = 0; i < in->dim_k; i++) {
        dk[i] += d_meeting * w[i] - removed * meeting * adjoint[i];
        adjoint[i] = at.decay * adjoint[i] + d_meeting * at.k[i];
    }
}

void loglin_reference_row_gradients(const loglin_reference *in, size_t t, size_t h, const double *d_o, double *scratch,
                                    const loglin_reference_gradients *out) {
    double *adjoint = scratch, *queries = scratch + in->dim_k; /* queries[t - s]: the one that meets token s */
    memcpy(queries, query_at(in, t, h), in->dim_k * sizeof *queries);
    for (size_t s = t + 1; s-- > 0;) {
        const token at = token_at(in, s, h);
        double *w = queries + (t - s) * in->dim_k;
        pass(in, &at, dot(at.k, w, in->dim_k), w, w + in->dim_k);
    }
    memset(adjoint, 0, in->dim_k * sizeof *adjoint);
    for (size_t s = 0; s <= t; s++) {
        reverse(in, t, h, s, d_o, queries + (t - s) * in->dim_k, adjoint, out);
    }
    double *dq = out->dq + (query_at(in, t, h) - in->q);
    for (size_t i = 0; i < in->dim_k; i++) {
        dq[i] += adjoint[i];
    }
}
