/* SPDX-License-Identifier: Apache-2.0 */
/* The report: gnuplot draws into SVG files, and a page shows them; it opens from disk without a network. */
#include "cli/tune_report.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static loglin_cli_status fail_write(const char *path) {
    return loglin_cli_fail(LOGLIN_CLI_FAILED, "--report: cannot write %s: %s", path, strerror(errno)); // NOLINT
}

static const char *engine_name(loglin_engine engine) {
    return engine == LOGLIN_ENGINE_FUSED ? "fused" : "blas";
}

/* ---- Plots ------------------------------------------------------------------------------------------------------- */

/* gnuplot with the SVG terminal and the output set; NULL with a message if there is no pipe. */
static FILE *open_plot(const char *directory, const char *name) {
    FILE *plot = popen("gnuplot", "w"); // NOLINT(cert-env33-c): a fixed command
    if (plot == NULL) {
        (void)loglin_cli_fail(LOGLIN_CLI_FAILED, "--report: cannot start gnuplot");
        return NULL;
    }
    /* gnuplot takes a name with a | or a ~ first for something else */
    (void)fprintf(plot, "set terminal svg size 720,420 noenhanced background 'white'\nset output '%s%s/%s.svg'\n",
                  directory[0] == '/' ? "" : "./", directory, name);
    (void)fprintf(plot, "set grid\nset key outside below\nset logscale xy\nset style data linespoints\n");
    return plot;
}

static loglin_cli_status close_plot(FILE *plot) {
    const int status = pclose(plot);
    return status == 0 ? LOGLIN_CLI_OK : loglin_cli_fail(LOGLIN_CLI_FAILED, "--report: gnuplot failed");
}

/* The least time of a class's candidates with an engine and a chunk size; 0 if there is none. */
static double least_ms(const loglin_cli_tune_results *results, const char *subject, loglin_engine engine,
                       size_t chunk) {
    double least = 0;
    for (size_t i = 0; i < results->count; ++i) {
        const loglin_cli_tuned *row = &results->rows[i];
        if (!row->choice && strcmp(row->subject, subject) == 0 && strcmp(row->outcome, "ok") == 0 &&
            row->problem.engine == engine && row->problem.chunk == chunk && (least == 0 || row->ms < least)) {
            least = row->ms;
        }
    }
    return least;
}

/* The points of one engine; how many there are. */
static size_t write_chunks(FILE *plot, const loglin_cli_tune_results *results, const char *subject,
                           loglin_engine engine) {
    size_t points = 0;
    for (size_t chunk = 16; chunk <= 256; chunk *= 2) {
        const double ms = least_ms(results, subject, engine, chunk);
        if (ms > 0) {
            if (points++ == 0) {
                (void)fprintf(plot, "$%s << EOD\n", engine_name(engine));
            }
            (void)fprintf(plot, "%zu %.9g\n", chunk, ms);
        }
    }
    if (points > 0) {
        (void)fprintf(plot, "EOD\n");
    }
    return points;
}

static loglin_cli_status plot_chunks(const char *directory, const char *name, const loglin_cli_tune_results *results,
                                     const char *subject) {
    FILE *plot = open_plot(directory, name);
    if (plot == NULL) {
        return LOGLIN_CLI_FAILED;
    }
    const size_t blas = write_chunks(plot, results, subject, LOGLIN_ENGINE_BLAS);
    const size_t fused = write_chunks(plot, results, subject, LOGLIN_ENGINE_FUSED);
    (void)fprintf(plot, "set title '%s'\nset xlabel 'tokens of a chunk'\nset ylabel 'milliseconds'\n", subject);
    (void)fprintf(plot, "set xtics (16, 32, 64, 128, 256)\nset xrange [14:300]\nplot %s%s%s\n",
                  blas > 0 ? "$blas title 'blas'" : "", blas > 0 && fused > 0 ? ", " : "",
                  fused > 0 ? "$fused title 'fused'" : "");
    return close_plot(plot);
}

/* Operations of a token in the chunkwise form with chunks of 64, the least the engines do: see the page. */
static double operations(const loglin_problem *p) {
    double levels = 0;
    for (size_t t = p->length / 64; t > 1; t /= 2) {
        levels += 0.5;
    }
    const double k = (double)p->dim_k, v = (double)p->dim_v;
    const double forward = 2 * (double)p->heads * (32 * (k + v) + k * v * (1 + levels));
    return p->phases == LOGLIN_BACKWARD ? 2.5 * forward : forward;
}

/* Bytes of a token that must be read or written. */
static double bytes(const loglin_problem *p) {
    const double element = p->dtype == LOGLIN_F32 ? 4 : 2;
    const double qk = 2 * (double)(p->groups * p->dim_k) * element, vo = 2 * (double)(p->heads * p->dim_v) * element;
    const double rest = 4 * (double)(p->heads * (p->levels + 1));
    return p->phases == LOGLIN_BACKWARD ? 2 * (qk + vo + rest) : qk + vo + rest;
}

