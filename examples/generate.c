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

int main(int argc, char **argv) {
    long count = 0;
    if (argc != 4 || sscanf(argv[3], "%ld%c", &count, &(char){0}) != 1 || count < 1 || strlen(argv[2]) == 0) {
        fprintf(stderr, "usage: generate FOLDER PROMPT COUNT\n");
        return 2;
    }
    cl_device_id id;
    loglin_device *device;
    loglin_model *model;
    loglin_session *session;
    loglin_model_info info;
    check(loglin_select_device(NULL, &id), "loglin_select_device");
    cl_context context = clCreateContext(NULL, 1, &id, NULL, NULL, NULL); /* NULL is told by what takes it */
    cl_command_queue queue = clCreateCommandQueueWithProperties(context, id, NULL, NULL);
    check(loglin_device_create(context, id, &device), "loglin_device_create");
    check(loglin_model_open(device, queue, argv[1], NULL, &model), argv[1]);
    check(loglin_session_create(model, queue, 1, &session), "loglin_session_create");
    loglin_model_get_info(model, &info);
    if (info.vocabulary != 256) {
        fprintf(stderr, "%s: not a model of bytes: its vocabulary is %zu\n", argv[1], info.vocabulary);
        return 1;
    }
    float logits[256];
    const size_t length = strlen(argv[2]);
    int32_t *ids = calloc(length, sizeof *ids);
    check(ids != NULL ? LOGLIN_OK : LOGLIN_OUT_OF_MEMORY, "calloc");
    for (size_t i = 0; i < length; i++) {
        ids[i] = (unsigned char)argv[2][i];
    }
    check(loglin_session_prefill(session, 0, ids, length, logits), "loglin_session_prefill");
    for (long i = 0; i < count; i++) {
        int32_t next = 0; /* the most probable byte */
        for (int32_t byte = 1; byte < 256; byte++) {
            next = logits[byte] > logits[next] ? byte : next;
        }
        putchar(next);
        check(loglin_session_step(session, &next, logits), "loglin_session_step");
    }
    putchar('\n');
    free(ids);
    loglin_session_destroy(session);
    loglin_model_close(model);
    loglin_device_destroy(device);
    clReleaseCommandQueue(queue);
    clReleaseContext(context);
}
