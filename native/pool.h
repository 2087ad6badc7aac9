/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Worker threads, buffers for them, and nothing more: a pool runs tasks in the order they were submitted, several at a time. How
 * many of one lane run at once is bounded, and the others pass those that wait for that:
 *
 *     BUSY    never wait for a device           as many as there are processors
 *     PLAIN   may wait for one, or not          the pool's threads
 *     WAITS   do little else                    up to `most`: more threads are started when they are needed
 *
 * What a task is and where its result goes is the submitter's: queue.h hands results to an event loop, copy.h runs copying jobs,
 * and a native request loop can embed a bg_task in its request and answer from the worker itself.
 *
 * Units:     -
 * Ownership: a task belongs to its submitter; the pool does not touch it after run() has begun.
 * Errno:     0, else -EINVAL, -ENOMEM, -EAGAIN (no thread could be started).
 * Threads:   any thread may submit, also from within run(). A pool does not survive fork() in the child.
 */
#ifndef BG_POOL_H
#define BG_POOL_H

#include "buffers.h"

#include <stdbool.h>
#include <stdint.h>

/* cffi:begin */
#define BG_POOL_MAX_THREADS 1024

typedef struct bg_pool bg_pool;

/* A pool of `threads`, 1 to BG_POOL_MAX_THREADS, and of up to `most` (>= threads) while tasks need them. They take no signals. */
int bg_pool_new(int threads, int most, bg_pool **out);

/* Run everything submitted so far, then end the threads. Must not be called from a task. */
void bg_pool_free(bg_pool *pool);

/* How many there are for tasks that may or may not wait, and at most for those that do. */
int bg_pool_threads(const bg_pool *pool);
int bg_pool_most(const bg_pool *pool);
/* cffi:end */

enum bg_lane { BG_LANE_PLAIN, BG_LANE_BUSY, BG_LANE_WAITS, BG_LANES };

typedef struct bg_task {
    struct bg_task *next;
    void (*run)(struct bg_task *task);
    uint8_t lane;
} bg_task;

/* Never fails and never blocks for longer than the queue's mutex. */
void bg_pool_submit(bg_pool *pool, bg_task *task);

/* Several, linked by next: cheaper than one by one. */
void bg_pool_submit_all(bg_pool *pool, bg_task *first);

/* Whether a task of the BUSY lane can run beside the thread that submits it. */
bool bg_pool_has_processors(const bg_pool *pool);

/* For what tasks read into and write from. */
bg_buffers *bg_pool_buffers(bg_pool *pool);

/* Whether tasks wait for a thread: a long task should then step back and submit itself again. */
bool bg_pool_waiting(bg_pool *pool);

#endif
