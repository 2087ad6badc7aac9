/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "queue.h"

#include "io.h"
#include "wait.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

struct bg_entry {
    bg_task task; /* first: a task of ours is its entry */
    bg_queue *queue;
    bg_entry *next; /* among the results */
    int64_t ticket, result;
    int op, fd, mode;
    enum bg_haste haste;
    void *buf;
    int64_t length, offset;
};

struct bg_queue {
    bg_pool *pool;
    int eventfd;
    pthread_mutex_t lock;
    bg_entry *first, **last; /* results */
    uint64_t under_way;
    bg_waiters ended; /* for none to be under way */
};

int bg_queue_new(bg_pool *pool, bg_queue **out)
{
    bg_queue *queue = calloc(1, sizeof(*queue));
    if (!queue)
        return -ENOMEM;
    queue->eventfd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (queue->eventfd < 0) {
        int ret = -errno;
        free(queue);
        return ret;
    }
    pthread_mutex_init(&queue->lock, NULL);
    queue->pool = pool;
    queue->last = &queue->first;
    *out = queue;
    return 0;
}

static void free_results(bg_entry *first, const bg_entry *end)
{
    for (bg_entry *next; first != end; first = next) {
        next = first->next;
        free(first);
    }
}

void bg_queue_free(bg_queue *queue)
{
    if (!queue)
        return;
    pthread_mutex_lock(&queue->lock);
    while (queue->under_way)
        bg_wait(&queue->ended, &queue->lock);
    pthread_mutex_unlock(&queue->lock);
    free_results(queue->first, NULL);
    close(queue->eventfd);
    pthread_mutex_destroy(&queue->lock);
    free(queue);
}

int bg_queue_eventfd(const bg_queue *queue)
{
    return queue->eventfd;
}

bg_pool *bg_queue_pool(const bg_queue *queue)
{
    return queue->pool;
}

bg_entry *bg_queue_reserve(bg_queue *queue, int64_t ticket)
{
    bg_entry *entry = calloc(1, sizeof(*entry));
    if (entry) {
        entry->queue = queue;
        entry->ticket = ticket;
        pthread_mutex_lock(&queue->lock);
        queue->under_way++;
        pthread_mutex_unlock(&queue->lock);
    }
    return entry;
}

void bg_queue_complete(bg_entry *entry, int64_t result)
{
    bg_queue *queue = entry->queue;
    entry->result = result;
    entry->next = NULL;
    pthread_mutex_lock(&queue->lock);
    bool first = queue->first == NULL;
    *queue->last = entry;
    queue->last = &entry->next;
    /* Under the lock: once it is released, the queue may be freed. */
    if (first)
        eventfd_write(queue->eventfd, 1);
    if (--queue->under_way == 0)
        bg_wake_all(&queue->ended);
    pthread_mutex_unlock(&queue->lock);
}

static int64_t execute(const bg_entry *e)
{
    int64_t ret;
    switch (e->op) {
    case BG_OP_PREAD:
        return bg_pread(e->fd, e->buf, e->length, e->offset);
    case BG_OP_PWRITE:
        return bg_pwrite_by(e->haste, e->fd, e->buf, e->length, e->offset);
    case BG_OP_FDATASYNC:
        do
            ret = fdatasync(e->fd) < 0 ? -errno : 0;
        while (ret == -EINTR);
        return ret;
    case BG_OP_FALLOCATE:
        do
            ret = fallocate(e->fd, e->mode, e->offset, e->length) < 0 ? -errno : 0;
        while (ret == -EINTR);
        return ret;
    default:
        return bg_pwrite_zeroes(e->fd, e->length, e->offset, e->mode);
    }
}

static void run_entry(bg_task *task)
{
    bg_entry *entry = (bg_entry *)task;
    bg_queue_complete(entry, execute(entry));
}

int bg_queue_submit(bg_queue *queue, int64_t ticket, int op, int fd, void *buf, int64_t length, int64_t offset, int mode)
{
    if (op < BG_OP_PREAD || op > BG_OP_ZERO)
        return -EINVAL;
    bg_entry *entry = bg_queue_reserve(queue, ticket);
    if (!entry)
        return -ENOMEM;
    entry->haste = bg_haste_of(fd);
    bool waits = op == BG_OP_FDATASYNC || bg_waits(entry->haste, op != BG_OP_PREAD);
    entry->task = (bg_task){.run = run_entry, .lane = waits ? BG_LANE_WAITS : BG_LANE_PLAIN};
    entry->op = op;
    entry->fd = fd;
    entry->buf = buf;
    entry->length = length;
    entry->offset = offset;
    entry->mode = mode;
    bg_pool_submit(queue->pool, &entry->task);
    return 0;
}

int64_t bg_queue_reap(bg_queue *queue, bg_completion *out, int64_t max)
{
    if (max < 0)
        return -EINVAL;
    pthread_mutex_lock(&queue->lock);
    bg_entry *taken = queue->first, *rest = taken;
    int64_t n = 0;
    for (; rest && n < max; rest = rest->next)
        out[n++] = (bg_completion){rest->ticket, rest->result};
    queue->first = rest;
    if (!rest) {
        queue->last = &queue->first;
        eventfd_t ignored;
        eventfd_read(queue->eventfd, &ignored);
    }
    pthread_mutex_unlock(&queue->lock);
    free_results(taken, rest);
    return n;
}
