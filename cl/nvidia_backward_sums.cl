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

#define GROUP_MATRICES (GROUP_HEADS * TILES_V) /* heads and tiles of V of a group */
#define SUM_BLOCKS ((GROUP_MATRICES + SUM_TURNS - 1) / SUM_TURNS)
#define K_TILES (NV_K / 64)
#define CHUNK_COLUMNS (NB_CHUNK * 8)       /* uint4 of 64 columns of a chunk */
#define HALF (UNIT / 2)                    /* chunks of a warpgroup */
#define HALF_WEIGHTS (HALF * NB_CHUNK / 8) /* uint4 of weights of its chunks in a level's sums */
#define WEIGHT_STAGES (SLOTS > 2 ? SLOTS : 2)
#define INLINE __attribute__((always_inline)) /* products run beside what follows only within a function */

/* Barriers at which, by turns, the other warpgroup has given its sum. */
#define GIVEN 3

/* What a warpgroup reads, from its group's first head and its own first chunk: not in registers, of which there are few. */
typedef struct sum_source {
    const __global ushort *values;
    const __global uint4 *weights;
    const __global float *decays;
    uint first_matrix;  /* of the group, of all heads and tiles of V */
    uint first, chunks; /* the warpgroup's first chunk, and the sequence's chunks */
    int rows, aligned;  /* from the first chunk's first one to the end */
} sum_source;

/* What it works on. */
typedef struct sum_work {
    const __local sum_source *from;
    __local uint4 *values, *weights, *sent;
    const __local uint4 *rows;
    uint own, warp;    /* which warpgroup, and which warp of it */
    uint unit, matrix; /* of the group */
} sum_work;

/* Starts copying a unit's rows of q or k, 64 columns after the other; a chunk that is not there becomes the last one. */
void fetch_unit(__local uint4 *to, const __global uint4 *from, uint first, uint chunks) {
    for (uint i = get_local_id(0); i < UNIT * NB_CHUNK * K_PIECES; i += NB_ITEMS) {
        const uint chunk = i / (NB_CHUNK * K_PIECES), row = i / K_PIECES % NB_CHUNK, piece = i % K_PIECES;
        copy_16(&to[(chunk * K_TILES + piece / 8) * CHUNK_COLUMNS + swizzled(row, 8, piece % 8)],
                &from[(min(first + chunk, chunks - 1) * NB_CHUNK + row) * K_PIECES + piece], 1);
    }
}

/* A warpgroup starts copying v or dO of some of its chunks; missing rows and columns become zeros. */
INLINE void fetch_values(sum_work work, uint matrix, uint first, uint end) {
    const uint item = anew(get_local_id(0)) % 128, column = matrix % TILES_V * NB_COLUMNS + item % 8 * 8;
    const int rows = column < DIM_V ? work.from->rows - (int)(item / 8) : 0;
    const __global ushort *x = work.from->values + (item / 8 * HEADS + matrix / TILES_V) * DIM_V + column;
    __local uint4 *to = work.values + swizzled(item / 8, 8, item % 8);
    if (work.from->aligned) {
#pragma unroll 4
        for (uint i = first * 8; i < end * 8; i++) {
            copy_16(to + i * 128, x + i * (16 * HEADS * DIM_V), (int)(i * 16) < rows);
        }
    } else {
#pragma unroll 1
        for (uint i = first * 8; i < end * 8; i++) {
            to[i * 128] = (int)(i * 16) < rows ? load_piece(x + i * (16 * HEADS * DIM_V)) : (uint4)(0);
        }
    }
}

/* The same for weights: `slots` of a chunk, states' and levels', from one on; of a chunk that is not there they become zeros. */
INLINE void fetch_weights(sum_work work, uint matrix, uint slot, uint slots, uint to) {
    const uint first = work.from->first, chunks = work.from->chunks;
    const __global uint4 *weights =
        work.from->weights + (ulong)(matrix / TILES_V * chunks) * (WEIGHT_SLOTS * NB_CHUNK / 8);
#pragma unroll 1
    for (uint i = anew(get_local_id(0)) % 128; i < slots * HALF_WEIGHTS; i += 128) {
        const uint own = slot + i / HALF_WEIGHTS, chunk = i / (NB_CHUNK / 8) % HALF;
        if (own == 0 || ((first + chunk) >> (own - 1) & 1) != 0) {
            copy_16(&work.weights[to * HALF_WEIGHTS + i],
                    weights + (chunk * WEIGHT_SLOTS + own) * (NB_CHUNK / 8) + i % (NB_CHUNK / 8),
                    first + chunk < chunks);
        }
    }
}

