/* SPDX-License-Identifier: Apache-2.0 */
/* The rows of the suites, with the figures that the project has set itself. */
#include "cli/bench.h"

#define BOTH (LOGLIN_FORWARD | LOGLIN_BACKWARD)
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

double loglin_cli_bench_nominal_work(const loglin_problem *problem) {
    const double k = (double)problem->dim_k;
    const double v = (double)problem->dim_v;
    const size_t chunks = (problem->length + 63) / 64;
    size_t reads = 0; /* of states of levels between chunks */
    for (size_t n = 0; n < chunks; ++n) {
        for (size_t bits = n; bits != 0; bits &= bits - 1) {
            ++reads;
        }
    }
    const bool delta = problem->op == LOGLIN_GATED_DELTA;
    const double in_chunk = delta ? 4096 * (3 * k + 2 * v) + 256 * k * v : 4096 * (k + v) + 128 * k * v;
    const double read = (delta ? 384 : 128) * k * v;
    const double forward =
        (double)(problem->batch * problem->heads) * ((double)chunks * in_chunk + (double)reads * read);
    return (problem->phases & LOGLIN_BACKWARD) != 0 ? 3.5 * forward : forward;
}

/* ---- CPUs: ratios taken in one run ------------------------------------------------------------------------------ */

#define SCALAR(LENGTH, HEADS, GROUPS, DTYPE, PHASES)                                                                   \
    {                                                                                                                  \
        .dtype = (DTYPE), .batch = 1, .length = (LENGTH), .heads = (HEADS), .groups = (GROUPS), .dim_k = 128,          \
        .dim_v = 64, .phases = (PHASES)                                                                                \
    }
#define DELTA(LENGTH, DTYPE, PHASES)                                                                                   \
    {                                                                                                                  \
        .op = LOGLIN_GATED_DELTA, .dtype = (DTYPE), .batch = 1, .length = (LENGTH), .heads = 4, .groups = 4,           \
        .dim_k = 128, .dim_v = 128, .phases = (PHASES)                                                                 \
    }
#define STEP(DTYPE, BATCH, HEADS)                                                                                      \
    {                                                                                                                  \
        .dtype = (DTYPE), .batch = (BATCH), .length = 1, .heads = (HEADS), .groups = 1, .dim_k = 128, .dim_v = 64,     \
        .levels = 15, .max_position = 1 << 13, .phases = LOGLIN_STEP                                                   \
    }

const char loglin_cli_bench_single[] = "single";
const char loglin_cli_bench_two_cores[] = "single-two-cores";
const double loglin_cli_bench_two_cores_required = 1.6;

