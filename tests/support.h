/* SPDX-License-Identifier: Apache-2.0 */
/* What every test of the operator needs: a device, random numbers, 16-bit floats, guarded buffers, the metric. */
#ifndef LOGLIN_TESTS_SUPPORT_H
#define LOGLIN_TESTS_SUPPORT_H

#include "loglin.h"

#include <stdbool.h>

/* Prints and aborts: for what makes a test meaningless, not for what it tests. */
void support_die(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

/* Zeroed memory, never NULL. */
void *support_alloc(size_t count, size_t size);

/* ---- Device ----------------------------------------------------------------------------------------------------- */

typedef struct support_device {
    cl_device_id id;
    cl_context context;
    cl_command_queue queue;        /* in order */
    cl_command_queue out_of_order; /* NULL where the device has none */
    loglin_device *device;
} support_device;

/* The device that LOGLIN_DEVICE chooses, opened once in a process. */
const support_device *support_open(void);

/* Dies if an OpenCL or loglin call failed. */
void support_require(loglin_status status, const char *what);

/* ---- Random numbers --------------------------------------------------------------------------------------------- */

typedef struct support_random {
    uint64_t state;
} support_random;

double support_uniform(support_random *random); /* [0, 1) */
double support_normal(support_random *random);

/* ---- Storage types ---------------------------------------------------------------------------------------------- */

size_t support_dtype_size(loglin_dtype dtype);
const char *support_dtype_name(loglin_dtype dtype);

/* Rounded to nearest even. */
uint16_t support_to_f16(float x);
uint16_t support_to_bf16(float x);
float support_from_f16(uint16_t bits);
float support_from_bf16(uint16_t bits);

/* The value that storage in a dtype leaves of x. */
double support_round(loglin_dtype dtype, double x);

/* ---- Buffers ---------------------------------------------------------------------------------------------------- */

/*
 * An array in a buffer of its own: `offset` guard elements, the array, and where the library writes guard elements
 * again (an input ends where its buffer ends).  Guards and outputs are filled with bytes 0xFF, which is NaN in every float type.
 */
typedef struct support_array {
    cl_mem mem;
    size_t offset, count, element; /* element: bytes */
    loglin_dtype dtype;
    bool guarded;
} support_array;

support_array support_input(loglin_dtype dtype, const double *values, size_t count, size_t offset);
support_array support_input_ints(const int32_t *values, size_t count, size_t offset);
support_array support_inout(loglin_dtype dtype, const double *values, size_t count, size_t offset);
support_array support_inout_ints(const int32_t *values, size_t count, size_t offset);
support_array support_output(loglin_dtype dtype, size_t count, size_t offset);
support_array support_output_ints(size_t count, size_t offset);

/* As an argument of the library; absent for an array that was never made. */
loglin_buffer support_buffer(const support_array *array);

/* Reads an array back; false if a guard was overwritten. */
bool support_read(const support_array *array, double *values);
bool support_read_ints(const support_array *array, int32_t *values);

/* Exactly `bytes` bytes of NaN, inside guards.  Nothing at all for 0 bytes. */
typedef struct support_workspace {
    cl_mem whole, mem;
    size_t bytes;
} support_workspace;

support_workspace support_workspace_make(size_t bytes);
bool support_workspace_intact(const support_workspace *workspace);
void support_workspace_free(support_workspace *workspace);

/* NULL members are skipped. */
void support_array_free(support_array *array);

/* ---- The metric ------------------------------------------------------------------------------------------------- */

/* ||got - expected|| / ||expected||; infinite where got has a NaN, or is not 0 though expected is. */
double support_error(const double *got, const double *expected, size_t count);

/* What a storage type may cost in that metric. */
typedef enum support_kind {
    SUPPORT_OUTPUT,   /* o and states */
    SUPPORT_GRADIENT, /* everything that backward writes */
} support_kind;

double support_threshold(loglin_dtype dtype, support_kind kind);

#endif
