# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What `blockgraph run` shows of its jobs: bars on a terminal; else lines, few enough for a log."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from blockgraph.jobs.job import Job
from blockgraph.jobs.states import JobState
from blockgraph.text import format_rate, format_seconds, format_size

#: Seconds between two lines about a job, and between two pictures of its bar.
_LINES_EVERY = 5.0
_BARS_EVERY = 0.2

#: Room for the "^C" that the terminal writes behind a bar. On another line the bar could not be drawn over any more.
_ECHO = 3

_OVER = frozenset({JobState.CONCLUDED, JobState.NULL})


def describe(job: Job) -> str:
    """Bytes, share, rate and time left."""
    progress = job.progress
    share = 100 * progress.current / progress.total if progress.total else 100.0
    text = f"{share:5.1f} %  {format_size(progress.current)} of {format_size(progress.total)}"
    if job.state is not JobState.RUNNING:
        return f"{text}  {job.state if job.state not in _OVER else 'ended'}"
    text += f"  {format_rate(progress.rate)}"
    return text if progress.eta is None else f"{text}  {format_seconds(progress.eta)} left"


@dataclass(frozen=True)
class _Narrower:
    """Draws something a little narrower than the terminal."""

    content: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self.content, options.update_width(max(1, options.max_width - _ECHO)))


class _Bars(Progress):
    def get_renderables(self) -> Iterable[RenderableType]:
        return map(_Narrower, super().get_renderables())


class ProgressView:
    """Shows jobs until it is cancelled.

    Args:
        console: where; a terminal gets bars.
        jobs: as they were started.
    """

    def __init__(self, console: Console, jobs: Sequence[Job]) -> None:
        self._console = console
        self._jobs = jobs

    async def run(self) -> None:
        """Until every job has ended, or cancelled."""
        if self._console.is_terminal:
            await self._bars()
        else:
            await self._lines()

    async def _lines(self) -> None:
        while any(job.state not in _OVER for job in self._jobs):
            await asyncio.sleep(_LINES_EVERY)
            for job in self._jobs:
                if job.state not in _OVER:
                    self._console.print(f"job '{job.id}': {describe(job).strip()}", soft_wrap=True)

    async def _bars(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
        with _Bars(*columns, console=self._console, auto_refresh=False) as bars:
            tasks = {job: bars.add_task(f"job '{job.id}'", total=None, text="") for job in self._jobs}
            try:
                while any(job.state not in _OVER for job in self._jobs):
                    self._draw(bars, tasks)
                    await asyncio.sleep(_BARS_EVERY)
            finally:
                self._draw(bars, tasks)

    def _draw(self, bars: Progress, tasks: dict[Job, TaskID]) -> None:
        for job, task in tasks.items():
            total = job.progress.total or 1
            done = job.progress.current if job.progress.total or job.state not in _OVER else 1
            bars.update(task, total=total, completed=done, text=describe(job))
        bars.refresh()
