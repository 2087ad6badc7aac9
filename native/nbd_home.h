/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Whether the client of a connection is at home: on the processor of the thread that serves it.
 *
 * Where there are more threads than processors, a client and the thread that answers it are best on one: to wake it there is a
 * switch, while another processor has to be interrupted, which on a virtual machine takes longer than a short request. Linux
 * leaves a client that is woken again and again where it is, so the connection has to come to it.
 *
 * No system call says where a client is. But one that sleeps until its reply comes, and runs here, often gets the processor while
 * the reply is still being sent; one that runs elsewhere never does. So now and then a few replies are watched:
 *
 *     asks ─┬─ no: most turns
 *           └─ yes ─► told, by BG_NBD_PROBES replies ─┬─ home ─────► not asked for a while
 *                                                     ├─ away ─────► to another thread; asked there at once
 *                                                     └─ unclear ──► not asked for a while
 *
 * A client that is nowhere at home has been with all threads then, and is asked less and less often.
 *
 * Units:     turns of the connection.
 * Ownership: part of a connection; all zeroes at first.
 * Errno:     none.
 * Threads:   one at a time.
 */
#ifndef BG_NBD_HOME_H
#define BG_NBD_HOME_H

#include <stdbool.h>

#define BG_NBD_PROBES 8
/* Until it is asked again: when it is at home or it is unclear; when it is nowhere, at first and at most. */
#define BG_NBD_HOME_PAUSE 256
#define BG_NBD_AWAY_PAUSE 64
#define BG_NBD_MOST_DOUBLINGS 10

enum bg_nbd_verdict { BG_NBD_UNCLEAR, BG_NBD_HOME, BG_NBD_AWAY };

typedef struct {
    unsigned pause;       /* until it is asked again */
    unsigned probes, met; /* replies of this time that were watched, and during which the client, or another, ran here */
    unsigned moves;       /* since it was at home */
} bg_nbd_home;

/* Before a turn: whether to watch its reply. */
static inline bool bg_nbd_home_asks(bg_nbd_home *h)
{
    if (h->pause == 0)
        return true;
    h->pause--;
    return false;
}

/* One that was watched was sent. `met`: another thread has had the processor meanwhile. `threads`: how many it could be with. */
static inline enum bg_nbd_verdict bg_nbd_home_told(bg_nbd_home *h, bool met, unsigned threads)
{
    h->met += met;
    if (++h->probes < BG_NBD_PROBES)
        return BG_NBD_UNCLEAR;
    unsigned now = h->met;
    h->probes = h->met = 0;
    if (now * 2 >= BG_NBD_PROBES) {
        *h = (bg_nbd_home){.pause = BG_NBD_HOME_PAUSE};
        return BG_NBD_HOME;
    }
    if (now * 8 > BG_NBD_PROBES) {
        h->pause = BG_NBD_HOME_PAUSE;
        return BG_NBD_UNCLEAR;
    }
    if (++h->moves >= threads) {
        unsigned doublings = h->moves - threads;
        h->pause = BG_NBD_AWAY_PAUSE << (doublings < BG_NBD_MOST_DOUBLINGS ? doublings : BG_NBD_MOST_DOUBLINGS);
    }
    return BG_NBD_AWAY;
}

#endif
