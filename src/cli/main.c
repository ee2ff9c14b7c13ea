/* SPDX-License-Identifier: Apache-2.0 */
/* The command: chooses the subcommand. */
#include "cli/commands.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static const struct {
    const char *name;
    loglin_cli_status (*run)(int argc, char **argv);
    const char *summary;
} commands[] = {
    {"devices", loglin_cli_devices, "list the OpenCL devices"},
    {"forward", loglin_cli_forward, "compute the output and the final states of a file's sequences"},
    {"backward", loglin_cli_backward, "compute the gradients"},
    {"decode", loglin_cli_decode, "compute what forward does, token by token"},
    {"logits", loglin_cli_logits, "compute a language model's logits of token ids"},
    {"generate", loglin_cli_generate, "continue a text with a language model"},
    {"tune", loglin_cli_tune, "measure what is fastest on a device, for all later runs"},
    {"perplexity", loglin_cli_perplexity, "score a text with a language model"},
    {"bench", loglin_cli_bench, "measure speed against the figures that it should reach"},
};

enum { COMMAND_COUNT = sizeof commands / sizeof commands[0] };

static loglin_cli_status print_help(FILE *stream) {
    (void)fprintf(stream, "usage: loglin COMMAND [ARGUMENTS]\n"
                          "       loglin COMMAND --help\n"
                          "       loglin --version\n"
                          "\n"
                          "Log-linear attention on OpenCL devices.\n"
                          "\n"
                          "commands:\n");
    for (size_t i = 0; i < COMMAND_COUNT; ++i) {
        (void)fprintf(stream, "  %-12s%s\n", commands[i].name, commands[i].summary);
    }
    return LOGLIN_CLI_OK;
}

/* Where the caller has closed a standard stream, no file may get its number: what is printed would go into that file. */
static void occupy_standard_streams(void) {
    for (int stream = STDIN_FILENO; stream <= STDERR_FILENO; ++stream) {
        if (fcntl(stream, F_GETFD) == -1) {
            (void)open("/dev/null", stream == STDIN_FILENO ? O_WRONLY : O_RDONLY); /* stays an error to use */
        }
    }
}

static loglin_cli_status run(int argc, char **argv) {
    const char *name = argv[1];
    if (strcmp(name, "help") == 0 || strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0) {
        return print_help(stdout);
    }
    if (strcmp(name, "--version") == 0) {
        (void)printf("loglin %s\n", loglin_version());
        return LOGLIN_CLI_OK;
    }
    for (size_t i = 0; i < COMMAND_COUNT; ++i) {
        if (strcmp(name, commands[i].name) == 0) {
            return commands[i].run(argc - 1, argv + 1);
        }
    }
    return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "unknown command \"%s\"; \"loglin help\" lists them", name);
}

int main(int argc, char **argv) {
    occupy_standard_streams();
    if (argc < 2) {
        (void)print_help(stderr);
        return LOGLIN_CLI_BAD_INPUT;
    }
    if (strcmp(argv[1], "tune-worker") == 0 && argc == 3) {
        return loglin_tune_worker(argv[2]); /* one measurement of "loglin tune", which starts it */
    }
    const loglin_cli_status status = run(argc, argv);
    if ((fflush(stdout) != 0 || ferror(stdout) != 0) && status == LOGLIN_CLI_OK) {
        return (int)loglin_cli_fail(LOGLIN_CLI_FAILED, "standard output: not all of it could be written");
    }
    return (int)status;
}
