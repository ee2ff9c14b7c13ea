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

/* The same number; what follows from it is not kept in registers over a turn of a loop, but made anew. */
uint anew(uint x) {
    uint y;
    asm volatile("mov.b32 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

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

/* Level scales as they are stored, in floats or in the storage of v: so they are copied to local memory. */
#if WEIGHT_STORAGE == 0
typedef float stored_scale;
float scale_of(stored_scale x) { return x; }
#else
typedef ushort stored_scale;
float scale_of(stored_scale x) { return unpack(x).x; }
#endif

/* How many of them are in 16 bytes, which are copied at once. */
#define SCALE_PIECE (WEIGHT_STORAGE == 0 ? 4u : 8u)

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

/* Four 8 x 8 matrices; item i gives the address of row i % 8 of matrix i / 8. */
uint4 load_matrices_at(uint row) {
    uint4 x;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(row)
                 : "memory");
    return x;
}
uint4 load_matrices(const __local void *row) { return load_matrices_at(local_address(row)); }

/* The same, each transposed. */
uint4 load_transposed_at(uint row) {
    uint4 x;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(row)
                 : "memory");
    return x;
}
uint4 load_transposed(const __local void *row) { return load_transposed_at(local_address(row)); }

/* Starts copying the first `bytes` of 16, and clears the others. */
void copy_some_of_16(__local void *to, const __global void *from, uint bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(local_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}

/* Starts copying 16 bytes, or clears them. */
void copy_16(__local void *to, const __global void *from, int wanted) {
    copy_some_of_16(to, from, wanted ? 16 : 0);
}

void copy_4(__local void *to, const __global void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" : : "r"(local_address(to)), "l"(from) : "memory");
}

/* Starts copying some of 4 bytes, and clears the rest. */
void copy_some_of_4(__local void *to, const __global void *from, uint bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :
                 : "r"(local_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}

/* Waits for the copies that this item has started. */
void wait_for_copies(void) { asm volatile("cp.async.wait_all;" : : : "memory"); }

/* Ends a group of copies; waits for all groups but the `n` last ones. */
void end_copies(void) { asm volatile("cp.async.commit_group;" : : : "memory"); }
#define WAIT_FOR_COPIES_BUT(n) asm volatile("cp.async.wait_group %0;" : : "n"(n) : "memory")

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

/* From lane `lane`. */
float shuffle_from(float x, uint lane) {
    float y;
    asm volatile("shfl.sync.idx.b32 %0, %1, %2, 31, 0xffffffff;" : "=f"(y) : "f"(x), "r"(lane));
    return y;
}

/* A number that all lanes of a warp have, so that the compiler knows it. */
uint same_in_warp(uint x) {
    uint y;
    asm volatile("shfl.sync.idx.b32 %0, %1, 0, 31, 0xffffffff;" : "=r"(y) : "r"(x));
    return y;
}

/* What is made of `a` is made anew behind this, and takes no registers before. */
void forget_derived(uint4 a[4]) {
#pragma unroll
    for (uint i = 0; i < 4; i++) {
        asm volatile("" : "+r"(a[i].x), "+r"(a[i].y), "+r"(a[i].z), "+r"(a[i].w));
    }
}

/* What the items of a warp have written to local memory becomes visible to each other. */
void meet_in_warp(void) { asm volatile("bar.warp.sync 0xffffffff;" : : : "memory"); }

/* Transposes 4 x 4 numbers among the four items that share lane / 4: number i of item j becomes number j of item i. */
uint4 transpose_quad(uint4 x) {
    const int odd = (warp_lane() & 1u) != 0, high = (warp_lane() & 2u) != 0;
    const uint a = shuffle_xor(odd ? x.x : x.y, 1), b = shuffle_xor(odd ? x.z : x.w, 1);
    x = odd ? (uint4)(a, x.y, b, x.w) : (uint4)(x.x, a, x.z, b);
    const uint c = shuffle_xor(high ? x.x : x.z, 2), d = shuffle_xor(high ? x.y : x.w, 2);
    return high ? (uint4)(c, d, x.z, x.w) : (uint4)(x.x, x.y, c, d);
}

/* A barrier of a warpgroup alone, the `own`th of its work-group. */
void warpgroup_barrier(uint own) { asm volatile("bar.sync %0, 128;" : : "r"(own + 1) : "memory"); }
/* At barrier `id`, from 1, `items` of the work-group meet; those that announce do not wait for the others. */
void meet(uint id, uint items) { asm volatile("bar.sync %0, %1;" : : "r"(id), "r"(items) : "memory"); }
void announce(uint id, uint items) { asm volatile("bar.arrive %0, %1;" : : "r"(id), "r"(items) : "memory"); }

/*
 * Products of a warpgroup, four warps: C (64 x 64) += A (64 x 64) B (64 x 64), in four steps of 16.  A warp has 16 rows of A
 * and C, as above; C has its eight tiles of 8 columns one behind the other.  B lies in local memory for all warps, rows of
 * 128 bytes, the piece of 16 bytes c of row r at place c ^ r % 8; row 0 at a multiple of 1024 bytes.  "transposed": B's
 * transpose lies so.  "local": A lies so too, and warp i of the warpgroup takes its rows 16 i...
 *
 * WGMMA 0: mma.sync, each warp by itself.  1: wgmma, which the driver's assembler does not take, so it stands in comments
 * that the host uncovers (runtime/program.h).  A product then runs beside what follows: A and C are in use until it is
 * waited for.  B is read through the asynchronous proxy.
 */
#ifndef WGMMA
#define WGMMA 0
#endif

void tile_clear(float4 c[8]) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
        c[j] = (float4)(0.0f);
    }
}

