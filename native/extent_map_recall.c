/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * Regions that were dropped for want of memory, made again without Python.
 *
 * The words of a region came from a table of the image, and mostly are still there. So of a region that is dropped a sum of its
 * words stays, and where its table's entries are; a request that misses reads these, and where the sum is the same the words
 * are, and the region is as if it had never been dropped. Whatever else happens to a region takes its sum away.
 *
 * Nothing is believed of what is read: it may have become anything, even what a guest has written to where a table was
 * once. The sum is one of a family that is strongly universal, by a key that is drawn when it is needed first, and that nobody
 * outside can know: other words have the same one with a probability of 2^-32. Source: D. Lemire, O. Kaser, "Strongly
 * universal string hashing is fast" (2014), multilinear.
 */
#include "extent_map_internal.h"

#include "io.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/random.h>

#define MOST_WORDS 2048 /* of a region that is recalled; its entries are read on the stack */
#define ENTRY 8
/* A source's flags are in the bits that the place of an entry leaves free. */
#define FLAG_SHIFT 1
_Static_assert(WRITES >> FLAG_SHIFT < ENTRY && !(BG_MAP_ZERO >> FLAG_SHIFT), "flags fit their bits");
#define FEW_EXTENTS 64
/* The places and sums of regions may take this part of the memory. */
#define PART 4

typedef struct {
    uint64_t by[MOST_WORDS + 1];
    bool drawn;
} key;

static key secret;

static void draw(void)
{
    ssize_t got = 0, n = 0;
    for (; got < (ssize_t)sizeof(secret.by) && (n = getrandom((char *)secret.by + got, sizeof(secret.by) - (size_t)got, 0)) > 0;
         got += n)
        ;
    secret.drawn = got == (ssize_t)sizeof(secret.by);
}

/* Never 0. */
static uint64_t sum_of(const uint32_t *words, uint64_t count)
{
    uint64_t sum = secret.by[0];
    for (uint64_t i = 0; i < count; i++)
        sum += secret.by[i + 1] * words[i];
    return sum | 1;
}

static uint64_t words_of(const space *sp, int64_t region, unsigned shift)
{
    return ((uint64_t)(region_end(sp, region) - (region << sp->shift) - 1) >> shift) + 1;
}

static bool same_form(const bg_map_form *a, const bg_map_form *b)
{
    return a->decode == b->decode && a->slot == b->slot && a->shift == b->shift && a->storage == b->storage &&
           a->version == b->version;
}

void map_forget_sources(bg_map *map)
{
    if (map->sources)
        map->bytes -= map->sources_bytes;
    atomic_store(&map->recalls_some, false);
    free(map->sources);
    map->sources = NULL;
}

static bool has_sources(bg_map *map, const space *sp, const bg_map_form *form)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    if (map->sources && same_form(&map->form, form))
        return true;
    map_forget_sources(map);
    pthread_once(&once, draw);
    size_t bytes = (size_t)sp->regions * sizeof(source);
    if (!secret.drawn || bytes > map->limit / PART || !(map->sources = calloc((size_t)sp->regions, sizeof(source))))
        return false;
    map->sources_bytes = bytes;
    map->bytes += bytes;
    map->form = *form;
    return true;
}

/* False: a table of short words can not say it, or it says nothing. */
static bool to_words(const bg_map_form *form, const uint64_t *places, uint64_t count, uint32_t *words)
{
    uint64_t others = ((uint64_t)1 << form->shift) - (1 << FLAG_BITS), misplaced = 0, some = 0;
    for (uint64_t i = 0; i < count; i++) {
        bool none = places[i] == BG_MAP_NO_PLACE;
        misplaced |= none ? 0 : (places[i] & others) | (places[i] >> form->shift >= SHORT_END);
        some |= !none;
        words[i] = none ? SHORT_NONE : (uint32_t)(places[i] >> form->shift << FLAG_BITS | (places[i] & ((1 << FLAG_BITS) - 1)));
    }
    return some && !misplaced;
}

/* Under the lock: nothing is known of the region, and who asked the drivers at `generation` knows all that has happened to it. */
static bool is_unknown(const bg_map *map, space *sp, int64_t region, int64_t generation)
{
    int64_t start = region << sp->shift, length = region_end(sp, region) - start;
    leaf_ref ref = atomic_load(&sp->leaf[region]);
    span s;
    return (ref ? ref_leaf(ref) == &no_extents : !map_find(sp, start, &s)) &&
           !map_is_stale(map, generation, start, length) && !map_is_protected(map, generation, start, length);
}

/* Under the lock. `places` are the region's; adds how many extents of it are held to *taken. */
static void note_region(bg_map *map, space *sp, int64_t region, int64_t generation, uint64_t *places, int64_t *taken)
{
    uint32_t words[MOST_WORDS];
    uint64_t count = words_of(sp, region, (unsigned)map->form.shift);
    const storage *slot = &map->slots[map->form.slot];
    if (slot->state != SLOT_LIVE || bg_always_waits(atomic_load(&slot->haste)) || !is_unknown(map, sp, region, generation) ||
        !to_words(&map->form, places, count, words))
        return;
    if (map_has_table_room(map, count) && map_publish_words(map, sp, region, words, count))
        *taken += ref_leaf(atomic_load(&sp->leaf[region]))->extents;
    else
        map_publish_dropped(map, sp, region, sum_of(words, count));
    for (uint64_t i = 0; i < count; i++)
        places[i] = BG_MAP_NO_PLACE;
}

