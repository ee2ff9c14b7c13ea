/* SPDX-License-Identifier: Apache-2.0 */
/* The end of a run: outputs against references, and what is printed. */
#ifndef LOGLIN_CLI_REPORT_H
#define LOGLIN_CLI_REPORT_H

#include "cli/run.h"

/* Before the run: with --check, that references are there and have the shapes of the outputs. */
loglin_cli_status loglin_cli_check_references(const loglin_cli_run *run);

/* Prints the report; fails if --check finds too large an error. */
loglin_cli_status loglin_cli_report(const loglin_cli_run *run);

#endif
