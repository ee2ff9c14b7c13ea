/* SPDX-License-Identifier: Apache-2.0 */
/* Building cl/model.cl for a model: its shapes are build options. */
#include "model/session.h"

#include "engine/lanes.h"
#include "engine/nvidia.h"
#include "engine/step.h"
#include "runtime/device.h"
#include "runtime/program.h"
#include "runtime/status.h"
#include <stdio.h>
#include <string.h>

/* A CPU takes a token through layers of at most so many bytes in one launch: a core reads one in the time of a few. */
enum { SMALL_LAYER_BYTES = 2 << 20 };

/* cl/nvidia_token.cl: work-items of a group that compute, so many registers leave room for all; and its limits. */
enum { TOKEN_LOCAL = 384, TOKEN_MOST_K = 256, MOST_COLUMNS = NT_MOST_COLUMNS };
#define TOKEN_OPTIONS " -cl-nv-maxrregcount=120"

/* Local memory of such a group: slots of a ring, and so many levels of 8 columns if they can be had for some slots. */
enum {
    TOKEN_SLACK = 1024,
    PARTIALS = NT_PARTIALS,
    SLOT_BYTES = NT_SLOT_BYTES,
    LEAST_SLOTS = 6,
    MOST_SLOTS = 8,
    WANTED_LEVELS = 15
};

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

static size_t min_size(size_t a, size_t b) {
    return a < b ? a : b;
}

/* Columns of a part in cl/nvidia_token.cl: whole tiles of 16. */
static size_t part_width(size_t columns) {
    return loglin_whole_blocks((columns + NT_PARTS - 1) / NT_PARTS);
}

static size_t count_parts(size_t columns) {
    return (columns + part_width(columns) - 1) / part_width(columns);
}

static size_t widest_part(const loglin_lm *lm) {
    return part_width(lm->inner > lm->intermediate ? lm->inner : lm->intermediate);
}

/* Floats of a product's input that a group of it keeps: x, or two parts of another one's columns. */
static size_t token_input(const loglin_lm *lm) {
    const size_t two_parts = 2 * widest_part(lm);
    return lm->hidden > two_parts ? lm->hidden : two_parts;
}

/* Its local memory: slots of the ring, and levels of 8 columns that are there before they are needed. */
typedef struct token_memory {
    size_t slots, levels;
} token_memory;

static token_memory share_token_memory(const loglin_lm *lm) {
    const size_t heads_of_key = lm->heads / lm->groups;
    const size_t spanned = (NT_OCTETS - 2) / (heads_of_key * lm->dim_v / 8) + 2;
    const size_t inputs = min_size(spanned, lm->groups) * 2 * lm->dim_k + (size_t)NT_OCTETS * 8;
    const size_t attention = 2 * inputs + NT_OCTETS * (18 * lm->levels + 8);
    const size_t of_product = lm->hidden / NT_PARTS + lm->inner / 8 + lm->inner / lm->segment + PARTIALS;
    const size_t level_bytes = (lm->dim_k + 1) * 8 * sizeof(float);
    const size_t others = 6 * (token_input(lm) + 16) + sizeof(float) * (attention + of_product) + TOKEN_SLACK;
    token_memory memory = {MOST_SLOTS + 1, 0};
    do {
        memory.slots--;
        const size_t used = others + memory.slots * SLOT_BYTES;
        memory.levels = used < NV_MOST_LOCAL ? (NV_MOST_LOCAL - used) / level_bytes : 0;
    } while (memory.slots > LEAST_SLOTS && memory.levels < WANTED_LEVELS);
    memory.levels = min_size(memory.levels, NT_OCTETS * lm->levels);
    return memory;
}

/* Its groups: all that the device takes at once, if there is something to tell for each of them in every phase. */
static size_t streaming_groups(const loglin_model *model) {
    const loglin_lm *lm = &model->lm;
    const size_t rows = loglin_whole_blocks(lm->hidden) / LOGLIN_BLOCK;
    size_t groups = model->device->info.compute_units;
    groups = min_size(groups, loglin_whole_blocks(model->layout.columns) / LOGLIN_BLOCK);
    groups = min_size(groups, lm->inner / 8);
    groups = min_size(groups, rows * count_parts(lm->inner));
    groups = min_size(groups, rows * count_parts(lm->intermediate));
    return min_size(groups, lm->intermediate / LOGLIN_BLOCK);
}

bool loglin_token_takes(const loglin_lm *lm) {
    return (lm->hidden | lm->inner | lm->intermediate | lm->dim_k) % 16 == 0 && (lm->dim_v | lm->segment) % 8 == 0 &&
           lm->dim_k <= TOKEN_MOST_K && lm->hidden <= MOST_COLUMNS && widest_part(lm) <= MOST_COLUMNS &&
           share_token_memory(lm).levels > 0;
}

