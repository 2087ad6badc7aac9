/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "driver.h"
#include "extent_map.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define UNIT (256 << 10)
#define UNITS 400 /* six regions and a quarter */
#define ROOMY (64 << 20)

/* What the map must say of each unit: 0 nothing, else an extent. */
typedef struct {
    int mapped, slot, flags;
    int64_t storage_offset;
} entry;

static entry model[UNITS];

static void compare(bg_map *map, int64_t size, int may_forget)
{
    for (int i = 0; i < UNITS; i++) {
        bg_map_extent e;
        int64_t at = (int64_t)i * UNIT + (i * 7919) % 200000;
        if (at >= size)
            at = size - 1;
        if (!bg_map_find(map, at, &e)) {
            CHECK(!model[i].mapped || may_forget);
            continue;
        }
        CHECK(model[i].mapped && e.flags == model[i].flags && e.offset <= at && at < e.offset + e.length);
        if (!(e.flags & BG_MAP_ZERO))
            CHECK(e.slot == model[i].slot &&
                  e.storage_offset - e.offset == model[i].storage_offset - (int64_t)i * UNIT);
    }
}

static void random_steps(int64_t memory, uint64_t seed, int steps)
{
    bg_map *map;
    bg_map_stats stats;
    int64_t size = (int64_t)UNITS * UNIT - 1000;
    CHECK(bg_map_new(size, memory, &map) == 0);
    memset(model, 0, sizeof(model));
    int slots[3];
    for (int i = 0; i < 3; i++)
        slots[i] = bg_map_add_slot(map, i, 1, 1);
    for (int step = 0; step < steps; step++) {
        int from = (int)(next_random(&seed) % UNITS), left = UNITS - from;
        int count = 1 + (int)(next_random(&seed) % (uint64_t)(step % 4 ? (left < 9 ? left : 9) : left));
        int64_t offset = (int64_t)from * UNIT, length = (int64_t)count * UNIT;
        if (offset + length > size)
            length = size - offset;
        uint64_t kind = next_random(&seed) % 10;
        if (kind < 6) {
            bg_map_extent e = {offset, length, (int64_t)(next_random(&seed) % 3) * UNIT + offset,
                               slots[next_random(&seed) % 2], kind % 3 == 0 ? BG_MAP_ZERO : kind % 3 == 1 ? BG_MAP_WRITABLE : 0};
            CHECK(bg_map_insert(map, bg_map_generation(map), &e, 1) == 1);
            for (int i = from; i < from + count; i++)
                model[i] = (entry){1, e.slot, e.flags, e.storage_offset + (int64_t)(i - from) * UNIT};
        } else if (kind < 8) {
            int64_t ticket = bg_map_invalidate(map, offset, length);
            CHECK(ticket > 0 && bg_map_settled(map, ticket));
            memset(&model[from], 0, (size_t)count * sizeof(entry));
        } else {
            CHECK(bg_map_protect(map, offset, length) > 0);
            for (int i = from; i < from + count; i++)
                model[i].flags &= ~BG_MAP_WRITABLE;
        }
        compare(map, size, memory < ROOMY);
        bg_map_get_stats(map, &stats);
        CHECK(stats.bytes <= stats.limit);
    }
    bg_map_invalidate(map, 0, size);
    bg_map_get_stats(map, &stats);
    CHECK(stats.extents == 0 && stats.regions == 0);
    CHECK(bg_map_free(map) == 0);
}

/* One extent a block, in random order: more than fits. */
static void too_much(void)
{
    bg_map *map;
    bg_map_stats stats;
    uint64_t seed = 4711;
    int64_t size = (int64_t)1 << 34, blocks = size >> 16;
    CHECK(bg_map_new(size, BG_MAP_MIN_MEMORY, &map) == 0);
    int slot = bg_map_add_slot(map, 0, 1, 1);
    for (int i = 0; i < 20000; i++) {
        int64_t block = (int64_t)(next_random(&seed) % (uint64_t)blocks);
        bg_map_extent e = {block << 16, 1 << 16, (blocks - block) << 16, slot, 0};
        CHECK(bg_map_insert(map, bg_map_generation(map), &e, 1) == 1);
        CHECK(bg_map_find(map, e.offset, &e) == 1);
        if (i % 500 == 0) {
            bg_map_get_stats(map, &stats);
            CHECK(stats.bytes <= stats.limit);
        }
    }
    CHECK(stats.evictions > 0 && stats.extents > 1000);
    CHECK(bg_map_free(map) == 0);
}

