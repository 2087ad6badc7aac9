/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* Threads, connections' lives, and what epoll is asked for. */
#define _GNU_SOURCE
#include "nbd_internal.h"

#include "guard.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define EVENTS 64
/* What Python's thread reads or writes itself, bytes. */
#define CALLER_LONGEST (64 << 10)

static int epoll_of(const bg_nbd_conn *conn)
{
    return conn->by_caller ? conn->loop->caller_epoll : conn->thread->epoll;
}

void nbd_watch(bg_nbd_conn *conn)
{
    uint32_t interest = 0;
    bool stalled = conn->stalled && !nbd_admissible(conn, conn->stalled_by);
    if (!conn->ending && !stalled)
        interest |= EPOLLIN;
    /* A writable socket also serves to have the thread come back to input that is here already. */
    if (conn->full || (!conn->ending && !stalled && (conn->stalled || conn->more)))
        interest |= EPOLLOUT;
    if (interest != conn->interest) {
        struct epoll_event event = {.events = interest, .data.ptr = conn};
        epoll_ctl(epoll_of(conn), EPOLL_CTL_MOD, conn->fd, &event);
        conn->interest = interest;
    }
}

void nbd_unwatch(bg_nbd_conn *conn)
{
    epoll_ctl(epoll_of(conn), EPOLL_CTL_DEL, conn->fd, NULL);
}

static int watch_first(bg_nbd_conn *conn, bool by_caller)
{
    conn->by_caller = by_caller;
    conn->longest = by_caller ? CALLER_LONGEST : UINT32_MAX;
    conn->source.aio = NULL;
    struct epoll_event event = {.events = conn->interest, .data.ptr = conn};
    return epoll_ctl(epoll_of(conn), EPOLL_CTL_ADD, conn->fd, &event) < 0 ? -errno : 0;
}

void nbd_move(bg_nbd_conn *conn, bool to_caller)
{
    nbd_unwatch(conn);
    int ret = watch_first(conn, to_caller);
    if (ret < 0)
        nbd_close(conn, ret);
}

/* No thread can have it in hand any more. */
static void free_conn(bg_nbd_conn *conn)
{
    while (atomic_load(&conn->visitors))
        sched_yield();
    pthread_mutex_destroy(&conn->lock);
    free(conn);
}

/* Between two waits no event names a connection that has been released. */
static void free_released(nbd_thread *thread)
{
    pthread_mutex_lock(&thread->lock);
    bg_nbd_conn *conn = thread->released;
    thread->released = NULL;
    pthread_mutex_unlock(&thread->lock);
    for (bg_nbd_conn *next; conn; conn = next) {
        next = conn->next_released;
        free_conn(conn);
    }
}

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

/* Wait for events, as nbd_watch.h says. *watched: until they came, in vain at first, and nobody else wanted the processor. */
static int await(nbd_thread *thread, struct epoll_event *events, bool *watched)
{
    bg_nbd_watch *watch = &thread->watch;
    if (!bg_nbd_watch_naps(watch)) {
        int64_t offered = now();
        bg_nbd_watch_begin(watch, offered);
        do {
            int n = epoll_wait(thread->epoll, events, EVENTS, 0);
            if (n != 0) {
                *watched = watch->looked && !watch->shared;
                bg_nbd_watch_found(watch);
                nbd_note_crowd(thread, watch->shared);
                return n;
            }
            offered = now();
            sched_yield();
        } while (bg_nbd_watch_again(watch, offered, now()));
    }
    *watched = false;
    int n = epoll_wait(thread->epoll, events, EVENTS, -1);
    nbd_note_crowd(thread, false);
    return n;
}

void nbd_use_aio(bg_nbd_conn *conn)
{
    nbd_thread *thread = conn->thread;
    if (!thread->has_aio) {
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = thread};
        thread->has_aio = true;
        if (bg_aio_new(BG_NBD_MAX_REQUESTS, &thread->aio) == 0 &&
            epoll_ctl(thread->epoll, EPOLL_CTL_ADD, bg_aio_eventfd(thread->aio), &event) < 0) {
            bg_aio_free(thread->aio);
            thread->aio = NULL;
        }
    }
    conn->source.aio = thread->aio;
}

/* Reply to what devices have done. */
static void reap(nbd_thread *thread)
{
    thread->reaping = true;
    bg_aio_reap(thread->aio);
    thread->reaping = false;
    for (bg_nbd_conn *conn; (conn = thread->kicked);) {
        thread->kicked = conn->next_kicked;
        conn->is_kicked = false;
        bg_nbd_kick(conn);
    }
}

