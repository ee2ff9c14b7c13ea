/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The gated delta rule on NVIDIA's matrix units, weak partition: the forward pass, and what the backward pass
 * (cl/nvidia_delta_backward.cl) shares with it.  cl/chunk_operators.cl has the formulas of
 * a chunk's map.
 *
 *     prepare  the map of every chunk, all at once: READ, K_START, WRITE^T and MZ (Z with the level weights)
 *     walk     a work-group takes ND_V columns of V of a sequence and head and goes through the chunks in order, all level
 *              states in local memory.  First half of a chunk: half of the warps read, o = MZ V + sum weight READ E; the
 *              others find what is still to be written, V - K_START E, for each level.  Second half: every warp updates its
 *              16 rows of K of all states.  Levels that end here become one state in the same sum.
 *     final    the caller's final states, of what the walk does not have
 *
 * Everything is made of tiles, 16 x 16 numbers of a matrix, 8 to an item of a warp, and of one product: C += A B^T.  States
 * stand transposed (V x K).  A state's number is kept as its rounded value, which the products take, and the remainder, so
 * that rounding does not pile up along the sequence.
 *
 * Given: DIM_K, DIM_V (multiples of 16), HEADS, GROUPS, LEVELS (columns of level_scales), STATES (levels of chunks, at
 * least 1), NORMALIZE, STORAGE, WEIGHT_STORAGE, ND_V (16 or 32), BACKWARD (the walk saves the states for the backward pass
 * and makes no output).
 */

#define STEPS (DIM_K / 16)
#define TOKENS (ND_CHUNK / 16)
#define KEY_ROW (DIM_K / 8 + 1)      /* uint4 of a row in local memory: rows begin in different banks */
#define SQUARE_ROW (ND_CHUNK / 8 + 1)
#define SOLVE_ROW (ND_CHUNK / 4 + 1) /* float4 */
#define LOWER_TILES 10
#define FIRST_LEVEL 7                /* of the chunk before */
#define INNER_LEVELS 7
#define ROWS (ND_CHUNK * STATES + 4) /* floats: the weights of a level for all rows, level by level; the chunk's decay */

/* uint4 of a chunk's map, and where its parts begin.  _T: K by tokens, the others are tokens by K. */
#define READ_AT 0
#define START_AT (TOKENS * STEPS * 32)
#define WRITE_T_AT (2 * TOKENS * STEPS * 32)
#define OWN_AT (3 * TOKENS * STEPS * 32) /* MZ; for the backward pass its transpose, and those of the others */
#define READ_T_AT (OWN_AT + LOWER_TILES * 32)
#define START_T_AT (READ_T_AT + TOKENS * STEPS * 32)
#define WRITE_AT (START_T_AT + TOKENS * STEPS * 32)
#define MAP (BACKWARD ? WRITE_AT + TOKENS * STEPS * 32 : READ_T_AT)

#define WALK_WARPS (ND_WALK_ITEMS / 32)
#define TURNS ((STEPS + WALK_WARPS - 1) / WALK_WARPS) /* blocks of 16 rows of K to a walking warp */
#define SLICES ((DIM_V + ND_V - 1) / ND_V)
#define V_TILES (ND_V / 16)
#define VALUE_ROW (ND_V / 8 + 1)     /* uint4 */
#define STATE (V_TILES * STEPS * 32) /* uint4 */
#define UPDATE (V_TILES * TOKENS * 32)
#define SAVED (DIM_V * (DIM_K / 8))  /* uint4 of a state of all columns of V, in memory: its rows, of K */

float decay(float x) { return native_exp2(x * 1.44269504f); }

__global char *place(__global float *ws, ulong offset, ulong at) {
    return (__global char *)(((ulong)(ws + offset) + 15) & ~(ulong)15) + at;
}

/* A chunk of a sequence and head. */
typedef struct chunk_place {
    ulong id;      /* among those of all sequences and heads */
    uint n;        /* among those of the sequence */
    int count;     /* its tokens */
    ulong row;     /* of its first token and head, in the arrays of heads */
    ulong key_row; /* of that token and the head's group */
} chunk_place;

