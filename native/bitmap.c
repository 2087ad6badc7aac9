/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* The bitmap as a whole: life, marking, counting, merging, resizing. */
#include "bitmap_blocks.h"
#include "bitmap_internal.h"

#include <errno.h>
#include <stdlib.h>

static int make(int64_t size, int64_t granularity, bool dense, bg_bitmap **out)
{
    if (size < 0 || granularity < BG_BITMAP_MIN_GRANULARITY || granularity > BG_BITMAP_MAX_GRANULARITY ||
        (granularity & (granularity - 1)))
        return -EINVAL;
    bg_bitmap *b = calloc(1, sizeof(*b));
    if (!b)
        return -ENOMEM;
    b->size = (uint64_t)size;
    b->shift = (unsigned)__builtin_ctzll((uint64_t)granularity);
    uint64_t nbits = granules(b, b->size);
    int ret = nbits > BG_BITMAP_MAX_BITS ? -EFBIG : levels_init(&b->levels, nbits, dense);
    if (ret < 0) {
        free(b);
        return ret;
    }
    pthread_mutex_init(&b->lock, NULL);
    *out = b;
    return 0;
}

int bg_bitmap_new(int64_t size, int64_t granularity, bg_bitmap **out)
{
    return make(size, granularity, false, out);
}

int bg_bitmap_new_dense(int64_t size, int64_t granularity, bg_bitmap **out)
{
    return make(size, granularity, true, out);
}

void bg_bitmap_free(bg_bitmap *b)
{
    if (!b)
        return;
    levels_free(&b->levels);
    pthread_mutex_destroy(&b->lock);
    free(b);
}

/* Visit the non-zero words of level 0 in order: the first at or after word `from`, or words[0]. */
static uint64_t next_word(const bg_levels *levels, uint64_t from)
{
    uint64_t bit = levels_next_set(levels, from * 64);
    return bit == levels->nbits ? levels->words[0] : bit / 64;
}

static void and_not_words(bg_levels *into, const bg_levels *from)
{
    for (uint64_t w = next_word(from, 0); w < from->words[0]; w = next_word(from, w + 1)) {
        uint64_t old = into->level[0][w], now = old & ~from->level[0][w];
        if (now != old) {
            word_store(&into->level[0][w], now);
            levels_word_changed(into, w, old);
        }
    }
}

int bg_bitmap_copy(bg_bitmap *b, bg_bitmap **out)
{
    bg_bitmap *copy;
    pthread_mutex_lock(&b->lock);
    int ret = make((int64_t)b->size, (int64_t)1 << b->shift, b->levels.populated, &copy);
    if (ret == 0) {
        levels_or(&copy->levels, &b->levels, 0, 0);
        *out = copy;
    }
    pthread_mutex_unlock(&b->lock);
    return ret;
}

int64_t bg_bitmap_size(bg_bitmap *b)
{
    pthread_mutex_lock(&b->lock);
    int64_t size = (int64_t)b->size;
    pthread_mutex_unlock(&b->lock);
    return size;
}

int64_t bg_bitmap_granularity(const bg_bitmap *b)
{
    return (int64_t)1 << b->shift;
}

int bg_bitmap_set(bg_bitmap *b, int64_t offset, int64_t length)
{
    int ret = -EINVAL;
    pthread_mutex_lock(&b->lock);
    if (range_ok(b, offset, length)) {
        ret = 0;
        if (length)
            levels_set(&b->levels, (uint64_t)offset >> b->shift, (uint64_t)(offset + length - 1) >> b->shift);
    }
    pthread_mutex_unlock(&b->lock);
    return ret;
}

static bool is_marked(const bg_bitmap *b, uint64_t first, uint64_t last)
{
    const uint64_t *words = b->levels.level[0];
    for (uint64_t w = first / 64; w <= last / 64; w++) {
        uint64_t mask = ~(uint64_t)0;
        if (w == first / 64)
            mask &= ~(uint64_t)0 << (first & 63);
        if (w == last / 64)
            mask &= ~(uint64_t)0 >> (63 - (last & 63));
        if (mask & ~__atomic_load_n(&words[w], __ATOMIC_RELAXED))
            return false;
    }
    return true;
}

void bg_bitmap_mark(bg_bitmap *b, int64_t offset, int64_t length)
{
    bg_bitmap_mark_all(&b, 1, offset, length);
}

void bg_bitmap_mark_all(bg_bitmap *const *bitmaps, size_t count, int64_t offset, int64_t length)
{
    if (length <= 0)
        return;
    __sync_synchronize(); /* see the header */
    for (size_t i = 0; i < count; i++) {
        bg_bitmap *b = bitmaps[i];
        if (!is_marked(b, (uint64_t)offset >> b->shift, (uint64_t)(offset + length - 1) >> b->shift))
            bg_bitmap_set(b, offset, length);
    }
}

