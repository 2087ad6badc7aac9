/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "copy.h"

#include "io.h"
#include "wait.h"
#include "zero.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/vfs.h>
#include <unistd.h>

#define BUFFER (256 << 10)    /* of a runner: fits a core's own cache, so that what was read is still there when it is written */
#define DIRECT (512 << 10)    /* the same with O_DIRECT, in a huge page: in small ones a copy takes nearly twice as long */
#define CHUNK (1 << 20)       /* bytes a task copies before it looks for waiters and cancellation */
#define ZERO_CHUNK (64 << 20) /* the same for ranges made zero, mostly one system call */
#define WINDOW (8 << 20)      /* bytes after which a device is told to begin writing them */
#define BLOCK 4096 /* unit of zero detection: smaller holes save nothing on common file systems */
#define FLAGS                                                                                                             \
    (BG_COPY_RANGE | BG_COPY_CLONE | BG_COPY_DETECT_ZEROES | BG_COPY_PUNCH_HOLES | BG_COPY_SKIP_ZEROES | BG_COPY_ZERO |   \
     BG_COPY_SUM | BG_COPY_READ_ONLY)

typedef struct {
    bg_task task; /* first: a task of ours is its runner */
    bg_copy *job;
    int place; /* of its buffer, from 1 on; 0: it has read nothing yet */
} runner;

struct bg_copy {
    bg_copy_extent *extents;
    int64_t *completed; /* bytes, per extent */
    int64_t count;
    bg_copy_progress *progress;
    bg_sums *sums;
    bg_pool *pool;
    bg_entry *entry; /* NULL: someone waits in bg_copy_run */
    pthread_mutex_t lock;
    bg_waiters ended;
    /* Under the lock: */
    int64_t at, at_offset; /* the next chunk */
    atomic_bool no_clones; /* the file systems have refused */
    int active;            /* runners that have not ended */
    bg_copy_failure failure;
    char *memory; /* a buffer for each runner that reads, from the first use on */
    int places, placed;
    uint32_t buffer_size;
    enum bg_haste target; /* its files */
    int threads;
    runner runners[];
};

typedef struct {
    bg_copy *job;
    const bg_copy_extent *extent;
    int64_t index, offset, length; /* offset in the extent */
    runner *runner;
} chunk;

int64_t bg_copy_bytes(const bg_copy_progress *progress)
{
    return __atomic_load_n(&progress->bytes, __ATOMIC_RELAXED);
}

int64_t bg_copy_zeroes(const bg_copy_progress *progress)
{
    return __atomic_load_n(&progress->zeroes, __ATOMIC_RELAXED);
}

void bg_copy_cancel(bg_copy_progress *progress)
{
    __atomic_store_n(&progress->cancel, 1, __ATOMIC_RELAXED);
}

static bool range_ok(int32_t fd, int64_t offset, int64_t length)
{
    return fd >= 0 && offset >= 0 && length >= 0 && length <= INT64_MAX - offset;
}

static bool extent_ok(const bg_copy_extent *e)
{
    const uint32_t both = BG_COPY_PUNCH_HOLES | BG_COPY_SKIP_ZEROES, sum = BG_COPY_SUM | BG_COPY_READ_ONLY;
    if ((e->flags & ~(uint32_t)FLAGS) || (e->flags & both) == both || (e->flags & sum) == BG_COPY_READ_ONLY ||
        (e->flags & BG_COPY_SUM && e->flags & (BG_COPY_RANGE | BG_COPY_CLONE | BG_COPY_ZERO)))
        return false;
    return (e->flags & BG_COPY_READ_ONLY || range_ok(e->target_fd, e->target_offset, e->length)) &&
           (e->flags & BG_COPY_ZERO || range_ok(e->source_fd, e->source_offset, e->length));
}

void bg_copy_set_sums(bg_copy *job, bg_sums *sums)
{
    job->sums = sums;
}

