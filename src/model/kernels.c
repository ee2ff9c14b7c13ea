/* SPDX-License-Identifier: Apache-2.0 */
/* Building cl/model.cl for a model: its shapes are build options. */
#include "model/session.h"

#include "engine/lanes.h"
#include "engine/step.h"
#include "runtime/device.h"
#include "runtime/program.h"
#include "runtime/status.h"
#include <stdio.h>
#include <string.h>

/* A CPU takes a token through layers of at most so many bytes in one launch: a core reads one in the time of a few. */
enum { SMALL_LAYER_BYTES = 2 << 20 };

/* Work-items of a group of cl/token.cl on a GPU, and groups on a compute unit. */
enum { TOKEN_LOCAL = 512, TOKEN_GROUPS = 1 };
#define TOKEN_OPTIONS " -cl-nv-maxrregcount=128 -DIN_FLIGHT=16" /* so many registers leave room for such a group */

enum { GPU_LOCAL = 128, CPU_LOCAL = 256, GROUPS_PER_CORE = 1, TILE_OF_8 = 6, TILE_OF_16 = 16, GPU_TILE = 1 };

static const char *const kernel_names[] = {
#define LOGLIN_MODEL_KERNEL_NAME(name) #name,
    LOGLIN_MODEL_KERNELS(LOGLIN_MODEL_KERNEL_NAME) "token",
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

/* Work-items of a group: a power of two, on a GPU at least 32. */
static size_t group_items(const loglin_device *device) {
    size_t items = device->is_cpu ? 1 : GPU_LOCAL;
    while (items > device->info.max_work_group_size) {
        items /= 2;
    }
    return items;
}

static bool is_nvidia(const loglin_device *device) {
    return strstr(device->info.vendor, "NVIDIA") != NULL;
}

/* Intel's pvc is compiled for 32 work-items a thread: the products would spill. */
static const char *register_options(const loglin_device *device) {
    const bool is_pvc = !device->is_cpu && strstr(device->info.vendor, "Intel") != NULL &&
                        device->info.local_memory >= LOGLIN_PVC_LOCAL_BYTES;
    return is_pvc ? " " LOGLIN_INTEL_REGISTERS : "";
}

static size_t layer_bytes(const loglin_model *model) {
    size_t bytes = 0;
    for (size_t id = 0; id < LOGLIN_LAYER_MATRICES; id++) {
        bytes += model->matrices[id].next;
    }
    return bytes;
}

/* Are there buffers of all layers? */
static bool has_whole_buffers(const loglin_session *session) {
    const loglin_model *model = session->model;
    for (size_t id = 0; id < LOGLIN_LAYER_MATRICES; id++) {
        if (model->matrices[id].all == NULL) {
            return false;
        }
    }
    return model->vectors.all != NULL && session->all_tails.all != NULL && session->all_values.all != NULL &&
           session->all_positions.all != NULL && (model->lm.op != LOGLIN_MAMBA2 || session->all_log_decays.all != NULL);
}

/* Groups that take a token through all layers in one launch; 0: many launches.  `items` make a group of cl/step.cl. */
static size_t token_groups(const loglin_session *session, size_t items) {
    const loglin_device *device = session->model->device;
    if (!has_whole_buffers(session)) {
        return 0;
    }
    if (device->is_cpu) {
        return layer_bytes(session->model) <= SMALL_LAYER_BYTES ? 1 : 0;
    }
    const bool meets = is_nvidia(device) && session->sequences == 1 && items == TOKEN_LOCAL;
    return meets ? TOKEN_GROUPS * (size_t)device->info.compute_units : 0;
}

/* The options of cl/token.cl. */
static void write_token_options(const loglin_session *session, char *options, size_t capacity) {
    const loglin_model *model = session->model;
    const loglin_lm *lm = &model->lm;
    const size_t *at = model->vector_at;
    const size_t element = model->matrix_dtype == LOGLIN_F32 ? 4 : 2;
    (void)snprintf(
        options, capacity,
        " -DNORM_AT=%zu -DIN_BIAS_AT=%zu -DCONV_WEIGHT_AT=%zu -DCONV_BIAS_AT=%zu -DDT_BIAS_AT=%zu -DA_AT=%zu "
        "-DLEVEL_WEIGHT_AT=%zu -DD_AT=%zu -DOUT_NORM_AT=%zu -DOUT_BIAS_AT=%zu -DMLP_NORM_AT=%zu -DVECTORS_NEXT=%zu "
        "-DIN_NEXT=%zu -DOUT_NEXT=%zu -DGATE_UP_NEXT=%zu -DDOWN_NEXT=%zu -DTAILS_NEXT=%zu -DVALUES_NEXT=%zu "
        "-DLOG_DECAY_NEXT=%zu -DPOSITION_NEXT=%zu -DX_STRIDE=%zu -DP_STRIDE=%zu -DY_STRIDE=%zu -DLOGITS_STRIDE=%zu",
        at[LOGLIN_VECTOR_MIXER_NORM], at[LOGLIN_VECTOR_IN_BIAS], at[LOGLIN_VECTOR_CONV], at[LOGLIN_VECTOR_CONV_BIAS],
        at[LOGLIN_VECTOR_DT_BIAS], at[LOGLIN_VECTOR_A], at[LOGLIN_VECTOR_LEVEL], at[LOGLIN_VECTOR_D],
        at[LOGLIN_VECTOR_OUT_NORM], at[LOGLIN_VECTOR_OUT_BIAS], at[LOGLIN_VECTOR_MLP_NORM],
        model->vectors.next / sizeof(float), model->matrices[LOGLIN_MATRIX_IN].next / element,
        model->matrices[LOGLIN_MATRIX_OUT].next / element, model->matrices[LOGLIN_MATRIX_GATE_UP].next / element,
        model->matrices[LOGLIN_MATRIX_DOWN].next / element, session->all_tails.next / sizeof(float),
        session->all_values.next / sizeof(float), session->all_log_decays.next / sizeof(float),
        session->all_positions.next / sizeof(cl_int), loglin_whole_blocks(lm->hidden),
        loglin_whole_blocks(model->layout.columns), loglin_whole_blocks(lm->intermediate),
        loglin_whole_blocks(lm->vocabulary));
}

/* Tokens of a tile of registers; a GPU has no use for the kernels that take one. */
static int tile_tokens(const loglin_device *device) {
    return !device->is_cpu ? GPU_TILE : vector_width(device) >= 16 ? TILE_OF_16 : TILE_OF_8;
}

loglin_status loglin_session_build(loglin_session *session, const loglin_problem *step) {
    static const char *const files[] = {"common.cl", "model.cl", NULL};
    static const char *const token_files[] = {"common.cl", "step.cl", "model.cl", "token.cl", NULL};
    const loglin_model *model = session->model;
    loglin_model_program *program = &session->program;
    const loglin_lm *lm = &model->lm;
    const loglin_lm_layout *in = &model->layout;
    const loglin_device *device = model->device;
    char of_step[LOGLIN_STEP_OPTIONS];
    char of_token[1536] = "";
    char options[3072];
    program->token_groups = token_groups(
        session, loglin_stepper_options(device, step, TOKEN_LOCAL, device->info.compute_units / 2, of_step));
    program->local = program->token_groups > 1 ? TOKEN_LOCAL : group_items(device);
    program->shuffles = !device->is_cpu && is_nvidia(device);
    program->mix = device->is_cpu && mixes_in_blocks(model) ? LOGLIN_BLOCK : 1;
    program->groups = device->is_cpu ? device->info.compute_units * (size_t)GROUPS_PER_CORE : 0;
    if (program->token_groups > 0) {
        write_token_options(session, of_token, sizeof of_token);
    }
    (void)snprintf(
        options, sizeof options,
        "-DSTORAGE=%d -DMATRIX=%d -DLOCAL=%zu -DTILE=%d -DHEADS=%zu -DDIM_V=%zu -DLEVELS=%zu -DTAPS=%zu "
        "-DCHANNELS=%zu -DQ_AT=%zu -DK_AT=%zu -DV_AT=%zu -DQK_CHANNELS=%zu -DZ_AT=%zu -DCONV_AT=%zu "
        "-DDT_AT=%zu -DBETA_AT=%zu -DLEVEL_AT=%zu -DSEGMENT=%zu -DDELTA=%d -DGATE_FIRST=%d -DSHUFFLES=%d %s%s%s",
        (int)model->options.dtype, (int)model->matrix_dtype, program->local, tile_tokens(device), lm->heads, lm->dim_v,
        lm->levels, lm->conv_kernel, lm->conv_channels, in->q, in->k, in->v, lm->groups * lm->dim_k, in->z, in->conv,
        in->dt, in->beta, in->level, lm->segment, lm->op == LOGLIN_GATED_DELTA, lm->gate_first, program->shuffles,
        program->token_groups > 0 ? of_step : "", of_token,
        program->token_groups > 1 ? TOKEN_OPTIONS : register_options(device));
    return loglin_program_get(model->device, program->token_groups > 0 ? token_files : files, options,
                              &program->program);
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
