/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Checks the input file: names, ranks and types first, then sizes against each other, then the contents that the
 * kernels rely on.  Every message names the file and the tensor, says what it was and what was expected.
 */
#include "cli/problem.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- Messages --------------------------------------------------------------------------------------------------- */

static void format_shape(const size_t *shape, size_t rank, char *text, size_t capacity) {
    size_t length = (size_t)snprintf(text, capacity, "[");
    for (size_t i = 0; i < rank && length < capacity; ++i) {
        length += (size_t)snprintf(text + length, capacity - length, i == 0 ? "%zu" : ", %zu", shape[i]);
    }
    if (length < capacity) {
        (void)snprintf(text + length, capacity - length, "]");
    }
}

loglin_cli_status loglin_cli_expect_shape(const char *path, const loglin_tensor *tensor, const char *letters,
                                          size_t rank, const size_t *shape) {
    bool equal = tensor->rank == rank;
    for (size_t i = 0; equal && i < rank; ++i) {
        equal = tensor->shape[i] == shape[i];
    }
    if (equal) {
        return LOGLIN_CLI_OK;
    }
    char was[256];
    char expected[256];
    format_shape(tensor->shape, tensor->rank, was, sizeof was);
    format_shape(shape, rank, expected, sizeof expected);
    return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s: tensor \"%s\" has shape %s, expected %s = %s", path, tensor->name,
                           was, letters, expected);
}

static loglin_cli_status expect_sizes(const char *path, const loglin_tensor *tensor, const char *letters, size_t rank) {
    bool good = tensor->rank == rank;
    for (size_t i = 0; good && i < rank; ++i) {
        good = tensor->shape[i] > 0;
    }
    if (good) {
        return LOGLIN_CLI_OK;
    }
    char was[256];
    format_shape(tensor->shape, tensor->rank, was, sizeof was);
    return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s: tensor \"%s\" has shape %s, expected %s, each at least 1", path,
                           tensor->name, was, letters);
}

/* One of two types, which may be the same. */
static loglin_cli_status expect_dtype(const char *path, const loglin_tensor *tensor, loglin_tensor_dtype first,
                                      loglin_tensor_dtype second) {
    if (tensor->dtype == first || tensor->dtype == second) {
        return LOGLIN_CLI_OK;
    }
    return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s: tensor \"%s\" has dtype %s, expected %s%s%s", path, tensor->name,
                           loglin_tensor_dtype_name(tensor->dtype), loglin_tensor_dtype_name(first),
                           first == second ? "" : " or ", first == second ? "" : loglin_tensor_dtype_name(second));
}

/* ---- Names ------------------------------------------------------------------------------------------------------ */

static loglin_cli_status check_names(const loglin_cli_problem *problem) {
    static const char *const known[] = {
        "q",
        "k",
        "v",
        "g",
        "level_scales",
        "beta",
        "cu_seqlens",
        "initial_states",
        "position",
        "do",
        "dfinal_states",
        "o",
        "final_states",
        "dq",
        "dk",
        "dv",
        "dg",
        "dlevel_scales",
        "dbeta",
        "dinitial_states",
    };
    for (size_t i = 0; i < loglin_safetensors_count(problem->file); ++i) {
        const char *name = loglin_safetensors_at(problem->file, i)->name;
        bool found = false;
        for (size_t j = 0; !found && j < sizeof known / sizeof known[0]; ++j) {
            found = strcmp(name, known[j]) == 0;
        }
        if (!found) {
            return loglin_cli_fail(
                LOGLIN_CLI_BAD_INPUT,
                "%s: unexpected tensor \"%.128s\"; expected q, k, v, level_scales and, optionally, g, "
                "beta, cu_seqlens, initial_states, position, do, dfinal_states and outputs to check",
                problem->path, name);
        }
    }
    return LOGLIN_CLI_OK;
}

static loglin_cli_status find_required(const loglin_cli_problem *problem, const char *name,
                                       const loglin_tensor **tensor) {
    *tensor = loglin_safetensors_find(problem->file, name);
    if (*tensor == NULL) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s: tensor \"%s\" is missing", problem->path, name);
    }
    return LOGLIN_CLI_OK;
}

