# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Copies of a disk to a new image, until it is on the device: each tells MiB per second.

blockgraph and qemu-storage-daemon are timed over the job alone (their graph is open), dd and qemu-img as processes.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import blockgraph
from blockgraph.bench.disks import Disk, image_node
from blockgraph.bench.figures import Sample
from blockgraph.bench.programs import run_program
from blockgraph.bench.servers import StorageDaemon
from blockgraph.create import create_file
from blockgraph.errors import IOFailure
from blockgraph.jobs.manager import JobManager
from blockgraph.jobs.options import BackupOptions
from blockgraph.native import CopyExtent, Pool

_MIB = 1 << 20


def new_target(path: Path, size: int, driver: str) -> Path:
    """An empty image; it replaces what was there."""
    path.unlink(missing_ok=True)
    asyncio.run(create_file(str(path), size, driver, replace=False))
    return path


def by_blockgraph(disk: Disk, target: Path, driver: str) -> Sample:
    """A backup job."""

    async def copy() -> float:
        nodes = [*disk.nodes, image_node("bench-target", target, driver)]
        async with await blockgraph.aopen({"nodes": nodes}) as graph:
            begin = time.perf_counter()
            options = BackupOptions(device=disk.node, target="bench-target", sync="full")
            job = await JobManager(graph).backup(options)
            await job.wait()
            _sync(target)
            seconds = time.perf_counter() - begin
            if job.error is not None:
                raise job.error
            return seconds

    new_target(target, disk.size, driver)
    return _sample(disk, asyncio.run(copy()))


def by_dd(disk: Disk, source: Path, target: Path) -> Sample:
    """dd bs=1M, raw to raw."""
    target.unlink(missing_ok=True)
    return _by_process(
        disk,
        target,
        ["dd", f"if={source}", f"of={target}", "bs=1M", f"count={disk.size}", "iflag=count_bytes", "conv=fsync"],
    )


def by_convert(disk: Disk, target: Path, driver: str) -> Sample:
    """qemu-img convert as people call it, told to copy zeroes as everybody else does."""
    target.unlink(missing_ok=True)
    assert disk.source is not None
    argv = ["qemu-img", "convert", "-S", "0", "-O", driver, f"json:{json.dumps(disk.source)}", str(target)]
    return _by_process(disk, target, argv)


def by_plain_copy(disk: Disk, source: Path, target: Path) -> Sample:
    """Our own native copy of the file, without a graph, where there is no dd."""
    target.unlink(missing_ok=True)

    def run() -> None:
        with source.open("rb") as from_file, target.open("wb") as to_file:
            pool = Pool()
            try:
                pool.copy_blocking([CopyExtent(from_file.fileno(), 0, to_file.fileno(), 0, disk.size)])
            finally:
                pool.close()
            os.fsync(to_file.fileno())

    return _sample(disk, _seconds(run))


def by_daemon(folder: Path, disk: Disk, target: Path, driver: str) -> Sample:
    """blockdev-backup."""
    new_target(target, disk.size, driver)
    with StorageDaemon(folder) as daemon:
        daemon.add([*disk.nodes, image_node("bench-target", target, driver)])

        def run() -> None:
            daemon.backup(disk.node, "bench-target")
            _sync(target)

        return _sample(disk, _seconds(run))


def _by_process(disk: Disk, target: Path, argv: list[str]) -> Sample:
    def run() -> None:
        done = run_program(argv)
        if done.status:
            raise IOFailure(f"{argv[0]} failed: {done.reason()}", node=disk.label, op="copy")
        _sync(target)

    return _sample(disk, _seconds(run))


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _seconds(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _sample(disk: Disk, seconds: float) -> Sample:
    return Sample(disk.size / _MIB / seconds, {})
