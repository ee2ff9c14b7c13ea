/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The scalar-gated backward pass on NVIDIA's matrix units, weak partition.  The forward pass leaves nothing for it.
 *
 * A sequence is cut into N chunks of 128 tokens, and these into tiles of 64.  Chunk n reads, for every set bit j of n, the
 * state of the block of 2^j chunks that ends with chunk e = (n >> j << j) - 1; every e < N - 1 is the end of one such
 * block, the left one of a pair.  A block's adjoint is what its right neighbour gives; adjoints flow down the tree until
 * each chunk has one that holds everything behind it.
 *     prepare   q and k, normalised and padded; the gates' running sums
 *     since     the gates' sums over chunks
 *     sums      states of blocks of up to 2^UNIT_BITS chunks, and adjoints of all blocks, larger ones in parts
 *     tree      states up, adjoints down
 *     rows      the levels above a chunk: dO S^T gives dq and dlevel_scales, V A^T gives dk
 *     tiles     inside a chunk: dv, dlevel_scales, and what dq and dk get from d(q k^T), summed over the heads first
 *     crossings, gates    dg
 *     reduce    dq and dk
 * Work-groups go through the heads of a group, so dq and dk of all heads add up in registers.
 *
 * dg_t sums W over all pairs of a query at or behind t and a key before t, W being the pair's share of dO . o.  In a chunk
 * that is a running sum of dO . o - v . dv, both from the same products; pairs that cross a chunk's end are counted anew there, from products of states
 * and adjoints, so that rounding errors do not add up along the sequence.
 *
 * States and adjoints lie as rows of K, 64 columns of V each, rounded to storage; they stand decayed to the block's end.
 * Local tiles: rows of pieces of 8 columns, piece c of row r at place c ^ r % 8.
 *
 * Given: NV_K (dim_k rounded up to a multiple of 64), DIM_K, DIM_V, HEADS, GROUPS, LEVELS (columns of level_scales),
 * CHUNK_LEVELS (those above a chunk that exist), NORMALIZE, STORAGE, WEIGHT_STORAGE, UNIT_BITS, SUM_HEADS and BLOCK_HEADS
 * (heads of a group that a work-group of the sums takes side by side, and of rows and tiles one by one).
 */

#pragma OPENCL EXTENSION cl_khr_fp64 : enable

#define K_STEPS (NV_K / 16)
#define K_PIECES (NV_K / 8)
#define ROW_TILE (NB_TILE * K_PIECES) /* uint4 of a tile of q or k */
#define COLUMN_TILE (NB_TILE * 8)     /* of v or dO */
#define STATE (NV_K * 8)
#define TILES_V ((DIM_V + NB_COLUMNS - 1) / NB_COLUMNS)
#define SLICES (STATE / 32)
#define GROUP_HEADS (HEADS / GROUPS)
#define HEAD_BLOCKS (GROUP_HEADS / BLOCK_HEADS)
#define UNIT (1 << UNIT_BITS)
#define CHUNK_LEVEL 8 /* level of the chunk before */
#define SLOTS (CHUNK_LEVELS > 0 ? CHUNK_LEVELS : 1)
#define SCALES_ROW (SLOTS | 1)

/* States are stored divided by this, for half's range. */
#define STATE_UNIT (STORAGE == 1 ? 64.0f : 1.0f)

/* ---- Common ------------------------------------------------------------------------------------------------------ */

float decay(float x) { return native_exp2(x * 1.44269504f); }

/* Of the difference of two sums with remainders. */
float decay_between(float2 late, float2 early) { return decay((late.x - early.x) + (late.y - early.y)); }

__global char *place(__global float *ws, ulong offset, ulong at) {
    return (__global char *)(((ulong)(ws + offset) + 15) & ~(ulong)15) + at;
}

/* Where an item finds its row of an 8 x 8 matrix for A of a tile as it lies (rows, then pieces), or for B of columns. */
uint near_row(void) { return warp_lane() & 15; }
uint near_piece(void) { return warp_lane() / 16; }

/* For A of a transposed tile, or for B of a tile whose rows are B's columns. */
uint far_row(void) { return warp_lane() / 16 * 8 + (warp_lane() & 7); }
uint far_piece(void) { return warp_lane() / 8 & 1; }

uint swizzled(uint row, uint pieces, uint piece) { return row * pieces + (piece ^ (row & 7)); }

/* A: rows and inner columns of a tile. */
uint4 load_a(const __local uint4 *tile, uint pieces, uint row, uint piece) {
    return load_matrices(&tile[swizzled(row + near_row(), pieces, piece + near_piece())]);
}

/* A of the transposed tile: `row` is inner. */
uint4 load_a_transposed(const __local uint4 *tile, uint pieces, uint row, uint piece) {
    return load_transposed(&tile[swizzled(row + far_row(), pieces, piece + far_piece())]);
}

/* B of two eights of columns: inner rows of a tile. */
uint4 load_b(const __local uint4 *tile, uint pieces, uint row, uint piece) {
    return load_transposed(&tile[swizzled(row + near_row(), pieces, piece + near_piece())]);
}

/* B of the transposed tile: two eights of rows, inner columns. */
uint4 load_b_transposed(const __local uint4 *tile, uint pieces, uint row, uint piece) {
    return load_matrices(&tile[swizzled(row + far_row(), pieces, piece + far_piece())]);
}

/* Starts copying whole rows to a local tile. */
void fetch_tile(__local uint4 *to, const __global uint4 *from, uint rows, uint pieces, uint item, uint items) {
    for (uint i = item; i < rows * pieces; i += items) {
        copy_16(&to[swizzled(i / pieces, pieces, i % pieces)], &from[i], 1);
    }
}

/* Starts copying 64 rows of v or dO; missing rows and columns become zeros. */
void fetch_columns(__local uint4 *to, const __global ushort *x, uint tile, int rows, int aligned, uint item, uint items) {
    for (uint i = item; i < COLUMN_TILE; i += items) {
        const uint row = i / 8, piece = i % 8;
        const int wanted = (int)row < rows && tile * NB_COLUMNS + piece * 8 < DIM_V;
        const __global ushort *from = x + (wanted ? (ulong)row * (HEADS * DIM_V) + tile * NB_COLUMNS + piece * 8 : 0);
        __local uint4 *place_of_piece = &to[swizzled(row, 8, piece)];
        if (aligned) {
            copy_16(place_of_piece, from, wanted);
        } else {
            uint4 values = (uint4)(0);
            if (wanted) {
                values = (uint4)(from[0] | (uint)from[1] << 16, from[2] | (uint)from[3] << 16,
                                 from[4] | (uint)from[5] << 16, from[6] | (uint)from[7] << 16);
            }
            *place_of_piece = values;
        }
    }
}

/* A pair of neighbouring columns of a local tile. */
float2 tile_pair(const __local uint4 *tile, uint pieces, uint row, uint column) {
    const __local uint *words = (const __local uint *)&tile[swizzled(row, pieces, column / 8)];
    return unpack(words[column % 8 / 2]);
}