chunk_place find_chunk(const loglin_delta_call call, ulong id) {
    const ulong bh = id / call.chunks;
    const uint n = id % call.chunks, head = bh % HEADS;
    const ulong token = bh / HEADS * call.length + (ulong)n * ND_CHUNK;
    const chunk_place at = {id, n, min((int)(call.length - n * ND_CHUNK), ND_CHUNK), token * HEADS + head,
                            token * GROUPS + head / (HEADS / GROUPS)};
    return at;
}

/* Its map, and the level weights of its rows. */
__global uint4 *find_map(const loglin_delta_call call, __global float *ws, ulong ws_offset, ulong id) {
    return (__global uint4 *)place(ws, ws_offset, call.maps) + id * MAP;
}

__global float *find_weights(const loglin_delta_call call, __global float *ws, ulong ws_offset, ulong id) {
    return (__global float *)place(ws, ws_offset, call.rows) + id * ROWS;
}

/* What a work-group walks along: a slice of the columns of V of a sequence and head. */
typedef struct slice_place {
    ulong bh, first_chunk; /* the latter among those of all sequences and heads */
    uint slice;
    int columns;           /* of the slice: the last one may have fewer */
    ulong values;          /* its first element in v, o, dO and dv */
} slice_place;

slice_place find_slice(const loglin_delta_call call) {
    const ulong bh = get_group_id(0) / SLICES, head = bh % HEADS;
    const uint slice = get_group_id(0) % SLICES;
    const slice_place at = {bh, bh * call.chunks, slice,
                            DIM_V % ND_V == 0 ? ND_V : min(DIM_V - (int)slice * ND_V, ND_V),
                            (bh / HEADS * call.length * HEADS + head) * DIM_V + slice * ND_V};
    return at;
}

/* ---- Tiles -------------------------------------------------------------------------------------------------------- */

/* C += A B^T; c holds the left and the right eight columns. */
void add_product(float4 c[2], uint4 a, uint4 b) {
    mma(&c[0], a, b.x, b.z);
    mma(&c[1], a, b.y, b.w);
}

uint4 round_tile(const float4 c[2]) {
    return (uint4)(pack(c[0].x, c[0].y), pack(c[0].z, c[0].w), pack(c[1].x, c[1].y), pack(c[1].z, c[1].w));
}

void unround_tile(float4 c[2], uint4 x) {
    c[0] = (float4)(unpack(x.x), unpack(x.y));
    c[1] = (float4)(unpack(x.z), unpack(x.w));
}

/* A tile of rows in local memory that are `row` uint4 long; x is the tile's first. */
uint4 load_tile(const __local uint4 *x, uint row) {
    return load_matrices(x + (warp_lane() & 15) * row + warp_lane() / 16);
}

/* Its transpose. */
uint4 load_tile_transposed(const __local uint4 *x, uint row) {
    const uint lane = warp_lane();
    return load_transposed(x + ((lane & 7) + lane / 16 * 8) * row + (lane / 8 & 1));
}

uint4 transpose_tile(uint4 x) {
    return (uint4)(transpose_matrix(x.x), transpose_matrix(x.z), transpose_matrix(x.y), transpose_matrix(x.w));
}

/* Number of tile (i, j), j <= i, of a lower triangle. */
uint lower_tile(uint i, uint j) { return i * (i + 1) / 2 + j; }

/* ---- prepare ------------------------------------------------------------------------------------------------------- */

/* Rows of a 16-bit matrix to local memory, 16 bytes at a time where they are aligned; missing rows become zeros. */
void fetch_matrix(__local uint4 *to, uint to_row, const __global ushort *from, uint from_row, uint columns, int rows,
                  uint aligned, uint items) {
    for (uint i = get_local_id(0); i < ND_CHUNK * (columns / 8); i += items) {
        const uint row = i / (columns / 8), piece = i % (columns / 8);
        __local uint4 *place_of = to + row * to_row + piece;
        const int wanted = (int)row < rows;
        const __global ushort *x = from + (wanted ? (ulong)row * from_row + piece * 8 : 0);
        if (aligned) {
            copy_16(place_of, x, wanted);
        } else {
            uint4 y = (uint4)(0u);
            if (wanted) {
                y = (uint4)(x[0] | (uint)x[1] << 16, x[2] | (uint)x[3] << 16, x[4] | (uint)x[5] << 16,
                            x[6] | (uint)x[7] << 16);
            }
            *place_of = y;
        }
    }
}

