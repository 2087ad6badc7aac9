/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "windows.h"

#include "io.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define WINDOW_SHIFT 30
#define WINDOW ((int64_t)1 << WINDOW_SHIFT)
#define WINDOWS 1024 /* bytes past these are not found */
#define PAGES 256    /* asked about at once */

struct bg_windows {
    int fd;
    int64_t page;
    _Atomic(char *) windows[WINDOWS]; /* NULL: not mapped yet; MAP_FAILED: can not be */
};

/* mincore(2) says of files of others that everything is in memory. */
static bool tells_what_is_in_memory(int fd)
{
    struct stat st;
    int flags = fcntl(fd, F_GETFL);
    return flags >= 0 && ((flags & O_ACCMODE) == O_RDWR || (fstat(fd, &st) == 0 && st.st_uid == geteuid()));
}

int bg_windows_new(int fd, bg_windows **out)
{
    if (bg_haste_of(fd) != BG_HASTE_ALL || !tells_what_is_in_memory(fd))
        return -ENOTSUP;
    bg_windows *w = calloc(1, sizeof(*w));
    if (!w)
        return -ENOMEM;
    w->fd = fd;
    w->page = sysconf(_SC_PAGESIZE);
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
    free(w);
}

static char *window_of(bg_windows *w, int64_t number)
{
    char *window = atomic_load(&w->windows[number]);
    if (!window) {
        char *made = mmap(NULL, (size_t)WINDOW, PROT_READ, MAP_SHARED, w->fd, number << WINDOW_SHIFT);
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
    return window && is_in_memory(window + within - lead, lead + length, w->page) ? window + within : NULL;
}
