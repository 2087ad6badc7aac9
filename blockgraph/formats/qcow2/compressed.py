# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Compressed clusters: read, unpacked to exactly one cluster, and the last few kept for the next small read."""

from __future__ import annotations

import asyncio
import zlib
from collections import OrderedDict

import zstandard

from blockgraph.formats.qcow2.header import Compression
from blockgraph.formats.qcow2.image import Image
from blockgraph.native import L2Run

#: Bytes of unpacked clusters kept.
_KEEP = 4 << 20
#: Clusters up to this size are unpacked on the loop's thread: handing over costs more.
_INLINE = 16 << 10
#: Memory that the header of a zstd frame may ask for, bytes.
_MAX_WINDOW = 8 << 20


class CompressedClusters:
    """Reads compressed clusters of one image."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._most = max(2, _KEEP >> image.cluster_bits)
        self._kept: OrderedDict[tuple[int, int], bytes] = OrderedDict()

    async def read(self, run: L2Run) -> bytes:
        """The contents of a COMPRESSED run: one cluster.

        Raises:
            CorruptImage: the data is damaged, or unpacks to another length than a cluster.
        """
        key = (run.host_offset, run.compressed_length)
        data = self._kept.get(key)
        if data is not None:
            self._kept.move_to_end(key)
            return data
        await self._image.file.event("read_compressed")
        packed = await self._image.read(run.host_offset, run.compressed_length)
        unpack = _unzstd if self._image.header.compression == Compression.ZSTD else _inflate
        size = self._image.cluster_size
        try:
            if size <= _INLINE:
                data = unpack(packed, size)
            else:
                data = await asyncio.to_thread(unpack, packed, size)
        except (zlib.error, zstandard.ZstdError) as error:
            raise self._image.corrupt(f"compressed cluster at host offset {run.host_offset:#x}: {error}") from error
        if len(data) != size:
            raise self._image.corrupt(
                f"compressed cluster at host offset {run.host_offset:#x} has {len(data)} bytes instead of {size}"
            )
        self._kept[key] = data
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return data

    def forget(self) -> None:
        """Host clusters with compressed data are about to hold something else."""
        self._kept.clear()


def _inflate(packed: bytearray, size: int) -> bytes:
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size)


def _unzstd(packed: bytearray, size: int) -> bytes:
    # Streaming, since a one-shot call would allocate whatever the frame's header claims.
    reader = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).stream_reader(packed, read_across_frames=True)
    data = b""
    while len(data) < size and (part := reader.read(size - len(data))):
        data += part
    return data
