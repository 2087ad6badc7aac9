# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Damage: verify says where it is, restore never gives wrong bytes without saying so."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.chains import FORMATS, MIB, chained_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockgraph.api import aopen
from blockgraph.chains import Backup, Chain, Report, restore, verify
from blockgraph.chains.images import whole
from blockgraph.errors import BlockGraphError, GraphError

SIZE = 4 * MIB + 512


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, bytes]]]:
    """For each format a chain (full, two incrementals, a differential), and what the disk was at each point, by id."""

    async def make(directory: Path, image_format: str) -> dict[str, bytes]:
        source = random.Random(1)
        async with chained_disk(directory, image_format, SIZE) as disk:
            await disk.guest.pwrite(0, source.randbytes(2 * MIB))
            for sync in ("full", "incremental", "incremental", "differential"):
                await disk.write(source, 5)
                await disk.backup(sync)
            return {point.manifest.id: data for point, data in zip(disk.chain().points(), disk.references, strict=True)}

    chains = {}
    for image_format in FORMATS:
        directory = tmp_path_factory.mktemp(image_format)
        chains[image_format] = (directory / "chain", asyncio.run(make(directory, image_format)))
    return chains


@pytest.fixture
def copied(
    made: dict[str, tuple[Path, dict[str, bytes]]], tmp_path: Path
) -> Callable[[str], tuple[Path, dict[str, bytes]]]:
    """A copy of a chain, to be damaged."""

    def copy(image_format: str) -> tuple[Path, dict[str, bytes]]:
        path, references = made[image_format]
        shutil.copytree(path, tmp_path / "chain")
        return tmp_path / "chain", references

    return copy


def flip(path: Path | str, offset: int, bits: int = 0xFF) -> None:
    """Change a byte; a negative offset is from the end."""
    with open(path, "r+b") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        place = file.tell()
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ bits]))


async def read_whole(way: list[Backup], size: int) -> bytes:
    """Through the images, each over its parent."""
    async with await aopen({"nodes": [{**whole(way), "node-name": "then"}]}) as graph:
        return await (await graph.backend("then")).pread(0, size)


async def check_points(chain: Chain, report: Report, references: dict[str, bytes], target: Path) -> None:
    """Good points are right, and no point is wrong without an error."""
    for point in chain.points():
        try:
            await restore(chain, point, str(target))
        except BlockGraphError:
            assert point.manifest.id in report.affected
            assert not target.exists()
        else:
            assert target.read_bytes() == references[point.manifest.id]
            target.unlink()
        if point.manifest.id in report.good:
            assert await read_whole(chain.way(point), SIZE) == references[point.manifest.id]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    image_format=st.sampled_from(FORMATS),
    seed=st.integers(0, 1 << 32),
    how=st.sampled_from(["flip", "flip", "flip", "cut", "zero"]),
)
def test_damage_anywhere_is_found_or_does_no_harm(
    made: dict[str, tuple[Path, dict[str, bytes]]],
    tmp_path_factory: pytest.TempPathFactory,
    image_format: str,
    seed: int,
    how: str,
) -> None:
    source = random.Random(seed)
    path, references = made[image_format]
    directory = tmp_path_factory.mktemp("damaged")
    shutil.copytree(path, directory / "chain")
    file = source.choice(sorted((directory / "chain").iterdir()))
    before = file.read_bytes()
    offset = source.randrange(len(before))
    if how == "flip":
        flip(file, offset, source.randrange(1, 256))
    elif how == "cut":
        os.truncate(file, offset)
    else:
        file.write_bytes(before[:offset] + bytes(512) + before[offset + 512 :])

    async def main() -> None:
        try:
            chain = Chain.load(str(directory / "chain"))
            report = await verify(chain)
            if file.read_bytes() != before and file.suffix in (".json", ".sums", ".patch", ".raw"):
                named = {finding.file for finding in report.findings}
                assert {str(file), str(file.with_suffix(".json"))} & named
            for finding in report.findings:
                if finding.backup is not None and finding.ranges:
                    assert finding.file == str(file)
            await check_points(chain, report, references, directory / "restored")
        finally:
            shutil.rmtree(directory)

    asyncio.run(main())


