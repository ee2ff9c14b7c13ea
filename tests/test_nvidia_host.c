/* SPDX-License-Identifier: Apache-2.0 */
/* What the host decides about NVIDIA's devices, on whatever device is there: stand-ins take the place of its kernels. */
#define _GNU_SOURCE /* RTLD_NEXT */
#include "support_criterion.h"
#include "support_limits.h"

#include "engine/nvidia.h"
#include "model/kernels.h"

#include <dlfcn.h>
#include <string.h>

/* ---- The trial run ----------------------------------------------------------------------------------------------- */

#define HEAD                                                                                                           \
    "__kernel void nvidia_probe(const __global ushort *a, const __global ushort *b, __global float *products,\n"       \
    "                           __global uint *faults) {\n"
/* a times b, both of bfloat16; with one product or one fault that is wrong. */
#define STAND_IN(error, fault)                                                                                         \
    HEAD "    for (uint i = get_local_id(0); i < 4096; i += 128) {\n"                                                  \
         "        float sum = get_group_id(0) == 255 && i == 4095 ? " error " : 0.0f;\n"                               \
         "        for (uint k = 0; k < 64; k++) {\n"                                                                   \
         "            sum += as_float((uint)a[i / 64 * 64 + k] << 16) * as_float((uint)b[k * 64 + i % 64] << 16);\n"   \
         "        }\n"                                                                                                 \
         "        products[get_group_id(0) * 4096 + i] = sum;\n"                                                       \
         "    }\n"                                                                                                     \
         "    faults[get_global_id(0)] = get_global_id(0) == 32767 ? " fault " : 0;\n"                                 \
         "}\n"

/* A driver that gives the outputs the memory of those before: what these held. */
CL_API_ENTRY cl_int CL_API_CALL clSetKernelArg(cl_kernel kernel, cl_uint index, size_t size, const void *value) {
    enum { FIRST_OUTPUT = 2, OUTPUTS = 2 };
    static cl_mem before[OUTPUTS];
    static __typeof__(&clSetKernelArg) next;
    *(void **)&next = dlsym(RTLD_NEXT, "clSetKernelArg");
    if (index >= FIRST_OUTPUT && index < FIRST_OUTPUT + OUTPUTS) {
        const cl_mem now = *(const cl_mem *)value;
        cl_mem *kept = &before[index - FIRST_OUTPUT];
        size_t bytes = 0;
        support_require(clGetMemObjectInfo(now, CL_MEM_SIZE, sizeof bytes, &bytes, NULL), "clGetMemObjectInfo");
        if (*kept != NULL) {
            const cl_command_queue queue = support_open()->queue;
            support_require(clEnqueueCopyBuffer(queue, *kept, now, 0, 0, bytes, 0, NULL, NULL), "clEnqueueCopyBuffer");
            support_require(clFinish(queue), "clFinish");
            (void)clReleaseMemObject(*kept);
        }
        (void)clRetainMemObject(now);
        *kept = now;
    }
    return next(kernel, index, size, value);
}

static const char *stand_in;

static char *take_stand_in(const char *source) {
    (void)source;
    char *text = support_alloc(strlen(stand_in) + 1, 1);
    strcpy(text, stand_in);
    return text;
}

static loglin_status probe(const char *kernel, size_t local_bytes) {
    stand_in = kernel;
    support_edit_sources(take_stand_in);
    return loglin_nvidia_probe(support_open()->device, LOGLIN_BF16, local_bytes);
}

Test(nvidia_host, the_trial_run_takes_right_products_alone) {
    cr_expect_eq(probe(STAND_IN("1.0f", "0"), 5 << 15), LOGLIN_UNSUPPORTED);
    cr_expect_eq(probe(STAND_IN("0.0f", "1"), 4 << 15), LOGLIN_UNSUPPORTED);
    cr_expect_eq(probe(STAND_IN("0.0f", "0"), 1 << 15), LOGLIN_OK, "%s", loglin_last_error());
}

/* Not even where memory holds what was right before. */
Test(nvidia_host, the_trial_run_does_not_take_a_kernel_that_writes_nothing) {
    cr_expect_eq(probe(STAND_IN("0.0f", "0"), 1 << 15), LOGLIN_OK, "%s", loglin_last_error());
    cr_expect_eq(probe(HEAD "}\n", 2 << 15), LOGLIN_UNSUPPORTED);
}

Test(nvidia_host, the_trial_run_is_remembered) {
    cr_expect_eq(probe(STAND_IN("0.0f", "0"), 2 << 15), LOGLIN_OK, "%s", loglin_last_error());
    cr_expect_eq(probe(HEAD "}\n", 4 << 15), LOGLIN_UNSUPPORTED);
    const size_t launches = support_launches("nvidia_probe", 0);
    cr_expect_eq(probe(HEAD "}\n", 1 << 15), LOGLIN_OK);
    cr_expect_eq(probe(STAND_IN("0.0f", "0"), 5 << 15), LOGLIN_UNSUPPORTED);
    cr_expect_eq(support_launches("nvidia_probe", 0), launches);
}

/* ---- A step of one launch ---------------------------------------------------------------------------------------- */

/* The blocks that a group multiplies together would be none where one alone takes more than half of their slots. */
Test(nvidia_host, a_token_is_not_taken_through_parts_that_are_too_wide) {
    const size_t hidden = 4096, widest = (size_t)NT_PARTS * NT_MOST_COLUMNS;
    loglin_lm lm = {.op = LOGLIN_MAMBA2,
                    .hidden = hidden,
                    .intermediate = widest,
                    .heads = hidden / 64,
                    .groups = 1,
                    .dim_k = 128,
                    .dim_v = 64,
                    .levels = 15,
                    .inner = hidden,
                    .segment = hidden};
    cr_expect(loglin_token_takes(&lm));
    lm.intermediate = widest + 16;
    cr_expect_not(loglin_token_takes(&lm));
}
