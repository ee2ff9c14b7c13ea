/* SPDX-License-Identifier: Apache-2.0 */
/* The arguments that forward, backward and decode share. */
#ifndef LOGLIN_CLI_ARGUMENTS_H
#define LOGLIN_CLI_ARGUMENTS_H

#include "cli/status.h"
#include <stdbool.h>

typedef struct loglin_cli_arguments {
    const char *in, *out; /* paths */
    const char *device;   /* a selector, or NULL */
    loglin_engine engine;
    size_t chunk; /* 0: not given */
    loglin_partition partition;
    bool normalize_qk;
    float scale; /* 0: not given */
    bool json;
    bool check;
    bool help; /* was asked for and printed: nothing else is to be done */
} loglin_cli_arguments;

/* Parses the arguments of a subcommand, argv[0]; `summary` and `files` are its part of the help text. */
loglin_cli_status loglin_cli_parse_arguments(int argc, char **argv, const char *summary, const char *files,
                                             loglin_cli_arguments *arguments);

/* The message for what getopt_long, whose options are all long, returned as '?' or ':'. */
loglin_cli_status loglin_cli_bad_option(char **argv, int option);

/* The value of --engine. */
loglin_cli_status loglin_cli_parse_engine(const char *value, loglin_engine *engine);

#endif
