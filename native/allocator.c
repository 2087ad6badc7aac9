/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "allocator.h"

#include "buffers.h"
#include "io.h"
#include "wait.h"
#include "zero.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define MIN_BITS 9
#define MAX_BITS 21
#define MAX_TABLE_BITS 30
/* Longer writes are done in parts: a part's room is claimed in one piece, and must be found so. */
#define MAX_PART (4 << 20)
/* Old bytes and new ones up to this are brought together, to be written at once. */
#define MAX_ONE (128 << 10)
/* Most that is placed by who must not be kept for long. */
#define MAX_NOW (128 << 10)
/* Clusters that a request makes zero, and links that wait: with the first so many they are to be taken, with more none is made zero. */
#define MAX_ZEROES 4096
#define MANY_LINKS 512
#define MAX_LINKS 65536
#define FEW_RUNS 16

/* Guest clusters that are being placed, or held. */
typedef struct range {
    struct range *next;
    int64_t first, end;
} range;

struct bg_allocator {
    bg_map_allocator hook; /* first */
    int bits, table_bits, fd, memory, slot, eventfd; /* memory: the alignment that fd asks of it */
    enum bg_haste haste; /* of fd */

    pthread_mutex_t lock;
    bg_waiters placed; /* a claim has gone */
    range *claims;         /* of first writes */
    range *holds;
    bg_allocator_room *rooms;
    size_t room_count, room_space;
    int64_t reserve, low;
    bool signalled, told; /* that there is little room, many links */
    bg_allocator_link *links;
    size_t link_count, link_space;
    size_t promised; /* links that claims may add */
    atomic_bool has_links;
    atomic_bool waits; /* a write to fd without waiting was refused */
    bg_buffers *buffers; /* for old bytes */
};

static int64_t prepare(bg_map_allocator *hook, bg_map *map, int64_t offset, int64_t length, int now, bg_map_placing **out);
static int write_placing(bg_map_allocator *hook, bg_map_placing *placing, const void *buf, bg_pipe *pipe, int now);
static void finish(bg_map_allocator *hook, bg_map *map, bg_map_placing *placing, int enter);
static int zero(bg_map_allocator *hook, bg_map *map, int64_t offset, int64_t length);

int bg_allocator_new(int bits, int table_bits, int zeroes, bg_allocator **out)
{
    if (bits < MIN_BITS || bits > MAX_BITS || table_bits < 0 || table_bits > MAX_TABLE_BITS)
        return -EINVAL;
    bg_allocator *a = calloc(1, sizeof(*a));
    if (!a)
        return -ENOMEM;
    a->eventfd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int ret = a->eventfd < 0 ? -errno : 0;
    if (ret == 0 && !(a->buffers = bg_buffers_new())) {
        close(a->eventfd);
        ret = -ENOMEM;
    }
    if (ret < 0) {
        free(a);
        return ret;
    }
    a->hook = (bg_map_allocator){.prepare = prepare, .write = write_placing, .finish = finish, .zero = zeroes ? zero : NULL};
    a->bits = bits;
    a->table_bits = table_bits;
    a->fd = -1;
    pthread_mutex_init(&a->lock, NULL);
    *out = a;
    return 0;
}

void bg_allocator_free(bg_allocator *a)
{
    if (!a)
        return;
    for (range *hold = a->holds, *next; hold; hold = next) {
        next = hold->next;
        free(hold);
    }
    bg_buffers_free(a->buffers);
    free(a->rooms);
    free(a->links);
    close(a->eventfd);
    pthread_mutex_destroy(&a->lock);
    free(a);
}

bg_map_allocator *bg_allocator_hook(bg_allocator *a)
{
    return &a->hook;
}

int bg_allocator_eventfd(const bg_allocator *a)
{
    return a->eventfd;
}

void bg_allocator_bind(bg_allocator *a, int fd, int memory_alignment, int slot)
{
    pthread_mutex_lock(&a->lock);
    a->fd = fd;
    a->memory = memory_alignment;
    a->haste = bg_haste_of(fd);
    a->slot = slot;
    atomic_store(&a->waits, false);
    pthread_mutex_unlock(&a->lock);
}

/* The reserve. All under the lock but what Python calls. */

static bool make_space(void **items, size_t *space, size_t wanted, size_t size)
{
    if (wanted <= *space)
        return true;
    size_t more = *space * 2 > wanted ? *space * 2 : wanted;
    void *made = realloc(*items, more * size);
    if (!made)
        return false;
    *items = made;
    *space = more;
    return true;
}

