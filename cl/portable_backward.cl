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

/* ---- Outputs to values, weights and states ----------------------------------------------------------------------- */

#if STRONG
/* D_LEVELS += x y by the pairs' levels: of each row up to its own column, or (whole) of all columns. */
void add_by_level(const place *at, operand pair_levels, operand x, operand y, int whole) {
    const __global uint *levels = (const __global uint *)pair_levels;
    for (uint r = ITEM; r < CHUNK; r += LANE_ITEMS) {
        for (uint i = r * CHUNK; i < r * CHUNK + (whole ? CHUNK : r + 1); i++) {
            ARRAY(D_LEVELS)[r * PORTABLE_WEIGHTS + levels[i]] += x[i] * y[i];
        }
    }
    SYNC();
}
#endif

/* D_LEVELS += Z_rs dS_rs by level, dS = dO V^T in D_MZ.  Weak: off the diagonal a block of 16 by 16 has one level. */
LANE_CALL void add_level_gradients(const place *at) {
#if STRONG
    add_by_level(at, ARRAY(LEVEL), ARRAY(Z), ARRAY(D_MZ), 0);
#else
    operand z = ARRAY(Z), ds = ARRAY(D_MZ);
    for (uint r = ITEM; r < CHUNK; r += LANE_ITEMS) {
        matrix to = ARRAY(D_LEVELS) + r * PORTABLE_WEIGHTS;
        for (uint s = 0; s <= r; s += 16) {
            const float16 x = get16(z + r * CHUNK + s) * get16(ds + r * CHUNK + s);
            if (s + 16 <= r) {
                to[bit_length((r ^ s) & ~15u)] += sum16(x);
                continue;
            }
            float each[16];
            vstore16(x, 0, each);
            for (uint i = s; i <= r; i++) {
                to[bit_length(r ^ i)] += each[i - s];
            }
        }
    }
    SYNC();
#endif
}

#if IS_NEAR
/*
 * Through the reads of the chunk before, O += Z_NEAR V_BEFORE with level weights, Z_NEAR = READ WRITE_BEFORE^T: to READ
 * and the weights here, and to what the chunk before finds as AHEAD.
 */
LANE_CALL void near_gradients(const place *at) {
    near_reads(at);
    transpose(at, ARRAY(V_BEFORE_T), CHUNK, HEAD_ARRAY(V_BEFORE), PAD_V, CHUNK, PAD_V);
    product(at, CHUNK, CHUNK, PAD_V, ARRAY(D_O), PAD_V, 1, ARRAY(V_BEFORE_T), CHUNK, ARRAY(D_NEAR), CHUNK, 0, 0, 0.0f);
    add_by_level(at, ARRAY(LEVEL_NEAR), ARRAY(Z_NEAR), ARRAY(D_NEAR), 1);
    weigh_near(at, ARRAY(Z_NEAR));
    weigh_near(at, ARRAY(D_NEAR));
    product(at, CHUNK, PAD_V, CHUNK, ARRAY(Z_NEAR), 1, CHUNK, ARRAY(D_O), PAD_V, HEAD_ARRAY(D_V_AHEAD), PAD_V, 0, 0,
            0.0f);
    product(at, PAD_K, CHUNK, CHUNK, ARRAY(READ), 1, PAD_K, ARRAY(D_NEAR), CHUNK, HEAD_ARRAY(D_WRITE_AHEAD_T), CHUNK, 0,
            0, 0.0f);
    transpose(at, ARRAY(D_NEAR_T), CHUNK, ARRAY(D_NEAR), CHUNK, CHUNK, CHUNK);
    product(at, PAD_K, CHUNK, CHUNK, HEAD_ARRAY(WRITE_BEFORE_T), CHUNK, 1, ARRAY(D_NEAR_T), CHUNK, ARRAY(D_READ_T),
            CHUNK, 0, ADD, 1.0f);
}
#endif

