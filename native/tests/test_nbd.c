/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* Clients of every kind against the request loop, while mappings come and go and one thread plays Python's part. */
#define _GNU_SOURCE
#include "driver.h"
#include "nbd_loop.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define CLIENTS 10
#define BLOCK 3000
#define BLOCKS 48 /* of each client */
#define BIG (400 << 10)
#define REGION (BLOCKS * BLOCK + BIG)
#define SIZE (CLIENTS * REGION)
#define ROUNDS 60

static bg_nbd_loop *loop;
static bg_map *map;
static int fd, slot, stop_python;
static bg_nbd_conn *conns[CLIENTS];
static atomic_int ended;
static int retried, again;
static atomic_bool over;

/* Python's part. */

static void complete(const bg_fault *f, unsigned number)
{
    struct {
        uint32_t magic, error;
        uint64_t cookie;
        char padding[100];
    } head = {htobe32(0x67446698), 0, htobe64(f->tag), {0}};
    if (f->buf && f->command == BG_NBD_READ)
        CHECK(pread(fd, f->buf, f->length, (off_t)f->offset) == f->length);
    else if (f->buf && f->command == BG_NBD_WRITE)
        CHECK(pwrite(fd, f->buf, f->length, (off_t)f->offset) == f->length);
    else if (f->command == BG_NBD_TRIM || f->command == BG_NBD_WRITE_ZEROES)
        CHECK(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)f->offset, f->length) == 0);
    else if (f->command == BG_NBD_FLUSH)
        bg_map_flushed(map, bg_map_dirt(map));
    if (f->buf && f->command == BG_NBD_WRITE && number % 3 == 0) {
        void *kept = f->buf;
        CHECK(bg_nbd_reply(f->ticket, &head, 16, BG_NBD_KEEP) == 0);
        memset(kept, 1, f->length);
        bg_buffer_free(kept);
    } else {
        CHECK(bg_nbd_reply(f->ticket, &head, 16, f->command == BG_NBD_READ ? BG_NBD_PAYLOAD : 0) == 0);
    }
}

static void *python(void *unused)
{
    (void)unused;
    struct pollfd wait[] = {
        {bg_nbd_loop_eventfd(loop), POLLIN, 0}, {bg_nbd_loop_pollfd(loop), POLLIN, 0}, {stop_python, POLLIN, 0}};
    bg_fault faults[7], late;
    bool have_late = false;
    for (unsigned number = 0; ended < CLIENTS;) {
        CHECK(poll(wait, 3, -1) > 0);
        if (wait[1].revents)
            bg_nbd_poll(loop);
        if (wait[2].revents) {
            eventfd_t ignored;
            eventfd_read(stop_python, &ignored);
            for (int i = 0; i < CLIENTS; i++)
                if (conns[i] && i % 2)
                    bg_nbd_shutdown(conns[i]);
                else if (conns[i])
                    bg_nbd_abort(conns[i]);
        }
        int64_t n = bg_nbd_take(loop, faults, 7);
        for (int64_t i = 0; i < n; i++) {
            if (!faults[i].ticket) {
                bg_nbd_release(conns[faults[i].source]);
                conns[faults[i].source] = NULL;
                ended++;
            } else if (!faults[i].error && (faults[i].command == BG_NBD_READ || faults[i].command == BG_NBD_WRITE) && number++ % 3) {
                bg_nbd_retry(&faults[i].ticket, 1); /* it may be mapped again by now, or not */
                retried++;
            } else if (!have_late && number++ % 5 == 0) {
                again += faults[i].error != 0;
                late = faults[i];
                have_late = true;
            } else {
                again += faults[i].error != 0;
                complete(&faults[i], number);
            }
        }
        if (have_late) {
            complete(&late, 1);
            have_late = false;
        }
        for (int i = 0; i < CLIENTS; i++)
            if (conns[i])
                bg_nbd_kick(conns[i]);
    }
    return NULL;
}

static void map_all(void)
{
    bg_map_extent extents[3] = {
        {0, SIZE / 3, 0, slot, BG_MAP_WRITABLE},
        {SIZE / 3, SIZE / 3, SIZE / 3, slot, 0},
        {SIZE / 3 * 2, SIZE - SIZE / 3 * 2, SIZE / 3 * 2, slot, BG_MAP_WRITABLE},
    };
    CHECK(bg_map_insert(map, bg_map_generation(map), extents, 3) >= 0);
}

static void *unmap(void *unused)
{
    (void)unused;
    while (!over) {
        bg_map_wait(map, bg_map_invalidate(map, SIZE / 4, SIZE / 2));
        map_all();
        bg_map_wait(map, bg_map_protect(map, 0, SIZE));
        bg_map_dirty(map);
        map_all();
    }
    return NULL;
}

/* Clients. */

typedef struct {
    int sock, number;
} client;

static void send_all(int sock, const void *data, size_t size)
{
    for (ssize_t n; size; size -= (size_t)n, data = (const char *)data + n)
        CHECK((n = send(sock, data, size, MSG_NOSIGNAL)) > 0);
}

