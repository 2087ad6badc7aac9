/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * The messages of NBD's transmission phase that a native loop reads and writes itself.
 *
 * Units:     bytes; numbers of the machine here, big endian on the wire.
 * Ownership: memory is borrowed for the call.
 * Errno:     -
 * Threads:   no state; any thread.
 * Source:    NBD proto.md, "Transmission phase", "Structured reply types".
 */
#ifndef BG_NBD_WIRE_H
#define BG_NBD_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BG_NBD_HEADER 28   /* of a request */
#define BG_NBD_MAX_HEAD 32 /* the longest that the functions below pack */

enum bg_nbd_command {
    BG_NBD_READ = 0,
    BG_NBD_WRITE = 1,
    BG_NBD_DISC = 2,
    BG_NBD_FLUSH = 3,
    BG_NBD_TRIM = 4,
    BG_NBD_CACHE = 5,
    BG_NBD_WRITE_ZEROES = 6
};
enum bg_nbd_flag { BG_NBD_FUA = 1 << 0, BG_NBD_NO_HOLE = 1 << 1, BG_NBD_DF = 1 << 2, BG_NBD_FAST_ZERO = 1 << 4 };

/* cffi:begin */
#define BG_NBD_MAX_PAYLOAD 33554432
#define BG_NBD_CACHE_STEP 1048576

/* The outcome of the handshake, as far as the loop must know it. */
typedef struct {
    uint64_t size;
    bool structured;
    bool writable;
} bg_nbd_settings;
/* cffi:end */

typedef struct {
    uint64_t cookie, offset;
    uint32_t length;
    uint16_t flags, command;
} bg_nbd_header;

/* False: wrong magic. */
bool bg_nbd_parse(const unsigned char bytes[BG_NBD_HEADER], bg_nbd_header *out);

/*
 * Whether it is a request that may be done here: of at least one byte, but for FLUSH. Anything else is for Python, which
 * knows the other commands, and what is wrong with this one.
 */
bool bg_nbd_regular(const bg_nbd_settings *settings, const bg_nbd_header *header);

/* Heads of replies; each returns its length. */
size_t bg_nbd_pack_simple(unsigned char *out, uint64_t cookie);
size_t bg_nbd_pack_data(unsigned char *out, uint64_t cookie, uint64_t offset, uint32_t length);
size_t bg_nbd_pack_hole(unsigned char *out, uint64_t cookie, uint64_t offset, uint32_t length);

#endif
