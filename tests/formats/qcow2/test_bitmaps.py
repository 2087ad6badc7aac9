# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Persistent bitmaps: what is saved is loaded, in every state and size; what can not be kept is refused."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.loop import driver_of, in_loop
from helpers.qcow2 import check, create, disk, get_field, qemu_img, set_field
from helpers.qcow2_bitmaps import (
    ENTRY_FIELDS,
    EXTENSION_FIELDS,
    all_dirty,
    bitmap_info,
    dirty,
    entries_at,
    extension_at,
    get,
    graph_over,
    put,
)

import blockgraph
from blockgraph.api import AsyncGraph
from blockgraph.backend import Backend
from blockgraph.bitmaps import DirtyBitmap
from blockgraph.driver import Filter
from blockgraph.errors import CorruptImage, GraphError, NoSpace, OutOfRange, ReadOnly
from blockgraph.flags import Flag
from blockgraph.formats.qcow2.bitmap_directory import MAX_BITMAPS, parse_directory
from blockgraph.options import NodeOptions, NodeRef
from blockgraph.registry import register

pytestmark = pytest.mark.usefixtures("qemu")
MIB = 1 << 20
IN_USE, AUTO = 1, 2


def patch(path: Path, change: Callable[[bytearray], None]) -> None:
    """Change the bytes of an image."""
    image = bytearray(path.read_bytes())
    change(image)
    path.write_bytes(image)


def flags_of(path: Path) -> list[int]:
    """Of each bitmap, as they are on disk now."""
    image = path.read_bytes()
    return [get(image, at, ENTRY_FIELDS["flags"]) for at in entries_at(image)]


async def make(path: Path, size: int = 8 * MIB, **bitmaps: dict[str, Any]) -> None:
    """An image with bitmaps in which granules 1 to 3 are marked."""
    await create(path, size)
    async with graph_over(path) as (graph, root):
        for name, options in bitmaps.items():
            await graph.add_bitmap("disk", name, persistent=True, **options)
        await root.pwrite(65536, b"x" * 3 * 65536)


