/* SPDX-License-Identifier: Apache-2.0 */
/* The device of a benchmark, random numbers, and taking times. */
#include "cli/bench.h"

#include "cli/session.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

enum { MAX_WORKS = 4, FEW_RUNS = 3 };

static const double slow_ms = 1000.0;

loglin_cli_status loglin_cli_bench_machine_open(loglin_bench_machine *machine, const char *selector) {
    static const cl_queue_properties properties[] = {CL_QUEUE_PROPERTIES, CL_QUEUE_PROFILING_ENABLE, 0};
    cl_device_id id;
    cl_int code;
    loglin_status status = loglin_select_device(selector, &id);
    if (status != LOGLIN_OK) {
        return loglin_cli_fail_library(status);
    }
    RETURN_IF_FAILED(loglin_cli_find_info(id, &machine->info));
    machine->context = clCreateContext(NULL, 1, &id, NULL, NULL, &code);
    if (code != CL_SUCCESS) {
        return loglin_cli_fail_opencl(code, "clCreateContext");
    }
    machine->queue = clCreateCommandQueueWithProperties(machine->context, id, properties, &code);
    if (code != CL_SUCCESS) {
        return loglin_cli_fail_opencl(code, "clCreateCommandQueueWithProperties");
    }
    status = loglin_device_create(machine->context, id, &machine->device);
    return status == LOGLIN_OK ? LOGLIN_CLI_OK : loglin_cli_fail_library(status);
}

void loglin_cli_bench_machine_close(loglin_bench_machine *machine) {
    loglin_device_destroy(machine->device);
    if (machine->queue != NULL) {
        (void)clReleaseCommandQueue(machine->queue);
    }
    if (machine->context != NULL) {
        (void)clReleaseContext(machine->context);
    }
    *machine = (loglin_bench_machine){0};
}

loglin_status loglin_cli_bench_fail(loglin_bench_machine *machine, loglin_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(machine->failure, sizeof machine->failure, format, arguments);
    va_end(arguments);
    return status;
}

/* SplitMix64 */
float loglin_cli_bench_random(loglin_bench_machine *machine, float low, float high) {
    uint64_t x = machine->random += 0x9e3779b97f4a7c15U;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
    x ^= x >> 31;
    return low + (high - low) * (float)(x >> 40) * 0x1p-24F;
}

/* ---- Times ------------------------------------------------------------------------------------------------------- */

static loglin_status event_end(loglin_bench_machine *machine, cl_event event, cl_ulong *time) {
    const cl_int code = clGetEventProfilingInfo(event, CL_PROFILING_COMMAND_END, sizeof *time, time, NULL);
    return code == CL_SUCCESS ? LOGLIN_OK : loglin_cli_bench_fail(machine, code, "clGetEventProfilingInfo");
}

static loglin_status time_on_device(loglin_bench_machine *machine, loglin_bench_enqueue enqueue, void *data,
                                    double *ms) {
    cl_event ready = NULL;
    cl_event done = NULL;
    cl_ulong begin = 0;
    cl_ulong end = 0;
    loglin_status status = clEnqueueMarkerWithWaitList(machine->queue, 0, NULL, &ready);
    if (status != CL_SUCCESS) {
        return loglin_cli_bench_fail(machine, status, "clEnqueueMarkerWithWaitList");
    }
    status = enqueue(machine, data, &done);
    const cl_int code = clFinish(machine->queue);
    if (status == LOGLIN_OK && code != CL_SUCCESS) {
        status = loglin_cli_bench_fail(machine, code, "the run: %s", loglin_strerror(code));
    }
    if (status == LOGLIN_OK) {
        status = event_end(machine, ready, &begin);
    }
    if (status == LOGLIN_OK) {
        status = event_end(machine, done, &end);
    }
    *ms = (double)(end - begin) * 1e-6;
    (void)clReleaseEvent(ready);
    if (done != NULL) {
        (void)clReleaseEvent(done);
    }
    return status;
}

static loglin_status time_on_host(loglin_bench_machine *machine, loglin_bench_enqueue enqueue, void *data, double *ms) {
    cl_event done = NULL;
    const double begin = loglin_cli_now_ms();
    loglin_status status = enqueue(machine, data, &done);
    const cl_int code = clFinish(machine->queue);
    *ms = loglin_cli_now_ms() - begin;
    if (done != NULL) {
        (void)clReleaseEvent(done);
    }
    if (status == LOGLIN_OK && code != CL_SUCCESS) {
        status = loglin_cli_bench_fail(machine, code, "the run: %s", loglin_strerror(code));
    }
    return status;
}

loglin_status loglin_cli_bench_time(loglin_bench_machine *machine, loglin_bench_enqueue enqueue, void *data,
                                    double *ms) {
    const cl_int code = clFinish(machine->queue);
    if (code != CL_SUCCESS) {
        return loglin_cli_bench_fail(machine, code, "the run: %s", loglin_strerror(code));
    }
    return machine->events ? time_on_device(machine, enqueue, data, ms) : time_on_host(machine, enqueue, data, ms);
}

static int compare_doubles(const void *a, const void *b) {
    const double x = *(const double *)a;
    const double y = *(const double *)b;
    return (x > y) - (x < y);
}

loglin_status loglin_cli_bench_measure(loglin_bench_machine *machine, loglin_bench_work *works, size_t count,
                                       size_t repetitions, size_t warm_up, bool patient) {
    double times[MAX_WORKS][LOGLIN_BENCH_MAX_REPETITIONS];
    for (size_t i = 0; i < count; ++i) {
        double ms = 0.0;
        for (size_t run = 0; run < warm_up && ms <= slow_ms; ++run) {
            const loglin_status status = works[i].run(machine, works[i].data, &ms);
            if (status != LOGLIN_OK) {
                return status;
            }
        }
        works[i].runs = !patient && ms > slow_ms && repetitions > FEW_RUNS ? FEW_RUNS : repetitions;
    }
    for (size_t run = 0; run < repetitions; ++run) {
        for (size_t i = 0; i < count; ++i) {
            const loglin_status status =
                run < works[i].runs ? works[i].run(machine, works[i].data, &times[i][run]) : LOGLIN_OK;
            if (status != LOGLIN_OK) {
                return status;
            }
        }
    }
    for (size_t i = 0; i < count; ++i) {
        qsort(times[i], works[i].runs, sizeof times[i][0], compare_doubles);
        works[i].median_ms = times[i][works[i].runs / 2];
        works[i].least_ms = times[i][0];
    }
    return LOGLIN_OK;
}
