/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* Short writes for which much has to be copied first: who does which, and that all are done, whatever becomes of them. */
#define _GNU_SOURCE
#include "nbd_by_hand.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <unistd.h>

#define UNIT 65536
#define UNITS 64
#define SIZE (UNITS * UNIT)
#define LENGTH 512
#define MANY 9
#define REPLY 16

static bg_map *map;
static bg_nbd_loop *loop;
static bg_nbd_conn *conn;
static int sock, fd;
static pthread_t self;
static atomic_int by_self, by_others;
static bool must_wait;        /* what is to be done without waiting is refused */
static atomic_bool may_begin; /* others wait for this */
static bool fails;            /* others fail */

static int copy(bg_map_copier *hook, bg_map *asks, int64_t offset, int64_t length, int now)
{
    (void)length;
    if (now)
        atomic_store(&hook->lately, must_wait ? 0 : UNIT);
    if (now && must_wait)
        return -EAGAIN;
    if (pthread_equal(pthread_self(), self)) {
        CHECK(now);
        by_self++;
    } else {
        while (!may_begin)
            usleep(100);
        by_others++;
        if (fails)
            return BG_MAP_MISS;
    }
    return bg_map_copied(asks, offset / UNIT * UNIT, UNIT);
}

static bg_map_copier copier = {.copy = copy};

static void begin(void)
{
    bg_map_extent all = {0, SIZE, 0, 0, BG_MAP_WRITABLE | BG_MAP_COPY};
    CHECK(bg_map_insert(map, bg_map_generation(map), &all, 1) == 1);
    by_self = by_others = 0;
}

/* Writes to so many units, all of them there when the turn begins. */
static void write_units(int first, int count)
{
    for (int i = first; i < first + count; i++) {
        char data[LENGTH];
        memset(data, i + 1, LENGTH);
        send_header(sock, BG_NBD_WRITE, 0, (uint64_t)i, (uint64_t)i * UNIT + 100, LENGTH);
        CHECK(send(sock, data, LENGTH, 0) == LENGTH);
    }
    pthread_mutex_lock(&conn->lock);
    conn->misses = 0;
    nbd_turn(conn, EPOLLIN);
    nbd_leave(conn);
}

static void expect_replies(int count)
{
    char got[REPLY * MANY];
    CHECK(recv(sock, got, (size_t)count * REPLY, MSG_WAITALL) == count * REPLY);
    for (int i = 0; i < count; i++)
        CHECK(memcmp(got + i * REPLY + 4, "\0\0\0\0", 4) == 0);
}

static void expect_written(int first, int count)
{
    for (int i = first; i < first + count; i++) {
        char is[LENGTH], data[LENGTH];
        memset(data, i + 1, LENGTH);
        CHECK(pread(fd, is, LENGTH, (off_t)i * UNIT + 100) == LENGTH && memcmp(is, data, LENGTH) == 0);
    }
}

static void test_halves(void)
{
    begin();
    /* The first shows what such a write costs. One alone is no matter for two threads. */
    write_units(0, 1);
    expect_replies(1);
    write_units(1, 1);
    expect_replies(1);
    CHECK(by_self == 2 && by_others == 0 && conn->requests == 0);
    /* The greater half is done before the turn ends, with the replies; the other one is on its way. */
    may_begin = false;
    write_units(2, MANY);
    expect_replies(MANY - MANY / 2);
    CHECK(by_self == 2 + MANY - MANY / 2 && by_others == 0 && conn->requests == MANY / 2);
    CHECK(atomic_load(&conn->source.on_pool) == MANY / 2);
    may_begin = true;
    expect_replies(MANY / 2);
    bg_source_wait(&conn->source);
    CHECK(by_others == MANY / 2);
    expect_written(0, MANY + 2);
    /* Again, in place: nothing is heavy any more. */
    write_units(0, MANY);
    expect_replies(MANY);
    CHECK(by_self + by_others == MANY + 2);
}

/* What was heavy lately turns out to have to wait. */
static void test_waiting(void)
{
    begin();
    must_wait = true;
    write_units(20, MANY);
    expect_replies(MANY);
    CHECK(by_self == 0 && by_others == MANY && copier.lately == 0);
    /* Now that is known: each for itself. */
    write_units(30, MANY);
    expect_replies(MANY);
    CHECK(by_self == 0 && by_others == 2 * MANY);
    expect_written(20, MANY);
    expect_written(30, MANY);
    must_wait = false;
}

/* Python gets what the pool could not do. */
static void test_failing(void)
{
    begin();
    copier.lately = UNIT;
    fails = true;
    write_units(40, MANY);
    expect_replies(MANY - MANY / 2);
    for (int i = 0; i < MANY / 2; i++) {
        bg_fault fault;
        unsigned char head[64];
        while (bg_nbd_take(loop, &fault, 1) == 0)
            usleep(100);
        CHECK(fault.offset == (uint64_t)(40 + MANY - MANY / 2 + i) * UNIT + 100 && fault.length == LENGTH);
        CHECK(*(char *)fault.buf == (char)(fault.tag + 1) && pwrite(fd, fault.buf, LENGTH, (off_t)fault.offset) == LENGTH);
        CHECK(bg_nbd_reply(fault.ticket, head, (int64_t)bg_nbd_pack_simple(head, fault.tag), 0) == 0);
        bg_nbd_kick(conn);
        expect_replies(1);
    }
    expect_written(40, MANY);
    fails = false;
}

/* The end of the loop waits for what the pool still does; nothing is served, or uses the map, after it. */
static void *allow(void *unused)
{
    (void)unused;
    usleep(20000); /* for the end to be waiting; it is right either way */
    may_begin = true;
    return NULL;
}

static void test_end(void)
{
    pthread_t other;
    begin();
    copier.lately = UNIT;
    may_begin = false;
    write_units(0, MANY);
    CHECK(pthread_create(&other, NULL, allow, NULL) == 0);
    bg_nbd_loop_stop(loop);
    CHECK(may_begin && by_others == MANY / 2 && atomic_load(&conn->source.on_pool) == 0);
    pthread_join(other, NULL);
}

void test_heavy(void)
{
    bg_pool *pool;
    bg_fault fault;
    self = pthread_self();
    fd = memfd_create("heavy", MFD_CLOEXEC);
    CHECK(ftruncate(fd, SIZE) == 0);
    CHECK(bg_pool_new(2, 2, &pool) == 0 && bg_nbd_loop_new(1, pool, &loop) == 0);
    CHECK(bg_map_new(SIZE, BG_MAP_MIN_MEMORY, &map) == 0 && bg_map_add_slot(map, fd, 1, 1) == 0);
    bg_map_wait(map, bg_map_set_copier(map, &copier));
    sock = connect_by_hand(loop, map, &(bg_nbd_settings){SIZE, false, true, true}, &conn);
    if (bg_pool_has_processors(pool)) {
        test_halves();
        test_waiting();
        test_failing();
        test_end();
    } else {
        /* With one processor there is nobody to share with. */
        begin();
        write_units(0, 1);
        write_units(1, MANY);
        expect_replies(MANY + 1);
        CHECK(by_self == MANY + 1);
        bg_nbd_loop_stop(loop);
    }
    while (bg_nbd_take(loop, &fault, 1) == 0)
        usleep(100);
    CHECK(fault.ticket == 0);
    bg_nbd_release(conn);
    close(sock);
    CHECK(bg_nbd_loop_free(loop) == 0);
    bg_pool_free(pool);
    CHECK(bg_map_free(map) == 0);
    close(fd);
}
