# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The one copying loop: workers take runs from a BlockCopy until nothing is left to copy.

What fails goes back into the bitmap, and the error policy decides: report ends the job, ignore tries again after a
pause that doubles, stop pauses the job until it is resumed.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Awaitable, Callable

from blockgraph.backend import Backend
from blockgraph.block_copy import BlockCopy, CopyFailed
from blockgraph.errors import BlockGraphError
from blockgraph.jobs.job import Job
from blockgraph.jobs.options import OnError
from blockgraph.jobs.progress import RateLimit

#: Bytes of data copied at a time when the job does not say: more while that is quick and nobody waits for them, less
#: when it is slow or a guest does.
_CHUNKS = (8 << 20, 64 << 20)

#: What is quick, and what is slow, seconds: a guest's write may have to wait for as long.
_QUICK, _SLOW = 0.05, 0.2

#: Pause before an ignored error is tried again, seconds: first, and at most.
_BACK_OFF = (0.1, 10.0)


class CopyLoop:
    """Runs a BlockCopy to its end for a job.

    Attributes:
        limit: speed.
        sleep: how to wait before trying again (tests replace it).
    """

    def __init__(
        self,
        job: Job,
        copy: BlockCopy,
        backend: Backend,
        *,
        workers: int,
        chunk: int,
        speed: int,
        on_source_error: OnError,
        on_target_error: OnError,
        broken: Callable[[], BlockGraphError | None],
    ) -> None:
        self.limit = RateLimit(speed)
        self.sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
        self._job = job
        self._copy = copy
        self._backend = backend
        self._workers = workers
        self._bounds = tuple(max(bound, copy.cluster_size) for bound in ((chunk, chunk) if chunk else _CHUNKS))
        self._chunk = self._bounds[0]
        self._waits = copy.waits
        self._policy: dict[str, OnError] = {"source": on_source_error, "target": on_target_error}
        self._broken = broken
        self._failure: CopyFailed | None = None

    async def run(self) -> None:
        """Until every bit is clear and no copy is in flight.

        Raises: the cause, when the policy is to report, or the snapshot was lost.
        """
        back_off = _BACK_OFF[0]
        while True:
            await self._job.pause_point()
            before = self._copy.bytes_copied
            await self._run_workers()
            if (lost := self._broken()) is not None:
                raise lost
            if self._failure is not None:
                failure, self._failure = self._failure, None
                if self._copy.bytes_copied > before:
                    back_off = _BACK_OFF[0]
                if self._decide(failure):
                    await self.sleep(back_off)
                    back_off = min(back_off * 2, _BACK_OFF[1])
            elif not self._copy.pending(0, self._copy.length):
                self.tell()  # guest writes may have copied the last of it
                return  # else the workers stopped for a pause, which may be over already

    async def _run_workers(self) -> None:
        tasks = [asyncio.create_task(self._worker()) for _ in range(self._workers)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _worker(self) -> None:
        while not (self._job.pause_requested or self._failure or self._broken()):
            await self.limit.wait()
            await self._backend.enter()
            try:
                if not await self._step():
                    return
            except CopyFailed as failure:
                self._failure = self._failure or failure
            finally:
                self._backend.leave()
                self.tell()

    async def _step(self) -> bool:
        """Copy some. False: nothing is left and nothing is in flight."""
        start = time.perf_counter()
        asked = self._chunk_now()
        moved = await self._copy.copy_next(asked)
        if moved is None:
            return False
        took = time.perf_counter() - start
        waits, self._waits = self._waits, self._copy.waits
        least, most = self._bounds
        # Of the workers that are at it each knows its own chunk, and the next one is changed once by all.
        if self._waits > waits or took > _SLOW:
            self._chunk = max(least, min(self._chunk, asked // 2))
        elif took < _QUICK:
            self._chunk = min(most, max(self._chunk, asked * 2))
        self.limit.charge(moved)
        return True

    def _chunk_now(self) -> int:
        """No longer than about a slice of a speed limit takes, and towards the end a share for each worker."""
        if self.limit.speed:
            wanted = min(self._chunk, self.limit.speed // 10)
        else:
            wanted = min(self._chunk, max(self._bounds[0], self._copy.left // (2 * self._workers)))
        return max(wanted - wanted % self._copy.cluster_size, self._copy.cluster_size)

    def _decide(self, failure: CopyFailed) -> bool:
        """True: try again after a pause. Else the job is paused. Raises the cause when it is to be reported."""
        error, policy = failure.error, self._policy[failure.side]
        if policy == "enospc":
            policy = "stop" if error.errno == errno.ENOSPC else "report"
        self._job.report(error, policy)
        if policy == "report":
            raise error
        if policy == "stop":
            self._job.stop_on(error)
            return False
        return True

    def tell(self) -> None:
        """Bring the job's progress up to date."""
        self._job.progress.update(self._copy.bytes_copied, self._copy.bytes_copied + self._copy.left)
