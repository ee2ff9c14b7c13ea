/* SPDX-License-Identifier: Apache-2.0 */
/* The scalar-gated forward pass, see nvidia_mamba2.cl: states of blocks. */

/* ---- What states and outputs share ------------------------------------------------------------------------------- */

/* A tile of A with its columns multiplied by weights in pairs: columns 2p.. and 2p + 8... */
uint4 scale_columns(uint4 a, uint left, uint right) {
    return (uint4)(multiply_pairs(a.x, left), multiply_pairs(a.y, left), multiply_pairs(a.z, right),
                   multiply_pairs(a.w, right));
}

/* Four tiles of A of a chunk's tokens, decayed: the lane's pairs of decays. */
void decay_chunk(uint4 tiles[4], const __local uint *to) {
    const __local uint4 *pairs = (const __local uint4 *)(to + 8 * (warp_lane() % 4));
    const uint4 early = pairs[0], late = pairs[1];
    tiles[0] = scale_columns(tiles[0], early.x, early.y);
    tiles[1] = scale_columns(tiles[1], early.z, early.w);
    tiles[2] = scale_columns(tiles[2], late.x, late.y);
    tiles[3] = scale_columns(tiles[3], late.z, late.w);
}

/* Rows r and r + 8 of a warp's 16, 32 columns, times unit: the item p of a row's four gets columns 8 p... */
uint4 upper_piece(const float4 c[4], float unit) {
    return transpose_quad((uint4)(pack(c[0].x * unit, c[0].y * unit), pack(c[1].x * unit, c[1].y * unit),
                                  pack(c[2].x * unit, c[2].y * unit), pack(c[3].x * unit, c[3].y * unit)));
}

uint4 lower_piece(const float4 c[4], float unit) {
    return transpose_quad((uint4)(pack(c[0].z * unit, c[0].w * unit), pack(c[1].z * unit, c[1].w * unit),
                                  pack(c[2].z * unit, c[2].w * unit), pack(c[3].z * unit, c[3].w * unit)));
}

/* ---- states ------------------------------------------------------------------------------------------------------ */

/* The place of piece p (0) or p + 4 (1) of a state's row. */
uint piece_at(uint row, uint i) { return row * 8 + ((warp_lane() % 4 + 4 * i) ^ (row & 7u)); }

/* Adds a node of this work-group's, times weight. */
void add_node(float4 state[NV_K / 64][8], const __global uint4 *node, float weight) {
#pragma unroll
    for (uint m = 0; m < NV_K / 64; m++) {
        const uint row = 64 * m + get_local_id(0) % 128 / 32 * 16 + warp_lane() / 4;
#pragma unroll
        for (uint i = 0; i < 2; i++) {
            const uint4 upper = transpose_quad(node[piece_at(row, i)]), lower = transpose_quad(node[piece_at(row + 8, i)]);
            state[m][4 * i] += weight * (float4)(unpack(upper.x), unpack(lower.x));
            state[m][4 * i + 1] += weight * (float4)(unpack(upper.y), unpack(lower.y));
            state[m][4 * i + 2] += weight * (float4)(unpack(upper.z), unpack(lower.z));
            state[m][4 * i + 3] += weight * (float4)(unpack(upper.w), unpack(lower.w));
        }
    }
}

void store_node(__global uint4 *node, const float4 state[NV_K / 64][8]) {
#pragma unroll
    for (uint m = 0; m < NV_K / 64; m++) {
        const uint row = 64 * m + get_local_id(0) % 128 / 32 * 16 + warp_lane() / 4;
#pragma unroll
        for (uint i = 0; i < 2; i++) {
            node[piece_at(row, i)] = upper_piece(state[m] + 4 * i, 1.0f / STATE_UNIT);
            node[piece_at(row + 8, i)] = lower_piece(state[m] + 4 * i, 1.0f / STATE_UNIT);
        }
    }
}

#define STATE_STAGES 3
#define STATE_ITEMS (128 * NV_STATE_COUNT)

