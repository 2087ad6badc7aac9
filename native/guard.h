/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Copies from and to mapped files that survive what such a file may do: where it has been cut off meanwhile, or no memory is left
 * for its page, the program gets a SIGBUS, which would be its end.
 *
 * `buf` may be such a file's, too, mapped by somebody else: then that is refused here, and the system call that does it instead says
 * so.
 *
 * The first call puts a handler in place, for good, which ends a copy of ours early, and leaves every other SIGBUS to the handler
 * that was there before, or to the default. A program that puts its own in place later, or threads that block the signal, are
 * noticed: nothing is copied there then.
 *
 * Units:     bytes.
 * Ownership: -
 * Errno:     -EFAULT: some of it, and nobody knows how much, could not be copied. -EAGAIN: the thread is not ready.
 * Threads:   any.
 */
#ifndef BG_GUARD_H
#define BG_GUARD_H

#include <signal.h>
#include <stdbool.h>
#include <stddef.h>

/* Whether this thread may copy now: then the next copy does not refuse. */
bool bg_guard_ready(void);

/*
 * For the threads that are about to be made: signals belong to the program's own, but for the SIGBUS of a copy. Where the program
 * waits for that otherwise, and blocks it, nothing is copied. `former` is what pthread_sigmask(3) is to be given afterwards.
 */
void bg_guard_block_signals(sigset_t *former);

/* From a mapped file. */
int bg_guard_load(void *buf, const void *from, size_t length);

/*
 * Into a mapped file, past the processor's caches: what is in none of them is not read first, as an ordinary store would have
 * it, which takes twice as long, and a system call, whose stores are ordinary ones, three times. It is there when this returns.
 */
int bg_guard_store(void *to, const void *buf, size_t length);

#endif
