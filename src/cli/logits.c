/* SPDX-License-Identifier: Apache-2.0 */
/* loglin logits: the logits of a file's token ids. */
#include "cli/commands.h"

#include "cli/language_model.h"
#include "cli/session.h"
#include "cli/waiting.h"
#include "tensorfile/safetensors.h"
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct logits_run {
    loglin_cli_model_options options;
    bool check;
    const char *in, *out;
    loglin_safetensors *file;
    loglin_cli_model model;
    size_t batch, length;
    int32_t *ids;
    float *logits;
    double ms, error; /* error: -1 if there is nothing to compare with */
} logits_run;

static loglin_cli_status parse(int argc, char **argv, logits_run *run) {
    static const struct option table[] = {LOGLIN_CLI_MODEL_OPTIONS,
                                          {"check", no_argument, NULL, 'C'},
                                          {"json", no_argument, NULL, 'J'},
                                          {NULL, 0, NULL, 0}};
    opterr = 0;
    for (int option; (option = getopt_long(argc, argv, ":", table, NULL)) != -1;) {
        if (option == 'C') {
            run->check = true;
        } else if (option == 'J') {
            run->options.json = true;
        } else {
            RETURN_IF_FAILED(loglin_cli_model_option(argv, option, &run->options));
        }
    }
    if (run->options.help) {
        (void)printf("usage: loglin logits --model DIR IN OUT [OPTIONS]\n"
                     "\n"
                     "Computes the logits of token ids.\n"
                     "\n"
                     "IN     input_ids [B,T], I32 or I64\n"
                     "OUT    logits [B,T,vocabulary], F32\n"
                     "\n"
                     "options:\n" LOGLIN_CLI_MODEL_HELP "  --check               compare with the tensor logits in IN\n"
                     "  --json                print the report as a JSON object\n"
                     "  --help                print this text\n");
        return LOGLIN_CLI_OK;
    }
    if (argc - optind != 2) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "logits: %d files are named, expected 2: IN and OUT",
                               argc - optind);
    }
    run->in = argv[optind];
    run->out = argv[optind + 1];
    return LOGLIN_CLI_OK;
}

/* I32 or I64, which may be unaligned. */
static loglin_cli_status copy_ids(const char *path, const loglin_tensor *tensor, int32_t *ids) {
    for (size_t i = 0; i < loglin_tensor_count(tensor); ++i) {
        int64_t id = 0;
        if (tensor->dtype == LOGLIN_TENSOR_I64) {
            memcpy(&id, (const char *)tensor->data + i * sizeof id, sizeof id);
        } else {
            int32_t narrow;
            memcpy(&narrow, (const char *)tensor->data + i * sizeof narrow, sizeof narrow);
            id = narrow;
        }
        if (id < 0 || id > INT32_MAX) {
            return loglin_cli_fail(
                LOGLIN_CLI_BAD_INPUT,
                "%s: tensor \"input_ids\": value %zu is %lld, expected 0 to less than the vocabulary", path, i,
                (long long)id);
        }
        ids[i] = (int32_t)id;
    }
    return LOGLIN_CLI_OK;
}

static loglin_cli_status read_input(logits_run *run) {
    loglin_tensor_error error;
    if (!loglin_safetensors_open(run->in, &run->file, &error)) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s: %s", run->in, error.text);
    }
    const loglin_tensor *ids = loglin_safetensors_find(run->file, "input_ids");
    if (ids == NULL || (ids->dtype != LOGLIN_TENSOR_I32 && ids->dtype != LOGLIN_TENSOR_I64) || ids->rank != 2 ||
        ids->size == 0) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT,
                               "%s: tensor \"input_ids\" is missing, empty, or not [B,T] of I32 or I64", run->in);
    }
    run->batch = ids->shape[0];
    run->length = ids->shape[1];
    run->ids = calloc(loglin_tensor_count(ids), sizeof *run->ids);
    if (run->ids == NULL) {
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "out of memory");
    }
    return copy_ids(run->in, ids, run->ids);
}

/* The reference, if it is asked for. */
static loglin_cli_status find_reference(const logits_run *run, const loglin_tensor **reference) {
    *reference = NULL;
    if (!run->check) {
        return LOGLIN_CLI_OK;
    }
    const loglin_tensor *tensor = loglin_safetensors_find(run->file, "logits");
    if (tensor == NULL || tensor->dtype != LOGLIN_TENSOR_F32 || tensor->rank != 3 || tensor->shape[0] != run->batch ||
        tensor->shape[1] != run->length || tensor->shape[2] != run->model.info.vocabulary) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s: --check expects a tensor \"logits\" [%zu,%zu,%zu] of F32",
                               run->in, run->batch, run->length, run->model.info.vocabulary);
    }
    *reference = tensor;
    return LOGLIN_CLI_OK;
}

