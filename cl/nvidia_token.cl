/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One token of one sequence through the whole model in one launch, on NVIDIA's GPUs from sm_90 on; weights of bfloat16.
 *
 * There are as many work-groups as are on the device together, and each takes its share of every product.  What it will
 * need of the weights is known from the start, so one item of a warp of its own has them copied into a ring of local
 * memory, always some slots ahead: over norms, attention and waiting the memory is not idle.  The other LOCAL items
 * compute.  A layer is five phases:
 *
 *     in          p = W norm(x) + bias
 *     attention   convolution, gates, level states: runs of 8 columns ("octets") of a head's v; y = gated o, not yet scaled
 *     out         parts = W norm(y)           every group keeps all of x, to which it adds the parts of what a product
 *     gate, up    y = silu(W x') * (W' x')    adds, each over some of the columns: so that there is work for all groups
 *     down        parts = W y
 *
 * What a group makes it tells the others: each float goes to memory with a number, which is the layer's and launch's, in one
 * store, and who needs it looks until the number is there.  No float is told anew before all have it, since every group has
 * something to tell in every phase, and in norms waits for all of them.
 *
 * A product is made by matrix units: a vector's float is three bfloat16 parts, three columns of a matrix, as in
 * nvidia_product.cl.
 *
 * Where arrays hold what: token_layout.cl.  On a CPU token.cl does this.
 */

/* The model; the defaults are those of a tiny one. */
#ifndef HIDDEN
#define HIDDEN 16
#define INTERMEDIATE 16
#define DIM_K 16
#define OUT_WIDTH 16  /* columns of a part of out */
#define DOWN_WIDTH 16 /* and of down */
#define PREPARED 16   /* floats of a product's input in local memory */
#define SLOTS 2       /* of the ring */
#endif
/* Slots that are being copied at once: more only make everybody else's reads wait. */
#ifndef ON_THEIR_WAY
#define ON_THEIR_WAY 2
#endif

#define INLINE __attribute__((always_inline)) /* all: what goes through memory is slow, since local memory has the cache's room */
#define WARPS (LOCAL / 32)
#define ITEMS_BARRIER() meet(1, LOCAL) /* of those that compute */
/* What follows from these is made anew in every turn of the loop over products: it would not fit into registers. */
INLINE uint item(void) { return anew(get_local_id(0)); }
INLINE uint lane_of_item(void) { return item() % 32; }
INLINE float add_other(float x, uint distance) { return x + as_float(shuffle_xor(as_uint(x), distance)); }
INLINE float sum_of_warp(float x) {
#pragma unroll
    for (uint distance = 16; distance > 0; distance /= 2) {
        x = add_other(x, distance);
    }
    return x;
}

/* ---- What groups tell each other ---- */

/* A float, and its number above. */
typedef ulong told;
#define MOST_PARTS 4
#define OCTETS (INNER / 8)

/* Where floats are told, of a layer. */
#define P_AT 0
#define Y_AT (P_AT + P_STRIDE)
#define GATED_AT (Y_AT + Y_STRIDE)
#define SQUARES_AT (GATED_AT + INNER)
#define OUT_PARTS_AT (SQUARES_AT + OCTETS)
#define DOWN_PARTS_AT (OUT_PARTS_AT + MOST_PARTS * X_STRIDE)

/* What all layers have, in local memory: kept by every item it would not fit into registers. */
typedef struct token_arrays {
    __global told *words;
    const __global float *vectors;
    __global float *tails, *values, *log_decay;
    __global int *position;
    __global uint *in_vain; /* somebody has waited in vain: the groups are not on the device together */
    float dt_min, dt_max;
    uint number;              /* of the first layer */
    volatile uint is_in_vain; /* somebody of this group has, and nobody waits any more */
} token_arrays;

typedef struct a_layer {
    __local token_arrays *all;
    uint index;
} a_layer;

INLINE const __global float *vectors_of(a_layer at) { return at.all->vectors + at.index * (ulong)VECTORS_NEXT; }
INLINE __global float *tail_of(a_layer at) { return at.all->tails + at.index * (ulong)TAILS_NEXT; }
INLINE __global float *log_decay_of(a_layer at) { return at.all->log_decay + at.index * (ulong)LOG_DECAY_NEXT; }
INLINE __global int *position_of(a_layer at) { return at.all->position + at.index * POSITION_NEXT; }

INLINE void tell(a_layer at, uint word, float x) {
    const ulong value = (ulong)(at.all->number + at.index) << 32 | as_uint(x);
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" : : "l"(at.all->words + word), "l"(value) : "memory");
}

INLINE told look(a_layer at, uint word) {
    ulong value;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(at.all->words + word) : "memory");
    return value;
}

/* What has been told: `seen`, or what comes when it is looked at again. */
#define MOST_LOOKS (1u << 21)
INLINE float hear_seen(a_layer at, told seen, uint word) {
#pragma unroll 1
    for (uint looks = 0; (uint)(seen >> 32) != at.all->number + at.index && !at.all->is_in_vain; looks++) {
        if (looks == MOST_LOOKS) {
            at.all->is_in_vain = 1;
            *at.all->in_vain = 1;
        }
        seen = look(at, word);
    }
    return as_float((uint)seen);
}

INLINE float hear(a_layer at, uint word) { return hear_seen(at, look(at, word), word); }

/* ---- The stream of weights ---- */

