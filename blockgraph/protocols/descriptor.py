# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What `file` and `host_device` share: a node whose bytes lie behind one file descriptor.

The descriptor's *number* stays the same while the node is open, since native copies hold it. When the node has to
become writable (or may become read-only again, with auto-read-only), the file is opened a second time through
/proc/self/fd, so it is the same file even if its name now means another one, and dup2 puts the new description
under the old number; requests in flight end on the description they began with.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
from collections.abc import Callable
from mmap import PAGESIZE
from typing import ClassVar, Literal, ParamSpec, TypeVar

from blockgraph.driver import Protocol
from blockgraph.errors import GraphError, IOFailure, OptionError
from blockgraph.flags import Flag
from blockgraph.native import Windows, allocate_aligned, get_pool
from blockgraph.options import NodeOptions
from blockgraph.perm import ALL, Perm
from blockgraph.protocols.direct import BUFFERED, DirectAlignment, address_of, direct_alignment
from blockgraph.protocols.locks import ImageLock, LockConflict, LocksUnavailable

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)

#: Modes of fallocate(2).
KEEP_SIZE = 1
PUNCH_HOLE = 2
ZERO_RANGE = 16

#: The file system or the device does not have that mode (some answer EINVAL).
_NO_FALLOCATE = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV})

_WRITES = Perm.WRITE | Perm.WRITE_UNCHANGED | Perm.RESIZE

_HINTS = {
    errno.ENOENT: "check 'filename', or create the image first",
    errno.ENOTDIR: "check 'filename'",
    errno.EACCES: "run as a user who may {verb} it{otherwise}",
    errno.EPERM: "run as a user who may {verb} it{otherwise}",
    errno.EROFS: "the file system is read-only{otherwise}",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ETXTBSY: "it is a program that runs",
    errno.EBUSY: "it is mounted or used by the kernel",
}


class DescriptorOptions(NodeOptions, kw_only=True, frozen=True):
    """QEMU's BlockdevOptionsFile.

    Attributes:
        filename: path; relative to the current directory.
        locking: byte locks that other processes (QEMU too) heed; "auto": where the file system has them.
        aio: accepted; one native thread pool serves every value.
        aio_max_batch: accepted; the pool takes requests one by one.
        drop_cache: accepted; it matters to QEMU's migration only.
        mapped: a file in memory is also read and written where it is mapped (native/windows.h).
    """

    filename: str
    locking: Literal["auto", "on", "off"] = "auto"
    aio: Literal["threads", "native", "io_uring"] = "threads"
    aio_max_batch: int = 0
    drop_cache: bool = True
    mapped: bool = True


