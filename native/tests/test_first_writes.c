/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* First writes are done whole or not at all, whatever copier and allocator say in the middle of one. */
#define _GNU_SOURCE
#include "driver.h"
#include "extent_map.h"
#include "io.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define UNIT 4096
#define UNITS 40 /* more parts than fit on the stack */
#define SIZE (UNITS * UNIT)

static bg_map *map;
static bg_bitmap *bitmap;
static int fd, slot;
static int asked, refuse_at, drain_at; /* copies, or parts prepared */
static int prepared, written, dropped;

struct bg_map_placing {
    int64_t offset, length;
};

/* As a drain does in the middle of a request. */
static void maybe_drain(void)
{
    if (asked == drain_at)
        CHECK(bg_map_invalidate(map, 0, SIZE) > 0);
}

static int copy(bg_map_copier *self, bg_map *asks, int64_t offset, int64_t length, int now)
{
    (void)self;
    (void)now;
    if (++asked == refuse_at)
        return BG_MAP_MISS;
    maybe_drain();
    return bg_map_copied(asks, offset, length);
}

static int64_t prepare(bg_map_allocator *self, bg_map *asks, int64_t offset, int64_t length, int now, bg_map_placing **out)
{
    (void)self;
    (void)asks;
    (void)now;
    if (++asked == refuse_at)
        return 0;
    maybe_drain();
    *out = malloc(sizeof(**out));
    CHECK(*out);
    int64_t most = UNIT - offset % UNIT;
    **out = (bg_map_placing){offset, length < most ? length : most};
    prepared++;
    return (*out)->length;
}

static int write_placing(bg_map_allocator *self, bg_map_placing *placing, const void *buf, bg_pipe *pipe, int now)
{
    (void)self;
    (void)now;
    CHECK(!pipe);
    if (++asked == refuse_at)
        return -ENOSPC;
    CHECK(bg_pwrite(fd, buf, placing->length, SIZE + placing->offset) == placing->length);
    maybe_drain();
    return 0;
}

static void finish(bg_map_allocator *self, bg_map *asks, bg_map_placing *placing, int enter)
{
    (void)self;
    int64_t at = placing->offset, length = placing->length;
    if (enter && !drain_at)
        CHECK(bg_map_placed(asks, at, length, slot, SIZE + at) == 0);
    *(enter ? &written : &dropped) += 1;
    free(placing);
}

static bg_map_copier copier = {.copy = copy};
static bg_map_allocator allocator = {.prepare = prepare, .write = write_placing, .finish = finish};

/* Units in turn: to be placed, in place, to be copied before, both. */
static void fill(void)
{
    static const int kinds[] = {BG_MAP_ALLOCATE | BG_MAP_ZERO, BG_MAP_WRITABLE, BG_MAP_WRITABLE | BG_MAP_COPY,
                                BG_MAP_ALLOCATE | BG_MAP_ZERO | BG_MAP_COPY};
    bg_map_extent e[UNITS];
    for (int i = 0; i < UNITS; i++)
        e[i] = (bg_map_extent){i * UNIT, UNIT, i * UNIT, slot, kinds[i % 4]};
    CHECK(bg_map_insert(map, bg_map_generation(map), e, UNITS) == UNITS);
    CHECK(ftruncate(fd, 0) == 0 && ftruncate(fd, 2 * SIZE) == 0);
    bg_bitmap_clear(bitmap);
    asked = prepared = written = dropped = 0;
}

/* What can be seen: places that were written, and not entered, do not matter. */
static bool is_untouched(void)
{
    static char is[SIZE], zero[SIZE];
    CHECK(bg_pread(fd, is, sizeof(is), 0) == (int64_t)sizeof(is));
    return memcmp(is, zero, sizeof(is)) == 0 && bg_bitmap_count(bitmap) == 0 && bg_map_take_written(map, slot) == 0;
}

