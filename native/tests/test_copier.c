/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Copy before write: what one copier does step by step, then guests that write through two maps while a job copies and
 * somebody reads the old bytes. The source starts as OLD everywhere, guests write NEW: the target has to end up all OLD, and
 * a read under a frozen range has to see nothing else.
 */
#define _GNU_SOURCE
#include "driver.h"
#include "copier.h"
#include "io.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define CLUSTER 4096
#define CLUSTERS 1024
#define SIZE ((int64_t)CLUSTERS * CLUSTER - 1000) /* the last cluster is short */
#define SHIFT 512
#define GUESTS 3
#define WRITES_EACH 3000
#define OLD 0x11
#define NEW 0x22

static int source_fd, target_fd;
static bg_map *source, *target, *guest[2];
static bg_bitmap *todo, *done;
static bg_copier *copier;
static bg_copier_link *links[2];
static _Atomic int64_t copied_slowly;
static atomic_int guests_left;

static bg_map *map_of(int64_t size, int64_t shift, int fd, int flags, bg_map_copier *hook)
{
    bg_map *map;
    /* Room for what cannot be given back while a thread that looks is kept from running: else extents go, and nobody fills them again. */
    CHECK(bg_map_new(size, 1 << 28, &map) == 0);
    bg_map_extent e = {shift > 0 ? shift : 0, SIZE, 0, bg_map_add_slot(map, fd, 1, 1), flags};
    e.length = e.offset + e.length > size ? size - e.offset : e.length;
    CHECK(bg_map_insert(map, bg_map_generation(map), &e, 1) == 1);
    if (hook)
        CHECK(bg_map_set_copier(map, hook) > 0);
    return map;
}

