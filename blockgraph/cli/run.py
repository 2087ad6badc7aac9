# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""`blockgraph run FILE`: open a graph, start its exports and jobs, and stay until told to end.

Signals:
    SIGINT, SIGTERM   end: stop listening, let requests in flight end, cancel jobs, write back, close
    the same again    hurry: disconnect clients at once (images are still closed in order)
    a third time      die
    SIGUSR1           resume the jobs that an error has stopped
    SIGUSR2           print what each export has done so far (`blockgraph.cli.stats`)

Exit status:
    0                 ended as asked
    1                 a problem of the file, something could not be started, a job failed, or closing failed
    130, 143          SIGINT or SIGTERM cut a job short (a job with sync "none" has no other end)
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from argparse import Namespace, _SubParsersAction
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from blockgraph.cli.progress import ProgressView
from blockgraph.cli.stats import describe
from blockgraph.errors import BlockGraphError
from blockgraph.graph.description import Description
from blockgraph.graph.graph import Graph
from blockgraph.graph.load import examine
from blockgraph.graph.problem import errors, printable
from blockgraph.jobs.backup import BackupJob
from blockgraph.jobs.job import Job, JobEvent
from blockgraph.jobs.states import VERBS, JobState, Verb
from blockgraph.session import Session

_log = logging.getLogger(__name__)

#: States worth a line; the others follow each other within moments.
_TOLD = frozenset({JobState.RUNNING, JobState.PAUSED})


def register(subparsers: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "run",
        help="open a graph, start its exports and jobs",
        description="Open a graph, start its exports and jobs, and stay until SIGINT or SIGTERM.",
        epilog="Signals: SIGUSR1 resumes jobs that an error has stopped, SIGUSR2 prints statistics of the exports. "
        "Exit status: 0 ended as asked; 1 something failed; 130, 143 a signal cut a job short.",
    )
    parser.add_argument("file", metavar="FILE", help="graph file (TOML, JSON or YAML)")
    parser.add_argument("--exit-when-done", action="store_true", help="end when every job has ended")
    parser.add_argument("--stats", action="store_true", help="print statistics of the exports at the end")
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    """Run it; the exit status."""
    description, problems = examine(args.file)
    for problem in problems:
        print(problem, file=sys.stderr)
    if errors(problems):
        return 1
    with _told_on_stderr() as told:
        runner = Runner(description, exit_when_done=args.exit_when_done, stats=args.stats, told=told)
        return asyncio.run(runner.run())


