/* SPDX-License-Identifier: Apache-2.0 */
/* What the tuner tries: lists of configurations, the untuned default first. */
#ifndef LOGLIN_PLAN_CANDIDATES_H
#define LOGLIN_PLAN_CANDIDATES_H

#include "plan/tuning.h"

enum { LOGLIN_MAX_CANDIDATES = 128, LOGLIN_CANDIDATE_TEXT_SIZE = 160 };

typedef struct loglin_candidates {
    loglin_configuration items[LOGLIN_MAX_CANDIDATES];
    size_t count;
} loglin_candidates;

/*
 * CLBlast's parameters on the blas engine: its own, those that are built in for the device, what `known` holds of it (stale
 * or not), some that have won somewhere, and random ones from the seed.
 */
void loglin_candidates_of_gemm(const loglin_device_info *info, const loglin_gemm_parameters *built_in,
                               const loglin_tuning *known, uint64_t seed, loglin_candidates *candidates);

/*
 * An engine's chunk sizes, with CLBlast set as given.  The first candidate is the untuned default, for the blas engine
 * with CLBlast's own parameters; the default's values with the given ones come second if they differ.  quick: those that
 * win somewhere.
 */
void loglin_candidates_of_engine(loglin_engine engine, const loglin_gemm_parameters *gemm, bool quick,
                                 loglin_candidates *candidates);

/*
 * The same first candidates, and `from` with all values of the engine's other tunables that matter to the type of device
 * and the phase.  quick: what needs no compiling.
 */
void loglin_candidates_near(const loglin_configuration *from, cl_device_type device, loglin_phase phase, bool quick,
                            loglin_candidates *candidates);

/*
 * Adds what `known` holds of a class for the engine of `from`, stale or not, with CLBlast set as there: a shorter run, or
 * one with a new driver, starts from what an earlier one has found.
 */
void loglin_candidates_of_class(const loglin_tuning *known, const loglin_class *class, const loglin_configuration *from,
                                loglin_candidates *candidates);

/* "blas chunk=64 panel_mib=16 gemm=own": the engine, its chunk size, what else is not at its fallback. */
void loglin_candidate_text(const loglin_configuration *of, char text[LOGLIN_CANDIDATE_TEXT_SIZE]);

#endif
