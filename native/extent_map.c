/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* The map as a whole: life, storage slots, bitmaps, inserting, invalidating, statistics. */
#include "extent_map_internal.h"

#include "io.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

int bg_map_new(int64_t size, int64_t memory, bg_map **out)
{
    if (size < 0 || memory < BG_MAP_MIN_MEMORY)
        return -EINVAL;
    bg_map *map = aligned_alloc(LINE, sizeof(*map));
    if (!map)
        return -ENOMEM;
    memset(map, 0, sizeof(*map));
    map->limit = (size_t)memory;
    map->bytes = sizeof(*map);
    map->eventfd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int ret = map->eventfd < 0 ? -errno : 0;
    space *sp = ret == 0 ? space_new(map, size) : NULL;
    if (ret == 0 && !sp) {
        close(map->eventfd);
        ret = -ENOMEM;
    }
    if (ret < 0) {
        free(map);
        return ret;
    }
    atomic_init(&map->space, sp);
    /* 0 is a record's sign of being free, and no ticket. */
    atomic_init(&map->epoch, 1);
    atomic_init(&map->dirt, 1);
    for (int i = 0; i < BG_MAP_SLOTS; i++)
        atomic_init(&map->slots[i].fd, -1);
    map->looked.last = &map->looked.first;
    map->held.last = &map->held.first;
    map->region = -1;
    pthread_mutex_init(&map->lock, NULL);
    pthread_mutex_init(&map->wait_lock, NULL);
    *out = map;
    return 0;
}

static bool is_busy(bg_map *map)
{
    for (readers *block = &map->readers; block; block = atomic_load(&block->next))
        for (int i = 0; i < READERS; i++)
            if (atomic_load(&block->record[i].state))
                return true;
    return false;
}

int bg_map_free(bg_map *map)
{
    if (!map)
        return 0;
    if (is_busy(map))
        return -EBUSY;
    map_reclaim(map);
    for (readers *block = atomic_load(&map->readers.next), *next; block; block = next) {
        next = atomic_load(&block->next);
        free(block);
    }
    map_forget_sources(map);
    space_free(atomic_load(&map->space));
    free(atomic_load(&map->bitmaps));
    free(atomic_load(&map->holds));
    free(map->work.spans);
    free(map->wide_work.spans);
    close(map->eventfd);
    pthread_mutex_destroy(&map->wait_lock);
    pthread_mutex_destroy(&map->lock);
    free(map);
    return 0;
}

int64_t bg_map_size(bg_map *map)
{
    pthread_mutex_lock(&map->lock);
    int64_t size = atomic_load(&map->space)->size;
    pthread_mutex_unlock(&map->lock);
    return size;
}

int64_t bg_map_generation(bg_map *map)
{
    return (int64_t)atomic_load(&map->epoch);
}

/* The latest ticket among those of the range. */
static uint64_t latest(const uint64_t *stamps, int64_t offset, int64_t length)
{
    int64_t first = offset >> STAMP_SHIFT, last = (offset + length - 1) >> STAMP_SHIFT;
    uint64_t found = 0;
    if (last - first >= STAMPS)
        last = first + STAMPS - 1;
    for (; first <= last; first++)
        if (stamps[first % STAMPS] > found)
            found = stamps[first % STAMPS];
    return found;
}

/* The ticket of a change of the range, which has been made. */
static uint64_t stamp(bg_map *map, int64_t offset, int64_t length, uint64_t *stamps)
{
    uint64_t ticket = map_advance(map);
    if (length) {
        int64_t first = offset >> STAMP_SHIFT, last = (offset + length - 1) >> STAMP_SHIFT;
        if (last - first >= STAMPS)
            last = first + STAMPS - 1;
        for (; first <= last; first++)
            stamps[first % STAMPS] = ticket;
    }
    return ticket;
}

static uint64_t take_away(bg_map *map, int64_t offset, int64_t length, enum change change, uint64_t *stamps)
{
    if (length)
        map_change(map, offset, offset + length, change, &(span){.flags = WRITES});
    map_finish(map);
    return stamp(map, offset, length, stamps);
}

