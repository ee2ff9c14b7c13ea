/* SPDX-License-Identifier: Apache-2.0 */
/* Requests and replies as JSON. */
#include "plan/worker.h"

#include "plan/tuning.h"
#include "runtime/status.h"

#include <jansson.h>
#include <stdio.h>
#include <string.h>

/* X(name): the members of a problem that are sizes or choices. */
#define PROBLEM_MEMBERS(X)                                                                                             \
    X(op)                                                                                                              \
    X(partition) X(dtype) X(weight_dtype) X(batch) X(length) X(heads) X(groups) X(dim_k) X(dim_v) X(levels) X(phases)

char *loglin_request_print(const loglin_request *request) {
    json_t *problem = json_object(), *values = json_array(), *gemm = json_array();
#define PRINT_MEMBER(name) (void)json_object_set_new(problem, #name, json_integer((json_int_t)request->problem.name));
    PROBLEM_MEMBERS(PRINT_MEMBER)
#undef PRINT_MEMBER
    for (size_t i = 0; i < LOGLIN_TUNABLE_COUNT; i++) {
        (void)json_array_append_new(values, json_integer(request->configuration.values[i]));
    }
    for (size_t i = 0; i < LOGLIN_GEMM_PARAMETER_COUNT; i++) {
        (void)json_array_append_new(gemm, json_integer(request->configuration.gemm.values[i]));
    }
    json_t *document =
        json_pack("{s:i, s:i, s:s, s:s, s:i, s:i, s:o, s:o, s:o}", "kind", (int)request->kind, "device",
                  (int)request->device, "name", request->name, "source", loglin_source_hash, "runs", (int)request->runs,
                  "engine", (int)request->configuration.engine, "problem", problem, "values", values, "gemm", gemm);
    char *text = document != NULL ? json_dumps(document, JSON_COMPACT) : NULL;
    json_decref(document);
    return text;
}

static void read_numbers(const json_t *array, unsigned *numbers, size_t count) {
    for (size_t i = 0; i < count; i++) {
        numbers[i] = (unsigned)json_integer_value(json_array_get(array, i));
    }
}

loglin_status loglin_request_parse(const char *text, loglin_request *request) {
    json_t *document = json_loads(text, 0, NULL);
    const char *source = json_string_value(json_object_get(document, "source"));
    const char *name = json_string_value(json_object_get(document, "name"));
    if (source == NULL || name == NULL || strcmp(source, loglin_source_hash) != 0) {
        json_decref(document);
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "request: not one of this version of the library");
    }
    *request = (loglin_request){
        .kind = (loglin_request_kind)json_integer_value(json_object_get(document, "kind")),
        .device = (size_t)json_integer_value(json_object_get(document, "device")),
        .runs = (unsigned)json_integer_value(json_object_get(document, "runs")),
        .configuration = {.engine = (loglin_engine)json_integer_value(json_object_get(document, "engine"))}};
    (void)snprintf(request->name, sizeof request->name, "%s", name);
    const json_t *problem = json_object_get(document, "problem");
    request->problem.op = (loglin_op)json_integer_value(json_object_get(problem, "op"));
    request->problem.partition = (loglin_partition)json_integer_value(json_object_get(problem, "partition"));
    request->problem.dtype = (loglin_dtype)json_integer_value(json_object_get(problem, "dtype"));
    request->problem.weight_dtype = (loglin_dtype)json_integer_value(json_object_get(problem, "weight_dtype"));
    request->problem.phases = (unsigned)json_integer_value(json_object_get(problem, "phases"));
#define READ_SIZE(name) request->problem.name = (size_t)json_integer_value(json_object_get(problem, #name));
    READ_SIZE(batch)
    READ_SIZE(length)
    READ_SIZE(heads)
    READ_SIZE(groups)
    READ_SIZE(dim_k)
    READ_SIZE(dim_v)
    READ_SIZE(levels)
#undef READ_SIZE
    read_numbers(json_object_get(document, "values"), request->configuration.values, LOGLIN_TUNABLE_COUNT);
    read_numbers(json_object_get(document, "gemm"), request->configuration.gemm.values, LOGLIN_GEMM_PARAMETER_COUNT);
    if (request->runs > LOGLIN_SEARCH_MAX_RUNS) {
        request->runs = LOGLIN_SEARCH_MAX_RUNS;
    }
    json_decref(document);
    return LOGLIN_OK;
}

/* "" instead of what is not UTF-8: a driver's own text, or one that was cut within a character. */
static json_t *plain_text(const char *text) {
    json_t *plain = json_string(text);
    return plain != NULL ? plain : json_string("");
}

char *loglin_reply_print(const loglin_reply *reply) {
    json_t *times = json_array();
    for (unsigned i = 0; i < reply->sample.runs; i++) {
        (void)json_array_append_new(times, json_real(reply->sample.ms[i]));
    }
    json_t *document =
        json_pack("{s:b, s:s, s:o, s:f, s:f, s:o}", "ok", reply->outcome == LOGLIN_OUTCOME_OK, "reason", reply->reason,
                  "detail", plain_text(reply->detail), "gflops", reply->gflops, "gbytes", reply->gbytes, "ms", times);
    char *text = document != NULL ? json_dumps(document, JSON_COMPACT | JSON_REAL_PRECISION(9)) : NULL;
    json_decref(document);
    return text;
}

loglin_reply loglin_reply_parse(const char *text) {
    loglin_reply reply = {.outcome = LOGLIN_OUTCOME_FAILED, .reason = "crashed", .detail = "no answer"};
    json_t *document = json_loads(text, 0, NULL);
    const json_t *ok = json_object_get(document, "ok"), *times = json_object_get(document, "ms");
    const char *reason = json_string_value(json_object_get(document, "reason"));
    const char *detail = json_string_value(json_object_get(document, "detail"));
    if (json_is_boolean(ok) && reason != NULL && detail != NULL && json_is_array(times)) {
        reply.outcome = json_is_true(ok) ? LOGLIN_OUTCOME_OK : LOGLIN_OUTCOME_FAILED;
        (void)snprintf(reply.reason, sizeof reply.reason, "%s", reason);
        (void)snprintf(reply.detail, sizeof reply.detail, "%s", detail);
        reply.gflops = json_number_value(json_object_get(document, "gflops"));
        reply.gbytes = json_number_value(json_object_get(document, "gbytes"));
        while (reply.sample.runs < json_array_size(times) && reply.sample.runs < LOGLIN_SEARCH_MAX_RUNS) {
            reply.sample.ms[reply.sample.runs] = json_number_value(json_array_get(times, reply.sample.runs));
            reply.sample.runs++;
        }
    }
    json_decref(document);
    return reply;
}
