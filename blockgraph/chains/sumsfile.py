# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The file beside a manifest: which ranges of the disk the image has, and a checksum for each chunk.

```
    header    "BGSUMS" and two zero bytes, version 1, chunks in a page, disk size, chunk, runs, pages
    runs      (offset, length) of what the image covers, sorted, none touching the next
    pages     index of the first chunk, and the sums of 256 chunks; of those pages that are not all zero
```

All numbers are little-endian, of 8 bytes (version and chunks in a page: 4). A chunk's checksum is the sum that
native/sums.h describes, of 16 bytes, over the covered part of the chunk only. Zeroes sum to zero, so a sparse disk's
file is short: 4 KiB for each 256 MiB in which there is data.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from blockgraph.errors import GraphError
from blockgraph.native import Bitmap, Sums
from blockgraph.native.sums import SUM_BYTES, SUM_PAGE

MAGIC = b"BGSUMS\0\0"
VERSION = 1
_HEADER = struct.Struct("<8sIIQQQQ")
_INDEX = struct.Struct("<Q")


@dataclass
class SumsFile:
    """What a sums file says.

    Attributes:
        size: of the disk, bytes.
        chunk: bytes.
        covered: what the image has.
        pages: sums by the index of their first chunk: uint64[<=256][2].
    """

    size: int
    chunk: int
    covered: Bitmap
    pages: dict[int, bytes]

    def damaged(self, sums: Sums, within: Bitmap) -> Iterator[tuple[int, int]]:
        """Runs (offset, length) of chunks whose sum is another, cut to the disk's end.

        Args:
            sums: what was read.
            within: only chunks in which this has something; granularity is the chunk.
        """
        found = dict(sums.pages())
        for index in sorted(self.pages.keys() | found.keys()):
            count = min(SUM_PAGE, sums.count - index)
            wanted = self.pages.get(index, bytes(count * SUM_BYTES))
            there = found.get(index, bytes(count * SUM_BYTES))
            if wanted == there:
                continue
            for i in range(count):
                part = slice(i * SUM_BYTES, (i + 1) * SUM_BYTES)
                offset = (index + i) * self.chunk
                if wanted[part] != there[part] and within.get(offset):
                    yield offset, min(self.chunk, self.size - offset)


def encode(sums: Sums, covered: Bitmap) -> bytes:
    """The file's bytes."""
    runs = array("Q")
    for offset, length in covered.dirty_extents():
        runs.extend((offset, length))
    if sys.byteorder == "big":
        runs.byteswap()
    pages = [(index, page) for index, page in sums.pages() if any(page)]
    head = _HEADER.pack(MAGIC, VERSION, SUM_PAGE, sums.size, sums.chunk, len(runs) // 2, len(pages))
    return b"".join([head, runs.tobytes(), *(part for index, page in pages for part in (_INDEX.pack(index), page))])


def decode(data: bytes, size: int, chunk: int, cluster: int) -> SumsFile:
    """Check and take a sums file of a disk.

    Raises:
        GraphError: what is wrong with it.
    """

    def wrong(reason: str) -> GraphError:
        return GraphError(f"the file of checksums {reason}", op="load")

    if len(data) < _HEADER.size:
        raise wrong("is too short")
    magic, version, page, its_size, its_chunk, runs, pages = _HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION or page != SUM_PAGE:
        raise wrong("is of no known kind")
    if (its_size, its_chunk) != (size, chunk):
        raise wrong(f"is of another disk, of {its_size} bytes in chunks of {its_chunk}")
    at = _HEADER.size
    if runs * 16 > len(data) - at:
        raise wrong("ends inside its runs")
    numbers = array("Q", data[at : at + 16 * runs])
    if sys.byteorder == "big":
        numbers.byteswap()
    covered, last = Bitmap(size, cluster), -1
    for offset, length in zip(numbers[0::2], numbers[1::2], strict=True):
        end = offset + length
        if offset <= last or not length or offset % cluster or end > size or (end % cluster and end != size):
            raise wrong(f"has a run of {length} bytes at {offset} that is out of order or range")
        covered.set(offset, length)
        last = end
    return SumsFile(size, chunk, covered, _decode_pages(data, at + 16 * runs, pages, -(-size // chunk)))


def _decode_pages(data: bytes, at: int, pages: int, count: int) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    last = -1
    for _ in range(pages):
        if len(data) - at < _INDEX.size:
            raise GraphError("the file of checksums ends inside its sums", op="load")
        (index,) = _INDEX.unpack_from(data, at)
        if index <= last or index % SUM_PAGE or index >= count:
            raise GraphError(f"the file of checksums has sums of chunk {index} out of order or range", op="load")
        at += _INDEX.size
        length = min(SUM_PAGE, count - index) * SUM_BYTES
        found[index], last = data[at : at + length], index
        at += length
    if at != len(data):
        raise GraphError("the file of checksums has another length than its numbers say", op="load")
    return found
