/* SPDX-License-Identifier: Apache-2.0 */
/* The scalar-gated forward pass, see nvidia_mamba2.cl: outputs, and the final states. */

/* ---- outputs ----------------------------------------------------------------------------------------------------- */

/*
 * 128 items start copying the level scales of a segment's rows.  Floats come in whole 16 bytes, so a row starts with as
 * many floats as stand before its own in their 16 bytes: scales_shift.  Those of 16 bits are copied one by one.
 */
void fetch_scales(__local stored_scale *scales, const __global weight *level_scales, int rows, uint item) {
    const uint piece = item % 8;
    const int first = (int)(item / 8);
#if WEIGHT_STORAGE == 0
    /* The rows of an item, 16 apart, are alike in their 16 bytes. */
    const ulong from = (ulong)(level_scales + (ulong)first * (HEADS * LEVELS));
    const uint bytes = (uint)clamp(USED * 4 + (int)(from & 15) - 16 * (int)piece, 0, 16);
    const __global char *x = (const __global char *)((from & ~(ulong)15) + 16 * piece);
    __local float *to = &scales[first * SCALES_ROW + 4 * piece];
#pragma unroll 1
    for (int i = first; i < rows && bytes > 0; i += 16) {
        copy_some_of_16(to, x, bytes);
        to += 16 * SCALES_ROW;
        x += 16 * (HEADS * LEVELS) * 4;
    }
#else
    const __global stored_scale *x = (const __global stored_scale *)level_scales;
    for (int i = first; i < rows; i += 16) {
        for (uint level = piece; level < USED; level += 8) {
            scales[i * SCALES_ROW + level] = x[(ulong)i * (HEADS * LEVELS) + level];
        }
    }
#endif
}

/* Boxes come in whole 16 bytes, too. */
uint scales_shift(const __global weight *level_scales, uint row, int boxes) {
    const uint at = (uint)(ulong)level_scales / sizeof(stored_scale) + row * (uint)(HEADS * LEVELS);
    return WEIGHT_STORAGE == 0 || boxes ? at % SCALE_PIECE : 0;
}

/* What weighs the rows r and r + 8 of a warp's 16. */
typedef struct warp_rows {
    const __local stored_scale *upper_scales, *lower_scales; /* their level scales */
    float upper, lower;                                      /* their decays from the tile's start */
} warp_rows;

/* The weights of one level, decayed by `kept` before the tile; in pairs of storage. */
float2 row_weights(warp_rows rows, uint level, float kept) {
    return (float2)(scale_of(rows.upper_scales[level]) * (kept * rows.upper),
                    scale_of(rows.lower_scales[level]) * (kept * rows.lower));
}
uint2 row_pairs(warp_rows rows, uint level, float kept) {
    const float2 x = row_weights(rows, level, kept);
    return (uint2)(pack(x.x, x.x), pack(x.y, x.y));
}

/* A tile of q k^T on the diagonal; sums: of the gates in the tile. */
uint4 weigh_diagonal(uint4 product, warp_rows rows, const __local float *sums) {
    const uint r = warp_lane() / 4, p = warp_lane() % 4;
    const float2 a = unpack(product.x), b = unpack(product.y), d = unpack(product.w);
    const float early = sums[r], late = sums[r + 8];
    const float left[2] = {sums[2 * p], sums[2 * p + 1]}, right[2] = {sums[2 * p + 8], sums[2 * p + 9]};
    const int is_past[2] = {2 * p <= r, 2 * p + 1 <= r};
    float weight[6];
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const int level = bit_length(r ^ (2 * p + e));
        weight[e] = scale_of(rows.upper_scales[level]) * decay(early - left[e]);
        weight[2 + e] = scale_of(rows.lower_scales[4]) * decay(late - left[e]);
        weight[4 + e] = scale_of(rows.lower_scales[level]) * decay(late - right[e]);
    }
    return (uint4)(pack(is_past[0] ? a.x * weight[0] : 0.0f, is_past[1] ? a.y * weight[1] : 0.0f),
                   pack(b.x * weight[2], b.y * weight[3]), 0u,
                   pack(is_past[0] ? d.x * weight[4] : 0.0f, is_past[1] ? d.y * weight[5] : 0.0f));
}

/* Four tiles of q k^T of one level: the rows' weights, and the decays of a chunk's keys. */
void weigh_tiles(uint4 tiles[4], uint2 weights, const __local uint *to) {
#pragma unroll
    for (uint j = 0; j < 4; j++) {
        tiles[j] = scale_rows(tiles[j], weights.x, weights.y);
    }
    decay_chunk(tiles, to);
}