#if WGMMA
#if STORAGE == 2
#define WGMMA_TYPES ".f32.bf16.bf16 "
#else
#define WGMMA_TYPES ".f32.f16.f16 "
#endif
#define WGMMA_OP "//WG wgmma.mma_async.sync.aligned.m64n64k16" WGMMA_TYPES
#define WGMMA_PAIR_OP "//WG wgmma.mma_async.sync.aligned.m64n128k16" WGMMA_TYPES
#define TILE_C(c) "+f"((c).x), "+f"((c).y), "+f"((c).z), "+f"((c).w)
#define TILE_ALL_OF(c)                                                                                                 \
    TILE_C((c)[0]), TILE_C((c)[1]), TILE_C((c)[2]), TILE_C((c)[3]), TILE_C((c)[4]), TILE_C((c)[5]), TILE_C((c)[6]),    \
        TILE_C((c)[7])
#define TILE_ALL_C TILE_ALL_OF(c)
#define TILE_A(i) "+r"(a[i].x), "+r"(a[i].y), "+r"(a[i].z), "+r"(a[i].w)

#define TILE_C_LIST                                                                                                    \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "  \
    "%24, %25, %26, %27, %28, %29, %30, %31}"

/* What names B: its address; then, always the same, the step from 8 rows to the next 8, and how pieces are placed. */
typedef uint tile_rows;
tile_rows tile_at(const __local void *rows) { return ((local_address(rows) >> 4) & 0x3fffu) | 1u << 16; }
#define TILE_NAME_B(low) "{.reg .b64 a, b;\nmov.b64 b, {" low ", 0x40000040};\n"

/* From 16 rows to the next, or from 16 columns to the next. */
tile_rows tile_step(tile_rows rows, uint step) { return rows + step * 128u; }
tile_rows tile_columns(tile_rows rows, uint step) { return rows + step * 2u; }

