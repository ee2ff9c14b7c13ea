/* SPDX-License-Identifier: Apache-2.0 */
/* Storage types and levels, for all kernels. */

/* Storage of q, k, v, o and of level_scales, beta: 0 float, 1 half, 2 bfloat16. */
#ifndef STORAGE
#define STORAGE 0
#endif
#ifndef WEIGHT_STORAGE
#define WEIGHT_STORAGE 0
#endif
#ifndef STRONG
#define STRONG 0
#endif

#if STORAGE == 0
typedef float storage;
#elif STORAGE == 1
typedef half storage;
#else
typedef ushort storage;
#endif
#if WEIGHT_STORAGE == 0
typedef float weight;
#elif WEIGHT_STORAGE == 1
typedef half weight;
#else
typedef ushort weight;
#endif

float bfloat_to_float(ushort x) { return as_float((uint)x << 16); }

/* Rounds to nearest, ties to even; NaN stays NaN. */
ushort float_to_bfloat(float x) {
    const uint bits = as_uint(x);
    const uint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (ushort)(isnan(x) ? 0x7fc0u : rounded);
}

float load(const __global storage *p, ulong i) {
#if STORAGE == 0
    return p[i];
#elif STORAGE == 1
    return vload_half(i, p);
#else
    return bfloat_to_float(p[i]);
#endif
}

void store(__global storage *p, ulong i, float x) {
#if STORAGE == 0
    p[i] = x;
#elif STORAGE == 1
    vstore_half_rte(x, i, p);
#else
    p[i] = float_to_bfloat(x);
#endif
}

float load_weight(const __global weight *p, ulong i) {
#if WEIGHT_STORAGE == 0
    return p[i];
#elif WEIGHT_STORAGE == 1
    return vload_half(i, p);
#else
    return bfloat_to_float(p[i]);
#endif
}

void store_weight(__global weight *p, ulong i, float x) {
#if WEIGHT_STORAGE == 0
    p[i] = x;
#elif WEIGHT_STORAGE == 1
    vstore_half_rte(x, i, p);
#else
    p[i] = float_to_bfloat(x);
#endif
}

int bit_length(uint x) { return 32 - (int)clz(x); }

/*
 * The level at query time `to` of keys that stand at `level` at query time `from` <= to.  Levels only move at multiples
 * of a power of two: with z trailing zeros of the time, the weak partition merges levels 0..z into z+1, and the strong
 * one moves levels 0..z+1 up by one.
 */
int level_advance(int level, uint from, uint to) {
    for (;;) {
        const uint bits = (uint)(STRONG ? max(level - 1, 0) : level);
        const ulong next = (((ulong)from >> bits) + 1) << bits;
        if (next > (ulong)to) {
            return level;
        }
        from = (uint)next;
        level = STRONG ? level + 1 : bit_length(from & (0u - from));
    }
}

/* level(t, s) for s <= t: a key stands at level 0 when it comes. */
int level_of(uint t, uint s) { return STRONG ? level_advance(0, s, t) : bit_length(t ^ s); }

/* Is there a key at `level` after token `time`? */
int level_exists(int level, uint time) {
    if (level == 0) {
        return 1;
    }
    return STRONG ? level <= bit_length(time) : (int)((time >> (level - 1)) & 1u);
}
