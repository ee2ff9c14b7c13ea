/* SPDX-License-Identifier: Apache-2.0 */
/* The subcommands.  argv[0] is the subcommand's own name. */
#ifndef LOGLIN_CLI_COMMANDS_H
#define LOGLIN_CLI_COMMANDS_H

#include "cli/status.h"

loglin_cli_status loglin_cli_devices(int argc, char **argv);
loglin_cli_status loglin_cli_forward(int argc, char **argv);
loglin_cli_status loglin_cli_backward(int argc, char **argv);
loglin_cli_status loglin_cli_decode(int argc, char **argv);
loglin_cli_status loglin_cli_logits(int argc, char **argv);
loglin_cli_status loglin_cli_generate(int argc, char **argv);
loglin_cli_status loglin_cli_perplexity(int argc, char **argv);
loglin_cli_status loglin_cli_bench(int argc, char **argv);
loglin_cli_status loglin_cli_tune(int argc, char **argv);

#endif
