/* SPDX-License-Identifier: Apache-2.0 */
/* One measurement in a process of its own: what it is asked, what it answers, and how it is started. */
#ifndef LOGLIN_PLAN_WORKER_H
#define LOGLIN_PLAN_WORKER_H

#include "engine/tunables.h"
#include "plan/search.h"

typedef enum loglin_request_kind {
    LOGLIN_REQUEST_TIME, /* a configuration on a problem */
    LOGLIN_REQUEST_PEAK, /* the device's rates */
} loglin_request_kind;

typedef struct loglin_request {
    loglin_request_kind kind;
    char name[128];         /* of the device */
    size_t device;          /* its place among the devices of that name */
    loglin_problem problem; /* with one phase */
    loglin_configuration configuration;
    unsigned runs;
} loglin_request;

typedef struct loglin_reply {
    loglin_outcome outcome;
    char reason[16];  /* of LOGLIN_OUTCOME_FAILED: refused, wrong, hung, crashed */
    char detail[240]; /* in words */
    loglin_sample sample;
    double gflops, gbytes; /* LOGLIN_REQUEST_PEAK: operations and bytes a nanosecond */
} loglin_reply;

/* Texts are for the caller to free; NULL without memory.  A reply that is none is a crash. */
char *loglin_request_print(const loglin_request *request);
loglin_status loglin_request_parse(const char *text, loglin_request *request);
char *loglin_reply_print(const loglin_reply *reply);
loglin_reply loglin_reply_parse(const char *text);

/* Is asked now and then while a child works; not 0: stop. */
typedef int loglin_patience(void *context);

/*
 * Runs a program with the arguments "tune-worker" and `request`, for `limit` seconds at most, and returns what it
 * printed.  The child and its own children are killed when the time is up or patience ends.
 */
loglin_reply loglin_worker_ask(const char *program, const char *request, double limit, loglin_patience *patience,
                               void *context);

#endif
