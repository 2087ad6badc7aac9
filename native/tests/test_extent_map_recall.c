/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Regions that were dropped and are found again in their tables: never as something else than what they were, whatever the table says by
 * then, and not at all when something has happened to them. By a model, and by threads that read what another one moves.
 */
#define _GNU_SOURCE
#include "driver.h"
#include "extent_map_internal.h"
#include "io.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define LIMIT BG_MAP_MIN_MEMORY
#define SHIFT 14
#define CLUSTER ((int64_t)1 << SHIFT)
#define REGION ((int64_t)1 << REGION_SHIFT_MIN)
#define PER_REGION (REGION / CLUSTER)
#define REGIONS 80 /* more than twice as many as fit */
#define CLUSTERS (REGIONS * PER_REGION)
#define SIZE (REGIONS * REGION - 3 * CLUSTER - 512) /* the last region is a short one, its last cluster, too */
#define LAST (SIZE / CLUSTER)
#define TABLES 4096 /* where they are in the storage */
#define DATA ((int64_t)64 << 20)
#define STEPS 20000

typedef struct {
    int64_t place;  /* a cluster of the storage */
    uint64_t flags;
    bool known;     /* the map may have it */
} cluster;

static cluster disk[CLUSTERS];
static bg_map *map;
static int fd, slot;
static int64_t next_place;

static int64_t storage_of(int64_t place)
{
    return DATA + place * CLUSTER;
}

static int64_t length_of(int64_t c)
{
    return c == LAST ? SIZE - c * CLUSTER : CLUSTER;
}

/* While entries have been read, and nothing is published yet. */
typedef void (*act)(void);
static _Atomic(act) meanwhile;

/* Entries are place << 8 | flags ^ those of the form; 0: none. */
static void decode(const bg_map_form *form, uint64_t *entries, int64_t count)
{
    act now = atomic_exchange(&meanwhile, NULL);
    if (now)
        now();
    for (int64_t i = 0; i < count; i++)
        entries[i] = entries[i] ? ((uint64_t)form->storage + (entries[i] >> 8 << SHIFT)) |
                                      ((entries[i] & 0xf) ^ (uint64_t)form->flags)
                                : BG_MAP_NO_PLACE;
}

/* A map has tables of all flags. */
static int flags_of(int64_t region)
{
    return (int)(region % 8) << 1;
}

static bg_map_form form(int64_t region)
{
    return (bg_map_form){decode, DATA, slot, SHIFT, flags_of(region), 0};
}

static void write_entry(int64_t c)
{
    uint64_t entry = (uint64_t)disk[c].place << 8 | (disk[c].flags ^ (uint64_t)flags_of(c / PER_REGION));
    CHECK(bg_pwrite(fd, &entry, sizeof(entry), TABLES + c * 8) == sizeof(entry));
}

static void write_table(int64_t region)
{
    for (int64_t c = region * PER_REGION; c < (region + 1) * PER_REGION && c <= LAST; c++)
        write_entry(c);
}

static void enter_cluster(int64_t c)
{
    bg_map_extent e = {c * CLUSTER, length_of(c), storage_of(disk[c].place), slot, (int32_t)disk[c].flags};
    CHECK(bg_map_insert(map, bg_map_generation(map), &e, 1) == 1);
    disk[c].known = true;
}

/* Of a region; how many clusters it has. */
static int64_t places_of(int64_t region, uint64_t *places)
{
    int64_t n = 0;
    for (int64_t c = region * PER_REGION; c < (region + 1) * PER_REGION && c <= LAST; c++, n++)
        places[n] = (uint64_t)storage_of(disk[c].place) | disk[c].flags;
    return n;
}

static void note(int64_t region, int64_t generation, uint64_t *places, int64_t n)
{
    bg_map_form f = form(region);
    CHECK(bg_map_note_table(map, generation, &f, region * REGION, places, n, TABLES + region * PER_REGION * 8) >= 0);
}

static void insert(int64_t region, const uint64_t *places, int64_t n)
{
    bg_map_extent e[PER_REGION];
    int64_t count = 0;
    for (int64_t i = 0, c = region * PER_REGION; i < n; i++, c++)
        if (places[i] != BG_MAP_NO_PLACE)
            e[count++] = (bg_map_extent){c * CLUSTER, length_of(c), (int64_t)places[i] & -CLUSTER, slot, (int32_t)places[i] & 0xf};
    CHECK(bg_map_insert(map, bg_map_generation(map), e, count) == count);
    for (int64_t c = region * PER_REGION; c < region * PER_REGION + n; c++)
        disk[c].known = true;
}

