/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "driver.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int file_with_hole(char *data, size_t size, size_t hole, size_t end)
{
    int fd = memfd_create("disk", MFD_CLOEXEC);
    for (size_t i = 0; i < size; i++)
        data[i] = (char)(i * 2654435761U >> 24 | 1);
    memset(data + hole, 0, end - hole);
    CHECK(pwrite(fd, data, size, 0) == (ssize_t)size);
    CHECK(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)hole, (off_t)(end - hole)) == 0);
    return fd;
}
