# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""MappedDisk: a MemoryBackend whose bytes native code may reach without it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

from blockgraph.native import MapExtent, Windows
from blockgraph.testing.memory_backend import MemoryBackend, MemoryMap


class MappedDisk(MemoryBackend):
    """Its bytes are a file in memory, of which `reveal` maps ranges.

    Attributes:
        tells: what is looked up becomes known.
        extents: of its map, empty at first.
        slot: the file in the map.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.tells = True
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

    async def look_up(self, runs: Sequence[tuple[int, int]]) -> None:
        await super().look_up(runs)
        for offset, end in runs if self.tells else ():
            self.reveal(offset, end - offset)

    def close(self) -> None:
        """Give the file up, when no request uses it any more."""
        self.extents.settle_blocking(self.extents.start_remove_slot(self.slot))
        self._windows.release()
        self._view.release()
        self.data.close()  # type: ignore[attr-defined]
        os.close(self._fd)
