# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Manifests, files of checksums and patches that somebody made up: errors, bounded, and no way out of the directory."""

from __future__ import annotations

import asyncio
import os
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockgraph.api import aopen
from blockgraph.chains import Chain, restore, sumsfile, verify
from blockgraph.chains import manifest as manifests
from blockgraph.chains.manifest import Manifest
from blockgraph.errors import BlockGraphError, CorruptImage, GraphError
from blockgraph.formats.patch import TABLE, digest, empty_patch
from blockgraph.native import Bitmap, Sums

MIB = 1 << 20


def sealed(**changes: Any) -> bytes:
    """A manifest with right checksums, whatever else is in it."""
    members: dict[str, Any] = {
        "format": "blockgraph-backup",
        "version": 1,
        "id": "0" * 32,
        "state": "running",
        "time": "2026-11-29T01:02:03Z",
        "kind": "full",
        "disk": {"name": "disk", "size": MIB},
        "image": "image.raw",
        "image-format": "raw",
        "cluster-size": 65536,
        "chunk-size": MIB,
        "writer": "test",
        **changes,
    }
    try:
        return manifests.encode(msgspec.convert(members, Manifest, strict=False))
    except msgspec.ValidationError:
        return msgspec.json.encode({**members, "digest": "0" * 32})


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"image": "../image.raw"}, "not a plain name"),
        ({"image": "/etc/passwd"}, "not a plain name"),
        ({"image": ".hidden"}, "not a plain name"),
        ({"image": "a\0b"}, "not a plain name"),
        ({"state": "complete", "sums": {"file": "../s", "length": 1, "digest": "0" * 32}}, "not a plain name"),
        ({"state": "complete"}, "does not go with its checksums"),
        ({"kind": "incremental"}, "does not go with its parent"),
        ({"kind": "incremental", "parent": "0" * 32}, "is its own parent"),
        ({"version": 2}, "version 2"),
        ({"format": "other"}, "not of a backup"),
        ({"disk": {"name": "disk", "size": -1}}, "is damaged"),
        ({"disk": {"name": "disk", "size": 1 << 63}}, "is damaged"),
        ({"disk": {"name": "disk", "size": (1 << 63) - 1}}, "too large"),
        ({"disk": {"name": "disk", "size": 1 << 50}}, "do not go with its disk"),
        ({"cluster-size": 65537}, "no power of two"),
        ({"time": "yesterday"}, "wrong time"),
        ({"time": "2026-11-29T01:02:03"}, "wrong time"),
        ({"surprise": 1}, "is damaged"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value.replace(" ", "-"),
)
def test_manifest_that_makes_no_sense_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(GraphError, match=told):
        manifests.decode(sealed(**changes), "m.json")


def test_manifest_as_made_is_taken() -> None:
    assert manifests.decode(sealed(), "m.json").image == "image.raw"


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_no_manifest(data: bytes) -> None:
    with pytest.raises(GraphError):
        manifests.decode(data, "m.json")


@pytest.mark.parametrize("kind", ["long", "fifo", "link", "directory"])
def test_files_that_are_no_manifests_do_not_stop_or_mislead(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.json"
    if kind == "long":
        path.write_bytes(b" " * (manifests.MAX_BYTES + 1))
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        (tmp_path / "elsewhere").write_bytes(sealed())
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.mkdir()
    chain = Chain.load(str(tmp_path))
    assert (list(chain.damaged), chain.backups) == ([str(path)], {})


def test_image_that_is_a_link_out_of_the_directory_is_not_read(tmp_path: Path) -> None:
    chain_dir = tmp_path / "chain"
    chain_dir.mkdir()
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(MIB))
    covered, sums = Bitmap(MIB, 65536), Sums(MIB, MIB)
    covered.fill()
    data = sumsfile.encode(sums, covered)
    (chain_dir / "s.sums").write_bytes(data)
    info = {"file": "s.sums", "length": len(data), "digest": digest(data).hex()}
    (chain_dir / "m.json").write_bytes(sealed(state="complete", covered=MIB, sums=info))
    (chain_dir / "image.raw").symlink_to(secret)
    chain = Chain.load(str(chain_dir))
    (finding,) = asyncio.run(verify(chain)).findings
    assert "symbolic link" in finding.reason
    with pytest.raises(GraphError, match="symbolic link"):
        asyncio.run(restore(chain, chain.find(), str(tmp_path / "out")))
    (chain_dir / "image.raw").unlink()
    (chain_dir / "image.raw").write_bytes(bytes(MIB))
    assert asyncio.run(verify(chain)).findings == []


def test_parents_in_a_circle_are_refused(tmp_path: Path) -> None:
    info = {"file": "s.sums", "length": 1, "digest": "0" * 32}
    for name, parent in (("1", "2"), ("2", "3"), ("3", "1")):
        data = sealed(id=name * 32, parent=parent * 32, kind="incremental", state="complete", sums=info)
        (tmp_path / f"{name}.json").write_bytes(data)
    chain = Chain.load(str(tmp_path))
    with pytest.raises(GraphError, match="hangs on itself"):
        chain.way(chain.points()[0])
    report = asyncio.run(verify(chain))
    assert len(report.affected) == 3


