/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * The bytes of a file in memory (tmpfs), mapped: what is sent from there is copied once instead of twice, and what is read or
 * written needs neither the file's lock nor a search for each of its pages.
 *
 *     file     |  1 GiB  |  1 GiB  |  1 GiB  | ...        a window for each, mapped when it is first asked for
 *
 *                          4 KiB at random   64 KiB       of 1 GiB on tmpfs, microseconds (Linux 6.18, Intel Xeon)
 *     pread, pwrite           1.6, 1.8        13, 16
 *     load                       1.5             8
 *     store                      1.2             6
 *
 * What is found is never to be looked at otherwise: where the file has been cut off meanwhile that is a SIGBUS, which load and
 * store survive (guard.h), while a system call fails with EFAULT, or does a part. The descriptor then knows more.
 *
 * Only what is in the file and in memory is found: a page fault in a hole would fill the hole. One made a moment later is filled,
 * which costs space and changes nothing that anybody reads; so does a program that locks all it has mapped (MCL_CURRENT) after the
 * fact.
 *
 * Windows of a file that is open for writing may be stored to. As long as there are any the file can not be sealed, nor its file
 * system be made read-only.
 *
 * Units:     bytes; offsets from the file's start.
 * Ownership: what is found is borrowed until bg_windows_free. What was found once counts as resident in the process, for the kernel's
 *            choice of whom to kill as well, though it is the file's; page tables take a 512th of it.
 * Errno:     -ENOTSUP: not such a file; -ENOMEM; -EAGAIN: do it with the descriptor.
 * Threads:   any, without a lock.
 */
#ifndef BG_WINDOWS_H
#define BG_WINDOWS_H

#include <stdbool.h>
#include <stdint.h>

/* cffi:begin */
typedef struct bg_windows bg_windows;

/* `fd` is open for reading, or both, and needed for this call only. */
int bg_windows_new(int fd, bg_windows **out);
void bg_windows_free(bg_windows *windows);
/* Whether the descriptor might, so that they may be stored to. */
int bg_windows_writable(const bg_windows *windows);

/*
 * The file's times tell of the first store after a flush, as they do of every system call, and of the last one from this, which
 * flushes call, or from bg_windows_free on.
 */
void bg_windows_touch(bg_windows *windows);
/* cffi:end */

/* Where [offset, offset + length) of the file is, length > 0; NULL: not all of it is in memory, or it can not be mapped. */
const void *bg_windows_find(bg_windows *windows, int64_t offset, int64_t length);

/* As bg_pread and bg_pwrite: 0 or -EAGAIN, when any of it may have been done. */
int bg_windows_load(bg_windows *windows, void *buf, int64_t length, int64_t offset);
int bg_windows_store(bg_windows *windows, const void *buf, int64_t length, int64_t offset);

/* Around each write of whatever kind, to tell when several are made at a time, of late. */
bool bg_windows_begin_write(bg_windows *windows);
void bg_windows_end_write(bg_windows *windows);

/* Whether a store of the range would be worth a try. */
bool bg_windows_can_store(bg_windows *windows, int64_t offset, int64_t length);

#endif
