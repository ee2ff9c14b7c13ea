/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the host tells the chunkwise kernels: this file is C and OpenCL C alike, included by both.
 *
 * A sequence is cut into chunks of C tokens at multiples of C of the absolute position, so the first and the last chunk
 * may be partial: their missing rows are zeros.  A slot is one chunk of one sequence.  A wave is the slots with the
 * same chunk number of the sequences that are walked side by side; a panel is a run of waves whose intermediate results
 * are in memory together.  Regions are arrays of matrices in the workspace, one matrix for each slot of the panel and
 * each head (or group) of a slot.
 */

/*
 * REGION(name, count, rows, columns, when): a matrix for each HEAD or GROUP of a slot, its shape in C, K, V and JV =
 * columns times V, and when it is needed: all of DELTA rule, GRADients, LEVELS (there are states to read), NEAR (strong
 * partition), NORMalisation.  FRONT, BACK: with room for one more wave before (if strong) or behind the panel.
 */
#define LOGLIN_REGIONS(REGION)                                                                                         \
    REGION(Q, GROUP, C, K, 0)                             /* queries times scale, normalised where asked for */        \
    REGION(KEY, GROUP, C, K, 0)                           /* keys, likewise */                                         \
    REGION(V, HEAD, C, V, FRONT)                          /* values */                                                 \
    REGION(QNORM, GROUP, C, 1, NORM)                      /* 1 / norm of the rows of q */                              \
    REGION(KNORM, GROUP, C, 1, NORM)                      /* and of k */                                               \
    REGION(GATE, HEAD, C, 2, 0)                           /* running sums a_r, then their remainders */                \
    REGION(BETA, HEAD, C, 1, DELTA)                                                                                    \
    REGION(QK, GROUP, C, C, 0)                            /* q k^T */                                                  \
    REGION(KK, GROUP, C, C, DELTA)                        /* k k^T */                                                  \
    REGION(A, HEAD, C, C, DELTA)                          /* tril(q k^T) with decay */                                 \
    REGION(X, HEAD, C, C, DELTA)                          /* strict_tril(diag(beta) k k^T) with decay */               \
    REGION(XINV, HEAD, C, C, DELTA)                       /* (I + X)^-1 */                                             \
    REGION(T, HEAD, C, C, DELTA)                          /* (I + X)^-1 diag(beta) */                                  \
    REGION(Z, HEAD, C, C, 0)                              /* o_t = sum_s level weight * Z_ts v_s inside the chunk */   \
    REGION(MZ, HEAD, C, C, 0)                             /* Z times its level weights */                              \
    REGION(K_START, HEAD, C, K, DELTA)                    /* keys decayed from the chunk's start: exp(a_r) k_r */      \
    REGION(K_END, HEAD, C, K, DELTA)                      /* keys decayed to the chunk's end: exp(a_C - a_r) k_r */    \
    REGION(READ, HEAD, C, K, 0)                           /* effective queries: o_r = READ_r E */                      \
    REGION(WRITE, HEAD, C, K, FRONT)                      /* effective keys: OWN = WRITE^T V */                        \
    REGION(O, HEAD, C, V, 0)                              /* outputs */                                                \
    REGION(OWN, HEAD, K, V, LEVELS)                       /* the chunk's own state */                                  \
    REGION(E, HEAD, K, JV, LEVELS | BACK)                 /* level states at the chunk's start */                      \
    REGION(E_SEEN, HEAD, C, JV, LEVELS | DELTA)           /* K_START E */                                              \
    REGION(E_LOST, HEAD, K, JV, LEVELS | DELTA)           /* WRITE^T E_SEEN: taken off E by the chunk */               \
    REGION(Y, HEAD, C, JV, LEVELS)                        /* READ E; backward: level weights times dO */               \
    REGION(Z_NEAR, HEAD, C, C, NEAR)                      /* READ WRITE^T, of the chunk before */                      \
    REGION(MZ_NEAR, HEAD, C, C, NEAR)                                                                                  \
    REGION(WRITE_NEAR, HEAD, C, K, NEAR)                  /* WRITE before, carried to the end */                       \
    REGION(M_NEAR, HEAD, C, C, NEAR | DELTA)                                                                           \
    REGION(D_O, HEAD, C, V, GRAD)                                                                                      \
    REGION(D_V, HEAD, C, V, GRAD | FRONT)                                                                              \
    REGION(D_MZ, HEAD, C, C, GRAD)                                                                                     \
    REGION(D_MZ_NEAR, HEAD, C, C, GRAD | NEAR)                                                                         \
    REGION(D_READ, HEAD, C, K, GRAD)                                                                                   \
    REGION(D_WRITE, HEAD, C, K, GRAD | FRONT)                                                                          \
    REGION(D_K_START, HEAD, C, K, GRAD | DELTA)                                                                        \
    REGION(D_K_END, HEAD, C, K, GRAD | DELTA)                                                                          \
    REGION(D_OWN, HEAD, K, V, GRAD | LEVELS)                                                                           \
    REGION(D_E, HEAD, K, JV, GRAD | LEVELS | BACK)        /* adjoint of E */                                           \
    REGION(D_E_END, HEAD, K, JV, GRAD | LEVELS)           /* adjoint of what E has become at the chunk's end */        \
    REGION(D_E_SEEN, HEAD, C, JV, GRAD | LEVELS | DELTA)  /* WRITE D_E_END */                                          \
    REGION(D_E_LOST, HEAD, K, JV, GRAD | LEVELS | DELTA)  /* K_START^T D_E_SEEN */                                     \
    REGION(D_WRITE_NEAR, HEAD, C, K, GRAD | NEAR)                                                                      \
    REGION(D_M_NEAR, HEAD, C, C, GRAD | NEAR | DELTA)                                                                  \
    REGION(D_T, HEAD, C, C, GRAD | DELTA)                                                                              \
    REGION(D_A, HEAD, C, C, GRAD | DELTA)                                                                              \
    REGION(D_X, HEAD, C, C, GRAD | DELTA)                                                                              \
    REGION(TT, HEAD, C, C, GRAD | DELTA)                  /* D_T T^T */                                                \
    REGION(D_QK, GROUP, C, C, GRAD)                                                                                    \
    REGION(D_KK, GROUP, C, C, GRAD | DELTA)               /* summed with its transpose */                              \
    REGION(D_Q, GROUP, C, K, GRAD)                                                                                     \
    REGION(D_KEY, GROUP, C, K, GRAD)                                                                                   \
    REGION(Q_DOT, GROUP, C, 1, GRAD | NORM)               /* Q . D_Q of a row, for the normalisation */                \
    REGION(K_DOT, GROUP, C, 1, GRAD | NORM)                                                                            \
    REGION(D_GATE, HEAD, C, 1, GRAD)                      /* gradient of a_r */                                        \
    REGION(D_END, HEAD, C, 1, GRAD)                       /* and of a_C - a_r */                                       \
    REGION(D_DECAY, HEAD, K, 1, GRAD | LEVELS)            /* gradient of a_C through the states */