static bool add_room(bg_allocator *a, const bg_allocator_room *room)
{
    bg_allocator_room *last = a->room_count ? &a->rooms[a->room_count - 1] : NULL;
    if (last && last->host + (last->clusters << a->bits) == room->host && last->fresh == room->fresh) {
        last->clusters += room->clusters;
    } else {
        if (!make_space((void **)&a->rooms, &a->room_space, a->room_count + 1, sizeof(*a->rooms)))
            return false;
        a->rooms[a->room_count++] = *room;
    }
    a->reserve += room->clusters;
    return true;
}

/* Room for up to `want` clusters: the first that is long enough, else the longest. */
static bool take_room(bg_allocator *a, int64_t want, bg_allocator_room *out)
{
    size_t best = 0;
    if (a->room_count == 0)
        return false;
    for (size_t i = 0; i < a->room_count && a->rooms[best].clusters < want; i++)
        if (a->rooms[i].clusters > a->rooms[best].clusters)
            best = i;
    bg_allocator_room *from = &a->rooms[best];
    *out = *from;
    if (out->clusters > want)
        out->clusters = want;
    from->host += out->clusters << a->bits;
    from->clusters -= out->clusters;
    if (from->clusters == 0)
        memmove(from, from + 1, (--a->room_count - best) * sizeof(*from));
    a->reserve -= out->clusters;
    return true;
}

/* That there is something to do. */
static void tell(bg_allocator *a)
{
    bool low = a->reserve < a->low && !a->signalled, many = a->link_count >= MANY_LINKS && !a->told;
    a->signalled |= low;
    a->told |= many;
    if (low || many)
        eventfd_write(a->eventfd, 1);
}

int bg_allocator_give(bg_allocator *a, const bg_allocator_room *rooms, int64_t count, int64_t low)
{
    int ret = 0;
    for (int64_t i = 0; i < count; i++)
        if (rooms[i].clusters <= 0 || rooms[i].host < 0)
            return -EINVAL;
    if (count < 0 || low < 0)
        return -EINVAL;
    pthread_mutex_lock(&a->lock);
    if (!make_space((void **)&a->rooms, &a->room_space, a->room_count + (size_t)count, sizeof(*a->rooms)))
        ret = -ENOMEM;
    for (int64_t i = 0; ret == 0 && i < count; i++)
        add_room(a, &rooms[i]);
    a->low = low;
    if (a->signalled) {
        eventfd_t ignored;
        eventfd_read(a->eventfd, &ignored);
        a->signalled = a->told = false;
    }
    pthread_mutex_unlock(&a->lock);
    return ret;
}

int64_t bg_allocator_take_rooms(bg_allocator *a, bg_allocator_room *out, int64_t max)
{
    int64_t n = 0;
    pthread_mutex_lock(&a->lock);
    while (n < max && a->room_count) {
        out[n] = a->rooms[--a->room_count];
        a->reserve -= out[n++].clusters;
    }
    pthread_mutex_unlock(&a->lock);
    return n;
}

int64_t bg_allocator_reserve(bg_allocator *a)
{
    pthread_mutex_lock(&a->lock);
    int64_t reserve = a->reserve;
    pthread_mutex_unlock(&a->lock);
    return reserve;
}

/* Links. */

static int64_t table_of(const bg_allocator *a, const bg_allocator_link *link)
{
    return link->guest >> a->bits >> a->table_bits;
}

/* The part of the link in its first table. What is left of the link: false, nothing. */
static bool cut_link(const bg_allocator *a, bg_allocator_link *link, bg_allocator_link *part)
{
    int64_t first = link->guest >> a->bits, inside = ((table_of(a, link) + 1) << a->table_bits) - first;
    *part = *link;
    if (link->clusters <= inside)
        return false;
    part->clusters = inside;
    link->clusters -= inside;
    link->guest += inside << a->bits;
    link->host += inside << a->bits;
    return true;
}

/* Put the link behind those of its table, and of tables before it. There is room for it behind the last. */
static void sort_in(const bg_allocator *a, bg_allocator_link *sorted, size_t count, bg_allocator_link link)
{
    size_t low = 0, high = count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (table_of(a, &sorted[middle]) <= table_of(a, &link))
            low = middle + 1;
        else
            high = middle;
    }
    memmove(sorted + low + 1, sorted + low, (count - low) * sizeof(*sorted));
    sorted[low] = link;
}