@pytest.mark.parametrize("granularity", [512, 4096, 65536, MIB, 1 << 31])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 * MIB])
@in_loop
async def test_bits_of_any_pattern_come_back(tmpfs: Path, cluster_size: int, granularity: int) -> None:
    image, rng = tmpfs / "d.qcow2", random.Random(f"{cluster_size} {granularity}")
    size = 37 * MIB + 1536
    await create(image, size, cluster_size=cluster_size)
    async with graph_over(image) as (graph, _):
        for name in ("some", "all", "none", "half", "edges"):
            bits = (await graph.add_bitmap("disk", name, granularity=granularity, persistent=True)).recorder
            if name == "some":
                for _ in range(40):
                    start = rng.randrange(size)
                    bits.set(start, min(rng.choice([1, 5000, 700_000]), size - start))
            elif name == "all":
                bits.set(0, size)
            elif name == "half":
                bits.set(size // 2, size - size // 2)
            elif name == "edges":
                bits.set(0, 1)
                bits.set(size - 1, 1)
        before = all_dirty(graph.node("disk"))
    check(image)
    for _ in range(2):
        async with graph_over(image) as (graph, root):
            assert all_dirty(graph.node("disk")) == before
            await root.pwrite(size - 512, bytes(512))
            before = all_dirty(graph.node("disk"))
        check(image)
    assert [info[:2] for info in bitmap_info(image)] == [(name, granularity) for name in before]


@in_loop
async def test_states_come_back_and_only_recording_bitmaps_record(tmpfs: Path) -> None:
    image = tmpfs / "d.qcow2"
    await make(image, on={}, off={"enabled": False})
    async with graph_over(image) as (graph, root):
        node = graph.node("disk")
        assert {name: (b.enabled, b.persistent, b.inconsistent) for name, b in node.bitmaps.items()} == {
            "on": (True, True, False),
            "off": (False, True, False),
        }
        await graph.enable_bitmap("disk", "off")
        await graph.enable_bitmap("disk", "on", enabled=False)
        await root.pwrite(6 * MIB, b"x")
    assert bitmap_info(image) == [("on", 65536, frozenset()), ("off", 65536, frozenset({"auto"}))]
    async with graph_over(image) as (graph, _):
        expected = {"on": [(65536, 3 * 65536)], "off": [(6 * MIB, 65536)]}
        assert all_dirty(graph.node("disk")) == expected


@in_loop
async def test_image_is_untouched_until_it_is_written(tmpfs: Path) -> None:
    image = tmpfs / "d.qcow2"
    await make(image, b0={})
    before = image.read_bytes()
    async with graph_over(image) as (_, root):
        await root.pread(0, MIB)
    async with graph_over(image, **{"read-only": True}) as (graph, root):
        assert dirty(graph.node("disk"), "b0") == [(65536, 3 * 65536)]
        for change in (
            graph.clear_bitmap("disk", "b0"),
            graph.remove_bitmap("disk", "b0"),
            graph.add_bitmap("disk", "b1", persistent=True),
        ):
            with pytest.raises(ReadOnly, match="persistent bitmaps can not change"):
                await change
        await graph.add_bitmap("disk", "b1")
    assert image.read_bytes() == before


@pytest.mark.parametrize("change", ["write", "zeroes", "discard", "clear", "disable", "remove", "add", "truncate"])
@in_loop
async def test_bitmaps_are_in_use_before_the_first_change_and_no_longer_at_the_end(tmpfs: Path, change: str) -> None:
    image = tmpfs / "d.qcow2"
    await make(image, b0={}, b1={"enabled": False})
    async with graph_over(image) as (graph, root):
        assert flags_of(image) == [AUTO, 0]
        match change:
            case "write":
                await root.pwrite(0, b"x")
            case "zeroes":
                await root.write_zeroes(0, MIB)
            case "discard":
                await root.discard(0, MIB)
            case "clear":
                await graph.clear_bitmap("disk", "b0")
            case "disable":
                await graph.enable_bitmap("disk", "b0", enabled=False)
            case "remove":
                await graph.remove_bitmap("disk", "b0")
            case "add":
                await graph.add_bitmap("disk", "b2", persistent=True)
            case "truncate":
                await root.truncate(9 * MIB)
        assert flags_of(image) == [AUTO | IN_USE, IN_USE]
        assert get_field(image, "autoclear_features") == 1
    assert not any(flags & IN_USE for flags in flags_of(image))
    check(image)


@in_loop
async def test_bitmap_that_is_in_use_is_inconsistent_and_can_be_removed(
    tmpfs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = tmpfs / "d.qcow2"
    await make(image, lost={}, other={})
    patch(image, lambda data: put(data, entries_at(data)[0], ENTRY_FIELDS["flags"], AUTO | IN_USE))
    async with graph_over(image) as (graph, root):
        lost = graph.bitmap("disk", "lost")
        assert (lost.inconsistent, lost.recording, lost.count()) == (True, False, 0)
        await root.pwrite(0, b"x")
        with pytest.raises(GraphError, match=r"inconsistent.*full backup"):
            await graph.clear_bitmap("disk", "lost")
    assert "bitmap 'lost' was not saved by its last user" in caplog.text
    assert bitmap_info(image) == [("lost", 65536, frozenset({"in-use", "auto"})), ("other", 65536, frozenset({"auto"}))]
    check(image)
    async with graph_over(image) as (graph, _):
        assert dirty(graph.node("disk"), "other") == [(0, 4 * 65536)]
        await graph.remove_bitmap("disk", "lost")
    assert [name for name, _, _ in bitmap_info(image)] == ["other"]
    check(image)


@in_loop
async def test_last_bitmap_that_goes_takes_extension_and_bit_with_it(tmpfs: Path) -> None:
    image = tmpfs / "d.qcow2"
    await create(image, 8 * MIB)
    header = image.read_bytes()[:512]
    async with graph_over(image) as (graph, _):
        await graph.add_bitmap("disk", "b0", persistent=True)
    assert get_field(image, "autoclear_features") == 1
    size = image.stat().st_size
    async with graph_over(image) as (graph, _):
        await graph.remove_bitmap("disk", "b0")
    assert image.read_bytes()[:120] == header[:120]
    check(image)
    for _ in range(20):  # room is used again
        async with graph_over(image) as (graph, _):
            bitmap = await graph.add_bitmap("disk", "b0", persistent=True)
            bitmap.record(0, 1)
        async with graph_over(image) as (graph, _):
            await graph.remove_bitmap("disk", "b0")
    check(image)
    assert image.stat().st_size <= size + 4 * 65536


@pytest.mark.parametrize("kept", [True, False], ids=["with-another", "alone"])
@in_loop
async def test_stale_bitmaps_are_dropped_for_good(tmpfs: Path, caplog: pytest.LogCaptureFixture, kept: bool) -> None:
    image = tmpfs / "d.qcow2"
    await make(image, b0={})
    set_field(image, "autoclear_features", 0)
    async with graph_over(image) as (graph, root):
        assert graph.node("disk").bitmaps == {}
        await root.pwrite(0, b"x")
        assert get_field(image, "autoclear_features") == 0
        if kept:
            await graph.add_bitmap("disk", "b1", persistent=True)
    assert "stale" in caplog.text
    assert [name for name, _, _ in bitmap_info(image)] == (["b1"] if kept else [])
    if not kept:
        with pytest.raises(AssertionError, match="no bitmaps extension"):
            extension_at(image.read_bytes())
    check(image, leaks=True)


@in_loop
async def test_reopening_saves_and_begins_again(tmpfs: Path) -> None:
    image = tmpfs / "d.qcow2"
    await create(image, 8 * MIB)
    options = {"file": "file"}
    nodes = [
        {"node-name": "file", "driver": "file", "filename": str(image)},
        {"node-name": "disk", "driver": "qcow2", "file": "file"},
    ]
    async with await blockgraph.aopen({"nodes": nodes}) as graph:
        root = await graph.backend("disk", writable=True)
        root.use_map()
        await graph.add_bitmap("disk", "b0", persistent=True)
        await root.pwrite(0, b"x")
        await graph.close_backend(root)
        for step in range(1, 4):
            await graph.reopen("disk", {**options, "read-only": True})
            assert flags_of(image) == [AUTO]
            check(image)
            await graph.reopen("disk", {**options, "read-only": False})
            assert flags_of(image) == [AUTO]
            root = await graph.backend("disk", writable=True)
            root.use_map()
            await root.pwrite(step * MIB, b"x")
            assert flags_of(image) == [AUTO | IN_USE]
            await root.pwrite(step * MIB + 65536, b"x")
            await graph.close_backend(root)
        expected = [(0, 65536), *((step * MIB, 2 * 65536) for step in range(1, 4))]
        assert dirty(graph.node("disk"), "b0") == expected
    async with graph_over(image) as (graph, _):
        assert dirty(graph.node("disk"), "b0") == expected
    check(image)


@pytest.mark.parametrize("tamper", ["flags", "gone"])
@in_loop
async def test_directory_that_somebody_changed_meanwhile_is_noticed(tmpfs: Path, tamper: str) -> None:
    image = tmpfs / "d.qcow2"
    await make(image, b0={})
    async with disk(image, file={"driver": "file", "filename": str(image), "locking": "off"}) as backend:

        def change(data: bytearray) -> None:
            if tamper == "flags":
                put(data, entries_at(data)[0], ENTRY_FIELDS["flags"], 0)
            else:
                set_field(data, "autoclear_features", 0)

        patch(image, change)
        before = image.read_bytes()
        for _ in range(2):
            with pytest.raises(CorruptImage, match="somebody else has written it"):
                await backend.pwrite(0, b"x")
        assert image.read_bytes() == before
        patch(image, lambda data: set_field(data, "autoclear_features", 1))


@in_loop
async def test_saving_on_demand_is_right_until_the_next_write(tmpfs: Path) -> None:
    image = tmpfs / "d.qcow2"
    await make(image, b0={})
    async with graph_over(image) as (graph, root):
        root.use_map()
        node = graph.node("disk")
        for step in range(3):
            await root.pwrite(4 * MIB + step * 65536, b"x")
            assert flags_of(image) == [AUTO | IN_USE]
            async with graph.drained(["disk"]):
                assert node.bitmap_store is not None
                await node.bitmap_store.save()
            assert flags_of(image) == [AUTO]
            (tmpfs / "copy.qcow2").write_bytes(image.read_bytes())
            check(tmpfs / "copy.qcow2")
        assert root.map is not None
        assert not root.map.extents.pwrite(4 * MIB, b"y")


# Sizes.


@pytest.mark.parametrize("sizes", [[16 * MIB], [3 * MIB], [MIB + 512, 40 * MIB], [5 * MIB, 2 * MIB, 9 * MIB]])
@in_loop
async def test_bitmap_follows_the_disk_to_another_size(tmpfs: Path, sizes: list[int]) -> None:
    image = tmpfs / "d.qcow2"
    await create(image, 8 * MIB, cluster_size=512)
    async with graph_over(image) as (graph, root):
        await graph.add_bitmap("disk", "b0", granularity=512, persistent=True)
        await root.pwrite(0, b"x" * 1000)
        await root.pwrite(MIB - 512, b"x" * 7 * MIB)
    marked = [(0, 1024), (MIB - 512, 7 * MIB)]
    async with graph_over(image) as (graph, root):
        for size in sizes:
            before = root.size()
            await root.truncate(size)
            marked = [(start, min(length, size - start)) for start, length in marked if start < size]
            if size > before:  # what reads as zeroes now may have been cut off, and not empty
                start, length = marked[-1] if marked[-1][0] + marked[-1][1] == before else (before, 0)
                marked = [each for each in marked if each[0] != start] + [(start, length + size - before)]
            assert dirty(graph.node("disk"), "b0") == marked
    check(image)
    async with graph_over(image) as (graph, _):
        assert dirty(graph.node("disk"), "b0") == marked


@in_loop
async def test_size_that_a_bitmap_can_not_follow_is_refused(tmpfs: Path) -> None:
    image = tmpfs / "d.qcow2"
    await create(image, 8 * MIB)
    async with graph_over(image) as (graph, root):
        await graph.add_bitmap("disk", "fine", granularity=512, persistent=True)
        for size, why in ((0, "empty disk"), (4 << 40, "larger granularity")):
            with pytest.raises(OutOfRange, match=f"'fine' can not follow.*{why}.*remove the bitmap"):
                await root.truncate(size)
        await root.truncate(1 << 40)
    check(image)


@in_loop
async def test_bitmap_of_64_tib_takes_no_more_than_it_marks(tmpfs: Path) -> None:
    image, size = tmpfs / "d.qcow2", 64 << 40
    await create(image, size)
    rng = random.Random(5)
    async with graph_over(image) as (graph, _):
        bits = (await graph.add_bitmap("disk", "b0", persistent=True)).recorder
        for _ in range(100):
            bits.set(rng.randrange(size), 1)
        bits.set(size // 2, size // 4)
        before = dirty(graph.node("disk"), "b0")
    assert image.stat().st_blocks * 512 < 16 * MIB
    check(image)
    async with graph_over(image) as (graph, _):
        assert dirty(graph.node("disk"), "b0") == before


@pytest.mark.timeout(600)
@in_loop
async def test_as_many_bitmaps_as_there_may_be(tmpfs: Path) -> None:
    """QEMU opens such an image too, but needs many minutes for it: it compares each name with all others."""
    image = tmpfs / "d.qcow2"
    await create(image, MIB, cluster_size=512)
    async with graph_over(image) as (graph, _):
        node = graph.node("disk")
        await graph.add_bitmap("disk", "0", persistent=True)
        for number in range(1, MAX_BITMAPS):
            node.bitmaps[str(number)] = DirtyBitmap(str(number), MIB, node="disk", persistent=True)
        node.bitmaps["777"].record(65536, 1)
        with pytest.raises(GraphError, match="at most 65535"):
            await graph.add_bitmap("disk", "more", persistent=True)
    async with graph_over(image) as (graph, _):
        node = graph.node("disk")
        assert len(node.bitmaps) == MAX_BITMAPS
        assert [name for name, bitmap in node.bitmaps.items() if bitmap.count()] == ["777"]
        for number in range(1000, MAX_BITMAPS):
            del node.bitmaps[str(number)]
        await graph.remove_bitmap("disk", "5")
    assert [name for name, _, _ in bitmap_info(image)] == [str(number) for number in range(1000) if number != 5]
    check(image)


# Refused.


@in_loop
async def test_version_2_has_no_place_for_bitmaps(tmpfs: Path) -> None:
    image = tmpfs / "d.qcow2"
    await create(image, MIB, compat="0.10")
    async with graph_over(image) as (graph, root):
        with pytest.raises(GraphError, match=r"version 2 \(compat 0.10\) have no place.*amend -o compat=1.1"):
            await graph.add_bitmap("disk", "b0", persistent=True)
        await graph.add_bitmap("disk", "b0")
        await root.pwrite(0, b"x")
    check(image)


@pytest.mark.parametrize(
    "size, granularity, message",
    [(8 << 40, 512, "takes more than 536870912 bytes: use a larger granularity"), (0, 65536, "empty disk")],
    ids=["fine", "empty"],
)
@in_loop
async def test_bitmap_too_large_or_of_nothing_is_refused(
    tmpfs: Path, size: int, granularity: int, message: str
) -> None:
    image = tmpfs / "d.qcow2"
    await create(image, size)
    async with graph_over(image) as (graph, _):
        with pytest.raises(GraphError, match=f"'b0' can not be persistent: .*{message}"):
            await graph.add_bitmap("disk", "b0", granularity=granularity, persistent=True)


@in_loop
async def test_header_without_room_refuses_the_first_bitmap(tmpfs: Path) -> None:
    image = tmpfs / "d.qcow2"
    await create(image, MIB, cluster_size=512, backing_file="b" * 360, backing_fmt="raw")
    async with graph_over(image, backing=None) as (graph, _):
        with pytest.raises(GraphError, match="first cluster has no room"):
            await graph.add_bitmap("disk", "b0", persistent=True)


@in_loop
async def test_backing_file_name_makes_room_and_survives(tmpfs: Path) -> None:
    image, base = tmpfs / "d.qcow2", tmpfs / ("b" * 200)
    base.write_bytes(b"B" * MIB)
    await create(image, MIB, cluster_size=1024, backing_file=base.name, backing_fmt="raw")
    async with graph_over(image) as (graph, root):
        await graph.add_bitmap("disk", "b0", persistent=True)
        await root.pwrite(0, b"x")
    check(image)
    assert [name for name, _, _ in bitmap_info(image)] == ["b0"]
    assert f"backing file: {base.name}" in qemu_img("info", image)
    async with graph_over(image) as (graph, root):
        assert await root.pread(0, 2) == b"xB"
        await graph.remove_bitmap("disk", "b0")
    assert f"backing file: {base.name}" in qemu_img("info", image)


class FullOptions(NodeOptions, kw_only=True, frozen=True):
    file: NodeRef


class Full(Filter):
    """Becomes full.

    Attributes:
        left: writes and flushes that still work; None: all.
    """

    name = "full-here"
    Options = FullOptions
    left: int | None = None

    def _count(self) -> None:
        if self.left is not None:
            if not self.left:
                raise NoSpace("no space left", node=self.node.name)
            self.left -= 1

    async def pwrite(self, offset: int, buf: memoryview, flags: Flag = Flag.NONE) -> None:
        self._count()
        await super().pwrite(offset, buf, flags)

    async def flush(self) -> None:
        self._count()
        await super().flush()


register(Full)


@asynccontextmanager
async def over_full(image: Path) -> AsyncIterator[tuple[AsyncGraph, Backend, Full]]:
    """A disk over storage that can become full."""
    file = {"driver": "full-here", "node-name": "full", "file": {"driver": "file", "filename": str(image)}}
    async with await blockgraph.aopen({"nodes": [{"driver": "qcow2", "node-name": "disk", "file": file}]}) as graph:
        root = await graph.backend("disk", writable=True)
        yield graph, root, driver_of(graph, "full", Full)


@in_loop
async def test_disk_full_while_saving_leaves_data_and_bitmaps_in_use(
    tmpfs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = tmpfs / "d.qcow2"
    await make(image, b0={})

    async def use() -> None:
        async with over_full(image) as (_, root, full):
            await root.pwrite(0, b"y" * 100)
            await root.flush()
            full.left = 0

    with pytest.raises(NoSpace, match=r"could not be saved, and are out of date in the image.*full backup next"):
        await use()
    assert flags_of(image) == [AUTO | IN_USE]
    assert "can not be used any more: 'b0'" in caplog.text
    check(image, leaks=True)
    async with graph_over(image) as (graph, root):
        assert await root.pread(0, 101) == b"y" * 100 + b"\0"
        assert graph.bitmap("disk", "b0").inconsistent
        await graph.remove_bitmap("disk", "b0")


@pytest.mark.parametrize("change", ["first", "another", "last"])
@in_loop
async def test_save_that_fails_anywhere_can_be_done_again(tmpfs: Path, change: str) -> None:
    """The image is consistent after each failure, and no bitmap in it looks right while the disk is being written."""
    image, copy = tmpfs / "d.qcow2", tmpfs / "copy.qcow2"
    for left in itertools.count():
        image.unlink(missing_ok=True)
        if change == "first":
            await create(image, 8 * MIB)
        else:
            await make(image, b0={})
        async with over_full(image) as (graph, root, full):
            node = graph.node("disk")
            assert node.bitmap_store is not None
            if change == "last":
                await graph.remove_bitmap("disk", "b0")
            elif change == "first":
                await graph.add_bitmap("disk", "b0", persistent=True)
            await root.pwrite(0, b"y")
            await root.flush()
            failed = False
            async with graph.drained(["disk"]):
                full.left = left
                try:
                    await node.bitmap_store.save()
                except NoSpace:
                    failed = True
                full.left = None
            copy.write_bytes(image.read_bytes())
            check(copy, leaks=True)
            await root.pwrite(5 * MIB, b"y")
            await root.flush()
            copy.write_bytes(image.read_bytes())
            check(copy, leaks=True)
            assert all("in-use" in flags for _, _, flags in bitmap_info(copy))
            await root.pwrite(6 * MIB, b"y")
            expected = all_dirty(node)
        async with graph_over(image) as (graph, _):
            assert all_dirty(graph.node("disk")) == expected
            assert not any(bitmap.inconsistent for bitmap in graph.node("disk").bitmaps.values())
        check(image, leaks=True)
        if not failed:
            assert left > 4
            break


# What others may have put there.


def make_foreign(image: bytearray, kind: str) -> None:
    """Make the first bitmap one that has to be left alone."""
    at = entries_at(image)[0]
    match kind:
        case "type":
            put(image, at, ENTRY_FIELDS["type"], 7)
        case "flags":
            put(image, at, ENTRY_FIELDS["flags"], AUTO | 1 << 9)
        case "granularity":
            put(image, at, ENTRY_FIELDS["granularity_bits"], 40)
        case "extra":
            put(image, at, ENTRY_FIELDS["extra_data_size"], 8)
            put(image, at, ENTRY_FIELDS["name_size"], 8)


@pytest.mark.parametrize("kind", ["type", "flags", "granularity", "extra"])
@pytest.mark.parametrize("auto", [True, False], ids=["auto", "off"])
@in_loop
async def test_bitmap_of_another_program_is_kept_and_not_used(
    tmpfs: Path, caplog: pytest.LogCaptureFixture, kind: str, auto: bool
) -> None:
    image = tmpfs / "d.qcow2"
    await make(image, **{"sixteen-letters-": {"enabled": auto}, "ours": {}})
    patch(image, lambda data: make_foreign(data, kind))
    if not auto and kind == "flags":
        patch(image, lambda data: put(data, entries_at(data)[0], ENTRY_FIELDS["flags"], 1 << 9))

    def entry() -> tuple[bytes, bytes]:
        """The entry of the foreign bitmap, and its table's cluster."""
        data = image.read_bytes()
        at = next(at for at in entries_at(data) if b"sixteen-letters-" in data[at : at + 40])
        table = get(data, at, ENTRY_FIELDS["bitmap_table_offset"])
        return data[at : at + 40], data[table : table + 65536]

    before = entry()
    async with graph_over(image) as (graph, root):
        assert list(graph.node("disk").bitmaps) == ["ours"]
        if kind != "extra":
            with pytest.raises(GraphError, match="only another program understands"):
                await graph.add_bitmap("disk", "sixteen-letters-", persistent=True)
        await root.pwrite(5 * MIB, b"x" * 65536)
        if not auto:  # else it is in use, and nobody relies on it
            with pytest.raises(OutOfRange, match="can not follow"):
                await root.truncate(9 * MIB)
    assert "it is kept, and not used" in caplog.text
    flags = before[0][15] | (IN_USE if auto else 0)
    assert entry() == (before[0][:15] + bytes([flags]) + before[0][16:], before[1])
    async with graph_over(image) as (graph, _):
        assert dirty(graph.node("disk"), "ours") == [(65536, 3 * 65536), (5 * MIB, 65536)]


@in_loop
async def test_compatible_extra_data_stay_with_their_bitmap(tmpfs: Path) -> None:
    image = tmpfs / "d.qcow2"
    await make(image, **{"extra-dataNAME": {}, "ours": {}})

    def change(data: bytearray) -> None:
        at = entries_at(data)[0]
        put(data, at, ENTRY_FIELDS["extra_data_size"], 10)
        put(data, at, ENTRY_FIELDS["name_size"], 4)
        put(data, at, ENTRY_FIELDS["flags"], AUTO | 4)

    patch(image, change)
    async with graph_over(image) as (graph, root):
        assert dirty(graph.node("disk"), "NAME") == [(65536, 3 * 65536)]
        await root.pwrite(0, b"x")
    data = image.read_bytes()
    count, _, size, offset = struct.unpack_from(">IIQQ", data, extension_at(data))
    entry = parse_directory(data[offset : offset + size], count)[0]
    assert (entry.name, entry.extra, entry.flags) == (b"NAME", b"extra-data", AUTO | 4)
    async with graph_over(image) as (graph, _):
        assert dirty(graph.node("disk"), "NAME") == [(0, 4 * 65536)]


@pytest.mark.parametrize("field", ["nb_bitmaps", "reserved", "bitmap_directory_size", "bitmap_directory_offset"])
@in_loop
async def test_damaged_directory_can_be_read_around_and_dropped(
    tmpfs: Path, caplog: pytest.LogCaptureFixture, field: str
) -> None:
    image = tmpfs / "d.qcow2"
    await make(image, b0={})
    patch(image, lambda data: put(data, extension_at(data), EXTENSION_FIELDS[field], 77))
    with pytest.raises(CorruptImage, match=r"persistent bitmaps: .*open it read-only, or with bitmaps = .drop."):
        async with disk(image):
            pass
    before = image.read_bytes()
    async with graph_over(image, **{"read-only": True}) as (graph, root):
        assert graph.node("disk").bitmaps == {}
        assert await root.pread(65536, 1) == b"x"
    assert "is read-only, and its persistent bitmaps are not there" in caplog.text
    assert image.read_bytes() == before
    async with graph_over(image, bitmaps="drop") as (graph, root):
        assert graph.node("disk").bitmaps == {}
        await root.pwrite(0, b"y")
        assert get_field(image, "autoclear_features") == 0
    check(image, leaks=True)
    assert bitmap_info(image) == []
    async with graph_over(image) as (_, root):
        assert await root.pread(0, 1) == b"y"


@pytest.mark.parametrize("damage", ["table-offset", "table-size", "entry", "shared", "metadata"])
@in_loop
async def test_bitmap_with_a_damaged_table_is_inconsistent_and_repaired(
    tmpfs: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    image = tmpfs / "d.qcow2"
    await make(image, bad={}, good={})

    def change(data: bytearray) -> None:
        at = entries_at(data)[0]
        table = get(data, at, ENTRY_FIELDS["bitmap_table_offset"])
        match damage:
            case "table-offset":
                put(data, at, ENTRY_FIELDS["bitmap_table_offset"], table + 512)
            case "table-size":
                put(data, at, ENTRY_FIELDS["bitmap_table_size"], 2)
            case "entry":
                put(data, table, (0, ">Q"), 1 << 60)
            case "shared":
                put(data, table, (0, ">Q"), table)
            case "metadata":
                put(data, table, (0, ">Q"), get_field(data, "l1_table_offset"))

    patch(image, change)
    async with graph_over(image) as (graph, root):
        assert graph.bitmap("disk", "bad").inconsistent
        assert not graph.bitmap("disk", "good").inconsistent
        await root.pwrite(0, b"x")
    assert "bitmap 'bad' is damaged" in caplog.text
    assert bitmap_info(image) == [("bad", 65536, frozenset({"in-use", "auto"})), ("good", 65536, frozenset({"auto"}))]
    check(image, leaks=True)
    qemu_img("bitmap", "--remove", image, "bad")
    check(image, leaks=True)
