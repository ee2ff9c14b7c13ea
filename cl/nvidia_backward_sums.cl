/* SPDX-License-Identifier: Apache-2.0 */
/* The scalar-gated backward pass, see nvidia_backward.cl: states and adjoints of blocks. */

/* ---- sums -------------------------------------------------------------------------------------------------------- */

#define SUM_ITEMS (128 * SUM_HEADS)
#define SUM_TILES (NV_K / 64) /* sixteens of K of a warp */

/* What a work-group sums: k^T v or q^T dO over `count` chunks. */
typedef struct sum_job {
    int is_state;
    uint level; /* above a chunk: chunks with this bit set */
    uint unit, first, count;
} sum_job;

/* How many chunks have bit j set? */
uint count_with_bit(uint chunks, uint j) {
    const uint rest = chunks & ((2u << j) - 1), width = 1u << j;
    return (chunks >> (j + 1) << j) + (rest > width ? rest - width : 0);
}

/* Jobs that read the same tokens are close to each other.  A count of 0: there is none of this number. */
sum_job find_job(uint chunks, uint id) {
    const uint turn = id / (2 + CHUNK_LEVELS), kind = id % (2 + CHUNK_LEVELS);
    sum_job job = {kind < 2, kind < 2 ? 0 : kind - 2, kind < 2 ? 2 * turn + kind : turn, 0, 0};
    const uint total = job.is_state ? chunks - 1 : count_with_bit(chunks, job.level);
    job.first = job.unit * UNIT;
    job.count = job.first < total ? min((uint)UNIT, total - job.first) : 0;
    return job;
}

/* The job's chunk number i: any, or the one with the bit set. */
uint job_chunk(sum_job job, uint i) {
    const uint x = job.first + i, j = job.level;
    return job.is_state ? x : (x >> j << (j + 1)) | (1u << j) | (x & ((1u << j) - 1));
}

/* 16 rows of K, 32 columns of V: an item's four eights of a row, from or to the state. */
uint sum_place(uint row, uint half_v) {
    return swizzled(row + warp_lane() / 4, 8, half_v * 4 + warp_lane() % 4);
}

void store_sum(__global uint4 *to, float4 sum[8 * SUM_TILES], uint warp) {
    const float unit = 1.0f / STATE_UNIT;
#pragma unroll
    for (uint m = 0; m < SUM_TILES; m++) {
#pragma unroll
        for (uint half_v = 0; half_v < 2; half_v++) {
            const float4 a = sum[8 * m + 4 * half_v] * unit, b = sum[8 * m + 4 * half_v + 1] * unit;
            const float4 c = sum[8 * m + 4 * half_v + 2] * unit, d = sum[8 * m + 4 * half_v + 3] * unit;
            const uint row = (warp * SUM_TILES + m) * 16;
            to[sum_place(row, half_v)] =
                transpose_quad((uint4)(pack(a.x, a.y), pack(b.x, b.y), pack(c.x, c.y), pack(d.x, d.y)));
            to[sum_place(row + 8, half_v)] =
                transpose_quad((uint4)(pack(a.z, a.w), pack(b.z, b.w), pack(c.z, c.w), pack(d.z, d.w)));
        }
    }
}

void add_sum(float4 sum[8 * SUM_TILES], const __global uint4 *from, float weight, uint warp) {
    weight *= STATE_UNIT;
#pragma unroll
    for (uint m = 0; m < SUM_TILES; m++) {
#pragma unroll
        for (uint half_v = 0; half_v < 2; half_v++) {
            const uint row = (warp * SUM_TILES + m) * 16;
            const uint4 upper = transpose_quad(from[sum_place(row, half_v)]);
            const uint4 lower = transpose_quad(from[sum_place(row + 8, half_v)]);
            sum[8 * m + 4 * half_v] += weight * (float4)(unpack(upper.x), unpack(lower.x));
            sum[8 * m + 4 * half_v + 1] += weight * (float4)(unpack(upper.y), unpack(lower.y));
            sum[8 * m + 4 * half_v + 2] += weight * (float4)(unpack(upper.z), unpack(lower.z));
            sum[8 * m + 4 * half_v + 3] += weight * (float4)(unpack(upper.w), unpack(lower.w));
        }
    }
}

