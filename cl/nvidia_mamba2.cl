/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The scalar-gated forward pass on NVIDIA's matrix units, weak partition.
 *
 * A sequence is cut into chunks of 64 tokens and segments of 8 chunks.
 *     prepare   q, k and scale * q k^T of a chunk as the tiles that the matrix units take: once for all heads of a group
 *     segments  the gates' running sums, and the state of each segment at its end
 *     tree      the states of blocks of 2^j segments, Fenwick's way: node e becomes the block of 2^j segments that ends
 *               with segment e, where j is the number of trailing ones of e
 *     walk      a work-group goes through a segment.  It reads the blocks of segments before it from the nodes, and keeps
 *               the blocks of chunks inside it in local memory.  A level's weight and decay are multiplied into q, so that
 *               all levels add up in one sum; inside the chunk they are multiplied into q k^T
 * States stand decayed to their block's end; from there on the decay is a scalar apart.
 *
 * Given: NV_K (dim_k rounded up to a multiple of 32), DIM_K, DIM_V, HEADS, GROUPS, LEVELS (columns of level_scales), USED
 * (those that are read), NORMALIZE, STORAGE, WEIGHT_STORAGE, Q_STEPS, U_STEPS, NV_CACHED (blocks of segments that a
 * walking work-group keeps in local memory, the smallest ones first; it reads the others again for every chunk).
 */

#define K_STEPS (NV_K / 16)              /* products of 16 columns of K */
#define RECORD ((8 * K_STEPS + 10) * 32) /* uint4 of a chunk's tiles: q, k, q k^T */
#define K_TILES (4 * K_STEPS * 32)
#define P_TILES (8 * K_STEPS * 32)
#define STATE (4 * K_STEPS * 32)         /* uint4 of a state */
#define TILES_V ((DIM_V + NV_TILE_V - 1) / NV_TILE_V)
#define Q_BLOCKS (K_STEPS / Q_STEPS)     /* q is read in blocks of Q_STEPS */
#define U_BLOCKS (K_STEPS / 2 / U_STEPS) /* a warp's half of a state is made in blocks of U_STEPS */
#define SCALES_ROW (USED | 1)
#define FIRST_LEVEL 7                    /* of the chunk before */

/* States are stored divided by this, for half's range. */
#define STATE_UNIT (STORAGE == 1 ? 64.0f : 1.0f)

float decay(float x) { return native_exp2(x * 1.44269504f); }

__global char *place(__global float *ws, ulong offset, ulong at) {
    return (__global char *)(((ulong)(ws + offset) + 15) & ~(ulong)15) + at;
}

/* ---- prepare ----------------------------------------------------------------------------------------------------- */

/* Two elements, raw; a float each where they must be normalised. */
uint load_pair(const __global ushort *x, ulong first, ulong second, int valid, float first_norm, float second_norm) {
    if (!valid) {
        return 0;
    }
    const uint raw = (uint)x[first] | ((uint)x[second] << 16);
#if NORMALIZE
    const float2 pair = unpack(raw);
    return pack(pair.x * first_norm, pair.y * second_norm);
#else
    return raw;
#endif
}

/* The group's rows of q or k in one chunk. */
typedef struct chunk_rows {
    const __global ushort *x; /* row 0 */
    int count;                /* of tokens there are */
    const __local float *norms;
} chunk_rows;

uint row_pair(chunk_rows rows, int row, int column) {
    const ulong at = (ulong)row * (GROUPS * DIM_K) + column;
    return load_pair(rows.x, at, at + 1, row < rows.count && column < DIM_K, rows.norms[row], rows.norms[row]);
}

uint column_pair(chunk_rows rows, int row, int column) {
    const ulong at = (ulong)row * (GROUPS * DIM_K) + column;
    const uint first = load_pair(rows.x, at, at, row < rows.count && column < DIM_K, rows.norms[row], 0.0f);
    const uint second = load_pair(rows.x, at + GROUPS * DIM_K, at, row + 1 < rows.count && column < DIM_K,
                                  rows.norms[row + 1], 0.0f);
    return (first & 0xffffu) | (second << 16);
}

void find_norm(chunk_rows rows, int row, __local float *norm) {
    float sum = 0.0f;
    for (int i = 0; row < rows.count && i < DIM_K; i++) {
        const float x = unpack(rows.x[(ulong)row * (GROUPS * DIM_K) + i]).x;
        sum = fma(x, x, sum);
    }
    *norm = 1.0f / sqrt(sum + 1e-6f);
}