/* The last numbers: is C added to, nothing is negated, what is transposed for the matrix units. */
#define TILE_REGISTERS(added, transposed)                                                                              \
    asm volatile(TILE_NAME_B("%36") WGMMA_OP TILE_C_LIST ", {%32, %33, %34, %35}, b, " added ", 1, 1, " transposed ";\n}"  \
                 : TILE_ALL_C                                                                                          \
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b))
#define TILE_LOCAL(transposed)                                                                                         \
    asm volatile(TILE_NAME_B("%33") "mov.b64 a, {%32, 0x40000040};\n" WGMMA_OP TILE_C_LIST                             \
                 ", a, b, 1, 1, 1, 0, " transposed ";\n}"                                                             \
                 : TILE_ALL_C                                                                                          \
                 : "r"(a), "r"(b))

void tile_multiply_step(float4 c[8], uint4 a, tile_rows b) { TILE_REGISTERS("1", "1"); }
void tile_set_step(float4 c[8], uint4 a, tile_rows b) { TILE_REGISTERS("0", "1"); }
void tile_multiply_transposed_step(float4 c[8], uint4 a, tile_rows b) { TILE_REGISTERS("1", "0"); }
void tile_multiply_local_step(float4 c[8], tile_rows a, tile_rows b) { TILE_LOCAL("1"); }
void tile_multiply_local_transposed_step(float4 c[8], tile_rows a, tile_rows b) { TILE_LOCAL("0"); }

/* Two tiles of C side by side, from two of B one behind the other: half as many instructions. */
void tile_pair_multiply_transposed_step(float4 c[2][8], uint4 a, tile_rows b) {
    asm volatile(TILE_NAME_B("%68") WGMMA_PAIR_OP
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
                 "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
                 "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
                 "%62, %63}, {%64, %65, %66, %67}, b, 1, 1, 1, 0;\n}"
                 : TILE_ALL_OF(c[0]), TILE_ALL_OF(c[1])
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b));
}

/* The operands stand here so that A and C are set before. */
void tile_start(float4 c[8], uint4 a[4]) {
    asm volatile("//WG wgmma.fence.sync.aligned;"
                 : TILE_ALL_C, TILE_A(0), TILE_A(1), TILE_A(2), TILE_A(3)
                 :
                 : "memory");
}
void tile_start_local(float4 c[8]) { asm volatile("//WG wgmma.fence.sync.aligned;" : TILE_ALL_C : : "memory"); }
void tile_end(void) { asm volatile("//WG wgmma.commit_group.sync.aligned;" : : : "memory"); }

/* Several products that are waited for as one: first tile_start with each C and its A, then these, then tile_end. */
void tile_set(float4 c[8], uint4 a[4], tile_rows b) {
    tile_set_step(c, a[0], b);
#pragma unroll
    for (uint step = 1; step < 4; step++) {
        tile_multiply_step(c, a[step], tile_step(b, step));
    }
}
void tile_add(float4 c[8], uint4 a[4], tile_rows b) {
#pragma unroll
    for (uint step = 0; step < 4; step++) {
        tile_multiply_step(c, a[step], tile_step(b, step));
    }
}
void tile_add_transposed(float4 c[8], uint4 a[4], tile_rows b) {
#pragma unroll
    for (uint step = 0; step < 4; step++) {
        tile_multiply_transposed_step(c, a[step], tile_columns(b, step));
    }
}

void tile_pair_add_transposed(float4 c[2][8], uint4 a[4], tile_rows b) {
#pragma unroll
    for (uint step = 0; step < 4; step++) {
        tile_pair_multiply_transposed_step(c, a[step], tile_columns(b, step));
    }
}

void tile_multiply(float4 c[8], uint4 a[4], tile_rows b) {
    tile_start(c, a);
    tile_add(c, a, b);
    tile_end();
}

void tile_multiply_transposed(float4 c[8], uint4 a[4], tile_rows b) {
    tile_start(c, a);
    tile_add_transposed(c, a, b);
    tile_end();
}

void tile_multiply_local(float4 c[8], tile_rows a, tile_rows b) {
    tile_start_local(c);
#pragma unroll
    for (uint step = 0; step < 4; step++) {
        tile_multiply_local_step(c, tile_columns(a, step), tile_step(b, step));
    }
    tile_end();
}

