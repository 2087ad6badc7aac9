/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#include "l2_places.h"

#include <errno.h>
#include <stdbool.h>

#define BATCH 256 /* the map's lock is held for that many at a time */

static bool touches_metadata(const bg_l2_places *p, uint64_t first, uint64_t count)
{
    int64_t low = 0, n = p->metadata_count;
    while (n > 0) {
        int64_t half = n / 2;
        if (p->metadata[low + half] < first) {
            low += half + 1;
            n -= half + 1;
        } else {
            n = half;
        }
    }
    return low < p->metadata_count && p->metadata[low] < first + count;
}

/* False: nothing of the run is to be entered. */
static bool place(const bg_l2_places *p, const bg_l2_run *run, bg_map_extent *out)
{
    int64_t cluster = (int64_t)1 << p->cluster_bits, host = run->host_offset, length = run->count << p->cluster_bits;
    if (run->kind != BG_L2_DATA || host < cluster || host >= p->host_end)
        return false;
    bool writable = run->flags & BG_L2_COPIED &&
                    !touches_metadata(p, (uint64_t)host >> p->cluster_bits, (uint64_t)run->count);
    if (length > p->host_end - host)
        length = p->host_end - host;
    int64_t start = p->disk + (run->index << p->cluster_bits), end = start + length;
    int64_t low = start > p->low ? start : p->low, high = end < p->high ? end : p->high;
    *out = (bg_map_extent){
        .offset = low,
        .length = high - low,
        .storage_offset = host + p->storage + low - start,
        .slot = p->slot,
        .flags = writable ? p->flags : 0,
    };
    return low < high && out->storage_offset >= 0;
}

int64_t bg_map_insert_l2(bg_map *map, int64_t generation, const bg_l2_places *places)
{
    bg_l2_run runs[BATCH];
    bg_map_extent extents[BATCH];
    int64_t taken = 0;
    for (int64_t at = 0, n; at < places->entries; at = runs[n - 1].index + runs[n - 1].count) {
        n = bg_l2_decode(places->table, at, places->entries, places->cluster_bits, places->version, 0, runs, BATCH);
        if (n < 0)
            return n;
        int64_t count = 0;
        for (int64_t i = 0; i < n; i++)
            count += place(places, &runs[i], &extents[count]);
        int64_t ret = bg_map_insert(map, generation, extents, count);
        if (ret < 0)
            return ret;
        taken += ret;
    }
    return taken;
}
