# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Guest writes under backup-top beside qemu-storage-daemon's copy-before-write: fio over NBD, on tmpfs.

```
    fio ──NBD──► backup-top ──► disk (raw, dense)
                      └───────► target (raw or qcow2, empty)
```
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import servers
from benchmarks.fio import Figures, fio, first_touches, need_fio, pattern
from benchmarks.images import GIB, MIB, dense, empty, node, touch_memory
from benchmarks.peers import add_row, against, in_turn, need

KIB = 1024
SIZE = GIB


def under_filter(directory: Path, target_driver: str) -> list[dict[str, Any]]:
    """The graph of the picture, its target new."""
    empty(directory / "target", SIZE, target_driver)
    return [
        node("disk", directory / "disk"),
        node("target", directory / "target", target_driver),
        {"driver": "copy-before-write", "node-name": "top", "file": "disk", "target": "target"},
    ]


@pytest.mark.parametrize("target_driver", ["raw", "qcow2"])
@pytest.mark.parametrize("block", [4 * KIB, 64 * KIB], ids=["4-KiB", "64-KiB"])
def test_first_write(benchmark: BenchmarkFixture, shm: Path, block: int, target_driver: str) -> None:
    """Every cluster once, at random; wanted: 2.0 of the peer's rate, and a lower p99 latency."""
    need_fio()
    need("qemu-storage-daemon")
    dense(shm / "disk", SIZE)
    options = first_touches(shm / "requests", SIZE, block)

    def ours() -> Figures:
        with servers.ours(shm, under_filter(shm, target_driver), "top") as uri:
            touch_memory(shm, SIZE + SIZE // 4)
            return fio(uri, *options)

    def peer() -> Figures:
        with servers.storage_daemon(shm, under_filter(shm, target_driver), "top") as uri:
            touch_memory(shm, SIZE + SIZE // 4)
            return fio(uri, *options)

    runs = benchmark.pedantic(in_turn, args=({"ours": ours, "peer": peer},), rounds=1)
    what = f"first write to each cluster under backup-top, {block // KIB} KiB, depth 16, {target_driver} target"
    name = "qemu-storage-daemon"
    for measured, unit, wanted, lower in (("iops", "IOPS", 2.0, False), ("p99_us", "us, p99", 1.0, True)):
        values = {side: [getattr(run, measured) for run in results] for side, results in runs.items()}
        row = against(name, values["ours"], values["peer"], wanted, lower=lower)
        add_row(benchmark, "3.3", what, unit, statistics.median(values["ours"]), row)


@pytest.mark.parametrize("block", [4 * KIB, 64 * KIB], ids=["4-KiB", "64-KiB"])
def test_write_when_everything_is_copied(benchmark: BenchmarkFixture, shm: Path, block: int) -> None:
    """Wanted: 0.97 of the rate without the filter, on a disk that was written to as much before."""
    need_fio()
    dense(shm / "disk", SIZE)
    options = pattern("randwrite", SIZE, block, 16)

    def measured(uri: str) -> Figures:
        fio(uri, "--rw=write", f"--bs={MIB}", "--iodepth=4", f"--size={SIZE}")
        return fio(uri, *options)

    def filtered() -> Figures:
        with servers.ours(shm, under_filter(shm, "raw"), "top") as uri:
            return measured(uri)

    def plain() -> Figures:
        with servers.ours(shm, [node("disk", shm / "disk")]) as uri:
            return measured(uri)

    runs = benchmark.pedantic(in_turn, args=({"ours": filtered, "plain": plain},), rounds=1)
    values = {side: [run.iops for run in results] for side, results in runs.items()}
    row = against("without backup-top", values["ours"], values["plain"], 0.97)
    what = f"{block // KIB} KiB random write, depth 16, under backup-top when everything is copied"
    add_row(benchmark, "3.4", what, "IOPS", statistics.median(values["ours"]), row)
