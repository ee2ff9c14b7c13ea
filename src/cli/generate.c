/* SPDX-License-Identifier: Apache-2.0 */
/* loglin generate: continues a prompt, token by token. */
#include "cli/commands.h"

#include "cli/language_model.h"
#include "cli/sampling.h"
#include "cli/session.h"
#include "cli/waiting.h"
#include <ctype.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BYTE_VOCABULARY = 256 };

typedef struct generate_run {
    loglin_cli_model_options options;
    const char *prompt, *id_list;
    const char *of_sampling; /* an option that only sampling has, NULL if none is given */
    size_t tokens;
    loglin_cli_sampling sampling;
    loglin_cli_model model;
    int32_t *ids;
    size_t id_count;
    float *logits;
    int32_t *order;
    size_t generated, steps;
    double prefill_ms, steps_ms; /* steps_ms: of all but the first, with which something may compile */
} generate_run;

static volatile sig_atomic_t interrupted;

/* Only the first is caught: where a long prompt keeps the device busy, a second ends the process. */
static void interrupt(int signal_number) {
    interrupted = signal_number;
    (void)signal(signal_number, SIG_DFL);
}

static loglin_cli_status parse_own(int option, generate_run *run) {
    size_t seed = 0;
    switch (option) {
    case 'P':
        run->prompt = optarg;
        return LOGLIN_CLI_OK;
    case 'I':
        run->id_list = optarg;
        return LOGLIN_CLI_OK;
    case 'N':
        return loglin_cli_parse_size("--tokens", optarg, 1, INT32_MAX, &run->tokens);
    case 'T':
        return loglin_cli_parse_real("--temperature", optarg, 0, 100, &run->sampling.temperature);
    case 'K':
        run->of_sampling = "--top-k";
        return loglin_cli_parse_size("--top-k", optarg, 1, INT32_MAX, &run->sampling.top_k);
    case 'Q':
        run->of_sampling = "--top-p";
        return loglin_cli_parse_real("--top-p", optarg, 1e-6, 1, &run->sampling.top_p);
    default:
        run->of_sampling = "--seed";
        RETURN_IF_FAILED(loglin_cli_parse_size("--seed", optarg, 0, SIZE_MAX, &seed));
        run->sampling.random = seed;
        return LOGLIN_CLI_OK;
    }
}

static void print_help(void) {
    (void)printf("usage: loglin generate --model DIR (--prompt TEXT | --ids LIST) --tokens N [OPTIONS]\n"
                 "\n"
                 "Continues a prompt.  A model with a vocabulary of 256 speaks bytes: they are printed as they come.\n"
                 "Others are given ids, as \"17,4,256\", and print ids.  Speeds are on standard error at the end.\n"
                 "\n"
                 "options:\n" LOGLIN_CLI_MODEL_HELP "  --prompt TEXT         what to continue\n"
                 "  --ids LIST            the same as token ids\n"
                 "  --tokens N            how many tokens to generate\n"
                 "  --temperature X       sample from logits / X; 0 (default) takes the most probable token\n"
                 "  --top-k K             with --temperature: only among the K most probable\n"
                 "  --top-p P             with --temperature: only among the most probable that have P together\n"
                 "  --seed S              with --temperature: of the random numbers; by default 0\n"
                 "  --help                print this text\n");
}

static loglin_cli_status parse(int argc, char **argv, generate_run *run) {
    static const struct option table[] = {
        LOGLIN_CLI_MODEL_OPTIONS,
        {"prompt", required_argument, NULL, 'P'},
        {"ids", required_argument, NULL, 'I'},
        {"tokens", required_argument, NULL, 'N'},
        {"temperature", required_argument, NULL, 'T'},
        {"top-k", required_argument, NULL, 'K'},
        {"top-p", required_argument, NULL, 'Q'},
        {"seed", required_argument, NULL, 'S'},
        {NULL, 0, NULL, 0},
    };
    opterr = 0;
    for (int option; (option = getopt_long(argc, argv, ":", table, NULL)) != -1;) {
        RETURN_IF_FAILED(isupper(option) ? parse_own(option, run)
                                         : loglin_cli_model_option(argv, option, &run->options));
    }
    if (run->options.help) {
        print_help();
        return LOGLIN_CLI_OK;
    }
    if (optind != argc) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "generate: \"%s\" is not expected", argv[optind]);
    }
    if ((run->prompt == NULL) == (run->id_list == NULL)) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "generate: one of --prompt and --ids is expected");
    }
    if (run->tokens == 0) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "generate: --tokens is missing");
    }
    if (run->of_sampling != NULL && run->sampling.temperature == 0) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "generate: %s has no effect without a --temperature above 0",
                               run->of_sampling);
    }
    return LOGLIN_CLI_OK;
}

/* ---- The prompt ------------------------------------------------------------------------------------------------- */

static loglin_cli_status parse_ids(generate_run *run, const char *list) {
    const char *next = list;
    for (run->id_count = 0;; ++next) {
        char *end;
        errno = 0;
        const unsigned long id = strtoul(next, &end, 10);
        if (!isdigit((unsigned char)*next) || errno != 0 || id >= run->model.info.vocabulary ||
            (*end != ',' && *end != '\0')) {
            return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "--ids: at \"%.32s\", expected ids from 0 to %zu with commas",
                                   next, run->model.info.vocabulary - 1);
        }
        run->ids[run->id_count++] = (int32_t)id;
        next = end;
        if (*end == '\0') {
            return LOGLIN_CLI_OK;
        }
    }
}

