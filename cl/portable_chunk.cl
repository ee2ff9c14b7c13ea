/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A lane's view of one chunk: its rows in the lane's memory as floats, and the chunk's map of cl/chunk_operators.cl.
 * Rows that hold no token are zeros, so are the columns beyond K and V.
 *
 * DIM_K, DIM_V, CHUNK, PAD_K, PAD_V, LANE_HEADS, COLUMNS (at least 1), IS_DELTA, IS_NEAR, IS_NORMALIZED,
 * GRADIENTS: the host's.
 */
#define SIZE_C CHUNK
#define SIZE_K PAD_K
#define SIZE_V PAD_V
#define SIZE_KV (PAD_K * PAD_V)
#define SIZE_L PORTABLE_WEIGHTS
#define SIZE_P POOL
#define SIZE_D ((POOL + 15) / 16 * 16)
#define SIZE_J COLUMNS
#define SIZE_M (SEGMENTS + SEGMENT)
#define SIZE_SJ (SEGMENTS * COLUMNS)
#define SIZE_A (2 * COLUMNS)
#define SIZE_1 1
#define SIZE_2 2
#define COUNT_ONE 1
#define COUNT_HEAD LANE_HEADS
#define WHEN_ALWAYS 1
#define WHEN_DELTA IS_DELTA
#define WHEN_SCALAR (1 - IS_DELTA)
#define WHEN_STRONG STRONG
#define WHEN_NEAR IS_NEAR
#define WHEN_MAPS (IS_DELTA || IS_NEAR || GRADIENTS)
#define WHEN_PAIRS (IS_DELTA || GRADIENTS)
#define WHEN_GRADIENTS GRADIENTS
#define WHEN_DELTA_GRADIENTS (IS_DELTA && GRADIENTS)

/* Offsets of the arrays in a lane's memory. */
#define PORTABLE_OFFSET(name, count, rows, columns, when)                                                              \
    LANE_##name, LANE_##name##_LAST = LANE_##name + COUNT_##count * SIZE_##rows * SIZE_##columns * (WHEN_##when) - 1,
enum { PORTABLE_ARRAYS(PORTABLE_OFFSET) LANE_FLOATS };

#define ARRAY(name) (at->memory + LANE_##name)
/* The head's own copy. */
#define HEAD_ARRAY(name) (at->memory + LANE_##name + at->head * ((LANE_##name##_LAST - LANE_##name + 1) / LANE_HEADS))

/* Where a lane stands. */
typedef struct {
    matrix memory;
    uint sequence, group;
    uint head;        /* of the lane's, 0 .. LANE_HEADS - 1 */
    uint first_head;  /* among all */
    uint first_value; /* first column of v, and how many are the lane's */
    uint values;
    const __global int *slot;
} place;

/* The caller's buffers, their offsets applied. */
typedef struct {
    const __global storage *q, *k, *v;
    const __global float *g; /* may be NULL */
    const __global weight *level_scales, *beta;
} inputs;

uint head_of(const place *at) { return at->first_head + at->head; }

/* ---- Rows -------------------------------------------------------------------------------------------------------- */

typedef ushort16 loose_ushort16 __attribute__((aligned(2)));

float16 load16(const __global storage *p) {
#if STORAGE == 0
    return get16(p);
#elif STORAGE == 1
    return vload_half16(0, p);
#else
    return as_float16(convert_uint16(*(const __global loose_ushort16 *)p) << 16);
#endif
}

void store16(__global storage *p, float16 x) {
#if STORAGE == 0
    put16(x, p);
#elif STORAGE == 1
    vstore_half16_rte(x, 0, p);
#else
    const uint16 bits = as_uint16(x);
    const uint16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    *(__global loose_ushort16 *)p = convert_ushort16(select(rounded, (uint16)0x7fc0u, isnan(x)));
#endif
}

/* `count` elements, and zeros up to `padded`. */
void load_row(matrix to, const __global storage *from, uint count, uint padded) {
    uint i = 0;
    for (; i + 16 <= count; i += 16) {
        put16(load16(from + i), to + i);
    }
    for (; i < count; i++) {
        to[i] = load(from, i);
    }
    for (; i < padded; i++) {
        to[i] = 0.0f;
    }
}

