/* SPDX-License-Identifier: Apache-2.0 */
/* The delta rule's backward pass, see nvidia_delta_backward.cl: gradients through a chunk's map, and their sums. */

/* ---- keys ---------------------------------------------------------------------------------------------------------- */

#define SQUARE (ND_CHUNK * SQUARE_ROW)

/* Matrices of a chunk in local memory: 16-bit squares, tokens by tokens. */
typedef struct chunk_squares {
    uint4 inverse_t[SQUARE]; /* of I + X, transposed */
    uint4 a[SQUARE];         /* A, then dT T^T */
    uint4 z[SQUARE];
    uint4 d_z[SQUARE];
    uint4 d_t[SQUARE];       /* dT diag(beta), then dK K^T */
    uint4 d_qk[SQUARE];
    float sums[TOKENS][ND_CHUNK];   /* parts of column sums: of dT and the inverse */
    float gates[TOKENS][ND_CHUNK];  /* likewise: of A dA and X dX */
    float d_gate[ND_CHUNK], d_end[ND_CHUNK];
} chunk_squares;

/* The tile's place in a square. */
__local uint4 *tile_of(__local uint4 *square, uint i, uint j) { return square + 16 * i * SQUARE_ROW + 2 * j; }

uint4 load_square(__local uint4 *square, uint i, uint j) { return load_tile(tile_of(square, i, j), SQUARE_ROW); }

uint4 load_square_transposed(__local uint4 *square, uint i, uint j) {
    return load_tile_transposed(tile_of(square, i, j), SQUARE_ROW);
}

void put_square(__local uint4 *square, uint i, uint j, const float4 c[2]) {
    const uint lane = warp_lane();
    __local uint *to = (__local uint *)tile_of(square, i, j) + lane / 4 * (4 * SQUARE_ROW) + lane % 4;
    const uint4 x = round_tile(c);
    to[0] = x.x;
    to[8 * 4 * SQUARE_ROW] = x.y;
    to[4] = x.z;
    to[8 * 4 * SQUARE_ROW + 4] = x.w;
}

/* Row and column, in the chunk, of element e (0 to 7) of an item's numbers of tile (i, j). */
uint element_row(uint i, uint e) { return 16 * i + warp_lane() / 4 + 8 * (e / 2 % 2); }
uint element_column(uint j, uint e) { return 16 * j + 8 * (e / 4) + 2 * (warp_lane() % 4) + e % 2; }

void to_elements(float x[8], const float4 c[2]) {
    vstore4(c[0], 0, x);
    vstore4(c[1], 1, x);
}

void to_tile(float4 c[2], const float x[8]) {
    c[0] = vload4(0, x);
    c[1] = vload4(1, x);
}

/* Adds the sums over the tile's 16 rows to those of its columns. */
void add_column_sums(__local float *to, uint j, const float x[8]) {
#pragma unroll
    for (uint e = 0; e < 8; e += e % 2 == 0 ? 1 : 3) {
        float sum = x[e] + x[e + 2];
        for (uint distance = 4; distance < 32; distance *= 2) {
            sum += as_float(shuffle_xor(as_uint(sum), distance));
        }
        if (warp_lane() < 4) {
            to[element_column(j, e)] += sum;
        }
    }
}

/* What 16 rows sum up while their tiles go by: an item's own columns. */
typedef struct row_sums {
    float gate[2], beta[2], end[2];
    float levels[2][INNER_LEVELS];
} row_sums;

