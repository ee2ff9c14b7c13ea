/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where every slot lies: which tokens its rows are, and at which level each state stands.  Slots are numbered by tiles
 * of batch_width sequences, then waves, then sequences; packed sequences follow one another in slots, each with room
 * for two partial chunks.  Positions and bounds are read here, on the device, so a call needs no look at them on the
 * host.
 */

/* Sequence i's first token and the count of its tokens. */
uint sequence_begin(const loglin_panel p, const __global int *cu_seqlens, uint i) {
    return p.packed ? (uint)clamp(cu_seqlens[i], 0, (int)p.length) : i * (uint)p.length;
}

uint sequence_length(const loglin_panel p, const __global int *cu_seqlens, uint i) {
    if (!p.packed) {
        return (uint)p.length;
    }
    const int begin = clamp(cu_seqlens[i], 0, (int)p.length), end = clamp(cu_seqlens[i + 1], 0, (int)p.length);
    return min((uint)max(end - begin, 0), p.max_length);
}

uint sequence_position(const loglin_panel p, const __global int *position, uint i) {
    return position ? min((uint)max(position[i], 0), p.max_position) : 0u;
}

/* First slot of a packed sequence. */
uint packed_slot(const loglin_panel p, const __global int *cu_seqlens, uint i) {
    return (sequence_begin(p, cu_seqlens, i) >> p.chunk_bits) + 2 * i;
}

