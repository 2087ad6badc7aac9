/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * The extent map of one root: guest range -> where its bytes live, and I/O through it. It is to a backend what page tables
 * and the TLB are to a process: Python fills it, a hit is served here without the GIL, anything else is a miss, and Python
 * serves the whole request.
 *
 *     region table    | wide | leaf | wide | wide | wide | none | ...     one pointer for 16 to 64 MiB
 *     leaf                    its extents, sorted, replaced as a whole; or a table of its clusters, each a word
 *     wide array      [0, 4M)........[8M ............... 20M)             sorted extents that cover whole regions
 *
 * A region with a leaf is described by the leaf alone; one without, by the wide array. So a raw file of any size is one
 * extent, and a cluster whose write protection is lifted costs one small leaf, which goes away when the whole region is
 * alike again. Regions are larger where the table would take more than an eighth of the memory bound.
 *
 * What does not fit is dropped, least recently used regions first. Where it is known which table of the image a region came from, the
 * next request finds it there again (bg_map_note_table), in about 5 us.
 *
 * Who takes a mapping away does it in two steps: bg_map_invalidate (or protect, or removing a storage slot) removes it
 * at once, so that later requests miss, and returns a ticket; the ticket settles when every request that began before has
 * ended. Only then may the bytes be moved or the descriptor be closed.
 *
 * Who resolves a miss reads bg_map_generation first, asks the drivers, then inserts with that generation: what was invalidated
 * in between is refused, 16 MiB by 16 MiB (1024 classes of them), as is what an allocator has placed in between; what was only
 * protected goes in without `writable`. That does not help one who asks the drivers after the invalidation but before the change it announces:
 * the insert must happen while the resolver still holds the requests (or the gate) that the change has to wait for.
 *
 * Units:     bytes; offsets from the disk's start, storage offsets from the storage's.
 * Ownership: bg_map_new hands out a map that bg_map_free ends. Descriptors and bitmaps are borrowed until the ticket of their
 *            removal has settled, buffers and pieces for the request.
 * Errno:     0, a count or a ticket; BG_MAP_MISS; else -EINVAL, -ENOMEM, -EBUSY, -ENOSPC, or -errno of a system call.
 *            Invalidating and protecting never fail for want of memory: they drop more instead.
 * Threads:   all functions but bg_map_free from any thread. Look-ups take no lock and write to no cache line that
 *            another thread uses; changes take a mutex for microseconds (milliseconds where the system makes a huge page, and
 *            whole-map ones for as long as it takes to free the extents) and never wait for requests. bg_map_wait waits.
 */
#ifndef BG_EXTENT_MAP_H
#define BG_EXTENT_MAP_H

#include "bitmap.h"
#include "pipe.h"
#include "windows.h"

#include <stddef.h>
#include <stdint.h>

/* cffi:begin */
#define BG_MAP_MISS 1
#define BG_MAP_SLOTS 1024
#define BG_MAP_MIN_MEMORY 262144
#define BG_MAP_MAX_PIECES 65536
#define BG_MAP_MAX_ALIGNMENT 65536

#define BG_MAP_ZERO 1     /* reads as zeroes; storage_offset, slot and WRITABLE are ignored */
#define BG_MAP_WRITABLE 2 /* may be overwritten in place */
#define BG_MAP_COPY 4     /* before that the map's copier has to be asked */
#define BG_MAP_ALLOCATE 8 /* the map's allocator finds room for what is written; until then reads go where the extent says */

typedef struct bg_map bg_map;

typedef struct {
    int64_t offset;
    int64_t length; /* > 0 */
    int64_t storage_offset;
    int32_t slot;
    int32_t flags;
} bg_map_extent;

typedef struct {
    int64_t hits; /* requests done */
    int64_t misses;
    int64_t bytes_read; /* of hits */
    int64_t bytes_written;
    int64_t inserts; /* extents taken */
    int64_t stale;   /* extents refused */
    int64_t invalidations;
    int64_t protections;
    int64_t evictions; /* regions */
    int64_t extents;   /* held now, those hidden under a leaf included */
    int64_t regions;   /* with a leaf */
    int64_t bytes;     /* memory in use, everything included */
    int64_t limit;
    int64_t first_writes; /* done with the help of copier or allocator; not among the hits */
    int64_t recalls; /* regions that were evicted and found again, without Python */
} bg_map_stats;

