/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * What the bitmap_*.c files share. Units here are bits, never bytes, unless a name says so. No function takes the mutex:
 * the callers hold it. Arguments have been checked.
 */
#ifndef BG_BITMAP_INTERNAL_H
#define BG_BITMAP_INTERNAL_H

#include "bitmap.h"

#include <pthread.h>
#include <stdbool.h>

#define LEVELS_MAX 7 /* 64^7 bits > BG_BITMAP_MAX_BITS */
#define PAGE_BYTES 4096
#define WINDOW_PAGES 512 /* in a huge page, whose memory is a window of level 0 */
#define WINDOW_BYTES ((uint64_t)WINDOW_PAGES * PAGE_BYTES)
#define WINDOW_BITS (WINDOW_BYTES * 8)

typedef struct {
    uint64_t nbits;
    uint64_t set; /* bits set on level 0 */
    unsigned nlevels; /* at least 2, the last of one word */
    uint64_t words[LEVELS_MAX];  /* words of each level */
    uint64_t *level[LEVELS_MAX]; /* into `map`; bits past the end of a level are always 0. Level 0: see word_store;
                                    * on a line of the cache, where it has a window or more on a huge page's boundary, and the
                                    * word before it is readable and 0 */
    void *map;
    size_t map_bytes;
    bool populated; /* a window of it was, or may have been */
} bg_levels;

struct bg_bitmap {
    pthread_mutex_t lock;
    uint64_t size; /* bytes */
    unsigned shift; /* log2 of the granularity */
    bg_levels levels;
};

/* dense: most of its memory will be written. */
int levels_init(bg_levels *levels, uint64_t nbits, bool dense);
void levels_free(bg_levels *levels);
/* Make all memory 0. */
void levels_zero(bg_levels *levels);
/*
 * Whether the set bits are so many that a bitmap with a bit for every 2^-finer of these would use half of the pages in that
 * window or more. finer <= 6.
 */
bool levels_dense(const bg_levels *levels, uint64_t window, int finer);
/* Whether there is such a window, and not cut off. */
bool levels_window(const bg_levels *levels, uint64_t window);
/* Much of a window of level 0 will be written next: have its memory there at once. */
void levels_populate(bg_levels *levels, uint64_t window);
/* Set or clear bits first..last, both included. */
void levels_set(bg_levels *levels, uint64_t first, uint64_t last);
void levels_clear(bg_levels *levels, uint64_t first, uint64_t last);
void levels_fill(bg_levels *levels);
/*
 * Set whatever is set in `from`, whose bits stand for 2^finer bits each (finer < 0: 2^-finer of its bits stand for one). It
 * covers no more of the disk. `maker`: see bitmap_blocks.h.
 */
void levels_or(bg_levels *into, const bg_levels *from, int finer, size_t maker);
/* Bits as bytes, 512, for those of a word of level 1, all 64 words of which exist and have all bits. */
void levels_load(bg_levels *levels, uint64_t block, const void *bytes);
void levels_clear_all(bg_levels *levels);
/* The first set bit >= from of a level, or how many it has. */
uint64_t levels_next(const bg_levels *levels, unsigned level, uint64_t from);
/* The first set (clear) bit >= from, or nbits. Clear bits are looked for below `limit` only. */
static inline uint64_t levels_next_set(const bg_levels *levels, uint64_t from)
{
    return levels_next(levels, 0, from);
}
uint64_t levels_next_clear(const bg_levels *levels, uint64_t from, uint64_t limit);
/* A word of level 0 was written directly and was `old` before: bring the count and the summaries in line. */
void levels_word_changed(bg_levels *levels, uint64_t word, uint64_t old);
/* Word `bit` of the level below `level` is not zero any more: bring the summaries from `level` on in line. */
void levels_summary_set(bg_levels *levels, unsigned level, uint64_t bit);
/* From `level` on, drop the summary bits of words first..last of the level below, as far as those are zero. Only the outer
 * words may have bits. */
void levels_summary_clear(bg_levels *levels, unsigned level, uint64_t first, uint64_t last);

/* bg_bitmap_mark reads words of level 0 without the mutex. Readers that hold it need nothing special. */
static inline void word_store(uint64_t *word, uint64_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
}

/* Bits were cleared: they are seen as such before anything that the caller reads next. */
static inline void cleared(void)
{
    __sync_synchronize();
}

/* Bits in bytes: how many granules `bytes` takes, rounded out. */
static inline uint64_t granules(const bg_bitmap *b, uint64_t bytes)
{
    return (bytes >> b->shift) + ((bytes & (((uint64_t)1 << b->shift) - 1)) != 0);
}

static inline bool is_granule(const bg_bitmap *b, int64_t bytes)
{
    return ((uint64_t)bytes & (((uint64_t)1 << b->shift) - 1)) == 0;
}

static inline bool range_ok(const bg_bitmap *b, int64_t offset, int64_t length)
{
    return offset >= 0 && length >= 0 && (uint64_t)offset <= b->size && (uint64_t)length <= b->size - (uint64_t)offset;
}

/* Resolve BG_BITMAP_NO_LIMIT and check offset <= end <= size. */
static inline bool end_ok(const bg_bitmap *b, int64_t offset, int64_t *end)
{
    if (*end == BG_BITMAP_NO_LIMIT)
        *end = (int64_t)b->size;
    return offset >= 0 && offset <= *end && (uint64_t)*end <= b->size;
}

#endif
