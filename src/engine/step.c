/* SPDX-License-Identifier: Apache-2.0 */
/* The decode step: chooses the schedule of cl/step.cl for a problem and a device, and enqueues its two kernels. */
#include "engine/step.h"

#include "plan/problem.h"
#include "runtime/device.h"
#include "runtime/program.h"
#include "runtime/status.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct loglin_stepper {
    cl_kernel step, advance;
    size_t step_items, advance_items;   /* of a work-group */
    size_t step_groups, advance_groups; /* work-groups */
    float scale;
};

/* The tunables of cl/step.cl. */
typedef struct schedule {
    size_t width, vectors, columns, lanes, rows;
    size_t advance_items;
} schedule;

static size_t min_size(size_t a, size_t b) {
    return a < b ? a : b;
}

static size_t ceil_div(size_t a, size_t b) {
    return b > 0 ? (a + b - 1) / b : 0;
}

static size_t next_power_of_two(size_t x) {
    size_t power = 1;
    while (power < x) {
        power *= 2;
    }
    return power;
}

/* Work-groups that a schedule makes of a problem. */
static size_t num_groups(const loglin_problem *problem, const schedule *tiling) {
    const size_t block = tiling->columns * tiling->vectors * tiling->width;
    return loglin_problem_sequences(problem) * problem->heads * ceil_div(problem->dim_v, block);
}

/*
 * One work-item a group.  The scalar-gated step reads whole rows, a few KiB of each level in turn; the delta rule needs
 * all rows of its columns at once and takes as many columns as stay in the first cache.
 */
static schedule cpu_schedule(const loglin_device *device, const loglin_problem *problem) {
    const size_t tile_vectors = 64; /* 4 KiB of 16 floats */
    const bool is_delta = problem->op == LOGLIN_GATED_DELTA;
    schedule tiling = {.width = 16, .columns = 1, .lanes = 1, .advance_items = 1};
    while (problem->dim_v % tiling.width != 0) {
        tiling.width /= 2;
    }
    const size_t vectors = problem->dim_v / tiling.width;
    const size_t most = is_delta ? 4 * tile_vectors / problem->dim_k : vectors;
    for (tiling.vectors = vectors; tiling.vectors > 1; --tiling.vectors) {
        if (vectors % tiling.vectors == 0 && tiling.vectors <= most &&
            num_groups(problem, &tiling) >= 2 * (size_t)device->info.compute_units) {
            break;
        }
    }
    tiling.rows = is_delta ? problem->dim_k : min_size(problem->dim_k, ceil_div(tile_vectors, tiling.vectors));
    return tiling;
}

/* One column a work-item, a cache line of columns beside each other; fewer where that leaves compute units idle. */
static schedule gpu_schedule(const loglin_device *device, const loglin_problem *problem) {
    const size_t most_columns = 32, least_columns = 8;
    const bool is_intel = strstr(device->info.vendor, "Intel") != NULL;
    const size_t most_rows = is_intel ? 8 : 16,
                 most_delta_rows = is_intel ? 8 : 32; /* without spills: scripts/vendorcheck */
    const bool is_delta = problem->op == LOGLIN_GATED_DELTA;
    size_t items = 256;
    while (items > device->info.max_work_group_size) {
        items /= 2;
    }
    schedule tiling = {.width = 1, .vectors = 1, .advance_items = items};
    tiling.columns = min_size(min_size(most_columns, items), next_power_of_two(problem->dim_v));
    while (tiling.columns > least_columns &&
           (num_groups(problem, &tiling) < device->info.compute_units ||
            (is_delta && tiling.columns * problem->dim_k > most_delta_rows * items))) {
        tiling.columns /= 2;
    }
    tiling.lanes = min_size(items / tiling.columns, next_power_of_two(problem->dim_k));
    tiling.rows = ceil_div(problem->dim_k, tiling.lanes);
    if (!is_delta) {
        tiling.rows = min_size(tiling.rows, most_rows);
    }
    return tiling;
}

static schedule choose_schedule(const loglin_device *device, const loglin_problem *problem) {
    return device->is_cpu ? cpu_schedule(device, problem) : gpu_schedule(device, problem);
}

static void write_options(const loglin_problem *problem, const schedule *tiling, char *options) {
    snprintf(options, LOGLIN_STEP_OPTIONS,
             "-DSTEP_K=%zu -DSTEP_V=%zu -DSTEP_HEADS=%zu -DSTEP_GROUPS=%zu -DSTEP_LEVELS=%zu -DSTEP_DELTA=%d"
             " -DSTRONG=%d -DSTEP_NORMALIZE=%d -DSTORAGE=%d -DWEIGHT_STORAGE=%d -DSTEP_WIDTH=%zu"
             " -DSTEP_VECTORS=%zu -DSTEP_COLUMNS=%zu -DSTEP_LANES=%zu -DSTEP_ROWS=%zu -DSTEP_ADVANCE_ITEMS=%zu",
             problem->dim_k, problem->dim_v, problem->heads, problem->groups, problem->levels,
             problem->op == LOGLIN_GATED_DELTA, problem->partition == LOGLIN_STRONG, problem->normalize_qk != 0,
             (int)problem->dtype, (int)problem->weight_dtype, tiling->width, tiling->vectors, tiling->columns,
             tiling->lanes, tiling->rows, tiling->advance_items);
}

