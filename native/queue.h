/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * A completion queue: operations run on a pool, their results wait here, and one eventfd tells an event loop that there are
 * some. Many results are collected at one wake-up.
 *
 * Units:     bytes; offsets from the file's start.
 * Ownership: descriptors and buffers are borrowed from submit until the ticket has been reaped. The pool must outlive the
 *            queue.
 * Errno:     0 or a count, else -EINVAL, -ENOMEM, or -errno of a system call.
 * Threads:   submit and reap may be called from any thread. Operations have no order among each other: who needs one waits
 *            for the first before submitting the second.
 */
#ifndef BG_QUEUE_H
#define BG_QUEUE_H

#include "pool.h"

#include <stddef.h>
#include <stdint.h>

/* cffi:begin */
typedef struct bg_queue bg_queue;

enum bg_op {
    BG_OP_PREAD,     /* as bg_pread */
    BG_OP_PWRITE,    /* as bg_pwrite */
    BG_OP_FDATASYNC, /* the rest is ignored */
    BG_OP_FALLOCATE, /* `mode` as in fallocate(2); buf is ignored */
    BG_OP_ZERO       /* as bg_pwrite_zeroes, `mode` its flags; buf is ignored */
};

typedef struct {
    int64_t ticket; /* as given to submit */
    int64_t result; /* bytes, 0, or -errno */
} bg_completion;

int bg_queue_new(bg_pool *pool, bg_queue **out);

/* Waits for what is under way; results that were not reaped are forgotten. */
void bg_queue_free(bg_queue *queue);

/* Readable as long as there are results. Belongs to the queue. */
int bg_queue_eventfd(const bg_queue *queue);

int bg_queue_submit(bg_queue *queue, int64_t ticket, int op, int fd, void *buf, int64_t length, int64_t offset, int mode);

/* Take up to `max` results without waiting; returns how many. */
int64_t bg_queue_reap(bg_queue *queue, bg_completion *out, int64_t max);
/* cffi:end */

/* For work that is not one operation: reserve an entry first, complete it once, from any thread. */
typedef struct bg_entry bg_entry;
bg_entry *bg_queue_reserve(bg_queue *queue, int64_t ticket);
void bg_queue_complete(bg_entry *entry, int64_t result);
bg_pool *bg_queue_pool(const bg_queue *queue);

#endif
