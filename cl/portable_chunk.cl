/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A lane's view of one chunk: its rows in the lane's memory as floats, and the chunk's map of cl/chunk_operators.cl.
 * Rows that hold no token are zeros, so are the columns beyond K and V.
 *
 * DIM_K, DIM_V, CHUNK, PAD_K, PAD_V, LANE_HEADS, COLUMNS (at least 1), IS_DELTA, IS_NEAR, IS_NORMALIZED,
 * GRADIENTS, SPREAD (lanes that share a head's chunks, or 0), MAPS_BEFORE (cl/portable_maps.cl): the host's.
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
#define WHEN_SPREAD (SPREAD > 0)
#define WHEN_MOMENTS (GRADIENTS || SPREAD > 0)
#define WHEN_GRADIENTS GRADIENTS
#define WHEN_DELTA_GRADIENTS (IS_DELTA && GRADIENTS)
#define WHEN_NEAR_GRADIENTS (IS_NEAR && GRADIENTS)

/* Offsets of the arrays in a lane's memory. */
#define PORTABLE_OFFSET(name, count, rows, columns, when)                                                              \
    LANE_##name, LANE_##name##_LAST = LANE_##name + COUNT_##count * SIZE_##rows * SIZE_##columns * (WHEN_##when) - 1,
enum {
    PORTABLE_ARRAYS(PORTABLE_OFFSET) MAP_BEGIN,
    MAP_BEGIN_LAST = MAP_BEGIN - 1,
    PORTABLE_MAP_ARRAYS(PORTABLE_OFFSET) POOL_BEGIN,
    POOL_BEGIN_LAST = POOL_BEGIN - 1,
    PORTABLE_POOL_ARRAYS(PORTABLE_OFFSET) LANE_FLOATS
};

#define ARRAY(name)                                                                                                    \
    ((LANE_##name < MAP_BEGIN ? at->memory : LANE_##name < POOL_BEGIN ? at->map : at->pool) + LANE_##name)
/* The head's own copy. */
#define HEAD_ARRAY(name) (ARRAY(name) + at->head * ((LANE_##name##_LAST - LANE_##name + 1) / LANE_HEADS))

/* The caller's buffers, their offsets applied. */
typedef struct {
    const __global storage *q, *k, *v;
    const __global float *g; /* may be NULL */
    const __global weight *level_scales, *beta;
    const __global float *values, *log_decay; /* initial states, may be NULL */
} inputs;

uint head_of(const place *at) { return at->first_head + at->head; }

/* ---- Rows -------------------------------------------------------------------------------------------------------- */

typedef OF_STRIP(ushort) loose_ushorts __attribute__((aligned(2)));
typedef strip loose_strip __attribute__((aligned(4)));

strip load_strip(const __global storage *p) {
#if STORAGE == 0
    return *(const __global loose_strip *)p;
#elif STORAGE == 1
    return OF_STRIP(vload_half)(0, p);
#else
    return OF_STRIP(as_float)(OF_STRIP(convert_uint)(*(const __global loose_ushorts *)p) << 16);
#endif
}

void store_strip(__global storage *p, strip x) {
#if STORAGE == 0
    *(__global loose_strip *)p = x;
#elif STORAGE == 1
#if LANE_ITEMS == 1
    vstore_half16_rte(x, 0, p);
#else
    vstore_half4_rte(x, 0, p);
#endif
#else
    const strip_uint bits = OF_STRIP(as_uint)(x);
    const strip_uint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    *(__global loose_ushorts *)p = OF_STRIP(convert_ushort)(select(rounded, (strip_uint)0x7fc0u, isnan(x)));
#endif
}

/* Elements of a row from column c on, of `columns`; zeros behind them. */
strip load_columns(const __global storage *row, uint c, uint columns) {
    if (c + STRIP <= columns) {
        return load_strip(row + c);
    }
    float x[STRIP];
    for (uint i = 0; i < STRIP; i++) {
        x[i] = c + i < columns ? load(row, c + i) : 0.0f;
    }
    return OF_STRIP(vload)(0, x);
}

void store_columns(__global storage *row, uint c, uint columns, operand from) {
    if (c + STRIP <= columns) {
        store_strip(row + c, get_strip(from));
        return;
    }
    for (uint i = c; i < columns; i++) {
        store(row, i, from[i - c]);
    }
}

/* sum over columns of x y */
float row_dot(operand x, operand y, uint count) {
    float16 sums = 0.0f;
    for (uint i = 0; i < count; i += 16) {
        sums = fma(get16(x + i), get16(y + i), sums);
    }
    return sum16(sums);
}

/* ---- Matrices of the lane, of whole vectors ---------------------------------------------------------------------- */

/* Each item's strips of `count` floats. */
#define FOR_STRIPS(i, count) for (uint i = STRIP * ITEM; i < (count); i += STRIP * LANE_ITEMS)

LANE_CALL void set_zero(const place *at, matrix to, uint count) {
    (void)at;
    FOR_STRIPS(i, count) {
        put_strip((strip)0.0f, to + i);
    }
    SYNC();
}

/* to = keep to + scale from; keep 0: what was there does not matter. */
LANE_CALL void add_scaled(const place *at, matrix to, float keep, operand from, float scale, uint count) {
    (void)at;
    for (uint first = STRIP * ITEM; first < count; first += BATCH * STRIP * LANE_ITEMS) {
        strip x[BATCH];
#pragma unroll
        for (uint i = 0; i < BATCH; i++) {
            const uint j = first + i * STRIP * LANE_ITEMS;
            x[i] = j < count ? scale * get_strip(from + j) : (strip)0.0f;
            if (keep != 0.0f && j < count) {
                x[i] = fma((strip)keep, get_strip(to + j), x[i]);
            }
        }
#pragma unroll
        for (uint i = 0; i < BATCH; i++) {
            const uint j = first + i * STRIP * LANE_ITEMS;
            if (j < count) {
                put_strip(x[i], to + j);
            }
        }
    }
    SYNC();
}

/* to = scale from */
void set_scaled(const place *at, matrix to, operand from, float scale, uint count) {
    add_scaled(at, to, 0.0f, from, scale, count);
}

/* Row r of to = x[r] times that of from. */
LANE_CALL void scale_rows(const place *at, matrix to, operand from, operand x, uint width) {
    (void)at;
    for (uint r = FIRST_ROW; r < CHUNK; r += ROW_STEP) {
        const strip factor = x[r];
        for (uint first = FIRST_COLUMN; first < width; first += BATCH * COLUMN_STEP) {
            strip of_row[BATCH];
#pragma unroll
            for (uint i = 0; i < BATCH; i++) {
                const uint c = first + i * COLUMN_STEP;
                of_row[i] = c < width ? factor * get_strip(from + r * width + c) : (strip)0.0f;
            }
#pragma unroll
            for (uint i = 0; i < BATCH; i++) {
                const uint c = first + i * COLUMN_STEP;
                if (c < width) {
                    put_strip(of_row[i], to + r * width + c);
                }
            }
        }
    }
    SYNC();
}

/* to[c][r] = from[r][c], rows and columns multiples of 16. */
#if LANE_ITEMS == 1
/* Blocks of 16 by 16: pairs of rows swap their halves. */
void transpose(const place *at, matrix to, uint to_row, operand from, uint from_row, uint rows, uint columns) {
    (void)at;
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
#else
/* Blocks of 4 by 4. */
LANE_CALL void transpose(const place *at, matrix to, uint to_row, operand from, uint from_row, uint rows,
                         uint columns) {
    (void)at;
    for (uint i = ITEM; i < rows / 4 * (columns / 4); i += LANE_ITEMS) {
        const uint r = i / (columns / 4) * 4, c = i % (columns / 4) * 4;
        const __global float4 *x = (const __global float4 *)(from + r * from_row + c);
        const float4 a = x[0], b = x[from_row / 4], d = x[from_row / 2], e = x[from_row / 4 * 3];
        __global float4 *y = (__global float4 *)(to + c * to_row + r);
        y[0] = (float4)(a.x, b.x, d.x, e.x);
        y[to_row / 4] = (float4)(a.y, b.y, d.y, e.y);
        y[to_row / 2] = (float4)(a.z, b.z, d.z, e.z);
        y[to_row / 4 * 3] = (float4)(a.w, b.w, d.w, e.w);
    }
    SYNC();
}
#endif

/*
 * Sums over rows of matrices, of which an item has a part: which of up to 2 sums, in row r.  total() is good after a
 * SYNC and until the next product.
 */
#if LANE_ITEMS == 1
#define PARTIAL(which, r) ARRAY(TOTALS)[(which) * CHUNK + (r)]
#else
#define PARTIAL(which, r) at->shared[((which) * CHUNK + (r)) * ROW_PARTS + ITEM % ROW_PARTS]
#endif

float total(const place *at, uint which, uint r) {
#if LANE_ITEMS == 1
    return PARTIAL(which, r);
#else
    float sum = 0.0f;
    for (uint part = 0; part < ROW_PARTS; part++) {
        sum += at->shared[(which * CHUNK + r) * ROW_PARTS + part];
    }
    return sum;
#endif
}

/* The sum of all items' x. */
float sum_of_items(const place *at, float x) {
#if LANE_ITEMS == 1
    (void)at;
    return x;
#else
    at->shared[ITEM] = x;
    for (uint half_way = LANE_ITEMS / 2; half_way > 0; half_way /= 2) {
        SYNC();
        if (ITEM < half_way) {
            at->shared[ITEM] += at->shared[ITEM + half_way];
        }
    }
    SYNC();
    const float sum = at->shared[0];
    SYNC();
    return sum;
#endif
}

/* ---- What the heads of a group share ----------------------------------------------------------------------------- */

/* Rows of q or k, times scale, divided by their norms where asked for. */
LANE_PART void load_keys(const loglin_panel p, const place *at, matrix to, const __global storage *from, float scale) {
    for (uint r = FIRST_ROW; r < CHUNK; r += ROW_STEP) {
        const long token = row_token(at->slot, r);
        const __global storage *row = from + ((ulong)max(token, 0L) * p.groups + at->group) * DIM_K;
        strip squares = 0.0f;
        for (uint first = FIRST_COLUMN; first < PAD_K; first += BATCH * COLUMN_STEP) {
            strip x[BATCH];
#pragma unroll
            for (uint i = 0; i < BATCH; i++) {
                const uint c = first + i * COLUMN_STEP;
                x[i] = token >= 0 && c < PAD_K ? load_columns(row, c, DIM_K) : (strip)0.0f;
                squares = fma(x[i], x[i], squares);
            }
#pragma unroll
            for (uint i = 0; i < BATCH; i++) {
                const uint c = first + i * COLUMN_STEP;
                if (c < PAD_K) {
                    put_strip(scale * x[i], to + r * PAD_K + c);
                }
            }
        }
        if (IS_NORMALIZED) {
            PARTIAL(0, r) = sum_of_strip(squares);
        }
    }
    SYNC();
    if (IS_NORMALIZED) {
        for (uint r = ITEM; r < CHUNK; r += LANE_ITEMS) {
            ARRAY(ROWS)[r] = 1.0f / sqrt(total(at, 0, r) + 1e-6f);
        }
        SYNC();
        scale_rows(at, to, to, ARRAY(ROWS), PAD_K);
    }
}

LANE_PART void load_group(const loglin_panel p, const place *at, const inputs *in) {
    load_keys(p, at, ARRAY(Q), in->q, p.scale);
    load_keys(p, at, ARRAY(KEY), in->k, 1.0f);
    transpose(at, ARRAY(KEY_T), CHUNK, ARRAY(KEY), PAD_K, CHUNK, PAD_K);
    product(at, CHUNK, CHUNK, DIM_K, ARRAY(Q), PAD_K, 1, ARRAY(KEY_T), CHUNK, ARRAY(QK), CHUNK, 0, C_LOWER, 0.0f);
#if IS_DELTA
    product(at, CHUNK, CHUNK, DIM_K, ARRAY(KEY), PAD_K, 1, ARRAY(KEY_T), CHUNK, ARRAY(KK), CHUNK, 0, C_LOWER, 0.0f);
#endif
}

/* ---- Lanes ------------------------------------------------------------------------------------------------------- */

#if LANE_ITEMS == 1
#define LANE_KERNEL __attribute__((reqd_work_group_size(1, 1, 1))) __kernel
#define EQUIP_LANE(at)                                                                                                 \
    rows_ahead ahead = {.end = 0};                                                                                     \
    at.ahead = &ahead;
#else
#ifdef __AMDGCN__
#define TWO_WAVES __attribute__((amdgpu_waves_per_eu(2))) /* of a SIMD in flight, that memory is waited for less */
#else
#define TWO_WAVES
#endif
#define LANE_KERNEL __attribute__((reqd_work_group_size(LANE_ITEMS, 1, 1))) TWO_WAVES MMA_KERNEL __kernel
/* Room for a product's slabs, or for the sums over rows or items. */
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define EQUIP_LANE(at)                                                                                                 \
    __local float16 local_memory[(MAX(SLAB_FLOATS, MAX(LANE_ITEMS, 2 * CHUNK * ROW_PARTS)) + 15) / 16];                \
    at.shared = (__local float *)local_memory;
#endif

/* The lane's sequence, group, heads and values, from its number. */
place find_lane(const loglin_panel p, __global float *ws, ulong lanes, uint lane) {
    const uint value_parts = (DIM_V + PAD_V - 1) / PAD_V, head_parts = p.heads / p.groups / LANE_HEADS;
    const uint of_heads = lane / value_parts, of_group = of_heads / head_parts;
    place at;
    at.memory = ws + lanes + (ulong)lane * ((LANE_FLOATS + 15) / 16 * 16); /* whole vectors, as the host has it */
    at.map = at.memory;
    at.pool = at.memory;
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
LANE_PART const __global int *find_slot(const loglin_panel p, const __global float *ws, const __global int *cu_seqlens,
                              uint sequence, uint n) {
    if (p.packed && sequence_length(p, cu_seqlens, sequence) == 0) {
        return 0;
    }
    const uint slot = p.packed ? packed_slot(p, cu_seqlens, sequence) + n : n * p.batch_width + sequence;
    const __global int *record = slot < p.slots ? slot_record(p, ws, slot) : 0;
    const int mine = record && (record[SLOT_FLAGS] & SLOT_VALID) && (uint)record[SLOT_SEQUENCE] == sequence;
    return mine ? record : 0;
}

#if LANE_ITEMS == 1
/* One of the streams: rows of `width` elements, or NULL. */
void set_stream(rows_ahead *ahead, uint stream, const __global storage *rows, ulong first, uint stride, uint width) {
    ahead->rows[stream] = (const __global char *)(rows + first);
    ahead->strides[stream] = stride * sizeof(storage);
    ahead->bytes[stream] = rows ? width * sizeof(storage) : 0;
}
#endif

/* Until the lane's next chunk, that of `slot`, products ask for its rows of q, k, v and o.  slot, q, o: or NULL. */
void look_ahead(const loglin_panel p, const place *at, const inputs *in, const __global storage *o,
                const __global int *slot) {
#if LANE_ITEMS == 1
    rows_ahead *ahead = at->ahead;
    ahead->next = 0;
    ahead->end = slot ? (uint)(slot[SLOT_HI] - slot[SLOT_LO]) : 0;
    const ulong token = slot ? (ulong)slot[SLOT_TOKEN] : 0;
    const uint keys = p.groups * DIM_K, values = p.heads * DIM_V;
    const ulong key = token * keys + at->group * DIM_K;
    const ulong value = token * values + at->first_head * DIM_V + at->first_value;
    const uint width = (LANE_HEADS - 1) * DIM_V + at->values; /* of all heads */
    set_stream(ahead, 0, in->q, key, keys, DIM_K);
    set_stream(ahead, 1, in->k, key, keys, DIM_K);
    set_stream(ahead, 2, in->v, value, values, width);
    set_stream(ahead, 3, o, value, values, width);
#else
    (void)p, (void)at, (void)in, (void)o, (void)slot;
#endif
}
