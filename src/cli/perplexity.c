/* SPDX-License-Identifier: Apache-2.0 */
/* loglin perplexity: bits per byte of a text, in windows that know nothing of each other. */
#include "cli/commands.h"

#include "cli/language_model.h"
#include "cli/session.h"
#include "cli/waiting.h"
#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BYTE_VOCABULARY = 256 };

typedef struct perplexity_run {
    loglin_cli_model_options options;
    const char *path;
    size_t window, limit; /* bytes of a window; windows at most, 0: all */
    loglin_cli_model model;
    FILE *stream;
    unsigned char *bytes; /* of a window */
    int32_t *ids;
    float *logits;
    size_t windows;
    double bits; /* sum over the windows of their means */
    double ms;
} perplexity_run;

static loglin_cli_status parse(int argc, char **argv, perplexity_run *run) {
    static const struct option table[] = {
        LOGLIN_CLI_MODEL_OPTIONS,
        {"window", required_argument, NULL, 'W'},
        {"windows", required_argument, NULL, 'L'},
        {"json", no_argument, NULL, 'J'},
        {NULL, 0, NULL, 0},
    };
    opterr = 0;
    for (int option; (option = getopt_long(argc, argv, ":", table, NULL)) != -1;) {
        if (option == 'W') {
            RETURN_IF_FAILED(loglin_cli_parse_size("--window", optarg, 2, 1 << 24, &run->window));
        } else if (option == 'L') {
            RETURN_IF_FAILED(loglin_cli_parse_size("--windows", optarg, 1, SIZE_MAX, &run->limit));
        } else if (option == 'J') {
            run->options.json = true;
        } else {
            RETURN_IF_FAILED(loglin_cli_model_option(argv, option, &run->options));
        }
    }
    if (run->options.help) {
        (void)printf(
            "usage: loglin perplexity --model DIR FILE --window W [OPTIONS]\n"
            "\n"
            "Scores a text with a model of bytes.  The text is cut into windows of W bytes, the rest is left\n"
            "out; the mean over the windows of the cross-entropy of their bytes 1 .. W-1 is printed, in bits.\n"
            "\n"
            "options:\n" LOGLIN_CLI_MODEL_HELP "  --window W            bytes of a window, at least 2\n"
            "  --windows N           only the first N windows\n"
            "  --json                print the report as a JSON object\n"
            "  --help                print this text\n");
        return LOGLIN_CLI_OK;
    }
    if (argc - optind != 1) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "perplexity: %d files are named, expected 1", argc - optind);
    }
    if (run->window == 0) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "perplexity: --window is missing");
    }
    run->path = argv[optind];
    return LOGLIN_CLI_OK;
}

/* Bits that the logits give to an id. */
static double cross_entropy(const float *logits, size_t count, int32_t id) {
    double best = -HUGE_VAL;
    double sum = 0;
    for (size_t i = 0; i < count; ++i) {
        best = fmax(best, (double)logits[i]);
    }
    for (size_t i = 0; i < count; ++i) {
        sum += exp((double)logits[i] - best);
    }
    return (log(sum) + best - (double)logits[id]) / log(2.0);
}

/* The window's mean is added to run->bits. */
static loglin_cli_status score_window(perplexity_run *run) {
    for (size_t i = 0; i < run->window; ++i) {
        run->ids[i] = run->bytes[i];
    }
    loglin_status status = loglin_session_reset(run->model.session, 0);
    if (status == LOGLIN_OK) {
        status = loglin_session_score(run->model.session, run->ids, run->window, run->logits);
        loglin_cli_waiting_end();
    }
    if (status != LOGLIN_OK) {
        return loglin_cli_fail_model(status);
    }
    const size_t finite = loglin_cli_finite_rows(run->logits, run->window, BYTE_VOCABULARY);
    if (finite < run->window) {
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "perplexity: the logits of byte %zu are " LOGLIN_CLI_NOT_FINITE,
                               run->windows * run->window + finite);
    }
    double bits = 0;
    for (size_t i = 1; i < run->window; ++i) {
        bits += cross_entropy(run->logits + (i - 1) * BYTE_VOCABULARY, BYTE_VOCABULARY, run->ids[i]);
    }
    run->bits += bits / (double)(run->window - 1);
    run->windows++;
    return LOGLIN_CLI_OK;
}