static bool is_class(const loglin_cli_tuned *row) {
    return row->choice && strcmp(row->subject, "CLBlast") != 0;
}

static bool same_series(const loglin_problem *a, const loglin_problem *b) {
    return a->op == b->op && a->phases == b->phases && a->dtype == b->dtype && a->dim_k == b->dim_k &&
           a->dim_v == b->dim_v && a->groups == b->groups;
}

/* Is row i the first choice of its operator, phase, type and shape? */
static bool starts_series(const loglin_cli_tune_results *results, size_t i) {
    for (size_t j = 0; j < i; ++j) {
        if (is_class(&results->rows[j]) && same_series(&results->rows[j].problem, &results->rows[i].problem)) {
            return false;
        }
    }
    return is_class(&results->rows[i]);
}

/* Is row i the first choice of its class? */
static bool starts_class(const loglin_cli_tune_results *results, size_t i) {
    for (size_t j = 0; j < i; ++j) {
        if (results->rows[j].choice && strcmp(results->rows[j].subject, results->rows[i].subject) == 0) {
            return false;
        }
    }
    return is_class(&results->rows[i]);
}

/* Points of a series and an engine: length, tokens a second tuned and untuned; how many there are. */
static size_t write_speeds(FILE *plot, const loglin_cli_tune_results *results, const loglin_problem *series,
                           loglin_engine engine) {
    size_t points = 0;
    for (size_t i = 0; i < results->count; ++i) {
        const loglin_cli_tuned *row = &results->rows[i];
        const loglin_problem *p = &row->problem;
        if (is_class(row) && same_series(p, series) && p->engine == engine) {
            const double tokens = (double)(p->batch * p->length);
            if (points++ == 0) {
                (void)fprintf(plot, "$%s << EOD\n", engine_name(engine));
            }
            (void)fprintf(plot, "%zu %.9g ", p->length, tokens / row->ms * 1e3);
            (void)(row->default_ms > 0 ? fprintf(plot, "%.9g\n", tokens / row->default_ms * 1e3) : fputs("?\n", plot));
        }
    }
    if (points > 0) {
        (void)fprintf(plot, "EOD\n");
    }
    return points;
}

/* What the device's rates allow: length, tokens a second by arithmetic and by bandwidth. */
static void write_limits(FILE *plot, const loglin_cli_tune_results *results, const loglin_problem *series) {
    size_t shortest = series->length, longest = series->length;
    (void)fprintf(plot, "$limits << EOD\n");
    for (size_t i = 0; i < results->count; ++i) {
        const loglin_problem *p = &results->rows[i].problem;
        if (is_class(&results->rows[i]) && same_series(p, series)) {
            shortest = p->length < shortest ? p->length : shortest;
            longest = p->length > longest ? p->length : longest;
            (void)fprintf(plot, "%zu %.9g %.9g\n", p->length, results->gflops * 1e9 / operations(p),
                          results->gbytes * 1e9 / bytes(p));
        }
    }
    (void)fprintf(plot, "EOD\nset xrange [%zu.5:%zu]\n", shortest / 2, 2 * longest);
}

static loglin_cli_status plot_speed(const char *directory, const char *name, const loglin_cli_tune_results *results,
                                    const loglin_problem *series, const char *title) {
    static const loglin_engine engines[] = {LOGLIN_ENGINE_BLAS, LOGLIN_ENGINE_FUSED};
    FILE *plot = open_plot(directory, name);
    if (plot == NULL) {
        return LOGLIN_CLI_FAILED;
    }
    bool any[2];
    for (int i = 0; i < 2; ++i) {
        any[i] = write_speeds(plot, results, series, engines[i]) > 0;
    }
    write_limits(plot, results, series);
    (void)fprintf(plot, "set title '%s'\nset xlabel 'tokens of a sequence'\nset ylabel 'tokens a second'\n", title);
    (void)fprintf(plot, "set datafile missing '?'\nplot ");
    for (int i = 0; i < 2; ++i) {
        const char *engine = engine_name(engines[i]);
        if (any[i]) {
            (void)fprintf(plot, "%s$%s using 1:2 title '%s, tuned', $%s using 1:3 title '%s, untuned'",
                          i > 0 && any[0] ? ", " : "", engine, engine, engine, engine);
        }
    }
    (void)fprintf(plot, "%s\n",
                  results->gflops > 0 ? ", $limits using 1:2 dt 2 title 'limit by arithmetic', $limits using 1:3 dt 3 "
                                        "title 'limit by bandwidth'"
                                      : "");
    return close_plot(plot);
}

/* ---- The page ---------------------------------------------------------------------------------------------------- */

