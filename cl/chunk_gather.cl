/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From the caller's arrays into the panel, and back: rows of a chunk that hold no token become zeros, all else is
 * converted to float.  Launched over (column, row, matrix); a matrix is a slot and a head or group of it.
 */

#define AT(region) (ws + p.at[REGION_##region])

/* 1 / sqrt(sum of squares + 1e-6) of the rows of q and k.  One work-item a row. */
__kernel void chunk_norms(const loglin_panel p, __global float *ws, const __global storage *q, ulong q_offset,
                          const __global storage *k, ulong k_offset) {
    const uint r = get_global_id(0), matrix = get_global_id(2);
    if (r >= p.chunk) {
        return;
    }
    const long token = row_token(slot_record(p, ws, matrix / p.groups), r);
    const ulong row = ((ulong)max(token, 0L) * p.groups + matrix % p.groups) * p.dim_k;
    float q_sum = 0.0f, k_sum = 0.0f;
    for (uint i = 0; token >= 0 && i < p.dim_k; i++) {
        const float x = load(q, q_offset + row + i), y = load(k, k_offset + row + i);
        q_sum = fma(x, x, q_sum);
        k_sum = fma(y, y, k_sum);
    }
    AT(QNORM)[(ulong)matrix * p.chunk + r] = 1.0f / sqrt(q_sum + 1e-6f);
    AT(KNORM)[(ulong)matrix * p.chunk + r] = 1.0f / sqrt(k_sum + 1e-6f);
}

__kernel void chunk_gather_qk(const loglin_panel p, __global float *ws, const __global storage *q, ulong q_offset,
                              const __global storage *k, ulong k_offset, uint normalize) {
    const uint i = get_global_id(0), r = get_global_id(1), matrix = get_global_id(2);
    if (i >= p.dim_k) {
        return;
    }
    const long token = row_token(slot_record(p, ws, matrix / p.groups), r);
    const ulong from = ((ulong)max(token, 0L) * p.groups + matrix % p.groups) * p.dim_k + i;
    const ulong row = (ulong)matrix * p.chunk + r;
    const float q_scale = p.scale * (normalize ? AT(QNORM)[row] : 1.0f);
    const float k_scale = normalize ? AT(KNORM)[row] : 1.0f;
    AT(Q)[row * p.dim_k + i] = token < 0 ? 0.0f : q_scale * load(q, q_offset + from);
    AT(KEY)[row * p.dim_k + i] = token < 0 ? 0.0f : k_scale * load(k, k_offset + from);
}

/* v, or its gradient dO, into the region that begins at this element of ws. */
__kernel void chunk_gather_v(const loglin_panel p, __global float *ws, const __global storage *v, ulong offset,
                             ulong region) {
    const uint i = get_global_id(0), r = get_global_id(1), matrix = get_global_id(2);
    if (i >= p.dim_v) {
        return;
    }
    const long token = row_token(slot_record(p, ws, matrix / p.heads), r);
    const ulong from = ((ulong)max(token, 0L) * p.heads + matrix % p.heads) * p.dim_v + i;
    ws[region + ((ulong)matrix * p.chunk + r) * p.dim_v + i] = token < 0 ? 0.0f : load(v, offset + from);
}

/*
 * Running sums of the gates inside each chunk, kept as a sum and its rounding remainder: differences of two sums must be
 * exact even behind a run of very negative gates.  And beta.  One work-item a slot and head.
 */
__kernel void chunk_gather_gates(const loglin_panel p, __global float *ws, const __global float *g, ulong g_offset,
                                 const __global weight *beta, ulong beta_offset) {
    const uint matrix = get_global_id(0);
    if (matrix >= p.slots * p.heads) {
        return;
    }
    const __global int *slot = slot_record(p, ws, matrix / p.heads);
    __global float *sums = AT(GATE) + (ulong)matrix * 2 * p.chunk, *betas = AT(BETA) + (ulong)matrix * p.chunk;
    float sum = 0.0f, rest = 0.0f;
    for (uint r = 0; r < p.chunk; r++) {
        const long token = row_token(slot, r);
        const ulong from = (ulong)max(token, 0L) * p.heads + matrix % p.heads;
        const float gate = token >= 0 && g ? g[g_offset + from] : 0.0f;
        const float next = sum + gate, gate_seen = next - sum;
        rest += (sum - (next - gate_seen)) + (gate - gate_seen);
        sum = next;
        sums[r] = sum;
        sums[p.chunk + r] = rest;
        if (p.delta) {
            betas[r] = token < 0 ? 0.0f : load_weight(beta, beta_offset + from);
        }
    }
}

/* From such a region to dv. */
__kernel void chunk_scatter_v(const loglin_panel p, const __global float *ws, __global storage *v, ulong offset,
                              ulong region) {
    const uint i = get_global_id(0), r = get_global_id(1), matrix = get_global_id(2);
    const long token = row_token(slot_record(p, ws, matrix / p.heads), r);
    if (i >= p.dim_v || token < 0) {
        return;
    }
    store(v, offset + ((ulong)token * p.heads + matrix % p.heads) * p.dim_v + i,
          ws[region + ((ulong)matrix * p.chunk + r) * p.dim_v + i]);
}

/* Row products that the gradient of the normalisation takes off.  One work-item a row. */
__kernel void chunk_norm_dots(const loglin_panel p, __global float *ws) {
    const uint r = get_global_id(0), matrix = get_global_id(2);
    if (r >= p.chunk) {
        return;
    }
    const ulong row = (ulong)matrix * p.chunk + r;
    float q_dot = 0.0f, k_dot = 0.0f;
    for (uint i = 0; i < p.dim_k; i++) {
        q_dot = fma(AT(Q)[row * p.dim_k + i], AT(D_Q)[row * p.dim_k + i], q_dot);
        k_dot = fma(AT(KEY)[row * p.dim_k + i], AT(D_KEY)[row * p.dim_k + i], k_dot);
    }
    AT(Q_DOT)[row] = q_dot;
    AT(K_DOT)[row] = k_dot;
}

/* dq and dk, through the normalisation x / |x|: d|x|-direction is taken off, the rest divided by the norm. */
__kernel void chunk_scatter_qk(const loglin_panel p, __global float *ws, __global storage *dq, ulong q_offset,
                               __global storage *dk, ulong k_offset, uint normalize) {
    const uint i = get_global_id(0), r = get_global_id(1), matrix = get_global_id(2);
    const long token = row_token(slot_record(p, ws, matrix / p.groups), r);
    if (i >= p.dim_k || token < 0) {
        return;
    }
    const ulong row = (ulong)matrix * p.chunk + r, at = row * p.dim_k + i;
    float q_gradient = p.scale * AT(D_Q)[at], k_gradient = AT(D_KEY)[at];
    if (normalize) {
        q_gradient = AT(QNORM)[row] * (q_gradient - AT(Q)[at] / p.scale * AT(Q_DOT)[row]);
        k_gradient = AT(KNORM)[row] * (k_gradient - AT(KEY)[at] * AT(K_DOT)[row]);
    }
    const ulong to = ((ulong)token * p.groups + matrix % p.groups) * p.dim_k + i;
    store(dq, q_offset + to, q_gradient);
    store(dk, k_offset + to, k_gradient);
}