def valid_sums() -> bytes:
    covered, sums = Bitmap(5 * MIB, 65536), Sums(5 * MIB, MIB)
    covered.set(0, 65536)
    covered.set(3 * MIB, MIB)
    sums.add(3 * MIB, b"x" * MIB)
    return sumsfile.encode(sums, covered)


@given(st.data())
def test_sums_with_any_bytes_changed_are_refused_or_taken(data: st.DataObject) -> None:
    content = bytearray(valid_sums())
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(content) - 8))
        number = data.draw(st.sampled_from([0, 1, 65536, 5 * MIB, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]))
        content[at - at % 8 : at - at % 8 + 8] = struct.pack("<Q", number)
    del content[data.draw(st.integers(0, len(content))) or len(content) :]
    try:
        found = sumsfile.decode(bytes(content), 5 * MIB, MIB, 65536)
    except GraphError:
        return
    assert found.covered.size == 5 * MIB


def patch_with(extents: list[tuple[int, int]], *, size: int, data: int, length: int, count: int | None = None) -> bytes:
    """A patch with right checksums and a table that need not be."""
    table = b"".join(struct.pack("<QQ", *extent) for extent in extents)
    count = len(extents) if count is None else count
    fixed = struct.pack("<8sIIQQQ24x16s", b"BGPATCH\0", 1, 65536, size, count, data, digest(table))
    return ((fixed + digest(fixed)).ljust(TABLE, b"\0") + table).ljust(length, b"\0")


async def open_patch(path: Path) -> tuple[int, bytes]:
    nodes = [{"node-name": "p", "driver": "patch", "file": {"driver": "file", "filename": str(path)}}]
    async with await aopen({"nodes": nodes}) as graph:
        backend = await graph.backend("p")
        return backend.size(), await backend.pread(0, min(backend.size(), MIB)) if backend.size() else b""


@pytest.mark.parametrize("at", [0, 8, 79, 95, 96, TABLE - 1, TABLE, TABLE + 15, TABLE + 16, 2 * TABLE - 1])
def test_patch_with_any_byte_before_its_data_changed_is_refused(tmp_path: Path, at: int) -> None:
    content = bytearray(patch_with([(0, 65536)], size=MIB, data=2 * TABLE, length=2 * TABLE + 65536))
    path = tmp_path / "patch"
    path.write_bytes(content)
    assert asyncio.run(open_patch(path)) == (MIB, bytes(MIB))
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptImage):
        asyncio.run(open_patch(path))


@pytest.mark.parametrize(
    "content",
    [
        patch_with([(65536, 65536), (0, 65536)], size=MIB, data=8192, length=200_000),
        patch_with([(0, 65536), (65536, 65536)], size=MIB, data=8192, length=200_000),
        patch_with([(0, 0)], size=MIB, data=8192, length=200_000),
        patch_with([(512, 65536)], size=MIB, data=8192, length=200_000),
        patch_with([(0, 1000)], size=MIB, data=8192, length=200_000),
        patch_with([(0, 2 * MIB)], size=MIB, data=8192, length=4 * MIB),
        patch_with([((1 << 64) - 65536, 65536)], size=MIB, data=8192, length=200_000),
        patch_with([(0, 65536)], size=MIB, data=8192, length=20_000),
        patch_with([(0, 65536)], size=MIB, data=4096, length=200_000),
        patch_with([], size=MIB, data=8192, length=4096, count=1 << 60),
        patch_with([], size=MIB, data=1 << 40, length=4096, count=1 << 20),
        patch_with([], size=1 << 63, data=4096, length=4096),
        b"BGPATCH\0",
        b"",
    ],
    ids=[
        *("order", "touching", "empty", "unaligned", "short", "past-end", "overflow", "cut", "overlapping-table"),
        *("many", "cut-table", "size", "short-header", "nothing"),
    ],
)
def test_patch_that_makes_no_sense_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(BlockGraphError):
        asyncio.run(open_patch(tmp_path / "p"))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(at=st.integers(0, TABLE + 100), bits=st.integers(1, 255))
def test_patch_with_any_byte_changed_is_refused_or_reads(tmp_path: Path, at: int, bits: int) -> None:
    content = bytearray(patch_with([(65536, 65536)], size=MIB, data=8192, length=8192 + 65536))
    content[at] ^= bits
    (tmp_path / "p").write_bytes(content)
    try:
        size, _ = asyncio.run(open_patch(tmp_path / "p"))
    except BlockGraphError:
        return
    assert size == MIB


def test_patch_that_changes_nothing_shows_its_backing(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(empty_patch(MIB, 65536))
    assert asyncio.run(open_patch(tmp_path / "p")) == (MIB, bytes(MIB))
