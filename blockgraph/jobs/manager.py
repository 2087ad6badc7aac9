# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The jobs of a graph, by id, and how they start: in a transaction, alone or with others.

```
job = await manager.backup(BackupOptions(...))                      # one
jobs = await manager.backups([..., ...])                            # several disks at one instant

async with graph.transaction() as change:                           # and whatever else shall happen at that instant
    change.act(AddBitmap(BitmapName("disk", "since-monday")))
    job = await manager.add(change, BackupOptions(...))
```
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from blockgraph.errors import JobError
from blockgraph.finish import finish
from blockgraph.jobs.backup import BackupJob
from blockgraph.jobs.group import JobGroup
from blockgraph.jobs.job import Job, JobEvent
from blockgraph.jobs.options import BackupOptions
from blockgraph.jobs.states import JobState

if TYPE_CHECKING:
    from blockgraph.graph.graph import Graph
    from blockgraph.graph.transaction import Transaction


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
            OptionError: members that do not go together.
            BlockGraphError: it could not start; the graph is as it was.
        Cancelled: the job has not started, or has been cancelled.
        """
        (job,) = await self.backups([options])
        return job

    async def backups(self, options: Sequence[BackupOptions]) -> list[BackupJob]:
        """Start backups at one instant, or none of them; `completion_mode` of the options must agree.

        Raises, Cancelled: as `backup`.
        """
        modes = {each.completion_mode for each in options}
        if len(modes) > 1:
            raise JobError("the jobs of one group have different completion modes", op="start")
        group = JobGroup() if modes == {"grouped"} else None
        jobs: list[BackupJob] = []
        try:
            async with self._graph.transaction() as change:
                for each in options:
                    jobs += [await self.add(change, each, group)]
        except asyncio.CancelledError:
            for job in jobs:
                if job.state is not JobState.NULL and not job.ending:  # they had started when it came
                    job.cancel()
            for job in jobs:
                await finish(job.wait())
                if job.failed:
                    job.remove_target()
            raise
        return jobs

    async def add(self, change: Transaction, options: BackupOptions, group: JobGroup | None = None) -> BackupJob:
        """Let a backup start when the transaction commits, at the same instant as everything else in it.

        Args:
            group: what the job shares its fate with (completion mode "grouped"); None: nobody. Other actions of the
                transaction are not taken back when the group fails later.
        Raises:
            JobError: a job of that id is there, or the job can not be grouped.
            BlockGraphError: it can not start; let the error leave the transaction's block.
        Returns:
            The job; it does not run before the transaction has committed, and is gone when that fails.
        """
        job_id = options.job_id or options.device
        if job_id in self.jobs:
            raise JobError("there already is a job of this id", op=f"job '{job_id}'")
        job = BackupJob(self._graph, options, job_id)
        if group is not None:
            group.join(job)
        job.listeners = [*self.listeners, self._forget]
        self.jobs[job_id] = job
        await job.join(change)
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
