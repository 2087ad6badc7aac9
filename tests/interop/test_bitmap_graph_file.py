# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Graph files with bitmaps of real images: the README's pull-mode backup day after day, sidecars, QEMU's digests."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import blockgraph
from blockgraph.cli import main
from blockgraph.errors import GraphError
from blockgraph.graph.graph import Graph
from blockgraph.graph.load import check_description, load
from blockgraph.session import Session
from blockgraph.testing.nbd_client import NbdClient
from tests.helpers.nbd import run_async, run_tool
from tests.interop.test_pull_mode import PULLER, SYSTEM
from tests.test_readme import blocks

MIB = 1 << 20
SIZE = 64 * MIB
GRANULE = 64 << 10

Require = Callable[[str], str]


def create(path: Path, driver: str = "raw") -> None:
    assert main(["create", "-f", driver, str(path), str(SIZE)]) == 0


def image(path: Path, driver: str) -> dict[str, Any]:
    return {"node-name": "disk", "driver": driver, "file": {"driver": "file", "filename": str(path)}}


def write(path: Path, offset: int) -> None:
    """One byte into a qcow2 image."""
    with (
        blockgraph.open({"nodes": [image(path, "qcow2")]}) as graph,
        graph.backend("disk", writable=True) as disk,
    ):
        disk.pwrite(offset, b"x")


