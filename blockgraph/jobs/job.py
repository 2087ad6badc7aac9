# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Job: a task with a state table, verbs, progress and an end that can be held back.

run ──► waiting ──► pending ──► prepare ──► commit | abort ──► clean ──► settle ──► concluded ──► null

A subclass gives `start`, `run`, and what of the other steps it needs. How a job ends is decided with its group.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from blockgraph.errors import BlockGraphError, JobError
from blockgraph.jobs.group import JobGroup
from blockgraph.jobs.progress import Progress
from blockgraph.jobs.states import TRANSITIONS, VERBS, JobState, Verb

log = logging.getLogger(__name__)

IoStatus = Literal["ok", "failed", "nospace"]


@dataclass(frozen=True)
class JobEvent:
    """Something happened to a job.

    Attributes:
        job: its id.
        kind: "state" (it entered `state`), "error" (its own I/O failed: `error`, and what was done: `action`),
            "completed" (`error` set when it failed) or "cancelled".
    """

    job: str
    kind: Literal["state", "error", "completed", "cancelled"]
    state: JobState
    error: str | None = None
    action: str | None = None


class Job:
    """See the module's text. All methods on the graph's loop thread.

    Attributes:
        id, type: its name, and what it is.
        state: see states.
        progress: bytes.
        error: why it failed; None while it has not.
        cancelled: it was cancelled.
        io_status: of a job that stopped itself: "failed" or "nospace"; the first error counts.
        listeners: called with every JobEvent.
        group: the jobs that it concludes with, itself among them.
        body: for the group: the task that `cancel` cancels.
    """

    type: ClassVar[str]

    def __init__(self, job_id: str, *, auto_finalize: bool = True, auto_dismiss: bool = True) -> None:
        self.id = job_id
        self.state = JobState.CREATED
        self.progress = Progress()
        self.error: BlockGraphError | None = None
        self.cancelled = False
        self.io_status: IoStatus = "ok"
        self.auto_finalize = auto_finalize
        self.auto_dismiss = auto_dismiss
        self.listeners: list[Callable[[JobEvent], None]] = []
        self._user_paused = False
        self._resumed = asyncio.Event()
        self._pause_asked = asyncio.Event()
        self._ending = False
        self._over = asyncio.Event()
        self.body: asyncio.Task[Any] | None = None
        self.group = JobGroup()
        self.group.jobs.append(self)

    # What a subclass gives.

    async def start(self) -> None:
        """Take what the job needs. After an error the job was never there.

        Raises: BlockGraphError.
        """

    async def run(self) -> None:
        """The work. Calls `pause_point` between pieces. May be cancelled anywhere."""
        raise NotImplementedError

    async def prepare(self) -> None:
        """Last step that may fail."""

    async def commit(self) -> None:
        """The job succeeded."""

    async def abort(self) -> None:
        """The job failed or was cancelled."""

    async def clean(self) -> None:
        """Give back what `start` took."""

    def settle(self, succeeded: bool) -> None:
        """The very end. Must not fail.

        Args:
            succeeded: this job, and every other of its group.
        """

    def check_group(self) -> None:
        """Refuse to share the fate of other jobs.

        Raises:
            JobError: why.
        """

    def set_speed(self, speed: int) -> None:
        """Change the limit, bytes per second."""
        self.check(Verb.SET_SPEED)
        raise JobError("has no speed limit", op=f"job '{self.id}'")

    # Verbs.

    def check(self, verb: Verb) -> None:
        """Refuse a verb that the state does not allow.

        Raises:
            JobError: it does not.
        """
        if self.state not in VERBS[verb]:
            allowed = ", ".join(sorted(VERBS[verb]))
            raise JobError(f"can not {verb} in state '{self.state}' (allowed: {allowed})", op=f"job '{self.id}'")

    def pause(self) -> None:
        """Stop at the next pause point, until `resume`."""
        self.check(Verb.PAUSE)
        if self._user_paused:
            raise JobError("is paused already", op=f"job '{self.id}'")
        self._user_paused = True
        self._resumed.clear()
        self._pause_asked.set()

    def resume(self) -> None:
        """Go on; also clears what made the job stop by itself."""
        self.check(Verb.RESUME)
        if not self._user_paused:
            raise JobError("is not paused", op=f"job '{self.id}'")
        self._resume()

    def _resume(self) -> None:
        self._user_paused = False
        self.io_status = "ok"
        self._pause_asked.clear()
        self._resumed.set()

    def cancel(self) -> None:
        """End the job, and its group; what it took is given back. Await `wait` for the end."""
        self.check(Verb.CANCEL)
        if self._ending:
            raise JobError("is concluding already", op=f"job '{self.id}'")
        if not self.cancelled:
            self.group.cancel()

    def finalize(self) -> None:
        """Let a pending job conclude, and its group."""
        self.check(Verb.FINALIZE)
        self.group.finalize()

    def dismiss(self) -> None:
        """Forget a concluded job."""
        self.check(Verb.DISMISS)
        self.enter(JobState.NULL)

    @property
    def failed(self) -> bool:
        """It failed, or was cancelled."""
        return self.cancelled or self.error is not None

    @property
    def ending(self) -> bool:
        """Its fate is decided; only `wait` and `dismiss` make sense."""
        return self._ending or self.state in (JobState.CONCLUDED, JobState.NULL)

    async def wait(self) -> None:
        """Until the job has concluded; look at `error` and `cancelled`."""
        await self._over.wait()

    # Life.

    async def begin(self) -> None:
        """Start the job; it runs on by itself.

        Raises: what `start` raised; the job is then gone.
        """
        try:
            await self.start()
        except BaseException:
            self.never_was()
            raise
        self.group.launch()

    def never_was(self) -> None:
        """It could not start."""
        self.enter(JobState.NULL)
        self._over.set()

    # For the group.

    async def work(self) -> None:
        """From running to waiting."""
        await self.run()
        await self.pause_point()  # paused at the very end: it stays until it is resumed
        self.enter(JobState.WAITING)

    def stop(self) -> None:
        """Be cancelled."""
        self.cancelled = True
        if self._user_paused:
            self._resume()
        if self.body is not None:
            self.body.cancel()

    def ends(self, *, failed: bool) -> None:
        """Its fate is decided."""
        self._ending = True
        if not failed:
            return
        if self.state is JobState.PAUSED:
            self.enter(JobState.RUNNING)
        self.enter(JobState.ABORTING)

    def conclude(self) -> None:
        """Everything is done; tell it."""
        text = str(self.error) if self.error else None
        if self.cancelled and self.error is None:
            self._tell(JobEvent(self.id, "cancelled", self.state))
        else:
            self._tell(JobEvent(self.id, "completed", self.state, text))
        self.enter(JobState.CONCLUDED)
        if self.auto_dismiss:
            self.enter(JobState.NULL)

    def over(self) -> None:
        """Nothing of it runs any more."""
        self._over.set()

    def enter(self, state: JobState) -> None:
        """Go to the next state."""
        assert state in TRANSITIONS[self.state], f"{self.state} -> {state}"
        self.state = state
        self._tell(JobEvent(self.id, "state", state))

    def _tell(self, event: JobEvent) -> None:
        for listener in list(self.listeners):
            try:
                listener(event)
            except Exception:
                log.exception("a listener of job '%s' failed", self.id)

    # For `run`.

    @property
    def pause_requested(self) -> bool:
        """The work should come to a pause point soon."""
        return self._user_paused

    async def pause_point(self) -> None:
        """Stay here while the job is paused."""
        while self._user_paused:
            self.enter(JobState.PAUSED)
            await self._resumed.wait()
            self.enter(JobState.RUNNING)

    def stop_on(self, error: BlockGraphError) -> None:
        """Pause the job by itself because of an error; only the user resumes it."""
        if self.io_status == "ok":
            self.io_status = "nospace" if error.errno == errno.ENOSPC else "failed"
        if not self._user_paused:
            self._user_paused = True
            self._resumed.clear()
            self._pause_asked.set()

    def report(self, error: BlockGraphError, action: str) -> None:
        """Tell listeners of an error of the job's own I/O, and what is done about it."""
        self._tell(JobEvent(self.id, "error", self.state, str(error), action))
