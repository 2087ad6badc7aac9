/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * What the extent_map*.c files share.
 *
 * Every request owns a reader record from begin to end. Its state is epoch << 1 | looking: the epoch read just before, and
 * whether pointers into the map are still in use. A change unpublishes, then looks at the records; both sides
 * use sequentially consistent operations on the pointers and on the states, so either the change sees the
 * record, or the request sees the change. An epoch read too early only makes a change wait for longer.
 *
 * Two things wait for that: tickets, for records of an older epoch to be given back; memory, for them to have stopped looking,
 * which takes nanoseconds, so that a slow disk does not keep dead leaves in memory.
 */
#ifndef BG_EXTENT_MAP_INTERNAL_H
#define BG_EXTENT_MAP_INTERNAL_H

#include "extent_map.h"
#include "wait.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

#define LINE 64
#define READERS 64
#define STAMPS 1024
#define STAMP_SHIFT 24
#define REGION_SHIFT_MIN 24
#define REGION_SHIFT_LARGE 26 /* of disks with more than so many smaller regions: their table would not stay in the cache */
#define REGIONS_CACHED 16384
#define REGION_SHIFT_MAX 32 /* offsets in a leaf are 32 bits */
#define MALLOC_HEAD 16
#define MALLOC_ALIGN 16

typedef struct garbage {
    struct garbage *next;
    uint64_t epoch; /* in use by records of this epoch or older */
    size_t bytes;
    size_t lead; /* of the allocation before this */
} garbage;

/* It is in a slab, which counts its bytes. */
#define LEAD_SLAB SIZE_MAX

/* extent_map_slabs.c. A table there is retired, or free. */
void slab_leaves(garbage *g);
void slab_free(garbage *g);

static inline void garbage_free(garbage *g)
{
    if (g->lead == LEAD_SLAB)
        slab_free(g);
    else
        free((char *)g - g->lead);
}

typedef struct {
    uint64_t storage_offset;
    uint32_t length;
    uint16_t slot;
    uint16_t flags;
} place;

/*
 * The extents of a region, in the form that takes less memory.
 * List: start[i] is relative to the region and belongs to at[i].
 * Table: for every cluster of the region a word, which says where it lives. Where one storage has all of them, as most images have,
 * words are short: so the map of a fragmented image takes half as much memory as the image's own tables. A table whose words
 * have become long stays one until its region is made anew.
 */
typedef struct {
    garbage garbage; /* first in all that is retired */
    uint32_t count;   /* places, or words of the table */
    uint32_t extents; /* as statistics have it */
    int64_t region;   /* that has it; -1: it was retired */
    place at[];       /* list: count, then uint32_t start[count] */
} leaf;

/*
 * What the region table has: a leaf's address, and in the bits that an aligned address leaves free, below and above, all that a
 * look-up in a table needs to know before the word. So the leaf's head stays out of the cache, and a map much larger than that
 * costs one miss.
 *
 *     63 short | 57-48 slot of short words | 47-5 address | 4-1 log2 of the clusters | 0 used
 *
 * Linux hands out addresses past 47 bits only to who asks for them.
 */
typedef uint64_t leaf_ref;
#define LEAF_ALIGN 32
#define ADDRESS_BITS 48
#define REF_USED ((leaf_ref)1) /* since the clock's hand came by */
#define REF_SHIFT 1            /* log2 of a table's clusters, less CLUSTER_SHIFT_BASE; 0: a list */
#define REF_SHORT ((leaf_ref)1 << 63)
#define CLUSTER_SHIFT_BASE 8
#define CLUSTER_SHIFT_MAX 23

