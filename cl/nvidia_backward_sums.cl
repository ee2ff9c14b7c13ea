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
#define SUM_BLOCKS ((GROUP_MATRICES + SUM_TURNS - 1) / SUM_TURNS)
#define CHUNK_COLUMNS (NB_CHUNK * 8) /* uint4 of 64 columns of a chunk */

/* What goes with the values of a unit: of each level, or for states at its place 0, its tokens' weights; and decays. */
typedef struct sum_factors {
    uint4 weights[SLOTS][UNIT][NB_CHUNK / 8];
    float decays[UNIT];
} sum_factors;

/* What a work-group reads: from its group's first head, its unit's first chunk. */
typedef struct sum_source {
    const __global ushort *values; /* from this item's piece */
    const __global uint4 *weights;
    const __global float *decays;
    uint first, chunks; /* the unit's first chunk, and the sequence's chunks */
    int rows;           /* from the item's own one to the end */
    int is_state, aligned;
} sum_source;

/* Starts copying a unit's rows of q or k, 64 columns after the other; a chunk that is not there becomes the last one. */
void fetch_unit(__local uint4 *to, const __global uint4 *from, uint first, uint chunks) {
    for (uint i = get_local_id(0); i < UNIT * NB_CHUNK * K_PIECES; i += SUM_ITEMS) {
        const uint chunk = i / (NB_CHUNK * K_PIECES), row = i / K_PIECES % NB_CHUNK, piece = i % K_PIECES;
        copy_16(&to[(chunk * SUM_GROUPS + piece / 8) * CHUNK_COLUMNS + swizzled(row, 8, piece % 8)],
                &from[(min(first + chunk, chunks - 1) * NB_CHUNK + row) * K_PIECES + piece], 1);
    }
}

/* Starts copying a unit's rows of v or dO, from this item's piece; missing rows and columns become zeros. */
void fetch_values(__local uint4 *to, const __global ushort *x, int rows, int aligned) {
    const uint item = get_local_id(0), step = SUM_ITEMS / 8;
    to += swizzled(item / 8, 8, item % 8);
    if (aligned) {
#pragma unroll 2
        for (uint i = 0; i < UNIT * NB_CHUNK / step; i++) {
            copy_16(to + i * SUM_ITEMS, x + i * (step * HEADS * DIM_V), (int)(i * step) < rows);
        }
    } else {
#pragma unroll 1
        for (uint i = 0; i < UNIT * NB_CHUNK / step; i++) {
            to[i * SUM_ITEMS] = (int)(i * step) < rows ? load_piece(x + i * (step * HEADS * DIM_V)) : (uint4)(0);
        }
    }
}

/* Starts copying what a head and tile of V takes. */
void fetch_matrix(__local uint4 *values, __local sum_factors *factors, sum_source from, uint matrix) {
    const uint item = get_local_id(0), head = matrix / TILES_V, tile = matrix % TILES_V;
    const int has_columns = tile * NB_COLUMNS + item % 8 * 8 < DIM_V;
    fetch_values(values, from.values + (head * DIM_V + tile * NB_COLUMNS), has_columns ? from.rows : 0, from.aligned);
    const __global uint4 *weights = from.weights + (ulong)head * from.chunks * (WEIGHT_SLOTS * NB_CHUNK / 8);
#pragma unroll 1
    for (uint i = item; i < (from.is_state ? 1 : CHUNK_LEVELS) * (UNIT * NB_CHUNK / 8); i += SUM_ITEMS) {
        const uint piece = i % (NB_CHUNK / 8), chunk = i / (NB_CHUNK / 8) % UNIT, level = i / (UNIT * NB_CHUNK / 8);
        if (from.is_state || ((from.first + chunk) >> level & 1) != 0) {
            copy_16(&factors->weights[level][chunk][piece],
                    weights + (chunk * WEIGHT_SLOTS + (from.is_state ? 0 : 1 + level)) * (NB_CHUNK / 8) + piece,
                    from.first + chunk < from.chunks);
        }
    }
    if (from.is_state && item < UNIT && from.first + item < from.chunks) {
        copy_4(&factors->decays[item], from.decays + (ulong)head * from.chunks + item);
    }
}

/* A chunk's values, transposed, as A: a warp has 16 columns of them. */
void load_values(uint4 to[2][4], const __local uint4 *values, uint chunk, uint warp) {
    values += chunk * CHUNK_COLUMNS + swizzled(far_row(), 8, 2 * warp + far_piece());
#pragma unroll
    for (uint tile = 0; tile < 2; tile++) {
#pragma unroll
        for (uint step = 0; step < 4; step++) {
            to[tile][step] = load_transposed(values + (64 * tile + 16 * step) * 8);
        }
    }
}

