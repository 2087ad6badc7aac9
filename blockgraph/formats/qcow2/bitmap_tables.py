# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Tables and bits of stored bitmaps: judged, read, and written to new clusters. What is zero takes neither time nor
room."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from blockgraph.bitmaps.bitmap import DirtyBitmap
from blockgraph.formats.qcow2.bitmap_directory import MAX_BITS, ONES, TABLE_RESERVED, Entry, table_size
from blockgraph.formats.qcow2.image import Image
from blockgraph.formats.qcow2.refcount import Refcounts
from blockgraph.native import Bitmap, is_zero

#: Bytes of bits read or written at once.
_CHUNK = 4 << 20


@dataclass
class Stored:
    """A bitmap in the image.

    Attributes:
        entry: of the directory.
        indexes, places: the table's entries that are not zero, and where they stand in it.
        problem: why it can not be what it says; None: it may. With a problem its clusters are nobody's.
        bitmap: what it was loaded as, or stored from.
    """

    entry: Entry
    indexes: array[int] = field(default_factory=lambda: array("I"))
    places: array[int] = field(default_factory=lambda: array("Q"))
    problem: str | None = None
    bitmap: DirtyBitmap | None = None

    def table_clusters(self, cluster_bits: int) -> int:
        """Clusters that the table takes."""
        return -(-self.entry.table_size * 8 >> cluster_bits)

    def ranges(self, cluster_bits: int) -> Iterator[tuple[int, int]]:
        """(host offset, clusters) of all that it takes: its table and its bits."""
        if self.problem is not None:
            return
        yield self.entry.table_offset, self.table_clusters(cluster_bits)
        start = end = 0
        for place in self.places:
            if place == ONES:
                continue
            if place != end:
                if start < end:
                    yield start, (end - start) >> cluster_bits
                start = place
            end = place + (1 << cluster_bits)
        if start < end:
            yield start, (end - start) >> cluster_bits


async def read_stored(image: Image, entry: Entry, disk: int) -> Stored:
    """Read and judge the table of an entry.

    Args:
        disk: its size, bytes.
    Raises:
        IOFailure: it can not be read.
    """
    stored = Stored(entry)
    stored.problem = _judge_entry(image, entry, disk)
    if stored.problem is None:
        raw = await image.read(entry.table_offset, entry.table_size * 8)
        if not is_zero(raw):
            table = array("Q", raw)
            _swap(table)
            stored.problem = _judge_table(image, table)
            stored.indexes = array("I", [index for index, place in enumerate(table) if place])
            stored.places = array("Q", [place for place in table if place])
    return stored


def _judge_entry(image: Image, entry: Entry, disk: int) -> str | None:
    offset, size = entry.table_offset, entry.table_size
    if offset & (image.cluster_size - 1) or offset < image.cluster_size:
        return f"its table is at {offset:#x}, which is no cluster behind the header"
    if offset + size * 8 > image.file_end():
        return f"its table of {size} entries at {offset:#x} passes the end of the file"
    if not 1 <= size <= MAX_BITS >> image.cluster_bits:
        return f"its table has {size} entries"
    if entry.foreign is None and not entry.in_use:
        needed = table_size(disk, entry.granularity, image.cluster_size)
        if size != needed:
            return f"its table has {size} entries, for a disk of {disk} bytes it needs {needed}"
    return None


def _judge_table(image: Image, table: array[int]) -> str | None:
    low, end, aligned = image.cluster_size, image.file_end(), image.cluster_size - 1
    for index, place in enumerate(table):
        if place <= ONES:
            continue
        if place & (TABLE_RESERVED | ONES) or place & aligned:
            return f"entry {index} of its table is {place:#x}, which has reserved bits or is no cluster"
        if not low <= place < end:
            return f"entry {index} of its table is {place:#x}, which is outside the file"
    return None


