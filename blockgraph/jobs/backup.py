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
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from blockgraph.backend import Backend
from blockgraph.errors import BlockGraphError, GraphError, JobError
from blockgraph.filters.backup_top import BackupTop
from blockgraph.finish import finish
from blockgraph.jobs.copy_loop import CopyLoop
from blockgraph.jobs.create_target import create_target, created_file
from blockgraph.jobs.job import Job
from blockgraph.jobs.options import BackupOptions
from blockgraph.jobs.states import Verb
from blockgraph.options import NodeRef
from blockgraph.perm import Perm

if TYPE_CHECKING:
    from blockgraph.graph.graph import Graph


class BackupJob(Job):
    """See the module's text.

    Attributes:
        filter_name: the backup-top the job works through, once it has started.
    """

    type = "backup"

    def __init__(self, graph: Graph, options: BackupOptions, job_id: str) -> None:
        super().__init__(job_id, auto_finalize=options.auto_finalize, auto_dismiss=options.auto_dismiss)
        self.options = options
        self.filter_name = ""
        self._graph = graph
        self._own_filter = False
        self._loop: CopyLoop | None = None

    async def start(self) -> None:
        options = self.options
        self._backend = Backend(f"job-{self.id}", need=Perm(0), stays=True, owner=f"job '{self.id}'")
        target = options.target
        if options.mode == "create":
            target = await create_target(self._graph, options)
        try:
            await self._attach(target)
        except BaseException:
            if self._backend in self._graph.backends():  # cancelled when the change could no longer be stopped
                await finish(self.clean())
            if options.mode == "create":
                os.unlink(created_file(options))
            raise
        self._top = self._graph.node(self.filter_name).driver
        assert isinstance(self._top, BackupTop)
        self._top.copy.only_top = options.sync == "top"
        self._loop = CopyLoop(
            self,
            self._top.copy,
            self._backend,
            workers=options.max_workers,
            chunk=options.max_chunk,
            speed=options.speed,
            on_source_error=options.on_source_error,
            on_target_error=options.on_target_error,
            broken=self._broken,
        )
        self.progress.update(0, self._top.copy.bitmap.count())

    async def _attach(self, target: NodeRef | None) -> None:
        device = self.options.device
        async with self._graph.transaction() as change:
            if target is None:
                self._check_filter(device)
                self.filter_name = device
            else:
                if not isinstance(target, str):
                    target = change.add(target, owned=False)
                self.filter_name = change.add(self._filter(target))
                change.insert(self.filter_name, above=device)
                self._own_filter = True
            change.attach(self._backend, self.filter_name)
        top = self._graph.node(self.filter_name).driver
        assert isinstance(top, BackupTop)
        if self.options.sync == "top" and top.copy.serialising:
            # What the top layer does not have is not copied, also not when the guest overwrites it.
            raise GraphError(
                f"target '{top.target.node.name}' shows the live disk where nothing is copied: with sync 'top' it "
                "would show what the guest writes there later",
                node=device,
                hint="use sync 'full' or 'none', or give the target another backing node",
            )

    def _check_filter(self, device: str) -> None:
        if not isinstance(self._graph.node(device).driver, BackupTop):
            raise GraphError(
                "is not a backup-top, so the backup needs a target", node=device, hint="give the job's 'target'"
            )
        for root in self._graph.model.roots_above(device):
            if root.stays and root.backend is not None and root.backend.node.name == device:
                raise GraphError(f"its target is being completed by {root.owner} already", node=device)

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

    def _broken(self) -> BlockGraphError | None:
        assert isinstance(self._top, BackupTop)
        return self._top.broken

    async def run(self) -> None:
        assert self._loop is not None
        if self.options.sync == "none":
            await self._until_cancelled()
        await self._loop.run()
        assert isinstance(self._top, BackupTop)
        await self._backend.enter()
        try:
            await self._top.target.flush()
        finally:
            self._backend.leave()

    async def _until_cancelled(self) -> None:
        """Guest writes do the copying; the job only ends by being cancelled, or with the snapshot."""
        assert isinstance(self._top, BackupTop)
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

    async def clean(self) -> None:
        try:
            async with self._graph.transaction(forced=True) as change:
                change.detach(self._backend)
                if self._own_filter:
                    change.remove_filter(self.filter_name)
        except BlockGraphError:
            # Somebody still uses the kept image (a snapshot-access over the filter): it is theirs to remove.
            if self._backend in self._graph.backends():
                async with self._graph.transaction(forced=True) as change:
                    change.detach(self._backend)
            raise
