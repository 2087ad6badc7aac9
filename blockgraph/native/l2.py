# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""qcow2 tables read, and linked, in bulk (native/qcow2_l2.h)."""

from __future__ import annotations

import errno
from array import array
from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from blockgraph._native import ffi, lib
from blockgraph.native.check import check

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BATCH = 1024
_FIELDS = 6
_PART_FIELDS = 4


class L2Kind(IntEnum):
    """What an L2 entry says about its cluster."""

    UNALLOCATED = lib.BG_L2_UNALLOCATED
    ZERO = lib.BG_L2_ZERO
    ZERO_ALLOCATED = lib.BG_L2_ZERO_ALLOCATED
    DATA = lib.BG_L2_DATA
    COMPRESSED = lib.BG_L2_COMPRESSED
    INVALID = lib.BG_L2_INVALID


class L2Run(NamedTuple):
    """Entries in a row that are of one kind, contiguous on the host, and equal in `copied`."""

    first: int
    """Index of the first entry."""
    clusters: int
    """Entries in the run."""
    kind: L2Kind
    host_offset: int
    """Bytes, of the first cluster; 0 for UNALLOCATED and ZERO; INVALID: the entry as found (signed 64 bits)."""
    copied: bool
    """The refcount is exactly one, says the entry."""
    compressed_length: int
    """Bytes from host_offset to the end of the last sector with compressed data; 0 unless COMPRESSED."""


class L2Places(NamedTuple):
    """A table of many short runs, for an extent map to take at once (`ExtentMap.insert_places`).

    Attributes:
        table: big-endian, as in the file; it must not change until it is taken.
        first: offset in the image of entry 0, bytes.
        cluster_bits, version: as for decode_l2.
        host_end: end of the file, bytes; a multiple of the cluster size.
        metadata: numbers of the host clusters that guest data must not be written to, sorted.
        host: where the table is in the file; 0: it is not there yet as it is here.
    """

    table: bytearray
    first: int
    cluster_bits: int
    version: int
    host_end: int
    metadata: array[int]
    host: int


class L2Parts:
    """The entries that say where scattered runs of an image are, of many tables, for an extent map to take at once
    (`ExtentMap.insert_parts`). A part is some entries of one table.

    Args:
        runs: (offset, end) in the image, bytes, not empty.
        l1: the L1 table, big-endian. An entry that breaks the specification or leads past host_end has no part.
        cluster_bits: 9 to 21; tables have a cluster of 8-byte entries.
        host_end: end of the file, bytes.

    Attributes:
        indexes: of the parts' tables in the L1 table.
        table: the parts' entries, big-endian, one part's after another's.
    """

    __slots__ = ("_cluster_bits", "_native", "_table_bits", "indexes", "native", "table")

    def __init__(self, runs: Sequence[tuple[int, int]], l1: bytearray, cluster_bits: int, host_end: int) -> None:
        flat = [bound for run in runs for bound in run]
        most = 2 * len(runs) + 64  # what there is no room for is looked up alone
        self._native = ffi.new("bg_l2_part[]", most)
        size = ffi.new("int64_t *")
        count = lib.bg_l2_find_parts(
            ffi.from_buffer(l1), len(l1) // 8, cluster_bits, host_end, flat, len(runs), self._native, most, size
        )
        if count < 0:
            raise ValueError("runs are empty or reversed, or cluster_bits is not 9 to 21")
        self.native: Any = self._native[0:count]
        self.table = bytearray(size[0])
        self._cluster_bits, self._table_bits = cluster_bits, 2 * cluster_bits - 3
        fields = iter(ffi.unpack(ffi.cast("int64_t *", self._native), _PART_FIELDS * count) if count else ())
        self.indexes = [first >> self._table_bits for first, *_ in zip(*[fields] * _PART_FIELDS, strict=True)]

    def __len__(self) -> int:
        return len(self.indexes)

    def host(self, number: int) -> int:
        """Where the entries of a part are in the file; -1: nowhere, or they need not be read."""
        return int(self.native[number].host)

    def entry(self, number: int) -> int:
        """Index in its table of the first entry of a part."""
        part: int = self.native[number].first
        return (part & ((1 << self._table_bits) - 1)) >> self._cluster_bits

    def take(self, number: int, table: bytearray) -> None:
        """A part's entries are those of its table, which is in memory, and need not be read."""
        part = self.native[number]
        if part.position < 0:
            self.drop(number)  # there was none
        else:
            entry = self.entry(number)
            size = 8 * part.count
            self.table[part.position : part.position + size] = table[8 * entry : 8 * entry + size]
            part.host = -1

    def drop(self, number: int) -> None:
        """Leave a part out."""
        self.native[number].count = 0
        self.native[number].host = -1

    def dropped(self, number: int) -> bool:
        """Whether it is left out."""
        return bool(self.native[number].count == 0)

    def read_now(self, fd: int) -> bool:
        """`read`, if nothing has to be waited for. False: some may have been read."""
        code = self._read(fd, now=True)
        if code == -errno.EAGAIN:
            return False
        check(code)
        return True

    def read(self, fd: int) -> None:
        """Read the entries from the image's file; zeroes past its end. Blocks, without the GIL.

        Raises:
            OSError: the storage failed.
        """
        check(self._read(fd, now=False))

    def _read(self, fd: int, *, now: bool) -> int:
        into = ffi.from_buffer(self.table)
        return int(lib.bg_l2_read_parts(fd, self.native, len(self), into, len(self.table), now))


