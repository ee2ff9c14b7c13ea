/* SPDX-License-Identifier: Apache-2.0 */
/* The scalar-gated backward pass, see nvidia_backward.cl: what is inside a chunk and behind it. */

/* ---- tiles ------------------------------------------------------------------------------------------------------- */

/*
 * A work-group has a chunk and goes through heads.  Inside the chunk there are three products of 64 keys and 64 queries, one
 * for each warpgroup: of the chunk's first tile, of its second one, and of the first one's keys with the second one's queries.
 * They are made by warps in blocks of 16 keys and 16 queries, and transposed, a key to a row: (P M)^T lies in local memory as A
 * of its product with dO.  dv adds up in the warpgroup of its tile, a warp has 16 keys.  dk adds up by squares of 64 keys and
 * 64 columns of K: the first two warpgroups have the left square of their keys, the third one both right ones.  What a head
 * takes from memory comes by bulk copies that one item starts; its dv goes back as boxes, from where its v was.
 */

#define CHUNK_ROW (NB_CHUNK + 4) /* of arrays by level and token: neighbours in both directions lie in different banks */
#define CHUNK_TILE (NB_CHUNK * 8) /* uint4 of 64 columns of a chunk's q or k */
#define FETCHING_ITEM 96 /* a warp that has few blocks */
#define QUERY_DOTS 12
#define SQUARE_GROUPS (NV_K > 64 ? 3 : 2) /* warpgroups that have squares of dk */
#define TOKEN_SCALES (SCALE_BOXES ? BOX_SCALES : NB_SCALES) /* from a token's level scales to the next one's */
#define ROW_STEP (NB_TILE_ITEMS / (8 * TILES_V)) /* rows of v that are fetched at once */

/* Two neighbouring numbers. */
float2 pair_at(const __local float *x) { return *(const __local float2 *)x; }

/* Adds two numbers of each of the row's items up over the warp's keys: items whose lane / 4 has bit 2 get the second one. */
float sum_two(uint lane, float first, float second) {
    const int high = (lane & 16) != 0;
    float sum = high ? second : first;
    sum += as_float(shuffle_xor(as_uint(high ? first : second), 16));
    sum += as_float(shuffle_xor(as_uint(sum), 8));
    return sum + as_float(shuffle_xor(as_uint(sum), 4));
}

/* Adds sums of 16 queries up over a warp's keys, and writes them. */
void store_sums(uint lane, __local float *to, const float sums[4]) {
    const int high = (lane & 16) != 0, odd = (lane & 8) != 0;
    const float left = (high ? sums[2] : sums[0]) + as_float(shuffle_xor(as_uint(high ? sums[0] : sums[2]), 16));
    const float right = (high ? sums[3] : sums[1]) + as_float(shuffle_xor(as_uint(high ? sums[1] : sums[3]), 16));
    float sum = odd ? right : left;
    sum += as_float(shuffle_xor(as_uint(odd ? left : right), 8));
    sum += as_float(shuffle_xor(as_uint(sum), 4));
    if ((lane & 4) == 0) {
        to[lane / 16 * 8 + lane % 4 * 2 + lane / 8 % 2] = sum;
    }
}

/* A warp's sums for its keys. */
void store_key_dots(uint lane, __local float *to, float2 dots) {
    dots = (float2)(sum_quad(dots.x), sum_quad(dots.y));
    if (lane % 4 == 0) {
        to[lane / 4] = dots.x;
        to[lane / 4 + 8] = dots.y;
    }
}

void add_key_dots(uint lane, __local float *to, float2 dots) {
    dots = (float2)(sum_quad(dots.x), sum_quad(dots.y));
    if (lane % 4 == 0) {
        to[lane / 4] += dots.x;
        to[lane / 4 + 8] += dots.y;
    }
}

/*
 * A key's sixteen and a query's: dS^T in, (P M)^T out as A.  Adds to d(q k^T)^T, adds the shares of dO . o of the
 * item's queries to its two keys' `key_dots`, and sums over these keys for each of its four queries, without level scales.
 */
uint4 weigh_far(const float4 ds[2], uint4 product, float4 dp[2], const float2 query_weight[2],
                const float2 query_scale[2], float2 key_weight, float2 *key_dots, float sums[4]) {
    const float2 p[4] = {unpack(product.x), unpack(product.y), unpack(product.z), unpack(product.w)};
    uint a[4];
#pragma unroll
    for (uint i = 0; i < 2; i++) {
        const float2 weights = query_weight[i] * query_scale[i];
        const float2 upper = p[2 * i] * key_weight.x, lower = p[2 * i + 1] * key_weight.y;
        const float2 shares = (ds[i].xy * upper + ds[i].zw * lower) * query_weight[i];
        sums[2 * i] = shares.x;
        sums[2 * i + 1] = shares.y;
        dp[i].xy += ds[i].xy * (weights * key_weight.x);
        dp[i].zw += ds[i].zw * (weights * key_weight.y);
        const float2 w_upper = upper * weights, w_lower = lower * weights;
        key_dots->x = fma(ds[i].x, w_upper.x, fma(ds[i].y, w_upper.y, key_dots->x));
        key_dots->y = fma(ds[i].z, w_lower.x, fma(ds[i].w, w_lower.y, key_dots->y));
        a[2 * i] = pack(w_upper.x, w_upper.y);
        a[2 * i + 1] = pack(w_lower.x, w_lower.y);
    }
    return (uint4)(a[0], a[1], a[2], a[3]);
}

