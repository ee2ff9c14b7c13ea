/* SPDX-License-Identifier: Apache-2.0 */
#include "cli/tune_view.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { LINE_SIZE = 320, BAR_WIDTH = 24 };

static const char *const engine_names[] = {[LOGLIN_ENGINE_BLAS] = "blas", [LOGLIN_ENGINE_FUSED] = "fused"};

enum { ENGINE_END = sizeof engine_names / sizeof engine_names[0] };

loglin_cli_tune_view loglin_cli_tune_view_of(bool silent) {
    const char *kind = getenv("TERM"); // NOLINT(concurrency-mt-unsafe): nobody sets it
    const bool moves = kind != NULL && strcmp(kind, "dumb") != 0;
    return (loglin_cli_tune_view){.silent = silent, .terminal = !silent && moves && isatty(STDOUT_FILENO) != 0};
}

/* ---- The table --------------------------------------------------------------------------------------------------- */

static void print_head(loglin_cli_tune_view *view) {
    if (!view->headed) {
        (void)printf("%-47s %10s %10s %6s  %s\n", "class", "default ms", "best ms", "gain", "choice");
        view->headed = true;
    }
}

static void clear_live(loglin_cli_tune_view *view) {
    if (view->live) {
        (void)printf("\033[1A\r\033[J");
        view->live = false;
    }
}

/* A choice in words; a class's are without CLBlast's parameters, which are the device's and have a row of their own. */
static void print_best(const loglin_tune_event *event, char text[LINE_SIZE]) {
    (void)snprintf(text, LINE_SIZE, "%s", event->best);
    char *gemm = strstr(text, " gemm=");
    if (gemm != NULL && strcmp(event->subject, "CLBlast") != 0) {
        *gemm = '\0';
    }
}

static void print_choice(const loglin_tune_event *event) {
    if (event->best == NULL) {
        (void)printf("%-47s %10s %10s %6s  not %s: %s\n", event->subject, "", "", "",
                     engine_names[event->problem.engine], event->detail);
        return;
    }
    char untuned[24] = "fails", gain[24] = "", choice[LINE_SIZE];
    print_best(event, choice);
    if (event->default_ms > 0) {
        (void)snprintf(untuned, sizeof untuned, "%.3f", event->default_ms);
        (void)snprintf(gain, sizeof gain, "%.2f", event->default_ms / event->ms);
    }
    (void)printf("%-47s %10s %10.3f %6s  %s\n", event->subject, untuned, event->ms, gain, choice);
}

/* ---- The live lines ---------------------------------------------------------------------------------------------- */

