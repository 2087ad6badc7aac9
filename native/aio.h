/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Asynchronous I/O on descriptors with O_DIRECT, by io_submit(2): one thread keeps many requests at a device, and is woken once
 * for each, or for several, where with a pool a thread sleeps for each and both have to be woken. It goes without io_uring, which
 * is forbidden in most containers.
 *
 *     add, add, ... ─► submit ─► device ─► eventfd ─► reap ─► done, done, ...
 *
 * Nothing waits in submit: what the kernel can not begin at once (RWF_NOWAIT: room has to be found in the file, somebody has its
 * lock, the page cache has some of it) ends with -EAGAIN, and is to be done where it may wait. -EOPNOTSUPP: the file system can not.
 * -EINVAL: nor can the kernel.
 *
 * Units:     bytes.
 * Ownership: an operation and its memory are lent from add until its done is called.
 * Errno:     0, else -errno of a system call or -ENOMEM; -EAGAIN of bg_aio_new: the system has no more (fs.aio-max-nr).
 * Threads:   one.
 */
#ifndef BG_AIO_H
#define BG_AIO_H

#include <linux/aio_abi.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct bg_aio bg_aio;

typedef struct bg_aio_op bg_aio_op;
struct bg_aio_op {
    struct iocb block;
    void (*done)(bg_aio_op *op, int64_t result); /* a count, or -errno; may add others, not submit */
};

/* For up to `most` operations at once. */
int bg_aio_new(int most, bg_aio **out);

/* Nothing may be under way. */
void bg_aio_free(bg_aio *aio);

/* Readable when there may be something to reap. */
int bg_aio_eventfd(const bg_aio *aio);

/* Whether so many may be added. */
bool bg_aio_room(const bg_aio *aio, int operations);

/* The caller has set `done`. Offset, length and memory are as aligned as the descriptor asks. */
void bg_aio_add(bg_aio *aio, bg_aio_op *op, bool write, int fd, void *buf, int64_t length, int64_t offset);

/* Begin what was added. What is refused is done at once. */
void bg_aio_submit(bg_aio *aio);

/* Call done of what has ended. */
void bg_aio_reap(bg_aio *aio);

/* Wait until nothing is under way, reaping it. */
void bg_aio_drain(bg_aio *aio);

#endif
