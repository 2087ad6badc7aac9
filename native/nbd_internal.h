/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * One connection (nbd_conn.c input and requests, nbd_reads.c reads of what is in memory, nbd_output.c replies and the end) and
 * the thread it belongs to (nbd_loop.c; nbd_threads.c which).
 *
 * A connection's lock guards all of it but `posted` and `wanted`. Its thread waits for the lock. Others leave their news
 * in those two, and then only try the lock: whoever has it looks for news after unlocking. So a thread of the pool, or
 * Python's, never waits for the connection's thread, which may be reading from a file.
 *
 * A connection whose requests are mostly faults is served by Python's thread itself, through bg_nbd_poll: two threads that
 * wake each other for every batch would cost more than all the rest.
 */
#ifndef BG_NBD_INTERNAL_H
#define BG_NBD_INTERNAL_H

#include "nbd_loop.h"
#include "nbd_home.h"
#include "nbd_watch.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/epoll.h>

#define INPUT (128 << 10) /* received at once where it is not known to be payload */

#define BG_NBD_PIECES 16

#define WANT_SHUTDOWN 1U
#define WANT_ABORT 2U

typedef struct nbd_request {
    bg_request base; /* first: see request_of */
    bg_nbd_conn *conn;
    struct nbd_request *next; /* among the posted, or in the output */
    void *buffer;             /* of `cost` bytes */
    uint32_t cost;
    bg_pipe *pipe;            /* it has taken, or NULL */
    bool stores;              /* its place was mapped and in memory */
    uint32_t head_size, payload_size; /* of the reply */
    unsigned char *head;              /* `small`, or allocated; NULL: there was no memory for it */
    enum bg_nbd_refusal refusal;
    unsigned char small[BG_NBD_MAX_HEAD];
} nbd_request;

typedef struct nbd_thread {
    bg_nbd_loop *loop;
    int epoll, wakeup;
    bool has_aio; /* since a request could use it first */
    bg_aio *aio;  /* or NULL: the system has no more, and the pool does what it would do */
    bool reaping; /* connections of what has ended are collected in `kicked`, linked by next_kicked */
    bg_nbd_conn *kicked;
    pthread_t thread;
    bg_nbd_watch watch;
    atomic_int crowd;     /* turns for which it counts as sharing its processor with clients */
    atomic_int processor; /* of the latest turn */
    unsigned given;       /* connections, to the others in turn */
    int trust;            /* in that clients are elsewhere: see nbd_threads.c */
    pthread_mutex_t lock;  /* of the two lists */
    bg_nbd_conn *first;    /* connections, until they are released */
    bg_nbd_conn *released; /* to be freed when no event can name them any more */
    atomic_int connections; /* how many there are in `first` */
    atomic_bool stop;
} nbd_thread;

typedef struct {
    atomic_uint_fast64_t requests, hits, blocked, piped, stored, faults, refused, received, sent, receives, sends, wakeups, moved;
} nbd_counters;

struct bg_nbd_loop {
    bg_pool *pool;
    bg_faults *faults;
    bg_buffers *buffers;
    bg_pipes *pipes;
    nbd_counters counters;
    pthread_mutex_t lock; /* of the spare requests */
    nbd_request *spare_requests;
    int caller_epoll; /* connections that bg_nbd_poll serves */
    atomic_uint turn;
    int nthreads;
    nbd_thread threads[];
};

struct bg_nbd_conn {
    bg_source source; /* first: see conn_of */
    nbd_thread *thread; /* that serves it; while there is no request in flight it may change */
    bg_nbd_loop *loop;
    bg_nbd_settings settings;
    pthread_mutex_t lock;
    int fd;
    uint32_t interest; /* of epoll in it */
    bool by_caller;    /* bg_nbd_poll serves it, not its thread */
    int misses;        /* faults less hits, of late */
    uint32_t longest;  /* requests with more bytes go to the pool */

    _Atomic(nbd_request *) posted; /* completed by other threads, newest first */
    atomic_uint wanted;
    atomic_int visitors; /* threads that it does not belong to and that may still look at it */

    /* Input: bytes [start, end) are not parsed yet. */
    unsigned char *input;
    size_t start, end;
    size_t limit;         /* of what is received into it: after a long write, the next header only */
    nbd_request *writing; /* its payload is being received */
    bool local;           /* the socket is one of this machine: its payloads may go through pipes */
    bool piped;           /* the payload of the last request did */
    nbd_request *ready, **last_ready; /* writes whose payloads wait in pipes, within a turn */
    int readied;                      /* how many these are */
    int unpiped;          /* long writes whose payloads are received into memory before a pipe is tried again */
    int pause;            /* what `unpiped` was at first; 0: the last pipe was good for something */
    nbd_request *moving;  /* a long write that is being done, within a turn */
    bg_map_request move;  /* it, in the map */
    bg_map_piece pieces[BG_NBD_PIECES];
    int64_t moved;
    uint32_t have;        /* of it */
    nbd_request *refused; /* its payload is being skipped */
    uint64_t skip;
    bg_request *faults, **last_fault; /* to be posted at the end of the turn */
    bg_request *blocked, **last_blocked; /* to go to the pool then */
    int gathered;                        /* how many these are */
    bg_request *heavy, **last_heavy;     /* to be shared with the pool */
    int heavies;                         /* how many these are */

