/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Requests of front ends (an NBD connection, a vhost-user queue, a caller in this process) to one backend.
 *
 *     source ── bg_request_try ──┬─ DONE: the extent map knew, and nothing had to be waited for
 *                                ├─ BEGUN: bg_aio_submit of the source's aio begins it, bg_aio_reap calls source->done
 *                                ├─ BLOCKS: bg_request_submit does it on the pool, then source->done
 *                                ├─ HEAVY: bg_request_share gives half of such requests to the pool, and the others back
 *                                └─ FAULTS: into bg_faults, to Python, which completes it (source->done), or looks up where its
 *                                           bytes are, and has it retried
 *
 * Errors are faults too: Python does the request once more, and deals with its error as with any other.
 *
 * Units:     bytes.
 * Ownership: a request belongs to its source, and is lent from BEGUN, submit or post until done is called; its buffer likewise.
 *            The map, the pool and the faults must outlive the source.
 * Errno:     0 or a count, else -ENOMEM, -EBUSY, or -errno of a system call.
 * Threads:   any thread may try, submit, post and take; done is called on any thread.
 */
#ifndef BG_REQUEST_H
#define BG_REQUEST_H

#include "aio.h"
#include "extent_map.h"
#include "pool.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* cffi:begin */
/* What Python is to do, or is told. The words of the front end (tag, command, flags) are handed on as they are. */
typedef struct {
    uint64_t ticket; /* the request, to be completed once; 0: the source has ended and may be released */
    int64_t source;
    void *buf; /* NULL: no payload */
    uint64_t tag;
    uint64_t offset;
    uint32_t length;
    uint16_t command;
    uint16_t flags;
    int64_t error; /* of a source that has ended: why, 0 or what its front end says; of a request 1: it was retried */
} bg_fault;
/* cffi:end */

typedef struct bg_request bg_request;
typedef struct bg_faults bg_faults;
typedef struct bg_flight bg_flight;

enum bg_request_kind {
    BG_REQUEST_READ,
    BG_REQUEST_WRITE,
    BG_REQUEST_CACHE, /* reads the range through its buffer, in steps of `step` bytes, and forgets it */
    BG_REQUEST_ZERO,  /* bg_map_zero, with `zero` */
    BG_REQUEST_FLUSH,
    BG_REQUEST_OTHER, /* always faults */
    BG_REQUEST_ENDED  /* no request: the source has ended */
};

typedef struct bg_source {
    bg_map *map; /* NULL: everything faults */
    bg_pool *pool;
    bg_aio *aio; /* of the thread that tries; or NULL */
    bg_faults *faults;
    int64_t id; /* its name in faults */
    void (*done)(bg_request *request);
    void (*begun)(bg_request *request); /* with `announce`: it is about to be done, from memory only; may be NULL */
    uint32_t step; /* of BG_REQUEST_CACHE */
    atomic_int on_pool; /* its requests there that may still use the map */
} bg_source;

struct bg_request {
    bg_task task;
    bg_source *source;
    bg_request *next; /* among faults, or those to be submitted */
    void *buf;
    bg_pipe *pipe; /* until it is tried: a write's bytes are in it, and not in `buf`; or NULL */
    uint64_t tag, offset;
    uint32_t length;
    uint16_t command, flags;
    int64_t error; /* of BG_REQUEST_ENDED */
    uint8_t kind;
    uint8_t lane; /* of the task, set by bg_request_try */
    uint8_t zero; /* of BG_REQUEST_ZERO: how, see bg_map_set_zeroing */
    bool durable; /* with a flush, before it counts as done */
    bg_flight *flight; /* while a device has it in hand: see flight.h */
    bool lost; /* after an error what was to be written is nowhere any more: nobody can do it, or tell that it was not done */
    bool passing; /* its memory is good only while it is tried */
    bool shared; /* never HEAVY (any more) */
    bool announce; /* a read: the source wants to hear that it has begun */
    bool retried;
};

enum bg_request_outcome {
    BG_REQUEST_DONE,
    BG_REQUEST_BEGUN,
    BG_REQUEST_BLOCKS,
    BG_REQUEST_HEAVY, /* a short write for which much has to be copied first, without waiting */
    BG_REQUEST_FAULTS,
    BG_REQUEST_LOST
};

/* At the end of a list, linked by next. */
static inline void bg_request_append(bg_request ***last, bg_request *r)
{
    r->next = NULL;
    **last = r;
    *last = &r->next;
}

/*
 * Do it now, if that needs no waiting and it has no more than `longest` bytes. The range is one of the disk. What
 * its pipe has is in its memory when it was not done, or lost.
 */
enum bg_request_outcome bg_request_try(bg_request *request, uint32_t longest);

/* Do the requests from `first` on, linked by next, of one source, on the pool; what turns out to be a fault there is posted. */
void bg_request_submit(bg_request *first);

/*
 * Have half of the `count` heavy requests from `first` on, linked by next, of one source, done on the pool, one after the other by
 * one of its threads: to wake several, and for one request each, costs more than they bring. Returns the others, likewise
 * linked, to be tried now.
 */
bg_request *bg_request_share(bg_request *first, int count);

/*
 * Try a fault once more, when Python has looked up where its bytes are instead of doing it: DONE, or BLOCKS, or FAULTS, which then is
 * Python's to do.
 */
enum bg_request_outcome bg_request_retry(bg_request *request);

/* Until none of its requests that went to the pool uses the map any more. None must be tried or submitted meanwhile. */
void bg_source_wait(const bg_source *source);

/*
 * What is in its pipe, or was written from there, into its memory, for whoever does it otherwise; or it is lost. Within the map's
 * request, if there was one.
 */
void bg_request_unpipe(bg_request *request);

int bg_faults_new(bg_faults **out);
void bg_faults_free(bg_faults *faults);

/* Readable as long as there are faults. */
int bg_faults_eventfd(const bg_faults *faults);

/* Queue the requests from `first` on, linked by next. Not `signal`: the caller's thread takes them next. */
void bg_faults_post(bg_faults *faults, bg_request *first, bool signal);

/* Take up to `max` without waiting, oldest first; returns how many. */
int64_t bg_faults_take(bg_faults *faults, bg_fault *out, int64_t max);

#endif
