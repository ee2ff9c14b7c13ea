/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The backward pass, lane by lane.  A lane walks its sequence forwards for the states at the
 * start of every segment of SEGMENT chunks; then segment by segment from the last one, forwards again for the states at
 * every chunk's start, and backwards for the gradients.  Adjoints of E walk backwards with it: what the chunk's reads
 * ask for, and what the next chunk's states hand back.  The formulas are those of src/operator; names with _T are
 * transposed.
 *
 * A lane adds its part of dq, dk, dg, dbeta and dlevel_scales into arrays of floats of its own; portable_reduce sums
 * the parts in a fixed order.
 */
#if GRADIENTS

/* The parts of the gradients: element offsets in the workspace. */
typedef struct {
    ulong q, k, g, beta, levels;
} parts;

/* Tokens of all sequences. */
ulong tokens_of(const loglin_panel p) {
    return p.packed ? p.length : p.length * p.sequences;
}

/* ---- States, forwards -------------------------------------------------------------------------------------------- */

#define SAVED(segment, column) (HEAD_ARRAY(SAVED) + ((ulong)(segment) * COLUMNS + (column)) * SIZE_KV)

/* The states at a segment's start, kept for good. */
LANE_PART void save_states(const place *at, const int *where, uint segment) {
    note_states(at, where, segment);
    for (uint j = 0; j < COLUMNS; j++) {
        if (where[j] != NOWHERE) {
            set_scaled(at, SAVED(segment, j), STATE(where[j]), 1.0f, SIZE_KV);
        }
    }
}

LANE_PART void restore_states(const place *at, int *where, uint segment) {
    for (uint j = 0; j < COLUMNS; j++) {
        where[j] = PLACES(segment)[j] != 0.0f ? (int)j : NOWHERE;
        if (where[j] != NOWHERE) {
            set_scaled(at, STATE(j), SAVED(segment, j), 1.0f, SIZE_KV);
            set_decay(at, (int)j, DECAYS(segment)[j]);
        }
    }
}

/* ---- To the parts ------------------------------------------------------------------------------------------------ */

/*
 * The head's dv, and its parts of dg, dbeta and dlevel_scales.  A gate takes part in the sums of its row and the rows
 * behind it, and in the decays to the end (d_decay: of the states) of the rows before it.
 */
LANE_PART void store_head(const loglin_panel p, const place *at, __global float *ws, parts to, __global storage *dv,
                          float d_decay) {
    float before = d_decay, behind = 0.0f;
    uint first = 0, last = CHUNK;
    for (uint r = ITEM; r < CHUNK; r += LANE_ITEMS) {
        for (; first < r; first++) {
            before += ARRAY(D_END)[first];
        }
        ARRAY(ROWS)[r] = before;
    }
    SYNC();
    for (uint i = ITEM; i < CHUNK; i += LANE_ITEMS) {
        const uint r = CHUNK - 1 - i;
        while (last > r) {
            behind += ARRAY(D_GATE)[--last];
        }
        const long token = row_token(at->slot, r);
        if (token < 0) {
            continue;
        }
        const ulong row = (ulong)token * p.heads + head_of(at);
        ws[to.g + row] = behind + ARRAY(ROWS)[r];
#if IS_DELTA
        ws[to.beta + row] = ARRAY(D_BETA)[r];
#endif
        for (uint level = 0; level < p.levels; level++) {
            ws[to.levels + row * p.levels + level] =
                level < PORTABLE_WEIGHTS ? ARRAY(D_LEVELS)[r * PORTABLE_WEIGHTS + level] : 0.0f;
        }
    }
    store_values(p, at, dv, ARRAY(D_V));
}

LANE_PART void store_group(const loglin_panel p, const place *at, __global float *ws, parts to) {
    for (uint r = FIRST_STATE_ROW; r < CHUNK; r += STATE_ROW_STEP) {
        const long token = row_token(at->slot, r);
        const ulong row = ((ulong)max(token, 0L) * p.groups + at->group) * DIM_K;
        for (uint k = FIRST_VALUE; token >= 0 && k < DIM_K; k += VALUE_STEP) {
            ws[to.q + row + k] = ARRAY(D_Q)[r * PAD_K + k];
            ws[to.k + row + k] = ARRAY(D_KEY)[r * PAD_K + k];
        }
    }
    SYNC();
}

