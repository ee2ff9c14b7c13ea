/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The scalar-gated backward pass on NVIDIA's matrix units, weak partition.  It needs nothing of a forward pass.
 *
 * A sequence is cut into N chunks of 128 tokens, and these into tiles of 64.  Chunk n reads, for every set bit j of n,
 * the state of the block of 2^j chunks that ends with chunk e = (n >> j << j) - 1; every e < N - 1 is the end of one
 * such block, the left one of a pair.  A block's adjoint is what its right neighbour gives; adjoints flow down the tree
 * until each chunk has one that holds everything behind it.
 *     prepare   q and k, normalised and padded; the gates' running sums
 *     since     the gates' sums over chunks; with wgmma, maps for copies of boxes
 *     weights   what weighs tokens in states and adjoints
 *     sums      states of blocks of up to 2^UNIT_BITS chunks, and adjoints of all blocks, larger ones in parts
 *     tree      states up, adjoints down
 *     rows      the levels above a chunk: q S gives dlevel_scales, dO S^T dq
 *     tiles     dv and dk: K A and V A^T from behind the chunk, and masked products inside it; from these
 *               dlevel_scales, and what dq gets from d(q k^T), summed over the heads first
 *     crossings, gates    dg
 *     reduce    dq and dk
 * Work-groups go through the heads of a group, so dq and dk of all heads add up in registers.
 *
 * dg_t sums dO . o's shares over all pairs of a query at or behind t and a key before t.  In a span of chunks that is a
 * running sum of dO . o - v . dv, inside a chunk both from the same products; pairs that cross a span's end are counted anew
 * there, from products of states and adjoints, so that rounding errors do not add up along the sequence.  What the running
 * sum misses of the count at the span's other end is spread over its tokens.
 *
 * States and adjoints lie as rows of K, 64 columns of V each, rounded to storage, decayed to the block's end.  Their rows
 * and those of local tiles are pieces of 8 columns, piece c of row r at place c ^ r % 8.
 *
 * Given: NV_K (dim_k rounded up to a multiple of 64), DIM_K, DIM_V, HEADS, GROUPS, LEVELS (columns of level_scales),
 * CHUNK_LEVELS (those above a chunk that exist), NORMALIZE, STORAGE, WEIGHT_STORAGE, UNIT_BITS (1 or 2),
 * SUM_TURNS (heads and tiles of V that a work-group of the sums takes one by one), ROW_HEADS and BLOCK_HEADS (heads of a group
 * that one of rows, and of tiles, takes one by one), TILE_STAGES (heads that one of tiles has room for).
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
#define ROW_BLOCKS (GROUP_HEADS / ROW_HEADS)
#define UNIT (1 << UNIT_BITS)
#define CHUNK_LEVEL 8 /* level of the chunk before */
#define SLOTS (CHUNK_LEVELS > 0 ? CHUNK_LEVELS : 1)
#define SCALES_ROW (SLOTS | 1)
#define BOX_SCALES (NB_SCALES + SCALE_PIECE) /* a chunk's level scales, from a multiple of 16 bytes on */

/* States are stored divided by this, for half's range. */
#define STATE_UNIT (STORAGE == 1 ? 64.0f : 1.0f)

/* ---- Common ------------------------------------------------------------------------------------------------------ */

float decay(float x) { return native_exp2(x * 1.44269504f); }

/* Of the difference of two sums with remainders. */
float decay_between(float2 late, float2 early) { return decay((late.x - early.x) + (late.y - early.y)); }

__global char *place(__global float *ws, ulong offset, ulong at) {
    return (__global char *)(((ulong)(ws + offset) + 15) & ~(ulong)15) + at;
}

/* Level scales come as boxes: in rows of multiples of 16 bytes, and of a head not fewer than a chunk has. */
#define SCALE_BOXES (WGMMA && HEADS * LEVELS % SCALE_PIECE == 0 && LEVELS >= CHUNK_LEVEL)

