/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* Sorted lists of spans, in which every change to the map is prepared. */
#include "extent_map_internal.h"

#include <stdlib.h>
#include <string.h>

/* No list is longer than this part of the memory: regions of more extents are not kept. */
#define SCRATCH_PART 8

bool spans_reserve(bg_map *map, span_list *list, size_t room)
{
    if (room <= list->room)
        return true;
    if (room * sizeof(span) > map->limit / SCRATCH_PART)
        return false;
    room += room / 2 + 16;
    span *spans = realloc(list->spans, room * sizeof(*spans));
    if (!spans)
        return false;
    map->bytes += (room - list->room) * sizeof(*spans);
    list->spans = spans;
    list->room = room;
    return true;
}

size_t spans_from(const span *spans, size_t count, int64_t offset)
{
    size_t low = 0;
    while (count > 0) {
        size_t half = count / 2;
        if (spans[low + half].end <= offset) {
            low += half + 1;
            count -= half + 1;
        } else {
            count = half;
        }
    }
    return low;
}

static span cut(span s, int64_t start, int64_t end)
{
    if (!(s.flags & BG_MAP_ZERO))
        s.storage_offset += start - s.start;
    s.start = start;
    s.end = end;
    return s;
}

static bool continues(const span *a, const span *b)
{
    return a->end == b->start && a->slot == b->slot && a->flags == b->flags &&
           (a->flags & BG_MAP_ZERO || b->storage_offset - a->storage_offset == b->start - a->start);
}

bool spans_put(bg_map *map, span_list *list, int64_t start, int64_t end, const span *what)
{
    size_t first = spans_from(list->spans, list->count, start), behind = first;
    while (behind < list->count && list->spans[behind].start < end)
        behind++;
    /* What stands in for [first, behind): both neighbours may merge with it, and two spans may stick out. */
    span parts[5];
    size_t n = 0;
    size_t from = first > 0 ? first - 1 : first, to = behind < list->count ? behind + 1 : behind;
    if (from < first)
        parts[n++] = list->spans[from];
    if (first < behind && list->spans[first].start < start)
        parts[n++] = cut(list->spans[first], list->spans[first].start, start);
    if (what)
        parts[n++] = cut(*what, start, end);
    if (first < behind && list->spans[behind - 1].end > end)
        parts[n++] = cut(list->spans[behind - 1], end, list->spans[behind - 1].end);
    if (behind < to)
        parts[n++] = list->spans[behind];
    size_t merged = 0;
    for (size_t i = 1; i < n; i++) {
        if (continues(&parts[merged], &parts[i]))
            parts[merged].end = parts[i].end;
        else
            parts[++merged] = parts[i];
    }
    if (n)
        n = merged + 1;
    if (!spans_reserve(map, list, list->count + n))
        return false;
    /* An empty list may have no memory at all. */
    if (list->count > to)
        memmove(list->spans + from + n, list->spans + to, (list->count - to) * sizeof(span));
    if (n)
        memcpy(list->spans + from, parts, n * sizeof(span));
    list->count = list->count - (to - from) + n;
    return true;
}

bool spans_clear(bg_map *map, span_list *list, int64_t start, int64_t end, uint16_t flags)
{
    size_t at = spans_from(list->spans, list->count, start);
    /* At most the outer two are split. */
    if (!spans_reserve(map, list, list->count + 8))
        return false;
    while (at < list->count && list->spans[at].start < end) {
        span s = list->spans[at];
        if (s.flags & flags) {
            s = cut(s, s.start > start ? s.start : start, s.end < end ? s.end : end);
            s.flags &= (uint16_t)~flags;
            if (!spans_put(map, list, s.start, s.end, &s))
                return false;
        }
        at = spans_from(list->spans, list->count, s.end);
    }
    return true;
}
