# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Checksums of a disk (native/sums.h): a sum for each chunk, added to by copies in any order."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING

from blockgraph._native import ffi, lib
from blockgraph.native.check import check

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: Bytes that are hashed at once: what is added should begin and end at multiples of it, or at the disk's end.
SUM_BLOCK: int = lib.BG_SUM_BLOCK_BYTES

#: Bytes of one sum: two numbers of 64 bits, little-endian.
SUM_BYTES = 16

#: Chunks that `pages` gives at a time.
SUM_PAGE: int = lib.BG_SUMS_PAGE

#: Most chunks that a disk may have.
MAX_CHUNKS: int = lib.BG_SUMS_MAX_CHUNKS


class Sums:
    """A sum for each chunk of a disk. Any thread may call any method, but nobody adds during `reset`.

    Args:
        size: of the disk, bytes.
        chunk: bytes, a power of two from 4096 to 2 GiB.
    Raises:
        ValueError: another chunk, or more than MAX_CHUNKS of them.
    """

    __slots__ = ("chunk", "native", "size")

    def __init__(self, size: int, chunk: int) -> None:
        out = ffi.new("bg_sums **")
        try:
            code = lib.bg_sums_new(size, chunk, out)
        except OverflowError:
            code = -errno.EINVAL
        if code == -errno.EFBIG:
            raise ValueError(f"{size} bytes in chunks of {chunk} are more than {MAX_CHUNKS} chunks")
        if code == -errno.EINVAL:
            raise ValueError(f"size {size} or chunk {chunk} is out of range, or the chunk no power of two")
        check(code)
        self.native = ffi.gc(out[0], lib.bg_sums_free)
        self.size = size
        self.chunk = chunk

    @property
    def count(self) -> int:
        """Chunks."""
        return -(-self.size // self.chunk)

    def add(self, offset: int, buf: Buffer) -> None:
        """The disk's bytes at `offset` are these. A part of a block spoils its chunk."""
        with ffi.from_buffer(buf) as data:
            if lib.bg_sums_add(self.native, offset, data, len(data)) < 0:
                raise ValueError(f"{len(data)} bytes at {offset} are not inside the disk of {self.size}")

    def spoil(self, offset: int, length: int) -> None:
        """Nothing is known of the chunks that the range touches."""
        if lib.bg_sums_spoil(self.native, offset, length) < 0:
            raise ValueError(f"{length} bytes at {offset} are not inside the disk of {self.size}")

    def spoiled(self) -> Iterator[tuple[int, int]]:
        """Runs (offset, length) of spoiled chunks, the last one cut to the disk's end."""
        run = ffi.new("bg_bitmap_extent *")
        offset = 0
        while offset < self.size and check(lib.bg_sums_next_spoiled(self.native, offset, run)):
            offset = run.end
            yield run.start, run.end - run.start

    def reset(self, offset: int, length: int) -> None:
        """The chunks that the range touches: nothing was added, nothing is spoiled."""
        if lib.bg_sums_reset(self.native, offset, length) < 0:
            raise ValueError(f"{length} bytes at {offset} are not inside the disk of {self.size}")

    def read(self, index: int, count: int) -> bytes:
        """Sums of `count` chunks from `index` on: uint64[count][2], low half first, little-endian."""
        out = bytearray(count * SUM_BYTES)
        with ffi.from_buffer("uint64_t[]", out, require_writable=True) as numbers:
            if lib.bg_sums_read(self.native, index, count, numbers) < 0:
                raise ValueError(f"{count} chunks from {index} on are not inside the {self.count} there are")
        return bytes(out)

    def pages(self) -> Iterator[tuple[int, bytes]]:
        """Index of the first chunk and the sums of each SUM_PAGE chunks in which something was added, ascending."""
        index = 0
        while (index := lib.bg_sums_next(self.native, index)) >= 0:
            index -= index % SUM_PAGE
            count = min(SUM_PAGE, self.count - index)
            yield index, self.read(index, count)
            index += SUM_PAGE


def hash_block(which: int, block: Buffer, number: int) -> int | None:
    """For tests: the hash of one block, 4096 bytes, by this processor's implementation `which`, best first; None: there
    are no more."""
    out = ffi.new("uint64_t[2]")
    with ffi.from_buffer(block) as data:
        assert len(data) == SUM_BLOCK
        if lib.bg_sums_hash_block(which, data, number, out) < 0:
            return None
    return int(out[0]) | int(out[1]) << 64
