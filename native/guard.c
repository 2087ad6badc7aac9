/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "guard.h"

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

/* Copies for which it counts that the thread was ready, or was not: asking takes as long as to copy 1 KiB. */
#define TRUSTED 16
#define DISTRUSTED 256
/* At once, for the processor to send whole lines. */
#define LINE 64
/* A page fault by a read maps its neighbours in such a block, too, one by a store does not. */
#define BLOCK (64 << 10)
/* Some processors tell of a fault's page only; no page is smaller. */
#define PAGE 4096

typedef struct {
    sigjmp_buf jump;
    uintptr_t to, from;
    size_t length;
} guard;

/* Of the copy that the thread is in. A handler may not have it allocated, as the default model might. */
static _Thread_local guard *volatile current __attribute__((tls_model("initial-exec")));
static _Thread_local int trusted; /* copies still to be made; less than 0: not to be made */

static pthread_once_t once = PTHREAD_ONCE_INIT;
static struct sigaction before; /* what was there */
static bool installed;

/* As if we were not there. */
static void leave_to_others(int number, siginfo_t *info, void *context)
{
    bool is_function = before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN; /* in a union with sa_sigaction */
    if (is_function && before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(number, info, context);
    } else if (is_function) {
        before.sa_handler(number);
    } else if (before.sa_handler == SIG_DFL || info->si_code > 0) {
        /* A fault comes again when this returns, what somebody sent does not. Faults can not be ignored. */
        signal(number, SIG_DFL);
        if (info->si_code <= 0)
            raise(number); /* blocked until this returns */
    }
}

static bool is_inside(uintptr_t at, uintptr_t start, size_t length)
{
    return at >= start / PAGE * PAGE && at < start + length;
}

static void on_bus_error(int number, siginfo_t *info, void *context)
{
    guard *g = current;
    uintptr_t at = (uintptr_t)info->si_addr;
    if (g && info->si_code > 0 && (is_inside(at, g->to, g->length) || is_inside(at, g->from, g->length))) {
        /* What is blocked while a signal is handled, by us or by who watches us, must not stay so. */
        const ucontext_t *interrupted = context;
        pthread_sigmask(SIG_SETMASK, &interrupted->uc_sigmask, NULL);
        current = NULL;
        siglongjmp(g->jump, 1);
    }
    leave_to_others(number, info, context);
}

static void install(void)
{
    struct sigaction ours = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    installed = sigaction(SIGBUS, &ours, &before) == 0;
}

/* Whether a SIGBUS of this thread would come to us. */
static bool comes_here(void)
{
    struct sigaction now;
    sigset_t blocked;
    pthread_once(&once, install);
    return installed && sigaction(SIGBUS, NULL, &now) == 0 && now.sa_flags & SA_SIGINFO && now.sa_sigaction == on_bus_error &&
           pthread_sigmask(SIG_BLOCK, NULL, &blocked) == 0 && !sigismember(&blocked, SIGBUS);
}

bool bg_guard_ready(void)
{
    if (trusted == 0)
        trusted = comes_here() ? TRUSTED : -DISTRUSTED;
    trusted += trusted < 0;
    return trusted > 0;
}

void bg_guard_block_signals(sigset_t *former)
{
    sigset_t blocked;
    sigfillset(&blocked);
    pthread_sigmask(SIG_SETMASK, &blocked, former);
    if (sigismember(former, SIGBUS))
        return;
    sigdelset(&blocked, SIGBUS);
    pthread_sigmask(SIG_SETMASK, &blocked, NULL);
}

typedef void copy_function(void *to, const void *from, size_t length);

static int copy_guarded(copy_function *copy, void *to, const void *from, size_t length)
{
    guard g = {.to = (uintptr_t)to, .from = (uintptr_t)from, .length = length};
    if (!bg_guard_ready())
        return -EAGAIN;
    trusted--;
    if (sigsetjmp(g.jump, 0))
        return -EFAULT;
    current = &g;
    atomic_signal_fence(memory_order_seq_cst);
    copy(to, from, length);
    atomic_signal_fence(memory_order_seq_cst);
    current = NULL;
    return 0;
}

static void load(void *to, const void *from, size_t length)
{
    memcpy(to, from, length);
}

#ifdef __SSE2__
static void touch(const char *at)
{
    (void)*(const volatile char *)at;
}

static void store(void *to, const void *from, size_t length)
{
    char *t = to;
    const char *f = from;
    size_t head = -(uintptr_t)t % LINE;
    if (head > length)
        head = length;
    if (length > 0)
        touch(t);
    memcpy(t, f, head);
    for (t += head, f += head, length -= head; length >= LINE; t += LINE, f += LINE, length -= LINE) {
        if ((uintptr_t)t % BLOCK == 0)
            touch(t);
        __m128i a = _mm_loadu_si128((const __m128i *)f), b = _mm_loadu_si128((const __m128i *)(f + 16));
        __m128i c = _mm_loadu_si128((const __m128i *)(f + 32)), d = _mm_loadu_si128((const __m128i *)(f + 48));
        _mm_stream_si128((__m128i *)t, a);
        _mm_stream_si128((__m128i *)(t + 16), b);
        _mm_stream_si128((__m128i *)(t + 32), c);
        _mm_stream_si128((__m128i *)(t + 48), d);
    }
    memcpy(t, f, length);
    _mm_sfence();
}
#else
#define store load
#endif

int bg_guard_load(void *buf, const void *from, size_t length)
{
    return copy_guarded(load, buf, from, length);
}

int bg_guard_store(void *to, const void *buf, size_t length)
{
    return copy_guarded(store, to, buf, length);
}
