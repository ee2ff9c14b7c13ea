/* SPDX-License-Identifier: Apache-2.0 */
/*
 * loglin: log-linear attention on OpenCL devices.
 *
 * Log-linear attention (Guo, Yang, Goel, Xing, Dao, Kim, "Log-Linear Attention", ICLR 2026, arXiv 2506.04761)
 * replaces the one hidden state of linear attention by a logarithmically growing set of states: the prefix of
 * every query is split like a Fenwick tree into levels, and each level has its own weight.  Training costs
 * O(T log T), decoding O(log T) time and memory a token.
 *
 * The shortest program:
 *
 *     cl_device_id id;
 *     loglin_select_device(NULL, &id);                          // LOGLIN_DEVICE, else the best device
 *     cl_context context = clCreateContext(NULL, 1, &id, NULL, NULL, NULL);
 *     cl_command_queue queue = clCreateCommandQueueWithProperties(context, id, NULL, NULL);
 *
 *     loglin_device *device;
 *     loglin_plan *plan;
 *     loglin_problem problem = {.batch = 1, .length = 4096, .heads = 8, .groups = 1,
 *                               .dim_k = 128, .dim_v = 64, .levels = 13};
 *     loglin_device_create(context, id, &device);
 *     loglin_plan_create(device, &problem, &plan);               // slow: compiles
 *     ... allocate buffers; a workspace of loglin_workspace_size(plan, LOGLIN_FORWARD) bytes ...
 *     loglin_forward(plan, &inputs, NULL, o, NULL, workspace, queue, 0, NULL, NULL);          // fast: only enqueues
 *
 * Notation, for one sequence and one head h of H; its queries and keys are those of group h / (H / G):
 *     t = 0 .. T-1             absolute position of a token in its sequence
 *     q_t, k_t  in R^K         query and key
 *     v_t, o_t  in R^V         value and output
 *     g_t <= 0                 log forget gate;  c_t = g_0 + ... + g_t
 *     lambda_t  in R^L         level weights ("level_scales")
 *     beta_t    in [0, 1]      writing strength of the delta rule
 *     level(t, s)              the level of key s for query t, see loglin_partition
 *
 *     LOGLIN_MAMBA2       o_t = sum_{s<=t} lambda_t[level(t,s)] exp(c_t - c_s) (q_t . k_s) v_s
 *     LOGLIN_GATED_DELTA  o_t = sum_{s<=t} lambda_t[level(t,s)] (A_t ... A_{s+1} beta_s k_s v_s^T)^T q_t,
 *                         A_t = exp(g_t) (I - beta_t k_t k_t^T)
 *
 * Arrays are row-major with the last index fastest:
 *     q, k, dq, dk                      [B, T, G, K]     problem.dtype
 *     v, o, do, dv                      [B, T, H, V]     problem.dtype
 *     g, dg                             [B, T, H]        float
 *     level_scales, dlevel_scales       [B, T, H, L]     problem.weight_dtype
 *     beta, dbeta                       [B, T, H]        problem.weight_dtype
 *     cu_seqlens                        [N + 1]          int32, see loglin_problem.sequences
 *     state values                      [N, H, L, K, V]  float
 *     state log_decay                   [N, H, L]        float
 *     state position                    [N]              int32
 * N is the number of sequences: problem.batch, or problem.sequences where that is not 0.
 *
 * Sums are in float whatever the storage, and so is all arithmetic of the blas engine.  The fused engine on matrix units
 * takes f16 and bf16 storage only, and rounds the factors of its products to that type: weighted queries, q k^T and level
 * states.  In f16 a level state's elements must stay below 4e6 in size (delta rule: 6e4); ask for LOGLIN_ENGINE_BLAS
 * where they do not.
 *
 * Errors.  Every function that can fail returns a loglin_status: 0, a negative OpenCL error code passed through, or a
 * positive LOGLIN_ code.  loglin_last_error() then says, for the calling thread, which argument was wrong, what it
 * was and what was expected, or what the OpenCL compiler said.
 *
 * Threads.  A loglin_device may be used by any number of threads at once.  A loglin_plan by one thread at a time.
 * Functions that take neither may be called by any thread at any time.
 *
 * The fused engine on CPUs takes numbers below 1.2e-38 as 0.
 *
 * Environment.  LOGLIN_DEVICE (which device loglin_select_device(NULL) takes), LOGLIN_CACHE_DIR (where compiled
 * programs and tuning results are kept; an empty value switches the cache off; not set: $XDG_CACHE_HOME/loglin, else
 * $HOME/.cache/loglin), LOGLIN_BUILD_OPTIONS (appended to the OpenCL build options), LOGLIN_LOG (error, warn, info or
 * debug: messages on standard error; warn is the default).  A device keeps the directory and the options that it found.
 */
