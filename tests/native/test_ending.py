# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What has native threads ends before anything that they use, however it comes to its end."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from blockgraph._native import ffi
from blockgraph.native.ending import Ending
from blockgraph.native.pool import Pool


class Member:
    """Of a cycle; dropped with it."""

    def __init__(self) -> None:
        self.others: list[Any] = []


def test_a_collected_cycle_ends_before_what_was_made_earlier_is_finalized() -> None:
    events: list[str] = []
    used = ffi.gc(ffi.new("int *"), lambda _: events.append("freed"))
    owner, other = Member(), Member()
    owner.others += [used, other]
    other.others += [used, owner]
    Ending(owner, "ended", events.append)
    del used, owner, other
    gc.collect()
    assert events == ["ended", "freed"]


def test_it_is_called_once() -> None:
    events: list[str] = []
    owner = Member()
    ending = Ending(owner, "ended", events.append)
    ending()
    ending()
    del owner
    assert events == ["ended"]


def test_a_forked_child_ends_nothing() -> None:
    events: list[str] = []
    owner = Member()
    ending = Ending(owner, "ended", events.append)
    child = os.fork()
    if child == 0:
        inherited = ending.is_inherited
        ending()
        os._exit(0 if inherited and not events else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not ending.is_inherited
    ending()
    assert events == ["ended"]


def run(program: str, *args: str) -> str:
    """What a program of its own prints; its crash fails the test."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program), *args],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done
    return done.stdout


def test_who_uses_it_when_its_native_part_has_ended_finds_that_out() -> None:
    seen: list[Any] = []

    class Late(Member):
        def __del__(self) -> None:
            ending = self.others[0].others[0]
            seen.append(ending.native)
            ending()

    late, owner = Late(), Member()
    owner.others += [Ending(owner, "native", seen.append), late]
    late.others.append(owner)
    del owner, late
    gc.collect()
    assert seen == ["native", None]


def test_pool_is_closed_by_a_coroutine_that_is_collected_with_it() -> None:
    async def use() -> None:
        pool = Pool(2)
        pool.attach()
        me = asyncio.current_task()  # a cycle
        try:
            await asyncio.Event().wait()
        finally:
            with pytest.raises(RuntimeError, match="closed"):
                pool.copy_blocking([])
            assert pool.threads == 2
            pool.close()
            ended.append(me)

    ended: list[object] = []
    loop = asyncio.new_event_loop()
    task = loop.create_task(use())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    del loop, task
    gc.collect()
    assert len(ended) == 1


AT_WORK_AT_EXIT = """
    import os, threading
    import blockgraph

    with open("disk", "wb") as file:
        file.truncate(1 << 24)
    graph = blockgraph.open({"nodes": [
        {"driver": "raw", "node-name": "disk", "file": {"driver": "file", "filename": "disk"}},
    ]})
    disk = graph.backend("disk", writable=True)
    busy = threading.Barrier(5)

    def use():
        disk.pwrite(0, bytes(1 << 20))
        busy.wait()
        while True:
            disk.pwrite(0, bytes(1 << 20))
            disk.flush()

    for _ in range(4):
        threading.Thread(target=use, daemon=True).start()
    busy.wait()
"""


def test_threads_may_be_at_work_at_exit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        assert run(AT_WORK_AT_EXIT) == ""


# A process of its own: it writes while the server's process collects, and has the interpreter.
CLIENT = """
    import asyncio, sys
    from blockgraph.testing.nbd_client import NbdClient

    async def write(client):
        while True:
            await client.pwrite(0, bytes(4096))

    async def use():
        clients = [await NbdClient.connect_unix(sys.argv[1], "disk") for _ in range(2)]
        await asyncio.gather(*(write(client) for client in clients * 8))

    try:
        asyncio.run(use())
    except OSError:
        print("the client lost the server", flush=True)
"""

SERVER_DROPPED = """
    import asyncio, gc, subprocess, sys, time
    import blockgraph
    from blockgraph.create import create_file
    from blockgraph.exports.nbd import NbdExport, NbdServer

    image, address, client = sys.argv[1:]

    class Slow:
        def __del__(self):
            time.sleep(0.05)  # between the finalizers of what was made before and after this

    async def serve():
        await create_file(image, 8 << 20, "qcow2", replace=False)
        graph = await blockgraph.aopen({"nodes": [
            {"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": image}},
        ]})
        guest = await graph.backend("disk", writable=True)
        guest.use_map()
        slow = Slow()
        server = NbdServer(threads=2)
        await server.listen_unix(address)
        server.add_export(NbdExport("disk", guest, writable=True))
        started = subprocess.Popen([sys.executable, "-c", client, address])
        while not server._native or server._native.stats.hits < 1000:
            await asyncio.sleep(0.01)
        server._native.cycle = slow.cycle = [server, slow]
        raise KeyError(started)  # what would have closed the server does not run

    try:
        asyncio.run(serve())
    except KeyError as error:
        started = error.args[0]
    gc.collect()
    started.wait()
"""


def test_a_server_that_nobody_closed_goes_while_its_client_writes(tmp_path: Path) -> None:
    printed = run(SERVER_DROPPED, str(tmp_path / "disk"), str(tmp_path / "socket"), textwrap.dedent(CLIENT))
    assert printed == "the client lost the server\n"
