/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * First writes by several threads, readers, and a keeper of tables who collects the links, fills the reserve, holds and discards
 * clusters, fills the map and protects it. Each word of the disk is written by one thread, in order; the backing disk has
 * version 0 everywhere.
 */
#define _GNU_SOURCE
#include "allocator.h"
#include "driver.h"
#include "io.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define BITS 12
#define CLUSTER (1 << BITS)
#define CLUSTERS 192
#define SIZE ((int64_t)CLUSTERS * CLUSTER - 512) /* the last is cut off */
#define SECTOR 512
#define SECTORS (SIZE / SECTOR)
#define WRITERS 3
#define CHANGES 8000
#define LOW 16

static bg_map *map;
static bg_allocator *allocator;
static bg_bitmap *bitmap;
static int data_fd, backing_fd, data_slot, backing_slot;
static int64_t next_host;
static int64_t table[CLUSTERS]; /* the keeper's, and whoever has the lock: host offset, 0: none */
static pthread_mutex_t keeper = PTHREAD_MUTEX_INITIALIZER;
static _Atomic uint32_t written[SECTORS];
static atomic_int changes_left = CHANGES;

static int64_t cluster_end(int64_t cluster)
{
    int64_t end = (cluster + 1) * CLUSTER;
    return end < SIZE ? end : SIZE;
}

/* Under the lock: what follows is as if a driver had its tables up to date. */
static void collect(void)
{
    bg_allocator_link links[4];
    int64_t n, end;
    while ((n = bg_allocator_take_links(allocator, links, 4, &end)) > 0)
        for (int64_t i = 0; i < n; i++)
            for (int64_t k = 0; k < links[i].clusters; k++) {
                int64_t cluster = (links[i].guest >> BITS) + k;
                CHECK(table[cluster] == 0); /* nothing is placed twice */
                table[cluster] = links[i].host + k * CLUSTER;
            }
}

static void refill(void)
{
    bg_allocator_room rooms[2] = {{next_host, 5, 1}, {next_host + 6 * CLUSTER, 20, 1}};
    next_host += 26 * CLUSTER;
    CHECK(bg_allocator_give(allocator, rooms, 2, LOW) == 0);
}

/* What the tables say, as they were when the generation was read or later. */
static void fill_map(int64_t generation, int64_t cluster)
{
    int64_t start = cluster * CLUSTER, length = cluster_end(cluster) - start;
    bg_map_extent e = {start, length, table[cluster], data_slot, BG_MAP_WRITABLE};
    if (table[cluster] == 0)
        e = (bg_map_extent){start, length, start, cluster % 3 ? backing_slot : -1,
                            BG_MAP_ALLOCATE | (cluster % 3 ? 0 : BG_MAP_ZERO)};
    bg_map_insert(map, generation, &e, 1);
}

/* Wait for first writes to the clusters that have begun; then they are the caller's. */
static void hold(int64_t first, int64_t end)
{
    int busy = bg_allocator_hold(allocator, first, end);
    CHECK(busy == 0 || busy == 1);
    if (busy)
        bg_map_wait(map, bg_map_protect(map, 0, 0));
    collect();
}

static void fault_write(int64_t offset, const char *buf, int64_t length)
{
    pthread_mutex_lock(&keeper);
    for (int64_t at = offset; at < offset + length;) {
        int64_t cluster = at >> BITS, start = cluster * CLUSTER, end = cluster_end(cluster);
        int64_t stop = end < offset + length ? end : offset + length;
        hold(cluster, cluster + 1);
        if (table[cluster] == 0) {
            char whole[CLUSTER] = {0};
            if (cluster % 3)
                CHECK(bg_pread(backing_fd, whole, end - start, start) == end - start);
            memcpy(whole + (at - start), buf + (at - offset), (size_t)(stop - at));
            CHECK(bg_pwrite(data_fd, whole, CLUSTER, next_host) == CLUSTER);
            CHECK(bg_bitmap_set(bitmap, at, stop - at) == 0);
            table[cluster] = next_host;
            next_host += CLUSTER;
            bg_map_wait(map, bg_map_invalidate(map, start, end - start));
        } else {
            CHECK(bg_pwrite(data_fd, buf + (at - offset), stop - at, table[cluster] + at - start) == stop - at);
            CHECK(bg_bitmap_set(bitmap, at, stop - at) == 0);
        }
        fill_map(bg_map_generation(map), cluster);
        CHECK(bg_allocator_release(allocator, cluster, cluster + 1) == 0);
        at = stop;
    }
    if (bg_allocator_reserve(allocator) < LOW)
        refill();
    pthread_mutex_unlock(&keeper);
}