async def load_bits(image: Image, stored: Stored, bits: Bitmap) -> None:
    """Mark in `bits`, which are clean, what is stored."""
    span = stored.entry.granularity * 8 * image.cluster_size
    indexes, places = stored.indexes, stored.places
    at = 0
    while at < len(places):
        first, place = indexes[at], places[at]
        step = 0 if place == ONES else image.cluster_size
        most = len(places) if place == ONES else at + max(1, _CHUNK >> image.cluster_bits)
        end = at + 1
        while end < min(most, len(places)) and (
            indexes[end] == first + end - at and places[end] == place + (end - at) * step
        ):
            end += 1
        offset = first * span
        length = min((end - at) * span, bits.size - offset)
        if place == ONES:
            bits.set(offset, length)
        else:
            data = await image.read(place, (end - at) << image.cluster_bits)
            bits.deserialise(offset, memoryview(data)[: -(-length // (8 * bits.granularity))])
        at = end


class NewRoom:
    """Clusters taken for bitmaps that nothing on disk refers to yet."""

    def __init__(self, image: Image, refcounts: Refcounts) -> None:
        self._bits = image.cluster_bits
        self._refcounts = refcounts
        self._taken: list[tuple[int, int]] = []

    async def some(self, want: int) -> tuple[int, int]:
        """1 to `want` clusters in a row: (host offset, clusters)."""
        room = await self._refcounts.allocate(want)
        self._take(room.host, room.clusters)
        return room.host, room.clusters

    async def bytes(self, length: int) -> int:
        """Clusters in a row for so many bytes; their host offset."""
        clusters = -(-length >> self._bits)
        if clusters == 1:
            return (await self.some(1))[0]
        host = await self._refcounts.allocate_all(clusters)
        self._take(host, clusters)
        return host

    def _take(self, host: int, clusters: int) -> None:
        self._refcounts.overlaps.add(host, clusters)
        self._taken.append((host, clusters))

    def give_back(self) -> None:
        """They are free again."""
        for host, clusters in self._taken:
            self._refcounts.overlaps.remove(host, clusters)
            self._refcounts.reclaim.unused(host, clusters)


async def store_table(image: Image, table: array[int], room: NewRoom) -> int:
    """Write a table to new clusters; returns its host offset."""
    raw = array("Q", table)
    _swap(raw)
    host = await room.bytes(len(raw) * 8)
    await image.write(host, raw.tobytes())
    return host


async def store_bits(image: Image, bits: Bitmap, room: NewRoom) -> array[int]:
    """Write bits to new clusters; returns the table.

    Raises:
        NoSpace, IOFailure.
    """
    span = bits.granularity * 8 * image.cluster_size
    table = array("Q", bytes(8 * table_size(bits.size, bits.granularity, image.cluster_size)))
    offset = 0
    while (run := bits.next_dirty(offset)) is not None:
        first = run[0] // span
        end = (run[0] + run[1]) // span
        if run[0] == first * span and end > first:
            table[first:end] = array("Q", [ONES]) * (end - first)
            offset = end * span
            continue
        host, clusters = await room.some(_mixed(bits, first, len(table), span, _CHUNK >> image.cluster_bits))
        offset = min((first + clusters) * span, bits.size)
        data = bits.serialise(first * span, offset - first * span)
        await image.write(host, data.ljust(clusters << image.cluster_bits, b"\0"))
        table[first : first + clusters] = array(
            "Q", range(host, host + (clusters << image.cluster_bits), image.cluster_size)
        )
    return table


def _mixed(bits: Bitmap, first: int, end: int, span: int, most: int) -> int:
    """Clusters from `first` on that have to be written, being neither all zeroes nor all ones; at least one."""
    count = 1
    while count < most and first + count < end:
        start = (first + count) * span
        found = bits.next_dirty(start, min(start + span, bits.size))
        if found is None or found == (start, span):
            break
        count += 1
    return count


def _swap(table: array[int]) -> None:
    if sys.byteorder == "little":
        table.byteswap()
