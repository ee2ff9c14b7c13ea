/* SPDX-License-Identifier: Apache-2.0 */
/* The backward pass of one chunk, see portable_backward.cl: gradients of its products, its final states and its map. */
#if GRADIENTS

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

#endif