#ifndef LOGLIN_H
#define LOGLIN_H

#ifndef CL_TARGET_OPENCL_VERSION
#define CL_TARGET_OPENCL_VERSION 300
#endif
#include <CL/cl.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(LOGLIN_BUILDING) && defined(__GNUC__)
#define LOGLIN_API __attribute__((visibility("default")))
#else
#define LOGLIN_API
#endif

#define LOGLIN_VERSION_MAJOR 0
#define LOGLIN_VERSION_MINOR 1
#define LOGLIN_VERSION_PATCH 0

/* "major.minor.patch" of the library that is linked, a static string. */
LOGLIN_API const char *loglin_version(void);

/* ---- Status ---------------------------------------------------------------------------------------------------- */

/* X(name, value, text): every status of the library's own. */
#define LOGLIN_STATUS_LIST(X)                                                                                          \
    X(LOGLIN_OK, 0, "success")                                                                                         \
    X(LOGLIN_INVALID_ARGUMENT, 1, "an argument is invalid")                                                            \
    X(LOGLIN_UNSUPPORTED, 2, "the combination is not supported")                                                       \
    X(LOGLIN_NO_DEVICE, 3, "no OpenCL device was found")                                                               \
    X(LOGLIN_OUT_OF_MEMORY, 4, "out of host memory")                                                                   \
    X(LOGLIN_BUFFER_TOO_SMALL, 5, "a buffer is too small")                                                             \
    X(LOGLIN_BUILD_FAILED, 6, "an OpenCL program did not build")                                                       \
    X(LOGLIN_BLAS_FAILED, 7, "CLBlast reported an error")                                                              \
    X(LOGLIN_IO, 8, "a file could not be read or written")                                                             \
    X(LOGLIN_BAD_FILE, 9, "a file is malformed")                                                                       \
    X(LOGLIN_INTERNAL, 10, "internal error")

typedef enum loglin_status_code {
#define LOGLIN_STATUS_ENUM(name, value, text) name = (value),
    LOGLIN_STATUS_LIST(LOGLIN_STATUS_ENUM)
#undef LOGLIN_STATUS_ENUM
} loglin_status_code;

/* A loglin_status_code, or a negative OpenCL error code. */
typedef int loglin_status;

/* The text of a status, never NULL, a static string; OpenCL codes give their own name ("CL_INVALID_VALUE"). */
LOGLIN_API const char *loglin_strerror(loglin_status status);

/*
 * What the last failing call of this thread had to say; "" if none failed.  Valid until the thread's next call, which may
 * change it even if it succeeds.
 */
LOGLIN_API const char *loglin_last_error(void);

/* ---- Devices --------------------------------------------------------------------------------------------------- */

typedef struct loglin_device_info {
    cl_platform_id platform;
    cl_device_id id;
    cl_device_type type; /* CL_DEVICE_TYPE_GPU, _CPU or _ACCELERATOR */
    char name[128];
    char vendor[128];
    char platform_name[128];
    char version[128]; /* CL_DEVICE_VERSION */
    char driver[128];  /* CL_DRIVER_VERSION */
    uint32_t compute_units;
    uint64_t global_memory;     /* bytes */
    uint64_t max_allocation;    /* bytes, CL_DEVICE_MAX_MEM_ALLOC_SIZE */
    uint64_t local_memory;      /* bytes a work-group, as the driver reports it */
    size_t max_work_group_size; /* work-items */
} loglin_device_info;

