/* SPDX-License-Identifier: Apache-2.0 */
#include "support_model.h"

#include "support.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

const char *const support_trained[2] = {SUPPORT_MAMBA2, SUPPORT_GATED_DELTA};

loglin_model *support_model_open(const char *folder, const loglin_model_options *options) {
    const support_device *device = support_open();
    loglin_model *model = NULL;
    support_require(loglin_model_open(device->device, device->queue, folder, options, &model), folder);
    return model;
}

loglin_session *support_session_start(loglin_model *model, size_t sequences) {
    loglin_session *session = NULL;
    support_require(loglin_session_create(model, support_open()->queue, sequences, &session), "loglin_session_create");
    return session;
}

loglin_safetensors *support_expected_open(const char *folder) {
    char path[512];
    loglin_tensor_error error;
    loglin_safetensors *file = NULL;
    (void)snprintf(path, sizeof path, "%s/expected.safetensors", folder);
    if (!loglin_safetensors_open(path, &file, &error)) {
        support_die("%s: %s", path, error.text);
    }
    return file;
}

/* A copy of a tensor's data, aligned, to be freed. */
void *support_copy_of(const loglin_safetensors *file, const char *name, size_t *count) {
    const loglin_tensor *tensor = loglin_safetensors_find(file, name);
    if (tensor == NULL) {
        support_die("no tensor %s", name);
    }
    void *data = support_alloc(tensor->size, 1);
    memcpy(data, tensor->data, tensor->size);
    *count = loglin_tensor_count(tensor);
    return data;
}

double support_float_error(const float *got, const float *expected, size_t count) {
    double difference = 0;
    double sum = 0;
    for (size_t i = 0; i < count; i++) {
        const double distance = (double)got[i] - (double)expected[i];
        difference += distance * distance;
        sum += (double)expected[i] * (double)expected[i];
    }
    return isfinite(difference) ? sqrt(difference / sum) : HUGE_VAL;
}
