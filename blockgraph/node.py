# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Node and Child: the only place where requests are checked, tracked, aligned and traced.

A request reaches a node through an edge (`Child`). The node waits for requests it must not overlap, cuts the request
to what the driver takes (alignment, longest transfer), emulates what the driver does not do (FUA by a flush,
write-zeroes by writing zeroes, unaligned writes by read-modify-write) and calls the driver.

Order of overlapping requests: two ordinary ones do not wait for each other. A *serialising* one (flag SERIALISING, or
an unaligned write) waits for every overlapping request that started before it, and later ones wait for it. Requests
only ever wait for earlier ones, so there is no deadlock here.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from blockgraph import debug, trace
from blockgraph.driver import fill_zero
from blockgraph.errors import GraphError, OutOfRange, ReadOnly, Unsupported
from blockgraph.extent import BlockStatus, Extent
from blockgraph.flags import Flag
from blockgraph.native import MAX_BITS, allocate_aligned, fits, is_zero
from blockgraph.perm import NONE, Perm, Role

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from blockgraph.bitmaps import BitmapStore, DirtyBitmap, WriteGuard
    from blockgraph.driver import Driver
    from blockgraph.native import Bitmap
    from blockgraph.options import NodeOptions
    from blockgraph.root_map import RootMap

#: Longest run of explicit zeroes written by one driver call where write-zeroes is not supported, bytes.
_ZERO_CHUNK = 1 << 20
#: Behind the end of every node.
_NO_END = 1 << 63


class Request:
    """A request in flight on one node.

    Attributes:
        seq: number of the request on its node; grows.
        offset, end: the range, bytes.
        serialising: see the module's text.
        owner: requests of one owner do not wait for each other; None: belongs to nobody.
        holds: what keeps native requests away from the range, by extent map.
    """

    __slots__ = ("_done", "end", "holds", "offset", "owner", "seq", "serialising")

    def __init__(self, seq: int, offset: int, end: int, serialising: bool, owner: object) -> None:
        self.seq = seq
        self.owner = owner
        self.offset = offset
        self.end = end
        self.serialising = serialising
        self.holds: list[tuple[RootMap, int]] = []
        self._done: asyncio.Event | None = None

    async def wait(self) -> None:
        """Until the request has ended."""
        if self._done is None:
            self._done = asyncio.Event()
        await self._done.wait()

    def finish(self) -> None:
        """Wake whoever waits."""
        if self._done is not None:
            self._done.set()


class _Write(NamedTuple):
    """A change of [offset, offset + length), and how it came; `grows`: the node becomes longer by it."""

    edge: Child
    op: str
    offset: int
    length: int
    grows: bool = True


