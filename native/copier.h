/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Copy before write: who copies which cluster, and the copies that guest writes need, made on the thread of the write.
 *
 *     guest write, COPY ──► the map's bg_copier_links ─┐
 *                                                      ├──► bg_copier: todo, done, claims ──► source map ──► target map
 *     Python: loop of a job, slow guest writes ────────┘
 *
 * `todo` has a bit for every cluster still to be copied, `done` for every one that the guest may overwrite. Whoever copies
 * takes a *claim*: its bits in todo are cleared in the same step, and set again when the copy fails. Who finds
 * a claim of a native write waits for it; one of Python's makes a native write a miss, because only Python can say when it ends.
 * A *frozen* range is being read at the source for somebody who wants the old bytes: none of its clusters becomes done
 * in a native write.
 *
 * Units:     bytes; a cluster is the bitmaps' granularity, the last may end at the disk's end.
 * Ownership: bitmaps and maps are borrowed and must outlive the copier, the copier its links. A link must outlive its use
 *            in a map (see bg_map_set_copier).
 * Errno:     0, a count or a number; else -EINVAL (range or alignment), -ENOMEM, -EBUSY, -ENOENT.
 * Threads:   all functions but those that free, from any thread. Only copies wait, for I/O and for other native copies, unless
 *            a guest write is to be done now: then short ones are tried as bg_map_pread_now and _pwrite_now do it, cluster by
 *            cluster, and after one that was refused some are not tried at all.
 */
#ifndef BG_COPIER_H
#define BG_COPIER_H

#include "bitmap.h"
#include "extent_map.h"
#include "queue.h"
#include "sums.h"

#include <stdint.h>

/* cffi:begin */
typedef struct bg_copier bg_copier;
typedef struct bg_copier_link bg_copier_link;

typedef struct {
    int64_t copied; /* bytes of clusters done for native writes */
    int64_t moved;  /* of these, read and written; the rest were zeroes that the target had already */
    int64_t refused; /* native writes that were left to Python */
} bg_copier_stats;

enum bg_copier_mode {
    BG_COPIER_OFF, /* native writes that need a copy are misses */
    BG_COPIER_ON,
    BG_COPIER_BROKEN /* nobody needs the old bytes any more: writes go on without a copy */
};

/* The bitmaps are of one size and granularity, which the maps' disks have too (-EINVAL). Begins OFF. */
int bg_copier_new(bg_bitmap *todo, bg_bitmap *done, bg_map *source, bg_map *target, bg_copier **out);

/* -EBUSY while there are claims or frozen ranges. */
int bg_copier_free(bg_copier *copier);

void bg_copier_set_mode(bg_copier *copier, int mode);

/*
 * Native copies that begin from now on add what they write to `sums`, which must outlive the copier; what fails is spoiled there.
 * -EINVAL: of another size.
 */
int bg_copier_set_sums(bg_copier *copier, bg_sums *sums);

/*
 * For maps in which the copier's byte 0 is at `shift`. `next`, if there is one, is asked as well, and must outlive this link. A
 * chain in use is not changed but replaced (bg_map_set_copier); when that adds a copier to others, no extent has COPY because of
 * it before the ticket has settled: writes under way ask the others only, and take COPY away.
 */
int bg_copier_link_new(bg_copier *copier, int64_t shift, const bg_copier_link *next, bg_copier_link **out);
void bg_copier_link_free(bg_copier_link *link);
bg_map_copier *bg_copier_link_hook(bg_copier_link *link);

/*
 * Claim the first run of todo in [offset, end), as bg_bitmap_take. Returns its number (> 0) and the run in *out, or 0: there is
 * none.
 */
int64_t bg_copier_take(bg_copier *copier, int64_t offset, int64_t end, int64_t max_length, bg_bitmap_extent *out);

/* End a claim of bg_copier_take. Not `copied`: its bits are set again. */
int bg_copier_finish(bg_copier *copier, int64_t number, int copied);

/* 1 when some of [offset, end) is not copied yet, or is being copied. */
int bg_copier_pending(bg_copier *copier, int64_t offset, int64_t end);

/*
 * Copy what is still to be copied of [offset, end), as a native write would (whole clusters; end may be the disk's end), run by run.
 * 0 when all of it is copied, BG_MAP_MISS when some of it is Python's. `copied` and `moved` of *out are what this call did, which
 * is not among the copier's.
 */
int bg_copier_copy(bg_copier *copier, int64_t offset, int64_t end, bg_copier_stats *out);

/* A run of todo: [start, end), whole clusters. */
typedef struct {
    int64_t start, end;
    int32_t unmapped; /* a map does not know where it is: BG_COPIER_SOURCE, BG_COPIER_TARGET */
    int32_t missed;   /* some of it is still to be copied: Python's, or it failed */
    int32_t released; /* the guest may overwrite all of it */
} bg_copier_run;

#define BG_COPIER_SOURCE 1
#define BG_COPIER_TARGET 2

/*
 * The first runs of todo from `offset` on, up to `max` and `bytes` (>= a cluster, the last is cut) in all, stopping before one
 * of `longest` or more. Returns how many.
 */
int64_t bg_copier_find_runs(bg_copier *copier, int64_t offset, int64_t longest, int64_t bytes, bg_copier_run *out, int64_t max);

/* Set `unmapped` of all runs, and return what there is in any: no side, one, or both. */
int64_t bg_copier_check_runs(bg_copier *copier, bg_copier_run *runs, int64_t count);

/*
 * On threads of the queue's pool, copy what is still to be copied of each run (one or more), and let the guest overwrite what is
 * copied, except where a range is frozen. What others are copying is left to them, and what waits for a thread passes between
 * two runs. Sets `missed` and `released`; the result, how many runs have `missed`, arrives in the queue. *out as for
 * bg_copier_copy. Runs and *out are borrowed until then.
 */
int bg_copier_start_runs(bg_copier *copier, bg_copier_run *runs, int64_t count, bg_copier_stats *out, bg_queue *queue,
                         int64_t ticket);

/* A claim that touches [offset, end): its number, -1: a native write's, 0: none. */
int64_t bg_copier_claimed(bg_copier *copier, int64_t offset, int64_t end);

/*
 * For event loops: 1 when a native write has a claim that touches [offset, end), and the eventfd becomes readable when some
 * native claim has ended, 0 when there is none. bg_copier_acknowledge makes it unreadable.
 */
int bg_copier_watch(bg_copier *copier, int64_t offset, int64_t end);
int bg_copier_eventfd(const bg_copier *copier);
void bg_copier_acknowledge(bg_copier *copier);

/*
 * Freeze [offset, offset + length), any alignment, for a read of old bytes: returns a number (> 0) for bg_copier_thaw, or 0: the
 * guest may have overwritten some of it.
 */
int64_t bg_copier_freeze(bg_copier *copier, int64_t offset, int64_t length);
int bg_copier_thaw(bg_copier *copier, int64_t number);

/*
 * Mark clusters that are copied as done, except where a range is frozen (whole clusters; end may be the disk's end). Returns
 * 1 when all of them are done now, else 0.
 */
int bg_copier_release(bg_copier *copier, int64_t offset, int64_t end);

void bg_copier_get_stats(bg_copier *copier, bg_copier_stats *out);
/* cffi:end */

#endif
