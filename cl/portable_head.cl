/* SPDX-License-Identifier: Apache-2.0 */
/* A lane's view of one head of a chunk, see portable_chunk.cl: its rows, its map and its products. */

/* ---- One head ---------------------------------------------------------------------------------------------------- */

LANE_PART void load_values(const loglin_panel p, const place *at, matrix to, const __global storage *from) {
    for (uint r = FIRST_ROW; r < CHUNK; r += ROW_STEP) {
        const long token = row_token(at->slot, r);
        const __global storage *row = from + ((ulong)max(token, 0L) * p.heads + head_of(at)) * DIM_V + at->first_value;
        for (uint c = FIRST_COLUMN; c < PAD_V; c += COLUMN_STEP) {
            put_strip(token >= 0 ? load_columns(row, c, at->values) : (strip)0.0f, to + r * PAD_V + c);
        }
    }
    SYNC();
}

LANE_PART void store_values(const loglin_panel p, const place *at, __global storage *to, operand from) {
    for (uint r = FIRST_ROW; r < CHUNK; r += ROW_STEP) {
        const long token = row_token(at->slot, r);
        __global storage *row = to + ((ulong)max(token, 0L) * p.heads + head_of(at)) * DIM_V + at->first_value;
        for (uint c = FIRST_COLUMN; token >= 0 && c < PAD_V; c += COLUMN_STEP) {
            store_columns(row, c, at->values, from + r * PAD_V + c);
        }
    }
    SYNC();
}

/*
 * Running sums of the gates, kept as a sum and its rounding remainder: differences of two sums must be exact even
 * behind a run of very negative gates.  An item sums up to its own rows.  The decays from the chunk's start and to its
 * end, and beta.
 */
LANE_PART void load_gates(const loglin_panel p, const place *at, const inputs *in) {
    matrix sums = ARRAY(SUMS), gates = ARRAY(START);
    for (uint r = ITEM; r < CHUNK; r += LANE_ITEMS) {
        const long token = row_token(at->slot, r);
        const ulong from = (ulong)max(token, 0L) * p.heads + head_of(at);
        gates[r] = token >= 0 && in->g ? in->g[from] : 0.0f;
#if IS_DELTA
        ARRAY(BETA)[r] = token < 0 ? 0.0f : load_weight(in->beta, from);
#endif
    }
    SYNC();
    float sum = 0.0f, rest = 0.0f;
    uint behind = 0;
    for (uint r = ITEM; r < CHUNK; r += LANE_ITEMS) {
        for (; behind <= r; behind++) {
            const float gate = gates[behind], next = sum + gate, gate_seen = next - sum;
            rest += (sum - (next - gate_seen)) + (gate - gate_seen);
            sum = next;
        }
        sums[r] = sum;
        sums[CHUNK + r] = rest;
    }
    SYNC();
    sum = sums[CHUNK - 1];
    rest = sums[2 * CHUNK - 1];
    FOR_STRIPS(r, CHUNK) {
        const strip main = get_strip(sums + r), remainder = get_strip(sums + CHUNK + r);
        put_strip(exp(main + remainder), ARRAY(START) + r);
        put_strip(exp((sum - main) + (rest - remainder)), ARRAY(END) + r);
    }
    SYNC();
}

/* a_C, the log decay through the chunk, and the decay. */
float chunk_log_decay(const place *at) { return ARRAY(SUMS)[CHUNK - 1] + ARRAY(SUMS)[2 * CHUNK - 1]; }
float chunk_decay(const place *at) { return exp(chunk_log_decay(at)); }