__kernel __attribute__((reqd_work_group_size(NV_ITEMS, 1, 1))) void
nvidia_prepare(const loglin_nvidia_call call, __global float *ws, ulong ws_offset, const __global ushort *q,
               ulong q_offset, const __global ushort *k, ulong k_offset) {
    __local float norms[2][NV_CHUNK];
    const uint lane = warp_lane(), warp = get_local_id(0) / 32, r = lane / 4, p = lane % 4;
    const ulong record = get_group_id(0);
    const uint chunk = record % call.chunks, group = record / call.chunks % GROUPS, b = record / call.chunks / GROUPS;
    const ulong row = ((ulong)b * call.length + (ulong)chunk * NV_CHUNK) * GROUPS + group;
    const int count = min((int)(call.length - chunk * NV_CHUNK), NV_CHUNK);
    const chunk_rows queries = {q + q_offset + row * DIM_K, count, norms[0]};
    const chunk_rows keys = {k + k_offset + row * DIM_K, count, norms[1]};
    if (NORMALIZE) {
        const int is_key = get_local_id(0) >= NV_CHUNK, token = get_local_id(0) % NV_CHUNK;
        find_norm(is_key ? keys : queries, token, &norms[is_key][token]);
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    __global uint4 *tiles = (__global uint4 *)place(ws, ws_offset, call.products) + record * RECORD;
    float4 product[4][2];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        product[j][0] = product[j][1] = (float4)(0.0f);
    }
    const int t = warp * 16 + r;
    for (int step = 0; step < K_STEPS; step++) {
        const int column = step * 16 + 2 * p;
        const uint4 a = (uint4)(row_pair(queries, t, column), row_pair(queries, t + 8, column),
                                row_pair(queries, t, column + 8), row_pair(queries, t + 8, column + 8));
        tiles[(warp * K_STEPS + step) * 32 + lane] = a;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (j <= (int)warp) {
                const int s = 16 * j + r;
                mma(&product[j][0], a, row_pair(keys, s, column), row_pair(keys, s, column + 8));
                mma(&product[j][1], a, row_pair(keys, s + 8, column), row_pair(keys, s + 8, column + 8));
            }
        }
        const int token = 16 * warp + 2 * p, key_column = step * 16 + r;
        tiles[K_TILES + (warp * K_STEPS + step) * 32 + lane] =
            (uint4)(column_pair(keys, token, key_column), column_pair(keys, token + 8, key_column),
                    column_pair(keys, token, key_column + 8), column_pair(keys, token + 8, key_column + 8));
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        if (j <= (int)warp) {
            const float4 left = product[j][0] * call.scale, right = product[j][1] * call.scale;
            tiles[P_TILES + (warp * (warp + 1) / 2 + j) * 32 + lane] =
                (uint4)(pack(left.x, left.y), pack(left.z, left.w), pack(right.x, right.y), pack(right.z, right.w));
        }
    }
}

/* ---- What segments and walk share -------------------------------------------------------------------------------- */

/*
 * Rows of v to local memory: a row's eight pieces of 8 columns, piece c at place c ^ row % 8 so that rows and columns of
 * 8 x 8 matrices lie in different banks.  Missing rows and columns become zeros.
 */
void fetch_values(__local uint4 *to, const __global ushort *v, uint tile, int rows, int aligned) {
#pragma unroll
    for (int i = 0; i < NV_CHUNK * 8 / NV_ITEMS; i++) {
        const int at = i * NV_ITEMS + (int)get_local_id(0), row = at / 8, piece = at % 8;
        const int wanted = row < rows && (int)tile * NV_TILE_V + piece * 8 < DIM_V;
        const __global ushort *from = v + (wanted ? (ulong)row * (HEADS * DIM_V) + piece * 8 : 0);
        __local uint4 *place_of_piece = &to[row * 8 + (piece ^ (row & 7))];
        if (aligned) {
            copy_16(place_of_piece, from, wanted);
        } else {
            uint4 x = (uint4)(0);
            if (wanted) {
                x = (uint4)(from[0] | (uint)from[1] << 16, from[2] | (uint)from[3] << 16, from[4] | (uint)from[5] << 16,
                            from[6] | (uint)from[7] << 16);
            }
            *place_of_piece = x;
        }
    }
}

/* Starts copying tiles to local memory; `count` is a multiple of NV_ITEMS. */
void fetch_tiles(__local uint4 *to, const __global uint4 *from, int count) {
    for (int i = get_local_id(0); i < count; i += NV_ITEMS) {
        copy_16(&to[i], &from[i], 1);
    }
}

/* 32 columns of the chunk's values: [i][j] has B of tokens 16 i.. for columns 16 j.., 16 j + 8.., two registers each. */
void load_values(uint4 values[4][2], const __local uint4 *from, uint half_v) {
    const uint matrix = warp_lane() / 8, row = (matrix & 1) * 8 + (warp_lane() & 7);
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const uint piece = half_v * 4 + 2 * j + matrix / 2;
            values[i][j] = load_transposed(&from[(16 * i + row) * 8 + (piece ^ (row & 7))]);
        }
    }
}

/* Multiplies the values by their decay to the chunk's end. */
void decay_values(uint4 values[4][2], const __local float *gates) {
    const uint p = warp_lane() % 4;
    const float end = gates[NV_CHUNK - 1], end_rest = gates[2 * NV_CHUNK - 1];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float weight[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const uint s = 16 * i + 2 * p + (e & 1) + (e & 2) * 4;
            weight[e] = decay((end - gates[s]) + (end_rest - gates[NV_CHUNK + s]));
        }
        const uint early = pack(weight[0], weight[1]), late = pack(weight[2], weight[3]);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const uint4 x = values[i][j];
            values[i][j] = (uint4)(multiply_pairs(x.x, early), multiply_pairs(x.y, late), multiply_pairs(x.z, early),
                                   multiply_pairs(x.w, late));
        }
    }
}

/* Adds V^T K: 32 columns of V times 16 columns of K, tokens 16 i and on. */
void add_state(float4 state[2][2 * U_STEPS], const uint4 values[2], uint4 key, int step) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const uint4 a = values[j].xzyw;
        mma(&state[j][2 * step], a, key.x, key.y);
        mma(&state[j][2 * step + 1], a, key.z, key.w);
    }
}

