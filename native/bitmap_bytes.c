/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* Bits to and from bytes, as images and the wire carry them. */
#include "bitmap_internal.h"

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

int bg_bitmap_serialise(bg_bitmap *b, int64_t offset, int64_t length, void *buf, size_t bytes)
{
    uint64_t at, count;
    int ret = -EINVAL;
    pthread_mutex_lock(&b->lock);
    if (bytes_of(b, offset, length, &at, &count) && count == bytes) {
        unsigned char *p = buf;
        for (size_t n; count; at += n, p += n, count -= n) {
            n = in_word(at, count);
            uint64_t word = htole64(b->levels.level[0][at / 8]);
            memcpy(p, (unsigned char *)&word + at % 8, n);
        }
        ret = 0;
    }
    pthread_mutex_unlock(&b->lock);
    return ret;
}

int bg_bitmap_deserialise(bg_bitmap *b, int64_t offset, int64_t length, const void *buf, size_t bytes)
{
    uint64_t at, count;
    int ret = -EINVAL;
    pthread_mutex_lock(&b->lock);
    if (bytes_of(b, offset, length, &at, &count) && count == bytes) {
        bg_levels *levels = &b->levels;
        const unsigned char *p = buf;
        for (size_t n; count; at += n, p += n, count -= n) {
            n = in_word(at, count);
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
        cleared();
        ret = 0;
    }
    pthread_mutex_unlock(&b->lock);
    return ret;
}
