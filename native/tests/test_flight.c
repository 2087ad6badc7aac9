/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* Requests at a device: they are done while their thread goes on, all of each or, where something is in the way, on the pool. */
#define _GNU_SOURCE
#include "driver.h"
#include "request.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/statfs.h>
#include <unistd.h>

#define BLOCK 4096
#define BLOCKS 64
#define SIZE (BLOCKS * BLOCK)

static bg_map *map;
static bg_faults *faults;
static bg_aio *aio;
static bg_source source;
static atomic_int done_count;
static char memory[SIZE] __attribute__((aligned(BLOCK))), content[SIZE];

static void done(bg_request *request)
{
    (void)request;
    atomic_fetch_add(&done_count, 1);
}

static bg_request request(int kind, int64_t offset, int64_t length)
{
    return (bg_request){.source = &source, .kind = (uint8_t)kind, .offset = (uint64_t)offset, .length = (uint32_t)length,
                        .buf = memory + offset};
}

/* Until so many requests are done; the rest of those that went wrong are faults. */
static void wait_for(int count)
{
    while (atomic_load(&done_count) < count) {
        struct pollfd ready = {.fd = bg_aio_eventfd(aio), .events = POLLIN};
        poll(&ready, 1, 1);
        bg_aio_reap(aio);
    }
    CHECK(atomic_load(&done_count) == count);
    atomic_store(&done_count, 0);
}

static void many(void)
{
    bg_request requests[BLOCKS];
    for (int write = 1; write >= 0; write--) {
        for (int i = 0; i < SIZE && write; i++)
            memory[i] = content[i] = (char)(i / 7 + 1);
        if (!write)
            memset(memory, 0, SIZE);
        for (int i = 0; i < BLOCKS; i++) {
            requests[i] = request(write ? BG_REQUEST_WRITE : BG_REQUEST_READ, (int64_t)i * BLOCK, BLOCK);
            CHECK(bg_request_try(&requests[i], UINT32_MAX) == BG_REQUEST_BEGUN);
        }
        /* They are the map's requests all the while. */
        int64_t ticket = bg_map_protect(map, 0, 0);
        CHECK(!bg_map_settled(map, ticket));
        bg_aio_submit(aio);
        wait_for(BLOCKS);
        CHECK(bg_map_settled(map, ticket));
        CHECK(!memcmp(memory, content, SIZE));
    }
}

/* Two pieces, in the other order: the request is one. */
static void in_pieces(int slot, int fd)
{
    bg_map_extent e[2] = {{0, BLOCK, BLOCK, slot, BG_MAP_WRITABLE}, {BLOCK, BLOCK, 0, slot, BG_MAP_WRITABLE}};
    CHECK(bg_map_insert(map, bg_map_generation(map), e, 2) == 2);
    bg_request r = request(BG_REQUEST_WRITE, 0, 2 * BLOCK);
    memset(memory, 'a', BLOCK);
    memset(memory + BLOCK, 'b', BLOCK);
    CHECK(bg_request_try(&r, UINT32_MAX) == BG_REQUEST_BEGUN);
    bg_aio_submit(aio);
    wait_for(1);
    CHECK(pread(fd, memory, 2 * BLOCK, 0) == 2 * BLOCK && memory[0] == 'b' && memory[BLOCK] == 'a');
}

/* What can not be begun at once, or is moved in part only, is done by the pool: a hole to be filled, the file's end. */
static void by_the_pool(int slot, int fd)
{
    bg_map_extent e = {0, SIZE, SIZE, slot, BG_MAP_WRITABLE};
    CHECK(ftruncate(fd, SIZE) == 0 && ftruncate(fd, SIZE + SIZE / 2) == 0);
    CHECK(bg_map_insert(map, bg_map_generation(map), &e, 1) == 1);
    bg_request hole = request(BG_REQUEST_WRITE, 0, BLOCK), end = request(BG_REQUEST_READ, SIZE / 2 - BLOCK, 2 * BLOCK);
    memset(memory, 'h', BLOCK);
    memset(memory + SIZE / 2 - BLOCK, 'x', 2 * BLOCK);
    CHECK(bg_request_try(&hole, UINT32_MAX) == BG_REQUEST_BEGUN && bg_request_try(&end, UINT32_MAX) == BG_REQUEST_BEGUN);
    bg_aio_submit(aio);
    wait_for(2);
    CHECK(pread(fd, memory, BLOCK, SIZE) == BLOCK && memory[0] == 'h' && memory[BLOCK - 1] == 'h');
    for (int i = 0; i < 2 * BLOCK; i++)
        CHECK(memory[SIZE / 2 - BLOCK + i] == 0);
}