/* All of it is held. */
static void enter(int64_t region)
{
    uint64_t places[PER_REGION];
    int64_t n = places_of(region, places);
    insert(region, places, n);
    note(region, bg_map_generation(map), places, n);
}

/* It need not be, unless some of it is. */
static void learn(int64_t region)
{
    uint64_t places[PER_REGION];
    int64_t n = places_of(region, places);
    note(region, bg_map_generation(map), places, n);
    insert(region, places, n);
}

static bool is_dropped(int64_t region)
{
    const leaf *l = ref_leaf(atomic_load(&atomic_load(&map->space)->leaf[region]));
    return !l || l == &no_extents;
}

/* Whether it is known. */
static bool look(int64_t c)
{
    bg_map_piece piece;
    bg_map_request request;
    bg_map_extent e;
    int ret = bg_map_begin(map, c * CLUSTER, length_of(c), 0, &piece, 1, &request);
    CHECK(ret == 0 || ret == BG_MAP_MISS);
    if (ret)
        return false;
    CHECK(disk[c].known && piece.storage_offset == storage_of(disk[c].place) && piece.slot == slot);
    bg_map_end(map, &request, 1);
    CHECK(!bg_map_find(map, c * CLUSTER, &e) || (uint64_t)e.flags == disk[c].flags);
    return true;
}

static bg_map_stats stats(void)
{
    bg_map_stats s;
    bg_map_get_stats(map, &s);
    return s;
}

static void start(void)
{
    CHECK(bg_map_new(SIZE, LIMIT, &map) == 0);
    fd = memfd_create("disk", MFD_CLOEXEC);
    slot = bg_map_add_slot(map, fd, 1, 1);
    for (next_place = 1; next_place <= CLUSTERS; next_place++)
        disk[CLUSTERS - next_place] = (cluster){next_place, BG_MAP_WRITABLE, false};
    for (int64_t region = 0; region < REGIONS; region++) {
        write_table(region);
        enter(region);
    }
}

static void end(void)
{
    CHECK(stats().bytes <= LIMIT);
    CHECK(bg_map_free(map) == 0);
    close(fd);
}

/* All of a disk that is too large for the map is known, and no request misses. */
static void recall_all(void)
{
    start();
    CHECK(stats().evictions > REGIONS / 2);
    int64_t before = stats().recalls;
    for (int64_t c = 0; c <= LAST; c += 37)
        CHECK(look(c));
    CHECK(stats().recalls > before + REGIONS / 2 && stats().misses == 0);
    /* A request may need several. */
    bg_map_piece pieces[3];
    bg_map_request request;
    CHECK(bg_map_begin(map, 9 * REGION - CLUSTER, 3 * CLUSTER, 1, pieces, 3, &request) == 0);
    CHECK(request.count == 3);
    bg_map_end(map, &request, 0);
    end();
}

static int64_t find_dropped(void)
{
    for (int64_t region = 1;; region++) {
        CHECK(region < REGIONS - 1);
        if (is_dropped(region))
            return region;
    }
}

/* Of an event in a dropped region: nobody finds it again in the table, which still says what was. */
static void what_happens_is_not_undone(void)
{
    for (int event = 0; event < 6; event++) {
        start();
        int64_t region = find_dropped(), c = region * PER_REGION + 5;
        char byte;
        switch (event) {
        case 0:
            bg_map_wait(map, bg_map_invalidate(map, c * CLUSTER, CLUSTER));
            break;
        case 1:
            bg_map_wait(map, bg_map_invalidate(map, region * REGION, REGION));
            break;
        case 2:
            bg_map_wait(map, bg_map_protect(map, c * CLUSTER, CLUSTER));
            break;
        case 3:
            bg_map_wait(map, bg_map_protect(map, 0, SIZE));
            break;
        case 4:
            CHECK(bg_map_copied(map, c * CLUSTER, CLUSTER) == 0);
            break;
        default:
            bg_map_wait(map, bg_map_resize(map, SIZE));
        }
        CHECK(bg_map_pread(map, c * CLUSTER, &byte, 1) == BG_MAP_MISS);
        CHECK(is_dropped(region));
        end();
    }
}

static int64_t reading; /* a cluster of the region that is being recalled */

static void invalidate_meanwhile(void)
{
    bg_map_wait(map, bg_map_invalidate(map, reading * CLUSTER, CLUSTER));
    disk[reading].known = false;
}

static void resize_meanwhile(void)
{
    bg_map_wait(map, bg_map_resize(map, SIZE));
    for (int64_t c = 0; c <= LAST; c++)
        disk[c].known = false;
}

