# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The command `blockgraph` as a process of its own."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import IO

#: Longest time to wait for anything, seconds; only a failing test takes so long.
PATIENCE = 60

#: Program of a Python that acts as the command.
MAIN = "import sys; from blockgraph.cli import main; sys.exit(main())"


class Command:
    """A running command.

    Attributes:
        process: its process.
        lines: what it has printed so far.
    """

    def __init__(self, folder: Path, arguments: tuple[str, ...]) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", MAIN, *arguments],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._queue: Queue[str | None] = Queue()
        self._errors: list[str] = []
        self._threads = [
            Thread(target=self._read, args=(self.process.stdout,)),
            Thread(target=self._errors.extend, args=(self.process.stderr,)),
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def wait_line(self, wanted: str) -> str:
        """The next line that contains `wanted`."""
        while (line := self._queue.get(timeout=PATIENCE)) is not None:
            self.lines.append(line)
            if wanted in line:
                return line
        raise AssertionError(f"'{wanted}' was not printed: {self.lines} {self.errors}")

    def end(self) -> int:
        """Wait for the end; the exit status."""
        status = self.process.wait(PATIENCE)
        for thread in self._threads:
            thread.join(PATIENCE)
        while (line := self._queue.get(timeout=PATIENCE)) is not None:
            self.lines.append(line)
        return status

    @property
    def errors(self) -> str:
        """What it wrote to stderr."""
        return "".join(self._errors)

    def close(self) -> None:
        """Kill what still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)
        for thread in self._threads:
            thread.join(PATIENCE)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


@contextmanager
def command(folder: Path, *arguments: str) -> Iterator[Command]:
    """Start `blockgraph ARGUMENTS...` in a folder."""
    running = Command(folder, arguments)
    try:
        yield running
    finally:
        running.close()


def graph_file(
    folder: Path, *, job: str | None = None, export: bool = True, target: str = "raw", name: str = "t"
) -> Path:
    """Write a graph file: raw node "disk" over disk.img, node "target" over t, an export and a backup job.

    Args:
        job: further members of the job; None: no job.
    """
    parts = ['[[nodes]]\nnode-name = "disk"\ndriver = "raw"\nfile = {driver = "file", filename = "disk.img"}\n']
    if job is not None:
        parts.append(
            f'[[nodes]]\nnode-name = "target"\ndriver = "{target}"\nfile = {{driver = "file", filename = "{name}"}}\n'
            f'[[jobs]]\ntype = "backup"\njob-id = "b0"\ndevice = "disk"\ntarget = "target"\n{job}\n'
        )
    if export:
        parts.append(
            '[nbd-server]\naddr = {type = "unix", path = "s.sock"}\n'
            '[[exports]]\ntype = "nbd"\nid = "guest"\nnode-name = "disk"\nwritable = true\n'
        )
    path = folder / "graph.toml"
    path.write_text("\n".join(parts))
    return path


def disk(folder: Path, size: int, name: str = "disk.img") -> bytes:
    """Make a dense disk of pseudo-random bytes; returns them."""
    content = random.Random(size).randbytes(size)
    (folder / name).write_bytes(content)
    return content
