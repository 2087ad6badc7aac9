/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Whole clusters made zero by an allocator, among first writes and writes in place, while a keeper of the table collects links,
 * holds clusters, and takes away and fills what the map knows. Each cluster is written, made zero and read by one thread.
 */
#define _GNU_SOURCE
#include "allocator.h"
#include "driver.h"
#include "io.h"
#include "qcow2_l2.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define BITS 12
#define CLUSTER ((int64_t)1 << BITS)
#define TABLE_BITS 6
#define CLUSTERS (2 << TABLE_BITS)
#define SIZE (CLUSTERS * CLUSTER - 512) /* the last is cut off */
#define WRITERS 3
#define CHANGES 4000
#define MAX_LINKS 65536
#define HOW (BG_MAP_ZERO_RANGE | BG_MAP_WRITE_ZEROES)

static bg_map *map;
static bg_allocator *allocator;
static bg_bitmap *bitmap;
static int fd, slot;
static int64_t next_host = CLUSTER;
static uint64_t entries[CLUSTERS]; /* two tables: the keeper's, and whoever has the lock */
static pthread_mutex_t keeper = PTHREAD_MUTEX_INITIALIZER;
static uint8_t wanted[CLUSTERS]; /* all bytes of the cluster; its owner's */
static atomic_int changes_left = CHANGES, zeroed;

static int64_t length_of(int64_t cluster)
{
    return cluster == CLUSTERS - 1 ? CLUSTER - 512 : CLUSTER;
}

/* Under the lock. */
static void collect(void)
{
    bg_allocator_link links[5];
    int64_t n, end, low, high;
    while ((n = bg_allocator_take_links(allocator, links, 5, &end)) > 0)
        for (int64_t at = 0, some; at < n; at += some) {
            some = bg_allocator_same_table(allocator, links + at, n - at);
            int64_t first = links[at].guest >> BITS >> TABLE_BITS << TABLE_BITS;
            CHECK(bg_l2_link(entries + first, TABLE_BITS, BITS, links + at, some, &low, &high) == 0);
            CHECK(low < high && high <= 1 << TABLE_BITS && end <= next_host);
        }
}

static bg_l2_run decode(int64_t cluster)
{
    bg_l2_run run;
    CHECK(bg_l2_decode(entries, cluster, cluster + 1, BITS, 3, 0, &run, 1) == 1);
    return run;
}

static void encode(int64_t cluster, int64_t host, bool zero)
{
    entries[cluster] = htobe64((uint64_t)host | (uint64_t)1 << 63 | zero);
}

static void fill_map(int64_t generation, int64_t cluster)
{
    bg_l2_run run = decode(cluster);
    bg_map_extent e = {cluster * CLUSTER, length_of(cluster), run.host_offset, slot, BG_MAP_WRITABLE};
    if (run.kind == BG_L2_UNALLOCATED)
        e.flags = BG_MAP_ZERO | BG_MAP_ALLOCATE;
    else if (run.kind == BG_L2_ZERO_ALLOCATED)
        e.flags = BG_MAP_ZERO;
    bg_map_insert(map, generation, &e, 1);
}

static void refill(void)
{
    bg_allocator_room room = {next_host, 12, 1};
    next_host += 12 * CLUSTER;
    CHECK(bg_allocator_give(allocator, &room, 1, 4) == 0);
}

static void hold(int64_t first, int64_t end)
{
    int busy = bg_allocator_hold(allocator, first, end);
    CHECK(busy == 0 || busy == 1);
    if (busy)
        bg_map_wait(map, bg_map_protect(map, 0, 0));
    collect();
}

/* What native code does not do: all of the cluster becomes `byte`, or zero without one. */
static void fault(int64_t cluster, const char *buf)
{
    pthread_mutex_lock(&keeper);
    hold(cluster, cluster + 1);
    bg_l2_run run = decode(cluster);
    int64_t start = cluster * CLUSTER, length = length_of(cluster), host = run.host_offset;
    if (buf && run.kind == BG_L2_UNALLOCATED) {
        host = next_host;
        next_host += CLUSTER;
    }
    if (buf)
        CHECK(bg_pwrite(fd, buf, length, host) == length);
    if (buf || run.kind == BG_L2_DATA)
        encode(cluster, host, !buf);
    CHECK(bg_bitmap_set(bitmap, start, length) == 0);
    bg_map_wait(map, bg_map_invalidate(map, start, length));
    fill_map(bg_map_generation(map), cluster);
    CHECK(bg_allocator_release(allocator, cluster, cluster + 1) == 0);
    if (bg_allocator_reserve(allocator) < 4)
        refill();
    pthread_mutex_unlock(&keeper);
}

