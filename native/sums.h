/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Checksums of a disk, one for each chunk, that any number of copies add to in any order.
 *
 *     chunk     |  block 0  |  block 1  |   zero    |  block 3  |      sum of a chunk = hash(block 0, 0) + hash(block 1, 1)
 *                  hash    +   hash    +    0      +   hash                             + hash(block 3, 3)
 *
 * A chunk is copied by several parties: a guest's write saves some of its clusters, a job the others, and what is zero is
 * not read at all. So its checksum is a sum: of the hashes (xxh3.h) of its blocks of 4096 bytes, each seeded with the
 * block's number, low and high halves of 64 bits each added for itself, modulo 2^64. Zero blocks add nothing; a last block that
 * ends with the disk counts as if zeroes followed. It tells damage by accident, not by malice.
 *
 * What was added can not be taken back: a party that has failed *spoils* its range, and so does one that holds a part of a
 * block only. Spoiled chunks have no sum until they are reset and added again, from the target.
 *
 * Units:     bytes; an index counts chunks.
 * Ownership: bg_sums_new hands out an object that bg_sums_free ends; buffers are borrowed.
 * Errno:     0 or a positive result, else -EINVAL (an argument is out of range), -ENOMEM, -EFBIG (more than
 *            BG_SUMS_MAX_CHUNKS).
 * Threads:   everything but free and reset may be called at any time from any thread. Sums are added without a lock.
 *
 * Memory: 16 bytes a chunk, in pages of BG_SUMS_PAGE chunks that are there once something was added, and 8 bytes a page.
 */
#ifndef BG_SUMS_H
#define BG_SUMS_H

#include "bitmap.h"

#include <stdint.h>

/* cffi:begin */
#define BG_SUM_BLOCK_BYTES 4096
#define BG_SUMS_PAGE 256
#define BG_SUMS_MAX_CHUNKS 67108864

typedef struct bg_sums bg_sums;

/* chunk: a power of two from 4096 to BG_BITMAP_MAX_GRANULARITY. */
int bg_sums_new(int64_t size, int64_t chunk, bg_sums **out);
void bg_sums_free(bg_sums *sums);
int64_t bg_sums_size(const bg_sums *sums);

/* The bytes of [offset, offset + length) are these. What is a part of a block only, and what memory is short for, is spoiled. */
int bg_sums_add(bg_sums *sums, int64_t offset, const void *buf, int64_t length);

/* Nothing is known of the chunks that the range touches. */
int bg_sums_spoil(bg_sums *sums, int64_t offset, int64_t length);

/* The first run of spoiled chunks at or after `offset`: 1 and *out, or 0. */
int bg_sums_next_spoiled(bg_sums *sums, int64_t offset, bg_bitmap_extent *out);

/* The chunks that the range touches: nothing was added, nothing is spoiled. Nobody may add meanwhile. */
int bg_sums_reset(bg_sums *sums, int64_t offset, int64_t length);

/* The first index from `index` on whose page is there; -1: none. */
int64_t bg_sums_next(const bg_sums *sums, int64_t index);

/* Sums of `count` chunks from `index` on, low and high half in turn. */
int bg_sums_read(const bg_sums *sums, int64_t index, int64_t count, uint64_t *out);

/* For tests: the hash of one block by the implementation `which`, best first. Returns 0, or -ENOENT: there are no more. */
int bg_sums_hash_block(int which, const void *block, uint64_t number, uint64_t *out);
/* cffi:end */

#endif
