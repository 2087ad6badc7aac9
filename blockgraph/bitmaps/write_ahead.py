# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""WriteAhead: a region of the disk is marked, durably, before the first write into it is issued.

```
            before: mark, one fdatasync for all who wait          before
    CLOSED ─────────────────────────────────────────────► FRESH ────────► OPEN    native writes pass unseen
       ▲                                                    │ ▲              │
       │  exact bits stored, mark taken away                │ └──────────────┘    a turn of the clock: revoked,
       └──────────────────────── OLD ◄──────────────────────┘  a turn             so that the next write is seen
                                  └── before ──► OPEN
```

In all states but CLOSED the mark is on the disk: what a crash leaves is a superset, whatever happened to the bits. The
clock tells regions that are written all the time, which stay open for a fault of Python now and then, from those that
are not: these are closed, so that the superset stays small. A turn withdraws `BATCH` regions at most, so that is the
most that a busy disk pays for it; on a disk that nobody has written since the last turn it withdraws all.

A write that continues the last one marks `AHEAD` more regions, so that a sequential writer does not wait at each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from blockgraph.bitmaps.guard import GuardRun
from blockgraph.errors import BlockGraphError, Unsupported

if TYPE_CHECKING:
    from blockgraph.node import Node

CLOSED, OLD, FRESH, OPEN = range(4)

BATCH = 128
AHEAD = 16

#: Smallest and usual largest region, log2; more than so many regions make them larger than that.
_LEAST, _MOST = 20, 26
_WANTED = 1 << 16
_LIMIT = 1 << 20

#: Bits of a region that is the whole disk, whatever its size.
WHOLE = 63

_FRESH_TO_OLD = bytes((CLOSED, OLD, OLD, OPEN)) + bytes(252)


def region_bits(size: int) -> int:
    """log2 of the bytes of a region, for a disk of `size` bytes: 1 to 64 MiB up to 64 TiB."""
    bits = _LEAST
    while (bits < _MOST and size >> bits > _WANTED) or size >> bits >= _LIMIT:
        bits += 1
    return bits


