/* SPDX-License-Identifier: Apache-2.0 */
/* loglin tune: measures what is fastest; its results are found by every later plan. */
#include "cli/commands.h"
#include "cli/tune_report.h"

#include <getopt.h>
#include <jansson.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char help[] =
    "usage: loglin tune [OPTIONS]\n"
    "       loglin tune --import FILE\n"
    "       loglin tune --export FILE [--device N]\n"
    "\n"
    "Measures engines, chunk sizes and CLBlast's parameters, and keeps the results in the cache directory, where "
    "every\n"
    "later run finds them.\n"
    "\n"
    "options:\n"
    "  --device N          a device's number in \"loglin devices\", or a part of its name (LOGLIN_DEVICE)\n"
    "  --all               all devices, one after the other\n"
    "  --quick             few classes: less than two minutes on a CPU with two cores\n"
    "  --time-limit S      begin no measurement after so many seconds\n"
    "  --resume            go on with a run that was interrupted\n"
    "  --seed X            of the search\n"
    "  --json              print the results as a JSON object\n"
    "  --report DIR        write a page with plots to DIR; needs gnuplot\n"
    "  --import FILE       add the results of a file, all or none, and measure nothing\n"
    "  --export FILE       write the results of a device to a file, and measure nothing\n"
    "one problem instead of the standard classes:\n"
    "  --length T          tokens; the others then default to those in parentheses\n"
    "  --op NAME           mamba2 (default) or gated_delta\n"
    "  --phase NAME        forward (default) or backward\n"
    "  --dtype NAME        f32 (default), f16 or bf16\n"
    "  --batch B, --heads H, --groups G, --dim-k K, --dim-v V    (1, 4, 1, 128, 64)\n"
    "  --help              print this text\n";

typedef struct tune_arguments {
    const char *device, *report, *import_path, *export_path;
    bool all, json, help;
    loglin_problem problem; /* length 0: the standard classes */
    loglin_tune_options options;
} tune_arguments;

/* The run that the signal handler and the callback look at. */
typedef struct tune_run {
    loglin_cli_tune_results results;
    bool terminal, json;
    double drawn;
} tune_run;

static volatile sig_atomic_t interrupted;

static void interrupt(int number) {
    (void)number;
    interrupted = 1;
}

/* ---- Arguments --------------------------------------------------------------------------------------------------- */

static loglin_cli_status bad_value(const char *option, const char *value, const char *expected) {
    return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "--%s is \"%s\", expected %s", option, value, expected);
}

static loglin_cli_status parse_name(const char *option, const char *value, const char *const *names, int count,
                                    int *choice) {
    for (int i = 0; i < count; ++i) {
        if (strcmp(value, names[i]) == 0) {
            *choice = i;
            return LOGLIN_CLI_OK;
        }
    }
    return bad_value(option, value,
                     count == 3         ? "f32, f16 or bf16"
                     : option[0] == 'o' ? "mamba2 or gated_delta"
                                        : "forward or backward");
}

static loglin_cli_status parse_number(const char *option, const char *value, double most, double *number) {
    char *end;
    *number = strtod(value, &end);
    if (end == value || *end != '\0' || !(*number >= 1) || *number > most) {
        return bad_value(option, value, "a number of at least 1");
    }
    return LOGLIN_CLI_OK;
}

static loglin_cli_status parse_size(const char *option, const char *value, size_t *size) {
    double number;
    RETURN_IF_FAILED(parse_number(option, value, 2147483647.0, &number));
    *size = (size_t)number;
    return (double)*size == number ? LOGLIN_CLI_OK : bad_value(option, value, "an integer");
}