/* D_READ_T += weights decay ASKED_T, and the totals of decay ASKED . READ of the rows. */
#if LANE_ITEMS == 1
void add_asked(const place *at, float decay) {
    for (uint r = 0; r < CHUNK; r += 16) {
        const float16 weights = get16(ARRAY(ROWS) + r);
        float16 dots = 0.0f;
        for (uint k = 0; k < DIM_K; k++) {
            const uint i = k * CHUNK + r;
            const float16 asked = decay * get16(ARRAY(ASKED_T) + i);
            dots = fma(asked, get16(ARRAY(READ_T) + i), dots);
            put16(fma(weights, asked, get16(ARRAY(D_READ_T) + i)), ARRAY(D_READ_T) + i);
        }
        put16(dots, ARRAY(TOTALS) + r);
    }
}
#else
LANE_CALL void add_asked(const place *at, float decay) {
    for (uint i = ITEM; i < CHUNK * ROW_PARTS; i += LANE_ITEMS) {
        const uint r = i % CHUNK, part = i / CHUNK;
        float dot_of_part = 0.0f;
        for (uint k = part; k < DIM_K; k += ROW_PARTS) {
            const float asked = decay * ARRAY(ASKED_T)[k * CHUNK + r];
            dot_of_part = fma(asked, ARRAY(READ_T)[k * CHUNK + r], dot_of_part);
            ARRAY(D_READ_T)[k * CHUNK + r] += ARRAY(ROWS)[r] * asked;
        }
        at->shared[r * ROW_PARTS + part] = dot_of_part;
    }
    SYNC();
}
#endif

/*
 * A state's reads, E = decay times what stands there: with ASKED = dO E^T, D_READ += weight ASKED, the weight's
 * gradient is READ . ASKED, and D_E = keep D_E + (weight READ)^T dO.
 */
LANE_PART void read_gradients(const loglin_panel p, const place *at, uint j, operand state, float decay, matrix d_state,
                              float keep) {
    read_weights(p, at, j);
    product(at, PAD_K, CHUNK, PAD_V, state, PAD_V, 1, ARRAY(D_O_T), CHUNK, ARRAY(ASKED_T), CHUNK, 0, 0, 0.0f);
    add_asked(at, decay);
    for (uint r = ITEM; r < CHUNK; r += LANE_ITEMS) {
        const int level = level_seen(p, at, j, r);
        if (level < PORTABLE_WEIGHTS) {
            ARRAY(D_LEVELS)[r * PORTABLE_WEIGHTS + level] += total(at, 0, r);
        }
    }
    SYNC();
    scale_rows(at, ARRAY(WEIGHED_D_O), ARRAY(D_O), ARRAY(ROWS), PAD_V);
    product(at, PAD_K, PAD_V, CHUNK, ARRAY(READ), 1, PAD_K, ARRAY(WEIGHED_D_O), PAD_V, d_state, PAD_V, 0, ADD, keep);
}

/*
 * A state through the chunk: D_E = exp(a_C) D_E_END for the scalar-gated operator, which is left to do.  Delta rule, in
 * place: D_E = exp(a_C) D_E_END - K_START^T WRITE D_E_END, and what its keys get.  Returns the gradient of a_C.
 */
LANE_CALL float pass_gradients(const place *at, operand state, float decay, matrix d_state) {
    strip sums = 0.0f;
    FOR_STRIPS(i, SIZE_KV) {
        sums = fma(get_strip(state + i), get_strip(d_state + i), sums);
    }
    const float sum = sum_of_items(at, sum_of_strip(sums));
#if IS_DELTA
    product(at, CHUNK, PAD_V, DIM_K, ARRAY(K_START), PAD_K, 1, state, PAD_V, ARRAY(SEEN), PAD_V, 0, 0, 0.0f);
    product(at, CHUNK, PAD_V, DIM_K, ARRAY(WRITE), PAD_K, 1, d_state, PAD_V, ARRAY(GIVEN), PAD_V, 0, 0, 0.0f);
    transpose(at, ARRAY(SEEN_T), CHUNK, ARRAY(SEEN), PAD_V, CHUNK, PAD_V);
    transpose(at, ARRAY(GIVEN_T), CHUNK, ARRAY(GIVEN), PAD_V, CHUNK, PAD_V);
    product(at, PAD_K, CHUNK, PAD_V, d_state, PAD_V, 1, ARRAY(SEEN_T), CHUNK, ARRAY(D_WRITE_T), CHUNK, 0, SUBTRACT,
            1.0f);
    product(at, PAD_K, CHUNK, PAD_V, state, PAD_V, 1, ARRAY(GIVEN_T), CHUNK, ARRAY(D_K_START_T), CHUNK, 0, SUBTRACT,
            1.0f);
    product(at, PAD_K, PAD_V, CHUNK, ARRAY(K_START), 1, PAD_K, ARRAY(GIVEN), PAD_V, d_state, PAD_V, 0, SUBTRACT,
            chunk_decay(at));
#endif
    return chunk_decay(at) * decay * sum;
}

