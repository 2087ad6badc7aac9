/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "windows.h"

#include "io.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define WINDOW_SHIFT 30
#define WINDOW ((int64_t)1 << WINDOW_SHIFT)
#define WINDOWS 1024 /* bytes past these are not found */
#define PAGES 256    /* asked about at once */
#define NOWHERE ((off_t)1 << 60)

struct bg_windows {
    int fd;
    int64_t page;
    char *nowhere; /* a page that no file has */
    _Atomic(char *) windows[WINDOWS]; /* NULL: not mapped yet; MAP_FAILED: can not be */
};

/* A description of its own: the mappings keep it, and must not keep one that others think is closed, or that may write. */
static int open_again(int fd)
{
    char name[64];
    snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
    return open(name, O_RDONLY | O_CLOEXEC);
}

int bg_windows_new(int fd, bg_windows **out)
{
    if (bg_haste_of(fd) != BG_HASTE_ALL)
        return -ENOTSUP;
    bg_windows *w = calloc(1, sizeof(*w));
    if (!w)
        return -ENOMEM;
    w->page = sysconf(_SC_PAGESIZE);
    w->fd = open_again(fd);
    w->nowhere = w->fd < 0 ? MAP_FAILED : mmap(NULL, (size_t)w->page, PROT_NONE, MAP_SHARED, w->fd, NOWHERE);
    if (w->nowhere == MAP_FAILED) {
        if (w->fd >= 0)
            close(w->fd);
        free(w);
        return -ENOTSUP;
    }
    *out = w;
    return 0;
}

static void unmap(char *window)
{
    if (window && window != MAP_FAILED)
        munmap(window, (size_t)WINDOW);
}

void bg_windows_free(bg_windows *w)
{
    if (!w)
        return;
    for (int i = 0; i < WINDOWS; i++)
        unmap(atomic_load(&w->windows[i]));
    munmap(w->nowhere, (size_t)w->page);
    close(w->fd);
    free(w);
}

/*
 * In a program that locks all memory it will ever map (mlockall), the kernel would fill the file's holes at once. What can not be
 * accessed it leaves alone.
 */
static char *map_window(int fd, int64_t offset)
{
    void *made = mmap(NULL, (size_t)WINDOW, PROT_NONE, MAP_SHARED, fd, offset);
    if (made == MAP_FAILED)
        return MAP_FAILED;
    if (munlock(made, (size_t)WINDOW) < 0 || mprotect(made, (size_t)WINDOW, PROT_READ) < 0) {
        munmap(made, (size_t)WINDOW);
        return MAP_FAILED;
    }
    madvise(made, (size_t)WINDOW, MADV_DONTDUMP); /* what a guest has is not for core dumps */
    return made;
}

static char *window_of(bg_windows *w, int64_t number)
{
    char *window = atomic_load(&w->windows[number]);
    if (!window) {
        char *made = map_window(w->fd, number << WINDOW_SHIFT);
        if (atomic_compare_exchange_strong(&w->windows[number], &window, made))
            window = made;
        else
            unmap(made);
    }
    return window == MAP_FAILED ? NULL : window;
}

static bool is_in_memory(char *start, int64_t length, int64_t page)
{
    unsigned char in[PAGES];
    for (int64_t done = 0, n; done < length; done += n) {
        n = length - done < PAGES * page ? length - done : PAGES * page;
        if (mincore(start + done, (size_t)n, in) < 0)
            return false;
        for (int64_t i = 0; i * page < n; i++)
            if (!(in[i] & 1))
                return false;
    }
    return true;
}

const void *bg_windows_find(bg_windows *w, int64_t offset, int64_t length)
{
    int64_t number = offset >> WINDOW_SHIFT;
    if (offset < 0 || length <= 0 || length > WINDOW || number >= WINDOWS || (offset + length - 1) >> WINDOW_SHIFT != number)
        return NULL;
    char *window = window_of(w, number);
    int64_t within = offset & (WINDOW - 1), lead = within % w->page;
    /* mincore(2) says of whoever may not write the file, now, that everything is in memory. */
    if (!window || is_in_memory(w->nowhere, 1, w->page) || !is_in_memory(window + within - lead, lead + length, w->page))
        return NULL;
    return window + within;
}
