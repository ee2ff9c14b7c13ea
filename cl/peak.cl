/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The most that a device can do, for the tuner's report: nothing but fused multiply-adds, in eight independent chains of
 * 16, so that neither latency nor memory limits it.  2 * 8 * 16 * rounds operations a work-item.
 */
__kernel void peak(__global float *out, float a, float b, int rounds) {
    float16 x[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        x[i] = (float16)(a + (float)i);
    }
    for (int n = 0; n < rounds; n++) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            x[i] = fma(x[i], (float16)a, (float16)b);
        }
    }
    float16 sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        sum += x[i];
    }
    const float8 half_sum = sum.lo + sum.hi;
    const float4 quarter = half_sum.lo + half_sum.hi;
    out[get_global_id(0)] = quarter.x + quarter.y + quarter.z + quarter.w;
}
