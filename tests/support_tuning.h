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

/* Of the device of support_open(). */
loglin_device_info support_device_info(void);

#endif
