/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The work-items of a lane.  On a CPU a lane is one work-item, which has a core's vector registers and caches to
 * itself; on a GPU it is a work-group of LANE_ITEMS.  A function that takes a lane's `place` is called by all of its
 * items with the same arguments: they share its work out, and it ends with SYNC, so what it has written is there for
 * the next one.  Control variables are private, and the same in all items.
 */
#ifndef LANE_ITEMS
#define LANE_ITEMS 1
#endif

/* What a work-group copies to local memory at a time, and the rows in which its teams lie: cl/portable_product.cl. */
#ifndef SLAB_ROWS
#define SLAB_ROWS 64
#endif
#ifndef SLAB_COLUMNS
#define SLAB_COLUMNS 64
#endif
#ifndef SLAB_DEPTH
#define SLAB_DEPTH 32
#endif
#ifndef TEAMS_ROWS
#define TEAMS_ROWS 1
#endif

/*
 * Rows of matrices are shared out in strips, neighbours to neighbouring items: ITEM's rows and columns, and the steps
 * to its next ones.
 */
#if LANE_ITEMS == 1
#define ITEM 0u
#define SYNC()
#define ROW_PARTS 1u
#define STRIP 16u
#define OF_STRIP(name) name##16
typedef float16 strip;
typedef uint16 strip_uint;
#else
#define ITEM ((uint)get_local_id(0))
#define SYNC() barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE)
#define ROW_PARTS 4u
#define STRIP 4u
#define OF_STRIP(name) name##4
typedef float4 strip;
typedef uint4 strip_uint;
#endif
/* Strips that an item reads before it writes any: what it writes could be what it reads next, for all the compiler knows. */
#if LANE_ITEMS == 1
#define BATCH 1u
#else
#define BATCH 4u
#endif
#define FIRST_ROW (ITEM / ROW_PARTS)
#define ROW_STEP (LANE_ITEMS / ROW_PARTS)
#define FIRST_COLUMN (ITEM % ROW_PARTS * STRIP)
#define COLUMN_STEP (ROW_PARTS * STRIP)

/* Large functions that are called from many places: a GPU's compiler would copy each of them there. */
#if LANE_ITEMS == 1
#define LANE_CALL
#else
#define LANE_CALL __attribute__((noinline))
#endif

/* Smaller ones that take the panel: Intel's compiler, which has no stack to copy it to, needs fewer registers so. */
#if LANE_ITEMS > 1 && defined(cl_intel_subgroups)
#define LANE_PART __attribute__((noinline))
#else
#define LANE_PART
#endif

typedef __global float *matrix;
typedef const __global float *operand;

/* Vectors of a lane's memory.  A CPU's compiler makes one access of them at any alignment; a GPU's must know it. */
#if LANE_ITEMS == 1
typedef float16 lane_float16 __attribute__((aligned(4)));
typedef lane_float16 lane_strip;
#else
typedef float16 lane_float16;
typedef float4 lane_strip;
#endif

float16 get16(operand p) { return *(const __global lane_float16 *)p; }
void put16(float16 x, matrix p) { *(__global lane_float16 *)p = x; }
strip get_strip(operand p) { return *(const __global lane_strip *)p; }
void put_strip(strip x, matrix p) { *(__global lane_strip *)p = x; }

float sum16(float16 x) {
#if LANE_ITEMS == 1
    const float8 a = x.lo + x.hi;
    const float4 b = a.lo + a.hi;
#else /* by elements: Oclgrind takes the upper half of a vector for uninitialised */
    const float4 b = ((float4)(x.s0, x.s1, x.s2, x.s3) + (float4)(x.s8, x.s9, x.sa, x.sb)) +
                     ((float4)(x.s4, x.s5, x.s6, x.s7) + (float4)(x.sc, x.sd, x.se, x.sf));
#endif
    return (b.x + b.y) + (b.z + b.w);
}

float sum_of_strip(strip x) {
#if LANE_ITEMS == 1
    return sum16(x);
#else
    return (x.x + x.y) + (x.z + x.w);
#endif
}

/*
 * Rows of the caller's that a CPU's lane needs for its next chunk.  Those of a group or head lie far apart, where no
 * hardware looks ahead: every tile of a product asks for a few of them, into the second cache.
 */
enum { AHEAD_STREAMS = 4, AHEAD_ROWS = 2 };
typedef struct {
    const __global char *rows[AHEAD_STREAMS]; /* the first row of each stream */
    ulong strides[AHEAD_STREAMS];             /* bytes between its rows, and of a row */
    uint bytes[AHEAD_STREAMS];
    uint next, end; /* the rows that nothing has asked for */
} rows_ahead;

/* Where a lane stands. */
typedef struct {
    matrix memory, map, pool; /* of the lane, of the chunk's map, of the states; each counts on from the one before */
#if LANE_ITEMS > 1
    __local float *shared; /* for the products' slabs, and for sums */
#else
    rows_ahead *ahead;
#endif
    uint sequence, group;
    uint head;        /* of the lane's, 0 .. LANE_HEADS - 1 */
    uint first_head;  /* among all */
    uint first_value; /* first column of v, and how many are the lane's */
    uint values;
    const __global int *slot;
} place;

/* What is known of a product's operands' zeros, and what is wanted of C; bits. */
enum {
    A_LOWER = 1,  /* A is lower triangular */
    A_UPPER = 2,  /* A is upper triangular */
    B_LOWER = 4,  /* B is lower triangular */
    C_LOWER = 8,  /* blocks of 16 by 16 of C above the diagonal are not wanted: they may be left as they are */
    ADD = 16,     /* C = keep C + */
    SUBTRACT = 32 /* C = keep C - */
};

/*
 *     void product(const place *at, uint rows, uint columns, uint depth, operand a, uint a_row, uint a_column,
 *                  operand b, uint b_row, matrix c, uint c_row, operand weights, int how, float keep)
 *
 * C = diag(weights) A B, or keep C plus or minus it; weights may be NULL.  Element (r, c) of A lies at r * a_row + c *
 * a_column, one of which is 1: columns apart, A may be read transposed.  rows and columns are multiples of 16, so are
 * all strides but the ones.
 */
