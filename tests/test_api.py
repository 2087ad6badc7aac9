# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The Python API: `blockgraph.open` from any thread, `blockgraph.aopen` in a loop."""

from __future__ import annotations

import asyncio
import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import blockgraph
from blockgraph import SyncBackend
from blockgraph.errors import BlockGraphError, GraphError, IOFailure, OptionError, OutOfRange, ReadOnly
from blockgraph.flags import Flag

SIZE = 1 << 20


def memory(name: str = "disk", **more: Any) -> dict[str, Any]:
    """A description of a memory node."""
    return {"driver": "memory", "node-name": name, "size": SIZE, **more}


def test_open_round_trip_returns_what_was_written() -> None:
    with blockgraph.open({"nodes": [memory()]}) as graph, graph.backend("disk", writable=True) as disk:
        assert disk.size == SIZE
        assert disk.writable
        disk.pwrite(1000, b"hello")
        assert disk.pread(998, 9) == b"\0\0hello\0\0"
        into = bytearray(5)
        disk.pread_into(1000, into)
        assert into == b"hello"
        disk.pwrite(0, memoryview(b"abc"), flags=Flag.FUA)
        disk.flush()
        disk.write_zeroes(1000, 3)
        assert disk.pread(1000, 5) == b"\0\0\0lo"
        disk.discard(0, SIZE)


def test_open_block_status_tells_data_and_zero() -> None:
    with blockgraph.open({"nodes": [memory()]}) as graph:
        disk = graph.backend("disk", writable=True)
        disk.pwrite(0, b"x" * 65536)
        first = disk.block_status(0, SIZE)
        assert (first.data, first.zero) == (True, False)
        rest = disk.block_status(first.length, SIZE - first.length)
        assert (rest.data, rest.zero, rest.length) == (False, True, SIZE - first.length)


def test_open_many_threads_each_see_their_own_writes() -> None:
    with blockgraph.open({"nodes": [memory()]}) as graph:
        disk = graph.backend("disk", writable=True)
        wrong: list[int] = []

        def work(number: int) -> None:
            data = bytes([number]) * 4096
            for _ in range(50):
                disk.pwrite(number * 4096, data)
                if disk.pread(number * 4096, 4096) != data:
                    wrong.append(number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_open_file_is_written_back_at_close(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(SIZE))
    graph_file = tmp_path / "graph.toml"
    graph_file.write_text(
        '[[nodes]]\nnode-name = "disk"\ndriver = "raw"\nfile = {driver = "file", filename = "disk.raw"}\n'
    )
    with blockgraph.open(graph_file) as graph:
        graph.backend("disk", writable=True).pwrite(4096, b"kept")
    assert image.read_bytes()[4096:4100] == b"kept"


@pytest.mark.parametrize("offset, length", [(-1, 1), (SIZE, 1), (0, SIZE + 1), (SIZE - 1, 2), (0, -1)], ids=str)
def test_backend_request_outside_disk_is_out_of_range(offset: int, length: int) -> None:
    with blockgraph.open({"nodes": [memory()]}) as graph:
        disk = graph.backend("disk", writable=True)
        with pytest.raises(OutOfRange, match="node 'disk'"):
            disk.pread(offset, length)
        with pytest.raises(OutOfRange):
            disk.write_zeroes(offset, length)


def test_backend_read_only_refuses_every_change() -> None:
    with blockgraph.open({"nodes": [memory()]}) as graph:
        disk = graph.backend("disk")
        assert not disk.writable
        for change in (
            lambda: disk.pwrite(0, b"x"),
            lambda: disk.write_zeroes(0, 1),
            lambda: disk.discard(0, 1),
        ):
            with pytest.raises(ReadOnly):
                change()


def test_open_missing_image_names_node_and_file(tmp_path: Path) -> None:
    missing = tmp_path / "missing.raw"
    with pytest.raises(BlockGraphError) as caught:
        blockgraph.open({"nodes": [{"driver": "file", "node-name": "disk", "filename": str(missing)}]})
    assert "disk" in str(caught.value)
    assert str(missing) in str(caught.value)
    assert isinstance(caught.value, (IOFailure, GraphError))


def test_open_wrong_description_opens_nothing(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(SIZE))
    good = {"driver": "file", "node-name": "disk", "filename": str(image)}
    with pytest.raises(OptionError, match="targett"):
        blockgraph.open({"nodes": [good, {"driver": "backup-top", "file": "disk", "targett": "x"}]})
    with blockgraph.open({"nodes": [good]}):  # its lock was not left behind
        pass


def test_close_twice_does_nothing() -> None:
    graph = blockgraph.open({"nodes": [memory()]})
    graph.close()
    graph.close()


def test_request_after_close_fails() -> None:
    graph = blockgraph.open({"nodes": [memory()]})
    disk = graph.backend("disk", writable=True)
    graph.close()
    for request in (lambda: disk.pread(0, 1), lambda: disk.pwrite(0, b"x"), disk.flush, lambda: graph.backend("disk")):
        with pytest.raises(IOFailure, match="closed") as caught:
            request()
        assert caught.value.errno == errno.ESHUTDOWN


def test_close_beside_requests_of_other_threads_ends_all_of_them() -> None:
    for _ in range(20):
        graph = blockgraph.open({"nodes": [memory()]})
        disk = graph.backend("disk", writable=True)
        started = threading.Semaphore(0)

        def use(disk: SyncBackend = disk, started: threading.Semaphore = started) -> None:
            def flush_for_ever() -> None:
                while True:
                    disk.flush()
                    started.release()

            with pytest.raises(IOFailure, match="closed"):
                flush_for_ever()

        with ThreadPoolExecutor(4) as pool:
            users = [pool.submit(use) for _ in range(4)]
            for _ in users:
                started.acquire()
            graph.close()
            for user in users:
                user.result(60)


def test_close_ends_work_that_was_called_and_never_ends() -> None:
    graph = blockgraph.open({"nodes": [memory()]})
    began = threading.Event()

    async def wait_for_ever() -> None:
        began.set()
        await asyncio.Event().wait()

    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(graph.call, wait_for_ever())
        began.wait(60)
        graph.close()
        with pytest.raises(IOFailure, match="the graph has been closed"):
            work.result(60)


async def _use() -> bytes:
    async with await blockgraph.aopen({"nodes": [memory()]}) as graph:
        disk = await graph.backend("disk", writable=True)
        await disk.pwrite(0, b"abc")
        return await disk.pread(0, 3)


def test_aopen_in_a_running_loop_round_trips() -> None:
    assert asyncio.run(_use()) == b"abc"