/* Does cl/nvidia_token.cl take the session's steps? */
static bool streams_weights(const loglin_session *session) {
    const loglin_model *model = session->model;
    return is_nvidia(model->device) && session->sequences == 1 && has_whole_buffers(session) &&
           model->matrix_dtype == LOGLIN_BF16 && loglin_token_takes(&model->lm) &&
           streaming_groups(model) >= NT_PARTS &&
           loglin_nvidia_probe_wgmma(model->device, LOGLIN_BF16, NV_MOST_LOCAL) == LOGLIN_OK;
}

/* Groups that take a token through all layers in one launch; 0: many launches. */
static size_t token_groups(const loglin_session *session) {
    const loglin_model *model = session->model;
    if (model->device->is_cpu) {
        return has_whole_buffers(session) && layer_bytes(model) <= SMALL_LAYER_BYTES ? 1 : 0;
    }
    return streams_weights(session) ? streaming_groups(model) : 0;
}

/* The options of cl/token.cl, and what cl/nvidia_token.cl has beside them. */
static void write_token_options(const loglin_session *session, char *options, size_t capacity) {
    const loglin_model *model = session->model;
    const loglin_lm *lm = &model->lm;
    const size_t *at = model->vector_at;
    const size_t element = model->matrix_dtype == LOGLIN_F32 ? 4 : 2;
    int size = snprintf(
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
    if (session->program.token_groups > 1 && size > 0) {
        const token_memory memory = share_token_memory(lm);
        (void)snprintf(options + size, capacity - (size_t)size,
                       " -DHIDDEN=%zu -DINTERMEDIATE=%zu -DDIM_K=%zu -DOUT_WIDTH=%zu -DDOWN_WIDTH=%zu -DPREPARED=%zu "
                       "-DSLOTS=%zu -DSTAGED=%zu -DBULK_COPIES" TOKEN_OPTIONS,
                       lm->hidden, lm->intermediate, lm->dim_k, part_width(lm->inner), part_width(lm->intermediate),
                       token_input(lm), memory.slots, memory.levels);
    }
}

/* Tokens of a tile of registers; a GPU has no use for the kernels that take one. */
static int tile_tokens(const loglin_device *device) {
    return !device->is_cpu ? GPU_TILE : vector_width(device) >= 16 ? TILE_OF_16 : TILE_OF_8;
}

loglin_status loglin_session_build(loglin_session *session, const loglin_problem *step) {
    static const char *const files[] = {"common.cl", "model.cl", NULL};
    static const char *const token_files[] = {"common.cl", "step.cl", "model.cl", "token_layout.cl", "token.cl", NULL};
    static const char *const nvidia_files[] = {"common.cl",
                                               "mma_nvidia.cl",
                                               "model.cl",
                                               "token_layout.cl",
                                               "nvidia_token_layout.cl",
                                               "nvidia_token_stream.cl",
                                               "nvidia_token_attention.cl",
                                               "nvidia_token.cl",
                                               NULL};
    const loglin_model *model = session->model;
    loglin_model_program *program = &session->program;
    const loglin_lm *lm = &model->lm;
    const loglin_lm_layout *in = &model->layout;
    const loglin_device *device = model->device;
    char of_step[LOGLIN_STEP_OPTIONS] = "";
    char of_token[2048] = "";
    char options[3584];
    program->token_groups = token_groups(session);
    program->local = program->token_groups > 1 ? TOKEN_LOCAL : group_items(device);
    program->shuffles = !device->is_cpu && is_nvidia(device);
    program->mix = device->is_cpu && mixes_in_blocks(model) ? LOGLIN_BLOCK : 1;
    program->groups = device->is_cpu ? device->info.compute_units * (size_t)GROUPS_PER_CORE : 0;
    if (program->token_groups > 0) {
        write_token_options(session, of_token, sizeof of_token);
    }
    if (program->token_groups == 1) {
        loglin_stepper_options(device, step, of_step);
    }
    (void)snprintf(
        options, sizeof options,
        "-DSTORAGE=%d -DMATRIX=%d -DLOCAL=%zu -DTILE=%d -DHEADS=%zu -DDIM_V=%zu -DLEVELS=%zu -DTAPS=%zu "
        "-DCHANNELS=%zu -DQ_AT=%zu -DK_AT=%zu -DV_AT=%zu -DQK_CHANNELS=%zu -DZ_AT=%zu -DCONV_AT=%zu "
        "-DDT_AT=%zu -DBETA_AT=%zu -DLEVEL_AT=%zu -DSEGMENT=%zu -DDELTA=%d -DGATE_FIRST=%d -DSHUFFLES=%d %s%s%s",
        (int)model->options.dtype, (int)model->matrix_dtype, program->local, tile_tokens(device), lm->heads, lm->dim_v,
        lm->levels, lm->conv_kernel, lm->conv_channels, in->q, in->k, in->v, lm->groups * lm->dim_k, in->z, in->conv,
        in->dt, in->beta, in->level, lm->segment, lm->op == LOGLIN_GATED_DELTA, lm->gate_first, program->shuffles,
        of_step, of_token, register_options(device));
    return loglin_program_get(model->device,
                              program->token_groups > 1   ? nvidia_files
                              : program->token_groups > 0 ? token_files
                                                          : files,
                              options, &program->program);
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