/* Whether a connection had more to do than to answer one short request. `thread`: NULL, Python's. */
static bool serve(bg_nbd_loop *loop, nbd_thread *thread, const struct epoll_event *events, int n, bool watched)
{
    bool busy = false;
    atomic_fetch_add_explicit(&loop->counters.wakeups, 1, memory_order_relaxed);
    for (int i = 0; i < n; i++) {
        bg_nbd_conn *conn = events[i].data.ptr;
        if (thread && events[i].data.ptr == thread) {
            reap(thread);
        } else if (conn) {
            pthread_mutex_lock(&conn->lock);
            if (thread && conn->away && nbd_give_away(conn, events[i].events)) {
                /* Who has it now may be done with it at once. */
                atomic_fetch_add(&conn->visitors, 1);
                nbd_leave(conn);
                atomic_fetch_sub(&conn->visitors, 1);
                continue;
            }
            conn->alone = n == 1;
            conn->sleeps = watched && n == 1;
            conn->probing = thread && nbd_probes(conn);
            nbd_turn(conn, events[i].events);
            busy |= conn->busy;
            nbd_leave(conn);
        }
    }
    return busy;
}

static void *run(void *arg)
{
    nbd_thread *thread = arg;
    while (!atomic_load(&thread->stop)) {
        struct epoll_event events[EVENTS];
        bool watched;
        int n = await(thread, events, &watched);
        if (serve(thread->loop, thread, events, n, watched))
            bg_nbd_watch_busy(&thread->watch);
        free_released(thread);
    }
    if (thread->aio)
        bg_aio_drain(thread->aio);
    return NULL;
}

void bg_nbd_poll(bg_nbd_loop *loop)
{
    struct epoll_event events[EVENTS];
    serve(loop, NULL, events, epoll_wait(loop->caller_epoll, events, EVENTS, 0), false);
}

int bg_nbd_loop_pollfd(const bg_nbd_loop *loop)
{
    return loop->caller_epoll;
}

static int start_thread(bg_nbd_loop *loop, nbd_thread *thread)
{
    thread->loop = loop;
    thread->epoll = epoll_create1(EPOLL_CLOEXEC);
    thread->wakeup = thread->epoll < 0 ? -1 : eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN};
    if (thread->wakeup < 0 || epoll_ctl(thread->epoll, EPOLL_CTL_ADD, thread->wakeup, &event) < 0) {
        int ret = -errno;
        close(thread->wakeup);
        close(thread->epoll);
        return ret;
    }
    pthread_mutex_init(&thread->lock, NULL);
    int ret = -pthread_create(&thread->thread, NULL, run, thread);
    if (ret == 0)
        pthread_setname_np(thread->thread, "bg-nbd");
    if (ret < 0) {
        close(thread->wakeup);
        close(thread->epoll);
    }
    return ret;
}

