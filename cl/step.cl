/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One token of every sequence against its level states S[l], K x V each:
 *
 *     merge   before token t > 0 the levels move up (step_sources says which old levels make up a new one)
 *     decay   S <- exp(g) S, or for the delta rule S <- exp(g) (S - beta k (k^T S))
 *     write   S[0] = k v^T, or beta k v^T
 *     read    o = sum_l lambda[l] S[l]^T q
 *
 * all in one pass, each existing level being read once.  A work-group holds one head of one sequence and some columns
 * of V; the columns are independent.  Its work-items stand in STEP_LANES rows of STEP_COLUMNS; each takes
 * STEP_VECTORS vectors of STEP_WIDTH columns and every STEP_LANES-th row, STEP_ROWS rows at a time:
 *
 *     GPU   width 1, one vector: neighbouring work-items read neighbouring columns, the rows wait in registers
 *     CPU   one work-item a group, wide vectors, whole rows: a level is read as one stream, the rows wait in cache
 *
 * The levels that exist follow from the position alone, and so the loop over them is the same for a whole group.
 * With log_decay the decays are kept apart from the states, so a level that does not move is not written.  The
 * position and log_decay are read by many groups here; step_advance changes them afterwards, in a launch of its own.
 * Nothing skips a barrier: PoCL 3.1 compiles one behind a return or a continue wrongly, even a uniform one.
 */

/* The problem. */
#ifndef STEP_K
#define STEP_K 128 /* rows of a state */
#endif
#ifndef STEP_V
#define STEP_V 64 /* columns of a state */
#endif
#ifndef STEP_HEADS
#define STEP_HEADS 8
#endif
#ifndef STEP_GROUPS
#define STEP_GROUPS 1 /* heads that share q and k: STEP_HEADS / STEP_GROUPS */
#endif
#ifndef STEP_LEVELS
#define STEP_LEVELS 15 /* at most 32 */
#endif
#ifndef STEP_DELTA
#define STEP_DELTA 0 /* 1: the gated delta rule */
#endif
#ifndef STEP_NORMALIZE
#define STEP_NORMALIZE 0 /* 1: q and k are divided by sqrt(sum of squares + 1e-6) */
#endif

/* The schedule. */
#ifndef STEP_WIDTH
#define STEP_WIDTH 1 /* columns of a vector: 1, 2, 4, 8 or 16; a divisor of STEP_V if not 1 */
#endif
#ifndef STEP_VECTORS
#define STEP_VECTORS 1 /* vectors of a work-item; their columns are a divisor of STEP_V if not 1 */
#endif
#ifndef STEP_COLUMNS
#define STEP_COLUMNS 32 /* work-items beside each other along V, a power of two */
#endif
#ifndef STEP_LANES
#define STEP_LANES 8 /* work-items along K, a power of two */
#endif
#ifndef STEP_ROWS
#define STEP_ROWS 16 /* rows that a work-item holds; the delta rule needs STEP_ROWS * STEP_LANES >= STEP_K */
#endif
#ifndef STEP_ADVANCE_ITEMS
#define STEP_ADVANCE_ITEMS 64 /* work-items of a group of step_advance */
#endif

#define STEP_ITEMS (STEP_LANES * STEP_COLUMNS)
#define STEP_BLOCK (STEP_COLUMNS * STEP_VECTORS * STEP_WIDTH) /* columns of a group */
#define STEP_BLOCKS ((STEP_V + STEP_BLOCK - 1) / STEP_BLOCK)
#define STEP_PARTS (STEP_DELTA ? 2 : 1) /* sums over the rows that are taken together */

/* Registers need constant indices; a lone work-item's tile lives in the cache, where unrolling only costs code. */
#if STEP_ITEMS > 1
#define STEP_UNROLL _Pragma("unroll")
#define STEP_BARRIER() barrier(CLK_LOCAL_MEM_FENCE)
#else
#define STEP_UNROLL
#define STEP_BARRIER()
#endif

