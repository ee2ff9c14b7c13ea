/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The gated delta rule's backward pass on NVIDIA's matrix units, weak partition; behind cl/nvidia_delta.cl.
 *
 *     prepare, walk  the maps of all chunks with their transposes, and the level states at every chunk's start
 *     retreat        the walk backwards: the adjoints of the level states, kept as the walk keeps the states; all of dv
 *     levels         from states and adjoints: dREAD, dK_START, dWRITE, the chunk decay's gradient, and those of the level
 *                    weights between chunks; all chunks at once, a warpgroup takes one of the three
 *     keys           through the chunk's map: dq and dk of a head, dg, dbeta, the level weights inside the chunk
 *     sum            dq and dk: the sum over the heads of a group, through scale and normalisation
 * With D the adjoint of a level state at the chunk's end, its state E at the start, and w the level weights:
 *     dREAD += w dO E^T        dw = READ . dO E^T        dK_START -= WRITE D E^T        dWRITE += (V - K_START E) D^T
 *     dv = MZ^T dO + WRITE D   D -> exp(a_C) D - K_START^T WRITE D + READ^T w dO        da_C = exp(a_C) <D, E>
 * where V and dv take part with the level that the chunk itself joins.
 */

#define TILE (64 * 8)                                                /* uint4 of 64 rows of 64 columns */
#define K_UNITS ((DIM_K + 63) / 64)                                  /* 64 columns of K each */
#define V_UNITS ((DIM_V + 63) / 64)
#define BLOCK_UNITS (K_UNITS < 2 ? K_UNITS : ND_LEVELS_UNITS)        /* to a work-group of `levels` */
#define BLOCKS ((K_UNITS + ND_LEVELS_UNITS - 1) / ND_LEVELS_UNITS)
#define GRADIENT (TOKENS * STEPS * 32) /* uint4 of dREAD, dK_START or dWRITE of a chunk */
#define NO_LEVEL 32

/* The level at the end of chunk n that the chunk itself joins; none at the end of the sequence. */
uint joined_level(const loglin_delta_call call, uint n) { return n + 1 == call.chunks ? NO_LEVEL : merged_level(n); }

/* A bit for each level that has an adjoint at the end of chunk n. */
uint adjoint_levels(const loglin_delta_call call, uint n) { return n + 1 == call.chunks ? 0 : n + 1; }

/* Sum over a warp. */
float warp_sum(float x) {
    for (uint distance = 1; distance < 32; distance *= 2) {
        x += as_float(shuffle_xor(as_uint(x), distance));
    }
    return x;
}

/* Sum over the four items that share rows. */
float quad_sum(float x) {
    x += as_float(shuffle_xor(as_uint(x), 1));
    return x + as_float(shuffle_xor(as_uint(x), 2));
}

/* A tile of a caller's matrix; x: its first row's first column, rows: those that there are. */
uint4 load_global_tile(const __global ushort *x, uint row_size, int rows, uint aligned) {
    const int r = (int)warp_lane() / 4;
    x += (ulong)r * row_size + 2 * (warp_lane() % 4);
    uint pairs[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const __global ushort *from = x + (ulong)(8 * (e % 2)) * row_size + 8 * (e / 2);
        pairs[e] = r + 8 * (e % 2) >= rows ? 0 : aligned ? *(const __global uint *)from : from[0] | (uint)from[1] << 16;
    }
    return (uint4)(pairs[0], pairs[1], pairs[2], pairs[3]);
}

/* ---- retreat ------------------------------------------------------------------------------------------------------- */

/* What the chunk's reads ask of the states: w dO of each level, transposed, beside the adjoints' updates. */
typedef struct level_requests {
    uint4 asked[STATES][UPDATE];
} level_requests;

/* 16 tokens of dv: MZ^T dO + WRITE D. */
void hand_back(float4 out[V_TILES][2], const __local level_states *adjoints, const uint4 write[STEPS],
               const uint4 own_t[TOKENS], const __local uint4 *d_o, uint i, uint joined) {
    const uint lane = warp_lane();
    clear_columns(out);
#pragma unroll
    for (uint t = 0; t < TOKENS; t++) {
#pragma unroll
        for (uint m = 0; m < V_TILES && t >= i; m++) {
            add_product(out[m], own_t[t], load_tile_transposed(d_o + 16 * t * VALUE_ROW + 2 * m, VALUE_ROW));
        }
    }
    if (joined != NO_LEVEL) {
        add_seen(out, write, adjoints->rounded[joined] + lane);
    }
}

