/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Does the device do what the NVIDIA engine relies on?  Matrix units, copies into local memory, transposing loads and
 * shuffles through PTX, and PROBE_BYTES of local memory, whatever the driver says it has.
 */

/* a 16 x 16, b 16 x 8, both row-major; products 16 x 8 of every work-group.  faults counts wrong words of local memory. */
__kernel __attribute__((reqd_work_group_size(32, 1, 1))) void
nvidia_probe(const __global uint4 *a, const __global ushort *b, __global float *products, __global uint *faults) {
    __local uint4 area[PROBE_BYTES / 16];
    const uint lane = get_local_id(0), group = get_group_id(0), r = lane / 4, p = lane % 4;
    for (uint i = lane; i < PROBE_BYTES / 16; i += 32) {
        area[i] = (uint4)(i, group, i ^ group, ~i);
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    uint wrong = 0;
    for (uint i = 31 - lane; i < PROBE_BYTES / 16; i += 32) {
        const uint4 x = area[i];
        wrong += x.x != i || x.y != group || x.z != (i ^ group) || x.w != ~i;
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    /* a is stored as its 8 x 8 quarters, columns as rows: a transposing load gives them right. */
    copy_16(&area[lane], &a[lane], 1);
    wait_for_copies();
    barrier(CLK_LOCAL_MEM_FENCE);
    const uint4 left = load_transposed(&area[lane]);
    const uint first = (uint)b[2 * p * 8 + r] | (uint)b[(2 * p + 1) * 8 + r] << 16;
    const uint second = (uint)b[(2 * p + 8) * 8 + r] | (uint)b[(2 * p + 9) * 8 + r] << 16;
    float4 sum = (float4)(0.0f);
    mma(&sum, left, first, second);
    const uint4 quad = transpose_quad((uint4)(p * 4, p * 4 + 1, p * 4 + 2, p * 4 + 3));
    wrong += quad.x != p || quad.y != 4 + p || quad.z != 8 + p || quad.w != 12 + p;
    const float2 same = unpack(multiply_pairs(pack(3.0f, -5.0f), pack(0.5f, 2.0f)));
    wrong += same.x != 1.5f || same.y != -10.0f;
    wrong += shuffle_up((float)lane, 1) != (float)(lane > 0 ? lane - 1 : 0);
    products += group * 128;
    products[r * 8 + 2 * p] = sum.x;
    products[r * 8 + 2 * p + 1] = sum.y;
    products[(r + 8) * 8 + 2 * p] = sum.z;
    products[(r + 8) * 8 + 2 * p + 1] = sum.w;
    faults[group * 32 + lane] = wrong;
}
