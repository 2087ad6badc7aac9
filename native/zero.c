/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#include "zero.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

/* A vector of any alignment; the compiler splits it where registers are narrower. */
typedef uint64_t vec __attribute__((vector_size(32), aligned(1), may_alias));
#define LOADS 8 /* vectors tested between two looks at the result: enough to keep memory busy */

static inline __attribute__((always_inline)) int zero_loop(const unsigned char *p, size_t length)
{
    for (; length >= LOADS * sizeof(vec); p += LOADS * sizeof(vec), length -= LOADS * sizeof(vec)) {
        const vec *v = (const vec *)p;
        vec any = ((v[0] | v[1]) | (v[2] | v[3])) | ((v[4] | v[5]) | (v[6] | v[7]));
        if (any[0] | any[1] | any[2] | any[3])
            return 0;
    }
    uint64_t rest = 0;
    for (; length >= sizeof(rest); p += sizeof(rest), length -= sizeof(rest)) {
        uint64_t word;
        memcpy(&word, p, sizeof(word));
        rest |= word;
    }
    for (; length; p++, length--)
        rest |= *p;
    return rest == 0;
}

static int zero_baseline(const unsigned char *p, size_t length)
{
    return zero_loop(p, length);
}

#if defined(__x86_64__) && !defined(BG_PORTABLE)
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
#if defined(__x86_64__) && !defined(BG_PORTABLE)
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
