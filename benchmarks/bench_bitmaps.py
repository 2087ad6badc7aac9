# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Incremental backups beside qemu-storage-daemon, from the same image and equal bitmaps.

The disk is a qcow2 image of 1 TiB with 1,000 granules of data at random places, which a bitmap inside the image marks
for QEMU, and one in memory for us. Both are timed over the job alone; ours flushes the target, QEMU's does not.
"""

from __future__ import annotations

import gc
import random
import subprocess
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import blockgraph
from benchmarks.images import empty, node
from benchmarks.peers import Against, add_row, need, ratio, report, timed
from benchmarks.servers import StorageDaemon
from blockgraph.api import AsyncGraph
from blockgraph.jobs.manager import JobManager
from blockgraph.jobs.options import BackupOptions

SIZE = 1 << 40
GRANULE = 64 << 10
MARKED = [index * GRANULE for index in sorted(random.Random(1).sample(range(SIZE // GRANULE), 1000))]


def disk(path: Path) -> None:
    """The image and its bitmap."""
    empty(path, SIZE, "qcow2")
    subprocess.run(["qemu-img", "bitmap", "--add", "-g", str(GRANULE), str(path), "b0"], check=True)
    writes = "".join(f"write -P {number % 255 + 1} {at} {GRANULE}\n" for number, at in enumerate(MARKED))
    argv = ["qemu-io", "-f", "qcow2", str(path)]
    subprocess.run(argv, input=writes, text=True, check=True, stdout=subprocess.DEVNULL)


async def _backup(graph: AsyncGraph) -> None:
    options = BackupOptions(device="disk", target="target", sync="differential", bitmap="ours")
    job = await JobManager(graph).backup(options)
    await job.wait()
    if job.error is not None:
        raise job.error


async def _mark(graph: AsyncGraph) -> None:
    bitmap = await graph.add_bitmap("disk", "ours", granularity=GRANULE)
    for at in MARKED:
        bitmap.record(at, GRANULE)


@pytest.mark.parametrize("target_driver", ["raw", "qcow2"])
def test_1_tib_with_1000_dirty_granules(benchmark: BenchmarkFixture, shm: Path, target_driver: str) -> None:
    """Wanted: under a second, and twice as fast as qemu-storage-daemon."""
    need("qemu-storage-daemon", "qemu-img", "qemu-io")
    disk(shm / "disk")
    target = shm / "target"
    nodes = [{**node("disk", shm / "disk", "qcow2"), "read-only": True}, node("target", target, target_driver)]

    def ours() -> float:
        empty(target, SIZE, target_driver)
        gc.collect()  # the graph of the round before: its memory is this one's, as in a process that goes on
        with blockgraph.open({"nodes": nodes}) as graph:
            graph.call(_mark(graph.graph))
            return timed(lambda: graph.call(_backup(graph.graph)))

    def qemu() -> float:
        empty(target, SIZE, target_driver)
        with StorageDaemon(shm) as daemon:
            daemon.add(nodes)
            return timed(lambda: daemon.backup("disk", "target", sync="bitmap", bitmap="b0", bitmap_mode="never"))

    what = f"incremental backup, 1 TiB qcow2 with 1,000 dirty granules, to {target_driver}, tmpfs"
    compared = ratio(ours, qemu)
    report(benchmark, compared, ours, figure="4.4", what=what, peer="qemu-storage-daemon", wanted=2.0)
    add_row(benchmark, "4.3", what, "s", compared.ours, Against("bound", None, None, 1))