/*
 * Lists the devices of all platforms: GPUs first, then accelerators, then CPUs, otherwise as the loader orders them.
 * Writes min(capacity, *count) entries to infos (may be NULL if capacity is 0); *count receives how many there are.
 * LOGLIN_NO_DEVICE if there is no platform or no device, and *count is 0.
 */
LOGLIN_API loglin_status loglin_list_devices(loglin_device_info *infos, size_t capacity, size_t *count);

/*
 * Chooses a device.  selector: a position in loglin_list_devices ("0"), or a part of a device's or platform's name in
 * any case ("nvidia"); NULL or "" takes LOGLIN_DEVICE, and the first device if that is not set.  LOGLIN_NO_DEVICE if there
 * are none, LOGLIN_INVALID_ARGUMENT if none is meant by the selector.
 */
LOGLIN_API loglin_status loglin_select_device(const char *selector, cl_device_id *id);

/* A device of a context: what was compiled for it, and what is known about it.  Shared by threads. */
typedef struct loglin_device loglin_device;

/* The context must hold the device; both are retained until loglin_device_destroy. */
LOGLIN_API loglin_status loglin_device_create(cl_context context, cl_device_id id, loglin_device **device);

/* Plans made on the device keep it alive.  NULL is allowed. */
LOGLIN_API void loglin_device_destroy(loglin_device *device);

/* ---- Problems --------------------------------------------------------------------------------------------------- */

typedef enum loglin_op {
    LOGLIN_MAMBA2 = 0,      /* scalar-gated: log-linear Mamba-2; g absent: log-linear linear attention */
    LOGLIN_GATED_DELTA = 1, /* log-linear Gated DeltaNet; g absent: log-linear DeltaNet */
} loglin_op;

/*
 * How the prefix of a query is split into levels.
 * LOGLIN_WEAK, the Fenwick partition: level(t, t) = 0 and level(t, s) = bit_length(t XOR s).
 * LOGLIN_STRONG, the finer partition: level(t, t) = 0, and for s < t with l = floor(log2 t), v = 2^max(l-1, 0),
 * r = t - 2^l:  l+1 if s < v;  l+1 if s < 2v and r >= v;  level(t-v, s-v) if s < 2v and r < v;  else level(t-2v, s-2v).
 */
typedef enum loglin_partition {
    LOGLIN_WEAK = 0,
    LOGLIN_STRONG = 1,
} loglin_partition;

typedef enum loglin_dtype {
    LOGLIN_F32 = 0,
    LOGLIN_F16 = 1,
    LOGLIN_BF16 = 2,
} loglin_dtype;

typedef enum loglin_engine {
    LOGLIN_ENGINE_AUTO = 0,
    LOGLIN_ENGINE_BLAS = 1,  /* dense chunk products by CLBlast, the rest by small kernels: runs everywhere */
    LOGLIN_ENGINE_FUSED = 2, /* few kernels that keep intermediate results on the chip; where there is one */
} loglin_engine;

/* What a plan is made for, a bit each. */
typedef enum loglin_phase {
    LOGLIN_FORWARD = 1,
    LOGLIN_BACKWARD = 2,
    LOGLIN_STEP = 4,
} loglin_phase;

/* A problem.  A field of 0 is its default; batch, length, heads, groups, dim_k, dim_v and levels must be set. */
typedef struct loglin_problem {
    loglin_op op;
    loglin_partition partition;
    loglin_dtype dtype;        /* of q, k, v, o and their gradients */
    loglin_dtype weight_dtype; /* of level_scales, beta and their gradients: LOGLIN_F32 or the same as dtype */
    size_t batch;              /* B; B T is below 2^31 */
    size_t length;             /* T, tokens of a sequence in this call; at least 1 */
    size_t heads;              /* H, 1 to 65535 */
    size_t groups;             /* G, a divisor of H; the heads of a group share q and k */
    size_t dim_k;              /* K, 1 to 512 */
    size_t dim_v;              /* V, 1 to 512 */
    size_t levels;             /* L, columns of level_scales, at most LOGLIN_MAX_LEVELS; at least loglin_num_levels of
                                  max_position plus the longest sequence (max_length, or length); columns beyond that
                                  are ignored and their gradient is 0 */
    float scale;               /* multiplies q; 0 means 1 */
    int normalize_qk;          /* not 0: q and k are first divided by sqrt(sum of squares + 1e-6), per head */
    size_t sequences;          /* N of packed sequences of any lengths, 0 included: batch must be 1, length is the
                                  total, inputs.cu_seqlens gives the bounds [0, ..., T]; 0: no packing */
    size_t max_length;         /* longest packed sequence; 0: length, as it must be without packing */
    size_t max_position;       /* largest position that an initial state may stand at; 0: no initial states; with the
                                  longest sequence below 2^31 */
    unsigned phases;           /* loglin_phase bits; 0: LOGLIN_FORWARD */
    loglin_engine engine;      /* 0: the plan chooses */
    size_t chunk;              /* tokens of a chunk, a power of two from 16 to 256; 0: the plan chooses */
} loglin_problem;

