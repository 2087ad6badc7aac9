# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Sidecar: the persistent bitmaps of a node in a file beside its image, of use after a crash, too.

```
 disk.img              disk.img.bitmaps
                         clean    ──begin──►  in use            ──save──►  clean
                         all bits             bits | regions                all bits
                                               ▲   ▲ marked before their first write (WriteAhead)
                                               └───┴ a turn of the clock: bits of quiet regions stored, marks cleared
```

After an unclean stop a bitmap that was recording holds its stored bits and all marked regions: a superset of what has
changed, for marks are durable before a write is issued and cleared only after the bits are. With `crash_safe` off
nothing is marked but that the file is in use, and an unclean stop leaves bitmaps that are inconsistent.

What takes something away from a bitmap (clear, remove, the end of a job) becomes durable later: until then a crash
brings it back, a superset. What adds something (add, enable, merge) is durable before it has succeeded.

A file whose image is not the one it was stored for (`identity`) is left as it is; its bitmaps are inconsistent, each
with the reason. A disk that nobody writes for a while has a clean sidecar, though it is open.
"""

from __future__ import annotations

import asyncio
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from blockgraph.bitmaps import identity
from blockgraph.bitmaps.bitmap import DirtyBitmap
from blockgraph.bitmaps.epochs import Epochs
from blockgraph.bitmaps.sidecar_file import SidecarFile
from blockgraph.bitmaps.sidecar_format import (
    MAX_BITMAPS,
    MAX_BITS,
    SECTOR,
    SECTOR_REGIONS,
    SLOTS,
    Area,
    Chunk,
    Entry,
    Identity,
    Slot,
    map_length,
    new_entry,
    pack_directory,
    pack_heartbeat,
    pack_regions,
)
from blockgraph.bitmaps.sidecar_read import UNIT, Contents, read_bits, read_contents, read_slot, read_stamps
from blockgraph.bitmaps.write_ahead import WHOLE, WriteAhead, region_bits
from blockgraph.errors import BlockGraphError, CorruptImage, GraphError, IOFailure, NoSpace, ReadOnly
from blockgraph.native import Bitmap

if TYPE_CHECKING:
    from blockgraph.node import Node

log = logging.getLogger(__name__)

SUFFIX = ".bitmaps"

#: Bytes of chunks held at a time while storing.
_BATCH = 16 << 20
#: Attempts to make a busy disk's sidecar clean.
_ATTEMPTS = 3


@dataclass(frozen=True)
class _Kept:
    """What a bitmap had before a change that may be undone."""

    name: str
    granularity: int
    enabled: bool
    bits: Bitmap
    epochs: Epochs | None


@dataclass
class _Plan:
    """What to store of one bitmap.

    Attributes:
        entry: as it is to be, chunks as they are stored now.
        version: of the bitmap; None: it has to be stored again.
        numbers: chunks to be stored anew.
        epochs: of the bitmap.
        stamps: its chunks that are to be stored anew.
    """

    entry: Entry
    bits: Bitmap
    version: int | None
    numbers: Iterable[int]
    epochs: Epochs | None = None
    stamps: dict[int, bytes] = field(default_factory=dict)

    def take_stamps(self) -> None:
        """As they are now; those of a new entry all."""
        if self.epochs is not None:
            every = not self.entry.stamps
            numbers = self.epochs.numbers() if every else sorted(self.epochs.changed)
            self.stamps = {number: self.epochs.pack(number) for number in numbers}
            self.epochs.changed.clear()
            self.entry = replace(self.entry, epoch=self.epochs.current)


class Sidecar:
    """See the module's text, and `LiveStore`.

    Args:
        node: whose bitmaps they are.
        path: of the file; need not exist.
        crash_safe: None: as the file says, and on in a new one.

    Attributes:
        reason: why what is stored is of no use; None: it is, or there is nothing.
        recovered: an unclean stop was made up for when it was loaded.
    """

    def __init__(self, node: Node, path: str, *, crash_safe: bool | None = None) -> None:
        self._node = node
        self._crash_safe = crash_safe
        self.file = SidecarFile(path, node.name)
        self.reason: str | None = None
        self.recovered = False
        self._now = Contents()
        #: versions of the bitmaps that are stored
        self._versions: dict[str, int | None] = {}
        self._kept: list[_Kept] = []
        #: the node's size before and after a resize that is under way, or may not have reached the disk
        self._resizing: tuple[int, int] | None = None
        #: the image is made durable for a clean file
        self._cleaning = False
        #: the header that says "in use" is this session's
        self._begun = False
        #: a newer header than ours may be in the file, or become it: it could not be made durable
        self._doubtful = False
        #: flushes that have failed
        self._failures = 0
        self._guard = WriteAhead(node, self._mark, self._before_resize, self._resized, self._touch)
        self._clock: asyncio.Task[None] | None = None
        # Taken in this order. Nobody waits for requests while holding the second or third, which requests wait for.
        self._turning = asyncio.Lock()
        self._saving = asyncio.Lock()
        self._writing = asyncio.Lock()
        self._disowning = asyncio.Lock()

    @property
    def path(self) -> str:
        """Of the file."""
        return self.file.path

    @property
    def crash_safe(self) -> bool:
        """See the module's text."""
        return self._now.slot.crash_safe if self._crash_safe is None else self._crash_safe

    def check(self, bitmap: DirtyBitmap) -> None:
        """See BitmapStore."""
        count = sum(other.persistent for other in self._node.bitmaps.values())
        if count >= MAX_BITMAPS:
            raise GraphError(f"sidecar '{self.path}' has {count} bitmaps already", node=self._node.name, op="add")
        if -(-bitmap.size // bitmap.granularity) > MAX_BITS:
            raise GraphError(
                f"a bitmap of {bitmap.size} bytes at {bitmap.granularity} has too many bits",
                node=self._node.name,
                op="add",
                hint="give it a larger granularity",
            )

    # Loading.

    async def load(self) -> list[DirtyBitmap]:
        """See BitmapStore.

        Raises:
            CorruptImage: the file is damaged, or no sidecar.
            IOFailure: it can not be read; another process or node has it, and this node may write.
        """
        bitmaps = await self._read()
        self.recovered = self._now.slot.in_use and self.reason is None and bool(bitmaps)
        if self.recovered:
            log.warning(
                "node '%s': sidecar '%s' was not closed; its bitmaps mark up to %d bytes more than have changed",
                self._node.name,
                self.path,
                self._now.marks.count() // UNIT << self._now.slot.region_bits,
            )
        if any(not bitmap.inconsistent for bitmap in bitmaps):
            self._watch()
        return bitmaps

    async def _read(self, *, unfit: bool = True) -> list[DirtyBitmap]:
        """The file's bitmaps; those that do not fit the image only with `unfit`."""
        if not self._node.read_only and self.file.exists():
            self.file.open_locked()
        try:
            fd, busy = self.file.borrow()
        except FileNotFoundError:
            return []
        try:
            self._now = await read_contents(self.file, fd)
            self.reason = "another process or node is writing the image" if busy else await self._why()
            if self.reason is not None and not unfit:
                return []
            return [await self._load(fd, entry) for entry in self._now.entries.values()]
        except CorruptImage as error:
            raise self._corrupt(error.reason) from None
        except MemoryError:
            raise self._corrupt("there is no memory for its bitmaps") from None
        finally:
            self.file.give_back(fd)

    def _corrupt(self, reason: str) -> CorruptImage:
        return CorruptImage(
            f"sidecar '{self.path}': {reason}",
            node=self._node.name,
            op="load",
            hint="move it away or remove it, and make a full backup next",
        )

    async def _why(self) -> str | None:
        slot = self._now.slot
        if not slot.sequence or not self._now.entries:
            return None
        image = await identity.identify(self._node)
        if not slot.in_use:
            return identity.why_changed(slot, image)
        if not slot.crash_safe:
            return "the image was not closed, and crash-safe is off"
        return identity.why_lost(slot, image, self._now.heartbeat)

    async def _load(self, fd: int, entry: Entry) -> DirtyBitmap:
        node, slot = self._node, self._now.slot
        reason = entry.inconsistent or self.reason
        if reason is None and entry.size not in (slot.image.size, slot.next_size):
            reason = f"it is of a disk of {entry.size} bytes"
        bits = Bitmap(entry.size if reason is None else node.size(), entry.granularity)
        epochs: Epochs | None = None
        if reason is None:
            reason = await read_bits(self.file, fd, entry, bits)
        if reason is None and entry.epoch is not None:
            epochs = Epochs(entry.size, entry.granularity, 8 << entry.chunk_bits, entry.epoch)
            reason = await read_stamps(self.file, fd, entry, epochs)
        bitmap = DirtyBitmap(
            entry.name,
            node.size(),
            entry.granularity,
            node=node.name,
            enabled=entry.enabled,
            persistent=True,
            inconsistent=reason is not None,
            reason=reason or "",
        )
        if reason is not None:
            log.warning(
                "node '%s': bitmap '%s' is inconsistent: %s; the next backup has to be a full one",
                node.name,
                entry.name,
                reason,
            )
            self._versions[entry.name] = bitmap.version
            return bitmap
        if epochs is not None:
            bitmap.epochs = epochs
            epochs.truncate(node.size())
            epochs.changed.clear()
        recovering = slot.in_use or entry.size != node.size()
        bits.truncate(node.size())
        if slot.in_use and entry.enabled:
            for start, length in self._now.marks.dirty_extents():
                first, end = (start // UNIT) << slot.region_bits, ((start + length) // UNIT) << slot.region_bits
                if first < node.size():
                    bits.set(first, min(end, node.size()) - first)
        bitmap.replace(bits)
        self._versions[entry.name] = None if recovering else bitmap.version
        return bitmap

    # Changes.

    def keep(self, bitmap: DirtyBitmap) -> Callable[[], None]:
        """See LiveStore. The node is drained."""
        kept = _Kept(bitmap.name, bitmap.granularity, bitmap.enabled, bitmap.contents(), bitmap.epochs)
        self._kept.append(kept)
        return lambda: self._kept.remove(kept)

    async def begin(self) -> None:
        """See BitmapStore."""
        async with self._saving:
            if self._begun:
                return
            if self._node.read_only:
                raise ReadOnly("is read-only, and so are its bitmaps", node=self._node.name, op="change bitmaps")
            self._watch()
            await self._own()
            async with self._writing:
                await self._commit(in_use=True, fresh=True)
                self._begun = True
        if self.crash_safe and self._clock is None:
            self._clock = asyncio.ensure_future(self._run_clock())

    async def store(self) -> None:
        """See LiveStore."""
        async with self._saving:
            if self._begun:
                await self._commit(in_use=True)
                return
        async with self._turning:
            await self._clean()

    async def save(self) -> None:
        """See BitmapStore. While the node is written all the time, the file stays in use, and as exact as can be."""
        async with self._turning:
            if not self._begun and not self._changed():
                return
            for _ in range(_ATTEMPTS):
                self._guard.withdraw()
                await self._guard.quiet(self._guard.marked())
                if await self._clean():
                    return
            async with self._saving:
                await self._commit(in_use=True)

    async def close(self) -> None:
        """See LiveStore."""
        async with self._turning, self._saving:
            if self._clock is not None:
                self._clock.cancel()
                with suppress(asyncio.CancelledError):
                    await self._clock
                self._clock = None
            self.file.close()
        if self._node.guard is self._guard:
            self._node.guard = None

    def _watch(self) -> None:
        """Be asked before the node changes. No native writes are known yet: it is being opened, or drained."""
        if self._node.guard is None:
            size = self._node.size()
            self._guard.set_regions(region_bits(size) if self.crash_safe else WHOLE, size)
            self._node.guard = self._guard

    async def _own(self) -> None:
        """The file is ours, and what we loaded is what it has."""
        if self.file.writable:
            return
        self.file.open_locked()
        fd, _ = self.file.borrow()
        slot = await read_slot(self.file, fd)
        if (slot.sequence if slot else 0) != self._now.slot.sequence:
            self.file.close()
            raise IOFailure(
                f"sidecar '{self.path}' was changed by another process or node",
                node=self._node.name,
                hint="open the image again",
            )

    def _persistent(self) -> Iterator[DirtyBitmap]:
        return (bitmap for bitmap in self._node.bitmaps.values() if bitmap.persistent)

    def _changed(self) -> bool:
        """Something is not stored, though nothing was written."""
        return {bitmap.name: bitmap.version for bitmap in self._persistent()} != self._versions or any(
            bitmap.enabled != self._now.entries[bitmap.name].enabled for bitmap in self._persistent()
        )

    # The clock.

    async def _run_clock(self) -> None:
        told: str | None = None
        while True:
            await asyncio.sleep(identity.BEAT)
            try:
                await self.turn()
            except BlockGraphError as error:
                if str(error) != told:  # once, not every few seconds
                    log.error("sidecar of node '%s', which keeps more marks than it has to: %s", self._node.name, error)
                told = str(error)
            else:
                told = None

    async def turn(self) -> None:
        """A turn of the clock: the heartbeat, quiet regions closed, changes stored.

        Raises:
            IOFailure: the file could not be written; what is stored is a superset all the same.
        """
        self._node.begin_background()
        try:
            async with self._turning:
                await self._turn()
        finally:
            self._node.end_background()

    async def _turn(self) -> None:
        if not self._begun:
            if self._changed():
                await self._clean()
            return
        old = self._guard.turn()
        await self._guard.quiet(old)
        rest = len(self._guard.state) - self._guard.state.count(0) - len(old)
        if not rest and not self._kept and identity.times_of(self._node) is not None and await self._clean():
            return
        if old or self._changed():
            async with self._saving:
                await self._commit(in_use=True, regions=old)
                closed = self._guard.close(old)
                for number in closed:
                    self._now.marks.reset(number * UNIT, UNIT)
                async with self._writing:
                    await self._write_marks(closed)
        elif rest:
            async with self._writing:
                since = self._failures
                await self._write_marks(())
                await self._sync(since)

    async def _clean(self) -> bool:
        """Store everything, and say that the file is clean. False: somebody writes."""
        async with self._saving, self._writing:
            if self._guard.in_use:
                return False
            await self._own()
            # From here on writers wait for the second lock, and then begin anew.
            written = self._guard.marked()
            undo = self._guard.close_all()
            self._cleaning = True
            try:
                image = await identity.identify(self._node, final=True)
                await self._commit(in_use=False, regions=written, image=image)
                if identity.times_of(self._node) != image.times:  # metadata was written meanwhile, and did not wait
                    await self._commit(in_use=True, fresh=True)
                    return False
            except BaseException as error:
                if self._doubtful:  # writers have to come to `_mark`; all is stored anew
                    self._versions.clear()
                else:
                    undo()
                if isinstance(error, OSError):
                    raise IOFailure.from_oserror(error, node=self._node.name, op="save bitmaps") from error
                raise
            finally:
                self._cleaning = False
            self._begun = False
            self.file.cut(self._now.space.end())
            return True

    # The guard's.

    async def _mark(self, regions: Sequence[int]) -> None:
        """Make marks durable."""
        while True:
            if not self._begun:
                await self.begin()
            async with self._writing:
                if not self._begun:
                    continue
                await self._disown()
                since = self._failures
                if self.crash_safe:
                    for number in regions:
                        self._now.marks.set(number * UNIT, UNIT)
                    await self._write_marks(regions)
                    await self._sync(since)
                return

    async def _write_marks(self, regions: Iterable[int]) -> None:
        """Write the sectors of these regions as they are now, and the heartbeat."""
        slot, marks = self._now.slot, self._now.marks
        parts = [(slot.map_at, pack_heartbeat(slot.salt, identity.now()))]
        parts += [
            (slot.map_at + (1 + sector) * SECTOR, _sector(slot.salt, marks, sector))
            for sector in sorted({number // SECTOR_REGIONS for number in regions})
        ]
        await self.file.write(parts)

    async def _sync(self, since: int) -> None:
        """What was written after `_failures` had this value is durable.

        Raises:
            IOFailure: it may not be. A flush that fails tells one of those who wait, and no later one tells it again.
        """
        try:
            await self.file.sync()
        except BaseException:
            self._failures += 1
            raise
        if self._failures != since:
            raise IOFailure(f"sidecar '{self.path}': a flush has failed meanwhile", node=self._node.name, op="flush")

    async def _touch(self) -> None:
        # What is written while the image is made durable is seen to afterwards.
        if not self._begun and not self._cleaning and not self._node.read_only:
            await Sidecar.begin(self)  # no more: what an image keeps itself stays as it is

    async def _before_resize(self, size: int) -> None:
        await self.begin()
        async with self._saving, self._writing:
            if self.crash_safe:
                self._guard.grow(size)
                self._resizing = self._node.size(), size
                await self._commit(in_use=True, fresh=True)

    async def _resized(self) -> None:
        try:
            # Until the image has its new size for sure, either counts.
            await self._node.flush()
            async with self._saving, self._writing:
                self._resizing = None
                if self.crash_safe:
                    await self._commit(in_use=True, fresh=True)
        except BlockGraphError as error:
            log.error("sidecar of node '%s' after a change of its size: %s", self._node.name, error)

    # Storing.

    async def _commit(
        self,
        *,
        in_use: bool,
        regions: Sequence[int] = (),
        image: Identity | None = None,
        fresh: bool = False,
    ) -> None:
        """Lead a new header to what the bitmaps hold.

        The caller has `_saving`; with `fresh`, or not `in_use`, also `_writing`.

        Args:
            regions: those that may have been written since their bits were stored, and whose marks are to go.
            image: for a clean file.
            fresh: with a new region map.
        Raises:
            IOFailure: the old header counts; while `_doubtful`, once `_disown` has succeeded.
        """
        await self._disown()
        now, node, since = self._now, self._node, self._failures
        plans = self._plan(regions)
        allocated: list[Area] = []
        try:
            entries: dict[str, Entry] = {}
            freed: list[Area] = []
            for plan in plans:
                entries[plan.entry.name] = await self._store_chunks(plan, allocated, freed)
            for name, entry in now.entries.items():
                if name not in entries:
                    freed += entry.areas()
            raw = pack_directory(entries.values())
            freed.append(now.slot.directory)
            directory = Area(self._allocate(len(raw), allocated) if raw else 0, len(raw), zlib.crc32(raw))
            size, next_size = self._resizing or (node.size(), node.size())
            slot = replace(
                now.slot,
                sequence=now.slot.sequence + 1,
                uuid=now.slot.uuid if now.slot.sequence else os.urandom(16),
                in_use=in_use,
                crash_safe=self.crash_safe,
                image=image or Identity(size, identity.times_of(node)),
                next_size=next_size,
                boot=identity.boot_id(),
                directory=directory,
                bitmaps=len(entries),
                written=identity.now(),
            )
            parts = [(directory.offset, raw)] if raw else []
            marks = now.marks
            if fresh or not in_use:
                freed.append(Area(now.slot.map_at, map_length(now.slot.regions) if now.slot.map_at else 0))
                slot = replace(slot, map_at=0, regions=0)
                marks = Bitmap(0, UNIT)
            if fresh and self.crash_safe:
                slot, marks = self._new_map(slot, allocated)
                parts += _map_parts(slot, marks)
            await self.file.write(parts)
            await self._sync(since)
            try:
                await self.file.write([(SLOTS[slot.sequence % 2], slot.pack())])
                await self._sync(since)
            except BaseException:
                self._doubtful = True
                raise
        except BaseException:
            now.space.give_up(allocated)
            for plan in plans:
                if plan.epochs is not None:
                    plan.epochs.changed.update(plan.stamps)
            with suppress(IOFailure):
                await self._disown()
            raise
        now.space.free(freed)
        now.space.settle()
        now.slot, now.entries, now.marks = slot, entries, marks
        self._versions = {plan.entry.name: plan.version for plan in plans}
        with suppress(IOFailure):
            # Should the new header rot, the old one must not be taken for it: later marks do not count for it.
            await self.file.write([(SLOTS[(slot.sequence - 1) % 2], bytes(SECTOR))])

    async def _disown(self) -> None:
        """No header that failed is in the file: it knows nothing of later marks, and what it leads to is given up.

        Raises:
            IOFailure: it may be there; nothing may change that our header does not tell.
        """
        async with self._disowning:
            if self._doubtful:
                since = self._failures
                await self.file.write([(SLOTS[(self._now.slot.sequence + 1) % 2], bytes(SECTOR))])
                await self._sync(since)
                self._doubtful = False

    def _new_map(self, slot: Slot, allocated: list[Area]) -> tuple[Slot, Bitmap]:
        """A region map; in a running session with the marks that there are."""
        regions = len(self._guard.state)
        marks = Bitmap(regions * UNIT, UNIT)
        if self._begun:
            for start, length in self._now.marks.dirty_extents():
                marks.set(start, length)
        at = self._allocate(map_length(regions), allocated)
        return replace(slot, region_bits=self._guard.bits, regions=regions, map_at=at, salt=os.urandom(16)), marks

    def _plan(self, regions: Sequence[int]) -> list[_Plan]:
        """What to store, as it is at this moment."""
        plans: dict[str, _Plan] = {}
        for bitmap in self._persistent():
            entry, bits = self._now.entries.get(bitmap.name), bitmap.contents()
            version: int | None = bitmap.version
            numbers: Iterable[int] = ()
            if bitmap.inconsistent or bitmap.size not in (self._resizing or (self._node.size(),)):
                reason = bitmap.reason or "it may have missed writes"
                if not bitmap.inconsistent:
                    reason = f"the disk has become {self._node.size()} bytes long without it"
                entry = replace(entry or new_entry(bitmap.name, bitmap.granularity, bitmap.size), inconsistent=reason)
            else:
                blank = new_entry(bitmap.name, bitmap.granularity, bitmap.size)
                if entry is None or (entry.granularity, entry.size, entry.chunk_bits, entry.inconsistent) != (
                    blank.granularity,
                    blank.size,
                    blank.chunk_bits,
                    None,
                ):
                    entry = blank
                # Marks do not count for a bitmap that records no more: what they stood for is stored with that.
                stops = entry.enabled and not bitmap.enabled
                if self._versions.get(bitmap.name) == version and entry is not blank and not stops:
                    numbers = self._numbers(entry, regions)
                else:
                    numbers = range(entry.count)
            epochs = None if entry.inconsistent is not None else bitmap.epochs
            plans[bitmap.name] = _Plan(replace(entry, enabled=bitmap.enabled), bits, version, numbers, epochs)
        for kept in self._kept:
            plans[kept.name] = self._with_kept(kept, plans.get(kept.name))
        for plan in plans.values():
            plan.take_stamps()
        return list(plans.values())

    def _with_kept(self, kept: _Kept, plan: _Plan | None) -> _Plan:
        if plan is None:
            entry = new_entry(kept.name, kept.granularity, kept.bits.size)
            return _Plan(replace(entry, enabled=kept.enabled), kept.bits, None, range(entry.count), kept.epochs)
        if plan.entry.inconsistent is not None or plan.bits.size != kept.bits.size:
            return plan
        bits = plan.bits.copy()
        bits.merge(kept.bits)
        enabled = plan.entry.enabled or kept.enabled
        return _Plan(replace(plan.entry, enabled=enabled), bits, None, range(plan.entry.count), plan.epochs)

    def _numbers(self, entry: Entry, regions: Iterable[int]) -> Iterable[int]:
        """Chunks that the regions touch."""
        shift, size = self._guard.bits, entry.size
        return sorted(
            {
                number
                for region in regions
                if region << shift < size
                for number in range(
                    (region << shift) // entry.span, (min((region + 1) << shift, size) - 1) // entry.span + 1
                )
            }
        )

    async def _store_chunks(self, plan: _Plan, allocated: list[Area], freed: list[Area]) -> Entry:
        entry, chunks = plan.entry, dict(plan.entry.chunks)
        old = self._now.entries.get(entry.name)
        if old is not None and entry.chunks is not old.chunks:
            freed += old.areas()
        numbers = list(plan.numbers)
        step = max(1, _BATCH >> entry.chunk_bits)
        for first in range(0, len(numbers), step):
            raws = await asyncio.to_thread(_chunks, entry, plan.bits, numbers[first : first + step])
            parts: list[tuple[int, bytes]] = []
            for number, raw in raws:
                was = chunks.pop(number, None)
                if was is not None:
                    freed.append(Area(was.offset, entry.length(number)))
                if raw is not None:
                    at = self._allocate(len(raw), allocated)
                    chunks[number] = Chunk(at, zlib.crc32(raw))
                    parts.append((at, raw))
            await self.file.write(parts)
        stamps = dict(entry.stamps)
        for number, raw in plan.stamps.items():
            was = stamps.pop(number, None)
            if was is not None:
                freed.append(Area(was.offset, len(raw)))
            stamps[number] = Chunk(self._allocate(len(raw), allocated), zlib.crc32(raw))
            await self.file.write([(stamps[number].offset, raw)])
        return replace(entry, chunks=chunks, stamps=stamps)

    def _allocate(self, length: int, allocated: list[Area]) -> int:
        full = NoSpace(f"sidecar '{self.path}' is full", node=self._node.name)
        at = self._now.space.allocate(length, full)
        allocated.append(Area(at, length))
        return at


def _chunks(entry: Entry, bits: Bitmap, numbers: Iterable[int]) -> list[tuple[int, bytes | None]]:
    """Bits of chunks; None: all clean."""
    found: list[tuple[int, bytes | None]] = []
    for number in numbers:
        start = number * entry.span
        end = min(start + entry.span, bits.size)
        dirty = bits.next_dirty(start, end) is not None
        found.append((number, bits.serialise(start, end - start) if dirty else None))
    return found


def _sector(salt: bytes, marks: Bitmap, number: int) -> bytes:
    start = number * SECTOR_REGIONS * UNIT
    length = min(SECTOR_REGIONS * UNIT, marks.size - start)
    return pack_regions(salt, marks.serialise(start, length).ljust(SECTOR - 4, b"\0"))


def _map_parts(slot: Slot, marks: Bitmap) -> list[tuple[int, bytes]]:
    sectors = range(-(-slot.regions // SECTOR_REGIONS))
    raw = pack_heartbeat(slot.salt, slot.written) + b"".join(_sector(slot.salt, marks, number) for number in sectors)
    return [(slot.map_at, raw)]
