/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Products of a lane's matrices by a work-group, on one tile interface with an implementation for each kind of
 * hardware, cl/mma_*.cl.  Slabs of A (SLAB_ROWS by SLAB_DEPTH) and B (SLAB_DEPTH by SLAB_COLUMNS) are copied to local
 * memory; teams of work-items multiply tiles of them and keep their tiles of C in registers.  What lies outside, and
 * what is known to be zero, is a zero in the slab: nothing is read of such elements.
 *
 * An implementation defines, for a team of MMA_TEAM consecutive work-items (a sub-group where there are matrix units):
 *
 *     MMA_ROWS MMA_COLUMNS MMA_DEPTH       one step is C (ROWS by COLUMNS) += A (ROWS by DEPTH) B (DEPTH by COLUMNS);
 *                                          powers of two, DEPTH divides SLAB_DEPTH
 *     MMA_ELEMENTS                         elements of C that an item holds
 *     MMA_KERNEL                           attributes of the kernels, may be empty
 *     STEPS_UNROLLED                       steps whose operands wait in registers together, 2 unless it is defined
 *     READ_TOGETHER                        elements of C that are read before one is written, all unless it is defined
 *     ROLLED                               before loops over columns and what is called for each; may be left out
 *     ALIKE(x) ALIKE_POINTER(type, p)      what all items of a lane have alike; likewise
 *     mma_element                          what slabs hold
 *     mma_element mma_round(float x)
 *     MMA_A_SIZE MMA_B_SIZE                elements of the slabs, padding included; multiples of 16 bytes
 *     uint mma_a_at(uint row, uint k)      where an element lies in its slab
 *     uint mma_b_at(uint k, uint column)
 *     mma_a mma_load_a(const __local mma_element *slab, uint row, uint k)     the tile that begins there
 *     mma_b mma_load_b(const __local mma_element *slab, uint k, uint column)
 *     mma_c                                has a member `float x[MMA_ELEMENTS]`
 *     void mma(mma_c *c, mma_a a, mma_b b)
 *     uint mma_row(uint i)                 where x[i] of this item stands in the tile of C
 *     uint mma_column(uint i)
 *
 * All items of the work-group load and multiply the same number of times.
 */
#ifndef READ_TOGETHER
#define READ_TOGETHER MMA_ELEMENTS
#endif
#ifndef ROLLED
#ifdef __AMDGCN__
#define ROLLED _Pragma("unroll 1") /* what is kept for all of them would be spilled */
#else
#define ROLLED
#endif
#endif
#ifndef ALIKE
#define ALIKE(x) (x)
#define ALIKE_POINTER(type, p) (p)
#endif

#if LANE_ITEMS > 1
#define TEAMS_COLUMNS (LANE_ITEMS / MMA_TEAM / TEAMS_ROWS)
/* Tiles of a team. */
#define TILES_ROWS (SLAB_ROWS / TEAMS_ROWS / MMA_ROWS)
#define TILES_COLUMNS (SLAB_COLUMNS / TEAMS_COLUMNS / MMA_COLUMNS)

#if LANE_ITEMS % MMA_TEAM != 0 || LANE_ITEMS / MMA_TEAM % TEAMS_ROWS != 0
#error "LANE_ITEMS is not a number of whole teams in TEAMS_ROWS rows"
#endif
#if TILES_ROWS * TEAMS_ROWS * MMA_ROWS != SLAB_ROWS || TILES_COLUMNS * TEAMS_COLUMNS * MMA_COLUMNS != SLAB_COLUMNS
#error "the teams' tiles do not cover a slab"
#endif

#ifndef STEPS_UNROLLED
#define STEPS_UNROLLED 2
#endif

#define SLAB_FLOATS ((MMA_A_SIZE + MMA_B_SIZE) * sizeof(mma_element) / sizeof(float))

/* An item's vectors of a slab: four elements each that are neighbours in memory. */
#define A_VECTORS ((SLAB_ROWS * SLAB_DEPTH / 4 + LANE_ITEMS - 1) / LANE_ITEMS)
#define B_VECTORS ((SLAB_COLUMNS * SLAB_DEPTH / 4 + LANE_ITEMS - 1) / LANE_ITEMS)

/* The first element of vector i of A's slab, whose rows are neighbours' (along = 1), or its columns. */
uint2 a_place(uint i, uint along) {
    return along ? (uint2)(i / (SLAB_DEPTH / 4), i % (SLAB_DEPTH / 4) * 4)
                 : (uint2)(i % (SLAB_ROWS / 4) * 4, i / (SLAB_ROWS / 4));
}

uint2 b_place(uint i) { return (uint2)(i / (SLAB_COLUMNS / 4), i % (SLAB_COLUMNS / 4) * 4); }

