/* SPDX-License-Identifier: Apache-2.0 */
/*
 * loglin bench.  A suite without settings of the environment runs in this process.  The suite cpu needs another number of
 * threads for each part of it, which OpenCL reads once, when it is loaded: this process starts itself again for each.
 */
#include "cli/commands.h"

#include "cli/arguments.h"
#include "cli/bench.h"
#include "cli/language_model.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_THREADS = 64, MAX_CHILD_ARGUMENTS = 16 + 2 * LOGLIN_BENCH_MAX_ROWS };

static const char *const self = "/proc/self/exe";

/* ---- The command line -------------------------------------------------------------------------------------------- */

static void print_help(void) {
    (void)printf(
        "usage: loglin bench --suite NAME [OPTIONS]\n"
        "\n"
        "Measures speed with random inputs, beside the figures that it should reach; rows of the outputs are checked\n"
        "against a result in double.  The suites:\n"
        "  cpu     ratios on a CPU, at one thread and at two: to OpenBLAS's sgemm (where libopenblas.so.0 is\n"
        "          installed), to the blas engine, to f32 storage, to a copy; growth and workspace\n"
        "  paper   times of the paper's kernel benchmark, by device events\n"
        "\n"
        "options:\n"
        "  --suite NAME          cpu or paper\n"
        "  --row NAME            only this row; may be given several times\n"
        "  --repetitions N       of each measurement, 1 to %d; by default 7 (cpu) or 21 (paper), of which the median\n"
        "                        is taken, and 3 of calls that take longer than a second\n"
        "  --threads N           suite cpu: at this number of threads only, 1 to %d\n"
        "  --device N            a device's number in \"loglin devices\", or a part of its name (LOGLIN_DEVICE)\n"
        "  --engine NAME         auto (the default of paper), blas or fused (the default of cpu)\n"
        "  --json                print the report as a JSON object\n"
        "  --help                print this text\n",
        LOGLIN_BENCH_MAX_REPETITIONS, MAX_THREADS);
}

static loglin_cli_status parse_suite(const char *value, loglin_bench_options *options) {
    static const loglin_bench_suite *const suites[] = {&loglin_cli_bench_cpu, &loglin_cli_bench_paper};
    for (size_t i = 0; i < sizeof suites / sizeof suites[0]; ++i) {
        if (strcmp(value, suites[i]->name) == 0) {
            options->suite = suites[i];
            return LOGLIN_CLI_OK;
        }
    }
    return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "--suite is \"%s\", expected cpu or paper", value);
}

static loglin_cli_status parse_option(char **argv, int option, loglin_bench_options *options) {
    switch (option) {
    case 's':
        return parse_suite(optarg, options);
    case 'd':
        options->device = optarg;
        return LOGLIN_CLI_OK;
    case 'r':
        if (options->row_count == LOGLIN_BENCH_MAX_ROWS) {
            return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "--row is given more than %d times", LOGLIN_BENCH_MAX_ROWS);
        }
        options->rows[options->row_count++] = optarg;
        return LOGLIN_CLI_OK;
    case 'n':
        return loglin_cli_parse_size("--repetitions", optarg, 1, LOGLIN_BENCH_MAX_REPETITIONS, &options->repetitions);
    case 't':
        return loglin_cli_parse_size("--threads", optarg, 1, MAX_THREADS, &options->threads);
    case 'e':
        options->engine_name = optarg;
        return loglin_cli_parse_engine(optarg, &options->engine);
    case 'j':
        options->json = true;
        return LOGLIN_CLI_OK;
    case 'h':
        options->help = true;
        return LOGLIN_CLI_OK;
    default:
        return loglin_cli_bad_option(argv, option);
    }
}

static loglin_cli_status check_row(const loglin_bench_suite *suite, const char *name) {
    char names[1024] = "";
    size_t used = 0;
    for (size_t i = 0; i < suite->count; ++i) {
        if (strcmp(suite->rows[i].name, name) == 0) {
            return LOGLIN_CLI_OK;
        }
        used += (size_t)snprintf(names + used, used < sizeof names ? sizeof names - used : 0, "%s%s", i > 0 ? ", " : "",
                                 suite->rows[i].name);
    }
    return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "--row is \"%s\", expected a row of the suite %s: %s", name,
                           suite->name, names);
}