static void cut_meanwhile(void)
{
    resize_meanwhile();
    bg_map_wait(map, bg_map_resize(map, CLUSTER));
}

static void move_meanwhile(void)
{
    invalidate_meanwhile();
    disk[reading].place = next_place++;
    enter(reading / PER_REGION);
}

static void move_and_drop_meanwhile(void)
{
    move_meanwhile();
    for (int64_t i = 0; i < 3 * REGIONS; i++)
        if (i % REGIONS != reading / PER_REGION)
            enter(i % REGIONS);
    CHECK(is_dropped(reading / PER_REGION));
}

/* What happens between the reading of a table and what comes of it counts. */
static void meanwhile_it_happens(void)
{
    const act acts[] = {invalidate_meanwhile, resize_meanwhile, cut_meanwhile, move_meanwhile, move_and_drop_meanwhile};
    for (int i = 0; i < 5; i++) {
        start();
        int64_t region = find_dropped();
        reading = region * PER_REGION + 5;
        atomic_store(&meanwhile, acts[i]);
        char byte;
        CHECK(bg_map_pread(map, (reading + 1) * CLUSTER, &byte, 1) == BG_MAP_MISS && !atomic_load(&meanwhile));
        if (acts[i] == cut_meanwhile) {
            CHECK(bg_map_pread(map, region * REGION, &byte, 1) == -EINVAL);
        } else {
            bool known = acts[i] == move_meanwhile;
            CHECK(look(reading) == known && look(reading + 1) == known);
        }
        CHECK(stats().recalls == 0);
        end();
    }
}

/* Who asked the drivers before something happened knows nothing. */
static void noted_too_late(void)
{
    for (int event = 0; event < 4; event++) {
        start();
        uint64_t places[PER_REGION];
        int64_t region = 3, c = region * PER_REGION + 7, generation = bg_map_generation(map);
        bg_map_wait(map, bg_map_invalidate(map, region * REGION, REGION));
        CHECK(!look(c));
        if (event > 0)
            generation = bg_map_generation(map);
        if (event == 2)
            bg_map_wait(map, bg_map_protect(map, c * CLUSTER, CLUSTER));
        else if (event == 3)
            bg_map_wait(map, bg_map_remove_slot(map, slot));
        note(region, generation, places, places_of(region, places));
        CHECK((places[0] == BG_MAP_NO_PLACE) == (event == 1) && look(c) == (event == 1));
        end();
    }
}

/* Nothing is known of the region; and when there is to be no room, as much of the others as the map can hold. */
static void empty(int64_t region, bool room)
{
    bg_map_wait(map, bg_map_invalidate(map, region * REGION, REGION));
    for (int64_t other = 0; other < REGIONS && !room; other++)
        if (other != region)
            look(other * PER_REGION);
}

/* What is noted is held while there is room, and is looked for in the table when there is none. A hole stays one; a table that
 * short words can not say is left to who asked. */
static void noted(bool room)
{
    start();
    uint64_t places[PER_REGION];
    int64_t region = 3, c = region * PER_REGION, n = places_of(region, places);
    bg_map_extent e;
    for (int odd = 0; odd < 3; odd++) {
        empty(region, room);
        places_of(region, places);
        if (odd)
            places[5] = odd == 1 ? places[5] + 512 : (uint64_t)1 << 62;
        places[6] = BG_MAP_NO_PLACE;
        note(region, bg_map_generation(map), places, n);
        CHECK((places[5] == BG_MAP_NO_PLACE) == !odd);
        CHECK(is_dropped(region) == (odd || !room));
        CHECK(look(c) == (!odd && room)); /* the table has the sixth */
    }
    CHECK(bg_pwrite(fd, &(uint64_t){0}, 8, TABLES + (c + 6) * 8) == 8);
    empty(region, room);
    places_of(region, places);
    places[6] = BG_MAP_NO_PLACE;
    note(region, bg_map_generation(map), places, n);
    CHECK(look(c + 5) && !bg_map_find(map, (c + 6) * CLUSTER, &e));
    /* Of nothing but holes nothing is to be found. */
    for (int64_t i = 0; i < n; i++) {
        places[i] = BG_MAP_NO_PLACE;
        CHECK(bg_pwrite(fd, &(uint64_t){0}, 8, TABLES + (c + i) * 8) == 8);
    }
    empty(region, room);
    note(region, bg_map_generation(map), places, n);
    int64_t before = stats().recalls;
    CHECK(!look(c) && is_dropped(region) && stats().recalls == before);
    end();
}

