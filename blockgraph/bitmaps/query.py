# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What can be asked about a bitmap."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockgraph.bitmaps.bitmap import DirtyBitmap

if TYPE_CHECKING:
    from blockgraph.native import Bitmap

#: Bytes of bits that are hashed at a time.
_STEP = 1 << 20


@dataclass(frozen=True, slots=True)
class BitmapInfo:
    """A dirty bitmap at the moment of the question.

    Attributes:
        node, name: whose it is, and its name.
        count: dirty bytes.
        granularity: bytes per bit.
        size: bytes of the disk.
        recording: writes are marked.
        busy: who has a view of it: "job 'b0'".
        persistent: the node's store keeps it.
        inconsistent: it may have missed writes: of no use but to be removed, and a full backup is needed.
        reason: why it is inconsistent; empty when it is not.
    """

    node: str
    name: str
    count: int
    granularity: int
    size: int
    recording: bool
    busy: tuple[str, ...]
    persistent: bool
    inconsistent: bool
    reason: str


def info(bitmap: DirtyBitmap) -> BitmapInfo:
    """The answer for one bitmap."""
    return BitmapInfo(
        bitmap.node,
        bitmap.name,
        bitmap.count(),
        bitmap.granularity,
        bitmap.size,
        bitmap.recording,
        tuple(bitmap.holders),
        bitmap.persistent,
        bitmap.inconsistent,
        (bitmap.reason or "it may have missed writes") if bitmap.inconsistent else "",
    )


async def digest(bits: Bitmap) -> str:
    """SHA-256 of the bits, as QEMU's x-debug-block-dirty-bitmap-sha256 makes it: hexadecimal.

    Hashed is uint8[8 * ceil(size / granularity / 64)], bit 0 lowest, the last word filled up with zeroes. Bitmaps of
    one size and granularity with equal bits have equal digests, here and there.
    """
    # A copy, for the bits go on changing; hashing 128 MiB would hold up the loop.
    return await asyncio.to_thread(_digest, bits.copy())


def _digest(bits: Bitmap) -> str:
    hashed = hashlib.sha256()
    step = _STEP * 8 * bits.granularity
    total = 0
    for offset in range(0, bits.size, step):
        part = bits.serialise(offset, min(step, bits.size - offset))
        hashed.update(part)
        total += len(part)
    hashed.update(bytes(-total % 8))
    return hashed.hexdigest()