/* For 16 tokens: - WRITE D of the adjoints at the chunk's end, and w dO of the states at its start; transposed. */
void find_requests(__local level_states *adjoints, __local level_requests *requests, const uint4 write[STEPS],
                   const __local uint4 *d_o, const __local float *weights, uint i, uint n, uint ends) {
    const uint lane = warp_lane();
    for (uint level = 0, bits = ends; bits != 0; level++, bits >>= 1) {
        if ((bits & 1) == 0) {
            continue;
        }
        float4 given[V_TILES][2];
        clear_columns(given);
        add_seen_transposed(given, write, adjoints->rounded[level] + lane);
#pragma unroll
        for (uint m = 0; m < V_TILES; m++) {
            given[m][0] = -given[m][0];
            given[m][1] = -given[m][1];
            adjoints->update[level][(m * TOKENS + i) * 32 + lane] = round_tile(given[m]);
        }
    }
    for (uint level = 0, bits = n; bits != 0; level++, bits >>= 1) {
        if ((bits & 1) == 0) {
            continue;
        }
#pragma unroll
        for (uint m = 0; m < V_TILES; m++) {
            float4 x[2];
            unround_tile(x, load_tile_transposed(d_o + 16 * i * VALUE_ROW + 2 * m, VALUE_ROW));
            scale_tile(x, weights + level * ND_CHUNK + 16 * i, 0);
            requests->asked[level][(m * TOKENS + i) * 32 + lane] = round_tile(x);
        }
    }
}

/* 16 rows of K of all adjoints at the chunk's start. */
void update_adjoints(__local level_states *adjoints, const __local level_requests *requests, const uint4 start[TOKENS],
                     const uint4 read[TOKENS], float kept, uint step, uint n, uint ends, uint joined) {
    const uint lane = warp_lane();
    for (uint source = 0; source < STATES; source++) {
        /* An adjoint at the end is that of one state at the start, or, where levels have joined, of all those below. */
        const uint heirs = source == joined ? n & ((1u << source) - 1) : n & (1u << source);
        if (joined != NO_LEVEL && source < joined) {
            continue;
        }
        float4 sum[V_TILES][2];
        clear_columns(sum);
        if (heirs != 0 && ((ends >> source) & 1) != 0) {
            add_state(sum, adjoints, source, step);
            pass_state(sum, adjoints->update[source], start, kept);
        }
        for (uint level = 0, bits = heirs; bits != 0; level++, bits >>= 1) {
            if ((bits & 1) == 0) {
                continue;
            }
            float4 heir[V_TILES][2];
#pragma unroll
            for (uint m = 0; m < V_TILES; m++) {
                heir[m][0] = sum[m][0];
                heir[m][1] = sum[m][1];
#pragma unroll
                for (uint t = 0; t < TOKENS; t++) {
                    add_product(heir[m], requests->asked[level][(m * TOKENS + t) * 32 + lane], read[t]);
                }
            }
            put_state(adjoints, heir, level, step);
        }
    }
}

/* Column i of a lower triangle of tiles. */
void load_lower_column(uint4 to[TOKENS], const __global uint4 *from, uint i) {
#pragma unroll
    for (uint t = 0; t < TOKENS; t++) {
        to[t] = t >= i ? from[lower_tile(t, i) * 32 + warp_lane()] : (uint4)(0u);
    }
}

