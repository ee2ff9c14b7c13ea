/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which item of a team, and which of its registers, holds which element of the operands of a matrix instruction: one
 * table for all of them, in both directions.  C (ROWS by COLUMNS) += A (ROWS by DEPTH) B (DEPTH by COLUMNS); i is a row
 * of C, j a column, k the inner index; `lane` is an item's number in its team and x counts the 16-bit (C: 32-bit)
 * elements that an item holds, in the order of its registers, low halves first.
 *
 *     A_LANE A_INDEX B_LANE B_INDEX C_LANE C_INDEX     element -> lane, x: as the vendor's document puts it
 *     A_ROW A_K B_K B_COLUMN C_ROW C_COLUMN            lane, x -> element: what the kernels use
 *
 * The emulation of an instruction (cl/mma_fragments.cl) goes by the first direction alone, and the kernels that feed it
 * by the second: an error in either gives wrong products.  A_COPIES: lanes 16 apart that must hold the same elements of
 * A, B.
 *
 * MMA_INSTRUCTION: one of the names below; not defined: the tile products do without one, and this file is empty.
 * MMA_EMULATED, if it is defined, names the instruction that is emulated; a device that emulates one has no other.
 */
#ifdef MMA_INSTRUCTION
#define MFMA_32X32X8 1
#define WMMA_GFX11 2
#define WMMA_GFX12 3
#define DPAS_8X8X16 4
#define DPAS_8X16X16 5
#define FMA_8X16X16 6
#define FMA_8X8X8 7
#define IS_FMA (MMA_INSTRUCTION == FMA_8X16X16 || MMA_INSTRUCTION == FMA_8X8X8)

#if defined(MMA_EMULATED) && MMA_EMULATED != MMA_INSTRUCTION
#error "this device has no such instruction"
#endif

/*
 * v_mfma_f32_32x32x8_f16 and _bf16_1k, waves of 64: gfx90a, gfx942, gfx950.  AMD Matrix Instruction Calculator,
 * `matrix_calculator.py -a cdna3 -i v_mfma_f32_32x32x8_f16 -d`:
 *     "A[i][k] GPR: (floor(k / 2) % 2).[16*(k % 2)+15 : 16*(k % 2)], Lane: 32 * floor(k / 4) + i", B[k][j] likewise
 *     "D[i][j] GPR: 4 * floor(i / 8) + (i % 4), Lane: (32 * floor(i / 4)) % 64 + j"
 */
#if MMA_INSTRUCTION == MFMA_32X32X8
#define MMA_TEAM 64
#define MMA_ROWS 32
#define MMA_COLUMNS 32
#define MMA_DEPTH 8
#define A_COPIES 1
#define A_LANE(i, k) (32 * ((k) / 4) + (i))
#define A_INDEX(i, k) ((k) % 4)
#define B_LANE(k, j) (32 * ((k) / 4) + (j))
#define B_INDEX(k, j) ((k) % 4)
#define C_LANE(i, j) (32 * ((i) / 4) % 64 + (j))
#define C_INDEX(i, j) (4 * ((i) / 8) + (i) % 4)
#define A_ROW(lane, x) ((lane) % 32)
#define A_K(lane, x) ((lane) / 32 * 4 + (x))
#define B_K(lane, x) ((lane) / 32 * 4 + (x))
#define B_COLUMN(lane, x) ((lane) % 32)
#define C_ROW(lane, x) ((x) / 4 * 8 + (lane) / 32 * 4 + (x) % 4)
#define C_COLUMN(lane, x) ((lane) % 32)

/*
 * v_wmma_f32_16x16x16_f16 and _bf16, waves of 32: gfx11.  AMD Matrix Instruction Calculator, `-a rdna3 -i
 * v_wmma_f32_16x16x16_f16 -d`:
 *     A[i][k] GPR "floor(k / 2).[16*(k % 2)+15 : 16*(k % 2)]", lane "i and i+16", B[k][j] likewise, lane "j and j+16"
 *     D[i][j] GPR "floor(i / 2)", lane "((16 * i) % 32) + j"
 * See also "RDNA3" Instruction Set Architecture, Reference Guide, section 7.9 "Wave Matrix Multiply Accumulate (WMMA)".
 */
#elif MMA_INSTRUCTION == WMMA_GFX11
#define MMA_TEAM 32
#define MMA_ROWS 16
#define MMA_COLUMNS 16
#define MMA_DEPTH 16
#define A_COPIES 2
#define A_LANE(i, k) (i)
#define A_INDEX(i, k) (k)
#define B_LANE(k, j) (j)
#define B_INDEX(k, j) (k)
#define C_LANE(i, j) (16 * (i) % 32 + (j))
#define C_INDEX(i, j) (16 * (i) / 32)
#define A_ROW(lane, x) ((lane) % 16)
#define A_K(lane, x) (x)
#define B_K(lane, x) (x)
#define B_COLUMN(lane, x) ((lane) % 16)
#define C_ROW(lane, x) ((x) * 2 + (lane) / 16)
#define C_COLUMN(lane, x) ((lane) % 16)

