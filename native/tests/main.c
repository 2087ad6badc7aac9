/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Drives every native structure under the sanitizers (.ci/sanitize). What is right is settled by tests/native; here it
 * matters that no path reads or writes where it must not, and that threads do not race.
 */
#include "driver.h"

int main(void)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } tests[] = {
        {"dense", test_dense}, {"guard", test_guard}, {"windows", test_windows}, {"bitmap", test_bitmap}, {"zero", test_zero}, {"wait", test_wait}, {"pipe", test_pipe}, {"pool", test_pool},
        {"queue", test_queue}, {"direct", test_direct}, {"copy", test_copy}, {"qcow2_l2", test_qcow2_l2},
        {"extent_map", test_extent_map}, {"extent_map_slabs", test_extent_map_slabs},
        {"extent_map_recall", test_extent_map_recall},
        {"extent_map_threads", test_extent_map_threads}, {"first_writes", test_first_writes}, {"copier", test_copier},
        {"allocator", test_allocator}, {"allocator_zeroes", test_allocator_zeroes}, {"request", test_request},
        {"flight", test_flight}, {"heavy", test_heavy}, {"nbd", test_nbd}, {"nbd_reads", test_nbd_reads},
        {"nbd_threads", test_nbd_threads}, {"nbd_watch", test_nbd_watch}, {"sums", test_sums},
    };
    for (size_t i = 0; i < sizeof(tests) / sizeof(tests[0]); i++) {
        tests[i].run();
        printf("%s ok\n", tests[i].name);
    }
    return 0;
}
