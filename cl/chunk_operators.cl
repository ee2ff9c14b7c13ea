/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A chunk as a linear map.  With a_r the sum of the chunk's gates up to row r, D_rs = exp(a_r - a_s) for s <= r, both
 * operators are
 *     o_r = sum_s level weight * Z_rs v_s + level weight * READ_r E        E: a level's state at the chunk's start
 *     E  -> exp(a_C) E - WRITE^T K_START E                                 through the chunk (the product: delta only)
 *     OWN = WRITE^T V                                                      the chunk's own state at its end
 * Scalar-gated: Z = tril(Q K^T) D, READ = exp(a) Q, WRITE = K_END.
 * Delta rule: X = strict_tril(diag(beta) K K^T) D, T = (I + X)^-1 diag(beta), A = tril(Q K^T) D,
 *             Z = A T, READ = exp(a) Q - Z K_START, WRITE = T^T K_END.
 * This file makes the elementwise parts; the products between them are CLBlast's.
 */

/* exp(a_r - a_s), s <= r: the sums' difference first, then the remainders'. */
float decay_between(const __global float *sums, uint chunk, uint r, uint s) {
    return exp((sums[r] - sums[s]) + (sums[chunk + r] - sums[chunk + s]));
}

float decay_from_start(const __global float *sums, uint chunk, uint r) { return exp(sums[r] + sums[chunk + r]); }

/* A (Z for the scalar-gated operator), and X.  Over (column s, row r, slot and head). */
__kernel void chunk_decay_products(const loglin_panel p, __global float *ws) {
    const uint s = get_global_id(0), r = get_global_id(1), matrix = get_global_id(2);
    if (s >= p.chunk) {
        return;
    }
    const __global float *sums = AT(GATE) + (ulong)matrix * 2 * p.chunk;
    const ulong group = matrix / (p.heads / p.groups), row = (ulong)matrix * p.chunk + r, at = row * p.chunk + s;
    const ulong from = (group * p.chunk + r) * p.chunk + s;
    const float decay = s <= r ? decay_between(sums, p.chunk, r, s) : 0.0f;
    const float product = s <= r ? AT(QK)[from] * decay : 0.0f;
    if (p.delta) {
        AT(A)[at] = product;
        AT(X)[at] = s < r ? AT(BETA)[row] * AT(KK)[from] * decay : 0.0f;
    } else {
        AT(Z)[at] = product;
    }
}

/* READ before its product is taken off, K_START, and K_END.  Over (column of K, row, slot and head). */
__kernel void chunk_decay_rows(const loglin_panel p, __global float *ws) {
    const uint i = get_global_id(0), r = get_global_id(1), matrix = get_global_id(2);
    if (i >= p.dim_k) {
        return;
    }
    const __global float *sums = AT(GATE) + (ulong)matrix * 2 * p.chunk;
    const ulong group = matrix / (p.heads / p.groups);
    const ulong from = (group * p.chunk + r) * p.dim_k + i, at = ((ulong)matrix * p.chunk + r) * p.dim_k + i;
    const float start = decay_from_start(sums, p.chunk, r), end = decay_between(sums, p.chunk, p.chunk - 1, r);
    AT(READ)[at] = start * AT(Q)[from];
    if (p.delta) {
        AT(K_START)[at] = start * AT(KEY)[from];
        AT(K_END)[at] = end * AT(KEY)[from];
    } else {
        AT(WRITE)[at] = end * AT(KEY)[from];
    }
}

/*
 * (I + X)^-1 by forward substitution, and T.  Columns are independent: a work-item makes one column, neighbours read
 * the same X.  Over (column, 1, slot and head).
 */
__kernel void chunk_solve(const loglin_panel p, __global float *ws) {
    const uint s = get_global_id(0), matrix = get_global_id(2);
    if (s >= p.chunk) {
        return;
    }
    const ulong base = (ulong)matrix * p.chunk * p.chunk;
    const __global float *x = AT(X) + base;
    __global float *inverse = AT(XINV) + base, *t = AT(T) + base;
    const float beta = AT(BETA)[(ulong)matrix * p.chunk + s];
    for (uint r = 0; r < p.chunk; r++) {
        float sum = r == s ? 1.0f : 0.0f;
        for (uint j = 0; j < r; j++) {
            sum = fma(-x[r * p.chunk + j], inverse[j * p.chunk + s], sum);
        }
        inverse[r * p.chunk + s] = sum;
        t[r * p.chunk + s] = sum * beta;
    }
}