/* A chunk's rows of q or k to local memory, by 128 work-items. */
void fetch_keys(__local uint4 *to, const __global ushort *from, const chunk_place *at, uint aligned) {
    fetch_matrix(to, KEY_ROW, from + at->key_row * DIM_K, GROUPS * DIM_K, DIM_K, at->count, aligned, ND_PREPARE_ITEMS);
}

/* A warp makes the running sums of a chunk's gates, as sums and what their rounding has lost. */
void scan_gates(__local float *gates, const __global float *g, int rows) {
    const int lane = (int)warp_lane();
    const float even = g && 2 * lane < rows ? g[(ulong)(2 * lane) * HEADS] : 0.0f;
    const float odd = g && 2 * lane + 1 < rows ? g[(ulong)(2 * lane + 1) * HEADS] : 0.0f;
    float sum = even + odd, seen = sum - even;
    float rest = (even - (sum - seen)) + (odd - seen);
    for (uint distance = 1; distance < 32; distance *= 2) {
        const float left = shuffle_up(sum, distance), left_rest = shuffle_up(rest, distance);
        if (lane >= (int)distance) {
            const float next = left + sum;
            seen = next - left;
            rest = rest + left_rest + ((left - (next - seen)) + (sum - seen));
            sum = next;
        }
    }
    const float before = shuffle_up(sum, 1), before_rest = shuffle_up(rest, 1);
    const float start = lane > 0 ? before : 0.0f, next = start + even;
    seen = next - start;
    gates[2 * lane] = next;
    gates[ND_CHUNK + 2 * lane] = (lane > 0 ? before_rest : 0.0f) + ((start - (next - seen)) + (even - seen));
    gates[2 * lane + 1] = sum;
    gates[ND_CHUNK + 2 * lane + 1] = rest;
}

/* exp(a_r - a_s), s <= r; 1 for other s. */
float decay_between(const __local float *gates, uint r, uint s) {
    return decay(min((gates[r] - gates[s]) + (gates[ND_CHUNK + r] - gates[ND_CHUNK + s]), 0.0f));
}

/* 1, or 1 / |row|. */
float row_norm(const __local uint4 *row) {
#if NORMALIZE
    float sum = 0.0f;
    for (uint i = 0; i < DIM_K / 8; i++) {
        const uint4 x = row[i];
        const float2 a = unpack(x.x), b = unpack(x.y), c = unpack(x.z), d = unpack(x.w);
        sum += (a.x * a.x + a.y * a.y) + (b.x * b.x + b.y * b.y) + (c.x * c.x + c.y * c.y) + (d.x * d.x + d.y * d.y);
    }
    return 1.0f / sqrt(sum + 1e-6f);
#else
    return 1.0f;
#endif
}

/* What the rows of a chunk are multiplied by. */
typedef struct chunk_rows {
    float gates[2 * ND_CHUNK];      /* running sums, and their remainders */
    float start[ND_CHUNK];          /* exp(a_r) */
    float end[ND_CHUNK];            /* exp(a_C - a_r) */
    float beta[ND_CHUNK];
    float norms[2][ND_CHUNK];       /* of q with the scale, of k */
    float weights[ND_CHUNK][INNER_LEVELS + 1];
} chunk_rows;

/* An item of the first 64 or of the others takes a row. */
void find_rows(__local chunk_rows *rows, const loglin_delta_call call, const __local uint4 *queries,
               const __local uint4 *keys, const __global weight *beta, const __global weight *level_scales, int count) {
    const uint item = get_local_id(0), row = item % ND_CHUNK;
    if (item < ND_CHUNK) {
        rows->norms[0][row] = call.scale * row_norm(queries + row * KEY_ROW);
        rows->start[row] = decay(rows->gates[row] + rows->gates[ND_CHUNK + row]);
        rows->end[row] = decay_between(rows->gates, ND_CHUNK - 1, row);
    } else {
        rows->norms[1][row] = row_norm(keys + row * KEY_ROW);
        rows->beta[row] = (int)row < count ? load_weight(beta, row * HEADS) : 0.0f;
        for (uint level = 0; level < INNER_LEVELS; level++) {
            rows->weights[row][level] =
                (int)row < count && level < LEVELS ? load_weight(level_scales, (ulong)row * (HEADS * LEVELS) + level) : 0.0f;
        }
    }
}

