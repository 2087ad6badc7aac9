/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "io.h"

#include "direct.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#define ZEROES (256 << 10)
/* Bytes at a time through other memory. */
#define BOUNCE (256 << 10)
/* No storage has larger blocks, as direct I/O goes: a multiple of all. */
#define DIRECT_BLOCK 4096

static bool range_ok(int64_t length, int64_t offset)
{
    return length >= 0 && offset >= 0 && length <= INT64_MAX - offset;
}

/*
 * O_DIRECT refuses to go on behind a short read that ended inside a block. That was the file's end; when the file has become
 * longer meanwhile, the read goes on from the block's start. How many bytes to go back, 0: it is still the end, or -1: neither.
 */
static int64_t short_read(int fd, int64_t offset, int64_t done)
{
    struct stat st;
    if (done == 0 || fstat(fd, &st) < 0 || !S_ISREG(st.st_mode))
        return -1;
    if (offset + done >= st.st_size)
        return 0;
    int64_t inside = (offset + done) % DIRECT_BLOCK;
    return inside == 0 ? -1 : inside < done ? inside : done;
}

int64_t bg_pread(int fd, void *buf, int64_t length, int64_t offset)
{
    if (!range_ok(length, offset))
        return -EINVAL;
    char *p = buf;
    int64_t done = 0;
    while (done < length) {
        ssize_t n = pread(fd, p + done, (size_t)(length - done), offset + done);
        if (n > 0) {
            done += n;
        } else if (n == 0) {
            break;
        } else if (errno != EINTR) {
            int error = errno;
            int64_t back = error == EINVAL ? short_read(fd, offset, done) : -1;
            if (back == 0)
                break;
            if (back < 0)
                return -error;
            done -= back;
        }
    }
    memset(p + done, 0, (size_t)(length - done));
    return done;
}

int64_t bg_pwrite(int fd, const void *buf, int64_t length, int64_t offset)
{
    if (!range_ok(length, offset))
        return -EINVAL;
    const char *p = buf;
    int64_t done = 0;
    while (done < length) {
        ssize_t n = pwrite(fd, p + done, (size_t)(length - done), offset + done);
        if (n > 0)
            done += n;
        else if (n == 0)
            return -EIO;
        else if (errno != EINTR)
            return -errno;
    }
    return done;
}

/* Whether `buf` is where the descriptor wants it; else `bounce` is to be used, or NULL: there is no memory. */
static bool in_place(int alignment, const void *buf, int64_t length, void **bounce)
{
    if (alignment <= 1 || ((uintptr_t)buf & ((uintptr_t)alignment - 1)) == 0)
        return true;
    size_t size = (size_t)(length < BOUNCE ? length : BOUNCE), rest = (size_t)alignment - 1;
    *bounce = aligned_alloc((size_t)alignment, (size + rest) & ~rest);
    return false;
}

int64_t bg_pread_aligned(int alignment, int fd, void *buf, int64_t length, int64_t offset)
{
    void *bounce;
    if (!range_ok(length, offset))
        return -EINVAL;
    if (in_place(alignment, buf, length, &bounce))
        return bg_pread(fd, buf, length, offset);
    int64_t got = 0, ret = bounce ? 0 : -ENOMEM;
    for (int64_t done = 0, n; done < length && ret >= 0; done += n) {
        n = length - done < BOUNCE ? length - done : BOUNCE;
        ret = bg_pread(fd, bounce, n, offset + done);
        got += ret;
        memcpy((char *)buf + done, bounce, (size_t)n);
    }
    free(bounce);
    return ret < 0 ? ret : got;
}

int64_t bg_pwrite_by(enum bg_haste haste, int fd, const void *buf, int64_t length, int64_t offset)
{
    return haste == BG_HASTE_DIRECT ? bg_pwrite_direct(fd, buf, length, offset) : bg_pwrite(fd, buf, length, offset);
}

int64_t bg_pwrite_aligned(enum bg_haste haste, int alignment, int fd, const void *buf, int64_t length, int64_t offset)
{
    void *bounce;
    if (!range_ok(length, offset))
        return -EINVAL;
    if (in_place(alignment, buf, length, &bounce))
        return bg_pwrite_by(haste, fd, buf, length, offset);
    int64_t ret = bounce ? 0 : -ENOMEM;
    for (int64_t done = 0, n; done < length && ret >= 0; done += n) {
        n = length - done < BOUNCE ? length - done : BOUNCE;
        memcpy(bounce, (const char *)buf + done, (size_t)n);
        ret = bg_pwrite_by(haste, fd, bounce, n, offset + done);
    }
    free(bounce);
    return ret < 0 ? ret : length;
}

