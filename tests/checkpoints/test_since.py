# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What has changed since each checkpoint, against sets of written granules; deletes in any order; problems."""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.backup import memory
from helpers.loop import graph_of, in_loop
from hypothesis import given, settings
from hypothesis import strategies as st

from blockgraph.api import AsyncGraph
from blockgraph.backend import Backend
from blockgraph.bitmaps.actions import BitmapName, EnableBitmap
from blockgraph.checkpoints import Checkpoints
from blockgraph.create import create_file
from blockgraph.errors import GraphError, NodeInUse
from blockgraph.native import Bitmap

GRANULE = 64 << 10
GRANULES = 24
SIZE = GRANULES * GRANULE
DISKS = ("a", "b")


def granules(bits: Bitmap) -> set[int]:
    return {n for at, length in bits.dirty_extents() for n in range(at // GRANULE, -(-(at + length) // GRANULE))}


def names(checkpoints: Checkpoints) -> list[str]:
    return [each.name for each in checkpoints.list()]


async def write(guest: Backend, granule: int) -> None:
    """One byte, natively when the storage is mapped."""
    extents = guest.use_map().extents
    if not await asyncio.to_thread(extents.pwrite, granule * GRANULE, b"x"):
        await guest.pwrite(granule * GRANULE, b"x")


class Model:
    """Per disk: the writes in order, and where among them its checkpoints are."""

    def __init__(self) -> None:
        self.writes: dict[str, list[int]] = {disk: [] for disk in DISKS}
        self.checkpoints: dict[str, dict[str, int]] = {}

    def expected(self, name: str, disk: str) -> set[int]:
        return set(self.writes[disk][self.checkpoints[name][disk] :])


writes = st.tuples(st.just("write"), st.sampled_from(DISKS), st.integers(0, GRANULES - 1))
creates = st.tuples(st.just("create"), st.sampled_from([("a",), ("b",), DISKS, DISKS]), st.just(0))
deletes = st.tuples(st.just("delete"), st.just(""), st.integers(0, 9))
operations = st.lists(st.one_of(writes, writes, creates, creates, deletes), min_size=5, max_size=40)


@pytest.mark.parametrize("epochs", [False, True], ids=["bitmaps", "epochs"])
@given(steps=operations)
@settings(max_examples=60, deadline=None)
def test_since_any_checkpoint_after_deletes_in_any_order(epochs: bool, steps: list[tuple[str, Any, int]]) -> None:
    asyncio.run(_against_model(epochs, steps))


async def _against_model(epochs: bool, steps: list[tuple[str, Any, int]]) -> None:
    model = Model()
    async with graph_of(*(memory(disk, SIZE) for disk in DISKS)) as graph:
        checkpoints = Checkpoints(graph, epochs=epochs)
        guests = {disk: await graph.backend(disk, writable=True) for disk in DISKS}
        for number, (what, which, value) in enumerate(steps):
            if what == "write":
                await write(guests[which], value)
                model.writes[which].append(value)
            elif what == "create":
                before = list(model.checkpoints)
                made = await checkpoints.create(f"c{number}", which)
                had = model.checkpoints[before[-1]] if before else {}
                assert set(made.full) == set(which) - set(had)
                assert made.since == (before[-1] if before else None)
                model.checkpoints[f"c{number}"] = {disk: len(model.writes[disk]) for disk in which}
            elif model.checkpoints:
                name = list(model.checkpoints)[value % len(model.checkpoints)]
                await checkpoints.delete(name)
                del model.checkpoints[name]
            check(checkpoints, model)
        for name in list(model.checkpoints):
            await checkpoints.delete(name)
        assert graph.bitmaps() == []


def check(checkpoints: Checkpoints, model: Model) -> None:
    assert names(checkpoints) == list(model.checkpoints)
    for each in checkpoints.list():
        assert set(each.disks) == set(model.checkpoints[each.name])
        for disk in DISKS:
            if disk in each.disks:
                assert each.disks[disk].problem is None
                newest = checkpoints.line(disk).marks[-1].name == each.name
                recording = checkpoints.line(disk).marks[checkpoints.line(disk).index(each.name) or 0].bitmap.recording
                assert recording is (newest and not checkpoints.line(disk).epochs)
                assert granules(checkpoints.since(each.name, disk)) == model.expected(each.name, disk)
            else:
                with pytest.raises(GraphError, match=f"the disk was not in checkpoint '{each.name}'"):
                    checkpoints.since(each.name, disk)


@pytest.mark.parametrize("epochs", [False, True], ids=["bitmaps", "epochs"])
@pytest.mark.parametrize("seed", range(3))
def test_disks_under_native_writers(tmpfs: Path, seed: int, epochs: bool) -> None:
    """Writers never stop. What was begun after a checkpoint is in `since`; what had ended before is not."""

    @in_loop
    async def run() -> None:
        for disk in DISKS:
            (tmpfs / disk).write_bytes(bytes(SIZE))
        nodes = [{"driver": "file", "node-name": disk, "filename": str(tmpfs / disk)} for disk in DISKS]
        async with graph_of(*nodes) as graph:
            checkpoints = Checkpoints(graph, epochs=epochs)
            writers = {disk: Writer(await graph.backend(disk, writable=True), seed) for disk in DISKS}
            tasks = [asyncio.create_task(writer.run()) for writer in writers.values()]
            moments: dict[str, dict[str, tuple[int, int]]] = {}
            for name in ("one", "two", "three"):
                await progress(writers)
                ended = {disk: writer.ended for disk, writer in writers.items()}
                await checkpoints.create(name, DISKS)
                moments[name] = {disk: (ended[disk], len(writer.begun)) for disk, writer in writers.items()}
            await progress(writers)
            for writer in writers.values():
                writer.going = False
            await asyncio.gather(*tasks)
            assert any(writer.native for writer in writers.values())
            for name, where in moments.items():
                for disk, (ended_before, begun_before) in where.items():
                    found = granules(checkpoints.since(name, disk))
                    begun = writers[disk].begun
                    assert set(begun[begun_before:]) <= found <= set(begun[ended_before:])

    run()


async def progress(writers: dict[str, Writer]) -> None:
    await asyncio.gather(*(writer.more(4) for writer in writers.values()))


class Writer:
    """Writes single granules, one after the other."""

    def __init__(self, guest: Backend, seed: int) -> None:
        self._guest = guest
        self._rng = random.Random(seed)
        self.going = True
        self.begun: list[int] = []
        self.ended = 0
        self.native = 0
        self._step = asyncio.Event()

    async def more(self, count: int) -> None:
        """Until so many more writes have ended."""
        wanted = self.ended + count
        while self.ended < wanted:
            self._step.clear()
            await self._step.wait()

    async def run(self) -> None:
        extents = self._guest.use_map().extents
        while self.going:
            granule = self._rng.randrange(GRANULES)
            self.begun.append(granule)
            if await asyncio.to_thread(extents.pwrite, granule * GRANULE, b"x"):
                self.native += 1
            else:
                await self._guest.pwrite(granule * GRANULE, b"x")
            self.ended += 1
            self._step.set()
            await asyncio.sleep(0)


async def three(graph: AsyncGraph, **more: Any) -> Checkpoints:
    """Checkpoints one, two, three of disk "a"; granule 1, 2, 3 written after each."""
    checkpoints = Checkpoints(graph, **more)
    guest = await graph.backend("a", writable=True)
    for number, name in enumerate(("one", "two", "three"), 1):
        await checkpoints.create(name, ["a"])
        await write(guest, number)
    return checkpoints


@in_loop
async def test_inconsistent_bitmap_spoils_earlier_checkpoints_only() -> None:
    async with graph_of(memory("a", SIZE)) as graph:
        checkpoints = await three(graph)
        bitmap = graph.bitmap("a", "checkpoint:2:two")
        bitmap.inconsistent, bitmap.reason = True, "the test says so"
        problems = {each.name: each.disks["a"].problem for each in checkpoints.list()}
        assert problems["three"] is None
        assert all(
            "bitmap 'checkpoint:2:two' is inconsistent: the test says so" in str(problems[n]) for n in ("one", "two")
        )
        with pytest.raises(GraphError, match=r"since checkpoint 'one' is not known: .* the test says so"):
            checkpoints.since("one", "a")
        assert granules(checkpoints.since("three", "a")) == {3}
        four = await checkpoints.create("four", ["a"], since="two")
        assert "the test says so" in four.full["a"]
        await checkpoints.delete("two")  # takes "one" along: nothing else tells that it is of no use
        assert names(checkpoints) == ["three", "four"]
        await checkpoints.delete("four")
        assert granules(checkpoints.since("three", "a")) == {3}
        assert graph.bitmap("a", "checkpoint:3:three").recording


@in_loop
async def test_newest_inconsistent_then_next_checkpoint_begins_anew() -> None:
    async with graph_of(memory("a", SIZE)) as graph:
        checkpoints = await three(graph)
        graph.bitmap("a", "checkpoint:3:three").inconsistent = True
        four = await checkpoints.create("four", ["a"])
        assert "is inconsistent" in four.full["a"]
        assert granules(checkpoints.since("four", "a")) == set()
        await checkpoints.delete("two")
        assert names(checkpoints) == ["one", "three", "four"]
        await checkpoints.delete("four")
        assert names(checkpoints) == ["one", "three"]
        for name in ("one", "three"):
            assert "is inconsistent" in str(checkpoints.find(name).disks["a"].problem)


@in_loop
async def test_inconsistent_epochs_begin_anew() -> None:
    async with graph_of(memory("a", SIZE)) as graph:
        checkpoints = await three(graph, epochs=True)
        assert granules(checkpoints.since("one", "a")) == {1, 2, 3}
        graph.bitmap("a", "checkpoint:epochs@1").inconsistent = True
        for name in ("one", "two", "three"):
            assert "is inconsistent" in str(checkpoints.find(name).disks["a"].problem)
        four = await checkpoints.create("four", ["a"])
        assert "is inconsistent" in four.full["a"]
        assert names(checkpoints) == ["four"]
        assert granules(checkpoints.since("four", "a")) == set()


@in_loop
async def test_disabled_bitmap_is_noticed() -> None:
    async with graph_of(memory("a", SIZE)) as graph:
        checkpoints = await three(graph)
        graph.bitmap("a", "checkpoint:1:one").inconsistent = True  # that of the newest spoils more
        async with graph.transaction() as change:
            change.act(EnableBitmap(BitmapName("a", "checkpoint:3:three"), enabled=False))
        for name in ("one", "two", "three"):
            with pytest.raises(GraphError, match="'checkpoint:3:three' was disabled, and may have missed writes"):
                checkpoints.since(name, "a")
        with pytest.raises(GraphError, match="was disabled"):
            await checkpoints.create("four", ["a"])


@in_loop
async def test_what_is_refused() -> None:
    async with graph_of(memory("a", SIZE), memory("b", SIZE)) as graph:
        checkpoints = await three(graph)
        before = graph.bitmaps()
        for wrong, message in (
            ({"name": "two", "disks": ["a"]}, "there already is a checkpoint 'two'"),
            ({"name": "", "disks": ["a"]}, "needs a name"),
            ({"name": "x", "disks": []}, "needs a name, and disks"),
            ({"name": "x", "disks": ["a", "a"]}, "each once"),
            ({"name": "x", "disks": ["a", "nobody"]}, "nobody"),
            (
                {"name": "x", "disks": ["a"], "since": "zero"},
                r"no checkpoint 'zero' \(there are: 'one', 'two', 'three'\)",
            ),
            ({"name": "x", "disks": ["a"], "view": {"b": "a"}}, "'b': .*not among the disks"),
            ({"name": "x" * 1020, "disks": ["b", "a"]}, "1023 bytes|bitmap name of"),
        ):
            with pytest.raises(GraphError, match=message):
                await checkpoints.create(**wrong)
        with pytest.raises(GraphError, match="no checkpoint 'zero'"):
            await checkpoints.delete("zero")
        with pytest.raises(GraphError, match="kept without epochs"):
            await Checkpoints(graph, epochs=True).create("x", ["b", "a"])
        view = graph.bitmap("a", "checkpoint:2:two").take("somebody")
        with pytest.raises(NodeInUse, match="in use by somebody"):
            await checkpoints.delete("two")
        view.drop()
        assert graph.bitmaps() == before


@in_loop
async def test_order_is_that_of_the_numbers() -> None:
    """Whatever order a store gives them back in."""
    async with graph_of(memory("a", SIZE)) as graph:
        guest = await graph.backend("a", writable=True)
        await graph.add_bitmap("a", "checkpoint:10:b", enabled=True)
        await write(guest, 10)
        await graph.add_bitmap("a", "checkpoint:9:a", enabled=True)
        await write(guest, 9)
        await graph.enable_bitmap("a", "checkpoint:9:a", enabled=False)
        checkpoints = Checkpoints(graph)
        assert names(checkpoints) == ["a", "b"]
        assert granules(checkpoints.since("b", "a")) == {9, 10}
        assert (await checkpoints.create("c", ["a"])).number == 11


@in_loop
async def test_other_prefix_is_another_set() -> None:
    async with graph_of(memory("a", SIZE)) as graph:
        checkpoints = await three(graph)
        other = Checkpoints(graph, prefix="mine", granularity=4096)
        assert other.list() == []
        await other.create("one", ["a"])
        assert graph.bitmap("a", "mine:1:one").granularity == 4096
        await other.delete("one")
        assert names(checkpoints) == ["one", "two", "three"]


@pytest.mark.parametrize("how", ["qcow2", "sidecar", "epochs"])
def test_new_process_finds_checkpoints_again(tmp_path: Path, how: str) -> None:
    @in_loop
    async def run() -> None:
        image, image_format = tmp_path / "disk", "qcow2" if how == "qcow2" else "raw"
        await create_file(str(image), SIZE, image_format, replace=False)
        node = {"driver": image_format, "node-name": "a", "file": {"driver": "file", "filename": str(image)}}
        keeping = {"sidecar": how != "qcow2", "epochs": how == "epochs"}
        async with graph_of(node) as graph:
            await three(graph, **keeping)
            assert all(bitmap.persistent for bitmap in graph.bitmaps())
        async with graph_of(node) as graph:
            checkpoints = Checkpoints(graph, **keeping)
            assert names(checkpoints) == ["one", "two", "three"]
            for number, name in enumerate(("one", "two", "three"), 1):
                assert granules(checkpoints.since(name, "a")) == set(range(number, 4))
            guest = await graph.backend("a", writable=True)
            await write(guest, 10)
            await checkpoints.delete("three")
            await write(guest, 11)
            four = await checkpoints.create("four", ["a"])
            assert four.number == 3
            assert four.full == {}
            await write(guest, 12)
        async with graph_of({**node, "read-only": True}) as graph:
            checkpoints = Checkpoints(graph, **keeping)
            assert names(checkpoints) == ["one", "two", "four"]
            assert granules(checkpoints.since("one", "a")) == {1, 2, 3, 10, 11, 12}
            assert granules(checkpoints.since("two", "a")) == {2, 3, 10, 11, 12}
            assert granules(checkpoints.since("four", "a")) == {12}

    run()


@in_loop
async def test_killed_qcow2_tells_why_a_full_backup_is_needed(tmp_path: Path) -> None:
    """QEMU's format has no bitmaps that survive; the next checkpoint begins anew."""
    await create_file(str(tmp_path / "disk"), SIZE, "qcow2", replace=False)
    node = {"driver": "qcow2", "node-name": "a"}
    async with graph_of({**node, "file": {"driver": "file", "filename": str(tmp_path / "disk")}}) as graph:
        await three(graph)
    async with graph_of({**node, "file": {"driver": "file", "filename": str(tmp_path / "disk")}}) as graph:
        guest = await graph.backend("a", writable=True)
        await write(guest, 10)
        await guest.flush()
        shutil.copy(tmp_path / "disk", tmp_path / "killed")
    async with graph_of({**node, "file": {"driver": "file", "filename": str(tmp_path / "killed")}}) as graph:
        checkpoints = Checkpoints(graph)
        for each in checkpoints.list():
            assert "is inconsistent" in str(each.disks["a"].problem)
        four = await checkpoints.create("four", ["a"])
        assert four.number == 4
        assert "is inconsistent" in four.full["a"]
        await write(await graph.backend("a", writable=True), 7)
        for name in ("one", "two", "three"):
            with pytest.raises(GraphError, match="make a full backup"):
                checkpoints.since(name, "a")
        await checkpoints.delete("three")
        assert names(checkpoints) == ["four"]
    async with graph_of({**node, "file": {"driver": "file", "filename": str(tmp_path / "killed")}}) as graph:
        assert granules(Checkpoints(graph).since("four", "a")) == {7}
