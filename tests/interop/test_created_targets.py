# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Targets that a backup job makes (mode "create"): what is in them without the graph, for QEMU's tools.

An image with clusters of its own only is of use if it names its backing file: qemu-img info shows it, and qemu-img
compare finds the disk of the point in time in it.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command import disk
from helpers.loop import graph_of, in_loop
from helpers.qcow2 import check, qemu_img, qemu_io, raw_of

from blockgraph.api import AsyncGraph
from blockgraph.cli import main
from blockgraph.errors import GraphError, OptionError
from blockgraph.jobs.manager import JobManager
from blockgraph.jobs.options import BackupOptions

MIB = 1 << 20
SIZE = 8 * MIB


@pytest.fixture(autouse=True)
def _tools(require_tool: Callable[[str], str]) -> Iterator[None]:
    require_tool("qemu-img")
    require_tool("qemu-io")
    return iter([None])


def image(path: Path, driver: str = "qcow2", **options: Any) -> dict[str, Any]:
    return {"driver": driver, "file": {"driver": "file", "filename": str(path)}, **options}


async def backed_up(graph: AsyncGraph, **options: Any) -> None:
    job = await JobManager(graph).backup(BackupOptions(device="disk", mode="create", **options))
    await job.wait()
    assert job.error is None


def info(path: Path) -> tuple[str | None, str | None]:
    found = json.loads(qemu_img("info", "--output=json", path))
    return found.get("backing-filename"), found.get("backing-filename-format")


def same(path: Path, reference: bytes) -> None:
    check(path)
    assert raw_of(path) == reference


@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
@pytest.mark.parametrize("filtered", [False, True], ids=["plain", "below-a-filter"])
def test_top_names_the_backing_file_of_the_device(tmp_path: Path, base_format: str, filtered: bool) -> None:
    base, top, target = (tmp_path / name for name in ("base", "top", "target"))
    qemu_img("create", "-q", "-f", base_format, base, SIZE)
    qemu_io_of(base, base_format, "write -P 1 0 4M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", base_format, top)
    qemu_io(top, "write -P 2 1M 1M", "write -z 2M 64k")
    reference = raw_of(top)

    @in_loop
    async def run() -> None:
        nodes = [image(top, **{"node-name": "top" if filtered else "disk"})]
        if filtered:
            nodes.append({"driver": "delay", "node-name": "disk", "file": "top"})
        async with graph_of(*nodes) as graph:
            guest = await graph.backend("disk", writable=True)
            await backed_up(graph, target=image(target), sync="top")
            await guest.pwrite(0, b"later")

    run()
    assert info(target) == ("base", base_format)
    same(target, reference)
    mapped = json.loads(qemu_img("map", "--output=json", target))
    assert {entry["start"] for entry in mapped if entry["depth"] == 0} == {MIB, 2 * MIB}, "no more than the top layer"


def qemu_io_of(path: Path, image_format: str, *commands: str) -> None:
    arguments = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", image_format, *arguments, str(path)], check=True, capture_output=True)


def test_top_of_a_disk_without_a_layer_below_names_nothing(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"x" * SIZE)

    @in_loop
    async def run() -> None:
        async with graph_of(image(tmp_path / "disk", "raw", **{"node-name": "disk"})) as graph:
            await backed_up(graph, target=image(tmp_path / "target"), sync="top")

    run()
    assert info(tmp_path / "target") == (None, None)
    same(tmp_path / "target", b"x" * SIZE)


@pytest.mark.parametrize("sync", ["incremental", "differential", "bitmap"])
@pytest.mark.parametrize("backing", ["node", "described", "in-another-directory"])
def test_increment_names_what_it_was_made_over(tmp_path: Path, sync: str, backing: str) -> None:
    (tmp_path / "disk").write_bytes(b"a" * SIZE)
    elsewhere = tmp_path / "old" if backing == "in-another-directory" else tmp_path
    elsewhere.mkdir(exist_ok=True)
    full, target = elsewhere / "full", tmp_path / "inc"

    references: list[bytes] = []

    @in_loop
    async def run() -> None:
        async with graph_of(image(tmp_path / "disk", "raw", **{"node-name": "disk"})) as graph:
            guest = await graph.backend("disk", writable=True)
            await graph.add_bitmap("disk", "b0")
            await backed_up(graph, target=image(full), sync="full")
            await guest.pwrite(MIB, b"b" * 100_000)
            await guest.write_zeroes(4 * MIB, MIB)
            references.append(await guest.pread(0, SIZE))
            below: Any = image(full, **{"node-name": "full", "read-only": True})
            if backing == "node":
                await graph.add_node(below)
                below = "full"
            more = {"bitmap_mode": "never"} if sync == "bitmap" else {}
            await backed_up(graph, target=image(target, backing=below), sync=sync, bitmap="b0", **more)
            await guest.pwrite(0, b"later")

    run()
    assert info(target) == (str(full) if backing == "in-another-directory" else "full", "qcow2")
    same(target, references[0])
    assert target.stat().st_size < 2 * MIB
    if elsewhere == tmp_path:  # the directory can be moved
        (moved := tmp_path.with_name(f"{tmp_path.name}-moved")).mkdir()
        for path in (full, target):
            path.rename(moved / path.name)
        same(moved / "inc", references[0])


