/* SPDX-License-Identifier: Apache-2.0 */
/* The scalar-gated backward pass, see nvidia_backward.cl: states and adjoints of blocks. */

/* ---- weights ----------------------------------------------------------------------------------------------------- */

#define WEIGHT_SLOTS (1 + CHUNK_LEVELS)

/* Where a pair of a chunk's tokens stands: an item finds what the columns of A of 64 tokens take in a row. */
uint weight_place(uint pair) { return pair / 32 * 32 + pair % 4 * 8 + pair % 32 / 4; }

#define WEIGHT_HEADS (NB_ITEMS / 32)
#define WEIGHT_COLUMNS (WEIGHT_HEADS * SLOTS)
#define WEIGHT_ROW (WEIGHT_COLUMNS | 1)
#define WEIGHT_TOKENS (NB_ITEMS / WEIGHT_COLUMNS) /* whose level scales are loaded side by side */

/*
 * A work-group has a chunk of some heads, a warp one of them: what weighs its tokens in its state, and in the adjoint of each
 * level, decayed from the start of its block or of its unit.  Level scales come through local memory, [token][head][level].
 */
__kernel __attribute__((reqd_work_group_size(NB_ITEMS, 1, 1))) void
nb_weights(const loglin_nvidia_gradients call, __global float *ws, ulong ws_offset, const __global weight *level_scales,
           ulong level_scales_offset) {
    __local float scales[NB_CHUNK * WEIGHT_ROW];
    const uint bundles = (HEADS + WEIGHT_HEADS - 1) / WEIGHT_HEADS, first_head = get_group_id(0) % bundles * WEIGHT_HEADS;
    const uint n = get_group_id(0) / bundles % call.chunks, b = get_group_id(0) / bundles / call.chunks;
    const ulong first = ((ulong)b * call.length + n * NB_CHUNK) * HEADS + first_head;
    const uint tokens = min((uint)NB_CHUNK, call.length - n * NB_CHUNK), heads = min((uint)WEIGHT_HEADS, HEADS - first_head);
    const uint column = get_local_id(0) % WEIGHT_COLUMNS, first_token = get_local_id(0) / WEIGHT_COLUMNS;
    const ulong at = level_scales_offset + (first + column / SLOTS) * LEVELS + CHUNK_LEVEL + column % SLOTS;
    if (first_token < WEIGHT_TOKENS && column / SLOTS < heads && ((n >> column % SLOTS) & 1) != 0) {
#pragma unroll 8
        for (uint t = first_token; t < tokens; t += WEIGHT_TOKENS) {
            scales[t * WEIGHT_ROW + column] = load_weight(level_scales, at + t * (HEADS * LEVELS)) * call.scale;
        }
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    const uint warp = get_local_id(0) / 32;
    if (warp >= heads) {
        return;
    }
    const ulong bh = (ulong)b * HEADS + first_head + warp;
    const __global float4 *gates = (const __global float4 *)place(ws, ws_offset, call.gates) +
                                   (bh * call.chunks + n) * (NB_CHUNK / 2);
    const __global float2 *since = (const __global float2 *)place(ws, ws_offset, call.since) + bh * (call.chunks + 1);
    __global uint *to = (__global uint *)place(ws, ws_offset, call.weights) +
                        (bh * call.chunks + n) * (WEIGHT_SLOTS * NB_CHUNK / 2);
    const float2 end = gates[NB_CHUNK / 2 - 1].zw, start = since[n];
    if (warp_lane() == 0) {
        ((__global float *)place(ws, ws_offset, call.decays))[bh * call.chunks + n] = decay(end.x + end.y);
    }
#pragma unroll
    for (uint i = 0; i < 2; i++) {
        const uint pair = i * 32 + warp_lane();
        const float4 own = gates[pair];
        const __local float *scale = scales + 2 * pair * WEIGHT_ROW + warp * SLOTS;
        const int has_left = 2 * pair < tokens, has_right = 2 * pair + 1 < tokens;
        to[weight_place(pair)] = pack(has_left ? decay_between(end, own.xy) : 0.0f,
                                      has_right ? decay_between(end, own.zw) : 0.0f);
        for (uint level = 0; level < CHUNK_LEVELS; level++) {
            if (((n >> level) & 1) != 0) {
                const float2 early = since[max(n >> level << level, n >> UNIT_BITS << UNIT_BITS)];
                to[(1 + level) * (NB_CHUNK / 2) + weight_place(pair)] =
                    pack(has_left ? scale[level] * decay_between(start + own.xy, early) : 0.0f,
                         has_right ? scale[WEIGHT_ROW + level] * decay_between(start + own.zw, early) : 0.0f);
            }
        }
    }
}

/* ---- sums -------------------------------------------------------------------------------------------------------- */

#define SUM_ITEMS (128 * SUM_GROUPS)
#define GROUP_MATRICES (GROUP_HEADS * TILES_V) /* heads and tiles of V of a group */
#define SUM_MATRICES (SUM_GROUPS * SUM_TURNS)
#define SUM_BLOCKS ((GROUP_MATRICES + SUM_MATRICES - 1) / SUM_MATRICES)

/* A chunk's product in a sum: which chunk, and its level; whether the sum goes on, decayed by the chunk; whether it is stored. */
typedef uchar4 sum_product;

/*
 * Lists the products of a unit's chunks, `chunks` from `first`.  An adjoint of level j takes all chunks of a block of 2^j with
 * bit j set that the unit has.  A state goes on from the one of the left part of its block; the third chunk is multiplied
 * twice, by itself and on the way to the fourth.
 */
uint list_products(__local sum_product *to, uint first, uint chunks, int is_state) {
    uint count = 0;
    if (is_state) {
        if (chunks > 2) {
            to[count++] = (sum_product)(2, 0, 0, 1);
        }
        for (uint i = 0; i < (chunks == 3 ? 2 : chunks); i++) {
            to[count++] = (sum_product)(i, 0, i > 0, i != 2);
        }
        return count;
    }
    for (uint level = 0; level < CHUNK_LEVELS; level++) {
        for (uint i = 0; i < chunks; i++) {
            const uint n = first + i, others = (1u << level) - 1;
            if (((n >> level) & 1) != 0) {
                to[count++] = (sum_product)(i, level, 0, i + 1 == chunks || (n & others) == others);
            }
        }
    }
    return count;
}

/* Where a warpgroup is: a head and tile of V of its group, and a product. */
typedef struct sum_position {
    uint matrix, product;
} sum_position;

sum_position next_position(sum_position now, uint products) {
    if (++now.product == products) {
        now.product = 0;
        now.matrix += SUM_GROUPS;
    }
    return now;
}

/* An item's first pair of columns of 16 rows of a state, in uint; piece j of row r stands at place j ^ r % 8. */
uint first_pair(uint warp) { return (16 * warp + warp_lane() / 4) * 32 + warp_lane() % 4; }

/* Neighbouring items exchange pairs of two pieces, so that one has four columns of the left piece, the other of the right. */
void store_sum(__global uint4 *to, const float4 sum[NV_K / 64][8], uint warp) {
    const float unit = 1.0f / STATE_UNIT;
    const uint odd = warp_lane() & 1;
    __global uint *words = (__global uint *)to + (first_pair(warp) - odd);
#pragma unroll
    for (uint j = 0; j < 8; j += 2) {
        __global uint *fours = words + 4 * ((j + odd) ^ warp_lane() / 4);
#pragma unroll
        for (uint m = 0; m < NV_K / 64; m++) {
            const float4 left = sum[m][j] * unit, right = sum[m][j + 1] * unit;
#pragma unroll
            for (uint lower = 0; lower < 2; lower++) {
                const uint x = lower ? pack(left.z, left.w) : pack(left.x, left.y);
                const uint y = lower ? pack(right.z, right.w) : pack(right.x, right.y);
                const uint other = shuffle_xor(odd ? x : y, 1);
                *(__global uint2 *)(fours + m * 2048 + lower * 256) = odd ? (uint2)(other, y) : (uint2)(x, other);
            }
        }
    }
}

void clear_sum(float4 sum[NV_K / 64][8]) {
#pragma unroll
    for (uint m = 0; m < NV_K / 64; m++) {
        tile_clear(sum[m]);
    }
}

void scale_sum(float4 sum[NV_K / 64][8], float weight) {
#pragma unroll
    for (uint m = 0; m < NV_K / 64; m++) {
#pragma unroll
        for (uint i = 0; i < 8; i++) {
            sum[m][i] *= weight;
        }
    }
}

/* Adds (weights rows)^T values over a chunk; the weights are at weight_place. */
void add_chunk(float4 sum[NV_K / 64][8], const __local uint4 *rows, const __local uint4 *values,
               const __local uint4 *weights, uint warp) {
    rows += swizzled(far_row(), K_PIECES, 2 * warp + far_piece());
    weights += warp_lane() % 4 * 2;
#pragma unroll
    for (uint tile = 0; tile < 2; tile++) {
        const uint4 left = weights[tile * 8], right = weights[tile * 8 + 1];
        const uint pairs[8] = {left.x, left.y, left.z, left.w, right.x, right.y, right.z, right.w};
#pragma unroll
        for (uint m = 0; m < NV_K / 64; m++) {
            uint4 a[4];
#pragma unroll
            for (uint step = 0; step < 4; step++) {
                a[step] = load_transposed(rows + (64 * tile + 16 * step) * K_PIECES + 8 * m);
            }
            tile_wait_but_one();
#pragma unroll
            for (uint step = 0; step < 4; step++) {
                a[step] = (uint4)(multiply_pairs(a[step].x, pairs[2 * step]), multiply_pairs(a[step].y, pairs[2 * step]),
                                  multiply_pairs(a[step].z, pairs[2 * step + 1]),
                                  multiply_pairs(a[step].w, pairs[2 * step + 1]));
            }
            tile_multiply(sum[m], a, tile_step(tile_at(values), 4 * tile));
        }
    }
#pragma unroll
    for (uint m = 0; m < NV_K / 64; m++) {
        tile_wait(sum[m]);
    }
}

/* A warpgroup starts copying a chunk's rows of v or dO, from this item's piece; missing rows and columns become zeros. */
void fetch_values(__local uint4 *to, const __global ushort *x, int rows, int aligned, uint item) {
    to += swizzled(item / 8, 8, item % 8);
    if (aligned) {
#pragma unroll
        for (uint i = 0; i < NB_CHUNK / 16; i++) {
            copy_16(to + 128 * i, x + i * (16 * HEADS * DIM_V), (int)(16 * i) < rows);
        }
    } else {
#pragma unroll 1
        for (uint i = 0; i < NB_CHUNK / 16; i++) {
            to[128 * i] = (int)(16 * i) < rows ? load_piece(x + i * (16 * HEADS * DIM_V)) : (uint4)(0);
        }
    }
}

/* What goes with a chunk's values: its tokens' weights, and its decay. */
typedef struct sum_factors {
    uint4 weights[NB_CHUNK / 8];
    float decay;
} sum_factors;

/* What a warpgroup reads: from its group's first head, its unit's first chunk; this item's share. */
typedef struct sum_source {
    const __global ushort *values;
    const __global uint4 *weights;
    const __global float *decays;
    uint chunks; /* of the sequence */
    int rows;    /* from the item's own one to the end */
    int is_state, aligned;
} sum_source;

/* Starts copying what a product takes. */
void fetch_product(__local uint4 *values, __local sum_factors *factors, sum_source from, sum_position at,
                   sum_product product) {
    const uint item = get_local_id(0) % 128, chunk = product.x, head = at.matrix / TILES_V, tile = at.matrix % TILES_V;
    const int has_columns = tile * NB_COLUMNS + item % 8 * 8 < DIM_V;
    fetch_values(values, from.values + (chunk * (NB_CHUNK * HEADS * DIM_V) + head * DIM_V + tile * NB_COLUMNS),
                 has_columns ? from.rows - (int)(chunk * NB_CHUNK) : 0, from.aligned, item);
    if (item < NB_CHUNK / 8) {
        const uint slot = from.is_state ? 0 : 1 + product.y;
        copy_16(&factors->weights[item],
                from.weights + (((ulong)head * from.chunks + chunk) * WEIGHT_SLOTS + slot) * (NB_CHUNK / 8), 1);
    } else if (item == NB_CHUNK / 8) {
        copy_4(&factors->decay, from.decays + (ulong)head * from.chunks + chunk);
    }
}

/*
 * A work-group has a unit of chunks and a block of its group's heads and tiles of V: states, or adjoints of all levels.  The
 * unit's rows of k or q stay in local memory while each warpgroup goes by itself through its heads.
 */
__kernel __attribute__((reqd_work_group_size(SUM_ITEMS, 1, 1))) void
nb_sums(const loglin_nvidia_gradients call, __global float *ws, ulong ws_offset, const __global ushort *v,
        ulong v_offset, const __global ushort *d_o, ulong d_o_offset, uint aligned) {
    __local uint4 values_at[SUM_GROUPS][2][2 * COLUMN_TILE] __attribute__((aligned(1024)));
    __local uint4 rows[UNIT * 2 * ROW_TILE];
    __local sum_factors factors_at[SUM_GROUPS][2];
    __local sum_product products[UNIT * SLOTS];
    __local uint num_products;
    const uint own = same_in_warp(get_local_id(0) / 128), warp = same_in_warp(get_local_id(0) % 128 / 32);
    const uint item = get_local_id(0) % 128;
    /* Late units, which have most levels, go first, states last. */
    const uint units = (call.chunks + UNIT - 1) / UNIT;
    const ulong id = get_group_id(0);
    const uint block = id % SUM_BLOCKS, group = id / SUM_BLOCKS % GROUPS, b = id / (SUM_BLOCKS * GROUPS) % call.batch;
    const uint turn = id / (SUM_BLOCKS * GROUPS) / call.batch;
    const int is_state = turn >= units;
    const uint unit = is_state ? turn - units : units - 1 - turn, first = unit * UNIT;
    const uint chunks = min((uint)UNIT, call.chunks - (is_state ? 1 : 0) - first);
    if (get_local_id(0) == 0) {
        num_products = list_products(products, first, chunks, is_state);
    }
    fetch_tile(rows,
               (const __global uint4 *)place(ws, ws_offset, is_state ? call.keys : call.queries) +
                   ((ulong)(b * GROUPS + group) * call.chunks + first) * (2 * ROW_TILE),
               chunks * NB_CHUNK, K_PIECES, get_local_id(0), SUM_ITEMS);
    wait_for_copies();
    barrier(CLK_LOCAL_MEM_FENCE);

    const uint first_head = group * GROUP_HEADS, last_matrix = min((block + 1) * SUM_MATRICES, (uint)GROUP_MATRICES);
    sum_position now = {block * SUM_MATRICES + own, 0};
    const uint count = num_products, row = first * NB_CHUNK + item / 8;
    if (count == 0 || now.matrix >= last_matrix) {
        return;
    }
    const ulong first_chunk = (ulong)(b * HEADS + first_head) * call.chunks + first;
    const sum_source from = {
        (is_state ? v + v_offset : d_o + d_o_offset) + (((ulong)b * call.length + row) * HEADS + first_head) * DIM_V +
            item % 8 * 8,
        (const __global uint4 *)place(ws, ws_offset, call.weights) + first_chunk * (WEIGHT_SLOTS * NB_CHUNK / 8) + item,
        (const __global float *)place(ws, ws_offset, call.decays) + first_chunk,
        call.chunks, (int)call.length - (int)row, is_state, (int)aligned,
    };
    uint slot = 0;
    float4 sum[NV_K / 64][8];
    fetch_product(values_at[own][0], &factors_at[own][0], from, now, products[0]);
    while (now.matrix < last_matrix) {
        const uint matrix = (b * HEADS + first_head) * TILES_V + now.matrix;
        sum_product product = products[now.product];
        if (!product.z) {
            clear_sum(sum);
        }
        do {
            product = products[now.product];
            now = next_position(now, count);
            wait_for_copies();
            tile_publish();
            warpgroup_barrier(own);
            if (now.matrix < last_matrix) {
                fetch_product(values_at[own][1 - slot], &factors_at[own][1 - slot], from, now, products[now.product]);
            }
            if (product.z) {
                scale_sum(sum, factors_at[own][slot].decay);
            }
            add_chunk(sum, rows + product.x * (2 * ROW_TILE), values_at[own][slot], factors_at[own][slot].weights, warp);
            slot = 1 - slot;
        } while (!product.w);
        const uint n = first + product.x, level = product.y, above = level - UNIT_BITS;
        const int is_part = !is_state && level > UNIT_BITS;
        const ulong to = is_part ? ((ulong)matrix * CHUNK_LEVELS + level) * call.units +
                                       ((unit >> (above + 1) << above) | (unit & ((1u << above) - 1)))
                                 : (ulong)matrix * call.chunks + (is_state ? n : block_end(n, level));
        store_sum((__global uint4 *)place(ws, ws_offset,
                                          is_state ? call.states : is_part ? call.parts : call.adjoints) + to * STATE,
                  sum, warp);
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

float dot_pieces(uint4 state, uint4 adjoint) {
    const state_piece x = unpack_piece(state), y = unpack_piece(adjoint);
    return (dot(x.low, y.low) + dot(x.high, y.high)) * (STATE_UNIT * STATE_UNIT);
}

/* Chunks of the blocks below which all adjoints are a warp's at once, so that none of them is read again; at least a span. */
#define TREE_BITS 3
#define TREE_CHUNKS (1 << TREE_BITS)

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
#pragma unroll 4
            for (uint i = 0; i < units; i++) {
                sum = add_piece(sum, decay_between(since[start + i * UNIT], since[start]),
                                parts[((ulong)j * call.units + first_unit + i) * STATE]);
            }
            adjoints[(ulong)e * STATE] = pack_piece(sum);
        }
        barrier(CLK_GLOBAL_MEM_FENCE);
    }
    for (int j = CHUNK_LEVELS - 1; j >= TREE_BITS; j--) {
        for (uint start = (1u << j) + (warp << (j + 1)); start < call.chunks; start += warps << (j + 1)) {
            const uint e = start - 1, parent = e + (1u << j);
            float crossing = 0.0f;
            if (parent + 1 < call.chunks) {
                const float kept = decay_between(since[parent + 1], since[start]);
                const uint4 above = adjoints[(ulong)parent * STATE];
                crossing = kept * dot_pieces(states[(ulong)e * STATE], above);
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
    for (uint first = warp * TREE_CHUNKS; first + 1 < call.chunks; first += warps * TREE_CHUNKS) {
        uint4 own[TREE_CHUNKS], state[TREE_CHUNKS];
#pragma unroll
        for (uint i = 0; i < TREE_CHUNKS; i++) {
            const uint e = min(first + i, call.chunks - 2);
            own[i] = adjoints[(ulong)e * STATE];
            if (i % NB_SPAN == NB_SPAN - 1 && i + 1 < TREE_CHUNKS) {
                state[i] = states[(ulong)e * STATE];
            }
        }
#pragma unroll
        for (int j = TREE_BITS - 1; j >= 0; j--) {
#pragma unroll
            for (uint i = (1u << j) - 1; i + 1 < TREE_CHUNKS; i += 2u << j) {
                const uint e = first + i, from = i + (1u << j);
                float crossing = 0.0f;
                if (first + from + 1 < call.chunks) {
                    const float kept = decay_between(since[first + from + 1], since[e + 1]);
                    if (j >= NB_SPAN_BITS) {
                        crossing = kept * dot_pieces(state[i], own[from]);
                    }
                    own[i] = pack_piece(add_piece(unpack_piece(own[i]), kept, own[from]));
                    adjoints[(ulong)e * STATE] = own[i];
                }
                if (j >= NB_SPAN_BITS) {
                    crossing = sum_warp(crossing);
                    if (lane == 0 && e + 1 < call.chunks) {
                        crossings[e] = crossing;
                    }
                }
            }
        }
    }
}