static double relative_error(const float *got, const loglin_tensor *reference) {
    double difference = 0;
    double norm = 0;
    for (size_t i = 0; i < loglin_tensor_count(reference); ++i) {
        float expected;
        memcpy(&expected, (const char *)reference->data + i * sizeof expected, sizeof expected);
        const double distance = (double)got[i] - (double)expected;
        difference += distance * distance;
        norm += (double)expected * (double)expected;
    }
    return difference == 0 ? 0 : sqrt(difference / norm);
}

static loglin_cli_status write_output(const logits_run *run, size_t count) {
    const loglin_tensor tensor = {.name = "logits",
                                  .dtype = LOGLIN_TENSOR_F32,
                                  .rank = 3,
                                  .shape = {run->batch, run->length, run->model.info.vocabulary},
                                  .data = run->logits,
                                  .size = count * sizeof(float)};
    loglin_tensor_error error;
    if (!loglin_safetensors_write(run->out, &tensor, 1, NULL, 0, &error)) {
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "%s: %s", run->out, error.text);
    }
    return LOGLIN_CLI_OK;
}

static loglin_cli_status compute(logits_run *run) {
    const loglin_tensor *reference = NULL;
    size_t count = 0;
    loglin_tensor_error error;
    RETURN_IF_FAILED(read_input(run));
    if (!loglin_safetensors_can_write(run->out, &error)) {
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "%s: %s", run->out, error.text);
    }
    RETURN_IF_FAILED(loglin_cli_model_open(&run->options, &run->model));
    RETURN_IF_FAILED(find_reference(run, &reference));
    if (__builtin_mul_overflow(run->batch * run->length, run->model.info.vocabulary, &count) ||
        count > SIZE_MAX / sizeof(float)) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s: the size of the logits overflows", run->in);
    }
    RETURN_IF_FAILED(loglin_cli_model_start(&run->model, run->batch));
    run->logits = malloc(count * sizeof *run->logits);
    if (run->logits == NULL) {
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "out of memory: %zu logits", count);
    }
    const double begin = loglin_cli_now_ms();
    const loglin_status status = loglin_session_score(run->model.session, run->ids, run->length, run->logits);
    run->ms = loglin_cli_now_ms() - begin;
    loglin_cli_waiting_end();
    if (status != LOGLIN_OK) {
        return loglin_cli_fail_model(status);
    }
    const size_t finite = loglin_cli_finite_rows(run->logits, run->batch * run->length, run->model.info.vocabulary);
    if (finite < run->batch * run->length) {
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "logits: those of input_ids[%zu,%zu] are " LOGLIN_CLI_NOT_FINITE,
                               finite / run->length, finite % run->length);
    }
    run->error = reference != NULL ? relative_error(run->logits, reference) : -1;
    return write_output(run, count);
}

static loglin_cli_status print_json(const logits_run *run) {
    json_t *report =
        json_pack("{s:s, s:s, s:I, s:I, s:f, s:s, s:o}", "command", "logits", "model", run->options.folder, "batch",
                  (json_int_t)run->batch, "length", (json_int_t)run->length, "run_ms", run->ms, "output", run->out,
                  "error", run->check && isfinite(run->error) ? json_real(run->error) : json_null());
    const bool printed = report != NULL && json_dumpf(report, stdout, JSON_INDENT(2)) == 0;
    (void)putchar('\n');
    json_decref(report);
    return printed ? LOGLIN_CLI_OK : loglin_cli_fail(LOGLIN_CLI_FAILED, "the report cannot be printed");
}

static loglin_cli_status report(const logits_run *run) {
    const double threshold = run->options.model.dtype == LOGLIN_F32 ? 1e-4 : 5e-2;
    if (run->options.json) {
        RETURN_IF_FAILED(print_json(run));
    } else {
        (void)printf("model      %s: %s, %llu parameters\n", run->options.folder, loglin_cli_model_kind(&run->model),
                     (unsigned long long)run->model.info.parameters);
        (void)printf("tokens     B %zu, T %zu\n", run->batch, run->length);
        (void)printf("run        %.2f ms (with what is compiled at first use)\n", run->ms);
        (void)printf("output     %s\n", run->out);
        if (run->check) {
            (void)printf("check      logits error %.2e, at most %.0e: %s\n", run->error, threshold,
                         run->error <= threshold ? "ok" : "TOO LARGE");
        }
    }
    if (run->check && !(run->error <= threshold)) {
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "logits: the relative error is %.3g, expected at most %.0e",
                               run->error, threshold);
    }
    return LOGLIN_CLI_OK;
}

loglin_cli_status loglin_cli_logits(int argc, char **argv) {
    logits_run run = {0};
    loglin_cli_status status = parse(argc, argv, &run);
    if (status != LOGLIN_CLI_OK || run.options.help) {
        return status;
    }
    status = compute(&run);
    if (status == LOGLIN_CLI_OK) {
        status = report(&run);
    }
    loglin_cli_model_close(&run.model);
    loglin_safetensors_close(run.file);
    free(run.ids);
    free(run.logits);
    return status;
}
