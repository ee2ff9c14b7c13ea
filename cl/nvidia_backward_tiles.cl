/* SPDX-License-Identifier: Apache-2.0 */
/* The scalar-gated backward pass, see nvidia_backward.cl: what is inside a chunk and behind it. */

/* ---- tiles ------------------------------------------------------------------------------------------------------- */

/* A warp has 16 keys and 16 queries; it makes transposed products, a key to a row. */

/*
 * A key's sixteen and a query's: dS^T in, (P M)^T out as A.  Adds to d(q k^T)^T, adds the shares of dO . o of the
 * item's queries to its two keys' `key_dots`, and finds sums over these keys for each query, without level scales:
 * `dots` has one for each query, on the diagonal five levels of them.
 */
uint4 weigh_far(float4 ds[2], uint4 product, float4 dp[2], const float query_weight[4], const float query_scale[4],
                const float key_weight[2], float key_dots[2], __local float *dots) {
    const float2 p[4] = {unpack(product.x), unpack(product.y), unpack(product.z), unpack(product.w)};
    uint4 a;
    float sum[4];
#pragma unroll
    for (uint half_q = 0; half_q < 2; half_q++) {
        const float2 decays = (float2)(query_weight[2 * half_q], query_weight[2 * half_q + 1]);
        const float2 scales = (float2)(query_scale[2 * half_q], query_scale[2 * half_q + 1]);
        const float2 upper = decays * key_weight[0], lower = decays * key_weight[1];
        const float2 shares = ds[half_q].xy * p[2 * half_q] * upper + ds[half_q].zw * p[2 * half_q + 1] * lower;
        sum[2 * half_q] = shares.x;
        sum[2 * half_q + 1] = shares.y;
        dp[half_q].xy += ds[half_q].xy * (upper * scales);
        dp[half_q].zw += ds[half_q].zw * (lower * scales);
        const float2 w_upper = p[2 * half_q] * (upper * scales), w_lower = p[2 * half_q + 1] * (lower * scales);
        key_dots[0] = fma(ds[half_q].x, w_upper.x, fma(ds[half_q].y, w_upper.y, key_dots[0]));
        key_dots[1] = fma(ds[half_q].z, w_lower.x, fma(ds[half_q].w, w_lower.y, key_dots[1]));
        if (half_q == 0) {
            a.x = pack(w_upper.x, w_upper.y);
            a.y = pack(w_lower.x, w_lower.y);
        } else {
            a.z = pack(w_upper.x, w_upper.y);
            a.w = pack(w_lower.x, w_lower.y);
        }
    }
    const uint r = warp_lane() / 4;
    float dot_of_query = sum_four(sum, r, 4);
    dot_of_query += as_float(shuffle_xor(as_uint(dot_of_query), 16));
    if (r < 4) {
        dots[8 * (r / 2) + 2 * (warp_lane() % 4) + r % 2] = dot_of_query;
    }
    return a;
}

/* Sums of eight rows' x over those at distance 0, 1, 2-3, 4-7 (exclusive or) from the item's own row. */
float4 sum_distances(float x) {
    const float one = as_float(shuffle_xor(as_uint(x), 4));
    const float pair = x + one;
    const float two = as_float(shuffle_xor(as_uint(pair), 8));
    return (float4)(x, one, two, as_float(shuffle_xor(as_uint(pair + two), 16)));
}

