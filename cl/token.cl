/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One token of every sequence through the whole model in one launch: the kernels of model.cl and step.cl one behind the
 * other.
 *
 *     CPU      one work-item takes a sequence through a small model: nothing waits and no thread is woken, which
 *              costs more than the work.  Dimension 0 is 1, dimension 1 the sequence.
 *     NVIDIA   as many groups as are on the device together share the work; between two phases they meet.
 *
 * Each array holds all layers, *_NEXT elements from one to the next.  Offsets and strides are constants; the columns
 * are arguments, because PoCL makes a loop with a constant count several times slower.
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

#if LOCAL == 1
#define MEET(meeting) (void)(meeting)
#else
/*
 * Waits until every group has come here; what one wrote before, all read behind it.  meeting: arrivals, meetings held,
 * and whether a group has waited in vain, after which nobody waits any more.
 */
#define MOST_POLLS (1u << 22)
void meet(__global uint *meeting) {
    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
    if (get_local_id(0) == 0) {
        uint failed, held, now, arrived;
        asm volatile("fence.acq_rel.gpu;" : : : "memory");
        asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(failed) : "l"(meeting + 2) : "memory");
        asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(held) : "l"(meeting + 1) : "memory");
        asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(arrived) : "l"(meeting) : "memory");
        if (arrived == get_num_groups(0) - 1) {
            asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" : : "l"(meeting), "r"(0) : "memory");
            asm volatile("st.release.gpu.global.u32 [%0], %1;" : : "l"(meeting + 1), "r"(held + 1) : "memory");
        } else if (!failed) {
            uint polls = 0;
            do {
                asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(meeting + 1) : "memory");
            } while (now == held && ++polls < MOST_POLLS);
            if (now == held) {
                asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" : : "l"(meeting + 2), "r"(1) : "memory");
            }
        }
        asm volatile("fence.acq_rel.gpu;" : : : "memory");
    }
    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
}
#define MEET(meeting) meet(meeting)

#endif

__kernel void token(const __global int *ids, const __global matrix *embedding, __global float *x, __global float *p,
                    __global float *y, uint layers, const __global float *vectors, const __global matrix *in,
                    const __global matrix *out, const __global matrix *gate_up, const __global matrix *down,
                    const __global float *final_norm, const __global matrix *head, const __global float *zeros,
                    __global float *logits, uint hidden, uint inner, uint intermediate, uint slice, float eps,
                    float dt_min, float dt_max, __global float *tails, __global storage *q, __global storage *k,
                    __global storage *v, __global float *conv_v, __global float *g, __global float *level_scales,
                    __global float *beta, __global float *values, __global float *log_decay, __global int *position,
                    __global storage *o, __global uint *meeting, __local float *prepared, __local float *scratch) {
    __local step_scratch of_step;
    const uint sequence = get_group_id(1);
    const uint id = (uint)ids[sequence];
    for (uint column = get_global_id(0); column < hidden; column += get_global_size(0)) {
        x[sequence * X_STRIDE + column] = load1(embedding + ((ulong)(id / 16) * hidden + column) * 16 + id % 16);
    }
    MEET(meeting);
    for (uint layer = 0; layer < layers; layer++) {
        norm_product(x, 0, X_STRIDE, vectors, NORM_AT, eps, in, P_STRIDE / 16, hidden, vectors, IN_BIAS_AT, p, P_STRIDE,
                     prepared, scratch);
        MEET(meeting);
        attention_inputs(p, P_STRIDE, 1, tails, 0, vectors, CONV_WEIGHT_AT, CONV_BIAS_AT, DT_BIAS_AT, A_AT,
                         LEVEL_WEIGHT_AT, dt_min, dt_max, q, k, v, conv_v, g, level_scales, beta);
        MEET(meeting);
        for (uint block = get_group_id(0); block < STEP_HEADS * STEP_BLOCKS; block += get_num_groups(0)) {
            GROUP_BARRIER();
            step_columns(sequence * STEP_HEADS * STEP_BLOCKS + block, q, 0, k, 0, v, 0, g, 0, level_scales, 0, beta, 0,
                         values, 0, log_decay, 0, position, 0, o, 0, 1.0f, &of_step);
        }
        MEET(meeting);
        if (get_group_id(0) == get_num_groups(0) - 1) {
            step_advance_sequence(sequence, g, 0, log_decay, 0, position, 0);
        }
        gated_product(o, p, P_STRIDE, conv_v, vectors, D_AT, OUT_NORM_AT, OUT_BIAS_AT, eps, out, X_STRIDE / 16, inner,
                      x, X_STRIDE, prepared, scratch);
        MEET(meeting);
        norm_swiglu(x, X_STRIDE, vectors, MLP_NORM_AT, eps, gate_up, Y_STRIDE / 16, hidden, y, Y_STRIDE, prepared,
                    scratch);
        MEET(meeting);
        add_product(y, Y_STRIDE, down, X_STRIDE / 16, intermediate, slice, x, X_STRIDE, prepared, scratch);
        MEET(meeting);
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
#if LOCAL == 1
    if (meeting) { /* the host waits here, see src/model/shared_step.c */
        mem_fence(CLK_GLOBAL_MEM_FENCE);
        atomic_inc((volatile __global uint *)meeting);
    }
#endif
}
