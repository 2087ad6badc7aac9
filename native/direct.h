/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Writes to descriptors with O_DIRECT, by threads that may wait.
 *
 *     pwrite(2)       lock the file ── find room ── give the device its task ── wait for it ── unlock
 *     io_submit(2)    lock the file ── find room ── give the device its task ── unlock ── wait for it
 *
 * On ext4 and others that is how first writes to a part of a file go: with pwrite one after the other, however many threads make
 * them; the device is idle meanwhile. What has room already needs no such lock.
 *
 * Units:     bytes; offsets from the file's start.
 * Ownership: buffers and descriptors are borrowed for the call.
 * Errno:     `length`, else -errno, as bg_pwrite. What asynchronous I/O can not do, or is forbidden to, pwrite does.
 * Threads:   any; each that calls keeps a context of the kernel's until it ends.
 */
#ifndef BG_DIRECT_H
#define BG_DIRECT_H

#include <stdint.h>

int64_t bg_pwrite_direct(int fd, const void *buf, int64_t length, int64_t offset);

#endif