/* Words of a table: storage offset / 512 << 14 | slot << 4 | flags, or WORD_NONE. The slot of ZERO is 0. */
#define WORD_SHIFT 9
#define SLOT_BITS 10
#define FLAG_BITS 4
#define WORD_NONE UINT64_MAX
#define WORD_END ((uint64_t)1 << (64 - SLOT_BITS - FLAG_BITS + WORD_SHIFT)) /* of storage offsets */
/* Short: storage offset in clusters << 4 | flags, or SHORT_NONE. */
#define SHORT_NONE UINT32_MAX
#define SHORT_END ((uint64_t)SHORT_NONE >> FLAG_BITS) /* of storage offsets in clusters */
_Static_assert(BG_MAP_SLOTS == 1 << SLOT_BITS, "a slot fits its bits");
_Static_assert(BG_MAP_ALLOCATE < 1 << FLAG_BITS, "flags fit their bits");
_Static_assert(CLUSTER_SHIFT_MAX - CLUSTER_SHIFT_BASE < LEAF_ALIGN >> REF_SHIFT, "a shift fits its bits");

typedef struct {
    int64_t start, end, storage_offset;
    uint16_t slot, flags;
} span;

typedef struct {
    garbage garbage;
    size_t count;
    span spans[];
} wide;

/* All that depends on the disk's size. */
typedef struct {
    garbage garbage;
    int64_t size;
    unsigned shift;      /* log2 of a region's bytes */
    int64_t regions;     /* in the table; a disk past 4 PiB may have more: those have wide extents only */
    _Atomic(wide *) wide; /* or NULL */
    _Atomic leaf_ref leaf[];
} space;

typedef struct {
    garbage garbage;
    size_t count;
    bg_bitmap *bitmaps[];
} bitmap_list;

/* A range of a slot's storage that native requests are kept from. */
typedef struct {
    int64_t number, start;
    _Atomic int64_t end; /* = start: it is over */
    int slot;
} held_range;

typedef struct {
    garbage garbage;
    size_t count;
    held_range at[];
} hold_list;

/* The counters are written by the record's owner only. */
typedef struct {
    _Alignas(LINE) _Atomic uint64_t state; /* 0: free */
    _Atomic int64_t hits, misses, bytes_read, bytes_written, first_writes;
} reader;

typedef struct readers {
    reader record[READERS];
    _Atomic(struct readers *) next;
} readers;

enum slot_state { SLOT_FREE, SLOT_LIVE, SLOT_REMOVED, SLOT_UNMAPPED };

typedef struct {
    atomic_int fd; /* -1 unless live */
    _Atomic uint32_t alignment; /* of requests */
    uint32_t memory_alignment;
    atomic_int haste; /* of fd: see io.h */
    atomic_bool written;
    atomic_uint flushing;    /* how many flushes are at it, after having taken `written` */
    atomic_int flush_error;  /* errno */
    _Atomic(bg_windows *) windows; /* or NULL */
    atomic_uint zeroing; /* how; from ZEROING_UNIT on, log2 of the unit */
    enum slot_state state; /* UNMAPPED: removed, and no extent names it any more once `ticket` has settled */
    uint64_t ticket;
} storage;

typedef struct {
    span *spans;
    size_t count, room;
} span_list;

typedef struct slab_class slab_class;

/* The head of its memory. */
typedef struct slab {
    struct slab *next, *previous;
    slab_class *class;
    bg_map *map;
    garbage *spare;      /* free places that had a table once, by next */
    uint32_t made, used; /* places, from the first on */
    uint32_t leaving;    /* of those used: their tables were retired */
    size_t counted;      /* in the map's bytes */
    bool given_up;       /* in no list, and ends with its last table */
} slab;

/* Slabs of tables of one size. */
struct slab_class {
    size_t size;
    slab *roomy, *full;
    uint32_t leaving; /* places that will be free in them */
    int slabs; /* 0: it may become one of another size */
};
#define SLAB_CLASSES 4

#define ZEROING_UNIT 8
#define ZEROES_ALIGNMENT 4096 /* of the memory that zeroes are written from */

/* All ways to let a write through. */
#define WRITES (BG_MAP_WRITABLE | BG_MAP_COPY | BG_MAP_ALLOCATE)

typedef struct {
    garbage *first, **last;
} garbage_list;

/* Where the table of a region is, or was, and what it said when the region was dropped. */
typedef struct {
    int64_t at;   /* in the slot of the map's form, with its flags: see extent_map_recall.c; 0: not known */
    uint64_t sum; /* of its words; 0: it was not dropped, or something has happened to it since */
} source;