static void read_range(int64_t offset, char *buf, int64_t length)
{
    int ret = bg_map_pread(map, offset, buf, length);
    CHECK(ret == 0 || ret == BG_MAP_MISS);
    if (ret == 0)
        return;
    pthread_mutex_lock(&keeper);
    for (int64_t at = offset, stop; at < offset + length; at = stop) {
        int64_t cluster = at >> BITS, start = cluster * CLUSTER;
        stop = cluster_end(cluster) < offset + length ? cluster_end(cluster) : offset + length;
        int64_t generation = bg_map_generation(map);
        collect();
        if (table[cluster])
            CHECK(bg_pread(data_fd, buf + (at - offset), stop - at, table[cluster] + at - start) >= 0);
        else if (cluster % 3)
            CHECK(bg_pread(backing_fd, buf + (at - offset), stop - at, at) == stop - at);
        else
            memset(buf + (at - offset), 0, (size_t)(stop - at));
        fill_map(generation, cluster);
    }
    pthread_mutex_unlock(&keeper);
}

/* A sector is its number and a version; where nothing was written yet that is the backing disk's, or zeroes. */
static void check_sectors(int64_t first, const char *buf, int64_t count, const uint32_t *least)
{
    for (int64_t i = 0; i < count; i++) {
        uint64_t words[SECTOR / 8];
        memcpy(words, buf + i * SECTOR, SECTOR);
        for (int k = 0; k < SECTOR / 8; k++)
            CHECK(words[k] ? words[k] >> 32 == (uint64_t)(first + i) + 1 && (uint32_t)words[k] >= least[i]
                           : ((first + i) * SECTOR >> BITS) % 3 == 0 && least[i] == 0);
    }
}

static void *write_own(void *arg)
{
    int self = (int)(intptr_t)arg;
    uint64_t seed = 17 + (uint64_t)self;
    static uint32_t versions[SECTORS]; /* each writer touches its own */
    while (atomic_load(&changes_left)) {
        /* Runs of sectors, one cluster of every three or a stripe within a cluster, so that clusters are shared. */
        char buf[4 * SECTOR];
        int64_t first = (int64_t)(next_random(&seed) % (uint64_t)(SECTORS / 4 / WRITERS)) * 4 * WRITERS + self * 4;
        int64_t count = 1 + (int64_t)(next_random(&seed) % 4);
        if (first + count > SECTORS)
            continue;
        for (int64_t i = 0; i < count; i++) {
            uint64_t word = (uint64_t)(first + i + 1) << 32 | ++versions[first + i];
            for (int k = 0; k < SECTOR / 8; k++)
                memcpy(buf + i * SECTOR + k * 8, &word, 8);
        }
        int ret = BG_MAP_MISS;
        if (next_random(&seed) % 2)
            ret = bg_map_first_write_now(map, first * SECTOR, buf, NULL, count * SECTOR, INT64_MAX);
        if (ret)
            ret = bg_map_pwrite(map, first * SECTOR, buf, count * SECTOR);
        CHECK(ret == 0 || ret == BG_MAP_MISS);
        if (ret)
            fault_write(first * SECTOR, buf, count * SECTOR);
        for (int64_t i = 0; i < count; i++)
            atomic_store(&written[first + i], versions[first + i]);
        char back[4 * SECTOR];
        read_range(first * SECTOR, back, count * SECTOR);
        CHECK(memcmp(buf, back, (size_t)(count * SECTOR)) == 0);
    }
    return NULL;
}

static void *read_any(void *arg)
{
    uint64_t seed = 3;
    (void)arg;
    while (atomic_load(&changes_left)) {
        char buf[6 * SECTOR];
        uint32_t least[6];
        int64_t first = (int64_t)(next_random(&seed) % (SECTORS - 6));
        for (int i = 0; i < 6; i++)
            least[i] = atomic_load(&written[first + i]);
        read_range(first * SECTOR, buf, sizeof(buf));
        check_sectors(first, buf, 6, least);
    }
    return NULL;
}

