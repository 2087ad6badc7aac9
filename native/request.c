/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "request.h"

#include "flight.h"
#include "io.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define FEW_PIECES 16
/*
 * First writes with more bytes go to the pool. With fewer, the wake-up and the processor's cache cost more than is won by
 * receiving the next payload meanwhile, as a file takes one writer at a time anyway: for 4 KiB a twentieth is lost, for 64 KiB
 * as much is won (two processors, tmpfs). With a copy before them they take twice as long, so that it is won earlier.
 */
#define MAX_FIRST_NOW (32U << 10)
#define MAX_COPY_NOW (16U << 10)
/* Shared with the pool are writes that have more bytes copied. */
#define HEAVY (24 << 10)
/* Longer requests that are retried go to the pool, not to keep Python's thread from others. */
#define MAX_RETRY_NOW (64U << 10)
/* Zeroes in memory of more bytes go to the pool, too. */
#define MAX_ZERO_NOW (128U << 10)

struct bg_faults {
    int eventfd;
    pthread_mutex_t lock;
    bg_request *first, **last;
    bool signalled; /* the eventfd is readable */
};

int bg_faults_new(bg_faults **out)
{
    bg_faults *faults = calloc(1, sizeof(*faults));
    if (!faults)
        return -ENOMEM;
    faults->eventfd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (faults->eventfd < 0) {
        int ret = -errno;
        free(faults);
        return ret;
    }
    pthread_mutex_init(&faults->lock, NULL);
    faults->last = &faults->first;
    *out = faults;
    return 0;
}

void bg_faults_free(bg_faults *faults)
{
    if (!faults)
        return;
    close(faults->eventfd);
    pthread_mutex_destroy(&faults->lock);
    free(faults);
}

int bg_faults_eventfd(const bg_faults *faults)
{
    return faults->eventfd;
}

static void signal_taker(bg_faults *faults)
{
    if (!faults->signalled)
        eventfd_write(faults->eventfd, 1);
    faults->signalled = true;
}

void bg_faults_post(bg_faults *faults, bg_request *first, bool signal)
{
    if (!first)
        return;
    bg_request *last = first;
    while (last->next)
        last = last->next;
    pthread_mutex_lock(&faults->lock);
    *faults->last = first;
    faults->last = &last->next;
    /* Under the lock: once it is released, the last request may be completed and all of this be freed. */
    if (signal)
        signal_taker(faults);
    pthread_mutex_unlock(&faults->lock);
}

int64_t bg_faults_take(bg_faults *faults, bg_fault *out, int64_t max)
{
    int64_t n = 0;
    pthread_mutex_lock(&faults->lock);
    for (bg_request *r = faults->first; r && n < max; faults->first = r = r->next) {
        bool ended = r->kind == BG_REQUEST_ENDED;
        out[n++] = (bg_fault){
            .ticket = ended ? 0 : (uintptr_t)r,
            .source = r->source->id,
            .buf = r->buf,
            .tag = r->tag,
            .offset = r->offset,
            .length = r->length,
            .command = r->command,
            .flags = r->flags,
            .error = ended ? r->error : r->retried,
        };
    }
    if (faults->first) {
        signal_taker(faults);
    } else {
        faults->last = &faults->first;
        if (faults->signalled) {
            eventfd_t ignored;
            eventfd_read(faults->eventfd, &ignored);
            faults->signalled = false;
        }
    }
    pthread_mutex_unlock(&faults->lock);
    return n;
}

/* Parts of a range one after the other through one buffer. */
static int cache(const bg_request *r)
{
    int ret = 0;
    for (uint32_t done = 0, n; ret == 0 && done < r->length; done += n) {
        n = r->length - done < r->source->step ? r->length - done : r->source->step;
        ret = bg_map_pread(r->source->map, (int64_t)(r->offset + done), r->buf, n);
    }
    return ret;
}