/* The level weights of the rows; zeros where there is no token or no such level. */
LANE_PART void load_weights(const loglin_panel p, const place *at, const inputs *in) {
    const uint count = min(p.levels, min((uint)PORTABLE_WEIGHTS, p.first_level + p.columns));
    set_zero(at, ARRAY(WEIGHTS), CHUNK * PORTABLE_WEIGHTS);
    for (uint r = FIRST_ROW; r < CHUNK; r += ROW_STEP) {
        const long token = row_token(at->slot, r);
        const ulong from = ((ulong)max(token, 0L) * p.heads + head_of(at)) * p.levels;
        for (uint level = ITEM % ROW_PARTS; token >= 0 && level < count; level += ROW_PARTS) {
            ARRAY(WEIGHTS)[r * PORTABLE_WEIGHTS + level] = load_weight(in->level_scales, from + level);
        }
    }
    SYNC();
}

/* Weights of one level for 16 rows. */
float16 weights_of(const place *at, uint row, uint level) {
    operand x = ARRAY(WEIGHTS) + row * PORTABLE_WEIGHTS + level;
#define W(i) x[(i) * PORTABLE_WEIGHTS]
    return (float16)(W(0), W(1), W(2), W(3), W(4), W(5), W(6), W(7), W(8), W(9), W(10), W(11), W(12), W(13), W(14),
                     W(15));
#undef W
}

#define COLUMNS_16 ((uint16)(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15))
#if LANE_ITEMS == 1
#define STRIP_COLUMNS COLUMNS_16
#else
#define STRIP_COLUMNS ((uint4)(0, 1, 2, 3))
#endif

/* A row's weights for the columns from s on of its own chunk. */
strip weights_at(const place *at, uint r, uint s) {
    operand weights = ARRAY(WEIGHTS) + r * PORTABLE_WEIGHTS;
#if STRONG
    return shuffle(get16(weights), OF_STRIP(vload)(0, (const __global uint *)ARRAY(LEVEL) + r * CHUNK + s));
#else
    const strip_uint apart = (strip_uint)r ^ (s + STRIP_COLUMNS);
    strip x = select((strip)weights[1], (strip)weights[0], apart == 0u);
    for (uint level = 2; level < PORTABLE_WEIGHTS && 1u << (level - 1) <= ((r ^ s) | 15u); level++) {
        x = select(x, (strip)weights[level], apart >= 1u << (level - 1));
    }
    return x;
#endif
}

enum { DECAYED = 1, WEIGHED = 2, STRICT = 4 };

/* A row's elements times their factors, for the columns from s on, s <= r. */
strip triangle_row(const place *at, strip x, uint r, uint s, int how) {
    operand sums = ARRAY(SUMS), remainders = sums + CHUNK;
    if (how & DECAYED) {
        x *= exp(min((sums[r] - get_strip(sums + s)) + (remainders[r] - get_strip(remainders + s)), 0.0f));
    }
    if (how & WEIGHED) {
        x *= weights_at(at, r, s);
    }
    const strip_uint column = s + STRIP_COLUMNS;
    return select((strip)0.0f, x, (how & STRICT) ? column < r : column <= r);
}

/*
 * to = the lower triangle of `from`, times exp(a_r - a_s) (DECAYED), times the level weights (WEIGHED), times the rows'
 * factors unless NULL; without its diagonal (STRICT).
 */
#if LANE_ITEMS == 1
/*
 * Off the diagonal a block of 16 by 16 decays by a factor of its row and one of its column, exp(a_r - a_e) times
 * exp(a_e - a_s), where e is the block's last column.
 */
