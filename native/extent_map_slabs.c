/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Slabs: the memory of tables. Under the lock.
 *
 * Tables are looked up at random, so those of a large map cost a miss of the TLB each, unless they are on huge pages, all of them:
 * in a guest whose host takes idle small pages for itself, a twentieth of the tables outside made the first reads take twice as
 * long (1 TiB, 64 KiB clusters). malloc mixes them with all that drivers keep, and its heaps do not end where huge pages do.
 *
 *     slab, a huge page | head | table | spare | table | ... |       tables of one size; a spare place is used again
 *
 * The first slab of a size takes pages as it needs them, and becomes a huge one when it is full. The others are huge at
 * once, as far as memory goes. A system that has no huge pages says so, to no harm.
 */
#define _GNU_SOURCE
#include "extent_map_internal.h"

#include "buffers.h"

#include <sys/mman.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

#define HUGE_PAGE ((uintptr_t)BG_HUGE_PAGE)
/* Smaller maps have no slabs: one would be too large a part of their memory. */
#define LEAST_LIMIT (2 * HUGE_PAGE)
/* This part of the memory is not for slabs. A region's extents are a list before they are a table, and for a list's sake a whole
 * slab would have to go. */
#define REST_PART 16
#define LARGEST ((HUGE_PAGE - HEAD) / 15) /* what a slab's end has no room for is smaller than this */
#define HEAD ((sizeof(slab) + LINE - 1) / LINE * LINE)

static slab *slab_of(garbage *g)
{
    return (slab *)((uintptr_t)g & ~(HUGE_PAGE - 1));
}

static uint32_t capacity(size_t size)
{
    return (uint32_t)((HUGE_PAGE - HEAD) / size);
}

static leaf *place_in(slab *s, uint32_t i)
{
    return (leaf *)(void *)((char *)s + HEAD + i * s->class->size);
}

static bool is_full(const slab *s)
{
    return !s->spare && s->made == capacity(s->class->size);
}

static slab **list_of(slab *s)
{
    return is_full(s) ? &s->class->full : &s->class->roomy;
}

static void link_slab(slab *s)
{
    slab **list = list_of(s);
    s->next = *list;
    s->previous = NULL;
    if (s->next)
        s->next->previous = s;
    *list = s;
}

static void unlink_slab(slab *s)
{
    if (s->next)
        s->next->previous = s->previous;
    if (s->previous)
        s->previous->next = s->next;
    else
        *list_of(s) = s->next;
}

/* A huge page's addresses. */
static void *map_aligned(void)
{
    char *all = mmap(NULL, 2 * HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED)
        return NULL;
    size_t lead = -(uintptr_t)all & (HUGE_PAGE - 1);
    if (lead)
        munmap(all, lead);
    munmap(all + lead + HUGE_PAGE, HUGE_PAGE - lead);
    if (has_ref(all + lead + HUGE_PAGE))
        return all + lead;
    munmap(all + lead, HUGE_PAGE);
    return NULL;
}

static void count_all(bg_map *map, slab *s)
{
    map->bytes += HUGE_PAGE - s->counted;
    s->counted = HUGE_PAGE;
}

/* What the next place costs: nothing in a slab that is counted. */
static size_t cost(const slab_class *class)
{
    const slab *s = class->roomy;
    return !s ? HEAD + class->size : s->spare || s->counted == HUGE_PAGE ? 0 : class->size;
}

static bool is_within(const bg_map *map, size_t bytes)
{
    return bytes <= map->limit - map->limit / REST_PART;
}

bool slab_has_room(const bg_map *map, const slab_class *class, size_t bytes)
{
    size_t more = cost(class);
    return more == 0 || is_within(map, bytes + more);
}

/* Whether all of a slab may be counted, of which that many bytes are. */
static bool may_be_huge(const bg_map *map, size_t counted)
{
    return is_within(map, map->bytes + HUGE_PAGE - counted);
}

