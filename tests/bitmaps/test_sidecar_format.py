# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The sidecar's format: what is packed is unpacked, and nothing else is believed."""

from __future__ import annotations

import struct
import zlib
from contextlib import suppress
from dataclasses import replace

import pytest
from helpers.harness import EVERYTHING, hold, make_node
from helpers.loop import in_loop
from helpers.power import LoggedDisk, LoggedFile, Power, logged_sidecar
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blockgraph.bitmaps import DirtyBitmap, sidecar_format
from blockgraph.bitmaps.sidecar_file import Space
from blockgraph.bitmaps.sidecar_format import (
    MAX_CHUNKS,
    SECTOR,
    Area,
    Chunk,
    Entry,
    Identity,
    Slot,
    Times,
    new_entry,
    pack_directory,
    pack_regions,
    unpack_directory,
    unpack_regions,
    unpack_slot,
)
from blockgraph.errors import BlockGraphError, CorruptImage, NoSpace
from blockgraph.native import Bitmap
from blockgraph.node import Node

SLOT = Slot(
    sequence=7,
    uuid=b"u" * 16,
    in_use=True,
    crash_safe=False,
    image=Identity(1 << 30, Times(5, -6, 7), b"s" * 32),
    next_size=1 << 29,
    region_bits=20,
    regions=1024,
    map_at=8192,
    boot=b"b" * 16,
    salt=b"t" * 16,
    directory=Area(65536, 99, 4),
    bitmaps=3,
    written=12345,
)


def sealed(raw: bytearray) -> bytes:
    """A slot with the CRC of what is in it."""
    struct.pack_into("<I", raw, 12, 0)
    struct.pack_into("<I", raw, 12, zlib.crc32(raw))
    return bytes(raw)


def test_slot_comes_back() -> None:
    raw = SLOT.pack()
    assert len(raw) == SECTOR
    assert unpack_slot(raw) == SLOT
    assert unpack_slot(Slot(sequence=1).pack()) == Slot(sequence=1)


@given(st.integers(0, SECTOR * 8 - 1))
def test_slot_with_one_wrong_bit_is_none(bit: int) -> None:
    raw = bytearray(SLOT.pack())
    raw[bit // 8] ^= 1 << bit % 8
    assert unpack_slot(bytes(raw)) is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"region_bits": 70}, "region size"),
        ({"regions": 1 << 21}, "number of regions"),
        ({"regions": 5}, "does not reach"),
        ({"bitmaps": 1 << 17}, "number of bitmaps"),
        ({"directory": Area(512, 10)}, "no place"),
        ({"directory": Area(8192, 1 << 50)}, "directory"),
        ({"map_at": 100}, "no place"),
        ({"next_size": 1 << 63}, "size"),
    ],
)
def test_slot_that_contradicts_the_format_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(CorruptImage, match=message):
        unpack_slot(replace(SLOT, **change).pack())


def test_other_version_is_refused() -> None:
    raw = bytearray(SLOT.pack())
    struct.pack_into("<I", raw, 8, 2)
    with pytest.raises(CorruptImage, match="version 2"):
        unpack_slot(sealed(raw))


@given(st.binary(min_size=SECTOR - 16, max_size=SECTOR - 16))
def test_any_fields_are_accepted_or_refused(fields: bytes) -> None:
    with suppress(CorruptImage):
        unpack_slot(sealed(bytearray(b"BGBITMAP" + struct.pack("<II", 1, 0) + fields)))


ENTRY = Entry(
    "täglich",
    4096,
    1 << 31,
    enabled=False,
    inconsistent="the reason",
    chunks={0: Chunk(8192, 1), 3: Chunk(12288, 2)},
    epoch=9,
    stamps={1: Chunk(16384, 3)},
)


def test_directory_comes_back() -> None:
    entries = [ENTRY, Entry("b", 512, 0), new_entry("x" * 1023, 1 << 31, (1 << 63) - 1)]
    assert unpack_directory(pack_directory(entries), 3) == entries


@given(st.data())
@settings(max_examples=300)
def test_damaged_directory_is_refused_or_bounded(data: st.DataObject) -> None:
    """With the right CRC: somebody made it so."""
    raw = bytearray(pack_directory([ENTRY, Entry("b", 512, 1 << 20)]))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.integers(0, 255))
    try:
        entries = unpack_directory(bytes(raw[: data.draw(st.integers(0, len(raw)))]), data.draw(st.integers(0, 3)))
    except CorruptImage:
        return
    for entry in entries:
        assert entry.count <= MAX_CHUNKS
        assert all(0 < area.length <= 1 << 35 for area in entry.areas())


@pytest.mark.parametrize(
    "entry, message",
    [
        (replace(ENTRY, name=""), "name"),
        (replace(ENTRY, granularity=256), "granularity"),
        (replace(ENTRY, size=1 << 63), "size"),
        (replace(ENTRY, chunk_bits=5), "chunk"),
        (replace(ENTRY, size=1 << 62, chunk_bits=32), "number of bits"),
        (replace(ENTRY, granularity=512, size=1 << 45), "number of chunks"),
        (replace(ENTRY, chunks={99: Chunk(8192, 1)}), "chunk number"),
        (replace(ENTRY, chunks={0: Chunk(100, 1)}), "no place"),
    ],
)
def test_entry_that_contradicts_the_format_is_refused(entry: Entry, message: str) -> None:
    with pytest.raises(CorruptImage, match=message):
        unpack_directory(pack_directory([entry]), 1)