/* A's slab from (row, k) on, where rows and depth end. */
void fetch_a(float4 x[A_VECTORS], operand a, uint a_row, uint a_column, uint row, uint rows, uint k, uint depth,
             int how) {
    const uint along = a_column == 1;
#pragma unroll
    for (uint i = 0; i < A_VECTORS; i++) {
        const uint2 place_of = a_place(ITEM + i * LANE_ITEMS, along);
        const uint r = row + place_of.x, c = k + place_of.y;
        x[i] = r < rows && c < depth ? *(const __global float4 *)(a + r * a_row + c * a_column) : 0.0f;
        const uint4 steps = (uint4)(0, 1, 2, 3), rows_of = r + (along ? 0u : 1u) * steps,
                    columns_of = c + along * steps;
        if ((how & (A_LOWER | A_UPPER)) || c + 4 > depth) {
            const int4 is_zero = columns_of >= depth || ((how & A_LOWER) ? columns_of > rows_of : (int4)0) ||
                                 ((how & A_UPPER) ? columns_of < rows_of : (int4)0);
            x[i] = select(x[i], (float4)0.0f, is_zero);
        }
    }
}

void fetch_b(float4 x[B_VECTORS], operand b, uint b_row, uint k, uint depth, uint column, uint columns, int how) {
#pragma unroll
    for (uint i = 0; i < B_VECTORS; i++) {
        const uint2 place_of = b_place(ITEM + i * LANE_ITEMS);
        const uint r = k + place_of.x, c = column + place_of.y;
        x[i] = r < depth && c < columns ? *(const __global float4 *)(b + r * b_row + c) : 0.0f;
        if (how & B_LOWER) {
            x[i] = select(x[i], (float4)0.0f, c + (uint4)(0, 1, 2, 3) > r);
        }
    }
}

void place_slabs(__local mma_element *slab_a, __local mma_element *slab_b, const float4 a[A_VECTORS], uint along,
                 const float4 b[B_VECTORS]) {
#pragma unroll
    for (uint i = 0; i < A_VECTORS; i++) {
        const uint2 at = a_place(ITEM + i * LANE_ITEMS, along);
        const uint row = along ? 0 : 1;
        if (at.x < SLAB_ROWS && at.y < SLAB_DEPTH) {
            slab_a[mma_a_at(at.x, at.y)] = mma_round(a[i].x);
            slab_a[mma_a_at(at.x + row, at.y + along)] = mma_round(a[i].y);
            slab_a[mma_a_at(at.x + 2 * row, at.y + 2 * along)] = mma_round(a[i].z);
            slab_a[mma_a_at(at.x + 3 * row, at.y + 3 * along)] = mma_round(a[i].w);
        }
    }
#pragma unroll
    for (uint i = 0; i < B_VECTORS; i++) {
        const uint2 at = b_place(ITEM + i * LANE_ITEMS);
        if (at.x < SLAB_DEPTH) {
            slab_b[mma_b_at(at.x, at.y)] = mma_round(b[i].x);
            slab_b[mma_b_at(at.x, at.y + 1)] = mma_round(b[i].y);
            slab_b[mma_b_at(at.x, at.y + 2)] = mma_round(b[i].z);
            slab_b[mma_b_at(at.x, at.y + 3)] = mma_round(b[i].w);
        }
    }
}

/* The team's tiles of the slabs, multiplied. */
void multiply_slabs(mma_c sums[TILES_ROWS][TILES_COLUMNS], const __local mma_element *a, const __local mma_element *b,
                    uint row, uint column) {
#pragma unroll STEPS_UNROLLED /* unrolled further, operands of many steps wait in registers */
    for (uint k = 0; k < SLAB_DEPTH; k += MMA_DEPTH) {
        mma_b right[TILES_COLUMNS];
#pragma unroll
        for (uint j = 0; j < TILES_COLUMNS; j++) {
            right[j] = mma_load_b(b, k, column + j * MMA_COLUMNS);
        }
#pragma unroll
        for (uint i = 0; i < TILES_ROWS; i++) {
            const mma_a left = mma_load_a(a, row + i * MMA_ROWS, k);
#pragma unroll
            for (uint j = 0; j < TILES_COLUMNS; j++) {
                mma(&sums[i][j], left, right[j]);
            }
        }
    }
}

/* What becomes of an element of C, which is `old`. */
float finish_product(float x, float old, float weight, int how, float keep) {
    x *= weight;
    return (how & (ADD | SUBTRACT)) ? fma((how & ADD) ? 1.0f : -1.0f, x, keep * old) : x;
}

