/* SPDX-License-Identifier: Apache-2.0 */
/* A model on a device, from the command line. */
#include "cli/language_model.h"

#include "cli/arguments.h"
#include "cli/waiting.h"
#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

loglin_cli_status loglin_cli_parse_size(const char *option, const char *value, size_t min, size_t max, size_t *number) {
    char *end;
    errno = 0;
    const unsigned long long parsed = strtoull(value, &end, 10);
    if (!isdigit((unsigned char)value[0]) || *end != '\0' || errno != 0 || parsed < min || parsed > max) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s is \"%s\", expected an integer from %zu to %zu", option, value,
                               min, max);
    }
    *number = (size_t)parsed;
    return LOGLIN_CLI_OK;
}

loglin_cli_status loglin_cli_parse_real(const char *option, const char *value, double min, double max, double *number) {
    char *end;
    *number = strtod(value, &end);
    if (end == value || *end != '\0' || !(*number >= min && *number <= max)) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s is \"%s\", expected a number from %g to %g", option, value,
                               min, max);
    }
    return LOGLIN_CLI_OK;
}

static loglin_cli_status parse_dtype(const char *value, loglin_dtype *dtype) {
    static const char *const names[] = {[LOGLIN_F32] = "f32", [LOGLIN_F16] = "f16", [LOGLIN_BF16] = "bf16"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; ++i) {
        if (strcmp(value, names[i]) == 0) {
            *dtype = (loglin_dtype)i;
            return LOGLIN_CLI_OK;
        }
    }
    return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "--dtype is \"%s\", expected f32, f16 or bf16", value);
}

loglin_cli_status loglin_cli_model_option(char **argv, int option, loglin_cli_model_options *options) {
    switch (option) {
    case 'm':
        options->folder = optarg;
        return LOGLIN_CLI_OK;
    case 'd':
        options->device = optarg;
        return LOGLIN_CLI_OK;
    case 't':
        return parse_dtype(optarg, &options->model.dtype);
    case 'e':
        return loglin_cli_parse_engine(optarg, &options->model.engine);
    case 'h':
        options->help = true;
        return LOGLIN_CLI_OK;
    default:
        return loglin_cli_bad_option(argv, option);
    }
}

loglin_cli_status loglin_cli_fail_model(loglin_status status) {
    const bool bad_input = status == LOGLIN_INVALID_ARGUMENT || status == LOGLIN_BAD_FILE || status == LOGLIN_IO ||
                           status == LOGLIN_UNSUPPORTED;
    return loglin_cli_fail(bad_input ? LOGLIN_CLI_BAD_INPUT : LOGLIN_CLI_FAILED, "%s: %s", loglin_strerror(status),
                           loglin_last_error());
}

loglin_cli_status loglin_cli_model_open(const loglin_cli_model_options *options, loglin_cli_model *model) {
    if (options->folder == NULL) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "--model is missing");
    }
    cl_device_id id;
    loglin_status status = loglin_select_device(options->device, &id);
    if (status != LOGLIN_OK) {
        return loglin_cli_fail_library(status);
    }
    cl_int code;
    model->context = clCreateContext(NULL, 1, &id, NULL, NULL, &code);
    if (code != CL_SUCCESS) {
        return loglin_cli_fail_opencl(code, "clCreateContext");
    }
    model->queue = clCreateCommandQueueWithProperties(model->context, id, NULL, &code);
    if (code != CL_SUCCESS) {
        return loglin_cli_fail_opencl(code, "clCreateCommandQueueWithProperties");
    }
    loglin_cli_waiting_begin();
    status = loglin_device_create(model->context, id, &model->device);
    if (status != LOGLIN_OK) {
        return loglin_cli_fail_library(status);
    }
    status = loglin_model_open(model->device, model->queue, options->folder, &options->model, &model->model);
    if (status != LOGLIN_OK) {
        return loglin_cli_fail_model(status);
    }
    loglin_model_get_info(model->model, &model->info);
    return LOGLIN_CLI_OK;
}

loglin_cli_status loglin_cli_model_start(loglin_cli_model *model, size_t sequences) {
    const loglin_status status = loglin_session_create(model->model, model->queue, sequences, &model->session);
    return status == LOGLIN_OK ? LOGLIN_CLI_OK : loglin_cli_fail_model(status);
}

void loglin_cli_model_close(loglin_cli_model *model) {
    loglin_session_destroy(model->session);
    loglin_model_close(model->model);
    loglin_device_destroy(model->device);
    if (model->queue != NULL) {
        (void)clReleaseCommandQueue(model->queue);
    }
    if (model->context != NULL) {
        (void)clReleaseContext(model->context);
    }
    *model = (loglin_cli_model){0};
}

size_t loglin_cli_finite_rows(const float *logits, size_t rows, size_t vocabulary) {
    for (size_t i = 0; i < rows * vocabulary; ++i) {
        if (!isfinite(logits[i])) {
            return i / vocabulary;
        }
    }
    return rows;
}

const char *loglin_cli_model_kind(const loglin_cli_model *model) {
    return model->info.op == LOGLIN_GATED_DELTA ? "log-linear Gated DeltaNet" : "log-linear Mamba-2";
}
