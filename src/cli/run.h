/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What forward, backward and decode have in common: arguments, input, device, [the computation], output, check, report.
 * A subcommand supplies the part in brackets.
 */
#ifndef LOGLIN_CLI_RUN_H
#define LOGLIN_CLI_RUN_H

#include "cli/arguments.h"
#include "cli/problem.h"
#include "cli/session.h"

enum { LOGLIN_CLI_MAX_OUTPUTS = 8 };

/* A tensor of the output file: on the device, and after loglin_cli_read_outputs in data, too. */
typedef struct loglin_cli_output {
    loglin_tensor tensor; /* its data is that below */
    loglin_buffer buffer;
    void *data;
} loglin_cli_output;

typedef struct loglin_cli_run loglin_cli_run;

typedef struct loglin_cli_operation {
    const char *summary, *files; /* of the help text */
    loglin_phase phase;
    loglin_cli_status (*execute)(loglin_cli_run *run); /* opens the session, fills in outputs and times */
} loglin_cli_operation;

struct loglin_cli_run {
    const char *name;
    const loglin_cli_operation *operation;
    loglin_cli_arguments arguments;
    loglin_cli_problem problem;
    loglin_cli_session session;
    loglin_cli_output outputs[LOGLIN_CLI_MAX_OUTPUTS];
    size_t output_count;
    size_t workspace;    /* bytes */
    double first_run_ms; /* with what the driver compiles at the first launch: of the whole, or of the first step */
    double run_ms;       /* without it: of the whole, or of the other steps */
    size_t steps;        /* timed by run_ms; 0 if it is one call */
};

/* A subcommand from its command line to its exit status. */
loglin_cli_status loglin_cli_run_operation(int argc, char **argv, const loglin_cli_operation *operation);

/* Adds an output; *output is valid until the run ends. */
loglin_cli_status loglin_cli_add_output(loglin_cli_run *run, const char *name, loglin_tensor_dtype dtype, size_t rank,
                                        const size_t *shape, loglin_cli_output **output);

/* Waits for the device and copies all outputs to the host. */
loglin_cli_status loglin_cli_read_outputs(loglin_cli_run *run);

/* Uploads what forward and backward read.  Initial states that all stand at position 0 are as good as absent. */
loglin_cli_status loglin_cli_upload_inputs(loglin_cli_run *run, loglin_inputs *in, loglin_state *initial,
                                           bool *has_initial);

/* Adds final_states and position, for the states after the last token. */
loglin_cli_status loglin_cli_add_state_outputs(loglin_cli_run *run, loglin_state *state);

/* Runs a call of the library twice and times both; once if that takes so long that compilation does not matter. */
loglin_cli_status loglin_cli_time_calls(loglin_cli_run *run, loglin_status (*call)(loglin_cli_run *run, void *data),
                                        void *data);

#endif