int64_t bg_allocator_take_links(bg_allocator *a, bg_allocator_link *out, int64_t max, int64_t *end)
{
    int64_t n = 0;
    size_t taken = 0;
    *end = 0;
    pthread_mutex_lock(&a->lock);
    while (taken < a->link_count && n < max) {
        bg_allocator_link part;
        taken += !cut_link(a, &a->links[taken], &part);
        int64_t stop = part.host + (part.clusters << a->bits);
        *end = stop > *end ? stop : *end;
        out[n++] = part;
    }
    a->link_count -= taken;
    memmove(a->links, a->links + taken, a->link_count * sizeof(*a->links));
    a->told &= a->link_count > 0;
    atomic_store(&a->has_links, a->link_count > 0);
    pthread_mutex_unlock(&a->lock);
    for (int64_t i = 1; i < n; i++)
        sort_in(a, out, (size_t)i, out[i]);
    return n;
}

int64_t bg_allocator_same_table(bg_allocator *a, const bg_allocator_link *links, int64_t count)
{
    int64_t n = 0;
    while (n < count && table_of(a, &links[n]) == table_of(a, links))
        n++;
    return n;
}

int bg_allocator_has_links(bg_allocator *a)
{
    return atomic_load(&a->has_links);
}

/* There is space for it. */
static void add_link(bg_allocator *a, const bg_allocator_link *link)
{
    bg_allocator_link *last = a->link_count ? &a->links[a->link_count - 1] : NULL;
    int64_t bytes = last ? last->clusters << a->bits : 0;
    if (last && last->guest + bytes == link->guest && last->host + bytes == link->host && last->zero == link->zero)
        last->clusters += link->clusters;
    else
        a->links[a->link_count++] = *link;
    atomic_store(&a->has_links, true);
}

/* Space for so many links more. */
static bool promise(bg_allocator *a, size_t links)
{
    if (!make_space((void **)&a->links, &a->link_space, a->link_count + a->promised + links, sizeof(*a->links)))
        return false;
    a->promised += links;
    return true;
}

/* Claims and holds. */

static range *overlapping(range *list, int64_t first, int64_t end)
{
    while (list && (list->first >= end || first >= list->end))
        list = list->next;
    return list;
}

int bg_allocator_hold(bg_allocator *a, int64_t first, int64_t end)
{
    if (first < 0 || first >= end)
        return -EINVAL;
    range *hold = malloc(sizeof(*hold));
    if (!hold)
        return -ENOMEM;
    pthread_mutex_lock(&a->lock);
    *hold = (range){a->holds, first, end};
    a->holds = hold;
    bool busy = overlapping(a->claims, first, end) != NULL;
    pthread_mutex_unlock(&a->lock);
    return busy;
}

int bg_allocator_release(bg_allocator *a, int64_t first, int64_t end)
{
    pthread_mutex_lock(&a->lock);
    range **at = &a->holds, *found;
    while ((found = *at) && (found->first != first || found->end != end))
        at = &found->next;
    if (found)
        *at = found->next;
    pthread_mutex_unlock(&a->lock);
    free(found);
    return found ? 0 : -EINVAL;
}

/*
 * Claim the first cluster of `c` and those behind it that nobody has. -EAGAIN: somebody had it, and, unless it is `now`, has
 * been waited for; BG_MAP_MISS: it is held.
 */
static int claim(bg_allocator *a, range *c, bool now)
{
    int ret = 0;
    pthread_mutex_lock(&a->lock);
    if (overlapping(a->holds, c->first, c->first + 1)) {
        ret = BG_MAP_MISS;
    } else if (overlapping(a->claims, c->first, c->first + 1)) {
        while (!now && overlapping(a->claims, c->first, c->first + 1))
            bg_wait(&a->placed, &a->lock);
        ret = -EAGAIN;
    } else if (!promise(a, 1)) {
        ret = BG_MAP_MISS;
    } else {
        for (range *r; (r = overlapping(a->holds, c->first, c->end)) || (r = overlapping(a->claims, c->first, c->end));)
            c->end = r->first;
        c->next = a->claims;
        a->claims = c;
    }
    pthread_mutex_unlock(&a->lock);
    return ret;
}