void clear_sum(float4 sum[8 * SUM_TILES]) {
#pragma unroll
    for (uint i = 0; i < 8 * SUM_TILES; i++) {
        sum[i] = (float4)(0.0f);
    }
}

/* Adds (weights rows)^T values over a tile. */
void add_tile(float4 sum[8 * SUM_TILES], const __local uint4 *rows, const __local uint4 *values,
              const __local float *weights, uint warp) {
#pragma unroll
    for (uint step = 0; step < 4; step++) {
        const __local float *own = weights + 16 * step + 2 * (warp_lane() % 4);
        const uint early = pack(own[0], own[1]), late = pack(own[8], own[9]);
        uint4 a[SUM_TILES];
#pragma unroll
        for (uint m = 0; m < SUM_TILES; m++) {
            const uint4 x = load_a_transposed(rows, K_PIECES, 16 * step, (warp * SUM_TILES + m) * 2);
            a[m] = (uint4)(multiply_pairs(x.x, early), multiply_pairs(x.y, early), multiply_pairs(x.z, late),
                           multiply_pairs(x.w, late));
        }
#pragma unroll
        for (uint i = 0; i < 4; i++) {
            const uint4 b = load_b(values, 8, 16 * step, 2 * i);
#pragma unroll
            for (uint m = 0; m < SUM_TILES; m++) {
                mma(&sum[8 * m + 2 * i], a[m], b.x, b.y);
                mma(&sum[8 * m + 2 * i + 1], a[m], b.z, b.w);
            }
        }
    }
}

