/* SPDX-License-Identifier: Apache-2.0 */
/* The line comes from an alarm's handler, as the library's call does not return before all is compiled. */
#include "cli/waiting.h"

#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <unistd.h>

enum { PATIENCE = 2 /* seconds */ };

static void tell(int number) {
    static const char line[] = "loglin: compiling for this device; later runs find what is compiled\n";
    const int code = errno;
    const ssize_t written = write(STDERR_FILENO, line, sizeof line - 1);
    (void)number;
    (void)written;
    errno = code;
}

void loglin_cli_waiting_begin(void) {
    struct sigaction action = {.sa_handler = tell, .sa_flags = SA_RESTART};
    (void)sigemptyset(&action.sa_mask);
    if (isatty(STDERR_FILENO) == 1 && sigaction(SIGALRM, &action, NULL) == 0) {
        (void)alarm(PATIENCE);
    }
}

void loglin_cli_waiting_end(void) {
    (void)alarm(0);
}