/* Adds (weights values)^T rows over a chunk, 64 columns of the rows; the weights are at weight_place. */
void add_chunk(float4 sum[8], uint4 values[2][4], const __local uint4 *weights, const __local uint4 *rows) {
    weights += warp_lane() % 4 * 2;
#pragma unroll
    for (uint tile = 0; tile < 2; tile++) {
        const uint4 left = weights[tile * 8], right = weights[tile * 8 + 1];
        const uint pairs[8] = {left.x, left.y, left.z, left.w, right.x, right.y, right.z, right.w};
        uint4 a[4];
        tile_wait_but_one();
#pragma unroll
        for (uint step = 0; step < 4; step++) {
            const uint4 x = values[tile][step];
            a[step] = (uint4)(multiply_pairs(x.x, pairs[2 * step]), multiply_pairs(x.y, pairs[2 * step]),
                              multiply_pairs(x.z, pairs[2 * step + 1]), multiply_pairs(x.w, pairs[2 * step + 1]));
        }
        tile_multiply(sum, a, tile_step(tile_at(rows), 4 * tile));
    }
}

void scale_sum(float4 sum[8], float weight) {
#pragma unroll
    for (uint i = 0; i < 8; i++) {
        sum[i] *= weight;
    }
}

/*
 * Writes a warpgroup's 64 rows of a state, 16 columns of a warp.  Matrices of 8 x 8 are transposed; then neighbouring items
 * exchange pairs of two pieces, so that one has four columns of the left piece, the other of the right.
 */
void store_sum(__global uint4 *to, const float4 sum[8], uint own, uint warp) {
    const float unit = 1.0f / STATE_UNIT;
    const uint r = warp_lane() / 4, p = warp_lane() % 4, odd = p & 1;
    __global uint *words = (__global uint *)to + (own * (64 * 32) + r * 32 + 4 * ((2 * warp + odd) ^ r) + p - odd);
#pragma unroll
    for (uint i = 0; i < 8; i++) {
        const float4 x = sum[i] * unit;
        const uint left = transpose_matrix(pack(x.x, x.y)), right = transpose_matrix(pack(x.z, x.w));
        const uint other = shuffle_xor(odd ? left : right, 1);
        *(__global uint2 *)(words + i * (8 * 32)) = odd ? (uint2)(other, right) : (uint2)(left, other);
    }
}

/* The same behind the products. */
void finish_sum(__global uint4 *to, float4 sum[8], uint own, uint warp) {
    tile_wait(sum);
    store_sum(to, sum, own, warp);
}

/*
 * A work-group has a unit of chunks and a block of its group's heads and tiles of V, which it takes one by one: states, or
 * adjoints of all levels.  The unit's rows of k or q stay in local memory, a warpgroup works on 64 columns of them; v or dO
 * of the unit stay in registers while all sums are made.  Chunks that are not there add zeros.
 */
