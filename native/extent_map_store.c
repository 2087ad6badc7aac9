/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Regions: leaves, the wide array, and the bound on memory. All under the lock.
 *
 * A pointer in the region table is NULL only while what the wide array says of that region is true. So the wide array is
 * published before leaves under it are taken away, and readers load the table first.
 *
 * Memory is short or gone: what can not be kept is dropped, more than asked for when need be. A map never
 * fails; it misses.
 */
#include "extent_map_internal.h"

#include <stdlib.h>
#include <string.h>

/* The wide array may take this part of the memory; it takes a disk of many TiB without two regions alike to get there. */
#define WIDE_PART 4
/* Making room goes on until so small a part is free, not to begin again at every insert. */
#define SPARE_PART 64
/* So many of all leaves go by age, for what slabs have no place for. */
#define FEW_PART 16

_Alignas(LEAF_ALIGN) leaf no_extents;

space *space_new(bg_map *map, int64_t size)
{
    size_t most = map->limit / 8 / sizeof(leaf_ref);
    unsigned shift = REGION_SHIFT_MIN;
    while ((shift < REGION_SHIFT_LARGE && (uint64_t)size >> shift > REGIONS_CACHED) ||
           (shift < REGION_SHIFT_MAX && (uint64_t)size >> shift >= most))
        shift++;
    uint64_t regions = ((uint64_t)size >> shift) + 1;
    if (regions > most)
        regions = most;
    size_t bytes = sizeof(space) + regions * sizeof(leaf_ref);
    space *sp = calloc(1, bytes);
    if (!sp)
        return NULL;
    sp->garbage.bytes = bytes;
    sp->size = size;
    sp->shift = shift;
    sp->regions = (int64_t)regions;
    map->bytes += bytes;
    return sp;
}

void space_free(space *sp)
{
    for (int64_t r = 0; r < sp->regions; r++) {
        leaf *l = ref_leaf(atomic_load(&sp->leaf[r]));
        if (l && l != &no_extents)
            garbage_free(&l->garbage);
    }
    wide *w = atomic_load(&sp->wide);
    if (w)
        garbage_free(&w->garbage);
    free(sp);
}

/* Something else than being dropped happens to the region. */
static void forget_sum(bg_map *map, int64_t region)
{
    if (map->sources)
        map->sources[region].sum = 0;
}

static void publish_leaf(bg_map *map, space *sp, int64_t region, leaf_ref ref)
{
    leaf *new_leaf = ref_leaf(ref), *old = ref_leaf(atomic_exchange(&sp->leaf[region], ref));
    map->pointers += (new_leaf != NULL) - (old != NULL);
    forget_sum(map, region);
    if (new_leaf && new_leaf != &no_extents) {
        new_leaf->region = region;
        map->leaves++;
        map->extents += new_leaf->extents;
    }
    if (old && old != &no_extents) {
        map->leaves--;
        map->extents -= old->extents;
        old->region = -1;
        map_retire(map, &map->looked, &old->garbage);
    }
}

/* Readers need not mark it: the clock's hand never looks. */
static void publish_none(bg_map *map, space *sp, int64_t region)
{
    publish_leaf(map, sp, region, leaf_as_ref(&no_extents) | REF_USED);
}

static void publish_wide(bg_map *map, space *sp, wide *new_wide)
{
    wide *old = atomic_exchange(&sp->wide, new_wide);
    if (new_wide)
        map->extents += (int64_t)new_wide->count;
    if (old) {
        map->extents -= (int64_t)old->count;
        map_retire(map, &map->looked, &old->garbage);
    }
}

void map_publish_dropped(bg_map *map, space *sp, int64_t region, uint64_t sum)
{
    publish_none(map, sp, region);
    if (sum) {
        map->sources[region].sum = sum;
        atomic_store(&map->recalls_some, true);
    }
}

static void drop(bg_map *map, int64_t region)
{
    space *sp = atomic_load(&map->space);
    map_publish_dropped(map, sp, region, map_sum(map, sp, region));
    map->evictions++;
}

static bool evict_one(bg_map *map, space *sp)
{
    if (map->leaves == 0)
        return false;
    /* Readers may set marks as fast as they are taken away, so the second time round they do not count. */
    for (int64_t step = 0;; step++, map->hand++) {
        if (map->hand >= sp->regions)
            map->hand = 0;
        leaf_ref ref = atomic_load_explicit(&sp->leaf[map->hand], memory_order_relaxed);
        if (!ref || ref_leaf(ref) == &no_extents)
            continue;
        if (step < sp->regions && ref & REF_USED) {
            atomic_fetch_and(&sp->leaf[map->hand], ~REF_USED);
        } else {
            drop(map, map->hand++);
            return true;
        }
    }
}

/* For so many bytes or, in a slab of `class`, for a table. */
static bool has_room(bg_map *map, size_t bytes, const slab_class *class)
{
    return class ? slab_has_room(map, class, map->bytes) : map->bytes + bytes <= map->limit;
}