enum bg_haste bg_haste_of(int fd)
{
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || flags & O_DSYNC)
        return BG_HASTE_NONE;
    if (flags & O_DIRECT)
        return BG_HASTE_DIRECT;
    struct statfs fs;
    struct stat st; /* of a device's file the file system is that of /dev, in memory as well */
    bool in_memory = fstatfs(fd, &fs) == 0 && (fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC) && fstat(fd, &st) == 0 &&
                     S_ISREG(st.st_mode);
    return in_memory ? BG_HASTE_ALL : BG_HASTE_ASK;
}

static int64_t outcome(ssize_t n, int64_t length)
{
    if (n == length)
        return n;
    return n >= 0 || errno == EOPNOTSUPP || errno == ENOSYS || errno == EINTR ? -EAGAIN : -errno;
}

int64_t bg_pread_in(enum bg_haste haste, int fd, void *buf, int64_t length, int64_t offset)
{
    if (!range_ok(length, offset))
        return -EINVAL;
    if (haste != BG_HASTE_ASK)
        return haste == BG_HASTE_ALL ? bg_pread(fd, buf, length, offset) : -EAGAIN;
    struct iovec iov = {buf, (size_t)length};
    return outcome(preadv2(fd, &iov, 1, offset, RWF_NOWAIT), length);
}

int64_t bg_pwrite_in(enum bg_haste haste, int fd, const void *buf, int64_t length, int64_t offset)
{
    if (!range_ok(length, offset))
        return -EINVAL;
    if (haste != BG_HASTE_ASK)
        return haste == BG_HASTE_ALL ? bg_pwrite(fd, buf, length, offset) : -EAGAIN;
    struct iovec iov = {(void *)buf, (size_t)length};
    ssize_t n = pwritev2(fd, &iov, 1, offset, RWF_NOWAIT);
    if (n <= 0 || n == length)
        return outcome(n, length);
    int64_t rest = bg_pwrite(fd, (const char *)buf + n, length - n, offset + n);
    return rest < 0 ? rest : length;
}

int64_t bg_pread_now(int fd, void *buf, int64_t length, int64_t offset)
{
    return bg_pread_in(bg_haste_of(fd), fd, buf, length, offset);
}

int64_t bg_pwrite_now(int fd, const void *buf, int64_t length, int64_t offset)
{
    return bg_pwrite_in(bg_haste_of(fd), fd, buf, length, offset);
}

/* Not written to by anyone, so it costs one page of zeroes. Aligned for O_DIRECT. */
static char zeroes[ZEROES] __attribute__((aligned(4096)));

static int write_zeroes(int fd, int64_t length, int64_t offset)
{
    for (int64_t n; length > 0; length -= n, offset += n) {
        n = bg_pwrite(fd, zeroes, length < ZEROES ? length : ZEROES, offset);
        if (n < 0)
            return (int)n;
    }
    return 0;
}

/* The part of a range that lies in the file, for a write that must not make it grow. */
static int64_t inside_file(int fd, int64_t length, int64_t offset)
{
    struct stat st;
    if (fstat(fd, &st) < 0)
        return -errno;
    if (!S_ISREG(st.st_mode) || offset + length <= st.st_size)
        return length;
    return offset < st.st_size ? st.st_size - offset : 0;
}

int bg_pwrite_zeroes(int fd, int64_t length, int64_t offset, int flags)
{
    if (!range_ok(length, offset) || (flags & ~BG_ZERO_UNMAP))
        return -EINVAL;
    if (length == 0)
        return 0;
    int mode = flags & BG_ZERO_UNMAP ? FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE : FALLOC_FL_ZERO_RANGE;
    int ret;
    do
        ret = fallocate(fd, mode, offset, length) < 0 ? -errno : 0;
    while (ret == -EINTR);
    /* EINVAL, ENODEV and EPERM are what file systems and devices say for a mode they do not have. */
    if (ret != -EOPNOTSUPP && ret != -ENOSYS && ret != -EINVAL && ret != -ENODEV && ret != -EPERM)
        return ret;
    if (flags & BG_ZERO_UNMAP) {
        length = inside_file(fd, length, offset);
        if (length < 0)
            return (int)length;
    }
    return write_zeroes(fd, length, offset);
}
