# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Extent maps (native/extent_map.h): guest range -> where its bytes live, and requests served by that without the GIL.

The rules of who may insert and who must invalidate are in that header; in short:

    generation = extents.generation()          a miss: read this first,
    ... ask the drivers, holding the requests that any change has to wait for ...
    extents.insert(generation, [MapExtent(...)])

    await extents.invalidate(offset, length)   a change: nobody uses the old place any more when this returns,
    ... move the bytes ...                     and later requests miss

Cost, 4 KiB in the page cache, Linux 6.18 (benchmarks/bench_in_process.py): `pread_into` of a backend takes as long as
os.preadv.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Sequence
from enum import IntFlag
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from blockgraph._native import ffi, lib
from blockgraph.native.check import check
from blockgraph.native.requests import Requests, requests_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from blockgraph.native.allocator import Allocator
    from blockgraph.native.bitmap import Bitmap
    from blockgraph.native.copier import CopierLink
    from blockgraph.native.l2 import L2Parts, L2Places
    from blockgraph.native.windows import Windows

DEFAULT_MEMORY = 64 << 20
"""Bytes that a map may use, unless told otherwise."""

MIN_MEMORY: int = lib.BG_MAP_MIN_MEMORY

_MISS: int = lib.BG_MAP_MISS
_ZERO: int = lib.BG_MAP_ZERO
_WRITABLE: int = lib.BG_MAP_WRITABLE
_COPY: int = lib.BG_MAP_COPY
_ALLOCATE: int = lib.BG_MAP_ALLOCATE
_EINVAL = -errno.EINVAL
_EXTENTS = ffi.typeof("bg_map_extent[]")


#: A unit that no disk has, bytes.
MAX_UNIT = 1 << 62


class Zeroing(IntFlag):
    """What native code may do to a storage.

    PUNCH: make holes, for what is discarded and for zeroes that need no space.
    ZERO_RANGE: make zero what stays allocated.
    WRITE: write zeroes, for requests that cover no whole unit of the disk, whose last one may be short.

    With PUNCH alone it is a discard.
    """

    NONE = 0
    PUNCH = lib.BG_MAP_PUNCH
    ZERO_RANGE = lib.BG_MAP_ZERO_RANGE
    WRITE = lib.BG_MAP_WRITE_ZEROES


class MapExtent(NamedTuple):
    """A range of the disk and where its bytes live, all the way down.

    Attributes:
        offset, length: in the disk, bytes; length > 0.
        slot: the storage, from `ExtentMap.add_slot`; None: reads as zeroes.
        storage_offset: where in the storage; of no meaning for zeroes.
        writable: may be overwritten in place; of no meaning for zeroes.
        copy: before it is written the map's copier has to be asked.
        allocate: a write makes the map's allocator find room.
    """

    offset: int
    length: int
    slot: int | None = None
    storage_offset: int = 0
    writable: bool = False
    copy: bool = False
    allocate: bool = False

    def flags(self) -> int:
        """As the native map has them."""
        flags = (_COPY if self.copy else 0) | (_ALLOCATE if self.allocate else 0)
        return flags | (_ZERO if self.slot is None else _WRITABLE if self.writable else 0)


class MapStats(NamedTuple):
    """Counters since the map was made, and what it holds now."""

    hits: int
    """Requests that were begun natively."""
    misses: int
    """Requests that were not."""
    bytes_read: int
    """Of hits."""
    bytes_written: int
    inserts: int
    """Extents taken."""
    stale: int
    """Extents refused: invalidated since their generation was read."""
    invalidations: int
    protections: int
    evictions: int
    """Regions dropped for want of memory."""
    extents: int
    """Held now, including those of the wide level that a region hides."""
    regions: int
    """Held one by one now; regions inside a wide extent need nothing."""
    bytes: int
    """Memory in use, everything included."""
    limit: int
    """Memory that may be used."""
    first_writes: int
    """Writes done with the help of a copier or an allocator; not among the hits."""
    recalls: int
    """Regions that were dropped for want of memory and looked up natively again, in the image's table."""


