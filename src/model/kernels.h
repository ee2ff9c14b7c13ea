/* SPDX-License-Identifier: Apache-2.0 */
/* The kernels of cl/model.cl, built for a model, and the launches that are made of them. */
#ifndef LOGLIN_MODEL_KERNELS_H
#define LOGLIN_MODEL_KERNELS_H

#include "model/model.h"

#include "../../cl/nvidia_token_layout.cl"

/* X(name): the kernels of cl/model.cl. */
#define LOGLIN_MODEL_KERNELS(X)                                                                                        \
    X(embed)                                                                                                           \
    X(prepare_norm)                                                                                                    \
    X(prepare_gated)                                                                                                   \
    X(norm_product)                                                                                                    \
    X(gated_product)                                                                                                   \
    X(norm_swiglu)                                                                                                     \
    X(add_product)                                                                                                     \
    X(product_tiles)                                                                                                   \
    X(swiglu_tiles)                                                                                                    \
    X(unpack_rows)                                                                                                     \
    X(begin_product)                                                                                                   \
    X(finish_swiglu)                                                                                                   \
    X(attention_inputs)                                                                                                \
    X(conv_tail)

#define LOGLIN_MODEL_KERNEL_ENUM(name) LOGLIN_KERNEL_##name,
typedef enum loglin_model_kernel {
    LOGLIN_MODEL_KERNELS(LOGLIN_MODEL_KERNEL_ENUM) LOGLIN_MODEL_KERNEL_COUNT,
    LOGLIN_KERNEL_token =
        LOGLIN_MODEL_KERNEL_COUNT, /* of cl/token.cl or cl/nvidia_token.cl, where the program has it */
} loglin_model_kernel;

/* How the kernels were built. */
typedef struct loglin_model_program {
    cl_program program;  /* of the device */
    size_t local;        /* LOCAL: work-items of a group */
    size_t mix;          /* MIX: channels of a work-item */
    size_t groups;       /* that share the blocks of a product with one vector; 0: a group for each block */
    bool shuffles;       /* SHUFFLES: a warp's work-items exchange values */
    size_t token_groups; /* that share a step of one launch, more than one on NVIDIA; 0: a step takes many launches */
} loglin_model_program;

/* Can cl/nvidia_token.cl take a token through such a model, with weights of bfloat16? */
bool loglin_token_takes(const loglin_lm *lm);

/* For a session that has its states; `step` is the attention's problem in its steps, with the defaults in place. */
loglin_status loglin_session_build(loglin_session *session, const loglin_problem *step);

/* A new kernel object, with arguments of its own. */
loglin_status loglin_model_create_kernel(const loglin_model_program *program, loglin_model_kernel id,
                                         cl_kernel *kernel);

/* An argument of a kernel: a value, or, where `value` is NULL, so many bytes of local memory. */
typedef struct loglin_kernel_argument {
    size_t size;
    const void *value;
} loglin_kernel_argument;

#define KERNEL_ARGUMENT(variable)                                                                                      \
    { sizeof(variable), &(variable) }
/* A model's arrays of all layers and of its end, as a kernel that takes a token through all layers has them. */
#define KERNEL_MODEL_ARRAYS(model)                                                                                     \
    KERNEL_ARGUMENT((model)->vectors.all), KERNEL_ARGUMENT((model)->matrices[LOGLIN_MATRIX_IN].all),                   \
        KERNEL_ARGUMENT((model)->matrices[LOGLIN_MATRIX_OUT].all),                                                     \
        KERNEL_ARGUMENT((model)->matrices[LOGLIN_MATRIX_GATE_UP].all),                                                 \
        KERNEL_ARGUMENT((model)->matrices[LOGLIN_MATRIX_DOWN].all), KERNEL_ARGUMENT((model)->final_norm),              \
        KERNEL_ARGUMENT((model)->head)
#define KERNEL_LOCAL(bytes)                                                                                            \
    { (bytes), NULL }

loglin_status loglin_set_arguments(cl_kernel kernel, const loglin_kernel_argument *arguments, size_t count);

/* A kernel with all its arguments, and its range; a local size of 0 leaves it to the driver. */
typedef struct loglin_launch {
    cl_kernel kernel;
    size_t global[2], local[2];
} loglin_launch;

/* The range of x times y work-items that may be grouped in any way. */
void loglin_set_free_range(const loglin_model_program *program, size_t x, size_t y, loglin_launch *launch);

loglin_status loglin_launch_enqueue(const loglin_launch *launch, cl_command_queue queue);

#endif