class Node:
    """A vertex of the graph: a driver instance with a name.

    Attributes:
        name: unique in the graph.
        driver: serves the requests.
        options: as described.
        children: edges by child name.
        read_only: writes are refused.
        in_flight: requests by seq, oldest first.
        serialising: how many of them are serialising.
        next_request: seq that the next request will get.
        write_gen: grows with every write; a flush is skipped when nothing was written since the last.
        bitmaps: dirty bitmaps by name.
        bitmap_store: keeps the persistent ones; None: the node has no place for them.
        guard: asked before the node changes; None: nobody has to be.
    """

    def __init__(self, name: str, driver: type[Driver], options: NodeOptions) -> None:
        self.name = name
        self.options = options
        self.read_only = options.read_only
        self.children: dict[str, Child] = {}
        self.in_flight: dict[int, Request] = {}
        self.write_gen = 0
        self.bitmaps: dict[str, DirtyBitmap] = {}
        self.bitmap_store: BitmapStore | None = None
        self.guard: WriteGuard | None = None
        #: bitmap of any node of the graph by node and bitmap name; set by the graph
        self.find_bitmap: Callable[[str, str], Bitmap] = _no_graph
        #: nodes right above that show all of this one, and are as long; set by the graph
        self.shown_by: Callable[[], Iterable[Node]] = tuple
        #: sizes that it is being given
        self._resizing: list[int] = []
        self._flushed_gen = 0
        self.next_request = 1
        self.serialising = 0
        #: extent maps that lead through this node
        self.maps: list[RootMap] = []
        #: extent maps whose flushes come through this node
        self.flushed_by: list[RootMap] = []
        self._revoked: dict[RootMap, int] = {}
        self._background = 0
        self._idle: asyncio.Event | None = None
        self.driver = driver(self, options)
        for child in driver.children:
            setattr(self.driver, attribute(child), None)

    def set_child(self, name: str, child: Child | None) -> None:
        """For the graph: put an edge in place, where the driver finds it as `self.<name>`, or take it away."""
        if child is None:
            self.children.pop(name, None)
        else:
            self.children[name] = child
        setattr(self.driver, attribute(name), child)

    def __repr__(self) -> str:
        return f"<Node {self.name} {self.driver.name}>"

    def shown(self) -> Node:
        """The node whose disk this one shows: the one below it and further filters, or itself."""
        node = self
        while (below := next((c.node for c in node.children.values() if c.role & Role.FILTERED), None)) is not None:
            node = below
        return node

    @property
    def resizing(self) -> bool:
        """A resize is under way: bitmaps are about to get another size."""
        return bool(self._resizing)

    def size(self) -> int:
        """Length of the node, bytes."""
        return self.driver.size()

    # Tracking.

    async def begin(self, offset: int, length: int, *, serialising: bool = False, owner: object = None) -> Request:
        """Register a request, after waiting for earlier ones it must not overlap. Pair with `end`."""
        request = Request(self.next_request, offset, offset + length, serialising, owner)
        self.next_request += 1
        self.in_flight[request.seq] = request
        if serialising:
            self.serialising += 1
        if self.serialising:
            try:
                await self._wait_overlapping(request)
                if serialising and self.maps:
                    self._hold(request)
                    await self.settle()
            except BaseException:
                self.end(request)
                raise
        return request

    def end(self, request: Request) -> None:
        """The request registered by `begin` is over."""
        del self.in_flight[request.seq]
        if request.serialising:
            self.serialising -= 1
            for extents, hold in request.holds:
                extents.release(hold)
        request.finish()
        self._check_idle()

    async def finish(self, request: Request) -> None:
        """`end` for a request that may have changed where bytes live: nobody uses the old place any more."""
        try:
            if self._revoked:
                await self.settle()
        finally:
            self.end(request)

    def revoke(self, offset: int, length: int) -> None:
        """For drivers: where the range lives, or whether it may be written there, has just changed.

        Call it in the same step as the change. The request that made the change does not end before native requests
        that began earlier have ended.
        """
        for extents in self.maps:
            self._revoked[extents] = extents.revoke(self, offset, length)

    def _hold(self, request: Request) -> None:
        """Native requests keep away from the range of a serialising one, from now on or once those that began before
        have ended (`settle`)."""
        for extents in self.maps:
            held = extents.hold(self, request.offset, request.end)
            if held is None:
                self._revoked[extents] = extents.revoke(self, request.offset, request.end - request.offset)
            else:
                number, self._revoked[extents] = held
                request.holds.append((extents, number))

    def realigned(self) -> None:
        """For drivers: `request_alignment` may have changed. When it has become larger, await `settle` next."""
        for extents in self.maps:
            ticket = extents.realigned(self)
            if ticket is not None:
                self._revoked[extents] = ticket

    async def settle(self) -> None:
        """Until no native request uses what was revoked."""
        while self._revoked:
            extents, ticket = next(iter(self._revoked.items()))
            await extents.settle(ticket)
            if self._revoked.get(extents) == ticket:
                del self._revoked[extents]

    async def _wait_overlapping(self, request: Request) -> None:
        for other in list(self.in_flight.values()):
            if other.seq >= request.seq:
                break
            if (
                (other.serialising or request.serialising)
                and other.offset < request.end
                and request.offset < other.end
                and (request.owner is None or other.owner is not request.owner)
                and other.seq in self.in_flight
            ):
                await other.wait()

    def oldest_request(self) -> int:
        """Seq of the oldest request in flight, or of the next one: storage given up before now may be used again
        once this has passed the seq current at that time."""
        for seq in self.in_flight:
            return seq
        return self.next_request

    def begin_background(self) -> None:
        """Work that belongs to no request goes on (a copy that outlived its guest write): drain waits for it."""
        self._background += 1

    def end_background(self) -> None:
        """See begin_background."""
        self._background -= 1
        self._check_idle()

    async def touched(self) -> None:
        """The image is about to change, though no byte of the disk does: who keeps bitmaps of it has to know.

        Raises:
            IOFailure: it may not change.
        """
        if self.guard is not None:
            await self.guard.touch()
        for above in self.shown_by():
            await above.touched()

    def changed(self, offset: int, length: int) -> None:
        """A request that changed the range, or failed in doing so, is over."""
        self.not_flushed()
        for bitmap in self.bitmaps.values():
            bitmap.record(offset, length)
        if self.maps and not self.driver.revokes:
            unit = self.driver.info().cluster_size or 1
            start = offset - offset % unit
            self.revoke(start, _round_up(offset + length, unit) - start)

    def not_flushed(self) -> None:
        """There is something that the next flush has to make durable: it goes down."""
        self.write_gen += 1
        for extents in self.flushed_by:
            extents.extents.dirty()

    @property
    def busy(self) -> bool:
        """Something is in flight."""
        return bool(self.in_flight) or self._background > 0

    def _check_idle(self) -> None:
        if self._idle is not None and not self.busy:
            self._idle.set()
            self._idle = None

    async def wait_idle(self) -> None:
        """Until nothing is in flight; meaningful while drained."""
        while self.busy:
            if self._idle is None:
                self._idle = asyncio.Event()
            await self._idle.wait()

    # Requests.

    async def map(self, offset: int, length: int) -> Extent:
        """`Driver.map`, traced. The caller holds a request on this node."""
        if trace.enabled:
            trace.emit("map", self.name, offset, length)
        return await self.driver.map(offset, length)

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        """What the range contains, from `offset` on; lies inside the range, which lies inside the node."""
        if trace.enabled:
            trace.emit("block_status", self.name, offset, length)
        request = await self.begin(offset, length)
        try:
            inside = min(length, self.size() - offset)  # a request before this one may have made the node shorter
            if inside <= 0:
                return BlockStatus(offset, length, False, True, 0, self)
            length = inside
            align = self.driver.request_alignment
            if align == 1 or not (offset | length) % align:
                return await self.driver.block_status(offset, length)
            start = offset - offset % align
            status = await self.driver.block_status(start, _round_up(offset + length, align) - start)
            end = min(status.offset + status.length, offset + length)
            host = status.host_offset
            return status._replace(
                offset=offset, length=end - offset, host_offset=None if host is None else host + offset - start
            )
        finally:
            self.end(request)

    async def pread(self, offset: int, buf: memoryview) -> None:
        """Fill `buf`; what lies past the end reads as zeroes."""
        if trace.enabled:
            trace.emit("pread", self.name, offset, len(buf))
        buf = self._cut_off(offset, buf)
        if not len(buf):
            return
        request = await self.begin(offset, len(buf))
        try:
            buf = self._cut_off(offset, buf)  # a request before this one may have made the node shorter
            length = len(buf)
            if not length:
                return
            align = self.driver.request_alignment
            if align > 1 and (offset | length) % align:
                start = offset - offset % align
                bounce = allocate_aligned(_round_up(offset + length, align) - start, align)
                await self._pread_cut(start, bounce)
                buf[:] = bounce[offset - start : offset - start + length]
            else:
                await self._pread_cut(offset, buf)
        finally:
            self.end(request)

    def _cut_off(self, offset: int, buf: memoryview) -> memoryview:
        """The part of `buf` that lies inside the node; the rest is made zero."""
        inside = self.driver.size() - offset
        if inside >= len(buf):
            return buf
        inside = max(0, inside)
        fill_zero(buf[inside:])
        return buf[:inside]

    async def _pread_cut(self, offset: int, buf: memoryview) -> None:
        step = self.driver.max_transfer
        if step is None or len(buf) <= step:
            await self.driver.pread(offset, buf)
            return
        for start in range(0, len(buf), step):
            await self.driver.pread(offset + start, buf[start : start + step])

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag, edge: Child) -> None:
        """Write `buf`.

        Args:
            edge: the way it came; has checked permission and bounds, the latter again when nobody is before it.
        """
        length = len(buf)
        if trace.enabled:
            trace.emit("pwrite", self.name, offset, length)
        if not length:
            return
        detect = self.options.detect_zeroes
        if detect != "off" and not flags & Flag.WRITE_UNCHANGED and is_zero(buf):
            unmap = Flag.MAY_UNMAP if detect == "unmap" and self.options.discard == "unmap" else Flag.NONE
            await self._pwrite_zeroes(offset, length, flags | unmap, edge)
            return
        align = self.driver.request_alignment
        unaligned = align > 1 and (offset | length) % align != 0
        tracked = self._tracked_range(offset, length, flags, align if unaligned else 1)
        serialising = unaligned or bool(flags & Flag.SERIALISING)
        request = await self._begin_write(_Write(edge, "pwrite", offset, length), *tracked, serialising=serialising)
        try:
            if self.guard is not None:
                await self.guard.before(offset, length)
            if unaligned:
                await self._pwrite_unaligned(offset, buf, flags, align)
            else:
                await self._pwrite_cut(offset, buf, flags)
        finally:
            self.changed(offset, length)
            await self.finish(request)
        if flags & Flag.FUA and not self.driver.write_flags & Flag.FUA:
            await self.flush()

    def _tracked_range(self, offset: int, length: int, flags: Flag, align: int) -> tuple[int, int]:
        """A serialising write covers the whole clusters it touches: a reader must not copy up around it."""
        if flags & Flag.SERIALISING:
            align = max(align, self.driver.info().cluster_size or 1)
        return offset - offset % align, _round_up(offset + length, align)

    async def _pwrite_cut(self, offset: int, buf: memoryview, flags: Flag) -> None:
        driver = self.driver
        flags &= driver.write_flags
        step = driver.max_transfer
        if step is None or len(buf) <= step:
            await driver.pwrite(offset, buf, flags)
            return
        for start in range(0, len(buf), step):
            await driver.pwrite(offset + start, buf[start : start + step], flags)

    async def _pwrite_unaligned(self, offset: int, buf: memoryview, flags: Flag, align: int) -> None:
        """Read-modify-write of the blocks at both ends; the request is serialising, and tracks blocks of `align` bytes:
        the driver may ask for larger ones by now."""
        start = offset - offset % align
        end = _round_up(offset + len(buf), align)
        bounce = allocate_aligned(end - start, align)
        head = start if offset % align else None
        tail = end - align if (offset + len(buf)) % align else None
        if head is not None:
            await self._pread_rmw("head", head, bounce[:align], align)
        if tail is not None and tail != head:
            await self._pread_rmw("tail", tail, bounce[tail - start :], align)
        bounce[offset - start : offset - start + len(buf)] = buf
        # Never past what the request or the node reaches: padding must not make the node longer.
        last = max(self.size(), offset + len(buf))
        await self._pwrite_cut(start, bounce[: last - start], flags)

    async def _pread_rmw(self, part: str, offset: int, buf: memoryview, align: int) -> None:
        if debug.enabled:
            await self.driver.debug_event(f"pwritev_rmw_{part}")
        inside = max(0, min(len(buf), _round_up(self.size(), align) - offset))
        fill_zero(buf[inside:])
        if inside:
            await self.driver.pread(offset, buf[:inside])
        if debug.enabled:
            await self.driver.debug_event(f"pwritev_rmw_after_{part}")

    async def pwrite_zeroes(self, offset: int, length: int, flags: Flag, edge: Child) -> None:
        """Make the range read as zeroes; falls back to writing them unless NO_FALLBACK is given. `edge`: see pwrite."""
        if trace.enabled:
            trace.emit("write_zeroes", self.name, offset, length)
        if not length:
            return
        if self.options.discard != "unmap":
            flags &= ~Flag.MAY_UNMAP
        await self._pwrite_zeroes(offset, length, flags, edge)

    async def _pwrite_zeroes(self, offset: int, length: int, flags: Flag, edge: Child) -> None:
        align = self.driver.request_alignment
        start = _round_up(offset, align)
        end = (offset + length) - (offset + length) % align
        if start >= end:
            start = end = offset + length
        unaligned = start != offset or end != offset + length
        low, high = self._tracked_range(offset, length, flags, align)
        high = self._end_of_unit(high)
        serialising = unaligned or bool(flags & Flag.SERIALISING)
        request = await self._begin_write(
            _Write(edge, "pwrite_zeroes", offset, length), low, high, serialising=serialising
        )
        try:
            if self.guard is not None:
                await self.guard.before(offset, length)
            if start < end:
                await self._zero_aligned(start, end - start, flags)
            elif flags & Flag.NO_FALLBACK:
                raise self.driver.unsupported("pwrite_zeroes")
            if offset < start:
                await self._pwrite_unaligned(offset, memoryview(bytes(start - offset)), flags, align)
            if end < offset + length:
                await self._pwrite_unaligned(end, memoryview(bytes(offset + length - end)), flags, align)
        finally:
            self.changed(offset, length)
            await self.finish(request)
        if flags & Flag.FUA and not self.driver.zero_flags & Flag.FUA:
            await self.flush()

    async def _zero_aligned(self, offset: int, length: int, flags: Flag) -> None:
        driver = self.driver
        try:
            await driver.pwrite_zeroes(offset, length, flags & driver.zero_flags)
        except Unsupported:
            if flags & Flag.NO_FALLBACK:
                raise
            zeroes = allocate_aligned(min(length, _ZERO_CHUNK), max(driver.request_alignment, 4096))
            for start in range(0, length, len(zeroes)):
                await self._pwrite_cut(offset + start, zeroes[: length - start], flags)

    async def discard(self, offset: int, length: int, edge: Child) -> None:
        """Advisory; parts of blocks at the ends are kept, a node with discard "ignore" does nothing.

        `edge`: see pwrite.
        """
        if trace.enabled:
            trace.emit("discard", self.name, offset, length)
        align = self.driver.request_alignment
        start = _round_up(offset, align)
        end = (offset + length) - (offset + length) % align
        if self.options.discard != "unmap" or start >= end:
            return
        write = _Write(edge, "discard", start, end - start, grows=False)
        request = await self._begin_write(write, start, self._end_of_unit(end))
        try:
            if self.guard is not None:
                await self.guard.before(start, end - start)
            await self.driver.discard(start, end - start)
        except Unsupported:
            pass
        finally:
            self.changed(start, end - start)
            await self.finish(request)

    async def flush(self) -> None:
        """Make durable every write that has completed."""
        if trace.enabled:
            trace.emit("flush", self.name)
        for extents in self.maps:
            extents.sync_written()
        if self.options.cache.no_flush or self._flushed_gen == self.write_gen:
            return
        generation = self.write_gen
        request = await self.begin(0, 0)
        try:
            await self.driver.flush()
        finally:
            self.end(request)
        self._flushed_gen = max(self._flushed_gen, generation)

    async def truncate(self, size: int) -> None:
        """Change the size; a grown area reads as zeroes, and counts as changed: a disk that has been shorter meanwhile
        had something else there."""
        if trace.enabled:
            trace.emit("truncate", self.name, size)
        await self._resize(await self._begin_resize(size), size)

    async def _begin_resize(self, size: int) -> Request:
        """`begin`, with nobody beside it behind where the node ends, now and then; resizes are done in turn."""
        before = [request.offset for request in self.in_flight.values() if request.end == _NO_END]
        low = min(self.size(), size, *before)
        return await self.begin(low, _NO_END - low, serialising=True)

    async def _begin_write(self, write: _Write, low: int, high: int, *, serialising: bool = False) -> Request:
        """`begin` of [low, high) for a change, which lies inside the node, or may make it longer, when nobody is before
        it any more; bitmaps reach as far."""
        while True:
            await self._reach(write)
            request = await self.begin(low, high - low, serialising=serialising)
            try:
                write.edge.check_end(write.op, write.offset, write.length)
                if self._reaches(write):
                    return request
            except BaseException:
                self.end(request)
                raise
            self.end(request)  # the node has become shorter, and is to become longer again

    async def _reach(self, write: _Write) -> None:
        """Before a change: bitmaps reach as far as it, and a node that grows by it has grown.

        Without bitmaps drivers grow by themselves, while they write.
        """
        if self._reaches(write):
            return
        request = await self._begin_resize(write.offset + write.length)
        try:
            write.edge.check_end(write.op, write.offset, write.length)
            reaches = self._reaches(write)  # by one that was faster
        except BaseException:
            self.end(request)
            raise
        if reaches:
            self.end(request)
        else:
            await self._resize(request, max(self._end_of(write), self.size()))

    def _end_of(self, write: _Write) -> int:
        end = write.offset + write.length
        return end if write.grows else min(end, self.size())

    def _reaches(self, write: _Write) -> bool:
        if not self.bitmaps and self.guard is None:
            return True
        end = self._end_of(write)
        bitmaps = self.bitmaps.values()
        return (self.guard is None or end <= self.size()) and all(end <= b.size or b.inconsistent for b in bitmaps)

    def _end_of_unit(self, end: int) -> int:
        """End of the cluster: zeroes up to the node's end take all of the last one, and when the node becomes longer
        there must not be anything yet."""
        return _round_up(end, self.driver.info().cluster_size or 1)

    async def _resize(self, request: Request, size: int) -> None:
        """`truncate`, in the serialising request."""
        self._resizing.append(size)
        try:
            self._check_size(size)
            self._check_above(size)
            await self._resize_checked(size)
        finally:
            self._resizing.remove(size)
            await self.finish(request)

    async def _resize_checked(self, size: int) -> None:
        old = self.size()
        low, high = sorted((old, size))
        try:
            if self.guard is not None:
                await self.guard.before_resize(size)
                await self.guard.before(low, high - low)  # a crash may leave the old size, and what is cut off empty
            for extents in list(self.maps):  # nodes above may have bitmaps, too
                await extents.forget_bitmaps()
            try:
                if size != old:
                    await self.driver.truncate(size)
            except BaseException:
                self._follow_size()
                for bitmap in self.bitmaps.values():  # the size may be as it was, and the bytes not
                    bitmap.record(low, bitmap.size - low)
                raise
            self._follow_size()
        finally:
            self.not_flushed()
            if self.guard is not None:
                await self.guard.resized()
            for extents in self.maps:
                self._revoked[extents] = extents.resized()

    def _follow_size(self) -> None:
        """Bitmaps get the size that the node has now."""
        for bitmap in self.bitmaps.values():
            bitmap.truncate(self.size())

    def recorders(self) -> Iterator[tuple[Node, DirtyBitmap]]:
        """Bitmaps that record what this node shows: its own, and those of nodes above that show all of it."""
        for bitmap in self.bitmaps.values():
            if bitmap.recording:
                yield self, bitmap
        for node in self.shown_by():
            yield from node.recorders()

    def _check_size(self, size: int) -> None:
        """Refuse what no disk, or not all of its bitmaps, can become."""
        if size >= _NO_END:
            raise OutOfRange(f"can not become {size} bytes long", node=self.name, op="truncate")
        for bitmap in self.bitmaps.values():
            if not fits(size, bitmap.granularity):
                raise OutOfRange(
                    f"can not become {size} bytes long: bitmap '{bitmap.name}' would have more than {MAX_BITS} bits",
                    node=self.name,
                    op="truncate",
                    hint="remove the bitmap, or make one with a larger granularity",
                )

    def _check_above(self, size: int) -> None:
        """Refuse to cut off what a bitmap of a node above has: were the node to grow again, nobody would mark it there.

        Who is resized itself, which leads here, has looked further up.
        """
        for above in self.shown_by():
            if size in above._resizing:
                continue
            for node, bitmap in above.recorders():
                if size < bitmap.size:
                    raise OutOfRange(
                        f"can not become {size} bytes long: bitmap '{bitmap.name}' of node '{node.name}', which shows "
                        f"it, records {bitmap.size} bytes and would not hear of it",
                        node=self.name,
                        op="truncate",
                        hint=f"resize '{node.name}' instead, or disable or remove the bitmap",
                    )


