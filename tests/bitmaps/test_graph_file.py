# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Bitmaps that a graph file describes, and what Python can ask about them."""

from __future__ import annotations

import hashlib
import json
import random
import threading
from pathlib import Path
from typing import Any, ClassVar

import jsonschema
import pytest
from helpers.loop import in_loop

import blockgraph
from blockgraph.bitmaps import BitmapInfo, DirtyBitmap
from blockgraph.bitmaps.actions import AddBitmap, BitmapName, ClearBitmap, MergeBitmaps
from blockgraph.errors import GraphError, OutOfRange
from blockgraph.graph.graph import Graph
from blockgraph.graph.load import check_description, load
from blockgraph.graph.schema import graph_schema
from blockgraph.native import Bitmap
from blockgraph.protocols.memory import Memory
from blockgraph.registry import register

GRANULE = 64 << 10
SIZE = 16 * GRANULE


class Keeping(Memory):
    """A disk in memory that keeps bitmaps as an image would.

    Attributes:
        kept: what it has when it is opened, by node name.
    """

    name: ClassVar[str] = "keeping"
    bitmap_place = "image"
    kept: ClassVar[dict[str, list[DirtyBitmap]]] = {}

    async def open(self) -> None:
        await super().open()
        self.node.bitmap_store = self

    def check(self, bitmap: DirtyBitmap) -> None:
        """There is always room."""

    async def load(self) -> list[DirtyBitmap]:
        return self.kept.pop(self.node.name, [])

    async def begin(self) -> None:
        """It is marked at once."""

    async def save(self) -> None:
        self.kept[self.node.name] = [each for each in self.node.bitmaps.values() if each.persistent]


register(Keeping)


def memory(name: str, driver: str = "memory") -> dict[str, Any]:
    return {"node-name": name, "driver": driver, "size": SIZE}


def kept(name: str, **how: Any) -> DirtyBitmap:
    bitmap = DirtyBitmap(name, SIZE, node="disk", persistent=True, **how)
    bitmap.record(0, 1)
    return bitmap


def described(*bitmaps: dict[str, Any], driver: str = "memory", **more: Any) -> dict[str, Any]:
    return {"nodes": [memory("disk", driver)], "bitmaps": [{"node": "disk", **bitmap} for bitmap in bitmaps], **more}


def test_described_bitmaps_are_there_and_record() -> None:
    what = described(
        {"name": "b0"}, {"name": "fine", "granularity": "4k"}, {"name": "off", "disabled": True, "granularity": 512}
    )
    with blockgraph.open(what) as graph:
        with graph.backend("disk", writable=True) as disk:
            disk.pwrite(GRANULE + 5000, b"x" * 4096)
        assert [(each.name, each.count, each.granularity, each.recording) for each in graph.bitmaps("disk")] == [
            ("b0", GRANULE, GRANULE, True),
            ("fine", 8192, 4096, True),
            ("off", 0, 512, False),
        ]
        assert graph.bitmaps()[0] == BitmapInfo("disk", "b0", GRANULE, GRANULE, SIZE, True, (), False, False, "")


def test_file_names_and_places_in_a_graph_file(tmp_path: Path) -> None:
    file = tmp_path / "g.toml"
    file.write_text(
        '[[nodes]]\nnode-name = "disk"\ndriver = "memory"\nsize = "64k"\n\n'
        '[[bitmaps]]\nnode = "disk"\nname = "b0"\ngranularity = 1000\n'
        '[[bitmaps]]\nnode = "dsk"\nname = "b0"\nsidecar = "b0.bitmaps"\n'
    )
    told = [str(problem) for problem in check_description(file)]
    assert any(line.startswith(f"{file}:9:1: bitmaps[0].granularity: granularity 1000 is not") for line in told)
    assert any("bitmaps[1].node: bitmap 'b0' refers to node 'dsk'" in line for line in told)