__kernel __attribute__((reqd_work_group_size(SUM_ITEMS, 1, 1))) void
nb_sums(const loglin_nvidia_gradients call, __global float *ws, ulong ws_offset, const __global ushort *v,
        ulong v_offset, const __global ushort *d_o, ulong d_o_offset, const __global weight *level_scales,
        ulong level_scales_offset, uint aligned) {
    __local uint4 rows_at[2][ROW_TILE];
    __local uint4 values_at[2][SUM_HEADS][COLUMN_TILE];
    __local float weights_at[2][SUM_HEADS][NB_TILE];
    const uint item = get_local_id(0), part = item / 128, warp = item % 128 / 32;
    const ulong id = get_group_id(0);
    /* All jobs of the same heads run together: their values are read from memory once. */
    const uint jobs = call.units * (2 + CHUNK_LEVELS), tile = id / jobs % TILES_V;
    const uint head_group = id / ((ulong)jobs * TILES_V) % (HEADS / SUM_HEADS);
    const uint b = id / ((ulong)jobs * TILES_V * (HEADS / SUM_HEADS));
    const sum_job job = find_job(call.chunks, id % jobs);
    if (job.count == 0) {
        return;
    }
    const uint head = head_group * SUM_HEADS + part;
    const ulong bh = (ulong)b * HEADS + head, matrix = bh * TILES_V + tile;
    const ulong bg = (ulong)b * GROUPS + head / GROUP_HEADS;
    const __global uint4 *rows = (const __global uint4 *)place(ws, ws_offset, job.is_state ? call.keys : call.queries) +
                                 bg * call.chunks * (2 * ROW_TILE);
    const __global ushort *values = (job.is_state ? v + v_offset : d_o + d_o_offset) +
                                    ((ulong)b * call.length * HEADS + head) * DIM_V;
    const __global float2 *since = (const __global float2 *)place(ws, ws_offset, call.since) + bh * (call.chunks + 1);
    __global uint4 *states = (__global uint4 *)place(ws, ws_offset, call.states) + matrix * call.chunks * STATE;
    __global uint4 *adjoints = (__global uint4 *)place(ws, ws_offset, call.adjoints) + matrix * call.chunks * STATE;

    /* An item finds the weight of one token, if any. */
    const uint weight_part = item / NB_TILE, weight_row = item % NB_TILE;
    const uint weight_head = head_group * SUM_HEADS + weight_part;
    const ulong weight_bh = (ulong)b * HEADS + weight_head;
    const __global float2 *gates = (const __global float2 *)place(ws, ws_offset, call.gates) +
                                   weight_bh * call.chunks * NB_CHUNK;
    const __global float2 *weight_since = (const __global float2 *)place(ws, ws_offset, call.since) +
                                          weight_bh * (call.chunks + 1);

    float4 sum[8 * SUM_TILES];
    for (uint step = 0; step <= 2 * job.count; step++) {
        /* Fetch the tile of this step, and work on the one before. */
        const uint n = job_chunk(job, min(step / 2, job.count - 1)), first = n * NB_CHUNK + step % 2 * NB_TILE;
        const uint now = step % 2;
        float row_scale = 0.0f;
        float2 own = (float2)(0.0f), early = own, late = own;
        wait_for_copies();
        barrier(CLK_LOCAL_MEM_FENCE);
        if (step < 2 * job.count) {
            fetch_tile(rows_at[now], rows + (2 * n + step % 2) * ROW_TILE, NB_TILE, K_PIECES, item, SUM_ITEMS);
            fetch_columns(values_at[now][part], values + (ulong)first * (HEADS * DIM_V), tile,
                          (int)call.length - (int)first, aligned, item % 128, 128);
            const uint t = first + weight_row;
            if (weight_part < SUM_HEADS && t < call.length) {
                if (job.is_state) {
                    row_scale = 1.0f;
                    early = gates[t];
                    late = gates[(ulong)n * NB_CHUNK + NB_CHUNK - 1];
                } else {
                    const ulong at = (((ulong)b * call.length + t) * HEADS + weight_head) * LEVELS + CHUNK_LEVEL;
                    row_scale = load_weight(level_scales, level_scales_offset + at + job.level);
                    own = gates[t];
                    early = weight_since[job.level <= UNIT_BITS ? n >> job.level << job.level : job_chunk(job, 0)];
                    late = weight_since[n];
                }
            }
        }
        if (step > 0) {
            const uint i = (step - 1) / 2, chunk = job_chunk(job, i), end = block_end(chunk, job.level);
            const int begins = job.is_state || i == 0 ||
                               (job.level <= UNIT_BITS && ((job.first + i) & ((1u << job.level) - 1)) == 0);
            if (step % 2 == 1 && begins) {
                clear_sum(sum);
                const uint ones = job.is_state ? popcount(i & ~(i + 1)) : 0;
                for (uint j = 0; j < ones; j++) {
                    const uint child = chunk - (1u << j);
                    add_sum(sum, states + (ulong)child * STATE, decay_between(since[chunk + 1], since[child + 1]),
                            warp);
                }
            }
            add_tile(sum, rows_at[1 - now], values_at[1 - now][part], weights_at[1 - now][part], warp);
            if (step % 2 == 0) {
                const int is_last = i + 1 == job.count;
                if (job.is_state) {
                    store_sum(states + (ulong)chunk * STATE, sum, warp);
                } else if (job.level > UNIT_BITS) {
                    if (is_last) {
                        store_sum((__global uint4 *)place(ws, ws_offset, call.parts) +
                                      ((matrix * CHUNK_LEVELS + job.level) * call.units + job.unit) * STATE,
                                  sum, warp);
                    }
                } else if (is_last || ((job.first + i + 1) & ((1u << job.level) - 1)) == 0) {
                    store_sum(adjoints + (ulong)end * STATE, sum, warp);
                }
            }
        }
        if (weight_part < SUM_HEADS) {
            const float scale = job.is_state ? 1.0f : call.scale;
            weights_at[now][weight_part][weight_row] = row_scale * scale * decay_between(late + own, early);
        }
    }
}

/* ---- tree -------------------------------------------------------------------------------------------------------- */

typedef struct state_piece {
    float4 low, high;
} state_piece;

state_piece unpack_piece(uint4 x) {
    const state_piece piece = {(float4)(unpack(x.x), unpack(x.y)), (float4)(unpack(x.z), unpack(x.w))};
    return piece;
}

uint4 pack_piece(state_piece x) {
    return (uint4)(pack(x.low.x, x.low.y), pack(x.low.z, x.low.w), pack(x.high.x, x.high.y), pack(x.high.z, x.high.w));
}

state_piece add_piece(state_piece to, float weight, uint4 x) {
    const state_piece piece = unpack_piece(x);
    to.low += weight * piece.low;
    to.high += weight * piece.high;
    return to;
}