/* An empty map of a disk of `size` bytes that uses at most `memory` (>= BG_MAP_MIN_MEMORY) bytes. */
int bg_map_new(int64_t size, int64_t memory, bg_map **out);

/* -EBUSY while a request is under way. No other call may be, either. */
int bg_map_free(bg_map *map);

int64_t bg_map_size(bg_map *map);

/* The disk has a new size: drops everything. Returns a ticket. -EINVAL when a bitmap of the map is too small. */
int64_t bg_map_resize(bg_map *map, int64_t size);

/*
 * A place where bytes live: returns its slot, 0 to BG_MAP_SLOTS - 1. Requests that are not aligned for it are misses; memory that
 * is not is replaced by other memory on the way (powers of two up to BG_MAP_MAX_ALIGNMENT; 1: no matter). The flags of `fd` must
 * not change from now on. -ENOSPC: no slot is free.
 */
int bg_map_add_slot(bg_map *map, int fd, int alignment, int memory_alignment);

/* It asks for another alignment of requests. Returns a ticket; until then some may have the one before. */
int64_t bg_map_align_slot(bg_map *map, int slot, int alignment);

/*
 * Keep [start, end) of the slot's storage from native requests: they miss from now on. Returns a number (> 0) for bg_map_release,
 * and in *ticket when those that began before have ended. For who has to do several things there that nobody may come between, where
 * it is not known which ranges of the disk lead there.
 */
int64_t bg_map_hold(bg_map *map, int slot, int64_t start, int64_t end, int64_t *ticket);

/* -ENOENT: there is no such hold. */
int bg_map_release(bg_map *map, int64_t number);

/* 1 when some slot has a descriptor with O_DIRECT, or O_DSYNC, else 0. */
int bg_map_is_direct(bg_map *map);

/* Within a request: the slot's descriptor turned out to be none for aio.h. */
void bg_map_no_aio(bg_map *map, int slot);

/* Within a request: 1 when [offset, offset + length) of the slot's storage is as aligned as it asks, and not held, else 0. */
int bg_map_slot_open(bg_map *map, int slot, int64_t offset, int64_t length);

/*
 * Everything in the slot is a miss from now on. Returns a ticket; then `fd` may be closed. The number is not given out again
 * before all extents have been dropped, which bg_map_add_slot does itself when numbers run out.
 */
int64_t bg_map_remove_slot(bg_map *map, int slot);

/*
 * 1 when native writes to the slot were completed since the last call, which has to make them durable then (bg_map_dirty), are
 * being made durable right now, or could not be and nobody has taken the error; else 0.
 */
int bg_map_take_written(bg_map *map, int slot);

/* 1 when an allocator has noted something (bg_map_placed, bg_map_zeroed) since the last call; no native flush takes that away. */
int bg_map_take_noted(bg_map *map);

/*
 * How the bytes of a slot may be made zero; at first not at all. `unit`, a power of two, is for BG_MAP_WRITE_ZEROES, which needs one,
 * and goes with no more memory alignment than a page (-EINVAL).
 */
#define BG_MAP_PUNCH 1        /* make holes: for what is discarded, and for zeroes */
#define BG_MAP_ZERO_RANGE 2   /* make zero what stays allocated */
#define BG_MAP_WRITE_ZEROES 4 /* write them, for requests that cover no whole unit of the disk, whose last one may be short */
int bg_map_set_zeroing(bg_map *map, int slot, int how, int64_t unit);

/* Where the slot's bytes are in memory. They are borrowed like its descriptor. */
int bg_map_set_windows(bg_map *map, int slot, bg_windows *windows);

/*
 * Replace the dirty bitmaps whose bits a native write sets when it is over, also when it failed. Returns a ticket; until it has
 * settled, writes may set bits in either list: before a bitmap is taken away, what leads to it is invalidated and has settled. A
 * bitmap must be at least as large as the disk (-EINVAL), and is neither freed nor resized while the map has it.
 */