#if WGMMA
__global heads_map *map_of(const loglin_nvidia_gradients call, __global float *ws, ulong ws_offset, uint i) {
    return (__global heads_map *)(((ulong)place(ws, ws_offset, call.maps) + 127) & ~(ulong)127) + i;
}
#endif

/* Where an item finds its row of an 8 x 8 matrix: for A of a tile as it lies, or for B of columns. */
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

/* Starts copying a state or adjoint, whose pieces lie as in a local tile. */
void fetch_state(__local uint4 *to, const __global uint4 *from, uint item, uint items) {
#pragma unroll 1
    for (uint i = item; i < STATE; i += items) {
        copy_16(&to[i], &from[i], 1);
    }
}

/* Eight columns, whatever their alignment. */
uint4 load_piece(const __global ushort *x) {
    return (uint4)(x[0] | (uint)x[1] << 16, x[2] | (uint)x[3] << 16, x[4] | (uint)x[5] << 16, x[6] | (uint)x[7] << 16);
}

/* A level scale to local memory; zero where it is not wanted. */
void fetch_scale(__local stored_scale *to, const __global weight *from, ulong at, int wanted) {
#if WEIGHT_STORAGE == 0
    copy_some_of_4(to, from + at, wanted ? 4 : 0);
#else
    *to = wanted ? ((const __global stored_scale *)from)[at] : (stored_scale)0;
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

/* The end of the block that chunk n reads at level j, and of the block that has it as its right part. */
uint block_end(uint n, uint j) { return (n >> j << j) - 1; }

/* ---- prepare ----------------------------------------------------------------------------------------------------- */

/* A warp copies some rows of q or k, padded. */
void prepare_rows(const loglin_nvidia_gradients call, __global ushort *to, const __global ushort *x, uint first) {
    const uint padded = call.chunks * NB_CHUNK, bg = first / padded, first_token = first - bg * padded;
    x += (((ulong)(bg / GROUPS) * call.length + first_token) * GROUPS + bg % GROUPS) * DIM_K;
    to += (ulong)first * NV_K;
    float values[NB_PREPARE_ROWS][NV_K / 32];
#pragma unroll
    for (uint row = 0; row < NB_PREPARE_ROWS; row++) {
#pragma unroll
        for (uint i = 0; i < NV_K / 32; i++) {
            const uint column = i * 32 + warp_lane();
            const int wanted = first_token + row < call.length && column < DIM_K;
            values[row][i] = wanted ? unpack(x[row * (GROUPS * DIM_K) + column]).x : 0.0f;
        }
    }
#pragma unroll
    for (uint row = 0; row < NB_PREPARE_ROWS; row++) {
        float sum = 0.0f;
#pragma unroll
        for (uint i = 0; i < NV_K / 32; i++) {
            sum = fma(values[row][i], values[row][i], sum);
        }
        const float norm = NORMALIZE ? 1.0f / sqrt(sum_warp(sum) + 1e-6f) : 1.0f;
#pragma unroll
        for (uint i = 0; i < NV_K / 32; i++) {
            to[row * NV_K + i * 32 + warp_lane()] = (ushort)pack(values[row][i] * norm, 0.0f);
        }
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
 * A warp sums a chunk's gates; the warps beside it have the next heads, whose gates lie between these.  The factors of a
 * token: the decay from before its 16 tokens, to the end of these, between it and the middle of the chunk, to the chunk's end.
 */
void sum_gates(const loglin_nvidia_gradients call, __global float *ws, ulong ws_offset, const __global float *g,
               uint id, __local double *sums) {
    const uint lane = warp_lane(), n = id / HEADS % call.chunks, b = id / HEADS / call.chunks, head = id % HEADS;
    const ulong bh = (ulong)b * HEADS + head, at = (bh * call.chunks + n) * NB_CHUNK;
    const ulong first = ((ulong)b * call.length + (ulong)n * NB_CHUNK) * HEADS + head;
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
    __global float2 *gates = (__global float2 *)place(ws, ws_offset, call.gates) + at;
    __global float *factors = (__global float *)place(ws, ws_offset, call.factors) + 4 * at;
#pragma unroll
    for (uint i = 0; i < 4; i++) {
        const uint t = i * 32 + lane, base = t / 16 * 16;
        const double own = sums[t], middle = sums[NB_TILE - 1];
        gates[t] = split(own);
        factors[t] = decay((float)(own - (base > 0 ? sums[base - 1] : 0.0)));
        factors[NB_CHUNK + t] = decay((float)(sums[base + 15] - own));
        factors[2 * NB_CHUNK + t] = decay((float)(t < NB_TILE ? middle - own : own - middle));
        factors[3 * NB_CHUNK + t] = decay((float)(sums[NB_CHUNK - 1] - own));
    }
    if (lane == 0) {
        ((__global float2 *)place(ws, ws_offset, call.since))[bh * (call.chunks + 1) + n + 1] =
            split(sums[NB_CHUNK - 1]);
    }
}

/* A warp has some rows of q or of k, or a chunk and head. */
__kernel __attribute__((reqd_work_group_size(NB_ITEMS, 1, 1))) void
nb_prepare(const loglin_nvidia_gradients call, __global float *ws, ulong ws_offset, const __global ushort *q,
           ulong q_offset, const __global ushort *k, ulong k_offset, const __global float *g, ulong g_offset) {
    __local double sums[NB_ITEMS / 32][NB_CHUNK];
    const uint warp = get_local_id(0) / 32, group = get_group_id(0), group_rows = NB_ITEMS / 32 * NB_PREPARE_ROWS;
    const uint row_groups = call.batch * GROUPS * call.chunks * (NB_CHUNK / group_rows);
    if (group < 2 * row_groups) {
        const int is_key = group >= row_groups;
        prepare_rows(call, (__global ushort *)place(ws, ws_offset, is_key ? call.keys : call.queries),
                     is_key ? k + k_offset : q + q_offset,
                     (is_key ? group - row_groups : group) * group_rows + warp * NB_PREPARE_ROWS);
    } else {
        const uint id = (group - 2 * row_groups) * (NB_ITEMS / 32) + warp, count = call.batch * HEADS * call.chunks;
        sum_gates(call, ws, ws_offset, g ? g + g_offset : g, min(id, count - 1), sums[warp]);
    }
}

/* A warp sums the gates of a head's chunks; an item makes the maps. */
__kernel __attribute__((reqd_work_group_size(32, 1, 1))) void
nb_since(const loglin_nvidia_gradients call, __global float *ws, ulong ws_offset, const __global ushort *v,
         ulong v_offset, const __global ushort *d_o, ulong d_o_offset, const __global ushort *dv, ulong dv_offset,
         const __global weight *level_scales, ulong level_scales_offset) {
#if WGMMA
    if (get_global_id(0) == 0) {
        const uint4 sizes = (uint4)(call.batch, call.length, HEADS, DIM_V);
        map_heads(map_of(call, ws, ws_offset, NB_MAP_V), v + v_offset, sizes, 2, NB_CHUNK, NB_COLUMNS, BOX_TILE);
        map_heads(map_of(call, ws, ws_offset, NB_MAP_D_O), d_o + d_o_offset, sizes, 2, NB_CHUNK, NB_COLUMNS, BOX_TILE);
        map_heads(map_of(call, ws, ws_offset, NB_MAP_DV), dv + dv_offset, sizes, 2, 16, NB_COLUMNS, BOX_TILE);
        map_heads(map_of(call, ws, ws_offset, NB_MAP_SCALES), level_scales + level_scales_offset,
                  (uint4)(sizes.xy, 1, HEADS * LEVELS), sizeof(stored_scale), NB_CHUNK, BOX_SCALES, BOX_PLAIN);
    }
#endif
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
