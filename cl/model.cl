/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A language model around its attention: embedding, norms, convolution, gates, and products with the weights.
 *
 * Matrices: blocks of 16 rows, in a block column after column, [rows / 16][columns][16], so that one load holds one
 * column of 16 outputs, for a product with one vector as for one with many.  Arrays whose index is a row of a matrix
 * have room for whole blocks: *_stride is the distance from a token to the next.
 *
 * A token's product (step) is one launch: the work-group prepares the whole input vector in local memory (norm, or gate
 * and norm), computes blocks of rows, and finishes them (bias, residual, silu(gate) * up).  Many tokens' (prefill):
 * `prepare_*` writes the inputs, then `product_tiles` on a CPU, or `unpack_rows`, CLBlast and `finish_*` elsewhere.
 *
 * A GPU works with LOCAL work-items on one block, of which each reads 16 bytes at a time: LANES of them share a column.
 * A CPU works with one, and vectors of 16.
 */

/* Storage of the matrices: 0 float, 1 half, 2 bfloat16. */
#ifndef MATRIX
#define MATRIX 0
#endif
/* Work-items of a group; 1 or a multiple of 32. */
#ifndef LOCAL
#define LOCAL 1
#endif
/* Tokens that a block of 16 rows is multiplied with at once on CPUs, their sums in registers: 6 suits 16 registers of 8
   floats, 16 suits 32 of 16. */
#ifndef TILE
#define TILE 6
#endif
/* 1: work-items of a warp exchange values through PTX. */
#ifndef SHUFFLES
#define SHUFFLES 0
#endif
/* Loads of 16 bytes that a work-item of a GPU has on their way together; even. */
#define IN_FLIGHT 8
/* The architecture; the defaults are those of a tiny model. */
#ifndef HEADS
#define HEADS 1
#define DIM_V 1
#define LEVELS 1
#define TAPS 4         /* of the convolution */
#define CHANNELS 3     /* of the convolution: q, k and v */
#define Q_AT 2         /* first channel of q, of QK_CHANNELS */
#define K_AT 1
#define V_AT 0
#define QK_CHANNELS 1
#define Z_AT 0         /* first column of the projections that holds the gate, ... */
#define CONV_AT 1
#define DT_AT 4
#define BETA_AT 5
#define LEVEL_AT 6
#define SEGMENT 1      /* channels of v that are normalised together */
#define DELTA 0        /* 1: gated delta rule, 0: Mamba-2 */
#define GATE_FIRST 1   /* gate, then normalise */
#endif

#define INNER (HEADS * DIM_V)

/* floatv: what a work-item takes of consecutive floats where the index is free of any structure. */
#if LOCAL == 1
#define VEC 16
typedef float16 floatv;
/* vload16 and vstore16 take four elements at a time on some compilers; a vector of float's alignment is one access. */
typedef float16 loose_floatv __attribute__((aligned(4)));
floatv loadv(const __global float *p) { return *(const __global loose_floatv *)p; }
void storev(floatv v, __global float *p) { *(__global loose_floatv *)p = v; }
floatv loadv_local(const __local float *p) { return *(const __local loose_floatv *)p; }
void storev_local(floatv v, __local float *p) { *(__local loose_floatv *)p = v; }
#define LOAD_16(p) loadv(p)
#define STORE_16(v, p) storev(v, p)
float add_lanes(floatv v) {
    const float8 a = v.lo + v.hi;
    const float4 b = a.lo + a.hi;
    return (b.x + b.z) + (b.y + b.w);
}
#else
#define VEC 1
typedef float floatv;
floatv loadv(const __global float *p) { return *p; }
void storev(floatv v, __global float *p) { *p = v; }
floatv loadv_local(const __local float *p) { return *p; }
void storev_local(floatv v, __local float *p) { *p = v; }
#define LOAD_16(p) vload16(0, p)
#define STORE_16(v, p) vstore16(v, 0, p)
float add_lanes(floatv v) { return v; }
#endif

/* A work-item of a GPU loads 16 bytes of a column, ROWS elements; rows_of makes floats of them. */
#if MATRIX == 0
typedef float matrix;
#define ROWS 4
typedef float4 floatr;
float16 load16(const __global matrix *p) { return *(const __global float16 *)p; }
floatr rows_of(uint4 loaded) { return as_float4(loaded); }
float load1(const __global matrix *p) { return *p; }
#elif MATRIX == 1
typedef half matrix;
#define ROWS 8
typedef float8 floatr;
float16 load16(const __global matrix *p) { return vload_half16(0, p); }
floatr rows_of(uint4 loaded) { return vloada_half8(0, (const half *)&loaded); }
float load1(const __global matrix *p) { return vload_half(0, p); }
#else
typedef ushort matrix;
#define ROWS 8
typedef float8 floatr;
float16 load16(const __global matrix *p) { return as_float16(convert_uint16(*(const __global ushort16 *)p) << 16); }
floatr rows_of(uint4 loaded) {
    const uint4 low = loaded << 16, high = loaded & 0xffff0000u;
    return as_float8((uint8)(low.x, high.x, low.y, high.y, low.z, high.z, low.w, high.w));
}
float load1(const __global matrix *p) { return bfloat_to_float(*p); }
#endif
#define LANES (16 / ROWS)