void bg_request_unpipe(bg_request *r)
{
    r->lost |= r->pipe && bg_pipe_empty(r->pipe, r->buf) != 0;
    r->pipe = NULL;
}

static int run(bg_request *r)
{
    bg_map *map = r->source->map;
    int ret = 0;
    if (r->flight)
        ret = bg_flight_redo(r);
    else if (r->kind == BG_REQUEST_READ)
        ret = bg_map_pread(map, (int64_t)r->offset, r->buf, r->length);
    else if (r->kind == BG_REQUEST_WRITE)
        ret = bg_map_pwrite(map, (int64_t)r->offset, r->buf, r->length);
    else if (r->kind == BG_REQUEST_ZERO)
        ret = bg_map_zero(map, (int64_t)r->offset, r->length, r->zero);
    else if (r->kind == BG_REQUEST_CACHE)
        ret = cache(r);
    if (r->kind == BG_REQUEST_FLUSH)
        return bg_map_flush(map, 1);
    return ret == 0 && r->durable ? bg_map_flush(map, 0) : ret;
}

/* To the pool. */
static void lend(bg_request *r)
{
    atomic_fetch_add_explicit(&r->source->on_pool, 1, memory_order_relaxed);
}

static void complete(bg_request *r)
{
    int ret = run(r);
    atomic_fetch_sub(&r->source->on_pool, 1);
    if (ret == 0) {
        r->source->done(r);
    } else {
        r->next = NULL;
        bg_faults_post(r->source->faults, r, true);
    }
}

static void run_on_pool(bg_task *task)
{
    complete((bg_request *)task);
}

static void run_in_turn(bg_task *task)
{
    for (bg_request *r = (bg_request *)task, *next; r; r = next) {
        next = r->next;
        complete(r);
    }
}

void bg_request_submit(bg_request *first)
{
    for (bg_request *r = first; r; r = r->next) {
        lend(r);
        r->task = (bg_task){.next = r->next ? &r->next->task : NULL, .run = run_on_pool, .lane = r->lane};
    }
    bg_pool_submit_all(first->source->pool, &first->task);
}

bg_request *bg_request_share(bg_request *first, int count)
{
    bg_request *rest = first, **last = &rest;
    int own = bg_pool_has_processors(first->source->pool) ? count - count / 2 : count;
    for (; own > 0; own--, last = &(*last)->next)
        (*last)->shared = true;
    bg_request *given = *last;
    *last = NULL;
    for (bg_request *r = given; r; r = r->next)
        lend(r);
    if (given) {
        given->task = (bg_task){.run = run_in_turn, .lane = BG_LANE_BUSY};
        bg_pool_submit(given->source->pool, &given->task);
    }
    return rest;
}

enum bg_request_outcome bg_request_retry(bg_request *r)
{
    r->retried = true;
    bg_map *map = r->source->map;
    /* What has to be durable might be done, and then once more by Python, which alone can flush all of it. */
    if (!map || r->durable || (r->kind != BG_REQUEST_READ && r->kind != BG_REQUEST_WRITE))
        return BG_REQUEST_FAULTS;
    if (r->length > MAX_RETRY_NOW)
        return BG_REQUEST_BLOCKS;
    int ret = r->kind == BG_REQUEST_READ ? bg_map_pread_now(map, (int64_t)r->offset, r->buf, r->length)
                                         : bg_map_pwrite_now(map, (int64_t)r->offset, r->buf, r->length);
    return ret == 0 ? BG_REQUEST_DONE : ret == -EAGAIN ? BG_REQUEST_BLOCKS : BG_REQUEST_FAULTS;
}

void bg_source_wait(const bg_source *source)
{
    while (atomic_load(&source->on_pool))
        usleep(200);
}

/* Whether it certainly has to wait for a device, if it can not be done now. */
static bool waits(const bg_map_request *found)
{
    for (int i = 0; i < found->count; i++)
        if (found->pieces[i].fd >= 0 && bg_waits(found->pieces[i].haste, found->write != 0))
            return true;
    return false;
}

