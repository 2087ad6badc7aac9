/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* Input and requests of a connection. All of it runs in the thread that serves it, with the connection's lock. */
#define _GNU_SOURCE
#include "nbd_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

/* Requests parsed in one turn: other connections want theirs too. */
#define TURN 256
/* Replies are sent at the latest when they are this many bytes: the client can go on while the rest is done. */
#define SEND_AT (128 << 10)
/*
 * Replies to writes after so many requests: they are short, so that the client, which has a processor to itself while only this
 * connection has something to do, would wait for all of them. A quarter more 4 KiB writes at depth 16 (two processors).
 */
#define EARLY 8
/* After a write at least this long, its like is expected, and its payload not received behind its header. */
#define LONG_WRITE (32 << 10)
/*
 * While a write at least this long is done the next payload is received, else the client would find its socket full, and go to
 * sleep: between its parts by this thread, or when it is longer still, or has to wait, by leaving it to the pool when more
 * input is here. Shorter ones are done before another thread would have woken.
 */
#define OVERLAP_WRITE (128 << 10)
#define LONGEST_IN_PARTS (1 << 20)
#define PART (64 << 10)
/* In one turn: long writes done, and system calls that receive more than was there at first. Then others have theirs. */
#define LONG_TURN 16
#define RECEIVES_TURN 64
/* Payloads in pipes of one connection. */
#define MOST_READY 4
/* Requests that go to the pool together. */
#define GATHERED 3

/* So many more faults than hits, and Python's thread serves the connection itself; so many more hits, and it does not. */
#define MISSES 32

static nbd_request *new_request(bg_nbd_conn *conn, const bg_nbd_header *header)
{
    bg_nbd_loop *loop = conn->loop;
    pthread_mutex_lock(&loop->lock);
    nbd_request *r = loop->spare_requests;
    if (r)
        loop->spare_requests = r->next;
    pthread_mutex_unlock(&loop->lock);
    if (!r && !(r = malloc(sizeof(*r)))) {
        nbd_close(conn, -ENOMEM);
        return NULL;
    }
    *r = (nbd_request){
        .base = {.source = &conn->source,
                 .tag = header->cookie,
                 .offset = header->offset,
                 .length = header->length,
                 .command = header->command,
                 .flags = header->flags,
                 .kind = BG_REQUEST_OTHER,
                 .durable = header->flags & BG_NBD_FUA && header->command != BG_NBD_READ && header->command != BG_NBD_CACHE},
        .conn = conn,
        .head = r->small,
    };
    conn->requests++;
    conn->counted.requests++;
    return r;
}

bool nbd_admissible(const bg_nbd_conn *conn, uint32_t cost)
{
    return !conn->requests || (!nbd_announced(conn) && conn->requests < BG_NBD_MAX_REQUESTS &&
                               conn->bytes + cost <= BG_NBD_MAX_BYTES);
}

/* Whether the next request may be taken; else it waits until others are over. */
static bool admitted(bg_nbd_conn *conn, uint32_t cost)
{
    if (!nbd_admissible(conn, cost) && conn->output && !conn->full)
        nbd_flush(conn);
    conn->stalled = !nbd_admissible(conn, cost);
    conn->stalled_by = cost;
    return !conn->stalled && !conn->closed;
}

bool nbd_give_buffer(nbd_request *r, uint32_t cost)
{
    bg_nbd_conn *conn = r->conn;
    r->buffer = r->base.buf = bg_buffers_take(conn->loop->buffers, cost);
    if (!r->buffer) {
        nbd_forget(r);
        nbd_close(conn, -ENOMEM);
        return false;
    }
    r->cost = cost;
    conn->bytes += cost;
    return true;
}

static void fault(nbd_request *r)
{
    bg_nbd_conn *conn = r->conn;
    if (conn->misses < MISSES)
        conn->misses++;
    bg_request_append(&conn->last_fault, &r->base);
}