static void recv_all(int sock, void *data, size_t size)
{
    CHECK(recv(sock, data, size, MSG_WAITALL) == (ssize_t)size);
}

static void header(unsigned char out[28], int command, int flags, uint64_t cookie, uint64_t offset, uint32_t length)
{
    uint32_t magic = htobe32(0x25609513);
    uint16_t f = htobe16((uint16_t)flags), c = htobe16((uint16_t)command);
    cookie = htobe64(cookie);
    offset = htobe64(offset);
    length = htobe32(length);
    memcpy(out, &magic, 4);
    memcpy(out + 4, &f, 2);
    memcpy(out + 6, &c, 2);
    memcpy(out + 8, &cookie, 8);
    memcpy(out + 16, &offset, 8);
    memcpy(out + 24, &length, 4);
}

static void request(int sock, int command, int flags, uint64_t cookie, uint64_t offset, uint32_t length)
{
    unsigned char bytes[28];
    header(bytes, command, flags, cookie, offset, length);
    send_all(sock, bytes, 28);
}

/* One reply; a read's payload goes to `data`. */
static uint64_t reply(int sock, const bool *is_read, uint32_t length, char *data)
{
    unsigned char head[16];
    recv_all(sock, head, 16);
    uint32_t magic;
    uint64_t cookie;
    memcpy(&magic, head, 4);
    memcpy(&cookie, head + 8, 8);
    cookie = be64toh(cookie);
    if (be32toh(magic) == 0x67446698) {
        if (is_read[cookie])
            recv_all(sock, data, length);
        return cookie;
    }
    CHECK(be32toh(magic) == 0x668e33ef && head[5] == 1);
    unsigned char rest[16];
    recv_all(sock, rest, head[7] == 1 ? 12 : 16);
    if (head[7] == 1)
        recv_all(sock, data, length);
    else
        memset(data, 0, length);
    return cookie;
}

/* Batches of requests to different blocks; what is read is what was written before. */
static void honest(const client *c)
{
    static __thread char model[BLOCKS][BLOCK], big[BIG], data[BIG];
    uint64_t random = (uint64_t)c->number + 1, base = (uint64_t)c->number * REGION;
    memset(model, 0, sizeof(model));
    for (int round = 0; round < ROUNDS; round++) {
        bool is_read[BLOCKS];
        for (int i = 0; i < BLOCKS; i++) {
            int what = (int)(next_random(&random) % 13);
            uint64_t at = base + (uint64_t)i * BLOCK;
            is_read[i] = what < 4;
            if (is_read[i]) {
                request(c->sock, BG_NBD_READ, 0, (uint64_t)i, at, BLOCK);
            } else if (what == 10) {
                request(c->sock, BG_NBD_FLUSH, 0, (uint64_t)i, 0, 0);
            } else if (what > 10) {
                memset(model[i], 0, BLOCK);
                request(c->sock, what == 11 ? BG_NBD_TRIM : BG_NBD_WRITE_ZEROES, i % 2 ? BG_NBD_FUA : 0, (uint64_t)i, at, BLOCK);
            } else if (what < 8) {
                memset(model[i], (int)next_random(&random), BLOCK);
                request(c->sock, BG_NBD_WRITE, what == 7 ? BG_NBD_FUA : 0, (uint64_t)i, at, BLOCK);
                send_all(c->sock, model[i], BLOCK);
            } else {
                request(c->sock, what == 8 ? BG_NBD_CACHE : 7, 0, (uint64_t)i, at, BLOCK);
            }
        }
        for (int i = 0; i < BLOCKS; i++) {
            uint64_t cookie = reply(c->sock, is_read, BLOCK, data);
            if (is_read[cookie])
                CHECK(!memcmp(data, model[cookie], BLOCK));
        }
        /* Long writes, each received while the one before it is done. */
        static const uint32_t lengths[] = {128 << 10, 1000, 200 << 10, BIG - (328 << 10) - 1000};
        bool big_read[4] = {false};
        uint32_t at = 0;
        for (uint64_t i = 0; i < 4; at += lengths[i++]) {
            memset(big + at, (int)next_random(&random), lengths[i]);
            request(c->sock, BG_NBD_WRITE, next_random(&random) % 9 ? 0 : BG_NBD_FUA, i, base + BLOCKS * BLOCK + at, lengths[i]);
            send_all(c->sock, big + at, lengths[i]);
        }
        for (int i = 0; i < 4; i++)
            reply(c->sock, big_read, BIG, data);
        big_read[0] = true;
        request(c->sock, BG_NBD_READ, 0, 0, base + BLOCKS * BLOCK, BIG);
        reply(c->sock, big_read, BIG, data);
        CHECK(!memcmp(data, big, BIG));
    }
}

