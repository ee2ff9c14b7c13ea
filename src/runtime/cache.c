/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An entry is the file <hash of the key>.program: a header, the whole key, the data.  The key is compared in full and
 * the data by its checksum, so a truncated, damaged, colliding or foreign file is a miss.  A file is written under a
 * temporary name and renamed, so that readers never see a part of one.
 */
#include "runtime/cache.h"
#include "runtime/environment.h"
#include "runtime/log.h"
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

static const char entry_magic[8] = "LOGLINPG";
static const uint64_t entry_version = 1;
static const uint64_t max_data_size = (uint64_t)1 << 30;

typedef struct entry_header {
    char magic[8];
    uint64_t version;
    uint64_t key_size;
    uint64_t data_size;
    XXH128_canonical_t checksum; /* of the data */
} entry_header;

/* A string for the caller to free, NULL without memory. */
static char *join(const char *first, const char *second, const char *third) {
    const size_t size = strlen(first) + strlen(second) + strlen(third) + 1;
    char *text = malloc(size);
    if (text != NULL) {
        snprintf(text, size, "%s%s%s", first, second, third);
    }
    return text;
}

char *loglin_cache_directory(void) {
    const char *own = loglin_environment(LOGLIN_VARIABLE_CACHE_DIR);
    if (own != NULL) {
        return own[0] != '\0' ? join(own, "", "") : NULL;
    }
    const char *caches = loglin_environment(LOGLIN_VARIABLE_XDG_CACHE_HOME);
    if (caches != NULL && caches[0] == '/') {
        return join(caches, "/loglin", "");
    }
    const char *home = loglin_environment(LOGLIN_VARIABLE_HOME);
    if (home != NULL && home[0] == '/') {
        return join(home, "/.cache", "/loglin");
    }
    return NULL;
}

static XXH128_canonical_t hash(const void *data, size_t size) {
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits(data, size));
    return canonical;
}

static char *entry_path(const char *directory, const char *key) {
    const XXH128_canonical_t digest = hash(key, strlen(key));
    char hex[2 * sizeof digest.digest + 1];
    for (size_t i = 0; i < sizeof digest.digest; i++) {
        snprintf(hex + 2 * i, 3, "%02x", digest.digest[i]);
    }
    char name[sizeof hex + sizeof "/.program"];
    snprintf(name, sizeof name, "/%s.program", hex);
    return join(directory, name, "");
}

/* mkdir -p, with mode 0700. */
static bool make_directory(const char *directory) {
    char *path = join(directory, "", "");
    if (path == NULL) {
        return false;
    }
    int code = 0; /* why a parent could not be made: then the last one fails for want of it */
    for (char *end = strchr(path + 1, '/'); end != NULL; end = strchr(end + 1, '/')) {
        *end = '\0';
        code = mkdir(path, 0700) != 0 && errno != EEXIST && code == 0 ? errno : code;
        *end = '/';
    }
    const bool made = mkdir(path, 0700) == 0 || errno == EEXIST;
    free(path);
    errno = !made && code != 0 ? code : errno;
    return made;
}

/* Says once why the directory is of no use: errno, which stays.  Whoever has named it is to hear of it. */
static void report_unusable(const char *directory) {
    static atomic_flag reported = ATOMIC_FLAG_INIT;
    const bool named = loglin_environment(LOGLIN_VARIABLE_CACHE_DIR) != NULL;
    const int code = errno;
    if (!atomic_flag_test_and_set(&reported)) {
        char reason[128];
        if (strerror_r(code, reason, sizeof reason) != 0) {
            snprintf(reason, sizeof reason, "error %d", code);
        }
        loglin_log(named ? LOGLIN_LOG_WARN : LOGLIN_LOG_INFO,
                   "compiled programs are not kept: cannot write to %s%s: %s", named ? "LOGLIN_CACHE_DIR, " : "",
                   directory, reason);
    }
    errno = code;
}

bool loglin_cache_make(const char *directory) {
    return make_directory(directory) && access(directory, W_OK | X_OK) == 0;
}

