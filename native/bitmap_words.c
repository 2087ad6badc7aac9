/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* Whole bitmaps at the speed of memory: a word of level 1 stands for a block of 64 words, 512 bytes, of level 0. */
#include "bitmap_internal.h"

#define AHEAD 6 /* blocks */

typedef uint64_t (*block_or)(uint64_t *into, const uint64_t *from, uint64_t count);

/* Store into[i] | from[i]; returns how many bits that turned on. Stored one by one: see word_store. */
static inline __attribute__((always_inline)) uint64_t or_body(uint64_t *into, const uint64_t *from, uint64_t count)
{
    uint64_t turned = 0;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t old = into[i], more = from[i] & ~old;
        turned += (uint64_t)__builtin_popcountll(more);
        word_store(&into[i], old | more);
    }
    return turned;
}

static uint64_t or_portable(uint64_t *into, const uint64_t *from, uint64_t count)
{
    return or_body(into, from, count);
}

#if defined(__x86_64__) && !defined(BG_PORTABLE)
__attribute__((target("popcnt"))) static uint64_t or_popcnt(uint64_t *into, const uint64_t *from, uint64_t count)
{
    return or_body(into, from, count);
}
#endif

static block_or choose(void)
{
#if defined(__x86_64__) && !defined(BG_PORTABLE)
    if (__builtin_cpu_supports("popcnt"))
        return or_popcnt;
#endif
    return or_portable;
}

/* Where blocks are left out, the processor does not guess by itself what is needed next. */
static void fetch(bg_levels *into, const bg_levels *from, uint64_t block)
{
    if (block >= from->words[1] || !from->level[1][block])
        return;
    for (uint64_t line = block * 64; line < block * 64 + 64; line += 8) {
        __builtin_prefetch(&from->level[0][line]);
        __builtin_prefetch(&into->level[0][line], 1);
    }
}

void levels_or(bg_levels *into, const bg_levels *from)
{
    block_or or = choose();
    for (uint64_t bit = levels_next_set(from, 0); bit < from->nbits;) {
        uint64_t block = bit / (64 * 64), first = block * 64, left = from->words[0] - first;
        fetch(into, from, block + AHEAD);
        uint64_t *summary = &into->level[1][block], old = *summary;
        into->set += or(into->level[0] + first, from->level[0] + first, left < 64 ? left : 64);
        *summary = old | from->level[1][block];
        if (!old)
            levels_summary_set(into, 2, block);
        bit = (block + 1) * (64 * 64);
        if (bit < from->nbits && !from->level[1][block + 1])
            bit = levels_next_set(from, bit);
    }
}