static loglin_cli_status find_tensors(loglin_cli_problem *problem, loglin_phase phase) {
    RETURN_IF_FAILED(check_names(problem));
    RETURN_IF_FAILED(find_required(problem, "q", &problem->q));
    RETURN_IF_FAILED(find_required(problem, "k", &problem->k));
    RETURN_IF_FAILED(find_required(problem, "v", &problem->v));
    RETURN_IF_FAILED(find_required(problem, "level_scales", &problem->level_scales));
    problem->g = loglin_safetensors_find(problem->file, "g");
    problem->beta = loglin_safetensors_find(problem->file, "beta");
    problem->cu_seqlens = loglin_safetensors_find(problem->file, "cu_seqlens");
    problem->initial_states = loglin_safetensors_find(problem->file, "initial_states");
    problem->position = loglin_safetensors_find(problem->file, "position");
    if (problem->initial_states != NULL) {
        RETURN_IF_FAILED(find_required(problem, "position", &problem->position));
    }
    if (problem->position != NULL) {
        RETURN_IF_FAILED(find_required(problem, "initial_states", &problem->initial_states));
    }
    if (phase == LOGLIN_BACKWARD) {
        RETURN_IF_FAILED(find_required(problem, "do", &problem->d_o));
        problem->dfinal_states = loglin_safetensors_find(problem->file, "dfinal_states");
    }
    return LOGLIN_CLI_OK;
}

/* ---- Types and shapes ------------------------------------------------------------------------------------------- */

static loglin_dtype compute_dtype(loglin_tensor_dtype dtype) {
    switch (dtype) {
    case LOGLIN_TENSOR_F16:
        return LOGLIN_F16;
    case LOGLIN_TENSOR_BF16:
        return LOGLIN_BF16;
    default:
        return LOGLIN_F32;
    }
}

loglin_tensor_dtype loglin_cli_stored_dtype(loglin_dtype dtype) {
    switch (dtype) {
    case LOGLIN_F16:
        return LOGLIN_TENSOR_F16;
    case LOGLIN_BF16:
        return LOGLIN_TENSOR_BF16;
    default:
        return LOGLIN_TENSOR_F32;
    }
}

static loglin_cli_status expect_f32(const char *path, const loglin_tensor *tensor) {
    return tensor == NULL ? LOGLIN_CLI_OK : expect_dtype(path, tensor, LOGLIN_TENSOR_F32, LOGLIN_TENSOR_F32);
}

static loglin_cli_status check_dtypes(const loglin_cli_problem *problem) {
    const char *path = problem->path;
    const loglin_tensor_dtype dtype = problem->q->dtype;
    if (dtype != LOGLIN_TENSOR_F32 && dtype != LOGLIN_TENSOR_F16 && dtype != LOGLIN_TENSOR_BF16) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s: tensor \"q\" has dtype %s, expected F32, F16 or BF16", path,
                               loglin_tensor_dtype_name(dtype));
    }
    RETURN_IF_FAILED(expect_dtype(path, problem->k, dtype, dtype));
    RETURN_IF_FAILED(expect_dtype(path, problem->v, dtype, dtype));
    RETURN_IF_FAILED(expect_dtype(path, problem->level_scales, LOGLIN_TENSOR_F32, dtype));
    RETURN_IF_FAILED(expect_f32(path, problem->g));
    RETURN_IF_FAILED(expect_f32(path, problem->initial_states));
    RETURN_IF_FAILED(expect_f32(path, problem->dfinal_states));
    if (problem->beta != NULL) {
        RETURN_IF_FAILED(expect_dtype(path, problem->beta, problem->level_scales->dtype, problem->level_scales->dtype));
    }
    if (problem->d_o != NULL) {
        RETURN_IF_FAILED(expect_dtype(path, problem->d_o, dtype, dtype));
    }
    if (problem->cu_seqlens != NULL) {
        RETURN_IF_FAILED(expect_dtype(path, problem->cu_seqlens, LOGLIN_TENSOR_I32, LOGLIN_TENSOR_I64));
    }
    if (problem->position != NULL) {
        RETURN_IF_FAILED(expect_dtype(path, problem->position, LOGLIN_TENSOR_I32, LOGLIN_TENSOR_I32));
    }
    return LOGLIN_CLI_OK;
}

