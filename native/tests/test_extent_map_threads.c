/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Writers, readers, a mover of data, a snapshotter and a mirror on one map, with a disk's worth of rules checked: every word of a
 * block holds the block's number and a version. A miss is resolved under a lock, as a driver would. Once with lists of extents
 * only, then with a table as well, whose words change while others read them: long ones and, with one storage, short ones.
 */
#define _GNU_SOURCE
#include "driver.h"
#include "extent_map_internal.h"
#include "io.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define BLOCK 4096
#define WORDS (BLOCK / 8)
#define BLOCKS 256
#define REGION (1 << REGION_SHIFT_MIN)
#define FIRST (REGION - BLOCKS / 2 * BLOCK) /* half of the blocks in the next region */
#define WRITERS 2
#define ROUNDS 4000
#define CHANGES 1500
#define POISON 0xdeadu

static bg_map *map;
static bg_bitmap *bitmap;
static int fds[2], slots[2], files;
static pthread_mutex_t resolver = PTHREAD_MUTEX_INITIALIZER;
static struct {
    int at;
    int64_t place;
} where[BLOCKS]; /* under the resolver's lock */
static int64_t next_place[2];
static _Atomic uint32_t written[BLOCKS]; /* version that a read must see at least */
static atomic_int writers_left;
static uint64_t mirror[BLOCKS];

static int64_t guest(int block)
{
    return FIRST + (int64_t)block * BLOCK;
}

static void insert(int block)
{
    bg_map_extent e = {guest(block), BLOCK, where[block].place, slots[where[block].at], BG_MAP_WRITABLE};
    bg_map_insert(map, bg_map_generation(map), &e, 1);
}

static void fault(int block, void *buf, int write)
{
    pthread_mutex_lock(&resolver);
    int fd = fds[where[block].at];
    int64_t place = where[block].place;
    CHECK((write ? bg_pwrite(fd, buf, BLOCK, place) : bg_pread(fd, buf, BLOCK, place)) == BLOCK);
    if (write)
        CHECK(bg_bitmap_set(bitmap, guest(block), BLOCK) == 0);
    insert(block);
    pthread_mutex_unlock(&resolver);
}

static void write_block(int block, uint32_t version)
{
    uint64_t buf[WORDS];
    for (int i = 0; i < WORDS; i++)
        buf[i] = (uint64_t)block << 32 | version;
    int ret = bg_map_pwrite(map, guest(block), buf, BLOCK);
    CHECK(ret == 0 || ret == BG_MAP_MISS);
    if (ret)
        fault(block, buf, 1);
    atomic_store(&written[block], version);
}

static uint64_t read_block(int block)
{
    uint64_t buf[WORDS];
    uint32_t least = atomic_load(&written[block]);
    int ret = bg_map_pread(map, guest(block), buf, BLOCK);
    CHECK(ret == 0 || ret == BG_MAP_MISS);
    if (ret)
        fault(block, buf, 0);
    for (int i = 0; i < WORDS; i++)
        CHECK(buf[i] >> 32 == (uint64_t)block && (uint32_t)buf[i] >= least);
    return buf[0];
}

static void *write_own(void *arg)
{
    int self = (int)(intptr_t)arg;
    uint64_t seed = 99 + (uint64_t)self;
    uint32_t version[BLOCKS] = {0};
    for (int round = 0; round < ROUNDS; round++) {
        int block = (int)(next_random(&seed) % (BLOCKS / WRITERS)) * WRITERS + self;
        write_block(block, ++version[block]);
        CHECK((uint32_t)read_block(block) == version[block]);
    }
    atomic_fetch_sub(&writers_left, 1);
    return NULL;
}

static void *read_any(void *arg)
{
    uint64_t seed = 7 + (uint64_t)(intptr_t)arg;
    while (atomic_load(&writers_left))
        read_block((int)(next_random(&seed) % BLOCKS));
    return NULL;
}

/* Moves a few blocks, and leaves poison where they were. */
static void move(int first, int count)
{
    uint64_t buf[WORDS], poison[WORDS];
    for (int i = 0; i < WORDS; i++)
        poison[i] = (uint64_t)POISON << 32;
    pthread_mutex_lock(&resolver);
    bg_map_wait(map, bg_map_invalidate(map, guest(first), (int64_t)count * BLOCK));
    for (int b = first; b < first + count; b++) {
        int from = where[b].at, to = (from + 1) % files;
        CHECK(bg_pread(fds[from], buf, BLOCK, where[b].place) == BLOCK);
        CHECK(bg_pwrite(fds[from], poison, BLOCK, where[b].place) == BLOCK);
        where[b].at = to;
        where[b].place = next_place[to];
        next_place[to] += BLOCK;
        CHECK(bg_pwrite(fds[to], buf, BLOCK, where[b].place) == BLOCK);
    }
    pthread_mutex_unlock(&resolver);
}