/* The weights of the levels between chunks, and the chunk's decay. */
void store_rows(__global float *to, const __local chunk_rows *rows, const __global weight *level_scales, int count) {
    for (uint i = get_local_id(0); i < ND_CHUNK * STATES; i += ND_PREPARE_ITEMS) {
        const uint level = FIRST_LEVEL + i / ND_CHUNK, row = i % ND_CHUNK;
        to[i] = (int)row < count && level < LEVELS ? load_weight(level_scales, (ulong)row * (HEADS * LEVELS) + level) : 0.0f;
    }
    if (get_local_id(0) == 0) {
        to[ND_CHUNK * STATES] = rows->start[ND_CHUNK - 1];
    }
}

/* Tiles (i, j) of X / beta to `x`, and of A = tril(Q K^T) D to `products`. */
void make_products(__local float *x, __local uint4 *products, const __local uint4 *queries, const __local uint4 *keys,
                   const __local chunk_rows *rows, uint i) {
    const uint lane = warp_lane();
    for (uint j = 0; j <= i; j++) {
        float4 qk[2] = {(float4)(0.0f), (float4)(0.0f)}, kk[2] = {(float4)(0.0f), (float4)(0.0f)};
        for (uint step = 0; step < STEPS; step++) {
            const uint4 b = load_tile(keys + 16 * j * KEY_ROW + 2 * step, KEY_ROW);
            add_product(qk, load_tile(queries + 16 * i * KEY_ROW + 2 * step, KEY_ROW), b);
            add_product(kk, load_tile(keys + 16 * i * KEY_ROW + 2 * step, KEY_ROW), b);
        }
#pragma unroll
        for (uint half_of = 0; half_of < 2; half_of++) {
            float q_values[4] = {qk[half_of].x, qk[half_of].y, qk[half_of].z, qk[half_of].w};
            const float k_values[4] = {kk[half_of].x, kk[half_of].y, kk[half_of].z, kk[half_of].w};
#pragma unroll
            for (uint e = 0; e < 4; e++) {
                const uint r = 16 * i + lane / 4 + 8 * (e / 2), s = 16 * j + 8 * half_of + 2 * (lane % 4) + e % 2;
                const float factor = decay_between(rows->gates, r, s) * rows->norms[1][s];
                q_values[e] = s <= r ? q_values[e] * (factor * rows->norms[0][r]) : 0.0f;
                x[r * (4 * SOLVE_ROW) + s] =
                    s < r ? k_values[e] * (factor * rows->norms[1][r]) : 0.0f;
            }
            qk[half_of] = (float4)(q_values[0], q_values[1], q_values[2], q_values[3]);
        }
        products[lower_tile(i, j) * 32 + lane] = round_tile(qk);
    }
}

/* A column of (I + X)^-1 by forward substitution; zeros before the diagonal. */
void solve_column(float4 y[ND_CHUNK / 4], const __local float4 *x, const __local float *beta, uint column) {
#pragma unroll
    for (uint r = 0; r < ND_CHUNK; r++) {
        float4 sums = (float4)(0.0f);
#pragma unroll
        for (uint s = 0; s < r / 4; s++) {
            sums = fma(x[r * SOLVE_ROW + s], y[s], sums);
        }
        float sum = (sums.x + sums.y) + (sums.z + sums.w);
        const float4 last = x[r * SOLVE_ROW + r / 4];
        if (r % 4 > 0) {
            sum = fma(last.x, y[r / 4].x, sum);
        }
        if (r % 4 > 1) {
            sum = fma(last.y, y[r / 4].y, sum);
        }
        if (r % 4 > 2) {
            sum = fma(last.z, y[r / 4].z, sum);
        }
        sum = (r == column ? 1.0f : 0.0f) - beta[r] * sum;
        if (r % 4 == 0) {
            y[r / 4].x = sum;
        } else if (r % 4 == 1) {
            y[r / 4].y = sum;
        } else if (r % 4 == 2) {
            y[r / 4].z = sum;
        } else {
            y[r / 4].w = sum;
        }
    }
}

