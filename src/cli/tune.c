/* SPDX-License-Identifier: Apache-2.0 */
/* loglin tune: measures what is fastest; its results are found by every later plan. */
#include "cli/arguments.h"
#include "cli/commands.h"
#include "cli/tune_view.h"

#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const char help[] =
    "usage: loglin tune [OPTIONS]\n"
    "       loglin tune --import FILE\n"
    "       loglin tune --export FILE [--device N]\n"
    "\n"
    "Measures engines, their tunables and CLBlast's parameters, and keeps the results in the cache directory, where "
    "every\n"
    "later run finds them.\n"
    "\n"
    "options:\n"
    "  --device N          a device's number in \"loglin devices\", or a part of its name (LOGLIN_DEVICE)\n"
    "  --all               all devices, one after the other\n"
    "  --engine NAME       auto (default), blas or fused: tune these engines only\n"
    "  --quick             few classes: less than two minutes on a CPU with two cores\n"
    "  --time-limit S      begin no measurement after so many seconds (--quick: 105, and none goes on 10 s later)\n"
    "  --candidate-limit S give up a measurement after so many seconds (180)\n"
    "  --resume            go on with a run of the same options that was interrupted\n"
    "  --seed X            of the search\n"
    "  --json              print nothing but the results, as JSON\n"
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
    bool measures;          /* an option of a measurement was given */
    const char *shape;      /* an option that describes a problem was given */
    loglin_problem problem; /* length 0: the standard classes */
    loglin_tune_options options;
} tune_arguments;

/* What the callback fills. */
typedef struct tune_run {
    loglin_cli_tune_results results;
    loglin_cli_tune_view view;
} tune_run;

static volatile sig_atomic_t interrupted;

static void interrupt(int number) {
    (void)number;
    interrupted = 1;
}

enum { SIGNALS = 3 };
static const int signals[SIGNALS] = {SIGINT, SIGTERM, SIGHUP};

/* What the caller ignores, as nohup does, stays ignored.  To be asked before a driver sets handlers of its own. */
static void choose_handlers(struct sigaction actions[SIGNALS]) {
    for (size_t i = 0; i < SIGNALS; ++i) {
        if (sigaction(signals[i], NULL, &actions[i]) != 0 || actions[i].sa_handler != SIG_IGN) {
            actions[i] = (struct sigaction){.sa_handler = interrupt, .sa_flags = SA_RESTART};
        }
    }
}

static void set_handlers(const struct sigaction actions[SIGNALS]) {
    for (size_t i = 0; i < SIGNALS; ++i) {
        (void)sigaction(signals[i], &actions[i], NULL);
    }
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
        char expected[64];
        (void)snprintf(expected, sizeof expected, "a number from 1 to %.0f", most);
        return bad_value(option, value, expected);
    }
    return LOGLIN_CLI_OK;
}

static loglin_cli_status parse_integer(const char *option, const char *value, double most, uint64_t *integer) {
    double number;
    RETURN_IF_FAILED(parse_number(option, value, most, &number));
    *integer = (uint64_t)number;
    return (double)*integer == number ? LOGLIN_CLI_OK : bad_value(option, value, "an integer");
}

static loglin_cli_status parse_size(const char *option, const char *value, size_t *size) {
    uint64_t integer = 0;
    const loglin_cli_status status = parse_integer(option, value, 2147483647.0, &integer);
    *size = (size_t)integer;
    return status;
}

