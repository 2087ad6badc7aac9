/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* Which thread serves which connection: the rules, with threads that have ended, then threads that give to each other. */
#define _GNU_SOURCE
#include "driver.h"
#include "nbd_internal.h"
#include "nbd_peer.h"

#include <sched.h>
#include <unistd.h>

#define CONNS 6
#define CLIENTS 5
#define REQUESTS 200 /* of a connection */
#define MOVED 200    /* at least, before the clients stop */

static int members(const nbd_thread *thread)
{
    int n = 0;
    for (bg_nbd_conn *const *at = &thread->first; *at; at = &(*at)->next, n++)
        CHECK((*at)->thread == thread && (*at)->prev == at);
    CHECK(n == thread->connections);
    return n;
}

/* What `met` of BG_NBD_PROBES replies say, after all that are not asked about. */
static enum bg_nbd_verdict verdict(bg_nbd_home *h, int met, unsigned threads, unsigned pause)
{
    for (unsigned i = 0; i < pause; i++)
        CHECK(!bg_nbd_home_asks(h));
    for (int i = 0; i < BG_NBD_PROBES - 1; i++) {
        CHECK(bg_nbd_home_asks(h));
        CHECK(bg_nbd_home_told(h, i < met, threads) == BG_NBD_UNCLEAR);
    }
    CHECK(bg_nbd_home_asks(h));
    return bg_nbd_home_told(h, met == BG_NBD_PROBES, threads);
}

static void where_clients_are(void)
{
    bg_nbd_home h = {0};
    /* Away: asked at once by each of three threads, then less and less often. */
    CHECK(verdict(&h, 0, 3, 0) == BG_NBD_AWAY);
    CHECK(verdict(&h, 1, 3, 0) == BG_NBD_AWAY);
    CHECK(verdict(&h, 0, 3, 0) == BG_NBD_AWAY);
    unsigned pause = BG_NBD_AWAY_PAUSE;
    for (int i = 0; i < 20; i++) {
        CHECK(verdict(&h, 1, 3, pause) == BG_NBD_AWAY);
        pause = i < BG_NBD_MOST_DOUBLINGS ? pause * 2 : pause;
    }
    CHECK(pause == BG_NBD_AWAY_PAUSE << BG_NBD_MOST_DOUBLINGS);
    /* Unclear: that it was nowhere is not forgotten, as it is when it was at home. */
    CHECK(verdict(&h, BG_NBD_PROBES / 2 - 1, 3, pause) == BG_NBD_UNCLEAR);
    CHECK(verdict(&h, 0, 3, BG_NBD_HOME_PAUSE) == BG_NBD_AWAY);
    CHECK(verdict(&h, BG_NBD_PROBES / 2, 3, pause) == BG_NBD_HOME);
    CHECK(verdict(&h, BG_NBD_PROBES, 3, BG_NBD_HOME_PAUSE) == BG_NBD_HOME);
    CHECK(verdict(&h, 0, 3, BG_NBD_HOME_PAUSE) == BG_NBD_AWAY);
    CHECK(verdict(&h, 0, 3, 0) == BG_NBD_AWAY);
}

/* Whose requests are there, of a thread. */
static int waiting(const nbd_thread *thread, const bg_nbd_conn *conn)
{
    struct epoll_event events[CONNS];
    int n = epoll_wait(thread->epoll, events, CONNS, 0), found = 0;
    for (int i = 0; i < n; i++)
        found += events[i].data.ptr == conn;
    return found;
}

static void stays(bg_nbd_conn *conn, uint32_t events)
{
    nbd_thread *thread = conn->thread;
    int before = members(thread);
    conn->away = true;
    CHECK(!nbd_give_away(conn, events) && conn->thread == thread && members(thread) == before);
}

static void goes(bg_nbd_conn *conn, nbd_thread *to)
{
    nbd_thread *from = conn->thread;
    int here = members(from), there = members(to);
    uint64_t moved = conn->counted.moved;
    conn->away = true;
    CHECK(nbd_give_away(conn, EPOLLIN) && conn->thread == to && !conn->away && conn->counted.moved == moved + 1);
    CHECK(members(from) == here - 1 && members(to) == there + 1 && waiting(to, conn) && !waiting(from, conn));
}