int bg_nbd_loop_new(int threads, bg_pool *pool, bg_nbd_loop **out)
{
    if (threads < 1 || threads > BG_NBD_MAX_THREADS)
        return -EINVAL;
    bg_nbd_loop *loop = calloc(1, sizeof(*loop) + (size_t)threads * sizeof(loop->threads[0]));
    if (!loop)
        return -ENOMEM;
    loop->pool = pool;
    pthread_mutex_init(&loop->lock, NULL);
    loop->buffers = bg_buffers_new();
    loop->pipes = bg_pipes_new(BG_NBD_MAX_PIPES);
    loop->caller_epoll = epoll_create1(EPOLL_CLOEXEC);
    int ret = loop->caller_epoll < 0 ? -errno : loop->buffers && loop->pipes ? bg_faults_new(&loop->faults) : -ENOMEM;
    sigset_t before;
    bg_guard_block_signals(&before);
    while (ret == 0 && loop->nthreads < threads) {
        ret = start_thread(loop, &loop->threads[loop->nthreads]);
        if (ret == 0)
            loop->nthreads++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (ret < 0) {
        bg_nbd_loop_stop(loop);
        bg_nbd_loop_free(loop);
        return ret;
    }
    *out = loop;
    return 0;
}

void bg_nbd_loop_stop(bg_nbd_loop *loop)
{
    /* First all of them, as they give connections to each other. */
    for (int i = 0; i < loop->nthreads; i++) {
        nbd_thread *thread = &loop->threads[i];
        if (!atomic_exchange(&thread->stop, true)) {
            eventfd_write(thread->wakeup, 1);
            pthread_join(thread->thread, NULL);
        }
    }
    for (int i = 0; i < loop->nthreads; i++) {
        for (bg_nbd_conn *conn = loop->threads[i].first; conn; conn = conn->next)
            bg_nbd_abort(conn);
        for (bg_nbd_conn *conn = loop->threads[i].first; conn; conn = conn->next)
            bg_source_wait(&conn->source);
    }
}

int bg_nbd_loop_free(bg_nbd_loop *loop)
{
    for (int i = 0; i < loop->nthreads; i++)
        if (loop->threads[i].first)
            return -EBUSY;
    for (int i = 0; i < loop->nthreads; i++) {
        nbd_thread *thread = &loop->threads[i];
        free_released(thread);
        bg_aio_free(thread->aio);
        close(thread->wakeup);
        close(thread->epoll);
        pthread_mutex_destroy(&thread->lock);
    }
    for (nbd_request *next; loop->spare_requests; loop->spare_requests = next) {
        next = loop->spare_requests->next;
        free(loop->spare_requests);
    }
    bg_buffers_free(loop->buffers);
    bg_pipes_free(loop->pipes);
    bg_faults_free(loop->faults);
    close(loop->caller_epoll);
    pthread_mutex_destroy(&loop->lock);
    free(loop);
    return 0;
}

int bg_nbd_loop_eventfd(const bg_nbd_loop *loop)
{
    return bg_faults_eventfd(loop->faults);
}

int64_t bg_nbd_take(bg_nbd_loop *loop, bg_fault *out, int64_t max)
{
    return bg_faults_take(loop->faults, out, max);
}

void bg_nbd_loop_stats(bg_nbd_loop *loop, bg_nbd_stats *out)
{
    nbd_counters *c = &loop->counters;
    *out = (bg_nbd_stats){
        .requests = atomic_load(&c->requests),
        .hits = atomic_load(&c->hits),
        .blocked = atomic_load(&c->blocked),
        .piped = atomic_load(&c->piped),
        .stored = atomic_load(&c->stored),
        .faults = atomic_load(&c->faults),
        .refused = atomic_load(&c->refused),
        .received = atomic_load(&c->received),
        .sent = atomic_load(&c->sent),
        .receives = atomic_load(&c->receives),
        .sends = atomic_load(&c->sends),
        .wakeups = atomic_load(&c->wakeups),
        .moved = atomic_load(&c->moved),
    };
}

static bool is_local(int fd)
{
    int domain = 0;
    socklen_t size = sizeof(domain);
    return getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) == 0 && domain == AF_UNIX;
}

int bg_nbd_conn_new(bg_nbd_loop *loop, int fd, int64_t id, const bg_nbd_settings *settings, bg_map *map,
                    bg_nbd_conn **out)
{
    bg_nbd_conn *conn = calloc(1, sizeof(*conn));
    if (!conn || !(conn->input = malloc(INPUT))) {
        free(conn);
        return -ENOMEM;
    }
    nbd_thread *thread = nbd_next_thread(loop);
    conn->source = (bg_source){.map = map,
                               .pool = loop->pool,
                               .faults = loop->faults,
                               .id = id,
                               .done = nbd_done,
                               .begun = nbd_announce,
                               .step = BG_NBD_CACHE_STEP};
    conn->ended = (bg_request){.source = &conn->source, .kind = BG_REQUEST_ENDED};
    conn->loop = loop;
    conn->settings = *settings;
    conn->fd = fd;
    conn->limit = INPUT;
    conn->local = is_local(fd);
    conn->last_fault = &conn->faults;
    conn->last_blocked = &conn->blocked;
    conn->last_heavy = &conn->heavy;
    conn->last_ready = &conn->ready;
    conn->last_output = &conn->output;
    conn->interest = EPOLLIN;
    pthread_mutex_init(&conn->lock, NULL);
    nbd_join(thread, conn);
    *out = conn;
    /* From here on the thread may have it in hand. */
    int ret = watch_first(conn, map == NULL);
    if (ret < 0) {
        free(conn->input);
        bg_nbd_release(conn);
    }
    return ret;
}

void bg_nbd_release(bg_nbd_conn *conn)
{
    nbd_part(conn, true);
}
