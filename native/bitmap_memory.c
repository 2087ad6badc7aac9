/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * The memory of the levels. It is mapped in pages of 4 KiB, so that a bitmap with few bits stays small whatever the system's
 * setting for huge pages; a window of level 0 about to be written densely gets a huge page, where there is one, in one fault.
 *
 * Some of the memory with such windows is kept when its bitmap goes, for the next dense one of that size, as every job makes
 * two: a huge page that was given back to a host, not only to the system, takes it milliseconds to provide again.
 */
#include "bitmap_internal.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#define GUARD 8 /* words before level 0, always 0: what finds edges looks at the bit before each */
/* Below this much memory zeroing it is cheaper than giving the pages back. */
#define DROP_PAGES_FROM (256u << 10)
#define KEPT_MAPS 4
#define KEPT_WINDOWS 4 /* in all of them */
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif

static struct {
    pthread_mutex_t lock;
    uint64_t windows;
    struct {
        void *map; /* NULL: none */
        size_t bytes;
        uint64_t windows;
    } maps[KEPT_MAPS];
} kept = {.lock = PTHREAD_MUTEX_INITIALIZER};

static uint64_t windows_of(const bg_levels *levels)
{
    return levels->nbits / WINDOW_BITS;
}

/* Old memory, in which there may be anything; NULL: there is none. Nobody waits for the lock: a child may be born with it. */
static void *take_kept(size_t bytes)
{
    void *map = NULL;
    if (pthread_mutex_trylock(&kept.lock) != 0)
        return NULL;
    for (int i = 0; i < KEPT_MAPS && !map; i++)
        if (kept.maps[i].map && kept.maps[i].bytes == bytes) {
            map = kept.maps[i].map;
            kept.maps[i].map = NULL;
            kept.windows -= kept.maps[i].windows;
        }
    pthread_mutex_unlock(&kept.lock);
    return map;
}

static bool keep(const bg_levels *levels)
{
    bool found = false;
    if (pthread_mutex_trylock(&kept.lock) != 0)
        return false;
    for (int i = 0; i < KEPT_MAPS && !found; i++)
        if (!kept.maps[i].map && kept.windows + windows_of(levels) <= KEPT_WINDOWS) {
            kept.maps[i].map = levels->map;
            kept.maps[i].bytes = levels->map_bytes;
            kept.maps[i].windows = windows_of(levels);
            kept.windows += kept.maps[i].windows;
            found = true;
        }
    pthread_mutex_unlock(&kept.lock);
    return found;
}

int levels_init(bg_levels *levels, uint64_t nbits, bool dense)
{
    *levels = (bg_levels){.nbits = nbits};
    uint64_t bits = nbits ? nbits : 1, total = GUARD;
    do {
        bits = (bits + 63) / 64;
        levels->words[levels->nlevels++] = bits;
        total += bits;
    } while (bits > 1 || levels->nlevels < 2);
    levels->map_bytes = total * sizeof(uint64_t);
    bool windows = windows_of(levels) > 0;
    if (windows)
        levels->map_bytes += WINDOW_BYTES;
    levels->map = windows && dense ? take_kept(levels->map_bytes) : NULL;
    levels->populated = levels->map != NULL;
    if (!levels->map)
        levels->map =
            mmap(NULL, levels->map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (levels->map == MAP_FAILED)
        return -errno;
    uint64_t *at = (uint64_t *)levels->map + GUARD;
    if (windows) {
        at = (uint64_t *)(((uintptr_t)at + WINDOW_BYTES - 1) & ~(uintptr_t)(WINDOW_BYTES - 1));
        if (!levels->populated)
            madvise(levels->map, levels->map_bytes, MADV_NOHUGEPAGE);
    }
    if (levels->populated)
        memset(at, 0, (total - GUARD) * sizeof(uint64_t)); /* nobody ever writes before level 0 */
    for (unsigned i = 0; i < levels->nlevels; i++) {
        levels->level[i] = at;
        at += levels->words[i];
    }
    return 0;
}

void levels_free(bg_levels *levels)
{
    if (!levels->populated || !keep(levels))
        munmap(levels->map, levels->map_bytes);
}

void levels_zero(bg_levels *levels)
{
    /* Dropping the pages zeroes them, and gives the memory back. */
    if (levels->map_bytes >= DROP_PAGES_FROM && madvise(levels->map, levels->map_bytes, MADV_DONTNEED) == 0) {
        levels->populated = false;
        return;
    }
    uint64_t *words = levels->map;
    for (size_t w = 0; w < levels->map_bytes / sizeof(*words); w++)
        word_store(&words[w], 0);
}

bool levels_window(const bg_levels *levels, uint64_t window)
{
    return (window + 1) * WINDOW_BITS <= levels->nbits;
}

bool levels_dense(const bg_levels *levels, uint64_t window, int finer)
{
    /* The summary's bits that tell of a page; those of the pages are asked for, not those of all words. */
    unsigned base = finer > 3 ? 1 : 2, page = (unsigned)(15 - finer - 6 * (int)base), used = 0;
    if (base >= levels->nlevels)
        return false;
    uint64_t first = window * WINDOW_PAGES << page, end = (window + 1) * WINDOW_PAGES << page;
    for (uint64_t at = levels_next(levels, base, first); at < end && used < WINDOW_PAGES / 2; used++)
        at = levels_next(levels, base, ((at >> page) + 1) << page);
    return used >= WINDOW_PAGES / 2;
}

void levels_populate(bg_levels *levels, uint64_t window)
{
    if (levels_dense(levels, window, 0))
        return;
    /* All of it is an optimisation: what is refused here is done, or refused, when the memory is written. */
    void *at = levels->level[0] + window * (WINDOW_BITS / 64);
    madvise(at, WINDOW_BYTES, MADV_HUGEPAGE);
    madvise(at, WINDOW_BYTES, MADV_POPULATE_WRITE);
    madvise(at, WINDOW_BYTES, MADV_NOHUGEPAGE);
    levels->populated = true;
}
