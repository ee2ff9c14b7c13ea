/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One token of one sequence through the whole model in one launch, on NVIDIA's GPUs from sm_90 on; weights of bfloat16.
 *
 * There are as many work-groups as are on the device together, and each takes its share of every product.  What it will
 * need of the weights is known from the start, so one item of a warp of its own has them copied into a ring of local
 * memory, always some slots ahead: over norms, attention and waiting the memory is not idle.  LOCAL items compute, and
 * HELPERS others read and write the states.  A layer is five phases:
 *
 *     in          p = W norm(x) + bias
 *     attention   convolution, gates, level states: runs of 8 columns ("octets") of a head's v; y = gated o, not yet scaled
 *     out         parts = W norm(y)           a product that adds to x makes parts, each over some of the columns: so there
 *     gate, up    y = silu(W x') * (W' x')    is work for all groups.  Who has a row of x adds up its parts, and tells what
 *     down        parts = W y                 x is then
 *
 * What a group makes it tells the others: each float goes to memory with a number, which is the layer's and launch's, in one
 * store, and who needs it looks until the number is there.  No float is told anew before all have it, since every group has
 * something to tell in every phase, and what it tells follows from all that the phase before told.
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
#define STAGED 1      /* levels of octets in local memory */
#endif
#define ON_THEIR_WAY 2 /* slots that are being copied at once: more only make everybody else's reads wait */

#define INLINE __attribute__((always_inline)) /* all: what goes through memory is slow, since local memory has the cache's room */
#define WARPS (LOCAL / 32)
#define HELPERS 128 /* items that read and write the states */
#define HELPER_WARPS (HELPERS / 32)
#define ITEMS_BARRIER() meet(1, LOCAL) /* of those that compute */
#define HELPERS_BARRIER() meet(2, HELPERS)
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
#define MIDDLE_X_AT (DOWN_PARTS_AT + MOST_PARTS * X_STRIDE) /* x between attention and MLP */
#define X_AT (MIDDLE_X_AT + X_STRIDE)                       /* before a layer, and behind the last */

/* What all layers have, in local memory: kept by every item it would not fit into registers. */
typedef struct token_arrays {
    __global told *words;
    const __global float *vectors;
    __global float *tails, *values, *log_decay;
    __global int *position;
    __global uint *in_vain; /* somebody has waited in vain: the groups are not on the device together */
    float dt_min, dt_max;
    uint number;              /* of the first layer */
    volatile uint most_looks; /* before waiting is in vain: 1 when somebody of this group has, and nobody waits any more */
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
    const uint number = at.all->number + at.index;
    if ((uint)(seen >> 32) != number) {
        uint left = at.all->most_looks;
#pragma unroll 1
        do {
            seen = look(at, word);
            left--;
        } while ((uint)(seen >> 32) != number && left != 0);
        if (left == 0) {
            at.all->most_looks = 1;
        }
    }
    return as_float((uint)seen);
}

INLINE float hear(a_layer at, uint word) { return hear_seen(at, look(at, word), word); }

/*
 * `n` floats LOCAL apart, from word + start on, of `count`: an item looks at all of them at once, and again at all that are
 * missing, since each look takes as long as all together.
 */
INLINE uint nth_word(uint word, uint start, uint count, uint i) { return word + min(start + i * LOCAL, count - 1); }

INLINE void look_at_all(told *seen, uint n, a_layer at, uint word, uint start, uint count) {
#pragma unroll
    for (uint i = 0; i < n; i++) {
        seen[i] = look(at, nth_word(word, start, count, i));
    }
}

INLINE bool is_told(a_layer at, told seen) { return (uint)(seen >> 32) == at.all->number + at.index; }

INLINE void hear_all(told *seen, uint n, a_layer at, uint word, uint start, uint count) {
    uint left = at.all->most_looks;
#pragma unroll 1
    for (bool has_all = false; !has_all && left != 0; left--) {
        has_all = true;
#pragma unroll
        for (uint i = 0; i < n; i++) {
            if (!is_told(at, seen[i])) {
                has_all = false;
                seen[i] = look(at, nth_word(word, start, count, i));
            }
        }
    }
    if (left == 0) {
        at.all->most_looks = 1;
    }
}

/* ---- The stream of weights ---- */

#define SLOT_COLUMNS 512 /* of a block of 16 rows */
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

/*
 * Units of a matrix that a group takes: a unit is a block of rows, and of its columns `width`, of one part after the other.
 * They are of two parts at most.
 */
typedef struct share {
    uint blocks, columns, width, slots; /* slots: that a unit takes */
    uint units, part, block;            /* part and block of the first */
    uint together;                      /* units that are multiplied before the warps' sums are added up */
} share;

#define PIECE_SLOTS 32
#define OUT_PARTS ((INNER + OUT_WIDTH - 1) / OUT_WIDTH)
#define DOWN_PARTS ((INTERMEDIATE + DOWN_WIDTH - 1) / DOWN_WIDTH)

INLINE share take_share(uint product) {
    share of;
    uint parts = 1;
    of.blocks = LOGITS_STRIDE / 16, of.columns = HIDDEN, of.width = HIDDEN;
    if (product == IN) {
        of.blocks = P_STRIDE / 16;
    } else if (product == OUT) {
        of.blocks = X_STRIDE / 16, of.columns = INNER, of.width = OUT_WIDTH, parts = OUT_PARTS;
    } else if (product == GATE_UP) {
        of.blocks = Y_STRIDE / 8;
    } else if (product == DOWN) {
        of.blocks = X_STRIDE / 16, of.columns = INTERMEDIATE, of.width = DOWN_WIDTH, parts = DOWN_PARTS;
    }
    const uint pair = product == GATE_UP ? 2 : 1, all = of.blocks * parts / pair, first = own_begin(all) * pair;
    of.slots = (of.width + SLOT_COLUMNS - 1) / SLOT_COLUMNS;
    of.units = own_end(all) * pair - first;
    of.part = first / of.blocks;
    of.block = first % of.blocks;
    of.together = min(PIECE_SLOTS / of.slots, (uint)LOCAL / 16) & ~1u;
    return of;
}

INLINE uint columns_of_part(const __local share *of, uint part) { return min(of->width, of->columns - part * of->width); }
/* The columns that a share needs: from its first part's to its last one's. */
INLINE uint columns_of_share(const __local share *of) {
    const uint last = of->part + (of->block + of->units > of->blocks);
    return (last - of->part) * of->width + columns_of_part(of, last);
}

/* Has a share of a matrix copied, by one item. */
INLINE void copy_share(ring *to, const __global matrix *w, const __local share *of) {
    uint part = of->part, block = of->block;
#pragma unroll 1
    for (uint units = of->units; units > 0; units--) {
        const __global char *from = (const __global char *)(w + ((ulong)block * of->columns + part * of->width) * 16);
        const uint bytes = columns_of_part(of, part) * COLUMN_BYTES;
#pragma unroll 1
        for (uint at = 0; at < of->slots * SLOT_BYTES; at += SLOT_BYTES, to->turn++) {
            const uint slot = to->turn % SLOTS;
            if (to->turn >= SLOTS) {
                arrivals_wait(&to->empty[slot], (to->turn / SLOTS - 1) % 2);
            }
            if (to->turn >= ON_THEIR_WAY) {
                const uint earlier = to->turn - ON_THEIR_WAY;
                arrivals_wait(&to->full[earlier % SLOTS], earlier / SLOTS % 2);
            }
            if (at < bytes) {
                copy_bulk(to->slots + slot * (SLOT_BYTES / 16), from + at, min(bytes - at, (uint)SLOT_BYTES), &to->full[slot]);
            } else {
                arrive(&to->full[slot]);
            }
        }
        block++;
        if (block == of->blocks) {
            block = 0, part++;
        }
    }
}

/*
 * A product's input as three parts of each float, high, middle and low.  Of 16 columns, those that an item multiplies lie
 * together: 0 4 8 12, 1 5 9 13, ...
 */
typedef struct split {
    ushort parts[3][PREPARED + 16]; /* 16 keep banks apart */
} split;

INLINE ushort round_to_bfloat(float x) {
    uint y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(0.0f), "f"(x));
    return (ushort)y;
}