/* A level scale to local memory; zero where it is not wanted. */
void fetch_scale(__local float *to, const __global weight *from, ulong at, int wanted) {
#if WEIGHT_STORAGE == 0
    if (wanted) {
        copy_4(to, from + at);
    } else {
        *to = 0.0f;
    }
#else
    *to = wanted ? load_weight(from, at) : 0.0f;
#endif
}

float sum_quad(float x) {
    x += as_float(shuffle_xor(as_uint(x), 1));
    return x + as_float(shuffle_xor(as_uint(x), 2));
}

/* Over the eight items with the same lane % 4. */
float sum_rows(float x) {
    x += as_float(shuffle_xor(as_uint(x), 4));
    x += as_float(shuffle_xor(as_uint(x), 8));
    return x + as_float(shuffle_xor(as_uint(x), 16));
}

float sum_warp(float x) { return sum_quad(sum_rows(x)); }

/* Four sums at once over items whose numbers differ in two bits; an item gets the sum that its own two bits name. */
float sum_four(const float x[4], uint bit, uint step) {
    const int odd = (bit & 1) != 0, high = (bit & 2) != 0;
    const float a = (odd ? x[1] : x[0]) + as_float(shuffle_xor(as_uint(odd ? x[0] : x[1]), step));
    const float b = (odd ? x[3] : x[2]) + as_float(shuffle_xor(as_uint(odd ? x[2] : x[3]), step));
    return (high ? b : a) + as_float(shuffle_xor(as_uint(high ? a : b), 2 * step));
}

/* The end of the block that chunk n reads at level j, and of the block that has it as its right part. */
uint block_end(uint n, uint j) { return (n >> j << j) - 1; }

/* ---- prepare ----------------------------------------------------------------------------------------------------- */

/* A warp copies a row of q or k, padded. */
void prepare_row(const loglin_nvidia_gradients call, __global ushort *to, const __global ushort *x, ulong row) {
    const uint t = row % (call.chunks * NB_CHUNK);
    const ulong bg = row / (call.chunks * NB_CHUNK), b = bg / GROUPS;
    x += ((b * call.length + t) * GROUPS + bg % GROUPS) * DIM_K;
    to += row * NV_K;
    float values[NV_K / 32], sum = 0.0f;
#pragma unroll
    for (uint i = 0; i < NV_K / 32; i++) {
        const uint column = i * 32 + warp_lane();
        values[i] = t < call.length && column < DIM_K ? unpack(x[column]).x : 0.0f;
        sum = fma(values[i], values[i], sum);
    }
    const float norm = NORMALIZE ? 1.0f / sqrt(sum_warp(sum) + 1e-6f) : 1.0f;
#pragma unroll
    for (uint i = 0; i < NV_K / 32; i++) {
        to[i * 32 + warp_lane()] = (ushort)pack(values[i] * norm, 0.0f);
    }
}

double shuffle_up_double(double x, uint distance) {
    const float2 parts = as_float2(x);
    return as_double((float2)(shuffle_up(parts.x, distance), shuffle_up(parts.y, distance)));
}

/* The running sum over the warp's items. */
double scan_warp(double x) {
    for (uint distance = 1; distance < 32; distance *= 2) {
        const double left = shuffle_up_double(x, distance);
        x += warp_lane() >= distance ? left : 0.0;
    }
    return x;
}

float2 split(double x) {
    const float sum = (float)x;
    return (float2)(sum, (float)(x - sum));
}

/*
 * A warp sums a chunk's gates.  The factors of a token: the decay from before its 16 tokens, to the end of these, between
 * it and the middle of the chunk, to the chunk's end.
 */
