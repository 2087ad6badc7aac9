/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* Requests: looking up, reading, writing. Takes no lock. */
#define _GNU_SOURCE
#include "extent_map_internal.h"

#include "io.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define FEW_PIECES 16
#define MOST_RECALLS 8 /* of a request, which others may take away from it again */
/*
 * Shorter reads and writes win nothing by windows: to find out whether all is in memory and in the file takes as long, and after
 * each switch between client and server the processor has to look for the page anew (4 KiB writes over NBD, depth 1: 47,000 a second
 * instead of 55,000). Where several are made at a time writes do: the processors would take the file's lock and times from each
 * other, or even wait for it (4 connections: 92,000 instead of 52,000).
 */
#define SHORTEST (16 << 10)

/*
 * The entry of `leaf` that holds the region's byte `at`, or -1. A region of `1 << shift` bytes is mostly made of extents of one
 * size, so the place to look first is known, and both parts of the entry come into the cache at once: a map much
 * larger than the cache costs two misses instead of seven.
 */
static int64_t leaf_find(const leaf *l, uint32_t at, unsigned shift)
{
    const uint32_t *starts = leaf_starts(l);
    uint32_t count = l->count, low = 0;
    if (count == 0)
        return -1;
    uint32_t guess = (uint32_t)((uint64_t)at * count >> shift);
    __builtin_prefetch(&l->at[guess]);
    if (starts[guess] <= at) {
        low = guess;
        count = guess + 1 < count && starts[guess + 1] > at ? 1 : count - guess;
    } else {
        count = guess ? guess : 1;
    }
    /* The last start <= at, or the first; without branches that could be mispredicted. */
    while (count > 1) {
        uint32_t half = count / 2;
        low += starts[low + half] <= at ? half : 0;
        count -= half;
    }
    return starts[low] <= at && at - starts[low] < l->at[low].length ? (int64_t)low : -1;
}

/*
 * The span around `offset`, cut to its region: the next region may have a leaf that says otherwise, and to know, its pointer
 * would have to be loaded before the wide array. See extent_map_store.c.
 */
bool map_find(space *sp, int64_t offset, span *out)
{
    int64_t region = offset >> sp->shift, start = region << sp->shift;
    leaf_ref ref = region < sp->regions ? atomic_load(&sp->leaf[region]) : 0;
    if (ref) {
        /* Once set it stays: the line is shared by all readers. When the leaf was replaced meanwhile, it is not set. */
        leaf_ref seen = ref;
        if (!(ref & REF_USED))
            atomic_compare_exchange_strong(&sp->leaf[region], &seen, ref | REF_USED);
        if (ref_shift(ref))
            return ref_cluster(ref, (uint32_t)((offset - start) >> ref_shift(ref)), start, sp->size, out);
        const leaf *l = ref_leaf(ref);
        int64_t i = leaf_find(l, (uint32_t)(offset - start), sp->shift);
        if (i < 0)
            return false;
        const place *p = &l->at[i];
        start += leaf_starts(l)[i];
        *out = (span){start, start + p->length, (int64_t)p->storage_offset, p->slot, p->flags};
        return true;
    }
    const wide *w = atomic_load(&sp->wide);
    size_t i = w ? spans_from(w->spans, w->count, offset) : 0;
    if (!w || i == w->count || w->spans[i].start > offset)
        return false;
    const span *s = &w->spans[i];
    int64_t size = (int64_t)1 << sp->shift;
    *out = (span){start, s->end - start < size ? s->end : start + size,
                  s->flags & BG_MAP_ZERO ? 0 : s->storage_offset + start - s->start, s->slot, s->flags};
    return true;
}

void map_count(_Atomic int64_t *counter, int64_t more)
{
    int64_t now = atomic_load_explicit(counter, memory_order_relaxed);
    atomic_store_explicit(counter, now + more, memory_order_relaxed);
}

static bool all_open(bg_map *map, const bg_map_piece *pieces, int n)
{
    for (int i = 0; i < n; i++)
        if (pieces[i].fd >= 0 && !bg_map_slot_open(map, pieces[i].slot, pieces[i].storage_offset, pieces[i].length))
            return false;
    return true;
}