#define LOGLIN_MAX_LEVELS 32
#define LOGLIN_MAX_DIM 512

/* Levels that a sequence of `length` tokens (position included) needs: 1 + ceil(log2 length); 1 for 0 and 1. */
LOGLIN_API size_t loglin_num_levels(size_t length);

/*
 * The kernels rely on g <= 0 and finite and do not check it.  Looks through `count` gates in host memory: returns the
 * index of the first that is NaN, infinite or positive, or count if all are good; 0 if g is NULL.
 */
LOGLIN_API size_t loglin_check_gates(const float *g, size_t count);

/* ---- Plans ------------------------------------------------------------------------------------------------------ */

/* A problem on a device with everything decided and compiled.  One thread at a time. */
typedef struct loglin_plan loglin_plan;

/*
 * Validates, chooses engine and chunk size, compiles.  Slow the first time on a device: seconds.  Measures nothing: what
 * is not asked for comes from results of loglin_tune for the class of the problem, else for a neighbouring one, else
 * from built-in results of the same family of devices, else it is a default.  LOGLIN_UNSUPPORTED where no engine that is
 * asked for takes the problem, or each needs a workspace beyond the device's largest buffer; LOGLIN_BUILD_FAILED or
 * LOGLIN_BLAS_FAILED where the driver does not compile.
 */
LOGLIN_API loglin_status loglin_plan_create(loglin_device *device, const loglin_problem *problem, loglin_plan **plan);

/* The plan must not be in use by a call; work already enqueued is not disturbed.  NULL is allowed. */
LOGLIN_API void loglin_plan_destroy(loglin_plan *plan);

/*
 * Writes a line of text about the plan (engine, chunk size, where they come from, workspace) and its final NUL, cut to
 * capacity bytes; returns the length of the whole text without its NUL.  Writes nothing if text is NULL.
 *
 * This function and the two below only read the plan.  They return 0 if it is NULL, and loglin_last_error() says so.
 */
LOGLIN_API size_t loglin_plan_describe(const loglin_plan *plan, char *text, size_t capacity);

/*
 * Bytes of workspace that a call of one phase needs: never 0 for LOGLIN_FORWARD and LOGLIN_BACKWARD, 0 for LOGLIN_STEP.
 * It grows as O(T).  0 also, and loglin_last_error() says so, for what is not one phase, or one that was not planned.
 */
LOGLIN_API size_t loglin_workspace_size(const loglin_plan *plan, loglin_phase phase);

/* Bytes of a state's values: 4 N H L K V. */
LOGLIN_API size_t loglin_state_size(const loglin_plan *plan);

/* ---- Tuning ------------------------------------------------------------------------------------------------------ */

