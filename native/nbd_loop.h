/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * The request loop of NBD's transmission phase: a few threads, each with epoll over its connections.
 *
 *     socket ── one recv for many requests ── bg_request_try ── replies ── one sendmsg for many ── socket
 *                                               │ begun: aio    ▲
 *                                               │ blocks: pool  │
 *                                               │ faults: bg_nbd_take ── Python ── bg_nbd_reply, bg_nbd_kick
 *
 * What the extent map knows is done where it is parsed, and what the protocol forbids is refused there. Whoever completes a request (the loop's thread, a pool's, Python's)
 * sends its reply, unless another thread is at work on that connection, which then sends it too. A thread that has answered
 * one short request looks for the next for some microseconds before it sleeps. Where clients and threads have to share the
 * processors, connections go to the thread that is nearest to their clients.
 *
 * Memory is bounded whatever a client does: a request is taken while those whose replies have not reached the socket are
 * fewer than BG_NBD_MAX_REQUESTS and their payload is at most BG_NBD_MAX_BYTES (one is always taken); the rest stays in
 * the client's socket. Payloads of long writes that come by unix sockets may wait in pipes instead, of which the loop has at
 * most BG_NBD_MAX_PIPES, with two descriptors each.
 *
 * Units:     bytes.
 * Ownership: a connection owns its socket from bg_nbd_conn_new on. Map, pool and loop must outlive it. The payload of a fault
 *            stays valid until the reply.
 * Errno:     0 or a count, else -EINVAL, -ENOMEM, -EBUSY, or -errno of a system call.
 * Threads:   take, reply, retry, kick, shutdown, abort and release are called by one thread, Python's; none of them waits for
 *            the peer or for a device.
 */
#ifndef BG_NBD_LOOP_H
#define BG_NBD_LOOP_H

#include "buffers.h"
#include "nbd_wire.h"
#include "request.h"

/* cffi:begin */
#define BG_NBD_MAX_THREADS 64
#define BG_NBD_MAX_REQUESTS 128
#define BG_NBD_MAX_BYTES 33554432
#define BG_NBD_MAX_PIPES 16
#define BG_NBD_MAX_SKIPPED 67108864 /* payload of a request that is refused; beyond, the connection ends */

/* Why a connection ended, beside 0 and -errno: the client broke the protocol. */
#define BG_NBD_BAD_MAGIC 1
#define BG_NBD_LEFT 2     /* in the middle of a request */
#define BG_NBD_TOO_LONG 3 /* a write that is not even skipped */

#define BG_NBD_PAYLOAD 1 /* the request's payload follows the head */
#define BG_NBD_KEEP 2    /* the payload's memory now belongs to the caller: bg_buffer_free */

typedef struct bg_nbd_loop bg_nbd_loop;
typedef struct bg_nbd_conn bg_nbd_conn;

/* Since the loop began. */
typedef struct {
    uint64_t requests; /* taken */
    uint64_t hits;     /* done by the extent map, at once or not */
    uint64_t blocked;  /* of these, on the pool, at a device meanwhile, or when they were retried */
    uint64_t piped;    /* of these, whose payload was copied once, from the socket into the file */
    uint64_t stored;   /* of the hits, long writes whose place was mapped and in memory */
    uint64_t faults;   /* done by Python */
    uint64_t refused;  /* answered with an error here: the client should not have sent them */
    uint64_t received; /* bytes */
    uint64_t sent;     /* bytes */
    uint64_t receives; /* system calls that received something */
    uint64_t sends;
    uint64_t wakeups; /* of the loop's threads */
    uint64_t moved;   /* connections, to the thread whose processor their clients share */
} bg_nbd_stats;

int bg_nbd_loop_new(int threads, bg_pool *pool, bg_nbd_loop **out);

/* Disconnect everyone and end the threads. No map is used any more then; what waits for Python goes on. */
void bg_nbd_loop_stop(bg_nbd_loop *loop);

/* -EBUSY while there are connections that were not released. */
int bg_nbd_loop_free(bg_nbd_loop *loop);

/* Readable as long as take has something to give, or a connection that poll serves wants attention. */
int bg_nbd_loop_eventfd(const bg_nbd_loop *loop);
int bg_nbd_loop_pollfd(const bg_nbd_loop *loop);

/* Serve the connections whose requests are mostly faults, without waiting. Take afterwards. */
void bg_nbd_poll(bg_nbd_loop *loop);
int64_t bg_nbd_take(bg_nbd_loop *loop, bg_fault *out, int64_t max);
void bg_nbd_loop_stats(bg_nbd_loop *loop, bg_nbd_stats *out);

/* Serve a connected, non-blocking stream socket. On failure it is still the caller's. */
int bg_nbd_conn_new(bg_nbd_loop *loop, int fd, int64_t id, const bg_nbd_settings *settings, bg_map *map,
                    bg_nbd_conn **out);

/* The reply to a fault, whole: 1 to 4 KiB and a few bytes of head, and the request's payload if flags say so. */
int bg_nbd_reply(uint64_t ticket, const void *head, int64_t size, int flags);

/*
 * Faults of one connection, reads and writes, are not done, but Python has looked up where their bytes are: they are tried once more.
 * Those that are not in the map all the same come again, as retried.
 */
void bg_nbd_retry(const uint64_t *tickets, int64_t count);

/* Send what was replied to, or retried, since the last kick. */
void bg_nbd_kick(bg_nbd_conn *conn);

/* From now on every request is refused; disconnect when none is in flight. */
void bg_nbd_shutdown(bg_nbd_conn *conn);

/* Disconnect now. What is in flight goes on, its replies go nowhere. */
void bg_nbd_abort(bg_nbd_conn *conn);

/* Once, after take has said that the connection ended; the connection must not be used any more. */
void bg_nbd_release(bg_nbd_conn *conn);
/* cffi:end */

#endif
