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
#define GRADIENTS_ROW (GRADIENT_BOXES ? BOX_HEADS * LEVELS : SCALES_ROW) /* in local memory */
#define ROW_AHEAD (NB_ROW_STAGES - 1) /* states that are asked for before the first one is needed */

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

/* Where a warp's parts come from: its first row and a work-group's first head. */
typedef struct row_source {
    const __global ushort *d_o;
    const __global weight *level_scales; /* from the level of the chunk before */
    const __global float2 *gates;
    const __global float *kept;
#if WGMMA
    const __global heads_map *maps;
    __local arrivals *arrived; /* of the warp, two */
#endif
    uint sequence, token, head;
    int rows; /* that there are */
    uint n, chunks;
} row_source;

/*
 * What a warp has in local memory: of the part that it works on and of the next one dO, of their heads the gates, level scales
 * and decays, times scale, from a level's block to the chunk; and what a head's turns give.  Rows, columns and levels that do
 * not exist are zeros from the start, or come so with boxes.
 */
typedef struct __attribute__((aligned(1024))) row_warp {
    uint4 d_o[2][16 * 8];
    float scales[2][16 * ROW_SCALES];
    float gradients[16 * GRADIENTS_ROW]; /* of level scales */
    float2 gates[2][16];
    float kept[2][SLOTS];
    row_source source;                /* not in registers, of which there are few */
} row_warp;

/* Starts copying rows of dO: an item has row lane / 8, columns 8 (lane % 8)... */
void fetch_row_values(__local uint4 *to, const __local row_source *source, uint h, uint tile, int aligned) {
    const uint lane = warp_lane(), column = tile * NB_COLUMNS + lane % 8 * 8;
    const __global ushort *from = source->d_o + lane / 8 * (HEADS * DIM_V) + h * DIM_V + column;
    const int rows = column < DIM_V ? source->rows - (int)(lane / 8) : 0;
    if (aligned) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (4 * i < rows) {
                copy_16(&to[swizzled(lane / 8 + 4 * i, 8, lane % 8)], &from[i * (4 * HEADS * DIM_V)], 1);
            }
        }
    } else {
#pragma unroll 1
        for (int i = 0; i < 4; i++) {
            if (4 * i < rows) {
                to[swizzled(lane / 8 + 4 * i, 8, lane % 8)] = load_piece(&from[i * (4 * HEADS * DIM_V)]);
            }
        }
    }
}

/* And a head's level scales: an item has row lane / 8, levels lane % 8... */
void fetch_row_scales(__local float *to, const __local row_source *source, uint h) {
    const uint lane = warp_lane();
    const __global weight *from = source->level_scales + lane / 8 * (HEADS * LEVELS) + lane % 8;
    const int rows = source->rows - (int)(lane / 8);
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (uint j = 0; j < SLOTS; j += 8) {
            if (j + lane % 8 < SLOTS && 4 * i < rows) {
                fetch_scale(&to[(lane / 8 + 4 * i) * ROW_SCALES + lane % 8 + j], from,
                            h * LEVELS + i * (4 * HEADS * LEVELS) + j, 1);
            }
        }
    }
}

/* What is copied as boxes. */
int has_value_boxes(uint aligned) { return WGMMA && (aligned & 1) != 0; }
int has_scale_boxes(uint aligned) { return SCALE_BOXES && (aligned & 4) != 0; }
int has_gradient_boxes(uint aligned) { return GRADIENT_BOXES && (aligned & 8) != 0; }

/* Where parts and heads lie; parts count on from a work-group's first chunk to its second. */
uint part_place(uint count) { return count % 2; }
uint head_place(uint count) { return count / TILES_V % 2; }