/* Z, the gradient of the inner level weights, and dZ, of tiles (i, j). */
void find_d_z(__local chunk_squares *squares, row_sums *sums, const __local chunk_rows *rows, const __global uint4 *map,
              const __global uint4 *d_read, const __global ushort *v, const __global ushort *d_o, uint i, int count,
              uint aligned) {
    const ulong row_size = HEADS * DIM_V;
    for (uint j = 0; j <= i; j++) {
        float4 z[2] = {(float4)(0.0f), (float4)(0.0f)}, d[2] = {(float4)(0.0f), (float4)(0.0f)};
        for (uint s = j; s <= i; s++) {
            add_product(z, load_square(squares->a, i, s), load_square(squares->inverse_t, j, s));
        }
        scale_tile(z, rows->beta + 16 * j, 0);
        put_square(squares->z, i, j, z);
        for (uint column = 0; column < DIM_V / 16; column++) {
            add_product(d, load_global_tile(d_o + 16 * i * row_size + 16 * column, row_size, count - 16 * (int)i, aligned),
                        load_global_tile(v + 16 * j * row_size + 16 * column, row_size, count - 16 * (int)j, aligned));
        }
        float z_values[8], d_values[8];
        to_elements(z_values, z);
        to_elements(d_values, d);
#pragma unroll
        for (uint e = 0; e < 8; e++) {
            const uint r = element_row(i, e), s = element_column(j, e), level = (uint)bit_length(r ^ s);
            const float x = s <= r ? z_values[e] * d_values[e] : 0.0f;
#pragma unroll
            for (uint k = 0; k < INNER_LEVELS; k++) {
                sums->levels[e / 2 % 2][k] += k == level ? x : 0.0f;
            }
            d_values[e] = s <= r ? d_values[e] * rows->weights[r][level] : 0.0f;
        }
        float4 read[2] = {(float4)(0.0f), (float4)(0.0f)};
#pragma unroll 8
        for (uint step = 0; step < STEPS; step++) {
            add_product(read, d_read[(i * STEPS + step) * 32 + warp_lane()],
                        map[START_AT + (j * STEPS + step) * 32 + warp_lane()]);
        }
        float read_values[8];
        to_elements(read_values, read);
#pragma unroll
        for (uint e = 0; e < 8; e++) {
            d_values[e] -= element_column(j, e) <= element_row(i, e) ? read_values[e] : 0.0f;
        }
        to_tile(d, d_values);
        put_square(squares->d_z, i, j, d);
    }
}

/* dT diag(beta), dA and from it dQ K^T, of tiles (i, j). */
void find_d_t(__local chunk_squares *squares, row_sums *sums, const __local chunk_rows *rows, const __local uint4 *keys,
              const __global uint4 *d_write, uint i) {
    for (uint j = 0; j <= i; j++) {
        float4 d_t[2] = {(float4)(0.0f), (float4)(0.0f)}, d_a[2] = {(float4)(0.0f), (float4)(0.0f)}, x[2];
#pragma unroll 8
        for (uint step = 0; step < STEPS; step++) {
            add_product(d_t, load_tile(keys + 16 * i * KEY_ROW + 2 * step, KEY_ROW),
                        d_write[(j * STEPS + step) * 32 + warp_lane()]);
        }
        scale_tile(d_t, 0, rows->end + 16 * i);
        for (uint t = i; t < TOKENS; t++) {
            add_product(d_t, load_square_transposed(squares->a, t, i), load_square_transposed(squares->d_z, t, j));
        }
        for (uint c = 0; c <= j; c++) {
            unround_tile(x, load_square(squares->d_z, i, c));
            scale_tile(x, rows->beta + 16 * c, 0);
            add_product(d_a, round_tile(x), load_square_transposed(squares->inverse_t, c, j));
        }
        float t_values[8], a_values[8], inverse[8], a[8];
        to_elements(t_values, d_t);
        to_elements(a_values, d_a);
        unround_tile(x, load_square_transposed(squares->inverse_t, j, i));
        to_elements(inverse, x);
        unround_tile(x, load_square(squares->a, i, j));
        to_elements(a, x);
#pragma unroll
        for (uint e = 0; e < 8; e++) {
            const uint r = element_row(i, e), s = element_column(j, e);
            inverse[e] *= s <= r ? t_values[e] : 0.0f;
            t_values[e] = s <= r ? t_values[e] * rows->beta[s] : 0.0f;
            a[e] *= s < r ? a_values[e] : 0.0f;
            a_values[e] = s <= r ? a_values[e] * decay_between(rows->gates, r, s) : 0.0f;
            sums->gate[e / 2 % 2] += a[e];
        }
        add_column_sums(squares->sums[i], j, inverse);
        add_column_sums(squares->gates[i], j, a);
        to_tile(d_t, t_values);
        put_square(squares->d_t, i, j, d_t);
        to_tile(d_a, a_values);
        put_square(squares->d_qk, i, j, d_a);
    }
}

