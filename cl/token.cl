/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One token of every sequence through the whole model in one launch on a CPU: the kernels of model.cl and step.cl one
 * behind the other.  One work-item takes a sequence through a small model: nothing waits and no thread is woken, which
 * costs more than the work.  Dimension 0 is 1, dimension 1 the sequence.  On NVIDIA's GPUs see nvidia_token.cl.
 *
 * Offsets and strides are constants, see token_layout.cl; the columns are arguments, because PoCL makes a loop with a constant
 * count several times slower.
 */

/* A token through the layers; see the kernel. */
void take_token(const __global int *ids, const __global matrix *embedding, __global float *x, __global float *p,
                __global float *y, uint layers, const __global float *vectors, const __global matrix *in,
                const __global matrix *out, const __global matrix *gate_up, const __global matrix *down,
                const __global float *final_norm, const __global matrix *head, const __global float *zeros,
                __global float *logits, uint hidden, uint inner, uint intermediate, uint slice, float eps, float dt_min,
                float dt_max, __global float *tails, __global storage *q, __global storage *k, __global storage *v,
                __global float *conv_v, __global float *g, __global float *level_scales, __global float *beta,
                __global float *values, __global float *log_decay, __global int *position, __global storage *o,
                __local step_scratch *of_step, __local float *prepared, __local float *scratch) {
    const uint sequence = get_group_id(1);
    const uint id = (uint)ids[sequence];
    for (uint column = 0; column < hidden; column++) {
        x[sequence * X_STRIDE + column] = load1(embedding + ((ulong)(id / 16) * hidden + column) * 16 + id % 16);
    }
    for (uint layer = 0; layer < layers; layer++) {
        norm_product(x, 0, X_STRIDE, vectors, NORM_AT, eps, in, P_STRIDE / 16, hidden, vectors, IN_BIAS_AT, p, P_STRIDE,
                     prepared, scratch);
        attention_inputs(p, P_STRIDE, 1, tails, 0, vectors, CONV_WEIGHT_AT, CONV_BIAS_AT, DT_BIAS_AT, A_AT,
                         LEVEL_WEIGHT_AT, dt_min, dt_max, q, k, v, conv_v, g, level_scales, beta);
        for (uint block = 0; block < STEP_HEADS * STEP_BLOCKS; block++) {
            step_columns(sequence * STEP_HEADS * STEP_BLOCKS + block, q, 0, k, 0, v, 0, g, 0, level_scales, 0, beta, 0,
                         values, 0, log_decay, 0, position, 0, o, 0, 1.0f, of_step);
        }
        step_advance_sequence(sequence, g, 0, log_decay, 0, position, 0);
        gated_product(o, p, P_STRIDE, conv_v, vectors, D_AT, OUT_NORM_AT, OUT_BIAS_AT, eps, out, X_STRIDE / 16, inner,
                      x, X_STRIDE, prepared, scratch);
        norm_swiglu(x, X_STRIDE, vectors, MLP_NORM_AT, eps, gate_up, Y_STRIDE / 16, hidden, y, Y_STRIDE, prepared,
                    scratch);
        add_product(y, Y_STRIDE, down, X_STRIDE / 16, intermediate, slice, x, X_STRIDE, prepared, scratch);
        vectors += VECTORS_NEXT;
        in += IN_NEXT;
        out += OUT_NEXT;
        gate_up += GATE_UP_NEXT;
        down += DOWN_NEXT;
        tails += TAILS_NEXT;
        values += VALUES_NEXT;
        log_decay = log_decay ? log_decay + LOG_DECAY_NEXT : log_decay;
        position += POSITION_NEXT;
    }
    norm_product(x, 0, X_STRIDE, final_norm, 0, eps, head, LOGITS_STRIDE / 16, hidden, zeros, 0, logits, LOGITS_STRIDE,
                 prepared, scratch);
}

/*
 * What the host and a kernel whose memory it shares tell each other, see src/model/shared_step.c: sequences that are
 * through; the number of the token that the host asks for; and how often a lone sequence's kernel looks for the next.
 */
typedef struct shared_step {
    uint arrived, asked, looks;
} shared_step;

/* Has the host asked for the token behind `number`?  Else this kernel takes none any more. */
int is_asked_again(volatile __global shared_step *shared, uint number) {
    for (uint look = 0; look < shared->looks; look++) {
        const uint asked = shared->asked;
        if (asked != number) {
            mem_fence(CLK_GLOBAL_MEM_FENCE);
            return asked == number + 1;
        }
    }
    return atomic_cmpxchg(&shared->asked, number, number - 1) == number + 1;
}

__kernel void token(const __global int *ids, const __global matrix *embedding, __global float *x, __global float *p,
                    __global float *y, uint layers, const __global float *vectors, const __global matrix *in,
                    const __global matrix *out, const __global matrix *gate_up, const __global matrix *down,
                    const __global float *final_norm, const __global matrix *head, const __global float *zeros,
                    __global float *logits, uint hidden, uint inner, uint intermediate, uint slice, float eps,
                    float dt_min, float dt_max, __global float *tails, __global storage *q, __global storage *k,
                    __global storage *v, __global float *conv_v, __global float *g, __global float *level_scales,
                    __global float *beta, __global float *values, __global float *log_decay, __global int *position,
                    __global storage *o, volatile __global shared_step *shared, __local float *prepared,
                    __local float *scratch) {
    __local step_scratch of_step;
    uint number = shared ? shared->asked : 0;
    bool goes_on;
    do {
        take_token(ids, embedding, x, p, y, layers, vectors, in, out, gate_up, down, final_norm, head, zeros, logits,
                   hidden, inner, intermediate, slice, eps, dt_min, dt_max, tails, q, k, v, conv_v, g, level_scales,
                   beta, values, log_decay, position, o, &of_step, prepared, scratch);
        goes_on = false;
        if (shared) {
            mem_fence(CLK_GLOBAL_MEM_FENCE);
            atomic_inc(&shared->arrived);
            goes_on = get_num_groups(1) == 1 && is_asked_again(shared, number++);
        }
    } while (goes_on);
}
