# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The copying of clusters that backup-top and its job share.

```
   native guest write ──────────┐
   guest write ──► backup-top ──┤                      ┌──► target
                                ├──► BlockCopy ──copy──┤
   backup job's loop ───────────┘   (one bitmap)       └◄── source (frozen until copied)
```

`bitmap` has a bit for every cluster still to be copied. Whoever copies *first clears* the bits, then copies, and sets
them again when that fails; whoever finds an overlapping copy in flight waits for it and looks again. So a cluster is
read once however many want it, and never after it changed: a set bit means the source still holds the old bytes.
An error is raised only by the call whose own I/O failed.

Where the file system can let two files share blocks, the loop has it do that (btrfs, xfs), and where a server can copy,
that (NFS, SMB); elsewhere reading and writing is faster (native/copy.h).

Native guest writes copy on their own thread, where the extent maps of both sides know the place; `copier` has
everybody's claims. A native write that meets a claim of this module, an error or an unknown place comes here instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Literal, NamedTuple

from blockgraph.errors import BlockGraphError, IOFailure
from blockgraph.extent import BlockStatus, Status
from blockgraph.finish import finish
from blockgraph.flags import Flag
from blockgraph.native import (
    Bitmap,
    ClaimedRun,
    CopiedRange,
    Copier,
    CopierMode,
    CopierSide,
    CopyError,
    CopyExtent,
    CopyFlag,
    CopyProgress,
    MapExtent,
    Runs,
    Sums,
    allocate_aligned,
    get_pool,
    offload,
)
from blockgraph.native.extent_map import DEFAULT_MEMORY
from blockgraph.perm import Perm, Role
from blockgraph.resolve import Leaf, Pins
from blockgraph.root_map import RootMap

if TYPE_CHECKING:
    from blockgraph.node import Child, Node

#: Longest run that a guest's write waits for, and longest buffer, bytes.
_GUEST_CHUNK = 1 << 20

#: Shorter runs than this, bytes, are copied natively, many at once, where the maps can tell where they are.
_FRAGMENT = 1 << 20

#: Transfers to or from devices that each worker of a job has under way. Four workers with 4 of 512 KiB each are faster
#: by a tenth than with one of 2 MiB, and than with 8 (ext4 on virtio, 2 GiB: 1.47, 1.61, 1.62 s).
_DIRECT_TRANSFERS = 4

#: Pieces of source that are held at a time.
_MAX_LEAVES = 512

#: Runs that are copied at a time. More gain nothing, and a guest that writes to the first waits for the last.
_MAX_RUNS = 64
_FIRST_RUNS = 8


class CopyFailed(Exception):
    """A copy failed.

    Attributes:
        error: the cause.
        side: whose fault.
    """

    def __init__(self, error: BlockGraphError, side: Literal["source", "target"]) -> None:
        super().__init__(str(error))
        self.error = error
        self.side = side


class Claim:
    """A run that somebody has taken to copy: [offset, end), bytes. Others wait for it."""

    __slots__ = ("_done", "end", "number", "offset")

    def __init__(self, run: ClaimedRun) -> None:
        self.number, self.offset, self.end = run
        self._done = asyncio.Event()

    async def wait(self) -> None:
        """Until it is copied, or back in the bitmap."""
        await self._done.wait()

    def finish(self) -> None:
        """Wake who waits."""
        self._done.set()


class _Rest(NamedTuple):
    """Runs (offset, length) that are not copied natively: to be zeroed, and to be read and written."""

    zero: list[tuple[int, int]]
    special: list[tuple[int, int]]


class _Side:
    """An edge that an extent map begins at."""

    def __init__(self, child: Child, *, written: bool) -> None:
        self._child = child
        self._written = written

    @property
    def node(self) -> Node:
        return self._child.node

    @property
    def writable(self) -> bool:
        return self._written and bool(self._child.need & Perm.WRITE) and not self.node.read_only

    def size(self) -> int:
        return self.node.size()


