/* SPDX-License-Identifier: Apache-2.0 */
/* The delta rule, see nvidia_delta.cl: the walk through the chunks, and the final states. */

/* ---- walk ---------------------------------------------------------------------------------------------------------- */

/* The level states of a work-group's columns, and what the chunk at hand is to write into them. */
typedef struct level_states {
    uint4 rounded[STATES][STATE];
    uint4 rest[STATES][STATE];
    uint4 update[STATES][UPDATE];
} level_states;

/* Number of trailing ones: the levels of chunks that end with chunk n become one state, of this level. */
uint merged_level(uint n) { return popcount(n & ~(n + 1)); }

#if BACKWARD
/* Level states of chunks before chunk n, all together. */
ulong states_before(uint n) {
    ulong count = 0;
    for (uint bit = 0; bit < 32 && (n >> bit) != 0; bit++) {
        const uint width = 1u << bit, rest = n & (2 * width - 1);
        count += (n - rest) / 2 + (rest > width ? rest - width : 0);
    }
    return count;
}

/* Where a slice's part of the states, or of their adjoints, of a sequence and head begins. */
__global uint4 *find_saved(const loglin_delta_call call, __global char *states, ulong bh, uint slice) {
    return (__global uint4 *)states + bh * (states_before(call.chunks) + popcount(call.chunks - 1)) * SAVED + slice * STATE;
}

/* The states of the levels in `bits` to memory, behind one another, by the first `items`; `to`: the slice's. */
void save_states(__global uint4 *to, const __local level_states *states, uint bits, int columns, uint items) {
    const uint lane = warp_lane(), right = lane / 2 & 1, lower = lane & 1;
    to += (8 * lower + lane / 4) * (DIM_K / 8) + right;
    for (uint level = 0; bits != 0; level++, bits >>= 1) {
        if ((bits & 1) != 0) {
            for (uint i = get_local_id(0) / 32; i < (uint)columns / 16 * STEPS; i += items / 32) {
                to[i / STEPS * 16 * (DIM_K / 8) + i % STEPS * 2] = transpose_quad(states->rounded[level][i * 32 + lane]);
            }
            to += SAVED;
        }
    }
}
#endif

void clear_columns(float4 sum[V_TILES][2]) {
#pragma unroll
    for (uint m = 0; m < V_TILES; m++) {
        sum[m][0] = sum[m][1] = (float4)(0.0f);
    }
}

/* sum += (16 rows of the chunk's map) E; state: E, from this item's numbers on. */
void add_seen(float4 sum[V_TILES][2], const uint4 rows[STEPS], const __local uint4 *state) {
#pragma unroll
    for (uint step = 0; step < STEPS; step++) {
#pragma unroll
        for (uint m = 0; m < V_TILES; m++) {
            add_product(sum[m], rows[step], state[(m * STEPS + step) * 32]);
        }
    }
}

/* The same, transposed. */
void add_seen_transposed(float4 sum[V_TILES][2], const uint4 rows[STEPS], const __local uint4 *state) {
#pragma unroll
    for (uint step = 0; step < STEPS; step++) {
#pragma unroll
        for (uint m = 0; m < V_TILES; m++) {
            add_product(sum[m], state[(m * STEPS + step) * 32], rows[step]);
        }
    }
}

/* 16 tokens of o: MZ V + sum over the levels of weight READ E. */
void read_states(float4 out[V_TILES][2], const __local level_states *states, const uint4 read[STEPS],
                 const uint4 own[TOKENS], const __local uint4 *values, const __local float *weights, uint i, uint n) {
    const uint lane = warp_lane();
    clear_columns(out);
#pragma unroll
    for (uint j = 0; j < TOKENS; j++) {
#pragma unroll
        for (uint m = 0; m < V_TILES && j <= i; m++) {
            add_product(out[m], own[j], load_tile_transposed(values + 16 * j * VALUE_ROW + 2 * m, VALUE_ROW));
        }
    }
    for (uint level = 0, bits = n; bits != 0; level++, bits >>= 1) {
        if ((bits & 1) == 0) {
            continue;
        }
        float4 sum[V_TILES][2];
        clear_columns(sum);
        add_seen(sum, read, states->rounded[level] + lane);
        const float upper = weights[level * ND_CHUNK + 16 * i + lane / 4];
        const float lower = weights[level * ND_CHUNK + 16 * i + 8 + lane / 4];
        const float4 weight_of = (float4)(upper, upper, lower, lower);
#pragma unroll
        for (uint m = 0; m < V_TILES; m++) {
            out[m][0] = fma(weight_of, sum[m][0], out[m][0]);
            out[m][1] = fma(weight_of, sum[m][1], out[m][1]);
        }
    }
}

