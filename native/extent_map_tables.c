/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Table leaves. Under the lock.
 *
 * A table is the one thing published that changes: word by word, so that a cluster of a fragmented disk gets another place without
 * a new leaf for its region. Whoever looks up a range meanwhile may find some of its clusters as they were, as
 * he may where a change concerns several regions.
 */
#include "extent_map_internal.h"

/* Whether words can say where its clusters live. */
static bool has_words(const span *s)
{
    return s->flags & BG_MAP_ZERO || (!(s->storage_offset & ((1 << WORD_SHIFT) - 1)) &&
                                      (uint64_t)(s->storage_offset + (s->end - s->start)) <= WORD_END);
}

/* Of the cluster at `at`. */
static uint64_t word_of(const span *s, int64_t at)
{
    if (s->flags & BG_MAP_ZERO)
        return s->flags;
    uint64_t place = (uint64_t)(s->storage_offset + (at - s->start));
    return place >> WORD_SHIFT << (SLOT_BITS + FLAG_BITS) | (uint64_t)s->slot << FLAG_BITS | s->flags;
}

/* Whether short words of clusters of 1 << `shift` bytes in this slot can say it. */
static bool has_short_words(const span *s, unsigned shift, unsigned slot)
{
    return s->flags & BG_MAP_ZERO ||
           (s->slot == slot && !(s->storage_offset & (((int64_t)1 << shift) - 1)) &&
            (uint64_t)(s->storage_offset + (s->end - s->start - 1)) >> shift < SHORT_END);
}

static size_t word_size(leaf_ref form)
{
    return form & REF_SHORT ? sizeof(uint32_t) : sizeof(uint64_t);
}

static inline void put_word(leaf_ref ref, uint64_t i, uint64_t word, memory_order order)
{
    uint64_t flags = word & ((1 << FLAG_BITS) - 1), place = word >> (SLOT_BITS + FLAG_BITS) >> (ref_shift(ref) - WORD_SHIFT);
    if (ref & REF_SHORT)
        atomic_store_explicit(&ref_short_words(ref)[i], word == WORD_NONE ? SHORT_NONE : (uint32_t)(place << FLAG_BITS | flags),
                              order);
    else
        atomic_store_explicit(&ref_words(ref)[i], word, order);
}

/* A table of that form, than a list of so many. */
static bool is_smaller(leaf_ref form, uint64_t words, uint64_t extents)
{
    return words * word_size(form) < extents * (sizeof(place) + sizeof(uint32_t));
}

/* The slot of the first span that has one. */
static unsigned first_slot(const span_list *list)
{
    for (size_t i = 0; i < list->count; i++)
        if (!(list->spans[i].flags & BG_MAP_ZERO))
            return list->spans[i].slot;
    return 0;
}

leaf_ref table_form(const span_list *list, int64_t start, int64_t end)
{
    uint64_t edges = (uint64_t)1 << CLUSTER_SHIFT_MAX;
    for (size_t i = 0; i < list->count; i++) {
        const span *s = &list->spans[i];
        edges |= (uint64_t)(s->start - start) | (s->end == end ? 0 : (uint64_t)(s->end - start));
        if (!has_words(s))
            return 0;
    }
    unsigned shift = (unsigned)__builtin_ctzll(edges), slot = first_slot(list);
    if (shift <= CLUSTER_SHIFT_BASE)
        return 0;
    leaf_ref form = (leaf_ref)(shift - CLUSTER_SHIFT_BASE) << REF_SHIFT;
    bool is_short = true;
    for (size_t i = 0; is_short && i < list->count; i++)
        is_short = has_short_words(&list->spans[i], shift, slot);
    if (is_short)
        form = short_form(shift, slot);
    return is_smaller(form, ((uint64_t)(end - start - 1) >> shift) + 1, list->count) ? form : 0;
}

