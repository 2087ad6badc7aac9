/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#include "l2_places.h"

#include "io.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>

#define SECTOR 512 /* places are multiples of it */
#define BATCH 256 /* the map's lock is held for that many at a time */

static bool touches_metadata(const bg_l2_places *p, uint64_t first, uint64_t count)
{
    int64_t low = 0, n = p->metadata_count;
    if (n == 0 || p->metadata[n - 1] < first)
        return false;
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

/* Cut to what is asked for. False: nothing is left. */
static bool bound(const bg_l2_places *p, int64_t start, int64_t length, bg_map_extent *out)
{
    int64_t end = start + length;
    int64_t low = start > p->low ? start : p->low, high = end < p->high ? end : p->high;
    *out = (bg_map_extent){.offset = low, .length = high - low};
    return low < high;
}

/* False: nothing of the run, whose table begins at `disk`, is to be entered. */
static bool place(const bg_l2_places *p, const bg_l2_run *run, int64_t disk, bg_map_extent *out)
{
    int64_t cluster = (int64_t)1 << p->cluster_bits, host = run->host_offset, length = run->count << p->cluster_bits;
    int64_t start = disk + (run->index << p->cluster_bits);
    if (run->kind != BG_L2_DATA || host < cluster || host >= p->host_end)
        return false;
    bool writable = run->flags & BG_L2_COPIED &&
                    !touches_metadata(p, (uint64_t)host >> p->cluster_bits, (uint64_t)run->count);
    if (!bound(p, start, length < p->host_end - host ? length : p->host_end - host, out))
        return false;
    out->storage_offset = host + p->storage + out->offset - start;
    out->slot = p->slot;
    out->flags = writable ? p->flags : 0;
    return out->storage_offset >= 0;
}

/* False: it is not known to read as zeroes. */
static bool place_zero(const bg_l2_places *p, const bg_l2_run *run, int64_t disk, bool zeroes, bg_map_extent *out)
{
    bool zero = run->kind == BG_L2_ZERO || run->kind == BG_L2_ZERO_ALLOCATED || (zeroes && run->kind == BG_L2_UNALLOCATED);
    if (!zero || !bound(p, disk + (run->index << p->cluster_bits), run->count << p->cluster_bits, out))
        return false;
    out->flags = BG_MAP_ZERO;
    return true;
}

/* Where the clusters of plain data are, as `place` has it of those in the middle of things. */
static void decode_plain(const bg_map_form *form, uint64_t *entries, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        uint64_t entry = load_be64(entries, i), host = entry & QCOW2_HOST_OFFSET;
        bool plain = host && !(entry & QCOW2_COMPRESSED) && !(form->version >= 3 && entry & QCOW2_ZERO);
        entries[i] = plain ? (host + (uint64_t)form->storage) | (entry & QCOW2_COPIED ? (uint64_t)form->flags : 0) : BG_MAP_NO_PLACE;
    }
}

/* What is left of a table when it was noted. */
static int64_t insert_places(bg_map *map, int64_t generation, const bg_l2_places *p, const uint64_t *places)
{
    bg_map_extent extents[BATCH];
    int64_t taken = 0, count = 0, cluster = (int64_t)1 << p->cluster_bits;
    for (int64_t i = 0; i <= p->entries; i++) {
        if (count == BATCH || i == p->entries) {
            int64_t ret = bg_map_insert(map, generation, extents, count);
            if (ret < 0)
                return ret;
            taken += ret;
            count = 0;
        }
        if (i == p->entries || places[i] == BG_MAP_NO_PLACE)
            continue;
        if (i > 0 && count > 0 && places[i - 1] + (uint64_t)cluster == places[i])
            extents[count - 1].length += cluster;
        else
            extents[count++] = (bg_map_extent){p->disk + (i << p->cluster_bits), cluster,
                                               (int64_t)(places[i] & ~(uint64_t)(SECTOR - 1)), p->slot,
                                               (int32_t)(places[i] & (SECTOR - 1))};
    }
    return taken;
}

/* Whole clusters of the runs, into `places`; what is not whole is inserted. */
static int64_t find_places(bg_map *map, int64_t generation, const bg_l2_places *p, uint64_t *places)
{
    bg_l2_run runs[BATCH];
    int64_t taken = 0;
    for (int64_t at = 0, n; at < p->entries; at = runs[n - 1].index + runs[n - 1].count) {
        n = bg_l2_decode(p->table, at, p->entries, p->cluster_bits, p->version, 0, runs, BATCH);
        if (n < 0)
            return n;
        for (int64_t i = 0; i < n; i++) {
            const bg_l2_run *run = &runs[i];
            int64_t start = p->disk + (run->index << p->cluster_bits), length = run->count << p->cluster_bits;
            bg_map_extent e;
            if (!place(p, run, p->disk, &e))
                continue;
            bool whole = e.offset == start && e.length == length && !(e.storage_offset & (SECTOR - 1));
            for (int64_t k = 0; whole && k < run->count; k++)
                places[run->index + k] = (uint64_t)(e.storage_offset + (k << p->cluster_bits)) | (uint64_t)e.flags;
            int64_t ret = whole ? 0 : bg_map_insert(map, generation, &e, 1);
            if (ret < 0)
                return ret;
            taken += ret;
        }
    }
    return taken;
}