static loglin_cli_status parse_problem(int option, const char *name, tune_arguments *arguments) {
    static const char *const ops[] = {"mamba2", "gated_delta"}, *const phases[] = {"forward", "backward"},
                             *const dtypes[] = {"f32", "f16", "bf16"};
    loglin_problem *p = &arguments->problem;
    int choice = 0;
    switch (option) {
    case 'O':
        RETURN_IF_FAILED(parse_name(name, optarg, ops, 2, &choice));
        p->op = (loglin_op)choice;
        return LOGLIN_CLI_OK;
    case 'P':
        RETURN_IF_FAILED(parse_name(name, optarg, phases, 2, &choice));
        p->phases = choice == 0 ? LOGLIN_FORWARD : LOGLIN_BACKWARD;
        return LOGLIN_CLI_OK;
    case 'D':
        RETURN_IF_FAILED(parse_name(name, optarg, dtypes, 3, &choice));
        p->dtype = (loglin_dtype)choice;
        return LOGLIN_CLI_OK;
    case 'T':
        return parse_size(name, optarg, &p->length);
    case 'B':
        return parse_size(name, optarg, &p->batch);
    case 'H':
        return parse_size(name, optarg, &p->heads);
    case 'G':
        return parse_size(name, optarg, &p->groups);
    case 'K':
        return parse_size(name, optarg, &p->dim_k);
    default:
        return parse_size(name, optarg, &p->dim_v);
    }
}

static loglin_cli_status parse_option(int option, const char *name, tune_arguments *arguments) {
    double number;
    switch (option) {
    case 'd':
        arguments->device = optarg;
        return LOGLIN_CLI_OK;
    case 'a':
        arguments->all = true;
        return LOGLIN_CLI_OK;
    case 'q':
        arguments->options.quick = 1;
        return LOGLIN_CLI_OK;
    case 'r':
        arguments->options.resume = 1;
        return LOGLIN_CLI_OK;
    case 'j':
        arguments->json = true;
        return LOGLIN_CLI_OK;
    case 'h':
        arguments->help = true;
        return LOGLIN_CLI_OK;
    case 'p':
        arguments->report = optarg;
        return LOGLIN_CLI_OK;
    case 'i':
        arguments->import_path = optarg;
        return LOGLIN_CLI_OK;
    case 'e':
        arguments->export_path = optarg;
        return LOGLIN_CLI_OK;
    case 't':
        return parse_number(name, optarg, 1e9, &arguments->options.time_limit);
    case 's':
        RETURN_IF_FAILED(parse_number(name, optarg, 9e15, &number));
        arguments->options.seed = (uint64_t)number;
        return LOGLIN_CLI_OK;
    default:
        return parse_problem(option, name, arguments);
    }
}

static loglin_cli_status parse_arguments(int argc, char **argv, tune_arguments *arguments) {
    static const struct option options[] = {
        {"device", required_argument, NULL, 'd'},
        {"all", no_argument, NULL, 'a'},
        {"quick", no_argument, NULL, 'q'},
        {"time-limit", required_argument, NULL, 't'},
        {"resume", no_argument, NULL, 'r'},
        {"seed", required_argument, NULL, 's'},
        {"json", no_argument, NULL, 'j'},
        {"report", required_argument, NULL, 'p'},
        {"import", required_argument, NULL, 'i'},
        {"export", required_argument, NULL, 'e'},
        {"length", required_argument, NULL, 'T'},
        {"op", required_argument, NULL, 'O'},
        {"phase", required_argument, NULL, 'P'},
        {"dtype", required_argument, NULL, 'D'},
        {"batch", required_argument, NULL, 'B'},
        {"heads", required_argument, NULL, 'H'},
        {"groups", required_argument, NULL, 'G'},
        {"dim-k", required_argument, NULL, 'K'},
        {"dim-v", required_argument, NULL, 'V'},
        {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0},
    };
    arguments->problem =
        (loglin_problem){.batch = 1, .heads = 4, .groups = 1, .dim_k = 128, .dim_v = 64, .phases = LOGLIN_FORWARD};
    opterr = 0;
    int index = 0;
    for (int option; (option = getopt_long(argc, argv, ":", options, &index)) != -1;) {
        if (option == '?' || option == ':') {
            return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s: %s; \"loglin tune --help\" lists the options",
                                   argv[optind - 1], option == '?' ? "no such option" : "a value is missing");
        }
        RETURN_IF_FAILED(parse_option(option, options[index].name, arguments));
    }
    if (optind < argc) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "tune: \"%s\" is not expected; \"loglin tune --help\"",
                               argv[optind]);
    }
    arguments->problem.levels = loglin_num_levels(arguments->problem.length);
    return LOGLIN_CLI_OK;
}