/* A state's uint4 of 32 columns of V, a step of K, 16 columns of V: B of both eights of columns. */
uint state_index(uint half_v, uint step, uint j) { return ((half_v * K_STEPS + step) * 2 + j) * 32 + warp_lane(); }

uint4 pack_state(float4 left, float4 right) {
    left *= 1.0f / STATE_UNIT;
    right *= 1.0f / STATE_UNIT;
    return (uint4)(pack(left.x, left.y), pack(right.x, right.y), pack(left.z, left.w), pack(right.z, right.w));
}

void add_packed_state(float4 *left, float4 *right, uint4 x, float weight) {
    const float2 a = unpack(x.x), b = unpack(x.y), c = unpack(x.z), d = unpack(x.w);
    *left += weight * (float4)(a, c);
    *right += weight * (float4)(b, d);
}

float chunk_sum(const __local float *gates) { return gates[NV_CHUNK - 1] + gates[2 * NV_CHUNK - 1]; }

/* ---- segments ---------------------------------------------------------------------------------------------------- */

/* A warp makes the running sums of a chunk's gates, as sums and what their rounding has lost. */
void scan_gates(__local float *gates, const __global float *g, ulong first, int rows) {
    const int lane = (int)warp_lane();
    const float even = g && 2 * lane < rows ? g[first + (ulong)(2 * lane) * HEADS] : 0.0f;
    const float odd = g && 2 * lane + 1 < rows ? g[first + (ulong)(2 * lane + 1) * HEADS] : 0.0f;
    float sum = even + odd, seen = sum - even;
    float rest = (even - (sum - seen)) + (odd - seen);
    for (uint distance = 1; distance < 32; distance *= 2) {
        const float left = shuffle_up(sum, distance), left_rest = shuffle_up(rest, distance);
        if (lane >= (int)distance) {
            const float next = left + sum;
            seen = next - left;
            rest = rest + left_rest + ((left - (next - seen)) + (sum - seen));
            sum = next;
        }
    }
    const float before = shuffle_up(sum, 1), before_rest = shuffle_up(rest, 1);
    const float start = lane > 0 ? before : 0.0f, next = start + even;
    seen = next - start;
    gates[2 * lane] = next;
    gates[NV_CHUNK + 2 * lane] = (lane > 0 ? before_rest : 0.0f) + ((start - (next - seen)) + (even - seen));
    gates[2 * lane + 1] = sum;
    gates[NV_CHUNK + 2 * lane + 1] = rest;
}

