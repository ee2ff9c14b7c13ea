/* SPDX-License-Identifier: Apache-2.0 */
/* A token on NVIDIA's GPUs, see nvidia_token.cl: the attention of a layer, and the states. */

/* ---- Attention ---- */

#define LEVEL_ROWS (DIM_K / 16) /* rows of an octet's level that an item of one warp has, 16 apart, 4 columns each */
#define LEVEL_PIECES (DIM_K * 2) /* of 16 bytes, of an octet's level */
#undef SEGMENTS
#define SEGMENTS (INNER / SEGMENT)

/* Heads that have q and k in common, and how many such q and k the octets of a group need at most. */
#define KEYS (QK_CHANNELS / DIM_K)
#define OCTETS_OF_HEAD (DIM_V / 8)
#define OCTETS_OF_KEY (OCTETS / KEYS)
#define SPANNED ((NT_OCTETS - 2) / OCTETS_OF_KEY + 2)
#define MOST_KEYS (SPANNED < KEYS ? SPANNED : KEYS)
/* Inputs: q and k of one after the other, then v of the octets. */
#define VALUES_AT (MOST_KEYS * 2 * DIM_K)
#define INPUTS (VALUES_AT + NT_OCTETS * 8)

typedef struct attention_area {
    float4 staged[STAGED][LEVEL_PIECES + 2]; /* existing levels, of all octets in turn; 2 keep banks apart */
    float2 inputs[INPUTS]; /* what came before this token, and its own weight; then the value */
    float decay[NT_OCTETS][LEVELS], weights[NT_OCTETS][LEVELS]; /* until this token */
    float dt_bias[NT_OCTETS], a[NT_OCTETS];
    float forget[NT_OCTETS], writing[NT_OCTETS]; /* this token's decay; beta, or the time step */
    float query_query[NT_OCTETS], key_key[NT_OCTETS], query_key[NT_OCTETS];
    float removed[LEVELS][NT_OCTETS * 8];  /* from each level */
    arrivals begun, attended, heard, kept; /* see help */
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
        for (uint row = of.row; row < DIM_K; row += ROWS_OF(NT_HELPERS)) {
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
    for (uint i = me; i < count; i += NT_HELPERS) {
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

#define SUMS_OF_WARP (2 * NT_OCTETS * 8)

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
        vstore4(of_key, 0, to + NT_OCTETS * 8);
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
        for (uint first_row = of.row; first_row < DIM_K; first_row += WRITTEN * ROWS_OF(NT_HELPERS)) {
            float4 sums[WRITTEN];
#pragma unroll
            for (uint i = 0; i < WRITTEN; i++) {
                sums[i] = (float4)(0.0f);
            }
#pragma unroll 1
            for (uint sources = sources_of(now, level); sources != 0; sources &= sources - 1) {
                const uint source = lowest_level(sources);
                const float factor = DELTA ? 1.0f : area->decay[octet][source];
                add_level(sums, WRITTEN, factor, at, first, octet, octets, now, source, first_row, ROWS_OF(NT_HELPERS),
                          of.half_of_octet, area);
            }
#pragma unroll
            for (uint i = 0; i < WRITTEN; i++) {
                const uint row = first_row + i * ROWS_OF(NT_HELPERS);
                if (row < DIM_K) {
                    to[(level * DIM_K + row) * (DIM_V / 4)] = forget * (DELTA ? sums[i] - key[row].x * removed : sums[i]);
                }
            }
        }
    }
    const float4 token = area->writing[octet] * norm_scale(area->key_key[octet]) *
                         (float4)(value[0].x, value[1].x, value[2].x, value[3].x);
#pragma unroll 1
    for (uint row = of.row; row < DIM_K; row += ROWS_OF(NT_HELPERS)) {
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
            of_key += DELTA ? sums[warp * SUMS_OF_WARP + NT_OCTETS * 8 + lane] : 0.0f;
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

INLINE uint count_octets(uint first) { return min(own_end(OCTETS) - first, (uint)NT_OCTETS); }

/* Runs of octets that a group takes one after the other, in all layers, have numbers. */
INLINE uint count_runs(void) { return (own_end(OCTETS) - own_begin(OCTETS) + NT_OCTETS - 1) / NT_OCTETS; }

INLINE void attend(a_layer at, uint now, __local attention_area *area, __local float *sums) {
    const uint runs = count_runs();
#pragma unroll 1
    for (uint run = 0; run < runs; run++) {
        const uint first = own_begin(OCTETS) + run * NT_OCTETS;
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
    for (uint channel = own_begin(CHANNELS) + item() - LOCAL; TAPS > 1 && channel < own_end(CHANNELS);
         channel += NT_HELPERS) {
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
    for (uint place = own_begin(HEADS * LEVELS) + item() - LOCAL; place < own_end(HEADS * LEVELS);
         place += NT_HELPERS) {
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
            const uint first = own_begin(OCTETS) + run * NT_OCTETS, octets = count_octets(first);
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
