/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Adjoints of the level states, walked backwards in time.  D_E is the adjoint of E: what the chunk's reads ask for comes
 * first (a product), then what the next chunk's states hand back.
 */

/*
 * D_E_END and D_OWN of the waves from end-1 down to begin, from D_E of the wave behind each; where a sequence ends, from
 * the gradient of its final states.  `whole` also finishes D_E by the decay alone (scalar-gated): otherwise
 * chunk_retreat_end does, once D_E_LOST is known.  Over (column of V, row of K, the heads of a wave's slots).
 */
__kernel void chunk_retreat(const loglin_panel p, __global float *ws, const __global float *dfinal,
                            ulong dfinal_offset, uint begin, uint end, uint whole) {
    const uint i = get_global_id(0), k = get_global_id(1), lane = get_global_id(2);
    if (i >= p.dim_v) {
        return;
    }
    const ulong step = (ulong)p.dim_k * p.dim_v;
    for (uint wave = end; wave-- > begin;) {
        const uint x = wave * p.batch_width + lane / p.heads;
        const ulong matrix = (ulong)wave * p.batch_width * p.heads + lane;
        const __global int *slot = slot_record(p, ws, x);
        const int flags = slot[SLOT_FLAGS], last = flags & SLOT_LAST;
        const ulong at = state_at(p, matrix, k, i);
        const __global float *behind = AT(D_E) + state_at(p, matrix + p.batch_width * p.heads, k, i);
        const __global float *final =
            dfinal + dfinal_offset + caller_state_at(p, (uint)slot[SLOT_SEQUENCE], lane % p.heads, k, i);
        const int own = slot[SLOT_OWN];
        AT(D_OWN)[(matrix * p.dim_k + k) * p.dim_v + i] =
            (flags & SLOT_VALID) && !last && own >= 0 ? behind[own * p.dim_v] : 0.0f;
        const float decay = chunk_decay(p, ws, matrix);
        for (uint j = 0; j < p.columns; j++) {
            const int to = slot[SLOT_MAP + j];
            float x_end = 0.0f;
            if ((flags & SLOT_VALID) && to >= 0) {
                x_end = !last ? behind[to * p.dim_v] : dfinal ? final[to * step] : 0.0f;
            }
            AT(D_E_END)[at + j * p.dim_v] = x_end;
            if (whole) {
                AT(D_E)[at + j * p.dim_v] += decay * x_end;
            }
        }
    }
}

/* D_E of a wave, once D_E_LOST is known (delta rule). */
__kernel void chunk_retreat_end(const loglin_panel p, __global float *ws, uint wave) {
    const uint i = get_global_id(0), k = get_global_id(1), lane = get_global_id(2);
    if (i >= p.dim_v) {
        return;
    }
    const ulong matrix = (ulong)wave * p.batch_width * p.heads + lane, at = state_at(p, matrix, k, i);
    const float decay = chunk_decay(p, ws, matrix);
    for (uint j = 0; j < p.columns; j++) {
        AT(D_E)[at + j * p.dim_v] += decay * AT(D_E_END)[at + j * p.dim_v] - AT(D_E_LOST)[at + j * p.dim_v];
    }
}

/* The gradient of the caller's initial states, at the first chunk of a sequence.  Over slots and heads. */
__kernel void chunk_initial_gradient(const loglin_panel p, const __global float *ws, __global float *gradient,
                                     ulong offset) {
    const uint i = get_global_id(0), k = get_global_id(1), matrix = get_global_id(2);
    const __global int *slot = slot_record(p, ws, matrix / p.heads);
    if (i >= p.dim_v || !(slot[SLOT_FLAGS] & SLOT_FIRST)) {
        return;
    }
    const __global float *d_e = AT(D_E) + state_at(p, matrix, k, i);
    const ulong to = offset + caller_state_at(p, (uint)slot[SLOT_SEQUENCE], matrix % p.heads, k, i);
    for (uint level = 0; level < p.levels; level++) {
        const int column = initial_column(p, (int)level, (uint)slot[SLOT_TIME]);
        gradient[to + (ulong)level * p.dim_k * p.dim_v] = column >= 0 ? d_e[column * p.dim_v] : 0.0f;
    }
}

/*
 * What the final states' gradient asks of the last chunk's keys: D_WRITE_s += V_s dS^T, level by level.
 * Over (column of K, row, slot and head).
 */