/* To the backing disk, as a commit would, so that the next write is a first one again; or to a new place. */
static void move(int64_t c)
{
    char buf[CLUSTER];
    CHECK(bg_pread(data_fd, buf, CLUSTER, table[c]) >= 0);
    if (c % 3) {
        CHECK(bg_pwrite(backing_fd, buf, cluster_end(c) - c * CLUSTER, c * CLUSTER) > 0);
        table[c] = 0;
    } else {
        CHECK(bg_pwrite(data_fd, buf, CLUSTER, next_host) == CLUSTER);
        table[c] = next_host;
        next_host += CLUSTER;
    }
}

/* However the threads are scheduled: the last change is made again until there were first writes enough. */
static void count_change(void)
{
    bg_map_stats stats;
    bg_map_get_stats(map, &stats);
    if (atomic_load(&changes_left) > 1 || stats.first_writes > CHANGES / 80)
        atomic_fetch_sub(&changes_left, 1);
}

/* Moves clusters, as whoever rewrites entries would, and takes the reserve away now and then. */
static void *change(void *arg)
{
    uint64_t seed = 11;
    (void)arg;
    for (; atomic_load(&changes_left); count_change()) {
        int64_t first = (int64_t)(next_random(&seed) % CLUSTERS), left = CLUSTERS - first;
        int64_t end = first + 1 + (int64_t)(next_random(&seed) % (uint64_t)(left < 8 ? left : 8));
        pthread_mutex_lock(&keeper);
        hold(first, end);
        int64_t start = first * CLUSTER, length = cluster_end(end - 1) - start;
        switch (next_random(&seed) % 4) {
        case 0: /* nobody may write meanwhile */
            bg_map_wait(map, bg_map_invalidate(map, start, length));
            for (int64_t c = first; c < end; c++)
                if (table[c])
                    move(c);
            break;
        case 1:
            bg_map_wait(map, bg_map_protect(map, start, length));
            break;
        case 2: {
            bg_allocator_room rooms[3];
            int64_t n = bg_allocator_take_rooms(allocator, rooms, 3);
            for (int64_t i = 0; i < n; i++)
                rooms[i].fresh = 0;
            char rubbish[CLUSTER];
            memset(rubbish, 0xee, sizeof(rubbish));
            for (int64_t i = 0; i < n; i++)
                for (int64_t k = 0; k < rooms[i].clusters; k++)
                    CHECK(bg_pwrite(data_fd, rubbish, CLUSTER, rooms[i].host + k * CLUSTER) == CLUSTER);
            CHECK(bg_allocator_give(allocator, rooms, n, LOW) == 0);
            break;
        }
        default:
            bg_map_invalidate(map, start, length);
        }
        for (int64_t c = first; c < end; c++)
            fill_map(bg_map_generation(map), c);
        CHECK(bg_allocator_release(allocator, first, end) == 0);
        pthread_mutex_unlock(&keeper);
    }
    return NULL;
}

static void run_threads(void)
{
    pthread_t threads[WRITERS + 3];
    int n = 0;
    for (int i = 0; i < WRITERS; i++)
        CHECK(pthread_create(&threads[n++], NULL, write_own, (void *)(intptr_t)i) == 0);
    CHECK(pthread_create(&threads[n++], NULL, read_any, NULL) == 0);
    CHECK(pthread_create(&threads[n++], NULL, change, NULL) == 0);
    for (int i = 0; i < n; i++)
        pthread_join(threads[i], NULL);
}

/* Without the map: what the tables say is what was written. */
static void check_tables(void)
{
    pthread_mutex_lock(&keeper);
    collect();
    for (int64_t s = 0; s < SECTORS; s++) {
        int64_t cluster = s * SECTOR >> BITS, inside = s * SECTOR - cluster * CLUSTER;
        char buf[SECTOR] = {0};
        uint32_t least = atomic_load(&written[s]);
        if (table[cluster])
            CHECK(bg_pread(data_fd, buf, SECTOR, table[cluster] + inside) >= 0);
        else if (cluster % 3)
            CHECK(bg_pread(backing_fd, buf, SECTOR, s * SECTOR) == SECTOR);
        check_sectors(s, buf, 1, &least);
        CHECK(!least || bg_bitmap_get(bitmap, s * SECTOR) == 1);
    }
    pthread_mutex_unlock(&keeper);
}

