# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Damaged and hostile images: an error or a correct read, never another exception, a hang, or memory without bound."""

from __future__ import annotations

import asyncio
import random
import struct
import tracemalloc
import zlib
from contextlib import suppress
from typing import Any

import pytest
import zstandard
from helpers.harness import EVERYTHING, edge, hold, make_node, read, write
from helpers.loop import in_loop
from helpers.qcow2 import FIELDS, get_field, memory_image, over, set_field
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockgraph.errors import BlockGraphError, CorruptImage
from blockgraph.flags import Flag
from blockgraph.node import Node

DISK = 1 << 20
CLUSTER = 4096
#: What opening and using any image of this size may take, bytes: the L1 table is bounded by 32 MiB.
MEMORY = 100 << 20

VALUES = [0, 1, 2, 3, 4, 7, 8, 511, 512, 4095, 4096, 65535, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]
WIDE = [*VALUES, 1 << 40, (1 << 56) - 512, (1 << 62) + 5, (1 << 63) - 1, (1 << 63) | 4096, (1 << 64) - 1]


async def image_bytes(**options: Any) -> bytearray:
    """An image with data, zeroes and holes."""
    options.setdefault("cluster_size", CLUSTER)
    file = await memory_image(DISK, **options)
    async with over(file) as driver:
        disk = edge(driver.node)
        for offset in range(0, DISK, 48 << 10):
            await write(disk, offset, bytes([offset >> 12 & 255]) * 9000)
        await disk.pwrite_zeroes(64 << 10, 32 << 10)
        await disk.pwrite_zeroes(128 << 10, 32 << 10, Flag.MAY_UNMAP)
    return bytearray(await read(edge(file), 0, file.size()))


async def file_of(image: bytes | bytearray) -> Node:
    node = make_node("memory", "memory", size=0)
    await node.driver.open()
    await hold(node, EVERYTHING)
    await write(edge(node), 0, bytes(image))
    return node


async def use(image: bytes | bytearray) -> None:
    """Open, read all, and write: errors are fine, other exceptions are not. Within bounds of time and memory."""
    for read_only in (True, False):
        file = await file_of(image)
        tracemalloc.start()
        try:
            async with asyncio.timeout(20):
                await _use(file, read_only)
            assert tracemalloc.get_traced_memory()[1] < MEMORY
        finally:
            tracemalloc.stop()


