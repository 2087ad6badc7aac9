# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Pull-mode incremental backup: an export of a point in time with its dirty bitmaps, read by other people's clients.

```
    guest ──► backup-top ──file──► disk   bitmaps: b0 (64 KiB), fine (4 KiB), empty
                 │   ▲ └──target──► kept
                 │   └──file── then (snapshot-access) ──► NBD export "pull" with views of the bitmaps
```

The guest goes on writing all the while. What the clients put together must be the disk at the point in time.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockgraph.bitmaps.actions import AddBitmap, BitmapName
from blockgraph.exports.nbd import AddExport
from blockgraph.exports.options import NbdExportOptions
from blockgraph.graph.load import load
from blockgraph.options import BitmapRef
from blockgraph.session import Session
from blockgraph.testing.nbd_client import NbdClient
from tests.helpers.nbd import run_async, run_tool

MIB = 1 << 20
SIZE = 16 * MIB
GRANULE = 64 << 10

#: nbdsh needs the system's Python, not that of a virtual environment.
SYSTEM = {"PATH": "/usr/bin:/bin"}

Require = Callable[[str], str]

#: Copies what is dirty in a bitmap onto a file that holds an older state: all that a pull-mode backup tool is.
PULLER = """
import os
with open({target!r}, "r+b") as target:
    h.add_meta_context({context!r})
    h.connect_uri({uri!r})
    assert h.can_meta_context({context!r})
    found = []
    def extents(name, offset, entries, error):
        for length, flags in zip(entries[::2], entries[1::2]):
            found.append((offset, length, flags))
            offset += length
    offset = pulled = 0
    while offset < h.get_size():
        h.block_status(h.get_size() - offset, offset, extents)
        offset = sum(found[-1][:2])
    for start, length, flags in found:
        if flags & 1:
            os.pwrite(target.fileno(), h.pread(length, start), start)
            pulled += length
    print(pulled)
"""


