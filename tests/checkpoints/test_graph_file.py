# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Section `checkpoints`: checked, taken at the start of a session, with backups and with views that clients pull."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.nbd import run_async, run_tool
from helpers.qcow2 import qemu_img, qemu_io, raw_of
from helpers.qcow2_bitmaps import bitmap_info

from blockgraph.api import AsyncGraph, open_description
from blockgraph.bitmaps import DirtyBitmap
from blockgraph.checkpoints import Checkpoints
from blockgraph.cli import main
from blockgraph.errors import BlockGraphError
from blockgraph.exports.nbd import AddExport
from blockgraph.graph.load import check_description, load
from blockgraph.graph.schema import graph_schema
from blockgraph.jobs.job import JobEvent
from blockgraph.session import Session
from blockgraph.testing.nbd_client import NbdClient

MIB = 1 << 20
SIZE = 8 * MIB
GRANULE = 64 << 10


def image(name: str, path: Path, driver: str = "qcow2", **more: Any) -> dict[str, Any]:
    return {"node-name": name, "driver": driver, "file": {"driver": "file", "filename": str(path)}, **more}


def disks(folder: Path, *names: str) -> list[dict[str, Any]]:
    """New qcow2 disks with something on them."""
    for name in names:
        qemu_img("create", "-q", "-f", "qcow2", folder / name, SIZE)
        qemu_io(folder / name, "write -P 1 0 2M")
    return [image(name, folder / name) for name in names]


def fresh(folder: Path, name: str) -> dict[str, Any]:
    """A new qcow2 target, described in place."""
    qemu_img("create", "-q", "-f", "qcow2", folder / name, SIZE)
    return {"driver": "qcow2", "file": {"driver": "file", "filename": str(folder / name)}}


async def run(description: dict[str, Any]) -> tuple[Session, list[JobEvent]]:
    """A session from its start until its jobs have ended; closed."""
    events: list[JobEvent] = []
    async with await Session.start(load(description), listener=events.append) as session:
        await session.wait_jobs()
    return session, events


@pytest.mark.parametrize(
    "how",
    [{}, {"granularity": "4k"}, {"sidecar": True}, {"grouped": True}],
    ids=["plain", "fine", "sidecar", "grouped"],
)
@run_async
async def test_backups_of_what_changed_since_the_last_run(
    require_tool: Callable[[str], str], tmp_path: Path, how: dict[str, Any]
) -> None:
    """Each run makes increments of two disks; those who write in between are QEMU's tools."""
    require_tool("qemu-img")
    require_tool("qemu-io")
    nodes = await asyncio.to_thread(disks, tmp_path, "a", "b")
    before: dict[str, Path] = {}
    for day in ("one", "two", "three"):
        targets: dict[str, Any] = {}
        for name in ("a", "b"):
            targets[name] = await asyncio.to_thread(fresh, tmp_path, f"{name}-{day}")
            if name in before:
                onto = ("-f", "qcow2", "-F", "qcow2", "-b", before[name])
                qemu_img("rebase", "-q", "-u", *onto, tmp_path / f"{name}-{day}")
                file = {"driver": "file", "filename": str(before[name])}
                targets[name]["backing"] = {"driver": "qcow2", "read-only": True, "file": file}
        checkpoint = {"name": day, "disks": ["a", "b"], "backup": targets, **how}
        session, events = await run({"nodes": nodes, "checkpoints": [checkpoint]})
        assert [job.error for job in session.jobs] == [None, None]
        (taken,) = session.checkpoints
        notes = [event.error for event in events if event.kind == "note"]
        if day == "one":
            assert notes == ["makes a full backup: there is no checkpoint before this one"] * 2
        else:
            assert not notes
            assert taken.checkpoint.since == {"two": "one", "three": "two"}[day]
            assert [taken.jobs[name].progress.total for name in ("a", "b")] == [2 * GRANULE, MIB]
        for name in ("a", "b"):
            before[name] = tmp_path / f"{name}-{day}"
            assert raw_of(before[name]) == raw_of(tmp_path / name)
            names = {each for each, _, _ in bitmap_info(tmp_path / name)}
            assert f"checkpoint:{['one', 'two', 'three'].index(day) + 1}:{day}" in names
            assert not any(".." in each for each in names), "what the backups used is gone"
        if not how.get("sidecar"):  # what QEMU writes behind a sidecar's back makes its bitmaps inconsistent
            qemu_io(tmp_path / "a", "write -P 5 3M 64k", "write -z 64k 64k")
            qemu_io(tmp_path / "b", "write -P 6 4M 1M")
            continue
        async with await Session.start(load({"nodes": nodes})) as writing:
            for name, at, length in (("a", 3 * MIB, GRANULE), ("a", GRANULE, GRANULE), ("b", 4 * MIB, MIB)):
                guest = await writing.graph.backend(name, writable=True)
                await guest.pwrite(at, day[:1].encode() * length)
                await writing.graph.close_backend(guest)