/* dT T^T of tiles (i, j), where A was. */
void find_d_inverse(__local chunk_squares *squares, uint i) {
    for (uint j = 0; j <= i; j++) {
        float4 c[2] = {(float4)(0.0f), (float4)(0.0f)};
        for (uint s = 0; s <= j; s++) {
            add_product(c, load_square(squares->d_t, i, s), load_square_transposed(squares->inverse_t, s, j));
        }
        float x[8];
        to_elements(x, c);
#pragma unroll
        for (uint e = 0; e < 8; e++) {
            x[e] = element_column(j, e) <= element_row(i, e) ? x[e] : 0.0f;
        }
        to_tile(c, x);
        put_square(squares->a, i, j, c);
    }
}

/* dX = - (I + X)^-T dT T^T, and from it dK K^T, of tiles (i, j), where dT was.  x: X / beta. */
void find_d_x(__local chunk_squares *squares, row_sums *sums, const __local chunk_rows *rows, const __local float *x,
              uint i) {
    for (uint j = 0; j <= i; j++) {
        float4 c[2] = {(float4)(0.0f), (float4)(0.0f)};
        for (uint t = i; t < TOKENS; t++) {
            add_product(c, load_square(squares->inverse_t, i, t), load_square_transposed(squares->a, t, j));
        }
        float d_x[8], gates[8];
        to_elements(d_x, c);
#pragma unroll
        for (uint e = 0; e < 8; e++) {
            const uint r = element_row(i, e), s = element_column(j, e);
            d_x[e] = s < r ? -d_x[e] : 0.0f;
            const float product_of = s < r ? d_x[e] * x[r * (4 * SOLVE_ROW) + s] : 0.0f;
            sums->beta[e / 2 % 2] += product_of;
            gates[e] = rows->beta[r] * product_of;
            sums->gate[e / 2 % 2] += gates[e];
            d_x[e] *= rows->beta[r] * decay_between(rows->gates, r, s);
        }
        add_column_sums(squares->gates[i], j, gates);
        to_tile(c, d_x);
        put_square(squares->d_t, i, j, c);
    }
}

/* Adds a row's products to its sums. */
void add_row_dots(float to[2], const float4 x[2], const float4 y[2], float upper, float lower) {
#pragma unroll
    for (uint e = 0; e < 2; e++) {
        const float4 z = x[e] * y[e];
        to[0] = fma(upper, z.x + z.y, to[0]);
        to[1] = fma(lower, z.z + z.w, to[1]);
    }
}

/* Floats of a tile to rows of a head's dq or dk. */
void store_part(__global float *to, const float4 c[2], uint step, int rows) {
    const int lane = (int)warp_lane();
    to += (ulong)(lane / 4) * (HEADS * DIM_K) + 16 * step + 2 * (lane % 4);
#pragma unroll
    for (uint e = 0; e < 2; e++) {
        if (lane / 4 < rows) {
            vstore2(c[e].lo, 0, to + 8 * e);
        }
        if (lane / 4 + 8 < rows) {
            vstore2(c[e].hi, 0, to + (ulong)(8 * HEADS * DIM_K) + 8 * e);
        }
    }
}