/* Local memory of sums over a group, floats: parts of 32 rows, from SUMS_AT on the sums. */
#if SHUFFLES
#define SUMS_AT (LOCAL + 16)
#else
#define SUMS_AT (18 * LOCAL + 64)
#endif
#define SCRATCH (SUMS_AT + 32)

floatv sigmoidv(floatv x) { return 1.0f / (1.0f + exp(-x)); }
floatv siluv(floatv x) { return x * sigmoidv(x); }
float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }
float silu(float x) { return x * sigmoid(x); }

/* log(1 + e) for e from 0 to 1, as 2 artanh(e / (2 + e)); half the time of the built-in log1p on a CPU. */
floatv log1p_unit(floatv e) {
    const floatv x = e / (2.0f + e); /* at most 1/3, so that the next term is below 1e-8 */
    const floatv x2 = x * x;
    const floatv tail = x2 * (1.0f / 9.0f + x2 * (1.0f / 11.0f + x2 * (1.0f / 13.0f + x2 * (1.0f / 15.0f))));
    return 2.0f * x * (1.0f + x2 * (1.0f / 3.0f + x2 * (1.0f / 5.0f + x2 * (1.0f / 7.0f + tail))));
}
floatv softplusv(floatv x) { return fmax(x, (floatv)0.0f) + log1p_unit(exp(-fabs(x))); }

/* A lone work-item waits for nobody. */
#if LOCAL == 1
#define GROUP_BARRIER()
#else
#define GROUP_BARRIER() barrier(CLK_LOCAL_MEM_FENCE)
#endif

/* ---- Sums over a work-group ---- */

/* The sum of x over the work-group, in every work-item; scratch has LOCAL + 16 floats. */
float sum_over_group(float x, __local float *scratch) {
#if LOCAL == 1
    (void)scratch;
    return x;
#else
    const uint me = get_local_id(0);
    GROUP_BARRIER();
    scratch[me] = x;
    GROUP_BARRIER();
    if (me < 16) {
        float part = 0.0f;
        for (uint i = me; i < LOCAL; i += 16) {
            part += scratch[i];
        }
        scratch[LOCAL + me] = part;
    }
    GROUP_BARRIER();
    float sum = 0.0f;
    for (uint i = 0; i < 16; i++) {
        sum += scratch[LOCAL + i];
    }
    return sum;
#endif
}

/* ---- Preparing a product's input, in local memory ---- */

/* x * rsqrt(mean x^2 + eps) * weight. */
void prepare_norm_local(const __global float *x, const __global float *weight, uint count, float eps,
                        __local float *to, __local float *scratch) {
    const uint me = get_local_id(0);
    const uint whole = count / VEC * VEC;
    floatv squares = 0.0f;
    float rest = 0.0f;
    for (uint i = me * VEC; i < whole; i += LOCAL * VEC) {
        const floatv v = loadv(x + i);
        storev_local(v * loadv(weight + i), to + i);
        squares += v * v;
    }
    for (uint i = whole + me; i < count; i += LOCAL) {
        to[i] = x[i] * weight[i];
        rest += x[i] * x[i];
    }
    const float scale = rsqrt(sum_over_group(add_lanes(squares) + rest, scratch) / (float)count + eps);
    for (uint i = me * VEC; i < whole; i += LOCAL * VEC) { /* what this work-item has written */
        storev_local(loadv_local(to + i) * scale, to + i);
    }
    for (uint i = whole + me; i < count; i += LOCAL) {
        to[i] *= scale;
    }
    GROUP_BARRIER();
}

#define SEGMENTS (INNER / SEGMENT)

/*
 * The attention's output o, plus D * v for Mamba-2, gated by silu(z) and normalised in segments, in either order.
 * p is the token's projections, conv_v its v after the convolution.
 */
