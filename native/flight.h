/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Requests that a device has in hand while their thread goes on: an extent map's request and its operations (aio.h).
 *
 *     bg_request_try ── begin ──► device ──► all of it moved: source->done
 *                                   └─────► not all of it: to the pool, which does it again, as the same request of the map, so that it
 *                                           is done at one point in time
 *
 * Units:     bytes.
 * Ownership: as request.h.
 * Errno:     0 or -errno.
 * Threads:   begin on the thread of the source's aio, redo on any.
 */
#ifndef BG_FLIGHT_H
#define BG_FLIGHT_H

#include "request.h"

/*
 * Add the operations of a read or write to the source's aio. `found` is what the map has begun for it, and is copied. False: it is
 * not for the aio: some of it is not on such a descriptor, it is long, or in many pieces.
 */
bool bg_flight_begin(bg_request *request, const bg_map_request *found);

/* Do it where it may wait, and end the map's request. */
int bg_flight_redo(bg_request *request);

#endif