/* What was taken out of a wide extent does not come back when its region is evicted. */
static void holes_under_pressure(void)
{
    bg_map *map;
    bg_map_stats stats;
    int64_t size = (int64_t)1 << 35, region = 16 << 20;
    CHECK(bg_map_new(size, BG_MAP_MIN_MEMORY, &map) == 0);
    bg_map_extent e = {0, size, 0, bg_map_add_slot(map, 0, 1, 1), 0};
    CHECK(bg_map_insert(map, bg_map_generation(map), &e, 1) == 1);
    for (int64_t at = 0; at < size; at += region)
        for (int i = 0; i < 3; i++)
            CHECK(bg_map_invalidate(map, at + i * 100000, 500) > 0);
    for (int64_t at = 0; at < size; at += region)
        for (int i = 0; i < 3; i++)
            CHECK(!bg_map_find(map, at + i * 100000, &e));
    CHECK(bg_map_find(map, size - 1, &e));
    bg_map_get_stats(map, &stats);
    CHECK(stats.evictions > 0);
    CHECK(bg_map_free(map) == 0);
}

/* A request from a region that a wide extent describes into one with a leaf. */
static void across_regions(void)
{
    bg_map *map;
    bg_map_piece pieces[4];
    bg_map_request request;
    int64_t region = 16 << 20;
    CHECK(bg_map_new(4 * region, ROOMY, &map) == 0);
    int one = bg_map_add_slot(map, 0, 1, 1), other = bg_map_add_slot(map, 1, 1, 1);
    bg_map_extent e[2] = {{0, 4 * region, 0, one, 0}, {2 * region, 100, 7, other, 0}};
    CHECK(bg_map_insert(map, bg_map_generation(map), e, 2) == 2);
    CHECK(bg_map_begin(map, 1, 2 * region + 200, 0, pieces, 2, &request) == -E2BIG);
    CHECK(bg_map_begin(map, 1, 2 * region + 200, 0, pieces, 4, &request) == 0 && request.count == 3);
    CHECK(pieces[0].slot == one && pieces[0].storage_offset == 1 && pieces[0].length == 2 * region - 1);
    CHECK(pieces[1].slot == other && pieces[1].storage_offset == 7 && pieces[1].length == 100);
    CHECK(pieces[2].slot == one && pieces[2].storage_offset == 2 * region + 100 && pieces[2].length == 101);
    bg_map_end(map, &request, 1);
    CHECK(bg_map_free(map) == 0);
}

static void merging(void)
{
    bg_map *map;
    bg_map_stats stats;
    int64_t size = (int64_t)1 << 40, part = 64 << 10;
    CHECK(bg_map_new(size, ROOMY, &map) == 0);
    int slot = bg_map_add_slot(map, 0, 1, 1);
    bg_map_extent all = {0, size, 0, slot, BG_MAP_WRITABLE};
    CHECK(bg_map_insert(map, bg_map_generation(map), &all, 1) == 1);
    bg_map_protect(map, 0, size);
    /* Lifted cluster by cluster, from the back, over four regions. */
    for (int64_t at = 64 << 20; at > 0; at -= part) {
        bg_map_extent e = {at - part, part, at - part, slot, BG_MAP_WRITABLE};
        CHECK(bg_map_insert(map, bg_map_generation(map), &e, 1) == 1);
    }
    bg_map_get_stats(map, &stats);
    CHECK(stats.extents == 2 && stats.regions == 0);
    CHECK(bg_map_free(map) == 0);
}