class Guest:
    """Writes at random, and remembers what the disk must hold."""

    def __init__(self, client: NbdClient, disk: bytearray) -> None:
        self.disk = disk
        self.touched: set[int] = set()
        self._client = client
        self._random = random.Random(7)
        self._wrote = asyncio.Event()
        self.between_writes = asyncio.Lock()
        self.writes = 0

    async def write(self) -> None:
        """One write in one half of the disk."""
        length = 512 * self._random.randrange(1, 64)
        offset = 512 * self._random.randrange((SIZE // 2 - length) // 512) + SIZE // 4
        data = self._random.randbytes(length)
        async with self.between_writes:
            await self._client.pwrite(offset, data)
            self.disk[offset : offset + length] = data
            self.touched.update(range(offset // 512, (offset + length) // 512))
            self.writes += 1

    async def keep_writing(self) -> None:
        while True:
            await self.write()
            self._wrote.set()

    async def more(self) -> None:
        """Until `keep_writing` has made another write."""
        self._wrote.clear()
        await self._wrote.wait()


@dataclass
class Pull:
    """A point in time, exported.

    Attributes:
        uri: of the export.
        socket: of the server.
        full: a file with the disk as it was when the bitmaps were added.
        reference: the disk at the point in time.
        dirty: sectors written between those two.
        guest: still writing.
    """

    uri: str
    socket: Path
    full: Path
    reference: bytes
    dirty: set[int]
    guest: Guest

    def expected(self, granularity: int) -> list[tuple[int, int, bool]]:
        """(offset, length, dirty) of the whole disk at a granularity."""
        sectors = granularity // 512
        flags = [False] * (SIZE // granularity)
        for sector in self.dirty:
            flags[sector // sectors] = True
        found: list[tuple[int, int, bool]] = []
        for number, flag in enumerate(flags):
            if found and found[-1][2] == flag:
                found[-1] = (found[-1][0], found[-1][1] + granularity, flag)
            else:
                found.append((number * granularity, granularity, flag))
        return found


@asynccontextmanager
async def pulling(tmp_path: Path) -> AsyncIterator[Pull]:
    """A disk with bitmaps that was written to, and its point in time under a guest that goes on writing."""
    image, kept, socket = tmp_path / "disk.img", tmp_path / "kept.img", tmp_path / "s"
    disk = bytearray(random.Random(1).randbytes(SIZE))
    image.write_bytes(disk)
    (tmp_path / "full.img").write_bytes(disk)
    kept.write_bytes(b"")
    with kept.open("r+b") as file:
        file.truncate(SIZE)
    nodes = [
        {"node-name": "disk", "driver": "raw", "file": {"driver": "file", "filename": str(image)}},
        {"node-name": "kept", "driver": "file", "filename": str(kept)},
    ]
    bitmaps = [
        {"node": "disk", "name": "b0", "granularity": GRANULE},
        {"node": "disk", "name": "fine", "granularity": "4k"},
        {"node": "disk", "name": "empty", "disabled": True},
    ]
    exports = [{"type": "nbd", "id": "guest", "node-name": "disk", "writable": True}]
    server = {"addr": {"type": "unix", "path": str(socket)}}
    description = load({"nodes": nodes, "bitmaps": bitmaps, "exports": exports, "nbd-server": server})
    async with await Session.start(description) as session, await NbdClient.connect_unix(str(socket), "disk") as client:
        guest = Guest(client, disk)
        for _ in range(60):
            await guest.write()
        writer = asyncio.create_task(guest.keep_writing())
        try:
            async with guest.between_writes:
                reference, dirty = bytes(disk), set(guest.touched)
                assert session.server is not None
                async with session.graph.transaction() as change:
                    change.add({"driver": "backup-top", "node-name": "top", "file": "disk", "target": "kept"})
                    change.insert("top", above="disk")
                    change.add({"driver": "snapshot-access", "node-name": "then", "file": "top"})
                    wanted = ("b0", BitmapRef(node="disk", name="fine"), "empty")
                    options = NbdExportOptions(
                        id="pull", node_name="then", name="pull", bitmaps=wanted, allocation_depth=True
                    )
                    added = AddExport(change, session.server, options)
                    change.act(AddBitmap(BitmapName("disk", "b1")))
            await guest.more()
            yield Pull(session.server.uri("pull"), socket, tmp_path / "full.img", reference, dirty, guest)
            await guest.more()  # it was not held up
            # The next increment starts where this one ended.
            async with guest.between_writes:
                since = [
                    start // GRANULE + number
                    for start, length in session.graph.dirty_extents("disk", "b1")
                    for number in range(length // GRANULE)
                ]
                changed = {
                    at // GRANULE
                    for at in range(0, SIZE, GRANULE)
                    if disk[at : at + GRANULE] != reference[at : at + GRANULE]
                }
                assert changed
                assert changed <= set(since)
            assert session.graph.bitmap("disk", "b0").holders == ["export 'pull'"]
            added.end_views()
        finally:
            writer.cancel()
            await asyncio.wait([writer])


def qemu_options(pull: Pull, bitmap: str) -> str:
    """The export as qemu-img's --image-opts, a bitmap in place of block status."""
    return (
        f"driver=nbd,server.type=unix,server.path={pull.socket},export=pull,x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}"
    )


@pytest.mark.parametrize("bitmap, granularity", [("b0", GRANULE), ("fine", 4096)])
@run_async
async def test_pull_nbdinfo_maps_a_bitmap(require_tool: Require, tmp_path: Path, bitmap: str, granularity: int) -> None:
    nbdinfo = require_tool("nbdinfo")
    async with pulling(tmp_path) as pull:
        told = await run_tool(nbdinfo, "--json", f"--map=qemu:dirty-bitmap:{bitmap}", pull.uri)
        found = [(extent["offset"], extent["length"], extent["type"] == 1) for extent in json.loads(told)]
        assert found == pull.expected(granularity)
        assert sum(flag for _, _, flag in found) > 5


@run_async
async def test_pull_nbdinfo_lists_every_context_of_the_export(require_tool: Require, tmp_path: Path) -> None:
    nbdinfo = require_tool("nbdinfo")
    async with pulling(tmp_path) as pull:
        export = json.loads(await run_tool(nbdinfo, "--json", pull.uri))["exports"][0]
        bitmaps = [f"qemu:dirty-bitmap:{name}" for name in ("b0", "fine", "empty")]
        assert export["contexts"] == ["base:allocation", "qemu:allocation-depth", *bitmaps]
        assert export["is_read_only"] is True
        told = json.loads(await run_tool(nbdinfo, "--json", "--map=qemu:dirty-bitmap:empty", pull.uri))
        assert [(extent["offset"], extent["length"], extent["type"]) for extent in told] == [(0, SIZE, 0)]
        told = json.loads(await run_tool(nbdinfo, "--json", "--map=qemu:allocation-depth", pull.uri))
        assert [(extent["offset"], extent["length"], extent["type"]) for extent in told] == [(0, SIZE, 1)]


@pytest.mark.parametrize("bitmap", ["b0", "fine"])
@run_async
async def test_pull_dirty_extents_onto_the_full_backup_make_the_point_in_time(
    require_tool: Require, tmp_path: Path, bitmap: str
) -> None:
    nbdsh = require_tool("nbdsh")
    async with pulling(tmp_path) as pull:
        assert pull.full.read_bytes() != pull.reference
        puller = PULLER.format(target=str(pull.full), context=f"qemu:dirty-bitmap:{bitmap}", uri=pull.uri)
        pulled = int(await run_tool(nbdsh, "-c", puller, env=SYSTEM))
        assert 0 < pulled < SIZE // 2 + 2 * GRANULE
        assert pull.full.read_bytes() == pull.reference


@run_async
async def test_pull_nbdcopy_of_the_whole_is_the_point_in_time(require_tool: Require, tmp_path: Path) -> None:
    nbdcopy = require_tool("nbdcopy")
    async with pulling(tmp_path) as pull:
        await run_tool(nbdcopy, pull.uri, str(tmp_path / "copy"))
        assert (tmp_path / "copy").read_bytes() == pull.reference


@run_async
async def test_pull_qemu_img_converts_and_maps_with_a_bitmap(require_tool: Require, tmp_path: Path) -> None:
    qemu_img = require_tool("qemu-img")
    async with pulling(tmp_path) as pull:
        told = await run_tool(qemu_img, "map", "--output=json", "--image-opts", qemu_options(pull, "b0"))
        # QEMU shows a bitmap as if it were block status: what is dirty has no data.
        found = [(extent["start"], extent["length"], not extent["data"]) for extent in json.loads(told)]
        assert found == pull.expected(GRANULE)
        copy = tmp_path / "copy"
        await run_tool(qemu_img, "convert", "-O", "raw", "--image-opts", qemu_options(pull, "fine"), str(copy))
        assert copy.read_bytes() == pull.reference


@run_async
async def test_pull_increment_made_by_qemu_alone_restores_the_point_in_time(
    require_tool: Require, tmp_path: Path
) -> None:
    """As QEMU's users do it: copy on read of what qemu-img map shows as dirty, into an overlay of the export."""
    qemu_img, qemu_io = require_tool("qemu-img"), require_tool("qemu-io")
    async with pulling(tmp_path) as pull:
        increment = str(tmp_path / "increment.qcow2")
        await run_tool(qemu_img, "create", "-f", "qcow2", "-b", pull.uri, "-F", "raw", increment)
        told = await run_tool(qemu_img, "map", "--output=json", "--image-opts", qemu_options(pull, "b0"))
        dirty = [extent for extent in json.loads(told) if not extent["data"]]
        reads = [f"-cread {extent['start']} {extent['length']}" for extent in dirty]
        await run_tool(qemu_io, "-C", "-f", "qcow2", *reads, increment)
        await run_tool(qemu_img, "rebase", "-u", "-b", str(pull.full), "-F", "raw", increment)
        await run_tool(qemu_img, "convert", "-f", "qcow2", "-O", "raw", increment, str(tmp_path / "restored"))
        assert (tmp_path / "restored").read_bytes() == pull.reference
