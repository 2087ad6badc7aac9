# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Chains of backups: each point in time is restored as it was, and QEMU agrees."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers.backup import settle
from helpers.chains import FORMATS, MIB, ChainedDisk, chained_disk
from helpers.loop import in_loop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockgraph.api import aopen
from blockgraph.bitmaps.actions import BitmapName, ClearBitmap, EnableBitmap, RemoveBitmap
from blockgraph.chains import Chain, restore, verify
from blockgraph.chains.images import whole
from blockgraph.chains.manifest import write_durably
from blockgraph.errors import BlockGraphError, GraphError, JobError, OptionError
from blockgraph.jobs.job import JobEvent
from blockgraph.jobs.options import BackupOptions

pytestmark = pytest.mark.parametrize("image_format", FORMATS)


async def check(disk: ChainedDisk, directory: Path) -> None:
    """Every point restores to its reference, both ways, and the chain verifies."""
    chain = disk.chain()
    points = chain.points()
    assert len(points) == len(disk.references)
    report = await verify(chain)
    assert (report.findings, report.affected, len(report.good)) == ([], [], len(points))
    for number, (point, reference) in enumerate(zip(points, disk.references, strict=True)):
        target = directory / f"restored-{number}"
        result = await restore(chain, point, str(target))
        assert result.damaged == []
        assert target.read_bytes() == reference
        target.unlink()
        node = {**whole(chain.way(point)), "node-name": "then"}
        async with await aopen({"nodes": [node]}) as graph:
            then = await graph.backend("then")
            assert await then.pread(0, disk.size) == reference


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1 << 32),
    syncs=st.lists(st.sampled_from(["full", "incremental", "incremental", "differential"]), min_size=2, max_size=5),
    size=st.sampled_from([6 * MIB, 5 * MIB + 512, 3 * MIB + 12_288 + 512 * 3, 70_000, 512]),
)
def test_every_point_of_a_busy_disk_is_restored(
    tmp_path_factory: pytest.TempPathFactory, image_format: str, seed: int, syncs: list[str], size: int
) -> None:
    source = random.Random(seed)
    directory = tmp_path_factory.mktemp("chain")

    async def main() -> None:
        async with chained_disk(directory, image_format, size) as disk:
            for sync in syncs:
                await disk.write(source, source.randrange(8))
                job = await disk.start(sync)
                await disk.write(source, source.randrange(8))
                await job.wait()
                assert job.error is None, job.error
            await check(disk, directory)

    asyncio.run(main())


def test_incremental_has_what_changed_and_bitmaps_follow(tmp_path: Path, image_format: str) -> None:
    async def main() -> None:
        async with chained_disk(tmp_path, image_format) as disk:
            await disk.guest.pwrite(0, b"a" * disk.size)
            await disk.backup()
            await disk.guest.pwrite(MIB, b"b")
            await disk.backup()
            await disk.guest.pwrite(3 * MIB, b"c")
            await disk.backup("differential")
            await disk.guest.pwrite(5 * MIB, b"d")
            await disk.backup()
            points = disk.chain().points()
            full, first, differential, last = (point.manifest for point in points)
            assert [each.kind for each in (full, first, differential, last)] == [
                "full",
                "incremental",
                "differential",
                "incremental",
            ]
            assert [first.parent, differential.parent, last.parent] == [full.id, first.id, first.id]
            assert [each.covered for each in (full, first, differential, last)] == [disk.size, 65536, 65536, 131072]
            assert last.bitmap is not None
            assert list(disk.graph.node("disk").bitmaps) == [last.bitmap.name]
            await check(disk, tmp_path)

    asyncio.run(main())


def test_backup_while_everything_changes_is_of_its_instant(tmp_path: Path, image_format: str) -> None:
    async def main() -> None:
        source = random.Random(5)
        async with chained_disk(tmp_path, image_format) as disk:
            await disk.guest.pwrite(0, source.randbytes(disk.size))
            job = await disk.start(speed=1)
            for offset in range(0, disk.size, 256 << 10):
                await disk.guest.pwrite(offset, source.randbytes(min(128 << 10, disk.size - offset)))
            job.set_speed(0)
            await job.wait()
            assert job.error is None
            await disk.backup()
            await check(disk, tmp_path)

    asyncio.run(main())


def removed(disk: ChainedDisk, name: BitmapName) -> list[object]:
    return [RemoveBitmap(name)]


