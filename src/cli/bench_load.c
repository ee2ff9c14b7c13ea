/* SPDX-License-Identifier: Apache-2.0 */
/* A problem that is timed: its plan, sets of random inputs, and its outputs. */
#include "cli/bench.h"

#include "tensorfile/dtype.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { POOL = 1 << 20 }; /* different random numbers of a tensor; what is larger repeats them in pieces */

/* ---- Shapes ------------------------------------------------------------------------------------------------------ */

static const char *const tensor_names[LOGLIN_BENCH_TENSORS] = {
    "q",  "k",  "v",  "g",  "level_scales",  "beta",  "do",       "o",
    "dq", "dk", "dv", "dg", "dlevel_scales", "dbeta", "workspace"};

size_t loglin_cli_bench_width(const loglin_problem *problem, loglin_bench_tensor tensor) {
    switch (tensor) {
    case LOGLIN_BENCH_Q:
    case LOGLIN_BENCH_K:
    case LOGLIN_BENCH_DQ:
    case LOGLIN_BENCH_DK:
        return problem->groups * problem->dim_k;
    case LOGLIN_BENCH_V:
    case LOGLIN_BENCH_O:
    case LOGLIN_BENCH_D_O:
    case LOGLIN_BENCH_DV:
        return problem->heads * problem->dim_v;
    case LOGLIN_BENCH_LEVEL_SCALES:
    case LOGLIN_BENCH_DLEVEL_SCALES:
        return problem->heads * problem->levels;
    default:
        return problem->heads;
    }
}

loglin_dtype loglin_cli_bench_dtype(const loglin_problem *problem, loglin_bench_tensor tensor) {
    switch (tensor) {
    case LOGLIN_BENCH_G:
    case LOGLIN_BENCH_DG:
        return LOGLIN_F32;
    case LOGLIN_BENCH_LEVEL_SCALES:
    case LOGLIN_BENCH_BETA:
    case LOGLIN_BENCH_DLEVEL_SCALES:
    case LOGLIN_BENCH_DBETA:
        return problem->weight_dtype;
    default:
        return problem->dtype;
    }
}

size_t loglin_cli_bench_element(const loglin_problem *problem, loglin_bench_tensor tensor) {
    return loglin_cli_bench_dtype(problem, tensor) == LOGLIN_F32 ? 4 : 2;
}

static bool is_used(const loglin_problem *problem, loglin_bench_tensor tensor) {
    const bool delta = problem->op == LOGLIN_GATED_DELTA;
    const bool backward = (problem->phases & LOGLIN_BACKWARD) != 0;
    switch (tensor) {
    case LOGLIN_BENCH_BETA:
        return delta;
    case LOGLIN_BENCH_DBETA:
        return delta && backward;
    case LOGLIN_BENCH_D_O:
    case LOGLIN_BENCH_DQ:
    case LOGLIN_BENCH_DK:
    case LOGLIN_BENCH_DV:
    case LOGLIN_BENCH_DG:
    case LOGLIN_BENCH_DLEVEL_SCALES:
        return backward;
    default:
        return true;
    }
}

size_t loglin_cli_bench_workspace(const loglin_plan *plan) {
    const size_t forward = loglin_workspace_size(plan, LOGLIN_FORWARD);
    const size_t backward = loglin_workspace_size(plan, LOGLIN_BACKWARD);
    return forward > backward ? forward : backward;
}

static size_t bytes_of(const loglin_bench_load *load, loglin_bench_tensor tensor) {
    const loglin_problem *p = &load->problem;
    if (tensor == LOGLIN_BENCH_WORKSPACE) {
        return loglin_cli_bench_workspace(load->plan);
    }
    return p->batch * p->length * loglin_cli_bench_width(p, tensor) * loglin_cli_bench_element(p, tensor);
}

/* ---- Buffers ----------------------------------------------------------------------------------------------------- */

static loglin_status create_buffer(loglin_bench_machine *machine, const char *name, size_t size, cl_mem *mem) {
    cl_int code;
    *mem = clCreateBuffer(machine->context, CL_MEM_READ_WRITE, size > 0 ? size : 1, NULL, &code);
    if (code != CL_SUCCESS) {
        return loglin_cli_bench_fail(machine, code, "%s: no buffer of %zu bytes (at most %llu): %s", name, size,
                                     (unsigned long long)machine->info.max_allocation, loglin_strerror(code));
    }
    return LOGLIN_OK;
}

