/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* What of the storage may be used: alignments, and ranges that somebody has for himself. */
#define _GNU_SOURCE
#include "extent_map_internal.h"

#include <errno.h>

static bool alignment_ok(int alignment)
{
    return alignment > 0 && alignment <= BG_MAP_MAX_ALIGNMENT && (alignment & (alignment - 1)) == 0;
}

bool map_alignments_ok(int alignment, int memory_alignment)
{
    return alignment_ok(alignment) && alignment_ok(memory_alignment);
}

int64_t bg_map_align_slot(bg_map *map, int slot, int alignment)
{
    if (slot < 0 || slot >= BG_MAP_SLOTS || !alignment_ok(alignment))
        return -EINVAL;
    pthread_mutex_lock(&map->lock);
    atomic_store(&map->slots[slot].alignment, (uint32_t)alignment);
    int64_t ret = (int64_t)map_advance(map);
    pthread_mutex_unlock(&map->lock);
    return ret;
}

int bg_map_slot_open(bg_map *map, int slot, int64_t offset, int64_t length)
{
    if (slot < 0 || slot >= BG_MAP_SLOTS)
        return 1;
    uint32_t alignment = atomic_load(&map->slots[slot].alignment); /* not before the request has begun */
    if ((uint64_t)(offset | length) & (alignment - 1))
        return 0;
    const hold_list *holds = atomic_load(&map->holds);
    for (size_t i = 0; holds && i < holds->count; i++) {
        const held_range *h = &holds->at[i];
        if (h->slot == slot && h->start < offset + length && offset < atomic_load(&h->end))
            return 0;
    }
    return 1;
}

/* For so many, or NULL. */
static hold_list *new_list(size_t count)
{
    size_t bytes = sizeof(hold_list) + count * sizeof(held_range);
    hold_list *list = malloc(bytes);
    if (list) {
        *list = (hold_list){.count = count};
        list->garbage.bytes = bytes + MALLOC_HEAD;
    }
    return list;
}

/* With the lock held. Returns the ticket of the change. */
static int64_t replace(bg_map *map, hold_list *list)
{
    if (list)
        map->bytes += list->garbage.bytes;
    hold_list *old = atomic_exchange(&map->holds, list);
    if (old)
        map_retire(map, &map->held, &old->garbage);
    int64_t ticket = (int64_t)map_advance(map);
    map_reclaim(map);
    return ticket;
}

/* All holds of `before` that are not over, but for `number`, in a list with room for one more. */
static hold_list *copy_list(hold_list *before, int64_t number)
{
    hold_list *list = new_list(before ? before->count + 1 : 1);
    if (!list)
        return NULL;
    list->count = 0;
    for (size_t i = 0; before && i < before->count; i++)
        if (before->at[i].number != number && atomic_load(&before->at[i].end) > before->at[i].start)
            list->at[list->count++] = before->at[i];
    return list;
}

int64_t bg_map_hold(bg_map *map, int slot, int64_t start, int64_t end, int64_t *ticket)
{
    if (slot < 0 || slot >= BG_MAP_SLOTS || start < 0 || end <= start)
        return -EINVAL;
    pthread_mutex_lock(&map->lock);
    hold_list *list = copy_list(atomic_load(&map->holds), 0);
    int64_t number = list ? ++map->last_hold : -ENOMEM;
    if (list) {
        list->at[list->count++] = (held_range){number, start, end, slot};
        *ticket = replace(map, list);
    }
    pthread_mutex_unlock(&map->lock);
    return number;
}

/* With the lock held: take the hold out of the list; for want of memory it stays there, and is over. */
static void drop(bg_map *map, hold_list *before, held_range *found)
{
    hold_list *list = copy_list(before, found->number);
    if (!list) {
        atomic_store(&found->end, found->start);
        return;
    }
    if (list->count == 0) {
        free(list);
        list = NULL;
    }
    replace(map, list);
}

int bg_map_release(bg_map *map, int64_t number)
{
    pthread_mutex_lock(&map->lock);
    hold_list *list = atomic_load(&map->holds);
    size_t i = 0, count = list ? list->count : 0;
    while (i < count && list->at[i].number != number)
        i++;
    if (i < count)
        drop(map, list, &list->at[i]);
    pthread_mutex_unlock(&map->lock);
    return i < count ? 0 : -ENOENT;
}
