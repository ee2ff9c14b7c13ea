/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Products of many vectors of floats with a matrix of bfloat16 on NVIDIA's matrix units, as exact as in floats: y = W x.
 *
 * A float is the sum of three bfloat16 numbers, 8 bits each, and a bfloat16 weight times each of them is exact.  The matrix
 * units cut off what does not fit into their sums, at every step: so the low parts come first, and the sum over a slab of 64
 * columns is added to others in registers, which round.
 *
 * W lies in blocks of 16 rows, as for model.cl.  A work-group, two warpgroups, makes PRODUCT_ROWS rows for PRODUCT_TOKENS
 * tokens.  Slabs of 64 columns of W come through local memory; the vectors go straight to registers, four neighbouring
 * columns to an item: so the matrix units see the columns of a step of 16 in another order, in W as in x.
 */

/* Slabs in local memory, most of them on their way. */
#define STAGES 4
#define DEPTH 64
#define SLAB (DEPTH * PRODUCT_ROWS / 8) /* uint4 */

/* Starts to copy columns first .. of W's blocks block .. into two tiles (see tile_multiply), zeros where there are none. */
void fetch_slab(__local uint4 *to, const __global ushort *w, uint block, uint blocks, uint first, uint columns) {
    const uint item = get_local_id(0), column = item / 2 % DEPTH;
    const uint row = (column & 48u) | (column >> 1 & 6u) | (column & 2u) << 2 | (column & 1u);
#pragma unroll 1
    for (uint i = 0; i < SLAB / PRODUCT_ITEMS; i++) {
        const uint own = i * (PRODUCT_ITEMS / (2 * DEPTH)) + item / (2 * DEPTH), piece = own % 4 * 2 + item % 2;
        copy_16(&to[own / 4 * (DEPTH * 8) + row * 8 + (piece ^ row % 8)],
                (const __global uint4 *)w + ((ulong)(block + own) * columns + first + column) * 2 + item % 2,
                block + own < blocks && first + column < columns);
    }
}

/* Four columns of each step of rows r and r + 8, from x on and `apart`; zeros for those beyond `columns`. */
void load_rows(float4 rows[8], const __global float *x, uint apart, uint first, uint columns) {
#pragma unroll
    for (uint step = 0; step < 4; step++) {
        const uint column = first + 16 * step;
        rows[2 * step] = column < columns ? *(const __global float4 *)(x + column) : (float4)(0.0f);
        rows[2 * step + 1] = column < columns ? *(const __global float4 *)(x + apart + column) : (float4)(0.0f);
    }
    if (first + DEPTH > columns) {
#pragma unroll
        for (uint step = 0; step < 4; step++) {
            const int4 column = (int)(first + 16 * step + 4 * (warp_lane() % 4)) + (int4)(0, 1, 2, 3);
            rows[2 * step] = select((float4)(0.0f), rows[2 * step], column < (int4)((int)columns));
            rows[2 * step + 1] = select((float4)(0.0f), rows[2 * step + 1], column < (int4)((int)columns));
        }
    }
}

/* The rows rounded, as A, which leaves what is missing. */
void take_part(uint4 a[4], float4 rows[8]) {
#pragma unroll
    for (uint step = 0; step < 4; step++) {
        const float4 upper = rows[2 * step], lower = rows[2 * step + 1];
        a[step] = (uint4)(pack(upper.x, upper.y), pack(lower.x, lower.y), pack(upper.z, upper.w), pack(lower.z, lower.w));
        rows[2 * step] = upper - (float4)(unpack(a[step].x), unpack(a[step].z));
        rows[2 * step + 1] = lower - (float4)(unpack(a[step].y), unpack(a[step].w));
    }
}

void multiply_part(float4 left[8], float4 right[8], uint4 a[4], tile_rows slab) {
    tile_multiply(left, a, slab);
    tile_multiply(right, a, tile_step(slab, 4));
}

/* Two neighbours of a row of C. */
float2 pair_of(const float4 c[8], uint j, uint is_lower) { return is_lower ? c[j].zw : c[j].xy; }

float2 silu_times(float2 gate, float2 up) { return gate / (1.0f + exp(-gate)) * up; }

/* A row of 64 of C, from row n of W on, to the token's y. */
void finish_row(const float4 c[8], uint is_lower, uint n, uint rows, const __global float *bias, int mode,
                __global float *y) {
    const uint p = warp_lane() % 4 * 2;
    if (mode == PRODUCT_SWIGLU) {
#pragma unroll
        for (uint j = 0; j < 4; j++) {
            const uint at = j / 2 * 4 + j % 2;
            if (n + 8 * at < rows) {
                *(__global float2 *)(y + n / 2 + 8 * j + p) =
                    silu_times(pair_of(c, at, is_lower), pair_of(c, at + 2, is_lower));
            }
        }
        return;
    }
#pragma unroll
    for (uint j = 0; j < 8; j++) {
        const uint at = n + 8 * j + p;
        if (n + 8 * j < rows) {
            __global float2 *to = (__global float2 *)(y + at);
            float2 sum = pair_of(c, j, is_lower);
            if (mode != PRODUCT_PART) {
                sum += (float2)(bias[at], bias[at + 1]);
            }
            *to = mode == PRODUCT_ADD ? *to + sum : sum;
        }
    }
}

