/* SPDX-License-Identifier: Apache-2.0 */
/* What a tuning run has measured, and the page with its plots. */
#ifndef LOGLIN_CLI_TUNE_REPORT_H
#define LOGLIN_CLI_TUNE_REPORT_H

#include "cli/status.h"
#include <stdbool.h>

/* A candidate's measurement, or (choice) the end of a class. */
typedef struct loglin_cli_tuned {
    char subject[96], candidate[160], outcome[16];
    loglin_problem problem; /* with the candidate's engine and chunk */
    double ms, spread, default_ms;
    bool choice;
} loglin_cli_tuned;

typedef struct loglin_cli_tune_results {
    char device[128];
    loglin_cli_tuned *rows;
    size_t count;
    double gflops, gbytes; /* of the device; 0: not measured */
    uint64_t seed;
    bool complete; /* nothing was left to do */
} loglin_cli_tune_results;

/* Makes DIR; fails where a report cannot be written to it, so that this is known before hours of measuring. */
loglin_cli_status loglin_cli_tune_report_prepare(const char *directory);

/* Writes DIR/index.html, a section for each device, and its plots, which gnuplot draws. */
loglin_cli_status loglin_cli_tune_report(const char *directory, const loglin_cli_tune_results *results, size_t count);

#endif
