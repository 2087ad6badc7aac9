# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""host_device over a loop device where there is one, and its decisions with the system calls replaced."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.harness import READ, extents, make_node, opened, read, write
from helpers.loop import backend_over, in_loop

from blockgraph.errors import GraphError, IOFailure, OutOfRange, Unsupported
from blockgraph.flags import Flag
from blockgraph.protocols import host_device
from blockgraph.protocols.descriptor import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE
from blockgraph.protocols.host_device import HostDevice
from blockgraph.testing import check_driver

MIB = 1 << 20


# A real device.


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("sector", [512, 4096])
def test_device_requests_of_any_alignment_agree_with_model(
    loop_device: Callable[..., str], sector: int, direct: bool
) -> None:
    device = loop_device(4 * MIB, "--sector-size", str(sector))
    model = bytearray(4 * MIB)

    async def run() -> None:
        async with opened("host_device", filename=device, cache={"direct": direct}) as child:
            assert child.node.size() == 4 * MIB
            assert child.node.driver.request_alignment >= sector
            for offset, length in ((0, 1), (511, 4098), (MIB - 1, MIB + 2), (4 * MIB - 100, 100)):
                data = os.urandom(length)
                await write(child, offset, data)
                model[offset : offset + length] = data
            for offset, length, flags in ((100, 100_000, Flag.NONE), (MIB, 300_000, Flag.MAY_UNMAP)):
                await child.pwrite_zeroes(offset, length, flags)
                model[offset : offset + length] = bytes(length)
            await child.flush()
            assert await read(child, 0, 4 * MIB) == model
            assert await extents(child) == [(0, 4 * MIB, "data")]

    asyncio.run(run())


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("sector", [512, 4096])
@in_loop
async def test_device_conforms(loop_device: Callable[..., str], sector: int, direct: bool) -> None:
    device = loop_device(1 << 17, "--sector-size", str(sector))
    node = {"node-name": "it", "driver": "host_device", "filename": device, "cache": {"direct": direct}}
    await check_driver(lambda: backend_over(node, resize=False), size=1 << 17)


def test_device_discard_frees_storage_below(loop_device: Callable[..., str], tmp_path: Path) -> None:
    device = loop_device(4 * MIB)
    image = tmp_path / "loop0.img"

    async def run() -> None:
        async with opened("host_device", filename=device) as child:
            await write(child, 0, os.urandom(4 * MIB))
            await child.flush()
            before = image.stat().st_blocks
            await child.discard(MIB, 2 * MIB)
            await child.flush()
            assert image.stat().st_blocks <= before - 2 * MIB // 512 // 2
            assert await read(child, MIB, 2 * MIB) == bytes(2 * MIB)  # a loop device's discards read as zeroes

    asyncio.run(run())


def test_device_write_past_end_and_resize_are_refused(loop_device: Callable[..., str]) -> None:
    device = loop_device(MIB)

    async def run() -> None:
        async with opened("host_device", filename=device) as child:
            with pytest.raises(OutOfRange):
                await write(child, MIB - 1, b"xy")
            await child.truncate(MIB)
            with pytest.raises(OutOfRange, match="resize it"):
                await child.truncate(2 * MIB)

    asyncio.run(run())


def test_device_that_is_read_only_is_refused_for_writing(loop_device: Callable[..., str]) -> None:
    device = loop_device(MIB, "--read-only")

    async def run() -> None:
        with pytest.raises(IOFailure, match="read-only") as caught:
            async with opened("host_device", filename=device):
                pass
        assert device in str(caught.value)
        async with opened("host_device", filename=device, read_only=True, need=READ) as child:
            assert await read(child, 0, 512) == bytes(512)

    asyncio.run(run())


def test_device_given_to_file_names_host_device(loop_device: Callable[..., str]) -> None:
    device = loop_device(MIB)

    async def run() -> None:
        with pytest.raises(GraphError, match="host_device"):
            async with opened("file", filename=device):
                pass

    asyncio.run(run())


# Decisions.


def test_device_given_a_file_names_file(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.touch()

    async def run() -> None:
        with pytest.raises(GraphError, match="use driver 'file'"):
            async with opened("host_device", filename=str(path)):
                pass
        with pytest.raises(GraphError, match="without a size"):
            async with opened("host_device", filename="/dev/null"):
                pass
        with pytest.raises(IOFailure, match="check 'filename'"):
            async with opened("host_device", filename=str(path / "absent")):
                pass

    asyncio.run(run())


class Kernel:
    """Stands in for fallocate on a device: refuses some modes, and keeps a list of the calls."""

    def __init__(self, refused: set[int], code: int = errno.EOPNOTSUPP) -> None:
        self.refused = refused
        self.code = code
        self.calls: list[int] = []

    async def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        self.calls.append(mode)
        if mode in self.refused:
            raise OSError(self.code, os.strerror(self.code))


PUNCH, ZERO = PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE | KEEP_SIZE


def device_over(kernel: Kernel) -> HostDevice:
    driver = make_node("host_device", filename="/dev/absent").driver
    assert isinstance(driver, HostDevice)
    driver._pool = kernel  # type: ignore[assignment]
    return driver


@pytest.mark.parametrize(
    "refused, flags, calls",
    [
        pytest.param(set(), Flag.MAY_UNMAP, [PUNCH], id="unmap"),
        pytest.param(set(), Flag.NONE, [ZERO], id="keep"),
        pytest.param({PUNCH}, Flag.MAY_UNMAP, [PUNCH, ZERO], id="unmap-refused"),
    ],
)
def test_device_zeroes_by_the_kernel_as_asked(refused: set[int], flags: Flag, calls: list[int]) -> None:
    kernel = Kernel(refused)
    asyncio.run(device_over(kernel).pwrite_zeroes(0, 4096, flags))
    assert kernel.calls == calls


@pytest.mark.parametrize(
    "refused, flags, calls",
    [
        pytest.param({PUNCH, ZERO}, Flag.MAY_UNMAP, [PUNCH, ZERO], id="nothing-works"),
        pytest.param({PUNCH}, Flag.MAY_UNMAP | Flag.NO_FALLBACK, [PUNCH], id="slow-is-forbidden"),
        pytest.param(set(), Flag.NO_FALLBACK, [], id="keep-is-never-fast"),
    ],
)
def test_device_zeroes_are_unsupported_without_a_way(refused: set[int], flags: Flag, calls: list[int]) -> None:
    kernel = Kernel(refused)
    with pytest.raises(Unsupported):
        asyncio.run(device_over(kernel).pwrite_zeroes(0, 4096, flags))
    assert kernel.calls == calls


def test_device_failing_to_zero_is_failure_not_unsupported() -> None:
    with pytest.raises(IOFailure, match="/dev/absent") as caught:
        asyncio.run(device_over(Kernel({ZERO}, errno.EIO)).pwrite_zeroes(0, 4096))
    assert not isinstance(caught.value, Unsupported)


def test_device_without_discard_says_so_and_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    def refuse(fd: int, offset: int, length: int) -> None:
        calls.append((offset, length))
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(host_device, "discard_range", refuse)
    driver = device_over(Kernel(set()))
    for _ in range(2):
        with pytest.raises(Unsupported):
            asyncio.run(driver.discard(0, 4096))
    assert calls == [(0, 4096)]