#if STEP_WIDTH == 1
typedef float step_vec;
#define STEP_VLOAD(p) (*(p))
#define STEP_VSTORE(x, p) (*(p) = (x))
#else
#define STEP_JOIN(a, b) a##b
#define STEP_NAME(a, b) STEP_JOIN(a, b)
typedef STEP_NAME(float, STEP_WIDTH) step_vec;
#define STEP_VLOAD(p) STEP_NAME(vload, STEP_WIDTH)(0, p)
#define STEP_VSTORE(x, p) STEP_NAME(vstore, STEP_WIDTH)(x, 0, p)
#endif

/* Of a level.  vload and vstore take four elements at a time on some CPUs' compilers; this is one access. */
#if STEP_ITEMS > 1
#define STEP_LOAD(p) STEP_VLOAD(p)
#define STEP_STORE(x, p) STEP_VSTORE(x, p)
#else
typedef step_vec step_loose_vec __attribute__((aligned(4)));
#define STEP_LOAD(p) (*(__global const step_loose_vec *)(p))
#define STEP_STORE(x, p) (*(__global step_loose_vec *)(p) = (x))
#endif

/* A position that the levels do not cover; one below 0 is beyond them as well. */
inline bool step_is_beyond(uint position) {
    return position >= 1u << (STEP_LEVELS - 1);
}

/* Bit l: level l exists after `position` tokens. */
inline uint step_existing(uint position) {
    if (position == 0) {
        return 0;
    }
    const uint last = position - 1;
#if STRONG
    return (2u << bit_length(last)) - 1;
#else
    return last << 1 | 1;
#endif
}

/* The old levels, among those that exist, whose sum is level `to` >= 1 once token `position` has come. */
inline uint step_sources(uint position, uint to) {
    const uint z = popcount((position & -position) - 1); /* trailing zero bits; 32 for position 0 */
#if STRONG
    const uint sources = to <= z + 1 ? 1u << (to - 1) : to == z + 2 ? 3u << (to - 1) : 1u << to;
#else
    const uint sources = to <= z ? 0 : to == z + 1 ? (2u << z) - 1 : 1u << to;
#endif
    return sources & step_existing(position);
}

/* x[0][j] = x[0][j] + ... + x[rows - 1][j] for j < width; rows is a power of two.  A barrier before and behind. */
inline void step_sum_rows(__local float *x, uint rows, uint width, uint item) {
    for (uint half_rows = rows / 2; half_rows > 0; half_rows /= 2) {
        STEP_BARRIER();
        for (uint j = item; j < half_rows * width; j += STEP_ITEMS) {
            x[j] += x[j + half_rows * width];
        }
    }
    STEP_BARRIER();
}

/* A row of a group's tile that K does not reach is 0 and is not stored. */
inline bool step_has_row(uint r) {
    return STEP_K % (STEP_ROWS * STEP_LANES) == 0 || r < STEP_K;
}

/* A group's local memory. */
typedef struct step_scratch {
    float query[STEP_K], key[STEP_K];
    float decay[STEP_LEVELS], weights[STEP_LEVELS];
    float sums[STEP_ITEMS * (STEP_PARTS * STEP_VECTORS * STEP_WIDTH + 3)];
} step_scratch;

/* out += factor * query^T S, for some rows of a level's state. */
void step_read(__global const float *level, __local const float *query, uint rows, float factor, step_vec *out) {
    step_vec sum[STEP_VECTORS];
    for (uint c = 0; c < STEP_VECTORS; ++c) {
        sum[c] = 0.0f;
    }
    for (uint r = 0; r < rows; ++r) {
        _Pragma("unroll")
        for (uint c = 0; c < STEP_VECTORS; ++c) {
            sum[c] += query[r] * STEP_LOAD(level + r * STEP_V + c * STEP_WIDTH);
        }
    }
    for (uint c = 0; c < STEP_VECTORS; ++c) {
        out[c] += factor * sum[c];
    }
}