/* The same when nobody looks any more. */
static bool will_have_room(bg_map *map, size_t bytes, const slab_class *class)
{
    size_t taken = map->bytes - map->retired;
    if (class)
        return class->leaving || slab_has_room(map, class, taken);
    return taken + bytes <= map->limit - map->limit / SPARE_PART;
}

/*
 * What was not used for long goes first. A table that goes leaves its slab a place for another of its size, and memory for
 * nothing else, so when that was not enough a whole slab goes.
 */
static bool make_room(bg_map *map, space *sp, size_t bytes, const slab_class *class)
{
    if (has_room(map, bytes, class))
        return true;
    map_reclaim(map);
    if (has_room(map, bytes, class))
        return true;
    for (int64_t few = map->leaves / FEW_PART; !will_have_room(map, bytes, class); few--)
        if (!(few < 0 && slab_give_up(map, drop)) && !evict_one(map, sp))
            break;
    map_reclaim(map);
    return has_room(map, bytes, class);
}

/* No address that a leaf_ref has no bits for. */
static char *allocate(size_t bytes)
{
    char *made = malloc(bytes);
    if (!made || has_ref(made + bytes))
        return made;
    free(made);
    return NULL;
}

/* Not posix_memalign: that leaves holes, in which nothing of the same size fits. */
void *map_room(bg_map *map, space *sp, size_t bytes)
{
    size_t all = bytes + LEAF_ALIGN - MALLOC_ALIGN;
    char *start = make_room(map, sp, all + MALLOC_HEAD, NULL) ? allocate(all) : NULL;
    if (!start)
        return NULL;
    size_t lead = -(uintptr_t)start & (LEAF_ALIGN - 1);
    garbage *g = (garbage *)(void *)(start + lead);
    g->bytes = all + MALLOC_HEAD;
    g->lead = lead;
    map->bytes += g->bytes;
    return g;
}

leaf *table_room(bg_map *map, space *sp, size_t bytes)
{
    slab_class *class = slab_class_of(map, bytes);
    leaf *made = class && make_room(map, sp, 0, class) ? slab_take(map, class) : NULL;
    return made ? made : map_room(map, sp, bytes);
}

/* Change the wide array over whole regions. What there is no memory for is lost, and with it the array. */
static void change_wide(bg_map *map, space *sp, int64_t start, int64_t end, enum change change, const span *what)
{
    const wide *old = atomic_load(&sp->wide);
    span_list *list = &map->wide_work;
    size_t count = old ? old->count : 0;
    if (count == 0 && change != CHANGE_SET)
        return;
    if (change != CHANGE_SET) {
        size_t at = spans_from(old->spans, count, start);
        if (at == count || old->spans[at].start >= end)
            return;
    }
    wide *made = NULL;
    list->count = 0;
    /* Beyond its part of the memory the array begins anew. */
    if ((count + 2) * 3 * sizeof(span) > map->limit / WIDE_PART)
        count = 0;
    if (spans_reserve(map, list, count + 2)) {
        if (count)
            memcpy(list->spans, old->spans, count * sizeof(span));
        list->count = count;
        bool done = change == CHANGE_CLEAR ? spans_clear(map, list, start, end, what->flags)
                                             : spans_put(map, list, start, end, change == CHANGE_SET ? what : NULL);
        if (done && list->count)
            made = map_room(map, sp, sizeof(wide) + list->count * sizeof(span));
    }
    if (made) {
        made->count = list->count;
        memcpy(made->spans, list->spans, list->count * sizeof(span));
    }
    publish_wide(map, sp, made);
}

/* Spans that the region now has, into `work`. */
static bool load_region(bg_map *map, space *sp, int64_t region)
{
    int64_t start = region << sp->shift, end = region_end(sp, region);
    span_list *list = &map->work;
    leaf_ref ref = atomic_load(&sp->leaf[region]);
    const leaf *l = ref_leaf(ref);
    list->count = 0;
    if (ref_shift(ref)) {
        span s;
        for (uint32_t i = 0; i < l->count; i++)
            if (ref_cluster(ref, i, start, sp->size, &s) && !spans_put(map, list, s.start, s.end, &s))
                return false;
        return true;
    }
    if (l) {
        if (!spans_reserve(map, list, l->count + 2))
            return false;
        for (uint32_t i = 0; i < l->count; i++) {
            int64_t at = start + leaf_starts(l)[i];
            list->spans[i] = (span){at, at + l->at[i].length, (int64_t)l->at[i].storage_offset, l->at[i].slot, l->at[i].flags};
        }
        list->count = l->count;
        return true;
    }
    const wide *w = atomic_load(&sp->wide);
    size_t at = w ? spans_from(w->spans, w->count, start) : 0;
    /* A wide span covers the region or leaves it alone. spans_put cuts it. */
    return !w || at == w->count || w->spans[at].start > start || spans_put(map, list, start, end, &(span){
        start, end,
        w->spans[at].flags & BG_MAP_ZERO ? 0 : w->spans[at].storage_offset + start - w->spans[at].start,
        w->spans[at].slot, w->spans[at].flags});
}