void load_queries(uint4 q[BLOCK_STEPS], const __global uint4 *tiles, uint block) {
#pragma unroll
    for (uint step = 0; step < BLOCK_STEPS; step++) {
        q[step] = tiles[(block * BLOCK_STEPS + step) * 32 + warp_lane()];
    }
}

#if NV_CROSS_LOCAL
#define CROSS_SPACE __local
#else
#define CROSS_SPACE __global
#endif

/*
 * c = weighed q k^T of 16 rows, tile i of half `part`, times the segment's values.  inside, cross: q k^T of the half, and
 * between the halves; gates: of both.  Beside the last product q is loaded, the first columns of the rows' queries.
 */
void make_near(float4 c[8], const __local uint4 *inside, const CROSS_SPACE uint4 *cross, const __local half_gates *gates,
               warp_rows rows, uint part, uint i, tile_rows values, uint4 q[BLOCK_STEPS], const __global uint4 *queries) {
    const uint lane = warp_lane(), odd = i / 4, own = i % 4;
    const __local uint4 *tiles = inside + i * (i + 1) / 2 * 32 + lane;
    const __local half_gates *of_half = &gates[part];
    const float4 before = of_half->tiles[i];
    tile_clear(c);
    if (part != 0) {
        const uint2 weights = row_pairs(rows, 8, before.x);
        uint4 first[4], second[4];
#pragma unroll
        for (uint j = 0; j < 4; j++) {
            first[j] = cross[(8 * i + j) * 32 + lane];
        }
#pragma unroll
        for (uint j = 0; j < 4; j++) {
            second[j] = cross[(8 * i + 4 + j) * 32 + lane];
        }
        weigh_tiles(first, weights, gates[0].to_half);
        tile_multiply(c, first, values);
        weigh_tiles(second, weights, gates[0].to_half + 32);
        tile_multiply(c, second, tile_step(values, 4));
        tile_wait_for(c, first);
        tile_wait_for(c, second);
    }
    if (odd) {
        uint4 far[4];
#pragma unroll
        for (uint j = 0; j < 4; j++) {
            far[j] = tiles[32 * j];
        }
        weigh_tiles(far, row_pairs(rows, 7, before.y), of_half->to_chunk);
        tile_multiply(c, far, tile_step(values, 8 * part));
        tile_wait(c);
    }
    uint4 near[4];
#pragma unroll
    for (uint j = 0; j < 4; j++) {
        near[j] = (uint4)(0);
        if (j < own) {
            const uint2 weights = row_pairs(rows, (own ^ j) == 1 ? 5 : 6,
                                            own - j == 1 ? 1.0f : own - j == 2 ? before.z : before.w);
            const uint tile = 4 * odd + j;
            const uint2 decays = *(const __local uint2 *)&of_half->to_tile[pair_at(tile, lane % 4)];
            near[j] = scale_columns(scale_rows(tiles[32 * tile], weights.x, weights.y), decays.x, decays.y);
        }
    }
    const uint4 diagonal = weigh_diagonal(tiles[32 * i], rows, of_half->sums + 16 * i);
#pragma unroll
    for (uint j = 0; j < 4; j++) {
        near[j] = j == own ? diagonal : near[j];
    }
    tile_multiply(c, near, tile_step(values, 8 * part + 4 * odd));
    load_queries(q, queries, 0);
    tile_wait_for(c, near);
}

void store_piece(__global ushort *o, uint4 x, int wanted, int aligned) {
    if (wanted && aligned) {
        *(__global uint4 *)o = x;
    } else if (wanted) {
#pragma unroll 1
        for (int i = 0; i < 4; i++) {
            o[2 * i] = (ushort)x.x;
            o[2 * i + 1] = (ushort)(x.x >> 16);
            x = x.yzwx;
        }
    }
}

/* Rounds 32 columns of the warp's 16 rows; their pieces of 16 bytes change places so that they lie in different banks. */
void round_columns(uint lane, __local uint *to, const float4 c[4]) {
    const uint r = lane / 4, p = lane % 4;
#pragma unroll
    for (uint j = 0; j < 4; j++) {
        __local uint *pair = &to[16 * r + 4 * (j ^ (r / 2 % 4)) + p];
        pair[0] = pack(c[j].x, c[j].y);
        pair[8 * 16] = pack(c[j].z, c[j].w);
    }
}

