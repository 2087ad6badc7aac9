# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Session: a graph description that runs, with its exports and jobs. `blockgraph run` is this with a terminal.

Start: open the nodes with their bitmaps, take the address (a job must not have overwritten its target before it turns
out to be in use), give every export its backend and its views of bitmaps, take the checkpoints, start the jobs, those
of a group in one transaction (all these points in time are taken before any client can write), then serve the clients,
of which the first may be waiting. End: stop listening and let requests end, cancel jobs that still run, write back and
close.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from blockgraph.api import AsyncGraph, open_description
from blockgraph.backend import Backend
from blockgraph.checkpoints.described import Taken
from blockgraph.errors import BlockGraphError, GraphError, OptionError
from blockgraph.exports.nbd import AddExport, NbdExport, NbdServer, RemoveExport, start_server
from blockgraph.exports.options import DEFAULT_EXTENT_MAP, MIN_EXTENT_MAP, NbdExportOptions
from blockgraph.graph.action import Then
from blockgraph.graph.description import Description
from blockgraph.graph.policy import OpenPolicy
from blockgraph.jobs.job import Job, JobEvent
from blockgraph.jobs.manager import JobManager
from blockgraph.jobs.options import BackupOptions
from blockgraph.native.extent_map import DEFAULT_MEMORY, MIN_MEMORY

# Options are checked without loading the native core.
assert (MIN_EXTENT_MAP, DEFAULT_EXTENT_MAP) == (MIN_MEMORY, DEFAULT_MEMORY)


@dataclass(frozen=True)
class RunningExport:
    """An export and the backend it serves.

    Attributes:
        options: as described.
        backend: its root.
        uri: where clients find it.
        export: what the server has; its `stats` tell what it has done.
        added: how it came to be.
    """

    uri: str
    added: AddExport

    @property
    def options(self) -> NbdExportOptions:
        return self.added.options

    @property
    def backend(self) -> Backend:
        return self.added.backend

    @property
    def export(self) -> NbdExport:
        return self.added.export


class Session:
    """See the module's text. An async context manager; `start` makes one.

    Attributes:
        graph: the nodes.
        jobs: the jobs that were started, in the order of the description, those of a group after its first; ended
            ones too.
        manager: starts further jobs.
        checkpoints: those that were taken, in the order of the description; their backups are among `jobs`.
        exports: what is served, by id.
        server: the NBD server; None when nothing is exported.
    """

    def __init__(self, graph: AsyncGraph) -> None:
        self.graph = graph
        self.manager = JobManager(graph)
        self.jobs: list[Job] = []
        self.checkpoints: list[Taken] = []
        self.exports: dict[str, RunningExport] = {}
        self.server: NbdServer | None = None

    @classmethod
    async def start(
        cls,
        description: Description,
        *,
        policy: OpenPolicy | None = None,
        listener: Callable[[JobEvent], None] | None = None,
    ) -> Session:
        """Start everything described.

        Args:
            description: loaded, without problems.
            listener: called with every event of every job.
        Raises:
            BlockGraphError: something could not start; then nothing is left running.
        """
        session = cls(await open_description(description, policy=policy))
        if listener is not None:
            session.manager.listeners.append(listener)
        try:
            await session._start(description)
        except BaseException:
            await session.close()
            raise
        return session

    async def _start(self, description: Description) -> None:
        if description.exports and description.nbd_server is None:
            raise OptionError("exports of type 'nbd' need a section 'nbd-server'", path="exports")
        if description.nbd_server is not None:
            self.server = await start_server(description.nbd_server, accepting=False)
            async with self.graph.transaction() as change:
                added = [AddExport(change, self.server, export.options) for export in description.exports]
            self._serve(added)
        for checkpoint in description.checkpoints:
            taken = await Taken.take(self.graph, self.manager, self.server, checkpoint.options)
            self.checkpoints.append(taken)
            self.jobs += taken.jobs.values()
            self._serve(taken.exports)
        for together in _transactions([job.options for job in description.jobs]):
            self.jobs += await self.manager.backups(together)
        if self.server is not None:
            self.server.accept()

    def _serve(self, added: Iterable[AddExport]) -> None:
        """The session has these, and ends them, whatever becomes of the rest of the start."""
        for export in added:
            assert self.server is not None
            uri = self.server.uri(export.options.export_name)
            self.exports[export.options.id] = RunningExport(uri, export)

    async def add_export(self, options: NbdExportOptions) -> RunningExport:
        """Serve one more node; for one transaction with other changes see blockgraph.exports.nbd.AddExport.

        Raises:
            GraphError: the id or the name is taken, there is no such node or bitmap, there is no server, or the
                permissions can not be had.
        """
        if self.server is None:
            raise GraphError("there is no NBD server", op="export", hint="describe one in the section 'nbd-server'")
        if options.id in self.exports:
            raise GraphError(f"there already is an export '{options.id}'")
        async with self.graph.transaction() as change:
            added = AddExport(change, self.server, options)
            change.act(Then(lambda: self._serve([added])))
        return self.exports[options.id]

    async def remove_export(self, id: str, *, hard: bool = False) -> None:
        """Serve it no longer, and give its bitmaps free.

        Args:
            hard: disconnect its clients.
        Raises:
            GraphError: there is none of that id, or it has clients and `hard` is not given.
        """
        if id not in self.exports:
            raise GraphError(f"there is no export '{id}'")
        async with self.graph.transaction(forced=True) as change:
            RemoveExport(change, self.exports[id].added, hard=hard)
            change.act(Then(lambda: self.exports.pop(id)))

    async def wait_jobs(self) -> None:
        """Until every job has concluded."""
        await asyncio.gather(*(job.wait() for job in self.jobs))

    async def close(self) -> None:
        """End everything in order; the first failure is raised when all is closed."""
        failure: BlockGraphError | None = None
        steps = [self.manager.close, self._settle_checkpoints, self._end_views, self.graph.close]
        if self.server is not None:
            steps.insert(0, self.server.close)
        for step in steps:
            try:
                await step()
            except BlockGraphError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    async def _settle_checkpoints(self) -> None:
        for taken in self.checkpoints:
            await taken.settle()

    async def _end_views(self) -> None:
        for export in self.exports.values():
            export.added.end_views()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


def _transactions(jobs: list[BackupOptions]) -> Iterator[list[BackupOptions]]:
    """The jobs of each group together, at the place of the first of them."""
    groups: set[str] = set()
    for job in jobs:
        if job.group is None:
            yield [job]
        elif job.group not in groups:
            groups.add(job.group)
            yield [other for other in jobs if other.group == job.group]