static loglin_cli_status parse(int argc, char **argv, loglin_bench_options *options) {
    static const struct option table[] = {
        {"suite", required_argument, NULL, 's'},
        {"device", required_argument, NULL, 'd'},
        {"row", required_argument, NULL, 'r'},
        {"repetitions", required_argument, NULL, 'n'},
        {"engine", required_argument, NULL, 'e'},
        {"threads", required_argument, NULL, 't'},
        {"json", no_argument, NULL, 'j'},
        {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0},
    };
    opterr = 0;
    for (int option; (option = getopt_long(argc, argv, ":", table, NULL)) != -1;) {
        RETURN_IF_FAILED(parse_option(argv, option, options));
    }
    if (options->help) {
        print_help();
        return LOGLIN_CLI_OK;
    }
    if (optind != argc) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "bench: \"%s\" is not expected", argv[optind]);
    }
    if (options->suite == NULL) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "bench: --suite is missing, expected cpu or paper");
    }
    if (options->threads > 0 && options->suite != &loglin_cli_bench_cpu) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "--threads is %zu, expected only with --suite cpu",
                               options->threads);
    }
    for (size_t i = 0; i < options->row_count; ++i) {
        RETURN_IF_FAILED(check_row(options->suite, options->rows[i]));
    }
    if (options->engine_name == NULL) {
        options->engine = options->suite->engine;
    }
    return LOGLIN_CLI_OK;
}

/* ---- Measuring in this process ------------------------------------------------------------------------------------ */

static bool is_chosen(const loglin_bench_options *options, const char *name) {
    for (size_t i = 0; i < options->row_count; ++i) {
        if (strcmp(options->rows[i], name) == 0) {
            return true;
        }
    }
    return options->row_count == 0;
}

static loglin_cli_status print_json(const json_t *report) {
    const bool printed = report != NULL && json_dumpf(report, stdout, JSON_INDENT(2)) == 0 && putchar('\n') != EOF &&
                         fflush(stdout) == 0;
    return printed ? LOGLIN_CLI_OK : loglin_cli_fail(LOGLIN_CLI_FAILED, "the report cannot be printed");
}

static void print_machine(const loglin_bench_options *options, const loglin_device_info *info,
                          const loglin_bench_sgemm *sgemm) {
    (void)printf("suite %s on %s (%s), %u compute units", options->suite->name, info->name, info->platform_name,
                 (unsigned)info->compute_units);
    if (options->threads > 0) {
        (void)printf(", %zu thread%s, OpenBLAS %s", options->threads, options->threads > 1 ? "s" : "",
                     sgemm != NULL ? "found" : "missing");
    }
    (void)printf("\n");
    loglin_cli_bench_print_heading();
}

/* Rows of the suite, printed as they come; with --json all at the end. */
static loglin_cli_status run_rows(const loglin_bench_options *options, loglin_bench_machine *machine,
                                  loglin_bench_sgemm *sgemm) {
    bool good = true;
    json_t *rows = json_array();
    if (!options->json) {
        print_machine(options, &machine->info, sgemm);
    }
    for (size_t i = 0; i < options->suite->count; ++i) {
        if (!is_chosen(options, options->suite->rows[i].name)) {
            continue;
        }
        json_t *row = loglin_cli_bench_row(machine, options, sgemm, &options->suite->rows[i], &good);
        if (!options->json && row != NULL) {
            loglin_cli_bench_print_row(row);
        }
        (void)json_array_append_new(rows, row);
    }
    json_t *report = json_pack("{s:s, s:s, s:s, s:s, s:I, s:I, s:b, s:o}", "suite", options->suite->name, "device",
                               machine->info.name, "platform", machine->info.platform_name, "driver",
                               machine->info.driver, "compute_units", (json_int_t)machine->info.compute_units,
                               "threads", (json_int_t)options->threads, "openblas", sgemm != NULL, "rows", rows);
    const loglin_cli_status status = options->json ? print_json(report) : LOGLIN_CLI_OK;
    json_decref(report);
    if (status == LOGLIN_CLI_OK && !good) {
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "bench: a row failed, or its outputs are wrong");
    }
    return status;
}

