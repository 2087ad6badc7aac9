/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * request.h without NBD, as a front end in this process or one with queues in shared memory would use it: each thread is a
 * queue that fills its slots, waits for all of them, and compares what it has read with what it has written.
 */
#define _GNU_SOURCE
#include "driver.h"
#include "request.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define QUEUES 4
#define DEPTH 16
#define BLOCK 5000
#define SIZE (QUEUES * DEPTH * BLOCK)
#define ROUNDS 300

typedef struct {
    bg_request base; /* first: see done */
    sem_t *completed;
    char data[BLOCK];
} queued;

static bg_map *map;
static bg_pool *pool;
static bg_faults *faults;
static int fd, slot;
static atomic_int outcomes[BG_REQUEST_LOST + 1], ended;
static atomic_bool over;

static void done(bg_request *request)
{
    sem_post(((queued *)request)->completed);
}

/* Python's part: does what is left to it, and makes durable what it has written itself. */
static void *python(void *unused)
{
    (void)unused;
    struct pollfd wait = {bg_faults_eventfd(faults), POLLIN, 0};
    while (ended < QUEUES) {
        bg_fault taken[5];
        CHECK(poll(&wait, 1, -1) > 0);
        int64_t n = bg_faults_take(faults, taken, 5);
        for (int64_t i = 0; i < n; i++) {
            if (!taken[i].ticket) {
                CHECK(taken[i].error == -EPIPE && taken[i].source < QUEUES);
                ended++;
                continue;
            }
            queued *q = (queued *)(uintptr_t)taken[i].ticket;
            CHECK(q->base.tag == taken[i].tag && q->base.buf == taken[i].buf);
            int64_t dirt = bg_map_dirt(map);
            if (q->base.kind == BG_REQUEST_READ)
                CHECK(pread(fd, q->data, BLOCK, (off_t)q->base.offset) == BLOCK);
            if (q->base.kind == BG_REQUEST_ZERO)
                memset(q->data, 0, BLOCK);
            if (q->base.kind == BG_REQUEST_ZERO || q->base.kind == BG_REQUEST_WRITE) {
                CHECK(pwrite(fd, q->data, BLOCK, (off_t)q->base.offset) == BLOCK);
                bg_map_dirty(map);
            }
            if (q->base.kind == BG_REQUEST_FLUSH || q->base.durable) {
                CHECK(fdatasync(fd) == 0);
                bg_map_flushed(map, dirt);
            }
            done(&q->base);
        }
    }
    return NULL;
}

static void *unmap(void *unused)
{
    (void)unused;
    for (int64_t at = 0; !over; at = (at + SIZE / 7) % SIZE) {
        bg_map_extent all = {0, SIZE, 0, slot, BG_MAP_WRITABLE};
        CHECK(bg_map_insert(map, bg_map_generation(map), &all, 1) >= 0);
        bg_map_wait(map, at & 1 ? bg_map_invalidate(map, at, SIZE - at) : bg_map_protect(map, at, SIZE - at));
        CHECK(bg_map_set_zeroing(map, slot, (int)(at % 7) + 1, at & 64 ? 512 : 65536) == 0);
    }
    return NULL;
}

static void *queue(void *arg)
{
    int number = *(int *)arg;
    uint64_t random = (uint64_t)number + 1;
    static __thread char model[DEPTH][BLOCK];
    static __thread queued slots[DEPTH], end;
    sem_t completed;
    sem_init(&completed, 0, 0);
    bg_source source = {.map = map, .pool = pool, .faults = faults, .id = number, .done = done, .step = 1000};
    memset(model, 0, sizeof(model));
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < DEPTH; i++) {
            static const uint8_t kinds[] = {BG_REQUEST_READ, BG_REQUEST_WRITE, BG_REQUEST_WRITE, BG_REQUEST_CACHE,
                                            BG_REQUEST_ZERO, BG_REQUEST_FLUSH, BG_REQUEST_OTHER};
            queued *q = &slots[i];
            q->completed = &completed;
            q->base = (bg_request){.source = &source,
                                   .buf = q->data,
                                   .tag = (uint64_t)i,
                                   .offset = (uint64_t)(number * DEPTH + i) * BLOCK,
                                   .length = BLOCK,
                                   .kind = kinds[next_random(&random) % sizeof(kinds)],
                                   .zero = (uint8_t)(1 + next_random(&random) % 7),
                                   .durable = next_random(&random) % 5 == 0};
            if (q->base.kind == BG_REQUEST_WRITE)
                memset(q->data, (int)next_random(&random), BLOCK);
            if (q->base.kind == BG_REQUEST_WRITE)
                memcpy(model[i], q->data, BLOCK);
            if (q->base.kind == BG_REQUEST_ZERO)
                memset(model[i], 0, BLOCK);
            enum bg_request_outcome outcome = bg_request_try(&q->base, round & 1 ? UINT32_MAX : 0);
            outcomes[outcome]++;
            if (outcome == BG_REQUEST_DONE)
                done(&q->base);
            else if (outcome == BG_REQUEST_BLOCKS)
                bg_request_submit(&q->base);
            else
                bg_faults_post(faults, &q->base, true);
        }
        for (int i = 0; i < DEPTH; i++)
            CHECK(sem_wait(&completed) == 0);
        for (int i = 0; i < DEPTH; i++)
            if (slots[i].base.kind == BG_REQUEST_READ)
                CHECK(!memcmp(slots[i].data, model[i], BLOCK));
    }
    for (int i = 0; i < DEPTH; i++) {
        static __thread char stored[BLOCK];
        CHECK(pread(fd, stored, BLOCK, (off_t)(number * DEPTH + i) * BLOCK) == BLOCK && !memcmp(stored, model[i], BLOCK));
    }
    end.base = (bg_request){.source = &source, .kind = BG_REQUEST_ENDED, .error = -EPIPE};
    bg_faults_post(faults, &end.base, true);
    while (ended < QUEUES) /* `end` is lent */
        usleep(100);
    sem_destroy(&completed);
    return NULL;
}

void test_request(void)
{
    pthread_t python_thread, unmap_thread, threads[QUEUES];
    int numbers[QUEUES];
    CHECK(bg_pool_new(2, 4, &pool) == 0 && bg_faults_new(&faults) == 0);
    CHECK(bg_map_new(SIZE, BG_MAP_MIN_MEMORY, &map) == 0);
    fd = memfd_create("request", MFD_CLOEXEC);
    CHECK(ftruncate(fd, SIZE) == 0);
    slot = bg_map_add_slot(map, fd, 1, 1);
    ended = 0;
    over = false;
    CHECK(pthread_create(&python_thread, NULL, python, NULL) == 0);
    CHECK(pthread_create(&unmap_thread, NULL, unmap, NULL) == 0);
    for (int i = 0; i < QUEUES; i++) {
        numbers[i] = i;
        CHECK(pthread_create(&threads[i], NULL, queue, &numbers[i]) == 0);
    }
    for (int i = 0; i < QUEUES; i++)
        pthread_join(threads[i], NULL);
    pthread_join(python_thread, NULL);
    over = true;
    pthread_join(unmap_thread, NULL);
    CHECK(outcomes[BG_REQUEST_DONE] > 0 && outcomes[BG_REQUEST_BLOCKS] > 0 && outcomes[BG_REQUEST_FAULTS] > 0);
    bg_map_wait(map, bg_map_remove_slot(map, slot));
    CHECK(bg_map_free(map) == 0);
    bg_faults_free(faults);
    bg_pool_free(pool);
    close(fd);
}