static loglin_cli_status read_prompt(generate_run *run) {
    const char *text = run->prompt != NULL ? run->prompt : run->id_list;
    const size_t room = text != NULL ? strlen(text) : 0;
    if (run->prompt != NULL && run->model.info.vocabulary != BYTE_VOCABULARY) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT,
                               "--prompt needs a model of bytes, this one has a vocabulary of %zu: "
                               "give --ids",
                               run->model.info.vocabulary);
    }
    if (room == 0) {
        return loglin_cli_fail(LOGLIN_CLI_BAD_INPUT, "the prompt is empty");
    }
    run->ids = calloc(room, sizeof *run->ids);
    run->logits = calloc(run->model.info.vocabulary, sizeof *run->logits);
    run->order = calloc(run->model.info.vocabulary, sizeof *run->order);
    if (run->ids == NULL || run->logits == NULL || run->order == NULL) {
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "out of memory");
    }
    if (run->id_list != NULL) {
        return parse_ids(run, text);
    }
    for (size_t i = 0; i < room; ++i) {
        run->ids[i] = (unsigned char)text[i];
    }
    run->id_count = room;
    return LOGLIN_CLI_OK;
}

/* ---- Tokens ----------------------------------------------------------------------------------------------------- */

static loglin_cli_status print_token(const generate_run *run, int32_t id) {
    const bool bytes = run->model.info.vocabulary == BYTE_VOCABULARY;
    const bool printed = bytes ? putchar(id) != EOF : printf(run->generated > 0 ? " %d" : "%d", (int)id) > 0;
    if (!printed || fflush(stdout) != 0) {
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "standard output: %s", strerror(errno));
    }
    return LOGLIN_CLI_OK;
}

static loglin_cli_status check_logits(const generate_run *run) {
    if (loglin_cli_finite_rows(run->logits, 1, run->model.info.vocabulary) == 0) {
        return loglin_cli_fail(LOGLIN_CLI_FAILED, "generate: the logits after %zu tokens are " LOGLIN_CLI_NOT_FINITE,
                               loglin_session_position(run->model.session, 0));
    }
    return LOGLIN_CLI_OK;
}

/* Ends early at an interrupt, or where the model's levels end. */
static loglin_cli_status generate(generate_run *run) {
    loglin_session *session = run->model.session;
    const double begin = loglin_cli_now_ms();
    loglin_status status = loglin_session_prefill(session, 0, run->ids, run->id_count, run->logits);
    double first_stepped = 0;
    run->prefill_ms = loglin_cli_now_ms() - begin;
    loglin_cli_waiting_end();
    while (status == LOGLIN_OK && interrupted == 0) {
        RETURN_IF_FAILED(check_logits(run));
        const int32_t id = loglin_cli_sample(&run->sampling, run->logits, run->model.info.vocabulary, run->order);
        RETURN_IF_FAILED(print_token(run, id));
        run->generated++;
        if (run->generated == run->tokens || loglin_session_position(session, 0) == run->model.info.max_length) {
            break;
        }
        status = loglin_session_step(session, &id, run->logits);
        if (run->steps++ == 0) {
            first_stepped = loglin_cli_now_ms();
        }
    }
    run->steps_ms = loglin_cli_now_ms() - first_stepped;
    return status == LOGLIN_OK ? LOGLIN_CLI_OK : loglin_cli_fail_model(status);
}

static void report(const generate_run *run) {
    (void)fprintf(stderr, "prompt     %zu tokens, %.2f ms (with what is compiled at first use)\n", run->id_count,
                  run->prefill_ms);
    (void)fprintf(stderr, "generated  %zu tokens", run->generated);
    if (run->steps > 1) {
        (void)fprintf(stderr, ", %.1f tokens/s", 1e3 * (double)(run->steps - 1) / run->steps_ms);
    }
    (void)fputc('\n', stderr);
    if (run->generated < run->tokens && interrupted == 0) {
        (void)fprintf(stderr, "ended      at %zu tokens, which is as far as the model's levels reach\n",
                      run->model.info.max_length);
    }
}

static loglin_cli_status run_all(generate_run *run) {
    struct sigaction action = {.sa_handler = interrupt, .sa_flags = SA_RESTART};
    RETURN_IF_FAILED(loglin_cli_model_open(&run->options, &run->model));
    RETURN_IF_FAILED(read_prompt(run));
    RETURN_IF_FAILED(loglin_cli_model_start(&run->model, 1));
    (void)sigemptyset(&action.sa_mask);
    (void)sigaction(SIGINT, &action, NULL);
    RETURN_IF_FAILED(generate(run));
    (void)putchar('\n');
    (void)fflush(stdout);
    report(run);
    return LOGLIN_CLI_OK;
}

loglin_cli_status loglin_cli_generate(int argc, char **argv) {
    generate_run run = {.sampling = {.top_p = 1}};
    loglin_cli_status status = parse(argc, argv, &run);
    if (status != LOGLIN_CLI_OK || run.options.help) {
        return status;
    }
    status = run_all(&run);
    loglin_cli_model_close(&run.model);
    free(run.ids);
    free(run.logits);
    free(run.order);
    if (interrupted != 0) { /* all is cleaned up: end as the shell expects it */
        (void)raise(SIGINT);
    }
    return status;
}