/* The warpgroup's values, transposed, as A: a warp has 16 columns of them. */
INLINE void load_values(uint4 to[HALF][8], sum_work work) {
    const uint address = local_address(work.values + swizzled(far_row(), 8, 2 * work.warp + far_piece()));
#pragma unroll
    for (uint i = 0; i < HALF; i++) {
#pragma unroll
        for (uint step = 0; step < 8; step++) {
            to[i][step] = load_transposed_at(address + (i * 8 + step) * 2048);
        }
    }
}

/*
 * Adds (weights values)^T rows over a chunk; the weights are at weight_place.  What names the rows is made anew each time: as
 * it never changes, it would take 32 registers, or lie in memory.
 */
INLINE void add_chunk(float4 sum[K_TILES][8], sum_work work, uint4 values[8], uint chunk, uint slot) {
    const __local uint4 *weights = work.weights + slot * HALF_WEIGHTS + chunk * (NB_CHUNK / 8) + warp_lane() % 4 * 2;
    const tile_rows rows = anew(tile_at(work.rows + chunk * (K_TILES * CHUNK_COLUMNS)));
#pragma unroll
    for (uint tile = 0; tile < 2; tile++) {
        const uint4 left = weights[tile * 8], right = weights[tile * 8 + 1];
        const uint pairs[8] = {left.x, left.y, left.z, left.w, right.x, right.y, right.z, right.w};
        uint4 a[4];
        tile_wait_but_one();
#pragma unroll
        for (uint step = 0; step < 4; step++) {
            const uint4 x = values[4 * tile + step];
            a[step] = (uint4)(multiply_pairs(x.x, pairs[2 * step]), multiply_pairs(x.y, pairs[2 * step]),
                              multiply_pairs(x.z, pairs[2 * step + 1]), multiply_pairs(x.w, pairs[2 * step + 1]));
        }
#pragma unroll
        for (uint m = 0; m < K_TILES; m++) {
            tile_start(sum[m], a);
        }
#pragma unroll
        for (uint m = 0; m < K_TILES; m++) {
            tile_add(sum[m], a, tile_step(rows, 8 * m + 4 * tile));
        }
        tile_end();
    }
}

INLINE void clear_sum(float4 sum[K_TILES][8]) {
#pragma unroll
    for (uint m = 0; m < K_TILES; m++) {
        tile_clear(sum[m]);
    }
}

INLINE void wait_for_sum(float4 sum[K_TILES][8]) {
#pragma unroll
    for (uint m = 0; m < K_TILES; m++) {
        tile_wait(sum[m]);
    }
}

/* All warps of the warpgroup are here, and what it has stored last has been read. */
INLINE void meet_behind_stores(sum_work work) {
#if WGMMA
    if (get_local_id(0) % 128 == 0) {
        wait_for_stores();
    }
#endif
    warpgroup_barrier(work.own);
}

/*
 * Writes a state, of which the products have columns, 16 of them a warp.  With wgmma it goes through a stage, which is free;
 * else matrices of 8 x 8 are transposed, then neighbouring items exchange pairs of two pieces, so that one has four columns of
 * the left piece, the other of the right.
 */