/* 0, BG_MAP_MISS, -EINVAL or -E2BIG; *used is the number of pieces, *missing where there is no extent, or -1. */
static int look_up(bg_map *map, int64_t offset, int64_t length, bool write, bg_map_piece *pieces, int max, int *used,
                   int64_t *missing)
{
    *missing = -1;
    space *sp = atomic_load(&map->space);
    if (!range_in(sp->size, offset, length))
        return -EINVAL;
    int n = 0;
    for (int64_t at = offset, end = offset + length; at < end;) {
        span s;
        if (!map_find(sp, at, &s)) {
            *missing = at;
            return BG_MAP_MISS;
        }
        bg_map_piece piece = {.length = (s.end < end ? s.end : end) - at, .slot = -1, .fd = -1};
        if (!(s.flags & BG_MAP_ZERO)) {
            piece.storage_offset = s.storage_offset + at - s.start;
            piece.slot = s.slot;
            piece.fd = atomic_load(&map->slots[s.slot].fd);
            if (piece.fd < 0)
                return BG_MAP_MISS;
            piece.haste = atomic_load_explicit(&map->slots[s.slot].haste, memory_order_relaxed);
            piece.memory = (int32_t)map->slots[s.slot].memory_alignment;
        }
        if (write && (s.flags & WRITES) != BG_MAP_WRITABLE)
            return BG_MAP_MISS;
        at += piece.length;
        bg_map_piece *last = &pieces[n - 1];
        if (n > 0 && last->slot == piece.slot &&
            (piece.fd < 0 || last->storage_offset + last->length == piece.storage_offset))
            last->length += piece.length;
        else if (n < max)
            pieces[n++] = piece;
        else
            return -E2BIG;
    }
    *used = n;
    return 0;
}

int bg_map_begin(bg_map *map, int64_t offset, int64_t length, int write, bg_map_piece *pieces, int max, bg_map_request *request)
{
    for (int recalled = 0;; recalled++) {
        reader *r = map_enter(map);
        if (!r)
            return BG_MAP_MISS;
        int64_t missing;
        int n = 0, ret = look_up(map, offset, length, write != 0, pieces, max, &n, &missing);
        map_looked(r);
        if (ret == 0 && !all_open(map, pieces, n))
            ret = BG_MAP_MISS;
        if (ret == 0) {
            *request = (bg_map_request){r, pieces, offset, length, n, write};
            return 0;
        }
        /* Memory for a region is free only when nobody looks, so it is left in between. */
        if (ret == BG_MAP_MISS && missing >= 0 && recalled < MOST_RECALLS) {
            map_leave(map, r);
            if (map_recall(map, missing))
                continue;
            if (!(r = map_enter(map)))
                return ret;
        }
        if (ret == BG_MAP_MISS)
            map_count(&r->misses, 1);
        map_leave(map, r);
        return ret;
    }
}

void map_mark(bg_map *map, int64_t offset, int64_t length)
{
    const bitmap_list *list = atomic_load(&map->bitmaps);
    if (list && list->count)
        bg_bitmap_mark_all(list->bitmaps, list->count, offset, length);
}

void bg_map_wrote(bg_map *map, int slot)
{
    atomic_bool *written = &map->slots[slot].written;
    if (!atomic_load(written))
        atomic_store(written, true);
}

void bg_map_end(bg_map *map, bg_map_request *request, int touched)
{
    reader *r = request->reader;
    if (touched) {
        map_count(&r->hits, 1);
        if (request->write != BG_MAP_ERASE)
            map_count(request->write ? &r->bytes_written : &r->bytes_read, request->length);
    }
    if (request->write && touched) {
        /* After the data, never before: whoever takes the mark flushes then, whoever clears a bit copies then. */
        for (int i = 0; i < request->count; i++)
            bg_map_wrote(map, request->pieces[i].slot);
        map_mark(map, request->offset, request->length);
    }
    map_leave(map, r);
}

static int find(bg_map *map, int64_t offset, bg_map_extent *out)
{
    span s;
    reader *r = map_enter(map);
    if (!r)
        return 0;
    space *sp = atomic_load(&map->space);
    bool found = offset >= 0 && offset < sp->size && map_find(sp, offset, &s);
    if (found && !(s.flags & BG_MAP_ZERO) && atomic_load(&map->slots[s.slot].fd) < 0)
        found = false;
    map_leave(map, r);
    if (found)
        *out = (bg_map_extent){s.start, s.end - s.start, s.storage_offset, s.flags & BG_MAP_ZERO ? -1 : s.slot, s.flags};
    return found;
}

int bg_map_find(bg_map *map, int64_t offset, bg_map_extent *out)
{
    return find(map, offset, out) || (offset >= 0 && map_recall(map, offset) && find(map, offset, out));
}

