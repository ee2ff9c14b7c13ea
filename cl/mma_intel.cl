/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Intel GPUs: fragments for cl/mma_fragments.cl.  MMA_INSTRUCTION is DPAS_8X8X16 (sub-groups of 8) or DPAS_8X16X16 (of
 * 16) with 16-bit storage and float sums.  FMA_8X16X16 and FMA_8X8X8 do without matrix units: sub-groups of 16 or of 8,
 * floats, an element of A shuffled to all items for each fused multiply-add.
 *
 * Slabs for DPAS hold A by rows and B by pairs of rows, the two elements of a column beside each other, as an item
 * takes them; those for FMA both by rows, which block reads of the sub-group load where local memory has them.
 */
#if IS_FMA
#define SLAB_STRIDE SLAB_DEPTH
#define MMA_B_SIZE (SLAB_DEPTH * SLAB_COLUMNS)
uint mma_b_at(uint k, uint column) { return k * SLAB_COLUMNS + column; }
#if MMA_INSTRUCTION == FMA_8X8X8
#define STEPS_UNROLLED 1 /* for GPUs with 128 registers */
#endif
#else
#define SLAB_STRIDE (SLAB_DEPTH + 8)
#define MMA_B_SIZE (SLAB_DEPTH * SLAB_COLUMNS)
uint mma_b_at(uint k, uint column) { return (k / 2 * SLAB_COLUMNS + column) * 2 + k % 2; }
#endif
#define MMA_A_SIZE (SLAB_ROWS * SLAB_STRIDE)
uint mma_a_at(uint row, uint k) { return row * SLAB_STRIDE + k; }

#define READ_TOGETHER 1 /* more would be spilled */

/*
 * Registers that the compiler would waste.  It does not see that all items have a function's arguments alike, and keeps one
 * for each item of a sub-group; and of loops that are unrolled it keeps every address while the functions in them are called.
 * The kernels of the backward pass spill less without this.
 */
#if !GRADIENTS
#define ROLLED _Pragma("unroll 1")
#ifndef MMA_EMULATED
#define ALIKE(x) intel_sub_group_shuffle(x, 0)
#define ALIKE_POINTER(type, p) ((type)intel_sub_group_shuffle((ulong)(p), 0))
#endif
#endif

typedef union {
    float8 all;
    float x[MMA_ELEMENTS];
} mma_c;

#if IS_FMA
typedef struct {
    mma_element x[A_HELD];
} fragment_a;
typedef struct {
    mma_element x[B_HELD];
} fragment_b;
#else
#if MMA_INSTRUCTION == DPAS_8X8X16
typedef int8 held_a_bits;
#else
typedef short8 held_a_bits;
#endif
typedef union {
    held_a_bits all;
    uint pairs[A_HELD / 2];
    mma_element x[A_HELD];
} fragment_a;
typedef union {
    int8 all;
    uint pairs[B_HELD / 2];
    mma_element x[B_HELD];
} fragment_b;
#endif

#ifdef MMA_EMULATED
#define MMA_KERNEL
#define MMA_WAVE MMA_TEAM
#elif MMA_TEAM == 8
#define MMA_KERNEL __attribute__((intel_reqd_sub_group_size(8)))
#define MMA_WAVE get_max_sub_group_size()
#else
#define MMA_KERNEL __attribute__((intel_reqd_sub_group_size(16)))
#define MMA_WAVE get_max_sub_group_size()
#endif

/*
 * What FMA holds lies in its slabs at a place of the lane plus one of the element, so that one address serves for all of an
 * item's: a block read of the sub-group takes the first lane's.
 */
#if defined(cl_intel_subgroup_local_block_io)
#define LANE_READ 0
#ifdef MMA_EMULATED
#define READ_LANES(p) ((p)[lane])
#else
#define READ_LANES(p) as_float(intel_sub_group_block_read((const __local uint *)(p)))
#endif
#else
#define LANE_READ lane
#define READ_LANES(p) (*(p))
#endif

#if MMA_INSTRUCTION == DPAS_8X8X16
fragment_a load_fragment_a(const __local mma_element *slab, uint row, uint k, uint lane) {
    fragment_a a;
#pragma unroll
    for (uint i = 0; i < A_HELD / 2; i++) {
        a.pairs[i] =
            *(const __local uint *)(slab + mma_a_at(row + A_ROW(lane, 2 * i), k + A_K(lane, 2 * i)));
    }
    return a;
}
#elif IS_FMA
fragment_a load_fragment_a(const __local mma_element *slab, uint row, uint k, uint lane) {
    const __local mma_element *from = slab + mma_a_at(row + A_ROW(LANE_READ, 0), k + A_K(LANE_READ, 0));
    fragment_a a;
#pragma unroll
    for (uint i = 0; i < A_HELD; i++) {
        a.x[i] = READ_LANES(from + mma_a_at(A_ROW(0, i), A_K(0, i)));
    }
    return a;
}
#else
fragment_a load_fragment_a(const __local mma_element *slab, uint row, uint k, uint lane) {
    fragment_a a;
#pragma unroll
    for (uint i = 0; i < A_HELD; i++) {
        a.x[i] = slab[mma_a_at(row + A_ROW(lane, i), k + A_K(lane, i))];
    }
    return a;
}
#endif

#if IS_FMA
fragment_b load_fragment_b(const __local mma_element *slab, uint k, uint column, uint lane) {
    const __local mma_element *from = slab + mma_b_at(k + B_K(LANE_READ, 0), column + B_COLUMN(LANE_READ, 0));
    fragment_b b;
#pragma unroll
    for (uint i = 0; i < B_HELD; i++) {
        b.x[i] = READ_LANES(from + mma_b_at(B_K(0, i), B_COLUMN(0, i)));
    }
    return b;
}
#else
fragment_b load_fragment_b(const __local mma_element *slab, uint k, uint column, uint lane) {
    fragment_b b;
#pragma unroll
    for (uint i = 0; i < B_HELD / 2; i++) {
        b.pairs[i] =
            *(const __local uint *)(slab + mma_b_at(k + B_K(lane, 2 * i), column + B_COLUMN(lane, 2 * i)));
    }
    return b;
}
#endif

#if !defined(MMA_EMULATED) && IS_FMA
void multiply_fragments(mma_c *c, fragment_a a, fragment_b b) {
#pragma unroll
    for (uint k = 0; k < MMA_DEPTH; k++) {
#pragma unroll
        for (uint i = 0; i < MMA_ROWS; i++) {
            c->x[i] = fma(intel_sub_group_shuffle(a.x[i], k), b.x[k], c->x[i]);
        }
    }
}
#elif !defined(MMA_EMULATED)
float8 __attribute__((overloadable)) intel_sub_group_bf16_bf16_matrix_mad_k16(held_a_bits a, int8 b, float8 sums);
float8 __attribute__((overloadable)) intel_sub_group_f16_f16_matrix_mad_k16(held_a_bits a, int8 b, float8 sums);

void multiply_fragments(mma_c *c, fragment_a a, fragment_b b) {
#if STORAGE == 2
    c->all = intel_sub_group_bf16_bf16_matrix_mad_k16(a.all, b.all, c->all);
#else
    c->all = intel_sub_group_f16_f16_matrix_mad_k16(a.all, b.all, c->all);
#endif
}
#endif