_KINDS = tuple(sorted(L2Kind))


def decode_l2(
    table: Buffer,
    cluster_bits: int,
    version: int,
    *,
    start: int = 0,
    end: int | None = None,
    data_file: bool = False,
) -> list[L2Run]:
    """Decode entries [start, end) of a standard (not extended) L2 table into runs, in order and without gaps.

    Args:
        table: big-endian, 8 bytes an entry, contiguous; entry 0 first.
        cluster_bits: 9 to 21.
        version: 2 or 3.
        start, end: indexes; None: to the end of `table`.
        data_file: the image has an external data file, so that host offset 0 can be allocated.
    Raises:
        ValueError: an argument is out of range, or `table` is not a multiple of 8 bytes.
    Source: qcow2 specification, "Cluster mapping". Each entry that breaks it is a run of kind INVALID.
    """
    view, entries = _entries(table, 8)
    stop = entries if end is None else end
    if not 0 <= start <= stop <= entries:
        raise ValueError(f"entries {start} to {stop} are not inside a table of {entries}")
    if not 9 <= cluster_bits <= 21 or version not in (2, 3):
        raise ValueError(f"cluster_bits must be 9 to 21 and version 2 or 3, not {cluster_bits} and {version}")
    options = lib.BG_L2_DATA_FILE if data_file else 0
    runs: list[L2Run] = []
    out = ffi.new("bg_l2_run[]", _BATCH)
    while start < stop:
        count = lib.bg_l2_decode(view, start, stop, cluster_bits, version, options, out, _BATCH)
        runs += _unpack_runs(out, count)
        start = runs[-1].first + runs[-1].clusters
    return runs


def decode_few_l2(table: Buffer, cluster_bits: int, version: int, *, most: int) -> list[L2Run] | None:
    """What `decode_l2` finds in the whole table; None: it has more runs than that.

    Raises:
        ValueError: `table` is not a multiple of 8 bytes.
    """
    view, entries = _entries(table, 8)
    out = ffi.new("bg_l2_run[]", most + 1)
    count = lib.bg_l2_decode(view, 0, entries, cluster_bits, version, 0, out, most + 1)
    return None if count > most else _unpack_runs(out, count)


def _unpack_runs(out: Any, count: int) -> list[L2Run]:
    fields = iter(ffi.unpack(ffi.cast("int64_t *", out), _FIELDS * count))
    return [
        L2Run(first, clusters, _KINDS[kind], host, flags != 0, compressed)
        for first, clusters, kind, host, flags, compressed in zip(*[fields] * _FIELDS, strict=True)
    ]


def link_l2(table: bytearray, cluster_bits: int, links: bytes | bytearray) -> tuple[int, int]:
    """Put an allocator's links (`Allocator.take_links`) into the standard L2 table that they are of.

    Args:
        table: a power of two of entries.
    Returns:
        First and end of the entries that have changed.
    Raises:
        ValueError: a link does not fit what is there; those before it are in.
    """
    low, high = ffi.new("int64_t *"), ffi.new("int64_t *")
    view, items = ffi.from_buffer(table), ffi.from_buffer("bg_allocator_link[]", links)
    bits = (len(table) // 8).bit_length() - 1
    if lib.bg_l2_link(view, bits, cluster_bits, items, len(items), low, high) < 0:
        raise ValueError("a link does not fit the table")
    return low[0], high[0]


def next_nonzero_u64(table: Buffer, start: int = 0) -> int | None:
    """Index of the first 8-byte entry at or after `start` that is not zero; None: there is none.

    Raises:
        ValueError: start is past the table's end, or `table` is not a multiple of 8 bytes.
    """
    view, entries = _entries(table, 8)
    if not 0 <= start <= entries:
        raise ValueError(f"entry {start} is not inside a table of {entries}")
    index = lib.bg_next_nonzero_u64(view, start, entries)
    return None if index == entries else int(index)


def free_run_refcount16(block: Buffer, want: int, start: int = 0) -> tuple[int, int]:
    """Find `want` free clusters in a row in a refcount block of 16-bit entries.

    Returns:
        (index, want) of the first such run; else (index, length) of the free run at the block's end, for the search
        to go on in the next block; (entries, 0) when the block's last entry is in use.
    Raises:
        ValueError: start is past the block's end, want is below 1, or `block` is not a multiple of 2 bytes.
    """
    view, entries = _entries(block, 2)
    if not 0 <= start <= entries or not 1 <= want < 2**63:
        raise ValueError(f"no {want} entries can be found from entry {start} of {entries} on")
    length = ffi.new("int64_t *")
    index = lib.bg_refcount16_free_run(view, start, entries, want, length)
    return int(index), int(length[0])


def _entries(table: Buffer, width: int) -> tuple[object, int]:
    view = ffi.from_buffer(table)
    entries, rest = divmod(len(view), width)
    if rest:
        raise ValueError(f"a table of {width}-byte entries can not have {len(view)} bytes")
    return view, entries