static void staleness(void)
{
    bg_map *map;
    bg_map_extent found;
    int64_t region = 16 << 20;
    CHECK(bg_map_new(64 * region, ROOMY, &map) == 0);
    int slot = bg_map_add_slot(map, 0, 1, 1);
    bg_map_extent here = {100, 1000, 0, slot, BG_MAP_WRITABLE}, there = {40 * region, 2 * region, 0, slot, BG_MAP_WRITABLE};
    int64_t generation = bg_map_generation(map);
    CHECK(bg_map_invalidate(map, 5000, 1) > 0);
    CHECK(bg_map_insert(map, generation, &here, 1) == 0);
    CHECK(bg_map_insert(map, generation, &there, 1) == 1);
    CHECK(bg_map_insert(map, bg_map_generation(map), &here, 1) == 1);
    generation = bg_map_generation(map);
    CHECK(bg_map_protect(map, 41 * region, 1) > 0);
    CHECK(bg_map_insert(map, generation, &there, 1) == 1);
    CHECK(bg_map_find(map, 40 * region, &found) && found.flags == 0);
    CHECK(bg_map_insert(map, generation, &here, 1) == 1);
    CHECK(bg_map_find(map, 100, &found) && found.flags == BG_MAP_WRITABLE);
    CHECK(bg_map_remove_slot(map, slot) > 0 && bg_map_remove_slot(map, slot) == -EINVAL);
    CHECK(!bg_map_find(map, 100, &found));
    CHECK(bg_map_insert(map, bg_map_generation(map), &here, 1) == 0);
    /* Numbers come round only after everything was dropped. */
    for (int i = 1; i < BG_MAP_SLOTS; i++)
        CHECK(bg_map_add_slot(map, 0, 1, 1) == i);
    CHECK(bg_map_add_slot(map, 0, 1, 1) == slot);
    CHECK(bg_map_add_slot(map, 0, 1, 1) == -ENOSPC);
    CHECK(!bg_map_find(map, 100, &found));
    CHECK(bg_map_resize(map, region) > 0 && bg_map_size(map) == region);
    CHECK(bg_map_insert(map, bg_map_generation(map), &there, 1) == -EINVAL);
    CHECK(bg_map_resize(map, INT64_MAX) > 0);
    bg_map_extent all = {0, INT64_MAX, 0, 0, BG_MAP_ZERO};
    CHECK(bg_map_insert(map, bg_map_generation(map), &all, 1) == 1);
    CHECK(bg_map_find(map, INT64_MAX - 1, &found) && found.flags == BG_MAP_ZERO);
    CHECK(bg_map_invalidate(map, INT64_MAX - 7, 3) > 0);
    CHECK(!bg_map_find(map, INT64_MAX - 1, &found) && bg_map_find(map, 7, &found));
    CHECK(bg_map_free(map) == 0);
}

static void tickets(void)
{
    bg_map *map;
    bg_map_request requests[70];
    bg_map_piece pieces[70][2];
    CHECK(bg_map_new(1 << 20, ROOMY, &map) == 0);
    bg_map_extent e = {0, 1 << 20, 0, bg_map_add_slot(map, 0, 1, 1), 0};
    CHECK(bg_map_insert(map, bg_map_generation(map), &e, 1) == 1);
    /* More requests at once than there are records at first. */
    for (int i = 0; i < 70; i++)
        CHECK(bg_map_begin(map, 10, 100, 0, pieces[i], 2, &requests[i]) == 0 && requests[i].count == 1);
    CHECK(bg_map_begin(map, 10, 100, 1, pieces[0], 2, &requests[0]) == BG_MAP_MISS);
    int64_t first = bg_map_invalidate(map, 0, 4096), second;
    CHECK(!bg_map_settled(map, first) && !bg_map_notify(map, first));
    CHECK(bg_map_free(map) == -EBUSY);
    bg_map_request later;
    bg_map_piece piece[2];
    CHECK(bg_map_begin(map, 10, 100, 0, piece, 2, &later) == BG_MAP_MISS);
    CHECK(bg_map_begin(map, 5000, 100, 0, piece, 2, &later) == 0);
    second = bg_map_invalidate(map, 0, 1 << 20);
    struct pollfd wait = {bg_map_eventfd(map), POLLIN, 0};
    for (int i = 0; i < 70; i++) {
        CHECK(poll(&wait, 1, 0) == 0);
        bg_map_end(map, &requests[i], 1);
    }
    CHECK(poll(&wait, 1, 0) == 1);
    bg_map_acknowledge(map);
    CHECK(poll(&wait, 1, 0) == 0);
    CHECK(bg_map_settled(map, first) && !bg_map_settled(map, second) && !bg_map_notify(map, second));
    bg_map_end(map, &later, 1);
    CHECK(poll(&wait, 1, 0) == 1 && bg_map_notify(map, second));
    bg_map_wait(map, second);
    CHECK(bg_map_free(map) == 0);
}