/* A warpgroup has an item; all share the keys. */
__kernel __attribute__((reqd_work_group_size(STATE_ITEMS, 1, 1))) void
nvidia_states(const loglin_nvidia_call call, __global float *ws, ulong ws_offset, const __global ushort *v,
              ulong v_offset, uint aligned) {
    __local uint4 values[STATE_STAGES][NV_STATE_COUNT][NV_CHUNK * 8] __attribute__((aligned(1024)));
    __local uint4 keys[STATE_STAGES][4 * K_STEPS * 32];
    __local uint4 decays[STATE_STAGES][NV_STATE_COUNT][NV_CHUNK / 8 + 1]; /* of the keys, and the half's `whole` */
    __local float blocks[NV_STATE_COUNT][NV_SUPER];
#if WGMMA
    __local arrivals keys_here[STATE_STAGES];
    if (get_local_id(0) == 0) {
        for (uint i = 0; i < STATE_STAGES; i++) {
            arrivals_start(&keys_here[i], 1);
        }
        tile_publish();
    }
#endif
    const uint lane = warp_lane(), own = same_in_warp(get_local_id(0) / 128);
    const uint warp = same_in_warp(get_local_id(0) % 128 / 32);
    const ulong id = get_group_id(0);
    const uint bundles = (ITEMS + NV_STATE_COUNT - 1) / NV_STATE_COUNT;
    const uint group = id / bundles % GROUPS, b = id / (bundles * GROUPS) % call.batch;
    const uint first = id / ((ulong)bundles * GROUPS) / call.batch * NV_SUPER;
    /* Behind the last item: the last one again. */
    const uint of_group = min((uint)(id % bundles) * NV_STATE_COUNT + own, (uint)ITEMS - 1);
    const uint head = group * (HEADS / GROUPS) + of_group / TILES_V, tile = of_group % TILES_V;
    const ulong bh = (ulong)b * HEADS + head;

    /* Segments before the last one; all their tokens are there. */
    const uint chunks = first + 1 < call.segments ? 4 * min((uint)NV_SUPER, call.segments - 1 - first) : 0;
    const __global ushort *values_from =
        v + v_offset + (((ulong)b * call.length + (ulong)first * NV_SEGMENT) * HEADS + head) * DIM_V + tile * NV_TILE_V;
    const __global half_gates *gates =
        (const __global half_gates *)place(ws, ws_offset, call.gates) + (bh * call.segments + first) * 2;
    const __global uint4 *record = (const __global uint4 *)place(ws, ws_offset, call.products) +
                                   (((ulong)b * GROUPS + group) * call.segments + first) * SEGMENT_RECORD;
    __global uint4 *nodes =
        (__global uint4 *)place(ws, ws_offset, call.nodes) + ((bh * TILES_V + tile) * call.segments + first) * STATE;

    float4 state[NV_K / 64][8];
#pragma unroll
    for (int m = 0; m < NV_K / 64; m++) {
        tile_clear(state[m]);
    }
    float since = 0.0f; /* of this segment's gates */
    for (uint n = 0; n < chunks + STATE_STAGES - 1; n++) {
        /* Stage n is started; the chunk that was started STATE_STAGES - 1 stages ago is worked on. */
        if (n >= STATE_STAGES - 1) {
            WAIT_FOR_COPIES_BUT(STATE_STAGES - 2);
            tile_publish();
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        if (n < chunks) {
            const uint stage = n % STATE_STAGES;
            fetch_rows(values[stage][own], values_from + (ulong)n * (NV_CHUNK * HEADS * DIM_V), HEADS * DIM_V, NV_CHUNK, 8,
                       NV_CHUNK, DIM_V - (int)tile * NV_TILE_V, get_local_id(0) % 128, 128, aligned);
            const __global uint4 *keys_from = record + (ulong)(n / 4) * SEGMENT_RECORD + n % 4 / 2 * RECORD + K_TILES +
                                              n % 2 * (4 * K_STEPS * 32);
#if WGMMA
            if (get_local_id(0) == 0) {
                copy_bulk(keys[stage], keys_from, 4 * K_STEPS * 32 * 16, &keys_here[stage]);
            }
#else
            fetch(keys[stage], keys_from, 4 * K_STEPS * 32, get_local_id(0), STATE_ITEMS);
#endif
            fetch(decays[stage][own], (const __global uint4 *)gates[n / 2].to_half + n % 2 * (NV_CHUNK / 8), NV_CHUNK / 8,
                  get_local_id(0) % 128, 128);
            fetch(&decays[stage][own][NV_CHUNK / 8], (const __global uint4 *)&gates[n / 2].whole, 1,
                  get_local_id(0) % 128, 128);
        }
        end_copies();
        if (n < STATE_STAGES - 1) {
            continue;
        }
        const uint chunk = n - (STATE_STAGES - 1), stage = chunk % STATE_STAGES, segment = chunk / 4;
        if (chunk % 2 == 0) {
            const uint4 whole = decays[stage][own][NV_CHUNK / 8];
            const float sum = as_float(whole.x), kept = chunk % 8 == 0 ? 0.0f : as_float(whole.y);
#pragma unroll
            for (int m = 0; m < NV_K / 64; m++) {
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    state[m][j] *= kept;
                }
            }
            since = chunk % 4 == 0 ? sum : since + sum;
        }
        const tile_rows rows = tile_at(values[stage][own]);
#if WGMMA
        arrivals_wait(&keys_here[stage], chunk / STATE_STAGES % 2);
#endif
#pragma unroll
        for (uint m = 0; m < NV_K / 64; m++) {
            uint4 a[4];
#pragma unroll
            for (uint step = 0; step < 4; step++) {
                a[step] = keys[stage][((4 * m + warp) * 4 + step) * 32 + lane];
            }
            decay_chunk(a, (const __local uint *)decays[stage][own]);
            tile_multiply(state[m], a, rows);
        }
#pragma unroll
        for (int m = 0; m < NV_K / 64; m++) {
            tile_wait(state[m]);
        }
        if (chunk % 4 == 3) {
            /* The segment before an odd one is in the sum already. */
            for (uint j = 0; (segment >> j & 1) != 0; j++) {
                const uint child = segment - (1u << j);
                if (j > 0) {
                    add_node(state, nodes + (ulong)child * STATE, decay(since) * STATE_UNIT);
                }
                since += blocks[own][child];
            }
            store_node(nodes + (ulong)segment * STATE, state);
            if (get_local_id(0) % 128 == 0) {
                blocks[own][segment] = since;
                ((__global float *)place(ws, ws_offset, call.sums))[bh * call.segments + first + segment] = since;
                ((__global float *)place(ws, ws_offset, call.blocks))[bh * call.segments + first + segment] = since;
            }
        }
    }
}

