/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "copy.h"
#include "driver.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define SIZE (6 << 20)

static char data[SIZE], copied[SIZE];
static bg_copy_progress progress;

static void *watch(void *arg)
{
    (void)arg;
    int64_t last = 0, now;
    while (last < SIZE) {
        now = bg_copy_bytes(&progress);
        CHECK(now >= last && bg_copy_zeroes(&progress) <= SIZE);
        last = now;
    }
    bg_copy_cancel(&progress);
    return NULL;
}

void test_copy(void)
{
    static const uint32_t flags[] = {0, BG_COPY_RANGE, BG_COPY_CLONE, BG_COPY_DETECT_ZEROES, BG_COPY_DETECT_ZEROES | BG_COPY_PUNCH_HOLES};
    uint64_t seed = 1;
    for (int at = 0; at < SIZE; at += 4096)
        if (next_random(&seed) % 2)
            memset(data + at, (int)(at >> 12 | 1), 4096);
    int source = memfd_create("source", MFD_CLOEXEC), target = memfd_create("target", MFD_CLOEXEC);
    CHECK(write(source, data, SIZE) == SIZE);
    bg_pool *pool;
    bg_queue *queue;
    bg_copy *job;
    bg_copy_failure failure;
    CHECK(bg_pool_new(3, 3, &pool) == 0 && bg_queue_new(pool, &queue) == 0);
    for (size_t i = 0; i < sizeof(flags) / sizeof(flags[0]); i++) {
        memset(copied, 0xee, SIZE);
        CHECK(pwrite(target, copied, SIZE, 0) == SIZE);
        progress = (bg_copy_progress){0};
        bg_copy_extent half[] = {{source, 0, target, 0, SIZE / 2 + 512, flags[i], 0},
                                 {source, SIZE / 2 + 512, target, SIZE / 2 + 512, SIZE / 2 - 512, flags[i], 0}};
        pthread_t watcher;
        CHECK(pthread_create(&watcher, NULL, watch, NULL) == 0);
        CHECK(bg_copy_new(half, 2, 3, &progress, &job) == 0);
        if (i % 2) {
            CHECK(bg_copy_run(job, pool) == 0);
        } else {
            bg_completion done;
            struct pollfd wait = {bg_queue_eventfd(queue), POLLIN, 0};
            CHECK(bg_copy_start(job, queue, 7) == 0 && poll(&wait, 1, -1) == 1);
            CHECK(bg_queue_reap(queue, &done, 1) == 1 && done.ticket == 7 && done.result == 0);
        }
        CHECK(bg_copy_extent_bytes(job, 0) == SIZE / 2 + 512 && bg_copy_extent_bytes(job, 2) == -EINVAL);
        pthread_join(watcher, NULL);
        bg_copy_free(job);
        CHECK(pread(target, copied, SIZE, 0) == SIZE && !memcmp(data, copied, SIZE));
    }
    bg_copy_extent bad = {source, 0, 100000, 0, SIZE, 0, 0};
    progress = (bg_copy_progress){0};
    CHECK(bg_copy_new(&bad, 1, 2, &progress, &job) == 0);
    CHECK(bg_copy_run(job, pool) == -EBADF);
    bg_copy_failed(job, &failure);
    CHECK(failure.error == EBADF && failure.side == BG_COPY_WRITE && failure.extent == 0);
    bg_copy_free(job);
    bg_copy_cancel(&progress);
    CHECK(bg_copy_new(&bad, 1, 2, &progress, &job) == 0);
    CHECK(bg_copy_run(job, pool) == -ECANCELED);
    bg_copy_free(job);
    bad.length = -1;
    CHECK(bg_copy_new(&bad, 1, 2, &progress, &job) == -EINVAL);
    bg_queue_free(queue);
    bg_pool_free(pool);
    close(source);
    close(target);
}
