/* SPDX-License-Identifier: Apache-2.0 */
/* Lines of JSON; one that is torn or strange is as good as absent. */
#include "plan/journal.h"

#include "runtime/log.h"
#include "runtime/status.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

static const int most_begins = 2;

struct loglin_journal {
    int file;
    char *path;
    json_t *replies; /* key: the reply's text */
    json_t *begins;  /* key: how often it was begun */
};

static loglin_status fail_io(const char *path) {
    char reason[128];
    const int code = errno;
    if (strerror_r(code, reason, sizeof reason) != 0) {
        (void)snprintf(reason, sizeof reason, "error %d", code);
    }
    return loglin_fail(LOGLIN_IO, "cannot write %s: %s", path, reason);
}

static void count_begin(loglin_journal *journal, const char *key, json_int_t more) {
    if (key != NULL) {
        const json_int_t count = json_integer_value(json_object_get(journal->begins, key));
        (void)json_object_set_new(journal->begins, key, json_integer(count + more));
    }
}

static void take_line(loglin_journal *journal, const json_t *line) {
    const char *begin = json_string_value(json_object_get(line, "begin"));
    const char *end = json_string_value(json_object_get(line, "end"));
    const char *reply = json_string_value(json_object_get(line, "reply"));
    const char *withdrawn = json_string_value(json_object_get(line, "withdrawn"));
    count_begin(journal, begin, 1);
    count_begin(journal, withdrawn, -1);
    if (end != NULL && reply != NULL) {
        (void)json_object_set_new(journal->replies, end, json_string(reply));
    }
}

/* Reads the lines; false if the first one does not have the settings and a good seed. */
static bool read_lines(loglin_journal *journal, FILE *stream, const char *settings, uint64_t *seed) {
    char *text = NULL;
    size_t capacity = 0;
    bool same = false;
    for (size_t number = 0; getline(&text, &capacity, stream) >= 0 && (number == 0 || same); number++) {
        json_t *line = json_loads(text, 0, NULL);
        const char *found = json_string_value(json_object_get(line, "settings"));
        const json_int_t found_seed = json_integer_value(json_object_get(line, "seed"));
        if (number == 0 && found != NULL && strcmp(found, settings) == 0 && found_seed >= 0) {
            same = true;
            *seed = (uint64_t)found_seed;
        } else if (same) {
            take_line(journal, line);
        }
        json_decref(line);
    }
    free(text);
    return same;
}

static bool read_journal(loglin_journal *journal, const char *path, const char *settings, uint64_t *seed) {
    FILE *stream = fopen(path, "re");
    const bool same = stream != NULL && read_lines(journal, stream, settings, seed);
    if (stream != NULL) {
        (void)fclose(stream);
    }
    return same;
}

/* One write, so that lines of a killed process are torn at most at their end; the next line then starts afresh. */
static loglin_status write_line(const loglin_journal *journal, json_t *line) {
    char *compact = line != NULL ? json_dumps(line, JSON_COMPACT) : NULL;
    json_decref(line);
    const size_t size = compact != NULL ? strlen(compact) + 3 : 0;
    char *text = compact != NULL ? malloc(size) : NULL;
    loglin_status status = LOGLIN_OK;
    if (text == NULL) {
        status = loglin_fail(LOGLIN_OUT_OF_MEMORY, "journal: out of host memory");
    } else {
        const int length = snprintf(text, size, "%s\n", compact);
        const ssize_t put = write(journal->file, text, (size_t)length);
        if (put >= 0 && put < length) {
            (void)!write(journal->file, "\n", 1);
            errno = ENOSPC;
        }
        status = put == length ? LOGLIN_OK : fail_io(journal->path);
    }
    free(compact);
    free(text);
    return status;
}

static loglin_status start(loglin_journal *journal, const char *path, bool resume, const char *settings,
                           uint64_t *seed) {
    journal->replies = json_object();
    journal->begins = json_object();
    journal->file = -1;
    journal->path = strdup(path);
    if (journal->path == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "journal: out of host memory");
    }
    journal->file = open(path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC | O_NONBLOCK, 0600);
    if (journal->file < 0) {
        return fail_io(path);
    }
    if (flock(journal->file, LOCK_EX | LOCK_NB) != 0) {
        return loglin_fail(LOGLIN_IO, "%s: another tuner is at work on this device", path);
    }
    if (resume && read_journal(journal, path, settings, seed)) {
        return write(journal->file, "\n", 1) == 1 ? LOGLIN_OK : fail_io(path); /* the last line may be torn */
    }
    if (resume) {
        loglin_log(LOGLIN_LOG_WARN, "there is no run of this device, version and kind to resume: it starts anew");
    }
    if (ftruncate(journal->file, 0) != 0) {
        return fail_io(path);
    }
    return write_line(journal, json_pack("{s:s, s:I}", "settings", settings, "seed", (json_int_t)*seed));
}

loglin_status loglin_journal_open(const char *path, bool resume, const char *settings, uint64_t *seed,
                                  loglin_journal **journal) {
    loglin_journal *made = calloc(1, sizeof *made);
    if (made == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "journal: out of host memory");
    }
    const loglin_status status = start(made, path, resume, settings, seed);
    if (status != LOGLIN_OK) {
        loglin_journal_close(made);
        return status;
    }
    *journal = made;
    return LOGLIN_OK;
}

void loglin_journal_close(loglin_journal *journal) {
    if (journal != NULL) {
        json_decref(journal->replies);
        json_decref(journal->begins);
        if (journal->file >= 0) {
            close(journal->file);
        }
        free(journal->path);
        free(journal);
    }
}

bool loglin_journal_find(const loglin_journal *journal, const char *key, loglin_reply *reply) {
    const char *text = json_string_value(json_object_get(journal->replies, key));
    if (text != NULL) {
        *reply = loglin_reply_parse(text);
        return true;
    }
    if (json_integer_value(json_object_get(journal->begins, key)) >= most_begins) {
        *reply = (loglin_reply){.outcome = LOGLIN_OUTCOME_FAILED, .reason = "crashed", .detail = "it ended the tuner"};
        return true;
    }
    return false;
}

loglin_status loglin_journal_begin(loglin_journal *journal, const char *key) {
    return write_line(journal, json_pack("{s:s}", "begin", key));
}

loglin_status loglin_journal_end(loglin_journal *journal, const char *key, const loglin_reply *reply) {
    char *text = loglin_reply_print(reply);
    const loglin_status status = write_line(journal, json_pack("{s:s, s:s}", "end", key, "reply", text));
    free(text);
    return status;
}

loglin_status loglin_journal_withdraw(loglin_journal *journal, const char *key) {
    return write_line(journal, json_pack("{s:s}", "withdrawn", key));
}
