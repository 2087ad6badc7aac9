/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "copier.h"

#include "buffers.h"
#include "io.h"
#include "wait.h"
#include "zero.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define STEP ((int64_t)256 << 10) /* most bytes moved at a time: what the processor's cache keeps */
#define CLAIM ((int64_t)1 << 20) /* longest run claimed at once, if clusters are no longer: whoever writes there waits for it */
#define MAX_NOW ((int64_t)128 << 10) /* most that is copied by who must not be kept for long */
#define PAUSE 64 /* copies without waiting that are not tried after one was refused */
#define FEW_PIECES 16
#define TAKES_WRITES (BG_MAP_WRITABLE | BG_MAP_ALLOCATE)

enum kind { NATIVE, PYTHON, FROZEN };

typedef struct range {
    struct range *next, **back;
    int64_t start, end;
    int64_t number; /* 0 for NATIVE, which are on their thread's stack */
    enum kind kind;
} range;

struct bg_copier {
    bg_bitmap *todo, *done;
    bg_map *source, *target;
    int64_t size, cluster, step;
    bg_buffers *buffers;
    uint32_t room; /* of a buffer: for a step */
    int eventfd;
    pthread_mutex_t lock;
    bg_waiters ended; /* a native claim */
    range *first;
    int64_t last_number;
    enum bg_copier_mode mode;
    bool watched;
    int pause; /* so many copies without waiting are not tried */
    bg_sums *sums; /* or NULL */
    bg_copier_stats stats;
};

struct bg_copier_link {
    bg_map_copier hook; /* first: the map knows this */
    bg_copier *copier;
    int64_t shift;
    const bg_copier_link *next; /* or NULL */
};

int bg_copier_new(bg_bitmap *todo, bg_bitmap *done, bg_map *source, bg_map *target, bg_copier **out)
{
    int64_t size = bg_bitmap_size(todo), cluster = bg_bitmap_granularity(todo);
    if (bg_bitmap_size(done) != size || bg_bitmap_granularity(done) != cluster || bg_map_size(source) != size ||
        bg_map_size(target) != size)
        return -EINVAL;
    bg_copier *c = calloc(1, sizeof(*c));
    if (!c)
        return -ENOMEM;
    c->eventfd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int ret = c->eventfd < 0 ? -errno : 0;
    if (ret == 0 && !(c->buffers = bg_buffers_new())) {
        close(c->eventfd);
        ret = -ENOMEM;
    }
    if (ret < 0) {
        free(c);
        return ret;
    }
    c->todo = todo;
    c->done = done;
    c->source = source;
    c->target = target;
    c->size = size;
    c->cluster = cluster;
    c->step = cluster < STEP ? cluster : STEP;
    c->room = bg_buffer_size((uint32_t)c->step);
    pthread_mutex_init(&c->lock, NULL);
    *out = c;
    return 0;
}

int bg_copier_free(bg_copier *c)
{
    if (!c)
        return 0;
    if (c->first)
        return -EBUSY;
    bg_buffers_free(c->buffers);
    close(c->eventfd);
    pthread_mutex_destroy(&c->lock);
    free(c);
    return 0;
}

void bg_copier_set_mode(bg_copier *c, int mode)
{
    pthread_mutex_lock(&c->lock);
    c->mode = (enum bg_copier_mode)mode;
    pthread_mutex_unlock(&c->lock);
}

int bg_copier_set_sums(bg_copier *c, bg_sums *sums)
{
    if (bg_sums_size(sums) != c->size)
        return -EINVAL;
    pthread_mutex_lock(&c->lock);
    c->sums = sums;
    pthread_mutex_unlock(&c->lock);
    return 0;
}

/* The rest of the file up to the links runs under the lock where it takes none itself. */

static void enlist(bg_copier *c, range *r)
{
    r->next = c->first;
    r->back = &c->first;
    if (r->next)
        r->next->back = &r->next;
    c->first = r;
}