INLINE void store_sum(__global uint4 *to, float4 sum[K_TILES][8], sum_work work, __local uint4 *stage) {
    const float unit = 1.0f / STATE_UNIT;
    const uint lane = anew(warp_lane());
#if WGMMA
    const uint row = lane / 16 * 8 + lane % 8,
               address = local_address(stage + swizzled(row, 8, 2 * work.warp + lane / 8 % 2));
#pragma unroll
    for (uint i = 0; i < K_TILES * 4; i++) {
        const float4 x = sum[i / 4][2 * i % 8] * unit, y = sum[i / 4][(2 * i + 1) % 8] * unit;
        store_transposed_at(address + i * 2048,
                            (uint4)(pack(x.x, x.y), pack(x.z, x.w), pack(y.x, y.y), pack(y.z, y.w)));
    }
    tile_publish();
    warpgroup_barrier(work.own);
    if (get_local_id(0) % 128 == 0) {
        store_bulk(to, stage, STATE * 16);
    }
#else
    const uint r = lane / 4, p = lane % 4, odd = p & 1;
    __global uint *words = (__global uint *)to + (r * 32 + 4 * ((2 * work.warp + odd) ^ r) + p - odd);
#pragma unroll
    for (uint i = 0; i < K_TILES * 8; i++) {
        const float4 x = sum[i / 8][i % 8] * unit;
        const uint left = transpose_matrix(pack(x.x, x.y)), right = transpose_matrix(pack(x.z, x.w));
        const uint other = shuffle_xor(odd ? left : right, 1);
        *(__global uint2 *)(words + i * (8 * 32)) = odd ? (uint2)(other, right) : (uint2)(left, other);
    }
#endif
}

INLINE __global uint4 *node_at(sum_work work, __global uint4 *nodes, uint node) {
    return nodes + ((ulong)(work.from->first_matrix + work.matrix) * work.from->chunks + node) * STATE;
}

/* A product's sum becomes a node, if that exists; the stage is where the last chunk's values were. */
INLINE void finish_sum(float4 sum[K_TILES][8], sum_work work, __global uint4 *nodes, uint node, int exists) {
    wait_for_sum(sum);
    if (exists) {
        meet_behind_stores(work);
        store_sum(node_at(work, nodes, node), sum, work, work.values + (HALF - 1) * CHUNK_COLUMNS);
    }
}

/* One warpgroup gives its sum to the other, which goes on when it is there. */
INLINE void give_sum(float4 sum[K_TILES][8], sum_work work, uint turn) {
    const uint item = anew(get_local_id(0)) % 128;
    const float unit = 1.0f / STATE_UNIT;
#pragma unroll
    for (uint i = 0; i < K_TILES * 4; i++) {
        const float4 x = sum[i / 4][2 * i % 8] * unit, y = sum[i / 4][(2 * i + 1) % 8] * unit;
        work.sent[i * 128 + item] = (uint4)(pack(x.x, x.y), pack(x.z, x.w), pack(y.x, y.y), pack(y.z, y.w));
    }
    announce(GIVEN + turn, NB_ITEMS);
}

INLINE void take_sum(float4 sum[K_TILES][8], sum_work work, uint turn, float own_weight, float weight) {
    const uint item = anew(get_local_id(0)) % 128;
    meet(GIVEN + turn, NB_ITEMS);
#pragma unroll
    for (uint i = 0; i < K_TILES * 4; i++) {
        const uint4 other = work.sent[i * 128 + item];
        float4 *x = &sum[i / 4][2 * i % 8], *y = &sum[i / 4][(2 * i + 1) % 8];
        *x = own_weight * *x + weight * STATE_UNIT * (float4)(unpack(other.x), unpack(other.y));
        *y = own_weight * *y + weight * STATE_UNIT * (float4)(unpack(other.z), unpack(other.w));
    }
}

