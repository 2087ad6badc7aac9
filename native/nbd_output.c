/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* Replies of a connection, and its end. Runs in any thread. */
#define _GNU_SOURCE
#include "nbd_internal.h"

#include "zero.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define PIECES 256
/* A read of zeroes at least this long is answered without them (structured replies). */
#define HOLE_WORTH (32 << 10)

/* Long writes received into memory before a pipe is tried again, when one could not be done from there: more each time. */
#define LEAST_UNPIPED 8
#define MOST_UNPIPED 512

void nbd_give_pipe(nbd_request *r)
{
    if (!r->pipe)
        return;
    bg_nbd_conn *conn = r->conn;
    if (!r->base.pipe) {
        conn->pause = conn->pause == 0 ? LEAST_UNPIPED : conn->pause < MOST_UNPIPED ? 2 * conn->pause : MOST_UNPIPED;
        conn->unpiped = conn->pause;
    }
    bg_pipes_give(conn->loop->pipes, r->pipe);
    r->pipe = r->base.pipe = NULL;
}

void nbd_forget(nbd_request *r)
{
    bg_nbd_conn *conn = r->conn;
    nbd_give_pipe(r);
    if (r->buffer)
        bg_buffers_give(conn->loop->buffers, r->buffer, r->cost);
    if (r->head != r->small)
        free(r->head);
    conn->bytes -= r->cost;
    conn->requests--;
    bg_nbd_loop *loop = conn->loop;
    pthread_mutex_lock(&loop->lock);
    r->next = loop->spare_requests;
    loop->spare_requests = r;
    pthread_mutex_unlock(&loop->lock);
}

static void reply(nbd_request *r)
{
    bg_nbd_conn *conn = r->conn;
    if (!r->head)
        nbd_close(conn, -ENOMEM);
    if (conn->closed) {
        nbd_forget(r);
        return;
    }
    if (nbd_announced(conn))
        conn->output_bytes -= conn->sent;
    r->next = NULL;
    *conn->last_output = r;
    conn->last_output = &r->next;
    conn->output_bytes += r->head_size + r->payload_size;
}

void nbd_reply_rest(nbd_request *r, size_t sent)
{
    bg_nbd_conn *conn = r->conn;
    conn->sent = sent;
    conn->full = true;
    reply(r);
}

void nbd_pack_read(nbd_request *r)
{
    const bg_request *b = &r->base;
    r->head_size = (uint32_t)(r->conn->settings.structured ? bg_nbd_pack_data(r->head, b->tag, b->offset, b->length)
                                                           : bg_nbd_pack_simple(r->head, b->tag));
}

void nbd_answer(nbd_request *r)
{
    const bg_request *b = &r->base;
    if (b->kind != BG_REQUEST_READ) {
        r->head_size = (uint32_t)bg_nbd_pack_simple(r->head, b->tag);
    } else if (r->conn->settings.structured && b->length >= HOLE_WORTH && !(b->flags & BG_NBD_DF) && bg_is_zero(b->buf, b->length)) {
        r->head_size = (uint32_t)bg_nbd_pack_hole(r->head, b->tag, b->offset, b->length);
    } else {
        nbd_pack_read(r);
        r->payload_size = b->length;
    }
    reply(r);
}

static void set_head(nbd_request *r, const void *head, size_t size)
{
    if (size > BG_NBD_MAX_HEAD)
        r->head = malloc(size);
    if (r->head)
        memcpy(r->head, head, size);
    r->head_size = (uint32_t)size;
}

void nbd_refuse(nbd_request *r)
{
    const bg_request *b = &r->base;
    bg_nbd_header header = {b->tag, b->offset, b->length, b->flags, b->command};
    unsigned char head[BG_NBD_MAX_REFUSAL];
    set_head(r, head, bg_nbd_pack_refusal(head, &r->conn->settings, &header, r->refusal));
    r->conn->counted.refused++;
    reply(r);
}

