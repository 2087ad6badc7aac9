/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * First writes: what meets extents with COPY or ALLOCATE. All of a request or nothing: first everything is copied that has to be,
 * then every part of it is given its place, then what nobody can see yet is written, then what is in place, and at last
 * the new places are entered. Else a point in time could come between two parts: the one that has been written, and the
 * one that misses because of it and is done by Python later.
 */
#define _GNU_SOURCE
#include "extent_map_internal.h"

#include "io.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define FEW_PARTS 16
#define TRIES 8 /* others may change the extents meanwhile */

/* A part of the request that goes to one place. */
typedef struct {
    int64_t length;
    bg_map_allocator *allocator; /* or NULL: it goes to the piece */
    bg_map_placing *placing;
    bg_map_piece piece;
} part;

/* Whoever takes something away, the copier or the allocator too, waits for all of the request. */
static reader *hold(bg_map *map)
{
    reader *r = map_enter(map);
    if (r)
        map_looked(r);
    return r;
}

/* 0 once nothing in the range has COPY any more, as far as the copier is concerned; else it is a miss. */
static int ask_copier(bg_map *map, int64_t offset, int64_t length)
{
    bg_map_copier *copier = atomic_load(&map->copier);
    int patience = TRIES;
    for (int64_t at = offset, end = offset + length; at < end;) {
        bg_map_extent e;
        if (!bg_map_find(map, at, &e) || !(e.flags & (BG_MAP_WRITABLE | BG_MAP_ALLOCATE)))
            return BG_MAP_MISS;
        int64_t stop = e.offset + e.length < end ? e.offset + e.length : end;
        if (!(e.flags & BG_MAP_COPY)) {
            at = stop;
            patience = TRIES;
        } else if (patience-- == 0 || !copier || copier->copy(copier, map, at, stop - at, 0) != 0) {
            return BG_MAP_MISS;
        }
    }
    return 0;
}

/* The end of what the allocator has prepared. */
static void end_part(bg_map *map, part *p, int enter)
{
    if (p->allocator)
        p->allocator->finish(p->allocator, map, p->placing, enter);
}

static bool has_copy(bg_map *map, int64_t offset, int64_t length)
{
    bg_map_extent e;
    for (int64_t at = offset; at < offset + length; at = e.offset + e.length)
        if (!bg_map_find(map, at, &e) || e.flags & BG_MAP_COPY)
            return true;
    return false;
}

/*
 * The first part of a range that nothing has to be copied in: 0, -EAGAIN when the extents have changed, or, `now`, it would have to
 * wait; else it is a miss.
 */
static int plan_part(bg_map *map, int64_t offset, int64_t length, int now, part *out)
{
    bg_map_extent e;
    if (!bg_map_find(map, offset, &e))
        return BG_MAP_MISS;
    if (e.flags & BG_MAP_COPY)
        return -EAGAIN;
    int64_t most = e.offset + e.length - offset;
    *out = (part){.length = most < length ? most : length};
    if (e.flags & BG_MAP_WRITABLE) {
        bg_map_request found;
        if (!bg_map_slot_open(map, e.slot, e.storage_offset + offset - e.offset, out->length))
            return BG_MAP_MISS;
        if (bg_map_begin(map, offset, out->length, 1, &out->piece, 1, &found) != 0)
            return -EAGAIN;
        bg_map_end(map, &found, 0); /* the request that is held keeps the piece */
        return 0;
    }
    bg_map_allocator *allocator = atomic_load(&map->allocator);
    if (!(e.flags & BG_MAP_ALLOCATE) || !allocator)
        return BG_MAP_MISS;
    out->allocator = allocator;
    /* Of all that is left: a part that ended with the extent, inside a cluster, would keep the rest of it from the next part. */
    int64_t placed = allocator->prepare(allocator, map, offset, length, now, &out->placing);
    if (placed <= 0)
        return placed == -EAGAIN ? -EAGAIN : BG_MAP_MISS;
    out->length = placed;
    if (!has_copy(map, offset, placed))
        return 0;
    end_part(map, out, 0);
    return -EAGAIN;
}

/* 0, -errno, or -EAGAIN: `now` it would have to wait, and nothing was done. */
static int write_part(bg_map *map, part *p, const char *buf, bg_pipe *pipe, int now)
{
    if (p->allocator)
        return p->allocator->write(p->allocator, p->placing, buf, pipe, now);
    if (pipe && p->piece.haste != BG_HASTE_ALL)
        return -EAGAIN;
    int64_t n = pipe ? bg_pipe_pwrite(pipe, p->piece.fd, p->length, p->piece.storage_offset)
                     : map_put(map, &p->piece, buf, p->length, p->piece.storage_offset, now);
    if (n != -EAGAIN)
        bg_map_wrote(map, p->piece.slot);
    return n < 0 ? (int)n : 0;
}

typedef struct {
    part few[FEW_PARTS], *parts, *many;
    int count, max;
} plan;

/* 0, or as plan_part; -EAGAIN may come early. What has been planned is in *p all the same. */
static int plan_all(bg_map *map, int64_t offset, int64_t length, plan *p)
{
    for (int64_t done = 0; done < length;) {
        if (p->count == p->max) {
            if (p->many || !(p->many = malloc(BG_MAP_MAX_PIECES * sizeof(part))))
                return BG_MAP_MISS;
            memcpy(p->many, p->few, sizeof(p->few));
            p->parts = p->many;
            p->max = BG_MAP_MAX_PIECES;
        }
        int ret = plan_part(map, offset + done, length - done, 0, &p->parts[p->count]);
        if (ret != 0)
            return ret;
        done += p->parts[p->count++].length;
    }
    return 0;
}