/* Stores the warp's 16 rows at o, 32 columns at a time through `space`, 16 rows of 64 bytes. */
void store_rows(__global ushort *o, __local uint *space, const float4 c[8], int rows, int columns, int aligned) {
    const uint lane = anew(get_local_id(0)) % 32, r = lane / 4, p = lane % 4, turn = r / 2 % 4;
    o += (ulong)r * (HEADS * DIM_V) + 8 * p;
    const __local uint4 *pieces = (const __local uint4 *)space + 4 * r + (p ^ turn);
#pragma unroll
    for (uint i = 0; i < 2; i++) {
        meet_in_warp(); /* what was there is read */
        round_columns(lane, space, c + 4 * i);
        meet_in_warp();
        const uint4 upper = pieces[0], lower = pieces[8 * 4];
        const int has_columns = (int)(32 * i + 8 * p) < columns;
        store_piece(o + 32 * i, upper, has_columns && (int)r < rows, aligned);
        store_piece(o + 32 * i + (ulong)8 * (HEADS * DIM_V), lower, has_columns && (int)r + 8 < rows, aligned);
    }
}

/* The first half's work-items copy what an item of work has of its own: they have less to do otherwise. */
#define FETCH_ITEMS 256

/* A work-group's segment: where its parts start, of the first item of its group; and which items it has. */
typedef struct outputs_place {
    const __global ushort *v;
    __global ushort *o;
    const __global weight *level_scales;
    const __global half_gates *gates;
    const __global uint4 *nodes, *record;
    uint segments; /* of the sequence */
    int tokens;    /* of the segment */
    uint first_item, count, blocks; /* blocks: of segments before this one */
#if BOXES
    const __global heads_map *maps;
    uint b, token, head; /* sequence, first token in it, and first head */
#endif
} outputs_place;

/*
 * FETCH_ITEMS work-items, of number id, start to copy what an item of work has of its own: values, level weights, gates.
 * With wgmma the gates come in bulk, and all of them arrive at `here`.
 */
void fetch_item(__local uint4 *values, __local half_gates *gates, __local stored_scale *scales,
#if WGMMA
                __local arrivals *here,
#endif
                const __local outputs_place *at, uint item, uint id, int aligned) {
    const uint head = item / TILES_V, tile = item % TILES_V;
    const __global half_gates *gates_from = at->gates + (ulong)head * at->segments * 2;
    if (id < 128) {
        fetch_rows(values, at->v + head * DIM_V + tile * NV_TILE_V, HEADS * DIM_V, NV_SEGMENT, 8, at->tokens,
                   DIM_V - (int)tile * NV_TILE_V, id, 128, aligned);
    } else {
        fetch_scales(scales, at->level_scales + head * LEVELS, at->tokens, id - 128);
#if !WGMMA
        fetch((__local uint4 *)gates, (const __global uint4 *)gates_from, 2 * NV_GATES / 16, id - 128, 128);
#endif
    }
#if WGMMA
    if (id == FETCH_ITEMS - 128) {
        copy_bulk(gates, gates_from, 2 * NV_GATES, here);
    }
    if (!aligned || WEIGHT_STORAGE != 0) {
        mem_fence(CLK_LOCAL_MEM_FENCE); /* of what was stored: arrive_with_copies orders copies alone */
    }
    arrive_with_copies(here);
#endif
}

/* Copies of an item of work where boxes are: values, level scales, and gates in bulk. */
#define BOX_COPIES 3

#if BOXES
/* One item starts them, if the work-group has an item of work of number n; its place is empty. */
void fetch_boxes(__local uint4 *values, __local half_gates *gates, __local stored_scale *scales, __local arrivals *here,
                 const __local outputs_place *at, uint n) {
    const uint item = at->first_item + n;
    if (n < at->count) {
        const uint head = item / TILES_V, tile = item % TILES_V;
        copy_box(values, &at->maps[NV_MAP_V], (uint4)(at->b, at->token, at->head + head, tile * NV_TILE_V),
                 NV_SEGMENT * NV_TILE_V * 2, here);
        copy_box(scales, &at->maps[NV_MAP_SCALES],
                 (uint4)(at->b, at->token, 0, (at->head + head) * LEVELS / SCALE_PIECE * SCALE_PIECE),
                 NV_SEGMENT * SCALES_ROW * sizeof(stored_scale), here);
        copy_bulk(gates, at->gates + (ulong)head * at->segments * 2, 2 * NV_GATES, here);
    }
}