#define SLOT_COLUMNS LOCAL                    /* of a block of 16 rows */
#define COLUMN_BYTES 32
#define SLOT_BYTES (SLOT_COLUMNS * COLUMN_BYTES)

typedef struct ring {
    __local uint4 *slots; /* of SLOT_BYTES */
    __local arrivals *full, *empty;
    uint turn; /* slots that have been filled, or used, so far */
} ring;

/* Products of a layer, and the head behind the last. */
#define IN 0
#define OUT 1
#define GATE_UP 2
#define DOWN 3
#define PRODUCTS 4
#define HEAD 4
INLINE uint product_of(uint step, uint layers) { return step < PRODUCTS * layers ? step % PRODUCTS : HEAD; }

/* What of `count` a group takes: from here on, and to where. */
INLINE uint own_begin(uint count) { return count * anew(get_group_id(0)) / (uint)get_num_groups(0); }
INLINE uint own_end(uint count) { return count * (anew(get_group_id(0)) + 1) / (uint)get_num_groups(0); }

/* Units of a matrix that a group takes: a unit is a block of rows, and of its columns `width`, of one part after the other. */
typedef struct share {
    uint blocks, columns, width, first, last;
} share;

#define OUT_PARTS ((INNER + OUT_WIDTH - 1) / OUT_WIDTH)
#define DOWN_PARTS ((INTERMEDIATE + DOWN_WIDTH - 1) / DOWN_WIDTH)

INLINE share take_share(uint product) {
    share of = {LOGITS_STRIDE / 16, HIDDEN, HIDDEN, 0, 0};
    uint parts = 1;
    if (product == IN) {
        of.blocks = P_STRIDE / 16;
    } else if (product == OUT) {
        of.blocks = X_STRIDE / 16, of.columns = INNER, of.width = OUT_WIDTH, parts = OUT_PARTS;
    } else if (product == GATE_UP) {
        of.blocks = Y_STRIDE / 8;
    } else if (product == DOWN) {
        of.blocks = X_STRIDE / 16, of.columns = INTERMEDIATE, of.width = DOWN_WIDTH, parts = DOWN_PARTS;
    }
    const uint together = product == GATE_UP ? 2 : 1, units = of.blocks * parts / together;
    of.first = own_begin(units) * together;
    of.last = own_end(units) * together;
    return of;
}

INLINE uint first_column(const share *of, uint unit) { return unit / of->blocks * of->width; }
INLINE uint count_columns(const share *of, uint unit) { return min(of->width, of->columns - first_column(of, unit)); }

/* Has a share of a matrix copied, by one item. */
INLINE void copy_share(ring *to, const __global matrix *w, share of) {
#pragma unroll 1
    for (uint unit = of.first; unit < of.last; unit++) {
        const ulong block = unit % of.blocks;
        const __global char *from = (const __global char *)(w + (block * of.columns + first_column(&of, unit)) * 16);
        const uint bytes = count_columns(&of, unit) * COLUMN_BYTES;
#pragma unroll 1
        for (uint at = 0; at < bytes; at += SLOT_BYTES, to->turn++) {
            const uint slot = to->turn % SLOTS;
            if (to->turn >= SLOTS) {
                arrivals_wait(&to->empty[slot], (to->turn / SLOTS - 1) % 2);
            }
            if (to->turn >= ON_THEIR_WAY) {
                const uint earlier = to->turn - ON_THEIR_WAY;
                arrivals_wait(&to->full[earlier % SLOTS], earlier / SLOTS % 2);
            }
            copy_bulk(to->slots + slot * (SLOT_BYTES / 16), from + at, min(bytes - at, (uint)SLOT_BYTES), &to->full[slot]);
        }
    }
}

/* A product's input as three parts of each float, high, middle and low. */
typedef struct split {
    ushort parts[3][PREPARED + 8]; /* 8 keep banks apart */
} split;

INLINE void store_split(__local split *to, uint i, float x) {
#pragma unroll
    for (uint part = 0; part < 3; part++) {
        const ushort rounded = float_to_bfloat(x);
        to->parts[part][i] = rounded;
        x -= bfloat_to_float(rounded);
    }
}

/* C (16 x 8) += A (16 x 16) B (16 x 8), see mma_nvidia.cl. */
INLINE void multiply_tiles(float4 *c, uint4 a, uint b0, uint b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c->x), "+f"(c->y), "+f"(c->z), "+f"(c->w)
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

/* Units of a piece: so many are multiplied before the warps' sums are added up. */
#define PIECE 8
#define PARTIALS (PIECE * WARPS * 16)

/*
 * Units first .. of a share, `count` <= PIECE, times x, which begins at the first column of the share's first unit; the sums of
 * each warp to partials.  A warp takes every WARPS-th 16 columns of a block.  A barrier before and behind.
 */
