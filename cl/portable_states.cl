/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Level states from chunk to chunk.  The pool E holds the states that exist, each at a place of its own with a log
 * decay; where[j] is the place of column j's state, -1 if there is none.  Through a chunk a scalar-gated state only
 * gathers decay, and one of the delta rule is rewritten; at the next chunk's start each joins the column where its
 * level then stands, so most states stay where they are.
 */

enum { NOWHERE = -1 };

#define STATE(index) (HEAD_ARRAY(E) + (ulong)(index) * SIZE_KV)

/* Row k of level 0 of the caller's states; levels follow at K V elements. */
ulong state_row(const loglin_panel p, const place *at, uint k) {
    return caller_state_at(p, at->sequence, head_of(at), k, at->first_value);
}

/* An item's elements of the caller's states: its rows, and columns next to those of its neighbours. */
#if LANE_ITEMS == 1
#define VALUE_STEP 1u
#else
#define VALUE_STEP 16u
#endif
#define FIRST_VALUE (ITEM % VALUE_STEP)
#define FIRST_STATE_ROW (ITEM / VALUE_STEP)
#define STATE_ROW_STEP (LANE_ITEMS / VALUE_STEP)

/* Every item has read what it needs of the decays before one is changed. */
LANE_PART void set_decay(const place *at, int index, float log_decay) {
    SYNC();
    if (ITEM == 0) {
        HEAD_ARRAY(DECAY)[index] = log_decay;
    }
    SYNC();
}

/* The states at a sequence's first chunk: the caller's, or none. */
LANE_PART void begin_states(const loglin_panel p, const place *at, const inputs *in, int *where) {
    ROLLED for (uint j = 0; j < COLUMNS; j++) {
        where[j] = NOWHERE;
    }
    for (uint level = 0; in->values && level < p.levels; level++) {
        const int column = initial_column(p, (int)level, (uint)at->slot[SLOT_TIME]);
        if (column < 0) {
            continue;
        }
        matrix to = STATE(column);
        if (where[column] == NOWHERE) {
            where[column] = column;
            set_decay(at, column, 0.0f);
            set_zero(at, to, SIZE_KV);
        }
        const ulong of_head = ((ulong)at->sequence * p.heads + head_of(at)) * p.levels;
        const float scale = in->log_decay ? exp(in->log_decay[of_head + level]) : 1.0f;
        for (uint k = FIRST_STATE_ROW; k < DIM_K; k += STATE_ROW_STEP) {
            const __global float *from = in->values + state_row(p, at, k) + (ulong)level * DIM_K * DIM_V;
            for (uint i = FIRST_VALUE; i < at->values; i += VALUE_STEP) {
                to[k * PAD_V + i] += scale * from[i];
            }
        }
        SYNC();
    }
}

/* A place that no column has. */
LANE_PART int free_place(const int *where) {
    ulong taken = 0;
    for (uint j = 0; j < COLUMNS; j++) {
        taken |= where[j] == NOWHERE ? 0ul : 1ul << where[j];
    }
    return (int)(63 - clz(~taken & (taken + 1)));
}

matrix vacant_place(const place *at, const int *where) {
    return STATE(free_place(where));
}

/* Is column j's state read?  The last one is not while its keys are read one by one. */
int is_read(uint j, int index) {
    return index != NOWHERE && j + IS_NEAR < COLUMNS;
}

/* The level of column j's state as row r sees it: below near_levels it moves with the row. */
int level_seen(const loglin_panel p, const place *at, uint j, uint r) {
    const int first = (int)(p.first_level + j);
    const uint time = (uint)at->slot[SLOT_TIME], low = (uint)at->slot[SLOT_LO];
    return first > (int)p.near_levels ? first : r < low ? PORTABLE_WEIGHTS : level_advance(first, time, time + r - low);
}

/* Column j's level weights of the rows, into ROWS. */
LANE_PART void read_weights(const loglin_panel p, const place *at, uint j) {
    for (uint r = ITEM; r < CHUNK; r += LANE_ITEMS) {
        const int level = level_seen(p, at, j, r);
        ARRAY(ROWS)[r] = level < (int)PORTABLE_WEIGHTS ? ARRAY(WEIGHTS)[r * PORTABLE_WEIGHTS + level] : 0.0f;
    }
    SYNC();
}

/* A state through the chunk, from place `from` to `to` (which may be the same). */
LANE_CALL void pass_state(const place *at, int from, int to) {
#if IS_DELTA
    product(at, CHUNK, PAD_V, DIM_K, ARRAY(K_START), PAD_K, 1, STATE(from), PAD_V, ARRAY(SEEN), PAD_V, 0, 0, 0.0f);
    if (GRADIENTS && from != to) { /* the forward pass changes states where they stand */
        set_scaled(at, STATE(to), STATE(from), 1.0f, SIZE_KV);
        set_decay(at, to, 0.0f);
    }
    product(at, PAD_K, PAD_V, CHUNK, ARRAY(WRITE), 1, PAD_K, ARRAY(SEEN), PAD_V, STATE(to), PAD_V, 0, SUBTRACT,
            chunk_decay(at));
#else
    set_decay(at, to, HEAD_ARRAY(DECAY)[from] + chunk_log_decay(at));
#endif
}

