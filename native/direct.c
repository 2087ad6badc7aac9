/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "direct.h"

#include "io.h"

#include <errno.h>
#include <linux/aio_abi.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

static pthread_key_t own;

static void end_own(void *context)
{
    syscall(SYS_io_destroy, (aio_context_t)(uintptr_t)context);
}

static void make_key(void)
{
    pthread_key_create(&own, end_own);
}

/* Of this thread, until it ends: to make one, and even more to end it, takes long. 0: there is none. */
static aio_context_t own_context(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, make_key);
    aio_context_t context = (aio_context_t)(uintptr_t)pthread_getspecific(own);
    if (!context && syscall(SYS_io_setup, 1, &context) == 0 && pthread_setspecific(own, (void *)(uintptr_t)context) != 0) {
        end_own((void *)(uintptr_t)context);
        context = 0;
    }
    return context;
}

/* Bytes, or -errno of the write; 0: it was not begun. (In a forked child the context is not there.) */
static int64_t write_by(aio_context_t context, int fd, const void *buf, int64_t length, int64_t offset)
{
    struct iocb block = {.aio_lio_opcode = IOCB_CMD_PWRITE,
                         .aio_fildes = (uint32_t)fd,
                         .aio_buf = (uintptr_t)buf,
                         .aio_nbytes = (uint64_t)length,
                         .aio_offset = offset};
    struct iocb *list = &block;
    if (syscall(SYS_io_submit, context, 1L, &list) != 1)
        return 0;
    struct io_event event;
    while (syscall(SYS_io_getevents, context, 1L, 1L, &event, NULL) != 1)
        ; /* a signal: the memory is still lent */
    return event.res;
}

int64_t bg_pwrite_direct(int fd, const void *buf, int64_t length, int64_t offset)
{
    aio_context_t context = length > 0 && offset >= 0 ? own_context() : 0;
    int64_t done = context ? write_by(context, fd, buf, length, offset) : 0;
    if (done == length || (done < 0 && done != -EAGAIN && done != -EINTR))
        return done;
    done = done < 0 ? 0 : done;
    int64_t rest = bg_pwrite(fd, (const char *)buf + done, length - done, offset + done);
    return rest < 0 ? rest : length;
}
