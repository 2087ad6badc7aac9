# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The extent map: a look-up alone (extent_map.c), and 4 KiB reads through it from Python beside os.preadv.

All in processor time of the thread that does it, so that other programs cost cache and not turns. Seen on a busy
machine (Linux 6.18, 2 CPUs; medians of 5 and 7), a look-up being begin and end of a 4 KiB request at a random place:

    1 TiB raw (one extent), 1 or 2 threads           20 ns
    1 GiB in 64 KiB fragments                        22 ns
    100 GiB in 64 KiB fragments, 34 MB held         160 ns
    1 TiB in 64 KiB fragments, 136 MB held         100 ns
    os.preadv 956 ns, pread_into 1300 ns (bytearray), 1360 ns (memoryview)
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.peers import need
from blockgraph.native import ExtentMap, MapExtent

ROOT = Path(__file__).resolve().parent.parent
READS = 100_000
SIZE = 64 << 20


@pytest.fixture(scope="module")
def program() -> Iterator[Path]:
    """extent_map.c, compiled as the module is."""
    need("cc")
    with TemporaryDirectory() as directory:
        made = Path(directory, "extent_map")
        sources = [ROOT / "benchmarks/extent_map.c", *sorted((ROOT / "native").glob("*.c"))]
        subprocess.run(["cc", "-std=gnu11", "-O3", "-pthread", "-I", ROOT / "native", *sources, "-o", made], check=True)
        yield made


@pytest.mark.parametrize(
    "mapped_mib, cluster_kib, memory_mib, threads",
    [
        pytest.param(1 << 20, 0, 64, 1, id="raw-1TiB"),
        pytest.param(1 << 20, 0, 64, 2, id="raw-1TiB-2-threads"),
        pytest.param(1 << 10, 64, 64, 1, id="fragmented-1GiB"),
        pytest.param(100 << 10, 64, 64, 1, id="fragmented-100GiB"),
        pytest.param(1 << 20, 64, 512, 1, id="fragmented-1TiB-all-held"),
        pytest.param(1 << 20, 64, 64, 1, id="fragmented-1TiB-a-fifth-held"),
        pytest.param(16 << 10, 4, 512, 1, id="4KiB-clusters-16GiB"),
    ],
)
def test_look_up(
    benchmark: BenchmarkFixture, program: Path, mapped_mib: int, cluster_kib: int, memory_mib: int, threads: int
) -> None:
    """Nanoseconds of processor time for begin and end of a request at a random place."""
    command = [program, *map(str, (mapped_mib, cluster_kib, memory_mib, threads))]
    runs = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(5)]
    facts = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    benchmark.extra_info |= facts
    benchmark.pedantic(lambda: None, rounds=1)
    print(f"\n{benchmark.name}: {facts}")


def test_read_from_python(benchmark: BenchmarkFixture) -> None:
    """4 KiB at a time, in order, from a file on tmpfs: os.preadv, and pread_into of the same bytes, in turn."""
    with TemporaryDirectory(dir="/dev/shm") as directory:
        fd = os.open(Path(directory, "disk"), os.O_RDWR | os.O_CREAT)
        os.write(fd, os.urandom(SIZE))
        extents = ExtentMap(SIZE)
        extents.insert(extents.generation(), [MapExtent(0, SIZE, extents.add_slot(fd), 0, True)])
        offsets = [index * 4096 % SIZE for index in range(READS)]
        array = bytearray(4096)
        view = memoryview(bytearray(4096))

        def plain() -> float:
            start, buffers = time.thread_time_ns(), [array]
            for offset in offsets:
                os.preadv(fd, buffers, offset)
            return (time.thread_time_ns() - start) / READS

        def mapped(buf: bytearray | memoryview) -> float:
            start, pread_into = time.thread_time_ns(), extents.pread_into
            for offset in offsets:
                pread_into(offset, buf)
            return (time.thread_time_ns() - start) / READS

        rounds = [(plain(), mapped(array), mapped(view)) for _ in range(8)][1:]
        os.close(fd)
    preadv, with_bytearray, with_view = (round(statistics.median(column)) for column in zip(*rounds, strict=True))
    benchmark.extra_info |= {"preadv_ns": preadv, "bytearray_ns": with_bytearray, "memoryview_ns": with_view}
    benchmark.pedantic(lambda: None, rounds=1)
    print(f"\nos.preadv {preadv} ns, pread_into of a bytearray {with_bytearray} ns, of a memoryview {with_view} ns")