/* An error is for Python, and the map's request is over. */
static void failing(int slot)
{
    bg_map_extent e = {0, SIZE, 0, slot, BG_MAP_WRITABLE};
    CHECK(bg_map_insert(map, bg_map_generation(map), &e, 1) == 1);
    bg_request r = request(BG_REQUEST_WRITE, 0, BLOCK);
    CHECK(bg_request_try(&r, UINT32_MAX) == BG_REQUEST_BEGUN);
    bg_aio_drain(aio);
    struct pollfd ready = {.fd = bg_faults_eventfd(faults), .events = POLLIN};
    CHECK(poll(&ready, 1, 10000) == 1);
    bg_fault fault;
    CHECK(bg_faults_take(faults, &fault, 1) == 1 && fault.ticket == (uintptr_t)&r && atomic_load(&done_count) == 0);
    CHECK(bg_map_settled(map, bg_map_protect(map, 0, 0)));
}

/* What is not for a device alone. */
static void unsuitable(int slot, int buffered)
{
    bg_map_extent e[3] = {{0, BLOCK, 0, slot, BG_MAP_WRITABLE}, {BLOCK, BLOCK, 0, buffered, BG_MAP_WRITABLE}, {2 * BLOCK, BLOCK, 0, 0, BG_MAP_ZERO}};
    CHECK(bg_map_insert(map, bg_map_generation(map), e, 3) == 3);
    bg_request both = request(BG_REQUEST_READ, 0, 2 * BLOCK), zeroes = request(BG_REQUEST_READ, 2 * BLOCK, BLOCK),
               shifted = request(BG_REQUEST_READ, 0, BLOCK), durable = request(BG_REQUEST_WRITE, 0, BLOCK),
               passing = request(BG_REQUEST_WRITE, 0, BLOCK);
    shifted.buf = memory + 8 * BLOCK + 1;
    durable.durable = true;
    passing.passing = true;
    CHECK(bg_request_try(&both, UINT32_MAX) == BG_REQUEST_BLOCKS && bg_request_try(&zeroes, UINT32_MAX) == BG_REQUEST_DONE);
    CHECK(bg_request_try(&shifted, UINT32_MAX) == BG_REQUEST_BLOCKS && shifted.lane == BG_LANE_WAITS);
    CHECK(bg_request_try(&durable, UINT32_MAX) != BG_REQUEST_BEGUN && bg_request_try(&passing, UINT32_MAX) == BG_REQUEST_BLOCKS);
    bg_request_submit(&both);
    bg_request_submit(&shifted);
    wait_for(2);
}

void test_flight(void)
{
    char name[] = "flight-XXXXXX";
    int buffered = mkstemp(name), fd = buffered < 0 ? -1 : open(name, O_RDWR | O_DIRECT | O_CLOEXEC);
    int blind = open(name, O_RDONLY | O_DIRECT | O_CLOEXEC);
    unlink(name);
    CHECK(fd >= 0 && blind >= 0 && ftruncate(fd, SIZE) == 0);
    bg_pool *pool;
    CHECK(bg_pool_new(2, 4, &pool) == 0 && bg_faults_new(&faults) == 0 && bg_aio_new(BLOCKS, &aio) == 0);
    CHECK(bg_map_new(SIZE, BG_MAP_MIN_MEMORY, &map) == 0);
    source = (bg_source){.map = map, .pool = pool, .faults = faults, .aio = aio, .done = done};
    int slot = bg_map_add_slot(map, fd, 512, 512), read_only = bg_map_add_slot(map, blind, 512, 512),
        cached = bg_map_add_slot(map, buffered, 1, 1);
    bg_map_extent e = {0, SIZE, 0, slot, BG_MAP_WRITABLE};
    CHECK(bg_map_insert(map, bg_map_generation(map), &e, 1) == 1);
    /* The first writes fill holes, the second time they are in place. Where the file system has no such I/O the pool does all. */
    for (int i = 0; i < 2; i++)
        many();
    in_pieces(slot, fd);
    by_the_pool(slot, fd);
    unsuitable(slot, cached);
    failing(read_only);
    CHECK(bg_map_free(map) == 0);
    bg_aio_free(aio);
    bg_faults_free(faults);
    bg_pool_free(pool);
    close(blind);
    close(fd);
    close(buffered);
}
