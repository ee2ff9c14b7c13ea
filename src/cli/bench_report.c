/* SPDX-License-Identifier: Apache-2.0 */
/* Rows as lines of text. */
#include "cli/bench.h"

#include <stdio.h>

void loglin_cli_bench_print_heading(void) {
    (void)printf("%-27s %10s %-13s %9s %9s %6s %10s %5s %9s  %s\n", "row", "result", "", "required", "aim", "",
                 "median ms", "runs", "error", "engine");
}

/* A number of the row, or "-". */
static const char *number(const json_t *row, const char *key, const char *format, char text[static 32]) {
    const json_t *value = json_object_get(row, key);
    if (!json_is_number(value)) {
        return "-";
    }
    (void)snprintf(text, 32, format, json_number_value(value)); /* NOLINT: the format is a constant of this file */
    return text;
}

static const char *string_of(const json_t *row, const char *key) {
    const char *text = json_string_value(json_object_get(row, key));
    return text != NULL ? text : "";
}

void loglin_cli_bench_print_row(const json_t *row) {
    char texts[5][32];
    const json_t *met = json_object_get(row, "met");
    (void)printf("%-27s %10s %-13s %9s %9s %6s %10s %5lld %9s  %s\n", string_of(row, "name"),
                 number(row, "value", "%.4g", texts[0]), string_of(row, "unit"),
                 number(row, "required", "%.4g", texts[1]), number(row, "aim", "%.4g", texts[2]),
                 met == NULL         ? ""
                 : json_is_true(met) ? "met"
                                     : "missed",
                 number(row, "median_ms", "%.4f", texts[3]),
                 (long long)json_integer_value(json_object_get(row, "runs")), number(row, "error", "%.1e", texts[4]),
                 string_of(row, "engine"));
    if (json_object_get(row, "note") != NULL) {
        (void)printf("    %s\n", string_of(row, "note"));
    }
    (void)fflush(stdout);
}