class ExtentMap:
    """The extent map of one root. Any thread may call any method, unless it says otherwise; each is atomic.

    A method `start_x` makes a change at once and returns a ticket, which settles when all requests that began before
    have ended; `settle` and `settle_blocking` wait for that. `x` is both in one, for coroutines.

    Args:
        size: of the disk, bytes.
        memory: most bytes to use, at least MIN_MEMORY; least recently used regions are dropped.
    Raises:
        ValueError: an argument is out of range.
        MemoryError: no memory.
    """

    def __init__(self, size: int, memory: int = DEFAULT_MEMORY) -> None:
        out = ffi.new("bg_map **")
        try:
            code = lib.bg_map_new(size, memory, out)
        except OverflowError:
            code = _EINVAL
        if code == _EINVAL:
            raise ValueError(f"an extent map of {size} bytes needs at least {MIN_MEMORY} of memory, not {memory}")
        _check_memory(code)
        self._native = ffi.gc(out[0], lib.bg_map_free)
        self._requests = requests_of(self._native)
        self._waiting: dict[asyncio.Future[None], int] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._bitmaps: tuple[Bitmap, ...] = ()
        self._copier: CopierLink | None = None
        self._allocator: Allocator | None = None
        self._windows: dict[int, Windows] = {}
        # What native requests may still use, with the ticket after which they no longer do.
        self._former: list[tuple[int, object]] = []

    def __repr__(self) -> str:
        stats = self.stats()
        return f"<ExtentMap size={self.size} extents={stats.extents} bytes={stats.bytes}>"

    @property
    def native(self) -> Any:
        """The `bg_map *`, for native request loops; keep this object as long as it is used."""
        return self._native

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return int(lib.bg_map_size(self._native))

    # Requests.

    @property
    def requests(self) -> Requests:
        """Reads and writes as below, that return codes."""
        return self._requests

    def pread_into(self, offset: int, buf: Buffer) -> bool:
        """Fill `buf` with the disk's bytes from `offset` on. Blocks for as long as the storage does, without the GIL.

        Args:
            buf: writable, contiguous.
        Returns:
            False when some of the range is not mapped, or not aligned for its storage: nothing was done then.
        Raises:
            ValueError: the range is not inside the disk.
            OSError: the storage failed; `buf` is then unspecified.
        """
        code = self._requests.pread_into(offset, buf)
        if code < 0:
            self._refuse(code, offset, memoryview(buf).nbytes)
        return code == 0

    def pwrite(self, offset: int, buf: Buffer) -> bool:
        """Write `buf` (contiguous) at `offset`, and set the bits of the map's bitmaps. Blocks as `pread_into` does.

        Returns:
            False when some of the range is not mapped to writable data, or not aligned: nothing was done then.
        Raises:
            ValueError: the range is not inside the disk.
            OSError: the storage failed; any part may have been written.
        """
        code = self._requests.pwrite(offset, buf)
        if code < 0:
            self._refuse(code, offset, memoryview(buf).nbytes)
        return code == 0

    def zero(self, offset: int, length: int, how: Zeroing) -> bool:
        """Make zero what `pwrite` might overwrite in place, by the first of PUNCH, ZERO_RANGE and WRITE that `how` has
        and the storage allows (see set_zeroing). The copier is asked as by `pwrite`. Blocks, without the GIL.

        Returns:
            False when that is not possible.
        Raises:
            ValueError: the range is not inside the disk.
            OSError: the storage failed.
        """
        code = _call(lib.bg_map_zero, self._native, offset, length, int(how))
        if code < 0:
            self._refuse(code, offset, length)
        return code == 0

    # Filling.

    def generation(self) -> int:
        """To be read before the drivers are asked what to insert."""
        return int(lib.bg_map_generation(self._native))

    def insert(self, generation: int, extents: Sequence[MapExtent]) -> int:
        """Insert extents, each over what it overlaps; neighbours that continue each other become one.

        An extent is refused when part of its region (16 MiB, more for very large disks or little memory) was
        invalidated since `generation` was read, or its slot removed. When it was only protected, it goes in without
        `writable`.

        Args:
            generation: as read before the drivers were asked.
        Returns:
            How many were not refused. Nothing promises that one stays.
        Raises:
            ValueError: an extent is not inside the disk, or its slot or storage offset is out of range; none is taken.
        """
        try:
            items = ffi.new(
                _EXTENTS,
                [(e.offset, e.length, e.storage_offset, -1 if e.slot is None else e.slot, e.flags()) for e in extents],
            )
            code = lib.bg_map_insert(self._native, generation, items, len(items))
        except OverflowError:
            code = _EINVAL
        if code < 0:
            raise ValueError(f"an extent is not inside the disk of {self.size} bytes, or its slot or place is wrong")
        return int(code)

    def insert_places(
        self, generation: int, places: L2Places, shift: int, storage_shift: int, within: MapExtent
    ) -> int:
        """Insert all data clusters of an L2 table, as `insert` does. What memory is short of later is read there again.

        Args:
            generation: as read before the drivers were asked.
            shift: added to offsets in the image to get the disk's.
            storage_shift: added to host offsets to get the storage's.
            within: its range of the disk bounds what is entered; its slot, and how to write where the table says that
                a cluster is the image's alone, hold for all.
        Returns:
            How many extents were not refused.
        Raises:
            ValueError: the range is not inside the disk, or the slot out of range.
        """
        native = _places(places, shift, storage_shift, within)
        code = lib.bg_map_insert_l2(self._native, generation, native.places)
        if code < 0:
            raise ValueError(f"range {within.offset}+{within.length} or slot {within.slot} is not in the map")
        return int(code)

    def insert_parts(
        self, generation: int, places: L2Places, parts: L2Parts, zeroes: bool, shift: int, within: MapExtent
    ) -> int:
        """Insert what parts of many L2 tables say, as `insert_places` does, zeroes too.

        Args:
            places: what the parts have in common; the table is theirs, `first` is 0.
            zeroes: what is unallocated reads as zeroes.
        """
        native = _places(places, shift, 0, within)
        code = lib.bg_map_insert_l2_parts(self._native, generation, native.places, parts.native, len(parts), zeroes)
        if code < 0:
            raise ValueError(f"range {within.offset}+{within.length} or slot {within.slot} is not in the map")
        return int(code)

    def find(self, offset: int) -> MapExtent | None:
        """What is mapped around `offset`, cut to its region; None: nothing, or not inside the disk."""
        out = ffi.new("bg_map_extent *")
        try:
            found = lib.bg_map_find(self._native, offset, out)
        except OverflowError:
            return None
        if not found:
            return None
        zero = out.flags & _ZERO
        return MapExtent(
            out.offset,
            out.length,
            None if zero else out.slot,
            out.storage_offset,
            bool(out.flags & _WRITABLE),
            bool(out.flags & _COPY),
            bool(out.flags & _ALLOCATE),
        )

    # Taking away.

    def start_invalidate(self, offset: int, length: int) -> int:
        """Remove a range: later requests miss. Returns a ticket.

        Raises:
            ValueError: the range is not inside the disk.
        """
        return self._take_away(lib.bg_map_invalidate, offset, length)

    async def invalidate(self, offset: int, length: int) -> None:
        """Remove a range, and wait until no request uses what was mapped.

        Raises:
            ValueError: the range is not inside the disk.
        Cancelled: the range is removed; requests may still use it.
        """
        await self.settle(self.start_invalidate(offset, length))

    def start_protect(self, offset: int, length: int) -> int:
        """Take `writable` away: later writes miss. Returns a ticket; errors as start_invalidate."""
        return self._take_away(lib.bg_map_protect, offset, length)

    async def protect(self, offset: int, length: int) -> None:
        """Take `writable` away, and wait until no write uses it (nor a read). Otherwise as `invalidate`."""
        await self.settle(self.start_protect(offset, length))

    def start_resize(self, size: int) -> int:
        """The disk has a new size: drop everything. Returns a ticket.

        Raises:
            ValueError: size is negative, or a bitmap of the map is smaller.
            MemoryError: no memory; nothing has changed.
        """
        code = _call(lib.bg_map_resize, self._native, size)
        if code == _EINVAL:
            raise ValueError(f"the disk can not have {size} bytes, or a bitmap of the map has fewer")
        return _check_memory(code)

    async def resize(self, size: int) -> None:
        """Resize, and wait until no request uses what was mapped."""
        await self.settle(self.start_resize(size))

    # Storage.

    def add_slot(self, fd: int, alignment: int = 1, memory_alignment: int = 1) -> int:
        """A place where bytes live; returns its slot, a small number.

        Args:
            fd: borrowed until the ticket of `start_remove_slot` has settled.
            alignment: of offsets and lengths, a power of two; requests that are not aligned miss.
            memory_alignment: of memory, a power of two; what is elsewhere is copied on the way.
        Raises:
            ValueError: an argument is out of range.
            OSError: all slots are taken (ENOSPC).
        """
        code = _call(lib.bg_map_add_slot, self._native, fd, alignment, memory_alignment)
        if code == _EINVAL:
            raise ValueError(
                f"descriptor {fd}, or alignments {alignment} and {memory_alignment}, "
                f"which must be powers of two up to {lib.BG_MAP_MAX_ALIGNMENT}"
            )
        return check(code)

    def start_align_slot(self, slot: int, alignment: int) -> int:
        """The slot asks for another alignment of requests. Returns a ticket: until then some may have the one before.

        Raises:
            ValueError: there is no such slot, or alignment.
        """
        code = _call(lib.bg_map_align_slot, self._native, slot, alignment)
        if code < 0:
            raise ValueError(f"there is no slot {slot}, or no alignment {alignment}")
        return code

    def start_hold(self, slot: int, start: int, end: int) -> tuple[int, int]:
        """Keep [start, end) of a slot's storage from native requests: they miss from now on.

        Returns:
            A number for `release`, and a ticket: then those that began before have ended.
        Raises:
            ValueError: there is no such slot, or the range is empty.
            MemoryError: no memory; nothing is held.
        """
        ticket = ffi.new("int64_t *")
        number = _call(lib.bg_map_hold, self._native, slot, start, end, ticket)
        if number == _EINVAL:
            raise ValueError(f"there is no slot {slot}, or no range [{start}, {end})")
        return _check_memory(number), int(ticket[0])

    def release(self, number: int) -> None:
        """End a hold.

        Raises:
            ValueError: there is no such hold.
        """
        if _call(lib.bg_map_release, self._native, number) < 0:
            raise ValueError(f"there is no hold {number}")

    def set_windows(self, slot: int, windows: Windows) -> None:
        """Where the slot's bytes are in memory; borrowed like its descriptor.

        Raises:
            ValueError: the slot is out of range.
        """
        if _call(lib.bg_map_set_windows, self._native, slot, windows.native) < 0:
            raise ValueError(f"there is no slot {slot}")
        self._windows[slot] = windows

    def start_remove_slot(self, slot: int) -> int:
        """Everything that lives there is a miss from now on. Returns a ticket; after that the descriptor may go.

        Take `take_written` once more after that.

        Raises:
            ValueError: there is no such slot.
        """
        code = _call(lib.bg_map_remove_slot, self._native, slot)
        if code < 0:
            raise ValueError(f"there is no slot {slot}")
        return code

    async def remove_slot(self, slot: int) -> None:
        """Remove a slot, and wait until no request uses its descriptor."""
        await self.settle(self.start_remove_slot(slot))

    def take_noted(self) -> bool:
        """Whether the allocator has noted something since the last call, which its node has to make durable."""
        return bool(lib.bg_map_take_noted(self._native))

    def take_written(self, slot: int) -> bool:
        """Whether native writes to the slot were completed since the last call, are being made durable now, or could
        not be: the storage needs a flush. Native flushes miss until it has had one (`flushed`).

        Raises:
            ValueError: the slot is out of range.
        """
        code = _call(lib.bg_map_take_written, self._native, slot)
        if code < 0:
            raise ValueError(f"there is no slot {slot}")
        return code == 1

    def set_zeroing(self, slot: int, how: Zeroing, unit: int = 0) -> None:
        """What native code may do to the bytes of a slot; at first nothing.

        Args:
            unit: of WRITE, bytes, a power of two.
        Raises:
            ValueError: the slot is out of range, or WRITE has no such unit.
        """
        if _call(lib.bg_map_set_zeroing, self._native, slot, int(how), unit) < 0:
            raise ValueError(f"there is no slot {slot}, or {unit} is no unit for it")

    def ignore_discards(self, unit: int) -> None:
        """A `zero` that is a discard does nothing from now on where it covers no whole unit of the disk.

        Args:
            unit: bytes, a power of two; 0: none is ignored.
        """
        if _call(lib.bg_map_ignore_discards, self._native, unit) < 0:
            raise ValueError(f"{unit} is no unit")

    # Durability.

    def flush(self) -> bool:
        """Make durable all writes that were completed. Blocks, without the GIL.

        Returns:
            False when there may be more to do than to make native writes durable, or the storage failed: see
            `take_flush_error`.
        """
        return bool(lib.bg_map_flush(self._native, 1) == 0)

    def dirt(self) -> int:
        """To be read before a flush in Python begins, and given to `flushed` when it was successful."""
        return int(lib.bg_map_dirt(self._native))

    def dirty(self) -> None:
        """Something was changed that only a flush in Python makes durable; to be called in the same step."""
        lib.bg_map_dirty(self._native)

    def flushed(self, dirt: int) -> None:
        """What was changed up to `dirt` is durable: unless more was, native writes are all there is to be flushed."""
        lib.bg_map_flushed(self._native, dirt)

    def take_flush_error(self, slot: int) -> int:
        """The errno of a native flush of the slot that failed since the last call, or 0.

        Raises:
            ValueError: the slot is out of range.
        """
        code = _call(lib.bg_map_take_flush_error, self._native, slot)
        if code < 0:
            raise ValueError(f"there is no slot {slot}")
        return code

    def start_set_bitmaps(self, bitmaps: Sequence[Bitmap]) -> int:
        """Replace the bitmaps that native writes mark when they are over. Returns a ticket.

        Until it settles, writes under way may mark either the former ones or these: before a bitmap is taken away, what
        leads to it is invalidated, and that settles. A bitmap must not be resized while the map has it. To be called
        from one thread at a time.

        Raises:
            ValueError: a bitmap is smaller than the disk.
            MemoryError: no memory.
        """
        new = tuple(bitmaps)
        code = lib.bg_map_set_bitmaps(self._native, [bitmap._bitmap for bitmap in new], len(new))
        if code == _EINVAL:
            raise ValueError(f"a bitmap is smaller than the disk of {self.size} bytes")
        ticket = _check_memory(code)
        self._keep(ticket, self._bitmaps)
        self._bitmaps = new
        return ticket

    async def set_bitmaps(self, bitmaps: Sequence[Bitmap]) -> None:
        """Replace the bitmaps, and wait until no write marks a former one."""
        await self.settle(self.start_set_bitmaps(bitmaps))

    def start_set_copier(self, copier: CopierLink | None) -> int:
        """Who is asked before extents with `copy` are written; None: nobody, such writes miss. Returns a ticket.

        Until it settles, writes under way may ask the former ones, and take `copy` away when these are done. To be
        called from one thread at a time.
        """
        ticket = int(lib.bg_map_set_copier(self._native, ffi.NULL if copier is None else copier.hook))
        self._keep(ticket, self._copier)
        self._copier = copier
        return ticket

    def copied(self, offset: int, length: int) -> None:
        """Take `copy` away, wherever it is: the copier need not be asked there any more.

        Raises:
            ValueError: the range is not inside the disk.
        """
        if _call(lib.bg_map_copied, self._native, offset, length) < 0:
            raise ValueError(f"range {offset}+{length} is not inside the disk of {self.size} bytes")

    def start_set_allocator(self, allocator: Allocator | None) -> int:
        """What first writes into extents with `allocate` use; None: they miss. Returns a ticket.

        Until it settles, writes under way may use the former one. To be called from one thread at a time.
        """
        ticket = int(lib.bg_map_set_allocator(self._native, ffi.NULL if allocator is None else allocator.hook))
        self._keep(ticket, self._allocator)
        self._allocator = allocator
        return ticket

    def _keep(self, ticket: int, former: object) -> None:
        self._former = [item for item in self._former if not self.is_settled(item[0])]
        self._former.append((ticket, former))

    # Tickets.

    def is_settled(self, ticket: int) -> bool:
        """Whether all requests that began before the ticket was given have ended."""
        return bool(lib.bg_map_settled(self._native, ticket))

    async def settle(self, ticket: int) -> None:
        """Wait for a ticket, without blocking the loop; does not suspend when it has settled.

        Raises:
            RuntimeError: coroutines of another loop are waiting at this map.
        Cancelled: nothing has changed.
        """
        if lib.bg_map_notify(self._native, ticket):
            return
        loop = asyncio.get_running_loop()
        descriptor = lib.bg_map_eventfd(self._native)
        if not self._waiting:
            self._loop = loop
            loop.add_reader(descriptor, self._collect)
        elif self._loop is not loop:
            raise RuntimeError("coroutines of another loop are waiting at this extent map")
        future: asyncio.Future[None] = loop.create_future()
        self._waiting[future] = ticket
        try:
            await future
        finally:
            del self._waiting[future]
            if not self._waiting:
                self._loop = None
                loop.remove_reader(descriptor)

    def settle_blocking(self, ticket: int) -> None:
        """Wait for a ticket in this thread, without the GIL. Not for a thread that runs a loop."""
        lib.bg_map_wait(self._native, ticket)

    def _collect(self) -> None:
        lib.bg_map_acknowledge(self._native)
        for future, ticket in self._waiting.items():
            if not future.done() and lib.bg_map_notify(self._native, ticket):
                future.set_result(None)

    def stats(self) -> MapStats:
        """Counters, and memory in use."""
        out = ffi.new("bg_map_stats *")
        lib.bg_map_get_stats(self._native, out)
        return MapStats(*ffi.unpack(ffi.cast("int64_t *", out), len(MapStats._fields)))

    def _take_away(self, function: Callable[..., int], offset: int, length: int) -> int:
        code = _call(function, self._native, offset, length)
        if code < 0:
            self._refuse(code, offset, length)
        return code

    def _refuse(self, code: int, offset: int, length: int) -> NoReturn:
        size = self.size
        if offset < 0 or length < 0 or offset + length > size:
            raise ValueError(f"range {offset}+{length} is not inside the disk of {size} bytes")
        raise OSError(-code, os.strerror(-code))


class _Places(NamedTuple):
    """A `bg_l2_places *`, and what it points to."""

    places: Any
    table: Any
    metadata: Any


def _places(places: L2Places, shift: int, storage_shift: int, within: MapExtent) -> _Places:
    table, metadata = ffi.from_buffer(places.table), ffi.from_buffer("uint64_t[]", places.metadata)
    native = ffi.new(
        "bg_l2_places *",
        {
            "table": table,
            "entries": len(places.table) // 8,
            "cluster_bits": places.cluster_bits,
            "version": places.version,
            "metadata": metadata,
            "metadata_count": len(places.metadata),
            "host_end": places.host_end,
            "host": places.host,
            "disk": places.first + shift,
            "low": within.offset,
            "high": within.offset + within.length,
            "storage": storage_shift,
            "slot": -1 if within.slot is None else within.slot,
            "flags": within.flags(),
        },
    )
    return _Places(native, table, metadata)


def _call(function: Callable[..., int], *args: Any) -> int:
    try:
        return function(*args)
    except OverflowError:
        return _EINVAL


def _check_memory(code: int) -> int:
    if code == -errno.ENOMEM:
        raise MemoryError("no memory for an extent map")
    return check(code)
