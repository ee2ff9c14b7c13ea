/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From the adjoints of a chunk's linear map back to q, k, the gates and beta.  Sums over the heads of a group are made
 * here, chunk by chunk: no array of all heads' dq or dk ever stands in memory.
 */

/*
 * Gradient of the gate sums a_r.  A product X_rs exp(a_r - a_s) hands X dX to a_r and takes it from a_s; a row decayed
 * from the start hands to a_r; a row decayed to the end (D_END) hands to a_C - a_r, which are the gates behind r: it is
 * kept apart, as the difference of two large sums would drown small gradients.  One work-item a row.
 */
__kernel void chunk_gate_gradients(const loglin_panel p, __global float *ws) {
    const uint r = get_global_id(0), matrix = get_global_id(2);
    if (r >= p.chunk) {
        return;
    }
    const ulong row = (ulong)matrix * p.chunk + r, square = (ulong)matrix * p.chunk * p.chunk;
    const __global float *pair = (p.delta ? AT(A) : AT(Z)) + square;
    const __global float *d_pair = (p.delta ? AT(D_A) : AT(D_MZ)) + square;
    float sum = 0.0f;
    for (uint s = 0; s < p.chunk; s++) {
        if (s == r) {
            continue;
        }
        const uint right = r * p.chunk + s, down = s * p.chunk + r;
        sum += pair[right] * d_pair[right] - pair[down] * d_pair[down];
        if (p.delta) {
            sum += AT(X)[square + right] * AT(D_X)[square + right] - AT(X)[square + down] * AT(D_X)[square + down];
        }
    }
    const __global float *sums = AT(GATE) + (ulong)matrix * 2 * p.chunk;
    const ulong group_row = ((ulong)(matrix / (p.heads / p.groups)) * p.chunk + r) * p.dim_k, at = row * p.dim_k;
    const __global float *q = AT(Q) + group_row, *key = AT(KEY) + group_row;
    const __global float *d_end = (p.delta ? AT(D_K_END) : AT(D_WRITE)) + at;
    float from_start = 0.0f, to_end = 0.0f;
    for (uint i = 0; i < p.dim_k; i++) {
        from_start = fma(q[i], AT(D_READ)[at + i], from_start);
        to_end = fma(key[i], d_end[i], to_end);
        if (p.delta) {
            from_start = fma(key[i], AT(D_K_START)[at + i], from_start);
        }
    }
    AT(D_END)[row] = to_end * decay_between(sums, p.chunk, p.chunk - 1, r);
    AT(D_GATE)[row] = sum + decay_from_start(sums, p.chunk, r) * from_start;
}

/*
 * dg: a gate takes part in the sums of its row and the rows behind it, and in the decays to the end of the rows before
 * it.  One work-item a slot and head.
 */
__kernel void chunk_scatter_gates(const loglin_panel p, __global float *ws, __global float *dg, ulong offset) {
    const uint matrix = get_global_id(0);
    if (matrix >= p.slots * p.heads) {
        return;
    }
    const __global int *slot = slot_record(p, ws, matrix / p.heads);
    __global float *ends = AT(D_END) + (ulong)matrix * p.chunk;
    const __global float *sums = AT(D_GATE) + (ulong)matrix * p.chunk;
    float before = 0.0f;
    for (uint k = 0; p.columns > 0 && k < p.dim_k; k++) {
        before += AT(D_DECAY)[(ulong)matrix * p.dim_k + k];
    }
    for (uint r = 0; r < p.chunk; r++) {
        const float end = ends[r];
        ends[r] = before;
        before += end;
    }
    float behind = 0.0f;
    for (uint r = p.chunk; r-- > 0;) {
        const long token = row_token(slot, r);
        behind += sums[r];
        if (token >= 0) {
            dg[offset + (ulong)token * p.heads + matrix % p.heads] = behind + ends[r];
        }
    }
}

