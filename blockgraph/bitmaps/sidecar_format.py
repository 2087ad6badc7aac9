# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The sidecar bitmap file, format 1: bytes to values and back. Nothing here does I/O.

```
 0        512 B    4 KiB    4.5 KiB  8 KiB
 | slot 0 |  ...   | slot 1 |  ...   | blocks of 4 KiB: directories, chunks, a region map, in any order ...

 slot     magic, version, CRC, sequence ─┬─► directory (CRC) ─┬─► "daily": granularity, flags ─┬─► bits (CRC)
          identity of the image          │                    └─► "weekly": ...                └─► epochs (CRC)
          clean | in use, crash-safe     └─► region map: heartbeat | regions 0.. | regions 4064.. | ...
```

All integers are little-endian. Of two valid slots the one with the higher sequence counts. Directories and chunks are
never overwritten: new ones go to free blocks, are made durable, and a slot of one sector is written to lead to them.
A chunk holds `1 << chunk_bits` bytes of bits, bit 0 lowest; those without a set bit are not stored. A chunk of epochs
holds a uint32 for each granule of the same range.

The region map alone is written in place, sector by sector: 4 bytes CRC, then one bit for each of 4064 regions that
may have changed since the bits were stored. A sector whose CRC is wrong says that of all its regions. The CRCs begin
with the salt of the slot, so that a map of another session is not taken for this one's.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from blockgraph.errors import CorruptImage
from blockgraph.graph.bitmaps import MAX_GRANULARITY, MAX_NAME, MIN_GRANULARITY

MAGIC = b"BGBITMAP"
VERSION = 1
SECTOR = 512
BLOCK = 4096
#: Where the slots are, bytes.
SLOTS = (0, BLOCK)
#: Where blocks begin.
FIRST_BLOCK = 2 * BLOCK
#: Largest sidecar, bytes.
MAX_FILE = 1 << 40
MAX_BITMAPS = 65535
#: Most chunks of one bitmap; their size follows from that.
MAX_CHUNKS = 4096
MAX_REASON = 4096
MAX_BITS = 1 << 38
#: Regions of one sector of the region map.
SECTOR_REGIONS = (SECTOR - 4) * 8
MAX_REGIONS = 1 << 20

_IN_USE, _CRASH_SAFE, _TIMES = 1, 2, 4
_ENABLED, _INCONSISTENT, _EPOCHS = 1, 2, 4

_SLOT = struct.Struct("<8sIIQ16sIIQQqqQ32s16s16sQQIIQIq")
_CRC_AT = 12
_ENTRY = struct.Struct("<HHBBBxQIII4x")
_CHUNK = struct.Struct("<IIQ")
_BEAT = struct.Struct("<Iq")


class Times(NamedTuple):
    """When and where a regular file was last changed: nanoseconds, and the number of its inode."""

    mtime: int
    ctime: int
    inode: int


class Identity(NamedTuple):
    """What an image is recognised by.

    Attributes:
        size: of the node, bytes.
        times: None where the image is no regular file.
        sample: 32 bytes; instead of `times`.
    """

    size: int
    times: Times | None
    sample: bytes = bytes(32)


class Area(NamedTuple):
    """A range of the file, and what its bytes sum up to."""

    offset: int
    length: int
    crc: int = 0


NO_IMAGE = Identity(0, None)
NOTHING = Area(0, 0)


@dataclass(frozen=True)
class Slot:
    """A header.

    Attributes:
        sequence: grows with every header; 0: none was ever written.
        uuid: of the sidecar, 16 bytes.
        in_use: the stored bits may be behind.
        crash_safe: the region map makes up for that.
        image: as it was when the header was written; in use, only size and inode say something.
        next_size: the image may have this size instead: it is being resized.
        region_bits: log2 of a region's bytes.
        regions: how many.
        map_at: where the region map is; 0: there is none.
        boot: id of the machine's boot that wrote it.
        salt: of the region map.
        bitmaps: entries of the directory.
        written: nanoseconds, wall clock.
    """

    sequence: int = 0
    uuid: bytes = bytes(16)
    in_use: bool = False
    crash_safe: bool = True
    image: Identity = NO_IMAGE
    next_size: int = 0
    region_bits: int = 20
    regions: int = 0
    map_at: int = 0
    boot: bytes = bytes(16)
    salt: bytes = bytes(16)
    directory: Area = NOTHING
    bitmaps: int = 0
    written: int = 0

    def pack(self) -> bytes:
        """One sector."""
        times = self.image.times
        flags = (_IN_USE if self.in_use else 0) | (_CRASH_SAFE if self.crash_safe else 0) | (_TIMES if times else 0)
        raw = bytearray(
            _SLOT.pack(
                MAGIC,
                VERSION,
                0,
                self.sequence,
                self.uuid,
                flags,
                self.region_bits,
                self.image.size,
                self.next_size,
                *(times or (0, 0, 0)),
                self.image.sample,
                self.boot,
                self.salt,
                *self.directory,
                self.bitmaps,
                self.map_at,
                self.regions,
                self.written,
            ).ljust(SECTOR, b"\0")
        )
        struct.pack_into("<I", raw, _CRC_AT, zlib.crc32(raw))
        return bytes(raw)


