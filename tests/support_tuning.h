/* SPDX-License-Identifier: Apache-2.0 */
/* For tests of the tuner: a folder of the test's own as the cache directory, and what the device says of itself. */
#ifndef LOGLIN_TESTS_SUPPORT_TUNING_H
#define LOGLIN_TESTS_SUPPORT_TUNING_H

#include "loglin.h"

/* A fresh folder that LOGLIN_CACHE_DIR names; only errors are logged. */
extern char support_cache[64];
void support_make_cache(void);
void support_remove_cache(void);

/* Writes a file whole. */
void support_write_file(const char *path, const char *text, size_t length);

/*
 * Runs `work` in a child whose LOGLIN_CACHE_DIR, support_disk, is a file system of 128 KiB; `work` returns NULL or what is
 * wrong.  Returns the child's exit status: 0, 1 (it has printed what is wrong), or SUPPORT_NO_DISK where nothing may be mounted.
 */
enum { SUPPORT_NO_DISK = 77 };
extern char support_disk[80];
int support_on_small_disk(const char *(*work)(void));

/* In `work`: leaves so many free pages, by a file of its own; all that can be. */
void support_fill_disk(size_t pages_left);
void support_empty_disk(void);

/* From now on nothing can be written there. */
void support_freeze_disk(void);

/* Of the device of support_open(). */
loglin_device_info support_device_info(void);

#endif
