/* SPDX-License-Identifier: Apache-2.0 */
/* The scalar-gated backward pass, see nvidia_backward.cl: dg, and the parts of dq and dk. */

/* ---- crossings, gates, reduce ------------------------------------------------------------------------------------ */

/* A work-group has a head: what crosses the start of each span goes to the first level's place in `suffixes`. */
__kernel __attribute__((reqd_work_group_size(NB_ITEMS, 1, 1))) void
nb_crossings(const loglin_nvidia_gradients call, __global float *ws, ulong ws_offset) {
    const uint item = get_local_id(0);
    const ulong bh = get_group_id(0);
    __global float *crossings = (__global float *)place(ws, ws_offset, call.crossings) +
                                bh * (TILES_V * SLICES) * call.chunks;
    __global float *suffixes = (__global float *)place(ws, ws_offset, call.suffixes) + bh * call.chunks * CHUNK_LEVELS;
    const __global float *level_dots = (const __global float *)place(ws, ws_offset, call.level_dots) +
                                       bh * call.chunks * CHUNK_LEVELS * NB_LEVEL_DOTS;
    for (uint e = NB_SPAN * item + NB_SPAN - 1; e + 1 < call.chunks; e += NB_SPAN * NB_ITEMS) {
        float sum = 0.0f;
        for (uint i = 0; i < TILES_V * SLICES; i++) {
            sum += crossings[i * call.chunks + e];
        }
        crossings[e] = sum;
    }
    for (uint i = item; i < call.chunks * CHUNK_LEVELS; i += NB_ITEMS) {
        if (i % SLOTS >= NB_SPAN_BITS && (i / SLOTS >> i % SLOTS & 1) != 0) {
            const __global float4 *parts = (const __global float4 *)&level_dots[i * NB_LEVEL_DOTS];
            const float4 sum = parts[0] + parts[1];
            suffixes[i] = (sum.x + sum.y) + (sum.z + sum.w);
        }
    }
    barrier(CLK_GLOBAL_MEM_FENCE);
    /* From the end of each block to its start: a warp has a level, an item one of 32 chunks, from the last ones on. */
    for (uint j = NB_SPAN_BITS + item / 32; j < CHUNK_LEVELS; j += NB_ITEMS / 32) {
        const uint width = min(1u << j, 32u);
        float behind = 0.0f;
        for (uint end = (call.chunks + 31) / 32 * 32; end > 0; end -= 32) {
            const uint n = end - 1 - warp_lane();
            const int wanted = n < call.chunks && ((n >> j) & 1) != 0;
            float sum = wanted ? suffixes[n * CHUNK_LEVELS + j] : 0.0f;
            for (uint distance = 1; distance < width; distance *= 2) {
                const float later = shuffle_up(sum, distance);
                sum += warp_lane() % width >= distance ? later : 0.0f;
            }
            sum += width == 32 && wanted ? behind : 0.0f;
            if (wanted) {
                suffixes[n * CHUNK_LEVELS + j] = sum;
            }
            behind = shuffle_from(sum, 31);
        }
    }
    barrier(CLK_GLOBAL_MEM_FENCE);
    for (uint n = NB_SPAN * item; n < call.chunks; n += NB_SPAN * NB_ITEMS) {
        float sum = 0.0f;
        for (uint j = NB_SPAN_BITS; j < CHUNK_LEVELS; j++) {
            if (((n >> j) & 1) != 0) {
                sum += crossings[block_end(n, j)] + suffixes[n * CHUNK_LEVELS + j];
            }
        }
        suffixes[n * CHUNK_LEVELS] = sum;
    }
}

#define GATE_HEADS (NB_ITEMS / 32)

