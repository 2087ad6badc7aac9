# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""backup-top (alias copy-before-write): keep the disk as it was when the filter was put in place.

```
    guest ──► backup-top ──file──► disk         1. a write arrives for clusters not copied yet
                   └────target───► snapshot     2. their old bytes go from disk to target
                                                3. the write goes on to disk
```

Write, write-zeroes and discard trigger the copy; requests flagged WRITE_UNCHANGED do not, what they write is already
visible. A cluster is copied once; afterwards writes pass. The point in time is the instant at which the transaction
that inserted the filter commits: all requests before it are done, none after it has started. `snapshot-access` over
this node reads the kept image; a backup job over it copies the rest.

A native guest write (NBD, a caller's own thread) to storage that the extent maps of disk and target know makes its copy
on its own thread, without Python, for every backup-top on the way. Left to Python: with cbw-timeout, while the target
reads through to the disk, under sync "top", what a snapshot reader or the job is at just now, and whatever failed.

Options:
    file: the live disk.
    target: gets the old bytes; same size as the disk.
    bitmap: {node, name}: keep only what is set in that dirty bitmap (copied when the filter is made).
    on-cbw-error: a copy failed: "break-guest-write" (default) fails the guest's write, the snapshot stays whole;
        "break-snapshot" lets the guest go on, every later read of the snapshot fails.
    cbw-timeout: seconds after which a copy counts as failed; 0: never. The copy itself goes on in the background.
    min-cluster-size: bytes, power of two; the unit copied is the largest of this, 64 KiB and the target's cluster.

Example:
    [[nodes]]
    node-name = "top"
    driver = "backup-top"
    file = "disk"
    target = {driver = "file", filename = "scratch.img"}

Limits: the disk can not be resized under the filter. Flush reaches the disk only; whoever needs the target durable
flushes it (the backup job does). A discard by the guest copies first and is then passed on; with `discard = "ignore"`
on this node it is dropped before it costs a copy.
Source: QEMU BlockdevOptionsCbw.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal

from blockgraph.block_copy import BlockCopy, CopyFailed, has_cow, reaches
from blockgraph.driver import ChildSpec, Filter
from blockgraph.errors import BlockGraphError, GraphError, IOFailure, SnapshotBroken
from blockgraph.extent import Extent, Status
from blockgraph.flags import Flag
from blockgraph.native import Bitmap, fitting
from blockgraph.options import BitmapRef, NodeOptions, NodeRef
from blockgraph.perm import ALL, Perm, Role

if TYPE_CHECKING:
    from blockgraph.node import Child, Node

#: Smallest unit of copying, bytes.
MIN_CLUSTER = 64 << 10

#: Largest, bytes: what a bitmap can count.
MAX_CLUSTER = 2 << 30


class BackupTopOptions(NodeOptions, kw_only=True, frozen=True):
    """See the module's text."""

    file: NodeRef
    target: NodeRef
    bitmap: BitmapRef | None = None
    on_cbw_error: Literal["break-guest-write", "break-snapshot"] = "break-guest-write"
    cbw_timeout: int = 0
    min_cluster_size: int | None = None

    def __post_init__(self) -> None:
        least = self.min_cluster_size
        if least is not None and (not 0 < least <= MAX_CLUSTER or least & (least - 1)):
            raise ValueError(f"min-cluster-size {least} is not a power of two up to {MAX_CLUSTER}")


class BackupTop(Filter):
    """See the module's text.

    Attributes:
        copy: what is still to be copied, shared with the job's loop.
        broken: the copy error that broke the snapshot, None while it is whole.
        lost: set when the snapshot breaks.
    """

    name = "backup-top"
    aliases = ("copy-before-write",)
    children = {"file": ChildSpec(Role.FILTERED | Role.PRIMARY), "target": ChildSpec(Role.DATA)}
    Options = BackupTopOptions
    options: BackupTopOptions

    target: Child
    copy: BlockCopy

    def __init__(self, node: Node, options: NodeOptions) -> None:
        super().__init__(node, options)
        #: what the snapshot has; None: everything. Not changed any more
        self._wanted: Bitmap | None = None
        self._undecided = True
        self.broken: BlockGraphError | None = None
        self.lost = asyncio.Event()
        self._ready = False

    # Control path.

    @classmethod
    def child_perm(
        cls, options: NodeOptions, name: str, need: Perm, share: Perm, *, read_only: bool
    ) -> tuple[Perm, Perm]:
        """Nobody may write the disk beside the filter, from the first instant on; nothing else may resize it."""
        if name == "target":
            return Perm.CONSISTENT_READ | Perm.WRITE, ALL & ~Perm.RESIZE
        return need | Perm.CONSISTENT_READ, share & ~(Perm.WRITE | Perm.RESIZE)

    @classmethod
    def known_size(cls, options: NodeOptions, sizes: Mapping[str, int]) -> int | None:
        size, target = sizes.get("file"), sizes.get("target")
        if size is not None and target is not None and size != target:
            raise GraphError(
                f"the disk has {size} bytes but the target has {target}",
                node="target",
                hint=f"make the target {size} bytes large",
            )
        return size

    async def attached(self) -> None:
        await super().attached()
        self._check_sizes()
        if self._ready:
            self._check_target()
            await self.copy.forget_maps()
            self.copy.serialising = self._is_fleecing()
            return
        self.cluster_size = self._choose_cluster_size()
        size = self.size()
        chosen = None if self.options.bitmap is None else self._source_bitmap(self.options.bitmap).copy()
        self.copy = BlockCopy(
            self.file,
            self.target,
            Bitmap(size, self.cluster_size, dense=True),
            serialising=self._is_fleecing(),
            native=not self.options.cbw_timeout,  # nobody can give up waiting for a native copy
            released=self._released,
        )
        if chosen is not None:
            self.keep_only(chosen)
        self._kept = self.target.node
        self._forgotten = Bitmap(size, self.cluster_size)
        self._frozen: list[_FrozenRead] = []
        self._ready = True

    async def close(self) -> None:
        if self._ready:
            await self.copy.close()
            self._forgotten.truncate(0)

    def committed(self) -> None:
        self.keep_rest()

    def keep_rest(self) -> None:
        """Keep everything, unless something was chosen. Filling the bitmap no sooner spares who chooses that."""
        if self._undecided:
            self._undecided = False
            self.copy.bitmap.fill()

    def keep_only(self, bits: Bitmap) -> None:
        """Keep only what is set in `bits`, of any granularity, which never change. For whoever has just inserted this
        node, before `keep_rest`."""
        assert self._undecided
        self._undecided = False
        self.copy.bitmap.merge(bits)
        self._wanted = bits if bits.granularity == self.cluster_size else self.copy.bitmap.copy()
        # What is not to be copied the guest may overwrite at once.
        self.copy.done.fill()
        self.copy.done.subtract(self.copy.bitmap)

    def _released(self, offset: int, end: int) -> None:
        for extents in self.node.maps:
            extents.copied(self.copy.copier, offset, end - offset)

    def _check_sizes(self) -> None:
        disk, target = self.file.node, self.target.node
        if disk is target:
            raise GraphError("file and target are the same node", node=self.node.name, op="insert")
        if disk.size() != target.size():
            wrong = GraphError(
                f"the target has {target.size()} bytes but the disk, node '{disk.name}', has {disk.size()}",
                node=target.name,
                hint=f"resize the target to {disk.size()} bytes",
            )
            wrong.file = target.driver.filename()
            raise wrong

    def _check_target(self) -> None:
        """The target may get filters and overlays, or lose them; another one would not have what was copied."""
        target = self.target.node
        if not reaches(target, self._kept) and not reaches(self._kept, target):
            raise GraphError(
                f"target '{target.name}' does not have what has been copied to '{self._kept.name}'",
                node=self.node.name,
            )
        self._kept = target

    def _is_fleecing(self) -> bool:
        """The target shows the disk where nothing has been copied."""
        return reaches(self.target.node, self.file.node.shown())

    def _choose_cluster_size(self) -> int:
        least = self.options.min_cluster_size or 0
        # Where the target has a backing node it fills the rest of a cluster itself.
        target = None if has_cow(self.target.node) else self.target.node.driver.info().cluster_size
        return fitting(self.size(), max(MIN_CLUSTER, least, target or 0))

    def _source_bitmap(self, ref: BitmapRef) -> Bitmap:
        bitmap = self.node.find_bitmap(ref.node, ref.name)
        if bitmap.size != self.size():
            raise GraphError(
                f"bitmap '{ref.name}' covers {bitmap.size} bytes but the disk has {self.size()}", node=self.node.name
            )
        return bitmap

    # Guest requests.

    async def map(self, offset: int, length: int) -> Extent:
        """Writable without us where the old bytes are safe and nobody is reading them."""
        if self.broken is not None:
            return Extent(0, self.size(), Status.DATA, self.file, 0, True)
        size = self.size()
        copier = self.copy.copier if self.copy.native else None
        start = offset - offset % self.cluster_size
        done = self.copy.done.next_dirty(start)
        if done is None or done[0] > start:
            start = self._not_done_from(start)
            end = size if done is None else done[0]
            return Extent(start, end - start, Status.DATA, self.file, start, False, copier)
        # Done while it was being read: whoever did that waits for the reader, and so have others to.
        first = min(start + self.cluster_size, size)
        if self._frozen_read(start, first) is not None:
            return Extent(start, first - start, Status.DATA, self.file, start, False)
        later = [read.offset - read.offset % self.cluster_size for read in self._frozen if read.offset >= first]
        return Extent(start, min([sum(done), *later]) - start, Status.DATA, self.file, start, True, copier)

    def _not_done_from(self, offset: int) -> int:
        """The start of the run that is not done and reaches `offset`, a cluster's border."""
        reach = self.cluster_size
        while (clean := self._clean_from(offset - reach, offset)) < offset:
            offset, reach = clean, 2 * reach
        while (reach := reach // 2) >= self.cluster_size:
            offset = self._clean_from(offset - reach, offset)
        return offset

    def _clean_from(self, start: int, offset: int) -> int:
        """`start`, or `offset` when something between them is done."""
        start = max(0, start)
        return start if self.copy.done.next_dirty(start, offset) is None else offset

    @property
    def passes_zeroes(self) -> bool:
        return True

    @property
    def plain_flush(self) -> bool:
        return True

    def flushed_children(self) -> list[Child]:
        return [self.file]

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
        if not flags & Flag.WRITE_UNCHANGED:
            await self._before_write(offset, len(buf))
        await self.file.pwrite(offset, buf, flags)

    async def pwrite_zeroes(self, offset: int, length: int, flags: Flag = Flag.NONE) -> None:
        if not flags & Flag.WRITE_UNCHANGED:
            await self._before_write(offset, length)
        await self.file.pwrite_zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        await self._before_write(offset, length)
        await self.file.discard(offset, length)

    async def flush(self) -> None:
        await self.file.flush()

    async def truncate(self, size: int) -> None:
        raise self.unsupported("truncate")

    async def _before_write(self, offset: int, length: int) -> None:
        """Copy the clusters that the write touches, then wait for snapshot reads of them still in flight."""
        if self.broken is not None:
            return
        start = offset - offset % self.cluster_size
        end = min(offset + length + -(offset + length) % self.cluster_size, self.size())
        if self.copy.pending(start, end):
            try:
                if not (await self.copy.learn(start, end) and await self._copy_natively(start, end)):
                    await self._copy(start, end)
            except BlockGraphError as error:
                if self.options.on_cbw_error == "break-guest-write":
                    raise
                if self.broken is None:
                    self.broken = error
                    self.copy.give_up()
                    self.lost.set()
                return
        self.copy.done.set(start, end - start)
        while (read := self._frozen_read(start, end)) is not None:
            await read.done.wait()

    async def _copy_natively(self, start: int, end: int) -> bool:
        """Where native writes can copy, this need not look for holes first, which takes long in some file systems."""
        task = asyncio.ensure_future(self.copy.copy_natively(start, end, for_guest=True))
        self.node.begin_background()
        task.add_done_callback(self._copy_ended)
        return (await asyncio.shield(task)).whole

    async def _copy(self, start: int, end: int) -> None:
        if not self.options.cbw_timeout:
            try:
                await self.copy.copy(start, end)
            except CopyFailed as failure:
                raise failure.error from failure
            return
        task = asyncio.ensure_future(self.copy.copy(start, end))
        self.node.begin_background()
        task.add_done_callback(self._copy_ended)
        await asyncio.wait({task}, timeout=self.options.cbw_timeout)
        if not task.done():
            raise IOFailure(
                f"copy before write took longer than {self.options.cbw_timeout} s",
                node=self.node.name,
                op="copy",
                offset=start,
                length=end - start,
                errno=errno.ETIMEDOUT,
            )
        try:
            task.result()
        except CopyFailed as failure:
            raise failure.error from failure

    def _copy_ended(self, task: asyncio.Future[Any]) -> None:
        if not task.cancelled():
            task.exception()  # retrieved: after a timeout nobody waits for it
        self.node.end_background()

    # The kept image, for snapshot-access.

    def snapshot_run(self, offset: int, length: int) -> tuple[int, bool]:
        """Length of the run from `offset` that lies on one side, and whether that side is the target.

        Raises:
            SnapshotBroken: a copy failed, or the range is outside the bitmap or was discarded.
        """
        end = offset + length
        self._check_access("pread", offset, length)
        copied = self.copy.done.next_dirty(offset, end)
        if copied is None:
            return length, False
        return (copied[1], True) if copied[0] == offset else (copied[0] - offset, False)

    def _check_access(self, op: str, offset: int, length: int) -> None:
        if self.broken is not None:
            raise SnapshotBroken(
                f"the snapshot is lost, a copy before write failed: {self.broken}",
                node=self.node.name,
                op=op,
                offset=offset,
                length=length,
            )
        end = offset + length
        unwanted = length and self._wanted is not None and self._wanted.next_clean(offset, end) is not None
        if unwanted or (length and self._forgotten.next_dirty(offset, end) is not None):
            raise SnapshotBroken(
                "the snapshot does not have this range (outside its bitmap, or discarded)",
                node=self.node.name,
                op=op,
                offset=offset,
                length=length,
            )

    @asynccontextmanager
    async def frozen(self, offset: int, length: int) -> AsyncIterator[bool]:
        """While inside, guest writes to the range wait. Gives False, and holds nobody up, when the guest may have
        overwritten some of it meanwhile: ask `snapshot_run` again."""
        number = self.copy.copier.freeze(offset, length)
        if not number:
            yield False
            return
        read = _FrozenRead(offset, offset + length)
        self._frozen.append(read)
        try:
            yield True
        finally:
            self._frozen.remove(read)
            self.copy.copier.thaw(number)
            read.done.set()

    def _frozen_read(self, start: int, end: int) -> _FrozenRead | None:
        for read in self._frozen:
            if read.offset < end and start < read.end:
                return read
        return None

    async def forget(self, offset: int, length: int) -> None:
        """The snapshot's user no longer needs the whole clusters inside the range: never copy them, free them."""
        self._check_access("discard", offset, 0)
        start = offset + -offset % self.cluster_size
        end = offset + length
        if end < self.size():
            end -= end % self.cluster_size
        if start >= end:
            return
        self._forgotten.set(start, end - start)
        self.copy.bitmap.reset(start, end - start)
        await self.copy.wait_range(start, end)
        self.copy.bitmap.reset(start, end - start)  # of a copy in flight that failed
        await self.target.discard(start, end - start)


class _FrozenRead:
    __slots__ = ("done", "end", "offset")

    def __init__(self, offset: int, end: int) -> None:
        self.offset = offset
        self.end = end
        self.done = asyncio.Event()