int64_t bg_map_insert_l2(bg_map *map, int64_t generation, const bg_l2_places *p)
{
    int64_t host = 0;
    if (p->entries < 0 || p->cluster_bits < 9 || p->cluster_bits > 21)
        return -EINVAL;
    uint64_t *places = malloc((size_t)p->entries * sizeof(*places) + 1);
    if (!places)
        return 0;
    for (int64_t i = 0; i < p->entries; i++)
        places[i] = BG_MAP_NO_PLACE;
    int64_t cut = find_places(map, generation, p, places), noted = 0;
    if (cut >= 0 && p->host > 0 && !__builtin_add_overflow(p->host, p->storage, &host) && host > 0) {
        bg_map_form form = {decode_plain, p->storage, p->slot, p->cluster_bits, p->flags, p->version};
        noted = bg_map_note_table(map, generation, &form, p->disk, places, p->entries, host);
    }
    /* What can not be noted is inserted. */
    int64_t inserted = cut < 0 ? cut : insert_places(map, generation, p, places);
    free(places);
    return inserted < 0 ? inserted : cut + (noted > 0 ? noted : 0) + inserted;
}

/* The table of an L1 entry: 0, there is none; -1: it breaks the specification. */
static int64_t table_of(const void *l1, int64_t index, int cluster_bits, int64_t host_end)
{
    uint64_t entry = load_be64(l1, index), host = entry & QCOW2_HOST_OFFSET;
    uint64_t cluster = (uint64_t)1 << cluster_bits;
    if (entry & ~(QCOW2_HOST_OFFSET | QCOW2_COPIED) || (host && (host % cluster || host < cluster || host >= (uint64_t)host_end)))
        return -1;
    return (int64_t)host;
}

int64_t bg_l2_find_parts(const void *l1, int64_t l1_entries, int cluster_bits, int64_t host_end, const int64_t *runs,
                         int64_t count, bg_l2_part *out, int64_t max, int64_t *bytes)
{
    int table_bits = cluster_bits - 3; /* entries of 8 bytes */
    int64_t parts = 0;
    *bytes = 0;
    if (cluster_bits < 9 || cluster_bits > 21 || host_end < 0)
        return -EINVAL;
    for (int64_t i = 0; i < count; i++) {
        int64_t start = runs[2 * i], end = runs[2 * i + 1];
        if (start < 0 || end <= start)
            return -EINVAL;
        for (int64_t at = start >> cluster_bits, stop = ((end - 1) >> cluster_bits) + 1, n; at < stop; at += n) {
            int64_t index = at >> table_bits, next = (index + 1) << table_bits, entry = at - (index << table_bits);
            int64_t table = index < l1_entries ? table_of(l1, index, cluster_bits, host_end) : 0;
            n = (stop < next ? stop : next) - at;
            if (table < 0)
                continue;
            if (parts == max)
                return parts;
            out[parts++] = table ? (bg_l2_part){at << cluster_bits, *bytes, n, table + entry * 8}
                                 : (bg_l2_part){at << cluster_bits, -1, n, -1};
            *bytes += table ? n * 8 : 0;
        }
    }
    return parts;
}

int bg_l2_read_parts(int fd, const bg_l2_part *parts, int64_t count, void *entries, int64_t bytes, int now)
{
    enum bg_haste haste = now ? bg_haste_of(fd) : BG_HASTE_NONE;
    for (int64_t i = 0; i < count; i++) {
        const bg_l2_part *part = &parts[i];
        if (part->host < 0)
            continue;
        if (part->position < 0 || part->count < 0 || part->count > (bytes - part->position) / 8)
            return -EINVAL;
        char *into = (char *)entries + part->position;
        int64_t ret = now ? bg_pread_in(haste, fd, into, part->count * 8, part->host)
                          : bg_pread(fd, into, part->count * 8, part->host);
        if (ret < 0)
            return (int)ret;
    }
    return 0;
}

/* The extents of a part, up to `max` runs of it: how many, or -EINVAL. *at is where to go on. */
static int64_t place_part(const bg_l2_places *p, const bg_l2_part *part, bool zeroes, int64_t *at, bg_map_extent *out,
                          int64_t max)
{
    bg_l2_run runs[BATCH] = {{.count = part->count}};
    int64_t count = 0, n = 1;
    if (part->position >= 0) {
        if (part->count < 0 || part->position > p->entries * 8 || part->count > p->entries - part->position / 8)
            return -EINVAL;
        n = bg_l2_decode((const char *)p->table + part->position, *at, part->count, p->cluster_bits, p->version, 0, runs,
                         max < BATCH ? max : BATCH);
        if (n < 0)
            return n;
    }
    for (int64_t i = 0; i < n; i++)
        count += place(p, &runs[i], p->disk + part->first, &out[count]) ||
                 place_zero(p, &runs[i], p->disk + part->first, zeroes, &out[count]);
    *at = n ? runs[n - 1].index + runs[n - 1].count : part->count;
    return count;
}

int64_t bg_map_insert_l2_parts(bg_map *map, int64_t generation, const bg_l2_places *places, const bg_l2_part *parts,
                               int64_t count, int zeroes)
{
    bg_map_extent extents[BATCH];
    int64_t taken = 0, held = 0;
    for (int64_t i = 0; i < count; i++)
        for (int64_t at = 0; at < parts[i].count;) {
            int64_t n = place_part(places, &parts[i], zeroes, &at, extents + held, BATCH - held);
            if (n < 0)
                return n;
            held += n;
            if (held == BATCH) {
                int64_t ret = bg_map_insert(map, generation, extents, held);
                if (ret < 0)
                    return ret;
                taken += ret;
                held = 0;
            }
        }
    int64_t ret = bg_map_insert(map, generation, extents, held);
    return ret < 0 ? ret : taken + ret;
}