static slab *new_slab(bg_map *map, slab_class *class)
{
    slab *s = map_aligned();
    if (!s)
        return NULL;
    bool huge = class->full && may_be_huge(map, 0);
    madvise(s, HUGE_PAGE, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    *s = (slab){.class = class, .map = map, .counted = HEAD};
    map->bytes += HEAD;
    if (huge)
        count_all(map, s);
    class->slabs++;
    link_slab(s);
    return s;
}

leaf *slab_take(bg_map *map, slab_class *class)
{
    slab *s = class->roomy ? class->roomy : new_slab(map, class);
    if (!s)
        return NULL;
    unlink_slab(s);
    garbage *g = s->spare;
    if (g) {
        s->spare = g->next;
    } else {
        g = &place_in(s, s->made++)->garbage;
        if (s->counted < HUGE_PAGE) {
            s->counted += class->size;
            map->bytes += class->size;
        }
    }
    s->used++;
    if (s->made == capacity(class->size) && s->counted < HUGE_PAGE && may_be_huge(map, s->counted)) {
        madvise(s, HUGE_PAGE, MADV_HUGEPAGE);
        madvise(s, HUGE_PAGE, MADV_COLLAPSE);
        count_all(map, s);
    }
    link_slab(s);
    leaf *made = (leaf *)(void *)g;
    *made = (leaf){.garbage = {.lead = LEAD_SLAB}, .region = -1};
    return made;
}

static void end(slab *s)
{
    if (s->given_up)
        s->map->retired -= s->counted;
    s->map->bytes -= s->counted;
    s->class->slabs--;
    munmap(s, HUGE_PAGE);
}

void slab_leaves(garbage *g)
{
    slab *s = slab_of(g);
    s->leaving++;
    if (!s->given_up)
        s->class->leaving++;
}

size_t slabs_leaving(const bg_map *map)
{
    size_t bytes = 0;
    for (int i = 0; i < SLAB_CLASSES; i++)
        bytes += map->classes[i].leaving * map->classes[i].size;
    return bytes;
}

static bool was_retired(garbage *g)
{
    return ((leaf *)(void *)g)->region < 0;
}

void slab_free(garbage *g)
{
    slab *s = slab_of(g);
    if (was_retired(g)) { /* not when the map ends */
        s->leaving--;
        s->class->leaving -= !s->given_up;
    }
    if (!s->given_up)
        unlink_slab(s);
    g->next = s->spare;
    s->spare = g;
    if (--s->used == 0)
        end(s);
    else if (!s->given_up)
        link_slab(s);
}

slab_class *slab_class_of(bg_map *map, size_t bytes)
{
    size_t size = (bytes + LINE - 1) / LINE * LINE;
    slab_class *unused = NULL;
    if (map->limit < LEAST_LIMIT || size > LARGEST)
        return NULL;
    for (int i = 0; i < SLAB_CLASSES; i++) {
        slab_class *class = &map->classes[i];
        if (class->size == size)
            return class;
        if (!class->slabs && !unused)
            unused = class;
    }
    if (unused)
        unused->size = size;
    return unused;
}

/* The one of `found` and the list's where the fewest tables are lost; of equal ones the last, which is the oldest. */
static slab *emptier(slab *found, slab *list)
{
    for (slab *s = list; s; s = s->next)
        if (!found || s->used - s->leaving <= found->used - found->leaving)
            found = s;
    return found;
}

static slab *emptiest(bg_map *map)
{
    slab *found = NULL;
    for (int i = 0; i < SLAB_CLASSES; i++)
        found = emptier(emptier(found, map->classes[i].roomy), map->classes[i].full);
    return found;
}

bool slab_give_up(bg_map *map, void (*drop)(bg_map *, int64_t region))
{
    slab *s = emptiest(map);
    if (!s)
        return false;
    unlink_slab(s);
    s->class->leaving -= s->leaving;
    s->given_up = true;
    map->retired += s->counted;
    for (uint32_t i = 0; i < s->made; i++)
        if (place_in(s, i)->region >= 0)
            drop(map, place_in(s, i)->region);
    return true;
}