/* This warp is done with number n; the last one starts copies of the next but one to its place. */
void replace_boxes(__local uint4 *values, __local half_gates *gates, __local stored_scale *scales, __local arrivals *here,
                   __local arrivals *is_free, const __local outputs_place *at, uint n) {
    if (warp_lane() == 0 && arrive_last(is_free)) {
        arrivals_wait(is_free, n / 2 % 2);
        fetch_boxes(values, gates, scales, here, at, n + 2);
    }
}
#endif

#if O_BOXES
/* Starts to store the warp's 16 rows, from `row` of the segment on, through two places of 16 rows of 64 bytes. */
void store_boxes(const __local outputs_place *at, uint item, uint row, __local uint *left, __local uint *right,
                 const float4 c[8]) {
    const uint lane = anew(get_local_id(0)) % 32, head = item / TILES_V, column = item % TILES_V * NV_TILE_V;
    meet_in_warp(); /* what was there is read */
    round_columns(lane, left, c);
    round_columns(lane, right, c + 4);
    arrivals_publish();
    meet_in_warp();
    if (lane == 0) {
        store_box(&at->maps[NV_MAP_O], (uint4)(at->b, at->token + row, at->head + head, column), left);
        store_box(&at->maps[NV_MAP_O], (uint4)(at->b, at->token + row, at->head + head, column + 32), right);
    }
}
#endif

/*
 * States on their way to the matrix units, 64 rows at a time, in a ring of NV_STAGES.  With wgmma they come in bulk: `full`
 * counts their arrival, `empty` the warps that are done with them, of which the last one starts the next copy.  Else all
 * items copy, and the whole work-group meets at a barrier for each of them.
 */
typedef struct stage_ring {
    __local uint4 *stages;
#if WGMMA
    __local arrivals *full, *empty;
#endif
    const __local uint *ends; /* last segments of the blocks of segments before this one */
} stage_ring;

#define STAGES_OF_BLOCK (K_BLOCK / 64)

/*
 * Starts to copy what is multiplied as number `n`, number `index` counted from the start of item of work `item`, if there
 * is such a one: of an item come K_BLOCK rows of all blocks, then the next.
 */
void fetch_stage(stage_ring ring, uint n, uint item, uint index, const __local outputs_place *at) {
    const uint per_k_block = at->blocks * STAGES_OF_BLOCK, per_item = at->blocks * (NV_K / 64);
    for (; item < at->count && index >= per_item; item++) {
        index -= per_item;
    }
    if (item < at->count) {
        uint rows = 0; /* 64 at a time */
        for (; NV_K > K_BLOCK && index >= per_k_block; rows += STAGES_OF_BLOCK) {
            index -= per_k_block;
        }
        rows += index % STAGES_OF_BLOCK;
        const uint node = (at->first_item + item) * at->segments + ring.ends[index / STAGES_OF_BLOCK];
        const __global uint4 *from = at->nodes + (ulong)node * STATE + rows * STAGE;
        __local uint4 *to = ring.stages + n % NV_STAGES * STAGE;
#if WGMMA
        copy_bulk(to, from, STAGE * 16, &ring.full[n % NV_STAGES]);
#else
        fetch(to, from, STAGE, get_local_id(0), NV_OUTPUT_ITEMS);
#endif
    }
#if !WGMMA
    end_copies();
#endif
}

/* Starts the first copies. */
void start_stages(stage_ring ring, const __local outputs_place *at) {
#pragma unroll 1
    for (uint n = 0; n < (WGMMA ? NV_STAGES : NV_STAGES - 1); n++) {
        fetch_stage(ring, n, 0, n, at);
    }
}

/* Waits for number n.  Without wgmma all warps are done with the one before it then, whose place is taken. */
void wait_for_stage(stage_ring ring, uint n, uint item, uint index, const __local outputs_place *at) {
#if WGMMA
    arrivals_wait(&ring.full[n % NV_STAGES], n / NV_STAGES % 2);
#else
    WAIT_FOR_COPIES_BUT(NV_STAGES - 2);
    barrier(CLK_LOCAL_MEM_FENCE);
    fetch_stage(ring, n + NV_STAGES - 1, item, index + NV_STAGES - 1, at);
#endif
}

/* This warp is done with number n. */
void release_stage(stage_ring ring, uint n, uint item, uint index, const __local outputs_place *at) {
#if WGMMA
    __local arrivals *empty = &ring.empty[n % NV_STAGES];
    if (warp_lane() == 0 && arrive_last(empty)) {
        arrivals_wait(empty, n / NV_STAGES % 2);
        fetch_stage(ring, n + NV_STAGES, item, index + NV_STAGES, at);
    }
#endif
}