void store_outputs(__global ushort *o, const float4 out[V_TILES][2], int row, int rows, int columns, uint aligned) {
    const int lane = (int)warp_lane();
#pragma unroll
    for (int m = 0; m < V_TILES; m++) {
        const uint4 x = round_tile(out[m]);
        const uint pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int r = row + lane / 4 + 8 * (e % 2), column = 16 * m + 8 * (e / 2) + 2 * (lane % 4);
            if (r < rows && column < columns) {
                __global ushort *to = o + (ulong)r * (HEADS * DIM_V) + column;
                if (aligned) {
                    *(__global uint *)to = pairs[e];
                } else {
                    to[0] = (ushort)pairs[e];
                    to[1] = (ushort)(pairs[e] >> 16);
                }
            }
        }
    }
}

/*
 * What 16 tokens write, transposed: V - K_START E summed over the levels below `merged`, and - K_START E of each of the
 * others.
 */
void find_updates(__local level_states *states, const uint4 start[STEPS], const __local uint4 *values, uint i, uint n,
                  uint merged, int is_last) {
    const uint lane = warp_lane();
    float4 own[V_TILES][2];
#pragma unroll
    for (uint m = 0; m < V_TILES; m++) {
        unround_tile(own[m], load_tile_transposed(values + 16 * i * VALUE_ROW + 2 * m, VALUE_ROW));
    }
    for (uint level = 0, bits = n; bits != 0; level++, bits >>= 1) {
        if ((bits & 1) == 0) {
            continue;
        }
        float4 seen[V_TILES][2];
        clear_columns(seen);
        add_seen_transposed(seen, start, states->rounded[level] + lane);
#pragma unroll
        for (uint m = 0; m < V_TILES; m++) {
            if (level < merged) {
                own[m][0] -= seen[m][0];
                own[m][1] -= seen[m][1];
            } else {
                seen[m][0] = -seen[m][0];
                seen[m][1] = -seen[m][1];
                states->update[level][(m * TOKENS + i) * 32 + lane] = round_tile(seen[m]);
            }
        }
    }
#pragma unroll
    for (uint m = 0; m < V_TILES && !is_last; m++) {
        states->update[merged][(m * TOKENS + i) * 32 + lane] = round_tile(own[m]);
    }
}

/* sum += 16 rows of K of a state. */
void add_state(float4 sum[V_TILES][2], const __local level_states *states, uint level, uint step) {
#pragma unroll
    for (uint m = 0; m < V_TILES; m++) {
        const uint at = (m * STEPS + step) * 32 + warp_lane();
        float4 x[2], y[2];
        unround_tile(x, states->rounded[level][at]);
        unround_tile(y, states->rest[level][at]);
        sum[m][0] += x[0] + y[0];
        sum[m][1] += x[1] + y[1];
    }
}

/* sum = kept sum + WRITE^T update */
void pass_state(float4 sum[V_TILES][2], const __local uint4 *update, const uint4 write[TOKENS], float kept) {
#pragma unroll
    for (uint m = 0; m < V_TILES; m++) {
        sum[m][0] *= kept;
        sum[m][1] *= kept;
#pragma unroll
        for (uint t = 0; t < TOKENS; t++) {
            add_product(sum[m], update[(m * TOKENS + t) * 32 + warp_lane()], write[t]);
        }
    }
}

void put_state(__local level_states *states, const float4 sum[V_TILES][2], uint level, uint step) {
#pragma unroll
    for (uint m = 0; m < V_TILES; m++) {
        const uint at = (m * STEPS + step) * 32 + warp_lane();
        const uint4 rounded = round_tile(sum[m]);
        float4 rest[2];
        unround_tile(rest, rounded);
        rest[0] = sum[m][0] - rest[0];
        rest[1] = sum[m][1] - rest[1];
        states->rounded[level][at] = rounded;
        states->rest[level][at] = round_tile(rest);
    }
}

/* 16 rows of K of all states at the chunk's end. */
void update_states(__local level_states *states, const uint4 write[TOKENS], float kept, uint step, uint n, uint merged) {
    float4 sum[V_TILES][2];
    for (uint level = merged; level < STATES; level++) {
        if (level != merged && ((n >> level) & 1) == 0) {
            continue;
        }
        clear_columns(sum);
        if (level == merged) {
            for (uint below = 0; below < merged; below++) {
                add_state(sum, states, below, step);
            }
        } else {
            add_state(sum, states, level, step);
        }
        pass_state(sum, states->update[level], write, kept);
        put_state(states, sum, level, step);
    }
}

