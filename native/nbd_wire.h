/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * The messages of NBD's transmission phase that a native loop reads and writes itself.
 *
 * Units:     bytes; numbers of the machine here, big endian on the wire.
 * Ownership: memory is borrowed for the call.
 * Errno:     -
 * Threads:   no state; any thread.
 * Source:    NBD proto.md, "Transmission phase", "Structured reply types", "Request types", "Error values".
 */
#ifndef BG_NBD_WIRE_H
#define BG_NBD_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BG_NBD_HEADER 28      /* of a request */
#define BG_NBD_MAX_HEAD 32    /* the longest head of a reply that is no refusal */
#define BG_NBD_MAX_REFUSAL 160 /* the longest that bg_nbd_pack_refusal packs */

enum bg_nbd_command {
    BG_NBD_READ = 0,
    BG_NBD_WRITE = 1,
    BG_NBD_DISC = 2,
    BG_NBD_FLUSH = 3,
    BG_NBD_TRIM = 4,
    BG_NBD_CACHE = 5,
    BG_NBD_WRITE_ZEROES = 6,
    BG_NBD_BLOCK_STATUS = 7
};
enum bg_nbd_flag {
    BG_NBD_FUA = 1 << 0,
    BG_NBD_NO_HOLE = 1 << 1,
    BG_NBD_DF = 1 << 2,
    BG_NBD_REQ_ONE = 1 << 3,
    BG_NBD_FAST_ZERO = 1 << 4
};

/* Why a request is answered with an error and not done; what it is answered with is in nbd_wire.c. */
enum bg_nbd_refusal {
    BG_NBD_FINE, /* it may be done */
    BG_NBD_UNKNOWN_COMMAND,
    BG_NBD_BAD_FLAGS,
    BG_NBD_READ_ONLY,
    BG_NBD_TOO_MUCH, /* more than BG_NBD_MAX_PAYLOAD */
    BG_NBD_NO_RANGE, /* a flush with offset or length */
    BG_NBD_OUTSIDE,
    BG_NBD_NO_CONTEXT, /* block status, and none was selected */
    BG_NBD_EMPTY,      /* block status of nothing */
    BG_NBD_SHUT_DOWN
};

/* cffi:begin */
#define BG_NBD_MAX_PAYLOAD 33554432
#define BG_NBD_CACHE_STEP 1048576

/* The outcome of the handshake, as far as the loop must know it. */
typedef struct {
    uint64_t size;
    bool structured;
    bool writable;
    bool contexts; /* of metadata, at least one was selected */
} bg_nbd_settings;
/* cffi:end */

typedef struct {
    uint64_t cookie, offset;
    uint32_t length;
    uint16_t flags, command;
} bg_nbd_header;

/* False: wrong magic. */
bool bg_nbd_parse(const unsigned char bytes[BG_NBD_HEADER], bg_nbd_header *out);

/* What is wrong with it. The minimum block size is advice to clients: any alignment is served. Never SHUT_DOWN. */
enum bg_nbd_refusal bg_nbd_check(const bg_nbd_settings *settings, const bg_nbd_header *header);

/* Whether a request that is fine may be done here: of at least one byte, but for FLUSH. Others are for Python. */
bool bg_nbd_native(const bg_nbd_header *header);

/* An error reply, whole, with a text for people where replies are structured; returns its length. */
size_t bg_nbd_pack_refusal(unsigned char out[BG_NBD_MAX_REFUSAL], const bg_nbd_settings *settings,
                           const bg_nbd_header *header, enum bg_nbd_refusal why);

/* Heads of replies; each returns its length. */
size_t bg_nbd_pack_simple(unsigned char *out, uint64_t cookie);
size_t bg_nbd_pack_data(unsigned char *out, uint64_t cookie, uint64_t offset, uint32_t length);
size_t bg_nbd_pack_hole(unsigned char *out, uint64_t cookie, uint64_t offset, uint32_t length);

#endif
