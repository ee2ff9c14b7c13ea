/* SPDX-License-Identifier: Apache-2.0 */
/*
 * NVIDIA's matrix units through inline PTX (sm_80 and later): products of 16-bit tiles with float sums.
 *
 * A warp of 32 work-items multiplies A (16 x 16) by B (16 x 8) and adds to C (16 x 8).  With r = lane / 4, p = lane % 4 an
 * item holds, two elements of a row (of A, C) or of a column (of B) to a register:
 *     A  .x: row r, columns 2p, 2p+1   .y: row r+8   .z: row r, columns 2p+8, 2p+9   .w: row r+8, those columns
 *     B  b0: rows 2p, 2p+1 of column r   b1: rows 2p+8, 2p+9
 *     C  .xy: row r, columns 2p, 2p+1   .zw: row r+8
 * So the C of a product X Y, rounded, is the B of (X Y)^T; and B of two column tiles is A of the transposed tile.
 */

#if STORAGE == 2
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#define PACK "cvt.rn.bf16x2.f32"
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#define PACK "cvt.rn.f16x2.f32"
#endif

uint warp_lane(void) { return (uint)get_local_id(0) & 31u; }

void mma(float4 *c, uint4 a, uint b0, uint b1) {
    asm volatile(MMA " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c->x), "+f"(c->y), "+f"(c->z), "+f"(c->w)
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

/* Rounds two floats to storage; `low` comes first in memory. */
uint pack(float low, float high) {
    uint x;
    asm(PACK " %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}

float2 unpack(uint x) {
#if STORAGE == 2
    return (float2)(as_float(x << 16), as_float(x & 0xffff0000u));
#else
    float low, high;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(low), "=f"(high)
        : "r"(x));
    return (float2)(low, high);
#endif
}

/* Both products of two pairs, rounded. */
uint multiply_pairs(uint x, uint y) {
    uint z;
#if STORAGE == 2
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(z) : "r"(x), "r"(y), "r"(0x80008000u));
#else
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
#endif
    return z;
}

/* A tile of A with rows r and r+8 multiplied by weights (pairs of equal numbers). */
uint4 scale_rows(uint4 a, uint upper, uint lower) {
    return (uint4)(multiply_pairs(a.x, upper), multiply_pairs(a.y, lower), multiply_pairs(a.z, upper),
                   multiply_pairs(a.w, lower));
}

uint local_address(const __local void *p) { return (uint)(size_t)p; }

/* Four 8 x 8 matrices, transposed; item i gives the address of row i % 8 of matrix i / 8. */
uint4 load_transposed(const __local void *row) {
    uint4 x;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(local_address(row))
                 : "memory");
    return x;
}

/* Starts copying 16 bytes, or clears them. */
void copy_16(__local void *to, const __global void *from, int wanted) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(local_address(to)), "l"(from), "r"(wanted ? 16 : 0)
                 : "memory");
}

void copy_4(__local void *to, const __global void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" : : "r"(local_address(to)), "l"(from) : "memory");
}

/* Waits for the copies that this item has started. */
void wait_for_copies(void) { asm volatile("cp.async.wait_all;" : : : "memory"); }

uint shuffle_xor(uint x, uint mask) {
    uint y;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, 0xffffffff;" : "=r"(y) : "r"(x), "r"(mask));
    return y;
}

/* From the item `distance` before; its own value for the first ones. */
float shuffle_up(float x, uint distance) {
    float y;
    asm volatile("shfl.sync.up.b32 %0, %1, %2, 0, 0xffffffff;" : "=f"(y) : "f"(x), "r"(distance));
    return y;
}

/* Transposes 4 x 4 numbers among the four items that share lane / 4: number i of item j becomes number j of item i. */
uint4 transpose_quad(uint4 x) {
    const int odd = (warp_lane() & 1u) != 0, high = (warp_lane() & 2u) != 0;
    const uint a = shuffle_xor(odd ? x.x : x.y, 1), b = shuffle_xor(odd ? x.z : x.w, 1);
    x = odd ? (uint4)(a, x.y, b, x.w) : (uint4)(x.x, a, x.z, b);
    const uint c = shuffle_xor(high ? x.x : x.z, 2), d = shuffle_xor(high ? x.y : x.w, 2);
    return high ? (uint4)(c, d, x.z, x.w) : (uint4)(x.x, x.y, c, d);
}

/* Four 8 x 8 matrices as they lie; item i gives the address of row i % 8 of matrix i / 8. */
uint4 load_matrices(const __local void *row) {
    uint4 x;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(local_address(row))
                 : "memory");
    return x;
}
