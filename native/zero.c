/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#include "zero.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

#define STEP 256 /* bytes tested between two looks at the result: enough for four loads in flight */

static inline __attribute__((always_inline)) int zero_loop(const unsigned char *p, size_t length)
{
    while (length >= STEP) {
        uint64_t word[STEP / 8], any = 0;
        memcpy(word, p, STEP);
        for (size_t i = 0; i < STEP / 8; i++)
            any |= word[i];
        if (any)
            return 0;
        p += STEP;
        length -= STEP;
    }
    unsigned char rest = 0;
    for (size_t i = 0; i < length; i++)
        rest |= p[i];
    return rest == 0;
}

static int zero_baseline(const unsigned char *p, size_t length)
{
    return zero_loop(p, length);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static int zero_avx2(const unsigned char *p, size_t length)
{
    return zero_loop(p, length);
}
#endif

int bg_is_zero(const void *buf, size_t length)
{
    const unsigned char *p = buf;
    /* Data rarely begins with zeroes: most calls end here. */
    uint64_t first;
    if (length >= sizeof(first)) {
        memcpy(&first, p, sizeof(first));
        if (first)
            return 0;
    }
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2"))
        return zero_avx2(p, length);
#endif
    return zero_baseline(p, length);
}

int64_t bg_zero_runs(const void *buf, size_t length, size_t granularity, size_t start, bg_zero_run *out, size_t max)
{
    if (granularity == 0 || max == 0 || (start < length && start % granularity))
        return -EINVAL;
    const unsigned char *p = buf;
    size_t runs = 0;
    for (size_t at = start; at < length;) {
        size_t block = length - at < granularity ? length - at : granularity;
        uint64_t zero = (uint64_t)bg_is_zero(p + at, block);
        if (runs && out[runs - 1].zero == zero) {
            out[runs - 1].length += block;
        } else {
            if (runs == max)
                break;
            out[runs++] = (bg_zero_run){.offset = at, .length = block, .zero = zero};
        }
        at += block;
    }
    return (int64_t)runs;
}
