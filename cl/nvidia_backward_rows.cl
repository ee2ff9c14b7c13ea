/* SPDX-License-Identifier: Apache-2.0 */
/* The scalar-gated backward pass, see nvidia_backward.cl: the levels above a chunk. */

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

/* dq and dlevel_scales from the states of the levels above a chunk, of a tile and a block of heads. */
__kernel __attribute__((reqd_work_group_size(NB_ITEMS, 1, 1))) void
nb_rows(const loglin_nvidia_gradients call, __global float *ws, ulong ws_offset, const __global ushort *d_o,
        ulong d_o_offset, const __global weight *level_scales, ulong level_scales_offset,
        __global weight *dlevel_scales, ulong dlevel_scales_offset, uint aligned) {
    __local uint4 states_at[2][STATE];
    __local uint4 values_at[2][TILES_V][COLUMN_TILE];
    __local uint4 queries[ROW_TILE];
    __local float scales_at[3][NB_TILE * SCALES_ROW]; /* of the head that is fetched, worked on, and finished */
    __local float2 gates_at[2][NB_TILE];
    __local float kept_at[2][SCALES_ROW];
    __local float dots_at[2][4][SLOTS][NB_TILE];
    const uint item = get_local_id(0), lane = item % 32, warp = item / 32, half_rows = warp % 2, quarter = warp / 2;
    const ulong id = get_group_id(0);
    const uint block = id % HEAD_BLOCKS, group = id / HEAD_BLOCKS % GROUPS,
               b = id / (HEAD_BLOCKS * GROUPS) % call.batch;
    const uint tile = 2 * call.chunks - 1 - id / (HEAD_BLOCKS * GROUPS) / call.batch, n = tile / 2;
    const uint first = tile * NB_TILE, first_head = group * GROUP_HEADS + block * BLOCK_HEADS;
    const uint steps = BLOCK_HEADS * popcount(n) * TILES_V;
    const int rows = (int)call.length - (int)first;
    const ulong bg = (ulong)b * GROUPS + group, padded = (ulong)call.chunks * NB_CHUNK;
    const __global ushort *values = d_o + d_o_offset + (((ulong)b * call.length + first) * HEADS + first_head) * DIM_V;
    const ulong level_row = (((ulong)b * call.length + first) * HEADS + first_head) * LEVELS;
    const ulong first_bh = (ulong)b * HEADS + first_head;
    const __global uint4 *all_states = (const __global uint4 *)place(ws, ws_offset, call.states);

    if (steps > 0) {
        fetch_tile(queries,
                   (const __global uint4 *)place(ws, ws_offset, call.queries) + (bg * padded + first) * K_PIECES,
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
    row_turn wanted = {0, n, 0}, turn = wanted;
    for (uint step = 0; step <= steps + 1; step++) {
        wait_for_copies();
        barrier(CLK_LOCAL_MEM_FENCE);
        if (step < steps) {
            /* Fetch what the next turn takes: a state, and at a head's begin all else. */
            const uint h = wanted.h;
            const ulong bh = first_bh + h;
            const uint e = block_end(n, turn_level(wanted));
            fetch_state(states_at[step % 2], all_states + ((bh * TILES_V + wanted.part) * call.chunks + e) * STATE,
                        item, NB_ITEMS);
            if (wanted.bits == n && wanted.part == 0) {
                for (uint i = 0; i < TILES_V; i++) {
                    fetch_columns(values_at[h % 2][i], values + (ulong)h * DIM_V, i, rows, aligned, item, NB_ITEMS);
                }
                if (item < NB_TILE / 2) {
                    copy_16(&gates_at[h % 2][2 * item],
                            (const __global float2 *)place(ws, ws_offset, call.gates) + bh * padded + first + 2 * item,
                            1);
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
            wanted = next_turn(wanted, n);
        }
        int finished = n == 0 && step == 0 ? BLOCK_HEADS : 0; /* heads */
        if (step > 0 && turn.h > 0 && turn.bits == n && turn.part == 0) {
            finished = 1;
        }
        const uint first_finished = n == 0 ? 0 : turn.h - 1;
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
                if (turn.bits == n) {
#pragma unroll
                    for (uint i = 0; i < 4; i++) {
                        const uint row = item_row(half_rows, i);
                        start[i] = decay(gates_at[h % 2][row].x + gates_at[h % 2][row].y) * STATE_UNIT;
                    }
                }
                const float kept = kept_at[h % 2][j];
                float dots[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
                for (uint i = 0; i < 4; i++) {
                    const uint row = item_row(half_rows, i), m = i / 2;
                    const float row_weight = kept * start[i];
                    const float scale = row_weight * scales_at[h % 3][row * SCALES_ROW + j];
#pragma unroll
                    for (uint c = 0; c < ROW_EIGHTS; c++) {
                        const float2 own = i % 2 == 0 ? product[m][c].xy : product[m][c].zw;
                        if (i % 2 == 0) {
                            total[m][c].xy += scale * own;
                        } else {
                            total[m][c].zw += scale * own;
                        }
                        const float2 q =
                            tile_pair(queries, K_PIECES, row, quarter * ROW_COLUMNS + 8 * c + 2 * (lane % 4));
                        dots[i] = fma(q.x, own.x, fma(q.y, own.y, dots[i]));
                    }
                    dots[i] *= row_weight;
                }
                /* The item gets the sum of its row number lane % 4. */
                dots_at[h % 2][quarter][j][item_row(half_rows, lane % 4)] = sum_four(dots, lane, 1);
#pragma unroll
                for (uint m = 0; m < 2; m++) {
#pragma unroll
                    for (uint i = 0; i < ROW_EIGHTS; i++) {
                        product[m][i] = (float4)(0.0f);
                    }
                }
            }
            turn = next_turn(turn, n);
        }
        /* Heads behind: the gradients of their level scales.  Items 64 i.. have the levels i, i + 4, ... */
        for (uint h = first_finished; finished-- > 0; h++) {
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
    __global float *to = (__global float *)place(ws, ws_offset, call.query_parts) +
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
