# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Taken: a checkpoint of a graph file, with its backups or its exports, from the start of a graph to its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from blockgraph.checkpoints.checkpoints import Backups, Checkpoints
from blockgraph.errors import BlockGraphError
from blockgraph.graph.bitmaps import granularity_bytes
from blockgraph.graph.checkpoints import TIME, CheckpointOptions, export_id

if TYPE_CHECKING:
    from blockgraph.checkpoints.model import Checkpoint
    from blockgraph.exports.nbd.actions import AddExport
    from blockgraph.exports.nbd.server import NbdServer
    from blockgraph.graph.graph import Graph
    from blockgraph.jobs.backup import BackupJob
    from blockgraph.jobs.manager import JobManager

log = logging.getLogger(__name__)


class Taken:
    """See the module's text; `take` makes one.

    Attributes:
        checkpoint: with `full`, why the whole of a disk is copied.
        jobs: its backups, by disk.
        exports: of its view.
    """

    def __init__(self, checkpoint: Checkpoint, checkpoints: Checkpoints) -> None:
        self.checkpoint = checkpoint
        self.jobs: dict[str, BackupJob] = {}
        self.exports: Sequence[AddExport] = ()
        self._checkpoints = checkpoints
        self._following: asyncio.Task[None] | None = None

    @classmethod
    async def take(
        cls, graph: Graph, manager: JobManager, server: NbdServer | None, options: CheckpointOptions
    ) -> Taken:
        """Take it, as `options` say; what cannot be had leaves no checkpoint behind.

        Raises:
            BlockGraphError: as of `Checkpoints`.
        """
        checkpoints = Checkpoints(
            graph,
            prefix=options.prefix,
            granularity=granularity_bytes(options.granularity),
            epochs=options.epochs,
            persistent=options.persistent,
            sidecar=options.sidecar,
        )
        name = options.name.replace(TIME, datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ"))
        if options.backup:
            return await cls._backed_up(graph, manager, checkpoints, name, options)
        checkpoint = await checkpoints.create(name, options.disks, view=options.view, since=options.since)
        taken = cls(checkpoint, checkpoints)
        if options.view:
            assert server is not None, "told when the file was checked"
            try:
                taken.exports = await checkpoints.export(name, server, name=export_id(name, "{disk}"))
            except BaseException:
                await checkpoints.close_view(name)
                await checkpoints.delete(name)
                raise
        return taken

    @classmethod
    async def _backed_up(
        cls, graph: Graph, manager: JobManager, checkpoints: Checkpoints, name: str, options: CheckpointOptions
    ) -> Taken:
        backups = await checkpoints.backup(
            name, manager, options.backup, also=options.disks, since=options.since, grouped=options.grouped
        )
        taken = cls(backups.checkpoint, checkpoints)
        taken.jobs = backups.jobs
        for disk, reason in backups.checkpoint.full.items():
            if disk in backups.jobs:
                backups.jobs[disk].note(f"makes a full backup: {reason}")
        taken._following = asyncio.create_task(taken._follow(backups))
        return taken

    async def _follow(self, backups: Backups) -> None:
        """When one fails the checkpoint goes: a next backup copies what this one was to copy."""
        name = self.checkpoint.name
        try:
            await backups.wait()
            if any(job.error is not None or job.cancelled for job in self.jobs.values()):
                await self._checkpoints.delete(name)
                log.warning("checkpoint '%s' is deleted again: it has no backup of every disk", name)
        except BlockGraphError as error:
            log.error("checkpoint '%s' after its backups: %s", name, error)

    async def settle(self) -> None:
        """Until nothing is to be done after its backups, which have ended."""
        if self._following is not None:
            await self._following