void tile_multiply_local_transposed(float4 c[8], tile_rows a, tile_rows b) {
    tile_start_local(c);
#pragma unroll
    for (uint step = 0; step < 4; step++) {
        tile_multiply_local_transposed_step(c, tile_columns(a, step), tile_columns(b, step));
    }
    tile_end();
}

/* Waits for all products but the last one, and makes the C of one of them usable; waits for all, which makes C usable. */
void tile_wait_but_one(void) { asm volatile("//WG wgmma.wait_group.sync.aligned 1;" : : : "memory"); }
void tile_wait_before_last(float4 c[8]) {
    asm volatile("//WG wgmma.wait_group.sync.aligned 1;" : TILE_ALL_C : : "memory");
}
void tile_wait(float4 c[8]) { asm volatile("//WG wgmma.wait_group.sync.aligned 0;" : TILE_ALL_C : : "memory"); }
/* The same where A is not used any more: it stays where it is till then. */
void tile_wait_for(float4 c[8], uint4 a[4]) {
    asm volatile("//WG wgmma.wait_group.sync.aligned 0;"
                 : TILE_ALL_C, TILE_A(0), TILE_A(1), TILE_A(2), TILE_A(3)
                 :
                 : "memory");
}

/* What this item has written to local memory becomes visible to tile_multiply, behind a barrier. */
void tile_publish(void) { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }

#else
typedef uint tile_rows;
tile_rows tile_at(const __local void *rows) { return local_address(rows); }
tile_rows tile_step(tile_rows rows, uint step) { return rows + step * 2048u; }

uint tile_piece(tile_rows rows, uint row, uint piece) { return rows + row * 128 + ((piece ^ (row & 7u)) * 16); }

/* A step's A: 16 of its columns. */
uint4 tile_load_a(tile_rows a, uint step) {
    const uint row = (uint)get_local_id(0) / 32 % 4 * 16 + (warp_lane() & 15u);
    return load_matrices_at(tile_piece(a, row, 2 * step + warp_lane() / 16));
}

void tile_multiply_step(float4 c[8], uint4 a, tile_rows b, uint step, uint lane) {
#pragma unroll
    for (uint j = 0; j < 4; j++) {
        const uint4 x = load_transposed_at(tile_piece(tile_step(b, step), lane & 15u, 2 * j + lane / 16));
        mma(&c[2 * j], a, x.x, x.y);
        mma(&c[2 * j + 1], a, x.z, x.w);
    }
}

void tile_multiply_transposed_step(float4 c[8], uint4 a, tile_rows b, uint step) {
    const uint row = warp_lane() / 16 * 8 + (warp_lane() & 7u), piece = 2 * step + (warp_lane() / 8 & 1u);
#pragma unroll
    for (uint j = 0; j < 4; j++) {
        const uint4 x = load_matrices_at(tile_piece(tile_step(b, j), row, piece));
        mma(&c[2 * j], a, x.x, x.y);
        mma(&c[2 * j + 1], a, x.z, x.w);
    }
}

void tile_multiply(float4 c[8], uint4 a[4], tile_rows b) {
    const uint lane = anew(warp_lane());
#pragma unroll
    for (uint step = 0; step < 4; step++) {
        tile_multiply_step(c, a[step], b, step, lane);
    }
}

void tile_multiply_transposed(float4 c[8], uint4 a[4], tile_rows b) {
#pragma unroll
    for (uint step = 0; step < 4; step++) {
        tile_multiply_transposed_step(c, a[step], b, step);
    }
}

void tile_multiply_local(float4 c[8], tile_rows a, tile_rows b) {
#pragma unroll
    for (uint step = 0; step < 4; step++) {
        tile_multiply_step(c, tile_load_a(a, step), b, step, warp_lane());
    }
}

void tile_multiply_local_transposed(float4 c[8], tile_rows a, tile_rows b) {
#pragma unroll
    for (uint step = 0; step < 4; step++) {
        tile_multiply_transposed_step(c, tile_load_a(a, step), b, step);
    }
}