int64_t bg_map_set_bitmaps(bg_map *map, bg_bitmap **bitmaps, int64_t count);

/* To be read before the drivers are asked what to insert. */
int64_t bg_map_generation(bg_map *map);

/*
 * Insert extents, in any order, each over what it overlaps. Neighbours that continue each other become one. Returns how
 * many were not stale; one whose slot has been removed is. Nothing promises that an extent stays: the bound on memory holds.
 */
int64_t bg_map_insert(bg_map *map, int64_t generation, const bg_map_extent *extents, int64_t count);

/* 1 and the extent around `offset` in *out (it may be cut at the ends of a region or a cluster), or 0. As a request, it looks for what was
 * dropped. */
int bg_map_find(bg_map *map, int64_t offset, bg_map_extent *out);

/* Remove, or only take WRITABLE, COPY and ALLOCATE away. Return a ticket (> 0). */
int64_t bg_map_invalidate(bg_map *map, int64_t offset, int64_t length);
int64_t bg_map_protect(bg_map *map, int64_t offset, int64_t length);

/* cffi:end */
/*
 * How the tables of an image say where clusters of the disk live, in 8 bytes for each. `decode` is given `count` entries as they are in
 * the storage, in whatever state, and puts in their place where the cluster is in the slot and its flags, which leave each other's
 * bits alone, or BG_MAP_NO_PLACE. It need not check anything: what it says counts where that is what the map had before.
 */
#define BG_MAP_NO_PLACE UINT64_MAX
typedef struct bg_map_form bg_map_form;
struct bg_map_form {
    void (*decode)(const bg_map_form *self, uint64_t *entries, int64_t count);
    int64_t storage; /* the rest is decode's, but for slot and shift: log2 of a cluster */
    int32_t slot, shift, flags, version;
};

/*
 * A table of `entries` for the disk from `offset` on, which may be negative, is at `at` in the form's slot, or was, and says `places`.
 * Regions that it has all of are looked for there when they are needed, and are not held. So regions that nothing is known of
 * are taken over at once while there is room, and else need not be; their places become BG_MAP_NO_PLACE, for who inserts the
 * others. Returns how many extents were taken over. A map has one form, but for the flags; another one takes the place of all tables
 * noted before.
 */
int64_t bg_map_note_table(bg_map *map, int64_t generation, const bg_map_form *form, int64_t offset, uint64_t *places, int64_t entries,
                      int64_t at);
/* cffi:begin */

/*
 * What makes first writes possible without Python. All are called by bg_map_pwrite, on the thread of the request, within
 * it: a ticket given meanwhile settles afterwards. They may call bg_map_pread, find, generation, insert and copied of
 * the map, and wait for I/O, not for Python.
 *
 * copy:  once it has returned 0, [offset, offset + length) may be overwritten; it calls bg_map_copied for that, which takes
 *        COPY away wherever it still is. -EAGAIN: it was to be done `now`, and would have to wait.
 *
 * prepare: finds room for the first bytes of a write from `offset` on, and keeps others from placing them, until finish. Returns
 *          how many (> 0), or -EAGAIN: the extents have changed, look again; or, when it is to be done `now`, it would have to
 *          wait. Of one request it is called from the front to the back.
 * write:   that many bytes, where nobody sees them yet: 0, -errno, or -EAGAIN, when it would have to wait. `pipe`: as in
 *          bg_map_first_write_now.
 * finish:  `enter`: what was written is seen from now on; else nothing has happened. What was prepared is no more.
 *
 * zero:    makes zeroes, within a request of BG_MAP_ERASE, of a range that all may be overwritten in place, and keeps its place,
 *          without waiting; it calls bg_map_zeroed for that. NULL: it can not.
 *
 * Anything else that copy and zero return is a miss, and of prepare what is not a count.
 */
typedef struct bg_map_copier bg_map_copier;
struct bg_map_copier {
    int (*copy)(bg_map_copier *self, bg_map *map, int64_t offset, int64_t length, int now);
    _Atomic int64_t lately; /* bytes that the last write had copied without waiting; 0: it would have had to wait */
};

typedef struct bg_map_placing bg_map_placing; /* the allocator's */

