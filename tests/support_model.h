/* SPDX-License-Identifier: Apache-2.0 */
/* The two trained models of tests/data, opening one, and what they should answer. */
#ifndef LOGLIN_TESTS_SUPPORT_MODEL_H
#define LOGLIN_TESTS_SUPPORT_MODEL_H

#include "loglin_model.h"
#include "tensorfile/safetensors.h"

#define SUPPORT_MAMBA2 TEST_DATA_DIR "/kjv-loglin-mamba2"
#define SUPPORT_GATED_DELTA TEST_DATA_DIR "/kjv-loglin-gdn"

extern const char *const support_trained[2];

enum { SUPPORT_VOCABULARY = 256 }; /* of both: bytes */

/* On the device of support_open; they never fail. */
loglin_model *support_model_open(const char *folder, const loglin_model_options *options);
loglin_session *support_session_start(loglin_model *model, size_t sequences);

/* The recorded answers of a trained model. */
loglin_safetensors *support_expected_open(const char *folder);

/* A copy of a tensor's data, aligned, to be freed. */
void *support_copy_of(const loglin_safetensors *file, const char *name, size_t *count);

/* The metric of support_error. */
double support_float_error(const float *got, const float *expected, size_t count);

#endif