int bg_copy_new(const bg_copy_extent *extents, int64_t count, int threads, bg_copy_progress *progress, bg_copy **out)
{
    if (count < 0 || threads < 1 || threads > BG_POOL_MAX_THREADS)
        return -EINVAL;
    for (int64_t i = 0; i < count; i++)
        if (!extent_ok(&extents[i]))
            return -EINVAL;
    bg_copy *job = calloc(1, sizeof(*job) + (size_t)threads * sizeof(runner));
    if (!job)
        return -ENOMEM;
    job->extents = calloc((size_t)count + 1, sizeof(*extents));
    job->completed = calloc((size_t)count + 1, sizeof(*job->completed));
    if (!job->extents || !job->completed) {
        free(job->extents);
        free(job->completed);
        free(job);
        return -ENOMEM;
    }
    if (count)
        memcpy(job->extents, extents, (size_t)count * sizeof(*extents));
    job->count = count;
    job->progress = progress;
    job->threads = threads;
    pthread_mutex_init(&job->lock, NULL);
    *out = job;
    return 0;
}

void bg_copy_free(bg_copy *job)
{
    if (!job)
        return;
    pthread_mutex_destroy(&job->lock);
    free(job->extents);
    free(job->completed);
    free(job);
}

void bg_copy_failed(const bg_copy *job, bg_copy_failure *out)
{
    *out = job->failure;
}

int64_t bg_copy_extent_bytes(const bg_copy *job, int64_t index)
{
    return index >= 0 && index < job->count ? __atomic_load_n(&job->completed[index], __ATOMIC_RELAXED) : -EINVAL;
}

static int fail(const chunk *c, int64_t done, int side, int64_t error)
{
    pthread_mutex_lock(&c->job->lock);
    if (!c->job->failure.error)
        c->job->failure = (bg_copy_failure){(int32_t)-error, side, c->index, c->offset + done};
    pthread_mutex_unlock(&c->job->lock);
    return -1;
}

static void account(const chunk *c, int64_t bytes, bool zero)
{
    __atomic_add_fetch(&c->job->completed[c->index], bytes, __ATOMIC_RELAXED);
    __atomic_add_fetch(&c->job->progress->bytes, bytes, __ATOMIC_RELAXED);
    if (zero)
        __atomic_add_fetch(&c->job->progress->zeroes, bytes, __ATOMIC_RELAXED);
}

/* Bytes [done, done + length) of the chunk become zero in the target. */
static int make_zero(const chunk *c, int64_t done, int64_t length)
{
    const bg_copy_extent *e = c->extent;
    if (!(e->flags & BG_COPY_SKIP_ZEROES)) {
        int flags = e->flags & BG_COPY_PUNCH_HOLES ? BG_ZERO_UNMAP : 0;
        int ret = bg_pwrite_zeroes(e->target_fd, length, e->target_offset + c->offset + done, flags);
        if (ret < 0)
            return fail(c, done, BG_COPY_WRITE, ret);
    }
    account(c, length, true);
    return 0;
}

static int write_part(const chunk *c, const char *data, int64_t done, int64_t length)
{
    const bg_copy_extent *e = c->extent;
    int64_t ret = bg_pwrite_by(c->job->target, e->target_fd, data, length, e->target_offset + c->offset + done);
    if (ret < 0)
        return fail(c, done, BG_COPY_WRITE, ret);
    account(c, length, false);
    return 0;
}

/* Write what is data in the buffer, make zero what is not. */
static int write_detecting(const chunk *c, const char *data, int64_t done, int64_t length)
{
    bg_zero_run runs[16];
    for (int64_t at = 0; at < length;) {
        int64_t n = bg_zero_runs(data, (size_t)length, BLOCK, (size_t)at, runs, 16);
        for (int64_t i = 0; i < n; i++) {
            int64_t offset = (int64_t)runs[i].offset, size = (int64_t)runs[i].length;
            int ret = runs[i].zero ? make_zero(c, done + offset, size) : write_part(c, data + offset, done + offset, size);
            if (ret < 0)
                return ret;
            at = offset + size;
        }
    }
    return 0;
}

/* What was read has been written, or need not be. */
static int add_sum(const chunk *c, const char *data, int64_t done, int64_t length)
{
    if (!c->job->sums)
        return fail(c, done, BG_COPY_READ, -EINVAL);
    int ret = bg_sums_add(c->job->sums, c->extent->sum_offset + c->offset + done, data, length);
    return ret < 0 ? fail(c, done, BG_COPY_READ, ret) : 0;
}

static uint32_t memory_size(const bg_copy *job)
{
    uint32_t size = bg_buffer_size((uint32_t)job->places * job->buffer_size);
    return job->buffer_size == DIRECT && size < BG_HUGE_PAGE ? BG_HUGE_PAGE : size;
}

