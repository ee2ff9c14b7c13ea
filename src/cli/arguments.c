/* SPDX-License-Identifier: Apache-2.0 */
/* Parsing of the command line. */
#include "cli/arguments.h"

#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void print_help(const char *command, const char *summary, const char *files) {
    (void)printf(
        "usage: loglin %s IN OUT [OPTIONS]\n"
        "\n"
        "%s\n"
        "\n"
        "%s\n"
        "\n"
        "options:\n"
        "  --device N            a device's number in \"loglin devices\", or a part of its name (LOGLIN_DEVICE)\n"
        "  --engine NAME         auto, blas or fused\n"
        "  --chunk C             tokens of a chunk, a power of two from 16 to 256\n"
        "  --partition NAME      weak (default) or strong\n"
        "  --normalize-qk        divide q and k by their lengths first\n"
        "  --scale X             multiply q by X\n"
        "  --check               compare the outputs with the tensors of the same names in IN\n"
        "  --json                print the report as a JSON object\n"
        "  --help                print this text\n",
        command, summary, files);
}

static loglin_cli_status bad_value(const char *option, const char *value, const char *expected) {
    return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s is \"%s\", expected %s", option, value, expected);
}

loglin_cli_status loglin_cli_bad_option(char **argv, int option) {
    const char *last = argv[optind - 1];
    const bool assigned = strncmp(last, "--", 2) == 0 && strchr(last, '=') != NULL;
    const char letter[] = {'-', (char)optopt, '\0'};
    /* optopt is the letter of "-x", but also stands for an option that is there, if its value is what is wrong. */
    const char *name = option == '?' && optopt != 0 && !assigned ? letter : last;
    const char *fault = option == ':'             ? "a value is missing"
                        : assigned && optopt != 0 ? "no value is expected"
                                                  : "no such option";
    return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s: %s; \"loglin %s --help\" lists the options", name, fault,
                           argv[0]);
}

loglin_cli_status loglin_cli_parse_engine(const char *value, loglin_engine *engine) {
    if (strcmp(value, "auto") == 0) {
        *engine = LOGLIN_ENGINE_AUTO;
    } else if (strcmp(value, "blas") == 0) {
        *engine = LOGLIN_ENGINE_BLAS;
    } else if (strcmp(value, "fused") == 0) {
        *engine = LOGLIN_ENGINE_FUSED;
    } else {
        return bad_value("--engine", value, "auto, blas or fused");
    }
    return LOGLIN_CLI_OK;
}

static loglin_cli_status parse_partition(const char *value, loglin_partition *partition) {
    if (strcmp(value, "weak") == 0) {
        *partition = LOGLIN_WEAK;
    } else if (strcmp(value, "strong") == 0) {
        *partition = LOGLIN_STRONG;
    } else {
        return bad_value("--partition", value, "weak or strong");
    }
    return LOGLIN_CLI_OK;
}

static loglin_cli_status parse_chunk(const char *value, size_t *chunk) {
    for (size_t size = 16; size <= 256; size *= 2) {
        char text[8];
        (void)snprintf(text, sizeof text, "%zu", size);
        if (strcmp(value, text) == 0) {
            *chunk = size;
            return LOGLIN_CLI_OK;
        }
    }
    return bad_value("--chunk", value, "16, 32, 64, 128 or 256");
}

static loglin_cli_status parse_scale(const char *value, float *scale) {
    char *end;
    *scale = strtof(value, &end);
    if (end == value || *end != '\0' || !isfinite(*scale) || *scale == 0.0F) {
        return bad_value("--scale", value, "a finite number other than 0");
    }
    return LOGLIN_CLI_OK;
}

static loglin_cli_status parse_option(int option, loglin_cli_arguments *arguments) {
    switch (option) {
    case 'd':
        arguments->device = optarg;
        return LOGLIN_CLI_OK;
    case 'e':
        return loglin_cli_parse_engine(optarg, &arguments->engine);
    case 'c':
        return parse_chunk(optarg, &arguments->chunk);
    case 'p':
        return parse_partition(optarg, &arguments->partition);
    case 'n':
        arguments->normalize_qk = true;
        return LOGLIN_CLI_OK;
    case 's':
        return parse_scale(optarg, &arguments->scale);
    case 'k':
        arguments->check = true;
        return LOGLIN_CLI_OK;
    case 'j':
        arguments->json = true;
        return LOGLIN_CLI_OK;
    default:
        arguments->help = true;
        return LOGLIN_CLI_OK;
    }
}

loglin_cli_status loglin_cli_parse_arguments(int argc, char **argv, const char *summary, const char *files,
                                             loglin_cli_arguments *arguments) {
    static const struct option options[] = {
        {"device", required_argument, NULL, 'd'}, {"engine", required_argument, NULL, 'e'},
        {"chunk", required_argument, NULL, 'c'},  {"partition", required_argument, NULL, 'p'},
        {"normalize-qk", no_argument, NULL, 'n'}, {"scale", required_argument, NULL, 's'},
        {"check", no_argument, NULL, 'k'},        {"json", no_argument, NULL, 'j'},
        {"help", no_argument, NULL, 'h'},         {NULL, 0, NULL, 0},
    };
    *arguments = (loglin_cli_arguments){0};
    opterr = 0;
    for (int option; (option = getopt_long(argc, argv, ":", options, NULL)) != -1;) {
        if (option == '?' || option == ':') {
            return loglin_cli_bad_option(argv, option);
        }
        RETURN_IF_FAILED(parse_option(option, arguments));
    }
    if (arguments->help) {
        print_help(argv[0], summary, files);
        return LOGLIN_CLI_OK;
    }
    if (argc - optind != 2) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s: %d files are named, expected 2: IN and OUT", argv[0],
                               argc - optind);
    }
    arguments->in = argv[optind];
    arguments->out = argv[optind + 1];
    return LOGLIN_CLI_OK;
}
