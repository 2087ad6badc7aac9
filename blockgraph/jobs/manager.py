# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The jobs of a graph, by id."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from blockgraph.errors import JobError
from blockgraph.jobs.backup import BackupJob
from blockgraph.jobs.job import Job, JobEvent
from blockgraph.jobs.options import BackupOptions
from blockgraph.jobs.states import JobState

if TYPE_CHECKING:
    from blockgraph.graph.graph import Graph


class JobManager:
    """Starts jobs and keeps them until they are dismissed.

    Attributes:
        jobs: by id.
        listeners: called with every event of every job started later.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.jobs: dict[str, Job] = {}
        self.listeners: list[Callable[[JobEvent], None]] = []
        graph.before_close.append(self.close)

    async def backup(self, options: BackupOptions) -> BackupJob:
        """Start a backup; when this returns, the point in time is taken.

        Raises:
            JobError: a job of that id is there.
            BlockGraphError: it could not start; the graph is as it was.
        """
        job_id = options.job_id or options.device
        if job_id in self.jobs:
            raise JobError("there already is a job of this id", op=f"job '{job_id}'")
        job = BackupJob(self._graph, options, job_id)
        job.listeners = [*self.listeners, self._forget]
        self.jobs[job_id] = job
        await job.begin()
        return job

    def _forget(self, event: JobEvent) -> None:
        if event.kind == "state" and event.state is JobState.NULL:
            self.jobs.pop(event.job, None)

    async def close(self) -> None:
        """Cancel what still runs and wait for the end of every job."""
        jobs = list(self.jobs.values())
        for job in jobs:
            if not job.ending:
                job.cancel()
        for job in jobs:
            await job.wait()
