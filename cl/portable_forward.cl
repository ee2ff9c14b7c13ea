/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The forward pass, lane by lane: chunk by chunk the products that the heads share, then for each head
 *     o = MZ v + the sum over levels of weight * READ E        (scalar-gated: READ = exp(a) Q is a weight times Q)
 * and its states to the next chunk.
 */

#if IS_NEAR
/* Z_NEAR: the chunk's reads of the keys of the chunk before. */
void near_reads(const place *at) {
    product(at, CHUNK, CHUNK, DIM_K, ARRAY(READ), PAD_K, 1, HEAD_ARRAY(WRITE_BEFORE_T), CHUNK, ARRAY(Z_NEAR), CHUNK, 0,
            0, 0.0f);
}

/* Z_NEAR, or its gradient, times the level weights. */
void weigh_near(const place *at, matrix x) {
    const __global uint *levels = (const __global uint *)ARRAY(LEVEL_NEAR);
    for (uint i = ITEM; i < CHUNK * CHUNK; i += LANE_ITEMS) {
        x[i] *= ARRAY(WEIGHTS)[i / CHUNK * PORTABLE_WEIGHTS + levels[i]];
    }
    SYNC();
}
#endif

/* O += what the rows read of column j's state. */
LANE_PART void add_read(const loglin_panel p, const place *at, uint j, int index) {
    read_weights(p, at, j);
#if !IS_DELTA
    const float decay = exp(HEAD_ARRAY(DECAY)[index]);
    FOR_STRIPS(r, CHUNK) {
        put_strip(decay * get_strip(ARRAY(ROWS) + r) * get_strip(ARRAY(START) + r), ARRAY(ROWS) + r);
    }
    SYNC();
#endif
    product(at, CHUNK, PAD_V, DIM_K, IS_DELTA ? ARRAY(READ) : ARRAY(Q), PAD_K, 1, STATE(index), PAD_V, ARRAY(O), PAD_V,
            ARRAY(ROWS), ADD, 1.0f);
}

/* O, from the map, the values and the states. */
LANE_PART void chunk_output(const loglin_panel p, const place *at, const int *where) {
    product(at, CHUNK, PAD_V, CHUNK, ARRAY(MZ), CHUNK, 1, ARRAY(V), PAD_V, ARRAY(O), PAD_V, 0, A_LOWER, 0.0f);
    ROLLED for (uint j = 0; j < COLUMNS; j++) {
        if (is_read(j, where[j])) {
            add_read(p, at, j, where[j]);
        }
    }
#if IS_NEAR
    if (reads_near(at->slot)) {
        near_reads(at);
        weigh_near(at, ARRAY(Z_NEAR));
        product(at, CHUNK, PAD_V, CHUNK, ARRAY(Z_NEAR), CHUNK, 1, HEAD_ARRAY(V_BEFORE), PAD_V, ARRAY(O), PAD_V, 0, ADD,
                1.0f);
    }
#endif
}

/* What the next chunk reads one by one. */
void keep_near(const place *at) {
    (void)at;
#if IS_NEAR
    set_scaled(at, HEAD_ARRAY(V_BEFORE), ARRAY(V), 1.0f, CHUNK * PAD_V);
    transpose(at, HEAD_ARRAY(WRITE_BEFORE_T), CHUNK, ARRAY(WRITE), PAD_K, CHUNK, PAD_K);
#endif
}

/* The caller's buffers that the forward pass writes, their offsets applied. */
typedef struct {
    __global storage *o;
    __global float *final_values; /* may be NULL */
} outputs;

/* What one head leaves: its output, and its states to the next chunk (next) or, behind the last one, the caller's. */
LANE_PART void leave_head(const loglin_panel p, const place *at, const outputs *out, const int *where, int *next) {
    store_values(p, at, out->o, ARRAY(O));
    if (!(at->slot[SLOT_FLAGS] & SLOT_LAST)) {
        advance_states(at, where, next, NOWHERE);
        keep_near(at);
    } else if (out->final_values) {
        end_states(p, at, where, vacant_place(at, where), out->final_values);
    }
}

#if !GRADIENTS
LANE_KERNEL void
portable_forward(const loglin_panel p, __global float *ws, ulong lanes, const __global int *cu_seqlens, ulong cu_offset,
                 const __global storage *q, ulong q_offset, const __global storage *k, ulong k_offset,
                 const __global storage *v, ulong v_offset, const __global float *g, ulong g_offset,
                 const __global weight *level_scales, ulong weights_offset, const __global weight *beta,
                 ulong beta_offset, const __global float *values, ulong values_offset, const __global float *log_decay,
                 ulong decay_offset, __global storage *o, ulong o_offset, __global float *final_values,
                 ulong final_offset) {
    const inputs in = {q + q_offset, k + k_offset, v + v_offset, g ? g + g_offset : 0, level_scales + weights_offset,
                       beta ? beta + beta_offset : 0, values ? values + values_offset : 0,
                       log_decay ? log_decay + decay_offset : 0};
    const outputs out = {o + o_offset, final_values ? final_values + final_offset : 0};
    place at = find_lane(p, ws, lanes, (uint)get_group_id(0));
    EQUIP_LANE(at)
    cu_seqlens += cu_offset;
    int where[COLUMNS], next[COLUMNS];
    make_levels(&at);
    for (uint n = 0; (at.slot = find_slot(p, ws, cu_seqlens, at.sequence, n)) != 0; n++) {
        look_ahead(p, &at, &in, out.o, find_slot(p, ws, cu_seqlens, at.sequence, n + 1));
        load_group(p, &at, &in);
        for (at.head = 0; at.head < LANE_HEADS; at.head++) {
            if (at.slot[SLOT_FLAGS] & SLOT_FIRST) {
                begin_states(p, &at, &in, where);
            }
            load_head(p, &at, &in);
            make_read(p, &at, &in);
            chunk_output(p, &at, where);
            leave_head(p, &at, &out, where, next);
        }
        ROLLED for (uint j = 0; j < COLUMNS; j++) {
            where[j] = next[j];
        }
    }
}
#endif