static int64_t first_writes(void)
{
    bg_map_stats stats;
    bg_map_get_stats(map, &stats);
    return stats.first_writes;
}

static void whole_or_nothing(void)
{
    static char buf[SIZE], back[SIZE];
    memset(buf, 0xab, sizeof(buf));
    int units = UNITS / 2, calls = units + units + units; /* copies, parts prepared, parts written */
    for (int at = 1; at <= calls; at++)
        for (int drains = 0; drains < 2; drains++) {
            fill();
            refuse_at = drains ? 0 : at;
            drain_at = drains ? at : 0;
            int ret = bg_map_pwrite(map, 100, buf, SIZE - 100);
            CHECK(asked == (drains && at > 2 * units ? calls : at));
            if (drains && at > 2 * units) {
                /* Too late: whoever drains waits for this request. */
                CHECK(ret == 0 && written == units && bg_bitmap_count(bitmap) == SIZE && bg_map_take_written(map, slot) == 1);
                continue;
            }
            CHECK(ret == BG_MAP_MISS);
            CHECK(is_untouched() && written == 0 && dropped == prepared);
            CHECK(prepared == (at <= units ? 0 : at <= 2 * units ? at - units - 1 + drains : units));
            /* What is drained is gone; else the rest of the map is what it was, but for what was copied. */
            CHECK(bg_map_has_first_write(map, 0, SIZE) == (drains ? 0 : at > units ? BG_MAP_ALLOCATE : BG_MAP_ALLOCATE | BG_MAP_COPY));
        }
    CHECK(first_writes() == units);
    fill();
    refuse_at = drain_at = 0;
    CHECK(bg_map_pwrite(map, 100, buf, SIZE - 100) == 0);
    CHECK(asked == calls && prepared == units && written == units && dropped == 0 && first_writes() == units + 1);
    CHECK(bg_map_pread(map, 0, back, SIZE) == 0 && memcmp(back + 100, buf, SIZE - 100) == 0 && back[99] == 0);
    CHECK(bg_bitmap_count(bitmap) == SIZE && bg_map_take_written(map, slot) == 1);
}

/* Extents that meet inside a unit: the allocator, which keeps units, is asked for each of them once. */
static void extents_within_a_unit(void)
{
    char buf[2 * UNIT], back[2 * UNIT];
    memset(buf, 0xef, sizeof(buf));
    fill();
    bg_map_extent e[4];
    for (int i = 0; i < 4; i++)
        e[i] = (bg_map_extent){i * UNIT / 2, UNIT / 2, SIZE - UNIT * (i + 1), slot, BG_MAP_ALLOCATE | (i % 2 ? BG_MAP_ZERO : 0)};
    CHECK(bg_map_insert(map, bg_map_generation(map), e, 4) == 4);
    CHECK(bg_map_pwrite(map, 1, buf, 2 * UNIT - 2) == 0 && prepared == 2 && written == 2);
    CHECK(bg_map_pread(map, 1, back, 2 * UNIT - 2) == 0 && memcmp(back, buf, 2 * UNIT - 2) == 0);
    /* COPY behind the extent's end, of which the copier is asked before the unit is kept. */
    fill();
    e[1].flags |= BG_MAP_COPY;
    CHECK(bg_map_insert(map, bg_map_generation(map), e, 4) == 4);
    CHECK(bg_map_pwrite(map, 1, buf, 2 * UNIT - 2) == 0 && asked == 1 + 4 && prepared == 2 && written == 2);
}

