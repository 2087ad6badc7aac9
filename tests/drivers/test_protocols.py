# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The conformance kit over the protocol drivers and raw."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from helpers.loop import backend_over, in_loop

from blockgraph.backend import Backend
from blockgraph.testing import check_driver

SIZES = [1, 4096, 65_537]

Factory = Callable[[], AbstractAsyncContextManager[Backend]]


def over_file(path: Path, size: int, *above: dict[str, Any], below: int = 0, **options: Any) -> Factory:
    """Makes roots over a fresh file of `below + size` bytes, and whatever is described above it."""

    def make() -> AbstractAsyncContextManager[Backend]:
        path.write_bytes(os.urandom(below + size))
        return backend_over({"node-name": "below", "driver": "file", "filename": str(path), **options}, *above)

    return make


@pytest.mark.parametrize("place", ["tmpfs", "disk"])
@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("size", SIZES)
@in_loop
async def test_file_conforms(
    request: pytest.FixtureRequest, tmp_path: Path, place: str, direct: bool, size: int
) -> None:
    folder = request.getfixturevalue("tmpfs") if place == "tmpfs" else tmp_path
    await check_driver(over_file(folder / "image", size, cache={"direct": direct}), size=size)


@pytest.mark.parametrize("size", [4096, 1 << 17])
@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("sector", [512, 4096])
@in_loop
async def test_host_device_conforms(loop_device: Callable[..., str], size: int, direct: bool, sector: int) -> None:
    device = loop_device(size, "--sector-size", str(sector))
    node = {"node-name": "it", "driver": "host_device", "filename": device, "cache": {"direct": direct}}
    await check_driver(lambda: backend_over(node, resize=False), size=size)


@pytest.mark.parametrize("size", SIZES)
@in_loop
async def test_memory_conforms(size: int) -> None:
    await check_driver(lambda: backend_over({"node-name": "it", "driver": "memory", "size": size}), size=size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"driver": "null-co", "read-zeroes": True}, id="null"),
        pytest.param({"driver": "pattern"}, id="pattern"),
        pytest.param({"driver": "sparse-random", "seed": 1, "percent": 40, "runlength": 8192}, id="sparse-random"),
        pytest.param({"driver": "sparse-random", "seed": 1, "random-content": True}, id="random-content"),
    ],
)
@in_loop
async def test_read_only_disk_conforms(options: dict[str, Any], size: int) -> None:
    node = {"node-name": "it", "size": size, **options}
    await check_driver(lambda: backend_over(node, writable=False, resize=False), size=size, writable=False)


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("size", [511, 65_537])
@pytest.mark.parametrize("offset", [0, 1000])
@in_loop
async def test_raw_conforms(tmpfs: Path, direct: bool, size: int, offset: int) -> None:
    above = {"node-name": "it", "driver": "raw", "file": "below", "offset": offset}
    await check_driver(over_file(tmpfs / "image", size, above, below=offset, cache={"direct": direct}), size=size)


@pytest.mark.parametrize("size", SIZES)
@in_loop
async def test_raw_window_conforms(size: int) -> None:
    nodes = (
        {"node-name": "below", "driver": "memory", "size": 500_000},
        {"node-name": "it", "driver": "raw", "file": "below", "offset": 777, "size": size},
    )
    await check_driver(lambda: backend_over(*nodes, resize=False), size=size)
