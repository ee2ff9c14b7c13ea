/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The forward pass where there are fewer sequences and heads than cores: the chunks of each are spread over SPREAD
 * lanes, which take them by turns (scalar-gated operator, weak partition; a lane has one head and all of its values).
 *     portable_own     every chunk's own state, to its place in the pool that the lanes share
 *     portable_merge   the walk over the chunks: only the sums of states that meet, in PORTABLE_SLICES parts
 *     portable_read    every chunk's outputs, from the states that portable_merge has noted for it
 * States that meet are added up in the own place of the chunk before, whose state by itself is never read; so what a
 * chunk reads stays as it is, and the chunks need no order.
 */
#if SPREAD

/* The own place of a wave's chunk; the first places are those of the caller's states. */
matrix own_place(const place *at, uint wave) {
    return STATE(COLUMNS + wave);
}

/* One of the head's `count` lanes, and which of them it is. */
place find_spread(const loglin_panel p, __global float *ws, ulong lanes, ulong pools, uint count, uint *part) {
    const uint lane = (uint)get_group_id(0);
    place at = find_lane(p, ws, lanes, lane / count);
    *part = lane % count;
    at.memory = ws + lanes + (ulong)lane * POOL_BEGIN;
    at.map = at.memory;
    at.pool = ws + pools + (ulong)(lane / count) * ((LANE_FLOATS - POOL_BEGIN + 15) / 16 * 16) - POOL_BEGIN;
    return at;
}

/*
 * A part's wave of a round of SPREAD waves.  It takes each place of a round in turn: a chunk reads a state for every
 * bit of its number, so equal places would make unequal lanes.
 */
uint wave_of(uint part, uint round) { return round * SPREAD + (part + round) % SPREAD; }

/* What the wave's chunk leaves behind: its state and its decay. */
void make_own(const loglin_panel p, const place *at, const inputs *in, uint wave) {
    load_keys(p, at, ARRAY(KEY), in->k, 1.0f);
    load_head(p, at, in);
    own_state(at, own_place(at, wave));
    if (ITEM == 0) {
        ARRAY(CHUNK_DECAY)[wave] = chunk_log_decay(at);
    }
}

LANE_KERNEL void portable_own(const loglin_panel p, __global float *ws, ulong lanes, ulong pools,
                              const __global int *cu_seqlens, ulong cu_offset, const __global storage *k,
                              ulong k_offset, const __global storage *v, ulong v_offset, const __global float *g,
                              ulong g_offset, const __global float *values, ulong values_offset,
                              const __global float *log_decay, ulong decay_offset) {
    const inputs in = {.k = k + k_offset,
                       .v = v + v_offset,
                       .g = g ? g + g_offset : 0,
                       .values = values ? values + values_offset : 0,
                       .log_decay = log_decay ? log_decay + decay_offset : 0};
    uint part;
    place at = find_spread(p, ws, lanes, pools, SPREAD, &part);
    EQUIP_LANE(at)
    cu_seqlens += cu_offset;
    for (uint round = 0;; round++) {
        const uint n = wave_of(part, round);
        at.slot = find_slot(p, ws, cu_seqlens, at.sequence, n);
        if (at.slot == 0) {
            return;
        }
        if (n == 0) {
            int where[COLUMNS];
            begin_states(p, &at, &in, where);
            note_states(&at, where, 0);
        }
        look_ahead(p, &at, &in, 0, find_slot(p, ws, cu_seqlens, at.sequence, wave_of(part, round + 1)));
        make_own(p, &at, &in, n);
    }
}

/* advance_states for a slice of states that need not be changed otherwise; decays: of the columns' states. */
void merge_states(const place *at, uint wave, uint slice, int *where, float *decays) {
    const uint size = SIZE_KV / PORTABLE_SLICES;
    int next[COLUMNS];
    float next_decays[COLUMNS];
    for (uint j = 0; j < COLUMNS; j++) {
        next[j] = NOWHERE;
        next_decays[j] = 0.0f;
    }
    if (at->slot[SLOT_OWN] >= 0) {
        next[at->slot[SLOT_OWN]] = COLUMNS + wave;
    }
    for (uint j = 0; j < COLUMNS; j++) {
        const int column = at->slot[SLOT_MAP + j];
        if (where[j] == NOWHERE || column < 0) {
            continue;
        }
        const float decay = decays[j] + ARRAY(CHUNK_DECAY)[wave];
        if (next[column] == NOWHERE) {
            next[column] = where[j];
            next_decays[column] = decay;
        } else {
            add_scaled(at, STATE(next[column]) + slice * size, exp(next_decays[column]),
                       STATE(where[j]) + slice * size, exp(decay), size);
            next_decays[column] = 0.0f;
        }
    }
    for (uint j = 0; j < COLUMNS; j++) {
        where[j] = next[j];
        decays[j] = next_decays[j];
    }
}

LANE_KERNEL void portable_merge(const loglin_panel p, __global float *ws, ulong lanes, ulong pools,
                                const __global int *cu_seqlens, ulong cu_offset) {
    uint slice;
    place at = find_spread(p, ws, lanes, pools, PORTABLE_SLICES, &slice);
    cu_seqlens += cu_offset;
    int where[COLUMNS];
    float decays[COLUMNS];
    recall_places(&at, 0, where, decays);
    for (uint n = 0; (at.slot = find_slot(p, ws, cu_seqlens, at.sequence, n)) != 0; n++) {
        if (n > 0 && slice == 0) {
            note_places(&at, n, where, decays);
        }
        if (!(at.slot[SLOT_FLAGS] & SLOT_LAST)) {
            merge_states(&at, n, slice, where, decays);
        }
    }
}

/* The states of the wave's chunk; their decays become the lane's. */
void recall_states(const place *at, uint wave, int *where) {
    float decays[COLUMNS];
    recall_places(at, wave, where, decays);
    for (uint j = 0; j < COLUMNS; j++) {
        if (where[j] != NOWHERE) {
            set_decay(at, where[j], decays[j]);
        }
    }
}

LANE_KERNEL void portable_read(const loglin_panel p, __global float *ws, ulong lanes, ulong pools,
                               const __global int *cu_seqlens, ulong cu_offset, const __global storage *q,
                               ulong q_offset, const __global storage *k, ulong k_offset, const __global storage *v,
                               ulong v_offset, const __global float *g, ulong g_offset,
                               const __global weight *level_scales, ulong weights_offset, __global storage *o,
                               ulong o_offset, __global float *final_values, ulong final_offset) {
    const inputs in = {q + q_offset, k + k_offset, v + v_offset, g ? g + g_offset : 0, level_scales + weights_offset,
                       0, 0, 0};
    uint part;
    place at = find_spread(p, ws, lanes, pools, SPREAD, &part);
    EQUIP_LANE(at)
    cu_seqlens += cu_offset;
    for (uint round = 0;; round++) {
        const uint n = wave_of(part, round);
        at.slot = find_slot(p, ws, cu_seqlens, at.sequence, n);
        if (at.slot == 0) {
            return;
        }
        int where[COLUMNS];
        recall_states(&at, n, where);
        look_ahead(p, &at, &in, o + o_offset, find_slot(p, ws, cu_seqlens, at.sequence, wave_of(part, round + 1)));
        load_group(p, &at, &in);
        load_head(p, &at, &in);
        make_read(p, &at, &in);
        chunk_output(p, &at, where);
        store_values(p, &at, o + o_offset, at.memory + LANE_O);
        if ((at.slot[SLOT_FLAGS] & SLOT_LAST) && final_values) {
            end_states(p, &at, where, own_place(&at, n), final_values + final_offset);
        }
    }
}

#endif
