/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* Maps of fragmented disks, larger than their memory: tables of several sizes, and readers while places are used again. */
#include "driver.h"
#include "extent_map_internal.h"

#include <pthread.h>
#include <string.h>

#define LIMIT ((int64_t)4 << 20) /* the least with slabs */
#define CLUSTER 4096
#define REGION ((int64_t)1 << REGION_SHIFT_MIN)
#define PER_REGION (REGION / CLUSTER)
#define REGIONS 280 /* as many as do not fit */
#define SIZE (REGIONS * REGION)
#define BATCH 256
#define READERS_OF_ALL 2

static bg_map *map;
static int slots[2];
static atomic_bool over;

/* No two neighbours of the disk are neighbours there. */
static int64_t home_of(int64_t cluster)
{
    return (SIZE / CLUSTER - cluster) * CLUSTER;
}

/* `step` 1: its clusters are in one storage; 2: by turns. */
static void fill(int64_t region, int64_t length, int slot, int step)
{
    bg_map_extent e[BATCH];
    for (int64_t at = region * REGION, end = at + length; at < end;) {
        int n = 0;
        for (; n < BATCH && at < end; n++, at += CLUSTER) {
            int64_t cluster = at / CLUSTER;
            e[n] = (bg_map_extent){at, CLUSTER, home_of(cluster), slots[(slot + cluster % step) % 2], BG_MAP_WRITABLE};
        }
        CHECK(bg_map_insert(map, bg_map_generation(map), e, n) == n);
    }
}

/* Once nobody looks at what is to be free: what changes are prepared in may grow before that. */
static void check_bound(void)
{
    bg_map_stats stats;
    for (int i = 0; i == 0 || (stats.bytes > LIMIT && i < 100000); i++)
        bg_map_get_stats(map, &stats);
    CHECK(stats.bytes <= LIMIT);
}

/* How many of the clusters are known; all that is known is right. */
static int64_t known(int64_t first, int64_t regions)
{
    int64_t n = 0;
    for (int64_t at = first * REGION; at < (first + regions) * REGION; at += 5 * CLUSTER) {
        bg_map_extent e;
        if (!bg_map_find(map, at, &e))
            continue;
        CHECK(e.offset == at && e.length == CLUSTER && e.storage_offset == home_of(at / CLUSTER));
        n++;
    }
    return n;
}

static void start(void)
{
    CHECK(bg_map_new(SIZE, LIMIT, &map) == 0);
    for (int i = 0; i < 2; i++)
        slots[i] = bg_map_add_slot(map, i, 1, 1);
}

static bool is_short(int64_t region)
{
    return (atomic_load(&atomic_load(&map->space)->leaf[region]) & REF_SHORT) != 0;
}

static int slabs(void)
{
    int n = 0;
    for (int i = 0; i < SLAB_CLASSES; i++)
        n += map->classes[i].slabs;
    return n;
}

static void order(int64_t *regions, uint64_t seed)
{
    for (int64_t i = 0; i < REGIONS; i++)
        regions[i] = i;
    for (int64_t i = REGIONS - 1; i > 0; i--) {
        int64_t other = (int64_t)(next_random(&seed) % (uint64_t)(i + 1)), swap = regions[i];
        regions[i] = regions[other];
        regions[other] = swap;
    }
}

/* In any order: the memory is used for what came last, and given back. */
static void more_than_fits(void)
{
    int64_t regions[REGIONS];
    bg_map_stats before, stats;
    start();
    order(regions, 99);
    bg_map_get_stats(map, &before);
    for (int64_t i = 0; i < REGIONS; i++) {
        fill(regions[i], REGION, 0, 1);
        CHECK(is_short(regions[i]) && known(regions[i], 1) > 0);
        check_bound();
    }
    bg_map_get_stats(map, &stats);
    CHECK(stats.regions > REGIONS * 4 / 5 && stats.regions < REGIONS);
    CHECK(slabs() > 0 && known(0, REGIONS) > 0);
    bg_map_invalidate(map, 0, SIZE);
    CHECK(slabs() == 0 && map->leaves == 0 && known(0, REGIONS) == 0);
    bg_map_get_stats(map, &stats);
    CHECK(stats.bytes - before.bytes < 1 << 20); /* what changes are prepared in */
    fill(7, REGION, 0, 1);
    CHECK(known(7, 1) > 0 && slabs() == 1);
    CHECK(bg_map_free(map) == 0);
}

