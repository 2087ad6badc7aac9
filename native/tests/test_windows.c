/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* Files in memory, mapped: what is found, and what is read and written there, while others cut the file off and make holes. */
#define _GNU_SOURCE
#include "driver.h"

#include "extent_map.h"
#include "windows.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define KIB 1024
#define SIZE (4096 * KIB)
#define HOLE (1024 * KIB)
#define HOLE_END (2048 * KIB)
#define PAGE 4096
#define LONG (16 * KIB) /* the shortest write that is stored alone */
#define GIB ((int64_t)1 << 30)
/* Tries after one that found a hole, until the next is made. */
#define PAUSE 64
/* Writes that count as if they met others, after two that did. */
#define CROWDED 64

static int fd;
static char data[SIZE], got[SIZE];

static int64_t blocks(void)
{
    struct stat st;
    CHECK(fstat(fd, &st) == 0);
    return st.st_blocks;
}

static void test_found(void)
{
    bg_windows *windows;
    int pair[2];
    CHECK(pipe(pair) == 0);
    CHECK(bg_windows_new(pair[0], &windows) == -ENOTSUP);
    close(pair[0]);
    close(pair[1]);
    CHECK(bg_windows_new(fd, &windows) == 0);
    int64_t before = blocks();
    CHECK(bg_windows_find(windows, 0, HOLE) != NULL);
    CHECK(bg_windows_find(windows, 5, 1) != NULL && bg_windows_find(windows, 4095, 2) != NULL);
    CHECK(!bg_windows_find(windows, HOLE - 1, 2) && !bg_windows_find(windows, HOLE, HOLE_END - HOLE));
    CHECK(!bg_windows_find(windows, HOLE_END - 1, 4096) && bg_windows_find(windows, HOLE_END, SIZE - HOLE_END));
    CHECK(!bg_windows_find(windows, SIZE - 4096, 4097) && !bg_windows_find(windows, SIZE, 1));
    CHECK(!bg_windows_find(windows, -1, 1) && !bg_windows_find(windows, 0, 0) && !bg_windows_find(windows, 0, INT64_MAX));
    CHECK(!bg_windows_find(windows, GIB - 1, 2) && !bg_windows_find(windows, INT64_MAX - 1, 1));
    CHECK(blocks() == before);
    /* Who may not write the file is not told what is in memory: nothing is found then. */
    if (geteuid() == 0) {
        CHECK(fchmod(fd, 0600) == 0 && seteuid(65534) == 0);
        CHECK(!bg_windows_find(windows, HOLE, 4096) && !bg_windows_find(windows, 0, 4096));
        CHECK(seteuid(0) == 0);
        CHECK(!bg_windows_find(windows, HOLE, 4096) && bg_windows_find(windows, 0, 4096));
    }
    /* What the header promises of a file that is cut off. */
    const void *last = bg_windows_find(windows, SIZE - 4096, 4096);
    CHECK(last != NULL && socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0 && ftruncate(fd, SIZE - 4096) == 0);
    struct iovec iov = {(void *)(uintptr_t)last, 4096};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};
    CHECK(sendmsg(pair[0], &message, MSG_NOSIGNAL) == -1 && errno == EFAULT);
    CHECK(!bg_windows_find(windows, SIZE - 4096, 4096));
    CHECK(pwrite(fd, data + SIZE - 4096, 4096, SIZE - 4096) == 4096 && bg_windows_find(windows, SIZE - 4096, 4096));
    close(pair[0]);
    close(pair[1]);
    bg_windows_free(windows);
    bg_windows_free(NULL);
}

