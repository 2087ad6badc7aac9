/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Whole bitmaps at the speed of memory, a block of level 0 at a time. Bits of another granularity are spread or folded; folded by 64
 * they are what the next level is. What is clean is passed over by pages, not by blocks: memory is read fastest in one go.
 */
#include "bitmap_blocks.h"
#include "bitmap_internal.h"

#define BLOCK_SHIFT 12 /* log2 of the bits in a block */
#define PAGE_BLOCKS 8
#define AHEAD 6 /* blocks */

/* Account for a block that was made. */
static void block_done(bg_levels *levels, uint64_t block, block_outcome made)
{
    uint64_t old = levels->level[1][block];
    levels->set += made.turned;
    if (made.used == old)
        return;
    levels->level[1][block] = made.used;
    if (!old)
        levels_summary_set(levels, 2, block);
    else if (!made.used)
        levels_summary_clear(levels, 2, block, block);
}

/* The same by runs: any granularity, but a run at a time. Bits >= start. */
static void or_runs(bg_levels *into, const bg_levels *from, int finer, uint64_t start)
{
    for (uint64_t first = levels_next_set(from, start), end; first < from->nbits; first = levels_next_set(from, end)) {
        end = levels_next_clear(from, first, from->nbits);
        uint64_t to = finer < 0 ? first >> -finer : first << finer;
        uint64_t last = finer < 0 ? (end - 1) >> -finer : (end << finer) - 1;
        levels_set(into, to, last < into->nbits ? last : into->nbits - 1);
    }
}

/* What blocks of `into` are made from. */
typedef struct {
    const bg_levels *levels;
    unsigned level; /* of the words */
    unsigned k;
    block_method method;
    unsigned shift;  /* log2 of the bits on level 0 for a block */
    uint64_t words;  /* on `level`, for a block */
    uint64_t unit;   /* blocks, a power of two, whose words or whose own are a page */
} block_source;

static block_source source_of(const bg_levels *from, int finer)
{
    unsigned coarser = finer < 0 ? (unsigned)-finer : 0;
    block_source s = {.levels = from, .level = coarser / 6, .shift = (unsigned)(BLOCK_SHIFT - finer)};
    s.k = finer > 0 ? (unsigned)finer : coarser % 6;
    s.method = finer > 0 ? BLOCK_SPREAD : s.k ? BLOCK_FOLD : BLOCK_SAME;
    s.words = finer > 0 ? BLOCK_WORDS >> s.k : BLOCK_WORDS << s.k;
    s.unit = s.method != BLOCK_FOLD ? PAGE_BLOCKS : s.k < 3 ? PAGE_BLOCKS >> s.k : 1;
    return s;
}

/* Whether any bit of a unit is set, as far as there are blocks. */
static bool in_use(const block_source *s, uint64_t block, uint64_t blocks)
{
    uint64_t first = block & -s->unit, count = blocks - first < s->unit ? blocks - first : s->unit, any = 0;
    uint64_t at = first * s->words, end = at + count * s->words;
    const uint64_t *summary = s->levels->level[s->level + 1];
    if (end - at < 64)
        return summary[at / 64] >> at % 64 & (((uint64_t)1 << (end - at)) - 1);
    for (; at < end; at += 64)
        any |= summary[at / 64];
    return any;
}

/* Where units are left out, the processor does not guess by itself what is needed next. */
static void fetch(const bg_levels *into, const block_source *s, uint64_t block)
{
    for (uint64_t line = 0; line < BLOCK_WORDS; line += 8)
        __builtin_prefetch(&into->level[0][block * BLOCK_WORDS + line], 1);
    for (uint64_t line = 0; line < s->words; line += 8)
        __builtin_prefetch(&s->levels->level[s->level][block * s->words + line]);
}

/* Set all whole blocks of `into`; returns the first bit of `from` after theirs. */
static uint64_t or_blocks(const block_maker *by, bg_levels *into, const block_source *s)
{
    const bg_levels *from = s->levels;
    uint64_t blocks = into->nbits >> BLOCK_SHIFT, window = UINT64_MAX;
    if (blocks > from->words[s->level] / s->words)
        blocks = from->words[s->level] / s->words;
    uint64_t end = blocks << s->shift;
    for (uint64_t bit = levels_next_set(from, 0); bit < end;) {
        uint64_t block = bit >> s->shift & -s->unit, stop = block + s->unit < blocks ? block + s->unit : blocks;
        if (block / (WINDOW_BITS >> BLOCK_SHIFT) != window) {
            window = block / (WINDOW_BITS >> BLOCK_SHIFT);
            if (levels_window(into, window) && levels_dense(from, window, BLOCK_SHIFT - (int)s->shift))
                levels_populate(into, window);
        }
        for (; block < stop; block++) {
            if (block + AHEAD < blocks && in_use(s, block + AHEAD, blocks))
                fetch(into, s, block + AHEAD);
            const uint64_t *words = from->level[s->level] + block * s->words;
            block_done(into, block, by->make(into->level[0] + block * BLOCK_WORDS, words, s->method, s->k));
        }
        bit = stop << s->shift;
        if (bit < end && !in_use(s, stop, blocks))
            bit = levels_next_set(from, bit);
    }
    return end;
}

void levels_or(bg_levels *into, const bg_levels *from, int finer, size_t maker)
{
    uint64_t done = 0;
    block_source s = source_of(from, finer);
    const block_maker *by[BLOCK_MAKERS];
    block_makers(by);
    /* What is spread to more than a word is done by runs. */
    if (finer <= 6 && s.level < from->nlevels)
        done = or_blocks(by[maker], into, &s);
    or_runs(into, from, finer, done);
}

void levels_load(bg_levels *levels, uint64_t block, const void *bytes)
{
    const block_maker *by[BLOCK_MAKERS];
    block_makers(by);
    block_done(levels, block, by[0]->make(levels->level[0] + block * BLOCK_WORDS, bytes, BLOCK_REPLACE, 0));
}
