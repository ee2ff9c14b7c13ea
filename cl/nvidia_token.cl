/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One token of one sequence through the whole model in one launch, on NVIDIA's GPUs from sm_90 on; weights of bfloat16.
 *
 * There are as many work-groups as are on the device together, and each takes its share of every product.  What it will
 * need of the weights is known from the start, so one item of a warp of its own has them copied into a ring of local
 * memory, always some slots ahead: over norms, attention and waiting the memory is not idle.  LOCAL items compute, and
 * NT_HELPERS others read and write the states.  A layer is five phases:
 *
 *     in          p = W norm(x) + bias
 *     attention   convolution, gates, level states: runs of 8 columns ("octets") of a head's v; y = gated o, not yet scaled
 *     out         parts = W norm(y)           a product that adds to x makes parts, each over some of the columns: so there
 *     gate, up    y = silu(W x') * (W' x')    is work for all groups.  Who has a row of x adds up its parts, and tells what
 *     down        parts = W y                 x is then
 *
 * What a group makes it tells the others: each float goes to memory with a number, which is the layer's and launch's, in one
 * store, and who needs it looks until the number is there.  No float is told anew before all have it, since every group has
 * something to tell in every phase, and what it tells follows from all that the phase before told.
 *
 * A product is made by matrix units: a vector's float is three bfloat16 parts, three columns of a matrix, as in
 * nvidia_product.cl.
 *
 * Where arrays hold what: token_layout.cl.  On a CPU token.cl does this.
 */

/* ---- All of it ---- */

/* Has this group's slice of an array fetched into the cache. */
INLINE void fetch_slice(const __global void *array, uint bytes) {
    const uint slice = (bytes / get_num_groups(0) + 31) & ~15u, at = get_group_id(0) * slice;
    if (at < bytes) {
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;"
                     :
                     : "l"((const __global char *)array + at), "r"(min(slice, bytes - at))
                     : "memory");
    }
}

/* What a layer's attention reads beside its levels. */
INLINE void fetch_for_attention(a_layer at) {
    fetch_slice(vectors_of(at), VECTORS_NEXT * 4);
    fetch_slice(tail_of(at), TAILS_NEXT * 4);
    if (!DELTA) {
        fetch_slice(log_decay_of(at), LOG_DECAY_NEXT * 4);
    }
}

typedef struct weight_arrays {
    const __global matrix *in, *out, *gate_up, *down, *head;
} weight_arrays;

/* All weights in turn, and what else a layer reads. */
INLINE void copy_weights(ring *to, uint layers, weight_arrays of, const __local share *shares, __local token_arrays *all) {
#pragma unroll 1
    for (uint step = 0; step <= PRODUCTS * layers; step++) {
        const uint product = product_of(step, layers);
        const a_layer at = {all, step / PRODUCTS}, next = {all, step / PRODUCTS + 1};
        if (product == OUT && next.index < layers) {
            fetch_for_attention(next);
        }
        copy_share(to,
                   product == IN        ? of.in + at.index * (ulong)IN_NEXT
                   : product == OUT     ? of.out + at.index * (ulong)OUT_NEXT
                   : product == GATE_UP ? of.gate_up + at.index * (ulong)GATE_UP_NEXT
                   : product == DOWN    ? of.down + at.index * (ulong)DOWN_NEXT
                                        : of.head,
                   shares + product);
    }
}

/*
 * words: what groups tell each other, zeros before the first launch.  number: of the first layer; it and as many behind it as
 * there are layers no launch had.  logits: and behind them, in vain or not.
 */
