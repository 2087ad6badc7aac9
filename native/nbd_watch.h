/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * When a thread of the NBD loop watches for events, and when it sleeps at once.
 *
 * Being woken costs more than a short request does, and the client pays for it, too, so the thread watches for a while
 * before it sleeps. Not when there is enough to do without (busy), when it was in vain of late, or when others want the
 * processor for long: it offers it to them between looks, for a client that can run nowhere else will send nothing before.
 * Who takes less than BG_NBD_CROWDED then is probably one, and has sent something, or soon will.
 *
 *     naps ─┬─ yes: one is due ───────────────────────────────► sleep
 *           └─ no ─► begin ─► look ─┬─ something ─► found ────► serve
 *                             ▲     └─ nothing ─► again ─┬─ no ─► sleep; more naps are due than last time
 *                             └──────────── yes ─────────┘
 *
 * An idle connection therefore costs nothing, and one that is asked something now and then one watch in a thousand.
 *
 * Units:     nanoseconds of any clock that does not go back.
 * Ownership: part of a thread; all zeroes at first.
 * Errno:     none.
 * Threads:   one.
 */
#ifndef BG_NBD_WATCH_H
#define BG_NBD_WATCH_H

#include <stdbool.h>
#include <stdint.h>

/* How long it watches, ns. */
#define BG_NBD_WATCH 100000
/* How long an offer of the processor takes at most that nobody has taken, and at most while only clients take it, ns. */
#define BG_NBD_OFFER 2000
#define BG_NBD_CROWDED 40000
/* Naps that are due when it has watched in vain again and again, and at least when busy. */
#define BG_NBD_MOST_NAPS 1023
#define BG_NBD_BUSY_NAPS 64

typedef struct {
    unsigned naps;      /* so often it goes to sleep before it watches again */
    unsigned next_naps; /* after the next time in vain */
    int64_t start; /* of this watch */
    bool looked;   /* in vain, in this watch */
    bool shared;   /* others have had the processor since the last look */
} bg_nbd_watch;

/* Before a wait: whether a nap is due. */
static inline bool bg_nbd_watch_naps(bg_nbd_watch *w)
{
    if (w->naps == 0)
        return false;
    w->naps--;
    return true;
}

/* The first look is about to be made. */
static inline void bg_nbd_watch_begin(bg_nbd_watch *w, int64_t now)
{
    w->start = now;
    w->looked = w->shared = false;
}

/* A look has found nothing, and since `offered` others had the processor, if they wanted it: whether to look again. */
static inline bool bg_nbd_watch_again(bg_nbd_watch *w, int64_t offered, int64_t now)
{
    w->looked = true;
    int64_t took = now - offered;
    w->shared = took > BG_NBD_OFFER;
    if (took <= BG_NBD_CROWDED && now - w->start < BG_NBD_WATCH)
        return true;
    w->next_naps = w->next_naps < BG_NBD_MOST_NAPS ? w->next_naps * 2 + 1 : BG_NBD_MOST_NAPS;
    w->naps = w->next_naps;
    return false;
}

/* A look has found something: what was there at once says nothing about watching. */
static inline void bg_nbd_watch_found(bg_nbd_watch *w)
{
    if (w->looked)
        w->next_naps /= 2;
}

/* A connection had more to do than to answer one short request. */
static inline void bg_nbd_watch_busy(bg_nbd_watch *w)
{
    if (w->naps < BG_NBD_BUSY_NAPS)
        w->naps = BG_NBD_BUSY_NAPS;
}

#endif