/* Starts copying a part, `count` in the work-group. */
void fetch_part(__local row_warp *to, uint part, uint count, uint aligned) {
    const __local row_source *from = &to->source;
    const uint lane = warp_lane(), h = part / TILES_V, tile = part % TILES_V;
    __local uint4 *d_o = to->d_o[part_place(count)];
    __local float *scales = to->scales[head_place(count)];
#if WGMMA
    if (lane == 0) {
        __local arrivals *arrived = &from->arrived[part_place(count)];
        const uint head = from->head + h;
        arrive(arrived);
        if (has_value_boxes(aligned)) {
            copy_box(d_o, &from->maps[NB_MAP_ROW_D_O], (uint4)(from->sequence, from->token, head, tile * NB_COLUMNS),
                     16 * NB_COLUMNS * 2, arrived);
        }
        if (has_scale_boxes(aligned) && tile == 0) {
            copy_box(scales, &from->maps[NB_MAP_ROW_SCALES],
                     (uint4)(from->sequence, from->token, 0, head * LEVELS / 4 * 4 + CHUNK_LEVEL), 16 * ROW_SCALES * 4,
                     arrived);
        }
    }
#endif
    if (!has_value_boxes(aligned)) {
        fetch_row_values(d_o, from, h, tile, aligned & 1);
    }
    if (tile > 0) {
        return;
    }
    if (!has_scale_boxes(aligned)) {
        fetch_row_scales(scales, from, h);
    }
    if (lane < 8) {
        copy_16(&to->gates[head_place(count)][2 * lane], &from->gates[(ulong)h * from->chunks * NB_CHUNK + 2 * lane], 1);
    }
    if (lane < SLOTS && (from->n >> lane & 1) != 0) {
        copy_4(&to->kept[head_place(count)][lane], &from->kept[(ulong)h * from->chunks * CHUNK_LEVELS + lane]);
    }
}

/* Waits for a part. */
void wait_for_part(const __local row_warp *to, uint count) {
    wait_for_copies();
    meet_in_warp();
#if WGMMA
    arrivals_wait(&to->source.arrived[part_place(count)], count / 2 % 2);
#endif
}

