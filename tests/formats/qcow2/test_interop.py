# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Images of qemu-img and qemu-io, read by us; and ours, read by them."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from conftest import require_tool
from helpers.harness import EVERYTHING, edge, hold, make_node
from helpers.loop import backend_over, in_loop
from helpers.qcow2 import (
    QEMU,
    Mapped,
    check,
    contents,
    create,
    described,
    disk,
    memory_image,
    merged,
    our_map,
    over,
    qemu_img,
    qemu_io,
    qemu_map,
    raw_of,
)

from blockgraph.flags import Flag
from blockgraph.node import Node
from blockgraph.testing import check_driver

pytestmark = QEMU
CLUSTER_SIZES = [1 << bits for bits in range(9, 22)]


def random_raw(path: Path, size: int, seed: int, *, run: int) -> bytes:
    """A raw file of random, repeated and zero stretches."""
    rng = random.Random(seed)
    data = bytearray()
    while len(data) < size:
        length = rng.randrange(512, run, 512)
        data += rng.choice([bytes(length), rng.randbytes(length), bytes([rng.randrange(1, 256)]) * length])
    path.write_bytes(data[:size])
    return bytes(data[:size])


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
@in_loop
async def test_read_image_of_qemu_any_cluster_size_same_bytes_and_map(
    tmpfs: Path, cluster_size: int, compat: str
) -> None:
    raw, image = tmpfs / "d.raw", tmpfs / "d.qcow2"
    data = random_raw(raw, max(cluster_size * 5, 300 << 10) + 1024, cluster_size, run=max(4096, 2 * cluster_size))
    options = f"cluster_size={cluster_size},compat={compat}"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-o", options, raw, image)
    async with disk(image, **{"read-only": True}) as backend:
        assert await contents(backend) == data
        ours = await our_map(backend)
    assert without_holes(ours) == without_holes(qemu_map(image))


def without_holes(rows: list[Mapped]) -> list[Mapped]:
    """Holes of the file below data are told by us and not by QEMU."""
    return merged([row._replace(zero=False) if row.data else row for row in rows])


def without_depth(rows: list[Mapped], start: int) -> list[Mapped]:
    """Past the end of a shorter backing node we name it as the layer that the zeroes are from, QEMU the top."""
    return merged([row._replace(depth=0, present=False) if row.start >= start and row.zero else row for row in rows])


@pytest.mark.parametrize(
    "options, cluster_size",
    [("compression_type=zlib", size) for size in (512, 4096, 65536, 1 << 21)]
    + [("compression_type=zlib,compat=0.10", 65536)]
    + [("compression_type=zstd", size) for size in (512, 4096, 65536, 1 << 21)],
)
@in_loop
async def test_compressed_image_of_qemu_reads_and_takes_writes(tmpfs: Path, options: str, cluster_size: int) -> None:
    raw, image = tmpfs / "d.raw", tmpfs / "d.qcow2"
    data = bytearray(random_raw(raw, max(cluster_size * 4, 200 << 10), 5, run=4 * cluster_size + 4096))
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"cluster_size={cluster_size},{options}", raw, image)
    async with disk(image) as backend:
        assert await contents(backend) == data
        assert await backend.pread(777, 3000) == data[777:3777]
        for offset, length in ((cluster_size + 100, 300), (3 * cluster_size, cluster_size), (0, 512)):
            patch = bytes([offset % 251 + 1]) * length
            await backend.pwrite(offset, patch)
            data[offset : offset + length] = patch
        await backend.discard(2 * cluster_size, cluster_size)
        data[2 * cluster_size : 3 * cluster_size] = await backend.pread(2 * cluster_size, cluster_size)
        assert await contents(backend) == data
    check(image)
    assert raw_of(image) == data
    async with disk(image) as backend:
        for offset in range(0, len(data), cluster_size):
            await backend.pwrite(offset, b"!")
            data[offset] = ord("!")
    check(image)
    assert raw_of(image) == data