/* ---- tree -------------------------------------------------------------------------------------------------------- */

/* A work-group makes 32 uint4 of all nodes of a sequence, head and tile of V; a warp works on one node at a time. */
__kernel __attribute__((reqd_work_group_size(NV_ITEMS, 1, 1))) void
nvidia_tree(const loglin_nvidia_call call, __global float *ws, ulong ws_offset, __local float *blocks) {
    const uint lane = warp_lane(), warp = get_local_id(0) / 32;
    const uint slice = get_group_id(0) % (STATE / 32);
    const ulong matrix = get_group_id(0) / (STATE / 32), bh = matrix / TILES_V;
    __global uint4 *nodes = (__global uint4 *)place(ws, ws_offset, call.nodes) + matrix * call.segments * STATE +
                            slice * 32 + lane;
    const __global float *sums = (const __global float *)place(ws, ws_offset, call.sums) + bh * call.segments;
    __global float *all_blocks = (__global float *)place(ws, ws_offset, call.blocks) + bh * call.segments;
    for (uint e = get_local_id(0); e < call.segments; e += NV_ITEMS) {
        blocks[e] = sums[e];
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    /* The last segment is the end of no block that is read. */
    for (uint bits = NV_SUPER_BITS + 1; (1u << bits) < call.segments; bits++) {
        for (uint e = (1u << bits) - 1 + (warp << (bits + 1)); e + 1 < call.segments;
             e += (NV_ITEMS / 32) << (bits + 1)) {
            uint4 x = nodes[(ulong)e * STATE];
            float2 a = unpack(x.x), b = unpack(x.y), c = unpack(x.z), d = unpack(x.w);
            float since = sums[e];
            for (uint j = NV_SUPER_BITS; j < bits; j++) {
                const uint child = e - (1u << j);
                const float weight = decay(since);
                x = nodes[(ulong)child * STATE];
                a += weight * unpack(x.x);
                b += weight * unpack(x.y);
                c += weight * unpack(x.z);
                d += weight * unpack(x.w);
                since += blocks[child];
            }
            nodes[(ulong)e * STATE] = (uint4)(pack(a.x, a.y), pack(b.x, b.y), pack(c.x, c.y), pack(d.x, d.y));
            if (lane == 0) {
                blocks[e] = since;
                if (slice == 0 && matrix % TILES_V == 0) {
                    all_blocks[e] = since;
                }
            }
        }
        barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
    }
}
