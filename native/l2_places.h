/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * A whole L2 table into an extent map: one call where a fragmented image would take a fault for each cluster.
 *
 * Units:     bytes, unless said otherwise.
 * Ownership: all is borrowed for the call.
 * Errno:     a count, else -EINVAL.
 * Threads:   as bg_map_insert. The table must not change meanwhile.
 */
#ifndef BG_L2_PLACES_H
#define BG_L2_PLACES_H

#include "extent_map.h"
#include "qcow2_l2.h"

/* cffi:begin */
typedef struct {
    const void *table;
    int64_t entries;
    int32_t cluster_bits, version;
    const uint64_t *metadata; /* sorted numbers of the host clusters that guest data must not be written to */
    int64_t metadata_count;
    int64_t host_end;   /* end of the image's file: what lies behind it is left out */
    int64_t host;       /* where the table is in the file; 0: not there, or not as it is here */
    int64_t disk;       /* offset in the disk of entry 0; may be negative */
    int64_t low, high;  /* of the disk: what lies outside is left out */
    int64_t storage;    /* to be added to host offsets to get the slot's */
    int32_t slot;
    int32_t flags; /* of what is COPIED; the rest, and what touches metadata, may not be written */
} bg_l2_places;

/* Insert the clusters that are plain data, or note where they are (bg_map_note_table); returns how many extents the map took. */
int64_t bg_map_insert_l2(bg_map *map, int64_t generation, const bg_l2_places *places);

/* Some entries of a table. */
typedef struct {
    int64_t first;   /* offset in the image of the first */
    int64_t position; /* of its bytes among the entries of all parts, for whom -1: there is no table */
    int64_t count;
    int64_t host; /* where they are in the image's file; -1: they need not be read */
} bg_l2_part;

/*
 * The parts of the tables that say where `count` runs of the image are, {start, end} each: as many as there is room for. Of an L1
 * entry that breaks the specification, or leads past host_end, there is none. *bytes: of the entries of all.
 */
int64_t bg_l2_find_parts(const void *l1, int64_t l1_entries, int cluster_bits, int64_t host_end, const int64_t *runs,
                         int64_t count, bg_l2_part *out, int64_t max, int64_t *bytes);

/*
 * Read the entries of all parts into `entries`; zeroes past the file's end. 0, or -errno of the first failure. `now`: -EAGAIN
 * when that would have to wait for a device.
 */
int bg_l2_read_parts(int fd, const bg_l2_part *parts, int64_t count, void *entries, int64_t bytes, int now);

/*
 * Insert what the parts say, of which `places` has what they have in common: its table and entries are those of all parts, its
 * disk is where the image's first byte is. What reads as zeroes is entered, too; `zeroes`: unallocated clusters do.
 */
int64_t bg_map_insert_l2_parts(bg_map *map, int64_t generation, const bg_l2_places *places, const bg_l2_part *parts,
                               int64_t count, int zeroes);
/* cffi:end */

#endif