async def _use(file: Node, read_only: bool) -> None:
    with suppress(BlockGraphError):
        async with over(file, read_only=read_only) as driver:
            disk = edge(driver.node)
            size = min(disk.node.size(), 2 * DISK)
            for offset in range(0, size, 64 << 10):
                await attempt(read(disk, offset, min(64 << 10, size - offset)))
                await attempt(disk.block_status(offset, min(64 << 10, size - offset)))
            if read_only:
                return
            for offset in range(0, size, 80 << 10):
                await attempt(write(disk, offset, b"w" * min(6000, size - offset)))
            await attempt(disk.pwrite_zeroes(0, size // 2, Flag.MAY_UNMAP))
            await attempt(disk.discard(size // 2, size // 4))
            await attempt(disk.flush())
            await attempt(disk.truncate(size // 1024 * 512))
            await attempt(disk.truncate(size // 512 * 1024))
            await attempt(disk.flush())


async def attempt(work: Any) -> None:
    with suppress(BlockGraphError):
        await work


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("name", list(FIELDS))
@in_loop
async def test_header_field_of_any_value_is_refused_or_harmless(name: str, compat: str) -> None:
    if compat == "0.10" and FIELDS[name][0] >= 72:
        pytest.skip("version 2 has no such field")
    image = await image_bytes(compat=compat)
    top = 1 << struct.calcsize(FIELDS[name][1]) * 8
    old = get_field(image, name)
    for value in {*WIDE, old - 1, old + 1, old * 2, old ^ (1 << 33)}:
        if 0 <= value < top:
            damaged = bytearray(image)
            set_field(damaged, name, value)
            await use(damaged)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), cluster_size=st.sampled_from([512, 4096, 65536]))
def test_table_entries_of_any_value_are_refused_or_harmless(data: st.DataObject, cluster_size: int) -> None:
    async def run() -> None:
        image = await image_bytes(cluster_size=cluster_size)
        l1, counts = get_field(image, "l1_table_offset"), get_field(image, "refcount_table_offset")
        l2 = struct.unpack_from(">Q", image, l1)[0] & 0x00FFFFFFFFFFFE00
        blocks = struct.unpack_from(">Q", image, counts)[0]
        for _ in range(data.draw(st.integers(1, 4))):
            table, width = data.draw(st.sampled_from([(l1, 8), (l2, 8), (counts, 8), (blocks, 2)]))
            entry = data.draw(st.integers(0, 40 if width == 8 else 200))
            inside = st.integers(0, len(image) // cluster_size + 1).map(lambda c: c * cluster_size)
            pointer = st.one_of(inside, inside.map(lambda at: at | 1 << 63), st.integers(0, (1 << 64) - 1))
            compressed = st.integers(0, (1 << 64) - 1).map(lambda v: v | 1 << 62)
            value = data.draw(st.one_of(pointer, compressed) if width == 8 else st.integers(0, 3))
            if table + (entry + 1) * width <= len(image):
                struct.pack_into(">Q" if width == 8 else ">H", image, table + entry * width, value)
        await use(image)

    asyncio.run(run())


@in_loop
async def test_file_cut_anywhere_is_refused_or_reads_in_part() -> None:
    image = await image_bytes()
    rng = random.Random(1)
    for length in [*range(0, 120, 7), 512, 4096, *rng.sample(range(len(image)), 15)]:
        await use(image[:length])


@in_loop
async def test_random_bytes_behind_the_magic_are_refused() -> None:
    rng = random.Random(2)
    for _ in range(50):
        noise = rng.randbytes(8192)
        await use(b"QFI\xfb" + struct.pack(">I", rng.choice([2, 3])) + noise)


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("l1_size", 5 << 20, "l1_size is 5242880"),
        ("l1_size", 0, "l1_size is 0: a disk of 1048576 bytes needs 1"),
        ("l1_table_offset", 513, "l1_table_offset is 513: not aligned"),
        ("l1_table_offset", 1 << 40, "past the end of the file"),
        ("l1_table_offset", 4096, "overlaps another table"),
        ("refcount_table_offset", 0, "overlaps the header"),
        ("refcount_table_clusters", 1 << 20, "over 8388608 bytes"),
        ("refcount_table_clusters", 0, "no refcount table"),
        ("cluster_bits", 8, "cluster_bits is 8"),
        ("cluster_bits", 22, "cluster_bits is 22"),
        ("size", 1 << 62, "size is 4611686018427387904"),
        ("header_length", 100, "header_length is 100"),
        ("header_length", 1 << 20, "header_length is 1048576"),
        ("refcount_order", 7, "refcount_order is 7"),
        ("backing_file_offset", 8, "backing_file_offset is 8"),
        ("magic", 0, "is not a qcow2 image"),
    ],
)
@in_loop
async def test_header_error_names_field_and_value(name: str, value: int, words: str) -> None:
    image = await image_bytes()
    set_field(image, name, value)
    if name == "backing_file_offset":
        set_field(image, "backing_file_size", 10)
    with pytest.raises(CorruptImage, match=words):
        async with over(await file_of(image)):
            pass


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@in_loop
async def test_compressed_bomb_is_cut_at_a_cluster(kind: str) -> None:
    options = {"compression_type": kind}
    image = await image_bytes(**options)
    if kind == "zlib":
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        bomb = packer.compress(bytes(50 << 20)) + packer.flush()
        bomb = bomb[:CLUSTER]
    else:
        bomb = zstandard.compress(bytes(50 << 20))
    at = len(image)
    image += bomb.ljust(2 * CLUSTER, b"\0")
    l1 = get_field(image, "l1_table_offset")
    l2 = struct.unpack_from(">Q", image, l1)[0] & 0x00FFFFFFFFFFFE00
    bits = 62 - (12 - 8)
    struct.pack_into(">Q", image, l2, 1 << 62 | 7 << bits | at)
    await use(image)
    async with over(await file_of(image), read_only=True) as driver:
        assert await read(edge(driver.node), 0, CLUSTER) == bytes(CLUSTER)


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@in_loop
async def test_damaged_compressed_cluster_is_an_error(kind: str) -> None:
    image = await image_bytes(compression_type=kind)
    at = len(image)
    image += b"\xff\x00\xfe" * 3000
    l1 = get_field(image, "l1_table_offset")
    l2 = struct.unpack_from(">Q", image, l1)[0] & 0x00FFFFFFFFFFFE00
    struct.pack_into(">Q", image, l2, 1 << 62 | 3 << 58 | at)
    async with over(await file_of(image)) as driver:
        with pytest.raises(CorruptImage, match="compressed cluster"):
            await read(edge(driver.node), 0, 100)
        with pytest.raises(CorruptImage, match="compressed cluster"):
            await write(edge(driver.node), 10, b"x")
        await write(edge(driver.node), 0, b"y" * CLUSTER)
        assert await read(edge(driver.node), 0, CLUSTER) == b"y" * CLUSTER
