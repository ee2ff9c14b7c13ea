/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A lane's own memory in the workspace: this file is C and OpenCL C alike, included by both.
 *
 * A lane is one work-group, on a CPU of one work-item.  It walks one sequence chunk by chunk, with LANE_HEADS heads of
 * one group and PAD_V columns of their values, so what it keeps between two products stays in its core's caches.  K and
 * V are padded to whole vectors.  Where there are too few lanes of that kind, those of cl/portable_spread.cl share the
 * chunks and the states of a head.
 */

/*
 * ARRAY(name, count, rows, columns, when): floats, in C (chunk), K, V (padded), L (weights of a row), P (states in the
 * pool), D (their decays), J (columns), S (segments), M (moments: starts of segments, and of a segment's chunks), A
 * (adjoints); a copy for each HEAD of the lane where ONE is not enough.
 */
#define PORTABLE_ARRAYS(ARRAY)                                                                                         \
    ARRAY(Q, ONE, C, K, ALWAYS)            /* queries times scale, normalised where asked for */                       \
    ARRAY(KEY, ONE, C, K, ALWAYS)          /* keys, likewise */                                                        \
    ARRAY(KEY_T, ONE, K, C, ALWAYS)        /* transposed */                                                            \
    ARRAY(QK, ONE, C, C, ALWAYS)           /* q k^T, its lower triangle */                                             \
    ARRAY(KK, ONE, C, C, DELTA)            /* k k^T, likewise */                                                       \
    ARRAY(V, ONE, C, V, ALWAYS)            /* values */                                                                \
    ARRAY(V_END, ONE, C, V, SCALAR)        /* values decayed to the chunk's end */                                     \
    ARRAY(START, ONE, C, 1, ALWAYS)        /* exp(a_r) */                                                              \
    ARRAY(END, ONE, C, 1, ALWAYS)          /* exp(a_C - a_r) */                                                        \
    ARRAY(BETA, ONE, C, 1, DELTA)                                                                                      \
    ARRAY(ROWS, ONE, C, 1, ALWAYS)         /* what the rows of a product are multiplied with */                        \
    ARRAY(TOTALS, ONE, C, 2, ALWAYS)       /* sums over rows */                                                        \
    ARRAY(LEVEL, ONE, C, C, STRONG)        /* level(r, s) inside the chunk, ints */                                    \
    ARRAY(LEVEL_NEAR, ONE, C, C, NEAR)     /* level(C + r, s) */                                                       \
    ARRAY(A, ONE, C, C, DELTA)             /* the arrays of cl/chunk_operators.cl */                                   \
    ARRAY(X, ONE, C, C, DELTA)                                                                                         \
    ARRAY(XINV, ONE, C, C, DELTA)                                                                                      \
    ARRAY(T, ONE, C, C, DELTA)                                                                                         \
    ARRAY(Z, ONE, C, C, PAIRS)                                                                                         \
    ARRAY(K_END, ONE, C, K, DELTA)                                                                                     \
    ARRAY(SEEN, ONE, C, V, DELTA)          /* K_START E of one state */                                                \
    ARRAY(O, ONE, C, V, ALWAYS)                                                                                        \
    ARRAY(Z_NEAR, ONE, C, C, NEAR)                                                                                     \
    ARRAY(M_NEAR_T, ONE, C, C, NEAR)       /* K_START WRITE^T, of the chunk before */                                  \
    ARRAY(WRITE_NEAR, ONE, C, K, NEAR)                                                                                 \
    ARRAY(V_BEFORE, HEAD, C, V, NEAR)      /* values of the chunk before */                                            \
    ARRAY(WRITE_BEFORE_T, HEAD, K, C, NEAR) /* and its WRITE, transposed */                                            \
    ARRAY(DECAY, HEAD, D, 1, ALWAYS)       /* a state of the pool is exp(its DECAY) times what stands in E */          \
    ARRAY(V_BEFORE_T, ONE, V, C, NEAR_GRADIENTS)                                                                       \
    ARRAY(D_NEAR, ONE, C, C, NEAR_GRADIENTS)   /* gradient of Z_NEAR */                                                \
    ARRAY(D_NEAR_T, ONE, C, C, NEAR_GRADIENTS)                                                                         \
    ARRAY(D_WRITE_NEAR_T, ONE, K, C, NEAR_GRADIENTS)                                                                   \
    ARRAY(D_V_AHEAD, HEAD, C, V, NEAR_GRADIENTS)       /* what the next chunk asks of this one's values */             \
    ARRAY(D_WRITE_AHEAD_T, HEAD, K, C, NEAR_GRADIENTS) /* and of its WRITE */                                          \
    ARRAY(READ_T, ONE, K, C, GRADIENTS)                                                                                \
    ARRAY(V_T, ONE, V, C, GRADIENTS)                                                                                   \
    ARRAY(D_O, ONE, C, V, GRADIENTS)                                                                                   \
    ARRAY(D_O_T, ONE, V, C, GRADIENTS)                                                                                 \
    ARRAY(WEIGHED_D_O, ONE, C, V, GRADIENTS) /* level weights times dO */                                              \
    ARRAY(D_V, ONE, C, V, GRADIENTS)                                                                                   \
    ARRAY(D_MZ, ONE, C, C, GRADIENTS)      /* dO V^T, then that of Z */                                                \
    ARRAY(D_LEVELS, ONE, C, L, GRADIENTS)  /* gradients of the rows' level weights */                                  \
    ARRAY(ASKED_T, ONE, K, C, GRADIENTS)   /* E dO^T of one state */                                                   \
    ARRAY(D_READ_T, ONE, K, C, GRADIENTS)                                                                              \
    ARRAY(D_WRITE_T, ONE, K, C, GRADIENTS)                                                                             \
    ARRAY(D_READ, ONE, C, K, GRADIENTS)                                                                                \
    ARRAY(D_WRITE, ONE, C, K, GRADIENTS)                                                                               \
    ARRAY(D_QK, ONE, C, C, GRADIENTS)      /* summed over the heads of the lane, as all below up to D_KEY */           \
    ARRAY(D_KK, ONE, C, C, DELTA_GRADIENTS)                                                                            \
    ARRAY(D_Q, ONE, C, K, GRADIENTS)                                                                                   \
    ARRAY(D_KEY, ONE, C, K, GRADIENTS)                                                                                 \
    ARRAY(D_GATE, ONE, C, 1, GRADIENTS)    /* gradient of a_r */                                                       \
    ARRAY(D_END, ONE, C, 1, GRADIENTS)     /* and of a_C - a_r */                                                      \
    ARRAY(D_BETA, ONE, C, 1, DELTA_GRADIENTS)                                                                          \
    ARRAY(SEEN_T, ONE, V, C, DELTA_GRADIENTS)                                                                          \
    ARRAY(GIVEN, ONE, C, V, DELTA_GRADIENTS) /* WRITE D_E_END of one state */                                          \
    ARRAY(GIVEN_T, ONE, V, C, DELTA_GRADIENTS)                                                                         \
    ARRAY(T_T, ONE, C, C, DELTA_GRADIENTS)                                                                             \
    ARRAY(TT, ONE, C, C, DELTA_GRADIENTS)  /* D_T T^T */                                                               \
    ARRAY(D_T, ONE, C, C, DELTA_GRADIENTS)                                                                             \
    ARRAY(D_A, ONE, C, C, DELTA_GRADIENTS)                                                                             \
    ARRAY(D_X, ONE, C, C, DELTA_GRADIENTS) /* negated */                                                               \
    ARRAY(K_START_T, ONE, K, C, DELTA_GRADIENTS)                                                                       \
    ARRAY(D_K_START_T, ONE, K, C, DELTA_GRADIENTS)                                                                     \
    ARRAY(D_K_START, ONE, C, K, DELTA_GRADIENTS)                                                                       \
    ARRAY(D_K_END, ONE, C, K, DELTA_GRADIENTS)                                                                         \
    ARRAY(SAVED, HEAD, SJ, KV, GRADIENTS)  /* states at the start of segments */                                       \
    ARRAY(D_E, HEAD, A, KV, GRADIENTS)     /* adjoints of states */

