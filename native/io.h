/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Whole transfers on file descriptors: what pread(2) and its like leave to their callers is done here once.
 *
 * Units:     bytes; offsets from the file's start.
 * Ownership: buffers and descriptors are borrowed for the call.
 * Errno:     a count or 0, else -errno of the system call; -EINVAL for a negative offset or length, or a sum past INT64_MAX.
 * Threads:   no state; any thread. The _now functions do not wait for a device but in the middle of a write, all others may.
 */
#ifndef BG_IO_H
#define BG_IO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* cffi:begin */
/*
 * Read until the buffer is full or the file ends; the rest of the buffer is then zeroed. Returns the bytes that came from
 * the file. Interrupted and short reads go on.
 */
int64_t bg_pread(int fd, void *buf, int64_t length, int64_t offset);

/* Write everything; returns `length`. */
int64_t bg_pwrite(int fd, const void *buf, int64_t length, int64_t offset);

/*
 * The same when it can be done at once from or to memory, else -EAGAIN, and the call must be made where it may block. A part
 * may have been read then, but none written: a write that has begun waits. At once: what the kernel grants under RWF_NOWAIT (cached reads on ext4, xfs, btrfs;
 * writes on xfs), and anything on tmpfs, which refuses RWF_NOWAIT and never waits for a device. Never
 * on descriptors with O_DIRECT or O_DSYNC, for which NOWAIT still waits for the device.
 */
int64_t bg_pread_now(int fd, void *buf, int64_t length, int64_t offset);
int64_t bg_pwrite_now(int fd, const void *buf, int64_t length, int64_t offset);

#define BG_ZERO_UNMAP 1
/*
 * Make a range read as zeroes. With BG_ZERO_UNMAP the space is given back where the file system can, and the file never
 * grows; without, it behaves as a write of zeroes would, by fallocate(2) where that works, by writing where not.
 */
int bg_pwrite_zeroes(int fd, int64_t length, int64_t offset, int flags);
/* cffi:end */

/* What the _now functions find out about a descriptor, for who uses it often. Its flags must not change meanwhile. */
enum bg_haste {
    BG_HASTE_NONE,   /* O_DSYNC, or no descriptor: -EAGAIN */
    BG_HASTE_DIRECT, /* O_DIRECT: likewise, but aio.h may do it */
    BG_HASTE_ASK,    /* the kernel, each time */
    BG_HASTE_ALL     /* a file on tmpfs */
};

/* Whether every transfer waits for a device. */
static inline bool bg_always_waits(int haste)
{
    return haste == BG_HASTE_NONE || haste == BG_HASTE_DIRECT;
}

/* Whether one does that can not be made now; of a write into the page cache nobody knows. */
static inline bool bg_waits(int haste, bool write)
{
    return bg_always_waits(haste) || (haste == BG_HASTE_ASK && !write);
}

enum bg_haste bg_haste_of(int fd);

/* As bg_pwrite, for who knows the descriptor: with O_DIRECT by direct.h. */
int64_t bg_pwrite_by(enum bg_haste haste, int fd, const void *buf, int64_t length, int64_t offset);

/*
 * As bg_pread and bg_pwrite_by, for descriptors that want memory at multiples of `alignment` (a power of two): through memory of
 * their own where `buf` is not. -ENOMEM: there is none.
 */
int64_t bg_pread_aligned(int alignment, int fd, void *buf, int64_t length, int64_t offset);
int64_t bg_pwrite_aligned(enum bg_haste haste, int alignment, int fd, const void *buf, int64_t length, int64_t offset);

/* The _now functions for who knows the descriptor. */
int64_t bg_pread_in(enum bg_haste haste, int fd, void *buf, int64_t length, int64_t offset);
int64_t bg_pwrite_in(enum bg_haste haste, int fd, const void *buf, int64_t length, int64_t offset);

#endif
