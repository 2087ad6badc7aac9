# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Other programs, in sessions of their own, so that Ctrl-C reaches us alone; none outlives what it was started for."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

_PATIENCE = 30.0


class Done(NamedTuple):
    """What a program left behind.

    Attributes:
        status: its exit status.
        output, errors: what it wrote.
    """

    status: int
    output: str
    errors: str

    def reason(self) -> str:
        """Why it failed, in one line."""
        said = (self.errors.strip() or self.output.strip()).splitlines()
        return said[-1] if said else f"status {self.status}"


@contextmanager
def running(argv: Sequence[str], **more: Any) -> Iterator[subprocess.Popen[str]]:
    """A program that is ended with the context; `more` as for Popen."""
    process: subprocess.Popen[str] | None = None
    try:
        with _signals_held():
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True, text=True, **more)
        yield process
    finally:
        if process is not None:
            _end(process)


def run_program(argv: Sequence[str], folder: Path | None = None) -> Done:
    """Run a program to its end.

    Args:
        folder: where it runs.
    """
    with running(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder) as process:
        output, errors = process.communicate()
    return Done(process.returncode, output, errors)


@contextmanager
def _signals_held() -> Iterator[None]:
    """SIGINT and SIGTERM come at the end: one amid Popen would leave a process that nobody knows."""
    held: list[int] = []
    before = {n: signal.signal(n, lambda number, _: held.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for each in held:
            signal.raise_signal(each)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