/* dq and dk of 16 tokens of a head, of q and k as they stand in local memory. */
void find_d_keys(__local chunk_squares *squares, row_sums *sums, const __local chunk_rows *rows,
                 const __local uint4 *queries, const __local uint4 *keys, const __global uint4 *gradients,
                 __global float *dq, __global float *dk, uint i, int count) {
    const uint lane = warp_lane(), r = 16 * i + lane / 4;
    const __global uint4 *d_read = gradients + lane, *d_start = d_read + GRADIENT, *d_write = d_start + GRADIENT;
    const float start[2] = {rows->start[r], rows->start[r + 8]}, end[2] = {rows->end[r], rows->end[r + 8]};
    uint4 d_qk[TOKENS], inverse[TOKENS], d_kk[TOKENS], z_t[TOKENS];
    /* Row i of the lower triangles, behind it column i, transposed. */
#pragma unroll
    for (uint j = 0; j < TOKENS; j++) {
        float4 x[2];
        if (j <= i) {
            d_qk[j] = load_square(squares->d_qk, i, j);
            d_kk[j] = load_square(squares->d_t, i, j);
            unround_tile(x, load_square_transposed(squares->inverse_t, j, i));
            scale_tile(x, rows->beta + 16 * j, 0);
            inverse[j] = round_tile(x);
        }
        if (j >= i) {
            unround_tile(x, load_square_transposed(squares->z, j, i));
            x[0] = -x[0];
            x[1] = -x[1];
            z_t[j] = round_tile(x);
        }
    }
    for (uint step = 0; step < STEPS; step++) {
        float4 q[2], k[2], read[2], to_q[2], from_start[2], from_end[2] = {(float4)(0.0f), (float4)(0.0f)};
        float4 to_k[2] = {(float4)(0.0f), (float4)(0.0f)};
        unround_tile(q, load_tile(queries + 16 * i * KEY_ROW + 2 * step, KEY_ROW));
        unround_tile(k, load_tile(keys + 16 * i * KEY_ROW + 2 * step, KEY_ROW));
        unround_tile(read, d_read[(i * STEPS + step) * 32]);
        unround_tile(from_start, d_start[(i * STEPS + step) * 32]);
        to_q[0] = to_q[1] = (float4)(0.0f);
#pragma unroll
        for (uint j = 0; j < TOKENS; j++) {
            const uint4 key_t = load_tile_transposed(keys + 16 * j * KEY_ROW + 2 * step, KEY_ROW);
            if (j <= i) {
                add_product(to_q, d_qk[j], key_t);
                add_product(to_k, d_kk[j], key_t);
                add_product(from_end, inverse[j], transpose_tile(d_write[(j * STEPS + step) * 32]));
            }
            if (j >= i) {
                add_product(to_k, load_square_transposed(squares->d_t, j, i), key_t);
                add_product(to_k, load_square_transposed(squares->d_qk, j, i),
                            load_tile_transposed(queries + 16 * j * KEY_ROW + 2 * step, KEY_ROW));
                add_product(from_start, z_t[j], transpose_tile(d_read[(j * STEPS + step) * 32]));
            }
        }
        add_row_dots(sums->gate, q, read, start[0], start[1]);
        add_row_dots(sums->gate, k, from_start, start[0], start[1]);
        add_row_dots(sums->end, k, from_end, end[0], end[1]);
#pragma unroll
        for (uint e = 0; e < 2; e++) {
            const float4 from = (float4)(start[0], start[0], start[1], start[1]);
            to_q[e] = fma(from, read[e], to_q[e]);
            to_k[e] = fma(from, from_start[e], to_k[e]);
            to_k[e] = fma((float4)(end[0], end[0], end[1], end[1]), from_end[e], to_k[e]);
        }
        store_part(dq + 16 * i * (HEADS * DIM_K), to_q, step, count - 16 * (int)i);
        store_part(dk + 16 * i * (HEADS * DIM_K), to_k, step, count - 16 * (int)i);
    }
}

/* Rows in local memory times their factors. */
void normalize_rows(__local uint4 *x, const __local float *factors) {
    for (uint at = get_local_id(0); at < ND_CHUNK * (DIM_K / 8); at += ND_KEYS_ITEMS) {
        const uint row = at / (DIM_K / 8);
        __local uint4 *piece = x + row * KEY_ROW + at % (DIM_K / 8);
        const uint4 y = *piece;
        const float2 a = factors[row] * unpack(y.x), b = factors[row] * unpack(y.y), c = factors[row] * unpack(y.z),
                     d = factors[row] * unpack(y.w);
        *piece = (uint4)(pack(a.x, a.y), pack(b.x, b.y), pack(c.x, c.y), pack(d.x, d.y));
    }
}

