/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* Reads of what is in memory, with the connection's turns made by hand: what was sent when, and what of a file may change meanwhile. */
#define _GNU_SOURCE
#include "nbd_by_hand.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define KIB 1024
#define SIZE (4096 * KIB)
#define HOLE (1024 * KIB)
#define HOLE_END (2048 * KIB)
#define SIMPLE 16
#define STRUCTURED 28 /* a chunk's head, and the offset */
#define LONG (64 * KIB)

static int fd, sock;
static bg_map *map;
static bg_nbd_loop *loop;
static bg_nbd_conn *conn;
static char data[SIZE], got[SIZE + STRUCTURED];

static void ask(uint16_t command, uint64_t cookie, uint64_t offset, uint32_t length)
{
    send_header(sock, command, 0, cookie, offset, length);
}

/* What is there to be received. */
static size_t ready(void)
{
    ssize_t n = recv(sock, got, sizeof(got), MSG_DONTWAIT | MSG_PEEK);
    return n < 0 ? 0 : (size_t)n;
}

/* A turn, of which the replies are sent at the end only if something else did not before; returns what was. */
static size_t turn(bool sleeps)
{
    pthread_mutex_lock(&conn->lock);
    conn->sleeps = sleeps;
    nbd_turn(conn, EPOLLIN);
    size_t early = ready();
    nbd_leave(conn);
    return early;
}

/* Receive exactly so much, in as many turns as it takes. */
static void receive(size_t size)
{
    for (size_t done = 0; done < size;) {
        ssize_t n = recv(sock, got + done, size - done, MSG_DONTWAIT);
        if (n > 0) {
            done += (size_t)n;
            continue;
        }
        pthread_mutex_lock(&conn->lock);
        nbd_turn(conn, EPOLLOUT);
        nbd_leave(conn);
    }
    CHECK(ready() == 0);
}

static void expect_data(uint64_t offset, uint32_t length)
{
    size_t head = conn->settings.structured ? STRUCTURED : SIMPLE;
    receive(head + length);
    CHECK(memcmp(got + head, data + offset, length) == 0);
}

static void test_shown(void)
{
    struct stat before, after;
    bool structured = conn->settings.structured;
    size_t head = structured ? STRUCTURED : SIMPLE;
    CHECK(fstat(fd, &before) == 0);
    ask(BG_NBD_READ, 1, 7 * KIB, LONG);
    CHECK(turn(false) == head + LONG);
    expect_data(7 * KIB, LONG);
    CHECK(conn->requests == 0 && conn->bytes == 0);
    /* A short one, one that ends in a hole, one in it: not from where they are. */
    ask(BG_NBD_READ, 2, 0, LONG - 1);
    CHECK(turn(false) == 0);
    expect_data(0, LONG - 1);
    ask(BG_NBD_READ, 3, HOLE - 4096, LONG);
    CHECK(turn(false) == 0);
    expect_data(HOLE - 4096, LONG);
    ask(BG_NBD_READ, 4, HOLE, LONG);
    CHECK(turn(false) == 0);
    if (structured)
        receive(32);
    else
        expect_data(HOLE, LONG);
    /* Zeroes at its beginning only are found nowhere but in a buffer, if anybody is to be told of zeroes. */
    memset(data, 0, 64);
    CHECK(pwrite(fd, data, 64, 0) == 64);
    ask(BG_NBD_READ, 5, 0, LONG);
    CHECK(turn(false) == (structured ? 0 : head + LONG));
    expect_data(0, LONG);
    memset(data, 1, 64);
    CHECK(pwrite(fd, data, 64, 0) == 64);
    CHECK(fstat(fd, &after) == 0 && after.st_blocks == before.st_blocks);
    /* What is not mapped is Python's. */
    bg_map_wait(map, bg_map_invalidate(map, 0, SIZE));
    ask(BG_NBD_READ, 6, 0, LONG);
    CHECK(turn(false) == 0);
    bg_fault fault;
    CHECK(bg_nbd_take(loop, &fault, 1) == 1 && fault.tag == 6 && fault.buf);
    CHECK(bg_map_insert(map, bg_map_generation(map), &(bg_map_extent){0, SIZE, 0, 0, 0}, 1) == 1);
    unsigned char reply[64];
    size_t size = structured ? bg_nbd_pack_data(reply, 6, 0, LONG) : bg_nbd_pack_simple(reply, 6);
    CHECK(pread(fd, fault.buf, LONG, 0) == LONG && bg_nbd_reply(fault.ticket, reply, (int64_t)size, BG_NBD_PAYLOAD) == 0);
    bg_nbd_kick(conn);
    expect_data(0, LONG);
}