typedef struct bg_map_allocator bg_map_allocator;
struct bg_map_allocator {
    int64_t (*prepare)(bg_map_allocator *self, bg_map *map, int64_t offset, int64_t length, int now, bg_map_placing **out);
    int (*write)(bg_map_allocator *self, bg_map_placing *placing, const void *buf, bg_pipe *pipe, int now);
    void (*finish)(bg_map_allocator *self, bg_map *map, bg_map_placing *placing, int enter);
    int (*zero)(bg_map_allocator *self, bg_map *map, int64_t offset, int64_t length);
    _Atomic int64_t lately; /* likewise: old bytes around what was written */
};

/* Borrowed until the ticket of their replacement has settled; NULL: none. Return a ticket. */
int64_t bg_map_set_copier(bg_map *map, bg_map_copier *copier);
int64_t bg_map_set_allocator(bg_map *map, bg_map_allocator *allocator);
int bg_map_copied(bg_map *map, int64_t offset, int64_t length);

/*
 * For allocators, when the data is there: wherever ALLOCATE still is, the bytes now live at `storage_offset` on, and may be
 * overwritten there once what has COPY was copied. When something else is in the range, all of it is removed. Fills that
 * began before are refused.
 */
int bg_map_placed(bg_map *map, int64_t offset, int64_t length, int slot, int64_t storage_offset);

/* For allocators: what could all be overwritten in place reads as zeroes now, and is not written to; else all of it is removed. */
int bg_map_zeroed(bg_map *map, int64_t offset, int64_t length);

/* A native write to the slot was completed. */
void bg_map_wrote(bg_map *map, int slot);

/* Not 0 when a write to the range, which misses, might be done by bg_map_pwrite all the same: which of COPY and ALLOCATE it meets. */
int bg_map_has_first_write(bg_map *map, int64_t offset, int64_t length);

/*
 * Such a write to one extent at once, if copier and allocator can do all of it without waiting: 0, or -errno; else call
 * bg_map_pwrite where it may wait. `pipe`: NULL, or where the bytes are, to be written in files in memory; what
 * of it has been written when it fails is in `buf` again (bg_pipe_empty). -E2BIG: the last one had more than `most` bytes copied,
 * so this one was not begun.
 */
int bg_map_first_write_now(bg_map *map, int64_t offset, void *buf, bg_pipe *pipe, int64_t length, int64_t most);

/* 1 when every request that began before the ticket was given has ended, else 0. */
int bg_map_settled(bg_map *map, int64_t ticket);

/* Wait until the ticket settles. Never from a thread that holds a request itself. */
void bg_map_wait(bg_map *map, int64_t ticket);

/*
 * For event loops: as bg_map_settled; after a 0 the eventfd becomes readable, once or more often, until the ticket has
 * settled. bg_map_acknowledge makes it unreadable: call it before asking again.
 */
int bg_map_notify(bg_map *map, int64_t ticket);
int bg_map_eventfd(const bg_map *map);
void bg_map_acknowledge(bg_map *map);

/*
 * A whole request: 0 when it was done, BG_MAP_MISS when nothing was touched, or -errno (then any part of it may have been
 * done). Past the storage's end zeroes are read. -EINVAL when it is not inside the disk. A write that does not fail is done between
 * two tickets: whoever makes a point in time finds all of it or nothing.
 */
int bg_map_pread(bg_map *map, int64_t offset, void *buf, int64_t length);
int bg_map_pwrite(bg_map *map, int64_t offset, const void *buf, int64_t length);

/* The same when it can be done without waiting, also by first_write_now; else -EAGAIN, or a miss. */
int bg_map_pread_now(bg_map *map, int64_t offset, void *buf, int64_t length);
int bg_map_pwrite_now(bg_map *map, int64_t offset, const void *buf, int64_t length);

/*
 * Make zero, or give up, what pwrite might overwrite in place, after asking the copier or not: by the first of BG_MAP_PUNCH,
 * BG_MAP_ZERO_RANGE and BG_MAP_WRITE_ZEROES that `how` has, all slots concerned allow, and the file system can; else, without
 * PUNCH, by the allocator; else it is a miss. With PUNCH alone it is a discard.
 */
