/* SPDX-License-Identifier: Apache-2.0 */
/* The scalar-gated backward pass, see nvidia_backward.cl: the levels above a chunk. */

/* ---- rows -------------------------------------------------------------------------------------------------------- */

/*
 * A work-group has chunks n and N - 1 - n, one after the other, which have equally many levels in all work-groups where N is a
 * power of two, and some heads of a group; a warp has 16 rows, whose q stays in registers.  A turn takes a state S: q S, row
 * by row times dO, gives dlevel_scales; dO S^T gives dq, which all turns add up in one sum, since a level's weight is multiplied
 * into dO.  Warps share the states and nothing else.
 */

#define ROW_TILES (NV_K / 64)
#define ROW_PARTS (ROW_HEADS * TILES_V) /* of dO, 64 columns each */
#define ROW_LEVELS (LEVELS > CHUNK_LEVEL ? LEVELS - CHUNK_LEVEL : 0) /* above a chunk, also those that do not exist */
#define ROW_AHEAD (NB_ROW_STAGES - 1) /* states that are asked for before the first one is needed */
#define SCALES_OF_WORD (4 / (uint)sizeof(stored_scale))
#define SCALE_WORDS ((SLOTS + 2 * SCALES_OF_WORD - 2) / SCALES_OF_WORD) /* of a row's level scales */
#define WORDS_ROW (SCALE_WORDS | 1)

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
    /* The turn that comes next: its chunk, part, and the levels of this that are left; none: there is no turn any more. */
    uint n, part, bits;
    uint then_n; /* the chunk behind */
} row_ring;

void start_ring(const row_ring *ring) {
#if WGMMA
    if (get_local_id(0) < NB_ROW_STAGES) {
        arrivals_start(&ring->full[get_local_id(0)], 1);
        arrivals_start(&ring->empty[get_local_id(0)], NB_ITEMS / 32);
    }
    tile_publish();
    barrier(CLK_LOCAL_MEM_FENCE);
#endif
}

/*
 * Starts to copy the state of a turn, the next one; turns count on from a work-group's first chunk to its second.  With wgmma an
 * item of the last warp does it: the other warps of its warpgroup wait for that before their next products.
 */
void fetch_state_of(row_ring *ring, uint turn) {
    const uint item = get_local_id(0), fetcher = WGMMA ? NB_ITEMS - 32 : item;
    if (ring->bits != 0 && item == fetcher) {
        const uint stage = turn % NB_ROW_STAGES, end = block_end(ring->n, lowest_bit(ring->bits));
        const __global uint4 *from = ring->states + ((ulong)ring->part * ring->chunks + end) * STATE;
#if WGMMA
        if (turn >= NB_ROW_STAGES) {
            arrivals_wait(&ring->empty[stage], (turn / NB_ROW_STAGES - 1) % 2);
        }
        copy_bulk(ring->stages + stage * STATE, from, STATE * 16, &ring->full[stage]);
#else
        fetch_state(ring->stages + stage * STATE, from, item, NB_ITEMS);
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
    const uint stage = turn % NB_ROW_STAGES;
#if WGMMA
    arrivals_wait(&ring->full[stage], turn / NB_ROW_STAGES % 2);
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
        arrive(&ring->empty[turn % NB_ROW_STAGES]);
    }
#endif
}

/*
 * What a warp has in local memory: of the part that it works on and of the next one dO, of their heads the gates, level scales
 * and decays, times scale, from a level's block to the chunk; and what a head's turns give.  Rows, columns and levels that do
 * not exist are zeros from the start.  Level scales come in words, so a row of 16 bits may start with one that is not its own.
 */
typedef struct row_warp {
    uint4 d_o[2][16 * 8];
    float2 gates[2][16];
    uint scales[2][16 * WORDS_ROW];
    uint odd; /* the first row's level scales start in the middle of a word */
    float kept[2][SLOTS];
    float gradients[16 * SCALES_ROW]; /* of level scales */
} row_warp;

/* Where an item of a warp copies from: row lane / 8 of the warp, columns 8 (lane % 8).. or word lane % 8 of level scales. */
typedef struct row_source {
    const __global ushort *d_o;
    const __global weight *level_scales; /* from the level of the chunk before */
    const __global float2 *gates;        /* of the warp's first row */
    const __global float *kept;
    int rows; /* that there are */
    uint n, chunks;
} row_source;

