/* SPDX-License-Identifier: Apache-2.0 */
/* Implementation of support_tuning.h. */
#include "support_tuning.h"
#include "support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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