static loglin_cli_status parse_problem(int option, const char *name, tune_arguments *arguments) {
    arguments->shape = name;
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

static loglin_cli_status parse_measuring(int option, const char *name, tune_arguments *arguments) {
    arguments->measures = true;
    switch (option) {
    case 'q':
        arguments->options.quick = 1;
        return LOGLIN_CLI_OK;
    case 'r':
        arguments->options.resume = 1;
        return LOGLIN_CLI_OK;
    case 'j':
        arguments->json = true;
        return LOGLIN_CLI_OK;
    case 'p':
        arguments->report = optarg;
        return LOGLIN_CLI_OK;
    case 'n':
        return loglin_cli_parse_engine(optarg, &arguments->options.engine);
    case 't':
        return parse_number(name, optarg, 1e9, &arguments->options.time_limit);
    case 'c':
        return parse_number(name, optarg, 1e9, &arguments->options.candidate_limit);
    case 's':
        return parse_integer(name, optarg, 9e15, &arguments->options.seed);
    default:
        return parse_problem(option, name, arguments);
    }
}

static loglin_cli_status parse_option(int option, const char *name, tune_arguments *arguments) {
    switch (option) {
    case 'd':
        arguments->device = optarg;
        return LOGLIN_CLI_OK;
    case 'a':
        arguments->all = true;
        return LOGLIN_CLI_OK;
    case 'h':
        arguments->help = true;
        return LOGLIN_CLI_OK;
    case 'i':
        arguments->import_path = optarg;
        return LOGLIN_CLI_OK;
    case 'e':
        arguments->export_path = optarg;
        return LOGLIN_CLI_OK;
    default:
        return parse_measuring(option, name, arguments);
    }
}

/* Options that do not go together. */
static loglin_cli_status check_arguments(const tune_arguments *arguments) {
    const bool imports = arguments->import_path != NULL, exports = arguments->export_path != NULL;
    if ((imports || exports) && (arguments->measures || arguments->all || imports == exports)) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "--%s is given, expected it alone%s",
                               imports ? "import" : "export", imports ? "" : " or with --device");
    }
    if (imports && arguments->device != NULL) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT,
                               "--device is given, expected none: --import takes it from the file");
    }
    if (arguments->all && arguments->device != NULL) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "--device is given, expected none with --all");
    }
    if (arguments->shape != NULL && arguments->problem.length == 0) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "--%s is given without --length, expected both for one problem",
                               arguments->shape);
    }
    return LOGLIN_CLI_OK;
}

static loglin_cli_status parse_arguments(int argc, char **argv, tune_arguments *arguments) {
    static const struct option options[] = {
        {"device", required_argument, NULL, 'd'},
        {"all", no_argument, NULL, 'a'},
        {"quick", no_argument, NULL, 'q'},
        {"engine", required_argument, NULL, 'n'},
        {"time-limit", required_argument, NULL, 't'},
        {"candidate-limit", required_argument, NULL, 'c'},
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
            return loglin_cli_bad_option(argv, option);
        }
        RETURN_IF_FAILED(parse_option(option, options[index].name, arguments));
    }
    if (optind < argc) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "tune: \"%s\" is not expected; \"loglin tune --help\"",
                               argv[optind]);
    }
    arguments->problem.levels = loglin_num_levels(arguments->problem.length);
    return arguments->help ? LOGLIN_CLI_OK : check_arguments(arguments);
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

static int progress(void *context, const loglin_tune_event *event) {
    tune_run *run = context;
    run->results.seed = event->seed;
    run->results.complete = event->complete != 0;
    if (event->gflops > 0) {
        run->results.gflops = event->gflops;
        run->results.gbytes = event->gbytes;
    } else if ((event->finished != 0 ? event->best : event->candidate) != NULL && !record(run, event)) {
        return 1;
    }
    loglin_cli_tune_view_update(&run->view, event);
    return interrupted != 0;
}

/* ---- The run ----------------------------------------------------------------------------------------------------- */