/* Fills a buffer of `size` bytes from random places of a pool of `pool_size`. */
static loglin_status copy_pieces(loglin_bench_machine *machine, cl_mem pool, size_t pool_size, cl_mem mem,
                                 size_t size) {
    const size_t piece = pool_size / 2;
    const size_t places = piece / 64;
    for (size_t at = 0; at < size; at += piece) {
        const size_t part = size - at < piece ? size - at : piece;
        const size_t from = (size_t)loglin_cli_bench_random(machine, 0.0F, (float)places) * 64;
        const cl_int code = clEnqueueCopyBuffer(machine->queue, pool, mem, from, at, part, 0, NULL, NULL);
        if (code != CL_SUCCESS) {
            return loglin_cli_bench_fail(machine, code, "clEnqueueCopyBuffer: %s", loglin_strerror(code));
        }
    }
    return LOGLIN_OK;
}

loglin_status loglin_cli_bench_random_buffer(loglin_bench_machine *machine, const char *name, loglin_dtype dtype,
                                             size_t count, float low, float high, cl_mem *mem) {
    static const loglin_tensor_dtype types[] = {LOGLIN_TENSOR_F32, LOGLIN_TENSOR_F16, LOGLIN_TENSOR_BF16};
    const size_t element = loglin_tensor_dtype_size(types[dtype]);
    const size_t drawn = count < POOL ? count : POOL;
    float *numbers = malloc(drawn * sizeof *numbers);
    void *stored = malloc(drawn * element);
    cl_mem pool = NULL;
    if (numbers == NULL || stored == NULL) {
        free(numbers);
        free(stored);
        return loglin_cli_bench_fail(machine, LOGLIN_OUT_OF_MEMORY, "%s: out of memory", name);
    }
    loglin_status status = create_buffer(machine, name, count * element, mem);
    if (status == LOGLIN_OK) {
        for (size_t i = 0; i < drawn; ++i) {
            numbers[i] = loglin_cli_bench_random(machine, low, high);
        }
        loglin_tensor_from_float(types[dtype], numbers, drawn, stored);
        if (drawn < count) {
            status = create_buffer(machine, name, drawn * element, &pool);
        }
    }
    if (status == LOGLIN_OK) {
        const cl_int code = clEnqueueWriteBuffer(machine->queue, pool != NULL ? pool : *mem, CL_TRUE, 0,
                                                 drawn * element, stored, 0, NULL, NULL);
        status = code == CL_SUCCESS ? LOGLIN_OK
                                    : loglin_cli_bench_fail(machine, code, "%s: %s", name, loglin_strerror(code));
    }
    if (status == LOGLIN_OK && pool != NULL) {
        status = copy_pieces(machine, pool, drawn * element, *mem, count * element);
    }
    if (pool != NULL) {
        (void)clReleaseMemObject(pool);
    }
    free(numbers);
    free(stored);
    return status;
}

/*
 * The keys have lengths of about 1, so that the delta rule's transitions contract; the gates are so small that at the end
 * of a sequence its beginning still counts.
 */
static loglin_status make_input(loglin_bench_machine *machine, const loglin_problem *p, loglin_bench_tensor tensor,
                                cl_mem *mem) {
    const float key = sqrtf(3.0F / (float)p->dim_k);
    const float gate = -fminf(0.1F, 16.0F / (float)p->length);
    float low = -1.7F;
    float high = 1.7F;
    if (tensor == LOGLIN_BENCH_K) {
        low = -key;
        high = key;
    } else if (tensor == LOGLIN_BENCH_G) {
        low = gate;
        high = 0.0F;
    } else if (tensor == LOGLIN_BENCH_LEVEL_SCALES || tensor == LOGLIN_BENCH_BETA) {
        low = 0.0F;
        high = 1.0F;
    }
    return loglin_cli_bench_random_buffer(machine, tensor_names[tensor], loglin_cli_bench_dtype(p, tensor),
                                          p->batch * p->length * loglin_cli_bench_width(p, tensor), low, high, mem);
}

/* As many sets of inputs as fit, at most LOGLIN_BENCH_MAX_SETS. */
static loglin_status choose_sets(loglin_bench_machine *machine, loglin_bench_load *load) {
    size_t inputs = 0;
    size_t outputs = 0;
    for (loglin_bench_tensor t = 0; t < LOGLIN_BENCH_TENSORS; ++t) {
        if (is_used(&load->problem, t)) {
            *(t < LOGLIN_BENCH_INPUTS ? &inputs : &outputs) += bytes_of(load, t);
        }
    }
    for (load->sets = LOGLIN_BENCH_MAX_SETS; load->sets > 0; --load->sets) {
        if (load->sets * inputs + outputs <= machine->info.global_memory) {
            return LOGLIN_OK;
        }
    }
    return loglin_cli_bench_fail(machine, CL_MEM_OBJECT_ALLOCATION_FAILURE,
                                 "inputs, outputs and workspace are %zu bytes, the device has %llu", inputs + outputs,
                                 (unsigned long long)machine->info.global_memory);
}