/* Threads that have ended: nothing happens by itself. */
static void who_gives_what(bg_pool *pool, const peer_disk *disk)
{
    bg_nbd_loop *loop;
    bg_nbd_conn *conn[CONNS];
    int sock[CONNS];
    CHECK(bg_nbd_loop_new(3, pool, &loop) == 0);
    bg_nbd_loop_stop(loop);
    nbd_thread *a = &loop->threads[0], *b = &loop->threads[1], *c = &loop->threads[2];
    /* In turn, as long as all have as many. */
    for (int i = 0; i < CONNS - 1; i++) {
        conn[i] = peer_connect(loop, disk, i, &sock[i]);
        CHECK(conn[i]->thread == &loop->threads[i % 3] && peer_send(sock[i], 7));
    }
    /* To who shares its processor with clients, and is on another, whatever they have seen before they ended. */
    a->crowd = b->crowd = c->crowd = 0;
    a->processor = b->processor = 0;
    c->processor = 1;
    stays(conn[0], EPOLLIN);
    b->crowd = c->crowd = 1;
    c->processor = 0;
    stays(conn[0], EPOLLIN);
    c->processor = 1;
    goes(conn[0], c);
    /* Each gives to the others in turn. */
    b->processor = 2;
    a->crowd = 1;
    goes(conn[0], a);
    goes(conn[3], b);
    goes(conn[0], c);
    goes(conn[0], b);
    goes(conn[0], a);
    /* Not while there is something else to be done for it, or by it. */
    stays(conn[0], EPOLLIN | EPOLLHUP);
    bool *busy[] = {&conn[0]->closed, &conn[0]->ending, &conn[0]->by_caller};
    for (int i = 0; i < 3; i++) {
        *busy[i] = true;
        stays(conn[0], EPOLLIN);
        *busy[i] = false;
    }
    conn[0]->interest = EPOLLIN | EPOLLOUT;
    stays(conn[0], EPOLLIN);
    conn[0]->interest = EPOLLIN;
    conn[0]->requests = 1;
    stays(conn[0], EPOLLIN);
    conn[0]->requests = 0;
    conn[0]->source.aio = (bg_aio *)conn;
    stays(conn[0], EPOLLIN);
    conn[0]->source.aio = NULL;
    /* New ones go where there are fewest. */
    CHECK(members(a) == 1 && members(b) == 3 && members(c) == 1);
    goes(conn[1], c);
    CHECK(members(a) == 1 && members(b) == 2 && members(c) == 2);
    conn[CONNS - 1] = peer_connect(loop, disk, CONNS - 1, &sock[CONNS - 1]);
    CHECK(conn[CONNS - 1]->thread == a);
    /* That a client is away is believed after another was at home, and so often only. */
    bg_nbd_conn *home = conn[CONNS - 1], *away = conn[0];
    for (int i = 0; i < 3 * BG_NBD_PROBES; i++) {
        away->away = false;
        nbd_probed(away, false);
        CHECK(!away->away);
    }
    for (int i = 0; i < BG_NBD_PROBES; i++)
        nbd_probed(home, true);
    int trusted = 0;
    for (int i = 0; i < 1000; i++) {
        away->away = false;
        nbd_probed(away, false);
        trusted += away->away;
    }
    CHECK(!home->away && trusted == 64);
    /* Asked only where a thread shares its processor, which it counts as doing for so many turns. */
    nbd_note_crowd(a, true);
    home->home.pause = 0;
    for (int i = 0; i < 64; i++) {
        CHECK(a->crowd == 64 - i && nbd_probes(home));
        nbd_note_crowd(a, false);
    }
    nbd_note_crowd(a, false);
    CHECK(a->crowd == 0 && !nbd_probes(home));
    for (int i = 0; i < CONNS; i++)
        bg_nbd_abort(conn[i]);
    for (int i = 0; i < CONNS; i++) {
        bg_nbd_release(conn[peer_ended(loop)]);
        close(sock[i]);
    }
    CHECK(members(a) == 0 && members(b) == 0 && members(c) == 0);
    CHECK(bg_nbd_loop_free(loop) == 0);
}