bool loglin_cache_is_writable(const char *directory) {
    if (loglin_cache_make(directory)) {
        return true;
    }
    report_unusable(directory);
    return false;
}

static bool read_all(int file, void *data, size_t size) {
    unsigned char *at = data;
    while (size > 0) {
        const ssize_t got = read(file, at, size);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0) {
            return false;
        }
        at += got;
        size -= (size_t)got;
    }
    return true;
}

bool loglin_write_all(int file, const void *data, size_t size) {
    const unsigned char *at = data;
    while (size > 0) {
        const ssize_t put = write(file, at, size);
        if (put < 0 && errno == EINTR) {
            continue;
        }
        if (put <= 0) {
            return false;
        }
        at += put;
        size -= (size_t)put;
    }
    return true;
}

/* The file is code to run: only this user's or the administrator's is trusted, and only if nobody else may change it. */
static bool is_trusted(const struct stat *status) {
    return S_ISREG(status->st_mode) && (status->st_uid == geteuid() || status->st_uid == 0) &&
           (status->st_mode & (S_IWGRP | S_IWOTH)) == 0;
}

static bool header_is_good(int file, const entry_header *header, size_t key_size) {
    struct stat status;
    return fstat(file, &status) == 0 && is_trusted(&status) &&
           memcmp(header->magic, entry_magic, sizeof entry_magic) == 0 && header->version == entry_version &&
           header->key_size == key_size && header->data_size > 0 && header->data_size <= max_data_size &&
           (uint64_t)status.st_size == sizeof *header + header->key_size + header->data_size;
}

static unsigned char *read_entry(int file, const char *key, size_t *size) {
    const size_t key_size = strlen(key);
    entry_header header;
    if (!read_all(file, &header, sizeof header) || !header_is_good(file, &header, key_size)) {
        return NULL;
    }
    const size_t data_size = (size_t)header.data_size;
    unsigned char *content = malloc(key_size + data_size);
    if (content == NULL) {
        return NULL;
    }
    if (read_all(file, content, key_size + data_size) && memcmp(content, key, key_size) == 0) {
        const XXH128_canonical_t checksum = hash(content + key_size, data_size);
        if (memcmp(&checksum, &header.checksum, sizeof checksum) == 0) {
            memmove(content, content + key_size, data_size);
            *size = data_size;
            return content;
        }
    }
    free(content);
    return NULL;
}

unsigned char *loglin_cache_load(const char *directory, const char *key, size_t *size) {
    char *path = entry_path(directory, key);
    if (path == NULL) {
        return NULL;
    }
    unsigned char *data = NULL;
    const int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO of that name must not block */
    if (file >= 0) {
        data = read_entry(file, key, size);
        close(file);
        loglin_log(LOGLIN_LOG_DEBUG, data != NULL ? "program read from %s" : "%s is not used: not an entry of this key",
                   path);
    }
    free(path);
    return data;
}

static bool write_entry(int file, const char *key, const void *data, size_t size) {
    entry_header header = {
        .version = entry_version, .key_size = strlen(key), .data_size = size, .checksum = hash(data, size)};
    memcpy(header.magic, entry_magic, sizeof entry_magic);
    return loglin_write_all(file, &header, sizeof header) && loglin_write_all(file, key, strlen(key)) &&
           loglin_write_all(file, data, size);
}

void loglin_cache_store(const char *directory, const char *key, const void *data, size_t size) {
    if (size == 0 || size > max_data_size || !loglin_cache_is_writable(directory)) {
        return;
    }
    char *path = entry_path(directory, key);
    char *temporary = join(directory, "/new-XXXXXX", "");
    const int file = path != NULL && temporary != NULL ? mkstemp(temporary) : -1;
    bool stored = false;
    if (file >= 0) {
        const bool written = write_entry(file, key, data, size);
        stored = close(file) == 0 && written && rename(temporary, path) == 0;
        if (!stored) {
            const int code = errno;
            unlink(temporary);
            errno = code;
        }
    }
    if (stored) {
        loglin_log(LOGLIN_LOG_DEBUG, "program written to %s", path);
    } else {
        report_unusable(directory);
    }
    free(temporary);
    free(path);
}