void scale_triangle(const place *at, matrix to, operand from, operand rows, int how) {
    operand sums = ARRAY(SUMS), remainders = sums + CHUNK;
    for (uint s = 0; s < CHUNK; s += 16) {
        for (uint r = s; r < s + 16; r++) {
            const float16 x = get16(from + r * CHUNK + s) * (rows ? rows[r] : 1.0f);
            put16(triangle_row(at, x, r, s, how), to + r * CHUNK + s);
        }
        const float end = sums[s + 15], end_remainder = remainders[s + 15];
        const float16 of_columns = exp((end - get16(sums + s)) + (end_remainder - get16(remainders + s)));
        for (uint block = s + 16; block < CHUNK; block += 16) {
            float16 of_rows = rows ? get16(rows + block) : (float16)1.0f;
            if (how & DECAYED) {
                of_rows *= exp((get16(sums + block) - end) + (get16(remainders + block) - end_remainder));
            }
            if (!STRONG && (how & WEIGHED)) {
                of_rows *= weights_of(at, block, (uint)bit_length(block ^ s));
            }
            float factors[16];
            vstore16(of_rows, 0, factors);
            for (uint i = 0; i < 16; i++) {
                float16 x = get16(from + (block + i) * CHUNK + s) * factors[i];
                if (how & DECAYED) {
                    x *= of_columns;
                }
                if (STRONG && (how & WEIGHED)) {
                    x *= weights_at(at, block + i, s);
                }
                put16(x, to + (block + i) * CHUNK + s);
            }
        }
    }
}
#else
LANE_CALL void scale_triangle(const place *at, matrix to, operand from, operand rows, int how) {
    for (uint r = FIRST_ROW; r < CHUNK; r += ROW_STEP) {
        for (uint s = FIRST_COLUMN; s < r / 16 * 16 + 16; s += COLUMN_STEP) {
            const strip x = get_strip(from + r * CHUNK + s) * (rows ? rows[r] : 1.0f);
            put_strip(triangle_row(at, x, r, s, how), to + r * CHUNK + s);
        }
    }
    SYNC();
}
#endif

/* Levels of all pairs inside a chunk, and between a chunk and the one before; once for a lane. */
void make_levels(const place *at) {
    (void)at;
#if STRONG
    __global uint *inside = (__global uint *)ARRAY(LEVEL);
    for (uint r = ITEM; r < CHUNK; r += LANE_ITEMS) {
        for (uint s = 0; s < CHUNK; s++) {
            inside[r * CHUNK + s] = s <= r ? (uint)level_of(r, s) : 0u;
#if IS_NEAR
            ((__global uint *)ARRAY(LEVEL_NEAR))[r * CHUNK + s] = (uint)level_of(CHUNK + r, s);
#endif
        }
    }
    SYNC();
#endif
}

#if IS_DELTA
/* XINV = (I + X)^-1 by forward substitution; the upper triangle becomes zeros. */
#if LANE_ITEMS == 1
/* Row by row. */
void invert(const place *at) {
    operand x = ARRAY(X);
    matrix inverse = ARRAY(XINV);
    for (uint r = 0; r < CHUNK; r++) {
        for (uint c = 0; c < CHUNK; c += 16) {
            float16 even = select((float16)0.0f, (float16)1.0f, c + COLUMNS_16 == r), odd = 0.0f;
            uint s = c;
            for (; s + 2 <= r; s += 2) {
                even = fma((float16)-x[r * CHUNK + s], get16(inverse + s * CHUNK + c), even);
                odd = fma((float16)-x[r * CHUNK + s + 1], get16(inverse + (s + 1) * CHUNK + c), odd);
            }
            if (s < r) {
                even = fma((float16)-x[r * CHUNK + s], get16(inverse + s * CHUNK + c), even);
            }
            put16(even + odd, inverse + r * CHUNK + c);
        }
    }
}
#else
/* 16 rows at a time: what the rows before them leave, all of it at once, and then a column by each item. */
void invert(const place *at) {
    operand x = ARRAY(X);
    matrix inverse = ARRAY(XINV);
    for (uint block = 0; block < CHUNK; block += 16) {
        for (uint i = ITEM; i < 16 * CHUNK; i += LANE_ITEMS) {
            const uint r = block + i / CHUNK, c = i % CHUNK;
            float sum = r == c ? 1.0f : 0.0f;
            for (uint s = 0; s < block; s++) {
                sum = fma(-x[r * CHUNK + s], inverse[s * CHUNK + c], sum);
            }
            inverse[r * CHUNK + c] = sum;
        }
        SYNC();
        for (uint c = ITEM; c < CHUNK; c += LANE_ITEMS) {
            float column[16];
#pragma unroll
            for (uint r = 0; r < 16; r++) {
                column[r] = inverse[(block + r) * CHUNK + c];
#pragma unroll
                for (uint s = 0; s < r; s++) {
                    column[r] = fma(-x[(block + r) * CHUNK + block + s], column[s], column[r]);
                }
            }
#pragma unroll
            for (uint r = 0; r < 16; r++) {
                inverse[(block + r) * CHUNK + c] = column[r];
            }
        }
        SYNC();
    }
}
#endif
#endif

