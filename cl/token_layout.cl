/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where token.cl and nvidia_token.cl find what belongs to a layer: each array holds all layers, *_NEXT elements from one to the
 * next.  Given for a model; the defaults are those of a tiny one.
 */

/* In the vectors of a layer. */
#ifndef NORM_AT
#define NORM_AT 0
#define IN_BIAS_AT 0
#define CONV_WEIGHT_AT 0
#define CONV_BIAS_AT 0
#define DT_BIAS_AT 0
#define A_AT 0
#define LEVEL_WEIGHT_AT 0
#define D_AT 0
#define OUT_NORM_AT 0
#define OUT_BIAS_AT 0
#define MLP_NORM_AT 0
#endif
/* From a layer to the next. */
#ifndef VECTORS_NEXT
#define VECTORS_NEXT 0
#define IN_NEXT 0
#define OUT_NEXT 0
#define GATE_UP_NEXT 0
#define DOWN_NEXT 0
#define TAILS_NEXT 0
#define VALUES_NEXT 0
#define LOG_DECAY_NEXT 0
#define POSITION_NEXT 0
#endif
/* From a sequence to the next: whole blocks. */
#ifndef X_STRIDE
#define X_STRIDE 16
#define P_STRIDE 16
#define Y_STRIDE 16
#define LOGITS_STRIDE 16
#endif