/* A state goes on from the one of the left part of its block. */
INLINE void sum_states(sum_work work, __global uint4 *nodes) {
    const uint first = work.from->first, chunks = work.from->chunks;
    uint turn = 0;
    fetch_values(work, work.matrix, 0, HALF);
    fetch_weights(work, work.matrix, 0, 1, 0);
#pragma unroll 1
    for (; work.matrix < GROUP_MATRICES; work.matrix += SUM_BLOCKS, turn = 1 - turn) {
        const uint next = work.matrix + SUM_BLOCKS;
        uint4 values[HALF][8];
        float4 sum[K_TILES][8];
        float kept[HALF], right_kept = 1.0f;
#pragma unroll
        for (uint i = 0; i < HALF; i++) {
            const __global float *all = work.from->decays + work.matrix / TILES_V * chunks;
            kept[i] = first + i < chunks ? all[i] : 0.0f;
            right_kept *= work.unit * UNIT + HALF + i < chunks ? all[i + (1 - work.own) * HALF] : 0.0f;
        }
        wait_for_copies();
        warpgroup_barrier(work.own);
        load_values(values, work);
        warpgroup_barrier(work.own);
        if (next < GROUP_MATRICES) {
            fetch_values(work, next, 0, HALF - 1);
            fetch_weights(work, next, 0, 1, 1 - turn);
        }
        clear_sum(sum);
#pragma unroll
        for (uint i = 0; i < HALF; i++) {
            if (i > 0) {
#pragma unroll
                for (uint j = 0; j < K_TILES * 8; j++) {
                    sum[j / 8][j % 8] *= kept[i];
                }
            }
            add_chunk(sum, work, values[i], i, turn);
            finish_sum(sum, work, nodes, first + i, (i + 1 < HALF || work.own == 0) && first + i + 1 < chunks);
        }
        meet_behind_stores(work);
        if (next < GROUP_MATRICES) {
            fetch_values(work, next, HALF - 1, HALF);
        }
        /* The unit's state: what is left of the left half's, and the right half's. */
        if (work.own == turn) {
            give_sum(sum, work, turn);
        } else {
            take_sum(sum, work, turn, work.own == 0 ? right_kept : 1.0f, work.own == 0 ? 1.0f : right_kept);
            if ((work.unit + 1) * UNIT < chunks) {
                warpgroup_barrier(work.own);
                store_sum(node_at(work, nodes, work.unit * UNIT + UNIT - 1), sum, work, work.sent);
            }
        }
    }
    meet_behind_stores(work);
}

/* Adjoints of all levels, those of blocks that are larger than the unit in parts, which are added up later. */
INLINE void sum_adjoints(sum_work work, __global uint4 *nodes, __global uint4 *parts, uint units) {
    uint turn = 0;
    fetch_values(work, work.matrix, 0, HALF);
    fetch_weights(work, work.matrix, 1, CHUNK_LEVELS, 0);
    end_copies();
    end_copies();
#pragma unroll 1
    for (; work.matrix < GROUP_MATRICES; work.matrix += SUM_BLOCKS) {
        const uint next = work.matrix + SUM_BLOCKS;
        uint4 values[HALF][8];
        float4 sum[K_TILES][8];
        /* All copies but those of the weights that were used last. */
        WAIT_FOR_COPIES_BUT(1);
        warpgroup_barrier(work.own);
        load_values(values, work);
        warpgroup_barrier(work.own);
        if (next < GROUP_MATRICES) {
            fetch_values(work, next, 0, HALF - 1);
        }
        /* Levels whose blocks are in the warpgroup's chunks; then of the right half of the unit. */
#pragma unroll
        for (int level = 0; level < UNIT_BITS - 1; level++) {
#pragma unroll
            for (uint start = 1u << level; start < HALF; start += 2u << level) {
                clear_sum(sum);
#pragma unroll
                for (uint i = start; i < start + (1u << level); i++) {
                    add_chunk(sum, work, values[i], i, level);
                }
                finish_sum(sum, work, nodes, work.from->first + start - 1,
                           work.from->first + start < work.from->chunks);
            }
        }
        if (work.own == 1) {
            clear_sum(sum);
#pragma unroll
            for (uint i = 0; i < HALF; i++) {
                add_chunk(sum, work, values[i], i, UNIT_BITS - 1);
            }
            finish_sum(sum, work, nodes, work.from->first - 1, work.from->first < work.from->chunks);
        }
        meet_behind_stores(work);
        if (next < GROUP_MATRICES) {
            fetch_values(work, next, HALF - 1, HALF);
            fetch_weights(work, next, 1, UNIT_BITS < CHUNK_LEVELS ? UNIT_BITS : CHUNK_LEVELS, 0);
        }
        end_copies();
        /* Those of whole units: the warpgroups add both halves up by turns. */
#pragma unroll 1
        for (uint bits = work.unit; bits != 0; bits &= bits - 1, turn = 1 - turn) {
            const uint above = 31 - clz(bits & (0 - bits)), level = UNIT_BITS + above;
            clear_sum(sum);
#pragma unroll
            for (uint i = 0; i < HALF; i++) {
                add_chunk(sum, work, values[i], i, level);
            }
            wait_for_sum(sum);
            meet_behind_stores(work);
            if (work.own == turn) {
                give_sum(sum, work, turn);
            } else {
                take_sum(sum, work, turn, 1.0f, 1.0f);
                const ulong matrix = work.from->first_matrix + work.matrix;
                __global uint4 *to =
                    above == 0 ? nodes + (matrix * work.from->chunks + work.unit * UNIT - 1) * STATE
                               : parts + ((matrix * CHUNK_LEVELS + level) * units +
                                          ((work.unit >> (above + 1) << above) | (work.unit & ((1u << above) - 1)))) *
                                             STATE;
                warpgroup_barrier(work.own);
                store_sum(to, sum, work, work.sent);
            }
            if (next < GROUP_MATRICES) {
                fetch_weights(work, next, 1 + level, 1, level);
            }
            end_copies();
        }
        if (work.unit == 0) {
            end_copies();
        }
    }
    meet_behind_stores(work);
}

