/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* Bits to and from bytes, as images and the wire carry them. */
#include "bitmap_blocks.h"
#include "bitmap_internal.h"
#include "zero.h"

#include <endian.h>
#include <errno.h>
#include <string.h>

/* First byte and number of bytes of a range's bits, or false when the range is not one that bytes can hold. */
static bool bytes_of(const bg_bitmap *b, int64_t offset, int64_t length, uint64_t *first, uint64_t *count)
{
    if (!range_ok(b, offset, length))
        return false;
    uint64_t start = (uint64_t)offset >> b->shift, end = granules(b, (uint64_t)(offset + length));
    bool aligned = is_granule(b, offset) && start % 8 == 0;
    bool ends = (is_granule(b, offset + length) && end % 8 == 0) || (uint64_t)(offset + length) == b->size;
    if (!ends || (length && !aligned))
        return false;
    *first = start / 8;
    *count = length ? (end - start + 7) / 8 : 0;
    return true;
}

int64_t bg_bitmap_serialised(bg_bitmap *b, int64_t offset, int64_t length)
{
    uint64_t first, count;
    pthread_mutex_lock(&b->lock);
    bool ok = bytes_of(b, offset, length, &first, &count);
    pthread_mutex_unlock(&b->lock);
    return ok ? (int64_t)count : -EINVAL;
}

/* How many bytes from byte `at` of the bitmap lie in its word, `left` at most. */
static size_t in_word(uint64_t at, uint64_t left)
{
    size_t room = 8 - at % 8;
    return left < room ? left : room;
}

/* Whether the range of `left` bytes from byte `at` on begins with a block of its own. */
static bool whole_block(const bg_levels *levels, uint64_t at, uint64_t left)
{
    return at % BLOCK_BYTES == 0 && left >= BLOCK_BYTES && (at + BLOCK_BYTES) * 8 <= levels->nbits;
}

static void copy_block(unsigned char *p, const uint64_t *words)
{
    for (unsigned i = 0; i < BLOCK_WORDS; i++, p += 8) {
        uint64_t word = htole64(words[i]);
        memcpy(p, &word, sizeof(word));
    }
}

int bg_bitmap_serialise(bg_bitmap *b, int64_t offset, int64_t length, void *buf, size_t bytes)
{
    uint64_t at, count;
    int ret = -EINVAL;
    pthread_mutex_lock(&b->lock);
    if (bytes_of(b, offset, length, &at, &count) && count == bytes) {
        const bg_levels *levels = &b->levels;
        unsigned char *p = buf;
        for (size_t n; count; at += n, p += n, count -= n) {
            if (whole_block(levels, at, count)) {
                n = BLOCK_BYTES;
                /* What is clean is not looked at: its memory may never have been touched. */
                if (levels->level[1][at / BLOCK_BYTES])
                    copy_block(p, levels->level[0] + at / 8);
                else
                    memset(p, 0, n);
                continue;
            }
            uint64_t word = htole64(levels->level[0][at / 8]);
            n = in_word(at, count);
            memcpy(p, (unsigned char *)&word + at % 8, n);
        }
        ret = 0;
    }
    pthread_mutex_unlock(&b->lock);
    return ret;
}

/* Bytes from `at` on will be loaded: have the memory there where they fill half of a window's pages. */
static void expect(bg_levels *levels, uint64_t at, const unsigned char *p, uint64_t left)
{
    unsigned used = 0;
    if (!levels_window(levels, at / WINDOW_BYTES))
        return;
    if (left > WINDOW_BYTES - at % WINDOW_BYTES)
        left = WINDOW_BYTES - at % WINDOW_BYTES;
    for (uint64_t page = 0; page + PAGE_BYTES <= left && used < WINDOW_PAGES / 2; page += PAGE_BYTES)
        used += !bg_is_zero(p + page, PAGE_BYTES);
    if (used >= WINDOW_PAGES / 2)
        levels_populate(levels, at / WINDOW_BYTES);
}

static void load_word(bg_levels *levels, uint64_t at, const unsigned char *p, size_t n)
{
    uint64_t w = at / 8, old = levels->level[0][w], word = htole64(old);
    memcpy((unsigned char *)&word + at % 8, p, n);
    word = le64toh(word);
    if (w == levels->words[0] - 1 && levels->nbits % 64)
        word &= ~(uint64_t)0 >> (64 - levels->nbits % 64);
    if (word != old) {
        word_store(&levels->level[0][w], word);
        levels_word_changed(levels, w, old);
    }
}

int bg_bitmap_deserialise(bg_bitmap *b, int64_t offset, int64_t length, const void *buf, size_t bytes)
{
    uint64_t at, count;
    int ret = -EINVAL;
    pthread_mutex_lock(&b->lock);
    if (bytes_of(b, offset, length, &at, &count) && count == bytes) {
        bg_levels *levels = &b->levels;
        const unsigned char *p = buf;
        uint64_t expected = UINT64_MAX;
        for (size_t n; count; at += n, p += n, count -= n) {
            if (!whole_block(levels, at, count)) {
                n = in_word(at, count);
                load_word(levels, at, p, n);
                continue;
            }
            n = BLOCK_BYTES;
            if (at / WINDOW_BYTES != expected) {
                expected = at / WINDOW_BYTES;
                expect(levels, at, p, count);
            }
            if (levels->level[1][at / BLOCK_BYTES] || !bg_is_zero(p, n))
                levels_load(levels, at / BLOCK_BYTES, p);
        }
        cleared();
        ret = 0;
    }
    pthread_mutex_unlock(&b->lock);
    return ret;
}