/* The runner's; NULL: there is no memory. */
static char *take_buffer(const chunk *c)
{
    bg_copy *job = c->job;
    pthread_mutex_lock(&job->lock);
    if (!job->memory)
        job->memory = bg_buffers_take(bg_pool_buffers(job->pool), memory_size(job));
    char *memory = job->memory;
    if (!c->runner->place)
        c->runner->place = ++job->placed;
    pthread_mutex_unlock(&job->lock);
    return memory ? memory + (int64_t)(c->runner->place - 1) * job->buffer_size : NULL;
}

static int read_and_write(const chunk *c, int64_t done)
{
    const bg_copy_extent *e = c->extent;
    const int64_t size = c->job->buffer_size;
    char *buffer = take_buffer(c);
    if (!buffer)
        return fail(c, done, BG_COPY_READ, -ENOMEM);
    for (int64_t part; done < c->length; done += part) {
        part = c->length - done < size ? c->length - done : size;
        int64_t n = bg_pread(e->source_fd, buffer, part, e->source_offset + c->offset + done);
        if (n < 0)
            return fail(c, done, BG_COPY_READ, n);
        int ret = 0;
        if (e->flags & BG_COPY_READ_ONLY)
            account(c, part, n == 0);
        else if (n == 0)
            ret = make_zero(c, done, part);
        else if (e->flags & BG_COPY_DETECT_ZEROES)
            ret = write_detecting(c, buffer, done, part);
        else
            ret = write_part(c, buffer, done, part);
        if (ret == 0 && e->flags & BG_COPY_SUM)
            ret = add_sum(c, buffer, done, part);
        if (ret < 0)
            return ret;
    }
    return 0;
}

/* Let the target have the source's own blocks. What is refused is read and written, which tells errors apart. */
static bool clone_chunk(const chunk *c)
{
    const bg_copy_extent *e = c->extent;
    struct file_clone_range range = {.src_fd = e->source_fd,
                                     .src_offset = (uint64_t)(e->source_offset + c->offset),
                                     .src_length = (uint64_t)c->length,
                                     .dest_offset = (uint64_t)(e->target_offset + c->offset)};
    if ((range.src_offset | range.dest_offset | range.src_length) % BLOCK || c->job->no_clones)
        return false;
    if (ioctl(e->target_fd, FICLONERANGE, &range) < 0) {
        /* EINVAL: larger blocks, or the source's end. The rest says that these files never will. */
        if (errno == EOPNOTSUPP || errno == EXDEV || errno == ENOTTY || errno == ENOSYS)
            c->job->no_clones = true;
        return false;
    }
    account(c, c->length, false);
    __atomic_add_fetch(&c->job->progress->shared, c->length, __ATOMIC_RELAXED);
    return true;
}

int64_t bg_copy_file_system(int fd)
{
    struct statfs st;
    return fstatfs(fd, &st) < 0 ? -errno : (int64_t)st.f_type;
}

static int copy_chunk(const chunk *c)
{
    const bg_copy_extent *e = c->extent;
    if (e->flags & BG_COPY_ZERO)
        return make_zero(c, 0, c->length);
    int64_t done = 0;
    if ((e->flags & BG_COPY_CLONE) && !(e->flags & BG_COPY_DETECT_ZEROES) && clone_chunk(c))
        return 0;
    if ((e->flags & BG_COPY_RANGE) && !(e->flags & BG_COPY_DETECT_ZEROES)) {
        off_t from = e->source_offset + c->offset, to = e->target_offset + c->offset;
        while (done < c->length) {
            ssize_t n = copy_file_range(e->source_fd, &from, e->target_fd, &to, (size_t)(c->length - done), 0);
            /* At the source's end or on any refusal: reading and writing finds out what it is and whose. */
            if (n <= 0)
                break;
            account(c, n, false);
            done += n;
        }
    }
    return done == c->length ? 0 : read_and_write(c, done);
}

/*
 * Let the device begin with what is in the page cache, so that it works while we copy, and little is left for the flush at
 * the end; errors are the flush's to tell. Short extents are left to it: in order, it makes fewer transfers of them.
 */
static void write_behind(const chunk *c)
{
    const bg_copy_extent *e = c->extent;
    int64_t end = c->offset + c->length;
    if (c->job->target != BG_HASTE_ASK || e->length < CHUNK || (end % WINDOW && end < e->length))
        return;
    int64_t start = (end - 1) / WINDOW * WINDOW; /* and the window before: chunks of it may have been late */
    start = start > WINDOW ? start - WINDOW : 0;
    sync_file_range(e->target_fd, e->target_offset + start, end - start, SYNC_FILE_RANGE_WRITE);
}