/* ---- What is seen of the run ------------------------------------------------------------------------------------- */

static bool record(tune_run *run, const loglin_tune_event *event) {
    loglin_cli_tune_results *results = &run->results;
    loglin_cli_tuned *grown = realloc(results->rows, (results->count + 1) * sizeof *grown);
    if (grown == NULL) {
        return false;
    }
    results->rows = grown;
    loglin_cli_tuned *row = &grown[results->count++];
    *row = (loglin_cli_tuned){.problem = event->problem,
                              .ms = event->ms,
                              .spread = event->spread,
                              .default_ms = event->default_ms,
                              .choice = event->finished != 0};
    (void)snprintf(row->subject, sizeof row->subject, "%s", event->subject);
    (void)snprintf(row->candidate, sizeof row->candidate, "%s", event->finished != 0 ? event->best : event->candidate);
    (void)snprintf(row->outcome, sizeof row->outcome, "%s", event->outcome != NULL ? event->outcome : "ok");
    return true;
}

static void print_choice(const loglin_tune_event *event) {
    (void)printf("%-44s %9.3f ms  %5.2f times the default  %s\n", event->subject, event->ms,
                 event->default_ms / event->ms, event->best);
    (void)fflush(stdout);
}

/* The line that a terminal shows: it is drawn again and again. */
static void draw(tune_run *run, const loglin_tune_event *event) {
    enum { WIDTH = 24 };
    char bar[WIDTH + 1];
    if (event->seconds - run->drawn < 0.2) {
        return;
    }
    run->drawn = event->seconds;
    for (int i = 0; i < WIDTH; ++i) {
        bar[i] = (double)i < event->share * WIDTH ? '#' : '.';
    }
    bar[WIDTH] = '\0';
    (void)printf("\r\033[K[%s] %3.0f %%, %.0f s left  %s: ", bar, 100 * event->share, event->seconds_left,
                 event->subject);
    if (event->best != NULL && isfinite(event->best_ms)) {
        (void)printf("%.3f ms %.60s", event->best_ms, event->best);
    }
    (void)fflush(stdout);
}

static int progress(void *context, const loglin_tune_event *event) {
    tune_run *run = context;
    if (event->gflops > 0) {
        run->results.gflops = event->gflops;
        run->results.gbytes = event->gbytes;
    } else if ((event->finished != 0 || event->candidate != NULL) && !record(run, event)) {
        return 1;
    }
    if (!run->json) {
        if (event->finished != 0 && event->gflops == 0) {
            (void)printf("%s", run->terminal ? "\r\033[K" : "");
            print_choice(event);
        }
        if (run->terminal) {
            draw(run, event);
        }
    }
    return interrupted != 0;
}

/* ---- The end of the run ------------------------------------------------------------------------------------------ */

/* The geometric mean of the classes' gains; 0 if no class is done. */
static double mean_gain(const loglin_cli_tune_results *results) {
    double sum = 0;
    size_t count = 0;
    for (size_t i = 0; i < results->count; ++i) {
        const loglin_cli_tuned *row = &results->rows[i];
        if (row->choice && strcmp(row->subject, "CLBlast") != 0 && row->default_ms > 0) {
            sum += log(row->default_ms / row->ms);
            count++;
        }
    }
    return count > 0 ? exp(sum / (double)count) : 0;
}