static void post_faults(bg_nbd_conn *conn)
{
    bg_faults_post(conn->loop->faults, conn->faults, !conn->by_caller);
    conn->faults = NULL;
    conn->last_fault = &conn->faults;
}

static void hit(bg_nbd_conn *conn)
{
    if (conn->misses > -MISSES)
        conn->misses--;
}

static void go_on(nbd_request *r, enum bg_request_outcome outcome)
{
    bg_nbd_conn *conn = r->conn;
    if (outcome == BG_REQUEST_DONE && r->base.pipe) {
        conn->counted.piped++;
        conn->pause = 0;
    }
    nbd_give_pipe(r);
    if (outcome == BG_REQUEST_LOST) {
        nbd_forget(r);
        nbd_close(conn, -EIO);
        return;
    }
    if (outcome == BG_REQUEST_FAULTS) {
        fault(r);
        return;
    }
    if (outcome == BG_REQUEST_HEAVY) {
        bg_request_append(&conn->last_heavy, &r->base);
        conn->heavies++;
        return;
    }
    hit(conn);
    if (outcome == BG_REQUEST_DONE) {
        conn->counted.hits++;
        conn->counted.stored += r->stores;
        nbd_answer(r);
    } else if (outcome == BG_REQUEST_BLOCKS) {
        if (r->base.lane == BG_LANE_WAITS && !conn->source.aio && !conn->by_caller && bg_map_is_direct(conn->source.map))
            nbd_use_aio(conn);
        bg_request_append(&conn->last_blocked, &r->base);
        conn->gathered++;
    }
}

/* A write whose whole payload is in the input needs no buffer if it is a hit. False: it was not taken. */
static bool write_in_place(bg_nbd_conn *conn, const bg_nbd_header *header)
{
    uint32_t cost = bg_buffer_size(header->length);
    nbd_request *r = new_request(conn, header);
    if (!r)
        return false;
    r->base.buf = conn->input + conn->start + BG_NBD_HEADER;
    r->base.kind = BG_REQUEST_WRITE;
    r->base.passing = true;
    enum bg_request_outcome outcome = bg_request_try(&r->base, conn->longest);
    r->base.passing = false;
    if (outcome != BG_REQUEST_DONE) {
        const void *payload = r->base.buf;
        conn->requests--;
        bool admissible = admitted(conn, cost);
        conn->requests++;
        if (!admissible) {
            conn->counted.requests--;
            nbd_forget(r);
            return false;
        }
        if (!nbd_give_buffer(r, cost))
            return false;
        memcpy(r->buffer, payload, header->length);
        /* Now it may be at the device while the input is used for other requests. */
        if (outcome == BG_REQUEST_BLOCKS && r->base.lane == BG_LANE_WAITS && conn->source.aio)
            outcome = bg_request_try(&r->base, conn->longest);
    }
    conn->start += BG_NBD_HEADER + header->length;
    go_on(r, outcome);
    return true;
}

/* A request that is answered with an error. */
static bool take_refused(bg_nbd_conn *conn, const bg_nbd_header *header, enum bg_nbd_refusal why)
{
    bool has_payload = header->command == BG_NBD_WRITE && header->length;
    if (has_payload && header->length > BG_NBD_MAX_SKIPPED) {
        nbd_close(conn, BG_NBD_TOO_LONG);
        return false;
    }
    nbd_request *r = new_request(conn, header);
    if (!r)
        return false;
    r->refusal = why;
    conn->start += BG_NBD_HEADER;
    if (has_payload) {
        /* The reply follows the payload: a client that only sends until it has sent all would otherwise be stuck. */
        conn->refused = r;
        conn->skip = header->length;
    } else {
        nbd_refuse(r);
    }
    return true;
}

/* One that only Python knows how to do. */
static bool take_foreign(bg_nbd_conn *conn, const bg_nbd_header *header)
{
    nbd_request *r = new_request(conn, header);
    if (!r)
        return false;
    conn->start += BG_NBD_HEADER;
    fault(r);
    return true;
}