/* Group `block` of STEP_BLOCKS for each head: its columns of the head's states. */
void step_columns(uint block, __global const storage *q, ulong q_offset, __global const storage *k, ulong k_offset,
                  __global const storage *v, ulong v_offset, __global const float *g, ulong g_offset,
                  __global const weight *level_scales, ulong level_scales_offset, __global const weight *beta,
                  ulong beta_offset, __global float *values, ulong values_offset, __global const float *log_decay,
                  ulong log_decay_offset, __global const int *position, ulong position_offset, __global storage *o,
                  ulong o_offset, float scale, __local step_scratch *scratch) {
    __local float *query = scratch->query, *key = scratch->key;
    __local float *decay = scratch->decay, *weights = scratch->weights, *sums = scratch->sums;
    const uint item = get_local_id(0);
    const uint lane = item / STEP_COLUMNS;
    const uint slot = item % STEP_COLUMNS * (STEP_VECTORS * STEP_WIDTH);
    const uint column = block % STEP_BLOCKS * STEP_BLOCK + slot;
    const bool inside = STEP_V % STEP_BLOCK == 0 || column < STEP_V;
    const ulong head = block / STEP_BLOCKS; /* n H + h */
    const ulong sequence = head / STEP_HEADS;
    const ulong group = sequence * STEP_GROUPS + head % STEP_HEADS / (STEP_HEADS / STEP_GROUPS);
    const uint stored = (uint)position[position_offset + sequence];
    const bool is_beyond = step_is_beyond(stored);
    const uint now = is_beyond ? 0 : stored; /* no level exists then, and none is touched */
    q += q_offset + group * STEP_K;
    k += k_offset + group * STEP_K;
    v += v_offset + head * STEP_V + column;
    o += o_offset + head * STEP_V + column;
    level_scales += level_scales_offset + head * STEP_LEVELS;
    values += values_offset + head * STEP_LEVELS * STEP_K * STEP_V + column;

    /* Every old level's decay and every new level's weight; q and k with their scales, and q . k. */
    const float gate = g ? g[g_offset + head] : 0.0f;
    for (uint l = item; l < STEP_LEVELS; l += STEP_ITEMS) {
        const bool decays = step_existing(now) >> l & 1;
        const bool is_read = l == 0 || step_sources(now, l) != 0;
        const float before = log_decay && decays ? log_decay[log_decay_offset + head * STEP_LEVELS + l] : 0.0f;
        decay[l] = decays ? exp(gate + before) : 0.0f;
        weights[l] = is_read ? load_weight(level_scales, l) : 0.0f;
    }
    float qq = 0.0f, kk = 0.0f, qk = 0.0f;
    for (uint r = item; r < STEP_K; r += STEP_ITEMS) {
        const float x = load(q, r);
        const float y = load(k, r);
        query[r] = x;
        key[r] = y;
        qq += x * x;
        kk += y * y;
        qk += x * y;
    }
    sums[3 * item] = qq;
    sums[3 * item + 1] = kk;
    sums[3 * item + 2] = qk;
    step_sum_rows(sums, STEP_ITEMS, 3, item);
    const float query_scale = STEP_NORMALIZE ? scale / sqrt(sums[0] + 1e-6f) : scale;
    const float key_scale = STEP_NORMALIZE ? 1.0f / sqrt(sums[1] + 1e-6f) : 1.0f;
    const float query_key = sums[2] * query_scale * key_scale;
    for (uint r = item; r < STEP_K; r += STEP_ITEMS) {
        query[r] *= query_scale;
        key[r] *= key_scale;
    }
    STEP_BARRIER();

    const float writing = STEP_DELTA ? load_weight(beta, beta_offset + head) : 1.0f;
    step_vec token[STEP_VECTORS], out[STEP_VECTORS];
    for (uint c = 0; c < STEP_VECTORS; ++c) {
        float x[STEP_WIDTH];
        for (uint j = 0; j < STEP_WIDTH; ++j) {
            x[j] = inside ? writing * load(v, c * STEP_WIDTH + j) : 0.0f;
        }
        token[c] = STEP_VLOAD(x);
        out[c] = 0.0f;
    }

    for (uint base = 0; base < STEP_K; base += STEP_ROWS * STEP_LANES) {
        const uint first = base + lane;
        /* From the top down, so that a level has been read when the one below it moves there. */
        for (uint to = STEP_LEVELS - 1; to > 0; --to) {
            const uint sources = step_sources(now, to);
#if !STEP_DELTA || STEP_ITEMS == 1 /* never past the delta rule's barriers */
            if (sources == 0) {
                continue;
            }
#endif
#if !STEP_DELTA && STEP_ITEMS == 1
            if (log_decay && sources == 1u << to) { /* nothing to write: no tile, and as many sums as vectors */
                step_read(values + (ulong)to * STEP_K * STEP_V + base * STEP_V, query + base,
                          min((uint)STEP_ROWS, STEP_K - base), weights[to] * decay[to], out);
                continue;
            }
#endif
            step_vec tile[STEP_ROWS * STEP_VECTORS];
            for (uint i = 0; sources == 0 && i < STEP_ROWS * STEP_VECTORS; ++i) {
                tile[i] = 0.0f;
            }
            for (uint left = sources; left != 0;) {
                const uint l = 31 - clz(left);
                const bool is_first = left == sources;
                const float factor = STEP_DELTA ? 1.0f : decay[l];
                __global const float *level = values + (ulong)l * STEP_K * STEP_V;
                left ^= 1u << l;
                STEP_UNROLL
                for (uint i = 0; i < STEP_ROWS; ++i) {
                    const uint r = first + i * STEP_LANES;
                    for (uint c = 0; c < STEP_VECTORS; ++c) {
                        step_vec x = 0.0f;
                        if (inside && step_has_row(r)) {
                            x = factor * STEP_LOAD(level + r * STEP_V + c * STEP_WIDTH);
                        }
                        tile[i * STEP_VECTORS + c] = is_first ? x : tile[i * STEP_VECTORS + c] + x;
                    }
                }
            }
#if STEP_DELTA
            /* All rows are in the group's tiles: k^T S and q^T S, then S <- exp(g) (S - beta k (k^T S)). */
            step_vec key_sum[STEP_VECTORS], query_sum[STEP_VECTORS];
            for (uint c = 0; c < STEP_VECTORS; ++c) {
                key_sum[c] = 0.0f;
                query_sum[c] = 0.0f;
            }
            STEP_UNROLL
            for (uint i = 0; i < STEP_ROWS; ++i) {
                const uint r = first + i * STEP_LANES;
                _Pragma("unroll")
                for (uint c = 0; step_has_row(r) && c < STEP_VECTORS; ++c) {
                    key_sum[c] += key[r] * tile[i * STEP_VECTORS + c];
                    query_sum[c] += query[r] * tile[i * STEP_VECTORS + c];
                }
            }
            for (uint c = 0; c < STEP_VECTORS; ++c) {
                STEP_VSTORE(key_sum[c], sums + lane * 2 * STEP_BLOCK + slot + c * STEP_WIDTH);
                STEP_VSTORE(query_sum[c], sums + (lane * 2 + 1) * STEP_BLOCK + slot + c * STEP_WIDTH);
            }
            step_sum_rows(sums, STEP_LANES, 2 * STEP_BLOCK, item);
            const float forget = exp(gate);
            for (uint c = 0; c < STEP_VECTORS; ++c) {
                const step_vec removed = writing * STEP_VLOAD(sums + slot + c * STEP_WIDTH);
                const step_vec remembered = STEP_VLOAD(sums + STEP_BLOCK + slot + c * STEP_WIDTH);
                out[c] += weights[to] * forget * (remembered - query_key * removed);
                STEP_UNROLL
                for (uint i = 0; i < STEP_ROWS; ++i) {
                    const uint r = first + i * STEP_LANES;
                    if (step_has_row(r)) {
                        tile[i * STEP_VECTORS + c] = forget * (tile[i * STEP_VECTORS + c] - key[r] * removed);
                    }
                }
            }
            STEP_BARRIER();
#else
            for (uint c = 0; c < STEP_VECTORS; ++c) {
                STEP_UNROLL
                for (uint i = 0; i < STEP_ROWS; ++i) {
                    const uint r = first + i * STEP_LANES;
                    if (step_has_row(r)) {
                        out[c] += weights[to] * query[r] * tile[i * STEP_VECTORS + c];
                    }
                }
            }
#endif
            if (sources != 0 && (!log_decay || sources != 1u << to)) {
                __global float *level = values + (ulong)to * STEP_K * STEP_V;
                STEP_UNROLL
                for (uint i = 0; i < STEP_ROWS; ++i) {
                    const uint r = first + i * STEP_LANES;
                    for (uint c = 0; inside && step_has_row(r) && c < STEP_VECTORS; ++c) {
                        STEP_STORE(tile[i * STEP_VECTORS + c], level + r * STEP_V + c * STEP_WIDTH);
                    }
                }
            }
        }
        STEP_UNROLL
        for (uint i = 0; i < STEP_ROWS; ++i) {
            const uint r = first + i * STEP_LANES;
            for (uint c = 0; inside && !is_beyond && step_has_row(r) && c < STEP_VECTORS; ++c) {
                STEP_STORE(key[r] * token[c], values + r * STEP_V + c * STEP_WIDTH);
            }
        }
    }

    /* The rows' shares of o; the delta rule has summed them already. */
    for (uint c = 0; c < STEP_VECTORS; ++c) {
        STEP_VSTORE(out[c], sums + lane * STEP_BLOCK + slot + c * STEP_WIDTH);
    }
    if (!STEP_DELTA) {
        step_sum_rows(sums, STEP_LANES, STEP_BLOCK, item);
    }
    if (inside && lane == 0) {
        for (uint c = 0; c < STEP_VECTORS; ++c) {
            STEP_VSTORE(STEP_VLOAD(sums + slot + c * STEP_WIDTH) + weights[0] * query_key * token[c],
                        sums + slot + c * STEP_WIDTH);
        }
        for (uint j = 0; j < STEP_VECTORS * STEP_WIDTH; ++j) {
            store(o, j, is_beyond ? as_float(0x7fc00000) : sums[slot + j]);
        }
    }
}

