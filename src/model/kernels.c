/* SPDX-License-Identifier: Apache-2.0 */
/* Building cl/model.cl for a model: its shapes are build options. */
#include "model/kernels.h"

#include "runtime/device.h"
#include "runtime/program.h"
#include "runtime/status.h"
#include <stdio.h>

enum { GPU_LOCAL = 128, CPU_LOCAL = 256, GROUPS_PER_CORE = 1, TILE_OF_8 = 6, TILE_OF_16 = 12, GPU_TILE = 1 };

static const char *const kernel_names[] = {
#define LOGLIN_MODEL_KERNEL_NAME(name) #name,
    LOGLIN_MODEL_KERNELS(LOGLIN_MODEL_KERNEL_NAME)
#undef LOGLIN_MODEL_KERNEL_NAME
};

/* The floats of the device's vectors, as its compiler uses them. */
static cl_uint vector_width(const loglin_device *device) {
    cl_uint width = 0;
    (void)clGetDeviceInfo(device->id, CL_DEVICE_NATIVE_VECTOR_WIDTH_FLOAT, sizeof width, &width, NULL);
    return width;
}

static bool mixes_in_blocks(const loglin_model *model) {
    const loglin_lm_layout *in = &model->layout;
    return (in->q | in->k | in->v | model->lm.conv_channels | model->lm.dim_v) % LOGLIN_BLOCK == 0;
}

/* Work-items of a group: a power of two. */
static size_t group_items(const loglin_device *device) {
    size_t items = device->is_cpu ? 1 : GPU_LOCAL;
    while (items > device->info.max_work_group_size) {
        items /= 2;
    }
    return items;
}

/* Tokens of a tile of registers; a GPU has no use for the kernels that take one. */
static int tile_tokens(const loglin_device *device) {
    return !device->is_cpu ? GPU_TILE : vector_width(device) >= 16 ? TILE_OF_16 : TILE_OF_8;
}

loglin_status loglin_model_build(const loglin_model *model, loglin_model_program *program) {
    static const char *const files[] = {"common.cl", "model.cl", NULL};
    const loglin_lm *lm = &model->lm;
    const loglin_lm_layout *in = &model->layout;
    const loglin_device *device = model->device;
    const bool wide = vector_width(device) >= 16;
    char options[640];
    program->local = group_items(device);
    program->blocks = device->is_cpu && wide ? 2 : 1;
    program->mix = device->is_cpu && mixes_in_blocks(model) ? LOGLIN_BLOCK : 1;
    program->groups = device->is_cpu ? device->info.compute_units * (size_t)GROUPS_PER_CORE : 0;
    (void)snprintf(
        options, sizeof options,
        "-DSTORAGE=%d -DMATRIX=%d -DLOCAL=%zu -DTILE=%d -DBLOCKS=%d -DHEADS=%zu -DDIM_V=%zu -DLEVELS=%zu -DTAPS=%zu "
        "-DCHANNELS=%zu -DQ_AT=%zu -DK_AT=%zu -DV_AT=%zu -DQK_CHANNELS=%zu -DZ_AT=%zu -DCONV_AT=%zu "
        "-DDT_AT=%zu -DBETA_AT=%zu -DLEVEL_AT=%zu -DSEGMENT=%zu -DDELTA=%d -DGATE_FIRST=%d",
        (int)model->options.dtype, (int)model->matrix_dtype, program->local, tile_tokens(device), wide ? 2 : 1,
        lm->heads, lm->dim_v, lm->levels, lm->conv_kernel, lm->conv_channels, in->q, in->k, in->v,
        lm->groups * lm->dim_k, in->z, in->conv, in->dt, in->beta, in->level, lm->segment, lm->op == LOGLIN_GATED_DELTA,
        lm->gate_first);
    return loglin_program_get(model->device, files, options, &program->program);
}

loglin_status loglin_model_create_kernel(const loglin_model_program *program, loglin_model_kernel id,
                                         cl_kernel *kernel) {
    cl_int code = CL_SUCCESS;
    *kernel = clCreateKernel(program->program, kernel_names[id], &code);
    if (code != CL_SUCCESS) {
        *kernel = NULL;
        return loglin_fail(code, "clCreateKernel(%s): %s", kernel_names[id], loglin_strerror(code));
    }
    return LOGLIN_OK;
}

loglin_status loglin_set_arguments(cl_kernel kernel, const loglin_kernel_argument *arguments, size_t count) {
    for (size_t i = 0; i < count; i++) {
        RETURN_IF_CL_ERROR(clSetKernelArg(kernel, (cl_uint)i, arguments[i].size, arguments[i].value));
    }
    return LOGLIN_OK;
}

void loglin_set_free_range(const loglin_model_program *program, size_t x, size_t y, loglin_launch *launch) {
    size_t local = 0; /* the driver chooses */
    if (program->local == 1) {
        /* PoCL takes 0.1 ms to choose. */
        for (local = x < CPU_LOCAL ? x : CPU_LOCAL; x % local != 0; local--) {
        }
    }
    launch->global[0] = x;
    launch->global[1] = y;
    launch->local[0] = local;
    launch->local[1] = 1;
}

loglin_status loglin_launch_enqueue(const loglin_launch *launch, cl_command_queue queue) {
    RETURN_IF_CL_ERROR(clEnqueueNDRangeKernel(queue, launch->kernel, 2, NULL, launch->global,
                                              launch->local[0] != 0 ? launch->local : NULL, 0, NULL, NULL));
    return LOGLIN_OK;
}
