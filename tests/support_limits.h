/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A smaller device than the one that is there: what it says of itself is limited, and calls that go beyond are refused
 * as its driver would.  For this the test programs define some of OpenCL's functions, in front of the loader's; the
 * library and CLBlast call these.  So they also see what is built and launched.
 */
#ifndef LOGLIN_TESTS_SUPPORT_LIMITS_H
#define LOGLIN_TESTS_SUPPORT_LIMITS_H

#include <stdbool.h>
#include <stddef.h>

/*
 * The limits of this process, before its first OpenCL call: words apart by commas, "" or NULL for none.
 *     cpu              says that it is a CPU and nothing else
 *     gpu              says that it is a GPU, with vectors of one float; of no vendor in particular if it is none
 *     vendor=NAME      says that it is this vendor's
 *     local=BYTES      of local memory
 *     group=ITEMS      of a work-group
 *     allocation=BYTES of a buffer
 *     memory=BYTES     in all
 *     no-double        and source text that uses it does not compile
 *     no-half          cl_khr_fp16 is not offered
 *     no-subgroups     nor are sub-groups
 * A program without a call of this takes them from the environment variable LOGLIN_TEST_LIMITS.
 */
void support_limit_device(const char *limits);

/* Is one of them set? */
bool support_is_limited(void);

/* Is the device that is there, behind all limits, a GPU? */
bool support_is_gpu(void);

/*
 * On a CPU, programs are built without optimisation, which takes PoCL a third of the time: for a test that needs many of them,
 * all of code that other tests run optimised, with other constants.  Before the first OpenCL call.
 */
void support_build_fast(void);

/*
 * A GPU of the vendor of that instruction (a name of cl/mma_layouts.cl), which emulates it and has no other; options:
 * what else programs are built with.  Before the first OpenCL call.
 */
void support_emulate(const char *instruction, const char *options);

/* Programs are built of edit(source) from now on, a text for free(), or NULL: as it is.  edit NULL: all as they are. */
void support_edit_sources(char *(*edit)(const char *source));

/* How often this process has launched the kernel with work-groups of that many items (0: of any size). */
size_t support_launches(const char *kernel, size_t items);

/* How many calls of this process went beyond the limits. */
size_t support_refusals(void);

#endif
