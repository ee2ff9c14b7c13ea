/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What is known about devices' best configurations: entries in memory, in files of the cache directory, and built in.
 *
 * A file is JSON, one a device, in the folder "tuning-1" of the cache directory (1 is the format's version).  Its name
 * comes from the device, its vendor and its platform; each entry tells by what driver and library it was measured, so
 * results of an old driver stay and are known to be stale.  A file is replaced as a whole by a rename, and only with
 * the lock of "<file>.lock" held; readers need no lock.
 */
#ifndef LOGLIN_PLAN_TUNING_H
#define LOGLIN_PLAN_TUNING_H

#include "engine/tunables.h"

#include <stddef.h>

/* ---- Entries ----------------------------------------------------------------------------------------------------- */

/* Problems that share a configuration. */
typedef struct loglin_class {
    loglin_op op;
    loglin_dtype dtype;
    unsigned dim_k, dim_v;
    unsigned length;    /* a power of two: the largest that is not above a sequence's tokens */
    bool shared;        /* one group: all heads share q and k */
    loglin_phase phase; /* LOGLIN_FORWARD or LOGLIN_BACKWARD */
} loglin_class;

/* The class of a filled-in problem; a plan for both phases is one for backward, which takes most of the time. */
loglin_class loglin_class_of(const loglin_problem *problem);

/* Are they the same? */
bool loglin_class_is(const loglin_class *a, const loglin_class *b);

/* Its name, as in "mamba2 f32 K128 V64 shared T4096 forward". */
enum { LOGLIN_CLASS_NAME_SIZE = 96 };
void loglin_class_name(const loglin_class *class, char *text, size_t capacity);

/* What a result depends on beside the device. */
typedef struct loglin_stamp {
    char driver[128], version[128], library[32], source[72];
} loglin_stamp;

typedef enum loglin_entry_kind {
    LOGLIN_ENTRY_CLASS,  /* the best values of one engine for a class */
    LOGLIN_ENTRY_GEMM,   /* the best parameters of CLBlast */
    LOGLIN_ENTRY_FAILED, /* a candidate not to try again */
} loglin_entry_kind;

typedef struct loglin_entry {
    loglin_entry_kind kind;
    loglin_stamp stamp;
    loglin_class class;                 /* LOGLIN_ENTRY_CLASS */
    loglin_configuration configuration; /* LOGLIN_ENTRY_CLASS: engine and values; LOGLIN_ENTRY_GEMM: gemm */
    char candidate[264], reason[32];    /* LOGLIN_ENTRY_FAILED */
    double ms, spread, default_ms;      /* of the choice, and of what is used without one; failed, ms: its time limit */
    int64_t seed, tuned_at;             /* of the search; seconds since 1970 */
} loglin_entry;

typedef struct loglin_identity {
    char device[128], vendor[128], platform[128], type[16];
} loglin_identity;

/* All that is known about one device. */
typedef struct loglin_tuning {
    loglin_identity identity;
    loglin_entry *entries;
    size_t count;
} loglin_tuning;

loglin_identity loglin_identity_of(const loglin_device_info *info);
loglin_stamp loglin_stamp_of(const loglin_device_info *info);

/*
 * Adds an entry.  Of two entries for the same with the same stamp the newer one stays, of entries with different stamps
 * the newest four.
 */
loglin_status loglin_tuning_add(loglin_tuning *tuning, const loglin_entry *entry);
void loglin_tuning_free(loglin_tuning *tuning);

/* ---- Files ------------------------------------------------------------------------------------------------------- */

/* The whole text or nothing: LOGLIN_BAD_FILE says what is wrong; `name` is what the text is called then. */
loglin_status loglin_tuning_parse(const char *name, const char *text, size_t length, loglin_tuning *tuning);

/* For the caller to free; NULL without memory. */
char *loglin_tuning_print(const loglin_tuning *tuning);

/* LOGLIN_IO if the file cannot be read. */
loglin_status loglin_tuning_read(const char *path, loglin_tuning *tuning);

/* Writes a file that appears whole or not at all. */
loglin_status loglin_tuning_write(const char *path, const loglin_tuning *tuning);

/* <cache>/tuning-1/<device><suffix>, for the caller to free; NULL without memory. */
char *loglin_tuning_path(const char *cache, const loglin_identity *identity, const char *suffix);

/*
 * What the cache directory holds about a device; nothing if there is no file.  A damaged file is reported, kept under
 * another name, and as good as none.
 */
loglin_status loglin_tuning_load(const char *cache, const loglin_identity *identity, loglin_tuning *tuning);

/* Adds entries to a device's file.  Processes that do so at once lose nothing of each other's. */
loglin_status loglin_tuning_merge(const char *cache, const loglin_tuning *more);

/* ---- Looking up -------------------------------------------------------------------------------------------------- */

typedef enum loglin_source_kind {
    LOGLIN_SOURCE_OWN,      /* of the device, measured here or imported */
    LOGLIN_SOURCE_BUILT_IN, /* of the device, built in */
    LOGLIN_SOURCE_FAMILY,   /* built in, of another device of the same type, platform and vendor */
    LOGLIN_SOURCE_FOREIGN,  /* likewise, but of another vendor: a CPU's, under one platform */
} loglin_source_kind;

typedef struct loglin_source {
    loglin_source_kind kind;
    const loglin_tuning *tuning;
} loglin_source;

/* A configuration and where it comes from. */
typedef struct loglin_choice {
    loglin_configuration configuration;
    bool found;      /* false: the default */
    char where[256]; /* as in "tuned", "built-in table of X for CLASS", "default" */
} loglin_choice;

/*
 * The best that the sources know for a class and an engine: the exact class before its neighbours, the device before
 * its family, its vendor before others, results of this stamp before stale ones.  LOGLIN_ENGINE_AUTO: that of the faster engine, if both were
 * measured for the same class by the same tuner.  gemm is chosen for itself.
 */
loglin_choice loglin_tuning_find(const loglin_source *sources, size_t count, const loglin_stamp *stamp,
                                 const loglin_class *class, loglin_engine engine);

/* A built-in table's place among the sources of a device; false if it has nothing to do with it. */
bool loglin_tuning_relate(const loglin_identity *table, const loglin_identity *device, loglin_source_kind *kind);

/* All that is known about a device, read once for one plan. */
typedef struct loglin_knowledge {
    loglin_stamp stamp;
    loglin_tuning own, *tables; /* tables: the built-in ones */
    loglin_source *sources;
    size_t count, table_count;
} loglin_knowledge;

/* What cannot be read is left out; loglin_knowledge_free is due in any case. */
void loglin_knowledge_gather(const char *cache, const loglin_device_info *info, loglin_knowledge *knowledge);
void loglin_knowledge_free(loglin_knowledge *knowledge);
loglin_choice loglin_knowledge_choose(const loglin_knowledge *knowledge, const loglin_problem *problem,
                                      loglin_engine engine);

/* CLBlast's parameters for a device; cache may be NULL. */
loglin_gemm_parameters loglin_tuning_gemm(const char *cache, const loglin_device_info *info);

/* The n-th file of src/plan/tuned, with a final NUL that *length does not count; NULL beyond the last.  Generated. */
const char *loglin_built_in_tuning(size_t n, size_t *length);

/* The hash of kernels, engines and operators.  Generated. */
extern const char loglin_source_hash[];

#endif
