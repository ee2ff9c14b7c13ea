/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The scalar-gated forward pass on NVIDIA's matrix units, weak partition.
 *
 * A sequence is cut into segments of 256 tokens: two halves of 128, four chunks of 64.
 *     prepare  q, k and scale * q k^T of a segment as the tiles that the matrix units take, once for all heads of a group;
 *              the gates' running sums and the decays of keys to the ends of their tile, chunk and half
 *     states   the states of blocks of 2^j segments, Fenwick's way: node e becomes the block of 2^j segments that ends with
 *              segment e, where j is the number of trailing ones of e.  A work-group goes through NV_SUPER segments
 *     tree     the nodes of larger blocks
 *     outputs  a work-group takes a segment and goes through NV_OUTPUT_COUNT heads of a group (items); a warpgroup has a
 *              chunk of 64 rows, whose q stays in registers.  Inside the segment q k^T is weighed and multiplied by v.
 *              Before it stand blocks of segments, whose states come from the nodes, and are multiplied by q
 * States stand decayed to their block's end; from there on the decay is a scalar apart.  Every product is A (registers)
 * times B (local memory, rows of 64 columns of V): values, or a state.
 *
 * Given: NV_K (dim_k rounded up to a multiple of 64), DIM_K, DIM_V, HEADS, GROUPS, LEVELS (columns of level_scales), USED
 * (those that are read), NORMALIZE, STORAGE, WEIGHT_STORAGE, WGMMA, NV_SUPER_BITS, NV_STATE_COUNT (items of a work-group
 * of states), NV_OUTPUT_COUNT, NV_STAGES, NV_CROSS_LOCAL (q k^T between a segment's halves is kept in local memory).
 */

#define K_STEPS (NV_K / 16)         /* products of 16 columns of K */
#define K_TILES (8 * K_STEPS * 32)  /* where keys stand in a half's record of tiles, in uint4; q comes before them */
#define P_TILES (16 * K_STEPS * 32) /* q k^T */
#define RECORD (P_TILES + 36 * 32)
#define CROSS_TILES (2 * RECORD) /* behind a segment's two halves: q of the second times k of the first, 8 x 8 tiles */
#define SEGMENT_RECORD (CROSS_TILES + 64 * 32)
#define STATE (NV_K * 8) /* uint4 of a state: rows of 64 columns, pieces placed as for the matrix units */
#define STAGE (64 * 8)   /* of 64 rows of a state */
/* Columns of q in registers: beside mma.sync there is room for fewer. */
#define K_BLOCK (WGMMA && NV_K % 128 == 0 ? 128 : 64)
#define BLOCK_STEPS (K_BLOCK / 16)

#define TILES_V ((DIM_V + NV_TILE_V - 1) / NV_TILE_V)
#define ITEMS (HEADS / GROUPS * TILES_V) /* of a group */
#define NV_SUPER (1 << NV_SUPER_BITS)
/* A row of level scales: as they come, in 16 bytes; its place takes half a row of o in the end. */
#define LEAST_SCALES_ROW ((USED + 2 * SCALE_PIECE - 2) / SCALE_PIECE * SCALE_PIECE)
#define SCALES_ROW (LEAST_SCALES_ROW > 4 * SCALE_PIECE ? LEAST_SCALES_ROW : 4 * SCALE_PIECE)
#define SEGMENT_LEVEL 9 /* of the segment before one; then come larger blocks */

/* States are stored divided by this, for half's range. */
#define STATE_UNIT (STORAGE == 1 ? 64.0f : 1.0f)

/* A half's gates. */
typedef struct half_gates {
    float sums[NV_HALF];                                                      /* from the start of the token's tile */
    uint to_tile[NV_HALF / 2], to_chunk[NV_HALF / 2], to_half[NV_HALF / 2]; /* decays to the ends, in storage: pair_at */
    float4 tiles[NV_HALF / 16]; /* decays to the tile's start, from that of the half, that of the chunk, and the ends of the
                                 * tiles two and three before */
    float4 whole;               /* the sum, and its decay */
} half_gates;

/*
 * The place of the decays of a pair of tokens, one of the eight of their tile: what a lane multiplies with in the four
 * tiles of a chunk, two pairs a tile, is eight numbers in a row.
 */
uint pair_at(uint tile, uint pair) { return tile / 4 * 32 + pair % 4 * 8 + tile % 4 * 2 + pair / 4; }

float decay(float x) { return native_exp2(x * 1.44269504f); }

__global char *place(__global float *ws, ulong offset, ulong at) {
    return (__global char *)(((ulong)(ws + offset) + 15) & ~(ulong)15) + at;
}

/* With wgmma, values and level scales come as boxes where rows of these are multiples of 16 bytes. */
#define BOXES (WGMMA && HEADS * LEVELS % SCALE_PIECE == 0)

/* And o goes back as boxes, half of its columns from where a warp's level scales were, where these are not floats. */
#define O_BOXES (BOXES && WEIGHT_STORAGE != 0)

#if BOXES
__global heads_map *map_of(const loglin_nvidia_call call, __global float *ws, ulong ws_offset, uint i) {
    return (__global heads_map *)(((ulong)place(ws, ws_offset, call.maps) + 127) & ~(ulong)127) + i;
}
#endif

/* Copies eight columns, whatever their alignment, or clears them; seldom needed, so it is short. */
void copy_piece(__local uint4 *to, const __global ushort *from, int wanted) {
#pragma unroll 1
    for (uint i = 0; i < 8; i++) {
        ((__local ushort *)to)[i] = wanted ? from[i] : (ushort)0;
    }
}

/*
 * Starts copying rows of storage to local memory, `pieces` of 8 columns each, piece c at place c ^ row % 8 of its eight so
 * that rows and columns of 8 x 8 matrices lie in different banks.  Missing rows and columns become zeros.  `items` that are
 * a multiple of `pieces` share the work.
 */
void fetch_rows(__local uint4 *to, const __global ushort *from, ulong stride, int rows, uint pieces, int rows_there,
                int columns_there, uint item, uint items, int aligned) {
    const uint piece = item % pieces, step = items / pieces, first = item / pieces;
    const int has_columns = (int)piece * 8 < columns_there;
    const __global ushort *x = from + first * stride + piece * 8;
    __local uint4 *place_of_piece = &to[first * pieces + (piece ^ (first & 7u))];
#pragma unroll 1
    for (int row = (int)first; row < rows; row += (int)step) {
        const int wanted = has_columns && row < rows_there;
        if (step % 8 != 0) {
            place_of_piece = &to[row * pieces + (piece ^ ((uint)row & 7u))];
        }
        if (aligned) {
            copy_16(place_of_piece, x, wanted);
        } else {
            copy_piece(place_of_piece, x, wanted);
        }
        x += step * stride;
        place_of_piece += step * pieces;
    }
}

/* Starts copying uint4s to local memory. */
void fetch(__local uint4 *to, const __global uint4 *from, uint count, uint item, uint items) {
#pragma unroll 1
    for (uint i = item; i < count; i += items) {
        copy_16(&to[i], &from[i], 1);
    }
}

/* ---- prepare ----------------------------------------------------------------------------------------------------- */

/* Scales a row to length 1. */
void normalize_row(__local uint4 *rows, uint row) {
    float sum = 0.0f;
    for (uint i = 0; i < NV_K / 8; i++) {
        const uint4 x = rows[row * (NV_K / 8) + i];
        const float2 a = unpack(x.x), b = unpack(x.y), c = unpack(x.z), d = unpack(x.w);
        sum += dot((float4)(a, b), (float4)(a, b)) + dot((float4)(c, d), (float4)(c, d));
    }
    const float norm = 1.0f / sqrt(sum + 1e-6f);
    for (uint i = 0; i < NV_K / 8; i++) {
        __local uint4 *x = &rows[row * (NV_K / 8) + i];
        const float2 a = unpack(x->x) * norm, b = unpack(x->y) * norm, c = unpack(x->z) * norm, d = unpack(x->w) * norm;
        *x = (uint4)(pack(a.x, a.y), pack(b.x, b.y), pack(c.x, c.y), pack(d.x, d.y));
    }
}

/* The value that the lane `distance` before or behind has, if that is one of the `lanes` around this one, or zero. */
float from_before(float x, uint distance, uint lanes) {
    const float y = shuffle_up(x, distance);
    return warp_lane() % lanes >= distance ? y : 0.0f;
}
float from_behind(float x, uint distance, uint lanes) {
    const float y = shuffle_from(x, (warp_lane() + distance) & 31u);
    return warp_lane() % lanes + distance < lanes ? y : 0.0f;
}

/*
 * Stores a warp's decays times `kept`, four tokens a lane: of its two pairs a lane gives one for one of the lane two before
 * or behind, so that it has pairs p and p + 4 of the tile.
 */
void store_decays(__global uint *to, const float x[4], float kept) {
    const int is_late = (warp_lane() & 2u) != 0;
    const uint pairs[2] = {pack(x[0] * kept, x[1] * kept), pack(x[2] * kept, x[3] * kept)};
    const uint other = shuffle_xor(is_late ? pairs[0] : pairs[1], 2);
    const uint p = warp_lane() % 2 * 2 + (is_late ? 1 : 0);
    *(__global uint2 *)&to[pair_at(warp_lane() / 4, p)] = is_late ? (uint2)(other, pairs[1]) : (uint2)(pairs[0], other);
}

/* A warp makes a half's gates of one head; a lane has four tokens, four lanes a tile. */
void make_gates(__global half_gates *to, const __local float *g, uint stride) {
    const uint lane = warp_lane(), tile = lane / 4;
    float sums[4];
    sums[0] = g[4 * lane * stride];
#pragma unroll
    for (int i = 1; i < 4; i++) {
        sums[i] = sums[i - 1] + g[(4 * lane + i) * stride];
    }
    float sum = sums[3];
    sum += from_before(sum, 1, 4);
    sum += from_before(sum, 2, 4);
    const float before = from_before(sum, 1, 4), end = shuffle_from(sum, lane | 3u); /* the tile's sum */
    const float one_before = from_before(end, 4, 32), two_before = from_before(end, 8, 32);
    float up = end, down = end; /* sums of the tiles of a chunk, from its start and to its end */
    up += from_before(up, 4, 16);
    up += from_before(up, 8, 16);
    down += from_behind(down, 4, 16);
    down += from_behind(down, 8, 16);
    const float first = shuffle_from(up, 15), second = shuffle_from(up, 31); /* chunks */
    const float chunk_before = from_before(up, 4, 16), chunk_after = from_behind(down, 4, 16);
    const float half_before = chunk_before + (tile >= 4 ? first : 0.0f);
    const float half_after = chunk_after + (tile < 4 ? second : 0.0f);
    const float to_chunk = decay(chunk_after), to_half = decay(half_after), all = first + second;
    float to_tile[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sums[i] += before;
        to_tile[i] = decay(end - sums[i]);
    }
    ((__global float4 *)to->sums)[lane] = (float4)(sums[0], sums[1], sums[2], sums[3]);
    store_decays(to->to_tile, to_tile, 1.0f);
    store_decays(to->to_chunk, to_tile, to_chunk);
    store_decays(to->to_half, to_tile, to_half);
    if (lane % 4 == 0) {
        to->tiles[tile] =
            (float4)(decay(half_before), decay(chunk_before), decay(one_before), decay(one_before + two_before));
    }
    if (lane == 0) {
        to->whole = (float4)(all, decay(all), 0.0f, 0.0f);
    }
}

/* A work-group makes a half's gates of NV_GATE_HEADS heads; they come through local memory, [token][head]. */
void prepare_gates(loglin_nvidia_call call, __global half_gates *to, const __global float *g, ulong id,
                   __local float *tile) {
    const uint halves = 2 * call.segments, bundles = (HEADS + NV_GATE_HEADS - 1) / NV_GATE_HEADS;
    const uint first = id % bundles * NV_GATE_HEADS, part = id / bundles % halves, b = id / bundles / halves;
    const uint item = get_local_id(0);
    const ulong first_token = (ulong)part * NV_HALF, from = ((ulong)b * call.length + first_token) * HEADS + first;
#pragma unroll
    for (uint i = item; i < NV_HALF * NV_GATE_HEADS; i += NV_PREPARE_ITEMS) {
        const uint token = i / NV_GATE_HEADS, head = i % NV_GATE_HEADS;
        const int wanted = g && first + head < HEADS && first_token + token < call.length;
        tile[token * (NV_GATE_HEADS + 1) + head] = wanted ? g[from + (ulong)token * HEADS + head] : 0.0f;
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint i = item / 32; i < NV_GATE_HEADS && first + i < HEADS; i += NV_PREPARE_ITEMS / 32) {
        make_gates(to + ((ulong)b * HEADS + first + i) * halves + part, &tile[i], NV_GATE_HEADS + 1);
    }
}

/* The four 8 x 8 matrices of rows 16 `tile`.. and columns 16 `step`..: the address that this item gives. */
const __local uint4 *matrix_row(const __local uint4 *rows, uint tile, uint step) {
    const uint row = 16 * tile + warp_lane() % 16, piece = 2 * step + warp_lane() / 16;
    return &rows[row * (NV_K / 8) + (piece ^ (row & 7u))];
}

/* Adds a tile of q times one of k, transposed, as two of 8 columns. */
void add_product(float4 c[2], uint4 a, uint4 k) {
    mma(&c[0], a, k.x, k.z);
    mma(&c[1], a, k.y, k.w);
}

/*
 * Three work-groups make the record of a segment: one for each half, and one for q of the second half times k of the first.
 * A warp has 16 rows.  The work-groups behind the last segment's make gates, an item of the first one also the maps.
 */
__kernel __attribute__((reqd_work_group_size(NV_PREPARE_ITEMS, 1, 1))) void
nvidia_prepare(const loglin_nvidia_call call, __global float *ws, ulong ws_offset, const __global ushort *q,
               ulong q_offset, const __global ushort *k, ulong k_offset, const __global float *g, ulong g_offset,
               const __global ushort *v, ulong v_offset, const __global weight *level_scales, ulong level_scales_offset,
               const __global ushort *o, ulong o_offset, uint aligned) {
    __local uint4 rows[2 * NV_HALF * NV_K / 8];
    __local uint4 *queries = rows, *keys = rows + NV_HALF * NV_K / 8;
    const uint item = get_local_id(0), lane = warp_lane(), warp = same_in_warp(item / 32);
    const ulong id = get_group_id(0), records = (ulong)call.batch * GROUPS * call.segments;
#if BOXES
    if (id == 3 * records && item == 0) {
        const uint4 sizes = (uint4)(call.batch, call.length, HEADS, DIM_V);
        map_heads(map_of(call, ws, ws_offset, NV_MAP_V), v + v_offset, sizes, 2, NV_SEGMENT, NV_TILE_V, BOX_TILE);
        map_heads(map_of(call, ws, ws_offset, NV_MAP_O), o + o_offset, sizes, 2, 16, NV_TILE_V / 2, BOX_HALF_TILE);
        map_heads(map_of(call, ws, ws_offset, NV_MAP_SCALES), level_scales + level_scales_offset,
                  (uint4)(sizes.xy, 1, HEADS * LEVELS), sizeof(stored_scale), NV_SEGMENT, SCALES_ROW, BOX_PLAIN);
    }
#endif
    if (id >= 3 * records) {
        prepare_gates(call, (__global half_gates *)place(ws, ws_offset, call.gates), g ? g + g_offset : g,
                      id - 3 * records, (__local float *)rows);
        return;
    }
    const uint is_cross = id % 3 == 2, q_part = id % 3 != 0, k_part = id % 3 == 1;
    const uint segment = id / 3 % call.segments, group = id / 3 / call.segments % GROUPS;
    const ulong first = id / 3 / call.segments / GROUPS * call.length; /* of the sequence's tokens */
    const int q_token = (int)(segment * NV_SEGMENT + q_part * NV_HALF);
    const int k_token = (int)(segment * NV_SEGMENT + k_part * NV_HALF);
    const int q_tokens = (int)call.length - q_token, k_tokens = (int)call.length - k_token;
    fetch_rows(queries, q + q_offset + ((first + (q_tokens > 0 ? q_token : 0)) * GROUPS + group) * DIM_K, GROUPS * DIM_K,
               NV_HALF, NV_K / 8, q_tokens, DIM_K, item, NV_PREPARE_ITEMS, aligned);
    fetch_rows(keys, k + k_offset + ((first + (k_tokens > 0 ? k_token : 0)) * GROUPS + group) * DIM_K, GROUPS * DIM_K,
               NV_HALF, NV_K / 8, k_tokens, DIM_K, item, NV_PREPARE_ITEMS, aligned);
    wait_for_copies();
    barrier(CLK_LOCAL_MEM_FENCE);
#if NORMALIZE
    normalize_row(item < NV_HALF ? queries : keys, item % NV_HALF);
    barrier(CLK_LOCAL_MEM_FENCE);
#endif
    __global uint4 *of_segment = (__global uint4 *)place(ws, ws_offset, call.products) + id / 3 * SEGMENT_RECORD;
    __global uint4 *record = of_segment + q_part * RECORD;
    __global uint4 *products = is_cross ? of_segment + CROSS_TILES + warp * 8 * 32
                                        : record + P_TILES + warp * (warp + 1) / 2 * 32;
    const uint columns = is_cross ? 8 : warp + 1; /* tiles of k that this one of q is multiplied with, four at a time */
#pragma unroll 1
    for (uint first_column = 0; first_column < columns; first_column += 4) {
        float4 product[4][2];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            product[j][0] = product[j][1] = (float4)(0.0f);
        }
#pragma unroll 1
        for (uint step = 0; step < K_STEPS; step++) {
            const uint4 a = load_matrices(matrix_row(queries, warp, step));
            if (!is_cross && first_column == 0) {
                record[(warp * K_STEPS + step) * 32 + lane] = a;
                /* Keys with K as rows: the transposed quarters, the second and third in each other's place. */
                record[K_TILES + ((warp / 4 * K_STEPS + step) * 4 + warp % 4) * 32 + lane] =
                    load_transposed(matrix_row(keys, warp, step)).xzyw;
            }
#pragma unroll
            for (uint j = 0; j < 4; j++) {
                add_product(product[j], a, load_matrices(matrix_row(keys, first_column + j, step)));
            }
        }
#pragma unroll
        for (uint j = 0; j < 4; j++) {
            if (first_column + j < columns) {
                const float4 left = product[j][0] * call.scale, right = product[j][1] * call.scale;
                products[(first_column + j) * 32 + lane] =
                    (uint4)(pack(left.x, left.y), pack(left.z, left.w), pack(right.x, right.y), pack(right.z, right.w));
            }
        }
    }
}