/* The caller's final states of the levels between chunks, 16 rows of K; `values`: of level FIRST_LEVEL. */
void store_final(__global float *values, const __local level_states *states, const uint4 write[TOKENS], float kept,
                 uint step, uint n, int columns) {
    const uint lane = warp_lane();
    for (uint level = 0, bits = n; bits != 0; level++, bits >>= 1) {
        if ((bits & 1) == 0) {
            continue;
        }
        float4 sum[V_TILES][2];
        clear_columns(sum);
        add_state(sum, states, level, step);
        pass_state(sum, states->update[level], write, kept);
#pragma unroll
        for (uint m = 0; m < V_TILES; m++) {
#pragma unroll
            for (uint half_of = 0; half_of < 2; half_of++) {
                __global float *to = values + ((ulong)level * DIM_K + 16 * step + 8 * half_of + 2 * (lane % 4)) * DIM_V +
                                     16 * m + lane / 4;
                if ((int)(16 * m) < columns) {
                    to[0] = sum[m][half_of].x;
                    to[DIM_V] = sum[m][half_of].y;
                    to[8] = sum[m][half_of].z;
                    to[DIM_V + 8] = sum[m][half_of].w;
                }
            }
        }
    }
}

/* The tiles of 16 rows of K of a K by tokens part of a chunk's map; none behind its last rows. */
void load_row_tiles(uint4 to[TOKENS], const __global uint4 *from, uint step) {
#pragma unroll
    for (uint t = 0; t < TOKENS; t++) {
        to[t] = step < STEPS ? from[(step * TOKENS + t) * 32 + warp_lane()] : (uint4)(0u);
    }
}

/* Row i of a lower triangle of tiles. */
void load_lower_row(uint4 to[TOKENS], const __global uint4 *from, uint i) {
#pragma unroll
    for (uint j = 0; j < TOKENS; j++) {
        to[j] = i < TOKENS && j <= i ? from[lower_tile(i, j) * 32 + warp_lane()] : (uint4)(0u);
    }
}

/* The weights of a chunk's rows and its decay. */
void fetch_rows(__local float4 *to, const __global float4 *from) {
    for (uint i = get_local_id(0); i < ROWS / 4; i += ND_WALK_ITEMS) {
        copy_16(&to[i], &from[i], 1);
    }
}