/* A row's level scales. */
const __local stored_scale *row_scales(const __local row_warp *of, uint h, uint row) {
    const __local stored_scale *words = (const __local stored_scale *)&of->scales[h % 2][row * WORDS_ROW];
    return words + (SCALES_OF_WORD == 1 ? 0 : (of->odd + (row * HEADS + h) * LEVELS) % 2);
}

/* Starts copying a part. */
void fetch_part(__local row_warp *to, row_source from, uint part, int aligned) {
    const uint lane = warp_lane(), h = part / TILES_V, tile = part % TILES_V;
    const __global ushort *d_o = from.d_o + part / TILES_V * DIM_V + tile * NB_COLUMNS;
    __local uint4 *pieces = to->d_o[part % 2];
    const int has_columns = tile * NB_COLUMNS + lane % 8 * 8 < DIM_V;
    if (aligned) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (has_columns && 4 * i < from.rows) {
                copy_16(&pieces[swizzled(lane / 8 + 4 * i, 8, lane % 8)], &d_o[i * (4 * HEADS * DIM_V)], 1);
            }
        }
    } else {
#pragma unroll 1
        for (int i = 0; i < 4; i++) {
            if (has_columns && 4 * i < from.rows) {
                pieces[swizzled(lane / 8 + 4 * i, 8, lane % 8)] = load_piece(&d_o[i * (4 * HEADS * DIM_V)]);
            }
        }
    }
    if (tile > 0) {
        return;
    }
    const ulong scales = (ulong)(from.level_scales + h * LEVELS), before = scales / sizeof(stored_scale) % SCALES_OF_WORD;
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (uint j = 0; j < SCALE_WORDS; j += 8) {
            const uint word = j + lane % 8, end = SLOTS + (uint)before, first = word * SCALES_OF_WORD;
            if (first < end && 4 * i < from.rows) {
                copy_some_of_4(&to->scales[h % 2][(lane / 8 + 4 * i) * WORDS_ROW + word],
                               (const __global uint *)(scales & ~(ulong)3) + i * (4 * HEADS * LEVELS / SCALES_OF_WORD) + j,
                               min(end - first, SCALES_OF_WORD) * (uint)sizeof(stored_scale));
            }
        }
    }
    if (lane < 8) {
        copy_16(&to->gates[h % 2][2 * lane], &from.gates[(ulong)h * from.chunks * NB_CHUNK + 2 * lane], 1);
    }
    if (lane < SLOTS && (from.n >> lane & 1) != 0) {
        copy_4(&to->kept[h % 2][lane], &from.kept[(ulong)h * from.chunks * CHUNK_LEVELS + lane]);
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

/* Starts product = q S. */
void multiply_queries(float4 product[8], uint4 q[ROW_TILES][4], tile_rows state) {
    tile_start(product, q[0]);
    tile_set(product, q[0], state);
#pragma unroll
    for (uint m = 1; m < ROW_TILES; m++) {
        tile_add(product, q[m], tile_step(state, 4 * m));
    }
    tile_end();
}

/* Adds dO S^T, dO being weighed, to the sum. */
void add_values(float4 total[ROW_TILES][8], uint4 a[4], tile_rows state) {
#pragma unroll
    for (uint m = 0; m < ROW_TILES; m++) {
        tile_start(total[m], a);
    }
#if NV_K == 128
    tile_pair_add_transposed(total, a, state);
#else
    tile_add_transposed(total[0], a, state);
#endif
    tile_end();
}

/* Where a warp's results of its first head go. */
typedef struct row_results {
    __global weight *gradients; /* of level scales, of row lane / 8 and level lane % 8 above a chunk; or NULL */
    __global float *dots;       /* of row r, or r + 8 for items of odd number */
    __global float *level_dots;
    int rows; /* from row lane / 8 */
    uint n, chunks;
} row_results;

/* Writes a head's results; row_dot: of the item's row, sum over levels. */
void store_head(__local row_warp *from, row_results to, uint h, float row_dot) {
    const uint lane = warp_lane();
    meet_in_warp();
    if (lane < CHUNK_LEVELS && (to.n >> lane & 1) != 0) {
        float sum = 0.0f;
#pragma unroll
        for (uint row = 0; row < 16; row++) {
            sum = fma(from->gradients[row * SCALES_ROW + lane], scale_of(row_scales(from, h, row)[lane]), sum);
        }
        to.level_dots[((ulong)h * to.chunks * CHUNK_LEVELS + lane) * NB_LEVEL_DOTS] = sum;
    }
    if (lane % 4 < 2) {
        to.dots[(ulong)h * to.chunks * NB_CHUNK] = row_dot;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (uint j = 0; j < ROW_LEVELS; j += 8) {
            if (to.gradients && j + lane % 8 < ROW_LEVELS && 4 * i < to.rows) {
                store_weight(to.gradients, h * LEVELS + i * (4 * HEADS * LEVELS) + j,
                             j + lane % 8 < CHUNK_LEVELS
                                 ? from->gradients[(lane / 8 + 4 * i) * SCALES_ROW + lane % 8 + j]
                                 : 0.0f);
            }
        }
    }
    meet_in_warp();
}

/* What a work-group has: found anew where it is wanted, for there are few registers. */
typedef struct row_group {
    uint block, group, b, last_n;
} row_group;

row_group find_group(const loglin_nvidia_gradients call) {
    const uint id = anew((uint)get_group_id(0)), of_chunk = id / (ROW_BLOCKS * GROUPS);
    const row_group found = {id % ROW_BLOCKS, id / ROW_BLOCKS % GROUPS, of_chunk % call.batch,
                             call.chunks - 1 - of_chunk / call.batch};
    return found;
}

__kernel __attribute__((reqd_work_group_size(NB_ITEMS, 1, 1))) void
nb_rows(const loglin_nvidia_gradients call, __global float *ws, ulong ws_offset, const __global ushort *d_o,
        ulong d_o_offset, const __global weight *level_scales, ulong level_scales_offset,
        __global weight *dlevel_scales, ulong dlevel_scales_offset, uint aligned) {
    __local uint4 stages[NB_ROW_STAGES * STATE] __attribute__((aligned(1024)));
    __local row_warp warps[NB_ITEMS / 32];
#if WGMMA
    __local arrivals full[NB_ROW_STAGES], empty[NB_ROW_STAGES];
#endif
    const uint lane = warp_lane(), warp = same_in_warp(get_local_id(0) / 32), r = lane / 4, p = lane % 4;
    const uint own = r + p % 2 * 8; /* the row whose dots the item gets */
    const ulong padded = (ulong)call.chunks * NB_CHUNK;
    const row_group at = find_group(call);
    const uint last_n = at.last_n, first_n = call.chunks - 1 - last_n;
    __local row_warp *mine = &warps[warp];
    row_ring ring = {stages,
#if WGMMA
                     full, empty,
#endif
                     (const __global uint4 *)place(ws, ws_offset, call.states) +
                         ((ulong)at.b * HEADS + at.group * GROUP_HEADS + at.block * ROW_HEADS) *
                             (TILES_V * STATE * (ulong)call.chunks),
                     call.chunks, last_n, 0, last_n, first_n < last_n ? first_n : 0};

    start_ring(&ring);
#pragma unroll 1
    for (uint i = 0; i < ROW_AHEAD; i++) {
        fetch_state_of(&ring, i);
    }
    uint turn = 0;
#pragma unroll 1
    for (uint i = 0; i < (first_n < last_n ? 2 : 1); i++) {
        const uint n = i == 0 ? last_n : first_n, first = n * NB_CHUNK + 16 * warp;
        const row_group of = find_group(call);
        const uint first_head = of.group * GROUP_HEADS + of.block * ROW_HEADS;
        const ulong first_bh = (ulong)of.b * HEADS + first_head;
        const ulong first_row = ((ulong)of.b * call.length + first) * HEADS + first_head;
        const ulong copied_row = first_row + lane / 8 * HEADS, level_at = copied_row * LEVELS + CHUNK_LEVEL;
        const int rows = (int)call.length - (int)(first + lane / 8);
        const row_source source = {
            d_o + d_o_offset + copied_row * DIM_V + lane % 8 * 8,
            level_scales + level_scales_offset + level_at + lane % 8 * SCALES_OF_WORD,
            (const __global float2 *)place(ws, ws_offset, call.gates) + first_bh * padded + first,
            (const __global float *)place(ws, ws_offset, call.kept) + (first_bh * call.chunks + n) * CHUNK_LEVELS,
            rows, n, call.chunks};
        const row_results results = {
            dlevel_scales ? dlevel_scales + dlevel_scales_offset + level_at + lane % 8 : dlevel_scales,
            (__global float *)place(ws, ws_offset, call.dots) + first_bh * padded + first + own,
            (__global float *)place(ws, ws_offset, call.level_dots) +
                (first_bh * call.chunks + n) * CHUNK_LEVELS * NB_LEVEL_DOTS + warp,
            rows, n, call.chunks};
#pragma unroll 1
        for (uint word = lane; word < sizeof(row_warp) / 4; word += 32) {
            ((__local uint *)mine)[word] = 0;
        }
        meet_in_warp();
        if (lane == 0) {
            mine->odd = (uint)((ulong)source.level_scales / sizeof(stored_scale) % 2);
        }
        meet_in_warp();
        if (n > 0) {
            fetch_part(mine, source, 0, (int)aligned);
        }
        const __global uint *queries = (const __global uint *)place(ws, ws_offset, call.queries) +
                                       (((ulong)of.b * GROUPS + of.group) * padded + first + r) * (NV_K / 2) + p;
        uint4 q[ROW_TILES][4];
#pragma unroll
        for (uint step = 0; step < K_STEPS; step++) {
            q[step / 4][step % 4] = (uint4)(queries[8 * step], queries[8 * step + 4 * NV_K], queries[8 * step + 4],
                                            queries[8 * step + 4 * NV_K + 4]);
        }
        float4 total[ROW_TILES][8];
#pragma unroll
        for (uint m = 0; m < ROW_TILES; m++) {
            tile_clear(total[m]);
        }
#pragma unroll 1
        for (uint h = 0; n == 0 && h < ROW_HEADS; h++) {
            store_head(mine, results, h, 0.0f);
        }
        float row_dot = 0.0f;
#pragma unroll 1
        for (uint part = 0; n > 0 && part < ROW_PARTS; part++) {
            const uint h = part / TILES_V, tile = part % TILES_V;
            const __local float *kept = mine->kept[h % 2];
            const __local stored_scale *scales = row_scales(mine, h, r);
            wait_for_copies();
            meet_in_warp();
            const float upper_decay = row_decay(mine->gates[h % 2][r]);
            const float lower_decay = row_decay(mine->gates[h % 2][r + 8]);
            uint4 values[4];
#pragma unroll
            for (uint step = 0; step < 4; step++) {
                values[step] = load_a(mine->d_o[part % 2], 8, 0, 2 * step);
            }
#pragma unroll 1
            for (uint bits = n; bits != 0; bits &= bits - 1, turn++) {
                const uint j = lowest_bit(bits);
                const tile_rows state = wait_for_state(&ring, turn);
                float4 product[8];
                multiply_queries(product, q, state);
                const float upper = kept[j] * upper_decay, lower = kept[j] * lower_decay;
                const float upper_scale = scale_of(scales[j]);
                const float lower_scale = scale_of(scales[8 * WORDS_ROW * SCALES_OF_WORD + j]);
                const uint upper_pair = pack(upper * upper_scale, upper * upper_scale);
                const uint lower_pair = pack(lower * lower_scale, lower * lower_scale);
                uint4 a[4];
                forget_derived(values);
#pragma unroll
                for (uint step = 0; step < 4; step++) {
                    a[step] = scale_rows(values[step], upper_pair, lower_pair);
                }
                add_values(total, a, state);
                /* While these products are made, what else there is to do. */
                fetch_state_of(&ring, turn + ROW_AHEAD);
                if (bits == n && part + 1 < ROW_PARTS) {
                    fetch_part(mine, source, part + 1, (int)aligned);
                }
                tile_wait_before_last(product);
                const float gradient = dot_rows(product, values) * (p % 2 == 0 ? upper : lower);
                row_dot = fma(gradient, p % 2 == 0 ? upper_scale : lower_scale, row_dot);
                if (p < 2) {
                    __local float *to = &mine->gradients[own * SCALES_ROW + j];
                    *to = tile == 0 ? gradient : *to + gradient;
                }
                if ((bits & (bits - 1)) == 0 && tile + 1 == TILES_V) {
                    store_head(mine, results, h, row_dot);
                    row_dot = 0.0f;
                }
#pragma unroll
                for (uint m = 0; m < ROW_TILES; m++) {
                    tile_wait(total[m]);
                }
                release_state(&ring, turn);
            }
        }
        const row_group done = find_group(call);
        __global float *to =
            (__global float *)place(ws, ws_offset, call.row_parts) +
            ((((ulong)done.block * call.batch + done.b) * GROUPS + done.group) * padded + first + r) * NV_K + 2 * p;
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
