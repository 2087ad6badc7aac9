# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Sidecars of files: found, attached, kept through sessions, and never believed about an image that is not theirs."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers.loop import in_loop
from helpers.sidecar import GRANULE, MIB, SIZE, acted, after, dirty, disk, new_disk, raw, session, sidecar, written

import blockgraph
from blockgraph.bitmaps import identity, write_ahead
from blockgraph.bitmaps.actions import AddBitmap, BitmapName, ClearBitmap, RemoveBitmap
from blockgraph.bitmaps.attach import AttachSidecar
from blockgraph.errors import BlockGraphError, CorruptImage, GraphError, IOFailure
from blockgraph.graph.action import Abort
from blockgraph.resolve import Pins


@in_loop
async def test_bitmaps_are_found_again_with_all_they_were(tmp_path: Path) -> None:
    path = new_disk(tmp_path)
    await written(path, 0, 5 * GRANULE)
    await written(path, 7 * GRANULE, name="fine", granularity=4096)
    async with disk(path) as graph:
        await graph.enable_bitmap("disk", "fine", enabled=False)
    for options in ({"read-only": True}, {}):
        async with disk(path, **options) as graph:
            assert list(graph.node("disk").bitmaps) == ["b0", "fine"]
            assert dirty(graph) == [0, 5, 7]
            assert dirty(graph, "fine") == [7 * 16]
            bitmap = graph.bitmap("disk", "fine")
            assert (bitmap.granularity, bitmap.enabled, bitmap.persistent) == (4096, False, True)


@in_loop
async def test_session_that_only_reads_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    path = new_disk(tmp_path)
    await written(path, 0)
    before = (tmp_path / "disk.bitmaps").read_bytes()
    async with disk(path) as graph:
        root = await graph.backend("disk")
        await root.pread(0, 4096)
    assert (tmp_path / "disk.bitmaps").read_bytes() == before


@in_loop
async def test_removed_bitmap_is_gone_and_space_is_used_again(tmp_path: Path) -> None:
    path = new_disk(tmp_path)
    sizes = set()
    for _ in range(6):
        await written(path, *range(0, SIZE, MIB), granularity=512)
        async with disk(path) as graph:
            await graph.remove_bitmap("disk", "b0")
        async with disk(path) as graph:
            assert not graph.node("disk").bitmaps
        sizes.add((tmp_path / "disk.bitmaps").stat().st_size)
    assert max(sizes) < 64 << 10