static void delist(range *r)
{
    *r->back = r->next;
    if (r->next)
        r->next->back = r->back;
}

static range *enlist_new(bg_copier *c, enum kind kind, int64_t start, int64_t end)
{
    range *r = malloc(sizeof(*r));
    if (!r)
        return NULL;
    *r = (range){.start = start, .end = end, .number = ++c->last_number, .kind = kind};
    enlist(c, r);
    return r;
}

static range *delist_number(bg_copier *c, enum kind kind, int64_t number)
{
    range *r = c->first;
    while (r && (r->number != number || r->kind != kind))
        r = r->next;
    if (r)
        delist(r);
    return r;
}

static bool touches(const range *r, int64_t start, int64_t end)
{
    return r->start < end && start < r->end;
}

static const range *frozen_in(const bg_copier *c, int64_t start, int64_t end)
{
    for (const range *r = c->first; r; r = r->next)
        if (r->kind == FROZEN && touches(r, start, end))
            return r;
    return NULL;
}

/* One that only Python can wait for, if there is one. */
static const range *claim_in(const bg_copier *c, int64_t start, int64_t end)
{
    const range *found = NULL;
    for (const range *r = c->first; r; r = r->next)
        if (r->kind != FROZEN && touches(r, start, end)) {
            found = r;
            if (r->kind == PYTHON)
                break;
        }
    return found;
}

static bool range_ok(const bg_copier *c, int64_t offset, int64_t end)
{
    return offset >= 0 && offset <= end && end <= c->size;
}

static bool clusters_ok(const bg_copier *c, int64_t offset, int64_t end)
{
    return range_ok(c, offset, end) && offset % c->cluster == 0 && (end % c->cluster == 0 || end == c->size);
}

int64_t bg_copier_take(bg_copier *c, int64_t offset, int64_t end, int64_t max_length, bg_bitmap_extent *out)
{
    pthread_mutex_lock(&c->lock);
    int64_t ret = bg_bitmap_take(c->todo, offset, end, max_length, out);
    if (ret == 1) {
        const range *r = enlist_new(c, PYTHON, out->start, out->end);
        ret = r ? r->number : -ENOMEM;
        if (!r)
            bg_bitmap_set(c->todo, out->start, out->end - out->start);
    }
    pthread_mutex_unlock(&c->lock);
    return ret;
}

int bg_copier_finish(bg_copier *c, int64_t number, int copied)
{
    pthread_mutex_lock(&c->lock);
    range *r = delist_number(c, PYTHON, number);
    if (r && !copied)
        bg_bitmap_set(c->todo, r->start, r->end - r->start);
    pthread_mutex_unlock(&c->lock);
    free(r);
    return r ? 0 : -ENOENT;
}

int bg_copier_pending(bg_copier *c, int64_t offset, int64_t end)
{
    bg_bitmap_extent run;
    pthread_mutex_lock(&c->lock);
    int ret = bg_bitmap_next_dirty(c->todo, offset, end, BG_BITMAP_NO_LIMIT, &run);
    if (ret == 0)
        ret = claim_in(c, offset, end) != NULL;
    pthread_mutex_unlock(&c->lock);
    return ret;
}

int64_t bg_copier_claimed(bg_copier *c, int64_t offset, int64_t end)
{
    pthread_mutex_lock(&c->lock);
    const range *r = claim_in(c, offset, end);
    int64_t ret = !r ? 0 : r->kind == PYTHON ? r->number : -1;
    pthread_mutex_unlock(&c->lock);
    return ret;
}

int bg_copier_watch(bg_copier *c, int64_t offset, int64_t end)
{
    pthread_mutex_lock(&c->lock);
    int ret = 0;
    for (const range *r = c->first; r && !ret; r = r->next)
        ret = r->kind == NATIVE && touches(r, offset, end);
    if (ret)
        c->watched = true;
    pthread_mutex_unlock(&c->lock);
    return ret;
}

int bg_copier_eventfd(const bg_copier *c)
{
    return c->eventfd;
}

