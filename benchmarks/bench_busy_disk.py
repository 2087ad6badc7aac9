# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Backup of a disk that a guest keeps writing to, beside qemu-storage-daemon, on tmpfs.

The guest is fio over NBD, 4 KiB random writes at depth 16. It writes before, while and after the backup runs; its rate
is taken from fio's log between the start and the end of the job.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import backup_on_demand, fio, servers
from benchmarks.images import GIB, dense, empty, node
from benchmarks.peers import add_row, against, in_turn, need, timed

SIZE = 2 * GIB
DAEMON = "qemu-storage-daemon"

#: Averages in fio's log, milliseconds.
_STEP = 20

#: How long the guest writes before the backup starts, seconds.
_BEFORE = 1.0


class Served(NamedTuple):
    """A disk that is served.

    Attributes:
        uri: where.
        backup: run a backup to its end; the seconds it took.
    """

    uri: str
    backup: Callable[[], float]


class Busy(NamedTuple):
    """What one backup was like.

    Attributes:
        before, during: requests of the guest per second.
        seconds: of the backup.
    """

    before: float
    during: float
    seconds: float


def nodes(directory: Path, target_driver: str) -> list[dict[str, Any]]:
    """The disk and a new target."""
    empty(directory / "target", SIZE, target_driver)
    return [node("disk", directory / "disk"), node("target", directory / "target", target_driver)]


@contextmanager
def ours(directory: Path, target_driver: str) -> Iterator[Served]:
    """Our server."""
    path, uri = servers.graph_file(directory, nodes(directory, target_driver), "disk")
    argv = [sys.executable, backup_on_demand.__file__, str(path), "disk", "target"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"

        def backup() -> float:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            return float(process.stdout.readline())

        yield Served(uri, backup)
        process.stdin.close()


@contextmanager
def theirs(directory: Path, target_driver: str) -> Iterator[Served]:
    """The peer's."""
    with servers.StorageDaemon(directory) as daemon:
        daemon.add(nodes(directory, target_driver))
        yield Served(daemon.serve("disk"), lambda: timed(lambda: daemon.backup("disk", "target")))


def measure(directory: Path, server: Callable[[Path, str], AbstractContextManager[Served]], target: str) -> Busy:
    """One backup under load."""
    log = directory / "guest"
    options = [
        *("--rw=randwrite", "--bs=4096", "--iodepth=16", "--norandommap", "--time_based", "--runtime=600"),
        *(f"--size={SIZE}", f"--write_iops_log={log}", f"--log_avg_msec={_STEP}", "--log_unix_epoch=1"),
    ]
    with server(directory, target) as served:
        guest = subprocess.Popen(fio.command(served.uri, *options), stdout=subprocess.PIPE, text=True)
        time.sleep(_BEFORE)
        start = time.time() * 1000
        seconds = served.backup()
        end = time.time() * 1000
        guest.terminate()
        output, _ = guest.communicate(timeout=60)
    fio.parse(output)
    entries = [line.split(",")[:2] for line in Path(f"{log}_iops.1.log").read_text().splitlines()]
    rates = [(float(at), float(rate)) for at, rate in entries]
    during = [rate for at, rate in rates if start + _STEP <= at <= end]
    return Busy(
        statistics.mean(rate for at, rate in rates if at <= start),
        statistics.mean(during) if during else 1 / seconds,  # not one request ended: the rate is less than that
        seconds,
    )


@pytest.mark.parametrize("target", ["raw", "qcow2"])
def test_busy_disk(benchmark: BenchmarkFixture, shm: Path, target: str) -> None:
    """Wanted: a higher rate of the guest and a shorter backup than the peer's."""
    fio.need_fio()
    need(DAEMON)
    dense(shm / "disk", SIZE)
    sides = {"ours": lambda: measure(shm, ours, target), "peer": lambda: measure(shm, theirs, target)}
    runs = benchmark.pedantic(in_turn, args=(sides,), rounds=1)
    for name, unit, wanted, lower, what in (
        ("during", "IOPS", 1.0, False, "guest's rate meanwhile"),
        ("seconds", "s", 1.0, True, "time to finish"),
        ("before", "IOPS", None, False, "guest's rate before"),
    ):
        values = {side: [getattr(run, name) for run in results] for side, results in runs.items()}
        row = against(DAEMON, values["ours"], values["peer"], wanted, lower=lower)
        title = f"backup of a busy disk, 2 GiB dense, raw to {target}: {what}"
        add_row(benchmark, "3.7", title, unit, statistics.median(values["ours"]), row)
