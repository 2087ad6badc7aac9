/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "flight.h"

#include "io.h"

#include <errno.h>
#include <stdlib.h>

/* Requests with more pieces, or bytes, are for the pool: to begin them takes long. */
#define MAX_OPS 4
#define MAX_BYTES (1U << 20)

typedef struct {
    bg_aio_op base; /* first */
    bg_flight *flight;
    const bg_map_piece *piece;
} flight_op;

struct bg_flight {
    bg_request *request;
    bg_map_request found;
    bg_map_piece pieces[MAX_OPS];
    flight_op ops[MAX_OPS];
    int left;    /* operations under way */
    bool failed; /* one of them was refused, or moved less than it was to */
};

static void land(bg_flight *f)
{
    bg_request *r = f->request;
    bg_map_end(r->source->map, &f->found, 1);
    r->flight = NULL;
    free(f);
}

static void op_done(bg_aio_op *op, int64_t result)
{
    const flight_op *own = (flight_op *)op;
    bg_flight *f = own->flight;
    bg_request *r = f->request;
    f->failed |= result != own->piece->length;
    if (result == -EOPNOTSUPP || result == -EINVAL) /* the file system, or a kernel before 4.14 */
        bg_map_no_aio(r->source->map, own->piece->slot);
    if (--f->left > 0)
        return;
    if (f->failed) {
        bg_request_submit(r);
    } else {
        land(f);
        r->source->done(r);
    }
}

/* Whether a device, and nothing else, can be given all of it. */
static bool suits(const bg_request *r, const bg_map_request *found)
{
    const bg_aio *aio = r->source->aio;
    if (!aio || r->passing || r->durable || r->length > MAX_BYTES || found->count < 1 || found->count > MAX_OPS ||
        !bg_aio_room(aio, found->count) || (r->kind != BG_REQUEST_READ && r->kind != BG_REQUEST_WRITE))
        return false;
    uintptr_t memory = (uintptr_t)r->buf;
    for (int i = 0; i < found->count; i++) {
        const bg_map_piece *p = &found->pieces[i];
        if (p->fd < 0 || p->haste != BG_HASTE_DIRECT || memory & ((uintptr_t)p->memory - 1))
            return false;
        memory += (uintptr_t)p->length;
    }
    return true;
}

bool bg_flight_begin(bg_request *r, const bg_map_request *found)
{
    bg_flight *f = suits(r, found) ? malloc(sizeof(*f)) : NULL;
    if (!f)
        return false;
    f->request = r;
    f->found = *found;
    f->found.pieces = f->pieces;
    f->left = found->count;
    f->failed = false;
    r->next = NULL;
    r->flight = f;
    char *at = r->buf;
    for (int i = 0; i < found->count; i++) {
        const bg_map_piece *p = &f->pieces[i];
        f->pieces[i] = found->pieces[i];
        f->ops[i] = (flight_op){.base.done = op_done, .flight = f, .piece = p};
        bg_aio_add(r->source->aio, &f->ops[i].base, r->kind == BG_REQUEST_WRITE, p->fd, at, p->length, p->storage_offset);
        at += p->length;
    }
    return true;
}

int bg_flight_redo(bg_request *r)
{
    int ret = bg_map_move(r->source->map, &r->flight->found, r->buf);
    land(r->flight);
    return ret;
}
