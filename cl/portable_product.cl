/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Products of a lane's matrices by a work-group, on one tile interface with an implementation for each kind of hardware,
 * cl/mma_*.cl.  Slabs of A (SLAB_ROWS by SLAB_DEPTH) and B (SLAB_DEPTH by SLAB_COLUMNS) are copied to local memory;
 * teams of work-items multiply tiles of them and keep their tiles of C in registers.  What lies outside, and what is
 * known to be zero, is a zero in the slab: nothing is read of such elements.
 *
 * An implementation defines, for a team of MMA_TEAM consecutive work-items (a sub-group where there are matrix units):
 *
 *     MMA_ROWS MMA_COLUMNS MMA_DEPTH       one step is C (ROWS by COLUMNS) += A (ROWS by DEPTH) B (DEPTH by COLUMNS);
 *                                          powers of two, DEPTH divides SLAB_DEPTH
 *     MMA_ELEMENTS                         elements of C that an item holds
 *     MMA_KERNEL                           attributes of the kernels, may be empty
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

#define SLAB_FLOATS ((MMA_A_SIZE + MMA_B_SIZE) * sizeof(mma_element) / sizeof(float))

/* A slab of A from (row, k) on, where rows and k end; four elements that are neighbours in memory at a time. */
void copy_a(__local mma_element *slab, operand a, uint a_row, uint a_column, uint row, uint rows, uint k, uint depth,
            int how) {
    for (uint i = ITEM; i < SLAB_ROWS * SLAB_DEPTH / 4; i += LANE_ITEMS) {
        const uint along = a_column == 1;
        const uint r = along ? i / (SLAB_DEPTH / 4) : i % (SLAB_ROWS / 4) * 4;
        const uint c = along ? i % (SLAB_DEPTH / 4) * 4 : i / (SLAB_ROWS / 4);
        float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (row + r < rows && k + c < depth) {
            vstore4(*(const __global float4 *)(a + (row + r) * a_row + (k + c) * a_column), 0, x);
        }
#pragma unroll
        for (uint j = 0; j < 4; j++) {
            const uint in_row = r + (along ? 0 : j), in_column = c + (along ? j : 0);
            const uint at_row = row + in_row, at_column = k + in_column;
            const int is_zero = at_column >= depth || ((how & A_LOWER) && at_column > at_row) ||
                                ((how & A_UPPER) && at_column < at_row);
            slab[mma_a_at(in_row, in_column)] = mma_round(is_zero ? 0.0f : x[j]);
        }
    }
}

void copy_b(__local mma_element *slab, operand b, uint b_row, uint k, uint depth, uint column, uint columns, int how) {
    for (uint i = ITEM; i < SLAB_COLUMNS * SLAB_DEPTH / 4; i += LANE_ITEMS) {
        const uint r = i / (SLAB_COLUMNS / 4), c = i % (SLAB_COLUMNS / 4) * 4;
        float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (k + r < depth && column + c < columns) {
            vstore4(*(const __global float4 *)(b + (k + r) * b_row + column + c), 0, x);
        }
#pragma unroll
        for (uint j = 0; j < 4; j++) {
            const int is_zero = (how & B_LOWER) && k + r < column + c + j;
            slab[mma_b_at(r, c + j)] = mma_round(is_zero ? 0.0f : x[j]);
        }
    }
}

/* The team's tiles of the slabs, multiplied. */
void multiply_slabs(mma_c sums[TILES_ROWS][TILES_COLUMNS], const __local mma_element *a, const __local mma_element *b,
                    uint row, uint column) {
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

/* To an element of C. */
void store_product(float x, matrix to, float weight, int how, float keep) {
    x *= weight;
    *to = (how & (ADD | SUBTRACT)) ? fma((how & ADD) ? 1.0f : -1.0f, x, keep * *to) : x;
}

void product(const place *at, uint rows, uint columns, uint depth, operand a, uint a_row, uint a_column, operand b,
             uint b_row, matrix c, uint c_row, operand weights, int how, float keep) {
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
            for (uint k = begin; k < end; k += SLAB_DEPTH) {
                copy_a(slab_a, a, a_row, a_column, m, rows, k, end, how);
                copy_b(slab_b, b, b_row, k, end, n, columns, how);
                barrier(CLK_LOCAL_MEM_FENCE);
                multiply_slabs(sums, slab_a, slab_b, team_row, team_column);
                barrier(CLK_LOCAL_MEM_FENCE);
            }
#pragma unroll
            for (uint i = 0; i < TILES_ROWS * TILES_COLUMNS; i++) {
#pragma unroll
                for (uint j = 0; j < MMA_ELEMENTS; j++) {
                    const uint row = m + team_row + i / TILES_COLUMNS * MMA_ROWS + mma_row(j);
                    const uint column = n + team_column + i % TILES_COLUMNS * MMA_COLUMNS + mma_column(j);
                    const int is_wanted = !(how & C_LOWER) || column / 16 <= row / 16;
                    if (row < rows && column < columns && is_wanted) {
                        store_product(sums[i / TILES_COLUMNS][i % TILES_COLUMNS].x[j], c + row * c_row + column,
                                      weights ? weights[row] : 1.0f, how, keep);
                    }
                }
            }
        }
    }
    SYNC();
}
#endif