/* Asks for a thousand things that it may not have, a hundred at once; two of three are writes, whose payload has to go by. */
static void forbidden(const client *c)
{
    for (uint64_t first = 0; first < 1000; first += 100) {
        for (uint64_t i = first; i < first + 100; i++) {
            request(c->sock, i % 3 ? BG_NBD_WRITE : (int)(8 + i), 0, i, SIZE - i, (uint32_t)(i + 1));
            if (i % 3)
                send_all(c->sock, "a payload that nobody wants a payload that nobody wants", (i + 1) % 50);
            for (uint64_t rest = i % 3 ? (i + 1) / 50 : 0; rest; rest--)
                send_all(c->sock, "fifty bytes more that nobody wants, fifty bytes of", 50);
        }
        for (uint64_t i = first; i < first + 100; i++) {
            unsigned char head[20], chunk[6], text[200];
            uint64_t cookie;
            uint32_t error;
            recv_all(c->sock, head, 20);
            CHECK(head[4] == 0 && head[5] == 1 && head[6] == 0x80 && head[7] == 1);
            memcpy(&cookie, head + 8, 8);
            CHECK(be64toh(cookie) == i);
            recv_all(c->sock, chunk, 6);
            memcpy(&error, chunk, 4);
            CHECK(be32toh(error) == (i % 3 ? ENOSPC : EINVAL));
            CHECK(chunk[4] == 0 && chunk[5] > 10 && head[19] == 6 + chunk[5]);
            recv_all(c->sock, text, chunk[5]);
        }
    }
}

static void *run_client(void *arg)
{
    client *c = arg;
    uint64_t base = (uint64_t)c->number * REGION;
    switch (c->number % CLIENTS) {
    case 0: /* leaves in the middle of a write */
        request(c->sock, BG_NBD_WRITE, 0, 0, base, BIG);
        send_all(c->sock, c, sizeof(*c));
        break;
    case 1: /* wants a lot and reads nothing */
        for (int i = 0; i < 300; i++)
            request(c->sock, BG_NBD_READ, 0, 0, base, BIG);
        break;
    case 2: /* talks nonsense */
        request(c->sock, BG_NBD_READ, 0, 0, base, BIG);
        send_all(c->sock, "nonsense nonsense nonsense nonsense", 35);
        break;
    case 9:
        forbidden(c);
        return NULL;
    default:
        honest(c);
        if (c->number % 3)
            return NULL; /* stays until the loop ends it */
        request(c->sock, BG_NBD_DISC, 0, 0, 0, 0);
        CHECK(recv(c->sock, c, 1, 0) == 0);
    }
    close(c->sock);
    c->sock = -1;
    return NULL;
}

void test_nbd(void)
{
    bg_pool *pool;
    pthread_t python_thread, unmap_thread, threads[CLIENTS];
    client clients[CLIENTS];
    CHECK(bg_pool_new(2, 2, &pool) == 0);
    CHECK(bg_nbd_loop_new(0, pool, &loop) == -EINVAL);
    CHECK(bg_nbd_loop_new(2, pool, &loop) == 0);
    CHECK(bg_map_new(SIZE, BG_MAP_MIN_MEMORY, &map) == 0);
    fd = memfd_create("nbd", MFD_CLOEXEC);
    CHECK(ftruncate(fd, SIZE) == 0);
    slot = bg_map_add_slot(map, fd, 1, 1);
    CHECK(bg_map_set_zeroing(map, slot, BG_MAP_PUNCH | BG_MAP_ZERO_RANGE, 0) == 0);
    map_all();
    stop_python = eventfd(0, EFD_CLOEXEC);
    ended = retried = again = 0;
    over = false;
    for (int i = 0; i < CLIENTS; i++) {
        int pair[2];
        CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
        clients[i] = (client){pair[1], i};
        bg_nbd_settings settings = {SIZE, i % 2 == 0 || i == 9, true, true};
        CHECK(bg_nbd_conn_new(loop, pair[0], i, &settings, i == 4 ? NULL : map, &conns[i]) == 0);
    }
    CHECK(bg_nbd_loop_free(loop) == -EBUSY);
    CHECK(pthread_create(&python_thread, NULL, python, NULL) == 0);
    CHECK(pthread_create(&unmap_thread, NULL, unmap, NULL) == 0);
    for (int i = 0; i < CLIENTS; i++)
        CHECK(pthread_create(&threads[i], NULL, run_client, &clients[i]) == 0);
    for (int i = 0; i < CLIENTS; i++)
        pthread_join(threads[i], NULL);
    eventfd_write(stop_python, 1);
    pthread_join(python_thread, NULL);
    over = true;
    pthread_join(unmap_thread, NULL);
    bg_nbd_stats stats;
    bg_nbd_loop_stats(loop, &stats);
    CHECK(stats.hits > 0 && stats.faults > 0 && stats.blocked > 0 && stats.hits + stats.faults + stats.refused <= stats.requests);
    CHECK(stats.refused == 1000);
    CHECK(again > 0 && retried > again);
    bg_nbd_loop_stop(loop);
    CHECK(bg_nbd_loop_free(loop) == 0);
    for (int i = 0; i < CLIENTS; i++) {
        char byte;
        if (clients[i].sock >= 0) {
            CHECK(recv(clients[i].sock, &byte, 1, 0) == 0);
            close(clients[i].sock);
        }
    }
    bg_map_wait(map, bg_map_remove_slot(map, slot));
    CHECK(bg_map_free(map) == 0);
    bg_pool_free(pool);
    close(stop_python);
    close(fd);
}