/* The rows' sums over their columns, and dg, dbeta and the inner levels' gradients from all sums. */
void store_sums(__local chunk_squares *squares, row_sums *sums, const __global float *decays, __global float *dg,
                __global weight *dbeta, __global weight *dlevels, uint i, uint n, int count) {
    const uint lane = warp_lane(), item = get_local_id(0);
#pragma unroll
    for (uint half_of = 0; half_of < 2; half_of++) {
        const float gate = quad_sum(sums->gate[half_of]), beta = quad_sum(sums->beta[half_of]);
        const float end = quad_sum(sums->end[half_of]);
        const uint r = 16 * i + 8 * half_of + lane / 4;
        if (lane % 4 == 0) {
            float down = 0.0f, of_inverse = 0.0f;
            for (uint t = i; t < TOKENS; t++) {
                down += squares->gates[t][r];
                of_inverse += squares->sums[t][r];
            }
            squares->d_gate[r] = gate - down;
            squares->d_end[r] = end;
            if (dbeta && (int)r < count) {
                store_weight(dbeta, (ulong)r * HEADS, beta + of_inverse);
            }
        }
#pragma unroll
        for (uint level = 0; level < INNER_LEVELS; level++) {
            const float x = quad_sum(sums->levels[half_of][level]);
            if (dlevels && lane % 4 == 0 && (int)r < count && level < LEVELS) {
                store_weight(dlevels, (ulong)r * (HEADS * LEVELS) + level, x);
            }
        }
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    if (dg && item < ND_CHUNK && (int)item < count) {
        float sum = 0.0f;
        for (uint part = 0; part < BLOCKS * TOKENS; part++) {
            sum += decays[part];
        }
        for (uint r = 0; r < ND_CHUNK; r++) {
            sum += r < item ? squares->d_end[r] : squares->d_gate[r];
        }
        dg[(ulong)item * HEADS] = sum;
    }
    /* Levels that the chunk's number has no bit for, and columns that no level has. */
    for (uint at = item; dlevels && LEVELS > FIRST_LEVEL && at < ND_CHUNK * (LEVELS - FIRST_LEVEL); at += ND_KEYS_ITEMS) {
        const uint r = at / (LEVELS - FIRST_LEVEL), level = at % (LEVELS - FIRST_LEVEL);
        if ((int)r < count && ((n >> level) & 1) == 0) {
            store_weight(dlevels, (ulong)r * (HEADS * LEVELS) + FIRST_LEVEL + level, 0.0f);
        }
    }
}

/* A work-group takes a chunk of a sequence and head. */
__kernel __attribute__((reqd_work_group_size(ND_KEYS_ITEMS, 1, 1))) void
nvidia_delta_keys(const loglin_delta_call call, __global float *ws, ulong ws_offset, const __global ushort *q,
                  ulong q_offset, const __global ushort *k, ulong k_offset, const __global ushort *v, ulong v_offset,
                  const __global float *g, ulong g_offset, const __global weight *level_scales,
                  ulong level_scales_offset, const __global weight *beta, ulong beta_offset, const __global ushort *d_o,
                  ulong d_o_offset, __global float *dg, ulong dg_offset, __global weight *dlevels, ulong dlevels_offset,
                  __global weight *dbeta, ulong dbeta_offset, uint aligned) {
    __local uint4 queries[ND_CHUNK * KEY_ROW], keys[ND_CHUNK * KEY_ROW];
    __local float4 x[ND_CHUNK * SOLVE_ROW];
    __local chunk_squares squares;
    __local chunk_rows rows;
    const uint item = get_local_id(0), i = item / 32;
    const chunk_place at = find_chunk(call, get_group_id(0));
    const int count = at.count;
    const ulong row = at.row;
    const __global uint4 *map = find_map(call, ws, ws_offset, at.id);
    const __global uint4 *gradients =
        (const __global uint4 *)place(ws, ws_offset, call.map_gradients) + at.id * 3 * GRADIENT;
    fetch_keys(queries, q + q_offset, &at, aligned);
    fetch_keys(keys, k + k_offset, &at, aligned);
    if (i == 0) {
        scan_gates(rows.gates, g ? g + g_offset + row : 0, count);
    }
    for (uint e = item; e < ND_CHUNK * TOKENS; e += ND_KEYS_ITEMS) {
        squares.sums[e / ND_CHUNK][e % ND_CHUNK] = squares.gates[e / ND_CHUNK][e % ND_CHUNK] = 0.0f;
    }
    wait_for_copies();
    barrier(CLK_LOCAL_MEM_FENCE);
    find_rows(&rows, call, queries, keys, beta + beta_offset + row, level_scales + level_scales_offset + row * LEVELS,
              count);
    barrier(CLK_LOCAL_MEM_FENCE);
    /* From here on q and k stand normalised, q scaled. */
    normalize_rows(queries, rows.norms[0]);
    normalize_rows(keys, rows.norms[1]);
    barrier(CLK_LOCAL_MEM_FENCE);
    if (item < ND_CHUNK) {
        rows.norms[0][item] = rows.norms[1][item] = 1.0f;
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    make_products((__local float *)x, squares.d_z, queries, keys, &rows, i);
    for (uint j = 0; j <= i; j++) {
        float4 a[2];
        unround_tile(a, squares.d_z[lower_tile(i, j) * 32 + warp_lane()]);
        put_square(squares.a, i, j, a);
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    if (item < ND_CHUNK) {
        float4 y[ND_CHUNK / 4];
        solve_column(y, x, rows.beta, item);
#pragma unroll
        for (uint s = 0; s < ND_CHUNK / 8; s++) {
            const float4 a = y[2 * s], b = y[2 * s + 1];
            squares.inverse_t[item * SQUARE_ROW + s] =
                (uint4)(pack(a.x, a.y), pack(a.z, a.w), pack(b.x, b.y), pack(b.z, b.w));
        }
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    row_sums sums = {{0.0f, 0.0f}, {0.0f, 0.0f}, {0.0f, 0.0f}, {{0.0f}, {0.0f}}};
    find_d_z(&squares, &sums, &rows, map, gradients, v + v_offset + row * DIM_V, d_o + d_o_offset + row * DIM_V, i, count,
             aligned);
    barrier(CLK_LOCAL_MEM_FENCE);
    find_d_t(&squares, &sums, &rows, keys, gradients + 2 * GRADIENT, i);
    barrier(CLK_LOCAL_MEM_FENCE);
    find_d_inverse(&squares, i);
    barrier(CLK_LOCAL_MEM_FENCE);
    find_d_x(&squares, &sums, &rows, (const __local float *)x, i);
    barrier(CLK_LOCAL_MEM_FENCE);
    find_d_keys(&squares, &sums, &rows, queries, keys, gradients,
                (__global float *)place(ws, ws_offset, call.dq) + row * DIM_K,
                (__global float *)place(ws, ws_offset, call.dk) + row * DIM_K, i, count);
    store_sums(&squares, &sums, (const __global float *)place(ws, ws_offset, call.decays) + at.id * (BLOCKS * TOKENS),
               dg ? dg + dg_offset + row : 0, dbeta ? dbeta + dbeta_offset + row : 0,
               dlevels ? dlevels + dlevels_offset + row * LEVELS : 0, i, at.n, count);
}

/* ---- sum ----------------------------------------------------------------------------------------------------------- */

/* A token and group's dq or dk from the parts of its heads. */
void sum_row(__global ushort *to, const __global float *parts, const __global ushort *x, float scale) {
    const uint lane = warp_lane();
    float sums[DIM_K / 32 + 1], square = 0.0f, dot_of = 0.0f;
#pragma unroll
    for (uint i = 0; i < (DIM_K + 31) / 32; i++) {
        const uint column = 32 * i + lane;
        sums[i] = 0.0f;
        if (column < DIM_K) {
            for (uint head = 0; head < HEADS / GROUPS; head++) {
                sums[i] += parts[head * DIM_K + column];
            }
            const float value = unpack(x[column]).x;
            square = fma(value, value, square);
            dot_of = fma(value, sums[i], dot_of);
        }
    }
    float norm = scale, along = 0.0f;
    if (NORMALIZE) {
        const float inverse = 1.0f / sqrt(warp_sum(square) + 1e-6f);
        norm = scale * inverse;
        along = inverse * inverse * warp_sum(dot_of);
    }
#pragma unroll
    for (uint i = 0; i < (DIM_K + 31) / 32; i++) {
        const uint column = 32 * i + lane;
        if (column < DIM_K) {
            to[column] = (ushort)pack(norm * (sums[i] - along * unpack(x[column]).x), 0.0f);
        }
    }
}

/* A warp takes a token and group. */
__kernel __attribute__((reqd_work_group_size(ND_KEYS_ITEMS, 1, 1))) void
nvidia_delta_sum(const loglin_delta_call call, __global float *ws, ulong ws_offset, const __global ushort *q,
                 ulong q_offset, const __global ushort *k, ulong k_offset, __global ushort *dq, ulong dq_offset,
                 __global ushort *dk, ulong dk_offset) {
    const ulong row = get_global_id(0) / 32;
    if (row >= (ulong)call.batch * call.length * GROUPS) {
        return;
    }
    const ulong parts = row * (HEADS / GROUPS) * DIM_K, at = row * DIM_K;
    sum_row(dq + dq_offset + at, (const __global float *)place(ws, ws_offset, call.dq) + parts, q + q_offset + at,
            call.scale);
    sum_row(dk + dk_offset + at, (const __global float *)place(ws, ws_offset, call.dk) + parts, k + k_offset + at, 1.0f);
}