    /* Output: requests whose replies are to be sent. */
    nbd_request *output, **last_output;
    uint64_t output_bytes;
    size_t sent; /* of the first; without one, of the reply to the only request in flight: it was announced */

    /* In flight: from being taken until the reply has been sent. */
    unsigned requests;
    uint64_t bytes;
    uint32_t stalled_by; /* cost of the request that is not taken yet */
    bool stalled;        /* there is one */
    int long_left, receives_left; /* of the turn: long writes that may be done, system calls that may receive more */
    bool more;           /* the turn ended before the input did */
    bool busy;           /* the turn had several requests, or one that takes longer than the client does to send the next */
    bool alone;          /* no other connection of the thread had something to do */
    bool sleeps;         /* its thread has waited for this turn, and so, probably, does the client for the reply */
    bool full;           /* the socket takes no more output */
    bool ending;         /* no more input is wanted */
    bool shutdown;
    bool closed;
    bool reported;
    int64_t error;
    bg_request ended; /* reports the end */

    bg_nbd_stats counted; /* since the last turn */
    bg_nbd_home home;
    bool probing; /* in this turn */
    bool away;    /* it is to go to another thread */
    bool is_kicked;
    bg_nbd_conn *next_kicked;
    bg_nbd_conn *next, **prev;  /* connections of the thread */
    bg_nbd_conn *next_released;
};

/* nbd_loop.c */
void nbd_watch(bg_nbd_conn *conn);   /* ask epoll for what the connection waits for */
void nbd_unwatch(bg_nbd_conn *conn); /* before its socket is closed */
void nbd_move(bg_nbd_conn *conn, bool to_caller);
void nbd_use_aio(bg_nbd_conn *conn); /* on its own thread: requests may be begun at devices from now on */

/* nbd_threads.c */
nbd_thread *nbd_next_thread(bg_nbd_loop *loop); /* for a new connection */
void nbd_join(nbd_thread *thread, bg_nbd_conn *conn);
void nbd_part(bg_nbd_conn *conn, bool for_good);
/* On the thread itself. At the end of a wait: whether others had its processor meanwhile. */
void nbd_note_crowd(nbd_thread *thread, bool shared);
/* With the lock, too: whether to watch who gets the processor while the reply to the only request is sent; who did. */
bool nbd_probes(bg_nbd_conn *conn);
long nbd_switches(void);
void nbd_probed(bg_nbd_conn *conn, bool met);
bool nbd_give_away(bg_nbd_conn *conn, uint32_t events);

/* nbd_conn.c; with the lock */
void nbd_turn(bg_nbd_conn *conn, uint32_t events); /* what epoll has said */
bool nbd_admissible(const bg_nbd_conn *conn, uint32_t cost);
bool nbd_give_buffer(nbd_request *r, uint32_t cost); /* false: it is forgotten, the connection closed */

/* nbd_reads.c; with the lock. Whether a read of so many bytes may be worth it. */
bool nbd_can_show(const bg_nbd_conn *conn, uint32_t length);
/* Whether the reply to a read that is about to be taken may be announced. */
bool nbd_can_announce(const bg_nbd_conn *conn, uint32_t length);
/* 0: it was sent without a buffer, or its rest is queued, or the connection is closed. BG_MAP_MISS; -EAGAIN: to be done otherwise. */
int nbd_show(nbd_request *r, uint32_t cost);
/* bg_source.begun: wake the client, which takes about as long as the read. */
void nbd_announce(bg_request *request);

/* nbd_output.c; with the lock */
void nbd_answer(nbd_request *r);                /* it was done by the map: queue the reply */
void nbd_pack_read(nbd_request *r);             /* the head of a reply with data */
void nbd_reply_rest(nbd_request *r, size_t sent); /* queue the only reply, of which so much was sent; the socket is full */
void nbd_count(bg_nbd_conn *conn);              /* publish what was counted: before a reply is sent */
void nbd_refuse(nbd_request *r);                /* queue the error that its `refusal` calls for */
void nbd_flush(bg_nbd_conn *conn);              /* send what the socket takes */
void nbd_close(bg_nbd_conn *conn, int64_t why); /* idempotent */
void nbd_forget(nbd_request *r);                /* it holds nothing any more */
void nbd_give_pipe(nbd_request *r);             /* if it has one: nothing that is wanted is in it any more */
void nbd_attend(bg_nbd_conn *conn);             /* take in the news of other threads; send; end if it is time */

/* nbd_output.c; unlock, and go on if others have left news. The connection may be gone afterwards. */
void nbd_leave(bg_nbd_conn *conn);
/* bg_source.done: any thread, without the lock */
void nbd_done(bg_request *request);

static inline bool nbd_announced(const bg_nbd_conn *conn)
{
    return conn->sent && !conn->output;
}

static inline nbd_request *request_of(bg_request *request)
{
    return (nbd_request *)request;
}

#endif