void store_row(__global storage *to, operand from, uint count) {
    uint i = 0;
    for (; i + 16 <= count; i += 16) {
        store16(to + i, get16(from + i));
    }
    for (; i < count; i++) {
        store(to, i, from[i]);
    }
}

/* Floats in whole vectors. */
void set_zero(matrix to, uint count) {
    for (uint i = 0; i < count; i += 16) {
        put16((float16)0.0f, to + i);
    }
}

/* to = scale from */
void set_scaled(matrix to, operand from, float scale, uint count) {
    for (uint i = 0; i < count; i += 16) {
        put16(scale * get16(from + i), to + i);
    }
}

/* to = keep to + scale from */
void add_scaled(matrix to, float keep, operand from, float scale, uint count) {
    for (uint i = 0; i < count; i += 16) {
        put16(fma((float16)scale, get16(from + i), keep * get16(to + i)), to + i);
    }
}

float sum16(float16 x) {
    const float8 a = x.lo + x.hi;
    const float4 b = a.lo + a.hi;
    return (b.x + b.y) + (b.z + b.w);
}

/* sum over columns of x y */
float row_dot(operand x, operand y, uint count) {
    float16 sums = 0.0f;
    for (uint i = 0; i < count; i += 16) {
        sums = fma(get16(x + i), get16(y + i), sums);
    }
    return sum16(sums);
}

/* to[c][r] = from[r][c], rows and columns multiples of 16, in blocks of 16 by 16: pairs of rows swap their halves. */
void transpose(matrix to, uint to_row, operand from, uint from_row, uint rows, uint columns) {
    for (uint r = 0; r < rows; r += 16) {
        for (uint c = 0; c < columns; c += 16) {
            float16 x[16];
#pragma unroll
            for (int i = 0; i < 16; i++) {
                x[i] = get16(from + (r + i) * from_row + c);
            }
/* Rows i and i + distance: their even blocks of `distance` columns go to the first, the odd ones to the second. */
#define SWAP(distance, first, second)                                                                                  \
    _Pragma("unroll") for (int i = 0; i < 16; i++) {                                                                   \
        if ((i & (distance)) == 0) {                                                                                   \
            const float16 a = x[i], b = x[i + (distance)];                                                             \
            x[i] = (float16)first;                                                                                     \
            x[i + (distance)] = (float16)second;                                                                       \
        }                                                                                                              \
    }
            SWAP(8, (a.s01234567, b.s01234567), (a.s89abcdef, b.s89abcdef))
            SWAP(4, (a.s0123, b.s0123, a.s89ab, b.s89ab), (a.s4567, b.s4567, a.scdef, b.scdef))
            SWAP(2, (a.s01, b.s01, a.s45, b.s45, a.s89, b.s89, a.scd, b.scd),
                 (a.s23, b.s23, a.s67, b.s67, a.sab, b.sab, a.sef, b.sef))
            SWAP(1, (a.s0, b.s0, a.s2, b.s2, a.s4, b.s4, a.s6, b.s6, a.s8, b.s8, a.sa, b.sa, a.sc, b.sc, a.se, b.se),
                 (a.s1, b.s1, a.s3, b.s3, a.s5, b.s5, a.s7, b.s7, a.s9, b.s9, a.sb, b.sb, a.sd, b.sd, a.sf, b.sf))
#undef SWAP
#pragma unroll
            for (int i = 0; i < 16; i++) {
                put16(x[i], to + (c + i) * to_row + r);
            }
        }
    }
}

/* ---- What the heads of a group share ------------------------------------------------------------------------------ */

/* Rows of q or k, times scale, divided by their norms where asked for. */
void load_keys(const loglin_panel p, const place *at, matrix to, const __global storage *from, float scale) {
    for (uint r = 0; r < CHUNK; r++) {
        const long token = row_token(at->slot, r);
        matrix row = to + r * PAD_K;
        if (token < 0) {
            set_zero(row, PAD_K);
            continue;
        }
        load_row(row, from + ((ulong)token * p.groups + at->group) * DIM_K, DIM_K, PAD_K);
        float factor = scale;
        if (IS_NORMALIZED) {
            factor /= sqrt(row_dot(row, row, PAD_K) + 1e-6f);
        }
        if (factor != 1.0f) {
            set_scaled(row, row, factor, PAD_K);
        }
    }
}