struct bg_map {
    /* Read by every request, written by changes. */
    _Alignas(LINE) _Atomic(space *) space;
    _Atomic(bitmap_list *) bitmaps;
    _Atomic(hold_list *) holds; /* NULL: none */
    _Atomic(bg_map_copier *) copier;
    _Atomic(bg_map_allocator *) allocator;
    _Atomic uint64_t epoch;   /* of the next ticket */
    _Atomic uint64_t waiting; /* the latest ticket that somebody waits for, 0: nobody */
    atomic_int_fast64_t dirt;     /* how often something was changed that only Python can make durable */
    atomic_int_fast64_t clean_at; /* the dirt that was made durable */
    atomic_bool noted;            /* by an allocator, and Python does not know yet */
    atomic_int slots_used;        /* no slot from here on was ever live */
    atomic_uint ignored;          /* discards: log2 of their unit and 1, or 0 */
    atomic_bool recalls_some;     /* a region may have a sum */
    storage slots[BG_MAP_SLOTS];
    readers readers;

    /* Changes. */
    _Alignas(LINE) pthread_mutex_t lock;
    uint64_t removed[STAMPS], protected[STAMPS], placed[STAMPS]; /* the latest ticket for a class of 1 << STAMP_SHIFT bytes */
    garbage_list looked;     /* until nobody looks */
    garbage_list held;       /* until no request holds it */
    uint64_t retired_at;     /* epoch of the latest garbage */
    size_t limit, bytes, retired; /* bytes includes retired */
    int64_t hand;            /* of the clock: a region */
    int64_t pointers;        /* in the region table, not NULL */
    int64_t leaves, extents, inserts, stale, invalidations, protections, evictions, recalls;
    bg_map_form form;        /* of all sources */
    source *sources;         /* of the regions in the region table, or NULL */
    size_t sources_bytes;
    slab_class classes[SLAB_CLASSES];
    span_list work, wide_work; /* scratch */
    int64_t region;          /* in `work`, -1: none */
    int64_t last_hold;       /* its number */

    /* Waiting. */
    pthread_mutex_t wait_lock;
    bg_waiters settled; /* something was told */
    uint64_t told; /* tickets up to here were announced */
    int eventfd;
};

/* A region without any extent, whatever the wide array says. */
extern leaf no_extents;

static inline leaf *ref_leaf(leaf_ref ref)
{
    return (leaf *)(uintptr_t)(ref & (((leaf_ref)1 << ADDRESS_BITS) - LEAF_ALIGN));
}

static inline bool has_ref(const void *end)
{
    return (uint64_t)(uintptr_t)end >> ADDRESS_BITS == 0;
}

static inline leaf_ref leaf_as_ref(leaf *l)
{
    return (leaf_ref)(uintptr_t)l;
}

/* What a reference to a table of short words says, without the address. */
static inline leaf_ref short_form(unsigned shift, unsigned slot)
{
    return (leaf_ref)(shift - CLUSTER_SHIFT_BASE) << REF_SHIFT | REF_SHORT | (leaf_ref)slot << ADDRESS_BITS;
}

static inline leaf_ref ref_form(leaf_ref ref)
{
    return ref & ~((((leaf_ref)1 << ADDRESS_BITS) - LEAF_ALIGN) | REF_USED);
}

/* log2 of a table's clusters; 0: a list. */
static inline unsigned ref_shift(leaf_ref ref)
{
    unsigned shift = (ref & (LEAF_ALIGN - 1)) >> REF_SHIFT;
    return shift ? shift + CLUSTER_SHIFT_BASE : 0;
}

static inline const uint32_t *leaf_starts(const leaf *l)
{
    return (const uint32_t *)(const void *)(l->at + l->count);
}

static inline unsigned ref_slot(leaf_ref ref)
{
    return (unsigned)(ref >> ADDRESS_BITS) & (BG_MAP_SLOTS - 1);
}