@pytest.mark.parametrize(
    "backing, error",
    [
        ({"driver": "memory", "size": SIZE}, OptionError),
        ({"driver": "raw", "size": MIB, "file": {"driver": "file", "filename": "x"}}, OptionError),
        ("other", OptionError),
        ("nobody", GraphError),
    ],
    ids=["memory", "window", "memory-node", "missing"],
)
def test_backing_that_an_image_can_not_name_is_refused(tmp_path: Path, backing: Any, error: type[Exception]) -> None:
    @in_loop
    async def run() -> None:
        nodes = [{"driver": "memory", "size": SIZE, "node-name": name} for name in ("disk", "other")]
        async with graph_of(*nodes) as graph:
            with pytest.raises(error):
                await backed_up(graph, target=image(tmp_path / "target", backing=backing), sync="full")

    run()
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("sync", ["full", "incremental"])
def test_graph_file_with_an_increment_to_be_made_is_checked_and_run(
    tmp_path: Path, sync: str, capsys: pytest.CaptureFixture[str]
) -> None:
    disk(tmp_path, SIZE)
    base = tmp_path / "disk.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", tmp_path / "disk.img", base)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", tmp_path / "disk.img", tmp_path / "full.qcow2")
    assert main(["bitmap", str(base), "--add", "b0"]) == 0
    qemu_io(base, "write -P 7 3M 1M")
    options: dict[str, Any] = {"bitmap": "b0"} if sync == "incremental" else {}
    target = image(Path("inc.qcow2"), backing=image(Path("full.qcow2")))
    job = {"type": "backup", "device": "disk", "sync": sync, "mode": "create", "target": target, **options}
    path = tmp_path / "graph.json"
    path.write_text(json.dumps({"nodes": [image(Path("disk.qcow2"), **{"node-name": "disk"})], "jobs": [job]}))
    assert main(["check", "--open", str(path)]) == 0, capsys.readouterr()
    assert main(["run", str(path)]) == 0, capsys.readouterr()
    assert info(tmp_path / "inc.qcow2") == ("full.qcow2", "qcow2")
    same(tmp_path / "inc.qcow2", raw_of(base))


@pytest.mark.parametrize("syncs", [("incremental", "incremental"), ("incremental", "differential")])
def test_images_of_a_chain_name_each_other(tmp_path: Path, syncs: tuple[str, str]) -> None:
    (tmp_path / "disk").write_bytes(b"a" * SIZE)

    references: list[bytes] = []

    @in_loop
    async def run() -> None:
        async with graph_of(image(tmp_path / "disk", "raw", **{"node-name": "disk"})) as graph:
            guest = await graph.backend("disk", writable=True)
            for number, sync in enumerate(("full", *syncs)):
                await guest.pwrite(number * MIB, bytes([number]) * 1000)
                references.append(await guest.pread(0, SIZE))
                job = await JobManager(graph).backup(
                    BackupOptions(device="disk", sync=sync, chain=str(tmp_path / "chain"))  # type: ignore[arg-type]
                )
                await job.wait()
                assert job.error is None

    run()
    images = sorted((tmp_path / "chain").glob("*.qcow2"), key=lambda path: path.stat().st_mtime_ns)
    assert [info(path) for path in images] == [
        (None, None),
        (images[0].name, "qcow2"),
        (images[1 if syncs[0] == "incremental" else 0].name, "qcow2"),
    ]
    for path, reference in zip(images, references, strict=True):
        same(path, reference)
