/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * First writes to clusters of an image without Python: an extent map's allocator (bg_map_allocator) that takes room from a
 * reserve which Python keeps filled, and leaves notes of what it has placed where.
 *
 *     guest    |   cluster   |   cluster   |      extents with ALLOCATE: what is read there until then
 *     write          |=================|
 *     room     |old  |data   |   data  |old|      whole clusters of the reserve, in a row
 *                                                 then the link (guest, host, clusters) is noted, and the map tells the new place
 *
 * Whole clusters that have a place are made zero so, too, where it stays theirs: nothing is written, a link with `zero` is noted, and
 * the map tells zeroes, which native code does not write to.
 *
 * Whoever keeps the image's tables collects the links before it looks at an entry. Whoever changes entries holds the
 * guest clusters: while they are held no first write touches them, and none is made zero.
 *
 * Units:     bytes; `first` and `end` of guest clusters.
 * Ownership: bg_allocator_new hands out an allocator that bg_allocator_free ends, when no map uses it any more. Descriptors are
 *            borrowed until then, or until another is bound.
 * Errno:     0 or a count, else -EINVAL, -ENOMEM, or -errno of a system call.
 * Threads:   any; bind only while no map uses the allocator. A first write waits for others to the same clusters, and for
 *            I/O, unless it is to be done now; nothing else waits. Now: short ones, whose old bytes can be read, and all be
 *            written, as io.h's _now functions do; once the room's descriptor has refused that, no more until bind.
 */
#ifndef BG_ALLOCATOR_H
#define BG_ALLOCATOR_H

#include "extent_map.h"

#include <stdint.h>

/* cffi:begin */
typedef struct bg_allocator bg_allocator;

typedef struct {
    int64_t host;
    int64_t clusters; /* > 0 */
    int32_t fresh;    /* 1: reads as zeroes */
} bg_allocator_room;

typedef struct {
    int64_t guest;
    int64_t host;
    int64_t clusters;
    int64_t zero; /* 0: the clusters live at `host` now. 1: they did, and read as zeroes now; `host` stays theirs */
} bg_allocator_link;

/* Clusters of 1 << bits bytes, 9 to 21; tables of 1 << table_bits entries, 0 to 30. `zeroes`: entries can say zero. */
int bg_allocator_new(int bits, int table_bits, int zeroes, bg_allocator **out);
void bg_allocator_free(bg_allocator *allocator);

/* For bg_map_set_allocator. */
bg_map_allocator *bg_allocator_hook(bg_allocator *allocator);

/* Where rooms are: a descriptor, the alignment that it asks of memory, and the slot of the map that has it. */
void bg_allocator_bind(bg_allocator *allocator, int fd, int memory_alignment, int slot);

/*
 * More room for the reserve. When less than `low` clusters are left in it, or many links wait to be taken, the eventfd becomes
 * readable, once until the next call, or until all links were taken; the next call makes it unreadable.
 */
int bg_allocator_give(bg_allocator *allocator, const bg_allocator_room *rooms, int64_t count, int64_t low);

/* Take up to `max` rooms out of the reserve again; returns how many. */
int64_t bg_allocator_take_rooms(bg_allocator *allocator, bg_allocator_room *out, int64_t max);

/* Clusters in the reserve. */
int64_t bg_allocator_reserve(bg_allocator *allocator);

/*
 * Take the oldest links, cut where tables end, up to `max` of the pieces; returns how many. Those of one table are in order,
 * and behind each other; *end: the highest end of a place.
 */
int64_t bg_allocator_take_links(bg_allocator *allocator, bg_allocator_link *out, int64_t max, int64_t *end);

/* Of the links, how many from the first on are of the same table. */
int64_t bg_allocator_same_table(bg_allocator *allocator, const bg_allocator_link *links, int64_t count);

/* 1 when there are links to take. Whoever has been told of a write's end sees its links. */
int bg_allocator_has_links(bg_allocator *allocator);

/*
 * Hold guest clusters [first, end): first writes to them miss from now on. 1: one is under way and ends with the requests
 * that have begun (a ticket of the map settles then); 0: none is.
 */
int bg_allocator_hold(bg_allocator *allocator, int64_t first, int64_t end);

/* End a hold of the same two numbers. -EINVAL: there is none. */
int bg_allocator_release(bg_allocator *allocator, int64_t first, int64_t end);

int bg_allocator_eventfd(const bg_allocator *allocator);
/* cffi:end */

#endif
