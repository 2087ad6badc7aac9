# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Reads through the Python API beside the same reads by preadv, one at a time, in this process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import blockgraph
from blockgraph.bench.disks import Disk
from blockgraph.bench.figures import Sample, percentiles
from blockgraph.bench.pattern import Pattern


def through_api(disk: Disk, pattern: Pattern, seconds: float) -> Sample:
    """`pread_into`."""
    with blockgraph.open({"nodes": list(disk.nodes)}) as graph, graph.backend(disk.node, writable=False) as backend:
        buffer = memoryview(bytearray(pattern.block))
        return _timed(lambda offset: backend.pread_into(offset, buffer), disk.size, pattern, seconds)


def plain(path: Path, size: int, pattern: Pattern, seconds: float) -> Sample:
    """preadv on a raw image of this size."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        buffers = [memoryview(bytearray(pattern.block))]
        return _timed(lambda offset: os.preadv(fd, buffers, offset), size, pattern, seconds)
    finally:
        os.close(fd)


def _timed(read: Callable[[int], object], size: int, pattern: Pattern, seconds: float) -> Sample:
    clock = time.perf_counter_ns
    latencies: list[int] = []
    begin = now = clock()
    until = begin + int(seconds * 1e9)
    for offset in pattern.offsets(size):
        start = clock()
        read(offset)
        now = clock()
        latencies.append(now - start)
        if now >= until:
            break
    return Sample(pattern.rate(len(latencies) * 1e9 / (now - begin)), percentiles(latencies))