/* The chunk's own state. */
LANE_PART void own_state(const place *at, matrix to) {
#if IS_DELTA
    product(at, PAD_K, PAD_V, CHUNK, ARRAY(WRITE), 1, PAD_K, ARRAY(V), PAD_V, to, PAD_V, 0, 0, 0.0f);
#else
    product(at, PAD_K, PAD_V, CHUNK, ARRAY(KEY), 1, PAD_K, ARRAY(V_END), PAD_V, to, PAD_V, 0, 0, 0.0f);
#endif
}

/*
 * advance_states for the state of column j.  fresh: as there, the first of the places that were never used; first_fresh:
 * what it was for column 0.
 */
LANE_PART int advance_column(const place *at, const int *where, int *next, uint j, int fresh, int first_fresh) {
    const int column = at->slot[SLOT_MAP + j], keep = fresh != NOWHERE;
    operand decays = HEAD_ARRAY(DECAY);
    if (where[j] == NOWHERE || column < 0) {
        return fresh;
    }
    const int index = IS_DELTA && keep ? fresh++ : where[j];
    pass_state(at, where[j], index);
    if (next[column] == NOWHERE) {
        next[column] = index;
        return fresh;
    }
    if (STRONG && keep && next[column] < first_fresh) {
        set_scaled(at, STATE(fresh), STATE(next[column]), 1.0f, SIZE_KV);
        set_decay(at, fresh, decays[next[column]]);
        next[column] = fresh++;
    }
    const int first = next[column];
    add_scaled(at, STATE(first), exp(decays[first]), STATE(index), exp(decays[index]), SIZE_KV);
    set_decay(at, first, 0.0f);
    return fresh;
}

/*
 * The states at the next chunk's start: where they stand goes to `next`, the same for every head.  The own state takes
 * a free place; states that meet are added up in the place of the first, which is the own one wherever there is one
 * (always in the weak partition). fresh: NOWHERE, or the first of the places that were never used: then no state that
 * stands somewhere is changed. Returns the next such place.
 */
LANE_CALL int advance_states(const place *at, const int *where, int *next, int fresh) {
    const int own = at->slot[SLOT_OWN], first_fresh = fresh;
    ROLLED for (uint j = 0; j < COLUMNS; j++) {
        next[j] = NOWHERE;
    }
    if (own >= 0) {
        const int vacant = fresh != NOWHERE ? fresh++ : free_place(where);
        own_state(at, STATE(vacant));
        set_decay(at, vacant, 0.0f);
        next[own] = vacant;
    }
    ROLLED for (uint j = 0; j < COLUMNS; j++) {
        fresh = advance_column(at, where, next, j, fresh, first_fresh);
    }
    return fresh;
}

/* ---- Moments: the places of the states and their decays, noted down ---------------------------------------------- */

#define PLACES(moment) (ARRAY(PLACES) + (moment) * COLUMNS)
#define DECAYS(moment) (HEAD_ARRAY(DECAYS) + (moment) * COLUMNS)

/* decays: of the columns' states. */
void note_places(const place *at, uint moment, const int *where, const float *decays) {
    for (uint j = ITEM; j < COLUMNS; j += LANE_ITEMS) {
        PLACES(moment)[j] = (float)(where[j] + 1);
        DECAYS(moment)[j] = decays[j];
    }
    SYNC();
}

void recall_places(const place *at, uint moment, int *where, float *decays) {
    for (uint j = 0; j < COLUMNS; j++) {
        where[j] = (int)PLACES(moment)[j] - 1;
        decays[j] = DECAYS(moment)[j];
    }
}

/* The same with the decays of the lane's states. */
void note_states(const place *at, const int *where, uint moment) {
    float decays[COLUMNS];
    for (uint j = 0; j < COLUMNS; j++) {
        decays[j] = where[j] == NOWHERE ? 0.0f : HEAD_ARRAY(DECAY)[where[j]];
    }
    note_places(at, moment, where, decays);
}

/* ---- The final states -------------------------------------------------------------------------------------------- */

/* The caller's states of the head are zeros. */
LANE_PART void clear_levels(const loglin_panel p, const place *at, __global float *values) {
    for (uint level = 0; level < p.levels; level++) {
        for (uint k = FIRST_STATE_ROW; k < DIM_K; k += STATE_ROW_STEP) {
#pragma unroll 1 /* the addresses of wide states would be spilled */
            for (uint i = FIRST_VALUE; i < at->values; i += VALUE_STEP) {
                values[state_row(p, at, k) + (ulong)level * DIM_K * DIM_V + i] = 0.0f;
            }
        }
    }
    SYNC();
}