/* A work-group takes a slice of the columns of V of a sequence and head. */
__kernel __attribute__((reqd_work_group_size(ND_WALK_ITEMS, 1, 1))) void
nvidia_delta_walk(const loglin_delta_call call, __global float *ws, ulong ws_offset, const __global ushort *v,
                  ulong v_offset, __global ushort *o, ulong o_offset, __global float *final, ulong final_offset,
                  uint aligned) {
    __local level_states states;
    __local uint4 values_at[2][ND_CHUNK * VALUE_ROW];
    __local float4 rows_at[2][ROWS / 4];
    const uint warp = get_local_id(0) / 32;
    const slice_place at = find_slice(call);
    const int tokens = (int)call.length;
    const ulong chunk_values = (ulong)ND_CHUNK * HEADS * DIM_V;
    const __global uint4 *map = find_map(call, ws, ws_offset, at.first_chunk);
    const __global float4 *rows_from = (const __global float4 *)find_weights(call, ws, ws_offset, at.first_chunk);
    v += v_offset + at.values;
#if BACKWARD
    __global uint4 *saved = find_saved(call, place(ws, ws_offset, call.states), at.bh, at.slice);
#else
    o += o_offset + at.values;
#endif
    fetch_matrix(values_at[0], VALUE_ROW, v, HEADS * DIM_V, at.columns, tokens, aligned, ND_WALK_ITEMS);
    fetch_rows(rows_at[0], rows_from);
    /* Tiles of READ or, behind them, of K_START: those of the warp's 16 tokens. */
    uint4 mine[STEPS];
#pragma unroll
    for (uint step = 0; step < STEPS; step++) {
        mine[step] = map[READ_AT + (warp * STEPS + step) * 32 + warp_lane()];
    }
    for (uint n = 0; n < call.chunks; n++) {
        const int is_last = n + 1 == call.chunks;
        const uint merged = is_last ? 0 : merged_level(n);
        const __local uint4 *values = values_at[n % 2];
        const __local float *rows = (const __local float *)rows_at[n % 2];
        uint4 write[TURNS][TOKENS];
#pragma unroll
        for (uint turn = 0; turn < TURNS; turn++) {
            load_row_tiles(write[turn], map + WRITE_T_AT, warp + turn * WALK_WARPS);
        }
#if !BACKWARD
        uint4 own[TOKENS];
        load_lower_row(own, map + OWN_AT, warp);
#endif
        wait_for_copies();
        barrier(CLK_LOCAL_MEM_FENCE);
        if (!is_last) {
            fetch_matrix(values_at[(n + 1) % 2], VALUE_ROW, v + (n + 1) * chunk_values, HEADS * DIM_V, at.columns,
                         tokens - (int)(n + 1) * ND_CHUNK, aligned, ND_WALK_ITEMS);
            fetch_rows(rows_at[(n + 1) % 2], rows_from + (ulong)(n + 1) * (ROWS / 4));
        }
        if (warp < TOKENS) {
#if BACKWARD
            save_states(saved + states_before(n) * SAVED, &states, n, at.columns, 32 * TOKENS);
#else
            float4 out[V_TILES][2];
            read_states(out, &states, mine, own, values, rows, warp, n);
            store_outputs(o + n * chunk_values, out, (int)(16 * warp), tokens - (int)n * ND_CHUNK, at.columns, aligned);
#endif
        } else {
            find_updates(&states, mine, values, warp - TOKENS, n, merged, is_last);
        }
        if (is_last && !final) {
            break;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        const float kept = rows[ND_CHUNK * STATES];
        if (!is_last) {
#pragma unroll
            for (uint step = 0; step < STEPS; step++) {
                mine[step] = map[MAP + READ_AT + (warp * STEPS + step) * 32 + warp_lane()];
            }
        }
#pragma unroll
        for (uint turn = 0; turn < TURNS; turn++) {
            const uint step = warp + turn * WALK_WARPS;
            if (step >= STEPS) {
                break;
            }
            if (is_last) {
                store_final(final + final_offset + (at.bh * LEVELS + FIRST_LEVEL) * (DIM_K * DIM_V) + at.slice * ND_V,
                            &states, write[turn], kept, step, n, at.columns);
            } else {
                update_states(&states, write[turn], kept, step, n, merged);
            }
        }
        map += MAP;
    }
}

/* ---- final --------------------------------------------------------------------------------------------------------- */

/* Element (row of K, token) of WRITE^T. */
float write_element(const __global uint4 *map, uint row, uint token) {
    const uint lane = row % 8 * 4 + token % 8 / 2;
    const __global uint *words =
        (const __global uint *)&map[WRITE_T_AT + (row / 16 * TOKENS + token / 16) * 32 + lane];
    const float2 pair = unpack(words[token % 16 / 8 * 2 + row % 16 / 8]);
    return token % 2 != 0 ? pair.y : pair.x;
}

/*
 * The final states of the levels inside the last chunk, from its tokens; zeros for the levels that do not exist.  A
 * work-group makes a row of K, an item some columns of V.
 */
__kernel __attribute__((reqd_work_group_size(ND_PREPARE_ITEMS, 1, 1))) void
nvidia_delta_final(const loglin_delta_call call, __global float *ws, ulong ws_offset, const __global ushort *v,
                   ulong v_offset, __global float *states, ulong states_offset, __global int *position,
                   ulong position_offset) {
    const uint item = get_local_id(0), row = get_group_id(0) % DIM_K;
    const ulong bh = get_group_id(0) / DIM_K, head = bh % HEADS, b = bh / HEADS;
    const uint chunk = call.chunks - 1, last = call.length - 1 - chunk * ND_CHUNK;
    const __global uint4 *map =
        (const __global uint4 *)place(ws, ws_offset, call.maps) + (bh * call.chunks + chunk) * MAP;
    v += v_offset + ((b * call.length + (ulong)chunk * ND_CHUNK) * HEADS + head) * DIM_V;
    states += states_offset + (bh * LEVELS * DIM_K + row) * DIM_V;
    for (uint column = item; column < DIM_V; column += ND_PREPARE_ITEMS) {
        for (uint level = 0; level < LEVELS; level++) {
            if (level >= FIRST_LEVEL && ((chunk >> (level - FIRST_LEVEL)) & 1) != 0) {
                continue;
            }
            const uint width = level == 0 ? 1 : 1u << (level - 1), begin = level == 0 ? last : last >> level << level;
            const int exists = level == 0 || (level < FIRST_LEVEL && (last & width) != 0);
            float x = 0.0f;
            for (uint s = begin; exists && s < begin + width; s++) {
                x = fma(write_element(map, row, s), unpack(v[(ulong)s * (HEADS * DIM_V) + column]).x, x);
            }
            states[(ulong)level * (DIM_K * DIM_V) + column] = x;
        }
    }
    if (row == 0 && head == 0 && item == 0 && position) {
        position[position_offset + b] = (int)call.length;
    }
}