/* ---- Final states ----------------------------------------------------------------------------------------------- */

/* The caller's gradient of a level, padded. */
LANE_PART void load_level(const loglin_panel p, const place *at, matrix to, const __global float *values, int level) {
    for (uint k = FIRST_STATE_ROW; k < PAD_K; k += STATE_ROW_STEP) {
        const __global float *row = values + state_row(p, at, min(k, DIM_K - 1u)) + (ulong)level * DIM_K * DIM_V;
        for (uint i = FIRST_VALUE; i < PAD_V; i += VALUE_STEP) {
            to[k * PAD_V + i] = k < DIM_K && i < at->values ? row[i] : 0.0f;
        }
    }
    SYNC();
}

/*
 * What the final state of one level asks of its keys and values, rows begin .. end - 1: D_KEYS^T += d_state V^T, and
 * D_V += KEYS d_state.
 */
void key_gradients(const place *at, operand d_state, uint begin, uint end, operand keys, operand values,
                   matrix d_keys_t, matrix d_values) {
    (void)at;
    for (uint i = ITEM; i < (end - begin) * DIM_K; i += LANE_ITEMS) {
        const uint s = begin + i / DIM_K, k = i % DIM_K;
        d_keys_t[k * CHUNK + s] += row_dot(values + s * PAD_V, d_state + k * PAD_V, PAD_V);
    }
    for (uint i = ITEM; i < (end - begin) * (PAD_V / 16); i += LANE_ITEMS) {
        const uint s = begin + i / (PAD_V / 16), c = i % (PAD_V / 16) * 16;
        float16 sum = get16(d_values + s * PAD_V + c);
        for (uint k = 0; k < DIM_K; k++) {
            const float16 key = keys[s * PAD_K + k];
            sum = fma(key, get16(d_state + k * PAD_V + c), sum);
        }
        put16(sum, d_values + s * PAD_V + c);
    }
    SYNC();
}

/* What the final states ask of the last chunk's keys and values, level by level. */
LANE_PART void final_gradients(const loglin_panel p, const place *at, const __global float *dfinal, matrix scratch) {
    const uint last = (uint)at->slot[SLOT_HI] - 1;
    for (uint begin = (uint)at->slot[SLOT_LO], end; begin <= last; begin = end) {
        const int level = level_of(last, begin);
        for (end = begin + 1; end <= last && level_of(last, end) == level; end++) {
        }
        load_level(p, at, scratch, dfinal, level);
        key_gradients(at, scratch, begin, end, ARRAY(WRITE), ARRAY(V), ARRAY(D_WRITE_T), ARRAY(D_V));
    }
}

#if IS_NEAR
/*
 * And of the keys of the chunk before, WRITE_NEAR = exp(a_C) WRITE_BEFORE, for the delta rule - M_NEAR WRITE with
 * M_NEAR = WRITE_BEFORE K_START^T.  Returns the gradient of a_C.
 */