/* Takes B, T, H, G, K, V and L from q, v and level_scales. */
static loglin_cli_status check_main_shapes(loglin_cli_problem *problem) {
    const char *path = problem->path;
    loglin_problem *sizes = &problem->description;
    RETURN_IF_FAILED(expect_sizes(path, problem->q, "[B, T, G, K]", 4));
    RETURN_IF_FAILED(expect_sizes(path, problem->v, "[B, T, H, V]", 4));
    RETURN_IF_FAILED(expect_sizes(path, problem->level_scales, "[B, T, H, L]", 4));
    sizes->batch = problem->q->shape[0];
    sizes->length = problem->q->shape[1];
    sizes->groups = problem->q->shape[2];
    sizes->dim_k = problem->q->shape[3];
    sizes->heads = problem->v->shape[2];
    sizes->dim_v = problem->v->shape[3];
    sizes->levels = problem->level_scales->shape[3];
    RETURN_IF_FAILED(loglin_cli_expect_shape(path, problem->k, "[B, T, G, K]", 4, problem->q->shape));
    RETURN_IF_FAILED(loglin_cli_expect_shape(path, problem->v, "[B, T, H, V]", 4,
                                             (size_t[]){sizes->batch, sizes->length, sizes->heads, sizes->dim_v}));
    RETURN_IF_FAILED(loglin_cli_expect_shape(path, problem->level_scales, "[B, T, H, L]", 4,
                                             (size_t[]){sizes->batch, sizes->length, sizes->heads, sizes->levels}));
    if (sizes->heads % sizes->groups != 0) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT,
                               "%s: tensor \"v\" has H = %zu heads, expected a multiple of the G = %zu groups of \"q\"",
                               path, sizes->heads, sizes->groups);
    }
    if (sizes->dim_k > LOGLIN_MAX_DIM) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s: tensor \"q\" has K = %zu, expected at most %d", path,
                               sizes->dim_k, LOGLIN_MAX_DIM);
    }
    if (sizes->dim_v > LOGLIN_MAX_DIM) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s: tensor \"v\" has V = %zu, expected at most %d", path,
                               sizes->dim_v, LOGLIN_MAX_DIM);
    }
    if (sizes->levels > LOGLIN_MAX_LEVELS) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s: tensor \"level_scales\" has L = %zu, expected at most %d",
                               path, sizes->levels, LOGLIN_MAX_LEVELS);
    }
    return LOGLIN_CLI_OK;
}

/* The sizes of the other tensors follow from those; N comes from cu_seqlens. */
static loglin_cli_status check_other_shapes(loglin_cli_problem *problem) {
    const char *path = problem->path;
    const loglin_problem *sizes = &problem->description;
    const size_t gates[] = {sizes->batch, sizes->length, sizes->heads};
    if (problem->g != NULL) {
        RETURN_IF_FAILED(loglin_cli_expect_shape(path, problem->g, "[B, T, H]", 3, gates));
    }
    if (problem->beta != NULL) {
        RETURN_IF_FAILED(loglin_cli_expect_shape(path, problem->beta, "[B, T, H]", 3, gates));
    }
    if (problem->d_o != NULL) {
        RETURN_IF_FAILED(loglin_cli_expect_shape(path, problem->d_o, "[B, T, H, V]", 4, problem->v->shape));
    }
    problem->sequences = sizes->batch;
    if (problem->cu_seqlens != NULL) {
        RETURN_IF_FAILED(expect_sizes(path, problem->cu_seqlens, "[N + 1]", 1));
        if (problem->cu_seqlens->shape[0] < 2) {
            return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s: tensor \"cu_seqlens\" has 1 element, expected at least 2",
                                   path);
        }
        if (sizes->batch != 1) {
            return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s: tensor \"q\" has B = %zu, expected 1 with \"cu_seqlens\"",
                                   path, sizes->batch);
        }
        problem->sequences = problem->cu_seqlens->shape[0] - 1;
    }
    const size_t states[] = {problem->sequences, sizes->heads, sizes->levels, sizes->dim_k, sizes->dim_v};
    if (problem->initial_states != NULL) {
        RETURN_IF_FAILED(loglin_cli_expect_shape(path, problem->initial_states, "[N, H, L, K, V]", 5, states));
        RETURN_IF_FAILED(loglin_cli_expect_shape(path, problem->position, "[N]", 1, states));
    }
    if (problem->dfinal_states != NULL) {
        RETURN_IF_FAILED(loglin_cli_expect_shape(path, problem->dfinal_states, "[N, H, L, K, V]", 5, states));
    }
    return LOGLIN_CLI_OK;
}