class DescriptorDriver(Protocol):
    """Opening, permissions, locks, reads, writes and flushes; derived classes know sizes and holes."""

    Options: ClassVar[type[NodeOptions]] = DescriptorOptions
    options: DescriptorOptions

    # One transfer of the kernel is shorter than 2 GiB.
    max_transfer = 1 << 30

    _fd: int = -1
    _tail_fd: int = -1
    _pending_fd: int = -1
    _lock: ImageLock | None = None
    #: of which the last is used; others, if any, were made when the file could only be read
    _windows: tuple[Windows, ...] = ()
    #: what the kernel asks for
    _alignment: DirectAlignment = BUFFERED
    #: what is written at once where the file ends inside a block, bytes
    _tail_unit = 1
    #: somebody may make the file longer, or is about to be allowed to
    _grows = _will_grow = False
    _writable = False
    #: of a flush that failed: what was written may be lost, for good
    _flush_error: OSError | None = None
    #: of one in native code, which nobody has heard of
    _untold_error: OSError | None = None
    _size = 0

    # For derived classes.

    def _check_kind(self, mode: int) -> None:
        """Refuse what is not this driver's kind of file.

        Args:
            mode: st_mode.
        Raises:
            GraphError: with the driver to use instead.
        """
        raise NotImplementedError

    def _read_size(self) -> int:
        """Bytes behind the descriptor, asked anew."""
        raise NotImplementedError

    def _base_alignment(self) -> int:
        """What requests must be aligned to without O_DIRECT, bytes."""
        return 1

    # Control path.

    async def open(self) -> None:
        self._check_options(self.options)
        self._pool = get_pool(asyncio.get_running_loop())
        await in_thread(self._open)

    def _open(self) -> None:
        options = self.options
        writable = not options.read_only and not options.auto_read_only
        try:
            # Looked at before it is opened: opening a tape or a fifo is not without effect.
            self._check_kind(os.stat(options.filename).st_mode)
            self._fd = os.open(options.filename, self._flags(writable, options.cache.direct))
            self._check_kind(os.fstat(self._fd).st_mode)
            self._writable = writable
            self._size = self._read_size()
            self._set_alignment(self._direct_alignment(self._fd, options.cache.direct))
        except OSError as error:
            raise self._open_error(error, writable) from error

    async def close(self) -> None:
        lock, self._lock = self._lock, None
        windows, self._windows = self._windows, ()
        descriptors = [fd for fd in (self._tail_fd, self._pending_fd, self._fd) if fd >= 0]
        self._fd = self._tail_fd = self._pending_fd = -1
        await in_thread(self._close_all, windows, lock, descriptors)

    def _close_all(self, windows: tuple[Windows, ...], lock: ImageLock | None, descriptors: list[int]) -> None:
        failure: OSError | None = None
        for each in windows:
            each.release()
        for fd in descriptors:
            try:
                os.close(fd)
            except OSError as error:  # the descriptor is gone all the same
                failure = error
        # Last: nobody may take the image over while we can still write it.
        if lock is not None:
            lock.release()
        if failure is not None:
            raise self._failure(failure, "close") from failure

    async def prepare_perm(self, need: Perm, share: Perm) -> None:
        if self.options.force_share:
            share = ALL
        self._will_grow = self.growable and bool(need & Perm.RESIZE)
        self._set_alignment(self._alignment)
        await self.node.settle()
        await in_thread(self._acquire, need, share)

    def _acquire(self, need: Perm, share: Perm) -> None:
        if self.options.locking != "off":
            self._acquire_lock(need, share)
        writable = bool(need & _WRITES) or not (self.options.read_only or self.options.auto_read_only)
        if writable != self._writable:
            try:
                self._pending_fd = self._reopen(self._flags(writable, self.options.cache.direct))
            except OSError as error:
                raise self._open_error(error, writable) from error

    def _acquire_lock(self, need: Perm, share: Perm) -> None:
        try:
            if self._lock is None:
                self._lock = ImageLock(self._reopen(os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
            self._lock.prepare(need, share)
        except LockConflict as conflict:
            raise self._conflict_error(conflict) from None
        except LocksUnavailable as cause:
            assert self._lock is not None
            self._lock.release()
            self._lock = None
            if self.options.locking == "on":
                raise GraphError(
                    f"image locks do not work on '{self.options.filename}' ({cause})",
                    node=self.node.name,
                    hint="set locking to 'off', and make sure that nothing else uses the image",
                ) from None
            _log.warning("node '%s': no image locks on '%s' (%s)", self.node.name, self.options.filename, cause)
        except OSError as error:
            raise self._open_error(error, False) from error

    def commit_perm(self) -> None:
        self._grows = self._will_grow
        self._set_alignment(self._alignment)
        if self._pending_fd >= 0:
            self._swap(self._pending_fd)
            self._pending_fd = -1
        if self._lock is not None:
            self._lock.commit()

    def abort_perm(self) -> None:
        self._will_grow = self._grows
        self._set_alignment(self._alignment)
        self._drop_pending()
        if self._lock is not None:
            self._lock.abort()

    def reopen_check(self, options: NodeOptions) -> None:
        assert isinstance(options, DescriptorOptions)
        super().reopen_check(options)
        self._check_options(options)
        writable = not options.read_only and not options.auto_read_only
        if options.cache.direct == self.options.cache.direct and (self._writable or not writable):
            return
        try:
            fd = self._reopen(self._flags(writable, options.cache.direct))
            try:
                self._direct_alignment(fd, options.cache.direct)
            finally:
                os.close(fd)
        except OSError as error:
            raise self._open_error(error, writable) from error

    def reopened(self, options: NodeOptions) -> None:
        direct = self.options.cache.direct
        super().reopened(options)
        writable = self._writable if self.options.auto_read_only else not self.options.read_only
        if self._pending_fd >= 0:
            writable = _is_writable(self._pending_fd)  # for permissions that are committed next
        if self.options.cache.direct == direct and (self._pending_fd >= 0 or writable == self._writable):
            return
        fd = -1
        try:
            fd = self._reopen(self._flags(writable, self.options.cache.direct))
            alignment = self._direct_alignment(fd, self.options.cache.direct)
        except OSError as error:
            # reopen_check has tried it a moment ago; the old descriptor still reaches the same bytes.
            _log.error("node '%s': goes on with its old descriptor: %s", self.node.name, error)
            if fd >= 0:
                os.close(fd)
            return
        self._drop_pending()
        self._swap(fd)
        self._set_alignment(alignment)

    def _check_options(self, options: DescriptorOptions) -> None:
        if options.force_share and not options.read_only:
            raise OptionError(
                "needs read-only: others may be writing the image",
                path="force-share",
                value=True,
                node=self.node.name,
                hint="add 'read-only: true'",
            )

    def _flags(self, writable: bool, direct: bool) -> int:
        # O_NONBLOCK: a file replaced by a fifo in the meantime must not block; no effect on files and disks.
        flags = os.O_CLOEXEC | os.O_NONBLOCK | (os.O_RDWR if writable else os.O_RDONLY)
        return flags | os.O_DIRECT if direct else flags

    def _reopen(self, flags: int) -> int:
        """Another open file description of the open file."""
        return os.open(f"/proc/self/fd/{self._fd}", flags)

    def _swap(self, fd: int) -> None:
        """Put a new description under the node's descriptor; `fd` itself is closed."""
        self._writable = _is_writable(fd)
        os.dup2(fd, self._fd, inheritable=False)
        os.close(fd)
        if self._tail_fd >= 0:
            os.close(self._tail_fd)
            self._tail_fd = -1

    def _drop_pending(self) -> None:
        if self._pending_fd >= 0:
            os.close(self._pending_fd)
            self._pending_fd = -1

    def _direct_alignment(self, fd: int, direct: bool) -> DirectAlignment:
        if not direct:
            return BUFFERED
        alignment = direct_alignment(fd)
        if alignment is None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return alignment

    def _set_alignment(self, alignment: DirectAlignment) -> None:
        """Where the file may end inside a block, no direct write shares a page with its tail, which goes through the
        page cache: writing that page back would undo it. The node sees to it; requests that it aligned before a
        change go on as they are."""
        tail = alignment.offset > 1 and (self._grows or self._will_grow or self._size % alignment.offset != 0)
        self._alignment = alignment
        self._tail_unit = max(alignment.offset, PAGESIZE) if tail else alignment.offset
        self.memory_alignment = alignment.memory
        self.request_alignment = max(self._tail_unit, self._base_alignment())
        self.node.realigned()

    def _open_error(self, error: OSError, writable: bool) -> IOFailure:
        name = self.options.filename
        otherwise = ", or set read-only" if writable and not self.options.auto_read_only else ""
        hint = _HINTS.get(error.errno or 0)
        if hint is not None:
            hint = hint.format(verb="write" if writable else "read", otherwise=otherwise)
        elif error.errno == errno.EINVAL and self.options.cache.direct:
            hint = "the file system has no direct I/O: set cache.direct to false"
        named = OSError(error.errno, error.strerror, name)
        return IOFailure.from_oserror(named, node=self.node.name, op="open", hint=hint)

    def _conflict_error(self, conflict: LockConflict) -> GraphError:
        word = conflict.permission.words
        other = f"holds '{word}', which this node does not share" if conflict.holds else f"does not share '{word}'"
        return GraphError(
            f"image '{self.options.filename}' is locked: another process or node {other}",
            node=self.node.name,
            op="open",
            errno=errno.EAGAIN,
            hint="stop it, or open the image here with read-only and force-share",
        )

    # Facts.

    def size(self) -> int:
        return self._size

    def filename(self) -> str | None:
        return self.options.filename

    def fd(self) -> int | None:
        return self._fd if self._fd >= 0 else None

    def windows(self) -> Windows | None:
        last = self._windows[-1] if self._windows else None
        if (last is None or last.writable < self._writable) and self._fd >= 0 and self.options.mapped:
            last = Windows.of(self._fd)
            if last is not None:
                self._windows = (*self._windows, last)
        return last

    def stored(self, offset: int, length: int) -> None:
        if offset + length > self._size:
            self._size = max(self._size, self._read_size())  # a copy that failed may have stopped anywhere

    def reaches(self, end: int) -> None:
        self._size = max(self._size, end)

    # Data path.

    async def pread(self, offset: int, buf: memoryview) -> None:
        if not self._misplaced(buf):
            await self._pread(offset, buf)
            return
        bounce = allocate_aligned(len(buf), self.memory_alignment)
        await self._pread(offset, bounce)
        buf[:] = bounce

    async def _pread(self, offset: int, buf: memoryview) -> None:
        try:
            await self._pool.pread(self._fd, offset, buf)  # zeroes what lies past the file's end
        except OSError as error:
            raise self._failure(error, "pread", offset, len(buf)) from error

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
        length = len(buf)
        tail = min(length, (offset + length) % self._tail_unit) if (offset + length) % self._alignment.offset else 0
        blocks = buf[: length - tail]
        try:
            if self._misplaced(blocks):
                bounce = allocate_aligned(len(blocks), self.memory_alignment)
                bounce[:] = blocks
                await self._pool.pwrite(self._fd, offset, bounce)
            elif blocks:
                await self._pool.pwrite(self._fd, offset, blocks)
            if tail:
                await self._pwrite_tail(offset + length - tail, buf[len(blocks) :])
        except OSError as error:
            self.stored(offset, length)
            raise self._failure(error, "pwrite", offset, length) from error
        except BaseException:
            self.stored(offset, length)
            raise
        self._size = max(self._size, offset + length)

    async def _pwrite_tail(self, offset: int, buf: memoryview) -> None:
        """The part of the last block that a direct write can not reach without making the file longer."""
        if self._tail_fd < 0:
            self._tail_fd = self._reopen(self._flags(True, False))
        await self._pool.pwrite(self._tail_fd, offset, buf)

    @property
    def plain_flush(self) -> bool:
        return True

    def flush_failed(self, code: int) -> None:
        self._untold_error = OSError(code, os.strerror(code))
        self._keep_flush_error(self._untold_error)

    def _keep_flush_error(self, error: OSError) -> None:
        """What went around the page cache is not forgotten by the kernel."""
        if not self.options.cache.direct or self._tail_fd >= 0:
            self._flush_error = error

    async def flush(self) -> None:
        # After one failure the kernel may forget the pages it could not write and report success next time.
        if self._flush_error is not None:
            raise self._failure(self._flush_error, "flush") from self._flush_error
        untold, self._untold_error = self._untold_error, None
        if untold is not None:
            raise self._failure(untold, "flush") from untold
        for windows in self._windows:
            windows.touch()
        try:
            await self._pool.fdatasync(self._fd)
        except OSError as error:
            self._keep_flush_error(error)
            raise self._failure(error, "flush") from error

    async def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        """False where the kernel can not do that here.

        Raises: OSError.
        """
        try:
            await self._pool.fallocate(self._fd, mode, offset, length)
        except OSError as error:
            if error.errno in _NO_FALLOCATE:
                return False
            raise
        return True

    def _misplaced(self, buf: memoryview) -> bool:
        """The memory is not where a direct transfer can use it."""
        return self.memory_alignment > 1 and bool(len(buf)) and address_of(buf) % self.memory_alignment != 0

    def _failure(self, error: OSError, op: str, offset: int | None = None, length: int | None = None) -> IOFailure:
        named = OSError(error.errno, error.strerror, self.options.filename)
        return IOFailure.from_oserror(named, node=self.node.name, op=op, offset=offset, length=length)


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function that may block in a thread.

    Cancelled: the call is waited for all the same, so that nothing changes behind the driver's back.
    """
    task = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        task.exception()
        raise asyncio.CancelledError
    return task.result()


def _is_writable(fd: int) -> bool:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