/* ---- One chunk, backwards ---------------------------------------------------------------------------------------- */

#define ADJOINT(place) (HEAD_ARRAY(D_E) + (ulong)(place) * SIZE_KV)

/* How many states of this chunk have become the one in column `next`, from column j on. */
uint joining(const place *at, uint moment, int next, uint j) {
    uint count = 0;
    for (; j < COLUMNS; j++) {
        count += PLACES(moment)[j] != 0.0f && at->slot[SLOT_MAP + j] == next;
    }
    return count;
}

/* A place of the adjoints that neither the next chunk's nor this chunk's columns have. */
int free_adjoint(const int *behind, const int *here) {
    for (int index = 0;; index++) {
        int taken = 0;
        for (uint j = 0; j < COLUMNS; j++) {
            taken |= behind[j] == index || here[j] == index;
        }
        if (!taken) {
            return index;
        }
    }
}

/*
 * Where the adjoint of column j's state stands, with that of its state at the chunk's end in it, or zeros.  behind,
 * here: places of the next chunk's columns and of this one's; the last of the states that have become one takes its
 * place.
 */
LANE_PART int take_adjoint(const loglin_panel p, const place *at, uint moment, uint j, const int *behind,
                           const int *here, const __global float *dfinal) {
    const int next = at->slot[SLOT_MAP + j], last = at->slot[SLOT_FLAGS] & SLOT_LAST;
    if (!last && next >= 0 && joining(at, moment, next, j + 1) == 0) {
        return behind[next];
    }
    const int vacant = free_adjoint(behind, here);
    if (!last && next >= 0) {
        set_scaled(at, ADJOINT(vacant), ADJOINT(behind[next]), 1.0f, SIZE_KV);
    } else if (last && next >= 0 && dfinal) {
        load_level(p, at, ADJOINT(vacant), dfinal, next);
    } else {
        set_zero(at, ADJOINT(vacant), SIZE_KV);
    }
    return vacant;
}

/* One head: everything up to its parts of the gradients; moment: where its states are noted. */
LANE_PART void head_gradients(const loglin_panel p, const place *at, __global float *ws, parts to, uint moment,
                              const int *behind, int *here, const __global storage *d_o, __global storage *dv,
                              const __global float *dfinal) {
    const int last = at->slot[SLOT_FLAGS] & SLOT_LAST, own = at->slot[SLOT_OWN];
    load_values(p, at, ARRAY(D_O), d_o);
    transpose(at, ARRAY(D_O_T), CHUNK, ARRAY(D_O), PAD_V, CHUNK, PAD_V);
    transpose(at, ARRAY(V_T), CHUNK, ARRAY(V), PAD_V, CHUNK, PAD_V);
    transpose(at, ARRAY(READ_T), CHUNK, ARRAY(READ), PAD_K, CHUNK, PAD_K);
    set_zero(at, ARRAY(D_LEVELS), CHUNK * PORTABLE_WEIGHTS);
    set_zero(at, ARRAY(D_READ_T), PAD_K * CHUNK);
    if (IS_NEAR && !last) {
        set_scaled(at, ARRAY(D_WRITE_T), HEAD_ARRAY(D_WRITE_AHEAD_T), 1.0f, PAD_K * CHUNK);
    } else {
        set_zero(at, ARRAY(D_WRITE_T), PAD_K * CHUNK);
    }
#if IS_DELTA
    transpose(at, ARRAY(K_START_T), CHUNK, ARRAY(K_START), PAD_K, CHUNK, PAD_K);
    set_zero(at, ARRAY(D_K_START_T), PAD_K * CHUNK);
#endif
    product(at, CHUNK, CHUNK, PAD_V, ARRAY(D_O), PAD_V, 1, ARRAY(V_T), CHUNK, ARRAY(D_MZ), CHUNK, 0, C_LOWER, 0.0f);
    add_level_gradients(at);
    scale_triangle(at, ARRAY(D_MZ), ARRAY(D_MZ), 0, WEIGHED);
    product(at, CHUNK, PAD_V, CHUNK, ARRAY(MZ), 1, CHUNK, ARRAY(D_O), PAD_V, ARRAY(D_V), PAD_V, 0, A_UPPER, 0.0f);
#if IS_NEAR
    if (!last) {
        add_scaled(at, ARRAY(D_V), 1.0f, HEAD_ARRAY(D_V_AHEAD), 1.0f, CHUNK * PAD_V);
    }
    if (reads_near(at->slot)) {
        near_gradients(at);
    }
#endif
    if (!last && own >= 0) {
        operand d_own = ADJOINT(behind[own]);
        product(at, PAD_K, CHUNK, PAD_V, d_own, PAD_V, 1, ARRAY(V_T), CHUNK, ARRAY(D_WRITE_T), CHUNK, 0, ADD, 1.0f);
        product(at, CHUNK, PAD_V, DIM_K, ARRAY(WRITE), PAD_K, 1, d_own, PAD_V, ARRAY(D_V), PAD_V, 0, ADD, 1.0f);
    }
    for (uint j = 0; j < COLUMNS; j++) {
        here[j] = NOWHERE;
    }
    float d_decay = 0.0f;
    for (uint j = 0; j < COLUMNS; j++) {
        if (PLACES(moment)[j] != 0.0f) {
            here[j] = take_adjoint(p, at, moment, j, behind, here, dfinal);
            operand state = STATE((int)PLACES(moment)[j] - 1);
            const float decay = exp(DECAYS(moment)[j]);
            d_decay += pass_gradients(at, state, decay, ADJOINT(here[j]));
            const float keep = IS_DELTA ? 1.0f : chunk_decay(at);
            if (is_read(j, here[j])) {
                read_gradients(p, at, j, state, decay, ADJOINT(here[j]), keep);
            } else {
                set_scaled(at, ADJOINT(here[j]), ADJOINT(here[j]), keep, SIZE_KV);
            }
        }
    }
    if (last && dfinal) {
        matrix scratch = ADJOINT(free_adjoint(behind, here));
        final_gradients(p, at, dfinal, scratch);
#if IS_NEAR
        d_decay += reads_near(at->slot) ? final_near_gradients(p, at, dfinal, scratch) : 0.0f;
#endif
    }
    share_gradients(at);
    store_head(p, at, ws, to, dv, d_decay);
}