__kernel void chunk_final_to_keys(const loglin_panel p, __global float *ws, const __global float *dfinal,
                                  ulong offset) {
    const uint k = get_global_id(0), s = get_global_id(1), matrix = get_global_id(2);
    const __global int *slot = slot_record(p, ws, matrix / p.heads);
    if (k >= p.dim_k) {
        return;
    }
    const ulong row = (ulong)matrix * p.chunk + s;
    const uint last = (uint)slot[SLOT_HI] - 1;
    const int ends = slot[SLOT_FLAGS] & SLOT_LAST;
    const ulong base = offset + caller_state_at(p, (uint)slot[SLOT_SEQUENCE], matrix % p.heads, k, 0);
    const ulong step = (ulong)p.dim_k * p.dim_v;
    if (ends && (int)s >= slot[SLOT_LO] && s <= last) {
        const ulong from = base + (ulong)level_of(last, s) * step;
        float sum = 0.0f;
        for (uint i = 0; i < p.dim_v; i++) {
            sum = fma(AT(V)[row * p.dim_v + i], dfinal[from + i], sum);
        }
        AT(D_WRITE)[row * p.dim_k + k] += sum;
    }
    if (p.near) {
        float sum = 0.0f;
        if (ends_near(p, slot)) {
            const ulong from = base + (ulong)level_of(p.chunk + last, s) * step;
            const ulong before = (ulong)(matrix - p.batch_width * p.heads) * p.chunk + s;
            for (uint i = 0; i < p.dim_v; i++) {
                sum = fma(AT(V)[before * p.dim_v + i], dfinal[from + i], sum);
            }
        }
        AT(D_WRITE_NEAR)[row * p.dim_k + k] = sum;
    }
}

/* And of its values: D_V_s += dS^T WRITE_s.  Over (column of V, row, slot and head). */
__kernel void chunk_final_to_values(const loglin_panel p, __global float *ws, const __global float *dfinal,
                                    ulong offset) {
    const uint i = get_global_id(0), s = get_global_id(1), matrix = get_global_id(2);
    const __global int *slot = slot_record(p, ws, matrix / p.heads);
    if (i >= p.dim_v || !(slot[SLOT_FLAGS] & SLOT_LAST)) {
        return;
    }
    const ulong row = (ulong)matrix * p.chunk + s;
    const uint last = (uint)slot[SLOT_HI] - 1;
    const ulong base = offset + caller_state_at(p, (uint)slot[SLOT_SEQUENCE], matrix % p.heads, 0, i);
    const ulong step = (ulong)p.dim_k * p.dim_v;
    if ((int)s >= slot[SLOT_LO] && s <= last) {
        const ulong from = base + (ulong)level_of(last, s) * step;
        float sum = 0.0f;
        for (uint k = 0; k < p.dim_k; k++) {
            sum = fma(AT(WRITE)[row * p.dim_k + k], dfinal[from + (ulong)k * p.dim_v], sum);
        }
        AT(D_V)[row * p.dim_v + i] += sum;
    }
    if (ends_near(p, slot)) {
        const ulong from = base + (ulong)level_of(p.chunk + last, s) * step;
        float sum = 0.0f;
        for (uint k = 0; k < p.dim_k; k++) {
            sum = fma(AT(WRITE_NEAR)[row * p.dim_k + k], dfinal[from + (ulong)k * p.dim_v], sum);
        }
        AT(D_V)[((ulong)(matrix - p.batch_width * p.heads) * p.chunk + s) * p.dim_v + i] += sum;
    }
}

/*
 * Strong: WRITE_NEAR = exp(a_C) WRITE of the chunk before, - M_NEAR WRITE for the delta rule (the product follows).
 * Over (column of K, row, slot and head); `backward` turns the adjoint the same way: D_WRITE before += D_WRITE_NEAR.
 */
__kernel void chunk_near_keys(const loglin_panel p, __global float *ws, uint backward) {
    const uint k = get_global_id(0), s = get_global_id(1), matrix = get_global_id(2);
    if (k >= p.dim_k) {
        return;
    }
    const ulong at = ((ulong)matrix * p.chunk + s) * p.dim_k + k;
    const ulong step = (ulong)p.batch_width * p.heads * p.chunk * p.dim_k;
    const float decay = chunk_decay(p, ws, matrix);
    if (backward) {
        ws[p.at[REGION_D_WRITE] + at - step] += decay * AT(D_WRITE_NEAR)[at];
    } else {
        AT(WRITE_NEAR)[at] = decay * ws[p.at[REGION_WRITE] + at - step];
    }
}

/*
 * D_DECAY: gradient of a_C through the states that decay by it, and (near) through WRITE_NEAR, a part for each row of
 * K.  Over (row of K, 1, slot and head).
 */
__kernel void chunk_decay_gradient(const loglin_panel p, __global float *ws, uint near) {
    const uint k = get_global_id(0), matrix = get_global_id(2);
    if (k >= p.dim_k) {
        return;
    }
    const ulong at = state_at(p, matrix, k, 0);
    float sum = 0.0f;
    for (uint i = 0; i < p.columns * p.dim_v; i++) {
        sum = fma(AT(D_E_END)[at + i], AT(E)[at + i], sum);
    }
    const ulong key = (ulong)matrix * p.chunk * p.dim_k + k;
    const ulong step = (ulong)p.batch_width * p.heads * p.chunk * p.dim_k;
    for (uint s = 0; near && s < p.chunk; s++) {
        const ulong row = key + (ulong)s * p.dim_k;
        sum = fma(AT(D_WRITE_NEAR)[row], ws[p.at[REGION_WRITE] + row - step], sum);
    }
    AT(D_DECAY)[(ulong)matrix * p.dim_k + k] = sum * chunk_decay(p, ws, matrix);
}
