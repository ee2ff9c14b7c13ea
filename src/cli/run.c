/* SPDX-License-Identifier: Apache-2.0 */
/* The order of a run, and the steps that its subcommands share. */
#include "cli/run.h"

#include "cli/report.h"
#include <stdlib.h>

loglin_cli_status loglin_cli_add_output(loglin_cli_run *run, const char *name, loglin_tensor_dtype dtype, size_t rank,
                                        const size_t *shape, loglin_cli_output **output) {
    size_t size = loglin_tensor_dtype_size(dtype);
    *output = &run->outputs[run->output_count++];
    (*output)->tensor = (loglin_tensor){.name = name, .dtype = dtype, .rank = rank};
    for (size_t i = 0; i < rank; ++i) {
        (*output)->tensor.shape[i] = shape[i];
        if (__builtin_mul_overflow(size, shape[i], &size)) {
            return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s: the size of its shape overflows", name);
        }
    }
    (*output)->tensor.size = size;
    return loglin_cli_create_buffer(&run->session, name, size, &(*output)->buffer);
}

loglin_cli_status loglin_cli_read_outputs(loglin_cli_run *run) {
    for (size_t i = 0; i < run->output_count; ++i) {
        loglin_cli_output *output = &run->outputs[i];
        output->data = malloc(output->tensor.size);
        if (output->data == NULL) {
            return loglin_cli_fail(LOGLIN_CLI_FAILED, "%s: out of memory for %zu bytes", output->tensor.name,
                                   output->tensor.size);
        }
        output->tensor.data = output->data;
        const cl_int code = clEnqueueReadBuffer(run->session.queue, output->buffer.mem, CL_TRUE, 0, output->tensor.size,
                                                output->data, 0, NULL, NULL);
        if (code != CL_SUCCESS) {
            return loglin_cli_fail_opencl(code, output->tensor.name);
        }
    }
    return LOGLIN_CLI_OK;
}

loglin_cli_status loglin_cli_upload_inputs(loglin_cli_run *run, loglin_inputs *in, loglin_state *initial,
                                           bool *has_initial) {
    const loglin_cli_problem *problem = &run->problem;
    loglin_cli_session *session = &run->session;
    *in = (loglin_inputs){0};
    *initial = (loglin_state){0};
    RETURN_IF_FAILED(loglin_cli_upload_tensor(session, problem->q, &in->q));
    RETURN_IF_FAILED(loglin_cli_upload_tensor(session, problem->k, &in->k));
    RETURN_IF_FAILED(loglin_cli_upload_tensor(session, problem->v, &in->v));
    RETURN_IF_FAILED(loglin_cli_upload_tensor(session, problem->g, &in->g));
    RETURN_IF_FAILED(loglin_cli_upload_tensor(session, problem->level_scales, &in->level_scales));
    RETURN_IF_FAILED(loglin_cli_upload_tensor(session, problem->beta, &in->beta));
    if (problem->bounds != NULL) {
        RETURN_IF_FAILED(loglin_cli_upload(session, "cu_seqlens", problem->bounds,
                                           (problem->sequences + 1) * sizeof *problem->bounds, &in->cu_seqlens));
    }
    *has_initial = problem->description.max_position > 0;
    if (*has_initial) {
        RETURN_IF_FAILED(loglin_cli_upload_tensor(session, problem->initial_states, &initial->values));
        RETURN_IF_FAILED(loglin_cli_upload(session, "position", problem->positions,
                                           problem->sequences * sizeof *problem->positions, &initial->position));
    }
    return LOGLIN_CLI_OK;
}

loglin_cli_status loglin_cli_add_state_outputs(loglin_cli_run *run, loglin_state *state) {
    const loglin_problem *sizes = &run->problem.description;
    const size_t shape[] = {run->problem.sequences, sizes->heads, sizes->levels, sizes->dim_k, sizes->dim_v};
    loglin_cli_output *values;
    loglin_cli_output *position;
    RETURN_IF_FAILED(loglin_cli_add_output(run, "final_states", LOGLIN_TENSOR_F32, 5, shape, &values));
    RETURN_IF_FAILED(loglin_cli_add_output(run, "position", LOGLIN_TENSOR_I32, 1, shape, &position));
    *state = (loglin_state){.values = values->buffer, .position = position->buffer};
    return LOGLIN_CLI_OK;
}

static loglin_cli_status time_call(loglin_cli_run *run, loglin_status (*call)(loglin_cli_run *run, void *data),
                                   void *data, double *ms) {
    const double begin = loglin_cli_now_ms();
    const loglin_status status = call(run, data);
    if (status != LOGLIN_OK) {
        return loglin_cli_fail_library(status);
    }
    RETURN_IF_FAILED(loglin_cli_finish(&run->session));
    *ms = loglin_cli_now_ms() - begin;
    return LOGLIN_CLI_OK;
}

loglin_cli_status loglin_cli_time_calls(loglin_cli_run *run, loglin_status (*call)(loglin_cli_run *run, void *data),
                                        void *data) {
    const double long_ms = 10000.0;
    RETURN_IF_FAILED(loglin_cli_finish(&run->session));
    RETURN_IF_FAILED(time_call(run, call, data, &run->first_run_ms));
    if (run->first_run_ms >= long_ms) {
        run->run_ms = run->first_run_ms;
        return LOGLIN_CLI_OK;
    }
    return time_call(run, call, data, &run->run_ms);
}

static loglin_cli_status write_outputs(const loglin_cli_run *run) {
    loglin_tensor tensors[LOGLIN_CLI_MAX_OUTPUTS];
    for (size_t i = 0; i < run->output_count; ++i) {
        tensors[i] = run->outputs[i].tensor;
    }
    loglin_tensor_error error;
    if (!loglin_safetensors_write(run->arguments.out, tensors, run->output_count, NULL, 0, &error)) {
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "%s: %s", run->arguments.out, error.text);
    }
    return LOGLIN_CLI_OK;
}

static loglin_cli_status run_all(loglin_cli_run *run) {
    loglin_tensor_error error;
    RETURN_IF_FAILED(loglin_cli_problem_read(&run->arguments, run->operation->phase, &run->problem));
    if (!loglin_safetensors_can_write(run->arguments.out, &error)) {
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "%s: %s", run->arguments.out, error.text);
    }
    RETURN_IF_FAILED(run->operation->execute(run));
    RETURN_IF_FAILED(write_outputs(run));
    return loglin_cli_report(run);
}

loglin_cli_status loglin_cli_run_operation(int argc, char **argv, const loglin_cli_operation *operation) {
    loglin_cli_run run = {.name = argv[0], .operation = operation};
    RETURN_IF_FAILED(loglin_cli_parse_arguments(argc, argv, operation->summary, operation->files, &run.arguments));
    if (run.arguments.help) {
        return LOGLIN_CLI_OK;
    }
    const loglin_cli_status status = run_all(&run);
    for (size_t i = 0; i < run.output_count; ++i) {
        free(run.outputs[i].data);
    }
    loglin_cli_session_close(&run.session);
    loglin_cli_problem_close(&run.problem);
    return status;
}
