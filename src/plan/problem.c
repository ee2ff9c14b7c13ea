/* SPDX-License-Identifier: Apache-2.0 */
#include "plan/problem.h"

#include "runtime/status.h"

#include <math.h>
#include <stdint.h>

/* Tokens and positions are counted in int on the device. */
static const size_t max_tokens = (size_t)INT32_MAX;

size_t loglin_num_levels(size_t length) {
    size_t levels = 1;
    for (size_t rest = length > 0 ? length - 1 : 0; rest > 0; rest >>= 1) {
        levels++;
    }
    return levels;
}

size_t loglin_check_gates(const float *g, size_t count) {
    for (size_t i = 0; i < count; i++) {
        if (g == NULL || !(g[i] <= 0.0f) || !isfinite(g[i])) {
            return i;
        }
    }
    return count;
}

size_t loglin_dtype_size(loglin_dtype dtype) {
    return dtype == LOGLIN_F32 ? 4 : 2;
}

size_t loglin_problem_sequences(const loglin_problem *problem) {
    return problem->sequences > 0 ? problem->sequences : problem->batch;
}

static loglin_status check_range(const char *name, size_t value, size_t low, size_t high) {
    if (value < low || value > high) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "problem.%s is %zu, expected %zu to %zu", name, value, low, high);
    }
    return LOGLIN_OK;
}

static loglin_status check_choice(const char *name, int value, int last) {
    if (value < 0 || value > last) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "problem.%s is %d, expected 0 to %d", name, value, last);
    }
    return LOGLIN_OK;
}

static loglin_status check_choices(const loglin_problem *problem) {
    RETURN_IF_ERROR(check_choice("op", (int)problem->op, LOGLIN_GATED_DELTA));
    RETURN_IF_ERROR(check_choice("partition", (int)problem->partition, LOGLIN_STRONG));
    RETURN_IF_ERROR(check_choice("dtype", (int)problem->dtype, LOGLIN_BF16));
    RETURN_IF_ERROR(check_choice("weight_dtype", (int)problem->weight_dtype, LOGLIN_BF16));
    RETURN_IF_ERROR(check_choice("engine", (int)problem->engine, LOGLIN_ENGINE_FUSED));
    if (problem->weight_dtype != LOGLIN_F32 && problem->weight_dtype != problem->dtype) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "problem.weight_dtype is %d, expected %d (F32) or the dtype, %d",
                           (int)problem->weight_dtype, (int)LOGLIN_F32, (int)problem->dtype);
    }
    const unsigned all = LOGLIN_FORWARD | LOGLIN_BACKWARD | LOGLIN_STEP;
    if ((problem->phases & ~all) != 0) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "problem.phases is 0x%x, expected bits of 0x%x", problem->phases,
                           all);
    }
    if (!isfinite(problem->scale)) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "problem.scale is %g, expected a finite number",
                           (double)problem->scale);
    }
    return LOGLIN_OK;
}

static loglin_status check_shape(const loglin_problem *problem) {
    RETURN_IF_ERROR(check_range("batch", problem->batch, 1, max_tokens));
    RETURN_IF_ERROR(check_range("length", problem->length, 1, max_tokens));
    RETURN_IF_ERROR(check_range("heads", problem->heads, 1, 65535));
    RETURN_IF_ERROR(check_range("groups", problem->groups, 1, problem->heads));
    RETURN_IF_ERROR(check_range("dim_k", problem->dim_k, 1, LOGLIN_MAX_DIM));
    RETURN_IF_ERROR(check_range("dim_v", problem->dim_v, 1, LOGLIN_MAX_DIM));
    RETURN_IF_ERROR(check_range("levels", problem->levels, 1, LOGLIN_MAX_LEVELS));
    RETURN_IF_ERROR(check_range("sequences", problem->sequences, 0, max_tokens / 4));
    RETURN_IF_ERROR(check_range("max_length", problem->max_length, 0, problem->length));
    RETURN_IF_ERROR(check_range("max_position", problem->max_position, 0, max_tokens));
    if (problem->heads % problem->groups != 0) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "problem.groups is %zu, expected a divisor of heads, %zu",
                           problem->groups, problem->heads);
    }
    if (problem->batch > max_tokens / problem->length) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "problem: batch %zu times length %zu, expected at most %zu tokens",
                           problem->batch, problem->length, max_tokens);
    }
    if (problem->sequences > 0 && problem->batch != 1) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "problem.batch is %zu, expected 1 with packed sequences",
                           problem->batch);
    }
    if (problem->sequences == 0 && problem->max_length != 0 && problem->max_length != problem->length) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT,
                           "problem.max_length is %zu, expected 0 or length, %zu, without packed sequences",
                           problem->max_length, problem->length);
    }
    if (problem->chunk != 0 &&
        (problem->chunk < 16 || problem->chunk > 256 || (problem->chunk & (problem->chunk - 1)) != 0)) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "problem.chunk is %zu, expected 0 or a power of two from 16 to 256",
                           problem->chunk);
    }
    return LOGLIN_OK;
}