/* dbeta, through T = (I + X)^-1 diag(beta) and X = strict_tril(diag(beta) K K^T) D.  One work-item a row. */
__kernel void chunk_scatter_beta(const loglin_panel p, const __global float *ws, __global weight *dbeta,
                                 ulong offset) {
    const uint r = get_global_id(0), matrix = get_global_id(2);
    const long token = row_token(slot_record(p, ws, matrix / p.heads), r);
    if (r >= p.chunk || token < 0) {
        return;
    }
    const __global float *sums = AT(GATE) + (ulong)matrix * 2 * p.chunk;
    const ulong square = (ulong)matrix * p.chunk * p.chunk;
    const ulong group_row = ((ulong)(matrix / (p.heads / p.groups)) * p.chunk + r) * p.chunk;
    float sum = 0.0f;
    for (uint t = r; t < p.chunk; t++) {
        sum = fma(AT(XINV)[square + t * p.chunk + r], AT(D_T)[square + t * p.chunk + r], sum);
    }
    for (uint s = 0; s < r; s++) {
        sum = fma(AT(D_X)[square + r * p.chunk + s], AT(KK)[group_row + s] * decay_between(sums, p.chunk, r, s), sum);
    }
    store_weight(dbeta, offset + (ulong)token * p.heads + matrix % p.heads, sum);
}

/* D_QK and, for the delta rule, D_KK + D_KK^T, summed over a group's heads.  Over (s, r, slot and group). */
__kernel void chunk_pair_gradients(const loglin_panel p, __global float *ws) {
    const uint s = get_global_id(0), r = get_global_id(1), group = get_global_id(2);
    if (s >= p.chunk) {
        return;
    }
    const uint shared = p.heads / p.groups, high = max(r, s), low = min(r, s);
    const ulong at = ((ulong)group * p.chunk + r) * p.chunk + s;
    float d_qk = 0.0f, d_kk = 0.0f;
    for (uint j = 0; j < shared; j++) {
        const ulong matrix = (ulong)group * shared + j, square = matrix * p.chunk * p.chunk;
        const float decay = decay_between(AT(GATE) + matrix * 2 * p.chunk, p.chunk, high, low);
        const ulong pair = square + high * p.chunk + low;
        if (s <= r) {
            d_qk = fma((p.delta ? AT(D_A) : AT(D_MZ))[pair], decay, d_qk);
        }
        if (p.delta && s != r) {
            d_kk = fma(AT(D_X)[pair] * AT(BETA)[matrix * p.chunk + high], decay, d_kk);
        }
    }
    AT(D_QK)[at] = d_qk;
    if (p.delta) {
        AT(D_KK)[at] = d_kk;
    }
}

/* D_Q and D_KEY += what the rows decayed from the start and to the end hand back.  Over (k, r, slot and group). */
__kernel void chunk_row_gradients(const loglin_panel p, __global float *ws) {
    const uint i = get_global_id(0), r = get_global_id(1), group = get_global_id(2);
    if (i >= p.dim_k) {
        return;
    }
    const uint shared = p.heads / p.groups;
    const ulong to = ((ulong)group * p.chunk + r) * p.dim_k + i;
    float d_q = AT(D_Q)[to], d_key = AT(D_KEY)[to];
    for (uint j = 0; j < shared; j++) {
        const ulong matrix = (ulong)group * shared + j, at = (matrix * p.chunk + r) * p.dim_k + i;
        const __global float *sums = AT(GATE) + matrix * 2 * p.chunk;
        const float start = decay_from_start(sums, p.chunk, r), end = decay_between(sums, p.chunk, p.chunk - 1, r);
        d_q = fma(start, AT(D_READ)[at], d_q);
        d_key = fma(end, (p.delta ? AT(D_K_END) : AT(D_WRITE))[at], d_key);
        if (p.delta) {
            d_key = fma(start, AT(D_K_START)[at], d_key);
        }
    }
    AT(D_Q)[to] = d_q;
    AT(D_KEY)[to] = d_key;
}