/* The gradient of the caller's initial states, at the first chunk of a sequence. */
LANE_PART void store_initial(const loglin_panel p, const place *at, __global float *to, const int *here) {
    for (uint level = 0; level < p.levels; level++) {
        const int column = initial_column(p, (int)level, (uint)at->slot[SLOT_TIME]);
        for (uint k = FIRST_STATE_ROW; k < DIM_K; k += STATE_ROW_STEP) {
            __global float *row = to + state_row(p, at, k) + (ulong)level * DIM_K * DIM_V;
            for (uint i = FIRST_VALUE; i < at->values; i += VALUE_STEP) {
                row[i] = column >= 0 ? ADJOINT(here[column])[k * PAD_V + i] : 0.0f;
            }
        }
    }
    SYNC();
}

/* What the chunk's heads write: enough to walk the states on. */
void load_chunk_states(const loglin_panel p, place *at, const inputs *in) {
    load_keys(p, at, ARRAY(KEY), in->k, 1.0f);
#if IS_DELTA
    transpose(at, ARRAY(KEY_T), CHUNK, ARRAY(KEY), PAD_K, CHUNK, PAD_K);
    product(at, CHUNK, CHUNK, DIM_K, ARRAY(KEY), PAD_K, 1, ARRAY(KEY_T), CHUNK, ARRAY(KK), CHUNK, 0, C_LOWER, 0.0f);
#endif
}

#if IS_NEAR
/* What the chunk reads one by one, of every head: keys and values of the chunk before, at `slot`. */
void load_near(const loglin_panel p, place *at, const inputs *in, const __global int *slot) {
    const __global int *here = at->slot;
    at->slot = slot;
    load_chunk_states(p, at, in);
    for (at->head = 0; at->head < LANE_HEADS; at->head++) {
        load_head(p, at, in);
        keep_near(at);
    }
    at->slot = here;
}
#endif

/*
 * The states of the waves first .. end - 1: those at the start of each segment are saved (save), or those of every
 * chunk stay where they are and are noted.
 */
