/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#include "driver.h"
#include "qcow2_l2.h"

#include <errno.h>

#define ENTRIES 301

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
}