def test_epochs_of_a_described_bitmap_are_kept_in_its_sidecar(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    bitmaps = [{"node": "disk", "name": "daily", "sidecar": True, "epochs": True}]
    nodes = [{"node-name": "disk", "driver": "raw", "file": {"driver": "file", "filename": str(tmp_path / "disk")}}]
    with blockgraph.open({"nodes": nodes, "bitmaps": bitmaps}) as graph:
        disk = graph.backend("disk", writable=True)
        disk.pwrite(0, b"x")
        assert graph.advance_epoch("disk", "daily") == 2
        disk.pwrite(2 * GRANULE, b"x")
    with blockgraph.open({"nodes": nodes, "bitmaps": bitmaps}) as graph:
        since = graph.graph.bitmap("disk", "daily").since
        assert list(since(2).dirty_extents()) == [(2 * GRANULE, GRANULE)]
        assert since(1).count() == 2 * GRANULE
        graph.add_bitmap("disk", "plain", persistent=True)
    bitmaps.append({"node": "disk", "name": "plain", "sidecar": True, "epochs": True})
    with pytest.raises(GraphError, match="'plain' is there already, without epochs"):
        blockgraph.open({"nodes": nodes, "bitmaps": bitmaps})


def test_bitmap_that_the_image_keeps_is_used() -> None:
    Keeping.kept["disk"] = [kept("b0"), kept("other", granularity=4096)]
    what = described({"name": "b0", "persistent": True}, {"name": "new", "persistent": True}, driver="keeping")
    with blockgraph.open(what) as graph:
        assert [(each.name, each.count, each.persistent) for each in graph.bitmaps()] == [
            ("b0", GRANULE, True),
            ("other", 4096, True),
            ("new", 0, True),
        ]
    assert [each.name for each in Keeping.kept["disk"]] == ["b0", "other", "new"]
    with blockgraph.open(what) as graph:
        assert [each.name for each in graph.bitmaps()] == ["b0", "other", "new"]


def test_bitmap_that_the_image_keeps_with_another_granularity_is_refused() -> None:
    Keeping.kept["disk"] = [kept("b0")]
    what = described({"name": "b0", "granularity": 4096}, driver="keeping")
    with pytest.raises(GraphError, match=r"'b0' is there already, with granularity 65536 and not 4096; ask for"):
        blockgraph.open(what)


@in_loop
async def test_dry_run_tells_what_the_images_contradict() -> None:
    Keeping.kept["disk"] = [kept("b0")]
    exports = [{"type": "nbd", "id": "e", "node-name": "disk", "bitmaps": ["b0", "b1", "b2"]}]
    what = described(
        {"name": "b0", "granularity": 4096},
        {"name": "b1", "persistent": True},
        driver="keeping",
        exports=exports,
        **{"nbd-server": {"addr": {"type": "unix", "path": "x"}}},
    )
    what["nodes"][0]["read-only"] = True
    description = load(what)
    told = [str(problem) for problem in await Graph.dry_run(description)]
    assert [line.partition(";")[0] for line in told] == [
        "bitmaps[0].granularity: bitmap 'b0' is there already, with granularity 65536",
        "bitmaps[1].persistent: bitmap 'b1' can not be added: node 'disk' is read-only",
        "exports[0].bitmaps[2]: there is no bitmap 'b2' on node 'disk'",
    ]


def test_backup_top_over_bitmaps_of_the_same_file_keeps_what_they_mark() -> None:
    Keeping.kept["disk"] = [kept("b0")]
    what = described({"name": "b0"}, driver="keeping")
    what["nodes"] += [
        memory("kept"),
        {
            "node-name": "top",
            "driver": "backup-top",
            "file": "disk",
            "target": "kept",
            "bitmap": {"node": "disk", "name": "b0"},
        },
        {"node-name": "then", "driver": "snapshot-access", "file": "top"},
    ]
    with blockgraph.open(what) as graph, graph.backend("then") as then:
        assert then.pread(0, 512) == bytes(512)
        with pytest.raises(blockgraph.errors.IOFailure):  # type: ignore[attr-defined]
            then.pread(GRANULE, 512)


def test_schema_knows_bitmaps() -> None:
    schema = graph_schema()
    good = {
        "bitmaps": [{"node": "disk", "name": "b0", "granularity": "64k", "persistent": True, "crash-safe": False}],
        "exports": [
            {
                "type": "nbd",
                "id": "e",
                "node-name": "disk",
                "bitmaps": ["b0", {"node": "disk", "name": "b1"}],
                "allocation-depth": True,
            }
        ],
    }
    jsonschema.validate(good, schema)
    for wrong in ({"granularity": 256}, {"granularity": "x"}, {"disabled": 1}, {"size": 3}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"bitmaps": [{"node": "disk", "name": "b0", **wrong}]}, schema)
    members = schema["$defs"]["BitmapOptions"]["properties"]
    assert all(member["description"] for member in members.values()), json.dumps(members, indent=1)


# Questions.


