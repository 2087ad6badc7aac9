# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Discards and zeroes over NBD beside nbdkit's file plugin and qemu-nbd, on a dense disk in tmpfs.

No client of these runs reads or writes: where the disk's bytes live has to be learnt from what is made zero.
"""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import servers, zero_client
from benchmarks.images import MIB, make, node
from benchmarks.peers import add_row, against, in_turn, need

KIB = 1024
SIZE = 512 * MIB
PYTHON = "/usr/bin/python3"

#: Name, as zero_client says it, block.
WORK = [
    ("64 KiB discard", "trim", 64 * KIB),
    ("1 MiB discard", "trim", MIB),
    ("64 KiB write zeroes", "zero", 64 * KIB),
    ("64 KiB write zeroes, no hole", "allocate", 64 * KIB),
    ("4 KiB write zeroes", "zero", 4 * KIB),
    ("4 KiB write zeroes, no hole", "allocate", 4 * KIB),
]


def need_libnbd() -> None:
    """Skip without libnbd's Python module."""
    if subprocess.run([PYTHON, "-c", "import nbd"], check=False, capture_output=True).returncode:
        pytest.skip("needs libnbd's module for the system's Python (python3-libnbd)")


@pytest.mark.parametrize("work", WORK, ids=lambda work: work[0].replace(" ", "-").replace(",", ""))
@pytest.mark.parametrize("driver", ["raw", "qcow2"])
def test_zeroes(benchmark: BenchmarkFixture, shm: Path, driver: str, work: tuple[str, str, int]) -> None:
    """Every block once, at random, depth 16; wanted: not slower than any of them."""
    need_libnbd()
    need("nbdkit", "qemu-nbd")
    what, how, block = work
    master, disk = shm / "master", shm / "disk"
    make(master, SIZE, driver)
    size = SIZE if block >= 64 * KIB else SIZE // 8

    def one(server: Callable[[], AbstractContextManager[str]]) -> float:
        subprocess.run(["cp", str(master), str(disk)], check=True)
        with server() as uri:
            client = [PYTHON, zero_client.__file__, uri, how, str(block), str(size)]
            return float(subprocess.run(client, check=True, capture_output=True, text=True).stdout)

    sides: dict[str, Callable[[], float]] = {
        "ours": lambda: one(lambda: servers.ours(shm, [node("disk", disk, driver)])),
        "qemu-nbd": lambda: one(lambda: servers.qemu_nbd(shm, disk, driver, "--discard=unmap")),
    }
    if driver == "raw":
        sides["nbdkit"] = lambda: one(lambda: servers.nbdkit(shm, disk))
    rates = benchmark.pedantic(in_turn, args=(sides,), rounds=1)
    ours = rates.pop("ours")
    peers = [against(name, ours, rate, 1.0) for name, rate in rates.items()]
    add_row(
        benchmark, "3.1" if driver == "raw" else "3.2", f"{driver}, {what}", "IOPS", statistics.median(ours), *peers
    )
