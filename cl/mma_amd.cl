/* SPDX-License-Identifier: Apache-2.0 */
/*
 * AMD's matrix units: fragments for cl/mma_fragments.cl, 16-bit storage, float sums.  MMA_INSTRUCTION is MFMA_32X32X8
 * (waves of 64), WMMA_GFX11 or WMMA_GFX12 (waves of 32: their built-ins do not compile for other waves).
 *
 * The elements that an item holds of a row of A, or of a column of B, are one or two runs along k, which is contiguous
 * in the slabs: so one or two accesses load them.  Rows of a slab are 16 bytes longer than they need be, against bank
 * conflicts.
 */
#define MMA_KERNEL
#define SLAB_STRIDE (SLAB_DEPTH + 8)
#define MMA_A_SIZE (SLAB_ROWS * SLAB_STRIDE)
#define MMA_B_SIZE (SLAB_COLUMNS * SLAB_STRIDE)

uint mma_a_at(uint row, uint k) { return row * SLAB_STRIDE + k; }
uint mma_b_at(uint k, uint column) { return column * SLAB_STRIDE + k; }

/* The widest access of a fragment's elements, which are neighbours along k, and how many of them there are. */
#if MMA_INSTRUCTION == WMMA_GFX11
typedef ushort8 held_part;
#define HELD_PART 8
#else
typedef ushort4 held_part;
#define HELD_PART 4
#endif
#define HELD_PARTS (A_HELD / HELD_PART)

#if MMA_INSTRUCTION == MFMA_32X32X8
typedef ushort4 held;
#elif MMA_INSTRUCTION == WMMA_GFX11
typedef ushort16 held;
#else
typedef ushort8 held;
#endif

typedef union {
    held all;
    held_part parts[HELD_PARTS];
    mma_element x[A_HELD];
} fragment_a, fragment_b;

typedef union {
#if MMA_INSTRUCTION == MFMA_32X32X8
    float16 all;
#else
    float8 all;
#endif
    float x[MMA_ELEMENTS];
} mma_c;

fragment_a load_fragment_a(const __local mma_element *slab, uint row, uint k, uint lane) {
    fragment_a loaded;
#pragma unroll
    for (uint i = 0; i < HELD_PARTS; i++) {
        const uint x = i * HELD_PART;
        loaded.parts[i] = *(const __local held_part *)(slab + mma_a_at(row + A_ROW(lane, x), k + A_K(lane, x)));
    }
    return loaded;
}

fragment_b load_fragment_b(const __local mma_element *slab, uint k, uint column, uint lane) {
    fragment_b loaded;
#pragma unroll
    for (uint i = 0; i < HELD_PARTS; i++) {
        const uint x = i * HELD_PART;
        loaded.parts[i] = *(const __local held_part *)(slab + mma_b_at(k + B_K(lane, x), column + B_COLUMN(lane, x)));
    }
    return loaded;
}

#ifdef MMA_EMULATED
#define MMA_WAVE MMA_TEAM
#else
#define MMA_WAVE __builtin_amdgcn_wavefrontsize()

#if STORAGE == 1
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#endif

void multiply_fragments(mma_c *c, fragment_a a, fragment_b b) {
#if MMA_INSTRUCTION == MFMA_32X32X8 && STORAGE == 2
    c->all = __builtin_amdgcn_mfma_f32_32x32x8bf16_1k(as_short4(a.all), as_short4(b.all), c->all, 0, 0, 0);
#elif MMA_INSTRUCTION == MFMA_32X32X8
    c->all = __builtin_amdgcn_mfma_f32_32x32x8f16(as_half4(a.all), as_half4(b.all), c->all, 0, 0, 0);
#elif MMA_INSTRUCTION == WMMA_GFX11 && STORAGE == 2
    c->all = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(as_short16(a.all), as_short16(b.all), c->all);
#elif MMA_INSTRUCTION == WMMA_GFX11
    c->all = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(as_half16(a.all), as_half16(b.all), c->all);
#elif STORAGE == 2
    c->all = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32_gfx12(as_short8(a.all), as_short8(b.all), c->all);
#else
    c->all = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12(as_half8(a.all), as_half8(b.all), c->all);
#endif
}
#endif
