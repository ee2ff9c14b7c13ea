/* SPDX-License-Identifier: Apache-2.0 */
/* Continues a text with a language model of bytes: generate FOLDER PROMPT COUNT */
#include <loglin_model.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void check(loglin_status status, const char *what) {
    if (status != LOGLIN_OK) {
        fprintf(stderr, "%s: %s: %s\n", what, loglin_strerror(status), loglin_last_error());
        exit(1);
    }
}

static int32_t most_probable(const float *logits, size_t count) {
    size_t best = 0;
    for (size_t i = 1; i < count; i++) {
        best = logits[i] > logits[best] ? i : best;
    }
    return (int32_t)best;
}

int main(int argc, char **argv) {
    if (argc != 4 || strlen(argv[2]) == 0) {
        fprintf(stderr, "usage: generate FOLDER PROMPT COUNT\n");
        return 2;
    }
    cl_device_id id;
    cl_int code;
    check(loglin_select_device(NULL, &id), "loglin_select_device");
    cl_context context = clCreateContext(NULL, 1, &id, NULL, NULL, &code);
    check(code, "clCreateContext");
    cl_command_queue queue = clCreateCommandQueueWithProperties(context, id, NULL, &code);
    check(code, "clCreateCommandQueueWithProperties");

    loglin_device *device;
    loglin_model *model;
    loglin_session *session;
    check(loglin_device_create(context, id, &device), "loglin_device_create");
    check(loglin_model_open(device, queue, argv[1], NULL, &model), argv[1]);
    check(loglin_session_create(model, queue, 1, &session), "loglin_session_create");

    loglin_model_info info;
    loglin_model_get_info(model, &info);
    const size_t length = strlen(argv[2]);
    int32_t *ids = calloc(length, sizeof *ids);
    float *logits = calloc(info.vocabulary, sizeof *logits);
    if (ids == NULL || logits == NULL) {
        return 1;
    }
    for (size_t i = 0; i < length; i++) {
        ids[i] = (unsigned char)argv[2][i];
    }
    check(loglin_session_prefill(session, 0, ids, length, logits), "loglin_session_prefill");
    for (long left = strtol(argv[3], NULL, 10); left > 0; left--) {
        const int32_t next = most_probable(logits, info.vocabulary);
        putchar(next);
        check(loglin_session_step(session, &next, logits), "loglin_session_step");
    }
    putchar('\n');
    free(ids);
    free(logits);
    loglin_session_destroy(session);
    loglin_model_close(model);
    loglin_device_destroy(device);
    clReleaseCommandQueue(queue);
    clReleaseContext(context);
    return 0;
}