static uint64_t drop_everything(bg_map *map)
{
    uint64_t ticket = take_away(map, 0, atomic_load(&map->space)->size, CHANGE_REMOVE, map->removed);
    for (int i = 0; i < BG_MAP_SLOTS; i++)
        if (map->slots[i].state == SLOT_REMOVED) {
            map->slots[i].state = SLOT_UNMAPPED;
            map->slots[i].ticket = ticket;
        }
    return ticket;
}

int64_t bg_map_invalidate(bg_map *map, int64_t offset, int64_t length)
{
    int64_t ret = -EINVAL;
    pthread_mutex_lock(&map->lock);
    int64_t size = atomic_load(&map->space)->size;
    if (range_in(size, offset, length)) {
        ret = (int64_t)(length == size ? drop_everything(map)
                                       : take_away(map, offset, length, CHANGE_REMOVE, map->removed));
        map->invalidations++;
    }
    pthread_mutex_unlock(&map->lock);
    return ret;
}

int64_t bg_map_protect(bg_map *map, int64_t offset, int64_t length)
{
    int64_t ret = -EINVAL;
    pthread_mutex_lock(&map->lock);
    if (range_in(atomic_load(&map->space)->size, offset, length)) {
        ret = (int64_t)take_away(map, offset, length, CHANGE_CLEAR, map->protected);
        map->protections++;
    }
    pthread_mutex_unlock(&map->lock);
    return ret;
}

int bg_map_copied(bg_map *map, int64_t offset, int64_t length)
{
    int ret = -EINVAL;
    pthread_mutex_lock(&map->lock);
    if (range_in(atomic_load(&map->space)->size, offset, length)) {
        if (length)
            map_change(map, offset, offset + length, CHANGE_CLEAR, &(span){.flags = BG_MAP_COPY});
        map_finish(map);
        ret = 0;
    }
    pthread_mutex_unlock(&map->lock);
    return ret;
}

/* Whatever has become of the range. In this order: who finds the map clean has taken what was noted before. */
static void allocator_noted(bg_map *map)
{
    atomic_store(&map->noted, true);
    bg_map_dirty(map);
}

int bg_map_placed(bg_map *map, int64_t offset, int64_t length, int slot, int64_t storage_offset)
{
    int ret = -EINVAL;
    pthread_mutex_lock(&map->lock);
    space *sp = atomic_load(&map->space);
    int64_t end = offset + length;
    if (slot >= 0 && slot < BG_MAP_SLOTS && range_in(sp->size, offset, length)) {
        span s = {0};
        bool placed = map->slots[slot].state == SLOT_LIVE;
        for (int64_t at = offset; placed && at < end; at = s.end)
            placed = map_find(sp, at, &s) && s.flags & BG_MAP_ALLOCATE;
        if (!placed && length)
            map_change(map, offset, end, CHANGE_REMOVE, NULL);
        for (int64_t at = offset; placed && at < end; at = s.end) {
            /* What is not changed yet is still published as it was, unless memory has run out. */
            if (!map_find(sp, at, &s)) {
                map_change(map, offset, end, CHANGE_REMOVE, NULL);
                break;
            }
            s.end = s.end < end ? s.end : end;
            span what = {at, s.end, storage_offset + at - offset, (uint16_t)slot,
                         (uint16_t)(BG_MAP_WRITABLE | (s.flags & BG_MAP_COPY))};
            map_change(map, at, s.end, CHANGE_SET, &what);
        }
        map_finish(map);
        stamp(map, offset, length, map->placed);
        ret = 0;
    }
    pthread_mutex_unlock(&map->lock);
    allocator_noted(map);
    return ret;
}

