/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Which thread serves which connection: first the one with the fewest, then the one whose processor its client shares.
 *
 * A thread gives a connection away (nbd_home.h says when) when its next request is there, before it looks at it: nothing of the
 * connection is under way then, and no event in hand names it any more.
 */
#define _GNU_SOURCE
#include "nbd_internal.h"

#include <sched.h>
#include <sys/resource.h>

/* A thread shares its processor as long as clients had it in one of so many turns. */
#define CROWD 64
/* So many connections that are away are believed after one that is at home: where none ever is, the kernel works otherwise. */
#define TRUST 64

nbd_thread *nbd_next_thread(bg_nbd_loop *loop)
{
    unsigned turn = atomic_fetch_add(&loop->turn, 1), n = (unsigned)loop->nthreads;
    nbd_thread *best = &loop->threads[turn % n];
    for (unsigned i = 1; i < n; i++) {
        nbd_thread *thread = &loop->threads[(turn + i) % n];
        if (atomic_load(&thread->connections) < atomic_load(&best->connections))
            best = thread;
    }
    return best;
}

void nbd_join(nbd_thread *thread, bg_nbd_conn *conn)
{
    pthread_mutex_lock(&thread->lock);
    conn->thread = thread;
    conn->next = thread->first;
    conn->prev = &thread->first;
    if (conn->next)
        conn->next->prev = &conn->next;
    thread->first = conn;
    pthread_mutex_unlock(&thread->lock);
    atomic_fetch_add(&thread->connections, 1);
}

void nbd_part(bg_nbd_conn *conn, bool for_good)
{
    nbd_thread *thread = conn->thread;
    pthread_mutex_lock(&thread->lock);
    *conn->prev = conn->next;
    if (conn->next)
        conn->next->prev = conn->prev;
    if (for_good) {
        conn->next_released = thread->released;
        thread->released = conn;
    }
    pthread_mutex_unlock(&thread->lock);
    atomic_fetch_sub(&thread->connections, 1);
}

void nbd_note_crowd(nbd_thread *thread, bool shared)
{
    int crowd = atomic_load_explicit(&thread->crowd, memory_order_relaxed);
    if (shared || crowd)
        atomic_store_explicit(&thread->crowd, shared ? CROWD : crowd - 1, memory_order_relaxed);
    atomic_store_explicit(&thread->processor, sched_getcpu(), memory_order_relaxed);
}

bool nbd_probes(bg_nbd_conn *conn)
{
    nbd_thread *thread = conn->thread;
    return conn->loop->nthreads > 1 && atomic_load_explicit(&thread->crowd, memory_order_relaxed) &&
           bg_nbd_home_asks(&conn->home);
}

long nbd_switches(void)
{
    struct rusage usage;
    getrusage(RUSAGE_THREAD, &usage);
    return usage.ru_nivcsw;
}

void nbd_probed(bg_nbd_conn *conn, bool met)
{
    nbd_thread *thread = conn->thread;
    switch (bg_nbd_home_told(&conn->home, met, (unsigned)conn->loop->nthreads)) {
    case BG_NBD_HOME:
        thread->trust = TRUST;
        break;
    case BG_NBD_AWAY:
        conn->away = thread->trust > 0;
        thread->trust -= conn->away;
        break;
    case BG_NBD_UNCLEAR:
        break;
    }
}

/* The next to which the client of a connection of this thread may be nearer. */
static nbd_thread *nearer(nbd_thread *thread)
{
    bg_nbd_loop *loop = thread->loop;
    int processor = atomic_load_explicit(&thread->processor, memory_order_relaxed);
    for (int i = 0; i < loop->nthreads; i++) {
        nbd_thread *other = &loop->threads[thread->given++ % (unsigned)loop->nthreads];
        if (atomic_load_explicit(&other->crowd, memory_order_relaxed) &&
            atomic_load_explicit(&other->processor, memory_order_relaxed) != processor)
            return other;
    }
    return NULL;
}

/* A request is there, and nothing else to be done for the connection. */
static bool is_idle(const bg_nbd_conn *conn, uint32_t events)
{
    return events == EPOLLIN && conn->interest == EPOLLIN && !conn->by_caller && !conn->closed && !conn->ending &&
           !conn->requests && !conn->source.aio;
}

bool nbd_give_away(bg_nbd_conn *conn, uint32_t events)
{
    if (!is_idle(conn, events))
        return false;
    conn->away = false;
    nbd_thread *other = nearer(conn->thread);
    struct epoll_event event = {.events = conn->interest, .data.ptr = conn};
    /* From here on the other thread may wait for the connection's lock. */
    if (!other || epoll_ctl(other->epoll, EPOLL_CTL_ADD, conn->fd, &event) < 0)
        return false;
    nbd_unwatch(conn);
    nbd_part(conn, false);
    nbd_join(other, conn);
    conn->counted.moved++;
    return true;
}
