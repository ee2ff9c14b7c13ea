/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The chunkwise algorithm: the passes over one panel of chunks, in order.  cl/chunk_operators.cl has the formulas.
 */
#ifndef LOGLIN_OPERATOR_CHUNKWISE_H
#define LOGLIN_OPERATOR_CHUNKWISE_H

#include "engine/tape.h"

/* What differs between the operators. */
typedef struct loglin_operator {
    void (*map)(loglin_tape *tape);  /* Z, READ and WRITE of every chunk, from QK, KK, the gates and beta */
    void (*walk)(loglin_tape *tape); /* E of all waves, from that of the first, OWN and the maps */
    void (*retreat)(loglin_tape *tape, loglin_buffer dfinal_states); /* D_E, D_E_END, D_OWN, backwards */
    void (*map_gradients)(
        loglin_tape *tape); /* from D_MZ, D_READ, D_WRITE (and D_K_START) to what gates and keys need */
} loglin_operator;

extern const loglin_operator loglin_mamba2, loglin_gated_delta;

/* The caller's buffers; absent ones have mem NULL. */
typedef struct loglin_call {
    loglin_inputs in;
    loglin_state initial, final;
    loglin_buffer o;
    loglin_buffer d_o, dfinal_states;
    loglin_gradients out;
    bool normalize;
} loglin_call;

/* Everything up to the level states at every chunk's start. */
void loglin_chunkwise_states(loglin_tape *tape, const loglin_operator *rule, const loglin_call *call);

/* Behind it: o, and the final states of sequences that end in this panel. */
void loglin_chunkwise_outputs(loglin_tape *tape, const loglin_call *call);

/*
 * Or the gradients.  At the end, D_E of the first wave, and D_V and D_WRITE of the wave before the panel (strong), are
 * what the panel before must add: `add_carried` is called when D_V and D_WRITE of this panel are ready for it.
 */
void loglin_chunkwise_gradients(loglin_tape *tape, const loglin_operator *rule, const loglin_call *call,
                                void (*add_carried)(loglin_tape *tape, void *context), void *context);

#endif