@run_async
async def test_view_is_pulled_while_the_guest_writes(require_tool: Callable[[str], str], tmp_path: Path) -> None:
    nbdinfo, _ = require_tool("nbdinfo"), require_tool("qemu-img")
    nodes = await asyncio.to_thread(disks, tmp_path, "a")
    await run({"nodes": nodes, "checkpoints": [{"name": "monday", "disks": ["a"]}]})
    await asyncio.to_thread(qemu_io, tmp_path / "a", "write -P 9 5M 128k")
    reference = await asyncio.to_thread(raw_of, tmp_path / "a")
    kept = {"driver": "memory", "size": SIZE}
    description = {
        "nodes": nodes,
        "nbd-server": {"addr": {"type": "unix", "path": str(tmp_path / "s")}},
        "exports": [{"type": "nbd", "id": "guest", "node-name": "a", "writable": True}],
        "checkpoints": [{"name": "tuesday", "disks": ["a"], "view": {"a": kept}}],
    }
    async with await Session.start(load(description)) as session:
        assert list(session.exports) == ["guest", "tuesday-a"]
        async with await NbdClient.connect_unix(str(tmp_path / "s"), "a") as guest:
            await guest.pwrite(0, b"later" * 100)
            await guest.pwrite(5 * MIB, b"later" * 100)
            uri = session.exports["tuesday-a"].uri
            context = "qemu:dirty-bitmap:monday..tuesday"
            told = json.loads(await run_tool(nbdinfo, "--json", f"--map={context}", uri))
            assert [(row["offset"], row["length"]) for row in told if row["type"]] == [(5 * MIB, 2 * GRANULE)]
            out = str(tmp_path / "pulled")
            await run_tool("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, out)
            assert (tmp_path / "pulled").read_bytes() == reference
    assert not [name for name, _, _ in bitmap_info(tmp_path / "a") if ".." in name]


@run_async
async def test_failed_backup_takes_its_checkpoint_along(tmp_path: Path) -> None:
    """The next increment has what this one was to copy."""
    (tmp_path / "a").write_bytes(bytes(SIZE))
    nodes = [image("a", tmp_path / "a", "raw")]
    sink = {"node-name": "t", "driver": "memory", "size": SIZE}
    failing = {
        "node-name": "bad",
        "driver": "inject-error",
        "image": {"driver": "memory", "size": SIZE},
        "inject-error": [{"event": "none", "errno": 5, "iotype": "write"}],
    }

    def taking(name: str, target: str) -> dict[str, Any]:
        checkpoint = {"name": name, "disks": ["a"], "sidecar": True, "backup": {"a": target}}
        return {"nodes": [*nodes, sink, failing], "checkpoints": [checkpoint]}

    await run(taking("one", "t"))
    async with await Session.start(load({"nodes": nodes})) as session:
        await (await session.graph.backend("a", writable=True)).pwrite(MIB, b"x")
    session, _ = await run(taking("two", "bad"))
    assert session.jobs[0].error is not None
    async with await Session.start(load({"nodes": nodes})) as session:
        assert [each.name for each in Checkpoints(session.graph).list()] == ["one"]
        await (await session.graph.backend("a", writable=True)).pwrite(2 * MIB, b"x")
    session, _ = await run(taking("three", "t"))
    assert session.jobs[0].error is None
    assert session.jobs[0].progress.total == 2 * GRANULE


@run_async
async def test_start_that_fails_later_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second checkpoint can not be had: views and exports of the first have ended, and the graph can be opened."""
    (tmp_path / "a").write_bytes(bytes(SIZE))
    nodes = [image("a", tmp_path / "a", "raw")]
    description = {
        "nodes": nodes,
        "nbd-server": {"addr": {"type": "unix", "path": str(tmp_path / "s")}},
        "bitmaps": [{"node": "a", "name": "b0"}],
        "exports": [{"type": "nbd", "id": "guest", "node-name": "a", "bitmaps": ["b0"]}],
        "checkpoints": [
            {"name": "one", "disks": ["a"], "view": {"a": {"driver": "memory", "size": SIZE}}},
            {"name": "two", "disks": ["a"], "since": "nobody"},
        ],
    }
    bitmaps: list[DirtyBitmap] = []
    exported: list[AddExport] = []

    async def opened(*args: Any, **more: Any) -> AsyncGraph:
        graph = await open_description(*args, **more)
        bitmaps.append(graph.bitmap("a", "b0"))
        return graph

    class Noted(AddExport):
        def commit(self) -> None:
            super().commit()
            exported.append(self)
            assert bitmaps[-1].holders == ["export 'guest'"]

    monkeypatch.setattr("blockgraph.session.open_description", opened)
    monkeypatch.setattr("blockgraph.session.AddExport", Noted)
    for _ in range(2):
        with pytest.raises(BlockGraphError, match="there is no checkpoint 'nobody'"):
            await Session.start(load(description))
        assert not (tmp_path / "s").exists()
        assert bitmaps[-1].holders == []
    assert len(exported) == 2


def test_run_tells_of_checkpoints_and_can_be_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], require_tool: Callable[[str], str]
) -> None:
    require_tool("qemu-img")
    nodes = disks(tmp_path, "a")
    path = tmp_path / "graph.json"
    for name, status in (("fixed", 0), ("fixed", 1), ("day-{time}", 0)):
        path.write_text(json.dumps({"nodes": nodes, "checkpoints": [{"name": name, "disks": ["a"]}]}))
        assert main(["check", "--open", str(path)]) == 0, capsys.readouterr().err
        capsys.readouterr()
        assert main(["run", "--exit-when-done", str(path)]) == status
        told = capsys.readouterr()
        if status:
            assert "there already is a checkpoint 'fixed'; delete it first" in told.err
    assert "checkpoint 'day-2" in told.out
    assert "taken, the first since 'fixed'" in told.out
    names = [name for name, _, _ in bitmap_info(tmp_path / "a")]
    assert names[0] == "checkpoint:1:fixed"
    assert names[1].startswith("checkpoint:2:day-2")


def wrong(**checkpoint: Any) -> list[str]:
    nodes: list[dict[str, Any]] = [
        {"node-name": name, "driver": "memory", "size": SIZE} for name in ("a", "b", "kept", "small")
    ]
    nodes[3]["size"] = MIB
    nodes.append(image("q", Path("q.qcow2")))
    given = {"name": "c", "disks": ["a"], **checkpoint}
    problems = check_description({"nodes": nodes, "checkpoints": [given]})
    return [f"{problem.path}: {problem.message}" for problem in problems if problem.severity == "error"]


@pytest.mark.parametrize(
    "members, text",
    [
        ({"disks": ["x"]}, "checkpoints[0].disks[0]: checkpoint 'c' refers to node 'x', which does not exist"),
        ({"disks": []}, "checkpoints[0].disks: has no disks"),
        ({"disks": ["a", "a"]}, "checkpoints[0].disks[1]: disk 'a' is named twice"),
        ({"name": ""}, "checkpoints[0].name: bitmap name of 0 bytes"),
        ({"name": "x" * 300}, "checkpoints[0].name: is too long"),
        ({"name": "{date}"}, "checkpoints[0].name: '{date}' is no placeholder"),
        ({"backup": {"b": "kept"}}, "checkpoints[0].backup.b: disk 'b' is not among 'disks'"),
        ({"backup": {"a": "nobody"}}, "refers to node 'nobody', which does not exist"),
        ({"backup": {"a": "small"}}, "1048576"),
        ({"backup": {"a": "kept"}, "view": {"a": "b"}}, "view: the disks are backed up already"),
        ({"view": {"a": "kept"}}, "checkpoints[0].view: a view is served, and the section 'nbd-server' is missing"),
        ({"grouped": True}, "checkpoints[0].grouped: is of use with 'backup' only"),
        ({"granularity": 100}, "checkpoints[0].granularity: expected"),
        ({"granularity": "96k"}, "checkpoints[0].granularity: granularity 98304 is not a power of two"),
        ({"granularity": "many"}, "checkpoints[0].granularity: "),
        ({"persistent": True}, "driver 'memory' of disk 'a' has no place for persistent bitmaps"),
        ({"disks": ["q"], "epochs": True}, "driver 'qcow2' of disk 'q' keeps bitmaps in the image"),
        ({"disk": ["a"]}, "unknown member 'disk' of checkpoint"),
        ({"backup": {"a": {"driver": "qcow3"}}}, "qcow3"),
    ],
)
def test_what_is_wrong_is_told_offline(members: dict[str, Any], text: str) -> None:
    found = wrong(**members)
    assert any(text in each for each in found), found


def test_names_and_jobs_that_clash_are_told() -> None:
    nodes = [{"node-name": name, "driver": "memory", "size": SIZE} for name in ("a", "s", "t")]
    description = {
        "nodes": nodes,
        "jobs": [{"type": "backup", "device": "a", "target": "s", "sync": "full"}],
        "checkpoints": [
            {"name": "c", "disks": ["a"], "backup": {"a": "t"}},
            {"name": "c", "disks": ["a"]},
            "nothing",
        ],
    }
    found = [f"{problem.path}: {problem.message}" for problem in check_description(description)]
    assert "checkpoints[0].backup.a: job id 'a' is taken by jobs[0]" in found
    assert "checkpoints[1].name: checkpoint name 'c' is taken by checkpoints[0]" in found
    assert "checkpoints[2]: expected a table, found 'nothing'" in found


def test_target_is_used_and_read_only_target_is_refused() -> None:
    nodes: list[dict[str, Any]] = [{"node-name": name, "driver": "memory", "size": SIZE} for name in ("a", "t")]
    description = {"nodes": nodes, "checkpoints": [{"name": "c", "disks": ["a"], "backup": {"a": "t"}}]}
    assert check_description(description) == []
    nodes[1]["read-only"] = True
    assert any("node 't' is read-only" in problem.message for problem in check_description(description))


def test_schema_knows_checkpoints() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(graph_schema())
    good = {
        "name": "day-{time}",
        "disks": ["a", "b"],
        "since": "c",
        "backup": {"a": "t", "b": {"driver": "memory", "size": SIZE}},
        "granularity": "64k",
        "sidecar": True,
    }
    assert [error.message for error in validator.iter_errors({"checkpoints": [good]})] == []
    for members in (
        {"disks": []},
        {"backup": {"a": 1}},
        {"view": {"a": {"driver": "x"}}},
        {"granularity": 100},
        {"x": 1},
    ):
        assert not validator.is_valid({"checkpoints": [good | members]}), members
