/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Many runs in one pass. Each place where the bits change, an edge, becomes one output value, so that starts and ends come
 * out in turn. Areas in use are decoded block by block, clean ones are passed over by their summaries.
 */
#include "bitmap_edges.h"
#include "bitmap_internal.h"

#include <errno.h>

#define GROUP 64 /* words under one summary word */
#define GROUP_BITS (GROUP * 64)
#define BLOCK_GROUPS (EDGES_WORDS / GROUP) /* a power of two, so that one word of level 2 tells of a block */
#define BLOCK_BITS (EDGES_WORDS * 64)

/* Bit i: the group i after that of `bit` is in use; as far as the block reaches. */
static uint64_t groups_in_use(const bg_levels *levels, uint64_t bit)
{
    uint64_t group = bit / GROUP_BITS;
    if (levels->nlevels == 2)
        return 1;
    return levels->level[2][group / 64] >> group % 64 & (((uint64_t)1 << (BLOCK_GROUPS - group % BLOCK_GROUPS)) - 1);
}

/* The edges of bits [from, stop) of the word they are in, where the bits outside are clean but for an open run before. */
static size_t word_edges(const bg_bitmap *b, uint64_t from, uint64_t stop, bool open, uint64_t *out)
{
    uint64_t mask = ~(uint64_t)0 << from % 64;
    if (stop % 64)
        mask &= ~(uint64_t)0 >> (64 - stop % 64);
    uint64_t bits = b->levels.level[0][from / 64] & mask;
    size_t n = 0;
    for (uint64_t edges = (bits ^ (bits << 1 | (uint64_t)open << from % 64)) & mask; edges; edges &= edges - 1)
        out[n++] = (from / 64 * 64 + (uint64_t)__builtin_ctzll(edges)) << b->shift;
    return n;
}

/*
 * Collect edges of bits [from, limit) until there might be no room for those of another word; returns the bit reached. Bits
 * outside are clean. room >= 3 * EDGES_SLACK.
 */
static uint64_t collect(const edge_decoder *by, const bg_bitmap *b, uint64_t from, uint64_t limit, uint64_t *out, size_t room,
                        size_t *edges)
{
    const bg_levels *levels = &b->levels;
    uint64_t bit = from, whole = limit / 64 * 64, stop;
    size_t n = 0;
    if (bit < limit) {
        stop = bit / 64 == limit / 64 ? limit : (bit / 64 + 1) * 64;
        n = word_edges(b, bit, stop, false, out);
        bit = stop;
    }
    for (; bit < whole; bit = stop) {
        stop = (bit / BLOCK_BITS + 1) * BLOCK_BITS;
        if (stop > whole)
            stop = whole;
        uint64_t start = bit;
        /* Where a run is open its end is looked for, be it at the first bit of what is clean. */
        if (n % 2 == 0) {
            uint64_t used = groups_in_use(levels, bit);
            if (used == 0) {
                uint64_t set = levels_next_set(levels, bit);
                stop = set < whole ? set / GROUP_BITS * GROUP_BITS : whole;
                continue;
            }
            /* What is clean between groups in use is not passed over: memory is read fastest in one go. */
            if ((used & 1) == 0)
                start = (bit / GROUP_BITS + (uint64_t)__builtin_ctzll(used)) * GROUP_BITS;
            if (start >= stop)
                continue;
        }
        n += by->decode(levels->level[0] + start / 64, (stop - start) / 64, start, b->shift, out + n, room - n);
        if (n > room - 2 * EDGES_SLACK) {
            *edges = n & ~(size_t)1;
            return out[n - 1] >> b->shift;
        }
    }
    if (bit < limit)
        n += word_edges(b, bit, limit, n % 2, out + n);
    *edges = n;
    return limit;
}

const char *bg_bitmap_decoder(size_t number)
{
    const edge_decoder *by[EDGE_DECODERS];
    return number < edge_decoders(by) ? by[number]->name : NULL;
}

int64_t bg_bitmap_extents_by(size_t decoder, bg_bitmap *b, int64_t offset, int64_t end, bg_bitmap_extent *out, size_t max,
                             int64_t *next)
{
    const edge_decoder *by[EDGE_DECODERS];
    if (max < BG_BITMAP_EXTENTS_MIN || decoder >= edge_decoders(by))
        return -EINVAL;
    pthread_mutex_lock(&b->lock);
    if (!end_ok(b, offset, &end)) {
        pthread_mutex_unlock(&b->lock);
        return -EINVAL;
    }
    /* An empty range has no extents, even inside a dirty granule. */
    uint64_t limit = offset < end ? granules(b, (uint64_t)end) : (uint64_t)offset >> b->shift, *edge = (uint64_t *)out;
    size_t edges;
    uint64_t reached = collect(by[decoder], b, (uint64_t)offset >> b->shift, limit, edge, max * 2, &edges);
    if (edges % 2)
        edge[edges++] = limit << b->shift;
    pthread_mutex_unlock(&b->lock);
    *next = reached == limit ? end : (int64_t)(reached << b->shift);
    if (edges && edge[0] < (uint64_t)offset)
        edge[0] = (uint64_t)offset;
    if (edges && edge[edges - 1] > (uint64_t)end)
        edge[edges - 1] = (uint64_t)end;
    return (int64_t)(edges / 2);
}

int64_t bg_bitmap_extents(bg_bitmap *b, int64_t offset, int64_t end, bg_bitmap_extent *out, size_t max, int64_t *next)
{
    return bg_bitmap_extents_by(0, b, offset, end, out, max, next);
}
