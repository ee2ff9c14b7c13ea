/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Does the device do what the NVIDIA engine relies on?  Matrix units, one warp's and a warpgroup's, copies into local
 * memory, with wgmma also of boxes, loads of matrices and shuffles through PTX, and PROBE_BYTES of local memory (at least
 * 16384, for a and b), whatever the driver says it has.
 *
 * LOGLIN_BUILD_OPTIONS=-DNV_NO_WGMMA makes the trial of wgmma fail: so mma.sync is tried where the device has both.
 */
#if WGMMA && defined(NV_NO_WGMMA)
#error "wgmma is not wanted (NV_NO_WGMMA)"
#endif
#if PROBE_BYTES < 16384
#error "PROBE_BYTES is below 16384"
#endif

uint differs(float4 x, float4 y) { return x.x != y.x || x.y != y.y || x.z != y.z || x.w != y.w; }

/* a 64 x 64, b 64 x 64, both row-major; products 64 x 64 of every work-group.  faults counts what else is wrong. */
__kernel __attribute__((reqd_work_group_size(NV_ITEMS, 1, 1))) void
nvidia_probe(const __global uint4 *a, const __global uint4 *b, __global float *products, __global uint *faults) {
    __local uint4 area[PROBE_BYTES / 16] __attribute__((aligned(1024)));
    const uint item = get_local_id(0), lane = warp_lane(), group = get_group_id(0), r = lane / 4, p = lane % 4;
    for (uint i = item; i < PROBE_BYTES / 16; i += NV_ITEMS) {
        area[i] = (uint4)(i, group, i ^ group, ~i);
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    uint wrong = 0;
    for (uint i = NV_ITEMS - 1 - item; i < PROBE_BYTES / 16; i += NV_ITEMS) {
        const uint4 x = area[i];
        wrong += x.x != i || x.y != group || x.z != (i ^ group) || x.w != ~i;
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    __local uint4 *rows_of_a = area + 64 * 8;
    for (uint i = item; i < 64 * 8; i += NV_ITEMS) {
        copy_16(&area[i / 8 * 8 + (i % 8 ^ i / 8 % 8)], &b[i], 1);
        copy_16(&rows_of_a[i / 8 * 8 + (i % 8 ^ i / 8 % 8)], &a[i], 1);
    }
    wait_for_copies();
    tile_publish();
    barrier(CLK_LOCAL_MEM_FENCE);
    uint4 left[4];
#pragma unroll
    for (uint step = 0; step < 4; step++) {
        left[step] = load_matrices(&rows_of_a[(item / 32 * 16 + lane % 16) * 8 + ((2 * step + lane / 16) ^ lane % 8)]);
    }
    float4 sum = (float4)(0.0f), across = (float4)(0.0f), c[8], other[8];
#pragma unroll
    for (uint step = 0; step < 4; step++) {
        const uint4 right = load_transposed(&area[(16 * step + lane % 16) * 8 + (lane / 16 ^ lane % 8)]);
        mma(&sum, left[step], right.x, right.y);
        const uint4 rows = load_matrices(&area[lane % 8 * 8 + ((2 * step + lane / 8 % 2) ^ lane % 8)]);
        mma(&across, left[step], rows.x, rows.y);
    }
    tile_clear(c);
    tile_multiply(c, left, tile_at(area));
    tile_wait(c);
    wrong += differs(sum, c[0]);
    tile_clear(other);
    tile_multiply_local(other, tile_at(rows_of_a), tile_at(area));
    tile_wait(other);
#pragma unroll
    for (uint j = 0; j < 8; j++) {
        wrong += differs(other[j], c[j]);
    }
    float4 transposed[8];
    tile_clear(other);
    tile_clear(transposed);
    tile_multiply_transposed(other, left, tile_at(area));
    tile_multiply_local_transposed(transposed, tile_at(rows_of_a), tile_at(area));
    tile_wait_before_last(other);
    tile_wait(transposed);
    wrong += differs(other[0], across);
#pragma unroll
    for (uint j = 0; j < 8; j++) {
        wrong += differs(other[j], transposed[j]);
    }
#if WGMMA
    /* Of b as 32 tokens of two heads, the second head. */
    __global heads_map *map = (__global heads_map *)(products + group * 64 * 64);
    __local arrivals *arrived = (__local arrivals *)&area[PROBE_BYTES / 16 - 1];
    barrier(CLK_LOCAL_MEM_FENCE);
    if (item == 0) {
        arrivals_start(arrived, 1);
        arrivals_publish();
        map_heads(map, b, (uint4)(1, 32, 2, 64), 2, 32, 64, BOX_TILE);
        use_map(map);
        copy_box(rows_of_a, map, (uint4)(0, 0, 1, 0), 32 * 128, arrived);
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    arrivals_wait(arrived, 0);
    for (uint i = item; i < 32 * 8; i += NV_ITEMS) {
        const uint row = i / 8, piece = i % 8;
        const uint4 x = rows_of_a[row * 8 + (piece ^ row % 8)], y = area[(2 * row + 1) * 8 + (piece ^ (2 * row + 1) % 8)];
        wrong += x.x != y.x || x.y != y.y || x.z != y.z || x.w != y.w;
    }
#endif
    const uint4 quad = transpose_quad((uint4)(p * 4, p * 4 + 1, p * 4 + 2, p * 4 + 3));
    wrong += quad.x != p || quad.y != 4 + p || quad.z != 8 + p || quad.w != 12 + p;
    const float2 same = unpack(multiply_pairs(pack(3.0f, -5.0f), pack(0.5f, 2.0f)));
    wrong += same.x != 1.5f || same.y != -10.0f;
    wrong += shuffle_up((float)lane, 1) != (float)(lane > 0 ? lane - 1 : 0);
    wrong += same_in_warp(lane) != 0;
    wrong += shuffle_from((float)lane, lane ^ 5u) != (float)(lane ^ 5u);
    products += group * 64 * 64 + (item / 32 * 16 + r) * 64 + 2 * p;
#pragma unroll
    for (uint j = 0; j < 8; j++) {
        products[8 * j] = c[j].x;
        products[8 * j + 1] = c[j].y;
        products[8 * j + 8 * 64] = c[j].z;
        products[8 * j + 8 * 64 + 1] = c[j].w;
    }
    faults[group * NV_ITEMS + item] = wrong;
}