/*
 * v_wmma_f32_16x16x16_f16 and _bf16, waves of 32: gfx12, where nothing is held twice.  "RDNA4" Instruction Set
 * Architecture, Reference Guide, section 7.12.2 "Matrix Element Storage in VGPRs", Wave32:
 *     A, 16 bits: "lane { col[2], row[3:0] }, vgpr { col[3], col[1] }, startPosn col[0]", B likewise of row and col
 *     D, 32 bits: "matrix[row][col] -> VGPR[(row / 8) * 16 + col][row % 8]"
 * AMD Matrix Instruction Calculator has the same with `-a rdna4`.  Code that gives k = 0 .. 7 to the lanes 0 .. 15
 * exchanges bits 2 and 3 of k in A and B alike: its product is the same.
 */
#elif MMA_INSTRUCTION == WMMA_GFX12
#define MMA_TEAM 32
#define MMA_ROWS 16
#define MMA_COLUMNS 16
#define MMA_DEPTH 16
#define A_COPIES 1
#define A_LANE(i, k) (16 * ((k) / 4 % 2) + (i))
#define A_INDEX(i, k) (4 * ((k) / 8) + (k) % 4)
#define B_LANE(k, j) (16 * ((k) / 4 % 2) + (j))
#define B_INDEX(k, j) (4 * ((k) / 8) + (k) % 4)
#define C_LANE(i, j) (16 * ((i) / 8) + (j))
#define C_INDEX(i, j) ((i) % 8)
#define A_ROW(lane, x) ((lane) % 16)
#define A_K(lane, x) ((x) / 4 * 8 + (lane) / 16 * 4 + (x) % 4)
#define B_K(lane, x) ((x) / 4 * 8 + (lane) / 16 * 4 + (x) % 4)
#define B_COLUMN(lane, x) ((lane) % 16)
#define C_ROW(lane, x) ((lane) / 16 * 8 + (x))
#define C_COLUMN(lane, x) ((lane) % 16)

/*
 * intel_sub_group_f16_f16_matrix_mad_k16 and _bf16_bf16_, 8 rows.  The text of the extension
 * cl_intel_subgroup_matrix_multiply_accumulate, revision 1.1.0, "Add a new Section 6.13.X": "The value for M is
 * determined by the number of vector components in the source operand a", so component i is row i, of which an item
 * contributes 32 bits where the smallest sub-group is 8 (int8 a: two elements), 16 bits where it is 16 (short8 a); of b
 * and acc "each work item contributes one column".  Its coding sample has k rise with the item, then from low bits to
 * high in a, and from component to component, low bits first, in b.
 */
#elif MMA_INSTRUCTION == DPAS_8X8X16
#define MMA_TEAM 8
#define MMA_ROWS 8
#define MMA_COLUMNS 8
#define MMA_DEPTH 16
#define A_COPIES 1
#define A_LANE(i, k) ((k) / 2)
#define A_INDEX(i, k) (2 * (i) + (k) % 2)
#define B_LANE(k, j) (j)
#define B_INDEX(k, j) (k)
#define C_LANE(i, j) (j)
#define C_INDEX(i, j) (i)
#define A_ROW(lane, x) ((x) / 2)
#define A_K(lane, x) ((lane) * 2 + (x) % 2)
#define B_K(lane, x) (x)
#define B_COLUMN(lane, x) (lane)
#define C_ROW(lane, x) (x)
#define C_COLUMN(lane, x) (lane)

/*
 * The same for sub-groups of 16, and our own sequences of fused multiply-adds and shuffles, which hold floats, for sub-groups
 * of 16 and of 8.
 */
#elif MMA_INSTRUCTION == DPAS_8X16X16 || IS_FMA
#define MMA_TEAM (MMA_INSTRUCTION == FMA_8X8X8 ? 8 : 16)
#define MMA_ROWS 8
#define MMA_COLUMNS MMA_TEAM
#define MMA_DEPTH MMA_TEAM
#define A_COPIES 1
#define A_LANE(i, k) (k)
#define A_INDEX(i, k) (i)
#define B_LANE(k, j) (j)
#define B_INDEX(k, j) (k)
#define C_LANE(i, j) (j)
#define C_INDEX(i, j) (i)
#define A_ROW(lane, x) (x)
#define A_K(lane, x) (lane)
#define B_K(lane, x) (x)
#define B_COLUMN(lane, x) (lane)
#define C_ROW(lane, x) (x)
#define C_COLUMN(lane, x) (lane)
#endif

/* ---- What all of them have in common ----------------------------------------------------------------------------- */

#define A_HELD (A_COPIES * MMA_ROWS * MMA_DEPTH / MMA_TEAM) /* elements of an item */
#define B_HELD (A_COPIES * MMA_DEPTH * MMA_COLUMNS / MMA_TEAM)
#define MMA_ELEMENTS (MMA_ROWS * MMA_COLUMNS / MMA_TEAM)
#define MMA_LANE ((uint)get_local_id(0) % MMA_TEAM)

uint mma_row(uint i) { return C_ROW(MMA_LANE, i); }
uint mma_column(uint i) { return C_COLUMN(MMA_LANE, i); }

#if IS_FMA
typedef float mma_element;
mma_element mma_round(float x) { return x; }
float mma_widen(mma_element x) { return x; }
#elif STORAGE == 2
typedef ushort mma_element;
mma_element mma_round(float x) { return float_to_bfloat(x); }
float mma_widen(mma_element x) { return bfloat_to_float(x); }
#else
typedef ushort mma_element;
mma_element mma_round(float x) {
    mma_element bits;
    vstore_half_rte(x, 0, (half *)&bits);
    return bits;
}
float mma_widen(mma_element x) { return vload_half(0, (const half *)&x); }
#endif
#endif
