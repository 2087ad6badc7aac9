/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Copies from and to mapped files that survive what such a file may do: where it has been cut off meanwhile, or no memory is left
 * for its page, the program gets a SIGBUS, which would be its end.
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

#include <stdbool.h>
#include <stddef.h>

/* Whether this thread may copy now: then the next copy does not refuse. */
bool bg_guard_ready(void);

/* Into memory that is there, from a mapped file. */
int bg_guard_load(void *to, const void *from, size_t length);

/*
 * Into a mapped file, past the processor's caches: what is in none of them is not read first, as an ordinary store would have
 * it, which takes twice as long, and a system call, whose stores are ordinary ones, three times. It is there when this returns.
 */
int bg_guard_store(void *to, const void *from, size_t length);

#endif