static enum bg_request_outcome attempt(bg_request *request, uint32_t longest)
{
    bg_map *map = request->source->map;
    if (!map || request->kind == BG_REQUEST_OTHER)
        return BG_REQUEST_FAULTS;
    if (request->durable || request->kind == BG_REQUEST_FLUSH) {
        int flush = bg_map_try_flush(map, request->kind == BG_REQUEST_FLUSH);
        if (!flush)
            return BG_REQUEST_FAULTS;
        if (request->kind == BG_REQUEST_FLUSH)
            return flush == 2 ? BG_REQUEST_DONE : BG_REQUEST_BLOCKS;
        longest = 0;
    }
    if (request->kind == BG_REQUEST_ZERO) {
        int64_t most = longest < MAX_ZERO_NOW ? longest : MAX_ZERO_NOW;
        int ret = request->durable ? -EAGAIN
                                   : bg_map_zero_now(map, (int64_t)request->offset, request->length, request->zero, most);
        return ret == 0 ? BG_REQUEST_DONE : ret == -EAGAIN ? BG_REQUEST_BLOCKS : BG_REQUEST_FAULTS;
    }
    bg_map_piece pieces[FEW_PIECES];
    bg_map_request found;
    int ret = bg_map_begin(map, (int64_t)request->offset, request->length, request->kind == BG_REQUEST_WRITE, pieces, FEW_PIECES,
                           &found);
    int first = ret == BG_MAP_MISS && request->kind == BG_REQUEST_WRITE
                    ? bg_map_has_first_write(map, (int64_t)request->offset, request->length)
                    : 0;
    if (first) {
        uint32_t most = first & BG_MAP_COPY ? MAX_COPY_NOW : request->pipe ? UINT32_MAX : MAX_FIRST_NOW;
        int done = request->length <= (longest < most ? longest : most)
                       ? bg_map_first_write_now(map, (int64_t)request->offset, request->buf, request->pipe, request->length,
                                                request->pipe || request->shared ? INT64_MAX : HEAVY)
                       : -EAGAIN;
        request->lane = bg_map_is_direct(map) ? BG_LANE_WAITS : BG_LANE_PLAIN;
        return done == 0 ? BG_REQUEST_DONE : done == -E2BIG ? BG_REQUEST_HEAVY : BG_REQUEST_BLOCKS;
    }
    if (ret != 0)
        return ret == -E2BIG ? BG_REQUEST_BLOCKS : BG_REQUEST_FAULTS;
    bool blocks = request->kind == BG_REQUEST_CACHE || request->length > longest;
    request->lane = waits(&found) ? BG_LANE_WAITS : BG_LANE_PLAIN;
    if (request->announce && !blocks && bg_map_in_memory(&found))
        request->source->begun(request);
    if (!request->pipe && bg_flight_begin(request, &found))
        return BG_REQUEST_BEGUN;
    int done = blocks ? -EAGAIN : bg_map_move_part_now(map, &found, request->buf, request->pipe, 0, request->length);
    if (done < 0 && done != -EAGAIN)
        bg_request_unpipe(request); /* while what was written is still where it was */
    bg_map_end(map, &found, done != -EAGAIN);
    if (done == -EAGAIN)
        return BG_REQUEST_BLOCKS;
    return done < 0 ? BG_REQUEST_FAULTS : BG_REQUEST_DONE;
}

enum bg_request_outcome bg_request_try(bg_request *request, uint32_t longest)
{
    enum bg_request_outcome outcome = attempt(request, longest);
    if (outcome != BG_REQUEST_DONE && request->pipe) {
        bg_request_unpipe(request);
        /* From memory it may be done at once all the same. */
        if (outcome == BG_REQUEST_BLOCKS && !request->lost)
            outcome = attempt(request, longest);
    }
    return request->lost ? BG_REQUEST_LOST : outcome;
}