/* The packed sequence that a slot belongs to. */
uint packed_sequence(const loglin_panel p, const __global int *cu_seqlens, uint slot) {
    uint low = 0, high = p.sequences;
    while (high - low > 1) {
        const uint middle = (low + high) / 2;
        if (packed_slot(p, cu_seqlens, middle) <= slot) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

/* The column of a level; -1 where there is none. */
int column_of(const loglin_panel p, int level) {
    const int column = level - (int)p.first_level;
    return column >= 0 && column < (int)(p.columns - p.near) ? column : -1;
}

const __global int *slot_record(const loglin_panel p, const __global float *ws, uint slot) {
    return (const __global int *)(ws + p.table) + (p.first_slot + slot) * SLOT_INTS;
}

/* The token in row r of a slot, or -1. */
long row_token(const __global int *slot, uint r) {
    const int row = (int)r;
    return row >= slot[SLOT_LO] && row < slot[SLOT_HI] ? (long)slot[SLOT_TOKEN] + (row - slot[SLOT_LO]) : -1;
}

/* Does the slot read the keys of the chunk before one by one? */
int reads_near(const __global int *slot) {
    return (slot[SLOT_FLAGS] & SLOT_VALID) != 0 && (slot[SLOT_FLAGS] & SLOT_FIRST) == 0;
}

/* Element of level 0 of the caller's states; levels follow at K V elements. */
ulong caller_state_at(const loglin_panel p, uint sequence, uint head, uint k, uint i) {
    return (((ulong)sequence * p.heads + head) * p.levels * p.dim_k + k) * p.dim_v + i;
}

/* The column where the caller's level stands when the next token is read, or -1. */
int initial_column(const loglin_panel p, int level, uint time) {
    return time > 0 && level_exists(level, time - 1) ? column_of(p, level_advance(level, time - 1, time)) : -1;
}

/* One work-item a slot. */
__kernel void chunk_layout(const loglin_panel p, __global float *ws, const __global int *cu_seqlens, ulong cu_offset,
                           const __global int *position, ulong position_offset, uint count) {
    const uint x = get_global_id(0);
    if (x >= count) {
        return;
    }
    cu_seqlens += cu_offset;
    position = position ? position + position_offset : 0;
    __global int *slot = (__global int *)(ws + p.table) + (ulong)x * SLOT_INTS;

    uint sequence, wave;
    if (p.packed) {
        sequence = packed_sequence(p, cu_seqlens, x);
        wave = x - packed_slot(p, cu_seqlens, sequence);
    } else {
        sequence = x / (p.waves * p.batch_width) * p.batch_width + x % p.batch_width;
        wave = x / p.batch_width % p.waves;
    }
    slot[SLOT_FLAGS] = slot[SLOT_LO] = slot[SLOT_HI] = slot[SLOT_TOKEN] = slot[SLOT_TIME] = 0;
    slot[SLOT_SEQUENCE] = (int)min(sequence, p.sequences - 1);
    slot[SLOT_OWN] = -1;
    for (uint j = 0; j < p.columns; j++) {
        slot[SLOT_MAP + j] = -1;
    }
    if (sequence >= p.sequences) {
        return;
    }
    const uint length = sequence_length(p, cu_seqlens, sequence);
    const uint start = sequence_position(p, position, sequence), end = start + length;
    const uint n = (start >> p.chunk_bits) + wave;
    const uint chunk_start = n << p.chunk_bits;
    if (length == 0 || chunk_start >= end) {
        return;
    }
    const uint time = max(start, chunk_start), next = chunk_start + p.chunk;
    const int last = end <= next;
    slot[SLOT_LO] = (int)(time - chunk_start);
    slot[SLOT_HI] = (int)(min(end, next) - chunk_start);
    slot[SLOT_TOKEN] = (int)(sequence_begin(p, cu_seqlens, sequence) + (time - start));
    slot[SLOT_TIME] = (int)time;
    slot[SLOT_FLAGS] = SLOT_VALID | (wave == 0 ? SLOT_FIRST : 0) | (last ? SLOT_LAST : 0);
    const uint until = last ? end - 1 : next;
    for (uint j = 0; j < p.columns - p.near; j++) {
        const int level = level_advance((int)(p.first_level + j), time, until);
        slot[SLOT_MAP + j] = !last ? column_of(p, level)
                             : level < (int)p.levels && level_exists(level, until) ? level : -1;
    }
    /* Strong: the keys of a chunk rest in the last column, unread, while the next chunk reads them one by one. */
    if (p.near) {
        slot[SLOT_OWN] = (int)p.columns - 1;
        slot[SLOT_MAP + p.columns - 1] = last ? -1 : column_of(p, (int)p.chunk_bits + 2);
    } else {
        slot[SLOT_OWN] = column_of(p, level_of(next, next - 1));
    }
}

/*
 * A sequence without tokens keeps its states; levels that do not exist become zeros.  Over (sequence and head, row of
 * K, column of V).
 */
__kernel void chunk_keep(const loglin_panel p, __global float *ws, const __global int *cu_seqlens, ulong cu_offset,
                         const __global int *position, ulong position_offset, const __global float *from,
                         ulong from_offset, const __global float *log_decay, ulong decay_offset, __global float *to,
                         ulong to_offset) {
    const uint matrix = get_global_id(0), k = get_global_id(1), i = get_global_id(2);
    const uint sequence = matrix / p.heads, head = matrix % p.heads;
    (void)ws;
    if (sequence >= p.sequences || sequence_length(p, cu_seqlens + cu_offset, sequence) > 0) {
        return;
    }
    const uint time = position ? sequence_position(p, position + position_offset, sequence) : 0;
    const ulong at = caller_state_at(p, sequence, head, k, i), step = (ulong)p.dim_k * p.dim_v;
    for (uint level = 0; level < p.levels; level++) {
        float x = 0.0f;
        if (from && time > 0 && level_exists((int)level, time - 1)) {
            const ulong decay = decay_offset + ((ulong)sequence * p.heads + head) * p.levels + level;
            x = from[from_offset + at + level * step] * (log_decay ? exp(log_decay[decay]) : 1.0f);
        }
        to[to_offset + at + level * step] = x;
    }
}

/* The positions after the call, and the final states' log decays.  One work-item a sequence. */
__kernel void chunk_positions(const loglin_panel p, __global float *ws, const __global int *cu_seqlens, ulong cu_offset,
                              const __global int *from, ulong from_offset, __global int *to, ulong to_offset,
                              __global float *log_decay, ulong decay_offset) {
    const uint sequence = get_global_id(0);
    (void)ws;
    if (sequence >= p.sequences) {
        return;
    }
    const uint time = from ? sequence_position(p, from + from_offset, sequence) : 0;
    if (to) {
        to[to_offset + sequence] = (int)(time + sequence_length(p, cu_seqlens + cu_offset, sequence));
    }
    for (ulong j = 0; log_decay && j < (ulong)p.heads * p.levels; j++) {
        log_decay[decay_offset + (ulong)sequence * p.heads * p.levels + j] = 0.0f;
    }
}
