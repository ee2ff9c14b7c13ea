/* SPDX-License-Identifier: Apache-2.0 */
/* The decode step, and the device copy that it is measured against. */
#include "cli/bench.h"

#include <stdio.h>

static loglin_status make_state(loglin_bench_machine *machine, loglin_bench_stepper *stepper) {
    const loglin_problem *p = &stepper->problem;
    const size_t size = loglin_state_size(stepper->plan);
    cl_int code;
    loglin_status status = loglin_cli_bench_random_buffer(machine, "states", LOGLIN_F32, size / 4, -1.0F, 1.0F,
                                                          &stepper->state.values.mem);
    if (status == LOGLIN_OK) { /* no decay so far */
        status = loglin_cli_bench_random_buffer(machine, "log_decay", LOGLIN_F32, p->batch * p->heads * p->levels, 0.0F,
                                                0.0F, &stepper->state.log_decay.mem);
    }
    if (status != LOGLIN_OK) {
        return status;
    }
    stepper->state.position.mem =
        clCreateBuffer(machine->context, CL_MEM_READ_WRITE, p->batch * sizeof stepper->position, NULL, &code);
    if (code != CL_SUCCESS) {
        return loglin_cli_bench_fail(machine, code, "position: %s", loglin_strerror(code));
    }
    stepper->copy_bytes = size / 2;
    status = loglin_cli_bench_random_buffer(machine, "the copy's source", LOGLIN_F32, stepper->copy_bytes / 4, 0.0F,
                                            1.0F, &stepper->copy_from);
    return status != LOGLIN_OK ? status
                               : loglin_cli_bench_random_buffer(machine, "the copy", LOGLIN_F32,
                                                                stepper->copy_bytes / 4, 0.0F, 1.0F, &stepper->copy_to);
}

static loglin_status make_token(loglin_bench_machine *machine, loglin_bench_stepper *stepper) {
    const loglin_problem *p = &stepper->problem;
    const size_t heads = p->batch * p->heads;
    const struct {
        const char *name;
        loglin_dtype dtype;
        size_t count;
        float low, high;
        cl_mem *mem;
    } arrays[] = {
        {"q", p->dtype, p->batch * p->groups * p->dim_k, -1.0F, 1.0F, &stepper->in.q.mem},
        {"k", p->dtype, p->batch * p->groups * p->dim_k, -0.1F, 0.1F, &stepper->in.k.mem},
        {"v", p->dtype, heads * p->dim_v, -1.0F, 1.0F, &stepper->in.v.mem},
        {"g", LOGLIN_F32, heads, -0.1F, 0.0F, &stepper->in.g.mem},
        {"level_scales", LOGLIN_F32, heads * p->levels, 0.0F, 1.0F, &stepper->in.level_scales.mem},
        {"o", p->dtype, heads * p->dim_v, 0.0F, 0.0F, &stepper->o.mem},
    };
    for (size_t i = 0; i < sizeof arrays / sizeof arrays[0]; ++i) {
        const loglin_status status = loglin_cli_bench_random_buffer(
            machine, arrays[i].name, arrays[i].dtype, arrays[i].count, arrays[i].low, arrays[i].high, arrays[i].mem);
        if (status != LOGLIN_OK) {
            return status;
        }
    }
    return LOGLIN_OK;
}

loglin_status loglin_cli_bench_stepper_open(loglin_bench_machine *machine, const loglin_problem *problem,
                                            int32_t position, size_t steps, loglin_bench_stepper *stepper) {
    stepper->problem = *problem;
    stepper->position = position;
    stepper->steps = steps;
    loglin_status status = loglin_plan_create(machine->device, problem, &stepper->plan);
    if (status != LOGLIN_OK) {
        return loglin_cli_bench_fail(machine, status, "%s", loglin_last_error());
    }
    (void)loglin_plan_describe(stepper->plan, stepper->plan_text, sizeof stepper->plan_text);
    status = make_token(machine, stepper);
    return status == LOGLIN_OK ? make_state(machine, stepper) : status;
}

void loglin_cli_bench_stepper_close(loglin_bench_stepper *stepper) {
    const cl_mem buffers[] = {
        stepper->in.q.mem,
        stepper->in.k.mem,
        stepper->in.v.mem,
        stepper->in.g.mem,
        stepper->in.level_scales.mem,
        stepper->o.mem,
        stepper->state.values.mem,
        stepper->state.log_decay.mem,
        stepper->state.position.mem,
        stepper->copy_from,
        stepper->copy_to,
    };
    for (size_t i = 0; i < sizeof buffers / sizeof buffers[0]; ++i) {
        if (buffers[i] != NULL) {
            (void)clReleaseMemObject(buffers[i]);
        }
    }
    loglin_plan_destroy(stepper->plan);
    *stepper = (loglin_bench_stepper){0};
}

/* Enqueues the steps; the event is that of the last. */
static loglin_status enqueue_steps(loglin_bench_machine *machine, void *data, cl_event *done) {
    const loglin_bench_stepper *stepper = data;
    for (size_t i = 0; i < stepper->steps; ++i) {
        const loglin_status status = loglin_step(stepper->plan, &stepper->in, &stepper->state, stepper->o,
                                                 machine->queue, 0, NULL, i + 1 == stepper->steps ? done : NULL);
        if (status != LOGLIN_OK) {
            return loglin_cli_bench_fail(machine, status, "%s", loglin_last_error());
        }
    }
    return LOGLIN_OK;
}

static loglin_status enqueue_copies(loglin_bench_machine *machine, void *data, cl_event *done) {
    const loglin_bench_stepper *stepper = data;
    for (size_t i = 0; i < stepper->steps; ++i) {
        const cl_int code = clEnqueueCopyBuffer(machine->queue, stepper->copy_from, stepper->copy_to, 0, 0,
                                                stepper->copy_bytes, 0, NULL, i + 1 == stepper->steps ? done : NULL);
        if (code != CL_SUCCESS) {
            return loglin_cli_bench_fail(machine, code, "clEnqueueCopyBuffer: %s", loglin_strerror(code));
        }
    }
    return LOGLIN_OK;
}

loglin_status loglin_cli_bench_stepper_run(loglin_bench_machine *machine, void *data, double *ms) {
    const loglin_bench_stepper *stepper = data;
    const cl_int code =
        clEnqueueFillBuffer(machine->queue, stepper->state.position.mem, &stepper->position, sizeof stepper->position,
                            0, stepper->problem.batch * sizeof stepper->position, 0, NULL, NULL);
    return code == CL_SUCCESS ? loglin_cli_bench_time(machine, enqueue_steps, data, ms)
                              : loglin_cli_bench_fail(machine, code, "clEnqueueFillBuffer: %s", loglin_strerror(code));
}

loglin_status loglin_cli_bench_copy_run(loglin_bench_machine *machine, void *data, double *ms) {
    return loglin_cli_bench_time(machine, enqueue_copies, data, ms);
}

double loglin_cli_bench_step_bytes(const loglin_bench_stepper *stepper) {
    const loglin_problem *p = &stepper->problem;
    size_t states = 0;
    for (size_t i = 0; i < stepper->steps; ++i) {
        for (size_t bits = (size_t)stepper->position + i - 1; bits != 0; bits &= bits - 1) {
            ++states; /* a level that exists before the step, above level 0 */
        }
        states += 3; /* level 0 read, two levels written */
    }
    return 4.0 * (double)(states * p->batch * p->heads * p->dim_k * p->dim_v);
}

double loglin_cli_bench_copy_bytes(const loglin_bench_stepper *stepper) {
    return 2.0 * (double)(stepper->steps * stepper->copy_bytes);
}
