# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Dirty bitmaps and allocation depth over NBD."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockgraph.errors import GraphError
from blockgraph.exports.nbd import NbdExport
from blockgraph.exports.nbd.context import DirtyBitmapContext, align_extents
from blockgraph.exports.nbd.protocol import U32, Opt
from blockgraph.native import Bitmap
from blockgraph.testing.memory_backend import MemoryBackend
from blockgraph.testing.nbd_client import string
from tests.helpers.nbd import SIZE, run_async, serving

pytestmark = pytest.mark.usefixtures("served_by")

GRANULE = 4096
DIRTY = "qemu:dirty-bitmap:"


def bitmap(*granules: int, size: int = SIZE, granularity: int = GRANULE) -> Bitmap:
    bits = Bitmap(size, granularity)
    for number in granules:
        bits.set(number * granularity, 1)
    return bits


def runs(flags: list[int], unit: int) -> list[tuple[int, int]]:
    """(length, flags) of units with these flags, neighbours put together."""
    found: list[tuple[int, int]] = []
    for flag in flags:
        if found and found[-1][1] == flag:
            found[-1] = (found[-1][0] + unit, flag)
        else:
            found.append((unit, flag))
    return found


@given(
    granules=st.sets(st.integers(0, 40)),
    offset=st.integers(0, 40 * 8),
    length=st.integers(1, 90),
    limit=st.integers(1, 5),
)
def test_extents_of_a_bitmap_are_its_granules(granules: set[int], offset: int, length: int, limit: int) -> None:
    """In units of 512 bytes; the last granule is cut by the disk's end."""
    total = 40 * 8 + 3
    length = min(length, total - offset)
    context = DirtyBitmapContext("b", bitmap(*granules, size=total * 512))
    coroutine = context.extents(None, offset * 512, length * 512, limit)  # type: ignore[arg-type]
    with pytest.raises(StopIteration) as done:
        coroutine.send(None)
    expected = runs([int(unit // 8 in granules) for unit in range(offset, offset + length)], 512)
    assert done.value.value == expected[:limit]


def test_block_that_is_dirty_in_part_counts_as_dirty() -> None:
    assert align_extents([(512, 0), (512, 1), (3072, 0)], 4096, DirtyBitmapContext.mixed) == [(4096, 1)]
    assert align_extents([(4096, 0), (512, 1)], 4096, DirtyBitmapContext.mixed) == [(4096, 0), (4096, 1)]


@pytest.mark.parametrize(
    "queries, listed",
    [
        ((), ["base:allocation", "qemu:allocation-depth", f"{DIRTY}b0", f"{DIRTY}b1:x"]),
        (("qemu:",), ["qemu:allocation-depth", f"{DIRTY}b0", f"{DIRTY}b1:x"]),
        ((DIRTY,), [f"{DIRTY}b0", f"{DIRTY}b1:x"]),
        ((f"{DIRTY}b1:x", "base:"), ["base:allocation", f"{DIRTY}b1:x"]),
        (("qemu:allocation-depth",), ["qemu:allocation-depth"]),
        (("qemu", "qemu:dirty-bitmap", f"{DIRTY}b", "other:"), []),
    ],
    ids=["all", "namespace", "bitmaps", "two", "depth", "none"],
)
@run_async
async def test_contexts_are_listed_by_wildcards_and_selected_by_name(
    queries: tuple[str, ...], listed: list[str]
) -> None:
    async with serving(bitmaps={"b0": bitmap(), "b1:x": bitmap()}, allocation_depth=True) as served:
        wire = await served.greeted()
        await wire.ask(Opt.STRUCTURED_REPLY)
        data = string("disk") + U32.pack(len(queries)) + b"".join(map(string, queries))
        assert [reply.data for reply in await wire.ask(Opt.LIST_META_CONTEXT, data)] == [
            bytes(4) + name.encode() for name in listed
        ]
        chosen = [name for name in listed if name in queries]
        assert [reply.data[4:].decode() for reply in await wire.ask(Opt.SET_META_CONTEXT, data)] == chosen
        await wire.close()


@run_async
async def test_export_without_bitmaps_has_no_context_of_qemu() -> None:
    async with serving() as served, await served.client(contexts=["qemu:allocation-depth", f"{DIRTY}b0"]) as client:
        assert client.contexts == {}


@run_async
async def test_all_contexts_are_answered_together() -> None:
    bits = {"b0": bitmap(1, 2, 9), "b1": bitmap(granularity=65536)}
    names = ["base:allocation", "qemu:allocation-depth", f"{DIRTY}b0", f"{DIRTY}b1"]
    async with serving(bitmaps=bits, allocation_depth=True) as served, await served.client(contexts=names) as client:
        await served.disk.pwrite(0, b"x" * GRANULE)
        status = await client.block_status(0, 10 * GRANULE)
        assert list(status) == names
        assert status["base:allocation"] == [(GRANULE, 0), (9 * GRANULE, 3)]
        assert status["qemu:allocation-depth"] == [(10 * GRANULE, 1)]
        assert status[f"{DIRTY}b0"] == [(GRANULE, 0), (2 * GRANULE, 1), (6 * GRANULE, 0), (GRANULE, 1)]
        assert status[f"{DIRTY}b1"] == [(10 * GRANULE, 0)]
        one = await client.block_status(100, 10 * GRANULE, one=True)
        assert one[f"{DIRTY}b0"] == [(GRANULE - 100, 0)]
        assert {len(found) for found in one.values()} == {1}


@pytest.mark.parametrize("alignment", [1, 4096])
@run_async
async def test_long_answers_are_cut_and_asked_for_again(alignment: int) -> None:
    size = 4 << 20
    rng = random.Random(2)
    granules = {rng.randrange(size // 512) for _ in range(3000)}
    disk = MemoryBackend(size, alignment=alignment)
    bits = {"b0": bitmap(*granules, size=size, granularity=512)}
    async with serving(disk, bitmaps=bits) as served, await served.client(contexts=[f"{DIRTY}b0"]) as client:
        first = (await client.block_status(0, size))[f"{DIRTY}b0"]
        assert len(first) <= 1024
        assert sum(length for length, _ in first) < size
        unit = max(alignment, 512)
        dirty = {number * 512 // unit for number in granules}
        assert await client.map(f"{DIRTY}b0") == runs([int(n in dirty) for n in range(size // unit)], unit)


@run_async
async def test_bitmap_of_a_huge_disk_is_told_in_pieces_of_32_bits() -> None:
    size = 1 << 40
    bits = bitmap(0, size=size, granularity=1 << 31)
    bits.fill()

    class Huge(MemoryBackend):
        def size(self) -> int:
            return size

    disk = Huge(4096)
    async with serving(disk, bitmaps={"b0": bits}) as served, await served.client(contexts=[f"{DIRTY}b0"]) as client:
        asked = (1 << 32) - 4096
        assert await client.block_status(4096, asked) == {f"{DIRTY}b0": [(asked, 1)]}


def test_bitmap_of_a_disk_of_another_size_is_refused() -> None:
    disk = MemoryBackend(SIZE).as_backend()
    with pytest.raises(GraphError, match=f"bitmap 'b0' covers {SIZE + 512} bytes, and the export 'e' has {SIZE}"):
        NbdExport("e", disk, writable=False, bitmaps={"b0": bitmap(size=SIZE + 512)})
