/* SPDX-License-Identifier: Apache-2.0 */
/*
 * C = A B by the tile interface, before it is trusted: one work-group, by the same function that the kernels use.
 * waves: the size of the sub-groups that the compiler has chosen, and of those that the instruction needs.  PROBE_ROWS,
 * PROBE_COLUMNS, PROBE_DEPTH: whole slabs and parts of them.
 */
#define PROBE_ROWS 80
#define PROBE_COLUMNS 112
#define PROBE_DEPTH 48

__attribute__((reqd_work_group_size(LANE_ITEMS, 1, 1))) MMA_KERNEL __kernel void
mma_probe(const __global float *a, const __global float *b, __global float *c, __global uint *waves) {
    __local float16 slabs[(SLAB_FLOATS + 15) / 16];
    place at = {0};
    at.shared = (__local float *)slabs;
    product(&at, PROBE_ROWS, PROBE_COLUMNS, PROBE_DEPTH, a, PROBE_DEPTH, 1, b, PROBE_COLUMNS, c, PROBE_COLUMNS, 0, 0,
            0.0f);
    if (get_local_id(0) == 0) {
        waves[0] = MMA_WAVE;
        waves[1] = MMA_TEAM;
    }
}
