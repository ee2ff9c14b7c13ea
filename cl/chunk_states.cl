/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Level states from chunk to chunk.  E holds, for every slot, the states of all levels at the chunk's start, a column
 * each.  Through the chunk they decay (the delta rule also takes E_LOST off), and at the next chunk's start each joins
 * the column where its level then stands: the Fenwick tree, walked in time.  Launched over (column of V, row of K,
 * matrix): a work-item keeps to its own element of all states, so nothing needs a barrier or an atomic.
 */

/* exp(a_C): the decay through the whole chunk. */
float chunk_decay(const loglin_panel p, const __global float *ws, ulong matrix) {
    return decay_from_start(AT(GATE) + matrix * 2 * p.chunk, p.chunk, p.chunk - 1);
}

/* Element (row k, column 0, i) of a matrix of E's shape. */
ulong state_at(const loglin_panel p, ulong matrix, uint k, uint i) {
    return (matrix * p.dim_k + k) * p.columns * p.dim_v + i;
}

/* E at the first chunk of a sequence: the caller's states, or zeros.  Over slots and heads. */
__kernel void chunk_begin(const loglin_panel p, __global float *ws, const __global float *values, ulong values_offset,
                          const __global float *log_decay, ulong decay_offset) {
    const uint i = get_global_id(0), k = get_global_id(1), matrix = get_global_id(2);
    const __global int *slot = slot_record(p, ws, matrix / p.heads);
    if (i >= p.dim_v || !(slot[SLOT_FLAGS] & SLOT_FIRST)) {
        return;
    }
    __global float *e = AT(E) + state_at(p, matrix, k, i);
    for (uint j = 0; j < p.columns; j++) {
        e[j * p.dim_v] = 0.0f;
    }
    if (!values) {
        return;
    }
    const uint sequence = (uint)slot[SLOT_SEQUENCE], head = matrix % p.heads;
    const ulong from = values_offset + caller_state_at(p, sequence, head, k, i);
    for (uint level = 0; level < p.levels; level++) {
        const int column = initial_column(p, (int)level, (uint)slot[SLOT_TIME]);
        if (column >= 0) {
            const ulong decay = decay_offset + ((ulong)sequence * p.heads + head) * p.levels + level;
            const float scale = log_decay ? exp(log_decay[decay]) : 1.0f;
            e[column * p.dim_v] += scale * values[from + (ulong)level * p.dim_k * p.dim_v];
        }
    }
}

/*
 * E of the next wave from E of this one, for the waves begin..end-1 of the panel.  Over the heads of a wave's slots.
 */
__kernel void chunk_walk(const loglin_panel p, __global float *ws, uint begin, uint end) {
    const uint i = get_global_id(0), k = get_global_id(1), lane = get_global_id(2);
    if (i >= p.dim_v) {
        return;
    }
    for (uint wave = begin; wave < end; wave++) {
        const uint x = wave * p.batch_width + lane / p.heads, next = x + p.batch_width;
        const ulong matrix = (ulong)wave * p.batch_width * p.heads + lane;
        const __global int *slot = slot_record(p, ws, x);
        const int flags = slot[SLOT_FLAGS];
        __global float *to = AT(E) + state_at(p, matrix + p.batch_width * p.heads, k, i);
        if (next < p.slots && (slot_record(p, ws, next)[SLOT_FLAGS] & SLOT_FIRST)) {
            continue;
        }
        for (uint j = 0; j < p.columns; j++) {
            to[j * p.dim_v] = 0.0f;
        }
        if (!(flags & SLOT_VALID) || (flags & SLOT_LAST)) {
            continue;
        }
        const ulong at = state_at(p, matrix, k, i);
        const __global float *e = AT(E) + at, *lost = AT(E_LOST) + at;
        const float decay = chunk_decay(p, ws, matrix);
        for (uint j = 0; j < p.columns; j++) {
            const int column = slot[SLOT_MAP + j];
            if (column >= 0) {
                to[column * p.dim_v] += decay * e[j * p.dim_v] - (p.delta ? lost[j * p.dim_v] : 0.0f);
            }
        }
        if (slot[SLOT_OWN] >= 0) {
            to[slot[SLOT_OWN] * p.dim_v] += AT(OWN)[(matrix * p.dim_k + k) * p.dim_v + i];
        }
    }
}

/* to = from, to += from, or to = 0, for `count` floats of every matrix: what goes from panel to panel. */
__kernel void chunk_carry(const loglin_panel p, __global float *ws, ulong from, ulong to, uint count, uint how) {
    (void)p;
    const uint i = get_global_id(0), matrix = get_global_id(2);
    if (i < count) {
        const ulong at = (ulong)matrix * count + i;
        ws[to + at] = how == CARRY_ZERO ? 0.0f : how == CARRY_ADD ? ws[to + at] + ws[from + at] : ws[from + at];
    }
}

/* Strong: does the last chunk end with keys of the chunk before at levels of their own? */
int ends_near(const loglin_panel p, const __global int *slot) {
    return p.near && reads_near(slot) && (slot[SLOT_FLAGS] & SLOT_LAST);
}

/* The states after the last token, from the last chunk of a sequence.  Over slots and heads. */
__kernel void chunk_final(const loglin_panel p, const __global float *ws, __global float *values,
                          ulong values_offset) {
    const uint i = get_global_id(0), k = get_global_id(1), matrix = get_global_id(2);
    const __global int *slot = slot_record(p, ws, matrix / p.heads);
    if (i >= p.dim_v || !(slot[SLOT_FLAGS] & SLOT_LAST)) {
        return;
    }
    __global float *to = values + values_offset +
                         caller_state_at(p, (uint)slot[SLOT_SEQUENCE], matrix % p.heads, k, i);
    const ulong step = (ulong)p.dim_k * p.dim_v;
    for (uint level = 0; level < p.levels; level++) {
        to[level * step] = 0.0f;
    }
    const ulong at = state_at(p, matrix, k, i);
    const float decay = chunk_decay(p, ws, matrix);
    for (uint j = 0; j < p.columns; j++) {
        if (slot[SLOT_MAP + j] >= 0) {
            to[slot[SLOT_MAP + j] * step] +=
                decay * AT(E)[at + j * p.dim_v] - (p.delta ? AT(E_LOST)[at + j * p.dim_v] : 0.0f);
        }
    }
    const uint last = (uint)slot[SLOT_HI] - 1;
    for (uint s = (uint)slot[SLOT_LO]; s <= last; s++) {
        const ulong row = (ulong)matrix * p.chunk + s;
        to[level_of(last, s) * step] += AT(WRITE)[row * p.dim_k + k] * AT(V)[row * p.dim_v + i];
    }
    if (ends_near(p, slot)) {
        const ulong before = (ulong)(matrix - p.batch_width * p.heads) * p.chunk;
        for (uint s = 0; s < p.chunk; s++) {
            to[level_of(p.chunk + last, s) * step] += AT(WRITE_NEAR)[((ulong)matrix * p.chunk + s) * p.dim_k + k] *
                                                      ws[p.at[REGION_V] + (before + s) * p.dim_v + i];
        }
    }
}