static loglin_cli_status allocate(perplexity_run *run) {
    if (run->model.info.vocabulary != BYTE_VOCABULARY) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT,
                               "perplexity needs a model of bytes, this one has a vocabulary of %zu",
                               run->model.info.vocabulary);
    }
    run->bytes = malloc(run->window);
    run->ids = calloc(run->window, sizeof *run->ids);
    run->logits = calloc(run->window, BYTE_VOCABULARY * sizeof *run->logits);
    if (run->bytes == NULL || run->ids == NULL || run->logits == NULL) {
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "out of memory");
    }
    return LOGLIN_CLI_OK;
}

static loglin_cli_status score(perplexity_run *run) {
    run->stream = fopen(run->path, "rb");
    if (run->stream == NULL) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s: %s", run->path, strerror(errno));
    }
    RETURN_IF_FAILED(loglin_cli_model_open(&run->options, &run->model));
    RETURN_IF_FAILED(allocate(run));
    RETURN_IF_FAILED(loglin_cli_model_start(&run->model, 1));
    const double begin = loglin_cli_now_ms();
    while ((run->limit == 0 || run->windows < run->limit) &&
           fread(run->bytes, 1, run->window, run->stream) == run->window) {
        RETURN_IF_FAILED(score_window(run));
    }
    run->ms = loglin_cli_now_ms() - begin;
    if (ferror(run->stream) != 0) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s: %s", run->path, strerror(errno));
    }
    if (run->windows == 0) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s has fewer than %zu bytes, which is one window", run->path,
                               run->window);
    }
    return LOGLIN_CLI_OK;
}

static loglin_cli_status report(const perplexity_run *run) {
    const double bits = run->bits / (double)run->windows;
    const size_t bytes = run->windows * run->window;
    if (!run->options.json) {
        (void)printf("model      %s: %s, %llu parameters\n", run->options.folder, loglin_cli_model_kind(&run->model),
                     (unsigned long long)run->model.info.parameters);
        (void)printf("text       %zu windows of %zu bytes, %.1f us/byte\n", run->windows, run->window,
                     1e3 * run->ms / (double)bytes);
        (void)printf("score      %.6f bits per byte\n", bits);
        return LOGLIN_CLI_OK;
    }
    json_t *object = json_pack("{s:s, s:s, s:s, s:I, s:I, s:f, s:f}", "command", "perplexity", "model",
                               run->options.folder, "file", run->path, "window", (json_int_t)run->window, "windows",
                               (json_int_t)run->windows, "run_ms", run->ms, "bits_per_byte", bits);
    const bool printed = object != NULL && json_dumpf(object, stdout, JSON_INDENT(2)) == 0;
    (void)putchar('\n');
    json_decref(object);
    return printed ? LOGLIN_CLI_OK : loglin_cli_fail(LOGLIN_CLI_FAILED, "the report cannot be printed");
}

loglin_cli_status loglin_cli_perplexity(int argc, char **argv) {
    perplexity_run run = {0};
    loglin_cli_status status = parse(argc, argv, &run);
    if (status != LOGLIN_CLI_OK || run.options.help) {
        return status;
    }
    status = score(&run);
    if (status == LOGLIN_CLI_OK) {
        status = report(&run);
    }
    loglin_cli_model_close(&run.model);
    if (run.stream != NULL) {
        (void)fclose(run.stream);
    }
    free(run.bytes);
    free(run.ids);
    free(run.logits);
    return status;
}
