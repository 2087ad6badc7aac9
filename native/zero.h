/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Zero detection.
 *
 * Units:     bytes.
 * Ownership: buffers are borrowed for the call.
 * Errno:     functions return a value, or -errno where stated.
 * Threads:   no state; any thread, any number at once. Never blocks.
 *
 * The loops are compiled for the baseline and for AVX2 and chosen at run time. Both read at memory bandwidth, so
 * wider vectors would gain nothing.
 */
#ifndef BG_ZERO_H
#define BG_ZERO_H

#include <stddef.h>
#include <stdint.h>

/* cffi:begin */
/* A piece of a buffer that is all zero, or in which no block is all zero. */
typedef struct {
    uint64_t offset; /* from the start of the buffer */
    uint64_t length;
    uint64_t zero; /* 1: every byte is zero; 0: each block has a byte that is not */
} bg_zero_run;

/* 1 when all `length` bytes at `buf` are zero (also when length is 0), else 0. Stops at the first that is not. */
int bg_is_zero(const void *buf, size_t length);

/*
 * Split [start, length) of the buffer into maximal runs of blocks of `granularity` bytes that are zero or not.
 * Blocks are counted from the buffer's start; the last may be short. `start` must be a multiple of granularity.
 *
 * Writes at most `max` runs to `out` and returns their number; 0 when start >= length. When `out` fills up, call
 * again with start = the end of the last run. -EINVAL: granularity 0, start not a multiple of it, or max 0.
 */
int64_t bg_zero_runs(const void *buf, size_t length, size_t granularity, size_t start, bg_zero_run *out, size_t max);
/* cffi:end */

#endif
