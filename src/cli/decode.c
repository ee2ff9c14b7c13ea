/* SPDX-License-Identifier: Apache-2.0 */
/*
 * loglin decode: what forward computes, by one loglin_step a token.  All steps are enqueued without looking at the
 * device.  The sequences of a batch advance together: their inputs are laid out token by token first, [T, B, ...].
 * Packed sequences have lengths of their own, so each is decoded alone, over its part of the arrays and of the states.
 */
#include "cli/commands.h"

#include "cli/report.h"
#include <stdlib.h>
#include <string.h>

/* Everything that steps work on, at token 0 of sequence 0. */
typedef struct decoding {
    loglin_inputs in;
    loglin_state state;
    loglin_buffer o;
    size_t lanes; /* sequences that a step advances */
} decoding;

/* [outer, inner, row bytes] to [inner, outer, row bytes]. */
static void transpose_rows(const void *from, size_t outer, size_t inner, size_t row, void *to) {
    for (size_t i = 0; i < outer; ++i) {
        for (size_t j = 0; j < inner; ++j) {
            memcpy((char *)to + (j * outer + i) * row, (const char *)from + (i * inner + j) * row, row);
        }
    }
}

/* Uploads a tensor [B, T, ...] as [T, B, ...]; NULL leaves *buffer absent. */
static loglin_cli_status upload_by_token(loglin_cli_run *run, const loglin_tensor *tensor, loglin_buffer *buffer) {
    const size_t batch = run->problem.description.batch;
    const size_t length = run->problem.description.length;
    if (tensor == NULL || batch == 1) {
        return loglin_cli_upload_tensor(&run->session, tensor, buffer);
    }
    void *data = malloc(tensor->size);
    if (data == NULL) {
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "%s: out of memory for %zu bytes", tensor->name, tensor->size);
    }
    transpose_rows(tensor->data, batch, length, tensor->size / (batch * length), data);
    const loglin_cli_status status = loglin_cli_upload(&run->session, tensor->name, data, tensor->size, buffer);
    free(data);
    return status;
}

static loglin_cli_status upload(loglin_cli_run *run, decoding *decoder) {
    const loglin_cli_problem *problem = &run->problem;
    RETURN_IF_FAILED(upload_by_token(run, problem->q, &decoder->in.q));
    RETURN_IF_FAILED(upload_by_token(run, problem->k, &decoder->in.k));
    RETURN_IF_FAILED(upload_by_token(run, problem->v, &decoder->in.v));
    RETURN_IF_FAILED(upload_by_token(run, problem->g, &decoder->in.g));
    RETURN_IF_FAILED(upload_by_token(run, problem->level_scales, &decoder->in.level_scales));
    RETURN_IF_FAILED(upload_by_token(run, problem->beta, &decoder->in.beta));
    if (problem->initial_states != NULL) {
        RETURN_IF_FAILED(loglin_cli_write(&run->session, "initial_states", problem->initial_states->data,
                                          problem->initial_states->size, decoder->state.values));
    }
    return loglin_cli_write(&run->session, "position", problem->positions,
                            problem->sequences * sizeof *problem->positions, decoder->state.position);
}

static loglin_buffer advance(loglin_buffer buffer, size_t elements) {
    buffer.offset += elements;
    return buffer;
}

/* Token `token` of the arrays, for sequence `sequence` and the lanes behind it. */
static loglin_cli_status step(const loglin_cli_run *run, const decoding *decoder, size_t token, size_t sequence) {
    const loglin_problem *sizes = &run->problem.description;
    const size_t keys = token * decoder->lanes * sizes->groups * sizes->dim_k;
    const size_t heads = token * decoder->lanes * sizes->heads;
    const loglin_inputs in = {
        .q = advance(decoder->in.q, keys),
        .k = advance(decoder->in.k, keys),
        .v = advance(decoder->in.v, heads * sizes->dim_v),
        .g = advance(decoder->in.g, heads),
        .level_scales = advance(decoder->in.level_scales, heads * sizes->levels),
        .beta = advance(decoder->in.beta, heads),
    };
    const loglin_state state = {
        .values = advance(decoder->state.values, sequence * sizes->heads * sizes->levels * sizes->dim_k * sizes->dim_v),
        .position = advance(decoder->state.position, sequence),
    };
    const loglin_status status = loglin_step(run->session.plan, &in, &state, advance(decoder->o, heads * sizes->dim_v),
                                             run->session.queue, 0, NULL, NULL);
    return status == LOGLIN_OK ? LOGLIN_CLI_OK : loglin_cli_fail_library(status);
}

