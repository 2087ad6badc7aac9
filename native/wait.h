/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Waiting under a mutex until others have changed something, on a futex.
 *
 * Not a condition variable: that of glibc 2.25 to 2.40 can lose a wake-up when a waiter that has been woken is kept from
 * running for long (sourceware.org, bug 25847), and then an operation stays in a pool's list while all of its threads wait.
 *
 *     waiter   lock, look: no; note `changes`, unlock ──► sleep unless `changes` is another ──► lock, look again
 *     others              lock, change it, `changes`++, unlock ──► wake
 *
 * Ownership: part of what the mutex guards; all zeroes at first, nothing to end.
 * Errno:     none.
 * Threads:   any, with the mutex. Who was woken looks again: it may have been for nothing.
 */
#ifndef BG_WAIT_H
#define BG_WAIT_H

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef struct {
    _Atomic uint32_t changes;
    unsigned count; /* who waits, or has not come back yet */
} bg_waiters;

/* Give the lock up until a change; the lock is held again then. */
static inline void bg_wait(bg_waiters *w, pthread_mutex_t *lock)
{
    uint32_t seen = atomic_load(&w->changes);
    w->count++;
    pthread_mutex_unlock(lock);
    syscall(SYS_futex, &w->changes, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    pthread_mutex_lock(lock);
    w->count--;
}

/* After a change, with the lock: whether to call bg_wake, with the lock or without it. */
static inline bool bg_changed(bg_waiters *w)
{
    if (w->count)
        atomic_fetch_add(&w->changes, 1);
    return w->count > 0;
}

static inline void bg_wake(bg_waiters *w, int most)
{
    syscall(SYS_futex, &w->changes, FUTEX_WAKE_PRIVATE, most, NULL, NULL, 0);
}

/* After a change, with the lock. */
static inline void bg_wake_all(bg_waiters *w)
{
    if (bg_changed(w))
        bg_wake(w, INT_MAX);
}

#endif