static void test_refusals(void)
{
    bg_allocator *bad;
    CHECK(bg_allocator_new(8, 3, 0, &bad) < 0 && bg_allocator_new(22, 3, 0, &bad) < 0);
    CHECK(bg_allocator_new(9, -1, 0, &bad) < 0 && bg_allocator_new(9, 31, 0, &bad) < 0);
    bg_allocator_room none = {0, 0, 0};
    CHECK(bg_allocator_give(allocator, &none, 1, 0) < 0);
    CHECK(bg_allocator_hold(allocator, 3, 3) < 0 && bg_allocator_release(allocator, 3, 4) < 0);
    bg_allocator_free(NULL);
}

/* A descriptor that takes no writes: the write misses, its room is back, and nothing is linked. */
static void test_failure(void)
{
    char buf[SECTOR] = {1};
    fill_map(bg_map_generation(map), 0);
    int64_t before = bg_allocator_reserve(allocator);
    CHECK(before > 0);
    int full = open("/dev/full", O_RDWR | O_CLOEXEC);
    CHECK(full >= 0);
    bg_allocator_bind(allocator, full, 1, data_slot);
    CHECK(bg_map_pwrite(map, 0, buf, sizeof(buf)) == BG_MAP_MISS);
    CHECK(bg_allocator_reserve(allocator) == before && !bg_allocator_has_links(allocator));
    bg_allocator_bind(allocator, data_fd, 1, data_slot);
    close(full);
    CHECK(bg_map_take_written(map, data_slot) == 0);
    /* Nor while it is held. */
    CHECK(bg_allocator_hold(allocator, 0, 2) == 0);
    CHECK(bg_map_pwrite(map, 0, buf, sizeof(buf)) == BG_MAP_MISS);
    CHECK(bg_allocator_release(allocator, 0, 2) == 0);
    bg_map_wait(map, bg_map_invalidate(map, 0, SIZE));
}

/* What may be done without waiting, and where it may not: then nothing has been placed, and the room is back. */
static void test_now(void)
{
    char buf[3 * SECTOR], back[CLUSTER], old[CLUSTER];
    memset(buf, 0xab, sizeof(buf));
    for (int64_t c = 0; c < 5; c++)
        fill_map(bg_map_generation(map), c);
    int64_t before = bg_allocator_reserve(allocator);
    /* Not a first write, or not of one extent. */
    CHECK(bg_map_first_write_now(map, CLUSTERS / 2 * CLUSTER, buf, NULL, SECTOR, INT64_MAX) == BG_MAP_MISS);
    CHECK(bg_map_first_write_now(map, 3 * CLUSTER - SECTOR, buf, NULL, 2 * SECTOR, INT64_MAX) == BG_MAP_MISS);
    CHECK(bg_allocator_hold(allocator, 1, 2) == 0);
    CHECK(bg_map_first_write_now(map, CLUSTER, buf, NULL, SECTOR, INT64_MAX) == BG_MAP_MISS);
    CHECK(bg_allocator_release(allocator, 1, 2) == 0);
    CHECK(bg_allocator_reserve(allocator) == before && !bg_allocator_has_links(allocator));
    /* The kernel would wait for the device: found out once, then not tried again. */
    char name[64];
    snprintf(name, sizeof(name), "/proc/self/fd/%d", data_fd);
    int slow = open(name, O_RDWR | O_DSYNC | O_CLOEXEC);
    CHECK(slow >= 0);
    bg_allocator_bind(allocator, slow, 1, data_slot);
    for (int i = 0; i < 2; i++)
        CHECK(bg_map_first_write_now(map, CLUSTER + SECTOR, buf, NULL, SECTOR, INT64_MAX) == -EAGAIN);
    CHECK(bg_allocator_reserve(allocator) == before && !bg_allocator_has_links(allocator));
    CHECK(bg_map_pwrite(map, CLUSTER + SECTOR, buf, SECTOR) == 0);
    bg_allocator_bind(allocator, data_fd, 1, data_slot);
    close(slow);
    /* In the middle, at the end, over zeroes. */
    const bg_map_allocator *hook = bg_allocator_hook(allocator);
    CHECK(bg_map_first_write_now(map, 2 * CLUSTER + SECTOR, buf, NULL, SECTOR, 0) == 0 && hook->lately == CLUSTER - SECTOR);
    CHECK(bg_map_first_write_now(map, 4 * CLUSTER, buf, NULL, SECTOR, CLUSTER - SECTOR - 1) == -E2BIG);
    /* Nor what is to be read would come at once. */
    snprintf(name, sizeof(name), "/proc/self/fd/%d", backing_fd);
    slow = open(name, O_RDWR | O_DSYNC | O_CLOEXEC);
    int slow_slot = bg_map_add_slot(map, slow, 1, 1);
    bg_map_extent e = {4 * CLUSTER, CLUSTER, 4 * CLUSTER, slow_slot, BG_MAP_ALLOCATE};
    CHECK(slow >= 0 && bg_map_insert(map, bg_map_generation(map), &e, 1) == 1);
    CHECK(bg_map_first_write_now(map, 4 * CLUSTER, buf, NULL, SECTOR, INT64_MAX) == -EAGAIN && hook->lately == 0);
    bg_map_wait(map, bg_map_remove_slot(map, slow_slot));
    close(slow);
    fill_map(bg_map_generation(map), 4);
    CHECK(bg_map_first_write_now(map, 5 * CLUSTER - 3 * SECTOR, buf, NULL, 3 * SECTOR, INT64_MAX) == 0);
    CHECK(bg_map_first_write_now(map, 3 * CLUSTER, buf, NULL, SECTOR, CLUSTER) == 0 && hook->lately == 0);
    CHECK(bg_allocator_reserve(allocator) == before - 4);
    CHECK(bg_map_first_write_now(map, 3 * CLUSTER, buf, NULL, SECTOR, INT64_MAX) == BG_MAP_MISS); /* it has a place */
    static const struct { int cluster, from, sectors; } wrote[] = {{1, 1, 1}, {2, 1, 1}, {3, 0, 1}, {4, 5, 3}};
    for (int i = 0; i < 4; i++) {
        int64_t start = wrote[i].cluster * CLUSTER;
        memset(old, 0, sizeof(old));
        if (wrote[i].cluster % 3)
            CHECK(bg_pread(backing_fd, old, CLUSTER, start) == CLUSTER);
        memset(old + wrote[i].from * SECTOR, 0xab, (size_t)wrote[i].sectors * SECTOR);
        CHECK(bg_map_pread(map, start, back, CLUSTER) == 0 && memcmp(back, old, CLUSTER) == 0);
        CHECK(bg_bitmap_get(bitmap, start + wrote[i].from * SECTOR) == 1);
    }
    bg_map_stats stats;
    bg_map_get_stats(map, &stats);
    CHECK(stats.first_writes == 4);
    /* As if it had not been: nobody has written to these clusters yet. */
    collect();
    memset(table, 0, sizeof(table));
    CHECK(bg_bitmap_reset(bitmap, 0, SIZE) == 0);
    bg_map_wait(map, bg_map_invalidate(map, 0, SIZE));
}