static leaf_ref list_leaf(bg_map *map, space *sp, const span_list *list, int64_t start)
{
    leaf *made = map_room(map, sp, sizeof(leaf) + list->count * (sizeof(place) + sizeof(uint32_t)));
    if (!made)
        return 0;
    made->count = (uint32_t)list->count;
    uint32_t *starts = (uint32_t *)(void *)(made->at + made->count);
    for (size_t i = 0; i < list->count; i++) {
        const span *s = &list->spans[i];
        made->at[i] = (place){(uint64_t)s->storage_offset, (uint32_t)(s->end - s->start), s->slot, s->flags};
        starts[i] = (uint32_t)(s->start - start);
    }
    return leaf_as_ref(made);
}

/* Publish what is in work. */
static void flush(bg_map *map)
{
    space *sp = atomic_load(&map->space);
    int64_t region = map->region;
    const span_list *list = &map->work;
    map->region = -1;
    if (region < 0)
        return;
    int64_t start = region << sp->shift, end = region_end(sp, region);
    if (list->count == 1 && list->spans[0].start == start && list->spans[0].end == end) {
        change_wide(map, sp, start, end, CHANGE_SET, &list->spans[0]);
        publish_leaf(map, sp, region, 0);
        return;
    }
    leaf_ref made = 0;
    if (list->count) {
        leaf_ref form = table_form(list, start, end);
        made = form ? table_leaf(map, sp, list, start, end, form) : list_leaf(map, sp, list, start);
        leaf_ref old = atomic_load(&sp->leaf[region]);
        if (made) {
            ref_leaf(made)->extents = (uint32_t)list->count;
            if (ref_leaf(old) != &no_extents)
                made |= old & REF_USED;
        }
    }
    if (made)
        publish_leaf(map, sp, region, made);
    else
        publish_none(map, sp, region);
}

static void change_region(bg_map *map, space *sp, int64_t region, int64_t start, int64_t end, enum change change,
                          const span *what)
{
    span_list *list = &map->work;
    if (map->region != region) {
        if (table_change(map, sp, region, start, end, change, what))
            return;
        flush(map);
        if (change != CHANGE_SET && ref_leaf(atomic_load(&sp->leaf[region])) == &no_extents) {
            forget_sum(map, region);
            return;
        }
        map->region = region;
        if (!load_region(map, sp, region))
            list->count = 0;
    }
    bool done = change == CHANGE_CLEAR ? spans_clear(map, list, start, end, what->flags)
                                         : spans_put(map, list, start, end, change == CHANGE_SET ? what : NULL);
    if (!done)
        list->count = 0;
}

bool map_has_table_room(bg_map *map, uint64_t count)
{
    size_t bytes = sizeof(leaf) + count * sizeof(uint32_t);
    return has_room(map, bytes + LEAF_ALIGN + MALLOC_HEAD, slab_class_of(map, bytes));
}

bool map_publish_words(bg_map *map, space *sp, int64_t region, const uint32_t *words, uint64_t count)
{
    leaf_ref form = short_form((unsigned)map->form.shift, (unsigned)map->form.slot);
    leaf_ref made = table_of_words(map, sp, words, count, form);
    if (made)
        publish_leaf(map, sp, region, made);
    return made != 0;
}

static void change_whole_regions(bg_map *map, space *sp, int64_t start, int64_t end, enum change change, const span *what)
{
    flush(map);
    change_wide(map, sp, start, end, change, what);
    int64_t last = (end - 1) >> sp->shift;
    for (int64_t r = start >> sp->shift; r <= last && r < sp->regions && map->pointers; r++) {
        leaf *l = ref_leaf(atomic_load_explicit(&sp->leaf[r], memory_order_relaxed));
        if (l && change != CHANGE_CLEAR)
            publish_leaf(map, sp, r, 0);
        else if (l)
            change_region(map, sp, r, r << sp->shift, region_end(sp, r), change, what);
    }
}

void map_finish(bg_map *map)
{
    flush(map);
    make_room(map, atomic_load(&map->space), 0, NULL);
    if (map->retired + slabs_leaving(map) > map->limit / SPARE_PART)
        map_reclaim(map);
}

static span part_of(const span *what, int64_t start, int64_t end)
{
    span part = *what;
    if (!(part.flags & BG_MAP_ZERO))
        part.storage_offset += start - part.start;
    part.start = start;
    part.end = end;
    return part;
}

void map_change(bg_map *map, int64_t start, int64_t end, enum change change, const span *what)
{
    space *sp = atomic_load(&map->space);
    for (int64_t stop; start < end; start = stop) {
        int64_t region = start >> sp->shift, region_start = region << sp->shift;
        stop = region_end(sp, region);
        bool whole = start == region_start && end >= stop;
        if (whole)
            stop = end == sp->size ? end : end >> sp->shift << sp->shift;
        else if (end < stop)
            stop = end;
        span part = what ? part_of(what, start, stop) : (span){0};
        if (whole)
            change_whole_regions(map, sp, start, stop, change, &part);
        else if (region < sp->regions)
            change_region(map, sp, region, start, stop, change, &part);
        else
            change_wide(map, sp, region_start, region_end(sp, region), CHANGE_REMOVE, NULL);
    }
}