/* How many arrivals a place for a part has: its own, and those of boxes; only every other one has level scales. */
uint count_arrivals(uint place, uint aligned) {
    return 1 + (has_value_boxes(aligned) ? 1 : 0) + (has_scale_boxes(aligned) && (TILES_V == 1 || place == 0) ? 1 : 0);
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

/* Where a head's gradients above a chunk are among those of a row. */
uint gradients_at(uint h) { return GRADIENT_BOXES ? h % BOX_HEADS * LEVELS + CHUNK_LEVEL : 0; }

/* Writes a warp's gradients of some heads, up to h, with zeros for levels inside a chunk, which the tiles write later. */
void store_gradient_box(__local row_warp *from, uint h) {
#if WGMMA
    if ((h + 1) % BOX_HEADS == 0) {
        tile_publish();
        meet_in_warp();
        if (warp_lane() == 0) {
            const __local row_source *at = &from->source;
            store_box(&at->maps[NB_MAP_GRADIENTS],
                      (uint4)(at->sequence, at->token, 0, (at->head + h + 1 - BOX_HEADS) * LEVELS), from->gradients);
        }
    }
#endif
}

/* Waits until the place of the gradients is free. */
void wait_for_gradient_box(void) {
#if WGMMA
    if (warp_lane() == 0) {
        wait_for_boxes();
    }
    meet_in_warp();
#endif
}

/* Writes a head's results; scales: of the head; row_dot: of the item's row, sum over levels. */
void store_head(__local row_warp *from, const __local float *scales, row_results to, uint h, float row_dot,
                uint aligned) {
    const uint lane = warp_lane();
    const __local float *gradients = from->gradients + gradients_at(h);
    meet_in_warp();
    if (lane < CHUNK_LEVELS && (to.n >> lane & 1) != 0) {
        float sum = 0.0f;
#pragma unroll
        for (uint row = 0; row < 16; row++) {
            sum = fma(gradients[row * GRADIENTS_ROW + lane], scales[row * ROW_SCALES + lane], sum);
        }
        to.level_dots[((ulong)h * to.chunks * CHUNK_LEVELS + lane) * NB_LEVEL_DOTS] = sum;
    }
    if (lane % 4 < 2) {
        to.dots[(ulong)h * to.chunks * NB_CHUNK] = row_dot;
    }
    if (has_gradient_boxes(aligned)) {
        store_gradient_box(from, h);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (uint j = 0; j < ROW_LEVELS; j += 8) {
            if (to.gradients && j + lane % 8 < ROW_LEVELS && 4 * i < to.rows) {
                store_weight(to.gradients, h * LEVELS + i * (4 * HEADS * LEVELS) + j,
                             j + lane % 8 < CHUNK_LEVELS
                                 ? gradients[(lane / 8 + 4 * i) * GRADIENTS_ROW + lane % 8 + j]
                                 : 0.0f);
            }
        }
    }
    meet_in_warp();
}

__kernel __attribute__((reqd_work_group_size(NB_ITEMS, 1, 1))) void
nb_rows(const loglin_nvidia_gradients call, __global float *ws, ulong ws_offset, const __global ushort *d_o,
        ulong d_o_offset, const __global weight *level_scales, ulong level_scales_offset,
        __global weight *dlevel_scales, ulong dlevel_scales_offset, uint aligned) {
    __local uint4 stages[NB_ROW_STAGES * STATE] __attribute__((aligned(1024)));
    __local row_warp warps[NB_ITEMS / 32];
#if WGMMA
    __local arrivals full[NB_ROW_STAGES], empty[NB_ROW_STAGES], arrived[NB_ITEMS / 32][2];
#endif
    const uint lane = warp_lane(), warp = same_in_warp(get_local_id(0) / 32), r = lane / 4, p = lane % 4;
    const uint own = r + p % 2 * 8; /* the row whose dots the item gets */
    const ulong id = get_group_id(0), padded = (ulong)call.chunks * NB_CHUNK;
    const uint block = id % ROW_BLOCKS, group = id / ROW_BLOCKS % GROUPS, b = id / (ROW_BLOCKS * GROUPS) % call.batch;
    const uint last_n = call.chunks - 1 - id / (ROW_BLOCKS * GROUPS) / call.batch, first_n = call.chunks - 1 - last_n;
    const uint first_head = group * GROUP_HEADS + block * ROW_HEADS;
    const ulong bg = (ulong)b * GROUPS + group, first_bh = (ulong)b * HEADS + first_head;
    __local row_warp *mine = &warps[warp];
    row_ring ring = {stages,
#if WGMMA
                     full, empty,
#endif
                     (const __global uint4 *)place(ws, ws_offset, call.states) +
                         first_bh * TILES_V * call.chunks * STATE,
                     call.chunks, last_n, 0, last_n, first_n < last_n ? first_n : 0};

#if WGMMA
    if (lane < 2) {
        arrivals_start(&arrived[warp][lane], count_arrivals(lane, aligned));
    }
    if (lane == 0) {
        use_map(map_of(call, ws, ws_offset, NB_MAP_ROW_D_O));
        use_map(map_of(call, ws, ws_offset, NB_MAP_ROW_SCALES));
        use_map(map_of(call, ws, ws_offset, NB_MAP_GRADIENTS));
    }
#endif
    start_ring(&ring);
#pragma unroll 1
    for (uint i = 0; i < ROW_AHEAD; i++) {
        fetch_state_of(&ring, i);
    }
    uint turn = 0;
#pragma unroll 1
    for (uint i = 0; i < (first_n < last_n ? 2 : 1); i++) {
        const uint n = i == 0 ? last_n : first_n, first = n * NB_CHUNK + 16 * warp;
        const ulong first_row = ((ulong)b * call.length + first) * HEADS + first_head;
        const int rows = (int)call.length - (int)first;
        const row_results results = {
            dlevel_scales ? dlevel_scales + dlevel_scales_offset + (first_row + lane / 8 * HEADS) * LEVELS + CHUNK_LEVEL +
                                lane % 8
                          : dlevel_scales,
            (__global float *)place(ws, ws_offset, call.dots) + first_bh * padded + first + own,
            (__global float *)place(ws, ws_offset, call.level_dots) +
                (first_bh * call.chunks + n) * CHUNK_LEVELS * NB_LEVEL_DOTS + warp,
            rows - (int)(lane / 8), n, call.chunks};
#pragma unroll 1
        for (uint word = lane; word < sizeof(row_warp) / 4; word += 32) {
            ((__local uint *)mine)[word] = 0;
        }
        tile_publish();
        meet_in_warp();
        if (lane == 0) {
            mine->source = (row_source){
                d_o + d_o_offset + first_row * DIM_V,
                level_scales + level_scales_offset + first_row * LEVELS + CHUNK_LEVEL,
                (const __global float2 *)place(ws, ws_offset, call.gates) + first_bh * padded + first,
                (const __global float *)place(ws, ws_offset, call.kept) + (first_bh * call.chunks + n) * CHUNK_LEVELS,
#if WGMMA
                map_of(call, ws, ws_offset, 0), arrived[warp],
#endif
                b, first, first_head, rows, n, call.chunks};
        }
        meet_in_warp();
        if (n > 0) {
            fetch_part(mine, 0, i * ROW_PARTS, aligned);
        }
        const __global uint *queries = (const __global uint *)place(ws, ws_offset, call.queries) +
                                       (bg * padded + first + r) * (NV_K / 2) + p;
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
            store_head(mine, mine->scales[0], results, h, 0.0f, aligned);
        }
        float row_dot = 0.0f;
#pragma unroll 1
        for (uint part = 0; n > 0 && part < ROW_PARTS; part++) {
            const uint h = part / TILES_V, tile = part % TILES_V, count = i * ROW_PARTS + part;
            const __local float *kept = mine->kept[head_place(count)];
            const __local float *scales = mine->scales[head_place(count)] +
                                          (has_scale_boxes(aligned) ? (first_head + h) * LEVELS % 4 : 0);
            wait_for_part(mine, count);
            const float upper_decay = row_decay(mine->gates[head_place(count)][r]);
            const float lower_decay = row_decay(mine->gates[head_place(count)][r + 8]);
            uint4 values[4];
#pragma unroll
            for (uint step = 0; step < 4; step++) {
                values[step] = load_a(mine->d_o[part_place(count)], 8, 0, 2 * step);
            }
#pragma unroll 1
            for (uint bits = n; bits != 0; bits &= bits - 1, turn++) {
                const uint j = lowest_bit(bits);
                const tile_rows state = wait_for_state(&ring, turn);
                float4 product[8];
                multiply_queries(product, q, state);
                const float upper = kept[j] * upper_decay, lower = kept[j] * lower_decay;
                const float upper_scale = scales[r * ROW_SCALES + j];
                const float lower_scale = scales[(r + 8) * ROW_SCALES + j];
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
                    fetch_part(mine, part + 1, count + 1, aligned);
                }
                if (bits == n) {
                    wait_for_gradient_box();
                }
                tile_wait_before_last(product);
                const float gradient = dot_rows(product, values) * (p % 2 == 0 ? upper : lower);
                row_dot = fma(gradient, p % 2 == 0 ? upper_scale : lower_scale, row_dot);
                if (p < 2) {
                    __local float *to = &mine->gradients[own * GRADIENTS_ROW + gradients_at(h) + j];
                    *to = tile == 0 ? gradient : *to + gradient;
                }
                if ((bits & (bits - 1)) == 0 && tile + 1 == TILES_V) {
                    store_head(mine, scales, results, h, row_dot, aligned);
                    row_dot = 0.0f;
                }
#pragma unroll
                for (uint m = 0; m < ROW_TILES; m++) {
                    tile_wait(total[m]);
                }
                release_state(&ring, turn);
            }
        }
        wait_for_gradient_box();
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
