/* SPDX-License-Identifier: Apache-2.0 */
/* Files of compiled programs, one an entry; whatever is wrong with one makes it a miss. */
#ifndef LOGLIN_RUNTIME_CACHE_H
#define LOGLIN_RUNTIME_CACHE_H

#include <stdbool.h>
#include <stddef.h>

/*
 * LOGLIN_CACHE_DIR, or $XDG_CACHE_HOME/loglin, or $HOME/.cache/loglin; NULL if LOGLIN_CACHE_DIR is empty, or there is
 * none of them.  The caller frees it.
 */
char *loglin_cache_directory(void);

/* Makes the directory if need be, for this user alone.  false, with errno, if files cannot be written to it. */
bool loglin_cache_make(const char *directory);

/* The same for compiled programs; that they cannot be kept is said once, as a warning where LOGLIN_CACHE_DIR is set. */
bool loglin_cache_is_writable(const char *directory);

/* What was stored under the key, for the caller to free; NULL if there is no such entry or a doubtful one. */
unsigned char *loglin_cache_load(const char *directory, const char *key, size_t *size);

/* Stores data under the key, in place of what was there.  Readers and writers of other processes see a whole entry. */
void loglin_cache_store(const char *directory, const char *key, const void *data, size_t size);

/* Writes all bytes to an open file; false if that fails. */
bool loglin_write_all(int file, const void *data, size_t size);

#endif
