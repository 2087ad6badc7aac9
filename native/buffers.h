/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Memory for payloads: buffers of 4 KiB times a power of two, page aligned (O_DIRECT takes them as they are) and used again.
 * A fresh 256 KiB buffer costs 64 page faults, more than copying 256 KiB. From 2 MiB on they are huge pages, if there are any:
 * what is contiguous is one piece for a device, which may take few of them at a time.
 *
 * Units:     bytes.
 * Ownership: a buffer belongs to who took it, until it is given back or freed.
 * Errno:     -
 * Threads:   any.
 */
#ifndef BG_BUFFERS_H
#define BG_BUFFERS_H

#include <stdint.h>

/* cffi:begin */
/* Instead of giving it back: for a buffer that something might still write to. */
void bg_buffer_free(void *buf);
/* cffi:end */

#define BG_BUFFER_MAX (UINT32_C(1) << 31)
#define BG_HUGE_PAGE (UINT32_C(2) << 20)

typedef struct bg_buffers bg_buffers;

bg_buffers *bg_buffers_new(void);
void bg_buffers_free(bg_buffers *buffers);

/* Size of the buffer for 0 < length <= BG_BUFFER_MAX. */
uint32_t bg_buffer_size(uint32_t length);

/* `size` is from bg_buffer_size. NULL: no memory. The contents are old data. */
void *bg_buffers_take(bg_buffers *buffers, uint32_t size);
void bg_buffers_give(bg_buffers *buffers, void *buf, uint32_t size);

#endif