/* What is not the image's any more is not read. */
static void slot_removed(void)
{
    start();
    int64_t region = find_dropped();
    bg_map_wait(map, bg_map_remove_slot(map, slot));
    CHECK(!look(region * PER_REGION) && is_dropped(region));
    end();
}

static void table_of_something_else(void)
{
    start();
    int64_t region = find_dropped(), c = region * PER_REGION + 500;
    uint64_t right;
    CHECK(bg_pread(fd, &right, 8, TABLES + c * 8) == 8);
    uint64_t wrong[] = {0, right ^ BG_MAP_WRITABLE, right + (1 << 8), UINT64_MAX};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        CHECK(bg_pwrite(fd, &wrong[i], 8, TABLES + c * 8) == 8);
        CHECK(!look(c) && !look(c + 1));
    }
    write_entry(c);
    CHECK(look(c) && look(c + 1));
    CHECK(stats().misses == 8 && stats().recalls == 1);
    /* Behind the file's end there are no entries, and none that are zeroes. */
    region = find_dropped();
    CHECK(ftruncate(fd, TABLES + region * PER_REGION * 8 + 8) == 0);
    CHECK(!look(region * PER_REGION));
    end();
}

/* An extent that is entered in a dropped region leaves the rest of it as it was. */
static void inserted_in_a_dropped_region(void)
{
    start();
    int64_t region = find_dropped(), c = region * PER_REGION + 9;
    disk[c].place = next_place;
    enter_cluster(c);
    CHECK(stats().recalls == 1);
    CHECK(look(c) && look(c + 1));
    CHECK(stats().misses == 0);
    end();
}

static void refuses_what_is_no_table(void)
{
    start();
    uint64_t none[2 * PER_REGION];
    int64_t generation = bg_map_generation(map);
    for (int64_t i = 0; i < 2 * PER_REGION; i++)
        none[i] = BG_MAP_NO_PLACE;
    bg_map_form f = form(0), large = f, odd = f, zero = f;
    large.shift = 40;
    odd.slot = -1;
    zero.flags = BG_MAP_ZERO;
    CHECK(bg_map_note_table(map, generation, &large, 0, none, 1, 0) == -EINVAL);
    CHECK(bg_map_note_table(map, generation, &odd, 0, none, 1, 0) == -EINVAL);
    CHECK(bg_map_note_table(map, 0, &f, 0, none, 1, 0) == -EINVAL);
    CHECK(bg_map_note_table(map, generation, &zero, 0, none, 1, 0) == -EINVAL);
    CHECK(bg_map_note_table(map, generation, &f, 0, none, 1, 4) == -EINVAL);
    CHECK(bg_map_note_table(map, generation, &f, 0, none, -1, 0) == -EINVAL);
    CHECK(bg_map_note_table(map, generation, &f, 0, none, INT64_MAX / 8, 0) == -EINVAL);
    CHECK(bg_map_note_table(map, generation, &f, INT64_MAX - 5, none, 1, 0) == -EINVAL);
    CHECK(bg_map_note_table(map, generation, &f, 0, none, 1, -1) == -EINVAL);
    CHECK(bg_map_note_table(map, generation, &f, 0, none, 2, INT64_MAX - 8) == -EINVAL);
    /* Such as are of no use: for no whole region, not for its clusters, or for another disk. */
    CHECK(bg_map_note_table(map, generation, &f, 0, none, PER_REGION - 1, 0) == 0);
    CHECK(bg_map_note_table(map, generation, &f, -512, none, 2 * PER_REGION, 0) == 0);
    CHECK(bg_map_note_table(map, generation, &f, SIZE, none, PER_REGION, 0) == 0);
    CHECK(bg_map_note_table(map, generation, &f, -2 * REGION, none, PER_REGION, 0) == 0);
    int64_t region = find_dropped();
    CHECK(look(region * PER_REGION));
    /* Another form takes the place of all. */
    f.version = 7;
    CHECK(bg_map_note_table(map, generation, &f, 0, none, PER_REGION, TABLES) == 0);
    region = find_dropped();
    CHECK(!look(region * PER_REGION));
    end();
}

