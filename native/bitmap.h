/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Hierarchical dirty bitmap: one bit per `granularity` bytes of a disk of `size` bytes.
 *
 *     level 2          1                       one word; bit i: word i of level 1 is not zero
 *     level 1     10 .. 01                     bit i: word i of level 0 is not zero
 *     level 0     0010..  0..  0..  ..1..      the bits; bit 0 of a byte is the lowest offset
 *
 * Finding the next dirty granule skips clean areas at O(levels); the number of set bits is kept. The levels live in
 * one anonymous mapping, so memory never touched costs nothing: a clean 64 TiB disk at 64 KiB (2^30 bits, 128 MiB)
 * takes a page or two.
 *
 * Units:     bytes of the disk for every offset, length and size, unless a name says bits. A granule is one bit's
 *            range; the last may reach past the disk's end, results are cut to it. Setting rounds out to granules,
 *            resetting never clears a granule covered in part.
 * Ownership: bg_bitmap_new and bg_bitmap_copy hand out a bitmap that bg_bitmap_free ends; buffers are borrowed.
 * Errno:     0 or a positive result, else -EINVAL (an argument is out of range), -ENOMEM, -EFBIG (more than
 *            BG_BITMAP_MAX_BITS). A failed call has changed nothing.
 * Threads:   every function but bg_bitmap_free may be called at any time from any thread: a mutex in the bitmap makes each
 *            one atomic. Two bitmaps are locked in the order of their addresses.
 *
 * Native workers that mark after each write mostly find the bits set: bg_bitmap_mark looks before it takes the mutex. So
 * level 0 is written atomically, and between a write and the look, as between clearing and the read of whoever takes a
 * dirty range, stands a full barrier: either the look sees the bit cleared, or the read sees the write.
 */
#ifndef BG_BITMAP_H
#define BG_BITMAP_H

#include <stddef.h>
#include <stdint.h>

/* cffi:begin */
#define BG_BITMAP_MIN_GRANULARITY 512
#define BG_BITMAP_MAX_GRANULARITY 2147483648
#define BG_BITMAP_MAX_BITS 274877906944
#define BG_BITMAP_NO_LIMIT 9223372036854775807
#define BG_BITMAP_EXTENTS_MIN 4096

typedef struct bg_bitmap bg_bitmap;

typedef struct {
    int64_t start; /* first byte */
    int64_t end;   /* first byte after it */
} bg_bitmap_extent;

/* A clean bitmap in *out. granularity: a power of two within the limits above; size >= 0. */
int bg_bitmap_new(int64_t size, int64_t granularity, bg_bitmap **out);
/* The same for one most of which will be marked soon: it gets memory that another one has left, if there is some. */
int bg_bitmap_new_dense(int64_t size, int64_t granularity, bg_bitmap **out);
void bg_bitmap_free(bg_bitmap *bitmap);
int bg_bitmap_copy(bg_bitmap *bitmap, bg_bitmap **out);

int64_t bg_bitmap_size(bg_bitmap *bitmap);
int64_t bg_bitmap_granularity(const bg_bitmap *bitmap);

/* Mark every granule that [offset, offset + length) touches. */
int bg_bitmap_set(bg_bitmap *bitmap, int64_t offset, int64_t length);

/*
 * The same for a range known to be inside the disk, cheap when it is marked already. Not while another thread resizes the
 * bitmap.
 */
void bg_bitmap_mark(bg_bitmap *bitmap, int64_t offset, int64_t length);

/* The same for several bitmaps: the barrier, most of the cost, is one. */
void bg_bitmap_mark_all(bg_bitmap *const *bitmaps, size_t count, int64_t offset, int64_t length);

/* Unmark. -EINVAL unless offset is a multiple of the granularity, and the end is too or is the disk's end. */
int bg_bitmap_reset(bg_bitmap *bitmap, int64_t offset, int64_t length);

/* 1 when the granule of `offset` (< size) is dirty, else 0. */
int bg_bitmap_get(bg_bitmap *bitmap, int64_t offset);