/* A column of T = (I + X)^-1 diag(beta) as a row of T^T, and of T^T with the factors of K_END's rows. */
void store_column(__local uint4 *t, __local uint4 *t_end, const float4 y[ND_CHUNK / 4], const __local chunk_rows *rows,
                  uint column) {
    const float beta = rows->beta[column];
#pragma unroll
    for (uint s = 0; s < ND_CHUNK / 8; s++) {
        const float4 a = beta * y[2 * s], b = beta * y[2 * s + 1];
        const __local float *end = rows->end + 8 * s, *norm = rows->norms[1] + 8 * s;
        t[column * SQUARE_ROW + s] = (uint4)(pack(a.x, a.y), pack(a.z, a.w), pack(b.x, b.y), pack(b.z, b.w));
        t_end[column * SQUARE_ROW + s] = (uint4)(
            pack(a.x * end[0] * norm[0], a.y * end[1] * norm[1]), pack(a.z * end[2] * norm[2], a.w * end[3] * norm[3]),
            pack(b.x * end[4] * norm[4], b.y * end[5] * norm[5]), pack(b.z * end[6] * norm[6], b.w * end[7] * norm[7]));
    }
}

/* The level weights of a tile of Z. */
void weigh_tile(float4 z[2], const __local chunk_rows *rows, uint i, uint j) {
    const uint lane = warp_lane(), r = 16 * i + lane / 4, s = 16 * j + 2 * (lane % 4);
#pragma unroll
    for (uint half_of = 0; half_of < 2; half_of++) {
        const uint column = s + 8 * half_of;
        z[half_of] *= (float4)(rows->weights[r][bit_length(r ^ column)], rows->weights[r][bit_length(r ^ (column + 1))],
                               rows->weights[r + 8][bit_length((r + 8) ^ column)],
                               rows->weights[r + 8][bit_length((r + 8) ^ (column + 1))]);
    }
}

/* c's columns times x[0..15], and its rows times y[0..15]. */
void scale_tile(float4 c[2], const __local float *x, const __local float *y) {
    const uint lane = warp_lane(), r = lane / 4, p = lane % 4;
#pragma unroll
    for (uint half_of = 0; half_of < 2; half_of++) {
        const float a = x ? x[8 * half_of + 2 * p] : 1.0f, b = x ? x[8 * half_of + 2 * p + 1] : 1.0f;
        const float upper = y ? y[r] : 1.0f, lower = y ? y[r + 8] : 1.0f;
        c[half_of] *= (float4)(a * upper, b * upper, a * lower, b * lower);
    }
}

/* A tile of the chunk's map, and its transpose where there is to be one. */
void put_map_tile(__global uint4 *map, uint at, uint transpose_at, uint4 x) {
    map[at + warp_lane()] = x;
#if BACKWARD
    map[transpose_at + warp_lane()] = transpose_tile(x);
#endif
}

/* K_START of 16 tokens. */
void store_start(__global uint4 *map, const __local uint4 *keys, const __local chunk_rows *rows, uint i) {
    for (uint step = 0; step < STEPS; step++) {
        float4 c[2];
        unround_tile(c, load_tile(keys + 16 * i * KEY_ROW + 2 * step, KEY_ROW));
        scale_tile(c, 0, rows->start + 16 * i);
        scale_tile(c, 0, rows->norms[1] + 16 * i);
        put_map_tile(map, START_AT + (i * STEPS + step) * 32, START_T_AT + (step * TOKENS + i) * 32, round_tile(c));
    }
}

/* MZ and READ = exp(a) Q - Z K_START of 16 tokens. */
void store_read(__global uint4 *map, const __local uint4 *products, const __local uint4 *t, const __local uint4 *queries,
                const __local uint4 *keys, const __local chunk_rows *rows, uint i) {
    const uint lane = warp_lane();
    uint4 z_start[TOKENS];
#pragma unroll
    for (uint j = 0; j < TOKENS; j++) {
        if (j <= i) {
            float4 z[2] = {(float4)(0.0f), (float4)(0.0f)}, own[2];
            for (uint s = j; s <= i; s++) {
                add_product(z, products[lower_tile(i, s) * 32 + lane],
                            load_tile(t + 16 * j * SQUARE_ROW + 2 * s, SQUARE_ROW));
            }
            own[0] = z[0];
            own[1] = z[1];
            weigh_tile(own, rows, i, j);
            map[OWN_AT + lower_tile(i, j) * 32 + lane] = BACKWARD ? transpose_tile(round_tile(own)) : round_tile(own);
            scale_tile(z, rows->start + 16 * j, 0);
            scale_tile(z, rows->norms[1] + 16 * j, 0);
            z[0] = -z[0];
            z[1] = -z[1];
            z_start[j] = round_tile(z);
        }
    }
    for (uint step = 0; step < STEPS; step++) {
        float4 read[2];
        unround_tile(read, load_tile(queries + 16 * i * KEY_ROW + 2 * step, KEY_ROW));
        scale_tile(read, 0, rows->norms[0] + 16 * i);
        scale_tile(read, 0, rows->start + 16 * i);
#pragma unroll
        for (uint j = 0; j < TOKENS; j++) {
            if (j <= i) {
                add_product(read, z_start[j], load_tile_transposed(keys + 16 * j * KEY_ROW + 2 * step, KEY_ROW));
            }
        }
        put_map_tile(map, READ_AT + (i * STEPS + step) * 32, READ_T_AT + (step * TOKENS + i) * 32, round_tile(read));
    }
}