/* Places are free once nobody looks: as long as somebody does, that they will be is enough. */
static void somebody_looks(void)
{
    bg_map_stats before, after;
    start();
    for (int64_t i = 0; i < REGIONS - 1; i++)
        fill(i, REGION, 0, 1);
    bg_map_get_stats(map, &before);
    reader *r = map_enter(map);
    fill(REGIONS - 1, REGION, 0, 1);
    map_leave(map, r);
    bg_map_get_stats(map, &after);
    CHECK(before.evictions > 0 && after.evictions - before.evictions < 8);
    CHECK(bg_map_free(map) == 0);
}

/* Also the tables of which few fit into a slab. */
static void large_tables(void)
{
    bg_map_extent e[BATCH];
    CHECK(bg_map_new(SIZE, 64 * LIMIT, &map) == 0);
    slots[0] = bg_map_add_slot(map, 0, 1, 1);
    int64_t cluster = 512, clusters = REGION / cluster;
    for (int64_t i = 0; i < clusters; i += BATCH) {
        for (int64_t n = 0; n < BATCH; n++)
            e[n] = (bg_map_extent){(i + n) * cluster, cluster, (clusters - i - n) * cluster, slots[0], 0};
        CHECK(bg_map_insert(map, bg_map_generation(map), e, BATCH) == BATCH);
    }
    CHECK(is_short(0) && slabs() == 1);
    CHECK(bg_map_free(map) == 0);
}

/* Slabs of one size have all the memory when tables of another, then lists, are to be made. */
static void other_sizes(void)
{
    int64_t regions[REGIONS];
    bg_map_stats stats;
    start();
    for (int round = 0; round < 4; round++) {
        int kind = round % 3; /* tables of short words, of long ones, lists */
        order(regions, (uint64_t)round + 1);
        for (int64_t i = 0; i < REGIONS; i++) {
            bg_map_get_stats(map, &stats);
            int64_t evictions = stats.evictions;
            if (kind < 2)
                fill(regions[i], REGION, round % 2, kind + 1);
            else
                fill(regions[i], REGION / 16, 0, 1);
            check_bound();
            CHECK(known(regions[i], 1) > 0);
            bg_map_get_stats(map, &stats);
            CHECK(stats.evictions - evictions < REGIONS / 2); /* a slab's, and a few by age */
        }
        CHECK(stats.regions > REGIONS / 4);
        known(0, REGIONS);
    }
    CHECK(bg_map_free(map) == 0);
}

static void *read_all(void *arg)
{
    int64_t seen = 0;
    for (int64_t first = (intptr_t)arg; !atomic_load(&over); first = (first + 7) % REGIONS)
        seen += known(first, 1);
    CHECK(seen > 0);
    return NULL;
}

/* Whoever still looks at a table that was evicted must not find another region's words there. */
static void read_while_places_are_used_again(void)
{
    pthread_t threads[READERS_OF_ALL];
    int64_t regions[REGIONS];
    start();
    atomic_store(&over, false);
    for (intptr_t i = 0; i < READERS_OF_ALL; i++)
        CHECK(pthread_create(&threads[i], NULL, read_all, (void *)i) == 0);
    for (uint64_t round = 0; round < 2; round++) {
        order(regions, round + 5);
        for (int64_t i = 0; i < REGIONS; i++) {
            fill(regions[i], REGION, (int)round, i % 50 ? 1 : 2);
            check_bound();
        }
    }
    atomic_store(&over, true);
    for (int i = 0; i < READERS_OF_ALL; i++)
        pthread_join(threads[i], NULL);
    CHECK(bg_map_free(map) == 0);
}

void test_extent_map_slabs(void)
{
    more_than_fits();
    somebody_looks();
    large_tables();
    other_sizes();
    read_while_places_are_used_again();
}