/*
 * Dimension 0: tiles of tokens; dimension 1: tiles of rows of W, and of each the parts of its columns, `slabs` slabs each.
 * mode: see engine/nvidia_product.h; PRODUCT_PART: y is [parts][tokens][rows of W].
 */
__kernel __attribute__((reqd_work_group_size(PRODUCT_ITEMS, 1, 1))) void
nvidia_product(const __global float *x, ulong x_stride, uint tokens, const __global ushort *w, uint columns, uint blocks,
               uint parts, uint slabs, const __global float *bias, uint bias_at, int mode, __global float *y,
               ulong y_stride) {
    __local uint4 stages[STAGES][SLAB] __attribute__((aligned(1024)));
    const uint block = get_group_id(1) / parts * (PRODUCT_ROWS / 16), part = get_group_id(1) % parts;
    const uint token = get_group_id(0) * PRODUCT_TOKENS + get_local_id(0) / 32 * 16 + warp_lane() / 4;
    const uint apart = (min(token + 8, tokens - 1) - min(token, tokens - 1)) * (uint)x_stride; /* of rows r and r + 8 */
    x += min(token, tokens - 1) * x_stride + warp_lane() % 4 * 4;
    const uint end = min((part + 1) * slabs * DEPTH, columns);
    uint first = part * slabs * DEPTH;
    float4 rows[8], left_sum[8], right_sum[8];
    tile_clear(left_sum);
    tile_clear(right_sum);
#pragma unroll
    for (uint i = 0; i < STAGES - 1; i++) {
        if (first + i * DEPTH < end) {
            fetch_slab(stages[i], w, block, blocks, first + i * DEPTH, columns);
        }
        end_copies();
    }
    load_rows(rows, x, apart, first, columns);
#pragma unroll 1
    for (uint stage = 0; first < end; first += DEPTH, stage = (stage + 1) % STAGES) {
        uint4 high[4], middle[4], low[4];
        float4 left[8], right[8];
        WAIT_FOR_COPIES_BUT(STAGES - 2);
        tile_publish();
        barrier(CLK_LOCAL_MEM_FENCE);
        if (first + (STAGES - 1) * DEPTH < end) {
            fetch_slab(stages[(stage + STAGES - 1) % STAGES], w, block, blocks, first + (STAGES - 1) * DEPTH, columns);
        }
        end_copies();
        take_part(high, rows);
        take_part(middle, rows);
        take_part(low, rows);
        if (first + DEPTH < end) {
            load_rows(rows, x, apart, first + DEPTH, columns);
        }
        tile_clear(left);
        tile_clear(right);
        tile_wait(right); /* cleared before a product is on its way */
        multiply_part(left, right, low, tile_at(stages[stage]));
        multiply_part(left, right, middle, tile_at(stages[stage]));
        multiply_part(left, right, high, tile_at(stages[stage]));
        tile_wait(left);
        tile_wait(right);
#pragma unroll
        for (uint j = 0; j < 8; j++) {
            left_sum[j] += left[j];
            right_sum[j] += right[j];
        }
    }
    if (mode == PRODUCT_PART) {
        y += (ulong)part * tokens * y_stride;
    }
#pragma unroll
    for (uint is_lower = 0; is_lower < 2; is_lower++) {
        const uint own = token + 8 * is_lower;
        if (own < tokens) {
            finish_row(left_sum, is_lower, block * 16, blocks * 16, bias + bias_at, mode, y + own * y_stride);
            finish_row(right_sum, is_lower, block * 16 + 64, blocks * 16, bias + bias_at, mode, y + own * y_stride);
        }
    }
}

/* The sum of the parts.  Dimension 0: the row of y, dimension 1: the token. */
__kernel void nvidia_product_sum(const __global float *from, uint parts, uint rows, const __global float *bias,
                                 uint bias_at, int mode, __global float *y, ulong y_stride) {
    const uint n = get_global_id(0), token = get_global_id(1), tokens = get_global_size(1);
    const uint row = mode == PRODUCT_SWIGLU ? n / 16 * 32 + n % 16 : n;
    float sum = 0.0f, up = 0.0f;
    from += (ulong)token * rows + row;
    for (uint part = 0; part < parts; part++, from += (ulong)tokens * rows) {
        sum += from[0];
        up += mode == PRODUCT_SWIGLU ? from[16] : 0.0f;
    }
    __global float *to = y + token * y_stride + n;
    if (mode == PRODUCT_SWIGLU) {
        *to = sum / (1.0f + exp(-sum)) * up;
    } else {
        *to = sum + bias[bias_at + n] + (mode == PRODUCT_ADD ? *to : 0.0f);
    }
}
