/* SPDX-License-Identifier: Apache-2.0 */
/* The installed library, as its users find it: tests/install_test. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>

Test(install, examples) {
#ifdef __SANITIZE_ADDRESS__
    cr_skip_test("the examples are not built with sanitizers");
#else
    char command[2048];
    const int length = snprintf(command, sizeof command, "'%s/../install_test' '%s/../..' \"$(dirname '%s')\"",
                                TEST_DATA_DIR, TEST_DATA_DIR, LOGLIN_COMMAND);
    cr_assert_lt(length, (int)sizeof command);
    cr_expect_eq(system(command), 0);
#endif
}
