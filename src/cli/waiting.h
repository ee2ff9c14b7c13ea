/* SPDX-License-Identifier: Apache-2.0 */
/* A first run on a device compiles for seconds to minutes: on a terminal it says so, if it takes that long. */
#ifndef LOGLIN_CLI_WAITING_H
#define LOGLIN_CLI_WAITING_H

/* What may compile begins: after two seconds a line on standard error, if that is a terminal. */
void loglin_cli_waiting_begin(void);

/* It is over. */
void loglin_cli_waiting_end(void);

#endif