/* What is to be sent, from the first byte not sent yet. */
static size_t gather(const bg_nbd_conn *conn, struct iovec iov[PIECES], size_t *total)
{
    size_t n = 0, skip = conn->sent;
    *total = 0;
    for (const nbd_request *r = conn->output; r && n + 2 <= PIECES; r = r->next) {
        struct iovec parts[2] = {{r->head, r->head_size}, {r->base.buf, r->payload_size}};
        for (int i = 0; i < 2; i++) {
            if (skip >= parts[i].iov_len) {
                skip -= parts[i].iov_len;
                continue;
            }
            iov[n] = (struct iovec){(char *)parts[i].iov_base + skip, parts[i].iov_len - skip};
            *total += iov[n++].iov_len;
            skip = 0;
        }
    }
    return n;
}

static void took(bg_nbd_conn *conn, size_t sent)
{
    conn->output_bytes -= sent;
    sent += conn->sent;
    nbd_request *r;
    while ((r = conn->output) && sent >= (size_t)r->head_size + r->payload_size) {
        sent -= (size_t)r->head_size + r->payload_size;
        conn->output = r->next;
        nbd_forget(r);
    }
    if (!r)
        conn->last_output = &conn->output;
    conn->sent = sent;
}

static void add(atomic_uint_fast64_t *counter, uint64_t more)
{
    if (more)
        atomic_fetch_add_explicit(counter, more, memory_order_relaxed);
}

void nbd_count(bg_nbd_conn *conn)
{
    nbd_counters *all = &conn->loop->counters;
    const bg_nbd_stats *own = &conn->counted;
    add(&all->requests, own->requests);
    add(&all->hits, own->hits);
    add(&all->blocked, own->blocked);
    add(&all->piped, own->piped);
    add(&all->stored, own->stored);
    add(&all->faults, own->faults);
    add(&all->refused, own->refused);
    add(&all->received, own->received);
    add(&all->sent, own->sent);
    add(&all->receives, own->receives);
    add(&all->sends, own->sends);
    add(&all->moved, own->moved);
    conn->counted = (bg_nbd_stats){0};
}

void nbd_flush(bg_nbd_conn *conn)
{
    conn->full = false;
    /* First, so that who has got a reply finds its request counted. */
    nbd_count(conn);
    while (conn->output) {
        struct iovec iov[PIECES];
        size_t total;
        struct msghdr message = {.msg_iov = iov};
        message.msg_iovlen = gather(conn, iov, &total);
        bool probing = conn->probing && conn->requests == 1 && !conn->sent;
        long before = probing ? nbd_switches() : 0;
        ssize_t sent = sendmsg(conn->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0 && errno != EAGAIN) {
            nbd_close(conn, -errno);
            return;
        }
        if (sent >= 0) {
            conn->counted.sends++;
            conn->counted.sent += (uint64_t)sent;
            if (probing)
                nbd_probed(conn, nbd_switches() != before);
            took(conn, (size_t)sent);
        }
        if (sent < 0 || (size_t)sent < total) {
            conn->full = true;
            return;
        }
    }
}

void nbd_close(bg_nbd_conn *conn, int64_t why)
{
    if (conn->closed)
        return;
    conn->closed = conn->ending = true;
    conn->error = why;
    nbd_unwatch(conn);
    close(conn->fd);
    conn->fd = -1;
    for (nbd_request *r; (r = conn->output);) {
        conn->output = r->next;
        nbd_forget(r);
    }
    conn->last_output = &conn->output;
    conn->output_bytes = conn->sent = 0;
    if (conn->writing)
        nbd_forget(conn->writing);
    if (conn->refused)
        nbd_forget(conn->refused);
    conn->writing = conn->refused = NULL;
    conn->start = conn->end = 0;
    free(conn->input);
    conn->input = NULL;
}

/* Replies to what other threads have completed, oldest first. */
static void take_posted(bg_nbd_conn *conn)
{
    nbd_request *r = atomic_exchange(&conn->posted, NULL), *first = NULL;
    for (nbd_request *next; r; r = next) {
        next = r->next;
        r->next = first;
        first = r;
    }
    for (nbd_request *next; first; first = next) {
        next = first->next;
        if (first->head_size) {
            conn->counted.faults++;
            reply(first);
        } else {
            conn->counted.hits++;
            conn->counted.blocked++;
            nbd_answer(first);
        }
    }
}

void nbd_attend(bg_nbd_conn *conn)
{
    take_posted(conn);
    unsigned wanted = atomic_exchange(&conn->wanted, 0);
    if (wanted & WANT_ABORT)
        nbd_close(conn, 0);
    if (wanted & WANT_SHUTDOWN)
        conn->shutdown = true;
    if (conn->closed)
        return;
    if (!conn->full)
        nbd_flush(conn);
    if (!conn->closed && (conn->ending || conn->shutdown) && !conn->requests)
        nbd_close(conn, 0);
}

