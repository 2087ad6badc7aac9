/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* Finding runs. */
#include "bitmap_internal.h"

#include <errno.h>

static inline int64_t min64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* The byte where granule `bit` starts, not past `end`. */
static inline int64_t byte_of(const bg_bitmap *b, uint64_t bit, int64_t end)
{
    return bit > (uint64_t)end >> b->shift ? end : min64((int64_t)(bit << b->shift), end);
}

/* The first bit after those that [.., offset + max_length) touches, so that a search may stop there. */
static inline uint64_t search_limit(const bg_bitmap *b, int64_t offset, int64_t end, int64_t max_length)
{
    return granules(b, (uint64_t)(max_length < end - offset ? offset + max_length : end));
}

static int find_dirty(const bg_bitmap *b, int64_t offset, int64_t end, int64_t max_length, bg_bitmap_extent *out)
{
    if (offset == end)
        return 0;
    uint64_t first = levels_next_set(&b->levels, (uint64_t)offset >> b->shift);
    int64_t start = byte_of(b, first, end);
    if (first == b->levels.nbits || start == end)
        return 0;
    if (start < offset)
        start = offset;
    uint64_t after = levels_next_clear(&b->levels, first, search_limit(b, start, end, max_length));
    int64_t stop = byte_of(b, after, end);
    *out = (bg_bitmap_extent){start, stop - start > max_length ? start + max_length : stop};
    return 1;
}

int bg_bitmap_next_dirty(bg_bitmap *b, int64_t offset, int64_t end, int64_t max_length, bg_bitmap_extent *out)
{
    int ret = -EINVAL;
    pthread_mutex_lock(&b->lock);
    if (end_ok(b, offset, &end) && max_length > 0)
        ret = find_dirty(b, offset, end, max_length, out);
    pthread_mutex_unlock(&b->lock);
    return ret;
}

static int find_clean(const bg_bitmap *b, int64_t offset, int64_t end, int64_t max_length, bg_bitmap_extent *out)
{
    if (offset == end)
        return 0;
    uint64_t first = levels_next_clear(&b->levels, (uint64_t)offset >> b->shift, granules(b, (uint64_t)end));
    int64_t start = byte_of(b, first, end);
    if (start == end)
        return 0;
    if (start < offset)
        start = offset;
    int64_t stop = byte_of(b, levels_next_set(&b->levels, first), end);
    *out = (bg_bitmap_extent){start, stop - start > max_length ? start + max_length : stop};
    return 1;
}

int bg_bitmap_next_clean(bg_bitmap *b, int64_t offset, int64_t end, int64_t max_length, bg_bitmap_extent *out)
{
    int ret = -EINVAL;
    pthread_mutex_lock(&b->lock);
    if (end_ok(b, offset, &end) && max_length > 0)
        ret = find_clean(b, offset, end, max_length, out);
    pthread_mutex_unlock(&b->lock);
    return ret;
}

int bg_bitmap_take(bg_bitmap *b, int64_t offset, int64_t end, int64_t max_length, bg_bitmap_extent *out)
{
    int ret = -EINVAL;
    pthread_mutex_lock(&b->lock);
    if (end_ok(b, offset, &end) && max_length > 0 && is_granule(b, offset) &&
        (is_granule(b, end) || (uint64_t)end == b->size)) {
        int64_t granule = (int64_t)1 << b->shift;
        int64_t whole = max_length < granule ? granule : max_length & -granule;
        ret = find_dirty(b, offset, end, whole, out);
        if (ret == 1)
            levels_clear(&b->levels, (uint64_t)out->start >> b->shift, (uint64_t)(out->end - 1) >> b->shift);
    }
    pthread_mutex_unlock(&b->lock);
    return ret;
}
