# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Chains of backups: what checksums cost a full backup, how fast verify and restore are beside tools that only read.

The backup with and without checksums is the same job to the same kind of new target in a graph that is open; with them
is the job of a chain, so its manifest and file of checksums are written durably within the time, too.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.images import GIB, MIB, dense, empty, node, sparse
from benchmarks.peers import Against, add_row, against, in_turn, need, timed
from blockgraph.api import aopen
from blockgraph.chains import Chain, restore, verify
from blockgraph.jobs.manager import JobManager
from blockgraph.jobs.options import BackupOptions

FORMATS = ("raw", "qcow2")


def backup(nodes: list[dict[str, Any]], options: BackupOptions) -> float:
    """Seconds of one job."""

    async def main() -> float:
        async with await aopen({"nodes": nodes}) as graph:
            start = time.perf_counter()
            job = await JobManager(graph).backup(options)
            await job.wait()
            if job.error is not None:
                raise job.error
            return time.perf_counter() - start

    return asyncio.run(main())


def with_sums(directory: Path, source: Path, image_format: str) -> float:
    """A full backup of a new chain."""
    shutil.rmtree(directory / "chain", ignore_errors=True)
    chain = str(directory / "chain")
    format_: Any = image_format
    return backup([node("disk", source)], BackupOptions(device="disk", sync="full", chain=chain, chain_format=format_))


def without_sums(directory: Path, source: Path, image_format: str) -> float:
    """The same to a new image."""
    empty(directory / "target", source.stat().st_size, image_format)
    nodes = [node("disk", source), node("target", directory / "target", image_format)]
    return backup(nodes, BackupOptions(device="disk", sync="full", target="target"))


def compare_backups(benchmark: BenchmarkFixture, directory: Path, image_format: str, what: str) -> None:
    source = directory / "source"
    sides: dict[str, Callable[[], float]] = {
        "with": lambda: with_sums(directory, source, image_format),
        "without": lambda: without_sums(directory, source, image_format),
    }
    times = in_turn(sides)
    row = against("without checksums", times["with"], times["without"], 0.9, lower=True)
    add_row(benchmark, "4.chains", what, "s", sorted(times["with"])[len(times["with"]) // 2], row)
    benchmark.pedantic(sides["with"], rounds=1)


@pytest.mark.parametrize("image_format", FORMATS)
def test_checksums_of_a_dense_backup_in_memory(benchmark: BenchmarkFixture, shm: Path, image_format: str) -> None:
    dense(shm / "source", GIB)
    compare_backups(benchmark, shm, image_format, f"full backup with checksums, 1 GiB dense to {image_format}, memory")


def test_checksums_of_a_sparse_backup_in_memory(benchmark: BenchmarkFixture, shm: Path) -> None:
    sparse(shm / "source", 4 * GIB, 10)
    compare_backups(benchmark, shm, "raw", "full backup with checksums, 4 GiB with 10 % data to raw, memory")


def test_checksums_of_a_dense_backup_on_a_file_system(benchmark: BenchmarkFixture, disk_directory: Path) -> None:
    dense(disk_directory / "source", GIB)
    compare_backups(benchmark, disk_directory, "raw", "full backup with checksums, 1 GiB dense to raw, file system")


@pytest.mark.parametrize("image_format", FORMATS)
def test_verify_and_restore_in_memory(benchmark: BenchmarkFixture, shm: Path, image_format: str) -> None:
    need("qemu-img", "sha256sum")
    dense(shm / "source", GIB)
    with_sums(shm, shm / "source", image_format)
    chain = Chain.load(str(shm / "chain"))
    (point,) = chain.points()
    target = shm / "restored"

    def ours() -> float:
        report = asyncio.run(verify(chain))
        assert report.good == [point.manifest.id]
        return 0.0

    def restored() -> None:
        asyncio.run(restore(chain, point, str(target), force=True))

    def run(*command: str | Path) -> Callable[[], float]:
        return lambda: timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))

    def fresh(work: Callable[[], object]) -> Callable[[], float]:
        def measured() -> float:
            target.unlink(missing_ok=True)
            return timed(work)

        return measured

    convert = ["qemu-img", "convert", "-f", image_format, "-O", "raw", point.image, str(target)]
    times = in_turn(
        {
            "verify": lambda: timed(ours),
            "sha256sum": run("sha256sum", point.image),
            "read": run("dd", f"if={point.image}", "of=/dev/null", "bs=1M", "status=none"),
            "restore": fresh(restored),
            "qemu-img": fresh(lambda: subprocess.run(convert, check=True)),
        }
    )
    peers = [against(name, times["verify"], times[name], lower=True) for name in ("sha256sum", "read")]
    add_row(benchmark, "4.chains", f"verify 1 GiB dense {image_format}, memory", "s", min(times["verify"]), *peers)
    row: Against = against("qemu-img convert", times["restore"], times["qemu-img"], lower=True)
    add_row(benchmark, "4.chains", f"restore 1 GiB from {image_format}, memory", "s", min(times["restore"]), row)
    benchmark.pedantic(ours, rounds=1)


def test_incremental_of_1000_granules_of_1_tib(benchmark: BenchmarkFixture, shm: Path) -> None:
    """The next link of a chain, of a sparse 1 TiB disk with 1,000 dirty granules of 64 KiB."""
    source = shm / "source"
    with open(source, "xb") as file:
        file.truncate(1 << 40)

    async def main() -> tuple[float, float]:
        async with await aopen({"nodes": [node("disk", source)]}) as graph:
            jobs = JobManager(graph)
            options = BackupOptions(device="disk", sync="incremental", chain=str(shm / "chain"), chain_format="raw")
            guest = await graph.backend("disk", writable=True)
            seconds = []
            for round_ in range(4):
                start = time.perf_counter()
                job = await jobs.backup(options)
                await job.wait()
                if job.error is not None:
                    raise job.error
                seconds.append(time.perf_counter() - start)
                for i in range(1000):
                    await guest.pwrite(i * (1 << 30) + round_ * MIB, os.urandom(4096))
            return seconds[0], sorted(seconds[1:])[1]

    full, incremental = asyncio.run(main())
    add_row(benchmark, "4.chains", "empty full backup of 1 TiB, raw", "s", full)
    bound = Against("bound", None, None, 1.0)
    add_row(benchmark, "4.chains", "incremental of 1 TiB, 1,000 granules, patch", "s", incremental, bound)
    benchmark.pedantic(lambda: None, rounds=1)
