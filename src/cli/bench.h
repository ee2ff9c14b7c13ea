/* SPDX-License-Identifier: Apache-2.0 */
/*
 * loglin bench: a suite is a table of rows; a row is a problem, what is measured of it, and the figure it should reach.
 * What goes wrong with a row does not end the run: functions that return a loglin_status leave a text in the machine's
 * `failure`, and the row is printed with it.
 */
#ifndef LOGLIN_CLI_BENCH_H
#define LOGLIN_CLI_BENCH_H

#include "cli/status.h"
#include <jansson.h>
#include <stdbool.h>

enum { LOGLIN_BENCH_MAX_ROWS = 32, LOGLIN_BENCH_MAX_REPETITIONS = 1000, LOGLIN_BENCH_MAX_SETS = 3 };

/* ---- The machine (bench_machine.c) ------------------------------------------------------------------------------ */

typedef struct loglin_bench_machine {
    loglin_device_info info;
    cl_context context;
    cl_command_queue queue; /* in order, with profiling */
    loglin_device *device;
    bool events;     /* times are those of device events, else of the host's clock around a call and its end */
    uint64_t random; /* state */
    char failure[512];
} loglin_bench_machine;

/* *machine must be zero before; loglin_cli_bench_machine_close is due in any case. */
loglin_cli_status loglin_cli_bench_machine_open(loglin_bench_machine *machine, const char *selector);
void loglin_cli_bench_machine_close(loglin_bench_machine *machine);