/* Without words yet; 0: there is no memory. */
static leaf_ref new_table(bg_map *map, space *sp, uint64_t words, leaf_ref form)
{
    leaf *made = table_room(map, sp, sizeof(leaf) + words * word_size(form));
    if (!made)
        return 0;
    made->count = (uint32_t)words;
    return leaf_as_ref(made) | form;
}

leaf_ref table_leaf(bg_map *map, space *sp, const span_list *list, int64_t start, int64_t end, leaf_ref form)
{
    unsigned shift = ref_shift(form);
    uint64_t words = ((uint64_t)(end - start - 1) >> shift) + 1;
    leaf_ref ref = new_table(map, sp, words, form);
    if (!ref)
        return 0;
    for (uint64_t i = 0; i < words; i++)
        put_word(ref, i, WORD_NONE, memory_order_relaxed);
    for (size_t i = 0; i < list->count; i++) {
        const span *s = &list->spans[i];
        for (int64_t at = s->start; at < s->end; at += (int64_t)1 << shift)
            put_word(ref, (uint64_t)(at - start) >> shift, word_of(s, at), memory_order_relaxed);
    }
    return ref;
}

/* How many of the words [from, end) do not continue the extent of the word before. */
static uint32_t beginnings(leaf_ref ref, uint64_t from, uint64_t end)
{
    uint32_t n = 0;
    uint64_t before = from ? ref_word(ref, from - 1) : WORD_NONE;
    for (uint64_t i = from; i < end; i++) {
        uint64_t word = ref_word(ref, i);
        uint64_t step = word & BG_MAP_ZERO ? 0 : (uint64_t)1 << (ref_shift(ref) - WORD_SHIFT + SLOT_BITS + FLAG_BITS);
        n += word != WORD_NONE && (before == WORD_NONE || word - before != step);
        before = word;
    }
    return n;
}

leaf_ref table_of_words(bg_map *map, space *sp, const uint32_t *words, uint64_t count, leaf_ref form)
{
    leaf_ref ref = new_table(map, sp, count, form);
    if (!ref)
        return 0;
    for (uint64_t i = 0; i < count; i++)
        atomic_store_explicit(&ref_short_words(ref)[i], words[i], memory_order_relaxed);
    ref_leaf(ref)->extents = beginnings(ref, 0, count);
    return ref;
}

bool table_change(bg_map *map, space *sp, int64_t region, int64_t start, int64_t end, enum change change, const span *what)
{
    leaf_ref ref = atomic_load(&sp->leaf[region]);
    unsigned shift = ref_shift(ref);
    int64_t region_start = region << sp->shift, cluster = (int64_t)1 << shift;
    if (!shift || (start - region_start) & (cluster - 1) ||
        ((end - region_start) & (cluster - 1) && end != region_end(sp, region)))
        return false;
    if (change == CHANGE_SET && !(ref & REF_SHORT ? has_short_words(what, shift, ref_slot(ref)) : has_words(what)))
        return false;
    leaf *l = ref_leaf(ref);
    uint64_t first = (uint64_t)(start - region_start) >> shift, behind = ((uint64_t)(end - region_start - 1) >> shift) + 1;
    uint64_t next = behind < l->count ? behind + 1 : behind;
    uint32_t before = beginnings(ref, first, next);
    for (uint64_t i = first; i < behind; i++) {
        uint64_t word = change == CHANGE_SET ? word_of(what, region_start + ((int64_t)i << shift)) : WORD_NONE;
        if (change == CHANGE_CLEAR && (word = ref_word(ref, i)) != WORD_NONE)
            word &= ~(uint64_t)what->flags;
        put_word(ref, i, word, memory_order_seq_cst);
    }
    uint32_t extents = l->extents - before + beginnings(ref, first, next);
    map->extents += (int64_t)extents - l->extents;
    l->extents = extents;
    /* A single one may be the whole region. */
    return extents > 1 && is_smaller(ref, l->count, extents);
}