/* The end of a claim, and of so many promises. What of `unused` there is goes back. */
static void unclaim(bg_allocator *a, range *c, const bg_allocator_room *unused, size_t promised)
{
    pthread_mutex_lock(&a->lock);
    range **at = &a->claims;
    while (*at != c)
        at = &(*at)->next;
    *at = c->next;
    a->promised -= promised;
    /* For want of memory it is lost: counted in the image, and used by nobody. */
    if (unused && unused->clusters)
        add_room(a, unused);
    tell(a);
    bg_wake_all(&a->placed);
    pthread_mutex_unlock(&a->lock);
}

/* First writes. */

/*
 * How far from `start` the map shows clusters without a place of their own, up to `end`: whole clusters, or the disk's end.
 * BG_MAP_MISS or -EAGAIN when the first is not one.
 */
static int64_t unplaced(const bg_allocator *a, bg_map *map, int64_t start, int64_t end)
{
    bg_map_extent e;
    int64_t at = start;
    int why = BG_MAP_MISS;
    while (at < end) {
        if (!bg_map_find(map, at, &e))
            break;
        if (!(e.flags & BG_MAP_ALLOCATE)) {
            why = e.flags & BG_MAP_WRITABLE ? -EAGAIN : BG_MAP_MISS;
            break;
        }
        at = e.offset + e.length;
    }
    if (at >= end)
        return end;
    at = at >> a->bits << a->bits;
    return at > start ? at : why;
}

/* Whether [offset, end) shows zeroes, without reading it. */
static bool shows_zeroes(bg_map *map, int64_t offset, int64_t end)
{
    bg_map_extent e;
    for (; offset < end; offset = e.offset + e.length)
        if (!bg_map_find(map, offset, &e) || !(e.flags & BG_MAP_ZERO))
            return false;
    return true;
}

/* What a first write puts into its room: whole clusters [start, end), of which [offset, stop) is new. */
typedef struct {
    int64_t start, offset, stop, end;
    bool one;           /* `old` has room for all of it, so that it can be written at once; else the old ends in a row */
    bool head, tail;    /* there is something to keep in front, behind */
    char *old;          /* or NULL */
} content;

/* Old bytes, those that need not be written left out. */
static int64_t kept(const content *c)
{
    return (c->head ? c->offset - c->start : 0) + (c->tail ? c->end - c->stop : 0);
}

/* Of the buffer for the old bytes. */
static uint32_t old_room(const content *c)
{
    return bg_buffer_size((uint32_t)(c->one ? c->end - c->start : c->offset - c->start + c->end - c->stop));
}

static char *old_tail(const content *c)
{
    return c->old + (c->one ? c->stop : c->offset) - c->start;
}

/*
 * The old bytes of [start, end); from `size` on they lie past the disk's end. *kept: they have to be written. 0, BG_MAP_MISS or
 * -errno.
 */
static int read_old(bg_map *map, int64_t start, int64_t end, int64_t size, char *buf, bool fresh, bool now, bool *kept)
{
    int64_t limit = size < start ? start : size < end ? size : end;
    bool zeroes = shows_zeroes(map, start, limit);
    *kept = start < end && !(zeroes && fresh);
    if (!*kept)
        return 0;
    memset(buf + limit - start, 0, (size_t)(end - limit));
    int ret = 0;
    if (zeroes)
        memset(buf, 0, (size_t)(limit - start));
    else
        ret = now ? bg_map_pread_now(map, start, buf, limit - start) : bg_map_pread(map, start, buf, limit - start);
    *kept = !(fresh && ret == 0 && bg_is_zero(buf, (size_t)(end - start)));
    return ret;
}

static int put(const bg_allocator *a, const char *buf, int64_t length, int64_t host, bool now)
{
    int64_t n = now ? bg_pwrite_in(a->haste, a->fd, buf, length, host) : bg_pwrite_aligned(a->haste, a->memory, a->fd, buf, length, host);
    return n < 0 ? (int)n : 0;
}

static int put_content(const bg_allocator *a, const content *c, const char *buf, int64_t host, bool now)
{
    if (c->one && (c->head || c->tail)) {
        /* One write: a file's lock is taken once, and so is every page. */
        memcpy(c->old + c->offset - c->start, buf, (size_t)(c->stop - c->offset));
        int64_t from = c->head ? c->start : c->offset, to = c->tail ? c->end : c->stop;
        return put(a, c->old + from - c->start, to - from, host + from - c->start, now);
    }
    int ret = c->head ? put(a, c->old, c->offset - c->start, host, now) : 0;
    if (ret == 0 && c->tail)
        ret = put(a, old_tail(c), c->end - c->stop, host + c->stop - c->start, now);
    return ret == 0 ? put(a, buf, c->stop - c->offset, host + c->offset - c->start, now) : ret;
}