/* A work-group has 32 uint4 of all blocks of a sequence, head and tile of V; a warp works on one block at a time. */
__kernel __attribute__((reqd_work_group_size(NB_ITEMS, 1, 1))) void
nb_tree(const loglin_nvidia_gradients call, __global float *ws, ulong ws_offset) {
    const uint lane = warp_lane(), warp = get_local_id(0) / 32, warps = NB_ITEMS / 32;
    const uint slice = get_group_id(0) % SLICES;
    const ulong matrix = get_group_id(0) / SLICES, bh = matrix / TILES_V;
    const ulong at = slice * 32 + lane;
    __global uint4 *states = (__global uint4 *)place(ws, ws_offset, call.states) + matrix * call.chunks * STATE + at;
    __global uint4 *adjoints =
        (__global uint4 *)place(ws, ws_offset, call.adjoints) + matrix * call.chunks * STATE + at;
    const __global uint4 *parts = (const __global uint4 *)place(ws, ws_offset, call.parts) +
                                  matrix * CHUNK_LEVELS * call.units * STATE + at;
    __global float *crossings = (__global float *)place(ws, ws_offset, call.crossings) +
                                ((bh * TILES_V + matrix % TILES_V) * SLICES + slice) * call.chunks;
    const __global float2 *since = (const __global float2 *)place(ws, ws_offset, call.since) + bh * (call.chunks + 1);
    const state_piece zero = {(float4)(0.0f), (float4)(0.0f)};

    if (get_group_id(0) % (SLICES * TILES_V) == 0) {
        __global float *kept = (__global float *)place(ws, ws_offset, call.kept) + bh * call.chunks * CHUNK_LEVELS;
        for (uint i = get_local_id(0); i < call.chunks * CHUNK_LEVELS; i += NB_ITEMS) {
            const uint n = i / CHUNK_LEVELS, j = i % CHUNK_LEVELS;
            if (((n >> j) & 1) != 0) {
                kept[i] = call.scale * decay_between(since[n], since[block_end(n, j) + 1]);
            }
        }
    }
    for (uint j = UNIT_BITS + 1; j < CHUNK_LEVELS; j++) {
        for (uint start = (1u << j) + (warp << (j + 1)); start < call.chunks; start += warps << (j + 1)) {
            const uint e = start - 1, units = (min(1u << j, call.chunks - start) + UNIT - 1) / UNIT;
            const uint first_unit = (start >> (j + 1) << j) / UNIT;
            state_piece sum = unpack_piece(states[(ulong)e * STATE]);
            for (uint i = UNIT_BITS; i < j; i++) {
                const uint child = e - (1u << i);
                sum = add_piece(sum, decay_between(since[e + 1], since[child + 1]), states[(ulong)child * STATE]);
            }
            states[(ulong)e * STATE] = pack_piece(sum);
            sum = zero;
            for (uint i = 0; i < units; i++) {
                sum = add_piece(sum, decay_between(since[start + i * UNIT], since[start]),
                                parts[((ulong)j * call.units + first_unit + i) * STATE]);
            }
            adjoints[(ulong)e * STATE] = pack_piece(sum);
        }
        barrier(CLK_GLOBAL_MEM_FENCE);
    }
    for (int j = CHUNK_LEVELS - 1; j >= 0; j--) {
        for (uint start = (1u << j) + (warp << (j + 1)); start < call.chunks; start += warps << (j + 1)) {
            const uint e = start - 1, parent = e + (1u << j);
            float crossing = 0.0f;
            if (parent + 1 < call.chunks) {
                const float kept = decay_between(since[parent + 1], since[start]);
                const uint4 above = adjoints[(ulong)parent * STATE];
                const state_piece state = unpack_piece(states[(ulong)e * STATE]), x = unpack_piece(above);
                crossing = kept * (dot(state.low, x.low) + dot(state.high, x.high)) * (STATE_UNIT * STATE_UNIT);
                adjoints[(ulong)e * STATE] =
                    pack_piece(add_piece(unpack_piece(adjoints[(ulong)e * STATE]), kept, above));
            }
            crossing = sum_warp(crossing);
            if (lane == 0) {
                crossings[e] = crossing;
            }
        }
        barrier(CLK_GLOBAL_MEM_FENCE);
    }
}