/*
 * The chunk's map for the head, of what it writes: T and WRITE, from KK, the gates and beta.  Without near keys the
 * scalar-gated forward pass needs neither WRITE nor READ: their decays go to the values and to the level weights.
 */
LANE_CALL void make_write(const place *at) {
#if IS_DELTA
    scale_triangle(at, ARRAY(X), ARRAY(KK), ARRAY(BETA), DECAYED | STRICT);
    invert(at);
    for (uint r = FIRST_ROW; r < CHUNK; r += ROW_STEP) {
        for (uint c = FIRST_COLUMN; c < CHUNK; c += COLUMN_STEP) {
            put_strip(get_strip(ARRAY(XINV) + r * CHUNK + c) * get_strip(ARRAY(BETA) + c), ARRAY(T) + r * CHUNK + c);
        }
    }
    SYNC();
    scale_rows(at, ARRAY(K_START), ARRAY(KEY), ARRAY(START), PAD_K);
    scale_rows(at, ARRAY(K_END), ARRAY(KEY), ARRAY(END), PAD_K);
    product(at, CHUNK, PAD_K, CHUNK, ARRAY(T), 1, CHUNK, ARRAY(K_END), PAD_K, ARRAY(WRITE), PAD_K, 0, A_UPPER, 0.0f);
#else
    (void)at;
#if IS_NEAR || GRADIENTS
    scale_rows(at, ARRAY(WRITE), ARRAY(KEY), ARRAY(END), PAD_K);
#endif
#endif
}

/* And of what it reads: the level weights, Z, MZ and READ. */
LANE_PART void make_read(const loglin_panel p, const place *at, const inputs *in) {
    load_weights(p, at, in);
#if IS_DELTA
    scale_triangle(at, ARRAY(A), ARRAY(QK), 0, DECAYED);
    product(at, CHUNK, CHUNK, CHUNK, ARRAY(A), CHUNK, 1, ARRAY(T), CHUNK, ARRAY(Z), CHUNK, 0, A_LOWER | B_LOWER |
            C_LOWER, 0.0f);
    scale_triangle(at, ARRAY(MZ), ARRAY(Z), 0, WEIGHED);
    scale_rows(at, ARRAY(READ), ARRAY(Q), ARRAY(START), PAD_K);
    product(at, CHUNK, PAD_K, CHUNK, ARRAY(Z), CHUNK, 1, ARRAY(K_START), PAD_K, ARRAY(READ), PAD_K, 0, A_LOWER |
            SUBTRACT, 1.0f);
#else
#if GRADIENTS
    scale_triangle(at, ARRAY(Z), ARRAY(QK), 0, DECAYED);
    scale_triangle(at, ARRAY(MZ), ARRAY(Z), 0, WEIGHED);
#else
    scale_triangle(at, ARRAY(MZ), ARRAY(QK), 0, DECAYED | WEIGHED);
#endif
#if IS_NEAR || GRADIENTS
    scale_rows(at, ARRAY(READ), ARRAY(Q), ARRAY(START), PAD_K);
#endif
#endif
}

/* What one head needs of its chunk: gates, values and what it writes. */
LANE_PART void load_head(const loglin_panel p, const place *at, const inputs *in) {
    load_gates(p, at, in);
    load_values(p, at, ARRAY(V), in->v);
#if !IS_DELTA
    scale_rows(at, ARRAY(V_END), ARRAY(V), ARRAY(END), PAD_V);
#endif
    make_write(at);
}