/* A file that was mapped by who only reads it may still be sealed, or its file system made read-only. */
static void test_only_read(void)
{
    bg_windows *windows;
    char name[64];
    int sealed = memfd_create("sealed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    snprintf(name, sizeof(name), "/proc/self/fd/%d", sealed);
    int reading = open(name, O_RDONLY | O_CLOEXEC);
    CHECK(pwrite(sealed, data, 4096, 0) == 4096 && bg_windows_new(reading, &windows) == 0);
    CHECK(bg_windows_find(windows, 0, 4096) != NULL && fcntl(sealed, F_ADD_SEALS, F_SEAL_WRITE) == 0);
    CHECK(bg_windows_load(windows, got, 4096, 0) == 0 && memcmp(got, data, 4096) == 0);
    CHECK(bg_windows_store(windows, data, 4096, 0) == -EAGAIN && !bg_windows_can_store(windows, 0, 4096));
    bg_windows_free(windows);
    /* And one that was sealed before, by who thinks that he may write it. */
    CHECK(bg_windows_new(sealed, &windows) == 0 && bg_windows_store(windows, data, 4096, 0) == -EAGAIN);
    CHECK(bg_windows_load(windows, got, 4096, 0) == -EAGAIN && !bg_windows_find(windows, 0, 4096));
    bg_windows_free(windows);
    close(sealed);
    close(reading);
}

/* As often as it takes: after a hole the next are not tried. */
static int store(bg_windows *windows, const void *buf, int64_t length, int64_t offset)
{
    int ret = -EAGAIN;
    for (int i = 0; i <= PAUSE && ret != 0; i++)
        ret = bg_windows_store(windows, buf, length, offset);
    return ret;
}

static int load(bg_windows *windows, void *buf, int64_t length, int64_t offset)
{
    int ret = -EAGAIN;
    for (int i = 0; i <= PAUSE && ret != 0; i++)
        ret = bg_windows_load(windows, buf, length, offset);
    return ret;
}

static void test_loads_and_stores(void)
{
    bg_windows *windows;
    CHECK(bg_windows_new(fd, &windows) == 0);
    int64_t before = blocks();
    /* Holes are neither read nor written, and nothing around them is made of them. */
    CHECK(load(windows, got, HOLE, 0) == 0 && memcmp(got, data, HOLE) == 0);
    CHECK(load(windows, got, 2, HOLE - 1) == -EAGAIN && store(windows, data, 2, HOLE - 1) == -EAGAIN);
    CHECK(load(windows, got, PAGE, HOLE) == -EAGAIN && store(windows, data, PAGE, HOLE_END - PAGE) == -EAGAIN);
    CHECK(load(windows, got, 1, HOLE_END) == 0 && load(windows, got, PAGE, SIZE - PAGE + 1) == -EAGAIN);
    CHECK(load(windows, got, 1, 0) == 0 && bg_windows_can_store(windows, 0, 1) && !bg_windows_can_store(windows, HOLE, 1));
    uint64_t random = 3;
    for (int i = 0; i < 500; i++) {
        int64_t length = (int64_t)(next_random(&random) % (i % 3 ? 9000 : HOLE - 1)) + 1;
        int64_t at = (int64_t)(next_random(&random) % (uint64_t)(HOLE - length + 1)) + (i % 2 ? HOLE_END : 0);
        memset(data + at, i | 1, (size_t)length);
        CHECK(store(windows, data + at, length, at) == 0);
        CHECK(load(windows, got, length, at) == 0 && memcmp(got, data + at, (size_t)length) == 0);
    }
    CHECK(pread(fd, got, SIZE, 0) == SIZE && memcmp(got, data, SIZE) == 0 && blocks() == before);
    /* After a hole the next are left to the descriptor. */
    CHECK(bg_windows_load(windows, got, 1, HOLE) == -EAGAIN);
    for (int i = 0; i < PAUSE; i++)
        CHECK(bg_windows_load(windows, got, 1, 0) == -EAGAIN);
    CHECK(bg_windows_load(windows, got, 1, 0) == 0);
    bg_windows_free(windows);
}

static void test_writes_that_meet(void)
{
    bg_windows *windows;
    CHECK(bg_windows_new(fd, &windows) == 0);
    CHECK(!bg_windows_begin_write(windows));
    bg_windows_end_write(windows);
    CHECK(!bg_windows_begin_write(windows) && bg_windows_begin_write(windows));
    bg_windows_end_write(windows);
    bg_windows_end_write(windows);
    for (int i = 0; i < CROWDED; i++) {
        CHECK(bg_windows_begin_write(windows));
        bg_windows_end_write(windows);
    }
    CHECK(!bg_windows_begin_write(windows));
    bg_windows_end_write(windows);
    bg_windows_free(windows);
}

/* A file that ends inside a page has no more of it than that. */
static void test_end_inside_a_page(void)
{
    bg_windows *windows;
    CHECK(bg_windows_new(fd, &windows) == 0 && ftruncate(fd, SIZE - PAGE / 2) == 0);
    int64_t end = SIZE - PAGE / 2;
    CHECK(store(windows, data, 100, end - 100) == 0 && load(windows, got, 100, end - 100) == 0 && memcmp(got, data, 100) == 0);
    CHECK(store(windows, data, 101, end - 100) == -EAGAIN && load(windows, got, 101, end - 100) == -EAGAIN);
    CHECK(store(windows, data, 1, end) == -EAGAIN && !bg_windows_find(windows, end, 1));
    CHECK(bg_windows_find(windows, HOLE_END, end - HOLE_END) && !bg_windows_find(windows, HOLE_END, end + 1 - HOLE_END));
    CHECK(pread(fd, got, PAGE, SIZE - PAGE) == PAGE / 2 && pwrite(fd, data + end, PAGE / 2, end) == PAGE / 2);
    CHECK(store(windows, data + end - 100, PAGE / 2 + 100, end - 100) == 0);
    bg_windows_free(windows);
}

/* A huge page may go on behind the file's end, and all of it is in memory. */
static void test_end_inside_a_huge_page(void)
{
    const int64_t huge = 2048 * KIB, end = HOLE + 100;
    bg_windows *windows;
    int file = memfd_create("huge", MFD_CLOEXEC);
    char *room = mmap(NULL, (size_t)(2 * huge), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(pwrite(file, data, (size_t)end, 0) == end && room != MAP_FAILED && bg_windows_new(file, &windows) == 0);
    char *at = (char *)(((uintptr_t)room + (uintptr_t)huge - 1) / (uintptr_t)huge * (uintptr_t)huge);
    CHECK(mmap(at, (size_t)huge, PROT_READ, MAP_SHARED | MAP_FIXED, file, 0) == at);
    (void)madvise(at, (size_t)huge, 25 /* MADV_COLLAPSE: not of every kernel, then it is an ordinary file */);
    CHECK(store(windows, data, 100, end - 100) == 0);
    CHECK(store(windows, data, 101, end - 100) == -EAGAIN && store(windows, data, 100, end + 8 * KIB) == -EAGAIN);
    CHECK(load(windows, got, 100, end + 8 * KIB) == -EAGAIN && !bg_windows_find(windows, end + 8 * KIB, 1));
    CHECK(munmap(room, (size_t)(2 * huge)) == 0);
    bg_windows_free(windows);
    close(file);
}

/* Who may only read the file is told that holes are in memory, too. */
static void test_who_may_only_read(void)
{
    if (geteuid() != 0)
        return;
    bg_windows *windows, *others;
    char name[64];
    snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
    int reading = open(name, O_RDONLY | O_CLOEXEC);
    CHECK(bg_windows_new(reading, &windows) == 0 && bg_windows_new(fd, &others) == 0 && fchmod(fd, 0644) == 0);
    int64_t before = blocks();
    for (int i = 0; i < 100; i++)
        (void)bg_windows_load(others, got, PAGE, 0);
    CHECK(seteuid(65534) == 0);
    for (int i = 0; i < 300; i++)
        CHECK(bg_windows_load(windows, got, PAGE, HOLE + i % 100 * PAGE) == -EAGAIN);
    CHECK(seteuid(0) == 0 && blocks() == before);
    bg_windows_free(windows);
    bg_windows_free(others);
    close(reading);
}

static int64_t modified(void)
{
    struct stat st;
    CHECK(fstat(fd, &st) == 0);
    return st.st_mtim.tv_sec;
}

static void set_old(void)
{
    const struct timespec old[2] = {{1, 0}, {1, 0}};
    CHECK(futimens(fd, old) == 0);
}

static void test_times(void)
{
    bg_windows *windows;
    CHECK(bg_windows_new(fd, &windows) == 0);
    set_old();
    CHECK(load(windows, got, PAGE, 0) == 0 && modified() == 1);
    /* The first store tells at once, the rest when it is flushed, or at the end. */
    CHECK(store(windows, data, PAGE, 0) == 0 && modified() > 1);
    set_old();
    CHECK(store(windows, data, PAGE, 0) == 0 && modified() == 1);
    bg_windows_touch(windows);
    CHECK(modified() > 1);
    set_old();
    bg_windows_touch(windows);
    CHECK(modified() == 1);
    CHECK(store(windows, data, PAGE, 0) == 0 && modified() > 1);
    set_old();
    CHECK(store(windows, data, PAGE, 0) == 0 && modified() == 1);
    bg_windows_free(windows);
    CHECK(modified() > 1);
    /* A flush by the map, too. */
    bg_map *map;
    CHECK(bg_windows_new(fd, &windows) == 0 && bg_map_new(SIZE, BG_MAP_MIN_MEMORY, &map) == 0);
    int slot = bg_map_add_slot(map, fd, 1, 1);
    CHECK(slot == 0 && bg_map_set_windows(map, slot, windows) == 0);
    CHECK(bg_map_insert(map, bg_map_generation(map), &(bg_map_extent){0, SIZE, 0, slot, BG_MAP_WRITABLE}, 1) == 1);
    bg_map_flushed(map, bg_map_dirt(map));
    CHECK(bg_map_pwrite(map, 0, data, LONG) == 0);
    set_old();
    CHECK(bg_map_pwrite(map, 0, data, LONG) == 0 && modified() == 1);
    /* A short one is stored when there are others. */
    CHECK(!bg_windows_begin_write(windows) && bg_map_pwrite(map, 0, data, LONG - 1) == 0 && modified() == 1);
    bg_windows_end_write(windows);
    for (int i = 0; i < CROWDED; i++)
        CHECK(bg_map_pwrite(map, 0, data, 1) == 0 && modified() == 1);
    CHECK(bg_map_pwrite(map, 0, data, LONG - 1) == 0 && modified() > 1);
    set_old();
    CHECK(bg_map_flush(map, 1) == 0 && modified() > 1);
    bg_map_wait(map, bg_map_remove_slot(map, slot));
    CHECK(bg_map_free(map) == 0);
    bg_windows_free(windows);
}

static bg_map *map;
static atomic_bool over;

/* Half of the file. What is read may be old, new or zeroes; that it is, and that we live, is all. */
static void *use(void *arg)
{
    static _Thread_local char buf[64 * KIB];
    int64_t start = arg ? SIZE / 2 : 0;
    uint64_t random = (uint64_t)start + 1;
    while (!atomic_load(&over)) {
        int64_t length = (int64_t)(next_random(&random) % sizeof(buf)) + 1;
        int64_t at = start + (int64_t)(next_random(&random) % (uint64_t)(SIZE / 2 - length));
        memset(buf, 0x11, sizeof(buf));
        CHECK((next_random(&random) % 2 ? bg_map_pread(map, at, buf, length) : bg_map_pwrite(map, at, buf, length)) == 0);
    }
    return NULL;
}

static void test_cut_off_in_the_middle(void)
{
    bg_windows *windows;
    pthread_t threads[2];
    CHECK(bg_windows_new(fd, &windows) == 0 && bg_map_new(SIZE, BG_MAP_MIN_MEMORY, &map) == 0);
    int slot = bg_map_add_slot(map, fd, 1, 1);
    CHECK(slot == 0 && bg_map_set_windows(map, slot, windows) == 0);
    CHECK(bg_map_insert(map, bg_map_generation(map), &(bg_map_extent){0, SIZE, 0, slot, BG_MAP_WRITABLE}, 1) == 1);
    for (int i = 0; i < 2; i++)
        CHECK(pthread_create(&threads[i], NULL, use, i ? &over : NULL) == 0);
    memset(data, 0x22, SIZE);
    for (int i = 0; i < 200; i++) {
        CHECK(ftruncate(fd, i % 2 ? 0 : SIZE / 2) == 0);
        CHECK(pwrite(fd, data, SIZE, 0) == SIZE);
        CHECK(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, HOLE, HOLE_END - HOLE) == 0);
    }
    atomic_store(&over, true);
    for (int i = 0; i < 2; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(pread(fd, got, SIZE, 0) == SIZE);
    for (size_t i = 0; i < SIZE; i++)
        CHECK(got[i] == 0 || got[i] == 0x11 || got[i] == 0x22);
    bg_map_wait(map, bg_map_remove_slot(map, slot));
    CHECK(bg_map_free(map) == 0);
    bg_windows_free(windows);
}

void test_windows(void)
{
    fd = file_with_hole(data, SIZE, HOLE, HOLE_END);
    test_found();
    test_only_read();
    test_loads_and_stores();
    test_writes_that_meet();
    test_end_inside_a_page();
    test_end_inside_a_huge_page();
    test_who_may_only_read();
    test_times();
    test_cut_off_in_the_middle();
    close(fd);
}