static loglin_cli_status measure_here(const loglin_bench_options *options) {
    loglin_bench_machine machine = {.random = 1};
    loglin_cli_status status = loglin_cli_bench_machine_open(&machine, options->device);
    if (status == LOGLIN_CLI_OK && options->threads > 0 && (machine.info.type & CL_DEVICE_TYPE_CPU) == 0) {
        status = loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "--suite cpu: the device %s is no CPU", machine.info.name);
    }
    if (status == LOGLIN_CLI_OK) {
        loglin_bench_sgemm *sgemm =
            options->threads > 0 ? loglin_cli_bench_sgemm_open(&machine, (int)options->threads) : NULL;
        status = run_rows(options, &machine, sgemm);
        loglin_cli_bench_sgemm_close(sgemm);
    }
    loglin_cli_bench_machine_close(&machine);
    return status;
}

/* ---- One process for each number of threads ----------------------------------------------------------------------- */

/* Whether a variable has the value; sets it if not. */
static bool has_setting(const char *name, const char *value) {
    const char *found = getenv(name);
    if (found != NULL && strcmp(found, value) == 0) {
        return true;
    }
    (void)setenv(name, value, 1);
    return false;
}

/* PoCL's threads, each on a core of its own; OpenBLAS's go to sleep at once, so that they are not in the way. */
static bool has_environment(size_t threads) {
    char count[24];
    (void)snprintf(count, sizeof count, "%zu", threads);
    const bool counted = has_setting("POCL_MAX_PTHREAD_COUNT", count);
    const bool pinned = has_setting("POCL_AFFINITY", "1");
    const bool quiet = has_setting("OPENBLAS_THREAD_TIMEOUT", "4");
    return counted && pinned && quiet;
}

static loglin_cli_status measure_with_threads(const loglin_bench_options *options, char **argv) {
    if (has_environment(options->threads)) {
        return measure_here(options);
    }
    char **arguments = argv - 1; /* main's: the command's name is before the subcommand's */
    (void)execv(self, arguments);
    return loglin_cli_fail(LOGLIN_CLI_FAILED, "%s: %s", self, strerror(errno));
}

static void run_child(const loglin_bench_options *options, size_t threads, int out) {
    char thread_text[24];
    char repetition_text[24];
    const char *arguments[MAX_CHILD_ARGUMENTS] = {"loglin", "bench",     "--suite",  options->suite->name,
                                                  "--json", "--threads", thread_text};
    size_t count = 7;
    (void)snprintf(thread_text, sizeof thread_text, "%zu", threads);
    (void)snprintf(repetition_text, sizeof repetition_text, "%zu", options->repetitions);
    const struct {
        const char *name, *value;
    } optional[] = {{"--device", options->device},
                    {"--engine", options->engine_name},
                    {"--repetitions", options->repetitions > 0 ? repetition_text : NULL}};
    for (size_t i = 0; i < sizeof optional / sizeof optional[0]; ++i) {
        if (optional[i].value != NULL) {
            arguments[count++] = optional[i].name;
            arguments[count++] = optional[i].value;
        }
    }
    for (size_t i = 0; i < options->row_count; ++i) {
        arguments[count++] = "--row";
        arguments[count++] = options->rows[i];
    }
    if (dup2(out, STDOUT_FILENO) >= 0) {
        (void)execv(self, (char *const *)arguments);
    }
    (void)fprintf(stderr, "loglin: %s: %s\n", self, strerror(errno));
    _exit(LOGLIN_CLI_FAILED);
}

/* The report of a child; NULL, and a message, if there is none. */
static json_t *read_report(int in) {
    json_error_t error;
    FILE *stream = fdopen(in, "r");
    if (stream == NULL) {
        (void)close(in);
        return NULL;
    }
    json_t *report = json_loadf(stream, 0, &error);
    (void)fclose(stream);
    return report;
}