void load_group(const loglin_panel p, const place *at, const inputs *in) {
    load_keys(p, at, ARRAY(Q), in->q, p.scale);
    load_keys(p, at, ARRAY(KEY), in->k, 1.0f);
    transpose(ARRAY(KEY_T), CHUNK, ARRAY(KEY), PAD_K, CHUNK, PAD_K);
    product(CHUNK, CHUNK, DIM_K, ARRAY(Q), PAD_K, 1, ARRAY(KEY_T), CHUNK, ARRAY(QK), CHUNK, 0, C_LOWER, 0.0f);
#if IS_DELTA
    product(CHUNK, CHUNK, DIM_K, ARRAY(KEY), PAD_K, 1, ARRAY(KEY_T), CHUNK, ARRAY(KK), CHUNK, 0, C_LOWER, 0.0f);
#endif
}

/* ---- One head ----------------------------------------------------------------------------------------------------- */

void load_values(const loglin_panel p, const place *at, matrix to, const __global storage *from) {
    for (uint r = 0; r < CHUNK; r++) {
        const long token = row_token(at->slot, r);
        if (token < 0) {
            set_zero(to + r * PAD_V, PAD_V);
        } else {
            load_row(to + r * PAD_V, from + ((ulong)token * p.heads + head_of(at)) * DIM_V + at->first_value,
                     at->values, PAD_V);
        }
    }
}

/*
 * Running sums of the gates, kept as a sum and its rounding remainder: differences of two sums must be exact even behind
 * a run of very negative gates.  The decays from the chunk's start and to its end, and beta.
 */
void load_gates(const loglin_panel p, const place *at, const inputs *in) {
    matrix sums = ARRAY(SUMS);
    float sum = 0.0f, rest = 0.0f;
    for (uint r = 0; r < CHUNK; r++) {
        const long token = row_token(at->slot, r);
        const ulong from = (ulong)max(token, 0L) * p.heads + head_of(at);
        const float gate = token >= 0 && in->g ? in->g[from] : 0.0f;
        const float next = sum + gate, gate_seen = next - sum;
        rest += (sum - (next - gate_seen)) + (gate - gate_seen);
        sum = next;
        sums[r] = sum;
        sums[CHUNK + r] = rest;
#if IS_DELTA
        ARRAY(BETA)[r] = token < 0 ? 0.0f : load_weight(in->beta, from);
#endif
    }
    for (uint r = 0; r < CHUNK; r += 16) {
        const float16 main = get16(sums + r), remainder = get16(sums + CHUNK + r);
        put16(exp(main + remainder), ARRAY(START) + r);
        put16(exp((sum - main) + (rest - remainder)), ARRAY(END) + r);
    }
}

/* a_C, the log decay through the chunk, and the decay. */
float chunk_log_decay(const place *at) { return ARRAY(SUMS)[CHUNK - 1] + ARRAY(SUMS)[2 * CHUNK - 1]; }
float chunk_decay(const place *at) { return exp(chunk_log_decay(at)); }

