/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Intel GPUs: fragments for cl/mma_fragments.cl.  MMA_INSTRUCTION is DPAS_8X8X16 (sub-groups of 8) or DPAS_8X16X16 (of
 * 16) with 16-bit storage and float sums, or FMA_8X16X16, which does without matrix units: sub-groups of 16, floats, an
 * element of A shuffled to all items for each fused multiply-add.
 *
 * Slabs for DPAS hold A by rows and B by pairs of rows, the two elements of a column beside each other, as an item
 * takes them; those for FMA both by rows, which block reads of the sub-group load where local memory has them.
 */
#if MMA_INSTRUCTION == FMA_8X16X16
#define SLAB_STRIDE SLAB_DEPTH
#define MMA_B_SIZE (SLAB_DEPTH * SLAB_COLUMNS)
uint mma_b_at(uint k, uint column) { return k * SLAB_COLUMNS + column; }
#else
#define SLAB_STRIDE (SLAB_DEPTH + 8)
#define MMA_B_SIZE (SLAB_DEPTH * SLAB_COLUMNS)
uint mma_b_at(uint k, uint column) { return (k / 2 * SLAB_COLUMNS + column) * 2 + k % 2; }
#endif
#define MMA_A_SIZE (SLAB_ROWS * SLAB_STRIDE)
uint mma_a_at(uint row, uint k) { return row * SLAB_STRIDE + k; }

typedef union {
    float8 all;
    float x[MMA_ELEMENTS];
} mma_c;

#if MMA_INSTRUCTION == FMA_8X16X16
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
#else
fragment_a load_fragment_a(const __local mma_element *slab, uint row, uint k, uint lane) {
    fragment_a a;
#pragma unroll
    for (uint i = 0; i < A_HELD; i++) {
#if defined(MMA_EMULATED) || MMA_INSTRUCTION != FMA_8X16X16 || !defined(cl_intel_subgroup_local_block_io)
        a.x[i] = slab[mma_a_at(row + A_ROW(lane, i), k + A_K(lane, i))];
#else
        a.x[i] = as_float(
            intel_sub_group_block_read((const __local uint *)(slab + mma_a_at(row + A_ROW(0, i), k + A_K(0, i)))));
#endif
    }
    return a;
}
#endif

fragment_b load_fragment_b(const __local mma_element *slab, uint k, uint column, uint lane) {
    fragment_b b;
#if MMA_INSTRUCTION != FMA_8X16X16
#pragma unroll
    for (uint i = 0; i < B_HELD / 2; i++) {
        b.pairs[i] =
            *(const __local uint *)(slab + mma_b_at(k + B_K(lane, 2 * i), column + B_COLUMN(lane, 2 * i)));
    }
#else
#pragma unroll
    for (uint i = 0; i < B_HELD; i++) {
#if defined(MMA_EMULATED) || !defined(cl_intel_subgroup_local_block_io)
        b.x[i] = slab[mma_b_at(k + B_K(lane, i), column + B_COLUMN(lane, i))];
#else
        const __local mma_element *row = slab + mma_b_at(k + B_K(0, i), column + B_COLUMN(0, i));
        b.x[i] = as_float(intel_sub_group_block_read((const __local uint *)row));
#endif
    }
#endif
    return b;
}

#if !defined(MMA_EMULATED) && MMA_INSTRUCTION == FMA_8X16X16
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
