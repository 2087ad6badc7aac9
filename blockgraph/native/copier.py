# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Copy before write (native/copier.h): claims of clusters, and guest writes that copy without Python."""

from __future__ import annotations

import asyncio
import enum
import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from blockgraph._native import ffi, lib
from blockgraph.native.check import check
from blockgraph.native.pool import get_pool

if TYPE_CHECKING:
    from blockgraph.native.bitmap import Bitmap
    from blockgraph.native.extent_map import ExtentMap
    from blockgraph.native.sums import Sums

_NO_LIMIT: int = lib.BG_BITMAP_NO_LIMIT
_RUN = ffi.typeof("bg_bitmap_extent *")


class CopierMode(enum.IntEnum):
    """What happens to a native write that meets clusters not done yet."""

    OFF = lib.BG_COPIER_OFF
    """It is left to Python."""
    ON = lib.BG_COPIER_ON
    """It copies them first, when both maps know where they are and nobody in Python is at them."""
    BROKEN = lib.BG_COPIER_BROKEN
    """It goes on: nobody needs the old bytes any more."""


class CopierSide(enum.IntFlag):
    """Where a copy comes from and goes to."""

    SOURCE = lib.BG_COPIER_SOURCE
    TARGET = lib.BG_COPIER_TARGET


class CopierStats(NamedTuple):
    """What native writes have done so far."""

    copied: int
    """Bytes of clusters."""
    moved: int
    """Of these, read and written; the rest were zeroes that the target had already."""
    refused: int
    """Writes that were left to Python."""


class ClaimedRun(NamedTuple):
    """Clusters [offset, end) that the caller has taken to copy; `number` names the claim."""

    number: int
    offset: int
    end: int


class CopiedRange(NamedTuple):
    """What `Copier.copy` did.

    Attributes:
        whole: all of the range is copied now. Else the maps do not know some of it, it failed, Python has a claim, or
            the mode forbids it.
        copied: bytes of clusters that this call has done.
        moved: of these, read and written.
    """

    whole: bool
    copied: int
    moved: int


class Runs:
    """Runs that are to be copied, found by `Copier.find_runs`. Bounds are (offset, end), bytes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._native = ffi.new("bg_copier_run[]", most)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def _some(self, wanted: Callable[[Any], int]) -> list[tuple[int, int]]:
        return [(run.start, run.end) for run in self._native[0 : self._count] if wanted(run)]

    def unmapped(self, side: CopierSide) -> list[tuple[int, int]]:
        """Those of which that side's map does not know some place, as of `Copier.check_runs`."""
        bit = int(side)  # & of an IntFlag takes longer than the rest
        return self._some(lambda run: run.unmapped & bit)

    def missed(self) -> int | None:
        """Where the first begins that `Copier.copy_runs` has left some of."""
        return next((int(run.start) for run in self._native[0 : self._count] if run.missed), None)

    def released(self) -> list[tuple[int, int]]:
        """Those that the guest may overwrite after `Copier.copy_runs`."""
        return self._some(lambda run: run.released)

    @property
    def start(self) -> int:
        """Of the first."""
        return int(self._native[0].start)

    @property
    def end(self) -> int:
        """Of the last."""
        return int(self._native[self._count - 1].end)


