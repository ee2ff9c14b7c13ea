/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A step of one launch on a CPU whose driver shares memory with the host.
 *
 * A token of a small model is through the layers sooner than a sleeping thread wakes up.  So nothing is copied by
 * commands of their own: the kernel reads the ids and writes the logits where the host has them, and counts the
 * sequences that are through; and the host waits awake for that count, though not for long: where the cores have other
 * work it soon sleeps as in any other wait.  Where steps follow each other closely, the kernel of a lone sequence stays
 * awake too, for about 0.1 ms, and takes the next token without a launch.
 *
 * Tokens have numbers.  The host asks for the next one by counting `asked` on from the last number, which the kernel sees;
 * if that fails, since the kernel has counted back and ended, it asks for a number that no kernel expects, and launches one.
 */
#include "model/session.h"

#include "runtime/device.h"
#include "runtime/status.h"
#include <string.h>
#include <threads.h>
#include <time.h>

/* Nanoseconds that the host waits awake, and from a step to one that follows it closely; how often the kernel looks. */
enum { AWAKE = 300000, CLOSE = 50000, LOOKS = 1 << 17 };

/* What the parts of the shared memory begin at a multiple of: no two of them share a line of a cache. */
enum { LINE = 64 };

/* The places of cl/token.cl's arguments. */
enum { IDS_ARGUMENT = 0, LOGITS_ARGUMENT = 14, SHARED_ARGUMENT = 34 };

loglin_status loglin_shared_step_create(loglin_session *session) {
    const loglin_activations *a = &session->step_activations;
    const cl_kernel kernel = session->step_token.kernel;
    loglin_shared_step *shared = &session->shared;
    if (!session->model->device->shares_memory) {
        return LOGLIN_OK;
    }
    const size_t ids_at = LINE;
    const size_t logits_at = ids_at + (session->sequences * sizeof(cl_int) + LINE - 1) / LINE * LINE;
    char *memory = clSVMAlloc(session->model->device->context,
                              CL_MEM_READ_WRITE | CL_MEM_SVM_FINE_GRAIN_BUFFER | CL_MEM_SVM_ATOMICS,
                              logits_at + session->sequences * a->logits_stride * sizeof(float), LINE);
    if (memory == NULL) {
        return loglin_fail(LOGLIN_OUT_OF_MEMORY, "the logits in shared memory: out of memory");
    }
    shared->words = (loglin_shared_words *)(void *)memory;
    shared->ids = (cl_int *)(void *)(memory + ids_at);
    shared->logits = (float *)(void *)(memory + logits_at);
    *shared->words = (loglin_shared_words){0};
    RETURN_IF_CL_ERROR(clSetKernelArgSVMPointer(kernel, IDS_ARGUMENT, shared->ids));
    RETURN_IF_CL_ERROR(clSetKernelArgSVMPointer(kernel, LOGITS_ARGUMENT, shared->logits));
    RETURN_IF_CL_ERROR(clSetKernelArgSVMPointer(kernel, SHARED_ARGUMENT, memory));
    return LOGLIN_OK;
}

void loglin_shared_step_destroy(loglin_session *session) {
    if (session->shared.words != NULL) {
        clSVMFree(session->model->device->context, session->shared.words);
    }
}

static int64_t nanoseconds(void) {
    struct timespec now;
    (void)timespec_get(&now, TIME_UTC);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static bool is_through(const loglin_session *session) {
    return atomic_load_explicit(&session->shared.words->arrived, memory_order_acquire) >= session->sequences;
}

static void wait_awake(const loglin_session *session) {
    const int64_t start = nanoseconds();
    while (!is_through(session)) {
        const int64_t waited = nanoseconds() - start;
        if (waited < 0 || waited > AWAKE) { /* below 0: somebody has set the clock */
            break;
        }
        thrd_yield(); /* the kernel's thread may wait for this core */
    }
}

void loglin_shared_step_dismiss(loglin_session *session) {
    const loglin_shared_step *shared = &session->shared;
    unsigned number = shared->number;
    if (shared->words != NULL) {
        (void)atomic_compare_exchange_strong(&shared->words->asked, &number, number - 1);
    }
}

/* Asks for the next token: of the last one's kernel, or of a new one. */
static loglin_status ask(loglin_session *session) {
    loglin_shared_step *shared = &session->shared;
    unsigned number = shared->number;
    const int64_t since = nanoseconds() - shared->answered;
    atomic_store(&shared->words->arrived, 0);
    atomic_store(&shared->words->looks, since >= 0 && since < CLOSE ? LOOKS : 0);
    shared->number++;
    if (session->sequences == 1 && atomic_compare_exchange_strong(&shared->words->asked, &number, shared->number)) {
        return LOGLIN_OK;
    }
    shared->number++;
    atomic_store(&shared->words->asked, shared->number);
    const loglin_status status = loglin_launch_enqueue(&session->step_token, session->queue);
    if (status != LOGLIN_OK) {
        loglin_shared_step_dismiss(session);
        return status;
    }
    RETURN_IF_CL_ERROR(clFlush(session->queue));
    return LOGLIN_OK;
}

loglin_status loglin_shared_step_run(loglin_session *session, float *logits) {
    loglin_shared_step *shared = &session->shared;
    const size_t vocabulary = session->model->lm.vocabulary;
    memcpy(shared->ids, session->ids, session->sequences * sizeof *shared->ids);
    RETURN_IF_ERROR(ask(session));
    wait_awake(session);
    if (!is_through(session)) {
        atomic_store(&shared->words->looks, 0); /* it may still have to take this one */
        RETURN_IF_CL_ERROR(clFinish(session->queue));
    }
    shared->answered = nanoseconds();
    for (size_t n = 0; n < session->sequences && logits != NULL; n++) {
        memcpy(logits + n * vocabulary, shared->logits + n * session->step_activations.logits_stride,
               vocabulary * sizeof *logits);
    }
    return LOGLIN_OK;
}
