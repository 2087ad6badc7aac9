/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "nbd_peer.h"

#include "nbd_by_hand.h"

#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define HEAD 16 /* of a reply */

peer_disk peer_disk_new(void)
{
    peer_disk disk;
    unsigned char block[PEER_BLOCK];
    CHECK(bg_map_new(PEER_SIZE, BG_MAP_MIN_MEMORY, &disk.map) == 0);
    disk.fd = memfd_create("disk", MFD_CLOEXEC);
    for (int i = 0; i < PEER_SIZE / PEER_BLOCK; i++) {
        memset(block, i, sizeof(block));
        CHECK(pwrite(disk.fd, block, PEER_BLOCK, i * PEER_BLOCK) == PEER_BLOCK);
    }
    disk.slot = bg_map_add_slot(disk.map, disk.fd, 1, 1);
    bg_map_extent all = {0, PEER_SIZE, 0, disk.slot, 0};
    CHECK(bg_map_insert(disk.map, bg_map_generation(disk.map), &all, 1) == 1);
    return disk;
}

void peer_disk_free(peer_disk *disk)
{
    bg_map_wait(disk->map, bg_map_remove_slot(disk->map, disk->slot));
    CHECK(bg_map_free(disk->map) == 0);
    close(disk->fd);
}

bg_nbd_conn *peer_connect(bg_nbd_loop *loop, const peer_disk *disk, int64_t id, int *sock)
{
    bg_nbd_settings settings = {.size = PEER_SIZE};
    bg_nbd_conn *conn;
    int pair[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    CHECK(bg_nbd_conn_new(loop, pair[0], id, &settings, disk->map, &conn) == 0);
    *sock = pair[1];
    return conn;
}

bool peer_send(int sock, uint64_t cookie)
{
    return try_send_header(sock, BG_NBD_READ, 0, cookie, cookie % (PEER_SIZE / PEER_BLOCK) * PEER_BLOCK, PEER_BLOCK);
}

bool peer_receive(int sock, uint64_t cookie)
{
    unsigned char reply[HEAD + PEER_BLOCK];
    uint64_t tag = htobe64(cookie), block = cookie % (PEER_SIZE / PEER_BLOCK);
    if (recv(sock, reply, sizeof(reply), MSG_WAITALL) != sizeof(reply))
        return false;
    CHECK(!memcmp(reply + 8, &tag, 8) && reply[HEAD] == block && reply[HEAD + PEER_BLOCK - 1] == block);
    return true;
}

int64_t peer_ended(bg_nbd_loop *loop)
{
    bg_fault fault;
    struct pollfd wait = {bg_nbd_loop_eventfd(loop), POLLIN, 0};
    while (bg_nbd_take(loop, &fault, 1) == 0)
        CHECK(poll(&wait, 1, -1) == 1);
    CHECK(fault.ticket == 0 && fault.error == 0);
    return fault.source;
}