/* Room for the clusters of `claim` that the map shows without a place; the rest of them is claimed no longer. */
static int64_t find_room(bg_allocator *a, range *claim, int64_t seen, bg_allocator_room *room)
{
    int64_t start = claim->first << a->bits;
    if (seen > start && take_room(a, (seen - start + ((int64_t)1 << a->bits) - 1) >> a->bits, room))
        claim->end = claim->first + room->clusters;
    return room->clusters;
}

/* A part of a first write between prepare and finish. */
struct bg_map_placing {
    range claimed; /* first: what the list of claims has */
    content c;
    bg_allocator_room room;
};

/* Room for the clusters of the claim, and the old bytes around what is written: 0, -EAGAIN, or another -errno or a miss. */
static int prepare_claimed(bg_allocator *a, bg_map *map, bg_map_placing *p, int64_t length, int now)
{
    content *c = &p->c;
    /* Claimed: what the map shows from now on stays, unless it is taken away. */
    int64_t size = bg_map_size(map), end = p->claimed.end << a->bits;
    int64_t seen = unplaced(a, map, c->start, end < size ? end : size);
    pthread_mutex_lock(&a->lock);
    if (find_room(a, &p->claimed, seen, &p->room)) {
        c->end = p->claimed.end << a->bits;
        c->stop = c->offset + length < c->end ? c->offset + length : c->end;
        c->one = c->end - c->start <= MAX_ONE;
    }
    pthread_mutex_unlock(&a->lock);
    if (p->room.clusters == 0)
        return seen == -EAGAIN ? -EAGAIN : BG_MAP_MISS;
    /* What is written begins and ends in its cluster where it does on the disk. */
    int64_t host = p->room.host;
    if (!bg_map_slot_open(map, a->slot, host, p->room.clusters << a->bits) ||
        !bg_map_slot_open(map, a->slot, host + c->offset - c->start, c->stop - c->offset))
        return BG_MAP_MISS;
    bool keeps = c->start < c->offset || c->stop < c->end;
    if (keeps && !(c->old = bg_buffers_take(a->buffers, old_room(c))))
        return -ENOMEM;
    int ret = read_old(map, c->start, c->offset, size, c->old, p->room.fresh, now, &c->head);
    if (ret == 0)
        ret = read_old(map, c->stop, c->end, size, c->old ? old_tail(c) : NULL, p->room.fresh, now, &c->tail);
    return ret;
}

/* What of the room is not used goes back. */
static void end_placing(bg_allocator *a, bg_map_placing *p)
{
    if (p->c.old)
        bg_buffers_give(a->buffers, p->c.old, old_room(&p->c));
    unclaim(a, &p->claimed, &p->room, 1);
    free(p);
}

static int64_t prepare(bg_map_allocator *hook, bg_map *map, int64_t offset, int64_t length, int now, bg_map_placing **out)
{
    bg_allocator *a = (bg_allocator *)hook;
    int64_t most = MAX_PART >> a->bits;
    range wanted = {.first = offset >> a->bits, .end = ((offset + length - 1) >> a->bits) + 1};
    if (now && (atomic_load(&a->waits) || (wanted.end - wanted.first) << a->bits > MAX_NOW))
        return -EAGAIN;
    if (wanted.end - wanted.first > most)
        wanted.end = wanted.first + most;
    bg_map_placing *p = malloc(sizeof(*p));
    if (!p)
        return 0;
    *p = (bg_map_placing){.claimed = wanted, .c = {.start = wanted.first << a->bits, .offset = offset}};
    int ret = claim(a, &p->claimed, now);
    if (ret != 0) {
        free(p);
    } else if ((ret = prepare_claimed(a, map, p, length, now)) != 0) {
        if (now)
            atomic_store_explicit(&hook->lately, 0, memory_order_relaxed);
        end_placing(a, p);
    } else {
        *out = p;
        return p->c.stop - offset;
    }
    return ret == -EAGAIN ? ret : 0; /* BG_MAP_MISS would be a count */
}