LANE_CALL float final_near_gradients(const loglin_panel p, const place *at, const __global float *dfinal,
                                     matrix scratch) {
    const uint last = CHUNK + (uint)at->slot[SLOT_HI] - 1;
    matrix d_keys_t = ARRAY(D_WRITE_NEAR_T), d_before_t = HEAD_ARRAY(D_WRITE_AHEAD_T);
    operand before_t = HEAD_ARRAY(WRITE_BEFORE_T);
    near_keys(at);
    set_zero(at, d_keys_t, PAD_K * CHUNK);
    for (uint begin = 0, end; begin < CHUNK; begin = end) {
        const int level = level_of(last, begin);
        for (end = begin + 1; end < CHUNK && level_of(last, end) == level; end++) {
        }
        load_level(p, at, scratch, dfinal, level);
        key_gradients(at, scratch, begin, end, ARRAY(WRITE_NEAR), HEAD_ARRAY(V_BEFORE), d_keys_t,
                      HEAD_ARRAY(D_V_AHEAD));
    }
    strip sums = 0.0f;
    FOR_STRIPS(i, PAD_K * CHUNK) {
        sums = fma(get_strip(d_keys_t + i), get_strip(before_t + i), sums);
    }
    const float sum = sum_of_items(at, sum_of_strip(sums));
    add_scaled(at, d_before_t, 1.0f, d_keys_t, chunk_decay(at), PAD_K * CHUNK);
#if IS_DELTA
    /* The gradient of M_NEAR^T, negated, is WRITE D_WRITE_NEAR^T. */
    product(at, CHUNK, CHUNK, DIM_K, ARRAY(WRITE), PAD_K, 1, d_keys_t, CHUNK, ARRAY(D_NEAR), CHUNK, 0, 0, 0.0f);
    product(at, PAD_K, CHUNK, CHUNK, ARRAY(K_START), 1, PAD_K, ARRAY(D_NEAR), CHUNK, d_before_t, CHUNK, 0, SUBTRACT,
            1.0f);
    transpose(at, ARRAY(D_NEAR_T), CHUNK, ARRAY(D_NEAR), CHUNK, CHUNK, CHUNK);
    product(at, PAD_K, CHUNK, CHUNK, before_t, CHUNK, 1, ARRAY(D_NEAR_T), CHUNK, ARRAY(D_K_START_T), CHUNK, 0, SUBTRACT,
            1.0f);
    transpose(at, ARRAY(D_NEAR_T), CHUNK, ARRAY(M_NEAR_T), CHUNK, CHUNK, CHUNK);
    product(at, PAD_K, CHUNK, CHUNK, d_keys_t, CHUNK, 1, ARRAY(D_NEAR_T), CHUNK, ARRAY(D_WRITE_T), CHUNK, 0, SUBTRACT,
            1.0f);
#endif
    return chunk_decay(at) * sum;
}
#endif

/* ---- The chunk's map -------------------------------------------------------------------------------------------- */

/* Row minus column sums of x y below the diagonal: what pairs decayed by exp(a_r - a_s) ask of the running sums. */
#if LANE_ITEMS == 1
void add_pair_gradients(const place *at, operand x, operand y, float sign) {
    for (uint r = 0; r < CHUNK; r++) {
        float16 of_row = 0.0f;
        for (uint s = 0; s <= r; s += 16) {
            const float16 product_of = sign * get16(x + r * CHUNK + s) * get16(y + r * CHUNK + s);
            const float16 below = select((float16)0.0f, product_of, s + COLUMNS_16 < r);
            of_row += below;
            put16(get16(ARRAY(D_GATE) + s) - below, ARRAY(D_GATE) + s);
        }
        ARRAY(D_GATE)[r] += sum16(of_row);
    }
}
#else
LANE_CALL void add_pair_gradients(const place *at, operand x, operand y, float sign) {
    for (uint r = ITEM; r < CHUNK; r += LANE_ITEMS) {
        float sum = 0.0f;
        for (uint s = 0; s < CHUNK; s++) {
            const uint i = s < r ? r * CHUNK + s : s * CHUNK + r;
            const float pair = s == r ? 0.0f : x[i] * y[i];
            sum += s < r ? pair : -pair;
        }
        ARRAY(D_GATE)[r] += sign * sum;
    }
    SYNC();
}
#endif