static void check(int64_t cluster)
{
    char buf[CLUSTER];
    int64_t length = length_of(cluster);
    int ret = bg_map_pread(map, cluster * CLUSTER, buf, length);
    CHECK(ret == 0 || ret == BG_MAP_MISS);
    if (ret == BG_MAP_MISS) {
        pthread_mutex_lock(&keeper);
        int64_t generation = bg_map_generation(map);
        collect();
        bg_l2_run run = decode(cluster);
        memset(buf, 0, sizeof(buf));
        if (run.kind == BG_L2_DATA)
            CHECK(bg_pread(fd, buf, length, run.host_offset) >= 0);
        fill_map(generation, cluster);
        pthread_mutex_unlock(&keeper);
    }
    for (int64_t i = 0; i < length; i++)
        CHECK((uint8_t)buf[i] == wanted[cluster]);
}

static void *work(void *arg)
{
    int self = (int)(intptr_t)arg;
    uint64_t seed = 29 + (uint64_t)self;
    while (atomic_load(&changes_left)) {
        int64_t cluster = (int64_t)(next_random(&seed) % (uint64_t)(CLUSTERS / WRITERS)) * WRITERS + self;
        int64_t start = cluster * CLUSTER, length = length_of(cluster);
        char buf[CLUSTER];
        bool writes = next_random(&seed) % 2;
        wanted[cluster] = writes ? (uint8_t)(1 + next_random(&seed) % 255) : 0;
        memset(buf, wanted[cluster], sizeof(buf));
        int ret = writes                  ? bg_map_pwrite(map, start, buf, length)
                  : next_random(&seed) % 2 ? bg_map_zero_now(map, start, length, HOW, CLUSTER)
                                           : bg_map_zero(map, start, length, HOW);
        CHECK(ret == 0 || ret == BG_MAP_MISS);
        if (ret)
            fault(cluster, writes ? buf : NULL);
        else if (!writes)
            atomic_fetch_add(&zeroed, 1);
        CHECK(bg_bitmap_get(bitmap, start) == 1);
        check(cluster);
    }
    return NULL;
}

/* However the threads are scheduled: the last change is made again until there were zeroes enough. */
static void count_change(void)
{
    if (atomic_load(&changes_left) > 1 || atomic_load(&zeroed) > CHANGES / 100)
        atomic_fetch_sub(&changes_left, 1);
}

static void *change(void *arg)
{
    uint64_t seed = 5;
    (void)arg;
    for (; atomic_load(&changes_left); count_change()) {
        int64_t first = (int64_t)(next_random(&seed) % CLUSTERS), left = CLUSTERS - first;
        int64_t end = first + 1 + (int64_t)(next_random(&seed) % (uint64_t)(left < 6 ? left : 6));
        pthread_mutex_lock(&keeper);
        int64_t generation = bg_map_generation(map);
        if (next_random(&seed) % 2) {
            hold(first, end);
            bg_map_wait(map, bg_map_invalidate(map, first * CLUSTER, (end - 1 - first) * CLUSTER + length_of(end - 1)));
            generation = bg_map_generation(map);
            for (int64_t c = first; c < end; c++) { /* to another place, which nobody may write to meanwhile */
                bg_l2_run run = decode(c);
                char buf[CLUSTER];
                if (run.kind == BG_L2_UNALLOCATED)
                    continue;
                CHECK(bg_pread(fd, buf, CLUSTER, run.host_offset) >= 0 && bg_pwrite(fd, buf, CLUSTER, next_host) == CLUSTER);
                encode(c, next_host, run.kind == BG_L2_ZERO_ALLOCATED);
                next_host += CLUSTER;
            }
            CHECK(bg_allocator_release(allocator, first, end) == 0);
        }
        collect();
        for (int64_t c = first; c < end; c++)
            fill_map(generation, c);
        pthread_mutex_unlock(&keeper);
    }
    return NULL;
}

static int zero(int64_t offset, int64_t length)
{
    return bg_map_zero_now(map, offset, length, HOW, CLUSTER);
}