/* The caller's state of a level += scale * from. */
LANE_PART void add_to_level(const loglin_panel p, const place *at, __global float *values, int level, operand from,
                            float scale) {
    for (uint k = FIRST_STATE_ROW; k < DIM_K; k += STATE_ROW_STEP) {
        __global float *to = values + state_row(p, at, k) + (ulong)level * DIM_K * DIM_V;
        for (uint first = FIRST_VALUE; first < at->values; first += BATCH * VALUE_STEP) {
            float x[BATCH];
#pragma unroll
            for (uint j = 0; j < BATCH; j++) {
                const uint i = first + j * VALUE_STEP;
                x[j] = i < at->values ? fma(scale, from[k * PAD_V + i], to[i]) : 0.0f;
            }
#pragma unroll
            for (uint j = 0; j < BATCH; j++) {
                const uint i = first + j * VALUE_STEP;
                if (i < at->values) {
                    to[i] = x[j];
                }
            }
        }
    }
    SYNC();
}

/* A state through the last chunk, and to its level. */
LANE_PART void end_column(const loglin_panel p, const place *at, int index, int level, __global float *values) {
    if (index != NOWHERE && level >= 0) {
        pass_state(at, index, index);
        add_to_level(p, at, values, level, STATE(index), exp(HEAD_ARRAY(DECAY)[index]));
    }
}

/* Keys and values of rows begin .. end - 1, which stand at the same level: += keys^T values. */
LANE_PART void add_keys_to_level(const loglin_panel p, const place *at, __global float *values, int level, operand keys,
                                 operand of_values, uint begin, uint end, matrix scratch) {
    product(at, PAD_K, PAD_V, end - begin, keys + begin * PAD_K, 1, PAD_K, of_values + begin * PAD_V, PAD_V, scratch,
            PAD_V, 0, 0, 0.0f);
    add_to_level(p, at, values, level, scratch, 1.0f);
}

/* Those of the last chunk. */
LANE_PART void add_own_keys(const loglin_panel p, const place *at, __global float *values, matrix scratch) {
    const uint last = (uint)at->slot[SLOT_HI] - 1;
    for (uint begin = (uint)at->slot[SLOT_LO], end; begin <= last; begin = end) {
        const int level = level_of(last, begin);
        for (end = begin + 1; end <= last && level_of(last, end) == level; end++) {
        }
        add_keys_to_level(p, at, values, level, IS_DELTA ? ARRAY(WRITE) : ARRAY(KEY), IS_DELTA ? ARRAY(V) : ARRAY(V_END),
                          begin, end, scratch);
    }
}

#if IS_NEAR
/* WRITE_NEAR: the keys of the chunk before, through this chunk. */
void near_keys(const place *at) {
    transpose(at, ARRAY(WRITE_NEAR), PAD_K, HEAD_ARRAY(WRITE_BEFORE_T), CHUNK, PAD_K, CHUNK);
    const float decay = chunk_decay(at);
#if IS_DELTA
    product(at, CHUNK, CHUNK, DIM_K, ARRAY(K_START), PAD_K, 1, HEAD_ARRAY(WRITE_BEFORE_T), CHUNK, ARRAY(M_NEAR_T),
            CHUNK, 0, 0, 0.0f);
    product(at, CHUNK, PAD_K, CHUNK, ARRAY(M_NEAR_T), 1, CHUNK, ARRAY(WRITE), PAD_K, ARRAY(WRITE_NEAR), PAD_K, 0,
            SUBTRACT, decay);
#else
    set_scaled(at, ARRAY(WRITE_NEAR), ARRAY(WRITE_NEAR), decay, CHUNK * PAD_K);
#endif
}
#endif

/* The states after the last token, from the last chunk of a sequence.  scratch: a place that no column has. */
LANE_PART void end_states(const loglin_panel p, const place *at, const int *where, matrix scratch,
                          __global float *values) {
    clear_levels(p, at, values);
    ROLLED for (uint j = 0; j < COLUMNS; j++) {
        end_column(p, at, where[j], at->slot[SLOT_MAP + j], values);
    }
    add_own_keys(p, at, values, scratch);
#if IS_NEAR
    if (reads_near(at->slot)) {
        const uint last = (uint)at->slot[SLOT_HI] - 1;
        near_keys(at);
        for (uint begin = 0, end; begin < CHUNK; begin = end) {
            const int level = level_of(CHUNK + last, begin);
            for (end = begin + 1; end < CHUNK && level_of(CHUNK + last, end) == level; end++) {
            }
            add_keys_to_level(p, at, values, level, ARRAY(WRITE_NEAR), HEAD_ARRAY(V_BEFORE), begin, end, scratch);
        }
    }
#endif
}
