/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Of tasks that are busy as many run as there are processors, of those that wait as many as the pool may have threads, of the others
 * as many as it has; they pass each other, and none is lost.
 */
#define _GNU_SOURCE
#include "driver.h"
#include "pool.h"
#include "wait.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>

#define MORE 3
#define ROUNDS 2000

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static bg_waiters changed;
static int running, most, ended;
static bool others_ran, go;

static void wait_until(const bool *flag)
{
    while (!*flag)
        bg_wait(&changed, &lock);
}

static void run_counted(bg_task *task)
{
    (void)task;
    pthread_mutex_lock(&lock);
    running++;
    most = running > most ? running : most;
    bg_wake_all(&changed);
    wait_until(&go);
    running--;
    ended++;
    bg_wake_all(&changed);
    pthread_mutex_unlock(&lock);
}

static void run_other(bg_task *task)
{
    (void)task;
    pthread_mutex_lock(&lock);
    others_ran = true;
    bg_wake_all(&changed);
    pthread_mutex_unlock(&lock);
}

static void wait_for_ended(int wanted)
{
    pthread_mutex_lock(&lock);
    while (ended < wanted)
        bg_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

/* Submit tasks of one lane: `limit` run, `more` do not, and one of `other` passes them. */
static void fill_lane(bg_pool *pool, bg_task *tasks, enum bg_lane lane, int limit, int more, enum bg_lane other)
{
    running = most = ended = 0;
    go = others_ran = false;
    bg_task passes = {.run = run_other, .lane = (uint8_t)other};
    for (int i = 0; i < limit + more; i++) {
        tasks[i] = (bg_task){.run = run_counted, .lane = (uint8_t)lane};
        bg_pool_submit(pool, &tasks[i]);
    }
    pthread_mutex_lock(&lock);
    while (running < limit)
        bg_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    bg_pool_submit(pool, &passes);
    pthread_mutex_lock(&lock);
    wait_until(&others_ran);
    CHECK(running == limit && most == limit && ended == 0);
    go = true;
    bg_wake_all(&changed);
    pthread_mutex_unlock(&lock);
    wait_for_ended(limit + more);
}

void test_pool(void)
{
    cpu_set_t set;
    CHECK(sched_getaffinity(0, sizeof(set), &set) == 0);
    int processors = CPU_COUNT(&set), usual = processors + 2, all = usual + 5;
    bg_pool *pool;
    CHECK(bg_pool_new(2, 1, &pool) == -EINVAL && bg_pool_new(1, BG_POOL_MAX_THREADS + 1, &pool) == -EINVAL);
    CHECK(bg_pool_new(usual, all, &pool) == 0);
    CHECK(bg_pool_threads(pool) == usual && bg_pool_most(pool) == all);
    bg_task *tasks = calloc((size_t)all + MORE + ROUNDS, sizeof(*tasks));
    CHECK(tasks);
    fill_lane(pool, tasks, BG_LANE_BUSY, processors, MORE, BG_LANE_PLAIN);
    fill_lane(pool, tasks, BG_LANE_PLAIN, usual, MORE, BG_LANE_WAITS);
    fill_lane(pool, tasks, BG_LANE_WAITS, all - 1, 0, BG_LANE_PLAIN);
    ended = 0;
    for (int i = 0; i < ROUNDS; i++) {
        tasks[i] = (bg_task){.run = run_counted, .lane = (uint8_t)(i % BG_LANES)};
        bg_pool_submit(pool, &tasks[i]);
    }
    bg_pool_free(pool); /* runs what was submitted */
    CHECK(ended == ROUNDS && running == 0);
    free(tasks);
}