def unpack_slot(raw: bytes) -> Slot | None:
    """The header in a sector; None: there is none, or it was not written to its end.

    Raises:
        CorruptImage: another version of the format, or fields that contradict it.
    """
    if len(raw) < SECTOR or raw[:8] != MAGIC:
        return None
    crc = struct.unpack_from("<I", raw, _CRC_AT)[0]
    if zlib.crc32(raw[:_CRC_AT] + bytes(4) + raw[_CRC_AT + 4 : SECTOR]) != crc:
        return None
    (_, version, _, sequence, uuid, flags, region_bits, size, next_size, mtime, ctime, inode, sample, boot, salt,
     at, length, directory_crc, bitmaps, map_at, regions, written) = _SLOT.unpack_from(raw)  # fmt: skip
    if version != VERSION:
        raise CorruptImage(f"sidecar of version {version}, this program knows version {VERSION}")
    _bound("region size", region_bits, 9, 62)
    _bound("size", max(size, next_size), 0, (1 << 63) - 1)
    _bound("number of regions", regions, 0, MAX_REGIONS)
    _bound("number of bitmaps", bitmaps, 0, MAX_BITMAPS)
    _bound("directory", length, 0, MAX_FILE)
    _placed("directory", at, length)
    _placed("region map", map_at, map_length(regions) if map_at else 0)
    if map_at and regions << region_bits < max(size, next_size):
        raise CorruptImage(f"region map of {regions} regions does not reach the end of the disk")
    return Slot(
        sequence=sequence,
        uuid=uuid,
        in_use=bool(flags & _IN_USE),
        crash_safe=bool(flags & _CRASH_SAFE),
        image=Identity(size, Times(mtime, ctime, inode) if flags & _TIMES else None, sample),
        next_size=next_size,
        region_bits=region_bits,
        regions=regions,
        map_at=map_at,
        boot=boot,
        salt=salt,
        directory=Area(at, length, directory_crc),
        bitmaps=bitmaps,
        written=written,
    )


# The directory.


class Chunk(NamedTuple):
    """Where a chunk is, and the CRC of its bytes."""

    offset: int
    crc: int


