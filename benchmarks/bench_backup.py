# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Full backups beside dd, cp and qemu-storage-daemon, on tmpfs.

Every side copies the same source to a new, empty target; the target is made anew before each round. blockgraph and
qemu-storage-daemon are timed over the job alone (the graph is open), dd and cp as whole processes.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import blockgraph
from benchmarks.peers import StorageDaemon, need, ratio, report, timed
from blockgraph.api import AsyncGraph
from blockgraph.create import create_file
from blockgraph.jobs.manager import JobManager
from blockgraph.jobs.options import BackupOptions

GIB = 1 << 30


@pytest.fixture
def shm() -> Iterator[Path]:
    """A directory in memory."""
    with TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def dense(path: Path, size: int) -> None:
    """A file of random bytes."""
    block = random.Random(1).randbytes(16 << 20)
    with path.open("wb") as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])


def sparse(path: Path, size: int, percent: int, run: int = 1 << 20) -> None:
    """A file of which `percent` is data, in runs at random places."""
    rng = random.Random(2)
    block = rng.randbytes(run)
    with path.open("wb") as file:
        file.truncate(size)
        for index in rng.sample(range(size // run), size // run * percent // 100):
            file.seek(index * run)
            file.write(block)


def node(name: str, path: Path, driver: str = "raw") -> dict[str, Any]:
    """A description of an image, for us and for the peer."""
    return {"driver": driver, "node-name": name, "file": {"driver": "file", "filename": str(path)}}


async def _backup(graph: AsyncGraph) -> None:
    job = await JobManager(graph).backup(BackupOptions(device="disk", target="target", sync="full"))
    await job.wait()
    if job.error is not None:
        raise job.error


class Backup:
    """The same backup by everybody: each makes a fresh target and tells how long the copying took."""

    def __init__(
        self, directory: Path, source: Path, *, source_driver: str = "raw", target_driver: str = "raw"
    ) -> None:
        self.directory = directory
        self.source = source
        self.target = directory / "target"
        self.source_driver = source_driver
        self.target_driver = target_driver
        with blockgraph.open({"nodes": [node("disk", source, source_driver)]}) as graph:
            self.size = graph.backend("disk").size

    def fresh(self) -> None:
        """A new, empty target."""
        self.target.unlink(missing_ok=True)
        asyncio.run(create_file(str(self.target), self.size, self.target_driver, replace=True))

    def nodes(self) -> list[dict[str, Any]]:
        """Both images."""
        return [node("disk", self.source, self.source_driver), node("target", self.target, self.target_driver)]

    def ours(self) -> float:
        """Our job."""
        self.fresh()
        with blockgraph.open({"nodes": self.nodes()}) as graph:
            return timed(lambda: graph.call(_backup(graph.graph)))

    def qemu(self) -> float:
        """The peer's job."""
        self.fresh()
        with StorageDaemon(self.directory) as daemon:
            for description in self.nodes():
                daemon.command("blockdev-add", **description)
            return timed(lambda: daemon.backup("disk", "target"))

    def command(self, *words: str) -> float:
        """A whole process; "SOURCE" and "TARGET" stand for the paths."""
        self.target.unlink(missing_ok=True)
        argv = [word.replace("SOURCE", str(self.source)).replace("TARGET", str(self.target)) for word in words]
        return timed(lambda: subprocess.run(argv, check=True, stderr=subprocess.DEVNULL))

    def dd(self) -> float:
        """dd bs=1M."""
        return self.command("dd", "if=SOURCE", "of=TARGET", "bs=1M")

    def cp(self) -> float:
        """cp --sparse=auto."""
        return self.command("cp", "--sparse=auto", "SOURCE", "TARGET")


def test_dense_raw_beside_dd(benchmark: BenchmarkFixture, shm: Path) -> None:
    """2 GiB dense; wanted: at least 0.9."""
    need("dd")
    dense(shm / "disk", 2 * GIB)
    backup = Backup(shm, shm / "disk")
    report(benchmark, ratio(backup.ours, backup.dd), backup.ours, wanted=0.9)


def test_dense_raw_beside_qemu(benchmark: BenchmarkFixture, shm: Path) -> None:
    """2 GiB dense; wanted: at least 1.5."""
    need("qemu-storage-daemon")
    dense(shm / "disk", 2 * GIB)
    backup = Backup(shm, shm / "disk")
    report(benchmark, ratio(backup.ours, backup.qemu), backup.ours, wanted=1.5)


def test_dense_raw_to_qcow2_beside_qemu(benchmark: BenchmarkFixture, shm: Path) -> None:
    """2 GiB dense into qcow2."""
    need("qemu-storage-daemon")
    dense(shm / "disk", 2 * GIB)
    backup = Backup(shm, shm / "disk", target_driver="qcow2")
    report(benchmark, ratio(backup.ours, backup.qemu), backup.ours)


def test_sparse_raw_beside_cp(benchmark: BenchmarkFixture, shm: Path) -> None:
    """8 GiB of which 20 % is data; wanted: at least 0.9."""
    need("cp")
    sparse(shm / "disk", 8 * GIB, 20)
    backup = Backup(shm, shm / "disk")
    report(benchmark, ratio(backup.ours, backup.cp), backup.ours, wanted=0.9)


_HUGE = """
import asyncio, json, re, sys, time
from blockgraph.api import aopen
from blockgraph.jobs.manager import JobManager
from blockgraph.jobs.options import BackupOptions

async def main(nodes):
    start = time.perf_counter()
    async with await aopen({"nodes": nodes[:1]}) as graph:
        opened = time.perf_counter() - start
        await graph.add_node(nodes[1])
        start = time.perf_counter()
        job = await JobManager(graph).backup(BackupOptions(device="disk", target="target", sync="full"))
        await job.wait()
        assert job.error is None, job.error
        copied = time.perf_counter() - start
    peak = re.search("VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]
    print(json.dumps([opened, copied, int(peak) / 1024]))

asyncio.run(main(json.loads(sys.argv[1])))
"""


@pytest.mark.parametrize("target_driver", ["raw", "qcow2"])
def test_16_tib_sparse_qcow2(benchmark: BenchmarkFixture, shm: Path, target_driver: str) -> None:
    """A nearly empty 16 TiB qcow2; wanted: opens in 50 ms, copied in 5 s, under 200 MB."""
    disk = shm / "disk"
    asyncio.run(create_file(str(disk), 16 << 40, "qcow2", replace=False))
    with blockgraph.open({"nodes": [node("disk", disk, "qcow2")]}) as graph:
        backend = graph.backend("disk", writable=True)
        for index in range(64):
            backend.pwrite(index * (256 << 30), b"x" * 65536)
    backup = Backup(shm, disk, source_driver="qcow2", target_driver=target_driver)
    runs = []
    for _ in range(3):
        backup.fresh()
        argv = [sys.executable, "-c", _HUGE, json.dumps(backup.nodes())]
        runs.append(json.loads(subprocess.run(argv, check=True, capture_output=True).stdout))
    opened, copied, memory = (statistics.median(values) for values in zip(*runs, strict=True))
    benchmark.extra_info |= {"open_ms": opened * 1000, "backup_s": copied, "peak_mib": memory}
    print(f"\n16 TiB qcow2 to {target_driver}: open {opened * 1000:.1f} ms, backup {copied:.2f} s, {memory:.0f} MiB")
    benchmark.pedantic(backup.ours, rounds=1)