void test_allocator(void)
{
    data_fd = memfd_create("data", MFD_CLOEXEC);
    backing_fd = memfd_create("backing", MFD_CLOEXEC);
    for (int64_t s = 0; s < SECTORS; s++) {
        uint64_t words[SECTOR / 8];
        for (int k = 0; k < SECTOR / 8; k++)
            words[k] = (uint64_t)(s + 1) << 32;
        CHECK(bg_pwrite(backing_fd, words, SECTOR, s * SECTOR) == SECTOR);
    }
    next_host = CLUSTER;
    CHECK(bg_map_new(SIZE, BG_MAP_MIN_MEMORY, &map) == 0);
    CHECK(bg_bitmap_new(SIZE, SECTOR, &bitmap) == 0);
    CHECK(bg_map_set_bitmaps(map, &bitmap, 1) > 0);
    data_slot = bg_map_add_slot(map, data_fd, 1, 1);
    backing_slot = bg_map_add_slot(map, backing_fd, 1, 1);
    CHECK(bg_allocator_new(BITS, 3, 1, &allocator) == 0);
    bg_allocator_bind(allocator, data_fd, 1, data_slot);
    refill();
    bg_map_set_allocator(map, bg_allocator_hook(allocator));
    test_refusals();
    test_failure();
    test_now();
    run_threads();
    bg_map_wait(map, bg_map_set_allocator(map, NULL));
    check_tables();
    bg_map_stats stats;
    bg_map_get_stats(map, &stats);
    CHECK(stats.first_writes > CHANGES / 80 && bg_map_take_written(map, data_slot) == 1);
    CHECK(bg_map_free(map) == 0);
    bg_allocator_free(allocator);
    bg_bitmap_free(bitmap);
    close(data_fd);
    close(backing_fd);
}
