/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Table leaves. Under the lock.
 *
 * A table is the one thing published that changes: word by word, so that a cluster of a fragmented disk gets another place without
 * a new leaf for its region. Whoever looks up a range meanwhile may find some of its clusters as they were, as
 * he may where a change concerns several regions.
 */
#define _GNU_SOURCE
#include "extent_map_internal.h"

#include <sys/mman.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

/* Whether words can say where its clusters live. */
static bool has_words(const span *s)
{
    return s->flags & BG_MAP_ZERO || (!(s->storage_offset & ((1 << WORD_SHIFT) - 1)) &&
                                      (uint64_t)(s->storage_offset + s->end - s->start) <= WORD_END);
}

/* Of the cluster at `at`. */
static uint64_t word_of(const span *s, int64_t at)
{
    uint64_t place = s->flags & BG_MAP_ZERO ? 0 : (uint64_t)(s->storage_offset + at - s->start);
    return place >> WORD_SHIFT << (SLOT_BITS + FLAG_BITS) | (uint64_t)s->slot << FLAG_BITS | s->flags;
}

/* A table, than a list of so many. */
static bool is_smaller(uint64_t words, uint64_t extents)
{
    return words * sizeof(uint64_t) < extents * (sizeof(place) + sizeof(uint32_t));
}

unsigned table_shift(const span_list *list, int64_t start, int64_t end)
{
    uint64_t edges = (uint64_t)1 << CLUSTER_SHIFT_MAX;
    for (size_t i = 0; i < list->count; i++) {
        const span *s = &list->spans[i];
        edges |= (uint64_t)(s->start - start) | (s->end == end ? 0 : (uint64_t)(s->end - start));
        if (!has_words(s))
            return 0;
    }
    unsigned shift = (unsigned)__builtin_ctzll(edges);
    uint64_t words = ((uint64_t)(end - start - 1) >> shift) + 1;
    return shift > CLUSTER_SHIFT_BASE && is_smaller(words, list->count) ? shift : 0;
}

/*
 * Tables are looked up at random, so those of a large map cost a miss of the TLB each, unless they are on huge pages. A map that is
 * filled has them made one behind the other, with no more than drivers' caches between, but malloc's memory grows in steps too
 * small for the system to see to it. A system that can not do it says so, to no harm.
 */
static void gather(bg_map *map, const leaf *made)
{
    uintptr_t block = (uintptr_t)made / HUGE_PAGE;
    if (block != map->block) {
        if (map->block_bytes > HUGE_PAGE / 4)
            madvise((void *)(map->block * HUGE_PAGE), HUGE_PAGE, MADV_COLLAPSE);
        map->block = block;
        map->block_bytes = 0;
    }
    map->block_bytes += made->garbage.bytes;
}

leaf_ref table_leaf(bg_map *map, space *sp, const span_list *list, int64_t start, int64_t end, unsigned shift)
{
    uint64_t words = ((uint64_t)(end - start - 1) >> shift) + 1;
    leaf *made = map_room(map, sp, sizeof(leaf) + words * sizeof(uint64_t));
    if (!made)
        return 0;
    gather(map, made);
    made->count = (uint32_t)words;
    _Atomic uint64_t *table = leaf_table(made);
    for (uint64_t i = 0; i < words; i++)
        atomic_init(&table[i], WORD_NONE);
    for (size_t i = 0; i < list->count; i++) {
        const span *s = &list->spans[i];
        for (int64_t at = s->start; at < s->end; at += (int64_t)1 << shift)
            atomic_init(&table[(at - start) >> shift], word_of(s, at));
    }
    return (leaf_ref)made | (leaf_ref)(shift - CLUSTER_SHIFT_BASE) << REF_SHIFT;
}

/* How many of the words [from, end) do not continue the extent of the word before. */
static uint32_t beginnings(const _Atomic uint64_t *table, uint64_t from, uint64_t end, unsigned shift)
{
    uint32_t n = 0;
    uint64_t before = from ? atomic_load_explicit(&table[from - 1], memory_order_relaxed) : WORD_NONE;
    for (uint64_t i = from; i < end; i++) {
        uint64_t word = atomic_load_explicit(&table[i], memory_order_relaxed);
        uint64_t step = word & BG_MAP_ZERO ? 0 : (uint64_t)1 << (shift - WORD_SHIFT + SLOT_BITS + FLAG_BITS);
        n += word != WORD_NONE && (before == WORD_NONE || word - before != step);
        before = word;
    }
    return n;
}

bool table_change(bg_map *map, space *sp, int64_t region, int64_t start, int64_t end, enum change change, const span *what)
{
    leaf_ref ref = atomic_load(&sp->leaf[region]);
    unsigned shift = ref_shift(ref);
    int64_t region_start = region << sp->shift, cluster = (int64_t)1 << shift;
    if (!shift || (start - region_start) & (cluster - 1) ||
        ((end - region_start) & (cluster - 1) && end != region_end(sp, region)) || (change == CHANGE_SET && !has_words(what)))
        return false;
    leaf *l = ref_leaf(ref);
    _Atomic uint64_t *table = leaf_table(l);
    uint64_t first = (uint64_t)(start - region_start) >> shift, behind = ((uint64_t)(end - region_start - 1) >> shift) + 1;
    uint64_t next = behind < l->count ? behind + 1 : behind;
    uint32_t before = beginnings(table, first, next, shift);
    for (uint64_t i = first; i < behind; i++) {
        uint64_t word = change == CHANGE_SET ? word_of(what, region_start + ((int64_t)i << shift)) : WORD_NONE;
        if (change == CHANGE_CLEAR && (word = atomic_load_explicit(&table[i], memory_order_relaxed)) != WORD_NONE)
            word &= ~(uint64_t)what->flags;
        atomic_store(&table[i], word);
    }
    uint32_t extents = l->extents - before + beginnings(table, first, next, shift);
    map->extents += (int64_t)extents - l->extents;
    l->extents = extents;
    /* A single one may be the whole region. */
    return extents > 1 && is_smaller(l->count, extents);
}