static bg_nbd_loop *shared;
static peer_disk *shared_disk;
static bg_nbd_conn *conns[CLIENTS];
static atomic_bool over, connected[CLIENTS];
static atomic_int next[CLIENTS]; /* what the client does after its connection: 0 not known yet */
enum { AGAIN = 1, STOP };
static cpu_set_t both;

static void run_on(int which)
{
    cpu_set_t one;
    CPU_ZERO(&one);
    for (int i = 0, n = 0; i < CPU_SETSIZE; i++)
        if (CPU_ISSET(i, &both) && n++ == which)
            CPU_SET(i, &one);
    CHECK(sched_setaffinity(0, sizeof(one), &one) == 0);
}

/* As if its client had turned out to be elsewhere, and all threads were where clients are. Only what has ended is freed. */
static void send_away(bg_nbd_conn *conn)
{
    for (int i = 0; i < shared->nthreads; i++)
        shared->threads[i].crowd = 1000;
    CHECK(pthread_mutex_lock(&conn->lock) == 0);
    conn->away = true;
    nbd_leave(conn);
}

/* Asks one thing at a time, now on one processor and now on the other, by one connection after the other. */
static void *client(void *arg)
{
    int id = (int)(intptr_t)arg, sock;
    for (uint64_t turn = (uint64_t)id; next[id] != STOP; turn++) {
        next[id] = 0;
        run_on((int)(turn / 2 % 2));
        conns[id] = peer_connect(shared, shared_disk, id, &sock);
        connected[id] = true;
        for (uint64_t i = 0; i < REQUESTS; i++) {
            if (i % 8 == 7)
                send_away(conns[id]);
            if (!peer_send(sock, i) || !peer_receive(sock, i)) {
                CHECK(over);
                break;
            }
        }
        close(sock);
        while (!next[id])
            sched_yield();
    }
    return NULL;
}

/* `rest`: clients are in the middle of something when the loop stops. */
static void give_to_each_other(bg_pool *pool, bool rest)
{
    pthread_t thread[CLIENTS];
    bg_nbd_stats stats;
    int left = CLIENTS;
    over = false;
    CHECK(bg_nbd_loop_new(2, pool, &shared) == 0);
    for (intptr_t i = 0; i < CLIENTS; i++) {
        next[i] = 0;
        CHECK(pthread_create(&thread[i], NULL, client, (void *)i) == 0);
    }
    do {
        int64_t id = peer_ended(shared);
        bg_nbd_release(conns[id]);
        connected[id] = false;
        bg_nbd_loop_stats(shared, &stats);
        if (stats.moved >= MOVED && !over) {
            for (int i = 0; i < CLIENTS; i++)
                while (i != id && !connected[i])
                    sched_yield();
            over = true;
            if (rest)
                bg_nbd_loop_stop(shared);
        }
        left -= over;
        next[id] = over ? STOP : AGAIN;
    } while (left > 0);
    for (int i = 0; i < CLIENTS; i++)
        CHECK(pthread_join(thread[i], NULL) == 0);
    bg_nbd_loop_stop(shared);
    CHECK(members(&shared->threads[0]) == 0 && members(&shared->threads[1]) == 0);
    CHECK(bg_nbd_loop_free(shared) == 0);
}

void test_nbd_threads(void)
{
    bg_pool *pool;
    CHECK(bg_pool_new(1, 1, &pool) == 0);
    peer_disk disk = peer_disk_new();
    where_clients_are();
    who_gives_what(pool, &disk);
    cpu_set_t all;
    CHECK(sched_getaffinity(0, sizeof(all), &all) == 0);
    CPU_ZERO(&both);
    for (int i = 0; i < CPU_SETSIZE && CPU_COUNT(&both) < 2; i++)
        if (CPU_ISSET(i, &all))
            CPU_SET(i, &both);
    /* On one processor nobody gives anything. */
    if (CPU_COUNT(&both) == 2) {
        shared_disk = &disk;
        CHECK(sched_setaffinity(0, sizeof(both), &both) == 0);
        for (int i = 0; i < 4; i++)
            give_to_each_other(pool, i % 2);
        CHECK(sched_setaffinity(0, sizeof(all), &all) == 0);
    }
    peer_disk_free(&disk);
    bg_pool_free(pool);
}