@run_async
async def test_pulled_backups_of_the_readme_day_after_day(require_tool: Require, tmp_path: Path) -> None:
    """Each day a session of its own, with another pair of bitmaps; the backup grows by what is dirty only."""
    nbdsh, nbdinfo = require_tool("nbdsh"), require_tool("nbdinfo")
    days = ["monday", "tuesday", "wednesday", "thursday"]
    await asyncio.to_thread(create, tmp_path / "disk.qcow2", "qcow2")
    assert await asyncio.to_thread(main, ["bitmap", str(tmp_path / "disk.qcow2"), "--add", "monday"]) == 0
    rng = random.Random(5)
    disk, backup = bytearray(SIZE), tmp_path / "backup"
    backup.write_bytes(disk)
    for today, tomorrow in itertools.pairwise(days):
        file = tmp_path / "pull.toml"
        file.write_text(
            next(text for text in blocks("toml") if text.startswith("# pull.toml"))
            .replace("tuesday", tomorrow)
            .replace("monday", today)
        )
        (tmp_path / "kept.img").unlink(missing_ok=True)
        await asyncio.to_thread(create, tmp_path / "kept.img")
        async with await Session.start(load(file)) as session:
            reference = bytes(disk)
            uri = session.exports["backup"].uri
            async with await NbdClient.connect_unix(str(tmp_path / "pull.sock"), "top") as guest:

                async def keep_writing(guest: NbdClient) -> None:
                    for _ in range(50):
                        data = rng.randbytes(rng.randrange(1, 20) * 512)
                        offset = rng.randrange((SIZE // 8 - len(data)) // 512) * 512 + SIZE // 4
                        await guest.pwrite(offset, data)
                        disk[offset : offset + len(data)] = data

                puller = PULLER.format(target=str(backup), context=f"qemu:dirty-bitmap:{today}", uri=uri)
                _, told = await asyncio.gather(keep_writing(guest), run_tool(nbdsh, "-c", puller, env=SYSTEM))
                assert int(told) <= 50 * 2 * GRANULE
                assert (int(told) > 0) is (today != "monday")
                assert backup.read_bytes() == reference != disk
                info = json.loads(await run_tool(nbdinfo, "--json", uri))["exports"][0]
                assert info["contexts"] == ["base:allocation", f"qemu:dirty-bitmap:{today}"]


@pytest.mark.parametrize("path", [None, "elsewhere.bitmaps"])
def test_sidecar_of_a_raw_image_keeps_what_the_graph_file_describes(tmp_path: Path, path: str | None) -> None:
    create(tmp_path / "disk.img")
    sidecar = tmp_path / (path or "disk.img.bitmaps")
    file = tmp_path / "g.toml"
    file.write_text(
        textwrap.dedent(f"""
            [[nodes]]
            node-name = "disk"
            driver = "raw"
            file = {{driver = "file", filename = "disk.img"}}

            [[bitmaps]]
            node = "disk"
            name = "b0"
            sidecar = {"true" if path is None else json.dumps(path)}

            [[bitmaps]]
            node = "disk"
            name = "b1"
            persistent = true
            granularity = "4k"
        """)
    )
    assert asyncio.run(Graph.dry_run(load(file))) == []
    assert not sidecar.exists()
    for number in range(3):
        with blockgraph.open(file) as graph:
            assert [(each.name, each.count, each.persistent) for each in graph.bitmaps()] == [
                ("b0", number * GRANULE, True),
                ("b1", number * 4096, True),
            ]
            with graph.backend("disk", writable=True) as disk:
                disk.pwrite(number * MIB, b"x")
        assert sidecar.exists()
        assert asyncio.run(Graph.dry_run(load(file))) == []
    text = file.read_text().replace('name = "b0"', 'name = "b0"\ngranularity = 512')
    file.write_text(text)
    with pytest.raises(GraphError, match="'b0' is there already, with granularity 65536 and not 512"):
        blockgraph.open(file)
    (problem,) = asyncio.run(Graph.dry_run(load(file)))
    assert "bitmaps[0].granularity: bitmap 'b0' is there already, with granularity 65536" in str(problem)


def test_sidecar_that_was_found_is_crash_safe_or_not_as_it_says(tmp_path: Path) -> None:
    create(tmp_path / "disk.img")
    bitmap: dict[str, Any] = {"node": "disk", "name": "b0", "sidecar": True}
    what = {"nodes": [image(tmp_path / "disk.img", "raw")], "bitmaps": [bitmap]}
    with blockgraph.open(what):
        pass
    bitmap["crash-safe"] = False
    with pytest.raises(GraphError, match="is crash-safe; ask for what it is"):
        blockgraph.open(what)
    (problem,) = asyncio.run(Graph.dry_run(load(what)))
    assert "is crash-safe; ask for what it is" in str(problem)


@pytest.mark.parametrize(
    "bitmap, message",
    [
        ({"sidecar": "x"}, "bitmaps[0].sidecar: driver 'qcow2' looks for a sidecar beside the image only; set it to"),
        ({"sidecar": True, "crash-safe": False}, "bitmaps[0].crash-safe: driver 'qcow2' keeps bitmaps in the image"),
        ({"persistent": True, "crash-safe": True}, "bitmaps[0].crash-safe: bitmaps that driver 'qcow2' keeps in the"),
        (
            {"persistent": True, "epochs": True},
            "bitmaps[0].epochs: driver 'qcow2' keeps bitmaps in the image, which has",
        ),
    ],
    ids=["path", "not-crash-safe", "no-sidecar", "epochs"],
)
def test_sidecar_of_an_image_that_keeps_bitmaps_has_one_use(bitmap: dict[str, Any], message: str) -> None:
    nodes = [{**image(Path("d"), "qcow2"), "node-name": "disk"}]
    (problem,) = [
        problem
        for problem in check_description({"nodes": nodes, "bitmaps": [{"node": "disk", "name": "b", **bitmap}]})
        if problem.severity == "error"
    ]
    assert str(problem).startswith(message)


def test_epochs_of_a_described_bitmap(tmp_path: Path) -> None:
    create(tmp_path / "d")
    bitmap = {"node": "disk", "name": "b0", "sidecar": True, "epochs": True}
    what = {"nodes": [image(tmp_path / "d", "raw")], "bitmaps": [bitmap]}
    with blockgraph.open(what) as graph, graph.backend("disk", writable=True) as disk:
        disk.pwrite(0, b"x")
        checkpoint = graph.advance_epoch("disk", "b0")
        disk.pwrite(MIB, b"x")
    with blockgraph.open(what) as graph:
        assert graph.changed_since("disk", "b0", checkpoint) == [(MIB, GRANULE)]
        assert graph.changed_since("disk", "b0", 1) == [(0, GRANULE), (MIB, GRANULE)]
        graph.add_bitmap("disk", "b1", persistent=True)
    bitmap["name"] = "b1"
    with pytest.raises(GraphError, match="bitmap 'b1' is there already, without epochs"):
        blockgraph.open(what)


def test_qcow2_with_a_sidecar_is_described(tmp_path: Path) -> None:
    create(tmp_path / "d", "qcow2")
    what = {
        "nodes": [image(tmp_path / "d", "qcow2")],
        "bitmaps": [{"node": "disk", "name": "b0", "sidecar": True, "crash-safe": True}],
    }
    for number in range(2):
        with blockgraph.open(what) as graph, graph.backend("disk", writable=True) as disk:
            assert graph.bitmaps()[0].count == number * GRANULE
            disk.pwrite(number * MIB, b"x")
    assert (tmp_path / "d.bitmaps").exists()


def test_digest_is_that_of_qemu(require_tool: Require, tmp_path: Path) -> None:
    daemon = require_tool("qemu-storage-daemon")
    create(tmp_path / "d", "qcow2")
    granularities = {"b0": GRANULE, "b1": 512, "b2": 2 * MIB}
    what = {
        "nodes": [image(tmp_path / "d", "qcow2")],
        "bitmaps": [
            {"node": "disk", "name": name, "persistent": True, "granularity": granularity}
            for name, granularity in granularities.items()
        ],
    }
    rng = random.Random(3)
    with blockgraph.open(what) as graph:
        with graph.backend("disk", writable=True) as disk:
            for _ in range(100):
                disk.pwrite(rng.randrange(SIZE - 512), b"x" * 512)
        ours = {name: graph.bitmap_digest("disk", name) for name in granularities}
    assert len(set(ours.values())) == 3
    commands = [
        {"execute": "qmp_capabilities"},
        {"execute": "blockdev-add", "arguments": {**image(tmp_path / "d", "qcow2"), "read-only": True}},
        *(
            {"execute": "x-debug-block-dirty-bitmap-sha256", "arguments": {"node": "disk", "name": name}}
            for name in granularities
        ),
        {"execute": "quit"},
    ]
    done = subprocess.run(
        [daemon, "--chardev", "stdio,id=c", "--monitor", "chardev=c"],
        input="\n".join(json.dumps(command) for command in commands),
        capture_output=True,
        text=True,
        check=True,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    digests = [answer["return"]["sha256"] for answer in answers if "sha256" in str(answer.get("return"))]
    assert dict(zip(granularities, digests, strict=True)) == ours


@run_async
async def test_bare_name_is_found_in_the_backing_file(require_tool: Require, tmp_path: Path) -> None:
    """And allocation depth tells the layers apart."""
    nbdinfo = require_tool("nbdinfo")
    await asyncio.to_thread(create, tmp_path / "base", "qcow2")
    assert await asyncio.to_thread(main, ["bitmap", str(tmp_path / "base"), "--add", "b0"]) == 0
    write(tmp_path / "base", GRANULE)
    overlay = ["create", "-f", "qcow2", "-b", str(tmp_path / "base"), "-F", "qcow2", str(tmp_path / "top")]
    assert await asyncio.to_thread(main, overlay) == 0
    write(tmp_path / "top", 3 * GRANULE)
    export = {"type": "nbd", "id": "e", "node-name": "disk", "bitmaps": ["b0"], "allocation-depth": True}
    server = {"addr": {"type": "unix", "path": str(tmp_path / "s")}}
    nodes = [image(tmp_path / "top", "qcow2")]
    async with await Session.start(load({"nodes": nodes, "exports": [export], "nbd-server": server})) as session:
        uri = session.exports["e"].uri

        async def mapped(context: str) -> list[tuple[int, int, int]]:
            told = json.loads(await run_tool(nbdinfo, "--json", f"--map={context}", uri))
            return [(extent["offset"], extent["length"], extent["type"]) for extent in told]

        assert await mapped("qemu:dirty-bitmap:b0") == [
            (0, GRANULE, 0),
            (GRANULE, GRANULE, 1),
            (2 * GRANULE, SIZE - 2 * GRANULE, 0),
        ]
        assert await mapped("qemu:allocation-depth") == [
            (0, GRANULE, 0),
            (GRANULE, GRANULE, 2),
            (2 * GRANULE, GRANULE, 0),
            (3 * GRANULE, GRANULE, 1),
            (4 * GRANULE, SIZE - 4 * GRANULE, 0),
        ]
