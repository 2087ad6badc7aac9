# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""file: the bytes of a regular file.

```
    qcow2 "disk"
       | file
    file "disk.qcow2"  ->  one descriptor: pread, pwrite, fdatasync, fallocate, SEEK_HOLE
```

Options (QEMU's BlockdevOptionsFile, beside those of every node):

* `filename`: path; relative to the current directory.
* `locking` ("auto", "on", "off"): tell other processes by byte locks, in QEMU's layout, which permissions this node
  holds and shares, and refuse to start where they conflict. "auto" warns and goes on where the file system has no
  locks; "on" fails there.
* `cache.direct`: O_DIRECT. Requests are aligned to what the file system asks for; the last, partial block of a file
  whose size is no multiple of that is written through the page cache, so that the file never becomes longer.
* `read-only` opens the file read-only. `auto-read-only` opens it read-only and reopens it for writing while
  something above needs to write. With neither it is opened for writing at once.
* `force-share` (needs `read-only`): read an image that others write. What is read then may be inconsistent.
* `mapped` (default true; not QEMU's): a file in memory (tmpfs) is mapped, and read and written there where that needs
  nothing that it has not got in memory, by requests of 16 KiB and more, and by shorter writes of which several are made
  at a time. It takes a third of the time; the file's modification time then changes with the first write after a flush,
  with flushes, and when the node is closed. The process gets a handler of SIGBUS, see native/guard.h.
* `aio` ("threads", "native", "io_uring"), `aio-max-batch`, `drop-cache`: accepted; one native pool of threads serves
  every value.

Example:

    [[nodes]]
    node-name = "disk"
    driver = "file"
    filename = "disk.raw"
    cache = {direct = true}

What it can do: it grows when written past its end (where the edge may resize). Block status comes from SEEK_DATA and
SEEK_HOLE. Discard punches holes. Write-zeroes punches holes with MAY_UNMAP; else it zeroes and keeps the storage
allocated. Where the file system can do neither, the node writes zeroes.

Limits: the size is read when the file is opened; what another process appends is not seen. While a format has native
first writes made, the node is as long as the clusters they use, and the file perhaps shorter. After a failed flush
every later flush fails too, since the kernel may have dropped what it could not write: close and open the image
again. Regular files only; for disks use `host_device`.
"""

from __future__ import annotations

import errno
import os
import stat

from blockgraph.driver import Info
from blockgraph.errors import GraphError
from blockgraph.extent import Status
from blockgraph.flags import Flag
from blockgraph.native import Zeroing
from blockgraph.protocols.descriptor import (
    KEEP_SIZE,
    PUNCH_HOLE,
    ZERO_RANGE,
    DescriptorDriver,
    DescriptorOptions,
    in_thread,
)
from blockgraph.protocols.holes import DataRegion

_KINDS = (
    (stat.S_ISDIR, "a directory", "check 'filename'"),
    (stat.S_ISBLK, "a block device", "use driver 'host_device'"),
    (stat.S_ISCHR, "a character device", "use driver 'host_device'"),
    (stat.S_ISFIFO, "a fifo", "images need random access: check 'filename'"),
    (stat.S_ISSOCK, "a socket", "check 'filename'; NBD servers are reached with driver 'nbd'"),
)


class File(DescriptorDriver):
    """See the module's text."""

    name = "file"
    Options = DescriptorOptions
    growable = True
    zero_flags = Flag.MAY_UNMAP

    _can_punch = True
    _can_zero_range = True
    _can_allocate = True

    async def open(self) -> None:
        self._data = DataRegion()
        await super().open()

    def _check_kind(self, mode: int) -> None:
        for matches, what, hint in _KINDS:
            if matches(mode):
                raise GraphError(
                    f"'{self.options.filename}' is {what}, not a regular file",
                    node=self.node.name,
                    op="open",
                    errno=errno.EINVAL,
                    hint=hint,
                )

    def _read_size(self) -> int:
        return os.fstat(self._fd).st_size

    def info(self) -> Info:
        return Info(zero_init=True)

    async def storage_status(self, offset: int, length: int) -> tuple[int, Status]:
        if offset >= self._size:
            return length, Status.ZERO
        try:
            found = await self._data.find(self._fd, offset, length)
        except OSError as error:
            raise self._failure(error, "block_status", offset, length) from error
        if found is None:
            return length, Status.ZERO
        run, status = found
        # Whole blocks, seen from `offset`: the file may end, and a hole begin or end, inside one.
        inside = run % self.request_alignment
        if status is Status.ZERO and run > inside:
            return run - inside, Status.ZERO
        return run + -run % self.request_alignment, Status.DATA

    async def pwrite_zeroes(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        try:
            if flags & Flag.MAY_UNMAP:
                await self._zero_unmap(offset, offset + length)
            else:
                await self._zero_keep(offset, length)
        except OSError as error:
            raise self._failure(error, "pwrite_zeroes", offset, length) from error
        finally:
            self._data.forget()
            self.stored(offset, length)

    async def _zero_unmap(self, offset: int, end: int) -> None:
        if offset < self._size and not await self._punch(offset, min(end, self._size) - offset):
            raise self.unsupported("pwrite_zeroes")
        # Allocating the last byte never shortens the file, as ftruncate would if a later part were being written.
        if end > self._size and not await self._fallocate(0, end - 1, 1):
            raise self.unsupported("pwrite_zeroes")

    async def _zero_keep(self, offset: int, length: int) -> None:
        if self._can_zero_range:
            self._can_zero_range = await self._fallocate(ZERO_RANGE, offset, length)
            if self._can_zero_range:
                return
        # tmpfs: a hole, given storage again.
        if self._can_allocate and await self._punch(offset, length):
            self._can_allocate = await self._fallocate(0, offset, length)
            if self._can_allocate:
                return
        raise self.unsupported("pwrite_zeroes")

    async def discard(self, offset: int, length: int) -> None:
        try:
            if not await self._punch(offset, length):
                raise self.unsupported("discard")
        except OSError as error:
            raise self._failure(error, "discard", offset, length) from error
        finally:
            self._data.forget()

    async def _punch(self, offset: int, length: int) -> bool:
        """Make a hole; False when the file system has none."""
        if self._can_punch:
            self._can_punch = await self._fallocate(PUNCH_HOLE | KEEP_SIZE, offset, length)
        return self._can_punch

    def zeroing(self) -> Zeroing:
        """A hole that was made natively and is remembered as data is read as zeroes."""
        punch = Zeroing.PUNCH if self._can_punch else Zeroing.NONE
        return punch | (Zeroing.ZERO_RANGE if self._can_zero_range else Zeroing.NONE)

    async def truncate(self, size: int) -> None:
        try:
            await in_thread(os.ftruncate, self._fd, size)
        except OSError as error:
            raise self._failure(error, "truncate", size) from error
        finally:
            self._data.forget()
            self._size = self._read_size()
