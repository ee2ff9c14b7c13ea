/* SPDX-License-Identifier: Apache-2.0 */
/* Compiled programs: looked up in the device's memory, then in the cache directory, then built from source. */
#ifndef LOGLIN_RUNTIME_PROGRAM_H
#define LOGLIN_RUNTIME_PROGRAM_H

#include "loglin.h"

struct loglin_program;

/*
 * An option of programs that hide instructions from the driver's compiler, which would not take them, in comments
 * `//WG instruction` of their PTX.  They are uncovered in the program's binary, whose target becomes sm_90a.
 */
#define LOGLIN_HIDDEN_INSTRUCTIONS "-DWGMMA=1"

/*
 * The program of the embedded files `names` (file names in cl/, without folder, the list ended by NULL, concatenated in
 * this order) with these build options ("" for none; LOGLIN_BUILD_OPTIONS and what the device needs are added).  It
 * belongs to the device: do not release it.  Safe to call from several threads.
 * LOGLIN_BUILD_FAILED: loglin_last_error() holds the first error of the build log.
 */
loglin_status loglin_program_get(loglin_device *device, const char *const *names, const char *options,
                                 cl_program *program);

/* The kernels `kernels` (a list of `count` names) of such a program; on failure those already made are the caller's too. */
loglin_status loglin_kernels_get(loglin_device *device, const char *const *names, const char *options,
                                 const char *const *kernels, size_t count, cl_kernel *made);

/* For the end of a device: releases its programs. */
void loglin_programs_release(struct loglin_program *programs);

#endif