static void begin(int target_flags)
{
    static char block[CLUSTER];
    memset(block, OLD, sizeof(block));
    source_fd = memfd_create("source", MFD_CLOEXEC);
    target_fd = memfd_create("target", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    CHECK(source_fd >= 0 && target_fd >= 0 && ftruncate(target_fd, SIZE) == 0);
    for (int64_t at = 0; at < SIZE; at += CLUSTER)
        CHECK(bg_pwrite(source_fd, block, SIZE - at < CLUSTER ? SIZE - at : CLUSTER, at) > 0);
    CHECK(bg_bitmap_new(SIZE, CLUSTER, &todo) == 0 && bg_bitmap_new(SIZE, CLUSTER, &done) == 0);
    CHECK(bg_bitmap_fill(todo) == 0);
    source = map_of(SIZE, 0, source_fd, BG_MAP_WRITABLE, NULL);
    target = map_of(SIZE, 0, target_fd, target_flags, NULL);
    CHECK(bg_copier_new(todo, done, source, target, &copier) == 0);
    CHECK(bg_copier_link_new(copier, 0, NULL, &links[0]) == 0 && bg_copier_link_new(copier, SHIFT, NULL, &links[1]) == 0);
    guest[0] = map_of(SIZE, 0, source_fd, BG_MAP_WRITABLE | BG_MAP_COPY, bg_copier_link_hook(links[0]));
    guest[1] = map_of(SIZE, SHIFT, source_fd, BG_MAP_WRITABLE | BG_MAP_COPY, bg_copier_link_hook(links[1]));
    bg_copier_set_mode(copier, BG_COPIER_ON);
}

static void end(void)
{
    CHECK(bg_map_free(guest[0]) == 0 && bg_map_free(guest[1]) == 0);
    bg_copier_link_free(links[0]);
    bg_copier_link_free(links[1]);
    CHECK(bg_copier_free(copier) == 0);
    CHECK(bg_map_free(source) == 0 && bg_map_free(target) == 0);
    bg_bitmap_free(todo);
    bg_bitmap_free(done);
    close(source_fd);
    close(target_fd);
}

static char byte_at(int fd, int64_t at)
{
    char byte;
    CHECK(bg_pread(fd, &byte, 1, at) == 1);
    return byte;
}

static int write_at(int map, int64_t at)
{
    return bg_map_pwrite(guest[map], at + (map ? SHIFT : 0), &(char){NEW}, 1);
}

static int write_now_at(int map, int64_t at)
{
    return bg_map_first_write_now(guest[map], at + (map ? SHIFT : 0), &(char){NEW}, NULL, 1, INT64_MAX);
}

static void copies_once_then_writes_in_place(void)
{
    begin(BG_MAP_WRITABLE);
    bg_copier_stats stats;
    bg_map_extent e;
    CHECK(write_at(0, 5) == 0);
    CHECK(byte_at(target_fd, 5) == OLD && byte_at(source_fd, 5) == NEW);
    CHECK(bg_bitmap_get(todo, 0) == 0 && bg_bitmap_get(done, 0) == 1);
    CHECK(bg_map_find(guest[0], 0, &e) && e.flags == BG_MAP_WRITABLE && e.length == CLUSTER);
    /* The other map learns it when it asks; the last cluster ends with the disk. */
    CHECK(write_at(1, 7) == 0 && write_at(1, SIZE - 600) == 0);
    CHECK(byte_at(target_fd, SIZE - 600) == OLD && byte_at(source_fd, SIZE - 600) == NEW);
    bg_copier_get_stats(copier, &stats);
    CHECK(stats.copied == CLUSTER + SIZE % CLUSTER && stats.moved == stats.copied && stats.refused == 0);
    end();
}

static void zeroes_are_not_written_where_the_target_has_them(void)
{
    static const char zeroes[CLUSTER];
    begin(BG_MAP_WRITABLE);
    bg_copier_stats stats;
    CHECK(bg_pwrite(source_fd, zeroes, CLUSTER, CLUSTER) == CLUSTER);
    CHECK(bg_pwrite(source_fd, zeroes, CLUSTER, 8 * CLUSTER) == CLUSTER);
    CHECK(bg_pwrite(target_fd, &(char){NEW}, 1, 8 * CLUSTER) == 1);
    CHECK(write_at(0, CLUSTER) == 0 && write_at(0, 8 * CLUSTER) == 0);
    bg_copier_get_stats(copier, &stats);
    CHECK(stats.copied == 2 * CLUSTER && stats.moved == CLUSTER);
    CHECK(lseek(target_fd, 0, SEEK_DATA) == 8 * CLUSTER && byte_at(target_fd, 8 * CLUSTER) == 0);
    end();
}

static void zeroing_copies_first_where_it_is_possible(void)
{
    begin(BG_MAP_WRITABLE);
    bg_copier_stats stats;
    const int any = BG_MAP_PUNCH | BG_MAP_ZERO_RANGE | BG_MAP_WRITE_ZEROES;
    CHECK(bg_map_zero_now(guest[0], 5, 10, any, SIZE) == BG_MAP_MISS && bg_map_zero(guest[0], 5, 10, any) == BG_MAP_MISS);
    CHECK(bg_map_set_zeroing(guest[0], 0, BG_MAP_WRITE_ZEROES, 2 * CLUSTER) == 0);
    /* Not with less than all of it, nor a whole unit. */
    CHECK(bg_map_zero(guest[0], 5, 10, BG_MAP_PUNCH) == BG_MAP_MISS);
    CHECK(bg_map_zero_now(guest[0], 0, 2 * CLUSTER, any, SIZE) == BG_MAP_MISS && bg_map_zero(guest[0], 0, 2 * CLUSTER, any) == BG_MAP_MISS);
    bg_copier_get_stats(copier, &stats);
    CHECK(stats.copied == 0 && bg_bitmap_get(done, 0) == 0);
    CHECK(bg_map_zero_now(guest[0], 5, 2 * CLUSTER, any, SIZE) == -EAGAIN && bg_map_zero(guest[0], 5, 2 * CLUSTER, any) == 0);
    bg_copier_get_stats(copier, &stats);
    CHECK(stats.copied == 3 * CLUSTER && byte_at(target_fd, 5) == OLD && byte_at(target_fd, 3 * CLUSTER - 1) == OLD);
    CHECK(byte_at(source_fd, 4) == OLD && byte_at(source_fd, 5) == 0 && byte_at(source_fd, 2 * CLUSTER + 4) == 0 &&
          byte_at(source_fd, 2 * CLUSTER + 5) == OLD);
    /* In place now. */
    bg_map_stats before, after;
    bg_map_get_stats(guest[0], &before);
    CHECK(bg_map_zero(guest[0], CLUSTER, 2 * CLUSTER - 1, any) == 0);
    bg_map_get_stats(guest[0], &after);
    CHECK(after.first_writes == 1 && after.hits == before.hits + 1);
    /* A hole, as any other write in that. */
    CHECK(bg_map_set_zeroing(guest[0], 0, any, 2 * CLUSTER) == 0);
    CHECK(bg_map_zero(guest[0], 8 * CLUSTER, CLUSTER, BG_MAP_PUNCH) == 0);
    CHECK(byte_at(target_fd, 8 * CLUSTER) == OLD && lseek(source_fd, 8 * CLUSTER, SEEK_DATA) == 9 * CLUSTER);
    end();
}

static void leaves_to_python_what_is_pythons(void)
{
    bg_bitmap_extent run;
    begin(BG_MAP_WRITABLE);
    int64_t number = bg_copier_take(copier, CLUSTER, SIZE, CLUSTER, &run);
    CHECK(number > 0 && run.start == CLUSTER && run.end == 2 * CLUSTER);
    CHECK(write_at(0, CLUSTER) == BG_MAP_MISS && byte_at(source_fd, CLUSTER) == OLD);
    CHECK(bg_copier_claimed(copier, 0, SIZE) == number && bg_copier_pending(copier, CLUSTER, 2 * CLUSTER) == 1);
    CHECK(bg_copier_free(copier) == -EBUSY && bg_copier_watch(copier, 0, SIZE) == 0);
    CHECK(bg_copier_finish(copier, number, 0) == 0 && bg_copier_finish(copier, number, 0) == -ENOENT);
    CHECK(bg_bitmap_get(todo, CLUSTER) == 1 && bg_copier_claimed(copier, 0, SIZE) == 0);
    bg_copier_stats mine;
    CHECK(bg_copier_copy(copier, 3 * CLUSTER, 5 * CLUSTER, &mine) == 0 && byte_at(target_fd, 4 * CLUSTER) == OLD);
    CHECK(mine.copied > 0);
    CHECK(bg_copier_pending(copier, 3 * CLUSTER, 5 * CLUSTER) == 0 && bg_bitmap_get(done, 3 * CLUSTER) == 0);
    CHECK(bg_copier_copy(copier, 1, CLUSTER, &mine) == -EINVAL);
    /* Copied, but frozen: not to be overwritten. */
    int64_t frozen = bg_copier_freeze(copier, 2 * CLUSTER - 10, 5);
    CHECK(frozen > 0 && write_at(0, CLUSTER) == BG_MAP_MISS);
    CHECK(byte_at(target_fd, CLUSTER) == OLD && bg_bitmap_get(todo, CLUSTER) == 0 && bg_bitmap_get(done, CLUSTER) == 0);
    CHECK(bg_copier_release(copier, 0, 3 * CLUSTER) == 0);
    CHECK(bg_bitmap_get(done, 0) == 1 && bg_bitmap_get(done, CLUSTER) == 0 && bg_bitmap_get(done, 2 * CLUSTER) == 1);
    CHECK(bg_copier_thaw(copier, frozen) == 0 && bg_copier_release(copier, CLUSTER, 2 * CLUSTER) == 1);
    CHECK(bg_copier_freeze(copier, 2 * CLUSTER - 1, 1) == 0);
    CHECK(bg_copier_release(copier, 1, CLUSTER) == -EINVAL && bg_copier_freeze(copier, SIZE, 1) == -EINVAL);
    bg_copier_set_mode(copier, BG_COPIER_OFF);
    CHECK(write_at(0, 9 * CLUSTER) == BG_MAP_MISS && bg_bitmap_get(todo, 9 * CLUSTER) == 1);
    bg_copier_set_mode(copier, BG_COPIER_BROKEN);
    CHECK(write_at(0, 9 * CLUSTER) == 0 && bg_bitmap_get(todo, 9 * CLUSTER) == 1);
    end();
}

static void failed_copy_is_a_miss_and_stays_to_be_done(void)
{
    begin(0); /* nothing may be written to the target */
    CHECK(write_at(0, 0) == BG_MAP_MISS && bg_bitmap_get(todo, 0) == 1 && byte_at(source_fd, 0) == OLD);
    end();
    begin(BG_MAP_WRITABLE);
    CHECK(fcntl(target_fd, F_ADD_SEALS, F_SEAL_WRITE) == 0);
    CHECK(write_at(0, 0) == BG_MAP_MISS && bg_bitmap_get(todo, 0) == 1 && byte_at(source_fd, 0) == OLD);
    end();
}

/* What would have to wait leaves no trace but a pause; then it is tried again. */
static void copies_without_waiting_or_not_at_all(void)
{
    bg_copier_stats stats;
    bg_bitmap_extent run;
    bg_sums *sums;
    char name[64];
    begin(BG_MAP_WRITABLE);
    CHECK(bg_sums_new(SIZE, CLUSTER, &sums) == 0 && bg_copier_set_sums(copier, sums) == 0);
    CHECK(write_now_at(0, 5) == 0 && byte_at(target_fd, 5) == OLD && byte_at(source_fd, 5) == NEW);
    CHECK(bg_map_first_write_now(guest[0], CLUSTER, &(char){NEW}, NULL, 1, CLUSTER - 1) == -E2BIG);
    CHECK(write_now_at(0, 5) == BG_MAP_MISS && write_at(0, 5) == 0); /* a write in place now */
    /* Of a map with another shift, and the short last cluster. Two clusters, of which one is copied. */
    CHECK(write_now_at(1, SIZE - 600) == 0 && byte_at(target_fd, SIZE - 600) == OLD && byte_at(source_fd, SIZE - 600) == NEW);
    CHECK(write_now_at(1, CLUSTER) == 0);
    char two[2 * CLUSTER];
    memset(two, NEW, sizeof(two));
    CHECK(bg_map_first_write_now(guest[0], CLUSTER, two, NULL, 2 * CLUSTER, INT64_MAX) == 0);
    CHECK(byte_at(target_fd, 3 * CLUSTER - 1) == OLD && byte_at(source_fd, 3 * CLUSTER - 1) == NEW);
    bg_copier_get_stats(copier, &stats);
    CHECK(stats.copied == 3 * CLUSTER + SIZE % CLUSTER);
    /* Python's, and frozen. */
    int64_t number = bg_copier_take(copier, 4 * CLUSTER, SIZE, CLUSTER, &run);
    CHECK(number > 0 && write_now_at(0, 4 * CLUSTER) == BG_MAP_MISS && bg_copier_finish(copier, number, 0) == 0);
    int64_t frozen = bg_copier_freeze(copier, 4 * CLUSTER, 1);
    CHECK(frozen > 0 && write_now_at(0, 4 * CLUSTER) == BG_MAP_MISS && bg_copier_thaw(copier, frozen) == 0);
    CHECK(byte_at(source_fd, 4 * CLUSTER) == OLD && write_now_at(0, 4 * CLUSTER) == 0);
    bg_copier_get_stats(copier, &stats);
    CHECK(stats.refused == 0);
    /* A target that would be waited for. */
    snprintf(name, sizeof(name), "/proc/self/fd/%d", target_fd);
    int slow = open(name, O_RDWR | O_DSYNC | O_CLOEXEC);
    CHECK(slow >= 0);
    bg_map_extent fast, e;
    CHECK(bg_map_find(target, 0, &fast));
    CHECK(write_now_at(0, 10 * CLUSTER) == 0);
    CHECK(bg_map_first_write_now(guest[0], 6 * CLUSTER, &(char){NEW}, NULL, 1, 0) == -E2BIG);
    e = (bg_map_extent){0, SIZE, 0, bg_map_add_slot(target, slow, 1, 1), BG_MAP_WRITABLE};
    CHECK(bg_map_insert(target, bg_map_generation(target), &e, 1) == 1);
    CHECK(write_now_at(0, 6 * CLUSTER) == BG_MAP_MISS && byte_at(source_fd, 6 * CLUSTER) == OLD);
    CHECK(bg_map_first_write_now(guest[0], 6 * CLUSTER, &(char){NEW}, NULL, 1, 0) == BG_MAP_MISS); /* not heavy: it waits */
    CHECK(bg_bitmap_get(todo, 6 * CLUSTER) == 1 && bg_copier_claimed(copier, 0, SIZE) == 0);
    CHECK(write_at(0, 6 * CLUSTER) == 0 && byte_at(target_fd, 6 * CLUSTER) == OLD);
    e.slot = fast.slot;
    CHECK(bg_map_insert(target, bg_map_generation(target), &e, 1) == 1);
    int tries = 1;
    while (write_now_at(0, 8 * CLUSTER) != 0 && tries < 1000)
        tries++;
    CHECK(tries > 1 && tries < 1000 && byte_at(target_fd, 8 * CLUSTER) == OLD);
    CHECK(bg_sums_next_spoiled(sums, 0, &run) == 0);
    uint64_t sum[2], same[2], none[2];
    CHECK(bg_sums_read(sums, 8, 1, sum) == 0 && bg_sums_read(sums, 7, 1, none) == 0 && none[0] == 0 && none[1] == 0);
    CHECK(sum[0] != 0 && bg_sums_reset(sums, 8 * CLUSTER, CLUSTER) == 0);
    CHECK(bg_pread(target_fd, two, CLUSTER, 8 * CLUSTER) == CLUSTER && bg_sums_add(sums, 8 * CLUSTER, two, CLUSTER) == 0);
    CHECK(bg_sums_read(sums, 8, 1, same) == 0 && same[0] == sum[0] && same[1] == sum[1]);
    /* Copied at once, but what is written then would be waited for: no longer heavy. */
    snprintf(name, sizeof(name), "/proc/self/fd/%d", source_fd);
    int slow_source = open(name, O_RDWR | O_DSYNC | O_CLOEXEC);
    CHECK(slow_source >= 0);
    e = (bg_map_extent){20 * CLUSTER, CLUSTER, 20 * CLUSTER, bg_map_add_slot(guest[0], slow_source, 1, 1),
                        BG_MAP_WRITABLE | BG_MAP_COPY};
    CHECK(bg_map_insert(guest[0], bg_map_generation(guest[0]), &e, 1) == 1);
    CHECK(bg_copier_link_hook(links[0])->lately == CLUSTER && write_now_at(0, 20 * CLUSTER) == -EAGAIN);
    CHECK(bg_copier_link_hook(links[0])->lately == 0 && byte_at(target_fd, 20 * CLUSTER) == OLD);
    CHECK(write_at(0, 20 * CLUSTER) == 0 && byte_at(source_fd, 20 * CLUSTER) == NEW);
    /* Nothing but a look at a bitmap: somebody else has copied it. */
    bg_copier_stats one;
    CHECK(write_now_at(0, 21 * CLUSTER) == 0 && bg_copier_link_hook(links[0])->lately == CLUSTER);
    CHECK(bg_copier_copy(copier, 22 * CLUSTER, 23 * CLUSTER, &one) == 0 && one.moved == CLUSTER);
    CHECK(write_now_at(0, 22 * CLUSTER) == 0 && bg_copier_link_hook(links[0])->lately == 0);
    /* No longer than one may be kept for: only where it may wait. */
    char *many = malloc(64 * CLUSTER);
    memset(many, NEW, 64 * CLUSTER);
    CHECK(bg_map_first_write_now(guest[0], 100 * CLUSTER, many, NULL, 64 * CLUSTER, INT64_MAX) == BG_MAP_MISS);
    CHECK(bg_bitmap_get(todo, 100 * CLUSTER) == 1 && bg_map_pwrite(guest[0], 100 * CLUSTER, many, 64 * CLUSTER) == 0);
    free(many);
    end();
    close(slow);
    close(slow_source);
    bg_sums_free(sums);
}

static void copy_slowly(int64_t number, const bg_bitmap_extent *run)
{
    char buf[CLUSTER];
    for (int64_t at = run->start, n; at < run->end; at += n) {
        n = run->end - at < CLUSTER ? run->end - at : CLUSTER;
        CHECK(bg_pread(source_fd, buf, n, at) == n && bg_pwrite(target_fd, buf, n, at) == n);
    }
    atomic_fetch_add(&copied_slowly, run->end - run->start);
    CHECK(bg_copier_finish(copier, number, 1) == 0);
}

/* What Python does with a write that faulted. */
static void write_slowly(int64_t at)
{
    bg_bitmap_extent run;
    int64_t start = at - at % CLUSTER, stop = start + CLUSTER < SIZE ? start + CLUSTER : SIZE;
    while (bg_copier_pending(copier, start, stop)) {
        int64_t number = bg_copier_take(copier, start, stop, CLUSTER, &run);
        if (number > 0)
            copy_slowly(number, &run);
        else if (bg_copier_watch(copier, start, stop))
            bg_copier_acknowledge(copier);
        else
            sched_yield();
    }
    while (!bg_copier_release(copier, start, stop))
        sched_yield();
    CHECK(bg_pwrite(source_fd, &(char){NEW}, 1, at) == 1);
}

static void *write_as_guest(void *arg)
{
    int self = (int)(intptr_t)arg;
    uint64_t seed = 11 + (uint64_t)self;
    for (int i = 0; i < WRITES_EACH; i++) {
        int64_t at = (int64_t)(next_random(&seed) % SIZE);
        if (self % 2 && at >= SIZE - SHIFT)
            continue;
        int ret = i % 2 ? write_now_at(self % 2, at) : BG_MAP_MISS;
        if (ret)
            ret = write_at(self % 2, at);
        CHECK(ret == 0 || ret == BG_MAP_MISS);
        if (ret)
            write_slowly(at);
        CHECK(byte_at(target_fd, at) == OLD && byte_at(source_fd, at) == NEW);
    }
    atomic_fetch_sub(&guests_left, 1);
    return NULL;
}

static void *run_job(void *arg)
{
    bg_bitmap_extent run;
    int64_t number;
    (void)arg;
    while ((number = bg_copier_take(copier, 0, SIZE, 3 * CLUSTER, &run)) > 0) {
        copy_slowly(number, &run);
        if (bg_copier_release(copier, run.start, run.end))
            CHECK(bg_map_copied(guest[0], run.start, run.end - run.start) == 0);
        sched_yield();
    }
    return NULL;
}

static void *read_old(void *arg)
{
    uint64_t seed = 3;
    char buf[CLUSTER];
    (void)arg;
    while (atomic_load(&guests_left)) {
        int64_t at = (int64_t)(next_random(&seed) % (SIZE - CLUSTER)), number = bg_copier_freeze(copier, at, CLUSTER);
        if (number) {
            CHECK(bg_pread(source_fd, buf, CLUSTER, at) == CLUSTER);
            for (int i = 0; i < CLUSTER; i++)
                CHECK(buf[i] == OLD);
            CHECK(bg_copier_thaw(copier, number) == 0);
        }
        sched_yield();
    }
    return NULL;
}

static void guests_job_and_reader_share_the_clusters(void)
{
    pthread_t threads[GUESTS + 2];
    int n = 0;
    begin(BG_MAP_WRITABLE);
    atomic_store(&copied_slowly, 0);
    atomic_store(&guests_left, GUESTS);
    for (intptr_t i = 0; i < GUESTS; i++)
        CHECK(pthread_create(&threads[n++], NULL, write_as_guest, (void *)i) == 0);
    CHECK(pthread_create(&threads[n++], NULL, run_job, NULL) == 0);
    CHECK(pthread_create(&threads[n++], NULL, read_old, NULL) == 0);
    while (n > 0)
        pthread_join(threads[--n], NULL);
    bg_copier_stats stats;
    bg_copier_get_stats(copier, &stats);
    CHECK(stats.copied + atomic_load(&copied_slowly) == SIZE && bg_bitmap_count(todo) == 0);
    char buf[CLUSTER];
    for (int64_t at = 0, got; at < SIZE; at += got) {
        got = SIZE - at < CLUSTER ? SIZE - at : CLUSTER;
        CHECK(bg_pread(target_fd, buf, got, at) == got);
        for (int i = 0; i < got; i++)
            CHECK(buf[i] == OLD);
    }
    end();
}

static bg_map *chained;
static int second_fd;

static void *write_under_two(void *arg)
{
    uint64_t seed = 29 + (uint64_t)(intptr_t)arg;
    for (int i = 0; i < WRITES_EACH; i++) {
        int64_t at = (int64_t)(next_random(&seed) % SIZE);
        int ret;
        /* A miss: others have changed the extents too often meanwhile. */
        while ((ret = bg_map_pwrite(chained, at, &(char){NEW}, 1)) == BG_MAP_MISS)
            sched_yield();
        CHECK(ret == 0);
        CHECK(byte_at(target_fd, at) == OLD && byte_at(second_fd, at) == OLD && byte_at(source_fd, at) == NEW);
    }
    return NULL;
}

/* Of two copiers with clusters of 1 and 4. */
static void chain_asks_every_copier(void)
{
    bg_bitmap *bits[2];
    bg_copier *other;
    bg_copier_link *chain;
    bg_copier_stats stats;
    bg_map_extent e;
    pthread_t threads[GUESTS];
    begin(BG_MAP_WRITABLE);
    second_fd = memfd_create("second", MFD_CLOEXEC);
    CHECK(second_fd >= 0 && ftruncate(second_fd, SIZE) == 0);
    CHECK(bg_bitmap_new(SIZE, 4 * CLUSTER, &bits[0]) == 0 && bg_bitmap_new(SIZE, 4 * CLUSTER, &bits[1]) == 0);
    CHECK(bg_bitmap_fill(bits[0]) == 0);
    bg_map *second = map_of(SIZE, 0, second_fd, BG_MAP_WRITABLE, NULL);
    CHECK(bg_copier_new(bits[0], bits[1], source, second, &other) == 0);
    CHECK(bg_copier_link_new(other, 0, links[0], &chain) == 0);
    chained = map_of(SIZE, 0, source_fd, BG_MAP_WRITABLE | BG_MAP_COPY, bg_copier_link_hook(chain));

    /* One of them can not: nothing is written. */
    CHECK(bg_map_pwrite(chained, 5 * CLUSTER, &(char){NEW}, 1) == BG_MAP_MISS && byte_at(source_fd, 5 * CLUSTER) == OLD);
    bg_copier_set_mode(other, BG_COPIER_ON);
    bg_copier_set_mode(copier, BG_COPIER_OFF);
    CHECK(bg_map_pwrite(chained, 5 * CLUSTER, &(char){NEW}, 1) == BG_MAP_MISS && byte_at(source_fd, 5 * CLUSTER) == OLD);
    CHECK(byte_at(second_fd, 4 * CLUSTER) == OLD && bg_map_find(chained, 5 * CLUSTER, &e) && e.flags & BG_MAP_COPY);
    bg_copier_set_mode(copier, BG_COPIER_ON);
    CHECK(bg_map_pwrite(chained, 5 * CLUSTER, &(char){NEW}, 1) == 0 && byte_at(target_fd, 5 * CLUSTER) == OLD);
    /* What only one of them has has to be asked about still. */
    CHECK(bg_map_find(chained, 5 * CLUSTER, &e) && e.flags == BG_MAP_WRITABLE && e.length == CLUSTER);
    CHECK(bg_map_find(chained, 4 * CLUSTER, &e) && e.flags & BG_MAP_COPY);

    for (intptr_t i = 0; i < GUESTS; i++)
        CHECK(pthread_create(&threads[i], NULL, write_under_two, (void *)i) == 0);
    for (int i = 0; i < GUESTS; i++)
        pthread_join(threads[i], NULL);
    bg_copier_get_stats(other, &stats);
    CHECK(stats.copied == bg_bitmap_count(bits[1]) && stats.moved == stats.copied);
    bg_copier_get_stats(copier, &stats);
    CHECK(stats.copied == bg_bitmap_count(done) && stats.moved == stats.copied);
    CHECK(bg_map_free(chained) == 0);
    bg_copier_link_free(chain);
    CHECK(bg_copier_free(other) == 0 && bg_map_free(second) == 0);
    bg_bitmap_free(bits[0]);
    bg_bitmap_free(bits[1]);
    close(second_fd);
    end();
}

static void runs_are_copied_on_the_pool_and_let_others_pass(void)
{
    begin(BG_MAP_WRITABLE);
    bg_pool *pool;
    bg_queue *queue;
    bg_copier_run runs[CLUSTERS];
    bg_copier_stats stats;
    bg_completion ended[2];
    char byte;
    CHECK(bg_pool_new(1, 1, &pool) == 0 && bg_queue_new(pool, &queue) == 0);
    /* Single clusters, every other one: each is a run. */
    for (int64_t at = 0; at < SIZE; at += 2 * CLUSTER)
        CHECK(bg_bitmap_reset(todo, at, SIZE - at < CLUSTER ? SIZE - at : CLUSTER) == 0);
    int64_t left = bg_bitmap_count(todo), count = bg_copier_find_runs(copier, 0, 4 * CLUSTER, SIZE, runs, CLUSTERS);
    CHECK(count == CLUSTERS / 2 && bg_copier_check_runs(copier, runs, count) == 0);
    CHECK(bg_copier_start_runs(copier, runs, 0, &stats, queue, 1) == -EINVAL);
    CHECK(bg_copier_start_runs(copier, runs, count, &stats, queue, 1) == 0);
    CHECK(bg_queue_submit(queue, 2, BG_OP_PREAD, source_fd, &byte, 1, 0, 0) == 0);
    for (int64_t n = 0; n < 2;)
        n += bg_queue_reap(queue, ended + n, 2 - n);
    CHECK(ended[0].ticket + ended[1].ticket == 3 && ended[0].ticket != ended[1].ticket);
    CHECK(ended[ended[1].ticket == 1].result == 0 && byte == OLD);
    CHECK(stats.copied == left && stats.moved == left && bg_bitmap_count(todo) == 0);
    for (int64_t i = 0; i < count; i++)
        CHECK(!runs[i].missed && runs[i].released && byte_at(target_fd, runs[i].start) == OLD);
    bg_queue_free(queue);
    bg_pool_free(pool);
    end();
}

void test_copier(void)
{
    copies_once_then_writes_in_place();
    zeroes_are_not_written_where_the_target_has_them();
    zeroing_copies_first_where_it_is_possible();
    leaves_to_python_what_is_pythons();
    failed_copy_is_a_miss_and_stays_to_be_done();
    copies_without_waiting_or_not_at_all();
    chain_asks_every_copier();
    runs_are_copied_on_the_pool_and_let_others_pass();
    for (int i = 0; i < 5; i++)
        guests_job_and_reader_share_the_clusters();
}
