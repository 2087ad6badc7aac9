/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* Ranges that are nothing but data. */
#define _GNU_SOURCE
#include "driver.h"

#include "dense.h"

#include <fcntl.h>
#include <stdbool.h>
#include <unistd.h>

#define SIZE (4 << 20)
#define HOLE (1 << 20)
#define HOLE_END ((1 << 20) + 4096)
#define PAGE 4096

static char data[SIZE];

void test_dense(void)
{
    int fd = file_with_hole(data, SIZE, HOLE, HOLE_END), pair[2];
    bool tells = bg_is_dense(fd, 0, PAGE); /* kernels before 6.5 do not */
    CHECK(bg_is_dense(fd, 0, HOLE) == tells && bg_is_dense(fd, HOLE_END, SIZE - HOLE_END) == tells);
    CHECK(bg_is_dense(fd, HOLE - 1, 1) == tells && bg_is_dense(fd, SIZE - 1, 1) == tells);
    CHECK(!bg_is_dense(fd, HOLE - 1, 2) && !bg_is_dense(fd, HOLE, HOLE_END - HOLE) && !bg_is_dense(fd, 0, SIZE));
    CHECK(!bg_is_dense(fd, HOLE_END - 1, 2) && !bg_is_dense(fd, SIZE - 1, PAGE + 1) && !bg_is_dense(fd, SIZE, 1));
    CHECK(!bg_is_dense(fd, -1, 1) && !bg_is_dense(fd, 0, 0) && !bg_is_dense(fd, 1, INT64_MAX) && !bg_is_dense(-1, 0, 1));
    /* A page that was never written is looked at in a short range, and many of them in a long one. */
    CHECK(posix_fallocate(fd, HOLE, HOLE_END - HOLE) == 0);
    CHECK(!bg_is_dense(fd, HOLE - 31 * PAGE, 64 * PAGE));
    CHECK(ftruncate(fd, SIZE / 2) == 0 && posix_fallocate(fd, SIZE / 2, SIZE / 2) == 0);
    CHECK(!bg_is_dense(fd, 0, SIZE) && !bg_is_dense(fd, SIZE / 2 - PAGE, 2 * PAGE));
    CHECK(bg_is_dense(fd, HOLE_END, SIZE / 2 - HOLE_END) == tells);
    close(fd);
    CHECK(pipe(pair) == 0);
    CHECK(!bg_is_dense(pair[0], 0, 1));
    close(pair[0]);
    close(pair[1]);
}