static const loglin_bench_row cpu_rows[] = {
    {"scalar-forward", LOGLIN_BENCH_SGEMM, SCALAR(4096, 8, 1, LOGLIN_F32, LOGLIN_FORWARD), .required = 0.90},
    {"scalar-forward-groups", LOGLIN_BENCH_SGEMM, SCALAR(4096, 8, 8, LOGLIN_F32, LOGLIN_FORWARD), .required = 0.75},
    {"scalar-both", LOGLIN_BENCH_SGEMM, SCALAR(4096, 8, 1, LOGLIN_F32, BOTH), .required = 0.75},
    {"delta-forward", LOGLIN_BENCH_SGEMM, DELTA(4096, LOGLIN_F32, LOGLIN_FORWARD), .required = 0.60},
    {"delta-both", LOGLIN_BENCH_SGEMM, DELTA(4096, LOGLIN_F32, BOTH), .required = 0.50},
    {"scalar-forward-f16", LOGLIN_BENCH_F32, SCALAR(4096, 8, 1, LOGLIN_F16, LOGLIN_FORWARD), .required = 0.85},
    {"scalar-forward-bf16", LOGLIN_BENCH_F32, SCALAR(4096, 8, 1, LOGLIN_BF16, LOGLIN_FORWARD), .required = 0.85},
    {"scalar-both-f16", LOGLIN_BENCH_F32, SCALAR(4096, 8, 1, LOGLIN_F16, BOTH), .required = 0.85},
    {"scalar-both-bf16", LOGLIN_BENCH_F32, SCALAR(4096, 8, 1, LOGLIN_BF16, BOTH), .required = 0.85},
    {"delta-forward-f16", LOGLIN_BENCH_F32, DELTA(4096, LOGLIN_F16, LOGLIN_FORWARD), .required = 0.85},
    {"delta-forward-bf16", LOGLIN_BENCH_F32, DELTA(4096, LOGLIN_BF16, LOGLIN_FORWARD), .required = 0.85},
    {"delta-both-f16", LOGLIN_BENCH_F32, DELTA(4096, LOGLIN_F16, BOTH), .required = 0.85},
    {"delta-both-bf16", LOGLIN_BENCH_F32, DELTA(4096, LOGLIN_BF16, BOTH), .required = 0.85},
    {loglin_cli_bench_single, LOGLIN_BENCH_SGEMM, SCALAR(16384, 1, 1, LOGLIN_F32, LOGLIN_FORWARD), .required = 0},
    {"scalar-forward-blas", LOGLIN_BENCH_BLAS, SCALAR(4096, 8, 1, LOGLIN_F32, LOGLIN_FORWARD), .required = 8},
    {"scalar-forward-groups-blas", LOGLIN_BENCH_BLAS, SCALAR(4096, 8, 8, LOGLIN_F32, LOGLIN_FORWARD), .required = 8},
    {"scalar-both-blas", LOGLIN_BENCH_BLAS, SCALAR(4096, 8, 1, LOGLIN_F32, BOTH), .required = 8},
    {"delta-forward-blas", LOGLIN_BENCH_BLAS, DELTA(4096, LOGLIN_F32, LOGLIN_FORWARD), .required = 8},
    {"delta-both-blas", LOGLIN_BENCH_BLAS, DELTA(4096, LOGLIN_F32, BOTH), .required = 8},
    {"scalar-growth", LOGLIN_BENCH_GROWTH, SCALAR(65536, 8, 1, LOGLIN_F32, LOGLIN_FORWARD), .required = 1.15},
    {"delta-growth", LOGLIN_BENCH_GROWTH, DELTA(65536, LOGLIN_F32, LOGLIN_FORWARD), .required = 1.15},
    {"scalar-workspace", LOGLIN_BENCH_WORKSPACE_SIZE, SCALAR(65536, 8, 1, LOGLIN_F32, LOGLIN_FORWARD), .required = 1},
    {"scalar-workspace-both", LOGLIN_BENCH_WORKSPACE_SIZE, SCALAR(65536, 8, 1, LOGLIN_F32, BOTH), .required = 1},
    {"delta-workspace", LOGLIN_BENCH_WORKSPACE_SIZE, DELTA(65536, LOGLIN_F32, LOGLIN_FORWARD), .required = 1},
    {"delta-workspace-both", LOGLIN_BENCH_WORKSPACE_SIZE, DELTA(65536, LOGLIN_F32, BOTH), .required = 1},
    {"step", LOGLIN_BENCH_COPY, STEP(LOGLIN_F32, 8, 8), .required = 0.6, .position = 8000, .steps = 8},
};

const loglin_bench_suite loglin_cli_bench_cpu = {
    .name = "cpu",
    .repetitions = 7,
    .warm_up = 1,
    .engine = LOGLIN_ENGINE_FUSED,
    .rows = cpu_rows,
    .count = COUNT(cpu_rows),
};

/* ---- The paper's kernel benchmark: times on one H100 ------------------------------------------------------------- */

/* Level scales and beta have the rows' type, as the byte counts of the figures have them; FLOAT_SCALES, and steps: floats. */
#define PAPER(LENGTH, DTYPE, WEIGHT_DTYPE, PHASES)                                                                     \
    {                                                                                                                  \
        .dtype = (DTYPE), .weight_dtype = (WEIGHT_DTYPE), .batch = 2, .length = (LENGTH), .heads = 48, .groups = 1,    \
        .dim_k = 128, .dim_v = 64, .phases = (PHASES)                                                                  \
    }
#define PAPER_BF16(LENGTH, PHASES) PAPER(LENGTH, LOGLIN_BF16, LOGLIN_BF16, PHASES)
#define PAPER_F16(LENGTH, PHASES) PAPER(LENGTH, LOGLIN_F16, LOGLIN_F16, PHASES)
#define FLOAT_SCALES(LENGTH, PHASES) PAPER(LENGTH, LOGLIN_BF16, LOGLIN_F32, PHASES)
#define PAPER_DELTA(LENGTH, HEADS, DIM_K, DIM_V, PHASES)                                                               \
    {                                                                                                                  \
        .op = LOGLIN_GATED_DELTA, .dtype = LOGLIN_BF16, .weight_dtype = LOGLIN_BF16, .batch = 2, .length = (LENGTH),   \
        .heads = (HEADS), .groups = (HEADS), .dim_k = (DIM_K), .dim_v = (DIM_V), .phases = (PHASES)                    \
    }