@pytest.mark.parametrize("image_format", FORMATS)
def test_damage_is_told_by_file_range_and_points(
    copied: Callable[[str], tuple[Path, dict[str, bytes]]], image_format: str, tmp_path: Path
) -> None:
    path, _references = copied(image_format)
    chain = Chain.load(str(path))
    full, first, second, differential = chain.points()
    covered = list(second.sums().covered.dirty_extents())

    async def offset_of(point: Backup, offset: int) -> int:
        """Where in the image's file the bytes are."""
        async with await aopen({"nodes": [{**whole(chain.way(point)), "node-name": "then"}]}) as graph:
            extent = await graph.node("then").map(offset, 1)
            assert extent.child is not None
            return extent.child_offset + offset - extent.offset

    flip(second.image, asyncio.run(offset_of(second, covered[0][0])))
    report = asyncio.run(verify(chain))
    (finding,) = report.findings
    assert (finding.file, finding.backup) == (second.image, second.manifest.id)
    assert finding.reason == "has other bytes than were backed up"
    start, length = finding.ranges[0]
    assert start <= covered[0][0] < start + length
    assert start // MIB == (start + length - 1) // MIB
    assert report.good[:2] == [full.manifest.id, first.manifest.id]
    assert report.affected[0] == second.manifest.id
    only = asyncio.run(verify(chain, [first]))
    assert (only.findings, only.good) == ([], [first.manifest.id])
    with pytest.raises(GraphError, match=f"damaged: bytes {start} to {start + length}"):
        asyncio.run(restore(chain, second, str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    result = asyncio.run(restore(chain, second, str(tmp_path / "out"), ignore=True))
    assert result.damaged[0] == (os.path.basename(second.image), start, length)
    assert (tmp_path / "out").stat().st_size == SIZE
    assert differential.manifest.parent == second.manifest.id


def test_point_that_has_the_damaged_range_anew_is_good(tmp_path: Path) -> None:
    async def main() -> None:
        async with chained_disk(tmp_path, "raw", SIZE) as disk:
            await disk.guest.pwrite(0, b"a" * SIZE)
            await disk.backup()
            await disk.guest.pwrite(MIB, b"b" * 2 * MIB)
            await disk.backup()
            chain = disk.chain()
            full, newer = chain.points()
            flip(full.image, MIB + 5)
            report = await verify(chain)
            assert (report.affected, report.good) == ([full.manifest.id], [newer.manifest.id])
            assert list(report.findings[0].ranges) == [(MIB, MIB)]
            await restore(chain, newer, str(tmp_path / "out"))
            assert (tmp_path / "out").read_bytes() == disk.references[1]

    asyncio.run(main())


@pytest.mark.parametrize("image_format", FORMATS)
def test_missing_files_and_parents_are_told(
    copied: Callable[[str], tuple[Path, dict[str, bytes]]], image_format: str, tmp_path: Path
) -> None:
    path, _ = copied(image_format)
    _full, first, second, differential = Chain.load(str(path)).points()
    os.unlink(first.path)
    chain = Chain.load(str(path))
    report = asyncio.run(verify(chain))
    assert {finding.backup for finding in report.findings} == {second.manifest.id, differential.manifest.id}
    assert all("which is missing" in finding.reason for finding in report.findings)
    assert report.affected == [second.manifest.id, differential.manifest.id]
    with pytest.raises(GraphError, match="is missing"):
        asyncio.run(restore(chain, second, str(tmp_path / "out")))
    os.unlink(differential.image)
    os.unlink(second.path[:-5] + ".sums")
    report = asyncio.run(verify(chain))
    reasons = " ".join(finding.reason for finding in report.findings)
    assert "image" in reasons
    assert "No such file" in reasons


@pytest.mark.parametrize("image_format", FORMATS)
def test_image_of_another_backup_is_found(
    copied: Callable[[str], tuple[Path, dict[str, bytes]]], image_format: str
) -> None:
    path, _ = copied(image_format)
    chain = Chain.load(str(path))
    _full, first, second, _differential = chain.points()
    shutil.copy(first.image, second.image)
    report = asyncio.run(verify(chain))
    assert {finding.file for finding in report.findings} == {second.image}
    assert second.manifest.id in report.affected


def test_cluster_that_hides_the_parent_is_found(copied: Callable[[str], tuple[Path, dict[str, bytes]]]) -> None:
    path, _ = copied("qcow2")
    chain = Chain.load(str(path))
    point = chain.points()[1]
    clean = point.sums().covered.next_clean(0)
    assert clean is not None

    async def write() -> None:
        file = {"driver": "file", "filename": point.image}
        nodes = [{"node-name": "image", "driver": "qcow2", "file": file, "backing": None}]
        async with await aopen({"nodes": nodes}) as graph:
            await (await graph.backend("image", writable=True)).pwrite(clean[0], b"x")

    asyncio.run(write())
    (finding,) = asyncio.run(verify(chain, [point])).findings
    assert "not backed up" in finding.reason
    assert list(finding.ranges) == [(clean[0], 65536)]


@pytest.mark.parametrize("image_format", FORMATS)
def test_target_is_not_overwritten_unless_forced(
    copied: Callable[[str], tuple[Path, dict[str, bytes]]], image_format: str, tmp_path: Path
) -> None:
    path, references = copied(image_format)
    chain = Chain.load(str(path))
    point = chain.points()[0]
    target = tmp_path / "out"
    target.write_bytes(b"precious" * MIB)
    with pytest.raises(GraphError, match="exists"):
        asyncio.run(restore(chain, point, str(target)))
    assert target.read_bytes() == b"precious" * MIB
    asyncio.run(restore(chain, point, str(target), force=True))
    assert target.read_bytes() == references[point.manifest.id]
    with pytest.raises(GraphError, match="part of the chain"):
        asyncio.run(restore(chain, point, point.image, force=True))
    with pytest.raises(GraphError, match="neither"):
        asyncio.run(restore(chain, point, str(tmp_path), force=True))


def test_points_are_found_by_number_id_and_time(copied: Callable[[str], tuple[Path, dict[str, bytes]]]) -> None:
    path, _ = copied("raw")
    chain = Chain.load(str(path))
    points = chain.points()
    assert chain.find() is points[-1]
    assert chain.find("2") is points[1]
    assert chain.find(points[1].manifest.id[:8]) is points[1]
    assert chain.find(points[2].manifest.time) is points[2]
    assert chain.find("9999-01-01") is points[-1]
    assert Chain.load(points[1].path).find().manifest == points[1].manifest
    for wrong in ("1970-01-01", "tomorrow", "17"):
        with pytest.raises(GraphError, match=r"no point|oldest point"):
            chain.find(wrong)
    with pytest.raises(BlockGraphError, match="chain is a directory"):
        Chain.load(str(path / "nowhere"))
