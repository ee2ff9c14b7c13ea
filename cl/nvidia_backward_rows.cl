/* SPDX-License-Identifier: Apache-2.0 */
/* The scalar-gated backward pass, see nvidia_backward.cl: the levels above a chunk. */

/* ---- rows -------------------------------------------------------------------------------------------------------- */

/*
 * A work-group has some heads of a group, and two stretches of ROW_CHUNKS chunks side by side, one after the other: stretch s
 * and the s-th one from the end, which together have equally many levels in all work-groups where N is a power of two.  The
 * chunks of a stretch read the same states, but for level 0; a warp has 16 rows of one of them.  A turn takes a state S: q S,
 * row by row times dO, gives dlevel_scales; dO S^T gives dq, which all turns add up in one sum, since a level's weight is
 * multiplied into dO.  Warps share the states and nothing else.
 */

#define ROW_ITEMS (ROW_CHUNKS * NB_ITEMS)
#define ROW_WARPS (NB_ITEMS / 32) /* of a chunk */
#define ROW_ROWS (ROW_CHUNKS * NB_CHUNK)
#define ROW_AHEAD (ROW_STAGES - ROW_LAG) /* states that are asked for before they are needed */
#define ROW_TILES (NV_K / 64)
#define ROW_PARTS (ROW_HEADS * TILES_V) /* of dO, 64 columns each */
#define ROW_LEVELS (LEVELS > CHUNK_LEVEL ? LEVELS - CHUNK_LEVEL : 0) /* above a chunk, also those that do not exist */

/* The last chunk of a stretch. */
uint stretch_end(uint stretch, uint chunks) { return min((stretch + 1) * ROW_CHUNKS, chunks) - 1; }

uint lowest_bit(uint bits) { return 31 - clz(bits & (0 - bits)); }

/*
 * States on their way to the matrix units.  With wgmma they come in bulk: `full` counts their arrival, `empty` the warps that
 * are done with them.  Else all items copy, and the work-group meets at a barrier for each state.
 */
typedef struct row_ring {
    __local uint4 *stages;
#if WGMMA
    __local arrivals *full, *empty;
#endif
    const __global uint4 *states; /* of the first head's chunks */
    uint chunks;
    /* What comes next: the last chunk of its stretch, its part, and the levels of this that are left; no levels: nothing. */
    uint n, part, bits;
    uint then_n; /* the last chunk of the stretch behind */
} row_ring;

void start_ring(const row_ring *ring) {
#if WGMMA
    if (get_local_id(0) < ROW_STAGES) {
        arrivals_start(&ring->full[get_local_id(0)], 1);
        arrivals_start(&ring->empty[get_local_id(0)], ROW_ITEMS / 32);
    }
    tile_publish();
    barrier(CLK_LOCAL_MEM_FENCE);
#endif
}

/* Starts to copy the state of a turn, the next one: with wgmma an item of the last warp, else all. */
void fetch_state_of(row_ring *ring, uint turn) {
    const uint item = get_local_id(0), fetcher = WGMMA ? ROW_ITEMS - 32 : item;
    if (ring->bits != 0 && item == fetcher) {
        const uint stage = turn % ROW_STAGES, end = block_end(ring->n, lowest_bit(ring->bits));
        const __global uint4 *from = ring->states + ((ulong)ring->part * ring->chunks + end) * STATE;
#if WGMMA
        if (turn >= ROW_STAGES) {
            arrivals_wait(&ring->empty[stage], (turn / ROW_STAGES - 1) % 2);
        }
        copy_bulk(ring->stages + stage * STATE, from, STATE * 16, &ring->full[stage]);
#else
        fetch_state(ring->stages + stage * STATE, from, item, ROW_ITEMS);
#endif
        ring->bits &= ring->bits - 1;
        if (ring->bits == 0) {
            ring->part++;
            if (ring->part == ROW_PARTS) {
                ring->n = ring->then_n;
                ring->then_n = 0;
                ring->part = 0;
            }
            ring->bits = ring->n;
        }
    }
#if !WGMMA
    end_copies();
#endif
}

