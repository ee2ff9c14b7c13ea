/* SPDX-License-Identifier: Apache-2.0 */
/* Sampling: a sort by logit, a cut by top-k and top-p, one random number. */
#include "cli/sampling.h"

#include <math.h>
#include <stdlib.h>

/* SplitMix64; a number from 0 to below 1. */
static double next_random(uint64_t *state) {
    *state += 0x9e3779b97f4a7c15U;
    uint64_t z = *state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
    return (double)((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

static int32_t most_probable(const float *logits, size_t count) {
    size_t best = 0;
    for (size_t i = 1; i < count; ++i) {
        best = logits[i] > logits[best] ? i : best;
    }
    return (int32_t)best;
}

/* A heap whose root is the least probable of the `count` ids in it. */
static void sift_down(int32_t *heap, size_t count, size_t at, const float *logits) {
    for (;;) {
        size_t least = at;
        for (size_t child = 2 * at + 1; child <= 2 * at + 2 && child < count; ++child) {
            least = logits[heap[child]] < logits[heap[least]] ? child : least;
        }
        if (least == at) {
            return;
        }
        const int32_t id = heap[at];
        heap[at] = heap[least];
        heap[least] = id;
        at = least;
    }
}

/* Sorts ids by falling logit. */
static void sort_ids(int32_t *order, size_t count, const float *logits) {
    for (size_t at = count / 2; at-- > 0;) {
        sift_down(order, count, at, logits);
    }
    for (size_t last = count; last-- > 1;) {
        const int32_t id = order[0];
        order[0] = order[last];
        order[last] = id;
        sift_down(order, last, 0, logits);
    }
}

int32_t loglin_cli_sample(loglin_cli_sampling *sampling, float *logits, size_t count, int32_t *order) {
    if (sampling->temperature == 0) {
        return most_probable(logits, count);
    }
    for (size_t i = 0; i < count; ++i) {
        order[i] = (int32_t)i;
    }
    sort_ids(order, count, logits);
    const size_t among = sampling->top_k > 0 && sampling->top_k < count ? sampling->top_k : count;
    const double best = (double)logits[order[0]];
    double sum = 0;
    for (size_t i = 0; i < among; ++i) {
        const double weight = exp(((double)logits[order[i]] - best) / sampling->temperature);
        logits[order[i]] = (float)weight;
        sum += (double)logits[order[i]];
    }
    const double target = next_random(&sampling->random);
    double kept = 0;
    size_t candidates = 0;
    while (candidates < among && kept < sampling->top_p * sum) {
        kept += (double)logits[order[candidates++]];
    }
    double below = 0;
    for (size_t i = 0; i < candidates; ++i) {
        below += (double)logits[order[i]];
        if (target * kept < below) {
            return order[i];
        }
    }
    return order[0];
}