INLINE void store_split(__local split *to, uint i, float x) {
    const uint place = (i & ~15u) | (i & 3) << 2 | (i >> 2 & 3);
#pragma unroll
    for (uint part = 0; part < 3; part++) {
        const ushort rounded = round_to_bfloat(x);
        to->parts[part][place] = rounded;
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

INLINE uint low_halves(uint x, uint y) {
    uint z;
    asm("prmt.b32 %0, %1, %2, 0x5410;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}

INLINE uint high_halves(uint x, uint y) {
    uint z;
    asm("prmt.b32 %0, %1, %2, 0x7632;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}

/*
 * 16 columns of a block, as A: what is loaded is rows r and r + 8 of a column, as they lie in turn; so A's columns are those
 * of the block in the order in which the input lies.
 */
INLINE uint4 load_weights(const __local uint4 *tile) {
    const uint4 x = load_transposed(tile);
    return (uint4)(low_halves(x.x, x.y), high_halves(x.x, x.y), low_halves(x.z, x.w), high_halves(x.z, x.w));
}

/* Warps that multiply a slot, a crew; the crews take slots in turn: so what they wait for overlaps. */
#define CREW 4
#define CREWS (WARPS / CREW)
#define TILES 4 /* that a warp multiplies at once */

/* `count` tiles of 16 columns of a slot, CREW apart from `first` on, times the columns of x. */
INLINE void multiply_together(float4 sums[2], const __local uint4 *slot, const __local ushort *x, uint first, uint count) {
    const uint lane = lane_of_item();
    uint4 w[TILES];
    uint2 of_x[TILES];
#pragma unroll
    for (uint i = 0; i < count; i++) {
        w[i] = load_weights(slot + (first + i * CREW) * 32 + lane);
        of_x[i] = *(const __local uint2 *)(x + (first + i * CREW) * 16);
    }
#pragma unroll
    for (uint i = 0; i < count; i++) {
        multiply_tiles(&sums[i % 2], w[i], of_x[i].x, of_x[i].y);
    }
}

/* The tiles of a slot that a warp multiplies. */
INLINE void multiply_slot(float4 sums[2], const __local uint4 *slot, const __local ushort *x, uint count) {
    uint tile = item() / 32 % CREW;
#pragma unroll 1
    for (; tile + (TILES - 1) * CREW < count; tile += TILES * CREW) {
        multiply_together(sums, slot, x, tile, TILES);
    }
#pragma unroll 1
    for (; tile < count; tile += CREW) {
        multiply_together(sums, slot, x, tile, 1);
    }
}

#define PARTIALS (PIECE_SLOTS * CREW * 16)

/*
 * `count` units of a share from the `first` on, times x, which begins at the first column of the share's first part; the sums
 * of a slot's crew to partials.
 */
INLINE void multiply_units(ring *from, const __local share *of, uint first, uint count, const __local split *x,
                           __local float *partials) {
    const uint lane = lane_of_item(), warp = item() / 32, part = lane / 4, end = count * of->slots;
    const __local ushort *own = x->parts[part < 3 ? part : 0] + lane % 4 * 4;
#pragma unroll 1
    for (uint at = (warp / CREW + CREWS - from->turn % CREWS) % CREWS; at < end; at += CREWS) {
        const uint turn = from->turn + at, slot = turn % SLOTS, unit = at / of->slots;
        const uint start = (at - unit * of->slots) * SLOT_COLUMNS, next = of->block + first + unit >= of->blocks;
        const uint columns = max(columns_of_part(of, of->part + next), start) - start;
        float4 sums[2] = {(float4)(0.0f), (float4)(0.0f)};
        arrivals_wait(&from->full[slot], turn / SLOTS % 2);
        multiply_slot(sums, from->slots + slot * SLOT_COLUMNS * 2, own + next * of->width + start,
                      min(columns, (uint)SLOT_COLUMNS) / 16);
        meet_in_warp();
        if (lane == 0) {
            arrive(&from->empty[slot]);
        }
        const float4 sum = sums[0] + sums[1];
        /* The third part is in another item, beside nothing of use. */
        const float upper = add_other(sum.x + (lane % 4 == 0 ? sum.y : 0.0f), 1);
        const float lower = add_other(sum.z + (lane % 4 == 0 ? sum.w : 0.0f), 1);
        if (lane % 4 == 0) {
            __local float *to = partials + (at * CREW + warp % CREW) * 16 + lane / 4;
            to[0] = upper;
            to[8] = lower;
        }
    }
    from->turn += end;
}

/* A row of what has been multiplied together. */
INLINE float sum_of_row(const __local float *partials, uint slots, uint row) {
    const __local float *own = partials + row / 16 * (slots * CREW * 16) + row % 16;
    float sum = 0.0f;
#pragma unroll 1
    for (uint slot = 0; slot < slots; slot++, own += CREW * 16) {
#pragma unroll
        for (uint warp = 0; warp < CREW; warp++) {
            sum += own[warp * 16];
        }
    }
    return sum;
}

INLINE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

INLINE float fast_silu(float x) { return x * reciprocal(1.0f + native_exp(-x)); }

/*
 * A product with what is prepared, and what is made of it: p, with its bias; y = silu(gate) * up, blocks of which take turns;
 * parts of what is added to x, X_STRIDE apart, the first of out with the bias; the logits.
 */
INLINE void multiply(ring *weights, const __local share *of, uint product, a_layer at, __global float *logits,
                     const __local split *prepared, __local float *partials, __local arrivals *kept) {
    const uint me = item(), rows_of_unit = product == GATE_UP ? 8 : 16;
#pragma unroll 1
    for (uint first = 0; first < of->units; first += of->together) {
        const uint count = min(of->units - first, of->together), next = of->block + first + me / 16 >= of->blocks;
        const uint part = of->part + next, row = (of->block + first - (next ? of->blocks : 0)) * rows_of_unit + me;
        const bool is_own = me < count * rows_of_unit;
        float offset = 0.0f;
        if (is_own && (product == IN || (product == OUT && part == 0))) {
            offset = vectors_of(at)[(product == IN ? IN_BIAS_AT : OUT_BIAS_AT) + row];
        }
        ITEMS_BARRIER();
        multiply_units(weights, of, first, count, prepared, partials);
        ITEMS_BARRIER();
        if (product == DOWN) {
            arrivals_wait(kept, at.index % 2);
        }
        if (is_own) {
            const uint summed = product == GATE_UP ? me / 16 * 32 + me % 16 : me;
            float sum = sum_of_row(partials, of->slots, summed) + offset;
            if (product == GATE_UP) {
                sum = fast_silu(sum) * sum_of_row(partials, of->slots, summed + 16);
            }
            if (product == HEAD) {
                logits[row] = sum;
            } else {
                tell(at,
                     row + (product == IN        ? P_AT
                            : product == GATE_UP ? Y_AT
                                                 : (product == OUT ? OUT_PARTS_AT : DOWN_PARTS_AT) + part * X_STRIDE),
                     sum);
            }
        }
    }
}

/* ---- What the products read ---- */

/* x, some rows of which are the group's own: adds up their parts, and tells `to` what x is then. */
INLINE void sum_parts(a_layer at, uint parts_at, uint count, a_layer to, uint x_at, __local float *own_x) {
    const uint first = own_begin(HIDDEN), end = (own_end(HIDDEN) - first) * MOST_PARTS;
#pragma unroll 1
    for (uint i = item(); i / 32 * 32 < end; i += LOCAL) {
        const uint row = min(i, end - 1) / MOST_PARTS, part = i % MOST_PARTS;
        const float own = part < count ? hear(at, parts_at + part * X_STRIDE + first + row) : 0.0f;
        const float sum = add_other(add_other(own, 1), 2);
        if (i < end && part == 0) {
            own_x[row] += sum;
            tell(to, x_at + first + row, own_x[row]);
        }
    }
}

#define VALUES_OF_X ((HIDDEN + LOCAL - 1) / LOCAL)

/* The norm of x. */
INLINE void prepare_x(a_layer at, uint x_at, const __global float *norm, float eps, __local split *prepared,
                      __local float *squares_of_warps) {
    const uint me = item();
    told seen[VALUES_OF_X];
    float x[VALUES_OF_X], squares = 0.0f;
    look_at_all(seen, VALUES_OF_X, at, x_at, me, HIDDEN);
#pragma unroll
    for (uint j = 0; j < VALUES_OF_X; j++) {
        x[j] = norm[nth_word(0, me, HIDDEN, j)];
    }
    hear_all(seen, VALUES_OF_X, at, x_at, me, HIDDEN);
#pragma unroll
    for (uint j = 0; j < VALUES_OF_X; j++) {
        const float own = as_float((uint)seen[j]);
        squares += j * LOCAL + me < HIDDEN ? own * own : 0.0f;
        x[j] *= own;
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
    const float scale = rsqrt(all * (1.0f / HIDDEN) + eps);
#pragma unroll
    for (uint j = 0; j < VALUES_OF_X; j++) {
        if (j * LOCAL + me < HIDDEN) {
            store_split(prepared, j * LOCAL + me, x[j] * scale);
        }
    }
}

#define BATCH 4 /* floats of y that an item hears together */

/* ---- Attention ---- */

#define MOST_OCTETS 4           /* that a group takes at once */
#define LEVEL_ROWS (DIM_K / 16) /* rows of an octet's level that an item of one warp has, 16 apart, 4 columns each */
#define LEVEL_PIECES (DIM_K * 2) /* of 16 bytes, of an octet's level */
#undef SEGMENTS
#define SEGMENTS (INNER / SEGMENT)

/* Heads that have q and k in common, and how many such q and k the octets of a group need at most. */
#define KEYS (QK_CHANNELS / DIM_K)
#define OCTETS_OF_HEAD (DIM_V / 8)
#define OCTETS_OF_KEY (OCTETS / KEYS)
#define SPANNED ((MOST_OCTETS - 2) / OCTETS_OF_KEY + 2)
#define MOST_KEYS (SPANNED < KEYS ? SPANNED : KEYS)
/* Inputs: q and k of one after the other, then v of the octets. */
#define VALUES_AT (MOST_KEYS * 2 * DIM_K)
#define INPUTS (VALUES_AT + MOST_OCTETS * 8)

typedef struct attention_area {
    float4 staged[STAGED][LEVEL_PIECES + 2]; /* existing levels, of all octets in turn; 2 keep banks apart */
    float2 inputs[INPUTS]; /* what came before this token, and its own weight; then the value */
    float decay[MOST_OCTETS][LEVELS], weights[MOST_OCTETS][LEVELS]; /* until this token */
    float dt_bias[MOST_OCTETS], a[MOST_OCTETS];
    float forget[MOST_OCTETS], writing[MOST_OCTETS]; /* this token's decay; beta, or the time step */
    float query_query[MOST_OCTETS], key_key[MOST_OCTETS], query_key[MOST_OCTETS];
    float removed[LEVELS][MOST_OCTETS * 8]; /* from each level */
    arrivals begun, attended, heard, kept;  /* see help */
} attention_area;

INLINE uint head_of(uint octet) { return octet / OCTETS_OF_HEAD; }
INLINE uint key_of(uint octet) { return octet / OCTETS_OF_KEY; }
INLINE uint count_inputs(uint first, uint octets) {
    return (key_of(first + octets - 1) - key_of(first) + 1) * 2 * DIM_K + octets * 8;
}

/* The i-th input of octets from `first` on: its place, and its channel. */
typedef struct input {
    uint place, channel;
} input;

INLINE input find_input(uint first, uint octets, uint i) {
    const uint of_keys = count_inputs(first, octets) - octets * 8;
    const uint key = key_of(first) + i / (2 * DIM_K), row = i % (2 * DIM_K);
    const input of_key = {i, row < DIM_K ? Q_AT + key * DIM_K + row : K_AT + key * DIM_K + row - DIM_K};
    const input of_value = {VALUES_AT + i - of_keys, V_AT + first * 8 + i - of_keys};
    return i < of_keys ? of_key : of_value;
}

/*
 * The levels that exist after `now` tokens follow from the bits of `now`: this token merges those up to the lowest bit
 * into the level above it, `merged`, which there was none of, and writes its own, level 0.
 */
INLINE uint existing_levels(uint now) { return now > 0 ? (now - 1) << 1 | 1 : 0; }
INLINE uint merged_level(uint now) { return 32 - clz(now & -now); }
INLINE uint lowest_level(uint levels) { return 31 - clz(levels & -levels); }
/* Levels that there are behind this token, but for its own; and what a level is made of. */
INLINE uint coming_levels(uint now) { return now << 1; }
INLINE uint sources_of(uint now, uint level) { return level == merged_level(now) ? (1u << level) - 1 : 1u << level; }

/* Four columns of a row of a level, the `half` of an octet. */
INLINE __global float4 *place_in_level(a_layer at, uint octet, uint level, uint row, uint half_of_octet) {
    return (__global float4 *)(at.all->values + at.index * (ulong)VALUES_NEXT +
                               (((ulong)head_of(octet) * LEVELS + level) * DIM_K + row) * DIM_V + octet % OCTETS_OF_HEAD * 8 +
                               half_of_octet * 4);
}

/* How memory is read and written: 8 items have a row of all octets. */
typedef struct row_piece {
    uint row, octet, half_of_octet;
} row_piece;

INLINE row_piece find_row_piece(uint i) {
    const row_piece of = {i / 8, i % 8 / 2, i % 2};
    return of;
}

/* Rows of `items` items, and how often they take some. */
#define ROWS_OF(items) ((items) / 8)
#define PASSES_OF(items) ((DIM_K + ROWS_OF(items) - 1) / ROWS_OF(items))
#define WRITTEN 4 /* rows that a helper writes together */

/* Starts copying the levels that exist after `now` tokens to local memory, as many as have room there. */
INLINE void stage_levels(a_layer at, uint first, uint octets, uint now, __local attention_area *area) {
    const row_piece of = find_row_piece(item() - LOCAL);
    uint left = existing_levels(now);
#pragma unroll 1
    for (uint others = 0; of.octet < octets && left != 0 && others + octets <= STAGED; left &= left - 1, others += octets) {
        const __global float4 *from = place_in_level(at, first + of.octet, lowest_level(left), 0, of.half_of_octet);
#pragma unroll 1
        for (uint row = of.row; row < DIM_K; row += ROWS_OF(HELPERS)) {
            copy_16(&area->staged[others + of.octet][row * 2 + of.half_of_octet], from + row * (DIM_V / 4), 1);
        }
    }
}

/* All else that octets first .. need from memory, before their inputs are there. */
INLINE void begin_inputs(a_layer at, uint first, uint octets, __local attention_area *area) {
    const uint me = item() - LOCAL, count = count_inputs(first, octets), octet = me / LEVELS, level = me % LEVELS;
    if (octet < octets) {
        const uint head = head_of(first + octet);
        area->weights[octet][level] = vectors_of(at)[LEVEL_WEIGHT_AT + head * LEVELS + level];
        area->decay[octet][level] = DELTA ? 1.0f : exp(log_decay_of(at)[head * LEVELS + level]);
        if (level == 0) {
            area->dt_bias[octet] = vectors_of(at)[DT_BIAS_AT + head];
            area->a[octet] = vectors_of(at)[A_AT + head];
        }
    }
#pragma unroll 1
    for (uint i = me; i < count; i += HELPERS) {
        const input of = find_input(first, octets, i);
        const __global float *weights = vectors_of(at) + of.channel, *earlier = tail_of(at) + of.channel;
        float sum = weights[CONV_BIAS_AT];
#pragma unroll
        for (uint tap = 0; tap < TAPS - 1; tap++) {
            sum += weights[CONV_WEIGHT_AT + tap * CHANNELS] * earlier[tap * CHANNELS];
        }
        area->inputs[of.place] = (float2)(sum, weights[CONV_WEIGHT_AT + (TAPS - 1) * CHANNELS]);
    }
}

INLINE float limited_log_gate(float a, float step) { return fmax(a * step, -1e6f); }
INLINE float limited_time_step(a_layer at, float dt) { return clamp(softplusv(dt), at.all->dt_min, at.all->dt_max); }

#define TURNS ((INPUTS + LOCAL - 1) / LOCAL)

/* What an item hears for inputs and gates: all at once. */
#define GATES_AT TURNS
#define LOOKS (TURNS + 2 + DELTA)

INLINE uint find_word(uint first, uint octets, uint i) {
    const uint me = item(), head = head_of(first + min(me / LEVELS, octets - 1));
    const uint of_item = min(i * LOCAL + me, count_inputs(first, octets) - 1);
    return P_AT + (i < TURNS           ? CONV_AT + find_input(first, octets, of_item).channel
                   : i == GATES_AT     ? LEVEL_AT + head * LEVELS + me % LEVELS
                   : i == GATES_AT + 1 ? DT_AT + head
                                       : BETA_AT + head);
}

/* Convolution and gates. */
INLINE void take_inputs(a_layer at, uint first, uint octets, __local attention_area *area) {
    const uint me = item(), octet = me / LEVELS, level = me % LEVELS, looks = octet < octets ? LOOKS : TURNS;
    told seen[LOOKS];
#pragma unroll
    for (uint i = 0; i < LOOKS; i++) {
        seen[i] = look(at, find_word(first, octets, i));
    }
    uint left = at.all->most_looks;
#pragma unroll 1
    for (bool has_all = false; !has_all && left != 0; left--) {
        has_all = true;
#pragma unroll
        for (uint i = 0; i < LOOKS; i++) {
            if (i < looks && !is_told(at, seen[i])) {
                has_all = false;
                seen[i] = look(at, find_word(first, octets, i));
            }
        }
    }
    if (left == 0) {
        at.all->most_looks = 1;
    }
#pragma unroll
    for (uint turn = 0; turn < TURNS; turn++) {
        const uint i = turn * LOCAL + me;
        if (i < count_inputs(first, octets)) {
            const uint place = find_input(first, octets, i).place;
            const float2 earlier = area->inputs[place];
            area->inputs[place].x = fast_silu(earlier.x + earlier.y * as_float((uint)seen[turn]));
        }
    }
    if (octet < octets) {
        area->weights[octet][level] = softplusv(area->weights[octet][level] * as_float((uint)seen[GATES_AT]));
        if (level == 0) {
            const float step = limited_time_step(at, as_float((uint)seen[GATES_AT + 1]) + area->dt_bias[octet]);
            area->forget[octet] = exp(limited_log_gate(area->a[octet], step));
            area->writing[octet] = DELTA ? sigmoid(as_float((uint)seen[LOOKS - 1])) : step;
        }
    }
}

INLINE const __local float2 *find_key(uint first, uint octet, const __local attention_area *area) {
    return area->inputs + ((key_of(first + octet) - key_of(first)) * 2 + 1) * DIM_K;
}

/* Where a level of an octet is in local memory; STAGED: nowhere. */
INLINE uint find_staged(uint octet, uint octets, uint existing, uint level) {
    const uint of_all = popcount(existing & ((1u << level) - 1)) * octets;
    return of_all + octets <= STAGED ? of_all + octet : STAGED;
}

/* Adds `factor` times rows of a level, `count` of them `apart` from `row` on, to sums. */
INLINE void add_level(float4 *sums, uint count, float factor, a_layer at, uint first, uint octet, uint octets, uint now,
                      uint level, uint row, uint apart, uint half_of_octet, const __local attention_area *area) {
    const uint place = find_staged(octet, octets, existing_levels(now), level);
    if (place < STAGED) {
#pragma unroll
        for (uint i = 0; i < count; i++) {
            if (row + i * apart < DIM_K) {
                sums[i] += factor * area->staged[place][(row + i * apart) * 2 + half_of_octet];
            }
        }
    } else {
        const __global float4 *from = place_in_level(at, first + octet, level, 0, half_of_octet);
#pragma unroll
        for (uint i = 0; i < count; i++) {
            if (row + i * apart < DIM_K) {
                sums[i] += factor * from[(row + i * apart) * (DIM_V / 4)];
            }
        }
    }
}

INLINE float4 add_other4(float4 x, uint distance) {
    return (float4)(add_other(x.x, distance), add_other(x.y, distance), add_other(x.z, distance), add_other(x.w, distance));
}

#define SUMS_OF_WARP (2 * MOST_OCTETS * 8)

INLINE float weigh_level(uint octet, uint level, uint merged, const __local attention_area *area) {
    return area->weights[octet][max(level, merged)] * (DELTA ? 1.0f : area->decay[octet][level]);
}

/* The first levels that had no room in local memory, while all wait for the inputs. */
#define EARLY 2
INLINE void load_early(float4 early[EARLY][PASSES_OF(LOCAL)], a_layer at, uint first, uint octets, uint now) {
    const row_piece of = find_row_piece(item());
    const uint octet = min(of.octet, octets - 1);
    uint left = existing_levels(now);
#pragma unroll 1
    for (uint others = 0; left != 0 && others + octets <= STAGED; others += octets) {
        left &= left - 1;
    }
#pragma unroll
    for (uint e = 0; e < EARLY; e++, left &= left - 1) {
#pragma unroll
        for (uint i = 0; i < PASSES_OF(LOCAL); i++) {
            const uint row = of.row + i * ROWS_OF(LOCAL);
            early[e][i] = (float4)(0.0f);
            if (left != 0 && row < DIM_K) {
                early[e][i] = *place_in_level(at, first + octet, lowest_level(left), row, of.half_of_octet);
            }
        }
    }
}

/*
 * What q, and DELTA k, give with the sum of the levels as they are weighted: since all is linear, no level by itself matters.
 * The sums of each warp, over its rows, to `sums`.
 */
INLINE void read_levels(a_layer at, uint first, uint octets, uint now, const float4 early[EARLY][PASSES_OF(LOCAL)],
                        const __local attention_area *area, __local float *sums) {
    const row_piece of = find_row_piece(item());
    const uint octet = min(of.octet, octets - 1), lane = lane_of_item(), merged = merged_level(now);
    const __local float2 *key = find_key(first, octet, area);
    float4 all[PASSES_OF(LOCAL)], of_query = (float4)(0.0f);
#if DELTA
    float4 of_key = (float4)(0.0f);
#endif
#pragma unroll
    for (uint i = 0; i < PASSES_OF(LOCAL); i++) {
        all[i] = (float4)(0.0f);
    }
    uint left = existing_levels(now);
#pragma unroll 1
    for (uint others = 0; left != 0 && others + octets <= STAGED; left &= left - 1, others += octets) {
        const float weight = weigh_level(octet, lowest_level(left), merged, area);
#pragma unroll
        for (uint i = 0; i < PASSES_OF(LOCAL); i++) {
            const uint row = of.row + i * ROWS_OF(LOCAL);
            if (row < DIM_K) {
                all[i] += weight * area->staged[others + octet][row * 2 + of.half_of_octet];
            }
        }
    }
#pragma unroll
    for (uint e = 0; e < EARLY; e++, left &= left - 1) {
        const float weight = left != 0 ? weigh_level(octet, lowest_level(left), merged, area) : 0.0f;
#pragma unroll
        for (uint i = 0; i < PASSES_OF(LOCAL); i++) {
            all[i] += weight * early[e][i];
        }
    }
#pragma unroll 1
    for (; left != 0; left &= left - 1) {
        const uint level = lowest_level(left);
        add_level(all, PASSES_OF(LOCAL), weigh_level(octet, level, merged, area), at, first, octet, octets, now, level, of.row,
                  ROWS_OF(LOCAL), of.half_of_octet, area);
    }
#pragma unroll
    for (uint i = 0; i < PASSES_OF(LOCAL); i++) {
        const uint row = of.row + i * ROWS_OF(LOCAL);
        if (row < DIM_K) {
            of_query += key[(int)row - DIM_K].x * all[i];
#if DELTA
            of_key += key[row].x * all[i];
#endif
        }
    }
    of_query = add_other4(add_other4(of_query, 8), 16);
    __local float *to = sums + item() / 32 * SUMS_OF_WARP + lane * 4;
    if (lane < 8) {
        vstore4(of_query, 0, to);
    }
#if DELTA
    of_key = add_other4(add_other4(of_key, 8), 16);
    if (lane < 8) {
        vstore4(of_key, 0, to + MOST_OCTETS * 8);
    }
#endif
}

/* Products of q and k, by the last warps, one for an octet. */
INLINE void multiply_keys(uint first, uint octets, __local attention_area *area) {
    const uint octet = WARPS - 1 - item() / 32;
    if (octet < octets) {
        const __local float2 *key = find_key(first, octet, area);
        float qq = 0.0f, kk = 0.0f, qk = 0.0f;
#pragma unroll 2
        for (uint row = lane_of_item(); row < DIM_K; row += 32) {
            const float q = key[(int)row - DIM_K].x, k = key[row].x;
            qq += q * q;
            kk += k * k;
            qk += q * k;
        }
        qq = sum_of_warp(qq);
        kk = sum_of_warp(kk);
        qk = sum_of_warp(qk);
        if (lane_of_item() == 0) {
            area->query_query[octet] = qq;
            area->key_key[octet] = kk;
            area->query_key[octet] = qk;
        }
    }
}

INLINE float norm_scale(float square) { return DELTA ? rsqrt(square + 1e-6f) : 1.0f; }

/* What this token removes from each level, one warp's job for a level of an octet. */
INLINE void remove_from_levels(a_layer at, uint first, uint octets, uint now, __local attention_area *area) {
#if DELTA
    const uint lane = lane_of_item(), quad = lane % 2 * 4;
    uint octet = 0, left = coming_levels(now);
#pragma unroll 1
    for (uint job = 0; left != 0; job++) {
        if (job % HELPER_WARPS == item() / 32 - WARPS) {
            const uint level = lowest_level(left);
            const __local float2 *key = find_key(first, octet, area) + lane / 2;
            float4 tile[LEVEL_ROWS], sum = (float4)(0.0f);
#pragma unroll
            for (uint i = 0; i < LEVEL_ROWS; i++) {
                tile[i] = (float4)(0.0f);
            }
#pragma unroll 1
            for (uint source = sources_of(now, level); source != 0; source &= source - 1) {
                add_level(tile, LEVEL_ROWS, 1.0f, at, first, octet, octets, now, lowest_level(source), lane / 2, 16, lane % 2,
                          area);
            }
#pragma unroll
            for (uint i = 0; i < LEVEL_ROWS; i++) {
                sum += key[16 * i].x * tile[i];
            }
            sum = add_other4(add_other4(add_other4(add_other4(sum, 2), 4), 8), 16);
            if (lane < 2) {
                const float scale = norm_scale(area->key_key[octet]);
                vstore4(area->writing[octet] * scale * scale * sum, 0, area->removed[level] + octet * 8 + quad);
            }
        }
        octet++;
        if (octet == octets) {
            octet = 0, left &= left - 1;
        }
    }
    HELPERS_BARRIER();
#endif
}

/* Writes the levels that are other ones now, and the token's own. */
INLINE void write_levels(a_layer at, uint first, uint octets, uint now, __local attention_area *area) {
    remove_from_levels(at, first, octets, now, area);
    const row_piece of = find_row_piece(item() - LOCAL);
    const uint octet = of.octet, quad = of.half_of_octet * 4;
    if (octet >= octets) {
        return;
    }
    const __local float2 *key = find_key(first, octet, area), *value = area->inputs + VALUES_AT + octet * 8 + quad;
    const float forget = area->forget[octet];
    __global float4 *to = place_in_level(at, first + octet, 0, 0, of.half_of_octet);
    /* Those that exist are read before the token's own is written. */
#pragma unroll 1
    for (uint left = DELTA ? coming_levels(now) : coming_levels(now & -now); left != 0; left &= left - 1) {
        const uint level = lowest_level(left);
        const float4 removed = DELTA ? vload4(0, area->removed[level] + octet * 8 + quad) : (float4)(0.0f);
#pragma unroll 1
        for (uint first_row = of.row; first_row < DIM_K; first_row += WRITTEN * ROWS_OF(HELPERS)) {
            float4 sums[WRITTEN];
#pragma unroll
            for (uint i = 0; i < WRITTEN; i++) {
                sums[i] = (float4)(0.0f);
            }
#pragma unroll 1
            for (uint sources = sources_of(now, level); sources != 0; sources &= sources - 1) {
                const uint source = lowest_level(sources);
                const float factor = DELTA ? 1.0f : area->decay[octet][source];
                add_level(sums, WRITTEN, factor, at, first, octet, octets, now, source, first_row, ROWS_OF(HELPERS),
                          of.half_of_octet, area);
            }
#pragma unroll
            for (uint i = 0; i < WRITTEN; i++) {
                const uint row = first_row + i * ROWS_OF(HELPERS);
                if (row < DIM_K) {
                    to[(level * DIM_K + row) * (DIM_V / 4)] = forget * (DELTA ? sums[i] - key[row].x * removed : sums[i]);
                }
            }
        }
    }
    const float4 token = area->writing[octet] * norm_scale(area->key_key[octet]) *
                         (float4)(value[0].x, value[1].x, value[2].x, value[3].x);
#pragma unroll 1
    for (uint row = of.row; row < DIM_K; row += ROWS_OF(HELPERS)) {
        to[row * (DIM_V / 4)] = key[row].x * token;
    }
}

/* What an item of the first warp needs to make y of o, of column `own`. */
typedef struct ending {
    told gate;
    float norm, d;
} ending;

INLINE ending begin_ending(a_layer at, uint own) {
    const ending of = {look(at, P_AT + Z_AT + own), vectors_of(at)[OUT_NORM_AT + own],
                       DELTA ? 0.0f : vectors_of(at)[D_AT + own]};
    return of;
}

/* y = o, plus D v, gated and weighted, and the sums of squares of the octets. */
INLINE void finish_octets(a_layer at, uint first, uint octets, ending of, const __local attention_area *area,
                          const __local float *sums) {
    const uint lane = lane_of_item(), octet = lane / 8, own = first * 8 + lane;
    float normed = 0.0f;
    if (octet < octets) {
        const float value = area->inputs[VALUES_AT + lane].x, writing = area->writing[octet];
        const float query_scale = norm_scale(area->query_query[octet]), key_scale = norm_scale(area->key_key[octet]);
        const float query_key = area->query_key[octet] * query_scale * key_scale;
        float of_query = 0.0f, of_key = 0.0f;
#pragma unroll
        for (uint warp = 0; warp < WARPS; warp++) {
            of_query += sums[warp * SUMS_OF_WARP + lane];
            of_key += DELTA ? sums[warp * SUMS_OF_WARP + MOST_OCTETS * 8 + lane] : 0.0f;
        }
        const float remembered = query_scale * of_query - (DELTA ? query_key * writing * key_scale * of_key : 0.0f);
        const float y = area->forget[octet] * remembered + (area->weights[octet][0] * query_key * writing + of.d) * value;
        const float gated = y * fast_silu(hear_seen(at, of.gate, P_AT + Z_AT + own));
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

/* What has been begun is there. */
INLINE void attend_octets(a_layer at, uint first, uint octets, uint now, __local attention_area *area,
                          __local float *sums) {
    const uint me = item();
    float4 early[EARLY][PASSES_OF(LOCAL)];
    load_early(early, at, first, octets, now);
    const ending of = begin_ending(at, first * 8 + min(me, octets * 8 - 1));
    take_inputs(at, first, octets, area);
    ITEMS_BARRIER();
    multiply_keys(first, octets, area);
    read_levels(at, first, octets, now, early, area, sums);
    ITEMS_BARRIER();
    if (me < 32) {
        finish_octets(at, first, octets, of, area, sums);
        meet_in_warp();
        if (me == 0) {
            arrive(&area->attended);
        }
    }
}

INLINE uint count_octets(uint first) { return min(own_end(OCTETS) - first, (uint)MOST_OCTETS); }

/* Runs of octets that a group takes one after the other, in all layers, have numbers. */
INLINE uint count_runs(void) { return (own_end(OCTETS) - own_begin(OCTETS) + MOST_OCTETS - 1) / MOST_OCTETS; }

INLINE void attend(a_layer at, uint now, __local attention_area *area, __local float *sums) {
    const uint runs = count_runs();
#pragma unroll 1
    for (uint run = 0; run < runs; run++) {
        const uint first = own_begin(OCTETS) + run * MOST_OCTETS;
        arrivals_wait(&area->begun, (at.index * runs + run) % 2);
        ITEMS_BARRIER(); /* sums are free */
        attend_octets(at, first, count_octets(first), now, area, sums);
    }
}

/* What y is scaled with, in segments.  Hears from all groups. */
INLINE void hear_scales(a_layer at, float eps, __local float *squares, __local float *scales,
                        __local attention_area *area) {
#pragma unroll 1
    for (uint octet = item(); octet < OCTETS; octet += LOCAL) {
        squares[octet] = hear(at, SQUARES_AT + octet);
    }
    ITEMS_BARRIER();
    if (item() == 0) {
        arrive(&area->heard);
    }
#pragma unroll 1
    for (uint segment = item() / 32; segment < SEGMENTS; segment += WARPS) {
        float sum = 0.0f;
#pragma unroll 4
        for (uint i = lane_of_item(); i < SEGMENT / 8; i += 32) {
            sum += squares[segment * (SEGMENT / 8) + i];
        }
        sum = sum_of_warp(sum);
        if (lane_of_item() == 0) {
            scales[segment] = rsqrt(sum * (1.0f / SEGMENT) + eps);
        }
    }
    ITEMS_BARRIER();
}

/* y, or the attention's, which is scaled, as far as a share needs it. */
INLINE void prepare_y(a_layer at, bool is_scaled, const __local share *of, float eps, __local float *squares,
                      __local float *scales, __local split *prepared, __local attention_area *area) {
    const uint first = of->part * of->width, count = columns_of_share(of), word = (is_scaled ? GATED_AT : Y_AT) + first;
    told seen[BATCH];
    look_at_all(seen, BATCH, at, word, item(), count);
    if (is_scaled) {
        hear_scales(at, eps, squares, scales, area);
    }
#pragma unroll 1
    for (uint start = item();;) {
        hear_all(seen, BATCH, at, word, start, count);
#pragma unroll
        for (uint i = 0; i < BATCH; i++) {
            const uint column = start + i * LOCAL;
            if (column < count) {
                const float y = as_float((uint)seen[i]);
                store_split(prepared, column, is_scaled ? y * scales[(first + column) / SEGMENT] : y);
            }
        }
        start += BATCH * LOCAL;
        if (start >= count) {
            break;
        }
        look_at_all(seen, BATCH, at, word, start, count);
    }
}

/*
 * What is left behind of a token, when nobody reads what was before it any more: inputs of the convolution, decays of levels.
 * Each group has its slice.
 */
INLINE void keep_inputs(a_layer at) {
#pragma unroll 1
    for (uint channel = own_begin(CHANNELS) + item() - LOCAL; TAPS > 1 && channel < own_end(CHANNELS); channel += HELPERS) {
        __global float *tail = tail_of(at) + channel;
        const told newest = look(at, P_AT + CONV_AT + channel);
        float taps[TAPS];
#pragma unroll
        for (uint tap = 0; tap + 2 < TAPS; tap++) {
            taps[tap] = tail[(tap + 1) * CHANNELS];
        }
#pragma unroll
        for (uint tap = 0; tap + 2 < TAPS; tap++) {
            tail[tap * CHANNELS] = taps[tap];
        }
        tail[(TAPS - 2) * CHANNELS] = hear_seen(at, newest, P_AT + CONV_AT + channel);
    }
}

INLINE void keep_decays(a_layer at, uint now) {
#if !DELTA
#pragma unroll 1
    for (uint place = own_begin(HEADS * LEVELS) + item() - LOCAL; place < own_end(HEADS * LEVELS); place += HELPERS) {
        const uint level = place % LEVELS, head = place / LEVELS;
        const bool stays = (coming_levels(now & (now - 1)) >> level & 1) != 0;
        const float bias = vectors_of(at)[DT_BIAS_AT + head], a = vectors_of(at)[A_AT + head];
        const float before = log_decay_of(at)[place];
        const float step = limited_time_step(at, hear(at, P_AT + DT_AT + head) + bias);
        log_decay_of(at)[place] = stays ? before + limited_log_gate(a, step) : 0.0f;
    }
#endif
    if (get_group_id(0) == 0 && item() == LOCAL) {
        *position_of(at) = (int)(now + 1);
    }
}

/* A helper's warp has done its part of something. */
INLINE void arrive_warp(__local arrivals *at) {
    meet_in_warp();
    if (lane_of_item() == 0) {
        arrive(at);
    }
}

/*
 * What the helpers do, so slowly that others find the way to memory free: before a run of octets is attended to, all of it that
 * is in memory (then it has begun); behind it, what becomes of the levels; and before that of the last, when all groups have been
 * heard of, what else is left behind of a token, which `down` waits for.
 */
INLINE void help(uint layers, uint now, __local token_arrays *all, __local attention_area *area) {
    const uint runs = count_runs();
    uint number = 0;
#pragma unroll 1
    for (uint layer = 0; layer < layers; layer++) {
        const a_layer at = {all, layer};
#pragma unroll 1
        for (uint run = 0; run < runs; run++, number++) {
            const uint first = own_begin(OCTETS) + run * MOST_OCTETS, octets = count_octets(first);
            stage_levels(at, first, octets, now, area);
            begin_inputs(at, first, octets, area);
            wait_for_copies();
            arrive_warp(&area->begun);
            arrivals_wait(&area->attended, number % 2);
            if (run + 1 == runs) {
                arrivals_wait(&area->heard, layer % 2);
                keep_inputs(at);
                keep_decays(at, now);
                arrive_warp(&area->kept);
            }
            write_levels(at, first, octets, now, area);
            HELPERS_BARRIER();
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

/* What a layer's attention reads beside its levels. */
INLINE void fetch_for_attention(a_layer at) {
    fetch_slice(vectors_of(at), VECTORS_NEXT * 4);
    fetch_slice(tail_of(at), TAILS_NEXT * 4);
    if (!DELTA) {
        fetch_slice(log_decay_of(at), LOG_DECAY_NEXT * 4);
    }
}

typedef struct weight_arrays {
    const __global matrix *in, *out, *gate_up, *down, *head;
} weight_arrays;

/* All weights in turn, and what else a layer reads. */
INLINE void copy_weights(ring *to, uint layers, weight_arrays of, const __local share *shares, __local token_arrays *all) {
#pragma unroll 1
    for (uint step = 0; step <= PRODUCTS * layers; step++) {
        const uint product = product_of(step, layers);
        const a_layer at = {all, step / PRODUCTS}, next = {all, step / PRODUCTS + 1};
        if (product == OUT && next.index < layers) {
            fetch_for_attention(next);
        }
        copy_share(to,
                   product == IN        ? of.in + at.index * (ulong)IN_NEXT
                   : product == OUT     ? of.out + at.index * (ulong)OUT_NEXT
                   : product == GATE_UP ? of.gate_up + at.index * (ulong)GATE_UP_NEXT
                   : product == DOWN    ? of.down + at.index * (ulong)DOWN_NEXT
                                        : of.head,
                   shares + product);
    }
}

/*
 * words: what groups tell each other, zeros before the first launch.  number: of the first layer; it and as many behind it as
 * there are layers no launch had.  logits: and behind them, in vain or not.
 */
__kernel __attribute__((reqd_work_group_size(LOCAL + HELPERS + 32, 1, 1))) void
token(int id, const __global matrix *embedding, __global told *words, uint number, uint layers,
      const __global float *vectors, const __global matrix *in, const __global matrix *out,
      const __global matrix *gate_up, const __global matrix *down, const __global float *final_norm,
      const __global matrix *head, __global float *logits, float eps, float dt_min, float dt_max, __global float *tails,
      __global float *values, __global float *log_decay, __global int *position) {
    __local uint4 slots[SLOTS * (SLOT_BYTES / 16)] __attribute__((aligned(128)));
    __local arrivals full[SLOTS], empty[SLOTS];
    __local split prepared;
    __local float partials[PARTIALS], squares_of_warps[WARPS], squares[OCTETS], scales[SEGMENTS];
    __local float own_x[HIDDEN / MOST_PARTS];
    __local attention_area area;
    __local token_arrays all;
    __local share shares[PRODUCTS + 1];
    const uint me = get_local_id(0);
    ring weights = {slots, full, empty, 0};
    if (me < SLOTS) {
        arrivals_start(&full[me], 1);
        arrivals_start(&empty[me], CREW);
    }
    if (me == 0) {
        all.words = words;
        all.vectors = vectors;
        all.tails = tails;
        all.values = values;
        all.log_decay = log_decay;
        all.position = position;
        all.in_vain = (__global uint *)(logits + LOGITS_STRIDE);
        all.dt_min = dt_min;
        all.dt_max = dt_max;
        all.number = number;
        all.most_looks = MOST_LOOKS;
        arrivals_start(&area.begun, HELPER_WARPS);
        arrivals_start(&area.attended, 1);
        arrivals_start(&area.heard, 1);
        arrivals_start(&area.kept, HELPER_WARPS);
    }
    if (me <= PRODUCTS) {
        shares[me] = take_share(me);
    }
    arrivals_publish();
    barrier(CLK_LOCAL_MEM_FENCE);
    const uint now = (uint)*position; /* tokens before this one */
    if (me >= LOCAL + HELPERS) {
        if (me == LOCAL + HELPERS) {
            const weight_arrays of = {in, out, gate_up, down, head};
            copy_weights(&weights, layers, of, shares, &all);
        }
        return;
    }
    if (me >= LOCAL) {
        help(layers, now, &all, &area);
        return;
    }
    {
        const a_layer at = {&all, 0};
#pragma unroll 1
        for (uint row = own_begin(HIDDEN) + me; row < own_end(HIDDEN); row += LOCAL) {
            own_x[row - own_begin(HIDDEN)] = load1(embedding + ((ulong)((uint)id / 16) * HIDDEN + row) * 16 + (uint)id % 16);
            tell(at, X_AT + row, own_x[row - own_begin(HIDDEN)]);
        }
    }
    /* One loop over all products: so the code is small enough for the cache of instructions. */
#pragma unroll 1
    for (uint step = 0; step <= PRODUCTS * layers; step++) {
        const uint product = product_of(step, layers);
        const a_layer at = {&all, step / PRODUCTS}, next = {&all, step / PRODUCTS + 1};
        const __local share *of = shares + product;
        if (product == OUT) {
            attend(at, now, &area, partials);
        }
        if (product == OUT || product == DOWN) {
            prepare_y(at, product == OUT, of, eps, squares, scales, &prepared, &area);
        } else {
            prepare_x(at, product == GATE_UP ? MIDDLE_X_AT : X_AT,
                      product == GATE_UP ? vectors_of(at) + MLP_NORM_AT
                      : product == IN    ? vectors_of(at) + NORM_AT
                                         : final_norm,
                      eps, &prepared, squares_of_warps);
        }
        multiply(&weights, of, product, at, logits, &prepared, partials, &area.kept);
        if (product == OUT || product == DOWN) {
            sum_parts(at, product == OUT ? OUT_PARTS_AT : DOWN_PARTS_AT, product == OUT ? OUT_PARTS : DOWN_PARTS,
                      product == OUT ? at : next, product == OUT ? MIDDLE_X_AT : X_AT, own_x);
        }
    }
    ITEMS_BARRIER();
    if (me == 0 && all.most_looks == 1) {
        *all.in_vain = 1;
    }
}
