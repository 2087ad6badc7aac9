# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""pattern: a read-only disk whose contents say where they are: every 8 bytes hold their own offset, big-endian.

```
    0000:  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 08
    0010:  00 00 00 00 00 00 00 10  00 00 00 00 00 00 00 18
```

A byte that is read from a wrong place shows the place it came from. The same bytes as nbdkit's pattern plugin.

Options:

* `size`: bytes, required; need not be a multiple of 8.

Example:

    [[nodes]]
    node-name = "known"
    driver = "pattern"
    size = 1073741824

Limits: read-only. Everything is data; the first 8 bytes are zeroes all the same.

Source: nbdkit-pattern-plugin(1).
"""

from __future__ import annotations

from array import array
from sys import byteorder
from typing import ClassVar

from blockgraph.options import NodeOptions
from blockgraph.protocols.computed import ComputedDisk, ComputedOptions

#: Within a block only the two low bytes of the offsets differ.
_BLOCK = 1 << 16
_WORDS = _BLOCK // 8


def _first_block() -> bytes:
    words = array("Q", range(0, _BLOCK, 8))
    if byteorder == "little":
        words.byteswap()
    return words.tobytes()


_FIRST = _first_block()


class Pattern(ComputedDisk):
    """See the module's text."""

    name = "pattern"
    Options: ClassVar[type[NodeOptions]] = ComputedOptions

    def fill(self, offset: int, buf: memoryview) -> None:
        done = 0
        while done < len(buf):
            base = (offset + done) // _BLOCK * _BLOCK
            inside = offset + done - base
            length = min(_BLOCK - inside, len(buf) - done)
            buf[done : done + length] = _block(base)[inside : inside + length]
            done += length


def _block(base: int) -> memoryview:
    """The block that starts at `base`, a multiple of its length."""
    block = bytearray(_FIRST)
    for index, byte in enumerate(base.to_bytes(8, "big")[:6]):
        if byte:
            block[index::8] = bytes([byte]) * _WORDS
    return memoryview(block)
