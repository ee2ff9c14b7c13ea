/* SPDX-License-Identifier: Apache-2.0 */
/* loglin devices: what is here, and what it can do. */
#include "cli/commands.h"

#include <jansson.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *type_name(cl_device_type type) {
    if ((type & CL_DEVICE_TYPE_GPU) != 0) {
        return "GPU";
    }
    return (type & CL_DEVICE_TYPE_CPU) != 0 ? "CPU" : "accelerator";
}

static void print_text(const loglin_device_info *infos, size_t count) {
    const double mib = 1024.0 * 1024.0;
    for (size_t i = 0; i < count; ++i) {
        const loglin_device_info *info = &infos[i];
        (void)printf("%zu  %s\n", i, info->name);
        (void)printf("   type             %s, %s\n", type_name(info->type), info->vendor);
        (void)printf("   platform         %s\n", info->platform_name);
        (void)printf("   version          %s, driver %s\n", info->version, info->driver);
        (void)printf("   compute units    %u\n", (unsigned)info->compute_units);
        (void)printf("   memory           %.0f MiB, at most %.0f MiB a buffer\n", (double)info->global_memory / mib,
                     (double)info->max_allocation / mib);
        (void)printf("   a work-group     at most %zu work-items, %llu KiB of local memory\n",
                     info->max_work_group_size, (unsigned long long)(info->local_memory / 1024));
    }
}

static loglin_cli_status print_json(const loglin_device_info *infos, size_t count) {
    json_t *devices = json_array();
    for (size_t i = 0; i < count; ++i) {
        const loglin_device_info *info = &infos[i];
        (void)json_array_append_new(
            devices,
            json_pack("{s:I, s:s, s:s, s:s, s:s, s:s, s:s, s:I, s:I, s:I, s:I, s:I}", "index", (json_int_t)i, "name",
                      info->name, "type", type_name(info->type), "vendor", info->vendor, "platform",
                      info->platform_name, "version", info->version, "driver", info->driver, "compute_units",
                      (json_int_t)info->compute_units, "global_memory", (json_int_t)info->global_memory,
                      "max_allocation", (json_int_t)info->max_allocation, "local_memory",
                      (json_int_t)info->local_memory, "max_work_group_size", (json_int_t)info->max_work_group_size));
    }
    json_t *report = json_pack("{s:o}", "devices", devices);
    const bool printed = report != NULL && json_dumpf(report, stdout, JSON_INDENT(2)) == 0;
    (void)putchar('\n');
    json_decref(report);
    return printed ? LOGLIN_CLI_OK : loglin_cli_fail(LOGLIN_CLI_FAILED, "the report cannot be printed");
}

static loglin_cli_status list_devices(bool json) {
    size_t count = 0;
    loglin_status status = loglin_list_devices(NULL, 0, &count);
    if (status != LOGLIN_OK) {
        return loglin_cli_fail_library(status);
    }
    loglin_device_info *infos = calloc(count, sizeof *infos);
    if (infos == NULL) {
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "out of memory");
    }
    size_t found = 0;
    status = loglin_list_devices(infos, count, &found);
    const size_t shown = found < count ? found : count;
    loglin_cli_status result = LOGLIN_CLI_OK;
    if (status != LOGLIN_OK) {
        result = loglin_cli_fail_library(status);
    } else if (json) {
        result = print_json(infos, shown);
    } else {
        print_text(infos, shown);
    }
    free(infos);
    return result;
}

loglin_cli_status loglin_cli_devices(int argc, char **argv) {
    bool json = false, help = false;
    for (int i = 1; i < argc; ++i) {
        if (strcmp(argv[i], "--json") == 0) {
            json = true;
        } else if (strcmp(argv[i], "--help") == 0) {
            help = true;
        } else {
            return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "devices: \"%s\" is not expected, only --json or --help",
                                   argv[i]);
        }
    }
    if (help) {
        (void)printf("usage: loglin devices [--json]\n"
                     "\n"
                     "Lists the OpenCL devices; the first is used unless --device or LOGLIN_DEVICE names another.\n");
        return LOGLIN_CLI_OK;
    }
    return list_devices(json);
}