void prepare_gated_local(const __global storage *o, const __global float *p, const __global float *conv_v,
                         const __global float *d, const __global float *weight, float eps, __local float *to,
                         __local float *scratch) {
    const uint me = get_local_id(0);
    const uint vectors = STORAGE == 0 ? SEGMENT / VEC * VEC : 0;
    float squares[SEGMENTS];
    for (uint segment = 0; segment < SEGMENTS; segment++) {
        const uint whole = segment * SEGMENT + vectors;
        const uint end = (segment + 1) * SEGMENT;
        floatv sum = 0.0f;
        float rest = 0.0f;
#if STORAGE == 0
        for (uint i = segment * SEGMENT + me * VEC; i < whole; i += LOCAL * VEC) {
            const floatv gate = siluv(loadv(p + Z_AT + i));
            floatv y = loadv(o + i);
#if !DELTA
            y += loadv(d + i) * loadv(conv_v + i);
#endif
            const floatv gated = y * gate;
            storev_local(gated * loadv(weight + i), to + i);
            sum += GATE_FIRST ? gated * gated : y * y;
        }
#endif
        for (uint i = whole + me; i < end; i += LOCAL) {
            float y = load(o, i);
#if !DELTA
            y += d[i] * conv_v[i];
#endif
            const float gated = y * silu(p[Z_AT + i]);
            to[i] = gated * weight[i];
            rest += GATE_FIRST ? gated * gated : y * y;
        }
        squares[segment] = add_lanes(sum) + rest;
    }
    for (uint segment = 0; segment < SEGMENTS; segment++) {
        const uint whole = segment * SEGMENT + vectors;
        const float scale = rsqrt(sum_over_group(squares[segment], scratch) / (float)SEGMENT + eps);
        for (uint i = segment * SEGMENT + me * VEC; i < whole; i += LOCAL * VEC) {
            storev_local(loadv_local(to + i) * scale, to + i);
        }
        for (uint i = whole + me; i < (segment + 1) * SEGMENT; i += LOCAL) {
            to[i] *= scale;
        }
    }
    GROUP_BARRIER();
}

void copy_to_local(const __global float *x, uint count, __local float *to) {
    for (uint i = get_local_id(0); i < count; i += LOCAL) {
        to[i] = x[i];
    }
    GROUP_BARRIER();
}

/* The same for many tokens, written out.  A work-group a token. */
__kernel void prepare_norm(const __global float *x, ulong x_at, ulong x_stride, const __global float *norm,
                           uint norm_at, uint count, float eps, __global float *to, ulong to_stride,
                           __local float *prepared, __local float *scratch) {
    const ulong token = get_group_id(0);
    prepare_norm_local(x + x_at + token * x_stride, norm + norm_at, count, eps, prepared, scratch);
    for (uint i = get_local_id(0); i < count; i += LOCAL) {
        to[token * to_stride + i] = prepared[i];
    }
}

__kernel void prepare_gated(const __global storage *o, const __global float *p, ulong p_stride,
                            const __global float *conv_v, const __global float *vectors, uint d_at, uint weight_at,
                            float eps, __global float *to, ulong to_stride, __local float *prepared,
                            __local float *scratch) {
    const ulong token = get_group_id(0);
    prepare_gated_local(o + token * INNER, p + token * p_stride, conv_v + token * INNER, vectors + d_at,
                        vectors + weight_at, eps, prepared, scratch);
    for (uint i = get_local_id(0); i < INNER; i += LOCAL) {
        to[token * to_stride + i] = prepared[i];
    }
}

/* ---- Products with one vector ---- */

/* Elements of a matrix that a lone work-item asks ahead. */
#define AHEAD 1024

/* `count` <= 2 blocks of rows, `next` elements from the first to the second, times x, to sums[count][16]. */
#if LOCAL == 1
/*
 * Asks for four columns of 16 rows that come soon: the processor does so by itself, but not over the end of a page, which 128
 * columns of 16 bits fill.  Only where the compiler makes a CPU's code and not SPIR-V, which cannot say it.
 */
void ask_for_columns(const __global matrix *w) {
#if defined(__x86_64__) || defined(__aarch64__)
    for (uint byte = 0; byte < 64 * sizeof *w; byte += 64) {
        __builtin_prefetch((const __global char *)w + byte, 0, 3); /* to read, into the first cache */
    }
#else
    (void)w;
#endif
}

