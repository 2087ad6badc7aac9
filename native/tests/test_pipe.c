/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* Payloads in pipes, and a connection that uses them, its turns made by hand: what is written when, and what becomes of it when it fails. */
#define _GNU_SOURCE
#include "nbd_by_hand.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define KIB 1024
#define SIZE (2048 * KIB)
#define LONG (64 * KIB)
#define REPLY 16
#define READ_ONLY 1
#define WRITE_ONLY 2

static int fd, sock;
static bg_map *map;
static bg_nbd_loop *loop;
static bg_nbd_conn *conn;
static char data[SIZE], got[SIZE];

static void fill_with(char *buf, size_t size, uint64_t seed)
{
    uint64_t random = seed + 1;
    for (size_t i = 0; i < size; i++)
        buf[i] = (char)next_random(&random);
}

static void test_passing(void)
{
    bg_pipes *pipes = bg_pipes_new(2);
    int pair[2];
    CHECK(pipes && socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    bg_pipe *p = bg_pipes_take(pipes), *other = bg_pipes_take(pipes);
    CHECK(p && other && !bg_pipes_take(pipes));
    fill_with(data, LONG, 1);
    CHECK(bg_pipe_fill(p, pair[0], LONG) == -EAGAIN);
    CHECK(send(pair[1], data, LONG, 0) == LONG);
    CHECK(bg_pipe_fill(p, pair[0], 1000) == 1000 && bg_pipe_fill(p, pair[0], LONG) == LONG - 1000);
    CHECK(bg_pipe_fill(p, pair[0], 1) == -EAGAIN);
    CHECK(bg_pipe_pwrite(p, fd, LONG + 1, 0) == -EINVAL && bg_pipe_pwrite(p, fd, 1, -1) == -EINVAL);
    /* In two places, the second of which is not written to the end. */
    CHECK(bg_pipe_pwrite(p, fd, 5000, 100) == 0 && bg_pipe_pwrite(p, fd, 5000, 5100) == 0);
    CHECK(bg_pipe_pwrite(p, fd, 7000, 50000) == 0);
    CHECK(pread(fd, got, 10000, 100) == 10000 && !memcmp(got, data, 10000));
    CHECK(pread(fd, got, 7000, 50000) == 7000 && !memcmp(got, data + 10000, 7000));
    CHECK(bg_pipe_empty(p, got) == 0 && !memcmp(got, data, LONG));
    memset(got, 0, LONG);
    CHECK(bg_pipe_empty(p, got) == 0 && got[0] == 0); /* it has nothing any more */
    /* More places than it remembers, of which none is lost. */
    CHECK(send(pair[1], data, LONG, 0) == LONG && bg_pipe_fill(p, pair[0], LONG) == LONG);
    for (int i = 0; i < BG_PIPE_PARTS; i++)
        CHECK(bg_pipe_pwrite(p, fd, 100, 1000 * i) == 0);
    CHECK(bg_pipe_pwrite(p, fd, 100, 1000 * BG_PIPE_PARTS) == -ENOBUFS);
    CHECK(bg_pipe_empty(p, got) == 0 && !memcmp(got, data, LONG));
    /* A sender who cuts it in small pieces fills it soon. */
    int64_t sent = 0, filled = 0, n;
    do {
        CHECK(send(pair[1], data + sent++, 1, 0) == 1);
        n = bg_pipe_fill(p, pair[0], 1);
        filled += n > 0 ? n : 0;
    } while (n == 1);
    CHECK(n == -ENOBUFS && filled == sent - 1 && filled < 1000);
    CHECK(bg_pipe_empty(p, got) == 0 && !memcmp(got, data, (size_t)filled));
    CHECK(bg_pipe_fill(p, pair[0], 10) == 1);
    /* One that is given back with something in it is not seen again. */
    bg_pipes_give(pipes, p);
    p = bg_pipes_take(pipes);
    CHECK(p && !bg_pipes_take(pipes) && bg_pipe_empty(p, got) == 0);
    /* What was written is not there any more. */
    CHECK(send(pair[1], data, LONG, 0) == LONG && bg_pipe_fill(p, pair[0], LONG) == LONG);
    CHECK(bg_pipe_pwrite(p, fd, 10000, SIZE) == 0 && ftruncate(fd, SIZE + 5000) == 0);
    CHECK(bg_pipe_empty(p, got) == -EIO && bg_pipe_empty(p, got) == -EIO && ftruncate(fd, SIZE) == 0);
    bg_pipes_give(pipes, p);
    /* The peer's end, and what is no socket. */
    close(pair[1]);
    CHECK(bg_pipe_fill(other, pair[0], 10) == 0 && bg_pipe_fill(other, -1, 10) == -EBADF);
    bg_pipes_give(pipes, other);
    close(pair[0]);
    bg_pipes_free(pipes);
    bg_pipes_free(NULL);
}

static void ask(uint16_t command, uint16_t flags, uint64_t cookie, uint64_t offset, uint32_t length)
{
    send_header(sock, command, flags, cookie, offset, length);
}

static void turn(void)
{
    pthread_mutex_lock(&conn->lock);
    conn->misses = 0; /* else the loop's own thread would serve it after some hits */
    nbd_turn(conn, EPOLLIN);
    nbd_leave(conn);
}

/* Replies that are here: how many; all of them must be good. */
static int replies(void)
{
    ssize_t n = recv(sock, got, sizeof(got), MSG_DONTWAIT);
    n = n < 0 ? 0 : n;
    CHECK(n % REPLY == 0);
    for (ssize_t i = 0; i < n; i += REPLY)
        CHECK(memcmp(got + i + 4, "\0\0\0\0", 4) == 0);
    return (int)(n / REPLY);
}

static uint64_t piped(void)
{
    bg_nbd_stats stats;
    bg_nbd_loop_stats(loop, &stats);
    return stats.piped;
}

/* The header alone, then the payload, as the header of a write behind a long one is received. */
static void write_long(uint64_t offset, uint32_t length, uint16_t flags)
{
    fill_with(data + offset, length, offset + length);
    ask(BG_NBD_WRITE, flags, 1, offset, length);
    turn();
    for (uint32_t sent = 0; sent < length;) {
        ssize_t n = send(sock, data + offset + sent, length - sent, MSG_DONTWAIT);
        CHECK(n > 0);
        sent += (uint32_t)n;
        turn();
    }
}

static void expect_written(uint64_t offset, uint32_t length)
{
    CHECK(pread(fd, got, length, (off_t)offset) == length && !memcmp(got, data + offset, length));
}

static void test_written(void)
{
    uint64_t before = piped();
    write_long(7, LONG, 0);
    expect_written(7, LONG);
    CHECK(replies() == 1 && piped() == before + 1);
    write_long(LONG, 300 * KIB, 0); /* in parts, and more than the socket takes at once */
    expect_written(LONG, 300 * KIB);
    CHECK(replies() == 1 && piped() == before + 2);
    /* Several in the socket are done in one turn. */
    fill_with(data, 4 * 40 * KIB, 3);
    for (uint64_t i = 0; i < 4; i++) {
        ask(BG_NBD_WRITE, 0, i, i * 40 * KIB, 40 * KIB);
        CHECK(send(sock, data + i * 40 * KIB, 40 * KIB, 0) == 40 * KIB);
    }
    turn();
    expect_written(0, 4 * 40 * KIB);
    CHECK(replies() == 4 && piped() == before + 6);
    CHECK(conn->requests == 0 && conn->bytes == 0 && conn->readied == 0);
    /* One that is to be durable has to wait, and is done from memory. */
    bg_map_flushed(map, bg_map_dirt(map));
    write_long(0, LONG, BG_NBD_FUA);
    CHECK(conn->requests <= 1 && conn->unpiped == 0);
    while (!replies())
        turn();
    expect_written(0, LONG);
    CHECK(piped() == before + 6);
}

static void map_all(void)
{
    CHECK(bg_map_insert(map, bg_map_generation(map), &(bg_map_extent){0, SIZE, 0, 0, BG_MAP_WRITABLE}, 1) == 1);
}

static void answer(const bg_fault *fault)
{
    unsigned char head[64];
    CHECK(bg_nbd_reply(fault->ticket, head, (int64_t)bg_nbd_pack_simple(head, 1), 0) == 0);
    bg_nbd_kick(conn);
}

static void test_otherwise(void)
{
    /* Small pieces: received into memory in the end, and for some time. */
    uint64_t before = piped();
    fill_with(data, LONG, 5);
    ask(BG_NBD_WRITE, 0, 1, 0, LONG);
    turn();
    for (uint32_t sent = 0; sent < LONG; sent += 32) {
        CHECK(send(sock, data + sent, 32, 0) == 32);
        turn();
    }
    expect_written(0, LONG);
    CHECK(replies() == 1 && piped() == before && conn->unpiped > 0);
    write_long(LONG, LONG, 0);
    CHECK(replies() == 1 && piped() == before);
    conn->unpiped = 0;
    /* What is not mapped is Python's, with its payload. */
    bg_map_wait(map, bg_map_invalidate(map, LONG, LONG));
    write_long(LONG, LONG, 0);
    bg_fault fault;
    CHECK(bg_nbd_take(loop, &fault, 1) == 1 && !memcmp(fault.buf, data + LONG, LONG) && conn->unpiped > 0);
    answer(&fault);
    CHECK(replies() == 1 && piped() == before);
    map_all();
    conn->unpiped = 0;
}

/* The second half can not be written: what Python gets is all of it. */
static void test_failing(uint32_t length)
{
    uint64_t before = piped();
    int pause = conn->pause;
    bg_map_extent halves[2] = {{0, length / 2, 0, 0, BG_MAP_WRITABLE}, {length / 2, length / 2, length / 2, READ_ONLY, BG_MAP_WRITABLE}};
    CHECK(bg_map_insert(map, bg_map_generation(map), halves, 2) == 2);
    write_long(0, length, 0);
    bg_fault fault;
    CHECK(bg_nbd_take(loop, &fault, 1) == 1 && fault.length == length && !memcmp(fault.buf, data, length));
    expect_written(0, length / 2);
    answer(&fault);
    CHECK(replies() == 1 && piped() == before && conn->unpiped == conn->pause && conn->pause > pause);
    map_all();
    conn->unpiped = 0;
}

static void connect_new(void)
{
    sock = connect_by_hand(loop, map, &(bg_nbd_settings){SIZE, false, true, true}, &conn);
}

static void expect_end(int64_t error)
{
    bg_fault fault;
    CHECK(bg_nbd_take(loop, &fault, 1) == 1 && fault.ticket == 0 && fault.error == error);
    bg_nbd_release(conn);
    close(sock);
}

/* Nor can the first half be read back: nobody has the payload, and nobody may say that the write was done, or was not. */
static void test_lost(uint32_t length)
{
    bg_map_extent halves[2] = {{0, length / 2, 0, WRITE_ONLY, BG_MAP_WRITABLE},
                               {length / 2, length / 2, length / 2, READ_ONLY, BG_MAP_WRITABLE}};
    CHECK(bg_map_insert(map, bg_map_generation(map), halves, 2) == 2);
    write_long(0, length, 0);
    CHECK(replies() == 0);
    expect_end(-EIO);
    map_all();
    connect_new();
}

#define FLOOD 600

static void *flood(void *unused)
{
    (void)unused;
    uint32_t length = 128 * KIB;
    for (uint64_t i = 0; i < FLOOD; i++) {
        ask(BG_NBD_WRITE, 0, i, i % 4 * length, length);
        for (uint32_t sent = 0; sent < length;) {
            ssize_t n = send(sock, data + sent, length - sent, 0);
            CHECK(n > 0);
            sent += (uint32_t)n;
        }
    }
    return NULL;
}

/* Who always has more to write leaves others their turn. */
static void test_flood(void)
{
    pthread_t sender;
    bg_nbd_stats before, after;
    bg_nbd_loop_stats(loop, &before);
    uint64_t first = before.requests, most = 0;
    int answered = 0;
    CHECK(pthread_create(&sender, NULL, flood, NULL) == 0);
    do {
        turn();
        bg_nbd_loop_stats(loop, &after);
        if (after.requests - before.requests > most)
            most = after.requests - before.requests;
        before = after;
        answered += replies();
    } while (answered < FLOOD);
    pthread_join(sender, NULL);
    CHECK(after.requests == first + FLOOD && most <= 20);
}

/* In the middle of a payload: nothing is written. */
static void test_left(void)
{
    memset(data, 0, LONG);
    CHECK(pwrite(fd, data, LONG, 0) == LONG);
    ask(BG_NBD_WRITE, 0, 1, 0, LONG);
    turn();
    CHECK(send(sock, data + LONG, LONG - 1, 0) == LONG - 1);
    turn();
    shutdown(sock, SHUT_WR);
    turn();
    expect_written(0, LONG);
    expect_end(BG_NBD_LEFT);
}

static int reopened(int flags)
{
    char name[64];
    snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
    int opened = open(name, flags | O_CLOEXEC);
    CHECK(opened >= 0);
    return opened;
}

void test_pipe(void)
{
    bg_pool *pool;
    fd = memfd_create("pipes", MFD_CLOEXEC);
    CHECK(ftruncate(fd, SIZE) == 0);
    int read_only = reopened(O_RDONLY), write_only = reopened(O_WRONLY);
    test_passing();
    CHECK(bg_pool_new(1, 1, &pool) == 0 && bg_nbd_loop_new(1, pool, &loop) == 0);
    CHECK(bg_map_new(SIZE, BG_MAP_MIN_MEMORY, &map) == 0);
    CHECK(bg_map_add_slot(map, fd, 1, 1) == 0 && bg_map_add_slot(map, read_only, 1, 1) == READ_ONLY);
    CHECK(bg_map_add_slot(map, write_only, 1, 1) == WRITE_ONLY);
    map_all();
    connect_new();
    test_written();
    test_otherwise();
    test_failing(LONG);
    test_failing(256 * KIB);
    write_long(0, LONG, 0);
    CHECK(replies() == 1 && conn->pause == 0);
    test_lost(LONG);
    test_lost(256 * KIB);
    test_flood();
    test_left();
    bg_nbd_loop_stop(loop);
    CHECK(bg_nbd_loop_free(loop) == 0);
    bg_pool_free(pool);
    CHECK(bg_map_free(map) == 0);
    close(read_only);
    close(write_only);
    close(fd);
}