int64_t bg_map_note_table(bg_map *map, int64_t generation, const bg_map_form *form, int64_t offset, uint64_t *places, int64_t entries,
                      int64_t at)
{
    if (generation < 1 || form->shift <= CLUSTER_SHIFT_BASE || form->shift > CLUSTER_SHIFT_MAX || form->slot < 0 ||
        form->slot >= BG_MAP_SLOTS || form->flags & ~WRITES || entries < 0 || entries > INT64_MAX >> form->shift ||
        offset > INT64_MAX - (entries << form->shift) || !range_in(INT64_MAX, at, entries * ENTRY) || at % ENTRY)
        return -EINVAL;
    int64_t taken = 0;
    pthread_mutex_lock(&map->lock);
    space *sp = atomic_load(&map->space);
    int64_t end = offset + (entries << form->shift);
    int64_t region = offset <= 0 ? 0 : ((offset - 1) >> sp->shift) + 1; /* the first that begins within */
    for (; region < sp->regions && region << sp->shift < sp->size && region_end(sp, region) <= end; region++) {
        int64_t from = (region << sp->shift) - offset;
        if (words_of(sp, region, (unsigned)form->shift) > MOST_WORDS || from & (((int64_t)1 << form->shift) - 1) ||
            !has_sources(map, sp, form))
            break;
        from >>= form->shift;
        map->sources[region].at = (at + from * ENTRY) | form->flags >> FLAG_SHIFT;
        note_region(map, sp, region, generation, places + from, &taken);
    }
    map->inserts += taken;
    map_finish(map);
    pthread_mutex_unlock(&map->lock);
    return taken;
}

uint64_t map_sum(const bg_map *map, const space *sp, int64_t region)
{
    uint32_t words[MOST_WORDS];
    leaf_ref ref = atomic_load(&sp->leaf[region]);
    if (!map->sources || !map->sources[region].at ||
        ref_form(ref) != short_form((unsigned)map->form.shift, (unsigned)map->form.slot))
        return 0;
    uint64_t count = words_of(sp, region, ref_shift(ref));
    for (uint64_t i = 0; i < count; i++)
        words[i] = atomic_load_explicit(&ref_short_words(ref)[i], memory_order_relaxed);
    return sum_of(words, count);
}

/* What the entries at `at` of the form's slot say now. */
static bool read_words(bg_map *map, const bg_map_form *form, int64_t at, uint64_t count, uint32_t *words)
{
    uint64_t entries[MOST_WORDS];
    reader *r = map_enter(map);
    if (!r)
        return false;
    const storage *slot = &map->slots[form->slot];
    int fd = atomic_load(&slot->fd);
    enum bg_haste haste = (enum bg_haste)atomic_load(&slot->haste);
    map_looked(r);
    /* What would wait for a device is left to Python, with all else that it does meanwhile. */
    int64_t bytes = (int64_t)count * ENTRY;
    bool done = fd >= 0 && bg_pread_in(haste, fd, entries, bytes, at) == bytes;
    map_leave(map, r);
    if (!done)
        return false;
    form->decode(form, entries, (int64_t)count);
    return to_words(form, entries, count, words);
}

/* Under the lock: what is needed to recall the region around `offset`. */
static bool is_dropped(const bg_map *map, const space *sp, int64_t offset, source *out)
{
    int64_t region = offset >> sp->shift;
    if (!map->sources || region >= sp->regions || !map->sources[region].sum)
        return false;
    *out = map->sources[region];
    return true;
}

bool map_recall(bg_map *map, int64_t offset)
{
    uint32_t words[MOST_WORDS];
    source before, now;
    if (!atomic_load(&map->recalls_some))
        return false;
    pthread_mutex_lock(&map->lock);
    space *sp = atomic_load(&map->space);
    bool going = offset < sp->size && is_dropped(map, sp, offset, &before);
    bg_map_form form = map->form;
    int64_t at = 0;
    if (going) {
        form.flags = (before.at & (ENTRY - 1)) << FLAG_SHIFT;
        at = before.at & ~(int64_t)(ENTRY - 1);
    }
    uint64_t count = going ? words_of(sp, offset >> sp->shift, (unsigned)form.shift) : 0;
    pthread_mutex_unlock(&map->lock);
    if (!going || !read_words(map, &form, at, count, words) || sum_of(words, count) != before.sum)
        return false;
    pthread_mutex_lock(&map->lock);
    sp = atomic_load(&map->space);
    /* What it was dropped with by now is what these words are, whatever has happened in between. */
    going = is_dropped(map, sp, offset, &now) && now.sum == before.sum &&
            words_of(sp, offset >> sp->shift, (unsigned)map->form.shift) == count &&
            map_publish_words(map, sp, offset >> sp->shift, words, count);
    map_finish(map);
    map->recalls += going;
    pthread_mutex_unlock(&map->lock);
    return going;
}

void map_recall_around(bg_map *map, const bg_map_extent *extents, int64_t count)
{
    int64_t before = -1;
    for (int64_t i = 0; i < count && count <= FEW_EXTENTS; i++) {
        int64_t region = extents[i].offset >> REGION_SHIFT_MIN;
        if (extents[i].offset >= 0 && region != before)
            map_recall(map, extents[i].offset);
        before = region;
    }
}
