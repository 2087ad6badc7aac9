/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#include "driver.h"
#include "sums.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>

#define SIZE ((int64_t)(300 << 12) + 100)
#define CHUNK 8192
#define CHUNKS (SIZE / CHUNK + 1)

static uint8_t data[SIZE];
static bg_sums *shared;

/* Every other block, the odd ones or the even ones. */
static void *add_half(void *arg)
{
    for (int64_t at = arg ? 4096 : 0; at < SIZE; at += 8192)
        CHECK(bg_sums_add(shared, at, data + at, SIZE - at < 4096 ? SIZE - at : 4096) == 0);
    CHECK(bg_sums_spoil(shared, SIZE - 1, 1) == 0);
    return NULL;
}

void test_sums(void)
{
    static uint64_t expected[2 * CHUNKS], found[2 * CHUNKS];
    uint64_t seed = 5, hash[3][2];
    for (int64_t i = 0; i < SIZE; i++)
        data[i] = (uint8_t)next_random(&seed);
    memset(data + 4096, 0, 4096);
    int count = 0;
    while (count < 3 && bg_sums_hash_block(count, data + 1, seed, hash[count]) == 0)
        count++;
    for (int i = 1; i < count; i++)
        CHECK(memcmp(hash[0], hash[i], sizeof(hash[0])) == 0);
    bg_sums *sums;
    bg_bitmap_extent run;
    CHECK(bg_sums_new(SIZE, 100, &sums) == -EINVAL && bg_sums_new((int64_t)1 << 50, 4096, &sums) == -EFBIG);
    CHECK(bg_sums_new(SIZE, CHUNK, &sums) == 0 && bg_sums_new(SIZE, CHUNK, &shared) == 0);
    CHECK(bg_sums_next(sums, 0) == -1);
    CHECK(bg_sums_add(sums, 0, data, SIZE) == 0 && bg_sums_read(sums, 0, CHUNKS, expected) == 0);
    pthread_t other;
    CHECK(pthread_create(&other, NULL, add_half, shared) == 0);
    add_half(NULL);
    CHECK(pthread_join(other, NULL) == 0);
    CHECK(bg_sums_read(shared, 0, CHUNKS, found) == 0 && memcmp(expected, found, sizeof(found)) == 0);
    CHECK(bg_sums_next_spoiled(shared, 0, &run) == 1 && run.end == SIZE && run.start == SIZE - SIZE % CHUNK);
    CHECK(bg_sums_reset(shared, 0, SIZE) == 0 && bg_sums_next_spoiled(shared, 0, &run) == 0);
    for (int i = 0; i < 2000; i++) {
        int64_t at = (int64_t)(next_random(&seed) % SIZE), length = (int64_t)(next_random(&seed) % (uint64_t)(SIZE - at));
        CHECK(bg_sums_add(shared, at, data + at, length) == 0);
    }
    CHECK(bg_sums_add(shared, SIZE, data, 1) == -EINVAL && bg_sums_read(shared, CHUNKS, 1, found) == -EINVAL);
    bg_sums_free(shared);
    bg_sums_free(sums);
    bg_sums_free(NULL);
}