def test_directory_with_a_name_twice_is_refused() -> None:
    with pytest.raises(CorruptImage, match="two bitmaps"):
        unpack_directory(pack_directory([ENTRY, ENTRY]), 2)


def test_damaged_sector_of_regions_says_all() -> None:
    bits = b"\1" + bytes(SECTOR - 5)
    raw = pack_regions(b"salt", bits)
    assert unpack_regions(b"salt", raw) == bits
    assert unpack_regions(b"other", raw) == b"\xff" * (SECTOR - 4)
    assert unpack_regions(b"salt", raw[:-1] + b"\1") == b"\xff" * (SECTOR - 4)


@pytest.mark.parametrize("size", [0, 1, 1 << 40, 64 << 40, (1 << 63) - 1])
def test_chunks_of_any_disk_are_bounded(size: int) -> None:
    granularity = 512 if size <= 1 << 40 else 1 << 25
    entry = new_entry("b", granularity, size)
    assert entry.count <= MAX_CHUNKS
    assert sum(entry.granules(number) for number in range(entry.count)) == entry.bits


def test_space_is_not_used_again_before_it_is_settled() -> None:
    full, space = NoSpace("full"), Space()
    first, second = space.allocate(5000, full), space.allocate(1, full)
    assert (first, second) == (8192, 16384)
    space.free([Area(first, 5000)])
    assert space.allocate(1, full) == 20480
    space.settle()
    assert space.allocate(4097, full) == first
    assert not space.take(Area(second, 10))
    assert space.end() == 24576


async def _stored() -> tuple[Node, bytes, Power]:
    power = Power(0)
    node = make_node(LoggedDisk, "disk", size=1 << 20)
    node.driver.power = power  # type: ignore[attr-defined]
    await node.driver.open()
    await hold(node, EVERYTHING)
    sidecar = logged_sidecar(node, power)
    await sidecar.begin()
    for name in ("a", "b"):
        node.bitmaps[name] = DirtyBitmap(name, 1 << 20, 4096, persistent=True)
        node.bitmaps[name].record(0, 9999)
    await sidecar.store()
    assert isinstance(sidecar.file, LoggedFile)
    raw = bytes(sidecar.file.disk.raw)
    await sidecar.close()
    return node, raw, power


@in_loop
async def test_file_damaged_anywhere_is_refused_or_never_says_less() -> None:
    """Every byte of the file once, and the file cut off everywhere."""
    node, raw, power = await _stored()
    damaged = [raw[:at] + bytes((raw[at] ^ 0x55,)) + raw[at + 1 :] for at in range(0, len(raw), 7)]
    damaged += [raw[:at] for at in range(1, len(raw), 211)]
    found = 0
    for data in damaged:
        sidecar = logged_sidecar(node, power, data)
        try:
            bitmaps = await sidecar.load()
        except BlockGraphError:
            continue
        finally:
            await sidecar.close()
        for bitmap in bitmaps:
            found += 1
            bits = bitmap.contents()
            assert bitmap.inconsistent or all(bits.get(at) for at in (0, 4096, 8192))
    assert found > len(damaged), "most of the file is not used"


@in_loop
async def test_blocks_used_twice_are_refused() -> None:
    node, raw, power = await _stored()
    slot = max((s for at in sidecar_format.SLOTS if (s := unpack_slot(raw[at : at + 512]))), key=lambda s: s.sequence)
    data = bytearray(raw)
    entries = unpack_directory(raw[slot.directory.offset :][: slot.directory.length], slot.bitmaps)
    entries[1] = replace(entries[1], chunks=entries[0].chunks)
    directory = pack_directory(entries)
    at = slot.directory.offset
    data[at : at + len(directory)] = directory
    header = replace(slot, directory=Area(at, len(directory), zlib.crc32(directory))).pack()
    place = sidecar_format.SLOTS[slot.sequence % 2]
    data[place : place + SECTOR] = header
    sidecar = logged_sidecar(node, power, bytes(data))
    with pytest.raises(CorruptImage, match="used twice"):
        await sidecar.load()
    await sidecar.close()


@example([(0, 0)])
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9000)), max_size=30))
def test_space_never_gives_a_block_twice(steps: list[tuple[int, int]]) -> None:
    space, held, full = Space(), Bitmap(1 << 20, 4096), NoSpace("full")
    areas: list[Area] = []
    for which, length in steps:
        if which < 6 and length:
            area = Area(space.allocate(length, full), length)
            assert held.next_dirty(area.offset, area.offset + length) is None
            held.set(area.offset, length)
            areas.append(area)
        elif areas:
            area = areas.pop(which % len(areas))
            space.free([area])
            space.settle()
            held.reset(area.offset, area.length + -area.length % 4096)
