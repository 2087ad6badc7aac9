/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "windows.h"

#include "guard.h"
#include "io.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define WINDOW_SHIFT 30
#define WINDOW ((int64_t)1 << WINDOW_SHIFT)
#define WINDOWS 1024 /* bytes past these are not found */
#define PAGES 256    /* asked about at once */
#define NOWHERE ((off_t)1 << 60)
/* Loads and stores after one has found that mincore(2) tells the truth, which takes as long as to ask it, that believe it. */
#define TRUSTED 16
/* After one of what was not in memory, so many more are not tried: most of a file that has holes may be one. */
#define PAUSE 64
/* Writes after two that met. */
#define CROWDED 64

struct bg_windows {
    int fd;
    int64_t page;
    char *nowhere; /* a page that no file has */
    bool writable;
    atomic_int trusted, pause; /* counted by many threads, which may lose some of it */
    atomic_bool stored; /* since its times were set */
    atomic_int writes;  /* under way */
    atomic_int crowded; /* so many more count as if they met others */
    _Atomic(char *) windows[WINDOWS]; /* NULL: not mapped yet; MAP_FAILED: can not be */
};

/* A description of its own: the mappings keep it, and must not keep one that others think is closed. */
static int open_again(int fd, bool writable)
{
    char name[64];
    snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
    return open(name, (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC);
}

int bg_windows_new(int fd, bg_windows **out)
{
    if (bg_haste_of(fd) != BG_HASTE_ALL)
        return -ENOTSUP;
    bg_windows *w = calloc(1, sizeof(*w));
    if (!w)
        return -ENOMEM;
    w->page = sysconf(_SC_PAGESIZE);
    w->writable = (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDWR;
    w->fd = open_again(fd, w->writable);
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

int bg_windows_writable(const bg_windows *w)
{
    return w->writable;
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
    bg_windows_touch(w);
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
static char *map_window(const bg_windows *w, int64_t offset)
{
    const int access = w->writable ? PROT_READ | PROT_WRITE : PROT_READ;
    void *made = mmap(NULL, (size_t)WINDOW, PROT_NONE, MAP_SHARED, w->fd, offset);
    if (made == MAP_FAILED)
        return MAP_FAILED;
    if (munlock(made, (size_t)WINDOW) < 0 || mprotect(made, (size_t)WINDOW, access) < 0) {
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
        char *made = map_window(w, number << WINDOW_SHIFT);
        if (atomic_compare_exchange_strong(&w->windows[number], &window, made))
            window = made;
        else
            unmap(made);
    }
    return window == MAP_FAILED ? NULL : window;
}

/* How many of so many pages, from the first on, are in memory. */
static int64_t in_memory(const bg_windows *w, char *start, int64_t pages)
{
    unsigned char in[PAGES];
    for (int64_t done = 0, n; done < pages; done += n) {
        n = pages - done < PAGES ? pages - done : PAGES;
        if (mincore(start + done * w->page, (size_t)(n * w->page), in) < 0)
            return done;
        for (int64_t i = 0; i < n; i++)
            if (!(in[i] & 1))
                return done + i;
    }
    return pages;
}

/* mincore(2) says of whoever may not write the file that everything is in memory. */
static bool tells_the_truth(const bg_windows *w)
{
    return in_memory(w, w->nowhere, 1) == 0;
}

static int64_t file_size(const bg_windows *w)
{
    struct stat st;
    return fstat(w->fd, &st) == 0 ? st.st_size : 0;
}

static char *find(bg_windows *w, int64_t offset, int64_t length)
{
    char *window = window_of(w, offset >> WINDOW_SHIFT);
    if (!window)
        return NULL;
    int64_t within = offset & (WINDOW - 1), first = within / w->page, pages = (within + length - 1) / w->page + 1 - first;
    /* What is behind the file's end in its last page, which may be a huge one, is in memory, but nowhere else. */
    return in_memory(w, window + first * w->page, pages) == pages && offset + length <= file_size(w) ? window + within : NULL;
}

static bool in_one_window(int64_t offset, int64_t length)
{
    return offset >= 0 && length > 0 && length <= WINDOW && offset >> WINDOW_SHIFT < WINDOWS &&
           (offset + length - 1) >> WINDOW_SHIFT == offset >> WINDOW_SHIFT;
}

const void *bg_windows_find(bg_windows *w, int64_t offset, int64_t length)
{
    return in_one_window(offset, length) && tells_the_truth(w) ? find(w, offset, length) : NULL;
}

static int less(atomic_int *counter)
{
    int now = atomic_load_explicit(counter, memory_order_relaxed);
    if (now > 0)
        atomic_store_explicit(counter, now - 1, memory_order_relaxed);
    return now;
}

/* For one of many. */
static char *find_often(bg_windows *w, int64_t offset, int64_t length)
{
    if (!in_one_window(offset, length) || !bg_guard_ready() || less(&w->pause) > 0)
        return NULL;
    bool told = less(&w->trusted) > 0;
    if (!told && (told = tells_the_truth(w)))
        atomic_store_explicit(&w->trusted, TRUSTED, memory_order_relaxed);
    char *found = told ? find(w, offset, length) : NULL;
    if (!found)
        atomic_store_explicit(&w->pause, PAUSE, memory_order_relaxed);
    return found;
}

int bg_windows_load(bg_windows *w, void *buf, int64_t length, int64_t offset)
{
    const char *from = find_often(w, offset, length);
    return from && bg_guard_load(buf, from, (size_t)length) == 0 ? 0 : -EAGAIN;
}

bool bg_windows_begin_write(bg_windows *w)
{
    bool meets = atomic_fetch_add_explicit(&w->writes, 1, memory_order_relaxed) > 0;
    if (meets)
        atomic_store_explicit(&w->crowded, CROWDED, memory_order_relaxed);
    return meets || less(&w->crowded) > 0;
}

void bg_windows_end_write(bg_windows *w)
{
    atomic_fetch_sub_explicit(&w->writes, 1, memory_order_relaxed);
}

bool bg_windows_can_store(bg_windows *w, int64_t offset, int64_t length)
{
    return w->writable && find_often(w, offset, length);
}

static void set_times(const bg_windows *w)
{
    (void)futimens(w->fd, NULL); /* who may write the file may do that */
}

int bg_windows_store(bg_windows *w, const void *buf, int64_t length, int64_t offset)
{
    char *to = w->writable ? find_often(w, offset, length) : NULL;
    if (!to)
        return -EAGAIN;
    /* As a system call does, once, for whoever knows files by their times (a bitmap's sidecar), even if we are killed now. */
    if (!atomic_load(&w->stored) && !atomic_exchange(&w->stored, true))
        set_times(w);
    int ret = bg_guard_store(to, buf, (size_t)length);
    /* There was a flush meanwhile: the next will find it. */
    if (!atomic_load(&w->stored))
        atomic_store(&w->stored, true);
    return ret == 0 ? 0 : -EAGAIN;
}

void bg_windows_touch(bg_windows *w)
{
    if (atomic_exchange(&w->stored, false))
        set_times(w);
}
