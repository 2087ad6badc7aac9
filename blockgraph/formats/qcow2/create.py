# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Creating an image.

```
    | header | refcount table | refcount blocks | L1 table | L2 tables | data |
                                                            with preallocation only
```

The header is written last, after a flush, so a file that was cut short by a crash is no image.
"""

from __future__ import annotations

import struct
from typing import Literal, Protocol

from blockgraph.errors import OptionError, Unsupported
from blockgraph.formats.qcow2.header import (
    COPIED,
    LAZY_REFCOUNTS,
    MAX_BACKING_NAME,
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MAX_REFTABLE_BYTES,
    MIN_CLUSTER_BITS,
    WRITTEN_LENGTH,
    Compression,
    Extension,
    Header,
    Incompatible,
    l1_entries,
)

#: Bytes written at once.
_CHUNK = 4 << 20


class Target(Protocol):
    """What an image can be created on: an edge with WRITE and RESIZE, a backend, or anything that acts like one."""

    async def pwrite(self, offset: int, buf: memoryview, /) -> None: ...
    async def truncate(self, size: int, /) -> None: ...
    async def flush(self) -> None: ...


async def create_image(
    file: Target,
    size: int,
    *,
    cluster_size: int = 65536,
    compat: Literal["0.10", "1.1"] = "1.1",
    backing_file: str | None = None,
    backing_fmt: str | None = None,
    preallocation: Literal["off", "metadata"] = "off",
    lazy_refcounts: bool = False,
    compression_type: Literal["zlib", "zstd"] = "zlib",
) -> None:
    """Make `file` an empty qcow2 image. What it held before is lost.

    Args:
        size: of the disk, bytes, a multiple of 512.
        cluster_size: bytes, a power of two, 512 to 2 MiB.
        compat: "0.10" is version 2, "1.1" version 3.
        backing_file, backing_fmt: as stored in the image; not opened.
        preallocation: "metadata": all clusters are allocated, so that no write has to (`file` must be resizable).
        lazy_refcounts: users of the image may postpone refcount updates.
        compression_type: of clusters compressed later.
    Raises:
        OptionError: naming the argument.
        IOFailure: `file` could not be written; it is then no image.
    """
    header = _plan_header(size, cluster_size, compat, backing_file, backing_fmt, lazy_refcounts, compression_type)
    layout = _Layout(header, preallocation == "metadata")
    if preallocation == "metadata" and backing_file:
        raise _bad("preallocation", preallocation, "would hide the backing file")
    try:
        await file.truncate(0)
        await file.truncate(layout.end)
    except Unsupported:
        if preallocation != "off":
            raise
    await _write_counts(file, layout)
    await _write_mapping(file, layout)
    await file.flush()
    await _write(file, 0, header.pack())
    await file.flush()


def _plan_header(
    size: int,
    cluster_size: int,
    compat: str,
    backing_file: str | None,
    backing_fmt: str | None,
    lazy_refcounts: bool,
    compression_type: str,
) -> Header:
    bits = cluster_size.bit_length() - 1
    if cluster_size != 1 << bits or not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
        raise _bad("cluster-size", cluster_size, "not a power of two from 512 to 2097152")
    if size < 0 or size % 512:
        raise _bad("size", size, "not a multiple of 512")
    entries = l1_entries(size, bits)
    if entries * 8 > MAX_L1_BYTES:
        raise _bad("size", size, f"too much for clusters of {cluster_size} bytes")
    if compat not in ("0.10", "1.1"):
        raise _bad("compat", compat, "neither '0.10' (version 2) nor '1.1' (version 3)")
    header = Header(3 if compat == "1.1" else 2, bits, size, entries, 0, cluster_size, 0)
    if header.version >= 3:
        header.length = WRITTEN_LENGTH
        header.compatible = LAZY_REFCOUNTS if lazy_refcounts else 0
    elif lazy_refcounts:
        raise _bad("lazy-refcounts", True, "needs compat '1.1'")
    if compression_type == "zstd":
        if header.version < 3:
            raise _bad("compression-type", compression_type, "needs compat '1.1'")
        header.compression = Compression.ZSTD
        header.incompatible = Incompatible.COMPRESSION_TYPE
    elif compression_type != "zlib":
        raise _bad("compression-type", compression_type, "neither 'zlib' nor 'zstd'")
    if backing_fmt is not None and backing_file is None:
        raise _bad("backing-fmt", backing_fmt, "without a backing-file")
    if backing_file:
        if len(backing_file.encode()) > MAX_BACKING_NAME:
            raise _bad("backing-file", backing_file, f"longer than {MAX_BACKING_NAME} bytes")
        header.backing_file = backing_file
        if backing_fmt is not None:
            header.extensions.append((Extension.BACKING_FORMAT, backing_fmt.encode()))
    try:
        header.pack()
    except ValueError:
        raise _bad("backing-file", backing_file, f"too long for clusters of {cluster_size} bytes") from None
    return header


class _Layout:
    """Where everything goes, in clusters; completes the header.

    Attributes:
        blocks, blocks_at: refcount blocks and the first one's cluster.
        l2, l2_at: L2 tables (preallocation only).
        data, data_at: data clusters (preallocation only).
        used: clusters in use, all from 0 on.
        end: size of the file, bytes.
    """

    def __init__(self, header: Header, preallocate: bool) -> None:
        self.header = header
        bits = header.cluster_bits
        l1 = -(-header.l1_size * 8 >> bits)
        self.data = -(-header.size >> bits) if preallocate else 0
        self.l2 = header.l1_size if preallocate else 0
        self.blocks = table = 1
        while True:
            self.used = 1 + table + self.blocks + l1 + self.l2 + self.data
            blocks = -(-self.used * 2 >> bits)
            if (blocks, -(-blocks * 8 >> bits)) == (self.blocks, table):
                break
            self.blocks, table = blocks, -(-blocks * 8 >> bits)
        if table << bits > MAX_REFTABLE_BYTES:
            raise _bad("preallocation", "metadata", "needs too large a refcount table: use a larger cluster-size")
        self.blocks_at = 1 + table
        self.l2_at = self.blocks_at + self.blocks + l1
        self.data_at = self.l2_at + self.l2
        self.end = self.used << bits
        header.reftable_clusters = table
        header.l1_offset = (self.blocks_at + self.blocks) << bits


async def _write_counts(file: Target, layout: _Layout) -> None:
    bits = layout.header.cluster_bits
    table = b"".join(((layout.blocks_at + i) << bits).to_bytes(8, "big") for i in range(layout.blocks))
    await _write(file, layout.header.reftable_offset, table.ljust(layout.header.reftable_clusters << bits, b"\0"))
    counts = b"\0\1" * min(layout.used, _CHUNK // 2)
    start, total = layout.blocks_at << bits, layout.blocks << bits
    for done in range(0, total, _CHUNK):
        here = min(max(layout.used * 2 - done, 0), _CHUNK)
        await _write(file, start + done, counts[:here].ljust(min(total - done, _CHUNK), b"\0"))


async def _write_mapping(file: Target, layout: _Layout) -> None:
    header = layout.header
    bits = header.cluster_bits
    await _write_entries(file, header.l1_offset, layout.l2_at, layout.l2, header.l1_size, bits)
    await _write_entries(file, layout.l2_at << bits, layout.data_at, layout.data, layout.l2 << (bits - 3), bits)


async def _write_entries(file: Target, offset: int, first: int, used: int, count: int, bits: int) -> None:
    """A table, up to the end of its last cluster: `used` entries for the clusters from `first` on, then zeroes."""
    count = -(-count * 8 >> bits) << (bits - 3)
    step = _CHUNK // 8
    for start in range(0, count, step):
        here = min(max(used - start, 0), step)
        low = (first + start << bits) | COPIED
        entries = struct.pack(f">{here}Q", *range(low, low + (here << bits), 1 << bits))
        await _write(file, offset + start * 8, entries.ljust(min(count - start, step) * 8, b"\0"))


async def _write(file: Target, offset: int, data: bytes) -> None:
    if data:
        await file.pwrite(offset, memoryview(data))


def _bad(name: str, value: object, why: str) -> OptionError:
    return OptionError(f"{value!r} is {why}" if not why.startswith("needs") else why, path=name, value=value)