#if IS_DELTA
/* Through READ = exp(a) Q - Z K_START, WRITE = T^T K_END, Z = A T and T = (I + X)^-1 diag(beta). */
LANE_CALL void map_gradients(const place *at) {
    product(at, CHUNK, CHUNK, DIM_K, ARRAY(D_READ), PAD_K, 1, ARRAY(K_START_T), CHUNK, ARRAY(D_MZ), CHUNK, 0,
            C_LOWER | SUBTRACT, 1.0f);
    scale_triangle(at, ARRAY(D_MZ), ARRAY(D_MZ), 0, 0);
    product(at, CHUNK, PAD_K, CHUNK, ARRAY(Z), 1, CHUNK, ARRAY(D_READ), PAD_K, ARRAY(D_K_START), PAD_K, 0,
            A_UPPER | SUBTRACT, 1.0f);
    product(at, CHUNK, CHUNK, DIM_K, ARRAY(K_END), PAD_K, 1, ARRAY(D_WRITE_T), CHUNK, ARRAY(D_T), CHUNK, 0, C_LOWER,
            0.0f);
    product(at, CHUNK, PAD_K, CHUNK, ARRAY(T), CHUNK, 1, ARRAY(D_WRITE), PAD_K, ARRAY(D_K_END), PAD_K, 0, A_LOWER,
            0.0f);
    transpose(at, ARRAY(T_T), CHUNK, ARRAY(T), CHUNK, CHUNK, CHUNK);
    product(at, CHUNK, CHUNK, CHUNK, ARRAY(D_MZ), CHUNK, 1, ARRAY(T_T), CHUNK, ARRAY(D_A), CHUNK, 0, A_LOWER | C_LOWER,
            0.0f);
    product(at, CHUNK, CHUNK, CHUNK, ARRAY(A), 1, CHUNK, ARRAY(D_MZ), CHUNK, ARRAY(D_T), CHUNK, 0, A_UPPER | C_LOWER |
            ADD, 1.0f);
    scale_triangle(at, ARRAY(D_T), ARRAY(D_T), 0, 0);
    product(at, CHUNK, CHUNK, CHUNK, ARRAY(D_T), CHUNK, 1, ARRAY(T_T), CHUNK, ARRAY(TT), CHUNK, 0, A_LOWER | C_LOWER,
            0.0f);
    product(at, CHUNK, CHUNK, CHUNK, ARRAY(XINV), 1, CHUNK, ARRAY(TT), CHUNK, ARRAY(D_X), CHUNK, 0, A_UPPER | C_LOWER,
            0.0f);
    scale_triangle(at, ARRAY(D_X), ARRAY(D_X), 0, STRICT);
    add_pair_gradients(at, ARRAY(A), ARRAY(D_A), 1.0f);
    add_pair_gradients(at, ARRAY(X), ARRAY(D_X), -1.0f);
    /* X = diag(beta) times the decayed K K^T: from here on D_X is the gradient of that one's decay-free self. */
    scale_triangle(at, ARRAY(D_X), ARRAY(D_X), 0, DECAYED | STRICT);
    for (uint r = ITEM; r < CHUNK; r += LANE_ITEMS) {
        float sum = 0.0f;
        for (uint t = r; t < CHUNK; t++) {
            sum = fma(ARRAY(XINV)[t * CHUNK + r], ARRAY(D_T)[t * CHUNK + r], sum);
        }
        float16 sums = 0.0f;
        for (uint s = 0; s <= r; s += 16) {
            const float16 d_x = get16(ARRAY(D_X) + r * CHUNK + s);
            sums = fma(d_x, get16(ARRAY(KK) + r * CHUNK + s), sums);
            matrix to = ARRAY(D_KK) + r * CHUNK + s;
            put16(fma((float16)-ARRAY(BETA)[r], d_x, get16(to)), to);
        }
        ARRAY(D_BETA)[r] = sum - sum16(sums);
    }
    SYNC();
}
#endif