/* A work-group takes a slice of the columns of V of a sequence and head, and goes backwards. */
__kernel __attribute__((reqd_work_group_size(ND_WALK_ITEMS, 1, 1))) void
nvidia_delta_retreat(const loglin_delta_call call, __global float *ws, ulong ws_offset, const __global ushort *d_o,
                     ulong d_o_offset, __global ushort *dv, ulong dv_offset, uint aligned) {
    __local level_states adjoints;
    __local level_requests requests;
    __local uint4 rows_of_d_o[2][ND_CHUNK * VALUE_ROW];
    __local float4 rows_at[2][ROWS / 4];
    const uint warp = get_local_id(0) / 32, lane = warp_lane();
    const slice_place at = find_slice(call);
    const int tokens = (int)call.length;
    const ulong chunk_values = (ulong)ND_CHUNK * HEADS * DIM_V;
    const __global float4 *rows_from = (const __global float4 *)find_weights(call, ws, ws_offset, at.first_chunk);
    __global uint4 *saved = find_saved(call, place(ws, ws_offset, call.adjoints), at.bh, at.slice);
    const uint last = call.chunks - 1;
    d_o += d_o_offset + at.values;
    dv += dv_offset + at.values;
    fetch_matrix(rows_of_d_o[last % 2], VALUE_ROW, d_o + last * chunk_values, HEADS * DIM_V, at.columns,
                 tokens - (int)last * ND_CHUNK, aligned, ND_WALK_ITEMS);
    fetch_rows(rows_at[last % 2], rows_from + (ulong)last * (ROWS / 4));
    for (uint n = call.chunks; n-- > 0;) {
        const __global uint4 *map = find_map(call, ws, ws_offset, at.first_chunk + n);
        const __local uint4 *d_o_here = rows_of_d_o[n % 2];
        const __local float *rows = (const __local float *)rows_at[n % 2];
        const uint joined = joined_level(call, n), ends = adjoint_levels(call, n);
        uint4 write[STEPS];
#pragma unroll
        for (uint step = 0; step < STEPS; step++) {
            write[step] = map[WRITE_AT + (warp % TOKENS * STEPS + step) * 32 + lane];
        }
        uint4 start[TURNS][TOKENS], read[TURNS][TOKENS], own_t[TOKENS];
#pragma unroll
        for (uint turn = 0; turn < TURNS; turn++) {
            load_row_tiles(start[turn], map + START_T_AT, warp + turn * WALK_WARPS);
            load_row_tiles(read[turn], map + READ_T_AT, warp + turn * WALK_WARPS);
        }
        load_lower_column(own_t, map + OWN_AT, warp);
        wait_for_copies();
        barrier(CLK_LOCAL_MEM_FENCE);
        if (n > 0) {
            fetch_matrix(rows_of_d_o[(n - 1) % 2], VALUE_ROW, d_o + (n - 1) * chunk_values, HEADS * DIM_V,
                         at.columns, tokens - (int)(n - 1) * ND_CHUNK, aligned, ND_WALK_ITEMS);
            fetch_rows(rows_at[(n - 1) % 2], rows_from + (ulong)(n - 1) * (ROWS / 4));
        }
        if (warp < TOKENS) {
            float4 out[V_TILES][2];
            hand_back(out, &adjoints, write, own_t, d_o_here, warp, joined);
            store_outputs(dv + n * chunk_values, out, (int)(16 * warp), tokens - (int)n * ND_CHUNK, at.columns,
                          aligned);
            save_states(saved + states_before(n + 1) * SAVED, &adjoints, ends, at.columns, 32 * TOKENS);
        } else {
            find_requests(&adjoints, &requests, write, d_o_here, rows, warp - TOKENS, n, ends);
        }
        barrier(CLK_LOCAL_MEM_FENCE);
#pragma unroll
        for (uint turn = 0; turn < TURNS; turn++) {
            const uint step = warp + turn * WALK_WARPS;
            if (step < STEPS) {
                update_adjoints(&adjoints, &requests, start[turn], read[turn], rows[ND_CHUNK * STATES], step, n, ends,
                                joined);
            }
        }
    }
}

/* ---- levels -------------------------------------------------------------------------------------------------------- */

/* 64 columns of V of a level's state and of an adjoint, in tiles: their rows stand transposed, 64 columns of K to a tile. */
typedef struct level_tiles {
    uint4 state[K_UNITS][TILE], adjoint[K_UNITS][TILE];
} level_tiles;

/* What a work-group does in one turn: 64 columns of V of a level, or of the chunk's own values (NO_LEVEL). */
typedef struct levels_turn {
    uint level, behind; /* the latter at the chunk's end */
    uint part;
    int has_adjoint;
} levels_turn;

levels_turn find_turn(uint turn, uint n, uint ends, uint joined) {
    uint bits = n;
    for (uint i = turn / V_UNITS; i > 0; i--) {
        bits &= bits - 1;
    }
    const uint level = bits != 0 ? popcount((bits & -bits) - 1) : NO_LEVEL;
    const uint behind = joined != NO_LEVEL && (level == NO_LEVEL || level < joined) ? joined : level;
    const levels_turn found = {level, behind, turn % V_UNITS, (ends >> behind) & 1};
    return found;
}

/* Starts copying 64 rows of what the walks have saved; `part`: which. */
void fetch_saved(__local uint4 to[K_UNITS][TILE], const __global uint4 *from, uint part) {
    for (uint i = get_local_id(0); i < K_UNITS * TILE; i += ND_LEVELS_ITEMS) {
        const uint row = i / (8 * K_UNITS), piece = i % (8 * K_UNITS), v = 64 * part + row;
        const int wanted = v < DIM_V && piece < DIM_K / 8;
        copy_16(&to[piece / 8][row * 8 + ((piece ^ row) & 7)], from + (wanted ? v * (DIM_K / 8) + piece : 0), wanted);
    }
}

