/* SPDX-License-Identifier: Apache-2.0 */
/* A child process with a time limit. */
#define _GNU_SOURCE /* environ, pipe2; NOLINT(bugprone-reserved-identifier,cert-dcl37-c,cert-dcl51-cpp) */
#include "plan/worker.h"

#include "runtime/status.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { REPLY_SIZE = 8192 };

/* ---- The child's environment ------------------------------------------------------------------------------------- */

/*
 * The Khronos loader takes the list in this variable apart where it stands, so that a child would see its first driver
 * only.  It is kept as it was when the library was loaded.
 */
static const char drivers_variable[] = "OCL_ICD_FILENAMES=";
static char *drivers;

static bool names_drivers(const char *entry) {
    return strncmp(entry, drivers_variable, sizeof drivers_variable - 1) == 0;
}

__attribute__((constructor)) static void keep_drivers(void) {
    for (char **entry = environ; entry != NULL && *entry != NULL && drivers == NULL; entry++) {
        drivers = names_drivers(*entry) ? strdup(*entry) : NULL;
    }
}

__attribute__((destructor)) static void forget_drivers(void) {
    free(drivers);
}

/* An array for the caller to free, of strings that are not; NULL without memory. */
static char **child_environment(void) {
    size_t count = 0;
    while (environ[count] != NULL) {
        count++;
    }
    char **entries = calloc(count + 1, sizeof *entries);
    for (size_t i = 0; i < count && entries != NULL; i++) {
        entries[i] = drivers != NULL && names_drivers(environ[i]) ? drivers : environ[i];
    }
    return entries;
}

/* ---- The child --------------------------------------------------------------------------------------------------- */

static double now(void) {
    struct timespec time;
    (void)clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* The child leads a process group of its own, so that what it starts can be ended with it. */
static int start(const char *program, const char *request, int output, pid_t *child) {
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    char **environment = child_environment();
    int code = environment != NULL ? posix_spawn_file_actions_init(&actions) : ENOMEM;
    if (code != 0) {
        free(environment);
        return code;
    }
    code = posix_spawnattr_init(&attributes);
    if (code == 0) {
        char *arguments[] = {(char *)program, (char *)"tune-worker", (char *)request, NULL};
        code = posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
        code = code != 0 ? code : posix_spawn_file_actions_adddup2(&actions, output, STDOUT_FILENO);
        code = code != 0 ? code : posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
        code = code != 0 ? code : posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP);
        code = code != 0 ? code : posix_spawnp(child, program, &actions, &attributes, arguments, environment);
        (void)posix_spawnattr_destroy(&attributes);
    }
    (void)posix_spawn_file_actions_destroy(&actions);
    free(environment);
    return code;
}

static loglin_reply failed(const char *reason, const char *detail) {
    loglin_reply reply = {.outcome = LOGLIN_OUTCOME_FAILED};
    (void)snprintf(reply.reason, sizeof reply.reason, "%s", reason);
    (void)snprintf(reply.detail, sizeof reply.detail, "%s", detail);
    return reply;
}

typedef enum listen_end { LISTEN_CLOSED, LISTEN_LATE, LISTEN_STOPPED } listen_end;

/*
 * Reads what the child prints until it closes its output; what does not fit is dropped.  The time is looked at where there
 * is nothing to read, for this process may have been suspended while the child has answered; a child that goes on and on
 * has no such excuse.
 */
static listen_end listen_to(int input, double limit, loglin_patience *patience, void *context, char *text) {
    const double end = now() + limit;
    size_t length = 0;
    bool dropped = false;
    text[0] = '\0';
    for (;;) {
        struct pollfd ready = {.fd = input, .events = POLLIN};
        if (patience != NULL && patience(context) != 0) {
            return LISTEN_STOPPED;
        }
        const bool idle = poll(&ready, 1, 100) <= 0;
        if ((idle || dropped) && now() >= end) {
            return LISTEN_LATE;
        }
        if (idle) {
            continue;
        }
        char piece[512];
        const ssize_t got = read(input, piece, sizeof piece);
        if (got == 0 || (got < 0 && errno != EINTR)) {
            return LISTEN_CLOSED;
        }
        dropped = dropped || (got > 0 && length + (size_t)got >= REPLY_SIZE);
        const size_t taken = got > 0 && !dropped ? (size_t)got : 0;
        memcpy(text + length, piece, taken);
        length += taken;
        text[length] = '\0';
    }
}

/* Has the child ended?  It stays a zombie, so that its number, which is its group's too, is nobody else's yet. */
static bool has_ended(pid_t child) {
    siginfo_t info = {.si_pid = 0};
    return waitid(P_PID, (id_t)child, &info, WEXITED | WNOHANG | WNOWAIT) != 0 || info.si_pid == child;
}

/* The child's exit; a moment is left to it if it has closed its output by itself. */
static int reap(pid_t child, bool kill_it) {
    int status = 0;
    for (int i = 0; i < 200 && !kill_it && !has_ended(child); i++) {
        (void)nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
    }
    (void)kill(-child, SIGKILL);
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    return status;
}

/* No child, for a reason that is no candidate's fault. */
static loglin_reply not_started(const char *program, int code) {
    loglin_reply reply = {.outcome = LOGLIN_OUTCOME_STOPPED};
    (void)snprintf(reply.detail, sizeof reply.detail, "cannot start \"%.128s\": %s", program, strerror(code));
    return reply;
}

loglin_reply loglin_worker_ask(const char *program, const char *request, double limit, loglin_patience *patience,
                               void *context) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) {
        return not_started(program, errno);
    }
    pid_t child = 0;
    const int code = start(program, request, ends[1], &child);
    close(ends[1]);
    if (code != 0) {
        close(ends[0]);
        return not_started(program, code);
    }
    char text[REPLY_SIZE];
    const listen_end end = listen_to(ends[0], limit, patience, context, text);
    close(ends[0]);
    const int status = reap(child, end != LISTEN_CLOSED);
    if (end == LISTEN_STOPPED) {
        return (loglin_reply){.outcome = LOGLIN_OUTCOME_STOPPED};
    }
    if (end == LISTEN_LATE) {
        return failed("hung", "no answer in time");
    }
    if (WIFSIGNALED(status)) {
        loglin_reply reply = failed("crashed", "");
        (void)snprintf(reply.detail, sizeof reply.detail, "ended by signal %d", WTERMSIG(status));
        return reply;
    }
    return loglin_reply_parse(text);
}
