/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * The bytes of a file in memory (tmpfs), mapped, to be handed to system calls as they are: what is sent from there is copied
 * once instead of twice.
 *
 *     file     |  1 GiB  |  1 GiB  |  1 GiB  | ...        a window for each, mapped when it is first asked for
 *
 * What is found is never to be looked at by the program itself: where the file has been cut off meanwhile that is a
 * SIGBUS, while a system call fails with EFAULT, or does a part, and the rest can be read from the descriptor.
 *
 * Only what is in memory is found: a page fault in a hole would fill the hole. One made a moment later is filled, which costs
 * space and changes nothing that anybody reads; so does a program that locks all it has mapped (MCL_CURRENT) after the fact.
 *
 * Units:     bytes; offsets from the file's start.
 * Ownership: what is found is borrowed until bg_windows_free. What was found once counts as resident in the process, for the kernel's
 *            choice of whom to kill as well, though it is the file's; page tables take a 512th of it.
 * Errno:     -ENOTSUP: not such a file; -ENOMEM.
 * Threads:   bg_windows_find from any thread, without a lock.
 */
#ifndef BG_WINDOWS_H
#define BG_WINDOWS_H

#include <stddef.h>
#include <stdint.h>

/* cffi:begin */
typedef struct bg_windows bg_windows;

/* `fd` is open for reading, and needed for this call only. */
int bg_windows_new(int fd, bg_windows **out);
void bg_windows_free(bg_windows *windows);
/* cffi:end */

/* Where [offset, offset + length) of the file is, length > 0; NULL: not all of it is in memory, or it can not be mapped. */
const void *bg_windows_find(bg_windows *windows, int64_t offset, int64_t length);

#endif
