/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#include "pool.h"

#include "wait.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>

struct bg_pool {
    pthread_mutex_t lock;
    bg_waiters work;
    bg_task *first, **last;
    bool closing;
    int nthreads;
    pthread_t threads[];
};

static void *worker(void *arg)
{
    bg_pool *pool = arg;
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        bg_task *task = pool->first;
        if (task) {
            pool->first = task->next;
            if (!pool->first)
                pool->last = &pool->first;
            pthread_mutex_unlock(&pool->lock);
            task->run(task);
            pthread_mutex_lock(&pool->lock);
        } else if (pool->closing) {
            break;
        } else {
            bg_wait(&pool->work, &pool->lock);
        }
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

int bg_pool_new(int threads, bg_pool **out)
{
    if (threads < 1 || threads > BG_POOL_MAX_THREADS)
        return -EINVAL;
    bg_pool *pool = calloc(1, sizeof(*pool) + (size_t)threads * sizeof(pool->threads[0]));
    if (!pool)
        return -ENOMEM;
    pthread_mutex_init(&pool->lock, NULL);
    pool->last = &pool->first;
    /* Signals belong to the program's own threads. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int ret = 0;
    while (ret == 0 && pool->nthreads < threads) {
        ret = -pthread_create(&pool->threads[pool->nthreads], NULL, worker, pool);
        if (ret == 0)
            pool->nthreads++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
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
    for (int i = 0; i < pool->nthreads; i++)
        pthread_join(pool->threads[i], NULL);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

int bg_pool_threads(const bg_pool *pool)
{
    return pool->nthreads;
}

void bg_pool_submit(bg_pool *pool, bg_task *task)
{
    task->next = NULL;
    pthread_mutex_lock(&pool->lock);
    *pool->last = task;
    pool->last = &task->next;
    bool wake = bg_changed(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    if (wake)
        bg_wake(&pool->work, 1);
}

bool bg_pool_waiting(bg_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    bool waiting = pool->first != NULL;
    pthread_mutex_unlock(&pool->lock);
    return waiting;
}