/* A request without memory. */
static bool take_bare(bg_nbd_conn *conn, const bg_nbd_header *header)
{
    nbd_request *r = new_request(conn, header);
    if (!r)
        return false;
    conn->start += BG_NBD_HEADER;
    r->base.kind = header->command == BG_NBD_FLUSH ? BG_REQUEST_FLUSH : BG_REQUEST_ZERO;
    if (header->command == BG_NBD_TRIM)
        r->base.zero = BG_MAP_PUNCH;
    else if (header->flags & BG_NBD_NO_HOLE)
        r->base.zero = BG_MAP_ZERO_RANGE;
    else
        r->base.zero = BG_MAP_PUNCH | BG_MAP_ZERO_RANGE;
    if (header->command == BG_NBD_WRITE_ZEROES && !(header->flags & BG_NBD_FAST_ZERO))
        r->base.zero |= BG_MAP_WRITE_ZEROES;
    go_on(r, bg_request_try(&r->base, conn->longest));
    return true;
}

static bool take_read(bg_nbd_conn *conn, const bg_nbd_header *header, uint32_t cost)
{
    bool show = nbd_can_show(conn, header->length), announce = nbd_can_announce(conn, header->length);
    if (show && conn->output && !conn->full)
        nbd_flush(conn);
    nbd_request *r = conn->closed ? NULL : new_request(conn, header);
    if (!r)
        return false;
    int ret = show ? nbd_show(r, cost) : -EAGAIN;
    if (ret == 0)
        hit(conn);
    else if (!nbd_give_buffer(r, cost))
        return false;
    if (conn->closed)
        return false;
    conn->start += BG_NBD_HEADER;
    if (ret == 0)
        return true;
    r->base.kind = BG_REQUEST_READ;
    r->base.announce = announce;
    go_on(r, ret == BG_MAP_MISS ? BG_REQUEST_FAULTS : bg_request_try(&r->base, conn->longest));
    return true;
}

/* A write at least this long that may be done part by part, by this thread. */
static bool in_parts(const nbd_request *r, uint32_t least)
{
    const bg_nbd_conn *conn = r->conn;
    uint32_t length = r->base.length;
    return conn->source.map && length >= least && length <= LONGEST_IN_PARTS && length <= conn->longest && !r->base.durable;
}

/*
 * Whether the payload of a long write, about to be received, should go through a pipe: if the map can do it, that is one copy less.
 * If it can be stored, that is better still, from a buffer that the processor's cache has.
 */
static bool wants_pipe(bg_nbd_conn *conn, const nbd_request *r)
{
    if (r->stores || !conn->local || conn->end > conn->start)
        return false;
    if (conn->unpiped > 0)
        conn->unpiped--;
    return conn->unpiped == 0;
}

