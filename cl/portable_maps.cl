/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The forward pass of the delta rule where lanes share the values of a head, which would all make the same maps:
 *     portable_maps   the maps of all chunks, which need no order; of each head's, `count` lanes take some
 *     portable_walk   the walk over the chunks, lane by lane of values
 */
#if MAPS_BEFORE
#define MAP_FLOATS (POOL_BEGIN - MAP_BEGIN)

/* The map of the lane's head for a wave of `waves`; as for all arrays, less what it counts from. */
matrix map_of(const loglin_panel p, const place *at, matrix maps, uint waves, uint wave) {
    return maps + ((ulong)(at->sequence * p.heads + at->first_head) * waves + wave) * MAP_FLOATS - MAP_BEGIN;
}

LANE_KERNEL void portable_maps(const loglin_panel p, __global float *ws, ulong lanes, ulong maps, uint waves,
                               uint count, const __global int *cu_seqlens, ulong cu_offset, const __global storage *q,
                               ulong q_offset, const __global storage *k, ulong k_offset, const __global float *g,
                               ulong g_offset, const __global weight *level_scales, ulong weights_offset,
                               const __global weight *beta, ulong beta_offset) {
    const inputs in = {.q = q + q_offset,
                       .k = k + k_offset,
                       .g = g ? g + g_offset : 0,
                       .level_scales = level_scales + weights_offset,
                       .beta = beta + beta_offset};
    const uint lane = (uint)get_group_id(0), value_parts = (DIM_V + PAD_V - 1) / PAD_V;
    place at = find_lane(p, ws, lanes, lane / count * value_parts);
    at.memory = ws + lanes + (ulong)lane * POOL_BEGIN;
    EQUIP_LANE(at)
    cu_seqlens += cu_offset;
    for (uint n = lane % count; (at.slot = find_slot(p, ws, cu_seqlens, at.sequence, n)) != 0; n += count) {
        at.map = map_of(p, &at, ws + maps, waves, n);
        look_ahead(p, &at, &in, 0, find_slot(p, ws, cu_seqlens, at.sequence, n + count));
        load_group(p, &at, &in);
        load_gates(p, &at, &in);
        make_write(&at);
        make_read(p, &at, &in);
    }
}

LANE_KERNEL void portable_walk(const loglin_panel p, __global float *ws, ulong lanes, ulong maps, uint waves,
                               const __global int *cu_seqlens, ulong cu_offset, const __global storage *v,
                               ulong v_offset, const __global float *values, ulong values_offset,
                               const __global float *log_decay, ulong decay_offset, __global storage *o, ulong o_offset,
                               __global float *final_values, ulong final_offset) {
    const inputs in = {.v = v + v_offset,
                       .values = values ? values + values_offset : 0,
                       .log_decay = log_decay ? log_decay + decay_offset : 0};
    place at = find_lane(p, ws, lanes, (uint)get_group_id(0));
    EQUIP_LANE(at)
    cu_seqlens += cu_offset;
    int where[COLUMNS], next[COLUMNS];
    for (uint n = 0; (at.slot = find_slot(p, ws, cu_seqlens, at.sequence, n)) != 0; n++) {
        const int flags = at.slot[SLOT_FLAGS];
        at.map = map_of(p, &at, ws + maps, waves, n);
        look_ahead(p, &at, &in, o + o_offset, find_slot(p, ws, cu_seqlens, at.sequence, n + 1));
        if (flags & SLOT_FIRST) {
            begin_states(p, &at, &in, where);
        }
        load_values(p, &at, at.memory + LANE_V, in.v);
        chunk_output(p, &at, where);
        store_values(p, &at, o + o_offset, at.memory + LANE_O);
        if (!(flags & SLOT_LAST)) {
            advance_states(&at, where, next, NOWHERE);
        } else if (final_values) {
            end_states(p, &at, where, vacant_place(&at, where), final_values + final_offset);
        }
        for (uint j = 0; j < COLUMNS; j++) {
            where[j] = next[j];
        }
    }
}

#endif