void tile_start(float4 c[8], uint4 a[4]) { (void)c, (void)a; }
void tile_end(void) {}
void tile_set(float4 c[8], uint4 a[4], tile_rows b) {
    tile_clear(c);
    tile_multiply(c, a, b);
}
void tile_add(float4 c[8], uint4 a[4], tile_rows b) { tile_multiply(c, a, b); }
void tile_add_transposed(float4 c[8], uint4 a[4], tile_rows b) { tile_multiply_transposed(c, a, b); }
void tile_pair_add_transposed(float4 c[2][8], uint4 a[4], tile_rows b) {
    tile_multiply_transposed(c[0], a, b);
    tile_multiply_transposed(c[1], a, tile_step(b, 4));
}

void tile_wait_but_one(void) {}
void tile_wait_before_last(float4 c[8]) { (void)c; }
void tile_wait(float4 c[8]) { (void)c; }
void tile_wait_for(float4 c[8], uint4 a[4]) { (void)c, (void)a; }
void tile_publish(void) {}
#endif

#if WGMMA || defined(BULK_COPIES)
/*
 * Where wgmma is, and where BULK_COPIES says so, are bulk copies, which one item starts for all, and what counts arrivals in
 * local memory: a phase ends when `count` items and all expected bytes have arrived; phases have parity 0, 1, 0...
 */
typedef ulong arrivals;
void arrivals_start(__local arrivals *at, uint count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(local_address(at)), "r"(count) : "memory");
}
void arrive(__local arrivals *at) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(local_address(at)) : "memory");
}
/* Arrives; did that end the phase? */
int arrive_last(__local arrivals *at) {
    uint missing; /* before */
    asm volatile("{.reg .b64 s; mbarrier.arrive.shared::cta.b64 s, [%1]; mbarrier.pending_count.b64 %0, s;}"
                 : "=r"(missing)
                 : "r"(local_address(at))
                 : "memory");
    return missing == 1;
}
/* Arrives when all copies that this item has started are done. */
void arrive_with_copies(__local arrivals *at) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" : : "r"(local_address(at)) : "memory");
}
void arrivals_wait(__local arrivals *at, uint parity) {
    uint done;
    do {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done)
                     : "r"(local_address(at)), "r"(parity)
                     : "memory");
    } while (!done);
}

/* Arrives, and starts a copy of `bytes`, a multiple of 16, that arrives too. */
void copy_bulk(__local void *to, const __global void *from, uint bytes, __local arrivals *at) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :
                 : "r"(local_address(at)), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :
                 : "r"(local_address(to)), "l"(from), "r"(bytes), "r"(local_address(at))
                 : "memory");
}

/* The reverse of load_transposed_at. */
void store_transposed_at(uint row, uint4 x) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 :
                 : "r"(row), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}

/* Starts copying `bytes` that have been published; waits until all that this item copies so have been read. */
void store_bulk(__global void *to, const __local void *from, uint bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n"
                 "cp.async.bulk.commit_group;"
                 :
                 : "l"(to), "r"(local_address(from)), "r"(bytes)
                 : "memory");
}
void wait_for_stores(void) { asm volatile("cp.async.bulk.wait_group.read 0;" : : : "memory"); }

/* What has been started is seen by bulk copies, behind a barrier. */
void arrivals_publish(void) { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }
#endif

#if WGMMA
/*
 * Where x[b][token][head][column] lies, for bulk copies of a head's tokens and columns, a box: opaque, made by map_heads, also
 * in a launch before.  A box starts at a multiple of 16 bytes.  It comes token by token, with zeros for what is not in x.
 */
typedef struct heads_map {
    ulong words[16];
} heads_map __attribute__((aligned(128)));

