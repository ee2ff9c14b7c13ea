/* SPDX-License-Identifier: Apache-2.0 */
/* The version that the library was built as. */
#include "loglin.h"

#define TEXT_OF(number) #number
#define VERSION_TEXT(major, minor, patch) TEXT_OF(major) "." TEXT_OF(minor) "." TEXT_OF(patch)

const char *loglin_version(void) {
    return VERSION_TEXT(LOGLIN_VERSION_MAJOR, LOGLIN_VERSION_MINOR, LOGLIN_VERSION_PATCH);
}
