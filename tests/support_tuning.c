/* SPDX-License-Identifier: Apache-2.0 */
/* Implementation of support_tuning.h. */
#define _GNU_SOURCE /* unshare */
#include "support_tuning.h"
#include "support.h"

#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

char support_cache[64];

void support_make_cache(void) {
    strcpy(support_cache, "/tmp/loglin-tuning-XXXXXX");
    if (mkdtemp(support_cache) == NULL) {
        support_die("no folder can be made in /tmp");
    }
    setenv("LOGLIN_CACHE_DIR", support_cache, 1);
    setenv("LOGLIN_LOG", "error", 1);
}

void support_remove_cache(void) {
    char command[96];
    snprintf(command, sizeof command, "rm -rf '%s'", support_cache);
    if (system(command) != 0) {
        support_die("%s cannot be removed", support_cache);
    }
}

void support_write_file(const char *path, const char *text, size_t length) {
    FILE *stream = fopen(path, "wb");
    if (stream == NULL || fwrite(text, 1, length, stream) != length || fclose(stream) != 0) {
        support_die("%s cannot be written", path);
    }
}

/* ---- A small disk ------------------------------------------------------------------------------------------------ */

char support_disk[80];
static char filler[96];

static bool write_text(const char *path, const char *text) {
    const int file = open(path, O_WRONLY | O_CLOEXEC);
    const bool written = file >= 0 && write(file, text, strlen(text)) == (ssize_t)strlen(text);
    return (file < 0 || close(file) == 0) && written;
}

/* As the administrator; or else in a name space whose administrator this user is. */
static bool may_mount(void) {
    const unsigned user = geteuid(), group = getegid();
    if (user == 0 && unshare(CLONE_NEWNS) == 0) {
        return true;
    }
    char users[32], groups[32];
    snprintf(users, sizeof users, "%u %u 1", user, user);
    snprintf(groups, sizeof groups, "%u %u 1", group, group);
    return unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0 && write_text("/proc/self/setgroups", "deny") &&
           write_text("/proc/self/uid_map", users) && write_text("/proc/self/gid_map", groups);
}

static bool mount_disk(void) {
    return may_mount() && mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0 &&
           mount("tmpfs", support_disk, "tmpfs", 0, "size=131072") == 0;
}

int support_on_small_disk(const char *(*work)(void)) {
    snprintf(support_disk, sizeof support_disk, "%s/disk", support_cache);
    snprintf(filler, sizeof filler, "%s/filler", support_disk);
    (void)mkdir(support_disk, 0700);
    const pid_t child = fork();
    if (child == 0) {
        if (!mount_disk()) {
            _exit(SUPPORT_NO_DISK);
        }
        setenv("LOGLIN_CACHE_DIR", support_disk, 1);
        const char *wrong = work();
        if (wrong != NULL) {
            (void)fprintf(stderr, "on a small disk: %s (%s)\n", wrong, loglin_last_error());
        }
        _exit(wrong != NULL);
    }
    int status;
    if (child < 0 || waitpid(child, &status, 0) != child) {
        support_die("no child process");
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

void support_fill_disk(size_t pages_left) {
    static const char zeros[4096];
    const off_t page = (off_t)sysconf(_SC_PAGESIZE);
    const int file = open(filler, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    off_t size = 0;
    for (ssize_t put; (put = write(file, zeros, sizeof zeros)) > 0;) {
        size += put;
    }
    if (ftruncate(file, size - (off_t)pages_left * page) != 0 || close(file) != 0) {
        support_die("%s cannot be cut", filler);
    }
}

void support_empty_disk(void) {
    if (unlink(filler) != 0) {
        support_die("%s cannot be removed", filler);
    }
}

void support_freeze_disk(void) {
    if (mount(NULL, support_disk, NULL, MS_REMOUNT | MS_RDONLY, NULL) != 0) {
        support_die("%s cannot be mounted read-only", support_disk);
    }
}

loglin_device_info support_device_info(void) {
    loglin_device_info infos[64];
    size_t count = 0;
    support_require(loglin_list_devices(infos, 64, &count), "loglin_list_devices");
    for (size_t i = 0; i < count && i < 64; i++) {
        if (infos[i].id == support_open()->id) {
            return infos[i];
        }
    }
    support_die("the device is not listed");
}
