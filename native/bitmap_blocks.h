/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Blocks of level 0, the 64 words or 512 bytes that a word of level 1 stands for, made from other bits.
 */
#ifndef BG_BITMAP_BLOCKS_H
#define BG_BITMAP_BLOCKS_H

#include <stddef.h>
#include <stdint.h>

#define BLOCK_WORDS 64
#define BLOCK_BYTES (BLOCK_WORDS * 8)

/*
 * Bits are set where words have them, or where bits spread to 2^k each (k = 1..6) are, or where any of 2^k bits (k = 1..5) is. Or
 * the block is replaced by bytes, the first bit lowest.
 */
typedef enum { BLOCK_SAME, BLOCK_SPREAD, BLOCK_FOLD, BLOCK_REPLACE } block_method;

typedef struct {
    uint64_t turned; /* how many bits more are set, modulo 2^64 */
    uint64_t used;   /* bit i: word i is not 0 */
} block_outcome;

typedef struct {
    const char *name;
    /* `into`: on a line of the cache. `from`: 64 words, 64 >> k, 64 << k, or 512 bytes. */
    block_outcome (*make)(uint64_t *into, const void *from, block_method method, unsigned k);
} block_maker;

/* Those that this processor can run, best first; at least one, at most BLOCK_MAKERS. */
#define BLOCK_MAKERS 3
size_t block_makers(const block_maker *out[BLOCK_MAKERS]);

#endif
