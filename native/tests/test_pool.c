/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* Of tasks that are busy as many run as there are processors; the others pass them, and none is lost. */
#define _GNU_SOURCE
#include "driver.h"
#include "pool.h"
#include "wait.h"

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

static void run_busy(bg_task *task)
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

void test_pool(void)
{
    cpu_set_t set;
    CHECK(sched_getaffinity(0, sizeof(set), &set) == 0);
    int processors = CPU_COUNT(&set), count = processors + MORE;
    bg_pool *pool;
    CHECK(bg_pool_new(count, &pool) == 0);
    bg_task *tasks = calloc((size_t)count + ROUNDS, sizeof(*tasks));
    bg_task other = {.run = run_other};
    CHECK(tasks);
    for (int i = 0; i < count; i++) {
        tasks[i] = (bg_task){.run = run_busy, .busy = true};
        bg_pool_submit(pool, &tasks[i]);
    }
    pthread_mutex_lock(&lock);
    while (running < processors)
        bg_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    bg_pool_submit(pool, &other);
    pthread_mutex_lock(&lock);
    wait_until(&others_ran);
    CHECK(running == processors && most == processors && ended == 0);
    go = true;
    bg_wake_all(&changed);
    pthread_mutex_unlock(&lock);
    wait_for_ended(count);
    for (int i = 0; i < ROUNDS; i++) {
        tasks[count + i] = (bg_task){.run = run_busy, .busy = i % 3 != 0};
        bg_pool_submit(pool, &tasks[count + i]);
    }
    bg_pool_free(pool); /* runs what was submitted */
    CHECK(ended == count + ROUNDS && running == 0);
    free(tasks);
}