/* By one thread: what is done, what is not, and what is noted. */
static void test_one(void)
{
    char buf[4 * CLUSTER];
    memset(buf, 7, sizeof(buf));
    for (int64_t c = 0; c < CLUSTERS; c++)
        fill_map(bg_map_generation(map), c);
    const int64_t last = SIZE / CLUSTER * CLUSTER, edge = CLUSTER << TABLE_BITS;
    CHECK(bg_map_pwrite(map, CLUSTER, buf, 2 * CLUSTER) == 0 && bg_map_pwrite(map, last - CLUSTER, buf, CLUSTER) == 0);
    CHECK(bg_map_pwrite(map, edge - 2 * CLUSTER, buf, 4 * CLUSTER) == 0);
    CHECK(bg_bitmap_reset(bitmap, 0, SIZE) == 0);
    CHECK(zero(0, CLUSTER) == BG_MAP_MISS);                        /* it has no place */
    CHECK(zero(CLUSTER, 3 * CLUSTER) == BG_MAP_MISS);              /* some of it has none */
    CHECK(zero(CLUSTER + 512, 2 * CLUSTER - 512) == BG_MAP_MISS);  /* not from a cluster's start */
    CHECK(zero(CLUSTER, CLUSTER + 512) == BG_MAP_MISS);            /* nor to its end */
    CHECK(zero(CLUSTER, 0) != 0 || !bg_bitmap_get(bitmap, CLUSTER));
    CHECK(bg_map_zero_now(map, CLUSTER, CLUSTER, HOW | BG_MAP_PUNCH, CLUSTER) == BG_MAP_MISS); /* to be given up */
    CHECK(bg_allocator_hold(allocator, 2, 3) == 0 && zero(CLUSTER, 2 * CLUSTER) == BG_MAP_MISS);
    CHECK(bg_allocator_release(allocator, 2, 3) == 0 && bg_bitmap_count(bitmap) == 0);
    CHECK(bg_map_flush(map, 1) == BG_MAP_MISS);
    bg_map_flushed(map, bg_map_dirt(map));
    CHECK(zero(last, SIZE - last) == BG_MAP_MISS); /* there may be more of it than the disk shows */
    CHECK(zero(CLUSTER, 2 * CLUSTER) == 0 && zero(last - CLUSTER, CLUSTER) == 0 && zero(edge - 2 * CLUSTER, 4 * CLUSTER) == 0);
    CHECK(bg_map_flush(map, 1) == BG_MAP_MISS); /* only Python can */
    CHECK(bg_bitmap_get(bitmap, CLUSTER) && bg_bitmap_get(bitmap, last - 1) && !bg_bitmap_get(bitmap, 3 * CLUSTER));
    memset(buf, 1, sizeof(buf));
    CHECK(bg_map_pread(map, CLUSTER, buf, 2 * CLUSTER) == 0 && buf[0] == 0 && buf[2 * CLUSTER - 1] == 0);
    CHECK(bg_map_pwrite(map, CLUSTER, buf, 512) == BG_MAP_MISS && zero(CLUSTER, CLUSTER) == BG_MAP_MISS);
    /* Cut where the table ends, together what is of one, in order. */
    bg_allocator_link links[16];
    int64_t end, n = bg_allocator_take_links(allocator, links, 16, &end);
    CHECK(n == 8 && bg_allocator_same_table(allocator, links, n) == 4 && end == next_host - 5 * CLUSTER);
    static const int64_t guests[] = {1, 62, 1, 62, 126, 64, 126, 64};
    for (int i = 0; i < n; i++)
        CHECK(links[i].guest == guests[i] * CLUSTER && links[i].zero == (i % 4 > 1) && links[i].clusters == 2 - (i % 4 % 2 == 0 && i > 3));
    CHECK(!bg_allocator_has_links(allocator));
    int64_t low, high;
    CHECK(bg_l2_link(entries, TABLE_BITS, BITS, links + 2, 1, &low, &high) == -EINVAL); /* zeroes of nothing */
    CHECK(bg_l2_link(entries, TABLE_BITS, BITS, links, 4, &low, &high) == 0 && low == 1 && high == 64);
    CHECK(bg_l2_link(entries, TABLE_BITS, BITS, links, 1, &low, &high) == -EINVAL); /* it has a place */
    CHECK(bg_l2_link(entries + 64, TABLE_BITS, BITS, links + 4, 4, &low, &high) == 0 && low == 0 && high == 63);
    CHECK(decode(1).kind == BG_L2_ZERO_ALLOCATED && decode(1).host_offset == links[0].host && decode(0).kind == BG_L2_UNALLOCATED);
    bg_map_wait(map, bg_map_invalidate(map, 0, SIZE));
}