/* Of a file in memory, or NULL. */
static bg_windows *windows_of(bg_map *map, const bg_map_piece *p)
{
    return p->haste == BG_HASTE_ALL ? atomic_load_explicit(&map->slots[p->slot].windows, memory_order_acquire) : NULL;
}

static int64_t get(bg_map *map, const bg_map_piece *p, void *buf, int64_t length, int64_t offset, bool now)
{
    bg_windows *windows = windows_of(map, p);
    if (windows && length >= SHORTEST && bg_windows_load(windows, buf, length, offset) == 0)
        return length;
    return now ? bg_pread_in(p->haste, p->fd, buf, length, offset) : bg_pread_aligned(p->memory, p->fd, buf, length, offset);
}

static int64_t put(const bg_map_piece *p, const void *buf, int64_t length, int64_t offset, bool now)
{
    return now ? bg_pwrite_in(p->haste, p->fd, buf, length, offset)
               : bg_pwrite_aligned(p->haste, p->memory, p->fd, buf, length, offset);
}

int64_t map_put(bg_map *map, const bg_map_piece *p, const void *buf, int64_t length, int64_t offset, bool now)
{
    bg_windows *windows = windows_of(map, p);
    if (!windows)
        return put(p, buf, length, offset, now);
    bool crowded = bg_windows_begin_write(windows);
    bool stored = (length >= SHORTEST || crowded) && bg_windows_store(windows, buf, length, offset) == 0;
    int64_t ret = stored ? length : put(p, buf, length, offset, now);
    bg_windows_end_write(windows);
    return ret;
}

static int do_read(bg_map *map, const bg_map_request *request, char *buf)
{
    for (int i = 0; i < request->count; i++) {
        const bg_map_piece *p = &request->pieces[i];
        if (p->fd < 0) {
            memset(buf, 0, (size_t)p->length);
        } else {
            int64_t n = get(map, p, buf, p->length, p->storage_offset, false);
            if (n < 0)
                return (int)n;
        }
        buf += p->length;
    }
    return 0;
}

static int do_write(bg_map *map, const bg_map_request *request, const char *buf)
{
    for (int i = 0; i < request->count; i++) {
        const bg_map_piece *p = &request->pieces[i];
        int64_t n = map_put(map, p, buf, p->length, p->storage_offset, false);
        if (n < 0)
            return (int)n;
        buf += p->length;
    }
    return 0;
}

int bg_map_move(bg_map *map, const bg_map_request *request, void *buf)
{
    return request->write ? do_write(map, request, buf) : do_read(map, request, buf);
}

int bg_map_move_part_now(bg_map *map, const bg_map_request *request, void *buf, bg_pipe *pipe, int64_t start, int64_t end)
{
    int64_t ret = 0, first = 0; /* of the piece, in the request */
    if (pipe && start == 0 && !bg_map_in_memory(request))
        return -EAGAIN;
    for (int i = 0; i < request->count && first < end && ret >= 0; i++) {
        const bg_map_piece *p = &request->pieces[i];
        int64_t from = start > first ? start : first, to = first + p->length < end ? first + p->length : end;
        char *at = (char *)buf + from;
        int64_t length = to - from, offset = p->storage_offset + from - first;
        first += p->length;
        if (length <= 0)
            continue;
        if (p->fd < 0)
            memset(at, 0, (size_t)length);
        else if (pipe)
            ret = bg_pipe_pwrite(pipe, p->fd, length, offset);
        else if (request->write)
            ret = map_put(map, p, at, length, offset, from == 0);
        else
            ret = get(map, p, at, length, offset, true);
    }
    return ret < 0 ? (int)ret : 0;
}

int bg_map_in_memory(const bg_map_request *request)
{
    for (int i = 0; i < request->count; i++)
        if (request->pieces[i].fd >= 0 && request->pieces[i].haste != BG_HASTE_ALL)
            return 0;
    return 1;
}

int bg_map_can_store(bg_map *map, int64_t offset, int64_t length)
{
    bg_map_piece pieces[FEW_PIECES];
    int count = 0;
    reader *r = map_enter(map);
    if (!r)
        return 0;
    int64_t missing;
    bool can = look_up(map, offset, length, true, pieces, FEW_PIECES, &count, &missing) == 0;
    for (int i = 0; i < count && can; i++) {
        bg_windows *windows = windows_of(map, &pieces[i]);
        can = windows && bg_windows_can_store(windows, pieces[i].storage_offset, pieces[i].length);
    }
    map_leave(map, r);
    return can;
}

