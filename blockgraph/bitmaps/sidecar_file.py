# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The file that a sidecar is in: reads and writes that do not block the loop, its lock, and which blocks are free."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
from collections.abc import Iterable
from contextlib import suppress

from blockgraph.bitmaps.sidecar_format import BLOCK, FIRST_BLOCK, MAX_FILE, Area
from blockgraph.durable import sync_directory
from blockgraph.errors import IOFailure
from blockgraph.native import Bitmap, get_pool

#: Longest single write, bytes: neighbours are put together up to it.
_JOIN = 4 << 20


class SidecarFile:
    """A file that need not exist before it is written. Open between uses, so that its lock holds.

    Args:
        path: of the file.
        node: for messages.
    """

    def __init__(self, path: str, node: str) -> None:
        self.path = path
        self._node = node
        self._fd = -1

    @property
    def writable(self) -> bool:
        """It is open for writing, and nobody else has it."""
        return self._fd >= 0

    def exists(self) -> bool:
        """There is such a file."""
        return os.path.exists(self.path)

    def open_locked(self) -> None:
        """For writing; made when it is missing. A second call does nothing.

        Raises:
            IOFailure: it can not be opened, or another process (or node) has it (EBUSY).
        """
        if self._fd >= 0:
            return
        try:
            self._fd = self._open(os.O_RDWR)
        except FileNotFoundError:
            try:
                self._fd = self._open(os.O_RDWR | os.O_CREAT | os.O_EXCL)
                sync_directory(os.path.dirname(self.path))
            except OSError as error:
                self.close()
                raise self.failure(error, "open") from error
        except OSError as error:
            raise self.failure(error, "open") from error
        if not _lock(self._fd, fcntl.LOCK_EX):
            self.close()
            raise self.busy()

    def busy(self) -> IOFailure:
        """Somebody else writes it."""
        return IOFailure(
            f"sidecar '{self.path}' is in use by another process or node",
            node=self._node,
            errno=errno.EBUSY,
            hint="stop it, or open the image read-only here",
        )

    def _open(self, flags: int) -> int:
        return os.open(self.path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)

    def close(self) -> None:
        """Give the lock up."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def borrow(self) -> tuple[int, bool]:
        """A descriptor for reading, to be given back, the file's own where it is open; and whether another process or
        node writes the file meanwhile.

        Raises:
            FileNotFoundError: there is none.
            IOFailure: it can not be opened.
        """
        if self._fd >= 0:
            return self._fd, False
        try:
            fd = self._open(os.O_RDONLY)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self.failure(error, "open") from error
        return fd, not _lock(fd, fcntl.LOCK_SH)

    def give_back(self, fd: int) -> None:
        """Ends `borrow`."""
        if fd != self._fd:
            os.close(fd)

    async def read(self, fd: int, offset: int, length: int) -> bytes:
        """The bytes of a range; zeroes past the end.

        Args:
            length: the caller has bounded it by `size`.
        """
        buf = bytearray(length)
        try:
            await get_pool(asyncio.get_running_loop()).pread(fd, offset, buf)
        except OSError as error:
            raise self.failure(error, "read") from error
        return bytes(buf)

    def size(self, fd: int) -> int:
        """Bytes of the file."""
        return os.fstat(fd).st_size

    async def write(self, parts: Iterable[tuple[int, bytes]]) -> None:
        """Write (offset, bytes); neighbours go together."""
        pool = get_pool(asyncio.get_running_loop())
        try:
            for offset, data in _joined(parts):
                await pool.pwrite(self._fd, offset, data)
        except OSError as error:
            raise self.failure(error, "write") from error

    async def sync(self) -> None:
        """What was written is durable."""
        try:
            await get_pool(asyncio.get_running_loop()).fdatasync(self._fd)
        except OSError as error:
            raise self.failure(error, "flush") from error

    def cut(self, size: int) -> None:
        """Nothing is stored from there on. What fails does no harm."""
        with suppress(OSError):
            if os.fstat(self._fd).st_size > size:
                os.ftruncate(self._fd, size)

    def remove(self) -> None:
        """The file is gone, if there was one."""
        with suppress(OSError):
            os.unlink(self.path)

    def failure(self, error: OSError, op: str) -> IOFailure:
        """The error for the user."""
        return IOFailure.from_oserror(
            OSError(error.errno, error.strerror, self.path), node=self._node, op=f"{op} sidecar"
        )


def _lock(fd: int, kind: int) -> bool:
    """False: somebody holds it. File systems without locks count as free."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _joined(parts: Iterable[tuple[int, bytes]]) -> Iterable[tuple[int, bytes]]:
    start, held, end = 0, list[bytes](), 0
    for offset, data in sorted(parts):
        if held and (offset != end or end - start >= _JOIN):
            yield start, b"".join(held)
            held = []
        if not held:
            start = end = offset
        held.append(data)
        end += len(data)
    if held:
        yield start, b"".join(held)


class Space:
    """Which blocks hold something. What is freed is used again only after `settle`: an older header may lead to it."""

    def __init__(self) -> None:
        self._used = Bitmap(MAX_FILE, BLOCK)
        self._used.set(0, FIRST_BLOCK)
        self._freed: list[Area] = []
        self._hint = FIRST_BLOCK

    def take(self, area: Area) -> bool:
        """The area is in use. False: a part of it was already."""
        end = area.offset + _whole(area.length)
        free = self._used.next_dirty(area.offset, end) is None
        self._used.set(area.offset, end - area.offset)
        return free

    def allocate(self, length: int, failure: IOFailure) -> int:
        """Room for `length` bytes. Raises `failure` when there is none."""
        wanted = _whole(length)
        for start in (self._hint, FIRST_BLOCK):
            while found := self._used.next_clean(start, None, wanted):
                if found[1] == wanted:
                    self._used.set(found[0], wanted)
                    self._hint = found[0] + wanted
                    return found[0]
                start = found[0] + found[1]
        raise failure

    def free(self, areas: Iterable[Area]) -> None:
        """Once `settle` is called, they are."""
        self._freed += [area for area in areas if area.length]

    def settle(self) -> None:
        """A header that leads to nothing that was freed is durable."""
        for area in self._freed:
            self._used.reset(area.offset, _whole(area.length))
            self._hint = min(self._hint, area.offset)
        self._freed.clear()

    def give_up(self, areas: Iterable[Area]) -> None:
        """They were allocated for a header that never came; what was freed for it still is in use."""
        for area in areas:
            self._used.reset(area.offset, _whole(area.length))
        self._freed.clear()

    def end(self) -> int:
        """Nothing is in use from there on."""
        last = FIRST_BLOCK
        for offset, length in self._used.dirty_extents():
            last = offset + length
        return last


def _whole(length: int) -> int:
    return length + -length % BLOCK
