# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What has native threads ends before anything that they use, however it comes to its end."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from blockgraph._native import ffi
from blockgraph.native.ending import Ending


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
    Ending(owner, events.append, "ended")
    del used, owner, other
    gc.collect()
    assert events == ["ended", "freed"]


def test_it_is_called_once() -> None:
    events: list[str] = []
    owner = Member()
    ending = Ending(owner, events.append, "ended")
    ending()
    ending()
    del owner
    assert events == ["ended"]


def test_a_forked_child_ends_nothing() -> None:
    events: list[str] = []
    owner = Member()
    ending = Ending(owner, events.append, "ended")
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


def test_what_is_alive_at_exit_is_ended() -> None:
    assert (
        run("""
        from blockgraph.native.ending import Ending
        class Owner: pass
        owner = Owner()
        Ending(owner, print, "ended")
    """)
        == "ended\n"
    )


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