/* Runs the suite at a number of threads; *report is due to json_decref, NULL if there is none. */
static loglin_cli_status measure_in_child(const loglin_bench_options *options, size_t threads, json_t **report) {
    int ends[2];
    int ended = 0;
    if (pipe(ends) != 0) {
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "pipe: %s", strerror(errno));
    }
    const pid_t child = fork();
    if (child == 0) {
        (void)close(ends[0]);
        run_child(options, threads, ends[1]);
    }
    (void)close(ends[1]);
    if (child < 0) {
        (void)close(ends[0]);
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "fork: %s", strerror(errno));
    }
    *report = read_report(ends[0]);
    while (waitpid(child, &ended, 0) < 0 && errno == EINTR) {
    }
    if (!WIFEXITED(ended)) {
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "bench: the run with %zu threads was ended by signal %d", threads,
                               WTERMSIG(ended));
    }
    return (loglin_cli_status)WEXITSTATUS(ended); /* it has said why */
}

/* The nominal rate of the row that both parts measure; 0 if it is not there. */
static double single_rate(const json_t *report) {
    size_t i;
    json_t *row;
    json_array_foreach(json_object_get(report, "rows"), i, row) {
        if (strcmp(json_string_value(json_object_get(row, "name")), loglin_cli_bench_single) == 0) {
            return json_number_value(json_object_get(row, "giga_per_s"));
        }
    }
    return 0.0;
}

/* The rate of one sequence and head at two threads over that at one; NULL if it was not measured. */
static json_t *two_cores_row(const json_t *one, const json_t *two) {
    const double slow = single_rate(one);
    const double fast = single_rate(two);
    json_t *row = slow > 0 && fast > 0 ? json_pack("{s:s}", "name", loglin_cli_bench_two_cores) : NULL;
    if (row != NULL) {
        loglin_cli_bench_set_value(row, fast / slow, "x one core", loglin_cli_bench_two_cores_required, 0.0, false);
    }
    return row;
}

static void print_part(const json_t *report) {
    size_t i;
    json_t *row;
    const long long threads = (long long)json_integer_value(json_object_get(report, "threads"));
    (void)printf("suite cpu on %s (%s), %lld compute units, %lld thread%s, OpenBLAS %s\n",
                 json_string_value(json_object_get(report, "device")),
                 json_string_value(json_object_get(report, "platform")),
                 (long long)json_integer_value(json_object_get(report, "compute_units")), threads,
                 threads > 1 ? "s" : "", json_is_true(json_object_get(report, "openblas")) ? "found" : "missing");
    loglin_cli_bench_print_heading();
    json_array_foreach(json_object_get(report, "rows"), i, row) {
        loglin_cli_bench_print_row(row);
    }
    (void)printf("\n");
}

static loglin_cli_status measure_at_each(const loglin_bench_options *options) {
    json_t *parts[2] = {NULL, NULL};
    loglin_cli_status status = LOGLIN_CLI_OK;
    for (size_t i = 0; i < 2 && status != LOGLIN_CLI_BAD_INPUT; ++i) {
        const loglin_cli_status ended = measure_in_child(options, i + 1, &parts[i]);
        status = ended != LOGLIN_CLI_OK ? ended : status;
        if (!options->json && parts[i] != NULL) {
            print_part(parts[i]);
        }
    }
    json_t *two_cores = two_cores_row(parts[0], parts[1]);
    if (!options->json && two_cores != NULL) {
        loglin_cli_bench_print_row(two_cores);
    }
    if (options->json && parts[0] != NULL && parts[1] != NULL) {
        json_t *report = json_pack("{s:s, s:[O, O], s:O?}", "suite", options->suite->name, "parts", parts[0], parts[1],
                                   "single_two_cores", two_cores);
        const loglin_cli_status printed = print_json(report);
        status = status == LOGLIN_CLI_OK ? printed : status;
        json_decref(report);
    }
    json_decref(parts[0]);
    json_decref(parts[1]);
    json_decref(two_cores);
    return status;
}

loglin_cli_status loglin_cli_bench(int argc, char **argv) {
    loglin_bench_options options = {0};
    const loglin_cli_status parsed = parse(argc, argv, &options);
    if (parsed != LOGLIN_CLI_OK || options.suite == NULL || options.help) { /* no suite: an error or --help */
        return parsed;
    }
    if (options.suite != &loglin_cli_bench_cpu) {
        return measure_here(&options);
    }
    return options.threads > 0 ? measure_with_threads(&options, argv) : measure_at_each(&options);
}