static double now(void) {
    struct timespec time;
    (void)clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* Tunes a device for `seconds` at most, 0: without a limit. */
static loglin_cli_status tune_device(const tune_arguments *arguments, const loglin_device_info *info, double seconds,
                                     loglin_cli_tune_results *results) {
    tune_run run = {.view = loglin_cli_tune_view_of(arguments->json)};
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
    options.time_limit = seconds;
    options.progress = progress;
    options.context = &run;
    const loglin_status status = loglin_tune(info->id, &options);
    *results = run.results;
    loglin_cli_tune_view_end(&run.view, status == LOGLIN_OK ? results : NULL);
    return status == LOGLIN_OK ? LOGLIN_CLI_OK : loglin_cli_fail_library(status);
}

/* A device that fails does not keep the others from their turn. */
static loglin_cli_status tune_devices(const tune_arguments *arguments, const loglin_device_info *infos, size_t count,
                                      loglin_cli_tune_results *results, size_t *done) {
    const double begin = now(), limit = arguments->options.time_limit;
    loglin_cli_status worst = LOGLIN_CLI_OK;
    for (size_t i = 0; i < count && interrupted == 0; ++i) {
        const double left = limit > 0 ? limit - (now() - begin) : 0;
        if (left < 0) {
            break;
        }
        const loglin_cli_status status = tune_device(arguments, &infos[i], left, &results[(*done)++]);
        worst = status != LOGLIN_CLI_OK ? status : worst;
    }
    return worst;
}

static bool all_complete(const loglin_cli_tune_results *results, size_t done, size_t count) {
    for (size_t i = 0; i < done; ++i) {
        if (!results[i].complete) {
            return false;
        }
    }
    return done == count;
}

static loglin_cli_status tune_and_report(const tune_arguments *arguments, const loglin_device_info *infos, size_t count,
                                         loglin_cli_tune_results *results) {
    size_t done = 0;
    loglin_cli_status status = tune_devices(arguments, infos, count, results, &done);
    const bool stopped = status == LOGLIN_CLI_OK && !all_complete(results, done, count);
    if (arguments->json && done > 0) {
        const loglin_cli_status printed = loglin_cli_tune_print_json(results, done, arguments->all);
        status = printed != LOGLIN_CLI_OK ? printed : status;
    }
    if (arguments->report != NULL && done > 0) {
        const loglin_cli_status written = loglin_cli_tune_report(arguments->report, results, done);
        status = written != LOGLIN_CLI_OK ? written : status;
    }
    if (stopped) {
        (void)loglin_cli_fail(LOGLIN_CLI_FAILED, "%s; the same command with --resume goes on from here",
                              interrupted != 0 ? "interrupted" : "the time is up");
    }
    return interrupted != 0 ? LOGLIN_CLI_FAILED : status;
}

static loglin_cli_status run_tune(const tune_arguments *arguments) {
    enum { MOST = 64 };
    loglin_device_info infos[MOST];
    loglin_cli_tune_results results[MOST];
    size_t count = 0, chosen = 0;
    cl_device_id id = NULL;
    struct sigaction handlers[SIGNALS];
    choose_handlers(handlers);
    loglin_status status = loglin_list_devices(infos, MOST, &count);
    if (status == LOGLIN_OK && !arguments->all) {
        status = loglin_select_device(arguments->device, &id);
    }
    if (status == LOGLIN_OK && arguments->export_path != NULL) {
        status = loglin_tuning_export(id, arguments->export_path);
        return status == LOGLIN_OK ? LOGLIN_CLI_OK : loglin_cli_fail_library(status);
    }
    if (status != LOGLIN_OK) {
        return loglin_cli_fail_library(status);
    }
    for (size_t i = 0; i < count && i < MOST; ++i) {
        if (arguments->all || infos[i].id == id) {
            infos[chosen++] = infos[i];
        }
    }
    if (arguments->report != NULL) {
        RETURN_IF_FAILED(loglin_cli_tune_report_prepare(arguments->report));
    }
    set_handlers(handlers);
    memset(results, 0, sizeof results);
    const loglin_cli_status result = tune_and_report(arguments, infos, chosen, results);
    for (size_t i = 0; i < chosen; ++i) {
        free(results[i].rows);
    }
    return result;
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
