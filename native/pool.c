/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "pool.h"

#include "guard.h"
#include "wait.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

typedef struct {
    bg_task *first, **last;
} tasks;

typedef struct {
    int limit, running;
    int count;  /* submitted and not ended */
    tasks held; /* while as many run as may */
} lane;

struct bg_pool {
    pthread_mutex_t lock;
    bg_waiters work;
    tasks ready;
    lane lanes[BG_LANES];
    bool closing;
    bg_buffers *buffers;
    int nthreads;
    pthread_t threads[];
};

static void put(tasks *queue, bg_task *task)
{
    task->next = NULL;
    *queue->last = task;
    queue->last = &task->next;
}

static bg_task *take(tasks *queue)
{
    bg_task *task = queue->first;
    if (task) {
        queue->first = task->next;
        if (!queue->first)
            queue->last = &queue->first;
    }
    return task;
}

/* With the lock held, but for the time in which the task runs. */
static void run_or_hold(bg_pool *pool, bg_task *task)
{
    lane *l = &pool->lanes[task->lane]; /* afterwards the task may be gone */
    if (l->running == l->limit) {
        put(&l->held, task);
        return;
    }
    l->running++;
    pthread_mutex_unlock(&pool->lock);
    task->run(task);
    pthread_mutex_lock(&pool->lock);
    l->running--;
    l->count--;
    bg_task *next = take(&l->held);
    if (next)
        put(&pool->ready, next); /* this thread looks again */
}

static void *worker(void *arg)
{
    bg_pool *pool = arg;
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        bg_task *task = take(&pool->ready);
        if (task)
            run_or_hold(pool, task);
        else if (pool->closing)
            break;
        else
            bg_wait(&pool->work, &pool->lock);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

static int processors(void)
{
    cpu_set_t set;
    int count = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : (int)sysconf(_SC_NPROCESSORS_ONLN);
    return count < 1 ? 1 : count;
}

static int start_thread(bg_pool *pool)
{
    sigset_t before;
    bg_guard_block_signals(&before);
    int ret = -pthread_create(&pool->threads[pool->nthreads], NULL, worker, pool);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (ret == 0)
        pool->nthreads++;
    return ret;
}

int bg_pool_new(int threads, int most, bg_pool **out)
{
    if (threads < 1 || most < threads || most > BG_POOL_MAX_THREADS)
        return -EINVAL;
    bg_pool *pool = calloc(1, sizeof(*pool) + (size_t)most * sizeof(pool->threads[0]));
    if (!pool)
        return -ENOMEM;
    pool->buffers = bg_buffers_new();
    if (!pool->buffers) {
        free(pool);
        return -ENOMEM;
    }
    pthread_mutex_init(&pool->lock, NULL);
    pool->ready.last = &pool->ready.first;
    for (int i = 0; i < BG_LANES; i++)
        pool->lanes[i].held.last = &pool->lanes[i].held.first;
    pool->lanes[BG_LANE_PLAIN].limit = threads;
    pool->lanes[BG_LANE_BUSY].limit = processors();
    pool->lanes[BG_LANE_WAITS].limit = most;
    int ret = 0;
    while (ret == 0 && pool->nthreads < threads)
        ret = start_thread(pool);
    if (ret < 0) {
        bg_pool_free(pool);
        return ret;
    }
    *out = pool;
    return 0;
}

void bg_pool_free(bg_pool *pool)
{
    if (!pool)
        return;
    pthread_mutex_lock(&pool->lock);
    pool->closing = true;
    bg_wake_all(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < pool->nthreads; i++) /* no more are started */
        pthread_join(pool->threads[i], NULL);
    pthread_mutex_destroy(&pool->lock);
    bg_buffers_free(pool->buffers);
    free(pool);
}

bg_buffers *bg_pool_buffers(bg_pool *pool)
{
    return pool->buffers;
}

bool bg_pool_has_processors(const bg_pool *pool)
{
    return pool->lanes[BG_LANE_BUSY].limit > 1;
}

int bg_pool_threads(const bg_pool *pool)
{
    return pool->lanes[BG_LANE_PLAIN].limit;
}

int bg_pool_most(const bg_pool *pool)
{
    return pool->lanes[BG_LANE_WAITS].limit;
}

/* With the lock held: how many threads would have something to do. */
static int load(const bg_pool *pool)
{
    int sum = 0;
    for (const lane *l = pool->lanes; l < pool->lanes + BG_LANES; l++)
        sum += l->count < l->limit ? l->count : l->limit;
    return sum;
}

void bg_pool_submit(bg_pool *pool, bg_task *task)
{
    task->next = NULL;
    bg_pool_submit_all(pool, task);
}

void bg_pool_submit_all(bg_pool *pool, bg_task *first)
{
    int count = 0;
    pthread_mutex_lock(&pool->lock);
    for (bg_task *task = first, *next; task; task = next, count++) {
        next = task->next;
        pool->lanes[task->lane].count++;
        put(&pool->ready, task);
    }
    /* Without one more it takes longer, that is all. */
    while (!pool->closing && pool->nthreads < bg_pool_most(pool) && pool->nthreads < load(pool) && start_thread(pool) == 0)
        ;
    bool wake = bg_changed(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    if (wake)
        bg_wake(&pool->work, count);
}

bool bg_pool_waiting(bg_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    bool waiting = pool->ready.first != NULL;
    pthread_mutex_unlock(&pool->lock);
    return waiting;
}