static loglin_status make_buffers(loglin_bench_machine *machine, loglin_bench_load *load) {
    for (loglin_bench_tensor t = 0; t < LOGLIN_BENCH_TENSORS; ++t) {
        const size_t sets = t < LOGLIN_BENCH_INPUTS ? load->sets : 1;
        for (size_t set = 0; is_used(&load->problem, t) && set < sets; ++set) {
            cl_mem *mem = &load->mem[set][t];
            const loglin_status status = t < LOGLIN_BENCH_INPUTS
                                             ? make_input(machine, &load->problem, t, mem)
                                             : create_buffer(machine, tensor_names[t], bytes_of(load, t), mem);
            if (status != LOGLIN_OK) {
                return status;
            }
        }
    }
    return LOGLIN_OK;
}

/* The engine's name as the plan's description gives it. */
static void read_engine(loglin_bench_load *load) {
    static const char before[] = ", engine ";
    const char *name = strstr(load->plan_text, before);
    if (name != NULL) {
        name += sizeof before - 1;
        (void)snprintf(load->engine, sizeof load->engine, "%.*s", (int)strcspn(name, " ,"), name);
    }
}

loglin_status loglin_cli_bench_load_open(loglin_bench_machine *machine, const loglin_problem *problem,
                                         loglin_bench_load *load) {
    load->problem = *problem;
    loglin_status status = loglin_plan_create(machine->device, problem, &load->plan);
    if (status != LOGLIN_OK) {
        return loglin_cli_bench_fail(machine, status, "%s", loglin_last_error());
    }
    (void)loglin_plan_describe(load->plan, load->plan_text, sizeof load->plan_text);
    read_engine(load);
    status = choose_sets(machine, load);
    return status == LOGLIN_OK ? make_buffers(machine, load) : status;
}

void loglin_cli_bench_load_close(loglin_bench_load *load) {
    for (size_t set = 0; set < LOGLIN_BENCH_MAX_SETS; ++set) {
        for (size_t t = 0; t < LOGLIN_BENCH_TENSORS; ++t) {
            if (load->mem[set][t] != NULL) {
                (void)clReleaseMemObject(load->mem[set][t]);
            }
        }
    }
    loglin_plan_destroy(load->plan);
    *load = (loglin_bench_load){0};
}

/* ---- Calls ------------------------------------------------------------------------------------------------------- */

static loglin_status enqueue(loglin_bench_machine *machine, void *data, cl_event *done) {
    loglin_bench_load *load = data;
    const bool backward = (load->problem.phases & LOGLIN_BACKWARD) != 0;
    load->last = (load->last + 1) % load->sets;
    cl_mem *in_mem = load->mem[load->last];
    cl_mem *out_mem = load->mem[0];
    const loglin_inputs in = {.q.mem = in_mem[LOGLIN_BENCH_Q],
                              .k.mem = in_mem[LOGLIN_BENCH_K],
                              .v.mem = in_mem[LOGLIN_BENCH_V],
                              .g.mem = in_mem[LOGLIN_BENCH_G],
                              .level_scales.mem = in_mem[LOGLIN_BENCH_LEVEL_SCALES],
                              .beta.mem = in_mem[LOGLIN_BENCH_BETA]};
    const loglin_gradients out = {.dq.mem = out_mem[LOGLIN_BENCH_DQ],
                                  .dk.mem = out_mem[LOGLIN_BENCH_DK],
                                  .dv.mem = out_mem[LOGLIN_BENCH_DV],
                                  .dg.mem = out_mem[LOGLIN_BENCH_DG],
                                  .dlevel_scales.mem = out_mem[LOGLIN_BENCH_DLEVEL_SCALES],
                                  .dbeta.mem = out_mem[LOGLIN_BENCH_DBETA]};
    const loglin_buffer o = {.mem = out_mem[LOGLIN_BENCH_O]};
    const loglin_buffer d_o = {.mem = in_mem[LOGLIN_BENCH_D_O]};
    const loglin_buffer workspace = {.mem = out_mem[LOGLIN_BENCH_WORKSPACE]};
    loglin_status status =
        loglin_forward(load->plan, &in, NULL, o, NULL, workspace, machine->queue, 0, NULL, backward ? NULL : done);
    if (status == LOGLIN_OK && backward) {
        status = loglin_backward(load->plan, &in, NULL, d_o, (loglin_buffer){0}, &out, workspace, machine->queue, 0,
                                 NULL, done);
    }
    return status == LOGLIN_OK ? LOGLIN_OK : loglin_cli_bench_fail(machine, status, "%s", loglin_last_error());
}

loglin_status loglin_cli_bench_load_run(loglin_bench_machine *machine, void *data, double *ms) {
    return loglin_cli_bench_time(machine, enqueue, data, ms);
}
