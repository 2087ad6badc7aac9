/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#include "sums.h"

#include "xxh3.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

_Static_assert(BG_SUM_BLOCK == BG_SUM_BLOCK_BYTES, "what Python knows is true");

typedef struct {
    uint64_t sum[BG_SUMS_PAGE][2];
} page;

struct bg_sums {
    int64_t size, chunk, count;
    bg_bitmap *spoiled;
    page *pages[]; /* each set once, atomically */
};

static int64_t page_count(const bg_sums *s)
{
    return (s->count + BG_SUMS_PAGE - 1) / BG_SUMS_PAGE;
}

int bg_sums_new(int64_t size, int64_t chunk, bg_sums **out)
{
    if (size < 0 || chunk < BG_SUM_BLOCK || chunk > BG_BITMAP_MAX_GRANULARITY || (chunk & (chunk - 1)))
        return -EINVAL;
    int64_t count = size / chunk + (size % chunk != 0);
    if (count > BG_SUMS_MAX_CHUNKS)
        return -EFBIG;
    bg_sums *s = calloc(1, sizeof(*s) + (size_t)(count / BG_SUMS_PAGE + 1) * sizeof(page *));
    if (!s)
        return -ENOMEM;
    int ret = bg_bitmap_new(size, chunk, &s->spoiled);
    if (ret < 0) {
        free(s);
        return ret;
    }
    s->size = size;
    s->chunk = chunk;
    s->count = count;
    *out = s;
    return 0;
}

void bg_sums_free(bg_sums *s)
{
    if (!s)
        return;
    for (int64_t i = 0; i < page_count(s); i++)
        free(s->pages[i]);
    bg_bitmap_free(s->spoiled);
    free(s);
}

int64_t bg_sums_size(const bg_sums *s)
{
    return s->size;
}

static bool range_ok(const bg_sums *s, int64_t offset, int64_t length)
{
    return offset >= 0 && length >= 0 && offset <= s->size && length <= s->size - offset;
}

static page *page_at(const bg_sums *s, int64_t index)
{
    return __atomic_load_n(&s->pages[index / BG_SUMS_PAGE], __ATOMIC_ACQUIRE);
}

static page *make_page(bg_sums *s, int64_t index)
{
    page *there = page_at(s, index), *made;
    if (there || !(made = calloc(1, sizeof(*made))))
        return there;
    if (__atomic_compare_exchange_n(&s->pages[index / BG_SUMS_PAGE], &there, made, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
        return made;
    free(made);
    return there;
}

/* Whole blocks of one chunk, `tail` bytes of the disk's last one behind them. */
static void add_blocks(bg_sums *s, int64_t offset, const uint8_t *buf, int64_t blocks, int64_t tail)
{
    uint64_t sum[2] = {0}, first = (uint64_t)(offset / BG_SUM_BLOCK);
    bg_xxh3_add(buf, (size_t)blocks, first, sum);
    if (tail) {
        uint8_t last[BG_SUM_BLOCK] = {0};
        memcpy(last, buf + blocks * BG_SUM_BLOCK, (size_t)tail);
        bg_xxh3_add(last, 1, first + (uint64_t)blocks, sum);
    }
    if (!sum[0] && !sum[1])
        return;
    int64_t index = offset / s->chunk;
    page *p = make_page(s, index);
    if (!p) {
        bg_bitmap_set(s->spoiled, offset, 1);
        return;
    }
    __atomic_fetch_add(&p->sum[index % BG_SUMS_PAGE][0], sum[0], __ATOMIC_RELAXED);
    __atomic_fetch_add(&p->sum[index % BG_SUMS_PAGE][1], sum[1], __ATOMIC_RELAXED);
}

int bg_sums_add(bg_sums *s, int64_t offset, const void *buf, int64_t length)
{
    if (!range_ok(s, offset, length))
        return -EINVAL;
    int64_t end = offset + length, start = offset + (BG_SUM_BLOCK - offset % BG_SUM_BLOCK) % BG_SUM_BLOCK;
    int64_t tail = end % BG_SUM_BLOCK, stop = end - tail;
    if (start != offset)
        bg_bitmap_set(s->spoiled, offset, (start < end ? start : end) - offset);
    if (tail && end != s->size && stop >= start)
        bg_bitmap_set(s->spoiled, stop, tail);
    if (end != s->size)
        tail = 0;
    for (int64_t at = start, next; at < stop || (at == stop && tail); at = next) {
        next = at - at % s->chunk + s->chunk;
        bool last = next > stop;
        int64_t blocks = ((next < stop ? next : stop) - at) / BG_SUM_BLOCK;
        add_blocks(s, at, (const uint8_t *)buf + (at - offset), blocks, last ? tail : 0);
        if (last)
            break;
    }
    return 0;
}

int bg_sums_spoil(bg_sums *s, int64_t offset, int64_t length)
{
    return bg_bitmap_set(s->spoiled, offset, length);
}

int bg_sums_next_spoiled(bg_sums *s, int64_t offset, bg_bitmap_extent *out)
{
    return bg_bitmap_next_dirty(s->spoiled, offset, BG_BITMAP_NO_LIMIT, BG_BITMAP_NO_LIMIT, out);
}

int bg_sums_reset(bg_sums *s, int64_t offset, int64_t length)
{
    if (!range_ok(s, offset, length))
        return -EINVAL;
    if (!length)
        return 0;
    int64_t first = offset / s->chunk, last = (offset + length - 1) / s->chunk;
    for (int64_t index = first; index <= last; index++) {
        page *p = page_at(s, index);
        if (p)
            memset(p->sum[index % BG_SUMS_PAGE], 0, sizeof(p->sum[0]));
    }
    int64_t start = first * s->chunk, end = last == s->count - 1 ? s->size : (last + 1) * s->chunk;
    return bg_bitmap_reset(s->spoiled, start, end - start);
}

int64_t bg_sums_next(const bg_sums *s, int64_t index)
{
    for (; index >= 0 && index < s->count; index += BG_SUMS_PAGE - index % BG_SUMS_PAGE)
        if (page_at(s, index))
            return index;
    return -1;
}

int bg_sums_read(const bg_sums *s, int64_t index, int64_t count, uint64_t *out)
{
    if (index < 0 || count < 0 || index > s->count || count > s->count - index)
        return -EINVAL;
    for (int64_t i = 0; i < count; i++) {
        const page *p = page_at(s, index + i);
        for (int half = 0; half < 2; half++)
            out[2 * i + half] =
                p ? __atomic_load_n(&p->sum[(index + i) % BG_SUMS_PAGE][half], __ATOMIC_RELAXED) : 0;
    }
    return 0;
}

int bg_sums_hash_block(int which, const void *block, uint64_t number, uint64_t *out)
{
    const bg_xxh3 *all[BG_XXH3_MAX];
    size_t count = bg_xxh3_all(all);
    if (which < 0 || (size_t)which >= count)
        return -ENOENT;
    all[which]->hash(block, number, out);
    return 0;
}
