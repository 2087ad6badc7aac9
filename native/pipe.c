/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "pipe.h"

#include "io.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>

/* Pages are what the size is counted in, but a sender's piece takes the place of one, whatever it has: most have 32 KiB. */
#define SIZE (256 << 10)

typedef struct {
    int fd;
    int64_t offset, length;
} part;

struct bg_pipe {
    int out, in; /* for reading, for writing */
    int64_t held;
    part parts[BG_PIPE_PARTS]; /* written, in order */
    int used;
    bool lost;
    bg_pipe *next;
};

struct bg_pipes {
    pthread_mutex_t lock;
    bg_pipe *spare;
    int left; /* to be made */
};

bg_pipes *bg_pipes_new(int most)
{
    bg_pipes *pipes = calloc(1, sizeof(*pipes));
    if (pipes) {
        pthread_mutex_init(&pipes->lock, NULL);
        pipes->left = most;
    }
    return pipes;
}

static void end(bg_pipe *p)
{
    close(p->out);
    close(p->in);
    free(p);
}

void bg_pipes_free(bg_pipes *pipes)
{
    if (!pipes)
        return;
    for (bg_pipe *next; pipes->spare; pipes->spare = next) {
        next = pipes->spare->next;
        end(pipes->spare);
    }
    pthread_mutex_destroy(&pipes->lock);
    free(pipes);
}

static bg_pipe *make(void)
{
    int ends[2];
    bg_pipe *p = calloc(1, sizeof(*p));
    if (!p || pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0) {
        free(p);
        return NULL;
    }
    p->out = ends[0];
    p->in = ends[1];
    /* Who has many pipes is refused: then less goes into it. */
    (void)fcntl(p->in, F_SETPIPE_SZ, SIZE);
    return p;
}

bg_pipe *bg_pipes_take(bg_pipes *pipes)
{
    pthread_mutex_lock(&pipes->lock);
    bg_pipe *p = pipes->spare;
    bool may = !p && pipes->left > 0;
    if (p)
        pipes->spare = p->next;
    else if (may)
        pipes->left--;
    pthread_mutex_unlock(&pipes->lock);
    if (may && !(p = make())) {
        pthread_mutex_lock(&pipes->lock);
        pipes->left++;
        pthread_mutex_unlock(&pipes->lock);
    }
    return p;
}

void bg_pipes_give(bg_pipes *pipes, bg_pipe *p)
{
    bool good = p->held == 0 && !p->lost;
    p->used = 0;
    pthread_mutex_lock(&pipes->lock);
    if (good) {
        p->next = pipes->spare;
        pipes->spare = p;
    } else {
        pipes->left++;
    }
    pthread_mutex_unlock(&pipes->lock);
    if (!good)
        end(p);
}

static bool is_full(const bg_pipe *p)
{
    struct pollfd asked = {.fd = p->in, .events = POLLOUT};
    return poll(&asked, 1, 0) == 0;
}

int64_t bg_pipe_fill(bg_pipe *p, int socket, int64_t length)
{
    ssize_t n;
    do
        n = splice(socket, NULL, p->in, NULL, (size_t)length, SPLICE_F_NONBLOCK | SPLICE_F_MOVE);
    while (n < 0 && errno == EINTR);
    if (n < 0)
        return errno == EAGAIN && is_full(p) ? -ENOBUFS : -errno;
    p->held += n;
    return n;
}

/* Where the next bytes go is remembered. False: there is no room for it. */
static bool remember(bg_pipe *p, int fd, int64_t offset)
{
    const part *last = p->used ? &p->parts[p->used - 1] : NULL;
    if (last && last->fd == fd && last->offset + last->length == offset)
        return true;
    if (p->used == BG_PIPE_PARTS)
        return false;
    p->parts[p->used++] = (part){fd, offset, 0};
    return true;
}

int bg_pipe_pwrite(bg_pipe *p, int fd, int64_t length, int64_t offset)
{
    if (length < 0 || length > p->held || offset < 0 || length > INT64_MAX - offset)
        return -EINVAL;
    if (!remember(p, fd, offset))
        return -ENOBUFS;
    for (loff_t at = offset, stop = offset + length; at < stop;) {
        ssize_t n = splice(p->out, NULL, fd, &at, (size_t)(stop - at), SPLICE_F_MOVE);
        if (n > 0) {
            p->parts[p->used - 1].length += n;
            p->held -= n;
        } else if (n == 0) {
            return -EIO;
        } else if (errno != EINTR) {
            return -errno;
        }
    }
    return 0;
}

/* bg_pread, but for its zeroes where the file has ended. */
static bool read_back(const part *written, char *buf)
{
    return bg_pread(written->fd, buf, written->length, written->offset) == written->length;
}

static bool read_rest(bg_pipe *p, char *buf)
{
    while (p->held > 0) {
        ssize_t n = read(p->out, buf, (size_t)p->held);
        if (n <= 0 && !(n < 0 && errno == EINTR))
            return false;
        if (n > 0) {
            buf += n;
            p->held -= n;
        }
    }
    return true;
}

int bg_pipe_empty(bg_pipe *p, void *buf)
{
    char *at = buf;
    for (int i = 0; i < p->used && !p->lost; at += p->parts[i++].length)
        p->lost = !read_back(&p->parts[i], at);
    p->used = 0;
    p->lost = p->lost || !read_rest(p, at);
    return p->lost ? -EIO : 0;
}
