# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""RootMap: the extent map of one backend, filled from the drivers and kept true by the nodes.

```
    request ──hit──────────────────────────────► storage        native, no GIL, no node is asked
       │ miss
       ├──► gate ──► nodes, drivers ──► storage                 Python serves the request,
       │                 └── fill: where do these bytes live?   and enters the widest extent it learns
       └──► gate ──► look_up: where do these runs live?         the map is full: back to native code
```

Fills register the map with every node they pass. A node that changes where its bytes live says so in the same step
(`Node.revoke`): the range leaves the map at once, so that later requests miss, and the change's own request does not
end before the native requests that may still use the old place have ended. A fill that began before is refused by its
generation. A drain empties the map behind the closed gate: whatever arrives then misses, and waits there.

Ranges without a place are entered with `allocate` where a node offers native first writes (`driver.FirstWrites`).

Zeroes and discards are native where no node on the way does anything about them (`driver.passes_zeroes`), zeroes also
where the first that does would write them (`driver.zero_unit`), discards where the root's node ignores them, all or
those of no whole unit. Flushes are, when every node that they reach is as durable as Python can make it, and none wants
to see them (`driver.plain_flush`): then native writes in place are all that is left to do. Whatever else happens at one
of these nodes ends that (`Node.not_flushed`), until the next flush in Python.

What is not entered: ranges that a driver wants to see (SPECIAL, not `writable`), writes that a node's guard has to be
asked about first, writes under a dirty bitmap of a node whose offsets differ from the root's, and anything while a
serialising request is in flight on the way, unless that is at the storage: there only its range is held. Requests
that are not as aligned as the storage asks miss, so whatever is read, changed and written back is Python's, and so is
the block with a file's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from blockgraph.driver import Format
from blockgraph.extent import Status
from blockgraph.native import CopierLink, ExtentMap, MapExtent, Zeroing
from blockgraph.native.extent_map import MAX_UNIT
from blockgraph.scattered_faults import ScatteredFaults

if TYPE_CHECKING:
    from blockgraph.driver import FirstWrites
    from blockgraph.native import Bitmap, Copier
    from blockgraph.node import Node

#: What the drivers are asked about at least, bytes: the answer is as wide as they know, this only sets where they look.
_LOOK = 64 << 10
#: Of so many faults in a table of short runs, one enters all of it: that takes as long as this many faults do.
_TABLE_FAULTS = 16
#: Past all offsets.
_MAX_END = (1 << 63) - 1
#: Tables whose faults are counted, at most.
_MAX_TABLES = 4096


def _recorders(node: Node) -> set[Bitmap]:
    """What writes to the node have to mark."""
    return {bitmap.recorder for bitmap in node.bitmaps.values() if bitmap.recording}


class _Step(NamedTuple):
    """A format on the way down.

    Attributes:
        position: in the node, what was asked about.
        low, high: the range of the disk that was still in question.
        shift: from the node's offsets to the disk's.
        child_shift: from the disk's offsets to those of the node's child.
    """

    node: Node
    position: int
    low: int
    high: int
    shift: int
    child_shift: int


class MapOwner(Protocol):
    """Whose requests use a map."""

    @property
    def node(self) -> Node:
        """The node it is attached to now."""
        ...

    @property
    def writable(self) -> bool:
        """Writes are permitted."""
        ...

    def size(self) -> int:
        """Length of the disk, bytes."""
        ...


