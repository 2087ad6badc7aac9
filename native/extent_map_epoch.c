/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* Reader records, tickets, waiting, and memory that outlives its use. See extent_map_internal.h. */
#include "extent_map_internal.h"

#include <stdlib.h>
#include <sys/eventfd.h>

/* Threads are spread over the records, so each finds its own in its processor's cache. No thread has to sign off. */
static unsigned first_record(void)
{
    static _Atomic unsigned threads;
    static _Thread_local unsigned mine;
    if (mine == 0)
        mine = 1 + atomic_fetch_add_explicit(&threads, 1, memory_order_relaxed) % READERS;
    return mine - 1;
}

static readers *next_readers(readers *block)
{
    readers *next = atomic_load(&block->next);
    if (next)
        return next;
    readers *made = aligned_alloc(LINE, sizeof(*made));
    if (!made)
        return NULL;
    for (size_t i = 0; i < READERS; i++) {
        reader *r = &made->record[i];
        atomic_init(&r->state, 0);
        atomic_init(&r->hits, 0);
        atomic_init(&r->misses, 0);
        atomic_init(&r->bytes_read, 0);
        atomic_init(&r->bytes_written, 0);
        atomic_init(&r->first_writes, 0);
    }
    atomic_init(&made->next, NULL);
    if (atomic_compare_exchange_strong(&block->next, &next, made))
        return made;
    free(made);
    return next;
}

reader *map_enter(bg_map *map)
{
    unsigned first = first_record();
    for (readers *block = &map->readers; block; block = next_readers(block))
        for (unsigned i = 0; i < READERS; i++) {
            reader *r = &block->record[(first + i) % READERS];
            uint64_t is_free = 0, state = atomic_load(&map->epoch) << 1 | 1;
            if (atomic_load_explicit(&r->state, memory_order_relaxed) == 0 &&
                atomic_compare_exchange_strong(&r->state, &is_free, state))
                return r;
        }
    return NULL;
}

uint64_t map_oldest(bg_map *map, bool looking)
{
    uint64_t oldest = atomic_load(&map->epoch);
    for (readers *block = &map->readers; block; block = atomic_load(&block->next))
        for (unsigned i = 0; i < READERS; i++) {
            uint64_t state = atomic_load(&block->record[i].state);
            if (state && (state & 1 || !looking) && state >> 1 < oldest)
                oldest = state >> 1;
        }
    return oldest;
}

/* A request that somebody may wait for has ended. */
static void announce(bg_map *map)
{
    pthread_mutex_lock(&map->wait_lock);
    uint64_t oldest = map_oldest(map, false);
    if (oldest - 1 > map->told) {
        map->told = oldest - 1;
        if (map->told >= atomic_load(&map->waiting))
            atomic_store(&map->waiting, 0);
        eventfd_write(map->eventfd, 1);
        bg_wake_all(&map->settled);
    }
    pthread_mutex_unlock(&map->wait_lock);
}

void map_leave(bg_map *map, reader *r)
{
    uint64_t epoch = atomic_load_explicit(&r->state, memory_order_relaxed) >> 1;
    atomic_store(&r->state, 0);
    /* Who waits sets this first and looks at the records then. */
    if (atomic_load(&map->waiting) >= epoch)
        announce(map);
}

int bg_map_settled(bg_map *map, int64_t ticket)
{
    return map_oldest(map, false) > (uint64_t)ticket;
}

/* Under wait_lock: whether it has settled; if not, leaving requests announce it. */
static bool settled_or_armed(bg_map *map, uint64_t ticket)
{
    if (map->told >= ticket)
        return true;
    uint64_t before = atomic_load(&map->waiting);
    if (before < ticket)
        atomic_store(&map->waiting, ticket);
    if (map_oldest(map, false) <= ticket)
        return false;
    atomic_store(&map->waiting, before);
    return true;
}

int bg_map_notify(bg_map *map, int64_t ticket)
{
    pthread_mutex_lock(&map->wait_lock);
    bool settled = settled_or_armed(map, (uint64_t)ticket);
    pthread_mutex_unlock(&map->wait_lock);
    return settled;
}

void bg_map_wait(bg_map *map, int64_t ticket)
{
    pthread_mutex_lock(&map->wait_lock);
    while (!settled_or_armed(map, (uint64_t)ticket))
        bg_wait(&map->settled, &map->wait_lock);
    pthread_mutex_unlock(&map->wait_lock);
}

int bg_map_eventfd(const bg_map *map)
{
    return map->eventfd;
}

void bg_map_acknowledge(bg_map *map)
{
    eventfd_t ignored;
    eventfd_read(map->eventfd, &ignored);
}

void map_retire(bg_map *map, garbage_list *list, garbage *g)
{
    g->next = NULL;
    g->epoch = map->retired_at = atomic_load(&map->epoch);
    *list->last = g;
    list->last = &g->next;
    map->retired += g->bytes;
    if (g->lead == LEAD_SLAB)
        slab_leaves(g);
}

static void reclaim(bg_map *map, garbage_list *list, uint64_t oldest)
{
    garbage *g;
    while ((g = list->first) && g->epoch < oldest) {
        list->first = g->next;
        map->retired -= g->bytes;
        map->bytes -= g->bytes;
        garbage_free(g);
    }
    if (!list->first)
        list->last = &list->first;
}

void map_reclaim(bg_map *map)
{
    /* What was retired in the present epoch would be in use by whoever comes. */
    if (map->retired_at == atomic_load(&map->epoch))
        map_advance(map);
    if (map->looked.first)
        reclaim(map, &map->looked, map_oldest(map, true));
    if (map->held.first)
        reclaim(map, &map->held, map_oldest(map, false));
}

uint64_t map_advance(bg_map *map)
{
    return atomic_fetch_add(&map->epoch, 1);
}