/* Take the request at the head of the input; false: it stays there, or the connection is closed. */
static bool take_request(bg_nbd_conn *conn, const bg_nbd_header *header)
{
    enum bg_nbd_refusal refusal = conn->shutdown ? BG_NBD_SHUT_DOWN : bg_nbd_check(&conn->settings, header);
    bool native = refusal == BG_NBD_FINE && bg_nbd_native(header);
    bool bare = header->command == BG_NBD_FLUSH || header->command == BG_NBD_TRIM || header->command == BG_NBD_WRITE_ZEROES;
    uint32_t payload = header->length;
    if (header->command == BG_NBD_CACHE && payload > BG_NBD_CACHE_STEP)
        payload = BG_NBD_CACHE_STEP;
    uint32_t cost = native && !bare ? bg_buffer_size(payload) : 0;
    bool here = native && header->command == BG_NBD_WRITE &&
                conn->end - conn->start - BG_NBD_HEADER >= header->length;
    if (!admitted(conn, here ? 0 : cost))
        return false;
    conn->piped = false;
    conn->limit = native && header->command == BG_NBD_WRITE && payload >= LONG_WRITE ? BG_NBD_HEADER : INPUT;
    if (refusal != BG_NBD_FINE)
        return take_refused(conn, header, refusal);
    if (!native)
        return take_foreign(conn, header);
    if (bare)
        return take_bare(conn, header);
    if (here)
        return write_in_place(conn, header);
    if (header->command == BG_NBD_READ)
        return take_read(conn, header, cost);
    nbd_request *r = new_request(conn, header);
    if (!r || !nbd_give_buffer(r, cost))
        return false;
    conn->start += BG_NBD_HEADER;
    if (header->command == BG_NBD_WRITE) {
        conn->writing = r;
        conn->have = 0;
        bool parts = in_parts(r, LONG_WRITE);
        r->stores = parts && bg_map_can_store(conn->source.map, (int64_t)r->base.offset, r->base.length);
        r->pipe = r->base.pipe = parts && wants_pipe(conn, r) ? bg_pipes_take(conn->loop->pipes) : NULL;
        conn->piped = r->pipe != NULL;
    } else {
        r->base.kind = BG_REQUEST_CACHE;
        go_on(r, bg_request_try(&r->base, conn->longest));
    }
    return true;
}

/* False: it is to be done otherwise. */
static bool begin_moving(nbd_request *r)
{
    bg_nbd_conn *conn = r->conn;
    bg_map *map = conn->source.map;
    if (!in_parts(r, OVERLAP_WRITE) || bg_map_is_direct(map))
        return false;
    if (bg_map_begin(map, (int64_t)r->base.offset, r->base.length, 1, conn->pieces, BG_NBD_PIECES, &conn->move) != 0)
        return false;
    conn->moving = r;
    conn->moved = 0;
    return true;
}

/* The next part of the long write. It is over with the last, or with one that can not be done now. */
static void move_part(bg_nbd_conn *conn)
{
    nbd_request *r = conn->moving;
    int64_t length = r->base.length, end = conn->moved + PART < length ? conn->moved + PART : length;
    int ret = bg_map_move_part_now(conn->source.map, &conn->move, r->buffer, r->base.pipe, conn->moved, end);
    conn->moved = end;
    if (ret < 0)
        bg_request_unpipe(&r->base); /* while what was written is still where it was */
    if (ret == 0 && end < length)
        return;
    conn->moving = NULL;
    bg_map_end(conn->source.map, &conn->move, ret != -EAGAIN);
    enum bg_request_outcome outcome = ret == -EAGAIN ? BG_REQUEST_BLOCKS : ret < 0 ? BG_REQUEST_FAULTS : BG_REQUEST_DONE;
    go_on(r, r->base.lost ? BG_REQUEST_LOST : outcome);
    conn->long_left--;
    if (conn->output && !conn->full)
        nbd_flush(conn);
}

/* True: the payload is complete, and the write has begun. */
static bool take_payload(bg_nbd_conn *conn)
{
    nbd_request *r = conn->writing;
    size_t here = conn->end - conn->start, missing = r->base.length - conn->have;
    if (here > missing)
        here = missing;
    memcpy((char *)r->buffer + conn->have, conn->input + conn->start, here);
    conn->start += here;
    conn->have += (uint32_t)here;
    if (conn->have < r->base.length)
        return false;
    conn->writing = NULL;
    r->base.kind = BG_REQUEST_WRITE;
    while (conn->moving)
        move_part(conn);
    if (begin_moving(r))
        return true;
    if (r->base.pipe) {
        r->next = NULL;
        *conn->last_ready = r;
        conn->last_ready = &r->next;
        conn->readied++;
        return true;
    }
    bool overlaps = r->base.length >= OVERLAP_WRITE && conn->end > conn->start;
    go_on(r, bg_request_try(&r->base, overlaps ? OVERLAP_WRITE - 1 : conn->longest));
    return true;
}