__kernel __attribute__((reqd_work_group_size(NV_ITEMS, 1, 1))) void
nvidia_segments(const loglin_nvidia_call call, __global float *ws, ulong ws_offset, const __global ushort *v,
                ulong v_offset, const __global float *g, ulong g_offset, uint aligned) {
    __local uint4 values_at[2][NV_CHUNK * 8];
    __local uint4 keys_at[2][4 * K_STEPS * 32];
    __local float gates[NV_SEGMENT][2 * NV_CHUNK];
    const uint item = get_local_id(0), warp = item / 32, half_v = warp % 2, half_k = warp / 2;
    const ulong id = get_group_id(0);
    const uint head = id % HEADS, tile = id / HEADS % TILES_V, b = id / (HEADS * TILES_V) % call.batch;
    const uint segment = id / (HEADS * TILES_V) / call.batch;
    const ulong bh = (ulong)b * HEADS + head;
    const uint first_chunk = segment * NV_SEGMENT, count = min((uint)NV_SEGMENT, call.chunks - first_chunk);
    const ulong first_token = (ulong)b * call.length + (ulong)first_chunk * NV_CHUNK;

    /* All chunks are full where another segment follows. */
    const int has_next = segment + 1 < call.segments;
    const __global ushort *values_from = v + v_offset + (first_token * HEADS + head) * DIM_V + tile * NV_TILE_V;
    const __global uint4 *keys = (const __global uint4 *)place(ws, ws_offset, call.products) + K_TILES +
                                 (((ulong)b * GROUPS + head / (HEADS / GROUPS)) * call.chunks + first_chunk) * RECORD;
    if (has_next) {
        fetch_values(values_at[0], values_from, tile, NV_CHUNK, aligned);
        fetch_tiles(keys_at[0], keys, 4 * K_STEPS * 32);
    }
    for (uint i = warp; i < count; i += NV_ITEMS / 32) {
        scan_gates(gates[i], g, g_offset + (first_token + i * NV_CHUNK) * HEADS + head,
                   (int)(call.length - (first_chunk + i) * NV_CHUNK));
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    float segment_sum = 0.0f;
    for (uint i = 0; i < count; i++) {
        segment_sum += chunk_sum(gates[i]);
    }
    if (tile == 0) {
        __global float *to =
            (__global float *)place(ws, ws_offset, call.gates) + (bh * call.chunks + first_chunk) * (2 * NV_CHUNK);
        for (uint i = 0; i < count; i++) {
            to[i * 2 * NV_CHUNK + item] = gates[i][item];
        }
        if (item == 0) {
            ((__global float *)place(ws, ws_offset, call.sums))[bh * call.segments + segment] = segment_sum;
        }
    }
    if (!has_next) {
        return;
    }
    __global uint4 *node = (__global uint4 *)place(ws, ws_offset, call.nodes) +
                           ((bh * TILES_V + tile) * call.segments + segment) * STATE;
    for (uint block = 0; block < U_BLOCKS; block++) {
        const uint first_step = half_k * (K_STEPS / 2) + block * U_STEPS;
        float4 state[2][2 * U_STEPS];
#pragma unroll
        for (int i = 0; i < 2 * U_STEPS; i++) {
            state[0][i] = state[1][i] = (float4)(0.0f);
        }
        if (block > 0) {
            barrier(CLK_LOCAL_MEM_FENCE);
            fetch_values(values_at[0], values_from, tile, NV_CHUNK, aligned);
            fetch_tiles(keys_at[0], keys, 4 * K_STEPS * 32);
        }
        for (uint i = 0; i < NV_SEGMENT; i++) {
            wait_for_copies();
            barrier(CLK_LOCAL_MEM_FENCE);
            if (i + 1 < NV_SEGMENT) {
                fetch_values(values_at[(i + 1) % 2], values_from + (ulong)(i + 1) * (NV_CHUNK * HEADS * DIM_V), tile,
                             NV_CHUNK, aligned);
                fetch_tiles(keys_at[(i + 1) % 2], keys + (ulong)(i + 1) * RECORD, 4 * K_STEPS * 32);
            }
            uint4 values[4][2];
            load_values(values, values_at[i % 2], half_v);
            decay_values(values, gates[i]);
            const float kept = decay(chunk_sum(gates[i]));
#pragma unroll
            for (int j = 0; j < 2 * U_STEPS; j++) {
                state[0][j] *= kept;
                state[1][j] *= kept;
            }
#pragma unroll
            for (int t = 0; t < 4; t++) {
#pragma unroll
                for (int step = 0; step < U_STEPS; step++) {
                    add_state(state, values[t], keys_at[i % 2][(t * K_STEPS + first_step + step) * 32 + warp_lane()],
                              step);
                }
            }
        }
#pragma unroll
        for (int step = 0; step < U_STEPS; step++) {
            node[state_index(half_v, first_step + step, 0)] = pack_state(state[0][2 * step], state[0][2 * step + 1]);
            node[state_index(half_v, first_step + step, 1)] = pack_state(state[1][2 * step], state[1][2 * step + 1]);
        }
    }
}

/* ---- tree -------------------------------------------------------------------------------------------------------- */

/* A work-group makes 32 uint4 of all nodes of a sequence, head and tile of V; a warp works on one node at a time. */
__kernel __attribute__((reqd_work_group_size(NV_ITEMS, 1, 1))) void
nvidia_tree(const loglin_nvidia_call call, __global float *ws, ulong ws_offset, __local float *blocks) {
    const uint lane = warp_lane(), warp = get_local_id(0) / 32;
    const uint slice = get_group_id(0) % (STATE / 32);
    const ulong matrix = get_group_id(0) / (STATE / 32), bh = matrix / TILES_V;
    __global uint4 *nodes = (__global uint4 *)place(ws, ws_offset, call.nodes) + matrix * call.segments * STATE +
                            slice * 32 + lane;
    const __global float *sums = (const __global float *)place(ws, ws_offset, call.sums) + bh * call.segments;
    for (uint e = get_local_id(0); e < call.segments; e += NV_ITEMS) {
        blocks[e] = sums[e];
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    /* The last segment is the end of no block that is read. */
    for (uint bits = 1; (1u << bits) < call.segments; bits++) {
        for (uint e = (1u << bits) - 1 + (warp << (bits + 1)); e + 1 < call.segments;
             e += (NV_ITEMS / 32) << (bits + 1)) {
            float4 left = (float4)(0.0f), right = (float4)(0.0f);
            add_packed_state(&left, &right, nodes[(ulong)e * STATE], 1.0f);
            float since = sums[e];
            for (uint j = 0; j < bits; j++) {
                const uint child = e - (1u << j);
                add_packed_state(&left, &right, nodes[(ulong)child * STATE], decay(since));
                since += blocks[child];
            }
            nodes[(ulong)e * STATE] = pack_state(left * STATE_UNIT, right * STATE_UNIT);
            if (lane == 0) {
                blocks[e] = since;
            }
        }
        barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
    }
    if (slice == 0 && matrix % TILES_V == 0) {
        __global float *to = (__global float *)place(ws, ws_offset, call.blocks) + bh * call.segments;
        for (uint e = get_local_id(0); e < call.segments; e += NV_ITEMS) {
            to[e] = blocks[e];
        }
    }
}

/* ---- walk -------------------------------------------------------------------------------------------------------- */

/* Level weights of a chunk's rows, and its gates' sums. */
void fetch_rows(__local float *scales, __local float *gates, const __global weight *level_scales,
                const __global float *gate_sums, int rows) {
#pragma unroll
    for (int turn = 0; turn < (NV_CHUNK * USED + NV_ITEMS - 1) / NV_ITEMS; turn++) {
        const int i = turn * NV_ITEMS + (int)get_local_id(0), row = i / USED, level = i % USED;
        if (row < min(rows, NV_CHUNK)) {
            const __global weight *from = level_scales + (ulong)row * (HEADS * LEVELS) + level;
#if WEIGHT_STORAGE == 0
            copy_4(&scales[row * SCALES_ROW + level], from);
#else
            scales[row * SCALES_ROW + level] = load_weight(from, 0);
#endif
        }
    }
    copy_4(&gates[get_local_id(0)], gate_sums + get_local_id(0));
}

/* The rows of a warp: two tiles of 16. */
typedef struct row_tiles {
    uint tile[2];   /* which 16 rows */
    float start[4]; /* decay from the chunk's start, times scale, of rows r, r+8 of the first tile, then the second */
} row_tiles;

/* Adds (weights q) S for 16 columns of K. */
void add_level(float4 sum[2][4], const uint4 q[2], const uint weights[4], uint4 left, uint4 right) {
#pragma unroll
    for (int m = 0; m < 2; m++) {
        const uint4 a = scale_rows(q[m], weights[2 * m], weights[2 * m + 1]);
        mma(&sum[m][0], a, left.x, left.y);
        mma(&sum[m][1], a, left.z, left.w);
        mma(&sum[m][2], a, right.x, right.y);
        mma(&sum[m][3], a, right.z, right.w);
    }
}

/* Pairs of the weights of a level whose block ends `since` (a sum of gates) before the chunk. */
void level_weights(uint weights[4], row_tiles rows, const __local float *scales, int level, float since) {
    const float kept = decay(since) * STATE_UNIT;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint row = rows.tile[i / 2] * 16 + (i % 2) * 8 + warp_lane() / 4;
        const float x = scales[row * SCALES_ROW + level] * rows.start[i] * kept;
        weights[i] = pack(x, x);
    }
}

/* Tile (i, j) of q k^T times decay and level weights: A of the product with v. */
uint4 weigh_products(uint4 product, uint i, uint j, const __local float *scales, const __local float *gates) {
    const uint r = warp_lane() / 4, p = warp_lane() % 4, t = 16 * i + r, s = 16 * j + 2 * p;
    const __local float *rests = gates + NV_CHUNK;
    const float2 a = unpack(product.x), b = unpack(product.y), c = unpack(product.z), d = unpack(product.w);
    if (i == j) {
        const float early = gates[t], early_rest = rests[t], late = gates[t + 8], late_rest = rests[t + 8];
        const float sum[4] = {gates[s], gates[s + 1], gates[s + 8], gates[s + 9]};
        const float rest[4] = {rests[s], rests[s + 1], rests[s + 8], rests[s + 9]};
        const int level[2] = {bit_length(r ^ (2 * p)), bit_length(r ^ (2 * p + 1))};
        const int is_past[2] = {2 * p <= r, 2 * p + 1 <= r};
        float weight[6];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            weight[e] = scales[t * SCALES_ROW + level[e]] * decay((early - sum[e]) + (early_rest - rest[e]));
            weight[2 + e] = scales[(t + 8) * SCALES_ROW + 4] * decay((late - sum[e]) + (late_rest - rest[e]));
            weight[4 + e] =
                scales[(t + 8) * SCALES_ROW + level[e]] * decay((late - sum[2 + e]) + (late_rest - rest[2 + e]));
        }
        return (uint4)(pack(is_past[0] ? a.x * weight[0] : 0.0f, is_past[1] ? a.y * weight[1] : 0.0f),
                       pack(b.x * weight[2], b.y * weight[3]), 0u,
                       pack(is_past[0] ? d.x * weight[4] : 0.0f, is_past[1] ? d.y * weight[5] : 0.0f));
    }
    /* One level for the whole tile: a factor for each row and column, from the token before the rows. */
    const int level = (i ^ j) == 1 ? 5 : 6;
    const float sum = gates[16 * i - 1], rest = rests[16 * i - 1];
    const float early = scales[t * SCALES_ROW + level] * decay((gates[t] - sum) + (rests[t] - rest));
    const float late = scales[(t + 8) * SCALES_ROW + level] * decay((gates[t + 8] - sum) + (rests[t + 8] - rest));
    float column[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const uint at = s + (e & 1) + (e & 2) * 4;
        column[e] = decay((sum - gates[at]) + (rest - rests[at]));
    }
    return (uint4)(pack(a.x * (early * column[0]), a.y * (early * column[1])),
                   pack(b.x * (late * column[0]), b.y * (late * column[1])),
                   pack(c.x * (early * column[2]), c.y * (early * column[3])),
                   pack(d.x * (late * column[2]), d.y * (late * column[3])));
}