int bg_map_zero(bg_map *map, int64_t offset, int64_t length, int how);
/* The same for files in memory and no more than `longest` bytes; -EAGAIN: where it may wait bg_map_zero would try. */
int bg_map_zero_now(bg_map *map, int64_t offset, int64_t length, int how, int64_t longest);
/* From now on nothing is done for discards that have no whole `unit` (a power of two) of the disk; 0: they are not special. */
int bg_map_ignore_discards(bg_map *map, int64_t unit);

/*
 * Make durable all writes that were completed: 0, or a miss. It is a hit only while native writes in place are all there is to be
 * made durable: Python says so (flushed, with what bg_map_dirt was when that flush began) and revokes it (dirty) whenever
 * it changes something itself, in the same step; bg_map_placed revokes it, too. When the system fails, that is a miss,
 * and the slot has the error for Python: asked again, the kernel might report success (fsync(2)). `counts`: it is a request of
 * its own, for the statistics.
 */
int bg_map_flush(bg_map *map, int counts);
int64_t bg_map_dirt(bg_map *map);
void bg_map_dirty(bg_map *map);
void bg_map_flushed(bg_map *map, int64_t dirt);
/* 1: flush would do it. 2: there was nothing to do, that was it. */
int bg_map_try_flush(bg_map *map, int counts);
/* The errno of a flush of the slot that failed since the last call, or 0. */
int bg_map_take_flush_error(bg_map *map, int slot);

void bg_map_get_stats(bg_map *map, bg_map_stats *out);

/*
 * A request in two steps, for who does its I/O otherwise. Between begin and end the pieces stay valid: no ticket given
 * after begin settles before end.
 */
typedef struct {
    int64_t length;
    int64_t storage_offset;
    int32_t slot;
    int32_t fd; /* -1: zeroes */
    int32_t haste;  /* of fd: see io.h */
    int32_t memory; /* the alignment that fd asks of it */
} bg_map_piece;

typedef struct {
    void *reader;
    const bg_map_piece *pieces;
    int64_t offset;
    int64_t length;
    int32_t count;
    int32_t write; /* BG_MAP_ERASE: a write without data */
} bg_map_request;

#define BG_MAP_ERASE 2

/*
 * Look up all of [offset, offset + length) and write its pieces, in order, to pieces[0..max). A write hits only what is DATA
 * and writable. 0: end it with bg_map_end; pieces must stay until then. Else nothing is held: BG_MAP_MISS, -EINVAL as above,
 * or -E2BIG when there are more than `max` pieces.
 */
int bg_map_begin(bg_map *map, int64_t offset, int64_t length, int write, bg_map_piece *pieces, int max, bg_map_request *request);

/*
 * `touched`: 0, nothing was done; 1, all or, when it failed, some of it, which counts. After such a write the bitmaps and the
 * slots' written marks are set.
 */
/* All pieces between `buf` and their places: 0 or -errno. */
int bg_map_move(bg_map *map, const bg_map_request *request, void *buf);
/*
 * Bytes [start, end) of the request and of the buffer, if nothing has to be waited for, else -EAGAIN. A write that has begun waits;
 * what is before `start` was moved already. `pipe`: NULL, or where the bytes of a write are instead, all of which has to be in
 * files in memory (-EAGAIN).
 */
int bg_map_move_part_now(bg_map *map, const bg_map_request *request, void *buf, bg_pipe *pipe, int64_t start, int64_t end);
/* Whether all pieces are in files in memory, or zeroes. */
int bg_map_in_memory(const bg_map_request *request);
/*
 * Whether a write of all of [offset, offset + length) from a buffer would be stored into mapped files (windows.h), which takes less
 * than any other way. Not a request, and counted as none.
 */
int bg_map_can_store(bg_map *map, int64_t offset, int64_t length);
/*
 * What a request reads, as memory that system calls may be given and nobody else (windows.h): one address for each piece, or
 * -EAGAIN.
 */
int bg_map_show(bg_map *map, const bg_map_request *request, const void **addresses);
void bg_map_end(bg_map *map, bg_map_request *request, int touched);
/* cffi:end */

#endif