/* ---- Contents --------------------------------------------------------------------------------------------------- */

static int64_t integer_at(const loglin_tensor *tensor, size_t index) {
    const char *data = tensor->data;
    if (tensor->dtype == LOGLIN_TENSOR_I64) {
        int64_t value;
        memcpy(&value, data + index * sizeof value, sizeof value);
        return value;
    }
    int32_t value;
    memcpy(&value, data + index * sizeof value, sizeof value);
    return value;
}

static loglin_cli_status read_bounds(loglin_cli_problem *problem) {
    if (problem->cu_seqlens == NULL) {
        return LOGLIN_CLI_OK;
    }
    const int64_t length = (int64_t)problem->description.length;
    if (length > INT32_MAX) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT,
                               "%s: tensor \"q\" has T = %lld, expected at most %d with "
                               "\"cu_seqlens\"",
                               problem->path, (long long)length, INT32_MAX);
    }
    problem->bounds = calloc(problem->sequences + 1, sizeof *problem->bounds);
    if (problem->bounds == NULL) {
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "out of memory");
    }
    for (size_t i = 0; i <= problem->sequences; ++i) {
        const int64_t bound = integer_at(problem->cu_seqlens, i);
        const int64_t least = i == 0 ? 0 : problem->bounds[i - 1];
        const int64_t most = i == 0 ? 0 : length;
        if (bound < least || bound > most || (i == problem->sequences && bound != length)) {
            return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT,
                                   "%s: cu_seqlens[%zu] is %lld, expected ascending numbers from 0 to T = %lld",
                                   problem->path, i, (long long)bound, (long long)length);
        }
        problem->bounds[i] = (int32_t)bound;
    }
    return LOGLIN_CLI_OK;
}

size_t loglin_cli_sequence_length(const loglin_cli_problem *problem, size_t n) {
    return problem->bounds == NULL ? problem->description.length
                                   : (size_t)(problem->bounds[n + 1] - problem->bounds[n]);
}

/* Positions, and the levels that they and the lengths need. */
static loglin_cli_status read_positions(loglin_cli_problem *problem) {
    loglin_problem *sizes = &problem->description;
    problem->positions = calloc(problem->sequences, sizeof *problem->positions);
    if (problem->positions == NULL) {
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "out of memory");
    }
    size_t longest = 0;
    for (size_t i = 0; i < problem->sequences; ++i) {
        const int64_t position = problem->position == NULL ? 0 : integer_at(problem->position, i);
        const size_t length = loglin_cli_sequence_length(problem, i);
        if (position < 0) {
            return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s: position[%zu] is %lld, expected 0 or more", problem->path,
                                   i, (long long)position);
        }
        if (length > (size_t)(INT32_MAX - position)) {
            return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT,
                                   "%s: sequence %zu has position %lld and %zu tokens, expected a sum of at most %d",
                                   problem->path, i, (long long)position, length, INT32_MAX);
        }
        problem->positions[i] = (int32_t)position;
        const size_t total = (size_t)position + length;
        longest = total > longest ? total : longest;
        if (problem->bounds != NULL && length > sizes->max_length) {
            sizes->max_length = length;
        }
        sizes->max_position = (size_t)position > sizes->max_position ? (size_t)position : sizes->max_position;
    }
    if (sizes->levels < loglin_num_levels(longest)) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT,
                               "%s: tensor \"level_scales\" has L = %zu, expected at least %zu for a sequence of %zu "
                               "tokens%s",
                               problem->path, sizes->levels, loglin_num_levels(longest), longest,
                               problem->position == NULL ? "" : ", its position included");
    }
    return LOGLIN_CLI_OK;
}