LANE_CALL void product(const place *at, uint rows, uint columns, uint depth, operand a, uint a_row, uint a_column,
                       operand b, uint b_row, matrix c, uint c_row, operand weights, int how, float keep) {
    rows = ALIKE(rows);
    columns = ALIKE(columns);
    depth = ALIKE(depth);
    a = ALIKE_POINTER(operand, a);
    a_row = ALIKE(a_row);
    a_column = ALIKE(a_column);
    b = ALIKE_POINTER(operand, b);
    b_row = ALIKE(b_row);
    c = ALIKE_POINTER(matrix, c);
    c_row = ALIKE(c_row);
    weights = ALIKE_POINTER(operand, weights);
    how = ALIKE(how);
    keep = ALIKE(keep);
    __local mma_element *slab_a = (__local mma_element *)at->shared, *slab_b = slab_a + MMA_A_SIZE;
    const uint team = ITEM / MMA_TEAM, team_row = team % TEAMS_ROWS * TILES_ROWS * MMA_ROWS,
               team_column = team / TEAMS_ROWS * TILES_COLUMNS * MMA_COLUMNS;
    for (uint n = 0; n < columns; n += SLAB_COLUMNS) {
        for (uint m = (how & C_LOWER) ? n / SLAB_ROWS * SLAB_ROWS : 0; m < rows; m += SLAB_ROWS) {
            const uint begin = max((how & A_UPPER) ? m : 0, (how & B_LOWER) ? n : 0);
            const uint end = (how & A_LOWER) ? min(m + SLAB_ROWS, depth) : depth;
            mma_c sums[TILES_ROWS][TILES_COLUMNS];
#pragma unroll
            for (uint i = 0; i < TILES_ROWS * TILES_COLUMNS * MMA_ELEMENTS; i++) {
                sums[i / MMA_ELEMENTS / TILES_COLUMNS][i / MMA_ELEMENTS % TILES_COLUMNS].x[i % MMA_ELEMENTS] = 0.0f;
            }
            /* The next slabs are on their way while these are multiplied. */
            float4 next_a[A_VECTORS], next_b[B_VECTORS];
            fetch_a(next_a, a, a_row, a_column, m, rows, begin, end, how);
            fetch_b(next_b, b, b_row, begin, end, n, columns, how);
            for (uint k = begin; k < end; k += SLAB_DEPTH) {
                place_slabs(slab_a, slab_b, next_a, a_column == 1, next_b);
                barrier(CLK_LOCAL_MEM_FENCE);
                if (k + SLAB_DEPTH < end) {
                    fetch_a(next_a, a, a_row, a_column, m, rows, k + SLAB_DEPTH, end, how);
                    fetch_b(next_b, b, b_row, k + SLAB_DEPTH, end, n, columns, how);
                }
                multiply_slabs(sums, slab_a, slab_b, team_row, team_column);
                barrier(CLK_LOCAL_MEM_FENCE);
            }
            /* Tile by tile, what is there is read before anything is written: memory is waited for once. */
#pragma unroll
            for (uint i = 0; i < TILES_ROWS * TILES_COLUMNS; i++) {
                const uint row = m + team_row + i / TILES_COLUMNS * MMA_ROWS + mma_row(0);
                const uint column = n + team_column + i % TILES_COLUMNS * MMA_COLUMNS + mma_column(0);
                operand of_rows = weights ? weights + row : 0;
                matrix to = c + row * c_row + column;
#pragma unroll
                for (uint first = 0; first < MMA_ELEMENTS; first += READ_TOGETHER) {
                    float old[READ_TOGETHER];
#pragma unroll
                    for (uint j = first; j < first + READ_TOGETHER; j++) {
                        const int r = (int)(mma_row(j) - mma_row(0)), s = (int)(mma_column(j) - mma_column(0));
                        old[j - first] = 0.0f;
                        if ((how & (ADD | SUBTRACT)) && row + r < rows && column + s < columns) {
                            old[j - first] = to[r * (int)c_row + s];
                        }
                    }
#pragma unroll
                    for (uint j = first; j < first + READ_TOGETHER; j++) {
                        const int r = (int)(mma_row(j) - mma_row(0)), s = (int)(mma_column(j) - mma_column(0));
                        const int is_wanted = !(how & C_LOWER) || (column + s) / 16 <= (row + r) / 16;
                        if (row + r < rows && column + s < columns && is_wanted) {
                            to[r * (int)c_row + s] =
                                finish_product(sums[i / TILES_COLUMNS][i % TILES_COLUMNS].x[j], old[j - first],
                                               of_rows ? of_rows[r] : 1.0f, how, keep);
                        }
                    }
                }
            }
        }
    }
    SYNC();
}
#endif