/* Items whose values have a place. */
#define VALUES (WGMMA ? 2 : 1)

__kernel __attribute__((reqd_work_group_size(NV_OUTPUT_ITEMS, 1, 1))) void
nvidia_outputs(const loglin_nvidia_call call, __global float *ws, ulong ws_offset, const __global ushort *v,
               ulong v_offset, const __global weight *level_scales, ulong level_scales_offset, __global ushort *o,
               ulong o_offset, uint aligned) { /* bits: values, o, level scales */
    __local uint4 values_at[VALUES][NV_SEGMENT * 8] __attribute__((aligned(1024)));
    __local uint4 stages[NV_STAGES * STAGE] __attribute__((aligned(1024)));
    __local uint4 inside[2][36 * 32];
#if NV_CROSS_LOCAL
    __local uint4 cross[64 * 32];
#endif
    __local half_gates gates_at[2][2] __attribute__((aligned(16)));
    __local stored_scale scales_at[2][NV_SEGMENT * SCALES_ROW] __attribute__((aligned(O_BOXES ? 1024 : 128)));
#if O_BOXES
    __local uint o_at[NV_OUTPUT_ITEMS / 32][256] __attribute__((aligned(1024)));
#endif
    __local float kept[NV_OUTPUT_COUNT][NV_SEGMENTS_BITS]; /* decay from a block of segments to this one, times scale */
    __local uint ends[NV_SEGMENTS_BITS], levels[NV_SEGMENTS_BITS]; /* the blocks' last segments, and levels */
#if WGMMA
    __local arrivals full[NV_STAGES], empty[NV_STAGES];
    __local arrivals item_here[2], item_free[2]; /* what an item has of its own is here, or used up, in one of two places */
    __local arrivals record_here;                /* q k^T */
#endif
    const uint item = get_local_id(0);
    const int boxes = BOXES && (O_BOXES ? aligned == 7 : (aligned & 5) == 5);
    const uint bundles = (ITEMS + NV_OUTPUT_COUNT - 1) / NV_OUTPUT_COUNT;
    const ulong id = get_group_id(0);
    const uint bundle = id % bundles, rest = id / bundles, group = rest % GROUPS, b = rest / GROUPS % call.batch;
    const uint segment = call.segments - 1 - rest / GROUPS / call.batch, blocks = popcount(segment);
    const uint first_item = bundle * NV_OUTPUT_COUNT, count = min((uint)NV_OUTPUT_COUNT, ITEMS - first_item);
    const ulong bh = (ulong)b * HEADS + group * (HEADS / GROUPS); /* the group's first head */
    const ulong token = (ulong)b * call.length + (ulong)segment * NV_SEGMENT;
    const __global uint4 *record = (const __global uint4 *)place(ws, ws_offset, call.products) +
                                   (((ulong)b * GROUPS + group) * call.segments + segment) * SEGMENT_RECORD;
    const ulong first_column = (token * HEADS + group * (HEADS / GROUPS)) * DIM_V;
#if BOXES
    if (boxes && item % 32 == 0) { /* who may fetch */
        use_map(map_of(call, ws, ws_offset, NV_MAP_V));
        use_map(map_of(call, ws, ws_offset, NV_MAP_SCALES));
        if (O_BOXES) {
            use_map(map_of(call, ws, ws_offset, NV_MAP_O));
        }
    }
#endif
    __local outputs_place place_of_segment; /* not in registers, of which there are few */
    const __local outputs_place *at = &place_of_segment;
    if (item == 0) {
        place_of_segment = (outputs_place){
            v + v_offset + first_column,
            o + o_offset + first_column,
            level_scales + level_scales_offset + (token * HEADS + group * (HEADS / GROUPS)) * LEVELS,
            (const __global half_gates *)place(ws, ws_offset, call.gates) + (bh * call.segments + segment) * 2,
            (const __global uint4 *)place(ws, ws_offset, call.nodes) + bh * TILES_V * call.segments * STATE,
            record,
            call.segments,
            (int)min(call.length - segment * NV_SEGMENT, (uint)NV_SEGMENT),
            first_item, count, blocks,
#if BOXES
            map_of(call, ws, ws_offset, 0),
            b,
            segment * NV_SEGMENT,
            group * (HEADS / GROUPS),
#endif
        };
    }

    /* The blocks of segments before this one: one for each bit of its number, the smallest first. */
    if (item < NV_SEGMENTS_BITS) {
        const uint before = popcount(segment & ((1u << item) - 1));
        if ((segment >> item & 1) != 0) {
            ends[before] = (segment >> item << item) - 1;
            levels[before] = SEGMENT_LEVEL + item;
        }
    }
    const stage_ring ring = {stages,
#if WGMMA
                             full, empty,
#endif
                             ends};
#if WGMMA
    if (item < NV_STAGES) {
        arrivals_start(&full[item], 1);
        arrivals_start(&empty[item], NV_OUTPUT_ITEMS / 32);
    }
    if (item < 2) {
        arrivals_start(&item_here[item], boxes ? BOX_COPIES : FETCH_ITEMS + 1);
        arrivals_start(&item_free[item], NV_OUTPUT_ITEMS / 32);
    }
    if (item == 0) {
        arrivals_start(&record_here, 2 + NV_CROSS_LOCAL);
    }
    tile_publish();
#endif
    barrier(CLK_LOCAL_MEM_FENCE);

#if WGMMA
    if (item == NV_OUTPUT_ITEMS - 32) {
        copy_bulk(inside[0], record + P_TILES, 36 * 32 * 16, &record_here);
        copy_bulk(inside[1], record + RECORD + P_TILES, 36 * 32 * 16, &record_here);
#if NV_CROSS_LOCAL
        copy_bulk(cross, record + CROSS_TILES, 64 * 32 * 16, &record_here);
#endif
        start_stages(ring, at);
    }
#if BOXES
    if (boxes && item < 64 && item % 32 == 0) {
        const uint n = item / 32;
        fetch_boxes(values_at[n], gates_at[n], scales_at[n], &item_here[n], at, n);
    }
#endif
    if (!boxes && item < FETCH_ITEMS) {
        fetch_item(values_at[0], gates_at[0], scales_at[0], &item_here[0], at, first_item, item, aligned & 1);
    }
#else
    start_stages(ring, at);
    fetch(inside[0], record + P_TILES, 36 * 32, item, NV_OUTPUT_ITEMS);
    fetch(inside[1], record + RECORD + P_TILES, 36 * 32, item, NV_OUTPUT_ITEMS);
#if NV_CROSS_LOCAL
    fetch(cross, record + CROSS_TILES, 64 * 32, item, NV_OUTPUT_ITEMS);
#endif
    if (item < FETCH_ITEMS) {
        fetch_item(values_at[0], gates_at[0], scales_at[0], at, first_item, item, aligned & 1);
    }
#endif
    /* Sixteen lanes have the blocks before an item of work; those behind the last item do that one again. */
    for (uint of_lanes = item / 16; (of_lanes & ~1u) < count; of_lanes += NV_OUTPUT_ITEMS / 16) {
        const uint n = min(of_lanes, count - 1), block = item % 16;
        const __global float *sums = (const __global float *)place(ws, ws_offset, call.blocks) +
                                     (bh + (first_item + n) / TILES_V) * call.segments;
        float since = block < blocks ? sums[ends[block]] : 0.0f;
#pragma unroll
        for (uint distance = 1; distance < 16; distance *= 2) {
            since += from_before(since, distance, 16);
        }
        since = from_before(since, 1, 16);
        if (block < NV_SEGMENTS_BITS) {
            kept[n][block] = decay(since) * STATE_UNIT * call.scale;
        }
    }
#if !WGMMA
    wait_for_copies();
#endif
    barrier(CLK_LOCAL_MEM_FENCE);
#if WGMMA
    arrivals_wait(&record_here, 0);
#endif
    uint stage = 0;
    for (uint number = 0; number < at->count; number++) {
        /* A chunk takes the longer the later it is: the warpgroups change chunks 0 and 3, 1 and 2, from item to item. */
        const uint n = anew(number), id = item ^ (n % 2 * 384), lane = id % 32, warp = id / 32;
        const uint part = warp / 8, tile_of_half = warp % 8; /* the warp's 16 rows */
        const uint row = 16 * warp + lane / 4;               /* in the segment */
        const __local half_gates *gates = gates_at[n % 2];
        const __global weight *scales_from = at->level_scales + (at->first_item + n) / TILES_V * LEVELS;
#if WGMMA
        arrivals_wait(&item_here[n % 2], n / 2 % 2);
        if (!boxes) {
            tile_publish();
        }
        if (!boxes && id < FETCH_ITEMS && n + 1 < at->count) {
            const uint next = (n + 1) % 2;
            if (n > 0) {
                arrivals_wait(&item_free[next], (n - 1) / 2 % 2);
            }
            fetch_item(values_at[next], gates_at[next], scales_at[next], &item_here[next], at,
                       at->first_item + n + 1, id,
                       aligned & 1);
        }
#else
        wait_for_copies();
        barrier(CLK_LOCAL_MEM_FENCE);
#endif
        const __local stored_scale *scales = scales_at[n % 2] + row * SCALES_ROW;
        const __local float *sums = gates[part].sums + row % NV_HALF;
        const warp_rows rows = {scales + scales_shift(scales_from, row, boxes),
                                scales + 8 * SCALES_ROW + scales_shift(scales_from, row + 8, boxes), decay(sums[0]),
                                decay(sums[8])};
#if !NV_CROSS_LOCAL
        const __global uint4 *cross = at->record + CROSS_TILES;
#endif
        float4 c[8];
        uint4 q[BLOCK_STEPS];
        make_near(c, inside[part], cross, gates, rows, part, tile_of_half, tile_at(values_at[n % VALUES]), q,
                  at->record + part * RECORD + tile_of_half * K_STEPS * 32);
#if !WGMMA
        barrier(CLK_LOCAL_MEM_FENCE);
        if (id < FETCH_ITEMS && n + 1 < at->count) {
            fetch_item(values_at[0], gates_at[(n + 1) % 2], scales_at[(n + 1) % 2], at, at->first_item + n + 1, id,
                       aligned & 1);
        }
#endif

#if O_BOXES
        /* The boxes of the item before have been read: its place is free. */
        if (boxes && n > 0) {
            const uint before = (n - 1) % 2;
            wait_for_stores();
            replace_boxes(values_at[before], gates_at[before], scales_at[before], &item_here[before], &item_free[before],
                          at, n - 1);
        }
#endif

        /* The blocks of segments before this one. */
        const float half_kept = gates[part].tiles[tile_of_half].x;
        const float block_kept = part == 0 ? half_kept : half_kept * gates[0].whole.y;
        for (uint k_block = 0; k_block < NV_K / K_BLOCK; k_block++) {
            if (k_block > 0) {
                load_queries(q, at->record + part * RECORD + tile_of_half * K_STEPS * 32, k_block);
            }
#pragma unroll 1
            for (uint block = 0; block < blocks; block++) {
                float4 level[8];
                tile_clear(level);
#pragma unroll
                for (uint i = 0; i < STAGES_OF_BLOCK; i++) {
                    wait_for_stage(ring, stage + i, n, (k_block * blocks + block) * STAGES_OF_BLOCK + i, at);
                    tile_multiply(level, q + 4 * i, tile_at(stages + (stage + i) % NV_STAGES * STAGE));
                }
                const float2 weights = row_weights(rows, levels[block], block_kept * kept[n][block]);
                tile_wait(level);
#pragma unroll
                for (uint i = 0; i < STAGES_OF_BLOCK; i++) {
                    release_stage(ring, stage + i, n, (k_block * blocks + block) * STAGES_OF_BLOCK + i, at);
                }
                stage += STAGES_OF_BLOCK;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    c[j] += (float4)(weights.x, weights.x, weights.y, weights.y) * level[j];
                }
            }
        }
        const uint of_group = at->first_item + anew(number), head = of_group / TILES_V, tile = of_group % TILES_V;
#if O_BOXES
        if (boxes) {
            store_boxes(at, of_group, 16 * warp, (__local uint *)&scales_at[n % 2][16 * warp * SCALES_ROW],
                        o_at[item / 32], c);
            continue;
        }
#endif
        store_rows(at->o + (ulong)(16 * warp) * (HEADS * DIM_V) + head * DIM_V + tile * NV_TILE_V,
                   (__local uint *)&scales_at[n % 2][16 * warp * SCALES_ROW], c, at->tokens - (int)(16 * warp),
                   DIM_V - (int)tile * NV_TILE_V, aligned & 2);
#if WGMMA
        if (!O_BOXES && boxes) {
            arrivals_publish(); /* what was read and written here, before boxes come */
        }
        meet_in_warp();
#if BOXES && !O_BOXES
        if (boxes) {
            replace_boxes(values_at[n % 2], gates_at[n % 2], scales_at[n % 2], &item_here[n % 2], &item_free[n % 2], at, n);
            continue;
        }
#endif
        if (lane == 0) {
            arrive(&item_free[n % 2]);
        }
#endif
    }