static int terminal_width(void) {
    struct winsize size = {.ws_col = 0};
    return ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

static void print_duration(char *text, size_t capacity, double seconds) {
    if (seconds < 120) {
        (void)snprintf(text, capacity, "%.0f s", seconds);
    } else {
        (void)snprintf(text, capacity, "%.0f min", seconds / 60);
    }
}

/* The best so far of what is being searched, and the bar below it; both shorter than the terminal is wide. */
static void draw(loglin_cli_tune_view *view, const loglin_tune_event *event) {
    char row[2 * LINE_SIZE], best[LINE_SIZE], bar[BAR_WIDTH + 1], left[24], line[LINE_SIZE];
    const int most = terminal_width() - 1;
    if (event->best != NULL) {
        print_best(event, best);
        (void)snprintf(row, sizeof row, "%-47s %10s %10.3f %6s  %s", event->subject, "so far", event->best_ms, "",
                       best);
    } else {
        (void)snprintf(row, sizeof row, "%-47s", event->subject);
    }
    for (int i = 0; i < BAR_WIDTH; ++i) {
        bar[i] = (double)i < event->share * BAR_WIDTH ? '#' : '.';
    }
    bar[BAR_WIDTH] = '\0';
    print_duration(left, sizeof left, event->seconds_left);
    (void)snprintf(line, sizeof line, "[%s] %3.0f %%%s%s%s", bar, 100 * event->share,
                   event->seconds_left > 0 ? ", " : "", event->seconds_left > 0 ? left : "",
                   event->seconds_left > 0 ? " left" : "");
    clear_live(view);
    (void)printf("%.*s\n%.*s", most, row, most, line);
    view->live = true;
    view->drawn = event->seconds;
}

void loglin_cli_tune_view_update(loglin_cli_tune_view *view, const loglin_tune_event *event) {
    static const double interval = 0.2;
    if (view->silent || event->complete != 0) {
        return;
    }
    const bool row = event->finished != 0 && event->gflops == 0;
    if (row) {
        clear_live(view);
        print_head(view);
        print_choice(event);
    }
    if (view->terminal && (row || event->seconds - view->drawn >= interval)) {
        print_head(view);
        draw(view, event);
    }
    (void)fflush(stdout);
}

/* ---- Gains ------------------------------------------------------------------------------------------------------- */

typedef struct gain {
    size_t classes;
    double mean, least; /* the geometric mean */
} gain;

static bool is_class(const loglin_cli_tuned *row) {
    return row->choice && strcmp(row->subject, "CLBlast") != 0;
}

static gain gain_of(const loglin_cli_tune_results *results, loglin_engine engine) {
    gain found = {.least = INFINITY};
    double sum = 0;
    for (size_t i = 0; i < results->count; ++i) {
        const loglin_cli_tuned *row = &results->rows[i];
        if (is_class(row) && row->problem.engine == engine && row->default_ms > 0) {
            sum += log(row->default_ms / row->ms);
            found.least = fmin(found.least, row->default_ms / row->ms);
            found.classes++;
        }
    }
    found.mean = found.classes > 0 ? exp(sum / (double)found.classes) : 0;
    return found;
}

void loglin_cli_tune_view_end(loglin_cli_tune_view *view, const loglin_cli_tune_results *results) {
    clear_live(view);
    bool any = false;
    if (view->silent || results == NULL) {
        return;
    }
    for (int engine = LOGLIN_ENGINE_BLAS; engine < ENGINE_END; ++engine) {
        const gain found = gain_of(results, (loglin_engine)engine);
        if (found.classes > 0) {
            (void)printf("%s: the %s engine is %.2f times as fast as untuned, in %zu %s (geometric mean; at least "
                         "%.2f)\n",
                         results->device, engine_names[engine], found.mean, found.classes,
                         found.classes == 1 ? "class" : "classes", found.least);
            any = true;
        }
    }
    if (!any) {
        (void)printf("%s: no class is done\n", results->device);
    }
    (void)fflush(stdout);
}

/* ---- JSON -------------------------------------------------------------------------------------------------------- */

static json_t *json_of_rows(const loglin_cli_tune_results *results, bool choices) {
    json_t *rows = json_array();
    for (size_t i = 0; i < results->count; ++i) {
        const loglin_cli_tuned *row = &results->rows[i];
        if (row->choice == choices) {
            json_t *printed = json_pack("{s:s, s:s, s:s, s:f, s:f}", "class", row->subject, "candidate", row->candidate,
                                        "outcome", row->outcome, "ms", row->ms, "spread", row->spread);
            if (choices) {
                (void)json_object_set_new(printed, "default_ms", json_real(row->default_ms));
            }
            (void)json_array_append_new(rows, printed);
        }
    }
    return rows;
}

static json_t *json_of_gains(const loglin_cli_tune_results *results) {
    json_t *gains = json_object();
    for (int engine = LOGLIN_ENGINE_BLAS; engine < ENGINE_END; ++engine) {
        const gain found = gain_of(results, (loglin_engine)engine);
        if (found.classes > 0) {
            (void)json_object_set_new(gains, engine_names[engine],
                                      json_pack("{s:I, s:f, s:f}", "classes", (json_int_t)found.classes, "mean",
                                                found.mean, "least", found.least));
        }
    }
    return gains;
}

static json_t *json_of(const loglin_cli_tune_results *results) {
    return json_pack("{s:s, s:b, s:I, s:f, s:f, s:o, s:o, s:o}", "device", results->device, "complete",
                     results->complete, "seed", (json_int_t)results->seed, "gflops", results->gflops, "gbytes",
                     results->gbytes, "gains", json_of_gains(results), "choices", json_of_rows(results, true),
                     "measurements", json_of_rows(results, false));
}

loglin_cli_status loglin_cli_tune_print_json(const loglin_cli_tune_results *results, size_t count, bool all) {
    json_t *report = all ? json_array() : json_of(&results[0]);
    for (size_t i = 0; i < count && all; ++i) {
        (void)json_array_append_new(report, json_of(&results[i]));
    }
    const bool printed = report != NULL && json_dumpf(report, stdout, JSON_INDENT(2)) == 0 && putchar('\n') != EOF &&
                         fflush(stdout) == 0;
    json_decref(report);
    return printed ? LOGLIN_CLI_OK : loglin_cli_fail(LOGLIN_CLI_FAILED, "the report cannot be printed");
}