void multiply_pair(const __global matrix *w, ulong next, uint count, const __local float *x, uint columns,
                   __local float *sums, __local float *scratch) {
    (void)scratch;
    for (uint block = 0; block < count; block++) {
        float16 a = 0.0f;
        float16 b = 0.0f;
        float16 c = 0.0f;
        float16 d = 0.0f;
        uint k = 0;
        for (; k + 3 < columns; k += 4) {
            ask_for_columns(w + (ulong)k * 16 + AHEAD);
            a = fma((float16)x[k], load16(w + (ulong)k * 16), a);
            b = fma((float16)x[k + 1], load16(w + (ulong)(k + 1) * 16), b);
            c = fma((float16)x[k + 2], load16(w + (ulong)(k + 2) * 16), c);
            d = fma((float16)x[k + 3], load16(w + (ulong)(k + 3) * 16), d);
        }
        for (; k < columns; k++) {
            a = fma((float16)x[k], load16(w + (ulong)k * 16), a);
        }
        storev_local((a + b) + (c + d), sums + block * 16);
        w += next;
    }
}
#else
#define APART (LOCAL / LANES) /* columns between two loads of a work-item */

#if ROWS == 8
void store_rows(floatr v, float *to) {
    to[0] = v.s0, to[1] = v.s1, to[2] = v.s2, to[3] = v.s3;
    to[4] = v.s4, to[5] = v.s5, to[6] = v.s6, to[7] = v.s7;
}
#else
void store_rows(floatr v, float *to) { to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w; }
#endif

/* The sums of what the work-items have of two blocks of 16 rows, to sums[32]. */
#if SHUFFLES
/*
 * In a warp, half of the values are exchanged for the other half of the item that is 16 away, half of the rest with the
 * item that is 8 away, ...: then each item has the sum of one row.
 */