/* The socket takes a part of the reply: the rest is what was there when the request was done. */
static void test_full(void)
{
    int small = 1;
    CHECK(setsockopt(conn->fd, SOL_SOCKET, SO_SNDBUF, &small, sizeof(small)) == 0);
    ask(BG_NBD_READ, 1, HOLE_END, 256 * KIB);
    size_t early = turn(false), head = conn->settings.structured ? STRUCTURED : SIMPLE;
    CHECK(early > head && early < 256 * KIB);
    CHECK(conn->requests == 1 && conn->full);
    /* The next one finds the socket full, and has to wait in a buffer. */
    ask(BG_NBD_READ, 2, HOLE_END + LONG, LONG);
    CHECK(turn(false) == early && conn->requests == 2);
    static char others[512 * KIB];
    memset(others, 0x55, sizeof(others));
    CHECK(pwrite(fd, others, sizeof(others), HOLE_END) == sizeof(others));
    receive(head + 256 * KIB + head + LONG);
    CHECK(memcmp(got + head, data + HOLE_END, 256 * KIB) == 0);
    CHECK(memcmp(got + 2 * head + 256 * KIB, data + HOLE_END + LONG, LONG) == 0);
    CHECK(conn->requests == 0 && conn->bytes == 0);
    CHECK(pwrite(fd, data + HOLE_END, sizeof(others), HOLE_END) == sizeof(others));
    int large = 4096 * KIB;
    CHECK(setsockopt(conn->fd, SOL_SOCKET, SO_SNDBUF, &large, sizeof(large)) == 0);
}

static void test_announced(void)
{
    ask(BG_NBD_READ, 1, 9, 4096);
    CHECK(turn(true) == 4);
    expect_data(9, 4096);
    ask(BG_NBD_READ, 2, HOLE, 4096);
    CHECK(turn(true) == 4);
    expect_data(HOLE, 4096);
    /* Not for who is awake, for long ones, for the second of two. */
    ask(BG_NBD_READ, 3, 0, 4096);
    CHECK(turn(false) == 0);
    expect_data(0, 4096);
    ask(BG_NBD_READ, 4, 0, 32 * KIB);
    CHECK(turn(true) == 0);
    expect_data(0, 32 * KIB);
    ask(BG_NBD_READ, 5, 0, 4096);
    ask(BG_NBD_READ, 6, 0, 4096);
    CHECK(turn(true) == 0);
    receive(2 * ((conn->settings.structured ? STRUCTURED : SIMPLE) + 4096));
    CHECK(conn->requests == 0);
}

/* One that was announced and can not be read: nothing may come before its reply. */
static void test_announced_failing(void)
{
    char name[64];
    snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
    int blind = open(name, O_WRONLY | O_CLOEXEC), slot = bg_map_add_slot(map, blind, 1, 1);
    CHECK(blind >= 0 && slot > 0);
    CHECK(bg_map_insert(map, bg_map_generation(map), &(bg_map_extent){0, SIZE, 0, slot, 0}, 1) == 1);
    ask(BG_NBD_READ, 1, 0, 4096);
    CHECK(turn(true) == 4);
    ask(BG_NBD_READ, 2, SIZE, 1); /* refused */
    CHECK(turn(false) == 4);
    bg_fault fault;
    CHECK(bg_nbd_take(loop, &fault, 1) == 1 && fault.tag == 1);
    CHECK(ready() == 4);
    unsigned char reply[BG_NBD_MAX_REFUSAL];
    bg_nbd_header header = {.cookie = 1, .length = 4096, .command = BG_NBD_READ};
    size_t size = bg_nbd_pack_refusal(reply, &conn->settings, &header, BG_NBD_SHUT_DOWN);
    CHECK(bg_nbd_reply(fault.ticket, reply, (int64_t)size, 0) == 0);
    bg_nbd_kick(conn);
    receive(size);
    CHECK(memcmp(got, reply, size) == 0);
    pthread_mutex_lock(&conn->lock);
    nbd_turn(conn, EPOLLOUT);
    nbd_leave(conn);
    CHECK(ready() > 0 && conn->requests == 0);
    receive(ready());
    CHECK(bg_map_insert(map, bg_map_generation(map), &(bg_map_extent){0, SIZE, 0, 0, 0}, 1) == 1);
    bg_map_wait(map, bg_map_remove_slot(map, slot));
    close(blind);
}

static void run(bool structured)
{
    bg_pool *pool;
    bg_windows *windows;
    CHECK(bg_pool_new(1, 1, &pool) == 0 && bg_nbd_loop_new(1, pool, &loop) == 0);
    CHECK(bg_map_new(SIZE, BG_MAP_MIN_MEMORY, &map) == 0 && bg_windows_new(fd, &windows) == 0);
    int slot = bg_map_add_slot(map, fd, 1, 1);
    CHECK(slot == 0 && bg_map_set_windows(map, slot, windows) == 0 && bg_map_set_windows(map, -1, windows) == -EINVAL);
    CHECK(bg_map_insert(map, bg_map_generation(map), &(bg_map_extent){0, SIZE, 0, slot, 0}, 1) == 1);
    sock = connect_by_hand(loop, map, &(bg_nbd_settings){SIZE, structured, true, true}, &conn);
    test_shown();
    test_full();
    test_announced();
    test_announced_failing();
    close(sock);
    turn(false);
    bg_fault fault;
    CHECK(bg_nbd_take(loop, &fault, 1) == 1 && fault.ticket == 0 && fault.error == 0);
    bg_nbd_release(conn);
    bg_nbd_loop_stop(loop);
    CHECK(bg_nbd_loop_free(loop) == 0);
    bg_map_wait(map, bg_map_remove_slot(map, slot));
    CHECK(bg_map_free(map) == 0);
    bg_windows_free(windows);
    bg_pool_free(pool);
}

void test_nbd_reads(void)
{
    fd = file_with_hole(data, SIZE, HOLE, HOLE_END);
    run(false);
    run(true);
    close(fd);
}
