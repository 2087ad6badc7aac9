# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The backup job: a disk as it is when the job starts, while it is being written.

```
    before:  guest ──► disk               during:  guest ──► backup-top ──► disk
                                                     job ──────┘   └──────► target
```

The job puts a backup-top over the device (or completes the target of one that is there), copies what is not copied
yet in the background, flushes the target, and takes the filter out again. Guest writes and the job share one bitmap,
so every cluster is read once, before it changes.

Of a dirty bitmap the job takes a view in the transaction that inserts the filter, so that marks and point in time are
of one instant, and ends it when everything else is over: what it clears then is in a target that was flushed. A second
backup of the same disk puts its filter between the first one's and the disk, so that a guest's write makes the copies
for both and each keeps its own point in time.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from blockgraph.backend import Backend
from blockgraph.chains.recorder import Recorder
from blockgraph.errors import BlockGraphError, GraphError, JobError
from blockgraph.filters.backup_top import BackupTop
from blockgraph.graph.action import Action
from blockgraph.graph.model import ROOT_EDGE, root_key
from blockgraph.jobs.bitmap import bitmap_nodes, find_bitmap
from blockgraph.jobs.copy_loop import CopyLoop
from blockgraph.jobs.create_target import create_target, created_file
from blockgraph.jobs.job import Job
from blockgraph.jobs.options import BackupOptions
from blockgraph.jobs.states import Verb
from blockgraph.jobs.sync import LATE_BITMAP, LATE_BITMAP_HINT, BitmapUse, bitmap_use
from blockgraph.native import Bitmap
from blockgraph.options import NodeRef
from blockgraph.perm import Perm

if TYPE_CHECKING:
    from blockgraph.bitmaps import DirtyBitmap, View
    from blockgraph.graph.graph import Graph
    from blockgraph.graph.model import Model
    from blockgraph.graph.transaction import Transaction
    from blockgraph.node import Node