class Child:
    """An edge: how a parent reaches a child.

    Attributes:
        parent: name of the parent (a node, or a root).
        name: "file", "backing", ...
        role, need, share: see blockgraph.perm.
        node: what it points to; changed only by a committed transaction.
        grows: with the permission to resize, writes past the end make the node longer.
    """

    __slots__ = ("grows", "name", "need", "node", "parent", "role", "share")

    def __init__(self, parent: str, name: str, role: Role, node: Node) -> None:
        self.parent = parent
        self.name = name
        self.role = role
        self.node = node
        self.need: Perm = NONE
        self.share: Perm = NONE
        self.grows = True

    def __repr__(self) -> str:
        return f"<Child {self.parent}.{self.name} -> {self.node.name}>"

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        """See Node.block_status; past the end of the child: zeroes, not data."""
        if offset >= self.node.size():
            return BlockStatus(offset, length, False, True, 0, self.node)
        return await self.node.block_status(offset, min(length, self.node.size() - offset))

    async def pread(self, offset: int, buf: memoryview) -> None:
        """See Node.pread."""
        await self.node.pread(offset, buf)

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
        """See Node.pwrite.

        Raises:
            ReadOnly: the edge has no write permission.
            OutOfRange: past the end, and the edge may not resize.
        """
        self.check_write("pwrite", offset, len(buf), flags)
        await self.node.pwrite(offset, buf, flags, self)

    async def pwrite_zeroes(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        """See Node.pwrite_zeroes."""
        self.check_write("pwrite_zeroes", offset, length, flags)
        await self.node.pwrite_zeroes(offset, length, flags, self)

    async def discard(self, offset: int, length: int) -> None:
        """See Node.discard."""
        self.check_write("discard", offset, length, Flag.NONE)
        await self.node.discard(offset, length, self)

    async def flush(self) -> None:
        """See Node.flush."""
        await self.node.flush()

    async def truncate(self, size: int) -> None:
        """See Node.truncate.

        Raises:
            ReadOnly: the edge may not resize.
        """
        if not self.need & Perm.RESIZE:
            raise ReadOnly(f"'{self.parent}.{self.name}' has no resize permission", node=self.node.name, op="truncate")
        await self.node.truncate(size)

    async def event(self, name: str) -> None:
        """Tell the child that the parent has come to the point `name` of its work; see blockgraph.debug."""
        if debug.enabled:
            await self.node.driver.debug_event(name)

    def check_write(self, op: str, offset: int, length: int, flags: Flag) -> None:
        """Refuse what the edge's permissions or the node's size forbid."""
        wanted = Perm.WRITE | Perm.WRITE_UNCHANGED if flags & Flag.WRITE_UNCHANGED else Perm.WRITE
        node = self.node
        if not self.need & wanted or node.read_only:
            raise ReadOnly("is read-only here", node=node.name, op=op, offset=offset, length=length)
        self.check_end(op, offset, length)

    def check_end(self, op: str, offset: int, length: int) -> None:
        """Refuse what the node's size forbids."""
        node, size = self.node, self.node.size()
        if offset + length > size and not (self.grows and self.need & Perm.RESIZE and node.driver.growable):
            raise OutOfRange(f"past the end ({size} bytes)", node=node.name, op=op, offset=offset, length=length)


def attribute(name: str) -> str:
    """The Python attribute for a name of a description."""
    return name.replace("-", "_")


def _no_graph(node: str, name: str) -> Bitmap:
    raise GraphError(f"bitmap '{name}' can not be looked up outside a graph", node=node)


def _round_up(value: int, align: int) -> int:
    return value + -value % align