/* Rows r and r+8 of a tile of o: an item writes 8 columns of a row. */
void store_outputs(__global ushort *o, const float4 sum[4], int row, int rows, int has_columns, int aligned) {
#pragma unroll
    for (int lower = 0; lower < 2; lower++) {
        const uint4 x = transpose_quad(lower ? (uint4)(pack(sum[0].z, sum[0].w), pack(sum[1].z, sum[1].w),
                                                      pack(sum[2].z, sum[2].w), pack(sum[3].z, sum[3].w))
                                            : (uint4)(pack(sum[0].x, sum[0].y), pack(sum[1].x, sum[1].y),
                                                      pack(sum[2].x, sum[2].y), pack(sum[3].x, sum[3].y)));
        if (row + 8 * lower < rows && has_columns) {
            __global ushort *to = o + (ulong)(row + 8 * lower) * (HEADS * DIM_V);
            if (aligned) {
                *(__global uint4 *)to = x;
            } else {
                const uint pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    to[2 * i] = (ushort)pairs[i];
                    to[2 * i + 1] = (ushort)(pairs[i] >> 16);
                }
            }
        }
    }
}

/* A warp's rows of q. */
void load_queries(uint4 q[Q_STEPS][2], const __global uint4 *record, row_tiles rows, uint block) {
#pragma unroll
    for (int step = 0; step < Q_STEPS; step++) {
        q[step][0] = record[(rows.tile[0] * K_STEPS + block * Q_STEPS + step) * 32 + warp_lane()];
        q[step][1] = record[(rows.tile[1] * K_STEPS + block * Q_STEPS + step) * 32 + warp_lane()];
    }
}