int bg_map_zeroed(bg_map *map, int64_t offset, int64_t length)
{
    int ret = -EINVAL;
    pthread_mutex_lock(&map->lock);
    space *sp = atomic_load(&map->space);
    int64_t end = offset + length;
    if (length > 0 && range_in(sp->size, offset, length)) {
        span s = {0};
        bool placed = true;
        for (int64_t at = offset; placed && at < end; at = s.end)
            placed = map_find(sp, at, &s) && (s.flags & (WRITES | BG_MAP_ZERO)) == BG_MAP_WRITABLE;
        map_change(map, offset, end, placed ? CHANGE_SET : CHANGE_REMOVE, &(span){offset, end, 0, 0, BG_MAP_ZERO});
        map_finish(map);
        stamp(map, offset, length, map->placed);
        ret = 0;
    }
    pthread_mutex_unlock(&map->lock);
    allocator_noted(map);
    return ret;
}

int64_t bg_map_set_copier(bg_map *map, bg_map_copier *copier)
{
    pthread_mutex_lock(&map->lock);
    atomic_store(&map->copier, copier);
    int64_t ticket = (int64_t)map_advance(map);
    pthread_mutex_unlock(&map->lock);
    return ticket;
}

int64_t bg_map_set_allocator(bg_map *map, bg_map_allocator *allocator)
{
    pthread_mutex_lock(&map->lock);
    atomic_store(&map->allocator, allocator);
    int64_t ticket = (int64_t)map_advance(map);
    pthread_mutex_unlock(&map->lock);
    return ticket;
}

int64_t bg_map_resize(bg_map *map, int64_t size)
{
    if (size < 0)
        return -EINVAL;
    int64_t ret = 0;
    pthread_mutex_lock(&map->lock);
    const bitmap_list *list = atomic_load(&map->bitmaps);
    for (size_t i = 0; list && i < list->count; i++)
        if (bg_bitmap_size(list->bitmaps[i]) < size)
            ret = -EINVAL;
    space *old = atomic_load(&map->space), *sp = NULL;
    if (ret == 0 && !(sp = space_new(map, size)))
        ret = -ENOMEM;
    if (ret == 0) {
        drop_everything(map);
        map_forget_sources(map);
        atomic_store(&map->space, sp);
        map_retire(map, &map->looked, &old->garbage);
        uint64_t ticket = map_advance(map);
        for (int i = 0; i < STAMPS; i++)
            map->removed[i] = ticket;
        map->hand = 0;
        map_finish(map);
        map->invalidations++;
        ret = (int64_t)ticket;
    }
    pthread_mutex_unlock(&map->lock);
    return ret;
}

static bool extent_ok(const space *sp, const bg_map_extent *e)
{
    if (e->length <= 0 || !range_in(sp->size, e->offset, e->length) || e->flags & ~(BG_MAP_ZERO | WRITES))
        return false;
    return e->flags & BG_MAP_ZERO ||
           (e->slot >= 0 && e->slot < BG_MAP_SLOTS && range_in(INT64_MAX, e->storage_offset, e->length));
}

bool map_is_stale(const bg_map *map, int64_t generation, int64_t offset, int64_t length)
{
    return latest(map->removed, offset, length) >= (uint64_t)generation ||
           latest(map->placed, offset, length) >= (uint64_t)generation;
}

bool map_is_protected(const bg_map *map, int64_t generation, int64_t offset, int64_t length)
{
    return latest(map->protected, offset, length) >= (uint64_t)generation;
}

int64_t bg_map_insert(bg_map *map, int64_t generation, const bg_map_extent *extents, int64_t count)
{
    if (generation < 1 || count < 0)
        return -EINVAL;
    map_recall_around(map, extents, count);
    int64_t taken = 0;
    pthread_mutex_lock(&map->lock);
    const space *sp = atomic_load(&map->space);
    for (int64_t i = 0; i < count; i++)
        if (!extent_ok(sp, &extents[i])) {
            pthread_mutex_unlock(&map->lock);
            return -EINVAL;
        }
    for (int64_t i = 0; i < count; i++) {
        const bg_map_extent *e = &extents[i];
        bool zero = e->flags & BG_MAP_ZERO;
        if (map_is_stale(map, generation, e->offset, e->length) || (!zero && map->slots[e->slot].state != SLOT_LIVE)) {
            map->stale++;
            continue;
        }
        span what = {e->offset, e->offset + e->length, zero ? 0 : e->storage_offset, zero ? 0 : (uint16_t)e->slot,
                     (uint16_t)(zero ? e->flags & ~BG_MAP_WRITABLE : e->flags)};
        if (what.flags & WRITES && map_is_protected(map, generation, e->offset, e->length))
            what.flags &= (uint16_t)~WRITES;
        map_change(map, what.start, what.end, CHANGE_SET, &what);
        taken++;
    }
    map_finish(map);
    map->inserts += taken;
    pthread_mutex_unlock(&map->lock);
    return taken;
}