void sum_gates(const loglin_nvidia_gradients call, __global float *ws, ulong ws_offset, const __global float *g,
               ulong id, __local double *sums) {
    const uint lane = warp_lane(), n = id % call.chunks;
    const ulong bh = id / call.chunks;
    const ulong first = (bh / HEADS * call.length + (ulong)n * NB_CHUNK) * HEADS + bh % HEADS;
    double running[4];
    double sum = 0.0;
#pragma unroll
    for (uint i = 0; i < 4; i++) {
        const uint t = 4 * lane + i;
        sum += g && n * NB_CHUNK + t < call.length ? g[first + (ulong)t * HEADS] : 0.0f;
        running[i] = sum;
    }
    const double before = scan_warp(sum) - sum;
#pragma unroll
    for (uint i = 0; i < 4; i++) {
        sums[4 * lane + i] = running[i] + before;
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    __global float2 *gates = (__global float2 *)place(ws, ws_offset, call.gates) + id * NB_CHUNK;
    __global float4 *factors = (__global float4 *)place(ws, ws_offset, call.factors) + id * NB_CHUNK;
#pragma unroll
    for (uint i = 0; i < 4; i++) {
        const uint t = i * 32 + lane, base = t / 16 * 16;
        const double own = sums[t], middle = sums[NB_TILE - 1];
        gates[t] = split(own);
        factors[t] = (float4)(decay((float)(own - (base > 0 ? sums[base - 1] : 0.0))),
                              decay((float)(sums[base + 15] - own)),
                              decay((float)(t < NB_TILE ? middle - own : own - middle)),
                              decay((float)(sums[NB_CHUNK - 1] - own)));
    }
    if (lane == 0) {
        ((__global float2 *)place(ws, ws_offset, call.since))[bh * (call.chunks + 1) + n + 1] =
            split(sums[NB_CHUNK - 1]);
    }
}

/* A warp has a row of q, a row of k, or a chunk and head. */
__kernel __attribute__((reqd_work_group_size(NB_ITEMS, 1, 1))) void
nb_prepare(const loglin_nvidia_gradients call, __global float *ws, ulong ws_offset, const __global ushort *q,
           ulong q_offset, const __global ushort *k, ulong k_offset, const __global float *g, ulong g_offset) {
    __local double sums[NB_ITEMS / 32][NB_CHUNK];
    const uint warp = get_local_id(0) / 32;
    const ulong rows = (ulong)call.batch * GROUPS * call.chunks * NB_CHUNK, row_groups = rows / (NB_ITEMS / 32);
    ulong group = get_group_id(0);
    if (group < 2 * row_groups) {
        const int is_key = group >= row_groups;
        const ulong row = (is_key ? group - row_groups : group) * (NB_ITEMS / 32) + warp;
        prepare_row(call, (__global ushort *)place(ws, ws_offset, is_key ? call.keys : call.queries),
                    is_key ? k + k_offset : q + q_offset, row);
    } else {
        const ulong id = (group - 2 * row_groups) * (NB_ITEMS / 32) + warp;
        const ulong count = (ulong)call.batch * HEADS * call.chunks;
        sum_gates(call, ws, ws_offset, g ? g + g_offset : g, min(id, count - 1), sums[warp]);
    }
}

/* A warp sums the gates of a head's chunks. */
__kernel __attribute__((reqd_work_group_size(32, 1, 1))) void
nb_since(const loglin_nvidia_gradients call, __global float *ws, ulong ws_offset) {
    __global float2 *since = (__global float2 *)place(ws, ws_offset, call.since) + get_group_id(0) * (call.chunks + 1);
    __local double last;
    double start = 0.0;
    for (uint first = 0; first <= call.chunks; first += 32) {
        const uint n = first + warp_lane();
        const float2 own = n > 0 && n <= call.chunks ? since[n] : (float2)(0.0f);
        const double sum = start + scan_warp((double)own.x + (double)own.y);
        if (n <= call.chunks) {
            since[n] = split(sum);
        }
        if (warp_lane() == 31) {
            last = sum;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        start = last;
        barrier(CLK_LOCAL_MEM_FENCE);
    }
}

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
uint sum_place(uint row, uint half_v) { return (row + warp_lane() / 4) * 8 + half_v * 4 + warp_lane() % 4; }

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
    const uint head_group = id % (HEADS / SUM_HEADS), tile = id / (HEADS / SUM_HEADS) % TILES_V;
    const uint b = id / (HEADS / SUM_HEADS * TILES_V) % call.batch;
    const sum_job job = find_job(call.chunks, id / (HEADS / SUM_HEADS * TILES_V) / call.batch);
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
            if (step % 2 == 1 && (job.is_state || i == 0 || (job.level <= UNIT_BITS && ((job.first + i) & ((1u << job.level) - 1)) == 0))) {
                clear_sum(sum);
                const uint ones = job.is_state ? popcount(i & ~(i + 1)) : 0;
                for (uint j = 0; j < ones; j++) {
                    const uint child = chunk - (1u << j);
                    add_sum(sum, states + (ulong)child * STATE, decay_between(since[chunk + 1], since[child + 1]), warp);
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

typedef struct float8_pair {
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
    __global uint4 *adjoints = (__global uint4 *)place(ws, ws_offset, call.adjoints) + matrix * call.chunks * STATE + at;
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

/* ---- rows -------------------------------------------------------------------------------------------------------- */

#define ROW_COLUMNS (NV_K / 4)        /* of K, of a warp: it has 32 rows */
#define ROW_EIGHTS (ROW_COLUMNS / 8)

/* A turn: a head, a level (its bit is the lowest of `bits`), and a tile of V, which goes first. */
typedef struct row_turn {
    uint h, bits, part;
} row_turn;

row_turn next_turn(row_turn now, uint all_bits) {
    if (++now.part == TILES_V) {
        now.part = 0;
        now.bits &= now.bits - 1;
        if (now.bits == 0) {
            now.bits = all_bits;
            now.h++;
        }
    }
    return now;
}

uint turn_level(row_turn turn) { return 31 - clz(turn.bits & (0 - turn.bits)); }

/* Rows of a tile: where each of an item's four lies. */
uint item_row(uint half_rows, uint i) { return half_rows * 32 + i * 8 + warp_lane() / 4; }

/*
 * dq and dlevel_scales from the states of the levels above a chunk (is_key 0), or dk from the chunk's adjoint (1), of a
 * tile and a block of heads.
 */
__kernel __attribute__((reqd_work_group_size(NB_ITEMS, 1, 1))) void
nb_rows(const loglin_nvidia_gradients call, __global float *ws, ulong ws_offset, const __global ushort *v,
        ulong v_offset, const __global ushort *d_o, ulong d_o_offset, const __global weight *level_scales,
        ulong level_scales_offset, __global weight *dlevel_scales, ulong dlevel_scales_offset, uint aligned) {
    __local uint4 states_at[2][STATE];
    __local uint4 values_at[2][TILES_V][COLUMN_TILE];
    __local uint4 queries[ROW_TILE];
    __local float scales_at[3][NB_TILE * SCALES_ROW]; /* of the head that is fetched, worked on, and finished */
    __local float2 gates_at[2][NB_TILE];
    __local float4 factors_at[2][NB_TILE];
    __local float kept_at[2][SCALES_ROW];
    __local float dots_at[2][4][SLOTS][NB_TILE];
    const uint item = get_local_id(0), lane = item % 32, warp = item / 32, half_rows = warp % 2, quarter = warp / 2;
    const ulong tiles = 2 * (ulong)call.chunks, id = get_group_id(0);
    const uint block = id % HEAD_BLOCKS, group = id / HEAD_BLOCKS % GROUPS, b = id / (HEAD_BLOCKS * GROUPS) % call.batch;
    const uint is_key = id / (HEAD_BLOCKS * GROUPS) / call.batch % 2;
    const uint tile = tiles - 1 - id / (HEAD_BLOCKS * GROUPS) / call.batch / 2, n = tile / 2;
    const uint all_bits = is_key ? n + 1 < call.chunks : n, first = tile * NB_TILE;
    const uint first_head = group * GROUP_HEADS + block * BLOCK_HEADS;
    const uint steps = BLOCK_HEADS * popcount(all_bits) * TILES_V;
    const int rows = (int)call.length - (int)first;
    const ulong bg = (ulong)b * GROUPS + group, padded = (ulong)call.chunks * NB_CHUNK;
    const __global ushort *values = (is_key ? v + v_offset : d_o + d_o_offset) +
                                    (((ulong)b * call.length + first) * HEADS + first_head) * DIM_V;
    const ulong level_row = (((ulong)b * call.length + first) * HEADS + first_head) * LEVELS;
    const ulong first_bh = (ulong)b * HEADS + first_head;
    const __global uint4 *all_states = (const __global uint4 *)place(ws, ws_offset, is_key ? call.adjoints : call.states);

    if (!is_key && steps > 0) {
        fetch_tile(queries, (const __global uint4 *)place(ws, ws_offset, call.queries) + (bg * padded + first) * K_PIECES,
                   NB_TILE, K_PIECES, item, NB_ITEMS);
    }
    float4 total[2][ROW_EIGHTS], product[2][ROW_EIGHTS];
#pragma unroll
    for (uint m = 0; m < 2; m++) {
#pragma unroll
        for (uint i = 0; i < ROW_EIGHTS; i++) {
            total[m][i] = product[m][i] = (float4)(0.0f);
        }
    }
    float start[4] = {0.0f};
    row_turn wanted = {0, all_bits, 0}, turn = wanted;
    for (uint step = 0; step <= steps + 1; step++) {
        wait_for_copies();
        barrier(CLK_LOCAL_MEM_FENCE);
        if (step < steps) {
            /* Fetch what the next turn takes: a state, and at a head's begin all else. */
            const uint h = wanted.h;
            const ulong bh = first_bh + h;
            const uint e = is_key ? n : block_end(n, turn_level(wanted));
            fetch_tile(states_at[step % 2], all_states + ((bh * TILES_V + wanted.part) * call.chunks + e) * STATE, NV_K, 8,
                       item, NB_ITEMS);
            if (wanted.bits == all_bits && wanted.part == 0) {
                for (uint i = 0; i < TILES_V; i++) {
                    fetch_columns(values_at[h % 2][i], values + (ulong)h * DIM_V, i, rows, aligned, item, NB_ITEMS);
                }
                if (is_key) {
                    if (item < NB_TILE) {
                        copy_16(&factors_at[h % 2][item],
                                (const __global float4 *)place(ws, ws_offset, call.factors) + bh * padded + first + item, 1);
                    }
                } else {
                    if (item < NB_TILE / 2) {
                        copy_16(&gates_at[h % 2][2 * item],
                                (const __global float2 *)place(ws, ws_offset, call.gates) + bh * padded + first + 2 * item, 1);
                    }
                    for (uint i = item; i < NB_TILE * SLOTS; i += NB_ITEMS) {
                        const uint row = i / SLOTS, j = i % SLOTS;
                        if (((n >> j) & 1) != 0) {
                            fetch_scale(&scales_at[h % 3][row * SCALES_ROW + j], level_scales,
                                        level_scales_offset + level_row + (ulong)row * (HEADS * LEVELS) + h * LEVELS +
                                            CHUNK_LEVEL + j,
                                        (int)row < rows);
                        }
                    }
                    if (item < SLOTS && ((n >> item) & 1) != 0) {
                        copy_4(&kept_at[h % 2][item], (const __global float *)place(ws, ws_offset, call.kept) +
                                                          (bh * call.chunks + n) * CHUNK_LEVELS + item);
                    }
                }
            }
            wanted = next_turn(wanted, all_bits);
        }
        int finished = all_bits == 0 && step == 0 ? BLOCK_HEADS : 0; /* heads */
        if (step > 0 && turn.h > 0 && turn.bits == all_bits && turn.part == 0) {
            finished = 1;
        }
        const uint first_finished = all_bits == 0 ? 0 : turn.h - 1;
        if (step > 0 && step <= steps) {
            const uint h = turn.h, j = turn_level(turn);
            const __local uint4 *state = states_at[(step - 1) % 2], *x = values_at[h % 2][turn.part];
#pragma unroll
            for (uint inner = 0; inner < 4; inner++) {
                const uint4 upper = load_a(x, 8, half_rows * 32, 2 * inner);
                const uint4 lower = load_a(x, 8, half_rows * 32 + 16, 2 * inner);
#pragma unroll
                for (uint i = 0; i < ROW_EIGHTS; i += 2) {
                    const uint4 y = load_b_transposed(state, 8, quarter * ROW_COLUMNS + 8 * i, 2 * inner);
                    mma(&product[0][i], upper, y.x, y.y);
                    mma(&product[1][i], lower, y.x, y.y);
                    mma(&product[0][i + 1], upper, y.z, y.w);
                    mma(&product[1][i + 1], lower, y.z, y.w);
                }
            }
            if (turn.part + 1 == TILES_V) {
                if (turn.bits == all_bits) {
#pragma unroll
                    for (uint i = 0; i < 4; i++) {
                        const uint row = item_row(half_rows, i);
                        const float2 own = is_key ? (float2)(0.0f) : gates_at[h % 2][row];
                        start[i] = (is_key ? factors_at[h % 2][row].w : decay(own.x + own.y)) * STATE_UNIT;
                    }
                }
                const float kept = is_key ? 1.0f : kept_at[h % 2][j];
                float dots[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
                for (uint i = 0; i < 4; i++) {
                    const uint row = item_row(half_rows, i), m = i / 2;
                    const float row_weight = kept * start[i];
                    const float scale = is_key ? row_weight : row_weight * scales_at[h % 3][row * SCALES_ROW + j];
#pragma unroll
                    for (uint c = 0; c < ROW_EIGHTS; c++) {
                        const float2 own = i % 2 == 0 ? product[m][c].xy : product[m][c].zw;
                        if (i % 2 == 0) {
                            total[m][c].xy += scale * own;
                        } else {
                            total[m][c].zw += scale * own;
                        }
                        if (!is_key) {
                            const float2 q =
                                tile_pair(queries, K_PIECES, row, quarter * ROW_COLUMNS + 8 * c + 2 * (lane % 4));
                            dots[i] = fma(q.x, own.x, fma(q.y, own.y, dots[i]));
                        }
                    }
                    dots[i] *= row_weight;
                }
                if (!is_key) {
                    /* The item gets the sum of its row number lane % 4. */
                    dots_at[h % 2][quarter][j][item_row(half_rows, lane % 4)] = sum_four(dots, lane, 1);
                }
#pragma unroll
                for (uint m = 0; m < 2; m++) {
#pragma unroll
                    for (uint i = 0; i < ROW_EIGHTS; i++) {
                        product[m][i] = (float4)(0.0f);
                    }
                }
            }
            turn = next_turn(turn, all_bits);
        }
        /* Heads behind: the gradients of their level scales.  Items 64 i.. have the levels i, i + 4, ... */
        for (uint h = first_finished; !is_key && finished-- > 0; h++) {
            const uint row = item % NB_TILE;
            float sum = 0.0f;
            for (uint j = item / NB_TILE; j + CHUNK_LEVEL < LEVELS || j < CHUNK_LEVELS; j += 4) {
                float gradient = 0.0f;
                if (j < CHUNK_LEVELS && ((n >> j) & 1) != 0) {
#pragma unroll
                    for (uint i = 0; i < 4; i++) {
                        gradient += dots_at[h % 2][i][j][row];
                    }
                    const float share = gradient * scales_at[h % 3][row * SCALES_ROW + j];
                    sum += share;
                    const float of_32 = sum_warp(share);
                    if (lane == 0) {
                        ((__global float *)place(ws, ws_offset, call.level_dots))
                            [((first_bh + h) * (4 * call.chunks) + 2 * tile + row / 32) * CHUNK_LEVELS + j] = of_32;
                    }
                }
                if (dlevel_scales && (int)row < rows) {
                    store_weight(dlevel_scales, dlevel_scales_offset + level_row + (ulong)row * (HEADS * LEVELS) +
                                                    h * LEVELS + CHUNK_LEVEL + j, gradient);
                }
            }
            ((__global float *)place(ws, ws_offset, call.dots))
                [((item / NB_TILE) * (ulong)call.batch * HEADS + first_bh + h) * padded + first + row] = sum;
        }
    }
    __global float *to = (__global float *)place(ws, ws_offset, is_key ? call.key_parts : call.query_parts) +
                         ((((ulong)block * call.batch + b) * GROUPS + group) * padded + first) * NV_K +
                         quarter * ROW_COLUMNS + 2 * (lane % 4);
#pragma unroll
    for (uint i = 0; i < 4; i++) {
#pragma unroll
        for (uint j = 0; j < ROW_EIGHTS; j++) {
            const float4 x = total[i / 2][j];
            *(__global float2 *)(to + item_row(half_rows, i) * NV_K + 8 * j) = i % 2 == 0 ? x.xy : x.zw;
        }
    }
}

/* ---- tiles ------------------------------------------------------------------------------------------------------- */

/* A warp has 16 keys, and 32 of the 64 queries as two sixteens; it makes transposed products, a key to a row. */

/*
 * A key's sixteen and a query's: dS^T in, (P M)^T out as A.  Adds to d(q k^T)^T, adds the shares of dO . o of the item's
 * queries to its two keys' `key_dots`, and finds sums over these keys for each query, without level scales: `dots` has one
 * for each query, on the diagonal five levels of them.
 */
uint4 weigh_far(float4 ds[2], uint4 product, float4 dp[2], const float query_weight[4], const float query_scale[4],
                const float key_weight[2], float key_dots[2], __local float *dots) {
    const float2 p[4] = {unpack(product.x), unpack(product.y), unpack(product.z), unpack(product.w)};
    uint4 a;
    float sum[4];
#pragma unroll
    for (uint half_q = 0; half_q < 2; half_q++) {
        const float2 decays = (float2)(query_weight[2 * half_q], query_weight[2 * half_q + 1]);
        const float2 scales = (float2)(query_scale[2 * half_q], query_scale[2 * half_q + 1]);
        const float2 upper = decays * key_weight[0], lower = decays * key_weight[1];
        const float2 shares = ds[half_q].xy * p[2 * half_q] * upper + ds[half_q].zw * p[2 * half_q + 1] * lower;
        sum[2 * half_q] = shares.x;
        sum[2 * half_q + 1] = shares.y;
        dp[half_q].xy += ds[half_q].xy * (upper * scales);
        dp[half_q].zw += ds[half_q].zw * (lower * scales);
        const float2 w_upper = p[2 * half_q] * (upper * scales), w_lower = p[2 * half_q + 1] * (lower * scales);
        key_dots[0] = fma(ds[half_q].x, w_upper.x, fma(ds[half_q].y, w_upper.y, key_dots[0]));
        key_dots[1] = fma(ds[half_q].z, w_lower.x, fma(ds[half_q].w, w_lower.y, key_dots[1]));
        if (half_q == 0) {
            a.x = pack(w_upper.x, w_upper.y);
            a.y = pack(w_lower.x, w_lower.y);
        } else {
            a.z = pack(w_upper.x, w_upper.y);
            a.w = pack(w_lower.x, w_lower.y);
        }
    }
    const uint r = warp_lane() / 4;
    float dot_of_query = sum_four(sum, r, 4);
    dot_of_query += as_float(shuffle_xor(as_uint(dot_of_query), 16));
    if (r < 4) {
        dots[8 * (r / 2) + 2 * (warp_lane() % 4) + r % 2] = dot_of_query;
    }
    return a;
}

/* Sums of eight rows' x over those at distance 0, 1, 2-3, 4-7 (exclusive or) from the item's own row. */
float4 sum_distances(float x) {
    const float one = as_float(shuffle_xor(as_uint(x), 4));
    const float pair = x + one;
    const float two = as_float(shuffle_xor(as_uint(pair), 8));
    return (float4)(x, one, two, as_float(shuffle_xor(as_uint(pair + two), 16)));
}

/* The diagonal: keys and queries are the same 16 tokens.  dots: [level][query]. */
uint4 weigh_near(float4 ds[2], uint4 product, float4 dp[2], const __local float2 *gates, const __local float *scales,
                 float key_dots[2], __local float *dots) {
    const uint r = warp_lane() / 4, p = warp_lane() % 4;
    const float2 products[4] = {unpack(product.x), unpack(product.y), unpack(product.z), unpack(product.w)};
    const float2 keys[2] = {gates[r], gates[r + 8]};
    float w[8];
#pragma unroll
    for (uint half_q = 0; half_q < 2; half_q++) {
#pragma unroll
        for (uint e = 0; e < 2; e++) {
            const uint t = 8 * half_q + 2 * p + e;
            const float2 query = gates[t];
            const float scale = scales[t * 8 + bit_length(r ^ (2 * p + e))];
            /* The keys of the same eight, up to the query. */
            const float near_ds = half_q == 0 ? (e == 0 ? ds[0].x : ds[0].y) : (e == 0 ? ds[1].z : ds[1].w);
            const float near_product = half_q == 0 ? (e == 0 ? products[0].x : products[0].y)
                                                   : (e == 0 ? products[3].x : products[3].y);
            const float kept = r <= 2 * p + e ? decay_between(query, keys[half_q]) : 0.0f;
            const float4 levels = sum_distances(near_ds * near_product * kept);
            if (r == 2 * p + e) {
                dots[t] = levels.x;
                dots[NB_TILE + t] = levels.y;
                dots[2 * NB_TILE + t] = levels.z;
                dots[3 * NB_TILE + t] = levels.w;
            }
            const float near_weight = near_product * kept * scale, near_gradient = near_ds * kept * scale;
            key_dots[half_q] = fma(near_ds, near_weight, key_dots[half_q]);
            if (half_q == 0) {
                w[e] = near_weight;
                w[2 + e] = 0.0f;
                dp[0] += e == 0 ? (float4)(near_gradient, 0.0f, 0.0f, 0.0f) : (float4)(0.0f, near_gradient, 0.0f, 0.0f);
                if (r == 0) {
                    dots[4 * NB_TILE + t] = 0.0f;
                }
            } else {
                /* The eight before. */
                const float far_ds = e == 0 ? ds[1].x : ds[1].y;
                const float far_product = e == 0 ? products[2].x : products[2].y;
                const float far_kept = decay_between(query, keys[0]), far_scale = scales[t * 8 + 4];
                const float sum = sum_rows(far_ds * far_product * far_kept);
                if (r == 0) {
                    dots[4 * NB_TILE + t] = sum;
                }
                w[4 + e] = far_product * far_kept * far_scale;
                w[6 + e] = near_weight;
                key_dots[0] = fma(far_ds, w[4 + e], key_dots[0]);
                const float far_gradient = far_ds * far_kept * far_scale;
                dp[1] += e == 0 ? (float4)(far_gradient, 0.0f, near_gradient, 0.0f)
                                : (float4)(0.0f, far_gradient, 0.0f, near_gradient);
            }
        }
    }
    return (uint4)(pack(w[0], w[1]), pack(w[2], w[3]), pack(w[4], w[5]), pack(w[6], w[7]));
}

/* 16 keys times two sixteens of queries, by their columns of V. */
void multiply_values(float4 ds[2][2], const __local uint4 *v, const __local uint4 *d_o, uint key, uint query) {
#pragma unroll
    for (uint j = 0; j < 2; j++) {
        ds[j][0] = ds[j][1] = (float4)(0.0f);
    }
#pragma unroll
    for (uint part = 0; part < TILES_V; part++) {
#pragma unroll
        for (uint inner = 0; inner < 4; inner++) {
            const uint4 a = load_a(v + part * COLUMN_TILE, 8, key, 2 * inner);
#pragma unroll
            for (uint j = 0; j < 2; j++) {
                const uint4 y = load_b_transposed(d_o + part * COLUMN_TILE, 8, query + 16 * j, 2 * inner);
                mma(&ds[j][0], a, y.x, y.y);
                mma(&ds[j][1], a, y.z, y.w);
            }
        }
    }
}

/* k q^T of 16 keys and 16 queries, rounded. */
uint4 multiply_keys(const __local uint4 *keys, const __local uint4 *queries, uint key, uint query, float scale) {
    float4 c[2];
    c[0] = c[1] = (float4)(0.0f);
#pragma unroll
    for (uint step = 0; step < K_STEPS; step++) {
        const uint4 a = load_a(keys, K_PIECES, key, 2 * step);
        const uint4 y = load_b_transposed(queries, K_PIECES, query, 2 * step);
        mma(&c[0], a, y.x, y.y);
        mma(&c[1], a, y.z, y.w);
    }
    c[0] *= scale;
    c[1] *= scale;
    return (uint4)(pack(c[0].x, c[0].y), pack(c[0].z, c[0].w), pack(c[1].x, c[1].y), pack(c[1].z, c[1].w));
}

/* Puts a sixteen of d(q k^T)^T, rounded, into a tile of keys' rows. */
void store_products(__local uint4 *tile, const float4 dp[2], uint key, uint query) {
    const uint r = warp_lane() / 4, p = warp_lane() % 4;
#pragma unroll
    for (uint i = 0; i < 2; i++) {
        __local uint *upper = (__local uint *)&tile[swizzled(key + r, 8, query / 8 + i)];
        __local uint *lower = (__local uint *)&tile[swizzled(key + r + 8, 8, query / 8 + i)];
        upper[p] = pack(dp[i].x, dp[i].y);
        lower[p] = pack(dp[i].z, dp[i].w);
    }
}

/* 16 rows of a tile (or its transpose) of products times a half of K's columns of q or k. */
void add_rows(float4 sum[NV_K / 16], const __local uint4 *products, const __local uint4 *rows, uint row, uint half_k,
              int transposed) {
#pragma unroll
    for (uint step = 0; step < 4; step++) {
        const uint4 a = transposed ? load_a_transposed(products, 8, 16 * step, row / 8) : load_a(products, 8, row, 2 * step);
#pragma unroll
        for (uint i = 0; i < NV_K / 32; i++) {
            const uint4 y = load_b(rows, K_PIECES, 16 * step, half_k * (NV_K / 16) + 2 * i);
            mma(&sum[2 * i], a, y.x, y.y);
            mma(&sum[2 * i + 1], a, y.z, y.w);
        }
    }
}

void clear_rows(float4 sum[NV_K / 16]) {
#pragma unroll
    for (uint i = 0; i < NV_K / 16; i++) {
        sum[i] = (float4)(0.0f);
    }
}

void store_rows(__global float *to, const float4 sum[NV_K / 16], uint row, uint half_k, float scale) {
    to += (row + warp_lane() / 4) * NV_K + half_k * (NV_K / 2) + 2 * (warp_lane() % 4);
#pragma unroll
    for (uint i = 0; i < NV_K / 16; i++) {
        *(__global float2 *)(to + 8 * i) = scale * sum[i].xy;
        *(__global float2 *)(to + 8 * NV_K + 8 * i) = scale * sum[i].zw;
    }
}

/* Two rows of 32 columns of dv: an item writes 8 columns of each. */
void store_columns(__global ushort *to, const float4 sum[4], int row, int rows, int column, int aligned) {
#pragma unroll
    for (int lower = 0; lower < 2; lower++) {
        const uint4 x = transpose_quad(lower ? (uint4)(pack(sum[0].z, sum[0].w), pack(sum[1].z, sum[1].w),
                                                      pack(sum[2].z, sum[2].w), pack(sum[3].z, sum[3].w))
                                            : (uint4)(pack(sum[0].x, sum[0].y), pack(sum[1].x, sum[1].y),
                                                      pack(sum[2].x, sum[2].y), pack(sum[3].x, sum[3].y)));
        if (row + 8 * lower < rows && column < DIM_V) {
            __global ushort *at = to + (ulong)(row + 8 * lower) * (HEADS * DIM_V) + column;
            if (aligned) {
                *(__global uint4 *)at = x;
            } else {
                const uint pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    at[2 * i] = (ushort)pairs[i];
                    at[2 * i + 1] = (ushort)(pairs[i] >> 16);
                }
            }
        }
    }
}

/* What a turn of the tiles takes from memory. */
typedef struct tile_inputs {
    uint4 v[TILES_V * COLUMN_TILE];
    uint4 d_o[2][TILES_V * COLUMN_TILE]; /* of the tile and the one behind it */
    uint4 adjoint[TILES_V * STATE];
    float2 gates[NB_CHUNK];   /* of the same two tiles */
    float4 factors[NB_CHUNK];
    float scales[NB_TILE * 8]; /* levels 0 to 6 of the tile, 7 of the one behind */
} tile_inputs;

/* A tile of keys, with the queries of the same tile and, in a chunk's first half, of the second. */
__kernel __attribute__((reqd_work_group_size(NB_ITEMS, 1, 1))) void
nb_tiles(const loglin_nvidia_gradients call, __global float *ws, ulong ws_offset, const __global ushort *v,
         ulong v_offset, const __global ushort *d_o, ulong d_o_offset, const __global weight *level_scales,
         ulong level_scales_offset, __global ushort *dv, ulong dv_offset, __global weight *dlevel_scales,
         ulong dlevel_scales_offset, uint aligned) {
    __local tile_inputs inputs[2];
    __local uint4 keys[ROW_TILE];
    __local float4 exchange[2][4][4][32];
    __local float near_dots[5][NB_TILE], far_dots[2][4][NB_TILE];
    const uint item = get_local_id(0), lane = item % 32, warp = item / 32, key = warp % 4 * 16, half_q = warp / 4;
    const uint r = lane / 4, p = lane % 4;
    const ulong id = get_group_id(0), padded = (ulong)call.chunks * NB_CHUNK;
    const uint block = id % HEAD_BLOCKS, group = id / HEAD_BLOCKS % GROUPS, b = id / (HEAD_BLOCKS * GROUPS) % call.batch;
    const uint tile = 2 * call.chunks - 1 - id / (HEAD_BLOCKS * GROUPS) / call.batch, n = tile / 2;
    const uint first = tile * NB_TILE, first_head = group * GROUP_HEADS + block * BLOCK_HEADS;
    const int rows = (int)call.length - (int)first;
    const uint blocks = tile % 2 == 0 && rows > NB_TILE ? 2 : 1;
    const int has_adjoint = n + 1 < call.chunks;
    const ulong bg = (ulong)b * GROUPS + group, first_bh = (ulong)b * HEADS + first_head;
    const ulong first_column = (((ulong)b * call.length + first) * HEADS + first_head) * DIM_V;
    const ulong level_row = (((ulong)b * call.length + first) * HEADS + first_head) * LEVELS;
    const __global uint4 *query_rows = (const __global uint4 *)place(ws, ws_offset, call.queries) +
                                       (bg * padded + first) * K_PIECES;

    fetch_tile(keys, (const __global uint4 *)place(ws, ws_offset, call.keys) + (bg * padded + first) * K_PIECES, NB_TILE,
               K_PIECES, item, NB_ITEMS);
    for (uint i = 0; i < blocks; i++) {
        fetch_tile(inputs[i].adjoint, query_rows + i * ROW_TILE, NB_TILE, K_PIECES, item, NB_ITEMS);
    }
    wait_for_copies();
    barrier(CLK_LOCAL_MEM_FENCE);
    uint4 products[2][2];
    float4 gradients[2][2][2];
#pragma unroll
    for (uint i = 0; i < 2; i++) {
#pragma unroll
        for (uint j = 0; j < 2; j++) {
            gradients[i][j][0] = gradients[i][j][1] = (float4)(0.0f);
            products[i][j] = i < blocks ? multiply_keys(keys, inputs[i].adjoint, key, half_q * 32 + 16 * j, call.scale)
                                        : (uint4)(0);
        }
    }
    barrier(CLK_LOCAL_MEM_FENCE);

    for (uint step = 0; step <= BLOCK_HEADS; step++) {
        wait_for_copies();
        barrier(CLK_LOCAL_MEM_FENCE);
        if (step < BLOCK_HEADS) {
            __local tile_inputs *to = &inputs[step % 2];
            const ulong bh = first_bh + step;
            const ulong column = first_column + (ulong)step * DIM_V;
            for (uint i = 0; i < TILES_V; i++) {
                fetch_columns(to->v + i * COLUMN_TILE, v + v_offset + column, i, rows, aligned & 1, item, NB_ITEMS);
                for (uint j = 0; j < blocks; j++) {
                    fetch_columns(to->d_o[j] + i * COLUMN_TILE,
                                  d_o + d_o_offset + column + (ulong)j * (NB_TILE * HEADS * DIM_V), i,
                                  rows - (int)j * NB_TILE, aligned & 1, item, NB_ITEMS);
                }
                if (has_adjoint) {
                    fetch_tile(to->adjoint + i * STATE, (const __global uint4 *)place(ws, ws_offset, call.adjoints) +
                                                            ((bh * TILES_V + i) * call.chunks + n) * STATE,
                               NV_K, 8, item, NB_ITEMS);
                }
            }
            const __global float2 *gates = (const __global float2 *)place(ws, ws_offset, call.gates) + bh * padded + first;
            const __global float4 *factors =
                (const __global float4 *)place(ws, ws_offset, call.factors) + bh * padded + first;
            if (item < blocks * NB_TILE / 2) {
                copy_16(&to->gates[2 * item], &gates[2 * item], 1);
            }
            if (item < blocks * NB_TILE) {
                copy_16(&to->factors[item], &factors[item], 1);
            }
            for (uint i = item; i < NB_TILE * 8; i += NB_ITEMS) {
                const uint level = i % 8, row = i / 8 + (level == 7 ? NB_TILE : 0);
                fetch_scale(&to->scales[i], level_scales,
                            level_scales_offset + level_row + (ulong)row * (HEADS * LEVELS) + step * LEVELS + level,
                            (int)row < rows && level < LEVELS && (level < 7 || blocks == 2));
            }
        }
        if (step == 0) {
            continue;
        }
        const uint h = step - 1;
        const __local tile_inputs *in = &inputs[h % 2];
        uint4 weights[2][2];
        float key_dots[2] = {0.0f, 0.0f};
#pragma unroll
        for (uint i = 0; i < 2; i++) {
            float4 ds[2][2];
            if (i < blocks && (i == 1 || half_q * 32 + 16 >= key)) {
                multiply_values(ds, in->v, in->d_o[i], key, half_q * 32);
            }
#pragma unroll
            for (uint j = 0; j < 2; j++) {
                const uint query = half_q * 32 + 16 * j;
                weights[i][j] = (uint4)(0);
                if (i < blocks && (i == 1 || query >= key)) {
                    if (i == 0 && query == key) {
                        weights[i][j] = weigh_near(ds[j], products[i][j], gradients[i][j], in->gates + key,
                                                   in->scales + key * 8, key_dots, &near_dots[0][key]);
                    } else {
                        float query_weight[4], query_scale[4], key_weight[2];
                        const float between =
                            i == 1 ? 1.0f : decay_between(in->gates[query - 1], in->gates[key + 15]);
                        const int level = i == 1 ? 7 : 4 + bit_length((query ^ key) / 16);
#pragma unroll
                        for (uint e = 0; e < 4; e++) {
                            const uint t = query + 8 * (e / 2) + 2 * p + e % 2;
                            query_weight[e] = i == 1 ? in->factors[NB_TILE + t].z : in->factors[t].x * between;
                            query_scale[e] = in->scales[t * 8 + level];
                        }
#pragma unroll
                        for (uint e = 0; e < 2; e++) {
                            const float4 own = in->factors[key + r + 8 * e];
                            key_weight[e] = i == 1 ? own.z : own.y;
                        }
                        weights[i][j] = weigh_far(ds[j], products[i][j], gradients[i][j], query_weight, query_scale,
                                                  key_weight, key_dots, &far_dots[i][key / 16][query]);
                    }
                }
            }
        }

#pragma unroll
        for (uint part = 0; part < TILES_V; part++) {
            float4 sum[8];
#pragma unroll
            for (uint i = 0; i < 8; i++) {
                sum[i] = (float4)(0.0f);
            }
            if (has_adjoint) {
#pragma unroll
                for (uint i = 0; i < K_STEPS / 2; i++) {
                    const uint k_step = half_q * (K_STEPS / 2) + i;
                    const uint4 a = load_a(keys, K_PIECES, key, 2 * k_step);
#pragma unroll
                    for (uint j = 0; j < 4; j++) {
                        const uint4 y = load_b(in->adjoint + part * STATE, 8, 16 * k_step, 2 * j);
                        mma(&sum[2 * j], a, y.x, y.y);
                        mma(&sum[2 * j + 1], a, y.z, y.w);
                    }
                }
                const float upper = in->factors[key + r].w * STATE_UNIT, lower = in->factors[key + r + 8].w * STATE_UNIT;
#pragma unroll
                for (uint i = 0; i < 8; i++) {
                    sum[i] *= (float4)(upper, upper, lower, lower);
                    const float2 first_v = tile_pair(in->v + part * COLUMN_TILE, 8, key + r, 8 * i + 2 * p);
                    const float2 second_v = tile_pair(in->v + part * COLUMN_TILE, 8, key + r + 8, 8 * i + 2 * p);
                    key_dots[0] = fma(first_v.x, sum[i].x, fma(first_v.y, sum[i].y, key_dots[0]));
                    key_dots[1] = fma(second_v.x, sum[i].z, fma(second_v.y, sum[i].w, key_dots[1]));
                }
            }
#pragma unroll
            for (uint i = 0; i < 2; i++) {
#pragma unroll
                for (uint j = 0; j < 2; j++) {
                    const uint query = half_q * 32 + 16 * j;
                    if (i < blocks && (i == 1 || query >= key)) {
#pragma unroll
                        for (uint c = 0; c < 4; c++) {
                            const uint4 y = load_b(in->d_o[i] + part * COLUMN_TILE, 8, query, 2 * c);
                            mma(&sum[2 * c], weights[i][j], y.x, y.y);
                            mma(&sum[2 * c + 1], weights[i][j], y.z, y.w);
                        }
                    }
                }
            }
            /* The two warps of the same keys: each gets the other's part of half of the columns. */
            if (part > 0) {
                barrier(CLK_LOCAL_MEM_FENCE);
            }
#pragma unroll
            for (uint i = 0; i < 4; i++) {
                exchange[half_q][key / 16][i][lane] = half_q == 0 ? sum[4 + i] : sum[i];
            }
            barrier(CLK_LOCAL_MEM_FENCE);
            float4 own[4];
#pragma unroll
            for (uint i = 0; i < 4; i++) {
                own[i] = (half_q == 0 ? sum[i] : sum[4 + i]) + exchange[1 - half_q][key / 16][i][lane];
            }
            store_columns(dv + dv_offset + first_column + (ulong)h * DIM_V, own, (int)(key + r), rows,
                          (int)(part * NB_COLUMNS + half_q * 32 + 8 * p), aligned >> 1);
        }

        /* What gates and level scales need: the barriers above have made the dots visible. */
        __global float *all_dots = (__global float *)place(ws, ws_offset, call.dots) + (first_bh + h) * padded + first;
        const ulong dots_stride = (ulong)call.batch * HEADS * padded;
        key_dots[0] = sum_quad(key_dots[0]);
        key_dots[1] = sum_quad(key_dots[1]);
        if (p == 0) {
            all_dots[(6 + half_q) * dots_stride + key + r] = key_dots[0];
            all_dots[(6 + half_q) * dots_stride + key + r + 8] = key_dots[1];
        }
        const uint row = item % NB_TILE;
        const ulong gradient_row = dlevel_scales_offset + level_row + (ulong)row * (HEADS * LEVELS) + h * LEVELS;
        if (item < NB_TILE) {
            float sum = 0.0f;
#pragma unroll
            for (uint level = 0; level < 7; level++) {
                float gradient = 0.0f;
                if (level < 5) {
                    gradient = near_dots[level][row];
                } else if (level == 5) {
                    gradient = row / 16 % 2 == 1 ? far_dots[0][row / 16 - 1][row] : 0.0f;
                } else {
                    gradient = row >= 32 ? far_dots[0][0][row] + far_dots[0][1][row] : 0.0f;
                }
                sum = fma(gradient, in->scales[row * 8 + level], sum);
                if (dlevel_scales && (int)row < rows && level < LEVELS) {
                    store_weight(dlevel_scales, gradient_row + level, gradient);
                }
            }
            all_dots[4 * dots_stride + row] = sum;
            if (dlevel_scales && tile % 2 == 0 && (int)row < rows && 7 < LEVELS) {
                store_weight(dlevel_scales, gradient_row + 7, 0.0f);
            }
        } else if (item < 2 * NB_TILE && blocks == 2) {
            const float gradient =
                (far_dots[1][0][row] + far_dots[1][1][row]) + (far_dots[1][2][row] + far_dots[1][3][row]);
            all_dots[5 * dots_stride + NB_TILE + row] = gradient * in->scales[row * 8 + 7];
            if (dlevel_scales && (int)row + NB_TILE < rows && 7 < LEVELS) {
                store_weight(dlevel_scales, gradient_row + (ulong)NB_TILE * (HEADS * LEVELS) + 7, gradient);
            }
        }
    }

    /* What all heads have added up to. */
    barrier(CLK_LOCAL_MEM_FENCE);
#pragma unroll
    for (uint i = 0; i < 2; i++) {
        if (i < blocks) {
            fetch_tile(inputs[i].adjoint, query_rows + i * ROW_TILE, NB_TILE, K_PIECES, item, NB_ITEMS);
#pragma unroll
            for (uint j = 0; j < 2; j++) {
                store_products(inputs[i].v, gradients[i][j], key, half_q * 32 + 16 * j);
            }
        }
    }
    wait_for_copies();
    barrier(CLK_LOCAL_MEM_FENCE);
    const ulong part_size = (ulong)HEAD_BLOCKS * call.batch * GROUPS * padded * NV_K;
    const ulong at = ((((ulong)block * call.batch + b) * GROUPS + group) * padded + first) * NV_K;
    __global float *query_parts = (__global float *)place(ws, ws_offset, call.query_parts) + at;
    __global float *key_parts = (__global float *)place(ws, ws_offset, call.key_parts) + at;
    float4 sum[NV_K / 16];
    clear_rows(sum);
    for (uint i = 0; i < blocks; i++) {
        add_rows(sum, inputs[i].v, inputs[i].adjoint, key, half_q, 0);
    }
    store_rows(key_parts + part_size, sum, key, half_q, call.scale);
    for (uint i = 0; i < blocks; i++) {
        clear_rows(sum);
        add_rows(sum, inputs[i].v, keys, key, half_q, 1);
        store_rows(query_parts + (1 + i) * part_size + i * (NB_TILE * NV_K), sum, key, half_q, call.scale);
    }
}

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
                                       bh * (4 * call.chunks) * CHUNK_LEVELS;
    for (uint e = item; e + 1 < call.chunks; e += NB_ITEMS) {
        float sum = 0.0f;
        for (uint i = 0; i < TILES_V * SLICES; i++) {
            sum += crossings[i * call.chunks + e];
        }
        crossings[e] = sum;
    }
    /* Block by block: an item has all chunks of one, from the last to the first. */
    for (uint start = item; start < call.chunks; start += NB_ITEMS) {
        const uint j = start > 0 ? 31 - clz(start & (0 - start)) : 0;
        float sum = 0.0f;
        for (uint n = min(start + (1u << j), call.chunks); start > 0 && n-- > start;) {
            for (uint i = 0; i < 4; i++) {
                sum += level_dots[(4 * n + i) * CHUNK_LEVELS + j];
            }
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
    const int has_second_tile = n * NB_CHUNK + NB_TILE < call.length;
    float running[4], sum = 0.0f;
#pragma unroll
    for (uint i = 0; i < 4; i++) {
        const uint t = last - i;
        sum += ((dots[t] + dots[stride + t]) + (dots[2 * stride + t] + dots[3 * stride + t])) +
               ((dots[4 * stride + t] + (t >= NB_TILE && has_second_tile ? dots[5 * stride + t] : 0.0f)) -
                (dots[6 * stride + t] + dots[7 * stride + t]));
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
    const __global float *parts = (const __global float *)place(ws, ws_offset, is_key ? call.key_parts : call.query_parts) +
                                  row * NV_K;
    const uint kinds = is_key || t % NB_CHUNK < NB_TILE ? 2 : 3;
    const __global ushort *x = is_key ? k + k_offset + to : q + q_offset + to;
    __global ushort *gradients = is_key ? dk + dk_offset + to : dq + dq_offset + to;
    float sums[NV_K / 32], values[NV_K / 32], square = 0.0f, product = 0.0f;
#pragma unroll
    for (uint i = 0; i < NV_K / 32; i++) {
        const uint column = i * 32 + warp_lane();
        sums[i] = 0.0f;
        for (uint j = 0; j < kinds * HEAD_BLOCKS; j++) {
            sums[i] += parts[j * (rows * NV_K) + column];
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