static void fill_again(bg_map *wide, int place, int64_t clusters)
{
    bg_map_extent e = {0, clusters * 512, 0, place, BG_MAP_WRITABLE};
    bg_map_insert(wide, bg_map_generation(wide), &e, 1);
}

/* Links that nobody takes: the keeper is told, and at last no more is noted. */
static void test_many(void)
{
    bg_map *wide;
    bg_allocator *noting;
    bg_allocator_link *links = malloc(MAX_LINKS * sizeof(*links));
    CHECK(links && bg_map_new(8192 * 512, BG_MAP_MIN_MEMORY, &wide) == 0);
    int place = bg_map_add_slot(wide, fd, 1, 1);
    CHECK(bg_map_set_zeroing(wide, place, BG_MAP_WRITE_ZEROES, 512) == 0 && bg_allocator_new(9, 20, 1, &noting) == 0);
    bg_allocator_bind(noting, fd, 1, place);
    bg_map_set_allocator(wide, bg_allocator_hook(noting));
    int64_t noted = 0, end;
    uint64_t value;
    bool told = false;
    for (int i = 0; i < MAX_LINKS + 100; i++) {
        fill_again(wide, place, 1);
        noted += bg_map_zero(wide, 0, 512, HOW) == 0;
        if (read(bg_allocator_eventfd(noting), &value, sizeof(value)) == sizeof(value))
            CHECK(!told && (told = true) && i < 1000);
    }
    CHECK(told && noted == MAX_LINKS && bg_allocator_take_links(noting, links, MAX_LINKS, &end) == MAX_LINKS && end == 512);
    fill_again(wide, place, 8192);
    CHECK(bg_map_zero(wide, 0, 8192 * 512, HOW) == BG_MAP_MISS); /* too long */
    CHECK(bg_map_zero(wide, 512, 1024 * 512, HOW) == 0 && bg_allocator_take_links(noting, links, 2, &end) == 1);
    CHECK(links[0].clusters == 1024 && links[0].guest == 512 && end == 1025 * 512);
    for (int i = 0; i < 1000; i++) {
        fill_again(wide, place, 1);
        CHECK(bg_map_zero(wide, 0, 512, HOW) == 0);
    }
    CHECK(read(bg_allocator_eventfd(noting), &value, sizeof(value)) == sizeof(value)); /* once more */
    free(links);
    CHECK(bg_map_free(wide) == 0);
    bg_allocator_free(noting);
}

void test_allocator_zeroes(void)
{
    fd = memfd_create("data", MFD_CLOEXEC);
    CHECK(bg_map_new(SIZE, BG_MAP_MIN_MEMORY, &map) == 0 && bg_bitmap_new(SIZE, 512, &bitmap) == 0);
    CHECK(bg_map_set_bitmaps(map, &bitmap, 1) > 0);
    slot = bg_map_add_slot(map, fd, 1, 1);
    CHECK(bg_map_set_zeroing(map, slot, BG_MAP_WRITE_ZEROES, CLUSTER) == 0);
    CHECK(bg_allocator_new(BITS, TABLE_BITS, 1, &allocator) == 0);
    bg_allocator_bind(allocator, fd, 1, slot);
    refill();
    bg_map_set_allocator(map, bg_allocator_hook(allocator));
    test_one();
    test_many();
    pthread_t threads[WRITERS + 1];
    for (int i = 0; i < WRITERS; i++)
        CHECK(pthread_create(&threads[i], NULL, work, (void *)(intptr_t)i) == 0);
    CHECK(pthread_create(&threads[WRITERS], NULL, change, NULL) == 0);
    for (int i = 0; i <= WRITERS; i++)
        pthread_join(threads[i], NULL);
    CHECK(zeroed > CHANGES / 100);
    bg_map_wait(map, bg_map_set_allocator(map, NULL));
    pthread_mutex_lock(&keeper);
    collect();
    pthread_mutex_unlock(&keeper);
    bg_map_wait(map, bg_map_invalidate(map, 0, SIZE));
    for (int64_t c = 0; c < CLUSTERS - CLUSTERS % WRITERS; c++)
        check(c);
    CHECK(bg_map_free(map) == 0);
    bg_allocator_free(allocator);
    bg_bitmap_free(bitmap);
    close(fd);
}