int bg_bitmap_fill(bg_bitmap *bitmap);
int bg_bitmap_clear(bg_bitmap *bitmap);

/* Dirty bytes: set bits times granularity, the last granule cut to the disk's end. */
int64_t bg_bitmap_count(bg_bitmap *bitmap);

/*
 * The first dirty (clean) run in [offset, end): returns 1 and *out, or 0 when there is none. The run is cut to the range
 * asked for and to max_length (>= 1). offset <= end <= size; end may also be BG_BITMAP_NO_LIMIT for the disk's end.
 */
int bg_bitmap_next_dirty(bg_bitmap *bitmap, int64_t offset, int64_t end, int64_t max_length, bg_bitmap_extent *out);
int bg_bitmap_next_clean(bg_bitmap *bitmap, int64_t offset, int64_t end, int64_t max_length, bg_bitmap_extent *out);

/*
 * Find the first dirty run in [offset, end), reset it and return it, as one step: of several callers each granule goes
 * to exactly one. offset and end follow the rule of bg_bitmap_reset; max_length is rounded down to granules, but is
 * at least one granule.
 */
int bg_bitmap_take(bg_bitmap *bitmap, int64_t offset, int64_t end, int64_t max_length, bg_bitmap_extent *out);

/*
 * Write dirty runs of [offset, end) to `out` in order, each maximal but cut to the range, and return their number. It
 * stops at the end, or early when `out` (room for `max` >= BG_BITMAP_EXTENTS_MIN runs) might not hold more; *next is where
 * to go on, and equals the end once all has been seen. A batch may be empty before that. One batch is one moment's view.
 */
int64_t bg_bitmap_extents(bg_bitmap *bitmap, int64_t offset, int64_t end, bg_bitmap_extent *out, size_t max, int64_t *next);

/*
 * The ways to do so that this processor can run: the name of each, best first, or NULL past the last. Number 0 is the one that
 * bg_bitmap_extents takes; the others are for tests and benchmarks. -EINVAL: there is no such number.
 */
const char *bg_bitmap_decoder(size_t number);
int64_t bg_bitmap_extents_by(size_t decoder, bg_bitmap *bitmap, int64_t offset, int64_t end, bg_bitmap_extent *out, size_t max,
                             int64_t *next);

/*
 * Set in `into` whatever is set in `from`; sizes must be equal (-EINVAL), granularities need not be: bits round out.
 */
int bg_bitmap_merge(bg_bitmap *into, bg_bitmap *from);

/* The ways to merge, and merging by one of them: as with bg_bitmap_decoder and bg_bitmap_extents_by. */
const char *bg_bitmap_merger(size_t number);
int bg_bitmap_merge_by(size_t merger, bg_bitmap *into, bg_bitmap *from);

/*
 * Clear in `into` whatever is set in `from`; sizes and granularities must be equal (-EINVAL).
 */
int bg_bitmap_subtract(bg_bitmap *into, bg_bitmap *from);

/*
 * The bits of [offset, offset + length) as bytes, bit 0 lowest: offset a multiple of 8 granules, length too
 * unless the range ends at the disk's end. bg_bitmap_serialised gives the number of bytes for such a range, or -EINVAL.
 * `bytes` must be exactly that number. Bits past the disk's end are written as 0 and ignored when read.
 */
int64_t bg_bitmap_serialised(bg_bitmap *bitmap, int64_t offset, int64_t length);
int bg_bitmap_serialise(bg_bitmap *bitmap, int64_t offset, int64_t length, void *buf, size_t bytes);
int bg_bitmap_deserialise(bg_bitmap *bitmap, int64_t offset, int64_t length, const void *buf, size_t bytes);

/*
 * Change the disk's size. Grown area is clean, except for the rest of a last granule that was dirty already; bits past a
 * smaller size are gone.
 */
int bg_bitmap_truncate(bg_bitmap *bitmap, int64_t size);
/* cffi:end */

#endif