INLINE void multiply_piece(ring *from, const share *of, uint first, uint count, const __local split *x, __local float *partials) {
    const uint lane = lane_of_item(), warp = item() / 32, part = lane / 4;
    const uint in_tile = (lane / 16 * 8 + lane % 8) * 2 + lane / 8 % 2; /* uint4 that this item names for load_transposed */
    ITEMS_BARRIER();
#pragma unroll 1
    for (uint i = 0; i < count; i++) {
        const uint columns = count_columns(of, first + i);
        const __local ushort *own = x->parts[part < 3 ? part : 0] + lane % 4 * 2 +
                                    (first_column(of, first + i) - first_column(of, of->first));
        float4 sum = (float4)(0.0f);
#pragma unroll 1
        for (uint at = 0; at < columns; at += SLOT_COLUMNS, from->turn++) {
            const uint slot = from->turn % SLOTS;
            arrivals_wait(&from->full[slot], from->turn / SLOTS % 2);
#pragma unroll
            for (uint tile = 0; tile < SLOT_COLUMNS / 16; tile += WARPS) {
                const uint column = at + (tile + warp) * 16;
                if (column < columns) {
                    const uint4 w = load_transposed(from->slots + (slot * SLOT_COLUMNS + (tile + warp) * 16) * 2 + in_tile);
                    const uint b0 = *(const __local uint *)(own + column), b1 = *(const __local uint *)(own + column + 8);
                    multiply_tiles(&sum, w, part < 3 ? b0 : 0, part < 3 ? b1 : 0);
                }
            }
            meet_in_warp();
            if (lane == 0) {
                arrive(&from->empty[slot]);
            }
        }
        const float upper = add_other(sum.x + sum.y, 1), lower = add_other(sum.z + sum.w, 1);
        if (lane % 4 == 0) {
            __local float *to = partials + (i * WARPS + warp) * 16 + lane / 4;
            to[0] = upper;
            to[8] = lower;
        }
    }
    ITEMS_BARRIER();
}

/* A row of a piece. */
INLINE float sum_of_row(const __local float *partials, uint row) {
    const __local float *of_unit = partials + row / 16 * (WARPS * 16) + row % 16;
    float sum = 0.0f;
#pragma unroll
    for (uint warp = 0; warp < WARPS; warp++) {
        sum += of_unit[warp * 16];
    }
    return sum;
}

/*
 * A product with what is prepared, and what is made of it: p, with its bias; y = silu(gate) * up, blocks of which take turns;
 * parts of what is added to x, X_STRIDE apart, the first of out with the bias; the logits.
 */
INLINE void multiply(ring *weights, share of, uint product, a_layer at, __global float *logits,
                     const __local split *prepared, __local float *partials) {
    const uint me = item();
#pragma unroll 1
    for (uint unit = of.first; unit < of.last; unit += PIECE) {
        const uint count = min(of.last - unit, (uint)PIECE), rows = product == GATE_UP ? count * 8 : count * 16;
        const uint own = unit + me / 16, part = own / of.blocks, row_of_part = own % of.blocks * 16 + me % 16;
        float offset = 0.0f;
        if (me < rows && product == IN) {
            offset = vectors_of(at)[IN_BIAS_AT + unit * 16 + me];
        } else if (me < rows && product == OUT && part == 0) {
            offset = vectors_of(at)[OUT_BIAS_AT + row_of_part];
        }
        multiply_piece(weights, &of, unit, count, prepared, partials);
        if (me < rows) {
            const uint row = product == GATE_UP ? me / 16 * 32 + me % 16 : me;
            float sum = sum_of_row(partials, row) + offset;
            if (product == GATE_UP) {
                sum = silu(sum) * sum_of_row(partials, row + 16);
            }
            if (product == HEAD) {
                logits[unit * 16 + me] = sum;
            } else {
                tell(at,
                     product == IN        ? P_AT + unit * 16 + me
                     : product == GATE_UP ? Y_AT + unit * 8 + me
                                          : (product == OUT ? OUT_PARTS_AT : DOWN_PARTS_AT) + part * X_STRIDE + row_of_part,
                     sum);
            }
        }
    }
}

/* ---- What the products read ---- */

#define VALUES_OF_X ((HIDDEN + LOCAL - 1) / LOCAL)

/* x += its `count` parts. */
INLINE void add_parts(float x[VALUES_OF_X], a_layer at, uint parts_at, uint count) {
    const uint number = at.all->number + at.index;
    told seen[VALUES_OF_X][MOST_PARTS];
    for (bool has_all = false; !has_all;) {
        has_all = true;
#pragma unroll
        for (uint j = 0; j < VALUES_OF_X; j++) {
            const uint word = parts_at + min((uint)(j * LOCAL + item()), (uint)HIDDEN - 1);
#pragma unroll
            for (uint part = 0; part < MOST_PARTS; part++) {
                seen[j][part] = part < count ? look(at, word + part * X_STRIDE) : (ulong)number << 32;
            }
        }
#pragma unroll
        for (uint j = 0; j < VALUES_OF_X; j++) {
#pragma unroll
            for (uint part = 0; part < MOST_PARTS; part++) {
                has_all = has_all && (uint)(seen[j][part] >> 32) == number;
            }
        }
        if (!has_all) { /* all are looked at again when one that may be late is there */
            (void)hear(at, parts_at + (count - 1) * X_STRIDE + min(item(), (uint)HIDDEN - 1));
            has_all = at.all->is_in_vain;
        }
    }
#pragma unroll
    for (uint j = 0; j < VALUES_OF_X; j++) {
        x[j] += (as_float((uint)seen[j][0]) + as_float((uint)seen[j][1])) +
                (as_float((uint)seen[j][2]) + as_float((uint)seen[j][3]));
    }
}

INLINE void load_norm(float norm[VALUES_OF_X], const __global float *from) {
#pragma unroll
    for (uint j = 0; j < VALUES_OF_X; j++) {
        norm[j] = from[min((uint)(j * LOCAL + item()), (uint)HIDDEN - 1)];
    }
}

