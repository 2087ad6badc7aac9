/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Sums of XXH3 over blocks: what checksums of disks are made of (sums.h).
 *
 * The hash of a block is XXH3's 128-bit hash of its 4096 bytes with the number of the block as the seed, as the xxHash
 * specification (doc/xxhash_spec.md of Cyan4973/xxHash, "XXH3 Algorithm Overview") has it for inputs of more than 240 bytes.
 *
 * Units:     blocks of BG_SUM_BLOCK bytes.
 * Ownership: buffers are borrowed for the call.
 * Errno:     none, nothing can fail.
 * Threads:   no state; any thread, any number at once. Never blocks.
 *
 * Compiled for the baseline, AVX2 and AVX-512, chosen at run time.
 */
#ifndef BG_XXH3_H
#define BG_XXH3_H

#include <stddef.h>
#include <stdint.h>

#define BG_SUM_BLOCK 4096

/*
 * Add to sum[0] the low, to sum[1] the high halves of the hashes of `count` blocks, numbered from `first`. Blocks that are
 * all zero add nothing.
 */
void bg_xxh3_add(const void *blocks, size_t count, uint64_t first, uint64_t sum[2]);

/* The implementations that this processor can run, best first; the last is the portable one. */
typedef struct {
    const char *name;
    void (*hash)(const void *block, uint64_t seed, uint64_t out[2]);
} bg_xxh3;

#define BG_XXH3_MAX 3
size_t bg_xxh3_all(const bg_xxh3 *out[BG_XXH3_MAX]);

#endif
