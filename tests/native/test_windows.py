# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Files in memory, mapped: reads over NBD leave holes as they are, and nothing mapped."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockgraph.backend import Backend
from blockgraph.exports.nbd import NbdExport, NbdServer
from blockgraph.native import ExtentMap, Windows
from blockgraph.perm import Perm
from blockgraph.testing.nbd_client import NbdClient
from tests.helpers.harness import edge, opened
from tests.helpers.nbd import run_async

MIB = 1 << 20
_CAP_IPC_LOCK = 14
_MCL_FUTURE = 2


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("disk")
    yield fd
    os.close(fd)


def test_only_files_in_memory_have_windows(fd: int) -> None:
    windows = Windows.of(fd)
    assert windows is not None
    windows.release()
    pipe = os.pipe()
    assert Windows.of(pipe[0]) is None
    for end in pipe:
        os.close(end)
    device = os.open("/dev/zero", os.O_RDONLY)
    assert Windows.of(device) is None
    os.close(device)


def test_slot_out_of_range(fd: int) -> None:
    windows = Windows.of(fd)
    assert windows is not None
    with pytest.raises(ValueError, match="no slot 1024"):
        ExtentMap(MIB).set_windows(1024, windows)
    windows.release()


@pytest.fixture(params=[False, True], ids=["", "locked"])
def locked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run with all memory locked that will be mapped, too."""
    if request.param:
        capabilities = int(Path("/proc/self/status").read_text().split("CapEff:\t")[1].split()[0], 16)
        if not capabilities >> _CAP_IPC_LOCK & 1:
            pytest.skip("needs the right to lock memory")
        libc = ctypes.CDLL(None)
        assert libc.mlockall(_MCL_FUTURE) == 0
        yield
        assert libc.munlockall() == 0
    else:
        yield


@pytest.mark.usefixtures("locked")
@run_async
async def test_read_over_nbd_holes_stay_and_nothing_stays_mapped(tmpfs: Path) -> None:
    path = tmpfs / "disk"
    data = bytes(i // 512 % 255 + 1 for i in range(MIB))
    with path.open("wb") as file:
        file.write(data)
        file.truncate(3 * MIB)
        os.pwrite(file.fileno(), data, 2 * MIB)
    blocks = path.stat().st_blocks
    async with opened("file", "file", filename=str(path), read_only=True) as driver:
        backend = Backend("root", need=Perm.CONSISTENT_READ)
        backend.set_child("root", edge(driver.node, need=Perm.CONSISTENT_READ))
        server = NbdServer(threads=1)
        await server.listen_unix(str(tmpfs / "socket"))
        server.add_export(NbdExport("disk", backend, writable=False))
        async with await NbdClient.connect_unix(str(tmpfs / "socket"), "disk") as client:
            for _ in range(2):
                for length in (64 << 10, MIB, 3 * MIB):
                    for offset in range(0, 3 * MIB, length):
                        expected = (data + bytes(MIB) + data)[offset : offset + length]
                        assert await client.pread(offset, length) == expected
            stats = server.stats
            assert stats is not None
            assert stats.hits >= stats.requests // 2
        assert path.stat().st_blocks == blocks
        assert str(path) in Path("/proc/self/maps").read_text()
        await server.close()
        assert backend.map is not None
        await backend.map.clear()
    assert str(path) not in Path("/proc/self/maps").read_text()