LANE_PART void walk_states(const loglin_panel p, place *at, const __global float *ws, const __global int *cu_seqlens,
                           const inputs *in, uint first, uint end, int save) {
    int where[COLUMNS], next[COLUMNS], fresh = COLUMNS;
    for (uint n = first; n < end; n++) {
        at->slot = find_slot(p, ws, cu_seqlens, at->sequence, n);
        load_chunk_states(p, at, in);
        int after = NOWHERE;
        for (at->head = 0; at->head < LANE_HEADS; at->head++) {
            if (n == 0) {
                begin_states(p, at, in, where);
            } else if (n == first) {
                restore_states(at, where, n / SEGMENT);
            }
            if (!save) {
                note_states(at, where, SEGMENTS + n - first);
            } else if (n % SEGMENT == 0) {
                save_states(at, where, n / SEGMENT);
            }
            if (n + 1 < end) {
                load_head(p, at, in);
                after = advance_states(at, where, next, save ? NOWHERE : fresh);
            }
        }
        for (uint j = 0; j < COLUMNS && n + 1 < end; j++) {
            where[j] = next[j];
        }
        fresh = after;
    }
}

LANE_KERNEL void
portable_backward(const loglin_panel p, __global float *ws, ulong lanes, ulong q_parts, ulong k_parts, ulong g_parts,
                  ulong beta_parts, ulong level_parts, const __global int *cu_seqlens, ulong cu_offset,
                  const __global storage *q, ulong q_offset, const __global storage *k, ulong k_offset,
                  const __global storage *v, ulong v_offset, const __global float *g, ulong g_offset,
                  const __global weight *level_scales, ulong weights_offset, const __global weight *beta,
                  ulong beta_offset, const __global float *values, ulong values_offset,
                  const __global float *log_decay, ulong decay_offset, const __global storage *d_o, ulong d_o_offset,
                  const __global float *dfinal, ulong dfinal_offset, __global storage *dv, ulong dv_offset,
                  __global float *dinitial, ulong dinitial_offset) {
    const inputs in = {q + q_offset, k + k_offset, v + v_offset, g ? g + g_offset : 0, level_scales + weights_offset,
                       beta ? beta + beta_offset : 0, values ? values + values_offset : 0,
                       log_decay ? log_decay + decay_offset : 0};
    const uint lane = (uint)get_group_id(0);
    const uint value_parts = (DIM_V + PAD_V - 1) / PAD_V, group_parts = p.heads / p.groups / LANE_HEADS * value_parts;
    const ulong of_values = (ulong)(lane % value_parts) * tokens_of(p) * p.heads;
    const ulong of_group = (ulong)(lane % group_parts) * tokens_of(p) * p.groups * DIM_K;
    const parts to = {q_parts + of_group, k_parts + of_group, g_parts + of_values, beta_parts + of_values,
                      level_parts + of_values * p.levels};
    place at = find_lane(p, ws, lanes, (uint)get_group_id(0));
    EQUIP_LANE(at)
    cu_seqlens += cu_offset;
    make_levels(&at);
    uint waves = 0;
    while (find_slot(p, ws, cu_seqlens, at.sequence, waves)) {
        waves++;
    }
    const uint segments = (waves + SEGMENT - 1) / SEGMENT;
    if (segments > 1) {
        walk_states(p, &at, ws, cu_seqlens, &in, 0, (segments - 1) * SEGMENT + 1, 1);
    }
    int behind[COLUMNS], here[COLUMNS];
    for (uint j = 0; j < COLUMNS; j++) {
        behind[j] = NOWHERE;
    }
    for (uint segment = segments; segment-- > 0;) {
        const uint first = segment * SEGMENT, end = min(first + SEGMENT, waves);
        walk_states(p, &at, ws, cu_seqlens, &in, first, end, 0);
        for (uint n = end; n-- > first;) {
            at.slot = find_slot(p, ws, cu_seqlens, at.sequence, n);
#if IS_NEAR
            if (n > 0) {
                load_near(p, &at, &in, find_slot(p, ws, cu_seqlens, at.sequence, n - 1));
            }
#endif
            load_group(p, &at, &in);
            set_zero(&at, at.memory + LANE_D_QK, CHUNK * CHUNK);
            set_zero(&at, at.memory + LANE_D_Q, CHUNK * PAD_K);
            set_zero(&at, at.memory + LANE_D_KEY, CHUNK * PAD_K);
#if IS_DELTA
            set_zero(&at, at.memory + LANE_D_KK, CHUNK * CHUNK);
#endif
            for (at.head = 0; at.head < LANE_HEADS; at.head++) {
                load_head(p, &at, &in);
                make_read(p, &at, &in);
                head_gradients(p, &at, ws, to, SEGMENTS + n - first, behind, here, d_o + d_o_offset,
                               dv + dv_offset, dfinal ? dfinal + dfinal_offset : 0);
                if (n == 0 && dinitial) {
                    store_initial(p, &at, dinitial + dinitial_offset, here);
                }
            }
            group_gradients(&at);
            store_group(p, &at, ws, to);
            for (uint j = 0; j < COLUMNS; j++) {
                behind[j] = here[j];
            }
        }
    }
}