class Copier:
    """Who copies which cluster. Any thread may call any method but `native_ended`; each is atomic.

    Args:
        todo: clusters still to be copied.
        done: clusters that the guest may overwrite; of the same size and granularity.
        source, target: where the bytes are and go, of the same size. What they do not know is left to Python.
    Raises:
        ValueError: sizes or granularities differ.
    """

    def __init__(self, todo: Bitmap, done: Bitmap, source: ExtentMap, target: ExtentMap) -> None:
        out = ffi.new("bg_copier **")
        code = lib.bg_copier_new(todo._bitmap, done._bitmap, source.native, target.native, out)
        if code == -errno.EINVAL:
            raise ValueError("bitmaps and maps of a copier must be of one size, bitmaps of one granularity")
        check(code)
        self._native = ffi.gc(out[0], lib.bg_copier_free)
        self._borrowed = todo, done, source, target
        self._sums: Sums | None = None
        self._waiting: set[asyncio.Future[None]] = set()

    def set_mode(self, mode: CopierMode) -> None:
        """For writes from now on; copies under way go on."""
        lib.bg_copier_set_mode(self._native, mode)

    def set_sums(self, sums: Sums) -> None:
        """Native copies that begin from now on add what they write there; what fails is spoiled."""
        if lib.bg_copier_set_sums(self._native, sums.native) < 0:
            raise ValueError(f"sums of {sums.size} bytes are not of this disk")
        self._sums = sums

    def take(self, offset: int, end: int, max_length: int | None = None) -> ClaimedRun | None:
        """Claim the first run that is to be copied in [offset, end); None: there is none. See Bitmap.take."""
        run = ffi.new(_RUN)
        number = lib.bg_copier_take(self._native, offset, end, _NO_LIMIT if max_length is None else max_length, run)
        if number == -errno.EINVAL:
            raise ValueError(f"range from {offset} to {end} is not inside the disk, or not aligned to clusters")
        return ClaimedRun(number, run.start, run.end) if check(number) else None

    def finish(self, number: int, *, copied: bool) -> None:
        """End a claim; when it was not copied it is to be copied again."""
        check(lib.bg_copier_finish(self._native, number, copied))

    def pending(self, offset: int, end: int) -> bool:
        """Some of [offset, end) is not copied yet, or is being copied."""
        return check(lib.bg_copier_pending(self._native, offset, end)) == 1

    def copy(self, offset: int, end: int) -> CopiedRange:
        """Copy what is still to be copied of [offset, end), as a native write would; blocks, without the GIL."""
        out = ffi.new("bg_copier_stats *")
        whole = check(lib.bg_copier_copy(self._native, offset, end, out)) == 0
        return CopiedRange(whole, out.copied, out.moved)

    def find_runs(self, offset: int, longest: int, size: int, most: int) -> Runs:
        """What is to be copied first from `offset` on: runs shorter than `longest`, up to the first that is not.

        Args:
            size: bytes of them all, at least a cluster; the last is cut.
            most: how many, at most.
        """
        runs = Runs(most)
        code = lib.bg_copier_find_runs(self._native, offset, longest, size, runs._native, most)
        if code < 0:
            raise ValueError(f"no runs of {size} bytes can be found from {offset} on")
        runs._count = code
        return runs

    def check_runs(self, runs: Runs) -> CopierSide:
        """Find out what the maps do not know: of some run, on these sides."""
        return CopierSide(check(lib.bg_copier_check_runs(self._native, runs._native, len(runs))))

    async def copy_runs(self, runs: Runs) -> CopiedRange:
        """Copy what is still to be copied of each, as `copy` does, and release it; what others copy is left to them.

        Cancelled: after that.
        """
        out = ffi.new("bg_copier_stats *")

        def start(queue: Any, ticket: int) -> int:
            return int(lib.bg_copier_start_runs(self._native, runs._native, len(runs), out, queue, ticket))

        missed = check(await get_pool().run(start, (self, runs, out)))
        return CopiedRange(missed == 0, out.copied, out.moved)

    def claimed(self, offset: int, end: int) -> int:
        """Number of a claim that touches [offset, end); -1: a native write's; 0: there is none."""
        return int(lib.bg_copier_claimed(self._native, offset, end))

    def freeze(self, offset: int, length: int) -> int:
        """No native write overwrites any of the range until it is thawed.

        Returns:
            A number for that; 0: the guest may have overwritten some of it already.
        """
        return check(lib.bg_copier_freeze(self._native, offset, length))

    def thaw(self, number: int) -> None:
        """The range is not being read any more."""
        check(lib.bg_copier_thaw(self._native, number))

    def release(self, offset: int, end: int) -> bool:
        """Copied clusters are done, except where a range is frozen. True when all of them are."""
        return check(lib.bg_copier_release(self._native, offset, end)) == 1

    async def native_ended(self, offset: int, end: int) -> None:
        """Until some native claim has ended; at once when none touches [offset, end). Look again after that.

        All callers must be coroutines of one loop.
        """
        if not lib.bg_copier_watch(self._native, offset, end):
            return
        loop = asyncio.get_running_loop()
        descriptor = lib.bg_copier_eventfd(self._native)
        if not self._waiting:
            loop.add_reader(descriptor, self._collect)
        future: asyncio.Future[None] = loop.create_future()
        self._waiting.add(future)
        try:
            await future
        finally:
            self._waiting.remove(future)
            if not self._waiting:
                loop.remove_reader(descriptor)

    def _collect(self) -> None:
        lib.bg_copier_acknowledge(self._native)
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    def stats(self) -> CopierStats:
        """Counters."""
        out = ffi.new("bg_copier_stats *")
        lib.bg_copier_get_stats(self._native, out)
        return CopierStats(out.copied, out.moved, out.refused)


class CopierLink:
    """A copier as a map sees it, and others that are asked as well, for `ExtentMap.start_set_copier`.

    Args:
        shift: where in the map's disk the copier's byte 0 is.
        others: a chain, which may be in use.
    """

    def __init__(self, copier: Copier, shift: int, others: CopierLink | None = None) -> None:
        out = ffi.new("bg_copier_link **")
        check(lib.bg_copier_link_new(copier._native, shift, ffi.NULL if others is None else others._native, out))
        self._native: Any = ffi.gc(out[0], lib.bg_copier_link_free)
        self.copier = copier
        self.shift = shift
        self.others = others

    def asks(self, copier: Copier) -> bool:
        """Whether it is one of those that are asked."""
        return self.copier is copier or (self.others is not None and self.others.asks(copier))

    @property
    def hook(self) -> Any:
        """The `bg_map_copier *`; keep this object as long as it is used."""
        return lib.bg_copier_link_hook(self._native)