/* All parts that are to be placed, or all that are in place. *begun: something that can be seen was written. */
static int write_all(bg_map *map, plan *p, const char *buf, bool placed, bool *begun)
{
    int ret = 0;
    for (int i = 0; ret == 0 && i < p->count; i++) {
        part *each = &p->parts[i];
        if (placed == (each->allocator != NULL)) {
            *begun |= !placed;
            ret = write_part(map, each, buf, NULL, 0);
        }
        buf += each->length;
    }
    return ret;
}

/* As plan_all, or -errno: then what is in place may have been written. */
static int write_planned(bg_map *map, int64_t offset, const char *buf, int64_t length)
{
    plan p = {.max = FEW_PARTS};
    p.parts = p.few;
    bool begun = false;
    int ret = plan_all(map, offset, length, &p);
    if (ret == 0 && write_all(map, &p, buf, true, &begun) != 0)
        ret = BG_MAP_MISS;
    if (ret == 0)
        ret = write_all(map, &p, buf, false, &begun);
    for (int i = 0; i < p.count; i++)
        end_part(map, &p.parts[i], ret == 0);
    if (ret == 0 || begun)
        map_mark(map, offset, length);
    free(p.many);
    return ret;
}

static int first_write(bg_map *map, int64_t offset, const char *buf, int64_t length, int how)
{
    for (int tries = 0; tries < TRIES; tries++) {
        if (ask_copier(map, offset, length) != 0)
            return BG_MAP_MISS;
        int ret = buf ? write_planned(map, offset, buf, length)
                      : map_transfer(map, offset, length, NULL, NULL, BG_MAP_ERASE, how);
        if (ret != -EAGAIN)
            return ret;
    }
    return BG_MAP_MISS;
}

int map_first_write(bg_map *map, int64_t offset, const char *buf, int64_t length, int how)
{
    reader *r = hold(map);
    if (!r)
        return BG_MAP_MISS;
    int ret = first_write(map, offset, buf, length, how);
    if (ret == 0)
        map_count(&r->first_writes, 1);
    map_leave(map, r);
    return ret;
}

int bg_map_has_first_write(bg_map *map, int64_t offset, int64_t length)
{
    if (!atomic_load(&map->copier) && !atomic_load(&map->allocator))
        return 0;
    int first = 0;
    for (int64_t at = offset, end = offset + length; at < end;) {
        bg_map_extent e;
        if (!bg_map_find(map, at, &e) || !(e.flags & WRITES))
            return 0;
        first |= e.flags & (BG_MAP_COPY | BG_MAP_ALLOCATE);
        at = e.offset + e.length;
    }
    return first;
}

/* 0, a miss, or as write_part. */
static int write_now(bg_map *map, int64_t offset, void *buf, bg_pipe *pipe, int64_t length)
{
    part p;
    int ret = plan_part(map, offset, length, 1, &p);
    if (ret != 0)
        return ret;
    bool all = p.length == length;
    ret = all ? write_part(map, &p, buf, pipe, 1) : BG_MAP_MISS;
    if (ret != 0 && pipe)
        bg_pipe_empty(pipe, buf); /* while what was written is still where it was */
    end_part(map, &p, ret == 0);
    if (all && ret != -EAGAIN)
        map_mark(map, offset, length);
    return ret;
}

/* What the last first write to such an extent had copied, bytes. Within a request. */
static int64_t copied_lately(bg_map *map, const bg_map_extent *e)
{
    bg_map_copier *copier = e->flags & BG_MAP_COPY ? atomic_load(&map->copier) : NULL;
    bg_map_allocator *allocator = e->flags & BG_MAP_ALLOCATE ? atomic_load(&map->allocator) : NULL;
    return (copier ? atomic_load_explicit(&copier->lately, memory_order_relaxed) : 0) +
           (allocator ? atomic_load_explicit(&allocator->lately, memory_order_relaxed) : 0);
}

int bg_map_first_write_now(bg_map *map, int64_t offset, void *buf, bg_pipe *pipe, int64_t length, int64_t most)
{
    bg_map_extent e;
    reader *r = hold(map);
    if (!r)
        return BG_MAP_MISS;
    /* Looked at within the request: who has COPY put in from now on waits for the end of this. */
    bool fits = bg_map_find(map, offset, &e) && e.flags & (BG_MAP_COPY | BG_MAP_ALLOCATE) &&
                e.offset + e.length >= offset + length;
    bg_map_copier *copier = atomic_load(&map->copier);
    int ret = BG_MAP_MISS;
    if (fits && copied_lately(map, &e) > most)
        ret = -E2BIG;
    else if (fits && (!(e.flags & BG_MAP_COPY) || (copier && copier->copy(copier, map, offset, length, 1) == 0)))
        ret = write_now(map, offset, buf, pipe, length);
    if (ret == -EAGAIN && copier)
        atomic_store_explicit(&copier->lately, 0, memory_order_relaxed);
    if (ret == 0)
        map_count(&r->first_writes, 1);
    map_leave(map, r);
    return ret;
}
