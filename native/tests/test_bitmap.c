/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#include "bitmap.h"
#include "driver.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>

#define GRANULE 512
#define MOST_BITS 20000

/* A byte per granule. */
static unsigned char model[MOST_BITS];
static bg_bitmap_extent extents[BG_BITMAP_EXTENTS_MIN];

static void compare_runs(bg_bitmap *b, int64_t bits, size_t decoder, int64_t set)
{
    int64_t at = 0, size = bits * GRANULE;
    while (at < size) {
        int64_t next;
        int64_t n = bg_bitmap_extents_by(decoder, b, at, size, extents, BG_BITMAP_EXTENTS_MIN, &next);
        CHECK(n >= 0 && next > at);
        for (int64_t i = 0; i < n; i++) {
            CHECK(extents[i].end > extents[i].start);
            set -= (extents[i].end - extents[i].start) / GRANULE;
            for (int64_t bit = extents[i].start / GRANULE; bit < extents[i].end / GRANULE; bit++)
                CHECK(model[bit]);
        }
        at = next;
    }
    CHECK(set == 0);
}

static void compare(bg_bitmap *b, int64_t bits)
{
    int64_t set = 0;
    for (int64_t i = 0; i < bits; i++)
        set += model[i];
    CHECK(bg_bitmap_count(b) == set * GRANULE);
    for (size_t decoder = 0; bg_bitmap_decoder(decoder); decoder++)
        compare_runs(b, bits, decoder, set);
}

static void random_steps(int64_t bits, uint64_t seed)
{
    bg_bitmap *b, *other;
    CHECK(bg_bitmap_new(bits * GRANULE, GRANULE, &b) == 0);
    memset(model, 0, sizeof(model));
    for (int step = 0; step < 300; step++) {
        int64_t from = (int64_t)(next_random(&seed) % (uint64_t)bits), left = bits - from;
        int64_t count = 1 + (int64_t)(next_random(&seed) % (uint64_t)(step % 5 ? (left < 70 ? left : 70) : left));
        int64_t offset = from * GRANULE, length = count * GRANULE;
        bg_bitmap_extent run;
        unsigned char bytes[MOST_BITS / 8 + 1];
        switch (next_random(&seed) % 9) {
        case 0:
        case 1:
        case 2:
            CHECK(bg_bitmap_set(b, offset + 1, length - 1) == 0);
            memset(model + from, 1, (size_t)count);
            break;
        case 3:
            CHECK(bg_bitmap_reset(b, offset, length) == 0);
            memset(model + from, 0, (size_t)count);
            break;
        case 4:
            if (bg_bitmap_take(b, offset, BG_BITMAP_NO_LIMIT, length, &run))
                for (int64_t bit = run.start / GRANULE; bit < run.end / GRANULE; bit++) {
                    CHECK(model[bit]);
                    model[bit] = 0;
                }
            break;
        case 5:
            from -= from % 8;
            offset = from * GRANULE;
            length = bits * GRANULE - offset;
            count = bg_bitmap_serialised(b, offset, length);
            CHECK(count == (bits - from + 7) / 8);
            CHECK(bg_bitmap_serialise(b, offset, length, bytes, (size_t)count) == 0);
            CHECK(bg_bitmap_serialise(b, offset, length, bytes, (size_t)count + 1) == -EINVAL);
            for (int64_t i = 0; i < count; i++)
                bytes[i] ^= 0x81;
            CHECK(bg_bitmap_deserialise(b, offset, length, bytes, (size_t)count) == 0);
            for (int64_t bit = from; bit < bits; bit++)
                model[bit] ^= (bit - from) % 8 == 0 || (bit - from) % 8 == 7;
            break;
        case 6:
            CHECK(bg_bitmap_copy(b, &other) == 0);
            CHECK(bg_bitmap_truncate(b, (bits + 9000) * GRANULE) == 0);
            CHECK(bg_bitmap_truncate(b, bits * GRANULE) == 0);
            CHECK(bg_bitmap_merge(b, other) == 0);
            bg_bitmap_free(other);
            break;
        case 7:
            CHECK(bg_bitmap_new(bits * GRANULE, GRANULE, &other) == 0);
            CHECK(bg_bitmap_set(other, offset, length) == 0);
            CHECK(bg_bitmap_subtract(b, other) == 0);
            memset(model + from, 0, (size_t)count);
            bg_bitmap_free(other);
            break;
        default:
            CHECK(bg_bitmap_new(bits * GRANULE, 4 * GRANULE, &other) == 0);
            CHECK(bg_bitmap_subtract(b, other) == -EINVAL);
            CHECK(bg_bitmap_set(other, offset, 1) == 0);
            CHECK(bg_bitmap_merge(b, other) == 0);
            for (int64_t bit = from - from % 4; bit < from - from % 4 + 4 && bit < bits; bit++)
                model[bit] = 1;
            bg_bitmap_free(other);
        }
        if (step % 20 == 0)
            compare(b, bits);
    }
    compare(b, bits);
    bg_bitmap_fill(b);
    CHECK(bg_bitmap_count(b) == bits * GRANULE);
    bg_bitmap_clear(b);
    CHECK(bg_bitmap_count(b) == 0);
    bg_bitmap_free(b);
}

