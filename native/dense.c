/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "dense.h"

#include "io.h"

#include <stdbool.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_cachestat
#define SYS_cachestat 451
#endif

/* Asked about one by one, evenly spread. */
#define PAGES 64

/* As the kernel has them; see cachestat(2). */
typedef struct {
    uint64_t offset, length;
} stat_range;

typedef struct {
    uint64_t cached, dirty, written_back, evicted, recently_evicted;
} stat_counts;

static bool has_pages(int fd, int64_t first, int64_t count, int64_t page)
{
    stat_range range = {(uint64_t)(first * page), (uint64_t)(count * page)};
    stat_counts counts = {0};
    return syscall(SYS_cachestat, fd, &range, &counts, 0) == 0 && counts.cached == (uint64_t)count;
}

int bg_is_dense(int fd, int64_t offset, int64_t length)
{
    if (offset < 0 || length <= 0 || length > INT64_MAX - offset || bg_haste_of(fd) != BG_HASTE_ALL)
        return false;
    int64_t page = sysconf(_SC_PAGESIZE), first = offset / page, count = (offset + length - 1) / page + 1 - first;
    if (!has_pages(fd, first, count, page))
        return false;
    for (int64_t i = 0; i < PAGES; i++) {
        int64_t at = (first + (count - 1) * i / (PAGES - 1)) * page;
        if (lseek(fd, at, SEEK_DATA) != at)
            return false;
    }
    return true;
}