#define FOLD(half_way)                                                                                                 \
    _Pragma("unroll") for (uint i = 0; i < half_way; i++) {                                                            \
        const bool upper = (lane & half_way * LANES) != 0;                                                             \
        const float given = upper ? values[i] : values[i + half_way];                                                  \
        const float kept = upper ? values[i + half_way] : values[i];                                                   \
        float taken;                                                                                                   \
        asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, 0xffffffff;"                                                  \
                     : "=f"(taken)                                                                                     \
                     : "f"(given), "r"(half_way * LANES));                                                             \
        values[i] = kept + taken;                                                                                      \
    }
void sum_pair(floatr first, floatr second, __local float *sums, __local float *scratch) {
    const uint me = get_local_id(0), lane = me % 32;
    float values[2 * ROWS];
    store_rows(first, values);
    store_rows(second, values + ROWS);
#if ROWS == 8
    FOLD(8)
#endif
    FOLD(4)
    FOLD(2)
    FOLD(1)
    const uint value = lane / LANES;
    GROUP_BARRIER();
    scratch[me - lane + value / ROWS * 16 + lane % LANES * ROWS + value % ROWS] = values[0];
    GROUP_BARRIER();
    if (me < 32) {
        float total = 0.0f;
        for (uint i = me; i < LOCAL; i += 32) {
            total += scratch[i];
        }
        sums[me] = total;
    }
    GROUP_BARRIER();
}
#else
/* Each work-item sums parts of one of 32 rows, then the first 32 what came of a row.  LANES more keep banks apart. */
void sum_pair(floatr first, floatr second, __local float *sums, __local float *scratch) {
    const uint me = get_local_id(0);
    const uint stride = LOCAL + LANES;
    const uint row = me % 16, block = me / 16 % 2;
    __local float *parts = scratch + 2 * ROWS * stride;
    float values[2 * ROWS];
    store_rows(first, values);
    store_rows(second, values + ROWS);
    GROUP_BARRIER();
#pragma unroll
    for (uint i = 0; i < 2 * ROWS; i++) {
        scratch[i * stride + me] = values[i];
    }
    GROUP_BARRIER();
    float part = 0.0f;
    for (uint i = me / 32; i < APART; i += LOCAL / 32) {
        part += scratch[(block * ROWS + row % ROWS) * stride + i * LANES + row / ROWS];
    }
    parts[me] = part;
    GROUP_BARRIER();
    if (me < 32) {
        float total = 0.0f;
        for (uint i = me; i < LOCAL; i += 32) {
            total += parts[i];
        }
        sums[me] = total;
    }
    GROUP_BARRIER();
}
#endif

uint4 load_column(const __global matrix *w, uint column) { return *(const __global uint4 *)(w + column * 16); }

/* Each work-item takes some of ROWS rows of some columns; beyond the last column it takes the last again, times 0. */
void multiply_pair(const __global matrix *w, ulong next, uint count, const __local float *x, uint columns,
                   __local float *sums, __local float *scratch) {
    const uint me = get_local_id(0);
    floatr first = 0.0f, second = 0.0f;
    w += me % LANES * ROWS;
    if (count == 1) {
        for (uint k = me / LANES; k < columns; k += IN_FLIGHT * APART) {
            uint4 loaded[IN_FLIGHT];
#pragma unroll
            for (uint i = 0; i < IN_FLIGHT; i++) {
                loaded[i] = load_column(w, min(k + i * APART, columns - 1));
            }
#pragma unroll
            for (uint i = 0; i < IN_FLIGHT; i++) {
                first += (k + i * APART < columns ? x[k + i * APART] : 0.0f) * rows_of(loaded[i]);
            }
        }
    } else {
        for (uint k = me / LANES; k < columns; k += IN_FLIGHT / 2 * APART) {
            uint4 loaded[IN_FLIGHT];
#pragma unroll
            for (uint i = 0; i < IN_FLIGHT / 2; i++) {
                loaded[2 * i] = load_column(w, min(k + i * APART, columns - 1));
                loaded[2 * i + 1] = load_column(w + next, min(k + i * APART, columns - 1));
            }
#pragma unroll
            for (uint i = 0; i < IN_FLIGHT / 2; i++) {
                const float factor = k + i * APART < columns ? x[k + i * APART] : 0.0f;
                first += factor * rows_of(loaded[2 * i]);
                second += factor * rows_of(loaded[2 * i + 1]);
            }
        }
    }
    sum_pair(first, second, sums, scratch);
}
#endif

/* Blocks are shared out among the groups of dimension 0 in runs. */
uint first_block(uint blocks, uint group) { return (uint)((ulong)blocks * group / get_num_groups(0)); }

/* y = W prepared + bias, or y += where `add` is 1. */
void multiply_blocks(const __global matrix *w, uint blocks, uint columns, const __global float *bias, int add,
                     __global float *y, const __local float *prepared, __local float *scratch) {
    __local float *sums = scratch + SUMS_AT;
    const uint last = first_block(blocks, get_group_id(0) + 1);
    for (uint block = first_block(blocks, get_group_id(0)); block < last; block += 2) {
        const uint count = min(last - block, 2u);
        multiply_pair(w + (ulong)block * columns * 16, (ulong)columns * 16, count, prepared, columns, sums, scratch);
        for (uint lane = get_local_id(0) * VEC; lane < count * 16; lane += LOCAL * VEC) {
            const uint row = block * 16 + lane;
            floatv result = loadv_local(sums + lane) + loadv(bias + row);
            if (add) {
                result += loadv(y + row);
            }
            storev(result, y + row);
        }
    }
}

/* y = W norm(x) + bias.  Groups: dimension 0 shares the blocks, dimension 1 is the token.  scratch: SCRATCH floats. */
__kernel void norm_product(const __global float *x, ulong x_at, ulong x_stride, const __global float *norm,
                           uint norm_at, float eps, const __global matrix *w, uint blocks, uint columns,
                           const __global float *bias, uint bias_at, __global float *y, ulong y_stride,
                           __local float *prepared, __local float *scratch) {
    const ulong token = get_group_id(1);
    prepare_norm_local(x + x_at + token * x_stride, norm + norm_at, columns, eps, prepared, scratch);
    multiply_blocks(w, blocks, columns, bias + bias_at, 0, y + token * y_stride, prepared, scratch);
}

/* x += W gated(o) + bias.  `columns` is INNER: PoCL makes a loop with a constant count several times slower. */
__kernel void gated_product(const __global storage *o, const __global float *p, ulong p_stride,
                            const __global float *conv_v, const __global float *vectors, uint d_at, uint weight_at,
                            uint bias_at, float eps, const __global matrix *w, uint blocks, uint columns,
                            __global float *x, ulong x_stride, __local float *prepared, __local float *scratch) {
    const ulong token = get_group_id(1);
    prepare_gated_local(o + token * INNER, p + token * p_stride, conv_v + token * INNER, vectors + d_at,
                        vectors + weight_at, eps, prepared, scratch);
    multiply_blocks(w, blocks, columns, vectors + bias_at, 1, x + token * x_stride, prepared, scratch);
}

/* y = silu(gate norm(x)) * (up norm(x)); blocks of gate and of up take turns, `blocks` counts those of y. */
__kernel void norm_swiglu(const __global float *x, ulong x_stride, const __global float *norm, uint norm_at, float eps,
                          const __global matrix *w, uint blocks, uint columns, __global float *y, ulong y_stride,
                          __local float *prepared, __local float *scratch) {
    const ulong token = get_group_id(1);
    __local float *sums = scratch + SUMS_AT;
    prepare_norm_local(x + token * x_stride, norm + norm_at, columns, eps, prepared, scratch);
    const uint last = first_block(blocks, get_group_id(0) + 1);
    for (uint block = first_block(blocks, get_group_id(0)); block < last; block++) {
        const __global matrix *gate = w + (ulong)block * 2 * columns * 16;
        multiply_pair(gate, (ulong)columns * 16, 2, prepared, columns, sums, scratch);
        const uint lane = get_local_id(0) * VEC;
        if (lane < 16) {
            const floatv result = siluv(loadv_local(sums + lane)) * loadv_local(sums + 16 + lane);
            storev(result, y + token * y_stride + block * 16 + lane);
        }
    }
}

/* x += W y, in slices of columns that fit into local memory. */
__kernel void add_product(const __global float *y, ulong y_stride, const __global matrix *w, uint blocks, uint columns,
                          uint slice, __global float *x, ulong x_stride, __local float *prepared,
                          __local float *scratch) {
    const ulong token = get_group_id(1);
    __local float *sums = scratch + SUMS_AT;
    const uint last = first_block(blocks, get_group_id(0) + 1);
    for (uint block = first_block(blocks, get_group_id(0)); block < last; block++) {
        const uint lane = get_local_id(0) * VEC;
        floatv total = 0.0f;
        for (uint start = 0; start < columns; start += slice) {
            const uint count = min(slice, columns - start);
            if (count < columns || block == first_block(blocks, get_group_id(0))) {
                GROUP_BARRIER();
                copy_to_local(y + token * y_stride + start, count, prepared);
            }
            multiply_pair(w + ((ulong)block * columns + start) * 16, 0, 1, prepared, count, sums, scratch);
            if (lane < 16) {
                total += loadv_local(sums + lane);
            }
        }
        if (lane < 16) {
            __global float *to = x + token * x_stride + block * 16 + lane;
            storev(loadv(to) + total, to);
        }
    }
}

/* ---- Products with many vectors ---- */

/* A block of rows times TILE tokens, to sums[TILE]; tokens beyond the last repeat it. */
void multiply_tile(const __global matrix *w, const __global float *x, ulong x_stride, uint tokens, uint columns,
                   float16 *sums) {
    const __global float *row[TILE];
    float16 sum[TILE];
#pragma unroll
    for (uint i = 0; i < TILE; i++) {
        row[i] = x + min(i, tokens - 1) * x_stride;
        sum[i] = 0.0f;
    }
    for (uint k = 0; k < columns; k++) {
        const float16 column = load16(w + (ulong)k * 16);
#pragma unroll
        for (uint i = 0; i < TILE; i++) {
            sum[i] = fma((float16)row[i][k], column, sum[i]);
        }
    }
#pragma unroll
    for (uint i = 0; i < TILE; i++) {
        sums[i] = sum[i];
    }
}

/* y = W x + bias, or y += where `add` is 1.  Dimension 0: a block of rows; dimension 1: a run of `run` tokens. */
__kernel void product_tiles(const __global float *x, ulong x_stride, uint tokens, uint run, const __global matrix *w,
                            uint columns, const __global float *bias, uint bias_at, int add, __global float *y,
                            ulong y_stride) {
    const uint block = get_global_id(0);
    const uint end = min((uint)(get_global_id(1) + 1) * run, tokens);
    const float16 offset = LOAD_16(bias + bias_at + block * 16);
    w += (ulong)block * columns * 16;
    for (uint token = (uint)get_global_id(1) * run; token < end; token += TILE) {
        float16 sums[TILE];
        const uint count = min((uint)TILE, end - token);
        multiply_tile(w, x + token * x_stride, x_stride, count, columns, sums);
        for (uint i = 0; i < count; i++) {
            __global float *to = y + (token + i) * y_stride + block * 16;
            STORE_16(sums[i] + offset + (add ? LOAD_16(to) : (float16)0.0f), to);
        }
    }
}

/* y = silu(gate x) * (up x), the blocks as for norm_swiglu.  Dimension 0: a block of y; dimension 1: a run of tokens. */
__kernel void swiglu_tiles(const __global float *x, ulong x_stride, uint tokens, uint run, const __global matrix *w,
                           uint columns, __global float *y, ulong y_stride) {
    const uint block = get_global_id(0);
    const uint end = min((uint)(get_global_id(1) + 1) * run, tokens);
    const __global matrix *gate = w + (ulong)block * 2 * columns * 16;
    for (uint token = (uint)get_global_id(1) * run; token < end; token += TILE) {
        float16 gates[TILE], ups[TILE];
        const uint count = min((uint)TILE, end - token);
        multiply_tile(gate, x + token * x_stride, x_stride, count, columns, gates);
        multiply_tile(gate + (ulong)columns * 16, x + token * x_stride, x_stride, count, columns, ups);
        for (uint i = 0; i < count; i++) {
            const float16 result = gates[i] / (1.0f + exp(-gates[i])) * ups[i];
            STORE_16(result, y + (token + i) * y_stride + block * 16);
        }
    }
}

/* to[column][row], some rows of a matrix as CLBlast reads it.  Dimension 0 is the row, dimension 1 the column. */
__kernel void unpack_rows(const __global matrix *w, uint first_row, uint columns, __global float *to) {
    const uint row = first_row + get_global_id(0);
    const uint column = get_global_id(1);
    const ulong from = ((ulong)(row / 16) * columns + column) * 16 + row % 16;
    to[(ulong)column * get_global_size(0) + get_global_id(0)] = load1(w + from);
}

/* y = bias, or y += where `add` is 1: a product is added to it.  Dimension 0 is the row, dimension 1 the token. */
__kernel void begin_product(const __global float *bias, uint bias_at, int add, __global float *y, ulong y_stride) {
    __global float *to = y + get_global_id(1) * y_stride + get_global_id(0);
    *to = bias[bias_at + get_global_id(0)] + (add ? *to : 0.0f);
}

/* y = silu(gate) * up, blocks of which take turns in both. */
__kernel void finish_swiglu(const __global float *both, ulong both_stride, __global float *y, ulong y_stride) {
    const ulong i = get_global_id(0);
    const __global float *gate = both + get_global_id(1) * both_stride + i / 16 * 32 + i % 16;
    y[get_global_id(1) * y_stride + i] = silu(gate[0]) * gate[16];
}

/* ---- Around the attention ---- */

/* x = the embedding's rows.  Dimension 0 is the column, dimension 1 the token. */
__kernel void embed(const __global int *ids, const __global matrix *embedding, __global float *x, ulong x_stride) {
    const uint column = get_global_id(0);
    const uint id = (uint)ids[get_global_id(1)];
    const ulong from = ((ulong)(id / 16) * get_global_size(0) + column) * 16 + id % 16;
    x[get_global_id(1) * x_stride + column] = load1(embedding + from);
}

/* Channels that a work-item takes: 16 where neither q, k and v nor the heads end inside of 16. */
#if LOCAL == 1 && Q_AT % 16 == 0 && K_AT % 16 == 0 && V_AT % 16 == 0 && CHANNELS % 16 == 0 && DIM_V % 16 == 0
#define MIX 16
typedef float16 floatm;
floatm loadm(const __global float *p) { return LOAD_16(p); }
void storem(floatm v, __global float *p) { STORE_16(v, p); }
void storem_storage(floatm v, __global storage *p) {
#if STORAGE == 0
    STORE_16(v, p);
#else
    float lanes[16];
    vstore16(v, 0, lanes);
    for (uint i = 0; i < 16; i++) {
        store(p, i, lanes[i]);
    }
#endif
}
#else
#define MIX 1
typedef float floatm;
floatm loadm(const __global float *p) { return *p; }
void storem(floatm v, __global float *p) { *p = v; }
void storem_storage(floatm v, __global storage *p) { store(p, 0, v); }
#endif

/* The last TAPS - 1 inputs of the convolution, oldest first, of which `length` are new; MIX channels. */
void update_tail(const __global float *p, ulong p_stride, uint length, __global float *tail, uint channel) {
    for (uint i = 0; i < TAPS - 1; i++) {
        const uint at = i + length; /* in tail, then p */
        const __global float *input = at < TAPS - 1 ? tail + at * CHANNELS
                                                    : p + (ulong)(at - (TAPS - 1)) * p_stride + CONV_AT;
        storem(loadm(input + channel), tail + i * CHANNELS + channel);
    }
}

/* Behind attention_inputs, for more than one token.  Dimension 0: runs of MIX channels; dimension 1: the sequence. */
__kernel void conv_tail(const __global float *p, ulong p_stride, uint length, __global float *tails, ulong tails_at) {
    const ulong sequence = get_global_id(1);
    update_tail(p + sequence * length * p_stride, p_stride, length,
                tails + tails_at + sequence * (TAPS - 1) * CHANNELS, get_global_id(0) * MIX);
}

#define CONV_ITEMS (CHANNELS / MIX)
#define LEVEL_ITEMS ((HEADS * LEVELS + VEC - 1) / VEC)
#define HEAD_ITEMS ((HEADS + VEC - 1) / VEC)

floatv time_steps(const __global float *p, const __global float *dt_bias, uint head, float dt_min, float dt_max) {
    return clamp(softplusv(loadv(p + DT_AT + head) + loadv(dt_bias + head)), (floatv)dt_min, (floatv)dt_max);
}

/* Stores elements i .. of an array of `count`. */
void store_until(floatv v, __global float *array, uint i, uint count) {
#if VEC > 1
    if (i + VEC > count) {
        float lanes[VEC];
        vstore16(v, 0, lanes);
        for (uint j = 0; i + j < count; j++) {
            array[i + j] = lanes[j];
        }
        return;
    }
#else
    (void)count;
#endif
    storev(v, array + i);
}

/* The convolution of MIX channels at one time of a sequence; earlier inputs are in p, or in the tail. */
floatm convolve(const __global float *p, ulong p_stride, const __global float *tail, uint time, uint channel,
                const __global float *taps, const __global float *bias) {
    floatm sum = loadm(bias + channel);
#pragma unroll
    for (uint tap = 0; tap < TAPS; tap++) {
        const uint at = time + tap; /* in tail, then p */
        const __global float *input = at < TAPS - 1 ? tail + at * CHANNELS
                                                    : p + (ulong)(at - (TAPS - 1)) * p_stride + CONV_AT;
        sum += loadm(taps + tap * CHANNELS + channel) * loadm(input + channel);
    }
    return sum;
}

/*
 * The attention's inputs from the projections: q, k, v through convolution and silu, v of Mamba-2 times its time step,
 * the gates g and beta, the level weights.  Dimension 0: runs of channels, then of level weights, then of heads, on a
 * CPU one work-item for all of them; dimension 1: the token, `length` of each sequence.  A length of 1 updates the tails.
 */
__kernel void attention_inputs(const __global float *projections, ulong p_stride, uint length, __global float *tails,
                               ulong tails_at, const __global float *vectors, uint conv_at, uint conv_bias_at,
                               uint dt_bias_at, uint a_at, uint level_at, float dt_min, float dt_max,
                               __global storage *q, __global storage *k, __global storage *v, __global float *conv_v,
                               __global float *g, __global float *level_scales, __global float *beta) {
    const ulong token = get_global_id(1);
    const uint sequence = (uint)token / length;
    const uint time = (uint)token % length;
    const __global float *first = projections + (ulong)sequence * length * p_stride;
    const __global float *p = projections + token * p_stride;
    __global float *tail = tails + tails_at + (ulong)sequence * (TAPS - 1) * CHANNELS;
#if LOCAL == 1
    float dt[HEAD_ITEMS * VEC];
    for (uint head = 0; head < HEADS; head += VEC) {
        vstore16(time_steps(p, vectors + dt_bias_at, head, dt_min, dt_max), 0, dt + head);
    }
#endif
    for (uint item = get_global_id(0); item < CONV_ITEMS + LEVEL_ITEMS + HEAD_ITEMS; item += get_global_size(0)) {
        if (item < CONV_ITEMS) {
            const uint channel = item * MIX;
            floatm x = convolve(first, p_stride, tail, time, channel, vectors + conv_at, vectors + conv_bias_at);
            x = x / (1.0f + exp(-x));
            if (channel >= Q_AT && channel < Q_AT + QK_CHANNELS) {
                storem_storage(x, q + token * QK_CHANNELS + (channel - Q_AT));
            } else if (channel >= K_AT && channel < K_AT + QK_CHANNELS) {
                storem_storage(x, k + token * QK_CHANNELS + (channel - K_AT));
            } else {
                const uint i = channel - V_AT;
#if !DELTA
                storem(x, conv_v + token * INNER + i);
#if LOCAL == 1
                x *= dt[i / DIM_V];
#else
                x *= time_steps(p, vectors + dt_bias_at, i / DIM_V, dt_min, dt_max);
#endif
#endif
                storem_storage(x, v + token * INNER + i);
            }
            if (length == 1) {
                update_tail(first, p_stride, 1, tail, channel);
            }
        } else if (item < CONV_ITEMS + LEVEL_ITEMS) {
            const uint i = (item - CONV_ITEMS) * VEC;
            const floatv weight = softplusv(loadv(vectors + level_at + i) * loadv(p + LEVEL_AT + i));
            store_until(weight, level_scales + token * HEADS * LEVELS, i, HEADS * LEVELS);
        } else {
            const uint head = (item - CONV_ITEMS - LEVEL_ITEMS) * VEC;
            const floatv gate = loadv(vectors + a_at + head) *
                                time_steps(p, vectors + dt_bias_at, head, dt_min, dt_max);
            store_until(fmax(gate, (floatv)-1e6f), g + token * HEADS, head, HEADS); /* sums of them stay finite */
#if DELTA
            store_until(sigmoidv(loadv(p + BETA_AT + head)), beta + token * HEADS, head, HEADS);
#else
            (void)beta;
#endif
        }
    }
}
