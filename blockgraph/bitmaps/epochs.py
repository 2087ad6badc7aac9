# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Epochs: for each granule the checkpoint since which it has not changed: every "what changed since N" is answered.

```
    checkpoint        1            2                 3      now
    writes              a b          b c                d
    bitmap           { a b }      { b c }            { d }           marked by writes, natively, as ever
    stamps                        a:1 b:1            a:1 b:2 c:2     entered when bits leave the bitmap

    since(1) = a b c d        since(2) = b c d       since(3) = d    stamps >= N, and the bitmap
```

Whatever takes bits out of the bitmap (`advance`, a clear, the end of a job) stamps them with the current number first,
so that writes cost what they cost without. Stamps are uint32, in chunks; chunks without one take no memory.

Without numpy (Python 3.11), 2^20 granules (64 GiB at 64 KiB): `stamp` takes 4 ms when all are marked, 13 when 1 % are,
at random, 100 when half are; `since` takes 80 ms.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable

from blockgraph.errors import GraphError
from blockgraph.native import Bitmap

MAX_EPOCH = (1 << 32) - 1

#: Of so many runs in a chunk, all of it is gone through instead.
_RUNS = 1000
_DIGITS = bytes((48, 49)) + bytes(254)


class Epochs:
    """See the module's text.

    Args:
        size, granularity: of the bitmap.
        span: granules of a chunk, a multiple of 8.
        current: the latest checkpoint; the first is 1.

    Attributes:
        changed: chunks with stamps that are not stored.
    """

    def __init__(self, size: int, granularity: int, span: int, current: int = 1) -> None:
        self.size = size
        self.granularity = granularity
        self.span = span
        self.current = current
        self.changed: set[int] = set()
        self._chunks: dict[int, array[int]] = {}

    def stamp(self, bits: Bitmap) -> None:
        """What is marked changed in the current epoch."""
        length = self.span * self.granularity
        at = 0
        while (run := bits.next_dirty(at)) is not None:
            number = run[0] // length
            start, at = number * length, min((number + 1) * length, self.size)
            chunk = self._chunks.get(number)
            if chunk is None:
                chunk = array("I", bytes(4 * self._granules(number)))
            self._chunks[number] = self._stamped(chunk, bits, start, at)
            self.changed.add(number)

    def _stamped(self, chunk: array[int], bits: Bitmap, start: int, end: int) -> array[int]:
        now = self.current
        for runs, (first, length) in enumerate(bits.dirty_extents(start, end)):
            if runs == _RUNS:
                break
            low = (first - start) // self.granularity
            high = -(-(first + length - start) // self.granularity)
            chunk[low:high] = array("I", (now,)) * (high - low)
        else:
            return chunk
        raw = bits.serialise(start, end - start)
        flags = bin(int.from_bytes(raw, "little") | 1 << len(raw) * 8)[:2:-1]
        return array("I", [now if flag == "1" else old for flag, old in zip(flags, chunk, strict=False)])

    def advance(self, bits: Bitmap) -> Callable[[], None]:
        """A new checkpoint, `current`; what is marked changed before it.

        Returns: what takes it back. Stamps stay: the bitmap has those granules again.
        Raises:
            GraphError: there are no more numbers.
        """
        if self.current == MAX_EPOCH:
            raise GraphError(f"checkpoint {MAX_EPOCH} is the last there can be", hint="add a new bitmap")
        self.stamp(bits)
        self.current += 1

        def undo() -> None:
            self.current -= 1

        return undo

    def since(self, checkpoint: int) -> Bitmap:
        """Granules that were stamped since; those in the bitmap are not among them."""
        bits = Bitmap(self.size, self.granularity)
        for number, chunk in self._chunks.items():
            if max(chunk) < checkpoint:
                continue
            flags = bytes(map(checkpoint.__le__, chunk)).translate(_DIGITS)
            raw = int(flags[::-1], 2).to_bytes(-(-len(chunk) // 8), "little")
            bits.deserialise(number * self.span * self.granularity, raw)
        return bits

    def truncate(self, size: int) -> None:
        """Follow the disk; a grown area has no stamps, and is marked in the bitmap."""
        self.size = size
        for number, chunk in list(self._chunks.items()):
            count = self._granules(number)
            if count <= 0:
                del self._chunks[number]
                continue
            del chunk[count:]
            chunk.frombytes(bytes(4 * (count - len(chunk))))
            self.changed.add(number)

    def numbers(self) -> list[int]:
        """Chunks that have stamps."""
        return sorted(self._chunks)

    def pack(self, number: int) -> bytes:
        """A chunk as it is stored: uint32, little-endian."""
        chunk = self._chunks[number]
        if sys.byteorder == "big":
            chunk = array("I", chunk)
            chunk.byteswap()
        return chunk.tobytes()

    def unpack(self, number: int, raw: bytes) -> None:
        """Take over a stored chunk, whose length is right."""
        chunk = array("I", raw)
        if sys.byteorder == "big":
            chunk.byteswap()
        self._chunks[number] = chunk

    def _granules(self, number: int) -> int:
        return min(self.span, -(-self.size // self.granularity) - number * self.span)