/* Adds 16 rows of the weighted q k^T times the values; `i` is known to the compiler. */
void add_products(float4 sum[4], const __global uint4 *record, const uint4 values[4][2], uint i,
                  const __local float *scales, const __local float *gates) {
    uint4 products[4];
#pragma unroll
    for (uint j = 0; j <= i; j++) {
        products[j] = record[P_TILES + (i * (i + 1) / 2 + j) * 32 + warp_lane()];
    }
#pragma unroll
    for (uint j = 0; j <= i; j++) {
        const uint4 a = weigh_products(products[j], i, j, scales, gates);
        mma(&sum[0], a, values[j][0].x, values[j][0].y);
        mma(&sum[1], a, values[j][0].z, values[j][0].w);
        mma(&sum[2], a, values[j][1].x, values[j][1].y);
        mma(&sum[3], a, values[j][1].z, values[j][1].w);
    }
}

__kernel __attribute__((reqd_work_group_size(NV_ITEMS, 1, 1))) void
nvidia_walk(const loglin_nvidia_call call, __global float *ws, ulong ws_offset, const __global ushort *v,
            ulong v_offset, const __global weight *level_scales, ulong level_scales_offset, __global ushort *o,
            ulong o_offset, uint aligned) {
    __local uint4 blocks_of_chunks[NV_SEGMENT_BITS][STATE];
#if NV_CACHED
    __local uint4 cached[NV_CACHED][STATE];
#endif
    __local uint4 values_at[2][NV_CHUNK * 8];
    __local float scales_at[2][NV_CHUNK * SCALES_ROW + FIRST_LEVEL];
    __local float gates_at[2][2 * NV_CHUNK];
    __local float since_block[NV_SEGMENTS_BITS]; /* the gates between a block of segments and this one */
    const uint lane = warp_lane(), warp = get_local_id(0) / 32, half_v = warp % 2, part = warp / 2;
    const ulong id = get_group_id(0);
    const uint head = id % HEADS, tile = id / HEADS % TILES_V, b = id / (HEADS * TILES_V) % call.batch;
    const uint segment = call.segments - 1 - id / (HEADS * TILES_V) / call.batch;
    const ulong bh = (ulong)b * HEADS + head;
    const uint first_chunk = segment * NV_SEGMENT, count = min((uint)NV_SEGMENT, call.chunks - first_chunk);

    const ulong first_token = (ulong)b * call.length + (ulong)first_chunk * NV_CHUNK;
    const ulong first_column = (first_token * HEADS + head) * DIM_V + tile * NV_TILE_V;
    v += v_offset + first_column;
    o += o_offset + first_column + half_v * 32 + 8 * (lane % 4);
    const int has_columns = tile * NV_TILE_V + half_v * 32 + 8 * (lane % 4) < DIM_V;
    level_scales += level_scales_offset + (first_token * HEADS + head) * LEVELS;
    const __global uint4 *record =
        (const __global uint4 *)place(ws, ws_offset, call.products) +
        (((ulong)b * GROUPS + head / (HEADS / GROUPS)) * call.chunks + first_chunk) * RECORD;
    const __global float *gate_sums = (const __global float *)place(ws, ws_offset, call.gates) +
                                      (bh * call.chunks + first_chunk) * (2 * NV_CHUNK);
    const __global uint4 *nodes = (const __global uint4 *)place(ws, ws_offset, call.nodes) +
                                  (bh * TILES_V + tile) * call.segments * STATE;
    const __global float *block_sums = (const __global float *)place(ws, ws_offset, call.blocks) + bh * call.segments;

    row_tiles rows;
    rows.tile[0] = part;
    rows.tile[1] = 3 - part;
    float since_start = 0.0f;                 /* the segment's gates before the chunk */
    float since[NV_SEGMENT_BITS] = {0.0f};    /* the gates between a block of chunks and this one */
    const int tokens = (int)(call.length - first_chunk * NV_CHUNK);

    if (get_local_id(0) == 0) {
        float sum = 0.0f;
        for (uint bits = segment, j = 0; bits != 0; bits >>= 1, j++) {
            since_block[j] = sum;
            sum += (bits & 1) != 0 ? block_sums[(bits << j) - 1] : 0.0f;
        }
    }
    fetch_values(values_at[0], v, tile, tokens, aligned);
    fetch_rows(scales_at[0], gates_at[0], level_scales, gate_sums, tokens);
#if NV_CACHED
    for (uint bits = segment, j = 0, found = 0; bits != 0 && found < NV_CACHED; bits >>= 1, j++) {
        if ((bits & 1) != 0) {
            fetch_tiles(cached[found++], nodes + (ulong)((bits << j) - 1) * STATE, STATE);
        }
    }
#endif
    for (uint n = 0; n < count; n++) {
        const __local float *scales = scales_at[n % 2], *gates = gates_at[n % 2];
        uint4 q[Q_STEPS][2];
        load_queries(q, record, rows, 0);
        wait_for_copies();
        barrier(CLK_LOCAL_MEM_FENCE);
        if (n + 1 < count) {
            const uint next = n + 1;
            fetch_values(values_at[next % 2], v + (ulong)next * (NV_CHUNK * HEADS * DIM_V), tile,
                         tokens - (int)next * NV_CHUNK, aligned);
            fetch_rows(scales_at[next % 2], gates_at[next % 2], level_scales + (ulong)next * (NV_CHUNK * HEADS * LEVELS),
                       gate_sums + next * (2 * NV_CHUNK), tokens - (int)next * NV_CHUNK);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint row = rows.tile[i / 2] * 16 + (i % 2) * 8 + lane / 4;
            rows.start[i] = call.scale * decay(gates[row] + gates[NV_CHUNK + row]);
        }
        float4 sum[2][4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            sum[0][j] = sum[1][j] = (float4)(0.0f);
        }

        /* The levels before the chunk. */
        for (uint block = 0; block < Q_BLOCKS; block++) {
            uint weights[4];
            if (block > 0) {
                load_queries(q, record, rows, block);
            }
            for (uint bits = segment, j = 0, found = 0; bits != 0; bits >>= 1, j++) {
                if ((bits & 1) != 0) {
                    const uint end = (bits << j) - 1;
                    const __global uint4 *state =
                        nodes + (ulong)end * STATE + state_index(half_v, block * Q_STEPS, 0);
                    level_weights(weights, rows, scales, FIRST_LEVEL + NV_SEGMENT_BITS + j,
                                  since_block[j] + since_start);
#if NV_CACHED
                    if (found < NV_CACHED) {
                        const __local uint4 *copy = &cached[found][state_index(half_v, block * Q_STEPS, 0)];
#pragma unroll
                        for (int step = 0; step < Q_STEPS; step++) {
                            add_level(sum, q[step], weights, copy[step * 64], copy[step * 64 + 32]);
                        }
                        found++;
                    } else
#endif
                    {
#pragma unroll
                        for (int step = 0; step < Q_STEPS; step++) {
                            add_level(sum, q[step], weights, state[step * 64], state[step * 64 + 32]);
                        }
                    }
                }
            }
            for (uint j = 0; j < NV_SEGMENT_BITS; j++) {
                if (((n >> j) & 1) != 0) {
                    const __local uint4 *state = &blocks_of_chunks[j][state_index(half_v, block * Q_STEPS, 0)];
                    level_weights(weights, rows, scales, FIRST_LEVEL + j, j == 0 ? since[0] : j == 1 ? since[1] : since[2]);
#pragma unroll
                    for (int step = 0; step < Q_STEPS; step++) {
                        add_level(sum, q[step], weights, state[step * 64], state[step * 64 + 32]);
                    }
                }
            }
        }

        /* The chunk itself: both cases have five tiles. */
        uint4 values[4][2];
        load_values(values, values_at[n % 2], half_v);
        if (part == 0) {
            add_products(sum[0], record, values, 0, scales, gates);
            add_products(sum[1], record, values, 3, scales, gates);
        } else {
            add_products(sum[0], record, values, 1, scales, gates);
            add_products(sum[1], record, values, 2, scales, gates);
        }
#pragma unroll
        for (int m = 0; m < 2; m++) {
            store_outputs(o + (ulong)n * (NV_CHUNK * HEADS * DIM_V), sum[m], (int)(16 * rows.tile[m] + lane / 4),
                          tokens - (int)n * NV_CHUNK, has_columns, aligned);
        }

        /* Its state, with those of the blocks that end here too. */
        if (n + 1 < count) {
            const uint level = popcount(n & ~(n + 1));
            const float kept = chunk_sum(gates);
            decay_values(values, gates);
#pragma unroll
            for (int j = 0; j < NV_SEGMENT_BITS; j++) {
                since[j] += kept;
            }
            for (uint block = 0; block < U_BLOCKS; block++) {
                const uint first_step = part * (K_STEPS / 2) + block * U_STEPS;
                float4 state[2][2 * U_STEPS];
#pragma unroll
                for (int i = 0; i < 2 * U_STEPS; i++) {
                    state[0][i] = state[1][i] = (float4)(0.0f);
                }
                for (uint j = 0; j < level; j++) {
                    const float weight = decay(j == 0 ? since[0] : since[1]) * STATE_UNIT;
#pragma unroll
                    for (int step = 0; step < U_STEPS; step++) {
#pragma unroll
                        for (int m = 0; m < 2; m++) {
                            add_packed_state(&state[m][2 * step], &state[m][2 * step + 1],
                                             blocks_of_chunks[j][state_index(half_v, first_step + step, m)], weight);
                        }
                    }
                }
#pragma unroll
                for (int t = 0; t < 4; t++) {
#pragma unroll
                    for (int step = 0; step < U_STEPS; step++) {
                        add_state(state, values[t], record[K_TILES + (t * K_STEPS + first_step + step) * 32 + lane],
                                  step);
                    }
                }
#pragma unroll
                for (int step = 0; step < U_STEPS; step++) {
#pragma unroll
                    for (int m = 0; m < 2; m++) {
                        blocks_of_chunks[level][state_index(half_v, first_step + step, m)] =
                            pack_state(state[m][2 * step], state[m][2 * step + 1]);
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < NV_SEGMENT_BITS; j++) {
                since[j] = j == (int)level ? 0.0f : since[j];
            }
            since_start += kept;
            record += RECORD;
        }
    }
}

/* ---- final ------------------------------------------------------------------------------------------------------- */

/* Element (row of K, column of V) of a packed state. */
float state_element(const __global uint4 *state, uint row, uint column) {
    const uint j = column % 32 / 16, lane = column % 8 * 4 + row % 8 / 2;
    const uint at = (((column / 32) * K_STEPS + row / 16) * 2 + j) * 32 + lane;
    const __global uint *words = (const __global uint *)&state[at];
    const float2 pair = unpack(words[column % 16 / 8 * 2 + row % 16 / 8]);
    return (row % 2 != 0 ? pair.y : pair.x) * STATE_UNIT;
}

/* Key element from the chunk's tiles. */
float key_element(const __global uint4 *record, uint token, uint column) {
    const uint lane = column % 8 * 4 + token % 8 / 2;
    const __global uint *words = (const __global uint *)&record[K_TILES + (token / 16 * K_STEPS + column / 16) * 32 + lane];
    const float2 pair = unpack(words[column % 16 / 8 * 2 + token % 16 / 8]);
    return token % 2 != 0 ? pair.y : pair.x;
}

/*
 * The states after the last token: levels inside the last segment straight from its tokens, those above from the nodes.
 * A work-group makes a row of K, an item some columns of V, of all levels.
 */
__kernel __attribute__((reqd_work_group_size(NV_ITEMS, 1, 1))) void
nvidia_final(const loglin_nvidia_call call, __global float *ws, ulong ws_offset, const __global ushort *v,
             ulong v_offset, __global float *states, ulong states_offset, __global float *log_decay,
             ulong log_decay_offset, __global int *position, ulong position_offset) {
    __local float weighted_keys[NV_SEGMENT * NV_CHUNK];
    const uint item = get_local_id(0), row = get_group_id(0) % DIM_K;
    const ulong bh = get_group_id(0) / DIM_K;
    const uint head = bh % HEADS, b = bh / HEADS;
    const uint segment = call.segments - 1, first_chunk = segment * NV_SEGMENT;
    const uint first = first_chunk * NV_CHUNK, last = call.length - 1, count = call.chunks - first_chunk;
    const __global uint4 *record =
        (const __global uint4 *)place(ws, ws_offset, call.products) +
        (((ulong)b * GROUPS + head / (HEADS / GROUPS)) * call.chunks + first_chunk) * RECORD;
    const __global float *gates = (const __global float *)place(ws, ws_offset, call.gates) +
                                  (bh * call.chunks + first_chunk) * (2 * NV_CHUNK);
    for (uint s = item; s <= last - first; s += NV_ITEMS) {
        const __global float *own = gates + s / NV_CHUNK * (2 * NV_CHUNK);
        const uint at = s % NV_CHUNK;
        float sum = (own[NV_CHUNK - 1] - own[at]) + (own[2 * NV_CHUNK - 1] - own[NV_CHUNK + at]);
        for (uint n = s / NV_CHUNK + 1; n < count; n++) {
            sum += gates[n * 2 * NV_CHUNK + NV_CHUNK - 1] + gates[n * 2 * NV_CHUNK + 2 * NV_CHUNK - 1];
        }
        weighted_keys[s] = decay(sum) * key_element(record + (ulong)(s / NV_CHUNK) * RECORD, at, row);
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    v += v_offset + (((ulong)b * call.length + first) * HEADS + head) * DIM_V;
    states += states_offset + bh * LEVELS * (DIM_K * DIM_V) + row * DIM_V;
    for (uint column = item; column < DIM_V; column += NV_ITEMS) {
        float since = ((const __global float *)place(ws, ws_offset, call.sums))[bh * call.segments + segment];
        for (uint level = 0; level < LEVELS; level++) {
            float x = 0.0f;
            if (level <= 6 + NV_SEGMENT_BITS) {
                const uint offset = last - first;
                const uint width = level == 0 ? 1 : 1u << (level - 1);
                const uint start = level == 0 ? offset : offset >> level << level;
                for (uint s = start; (level == 0 || (offset & width) != 0) && s < start + width; s++) {
                    x = fma(weighted_keys[s], unpack(v[(ulong)s * (HEADS * DIM_V) + column]).x, x);
                }
            } else if (((last >> (level - 1)) & 1) != 0) {
                const uint j = level - 7 - NV_SEGMENT_BITS, end = (segment >> j << j) - 1;
                const __global uint4 *node =
                    (const __global uint4 *)place(ws, ws_offset, call.nodes) +
                    ((bh * TILES_V + column / NV_TILE_V) * call.segments + end) * STATE;
                x = decay(since) * state_element(node, row, column % NV_TILE_V);
                since += ((const __global float *)place(ws, ws_offset, call.blocks))[bh * call.segments + end];
            }
            states[(ulong)level * (DIM_K * DIM_V) + column] = x;
        }
    }
    for (uint level = item; row == 0 && log_decay && level < LEVELS; level += NV_ITEMS) {
        log_decay[log_decay_offset + bh * LEVELS + level] = 0.0f;
    }
    if (row == 0 && head == 0 && item == 0 && position) {
        position[position_offset + b] = (int)call.length;
    }
}