static int write_placing(bg_map_allocator *hook, bg_map_placing *p, const void *buf, bg_pipe *pipe, int now)
{
    bg_allocator *a = (bg_allocator *)hook;
    if (pipe && (a->haste != BG_HASTE_ALL || p->c.head || p->c.tail))
        return -EAGAIN;
    int ret = pipe ? bg_pipe_pwrite(pipe, a->fd, p->c.stop - p->c.offset, p->room.host + p->c.offset - p->c.start)
                   : put_content(a, &p->c, buf, p->room.host, now);
    if (ret == -EAGAIN && now && !pipe)
        atomic_store(&a->waits, true);
    if (now)
        atomic_store_explicit(&hook->lately, ret == 0 ? kept(&p->c) : 0, memory_order_relaxed);
    p->room.fresh = 0;
    return ret;
}

static void finish(bg_map_allocator *hook, bg_map *map, bg_map_placing *p, int enter)
{
    bg_allocator *a = (bg_allocator *)hook;
    const content *c = &p->c;
    if (enter) {
        int64_t size = bg_map_size(map);
        /* In this order: who sees the link knows that there is something to flush; who fills the map from now on sees the link. */
        bg_map_wrote(map, a->slot);
        pthread_mutex_lock(&a->lock);
        add_link(a, &(bg_allocator_link){c->start, p->room.host, p->room.clusters, 0});
        pthread_mutex_unlock(&a->lock);
        bg_map_placed(map, c->start, (c->end < size ? c->end : size) - c->start, a->slot, p->room.host);
        p->room.clusters = 0;
    }
    end_placing(a, p);
}

/* Zeroes. */

/* All of [at, end) as links; how many, or none when some of it has no place here, or the wrong one. */
static int64_t placed_runs(const bg_allocator *a, bg_map *map, int64_t at, int64_t end, bg_allocator_link *out, int64_t max)
{
    const int64_t inside = ((int64_t)1 << a->bits) - 1;
    int64_t n = 0;
    for (bg_map_extent e; at < end; at = e.offset + e.length) {
        const int wrong = BG_MAP_ZERO | BG_MAP_COPY | BG_MAP_ALLOCATE;
        if (n == max || !bg_map_find(map, at, &e) || (e.flags & wrong) || !(e.flags & BG_MAP_WRITABLE) || e.slot != a->slot)
            return 0;
        int64_t stop = e.offset + e.length < end ? e.offset + e.length : end, host = e.storage_offset + at - e.offset;
        if ((at | host | stop) & inside)
            return 0;
        out[n++] = (bg_allocator_link){at, host, (stop - at) >> a->bits, 1};
    }
    return n;
}

static int zero_claimed(bg_allocator *a, bg_map *map, int64_t offset, int64_t length, size_t *promised)
{
    bg_allocator_link few[FEW_RUNS], *runs = few, *many = NULL;
    int64_t n = placed_runs(a, map, offset, offset + length, few, FEW_RUNS);
    if (n == 0 && (runs = many = malloc(MAX_ZEROES * sizeof(*many))))
        n = placed_runs(a, map, offset, offset + length, many, MAX_ZEROES);
    pthread_mutex_lock(&a->lock);
    bool noted = n > 0 && a->link_count + (size_t)n <= MAX_LINKS && promise(a, (size_t)n);
    if (noted)
        *promised += (size_t)n;
    for (int64_t i = 0; noted && i < n; i++)
        add_link(a, &runs[i]);
    pthread_mutex_unlock(&a->lock);
    free(many);
    if (noted)
        bg_map_zeroed(map, offset, length); /* after the links, as in finish */
    return noted ? 0 : BG_MAP_MISS;
}

static int zero(bg_map_allocator *hook, bg_map *map, int64_t offset, int64_t length)
{
    bg_allocator *a = (bg_allocator *)hook;
    const int64_t inside = ((int64_t)1 << a->bits) - 1, last = (offset + length) >> a->bits;
    range claimed = {.first = offset >> a->bits, .end = last};
    /* Where the disk ends inside a cluster, that may not be all that the image has of it. */
    if ((offset | length) & inside || length <= 0 || last - claimed.first > MAX_ZEROES || claim(a, &claimed, true) != 0)
        return BG_MAP_MISS;
    size_t promised = 1;
    int ret = claimed.end == last ? zero_claimed(a, map, offset, length, &promised) : BG_MAP_MISS;
    unclaim(a, &claimed, NULL, promised);
    return ret;
}
