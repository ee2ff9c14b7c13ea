/* SPDX-License-Identifier: Apache-2.0 */
/* What is seen of "loglin tune": a row for each class and engine that is done, and on a terminal a live row and a bar. */
#ifndef LOGLIN_CLI_TUNE_VIEW_H
#define LOGLIN_CLI_TUNE_VIEW_H

#include "cli/tune_report.h"

typedef struct loglin_cli_tune_view {
    bool silent, terminal;
    bool headed;  /* the head of the table is printed */
    bool live;    /* live lines stand below the table */
    double drawn; /* when they were drawn, in the run's seconds */
} loglin_cli_tune_view;

/* silent: nothing is to be printed.  Live lines need a terminal that can move its cursor. */
loglin_cli_tune_view loglin_cli_tune_view_of(bool silent);

void loglin_cli_tune_view_update(loglin_cli_tune_view *view, const loglin_tune_event *event);

/* The live lines go, and the gains of each engine are summed up unless the results are NULL. */
void loglin_cli_tune_view_end(loglin_cli_tune_view *view, const loglin_cli_tune_results *results);

/* The results of some devices: one object, or an array of them if all devices were asked for. */
loglin_cli_status loglin_cli_tune_print_json(const loglin_cli_tune_results *results, size_t count, bool all);

#endif