/*
 * A work-group has a unit of chunks and goes through some of its group's heads and tiles of V: states, or adjoints of all
 * levels.  The unit's rows of k or q stay in local memory; a warpgroup has half of the chunks, whose v or dO stay in registers
 * while all sums are made.  Chunks that are not there add zeros.
 */
__kernel __attribute__((reqd_work_group_size(NB_ITEMS, 1, 1))) void
nb_sums(const loglin_nvidia_gradients call, __global float *ws, ulong ws_offset, const __global ushort *v,
        ulong v_offset, const __global ushort *d_o, ulong d_o_offset, uint aligned) {
    __local uint4 rows_at[UNIT * K_TILES * CHUNK_COLUMNS] __attribute__((aligned(1024)));
    __local uint4 values_at[2][HALF * CHUNK_COLUMNS] __attribute__((aligned(1024)));
    __local uint4 weights_at[2][WEIGHT_STAGES * HALF_WEIGHTS];
    __local uint4 sent[STATE] __attribute__((aligned(1024)));
    __local sum_source sources[2];
    const uint own = same_in_warp(get_local_id(0) / 128), warp = same_in_warp(get_local_id(0) % 128 / 32);
    /* Late units, which have most levels, go first, states last. */
    const uint units = (call.chunks + UNIT - 1) / UNIT, id = get_group_id(0);
    const uint block = id % SUM_BLOCKS, group = id / SUM_BLOCKS % GROUPS, b = id / (SUM_BLOCKS * GROUPS) % call.batch;
    const uint turn = id / (SUM_BLOCKS * GROUPS) / call.batch;
    const int is_state = turn >= units;
    const uint unit = is_state ? turn - units : units - 1 - turn, first = unit * UNIT + own * HALF;
    const uint first_head = b * HEADS + group * GROUP_HEADS;
    const ulong first_chunk = (ulong)first_head * call.chunks + first;
    if (get_local_id(0) % 128 == 0) {
        sources[own] = (sum_source){
            (is_state ? v + v_offset : d_o + d_o_offset) +
                (((ulong)b * call.length + first * NB_CHUNK) * HEADS + group * GROUP_HEADS) * DIM_V,
            (const __global uint4 *)place(ws, ws_offset, call.weights) + first_chunk * (WEIGHT_SLOTS * NB_CHUNK / 8),
            (const __global float *)place(ws, ws_offset, call.decays) + first_chunk,
            first_head * TILES_V,
            first,
            call.chunks,
            (int)call.length - (int)(first * NB_CHUNK),
            (int)aligned,
        };
    }
    const sum_work work = {&sources[own],
                           values_at[own],
                           weights_at[own],
                           sent,
                           rows_at + own * (HALF * K_TILES * CHUNK_COLUMNS),
                           own,
                           warp,
                           unit,
                           block};
    fetch_unit(rows_at,
               (const __global uint4 *)place(ws, ws_offset, is_state ? call.keys : call.queries) +
                   (ulong)(b * GROUPS + group) * call.chunks * (2 * ROW_TILE),
               unit * UNIT, call.chunks);
    wait_for_copies();
    tile_publish();
    barrier(CLK_LOCAL_MEM_FENCE);
    if (is_state) {
        sum_states(work, (__global uint4 *)place(ws, ws_offset, call.states));
    } else {
        sum_adjoints(work, (__global uint4 *)place(ws, ws_offset, call.adjoints),
                     (__global uint4 *)place(ws, ws_offset, call.parts), call.units);
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
