/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "buffers.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

#define SMALLEST_BITS 12
#define CLASSES 20
#define KEPT (8 << 20) /* free bytes kept for each size; larger buffers are not kept */

typedef struct spare {
    struct spare *next;
} spare;

struct bg_buffers {
    pthread_mutex_t lock;
    struct {
        spare *first;
        uint32_t count;
    } classes[CLASSES];
};

static unsigned bits(uint32_t length)
{
    return length <= 1U << SMALLEST_BITS ? SMALLEST_BITS : 32U - (unsigned)__builtin_clz(length - 1);
}

uint32_t bg_buffer_size(uint32_t length)
{
    return UINT32_C(1) << bits(length);
}

bg_buffers *bg_buffers_new(void)
{
    bg_buffers *buffers = calloc(1, sizeof(*buffers));
    if (buffers)
        pthread_mutex_init(&buffers->lock, NULL);
    return buffers;
}

void bg_buffers_free(bg_buffers *buffers)
{
    if (!buffers)
        return;
    for (int i = 0; i < CLASSES; i++) {
        for (spare *next; buffers->classes[i].first; buffers->classes[i].first = next) {
            next = buffers->classes[i].first->next;
            free(buffers->classes[i].first);
        }
    }
    pthread_mutex_destroy(&buffers->lock);
    free(buffers);
}

static void *allocate(uint32_t size)
{
    if (size < BG_HUGE_PAGE)
        return aligned_alloc(1U << SMALLEST_BITS, size);
    void *made = aligned_alloc(BG_HUGE_PAGE, size);
    if (made)
        madvise(made, size, MADV_HUGEPAGE);
    return made;
}

void *bg_buffers_take(bg_buffers *buffers, uint32_t size)
{
    unsigned class = bits(size) - SMALLEST_BITS;
    pthread_mutex_lock(&buffers->lock);
    spare *found = buffers->classes[class].first;
    if (found) {
        buffers->classes[class].first = found->next;
        buffers->classes[class].count--;
    }
    pthread_mutex_unlock(&buffers->lock);
    return found ? (void *)found : allocate(size);
}

void bg_buffers_give(bg_buffers *buffers, void *buf, uint32_t size)
{
    unsigned class = bits(size) - SMALLEST_BITS;
    spare *given = buf;
    pthread_mutex_lock(&buffers->lock);
    if ((buffers->classes[class].count + UINT64_C(1)) * size <= KEPT) {
        given->next = buffers->classes[class].first;
        buffers->classes[class].first = given;
        buffers->classes[class].count++;
        given = NULL;
    }
    pthread_mutex_unlock(&buffers->lock);
    free(given);
}

void bg_buffer_free(void *buf)
{
    free(buf);
}
