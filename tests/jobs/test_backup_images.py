# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Backups of image files: copied natively, sparse in all ways, onto full disks, and compared by QEMU."""

from __future__ import annotations

import asyncio
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.backup import CLUSTER, settle
from helpers.loop import graph_of, in_loop

from blockgraph.create import create_file
from blockgraph.errors import NoSpace
from blockgraph.jobs.manager import JobManager
from blockgraph.jobs.options import BackupOptions

SIZE = 64 * CLUSTER + 512


def file(path: Path) -> dict[str, Any]:
    """A file node."""
    return {"driver": "file", "filename": str(path)}


def sparse(path: Path, piece: int, seed: int = 1) -> bytes:
    """A raw image with pieces of data, of zeroes and of holes, of that length."""
    rng = random.Random(seed)
    with path.open("wb") as image:
        image.truncate(SIZE)
        for offset in range(0, SIZE, piece):
            kind = rng.randrange(4)
            length = min(piece, SIZE - offset)
            if kind < 2:
                image.seek(offset)
                image.write(rng.randbytes(length) if kind else bytes(length))
    return path.read_bytes()


@pytest.mark.parametrize("piece", [512, 4096, 12288, CLUSTER, 5 * CLUSTER])
@pytest.mark.parametrize("cluster", [512, 4096, CLUSTER, 1 << 21])
def test_sparse_disk_to_qcow2_of_any_cluster_size(
    tmpfs: Path, piece: int, cluster: int, require_tool: Callable[[str], str]
) -> None:
    """Several pieces of data in one cluster of the target must not wait for each other."""
    sparse(tmpfs / "disk", piece)
    qemu_img = require_tool("qemu-img")

    @in_loop
    async def run() -> None:
        await create_file(str(tmpfs / "target"), SIZE, "qcow2", replace=False, cluster_size=cluster)
        async with graph_of({"driver": "raw", "node-name": "disk", "file": file(tmpfs / "disk")}) as graph:
            target = {"driver": "qcow2", "file": file(tmpfs / "target")}
            job = await JobManager(graph).backup(
                BackupOptions(device="disk", target=target, sync="full", max_chunk=3 * CLUSTER)
            )
            await job.wait()
            assert job.error is None

    run()
    subprocess.run([qemu_img, "compare", "-f", "raw", "-F", "qcow2", tmpfs / "disk", tmpfs / "target"], check=True)
    subprocess.run([qemu_img, "check", "-f", "qcow2", tmpfs / "target"], check=True, capture_output=True)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_full_target_stops_and_leaves_the_source_alone(small_tmpfs: Path, tmpfs: Path, image_format: str) -> None:
    data = random.Random(1).randbytes(SIZE)
    (tmpfs / "disk").write_bytes(data)

    @in_loop
    async def run() -> None:
        async with graph_of({"driver": "raw", "node-name": "disk", "file": file(tmpfs / "disk")}) as graph:
            guest = await graph.backend("disk", writable=True)
            target = {"driver": image_format, "file": file(small_tmpfs / "target")}
            job = await JobManager(graph).backup(
                BackupOptions(device="disk", target=target, mode="create", sync="full", on_target_error="enospc")
            )
            stopped = await until_paused(job)
            assert stopped
            assert job.io_status == "nospace"
            failed = 0
            for at in range(0, SIZE, CLUSTER):
                try:
                    await guest.pwrite(at, data[at : at + 1])  # break-guest-write
                except NoSpace:
                    failed += 1
            assert failed > 32
            job.cancel()
            await job.wait()
            assert [node.name for node in graph.nodes() if not node.name.startswith("#")] == ["disk"]
            assert await guest.pread(0, SIZE) == data
            await guest.pwrite(0, b"x")

    run()


async def until_paused(job: Any) -> bool:
    """Until a job has stopped itself, or ended."""
    reached = asyncio.Event()
    job.listeners.append(lambda event: reached.set() if event.state in ("paused", "concluded") else None)
    if job.state != "paused":
        await reached.wait()
    await settle()
    return bool(job.state == "paused")