__kernel __attribute__((reqd_work_group_size(STEP_ITEMS, 1, 1))) void
step_token(__global const storage *q, ulong q_offset, __global const storage *k, ulong k_offset,
           __global const storage *v, ulong v_offset, __global const float *g, ulong g_offset,
           __global const weight *level_scales, ulong level_scales_offset, __global const weight *beta,
           ulong beta_offset, __global float *values, ulong values_offset, __global const float *log_decay,
           ulong log_decay_offset, __global const int *position, ulong position_offset, __global storage *o,
           ulong o_offset, float scale) {
    __local step_scratch scratch;
    step_columns(get_group_id(0), q, q_offset, k, k_offset, v, v_offset, g, g_offset, level_scales,
                 level_scales_offset, beta, beta_offset, values, values_offset, log_decay, log_decay_offset, position,
                 position_offset, o, o_offset, scale, &scratch);
}

/* Behind step_token: the log decays of the levels (those that step_token has written start at 0 again), then the position. */
void step_advance_sequence(ulong sequence, __global const float *g, ulong g_offset, __global float *log_decay,
                           ulong log_decay_offset, __global int *position, ulong position_offset) {
    const uint now = (uint)position[position_offset + sequence];
    const bool is_beyond = step_is_beyond(now);
    for (uint j = get_local_id(0); log_decay && !is_beyond && j < STEP_HEADS * STEP_LEVELS; j += STEP_ADVANCE_ITEMS) {
        const uint l = j % STEP_LEVELS;
        const ulong head = sequence * STEP_HEADS + j / STEP_LEVELS;
        const uint sources = l == 0 ? 0 : step_sources(now, l);
        const ulong at = log_decay_offset + head * STEP_LEVELS + l;
        if (l > 0 && sources == 1u << l) {
            log_decay[at] += g ? g[g_offset + head] : 0.0f;
        } else if (l == 0 || sources != 0) {
            log_decay[at] = 0.0f;
        }
    }
#if STEP_ADVANCE_ITEMS > 1
    barrier(CLK_GLOBAL_MEM_FENCE);
#endif
    if (get_local_id(0) == 0 && !is_beyond) {
        position[position_offset + sequence] = (int)(now + 1);
    }
}

__kernel __attribute__((reqd_work_group_size(STEP_ADVANCE_ITEMS, 1, 1))) void
step_advance(__global const float *g, ulong g_offset, __global float *log_decay, ulong log_decay_offset,
             __global int *position, ulong position_offset) {
    step_advance_sequence(get_group_id(0), g, g_offset, log_decay, log_decay_offset, position, position_offset);
}
