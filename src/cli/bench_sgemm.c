/* SPDX-License-Identifier: Apache-2.0 */
/* OpenBLAS's sgemm: nothing is linked with it, a benchmark takes it where it is installed. */
#include "cli/bench.h"

#include "cli/session.h"
#include <dlfcn.h>
#include <stdlib.h>

enum { SIZE = 1024, ROW_MAJOR = 101, NO_TRANSPOSE = 111 };

typedef void (*sgemm_function)(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha,
                               const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc);
typedef void (*set_threads_function)(int threads);

struct loglin_bench_sgemm {
    void *library;
    sgemm_function multiply;
    float *a, *b, *c;
};

static bool find_functions(loglin_bench_sgemm *sgemm, int threads) {
    set_threads_function set_threads = NULL;
    *(void **)&sgemm->multiply = dlsym(sgemm->library, "cblas_sgemm");
    *(void **)&set_threads = dlsym(sgemm->library, "openblas_set_num_threads");
    if (sgemm->multiply == NULL || set_threads == NULL) {
        return false;
    }
    set_threads(threads);
    return true;
}

loglin_bench_sgemm *loglin_cli_bench_sgemm_open(loglin_bench_machine *machine, int threads) {
    loglin_bench_sgemm *sgemm = calloc(1, sizeof *sgemm);
    if (sgemm == NULL) {
        return NULL;
    }
    const size_t count = (size_t)SIZE * SIZE;
    sgemm->library = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL);
    sgemm->a = malloc(count * sizeof(float));
    sgemm->b = malloc(count * sizeof(float));
    sgemm->c = calloc(count, sizeof(float));
    if (sgemm->library == NULL || sgemm->a == NULL || sgemm->b == NULL || sgemm->c == NULL ||
        !find_functions(sgemm, threads)) {
        loglin_cli_bench_sgemm_close(sgemm);
        return NULL;
    }
    for (size_t i = 0; i < count; ++i) {
        sgemm->a[i] = loglin_cli_bench_random(machine, -1.0F, 1.0F);
        sgemm->b[i] = loglin_cli_bench_random(machine, -1.0F, 1.0F);
    }
    return sgemm;
}

/* The library stays: its threads may be asleep in it. */
void loglin_cli_bench_sgemm_close(loglin_bench_sgemm *sgemm) {
    if (sgemm != NULL) {
        free(sgemm->a);
        free(sgemm->b);
        free(sgemm->c);
        free(sgemm);
    }
}

loglin_status loglin_cli_bench_sgemm_run(loglin_bench_machine *machine, void *data, double *ms) {
    const loglin_bench_sgemm *sgemm = data;
    (void)machine;
    const double begin = loglin_cli_now_ms();
    sgemm->multiply(ROW_MAJOR, NO_TRANSPOSE, NO_TRANSPOSE, SIZE, SIZE, SIZE, 1.0F, sgemm->a, SIZE, sgemm->b, SIZE, 0.0F,
                    sgemm->c, SIZE);
    *ms = loglin_cli_now_ms() - begin;
    return LOGLIN_OK;
}

double loglin_cli_bench_sgemm_work(void) {
    return 2.0 * SIZE * SIZE * SIZE;
}
