# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The life of a job: which state follows which, and what may be asked in each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from helpers.loop import in_loop

from blockgraph.errors import BlockGraphError, IOFailure, JobError
from blockgraph.jobs.job import Job, JobEvent
from blockgraph.jobs.states import TRANSITIONS, VERBS, JobState, Verb

S = JobState


class Steps(Job):
    """A job that stops at named points until the test lets it go on.

    Attributes:
        seen: what has been called.
        fail_in: raises in that step.
    """

    type = "steps"

    def __init__(self, **how: bool) -> None:
        super().__init__("j0", **how)
        self.seen: list[str] = []
        self.fail_in = ""
        self.gates: dict[str, asyncio.Event] = {}
        self.states = [self.state]
        self.events: list[JobEvent] = []
        self.listeners.append(self.note)

    def note(self, event: JobEvent) -> None:
        """A listener."""
        self.events.append(event)
        if event.kind == "state":
            self.states.append(event.state)

    def hold(self, step: str) -> None:
        """Stop in that step."""
        self.gates[step] = asyncio.Event()

    async def _step(self, name: str) -> None:
        self.seen.append(name)
        if name in self.gates:
            await self.gates[name].wait()
        if self.fail_in == name:
            raise IOFailure(f"{name} failed")

    async def start(self) -> None:
        await self._step("start")

    async def run(self) -> None:
        await self.pause_point()
        await self._step("run")
        await self.pause_point()

    async def prepare(self) -> None:
        await self._step("prepare")

    async def commit(self) -> None:
        await self._step("commit")

    async def abort(self) -> None:
        await self._step("abort")

    async def clean(self) -> None:
        await self._step("clean")


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until the condition holds."""
    for _ in range(100):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("never came true")


async def bring(state: JobState) -> Steps:
    """A job in that state."""
    job = Steps(auto_finalize=state is not S.PENDING, auto_dismiss=state is S.NULL)
    if state is S.CREATED:
        job.hold("start")
        asyncio.ensure_future(job.begin()).add_done_callback(lambda task: task.exception())
        await until(lambda: "start" in job.seen)
        return job
    for name in ("run", "clean"):
        if (state in (S.RUNNING, S.PAUSED) and name == "run") or (state is S.ABORTING and name == "clean"):
            job.hold(name)
    if state is S.ABORTING:
        job.fail_in = "run"
    await job.begin()
    if state is S.PAUSED:
        job.pause()
    await until(lambda: job.state is state)
    return job


async def end(job: Steps) -> None:
    """Let it go."""
    for gate in job.gates.values():
        gate.set()
    if not job.ending:
        job.cancel()
    await job.wait()


REACHED = [S.CREATED, S.RUNNING, S.PAUSED, S.PENDING, S.ABORTING, S.CONCLUDED, S.NULL]


def test_tables_are_those_of_the_specification() -> None:
    assert TRANSITIONS[S.PAUSED] == {S.RUNNING}
    assert TRANSITIONS[S.STANDBY] == {S.READY}
    assert TRANSITIONS[S.CREATED] == {S.RUNNING, S.ABORTING, S.NULL}
    assert TRANSITIONS[S.RUNNING] == {S.PAUSED, S.READY, S.WAITING, S.ABORTING}
    assert TRANSITIONS[S.READY] == {S.STANDBY, S.WAITING, S.ABORTING}
    assert TRANSITIONS[S.WAITING] == {S.PENDING, S.ABORTING}
    assert TRANSITIONS[S.PENDING] == {S.ABORTING, S.CONCLUDED}
    assert TRANSITIONS[S.ABORTING] == {S.ABORTING, S.CONCLUDED}
    assert TRANSITIONS[S.CONCLUDED] == {S.NULL}
    assert TRANSITIONS[S.NULL] == set()
    active = {S.CREATED, S.RUNNING, S.PAUSED, S.READY, S.STANDBY}
    assert VERBS[Verb.CANCEL] == active | {S.WAITING, S.PENDING}
    assert VERBS[Verb.PAUSE] == VERBS[Verb.RESUME] == VERBS[Verb.SET_SPEED] == active
    assert VERBS[Verb.COMPLETE] == {S.READY, S.STANDBY}
    assert VERBS[Verb.FINALIZE] == {S.PENDING}
    assert VERBS[Verb.DISMISS] == {S.CONCLUDED}


@pytest.mark.parametrize("state", REACHED)
@pytest.mark.parametrize("verb", ["cancel", "pause", "resume", "finalize", "dismiss", "set-speed"])
def test_verb_in_a_state_is_allowed_as_the_table_says(state: JobState, verb: str) -> None:
    @in_loop
    async def run() -> None:
        job = await bring(state)
        asked: dict[str, Callable[[], None]] = {
            "cancel": job.cancel,
            "pause": job.pause,
            "resume": job.resume,
            "finalize": job.finalize,
            "dismiss": job.dismiss,
            "set-speed": lambda: job.set_speed(1),
        }
        if state not in VERBS[Verb(verb)]:
            before = job.state
            with pytest.raises(JobError, match=f"can not {verb} in state '{state}'"):
                asked[verb]()
            assert job.state is before
        elif (verb == "resume" and state is not S.PAUSED) or (verb == "pause" and state is S.PAUSED):
            with pytest.raises(JobError, match="paused"):
                asked[verb]()
        elif verb == "set-speed":
            with pytest.raises(JobError, match="no speed limit"):
                asked[verb]()
        else:
            asked[verb]()
        if state is not S.NULL and job.state is not S.NULL:
            await end(job)
        await asyncio.sleep(0)

    run()


@in_loop
async def test_success_goes_through_every_step() -> None:
    job = Steps()
    await job.begin()
    await job.wait()
    assert job.states == [S.CREATED, S.RUNNING, S.WAITING, S.PENDING, S.CONCLUDED, S.NULL]
    assert job.seen == ["start", "run", "prepare", "commit", "clean"]
    assert [e.kind for e in job.events if e.kind != "state"] == ["completed"]
    assert job.error is None
    assert not job.cancelled


@pytest.mark.parametrize("step", ["run", "prepare"])
def test_failure_aborts_and_cleans(step: str) -> None:
    @in_loop
    async def run() -> None:
        job = Steps()
        job.fail_in = step
        await job.begin()
        await job.wait()
        assert job.states[-3:] == [S.ABORTING, S.CONCLUDED, S.NULL]
        assert job.seen[-2:] == ["abort", "clean"]
        assert "commit" not in job.seen
        (completed,) = [e for e in job.events if e.kind != "state"]
        assert (completed.kind, completed.error) == ("completed", f"{step} failed")

    run()


@pytest.mark.parametrize("step", ["commit", "clean"])
def test_failure_of_the_last_steps_still_concludes(step: str) -> None:
    @in_loop
    async def run() -> None:
        job = Steps()
        job.fail_in = step
        await job.begin()
        await job.wait()
        assert job.seen[-1] == "clean"
        assert job.state is S.NULL
        assert str(job.error) == f"{step} failed"

    run()


@in_loop
async def test_bug_in_a_step_still_concludes() -> None:
    class Buggy(Steps):
        async def clean(self) -> None:
            raise ZeroDivisionError("oops")

    job = Buggy()
    await job.begin()
    await job.wait()
    assert job.state is S.NULL
    assert isinstance(job.error, JobError)
    assert "ZeroDivisionError" in str(job.error)


@in_loop
async def test_bug_in_the_work_aborts() -> None:
    class Buggy(Steps):
        async def run(self) -> None:
            raise ZeroDivisionError("oops")

    job = Buggy()
    await job.begin()
    await job.wait()
    assert job.seen == ["start", "abort", "clean"]
    assert "ZeroDivisionError" in str(job.error)


@in_loop
async def test_listener_that_fails_does_not_disturb_the_job() -> None:
    job = Steps()

    def broken(_: JobEvent) -> None:
        raise ValueError("listener")

    job.listeners.insert(0, broken)
    await job.begin()
    await job.wait()
    assert job.states[-1] is S.NULL
    assert job.error is None


@in_loop
async def test_start_failing_means_the_job_was_never_there() -> None:
    job = Steps()
    job.fail_in = "start"
    with pytest.raises(BlockGraphError):
        await job.begin()
    assert job.states == [S.CREATED, S.NULL]
    await job.wait()


@in_loop
async def test_cancel_right_after_the_start_runs_nothing() -> None:
    job = Steps()
    job.hold("run")
    await job.begin()
    job.cancel()  # its task has not begun
    await job.wait()
    assert "run" not in job.seen
    assert job.seen[-2:] == ["abort", "clean"]
    assert "cancelled" in [e.kind for e in job.events]


@in_loop
async def test_cancel_during_the_start_ends_the_job() -> None:
    job = Steps()
    job.hold("start")
    begin = asyncio.ensure_future(job.begin())
    await until(lambda: "start" in job.seen)
    job.cancel()
    job.gates["start"].set()
    await begin
    await job.wait()
    assert "run" not in job.seen
    assert job.cancelled


@in_loop
async def test_cancel_paused_passes_through_running() -> None:
    job = await bring(S.PAUSED)
    await end(job)
    assert job.states == [S.CREATED, S.RUNNING, S.PAUSED, S.RUNNING, S.ABORTING, S.CONCLUDED]


@in_loop
async def test_cancel_pending_aborts() -> None:
    job = await bring(S.PENDING)
    job.cancel()
    await job.wait()
    assert job.states[-2:] == [S.ABORTING, S.CONCLUDED]
    assert job.seen[-2:] == ["abort", "clean"]
    assert "cancelled" in [e.kind for e in job.events]


@in_loop
async def test_cancel_twice_is_one() -> None:
    job = await bring(S.RUNNING)
    job.cancel()
    job.cancel()
    await job.wait()
    assert job.seen.count("abort") == 1


@pytest.mark.parametrize("step", ["commit", "clean"])
def test_cancel_while_concluding_is_refused_and_changes_nothing(step: str) -> None:
    @in_loop
    async def run() -> None:
        job = Steps()
        job.hold(step)
        await job.begin()
        await until(lambda: step in job.seen)
        with pytest.raises(JobError, match="concluding"):
            job.cancel()
        job.gates[step].set()
        await job.wait()
        assert not job.cancelled
        assert "completed" in [e.kind for e in job.events]

    run()


@in_loop
async def test_finalize_held_back_waits_in_pending() -> None:
    job = await bring(S.PENDING)
    assert "prepare" not in job.seen
    job.finalize()
    await job.wait()
    assert job.seen[-3:] == ["prepare", "commit", "clean"]


@in_loop
async def test_pause_at_the_very_end_stays_paused_until_resumed() -> None:
    job = Steps()
    job.hold("run")
    await job.begin()
    await until(lambda: "run" in job.seen)
    job.pause()
    job.gates["run"].set()
    await until(lambda: job.state is S.PAUSED)
    assert "prepare" not in job.seen
    job.resume()
    await job.wait()
    assert job.error is None


@in_loop
async def test_stop_on_error_keeps_the_first_status_until_resumed() -> None:
    job = await bring(S.RUNNING)
    job.stop_on(IOFailure("full", errno=28))
    job.stop_on(IOFailure("other"))
    assert job.io_status == "nospace"
    job.resume()
    assert job.io_status == "ok"
    job.gates["run"].set()
    await job.wait()


@in_loop
async def test_dismiss_by_hand_keeps_the_job_until_then() -> None:
    job = Steps(auto_dismiss=False)
    await job.begin()
    await job.wait()
    assert job.state is S.CONCLUDED
    job.dismiss()
    assert job.state is S.NULL
    with pytest.raises(JobError):
        job.dismiss()