@pytest.mark.parametrize("end", ["discard", "zero", "write"])
@in_loop
async def test_compressed_clusters_across_host_clusters_are_freed_one_by_one(tmpfs: Path, end: str) -> None:
    """Each takes a bit more than half a host cluster, so it shares both that it lies in with its neighbours."""
    raw, image = tmpfs / "d.raw", tmpfs / "d.qcow2"
    rng = random.Random(3)
    data = bytearray(b"".join(rng.randbytes(2500) + bytes(1596) for _ in range(24)))
    raw.write_bytes(data)
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4096", raw, image)
    order = list(range(24))
    rng.shuffle(order)
    for part in (order[:8], order[8:16], order[16:]):
        async with disk(image) as backend:
            for cluster in part:
                if end == "discard":
                    await backend.discard(cluster * 4096, 4096)
                elif end == "zero":
                    await backend.write_zeroes(cluster * 4096, 4096)
                else:
                    await backend.pwrite(cluster * 4096, b"n" * 4096)
                data[cluster * 4096 : (cluster + 1) * 4096] = (b"n" if end == "write" else b"\0") * 4096
            assert await contents(backend) == data
        check(image)
        assert raw_of(image) == data


@pytest.mark.parametrize("top, base", [(400, 300), (300, 400), (400, 400)], ids=["shorter", "longer", "equal"])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@in_loop
async def test_backing_chain_of_qemu_reads_and_maps_the_same(tmpfs: Path, compat: str, top: int, base: int) -> None:
    layers = [tmpfs / "a.qcow2", tmpfs / "b.qcow2", tmpfs / "c.qcow2"]
    sizes = [base << 10, base << 10, top << 10]
    options = f"compat={compat},cluster_size=4096"
    for i, (path, size) in enumerate(zip(layers, sizes, strict=True)):
        backing = ["-b", layers[i - 1].name, "-F", "qcow2"] if i else []
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, *backing, path, size)
    qemu_io(layers[0], "write -P 1 0 200k", "write -P 2 250k 50k")
    qemu_io(layers[1], "write -P 3 100k 20k", "write -z 0 16k" if compat == "1.1" else "write 0 16k")
    qemu_io(layers[2], "write -P 4 190k 13k")
    expected = bytearray(raw_of(layers[2]))
    async with disk(layers[2]) as backend:
        assert await contents(backend) == expected
        ours = await our_map(backend)
    assert without_depth(ours, base << 10) == without_depth(qemu_map(layers[2]), base << 10)
    async with disk(layers[2]) as backend:
        for offset, length in ((1000, 100), (110 << 10, 30000), (290 << 10, 8000)):
            await backend.pwrite(offset, b"\x77" * length)
            expected[offset : offset + length] = b"\x77" * length
        assert await contents(backend) == expected
    check(layers[2])
    assert raw_of(layers[2]) == expected


def qemu_depths(path: Path) -> list[tuple[int, int, int]]:
    """Offset, length and allocation depth (1: the image itself), as qemu-nbd tells them."""
    serve = ["[", require_tool("qemu-nbd"), "-r", "-A", "-f", "qcow2", str(path), "]"]
    asking = [require_tool("nbdinfo"), "--json", "--map=qemu:allocation-depth", "--", *serve]
    done = subprocess.run(asking, capture_output=True, text=True, check=True)
    return [(row["offset"], row["length"], row["type"]) for row in json.loads(done.stdout)]


@in_loop
async def test_depth_past_the_end_of_shorter_layers_is_that_of_qemu(tmpfs: Path) -> None:
    """The layer that ends is the one that says zero: deeper, longer ones must not show."""
    layers = [tmpfs / f"{name}.qcow2" for name in "abcd"]
    for i, (path, size) in enumerate(zip(layers, ("1M", "512k", "768k", "2M"), strict=True)):
        backing = ["-b", layers[i - 1].name, "-F", "qcow2"] if i else []
        qemu_img("create", "-q", "-f", "qcow2", *backing, path, size)
        qemu_io(path, f"write -P {i + 1} {i * 64}k 64k" if i else "write -P 1 0 1M")
    ours: list[tuple[int, int, int]] = []
    async with disk(layers[-1]) as backend:
        offset = 0
        while offset < backend.size():
            status = await backend.block_status(offset, backend.size() - offset)
            assert status.zero == (offset >= 512 << 10)
            row = (offset, status.length, status.depth + 1)
            if ours and ours[-1][2] == row[2]:
                row = (ours[-1][0], ours[-1][1] + row[1], row[2])
                ours.pop()
            ours.append(row)
            offset += status.length
    assert ours == qemu_depths(layers[-1])
    assert {depth for _, _, depth in ours} == {1, 2, 3, 4}


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@in_loop
async def test_preallocated_image_of_qemu_is_written_in_place(tmpfs: Path, compat: str) -> None:
    image = tmpfs / "d.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"preallocation=metadata,compat={compat}", image, "4M")
    size = image.stat().st_size
    async with disk(image) as backend:
        await backend.pwrite(1 << 20, b"x" * 200_000)
        assert await backend.pread((1 << 20) + 199_990, 20) == b"x" * 10 + bytes(10)
    assert image.stat().st_size == size
    check(image)


