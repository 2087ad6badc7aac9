/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "driver.h"
#include "queue.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define OPERATIONS 400
#define SUBMITTERS 3
#define BLOCK 700

static bg_queue *queue;
static int fd;
static char written[SUBMITTERS * OPERATIONS][BLOCK];

static void *submit(void *arg)
{
    int64_t first = (intptr_t)arg * OPERATIONS;
    for (int64_t i = first; i < first + OPERATIONS; i++) {
        memset(written[i], (int)i, BLOCK);
        CHECK(bg_queue_submit(queue, i, BG_OP_PWRITE, fd, written[i], BLOCK, i * BLOCK, 0) == 0);
    }
    return NULL;
}

static void reap(int64_t count, int64_t result)
{
    bg_completion done[64];
    while (count) {
        struct pollfd wait = {bg_queue_eventfd(queue), POLLIN, 0};
        CHECK(poll(&wait, 1, -1) == 1);
        int64_t n = bg_queue_reap(queue, done, 64);
        for (int64_t i = 0; i < n; i++)
            CHECK(done[i].result == result);
        count -= n;
    }
}

static atomic_bool has_begun, may_end;

static void *complete(void *entry)
{
    atomic_store(&has_begun, true);
    while (!atomic_load(&may_end))
        sched_yield();
    bg_queue_complete(entry, 0);
    return NULL;
}

static void *let_end(void *arg)
{
    usleep(20000); /* for bg_queue_free to be waiting; it is right either way */
    atomic_store(&may_end, true);
    return arg;
}

static void check_free_waits(bg_pool *pool)
{
    pthread_t completer, other;
    CHECK(bg_queue_new(pool, &queue) == 0);
    CHECK(bg_queue_submit(queue, 1, BG_OP_FDATASYNC, fd, NULL, 0, 0, 0) == 0); /* never reaped */
    CHECK(pthread_create(&completer, NULL, complete, bg_queue_reserve(queue, 2)) == 0);
    while (!atomic_load(&has_begun))
        sched_yield();
    CHECK(pthread_create(&other, NULL, let_end, NULL) == 0);
    bg_queue_free(queue);
    CHECK(atomic_load(&may_end));
    pthread_join(completer, NULL);
    pthread_join(other, NULL);
}

void test_queue(void)
{
    bg_pool *pool;
    pthread_t threads[SUBMITTERS];
    CHECK(bg_pool_new(0, 1, &pool) == -EINVAL);
    CHECK(bg_pool_new(3, 5, &pool) == 0);
    CHECK(bg_queue_new(pool, &queue) == 0);
    fd = memfd_create("driver", MFD_CLOEXEC);
    for (intptr_t i = 0; i < SUBMITTERS; i++)
        CHECK(pthread_create(&threads[i], NULL, submit, (void *)i) == 0);
    reap(SUBMITTERS * OPERATIONS, BLOCK);
    for (int i = 0; i < SUBMITTERS; i++)
        pthread_join(threads[i], NULL);
    for (int64_t i = 0; i < SUBMITTERS * OPERATIONS; i++) {
        char buf[BLOCK];
        CHECK(pread(fd, buf, BLOCK, i * BLOCK) == BLOCK && !memcmp(buf, written[i], BLOCK));
    }
    CHECK(bg_queue_submit(queue, 0, 99, fd, NULL, 0, 0, 0) == -EINVAL);
    CHECK(bg_queue_submit(queue, 1, BG_OP_FDATASYNC, fd, NULL, 0, 0, 0) == 0);
    reap(1, 0);
    CHECK(bg_queue_submit(queue, 2, BG_OP_PREAD, -1, written, 10, 0, 0) == 0);
    reap(1, -EBADF);
    CHECK(bg_queue_submit(queue, 3, BG_OP_ZERO, fd, NULL, 5000, 100, 0) == 0);
    reap(1, 0);
    bg_queue_free(queue);
    check_free_waits(pool);
    bg_pool_free(pool);
    close(fd);
}