/* The diagonal: keys and queries are the same 16 tokens.  dots: [level][query]. */
uint4 weigh_near(float4 ds[2], uint4 product, float4 dp[2], const __local float2 *gates, const __local float *scales,
                 float key_dots[2], __local float *dots) {
    const uint r = warp_lane() / 4, p = warp_lane() % 4;
    const float2 products[4] = {unpack(product.x), unpack(product.y), unpack(product.z), unpack(product.w)};
    const float2 keys[2] = {gates[r], gates[r + 8]};
    float w[8];
#pragma unroll
    for (uint half_q = 0; half_q < 2; half_q++) {
#pragma unroll
        for (uint e = 0; e < 2; e++) {
            const uint t = 8 * half_q + 2 * p + e;
            const float2 query = gates[t];
            const float scale = scales[t * 8 + bit_length(r ^ (2 * p + e))];
            /* The keys of the same eight, up to the query. */
            const float near_ds = half_q == 0 ? (e == 0 ? ds[0].x : ds[0].y) : (e == 0 ? ds[1].z : ds[1].w);
            const float near_product = half_q == 0 ? (e == 0 ? products[0].x : products[0].y)
                                                   : (e == 0 ? products[3].x : products[3].y);
            const float kept = r <= 2 * p + e ? decay_between(query, keys[half_q]) : 0.0f;
            const float4 levels = sum_distances(near_ds * near_product * kept);
            if (r == 2 * p + e) {
                dots[t] = levels.x;
                dots[NB_TILE + t] = levels.y;
                dots[2 * NB_TILE + t] = levels.z;
                dots[3 * NB_TILE + t] = levels.w;
            }
            const float near_weight = near_product * kept * scale, near_gradient = near_ds * kept * scale;
            key_dots[half_q] = fma(near_ds, near_weight, key_dots[half_q]);
            if (half_q == 0) {
                w[e] = near_weight;
                w[2 + e] = 0.0f;
                dp[0] += e == 0 ? (float4)(near_gradient, 0.0f, 0.0f, 0.0f) : (float4)(0.0f, near_gradient, 0.0f, 0.0f);
                if (r == 0) {
                    dots[4 * NB_TILE + t] = 0.0f;
                }
            } else {
                /* The eight before. */
                const float far_ds = e == 0 ? ds[1].x : ds[1].y;
                const float far_product = e == 0 ? products[2].x : products[2].y;
                const float far_kept = decay_between(query, keys[0]), far_scale = scales[t * 8 + 4];
                const float sum = sum_rows(far_ds * far_product * far_kept);
                if (r == 0) {
                    dots[4 * NB_TILE + t] = sum;
                }
                w[4 + e] = far_product * far_kept * far_scale;
                w[6 + e] = near_weight;
                key_dots[0] = fma(far_ds, w[4 + e], key_dots[0]);
                const float far_gradient = far_ds * far_kept * far_scale;
                dp[1] += e == 0 ? (float4)(far_gradient, 0.0f, near_gradient, 0.0f)
                                : (float4)(0.0f, far_gradient, 0.0f, near_gradient);
            }
        }
    }
    return (uint4)(pack(w[0], w[1]), pack(w[2], w[3]), pack(w[4], w[5]), pack(w[6], w[7]));
}

/* 16 keys times 16 queries, by their columns of V. */
void multiply_values(float4 ds[2], const uint4 v[4 * TILES_V], const __local uint4 *d_o, uint query) {
    ds[0] = ds[1] = (float4)(0.0f);
#pragma unroll
    for (uint i = 0; i < 4 * TILES_V; i++) {
        const uint4 y = load_b_transposed(d_o + i / 4 * COLUMN_TILE, 8, query, i % 4 * 2);
        mma(&ds[0], v[i], y.x, y.y);
        mma(&ds[1], v[i], y.z, y.w);
    }
}

/* k q^T of 16 keys and 16 queries, rounded. */
uint4 multiply_keys(const __local uint4 *keys, const __local uint4 *queries, uint key, uint query, float scale) {
    float4 c[2];
    c[0] = c[1] = (float4)(0.0f);
#pragma unroll
    for (uint step = 0; step < K_STEPS; step++) {
        const uint4 a = load_a(keys, K_PIECES, key, 2 * step);
        const uint4 y = load_b_transposed(queries, K_PIECES, query, 2 * step);
        mma(&c[0], a, y.x, y.y);
        mma(&c[1], a, y.z, y.w);
    }
    c[0] *= scale;
    c[1] *= scale;
    return (uint4)(pack(c[0].x, c[0].y), pack(c[0].z, c[0].w), pack(c[1].x, c[1].y), pack(c[1].z, c[1].w));
}

/* Puts a sixteen of keys by queries, as A, into a tile of keys' rows. */
void store_a(__local uint4 *tile, uint4 a, uint key, uint query) {
    const uint r = warp_lane() / 4, p = warp_lane() % 4;
    __local uint *words = (__local uint *)tile;
    words[4 * swizzled(key + r, 8, query / 8) + p] = a.x;
    words[4 * swizzled(key + r + 8, 8, query / 8) + p] = a.y;
    words[4 * swizzled(key + r, 8, query / 8 + 1) + p] = a.z;
    words[4 * swizzled(key + r + 8, 8, query / 8 + 1) + p] = a.w;
}

