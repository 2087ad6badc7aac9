# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Damaged and hostile bitmaps in images: an error, an inconsistent bitmap, or a correct one; never another exception, a
hang, memory without bound, or a disk that reads differently."""

from __future__ import annotations

import asyncio
import random
import struct
import tracemalloc

import pytest
from helpers.harness import EVERYTHING, edge, hold, make_node, read, write
from helpers.loop import in_loop
from helpers.qcow2 import memory_image, over, set_field
from helpers.qcow2_bitmaps import ENTRY_FIELDS, EXTENSION_FIELDS, entries_at, extension_at, get, put
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockgraph.bitmaps import DirtyBitmap
from blockgraph.errors import BlockGraphError, CorruptImage
from blockgraph.formats.qcow2 import Qcow2
from blockgraph.node import Node

DISK = 1 << 20
CLUSTER = 4096
MEMORY = 100 << 20
WRITTEN = range(0, DISK, 96 << 10)

VALUES = [0, 1, 2, 3, 8, 9, 31, 32, 63, 64, 255, 511, 512, 1023, 1024, 4095, 4096, 65535, 1 << 20, (1 << 31) - 1]
WIDE = [*VALUES, (1 << 32) - 1, 1 << 40, (1 << 56) - 512, (1 << 63) - 1, (1 << 63) | 4096, (1 << 64) - 1]


async def saved(driver: Qcow2) -> None:
    """As the graph closes a node."""
    await driver.node.flush()
    assert driver.node.bitmap_store is not None
    await driver.node.bitmap_store.save()


async def loaded(driver: Qcow2) -> dict[str, DirtyBitmap]:
    """As the graph opens a node."""
    assert driver.node.bitmap_store is not None
    driver.node.bitmaps = {bitmap.name: bitmap for bitmap in await driver.node.bitmap_store.load()}
    return driver.node.bitmaps


async def image_bytes(cluster_size: int = CLUSTER, names: tuple[str, ...] = ("first", "second", "third")) -> bytearray:
    """An image with some data and bitmaps of several granularities."""
    file = await memory_image(DISK, cluster_size=cluster_size)
    async with over(file) as driver:
        assert driver.node.bitmap_store is not None
        await driver.node.bitmap_store.begin()
        for number, name in enumerate(names):
            driver.node.bitmaps[name] = DirtyBitmap(name, DISK, 512 << 3 * (number % 4), persistent=True)
        for offset in WRITTEN:
            await write(edge(driver.node), offset, b"d" * 5000)
        await saved(driver)
    return bytearray(await read(edge(file), 0, file.size()))


async def file_of(image: bytes | bytearray) -> Node:
    node = make_node("memory", "memory", size=0)
    await node.driver.open()
    await hold(node, EVERYTHING)
    await write(edge(node), 0, bytes(image))
    return node


async def use(image: bytes | bytearray) -> None:
    """Load, write, save and load again, within bounds of time and memory; read-only the disk is always there."""
    tracemalloc.start()
    try:
        async with asyncio.timeout(60):
            await _use_read_only(await file_of(image))
            await _use(await file_of(image))
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


async def _use_read_only(file: Node) -> None:
    before = await read(edge(file), 0, file.size())
    async with over(file, read_only=True) as driver:
        await loaded(driver)
        for offset in WRITTEN:
            assert await read(edge(driver.node), offset, 5000) == b"d" * 5000
    assert await read(edge(file), 0, file.size()) == before


async def _use(file: Node) -> None:
    try:
        async with over(file) as driver:
            bitmaps = await loaded(driver)
            kept = {name: list(one.contents().dirty_extents()) for name, one in bitmaps.items() if one.recording}
            await write(edge(driver.node), 0, b"d" * 100)
            await saved(driver)
    except BlockGraphError:
        return
    async with over(file) as driver:
        again = await loaded(driver)
        assert list(again) == list(bitmaps)
        for name, ranges in kept.items():
            assert not again[name].inconsistent
            marked = set(again[name].contents().dirty_extents(0, DISK))
            assert all(any(at <= start < at + length for at, length in marked) for start, _ in ranges)
        for offset in WRITTEN:
            assert await read(edge(driver.node), offset, 5000) == b"d" * 5000


def values(width: str, old: int) -> list[int]:
    """To put into a field."""
    top = 1 << struct.calcsize(width) * 8
    return sorted({value for value in (*WIDE, old - 1, old + 1, old * 2, old ^ 512) if 0 <= value < top})


@pytest.mark.parametrize("name", list(EXTENSION_FIELDS))
@in_loop
async def test_extension_field_of_any_value_is_refused_or_harmless(name: str) -> None:
    image = await image_bytes()
    at, field = extension_at(image), EXTENSION_FIELDS[name]
    for value in values(field[1], get(image, at, field)):
        damaged = bytearray(image)
        put(damaged, at, field, value)
        await use(damaged)


@pytest.mark.parametrize("length", [0, 1, 8, 16, 23, 25, 32])
@in_loop
async def test_extension_of_another_length_is_refused_or_harmless(length: int) -> None:
    image = await image_bytes()
    struct.pack_into(">I", image, extension_at(image) - 4, length)
    await use(image)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("name", list(ENTRY_FIELDS))
@in_loop
async def test_entry_field_of_any_value_is_refused_or_harmless(name: str, number: int) -> None:
    image = await image_bytes()
    at, field = entries_at(image)[number], ENTRY_FIELDS[name]
    for value in values(field[1], get(image, at, field)):
        damaged = bytearray(image)
        put(damaged, at, field, value)
        await use(damaged)


@pytest.mark.parametrize("cluster_size", [512, CLUSTER])
@in_loop
async def test_table_entry_of_any_value_is_refused_or_harmless(cluster_size: int) -> None:
    image = await image_bytes(cluster_size)
    table = get(image, entries_at(image)[0], ENTRY_FIELDS["bitmap_table_offset"])
    clusters = [number * cluster_size for number in range(len(image) // cluster_size + 2)]
    for value in [*WIDE, *clusters, clusters[3] | 1]:
        damaged = bytearray(image)
        put(damaged, table, (0, ">Q"), value)
        await use(damaged)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), cluster_size=st.sampled_from([512, 4096, 65536]))
def test_several_damages_at_once_are_refused_or_harmless(data: st.DataObject, cluster_size: int) -> None:
    async def run() -> None:
        image = await image_bytes(cluster_size)
        entries = entries_at(image)
        tables = [get(image, at, ENTRY_FIELDS["bitmap_table_offset"]) for at in entries]
        places = [(extension_at(image), field) for field in EXTENSION_FIELDS.values()]
        places += [(at, field) for at in entries for field in ENTRY_FIELDS.values()]
        places += [(table, (8 * number, ">Q")) for table in tables for number in range(3)]
        for _ in range(data.draw(st.integers(1, 4))):
            at, field = data.draw(st.sampled_from(places))
            top = (1 << struct.calcsize(field[1]) * 8) - 1
            inside = st.integers(0, len(image) // cluster_size + 1).map(lambda number: number * cluster_size)
            value = data.draw(st.one_of(inside, st.integers(0, 40), st.integers(0, top)))
            put(image, at, field, value & top)
        await use(image)

    asyncio.run(run())


@in_loop
async def test_directory_of_noise_is_refused() -> None:
    rng = random.Random(3)
    image = await image_bytes(names=tuple(f"name {number}" for number in range(40)))
    at = entries_at(image)[0]
    end = entries_at(image)[-1] + 32
    for _ in range(40):
        damaged = bytearray(image)
        start = rng.randrange(at, end)
        damaged[start : start + 30] = rng.randbytes(30)
        await use(damaged)


@pytest.mark.parametrize("kind", ["ones", "sparse-file", "directory"])
@in_loop
async def test_little_file_that_asks_for_much_memory_is_refused(kind: str) -> None:
    """64 KiB of table stand for 512 MiB of bits; a sparse file has any number of tables and a large directory."""
    size = 2 << 40
    file = await memory_image(size, cluster_size=65536)
    async with over(file) as driver:
        assert driver.node.bitmap_store is not None
        await driver.node.bitmap_store.begin()
        for number in range(20):
            driver.node.bitmaps[str(number)] = DirtyBitmap(str(number), size, 512, persistent=True)
        await saved(driver)
    image = bytearray(await read(edge(file), 0, file.size()))
    for at in entries_at(image):
        table = get(image, at, ENTRY_FIELDS["bitmap_table_offset"])
        if kind == "ones":
            image[table : table + 65536] = (1).to_bytes(8, "big") * 8192
    if kind == "directory":
        put(image, extension_at(image), EXTENSION_FIELDS["bitmap_directory_size"], 65535 * 1024)
    file = await file_of(image)
    if kind != "ones":
        await edge(file).truncate(1 << 50)
    async with over(file, read_only=True) as driver:
        bitmaps = await loaded(driver)
        assert len(bitmaps) == (20 if kind == "sparse-file" else 0)
    async with over(file) as driver:
        if kind == "sparse-file":
            assert len(await loaded(driver)) == 20
        else:
            with pytest.raises(CorruptImage, match="persistent bitmaps: "):
                await loaded(driver)


@in_loop
async def test_stale_extension_is_not_even_looked_at() -> None:
    image = await image_bytes()
    set_field(image, "autoclear_features", 0)
    for name, field in EXTENSION_FIELDS.items():
        damaged = bytearray(image)
        put(damaged, extension_at(image), field, (1 << 32) - 1)
        file = await file_of(damaged)
        async with over(file) as driver:
            assert await loaded(driver) == {}, name
            await write(edge(driver.node), 0, b"x")
            await saved(driver)
