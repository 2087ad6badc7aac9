# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Restoring a point in time to a new image or a device, and verifying it on the way.

```
    incremental   ......B.........  ──┐
    incremental   ...AA.A.........  ──┼─►  target   ...AA.B.........      each byte from the last backup that has it
    full          ────────────────  ──┘             ───  ─ ─────────
```

Of each backup what no later one hides is copied, natively where both sides can; the checksums of its chunks are made
while it is copied. What is hidden of a chunk that is copied in part is read, too: a checksum is of all of the chunk.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from blockgraph.backend import Backend
from blockgraph.block_copy import BlockCopy, CopyFailed
from blockgraph.chains.chain import Backup, Chain
from blockgraph.chains.images import ImageReader, alone
from blockgraph.chains.sumsfile import SumsFile
from blockgraph.create import create_file
from blockgraph.errors import GraphError
from blockgraph.graph.graph import Graph
from blockgraph.graph.policy import OpenPolicy
from blockgraph.native import Bitmap
from blockgraph.perm import ALL, Perm

_WORKERS = 4
_CHUNK = 8 << 20

#: Ranges that an error names.
_TOLD = 5


@dataclass
class Restored:
    """What a restore did.

    Attributes:
        point: what was restored.
        bytes: of the disk.
        damaged: image, and (offset, length) of ranges in the target that are not what was backed up.
    """

    point: Backup
    bytes: int
    damaged: list[tuple[str, int, int]] = field(default_factory=list)