void bg_copier_acknowledge(bg_copier *c)
{
    eventfd_t ignored;
    eventfd_read(c->eventfd, &ignored);
}

int64_t bg_copier_freeze(bg_copier *c, int64_t offset, int64_t length)
{
    if (length < 0 || !range_ok(c, offset, offset + length))
        return -EINVAL;
    bg_bitmap_extent run;
    pthread_mutex_lock(&c->lock);
    int64_t ret = bg_bitmap_next_dirty(c->done, offset, offset + length, BG_BITMAP_NO_LIMIT, &run) == 1 ? 0 : -ENOMEM;
    if (ret < 0) {
        const range *r = enlist_new(c, FROZEN, offset, offset + length);
        ret = r ? r->number : ret;
    }
    pthread_mutex_unlock(&c->lock);
    return ret;
}

int bg_copier_thaw(bg_copier *c, int64_t number)
{
    pthread_mutex_lock(&c->lock);
    range *r = delist_number(c, FROZEN, number);
    pthread_mutex_unlock(&c->lock);
    free(r);
    return r ? 0 : -ENOENT;
}

/* With the lock held: 1 when all of [offset, end), whole clusters, is done now. */
static int release(bg_copier *c, int64_t offset, int64_t end)
{
    int ret = 1;
    for (int64_t at = offset, stop; at < end; at = stop) {
        const range *frozen = frozen_in(c, at, end);
        int64_t clear = frozen ? frozen->start - frozen->start % c->cluster : end;
        /* Of several frozen ranges any may come first. */
        while (clear > at && (frozen = frozen_in(c, at, clear)))
            clear = frozen->start - frozen->start % c->cluster;
        if (clear > at) {
            bg_bitmap_set(c->done, at, clear - at);
            stop = clear;
        } else {
            ret = 0;
            stop = at + c->cluster < end ? at + c->cluster : end;
        }
    }
    return ret;
}

int bg_copier_release(bg_copier *c, int64_t offset, int64_t end)
{
    if (!clusters_ok(c, offset, end))
        return -EINVAL;
    pthread_mutex_lock(&c->lock);
    int ret = release(c, offset, end);
    pthread_mutex_unlock(&c->lock);
    return ret;
}

void bg_copier_get_stats(bg_copier *c, bg_copier_stats *out)
{
    pthread_mutex_lock(&c->lock);
    *out = c->stats;
    pthread_mutex_unlock(&c->lock);
}

/* Whether a copy has a chance; the map may change its mind later. */
static bool is_mapped(const bg_copier *c, int64_t at)
{
    bg_map_extent e;
    return bg_map_find(c->source, at, &e) && bg_map_find(c->target, at, &e) &&
           e.flags & TAKES_WRITES;
}

/* Whether the target is known to read as zeroes, without reading it. */
static bool reads_zero(bg_map *map, int64_t offset, int64_t length)
{
    bg_map_piece pieces[FEW_PIECES];
    bg_map_request request;
    if (bg_map_begin(map, offset, length, 0, pieces, FEW_PIECES, &request) != 0)
        return false;
    bool zero = true;
    for (int i = 0; i < request.count && zero; i++) {
        const bg_map_piece *p = &pieces[i];
        if (p->fd >= 0) {
            off_t data = lseek(p->fd, p->storage_offset, SEEK_DATA);
            zero = data < 0 ? errno == ENXIO : data >= p->storage_offset + p->length;
        }
    }
    bg_map_end(map, &request, 0);
    return zero;
}

