/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Many runs in one pass: each place where the bits change, an edge, becomes one output value, so that starts and ends come
 * out in turn. For random bits this is several times faster than asking for run after run.
 */
#include "bitmap_internal.h"

#include <errno.h>
#include <string.h>
#if defined(__x86_64__) && !defined(BG_PORTABLE)
#include <immintrin.h>
#endif

#define GROUP 64                 /* words under one summary word */
#define GROUP_EDGES (GROUP * 64) /* most changes in a group */
#define SLACK 4                  /* values that may be written past the last one in use */
#define AHEAD 16                 /* groups: each misprediction ends what the processor reads ahead by itself */

/* Where the bits of a word differ from the bit before each. word[-1] is readable. */
static inline uint64_t edges_of(const uint64_t *word)
{
    return word[0] ^ (word[0] << 1 | word[-1] >> 63);
}

/*
 * Write the position of each edge in words[0..count), in bytes of the disk, and return how many. count <= GROUP; words[-1] is
 * readable; `base`: the number of the first bit.
 */
typedef size_t edges_fn(const uint64_t *words, size_t count, uint64_t base, unsigned shift, uint64_t *out);

static size_t edges_baseline(const uint64_t *words, size_t count, uint64_t base, unsigned shift, uint64_t *out)
{
    uint64_t *at = out;
    for (size_t i = 0; i < count; i++)
        for (uint64_t edges = edges_of(words + i); edges; edges &= edges - 1)
            *at++ = (base + 64 * i + (uint64_t)__builtin_ctzll(edges)) << shift;
    return (size_t)(at - out);
}

#if defined(__x86_64__) && !defined(BG_PORTABLE)
/*
 * Branches on random bits are mispredicted: the words that have edges are found first, without a branch, and each of them writes
 * four values always and counts those that are real.
 */
__attribute__((target("avx2,bmi,popcnt"))) static size_t edges_avx2(const uint64_t *words, size_t count, uint64_t base,
                                                                    unsigned shift, uint64_t *out)
{
    uint64_t marked = 0, *at = out;
    size_t done = 0;
    for (; done + 4 <= count; done += 4) {
        __m256i here = _mm256_loadu_si256((const __m256i *)(words + done));
        __m256i before = _mm256_loadu_si256((const __m256i *)(words + done - 1));
        __m256i shifted = _mm256_or_si256(_mm256_slli_epi64(here, 1), _mm256_srli_epi64(before, 63));
        __m256i same = _mm256_cmpeq_epi64(here, shifted);
        marked |= (uint64_t)(_mm256_movemask_pd(_mm256_castsi256_pd(same)) ^ 15) << done;
    }
    for (; done < count; done++)
        marked |= (uint64_t)(edges_of(words + done) != 0) << done;
    for (; marked; marked &= marked - 1) {
        size_t i = _tzcnt_u64(marked);
        uint64_t edges = edges_of(words + i), start = base + 64 * i;
        uint64_t *next = at + __builtin_popcountll(edges);
        for (int k = 0; k < 4; k++, edges &= edges - 1)
            *at++ = (start + _tzcnt_u64(edges)) << shift;
        for (; edges; edges &= edges - 1)
            *at++ = (start + _tzcnt_u64(edges)) << shift;
        at = next;
    }
    return (size_t)(at - out);
}
#endif

static edges_fn *choose_edges(void)
{
#if defined(__x86_64__) && !defined(BG_PORTABLE)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("popcnt"))
        return edges_avx2;
#endif
    return edges_baseline;
}

/* The first bit of the next group in use after the clean group of `bit`. */
static uint64_t skip_clean(const bg_levels *levels, uint64_t bit)
{
    uint64_t group = bit / GROUP_EDGES;
    if (levels->nlevels > 2) {
        /* Mostly one is close by. */
        uint64_t in_use = levels->level[2][group / 64] >> group % 64;
        if (in_use)
            return (group + (uint64_t)__builtin_ctzll(in_use)) * GROUP_EDGES;
    }
    bit = levels_next_set(levels, bit);
    return bit < levels->nbits ? bit / GROUP_EDGES * GROUP_EDGES : bit;
}

/* Collect edges of bits [from, limit) into `out` until it might not hold another group; returns the bit reached. */
static uint64_t collect(const bg_bitmap *b, uint64_t from, uint64_t limit, uint64_t *out, size_t room, size_t *edges)
{
    const bg_levels *levels = &b->levels;
    edges_fn *scan = choose_edges();
    size_t n = 0;
    uint64_t bit = from, fetched = from / GROUP_EDGES;
    while (bit < limit && room - n >= GROUP_EDGES + SLACK) {
        if (n % 2 == 0 && levels->level[1][bit / GROUP_EDGES] == 0) {
            bit = skip_clean(levels, bit);
            if (bit >= limit) {
                bit = limit;
                break;
            }
        }
        uint64_t group = bit / GROUP_EDGES, stop = (group + 1) * GROUP_EDGES;
        if (stop > limit)
            stop = limit;
        /* All lines, also of clean groups: anything less regular is slower. */
        if (fetched < group)
            fetched = group;
        for (; fetched < group + AHEAD; fetched++)
            for (unsigned line = 0; line < GROUP; line += 8)
                __builtin_prefetch(levels->level[0] + fetched * GROUP + line);
        uint64_t first = bit / 64;
        size_t count = (size_t)((stop + 63) / 64 - first);
        const uint64_t *words = levels->level[0] + first;
        uint64_t cut[1 + GROUP];
        if (bit == from || first == 0 || stop % 64) {
            /* Bits outside the range count as clean; before the first word there is nothing to read. */
            memcpy(cut + 1, words, count * sizeof(uint64_t));
            cut[0] = n % 2 ? ~(uint64_t)0 : 0;
            cut[1] &= ~(uint64_t)0 << bit % 64;
            if (stop % 64)
                cut[count] &= ~(uint64_t)0 >> (64 - stop % 64);
            words = cut + 1;
        }
        n += scan(words, count, first * 64, b->shift, out + n);
        bit = stop;
    }
    *edges = n;
    return bit;
}

int64_t bg_bitmap_extents(bg_bitmap *b, int64_t offset, int64_t end, bg_bitmap_extent *out, size_t max, int64_t *next)
{
    if (max < BG_BITMAP_EXTENTS_MIN)
        return -EINVAL;
    pthread_mutex_lock(&b->lock);
    if (!end_ok(b, offset, &end)) {
        pthread_mutex_unlock(&b->lock);
        return -EINVAL;
    }
    /* An empty range has no extents, even inside a dirty granule. */
    uint64_t limit = offset < end ? granules(b, (uint64_t)end) : (uint64_t)offset >> b->shift, *edge = (uint64_t *)out;
    size_t edges;
    uint64_t reached = collect(b, (uint64_t)offset >> b->shift, limit, edge, max * 2, &edges);
    if (edges % 2) {
        /* The last run goes on: to the end of what was asked for, or past the last group looked at. */
        reached = levels_next_clear(&b->levels, reached, limit);
        edge[edges++] = reached << b->shift;
    }
    pthread_mutex_unlock(&b->lock);
    *next = reached == limit ? end : (int64_t)(reached << b->shift);
    if (edges && edge[0] < (uint64_t)offset)
        edge[0] = (uint64_t)offset;
    if (edges && edge[edges - 1] > (uint64_t)end)
        edge[edges - 1] = (uint64_t)end;
    return (int64_t)(edges / 2);
}