#define MAP_SET(field, type, values) "//WG tensormap.replace.tile." field ".global.b1024." type " [%0], " values ";\n"
#define MAP_DIMENSION(i, size, box)                                                                                    \
    asm volatile(MAP_SET("global_dim", "b32", #i ", %1") MAP_SET("box_dim", "b32", #i ", %2")                          \
                     MAP_SET("element_stride", "b32", #i ", 1")                                                        \
                 :                                                                                                     \
                 : "l"(map), "r"(size), "r"(box)                                                                       \
                 : "memory")
#define MAP_STRIDE(i, bytes)                                                                                           \
    asm volatile(MAP_SET("global_stride", "b64", #i ", %1") : : "l"(map), "l"((ulong)(bytes)) : "memory")

/* Rows of a box as they are; 32 columns of 16 bits, piece c of row r at place c ^ r / 2 % 4; 64, at c ^ r % 8, as a tile. */
#define BOX_PLAIN 0
#define BOX_HALF_TILE 2
#define BOX_TILE 3

/* All strides are multiples of 16 bytes, as is x.  sizes: of batch, tokens, heads, columns; an element has 4 bytes, or 2. */
void map_heads(__global heads_map *map, const __global void *x, uint4 sizes, uint bytes, uint tokens, uint columns,
               int kind) {
    const ulong head = (ulong)sizes.w * bytes, token = head * sizes.z;
    for (uint i = 0; i < 16; i++) {
        map->words[i] = 0;
    }
    asm volatile(MAP_SET("global_address", "b64", "%1") MAP_SET("rank", "b32", "3") MAP_SET("interleave_layout", "b32", "0")
                     MAP_SET("fill_mode", "b32", "0")
                 :
                 : "l"(map), "l"(x)
                 : "memory");
    MAP_DIMENSION(0, sizes.w, columns);
    MAP_DIMENSION(1, sizes.z, 1);
    MAP_DIMENSION(2, sizes.y, tokens);
    MAP_DIMENSION(3, sizes.x, 1);
    MAP_STRIDE(0, head);
    MAP_STRIDE(1, token);
    MAP_STRIDE(2, token * sizes.y);
    if (bytes == 4) {
        asm volatile(MAP_SET("elemtype", "b32", "2") : : "l"(map) : "memory");
    } else {
        asm volatile(MAP_SET("elemtype", "b32", "1") : : "l"(map) : "memory");
    }
    if (kind == BOX_TILE) {
        asm volatile(MAP_SET("swizzle_mode", "b32", "3") : : "l"(map) : "memory");
    } else if (kind == BOX_HALF_TILE) {
        asm volatile(MAP_SET("swizzle_mode", "b32", "2") : : "l"(map) : "memory");
    }
    asm volatile("fence.proxy.tensormap::generic.release.gpu;" : : : "memory");
}

/* This item will copy boxes by the map. */
void use_map(const __global heads_map *map) {
    asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" : : "l"(map) : "memory");
}

/* Arrives, and starts to copy a box of `bytes` that arrives too; at: of batch, tokens, heads, columns. */
void copy_box(__local void *to, const __global heads_map *map, uint4 at, uint bytes, __local arrivals *arrived) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :
                 : "r"(local_address(arrived)), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
                 "[%1, {%2, %3, %4, %5}], [%6];"
                 :
                 : "r"(local_address(to)), "l"(map), "r"(at.w), "r"(at.z), "r"(at.y), "r"(at.x), "r"(local_address(arrived))
                 : "memory");
}

/*
 * Starts to copy a box to where it belongs in x; what is outside of x is left out.  What is copied has been published;
 * wait_for_stores waits for boxes, too.
 */
void store_box(const __global heads_map *map, uint4 at, const __local void *from) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];\n"
                 "cp.async.bulk.commit_group;"
                 :
                 : "l"(map), "r"(at.w), "r"(at.z), "r"(at.y), "r"(at.x), "r"(local_address(from))
                 : "memory");
}

/* The reverse of load_matrices_at. */
void store_matrices_at(uint row, uint4 x) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :
                 : "r"(row), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}
#endif

/* An 8 x 8 matrix, transposed: item i holds elements 2 (i % 4) and the next of row i / 4. */
uint transpose_matrix(uint x) {
    uint y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
