# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""sparse-random: a read-only disk with runs of random data and runs of nothing, shaped like a virtual machine's.

Options (those of nbdkit's sparse-random plugin):

* `size`: bytes, required.
* `seed`: integer; the same seed (and the other options unchanged) gives the same disk, anywhere. By default every
  node draws its own.
* `percent`: about how much of the disk is data, 0 to 100; default 10. 0 and 100 are exact.
* `runlength`: average length of a run of data, bytes; default 16 MiB.
* `random-content`: every byte random. By default each 4 KiB block repeats one random byte that is not zero, which is
  much faster to make and to verify.

Example:

    [[nodes]]
    node-name = "guest-like"
    driver = "sparse-random"
    size = 1099511627776
    seed = 42

How: the disk is cut into segments of some dozens of runs. The runs of a segment follow from the seed and the
segment's number, the contents of a block from the seed and the block's number, so any range costs what it is long.
Block status is exact: data are never all zeroes, holes always are.

Limits: read-only. Not the same bytes as nbdkit's plugin for the same seed. The data are no secret: not for keys.

Source: nbdkit-sparse-random-plugin(1).
"""

from __future__ import annotations

import hashlib
import random
import secrets
from bisect import bisect_right
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, ClassVar

from msgspec import Meta

from blockgraph.driver import fill_zero
from blockgraph.extent import Status
from blockgraph.options import NodeOptions
from blockgraph.protocols.computed import ComputedDisk, ComputedOptions

if TYPE_CHECKING:
    from blockgraph.node import Node

BLOCK = 4096
#: Pairs of a data run and a hole in a segment, on average.
_PAIRS = 32
_SEGMENTS_KEPT = 64
_MASK = (1 << 64) - 1
_REPEATED = [bytes([value]) * BLOCK for value in range(256)]


class SparseRandomOptions(ComputedOptions, kw_only=True, frozen=True):
    """See the module's text."""

    seed: int | None = None
    percent: Annotated[int, Meta(ge=0, le=100)] = 10
    runlength: Annotated[int, Meta(ge=1, le=1 << 50)] = 16 << 20
    random_content: bool = False


class SparseRandom(ComputedDisk):
    """See the module's text.

    Attributes:
        seed: the one in use.
    """

    name = "sparse-random"
    Options: ClassVar[type[NodeOptions]] = SparseRandomOptions
    options: SparseRandomOptions

    def __init__(self, node: Node, options: SparseRandomOptions) -> None:
        super().__init__(node, options)
        self.seed = secrets.randbits(63) if options.seed is None else options.seed
        self._key = int.from_bytes(hashlib.sha256(str(self.seed).encode()).digest()[:8], "little")
        percent = options.percent
        if 0 < percent < 100:
            # Data and holes are whole blocks, so a hole of less than one makes the data runs longer.
            self._data_mean = max(options.runlength / BLOCK, percent / (100 - percent), 1.0)
            self._hole_mean = max(self._data_mean * (100 - percent) / percent, 1.0)
            self._segment = round(_PAIRS * (self._data_mean + self._hole_mean))
            self._runs = lru_cache(_SEGMENTS_KEPT)(self._make_runs)

    async def storage_status(self, offset: int, length: int) -> tuple[int, Status]:
        if not 0 < self.options.percent < 100:
            return length, Status.DATA if self.options.percent else Status.ZERO
        is_data, end = self._run(offset // BLOCK)
        while end * BLOCK < offset + length:
            other, further = self._run(end)
            if other != is_data:
                break
            end = further
        return end * BLOCK - offset, Status.DATA if is_data else Status.ZERO

    def fill(self, offset: int, buf: memoryview) -> None:
        done = 0
        while done < len(buf):
            position = offset + done
            is_data, length = self._part(position, len(buf) - done)
            part = buf[done : done + length]
            if is_data:
                self._fill_data(position, part)
            else:
                fill_zero(part)
            done += length

    def _part(self, offset: int, length: int) -> tuple[bool, int]:
        percent = self.options.percent
        if not 0 < percent < 100:
            return percent == 100, length
        is_data, end = self._run(offset // BLOCK)
        return is_data, min(length, end * BLOCK - offset)

    def _run(self, block: int) -> tuple[bool, int]:
        """Whether `block` is data, and the block that ends its run (or its segment)."""
        segment, inside = divmod(block, self._segment)
        first_is_data, ends = self._runs(segment)
        index = bisect_right(ends, inside)
        return first_is_data == (index % 2 == 0), segment * self._segment + ends[index]

    def _make_runs(self, segment: int) -> tuple[bool, list[int]]:
        """The runs of a segment: what the first one is, and where each ends, in blocks from the segment's start."""
        draw = random.Random(f"{self.seed}/{segment}").random  # its sequence is guaranteed for all versions of Python
        first_is_data = is_data = draw() * 100 < self.options.percent
        ends: list[int] = []
        position = 0
        while position < self._segment:
            mean = self._data_mean if is_data else self._hole_mean
            length = 1 + int(draw() * (2 * mean - 1))
            if not ends:  # the segment starts somewhere inside a run
                length = 1 + int(draw() * length)
            position = min(position + length, self._segment)
            ends.append(position)
            is_data = not is_data
        return first_is_data, ends

    def _fill_data(self, offset: int, buf: memoryview) -> None:
        done = 0
        while done < len(buf):
            block, inside = divmod(offset + done, BLOCK)
            length = min(BLOCK - inside, len(buf) - done)
            buf[done : done + length] = self._content(block)[inside : inside + length]
            done += length

    def _content(self, block: int) -> bytes:
        if self.options.random_content:
            return hashlib.shake_128(b"%d/%d" % (self._key, block)).digest(BLOCK)
        return _REPEATED[1 + _mix(self._key + block) % 255]


def _mix(value: int) -> int:
    """splitmix64's finaliser: neighbours become unrelated.

    Source: Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, 2014.
    """
    value = value * 0x9E3779B97F4A7C15 & _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