/* "g[0,17,2] is 0.5, expected ..." */
static loglin_cli_status bad_element(const char *path, const loglin_tensor *tensor, size_t index, float value,
                                     const char *expected) {
    size_t position[LOGLIN_TENSOR_MAX_RANK];
    for (size_t i = tensor->rank; i > 0; --i) {
        position[i - 1] = index % tensor->shape[i - 1];
        index /= tensor->shape[i - 1];
    }
    char place[256] = "";
    size_t length = 0;
    for (size_t i = 0; i < tensor->rank && length < sizeof place; ++i) {
        length += (size_t)snprintf(place + length, sizeof place - length, i == 0 ? "%zu" : ",%zu", position[i]);
    }
    return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s: %s[%s] is %g, expected %s", path, tensor->name, place,
                           (double)value, expected);
}

/* Every element is finite and, of gates, not positive. */
static loglin_cli_status check_elements(const char *path, const loglin_tensor *tensor, bool gates) {
    if (tensor == NULL) {
        return LOGLIN_CLI_OK;
    }
    enum { BLOCK = 4096 };
    const size_t count = loglin_tensor_count(tensor);
    const size_t element = loglin_tensor_dtype_size(tensor->dtype);
    for (size_t begin = 0; begin < count; begin += BLOCK) {
        float values[BLOCK];
        const size_t block = count - begin < BLOCK ? count - begin : BLOCK;
        loglin_tensor_to_float(tensor->dtype, (const char *)tensor->data + begin * element, block, values);
        size_t bad = block;
        if (gates) {
            bad = loglin_check_gates(values, block);
        } else {
            for (size_t i = block; i > 0; --i) {
                bad = isfinite(values[i - 1]) ? bad : i - 1;
            }
        }
        if (bad < block) {
            return bad_element(path, tensor, begin + bad, values[bad],
                               gates ? "a finite number <= 0" : "a finite number");
        }
    }
    return LOGLIN_CLI_OK;
}

static loglin_cli_status check_contents(const loglin_cli_problem *problem) {
    RETURN_IF_FAILED(check_elements(problem->path, problem->g, true));
    RETURN_IF_FAILED(check_elements(problem->path, problem->q, false));
    RETURN_IF_FAILED(check_elements(problem->path, problem->k, false));
    RETURN_IF_FAILED(check_elements(problem->path, problem->v, false));
    RETURN_IF_FAILED(check_elements(problem->path, problem->level_scales, false));
    RETURN_IF_FAILED(check_elements(problem->path, problem->beta, false));
    return check_elements(problem->path, problem->d_o, false);
}

/* ---- The whole -------------------------------------------------------------------------------------------------- */

static void describe(const loglin_cli_arguments *arguments, loglin_phase phase, loglin_cli_problem *problem) {
    loglin_problem *description = &problem->description;
    description->op = problem->beta == NULL ? LOGLIN_MAMBA2 : LOGLIN_GATED_DELTA;
    description->partition = arguments->partition;
    description->dtype = compute_dtype(problem->q->dtype);
    description->weight_dtype = compute_dtype(problem->level_scales->dtype);
    description->scale = arguments->scale;
    description->normalize_qk = arguments->normalize_qk;
    description->sequences = problem->cu_seqlens == NULL ? 0 : problem->sequences;
    description->phases = phase;
    description->engine = arguments->engine;
    description->chunk = arguments->chunk;
}

loglin_cli_status loglin_cli_problem_read(const loglin_cli_arguments *arguments, loglin_phase phase,
                                          loglin_cli_problem *problem) {
    *problem = (loglin_cli_problem){.path = arguments->in};
    loglin_tensor_error error;
    if (!loglin_safetensors_open(arguments->in, &problem->file, &error)) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "%s: %s", arguments->in, error.text);
    }
    RETURN_IF_FAILED(find_tensors(problem, phase));
    RETURN_IF_FAILED(check_dtypes(problem));
    RETURN_IF_FAILED(check_main_shapes(problem));
    RETURN_IF_FAILED(check_other_shapes(problem));
    RETURN_IF_FAILED(read_bounds(problem));
    RETURN_IF_FAILED(read_positions(problem));
    RETURN_IF_FAILED(check_contents(problem));
    describe(arguments, phase, problem);
    return LOGLIN_CLI_OK;
}

void loglin_cli_problem_close(loglin_cli_problem *problem) {
    free(problem->bounds);
    free(problem->positions);
    loglin_safetensors_close(problem->file);
    *problem = (loglin_cli_problem){0};
}
