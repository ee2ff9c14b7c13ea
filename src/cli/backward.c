/* SPDX-License-Identifier: Apache-2.0 */
/* loglin backward: one call of loglin_backward. */
#include "cli/commands.h"

#include "cli/report.h"

typedef struct backward_call {
    loglin_inputs in;
    loglin_state initial;
    bool has_initial;
    loglin_buffer d_o, dfinal_states, workspace;
    loglin_gradients out;
} backward_call;

static loglin_status call_backward(loglin_cli_run *run, void *data) {
    const backward_call *call = data;
    return loglin_backward(run->session.plan, &call->in, call->has_initial ? &call->initial : NULL, call->d_o,
                           call->dfinal_states, &call->out, call->workspace, run->session.queue, 0, NULL, NULL);
}

/* The gradient of a tensor, which has its type and shape; absent if the tensor is. */
static loglin_cli_status add_gradient(loglin_cli_run *run, const char *name, const loglin_tensor *of,
                                      loglin_buffer *buffer) {
    if (of == NULL) {
        return LOGLIN_CLI_OK;
    }
    loglin_cli_output *output;
    RETURN_IF_FAILED(loglin_cli_add_output(run, name, of->dtype, of->rank, of->shape, &output));
    *buffer = output->buffer;
    return LOGLIN_CLI_OK;
}

static loglin_cli_status add_gradients(loglin_cli_run *run, loglin_gradients *out) {
    const loglin_cli_problem *problem = &run->problem;
    RETURN_IF_FAILED(add_gradient(run, "dq", problem->q, &out->dq));
    RETURN_IF_FAILED(add_gradient(run, "dk", problem->k, &out->dk));
    RETURN_IF_FAILED(add_gradient(run, "dv", problem->v, &out->dv));
    RETURN_IF_FAILED(add_gradient(run, "dg", problem->g, &out->dg));
    RETURN_IF_FAILED(add_gradient(run, "dlevel_scales", problem->level_scales, &out->dlevel_scales));
    RETURN_IF_FAILED(add_gradient(run, "dbeta", problem->beta, &out->dbeta));
    return add_gradient(run, "dinitial_states", problem->initial_states, &out->dinitial_states);
}

static loglin_cli_status execute(loglin_cli_run *run) {
    const loglin_cli_problem *problem = &run->problem;
    loglin_cli_session *session = &run->session;
    backward_call call = {0};
    RETURN_IF_FAILED(loglin_cli_session_open(session, run->arguments.device, &problem->description));
    RETURN_IF_FAILED(add_gradients(run, &call.out));
    RETURN_IF_FAILED(loglin_cli_check_references(run));
    RETURN_IF_FAILED(loglin_cli_upload_inputs(run, &call.in, &call.initial, &call.has_initial));
    RETURN_IF_FAILED(loglin_cli_upload_tensor(session, problem->d_o, &call.d_o));
    RETURN_IF_FAILED(loglin_cli_upload_tensor(session, problem->dfinal_states, &call.dfinal_states));
    run->workspace = loglin_workspace_size(session->plan, LOGLIN_BACKWARD);
    RETURN_IF_FAILED(loglin_cli_create_buffer(session, "the workspace", run->workspace, &call.workspace));
    if (problem->initial_states != NULL && !call.has_initial) { /* at position 0 no level exists */
        RETURN_IF_FAILED(loglin_cli_write_zeros(session, "dinitial_states", problem->initial_states->size,
                                                call.out.dinitial_states));
        call.out.dinitial_states = (loglin_buffer){0};
    }
    RETURN_IF_FAILED(loglin_cli_time_calls(run, call_backward, &call));
    return loglin_cli_read_outputs(run);
}

loglin_cli_status loglin_cli_backward(int argc, char **argv) {
    static const loglin_cli_operation operation = {
        .summary = "Computes the gradients of a loss, given its gradient with respect to o.",
        .files = "IN     as for \"loglin forward\", and do [B,T,H,V]; optionally dfinal_states [N,H,L,K,V]\n"
                 "OUT    dq, dk, dv, dlevel_scales; dg, dbeta and dinitial_states where IN has g, beta and\n"
                 "       initial_states",
        .phase = LOGLIN_BACKWARD,
        .execute = execute,
    };
    return loglin_cli_run_operation(argc, argv, &operation);
}