/* 16 rows of a tile (or its transpose) of products times a quarter of K's columns of q or k. */
void add_rows(float4 sum[NV_K / 32], const __local uint4 *products, const __local uint4 *rows, uint row, uint quarter,
              int transposed) {
#pragma unroll
    for (uint step = 0; step < 4; step++) {
        const uint4 a =
            transposed ? load_a_transposed(products, 8, 16 * step, row / 8) : load_a(products, 8, row, 2 * step);
#pragma unroll
        for (uint i = 0; i < NV_K / 64; i++) {
            const uint4 y = load_b(rows, K_PIECES, 16 * step, quarter * (NV_K / 32) + 2 * i);
            mma(&sum[2 * i], a, y.x, y.y);
            mma(&sum[2 * i + 1], a, y.z, y.w);
        }
    }
}

void clear_rows(float4 sum[NV_K / 32]) {
#pragma unroll
    for (uint i = 0; i < NV_K / 32; i++) {
        sum[i] = (float4)(0.0f);
    }
}

void store_rows(__global float *to, const float4 sum[NV_K / 32], uint row, uint quarter) {
    to += (row + warp_lane() / 4) * NV_K + quarter * (NV_K / 4) + 2 * (warp_lane() % 4);
#pragma unroll
    for (uint i = 0; i < NV_K / 32; i++) {
        *(__global float2 *)(to + 8 * i) = sum[i].xy;
        *(__global float2 *)(to + 8 * NV_K + 8 * i) = sum[i].zw;
    }
}

/* Two rows of 16 columns of dv: an item writes 4 columns of each, of the left eight if its number is even. */
void store_columns(__global ushort *to, const float4 sum[2], int row, int rows, int column, int aligned) {
    const uint odd = warp_lane() & 1;
#pragma unroll
    for (int lower = 0; lower < 2; lower++) {
        const uint left = lower ? pack(sum[0].z, sum[0].w) : pack(sum[0].x, sum[0].y);
        const uint right = lower ? pack(sum[1].z, sum[1].w) : pack(sum[1].x, sum[1].y);
        const uint other = shuffle_xor(odd ? left : right, 1);
        const uint2 x = odd ? (uint2)(other, right) : (uint2)(left, other);
        const int at = column + 8 * (int)odd + 4 * (int)(warp_lane() % 4 / 2);
        if (row + 8 * lower < rows && at < DIM_V) {
            __global ushort *place_of_four = to + (ulong)(row + 8 * lower) * (HEADS * DIM_V) + at;
            if (aligned) {
                *(__global uint2 *)place_of_four = x;
            } else {
                place_of_four[0] = (ushort)x.x;
                place_of_four[1] = (ushort)(x.x >> 16);
                place_of_four[2] = (ushort)x.y;
                place_of_four[3] = (ushort)(x.y >> 16);
            }
        }
    }
}

/* What a turn of the tiles takes from memory. */
typedef struct tile_inputs {
    uint4 v[TILES_V * COLUMN_TILE];
    uint4 d_o[2][TILES_V * COLUMN_TILE]; /* of the tile and the one behind it */
    uint4 adjoint[TILES_V * STATE];
    float2 gates[NB_CHUNK];   /* of the same two tiles */
    float4 factors[NB_CHUNK];
    float scales[NB_TILE * 8]; /* levels 0 to 6 of the tile, 7 of the one behind */
} tile_inputs;