#if O_BOXES
    wait_for_stores();
#endif
}

/* ---- final ------------------------------------------------------------------------------------------------------- */

/* Element (row of K, column of V) of a node. */
float state_element(const __global uint4 *node, uint row, uint column) {
    const __global uint *words = (const __global uint *)&node[row * 8 + ((column / 8) ^ (row & 7u))];
    const float2 pair = unpack(words[column % 8 / 2]);
    return (column % 2 != 0 ? pair.y : pair.x) * STATE_UNIT;
}

/* Element of k from the half's tiles. */
float key_element(const __global uint4 *record, uint token, uint column) {
    const uint tile = (token / NV_CHUNK * K_STEPS + column / 16) * 4 + token % NV_CHUNK / 16;
    const uint lane = column % 8 * 4 + token % 8 / 2;
    const __global uint *words = (const __global uint *)&record[K_TILES + tile * 32 + lane];
    const float2 pair = unpack(words[column % 16 / 8 + token % 16 / 8 * 2]);
    return token % 2 != 0 ? pair.y : pair.x;
}

/*
 * The states after the last token: levels inside the last segment straight from its tokens, those above from the nodes.
 * A work-group makes a row of K, an item some columns of V, of all levels.
 */
__kernel __attribute__((reqd_work_group_size(NV_ITEMS, 1, 1))) void
nvidia_final(const loglin_nvidia_call call, __global float *ws, ulong ws_offset, const __global ushort *v,
             ulong v_offset, __global float *states, ulong states_offset, __global float *log_decay,
             ulong log_decay_offset, __global int *position, ulong position_offset) {
    __local float weighted_keys[NV_SEGMENT];
    const uint item = get_local_id(0), row = get_group_id(0) % DIM_K;
    const ulong bh = get_group_id(0) / DIM_K;
    const uint head = bh % HEADS, b = bh / HEADS;
    const uint segment = call.segments - 1, first = segment * NV_SEGMENT, last = call.length - 1;
    const __global uint4 *record =
        (const __global uint4 *)place(ws, ws_offset, call.products) +
        (((ulong)b * GROUPS + head / (HEADS / GROUPS)) * call.segments + segment) * SEGMENT_RECORD;
    const __global half_gates *gates =
        (const __global half_gates *)place(ws, ws_offset, call.gates) + (bh * call.segments + segment) * 2;
    const float second_half = gates[1].whole.x;
    for (uint s = item; s <= last - first; s += NV_ITEMS) {
        const uint part = s / NV_HALF, at = s % NV_HALF;
        float sum = gates[part].sums[at | 15u] - gates[part].sums[at] + (part == 0 ? second_half : 0.0f);
        for (uint i = at / 16 + 1; i < NV_HALF / 16; i++) {
            sum += gates[part].sums[16 * i + 15];
        }
        weighted_keys[s] = decay(sum) * key_element(record + part * RECORD, at, row);
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    v += v_offset + (((ulong)b * call.length + first) * HEADS + head) * DIM_V;
    states += states_offset + bh * LEVELS * (DIM_K * DIM_V) + row * DIM_V;
    for (uint column = item; column < DIM_V; column += NV_ITEMS) {
        float since = gates[0].whole.x + second_half;
        for (uint level = 0; level < LEVELS; level++) {
            float x = 0.0f;
            if (level < SEGMENT_LEVEL) {
                const uint offset = last - first;
                const uint width = level == 0 ? 1 : 1u << (level - 1);
                const uint start = level == 0 ? offset : offset >> level << level;
                for (uint s = start; (level == 0 || (offset & width) != 0) && s < start + width; s++) {
                    x = fma(weighted_keys[s], unpack(v[(ulong)s * (HEADS * DIM_V) + column]).x, x);
                }
            } else if (((last >> (level - 1)) & 1) != 0) {
                const uint j = level - SEGMENT_LEVEL, end = (segment >> j << j) - 1;
                const __global uint4 *node =
                    (const __global uint4 *)place(ws, ws_offset, call.nodes) +
                    ((bh * TILES_V + column / NV_TILE_V) * call.segments + end) * STATE;
                x = decay(since) * state_element(node, row, column % NV_TILE_V);
                since += ((const __global float *)place(ws, ws_offset, call.blocks))[bh * call.segments + end];
            }
            states[(ulong)level * (DIM_K * DIM_V) + column] = x;
        }
    }
    for (uint level = item; row == 0 && log_decay && level < LEVELS; level += NV_ITEMS) {
        log_decay[log_decay_offset + bh * LEVELS + level] = 0.0f;
    }
    if (row == 0 && head == 0 && item == 0 && position) {
        position[position_offset + b] = (int)call.length;
    }
}