__kernel __attribute__((reqd_work_group_size(SUM_ITEMS, 1, 1))) void
nb_sums(const loglin_nvidia_gradients call, __global float *ws, ulong ws_offset, const __global ushort *v,
        ulong v_offset, const __global ushort *d_o, ulong d_o_offset, uint aligned) {
    __local uint4 rows_at[UNIT * SUM_GROUPS * CHUNK_COLUMNS] __attribute__((aligned(1024)));
    __local uint4 values_at[UNIT * CHUNK_COLUMNS] __attribute__((aligned(1024)));
    __local sum_factors factors_at[2];
    const uint own = same_in_warp(get_local_id(0) / 128), warp = same_in_warp(get_local_id(0) % 128 / 32);
    /* Late units, which have most levels, go first, states last. */
    const uint units = (call.chunks + UNIT - 1) / UNIT;
    const ulong id = get_group_id(0);
    const uint block = id % SUM_BLOCKS, group = id / SUM_BLOCKS % GROUPS, b = id / (SUM_BLOCKS * GROUPS) % call.batch;
    const uint turn = id / (SUM_BLOCKS * GROUPS) / call.batch;
    const int is_state = turn >= units;
    const uint unit = is_state ? turn - units : units - 1 - turn, first = unit * UNIT;
    const uint first_head = group * GROUP_HEADS, last_matrix = min((block + 1) * SUM_TURNS, (uint)GROUP_MATRICES);
    const uint row = first * NB_CHUNK + get_local_id(0) / 8;
    const ulong first_chunk = (ulong)(b * HEADS + first_head) * call.chunks + first;
    const sum_source from = {
        (is_state ? v + v_offset : d_o + d_o_offset) + (((ulong)b * call.length + row) * HEADS + first_head) * DIM_V +
            get_local_id(0) % 8 * 8,
        (const __global uint4 *)place(ws, ws_offset, call.weights) + first_chunk * (WEIGHT_SLOTS * NB_CHUNK / 8),
        (const __global float *)place(ws, ws_offset, call.decays) + first_chunk,
        first, call.chunks, (int)call.length - (int)row, is_state, (int)aligned,
    };
    fetch_unit(rows_at,
               (const __global uint4 *)place(ws, ws_offset, is_state ? call.keys : call.queries) +
                   (ulong)(b * GROUPS + group) * call.chunks * (2 * ROW_TILE),
               first, call.chunks);
    fetch_matrix(values_at, &factors_at[0], from, block * SUM_TURNS);
    const __local uint4 *rows = rows_at + own * CHUNK_COLUMNS;
    __global uint4 *nodes = (__global uint4 *)place(ws, ws_offset, is_state ? call.states : call.adjoints);
    __global uint4 *parts = (__global uint4 *)place(ws, ws_offset, call.parts);
#pragma unroll 1
    for (uint turns = 0; block * SUM_TURNS + turns < last_matrix; turns++) {
        const uint now = block * SUM_TURNS + turns;
        const ulong matrix = (ulong)(b * HEADS + first_head) * TILES_V + now;
        const __local sum_factors *factors = &factors_at[turns % 2];
        uint4 values[UNIT][2][4];
        float4 sum[8];
        wait_for_copies();
        tile_publish();
        barrier(CLK_LOCAL_MEM_FENCE);
        if (is_state) {
            /* A state goes on from the one of the left part of its block; the third chunk has one by itself, too. */
#pragma unroll
            for (uint i = 0; i < UNIT; i++) {
                load_values(values[i], values_at, i, warp);
            }
            barrier(CLK_LOCAL_MEM_FENCE);
            if (now + 1 < last_matrix) {
                fetch_matrix(values_at, &factors_at[1 - turns % 2], from, now + 1);
            }
            if (UNIT > 2) {
                tile_clear(sum);
                add_chunk(sum, values[2], factors->weights[0][2], rows + 2 * (SUM_GROUPS * CHUNK_COLUMNS));
                tile_wait(sum);
                if (first + 3 < call.chunks) {
                    store_sum(nodes + (matrix * call.chunks + first + 2) * STATE, sum, own, warp);
                }
            }
            tile_clear(sum);
#pragma unroll
            for (uint i = 0; i < UNIT; i++) {
                if (i > 0) {
                    scale_sum(sum, factors->decays[i]);
                }
                add_chunk(sum, values[i], factors->weights[0][i], rows + i * (SUM_GROUPS * CHUNK_COLUMNS));
                tile_wait(sum);
                if (i != 2 && first + i + 1 < call.chunks) {
                    store_sum(nodes + (matrix * call.chunks + first + i) * STATE, sum, own, warp);
                }
            }
            continue;
        }
        /* Levels whose blocks are parts of the unit. */
#pragma unroll
        for (uint level = 0; level < UNIT_BITS; level++) {
#pragma unroll
            for (uint start = 1u << level; start < UNIT; start += 2u << level) {
                tile_clear(sum);
#pragma unroll
                for (uint i = start; i < start + (1u << level); i++) {
                    if (i % (2u << level) == 1u << level) {
                        load_values(values[i], values_at, i, warp);
                    }
                    add_chunk(sum, values[i], factors->weights[level][i], rows + i * (SUM_GROUPS * CHUNK_COLUMNS));
                }
                tile_wait(sum);
                if (first + start < call.chunks) {
                    store_sum(nodes + (matrix * call.chunks + first + start - 1) * STATE, sum, own, warp);
                }
            }
        }
        load_values(values[0], values_at, 0, warp);
        barrier(CLK_LOCAL_MEM_FENCE);
        if (now + 1 < last_matrix) {
            fetch_matrix(values_at, &factors_at[1 - turns % 2], from, now + 1);
        }
#pragma unroll 1
        for (uint bits = unit; bits != 0; bits &= bits - 1) {
            const uint above = 31 - clz(bits & (0 - bits)), level = UNIT_BITS + above;
            tile_clear(sum);
#pragma unroll
            for (uint i = 0; i < UNIT; i++) {
                add_chunk(sum, values[i], factors->weights[level][i], rows + i * (SUM_GROUPS * CHUNK_COLUMNS));
            }
            tile_wait(sum);
            /* A block that is larger than a unit is added up later. */
            __global uint4 *to =
                above == 0 ? nodes + (matrix * call.chunks + first - 1) * STATE
                           : parts + ((matrix * CHUNK_LEVELS + level) * call.units +
                                      ((unit >> (above + 1) << above) | (unit & ((1u << above) - 1)))) *
                                         STATE;
            store_sum(to, sum, own, warp);
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
