/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* Reads of what is in memory: long ones are sent from where they are, short ones of a client that sleeps wake it early. */
#define _GNU_SOURCE
#include "nbd_internal.h"

#include "io.h"
#include "zero.h"

#include <errno.h>
#include <sys/socket.h>

/* Shorter ones cost less than finding out whether they are in memory; of longer ones the socket does not take most. */
#define SHORTEST_SHOWN (64 << 10)
#define LONGEST_SHOWN (1 << 20)
/* Looked at before: with one that is not zero, all of it is not. */
#define PROBE 64
/* Longer ones may take longer than the client does to wake up, and then finds half a reply. */
#define LONGEST_ANNOUNCED (16 << 10)
/* Bytes with which all replies to a read begin, whatever becomes of it. */
#define ANNOUNCEMENT 4

bool nbd_can_show(const bg_nbd_conn *conn, uint32_t length)
{
    return conn->source.map && length >= SHORTEST_SHOWN && length <= LONGEST_SHOWN && length <= conn->longest;
}

/* Whether it is to be answered with data; what may be nothing but zeroes is looked at as a whole elsewhere. */
static bool is_data(const nbd_request *r, const bg_map_request *found)
{
    char probe[PROBE];
    if (!r->conn->settings.structured || r->base.flags & BG_NBD_DF)
        return true;
    return bg_map_move_part_now(r->conn->source.map, found, probe, NULL, 0, PROBE) == 0 && !bg_is_zero(probe, PROBE);
}

/* How much of the reply the socket has taken, or -errno. */
static int64_t send_from(nbd_request *r, const bg_map_request *found, const void *const *at)
{
    struct iovec iov[BG_NBD_PIECES + 1] = {{r->head, r->head_size}};
    for (int i = 0; i < found->count; i++)
        iov[i + 1] = (struct iovec){(void *)(uintptr_t)at[i], (size_t)found->pieces[i].length};
    struct msghdr message = {.msg_iov = iov, .msg_iovlen = (size_t)found->count + 1};
    ssize_t sent;
    do
        sent = sendmsg(r->conn->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    while (sent < 0 && errno == EINTR);
    return sent < 0 ? -errno : sent;
}

/*
 * The socket has taken a part: the rest is copied before the request ends, as later there may be other bytes in that place.
 * What fails now can not be told any more.
 */
static void keep_rest(nbd_request *r, const bg_map_request *found, size_t sent, uint32_t cost)
{
    bg_nbd_conn *conn = r->conn;
    if (!nbd_give_buffer(r, cost))
        return;
    int64_t from = sent > r->head_size ? (int64_t)(sent - r->head_size) : 0;
    int ret = bg_map_move_part_now(conn->source.map, found, r->buffer, NULL, from, r->base.length);
    if (ret < 0) {
        nbd_forget(r);
        nbd_close(conn, ret);
        return;
    }
    r->payload_size = r->base.length;
    nbd_reply_rest(r, sent);
}

int nbd_show(nbd_request *r, uint32_t cost)
{
    bg_nbd_conn *conn = r->conn;
    bg_map *map = conn->source.map;
    bg_map_piece pieces[BG_NBD_PIECES];
    bg_map_request found;
    const void *at[BG_NBD_PIECES];
    if (conn->output)
        return -EAGAIN;
    int ret = bg_map_begin(map, (int64_t)r->base.offset, r->base.length, 0, pieces, BG_NBD_PIECES, &found);
    if (ret != 0)
        return ret == BG_MAP_MISS ? BG_MAP_MISS : -EAGAIN;
    if (bg_map_show(map, &found, at) != 0 || !is_data(r, &found)) {
        bg_map_end(map, &found, 0);
        return -EAGAIN;
    }
    nbd_pack_read(r);
    conn->counted.hits++;
    nbd_count(conn);
    int64_t sent = send_from(r, &found, at);
    /* Of what a file was cut off meanwhile, the descriptor knows more. */
    if (sent == -EAGAIN || sent == -EFAULT) {
        conn->full = sent == -EAGAIN;
        conn->counted.hits--;
        r->head_size = 0;
        bg_map_end(map, &found, 0);
        return -EAGAIN;
    }
    if (sent < 0) {
        nbd_forget(r);
        nbd_close(conn, sent);
    } else {
        conn->counted.sends++;
        conn->counted.sent += (uint64_t)sent;
        if ((uint64_t)sent == (uint64_t)r->head_size + r->base.length)
            nbd_forget(r);
        else
            keep_rest(r, &found, (size_t)sent, cost);
    }
    bg_map_end(map, &found, 1);
    return 0;
}

bool nbd_can_announce(const bg_nbd_conn *conn, uint32_t length)
{
    return conn->sleeps && length <= LONGEST_ANNOUNCED && !conn->requests && !conn->output && !conn->full &&
           conn->end - conn->start == BG_NBD_HEADER;
}

void nbd_announce(bg_request *request)
{
    nbd_request *r = request_of(request);
    bg_nbd_conn *conn = r->conn;
    nbd_pack_read(r);
    ssize_t sent = send(conn->fd, r->head, ANNOUNCEMENT, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent > 0) {
        conn->sent = (size_t)sent;
        conn->counted.sends++;
        conn->counted.sent += (uint64_t)sent;
    }
    r->head_size = 0;
}
