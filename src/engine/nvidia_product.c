/* SPDX-License-Identifier: Apache-2.0 */
#include "engine/nvidia_product.h"

#include "engine/nvidia.h"
#include "runtime/device.h"
#include "runtime/program.h"
#include "runtime/status.h"

#include <stdio.h>
#include <string.h>

enum {
    BLOCK = 16,
    SLAB = 64,              /* columns */
    LOCAL_BYTES = 64 << 10, /* of a work-group of nvidia_product */
    LEAST_SLABS = 4,        /* of a part */
};

loglin_status loglin_nvidia_product_create(loglin_device *device, loglin_nvidia_product_kernels *kernels) {
    static const char *const files[] = {"common.cl", "mma_nvidia.cl", "nvidia_product_layout.cl", "nvidia_product.cl",
                                        NULL};
    static const char *const names[] = {"nvidia_product", "nvidia_product_sum"};
    *kernels = (loglin_nvidia_product_kernels){.units = device->info.compute_units};
    if (strstr(device->info.vendor, "NVIDIA") == NULL) {
        return loglin_fail(LOGLIN_UNSUPPORTED, "the device is not NVIDIA's");
    }
    const bool wgmma = loglin_nvidia_probe_wgmma(device, LOGLIN_BF16, LOCAL_BYTES) == LOGLIN_OK;
    if (!wgmma) {
        RETURN_IF_ERROR(loglin_nvidia_probe(device, LOGLIN_BF16, LOCAL_BYTES));
    }
    char options[64];
    (void)snprintf(options, sizeof options, "-DSTORAGE=%d %s", (int)LOGLIN_BF16,
                   wgmma ? LOGLIN_HIDDEN_INSTRUCTIONS : "");
    cl_kernel made[2] = {NULL, NULL};
    const loglin_status status = loglin_kernels_get(device, files, options, names, 2, made);
    kernels->product = made[0];
    kernels->sum = made[1];
    return status;
}

void loglin_nvidia_product_destroy(loglin_nvidia_product_kernels *kernels) {
    if (kernels->product != NULL) {
        (void)clReleaseKernel(kernels->product);
    }
    if (kernels->sum != NULL) {
        (void)clReleaseKernel(kernels->sum);
    }
    *kernels = (loglin_nvidia_product_kernels){0};
}

/* How the columns are cut: so many parts that most of the device has work, of at least LEAST_SLABS slabs. */
static size_t slabs_of_part(const loglin_nvidia_product_kernels *kernels, const loglin_nvidia_product *what,
                            size_t tiles) {
    const size_t slabs = ceil_div(what->columns, SLAB);
    const size_t room = what->part_floats / (what->tokens * what->blocks * BLOCK);
    size_t parts = kernels->units / tiles;
    parts = parts < room ? parts : room;
    parts = parts < slabs / LEAST_SLABS ? parts : slabs / LEAST_SLABS;
    return parts > 1 ? ceil_div(slabs, parts) : slabs;
}

typedef struct argument {
    size_t size;
    const void *value;
} argument;

#define ARGUMENT(variable)                                                                                             \
    { sizeof(variable), &(variable) }

static loglin_status launch(cl_kernel kernel, const argument *arguments, cl_uint count, const size_t global[2],
                            const size_t *local, cl_command_queue queue) {
    for (cl_uint i = 0; i < count; i++) {
        RETURN_IF_CL_ERROR(clSetKernelArg(kernel, i, arguments[i].size, arguments[i].value));
    }
    RETURN_IF_CL_ERROR(clEnqueueNDRangeKernel(queue, kernel, 2, NULL, global, local, 0, NULL, NULL));
    return LOGLIN_OK;
}

loglin_status loglin_nvidia_product_enqueue(const loglin_nvidia_product_kernels *kernels,
                                            const loglin_nvidia_product *what, cl_command_queue queue) {
    const size_t token_tiles = ceil_div(what->tokens, PRODUCT_TOKENS);
    const size_t row_tiles = ceil_div(what->blocks * BLOCK, PRODUCT_ROWS);
    const size_t part_slabs = slabs_of_part(kernels, what, token_tiles * row_tiles);
    const cl_uint slabs = (cl_uint)part_slabs;
    const cl_uint parts = (cl_uint)ceil_div(ceil_div(what->columns, SLAB), part_slabs);
    const cl_mem to = parts > 1 ? what->parts : what->y;
    const cl_int mode = what->mode;
    const cl_int mode_of_part = parts > 1 ? PRODUCT_PART : mode;
    const cl_uint rows = (cl_uint)(what->blocks * BLOCK);
    const cl_ulong x_stride = what->x_stride;
    const cl_ulong y_stride = what->y_stride;
    const cl_ulong to_stride = parts > 1 ? rows : y_stride;
    const cl_uint tokens = (cl_uint)what->tokens;
    const cl_uint columns = (cl_uint)what->columns;
    const cl_uint blocks = (cl_uint)what->blocks;
    const cl_uint bias_at = (cl_uint)what->bias_at;
    const argument arguments[] = {
        ARGUMENT(what->x),   ARGUMENT(x_stride),     ARGUMENT(tokens),
        ARGUMENT(what->w),   ARGUMENT(columns),      ARGUMENT(blocks),
        ARGUMENT(parts),     ARGUMENT(slabs),        {sizeof(cl_mem), what->bias != NULL ? &what->bias : NULL},
        ARGUMENT(bias_at),   ARGUMENT(mode_of_part), ARGUMENT(to),
        ARGUMENT(to_stride),
    };
    const size_t global[2] = {token_tiles * PRODUCT_ITEMS, row_tiles * parts}, local[2] = {PRODUCT_ITEMS, 1};
    RETURN_IF_ERROR(launch(kernels->product, arguments, sizeof arguments / sizeof *arguments, global, local, queue));
    if (parts == 1) {
        return LOGLIN_OK;
    }
    const argument of_sum[] = {
        ARGUMENT(what->parts), ARGUMENT(parts),
        ARGUMENT(rows),        {sizeof(cl_mem), what->bias != NULL ? &what->bias : NULL},
        ARGUMENT(bias_at),     ARGUMENT(mode),
        ARGUMENT(what->y),     ARGUMENT(y_stride),
    };
    const size_t outputs[2] = {mode == PRODUCT_SWIGLU ? rows / 2 : rows, what->tokens};
    return launch(kernels->sum, of_sum, sizeof of_sum / sizeof *of_sum, outputs, NULL, queue);
}