def disabled(disk: ChainedDisk, name: BitmapName) -> list[object]:
    return [EnableBitmap(name, enabled=False)]


def inconsistent(disk: ChainedDisk, name: BitmapName) -> list[object]:
    disk.graph.node("disk").bitmaps[name.name].inconsistent = True
    return []


@pytest.mark.parametrize(
    "spoil, told",
    [(removed, "has no bitmap"), (disabled, "was disabled"), (inconsistent, "is inconsistent")],
    ids=["removed", "disabled", "inconsistent"],
)
def test_backup_without_a_trusted_bitmap_is_full_and_says_why(
    tmp_path: Path,
    image_format: str,
    spoil: Callable[[ChainedDisk, BitmapName], list[object]],
    told: str,
) -> None:
    events: list[JobEvent] = []

    async def main() -> None:
        async with chained_disk(tmp_path, image_format) as disk:
            await disk.backup()
            (name,) = disk.graph.node("disk").bitmaps
            async with disk.graph.transaction() as change:
                for action in spoil(disk, BitmapName("disk", name)):
                    change.act(action)  # type: ignore[arg-type]
            disk.jobs.listeners.append(events.append)
            await disk.backup()
            assert [point.manifest.kind for point in disk.chain().points()] == ["full", "full"]
            await disk.backup()
            assert disk.chain().points()[-1].manifest.kind == "incremental"
            await check(disk, tmp_path)

    asyncio.run(main())
    (note,) = [event.error for event in events if event.kind == "note"]
    assert note is not None
    assert told in note


def test_disk_that_was_resized_gets_a_full_backup(tmp_path: Path, image_format: str) -> None:
    async def main() -> None:
        async with chained_disk(tmp_path, image_format, 2 * MIB) as disk:
            await disk.backup()
            resizer = await disk.graph.backend("disk", writable=True, resize=True)
            await resizer.truncate(3 * MIB)
            job = await disk.backup()
            assert job.chain is not None
            assert job.chain.plan.reason is not None
            assert "3145728 bytes, and had 2097152" in job.chain.plan.reason
            assert disk.chain().points()[-1].manifest.kind == "full"

    asyncio.run(main())


def test_bitmap_cleared_by_hand_is_another_matter(tmp_path: Path, image_format: str) -> None:
    """Whoever clears the chain's own bitmap breaks it: nothing can tell. Two chains do not disturb each other."""

    async def main() -> None:
        async with chained_disk(tmp_path, image_format) as disk:
            await disk.backup()
            other = str(tmp_path / "other")
            await disk.backup(chain=other)
            disk.references.pop()
            await disk.guest.pwrite(MIB, b"changed")
            await disk.backup(chain=other)
            disk.references.pop()
            await disk.backup()
            assert [point.manifest.covered for point in disk.chain().points()] == [disk.size, 65536]
            assert [point.manifest.covered for point in Chain.load(other).points()] == [disk.size, 65536]
            await check(disk, tmp_path)

    asyncio.run(main())


@pytest.mark.parametrize("end", ["cancelled", "failed"])
def test_backup_that_does_not_succeed_leaves_chain_and_bitmaps(tmp_path: Path, image_format: str, end: str) -> None:
    async def main() -> None:
        async with chained_disk(tmp_path, image_format) as disk:
            await disk.guest.pwrite(0, b"a" * disk.size)
            await disk.backup()
            before = (sorted(os.listdir(disk.path)), list(disk.graph.node("disk").bitmaps))
            await disk.guest.pwrite(MIB, b"b" * MIB)
            job = await disk.start(speed=1)
            disk.references.pop()
            assert len(os.listdir(disk.path)) > len(before[0])
            if end == "cancelled":
                job.cancel()
            else:
                assert job.chain is not None

                async def fail() -> None:
                    raise JobError("no manifest today")

                job.chain.record = fail  # type: ignore[method-assign]
                job.set_speed(0)
            await job.wait()
            assert (sorted(os.listdir(disk.path)), list(disk.graph.node("disk").bitmaps)) == before
            await disk.backup()
            assert disk.chain().points()[-1].manifest.covered >= MIB
            await check(disk, tmp_path)

    asyncio.run(main())


