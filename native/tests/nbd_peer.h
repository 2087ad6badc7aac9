/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* A small disk in memory whose blocks are filled with their numbers, all of it mapped, and clients that read single blocks. */
#ifndef NBD_PEER_H
#define NBD_PEER_H

#include "nbd_loop.h"

#include <stdbool.h>

#define PEER_BLOCK 512
#define PEER_SIZE (64 * PEER_BLOCK)

typedef struct {
    bg_map *map;
    int fd, slot;
} peer_disk;

peer_disk peer_disk_new(void);
void peer_disk_free(peer_disk *disk);

/* A connection to the disk, and its client's socket in *sock. */
bg_nbd_conn *peer_connect(bg_nbd_loop *loop, const peer_disk *disk, int64_t id, int *sock);

/* One request, and the reply to it, looked at. False: the connection has ended. */
bool peer_send(int sock, uint64_t cookie);
bool peer_receive(int sock, uint64_t cookie);

/* Python's part of a connection's end, in order, when nothing else is to be taken: waits for it. Returns its id. */
int64_t peer_ended(bg_nbd_loop *loop);

#endif