int bg_map_show(bg_map *map, const bg_map_request *request, const void **addresses)
{
    for (int i = 0; i < request->count; i++) {
        const bg_map_piece *p = &request->pieces[i];
        bg_windows *windows = windows_of(map, p);
        addresses[i] = windows ? bg_windows_find(windows, p->storage_offset, p->length) : NULL;
        if (!addresses[i])
            return -EAGAIN;
    }
    return 0;
}

/* As bg_map_pread and writes in place, without waiting: -EAGAIN. */
static int transfer_now(bg_map *map, int64_t offset, int64_t length, void *buf, int write)
{
    bg_map_piece pieces[FEW_PIECES];
    bg_map_request request;
    int ret = bg_map_begin(map, offset, length, write, pieces, FEW_PIECES, &request);
    if (ret != 0)
        return ret == -E2BIG ? -EAGAIN : ret;
    ret = bg_map_move_part_now(map, &request, buf, NULL, 0, length);
    bg_map_end(map, &request, ret != -EAGAIN);
    return ret;
}

/* Whether [offset, offset + length) has a whole unit of the disk, whose last one may be short. */
static bool has_unit(bg_map *map, unsigned shift, int64_t offset, int64_t length)
{
    int64_t end = offset + length, rest = ((int64_t)1 << shift) - 1;
    int64_t first = (offset >> shift) + ((offset & rest) != 0), stop = end >> shift;
    return first < stop || (first == stop && end & rest && end == bg_map_size(map));
}

/* What the slot allows, of `how`, for a request of that range. */
static int slot_zeroing(bg_map *map, int slot, int64_t offset, int64_t length, int how)
{
    unsigned allowed = atomic_load_explicit(&map->slots[slot].zeroing, memory_order_relaxed);
    how &= (int)allowed;
    if (how & BG_MAP_WRITE_ZEROES && has_unit(map, allowed >> ZEROING_UNIT, offset, length))
        how &= ~BG_MAP_WRITE_ZEROES;
    return how;
}

/* What all slots of the request allow. */
static int zeroing(bg_map *map, const bg_map_request *request, int how)
{
    for (int i = 0; i < request->count; i++)
        how = slot_zeroing(map, request->pieces[i].slot, request->offset, request->length, how);
    return how;
}

/* Where it would have to be written, but for units: those are the allocator's. 0 or a miss. */
static int zero_units(bg_map *map, const bg_map_request *request, int how)
{
    bg_map_allocator *allocator = atomic_load(&map->allocator);
    if (how & BG_MAP_PUNCH || !allocator || !allocator->zero)
        return BG_MAP_MISS;
    for (int i = 0; i < request->count; i++) {
        const storage *s = &map->slots[request->pieces[i].slot];
        if (!(atomic_load_explicit(&s->zeroing, memory_order_relaxed) & BG_MAP_WRITE_ZEROES))
            return BG_MAP_MISS;
    }
    return allocator->zero(allocator, map, request->offset, request->length) == 0 ? 0 : BG_MAP_MISS;
}

static int write_zeroes(const bg_map_request *request)
{
    static _Alignas(ZEROES_ALIGNMENT) char zeroes[BG_MAP_MAX_ALIGNMENT]; /* a multiple of what a slot may want */
    for (int i = 0; i < request->count; i++) {
        const bg_map_piece *p = &request->pieces[i];
        for (int64_t done = 0, n; done < p->length; done += n) {
            n = p->length - done < (int64_t)sizeof(zeroes) ? p->length - done : (int64_t)sizeof(zeroes);
            int64_t ret = bg_pwrite(p->fd, zeroes, n, p->storage_offset + done);
            if (ret < 0)
                return (int)ret;
        }
    }
    return 0;
}

/* 0, -errno, or BG_MAP_MISS: the file system can not, and is not asked again. `how`: PUNCH or ZERO_RANGE. */
static int allocate_zeroes(bg_map *map, const bg_map_request *request, int how)
{
    int mode = how == BG_MAP_PUNCH ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE;
    for (int i = 0; i < request->count; i++) {
        const bg_map_piece *p = &request->pieces[i];
        int ret;
        do
            ret = fallocate(p->fd, mode | FALLOC_FL_KEEP_SIZE, p->storage_offset, p->length);
        while (ret < 0 && errno == EINTR);
        if (ret < 0 && errno != EOPNOTSUPP && errno != ENOSYS)
            return -errno;
        if (ret < 0) {
            atomic_fetch_and(&map->slots[p->slot].zeroing, ~(unsigned)how);
            return i == 0 ? BG_MAP_MISS : -EOPNOTSUPP;
        }
    }
    return 0;
}

