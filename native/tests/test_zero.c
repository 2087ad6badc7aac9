/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#include "driver.h"
#include "zero.h"

#include <errno.h>

/* Each length ends with its allocation, so that a byte too many is seen. */
void test_zero(void)
{
    for (size_t length = 1; length < 700; length++) {
        unsigned char *p = calloc(1, length);
        bg_zero_run runs[4];
        CHECK(p && bg_is_zero(p, length));
        CHECK(bg_zero_runs(p, length, 64, 0, runs, 4) == 1 && runs[0].zero && runs[0].length == length);
        p[length - 1] = 1;
        CHECK(!bg_is_zero(p, length));
        CHECK(bg_is_zero(p, length - 1));
        int64_t n = bg_zero_runs(p, length, 64, 0, runs, 1);
        CHECK(n == 1 && runs[0].zero == (length > 64));
        CHECK(bg_zero_runs(p, length, 64, length, runs, 1) == 0);
        CHECK(bg_zero_runs(p, length, 0, 0, runs, 1) == -EINVAL);
        free(p);
    }
}