static inline _Atomic uint64_t *ref_words(leaf_ref ref)
{
    return (_Atomic uint64_t *)(void *)ref_leaf(ref)->at;
}

static inline _Atomic uint32_t *ref_short_words(leaf_ref ref)
{
    return (_Atomic uint32_t *)(void *)ref_leaf(ref)->at;
}

/* Word i of a table, in its long form. */
static inline uint64_t ref_word(leaf_ref ref, uint64_t i)
{
    if (!(ref & REF_SHORT))
        return atomic_load(&ref_words(ref)[i]);
    uint32_t word = atomic_load(&ref_short_words(ref)[i]);
    uint32_t flags = word & ((1 << FLAG_BITS) - 1);
    uint64_t place = (uint64_t)(word >> FLAG_BITS) << (ref_shift(ref) - WORD_SHIFT + SLOT_BITS + FLAG_BITS);
    uint64_t slot = flags & BG_MAP_ZERO ? 0 : ref_slot(ref);
    return word == SHORT_NONE ? WORD_NONE : place | slot << FLAG_BITS | flags;
}

/* The cluster of word i of a table whose region begins at `region_start`, of a disk of `size` bytes; false: a hole. */
static inline bool ref_cluster(leaf_ref ref, uint32_t i, int64_t region_start, int64_t size, span *out)
{
    uint64_t word = ref_word(ref, i);
    unsigned shift = ref_shift(ref);
    int64_t start = region_start + ((int64_t)i << shift), length = (int64_t)1 << shift;
    *out = (span){start, length < size - start ? start + length : size,
                  (int64_t)(word >> (SLOT_BITS + FLAG_BITS) << WORD_SHIFT), word >> FLAG_BITS & (BG_MAP_SLOTS - 1),
                  word & ((1 << FLAG_BITS) - 1)};
    return word != WORD_NONE;
}

static inline int64_t region_end(const space *sp, int64_t region)
{
    int64_t start = region << sp->shift;
    return sp->size - start > (int64_t)1 << sp->shift ? start + ((int64_t)1 << sp->shift) : sp->size;
}

static inline bool range_in(int64_t size, int64_t offset, int64_t length)
{
    return offset >= 0 && length >= 0 && offset <= size && length <= size - offset;
}

/* extent_map_epoch.c. `enter` returns NULL for want of memory. */
reader *map_enter(bg_map *map);
static inline void map_looked(reader *r)
{
    uint64_t state = atomic_load_explicit(&r->state, memory_order_relaxed);
    atomic_store_explicit(&r->state, state & ~(uint64_t)1, memory_order_release);
}
void map_leave(bg_map *map, reader *r);
/* The oldest epoch among records in use (that still look, when `looking`), or the present epoch. */
uint64_t map_oldest(bg_map *map, bool looking);

/* extent_map.c. Under the lock: whether something has happened to the range since, of which who asked before does not know. */
bool map_is_stale(const bg_map *map, int64_t generation, int64_t offset, int64_t length);
bool map_is_protected(const bg_map *map, int64_t generation, int64_t offset, int64_t length);

/* extent_map_holds.c. */
bool map_alignments_ok(int alignment, int memory_alignment);

/* The rest runs under the lock. */
void map_retire(bg_map *map, garbage_list *list, garbage *g);
void map_reclaim(bg_map *map);
/* The ticket of what has been unpublished; whoever begins later does not wait for it. */
uint64_t map_advance(bg_map *map);

/* extent_map_io.c: the span around `offset`, cut to its region. */
bool map_find(space *sp, int64_t offset, span *out);
/* A request without copier and allocator. Of `into`, `from` and `how` exactly one is used. */
int map_transfer(bg_map *map, int64_t offset, int64_t length, char *into, const char *from, int write, int how);
void map_mark(bg_map *map, int64_t offset, int64_t length);
/* Into the piece's storage, at its `offset`; `now` and the result: as bg_pwrite_in and bg_pwrite_aligned (io.h). */
int64_t map_put(bg_map *map, const bg_map_piece *piece, const void *buf, int64_t length, int64_t offset, bool now);
/* A counter of one's own reader. */
void map_count(_Atomic int64_t *counter, int64_t more);