/* What loglin_tune tells while it works.  Texts are valid during the call. */
typedef struct loglin_tune_event {
    const char *subject;   /* the class that is being tuned, or "CLBlast", or "peak" */
    const char *candidate; /* what has just been measured; NULL: only time has passed */
    const char *outcome;   /* "ok", or why not: refused, wrong, hung, crashed; NULL without a candidate */
    const char *detail;    /* of the candidate, in words, may be empty; finished: why there is no choice; else NULL */
    double ms, spread;     /* of the candidate, or (finished) of the choice; "CLBlast": the geometric mean of some
                            * classes, in the first round of the first one alone */
    double default_ms; /* finished: of the engine's untuned default, measured alternately with the choice; 0: fails */
    const char *best;  /* the fastest of the round so far; the choice where finished; NULL: none yet */
    double best_ms;
    double gflops, gbytes;        /* "peak": the device's rates, 1e9 operations and bytes a second */
    loglin_problem problem;       /* what was measured, its engine and chunk those of the candidate */
    int finished;                 /* the subject is done; a class is one subject for each engine that takes it */
    int complete;                 /* the last event: nothing is left to do */
    uint64_t seed;                /* of the search */
    double share;                 /* of all work that is done, 0 to 1 */
    double seconds, seconds_left; /* since the start; until the end, by an estimate */
} loglin_tune_event;

/* Not 0: stop.  Results of finished classes are kept, and `resume` goes on from there. */
typedef int loglin_tune_progress(void *context, const loglin_tune_event *event);

typedef struct loglin_tune_options {
    /*
     * Each with one phase, forward or backward, and without scale, normalisation, packed sequences and initial states;
     * NULL, with problem_count 0: the standard classes.
     */
    const loglin_problem *problems;
    size_t problem_count;
    int quick;              /* not 0: few classes and candidates, for less than two minutes on two cores; CLBlast's
                             * parameters stay, and on a CPU blas is tuned only if `engine` or a problem names it */
    int resume;             /* not 0: measurements that an interrupted run of the same kind has made are not repeated */
    loglin_engine engine;   /* LOGLIN_ENGINE_AUTO: each that takes a problem */
    double time_limit;      /* seconds after which none begins; 0: none (quick: 105; 10 s later none goes on) */
    double candidate_limit; /* seconds that one measurement may take; a default's second trial twice that; 0: 180 */
    uint64_t seed;          /* of the search; 0: from the clock.  It is recorded with the results */
    const char *worker;     /* the program that measures; NULL: "loglin", looked for along PATH */
    loglin_tune_progress *progress; /* may be NULL */
    void *context;
} loglin_tune_options;

/*
 * Measures what is fastest on a device and writes it to the cache directory, where loglin_plan_create finds it.  Takes
 * minutes.  Every candidate runs in a child process with a time limit: options.worker with the arguments "tune-worker"
 * and a request, which the program hands to loglin_tune_worker.  The command "loglin" is such a program.  So a compiler
 * or a kernel that hangs or crashes costs one candidate and not this process.  Each result is compared with float64
 * before it is timed.  LOGLIN_IO if results cannot be kept.  options may be NULL.
 */
LOGLIN_API loglin_status loglin_tune(cl_device_id id, const loglin_tune_options *options);

/* For the main function of a worker: measures, prints the reply on standard output, returns the exit status. */
LOGLIN_API int loglin_tune_worker(const char *request);

/*
 * Adds the results of a file to those of the cache directory, all or (LOGLIN_BAD_FILE says why) none.  LOGLIN_IO if it
 * cannot be read, or the results cannot be kept.
 */
LOGLIN_API loglin_status loglin_tuning_import(const char *path);

/* Writes all results for a device to a file, which appears whole or not at all.  LOGLIN_IO also if there are none. */
LOGLIN_API loglin_status loglin_tuning_export(cl_device_id id, const char *path);

/* ---- Buffers ---------------------------------------------------------------------------------------------------- */

/* A place in a buffer of the caller's; mem NULL: absent.  The offset counts elements of the array's type. */
typedef struct loglin_buffer {
    cl_mem mem;
    size_t offset;
} loglin_buffer;

typedef struct loglin_inputs {
    loglin_buffer q, k, v;
    loglin_buffer g; /* optional: absent means 0 */
    loglin_buffer level_scales;
    loglin_buffer beta;       /* LOGLIN_GATED_DELTA only, where it is required */
    loglin_buffer cu_seqlens; /* problem.sequences only: ascending by at most max_length, from 0 to problem.length */
} loglin_inputs;

/*
 * The states of N sequences after `position` tokens each.  After token p-1, values[n][h][l] is the decayed sum of
 * k_s v_s^T (delta rule: of its transitions) over the keys s of level(p-1, s) = l.  A level with no such key does not
 * exist: loglin_forward writes zeros to it, loglin_step leaves in it what there was, and nothing ever reads it.
 * So a sequence is reset by setting its position to 0.
 */