static bool next_chunk(bg_copy *job, chunk *c)
{
    bool found = false;
    pthread_mutex_lock(&job->lock);
    bool stop = job->failure.error || __atomic_load_n(&job->progress->cancel, __ATOMIC_RELAXED);
    while (!stop && !found && job->at < job->count) {
        const bg_copy_extent *e = &job->extents[job->at];
        int64_t left = e->length - job->at_offset, most = e->flags & BG_COPY_ZERO ? ZERO_CHUNK : CHUNK;
        if (left > 0) {
            *c = (chunk){job, e, job->at, job->at_offset, left < most ? left : most, c->runner};
            job->at_offset += c->length;
            found = true;
        }
        if (job->at_offset == e->length) {
            job->at++;
            job->at_offset = 0;
        }
    }
    pthread_mutex_unlock(&job->lock);
    return found;
}

/* Called with the lock held, by the last to leave. */
static int64_t job_result(const bg_copy *job)
{
    if (job->failure.error)
        return -job->failure.error;
    return job->at < job->count ? -ECANCELED : 0;
}

static void run_runner(bg_task *task)
{
    runner *self = (runner *)task;
    bg_copy *job = self->job;
    chunk c = {.runner = self};
    while (next_chunk(job, &c)) {
        if (copy_chunk(&c) == 0)
            write_behind(&c);
        if (bg_pool_waiting(job->pool)) {
            bg_pool_submit(job->pool, task);
            return;
        }
    }
    pthread_mutex_lock(&job->lock);
    bool last = --job->active == 0;
    if (last && job->memory)
        bg_buffers_give(bg_pool_buffers(job->pool), job->memory, memory_size(job));
    int64_t result = job_result(job);
    bg_entry *entry = job->entry;
    if (last && !entry)
        bg_wake_all(&job->ended);
    pthread_mutex_unlock(&job->lock);
    if (last && entry)
        bg_queue_complete(entry, result);
}

/* Extents are mostly of two files: the first one tells what they are like. */
static enum bg_lane look_at_files(bg_copy *job)
{
    if (!job->count)
        return BG_LANE_PLAIN;
    const bg_copy_extent *e = job->extents;
    enum bg_haste source = e->flags & BG_COPY_ZERO ? BG_HASTE_ALL : bg_haste_of(e->source_fd);
    enum bg_haste target = e->flags & BG_COPY_READ_ONLY ? BG_HASTE_ALL : bg_haste_of(e->target_fd);
    bool waits = bg_always_waits(source) || bg_always_waits(target);
    job->buffer_size = waits ? DIRECT : BUFFER;
    job->target = target;
    if (waits)
        return BG_LANE_WAITS;
    return source == BG_HASTE_ALL && target == BG_HASTE_ALL ? BG_LANE_BUSY : BG_LANE_PLAIN;
}

/* Runners that may have something to read. */
static int readers(const bg_copy *job)
{
    int64_t chunks = 0;
    for (int64_t i = 0; i < job->count && chunks < job->threads; i++)
        chunks += (job->extents[i].length + CHUNK - 1) / CHUNK;
    return chunks < job->threads ? (int)chunks : job->threads;
}

static void start_runners(bg_copy *job)
{
    /* Between files in memory more threads than processors only spin for the target's lock. */
    enum bg_lane lane = look_at_files(job);
    job->places = readers(job);
    job->active = job->threads;
    for (int i = 0; i < job->threads; i++) {
        job->runners[i] = (runner){.task = {.run = run_runner, .lane = (uint8_t)lane}, .job = job};
        bg_pool_submit(job->pool, &job->runners[i].task);
    }
}

int bg_copy_start(bg_copy *job, bg_queue *queue, int64_t ticket)
{
    job->entry = bg_queue_reserve(queue, ticket);
    if (!job->entry)
        return -ENOMEM;
    job->pool = bg_queue_pool(queue);
    start_runners(job);
    return 0;
}

int bg_copy_run(bg_copy *job, bg_pool *pool)
{
    job->pool = pool;
    start_runners(job);
    pthread_mutex_lock(&job->lock);
    while (job->active)
        bg_wait(&job->ended, &job->lock);
    int ret = (int)job_result(job);
    pthread_mutex_unlock(&job->lock);
    return ret;
}
