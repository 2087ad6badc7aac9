/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* The bits and their summaries. */
#include "bitmap_internal.h"

#define FULL (~(uint64_t)0)

static inline uint64_t from_bit(uint64_t bit)
{
    return FULL << (bit & 63);
}

static inline uint64_t to_bit(uint64_t bit)
{
    return FULL >> (63 - (bit & 63));
}

/* Set bits first..last of `words`, and return how many were clear. */
static uint64_t words_set(uint64_t *words, uint64_t first, uint64_t last)
{
    uint64_t turned = 0, mask = from_bit(first);
    for (uint64_t w = first / 64; w <= last / 64; w++, mask = FULL) {
        if (w == last / 64)
            mask &= to_bit(last);
        uint64_t new_bits = mask & ~words[w];
        if (new_bits) {
            turned += new_bits == FULL ? 64 : (uint64_t)__builtin_popcountll(new_bits);
            word_store(&words[w], words[w] | mask);
        }
    }
    return turned;
}

void levels_set(bg_levels *levels, uint64_t first, uint64_t last)
{
    uint64_t turned = 0, from = first, stop;
    for (;; from = stop + 1) {
        stop = from | (WINDOW_BITS - 1);
        if (stop > last)
            stop = last;
        else if (stop - from == WINDOW_BITS - 1)
            levels_populate(levels, from / WINDOW_BITS);
        turned += words_set(levels->level[0], from, stop);
        if (stop == last)
            break;
    }
    if (turned == 0)
        return; /* the summaries of bits already set are right */
    levels->set += turned;
    for (unsigned i = 1; i < levels->nlevels; i++) {
        first /= 64;
        last /= 64;
        if (words_set(levels->level[i], first, last) == 0)
            return;
    }
}

void levels_summary_clear(bg_levels *levels, unsigned level, uint64_t first, uint64_t last)
{
    for (; level < levels->nlevels; level++) {
        const uint64_t *below = levels->level[level - 1];
        if (below[first])
            first++;
        if (last > first && below[last])
            last--;
        if (first > last || below[first])
            return;
        uint64_t *words = levels->level[level];
        for (uint64_t w = first / 64; w <= last / 64; w++) {
            uint64_t mask = FULL;
            if (w == first / 64)
                mask &= from_bit(first);
            if (w == last / 64)
                mask &= to_bit(last);
            words[w] &= ~mask;
        }
        first /= 64;
        last /= 64;
    }
}

void levels_clear(bg_levels *levels, uint64_t first, uint64_t last)
{
    uint64_t *words = levels->level[0], turned = 0;
    /* A clean area is passed over by its summary: resetting what is clean must not touch its memory. */
    for (uint64_t bit = levels_next_set(levels, first); bit <= last && bit < levels->nbits;) {
        uint64_t w = bit / 64, mask = FULL;
        if (w == first / 64)
            mask &= from_bit(first);
        if (w == last / 64)
            mask &= to_bit(last);
        turned += (uint64_t)__builtin_popcountll(words[w] & mask);
        word_store(&words[w], words[w] & ~mask);
        bit = (w + 1) * 64;
        if (bit > last)
            break;
        if (words[w + 1] == 0)
            bit = levels_next_set(levels, bit);
    }
    if (turned == 0)
        return;
    levels->set -= turned;
    cleared();
    levels_summary_clear(levels, 1, first / 64, last / 64);
}

void levels_summary_set(bg_levels *levels, unsigned level, uint64_t bit)
{
    for (; level < levels->nlevels && words_set(levels->level[level], bit, bit); level++)
        bit /= 64;
}

void levels_word_changed(bg_levels *levels, uint64_t word, uint64_t old)
{
    uint64_t now = levels->level[0][word];
    levels->set += (uint64_t)__builtin_popcountll(now);
    levels->set -= (uint64_t)__builtin_popcountll(old);
    if (now && !old) {
        levels_summary_set(levels, 1, word);
    } else if (old && !now) {
        levels_summary_clear(levels, 1, word, word);
    }
}

void levels_fill(bg_levels *levels)
{
    if (levels->nbits)
        levels_set(levels, 0, levels->nbits - 1);
}

void levels_clear_all(bg_levels *levels)
{
    if (levels->set == 0)
        return;
    levels->set = 0;
    levels_zero(levels);
    cleared();
}

uint64_t levels_next(const bg_levels *levels, unsigned base, uint64_t from)
{
    uint64_t bits = base ? levels->words[base - 1] : levels->nbits;
    if (from >= bits)
        return bits;
    unsigned level = base;
    uint64_t at = from;
    for (;;) {
        uint64_t word = at / 64;
        if (word < levels->words[level]) {
            uint64_t rest = levels->level[level][word] >> (at & 63);
            if (rest) {
                at += (uint64_t)__builtin_ctzll(rest);
                break;
            }
        }
        if (++level == levels->nlevels)
            return bits;
        at = word + 1;
    }
    while (level > base) {
        level--;
        at = at * 64 + (uint64_t)__builtin_ctzll(levels->level[level][at]);
    }
    return at;
}

uint64_t levels_next_clear(const bg_levels *levels, uint64_t from, uint64_t limit)
{
    const uint64_t *words = levels->level[0];
    if (from >= limit)
        return limit;
    uint64_t word = from / 64, end = (limit + 63) / 64;
    uint64_t rest = ~words[word] & from_bit(from);
    if (rest == 0) {
        word++;
        while (end - word >= 8) {
            const uint64_t *w = words + word;
            if ((w[0] & w[1] & w[2] & w[3] & w[4] & w[5] & w[6] & w[7]) != FULL)
                break;
            word += 8;
        }
        while (word < end && words[word] == FULL)
            word++;
        if (word == end)
            return limit;
        rest = ~words[word];
    }
    uint64_t at = word * 64 + (uint64_t)__builtin_ctzll(rest);
    return at < limit ? at : limit;
}