/* 16 rows of a part of the chunk's map, to a warp, into tiles; map: the item's first numbers, i: which rows. */
void place_rows(__local uint4 to[K_UNITS][TILE], const __global uint4 *map, uint i) {
    const uint lane = warp_lane(), row = 16 * i + (lane & 1) * 8 + lane / 4;
#pragma unroll
    for (uint step = 0; step < 4 * K_UNITS; step++) {
        const uint piece = 2 * (step % 4) + (lane / 2 & 1);
        to[step / 4][row * 8 + ((piece ^ row) & 7)] = transpose_quad(step < STEPS ? map[step * 32] : (uint4)(0u));
    }
}

/* C = (part of the chunk's map) X^T, 64 columns of V. */
void apply_rows(float4 c[8], const __local uint4 map[K_UNITS][TILE], const __local uint4 x[K_UNITS][TILE]) {
    tile_clear(c);
#pragma unroll
    for (uint unit = 0; unit < K_UNITS; unit++) {
        tile_multiply_local_transposed(c, tile_at(map[unit]), tile_at(x[unit]));
    }
    tile_wait(c);
}

/* 64 columns of 16 rows of a caller's matrix, those from `column` on. */
void load_rows(uint4 to[4], const __global ushort *x, uint column, int rows, uint aligned) {
#pragma unroll
    for (uint i = 0; i < 4; i++) {
        const uint at = column + 16 * i;
        to[i] = at < DIM_V ? load_global_tile(x + at, HEADS * DIM_V, rows, aligned) : (uint4)(0u);
    }
}

uint4 round_negative(const float4 c[2]) {
    const float4 x[2] = {-c[0], -c[1]};
    return round_tile(x);
}

/* An item's part of the products of two tiles' numbers. */
float dot_tiles(const __local uint4 *x, const __local uint4 *y) {
    float sum = 0.0f;
    for (uint i = get_local_id(0) % 128; i < TILE; i += 128) {
        float4 a[2], b[2];
        unround_tile(a, x[i]);
        unround_tile(b, y[i]);
        const float4 z = a[0] * b[0] + a[1] * b[1];
        sum += (z.x + z.y) + (z.z + z.w);
    }
    return sum;
}

/* Adds to the gradients of a level's weights, of the item's two rows; d_o becomes w dO. */
void weigh_rows(float dots[2], uint4 d_o[4], const float4 output[8], float upper, float lower) {
#pragma unroll
    for (uint i = 0; i < 4; i++) {
        float4 gradient[2];
        unround_tile(gradient, d_o[i]);
#pragma unroll
        for (uint e = 0; e < 2; e++) {
            const float4 x = output[2 * i + e] * gradient[e];
            dots[0] += x.x + x.y;
            dots[1] += x.z + x.w;
            gradient[e] *= (float4)(upper, upper, lower, lower);
        }
        d_o[i] = round_tile(gradient);
    }
}

void store_dots(__global weight *dlevels, const float dots[2], uint level, int rows) {
    const int r = (int)warp_lane() / 4;
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const float sum = quad_sum(dots[e]);
        if (warp_lane() % 4 == 0 && r + 8 * e < rows) {
            store_weight(dlevels, (ulong)(r + 8 * e) * (HEADS * LEVELS) + FIRST_LEVEL + level, sum);
        }
    }
}

/*
 * A work-group takes a chunk of a sequence and head, and 64 or 128 columns of K.  Of its three warpgroups one makes dREAD, one
 * dK_START and <D, E>, one dWRITE: each applies its part of the map to a state or an adjoint, and the outcome is a factor of
 * its sum, whose other factor is a state or an adjoint again.
 */
