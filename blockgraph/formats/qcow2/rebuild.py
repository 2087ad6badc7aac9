# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Rebuilding refcounts by walking everything that refers to clusters, for images with the dirty bit (an image with lazy
refcounts that was not closed). The bit stays set until the new counts are durable, so a crash repeats the work.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable

from blockgraph.errors import CorruptImage
from blockgraph.formats.qcow2.header import INCOMPATIBLE, Incompatible
from blockgraph.formats.qcow2.image import Image
from blockgraph.formats.qcow2.mapping import L2Table, Mapping
from blockgraph.formats.qcow2.refcount import Refcounts
from blockgraph.formats.qcow2.writeback import WriteBack
from blockgraph.native import L2Kind

log = logging.getLogger(__name__)


async def rebuild(
    image: Image,
    refcounts: Refcounts,
    mapping: Mapping,
    writeback: WriteBack,
    bitmaps: Iterable[tuple[int, int]],
) -> None:
    """Count all references, put the counts into the refcount blocks and clear the dirty bit.

    Args:
        bitmaps: (host offset, clusters) of what persistent bitmaps take.
    Raises:
        CorruptImage: clusters are used twice, or the image has parts that are not walked here; nothing was written.
        NoSpace: the refcount table is too small.
    """
    log.warning("node '%s': was not closed by its last user, rebuilding its refcounts", image.node.name)
    if image.header.snapshots:
        raise _refuse(image, "refcounts are stale, and it has snapshots")
    counts = _Counts(image)
    header = image.header
    counts.add(0, 1)
    counts.add(header.reftable_offset, header.reftable_clusters << image.cluster_bits)
    if header.l1_size:
        counts.add(header.l1_offset, header.l1_size * 8)
    for offset in refcounts.table_offsets():
        image.check_table("a refcount table entry", offset)
        counts.add(offset, image.cluster_size)
    for offset, clusters in bitmaps:
        counts.add(offset, clusters << image.cluster_bits)
    index = mapping.next_table(0)
    while index < mapping.l1_size:
        host = mapping.l1_entry(index)
        counts.add(host, image.cluster_size)
        table = L2Table(index, host, await image.read(host, image.cluster_size))
        for run in mapping.runs(table, 0, image.l2_entries):
            if run.kind == L2Kind.COMPRESSED:
                counts.add(run.host_offset, run.compressed_length, shared=True)
            elif run.kind in (L2Kind.DATA, L2Kind.ZERO_ALLOCATED):
                counts.add(run.host_offset, run.clusters << image.cluster_bits)
        index = mapping.next_table(index + 1)
    await refcounts.replace(counts.blocks, writeback.relieve)
    await writeback.run()
    image.header.incompatible &= ~int(Incompatible.DIRTY)
    await image.write(INCOMPATIBLE, image.header.incompatible.to_bytes(8, "big"))
    await image.file.flush()


class _Counts:
    """References per host cluster, by refcount block; only blocks with references take memory."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._per_block = image.cluster_size // 2
        self.blocks: dict[int, array[int]] = {}
        self._shared: set[int] = set()

    def add(self, offset: int, length: int, *, shared: bool = False) -> None:
        """Count one reference to each cluster of a range; only compressed data may share clusters, with its like."""
        bits = self._image.cluster_bits
        for cluster in range(offset >> bits, -(-(offset + length) >> bits)):
            index, at = divmod(cluster, self._per_block)
            block = self.blocks.get(index)
            if block is None:
                block = self.blocks[index] = array("H", bytes(2 * self._per_block))
            if block[at] and not (shared and cluster in self._shared):
                raise _refuse(self._image, f"the cluster at host offset {cluster << bits:#x} is used twice")
            if shared:
                self._shared.add(cluster)
            if block[at] == 0xFFFF:
                raise _refuse(self._image, f"the cluster at host offset {cluster << bits:#x} is used too often")
            block[at] += 1


def _refuse(image: Image, reason: str) -> CorruptImage:
    return CorruptImage(
        reason, node=image.node.name, op="open", hint="run 'qemu-img check -r all' on it, or open it read-only"
    )
