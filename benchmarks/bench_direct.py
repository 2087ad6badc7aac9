# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The NBD export of images opened with cache.direct, as guests with cache "none" have them, on a real file system.

Beside qemu-nbd, and beside fio on the file itself, which is all that the device can do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import servers
from benchmarks.bench_nbd import KIB, SIZE, Server, compare, patterns, served
from benchmarks.fio import Figures, fio_file, first_touches, need_fio, pattern
from benchmarks.images import empty, make, node
from benchmarks.peers import need


@patterns
@pytest.mark.parametrize("driver", ["raw", "qcow2"])
def test_direct(
    benchmark: BenchmarkFixture, disk_directory: Path, shape: tuple[str, str, int, int], driver: str
) -> None:
    """Fully allocated."""
    need_fio()
    need("qemu-nbd")
    what, rw, block, depth = shape
    image, bare = disk_directory / "disk", disk_directory / "bare"
    make(image, SIZE, driver)
    make(bare, SIZE, "raw")
    options = pattern(rw, SIZE, block, depth)
    ours = [node("disk", image, driver, cache={"direct": True})]

    def peer(*more: str) -> Callable[[], Figures]:
        return lambda: served(lambda: servers.qemu_nbd(disk_directory, image, driver, "--cache=none", *more), options)

    sides: dict[str, Callable[[], Figures]] = {
        "ours": lambda: served(lambda: servers.ours(disk_directory, ours), options),
        "qemu-nbd": peer(),
        "qemu-nbd, aio native": peer("--aio=native"),
        "fio on the file": lambda: fio_file(bare, *options),
    }
    compare(benchmark, "3.1", f"{driver}, cache.direct, {what}", sides, {})


@pytest.mark.parametrize("block", [4 * KIB, 64 * KIB], ids=["4-KiB", "64-KiB"])
@pytest.mark.parametrize("driver", ["raw", "qcow2"])
def test_first_touch(benchmark: BenchmarkFixture, disk_directory: Path, driver: str, block: int) -> None:
    """Writes that room has to be found for: in the file, and for qcow2 in the image."""
    need_fio()
    need("qemu-nbd")
    image = disk_directory / "disk"
    options = first_touches(disk_directory / "requests", SIZE // 4, block)
    ours = [node("disk", image, driver, cache={"direct": True})]

    def one(server: Server) -> Figures:
        image.unlink(missing_ok=True)
        empty(image, SIZE // 4, driver)
        return served(server, options)

    def peer(*more: str) -> Callable[[], Figures]:
        return lambda: one(lambda: servers.qemu_nbd(disk_directory, image, driver, "--cache=none", *more))

    sides: dict[str, Callable[[], Figures]] = {
        "ours": lambda: one(lambda: servers.ours(disk_directory, ours)),
        "qemu-nbd": peer(),
        "qemu-nbd, aio native": peer("--aio=native"),
    }
    compare(
        benchmark,
        "3.5",
        f"empty {driver}, cache.direct, first touch of 64 KiB by {block // KIB} KiB, depth 16",
        sides,
        {},
    )
