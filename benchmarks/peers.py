# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The peers that figures are compared with, run in turn with ours in one session.

These machines are noisy: `ratio` alternates the two sides and compares medians of the pairs' ratios.
"""

from __future__ import annotations

import json
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import pytest
from pytest_benchmark.fixture import BenchmarkFixture


def need(*tools: str) -> None:
    """Skip the benchmark when a peer is not installed."""
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")


class Compared(NamedTuple):
    """Two sides timed in turn.

    Attributes:
        ours, peer: median seconds.
        speed: median of peer / ours pair by pair: above 1.0 we are faster.
    """

    ours: float
    peer: float
    speed: float


def timed(run: Callable[[], object]) -> float:
    """Seconds that `run` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratio(ours: Callable[[], float], peer: Callable[[], float], *, rounds: int = 5) -> Compared:
    """Compare two sides, each of which does its work once and tells how many seconds of it count.

    They alternate; one round before does not count.
    """
    pairs = [(ours(), peer()) for _ in range(rounds + 1)][1:]
    return Compared(
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(b / a for a, b in pairs),
    )


def report(benchmark: BenchmarkFixture, compared: Compared, ours: Callable[[], object], **facts: object) -> None:
    """Put a comparison into pytest-benchmark's record, with one more run of ours under its clock."""
    benchmark.extra_info |= {
        "ours_s": round(compared.ours, 4),
        "peer_s": round(compared.peer, 4),
        "speed": round(compared.speed, 3),
        **facts,
    }
    benchmark.pedantic(ours, rounds=1)
    name = benchmark.name
    print(f"\n{name}: ours {compared.ours:.3f} s, peer {compared.peer:.3f} s, speed {compared.speed:.2f}")


class StorageDaemon:
    """A qemu-storage-daemon with its monitor on a unix socket; a context manager.

    Args:
        directory: for the socket.
        arguments: of the daemon, beside the monitor's.
    """

    def __init__(self, directory: Path, *arguments: str) -> None:
        path = directory / "qmp.sock"
        path.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            [
                "qemu-storage-daemon",
                *arguments,
                "--chardev",
                f"socket,id=qmp,path={path},server=on,wait=off",
                "--monitor",
                "chardev=qmp",
            ]
        )
        deadline = time.monotonic() + 10
        self._socket = socket.socket(socket.AF_UNIX)
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise
                time.sleep(0.01)
        self._file = self._socket.makefile("rw")
        self._events: list[dict[str, Any]] = []
        json.loads(self._file.readline())
        self.command("qmp_capabilities")

    def command(self, name: str, **arguments: Any) -> Any:
        """Run a QMP command. Member names with "_" for "-"."""
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._file.write(json.dumps({"execute": name, "arguments": given}) + "\n")
        self._file.flush()
        while True:
            answer = json.loads(self._file.readline())
            if "event" in answer:
                self._events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{name}: {answer['error']['desc']}")
            else:
                return answer["return"]

    def wait_event(self, name: str) -> dict[str, Any]:
        """The next event of that name."""
        while True:
            event = self._events.pop(0) if self._events else json.loads(self._file.readline())
            if event.get("event") == name:
                data: dict[str, Any] = event.get("data", {})
                return data

    def backup(self, device: str, target: str, **options: Any) -> None:
        """Run a blockdev-backup job to its end."""
        self.command("blockdev-backup", job_id="b", device=device, target=target, **{"sync": "full", **options})
        done = self.wait_event("BLOCK_JOB_COMPLETED")
        if "error" in done:
            raise RuntimeError(done["error"])

    def close(self) -> None:
        """End the daemon."""
        self._file.close()
        self._socket.close()
        self._process.terminate()
        self._process.wait(30)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
