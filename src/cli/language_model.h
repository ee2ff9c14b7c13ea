/* SPDX-License-Identifier: Apache-2.0 */
/* What logits, generate and perplexity have in common: options, and a model on a device. */
#ifndef LOGLIN_CLI_LANGUAGE_MODEL_H
#define LOGLIN_CLI_LANGUAGE_MODEL_H

#include "cli/status.h"
#include "loglin_model.h"
#include <getopt.h>
#include <stdbool.h>

/* Options that all three have; --model must be given. */
typedef struct loglin_cli_model_options {
    const char *folder;
    const char *device; /* a selector, or NULL */
    loglin_model_options model;
    bool json, help;
} loglin_cli_model_options;

/* Rows of a getopt_long table, and what is done with them; other options are the subcommand's, chars from 'A' on. */
#define LOGLIN_CLI_MODEL_OPTIONS                                                                                       \
    {"model", required_argument, NULL, 'm'}, {"device", required_argument, NULL, 'd'},                                 \
        {"dtype", required_argument, NULL, 't'}, {"engine", required_argument, NULL, 'e'}, {                           \
        "help", no_argument, NULL, 'h'                                                                                 \
    }
#define LOGLIN_CLI_MODEL_HELP                                                                                          \
    "  --model DIR           a Hugging Face folder with config.json and model.safetensors\n"                           \
    "  --device N            a device's number in \"loglin devices\", or a part of its name (LOGLIN_DEVICE)\n"         \
    "  --dtype NAME          storage between the kernels: f32 (default), f16 or bf16\n"                                \
    "  --engine NAME         auto, blas or fused\n"

/* Takes what getopt_long returned, of a table with these rows. */
loglin_cli_status loglin_cli_model_option(char **argv, int option, loglin_cli_model_options *options);

/* Numbers of an option's value. */
loglin_cli_status loglin_cli_parse_size(const char *option, const char *value, size_t min, size_t max, size_t *number);
loglin_cli_status loglin_cli_parse_real(const char *option, const char *value, double min, double max, double *number);

typedef struct loglin_cli_model {
    cl_context context;
    cl_command_queue queue;
    loglin_device *device;
    loglin_model *model;
    loglin_session *session;
    loglin_model_info info;
} loglin_cli_model;

/*
 * *model must be zero before; loglin_cli_model_close is due in any case.  Until the first result something may compile:
 * behind that loglin_cli_waiting_end is due.
 */
loglin_cli_status loglin_cli_model_open(const loglin_cli_model_options *options, loglin_cli_model *model);
loglin_cli_status loglin_cli_model_start(loglin_cli_model *model, size_t sequences);
void loglin_cli_model_close(loglin_cli_model *model);

/* As loglin_cli_fail_library; a folder that is not a good model is bad input. */
loglin_cli_status loglin_cli_fail_model(loglin_status status);

/* Rows of logits before the first that is not finite. */
size_t loglin_cli_finite_rows(const float *logits, size_t rows, size_t vocabulary);

#define LOGLIN_CLI_NOT_FINITE "not finite: values of the model overflow"

/* The name of an operator, for reports. */
const char *loglin_cli_model_kind(const loglin_cli_model *model);

#endif
