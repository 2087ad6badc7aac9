/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "driver.h"
#include "l2_places.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#define ENTRIES 301
#define L1_ENTRIES 7
#define FEW_RUNS 5
#define SMALL_BITS 9 /* 64 entries in a table */
#define HOST_END (40 << SMALL_BITS)

static void parts_cover_the_runs_and_skip_bad_tables(void)
{
    uint64_t seed = 3, l1[L1_ENTRIES];
    bg_l2_part parts[64];
    int64_t runs[2 * FEW_RUNS], bytes, checked = 0;
    for (int round = 0; round < 2000; round++) {
        int64_t hosts[L1_ENTRIES + 2] = {0}; /* -1: refused */
        for (int i = 0; i < L1_ENTRIES; i++) {
            const uint64_t cluster = 1 << SMALL_BITS, good = (1 + next_random(&seed) % 39) * cluster;
            const uint64_t kinds[] = {0, good, good | (uint64_t)1 << 63, good | 1, good + HOST_END, (uint64_t)1 << 60};
            uint64_t kind = next_random(&seed) % 6;
            l1[i] = htobe64(kinds[kind]);
            hosts[i] = kind == 0 ? 0 : kind < 3 ? (int64_t)good : -1;
        }
        for (int i = 0; i < FEW_RUNS; i++) {
            runs[2 * i] = (int64_t)(next_random(&seed) % ((L1_ENTRIES + 1) << 15));
            runs[2 * i + 1] = runs[2 * i] + 1 + (int64_t)(next_random(&seed) % 70000);
        }
        int64_t max = round % 3 ? 64 : (int64_t)(next_random(&seed) % 9);
        int64_t n = bg_l2_find_parts(l1, L1_ENTRIES, SMALL_BITS, HOST_END, runs, FEW_RUNS, parts, max, &bytes), at = 0, used = 0;
        CHECK(n >= 0 && n <= max);
        for (int run = 0; run < FEW_RUNS && at < max; run++)
            for (int64_t c = runs[2 * run] >> SMALL_BITS; c <= (runs[2 * run + 1] - 1) >> SMALL_BITS && at < max;) {
                int64_t index = c >> 6, last = (runs[2 * run + 1] - 1) >> SMALL_BITS, stop = (index + 1) << 6;
                int64_t count = (last + 1 < stop ? last + 1 : stop) - c, host = index < L1_ENTRIES ? hosts[index] : 0;
                if (host >= 0) {
                    const bg_l2_part *p = &parts[at++];
                    CHECK(p->first == c << SMALL_BITS && p->count == count);
                    CHECK(host ? p->host == host + 8 * (c & 63) && p->position == used : p->host == -1 && p->position == -1);
                    used += host ? 8 * count : 0;
                    checked++;
                }
                c += count;
            }
        CHECK(at == n && used == bytes);
    }
    CHECK(checked > 10000);
    CHECK(bg_l2_find_parts(l1, L1_ENTRIES, 8, HOST_END, runs, 1, parts, 64, &bytes) == -EINVAL);
    CHECK(bg_l2_find_parts(l1, L1_ENTRIES, 9, HOST_END, (int64_t[]){5, 5}, 1, parts, 64, &bytes) == -EINVAL);
    CHECK(bg_l2_find_parts(l1, L1_ENTRIES, 9, HOST_END, (int64_t[]){-1, 5}, 1, parts, 64, &bytes) == -EINVAL);
}

static void parts_are_read_past_the_end_as_zeroes(void)
{
    int fd = memfd_create("tables", MFD_CLOEXEC);
    uint64_t entries[6] = {1, 1, 1, 1, 1, 1};
    CHECK(fd >= 0 && pwrite(fd, (uint64_t[]){7, 8, 9}, 24, 0) == 24);
    bg_l2_part parts[] = {{0, 0, 2, 8}, {0, -1, 5, -1}, {0, 16, 2, 16}, {0, 32, 1, -1}};
    for (int now = 0; now < 2; now++) {
        CHECK(bg_l2_read_parts(fd, parts, 4, entries, 48, now) == 0); /* memory: at once */
        CHECK(entries[0] == 8 && entries[1] == 9 && entries[2] == 9 && entries[3] == 0 && entries[4] == 1);
    }
    parts[2].position = 40;
    CHECK(bg_l2_read_parts(fd, parts, 4, entries, 48, 0) == -EINVAL);
    close(fd);
    CHECK(bg_l2_read_parts(fd, parts, 1, entries, 48, 0) == -EBADF);
    CHECK(bg_l2_read_parts(fd, parts, 1, entries, 48, 1) == -EAGAIN);
}

void test_qcow2_l2(void)
{
    uint64_t seed = 5, *table = malloc(ENTRIES * 8);
    bg_l2_run runs[7];
    CHECK(table);
    for (int round = 0; round < 2000; round++) {
        for (int i = 0; i < ENTRIES; i++)
            table[i] = next_random(&seed) % 3 ? 0 : next_random(&seed) >> (round % 64);
        int bits = 9 + round % 13;
        int64_t at = 0, n;
        while (at < ENTRIES) {
            n = bg_l2_decode(table, at, ENTRIES, bits, 2 + round % 2, round % 3 == 0, runs, 7);
            CHECK(n > 0);
            for (int64_t i = 0; i < n; i++) {
                CHECK(runs[i].index == at && runs[i].count > 0);
                at += runs[i].count;
            }
        }
        CHECK(at == ENTRIES);
        for (at = 0; (n = bg_next_nonzero_u64(table, at, ENTRIES)) < ENTRIES; at = n + 1)
            CHECK(table[n]);
        int64_t length, index = bg_refcount16_free_run(table, round % 9, ENTRIES * 4, 1 + round % 5, &length);
        CHECK(index >= round % 9 && index + length <= ENTRIES * 4 && length <= 1 + round % 5);
    }
    CHECK(bg_l2_decode(table, 2, 1, 16, 3, 0, runs, 7) == -EINVAL);
    CHECK(bg_l2_decode(table, 0, 1, 16, 3, 0, runs, 0) == -EINVAL);
    CHECK(bg_next_nonzero_u64(table, 5, 4) == -EINVAL);
    free(table);
    parts_cover_the_runs_and_skip_bad_tables();
    parts_are_read_past_the_end_as_zeroes();
}