INLINE void prepare_x(const float x[VALUES_OF_X], const float norm[VALUES_OF_X], float eps, __local split *prepared,
               __local float *squares_of_warps) {
    const uint me = item();
    float squares = 0.0f;
#pragma unroll
    for (uint j = 0; j < VALUES_OF_X; j++) {
        squares += j * LOCAL + me < HIDDEN ? x[j] * x[j] : 0.0f;
    }
    squares = sum_of_warp(squares);
    if (lane_of_item() == 0) {
        squares_of_warps[me / 32] = squares;
    }
    ITEMS_BARRIER();
    float all = 0.0f;
#pragma unroll
    for (uint warp = 0; warp < WARPS; warp++) {
        all += squares_of_warps[warp];
    }
    const float scale = rsqrt(all / (float)HIDDEN + eps);
#pragma unroll
    for (uint j = 0; j < VALUES_OF_X; j++) {
        if (j * LOCAL + me < HIDDEN) {
            store_split(prepared, j * LOCAL + me, x[j] * norm[j] * scale);
        }
    }
}

/* The columns that a share needs: from its first part's to its last one's. */
INLINE uint columns_of_share(const share *of) {
    const uint last = of->last - 1;
    return first_column(of, last) + count_columns(of, last) - first_column(of, of->first);
}

/* Those of what is told from `word` on; that of the attention is scaled in segments. */
#define BATCH 2
INLINE void prepare_columns(a_layer at, uint word, const share *of, bool is_scaled, const __local float *scales,
                            __local split *prepared) {
    const uint first = first_column(of, of->first), count = columns_of_share(of);
#pragma unroll 1
    for (uint start = item(); start < count; start += BATCH * LOCAL) {
        told seen[BATCH];
#pragma unroll
        for (uint i = 0; i < BATCH; i++) {
            seen[i] = look(at, word + first + min(start + i * LOCAL, count - 1));
        }
#pragma unroll
        for (uint i = 0; i < BATCH; i++) {
            const uint column = start + i * LOCAL;
            if (column < count) {
                const float x = hear_seen(at, seen[i], word + first + column);
                store_split(prepared, column, is_scaled ? x * scales[(first + column) / SEGMENT] : x);
            }
        }
    }
}

/* ---- Attention ---- */

#define OCTETS_OF_HEAD (DIM_V / 8)
#define MOST_OCTETS 4                       /* that a group takes at once */
#define INPUTS (2 * DIM_K + 8)              /* of an octet: q, k, v */
#define LEVEL_ROWS (DIM_K / 16)                   /* rows of a level that an item holds, 16 apart, 4 columns each */
#undef SEGMENTS
#define SEGMENTS (INNER / SEGMENT)

typedef struct attention_area {
    float2 inputs[MOST_OCTETS][INPUTS]; /* what came before this token, and its own weight; then the value */
    float decay[MOST_OCTETS][LEVELS], weights[MOST_OCTETS][LEVELS];
    float writing[MOST_OCTETS];                                       /* beta, or the time step */
    float query_scale[MOST_OCTETS], key_scale[MOST_OCTETS], query_key[MOST_OCTETS];
    float outputs[MOST_OCTETS * LEVELS][8];
} attention_area;

INLINE uint head_of(uint octet) { return octet / OCTETS_OF_HEAD; }

INLINE uint channel_of(uint octet, uint input) {
    const uint group = head_of(octet) / (HEADS / (QK_CHANNELS / DIM_K));
    return input < DIM_K       ? Q_AT + group * DIM_K + input
           : input < 2 * DIM_K ? K_AT + group * DIM_K + input - DIM_K
                               : V_AT + octet * 8 + input - 2 * DIM_K;
}

/*
 * The levels that exist after `now` tokens follow from the bits of `now`: job 0 of an octet merges those up to the lowest
 * bit into the next level and writes the token's own, level 0; job j takes the level of the j-th bit above.
 */
INLINE uint count_jobs(uint now) { return max(popcount(now), 1u); }
INLINE uint bit_of_job(uint now, uint job) {
#pragma unroll 1
    for (uint i = 0; i < job; i++) {
        now &= now - 1;
    }
    return now & -now;
}
INLINE uint sources_of_job(uint now, uint job) {
    const uint bit = bit_of_job(now, job);
    return job > 0 || bit == 0 ? bit << 1 : (bit << 1) - 1;
}
/* Where a job's level is, 0 for the first token. */
INLINE uint level_of_job(uint now, uint job) { return 32 - clz(bit_of_job(now, job)); }

/* Has the levels that exist after `now` tokens fetched into the cache, of all octets of the group; a warp takes a level. */
INLINE void fetch_levels(a_layer at, uint now) {
    const uint existing = now > 0 ? (now - 1) << 1 | 1 : 0, warp = item() / 32;
    uint turn = 0;
#pragma unroll 1
    for (uint octet = own_begin(OCTETS); octet < own_end(OCTETS); octet++) {
#pragma unroll 1
        for (uint left = existing; left != 0; left &= left - 1, turn++) {
            const ulong level = head_of(octet) * LEVELS + (31 - clz(left & -left));
#pragma unroll 1
            for (uint r = lane_of_item(); turn % WARPS == warp && r < DIM_K; r += 32) {
                const __global float *row = at.all->values + at.index * (ulong)VALUES_NEXT + (level * DIM_K + r) * DIM_V +
                                            octet % OCTETS_OF_HEAD * 8;
                asm volatile("prefetch.global.L2 [%0];" : : "l"(row) : "memory");
            }
        }
    }
}