/* Writes machine->failure and returns the status. */
loglin_status loglin_cli_bench_fail(loglin_bench_machine *machine, loglin_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* A number from low to high. */
float loglin_cli_bench_random(loglin_bench_machine *machine, float low, float high);

/* Something that can be timed, once a call. */
typedef struct loglin_bench_work {
    loglin_status (*run)(loglin_bench_machine *machine, void *data, double *ms);
    void *data;
    double amount; /* what a run does: operations or bytes */
    double median_ms, least_ms;
    size_t runs;
} loglin_bench_work;

/*
 * Times `count` works, at most 4, by turns, `repetitions` times each after `warm_up` runs; `patient`: also those whose
 * warm runs take longer than a second, which otherwise are timed three times only.
 */
loglin_status loglin_cli_bench_measure(loglin_bench_machine *machine, loglin_bench_work *works, size_t count,
                                       size_t repetitions, size_t warm_up, bool patient);

/* Enqueues one run; *done is its last event. */
typedef loglin_status (*loglin_bench_enqueue)(loglin_bench_machine *machine, void *data, cl_event *done);

/* Times one run, from the queue's readiness to the end. */
loglin_status loglin_cli_bench_time(loglin_bench_machine *machine, loglin_bench_enqueue enqueue, void *data,
                                    double *ms);

/* ---- A problem with its buffers (bench_load.c) ------------------------------------------------------------------ */

typedef enum loglin_bench_tensor {
    LOGLIN_BENCH_Q,
    LOGLIN_BENCH_K,
    LOGLIN_BENCH_V,
    LOGLIN_BENCH_G,
    LOGLIN_BENCH_LEVEL_SCALES,
    LOGLIN_BENCH_BETA,
    LOGLIN_BENCH_D_O,
    LOGLIN_BENCH_INPUTS, /* how many are inputs; those that follow are outputs */
    LOGLIN_BENCH_O = LOGLIN_BENCH_INPUTS,
    LOGLIN_BENCH_DQ,
    LOGLIN_BENCH_DK,
    LOGLIN_BENCH_DV,
    LOGLIN_BENCH_DG,
    LOGLIN_BENCH_DLEVEL_SCALES,
    LOGLIN_BENCH_DBETA,
    LOGLIN_BENCH_WORKSPACE,
    LOGLIN_BENCH_TENSORS,
} loglin_bench_tensor;

/* Forward, or forward and backward, as problem.phases says. */
typedef struct loglin_bench_load {
    loglin_problem problem;
    loglin_plan *plan;
    char plan_text[512];
    char engine[32];
    size_t sets;                                             /* of inputs, taken in turn */
    size_t last;                                             /* the set of the last run */
    cl_mem mem[LOGLIN_BENCH_MAX_SETS][LOGLIN_BENCH_TENSORS]; /* outputs: in set 0 only */
} loglin_bench_load;

/* Elements of a token; their type, and bytes. */
size_t loglin_cli_bench_width(const loglin_problem *problem, loglin_bench_tensor tensor);
loglin_dtype loglin_cli_bench_dtype(const loglin_problem *problem, loglin_bench_tensor tensor);
size_t loglin_cli_bench_element(const loglin_problem *problem, loglin_bench_tensor tensor);

/* *load must be zero before; loglin_cli_bench_load_close is due in any case. */
loglin_status loglin_cli_bench_load_open(loglin_bench_machine *machine, const loglin_problem *problem,
                                         loglin_bench_load *load);
void loglin_cli_bench_load_close(loglin_bench_load *load);

/* As loglin_bench_work.run; data is the load. */
loglin_status loglin_cli_bench_load_run(loglin_bench_machine *machine, void *data, double *ms);

/* Bytes of the workspace that the problem's phases need. */
size_t loglin_cli_bench_workspace(const loglin_plan *plan);

/* A buffer of random numbers of a type from low to high. */
loglin_status loglin_cli_bench_random_buffer(loglin_bench_machine *machine, const char *name, loglin_dtype dtype,
                                             size_t count, float low, float high, cl_mem *mem);

/* ---- Its outputs against float64 (bench_check.c) ---------------------------------------------------------------- */

/*
 * The largest relative error of o and, of the gradients, of dv and dq, each over some rows of the last sequence that the
 * load's last run computed.
 */
loglin_status loglin_cli_bench_check(loglin_bench_machine *machine, const loglin_bench_load *load, double *error);

/* ---- Steps and copies (bench_step.c) ---------------------------------------------------------------------------- */

typedef struct loglin_bench_stepper {
    loglin_problem problem;
    loglin_plan *plan;
    char plan_text[512];
    loglin_inputs in;
    loglin_state state;
    loglin_buffer o;
    int32_t position; /* each run starts here */
    size_t steps;     /* of a run */
    cl_mem copy_from, copy_to;
    size_t copy_bytes;
} loglin_bench_stepper;

/* *stepper must be zero before; loglin_cli_bench_stepper_close is due in any case. */
loglin_status loglin_cli_bench_stepper_open(loglin_bench_machine *machine, const loglin_problem *problem,
                                            int32_t position, size_t steps, loglin_bench_stepper *stepper);
void loglin_cli_bench_stepper_close(loglin_bench_stepper *stepper);

/* As loglin_bench_work.run; data is the stepper: its steps, and as many copies of half its states. */
loglin_status loglin_cli_bench_stepper_run(loglin_bench_machine *machine, void *data, double *ms);
loglin_status loglin_cli_bench_copy_run(loglin_bench_machine *machine, void *data, double *ms);

/* Bytes that a run must move: the levels that exist read once, two states a step written. */
double loglin_cli_bench_step_bytes(const loglin_bench_stepper *stepper);

/* Bytes that as many copies read and write. */
double loglin_cli_bench_copy_bytes(const loglin_bench_stepper *stepper);

/* ---- The yardstick (bench_sgemm.c) ------------------------------------------------------------------------------ */

/* OpenBLAS's sgemm of two matrices of 1024 x 1024, loaded at run time. */
typedef struct loglin_bench_sgemm loglin_bench_sgemm;

/* NULL if it is not there. */
loglin_bench_sgemm *loglin_cli_bench_sgemm_open(loglin_bench_machine *machine, int threads);
void loglin_cli_bench_sgemm_close(loglin_bench_sgemm *sgemm);

/* As loglin_bench_work.run. */
loglin_status loglin_cli_bench_sgemm_run(loglin_bench_machine *machine, void *data, double *ms);
double loglin_cli_bench_sgemm_work(void);

/* ---- Suites (bench_suites.c) ------------------------------------------------------------------------------------ */

typedef enum loglin_bench_kind {
    LOGLIN_BENCH_TIME,           /* milliseconds: at most the figure */
    LOGLIN_BENCH_STEP_TIME,      /* microseconds a step: at most the figure */
    LOGLIN_BENCH_SGEMM,          /* nominal rate over that of sgemm: at least the figure; as all those that follow: */
    LOGLIN_BENCH_BLAS,           /* over that of the blas engine */
    LOGLIN_BENCH_F32,            /* over that of f32 storage */
    LOGLIN_BENCH_COPY,           /* bytes a second of steps over those of a copy */
    LOGLIN_BENCH_GROWTH,         /* time from T / 16 to T over nominal work from T / 16 to T: at most the figure */
    LOGLIN_BENCH_WORKSPACE_SIZE, /* bytes over those of q, k, v and o: at most the figure */
} loglin_bench_kind;

typedef struct loglin_bench_row {
    const char *name;
    loglin_bench_kind kind;
    loglin_problem problem; /* levels and engine are filled in */
    double required, aim;   /* 0: none */
    size_t position;        /* of steps */
    size_t steps;
} loglin_bench_row;

typedef struct loglin_bench_suite {
    const char *name;
    size_t repetitions, warm_up;
    bool events;
    loglin_engine engine; /* unless another is asked for */
    const loglin_bench_row *rows;
    size_t count;
} loglin_bench_suite;

extern const loglin_bench_suite loglin_cli_bench_cpu, loglin_cli_bench_paper;

/* The row that is measured at one and at two threads, and the name and the figure of the ratio of these. */
extern const char loglin_cli_bench_single[], loglin_cli_bench_two_cores[];
extern const double loglin_cli_bench_two_cores_required;

/* Operations of a forward pass, or of forward and backward, at chunks of 64 tokens, whatever chunks are used. */
double loglin_cli_bench_nominal_work(const loglin_problem *problem);

/* ---- One row (bench_row.c) and the report (bench_report.c) ------------------------------------------------------ */

typedef struct loglin_bench_options {
    const loglin_bench_suite *suite;
    const char *device;
    const char *rows[LOGLIN_BENCH_MAX_ROWS]; /* names; none: all */
    size_t row_count;
    const char *engine_name; /* NULL: the suite's */
    loglin_engine engine;
    size_t repetitions; /* 0: the suite's */
    size_t threads;     /* 0: one process for each number of threads */
    bool json, help;
} loglin_bench_options;

/* Measures a row; *good becomes false where it failed or an output was wrong.  NULL if out of memory. */
json_t *loglin_cli_bench_row(loglin_bench_machine *machine, const loglin_bench_options *options,
                             loglin_bench_sgemm *sgemm, const loglin_bench_row *row, bool *good);

/* Fills in value, unit, required, aim and met of a row. */
void loglin_cli_bench_set_value(json_t *row, double value, const char *unit, double required, double aim, bool at_most);

void loglin_cli_bench_print_heading(void);
void loglin_cli_bench_print_row(const json_t *row);

#endif
