# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Native requests where storage asks for aligned ones: O_DIRECT, and devices. What is aligned is done without Python;
what is not is read, changed and written back in Python, and nobody comes between.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers.limits import files_end_at
from helpers.loop import driver_of, in_loop
from helpers.qcow2 import check

import blockgraph
from blockgraph.backend import Backend
from blockgraph.create import create_file
from blockgraph.errors import IOFailure, NoSpace
from blockgraph.formats.qcow2 import Qcow2
from blockgraph.native import allocate_aligned
from blockgraph.protocols.file import File

KIB = 1024
PAGE = 4096
CLUSTER = 64 * KIB
SIZE = 4 << 20


def storage(path: Path | str, driver: str = "file", *, direct: bool = True) -> dict[str, Any]:
    return {"driver": driver, "node-name": "storage", "filename": str(path), "cache": {"direct": direct}}


def over(fmt: str, below: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {"nodes": [{"driver": fmt, "node-name": "disk", "file": below, **options}]}


def native_write(guest: Backend, offset: int, data: bytes) -> bool:
    return guest.use_map().extents.pwrite(offset, data)


async def write(guest: Backend, offset: int, data: bytes) -> bool:
    """As a front end does. True: it was native."""
    if await asyncio.to_thread(native_write, guest, offset, data):
        return True
    await guest.pwrite(offset, data)
    return False


async def read(guest: Backend, offset: int, buf: memoryview) -> bool:
    if guest.use_map().extents.pread_into(offset, buf):
        return True
    await guest.pread_into(offset, buf)
    return False


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it does not come about")


# Which are native.


@pytest.mark.parametrize("kind", ["file", "buffered device", "direct device"])
@in_loop
async def test_aligned_requests_are_native_and_others_are_not(
    tmp_path: Path, loop_device: Callable[..., str], kind: str
) -> None:
    content = bytearray(random.Random(kind).randbytes(SIZE))
    if kind == "file":
        (tmp_path / "disk").write_bytes(content)
        below = storage(tmp_path / "disk")
    else:
        device = loop_device(SIZE, "--sector-size", "4096")
        Path(device).write_bytes(content)
        below = storage(device, "host_device", direct=kind == "direct device")
    async with await blockgraph.aopen(over("raw", below)) as graph:
        guest = await graph.backend("disk", writable=True)
        await read(guest, 0, memoryview(bytearray(PAGE)))
        unit = graph.node("storage").driver.request_alignment
        assert unit > 1
        for offset, length in ((0, unit), (5 * unit, 3 * unit), (SIZE - unit, unit), (0, SIZE)):
            buf = allocate_aligned(length + PAGE)[1 : length + 1]  # its memory need not be where the kernel wants it
            assert await read(guest, offset, buf)
            assert buf == content[offset : offset + length]
            data = os.urandom(length)
            assert await write(guest, offset, data)
            content[offset : offset + length] = data
        for offset, length in ((1, unit), (0, unit - 1), (unit - 1, 2)):
            buf = memoryview(bytearray(length))
            assert not await read(guest, offset, buf)
            assert buf == content[offset : offset + length]
            data = os.urandom(length)
            assert not await write(guest, offset, data)
            content[offset : offset + length] = data
        assert await guest.pread(0, SIZE) == content
        await guest.flush()
    assert Path(below["filename"]).read_bytes() == content


@in_loop
async def test_first_writes_to_an_image_are_native(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    await create_file(str(path), SIZE, "qcow2", replace=True, cluster_size=CLUSTER)
    content = bytearray(SIZE)
    async with await blockgraph.aopen(over("qcow2", storage(path))) as graph:
        guest = await graph.backend("disk", writable=True)
        await write(guest, 0, b"x" * CLUSTER)  # has the reserve filled
        content[:CLUSTER] = b"x" * CLUSTER
        first_writes = driver_of(graph, "disk", Qcow2).first_writes
        assert first_writes is not None
        await until(lambda: first_writes.reserve > 0)
        for number, offset in enumerate(range(CLUSTER, 8 * CLUSTER, CLUSTER)):
            data = os.urandom(PAGE * (number + 1))
            assert await write(guest, offset + PAGE, data)
            content[offset + PAGE : offset + PAGE + len(data)] = data
        assert guest.use_map().extents.stats().first_writes == 7
        # Not aligned: the cluster gets its place by Python.
        assert not await write(guest, 9 * CLUSTER + 100, b"y" * 1000)
        content[9 * CLUSTER + 100 : 9 * CLUSTER + 1100] = b"y" * 1000
        assert await guest.pread(0, SIZE) == content
    check(path)
    async with await blockgraph.aopen(over("qcow2", storage(path, direct=False))) as graph:
        assert await (await graph.backend("disk")).pread(0, SIZE) == content


@in_loop
async def test_file_is_made_longer_for_many_clusters_at_once(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    await create_file(str(path), SIZE, "qcow2", replace=True, cluster_size=CLUSTER)
    before = path.stat().st_size
    async with await blockgraph.aopen(over("qcow2", storage(path))) as graph:
        guest = await graph.backend("disk", writable=True)
        await write(guest, 0, b"x" * CLUSTER)  # has the reserve filled
        first_writes = driver_of(graph, "disk", Qcow2).first_writes
        assert first_writes is not None
        await until(lambda: first_writes.reserve > 0)
        end = path.stat().st_size
        assert end >= before + (first_writes.reserve + 1) * CLUSTER
        for cluster in range(1, 8):
            assert await write(guest, cluster * CLUSTER, b"y" * CLUSTER)
        assert path.stat().st_size == end
        assert await guest.pread(0, SIZE) == b"x" * CLUSTER + b"y" * 7 * CLUSTER + bytes(SIZE - 8 * CLUSTER)
    check(path)


@in_loop
async def test_file_that_can_not_be_made_that_long_is_used_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    await create_file(str(path), SIZE, "qcow2", replace=True, cluster_size=CLUSTER)
    room = 5  # clusters, one of them a table; the reserve would be more
    content = bytearray(SIZE)
    refused = 0
    with files_end_at(path.stat().st_size + room * CLUSTER):
        async with await blockgraph.aopen(over("qcow2", storage(path))) as graph:
            guest = await graph.backend("disk", writable=True)
            for start in range(0, 20 * CLUSTER, CLUSTER):
                try:
                    await write(guest, start, b"x" * CLUSTER)
                except NoSpace:
                    refused += 1
                else:
                    content[start : start + CLUSTER] = b"x" * CLUSTER
            assert refused == 20 - (room - 1)
            assert await guest.pread(0, SIZE) == content
    check(path)
    async with await blockgraph.aopen(over("qcow2", storage(path))) as graph:
        assert await (await graph.backend("disk")).pread(0, SIZE) == content


@in_loop
async def test_copies_before_writes_are_native(tmp_path: Path) -> None:
    old = os.urandom(SIZE)
    (tmp_path / "disk").write_bytes(old)
    await create_file(str(tmp_path / "target"), SIZE, "raw", replace=True)
    target = {"driver": "file", "node-name": "kept", "filename": str(tmp_path / "target"), "cache": {"direct": True}}
    nodes = [
        *over("raw", storage(tmp_path / "disk"))["nodes"],
        {"driver": "raw", "node-name": "target", "file": target},
        {"driver": "copy-before-write", "node-name": "top", "file": "disk", "target": "target"},
    ]
    async with await blockgraph.aopen({"nodes": nodes}) as graph:
        guest = await graph.backend("top", writable=True)
        await write(guest, 0, b"n" * PAGE)
        for offset in range(CLUSTER, SIZE, 2 * CLUSTER):
            assert await write(guest, offset + PAGE, b"n" * PAGE)
        assert guest.use_map().extents.stats().first_writes == SIZE // CLUSTER // 2
    kept, live = (tmp_path / "target").read_bytes(), (tmp_path / "disk").read_bytes()
    for cluster in range(0, SIZE, CLUSTER):
        copied = cluster == 0 or cluster // CLUSTER % 2
        assert kept[cluster : cluster + CLUSTER] == (old[cluster : cluster + CLUSTER] if copied else bytes(CLUSTER))
        assert (live[cluster : cluster + CLUSTER] == old[cluster : cluster + CLUSTER]) is not bool(copied)


# Nobody comes between.


@in_loop
async def test_native_requests_keep_away_from_a_block_that_is_changed_and_from_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    await create_file(str(tmp_path / "image"), SIZE, "qcow2", replace=True, cluster_size=CLUSTER)
    for fmt, name in (("raw", "disk"), ("qcow2", "image")):
        async with await blockgraph.aopen(over(fmt, storage(tmp_path / name))) as graph:
            guest = await graph.backend("disk", writable=True)
            await guest.pwrite(0, b"o" * SIZE)
            await read(guest, 0, memoryview(bytearray(SIZE)))
            inserts = guest.use_map().extents.stats().inserts
            arrived, go = asyncio.Event(), asyncio.Event()

            async def waits(self: File, offset: int, buf: memoryview, *, events: Any = (arrived, go)) -> None:
                events[0].set()
                await events[1].wait()
                await super(File, self).pread(offset, buf)

            with monkeypatch.context() as patch:
                patch.setattr(File, "pread", waits)
                change = asyncio.ensure_future(guest.pwrite(CLUSTER + 100, b"c" * 10))
                await arrived.wait()
                assert not native_write(guest, CLUSTER, b"n" * PAGE)
                assert not guest.use_map().extents.pread_into(CLUSTER, allocate_aligned(PAGE))
                assert native_write(guest, CLUSTER + PAGE, b"n" * PAGE)
                assert native_write(guest, 0, b"n" * CLUSTER)
                go.set()
                await change
            assert native_write(guest, CLUSTER, b"N" * PAGE)
            assert guest.use_map().extents.stats().inserts - inserts <= 1
            expected = b"n" * CLUSTER + b"N" * PAGE + b"n" * PAGE + b"o" * (CLUSTER - 2 * PAGE)
            assert await guest.pread(0, 2 * CLUSTER) == expected


@pytest.mark.parametrize("above", [False, True], ids=["bitmap-here", "bitmap-above"])
@in_loop
async def test_no_bitmap_comes_back_while_the_storage_is_resized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, above: bool
) -> None:
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    nodes: list[dict[str, Any]] = [storage(tmp_path / "disk", direct=False)]
    if above:
        nodes.append({"driver": "delay", "node-name": "top", "file": "storage"})
    async with await blockgraph.aopen({"nodes": nodes}) as graph:
        guest = await graph.backend(nodes[-1]["node-name"], writable=True)
        other = await graph.backend("storage", writable=True, resize=True)
        bitmap = await graph.add_bitmap(nodes[-1]["node-name"], "b0", granularity=CLUSTER)
        await read(guest, 0, memoryview(bytearray(1)))
        arrived, go = asyncio.Event(), asyncio.Event()
        plain = File.truncate

        async def waits(self: File, size: int) -> None:
            arrived.set()
            await go.wait()
            await plain(self, size)

        monkeypatch.setattr(File, "truncate", waits)
        resize = asyncio.ensure_future(other.truncate(2 * SIZE))
        await arrived.wait()
        await read(guest, 0, memoryview(bytearray(1)))
        mapped = guest.use_map().extents.find(0)
        go.set()
        await resize
        assert mapped is None
        await guest.pread(0, 1)
        await write(guest, CLUSTER, b"x")
        assert bitmap.contents().next_dirty(0) is not None


@in_loop
async def test_native_flush_that_failed_is_told_once(tmp_path: Path) -> None:
    """There is nothing that the kernel might have forgotten by the next time."""
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    async with await blockgraph.aopen(over("raw", storage(tmp_path / "disk"))) as graph:
        guest = await graph.backend("disk", writable=True)
        await guest.pwrite(0, bytes(PAGE))
        graph.node("storage").driver.flush_failed(errno.EIO)
        with pytest.raises(IOFailure):
            await guest.flush()
        await guest.flush()


def beside_each_other(guest: Backend, loop: asyncio.AbstractEventLoop, content: bytearray, rounds: int) -> int:
    """From threads, each with bytes of its own in every block of 8 KiB; returns how many were native."""
    native = 0
    lock = threading.Lock()

    def lane(number: int) -> None:
        nonlocal native
        own = random.Random(number)
        done = 0
        for _ in range(rounds):
            at = own.randrange(len(content) // (2 * PAGE)) * 2 * PAGE
            if number == 0:  # a whole page, which nobody else writes
                offset, length = at, PAGE
            else:  # a part of the other one
                offset, length = at + PAGE + number * 700 + own.randrange(100), own.randrange(1, 600)
            data = own.randbytes(length)
            if native_write(guest, offset, data):
                done += 1
            else:
                asyncio.run_coroutine_threadsafe(guest.pwrite(offset, data), loop).result(60)
            content[offset : offset + length] = data
        with lock:
            native += done

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lane, range(5)))
    return native


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@in_loop
async def test_aligned_and_other_writes_from_threads(tmp_path: Path, fmt: str) -> None:
    path = tmp_path / "disk"
    size = 16 * CLUSTER
    await create_file(str(path), size, fmt, replace=True)
    content = bytearray(size)
    async with await blockgraph.aopen(over(fmt, storage(path))) as graph:
        guest = await graph.backend("disk", writable=True)
        guest.use_map()
        loop = asyncio.get_running_loop()
        native = await asyncio.to_thread(beside_each_other, guest, loop, content, 300)
        assert native
        assert await guest.pread(0, size) == content
    if fmt == "qcow2":
        check(path)
    async with await blockgraph.aopen(over(fmt, storage(path, direct=False))) as graph:
        assert await (await graph.backend("disk")).pread(0, size) == content


@in_loop
async def test_native_writes_while_the_file_gets_and_loses_an_end_inside_a_page(tmp_path: Path) -> None:
    """With the right to resize comes a larger alignment: the last page then takes turns with the page cache."""
    size = 256 * KIB
    path = tmp_path / "disk"
    content = bytearray(random.Random(1).randbytes(size))
    path.write_bytes(content)
    async with await blockgraph.aopen(over("raw", storage(path))) as graph:
        guest = await graph.backend("disk", writable=True)
        await read(guest, 0, memoryview(bytearray(512)))
        stop = threading.Event()
        native = [0] * 4
        loop = asyncio.get_running_loop()

        def lane(number: int) -> None:
            own = random.Random(number)
            while not stop.is_set():
                offset = (own.randrange(size // 512 // 4) * 4 + number) * 512
                data = own.randbytes(512)
                if native_write(guest, offset, data):
                    native[number] += 1
                else:
                    asyncio.run_coroutine_threadsafe(guest.pwrite(offset, data), loop).result(60)
                content[offset : offset + 512] = data

        with ThreadPoolExecutor(4) as pool:
            lanes = [loop.run_in_executor(pool, lane, number) for number in range(4)]
            try:
                for extra in (100, 700, 0, 333) * 3:
                    await asyncio.sleep(0.01)
                    other = await graph.backend("disk", writable=True, resize=True)
                    await other.truncate(size + extra)
                    if extra:
                        await other.pwrite(size, b"t" * extra)
                        await other.flush()
                    await graph.close_backend(other)
            finally:
                stop.set()
                await asyncio.gather(*lanes)
        assert all(native) or graph.node("storage").driver.request_alignment > 512
        assert await guest.pread(0, size + 333) == bytes(content) + b"t" * 333
    assert path.read_bytes() == bytes(content) + b"t" * 333