class BlockCopy:
    """Copies clusters of `source` to the same place of `target`, each at most once.

    Args:
        native: guest writes may copy without Python, unless other attributes speak against it.
        released: called with (offset, end) of clusters that the guest may overwrite from now on.

    Attributes:
        bitmap: clusters still to copy; granularity is the cluster size. Empty after `close`, as is `done`.
        done: clusters that the guest may overwrite.
        copier: claims, and copies of native writes.
        length: size of both, bytes, as it was at the start.
        serialising: the source is in the target's backing chain, so target writes wait for readers of the target.
        only_top: copy only what the source's top layer has allocated; the rest is dropped from the bitmap.
        bytes_copied: bytes of clusters done so far (copied, zeroed or dropped).
        bytes_moved: bytes that were read and written.
        bytes_shared: bytes for which the file system was told to let source and target share blocks.
        bytes_for_guest: of bytes_copied, what guest writes had to wait for.
        waits: how often a guest write, or who else wanted a range now, waited for a copy in flight.
        sums: checksums of what is copied; None: nobody wants them.
    """

    def __init__(
        self,
        source: Child,
        target: Child,
        bitmap: Bitmap,
        *,
        serialising: bool,
        native: bool = False,
        released: Callable[[int, int], None] = lambda offset, end: None,
    ) -> None:
        self.source = source
        self.target = target
        self.bitmap = bitmap
        self.cluster_size = bitmap.granularity
        self.length = bitmap.size
        self.done = Bitmap(bitmap.size, bitmap.granularity, dense=True)
        self._source_map = RootMap(_Side(source, written=False), DEFAULT_MEMORY)
        self._target_map = RootMap(_Side(target, written=True), DEFAULT_MEMORY)
        self.copier = Copier(bitmap, self.done, self._source_map.extents, self._target_map.extents)
        self._native = native
        self._released = released
        self._serialising = serialising
        self._only_top = False
        self._bytes_copied = 0
        self._bytes_moved = 0
        self._bytes_for_guest = 0
        self.waits = 0
        self._claims: dict[int, Claim] = {}
        self._bytes_shared = 0
        self._offload: dict[tuple[int, int], CopyFlag] = {}
        self.sums: Sums | None = None
        self._position = 0
        self._runs = 1
        #: copied natively at a time: few at first, so that copying starts before much has been looked up
        self._most_runs = _FIRST_RUNS
        self._choosing = asyncio.Lock()
        #: batches of runs that native code is at, not all of them claimed
        self._batches = 0
        self._batch_ended = asyncio.Event()
        #: storage can copy by itself; None: not known yet
        self._offloads: bool | None = None
        #: once it is closed
        self._left: int | None = None
        self._set_mode()

    @property
    def serialising(self) -> bool:
        return self._serialising

    @serialising.setter
    def serialising(self, value: bool) -> None:
        self._serialising = value
        self._set_mode()

    @property
    def only_top(self) -> bool:
        return self._only_top

    @only_top.setter
    def only_top(self, value: bool) -> None:
        self._only_top = value
        self._set_mode()

    @property
    def bytes_copied(self) -> int:
        return self._bytes_copied + self.copier.stats().copied

    @property
    def bytes_moved(self) -> int:
        return self._bytes_moved + self.copier.stats().moved

    @property
    def bytes_shared(self) -> int:
        return self._bytes_shared

    @property
    def bytes_for_guest(self) -> int:
        return self._bytes_for_guest + self.copier.stats().copied

    # Native guest writes.

    @property
    def native(self) -> bool:
        """Guest writes may copy without Python: nobody reads the target through to the source meanwhile, and
        everything is copied that is in the bitmap."""
        return self._native and not self._serialising and not self._only_top

    def _set_mode(self) -> None:
        self.copier.set_mode(CopierMode.ON if self.native else CopierMode.OFF)

    def give_up(self) -> None:
        """Nobody needs the old bytes any more."""
        self._native = False
        self.copier.set_mode(CopierMode.BROKEN)

    async def learn(self, offset: int, end: int) -> bool:
        """For a guest write in flight: let native ones know the place. True: they can copy there."""
        if not self.native:
            return False
        source, target = self._source_map.extents, self._target_map.extents
        with suppress(BlockGraphError):  # whoever copies will tell
            at = offset
            while at < end:  # it may lie in several runs, as where a backup-top below has copied some
                if (found := source.find(at)) is None:
                    await self._source_map.fill(at, end - at)
                    found = source.find(at)
                if found is None:
                    return False
                at = found.offset + found.length
            if not _takes_writes(target.find(offset)):  # it may since an earlier look, as when a table was made for it
                await self._target_map.fill(offset, end - offset)
            return _takes_writes(target.find(offset))
        return False

    async def copy_natively(self, start: int, end: int, *, for_guest: bool) -> CopiedRange:
        """Copy what is still to be copied of [start, end), cluster-aligned, as far as the maps know both sides.

        Cancelled: the copy goes on; see `Copier.copy`.
        """
        done = await asyncio.to_thread(self.copier.copy, start, end)
        self._bytes_copied += done.copied
        self._bytes_moved += done.moved
        if for_guest:
            self._bytes_for_guest += done.copied
        return done

    async def close(self) -> None:
        """Give back what takes memory, once nobody uses this any more but to ask what it has done."""
        await self.forget_maps()
        self._left = self.left
        for bits in (self.bitmap, self.done):
            bits.truncate(0)

    @property
    def left(self) -> int:
        """Bytes of clusters that are still to be copied, or were when it was closed."""
        return self.bitmap.count() if self._left is None else self._left

    async def forget_maps(self) -> None:
        """The edges are about to lead elsewhere, or have just begun to; no guest request is in flight."""
        self._offload.clear()
        self._offloads = None
        await self._source_map.clear()
        await self._target_map.clear()

    # Checksums.

    def add_sums(self, chunk: int) -> Sums:
        """Make checksums of what is copied from now on, while nothing is in flight; see native/sums.h."""
        self.sums = Sums(self.length, chunk)
        self.copier.set_sums(self.sums)
        return self.sums

    async def complete_sums(self, wanted: Bitmap) -> None:
        """When all is copied: read back from the target what could not be added while it was copied.

        Args:
            wanted: what was to be copied; the sums are of nothing else.
        Raises:
            CopyFailed: the target could not be read.
        """
        assert self.sums is not None
        buf = allocate_aligned(_GUEST_CHUNK)
        for offset, length in self.sums.spoiled():
            self.sums.reset(offset, length)
            for start, size in wanted.dirty_extents(offset, offset + length):
                for at in range(start, start + size, len(buf)):
                    part = buf[: start + size - at]
                    try:
                        await self.target.pread(at, part)
                    except BlockGraphError as error:
                        raise CopyFailed(error, "target") from error
                    self.sums.add(at, part)

    # Claims.

    def pending(self, offset: int, end: int) -> bool:
        """Some of [offset, end) is not copied yet, or is being copied."""
        return self.copier.pending(offset, end)

    @property
    def active(self) -> bool:
        """A copy is in flight."""
        return self.copier.claimed(0, self.length) != 0

    def _take(self, offset: int, end: int, longest: int | None) -> Claim | None:
        """Clear the first run of bits and register its copy, in one step."""
        run = self.copier.take(offset, end, longest)
        if run is None:
            return None
        claim = self._claims[run.number] = Claim(run)
        return claim

    async def wait_any(self) -> None:
        """Until some copy in flight has ended."""
        await self._wait(0, self.length)

    async def wait_range(self, offset: int, end: int) -> None:
        """Until no copy in flight touches [offset, end)."""
        while await self._wait(offset, end):
            pass

    async def _wait(self, offset: int, end: int) -> bool:
        """Until one copy in flight that touches [offset, end) has ended; False: there is none."""
        number = self.copier.claimed(offset, end)
        if number > 0:
            await self._claims[number].wait()
        elif number < 0:
            await self.copier.native_ended(offset, end)
        return number != 0

    async def copy(self, offset: int, end: int) -> None:
        """Copy what is still to be copied of [offset, end), cluster-aligned (end may be the disk's end).

        Raises:
            CopyFailed: in this call's own I/O; the bits are set again.
        """
        while self.copier.pending(offset, end):
            claim = self._take(offset, end, max(_GUEST_CHUNK, self.cluster_size))
            if claim is None:
                self.waits += 1
                await self._wait(offset, end)
            else:
                with self._copying(claim):
                    async with Pins() as pins:
                        await self._hold_target(pins, claim.offset, claim.end)
                        leaves = await self._leaves(pins, claim.offset, claim.end)
                        rest = await self._copy_leaves(pins, leaves)
                    await self._copy_rest(rest)
                self._bytes_for_guest += claim.end - claim.offset

    async def copy_next(self, chunk: int) -> int | None:
        """Copy the next runs that are still to be copied, behind what the last call was given: about `chunk` bytes of
        data with the zeroes before and between them, however many. What the source holds is asked once.

        Short runs are copied natively, as far as the maps can tell where they are.

        Returns: how many bytes of data were moved; None: nothing was left, here or with others.
        Raises:
            CopyFailed: the bits are set again.
        Cancelled: after a native copy.
        """
        while self.bitmap.next_dirty(self._position) is None:
            if self._batches:
                await self._batch_ended.wait()
            elif self._position:
                self._position = 0  # what failed, or was passed by, lies behind
            elif self.active:
                await self.wait_any()
            else:
                return None
        offset, moved = self._position, 0
        # Native copies would write as data what a target with a backing image had better left as zeroes.
        if self.native and not self._offloads and not has_cow(self.target.node):
            runs = self.copier.find_runs(offset, _FRAGMENT, chunk, self._most_runs)
            if runs:
                self._most_runs = min(2 * self._most_runs, _MAX_RUNS)
                self._position = runs.end
                moved, missed = await finish(self._copy_runs(runs))
                if missed is None:
                    return moved
                offset = missed
        end, more = await self._copy_here(offset, chunk)
        self._position = end
        return moved + more

    async def _may_offload(self) -> bool:
        """Storage may copy by itself what lies where the maps have looked so far."""
        if self.sums is not None:
            return False
        if self._offloads is None:
            pairs = [(one, other) for one in self._source_map.storages() for other in self._target_map.storages()]
            if any([await self._how(one, other) for one, other in pairs]):
                return True  # by trying it we shall know
            self._offloads = False
        return self._offloads

    async def _copy_runs(self, runs: Runs) -> tuple[int, int | None]:
        """Returns how many bytes were moved, and where something is left to copy otherwise."""
        self._batches += 1
        try:
            if not await self._learn_runs(runs) or await self._may_offload():
                return 0, runs.start
            done = await self.copier.copy_runs(runs)
        finally:
            self._batches -= 1
            self._batch_ended.set()
            self._batch_ended = asyncio.Event()
        self._bytes_copied += done.copied
        self._bytes_moved += done.moved
        for start, end in runs.released():
            self._released(start, end)
        return done.moved, None if done.whole else runs.missed()

    async def _learn_runs(self, runs: Runs) -> bool:
        """Let the maps know where the runs are. False: the target has no place ready for some."""
        unknown = self.copier.check_runs(runs)
        with suppress(BlockGraphError):  # whoever copies will tell
            if CopierSide.TARGET in unknown:
                target = self._target_map.extents
                for start, end in runs.unmapped(CopierSide.TARGET):
                    if not _takes_writes(target.find(start)):
                        await self._target_map.fill(start, end - start)
                        if not _takes_writes(target.find(start)):
                            return False
            if CopierSide.SOURCE in unknown:
                await self._source_map.look_up(runs.unmapped(CopierSide.SOURCE))
                if CopierSide.SOURCE in self.copier.check_runs(runs):
                    source = self._source_map.extents
                    for start, end in runs.unmapped(CopierSide.SOURCE):
                        if source.find(start) is None:
                            await self._source_map.fill(start, end - start)
        return True

    async def _copy_here(self, offset: int, chunk: int) -> tuple[int, int]:
        """Copy the next runs from `offset` on, moving data between storages and the rest through the nodes.

        Returns: where to go on, and how many bytes of data were moved.
        """
        async with Pins() as pins:
            with ExitStack() as claims:
                async with self._choosing:  # else all of them would look at the same run, for one to have it
                    end, leaves, runs = await self._claim_next(pins, claims, offset, chunk)
                try:
                    blank = await self._blank_end(leaves)
                    rest = await self._copy_leaves(pins, leaves)
                    await pins.release()
                    await self._copy_rest(rest, blank)
                except CopyFailed:
                    if runs > 1:
                        self._runs = 1  # what fails must not keep back what does not
                    raise
        self._runs = min(2 * self._runs, _MAX_RUNS)
        return end, sum(leaf.length for leaf in leaves if not self._empty(leaf))

    async def _claim_next(self, pins: Pins, claims: ExitStack, offset: int, chunk: int) -> tuple[int, list[Leaf], int]:
        """Claim runs, in ascending order; returns where to go on, what they hold, and their number."""
        leaves: list[Leaf] = []
        runs, data, position = 0, 0, offset
        while runs < self._runs and data < chunk and len(leaves) < _MAX_LEAVES:
            area = self.bitmap.next_dirty(position)
            if area is None:
                break
            try:
                found = await self._leaves(pins, area[0], sum(area), chunk - data)
            except CopyFailed:
                if runs:
                    break  # it comes again when it is the first
                raise
            end = found[-1].offset + found[-1].length
            # What guest writes took meanwhile is theirs; what is still set has not changed since we looked.
            claim = self._take(area[0], end, None)
            if claim is None:
                return end, leaves, runs
            claims.enter_context(self._copying(claim))
            runs, position = runs + 1, claim.end
            if self.serialising:
                await pins.release()
                await self._hold_target(pins, claim.offset, claim.end)
                found = await self._leaves(pins, claim.offset, claim.end)
            found = _clip(found, claim.offset, claim.end)
            leaves += found
            data += sum(leaf.length for leaf in found if not self._empty(leaf))
            # Serialising requests wait for what is pinned and not claimed: nothing there may be asked for again.
            if self.serialising or claim.end < end:
                break
        return position, leaves, runs

    async def _hold_target(self, pins: Pins, offset: int, end: int) -> None:
        """Let nobody read the target through to the source while the copy that comes between them is made."""
        if self.serialising:
            await pins.hold(self.target.node, offset, end - offset)

    @contextmanager
    def _copying(self, claim: Claim) -> Iterator[None]:
        """The bits are set again when the block fails."""
        copied = False
        try:
            yield
            copied = True
            self._bytes_copied += claim.end - claim.offset
        finally:
            if not copied and self.sums is not None:
                self.sums.spoil(claim.offset, claim.end - claim.offset)
            self.copier.finish(claim.number, copied=copied)
            del self._claims[claim.number]
            claim.finish()
        if not self._only_top:  # clusters that were dropped have no copy; who writes them asks
            self._release(claim.offset, claim.end)

    def _release(self, offset: int, end: int) -> None:
        """The guest may overwrite what is copied, but for what is being read."""
        if self.copier.release(offset, end):
            self._released(offset, end)

    async def _leaves(self, pins: Pins, offset: int, end: int, chunk: int | None = None) -> list[Leaf]:
        """Where the source's bytes are, from `offset` to `end`, or to the cluster in which `chunk` data bytes end."""
        leaves: list[Leaf] = []
        pos, data = offset, 0
        while pos < end:
            leaf = await self._read_leaf(pins, pos, end - pos)
            if chunk is not None and not self._empty(leaf):
                room = chunk - data + -(pos + chunk - data) % self.cluster_size
                leaf = leaf._replace(length=min(leaf.length, room))
                data += leaf.length
                if data >= chunk or len(leaves) >= _MAX_LEAVES:
                    end = min(end, pos + leaf.length + -(pos + leaf.length) % self.cluster_size)
                    chunk = None
            leaves.append(leaf)
            pos += leaf.length
        return leaves

    def _empty(self, leaf: Leaf) -> bool:
        return leaf.status is Status.ZERO or self._dropped(leaf)

    def _dropped(self, leaf: Leaf) -> bool:
        return self.only_top and leaf.depth != 0

    async def _copy_leaves(self, pins: Pins, leaves: list[Leaf]) -> _Rest:
        """Move data natively where both sides resolve to storage; returns what has to go through the nodes."""
        rest = _Rest([], [])
        extents: list[CopyExtent] = []
        storages: list[tuple[Node, Node]] = []
        for leaf in leaves:
            if self._dropped(leaf):
                continue
            if leaf.status is Status.ZERO:
                _extend(rest.zero, leaf.offset, leaf.length)
            elif leaf.status is Status.SPECIAL:
                _extend(rest.special, leaf.offset, leaf.length)
            else:
                await self._plan(pins, leaf, extents, storages, rest.special)
        await self._copy_planned(pins, extents, storages)
        return rest

    async def _copy_planned(self, pins: Pins, extents: list[CopyExtent], storages: list[tuple[Node, Node]]) -> None:
        """Copy and link in what has been planned; the lists are empty afterwards."""
        if extents:
            await self._copy_native(extents, storages)
            extents.clear()
            storages.clear()
        try:
            await pins.commit()
        except BlockGraphError as error:
            raise CopyFailed(error, "target") from error

    async def _copy_rest(self, rest: _Rest, blank: int = 0) -> None:
        """Through the nodes; no pins may be held, these requests would wait for them.

        Zeroes below `blank` are there already.
        """
        for start, size in rest.special:
            await self._copy_buffered(start, size)
        for start, size in rest.zero:
            if start + size > blank:
                await self._zero(start, size)

    async def _blank_end(self, leaves: list[Leaf]) -> int:
        """Up to where the target reads zero, seen from the first leaf; 0: not worth asking.

        Asked before data comes between the zeroes: of a new target that is one question instead of one for each run.
        """
        zeroes = sum(leaf.status is Status.ZERO and not self._dropped(leaf) for leaf in leaves)
        # A target that reads through to the source may be asked only when nothing of the source is held.
        if zeroes < 2 or self.serialising:
            return 0
        start, last = leaves[0].offset, leaves[-1]
        try:
            status = await self.target.block_status(start, last.offset + last.length - start)
        except BlockGraphError as error:
            raise CopyFailed(error, "target") from error
        return status.offset + status.length if self._reads_zero(status) else 0

    async def _read_leaf(self, pins: Pins, offset: int, length: int) -> Leaf:
        try:
            leaf = await pins.read(self.source.node, offset, length)
        except BlockGraphError as error:
            raise CopyFailed(error, "source") from error
        if leaf.status is not Status.SPECIAL:
            return leaf
        try:
            status = await self.source.block_status(offset, leaf.length)
        except BlockGraphError as error:
            if not self.only_top:
                return leaf  # taken for data: whether it can be read is what counts
            raise CopyFailed(error, "source") from error
        kind = Status.ZERO if status.zero else Status.SPECIAL
        return leaf._replace(length=status.length, status=kind, depth=status.depth)

    async def _plan(
        self,
        pins: Pins,
        leaf: Leaf,
        extents: list[CopyExtent],
        storages: list[tuple[Node, Node]],
        special: list[tuple[int, int]],
    ) -> None:
        assert leaf.storage is not None
        source_fd = leaf.storage.driver.fd()
        assert source_fd is not None
        pos, end = leaf.offset, leaf.offset + leaf.length
        while pos < end:
            try:
                room = await pins.write(self.target.node, pos, end - pos)
            except BlockGraphError as error:
                raise CopyFailed(error, "target") from error
            if room is None:
                await self._copy_planned(pins, extents, storages)
                continue
            if room.storage is None:
                _extend(special, pos, room.length)
            else:
                target_fd = room.storage.driver.fd()
                assert target_fd is not None
                source_offset = leaf.storage_offset + pos - leaf.offset
                how = CopyFlag.SUM if self.sums is not None else await self._how(source_fd, target_fd)
                extents.append(
                    CopyExtent(source_fd, source_offset, target_fd, room.storage_offset, room.length, how, pos)
                )
                storages.append((leaf.storage, room.storage))
            pos += room.length

    async def _how(self, source_fd: int, target_fd: int) -> CopyFlag:
        how = self._offload.get((source_fd, target_fd))
        if how is None:
            how = self._offload[source_fd, target_fd] = await asyncio.to_thread(offload, source_fd, target_fd)
        return how

    async def _copy_native(self, extents: list[CopyExtent], storages: list[tuple[Node, Node]]) -> None:
        progress = CopyProgress()  # of its own: cancelled with this call
        direct = any(node.options.cache.direct for pair in storages for node in pair)
        try:
            await get_pool(asyncio.get_running_loop()).copy(
                extents, threads=_DIRECT_TRANSFERS if direct else None, progress=progress, sums=self.sums
            )
        except CopyError as error:
            source, target = storages[error.extent]
            node, side = (source, "source") if error.side == "read" else (target, "target")
            named = OSError(error.errno, error.strerror, node.driver.filename())
            failure = IOFailure.from_oserror(named, node=node.name, op="copy", offset=error.offset)
            raise CopyFailed(failure, "source" if side == "source" else "target") from error
        finally:
            self._bytes_shared += progress.shared
            if self._offloads is None:
                self._offloads = progress.shared > 0 or any(extent.flags & CopyFlag.COPY_RANGE for extent in extents)
            for extent, (_, target) in zip(extents, storages, strict=True):
                target.driver.stored(extent.target_offset, extent.length)
        self._bytes_moved += sum(extent.length for extent in extents)

    async def _copy_buffered(self, offset: int, length: int) -> None:
        buf = allocate_aligned(min(length, _GUEST_CHUNK))
        flags = Flag.SERIALISING if self.serialising else Flag.NONE
        for start in range(offset, offset + length, len(buf)):
            part = buf[: offset + length - start]
            try:
                await self.source.pread(start, part)
            except BlockGraphError as error:
                raise CopyFailed(error, "source") from error
            try:
                await self.target.pwrite(start, part, flags)
            except BlockGraphError as error:
                raise CopyFailed(error, "target") from error
            if self.sums is not None:
                self.sums.add(start, part)
            self._bytes_moved += len(part)

    async def _zero(self, offset: int, length: int) -> None:
        """Make the target read zero here, touching only what does not do so yet. Never unmaps."""
        flags = Flag.SERIALISING if self.serialising else Flag.NONE
        pos, end = offset, offset + length
        try:
            while pos < end:
                status = await self.target.block_status(pos, end - pos)
                if not self._reads_zero(status):
                    await self.target.pwrite_zeroes(pos, status.length, flags)
                pos += status.length
        except BlockGraphError as error:
            raise CopyFailed(error, "target") from error

    def _reads_zero(self, status: BlockStatus) -> bool:
        """Zero because a layer below says so is not enough: the layer below may be the live disk."""
        return status.zero and (status.depth == 0 or (status.depth < 0 and not has_cow(self.target.node)))


def has_cow(node: Node) -> bool:
    """The node reads unallocated ranges from another one."""
    return any(
        child.role & Role.COW or (child.role & (Role.FILTERED | Role.PRIMARY) and has_cow(child.node))
        for child in node.children.values()
    )


def reaches(node: Node, wanted: Node) -> bool:
    """`wanted` is `node` or lies below it."""
    return node is wanted or any(reaches(child.node, wanted) for child in node.children.values())


def _takes_writes(extent: MapExtent | None) -> bool:
    return extent is not None and (extent.writable or extent.allocate)


def _clip(leaves: list[Leaf], offset: int, end: int) -> list[Leaf]:
    clipped = []
    for leaf in leaves:
        start, stop = max(leaf.offset, offset), min(leaf.offset + leaf.length, end)
        if start < stop:
            storage_offset = leaf.storage_offset + start - leaf.offset
            clipped.append(leaf._replace(offset=start, length=stop - start, storage_offset=storage_offset))
    return clipped


def _extend(runs: list[tuple[int, int]], offset: int, length: int) -> None:
    if runs and sum(runs[-1]) == offset:
        runs[-1] = (runs[-1][0], runs[-1][1] + length)
    else:
        runs.append((offset, length))