class _Told(logging.Handler):
    """What is logged, as lines like all others. An error is told once, although flush, close and the graph meet it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._errors: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        args = record.args if isinstance(record.args, tuple) else ()
        if not any(self.again(arg) for arg in args if isinstance(arg, BlockGraphError)):
            _print_error(self.format(record))

    def again(self, error: BlockGraphError) -> bool:
        """It has been told, whatever stood before it; from now on it has."""
        text = str(error)
        known = text in self._errors
        self._errors.add(text)
        return known


@contextmanager
def _told_on_stderr() -> Iterator[_Told]:
    told = _Told()
    logger = logging.getLogger("blockgraph")
    logger.addHandler(told)
    try:
        yield told
    finally:
        logger.removeHandler(told)


class Runner:
    """A session with a terminal.

    Args:
        exit_when_done: end when every job has ended. So it does without exports: nothing is left to do.
        stats: print what the exports have done at the end.
        told: what has been logged.
    """

    def __init__(self, description: Description, *, exit_when_done: bool, stats: bool, told: _Told) -> None:
        self._description = description
        self._logged = told
        self._stats = stats
        self._ends_with_jobs = exit_when_done or not description.exports
        self._console = Console(highlight=False, markup=False)
        self._stop = asyncio.Event()
        self._signals = 0
        self._first_signal: signal.Signals | None = None
        self._task: asyncio.Task[Session] | None = None
        self._session: Session | None = None
        self._status = 0

    async def run(self) -> int:
        """From start to end; the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled, number)
        loop.add_signal_handler(signal.SIGUSR1, self._resume)
        loop.add_signal_handler(signal.SIGUSR2, self._tell_stats)
        self._task = asyncio.create_task(Session.start(self._description, listener=self._told))
        try:
            self._session = await self._task
        except asyncio.CancelledError:
            return self._signal_status()
        except BlockGraphError as error:
            self._fail(str(error))
            return 1
        await self._serve(self._session)
        return self._status

    async def _serve(self, session: Session) -> None:
        for export in session.exports.values():
            self._say(f"export '{export.options.id}': {export.uri}")
        for taken in session.checkpoints:
            since = "" if taken.checkpoint.since is None else f", the first since '{taken.checkpoint.since}'"
            self._say(f"checkpoint '{taken.checkpoint.name}': taken{since}")
        self._say("ready")
        following = [asyncio.create_task(self._follow(job)) for job in session.jobs]
        view = asyncio.create_task(ProgressView(self._console, session.jobs).run())
        try:
            await self._until_end(session)
        finally:
            view.cancel()
            await asyncio.wait({view})
            if not view.cancelled() and (bug := view.exception()):
                _log.error("progress could not be shown", exc_info=bug)
            await self._close(session)
            await asyncio.gather(*following)

    async def _until_end(self, session: Session) -> None:
        stop = asyncio.create_task(self._stop.wait())
        waits: set[asyncio.Task[Any]] = {stop}
        if self._ends_with_jobs:
            waits.add(asyncio.create_task(session.wait_jobs()))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()

    async def _close(self, session: Session) -> None:
        unfinished = [job for job in session.jobs if job.state not in (JobState.CONCLUDED, JobState.NULL)]
        if any(not _endless(job) for job in unfinished) and not self._status:
            self._status = self._signal_status()
        try:
            await session.close()
        except BlockGraphError as error:
            if not self._logged.again(error):
                self._fail(f"closing: {explain(session.graph, error)}")
            self._status = 1
        if self._stats:
            self._tell_stats()

    async def _follow(self, job: Job) -> None:
        """Tell how a job ended, as long as its nodes can still be named."""
        assert self._session is not None
        await job.wait()
        if job.error is not None:
            self._fail(f"job '{job.id}' failed: {explain(self._session.graph, job.error)}")
            self._status = 1
        elif job.cancelled:
            self._say(f"job '{job.id}': cancelled")
        else:
            self._say(f"job '{job.id}': completed")

    # Events.

    def _told(self, event: JobEvent) -> None:
        if event.kind == "error":
            what = {"ignore": "tries again", "stop": "stopped, SIGUSR1 resumes it"}.get(event.action or "")
            if what is not None:
                self._fail(f"job '{event.job}': {event.error}; {what}")
        elif event.kind == "note":
            self._say(f"job '{event.job}' {event.error}")
        elif event.kind == "state" and event.state in _TOLD:
            self._say(f"job '{event.job}': {event.state}")

    def _signalled(self, number: signal.Signals) -> None:
        self._signals += 1
        if self._signals == 1:
            self._first_signal = number
            self._stop.set()
            if self._session is None and self._task is not None:
                self._task.cancel()
            else:
                self._say("ending; once more to hurry")
            return
        loop = asyncio.get_running_loop()
        for each in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)
        if self._session is not None and self._session.server is not None:
            self._session.server.abort()

    def _resume(self) -> None:
        for job in self._session.jobs if self._session is not None else ():
            if job.state is JobState.PAUSED and job.state in VERBS[Verb.RESUME]:
                job.resume()

    def _tell_stats(self) -> None:
        if self._session is not None:
            self._say(describe(self._session))

    def _signal_status(self) -> int:
        return 128 + self._first_signal if self._first_signal is not None else 1

    # Words.

    def _say(self, text: str) -> None:
        self._console.print(_clean(text), soft_wrap=True)

    def _fail(self, text: str) -> None:
        _print_error(text)


def _print_error(text: str) -> None:
    print(f"blockgraph: {_clean(text)}", file=sys.stderr, flush=True)


def _clean(text: str) -> str:
    """Graph files and images must not write to the terminal."""
    return "\n".join(map(printable, text.split("\n")))


def _endless(job: Job) -> bool:
    """Being cancelled is its only end."""
    return isinstance(job, BackupJob) and job.options.sync == "none"


def explain(graph: Graph, error: BlockGraphError) -> str:
    """The error's text, with the file of its node where it does not name it itself."""
    if error.file is None and error.node is not None and graph.model.has(error.node):
        error.file = graph.node(error.node).driver.filename()
    return str(error)
