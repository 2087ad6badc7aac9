/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Payloads on their way from a socket into a file in memory without being copied in between: the pages that the sender's
 * bytes are in wait in a pipe, and are copied once, into the file.
 *
 *     socket ── bg_pipe_fill ── pipe ──┬─ bg_pipe_pwrite ── file
 *                                      └─ bg_pipe_empty ── memory      what is to be done otherwise after all
 *
 * What was written is not in the pipe any more. When the rest fails, bg_pipe_empty reads it back from where it was written, so that
 * the whole payload is there to be written again.
 *
 * Units:     bytes.
 * Ownership: a pipe belongs to who took it, until it is given back. Descriptors are borrowed; one that was written to, until the
 *            pipe has been emptied or given back.
 * Errno:     0 or a count, else -errno of a system call, or what is said below.
 * Threads:   taking and giving from any; a pipe is used by one at a time.
 */
#ifndef BG_PIPE_H
#define BG_PIPE_H

#include <stdint.h>

/* cffi:begin */
typedef struct bg_pipe bg_pipe;
/* cffi:end */

typedef struct bg_pipes bg_pipes;

/* Parts of files that are not neighbours, into which one payload may go. */
#define BG_PIPE_PARTS 16

/* So many at a time. NULL: no memory. */
bg_pipes *bg_pipes_new(int most);
void bg_pipes_free(bg_pipes *pipes);

/* An empty one; NULL: none is left, or the system has no more. */
bg_pipe *bg_pipes_take(bg_pipes *pipes);
/* Also with something in it. */
void bg_pipes_give(bg_pipes *pipes, bg_pipe *pipe);

/*
 * Move up to `length` of the socket's bytes into the pipe, without waiting. Returns how many, 0 at the socket's end; -EAGAIN: none
 * is there; -ENOBUFS: the pipe is full, which also depends on how the sender has cut what it sent.
 */
int64_t bg_pipe_fill(bg_pipe *pipe, int socket, int64_t length);

/* Move the next `length` bytes into the file, which may wait: 0, -errno (some may have been written), -ENOBUFS: too many parts. */
int bg_pipe_pwrite(bg_pipe *pipe, int fd, int64_t length, int64_t offset);

/*
 * Everything that was filled in since the pipe was taken or emptied, in order, into `buf`: 0; -EIO, then and ever after: something
 * that was written is not where it was written any more.
 */
int bg_pipe_empty(bg_pipe *pipe, void *buf);

#endif