void nbd_leave(bg_nbd_conn *conn)
{
    for (;;) {
        nbd_attend(conn);
        conn->probing = false;
        nbd_count(conn);
        if (!conn->closed) {
            nbd_watch(conn);
        } else if (!conn->requests && !conn->reported) {
            conn->reported = true;
            conn->ended.error = conn->error;
            pthread_mutex_unlock(&conn->lock);
            bg_faults_post(conn->loop->faults, &conn->ended, true);
            return;
        }
        pthread_mutex_unlock(&conn->lock);
        /*
         * Who left news before these two looks is seen by them; who leaves some after them finds the lock free. Both
         * are exchanges, as is the leaving, so that there is no third case.
         */
        bool news = atomic_fetch_or(&conn->wanted, 0) != 0;
        nbd_request *posted = NULL;
        news |= !atomic_compare_exchange_strong(&conn->posted, &posted, NULL);
        if (!news || pthread_mutex_trylock(&conn->lock) != 0)
            return;
    }
}

static void post(nbd_request *r)
{
    bg_nbd_conn *conn = r->conn;
    nbd_request *first = atomic_load(&conn->posted);
    do
        r->next = first;
    while (!atomic_compare_exchange_weak(&conn->posted, &first, r));
}

void bg_nbd_kick(bg_nbd_conn *conn)
{
    if (pthread_mutex_trylock(&conn->lock) == 0)
        nbd_leave(conn);
}

/* The thread that reaps sends the replies of all that has ended together. It does not free connections meanwhile. */
static void kick_later(bg_nbd_conn *conn)
{
    if (conn->is_kicked)
        return;
    conn->is_kicked = true;
    conn->next_kicked = conn->thread->kicked;
    conn->thread->kicked = conn;
}

void nbd_done(bg_request *request)
{
    nbd_request *r = request_of(request);
    bg_nbd_conn *conn = r->conn;
    if (pthread_equal(pthread_self(), conn->thread->thread) && conn->thread->reaping) {
        kick_later(conn);
        post(r);
        return;
    }
    /* Once posted, the request keeps the connection in memory no longer. */
    atomic_fetch_add(&conn->visitors, 1);
    post(r);
    bg_nbd_kick(conn);
    atomic_fetch_sub(&conn->visitors, 1);
}

int bg_nbd_reply(uint64_t ticket, const void *head, int64_t size, int flags)
{
    if (size < 1 || size > INT32_MAX || (flags & ~(BG_NBD_PAYLOAD | BG_NBD_KEEP)))
        return -EINVAL;
    nbd_request *r = request_of((bg_request *)(uintptr_t)ticket);
    set_head(r, head, (size_t)size);
    r->payload_size = flags & BG_NBD_PAYLOAD ? r->base.length : 0;
    if (flags & BG_NBD_KEEP)
        r->buffer = NULL;
    post(r);
    return 0;
}

void bg_nbd_retry(const uint64_t *tickets, int64_t count)
{
    bg_request *blocked = NULL, **last_blocked = &blocked, *missed = NULL, **last_missed = &missed;
    bg_faults *faults = NULL;
    for (int64_t i = 0; i < count; i++) {
        bg_request *r = (bg_request *)(uintptr_t)tickets[i];
        faults = r->source->faults;
        enum bg_request_outcome outcome = bg_request_retry(r);
        if (outcome == BG_REQUEST_DONE)
            post(request_of(r));
        else
            bg_request_append(outcome == BG_REQUEST_BLOCKS ? &last_blocked : &last_missed, r);
    }
    if (blocked)
        bg_request_submit(blocked);
    bg_faults_post(faults, missed, true);
}

void bg_nbd_shutdown(bg_nbd_conn *conn)
{
    atomic_fetch_or(&conn->wanted, WANT_SHUTDOWN);
    bg_nbd_kick(conn);
}

void bg_nbd_abort(bg_nbd_conn *conn)
{
    atomic_fetch_or(&conn->wanted, WANT_ABORT);
    bg_nbd_kick(conn);
}