/* The level weights of the rows; zeros where there is no token or no such level. */
void load_weights(const loglin_panel p, const place *at, const inputs *in) {
    const uint count = min(p.levels, min((uint)PORTABLE_WEIGHTS, p.first_level + p.columns));
    for (uint r = 0; r < CHUNK; r++) {
        matrix row = ARRAY(WEIGHTS) + r * PORTABLE_WEIGHTS;
        set_zero(row, PORTABLE_WEIGHTS);
        const long token = row_token(at->slot, r);
        const ulong from = ((ulong)max(token, 0L) * p.heads + head_of(at)) * p.levels;
        for (uint level = 0; token >= 0 && level < count; level++) {
            row[level] = load_weight(in->level_scales, from + level);
        }
    }
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

/* A row's weights for the 16 columns from s of its own chunk. */
float16 weights_at(const place *at, uint r, uint s) {
    operand weights = ARRAY(WEIGHTS) + r * PORTABLE_WEIGHTS;
#if STRONG
    return shuffle(get16(weights), vload16(0, (const __global uint *)ARRAY(LEVEL) + r * CHUNK + s));
#else
    const uint16 apart = (uint16)r ^ (s + COLUMNS_16);
    float16 x = select((float16)weights[1], (float16)weights[0], apart == 0u);
    for (uint level = 2; level < PORTABLE_WEIGHTS && 1u << (level - 1) <= ((r ^ s) | 15u); level++) {
        x = select(x, (float16)weights[level], apart >= 1u << (level - 1));
    }
    return x;
#endif
}

enum { DECAYED = 1, WEIGHED = 2, STRICT = 4 };

/*
 * to = the lower triangle of `from`, times exp(a_r - a_s) (DECAYED), times the level weights (WEIGHED), times the rows'
 * factors unless NULL; without its diagonal (STRICT).  Off the diagonal a block of 16 by 16 decays by a factor of its row
 * and one of its column, exp(a_r - a_e) exp(a_e - a_s), where e is the block's last column.
 */
void scale_triangle(const place *at, matrix to, operand from, operand rows, int how) {
    operand sums = ARRAY(SUMS), remainders = sums + CHUNK;
    for (uint s = 0; s < CHUNK; s += 16) {
        const float16 sum = get16(sums + s), remainder = get16(remainders + s);
        for (uint r = s; r < s + 16; r++) {
            float16 x = get16(from + r * CHUNK + s) * (rows ? rows[r] : 1.0f);
            if (how & DECAYED) {
                x *= exp(min((sums[r] - sum) + (remainders[r] - remainder), 0.0f));
            }
            if (how & WEIGHED) {
                x *= weights_at(at, r, s);
            }
            const uint16 column = s + COLUMNS_16;
            put16(select((float16)0.0f, x, (how & STRICT) ? column < r : column <= r), to + r * CHUNK + s);
        }
        const float end = sums[s + 15], end_remainder = remainders[s + 15];
        const float16 of_columns = exp((end - sum) + (end_remainder - remainder));
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

/* Levels of all pairs inside a chunk, and between a chunk and the one before; once for a lane. */
void make_levels(const place *at) {
    (void)at;
#if STRONG
    __global uint *inside = (__global uint *)ARRAY(LEVEL);
    for (uint r = 0; r < CHUNK; r++) {
        for (uint s = 0; s < CHUNK; s++) {
            inside[r * CHUNK + s] = s <= r ? (uint)level_of(r, s) : 0u;
#if IS_NEAR
            ((__global uint *)ARRAY(LEVEL_NEAR))[r * CHUNK + s] = (uint)level_of(CHUNK + r, s);
#endif
        }
    }
#endif
}

/* Row r of to = x[r] times that of from. */
void scale_rows(matrix to, operand from, operand x, uint width) {
    for (uint r = 0; r < CHUNK; r++) {
        set_scaled(to + r * width, from + r * width, x[r], width);
    }
}

#if IS_DELTA
/* XINV = (I + X)^-1 by forward substitution, row by row; the upper triangle becomes zeros. */
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
#endif

/*
 * The chunk's map for the head, of what it writes: T and WRITE, from KK, the gates and beta.  Without near keys the
 * scalar-gated forward pass needs neither WRITE nor READ: their decays go to the values and to the level weights.
 */
void make_write(const place *at) {
#if IS_DELTA
    scale_triangle(at, ARRAY(X), ARRAY(KK), ARRAY(BETA), DECAYED | STRICT);
    invert(at);
    for (uint r = 0; r < CHUNK; r++) {
        for (uint c = 0; c < CHUNK; c += 16) {
            put16(get16(ARRAY(XINV) + r * CHUNK + c) * get16(ARRAY(BETA) + c), ARRAY(T) + r * CHUNK + c);
        }
    }
    scale_rows(ARRAY(K_START), ARRAY(KEY), ARRAY(START), PAD_K);
    scale_rows(ARRAY(K_END), ARRAY(KEY), ARRAY(END), PAD_K);
    product(CHUNK, PAD_K, CHUNK, ARRAY(T), 1, CHUNK, ARRAY(K_END), PAD_K, ARRAY(WRITE), PAD_K, 0, A_UPPER, 0.0f);
#else
    (void)at;
#if IS_NEAR || GRADIENTS
    scale_rows(ARRAY(WRITE), ARRAY(KEY), ARRAY(END), PAD_K);
#endif
#endif
}

/* And of what it reads: the level weights, Z, MZ and READ. */
void make_read(const loglin_panel p, const place *at, const inputs *in) {
    load_weights(p, at, in);
#if IS_DELTA
    scale_triangle(at, ARRAY(A), ARRAY(QK), 0, DECAYED);
    product(CHUNK, CHUNK, CHUNK, ARRAY(A), CHUNK, 1, ARRAY(T), CHUNK, ARRAY(Z), CHUNK, 0, A_LOWER | B_LOWER | C_LOWER,
            0.0f);
    scale_triangle(at, ARRAY(MZ), ARRAY(Z), 0, WEIGHED);
    scale_rows(ARRAY(READ), ARRAY(Q), ARRAY(START), PAD_K);
    product(CHUNK, PAD_K, CHUNK, ARRAY(Z), CHUNK, 1, ARRAY(K_START), PAD_K, ARRAY(READ), PAD_K, 0, A_LOWER | SUBTRACT,
            1.0f);
#else
#if GRADIENTS
    scale_triangle(at, ARRAY(Z), ARRAY(QK), 0, DECAYED);
    scale_triangle(at, ARRAY(MZ), ARRAY(Z), 0, WEIGHED);
#else
    scale_triangle(at, ARRAY(MZ), ARRAY(QK), 0, DECAYED | WEIGHED);
#endif
#if IS_NEAR || GRADIENTS
    scale_rows(ARRAY(READ), ARRAY(Q), ARRAY(START), PAD_K);
#endif
#endif
}

/* What one head needs of its chunk: gates, values and what it writes. */
void load_head(const loglin_panel p, const place *at, const inputs *in) {
    load_gates(p, at, in);
    load_values(p, at, ARRAY(V), in->v);
#if !IS_DELTA
    scale_rows(ARRAY(V_END), ARRAY(V), ARRAY(END), PAD_V);
#endif
    make_write(at);
}

/* ---- Lanes ---------------------------------------------------------------------------------------------------------- */

/* The lane's sequence, group, heads and values, from its number. */
place find_lane(const loglin_panel p, __global float *ws, ulong lanes, uint lane) {
    const uint value_parts = (DIM_V + PAD_V - 1) / PAD_V, head_parts = p.heads / p.groups / LANE_HEADS;
    const uint of_heads = lane / value_parts, of_group = of_heads / head_parts;
    place at;
    at.memory = ws + lanes + (ulong)lane * ((LANE_FLOATS + 15) / 16 * 16); /* whole vectors, as the host has it */
    at.sequence = of_group / p.groups;
    at.group = of_group % p.groups;
    at.head = 0;
    at.first_head = at.group * (p.heads / p.groups) + of_heads % head_parts * LANE_HEADS;
    at.first_value = lane % value_parts * PAD_V;
    at.values = min((uint)PAD_V, DIM_V - at.first_value);
    at.slot = 0;
    return at;
}

/* The slot of wave n of the lane's sequence, or NULL behind its last one. */
const __global int *find_slot(const loglin_panel p, const __global float *ws, const __global int *cu_seqlens,
                              uint sequence, uint n) {
    if (p.packed && sequence_length(p, cu_seqlens, sequence) == 0) {
        return 0;
    }
    const uint slot = p.packed ? packed_slot(p, cu_seqlens, sequence) + n : n * p.batch_width + sequence;
    const __global int *record = slot < p.slots ? slot_record(p, ws, slot) : 0;
    const int mine = record && (record[SLOT_FLAGS] & SLOT_VALID) && (uint)record[SLOT_SEQUENCE] == sequence;
    return mine ? record : 0;
}
