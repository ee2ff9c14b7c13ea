/* SPDX-License-Identifier: Apache-2.0 */
/* The scalar-gated backward pass, see nvidia_backward.cl: dg, and the parts of dq and dk. */

/* ---- crossings, gates, reduce ------------------------------------------------------------------------------------ */

/* A work-group has a head: what crosses the start of each chunk goes to the first of the parts of `crossings`. */
__kernel __attribute__((reqd_work_group_size(NB_ITEMS, 1, 1))) void
nb_crossings(const loglin_nvidia_gradients call, __global float *ws, ulong ws_offset) {
    const uint item = get_local_id(0);
    const ulong bh = get_group_id(0);
    __global float *crossings = (__global float *)place(ws, ws_offset, call.crossings) +
                                bh * (TILES_V * SLICES) * call.chunks;
    __global float *suffixes = (__global float *)place(ws, ws_offset, call.suffixes) + bh * call.chunks * CHUNK_LEVELS;
    const __global float *level_dots = (const __global float *)place(ws, ws_offset, call.level_dots) +
                                       bh * call.chunks * CHUNK_LEVELS * NB_LEVEL_DOTS;
    for (uint e = item; e + 1 < call.chunks; e += NB_ITEMS) {
        float sum = 0.0f;
        for (uint i = 0; i < TILES_V * SLICES; i++) {
            sum += crossings[i * call.chunks + e];
        }
        crossings[e] = sum;
    }
    for (uint i = item; i < call.chunks * CHUNK_LEVELS; i += NB_ITEMS) {
        if ((i / SLOTS >> i % SLOTS & 1) != 0) {
            const __global float4 *parts = (const __global float4 *)&level_dots[i * NB_LEVEL_DOTS];
            const float4 sum = parts[0] + parts[1];
            suffixes[i] = (sum.x + sum.y) + (sum.z + sum.w);
        }
    }
    barrier(CLK_GLOBAL_MEM_FENCE);
    /* Block by block: an item has all chunks of one, from the last to the first. */
    for (uint start = item; start < call.chunks; start += NB_ITEMS) {
        const uint j = start > 0 ? 31 - clz(start & (0 - start)) : 0;
        float sum = 0.0f;
        for (uint n = min(start + (1u << j), call.chunks); start > 0 && n-- > start;) {
            sum += suffixes[n * CHUNK_LEVELS + j];
            suffixes[n * CHUNK_LEVELS + j] = sum;
        }
    }
    barrier(CLK_GLOBAL_MEM_FENCE);
    for (uint n = item; n < call.chunks; n += NB_ITEMS) {
        float sum = 0.0f;
        for (uint j = 0; j < CHUNK_LEVELS; j++) {
            if (((n >> j) & 1) != 0) {
                sum += crossings[block_end(n, j)] + suffixes[n * CHUNK_LEVELS + j];
            }
        }
        suffixes[n * CHUNK_LEVELS] = sum;
    }
}

/* A warp has a chunk of a head. */
__kernel __attribute__((reqd_work_group_size(32, 1, 1))) void
nb_gates(const loglin_nvidia_gradients call, __global float *ws, ulong ws_offset, __global float *dg, ulong dg_offset) {
    const uint lane = warp_lane(), n = get_group_id(0) % call.chunks;
    const ulong bh = get_group_id(0) / call.chunks, padded = (ulong)call.chunks * NB_CHUNK;
    const ulong stride = (ulong)call.batch * HEADS * padded;
    const __global float *dots = (const __global float *)place(ws, ws_offset, call.dots) + bh * padded + n * NB_CHUNK;
    const __global float *crossings = (const __global float *)place(ws, ws_offset, call.suffixes) +
                                      bh * call.chunks * CHUNK_LEVELS;
    /* An item has four tokens, the first item the last ones. */
    const uint last = NB_CHUNK - 1 - 4 * lane;
    float running[4], sum = 0.0f;
#pragma unroll
    for (uint i = 0; i < 4; i++) {
        const uint t = last - i;
        sum += dots[t] + dots[stride + t];
        running[i] = sum;
    }
    float before = sum;
    for (uint distance = 1; distance < 32; distance *= 2) {
        const float left = shuffle_up(before, distance);
        before += lane >= distance ? left : 0.0f;
    }
    before -= sum;
    const float behind = n + 1 < call.chunks ? crossings[(n + 1) * CHUNK_LEVELS] : 0.0f;
    dg += dg_offset + (bh / HEADS * call.length) * HEADS + bh % HEADS;
#pragma unroll
    for (uint i = 0; i < 4; i++) {
        const uint t = n * NB_CHUNK + last - i;
        if (t < call.length) {
            dg[(ulong)t * HEADS] = behind + before + running[i];
        }
    }
}

/* A warp adds up the parts of a row of dq or dk. */
__kernel __attribute__((reqd_work_group_size(NB_ITEMS, 1, 1))) void
nb_reduce(const loglin_nvidia_gradients call, __global float *ws, ulong ws_offset, const __global ushort *q,
          ulong q_offset, const __global ushort *k, ulong k_offset, __global ushort *dq, ulong dq_offset,
          __global ushort *dk, ulong dk_offset) {
    const ulong padded = (ulong)call.chunks * NB_CHUNK, rows = (ulong)call.batch * GROUPS * padded;
    const ulong warp = get_group_id(0) * (NB_ITEMS / 32) + get_local_id(0) / 32, row = warp % rows;
    const int is_key = warp >= rows;
    const uint t = row % padded;
    const ulong bg = row / padded, to = ((bg / GROUPS * call.length + t) * GROUPS + bg % GROUPS) * DIM_K;
    if (t >= call.length) {
        return;
    }
    const __global float *parts =
        (const __global float *)place(ws, ws_offset, is_key ? call.key_parts : call.query_parts) + row * NV_K;
    const __global float *level_parts =
        (const __global float *)place(ws, ws_offset, call.row_parts) + row * NV_K;
    const __global ushort *x = is_key ? k + k_offset + to : q + q_offset + to;
    __global ushort *gradients = is_key ? dk + dk_offset + to : dq + dq_offset + to;
    float sums[NV_K / 32], values[NV_K / 32], square = 0.0f, product = 0.0f;
#pragma unroll
    for (uint i = 0; i < NV_K / 32; i++) {
        const uint column = i * 32 + warp_lane();
        sums[i] = 0.0f;
        for (uint j = 0; j < HEAD_BLOCKS; j++) {
            sums[i] += parts[j * (rows * NV_K) + column];
        }
        for (uint j = 0; !is_key && j < ROW_BLOCKS; j++) {
            sums[i] += level_parts[j * (rows * NV_K) + column];
        }
        values[i] = NORMALIZE && column < DIM_K ? unpack(x[column]).x : 0.0f;
        square = fma(values[i], values[i], square);
        product = fma(values[i], sums[i], product);
    }
    const float norm = NORMALIZE ? 1.0f / sqrt(sum_warp(square) + 1e-6f) : 1.0f;
    const float along = NORMALIZE ? sum_warp(product) * norm * norm : 0.0f;
#pragma unroll
    for (uint i = 0; i < NV_K / 32; i++) {
        const uint column = i * 32 + warp_lane();
        if (column < DIM_K) {
            gradients[column] = (ushort)pack(norm * (sums[i] - along * values[i]), 0.0f);
        }
    }
}