/* ---- The sums of the parts --------------------------------------------------------------------------------------- */

/* dq or dk of a token and group: the sum of the parts, through the scale and the normalisation. */
void reduce_row(const __global float *from, ulong stride, uint count, const __global storage *x, float scale,
                __global storage *to) {
    float16 sums[PAD_K / 16], dots = 0.0f, squares = 0.0f;
    for (uint i = 0; i < PAD_K; i++) {
        float sum = 0.0f;
        for (uint part = 0; part < count && i < DIM_K; part++) {
            sum += from[part * stride + i];
        }
        ((float *)sums)[i] = scale * sum;
    }
    for (uint i = 0; IS_NORMALIZED && i < PAD_K / 16; i++) {
        float16 values;
        for (uint j = 0; j < 16; j++) {
            ((float *)&values)[j] = 16 * i + j < DIM_K ? load(x, 16 * i + j) : 0.0f;
        }
        squares = fma(values, values, squares);
        dots = fma(values, sums[i], dots);
    }
    const float norm = 1.0f / sqrt(sum16(squares) + 1e-6f), along = norm * norm * sum16(dots);
    for (uint i = 0; i < DIM_K; i++) {
        const float sum = ((float *)sums)[i];
        store(to, i, IS_NORMALIZED ? norm * (sum - along * load(x, i)) : sum);
    }
}

/* One work-item a token. */
__kernel void portable_reduce(const loglin_panel p, const __global float *ws, ulong q_parts, ulong k_parts,
                              ulong g_parts, ulong beta_parts, ulong level_parts, const __global storage *q,
                              ulong q_offset, const __global storage *k, ulong k_offset, __global storage *dq,
                              ulong dq_offset, __global storage *dk, ulong dk_offset, __global float *dg,
                              ulong dg_offset, __global weight *dbeta, ulong dbeta_offset, __global weight *dlevels,
                              ulong dlevels_offset) {
    const ulong token = get_global_id(0);
    const uint value_parts = (DIM_V + PAD_V - 1) / PAD_V, group_parts = p.heads / p.groups / LANE_HEADS * value_parts;
    if (token >= tokens_of(p)) {
        return;
    }
    const ulong group_stride = tokens_of(p) * p.groups * DIM_K, stride = tokens_of(p) * p.heads;
    for (uint group = 0; group < p.groups; group++) {
        const ulong row = (token * p.groups + group) * DIM_K;
        reduce_row(ws + q_parts + row, group_stride, group_parts, q + q_offset + row, p.scale, dq + dq_offset + row);
        reduce_row(ws + k_parts + row, group_stride, group_parts, k + k_offset + row, 1.0f, dk + dk_offset + row);
    }
    for (ulong i = token * p.heads; i < (token + 1) * p.heads; i++) {
        float d_gate = 0.0f, d_beta = 0.0f;
        for (uint part = 0; part < value_parts; part++) {
            d_gate += ws[g_parts + part * stride + i];
            d_beta += IS_DELTA ? ws[beta_parts + part * stride + i] : 0.0f;
        }
        if (dg) {
            dg[dg_offset + i] = d_gate;
        }
        if (dbeta) {
            store_weight(dbeta, dbeta_offset + i, d_beta);
        }
        for (ulong level = i * p.levels; dlevels && level < (i + 1) * p.levels; level++) {
            float sum = 0.0f;
            for (uint part = 0; part < value_parts; part++) {
                sum += ws[level_parts + part * stride * p.levels + level];
            }
            store_weight(dlevels, dlevels_offset + level, sum);
        }
    }
}

#endif