void loglin_stepper_options(const loglin_device *device, const loglin_problem *problem, char *options) {
    const schedule tiling = choose_schedule(device, problem);
    write_options(problem, &tiling, options);
}

loglin_status loglin_stepper_create(loglin_device *device, const loglin_problem *problem, loglin_stepper **stepper) {
    static const char *const names[] = {"common.cl", "step.cl", NULL};
    const schedule tiling = choose_schedule(device, problem);
    char options[LOGLIN_STEP_OPTIONS];
    write_options(problem, &tiling, options);
    cl_program program;
    RETURN_IF_ERROR(loglin_program_get(device, names, options, &program));

    loglin_stepper *made = malloc(sizeof(*made));
    if (made == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "no memory for a stepper of %zu bytes", sizeof(*made));
    }
    *made = (loglin_stepper){
        .step_items = tiling.lanes * tiling.columns,
        .advance_items = tiling.advance_items,
        .step_groups = num_groups(problem, &tiling),
        .advance_groups = loglin_problem_sequences(problem),
        .scale = problem->scale,
    };
    cl_int code;
    made->step = clCreateKernel(program, "step_token", &code);
    if (code == CL_SUCCESS) {
        made->advance = clCreateKernel(program, "step_advance", &code);
    }
    if (code != CL_SUCCESS) {
        loglin_stepper_destroy(made);
        return loglin_fail(code, "clCreateKernel of step.cl: %s", loglin_strerror(code));
    }
    *stepper = made;
    return LOGLIN_OK;
}

void loglin_stepper_destroy(loglin_stepper *stepper) {
    if (stepper == NULL) {
        return;
    }
    if (stepper->step != NULL) {
        clReleaseKernel(stepper->step);
    }
    if (stepper->advance != NULL) {
        clReleaseKernel(stepper->advance);
    }
    free(stepper);
}

/* Sets each buffer as two arguments, memory object and element offset; an absent one is a null pointer there. */
static loglin_status set_buffers(cl_kernel kernel, const loglin_buffer *buffers, cl_uint count) {
    for (cl_uint i = 0; i < count; ++i) {
        const cl_ulong offset = buffers[i].offset;
        RETURN_IF_CL_ERROR(
            clSetKernelArg(kernel, 2 * i, sizeof(cl_mem), buffers[i].mem != NULL ? &buffers[i].mem : NULL));
        RETURN_IF_CL_ERROR(clSetKernelArg(kernel, 2 * i + 1, sizeof(offset), &offset));
    }
    return LOGLIN_OK;
}

static loglin_status set_arguments(const loglin_stepper *stepper, const loglin_inputs *in, const loglin_state *state,
                                   loglin_buffer o) {
    const loglin_buffer step[] = {
        in->q, in->k, in->v, in->g, in->level_scales, in->beta, state->values, state->log_decay, state->position, o};
    const loglin_buffer advance[] = {in->g, state->log_decay, state->position};
    const cl_uint step_count = sizeof(step) / sizeof(step[0]);
    RETURN_IF_ERROR(set_buffers(stepper->step, step, step_count));
    RETURN_IF_CL_ERROR(clSetKernelArg(stepper->step, 2 * step_count, sizeof(stepper->scale), &stepper->scale));
    return set_buffers(stepper->advance, advance, sizeof(advance) / sizeof(advance[0]));
}

loglin_status loglin_stepper_enqueue(loglin_stepper *stepper, const loglin_inputs *in, const loglin_state *state,
                                     loglin_buffer o, cl_command_queue queue, cl_uint num_wait, const cl_event *wait,
                                     cl_event *event) {
    cl_command_queue_properties properties;
    RETURN_IF_CL_ERROR(clGetCommandQueueInfo(queue, CL_QUEUE_PROPERTIES, sizeof(properties), &properties, NULL));
    RETURN_IF_ERROR(set_arguments(stepper, in, state, o));

    const bool is_ordered = (properties & CL_QUEUE_OUT_OF_ORDER_EXEC_MODE_ENABLE) == 0;
    const size_t step_size = stepper->step_groups * stepper->step_items;
    const size_t advance_size = stepper->advance_groups * stepper->advance_items;
    cl_event stepped = NULL;
    RETURN_IF_CL_ERROR(clEnqueueNDRangeKernel(queue, stepper->step, 1, NULL, &step_size, &stepper->step_items, num_wait,
                                              wait, is_ordered ? NULL : &stepped));
    const cl_int code = clEnqueueNDRangeKernel(queue, stepper->advance, 1, NULL, &advance_size, &stepper->advance_items,
                                               is_ordered ? 0 : 1, is_ordered ? NULL : &stepped, event);
    if (stepped != NULL) {
        clReleaseEvent(stepped);
    }
    if (code != CL_SUCCESS) {
        return loglin_fail(code, "clEnqueueNDRangeKernel of step_advance: %s", loglin_strerror(code));
    }
    return LOGLIN_OK;
}