static void transfers(void)
{
    bg_map *map;
    bg_bitmap *bitmap;
    static char buf[1 << 20] __attribute__((aligned(4096)));
    int fd = memfd_create("driver", MFD_CLOEXEC);
    CHECK(bg_map_new(1 << 20, ROOMY, &map) == 0 && bg_bitmap_new(1 << 20, 4096, &bitmap) == 0);
    int loose = bg_map_add_slot(map, fd, 1, 1), strict = bg_map_add_slot(map, fd, 512, 512), bad = bg_map_add_slot(map, 9999, 1, 1);
    int64_t generation = bg_map_generation(map);
    /* Every second block, backwards in the file: 256 pieces. */
    bg_map_extent e[256];
    for (int i = 0; i < 256; i++)
        e[i] = (bg_map_extent){i * 4096, 4096, (255 - i) * 4096, loose, BG_MAP_WRITABLE};
    CHECK(bg_map_insert(map, generation, e, 256) == 256);
    CHECK(bg_map_set_bitmaps(map, &bitmap, 1) > 0);
    for (size_t i = 0; i < sizeof(buf); i++)
        buf[i] = (char)(i / 4096 + 1);
    CHECK(bg_map_take_written(map, loose) == 0);
    CHECK(bg_map_pwrite(map, 0, buf, sizeof(buf)) == 0);
    CHECK(bg_map_take_written(map, loose) == 1 && bg_map_take_written(map, loose) == 0);
    CHECK(bg_bitmap_count(bitmap) == 1 << 20);
    memset(buf, 0, sizeof(buf));
    CHECK(bg_map_pread(map, 1000, buf, 500000) == 0);
    for (int i = 0; i < 500000; i++)
        CHECK(buf[i] == (char)((i + 1000) / 4096 + 1));
    bg_bitmap_clear(bitmap);
    e[0] = (bg_map_extent){0, 4096, 0, strict, BG_MAP_WRITABLE};
    e[1] = (bg_map_extent){4096, 4096, 0, 0, BG_MAP_ZERO};
    e[2] = (bg_map_extent){8192, 4096, 0, bad, BG_MAP_WRITABLE};
    e[3] = (bg_map_extent){12288, 4096, 2 << 20, loose, 0};
    CHECK(bg_map_insert(map, bg_map_generation(map), e, 4) == 4);
    CHECK(bg_map_pread(map, 512, buf, 512) == 0 && buf[0] == 0);
    CHECK(bg_map_pread(map, 512, buf + 1, 512) == 0 && bg_map_pread(map, 512, buf, 100) == BG_MAP_MISS);
    CHECK(bg_map_pread(map, 100, buf, 512) == BG_MAP_MISS);
    CHECK(bg_map_align_slot(map, strict, 3) == -EINVAL && bg_map_align_slot(map, strict, 1024) > 0);
    CHECK(bg_map_pread(map, 512, buf, 512) == BG_MAP_MISS && bg_map_pread(map, 1024, buf, 1024) == 0);
    CHECK(bg_map_pwrite(map, 4096, buf, 1) == BG_MAP_MISS && bg_map_pwrite(map, 12288, buf, 1) == BG_MAP_MISS);
    CHECK(bg_bitmap_count(bitmap) == 0 && bg_map_take_written(map, loose) == 0);
    CHECK(bg_map_pread(map, 8192, buf, 10) == -EBADF && bg_map_pwrite(map, 8192, buf, 10) == -EBADF);
    CHECK(bg_bitmap_get(bitmap, 8192) == 1);
    memset(buf, 7, 8192);
    CHECK(bg_map_pread(map, 4096, buf, 4096) == 0 && bg_map_pread(map, 12288, buf + 4096, 4096) == 0);
    for (int i = 0; i < 8192; i++)
        CHECK(buf[i] == 0);
    CHECK(bg_map_pread(map, 1 << 20, buf, 0) == 0 && bg_map_pread(map, 1 << 20, buf, 1) == -EINVAL);
    CHECK(bg_map_pread(map, -1, buf, 1) == -EINVAL && bg_map_pread(map, 5, buf, INT64_MAX) == -EINVAL);
    CHECK(bg_map_resize(map, 2 << 20) == -EINVAL);
    CHECK(bg_map_set_bitmaps(map, NULL, 0) > 0);
    CHECK(bg_map_resize(map, 2 << 20) > 0);
    CHECK(bg_map_set_bitmaps(map, &bitmap, 1) == -EINVAL);
    CHECK(bg_map_free(map) == 0);
    bg_bitmap_free(bitmap);
    close(fd);
}

