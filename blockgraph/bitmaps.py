# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Dirty bitmaps: which granules of a node may have changed since a moment.

Bits are set after a write, write-zeroes or discard, also when the request failed; they are rounded out to granules.
"""

from __future__ import annotations

from blockgraph.native import Bitmap


class DirtyBitmap:
    """A named bitmap of one node.

    Attributes:
        name: unique on its node.
        bits: uint8[ceil(size / granularity / 8)], bit 0 lowest; set = may have changed.
        enabled: it records writes.
    """

    def __init__(self, name: str, size: int, granularity: int = 64 << 10, *, enabled: bool = True) -> None:
        self.name = name
        self.bits = Bitmap(size, granularity)
        self.enabled = enabled

    def record(self, offset: int, length: int) -> None:
        """A request changed, or may have changed, the range."""
        if self.enabled and length:
            end = min(offset + length, self.bits.size)
            if offset < end:
                self.bits.set(offset, end - offset)
