# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""MappedDisk: a MemoryBackend whose bytes native code may reach without it."""

from __future__ import annotations

import mmap
import os

from blockgraph.native import MapExtent, Windows
from blockgraph.testing.memory_backend import MemoryBackend, MemoryMap


class MappedDisk(MemoryBackend):
    """Its bytes are a file in memory, of which `reveal` maps ranges.

    Attributes:
        extents: of its map, empty at first.
        slot: the file in the map.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._fd = os.memfd_create("disk", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, size)
        self.data = mmap.mmap(self._fd, size)  # type: ignore[assignment]  # what tests use, both have
        self._view = memoryview(self.data)
        self.map = MemoryMap(size)
        self.extents = self.map.extents
        self.slot = self.extents.add_slot(self._fd)
        windows = Windows.of(self._fd)
        assert windows is not None
        self._windows = windows
        self.extents.set_windows(self.slot, windows)

    def reveal(self, offset: int = 0, length: int | None = None, *, writable: bool = True, zero: bool = False) -> None:
        """Map a range (None: to the end)."""
        length = self.size() - offset if length is None else length
        slot = None if zero else self.slot
        self.extents.insert(self.extents.generation(), [MapExtent(offset, length, slot, offset, writable)])

    def close(self) -> None:
        """Give the file up, when no request uses it any more."""
        self.extents.settle_blocking(self.extents.start_remove_slot(self.slot))
        self._windows.release()
        self._view.release()
        self.data.close()  # type: ignore[attr-defined]
        os.close(self._fd)
