# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""JobGroup: jobs that conclude together (completion mode "grouped"). Every job is in one, mostly alone.

```
    run ──► waiting ─┐
    run ──► waiting ─┴─► all pending ──► finalize ──► prepare, in turn ──► commit ──► clean ──► settle
      └── fails or is cancelled: the others are cancelled ─────────────────► abort ──► clean ──► settle
```

Each step is done for all members before the next one. A single member with auto-finalize=false holds all in pending,
and finalizing any of them finalizes all.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Literal

from blockgraph.errors import BlockGraphError, JobError
from blockgraph.jobs.states import JobState

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from blockgraph.jobs.job import Job

log = logging.getLogger(__name__)

#: What the jobs of one transaction have to do with each other's fate: nothing; or all succeed or none does.
CompletionMode = Literal["individual", "grouped"]


class JobGroup:
    """See the module's text.

    Attributes:
        jobs: in the order they joined.
    """

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self._finalized = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def join(self, job: Job) -> None:
        """Take a job in.

        Raises:
            JobError: the group runs already, or the job can not be in a group.
        """
        if self._task is not None:
            raise JobError("the group of jobs runs already", op=f"job '{job.id}'")
        job.check_group()
        job.group = self
        self.jobs.append(job)

    def launch(self) -> None:
        """All members run, once the current step of the loop is over."""
        if self._task is None:
            self._task = asyncio.create_task(self._live(), name=f"jobs {', '.join(job.id for job in self.jobs)}")

    def cancel(self) -> None:
        """Cancel every member."""
        for job in self.jobs:
            if job.error is None:
                job.stop()

    def finalize(self) -> None:
        """Let pending members conclude."""
        self._finalized.set()

    @property
    def _failed(self) -> bool:
        return any(job.failed for job in self.jobs)

    async def _live(self) -> None:
        try:
            for job in self.jobs:
                job.enter(JobState.RUNNING)
            await asyncio.gather(*(self._run(job) for job in self.jobs))
            if not self._failed:
                await self._decide()
            await self._conclude()
        finally:
            for job in self.jobs:
                job.over()

    async def _run(self, job: Job) -> None:
        job.body = asyncio.create_task(job.work(), name=f"job {job.id} work")
        if job.cancelled:  # before it had begun
            job.body.cancel()
        await self._outcome(job, job.body)
        if job.failed:
            self.cancel()

    async def _decide(self) -> None:
        """All work is done."""
        for job in self.jobs:
            job.enter(JobState.PENDING)
        if not all(job.auto_finalize for job in self.jobs):
            wait = asyncio.create_task(self._finalized.wait())
            for job in self.jobs:
                job.body = wait
            await self._outcome(self.jobs[0], wait)
        for job in self.jobs:
            if self._failed:
                break
            prepare = asyncio.create_task(job.prepare(), name=f"job {job.id} prepare")
            for each in self.jobs:
                each.body = prepare
            await self._outcome(job, prepare)
        if self._failed:
            self.cancel()

    async def _outcome(self, job: Job, task: asyncio.Task[object]) -> None:
        """Wait for the task, and note how it ended."""
        try:
            await task
        except asyncio.CancelledError:
            job.cancelled = True
        except BlockGraphError as error:
            job.error = error
        except Exception as error:  # a bug in a job must not leave its filter behind
            log.exception("job '%s' failed unexpectedly", job.id)
            job.error = _unexpected(job, error)

    async def _conclude(self) -> None:
        failed = self._failed
        for job in self.jobs:
            job.ends(failed=failed)
        for job in self.jobs:
            await self._step(job, job.abort() if failed else job.commit())
        for job in self.jobs:
            await self._step(job, job.clean())
        succeeded = not self._failed
        for job in self.jobs:
            job.settle(succeeded)
        for job in self.jobs:
            job.conclude()

    async def _step(self, job: Job, step: Awaitable[None]) -> None:
        try:
            await step
        except BlockGraphError as error:
            log.error("job '%s': %s", job.id, error)
            job.error = job.error or error
        except Exception as error:  # the job must end all the same
            log.exception("job '%s' failed unexpectedly at its end", job.id)
            job.error = job.error or _unexpected(job, error)


def _unexpected(job: Job, error: Exception) -> JobError:
    return JobError(f"unexpected {type(error).__name__}: {error}", op=f"job '{job.id}'")
