/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tile products without matrix units: a work-item holds a tile in registers and walks the inner dimension.
 */
#if LANE_ITEMS == 1
/*
 * For CPUs, product() itself: a tile of TILE_ROWS rows by two vectors; an element of A is broadcast, a row of B is two
 * vectors.  No local memory, no barriers: a work-item is a core's thread, and the operands stay in its caches.
 *
 * VECTOR: floats of a vector, 16 (32 registers of 512 bits) or 8 (16 registers of 256 bits).
 * TILE_ROWS: 4 or 8; 0: half of the registers hold a tile.
 */
#ifndef VECTOR
#define VECTOR 16
#endif

#if VECTOR == 16
typedef float16 vector;
#else
typedef float8 vector;
#endif

#ifndef TILE_ROWS
#define TILE_ROWS 0
#endif
#if TILE_ROWS == 0
#undef TILE_ROWS
#define TILE_ROWS (VECTOR / 2)
#endif

/* vload and vstore take four elements at a time on some compilers; a vector of float's alignment is one access. */
typedef vector loose_vector __attribute__((aligned(4)));
#define LOAD_VECTOR(p) (*(const __global loose_vector *)(p))
#define STORE_VECTOR(x, p) (*(__global loose_vector *)(p) = (x))

/* A tile of two vectors a row: rows of A at a, B's columns at b, C's place at c.  weights: of C's rows, or NULL. */
void wide_tile(uint begin, uint end, operand a, uint a_row, uint a_column, operand b, uint b_row, matrix c, uint c_row,
               operand weights, int how, float keep) {
    vector left[TILE_ROWS], right[TILE_ROWS];
#pragma unroll
    for (int r = 0; r < TILE_ROWS; r++) {
        left[r] = 0.0f;
        right[r] = 0.0f;
    }
    for (uint i = begin; i < end; i++) {
        const vector b_left = LOAD_VECTOR(b + i * b_row), b_right = LOAD_VECTOR(b + i * b_row + VECTOR);
#pragma unroll
        for (int r = 0; r < TILE_ROWS; r++) {
            const vector x = a[r * a_row + i * a_column];
            left[r] = fma(x, b_left, left[r]);
            right[r] = fma(x, b_right, right[r]);
        }
    }
#pragma unroll
    for (int r = 0; r < TILE_ROWS; r++) {
        matrix to = c + r * c_row;
        if (weights) {
            left[r] *= weights[r];
            right[r] *= weights[r];
        }
        if (how & (ADD | SUBTRACT)) {
            const float sign = (how & ADD) ? 1.0f : -1.0f;
            left[r] = fma((vector)sign, left[r], keep * LOAD_VECTOR(to));
            right[r] = fma((vector)sign, right[r], keep * LOAD_VECTOR(to + VECTOR));
        }
        STORE_VECTOR(left[r], to);
        STORE_VECTOR(right[r], to + VECTOR);
    }
}

/* The same with one vector a row. */
void narrow_tile(uint begin, uint end, operand a, uint a_row, uint a_column, operand b, uint b_row, matrix c,
                 uint c_row, operand weights, int how, float keep) {
    vector sums[TILE_ROWS];
#pragma unroll
    for (int r = 0; r < TILE_ROWS; r++) {
        sums[r] = 0.0f;
    }
    for (uint i = begin; i < end; i++) {
        const vector row = LOAD_VECTOR(b + i * b_row);
#pragma unroll
        for (int r = 0; r < TILE_ROWS; r++) {
            sums[r] = fma((vector)a[r * a_row + i * a_column], row, sums[r]);
        }
    }
#pragma unroll
    for (int r = 0; r < TILE_ROWS; r++) {
        matrix to = c + r * c_row;
        if (weights) {
            sums[r] *= weights[r];
        }
        if (how & (ADD | SUBTRACT)) {
            const float sign = (how & ADD) ? 1.0f : -1.0f;
            sums[r] = fma((vector)sign, sums[r], keep * LOAD_VECTOR(to));
        }
        STORE_VECTOR(sums[r], to);
    }
}

/*
 * Asks for the next rows of the next chunk, where the compiler makes a CPU's code and not SPIR-V, which has no more than
 * OpenCL C's own prefetch(); that is nothing on some CPUs.
 */