static json_t *print_rows(const loglin_cli_tune_results *results, bool choices) {
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

static loglin_cli_status print_results(const tune_run *run) {
    const loglin_cli_tune_results *results = &run->results;
    const double gain = mean_gain(results);
    if (!run->json) {
        (void)printf("%s%s: %.2f times the default, the geometric mean over the classes\n",
                     run->terminal ? "\r\033[K" : "", results->device, gain);
        return LOGLIN_CLI_OK;
    }
    json_t *report = json_pack("{s:s, s:f, s:f, s:f, s:o, s:o}", "device", results->device, "gflops", results->gflops,
                               "gbytes", results->gbytes, "mean_gain", gain, "choices", print_rows(results, true),
                               "measurements", print_rows(results, false));
    const bool printed = report != NULL && json_dumpf(report, stdout, JSON_INDENT(2)) == 0 && putchar('\n') != EOF;
    json_decref(report);
    return printed ? LOGLIN_CLI_OK : loglin_cli_fail(LOGLIN_CLI_FAILED, "the report cannot be printed");
}

/* ---- The run ----------------------------------------------------------------------------------------------------- */

static loglin_cli_status tune_device(const tune_arguments *arguments, const loglin_device_info *info) {
    tune_run run = {.terminal = isatty(STDOUT_FILENO) != 0 && !arguments->json, .json = arguments->json};
    (void)snprintf(run.results.device, sizeof run.results.device, "%s", info->name);
    char self[4096];
    const ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1); /* the worker is this very program */
    loglin_tune_options options = arguments->options;
    if (length > 0) {
        self[length] = '\0';
        options.worker = self;
    }
    if (arguments->problem.length > 0) {
        options.problems = &arguments->problem;
        options.problem_count = 1;
    }
    options.progress = progress;
    options.context = &run;
    const loglin_status status = loglin_tune(info->id, &options);
    loglin_cli_status result = status == LOGLIN_OK ? print_results(&run) : loglin_cli_fail_library(status);
    if (result == LOGLIN_CLI_OK && arguments->report != NULL) {
        result = loglin_cli_tune_report(arguments->report, &run.results);
    }
    free(run.results.rows);
    if (interrupted != 0 && result == LOGLIN_CLI_OK) {
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "interrupted; \"loglin tune --resume\" goes on from here");
    }
    return result;
}

static loglin_cli_status run_tune(const tune_arguments *arguments) {
    enum { MOST = 64 };
    loglin_device_info infos[MOST];
    size_t count = 0;
    cl_device_id id = NULL;
    loglin_status status = loglin_list_devices(infos, MOST, &count);
    if (status == LOGLIN_OK && !arguments->all) {
        status = loglin_select_device(arguments->device, &id);
    }
    if (status == LOGLIN_OK && arguments->export_path != NULL) {
        status = loglin_tuning_export(arguments->all ? infos[0].id : id, arguments->export_path);
        return status == LOGLIN_OK ? LOGLIN_CLI_OK : loglin_cli_fail_library(status);
    }
    if (status != LOGLIN_OK) {
        return loglin_cli_fail_library(status);
    }
    (void)signal(SIGINT, interrupt);
    (void)signal(SIGTERM, interrupt);
    for (size_t i = 0; i < count && i < MOST && interrupted == 0; ++i) {
        if (arguments->all || infos[i].id == id) {
            RETURN_IF_FAILED(tune_device(arguments, &infos[i]));
        }
    }
    return LOGLIN_CLI_OK;
}

loglin_cli_status loglin_cli_tune(int argc, char **argv) {
    tune_arguments arguments = {.device = NULL};
    RETURN_IF_FAILED(parse_arguments(argc, argv, &arguments));
    if (arguments.help) {
        (void)fputs(help, stdout);
        return LOGLIN_CLI_OK;
    }
    if (arguments.import_path != NULL) {
        const loglin_status status = loglin_tuning_import(arguments.import_path);
        return status == LOGLIN_OK ? LOGLIN_CLI_OK : loglin_cli_fail_library(status);
    }
    return run_tune(&arguments);
}