__kernel __attribute__((reqd_work_group_size(LOCAL + NT_HELPERS + NT_COPIERS, 1, 1))) void
token(int id, const __global matrix *embedding, __global told *words, uint number, uint layers,
      const __global float *vectors, const __global matrix *in, const __global matrix *out,
      const __global matrix *gate_up, const __global matrix *down, const __global float *final_norm,
      const __global matrix *head, __global float *logits, float eps, float dt_min, float dt_max, __global float *tails,
      __global float *values, __global float *log_decay, __global int *position) {
    __local uint4 slots[SLOTS * (NT_SLOT_BYTES / 16)] __attribute__((aligned(128)));
    __local arrivals full[SLOTS], empty[SLOTS];
    __local split prepared;
    __local float partials[NT_PARTIALS], squares_of_warps[WARPS], squares[OCTETS], scales[SEGMENTS];
    __local float own_x[HIDDEN / NT_PARTS];
    __local attention_area area;
    __local token_arrays all;
    __local share shares[PRODUCTS + 1];
    const uint me = get_local_id(0);
    ring weights = {slots, full, empty, 0};
    if (me < SLOTS) {
        arrivals_start(&full[me], 1);
        arrivals_start(&empty[me], NT_CREW);
    }
    if (me == 0) {
        all.words = words;
        all.vectors = vectors;
        all.tails = tails;
        all.values = values;
        all.log_decay = log_decay;
        all.position = position;
        all.in_vain = (__global uint *)(logits + LOGITS_STRIDE);
        all.dt_min = dt_min;
        all.dt_max = dt_max;
        all.number = number;
        all.most_looks = MOST_LOOKS;
        arrivals_start(&area.begun, HELPER_WARPS);
        arrivals_start(&area.attended, 1);
        arrivals_start(&area.heard, 1);
        arrivals_start(&area.kept, HELPER_WARPS);
    }
    if (me <= PRODUCTS) {
        shares[me] = take_share(me);
    }
    arrivals_publish();
    barrier(CLK_LOCAL_MEM_FENCE);
    const uint now = (uint)*position; /* tokens before this one */
    if (me >= LOCAL + NT_HELPERS) {
        if (me == LOCAL + NT_HELPERS) {
            const weight_arrays of = {in, out, gate_up, down, head};
            copy_weights(&weights, layers, of, shares, &all);
        }
        return;
    }
    if (me >= LOCAL) {
        help(layers, now, &all, &area);
        return;
    }
    {
        const a_layer at = {&all, 0};
#pragma unroll 1
        for (uint row = own_begin(HIDDEN) + me; row < own_end(HIDDEN); row += LOCAL) {
            own_x[row - own_begin(HIDDEN)] = load1(embedding + ((ulong)((uint)id / 16) * HIDDEN + row) * 16 + (uint)id % 16);
            tell(at, X_AT + row, own_x[row - own_begin(HIDDEN)]);
        }
    }
    /* One loop over all products: so the code is small enough for the cache of instructions. */
#pragma unroll 1
    for (uint step = 0; step <= PRODUCTS * layers; step++) {
        const uint product = product_of(step, layers);
        const a_layer at = {&all, step / PRODUCTS}, next = {&all, step / PRODUCTS + 1};
        const __local share *of = shares + product;
        if (product == OUT) {
            attend(at, now, &area, partials);
        }
        if (product == OUT || product == DOWN) {
            prepare_y(at, product == OUT, of, eps, squares, scales, &prepared, &area);
        } else {
            prepare_x(at, product == GATE_UP ? MIDDLE_X_AT : X_AT,
                      product == GATE_UP ? vectors_of(at) + MLP_NORM_AT
                      : product == IN    ? vectors_of(at) + NORM_AT
                                         : final_norm,
                      eps, &prepared, squares_of_warps);
        }
        multiply(&weights, of, product, at, logits, &prepared, partials, &area.kept);
        if (product == OUT || product == DOWN) {
            sum_parts(at, product == OUT ? OUT_PARTS_AT : DOWN_PARTS_AT, product == OUT ? OUT_PARTS : DOWN_PARTS,
                      product == OUT ? at : next, product == OUT ? MIDDLE_X_AT : X_AT, own_x);
        }
    }
    ITEMS_BARRIER();
    if (me == 0 && all.most_looks == 1) {
        *all.in_vain = 1;
    }
}