__kernel __attribute__((reqd_work_group_size(ND_LEVELS_ITEMS, 1, 1))) void
nvidia_delta_levels(const loglin_delta_call call, __global float *ws, ulong ws_offset, const __global ushort *v,
                    ulong v_offset, const __global ushort *d_o, ulong d_o_offset, __global weight *dlevels,
                    ulong dlevels_offset, uint aligned) {
    __local level_tiles tiles[2] __attribute__((aligned(1024)));
    __local uint4 maps[3][K_UNITS][TILE] __attribute__((aligned(1024)));
    const uint warp = get_local_id(0) / 32, lane = warp_lane(), i = warp % TOKENS, kind = same_in_warp(warp / TOKENS);
    const uint block = get_group_id(0) % BLOCKS;
    const chunk_place chunk = find_chunk(call, get_group_id(0) / BLOCKS);
    const ulong bh = chunk.id / call.chunks, row = chunk.row + 16 * i * HEADS;
    const uint n = chunk.n, ends = adjoint_levels(call, n), joined = joined_level(call, n);
    const int rows = chunk.count - (int)(16 * i);
    const __global uint4 *states =
        find_saved(call, place(ws, ws_offset, call.states), bh, 0) + states_before(n) * SAVED;
    const __global uint4 *adjoints =
        find_saved(call, place(ws, ws_offset, call.adjoints), bh, 0) + states_before(n + 1) * SAVED;
    const __global float *weights = find_weights(call, ws, ws_offset, chunk.id);
    const __global ushort *factor = kind == 0 ? d_o + d_o_offset + row * DIM_V : v + v_offset + row * DIM_V;
    const uint turns = V_UNITS * (popcount(n) + (joined != NO_LEVEL));
    float4 sum[BLOCK_UNITS][8];
    float dots[2] = {0.0f, 0.0f}, dot_of_states = 0.0f;
#pragma unroll
    for (uint unit = 0; unit < BLOCK_UNITS; unit++) {
        tile_clear(sum[unit]);
    }
    place_rows(maps[kind],
               find_map(call, ws, ws_offset, chunk.id) + i * STEPS * 32 + lane +
                   (kind == 0 ? READ_AT : kind == 1 ? WRITE_AT : START_AT),
               i);
    for (uint turn = 0; turn <= turns; turn++) {
        if (turn < turns) {
            const levels_turn next = find_turn(turn, n, ends, joined);
            if (next.level != NO_LEVEL) {
                fetch_saved(tiles[turn % 2].state, states + turn / V_UNITS * SAVED, next.part);
            }
            if (next.has_adjoint) {
                const uint before = popcount(ends & ((1u << next.behind) - 1));
                fetch_saved(tiles[turn % 2].adjoint, adjoints + before * SAVED, next.part);
            }
        }
        end_copies();
        if (turn == 0) {
            continue;
        }
        WAIT_FOR_COPIES_BUT(1);
        tile_publish();
        barrier(CLK_LOCAL_MEM_FENCE);
        const levels_turn at = find_turn(turn - 1, n, ends, joined);
        const __local level_tiles *in = &tiles[(turn - 1) % 2];
        if (kind == 2 ? at.has_adjoint : at.level != NO_LEVEL && (kind == 0 || at.has_adjoint)) {
            uint4 a[4];
            if (at.level == NO_LEVEL || kind == 0) {
                load_rows(a, factor, 64 * at.part, rows, aligned);
            }
            if (at.level != NO_LEVEL) {
                float4 applied[8];
                apply_rows(applied, maps[kind], kind == 1 ? in->adjoint : in->state);
                if (kind == 0) {
                    const __global float *w = weights + at.level * ND_CHUNK + 16 * i + lane / 4;
                    weigh_rows(dots, a, applied, w[0], w[8]);
                } else {
#pragma unroll
                    for (uint step = 0; step < 4; step++) {
                        a[step] = round_negative(&applied[2 * step]);
                    }
                }
            }
#pragma unroll
            for (uint unit = 0; unit < BLOCK_UNITS; unit++) {
                const uint k = min(block * BLOCK_UNITS + unit, K_UNITS - 1u);
                tile_multiply(sum[unit], a, tile_at(kind == 2 ? in->adjoint[k] : in->state[k]));
                if (kind == 1 && block * BLOCK_UNITS + unit == k) {
                    dot_of_states += dot_tiles(in->state[k], in->adjoint[k]);
                }
            }
#pragma unroll
            for (uint unit = 0; unit < BLOCK_UNITS; unit++) {
                tile_wait(sum[unit]);
            }
            if (kind == 0 && at.part == V_UNITS - 1) {
                if (dlevels && block == 0) {
                    store_dots(dlevels + dlevels_offset + row * LEVELS, dots, at.level, rows);
                }
                dots[0] = dots[1] = 0.0f;
            }
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    if (kind == 1) {
        dot_of_states = warp_sum(dot_of_states);
        if (lane == 0) {
            ((__global float *)place(ws, ws_offset, call.decays))[(chunk.id * BLOCKS + block) * TOKENS + i] =
                weights[ND_CHUNK * STATES] * dot_of_states;
        }
    }
    __global uint4 *to = (__global uint4 *)place(ws, ws_offset, call.map_gradients) + (chunk.id * 3 + kind) * GRADIENT +
                         i * STEPS * 32 + lane;
#pragma unroll
    for (uint unit = 0; unit < BLOCK_UNITS; unit++) {
        for (uint step = 0; step < 4; step++) {
            const uint at = 4 * (block * BLOCK_UNITS + unit) + step;
            if (at < STEPS) {
                to[at * 32] = round_tile(&sum[unit][2 * step]);
            }
        }
    }
}
