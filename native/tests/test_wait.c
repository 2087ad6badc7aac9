/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* Tokens, taken by whoever is woken for one, and given back at once or several at a time: none stays, nobody does. */
#define _GNU_SOURCE
#include "driver.h"
#include "wait.h"

#define TAKERS 4
#define TOKENS 20000

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static bg_waiters given, taken;
static int tokens, left = TOKENS, took;

static void *take(void *arg)
{
    (void)arg;
    pthread_mutex_lock(&lock);
    while (left) {
        if (tokens == 0) {
            bg_wait(&given, &lock);
            continue;
        }
        tokens--;
        took++;
        if (--left == 0)
            bg_wake_all(&given);
        bg_wake_all(&taken);
    }
    pthread_mutex_unlock(&lock);
    return NULL;
}

void test_wait(void)
{
    pthread_t threads[TAKERS];
    uint64_t seed = 5;
    CHECK(!bg_changed(&given));
    for (int i = 0; i < TAKERS; i++)
        CHECK(pthread_create(&threads[i], NULL, take, NULL) == 0);
    for (int gave = 0; gave < TOKENS;) {
        int more = 1 + (int)(next_random(&seed) % TAKERS);
        for (int i = 0; i < more && gave < TOKENS; i++, gave++) {
            pthread_mutex_lock(&lock);
            tokens++;
            bool wake = bg_changed(&given);
            pthread_mutex_unlock(&lock);
            if (wake)
                bg_wake(&given, 1);
        }
        pthread_mutex_lock(&lock);
        while (took < gave)
            bg_wait(&taken, &lock);
        pthread_mutex_unlock(&lock);
    }
    for (int i = 0; i < TAKERS; i++)
        pthread_join(threads[i], NULL);
    CHECK(took == TOKENS && tokens == 0 && given.count == 0 && taken.count == 0);
}