static int find_free_slot(bg_map *map)
{
    for (int i = 0; i < BG_MAP_SLOTS; i++) {
        const storage *s = &map->slots[i];
        if (s->state == SLOT_FREE || (s->state == SLOT_UNMAPPED && map_oldest(map, false) > s->ticket))
            return i;
    }
    return -ENOSPC;
}

static bool has_removed_slots(const bg_map *map)
{
    for (int i = 0; i < BG_MAP_SLOTS; i++)
        if (map->slots[i].state == SLOT_REMOVED)
            return true;
    return false;
}

int bg_map_add_slot(bg_map *map, int fd, int alignment, int memory_alignment)
{
    if (fd < 0 || !map_alignments_ok(alignment, memory_alignment))
        return -EINVAL;
    enum bg_haste haste = bg_haste_of(fd);
    pthread_mutex_lock(&map->lock);
    int slot = find_free_slot(map);
    if (slot < 0 && has_removed_slots(map)) {
        drop_everything(map);
        slot = find_free_slot(map);
    }
    if (slot >= 0) {
        storage *s = &map->slots[slot];
        s->state = SLOT_LIVE;
        atomic_store(&s->alignment, (uint32_t)alignment);
        s->memory_alignment = (uint32_t)memory_alignment;
        atomic_store(&s->haste, haste);
        atomic_store(&s->written, false);
        atomic_store(&s->flush_error, 0);
        atomic_store(&s->zeroing, 0);
        atomic_store(&s->windows, NULL);
        atomic_store(&s->fd, fd);
        if (atomic_load(&map->slots_used) <= slot)
            atomic_store(&map->slots_used, slot + 1);
    }
    pthread_mutex_unlock(&map->lock);
    return slot;
}

int bg_map_is_direct(bg_map *map)
{
    for (int i = 0; i < atomic_load(&map->slots_used); i++)
        if (atomic_load(&map->slots[i].fd) >= 0 && bg_always_waits(atomic_load(&map->slots[i].haste)))
            return 1;
    return 0;
}

void bg_map_no_aio(bg_map *map, int slot)
{
    int direct = BG_HASTE_DIRECT;
    atomic_compare_exchange_strong(&map->slots[slot].haste, &direct, BG_HASTE_NONE);
}

int64_t bg_map_remove_slot(bg_map *map, int slot)
{
    int64_t ret = -EINVAL;
    pthread_mutex_lock(&map->lock);
    if (slot >= 0 && slot < BG_MAP_SLOTS && map->slots[slot].state == SLOT_LIVE) {
        map->slots[slot].state = SLOT_REMOVED;
        atomic_store(&map->slots[slot].fd, -1);
        ret = (int64_t)map_advance(map);
    }
    pthread_mutex_unlock(&map->lock);
    return ret;
}

int bg_map_take_written(bg_map *map, int slot)
{
    if (slot < 0 || slot >= BG_MAP_SLOTS)
        return -EINVAL;
    storage *s = &map->slots[slot];
    bool written = atomic_load(&s->written);
    if (written) {
        /* First: a flush that does not find the mark must not think that somebody has made it durable. */
        bg_map_dirty(map);
        atomic_store(&s->written, false);
    }
    /* In this order: a flush that took the mark and fails leaves its error before it is over. */
    return written || atomic_load(&s->flushing) > 0 || atomic_load(&s->flush_error) != 0;
}

int bg_map_take_noted(bg_map *map)
{
    return atomic_exchange(&map->noted, false);
}

int bg_map_take_flush_error(bg_map *map, int slot)
{
    return slot < 0 || slot >= BG_MAP_SLOTS ? -EINVAL : atomic_exchange(&map->slots[slot].flush_error, 0);
}