/* Bits of one granularity into bits of another, by each way to do so. */
static void merges(int64_t bits, unsigned from_shift, unsigned into_shift, uint64_t seed)
{
    int64_t granule = (int64_t)1 << from_shift, into_granule = (int64_t)1 << into_shift, size = bits * granule - 5;
    for (size_t merger = 0; bg_bitmap_merger(merger); merger++) {
        bg_bitmap *from, *into;
        CHECK(bg_bitmap_new(size, granule, &from) == 0 && bg_bitmap_new(size, into_granule, &into) == 0);
        int64_t most = (size + into_granule - 1) / into_granule;
        CHECK(most <= MOST_BITS);
        memset(model, 0, sizeof(model));
        for (int64_t bit = 0; bit < bits; bit++) {
            if (next_random(&seed) % 7)
                continue;
            CHECK(bg_bitmap_set(from, bit * granule, 1) == 0);
            for (int64_t at = bit * granule / into_granule; at < most && at * into_granule < (bit + 1) * granule; at++)
                model[at] = 1;
        }
        CHECK(bg_bitmap_set(into, 0, 1) == 0);
        model[0] = 1;
        CHECK(bg_bitmap_merge_by(merger, into, from) == 0);
        for (int64_t at = 0; at < most; at++)
            CHECK(bg_bitmap_get(into, at * into_granule) == model[at]);
        bg_bitmap_free(from);
        bg_bitmap_free(into);
    }
}

#define SHARED_BITS 4096

static void *set_and_take(void *arg)
{
    bg_bitmap *b = arg;
    bg_bitmap_extent run;
    int64_t taken = 0;
    for (int64_t i = 0; i < SHARED_BITS; i++) {
        CHECK(bg_bitmap_set(b, i * GRANULE, GRANULE) == 0);
        if (i % 3 == 0 && bg_bitmap_take(b, 0, BG_BITMAP_NO_LIMIT, 4 * GRANULE, &run))
            taken += run.end - run.start;
        bg_bitmap_count(b);
    }
    return (void *)(intptr_t)taken;
}

static void threads_share_one(void)
{
    bg_bitmap *b;
    pthread_t threads[4];
    CHECK(bg_bitmap_new(SHARED_BITS * GRANULE, GRANULE, &b) == 0);
    for (int i = 0; i < 4; i++)
        CHECK(pthread_create(&threads[i], NULL, set_and_take, b) == 0);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    bg_bitmap_extent run;
    int64_t left = bg_bitmap_count(b);
    while (bg_bitmap_take(b, 0, BG_BITMAP_NO_LIMIT, BG_BITMAP_NO_LIMIT, &run) == 1)
        left -= run.end - run.start;
    CHECK(left == 0);
    bg_bitmap_free(b);
}

#define WINDOW ((int64_t)1 << 24) /* bits that a huge page holds */

/* Memory that a full one has left is clean, and nobody else's. */
static void *dense_ones(void *unused)
{
    (void)unused;
    for (int round = 0; round < 20; round++) {
        bg_bitmap *b[3];
        for (int i = 0; i < 3; i++) {
            int64_t bits = WINDOW * (1 + (i + round) % 2) + round % 3;
            bg_bitmap_extent run;
            CHECK(bg_bitmap_new_dense(bits * GRANULE, GRANULE, &b[i]) == 0);
            CHECK(bg_bitmap_count(b[i]) == 0);
            CHECK(bg_bitmap_next_dirty(b[i], 0, bits * GRANULE, BG_BITMAP_NO_LIMIT, &run) == 0);
            CHECK(bg_bitmap_fill(b[i]) == 0 && bg_bitmap_count(b[i]) == bits * GRANULE);
        }
        for (int i = 0; i < 3; i++)
            bg_bitmap_free(b[i]);
    }
    return NULL;
}

static void dense_ones_leave_clean_memory(void)
{
    pthread_t threads[2];
    for (int i = 0; i < 2; i++)
        CHECK(pthread_create(&threads[i], NULL, dense_ones, NULL) == 0);
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
}

void test_bitmap(void)
{
    static const int64_t sizes[] = {1, 63, 64, 65, 4095, 4096, 4097, 10000};
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
        random_steps(sizes[i], 88172645463325252u + i);
    bg_bitmap *b;
    CHECK(bg_bitmap_new(-1, GRANULE, &b) == -EINVAL);
    CHECK(bg_bitmap_new(INT64_MAX, GRANULE, &b) == -EFBIG);
    CHECK(bg_bitmap_new(0, GRANULE, &b) == 0);
    CHECK(bg_bitmap_set(b, 0, 0) == 0 && bg_bitmap_set(b, 0, 1) == -EINVAL);
    CHECK(bg_bitmap_set(b, INT64_MAX, INT64_MAX) == -EINVAL);
    bg_bitmap_free(b);
    for (unsigned shift = 9; shift < 24; shift++) {
        merges(20000, 12, shift < 12 ? 12 : shift, 1 + shift);
        merges(20000 >> (shift - 9), shift, 9, 1 + shift);
    }
    threads_share_one();
    dense_ones_leave_clean_memory();
}
