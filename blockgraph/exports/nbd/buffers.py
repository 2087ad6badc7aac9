# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""BufferPool: memory for payloads, page aligned (O_DIRECT takes it as it is) and used again.

A fresh 256 KiB buffer costs 64 page faults, more than copying 256 KiB; so buffers are kept.
"""

from __future__ import annotations

import mmap

_SMALLEST = 4096
_SLAB = 1 << 20  # smaller buffers are cut from one mapping of this size
_KEPT = 8 << 20  # free bytes kept for each size; larger buffers are not kept


def buffer_size(length: int) -> int:
    """Size of the buffer for a payload of `length` > 0 bytes."""
    return _SMALLEST if length <= _SMALLEST else 1 << (length - 1).bit_length()


class BufferPool:
    """Buffers of 4 KiB times a power of two. One thread.

    A buffer that something might still write to (its request failed or was cancelled) must not be given back: drop it.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[memoryview]] = {}

    def take(self, size: int) -> memoryview:
        """A buffer of `size` bytes, see buffer_size; its contents are old data."""
        free = self._free.get(size)
        if free:
            return free.pop()
        if size >= _SLAB:
            return _mapping(size)
        slab = _mapping(_SLAB)
        parts = [slab[start : start + size] for start in range(0, _SLAB, size)]
        first = parts.pop()
        self._free.setdefault(size, []).extend(parts)
        return first

    def give(self, buffer: memoryview) -> None:
        """Give back what `take` returned (not a part of it)."""
        size = len(buffer)
        free = self._free.setdefault(size, [])
        if (len(free) + 1) * size <= _KEPT:
            free.append(buffer)


def _mapping(size: int) -> memoryview:
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