/* While protected and settled, nothing changes. */
static void watch(int first, int count)
{
    uint64_t before[WORDS], after[WORDS];
    pthread_mutex_lock(&resolver);
    bg_map_wait(map, bg_map_protect(map, guest(first), (int64_t)count * BLOCK));
    for (int b = first; b < first + count; b++) {
        CHECK(bg_pread(fds[where[b].at], before, BLOCK, where[b].place) == BLOCK);
        CHECK(bg_pread(fds[where[b].at], after, BLOCK, where[b].place) == BLOCK);
        CHECK(memcmp(before, after, BLOCK) == 0 && before[0] == before[WORDS - 1]);
        insert(b);
    }
    pthread_mutex_unlock(&resolver);
}

static void *change(void *arg)
{
    uint64_t seed = 5;
    (void)arg;
    for (int i = 0; i < CHANGES; i++) {
        int first = (int)(next_random(&seed) % BLOCKS), left = BLOCKS - first;
        int count = 1 + (int)(next_random(&seed) % (uint64_t)(left < 5 ? left : 5));
        if (i % 100 == 0)
            bg_map_invalidate(map, 0, bg_map_size(map));
        else if (i % 2)
            move(first, count);
        else
            watch(first, count);
    }
    return NULL;
}

static int64_t take_and_read(void)
{
    bg_bitmap_extent run;
    if (bg_bitmap_take(bitmap, 0, BG_BITMAP_NO_LIMIT, 4 * BLOCK, &run) != 1)
        return 0;
    for (int64_t at = run.start; at < run.end; at += BLOCK) {
        int block = (int)((at - FIRST) / BLOCK);
        mirror[block] = read_block(block);
    }
    return run.end - run.start;
}

static void *copy_dirty(void *arg)
{
    (void)arg;
    while (atomic_load(&writers_left))
        take_and_read();
    return NULL;
}

enum kind { LISTS, LONG_WORDS, SHORT_WORDS };

static enum kind kind_of(leaf_ref ref)
{
    return ref & REF_SHORT ? SHORT_WORDS : ref_shift(ref) ? LONG_WORDS : LISTS;
}

static void run(int64_t size, int storages, enum kind kind)
{
    files = storages;
    pthread_t threads[WRITERS + 4];
    CHECK(bg_map_new(size, BG_MAP_MIN_MEMORY, &map) == 0 && bg_bitmap_new(size, BLOCK, &bitmap) == 0);
    for (int i = 0; i < 2; i++) {
        fds[i] = memfd_create("driver", MFD_CLOEXEC);
        slots[i] = bg_map_add_slot(map, fds[i], 1, 1);
    }
    CHECK(bg_map_set_bitmaps(map, &bitmap, 1) > 0);
    next_place[0] = BLOCKS * BLOCK;
    next_place[1] = 0;
    for (int b = 0; b < BLOCKS; b++) {
        /* No neighbours in the file. */
        where[b].at = 0;
        where[b].place = (int64_t)(b * 3 % BLOCKS) * BLOCK;
        write_block(b, 0);
    }
    atomic_store(&writers_left, WRITERS);
    int n = 0;
    for (intptr_t i = 0; i < WRITERS; i++)
        CHECK(pthread_create(&threads[n++], NULL, write_own, (void *)i) == 0);
    for (intptr_t i = 0; i < 2; i++)
        CHECK(pthread_create(&threads[n++], NULL, read_any, (void *)i) == 0);
    CHECK(pthread_create(&threads[n++], NULL, change, NULL) == 0);
    CHECK(pthread_create(&threads[n++], NULL, copy_dirty, NULL) == 0);
    while (n > 0)
        pthread_join(threads[--n], NULL);
    while (take_and_read())
        ;
    for (int b = 0; b < BLOCKS; b++)
        CHECK(mirror[b] == read_block(b));
    CHECK(kind_of(atomic_load(&atomic_load(&map->space)->leaf[1])) == kind);
    bg_map_stats stats;
    bg_map_get_stats(map, &stats);
    CHECK(stats.hits > 0 && stats.misses > 0);
    CHECK(bg_map_free(map) == 0);
    bg_bitmap_free(bitmap);
    close(fds[0]);
    close(fds[1]);
}

void test_extent_map_threads(void)
{
    run(4 * REGION, 2, LISTS);
    /* The last region has few clusters, so words take less than places. */
    run(FIRST + BLOCKS * BLOCK, 2, LONG_WORDS);
    run(FIRST + BLOCKS * BLOCK, 1, SHORT_WORDS);
}