@dataclass(frozen=True)
class Entry:
    """A bitmap as it is stored.

    Attributes:
        size: of the disk, bytes.
        inconsistent: why it is of no use; None: it is.
        chunk_bits: log2 of a chunk's bytes.
        chunks: by number; those missing are clean.
        epoch: the current one, of a bitmap with epochs; else None.
        stamps: chunks of epochs, by number; those missing are zero.
    """

    name: str
    granularity: int
    size: int
    enabled: bool = True
    inconsistent: str | None = None
    chunk_bits: int = 12
    chunks: dict[int, Chunk] = field(default_factory=dict)
    epoch: int | None = None
    stamps: dict[int, Chunk] = field(default_factory=dict)

    @property
    def bits(self) -> int:
        """Granules."""
        return -(-self.size // self.granularity)

    @property
    def span(self) -> int:
        """Bytes of the disk that a chunk covers; the last covers less."""
        return (8 << self.chunk_bits) * self.granularity

    @property
    def count(self) -> int:
        """How many chunks there would be of a bitmap full of bits."""
        return -(-self.bits // (8 << self.chunk_bits))

    def granules(self, number: int) -> int:
        """How many a chunk covers."""
        return min(8 << self.chunk_bits, self.bits - number * (8 << self.chunk_bits))

    def length(self, number: int) -> int:
        """Bytes of a chunk of bits."""
        return -(-self.granules(number) // 8)

    def areas(self) -> Iterable[Area]:
        """All that is stored of it."""
        for number, chunk in self.chunks.items():
            yield Area(chunk.offset, self.length(number), chunk.crc)
        for number, chunk in self.stamps.items():
            yield Area(chunk.offset, 4 * self.granules(number), chunk.crc)

    def pack(self) -> bytes:
        """As the directory has it."""
        name, reason = _encode(self.name), _encode(self.inconsistent or "")[:MAX_REASON]
        flags = (_ENABLED if self.enabled else 0) | (_INCONSISTENT if self.inconsistent is not None else 0)
        flags |= _EPOCHS if self.epoch is not None else 0
        head = _ENTRY.pack(
            len(name),
            len(reason),
            self.granularity.bit_length() - 1,
            flags,
            self.chunk_bits,
            self.size,
            len(self.chunks),
            len(self.stamps),
            self.epoch or 0,
        )
        parts = [head, name, reason, bytes(-(len(name) + len(reason)) % 8)]
        for chunks in (self.chunks, self.stamps):
            parts += [_CHUNK.pack(number, chunk.crc, chunk.offset) for number, chunk in sorted(chunks.items())]
        return b"".join(parts)


def new_entry(name: str, granularity: int, size: int) -> Entry:
    """An entry without chunks, its chunks as large as they have to be."""
    entry, bits = Entry(name, granularity, size), 12
    while -(-entry.bits // (8 << bits)) > MAX_CHUNKS:
        bits += 1
    return replace(entry, chunk_bits=bits)


def pack_directory(entries: Iterable[Entry]) -> bytes:
    """All entries, one after the other."""
    return b"".join(entry.pack() for entry in entries)


def unpack_directory(raw: bytes, count: int) -> list[Entry]:
    """The entries.

    Args:
        raw: checked against its CRC.
    Raises:
        CorruptImage: a field contradicts the format.
    """
    entries: list[Entry] = []
    names: set[str] = set()
    at = 0
    for number in range(count):
        try:
            entry, at = _unpack_entry(raw, at)
        except (struct.error, UnicodeDecodeError):
            raise CorruptImage(f"directory of {len(raw)} bytes is cut off in entry {number} of {count}") from None
        if entry.name in names:
            raise CorruptImage(f"two bitmaps '{entry.name}'")
        names.add(entry.name)
        entries.append(entry)
    if at != len(raw):
        raise CorruptImage(f"directory of {len(raw)} bytes, its {count} entries have {at}")
    return entries


def _unpack_entry(raw: bytes, at: int) -> tuple[Entry, int]:
    name_length, reason_length, bits, flags, chunk_bits, size, chunks, stamps, epoch = _ENTRY.unpack_from(raw, at)
    at += _ENTRY.size
    _bound("name", name_length, 1, MAX_NAME)
    _bound("reason", reason_length, 0, MAX_REASON)
    _bound("granularity", 1 << min(bits, 63), MIN_GRANULARITY, MAX_GRANULARITY)
    _bound("size", size, 0, (1 << 63) - 1)
    _bound("chunk", chunk_bits, 12, 32)
    if at + name_length + reason_length > len(raw):
        raise CorruptImage(f"name and reason reach past the directory of {len(raw)} bytes")
    name = raw[at : at + name_length].decode("utf-8", "surrogateescape")
    reason = raw[at + name_length : at + name_length + reason_length].decode("utf-8", "replace")
    at += name_length + reason_length
    at += -(name_length + reason_length) % 8
    entry = Entry(
        name,
        1 << bits,
        size,
        bool(flags & _ENABLED),
        reason if flags & _INCONSISTENT else None,
        chunk_bits,
        epoch=epoch if flags & _EPOCHS else None,
    )
    _bound("number of bits", entry.bits, 0, MAX_BITS)
    _bound("number of chunks", entry.count, 0, MAX_CHUNKS)
    for table, length, unit in ((entry.chunks, chunks, 1), (entry.stamps, stamps, 4)):
        _bound("number of chunks", length, 0, entry.count)
        for _ in range(length):
            number, crc, offset = _CHUNK.unpack_from(raw, at)
            at += _CHUNK.size
            _bound("chunk number", number, 0, entry.count - 1)
            if number in table:
                raise CorruptImage(f"bitmap '{name}' has chunk {number} twice")
            _placed("chunk", offset, entry.length(number) if unit == 1 else 4 * entry.granules(number))
            table[number] = Chunk(offset, crc)
    return entry, at


# The region map.


def map_length(regions: int) -> int:
    """Bytes of a region map with its heartbeat."""
    return SECTOR * (1 + -(-regions // SECTOR_REGIONS))


def pack_heartbeat(salt: bytes, now: int) -> bytes:
    """The first sector of a region map: when the image may have been written last, nanoseconds."""
    body = _BEAT.pack(0, now)[4:].ljust(SECTOR - 4, b"\0")
    return struct.pack("<I", zlib.crc32(salt + body)) + body


def unpack_heartbeat(salt: bytes, raw: bytes) -> int | None:
    """None: it is damaged."""
    crc, now = _BEAT.unpack_from(raw)
    return int(now) if zlib.crc32(salt + raw[4:SECTOR]) == crc else None


def pack_regions(salt: bytes, bits: bytes) -> bytes:
    """One sector of the region map.

    Args:
        bits: uint8[508], bit 0 lowest.
    """
    return struct.pack("<I", zlib.crc32(salt + bits)) + bits


def unpack_regions(salt: bytes, raw: bytes) -> bytes:
    """The bits of a sector: all, when it is damaged."""
    bits = raw[4:SECTOR]
    return bits if zlib.crc32(salt + bits) == struct.unpack_from("<I", raw)[0] else b"\xff" * (SECTOR - 4)


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _bound(what: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise CorruptImage(f"{what} {value} is not from {least} to {most}")


def _placed(what: str, offset: int, length: int) -> None:
    if length and (offset < FIRST_BLOCK or offset % BLOCK or offset + length > MAX_FILE):
        raise CorruptImage(f"{what} of {length} bytes at {offset}, which is no place for one")