/* The diagonal: keys and queries are the same 16 tokens.  dots: [level][query]; scales: [query][level]. */
uint4 weigh_near(uint lane, const float4 ds[2], uint4 product, float4 dp[2], const __local float2 *gates,
                 const __local stored_scale *scales, float2 *key_dots, __local float *dots) {
    const uint r = lane / 4, p = lane % 4;
    const float2 products[4] = {unpack(product.x), unpack(product.y), unpack(product.z), unpack(product.w)};
    const float2 keys[2] = {gates[r], gates[r + 8]};
    float w[8], x[4], sums[2];
#pragma unroll
    for (uint half_q = 0; half_q < 2; half_q++) {
#pragma unroll
        for (uint e = 0; e < 2; e++) {
            const uint t = 8 * half_q + 2 * p + e;
            const float2 query = gates[t];
            const float scale = scale_of(scales[TOKEN_SCALES * t + bit_length(r ^ (2 * p + e))]);
            /* The keys of the same eight, up to the query. */
            const float near_ds = half_q == 0 ? (e == 0 ? ds[0].x : ds[0].y) : (e == 0 ? ds[1].z : ds[1].w);
            const float near_product = half_q == 0 ? (e == 0 ? products[0].x : products[0].y)
                                                   : (e == 0 ? products[3].x : products[3].y);
            const float since = (query.x - keys[half_q].x) + (query.y - keys[half_q].y);
            const float kept = decay(r <= 2 * p + e ? since : -INFINITY);
            const float near_weight = near_product * kept * scale, near_gradient = near_ds * kept * scale;
            x[2 * half_q + e] = near_ds * near_product * kept;
            if (half_q == 0) {
                key_dots->x = fma(near_ds, near_weight, key_dots->x);
                w[e] = near_weight;
                w[2 + e] = 0.0f;
                dp[0] += e == 0 ? (float4)(near_gradient, 0.0f, 0.0f, 0.0f) : (float4)(0.0f, near_gradient, 0.0f, 0.0f);
            } else {
                /* The eight before. */
                const float far_ds = e == 0 ? ds[1].x : ds[1].y;
                const float far_product = e == 0 ? products[2].x : products[2].y;
                const float far_kept = decay_between(query, keys[0]);
                const float far_scale = scale_of(scales[TOKEN_SCALES * t + 4]);
                const float far_gradient = far_ds * far_kept * far_scale;
                sums[e] = far_ds * far_product * far_kept;
                w[4 + e] = far_product * far_kept * far_scale;
                w[6 + e] = near_weight;
                key_dots->x = fma(far_ds, w[4 + e], key_dots->x);
                key_dots->y = fma(near_ds, near_weight, key_dots->y);
                dp[1] += e == 0 ? (float4)(far_gradient, 0.0f, near_gradient, 0.0f)
                                : (float4)(0.0f, far_gradient, 0.0f, near_gradient);
            }
        }
    }
    /* Over the keys at distance 0, 1, 2-3, 4-7 (exclusive or) from the item's own row of eight; of use where that
     * is the query. */
    float one[4], pair[4], two[4], four[4];
#pragma unroll
    for (uint i = 0; i < 4; i++) {
        one[i] = as_float(shuffle_xor(as_uint(x[i]), 4));
        pair[i] = x[i] + one[i];
    }
#pragma unroll
    for (uint i = 0; i < 4; i++) {
        two[i] = as_float(shuffle_xor(as_uint(pair[i]), 8));
    }
#pragma unroll
    for (uint i = 0; i < 4; i++) {
        four[i] = as_float(shuffle_xor(as_uint(pair[i] + two[i]), 16));
    }
    if (r / 2 == p) {
        const int odd = (r & 1) != 0;
#pragma unroll
        for (uint i = 0; i < 2; i++) {
            __local float *own = dots + 8 * i + r;
            own[0] = odd ? x[2 * i + 1] : x[2 * i];
            own[CHUNK_ROW] = odd ? one[2 * i + 1] : one[2 * i];
            own[2 * CHUNK_ROW] = odd ? two[2 * i + 1] : two[2 * i];
            own[3 * CHUNK_ROW] = odd ? four[2 * i + 1] : four[2 * i];
        }
    }
    const float sum = sum_two(lane, sums[0], sums[1]);
    if ((r & 3) == 0) {
        dots[4 * CHUNK_ROW + 8 + 2 * p + r / 4] = sum;
    }
    return (uint4)(pack(w[0], w[1]), pack(w[2], w[3]), pack(w[4], w[5]), pack(w[6], w[7]));
}

/* Puts a sixteen of keys by queries, as A, into a tile of keys' rows. */
void store_a(uint lane, __local uint4 *tile, uint4 a, uint key, uint query) {
    const uint row = key + lane / 4, at = (4 * swizzled(row, 8, 0) + lane % 4) ^ (query / 2);
    __local uint *left = (__local uint *)tile + at, *right = (__local uint *)tile + (at ^ 4);
    left[0] = a.x;
    left[8 * 32] = a.y;
    right[0] = a.z;
    right[8 * 32] = a.w;
}

/* A block of d(q k^T)^T. */
void store_gradients(uint lane, __local uint4 *tile, const float4 dp[2], float scale, uint keys, uint queries) {
    const float4 left = dp[0] * scale, right = dp[1] * scale;
    store_a(lane, tile, (uint4)(pack(left.x, left.y), pack(left.z, left.w), pack(right.x, right.y), pack(right.z, right.w)),
            16 * keys, 16 * queries);
}

void store_rows(__global float *to, const float4 sum[8]) {
    to += (ulong)(get_local_id(0) / 32 % 4 * 16 + warp_lane() / 4) * NV_K + 2 * (warp_lane() % 4);
#pragma unroll
    for (uint i = 0; i < 8; i++) {
        *(__global float2 *)(to + 8 * i) = sum[i].xy;
        *(__global float2 *)(to + 8 * NV_K + 8 * i) = sum[i].zw;
    }
}

