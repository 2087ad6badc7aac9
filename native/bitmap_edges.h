/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Where the bits change. An edge is a bit that differs from the bit before it, so edges are starts and ends of runs in turn.
 */
#ifndef BG_BITMAP_EDGES_H
#define BG_BITMAP_EDGES_H

#include <stddef.h>
#include <stdint.h>

#define EDGES_WORDS 512 /* most words that are decoded at once */
#define EDGES_SLACK 64  /* values that may be written past the last edge, and most edges of a word */

typedef struct {
    const char *name;
    /*
     * Write the edges of words[0..count) to `out` in order, as (number of the bit) << shift where `base` is the number of the
     * first bit, and return how many. count <= EDGES_WORDS; words[-1] is readable, nothing after the words is read. It may stop
     * after an edge from which there is no room for EDGES_SLACK values more; then, and only then, the result is more than
     * room - EDGES_SLACK. room >= EDGES_SLACK.
     */
    size_t (*decode)(const uint64_t *words, size_t count, uint64_t base, unsigned shift, uint64_t *out, size_t room);
} edge_decoder;

/* The decoders that this processor can run, best first; at least one, at most EDGE_DECODERS. */
#define EDGE_DECODERS 3
size_t edge_decoders(const edge_decoder *out[EDGE_DECODERS]);

#endif