/* 0 and in *moved how many bytes had to be written; or a miss, or it failed, or -EAGAIN `now`. */
static int copy_range(bg_copier *c, int64_t start, int64_t end, bool now, bg_sums *sums, int64_t *moved)
{
    void *buf = is_mapped(c, start) ? bg_buffers_take(c->buffers, c->room) : NULL;
    if (!buf)
        return BG_MAP_MISS;
    int ret = 0;
    for (int64_t at = start, n; at < end && ret == 0; at += n) {
        n = end - at < c->step ? end - at : c->step;
        ret = now ? bg_map_pread_now(c->source, at, buf, n) : bg_map_pread(c->source, at, buf, n);
        if (ret == 0 && !(bg_is_zero(buf, (size_t)n) && reads_zero(c->target, at, n))) {
            ret = now ? bg_map_pwrite_now(c->target, at, buf, n) : bg_map_pwrite(c->target, at, buf, n);
            *moved += n;
        }
        if (ret == 0 && sums)
            ret = bg_sums_add(sums, at, buf, n);
    }
    bg_buffers_give(c->buffers, buf, c->room);
    return ret;
}

/* With the lock held, which it gives up meanwhile. The run's bits are set. What is done is added to *mine. */
static int copy_run(bg_copier *c, const bg_bitmap_extent *run, bool now, bg_copier_stats *mine)
{
    range claim = {.start = run->start, .end = run->end, .kind = NATIVE};
    int64_t moved = 0;
    bg_sums *sums = c->sums;
    bg_bitmap_reset(c->todo, run->start, run->end - run->start);
    enlist(c, &claim);
    pthread_mutex_unlock(&c->lock);
    int ret = copy_range(c, run->start, run->end, now, sums, &moved);
    /* One `now` is of one step, and what has failed of it was not added. */
    if (ret != 0 && sums && !now)
        bg_sums_spoil(sums, run->start, run->end - run->start);
    pthread_mutex_lock(&c->lock);
    delist(&claim);
    if (ret != 0) {
        bg_bitmap_set(c->todo, run->start, run->end - run->start);
        c->pause = now ? PAUSE : c->pause;
    } else {
        mine->copied += run->end - run->start;
        mine->moved += moved;
    }
    if (c->watched) {
        c->watched = false;
        eventfd_write(c->eventfd, 1);
    }
    bg_wake_all(&c->ended);
    return ret;
}

/* With the lock held: whether a copy without waiting is worth a try. */
static bool is_short(bg_copier *c, int64_t start, int64_t end)
{
    if (end - start > MAX_NOW || c->cluster > MAX_NOW)
        return false;
    c->pause -= c->pause > 0;
    return c->pause == 0;
}

static int64_t longest_claim(const bg_copier *c)
{
    return c->cluster > CLAIM ? c->cluster : CLAIM;
}

/* With the lock held: 0 once all of [start, end) is copied; -EAGAIN `now`. */
static int copy_all(bg_copier *c, int64_t start, int64_t end, bool now, bg_copier_stats *mine)
{
    int64_t longest = now ? c->cluster : longest_claim(c);
    if (now && !is_short(c, start, end))
        return -EAGAIN;
    for (;;) {
        bg_bitmap_extent run;
        if (c->mode != BG_COPIER_ON)
            return BG_MAP_MISS;
        const range *claim = claim_in(c, start, end);
        if (claim && claim->kind == PYTHON)
            return BG_MAP_MISS;
        if (bg_bitmap_next_dirty(c->todo, start, end, longest, &run) == 1) {
            if (copy_run(c, &run, now, mine) != 0)
                return now ? -EAGAIN : BG_MAP_MISS;
        } else if (claim && now) {
            return -EAGAIN;
        } else if (claim) {
            bg_wait(&c->ended, &c->lock);
        } else {
            return 0;
        }
    }
}

int bg_copier_copy(bg_copier *c, int64_t offset, int64_t end, bg_copier_stats *out)
{
    if (!clusters_ok(c, offset, end))
        return -EINVAL;
    *out = (bg_copier_stats){0};
    pthread_mutex_lock(&c->lock);
    int ret = copy_all(c, offset, end, false, out);
    pthread_mutex_unlock(&c->lock);
    return ret;
}

