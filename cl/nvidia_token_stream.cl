/* SPDX-License-Identifier: Apache-2.0 */
/* A token on NVIDIA's GPUs, see nvidia_token.cl: what groups tell each other, the stream of weights, and their products. */

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
#define HELPER_WARPS (NT_HELPERS / 32)
#define ITEMS_BARRIER() meet(1, LOCAL) /* of those that compute */
#define HELPERS_BARRIER() meet(2, NT_HELPERS)
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
#define OCTETS (INNER / 8)

/* Where floats are told, of a layer. */
#define P_AT 0
#define Y_AT (P_AT + P_STRIDE)
#define GATED_AT (Y_AT + Y_STRIDE)
#define SQUARES_AT (GATED_AT + INNER)
#define OUT_PARTS_AT (SQUARES_AT + OCTETS)
#define DOWN_PARTS_AT (OUT_PARTS_AT + NT_PARTS * X_STRIDE)
#define MIDDLE_X_AT (DOWN_PARTS_AT + NT_PARTS * X_STRIDE) /* x between attention and MLP */
#define X_AT (MIDDLE_X_AT + X_STRIDE)                     /* before a layer, and behind the last */

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

typedef struct ring {
    __local uint4 *slots; /* of NT_SLOT_BYTES */
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
    of.slots = (of.width + NT_SLOT_COLUMNS - 1) / NT_SLOT_COLUMNS;
    of.units = own_end(all) * pair - first;
    of.part = first / of.blocks;
    of.block = first % of.blocks;
    of.together = min(NT_PIECE_SLOTS / of.slots, (uint)LOCAL / 16) & ~1u;
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
        const uint bytes = columns_of_part(of, part) * NT_COLUMN_BYTES;
#pragma unroll 1
        for (uint at = 0; at < of->slots * NT_SLOT_BYTES; at += NT_SLOT_BYTES, to->turn++) {
            const uint slot = to->turn % SLOTS;
            if (to->turn >= SLOTS) {
                arrivals_wait(&to->empty[slot], (to->turn / SLOTS - 1) % 2);
            }
            if (to->turn >= ON_THEIR_WAY) {
                const uint earlier = to->turn - ON_THEIR_WAY;
                arrivals_wait(&to->full[earlier % SLOTS], earlier / SLOTS % 2);
            }
            if (at < bytes) {
                copy_bulk(to->slots + slot * (NT_SLOT_BYTES / 16), from + at, min(bytes - at, (uint)NT_SLOT_BYTES),
                          &to->full[slot]);
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

/* The crews of warps take slots in turn: so what they wait for overlaps. */
#define CREWS (WARPS / NT_CREW)
#define TILES 4 /* that a warp multiplies at once */

/* `count` tiles of 16 columns of a slot, NT_CREW apart from `first` on, times the columns of x. */
INLINE void multiply_together(float4 sums[2], const __local uint4 *slot, const __local ushort *x, uint first, uint count) {
    const uint lane = lane_of_item();
    uint4 w[TILES];
    uint2 of_x[TILES];
#pragma unroll
    for (uint i = 0; i < count; i++) {
        w[i] = load_weights(slot + (first + i * NT_CREW) * 32 + lane);
        of_x[i] = *(const __local uint2 *)(x + (first + i * NT_CREW) * 16);
    }
#pragma unroll
    for (uint i = 0; i < count; i++) {
        multiply_tiles(&sums[i % 2], w[i], of_x[i].x, of_x[i].y);
    }
}

/* The tiles of a slot that a warp multiplies. */
INLINE void multiply_slot(float4 sums[2], const __local uint4 *slot, const __local ushort *x, uint count) {
    uint tile = item() / 32 % NT_CREW;
#pragma unroll 1
    for (; tile + (TILES - 1) * NT_CREW < count; tile += TILES * NT_CREW) {
        multiply_together(sums, slot, x, tile, TILES);
    }
#pragma unroll 1
    for (; tile < count; tile += NT_CREW) {
        multiply_together(sums, slot, x, tile, 1);
    }
}

/*
 * `count` units of a share from the `first` on, times x, which begins at the first column of the share's first part; the sums
 * of a slot's crew to partials.
 */
INLINE void multiply_units(ring *from, const __local share *of, uint first, uint count, const __local split *x,
                           __local float *partials) {
    const uint lane = lane_of_item(), warp = item() / 32, part = lane / 4, end = count * of->slots;
    const __local ushort *own = x->parts[part < 3 ? part : 0] + lane % 4 * 4;
#pragma unroll 1
    for (uint at = (warp / NT_CREW + CREWS - from->turn % CREWS) % CREWS; at < end; at += CREWS) {
        const uint turn = from->turn + at, slot = turn % SLOTS, unit = at / of->slots;
        const uint start = (at - unit * of->slots) * NT_SLOT_COLUMNS, next = of->block + first + unit >= of->blocks;
        const uint columns = max(columns_of_part(of, of->part + next), start) - start;
        float4 sums[2] = {(float4)(0.0f), (float4)(0.0f)};
        arrivals_wait(&from->full[slot], turn / SLOTS % 2);
        multiply_slot(sums, from->slots + slot * NT_SLOT_COLUMNS * 2, own + next * of->width + start,
                      min(columns, (uint)NT_SLOT_COLUMNS) / 16);
        meet_in_warp();
        if (lane == 0) {
            arrive(&from->empty[slot]);
        }
        const float4 sum = sums[0] + sums[1];
        /* The third part is in another item, beside nothing of use. */
        const float upper = add_other(sum.x + (lane % 4 == 0 ? sum.y : 0.0f), 1);
        const float lower = add_other(sum.z + (lane % 4 == 0 ? sum.w : 0.0f), 1);
        if (lane % 4 == 0) {
            __local float *to = partials + (at * NT_CREW + warp % NT_CREW) * 16 + lane / 4;
            to[0] = upper;
            to[8] = lower;
        }
    }
    from->turn += end;
}

/* A row of what has been multiplied together. */
INLINE float sum_of_row(const __local float *partials, uint slots, uint row) {
    const __local float *own = partials + row / 16 * (slots * NT_CREW * 16) + row % 16;
    float sum = 0.0f;
#pragma unroll 1
    for (uint slot = 0; slot < slots; slot++, own += NT_CREW * 16) {
#pragma unroll
        for (uint warp = 0; warp < NT_CREW; warp++) {
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
    const uint first = own_begin(HIDDEN), end = (own_end(HIDDEN) - first) * NT_PARTS;
#pragma unroll 1
    for (uint i = item(); i / 32 * 32 < end; i += LOCAL) {
        const uint row = min(i, end - 1) / NT_PARTS, part = i % NT_PARTS;
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