static bool skip_payload(bg_nbd_conn *conn)
{
    size_t here = conn->end - conn->start;
    if (here > conn->skip)
        here = conn->skip;
    conn->start += here;
    conn->skip -= here;
    if (conn->skip)
        return false;
    nbd_request *r = conn->refused;
    conn->refused = NULL;
    nbd_refuse(r);
    return true;
}

/* Take requests out of the input until it is used up, one is not admissible, or the turn is over. */
static void parse(bg_nbd_conn *conn)
{
    for (int i = 0; i < TURN; i++) {
        if (conn->writing && !take_payload(conn))
            return;
        if (conn->refused && !skip_payload(conn))
            return;
        if (conn->closed || conn->ending || conn->end - conn->start < BG_NBD_HEADER)
            return;
        bg_nbd_header header;
        if (!bg_nbd_parse(conn->input + conn->start, &header)) {
            nbd_close(conn, BG_NBD_BAD_MAGIC);
            return;
        }
        if (header.command == BG_NBD_DISC) {
            conn->ending = true;
            return;
        }
        if (!take_request(conn, &header))
            return;
        bool stores = conn->writing && conn->writing->stores;
        conn->busy |= i > 0 || (header.length >= LONG_WRITE && !stores);
        bool early = conn->alone && header.command == BG_NBD_WRITE && (i + 1) % EARLY == 0 && conn->output;
        if ((early || conn->output_bytes >= SEND_AT) && !conn->full) {
            nbd_flush(conn);
            if (conn->closed)
                return;
        }
    }
    conn->more = true;
}

/* As receive, the payload only. Without the pipe afterwards it did not work, and recvmsg says why, or does it. */
static bool fill_pipe(bg_nbd_conn *conn)
{
    nbd_request *r = conn->writing;
    int64_t n = bg_pipe_fill(r->base.pipe, conn->fd, r->base.length - conn->have);
    if (n > 0) {
        conn->counted.receives++;
        conn->counted.received += (uint64_t)n;
        conn->have += (uint32_t)n;
    } else if (n != -EAGAIN) {
        bg_request_unpipe(&r->base);
        nbd_give_pipe(r);
        conn->piped = false;
        if (r->base.lost)
            nbd_close(conn, -EIO);
    }
    return n > 0;
}

/* False: there is nothing to parse. */
static bool receive(bg_nbd_conn *conn)
{
    if (conn->writing && conn->writing->base.pipe) {
        bool filled = fill_pipe(conn);
        if (conn->closed || conn->writing->base.pipe)
            return filled;
    }
    size_t rest = conn->end - conn->start;
    if (rest == 0) {
        conn->start = conn->end = 0;
    } else if (conn->start && INPUT - conn->end < BG_NBD_HEADER) {
        memmove(conn->input, conn->input + conn->start, rest);
        conn->start = 0;
        conn->end = rest;
    }
    struct iovec iov[2];
    size_t missing = 0, n = 0, room = INPUT - conn->end;
    if (conn->writing) {
        missing = conn->writing->base.length - conn->have;
        iov[n++] = (struct iovec){(char *)conn->writing->buffer + conn->have, missing};
    }
    iov[n++] = (struct iovec){conn->input + conn->end, room < conn->limit ? room : conn->limit};
    struct msghdr message = {.msg_iov = iov, .msg_iovlen = n};
    ssize_t received = recvmsg(conn->fd, &message, MSG_DONTWAIT);
    if (received < 0) {
        if (errno != EAGAIN && errno != EINTR)
            nbd_close(conn, -errno);
        return false;
    }
    if (received == 0) {
        if (conn->writing || conn->refused || rest)
            nbd_close(conn, BG_NBD_LEFT);
        conn->ending = true;
        return false;
    }
    conn->counted.receives++;
    conn->counted.received += (uint64_t)received;
    size_t payload = (size_t)received < missing ? (size_t)received : missing;
    conn->have += (uint32_t)payload;
    conn->end += (size_t)received - payload;
    return true;
}

