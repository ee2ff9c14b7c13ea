/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Level weights.  Inside a chunk, and for the strong partition between a chunk and the one before, every pair of tokens
 * has its own level; a state at the chunk's start has one level for all rows above near_levels, and moves with the row
 * below (only states that the caller brought can stand there).
 */

/* Index in level_scales of row r's weights. */
ulong weight_row(const loglin_panel p, long token, uint head) { return ((ulong)token * p.heads + head) * p.levels; }

/* The weight of row r for the state in `column`; 0 where the column is not read. */
float column_weight(const loglin_panel p, const __global int *slot, const __global weight *level_scales, ulong row,
                    uint r, uint column) {
    if (p.near && column == p.columns - 1) {
        return 0.0f;
    }
    int level = (int)(p.first_level + column);
    if (level <= (int)p.near_levels) {
        const uint time = (uint)slot[SLOT_TIME];
        level = level_advance(level, time, time + r - (uint)slot[SLOT_LO]);
    }
    return level < (int)p.levels ? load_weight(level_scales, row + (ulong)level) : 0.0f;
}

/*
 * Inside the chunk, region `to` = region `from` times its level weights; both are the elements of ws where they begin.
 * Over (column s, row r, slot and head).
 */
__kernel void chunk_weigh(const loglin_panel p, __global float *ws, const __global weight *level_scales, ulong offset,
                          ulong from, ulong to) {
    const uint s = get_global_id(0), r = get_global_id(1), matrix = get_global_id(2);
    if (s >= p.chunk) {
        return;
    }
    const long token = row_token(slot_record(p, ws, matrix / p.heads), r);
    const ulong at = ((ulong)matrix * p.chunk + r) * p.chunk + s;
    float x = 0.0f;
    if (token >= 0 && s <= r) {
        const int level = level_of(r, s);
        x = level < (int)p.levels
                ? ws[from + at] *
                      load_weight(level_scales, offset + weight_row(p, token, matrix % p.heads) + (ulong)level)
                : 0.0f;
    }
    ws[to + at] = x;
}

/* The same between the chunk and the one before it (strong). */
__kernel void chunk_weigh_near(const loglin_panel p, __global float *ws, const __global weight *level_scales,
                               ulong offset, ulong from, ulong to) {
    const uint s = get_global_id(0), r = get_global_id(1), matrix = get_global_id(2);
    if (s >= p.chunk) {
        return;
    }
    const __global int *slot = slot_record(p, ws, matrix / p.heads);
    const long token = row_token(slot, r);
    const ulong at = ((ulong)matrix * p.chunk + r) * p.chunk + s;
    float x = 0.0f;
    if (token >= 0 && reads_near(slot)) {
        const int level = level_of(p.chunk + r, s);
        x = level < (int)p.levels
                ? ws[from + at] *
                      load_weight(level_scales, offset + weight_row(p, token, matrix % p.heads) + (ulong)level)
                : 0.0f;
    }
    ws[to + at] = x;
}

/* o = O + the weighted sum of Y's columns.  Over (column of V, row, slot and head). */
__kernel void chunk_combine(const loglin_panel p, __global float *ws, const __global weight *level_scales,
                            ulong offset, __global storage *o, ulong o_offset) {
    const uint i = get_global_id(0), r = get_global_id(1), matrix = get_global_id(2);
    const __global int *slot = slot_record(p, ws, matrix / p.heads);
    const long token = row_token(slot, r);
    if (i >= p.dim_v || token < 0) {
        return;
    }
    const ulong row = (ulong)matrix * p.chunk + r, weights = offset + weight_row(p, token, matrix % p.heads);
    const __global float *y = AT(Y) + row * p.columns * p.dim_v;
    float sum = AT(O)[row * p.dim_v + i];
    for (uint j = 0; j < p.columns; j++) {
        sum = fma(column_weight(p, slot, level_scales, weights, r, j), y[j * p.dim_v + i], sum);
    }
    store(o, o_offset + ((ulong)token * p.heads + matrix % p.heads) * p.dim_v + i, sum);
}

/*
 * dlevel_scales: d(loss)/d(weight of a level) = sum over its keys of Z_rs (dO_r . v_s), plus Y_r . dO_r for a state.
 * D_MZ still holds dO V^T, D_MZ_NEAR the same with the chunk before.  One work-item a row.
 */
__kernel void chunk_level_gradients(const loglin_panel p, __global float *ws, __global weight *gradient,
                                    ulong offset) {
    const uint r = get_global_id(0), matrix = get_global_id(2);
    const __global int *slot = slot_record(p, ws, matrix / p.heads);
    const long token = row_token(slot, r);
    if (r >= p.chunk || token < 0) {
        return;
    }
    const ulong row = (ulong)matrix * p.chunk + r;
    float sums[LOGLIN_LEVELS];
    for (uint j = 0; j < LOGLIN_LEVELS; j++) {
        sums[j] = 0.0f;
    }
    const __global float *z = AT(Z) + row * p.chunk, *dz = AT(D_MZ) + row * p.chunk;
    for (uint s = 0; s <= r; s++) {
        sums[level_of(r, s)] += z[s] * dz[s];
    }
    if (p.near && reads_near(slot)) {
        const __global float *near = AT(Z_NEAR) + row * p.chunk, *dnear = AT(D_MZ_NEAR) + row * p.chunk;
        for (uint s = 0; s < p.chunk; s++) {
            sums[level_of(p.chunk + r, s)] += near[s] * dnear[s];
        }
    }
    const __global float *y = AT(Y) + row * p.columns * p.dim_v, *d_o = AT(D_O) + row * p.dim_v;
    const uint time = (uint)slot[SLOT_TIME];
    for (uint j = 0; j + p.near < p.columns; j++) {
        int level = (int)(p.first_level + j);
        if (level <= (int)p.near_levels) {
            level = level_advance(level, time, time + r - (uint)slot[SLOT_LO]);
        }
        float dot_product = 0.0f;
        for (uint i = 0; i < p.dim_v; i++) {
            dot_product = fma(y[j * p.dim_v + i], d_o[i], dot_product);
        }
        sums[min(level, LOGLIN_LEVELS - 1)] += dot_product;
    }
    const ulong to = offset + weight_row(p, token, matrix % p.heads);
    for (uint j = 0; j < p.levels; j++) {
        store_weight(gradient, to + j, sums[j]);
    }
}

/* Y = level weights times dO, a column for each state.  Over (column of V, row, slot and head). */
__kernel void chunk_spread(const loglin_panel p, __global float *ws, const __global weight *level_scales,
                           ulong offset) {
    const uint i = get_global_id(0), r = get_global_id(1), matrix = get_global_id(2);
    if (i >= p.dim_v) {
        return;
    }
    const __global int *slot = slot_record(p, ws, matrix / p.heads);
    const long token = row_token(slot, r);
    const ulong row = (ulong)matrix * p.chunk + r, weights = offset + weight_row(p, max(token, 0L), matrix % p.heads);
    __global float *y = AT(Y) + row * p.columns * p.dim_v;
    const float d_o = AT(D_O)[row * p.dim_v + i];
    for (uint j = 0; j < p.columns; j++) {
        y[j * p.dim_v + i] = token < 0 ? 0.0f : column_weight(p, slot, level_scales, weights, r, j) * d_o;
    }
}
