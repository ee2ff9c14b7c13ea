/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where every slot lies: which tokens its rows are, and at which level each state stands.  Slots are numbered by tiles
 * of batch_width sequences, then waves, then sequences; packed sequences follow one another in slots, each with room for
 * two partial chunks.  Positions and bounds are read here, on the device, so a call needs no look at them on the host.
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
    return (uint)max(end - begin, 0);
}

uint sequence_position(const __global int *position, uint i) { return position ? (uint)max(position[i], 0) : 0u; }

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
    const uint start = sequence_position(position, sequence), end = start + length;
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
