/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#include "qcow2_l2.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

#define HOST_LIMIT ((uint64_t)1 << 56)
#define RESERVED 0x3f000000000001feu /* bits 1-8 and 56-61 of a standard entry */
#define SECTOR 512u

static bg_l2_run decode_compressed(uint64_t entry, int cluster_bits)
{
    int offset_bits = 62 - (cluster_bits - 8);
    uint64_t offset = entry & (((uint64_t)1 << offset_bits) - 1);
    uint64_t sectors = ((entry & (QCOW2_COMPRESSED - 1)) >> offset_bits) + 1;
    if (offset >= HOST_LIMIT)
        return (bg_l2_run){.kind = BG_L2_INVALID, .host_offset = (int64_t)entry};
    return (bg_l2_run){
        .kind = BG_L2_COMPRESSED,
        .host_offset = (int64_t)offset,
        .compressed_length = (int64_t)(sectors * SECTOR - offset % SECTOR),
    };
}

/* Kind, host offset and compressed length of one entry. */
static bg_l2_run decode_entry(uint64_t entry, int cluster_bits, int version, int options)
{
    if (entry & QCOW2_COMPRESSED)
        return decode_compressed(entry, cluster_bits);
    bg_l2_run invalid = {.kind = BG_L2_INVALID, .host_offset = (int64_t)entry};
    uint64_t host = entry & QCOW2_HOST_OFFSET;
    bool zero = entry & QCOW2_ZERO;
    if ((entry & RESERVED) || (host & (((uint64_t)1 << cluster_bits) - 1)) || (zero && version < 3))
        return invalid;
    bool allocated = host != 0;
    if (!allocated && (entry & QCOW2_COPIED)) {
        if (!(options & BG_L2_DATA_FILE))
            return invalid;
        allocated = true;
    }
    if (allocated)
        return (bg_l2_run){.kind = zero ? BG_L2_ZERO_ALLOCATED : BG_L2_DATA, .host_offset = (int64_t)host};
    return (bg_l2_run){.kind = zero ? BG_L2_ZERO : BG_L2_UNALLOCATED};
}

/* Whether `next`, the entry behind `run`, belongs to it. */
static bool continues(const bg_l2_run *run, const bg_l2_run *next, int cluster_bits)
{
    if (next->kind != run->kind || next->flags != run->flags)
        return false;
    switch (run->kind) {
    case BG_L2_UNALLOCATED:
    case BG_L2_ZERO:
        return true;
    case BG_L2_ZERO_ALLOCATED:
    case BG_L2_DATA:
        return next->host_offset == run->host_offset + (run->count << cluster_bits);
    default:
        return false;
    }
}

int64_t bg_l2_decode(const void *table, int64_t start, int64_t end, int cluster_bits, int version, int options,
                     bg_l2_run *out, int64_t max)
{
    if (start < 0 || end < start || cluster_bits < 9 || cluster_bits > 21 || version < 2 || version > 3 ||
        (options & ~BG_L2_DATA_FILE) || max < 1)
        return -EINVAL;
    int64_t runs = 0;
    for (int64_t i = start; i < end; i++) {
        uint64_t entry = load_be64(table, i);
        bg_l2_run next = decode_entry(entry, cluster_bits, version, options);
        next.index = i;
        next.count = 1;
        next.flags = entry & QCOW2_COPIED && next.kind != BG_L2_INVALID ? BG_L2_COPIED : 0;
        if (runs && continues(&out[runs - 1], &next, cluster_bits)) {
            out[runs - 1].count++;
        } else {
            if (runs == max)
                break;
            out[runs++] = next;
        }
        if (next.kind == BG_L2_UNALLOCATED) {
            /* Most tables of a sparse image are mostly empty. */
            int64_t used = bg_next_nonzero_u64(table, i + 1, end);
            out[runs - 1].count += used - (i + 1);
            i = used - 1;
        }
    }
    return runs;
}

static void store_be64(void *table, int64_t index, uint64_t value)
{
    value = htobe64(value);
    memcpy((char *)table + index * 8, &value, sizeof(value));
}

int bg_l2_link(void *table, int table_bits, int cluster_bits, const bg_allocator_link *links, int64_t count, int64_t *low,
               int64_t *high)
{
    const int64_t entries = (int64_t)1 << table_bits;
    *low = entries;
    *high = 0;
    for (int64_t i = 0; i < count; i++) {
        const bg_allocator_link *link = &links[i];
        int64_t first = link->guest >> cluster_bits & (entries - 1);
        if (link->clusters > entries - first)
            return -EINVAL;
        *low = first < *low ? first : *low;
        *high = first + link->clusters > *high ? first + link->clusters : *high;
        for (int64_t j = 0; j < link->clusters; j++) {
            uint64_t place = (uint64_t)(link->host + (j << cluster_bits)) | QCOW2_COPIED, before = load_be64(table, first + j);
            if (link->zero ? before != place : before & ~(uint64_t)QCOW2_ZERO)
                return -EINVAL;
            store_be64(table, first + j, link->zero ? place | QCOW2_ZERO : place);
        }
    }
    return 0;
}

int64_t bg_next_nonzero_u64(const void *table, int64_t start, int64_t count)
{
    if (start < 0 || start > count)
        return -EINVAL;
    const char *p = table;
    int64_t i = start;
    for (; i + 8 <= count; i += 8) {
        uint64_t word[8], any = 0;
        memcpy(word, p + i * 8, sizeof(word));
        for (int k = 0; k < 8; k++)
            any |= word[k];
        if (any)
            break;
    }
    for (; i < count; i++) {
        uint64_t word;
        memcpy(&word, p + i * 8, sizeof(word));
        if (word)
            break;
    }
    return i;
}

int64_t bg_refcount16_free_run(const void *block, int64_t start, int64_t count, int64_t want, int64_t *length)
{
    if (start < 0 || start > count || want < 1)
        return -EINVAL;
    const char *p = block;
    int64_t run = 0, i = start;
    while (i < count) {
        uint64_t four;
        uint16_t one;
        if (run == 0 && i + 4 <= count) {
            /* A full part of the block: four entries at a time, as long as none of them is zero. */
            memcpy(&four, p + i * 2, sizeof(four));
            if (((four - 0x0001000100010001u) & ~four & 0x8000800080008000u) == 0) {
                i += 4;
                continue;
            }
        }
        memcpy(&one, p + i * 2, sizeof(one));
        i++;
        run = one ? 0 : run + 1;
        if (run == want)
            break;
    }
    *length = run;
    return i - run;
}
