/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* When a thread of the NBD loop watches and when it sleeps: the rules by themselves, then of a real thread. */
#define _GNU_SOURCE
#include "driver.h"
#include "nbd_internal.h"
#include "nbd_peer.h"

#include <fcntl.h>
#include <sched.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define LOOK 1000 /* ns, of those that nobody disturbs */
#define OFFER 500 /* of these, that nobody has taken */

/*
 * A watch that finds something at its look number `at`, counted from 0, or nothing at all; returns its looks. After each the
 * processor is offered to others, who keep it for `offer`.
 */
static int watch_once(bg_nbd_watch *w, int64_t *clock, int at, int64_t offer)
{
    int looks = 0;
    bg_nbd_watch_begin(w, *clock);
    do {
        if (looks++ == at) {
            bg_nbd_watch_found(w);
            return looks;
        }
        *clock += LOOK - OFFER + offer;
        if (!bg_nbd_watch_again(w, *clock - offer, *clock))
            return looks;
        CHECK(w->shared == (offer > BG_NBD_OFFER));
    } while (true);
}

static void rules(void)
{
    bg_nbd_watch w = {0};
    int64_t clock = 12345;
    /* In vain again and again: 1, 3, 7 ... 1023 naps before the next watch, and never more. */
    unsigned naps = 0;
    for (int round = 0; round < 15; round++) {
        CHECK(!bg_nbd_watch_naps(&w));
        CHECK(watch_once(&w, &clock, -1, OFFER) == BG_NBD_WATCH / LOOK);
        naps = naps < BG_NBD_MOST_NAPS ? naps * 2 + 1 : BG_NBD_MOST_NAPS;
        CHECK(w.naps == naps && w.next_naps == naps);
        for (unsigned i = 0; i < naps; i++)
            CHECK(bg_nbd_watch_naps(&w));
    }
    CHECK(naps == BG_NBD_MOST_NAPS);
    /* What is there at once proves nothing; what comes while it watches halves them, and none is due. */
    CHECK(!bg_nbd_watch_naps(&w) && watch_once(&w, &clock, 0, OFFER) == 1 && w.next_naps == BG_NBD_MOST_NAPS);
    for (; naps; naps /= 2) {
        CHECK(!bg_nbd_watch_naps(&w) && w.next_naps == naps);
        CHECK(watch_once(&w, &clock, 1 + (int)(naps % 7), OFFER) == 2 + (int)(naps % 7));
    }
    CHECK(!bg_nbd_watch_naps(&w) && w.next_naps == 0);
    /* When others have had the processor, it gives up after one look; just not yet, it goes on. */
    CHECK(watch_once(&w, &clock, -1, BG_NBD_CROWDED + 1) == 1 && w.naps == 1);
    CHECK(bg_nbd_watch_naps(&w) && !bg_nbd_watch_naps(&w));
    CHECK(watch_once(&w, &clock, -1, BG_NBD_CROWDED) == 1 + BG_NBD_WATCH / BG_NBD_CROWDED && w.naps == 3);
    /* Whether they have had it counts from one look to the next, not from one watch to the next. */
    bg_nbd_watch_begin(&w, clock);
    CHECK(bg_nbd_watch_again(&w, clock, clock + BG_NBD_OFFER + 1) && w.shared);
    CHECK(bg_nbd_watch_again(&w, clock, clock + BG_NBD_OFFER) && !w.shared);
    CHECK(bg_nbd_watch_again(&w, clock, clock + BG_NBD_OFFER + 1));
    bg_nbd_watch_begin(&w, clock);
    CHECK(!w.shared && !w.looked);
    /* Busy: not less than so many, never fewer than were due. */
    bg_nbd_watch_busy(&w);
    CHECK(w.naps == BG_NBD_BUSY_NAPS && w.next_naps == 3);
    w.naps = BG_NBD_BUSY_NAPS + 9;
    bg_nbd_watch_busy(&w);
    CHECK(w.naps == BG_NBD_BUSY_NAPS + 9);
}

/* The file in /proc that tells what a loop's only thread is doing. */
static int open_state(const bg_nbd_loop *loop)
{
    /* On Linux the number of a thread's clock has the thread's own in it. */
    clockid_t clock;
    char path[64];
    CHECK(pthread_getcpuclockid(loop->threads[0].thread, &clock) == 0);
    snprintf(path, sizeof(path), "/proc/self/task/%d/stat", ~(int)(clock >> 3));
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0);
    return fd;
}

/* Until the thread sleeps. One that watches never does, and while it serves, nothing here makes it wait. */
static void until_asleep(int state)
{
    for (;;) {
        char line[256];
        ssize_t n = pread(state, line, sizeof(line) - 1, 0);
        CHECK(n > 0);
        line[n] = 0;
        const char *name = strrchr(line, ')');
        CHECK(name);
        if (name[2] == 'S')
            return;
        sched_yield();
    }
}

/* A client that asks only when the thread has gone to sleep: every watch is in vain. */
static void asleep(bg_pool *pool, const peer_disk *disk, unsigned rounds)
{
    bg_nbd_loop *loop;
    int sock;
    CHECK(bg_nbd_loop_new(1, pool, &loop) == 0);
    int state = open_state(loop);
    until_asleep(state);
    bg_nbd_conn *conn = peer_connect(loop, disk, 1, &sock);
    bg_nbd_watch model = {.naps = 1, .next_naps = 1};
    for (unsigned i = 0; i < rounds; i++) {
        CHECK(peer_send(sock, i) && peer_receive(sock, i));
        until_asleep(state);
        if (!bg_nbd_watch_naps(&model)) {
            bg_nbd_watch_begin(&model, 0);
            CHECK(!bg_nbd_watch_again(&model, BG_NBD_WATCH, BG_NBD_WATCH));
        }
    }
    bg_nbd_stats stats;
    bg_nbd_loop_stats(loop, &stats);
    CHECK(stats.hits == rounds && stats.wakeups == rounds);
    /* The thread has ended then. */
    bg_nbd_loop_stop(loop);
    CHECK(loop->threads[0].watch.naps == model.naps && loop->threads[0].watch.next_naps == model.next_naps);
    CHECK(rounds < 3000 || model.next_naps == BG_NBD_MOST_NAPS);
    CHECK(peer_ended(loop) == 1);
    bg_nbd_release(conn);
    CHECK(bg_nbd_loop_free(loop) == 0);
    char byte;
    CHECK(recv(sock, &byte, 1, 0) == 0);
    close(sock);
    close(state);
}

void test_nbd_watch(void)
{
    bg_pool *pool;
    rules();
    CHECK(bg_pool_new(1, 1, &pool) == 0);
    peer_disk disk = peer_disk_new();
    /* Ended while it watches for the first time, or before it has begun to, or asleep. */
    for (int i = 0; i < 200; i++) {
        bg_nbd_loop *loop;
        CHECK(bg_nbd_loop_new(1 + i % 3, pool, &loop) == 0);
        for (int j = 0; j < i % 7; j++)
            sched_yield();
        bg_nbd_loop_stop(loop);
        CHECK(bg_nbd_loop_free(loop) == 0);
    }
    for (unsigned rounds = 0; rounds < 12; rounds++)
        asleep(pool, &disk, rounds);
    asleep(pool, &disk, 3100); /* through a thousand naps, and a watch behind them */
    peer_disk_free(&disk);
    bg_pool_free(pool);
}