@in_loop
async def test_zero_clusters_with_and_without_room_map_as_qemu_does(tmpfs: Path) -> None:
    image = tmpfs / "d.qcow2"
    await create(image, 1 << 20)
    async with disk(image) as backend:
        await backend.pwrite(0, b"a" * (512 << 10))
        await backend.write_zeroes(64 << 10, 128 << 10)
        await backend.write_zeroes(256 << 10, 64 << 10, Flag.MAY_UNMAP)
        await backend.discard(320 << 10, 64 << 10)
        await backend.write_zeroes(800 << 10, 10 << 10)
        await backend.flush()
        ours = await our_map(backend)
    assert without_holes(ours) == without_holes(qemu_map(image))
    kinds = [(row.start >> 16, row.length >> 16, row.data, row.offset is None) for row in ours]
    assert kinds == [
        (0, 1, True, False),
        (1, 2, False, False),
        (3, 1, True, False),
        (4, 2, False, True),
        (6, 2, True, False),
        (8, 8, False, True),
    ]
    check(image)


@in_loop
async def test_room_kept_under_zeroes_is_used_again(tmpfs: Path) -> None:
    image = tmpfs / "d.qcow2"
    await create(image, 1 << 20)
    async with disk(image) as backend:
        await backend.pwrite(0, b"a" * 65536)
        before = await backend.block_status(0, 65536)
        await backend.write_zeroes(0, 65536)
        await backend.pwrite(5000, b"b" * 100)
        after = await backend.block_status(5000, 100)
        assert after.host_offset is not None
        assert before.host_offset == after.host_offset - 5000
        assert await backend.pread(4990, 120) == bytes(10) + b"b" * 100 + bytes(10)
    check(image)


@pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
@pytest.mark.parametrize("compat, cluster_size", [("0.10", 512), ("0.10", 65536), ("1.1", 4096), ("1.1", 1 << 18)])
@in_loop
async def test_conformance_kit_passes(compat: str, cluster_size: int, backed: bool) -> None:
    size = 1 << 20

    @asynccontextmanager
    async def make() -> AsyncIterator[Node]:
        file = await memory_image(size, cluster_size=cluster_size, compat=compat)
        options = {}
        if backed:
            backing = make_node("memory", "base", size=size - 5000)
            await backing.driver.open()
            await hold(backing, EVERYTHING)
            await edge(backing).pwrite(0, memoryview(random.Random(1).randbytes(size - 5000)))
            options["backing"] = backing
        async with over(file, **options) as driver:
            yield driver.node

    await check_driver(make, size=size)


@in_loop
async def test_description_with_backing_null_ignores_the_named_file(tmpfs: Path) -> None:
    base, top = tmpfs / "base.qcow2", tmpfs / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, "1M")
    qemu_io(base, "write -P 9 0 1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top)
    async with disk(top) as backend:
        assert await backend.pread(0, 4) == b"\x09" * 4
    async with disk(top, backing=None) as backend:
        assert await backend.pread(0, 4) == bytes(4)
    async with backend_over(described(base, "base", **{"read-only": True}), described(top, backing="base")) as backend:
        assert await backend.pread(0, 4) == b"\x09" * 4


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@in_loop
async def test_discard_over_backing_does_not_bring_old_data_back(tmpfs: Path, compat: str) -> None:
    base, top = tmpfs / "base.qcow2", tmpfs / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, "1M")
    qemu_io(base, "write -P 9 0 1M")
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"compat={compat}", "-b", base.name, "-F", "qcow2", top)
    async with disk(top) as backend:
        await backend.pwrite(0, b"n" * 131072)
        await backend.discard(0, 65536)
        first = await backend.pread(0, 65536)
        # Version 2 can not say zero here, so it keeps what was written.
        assert first == (bytes(65536) if compat == "1.1" else b"n" * 65536)
        assert await backend.pread(65536, 65536) == b"n" * 65536
    check(top)
    assert raw_of(top)[:65536] == first