/* A tile of keys, with the queries of the same tile and, in a chunk's first half, of the second. */
__kernel __attribute__((reqd_work_group_size(NB_TILE_ITEMS, 1, 1))) void
nb_tiles(const loglin_nvidia_gradients call, __global float *ws, ulong ws_offset, const __global ushort *v,
         ulong v_offset, const __global ushort *d_o, ulong d_o_offset, const __global weight *level_scales,
         ulong level_scales_offset, __global ushort *dv, ulong dv_offset, __global weight *dlevel_scales,
         ulong dlevel_scales_offset, uint aligned) {
    __local tile_inputs inputs[2];
    __local uint4 keys[ROW_TILE];
    __local uint4 weights_at[2][COLUMN_TILE]; /* P M, transposed, of both tiles of queries */
    __local float near_dots[5][NB_TILE], far_dots[2][4][NB_TILE];
    const uint item = get_local_id(0), lane = item % 32, warp = item / 32, key = warp % 4 * 16, quarter = warp / 4;
    const uint r = lane / 4, p = lane % 4, query = quarter * 16;
    const ulong id = get_group_id(0), padded = (ulong)call.chunks * NB_CHUNK;
    const uint block = id % HEAD_BLOCKS, group = id / HEAD_BLOCKS % GROUPS,
               b = id / (HEAD_BLOCKS * GROUPS) % call.batch;
    const uint tile = 2 * call.chunks - 1 - id / (HEAD_BLOCKS * GROUPS) / call.batch, n = tile / 2;
    const uint first = tile * NB_TILE, first_head = group * GROUP_HEADS + block * BLOCK_HEADS;
    const int rows = (int)call.length - (int)first;
    const uint blocks = tile % 2 == 0 && rows > NB_TILE ? 2 : 1;
    const int has_adjoint = n + 1 < call.chunks;
    const ulong bg = (ulong)b * GROUPS + group, first_bh = (ulong)b * HEADS + first_head;
    const ulong first_column = (((ulong)b * call.length + first) * HEADS + first_head) * DIM_V;
    const ulong level_row = (((ulong)b * call.length + first) * HEADS + first_head) * LEVELS;
    const __global uint4 *query_rows = (const __global uint4 *)place(ws, ws_offset, call.queries) +
                                       (bg * padded + first) * K_PIECES;

    fetch_tile(keys, (const __global uint4 *)place(ws, ws_offset, call.keys) + (bg * padded + first) * K_PIECES,
               NB_TILE, K_PIECES, item, NB_TILE_ITEMS);
    for (uint i = 0; i < blocks; i++) {
        fetch_tile(inputs[i].adjoint, query_rows + i * ROW_TILE, NB_TILE, K_PIECES, item, NB_TILE_ITEMS);
    }
    wait_for_copies();
    barrier(CLK_LOCAL_MEM_FENCE);
    uint4 products[2];
    float4 gradients[2][2], key_sum[NV_K / 32];
    clear_rows(key_sum);
#pragma unroll
    for (uint i = 0; i < 2; i++) {
        gradients[i][0] = gradients[i][1] = (float4)(0.0f);
        products[i] = i < blocks ? multiply_keys(keys, inputs[i].adjoint, key, query, call.scale) : (uint4)(0);
    }
    barrier(CLK_LOCAL_MEM_FENCE);

    for (uint step = 0; step <= BLOCK_HEADS; step++) {
        wait_for_copies();
        barrier(CLK_LOCAL_MEM_FENCE);
        if (step < BLOCK_HEADS) {
            __local tile_inputs *to = &inputs[step % 2];
            const ulong bh = first_bh + step;
            const ulong column = first_column + (ulong)step * DIM_V;
            for (uint i = 0; i < TILES_V; i++) {
                fetch_columns(to->v + i * COLUMN_TILE, v + v_offset + column, i, rows, aligned & 1, item,
                              NB_TILE_ITEMS);
                for (uint j = 0; j < blocks; j++) {
                    fetch_columns(to->d_o[j] + i * COLUMN_TILE,
                                  d_o + d_o_offset + column + (ulong)j * (NB_TILE * HEADS * DIM_V), i,
                                  rows - (int)j * NB_TILE, aligned & 1, item, NB_TILE_ITEMS);
                }
                if (has_adjoint) {
                    fetch_state(to->adjoint + i * STATE, (const __global uint4 *)place(ws, ws_offset, call.adjoints) +
                                                             ((bh * TILES_V + i) * call.chunks + n) * STATE,
                                item, NB_TILE_ITEMS);
                }
            }
            const __global float2 *gates =
                (const __global float2 *)place(ws, ws_offset, call.gates) + bh * padded + first;
            const __global float4 *factors =
                (const __global float4 *)place(ws, ws_offset, call.factors) + bh * padded + first;
            if (item < blocks * NB_TILE / 2) {
                copy_16(&to->gates[2 * item], &gates[2 * item], 1);
            }
            if (item < blocks * NB_TILE) {
                copy_16(&to->factors[item], &factors[item], 1);
            }
            for (uint i = item; i < NB_TILE * 8; i += NB_TILE_ITEMS) {
                const uint level = i % 8, row = i / 8 + (level == 7 ? NB_TILE : 0);
                fetch_scale(&to->scales[i], level_scales,
                            level_scales_offset + level_row + (ulong)row * (HEADS * LEVELS) + step * LEVELS + level,
                            (int)row < rows && level < LEVELS && (level < 7 || blocks == 2));
            }
        }
        if (step == 0) {
            continue;
        }
        const uint h = step - 1;
        const __local tile_inputs *in = &inputs[h % 2];
        uint4 values[4 * TILES_V];
#pragma unroll
        for (uint i = 0; i < 4 * TILES_V; i++) {
            values[i] = load_a(in->v + i / 4 * COLUMN_TILE, 8, key, i % 4 * 2);
        }
        float key_dots[2] = {0.0f, 0.0f};
#pragma unroll
        for (uint i = 0; i < 2; i++) {
            if (i < blocks && (i == 1 || query >= key)) {
                float4 ds[2];
                uint4 a;
                multiply_values(ds, values, in->d_o[i], query);
                if (i == 0 && query == key) {
                    a = weigh_near(ds, products[i], gradients[i], in->gates + key, in->scales + key * 8, key_dots,
                                   &near_dots[0][key]);
                } else {
                    float query_weight[4], query_scale[4], key_weight[2];
                    const float between = i == 1 ? 1.0f : decay_between(in->gates[query - 1], in->gates[key + 15]);
                    const int level = i == 1 ? 7 : 4 + bit_length((query ^ key) / 16);
#pragma unroll
                    for (uint e = 0; e < 4; e++) {
                        const uint t = query + 8 * (e / 2) + 2 * p + e % 2;
                        query_weight[e] = i == 1 ? in->factors[NB_TILE + t].z : in->factors[t].x * between;
                        query_scale[e] = in->scales[t * 8 + level];
                    }
#pragma unroll
                    for (uint e = 0; e < 2; e++) {
                        const float4 own = in->factors[key + r + 8 * e];
                        key_weight[e] = i == 1 ? own.z : own.y;
                    }
                    a = weigh_far(ds, products[i], gradients[i], query_weight, query_scale, key_weight, key_dots,
                                  &far_dots[i][key / 16][query]);
                }
                store_a(weights_at[i], a, key, query);
            }
        }

        /* What comes from behind the chunk: dv of a quarter of the columns, dk of a quarter of K. */
        float4 sum[TILES_V][2];
#pragma unroll
        for (uint part = 0; part < TILES_V; part++) {
            sum[part][0] = sum[part][1] = (float4)(0.0f);
        }
        if (has_adjoint) {
            const float upper = in->factors[key + r].w * STATE_UNIT, lower = in->factors[key + r + 8].w * STATE_UNIT;
#pragma unroll
            for (uint part = 0; part < TILES_V; part++) {
                const __local uint4 *adjoint = in->adjoint + part * STATE;
#pragma unroll
                for (uint i = 0; i < K_STEPS; i++) {
                    const uint4 a = load_a(keys, K_PIECES, key, 2 * i);
                    const uint4 y = load_b(adjoint, 8, 16 * i, 2 * quarter);
                    mma(&sum[part][0], a, y.x, y.y);
                    mma(&sum[part][1], a, y.z, y.w);
                }
#pragma unroll
                for (uint i = 0; i < 2; i++) {
                    sum[part][i] *= (float4)(upper, upper, lower, lower);
                    const uint column = 16 * quarter + 8 * i + 2 * p;
                    const float2 first_v = tile_pair(in->v + part * COLUMN_TILE, 8, key + r, column);
                    const float2 second_v = tile_pair(in->v + part * COLUMN_TILE, 8, key + r + 8, column);
                    key_dots[0] = fma(first_v.x, sum[part][i].x, fma(first_v.y, sum[part][i].y, key_dots[0]));
                    key_dots[1] = fma(second_v.x, sum[part][i].z, fma(second_v.y, sum[part][i].w, key_dots[1]));
                }
#pragma unroll
                for (uint inner = 0; inner < 4; inner++) {
                    const uint4 a = scale_rows(values[4 * part + inner], pack(upper, upper), pack(lower, lower));
#pragma unroll
                    for (uint i = 0; i < NV_K / 64; i++) {
                        const uint4 y = load_b_transposed(adjoint, 8, quarter * (NV_K / 4) + 16 * i, 2 * inner);
                        mma(&key_sum[2 * i], a, y.x, y.y);
                        mma(&key_sum[2 * i + 1], a, y.z, y.w);
                    }
                }
            }
        }
        barrier(CLK_LOCAL_MEM_FENCE);
#pragma unroll
        for (uint part = 0; part < TILES_V; part++) {
#pragma unroll
            for (uint i = 0; i < 2; i++) {
#pragma unroll
                for (uint inner = 0; inner < 4; inner++) {
                    if (i < blocks && (i == 1 || 16 * inner >= key)) {
                        const uint4 a = load_a(weights_at[i], 8, key, 2 * inner);
                        const uint4 y = load_b(in->d_o[i] + part * COLUMN_TILE, 8, 16 * inner, 2 * quarter);
                        mma(&sum[part][0], a, y.x, y.y);
                        mma(&sum[part][1], a, y.z, y.w);
                    }
                }
            }
            store_columns(dv + dv_offset + first_column + (ulong)h * DIM_V, sum[part], (int)(key + r), rows,
                          (int)(part * NB_COLUMNS + 16 * quarter), aligned >> 1);
        }

        /* What gates and level scales need: the barrier above has made the dots visible. */
        __global float *all_dots = (__global float *)place(ws, ws_offset, call.dots) + (first_bh + h) * padded + first;
        const ulong dots_stride = (ulong)call.batch * HEADS * padded;
        key_dots[0] = sum_quad(key_dots[0]);
        key_dots[1] = sum_quad(key_dots[1]);
        if (p == 0) {
            all_dots[(3 + quarter) * dots_stride + key + r] = key_dots[0];
            all_dots[(3 + quarter) * dots_stride + key + r + 8] = key_dots[1];
        }
        const uint row = item % NB_TILE;
        const ulong gradient_row = dlevel_scales_offset + level_row + (ulong)row * (HEADS * LEVELS) + h * LEVELS;
        if (item < NB_TILE) {
            float sum = 0.0f;
#pragma unroll
            for (uint level = 0; level < 7; level++) {
                float gradient = 0.0f;
                if (level < 5) {
                    gradient = near_dots[level][row];
                } else if (level == 5) {
                    gradient = row / 16 % 2 == 1 ? far_dots[0][row / 16 - 1][row] : 0.0f;
                } else {
                    gradient = row >= 32 ? far_dots[0][0][row] + far_dots[0][1][row] : 0.0f;
                }
                sum = fma(gradient, in->scales[row * 8 + level], sum);
                if (dlevel_scales && (int)row < rows && level < LEVELS) {
                    store_weight(dlevel_scales, gradient_row + level, gradient);
                }
            }
            all_dots[dots_stride + row] = sum;
            if (dlevel_scales && tile % 2 == 0 && (int)row < rows && 7 < LEVELS) {
                store_weight(dlevel_scales, gradient_row + 7, 0.0f);
            }
        } else if (item < 2 * NB_TILE && blocks == 2) {
            const float gradient =
                (far_dots[1][0][row] + far_dots[1][1][row]) + (far_dots[1][2][row] + far_dots[1][3][row]);
            all_dots[2 * dots_stride + NB_TILE + row] = gradient * in->scales[row * 8 + 7];
            if (dlevel_scales && (int)row + NB_TILE < rows && 7 < LEVELS) {
                store_weight(dlevel_scales, gradient_row + (ulong)NB_TILE * (HEADS * LEVELS) + 7, gradient);
            }
        }
    }

    /* What all heads have added up to. */
    barrier(CLK_LOCAL_MEM_FENCE);
#pragma unroll
    for (uint i = 0; i < 2; i++) {
        if (i < blocks) {
            fetch_tile(inputs[i].adjoint, query_rows + i * ROW_TILE, NB_TILE, K_PIECES, item, NB_TILE_ITEMS);
            const float4 left = gradients[i][0] * call.scale, right = gradients[i][1] * call.scale;
            store_a(weights_at[i], (uint4)(pack(left.x, left.y), pack(left.z, left.w), pack(right.x, right.y),
                                           pack(right.z, right.w)), key, query);
        }
    }
    wait_for_copies();
    barrier(CLK_LOCAL_MEM_FENCE);
    const ulong part_size = (ulong)HEAD_BLOCKS * call.batch * GROUPS * padded * NV_K;
    const ulong at = ((((ulong)block * call.batch + b) * GROUPS + group) * padded + first) * NV_K;
    for (uint i = 0; i < blocks; i++) {
        add_rows(key_sum, weights_at[i], inputs[i].adjoint, key, quarter, 0);
    }
    store_rows((__global float *)place(ws, ws_offset, call.key_parts) + at, key_sum, key, quarter);
    for (uint i = 0; i < blocks; i++) {
        float4 query_sum[NV_K / 32];
        clear_rows(query_sum);
        add_rows(query_sum, weights_at[i], keys, key, quarter, 1);
        store_rows((__global float *)place(ws, ws_offset, call.query_parts) + i * part_size + at +
                       i * (NB_TILE * NV_K),
                   query_sum, key, quarter);
    }
}
