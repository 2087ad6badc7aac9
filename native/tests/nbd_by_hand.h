/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* A connection whose turns a test makes itself, and its client's requests. */
#ifndef NBD_BY_HAND_H
#define NBD_BY_HAND_H

#include "driver.h"
#include "nbd_internal.h"

#include <endian.h>
#include <sys/socket.h>

/* Returns the client's socket. */
static inline int connect_by_hand(bg_nbd_loop *loop, bg_map *map, const bg_nbd_settings *settings, bg_nbd_conn **conn)
{
    int pair[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    /* Without a map the loop's own threads have nothing to do with it. */
    CHECK(bg_nbd_conn_new(loop, pair[0], 1, settings, NULL, conn) == 0);
    (*conn)->source.map = map;
    (*conn)->longest = UINT32_MAX;
    return pair[1];
}

/* Whether the server was there to take it. */
static inline bool try_send_header(int sock, uint16_t command, uint16_t flags, uint64_t cookie, uint64_t offset, uint32_t length)
{
    struct __attribute__((packed)) {
        uint32_t magic;
        uint16_t flags, command;
        uint64_t cookie, offset;
        uint32_t length;
    } header = {htobe32(0x25609513), htobe16(flags), htobe16(command), htobe64(cookie), htobe64(offset), htobe32(length)};
    return send(sock, &header, sizeof(header), MSG_NOSIGNAL) == sizeof(header);
}

static inline void send_header(int sock, uint16_t command, uint16_t flags, uint64_t cookie, uint64_t offset, uint32_t length)
{
    CHECK(try_send_header(sock, command, flags, cookie, offset, length));
}

#endif