#define LONG                                                                                                           \
    {                                                                                                                  \
        .dtype = LOGLIN_BF16, .weight_dtype = LOGLIN_BF16, .batch = 1, .length = 1 << 20, .heads = 8, .groups = 1,     \
        .dim_k = 128, .dim_v = 64, .phases = LOGLIN_FORWARD                                                            \
    }

static const loglin_bench_row paper_rows[] = {
    {"forward-2048", LOGLIN_BENCH_TIME, PAPER_BF16(2048, LOGLIN_FORWARD), .required = 0.09, .aim = 0.08},
    {"both-2048", LOGLIN_BENCH_TIME, PAPER_BF16(2048, BOTH), .required = 0.45, .aim = 0.35},
    {"forward-8192", LOGLIN_BENCH_TIME, PAPER_BF16(8192, LOGLIN_FORWARD), .required = 0.28, .aim = 0.22},
    {"both-8192", LOGLIN_BENCH_TIME, PAPER_BF16(8192, BOTH), .required = 1.1, .aim = 0.80},
    {"forward-16384", LOGLIN_BENCH_TIME, PAPER_BF16(16384, LOGLIN_FORWARD), .required = 0.52, .aim = 0.40},
    {"both-16384", LOGLIN_BENCH_TIME, PAPER_BF16(16384, BOTH), .required = 2.0, .aim = 1.5},
    {"forward-65536", LOGLIN_BENCH_TIME, PAPER_BF16(65536, LOGLIN_FORWARD), .required = 2.1, .aim = 1.6},
    {"both-65536", LOGLIN_BENCH_TIME, PAPER_BF16(65536, BOTH), .required = 8.0, .aim = 6.0},
    {"forward-131072", LOGLIN_BENCH_TIME, PAPER_BF16(131072, LOGLIN_FORWARD), .required = 4.2, .aim = 3.2},
    {"both-131072", LOGLIN_BENCH_TIME, PAPER_BF16(131072, BOTH), .required = 16, .aim = 12},
    {"forward-1048576", LOGLIN_BENCH_TIME, LONG, .required = 0},
    {"delta-forward-8192", LOGLIN_BENCH_TIME, PAPER_DELTA(8192, 16, 128, 128, LOGLIN_FORWARD), .required = 1.2,
     .aim = 0.75},
    {"delta-both-8192", LOGLIN_BENCH_TIME, PAPER_DELTA(8192, 16, 128, 128, BOTH), .required = 6.0, .aim = 4.0},
    {"model-delta-forward-16384", LOGLIN_BENCH_TIME, PAPER_DELTA(16384, 6, 192, 384, LOGLIN_FORWARD), .required = 0},
    {"model-delta-both-16384", LOGLIN_BENCH_TIME, PAPER_DELTA(16384, 6, 192, 384, BOTH), .required = 0},
    {"f16-forward-16384", LOGLIN_BENCH_TIME, PAPER_F16(16384, LOGLIN_FORWARD), .required = 0},
    {"f16-both-16384", LOGLIN_BENCH_TIME, PAPER_F16(16384, BOTH), .required = 0},
    {"float-scales-forward-16384", LOGLIN_BENCH_TIME, FLOAT_SCALES(16384, LOGLIN_FORWARD), .required = 0},
    {"float-scales-both-16384", LOGLIN_BENCH_TIME, FLOAT_SCALES(16384, BOTH), .required = 0},
    {"step-64", LOGLIN_BENCH_COPY, STEP(LOGLIN_BF16, 64, 48), .required = 0.70, .position = 8192, .steps = 8},
    {"step-1", LOGLIN_BENCH_STEP_TIME, STEP(LOGLIN_BF16, 1, 48), .required = 15, .position = 8192, .steps = 512},
};

const loglin_bench_suite loglin_cli_bench_paper = {
    .name = "paper",
    .repetitions = 21,
    .warm_up = 3,
    .events = true,
    .engine = LOGLIN_ENGINE_AUTO,
    .rows = paper_rows,
    .count = COUNT(paper_rows),
};