/* All tokens, the first one timed apart. */
static loglin_cli_status step_through(loglin_cli_run *run, const decoding *decoder) {
    const size_t walks = run->problem.sequences / decoder->lanes;
    size_t token = 0;
    RETURN_IF_FAILED(loglin_cli_finish(&run->session));
    double begin = loglin_cli_now_ms();
    for (size_t walk = 0; walk < walks; ++walk) {
        const size_t end = token + loglin_cli_sequence_length(&run->problem, walk);
        for (; token < end; ++token) {
            RETURN_IF_FAILED(step(run, decoder, token, walk));
            if (token == 0) {
                RETURN_IF_FAILED(loglin_cli_finish(&run->session));
                run->first_run_ms = loglin_cli_now_ms() - begin;
                begin = loglin_cli_now_ms();
            }
        }
    }
    RETURN_IF_FAILED(loglin_cli_finish(&run->session));
    run->run_ms = loglin_cli_now_ms() - begin;
    run->steps = token - 1;
    return LOGLIN_CLI_OK;
}

/* Whether a level of a sequence has any keys after `position` tokens. */
static bool level_exists(loglin_partition partition, int32_t position, size_t level) {
    if (position == 0 || level == 0) {
        return position > 0;
    }
    const uint32_t above = (uint32_t)(position - 1) >> (level - 1);
    return partition == LOGLIN_WEAK ? (above & 1U) != 0 : above != 0;
}

/* As loglin_forward does: zeros in the levels that do not exist. */
static void clear_missing_levels(const loglin_cli_run *run, const loglin_cli_output *values, const int32_t *positions) {
    const loglin_problem *sizes = &run->problem.description;
    const size_t state = sizes->dim_k * sizes->dim_v;
    float *next = values->data;
    for (size_t n = 0; n < run->problem.sequences; ++n) {
        for (size_t head = 0; head < sizes->heads; ++head) {
            for (size_t level = 0; level < sizes->levels; ++level, next += state) {
                if (!level_exists(sizes->partition, positions[n], level)) {
                    memset(next, 0, state * sizeof *next);
                }
            }
        }
    }
}

/* [T, B, H, V] to [B, T, H, V]. */
static loglin_cli_status restore_order(const loglin_cli_run *run, loglin_cli_output *o) {
    const size_t batch = run->problem.description.batch;
    const size_t length = run->problem.description.length;
    if (batch == 1) {
        return LOGLIN_CLI_OK;
    }
    void *data = malloc(o->tensor.size);
    if (data == NULL) {
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "o: out of memory for %zu bytes", o->tensor.size);
    }
    transpose_rows(o->data, length, batch, o->tensor.size / (batch * length), data);
    free(o->data);
    o->data = data;
    o->tensor.data = data;
    return LOGLIN_CLI_OK;
}

/* The problem of a step: one token of all lanes, as far as the longest sequence will stand. */
static loglin_problem step_problem(const loglin_cli_problem *problem, size_t lanes) {
    loglin_problem description = problem->description;
    description.batch = lanes;
    description.length = 1;
    description.sequences = 0;
    description.max_length = 0;
    description.max_position = 0;
    for (size_t n = 0; n < problem->sequences; ++n) {
        const size_t total = (size_t)problem->positions[n] + loglin_cli_sequence_length(problem, n);
        if (total > description.max_position + 1) {
            description.max_position = total - 1;
        }
    }
    return description;
}

static loglin_cli_status execute(loglin_cli_run *run) {
    const loglin_cli_problem *problem = &run->problem;
    decoding decoder = {.lanes = problem->bounds == NULL ? problem->description.batch : 1};
    const loglin_problem description = step_problem(problem, decoder.lanes);
    RETURN_IF_FAILED(loglin_cli_session_open(&run->session, run->arguments.device, &description));
    loglin_cli_output *o;
    RETURN_IF_FAILED(loglin_cli_add_output(run, "o", problem->v->dtype, 4, problem->v->shape, &o));
    RETURN_IF_FAILED(loglin_cli_add_state_outputs(run, &decoder.state));
    RETURN_IF_FAILED(loglin_cli_check_references(run));
    decoder.o = o->buffer;
    RETURN_IF_FAILED(upload(run, &decoder));
    RETURN_IF_FAILED(step_through(run, &decoder));
    RETURN_IF_FAILED(loglin_cli_read_outputs(run));
    const loglin_cli_output *values = o + 1;
    const loglin_cli_output *positions = o + 2;
    clear_missing_levels(run, values, positions->data);
    return restore_order(run, o);
}

loglin_cli_status loglin_cli_decode(int argc, char **argv) {
    static const loglin_cli_operation operation = {
        .summary =
            "Computes what \"loglin forward\" does, token by token with the states updated in place.  A step has one\n"
            "implementation, so --engine and --chunk do not matter.",
        .files = "IN     as for \"loglin forward\"\n"
                 "OUT    as of \"loglin forward\"",
        .phase = LOGLIN_STEP,
        .execute = execute,
    };
    return loglin_cli_run_operation(argc, argv, &operation);
}