/* Zeroes: nothing before all is copied. */
static void zeroes(void)
{
    char back[3 * UNIT];
    bg_map_extent e[3];
    CHECK(bg_map_set_zeroing(map, slot, BG_MAP_ZERO_RANGE | BG_MAP_PUNCH, 1) == 0);
    for (int at = 1; at <= 3; at++) {
        for (int i = 0; i < 3; i++)
            e[i] = (bg_map_extent){i * UNIT, UNIT, i * 2 * UNIT, slot, BG_MAP_WRITABLE | BG_MAP_COPY};
        CHECK(bg_map_insert(map, bg_map_generation(map), e, 3) == 3);
        memset(back, 0xcd, sizeof(back));
        for (int i = 0; i < 3; i++)
            CHECK(bg_pwrite(fd, back, UNIT, i * 2 * UNIT) == UNIT);
        bg_bitmap_clear(bitmap);
        asked = 0;
        drain_at = at < 3 ? at : 0;
        refuse_at = 0;
        CHECK(bg_map_zero(map, 0, 3 * UNIT, BG_MAP_PUNCH) == (at < 3 ? BG_MAP_MISS : 0));
        for (int i = 0; i < 3; i++) {
            CHECK(bg_pread(fd, back, UNIT, i * 2 * UNIT) == UNIT);
            CHECK(back[0] == (at < 3 ? (char)0xcd : 0) && back[UNIT - 1] == back[0]);
        }
        CHECK(bg_bitmap_count(bitmap) == (at < 3 ? 0 : 3 * UNIT));
    }
}

/* In steps, with a descriptor for which everything may have to wait: nothing of the first is done; what has begun goes on. */
static void begun_goes_on(void)
{
    char name[64], buf[2 * UNIT], back[UNIT];
    snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
    int slow = open(name, O_RDWR | O_DSYNC | O_CLOEXEC);
    CHECK(slow >= 0);
    int waits = bg_map_add_slot(map, slow, 1, 1);
    CHECK(ftruncate(fd, 0) == 0 && ftruncate(fd, 2 * SIZE) == 0);
    memset(buf, 0x17, sizeof(buf));
    bg_map_piece pieces[2];
    bg_map_request request;
    bg_map_extent e[2] = {{0, UNIT, UNIT, slot, BG_MAP_WRITABLE}, {UNIT, UNIT, 3 * UNIT, waits, BG_MAP_WRITABLE}};
    CHECK(bg_map_insert(map, bg_map_generation(map), e, 2) == 2);
    CHECK(bg_map_pwrite_now(map, UNIT, buf, UNIT) == -EAGAIN && bg_map_pwrite_now(map, 0, buf, 2 * UNIT) == 0);
    CHECK(bg_pread(fd, back, UNIT, 3 * UNIT) == UNIT && memcmp(back, buf, UNIT) == 0);
    CHECK(bg_map_begin(map, UNIT, UNIT, 1, pieces, 2, &request) == 0);
    memset(buf, 0x18, sizeof(buf));
    CHECK(bg_map_move_part_now(map, &request, buf, NULL, 0, 512) == -EAGAIN);
    CHECK(bg_map_move_part_now(map, &request, buf, NULL, 512, UNIT) == 0);
    bg_map_end(map, &request, 1);
    CHECK(bg_pread(fd, back, UNIT, 3 * UNIT) == UNIT && back[511] == 0x17 && back[512] == 0x18 && back[UNIT - 1] == 0x18);
    bg_map_wait(map, bg_map_remove_slot(map, waits));
    close(slow);
}

void test_first_writes(void)
{
    fd = memfd_create("first writes", MFD_CLOEXEC);
    CHECK(bg_map_new(SIZE, BG_MAP_MIN_MEMORY, &map) == 0 && bg_bitmap_new(SIZE, UNIT, &bitmap) == 0);
    slot = bg_map_add_slot(map, fd, 1, 1);
    CHECK(bg_map_set_bitmaps(map, &bitmap, 1) > 0 && bg_map_set_copier(map, &copier) > 0 &&
          bg_map_set_allocator(map, &allocator) > 0);
    whole_or_nothing();
    extents_within_a_unit();
    zeroes();
    begun_goes_on();
    CHECK(bg_map_free(map) == 0);
    bg_bitmap_free(bitmap);
    close(fd);
}