/* This item's place in a level of an octet. */
INLINE __global float *place_in_level(__global float *values, uint octet, uint level) {
    const uint lane = lane_of_item();
    return values + (((ulong)head_of(octet) * LEVELS + level) * DIM_K + lane / 2) * DIM_V + octet % OCTETS_OF_HEAD * 8 +
           lane % 2 * 4;
}

INLINE void load_tile(float4 tile[LEVEL_ROWS], const __global float *level) {
#pragma unroll
    for (uint i = 0; i < LEVEL_ROWS; i++) {
        tile[i] = *(const __global float4 *)(level + i * (16 * DIM_V));
    }
}

INLINE uint lowest_level(uint sources) { return 31 - clz(sources & -sources); }

/* The first source of a job. */
INLINE void start_job(float4 tile[LEVEL_ROWS], a_layer at, uint first, uint octets, uint now, uint job) {
    const uint sources = sources_of_job(now, job / octets);
    if (sources != 0) {
        load_tile(tile, place_in_level(at.all->values + at.index * (ulong)VALUES_NEXT, first + job % octets, lowest_level(sources)));
    } else {
#pragma unroll
        for (uint i = 0; i < LEVEL_ROWS; i++) {
            tile[i] = (float4)(0.0f);
        }
    }
}

/* Before the inputs are there: all else that octets first .. need from memory. */
INLINE void begin_attention(a_layer at, uint first, uint octets, uint now, float4 tile[LEVEL_ROWS],
                     __local attention_area *area) {
    const uint me = item();
    if (me / 32 < octets * count_jobs(now)) {
        start_job(tile, at, first, octets, now, me / 32);
    }
#pragma unroll 2
    for (uint i = me; i < octets * INPUTS; i += LOCAL) {
        const uint octet = i / INPUTS, input = i % INPUTS;
        const __global float *of = vectors_of(at) + channel_of(first + octet, input);
        const __global float *earlier = tail_of(at) + channel_of(first + octet, input);
        float sum = of[CONV_BIAS_AT];
#pragma unroll
        for (uint tap = 0; tap < TAPS - 1; tap++) {
            sum += of[CONV_WEIGHT_AT + tap * CHANNELS] * earlier[tap * CHANNELS];
        }
        area->inputs[octet][input] = (float2)(sum, of[CONV_WEIGHT_AT + (TAPS - 1) * CHANNELS]);
    }
}

/* From dt's column of p. */
INLINE float time_step(a_layer at, uint head, float dt) {
    return clamp(softplusv(dt + vectors_of(at)[DT_BIAS_AT + head]), at.all->dt_min, at.all->dt_max);
}

INLINE float log_gate(a_layer at, uint head, float dt) {
    return fmax(vectors_of(at)[A_AT + head] * time_step(at, head, dt), -1e6f);
}

#define TURNS ((MOST_OCTETS * INPUTS + LOCAL - 1) / LOCAL)

/* Convolution and gates.  All is looked at before it is waited for. */
INLINE void take_inputs(a_layer at, uint first, uint octets, __local attention_area *area) {
    const uint me = item(), of_octet = me / LEVELS, level = me % LEVELS, head = head_of(first + of_octet);
    const bool has_level = of_octet < octets;
    const uint of_level = P_AT + LEVEL_AT + head * LEVELS + level, of_dt = P_AT + DT_AT + head;
    told seen[TURNS], level_seen = 0, dt_seen = 0;
    float weight = 0.0f, before = 0.0f;
    if (has_level) {
        weight = vectors_of(at)[LEVEL_WEIGHT_AT + head * LEVELS + level];
        before = DELTA ? 0.0f : log_decay_of(at)[head * LEVELS + level];
        level_seen = look(at, of_level);
        dt_seen = look(at, of_dt);
    }
#pragma unroll
    for (uint turn = 0; turn < TURNS; turn++) {
        const uint i = min(turn * LOCAL + me, octets * INPUTS - 1);
        seen[turn] = look(at, P_AT + CONV_AT + channel_of(first + i / INPUTS, i % INPUTS));
    }
#pragma unroll
    for (uint turn = 0; turn < TURNS; turn++) {
        const uint i = turn * LOCAL + me, octet = i / INPUTS, input = i % INPUTS;
        if (octet < octets) {
            const uint from = P_AT + CONV_AT + channel_of(first + octet, input);
            const float2 earlier = area->inputs[octet][input];
            area->inputs[octet][input].x = silu(earlier.x + earlier.y * hear_seen(at, seen[turn], from));
        }
    }
    if (has_level) {
        const float dt = hear_seen(at, dt_seen, of_dt);
        area->weights[of_octet][level] = softplusv(weight * hear_seen(at, level_seen, of_level));
        area->decay[of_octet][level] = exp(log_gate(at, head, dt) + before);
        if (level == 0) {
            area->writing[of_octet] = DELTA ? sigmoid(hear(at, P_AT + BETA_AT + head)) : time_step(at, head, dt);
        }
    }
    ITEMS_BARRIER();
    const uint octet = me / 32;
    if (octet < octets) {
        float qq = 0.0f, kk = 0.0f, qk = 0.0f;
#pragma unroll 1
        for (uint r = lane_of_item(); r < DIM_K; r += 32) {
            const float q = area->inputs[octet][r].x, k = area->inputs[octet][DIM_K + r].x;
            qq += q * q;
            kk += k * k;
            qk += q * k;
        }
        qq = sum_of_warp(qq);
        kk = sum_of_warp(kk);
        qk = sum_of_warp(qk);
        if (lane_of_item() == 0) {
            const float query_scale = DELTA ? 1.0f / sqrt(qq + 1e-6f) : 1.0f;
            const float key_scale = DELTA ? 1.0f / sqrt(kk + 1e-6f) : 1.0f;
            area->query_scale[octet] = query_scale;
            area->key_scale[octet] = key_scale;
            area->query_key[octet] = qk * query_scale * key_scale;
        }
    }
    ITEMS_BARRIER();
}

