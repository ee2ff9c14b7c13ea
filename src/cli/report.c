/* SPDX-License-Identifier: Apache-2.0 */
/* The report as text and as JSON, and the comparison with the references in the input file. */
#include "cli/report.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>

typedef struct comparison {
    const char *name;
    double error;     /* ||output - reference|| / ||reference|| */
    double threshold; /* the largest error that passes */
    bool passed;
} comparison;

static const char *dtype_name(loglin_dtype dtype) {
    static const char *const names[] = {[LOGLIN_F32] = "f32", [LOGLIN_F16] = "f16", [LOGLIN_BF16] = "bf16"};
    return names[dtype];
}

static const char *op_name(loglin_op op) {
    return op == LOGLIN_MAMBA2 ? "mamba2" : "gated_delta";
}

static const char *partition_name(loglin_partition partition) {
    return partition == LOGLIN_WEAK ? "weak" : "strong";
}

static double threshold_of(loglin_dtype dtype, loglin_phase phase) {
    switch (dtype) {
    case LOGLIN_F16:
        return 2e-3;
    case LOGLIN_BF16:
        return 1e-2;
    default:
        return phase == LOGLIN_BACKWARD ? 5e-5 : 1e-5;
    }
}

/* The reference of an output; NULL if IN has none. */
static const loglin_tensor *find_reference(const loglin_cli_run *run, const loglin_cli_output *output) {
    if (output->tensor.dtype == LOGLIN_TENSOR_I32) { /* positions: an input may have that name */
        return NULL;
    }
    return loglin_safetensors_find(run->problem.file, output->tensor.name);
}

loglin_cli_status loglin_cli_check_references(const loglin_cli_run *run) {
    size_t count = 0;
    if (!run->arguments.check) {
        return LOGLIN_CLI_OK;
    }
    for (size_t i = 0; i < run->output_count; ++i) {
        const loglin_tensor *output = &run->outputs[i].tensor;
        const loglin_tensor *reference = find_reference(run, &run->outputs[i]);
        if (reference == NULL) {
            continue;
        }
        if (reference->dtype == LOGLIN_TENSOR_I32 || reference->dtype == LOGLIN_TENSOR_I64) {
            return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s: tensor \"%s\" has dtype %s, expected F32, F16 or BF16",
                                   run->problem.path, reference->name, loglin_tensor_dtype_name(reference->dtype));
        }
        RETURN_IF_FAILED(
            loglin_cli_expect_shape(run->problem.path, reference, "the output's shape", output->rank, output->shape));
        ++count;
    }
    return count > 0 ? LOGLIN_CLI_OK
                     : loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s: --check expects at least one of the outputs there",
                                       run->problem.path);
}

static double relative_error(const loglin_tensor *output, const loglin_tensor *reference) {
    enum { BLOCK = 4096 };
    const size_t count = loglin_tensor_count(output);
    const size_t output_size = loglin_tensor_dtype_size(output->dtype);
    const size_t reference_size = loglin_tensor_dtype_size(reference->dtype);
    double difference = 0.0;
    double norm = 0.0;
    for (size_t begin = 0; begin < count; begin += BLOCK) {
        float got[BLOCK];
        float expected[BLOCK];
        const size_t block = count - begin < BLOCK ? count - begin : BLOCK;
        loglin_tensor_to_float(output->dtype, (const char *)output->data + begin * output_size, block, got);
        loglin_tensor_to_float(reference->dtype, (const char *)reference->data + begin * reference_size, block,
                               expected);
        for (size_t i = 0; i < block; ++i) {
            const double distance = (double)got[i] - (double)expected[i];
            difference += distance * distance;
            norm += (double)expected[i] * (double)expected[i];
        }
    }
    return difference == 0.0 ? 0.0 : sqrt(difference / norm);
}

static size_t compare(const loglin_cli_run *run, comparison *comparisons) {
    size_t count = 0;
    for (size_t i = 0; run->arguments.check && i < run->output_count; ++i) {
        const loglin_tensor *reference = find_reference(run, &run->outputs[i]);
        if (reference != NULL) {
            comparison *result = &comparisons[count++];
            result->name = reference->name;
            result->error = relative_error(&run->outputs[i].tensor, reference);
            result->threshold = threshold_of(run->problem.description.dtype, run->operation->phase);
            result->passed = result->error <= result->threshold; /* not so for a NaN */
        }
    }
    return count;
}