class BackupJob(Job):
    """See the module's text.

    Attributes:
        filter_name: the backup-top the job works through, once it has started.
        chain: what makes the target a backup of a chain; None: it is none.
    """

    type = "backup"

    def __init__(self, graph: Graph, options: BackupOptions, job_id: str) -> None:
        super().__init__(job_id, auto_finalize=options.auto_finalize, auto_dismiss=options.auto_dismiss)
        self.options = options
        self.filter_name = ""
        self._graph = graph
        self._backend = Backend(f"job-{job_id}", need=Perm(0), stays=True, owner=f"job '{job_id}'")
        self._created: str | None = None
        self.chain: Recorder | None = None
        self._own_filter = False
        self._top: BackupTop
        self._loop: CopyLoop | None = None
        self._use: BitmapUse | None = None
        self._view: View | None = None
        self._bitmap_node: Node
        self._left: Bitmap | None = None
        self._unflushed = False

    # Start: within a transaction.

    async def join(self, change: Transaction) -> None:
        """Let the job start when the transaction commits: that is its point in time.

        Raises:
            BlockGraphError: it can not; the transaction should be given up.
        """
        options = self.options
        change.act(_Start(self, change))  # from here on the transaction tells when it has failed
        self._use = bitmap_use(options)
        target = options.target
        if options.chain is not None:
            target = await self._join_chain(options.chain)
        elif options.mode == "create":
            target = await create_target(self._graph, options)
            self._created = created_file(options)
        if target is None:
            self._check_filter(change.candidate)
            self.filter_name = options.device
        else:
            if not isinstance(target, str):
                target = change.add(target, owned=False)
            self.filter_name = change.add(self._filter(target))
            change.insert(self.filter_name, above=options.device)
            self._own_filter = True
        change.attach(self._backend, self.filter_name)

    async def _join_chain(self, directory: str) -> NodeRef:
        options = self.options
        sync = options.sync
        assert sync == "full" or sync == "incremental" or sync == "differential"
        least = options.min_cluster_size or 0
        chain = Recorder(self._graph, options.device, directory, sync, options.chain_format, least)
        if chain.plan.reason is not None:
            self.note(f"makes a full backup: {chain.plan.reason}")
        if chain.plan.bitmap is not None:
            self._use = BitmapUse(chain.node, chain.plan.bitmap, "never", reduces=True)
        target = await chain.create()
        self.chain = chain
        return target

    async def take(self, change: Transaction) -> None:
        """For `_Start`: with the filter in place and everything drained, take what the job needs."""
        options = self.options
        top = change.node(self.filter_name).driver
        assert isinstance(top, BackupTop)
        self._top = top
        if options.sync == "top" and top.copy.serialising:
            # What the top layer does not have is not copied, also not when the guest overwrites it.
            raise GraphError(
                f"target '{top.target.node.name}' shows the live disk where nothing is copied: with sync 'top' it "
                "would show what the guest writes there later",
                node=options.device,
                hint="use sync 'full' or 'none', or give the target another backing node",
            )
        if self._use is not None:
            await self._take_view(change, self._use)
        top.keep_rest()
        if self.chain is not None:
            await self.chain.begin(change, top)
        top.copy.only_top = options.sync == "top"
        self._loop = CopyLoop(
            self,
            top.copy,
            self._backend,
            workers=options.max_workers,
            chunk=options.max_chunk,
            speed=options.speed,
            on_source_error=options.on_source_error,
            on_target_error=options.on_target_error,
            broken=lambda: top.broken,
        )
        self.progress.update(0, top.copy.left)

    async def _take_view(self, change: Transaction, use: BitmapUse) -> None:
        self._bitmap_node, bitmap = find_bitmap(change, self.options.device, use)
        bitmap.check_usable("backup")
        if bitmap.size != self._top.size():
            raise GraphError(
                f"bitmap '{bitmap.name}' covers {bitmap.size} bytes but the disk has {self._top.size()}",
                node=bitmap.node,
                op="backup",
                hint="make a full backup, and a new bitmap with it",
            )
        if use.mode != "never":
            await self._store_changes(bitmap)
        self._view = bitmap.take(f"job '{self.id}'", use.mode)
        if use.reduces:
            self._top.keep_only(self._view.bits)

    async def _store_changes(self, bitmap: DirtyBitmap) -> None:
        """The bitmap is going to change: where it is kept it says so first."""
        store = self._bitmap_node.bitmap_store
        if bitmap.persistent and store is not None:
            await store.begin()

    async def give_back(self) -> None:
        """Undo `take`: the transaction fails."""
        if self.chain is not None:
            await self.chain.undo()
        if self._view is not None:
            self._view.drop()
            self._view = None

    def remove_target(self) -> None:
        """Nobody has come to know of the file that was made for the job."""
        chain, self.chain = self.chain, None
        if chain is not None:
            chain.remove_files()
        created, self._created = self._created, None
        if created is not None:
            os.unlink(created)

    def _check_filter(self, model: Model) -> None:
        """The device is a backup-top, whose point in time is over."""
        device = self.options.device
        if model.node(device).driver is not BackupTop:
            raise GraphError(
                "is not a backup-top, so the backup needs a target", node=device, hint="give the job's 'target'"
            )
        for root in model.roots_above(device):
            edge = model.edge(root_key(root.name), ROOT_EDGE)
            if root.stays and edge is not None and edge.child == device:
                raise GraphError(f"its target is being completed by {root.owner} already", node=device)
        if self._use is not None:
            raise GraphError(LATE_BITMAP, node=device, op="backup", hint=LATE_BITMAP_HINT)

    def _filter(self, target: str) -> dict[str, Any]:
        options = self.options
        description: dict[str, Any] = {
            "driver": BackupTop.name,
            "file": options.device,
            "target": target,
            "on-cbw-error": options.on_cbw_error,
            "cbw-timeout": options.cbw_timeout,
        }
        if options.min_cluster_size is not None:
            description["min-cluster-size"] = options.min_cluster_size
        if options.filter_node_name is not None:
            description["node-name"] = options.filter_node_name
        return description

    async def run(self) -> None:
        assert self._loop is not None
        if self.options.sync == "none":
            await self._until_cancelled()
        await self._loop.run()
        await self._backend.enter()
        try:
            await self._top.target.flush()
        except BaseException:
            self._unflushed = True
            raise
        finally:
            self._backend.leave()

    async def _until_cancelled(self) -> None:
        """Guest writes do the copying; the job only ends by being cancelled, or with the snapshot."""
        while True:
            await self.pause_point()
            waits = [asyncio.create_task(event.wait()) for event in (self._top.lost, self._pause_asked)]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
            if self._top.broken is not None:
                raise self._top.broken

    def set_speed(self, speed: int) -> None:
        self.check(Verb.SET_SPEED)
        if speed < 0:
            raise JobError(f"speed {speed} is negative", op=f"job '{self.id}'")
        assert self._loop is not None
        self._loop.limit.set_speed(speed)

    # End.

    def check_group(self) -> None:
        if self.options.sync == "none":
            raise JobError(
                "with sync 'none' the job ends by being cancelled, and would cancel the rest of its group",
                op=f"job '{self.id}'",
                hint="use completion-mode 'individual'",
            )

    async def prepare(self) -> None:
        if self.chain is not None:
            await self._backend.enter()
            try:
                await self.chain.record()
            finally:
                self._backend.leave()
        if self._view is not None and self._view.mode != "never":
            await self._store_changes(self._view.bitmap)

    async def commit(self) -> None:
        if self.chain is not None:
            if self._view is not None:  # the bitmap goes
                self._view.end(succeeded=True)
                self._view = None
            await self.chain.commit()

    async def abort(self) -> None:
        if self.chain is not None:
            await self.chain.discard()

    async def clean(self) -> None:
        await self._detach()
        if self._loop is not None and self.options.sync != "none":
            self._loop.tell()  # the last bit may have gone to guest writes, which by now have counted

    async def _detach(self) -> None:
        try:
            await self._leave(remove=self._own_filter)
        except BlockGraphError:
            # Somebody still uses the kept image (a snapshot-access over the filter): it is theirs to remove.
            if self._backend in self._graph.backends():
                await self._leave(remove=False)
            raise

    async def _leave(self, *, remove: bool) -> None:
        async with self._graph.transaction(forced=True) as change:
            if self._view is not None and self.failed:
                change.act(_NoteLeft(self))
            change.detach(self._backend)
            if remove:
                change.remove_filter(self.filter_name)

    async def note_left(self, change: Transaction) -> None:
        """For `_NoteLeft`: everything is drained, so what is not copied is in the bitmap."""
        target = self._top.target.node
        try:
            await target.flush()
        except BlockGraphError:
            self._unflushed = True
        if change.unflushed & {target.name, *self._graph.model.descendants(target.name)}:
            self._unflushed = True
        if not self._unflushed:
            self._left = self._top.copy.bitmap.copy()

    def settle(self, succeeded: bool) -> None:
        if self._view is None:
            return
        left = self._left
        if left is None and self._use is not None and not self._use.reduces:
            left = Bitmap(self._view.bits.size, self._view.bits.granularity)
            left.fill()
        self._view.end(succeeded=succeeded, left=left)
        self._view = None


class _Start(Action):
    """Starts a job at the instant of the transaction."""

    def __init__(self, job: BackupJob, change: Transaction) -> None:
        self._job = job
        self._change = change

    def nodes(self) -> Iterable[str]:
        names = bitmap_nodes(self._change.candidate, self._job.options)
        return names if self._job.chain is None else [*names, self._job.chain.node]

    async def prepare(self, change: Transaction) -> None:
        await self._job.take(change)

    async def abort(self) -> None:
        await self._job.give_back()

    def commit(self) -> None:
        self._job.group.launch()

    def dropped(self) -> None:
        self._job.remove_target()
        self._job.never_was()


class _NoteLeft(Action):
    """Finds out what a job that failed has not copied."""

    def __init__(self, job: BackupJob) -> None:
        self._job = job

    def nodes(self) -> Iterable[str]:
        return (self._job.filter_name,)

    async def prepare(self, change: Transaction) -> None:
        await self._job.note_left(change)
