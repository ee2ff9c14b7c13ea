/* SPDX-License-Identifier: Apache-2.0 */
/* Values of a config.json, each checked for its type and range when it is read. */
#ifndef LOGLIN_MODEL_CONFIG_H
#define LOGLIN_MODEL_CONFIG_H

#include "loglin.h"
#include <jansson.h>
#include <stdbool.h>

typedef struct loglin_config {
    const char *path; /* for messages */
    json_t *root;     /* an object */
} loglin_config;

/*
 * Parses a text.  Infinity and NaN, which Python writes although JSON has no such numbers, are read as the strings
 * "Infinity" and "NaN".
 */
loglin_status loglin_config_parse(const char *path, const char *text, size_t size, loglin_config *config);
void loglin_config_free(loglin_config *config);

/* Each reads a key into *value.  An absent key or null leaves *value alone: set it to the default before. */
loglin_status loglin_config_size(const loglin_config *config, const char *key, size_t min, size_t max, size_t *value);
loglin_status loglin_config_real(const loglin_config *config, const char *key, double min, double max, double *value);
loglin_status loglin_config_bool(const loglin_config *config, const char *key, bool *value);

/* A size without default. */
loglin_status loglin_config_need_size(const loglin_config *config, const char *key, size_t min, size_t max,
                                      size_t *value);

/* Fails where the key is there with another value: LOGLIN_UNSUPPORTED. */
loglin_status loglin_config_must_be(const loglin_config *config, const char *key, bool value);
loglin_status loglin_config_must_be_null(const loglin_config *config, const char *key);

/* A string without default. */
loglin_status loglin_config_need_string(const loglin_config *config, const char *key, const char **value);

/* hidden_act, where it is there, is "silu" or "swish". */
loglin_status loglin_config_check_activation(const loglin_config *config);

/* [min, max] of a key, two numbers of 0 or more in order, the second maybe infinite. */
loglin_status loglin_config_limits(const loglin_config *config, const char *key, float *min, float *max);

#endif
