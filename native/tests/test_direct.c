/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* Writes with O_DIRECT: whole, from many threads at once into a file's holes, and the same errors as with pwrite. */
#define _GNU_SOURCE
#include "direct.h"
#include "driver.h"
#include "io.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define BLOCK 4096
#define BLOCKS 512
#define WRITERS 6
#define LONG (1 << 20)

static int fd;
static atomic_int next;

static void *write_blocks(void *unused)
{
    char *block = aligned_alloc(BLOCK, BLOCK);
    CHECK(block);
    for (int i; (i = next++) < BLOCKS;) {
        memset(block, i % 251 + 1, BLOCK);
        /* In no order; the last ones make the file longer. */
        CHECK(bg_pwrite_direct(fd, block, BLOCK, (int64_t)(i * 97 % BLOCKS) * BLOCK) == BLOCK);
    }
    free(block);
    return unused;
}

static void test_blocks(void)
{
    pthread_t threads[WRITERS];
    char *is = aligned_alloc(BLOCK, BLOCK), should[BLOCK];
    CHECK(is && ftruncate(fd, (off_t)BLOCKS / 2 * BLOCK) == 0);
    for (int i = 0; i < WRITERS; i++)
        CHECK(pthread_create(&threads[i], NULL, write_blocks, NULL) == 0);
    for (int i = 0; i < WRITERS; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < BLOCKS; i++) {
        memset(should, i % 251 + 1, BLOCK);
        CHECK(bg_pread(fd, is, BLOCK, (int64_t)(i * 97 % BLOCKS) * BLOCK) == BLOCK && memcmp(is, should, BLOCK) == 0);
    }
    free(is);
}

/* By way of io.h, from memory that the device does not take. */
static void test_aligned(void)
{
    char *from = aligned_alloc(BLOCK, LONG + BLOCK), *is = aligned_alloc(BLOCK, LONG);
    CHECK(from && is && bg_haste_of(fd) == BG_HASTE_DIRECT);
    for (int i = 0; i < LONG; i++)
        from[i + 1] = (char)(i / 9);
    CHECK(bg_pwrite_aligned(BG_HASTE_DIRECT, BLOCK, fd, from + 1, LONG, 3 * BLOCK) == LONG);
    CHECK(bg_pread(fd, is, LONG, 3 * BLOCK) == LONG && memcmp(is, from + 1, LONG) == 0);
    free(from);
    free(is);
}

static void test_errors(const char *path)
{
    char *block = aligned_alloc(BLOCK, BLOCK);
    CHECK(block);
    memset(block, 7, BLOCK);
    int read_only = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC), full = open("/dev/full", O_WRONLY | O_CLOEXEC);
    CHECK(read_only >= 0 && full >= 0);
    CHECK(bg_pwrite_direct(-1, block, BLOCK, 0) == -EBADF && bg_pwrite_direct(read_only, block, BLOCK, 0) == -EBADF);
    CHECK(bg_pwrite_direct(full, block, BLOCK, 0) == -ENOSPC);
    CHECK(bg_pwrite_direct(fd, block, BLOCK, -1) == -EINVAL && bg_pwrite_direct(fd, block, BLOCK, INT64_MAX) == -EINVAL);
    CHECK(bg_pwrite_direct(fd, block, -1, 0) == -EINVAL && bg_pwrite_direct(fd, block, 0, 0) == 0);
    CHECK(bg_pwrite_direct(fd, NULL, BLOCK, 0) == -EFAULT);
    close(read_only);
    close(full);
    free(block);
}

/* A forked child has not inherited the kernel's context. */
static void test_forked(void)
{
    char *block = aligned_alloc(BLOCK, BLOCK);
    CHECK(block);
    memset(block, 9, BLOCK);
    CHECK(bg_pwrite_direct(fd, block, BLOCK, 0) == BLOCK);
    pid_t child = fork();
    if (child == 0)
        _exit(bg_pwrite_direct(fd, block, BLOCK, BLOCK) == BLOCK && bg_pwrite_direct(fd, block, BLOCK, 2 * BLOCK) == BLOCK ? 0 : 1);
    int status;
    CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
    char *is = aligned_alloc(BLOCK, BLOCK);
    CHECK(is && bg_pread(fd, is, BLOCK, 2 * BLOCK) == BLOCK && memcmp(is, block, BLOCK) == 0);
    free(is);
    free(block);
}

void test_direct(void)
{
    char path[] = "direct-XXXXXX";
    fd = mkostemp(path, O_DIRECT | O_CLOEXEC);
    CHECK(fd >= 0);
    test_blocks();
    test_aligned();
    test_errors(path);
    test_forked();
    unlink(path);
    close(fd);
}
