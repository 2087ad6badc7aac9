/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "aio.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define EVENTS 64

struct bg_aio {
    aio_context_t context;
    int eventfd;
    int most, under_way; /* with the added */
    int added;
    struct iocb *list[];
};

int bg_aio_new(int most, bg_aio **out)
{
    bg_aio *aio = calloc(1, sizeof(*aio) + (size_t)most * sizeof(aio->list[0]));
    if (!aio)
        return -ENOMEM;
    aio->most = most;
    aio->eventfd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (aio->eventfd < 0 || syscall(SYS_io_setup, most, &aio->context) < 0) {
        int ret = -errno;
        if (aio->eventfd >= 0)
            close(aio->eventfd);
        free(aio);
        return ret;
    }
    *out = aio;
    return 0;
}

void bg_aio_free(bg_aio *aio)
{
    if (!aio)
        return;
    syscall(SYS_io_destroy, aio->context);
    close(aio->eventfd);
    free(aio);
}

int bg_aio_eventfd(const bg_aio *aio)
{
    return aio->eventfd;
}

bool bg_aio_room(const bg_aio *aio, int operations)
{
    return operations <= aio->most - aio->under_way;
}

void bg_aio_add(bg_aio *aio, bg_aio_op *op, bool write, int fd, void *buf, int64_t length, int64_t offset)
{
    op->block = (struct iocb){.aio_data = (uintptr_t)op,
                              .aio_rw_flags = RWF_NOWAIT,
                              .aio_lio_opcode = write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD,
                              .aio_fildes = (uint32_t)fd,
                              .aio_buf = (uintptr_t)buf,
                              .aio_nbytes = (uint64_t)length,
                              .aio_offset = offset,
                              .aio_flags = IOCB_FLAG_RESFD,
                              .aio_resfd = (uint32_t)aio->eventfd};
    aio->list[aio->added++] = &op->block;
    aio->under_way++;
}

static void end(bg_aio *aio, uint64_t data, int64_t result)
{
    bg_aio_op *op = (bg_aio_op *)(uintptr_t)data;
    aio->under_way--;
    op->done(op, result);
}

void bg_aio_submit(bg_aio *aio)
{
    int count = aio->added;
    for (int at = 0; at < count;) {
        long begun = syscall(SYS_io_submit, aio->context, (long)(count - at), aio->list + at);
        if (begun > 0)
            at += (int)begun;
        else if (begun == 0 || errno != EINTR) /* the first of them is refused */
            end(aio, aio->list[at++]->aio_data, begun == 0 ? -EAGAIN : -errno);
    }
    aio->added -= count;
    memmove(aio->list, aio->list + count, (size_t)aio->added * sizeof(aio->list[0])); /* added meanwhile */
}

/* Returns how many have ended; waits for `least`. */
static long reap(bg_aio *aio, long least)
{
    struct io_event events[EVENTS];
    long n = syscall(SYS_io_getevents, aio->context, least, (long)EVENTS, events, NULL);
    for (long i = 0; i < n; i++)
        end(aio, events[i].data, events[i].res);
    return n;
}

void bg_aio_reap(bg_aio *aio)
{
    eventfd_t ignored;
    eventfd_read(aio->eventfd, &ignored);
    while (reap(aio, 0) == EVENTS)
        ;
}

void bg_aio_drain(bg_aio *aio)
{
    bg_aio_submit(aio);
    while (aio->under_way)
        reap(aio, 1);
}