static int do_zero(bg_map *map, const bg_map_request *request, int how)
{
    int ret = how & BG_MAP_PUNCH ? allocate_zeroes(map, request, BG_MAP_PUNCH) : BG_MAP_MISS;
    if (ret == BG_MAP_MISS && how & BG_MAP_ZERO_RANGE)
        ret = allocate_zeroes(map, request, BG_MAP_ZERO_RANGE);
    return ret == BG_MAP_MISS && how & BG_MAP_WRITE_ZEROES ? write_zeroes(request) : ret;
}

/* By what all slots allow. */
static int erase(bg_map *map, const bg_map_request *request, int how)
{
    int allowed = zeroing(map, request, how);
    return allowed ? do_zero(map, request, allowed) : zero_units(map, request, how);
}

int map_transfer(bg_map *map, int64_t offset, int64_t length, char *into, const char *from, int write, int how)
{
    bg_map_piece few[FEW_PIECES], *pieces = few, *many = NULL;
    bg_map_request request;
    int ret;
    for (int max = FEW_PIECES;; max = BG_MAP_MAX_PIECES) {
        ret = bg_map_begin(map, offset, length, write, pieces, max, &request);
        if (ret != -E2BIG)
            break;
        if (many || !(many = malloc(BG_MAP_MAX_PIECES * sizeof(*many)))) {
            ret = BG_MAP_MISS;
            break;
        }
        pieces = many;
    }
    if (ret == 0) {
        ret = write == BG_MAP_ERASE ? erase(map, &request, how)
              : write               ? do_write(map, &request, from)
                                    : do_read(map, &request, into);
        bg_map_end(map, &request, ret != BG_MAP_MISS);
    }
    free(many);
    return ret;
}

/*
 * What all slots allow, of `how`, where the copier has to be asked about some of the range, and nothing else is in the way of
 * overwriting it; else 0. Whoever can not make zeroes must not have it asked either.
 */
static int zeroing_after_copy(bg_map *map, int64_t offset, int64_t length, int how)
{
    bool copy = false;
    for (int64_t at = offset, end = offset + length; at < end && how;) {
        bg_map_extent e;
        if (!bg_map_find(map, at, &e) || (e.flags & (BG_MAP_WRITABLE | BG_MAP_ALLOCATE)) != BG_MAP_WRITABLE)
            return 0;
        how = slot_zeroing(map, e.slot, offset, length, how);
        copy |= (e.flags & BG_MAP_COPY) != 0;
        at = e.offset + e.length;
    }
    return copy && atomic_load(&map->copier) ? how : 0;
}

static bool is_ignored(bg_map *map, int64_t offset, int64_t length, int how)
{
    unsigned unit = how == BG_MAP_PUNCH ? atomic_load_explicit(&map->ignored, memory_order_relaxed) : 0;
    return unit && range_in(bg_map_size(map), offset, length) && !has_unit(map, unit - 1, offset, length);
}

int bg_map_ignore_discards(bg_map *map, int64_t unit)
{
    if (unit < 0 || (unit & (unit - 1)))
        return -EINVAL;
    atomic_store(&map->ignored, unit ? (unsigned)__builtin_ctzll((uint64_t)unit) + 1 : 0);
    return 0;
}

/* Nothing is done, and it counts. */
static int ignore(bg_map *map)
{
    reader *r = map_enter(map);
    if (!r)
        return BG_MAP_MISS;
    map_count(&r->hits, 1);
    map_leave(map, r);
    return 0;
}

int bg_map_zero_now(bg_map *map, int64_t offset, int64_t length, int how, int64_t longest)
{
    if (is_ignored(map, offset, length, how))
        return ignore(map);
    bg_map_piece pieces[FEW_PIECES];
    bg_map_request request;
    int ret = bg_map_begin(map, offset, length, BG_MAP_ERASE, pieces, FEW_PIECES, &request);
    if (ret == BG_MAP_MISS && zeroing_after_copy(map, offset, length, how))
        return -EAGAIN;
    if (ret != 0)
        return ret == -E2BIG ? -EAGAIN : ret;
    int allowed = zeroing(map, &request, how);
    ret = allowed ? -EAGAIN : zero_units(map, &request, how);
    if (allowed && length <= longest && bg_map_in_memory(&request))
        ret = do_zero(map, &request, allowed);
    bg_map_end(map, &request, ret != -EAGAIN && ret != BG_MAP_MISS);
    return ret;
}