class WriteAhead:
    """See the module's text, and `WriteGuard`.

    Args:
        mark: make marks of these regions durable.
        before_resize, resized, touch: see `WriteGuard`.

    Attributes:
        bits: log2 of a region's bytes.
        state: of each region.
    """

    def __init__(
        self,
        node: Node,
        mark: Callable[[Sequence[int]], Awaitable[None]],
        before_resize: Callable[[int], Awaitable[None]],
        resized: Callable[[], Awaitable[None]],
        touch: Callable[[], Awaitable[None]],
    ) -> None:
        self._node = node
        self._mark = mark
        self._before_resize = before_resize
        self._resized = resized
        self._touch = touch
        self.set_regions(region_bits(node.size()), node.size())
        self._hand = 0
        #: how much had been written at the last turn
        self._written = (-1, 0)
        self._last = -2
        self._wanted: set[int] = set()
        self._batch: asyncio.Future[None] | None = None
        self._marking: asyncio.Task[None] | None = None

    def set_regions(self, bits: int, size: int) -> None:
        """Regions of `1 << bits` bytes, all closed."""
        self.bits = bits
        count = max(1, -(-size >> bits))
        self.state = bytearray(count)
        self._open = bytearray(count)

    def grow(self, size: int) -> None:
        """Regions for `size` bytes, at least; those there are stay as they are.

        Raises:
            Unsupported: they would be too many.
        """
        if -(-size >> self.bits) > _LIMIT:
            raise Unsupported(
                f"the disk can not become {size} bytes long in one go: its regions are of {1 << self.bits} bytes",
                node=self._node.name,
                hint="grow it by less, close it, and go on",
            )
        more = max(0, -(-size >> self.bits) - len(self.state))
        self.state += bytes(more)
        self._open += bytes(more)

    # The guard.

    async def touch(self) -> None:
        await self._touch()

    async def before(self, offset: int, length: int) -> None:
        if not length:
            return
        first = min(offset >> self.bits, len(self.state) - 1)
        last = min((offset + length - 1) >> self.bits, len(self.state) - 1)
        while self._open.find(0, first, last + 1) >= 0:
            if self.state.find(CLOSED, first, last + 1) < 0:
                self.state[first : last + 1] = bytes((OPEN,)) * (last + 1 - first)
                self._open[first : last + 1] = b"\1" * (last + 1 - first)
            else:
                await self._join(first, last)
        self._last = last

    def run(self, offset: int) -> GuardRun:
        at = min(offset >> self.bits, len(self.state) - 1)
        open_ = self._open[at]
        start = self._open.rfind(1 - open_, 0, at) + 1
        end = self._open.find(1 - open_, at)
        end = len(self._open) if end < 0 else end
        return GuardRun(start << self.bits, max(end << self.bits, offset + 1), bool(open_))

    async def before_resize(self, size: int) -> None:
        await self._before_resize(size)

    async def resized(self) -> None:
        await self._resized()

    async def _join(self, first: int, last: int) -> None:
        """Wait for the next batch of marks, which has these."""
        ahead = AHEAD if first == self._last + 1 else 0
        stop = min(last + 1 + ahead, len(self.state))
        self._wanted.update(number for number in range(first, stop) if self.state[number] == CLOSED)
        if self._batch is None:
            self._batch = asyncio.get_running_loop().create_future()
            self._batch.add_done_callback(_looked_at)
        batch = self._batch
        if self._marking is None:
            self._node.begin_background()
            self._marking = asyncio.ensure_future(self._mark_all())
        await asyncio.shield(batch)

    async def _mark_all(self) -> None:
        """Batch after batch, until nobody waits."""
        try:
            while self._batch is not None:
                batch, self._batch = self._batch, None
                regions = sorted(self._wanted)
                self._wanted.clear()
                try:
                    await self._mark(regions)
                except BlockGraphError as error:
                    batch.set_exception(error)
                except BaseException as error:
                    batch.set_exception(error)
                    raise
                else:
                    for number in regions:
                        self.state[number] = self.state[number] or FRESH
                    batch.set_result(None)
        finally:
            self._marking = None
            self._node.end_background()

    # For the store. These are called one at a time, `before` and `run` meanwhile.

    def turn(self) -> list[int]:
        """A turn of the clock; returns the regions to be closed: `quiet`, store the bits, `close`."""
        old = _find(self.state, OLD, 0, len(self.state))
        self.state[:] = self.state.translate(_FRESH_TO_OLD)
        written = self._node.write_gen, sum(extents.extents.stats().bytes_written for extents in self._node.maps)
        most = len(self.state) if written == self._written else BATCH
        self._written = written
        wanted = _find(self.state, OPEN, self._hand, most)
        if len(wanted) < most:
            wanted += _find(self.state[: self._hand], OPEN, 0, most - len(wanted))
        self._hand = (wanted[-1] + 1) % len(self.state) if wanted else 0
        self._withdraw(wanted)
        return old

    def withdraw(self) -> None:
        """The next write into any region is seen."""
        self._withdraw(_find(self.state, OPEN, 0, len(self.state)))

    def _withdraw(self, regions: Iterable[int]) -> None:
        for first, last in _runs(regions):
            for number in range(first, last + 1):
                self.state[number] = FRESH
                self._open[number] = 0
            self._node.revoke(first << self.bits, (last + 1 - first) << self.bits)

    async def quiet(self, regions: Iterable[int]) -> None:
        """Until every write into them that began before they were withdrawn has marked its bits."""
        await self._node.settle()
        runs = [(first << self.bits, (last + 1) << self.bits) for first, last in _runs(regions)]
        for request in list(self._node.in_flight.values()):
            if request.seq in self._node.in_flight and any(
                request.offset < end and start < request.end for start, end in runs
            ):
                await request.wait()

    def close(self, regions: Iterable[int]) -> list[int]:
        """Those that nobody has written since `turn` are closed; returns them."""
        closed = [number for number in regions if self.state[number] == OLD]
        for number in closed:
            self.state[number] = CLOSED
        return closed

    def marked(self) -> list[int]:
        """All regions that are not closed."""
        return [number for number, state in enumerate(self.state) if state]

    @property
    def in_use(self) -> bool:
        """A region is open."""
        return self._open.find(1) >= 0

    def close_all(self) -> Callable[[], None]:
        """None is open: close them. Returns what takes that back: the marks are still there."""
        assert not self.in_use
        before = bytes(self.state)
        self.state[:] = bytes(len(self.state))

        def undo() -> None:
            for number, state in enumerate(before):
                self.state[number] = self.state[number] or state

        return undo


def _find(states: bytes | bytearray, state: int, start: int, most: int) -> list[int]:
    found: list[int] = []
    at = states.find(state, start)
    while at >= 0 and len(found) < most:
        found.append(at)
        at = states.find(state, at + 1)
    return found


def _runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """(first, last) of each run."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


def _looked_at(batch: asyncio.Future[None]) -> None:
    """Those who wait may all have been cancelled."""
    if not batch.cancelled():
        batch.exception()
