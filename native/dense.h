/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Whether a range of a file in memory (tmpfs) is nothing but data, without a look at each of its pages.
 *
 *     2 GiB without a hole, other things in the processor's caches, milliseconds (Linux 6.18, Intel Xeon)
 *         lseek(2), SEEK_HOLE                     23
 *         how many pages there are (cachestat)     6
 *
 * Pages that were allocated and never written (fallocate) are holes to lseek, and pages to cachestat. So some are asked about one by
 * one, all over the range: one in a hundred of such pages is found as likely as not, and any smaller number is not worth the search,
 * since "data" is never wrong, and costs no more than to read zeroes.
 *
 * Units:     bytes.
 * Ownership: the descriptor is borrowed for the call. Its position is moved.
 * Errno:     false: not so, or nobody knows (cachestat came with Linux 6.5).
 * Threads:   any.
 */
#ifndef BG_DENSE_H
#define BG_DENSE_H

#include <stdint.h>

/* cffi:begin */
int bg_is_dense(int fd, int64_t offset, int64_t length);
/* cffi:end */

#endif