INLINE float4 sum_of_tile_rows(float4 x) {
#pragma unroll
    for (uint distance = 16; distance > 1; distance /= 2) {
        x = (float4)(add_other(x.x, distance), add_other(x.y, distance), add_other(x.z, distance),
                     add_other(x.w, distance));
    }
    return x;
}

/* A warp's job: what a level gives, weighted, to 8 outputs; and what becomes of the level. */
INLINE void finish_job(float4 tile[LEVEL_ROWS], a_layer at, uint first, uint octets, uint now, uint job,
                __local attention_area *area) {
    const uint octet = job % octets, which = job / octets, row = lane_of_item() / 2, quad = lane_of_item() % 2 * 4;
    const uint level = level_of_job(now, which), sources = sources_of_job(now, which);
    const __local float2 *query = area->inputs[octet] + row, *key = query + DIM_K;
    const __local float2 *value = area->inputs[octet] + 2 * DIM_K + quad;
    const float key_scale = area->key_scale[octet];
#if !DELTA
    const float factor = sources != 0 ? area->decay[octet][lowest_level(sources)] : 0.0f;
#pragma unroll
    for (uint i = 0; i < LEVEL_ROWS; i++) {
        tile[i] *= factor;
    }
#endif
#pragma unroll 1
    for (uint left = sources & (sources - 1); sources != 0 && left != 0; left &= left - 1) {
        const float more = DELTA ? 1.0f : area->decay[octet][lowest_level(left)];
        const __global float *from = place_in_level(at.all->values + at.index * (ulong)VALUES_NEXT, first + octet, lowest_level(left));
#pragma unroll
        for (uint i = 0; i < LEVEL_ROWS; i++) {
            tile[i] += more * *(const __global float4 *)(from + i * (16 * DIM_V));
        }
    }
    float4 remembered = (float4)(0.0f);
#pragma unroll
    for (uint i = 0; i < LEVEL_ROWS; i++) {
        remembered += query[16 * i].x * tile[i];
    }
    remembered = area->query_scale[octet] * sum_of_tile_rows(remembered);
#if DELTA
    float4 removed = (float4)(0.0f);
#pragma unroll
    for (uint i = 0; i < LEVEL_ROWS; i++) {
        removed += key[16 * i].x * tile[i];
    }
    removed = area->writing[octet] * key_scale * sum_of_tile_rows(removed);
    const float forget = area->decay[octet][0];
    remembered = forget * (remembered - area->query_key[octet] * removed);
#pragma unroll
    for (uint i = 0; i < LEVEL_ROWS; i++) {
        tile[i] = forget * (tile[i] - key_scale * key[16 * i].x * removed);
    }
#endif
    if (row == 0) {
        const float4 weighted = sources != 0 ? area->weights[octet][level] * remembered : (float4)(0.0f);
        vstore4(weighted, 0, area->outputs[job] + quad);
    }
    if (sources != 0 && (which == 0 || DELTA)) {
        __global float *to = place_in_level(at.all->values + at.index * (ulong)VALUES_NEXT, first + octet, level);
#pragma unroll
        for (uint i = 0; i < LEVEL_ROWS; i++) {
            *(__global float4 *)(to + i * (16 * DIM_V)) = tile[i];
        }
    }
    if (which == 0) {
        const float4 token = area->writing[octet] * key_scale * (float4)(value[0].x, value[1].x, value[2].x, value[3].x);
        __global float *to = place_in_level(at.all->values + at.index * (ulong)VALUES_NEXT, first + octet, 0);
#pragma unroll
        for (uint i = 0; i < LEVEL_ROWS; i++) {
            *(__global float4 *)(to + i * (16 * DIM_V)) = key[16 * i].x * token;
        }
    }
}

/* What an item of the first warp needs to make y of o, of column `own`. */
typedef struct ending {
    told gate;
    float norm, d;
} ending;

INLINE ending begin_ending(a_layer at, uint own) {
    const ending of = {look(at, P_AT + Z_AT + own), vectors_of(at)[OUT_NORM_AT + own], DELTA ? 0.0f : vectors_of(at)[D_AT + own]};
    return of;
}

