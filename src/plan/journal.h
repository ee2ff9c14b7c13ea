/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A tuner's diary: a line before and a line behind every measurement, so that an interrupted run loses only the one that
 * it was at.  A measurement that was begun twice and never ended has taken its process down, and counts as hung.
 */
#ifndef LOGLIN_PLAN_JOURNAL_H
#define LOGLIN_PLAN_JOURNAL_H

#include "plan/worker.h"

typedef struct loglin_journal loglin_journal;

/*
 * Opens a journal for writing.  With `resume`, what an earlier run with the same settings wrote is kept, and *seed
 * becomes that run's; without such a run it is said that the tuner starts anew.  LOGLIN_IO: it cannot be written, or
 * another tuner has it open.
 */
loglin_status loglin_journal_open(const char *path, bool resume, const char *settings, uint64_t *seed,
                                  loglin_journal **journal);
void loglin_journal_close(loglin_journal *journal);

/* Is the measurement's result known? */
bool loglin_journal_find(const loglin_journal *journal, const char *key, loglin_reply *reply);

loglin_status loglin_journal_begin(loglin_journal *journal, const char *key);
loglin_status loglin_journal_end(loglin_journal *journal, const char *key, const loglin_reply *reply);

/* The measurement was stopped for a reason that lies outside it, and counts as never begun. */
loglin_status loglin_journal_withdraw(loglin_journal *journal, const char *key);

#endif