def test_every_operation_from_another_thread() -> None:
    with blockgraph.open({"nodes": [memory("disk"), memory("other")]}) as graph:
        failures: list[BaseException] = []

        def work() -> None:
            try:
                graph.add_bitmap("disk", "b0")
                graph.add_bitmap("disk", "b1", granularity=4096, enabled=False)
                with graph.backend("disk", writable=True) as disk:
                    disk.pwrite(3 * GRANULE, b"x")
                    graph.enable_bitmap("disk", "b1")
                    disk.pwrite(5 * GRANULE, b"x")
                assert graph.dirty_extents("disk", "b0") == [(3 * GRANULE, GRANULE), (5 * GRANULE, GRANULE)]
                assert graph.dirty_extents("disk", "b0", 4 * GRANULE) == [(5 * GRANULE, GRANULE)]
                assert graph.dirty_extents("disk", "b0", 0, 3 * GRANULE + 7) == [(3 * GRANULE, 7)]
                assert graph.dirty_extents("disk", "b1") == [(5 * GRANULE, 4096)]
                graph.merge_bitmaps("disk", "b1", [("disk", "b0")])
                graph.enable_bitmap("disk", "b1", enabled=False)
                assert graph.dirty_extents("disk", "b1") == graph.dirty_extents("disk", "b0")
                graph.act(
                    AddBitmap(BitmapName("other", "sum")),
                    MergeBitmaps(BitmapName("other", "sum"), [BitmapName("disk", "b1")]),
                    ClearBitmap(BitmapName("disk", "b0")),
                )
                assert [(each.node, each.name, each.count) for each in graph.bitmaps()] == [
                    ("disk", "b0", 0),
                    ("disk", "b1", 2 * GRANULE),
                    ("other", "sum", 2 * GRANULE),
                ]
                graph.remove_bitmap("disk", "b1")
                assert [each.name for each in graph.bitmaps("disk")] == ["b0"]
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert failures == []


def test_questions_that_have_no_answer() -> None:
    with blockgraph.open(described({"name": "b0"})) as graph:
        for ask in (graph.dirty_extents, graph.bitmap_digest):
            with pytest.raises(GraphError, match="no bitmap 'b1'"):
                ask("disk", "b1")
        with pytest.raises(GraphError):
            graph.bitmaps("none")
        for offset, length in ((-1, None), (SIZE + 1, None), (0, SIZE + 1), (1, -1)):
            with pytest.raises(OutOfRange):
                graph.dirty_extents("disk", "b0", offset, length)


def test_inconsistent_bitmap_is_reported_with_its_reason_and_can_only_be_removed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    Keeping.kept["disk"] = [
        kept("b0", inconsistent=True, reason="the image was not closed"),
        kept("b1", inconsistent=True),
    ]
    with blockgraph.open(described({"name": "b0"}, driver="keeping")) as graph:
        assert "'b0' is inconsistent: the image was not closed; remove it, and make a full backup" in caplog.text
        told = graph.bitmaps()
        assert [each.reason for each in told] == ["the image was not closed", "it may have missed writes"]
        assert all(each.inconsistent and not each.recording for each in told)
        for use in (
            lambda: graph.dirty_extents("disk", "b0"),
            lambda: graph.bitmap_digest("disk", "b0"),
            lambda: graph.clear_bitmap("disk", "b0"),
            lambda: graph.enable_bitmap("disk", "b0"),
            lambda: graph.merge_bitmaps("disk", "b1", [("disk", "b0")]),
        ):
            with pytest.raises(GraphError, match=r"is inconsistent: .*; remove it, and make a full backup next"):
                use()
        graph.remove_bitmap("disk", "b0")
        graph.add_bitmap("disk", "b0", persistent=True)
        assert not graph.bitmaps()[-1].inconsistent


@pytest.mark.parametrize("granules", [1, 63, 64, 65, 9 << 20], ids=str)
def test_digest_is_that_of_the_words_of_the_bitmap(granules: int) -> None:
    rng = random.Random(granules)
    numbers = {rng.randrange(granules) for _ in range(100)}
    words = bytearray(-(-granules // 64) * 8)
    for number in numbers:
        words[number // 8] |= 1 << number % 8
    disk = {"node-name": "disk", "driver": "null-co", "size": granules * 512 - 100}
    with blockgraph.open({"nodes": [disk], "bitmaps": [{"node": "disk", "name": "b", "granularity": 512}]}) as graph:

        async def mark() -> None:
            bits: Bitmap = graph.graph.bitmap("disk", "b").recorder
            for number in numbers:
                bits.set(number * 512, 1)

        graph.call(mark())
        assert graph.bitmap_digest("disk", "b") == hashlib.sha256(words).hexdigest()
