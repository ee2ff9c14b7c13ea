/* SPDX-License-Identifier: Apache-2.0 */
/* loglin forward: one call of loglin_forward. */
#include "cli/commands.h"

#include "cli/report.h"

typedef struct forward_call {
    loglin_inputs in;
    loglin_state initial, final;
    bool has_initial;
    loglin_buffer o, workspace;
} forward_call;

static loglin_status call_forward(loglin_cli_run *run, void *data) {
    const forward_call *call = data;
    return loglin_forward(run->session.plan, &call->in, call->has_initial ? &call->initial : NULL, call->o,
                          &call->final, call->workspace, run->session.queue, 0, NULL, NULL);
}

static loglin_cli_status execute(loglin_cli_run *run) {
    const loglin_cli_problem *problem = &run->problem;
    loglin_cli_session *session = &run->session;
    forward_call call = {0};
    loglin_cli_output *o;
    RETURN_IF_FAILED(loglin_cli_session_open(session, run->arguments.device, &problem->description));
    RETURN_IF_FAILED(loglin_cli_add_output(run, "o", problem->v->dtype, 4, problem->v->shape, &o));
    RETURN_IF_FAILED(loglin_cli_add_state_outputs(run, &call.final));
    RETURN_IF_FAILED(loglin_cli_check_references(run));
    RETURN_IF_FAILED(loglin_cli_upload_inputs(run, &call.in, &call.initial, &call.has_initial));
    run->workspace = loglin_workspace_size(session->plan, LOGLIN_FORWARD);
    RETURN_IF_FAILED(loglin_cli_create_buffer(session, "the workspace", run->workspace, &call.workspace));
    call.o = o->buffer;
    RETURN_IF_FAILED(loglin_cli_time_calls(run, call_forward, &call));
    return loglin_cli_read_outputs(run);
}

loglin_cli_status loglin_cli_forward(int argc, char **argv) {
    static const loglin_cli_operation operation = {
        .summary = "Computes the output o and the final states of a file's sequences.",
        .files = "IN     q, k [B,T,G,K], v [B,T,H,V], level_scales [B,T,H,L]; optionally g [B,T,H],\n"
                 "       beta [B,T,H] (selects the gated delta rule), cu_seqlens [N+1],\n"
                 "       initial_states [N,H,L,K,V] with position [N]\n"
                 "OUT    o [B,T,H,V], final_states [N,H,L,K,V], position [N]",
        .phase = LOGLIN_FORWARD,
        .execute = execute,
    };
    return loglin_cli_run_operation(argc, argv, &operation);
}
