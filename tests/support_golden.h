/* SPDX-License-Identifier: Apache-2.0 */
/* The real activations of tests/data, with their exact outputs and gradients, as a case. */
#ifndef LOGLIN_TESTS_SUPPORT_GOLDEN_H
#define LOGLIN_TESTS_SUPPORT_GOLDEN_H

#include "support_case.h"

/* name: of a file in tests/data, without directory and ending.  Dies where the file is not as expected. */
support_data *support_golden(const char *name, support_results **expected);

#endif
