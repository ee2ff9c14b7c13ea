/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tile products for processors with vector units and no matrix units: one work-item holds a tile of TILE_ROWS rows by two
 * vectors in registers and walks the inner dimension; an element of A is broadcast, a row of B is two vectors.  No
 * local memory, no barriers: a work-item is a core's thread, and the operands stay in its caches.
 *
 * VECTOR: floats of a vector, 16 (32 registers of 512 bits) or 8 (16 registers of 256 bits).
 */
#ifndef VECTOR
#define VECTOR 16
#endif

#if VECTOR == 16
typedef float16 vector;
#define TILE_ROWS 8
#else
typedef float8 vector;
#define TILE_ROWS 4
#endif

typedef __global float *matrix;
typedef const __global float *operand;

/* vload and vstore take four elements at a time on some compilers; a vector of float's alignment is one access. */
typedef vector loose_vector __attribute__((aligned(4)));
typedef float16 loose_float16 __attribute__((aligned(4)));
#define LOAD_VECTOR(p) (*(const __global loose_vector *)(p))
#define STORE_VECTOR(x, p) (*(__global loose_vector *)(p) = (x))

float16 get16(operand p) { return *(const __global loose_float16 *)p; }
void put16(float16 x, matrix p) { *(__global loose_float16 *)p = x; }

/* Element (r, c) of an operand lies at r * row + c * column: columns apart, A may be read transposed. */

/* What is known of an operand's zeros, and what is wanted of C; bits. */
enum {
    A_LOWER = 1,  /* A is lower triangular: the inner index ends at the tile's last row */
    A_UPPER = 2,  /* A is upper triangular: it begins at the tile's first row */
    B_LOWER = 4,  /* B is lower triangular: it begins at the tile's first column */
    C_LOWER = 8,  /* tiles of C above the diagonal are not wanted, and left as they are */
    ADD = 16,     /* C = keep C + */
    SUBTRACT = 32 /* C = keep C - */
};

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
 * C = diag(weights) A B, or keep C plus or minus it.  rows: a multiple of 8; columns: a multiple of 16; all of B's and C's rows
 * lie at multiples of a vector.
 */
void product(uint rows, uint columns, uint depth, operand a, uint a_row, uint a_column, operand b, uint b_row, matrix c,
             uint c_row, operand weights, int how, float keep) {
    for (uint n = 0; n < columns; n += 2 * VECTOR) {
        for (uint m = (how & C_LOWER) ? n / TILE_ROWS * TILE_ROWS : 0; m < rows; m += TILE_ROWS) {
            const uint begin = max((how & A_UPPER) ? m : 0, (how & B_LOWER) ? n : 0);
            const uint end = (how & A_LOWER) ? min(m + TILE_ROWS, depth) : depth;
            operand at = a + m * a_row, of_rows = weights ? weights + m : 0;
            if (n + VECTOR < columns) {
                wide_tile(begin, end, at, a_row, a_column, b + n, b_row, c + m * c_row + n, c_row, of_rows, how,
                          keep);
            } else {
                narrow_tile(begin, end, at, a_row, a_column, b + n, b_row, c + m * c_row + n, c_row, of_rows, how,
                          keep);
            }
        }
    }
}