/* WRITE^T = K_END^T T of 16 rows of K. */
void store_write(__global uint4 *map, const __local uint4 *t_end, const __local uint4 *keys, uint step) {
    uint4 key[TOKENS];
#pragma unroll
    for (uint r = 0; r < TOKENS; r++) {
        key[r] = load_tile_transposed(keys + 16 * r * KEY_ROW + 2 * step, KEY_ROW);
    }
#pragma unroll
    for (uint s = 0; s < TOKENS; s++) {
        float4 write[2] = {(float4)(0.0f), (float4)(0.0f)};
#pragma unroll
        for (uint r = s; r < TOKENS; r++) {
            add_product(write, key[r], load_tile(t_end + 16 * s * SQUARE_ROW + 2 * r, SQUARE_ROW));
        }
        put_map_tile(map, WRITE_T_AT + (step * TOKENS + s) * 32, WRITE_AT + (s * STEPS + step) * 32, round_tile(write));
    }
}

/* A work-group takes a chunk of a sequence and head. */
__kernel __attribute__((reqd_work_group_size(ND_PREPARE_ITEMS, 1, 1))) void
nvidia_delta_prepare(const loglin_delta_call call, __global float *ws, ulong ws_offset, const __global ushort *q,
                     ulong q_offset, const __global ushort *k, ulong k_offset, const __global float *g, ulong g_offset,
                     const __global weight *level_scales, ulong level_scales_offset, const __global weight *beta,
                     ulong beta_offset, uint aligned) {
    __local uint4 queries[ND_CHUNK * KEY_ROW], keys[ND_CHUNK * KEY_ROW];
    __local float4 x[ND_CHUNK * SOLVE_ROW];
    __local uint4 t[ND_CHUNK * SQUARE_ROW], t_end[ND_CHUNK * SQUARE_ROW];
    __local uint4 products[LOWER_TILES * 32];
    __local chunk_rows rows;
    const uint item = get_local_id(0), warp = item / 32;
    const chunk_place at = find_chunk(call, get_group_id(0));
    __global uint4 *map = find_map(call, ws, ws_offset, at.id);
    fetch_keys(queries, q + q_offset, &at, aligned);
    fetch_keys(keys, k + k_offset, &at, aligned);
    if (warp == 0) {
        scan_gates(rows.gates, g ? g + g_offset + at.row : 0, at.count);
    }
    wait_for_copies();
    barrier(CLK_LOCAL_MEM_FENCE);
    level_scales += level_scales_offset + at.row * LEVELS;
    find_rows(&rows, call, queries, keys, beta + beta_offset + at.row, level_scales, at.count);
    barrier(CLK_LOCAL_MEM_FENCE);
    store_rows(find_weights(call, ws, ws_offset, at.id), &rows, level_scales, at.count);
    make_products((__local float *)x, products, queries, keys, &rows, warp);
    barrier(CLK_LOCAL_MEM_FENCE);
    if (item < ND_CHUNK) {
        float4 y[ND_CHUNK / 4];
        solve_column(y, x, rows.beta, item);
        store_column(t, t_end, y, &rows, item);
    } else {
        store_start(map, keys, &rows, warp - 2);
        store_start(map, keys, &rows, warp);
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    store_read(map, products, t, queries, keys, &rows, warp);
    for (uint step = warp; step < STEPS; step += ND_PREPARE_ITEMS / 32) {
        store_write(map, t_end, keys, step);
    }
}