static void write_text(FILE *page, const char *text) {
    for (; *text != '\0'; ++text) {
        const char *entity = *text == '<' ? "&lt;" : *text == '>' ? "&gt;" : *text == '&' ? "&amp;" : NULL;
        (void)(entity != NULL ? fputs(entity, page) : fputc(*text, page));
    }
}

static void write_table(FILE *page, const loglin_cli_tune_results *results) {
    (void)fprintf(page, "<table><tr><th>class</th><th>choice</th><th>ms</th><th>spread</th><th>untuned ms</th>"
                        "<th>gain</th></tr>\n");
    for (size_t i = 0; i < results->count; ++i) {
        const loglin_cli_tuned *row = &results->rows[i];
        if (row->choice) {
            (void)fprintf(page, "<tr><td>");
            write_text(page, row->subject);
            (void)fprintf(page, "</td><td>");
            write_text(page, row->candidate);
            (void)fprintf(page, "</td><td>%.4g</td><td>%.2g</td>", row->ms, row->spread);
            (void)(row->default_ms > 0
                       ? fprintf(page, "<td>%.4g</td><td>%.2f</td></tr>\n", row->default_ms, row->default_ms / row->ms)
                       : fputs("<td>fails</td><td></td></tr>\n", page));
        }
    }
    (void)fprintf(page, "</table>\n");
}

static loglin_cli_status write_plots(FILE *page, const char *directory, const loglin_cli_tune_results *results,
                                     size_t device) {
    for (size_t i = 0; i < results->count; ++i) {
        const loglin_cli_tuned *row = &results->rows[i];
        char name[64];
        if (starts_series(results, i)) {
            (void)snprintf(name, sizeof name, "speed-%zu-%zu", device, i);
            RETURN_IF_FAILED(plot_speed(directory, name, results, &row->problem, row->subject));
            (void)fprintf(page, "<img src=\"%s.svg\" alt=\"speed\">\n", name);
        }
        if (starts_class(results, i)) {
            (void)snprintf(name, sizeof name, "chunks-%zu-%zu", device, i);
            RETURN_IF_FAILED(plot_chunks(directory, name, results, row->subject));
            (void)fprintf(page, "<img src=\"%s.svg\" alt=\"time by chunk size\">\n", name);
        }
    }
    return LOGLIN_CLI_OK;
}

static void write_device(FILE *page, const loglin_cli_tune_results *results) {
    (void)fprintf(page, "<h1>");
    write_text(page, results->device);
    (void)fprintf(page,
                  "</h1>\n<p>Measured rates: %.1f GFLOP/s of fused multiply-adds, %.1f GB/s of a copy. The limit by "
                  "arithmetic counts the operations of the chunkwise form with chunks of 64 (gradients: 2.5 times "
                  "those), the limit by bandwidth every input and output once (gradients: twice).%s</p>\n",
                  results->gflops, results->gbytes, results->complete ? "" : " The run was stopped before its end.");
    write_table(page, results);
}

static loglin_cli_status write_page(FILE *page, const char *directory, const loglin_cli_tune_results *results,
                                    size_t count) {
    (void)fprintf(page, "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>loglin tune</title>"
                        "<style>body{font:15px sans-serif;margin:2em}td,th{padding:2px 10px;text-align:left}</style>"
                        "</head><body>\n");
    for (size_t device = 0; device < count; ++device) {
        write_device(page, &results[device]);
        RETURN_IF_FAILED(write_plots(page, directory, &results[device], device));
    }
    (void)fprintf(page, "</body></html>\n");
    return LOGLIN_CLI_OK;
}

loglin_cli_status loglin_cli_tune_report_prepare(const char *directory) {
    if (strpbrk(directory, "'\n") != NULL) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "--report is \"%s\", expected no quotes in it", directory);
    }
    if ((mkdir(directory, 0777) != 0 && errno != EEXIST) || access(directory, W_OK | X_OK) != 0) {
        return fail_write(directory);
    }
    if (system("gnuplot --version >/dev/null 2>&1") != 0) { // NOLINT(cert-env33-c): a fixed command
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "--report needs gnuplot (Debian: gnuplot-nox), which is not found");
    }
    return LOGLIN_CLI_OK;
}

loglin_cli_status loglin_cli_tune_report(const char *directory, const loglin_cli_tune_results *results, size_t count) {
    char path[4096];
    if ((size_t)snprintf(path, sizeof path, "%s/index.html", directory) >= sizeof path) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "--report: the name is too long");
    }
    FILE *page = fopen(path, "w");
    if (page == NULL) {
        return fail_write(path);
    }
    (void)signal(SIGPIPE, SIG_IGN); /* gnuplot may fail */
    const loglin_cli_status status = write_page(page, directory, results, count);
    if (fclose(page) != 0 && status == LOGLIN_CLI_OK) {
        return fail_write(path);
    }
    return status;
}