/* Four eights of columns of rows r and r + 8: the item p of a row's four gets the eight p. */
uint4 upper_piece(const float4 c[4]) {
    return transpose_quad(
        (uint4)(pack(c[0].x, c[0].y), pack(c[1].x, c[1].y), pack(c[2].x, c[2].y), pack(c[3].x, c[3].y)));
}

uint4 lower_piece(const float4 c[4]) {
    return transpose_quad(
        (uint4)(pack(c[0].z, c[0].w), pack(c[1].z, c[1].w), pack(c[2].z, c[2].w), pack(c[3].z, c[3].w)));
}

void store_piece(__global ushort *to, uint4 x, int aligned) {
    if (aligned) {
        *(__global uint4 *)to = x;
    } else {
#pragma unroll 1
        for (uint i = 0; i < 4; i++) {
            to[2 * i] = (ushort)x.x;
            to[2 * i + 1] = (ushort)(x.x >> 16);
            x = x.yzwx;
        }
    }
}

/* The warp's 16 rows of dv, of which `rows` are there behind the item's first one; `to` is that one's. */
void store_columns(uint lane, __global ushort *to, const float4 c[8], int rows, int columns, int aligned) {
    const int column = 8 * (int)(lane % 4);
    const uint4 pieces[4] = {upper_piece(c), upper_piece(c + 4), lower_piece(c), lower_piece(c + 4)};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (rows > i / 2 * 8 && column + i % 2 * 32 < columns) {
            store_piece(to + (ulong)(i / 2 * 8) * (HEADS * DIM_V) + column + i % 2 * 32, pieces[i], aligned);
        }
    }
}

/* Starts copying a chunk's rows of q or k, 64 columns after the other. */
void fetch_chunk(__local uint4 *to, const __global uint4 *from) {
#pragma unroll 1
    for (uint i = get_local_id(0); i < NB_CHUNK * K_PIECES; i += NB_TILE_ITEMS) {
        const uint row = i / K_PIECES, piece = i % K_PIECES;
        copy_16(&to[piece / 8 * CHUNK_TILE + swizzled(row, 8, piece % 8)], &from[i], 1);
    }
}

/* What a head takes from memory. */
typedef struct tile_inputs {
    uint4 v[TILES_V][CHUNK_TILE], d_o[TILES_V][CHUNK_TILE], adjoint[TILES_V][STATE];
    float2 gates[NB_CHUNK];
    float factors[4][NB_CHUNK];
} tile_inputs;

/* The address of an item's row of matrices for 16 rows and columns; those of the columns 16 n.. differ in bits, 32 n. */
uint rows_address(const __local uint4 *tile, uint row, uint piece) {
    return local_address(&tile[swizzled(row, 8, piece)]);
}

/* 16 rows of a tile, as A. */
void load_rows(uint lane, uint4 a[4], const __local uint4 *tile, uint row) {
    const uint address = rows_address(tile, row + lane % 16, lane / 16);
#pragma unroll
    for (uint step = 0; step < 4; step++) {
        a[step] = load_matrices_at(address ^ (32 * step));
    }
}

#if WGMMA
/* Rounds 16 rows to a tile. */
void store_rows_of(uint lane, __local uint4 *tile, const float4 c[8]) {
    const uint address = rows_address(tile, lane % 16, lane / 16);
#pragma unroll
    for (uint step = 0; step < 4; step++) {
        const float4 left = c[2 * step], right = c[2 * step + 1];
        store_matrices_at(address ^ (32 * step), (uint4)(pack(left.x, left.y), pack(left.z, left.w),
                                                         pack(right.x, right.y), pack(right.z, right.w)));
    }
}
#endif

