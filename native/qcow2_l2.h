/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * qcow2's tables in bulk, straight from and to their big-endian bytes. Source: qcow2 specification (QEMU,
 * docs/interop/qcow2), "Cluster mapping" and "Host cluster management". Images are untrusted: every entry is judged, none sizes
 * anything.
 *
 * Units:     table indexes count entries; host offsets and lengths are bytes.
 * Ownership: tables are borrowed; they need no alignment.
 * Errno:     a count or index, else -EINVAL.
 * Threads:   no state; any thread. Never blocks.
 *
 * Extended L2 entries (16 bytes, 32 subclusters) get a function of their own beside bg_l2_decode.
 */
#ifndef BG_QCOW2_L2_H
#define BG_QCOW2_L2_H

#include "allocator.h"

#include <endian.h>
#include <stdint.h>
#include <string.h>

/* cffi:begin */
enum bg_l2_kind {
    BG_L2_UNALLOCATED,    /* ask the backing image */
    BG_L2_ZERO,           /* reads as zeroes */
    BG_L2_ZERO_ALLOCATED, /* reads as zeroes; a host cluster is reserved */
    BG_L2_DATA,           /* at host_offset, contiguous over the run */
    BG_L2_COMPRESSED,     /* one cluster: compressed_length bytes at host_offset */
    BG_L2_INVALID         /* one entry that breaks the specification; host_offset holds it as it was found */
};

#define BG_L2_COPIED 1 /* refcount is exactly one */

typedef struct {
    int64_t index; /* of the first entry */
    int64_t count;
    int64_t kind;        /* enum bg_l2_kind */
    int64_t host_offset; /* of the first cluster; 0 for UNALLOCATED and ZERO */
    int64_t flags;       /* BG_L2_COPIED: the same over the run */
    int64_t compressed_length; /* upper bound: up to the end of the last 512-byte sector; 0 unless COMPRESSED */
} bg_l2_run;

#define BG_L2_DATA_FILE 1 /* the image has an external data file: host offset 0 is allocated when COPIED */

/*
 * Decode entries [start, end) of a standard L2 table into runs of one kind, contiguous on the host and equal in COPIED.
 * cluster_bits 9..21, version 2 or 3. Writes at most `max` (>= 1) runs and returns their number; when it
 * is `max`, go on behind the last.
 */
int64_t bg_l2_decode(const void *table, int64_t start, int64_t end, int cluster_bits, int version, int options,
                     bg_l2_run *out, int64_t max);

/*
 * Put links of an allocator into the standard L2 table of 1 << table_bits entries that they are of, in order. *low and *high: the
 * entries that have changed are in [low, high). -EINVAL: a link does not fit what is there, which only a mistake can bring about; those
 * before it are in.
 */
int bg_l2_link(void *table, int table_bits, int cluster_bits, const bg_allocator_link *links, int64_t count, int64_t *low,
               int64_t *high);

/* Index of the first 8-byte entry in [start, count) that is not zero, or `count`. For L1 and refcount tables. */
int64_t bg_next_nonzero_u64(const void *table, int64_t start, int64_t count);

/*
 * In a refcount block of 16-bit entries, the first run of `want` (>= 1) free (zero) entries within [start, count): returns
 * its index and *length = want. If there is none: the index and length of the free run that ends at `count`, for the search to
 * go on in the next block; length 0 and index `count` when the last entry is in use.
 */
int64_t bg_refcount16_free_run(const void *block, int64_t start, int64_t count, int64_t want, int64_t *length);
/* cffi:end */

/* Of entries of L1 and L2 tables; the last two are L2's. */
#define QCOW2_COPIED ((uint64_t)1 << 63)
#define QCOW2_HOST_OFFSET 0x00fffffffffffe00u /* bits 9-55 */
#define QCOW2_COMPRESSED ((uint64_t)1 << 62)
#define QCOW2_ZERO 1u

static inline uint64_t load_be64(const void *table, int64_t index)
{
    uint64_t raw;
    memcpy(&raw, (const char *)table + index * 8, sizeof(raw));
    return be64toh(raw);
}

#endif