/* A chunk's map for a head: what the walk over the states needs of its queries, keys and gates. */
#define PORTABLE_MAP_ARRAYS(ARRAY)                                                                                     \
    ARRAY(SUMS, ONE, C, 2, ALWAYS)         /* running sums a_r of the gates, then their remainders */                  \
    ARRAY(WEIGHTS, ONE, C, L, ALWAYS)      /* level weights of the rows */                                             \
    ARRAY(MZ, ONE, C, C, ALWAYS)                                                                                       \
    ARRAY(READ, ONE, C, K, MAPS)                                                                                       \
    ARRAY(WRITE, ONE, C, K, MAPS)                                                                                      \
    ARRAY(K_START, ONE, C, K, DELTA)

/* Those that lanes of one head may share. */
#define PORTABLE_POOL_ARRAYS(ARRAY)                                                                                    \
    ARRAY(E, HEAD, P, KV, ALWAYS)          /* the pool of level states */                                              \
    ARRAY(PLACES, ONE, M, J, MOMENTS)      /* of the states at the moments: 1 + place, 0 if there is none */           \
    ARRAY(DECAYS, HEAD, M, J, MOMENTS)     /* and their log decays */                                                  \
    ARRAY(CHUNK_DECAY, ONE, M, 1, SPREAD)  /* log decay through a chunk */

enum { PORTABLE_WEIGHTS = 32, PORTABLE_SLICES = 8 };