/* v dO^T of 16 keys and 16 queries. */
void multiply_values(uint lane, float4 ds[2], const __local tile_inputs *in, uint key, uint query) {
    ds[0] = ds[1] = (float4)(0.0f);
#pragma unroll
    for (uint i = 0; i < TILES_V; i++) {
        const uint keys = rows_address(in->v[i], key + lane % 16, lane / 16);
        const uint queries = rows_address(in->d_o[i], query + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
        for (uint step = 0; step < 4; step++) {
            const uint4 a = load_matrices_at(keys ^ (32 * step)), b = load_matrices_at(queries ^ (32 * step));
            mma(&ds[0], a, b.x, b.y);
            mma(&ds[1], a, b.z, b.w);
        }
    }
}

/* Decays rows to a chunk's end, as states are. */
void scale_tile(uint4 a[4], const __local float *decays) {
    const float upper = decays[0] * STATE_UNIT, lower = decays[8] * STATE_UNIT;
#pragma unroll
    for (uint step = 0; step < 4; step++) {
        a[step] = scale_rows(a[step], pack(upper, upper), pack(lower, lower));
    }
}

/* Starts sum = K A. */
void multiply_keys(float4 sum[8], const __local uint4 *keys, const __local uint4 *adjoint) {
    tile_clear(sum);
#pragma unroll
    for (uint j = 0; j < NV_K / 64; j++) {
        tile_multiply_local(sum, tile_at(keys + j * CHUNK_TILE), tile_at(adjoint + j * COLUMN_TILE));
    }
}

/* Adds a tile of d(q k^T)^T, transposed, times keys. */
void add_queries(float4 sum[8], const __local uint4 *gradients, const __local uint4 *keys) {
    uint4 a[4];
#pragma unroll
    for (uint step = 0; step < 4; step++) {
        a[step] = load_a_transposed(gradients, 8, 16 * step, get_local_id(0) / 32 % 4 * 2);
    }
    tile_multiply(sum, a, tile_at(keys));
    tile_wait(sum);
}

/* Adds the same, as it is, times queries. */
void add_keys(float4 sum[8], const __local uint4 *gradients, const __local uint4 *queries) {
    tile_multiply_local(sum, tile_at(gradients), tile_at(queries));
    tile_wait(sum);
}

/* Starts copying a chunk's rows of v and dO; missing ones, and missing columns, become zeros. */
void fetch_both(__local uint4 *to_v, __local uint4 *to_d_o, const __global ushort *v, const __global ushort *d_o,
                  int rows, uint item, int aligned) {
    const uint piece = item % (8 * TILES_V), first_row = item / (8 * TILES_V);
    const ulong first = (ulong)first_row * (HEADS * DIM_V) + 8 * piece;
    const int has_columns = 8 * piece < DIM_V;
    if (aligned) {
        v += first;
        d_o += first;
#pragma unroll
        for (uint i = 0; i < (NB_CHUNK + ROW_STEP - 1) / ROW_STEP; i++) {
            const uint row = first_row + i * ROW_STEP, to = piece / 8 * CHUNK_TILE + swizzled(row, 8, piece % 8);
            const int wanted = has_columns && (int)row < rows;
            if (row < NB_CHUNK) {
                copy_16(&to_v[to], v + i * (ROW_STEP * HEADS * DIM_V), wanted);
                copy_16(&to_d_o[to], d_o + i * (ROW_STEP * HEADS * DIM_V), wanted);
            }
        }
        return;
    }
#pragma unroll 1
    for (uint i = 0; i < 2 * NB_CHUNK; i += ROW_STEP) {
        const uint row = (first_row + i) % NB_CHUNK, is_d_o = first_row + i >= NB_CHUNK;
        if (first_row + i < 2 * NB_CHUNK) {
            const __global ushort *x = (is_d_o ? d_o : v) + (ulong)row * (HEADS * DIM_V) + 8 * piece;
            uint4 values = (uint4)(0);
            if (has_columns && (int)row < rows) {
                values = load_piece(x);
            }
            (is_d_o ? to_d_o : to_v)[piece / 8 * CHUNK_TILE + swizzled(row, 8, piece % 8)] = values;
        }
    }
}

/*
 * Sums of a head, written level scales' gradients: by query, a level's parts one after the other, and by key; `last`: of a
 * tile's first keys and last queries.
 */
typedef struct tile_dots {
    float queries[QUERY_DOTS * CHUNK_ROW], keys[3][NB_TILE], last[2][16];
} tile_dots __attribute__((aligned(8)));

/* Where a work-group's inputs and outputs start, of its first head: not in registers, of which there are few. */
typedef struct tile_place {
    const __global ushort *v, *d_o;
    const __global weight *level_scales;
    const __global uint4 *gates, *factors, *adjoints, *queries;
    __global ushort *dv;
    __global weight *dlevel_scales;
    __global float *dots, *query_parts, *key_parts;
#if WGMMA
    const __global heads_map *maps;
#endif
    uint sequence, first, first_head;
    ulong padded, adjoint_stride; /* tokens of a head; uint4 of a head's tile of V */
    int rows;                     /* tokens of the chunk */
} tile_place;

/*
 * A block of 16 keys and 16 queries behind them: its v dO^T is weighed, to `weights`.  Adds to d(q k^T)^T and to the keys'
 * dots, and writes the queries' sums.  scales: of the block's level.
 */
void add_block(uint lane, const float4 ds[2], uint key, uint query, uint4 product, float4 dp[2],
               const float2 query_weight[2], const __local stored_scale *scales, float2 key_weight, float2 *key_dots,
               __local uint4 *weights, __local float *queries) {
    float2 query_scale[2];
    float sums[4];
#pragma unroll
    for (uint e = 0; e < 2; e++) {
        const __local stored_scale *own = scales + TOKEN_SCALES * (query + 8 * e + 2 * (lane % 4));
        query_scale[e] = (float2)(scale_of(own[0]), scale_of(own[TOKEN_SCALES]));
    }
    const uint4 a = weigh_far(ds, product, dp, query_weight, query_scale, key_weight, key_dots, sums);
    store_a(lane, weights, a, key % NB_TILE, query % NB_TILE);
    store_sums(lane, queries + query, sums);
}

/*
 * The first tile's keys with the second one's queries: a warp has 16 keys.  A block's v dO^T is made while the one before is
 * weighed.
 */
void add_across(uint lane, uint own, const __local tile_inputs *in, const __local uint4 *products, float4 gradients[8],
                const __local stored_scale *scales, __local uint4 *weights, __local tile_dots *dots) {
    const uint key = 16 * own, r = lane / 4;
    const float2 key_weight = (float2)(in->factors[2][key + r], in->factors[2][key + r + 8]);
    float2 key_dots = (float2)(0.0f);
    float4 ds[2][2];
    multiply_values(lane, ds[0], in, key, NB_TILE);
#pragma unroll
    for (uint i = 0; i < 4; i++) {
        const uint query = NB_TILE + 16 * i;
        if (i < 3) {
            multiply_values(lane, ds[(i + 1) % 2], in, key, query + 16);
        }
        const __local float *factors = &in->factors[2][query + 2 * (lane % 4)];
        const float2 query_weight[2] = {pair_at(factors), pair_at(factors + 8)};
        add_block(lane, ds[i % 2], key, query, products[own * 128 + i * 32 + lane], gradients + 2 * i, query_weight,
                  scales + 7, key_weight, &key_dots, weights, dots->queries + (8 + own) * CHUNK_ROW);
    }
    store_key_dots(lane, dots->keys[2] + key, key_dots);
}

/*
 * Inside a tile, of ten blocks of 16 keys and 16 queries, a warp has the diagonal's `sixteen`, and one or two more.  In the two
 * tiles these are different ones, so that all schedulers have equally many.
 */
uint sixteen_of(uint part, uint own) { return part == 1 ? 3 - own : own; }
uint next_keys(uint sixteen) { return sixteen == 3 ? 0 : sixteen; }
uint next_queries(uint sixteen) { return sixteen == 3 ? 3 : sixteen + 1; }

void add_behind(uint lane, const float4 ds[2], uint tile, uint keys, uint queries, const __local tile_inputs *in,
                const __local uint4 *products, float4 dp[2], const __local stored_scale *scales, float2 *key_dots,
                __local uint4 *weights, __local tile_dots *dots) {
    const uint key = NB_TILE * tile + 16 * keys, query = NB_TILE * tile + 16 * queries, r = lane / 4;
    const uint level = 4 + bit_length(keys ^ queries), slot = level == 5 ? 5 : 6 + keys;
    const float between = decay_between(in->gates[query - 1], in->gates[key + 15]);
    const __local float *factors = &in->factors[0][query + 2 * (lane % 4)];
    const float2 query_weight[2] = {pair_at(factors) * between, pair_at(factors + 8) * between};
    const float2 key_weight = (float2)(in->factors[1][key + r], in->factors[1][key + r + 8]);
    add_block(lane, ds, key, query, products[keys * 128 + queries * 32 + lane], dp, query_weight, scales + level,
              key_weight, key_dots, weights, dots->queries + slot * CHUNK_ROW);
}

void add_inside(uint lane, uint tile, uint sixteen, const __local tile_inputs *in, const __local uint4 *products,
                float4 gradients[8], const __local stored_scale *scales, __local uint4 *weights, __local tile_dots *dots) {
    const uint first = NB_TILE * tile, token = first + 16 * sixteen;
    float4 near[2], next[2];
    float2 key_dots = (float2)(0.0f), next_dots = key_dots;
    multiply_values(lane, near, in, token, token);
    multiply_values(lane, next, in, first + 16 * next_keys(sixteen), first + 16 * next_queries(sixteen));
    const uint4 a = weigh_near(lane, near, products[sixteen * 160 + lane], gradients, in->gates + token,
                               scales + TOKEN_SCALES * token, &key_dots, dots->queries + token);
    store_a(lane, weights, a, 16 * sixteen, 16 * sixteen);
    if (sixteen < 2) {
        multiply_values(lane, near, in, token, token + 32);
    }
    add_behind(lane, next, tile, next_keys(sixteen), next_queries(sixteen), in, products, gradients + 2, scales,
               &next_dots, weights, dots);
    if (sixteen < 2) {
        add_behind(lane, near, tile, sixteen, sixteen + 2, in, products, gradients + 4, scales, &next_dots, weights, dots);
    }
    if (sixteen == 3) {
        store_key_dots(lane, dots->last[tile], next_dots);
    } else {
        key_dots += next_dots;
    }
    store_key_dots(lane, dots->keys[tile] + 16 * sixteen, key_dots);
}

/* Where a head's level scales start. */
const __local stored_scale *scales_of(const __local stored_scale scales[TILE_STAGES + 1][TOKEN_SCALES * NB_CHUNK],
                                      const __local tile_place *at, int h, int boxes) {
    return scales[h % (TILE_STAGES + 1)] + (boxes ? (at->first_head + h) * LEVELS % SCALE_PIECE : 0);
}

/*
 * The gradients of the level scales, and what is summed up for dg.  A warp has 32 tokens, an item a level of eight of these, so
 * that neighbours write next to each other; then it has the sum of one token.
 */
void finish_head(const __local tile_dots *dots, const __local stored_scale *scales, const __local tile_place *at, uint h,
                 uint warp, uint lane) {
    const uint level = lane % 8, first = 32 * warp + lane / 8, slot = level < 7 ? level : 8;
    const __local float *x = dots->queries + slot * CHUNK_ROW + first;
    const __local stored_scale *scale = scales + TOKEN_SCALES * first + level;
    const int rows = at->dlevel_scales && level < LEVELS ? at->rows - (int)first : 0;
    __global weight *to = at->dlevel_scales + (rows > 0 ? first * (HEADS * LEVELS) + h * LEVELS + level : 0);
    float shares[8];
#pragma unroll
    for (uint i = 0; i < 8; i++) {
        float gradient = x[4 * i];
        if (level >= 6) {
            gradient += x[4 * i + CHUNK_ROW];
        }
        if (warp >= 2 && level == 7) {
            gradient += x[4 * i + 2 * CHUNK_ROW] + x[4 * i + 3 * CHUNK_ROW];
        }
        gradient = level < 4 || ((first + 4 * i) >> (level - 1) & 1) != 0 ? gradient : 0.0f;
        shares[i] = gradient * scale_of(scale[4 * TOKEN_SCALES * i]);
        if ((int)(4 * i) < rows) {
            store_weight(to + i * (4 * HEADS * LEVELS), 0, gradient);
        }
    }
#pragma unroll
    for (uint width = 4; width > 0; width /= 2) {
        const int high = (level & width) != 0;
#pragma unroll
        for (uint i = 0; i < width; i++) {
            const float left = shares[i], right = shares[i + width];
            shares[i] = (high ? right : left) + as_float(shuffle_xor(as_uint(high ? left : right), width));
        }
    }
    const uint row = first + 4 * level, tile = row / NB_TILE;
    at->dots[h * at->padded + row] = shares[0] - dots->keys[tile][row % NB_TILE] -
                                     (row % NB_TILE < 16 ? dots->last[tile][row % NB_TILE] : 0.0f) -
                                     (tile == 0 ? dots->keys[2][row] : 0.0f);
}

__kernel __attribute__((reqd_work_group_size(NB_TILE_ITEMS, 1, 1))) void
nb_tiles(const loglin_nvidia_gradients call, __global float *ws, ulong ws_offset, const __global ushort *v,
         ulong v_offset, const __global ushort *d_o, ulong d_o_offset, const __global weight *level_scales,
         ulong level_scales_offset, __global ushort *dv, ulong dv_offset, __global weight *dlevel_scales,
         ulong dlevel_scales_offset, uint aligned) {
    __local tile_inputs inputs[TILE_STAGES] __attribute__((aligned(1024)));
    __local uint4 keys[NV_K / 64 * CHUNK_TILE] __attribute__((aligned(1024)));
    __local uint4 products[3][COLUMN_TILE] __attribute__((aligned(1024))); /* q k^T, in the order of its items */
    __local uint4 weights[3][COLUMN_TILE] __attribute__((aligned(1024))); /* (P M)^T */
    /* Of the head that is fetched, worked on, and finished; the first two are one where there is room for one head only. */
    __local stored_scale scales_at[TILE_STAGES + 1][TOKEN_SCALES * NB_CHUNK] __attribute__((aligned(128)));
    __local tile_dots dots_at[TILE_STAGES];
#if WGMMA
    __local arrivals here[TILE_STAGES];
#endif
    uint item = get_local_id(0), lane = item % 32;
    uint warp = same_in_warp(item / 32), part = warp / 4, own = warp % 4;
    /* Where the warpgroup's keys and queries start. */
    uint key_tile = part == 1 ? COLUMN_TILE : 0, query_tile = part == 0 ? 0 : COLUMN_TILE;
    const ulong id = get_group_id(0), padded = (ulong)call.chunks * NB_CHUNK;
    const uint block = id % HEAD_BLOCKS, group = id / HEAD_BLOCKS % GROUPS,
               b = id / (HEAD_BLOCKS * GROUPS) % call.batch;
    const uint n = call.chunks - 1 - id / (HEAD_BLOCKS * GROUPS) / call.batch;
    const uint first = n * NB_CHUNK, first_head = group * GROUP_HEADS + block * BLOCK_HEADS;
    const int has_adjoint = n + 1 < call.chunks;
    const ulong bg = (ulong)b * GROUPS + group;
    const int boxes = WGMMA && (aligned & 1), scale_boxes = SCALE_BOXES && (aligned & 4);
    __local uint4 *queries = inputs[TILE_STAGES - 1].v[0]; /* before and behind all heads */

    __local tile_place place_of_group;
    const __local tile_place *at = &place_of_group;
    if (item == 0) {
        const ulong bh = (ulong)b * HEADS + first_head, tokens = bh * padded + first;
        const ulong row = ((ulong)b * call.length + first) * HEADS + first_head;
        const ulong parts = (((ulong)block * call.batch * GROUPS + bg) * padded + first) * NV_K;
        place_of_group = (tile_place){
            v + v_offset + row * DIM_V,
            d_o + d_o_offset + row * DIM_V,
            level_scales + level_scales_offset + row * LEVELS,
            (const __global uint4 *)place(ws, ws_offset, call.gates) + tokens / 2,
            (const __global uint4 *)place(ws, ws_offset, call.factors) + tokens,
            (const __global uint4 *)place(ws, ws_offset, call.adjoints) + (bh * TILES_V * call.chunks + n) * STATE,
            (const __global uint4 *)place(ws, ws_offset, call.queries) + (bg * padded + first) * K_PIECES,
            dv + dv_offset + row * DIM_V,
            dlevel_scales ? dlevel_scales + dlevel_scales_offset + row * LEVELS : dlevel_scales,
            (__global float *)place(ws, ws_offset, call.dots) +
                (NB_DOTS - 1) * (ulong)call.batch * HEADS * padded + tokens,
            (__global float *)place(ws, ws_offset, call.query_parts) + parts,
            (__global float *)place(ws, ws_offset, call.key_parts) + parts,
#if WGMMA
            map_of(call, ws, ws_offset, 0),
#endif
            b,
            first,
            first_head,
            padded,
            (ulong)call.chunks * STATE,
            (int)(call.length - first),
        };
    }
#if WGMMA
    if (item == FETCHING_ITEM) {
        for (uint i = 0; i < NB_MAPS; i++) {
            use_map(map_of(call, ws, ws_offset, i));
        }
    }
    if (item < TILE_STAGES) {
        arrivals_start(&here[item], 2 + (has_adjoint ? TILES_V : 0) + (boxes ? 2 * TILES_V : 0) + (scale_boxes ? 1 : 0));
        tile_publish();
    }
#endif
    barrier(CLK_LOCAL_MEM_FENCE);
    fetch_chunk(keys, (const __global uint4 *)place(ws, ws_offset, call.keys) + (bg * padded + first) * K_PIECES);
    fetch_chunk(queries, at->queries);
    /* No query is before its key; nothing comes from behind the last chunk. */
    for (uint i = 0; part < 2 && i < own; i++) {
        store_a(lane, weights[part], (uint4)(0), 16 * own, 16 * i);
    }
    for (uint i = item; !has_adjoint && i < TILE_STAGES * TILES_V * STATE; i += NB_TILE_ITEMS) {
        inputs[i / (TILES_V * STATE)].adjoint[0][i % (TILES_V * STATE)] = (uint4)(0);
    }
    wait_for_copies();
    tile_publish();
    barrier(CLK_LOCAL_MEM_FENCE);
    /* square: of dk; rest: dv of a head, or the third warpgroup's other square. */
    float4 gradients[8], square[8], rest[8];
    tile_clear(rest);
    for (uint i = 0; i < NV_K / 64; i++) {
        tile_multiply_local_transposed(rest, tile_at(keys + i * CHUNK_TILE + key_tile),
                                       tile_at(queries + i * CHUNK_TILE + query_tile));
        tile_wait(rest);
    }
#pragma unroll
    for (uint i = 0; i < 4; i++) {
        const float4 left = rest[2 * i] * call.scale, right = rest[2 * i + 1] * call.scale;
        products[part][own * 128 + i * 32 + lane] =
            (uint4)(pack(left.x, left.y), pack(left.z, left.w), pack(right.x, right.y), pack(right.z, right.w));
    }
    tile_clear(gradients);
    tile_clear(square);
    tile_clear(rest);

    for (int h = 1 - TILE_STAGES; h <= BLOCK_HEADS; h++) {
        /* Fetches head `wanted`, finishes the one before h, and works on h. */
        const uint wanted = (uint)(h + TILE_STAGES - 1);
        item = anew(item);
        warp = anew(warp);
        lane = item % 32;
        part = warp / 4;
        own = warp % 4;
        key_tile = part == 1 ? COLUMN_TILE : 0;
        query_tile = part == 0 ? 0 : COLUMN_TILE;
        const uint r = lane / 4, sixteen = sixteen_of(part, own);
        const uint key = (part == 1 ? NB_TILE : 0) + own * 16; /* in the chunk */
        const int has_work = h >= 0 && h < BLOCK_HEADS;
        __local tile_inputs *in = &inputs[(uint)h % TILE_STAGES];
#if WGMMA
        if (lane == 0) {
            wait_for_stores(); /* of the head before, whose place is taken now */
        }
#endif
        if (TILE_STAGES > 1 && !(boxes && scale_boxes)) {
            wait_for_copies();
            tile_publish();
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        if (wanted < BLOCK_HEADS) {
            __local tile_inputs *to = &inputs[wanted % TILE_STAGES];
            const uint level = item % 8, first_row = item / 8;
            const int rows = at->rows;
            if (!boxes) {
                fetch_both(to->v[0], to->d_o[0], at->v + (ulong)wanted * DIM_V, at->d_o + (ulong)wanted * DIM_V, rows,
                           item, aligned & 1);
            }
            __local stored_scale *to_scales = scales_at[wanted % (TILE_STAGES + 1)];
            if (!scale_boxes) {
                const __global weight *scales_from =
                    at->level_scales + (first_row * (HEADS * LEVELS) + wanted * LEVELS + level);
#pragma unroll
                for (uint i = 0; i < NB_CHUNK; i += NB_TILE_ITEMS / 8) {
                    const uint row = first_row + i;
                    if (row < NB_CHUNK) {
                        fetch_scale(&to_scales[TOKEN_SCALES * row + level], scales_from, i * (HEADS * LEVELS),
                                    (int)row < rows && level < LEVELS);
                    }
                }
            }
#if WGMMA
            if (item == FETCHING_ITEM) {
                __local arrivals *arrived = &here[wanted % TILE_STAGES];
                const uint head = at->first_head + wanted;
                for (uint i = 0; boxes && i < TILES_V; i++) {
                    const uint4 box = (uint4)(at->sequence, at->first, head, i * NB_COLUMNS);
                    copy_box(to->v[i], &at->maps[NB_MAP_V], box, CHUNK_TILE * 16, arrived);
                    copy_box(to->d_o[i], &at->maps[NB_MAP_D_O], box, CHUNK_TILE * 16, arrived);
                }
                if (scale_boxes) {
                    copy_box(to_scales, &at->maps[NB_MAP_SCALES],
                             (uint4)(at->sequence, at->first, 0, head * LEVELS / SCALE_PIECE * SCALE_PIECE),
                             NB_CHUNK * TOKEN_SCALES * sizeof(stored_scale), arrived);
                }
                for (uint i = 0; has_adjoint && i < TILES_V; i++) {
                    copy_bulk(to->adjoint[i], at->adjoints + (wanted * TILES_V + i) * at->adjoint_stride, STATE * 16,
                              arrived);
                }
                copy_bulk(to->gates, at->gates + wanted * at->padded / 2, NB_CHUNK * 8, arrived);
                copy_bulk(to->factors, at->factors + wanted * at->padded, NB_CHUNK * 16, arrived);
            }
#else
            for (uint i = 0; has_adjoint && i < TILES_V; i++) {
                fetch_state(to->adjoint[i], at->adjoints + (wanted * TILES_V + i) * at->adjoint_stride, item,
                            NB_TILE_ITEMS);
            }
            if (item < NB_CHUNK / 2) {
                copy_16(&to->gates[2 * item], at->gates + wanted * at->padded / 2 + item, 1);
            } else if (item >= NB_CHUNK && item < 2 * NB_CHUNK) {
                copy_16((__local uint4 *)to->factors + (item - NB_CHUNK),
                        at->factors + wanted * at->padded + (item - NB_CHUNK), 1);
            }
#endif
        }
        if (h > 0 && part == 2) {
            finish_head(&dots_at[(h - 1) % TILE_STAGES], scales_of(scales_at, at, h - 1, scale_boxes), at, h - 1, own, lane);
        }
        if (TILE_STAGES == 1) {
            wait_for_copies();
            tile_publish();
            barrier(CLK_LOCAL_MEM_FENCE);
        }
        if (!has_work) {
            continue;
        }
#if WGMMA
        arrivals_wait(&here[h % TILE_STAGES], h / TILE_STAGES % 2);
#endif
        __local tile_dots *dots = &dots_at[h % TILE_STAGES];
        const __local stored_scale *scales = scales_of(scales_at, at, h, scale_boxes);
        if (part == 2) {
            add_across(lane, own, in, products[2], gradients, scales, weights[2], dots);
            tile_publish();
            if (NV_K == 64) {
                announce(1, NB_TILE_ITEMS);
            }
            for (uint i = 0; NV_K > 64 && i < TILES_V; i++) {
                const tile_rows adjoint = tile_at(in->adjoint[i] + COLUMN_TILE);
                uint4 upper[4], lower[4];
                load_rows(lane, upper, in->v[i], key);
                load_rows(lane, lower, in->v[i], NB_TILE + key);
                if (i + 1 == TILES_V) {
                    announce(1, NB_TILE_ITEMS);
                }
                scale_tile(upper, in->factors[3] + key + r);
                tile_multiply_transposed(square, upper, adjoint);
                scale_tile(lower, in->factors[3] + NB_TILE + key + r);
                tile_multiply_transposed(rest, lower, adjoint);
                tile_wait(square);
                tile_wait(rest);
            }
        } else {
            add_inside(lane, part, sixteen, in, products[part], gradients, scales, weights[part], dots);
            tile_publish();
            warpgroup_barrier(part + 1);
            const float2 ends = (float2)(in->factors[3][key + r], in->factors[3][key + r + 8]) * STATE_UNIT;
            float2 key_dots = (float2)(0.0f);
            for (uint i = 0; i < TILES_V; i++) {
                uint4 values[4];
                multiply_keys(rest, keys + key_tile, in->adjoint[i]);
                load_rows(lane, values, in->v[i], key);
                tile_wait(rest);
#pragma unroll
                for (uint j = 0; j < 8; j++) {
                    rest[j] *= ends.xxyy;
                    const float2 upper = unpack(j % 2 == 0 ? values[j / 2].x : values[j / 2].z);
                    const float2 lower = unpack(j % 2 == 0 ? values[j / 2].y : values[j / 2].w);
                    key_dots.x = fma(upper.x, rest[j].x, fma(upper.y, rest[j].y, key_dots.x));
                    key_dots.y = fma(lower.x, rest[j].z, fma(lower.y, rest[j].w, key_dots.y));
                }
                scale_tile(values, in->factors[3] + key + r);
                tile_multiply_transposed(square, values, tile_at(in->adjoint[i]));
                tile_multiply_local(rest, tile_at(weights[part]), tile_at(in->d_o[i] + query_tile));
                if (i == 0) {
                    meet(1, NB_TILE_ITEMS); /* the third warpgroup has its weights, and its v */
                }
                if (part == 0) {
                    tile_multiply_local(rest, tile_at(weights[2]), tile_at(in->d_o[i] + COLUMN_TILE));
                }
                tile_wait(rest);
                tile_wait(square);
#if WGMMA
                if (aligned & 2) {
                    __local uint4 *rows = &in->v[i][8 * key]; /* not used any more */
                    store_rows_of(lane, rows, rest);
                    tile_publish();
                    meet_in_warp();
                    if (lane == 0) {
                        store_box(&at->maps[NB_MAP_DV],
                                  (uint4)(at->sequence, at->first + key, at->first_head + h, i * NB_COLUMNS), rows);
                    }
                    continue;
                }
#endif
                store_columns(lane, at->dv + (ulong)(key + r) * (HEADS * DIM_V) + h * DIM_V + i * NB_COLUMNS, rest,
                              at->rows - (int)(key + r), DIM_V - (int)i * NB_COLUMNS, aligned >> 1);
            }
            add_key_dots(lane, dots->keys[part] + 16 * own, key_dots);
        }
    }

    /* What all heads have added up to. */
    barrier(CLK_LOCAL_MEM_FENCE);
    fetch_chunk(queries, at->queries);
    if (part == 2) {
#pragma unroll
        for (uint i = 0; i < 4; i++) {
            store_gradients(lane, products[2], gradients + 2 * i, call.scale, own, i);
        }
    } else {
        const uint sixteen = sixteen_of(part, own);
        for (uint i = 0; i < own; i++) {
            store_a(lane, products[part], (uint4)(0), 16 * own, 16 * i);
        }
        store_gradients(lane, products[part], gradients, call.scale, sixteen, sixteen);
        store_gradients(lane, products[part], gradients + 2, call.scale, next_keys(sixteen), next_queries(sixteen));
        if (sixteen < 2) {
            store_gradients(lane, products[part], gradients + 4, call.scale, sixteen, sixteen + 2);
        }
    }
    wait_for_copies();
    tile_publish();
    barrier(CLK_LOCAL_MEM_FENCE);
    const uint column = part == 2 ? NV_K - 64 : 0;
    const __local uint4 *own_queries = queries + column / 64 * CHUNK_TILE, *own_keys = keys + column / 64 * CHUNK_TILE;
    __global float *to = at->key_parts + column;
    if (part != 1 && part < SQUARE_GROUPS) {
        add_keys(square, products[0], own_queries);
        add_keys(square, products[2], own_queries + COLUMN_TILE);
        store_rows(to, square);
    }
    if (part == 1) {
        add_keys(square, products[1], own_queries + COLUMN_TILE);
        store_rows(to + NB_TILE * NV_K, square);
    }
    if (NV_K > 64 && part == 2) {
        add_keys(rest, products[1], own_queries + COLUMN_TILE);
        store_rows(to + NB_TILE * NV_K, rest);
    }
    to = at->query_parts + column;
    if (part != 1 && part < SQUARE_GROUPS) {
        tile_clear(square);
        add_queries(square, products[0], own_keys);
        store_rows(to, square);
    }
    if (part > 0 && part < SQUARE_GROUPS) {
        tile_clear(square);
        add_queries(square, products[1], own_keys + COLUMN_TILE);
        add_queries(square, products[2], own_keys);
        store_rows(to + NB_TILE * NV_K, square);
    }
}