def other_contents(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(MIB)
        file.write(b"y")


def longer(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(SIZE + MIB)


def copied(path: Path) -> None:
    shutil.copy2(path, path.with_name("copy"))
    path.with_name("copy").replace(path)


def old_times(path: Path) -> None:
    times = path.stat()
    other_contents(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    "change, reason",
    [
        (other_contents, "was changed by somebody else"),
        (longer, f"has {SIZE + MIB} bytes, they were stored for one of {SIZE}"),
        (copied, "another file than the one"),
        (old_times, "was changed by somebody else"),
    ],
)
@in_loop
async def test_image_changed_behind_its_back_makes_bitmaps_inconsistent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Callable[[Path], None], reason: str
) -> None:
    path = new_disk(tmp_path)
    await written(path, 0)
    change(path)
    before = (tmp_path / "disk.bitmaps").read_bytes()
    for _ in range(2):  # writing the disk does not make them right
        async with disk(path) as graph:
            bitmap = graph.bitmap("disk", "b0")
            assert bitmap.inconsistent
            assert reason in bitmap.reason
            with pytest.raises(GraphError, match="full backup"):
                await graph.clear_bitmap("disk", "b0")
            root = await graph.backend("disk", writable=True)
            await root.pwrite(0, b"z")
        assert "full one" in caplog.text
        assert (tmp_path / "disk.bitmaps").read_bytes() == before, "not changed without being asked"
    async with disk(path) as graph:
        await graph.add_bitmap("disk", "b1", persistent=True)
        assert graph.bitmap("disk", "b0").inconsistent
    async with disk(path) as graph:
        assert reason in graph.bitmap("disk", "b0").reason
        assert not graph.bitmap("disk", "b1").inconsistent
        await graph.remove_bitmap("disk", "b0")
    async with disk(path) as graph:
        assert list(graph.node("disk").bitmaps) == ["b1"]


@in_loop
async def test_change_right_after_the_close_is_noticed(tmpfs: Path) -> None:
    """Within one tick of the clock that files are stamped with."""
    path = new_disk(tmpfs)
    await written(path, 0)
    for _ in range(20):
        async with disk(path) as graph:
            root = await graph.backend("disk", writable=True)
            await root.pwrite(0, b"x")
        os.pwrite(fd := os.open(path, os.O_WRONLY), b"y", MIB)
        os.close(fd)
        async with disk(path) as graph:
            assert graph.bitmap("disk", "b0").inconsistent
            await graph.remove_bitmap("disk", "b0")
            await graph.add_bitmap("disk", "b0", persistent=True)


@in_loop
async def test_kill_leaves_a_superset_that_gets_small_by_itself(tmp_path: Path) -> None:
    path = new_disk(tmp_path)
    await written(path)
    async with session(path) as (graph, kill):
        root = await graph.backend("disk", writable=True)
        root.use_map()
        await root.pwrite(3 * MIB + 5, b"x")
        async with after(path, kill()) as other:
            assert sidecar(other).recovered
            assert set(dirty(other)) == set(range(3 * 16, 4 * 16))
        await sidecar(graph).turn()
        await root.pwrite(40 * MIB, b"x")
        await sidecar(graph).turn()
        await sidecar(graph).turn()
        async with after(path, kill()) as other:
            assert set(dirty(other)) == {3 * 16, *range(40 * 16, 41 * 16)}
        await sidecar(graph).turn()
        async with after(path, kill()) as other:
            assert not sidecar(other).recovered, "a disk that nobody writes is clean"
            assert dirty(other) == [3 * 16, 40 * 16]
        await root.pwrite(50 * MIB, b"x")
        async with after(path, kill()) as other:
            assert set(dirty(other)) == {3 * 16, 40 * 16, *range(50 * 16, 51 * 16)}


@in_loop
async def test_recovered_bitmaps_go_on(tmp_path: Path) -> None:
    path = new_disk(tmp_path)
    await written(path)
    async with session(path) as (graph, kill):
        root = await graph.backend("disk", writable=True)
        await root.pwrite(3 * MIB, b"x")
        left = kill()
    left.replace(f"{path}.bitmaps")
    await written(path, 8 * MIB)
    async with disk(path) as graph:
        assert dirty(graph) == [*range(3 * 16, 4 * 16), 8 * 16]


@in_loop
async def test_hot_regions_stay_open_and_native(tmpfs: Path) -> None:
    path = new_disk(tmpfs)
    await written(path)
    async with disk(path) as graph:
        root = await graph.backend("disk", writable=True)
        extents = root.use_map().extents
        await root.pwrite(0, b"x")
        for _ in range(5):
            assert extents.pwrite(100, b"y")
            await sidecar(graph).turn()
            assert not extents.pwrite(200, b"y"), "the turn wants to see the next write"
            await root.pwrite(200, b"y")
        assert sidecar(graph)._guard.state.count(0) == SIZE // MIB - 1


@in_loop
async def test_without_crash_safe_an_unclean_stop_is_noticed(tmp_path: Path) -> None:
    path = new_disk(tmp_path)
    async with disk(path) as graph:
        await graph.attach_sidecar("disk", crash_safe=False)
        await graph.add_bitmap("disk", "b0", persistent=True)
    async with session(path) as (graph, kill):
        root = await graph.backend("disk", writable=True)
        extents = root.use_map().extents
        await root.pwrite(0, b"x")
        assert extents.pwrite(50 * MIB, b"x"), "nothing is asked a second time"
        async with after(path, kill()) as other:
            assert "crash-safe is off" in other.bitmap("disk", "b0").reason
    async with disk(path) as graph:
        assert dirty(graph) == [0, 50 * 16]


@pytest.mark.parametrize("late", [False, True], ids=["at-once", "later"])
@in_loop
async def test_another_writer_after_a_kill_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    path = new_disk(tmp_path)
    await written(path)
    async with session(path) as (graph, kill):
        root = await graph.backend("disk", writable=True)
        # The session's clock was so far behind: time passes without waiting for it.
        behind = int((identity.WINDOW + 60 if late else 1) * 1e9)
        real = identity.now
        monkeypatch.setattr(identity, "now", lambda: real() - behind)
        await root.pwrite(0, b"x")
        left = kill()
        async with after(path, left) as other:
            assert other.bitmap("disk", "b0").inconsistent == late
            if late:
                assert "after an unclean stop" in other.bitmap("disk", "b0").reason


@in_loop
async def test_writer_on_the_next_boot_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = new_disk(tmp_path)
    await written(path)
    async with session(path) as (graph, kill):
        root = await graph.backend("disk", writable=True)
        await root.pwrite(0, b"x")
        left = kill()
        monkeypatch.setattr(identity, "boot_id", lambda: b"another boot....")
        last = path.stat().st_mtime_ns
        for booted, lost in ((last + 10**10, False), (last - 10**10, True)):
            monkeypatch.setattr(identity, "boot_time", lambda booted=booted: booted)
            async with after(path, left) as other:
                assert other.bitmap("disk", "b0").inconsistent == lost


@in_loop
async def test_clear_and_merge_survive_a_kill_in_the_right_order(tmp_path: Path) -> None:
    path = new_disk(tmp_path)
    await written(path, 0, 9 * MIB)
    async with session(path) as (graph, kill):
        await graph.add_bitmap("disk", "sum", persistent=True)
        await graph.merge_bitmaps("disk", "sum", [("disk", "b0")])
        await graph.clear_bitmap("disk", "b0")
        async with after(path, kill()) as other:
            assert dirty(other, "sum") == [0, 9 * 16]
        await sidecar(graph).turn()
        async with after(path, kill()) as other:
            assert dirty(other) == []
            assert dirty(other, "sum") == [0, 9 * 16]


@in_loop
async def test_transaction_that_fails_never_stores_less_than_there_was(tmp_path: Path) -> None:
    path = new_disk(tmp_path)
    await written(path, 0)
    await written(path, name="gone")
    async with session(path) as (graph, kill):
        left: list[Path] = []

        class Kill(Abort):
            async def prepare(self, change: Any) -> None:
                left.append(kill())
                await super().prepare(change)

        with pytest.raises(GraphError, match="asked to abort"):
            await acted(
                graph,
                ClearBitmap(BitmapName("disk", "b0")),
                RemoveBitmap(BitmapName("disk", "gone")),
                AddBitmap(BitmapName("disk", "new"), persistent=True),
                Kill(),
            )
        async with after(path, left[0]) as other:
            assert dirty(other) == [0]
            assert "gone" in other.node("disk").bitmaps
        assert dirty(graph) == [0]
    async with disk(path) as graph:
        assert list(graph.node("disk").bitmaps) == ["b0", "gone"]


@in_loop
async def test_attaching_that_fails_leaves_no_file(tmp_path: Path) -> None:
    path = new_disk(tmp_path)
    async with disk(path) as graph:
        with pytest.raises(GraphError, match="asked to abort"):
            await acted(graph, AddBitmap(BitmapName("disk", "b0"), persistent=True, sidecar=True), Abort())
        assert graph.node("disk").bitmap_store is None
        assert not graph.node("disk").bitmaps
    assert os.listdir(tmp_path) == ["disk"]


@in_loop
async def test_one_node_has_one_store(tmp_path: Path) -> None:
    path = new_disk(tmp_path)
    async with disk(path) as graph:
        await graph.attach_sidecar("disk")
        await graph.add_bitmap("disk", "b0", persistent=True, sidecar=True)
        with pytest.raises(GraphError, match="already keeps its bitmaps in sidecar"):
            await graph.attach_sidecar("disk", str(tmp_path / "other"))


@in_loop
async def test_sidecar_of_a_bitmap_of_that_name_is_refused(tmp_path: Path) -> None:
    path = new_disk(tmp_path)
    await written(path, 0)
    (tmp_path / "disk.bitmaps").rename(tmp_path / "kept")
    async with disk(path) as graph:
        await graph.add_bitmap("disk", "b0")
        with pytest.raises(GraphError, match="already is a bitmap 'b0', and one in sidecar"):
            await graph.attach_sidecar("disk", str(tmp_path / "kept"))
        await graph.remove_bitmap("disk", "b0")
        await graph.attach_sidecar("disk", str(tmp_path / "kept"))
        assert dirty(graph) == [0]


@in_loop
async def test_sidecar_is_had_by_one_writer(tmp_path: Path) -> None:
    path = new_disk(tmp_path)
    await written(path, 0)
    async with disk(path) as graph:
        root = await graph.backend("disk", writable=True)
        await root.pwrite(0, b"x")
        with pytest.raises(IOFailure, match="in use by another process or node; stop it, or open the image read-only"):
            await blockgraph.aopen(raw(path))
        async with disk(path, **{"read-only": True}) as other:
            assert "is writing the image" in other.bitmap("disk", "b0").reason


@in_loop
async def test_memory_disk_needs_a_path_and_is_known_by_its_contents(tmp_path: Path) -> None:
    nodes = {"nodes": [{"node-name": "disk", "driver": "memory", "size": MIB}]}
    path = str(tmp_path / "side")
    async with await blockgraph.aopen(nodes) as graph:
        with pytest.raises(GraphError, match="name the sidecar file"):
            await graph.attach_sidecar("disk")
        await graph.add_bitmap("disk", "b0", persistent=True, sidecar=path)
        root = await graph.backend("disk", writable=True)
        await root.pwrite(GRANULE, bytes(5))
    async with await blockgraph.aopen(nodes) as graph:
        await graph.attach_sidecar("disk", path)
        assert dirty(graph) == [1]
        root = await graph.backend("disk", writable=True)
        await root.pwrite(0, b"other contents")
    async with await blockgraph.aopen(nodes) as graph:
        await graph.attach_sidecar("disk", path)
        assert "another one" in graph.bitmap("disk", "b0").reason


@in_loop
async def test_window_into_a_file_finds_no_sidecar(tmp_path: Path) -> None:
    path = new_disk(tmp_path)
    await written(path, 0)
    async with disk(path, offset=4096) as graph:
        assert graph.node("disk").bitmap_store is None


@pytest.mark.parametrize("size", [SIZE // 2, SIZE + 5 * MIB + 77, 4096])
@in_loop
async def test_resized_disk_keeps_its_bitmaps(tmp_path: Path, size: int) -> None:
    path = new_disk(tmp_path)
    await written(path, 0, SIZE - 1)
    async with session(path) as (graph, kill):
        root = await graph.backend("disk", writable=True, resize=True)
        await root.truncate(size)
        await root.pwrite(size - 1, b"x")
        expected = {granule for granule in (0, (SIZE - 1) // GRANULE) if granule * GRANULE < size}
        expected |= set(range(SIZE // GRANULE, -(-size // GRANULE)))
        async with after(path, kill()) as other:
            assert expected | {(size - 1) // GRANULE} <= set(dirty(other))
    async with disk(path) as graph:
        assert set(dirty(graph)) == expected | {(size - 1) // GRANULE}


@in_loop
async def test_full_file_system_loses_nothing(small_tmpfs: Path, tmp_path: Path) -> None:
    path = new_disk(tmp_path)
    async with disk(path) as graph:
        await graph.attach_sidecar("disk", str(small_tmpfs / "side"))
        await graph.add_bitmap("disk", "b0", granularity=512, persistent=True)
        root = await graph.backend("disk", writable=True)
        await root.pwrite(0, b"x")
        with suppress(OSError), (small_tmpfs / "fill").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        with pytest.raises(BlockGraphError, match=r"side.*free space"):
            await graph.add_bitmap("disk", "b1", persistent=True)
        assert list(graph.node("disk").bitmaps) == ["b0"]
        await root.pwrite(5 * MIB, b"x"), "a mark needs no space"
        with pytest.raises(BlockGraphError, match="No space"):
            await sidecar(graph).save()
        (small_tmpfs / "fill").unlink()
    async with disk(path) as graph:
        await graph.attach_sidecar("disk", str(small_tmpfs / "side"))
        assert dirty(graph) == [0, 5 * MIB // 512]


@pytest.mark.parametrize("operation", ["resize", "save", "turn"])
@pytest.mark.parametrize("failing", range(1, 7))
@in_loop
async def test_header_that_could_not_be_made_durable_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, failing: int
) -> None:
    """One flush fails, after which the kernel has what was written all the same; so has the file that a kill leaves."""
    path = new_disk(tmp_path)
    async with session(path) as (graph, kill):
        await graph.add_bitmap("disk", "b0", persistent=True, sidecar=True)
        root = await graph.backend("disk", writable=True, resize=True)
        await root.pwrite(0, b"x")
        store = sidecar(graph)
        sync, flushes = store.file.sync, 0

        async def fail() -> None:
            nonlocal flushes
            flushes += 1
            await sync()
            if flushes == failing:
                raise IOFailure("broken", node="disk", op="flush")

        with monkeypatch.context() as patch, suppress(IOFailure):
            patch.setattr(store.file, "sync", fail)
            if operation == "resize":
                await root.truncate(SIZE + MIB)
            elif operation == "save":
                await store.save()
            else:
                for _ in range(4):
                    await store.turn()
        for granule in (0, 5 * MIB // GRANULE):
            await root.pwrite(granule * GRANULE, b"x")
        async with after(path, kill()) as other:
            assert {0, 5 * MIB // GRANULE} <= set(dirty(other))
            assert not other.bitmap("disk", "b0").inconsistent
    async with disk(path) as graph:
        assert {0, 5 * MIB // GRANULE} <= set(dirty(graph))


@pytest.mark.parametrize("broken", ["garbage", "headers", "directory", "cut"])
@in_loop
async def test_damaged_sidecar_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str) -> None:
    path, side = new_disk(tmp_path), tmp_path / "disk.bitmaps"
    await written(path, 0)
    data = bytearray(side.read_bytes())
    match broken:
        case "garbage":
            data[:] = os.urandom(len(data))
        case "headers":
            data[100] ^= 1
            data[4096 + 100] ^= 1
        case "directory":
            data[8192:] = bytes(b ^ 0xFF for b in data[8192:])
        case _:
            del data[8192:]
    side.write_bytes(data)
    caplog.set_level(logging.ERROR)
    async with disk(path) as graph:
        assert graph.node("disk").bitmap_store is None
        assert "disk.bitmaps" in caplog.text
        assert "full backup next" in caplog.text
        with pytest.raises(CorruptImage, match="move it away"):
            await graph.attach_sidecar("disk")
        with pytest.raises(CorruptImage, match="move it away"):
            await graph.add_bitmap("disk", "b0", persistent=True, sidecar=True)
    assert side.read_bytes() == data


@in_loop
async def test_damaged_bits_make_their_bitmap_inconsistent(tmp_path: Path) -> None:
    path, side = new_disk(tmp_path), tmp_path / "disk.bitmaps"
    await written(path, 0)
    await written(path, 0, name="b1", granularity=4096)
    async with disk(path, **{"read-only": True}) as graph:
        chunk = sidecar(graph)._now.entries["b1"].chunks[0]
    with side.open("r+b") as file:
        file.seek(chunk.offset)
        file.write(b"\xaa")
    async with disk(path) as graph:
        assert "damaged in the sidecar" in graph.bitmap("disk", "b1").reason
        assert dirty(graph) == [0]


@in_loop
async def test_attach_is_an_action(tmp_path: Path) -> None:
    path = new_disk(tmp_path)
    async with disk(path) as graph:
        await acted(graph, AttachSidecar("disk"), AddBitmap(BitmapName("disk", "b0"), persistent=True))
        root = await graph.backend("disk", writable=True)
        await root.pwrite(0, b"x")
    async with disk(path) as graph:
        assert dirty(graph) == [0]


@in_loop
async def test_native_copy_to_a_disk_marks_first(tmp_path: Path) -> None:
    path = new_disk(tmp_path)
    await written(path)
    async with session(path) as (graph, kill):
        root = await graph.backend("disk", writable=True)
        await root.pwrite(0, b"x")
        async with Pins() as pins:
            leaf = await pins.write(graph.node("disk"), 30 * MIB, GRANULE)
            assert leaf is not None
            assert leaf.storage is graph.node("disk").children["file"].node
            async with after(path, kill()) as other:
                assert set(range(30 * 16, 31 * 16)) <= set(dirty(other))
            await pins.commit()


@in_loop
async def test_busy_disk_is_asked_for_few_regions_in_a_turn(tmpfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_ahead, "BATCH", 5)
    path = new_disk(tmpfs)
    await written(path)
    async with disk(path) as graph:
        root = await graph.backend("disk", writable=True)
        state = sidecar(graph)._guard.state
        await root.write_zeroes(0, SIZE)
        assert state.count(write_ahead.OPEN) == 64
        await sidecar(graph).turn()
        assert state.count(write_ahead.OPEN) == 59
        await root.pwrite(SIZE - 1, b"x")
        await sidecar(graph).turn()
        assert state.count(write_ahead.OPEN) == 54
        await sidecar(graph).turn()
        assert state.count(write_ahead.OPEN) == 0, "nobody writes"
