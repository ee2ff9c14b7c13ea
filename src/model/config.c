/* SPDX-License-Identifier: Apache-2.0 */
/* Reading config.json: every getter names the key, what it was and what was expected. */
#include "model/config.h"

#include "runtime/status.h"
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- Infinity and NaN ------------------------------------------------------------------------------------------- */

/* Length of the bare word at the start of a text, 0 if it is neither Infinity nor NaN. */
static size_t match_word(const char *text, size_t size) {
    static const char *const words[] = {"Infinity", "NaN"};
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++) {
        const size_t length = strlen(words[i]);
        if (size >= length && memcmp(text, words[i], length) == 0) {
            return length;
        }
    }
    return 0;
}

/* Copies a text, with quotes around Infinity and NaN outside of strings; `to` has room for 2 * size bytes. */
static size_t quote_words(const char *text, size_t size, char *to) {
    size_t written = 0;
    bool in_string = false;
    size_t i = 0;
    while (i < size) {
        const size_t word = in_string ? 0 : match_word(text + i, size - i);
        if (word > 0) {
            to[written++] = '"';
            memcpy(to + written, text + i, word);
            written += word;
            to[written++] = '"';
            i += word;
        } else if (in_string && text[i] == '\\' && i + 1 < size) {
            to[written++] = text[i++];
            to[written++] = text[i++];
        } else {
            in_string = in_string != (text[i] == '"');
            to[written++] = text[i++];
        }
    }
    return written;
}

loglin_status loglin_config_parse(const char *path, const char *text, size_t size, loglin_config *config) {
    config->path = path;
    config->root = NULL;
    if (size > SIZE_MAX / 2 - 1) {
        return loglin_fail(LOGLIN_BAD_FILE, "%s: %zu bytes are too many", path, size);
    }
    char *quoted = malloc(2 * size + 1);
    if (quoted == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "%s: out of memory", path);
    }
    json_error_t error;
    const size_t length = quote_words(text, size, quoted);
    config->root = json_loadb(quoted, length, JSON_REJECT_DUPLICATES, &error);
    free(quoted);
    if (config->root == NULL) {
        return loglin_fail(LOGLIN_BAD_FILE, "%s: line %d: %s", path, error.line, error.text);
    }
    if (!json_is_object(config->root)) {
        loglin_config_free(config);
        return loglin_fail(LOGLIN_BAD_FILE, "%s is not an object", path);
    }
    return LOGLIN_OK;
}

void loglin_config_free(loglin_config *config) {
    json_decref(config->root);
    config->root = NULL;
}

/* ---- Values ----------------------------------------------------------------------------------------------------- */

/* NULL for an absent key and for null. */
static const json_t *find(const loglin_config *config, const char *key) {
    const json_t *value = json_object_get(config->root, key);
    return json_is_null(value) ? NULL : value;
}

/* A value of the wrong kind. */
static loglin_status fail_value(const loglin_config *config, const char *key, const json_t *value,
                                const char *expected) {
    char *text = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT | JSON_REAL_PRECISION(9));
    const loglin_status status = loglin_fail(LOGLIN_BAD_FILE, "%s: %s is %.64s, expected %s", config->path, key,
                                             text != NULL ? text : "another value", expected);
    free(text);
    return status;
}

loglin_status loglin_config_size(const loglin_config *config, const char *key, size_t min, size_t max, size_t *value) {
    const json_t *entry = find(config, key);
    if (entry == NULL) {
        return LOGLIN_OK;
    }
    if (!json_is_integer(entry)) {
        return fail_value(config, key, entry, "an integer");
    }
    const json_int_t number = json_integer_value(entry);
    if (number < 0 || (uint64_t)number < min || (uint64_t)number > max) {
        return loglin_fail(LOGLIN_BAD_FILE, "%s: %s is %lld, expected %zu to %zu", config->path, key, (long long)number,
                           min, max);
    }
    *value = (size_t)number;
    return LOGLIN_OK;
}