int64_t bg_copier_find_runs(bg_copier *c, int64_t offset, int64_t longest, int64_t bytes, bg_copier_run *out, int64_t max)
{
    if (longest < 1 || bytes < c->cluster || !range_ok(c, offset, c->size))
        return -EINVAL;
    int64_t count = 0;
    bg_bitmap_extent run;
    bytes -= bytes % c->cluster;
    while (count < max && bytes > 0 && bg_bitmap_next_dirty(c->todo, offset, c->size, longest, &run) == 1) {
        int64_t length = run.end - run.start;
        if (length >= longest)
            break;
        length = length < bytes ? length : bytes;
        out[count++] = (bg_copier_run){.start = run.start, .end = run.start + length};
        bytes -= length;
        offset = run.start + length;
    }
    return count;
}

/* Whether the map knows a place for all of [start, end): with one of these flags, if any are asked for. */
static bool all_mapped(bg_map *map, int64_t start, int64_t end, int flags)
{
    bg_map_extent e;
    while (start < end) {
        if (!bg_map_find(map, start, &e) || (flags && !(e.flags & flags)))
            return false;
        start = e.offset + e.length;
    }
    return true;
}

int64_t bg_copier_check_runs(bg_copier *c, bg_copier_run *runs, int64_t count)
{
    int64_t any = 0;
    for (int64_t i = 0; i < count; i++) {
        bg_copier_run *r = &runs[i];
        if (!clusters_ok(c, r->start, r->end))
            return -EINVAL;
        r->unmapped = all_mapped(c->source, r->start, r->end, 0) ? 0 : BG_COPIER_SOURCE;
        if (!all_mapped(c->target, r->start, r->end, TAKES_WRITES))
            r->unmapped |= BG_COPIER_TARGET;
        any |= r->unmapped;
    }
    return any;
}

/* With the lock held: 0, or a miss. */
static int copy_own(bg_copier *c, int64_t start, int64_t end, bg_copier_stats *mine)
{
    bg_bitmap_extent run;
    while (c->mode == BG_COPIER_ON && bg_bitmap_next_dirty(c->todo, start, end, longest_claim(c), &run) == 1) {
        if (copy_run(c, &run, false, mine) != 0)
            return BG_MAP_MISS;
        release(c, run.start, run.end);
        start = run.end;
    }
    return c->mode == BG_COPIER_ON ? 0 : BG_MAP_MISS;
}

static bool runs_ok(const bg_copier *c, const bg_copier_run *runs, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        if (!clusters_ok(c, runs[i].start, runs[i].end))
            return false;
    return true;
}

/* Returns whether some of it is left. */
static bool copy_and_release(bg_copier *c, bg_copier_run *run, bg_copier_stats *mine)
{
    bg_bitmap_extent kept;
    pthread_mutex_lock(&c->lock);
    run->missed = copy_own(c, run->start, run->end, mine) != 0;
    /* What a slow guest write has made done while somebody reads it waits for the reader. */
    run->released = !frozen_in(c, run->start, run->end) &&
                    bg_bitmap_next_clean(c->done, run->start, run->end, BG_BITMAP_NO_LIMIT, &kept) == 0;
    pthread_mutex_unlock(&c->lock);
    return run->missed;
}

typedef struct {
    bg_task task; /* first */
    bg_copier *copier;
    bg_copier_run *runs;
    int64_t count, at, missed;
    bg_copier_stats *out;
    bg_pool *pool;
    bg_entry *entry;
} runs_task;

static void run_runs(bg_task *task)
{
    runs_task *t = (runs_task *)task;
    while (t->at < t->count) {
        t->missed += copy_and_release(t->copier, &t->runs[t->at++], t->out);
        if (t->at < t->count && bg_pool_waiting(t->pool)) {
            bg_pool_submit(t->pool, task);
            return;
        }
    }
    bg_queue_complete(t->entry, t->missed);
    free(t);
}

/* Whether that place is a file in memory, or zeroes. */
static bool in_memory(bg_map *map, int64_t offset)
{
    bg_map_piece piece;
    bg_map_request request;
    if (bg_map_begin(map, offset, 1, 0, &piece, 1, &request) != 0)
        return false;
    bool memory = bg_map_in_memory(&request);
    bg_map_end(map, &request, 0);
    return memory;
}