static void change(uint64_t *seed)
{
    uint64_t r = next_random(seed);
    int64_t c = (int64_t)(next_random(seed) % (LAST + 1)), region = c / PER_REGION;
    switch (r % 32) {
    case 0:
    case 1:
        bg_map_wait(map, bg_map_invalidate(map, c * CLUSTER, length_of(c)));
        disk[c] = (cluster){next_place++, r >> 32 & 1 ? BG_MAP_WRITABLE : BG_MAP_WRITABLE | BG_MAP_COPY, false};
        if (r >> 33 & 1)
            write_entry(c);
        if (r >> 34 & 1)
            enter_cluster(c);
        break;
    case 2:
        bg_map_wait(map, bg_map_protect(map, c * CLUSTER, length_of(c)));
        disk[c].flags = 0;
        break;
    case 3:
        CHECK(bg_map_copied(map, c * CLUSTER, length_of(c)) == 0);
        disk[c].flags &= ~(uint64_t)BG_MAP_COPY;
        break;
    case 4:
        CHECK(bg_pwrite(fd, &r, 8, TABLES + c * 8) == 8);
        break;
    case 5:
        bg_map_wait(map, bg_map_invalidate(map, region * REGION, region == REGIONS - 1 ? SIZE - region * REGION : REGION));
        for (int64_t i = region * PER_REGION; i < (region + 1) * PER_REGION && i <= LAST; i++)
            disk[i].known = false;
        break;
    case 6:
        write_table(region);
        break;
    case 7:
    case 8:
    case 9:
    case 10:
        write_table(region);
        if (r >> 32 & 1)
            enter(region);
        else
            learn(region);
        break;
    default:
        for (int i = 0; i < 8; i++)
            look((int64_t)(next_random(seed) % (LAST + 1)));
    }
}

static void by_model(void)
{
    uint64_t seed = 11;
    start();
    for (int step = 0; step < STEPS; step++)
        change(&seed);
    CHECK(stats().recalls > STEPS / 10 && stats().misses > STEPS / 10);
    end();
}

/* By threads: of each region some clusters have data, which says whose they are. */
#define MOVES 400
#define WATCHERS 3
#define EVERY 64

static atomic_bool over;
static _Atomic int64_t seen;
static pthread_mutex_t resolver = PTHREAD_MUTEX_INITIALIZER;

static void put(int64_t c, uint64_t what)
{
    CHECK(bg_pwrite(fd, &what, 8, storage_of(disk[c].place)) == 8);
}

static void *watch(void *arg)
{
    uint64_t seed = 3 + (uint64_t)(intptr_t)arg, found;
    while (!atomic_load(&over)) {
        int64_t c = (int64_t)(next_random(&seed) % (LAST / EVERY)) * EVERY;
        int ret = bg_map_pread(map, c * CLUSTER, &found, 8);
        if (ret == BG_MAP_MISS) {
            pthread_mutex_lock(&resolver);
            CHECK(bg_pread(fd, &found, 8, storage_of(disk[c].place)) == 8);
            uint64_t how = next_random(&seed) % 8;
            if (how == 0)
                enter(c / PER_REGION);
            else if (how == 1)
                learn(c / PER_REGION);
            else
                enter_cluster(c);
            pthread_mutex_unlock(&resolver);
            ret = 0;
        }
        CHECK(ret == 0 && found == (uint64_t)c);
        atomic_fetch_add(&seen, 1);
    }
    return NULL;
}

static void move(int64_t c, uint64_t how)
{
    pthread_mutex_lock(&resolver);
    bg_map_wait(map, bg_map_invalidate(map, c * CLUSTER, CLUSTER));
    put(c, UINT64_MAX);
    disk[c].place = next_place++;
    put(c, (uint64_t)c);
    if (how & 1)
        write_entry(c);
    if (how & 2)
        enter(c / PER_REGION);
    pthread_mutex_unlock(&resolver);
}

static void by_threads(void)
{
    pthread_t threads[WATCHERS];
    uint64_t seed = 8;
    start();
    for (int64_t c = 0; c <= LAST; c += EVERY)
        put(c, (uint64_t)c);
    atomic_store(&over, false);
    for (int i = 0; i < WATCHERS; i++)
        CHECK(pthread_create(&threads[i], NULL, watch, (void *)(intptr_t)i) == 0);
    for (int i = 0; i < MOVES; i++) {
        for (int64_t before = atomic_load(&seen); atomic_load(&seen) < before + 50;)
            usleep(10);
        move((int64_t)(next_random(&seed) % (LAST / EVERY)) * EVERY, next_random(&seed));
    }
    atomic_store(&over, true);
    for (int i = 0; i < WATCHERS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(stats().recalls > MOVES / 4);
    end();
}

void test_extent_map_recall(void)
{
    recall_all();
    what_happens_is_not_undone();
    meanwhile_it_happens();
    noted_too_late();
    noted(true);
    noted(false);
    slot_removed();
    table_of_something_else();
    inserted_in_a_dropped_region();
    refuses_what_is_no_table();
    by_model();
    by_threads();
}