#define LOGLIN_REGION_ENUM(name, count, rows, columns, when) REGION_##name,
enum { LOGLIN_REGIONS(LOGLIN_REGION_ENUM) REGION_COUNT };

enum { CARRY_COPY, CARRY_ADD, CARRY_ZERO }; /* what chunk_carry does */
enum { LOGLIN_LEVELS = 33 }; /* more than any level or column */

/* Entries of a slot's record of SLOT_INTS ints. */
enum {
    SLOT_SEQUENCE,
    SLOT_LO, /* rows lo .. hi-1 of the chunk hold tokens */
    SLOT_HI,
    SLOT_TOKEN, /* index of row lo's token among all tokens */
    SLOT_TIME,  /* absolute position of row lo */
    SLOT_FLAGS,
    SLOT_OWN, /* column that the chunk's own state joins at the next chunk's start; -1: none */
    SLOT_MAP, /* for each column: the column it joins at the next chunk's start, or -1; in the last chunk the level of
                 the final states */
    SLOT_INTS = SLOT_MAP + LOGLIN_LEVELS
};
enum { SLOT_VALID = 1, SLOT_FIRST = 2, SLOT_LAST = 4 };

typedef struct {
    unsigned int sequences, batch_width, waves; /* sequences in all; walked side by side; waves of a sequence */
    unsigned int heads, groups, dim_k, dim_v, levels;
    unsigned int chunk, chunk_bits, columns;
    unsigned int first_level;   /* level of column 0 */
    unsigned int near_levels;   /* levels up to this one lie in the chunk, and the one before if strong */
    unsigned int delta; /* 0 or 1 */
    unsigned int near;  /* 0 or 1: chunks read the keys of the chunk before one by one (strong); a column waits */
    unsigned int packed;        /* sequences are bounded by cu_seqlens */
    unsigned int max_length, max_position; /* bounds and positions beyond these are cut to them */
    unsigned int slots;         /* of the panel */
    float scale;
    unsigned long length; /* tokens of a sequence, or of all packed sequences */
    unsigned long first_slot, table; /* the panel's first slot among all; element offset of the slot table */
    unsigned long at[REGION_COUNT];  /* element offset of each region */
} loglin_panel;