/* Enough levels for the longest sequence, and arrays whose bytes can be counted. */
static loglin_status check_sizes(const loglin_problem *filled) {
    const size_t end = filled->max_length + filled->max_position;
    if (end > max_tokens) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT,
                           "problem.max_position is %zu, expected at most %zu with sequences of %zu tokens",
                           filled->max_position, max_tokens - filled->max_length, filled->max_length);
    }
    if (filled->levels < loglin_num_levels(end)) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "problem.levels is %zu, expected at least %zu for %zu tokens",
                           filled->levels, loglin_num_levels(end), end);
    }
    const size_t sequences = loglin_problem_sequences(filled);
    size_t states = filled->heads * filled->levels * filled->dim_k * filled->dim_v * sizeof(float);
    if (states > SIZE_MAX / 4 / sequences) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "problem: the states of %zu sequences overflow", sequences);
    }
    return LOGLIN_OK;
}

loglin_status loglin_problem_validate(const loglin_problem *problem, loglin_problem *filled) {
    if (problem == NULL) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "problem is NULL");
    }
    RETURN_IF_ERROR(check_choices(problem));
    RETURN_IF_ERROR(check_shape(problem));
    *filled = *problem;
    filled->scale = problem->scale == 0.0f ? 1.0f : problem->scale;
    filled->max_length = problem->max_length > 0 ? problem->max_length : problem->length;
    filled->phases = problem->phases != 0 ? problem->phases : LOGLIN_FORWARD;
    return check_sizes(filled);
}

loglin_counts loglin_problem_counts(const loglin_problem *problem, int one_token) {
    const size_t sequences = loglin_problem_sequences(problem);
    const size_t tokens = one_token ? sequences : problem->batch * problem->length;
    return (loglin_counts){
        .tokens = tokens,
        .sequences = sequences,
        .qk = tokens * problem->groups * problem->dim_k,
        .vo = tokens * problem->heads * problem->dim_v,
        .gates = tokens * problem->heads,
        .level_scales = tokens * problem->heads * problem->levels,
        .states = sequences * problem->heads * problem->levels * problem->dim_k * problem->dim_v,
    };
}

loglin_status loglin_buffer_check(cl_context context, const char *name, loglin_buffer buffer, size_t count, size_t size,
                                  int required) {
    if (buffer.mem == NULL) {
        return required ? loglin_fail(LOGLIN_INVALID_ARGUMENT, "%s is missing, expected a buffer of %zu elements", name,
                                      count)
                        : LOGLIN_OK;
    }
    size_t bytes = 0;
    cl_context owner = NULL;
    cl_int code = clGetMemObjectInfo(buffer.mem, CL_MEM_SIZE, sizeof bytes, &bytes, NULL);
    if (code == CL_SUCCESS) {
        code = clGetMemObjectInfo(buffer.mem, CL_MEM_CONTEXT, sizeof(cl_context), &owner, NULL);
    }
    if (code != CL_SUCCESS) {
        return loglin_fail(code, "%s: not a valid buffer: %s", name, loglin_strerror(code));
    }
    if (owner != context) {
        return loglin_fail(LOGLIN_INVALID_ARGUMENT, "%s: the buffer is of another context than the loglin_device",
                           name);
    }
    const size_t held = bytes / size;
    if (buffer.offset > held || held - buffer.offset < count) {
        return loglin_fail(LOGLIN_BUFFER_TOO_SMALL,
                           "%s: the buffer holds %zu elements of %zu bytes, expected at least offset %zu plus %zu",
                           name, held, size, buffer.offset, count);
    }
    return LOGLIN_OK;
}