/* A work-group has a span of some heads, a warp one of them; their gradients come through local memory, as g lies. */
__kernel __attribute__((reqd_work_group_size(NB_ITEMS, 1, 1))) void
nb_gates(const loglin_nvidia_gradients call, __global float *ws, ulong ws_offset, __global float *dg, ulong dg_offset) {
    __local float gradients[NB_CHUNK][GATE_HEADS + 1];
    const uint bundles = (HEADS + GATE_HEADS - 1) / GATE_HEADS, spans = (call.chunks + NB_SPAN - 1) / NB_SPAN;
    const uint first_head = get_group_id(0) % bundles * GATE_HEADS, b = get_group_id(0) / bundles / spans;
    const uint first = get_group_id(0) / bundles % spans * NB_SPAN, end = min(first + NB_SPAN, call.chunks);
    const uint lane = warp_lane(), warp = get_local_id(0) / 32, heads = min((uint)GATE_HEADS, HEADS - first_head);
    const ulong bh = (ulong)b * HEADS + first_head + min(warp, heads - 1), padded = (ulong)call.chunks * NB_CHUNK;
    const __global float *dots = (const __global float *)place(ws, ws_offset, call.dots) + bh * padded;
    const __global float *crossings = (const __global float *)place(ws, ws_offset, call.suffixes) +
                                      bh * call.chunks * CHUNK_LEVELS;
    /* An item has four tokens of a chunk, the first item the last ones. */
    const uint last = NB_CHUNK - 1 - 4 * lane;
    const ulong stride = (ulong)call.batch * HEADS * padded;
    float running[NB_SPAN][4];
#pragma unroll
    for (uint i = 0; i < NB_SPAN; i++) {
        float sum = 0.0f;
#pragma unroll
        for (uint e = 0; e < 4; e++) {
            const __global float *own = dots + (first + i) * NB_CHUNK + last - e;
            sum += first + i < end ? own[0] + own[stride] : 0.0f;
            running[i][e] = sum;
        }
    }
    float behind = end < call.chunks ? crossings[end * CHUNK_LEVELS] : 0.0f;
    /* What crosses the span's start is known as well; what the running sum differs from it by, rounding, is spread evenly. */
    float sums = 0.0f;
#pragma unroll
    for (uint i = 0; i < NB_SPAN; i++) {
        sums += sum_warp(running[i][3]);
    }
    const uint end_token = min(end * NB_CHUNK, call.length);
    const float error = behind + sums - (first > 0 ? crossings[first * CHUNK_LEVELS] : 0.0f);
    const float slope = error / (float)(end_token - first * NB_CHUNK);
    dg += dg_offset + (ulong)b * call.length * HEADS + first_head;
#pragma unroll
    for (int i = NB_SPAN - 1; i >= 0; i--) {
        const uint first_token = (first + i) * NB_CHUNK;
        float before = running[i][3];
        for (uint distance = 1; distance < 32; distance *= 2) {
            const float left = shuffle_up(before, distance);
            before += lane >= distance ? left : 0.0f;
        }
        const float total = shuffle_from(before, 31), start = behind + (before - running[i][3]);
        behind += total;
        barrier(CLK_LOCAL_MEM_FENCE);
#pragma unroll
        for (uint e = 0; e < 4; e++) {
            const int to_end = (int)end_token - (int)(first_token + last - e);
            gradients[last - e][warp] = start + running[i][e] - slope * (float)to_end;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        for (uint at = get_local_id(0); at < NB_CHUNK * GATE_HEADS; at += NB_ITEMS) {
            const uint t = at / GATE_HEADS, head = at % GATE_HEADS;
            if (head < heads && first_token + t < call.length) {
                /* The gate of a sequence's first token has nothing to decay. */
                dg[(ulong)(first_token + t) * HEADS + head] = first_token + t > 0 ? gradients[t][head] : 0.0f;
            }
        }
    }
}

/* A warp adds up the parts of a row of dq or dk. */
__kernel __attribute__((reqd_work_group_size(NB_ITEMS, 1, 1))) void
nb_reduce(const loglin_nvidia_gradients call, __global float *ws, ulong ws_offset, const __global ushort *q,
          ulong q_offset, const __global ushort *k, ulong k_offset, __global ushort *dq, ulong dq_offset,
          __global ushort *dk, ulong dk_offset) {
    const uint padded = call.chunks * NB_CHUNK;
    const ulong rows = (ulong)call.batch * GROUPS * padded, group_rows = NB_ITEMS / 32;
    const int is_key = get_group_id(0) * group_rows >= rows;
    const uint row = get_group_id(0) * group_rows + get_local_id(0) / 32 - (is_key ? rows : 0);
    const uint bg = row / padded, t = row - bg * padded;
    const ulong to = (((ulong)(bg / GROUPS) * call.length + t) * GROUPS + bg % GROUPS) * DIM_K;
    if (t >= call.length) {
        return;
    }
    const __global float *parts =
        (const __global float *)place(ws, ws_offset, is_key ? call.key_parts : call.query_parts) + (ulong)row * NV_K;
    const __global float *level_parts =
        (const __global float *)place(ws, ws_offset, call.row_parts) + (ulong)row * NV_K;
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
        values[i] = NORMALIZE != 0 && column < DIM_K ? unpack(x[column]).x : 0.0f;
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