/* The state of a turn, when it is there.  Without wgmma all warps are done with the turn before then. */
tile_rows wait_for_state(const row_ring *ring, uint turn) {
    const uint stage = turn % ROW_STAGES;
#if WGMMA
    arrivals_wait(&ring->full[stage], turn / ROW_STAGES % 2);
#else
    WAIT_FOR_COPIES_BUT(ROW_AHEAD - 1);
    barrier(CLK_LOCAL_MEM_FENCE);
#endif
    return tile_at(ring->stages + stage * STATE);
}

/* This warp is done with the state of a turn. */
void release_state(const row_ring *ring, uint turn) {
#if WGMMA
    if (warp_lane() == 0) {
        arrive(&ring->empty[turn % ROW_STAGES]);
    }
#endif
}

/* A turn with a state that this warp's chunk does not read. */
void skip_turn(row_ring *ring, uint turn) {
    (void)wait_for_state(ring, turn);
    fetch_state_of(ring, turn + ROW_AHEAD);
    release_state(ring, turn);
}

/* Where the arrays of a warp's first row and head are, of its rows and its chunk. */
typedef struct row_places {
    const __global ushort *d_o;
    const __global weight *level_scales; /* from the level of the chunk before */
    const __global float2 *gates;
    const __global float *kept;
    __global weight *gradients; /* of level scales, likewise; or NULL */
    __global float *dots, *level_dots;
    uint rows, n; /* rows that there are; the chunk */
} row_places;

/*
 * What a warp has in local memory: of the part that it works on and of the next one dO, of their heads the gates, level scales
 * and decays, times scale, from a level's block to the chunk; and what a head's turns give.  Rows, columns and levels that do
 * not exist are zeros from the start.
 */
typedef struct row_warp {
    uint4 d_o[2][16 * 8];
    float2 gates[2][16];
    row_places places;
    float scales[2][16 * SCALES_ROW];
    float kept[2][SLOTS];
    float gradients[16 * SCALES_ROW]; /* of level scales */
} row_warp;

/* Starts copying a part.  An item has row lane / 8 and every fourth from there, columns 8 (lane % 8).. or level lane % 8. */
void fetch_part(__local row_warp *to, uint wanted_part, uint chunks, int aligned) {
    const uint lane = anew(warp_lane()), part = anew(wanted_part);
    const uint row = lane / 8, h = part / TILES_V, tile = part % TILES_V;
    const int rows = (int)to->places.rows - (int)row;
    const __global ushort *d_o =
        to->places.d_o + (row * HEADS + h) * DIM_V + tile * NB_COLUMNS + lane % 8 * 8;
    __local uint4 *pieces = to->d_o[part % 2];
    const int has_columns = tile * NB_COLUMNS + lane % 8 * 8 < DIM_V;
    if (aligned) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (has_columns && 4 * i < rows) {
                copy_16(&pieces[swizzled(row + 4 * i, 8, lane % 8)], &d_o[i * (4 * HEADS * DIM_V)], 1);
            }
        }
    } else {
#pragma unroll 1
        for (int i = 0; i < 4; i++) {
            if (has_columns && 4 * i < rows) {
                pieces[swizzled(row + 4 * i, 8, lane % 8)] = load_piece(&d_o[i * (4 * HEADS * DIM_V)]);
            }
        }
    }
    if (tile > 0) {
        return;
    }
    const __global weight *level_scales = to->places.level_scales + (row * HEADS + h) * LEVELS + lane % 8;
    __local float *scales = &to->scales[h % 2][row * SCALES_ROW + lane % 8];
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (uint j = 0; j < SLOTS; j += 8) {
            if (j + lane % 8 < SLOTS && 4 * i < rows) {
                fetch_scale(&scales[4 * i * SCALES_ROW + j], level_scales, i * (4 * HEADS * LEVELS) + j, 1);
            }
        }
    }
    if (lane < 8) {
        copy_16(&to->gates[h % 2][2 * lane], &to->places.gates[(ulong)h * chunks * NB_CHUNK + 2 * lane], 1);
    }
    if (lane < SLOTS && (to->places.n >> lane & 1) != 0) {
        copy_4(&to->kept[h % 2][lane], &to->places.kept[(ulong)h * chunks * CHUNK_LEVELS + lane]);
    }
}