int bg_copier_start_runs(bg_copier *c, bg_copier_run *runs, int64_t count, bg_copier_stats *out, bg_queue *queue,
                         int64_t ticket)
{
    if (count < 1 || !runs_ok(c, runs, count))
        return -EINVAL;
    runs_task *t = malloc(sizeof(*t));
    bg_entry *entry = t ? bg_queue_reserve(queue, ticket) : NULL;
    if (!entry) {
        free(t);
        return -ENOMEM;
    }
    *out = (bg_copier_stats){0};
    *t = (runs_task){.copier = c, .runs = runs, .count = count, .out = out, .pool = bg_queue_pool(queue), .entry = entry};
    t->task.run = run_runs;
    t->task.lane = in_memory(c->source, runs[0].start) && in_memory(c->target, runs[0].start) ? BG_LANE_BUSY : BG_LANE_PLAIN;
    bg_pool_submit(t->pool, &t->task);
    return 0;
}

/* With the lock held: 0 once [start, end) may be overwritten; -EAGAIN `now`. What had to be written for that is added to *moved. */
static int make_done(bg_copier *c, int64_t start, int64_t end, bool now, int64_t *moved)
{
    bg_copier_stats mine = {0};
    int ret = copy_all(c, start, end, now, &mine);
    c->stats.copied += mine.copied;
    c->stats.moved += mine.moved;
    *moved += mine.moved;
    if (c->mode == BG_COPIER_BROKEN)
        return 0;
    if (ret == 0 && frozen_in(c, start, end))
        ret = BG_MAP_MISS;
    if (ret == 0)
        bg_bitmap_set(c->done, start, end - start);
    return ret;
}

/* 0 when one copier is done with [*from, *to) of the map's disk, which grows to whole clusters; *moved: see make_done. */
static int copy_for(const bg_copier_link *link, int64_t *from, int64_t *to, int now, int64_t *moved)
{
    bg_copier *c = link->copier;
    int64_t start = *from - link->shift, end = *to - link->shift;
    if (start < 0 || end > c->size)
        return BG_MAP_MISS;
    start -= start % c->cluster;
    end += (c->cluster - end % c->cluster) % c->cluster;
    end = end < c->size ? end : c->size;
    pthread_mutex_lock(&c->lock);
    int ret = make_done(c, start, end, now, moved);
    if (ret != 0 && !now)
        c->stats.refused++;
    pthread_mutex_unlock(&c->lock);
    *from = start + link->shift;
    *to = end + link->shift;
    return ret;
}

static int copy(bg_map_copier *hook, bg_map *map, int64_t offset, int64_t length, int now)
{
    /* The map may show a part of the disk only. */
    int64_t start = 0, end = bg_map_size(map), moved = 0;
    int ret = 0;
    for (const bg_copier_link *link = (const bg_copier_link *)hook; link && ret == 0; link = link->next) {
        int64_t from = offset, to = offset + length;
        ret = copy_for(link, &from, &to, now, &moved);
        /* Clusters differ in size. Only what all are done with may be written without asking. */
        start = from > start ? from : start;
        end = to < end ? to : end;
    }
    if (now)
        atomic_store_explicit(&hook->lately, ret == 0 ? moved : 0, memory_order_relaxed);
    return ret != 0 ? ret : bg_map_copied(map, start, end - start);
}

int bg_copier_link_new(bg_copier *copier, int64_t shift, const bg_copier_link *next, bg_copier_link **out)
{
    bg_copier_link *link = malloc(sizeof(*link));
    if (!link)
        return -ENOMEM;
    *link = (bg_copier_link){{.copy = copy}, copier, shift, next};
    *out = link;
    return 0;
}

void bg_copier_link_free(bg_copier_link *link)
{
    free(link);
}

bg_map_copier *bg_copier_link_hook(bg_copier_link *link)
{
    return &link->hook;
}