/* Of several holds one after the other ends; requests beside them, and in other slots, do not notice. */
static void holds(void)
{
    bg_map *map;
    bg_map_piece piece;
    bg_map_request request;
    int64_t ticket, numbers[4];
    char buf[1024];
    int fd = memfd_create("driver", MFD_CLOEXEC);
    CHECK(ftruncate(fd, 1 << 20) == 0 && bg_map_new(1 << 20, ROOMY, &map) == 0);
    int slot = bg_map_add_slot(map, fd, 1, 1), other = bg_map_add_slot(map, fd, 1, 1);
    bg_map_extent e[2] = {{0, 1 << 19, 1 << 19, slot, BG_MAP_WRITABLE}, {1 << 19, 1 << 19, 0, other, BG_MAP_WRITABLE}};
    CHECK(bg_map_insert(map, bg_map_generation(map), e, 2) == 2);
    CHECK(bg_map_hold(map, -1, 0, 1, &ticket) == -EINVAL && bg_map_hold(map, slot, 1, 1, &ticket) == -EINVAL);
    CHECK(bg_map_release(map, 1) == -ENOENT);
    CHECK(bg_map_begin(map, 1000, 100, 1, &piece, 1, &request) == 0);
    for (int i = 0; i < 4; i++)
        CHECK((numbers[i] = bg_map_hold(map, slot, (1 << 19) + i * 1024, (1 << 19) + i * 1024 + 512, &ticket)) > 0);
    CHECK(!bg_map_settled(map, ticket)); /* the one that began before */
    bg_map_end(map, &request, 1);
    CHECK(bg_map_settled(map, ticket));
    for (int released = 0; released <= 4; released++) {
        for (int i = 0; i < 4; i++) {
            int held = i >= released ? BG_MAP_MISS : 0;
            CHECK(bg_map_pread(map, i * 1024, buf, 1) == held && bg_map_pwrite(map, i * 1024 + 511, buf, 2) == held);
            CHECK(bg_map_pread(map, i * 1024 + 512, buf, 512) == 0 && bg_map_pread(map, (1 << 19) + i * 1024, buf, 1) == 0);
            CHECK(bg_map_zero(map, i * 1024, 1, BG_MAP_PUNCH) == BG_MAP_MISS);
        }
        CHECK(released == 4 || bg_map_release(map, numbers[released]) == 0);
    }
    CHECK(bg_map_release(map, numbers[0]) == -ENOENT);
    CHECK(bg_map_hold(map, slot, 0, INT64_MAX, &ticket) > 0 && bg_map_pread(map, 5, buf, 1) == BG_MAP_MISS);
    CHECK(bg_map_free(map) == 0);
    close(fd);
}

void test_extent_map(void)
{
    bg_map *map;
    CHECK(bg_map_new(-1, ROOMY, &map) == -EINVAL && bg_map_new(1, 1000, &map) == -EINVAL);
    for (uint64_t seed = 1; seed < 6; seed++) {
        random_steps(ROOMY, seed * 88172645463325252u, 400);
        random_steps(BG_MAP_MIN_MEMORY, seed * 123456789, 400);
    }
    too_much();
    holes_under_pressure();
    across_regions();
    merging();
    staleness();
    tickets();
    transfers();
    holds();
}
