/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The tile interface (cl/portable_product.cl) on an implementation's fragments: what one item of a team holds of a
 * tile, unions with a member `x`, the elements in the order of cl/mma_layouts.cl.  An implementation gives
 *
 *     fragment_a load_fragment_a(const __local mma_element *slab, uint row, uint k, uint lane)
 *     fragment_b load_fragment_b(const __local mma_element *slab, uint k, uint column, uint lane)
 *     void multiply_fragments(mma_c *c, fragment_a a, fragment_b b)      the instruction
 *
 * Emulated, an operand is the place of its tile, from which the instruction finds any item's fragment.
 */
#if defined(MMA_INSTRUCTION) && !defined(MMA_EMULATED)

typedef fragment_a mma_a;
typedef fragment_b mma_b;

mma_a mma_load_a(const __local mma_element *slab, uint row, uint k) { return load_fragment_a(slab, row, k, MMA_LANE); }
mma_b mma_load_b(const __local mma_element *slab, uint k, uint column) {
    return load_fragment_b(slab, k, column, MMA_LANE);
}
void mma(mma_c *c, mma_a a, mma_b b) { multiply_fragments(c, a, b); }

#elif defined(MMA_INSTRUCTION)

typedef struct {
    const __local mma_element *slab;
    uint first, second; /* row and k of A, k and column of B */
} mma_a, mma_b;

mma_a mma_load_a(const __local mma_element *slab, uint row, uint k) { return (mma_a){slab, row, k}; }
mma_b mma_load_b(const __local mma_element *slab, uint k, uint column) { return (mma_b){slab, k, column}; }

/* A(i, k) as the instruction finds it; NaN where its copies differ. */
float held_a(mma_a a, uint i, uint k) {
    const fragment_a held = load_fragment_a(a.slab, a.first, a.second, A_LANE(i, k));
#if A_COPIES > 1
    const fragment_a copy = load_fragment_a(a.slab, a.first, a.second, A_LANE(i, k) + 16);
    if (copy.x[A_INDEX(i, k)] != held.x[A_INDEX(i, k)]) {
        return NAN;
    }
#endif
    return mma_widen(held.x[A_INDEX(i, k)]);
}

/* B(k, j), likewise. */
float held_b(mma_b b, uint k, uint j) {
    const fragment_b held = load_fragment_b(b.slab, b.first, b.second, B_LANE(k, j));
#if A_COPIES > 1
    const fragment_b copy = load_fragment_b(b.slab, b.first, b.second, B_LANE(k, j) + 16);
    if (copy.x[B_INDEX(k, j)] != held.x[B_INDEX(k, j)]) {
        return NAN;
    }
#endif
    return mma_widen(held.x[B_INDEX(k, j)]);
}

/* The elements of C that this item holds. */
void mma(mma_c *c, mma_a a, mma_b b) {
    for (uint i = 0; i < MMA_ROWS; i++) {
        for (uint j = 0; j < MMA_COLUMNS; j++) {
            for (uint k = 0; k < MMA_DEPTH && C_LANE(i, j) == MMA_LANE; k++) {
                c->x[C_INDEX(i, j)] = fma(held_a(a, i, k), held_b(b, k, j), c->x[C_INDEX(i, j)]);
            }
        }
    }
}
#endif