/* From D_MZ, D_READ, D_WRITE (and D_K_START) to the gates, and to what the lane's heads share. */
LANE_CALL void share_gradients(const place *at) {
    transpose(at, ARRAY(D_READ), PAD_K, ARRAY(D_READ_T), CHUNK, PAD_K, CHUNK);
    transpose(at, ARRAY(D_WRITE), PAD_K, ARRAY(D_WRITE_T), CHUNK, PAD_K, CHUNK);
    set_zero(at, ARRAY(D_GATE), CHUNK);
#if IS_DELTA
    transpose(at, ARRAY(D_K_START), PAD_K, ARRAY(D_K_START_T), CHUNK, PAD_K, CHUNK);
    map_gradients(at);
    operand d_pair = ARRAY(D_A), d_end = ARRAY(D_K_END);
#else
    operand d_pair = ARRAY(D_MZ), d_end = ARRAY(D_WRITE);
    add_pair_gradients(at, ARRAY(Z), ARRAY(D_MZ), 1.0f);
#endif
    scale_triangle(at, ARRAY(MZ), d_pair, 0, DECAYED); /* MZ has done its part */
    for (uint r = FIRST_ROW; r < CHUNK; r += ROW_STEP) {
        for (uint c = FIRST_COLUMN; c < r / 16 * 16 + 16; c += COLUMN_STEP) {
            const uint i = r * CHUNK + c;
            put_strip(get_strip(ARRAY(D_QK) + i) + get_strip(ARRAY(MZ) + i), ARRAY(D_QK) + i);
        }
        const float start = ARRAY(START)[r], end = ARRAY(END)[r];
        strip from_start = 0.0f, from_end = 0.0f;
        for (uint c = FIRST_COLUMN; c < PAD_K; c += COLUMN_STEP) {
            const uint i = r * PAD_K + c;
            const strip key = get_strip(ARRAY(KEY) + i), at_end = get_strip(d_end + i);
            const strip read = get_strip(ARRAY(D_READ) + i);
            strip d_key = end * at_end;
            from_end = fma(key, at_end, from_end);
            from_start = fma(get_strip(ARRAY(Q) + i), read, from_start);
            put_strip(fma((strip)start, read, get_strip(ARRAY(D_Q) + i)), ARRAY(D_Q) + i);
#if IS_DELTA
            const strip at_start = get_strip(ARRAY(D_K_START) + i);
            from_start = fma(key, at_start, from_start);
            d_key = fma((strip)start, at_start, d_key);
#endif
            put_strip(get_strip(ARRAY(D_KEY) + i) + d_key, ARRAY(D_KEY) + i);
        }
        PARTIAL(0, r) = sum_of_strip(from_start);
        PARTIAL(1, r) = sum_of_strip(from_end);
    }
    SYNC();
    for (uint r = ITEM; r < CHUNK; r += LANE_ITEMS) {
        ARRAY(D_GATE)[r] += ARRAY(START)[r] * total(at, 0, r);
        ARRAY(D_END)[r] = ARRAY(END)[r] * total(at, 1, r);
    }
    SYNC();
}

/* Products that the heads of the lane share: D_Q and D_KEY through q k^T and k k^T. */
LANE_PART void group_gradients(const place *at) {
    product(at, CHUNK, PAD_K, CHUNK, ARRAY(D_QK), CHUNK, 1, ARRAY(KEY), PAD_K, ARRAY(D_Q), PAD_K, 0, A_LOWER | ADD,
            1.0f);
    product(at, CHUNK, PAD_K, CHUNK, ARRAY(D_QK), 1, CHUNK, ARRAY(Q), PAD_K, ARRAY(D_KEY), PAD_K, 0, A_UPPER | ADD,
            1.0f);
#if IS_DELTA
    product(at, CHUNK, PAD_K, CHUNK, ARRAY(D_KK), CHUNK, 1, ARRAY(KEY), PAD_K, ARRAY(D_KEY), PAD_K, 0, A_LOWER | ADD,
            1.0f);
    product(at, CHUNK, PAD_K, CHUNK, ARRAY(D_KK), 1, CHUNK, ARRAY(KEY), PAD_K, ARRAY(D_KEY), PAD_K, 0, A_UPPER | ADD,
            1.0f);
#endif
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
    float16 sums[PAD_K / 16], values[PAD_K / 16], dots = 0.0f, squares = 0.0f;
    for (uint i = 0; i < PAD_K; i++) {
        float sum = 0.0f;
        for (uint part = 0; part < count && i < DIM_K; part++) {
            sum += from[part * stride + i];
        }
        ((float *)sums)[i] = scale * sum;
        ((float *)values)[i] = i < DIM_K ? load(x, i) : 0.0f;
    }
    for (uint i = 0; IS_NORMALIZED && i < PAD_K / 16; i++) {
        squares = fma(values[i], values[i], squares);
        dots = fma(values[i], sums[i], dots);
    }
    const float norm = 1.0f / sqrt(sum16(squares) + 1e-6f), along = norm * norm * sum16(dots);
    for (uint i = 0; i < DIM_K; i++) {
        const float sum = ((float *)sums)[i];
        store(to, i, IS_NORMALIZED ? norm * (sum - along * ((float *)values)[i]) : sum);
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