int bg_map_set_zeroing(bg_map *map, int slot, int how, int64_t unit)
{
    if (slot < 0 || slot >= BG_MAP_SLOTS || (how & ~(BG_MAP_PUNCH | BG_MAP_ZERO_RANGE | BG_MAP_WRITE_ZEROES)))
        return -EINVAL;
    unsigned shift = 0;
    if (how & BG_MAP_WRITE_ZEROES) {
        if (unit < 1 || (unit & (unit - 1)) || map->slots[slot].memory_alignment > ZEROES_ALIGNMENT)
            return -EINVAL;
        shift = (unsigned)__builtin_ctzll((uint64_t)unit);
    }
    atomic_store(&map->slots[slot].zeroing, (unsigned)how | shift << ZEROING_UNIT);
    return 0;
}

int bg_map_set_windows(bg_map *map, int slot, bg_windows *windows)
{
    if (slot < 0 || slot >= BG_MAP_SLOTS)
        return -EINVAL;
    atomic_store(&map->slots[slot].windows, windows);
    return 0;
}

int64_t bg_map_dirt(bg_map *map)
{
    return atomic_load(&map->dirt);
}

void bg_map_dirty(bg_map *map)
{
    atomic_fetch_add(&map->dirt, 1);
}

void bg_map_flushed(bg_map *map, int64_t dirt)
{
    atomic_store(&map->clean_at, dirt);
}

int64_t bg_map_set_bitmaps(bg_map *map, bg_bitmap **bitmaps, int64_t count)
{
    if (count < 0 || count > INT32_MAX)
        return -EINVAL;
    size_t bytes = sizeof(bitmap_list) + (size_t)count * sizeof(*bitmaps);
    bitmap_list *list = malloc(bytes);
    if (!list)
        return -ENOMEM;
    list->garbage.bytes = bytes + MALLOC_HEAD;
    list->garbage.lead = 0;
    list->count = (size_t)count;
    for (int64_t i = 0; i < count; i++)
        list->bitmaps[i] = bitmaps[i];
    pthread_mutex_lock(&map->lock);
    int64_t size = atomic_load(&map->space)->size, ret = 0;
    for (int64_t i = 0; i < count; i++)
        if (bg_bitmap_size(bitmaps[i]) < size)
            ret = -EINVAL;
    if (ret == 0) {
        map->bytes += list->garbage.bytes;
        bitmap_list *old = atomic_exchange(&map->bitmaps, list);
        if (old)
            map_retire(map, &map->held, &old->garbage);
        ret = (int64_t)map_advance(map);
        map_reclaim(map);
    } else {
        free(list);
    }
    pthread_mutex_unlock(&map->lock);
    return ret;
}

void bg_map_get_stats(bg_map *map, bg_map_stats *out)
{
    *out = (bg_map_stats){0};
    pthread_mutex_lock(&map->lock);
    map_reclaim(map);
    out->inserts = map->inserts;
    out->stale = map->stale;
    out->invalidations = map->invalidations;
    out->protections = map->protections;
    out->evictions = map->evictions;
    out->recalls = map->recalls;
    out->extents = map->extents;
    out->regions = map->leaves;
    out->bytes = (int64_t)map->bytes;
    out->limit = (int64_t)map->limit;
    pthread_mutex_unlock(&map->lock);
    for (readers *block = &map->readers; block; block = atomic_load(&block->next)) {
        if (block != &map->readers)
            out->bytes += (int64_t)sizeof(*block);
        for (int i = 0; i < READERS; i++) {
            const reader *r = &block->record[i];
            out->hits += atomic_load_explicit(&r->hits, memory_order_relaxed);
            out->misses += atomic_load_explicit(&r->misses, memory_order_relaxed);
            out->bytes_read += atomic_load_explicit(&r->bytes_read, memory_order_relaxed);
            out->bytes_written += atomic_load_explicit(&r->bytes_written, memory_order_relaxed);
            out->first_writes += atomic_load_explicit(&r->first_writes, memory_order_relaxed);
        }
    }
}