async def restore(
    chain: Chain,
    point: Backup,
    target: str,
    *,
    image_format: str = "raw",
    force: bool = False,
    ignore: bool = False,
    direct: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Restored:
    """Write the disk as it was at `point` to `target`.

    Args:
        target: a new file, or a block device.
        image_format: "raw" or "qcow2".
        force: overwrite a file that exists, or a block device.
        ignore: go on where a backup is damaged, and tell the ranges.
        direct: write past the page cache (O_DIRECT), which then keeps what others need.
        progress: called with the bytes of the disk done, and all of them.
    Raises:
        GraphError: the chain is not complete; the target exists, or is too small; a backup is damaged (it names the
            ranges). A file that was made is removed again.
        IOFailure: of the target.
    """
    way = chain.way(point)
    parts = _parts(way)
    device = _check_target(target, way, point.manifest.disk.size, image_format, force=force)
    made = not device and not force
    if not device:
        await create_file(target, _file_size(point, image_format), image_format, replace=force)
    run = _Restore(point, ignore=ignore, progress=progress)
    try:
        file = {"driver": "host_device" if device else "file", "filename": target, "cache": {"direct": direct}}
        await run.run(parts, _target(file, image_format, point.manifest.disk.size))
        result = run.result
        if result.damaged and not ignore:
            raise _damaged(result)
    except BaseException:
        if made:
            os.unlink(target)
        raise
    return result


def _file_size(point: Backup, image_format: str) -> int:
    size = point.manifest.disk.size
    return size + -size % 512 if image_format == "qcow2" else size


def _check_target(target: str, way: list[Backup], size: int, image_format: str, *, force: bool) -> bool:
    """Refuse what must not be overwritten. True: it is a block device."""
    try:
        found = os.stat(target)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise GraphError(f"'{target}': {error.strerror}", op="restore") from error
    if any(os.path.exists(each.image) and os.path.samefile(each.image, target) for each in way):
        raise GraphError(f"'{target}' is part of the chain", op="restore", hint="give another target")
    if not force:
        raise GraphError(f"'{target}' exists", op="restore", hint="give another name, or --force to overwrite it")
    if stat.S_ISBLK(found.st_mode):
        fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
        try:
            there = os.lseek(fd, 0, os.SEEK_END)
        finally:
            os.close(fd)
        if image_format != "raw":
            raise GraphError(f"'{target}' is a block device, which is written raw", op="restore")
        if there < size:
            raise GraphError(f"'{target}' has {there} bytes, the disk has {size}", op="restore")
        return True
    if not stat.S_ISREG(found.st_mode):
        raise GraphError(f"'{target}' is neither a regular file nor a block device", op="restore")
    return False


def _target(file: dict[str, Any], image_format: str, size: int) -> dict[str, Any]:
    if image_format == "qcow2" and not size % 512:
        return {"driver": "qcow2", "file": file}
    # A device may be longer, and a qcow2 image has whole sectors.
    below = file if image_format == "raw" else {"driver": "qcow2", "file": file}
    return {"driver": "raw", "size": size, "file": below}


def _damaged(result: Restored) -> GraphError:
    ranges = ", ".join(f"{start} to {start + size} (of {image})" for image, start, size in result.damaged[:_TOLD])
    more = len(result.damaged) - _TOLD
    return GraphError(
        f"the backup is damaged: bytes {ranges}{f' and {more} more ranges' if more > 0 else ''}",
        node=result.point.manifest.image,
        op="restore",
        hint="'blockgraph verify' tells which points are good; --ignore restores it all the same",
    )


@dataclass
class _Part:
    """What a backup gives.

    Attributes:
        live: what no later backup hides.
        rest: what else is in the chunks of that.
    """

    backup: Backup
    expected: SumsFile
    live: Bitmap
    chunks: Bitmap
    rest: Bitmap


def _parts(way: list[Backup]) -> list[_Part]:
    """Newest first; those that give nothing are left out."""
    size = way[0].manifest.disk.size
    unit = min(backup.manifest.cluster_size for backup in way)
    missing = Bitmap(size, unit)
    missing.fill()
    parts: list[_Part] = []
    for backup in reversed(way):
        expected = backup.sums()
        covered = Bitmap(size, unit)
        covered.merge(expected.covered)
        live = missing.copy()
        live.subtract(_without(missing, covered))
        missing.subtract(covered)
        if not live.count():
            continue
        chunks = Bitmap(size, expected.chunk)
        chunks.merge(live)
        rest = Bitmap(size, unit)
        for offset, length in chunks.dirty_extents():
            for run in covered.dirty_extents(offset, offset + length):
                rest.set(*run)
        rest.subtract(live)
        parts.append(_Part(backup, expected, live, chunks, rest))
    if missing.count():
        raise GraphError(f"backup {way[0].manifest.short} does not have all of the disk", node=way[0].manifest.image)
    return parts


def _without(bits: Bitmap, other: Bitmap) -> Bitmap:
    left = bits.copy()
    left.subtract(other)
    return left


class _Restore:
    def __init__(self, point: Backup, *, ignore: bool, progress: Callable[[int, int], None]) -> None:
        self.result = Restored(point, point.manifest.disk.size)
        self._ignore = ignore
        self._progress = progress
        self._done = 0

    async def run(self, parts: list[_Part], target: dict[str, Any]) -> None:
        graph = Graph(OpenPolicy(follow=False))
        try:
            await graph.add_node({**target, "node-name": "target"})
            root = await graph.backend("target", writable=True, resize=False)
            for number, part in enumerate(parts):
                await self._copy(graph, f"image{number}", part, root)
                self._done += part.live.count()
            await root.flush()
        finally:
            await graph.close()

    async def _copy(self, graph: Graph, name: str, part: _Part, target: Backend) -> None:
        part.backup.check_image()
        node = await graph.add_node({**alone(part.backup), "node-name": name})
        if node.size() != part.live.size:
            raise GraphError(f"shows {node.size()} bytes, the disk had {part.live.size}", node=part.backup.image)
        source = await graph.backend(name, share=ALL & ~(Perm.WRITE | Perm.RESIZE))
        copy = BlockCopy(source.root, target.root, part.live.copy(), serialising=False)
        sums = copy.add_sums(part.expected.chunk)
        try:
            lost = await self._copy_all(copy, part)
            await copy.complete_sums(part.live)
        except CopyFailed as failure:
            raise failure.error from failure
        finally:
            await copy.forget_maps()
        reader = ImageReader(node, sums)
        await reader.read(part.rest.dirty_extents())
        wanted = part.live.copy()
        wanted.merge(part.rest)
        await reader.complete(wanted)
        wrong = [*part.expected.damaged(sums, part.chunks), *lost]
        for offset, length in sorted(set(wrong)):
            for start, size in part.live.dirty_extents(offset, offset + length):
                self.result.damaged.append((part.backup.manifest.image, start, size))
        await graph.close_backend(source)
        await graph.remove_node(name)

    async def _copy_all(self, copy: BlockCopy, part: _Part) -> list[tuple[int, int]]:
        """Returns what could not be read."""
        try:
            workers = [asyncio.create_task(self._worker(copy)) for _ in range(_WORKERS)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        except CopyFailed as failure:
            if failure.side == "target" or not self._ignore:
                raise
            return await self._copy_what_can_be(copy, part)
        return []

    async def _worker(self, copy: BlockCopy) -> None:
        while await copy.copy_next(_CHUNK) is not None:
            self._progress(self._done + copy.bytes_copied, self.result.bytes)

    async def _copy_what_can_be(self, copy: BlockCopy, part: _Part) -> list[tuple[int, int]]:
        lost: list[tuple[int, int]] = []
        unit = copy.cluster_size
        for offset, length in list(copy.bitmap.dirty_extents()):
            for start in range(offset, offset + length, unit):
                end = min(start + unit, offset + length)
                try:
                    await copy.copy(start, end)
                except CopyFailed as failure:
                    if failure.side == "target":
                        raise
                    lost.append((start, end - start))
        return lost
