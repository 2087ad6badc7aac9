# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The images of a chain: descriptions of nodes, and reading what an image itself has, for its checksums.

Each image is opened alone, without its parent: what is read is what this backup has, and damage is its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from blockgraph.errors import BlockGraphError
from blockgraph.extent import Status
from blockgraph.native import Bitmap, CopyError, CopyExtent, CopyFlag, Sums, allocate_aligned, get_pool
from blockgraph.resolve import Pins

if TYPE_CHECKING:
    from blockgraph.chains.chain import Backup
    from blockgraph.node import Node

#: Bytes of data, and pieces, that are read at once, by several threads.
_BATCH = 32 << 20
_PIECES = 512

_BUFFER = 1 << 20


def file_description(path: str) -> dict[str, Any]:
    """A read-only file, to be described inside its format."""
    return {"driver": "file", "filename": path, "read-only": True}


def alone(backup: Backup) -> dict[str, Any]:
    """The node of one image, without its parent; as long as the disk, where qcow2 has rounded that up to sectors."""
    described = _image(backup)
    if backup.manifest.image_format == "qcow2":
        described["backing"] = None
        if size := backup.manifest.disk.size % 512 and backup.manifest.disk.size:
            return {"driver": "raw", "size": size, "read-only": True, "file": described}
    return described


def _image(backup: Backup) -> dict[str, Any]:
    return {"driver": backup.manifest.image_format, "read-only": True, "file": file_description(backup.image)}


def whole(way: Iterable[Backup]) -> dict[str, Any]:
    """The node of a point in time: an image over its parent's, and so on. Nothing that an image names is followed."""
    described: dict[str, Any] | None = None
    for backup in way:
        top = _image(backup)
        if described is not None:
            top["backing"] = described
        elif backup.manifest.image_format == "qcow2":
            top["backing"] = None
        described = top
    assert described is not None
    return described


class ImageReader:
    """Reads ranges of a node and adds them to sums.

    Args:
        sums: what to add to.
        progress: called with the bytes of each step.

    Attributes:
        unreadable: (offset, length, why) of what could not be read; not added.
    """

    def __init__(self, node: Node, sums: Sums, progress: Callable[[int], None] = lambda length: None) -> None:
        self.unreadable: list[tuple[int, int, str]] = []
        self._node = node
        self._sums = sums
        self._progress = progress
        self._extents: list[CopyExtent] = []
        self._batched = 0

    async def read(self, runs: Iterable[tuple[int, int]]) -> None:
        """Add the ranges (offset, length), at block borders; none twice."""
        pins = Pins()
        try:
            for offset, length in runs:
                pos, end = offset, offset + length
                while pos < end:
                    pos += await self._step(pins, pos, end)
                    if self._batched >= _BATCH or len(self._extents) >= _PIECES:
                        await self._flush(pins)
            await self._flush(pins)
        finally:
            await pins.release()

    async def _step(self, pins: Pins, pos: int, end: int) -> int:
        try:
            leaf = await pins.read(self._node, pos, end - pos)
        except BlockGraphError as error:
            length = min(end - pos, self._sums.chunk - pos % self._sums.chunk)
            self.unreadable.append((pos, length, str(error)))
            return length
        if leaf.status is Status.SPECIAL:
            await self._read_buffered(pos, leaf.length)
        elif leaf.status is Status.DATA:
            assert leaf.storage is not None
            fd = leaf.storage.driver.fd()
            assert fd is not None
            flags = CopyFlag.SUM | CopyFlag.READ_ONLY
            self._extents.append(CopyExtent(fd, leaf.storage_offset, -1, 0, leaf.length, flags, pos))
            self._batched += leaf.length
        else:
            self._progress(leaf.length)
        return leaf.length

    async def _flush(self, pins: Pins) -> None:
        extents, self._extents, self._batched = self._extents, [], 0
        if extents:
            try:
                await get_pool(asyncio.get_running_loop()).copy(extents, sums=self._sums)
            except CopyError as error:
                for index in error.incomplete:  # what was added of them can not be told
                    self._sums.spoil(extents[index].sum_offset, extents[index].length)
            self._progress(sum(extent.length for extent in extents))
        await pins.release()

    async def _read_buffered(self, offset: int, length: int) -> None:
        buf = allocate_aligned(min(length, _BUFFER))
        for at in range(offset, offset + length, len(buf)):
            part = buf[: offset + length - at]
            try:
                await self._node.pread(at, part)
            except BlockGraphError as error:
                self.unreadable.append((at, len(part), str(error)))
            else:
                self._sums.add(at, part)
            self._progress(len(part))

    async def complete(self, wanted: Bitmap) -> None:
        """When all is read: once more what spoiled, piece by piece.

        Args:
            wanted: all that was to be added.
        """
        for offset, length in self._sums.spoiled():
            self._sums.reset(offset, length)
            for start, size in wanted.dirty_extents(offset, offset + length):
                await self._read_buffered(start, size)