typedef struct loglin_state {
    loglin_buffer values;
    /*
     * Optional, LOGLIN_MAMBA2 only: the true state is exp(log_decay) * values.  With it loglin_step writes two states
     * a token instead of every level; loglin_forward writes zeros.
     */
    loglin_buffer log_decay;
    loglin_buffer position; /* int32, at least 0; initial: at most problem.max_position; final: optional */
} loglin_state;

typedef struct loglin_gradients {
    loglin_buffer dq, dk, dv;
    loglin_buffer dg;              /* optional */
    loglin_buffer dlevel_scales;   /* optional */
    loglin_buffer dbeta;           /* optional; LOGLIN_GATED_DELTA only */
    loglin_buffer dinitial_states; /* optional, [N,H,L,K,V]: to exp(log_decay) * values; 0 where no level exists */
} loglin_gradients;

/* ---- Calls ------------------------------------------------------------------------------------------------------ */

/*
 * All calls only enqueue: they neither block nor compile nor allocate device memory.  `queue` belongs to the plan's
 * context and device and may be out of order; buffers and events are of that context.  The work starts after the
 * num_wait events of `wait` (NULL if there are none); *event (may be NULL) receives an event of its end, which the
 * caller releases.  Every buffer must stay alive until then (OpenCL sees to that for one that is released meanwhile), and
 * the workspace must not be shared by calls that may overlap.  Structures are read during the call only.
 * Arguments are checked before anything is enqueued: LOGLIN_INVALID_ARGUMENT for one that is missing or not allowed,
 * LOGLIN_BUFFER_TOO_SMALL where offset and shape reach beyond the end of a buffer, LOGLIN_UNSUPPORTED where the blas
 * engine's workspace lies so far behind its buffer's start that CLBlast, which counts elements in int, does not reach its
 * end.  Buffers' contents are not checked: positions, cu_seqlens and gates out of their ranges give undefined numbers, but
 * never an access outside the buffers.
 *
 * Outputs are overwritten, not added to.  Outputs and workspace may not overlap inputs nor each other, which is not
 * checked; but final may be initial of the same call.
 * All results are deterministic: the same call on the same device gives the same bits.
 */

/* o, and the states after the last token: final may be NULL, so may initial (every position is 0 then). */
LOGLIN_API loglin_status loglin_forward(loglin_plan *plan, const loglin_inputs *in, const loglin_state *initial,
                                        loglin_buffer o, const loglin_state *final, loglin_buffer workspace,
                                        cl_command_queue queue, cl_uint num_wait, const cl_event *wait,
                                        cl_event *event);

/*
 * Gradients of a loss with respect to all inputs, given d(loss)/d(o) and, optionally, d(loss)/d(final states): buffer
 * dfinal_states, [N,H,L,K,V] float, mem NULL if absent; levels that do not exist are not read.  Needs nothing of a
 * forward call.
 */
LOGLIN_API loglin_status loglin_backward(loglin_plan *plan, const loglin_inputs *in, const loglin_state *initial,
                                         loglin_buffer d_o, loglin_buffer dfinal_states, const loglin_gradients *out,
                                         loglin_buffer workspace, cl_command_queue queue, cl_uint num_wait,
                                         const cl_event *wait, cl_event *event);

/*
 * One token of every sequence: in holds q, k [N,G,K], v [N,H,V], g [N,H], ... of the next token (cu_seqlens absent),
 * o [N,H,V].  The state is updated in place, its position grows by one.  Sequences may stand at different positions.
 * Touches only the levels that exist.  Steps may be enqueued one behind the other without a look at the device.
 * A position of 2^(L-1) or more is beyond the levels: that sequence's o is NaN and its state stays as it is.
 */
LOGLIN_API loglin_status loglin_step(loglin_plan *plan, const loglin_inputs *in, const loglin_state *state,
                                     loglin_buffer o, cl_command_queue queue, cl_uint num_wait, const cl_event *wait,
                                     cl_event *event);

#ifdef __cplusplus
}
#endif

#endif