/* extent_map_first.c: a write with their help; without `buf` it makes zeroes. */
int map_first_write(bg_map *map, int64_t offset, const char *buf, int64_t length, int how);

/* extent_map_store.c */
enum change { CHANGE_SET, CHANGE_REMOVE, CHANGE_CLEAR };
space *space_new(bg_map *map, int64_t size);
void space_free(space *sp);
/* `what` is for CHANGE_SET, where its start is the range's, and for CHANGE_CLEAR, which takes its flags away. */
void map_change(bg_map *map, int64_t start, int64_t end, enum change change, const span *what);
/* The last of the changes: publish what is still in work, keep to the bound. */
void map_finish(bg_map *map);
/* Memory within the bound, aligned for a leaf_ref, that begins with its garbage; NULL: none. */
void *map_room(bg_map *map, space *sp, size_t bytes);
/* The same for a table. */
leaf *table_room(bg_map *map, space *sp, size_t bytes);

/* Nothing is known of the region, but what map_recall may find by the sum of its words; 0: not even that. */
void map_publish_dropped(bg_map *map, space *sp, int64_t region, uint64_t sum);
/* Whether a table of so many words drives out nothing. */
bool map_has_table_room(bg_map *map, uint64_t count);
/* A table with these words instead of a region's extents. False: there is no memory. */
bool map_publish_words(bg_map *map, space *sp, int64_t region, const uint32_t *words, uint64_t count);

/* extent_map_recall.c. Without the lock: look for the dropped region around `offset`. True: it is there again. */
bool map_recall(bg_map *map, int64_t offset);
/* So that a few extents that are entered in dropped regions do not take the place of all that was there. */
void map_recall_around(bg_map *map, const bg_map_extent *extents, int64_t count);
/* The sum of a region's words; 0: it could not be recalled. */
uint64_t map_sum(const bg_map *map, const space *sp, int64_t region);
void map_forget_sources(bg_map *map);

/* extent_map_slabs.c. Of tables of so many bytes; NULL: those are not for slabs. */
slab_class *slab_class_of(bg_map *map, size_t bytes);
/* Whether a table may be taken when the map has so many bytes already. */
bool slab_has_room(const bg_map *map, const slab_class *class, size_t bytes);
/* Bytes of places that will be free once nobody looks. */
size_t slabs_leaving(const bg_map *map);
/* NULL: no memory. */
leaf *slab_take(bg_map *map, slab_class *class);
/* Drop the tables of a slab, so that its memory is free once nobody looks. False: there is none. */
bool slab_give_up(bg_map *map, void (*drop)(bg_map *map, int64_t region));

/* extent_map_tables.c. The form of a table of a region's spans: what a reference to it says, without the address. 0: they can not be
 * one, or it would take more memory. */
leaf_ref table_form(const span_list *list, int64_t start, int64_t end);
leaf_ref table_leaf(bg_map *map, space *sp, const span_list *list, int64_t start, int64_t end, leaf_ref form);
/* A table of these short words. `form` as from table_form. */
leaf_ref table_of_words(bg_map *map, space *sp, const uint32_t *words, uint64_t count, leaf_ref form);
/* Change the region's table in place. False when there is none, it can not say that, or something else may now be smaller: the change is
 * to be made once more, then, on spans. */
bool table_change(bg_map *map, space *sp, int64_t region, int64_t start, int64_t end, enum change change, const span *what);

/* extent_map_spans.c: a sorted list of spans. What needs memory returns false, and has changed nothing then. */
bool spans_reserve(bg_map *map, span_list *list, size_t room);
bool spans_put(bg_map *map, span_list *list, int64_t start, int64_t end, const span *what);
bool spans_clear(bg_map *map, span_list *list, int64_t start, int64_t end, uint16_t flags);
/* The first span that ends after `offset`. */
size_t spans_from(const span *spans, size_t count, int64_t offset);

#endif