/* A warp's dO as A. */
void load_values(uint4 a[4], const __local uint4 *d_o) {
    const uint lane = anew(warp_lane());
#pragma unroll
    for (uint step = 0; step < 4; step++) {
        a[step] = load_matrices(&d_o[swizzled(lane & 15, 8, 2 * step + lane / 16)]);
    }
}

/* The decay from the chunk's start to a row. */
float row_decay(float2 gates) { return decay(gates.x + gates.y) * STATE_UNIT; }

/* Sums over rows r and r + 8 of c times a: items of even number get that of row r. */
float dot_rows(const float4 c[8], const uint4 a[4]) {
    float2 upper = (float2)(0.0f), lower = upper;
#pragma unroll
    for (uint i = 0; i < 4; i++) {
        upper = fma(c[2 * i].xy, unpack(a[i].x), upper);
        lower = fma(c[2 * i].zw, unpack(a[i].y), lower);
        upper = fma(c[2 * i + 1].xy, unpack(a[i].z), upper);
        lower = fma(c[2 * i + 1].zw, unpack(a[i].w), lower);
    }
    const int odd = (warp_lane() & 1u) != 0;
    const float x = upper.x + upper.y, y = lower.x + lower.y;
    const float sum = (odd ? y : x) + as_float(shuffle_xor(as_uint(odd ? x : y), 1));
    return sum + as_float(shuffle_xor(as_uint(sum), 2));
}

/* A warpgroup copies its rows of q, tiles of 64 columns one behind the other; all its products are done. */
void load_queries(__local uint4 *to, const __global uint4 *from) {
    const uint item = get_local_id(0) % 128, own = same_in_warp(get_local_id(0) / 128);
#pragma unroll 1
    for (uint i = item; i < 64 * K_PIECES; i += 128) {
        const uint row = i / K_PIECES, piece = i % K_PIECES;
        copy_16(&to[piece / 8 * (ROW_ROWS * 8) + swizzled(row, 8, piece % 8)], &from[i], 1);
    }
    wait_for_copies();
    tile_publish();
    warpgroup_barrier(own);
}

/* Starts product = q S. */
void multiply_queries(float4 product[8], tile_rows q, tile_rows state) {
    tile_start_local(product);
    tile_set_local(product, q, state);
#pragma unroll
    for (uint m = 1; m < ROW_TILES; m++) {
        tile_add_local(product, tile_step(q, m * (ROW_ROWS / 16)), tile_step(state, 4 * m));
    }
    tile_end();
}

/* Writes a head's results; row_dot: of the row whose dots the item gets, sum over levels. */
void store_head(__local row_warp *from, uint head, uint chunks, float row_dot) {
    const uint lane = anew(warp_lane()), h = anew(head), row = lane / 8;
    const int rows = (int)from->places.rows - (int)row;
    meet_in_warp();
    if (lane < CHUNK_LEVELS && (from->places.n >> lane & 1) != 0) {
        float sum = 0.0f;
#pragma unroll
        for (uint i = 0; i < 16; i++) {
            sum = fma(from->gradients[i * SCALES_ROW + lane], from->scales[h % 2][i * SCALES_ROW + lane], sum);
        }
        from->places.level_dots[((ulong)h * chunks * CHUNK_LEVELS + lane) * NB_LEVEL_DOTS] = sum;
    }
    if (lane % 4 < 2) {
        from->places.dots[(ulong)h * chunks * NB_CHUNK + lane / 4 + lane % 2 * 8] = row_dot;
    }
    __global weight *gradients = from->places.gradients;
    if (gradients) {
        gradients += (row * HEADS + h) * LEVELS + lane % 8;
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (uint j = 0; j < ROW_LEVELS; j += 8) {
                if (j + lane % 8 < ROW_LEVELS && 4 * i < rows) {
                    store_weight(gradients, i * (4 * HEADS * LEVELS) + j,
                                 j + lane % 8 < CHUNK_LEVELS
                                     ? from->gradients[(row + 4 * i) * SCALES_ROW + lane % 8 + j]
                                     : 0.0f);
                }
            }
        }
    }
    meet_in_warp();
}