loglin_status loglin_config_need_size(const loglin_config *config, const char *key, size_t min, size_t max,
                                      size_t *value) {
    if (find(config, key) == NULL) {
        return loglin_fail(LOGLIN_BAD_FILE, "%s: %s is missing, expected an integer", config->path, key);
    }
    return loglin_config_size(config, key, min, max, value);
}

loglin_status loglin_config_real(const loglin_config *config, const char *key, double min, double max, double *value) {
    const json_t *entry = find(config, key);
    if (entry == NULL) {
        return LOGLIN_OK;
    }
    if (!json_is_number(entry)) {
        return fail_value(config, key, entry, "a number");
    }
    const double number = json_number_value(entry);
    if (!(number >= min && number <= max)) {
        return loglin_fail(LOGLIN_BAD_FILE, "%s: %s is %g, expected %g to %g", config->path, key, number, min, max);
    }
    *value = number;
    return LOGLIN_OK;
}

loglin_status loglin_config_bool(const loglin_config *config, const char *key, bool *value) {
    const json_t *entry = find(config, key);
    if (entry == NULL) {
        return LOGLIN_OK;
    }
    if (!json_is_boolean(entry)) {
        return fail_value(config, key, entry, "true or false");
    }
    *value = json_is_true(entry);
    return LOGLIN_OK;
}

loglin_status loglin_config_must_be(const loglin_config *config, const char *key, bool value) {
    bool is = value;
    RETURN_IF_ERROR(loglin_config_bool(config, key, &is));
    if (is != value) {
        return loglin_fail(LOGLIN_UNSUPPORTED, "%s: %s is %s, only %s is supported", config->path, key,
                           is ? "true" : "false", value ? "true" : "false");
    }
    return LOGLIN_OK;
}

loglin_status loglin_config_must_be_null(const loglin_config *config, const char *key) {
    if (find(config, key) != NULL) {
        return loglin_fail(LOGLIN_UNSUPPORTED, "%s: %s is set, only null is supported", config->path, key);
    }
    return LOGLIN_OK;
}

loglin_status loglin_config_need_string(const loglin_config *config, const char *key, const char **value) {
    const json_t *entry = find(config, key);
    if (entry == NULL) {
        return loglin_fail(LOGLIN_BAD_FILE, "%s: %s is missing, expected a string", config->path, key);
    }
    if (!json_is_string(entry)) {
        return fail_value(config, key, entry, "a string");
    }
    *value = json_string_value(entry);
    return LOGLIN_OK;
}

loglin_status loglin_config_check_activation(const loglin_config *config) {
    const char *name = "silu";
    if (find(config, "hidden_act") != NULL) {
        RETURN_IF_ERROR(loglin_config_need_string(config, "hidden_act", &name));
    }
    if (strcmp(name, "silu") != 0 && strcmp(name, "swish") != 0) {
        return loglin_fail(LOGLIN_UNSUPPORTED, "%s: hidden_act is \"%.32s\", only \"silu\" and \"swish\" are supported",
                           config->path, name);
    }
    return LOGLIN_OK;
}

/* A number, or infinity: as a string, or as transformers 5 writes it, {"__float__": "Infinity"}. */
static bool read_limit(const json_t *entry, double *value) {
    if (json_is_number(entry)) {
        *value = json_number_value(entry);
        return true;
    }
    const json_t *text = json_is_object(entry) ? json_object_get(entry, "__float__") : entry;
    if (json_is_string(text) && strcmp(json_string_value(text), "Infinity") == 0) {
        *value = HUGE_VAL;
        return true;
    }
    return false;
}

loglin_status loglin_config_limits(const loglin_config *config, const char *key, float *min, float *max) {
    const json_t *entry = find(config, key);
    if (entry == NULL) {
        return LOGLIN_OK;
    }
    double low = 0;
    double high = 0;
    if (json_array_size(entry) != 2 || !read_limit(json_array_get(entry, 0), &low) ||
        !read_limit(json_array_get(entry, 1), &high) || low < 0 || low > high || low > (double)FLT_MAX) {
        return fail_value(config, key, entry, "[min, max] with 0 <= min <= max, and min finite as a float");
    }
    *min = (float)low;
    *max = high > (double)FLT_MAX ? HUGE_VALF : (float)high;
    return LOGLIN_OK;
}
