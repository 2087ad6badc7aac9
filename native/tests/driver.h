/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/* What the parts of the C driver share: each test function ends the program when something is not as it should be. */
#ifndef DRIVER_H
#define DRIVER_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                                                  \
    do {                                                                                                                  \
        if (!(condition)) {                                                                                               \
            fprintf(stderr, "%s:%d: %s: not true: %s\n", __FILE__, __LINE__, __func__, #condition);                       \
            abort();                                                                                                      \
        }                                                                                                                 \
    } while (0)

/* The same numbers in every run. */
static inline uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* A file in memory that has what is put into `data`, but for [hole, end), and its descriptor. */
int file_with_hole(char *data, size_t size, size_t hole, size_t end);

void test_allocator(void);
void test_allocator_zeroes(void);
void test_bitmap(void);
void test_copier(void);
void test_copy(void);
void test_direct(void);
void test_extent_map(void);
void test_extent_map_recall(void);
void test_extent_map_slabs(void);
void test_extent_map_threads(void);
void test_first_writes(void);
void test_flight(void);
void test_dense(void);
void test_guard(void);
void test_heavy(void);
void test_nbd(void);
void test_nbd_reads(void);
void test_nbd_threads(void);
void test_nbd_watch(void);
void test_pipe(void);
void test_pool(void);
void test_qcow2_l2(void);
void test_queue(void);
void test_request(void);
void test_sums(void);
void test_wait(void);
void test_windows(void);
void test_zero(void);

#endif
