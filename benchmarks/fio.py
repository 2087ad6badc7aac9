# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""fio as an NBD client. BLOCKGRAPH_BENCH_SECONDS is how long a run with a time takes (2)."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.peers import need

CLUSTER = 65536


def need_fio() -> None:
    """Skip without fio, or when it was built without its nbd engine."""
    need("fio")
    if "nbd" not in subprocess.run(["fio", "--enghelp"], check=True, capture_output=True, text=True).stdout.split():
        pytest.skip("needs fio with its nbd engine")


class Figures(NamedTuple):
    """What fio saw.

    Attributes:
        iops: requests per second.
        mib_s: MiB per second.
        p50_us, p99_us: completion latencies, microseconds.
        requests: how many there were.
    """

    iops: float
    mib_s: float
    p50_us: float
    p99_us: float
    requests: int


def fio(uri: str, *options: str) -> Figures:
    """Run one job."""
    done = subprocess.run(command(uri, *options), check=True, capture_output=True, text=True)
    return parse(done.stdout)


def fio_file(path: Path, *options: str) -> Figures:
    """Run one job on a file, around the page cache."""
    argv = ["fio", "--name=bare", "--ioengine=libaio", "--direct=1", f"--filename={path}", "--output-format=json"]
    return parse(subprocess.run([*argv, *options], check=True, capture_output=True, text=True).stdout)


def command(uri: str, *options: str) -> list[str]:
    """fio's command line."""
    return ["fio", "--name=guest", "--ioengine=nbd", f"--uri={uri}", "--output-format=json", *options]


def parse(output: str) -> Figures:
    """Figures of the output; the engine says something of its own before the JSON."""
    (job,) = json.loads(output[output.index("{") :])["jobs"]
    if job["error"]:
        raise RuntimeError(f"fio failed: error {job['error']}")
    side: dict[str, Any] = max((job["read"], job["write"]), key=lambda side: side["total_ios"])
    percentile = side["clat_ns"]["percentile"]
    return Figures(
        side["iops"],
        side["bw_bytes"] / (1 << 20),
        percentile["50.000000"] / 1000,
        percentile["99.000000"] / 1000,
        side["total_ios"],
    )


def pattern(rw: str, size: int, block: int, depth: int, connections: int = 1) -> list[str]:
    """Options for a run of some seconds; sequential connections have a part of the disk each."""
    options = [
        f"--rw={rw}",
        f"--bs={block}",
        f"--iodepth={depth}",
        "--time_based",
        f"--runtime={os.environ.get('BLOCKGRAPH_BENCH_SECONDS', '2')}",
        "--norandommap",
        "--randrepeat=1",
    ]
    if connections > 1:
        options += [f"--numjobs={connections}", "--thread", "--group_reporting"]
    if rw.startswith("rand") or connections == 1:
        return [*options, f"--size={size}"]
    return [*options, f"--size={size // connections}", f"--offset_increment={size // connections}"]


def first_touches(path: Path, size: int, block: int, depth: int = 16) -> list[str]:
    """Options for writing to every cluster of the disk once, at random. `path` is for the list of requests."""
    offsets = list(range(0, size, CLUSTER))
    random.Random(3).shuffle(offsets)
    writes = "".join(f"nbd write {offset} {block}\n" for offset in offsets)
    path.write_text(f"fio version 2 iolog\nnbd add\nnbd open\n{writes}nbd close\n")
    return [f"--read_iolog={path}", "--replay_no_stall=1", f"--iodepth={depth}"]