/* What has been changed so far, or -1: native flushes are not enough for that. */
static int64_t clean_dirt(bg_map *map)
{
    int64_t dirt = atomic_load(&map->dirt);
    return atomic_load(&map->clean_at) == dirt ? dirt : -1;
}

static bool is_written(const storage *s)
{
    return atomic_load(&s->written) || atomic_load(&s->flushing);
}

int bg_map_try_flush(bg_map *map, int counts)
{
    int64_t dirt = clean_dirt(map);
    if (dirt < 0)
        return 0;
    for (int i = 0; i < atomic_load(&map->slots_used); i++)
        if (is_written(&map->slots[i]))
            return 1;
    /* Another flush may have taken a mark, and failed before it was looked for. */
    if (atomic_load(&map->dirt) != dirt)
        return 0;
    reader *r = counts ? map_enter(map) : NULL;
    if (r) {
        map_count(&r->hits, 1);
        map_leave(map, r);
    }
    return 2;
}

/*
 * The mark is taken before, so that writes during the flush leave another, and `flushing` is raised before that: who looks
 * meanwhile finds one or the other, and flushes, too.
 */
static int flush_slot(bg_map *map, storage *s)
{
    int ret, fd = atomic_load(&s->fd);
    if (fd < 0)
        return BG_MAP_MISS;
    bg_windows *windows = atomic_load(&s->windows);
    atomic_fetch_add(&s->flushing, 1);
    atomic_store(&s->written, false);
    if (windows)
        bg_windows_touch(windows);
    do
        ret = fdatasync(fd) < 0 ? errno : 0;
    while (ret == EINTR);
    if (ret != 0) {
        atomic_store(&s->flush_error, ret);
        bg_map_dirty(map);
        atomic_store(&s->written, true);
    }
    atomic_fetch_sub(&s->flushing, 1);
    return ret == 0 ? 0 : BG_MAP_MISS;
}

int bg_map_flush(bg_map *map, int counts)
{
    int64_t dirt = clean_dirt(map);
    reader *r = dirt >= 0 ? map_enter(map) : NULL;
    if (!r)
        return BG_MAP_MISS;
    map_looked(r);
    int ret = 0;
    for (int i = 0; ret == 0 && i < atomic_load(&map->slots_used); i++)
        if (is_written(&map->slots[i]))
            ret = flush_slot(map, &map->slots[i]);
    if (ret == 0 && atomic_load(&map->dirt) != dirt)
        ret = BG_MAP_MISS; /* see bg_map_try_flush */
    if (counts)
        map_count(ret == 0 ? &r->hits : &r->misses, 1);
    map_leave(map, r);
    return ret;
}

int bg_map_pread(bg_map *map, int64_t offset, void *buf, int64_t length)
{
    return map_transfer(map, offset, length, buf, NULL, false, 0);
}

int bg_map_pread_now(bg_map *map, int64_t offset, void *buf, int64_t length)
{
    return transfer_now(map, offset, length, buf, 0);
}

int bg_map_pwrite_now(bg_map *map, int64_t offset, const void *buf, int64_t length)
{
    int ret = transfer_now(map, offset, length, (void *)buf, 1);
    return ret == BG_MAP_MISS ? bg_map_first_write_now(map, offset, (void *)buf, NULL, length, INT64_MAX) : ret;
}

int bg_map_pwrite(bg_map *map, int64_t offset, const void *buf, int64_t length)
{
    int ret = map_transfer(map, offset, length, NULL, buf, true, 0);
    if (ret != BG_MAP_MISS || !bg_map_has_first_write(map, offset, length))
        return ret;
    return map_first_write(map, offset, buf, length, 0);
}

int bg_map_zero(bg_map *map, int64_t offset, int64_t length, int how)
{
    if (is_ignored(map, offset, length, how))
        return ignore(map);
    int ret = map_transfer(map, offset, length, NULL, NULL, BG_MAP_ERASE, how);
    if (ret != BG_MAP_MISS || !(how = zeroing_after_copy(map, offset, length, how)))
        return ret;
    return map_first_write(map, offset, NULL, length, how);
}
