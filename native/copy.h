/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * The extent copier: a job copies a list of extents between descriptors on a pool's threads.
 *
 * Extents are cut into chunks, handed out in order and copied by up to `threads` tasks at once; the order in which chunks
 * complete is open, so extents of one job must not overlap in their targets, nor a source with a target. A task that
 * finds others waiting for a thread steps back after each chunk, so a copying job delays a request by a chunk at most.
 * What goes to a device through the page cache is sent on its way while the copying goes on: the flush at the end is short.
 *
 * Units:     bytes; offsets from the file's start.
 * Ownership: extents are copied by bg_copy_new; descriptors and the progress struct are borrowed until the job has ended;
 *            bg_copy_free after that. Data passes through page-aligned buffers of the pool, so O_DIRECT works when extents are
 *            aligned.
 * Errno:     0, else -EINVAL, -ENOMEM; the job's own result is 0, -ECANCELED, or the -errno of its first failure.
 * Threads:   start or run a job once, from any thread. Progress may be read and cancelled at any time from any thread; a
 *            failure and the bytes of an extent are read after the end.
 *
 * copy_file_range or read and write? Measured by benchmarks/bench_native.py's method (Linux 6.18, 2 CPUs, 2 GiB dense on
 * tmpfs, 1 GiB on ext4, source in the page cache, new target, best of 3 turns, GB/s):
 *
 *              dd bs=1M   read+write, tasks: 1    2    3     copy_file_range, tasks: 1    2    3
 *     tmpfs       1.7                      2.9  3.4  3.2                           2.7  2.6  2.8
 *     ext4        5.5                      5.5  5.7  5.9                           4.6  4.8  4.5
 *
 * Without shared blocks the kernel copies page by page, and read and write through a buffer that stays in a core's cache
 * is faster by a fifth; from 64 KiB to 1 MiB the buffer's size made no difference beyond the noise. So BG_COPY_RANGE is worth
 * asking for where a server copies (NFS 4.2). BG_COPY_CLONE costs one refused system call a job where blocks can not be
 * shared, and never copies.
 */
#ifndef BG_COPY_H
#define BG_COPY_H

#include "queue.h"
#include "sums.h"

#include <stddef.h>
#include <stdint.h>

/* cffi:begin */
#define BG_COPY_RANGE 1         /* try copy_file_range; read and write when it is refused. Not with DETECT_ZEROES */
#define BG_COPY_CLONE 32        /* try to share blocks (FICLONERANGE); whole blocks of 4096. Not with DETECT_ZEROES */
#define BG_COPY_DETECT_ZEROES 2 /* whole blocks of 4096 zero bytes (counted from a chunk's start) are not copied but: */
#define BG_COPY_PUNCH_HOLES 4   /* what is zero is punched out of the target, which never grows by that */
#define BG_COPY_SKIP_ZEROES 8   /* what is zero is left alone: the target is known to be zero there */
#define BG_COPY_ZERO 16         /* no source: the range becomes zero, by the two flags above or as a write would */
#define BG_COPY_SUM 64          /* what was copied is added to the job's sums, at `sum_offset`. Not with RANGE, CLONE or ZERO */
#define BG_COPY_READ_ONLY 128   /* with SUM: no target, the source is only read */
/* Without PUNCH_HOLES and SKIP_ZEROES zeroes are made by fallocate's zero range, or written. */

/* The file system of a descriptor, as statfs(2) names it, or -errno. */
int64_t bg_copy_file_system(int fd);

#define BG_COPY_READ 0
#define BG_COPY_WRITE 1

/* What lies past the source's end counts as zero. */
typedef struct {
    int32_t source_fd; /* ignored with BG_COPY_ZERO, as source_offset is */
    int64_t source_offset;
    int32_t target_fd;
    int64_t target_offset;
    int64_t length;
    uint32_t flags;
    int64_t sum_offset; /* of the extent in the sums' disk */
} bg_copy_extent;

typedef struct {
    int64_t bytes;  /* done, zeroes included */
    int64_t zeroes; /* found zero: punched, skipped, or made zero */
    int64_t shared; /* blocks that source and target now share */
    int32_t cancel; /* not 0: no further chunk is begun */
} bg_copy_progress;

typedef struct {
    int32_t error;  /* errno, 0: none */
    int32_t side;   /* BG_COPY_READ or BG_COPY_WRITE */
    int64_t extent; /* index */
    int64_t offset; /* in the extent: start of the transfer that failed */
} bg_copy_failure;

typedef struct bg_copy bg_copy;

/* threads: most tasks at once, >= 1. */
int bg_copy_new(const bg_copy_extent *extents, int64_t count, int threads, bg_copy_progress *progress, bg_copy **out);
void bg_copy_free(bg_copy *job);

/* Before the start, where an extent has BG_COPY_SUM: borrowed until the end. A job that fails has added some of its bytes. */
void bg_copy_set_sums(bg_copy *job, bg_sums *sums);

/* Begin; the result arrives in the queue under `ticket`. */
int bg_copy_start(bg_copy *job, bg_queue *queue, int64_t ticket);

/* Copy and wait for the end. Must not be called from a task of the pool. */
int bg_copy_run(bg_copy *job, bg_pool *pool);

/* After the end: the first failure, and the bytes completed of extent `index` (-EINVAL past the last). */
void bg_copy_failed(const bg_copy *job, bg_copy_failure *out);
int64_t bg_copy_extent_bytes(const bg_copy *job, int64_t index);

int64_t bg_copy_bytes(const bg_copy_progress *progress);
int64_t bg_copy_zeroes(const bg_copy_progress *progress);
void bg_copy_cancel(bg_copy_progress *progress);
/* cffi:end */

#endif