/* Behind the jobs: y = o, plus D v, gated and weighted, and the sums of squares of the octets. */
INLINE void finish_octets(a_layer at, uint first, uint octets, uint jobs, ending of,
                   const __local attention_area *area) {
    const uint lane = lane_of_item(), octet = lane / 8, own = first * 8 + lane;
    float normed = 0.0f;
    if (octet < octets) {
        const float value = area->inputs[octet][2 * DIM_K + lane % 8].x;
        float y = area->weights[octet][0] * area->query_key[octet] * area->writing[octet] * value + of.d * value;
#pragma unroll 1
        for (uint job = octet; job < jobs; job += octets) {
            y += area->outputs[job][lane % 8];
        }
        const float gated = y * silu(hear_seen(at, of.gate, P_AT + Z_AT + own));
        tell(at, GATED_AT + own, gated * of.norm);
        normed = GATE_FIRST ? gated : y;
    }
    float squares = normed * normed;
#pragma unroll
    for (uint distance = 4; distance > 0; distance /= 2) {
        squares = add_other(squares, distance);
    }
    if (octet < octets && lane % 8 == 0) {
        tell(at, SQUARES_AT + first + octet, squares);
    }
}

INLINE void finish_attention(a_layer at, uint first, uint octets, uint now, float4 tile[LEVEL_ROWS],
                      __local attention_area *area) {
    const uint me = item(), warp = me / 32, jobs = octets * count_jobs(now);
    const ending of = begin_ending(at, first * 8 + min(me, octets * 8 - 1));
    take_inputs(at, first, octets, area);
#pragma unroll 1
    for (uint job = warp; job < jobs; job += WARPS) {
        if (job != warp) {
            start_job(tile, at, first, octets, now, job);
        }
        finish_job(tile, at, first, octets, now, job, area);
    }
    ITEMS_BARRIER();
    if (warp == 0) {
        finish_octets(at, first, octets, jobs, of, area);
    }
}

INLINE void attend(a_layer at, uint now, __local attention_area *area) {
    const uint end = own_end(OCTETS);
#pragma unroll 1
    for (uint first = own_begin(OCTETS); first < end; first += MOST_OCTETS) {
        const uint octets = min(end - first, (uint)MOST_OCTETS);
        float4 tile[LEVEL_ROWS];
        ITEMS_BARRIER();
        begin_attention(at, first, octets, now, tile, area);
        ITEMS_BARRIER();
        finish_attention(at, first, octets, now, tile, area);
    }
}

/* What y is scaled with, in segments.  Hears from all groups. */
INLINE void hear_scales(a_layer at, float eps, __local float *squares, __local float *scales) {
#pragma unroll 1
    for (uint octet = item(); octet < OCTETS; octet += LOCAL) {
        squares[octet] = hear(at, SQUARES_AT + octet);
    }
    ITEMS_BARRIER();
#pragma unroll 1
    for (uint segment = item() / 32; segment < SEGMENTS; segment += WARPS) {
        float sum = 0.0f;
#pragma unroll 1
        for (uint i = lane_of_item(); i < SEGMENT / 8; i += 32) {
            sum += squares[segment * (SEGMENT / 8) + i];
        }
        sum = sum_of_warp(sum);
        if (lane_of_item() == 0) {
            scales[segment] = rsqrt(sum / (float)SEGMENT + eps);
        }
    }
    ITEMS_BARRIER();
}

/* The convolution's last inputs behind this token, of the channels that a group keeps; an item has one at a time. */
typedef struct conv_inputs {
    uint channel;
    float taps[TAPS];
} conv_inputs;

INLINE conv_inputs no_conv_inputs(void) {
    const conv_inputs of = {CHANNELS, {0.0f}};
    return of;
}

INLINE bool has_channel(conv_inputs of) { return of.channel < own_end(CHANNELS); }

INLINE conv_inputs load_conv_inputs(a_layer at, uint turn) {
    conv_inputs of = {own_begin(CHANNELS) + turn * LOCAL + item(), {0.0f}};
    if (has_channel(of)) {
#pragma unroll
        for (uint tap = 0; tap + 2 < TAPS; tap++) {
            of.taps[tap] = tail_of(at)[(tap + 1) * CHANNELS + of.channel];
        }
        of.taps[TAPS - 1] = hear(at, P_AT + CONV_AT + of.channel);
    }
    return of;
}

INLINE void store_conv_inputs(a_layer at, conv_inputs of) {
    if (TAPS > 1 && has_channel(of)) {
#pragma unroll
        for (uint tap = 0; tap + 2 < TAPS; tap++) {
            tail_of(at)[tap * CHANNELS + of.channel] = of.taps[tap];
        }
        tail_of(at)[(TAPS - 2) * CHANNELS + of.channel] = of.taps[TAPS - 1];
    }
}

/* When nobody reads them any more, by the last group: the levels' decays and the position. */
INLINE void advance(a_layer at, uint now) {
    const uint me = item();
    if (get_group_id(0) == get_num_groups(0) - 1) {
#if !DELTA
#pragma unroll 1
        for (uint i = me; i < HEADS * LEVELS; i += LOCAL) {
            const uint level = i % LEVELS, head = i / LEVELS;
            const bool stays = level > 0 && ((now & (now - 1)) << 1 >> level & 1) != 0;
            const float dt = hear(at, P_AT + DT_AT + head);
            log_decay_of(at)[i] = stays ? log_decay_of(at)[i] + log_gate(at, head, dt) : 0.0f;
        }
#endif
        if (me == 0) {
            *position_of(at) = (int)(now + 1);
        }
    }
}

/* ---- All of it ---- */

/* Has this group's slice of an array fetched into the cache. */
INLINE void fetch_slice(const __global void *array, uint bytes) {
    const uint slice = (bytes / get_num_groups(0) + 31) & ~15u, at = get_group_id(0) * slice;
    if (at < bytes) {
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;"
                     :
                     : "l"((const __global char *)array + at), "r"(min(slice, bytes - at))
                     : "memory");
    }
}