@pytest.mark.parametrize("state", ["running", "complete"])
def test_backup_that_is_cancelled_while_its_manifest_is_written_leaves_nothing(
    tmp_path: Path, image_format: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that writes it goes on, whatever happens to the job."""
    writing, go_on, written = threading.Event(), threading.Event(), threading.Event()

    def write(path: str, data: bytes) -> None:
        held = f'"{state}"'.encode() in data
        if held:
            writing.set()
            go_on.wait()
        write_durably(path, data)
        if held:
            written.set()

    async def main() -> None:
        async with chained_disk(tmp_path, image_format) as disk:
            await disk.backup()
            before = (sorted(os.listdir(disk.path)), list(disk.graph.node("disk").bitmaps))
            with monkeypatch.context() as patch:
                patch.setattr("blockgraph.chains.manifest.write_durably", write)
                options = BackupOptions(device="disk", sync="incremental", chain=str(disk.path), job_id="b")
                starting = asyncio.create_task(disk.jobs.backup(options))
                await asyncio.to_thread(writing.wait)
                if state == "running":
                    starting.cancel()
                else:
                    disk.jobs.jobs["b"].cancel()
                await settle()
                go_on.set()
                await asyncio.to_thread(written.wait)
                with suppress(asyncio.CancelledError):
                    await (await starting).wait()
            assert (sorted(os.listdir(disk.path)), list(disk.graph.node("disk").bitmaps)) == before
            await disk.backup()
            await check(disk, tmp_path)

    asyncio.run(main())


def told(step: Callable[[], Coroutine[Any, Any, None]]) -> tuple[asyncio.Event, Any]:
    """An event for when the step of a job begins, and what to put in its place."""
    begun = asyncio.Event()

    async def begin() -> None:
        begun.set()
        await step()

    return begun, begin


def test_two_backups_that_end_at_once_both_succeed(tmp_path: Path, image_format: str) -> None:
    """Each removes the bitmap that neither needs any more."""

    async def main() -> None:
        async with chained_disk(tmp_path, image_format) as disk:
            await disk.backup()
            await disk.guest.pwrite(0, b"x" * MIB)
            jobs = [await disk.start(job_id=name, speed=1) for name in "ab"]
            ends = []
            for job in jobs:
                assert job.chain is not None
                begun, job.chain.commit = told(job.chain.commit)  # type: ignore[method-assign]
                ends.append(begun)
            async with disk.graph.transaction():
                for job, begun in zip(jobs, ends, strict=True):
                    job.set_speed(0)
                    await begun.wait()
                await settle()
            for job in jobs:
                await job.wait()
                assert job.error is None
            await disk.backup()
            await check(disk, tmp_path)

    asyncio.run(main())


def test_backup_that_is_cancelled_while_a_later_one_succeeds_has_no_error(tmp_path: Path, image_format: str) -> None:
    """The later one has removed the bitmap of the other."""

    async def main() -> None:
        async with chained_disk(tmp_path, image_format) as disk:
            await disk.backup()
            await disk.guest.pwrite(0, b"x" * MIB)
            cancelled = await disk.start(job_id="a", speed=1)
            disk.references.pop()
            other = await disk.start(job_id="b", speed=1)
            assert other.chain is not None
            begun, other.chain.commit = told(other.chain.commit)  # type: ignore[method-assign]
            async with disk.graph.transaction():
                other.set_speed(0)
                await begun.wait()
                await settle()
                cancelled.cancel()
                await settle()
            for job in (cancelled, other):
                await job.wait()
                assert job.error is None
            await disk.backup()
            await check(disk, tmp_path)

    asyncio.run(main())


async def start_and_fail(disk: ChainedDisk) -> None:
    """A transaction with a backup and an action that fails."""
    async with disk.graph.transaction() as change:
        await disk.jobs.add(change, BackupOptions(device="disk", sync="incremental", chain=str(disk.path)))
        change.act(ClearBitmap(BitmapName("disk", "there is none")))


def test_transaction_that_fails_leaves_nothing(tmp_path: Path, image_format: str) -> None:
    async def main() -> None:
        async with chained_disk(tmp_path, image_format) as disk:
            await disk.backup()
            before = (sorted(os.listdir(disk.path)), list(disk.graph.node("disk").bitmaps))
            with pytest.raises(BlockGraphError, match="there is none"):
                await start_and_fail(disk)
            assert (sorted(os.listdir(disk.path)), list(disk.graph.node("disk").bitmaps)) == before
            await disk.backup()
            await check(disk, tmp_path)

    asyncio.run(main())


def test_interrupted_backup_is_told_and_the_next_one_goes_on(tmp_path: Path, image_format: str) -> None:
    async def main() -> None:
        async with chained_disk(tmp_path, image_format) as disk:
            await disk.backup()
            await disk.guest.pwrite(0, b"x" * 3 * MIB)
            job = await disk.start(speed=1)
            disk.references.pop()
            chain = disk.chain()  # as a crash would leave it
            (running,) = [each for each in chain.backups.values() if each.manifest.state == "running"]
            report = await verify(chain)
            assert (report.findings, report.unfinished) == ([], [running.path])
            with pytest.raises(GraphError, match="not complete"):
                Chain.load(running.path).find()
            job.cancel()
            await job.wait()

    asyncio.run(main())


@pytest.mark.parametrize(
    "members, path",
    [
        ({"sync": "top"}, "sync"),
        ({"sync": "full", "target": "disk"}, "target"),
        ({"sync": "incremental", "bitmap": "b"}, "bitmap"),
        ({"sync": "full", "bitmap_mode": "never"}, "bitmap-mode"),
        ({"sync": "full", "mode": "create"}, "mode"),
    ],
    ids=["sync", "target", "bitmap", "bitmap-mode", "mode"],
)
def test_members_that_the_chain_chooses_are_refused(
    tmp_path: Path, image_format: str, members: dict[str, str], path: str
) -> None:
    async def main() -> None:
        async with chained_disk(tmp_path, image_format) as disk:
            with pytest.raises(OptionError, match="chain") as caught:
                await disk.jobs.backup(BackupOptions(device="disk", chain=str(disk.path), **members))  # type: ignore[arg-type]
            assert caught.value.path == path
            assert not disk.path.exists()

    asyncio.run(main())


def converted(qemu_img: str, image: Path) -> bytes:
    """What QEMU reads of a qcow2 image without errors."""
    out = image.with_suffix(".converted")
    subprocess.run([qemu_img, "check", "-q", image], check=True)
    subprocess.run([qemu_img, "convert", "-f", "qcow2", "-O", "raw", image, out], check=True)
    return out.read_bytes()


def test_qemu_reads_every_point(tmp_path: Path, image_format: str, require_tool: Callable[[str], str]) -> None:
    """Of a qcow2 chain by its backing files; of any chain what was restored as qcow2."""
    qemu_img = require_tool("qemu-img")

    async def main() -> None:
        source = random.Random(9)
        async with chained_disk(tmp_path, image_format) as disk:
            for _ in range(4):
                await disk.write(source, 6)
                await disk.backup()
            chain = disk.chain()
            for point, reference in zip(chain.points(), disk.references, strict=True):
                images = [tmp_path / "restored.qcow2"]
                await restore(chain, point, str(images[0]), image_format="qcow2", force=True)
                if image_format == "qcow2":
                    images.append(Path(point.image))
                for image in images:
                    assert converted(qemu_img, image)[: disk.size] == reference

    asyncio.run(main())


@in_loop
async def test_backup_that_succeeded_has_durable_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_format: str
) -> None:
    """Its directory and those above were synced after the names came into them; so was that of an image a job made."""
    synced: dict[int, set[str]] = {}
    sync = os.fsync

    def fsync(fd: int) -> None:
        sync(fd)
        path = os.readlink(f"/proc/self/fd/{fd}")
        if os.path.isdir(path):
            synced.setdefault(os.fstat(fd).st_ino, set()).update(os.listdir(path))

    async with chained_disk(tmp_path / "disk", image_format) as disk:
        monkeypatch.setattr(os, "fsync", fsync)
        chain = tmp_path / "one" / "two"
        await disk.backup(chain=str(chain))
        image = {"driver": "raw", "file": {"driver": "file", "filename": str(tmp_path / "made" / "image")}}
        (tmp_path / "made").mkdir()
        job = await disk.jobs.backup(BackupOptions(device="disk", sync="full", mode="create", target=image))
        await job.wait()
        assert job.error is None
    for directory in (chain, chain.parent, tmp_path / "made"):
        assert set(os.listdir(directory)) <= synced.get(directory.stat().st_ino, set())
    assert chain.parent.name in synced[tmp_path.stat().st_ino]