void ask_ahead(rows_ahead *ahead) {
#if defined(__x86_64__) || defined(__aarch64__)
    for (uint i = 0; i < AHEAD_ROWS && ahead->next < ahead->end; i++, ahead->next++) {
        for (uint stream = 0; stream < AHEAD_STREAMS; stream++) {
            const __global char *row = ahead->rows[stream] + ahead->next * ahead->strides[stream];
            for (uint byte = 0; byte < ahead->bytes[stream]; byte += 64) {
                __builtin_prefetch((const __global void *)(row + byte), 0, 2); /* to read, into the second cache */
            }
        }
    }
#else
    (void)ahead;
#endif
}

/* The inner index begins at the tile's first row if A is upper triangular, at its first column if B is lower. */
void product(const place *at, uint rows, uint columns, uint depth, operand a, uint a_row, uint a_column, operand b,
             uint b_row, matrix c, uint c_row, operand weights, int how, float keep) {
    for (uint n = 0; n < columns; n += 2 * VECTOR) {
        for (uint m = (how & C_LOWER) ? n / TILE_ROWS * TILE_ROWS : 0; m < rows; m += TILE_ROWS) {
            ask_ahead(at->ahead);
            const uint begin = max((how & A_UPPER) ? m : 0, (how & B_LOWER) ? n : 0);
            const uint end = (how & A_LOWER) ? min(m + TILE_ROWS, depth) : depth;
            operand of_a = a + m * a_row, of_rows = weights ? weights + m : 0;
            if (n + VECTOR < columns) {
                wide_tile(begin, end, of_a, a_row, a_column, b + n, b_row, c + m * c_row + n, c_row, of_rows, how,
                          keep);
            } else {
                narrow_tile(begin, end, of_a, a_row, a_column, b + n, b_row, c + m * c_row + n, c_row, of_rows, how,
                          keep);
            }
        }
    }
}

#else
/*
 * For GPUs: the tile interface of cl/portable_product.cl with fused multiply-adds.  A team is 4 by 8 work-items, each
 * with 4 by 4 elements of C, four rows and eight columns apart; slabs hold floats, their inner index contiguous, and
 * lie in rows of 4 floats more than they have, so that the items of a row of a team read from different banks.
 */
#define MMA_TEAM 32
#define MMA_ROWS 16
#define MMA_COLUMNS 32
#define MMA_DEPTH 4
#define MMA_ELEMENTS 16
#define MMA_KERNEL
#define MMA_STRIDE (SLAB_DEPTH + 4)
#define MMA_A_SIZE (SLAB_ROWS * MMA_STRIDE)
#define MMA_B_SIZE (SLAB_COLUMNS * MMA_STRIDE)

typedef float mma_element;
typedef struct {
    float4 x[4];
} mma_a, mma_b;
typedef struct {
    float x[MMA_ELEMENTS];
} mma_c;

mma_element mma_round(float x) { return x; }
uint mma_a_at(uint row, uint k) { return row * MMA_STRIDE + k; }
uint mma_b_at(uint k, uint column) { return column * MMA_STRIDE + k; }
uint mma_row(uint i) { return ITEM % MMA_TEAM / 8 + i / 4 * 4; }
uint mma_column(uint i) { return ITEM % 8 + i % 4 * 8; }

mma_a mma_load_a(const __local mma_element *slab, uint row, uint k) {
    mma_a a;
#pragma unroll
    for (uint i = 0; i < 4; i++) {
        a.x[i] = *(const __local float4 *)(slab + mma_a_at(row + mma_row(4 * i), k));
    }
    return a;
}

mma_b mma_load_b(const __local mma_element *slab, uint k, uint column) {
    mma_b b;
#pragma unroll
    for (uint i = 0; i < 4; i++) {
        b.x[i] = *(const __local float4 *)(slab + mma_b_at(k, column + mma_column(i)));
    }
    return b;
}

void mma(mma_c *c, mma_a a, mma_b b) {
#pragma unroll
    for (uint i = 0; i < MMA_ELEMENTS; i++) {
        const float4 x = a.x[i / 4], y = b.x[i % 4];
        c->x[i] = fma(x.w, y.w, fma(x.z, y.z, fma(x.y, y.y, fma(x.x, y.x, c->x[i]))));
    }
}
#endif