typedef struct weight_arrays {
    const __global matrix *in, *out, *gate_up, *down, *head;
} weight_arrays;

/* All weights in turn, and what else a layer reads. */
INLINE void copy_weights(ring *to, uint layers, weight_arrays of, __local token_arrays *all) {
#pragma unroll 1
    for (uint step = 0; step <= PRODUCTS * layers; step++) {
        const uint product = product_of(step, layers);
        const a_layer at = {all, step / PRODUCTS};
        if (product == IN) {
            fetch_slice(vectors_of(at), VECTORS_NEXT * 4);
            fetch_slice(tail_of(at), TAILS_NEXT * 4);
            fetch_slice(log_decay_of(at), LOG_DECAY_NEXT * 4);
        }
        copy_share(to,
                   product == IN        ? of.in + at.index * (ulong)IN_NEXT
                   : product == OUT     ? of.out + at.index * (ulong)OUT_NEXT
                   : product == GATE_UP ? of.gate_up + at.index * (ulong)GATE_UP_NEXT
                   : product == DOWN    ? of.down + at.index * (ulong)DOWN_NEXT
                                        : of.head,
                   take_share(product));
    }
}

/* words: what groups tell each other, zeros before the first launch.  number: of the first layer, which no launch had. */
__kernel __attribute__((reqd_work_group_size(LOCAL + 32, 1, 1))) void
token(const __global int *ids, const __global matrix *embedding, __global told *words, uint number, uint layers,
      const __global float *vectors, const __global matrix *in, const __global matrix *out,
      const __global matrix *gate_up, const __global matrix *down, const __global float *final_norm,
      const __global matrix *head, __global float *logits, float eps, float dt_min, float dt_max, __global float *tails,
      __global float *values, __global float *log_decay, __global int *position, __global uint *in_vain) {
    __local uint4 slots[SLOTS * (SLOT_BYTES / 16)] __attribute__((aligned(128)));
    __local arrivals full[SLOTS], empty[SLOTS];
    __local split prepared;
    __local float partials[PARTIALS], squares_of_warps[WARPS], squares[OCTETS], scales[SEGMENTS];
    __local attention_area area;
    __local token_arrays all;
    const uint me = get_local_id(0);
    ring weights = {slots, full, empty, 0};
    if (me < SLOTS) {
        arrivals_start(&full[me], 1);
        arrivals_start(&empty[me], WARPS);
    }
    if (me == 0) {
        all.words = words;
        all.vectors = vectors;
        all.tails = tails;
        all.values = values;
        all.log_decay = log_decay;
        all.position = position;
        all.in_vain = in_vain;
        all.dt_min = dt_min;
        all.dt_max = dt_max;
        all.number = number;
        all.is_in_vain = 0;
    }
    arrivals_publish();
    barrier(CLK_LOCAL_MEM_FENCE);
    if (me >= LOCAL) {
        if (me == LOCAL) {
            const weight_arrays of = {in, out, gate_up, down, head};
            copy_weights(&weights, layers, of, &all);
        }
        return;
    }
    const uint id = (uint)ids[0];
    float x[VALUES_OF_X], norm[VALUES_OF_X];
#pragma unroll
    for (uint j = 0; j < VALUES_OF_X; j++) {
        const ulong column = min((uint)(j * LOCAL + me), (uint)HIDDEN - 1);
        x[j] = load1(embedding + ((ulong)(id / 16) * HIDDEN + column) * 16 + id % 16);
    }
    load_norm(norm, vectors + NORM_AT);
    uint now = 0; /* tokens before this one */
    /* One loop over all products: so the code is small enough for the cache of instructions. */
#pragma unroll 1
    for (uint step = 0; step <= PRODUCTS * layers; step++) {
        const uint product = product_of(step, layers);
        const a_layer at = {&all, step / PRODUCTS};
        const share of = take_share(product);
        conv_inputs behind = no_conv_inputs();
        if (product == OUT) {
            attend(at, now, &area);
            hear_scales(at, eps, squares, scales);
            behind = load_conv_inputs(at, 0);
        }
        if (product == OUT || product == DOWN) {
            prepare_columns(at, product == OUT ? GATED_AT : Y_AT, &of, product == OUT, scales, &prepared);
        } else {
            prepare_x(x, norm, eps, &prepared, squares_of_warps);
        }
        if (product == IN) {
            now = (uint)*position_of(at);
            fetch_levels(at, now);
        }
        multiply(&weights, of, product, at, logits, &prepared, partials);
        if (product == OUT) {
            store_conv_inputs(at, behind);
#pragma unroll 1
            for (uint turn = 1; turn * LOCAL * get_num_groups(0) < CHANNELS; turn++) {
                store_conv_inputs(at, load_conv_inputs(at, turn));
            }
            advance(at, now);
        }
        if (product == OUT || product == DOWN) {
            load_norm(norm, product == OUT            ? vectors_of(at) + MLP_NORM_AT
                            : at.index + 1 < layers ? vectors_of(at) + VECTORS_NEXT + NORM_AT
                                                    : final_norm);
            add_parts(x, at, product == OUT ? OUT_PARTS_AT : DOWN_PARTS_AT, product == OUT ? OUT_PARTS : DOWN_PARTS);
        }
    }
}