__kernel __attribute__((reqd_work_group_size(ROW_ITEMS, 1, 1))) void
nb_rows(const loglin_nvidia_gradients call, __global float *ws, ulong ws_offset, const __global ushort *d_o,
        ulong d_o_offset, const __global weight *level_scales, ulong level_scales_offset,
        __global weight *dlevel_scales, ulong dlevel_scales_offset, uint aligned) {
    __local uint4 stages[ROW_STAGES * STATE] __attribute__((aligned(1024)));
    __local uint4 queries[ROW_ROWS * K_PIECES] __attribute__((aligned(1024)));
    __local row_warp warps[ROW_ITEMS / 32];
#if WGMMA
    __local arrivals full[ROW_STAGES], empty[ROW_STAGES];
#endif
    const uint lane = warp_lane(), warp = same_in_warp(get_local_id(0) / 32), r = lane / 4, p = lane % 4;
    const uint own = r + p % 2 * 8; /* the row whose dots the item gets */
    const ulong id = get_group_id(0), padded = (ulong)call.chunks * NB_CHUNK;
    const uint block = id % ROW_BLOCKS, group = id / ROW_BLOCKS % GROUPS, b = id / (ROW_BLOCKS * GROUPS) % call.batch;
    const uint stretches = (call.chunks + ROW_CHUNKS - 1) / ROW_CHUNKS;
    const uint first_stretch = id / (ROW_BLOCKS * GROUPS) / call.batch, last_stretch = stretches - 1 - first_stretch;
    const uint both = first_stretch < last_stretch;
    const uint first_head = group * GROUP_HEADS + block * ROW_HEADS;
    const ulong bg = (ulong)b * GROUPS + group, first_bh = (ulong)b * HEADS + first_head;
    __local row_warp *mine = &warps[warp];
    __local uint4 *own_queries = queries + warp / 4 * (64 * 8);
    const tile_rows q = tile_at(own_queries);
    const uint end_1 = stretch_end(last_stretch, call.chunks), end_2 = stretch_end(first_stretch, call.chunks);
    row_ring ring = {stages,
#if WGMMA
                     full, empty,
#endif
                     (const __global uint4 *)place(ws, ws_offset, call.states) +
                         first_bh * TILES_V * call.chunks * STATE,
                     call.chunks, end_1, 0, end_1, both ? end_2 : 0};

    start_ring(&ring);
#pragma unroll 1
    for (uint i = 0; i < ROW_AHEAD; i++) {
        fetch_state_of(&ring, i);
    }
    uint turn = 0;
#pragma unroll 1
    for (uint i = 0; i < (both ? 2 : 1); i++) {
        /* Where the last stretch lacks a chunk, the warps that would have it do the same as those of the one before. */
        const uint end = i == 0 ? end_1 : end_2;
        const uint n = min((i == 0 ? last_stretch : first_stretch) * ROW_CHUNKS + warp / ROW_WARPS, end);
        const uint first = n * NB_CHUNK + 16 * (warp % ROW_WARPS);
#pragma unroll 1
        for (uint word = lane; word < sizeof(row_warp) / 4; word += 32) {
            ((__local uint *)mine)[word] = 0;
        }
        meet_in_warp();
        if (lane == 0) {
            const ulong row = ((ulong)b * call.length + first) * HEADS + first_head;
            const ulong level_at = row * LEVELS + CHUNK_LEVEL, chunk = first_bh * call.chunks + n;
            mine->places.d_o = d_o + d_o_offset + row * DIM_V;
            mine->places.level_scales = level_scales + level_scales_offset + level_at;
            mine->places.gates = (const __global float2 *)place(ws, ws_offset, call.gates) + first_bh * padded + first;
            mine->places.kept = (const __global float *)place(ws, ws_offset, call.kept) + chunk * CHUNK_LEVELS;
            mine->places.gradients = dlevel_scales ? dlevel_scales + dlevel_scales_offset + level_at : dlevel_scales;
            mine->places.dots = (__global float *)place(ws, ws_offset, call.dots) + first_bh * padded + first;
            mine->places.level_dots = (__global float *)place(ws, ws_offset, call.level_dots) +
                                      chunk * CHUNK_LEVELS * NB_LEVEL_DOTS + warp % ROW_WARPS;
            mine->places.rows = first < call.length ? call.length - first : 0;
            mine->places.n = n;
        }
        meet_in_warp();
        if (n > 0) {
            fetch_part(mine, 0, call.chunks, (int)aligned);
        }
        load_queries(own_queries, (const __global uint4 *)place(ws, ws_offset, call.queries) +
                                      (bg * padded + n * NB_CHUNK + warp % ROW_WARPS / 4 * 64) * K_PIECES);
        float4 total[ROW_TILES][8];
#pragma unroll
        for (uint m = 0; m < ROW_TILES; m++) {
            tile_clear(total[m]);
        }
        float row_dot = 0.0f;
#pragma unroll 1
        for (uint part = 0; part < ROW_PARTS; part++) {
            const uint h = part / TILES_V, tile = part % TILES_V;
            const __local float *kept = mine->kept[h % 2], *scales = mine->scales[h % 2] + r * SCALES_ROW;
            wait_for_copies();
            meet_in_warp();
            const float upper_decay = row_decay(mine->gates[h % 2][r]);
            const float lower_decay = row_decay(mine->gates[h % 2][r + 8]);
            if ((n & 1) != (end & 1)) {
                skip_turn(&ring, turn++);
            }
#pragma unroll 1
            for (uint bits = n; bits != 0; bits &= bits - 1, turn++) {
                const uint j = lowest_bit(bits);
                const tile_rows state = wait_for_state(&ring, turn);
                float4 product[8];
                multiply_queries(product, q, state);
                /* While this product is made, what else there is to do. */
                fetch_state_of(&ring, turn + ROW_AHEAD);
                if (bits == n) {
                    if (part > 0 && tile == 0) {
                        store_head(mine, h - 1, call.chunks, row_dot);
                        row_dot = 0.0f;
                    }
                    if (part + 1 < ROW_PARTS) {
                        fetch_part(mine, part + 1, call.chunks, (int)aligned);
                    }
                }
                const float upper = kept[j] * upper_decay, lower = kept[j] * lower_decay;
                const float upper_scale = scales[j], lower_scale = scales[8 * SCALES_ROW + j];
                const uint upper_pair = pack(upper * upper_scale, upper * upper_scale);
                const uint lower_pair = pack(lower * lower_scale, lower * lower_scale);
                tile_wait(product);
                uint4 a[4];
                load_values(a, mine->d_o[part % 2]);
                const float gradient = dot_rows(product, a) * (p % 2 == 0 ? upper : lower);
#pragma unroll
                for (uint step = 0; step < 4; step++) {
                    a[step] = scale_rows(a[step], upper_pair, lower_pair);
                }
#pragma unroll
                for (uint m = 0; m < ROW_TILES; m++) {
                    tile_start(total[m], a);
                }
#pragma unroll
                for (uint m = 0; m < ROW_TILES; m++) {
                    tile_add_transposed(total[m], a, tile_step(state, 4 * m));
                }
                tile_end();
                row_dot = fma(gradient, p % 2 == 0 ? upper_scale : lower_scale, row_dot);
                if (p < 2) {
                    __local float *to = &mine->gradients[own * SCALES_ROW + j];
                    *to = tile == 0 ? gradient : *to + gradient;
                }
#pragma unroll
                for (uint m = 0; m < ROW_TILES; m++) {
                    tile_wait(total[m]);
                }
                release_state(&ring, turn);
            }
            if (n == 0 && tile == 0) {
                store_head(mine, h, call.chunks, 0.0f);
            }
        }
        if (n > 0) {
            store_head(mine, ROW_HEADS - 1, call.chunks, row_dot);
        }
        __global float *to = (__global float *)place(ws, ws_offset, call.row_parts) +
                             ((((ulong)block * call.batch + b) * GROUPS + group) * padded + first + r) * NV_K + 2 * p;
#pragma unroll
        for (uint m = 0; m < ROW_TILES; m++) {
#pragma unroll
            for (uint step = 0; step < 8; step++) {
                *(__global float2 *)(to + 64 * m + 8 * step) = total[m][step].xy;
                *(__global float2 *)(to + 8 * NV_K + 64 * m + 8 * step) = total[m][step].zw;
            }
        }
    }
}