int bg_bitmap_reset(bg_bitmap *b, int64_t offset, int64_t length)
{
    int ret = -EINVAL;
    pthread_mutex_lock(&b->lock);
    if (range_ok(b, offset, length) && is_granule(b, offset) &&
        (is_granule(b, offset + length) || (uint64_t)(offset + length) == b->size)) {
        ret = 0;
        if (length)
            levels_clear(&b->levels, (uint64_t)offset >> b->shift, (uint64_t)(offset + length - 1) >> b->shift);
    }
    pthread_mutex_unlock(&b->lock);
    return ret;
}

int bg_bitmap_get(bg_bitmap *b, int64_t offset)
{
    int ret = -EINVAL;
    pthread_mutex_lock(&b->lock);
    if (offset >= 0 && (uint64_t)offset < b->size) {
        uint64_t bit = (uint64_t)offset >> b->shift;
        ret = (int)(b->levels.level[0][bit / 64] >> (bit & 63) & 1);
    }
    pthread_mutex_unlock(&b->lock);
    return ret;
}

int bg_bitmap_fill(bg_bitmap *b)
{
    pthread_mutex_lock(&b->lock);
    levels_fill(&b->levels);
    pthread_mutex_unlock(&b->lock);
    return 0;
}

int bg_bitmap_clear(bg_bitmap *b)
{
    pthread_mutex_lock(&b->lock);
    levels_clear_all(&b->levels);
    pthread_mutex_unlock(&b->lock);
    return 0;
}

int64_t bg_bitmap_count(bg_bitmap *b)
{
    pthread_mutex_lock(&b->lock);
    const bg_levels *levels = &b->levels;
    uint64_t full = levels->set, cut = 0;
    if (full) {
        uint64_t last = levels->nbits - 1;
        if (levels->level[0][last / 64] >> (last & 63) & 1) {
            full--;
            cut = b->size - (last << b->shift);
        }
    }
    pthread_mutex_unlock(&b->lock);
    return (int64_t)((full << b->shift) + cut);
}

static void lock_both(bg_bitmap *a, bg_bitmap *b)
{
    pthread_mutex_lock(a < b ? &a->lock : &b->lock);
    pthread_mutex_lock(a < b ? &b->lock : &a->lock);
}

static void unlock_both(bg_bitmap *a, bg_bitmap *b)
{
    pthread_mutex_unlock(&a->lock);
    pthread_mutex_unlock(&b->lock);
}

const char *bg_bitmap_merger(size_t number)
{
    const block_maker *by[BLOCK_MAKERS];
    return number < block_makers(by) ? by[number]->name : NULL;
}

int bg_bitmap_merge_by(size_t merger, bg_bitmap *into, bg_bitmap *from)
{
    if (!bg_bitmap_merger(merger))
        return -EINVAL;
    if (into == from)
        return 0;
    lock_both(into, from);
    int ret = into->size == from->size ? 0 : -EINVAL;
    if (ret == 0)
        levels_or(&into->levels, &from->levels, (int)from->shift - (int)into->shift, merger);
    unlock_both(into, from);
    return ret;
}

int bg_bitmap_merge(bg_bitmap *into, bg_bitmap *from)
{
    return bg_bitmap_merge_by(0, into, from);
}

int bg_bitmap_subtract(bg_bitmap *into, bg_bitmap *from)
{
    if (into == from)
        return bg_bitmap_clear(into);
    lock_both(into, from);
    int ret = into->size == from->size && into->shift == from->shift ? 0 : -EINVAL;
    if (ret == 0) {
        and_not_words(&into->levels, &from->levels);
        cleared();
    }
    unlock_both(into, from);
    return ret;
}

int bg_bitmap_truncate(bg_bitmap *b, int64_t size)
{
    if (size < 0)
        return -EINVAL;
    pthread_mutex_lock(&b->lock);
    uint64_t nbits = granules(b, (uint64_t)size);
    int ret = 0;
    if (nbits != b->levels.nbits) {
        bg_levels levels;
        ret = nbits > BG_BITMAP_MAX_BITS ? -EFBIG : levels_init(&levels, nbits, b->levels.populated);
        if (ret == 0) {
            if (nbits < b->levels.nbits)
                levels_clear(&b->levels, nbits, b->levels.nbits - 1);
            levels_or(&levels, &b->levels, 0, 0);
            levels_free(&b->levels);
            b->levels = levels;
        }
    }
    if (ret == 0)
        b->size = (uint64_t)size;
    pthread_mutex_unlock(&b->lock);
    return ret;
}