class RootMap:
    """See the module's text.

    Args:
        backend: attached to a node. Instead of a backend's gate others may use whatever a drain waits for.
        memory: bound, bytes.

    Attributes:
        extents: the native map.
        scattered: which requests that miss are for `look_up`.
    """

    def __init__(self, backend: MapOwner, memory: int) -> None:
        self._backend = backend
        self.extents = ExtentMap(backend.size(), memory)
        self.scattered = ScatteredFaults(self.extents, memory)
        #: nothing on the way to the storage that was found last does anything about zeroes and discards
        self._passes_zeroes = self._punches = True
        #: of the format that does, bytes; 0: none is known
        self._zero_unit = 0
        #: that format, if it may let native code do whole units that keep their place
        self._units: Node | None = None
        #: node -> what to add to its offsets to get the disk's; None: reached in several ways
        self._nodes: dict[Node, int | None] = {}
        self._slots: dict[Node, int] = {}
        #: what every way to a slot allows
        self._zeroing: dict[int, tuple[Zeroing, int]] = {}
        #: through which flushes go
        self._flushing: list[Node] = []
        self._bitmaps: set[Bitmap] = set()
        #: how many are at `forget_bitmaps`
        self._forgetting = 0
        self._copier: CopierLink | None = None
        #: ticket: who asks fewer copiers has ended
        self._linked: int | None = None
        #: faults, by node, offset in it, and offset of the range of the disk that shows it
        self._tables: dict[tuple[Node, int, int, bool], int] = {}
        #: formats whose storage was found to be written in place by whoever may write to them
        self._in_place: set[Node] = set()
        #: does the first writes of this map
        self._first_writes: FirstWrites | None = None
        #: a node on the way has some
        self._offered = False

    @property
    def writes(self) -> bool:
        """Native requests may write."""
        return self._backend.writable

    def storages(self) -> list[int]:
        """Descriptors of what the map has found bytes in."""
        return [fd for node in self._slots if (fd := node.driver.fd()) is not None]

    # Filling.

    async def fill(self, offset: int, length: int, *, written: bool = False) -> None:
        """Enter what is known around `offset`. The caller is inside the backend's gate.

        Args:
            written: the range was just written, or made zero: what lies beside it is entered too, for the first
                writes, or zeroes, there.
        """
        if self.extents.size != self._backend.size():  # another node took the place of the one below
            if any(node.serialising for node in self._nodes):
                return  # or it is being resized, and tells itself
            await self.settle(self.resized())
        if self.writes:
            root = self._backend.node
            self.extents.ignore_discards(MAX_UNIT if root.options.discard != "unmap" else root.driver.zero_unit or 0)
        extent = await self._fill_around(offset, max(length, _LOOK))
        if extent is not None and (self._copier is not None or (written and self._offered)):
            # A request that comes from here has had its clusters copied, or found room. What is beside them need not
            # come here.
            for beside in (extent.offset + extent.length, extent.offset - 1):
                if 0 <= beside < self.extents.size and self.extents.find(beside) is None:
                    await self._fill_around(beside, _LOOK)

    def learns_zeroes(self, offset: int, length: int, *, discard: bool = False, kept: bool = False) -> bool:
        """Whether a range that was just made zero, or discarded, is worth a `fill`: the next one may be native then.

        Args:
            kept: it was to keep its place.
        """
        if self._passes_zeroes or not self._zero_unit:
            return self._punches if discard else self._passes_zeroes
        first = -(-offset // self._zero_unit) * self._zero_unit
        if first + self._zero_unit > offset + length:
            return True
        return kept and self._units is not None and self._units.driver.first_writes is not None

    async def _fill_around(self, offset: int, length: int) -> MapExtent | None:
        generation = self.extents.generation()
        extent = await self._resolve(offset, length, generation)
        if extent is not None:
            self.extents.insert(generation, [extent])
        return extent

    async def look_up(self, runs: Sequence[tuple[int, int]], *, write: bool = False) -> None:
        """Enter what a format can tell at once about many short runs (offset, end).

        The caller is inside the backend's gate, and looks for what is still unknown.

        Args:
            write: enter them to be written, too, where nobody has to be asked or told. Else they are for reading.
        """
        if self._backend.node not in self._nodes or self.extents.size != self._backend.size():
            await self.fill(runs[0][0], runs[0][1] - runs[0][0])  # makes the nodes known to us, and us to them
        generation = self.extents.generation()
        node, shift, low, high = self._backend.node, 0, 0, self.extents.size
        path = [node]
        while not isinstance(node.driver, Format):
            position = runs[0][0] - shift
            extent = (await node.map(position, 1)) if position < node.size() else None
            if extent is None or extent.child is None or extent.status is not Status.DATA:
                return
            write = write and extent.writable and extent.copier is None
            low, high = max(low, extent.offset + shift), min(high, extent.offset + extent.length + shift)
            node, shift = extent.child.node, shift + extent.offset - extent.child_offset
            path.append(node)
        low, high = max(low, shift), min(high, node.size() + shift)
        if any(self._nodes.get(node) is None for node in path):
            return
        inside = [(offset - shift, end - shift) for offset, end in runs if low <= offset and end <= high]
        found = await node.driver.look_up(inside, write=write and node in self._in_place)
        # From here to the insert nothing is awaited.
        if found is None or self._taken([*path, found.storage]):
            return
        if high > self.extents.size:
            return
        self._register(found.storage, None)
        slot = self._slot(found.storage)
        if slot is not None:
            writable = found.writable and self._writes_plainly(path, found.storage)
            within = MapExtent(low, high - low, slot, writable=writable)
            self.extents.insert_parts(generation, found.places, found.parts, found.zeroes, shift, within)

    def _writes_plainly(self, path: Sequence[Node], storage: Node) -> bool:
        """Nothing on the way has to be asked, or told, about a write but bitmaps that the map knows."""
        if not self.writes or self._forgetting:
            return False
        return all(
            node.guard is None
            and self._passes_writes(node, same_offsets=node is not storage and self._nodes[node] == 0)
            and _recorders(node) <= self._bitmaps
            for node in (*path, storage)
        )

    def _passes_writes(self, node: Node, *, same_offsets: bool) -> bool:
        """But for its guard, driver and bitmaps that native writes can mark, a node has nothing to do with writes.

        They set bits by offsets of the disk, up to its size: below a format some happen to be the same.
        """
        if node.read_only or node.options.detect_zeroes != "off":
            return False
        least = max(node.size(), self.extents.size)
        return all(same_offsets and bitmap.size >= least for bitmap in node.bitmaps.values() if bitmap.recording)

    async def _resolve(self, offset: int, length: int, generation: int) -> MapExtent | None:
        """The widest extent around `offset`; None: it has to be asked for each time.

        Where a format has many short ones, they are entered on the way.
        """
        node, shift = self._backend.node, 0
        low, high = 0, self.extents.size
        writable = self._backend.writable
        bitmaps: set[Bitmap] = set()
        copy = False
        path = []
        step = None
        placing: Node | None = None
        zero = False
        zeroing, unit = Zeroing.PUNCH | Zeroing.ZERO_RANGE, 0
        units: Node | None = None
        laid_out = False
        while True:
            path.append(node)
            new = self._register(node, shift)
            if node.driver.first_writes is not None:
                self._offered = True
                if new and len(node.maps) > 1:
                    await node.driver.first_writes.withdraw()
            size = node.size()
            position = offset - shift
            if position >= size:
                if node.driver.growable and not node.read_only:
                    return None  # who writes there makes it longer, and takes nothing back
                low, zero = max(low, size + shift), True
                break
            high = min(high, size + shift)
            if node.guard is not None and writable:
                guarded = node.guard.run(position)
                low, high = max(low, guarded.start + shift), min(high, guarded.end + shift)
                writable = guarded.open
            above = low, high
            extent = await node.map(position, min(length, size - position))
            low = max(low, extent.offset + shift)
            high = min(high, extent.offset + extent.length + shift)
            asked = extent.copier is not None and writable and self._link(extent.copier, shift)
            copy = copy or (asked and not extent.writable)
            writable = writable and self._passes_writes(node, same_offsets=shift == 0)
            if placing is None:
                bitmaps |= _recorders(node)
            # Not below another format: first writes and zeroes are noted by the disk's offsets, whatever the extent.
            if extent.allocate and writable and self._nodes[node] == 0 and not laid_out:
                whole = self._whole_units(node)
                if position < whole:
                    placing, high = node, min(high, whole)
            writable = writable and (extent.writable or asked)
            if extent.child is not None and not unit and not node.driver.passes_zeroes:
                # What is below only gets written. Units have to be the disk's, or cut by its end.
                unit = (node.driver.zero_unit or 0) if zeroing and shift == 0 else 0
                units = node if unit and self._nodes[node] == 0 else None
                zeroing = Zeroing.WRITE if unit else Zeroing.NONE
            laid_out = laid_out or (isinstance(node.driver, Format) and not node.driver.passes_zeroes)
            if node.options.discard != "unmap":
                zeroing &= ~Zeroing.PUNCH
            if extent.status is Status.SPECIAL:
                return None
            cow = node.driver.cow() if extent.status is Status.UNALLOCATED and isinstance(node.driver, Format) else None
            if cow is not None:
                node, writable = cow.node, False
            elif extent.status is not Status.DATA:
                zero = True
                break
            elif extent.child is not None:
                child_shift = extent.child_offset - extent.offset - shift
                step = _Step(node, position, *above, shift, child_shift)
                node = extent.child.node
                shift += extent.offset - extent.child_offset
            else:
                break
        slot = None if zero else self._slot(node)
        self._zero_unit = unit
        self._units = units
        passes = writable and slot is not None and all(above.driver.passes_zeroes for above in path[:-1])
        self._passes_zeroes, self._punches = passes, passes and bool(zeroing & Zeroing.PUNCH)
        if (slot is None and not zero) or low >= high or self._forgetting or self._taken(path):
            return None
        if (writable or placing is not None) and not bitmaps <= self._bitmaps:
            ticket = self.extents.start_set_bitmaps(list(self._bitmaps | bitmaps))
            self._bitmaps |= bitmaps  # only now: what could not be set is not there
            await self.settle(ticket)
        if copy and self._linked is not None:
            await self.settle(self._linked)
        # From here to the insert nothing is awaited.
        if self._forgetting or self._taken(path):  # `begin` revokes, so later is soon enough
            return None
        if high > self.extents.size:  # the disk has become shorter
            return None
        if slot is not None and writable:
            if zeroing and not unit:  # everything may be written that can not be made zero otherwise
                zeroing, unit = zeroing | Zeroing.WRITE, MAX_UNIT
            self._allow_zeroing(slot, zeroing & (node.driver.zeroing() | Zeroing.WRITE), unit)
            if units is not None and placing is None:
                self._attach(units, writes=False)  # zeroes of whole units are its, too
        allocate = placing is not None and self._attach(placing, writes=True)
        copy = copy and (writable or allocate)
        if slot is None:
            return MapExtent(low, high - low, copy=copy, allocate=allocate)
        found = MapExtent(low, high - low, slot, low - shift, writable, copy, allocate)
        if step is not None:
            if writable and not copy:
                self._in_place.add(step.node)
            self._enter_table(step, node, found, generation)
        return found

    def _enter_table(self, step: _Step, storage: Node, found: MapExtent, generation: int) -> None:
        """Enter all that the lowest format knows around an extent that was found there, if it is time for that."""
        driver = step.node.driver
        places = driver.places(step.position) if isinstance(driver, Format) else None
        if places is None:
            return
        if len(self._tables) >= _MAX_TABLES:
            self._tables.clear()
        key = step.node, places.first, step.low, found.writable
        faults = self._tables[key] = self._tables.get(key, -1) + 1
        if faults == 0 and not storage.options.cache.direct:  # else nothing is looked up
            self.scattered.use_tables(len(places.table) // 8, places.cluster_bits)
        if faults % _TABLE_FAULTS == 0 and self.scattered.is_local(found.offset, write=found.writable):
            storage_shift = found.storage_offset - found.offset - step.child_shift
            within = found._replace(offset=step.low, length=step.high - step.low)
            self.extents.insert_places(generation, places, step.shift, storage_shift, within)
            self.scattered.entered(found.offset, writable=found.writable)

    def _link(self, copier: Copier, shift: int) -> bool:
        """Let the map ask `copier`, too. False: in this place of the disk it can not, others being in another one."""
        others = self._copier
        if others is not None and others.shift != shift:
            return False
        if others is None or not others.asks(copier):
            self._copier = CopierLink(copier, shift, others)
            ticket = self.extents.start_set_copier(self._copier)
            self._linked = None if others is None else ticket
        return True

    def _whole_units(self, node: Node) -> int:
        """Up to where the disk shows all of each unit that the node's first writes place."""
        size, unit = self.extents.size, node.driver.zero_unit
        assert unit is not None
        return size if size == node.size() else size // unit * unit

    def _attach(self, node: Node, *, writes: bool) -> bool:
        """Native first writes, or only zeroes, are the node's, if they still can be."""
        first_writes = node.driver.first_writes
        if first_writes is None or self._first_writes not in (None, first_writes) or not first_writes.offered():
            return False
        storage = first_writes.storage
        self._register(storage, None)
        slot = self._slot(storage)
        if slot is None:
            return False
        first_writes.attach(self.extents, slot, writes=writes)
        self._first_writes = first_writes
        return True

    def _register(self, node: Node, shift: int | None) -> bool:
        """Whether the node is a new one."""
        if node in self._nodes:
            if self._nodes[node] != shift:
                self._nodes[node] = None
            return False
        self._nodes[node] = shift
        node.maps.append(self)
        if self.writes:
            for other in node.flushed_by:
                other.extents.dirty()  # it does not see these writes
        return True

    def _slot(self, node: Node) -> int | None:
        slot = self._slots.get(node)
        if slot is None:
            fd = node.driver.fd()
            if fd is None or node.serialising:  # who is serialising has not held anything of it
                return None
            slot = self.extents.add_slot(fd, node.driver.request_alignment, node.driver.memory_alignment)
            self._slots[node] = slot
            windows = node.driver.windows()
            if windows is not None:
                self.extents.set_windows(slot, windows)
        return slot

    def _allow_zeroing(self, slot: int, how: Zeroing, unit: int) -> None:
        before = self._zeroing.get(slot)
        if before is not None:
            how = how & before[0] if unit == before[1] else Zeroing.NONE
        if (how, unit) != before:
            self._zeroing[slot] = how, unit
            self.extents.set_zeroing(slot, how, unit)

    # Flushing.

    async def flush(self) -> None:
        """Make every completed write durable. The caller is inside the backend's gate.

        Afterwards native code does the flushes, until something else than a native write in place has happened.

        Raises:
            IOFailure: could not be made durable.
        """
        root = self._backend.node
        plain = self._watch_flushes(root)
        self.sync_written()
        dirt = self.extents.dirt()
        await root.flush()
        if plain:
            self.extents.flushed(dirt)

    def _watch_flushes(self, root: Node) -> bool:
        """Hear of everything that a flush would have to make durable. False: some node has to see all flushes."""
        if not self._flushing:
            nodes = [root]
            for node in nodes:
                nodes.extend(child.node for child in node.driver.flushed_children() if child.node not in nodes)
            for node in nodes:
                node.flushed_by.append(self)
            self._flushing = nodes
        return all(
            node.driver.plain_flush
            and not node.options.cache.no_flush
            and not any(extents.writes for extents in node.maps if extents is not self)
            for node in self._flushing
        )

    # Revoking.

    def revoke(self, node: Node, offset: int, length: int) -> int:
        """Where [offset, offset + length) of `node` lives has changed. Returns a ticket to settle."""
        shift = self._nodes[node]
        start, end = (0, self.extents.size) if shift is None else self._shown(offset, length, shift)
        return self.extents.start_invalidate(start, end - start)

    def _shown(self, offset: int, length: int, shift: int) -> tuple[int, int]:
        """What the disk has of a node's [offset, offset + length): start and end, the same when nothing."""
        start, end = (min(max(0, at + shift), self.extents.size) for at in (offset, offset + length))
        return start, end

    def _taken(self, path: Sequence[Node]) -> bool:
        """Some serialising request has a range to itself. Where the bytes live it is held, and the rest may be entered;
        but not while bitmaps, which would come back with it, get another size."""
        return any(node.serialising and (node not in self._slots or node.resizing) for node in path)

    def hold(self, node: Node, start: int, end: int) -> tuple[int, int] | None:
        """Keep native requests from [start, end) of the node, if bytes live there: a number for `release`, and a ticket
        to settle. None: revoke it instead."""
        slot = self._slots.get(node)
        return None if slot is None or start >= end else self.extents.start_hold(slot, start, min(end, _MAX_END))

    def release(self, hold: int) -> None:
        """Native requests may use it again."""
        self.extents.release(hold)

    def realigned(self, node: Node) -> int | None:
        """The storage may ask for another alignment. Returns a ticket to settle."""
        slot = self._slots.get(node)
        return None if slot is None else self.extents.start_align_slot(slot, node.driver.request_alignment)

    def resized(self) -> int:
        """The disk may have another size now. Returns a ticket to settle."""
        return self.extents.start_resize(self._backend.size())

    def copied(self, copier: Copier, offset: int, length: int) -> None:
        """[offset, offset + length) of the copier's disk may be written without asking it. Others have to be asked."""
        if self._copier is not None and self._copier.copier is copier and self._copier.others is None:
            start, end = self._shown(offset, length, self._copier.shift)
            self.extents.copied(start, end - start)

    async def settle(self, ticket: int) -> None:
        """Until no native request uses what was revoked."""
        await self.extents.settle(ticket)

    async def clear(self) -> None:
        """Forget everything, and wait for every native request; the gate is closed."""
        for node in self._flushing:
            node.flushed_by.remove(self)
        self._flushing = []
        self.extents.dirty()
        self.extents.ignore_discards(0)
        self._passes_zeroes = self._punches = True
        if not self._nodes:
            return
        if self._first_writes is not None:
            await self._first_writes.withdraw()
        await self.forget_bitmaps()
        if self._copier is not None:
            self._copier = self._linked = None
            self.extents.start_set_copier(None)
        await self.settle(self.extents.start_invalidate(0, self.extents.size))
        for slot in self._slots.values():
            await self.extents.remove_slot(slot)
        self.sync_written()
        for node in self._nodes:
            node.maps.remove(self)
        self._nodes.clear()
        self._slots.clear()
        self._zeroing.clear()
        self._in_place.clear()
        self._tables.clear()
        self.scattered.forget()
        self._first_writes = None
        self._offered = False

    async def forget_bitmaps(self) -> None:
        """No native write marks a bitmap any more: bitmaps are about to be resized, behind a serialising request.

        Writes mark when they are over, so those that are under way keep the bitmaps until then, and others may not
        begin: not all of the map need lead to where the serialising request is.
        """
        if not self._bitmaps:
            return
        self._forgetting += 1
        try:
            await self.settle(self.extents.start_invalidate(0, self.extents.size))
            self._bitmaps.clear()
            await self.extents.set_bitmaps([])
        finally:
            self._forgetting -= 1

    def sync_written(self) -> None:
        """What native requests have written counts as written by every node on the way: a flush goes down to it.

        So does what they have only noted, which a flush that began in the middle of one may have missed.
        """
        written = [node for node, slot in self._slots.items() if self.extents.take_written(slot)]
        if self.extents.take_noted() or written:  # no native flush takes that mark away
            for node in self._nodes:
                node.not_flushed()
        for node in written:
            if code := self.extents.take_flush_error(self._slots[node]):
                node.driver.flush_failed(code)