/* Within a turn. */
static bool receive_more(bg_nbd_conn *conn)
{
    return !conn->closed && !conn->ending && !conn->stalled && !conn->more && conn->long_left > 0 && conn->receives_left-- > 0 &&
           receive(conn);
}

/* Do the long write that has begun, part by part, and receive meanwhile. */
static void move(bg_nbd_conn *conn)
{
    while (conn->moving) {
        move_part(conn);
        if (receive_more(conn))
            parse(conn);
    }
}

/*
 * Write what waits in pipes. To wake the sender, when its socket has room again or a reply is there, costs a tenth of a write of
 * 64 KiB: so several are received together, and answered two at a time, for the sender to have something to do meanwhile.
 */
static void write_ready(bg_nbd_conn *conn)
{
    for (nbd_request *r; (r = conn->ready);) {
        conn->ready = r->next;
        conn->readied--;
        conn->long_left--;
        go_on(r, bg_request_try(&r->base, conn->longest));
        if (conn->readied % 2 == 0 && conn->output && !conn->full)
            nbd_flush(conn);
    }
    conn->last_ready = &conn->ready;
}

/* Long writes through pipes, as long as there are more. */
static void pass(bg_nbd_conn *conn)
{
    for (;;) {
        while (conn->piped && conn->readied < (conn->pause ? 1 : MOST_READY) && receive_more(conn)) {
            parse(conn);
            move(conn);
        }
        if (!conn->ready)
            return;
        write_ready(conn);
    }
}

/* Do what is heavy, together with the pool. */
static void share(bg_nbd_conn *conn)
{
    bg_request *r = conn->heavies ? bg_request_share(conn->heavy, conn->heavies) : NULL;
    conn->heavy = NULL;
    conn->last_heavy = &conn->heavy;
    conn->heavies = 0;
    int count = 0;
    for (bg_request *next; r; r = next) {
        next = r->next;
        go_on(request_of(r), bg_request_try(r, conn->longest));
        if (++count % EARLY == 0 && conn->output && !conn->full)
            nbd_flush(conn);
    }
}

/* What goes to the pool goes there together with what is there to be received at once: waking its threads costs more than that. */
static void submit_blocked(bg_nbd_conn *conn)
{
    for (int i = 0; i < GATHERED && conn->gathered && conn->gathered < GATHERED && receive_more(conn); i++) {
        parse(conn);
        move(conn);
        write_ready(conn);
        share(conn);
    }
    if (conn->gathered)
        bg_request_submit(conn->blocked);
    conn->blocked = NULL;
    conn->last_blocked = &conn->blocked;
    conn->gathered = 0;
}

void nbd_turn(bg_nbd_conn *conn, uint32_t events)
{
    if (conn->closed)
        return;
    if (!(conn->interest & EPOLLIN) && events & (EPOLLHUP | EPOLLERR)) {
        /* Nobody is there to get the replies that are waited for. */
        nbd_close(conn, -EPIPE);
        return;
    }
    if (events & EPOLLOUT)
        conn->full = false;
    nbd_attend(conn);
    if (conn->closed || conn->ending || (conn->stalled && !nbd_admissible(conn, conn->stalled_by)))
        return;
    if (!conn->stalled && !conn->more && (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR)) || !receive(conn)))
        return;
    conn->stalled = conn->more = conn->busy = false;
    conn->long_left = LONG_TURN;
    conn->receives_left = RECEIVES_TURN;
    parse(conn);
    move(conn);
    pass(conn);
    share(conn);
    submit_blocked(conn);
    if (conn->source.aio)
        bg_aio_submit(conn->source.aio);
    post_faults(conn);
    if (conn->misses == (conn->by_caller ? -MISSES : MISSES) && !conn->closed)
        nbd_move(conn, !conn->by_caller);
}
