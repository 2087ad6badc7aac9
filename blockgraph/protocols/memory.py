# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""memory: a sparse disk in the memory of this process, for tests and scratch space. Its contents end with the node.

```
    offset   0        64 KiB     128 KiB    192 KiB
             | page 0 | (no page) | page 2 | ...        a page appears when it is first written,
                                                         and goes when it is discarded or unmapped as a whole
```

Options:

* `size`: bytes, required.

Example:

    [[nodes]]
    node-name = "scratch"
    driver = "memory"
    size = 1073741824

Block status tells pages as data, the rest as zeroes. The disk grows when written past its end (where the edge may
resize) and can be truncated.

Limits: memory use is not bounded by anything but the size. Requests copy on the loop's thread; the native paths do
not reach it. For a fast disk in memory use `file` on a tmpfs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Annotated, ClassVar

from msgspec import Meta

from blockgraph.driver import Info, Protocol, fill_zero
from blockgraph.extent import Status
from blockgraph.flags import Flag
from blockgraph.options import NodeOptions

PAGE = 1 << 16


class MemoryOptions(NodeOptions, kw_only=True, frozen=True):
    """See the module's text."""

    size: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class Memory(Protocol):
    """See the module's text."""

    name = "memory"
    Options: ClassVar[type[NodeOptions]] = MemoryOptions
    growable = True
    write_flags = Flag.FUA
    zero_flags = Flag.FUA | Flag.MAY_UNMAP | Flag.NO_FALLBACK
    options: MemoryOptions

    async def open(self) -> None:
        self._size = self.options.size
        self._pages: dict[int, bytearray] = {}
        self._order: list[int] = []  # the keys of _pages, sorted

    async def close(self) -> None:
        self._pages = {}
        self._order = []

    def size(self) -> int:
        return self._size

    def info(self) -> Info:
        return Info(cluster_size=PAGE, zero_init=True)

    async def storage_status(self, offset: int, length: int) -> tuple[int, Status]:
        page = offset // PAGE
        at = bisect_left(self._order, page)
        if at == len(self._order):
            return length, Status.ZERO
        if self._order[at] != page:
            return self._order[at] * PAGE - offset, Status.ZERO
        last = (offset + length - 1) // PAGE
        while page < last and page + 1 in self._pages:
            page += 1
        return (page + 1) * PAGE - offset, Status.DATA

    async def pread(self, offset: int, buf: memoryview) -> None:
        for page, inside, part in _parts(offset, buf):
            data = self._pages.get(page)
            if data is None:
                fill_zero(part)
            else:
                part[:] = memoryview(data)[inside : inside + len(part)]

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
        for page, inside, part in _parts(offset, buf):
            data = self._pages.get(page)
            if data is None:
                data = self._pages[page] = bytearray(PAGE)
                insort(self._order, page)
            data[inside : inside + len(part)] = part
        self._size = max(self._size, offset + len(buf))

    async def pwrite_zeroes(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        self._zero(offset, offset + length, unmap=bool(flags & Flag.MAY_UNMAP))
        self._size = max(self._size, offset + length)

    async def discard(self, offset: int, length: int) -> None:
        self._zero(offset, offset + length, unmap=True)

    async def flush(self) -> None:
        """Nothing outlives the node, so there is nothing to do."""

    async def truncate(self, size: int) -> None:
        if size < self._size:
            self._zero(size, -(-self._size // PAGE) * PAGE, unmap=True)
        self._size = size

    def _zero(self, start: int, end: int, *, unmap: bool) -> None:
        """Zero the pages of [start, end) that exist; with `unmap`, drop those that lie in it as a whole."""
        low = bisect_left(self._order, start // PAGE)
        high = bisect_left(self._order, -(-end // PAGE))
        kept = []
        for page in self._order[low:high]:
            first, last = max(start, page * PAGE), min(end, (page + 1) * PAGE)
            if unmap and last - first == PAGE:
                del self._pages[page]
            else:
                fill_zero(memoryview(self._pages[page])[first - page * PAGE : last - page * PAGE])
                kept.append(page)
        self._order[low:high] = kept


def _parts(offset: int, buf: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """The pieces of a request: page, offset in it, part of the buffer."""
    done = 0
    while done < len(buf):
        page, inside = divmod(offset + done, PAGE)
        length = min(len(buf) - done, PAGE - inside)
        yield page, inside, buf[done : done + length]
        done += length
