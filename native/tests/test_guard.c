/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* Copies from and to mapped files that are cut off, and whose signal it is then. */
#define _GNU_SOURCE
#include "driver.h"

#include "guard.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define SIZE (256 << 10)
#define PAGE 4096
#define HANDLED 7
#define SURVIVED 9

static int fd;
static char *mapped;
static char model[SIZE], buf[SIZE];

static void test_copies(void)
{
    uint64_t random = 1;
    for (int i = 0; i < 2000; i++) {
        size_t length = next_random(&random) % (i % 2 ? 300 : SIZE / 2), at = next_random(&random) % (SIZE - length);
        size_t from = next_random(&random) % (SIZE - length);
        for (size_t k = 0; k < length; k++)
            buf[from + k] = (char)next_random(&random);
        CHECK(bg_guard_ready() && bg_guard_store(mapped + at, buf + from, length) == 0);
        memcpy(model + at, buf + from, length);
        CHECK(bg_guard_load(buf + from, mapped + at, length) == 0 && memcmp(buf + from, model + at, length) == 0);
    }
    CHECK(memcmp(mapped, model, SIZE) == 0 && pread(fd, buf, SIZE, 0) == SIZE && memcmp(buf, model, SIZE) == 0);
}

static void test_cut_off(void)
{
    CHECK(ftruncate(fd, SIZE / 2) == 0);
    for (int i = 0; i < 3; i++) {
        CHECK(bg_guard_load(buf, mapped, SIZE) == -EFAULT && bg_guard_store(mapped, buf, SIZE) == -EFAULT);
        CHECK(bg_guard_load(buf, mapped + SIZE - 1, 1) == -EFAULT && bg_guard_store(mapped + SIZE - PAGE, buf, PAGE) == -EFAULT);
        CHECK(bg_guard_load(buf, mapped, SIZE / 2) == 0 && bg_guard_store(mapped, buf, SIZE / 2) == 0);
    }
    CHECK(ftruncate(fd, SIZE) == 0 && bg_guard_load(buf, mapped, SIZE) == 0);
    /* The other side, too. */
    int other = memfd_create("other", MFD_CLOEXEC);
    char *gone = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, other, 0);
    CHECK(gone != MAP_FAILED);
    CHECK(bg_guard_store(mapped, gone + 1, PAGE - 1) == -EFAULT && bg_guard_load(gone + 1, mapped, PAGE - 1) == -EFAULT);
    CHECK(munmap(gone, PAGE) == 0);
    close(other);
}

static void *blocks_the_signal(void *arg)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGBUS);
    CHECK(pthread_sigmask(SIG_BLOCK, &set, NULL) == 0);
    CHECK(!bg_guard_ready() && bg_guard_load(buf, mapped, 1) == -EAGAIN && bg_guard_store(mapped, buf, 1) == -EAGAIN);
    CHECK(pthread_sigmask(SIG_UNBLOCK, &set, NULL) == 0);
    int tries = 0;
    while (!bg_guard_ready() && ++tries < 1000)
        ;
    CHECK(tries > 0 && bg_guard_ready());
    return arg;
}

static void exits(int number)
{
    (void)number;
    _exit(HANDLED);
}

static void exits_for_its_own(int number, siginfo_t *info, void *context)
{
    (void)number;
    (void)context;
    _exit((char *)info->si_addr == mapped + SIZE - PAGE ? HANDLED : 1);
}

static void *another_handler(void *arg)
{
    struct sigaction ours, other = {.sa_handler = exits};
    CHECK(bg_guard_ready() && sigaction(SIGBUS, &other, &ours) == 0);
    int trusted = 0;
    while (trusted < 1000 && bg_guard_load(buf, mapped, 1) == 0)
        trusted++;
    CHECK(trusted < 100 && !bg_guard_ready() && bg_guard_store(mapped, buf, 1) == -EAGAIN);
    CHECK(sigaction(SIGBUS, &ours, NULL) == 0);
    return arg;
}

static void in_a_thread(void *(*function)(void *))
{
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, function, NULL) == 0 && pthread_join(thread, NULL) == 0);
}

/* A process of its own, in which `before` was the handler; its status. */
static int child(const struct sigaction *before, bool sent)
{
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        CHECK(sigaction(SIGBUS, before, NULL) == 0);
        CHECK(bg_guard_load(buf, mapped, SIZE) == 0 && ftruncate(fd, SIZE - PAGE) == 0);
        CHECK(bg_guard_load(buf, mapped, SIZE) == -EFAULT);
        if (sent && raise(SIGBUS) == 0)
            usleep(1000); /* the thread sanitizer delivers it at a system call */
        else
            *(volatile char *)(mapped + SIZE - PAGE) = 1;
        _exit(SURVIVED);
    }
    int status;
    CHECK(pid > 0 && waitpid(pid, &status, 0) == pid && ftruncate(fd, SIZE) == 0);
    return status;
}

static bool exited(int status, int code)
{
    return WIFEXITED(status) && WEXITSTATUS(status) == code;
}

static bool killed(int status)
{
    return WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS;
}

/* What is not ours is the handler's that was there before, or has its default. */
static void test_others(void)
{
    struct sigaction plain = {.sa_handler = exits}, told = {.sa_sigaction = exits_for_its_own, .sa_flags = SA_SIGINFO};
    struct sigaction fallback = {.sa_handler = SIG_DFL}, ignored = {.sa_handler = SIG_IGN, .sa_flags = SA_SIGINFO};
    CHECK(exited(child(&plain, false), HANDLED) && exited(child(&plain, true), HANDLED));
    CHECK(exited(child(&told, false), HANDLED));
    CHECK(killed(child(&fallback, false)) && killed(child(&fallback, true)));
    CHECK(killed(child(&ignored, false)) && exited(child(&ignored, true), SURVIVED));
}

void test_guard(void)
{
    fd = memfd_create("guard", MFD_CLOEXEC);
    CHECK(ftruncate(fd, SIZE) == 0);
    mapped = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(mapped != MAP_FAILED);
    test_others(); /* first: here nothing is in place yet */
    test_copies();
    test_cut_off();
    in_a_thread(blocks_the_signal);
    in_a_thread(another_handler);
    CHECK(munmap(mapped, SIZE) == 0);
    close(fd);
}
