/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Cost of a look-up (begin and end of a 4 KiB request, without I/O), for bench_extent_map.py:
 *
 *     extent_map MAPPED_MIB CLUSTER_KIB MEMORY_MIB THREADS        CLUSTER_KIB 0: one extent
 *
 * maps the first MAPPED_MIB of a disk of 1 TiB, in clusters that do not continue each other, and prints as JSON: ns per look-up
 * of random places there (per thread), share of hits, extents and bytes held, ns per extent inserted in bulk, ns per insert of
 * a single one.
 */
#include "extent_map.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define LOOKUPS 4000000
#define SINGLES 20000
#define BATCH 8192 /* an L2 table of 64 KiB */

static bg_map *map;
static int64_t mapped;
static double took[64];

/* Of this thread's own time: other programs then cost cache, but not turns. */
static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static void *look_up(void *arg)
{
    uint64_t seed = 88172645463325252u + (uint64_t)(size_t)arg;
    uint64_t blocks = (uint64_t)mapped >> 12;
    bg_map_piece pieces[4];
    bg_map_request request;
    double start = now();
    for (int i = 0; i < LOOKUPS; i++) {
        int64_t offset = (int64_t)((next_random(&seed) >> 11) % blocks) << 12;
        if (bg_map_begin(map, offset, 4096, 0, pieces, 4, &request) == 0)
            bg_map_end(map, &request, 1);
    }
    took[(size_t)arg] = now() - start;
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc != 5)
        return 2;
    mapped = atoll(argv[1]) << 20;
    int64_t cluster = atoll(argv[2]) << 10, size = (int64_t)1 << 40;
    int threads = atoi(argv[4]);
    static bg_map_extent e[BATCH];
    pthread_t thread[64];
    bg_map_stats before, after;
    if (threads < 1 || threads > 64 || bg_map_new(size, atoll(argv[3]) << 20, &map) < 0)
        return 1;
    int slot = bg_map_add_slot(map, 0, 1, 1);
    double start = now(), single = 0;
    int64_t inserted = 0;
    if (cluster == 0) {
        e[0] = (bg_map_extent){0, mapped, 0, slot, BG_MAP_WRITABLE};
        inserted += bg_map_insert(map, bg_map_generation(map), e, 1);
    }
    for (int64_t at = 0, n = 0; cluster && at < mapped; at += cluster) {
        e[n++] = (bg_map_extent){at, cluster, size - at, slot, BG_MAP_WRITABLE};
        if (n == BATCH || at + cluster >= mapped) {
            inserted += bg_map_insert(map, bg_map_generation(map), e, n);
            n = 0;
        }
    }
    double bulk = (now() - start) / (double)inserted;
    if (cluster) {
        uint64_t seed = 5;
        start = now();
        for (int i = 0; i < SINGLES; i++) {
            int64_t at = (int64_t)((next_random(&seed) >> 11) % (uint64_t)(mapped / cluster)) * cluster;
            e[0] = (bg_map_extent){at, cluster, size - at, slot, BG_MAP_WRITABLE};
            bg_map_insert(map, bg_map_generation(map), e, 1);
        }
        single = (now() - start) / SINGLES;
    }
    look_up(NULL);
    bg_map_get_stats(map, &before);
    for (int i = 0; i < threads; i++)
        pthread_create(&thread[i], NULL, look_up, (void *)(size_t)i);
    for (int i = 0; i < threads; i++)
        pthread_join(thread[i], NULL);
    double lookup = 0;
    for (int i = 0; i < threads; i++)
        lookup += took[i] / LOOKUPS / threads;
    bg_map_get_stats(map, &after);
    printf("{\"lookup_ns\": %.1f, \"hits\": %.3f, \"extents\": %lld, \"bytes\": %lld, \"bulk_insert_ns\": %.1f, "
           "\"single_insert_ns\": %.1f}\n",
           lookup, (double)(after.hits - before.hits) / LOOKUPS / threads, (long long)after.extents, (long long)after.bytes, bulk,
           single);
    return bg_map_free(map);
}
