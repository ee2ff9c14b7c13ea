/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The scalar-gated forward pass on NVIDIA's matrix units, weak partition.
 *
 * A sequence is cut into segments of 256 tokens: two halves of 128, four chunks of 64.
 *     prepare  q, k and scale * q k^T of a half as the tiles that the matrix units take, once for all heads of a group; the
 *              gates' running sums and the decays of keys to the ends of their tile, chunk and half
 *     states   the states of blocks of 2^j segments, Fenwick's way: node e becomes the block of 2^j segments that ends with
 *              segment e, where j is the number of trailing ones of e.  A work-group goes through NV_SUPER segments
 *     tree     the nodes of larger blocks
 *     outputs  a work-group takes a segment and goes through NV_OUTPUT_COUNT heads of a group (items); a warpgroup has a
 *              chunk of 64 rows, whose q stays in registers.  Inside a half q k^T is weighed and multiplied by v.  Before it
 *              stand the first half (for the second one), whose state is made here, and the blocks of segments, whose
 *              states come from the nodes.  A level's weight and decay are multiplied into q, so that all levels add up in
 *              one sum
 * States stand decayed to their block's end; from there on the decay is a scalar apart.  Every product is A (registers)
 * times B (local memory, rows of 64 columns of V): values, or a state.
 *
 * Given: NV_K (dim_k rounded up to a multiple of 64), DIM_K, DIM_V, HEADS, GROUPS, LEVELS (columns of level_scales), USED
 * (those that are read), NORMALIZE, STORAGE, WEIGHT_STORAGE, WGMMA, NV_SUPER_BITS, NV_STATE_COUNT (items of a work-group
 * of states), NV_OUTPUT_COUNT, NV_KEYS_LOCAL (the keys of a segment's first half are kept in local memory).
 */

#define K_STEPS (NV_K / 16)         /* products of 16 columns of K */
#define K_TILES (8 * K_STEPS * 32)  /* where keys stand in a half's record of tiles, in uint4; q comes before them */
#define P_TILES (16 * K_STEPS * 32) /* q k^T */
#define RECORD (P_TILES + 36 * 32)
#define STATE (NV_K * 8) /* uint4 of a state: rows of 64 columns, pieces placed as for the matrix units */
/* Columns of q in registers: beside mma.sync there is room for fewer.  With wgmma NV_K is a multiple of 128. */
#define K_BLOCK (WGMMA ? 128 : 64)
#define BLOCK_STEPS (K_BLOCK / 16)
#define STAGE (K_BLOCK * 8)

#define TILES_V ((DIM_V + NV_TILE_V - 1) / NV_TILE_V)
#define ITEMS (HEADS / GROUPS * TILES_V) /* of a group */
#define NV_SUPER (1 << NV_SUPER_BITS)
#define SCALES_ROW ((USED + 6) / 4 * 4)
#define HALF_LEVEL 8 /* of the first half, seen from the second; then come the blocks of segments */

/* States are stored divided by this, for half's range. */
#define STATE_UNIT (STORAGE == 1 ? 64.0f : 1.0f)

/* A half's gates. */
typedef struct half_gates {
    float sums[NV_HALF];                                                      /* from the start of the token's tile */
    uint to_tile[NV_HALF / 2], to_chunk[NV_HALF / 2], to_half[NV_HALF / 2]; /* decays to the ends, in storage */
    float4 tiles[NV_HALF / 16]; /* decays to the tile's start, from that of the half, that of the chunk, and the ends of the
                                 * tiles two and three before */
    float4 whole;               /* the sum, and its decay */
} half_gates;

float decay(float x) { return native_exp2(x * 1.44269504f); }

__global char *place(__global float *ws, ulong offset, ulong at) {
    return (__global char *)(((ulong)(ws + offset) + 15) & ~(ulong)15) + at;
}

/* Eight columns, whatever their alignment. */
uint4 load_piece(const __global ushort *x) {
    return (uint4)(x[0] | (uint)x[1] << 16, x[2] | (uint)x[3] << 16, x[4] | (uint)x[5] << 16, x[6] | (uint)x[7] << 16);
}

/*
 * Starts copying rows of storage to local memory, `pieces` of 8 columns each, piece c at place c ^ row % 8 of its eight so
 * that rows and columns of 8 x 8 matrices lie in different banks.  Missing rows and columns become zeros.  `items` that are
 * a multiple of `pieces` share the work.
 */
void fetch_rows(__local uint4 *to, const __global ushort *from, ulong stride, int rows, uint pieces, int rows_there,
                int columns_there, uint item, uint items, int aligned) {
    const uint piece = item % pieces;
    const int has_columns = (int)piece * 8 < columns_there;
    const __global ushort *x = from + item / pieces * stride + piece * 8;
#pragma unroll 1
    for (int row = (int)(item / pieces); row < rows; row += (int)(items / pieces)) {
        const int wanted = has_columns && row < rows_there;
        __local uint4 *place_of_piece = &to[row * pieces + (piece ^ ((uint)row & 7u))];
        if (aligned) {
            copy_16(place_of_piece, wanted ? x : from, wanted);
        } else {
            *place_of_piece = wanted ? load_piece(x) : (uint4)(0);
        }
        x += items / pieces * stride;
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
#pragma unroll
    for (uint distance = 1; distance < 4; distance *= 2) {
        const float left = shuffle_up(sum, distance);
        sum += lane % 4 >= distance ? left : 0.0f;
    }
    const float left = shuffle_up(sum, 1), before = lane % 4 > 0 ? left : 0.0f;
    float half_before = 0.0f, chunk_before = 0.0f, chunk_after = 0.0f, half_after = 0.0f, all = 0.0f;
    float one_before = 0.0f, two_before = 0.0f; /* the tiles' sums */
#pragma unroll
    for (uint i = 0; i < 8; i++) {
        const float x = shuffle_from(sum, 4 * i + 3);
        const int same_chunk = i / 4 == tile / 4;
        all += x;
        half_before += i < tile ? x : 0.0f;
        half_after += i > tile ? x : 0.0f;
        chunk_before += i < tile && same_chunk ? x : 0.0f;
        chunk_after += i > tile && same_chunk ? x : 0.0f;
        one_before = i + 1 == tile ? x : one_before;
        two_before = i + 2 == tile ? x : two_before;
    }
    const float end = shuffle_from(sum, lane | 3u), to_chunk = decay(chunk_after), to_half = decay(half_after);
    float to_tile[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sums[i] += before;
        to_tile[i] = decay(end - sums[i]);
    }
    ((__global float4 *)to->sums)[lane] = (float4)(sums[0], sums[1], sums[2], sums[3]);
    ((__global uint2 *)to->to_tile)[lane] = (uint2)(pack(to_tile[0], to_tile[1]), pack(to_tile[2], to_tile[3]));
    ((__global uint2 *)to->to_chunk)[lane] = (uint2)(pack(to_tile[0] * to_chunk, to_tile[1] * to_chunk),
                                                     pack(to_tile[2] * to_chunk, to_tile[3] * to_chunk));
    ((__global uint2 *)to->to_half)[lane] = (uint2)(pack(to_tile[0] * to_half, to_tile[1] * to_half),
                                                    pack(to_tile[2] * to_half, to_tile[3] * to_half));
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
#pragma unroll 8
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

/* A work-group makes the record of a half, a warp 16 of its rows; those behind the last half make gates. */
__kernel __attribute__((reqd_work_group_size(NV_PREPARE_ITEMS, 1, 1))) void
nvidia_prepare(const loglin_nvidia_call call, __global float *ws, ulong ws_offset, const __global ushort *q,
               ulong q_offset, const __global ushort *k, ulong k_offset, const __global float *g, ulong g_offset,
               uint aligned) {
    __local uint4 rows[2 * NV_HALF * NV_K / 8];
    __local uint4 *queries = rows, *keys = rows + NV_HALF * NV_K / 8;
    const uint item = get_local_id(0), lane = warp_lane(), warp = same_in_warp(item / 32);
    const uint halves = 2 * call.segments;
    const ulong id = get_group_id(0), records = (ulong)call.batch * GROUPS * halves;
    if (id >= records) {
        prepare_gates(call, (__global half_gates *)place(ws, ws_offset, call.gates), g ? g + g_offset : g, id - records,
                      (__local float *)rows);
        return;
    }
    const uint part = id % halves, group = id / halves % GROUPS, b = id / halves / GROUPS;
    const int tokens = clamp((int)call.length - (int)(part * NV_HALF), 0, NV_HALF);
    const ulong first = tokens > 0 ? (ulong)b * call.length + (ulong)part * NV_HALF : 0;
    const ulong at = (first * GROUPS + group) * DIM_K;
    fetch_rows(queries, q + q_offset + at, GROUPS * DIM_K, NV_HALF, NV_K / 8, tokens, DIM_K, item, NV_PREPARE_ITEMS,
               aligned);
    fetch_rows(keys, k + k_offset + at, GROUPS * DIM_K, NV_HALF, NV_K / 8, tokens, DIM_K, item, NV_PREPARE_ITEMS,
               aligned);
    wait_for_copies();
    barrier(CLK_LOCAL_MEM_FENCE);
#if NORMALIZE
    normalize_row(item < NV_HALF ? queries : keys, item % NV_HALF);
    barrier(CLK_LOCAL_MEM_FENCE);
#endif
    __global uint4 *record = (__global uint4 *)place(ws, ws_offset, call.products) + id * RECORD;
    float4 product[8][2];
#pragma unroll
    for (int j = 0; j < 8; j++) {
        product[j][0] = product[j][1] = (float4)(0.0f);
    }
#pragma unroll 1
    for (uint step = 0; step < K_STEPS; step++) {
        const uint4 a = load_matrices(matrix_row(queries, warp, step));
        record[(warp * K_STEPS + step) * 32 + lane] = a;
        /* Keys with K as rows: the transposed quarters, the second and third in each other's place. */
        record[K_TILES + ((warp / 4 * K_STEPS + step) * 4 + warp % 4) * 32 + lane] =
            load_transposed(matrix_row(keys, warp, step)).xzyw;
#pragma unroll
        for (uint j = 0; j < 4; j++) {
            add_product(product[j], a, load_matrices(matrix_row(keys, j, step)));
        }
        if (warp >= 4) {
#pragma unroll
            for (uint j = 4; j < 8; j++) {
                add_product(product[j], a, load_matrices(matrix_row(keys, j, step)));
            }
        }
    }
#pragma unroll
    for (uint j = 0; j < 8; j++) {
        if (j <= warp) {
            const float4 left = product[j][0] * call.scale, right = product[j][1] * call.scale;
            record[P_TILES + (warp * (warp + 1) / 2 + j) * 32 + lane] =
                (uint4)(pack(left.x, left.y), pack(left.z, left.w), pack(right.x, right.y), pack(right.z, right.w));
        }
    }
}

/* ---- What states and outputs share ------------------------------------------------------------------------------- */

/* A tile of A with its columns multiplied by weights in pairs: columns 2p.. and 2p + 8... */
uint4 scale_columns(uint4 a, uint left, uint right) {
    return (uint4)(multiply_pairs(a.x, left), multiply_pairs(a.y, left), multiply_pairs(a.z, right),
                   multiply_pairs(a.w, right));
}

/* The keys of 16 tokens, decayed; `to` has a pair of decays for every two tokens of the 16. */
uint4 decay_keys(uint4 keys, const __local uint *to) {
    return scale_columns(keys, to[warp_lane() % 4], to[warp_lane() % 4 + 4]);
}

/* Rows r and r + 8 of a warp's 16, 32 columns, times unit: the item p of a row's four gets columns 8 p... */
uint4 upper_piece(const float4 c[4], float unit) {
    return transpose_quad((uint4)(pack(c[0].x * unit, c[0].y * unit), pack(c[1].x * unit, c[1].y * unit),
                                  pack(c[2].x * unit, c[2].y * unit), pack(c[3].x * unit, c[3].y * unit)));
}

uint4 lower_piece(const float4 c[4], float unit) {
    return transpose_quad((uint4)(pack(c[0].z * unit, c[0].w * unit), pack(c[1].z * unit, c[1].w * unit),
                                  pack(c[2].z * unit, c[2].w * unit), pack(c[3].z * unit, c[3].w * unit)));
}

/* ---- states ------------------------------------------------------------------------------------------------------ */

/* The place of piece p (0) or p + 4 (1) of a state's row. */
uint piece_at(uint row, uint i) { return row * 8 + ((warp_lane() % 4 + 4 * i) ^ (row & 7u)); }

/* Adds a node of this work-group's, times weight. */
void add_node(float4 state[NV_K / 64][8], const __global uint4 *node, float weight) {
#pragma unroll
    for (uint m = 0; m < NV_K / 64; m++) {
        const uint row = 64 * m + get_local_id(0) % 128 / 32 * 16 + warp_lane() / 4;
#pragma unroll
        for (uint i = 0; i < 2; i++) {
            const uint4 upper = transpose_quad(node[piece_at(row, i)]), lower = transpose_quad(node[piece_at(row + 8, i)]);
            state[m][4 * i] += weight * (float4)(unpack(upper.x), unpack(lower.x));
            state[m][4 * i + 1] += weight * (float4)(unpack(upper.y), unpack(lower.y));
            state[m][4 * i + 2] += weight * (float4)(unpack(upper.z), unpack(lower.z));
            state[m][4 * i + 3] += weight * (float4)(unpack(upper.w), unpack(lower.w));
        }
    }
}

void store_node(__global uint4 *node, const float4 state[NV_K / 64][8]) {
#pragma unroll
    for (uint m = 0; m < NV_K / 64; m++) {
        const uint row = 64 * m + get_local_id(0) % 128 / 32 * 16 + warp_lane() / 4;
#pragma unroll
        for (uint i = 0; i < 2; i++) {
            node[piece_at(row, i)] = upper_piece(state[m] + 4 * i, 1.0f / STATE_UNIT);
            node[piece_at(row + 8, i)] = lower_piece(state[m] + 4 * i, 1.0f / STATE_UNIT);
        }
    }
}

#define STATE_STAGES 3
#define STATE_ITEMS (128 * NV_STATE_COUNT)

/* A warpgroup has an item; all share the keys. */
__kernel __attribute__((reqd_work_group_size(STATE_ITEMS, 1, 1))) void
nvidia_states(const loglin_nvidia_call call, __global float *ws, ulong ws_offset, const __global ushort *v,
              ulong v_offset, uint aligned) {
    __local uint4 values[STATE_STAGES][NV_STATE_COUNT][NV_CHUNK * 8] __attribute__((aligned(1024)));
    __local uint4 keys[STATE_STAGES][4 * K_STEPS * 32];
    __local uint4 decays[STATE_STAGES][NV_STATE_COUNT][NV_CHUNK / 8 + 1]; /* of the keys, and the half's `whole` */
    __local float blocks[NV_STATE_COUNT][NV_SUPER];
#if WGMMA
    __local arrivals keys_here[STATE_STAGES];
    if (get_local_id(0) == 0) {
        for (uint i = 0; i < STATE_STAGES; i++) {
            arrivals_start(&keys_here[i], 1);
        }
        tile_publish();
    }
#endif
    const uint lane = warp_lane(), own = same_in_warp(get_local_id(0) / 128);
    const uint warp = same_in_warp(get_local_id(0) % 128 / 32);
    const ulong id = get_group_id(0);
    const uint bundles = (ITEMS + NV_STATE_COUNT - 1) / NV_STATE_COUNT;
    const uint group = id / bundles % GROUPS, b = id / (bundles * GROUPS) % call.batch;
    const uint first = id / ((ulong)bundles * GROUPS) / call.batch * NV_SUPER;
    /* Behind the last item: the last one again. */
    const uint of_group = min((uint)(id % bundles) * NV_STATE_COUNT + own, (uint)ITEMS - 1);
    const uint head = group * (HEADS / GROUPS) + of_group / TILES_V, tile = of_group % TILES_V;
    const ulong bh = (ulong)b * HEADS + head;

    /* Segments before the last one; all their tokens are there. */
    const uint chunks = first + 1 < call.segments ? 4 * min((uint)NV_SUPER, call.segments - 1 - first) : 0;
    const __global ushort *values_from =
        v + v_offset + (((ulong)b * call.length + (ulong)first * NV_SEGMENT) * HEADS + head) * DIM_V + tile * NV_TILE_V;
    const __global half_gates *gates =
        (const __global half_gates *)place(ws, ws_offset, call.gates) + (bh * call.segments + first) * 2;
    const __global uint4 *record = (const __global uint4 *)place(ws, ws_offset, call.products) +
                                   (((ulong)b * GROUPS + group) * call.segments + first) * 2 * RECORD;
    __global uint4 *nodes =
        (__global uint4 *)place(ws, ws_offset, call.nodes) + ((bh * TILES_V + tile) * call.segments + first) * STATE;

    float4 state[NV_K / 64][8];
#pragma unroll
    for (int m = 0; m < NV_K / 64; m++) {
        tile_clear(state[m]);
    }
    float since = 0.0f; /* of this segment's gates */
    for (uint n = 0; n < chunks + STATE_STAGES - 1; n++) {
        /* Stage n is started; the chunk that was started STATE_STAGES - 1 stages ago is worked on. */
        if (n >= STATE_STAGES - 1) {
            WAIT_FOR_COPIES_BUT(STATE_STAGES - 2);
            tile_publish();
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        if (n < chunks) {
            const uint stage = n % STATE_STAGES;
            fetch_rows(values[stage][own], values_from + (ulong)n * (NV_CHUNK * HEADS * DIM_V), HEADS * DIM_V, NV_CHUNK, 8,
                       NV_CHUNK, DIM_V - (int)tile * NV_TILE_V, get_local_id(0) % 128, 128, aligned);
            const __global uint4 *keys_from = record + (ulong)(n / 2) * RECORD + K_TILES + n % 2 * (4 * K_STEPS * 32);
#if WGMMA
            if (get_local_id(0) == 0) {
                copy_bulk(keys[stage], keys_from, 4 * K_STEPS * 32 * 16, &keys_here[stage]);
            }
#else
            fetch(keys[stage], keys_from, 4 * K_STEPS * 32, get_local_id(0), STATE_ITEMS);
#endif
            fetch(decays[stage][own], (const __global uint4 *)gates[n / 2].to_half + n % 2 * (NV_CHUNK / 8), NV_CHUNK / 8,
                  get_local_id(0) % 128, 128);
            fetch(&decays[stage][own][NV_CHUNK / 8], (const __global uint4 *)&gates[n / 2].whole, 1,
                  get_local_id(0) % 128, 128);
        }
        end_copies();
        if (n < STATE_STAGES - 1) {
            continue;
        }
        const uint chunk = n - (STATE_STAGES - 1), stage = chunk % STATE_STAGES, segment = chunk / 4;
        if (chunk % 2 == 0) {
            const uint4 whole = decays[stage][own][NV_CHUNK / 8];
            const float sum = as_float(whole.x), kept = chunk % 8 == 0 ? 0.0f : as_float(whole.y);
#pragma unroll
            for (int m = 0; m < NV_K / 64; m++) {
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    state[m][j] *= kept;
                }
            }
            since = chunk % 4 == 0 ? sum : since + sum;
        }
        const tile_rows rows = tile_at(values[stage][own]);
#if WGMMA
        arrivals_wait(&keys_here[stage], chunk / STATE_STAGES % 2);
#endif
#pragma unroll
        for (uint m = 0; m < NV_K / 64; m++) {
            uint4 a[4];
#pragma unroll
            for (uint step = 0; step < 4; step++) {
                a[step] = decay_keys(keys[stage][((4 * m + warp) * 4 + step) * 32 + lane],
                                     (const __local uint *)decays[stage][own] + 8 * step);
            }
            tile_multiply(state[m], a, rows);
        }
#pragma unroll
        for (int m = 0; m < NV_K / 64; m++) {
            tile_wait(state[m]);
        }
        if (chunk % 4 == 3) {
            /* The segment before an odd one is in the sum already. */
            for (uint j = 0; (segment >> j & 1) != 0; j++) {
                const uint child = segment - (1u << j);
                if (j > 0) {
                    add_node(state, nodes + (ulong)child * STATE, decay(since) * STATE_UNIT);
                }
                since += blocks[own][child];
            }
            store_node(nodes + (ulong)segment * STATE, state);
            if (get_local_id(0) % 128 == 0) {
                blocks[own][segment] = since;
                ((__global float *)place(ws, ws_offset, call.sums))[bh * call.segments + first + segment] = since;
                ((__global float *)place(ws, ws_offset, call.blocks))[bh * call.segments + first + segment] = since;
            }
        }
    }
}

/* ---- tree -------------------------------------------------------------------------------------------------------- */

/* A work-group makes 32 uint4 of all nodes of a sequence, head and tile of V; a warp works on one node at a time. */
__kernel __attribute__((reqd_work_group_size(NV_ITEMS, 1, 1))) void
nvidia_tree(const loglin_nvidia_call call, __global float *ws, ulong ws_offset, __local float *blocks) {
    const uint lane = warp_lane(), warp = get_local_id(0) / 32;
    const uint slice = get_group_id(0) % (STATE / 32);
    const ulong matrix = get_group_id(0) / (STATE / 32), bh = matrix / TILES_V;
    __global uint4 *nodes = (__global uint4 *)place(ws, ws_offset, call.nodes) + matrix * call.segments * STATE +
                            slice * 32 + lane;
    const __global float *sums = (const __global float *)place(ws, ws_offset, call.sums) + bh * call.segments;
    __global float *all_blocks = (__global float *)place(ws, ws_offset, call.blocks) + bh * call.segments;
    for (uint e = get_local_id(0); e < call.segments; e += NV_ITEMS) {
        blocks[e] = sums[e];
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    /* The last segment is the end of no block that is read. */
    for (uint bits = NV_SUPER_BITS + 1; (1u << bits) < call.segments; bits++) {
        for (uint e = (1u << bits) - 1 + (warp << (bits + 1)); e + 1 < call.segments;
             e += (NV_ITEMS / 32) << (bits + 1)) {
            uint4 x = nodes[(ulong)e * STATE];
            float2 a = unpack(x.x), b = unpack(x.y), c = unpack(x.z), d = unpack(x.w);
            float since = sums[e];
            for (uint j = NV_SUPER_BITS; j < bits; j++) {
                const uint child = e - (1u << j);
                const float weight = decay(since);
                x = nodes[(ulong)child * STATE];
                a += weight * unpack(x.x);
                b += weight * unpack(x.y);
                c += weight * unpack(x.z);
                d += weight * unpack(x.w);
                since += blocks[child];
            }
            nodes[(ulong)e * STATE] = (uint4)(pack(a.x, a.y), pack(b.x, b.y), pack(c.x, c.y), pack(d.x, d.y));
            if (lane == 0) {
                blocks[e] = since;
                if (slice == 0 && matrix % TILES_V == 0) {
                    all_blocks[e] = since;
                }
            }
        }
        barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
    }
}

/* ---- outputs ----------------------------------------------------------------------------------------------------- */

/*
 * Starts copying the level weights of 64 of a segment's rows, from `row`.  Floats come in whole 16 bytes, so a row starts
 * with as many floats as stand before its own in their 16 bytes: scales_shift.
 */
void fetch_scales(__local float *scales, const __global weight *level_scales, int row, int rows) {
    const uint piece = get_local_id(0) % 8;
    row += (int)get_local_id(0) / 8;
#if WEIGHT_STORAGE == 0
    const ulong from = (ulong)(level_scales + (ulong)row * (HEADS * LEVELS));
    const int bytes = USED * 4 + (int)(from & 15) - 16 * (int)piece;
    if (bytes > 0 && row < rows) {
        copy_some_of_16(&scales[row * SCALES_ROW + 4 * piece],
                        (const __global void *)((from & ~(ulong)15) + 16 * piece), (uint)min(bytes, 16));
    }
#else
    for (uint level = piece; level < USED && row < rows; level += 8) {
        scales[row * SCALES_ROW + level] = load_weight(level_scales, (ulong)row * (HEADS * LEVELS) + level);
    }
#endif
}

uint scales_shift(const __global weight *level_scales, uint row) {
    return WEIGHT_STORAGE == 0 ? ((uint)(ulong)level_scales / 4 + row * (uint)(HEADS * LEVELS)) % 4 : 0;
}

/* What weighs the rows r and r + 8 of a warp's 16. */
typedef struct warp_rows {
    const __local float *upper_scales, *lower_scales; /* their level weights */
    float upper, lower;                               /* their decays from the tile's start */
} warp_rows;

/* Pairs of the weights of one level, decayed by `kept` before the tile. */
uint2 row_weights(warp_rows rows, uint level, float kept) {
    const float upper = rows.upper_scales[level] * (kept * rows.upper);
    const float lower = rows.lower_scales[level] * (kept * rows.lower);
    return (uint2)(pack(upper, upper), pack(lower, lower));
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
        weight[e] = rows.upper_scales[level] * decay(early - left[e]);
        weight[2 + e] = rows.lower_scales[4] * decay(late - left[e]);
        weight[4 + e] = rows.lower_scales[level] * decay(late - right[e]);
    }
    return (uint4)(pack(is_past[0] ? a.x * weight[0] : 0.0f, is_past[1] ? a.y * weight[1] : 0.0f),
                   pack(b.x * weight[2], b.y * weight[3]), 0u,
                   pack(is_past[0] ? d.x * weight[4] : 0.0f, is_past[1] ? d.y * weight[5] : 0.0f));
}

/*
 * c = the chunk's own weighed q k^T times its values, and that of the chunk before it in its half.  own: which 16 rows of
 * the chunk are the warp's.
 */
void make_near(float4 c[8], const __local uint4 *products, const __local half_gates *gates, warp_rows rows, uint odd,
               uint own, tile_rows values) {
    const uint lane = warp_lane(), p = lane % 4, i = 4 * odd + own;
    const __local uint4 *tiles = products + i * (i + 1) / 2 * 32 + lane;
    const float4 before = gates->tiles[i];
    uint4 near[4], far[4];
#pragma unroll
    for (uint j = 0; j < 4; j++) {
        const uint tile = 4 * odd + j;
        near[j] = (uint4)(0);
        if (j < own) {
            const uint2 weights = row_weights(rows, (own ^ j) == 1 ? 5 : 6,
                                              own - j == 1 ? 1.0f : own - j == 2 ? before.z : before.w);
            near[j] = scale_columns(scale_rows(tiles[32 * tile], weights.x, weights.y), gates->to_tile[8 * tile + p],
                                    gates->to_tile[8 * tile + p + 4]);
        }
    }
    const uint4 diagonal = weigh_diagonal(tiles[32 * i], rows, gates->sums + 16 * i);
#pragma unroll
    for (uint j = 0; j < 4; j++) {
        near[j] = j == own ? diagonal : near[j];
        far[j] = (uint4)(0);
    }
    if (odd) {
        const uint2 weights = row_weights(rows, 7, before.y);
#pragma unroll
        for (uint j = 0; j < 4; j++) {
            far[j] = scale_columns(scale_rows(tiles[32 * j], weights.x, weights.y), gates->to_chunk[8 * j + p],
                                   gates->to_chunk[8 * j + p + 4]);
        }
    }
    tile_clear(c);
    if (odd) {
        tile_multiply(c, far, values);
    }
    tile_multiply(c, near, tile_step(values, 4 * odd));
    tile_wait(c);
}

#if NV_KEYS_LOCAL
#define KEYS_SPACE __local
#else
#define KEYS_SPACE __global
#endif

/* 64 rows of the state of a segment's first half, to local memory. */
void make_half_state(__local uint4 *to, const KEYS_SPACE uint4 *keys, const __local half_gates *gates, tile_rows values,
                     uint m, uint warp) {
    const uint lane = warp_lane(), r = lane / 4, p = lane % 4;
    float4 state[8];
    tile_clear(state);
#pragma unroll 1
    for (uint chunk = 0; chunk < 2; chunk++) {
        uint4 a[4];
#pragma unroll
        for (uint step = 0; step < 4; step++) {
            a[step] = decay_keys(keys[((chunk * K_STEPS + 4 * m + warp) * 4 + step) * 32 + lane],
                                 gates->to_half + 8 * (4 * chunk + step));
        }
        tile_multiply(state, a, tile_step(values, 4 * chunk));
        tile_wait(state);
    }
    const uint row = 64 * m + 16 * warp + r;
    __local uint *pairs = (__local uint *)to;
#pragma unroll
    for (uint j = 0; j < 8; j++) {
        const float4 x = state[j] * (1.0f / STATE_UNIT);
        const uint at = row * 32 + (j ^ (row & 7u)) * 4 + p;
        pairs[at] = pack(x.x, x.y);
        pairs[at + 8 * 32] = pack(x.z, x.w);
    }
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

/* 32 columns of the warp's 16 rows; o: row r, columns 8 p... */
void store_columns(__global ushort *o, const float4 c[4], int rows, int columns, int aligned) {
    const int r = (int)warp_lane() / 4, p = (int)warp_lane() % 4;
    const uint4 upper = upper_piece(c, 1.0f), lower = lower_piece(c, 1.0f);
    store_piece(o, upper, 8 * p < columns && r < rows, aligned);
    store_piece(o + (ulong)8 * (HEADS * DIM_V), lower, 8 * p < columns && r + 8 < rows, aligned);
}

void load_queries(uint4 q[BLOCK_STEPS], const __global uint4 *tiles, uint block) {
#pragma unroll
    for (uint step = 0; step < BLOCK_STEPS; step++) {
        q[step] = tiles[(block * BLOCK_STEPS + step) * 32 + warp_lane()];
    }
}

/* A work-group's segment: where its parts start, of the first item of its group. */
typedef struct outputs_place {
    const __global ushort *v;
    __global ushort *o;
    const __global weight *level_scales;
    const __global half_gates *gates;
    const __global uint4 *nodes;
    uint segments; /* of the sequence */
    int tokens;    /* of the segment */
} outputs_place;

/* Starts to copy what an item has of its own: the chunk `quarter` of its values and level weights; its gates. */
void fetch_item(__local uint4 *values, __local half_gates *gates, __local float *scales,
                const __local outputs_place *at, uint item, uint quarter, int aligned) {
    const uint head = item / TILES_V, tile = item % TILES_V;
    fetch_rows(values + quarter * (NV_CHUNK * 8),
               at->v + (ulong)(quarter * NV_CHUNK) * (HEADS * DIM_V) + head * DIM_V + tile * NV_TILE_V, HEADS * DIM_V,
               NV_CHUNK, 8, at->tokens - (int)(quarter * NV_CHUNK), DIM_V - (int)tile * NV_TILE_V, get_local_id(0),
               NV_OUTPUT_ITEMS, aligned);
    fetch_scales(scales, at->level_scales + head * LEVELS, (int)(quarter * NV_CHUNK), at->tokens);
    if (quarter == 0) {
        fetch((__local uint4 *)gates, (const __global uint4 *)(at->gates + (ulong)head * at->segments * 2),
              2 * NV_GATES / 16, get_local_id(0), NV_OUTPUT_ITEMS);
    }
}

/*
 * States on their way to the matrix units, a ring of NV_STAGES.  With wgmma they come in bulk: `full` counts their arrival,
 * `empty` the warps that are done with them; an item of the last warp, which is late as a rule, starts the copies.  Else all
 * items copy, and the whole work-group meets at a barrier for each state.
 */
typedef struct stage_ring {
    __local uint4 *stages;
#if WGMMA
    __local arrivals *full, *empty;
#endif
    const __local uint *ends; /* last segments of the blocks of segments before this one */
    uint first_item, count, blocks;
} stage_ring;

/* Starts to copy the state that is multiplied as number `n`; of an item come K_BLOCK rows of all blocks, then the next. */
void fetch_stage(stage_ring ring, uint n, const __local outputs_place *at) {
    const uint per_item = ring.blocks * (NV_K / K_BLOCK);
    const int is_wanted = n < ring.count * per_item;
    if (is_wanted && (!WGMMA || get_local_id(0) == NV_OUTPUT_ITEMS - 32)) {
        const uint item = ring.first_item + n / per_item, block = n % ring.blocks;
        const __global uint4 *from = at->nodes + ((ulong)item * at->segments + ring.ends[block]) * STATE +
                                     n % per_item / ring.blocks * STAGE;
        __local uint4 *to = ring.stages + n % NV_STAGES * STAGE;
#if WGMMA
        if (n >= NV_STAGES) {
            arrivals_wait(&ring.empty[n % NV_STAGES], (n / NV_STAGES - 1) % 2);
        }
        copy_bulk(to, from, STAGE * 16, &ring.full[n % NV_STAGES]);
#else
        fetch(to, from, STAGE, get_local_id(0), NV_OUTPUT_ITEMS);
#endif
    }
#if !WGMMA
    end_copies();
#endif
}

/* Waits for state n.  Without wgmma all warps are done with state n - 1 then. */
void wait_for_stage(stage_ring ring, uint n) {
#if WGMMA
    arrivals_wait(&ring.full[n % NV_STAGES], n / NV_STAGES % 2);
#else
    WAIT_FOR_COPIES_BUT(NV_STAGES - 2);
    barrier(CLK_LOCAL_MEM_FENCE);
#endif
}

/* This warp is done with state n. */
void release_stage(stage_ring ring, uint n) {
#if WGMMA
    if (warp_lane() == 0) {
        arrive(&ring.empty[n % NV_STAGES]);
    }
#endif
}

__kernel __attribute__((reqd_work_group_size(NV_OUTPUT_ITEMS, 1, 1))) void
nvidia_outputs(const loglin_nvidia_call call, __global float *ws, ulong ws_offset, const __global ushort *v,
               ulong v_offset, const __global weight *level_scales, ulong level_scales_offset, __global ushort *o,
               ulong o_offset, uint aligned) {
    __local uint4 values[NV_SEGMENT * 8] __attribute__((aligned(1024)));
    __local uint4 stages[NV_STAGES * STAGE] __attribute__((aligned(1024)));
    __local uint4 half_state[STATE] __attribute__((aligned(1024)));
    __local uint4 products[2][36 * 32];
#if NV_KEYS_LOCAL
    __local uint4 keys[P_TILES - K_TILES];
#endif
    __local half_gates gates_at[2][2] __attribute__((aligned(16)));
    __local float scales_at[2][NV_SEGMENT * SCALES_ROW] __attribute__((aligned(16)));
    __local float kept[NV_OUTPUT_COUNT][NV_SEGMENTS_BITS]; /* decay from a block of segments to this one, times scale */
    __local uint ends[NV_SEGMENTS_BITS], levels[NV_SEGMENTS_BITS]; /* the blocks' last segments, and levels */
#if WGMMA
    __local arrivals full[NV_STAGES], empty[NV_STAGES];
    __local arrivals values_free, half_here; /* of each item: the values are used up; the half's state is made */
#endif
    const uint item = get_local_id(0), lane = warp_lane(), warp = same_in_warp(item / 32), own = warp % 4;
    const uint chunk = warp / 4, odd = chunk % 2, part = chunk / 2, row = 16 * own + lane / 4; /* in the chunk */
    const uint bundles = (ITEMS + NV_OUTPUT_COUNT - 1) / NV_OUTPUT_COUNT;
    const ulong id = get_group_id(0);
    const uint first_item = id % bundles * NV_OUTPUT_COUNT, count = min((uint)NV_OUTPUT_COUNT, ITEMS - first_item);
    const uint group = id / bundles % GROUPS, b = id / (bundles * GROUPS) % call.batch;
    const uint segment = call.segments - 1 - id / ((ulong)bundles * GROUPS) / call.batch, blocks = popcount(segment);
    const ulong bh = (ulong)b * HEADS + group * (HEADS / GROUPS); /* the group's first head */
    const ulong token = (ulong)b * call.length + (ulong)segment * NV_SEGMENT;
    const __global uint4 *record = (const __global uint4 *)place(ws, ws_offset, call.products) +
                                   (((ulong)b * GROUPS + group) * call.segments + segment) * 2 * RECORD;
    const __global uint4 *tiles_of_q = record + part * RECORD + (4 * odd + own) * K_STEPS * 32;
    const ulong first_column = (token * HEADS + group * (HEADS / GROUPS)) * DIM_V;
    __local outputs_place place_of_segment; /* not in registers, of which there are few */
    const __local outputs_place *at = &place_of_segment;
    if (item == 0) {
        place_of_segment = (outputs_place){
            v + v_offset + first_column,
            o + o_offset + first_column,
            level_scales + level_scales_offset + (token * HEADS + group * (HEADS / GROUPS)) * LEVELS,
            (const __global half_gates *)place(ws, ws_offset, call.gates) + (bh * call.segments + segment) * 2,
            (const __global uint4 *)place(ws, ws_offset, call.nodes) + bh * TILES_V * call.segments * STATE,
            call.segments,
            (int)min(call.length - segment * NV_SEGMENT, (uint)NV_SEGMENT),
        };
    }

    /* The blocks of segments before this one: ends, levels, decays. */
    for (uint i = item; i < count * NV_SEGMENTS_BITS; i += NV_OUTPUT_ITEMS) {
        const uint n = i / NV_SEGMENTS_BITS, wanted = i % NV_SEGMENTS_BITS;
        const __global float *sums = (const __global float *)place(ws, ws_offset, call.blocks) +
                                     (bh + (first_item + n) / TILES_V) * call.segments;
        float since = 0.0f;
        for (uint j = 0, found = 0; found <= wanted && (segment >> j) != 0; j++) {
            if ((segment >> j & 1) != 0) {
                const uint end = (segment >> j << j) - 1;
                if (found == wanted) {
                    kept[n][found] = decay(since) * STATE_UNIT * call.scale;
                    ends[found] = end;
                    levels[found] = HALF_LEVEL + 1 + j;
                } else {
                    since += sums[end];
                }
                found++;
            }
        }
    }
    const stage_ring ring = {stages,
#if WGMMA
                             full, empty,
#endif
                             ends, first_item, count, blocks};
#if WGMMA
    if (item < NV_STAGES) {
        arrivals_start(&full[item], 1);
        arrivals_start(&empty[item], NV_OUTPUT_ITEMS / 32);
    }
    if (item == 0) {
        arrivals_start(&values_free, NV_OUTPUT_ITEMS / 32);
        arrivals_start(&half_here, NV_OUTPUT_ITEMS / 2);
    }
    tile_publish();
#endif
    barrier(CLK_LOCAL_MEM_FENCE);

    fetch(products[0], record + P_TILES, 36 * 32, item, NV_OUTPUT_ITEMS);
    fetch(products[1], record + RECORD + P_TILES, 36 * 32, item, NV_OUTPUT_ITEMS);
#if NV_KEYS_LOCAL
    fetch(keys, record + K_TILES, P_TILES - K_TILES, item, NV_OUTPUT_ITEMS);
#else
    const __global uint4 *keys = record + K_TILES;
#endif
    for (uint quarter = 0; quarter < 4; quarter++) {
        fetch_item(values, gates_at[0], scales_at[0], at, first_item, quarter, aligned);
    }
    for (uint i = 0; i < NV_STAGES - 1; i++) {
        fetch_stage(ring, i, at);
    }
    uint4 q[BLOCK_STEPS];
#if NV_K == K_BLOCK
    load_queries(q, tiles_of_q, 0);
#endif
    uint stage = 0;
    for (uint n = 0; n < count; n++) {
        const __local half_gates *gates = gates_at[n % 2];
        const uint head = (first_item + n) / TILES_V, tile = (first_item + n) % TILES_V;
        const __global weight *scales_from = at->level_scales + head * LEVELS;
        wait_for_copies();
        tile_publish();
        barrier(CLK_LOCAL_MEM_FENCE);
        const __local float *scales = scales_at[n % 2] + (64 * chunk + row) * SCALES_ROW;
        const warp_rows rows = {scales + scales_shift(scales_from, 64 * chunk + row),
                                scales + 8 * SCALES_ROW + scales_shift(scales_from, 64 * chunk + row + 8),
                                decay(gates[part].sums[64 * odd + row]), decay(gates[part].sums[64 * odd + row + 8])};

        /* Inside the halves. */
        if (!odd) {
            for (uint m = part; m < NV_K / 64; m += 2) {
                make_half_state(half_state, keys, &gates[0], tile_at(values), m, own);
            }
            tile_publish();
#if WGMMA
            arrive(&half_here);
#endif
        }
        float4 c[8];
        make_near(c, products[part], &gates[part], rows, odd, own, tile_at(values + part * (NV_HALF * 8)));
#if WGMMA
        if (lane == 0) {
            arrive(&values_free);
        }
#else
        barrier(CLK_LOCAL_MEM_FENCE);
#endif

        /* What comes before them: blocks of segments, then the first half.  Meanwhile the next item is fetched. */
        const float half_kept = gates[part].tiles[4 * odd + own].x;
        const float block_kept = part == 0 ? half_kept : half_kept * gates[0].whole.y;
        uint quarter = n + 1 < count ? 0 : 4;
        for (uint k_block = 0; k_block < NV_K / K_BLOCK; k_block++) {
#if NV_K != K_BLOCK
            load_queries(q, tiles_of_q, k_block);
#endif
#pragma unroll 1
            for (uint block = 0; block < blocks + part || quarter < 4; block++) {
                if (block < blocks + part) {
                    const int is_half = block == blocks;
                    uint2 weights;
                    tile_rows state;
                    if (is_half) {
#if WGMMA
                        arrivals_wait(&half_here, n % 2);
#endif
                        weights = row_weights(rows, HALF_LEVEL, half_kept * STATE_UNIT * call.scale);
                        state = tile_at(half_state + k_block * STAGE);
                    } else {
                        weights = row_weights(rows, levels[block], block_kept * kept[n][block]);
                        state = tile_at(stages + stage % NV_STAGES * STAGE);
                        wait_for_stage(ring, stage);
                    }
#pragma unroll
                    for (uint step = 0; step < BLOCK_STEPS; step += 4) {
                        uint4 a[4];
#pragma unroll
                        for (uint i = 0; i < 4; i++) {
                            a[i] = scale_rows(q[step + i], weights.x, weights.y);
                        }
                        tile_multiply(c, a, tile_step(state, step));
                        tile_wait_but_one();
                        if (step == 0 && !is_half) {
                            /* The product before this one is done. */
                            if (stage > 0) {
                                release_stage(ring, stage - 1);
                            }
                            fetch_stage(ring, stage + NV_STAGES - 1, at);
                        }
                    }
                    stage += !is_half;
                }
                /* Not beside the first one, when a warpgroup may still need this item's values. */
                if (block > 0 && quarter < 4) {
#if WGMMA
                    arrivals_wait(&values_free, n % 2);
#endif
                    fetch_item(values, gates_at[(n + 1) % 2], scales_at[(n + 1) % 2], at, first_item + n + 1, quarter++,
                               aligned);
                }
            }
        }
        tile_wait(c);
        __global ushort *to = at->o + (ulong)(64 * chunk + row) * (HEADS * DIM_V) + head * DIM_V + tile * NV_TILE_V +
                              8 * (lane % 4);
        const int rows_there = at->tokens - (int)(64 * chunk + 16 * own), columns_there = DIM_V - (int)tile * NV_TILE_V;
        store_columns(to, c, rows_there, columns_there, aligned);
        store_columns(to + 32, c + 4, rows_there, columns_there - 32, aligned);
    }
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
        (((ulong)b * GROUPS + head / (HEADS / GROUPS)) * call.segments + segment) * 2 * RECORD;
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
            if (level <= HALF_LEVEL) {
                const uint offset = last - first;
                const uint width = level == 0 ? 1 : 1u << (level - 1);
                const uint start = level == 0 ? offset : offset >> level << level;
                for (uint s = start; (level == 0 || (offset & width) != 0) && s < start + width; s++) {
                    x = fma(weighted_keys[s], unpack(v[(ulong)s * (HEADS * DIM_V) + column]).x, x);
                }
            } else if (((last >> (level - 1)) & 1) != 0) {
                const uint j = level - HALF_LEVEL - 1, end = (segment >> j << j) - 1;
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
