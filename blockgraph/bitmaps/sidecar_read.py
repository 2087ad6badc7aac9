# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Reading a sidecar: what its newest header leads to, every part checked before it is used."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

from blockgraph.bitmaps.epochs import Epochs
from blockgraph.bitmaps.sidecar_file import SidecarFile, Space
from blockgraph.bitmaps.sidecar_format import (
    FIRST_BLOCK,
    SECTOR,
    SECTOR_REGIONS,
    SLOTS,
    Area,
    Entry,
    Slot,
    map_length,
    unpack_directory,
    unpack_heartbeat,
    unpack_regions,
    unpack_slot,
)
from blockgraph.errors import CorruptImage
from blockgraph.native import Bitmap

#: Regions as a native bitmap: its smallest granularity.
UNIT = 512


@dataclass
class Contents:
    """What is stored.

    Attributes:
        slot: sequence 0: nothing.
        marks: of the region map, granule n is region n.
        heartbeat: nanoseconds.
        space: blocks in use.
    """

    slot: Slot = field(default_factory=Slot)
    entries: dict[str, Entry] = field(default_factory=dict)
    marks: Bitmap = field(default_factory=lambda: Bitmap(0, UNIT))
    heartbeat: int = 0
    space: Space = field(default_factory=Space)


async def read_slot(file: SidecarFile, fd: int) -> Slot | None:
    """The header that counts; None: the file has none yet.

    Raises:
        CorruptImage: it is no sidecar, or both headers are damaged.
    """
    raws = [await file.read(fd, at, SECTOR) for at in SLOTS]
    slots = [slot for raw in raws if (slot := unpack_slot(raw)) is not None]
    if slots:
        return max(slots, key=lambda slot: slot.sequence)
    if any(any(raw) for raw in raws):
        raise CorruptImage("neither header is valid: the file is damaged, or no sidecar")
    return None


async def read_contents(file: SidecarFile, fd: int) -> Contents:
    """All but the bits.

    Raises:
        CorruptImage: something contradicts the format.
    """
    slot = await read_slot(file, fd)
    if slot is None:
        return Contents()
    size = file.size(fd)
    found = Contents(slot, heartbeat=slot.written)
    area = slot.directory
    if area.length:
        raw = await _read_area(file, fd, area, size)
        if zlib.crc32(raw) != area.crc:
            raise CorruptImage("the directory is damaged")
        found.entries = {entry.name: entry for entry in unpack_directory(raw, slot.bitmaps)}
        _claim(found.space, area)
    elif slot.bitmaps:
        raise CorruptImage(f"no directory, but {slot.bitmaps} bitmaps")
    for entry in found.entries.values():
        for part in entry.areas():
            _claim(found.space, part)
    if slot.map_at:
        area = Area(slot.map_at, map_length(slot.regions))
        raw = await _read_area(file, fd, area, size)
        _claim(found.space, area)
        beat = unpack_heartbeat(slot.salt, raw[:SECTOR])
        # Damaged: any time counts as before it, since the marks do not depend on it.
        found.heartbeat = max(slot.written, beat or 0)
        found.marks = _marks(slot, raw[SECTOR:])
    return found


def _marks(slot: Slot, raw: bytes) -> Bitmap:
    marks = Bitmap(slot.regions * UNIT, UNIT)
    for number in range(0, slot.regions, SECTOR_REGIONS):
        at = number // SECTOR_REGIONS * SECTOR
        count = min(SECTOR_REGIONS, slot.regions - number)
        bits = unpack_regions(slot.salt, raw[at : at + SECTOR])
        marks.deserialise(number * UNIT, bits[: -(-count // 8)])
    return marks


async def read_bits(file: SidecarFile, fd: int, entry: Entry, bits: Bitmap) -> str | None:
    """Enter what is stored of a bitmap of the same size; returns what is wrong with it, None: nothing."""
    size = file.size(fd)
    for number, chunk in sorted(entry.chunks.items()):
        raw = await _read_chunk(file, fd, Area(chunk.offset, entry.length(number), chunk.crc), size)
        if raw is None:
            return f"its bits from {number * entry.span} on are damaged in the sidecar"
        bits.deserialise(number * entry.span, raw)
    return None


async def read_stamps(file: SidecarFile, fd: int, entry: Entry, epochs: Epochs) -> str | None:
    """Enter the stored stamps; returns what is wrong with them, None: nothing."""
    size = file.size(fd)
    for number, chunk in entry.stamps.items():
        raw = await _read_chunk(file, fd, Area(chunk.offset, 4 * entry.granules(number), chunk.crc), size)
        if raw is None:
            return f"its epochs from {number * entry.span} on are damaged in the sidecar"
        epochs.unpack(number, raw)
    return None


async def _read_chunk(file: SidecarFile, fd: int, area: Area, size: int) -> bytes | None:
    if area.offset + area.length > size:
        return None
    raw = await file.read(fd, area.offset, area.length)
    return raw if zlib.crc32(raw) == area.crc else None


async def _read_area(file: SidecarFile, fd: int, area: Area, size: int) -> bytes:
    if area.offset + area.length > size:
        raise CorruptImage(f"the sidecar of {size} bytes is cut off: {area.length} bytes at {area.offset} are missing")
    return await file.read(fd, area.offset, area.length)


def _claim(space: Space, area: Area) -> None:
    if area.length and not space.take(area):
        raise CorruptImage(f"{area.length} bytes at {area.offset} are used twice")
    assert area.offset >= FIRST_BLOCK or not area.length