static void print_text(const loglin_cli_run *run, const char *plan, const comparison *comparisons, size_t count) {
    const loglin_problem *sizes = &run->problem.description;
    (void)printf("device     %s (%s)\n", run->session.info.name, run->session.info.platform_name);
    (void)printf("plan       %s\n", plan);
    (void)printf("problem    %s, %s partition, %s: B %zu, T %zu, H %zu, G %zu, K %zu, V %zu, L %zu", op_name(sizes->op),
                 partition_name(sizes->partition), dtype_name(sizes->dtype), sizes->batch, sizes->length, sizes->heads,
                 sizes->groups, sizes->dim_k, sizes->dim_v, sizes->levels);
    if (sizes->sequences > 0) {
        (void)printf(", %zu sequences", sizes->sequences);
    }
    (void)printf("\nprepare    %.2f ms\n", run->session.prepare_ms);
    (void)printf("%s %.2f ms\n", run->steps == 0 ? "first run " : "first step", run->first_run_ms);
    if (run->steps == 0) {
        (void)printf("run        %.2f ms\n", run->run_ms);
    } else {
        (void)printf("run        %.2f ms: %zu further steps, %.1f us each\n", run->run_ms, run->steps,
                     1e3 * run->run_ms / (double)run->steps);
    }
    (void)printf("output     %s\n", run->arguments.out);
    for (size_t i = 0; i < count; ++i) {
        (void)printf("check      %-15s error %.2e, at most %.0e: %s\n", comparisons[i].name, comparisons[i].error,
                     comparisons[i].threshold, comparisons[i].passed ? "ok" : "TOO LARGE");
    }
}

/* JSON has no infinities and no NaN. */
static json_t *json_number(double value) {
    return isfinite(value) ? json_real(value) : json_null();
}

static json_t *json_checks(const comparison *comparisons, size_t count) {
    json_t *checks = json_array();
    for (size_t i = 0; i < count; ++i) {
        (void)json_array_append_new(checks, json_pack("{s:s, s:o, s:f, s:b}", "tensor", comparisons[i].name, "error",
                                                      json_number(comparisons[i].error), "threshold",
                                                      comparisons[i].threshold, "passed", comparisons[i].passed));
    }
    return checks;
}

static loglin_cli_status print_json(const loglin_cli_run *run, const char *plan, const comparison *comparisons,
                                    size_t count) {
    const loglin_problem *sizes = &run->problem.description;
    json_t *shape =
        json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I}", "batch", (json_int_t)sizes->batch, "length",
                  (json_int_t)sizes->length, "heads", (json_int_t)sizes->heads, "groups", (json_int_t)sizes->groups,
                  "dim_k", (json_int_t)sizes->dim_k, "dim_v", (json_int_t)sizes->dim_v, "levels",
                  (json_int_t)sizes->levels, "sequences", (json_int_t)run->problem.sequences);
    json_t *report = json_pack(
        "{s:s, s:s, s:s, s:s, s:s, s:s, s:s, s:s, s:o, s:I, s:f, s:f, s:f, s:I, s:s, s:o}", "command", run->name,
        "device", run->session.info.name, "platform", run->session.info.platform_name, "plan", plan, "op",
        op_name(sizes->op), "partition", partition_name(sizes->partition), "dtype", dtype_name(sizes->dtype),
        "weight_dtype", dtype_name(sizes->weight_dtype), "shape", shape, "workspace_bytes", (json_int_t)run->workspace,
        "prepare_ms", run->session.prepare_ms, "first_run_ms", run->first_run_ms, "run_ms", run->run_ms, "steps",
        (json_int_t)run->steps, "output", run->arguments.out, "check", json_checks(comparisons, count));
    const bool printed = report != NULL && json_dumpf(report, stdout, JSON_INDENT(2)) == 0;
    (void)putchar('\n');
    json_decref(report);
    return printed ? LOGLIN_CLI_OK : loglin_cli_fail(LOGLIN_CLI_FAILED, "the report cannot be printed");
}

loglin_cli_status loglin_cli_report(const loglin_cli_run *run) {
    comparison comparisons[LOGLIN_CLI_MAX_OUTPUTS];
    const size_t count = compare(run, comparisons);
    char plan[512];
    (void)loglin_plan_describe(run->session.plan, plan, sizeof plan);
    if (run->arguments.json) {
        RETURN_IF_FAILED(print_json(run, plan, comparisons, count));
    } else {
        print_text(run, plan, comparisons, count);
    }
    loglin_cli_status status = LOGLIN_CLI_OK;
    for (size_t i = 0; i < count; ++i) {
        if (!comparisons[i].passed) {
            status = loglin_cli_fail(LOGLIN_CLI_FAILED, "%s: the relative error is %.3g, expected at most %.0e",
                                     comparisons[i].name, comparisons[i].error, comparisons[i].threshold);
        }
    }
    return status;
}
