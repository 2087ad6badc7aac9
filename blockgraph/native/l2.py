# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""qcow2 tables read in bulk (native/qcow2_l2.h)."""

from __future__ import annotations

import sys
from array import array
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from blockgraph._native import ffi, lib
from blockgraph.native.check import check

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BATCH = 1024
_FIELDS = 6


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
    """

    table: bytearray
    first: int
    cluster_bits: int
    version: int
    host_end: int
    metadata: array[int]


class L2Part(NamedTuple):
    """Some entries of a table.

    Attributes:
        first: offset in the image of the first, bytes.
        position: of their bytes in `L2Parts.table`; -1: there is no table, all are unallocated.
        entries: how many.
        host: where they are in the file; -1: they need not be read.
    """

    # In the order of bg_l2_part: lists of these are handed to C as they are.
    first: int
    position: int
    entries: int
    host: int


class L2Parts(NamedTuple):
    """Parts of many tables, for an extent map to take at once (`ExtentMap.insert_parts`).

    Attributes:
        places: what they have in common; the table is all parts' entries, `first` is 0.
        parts: in any order.
        zeroes: what is unallocated reads as zeroes.
    """

    places: L2Places
    parts: list[L2Part]
    zeroes: bool


_KINDS = tuple(sorted(L2Kind))


def read_l2_parts(fd: int, parts: list[L2Part], table: bytearray) -> None:
    """Read the parts' entries, big-endian, from the image's file; zeroes past its end. Blocks, without the GIL.

    Raises:
        OSError: the storage failed.
    """
    native = ffi.new("bg_l2_part[]", parts)
    check(lib.bg_l2_read_parts(fd, native, len(parts), ffi.from_buffer(table), len(table)))


def decode_l2(
    table: Buffer,
    cluster_bits: int,
    version: int,
    *,
    start: int = 0,
    end: int | None = None,
    data_file: bool = False,
    most: int | None = None,
) -> list[L2Run]:
    """Decode entries [start, end) of a standard (not extended) L2 table into runs, in order and without gaps.

    Args:
        table: big-endian, 8 bytes an entry, contiguous; entry 0 first.
        cluster_bits: 9 to 21.
        version: 2 or 3.
        start, end: indexes; None: to the end of `table`.
        data_file: the image has an external data file, so that host offset 0 can be allocated.
        most: stop once there are more runs than that; the last may then be cut short. None: decode all.
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
    flat = ffi.cast("int64_t *", out)
    limit = sys.maxsize if most is None else most
    while start < stop and len(runs) <= limit:
        count = lib.bg_l2_decode(view, start, stop, cluster_bits, version, options, out, min(_BATCH, limit + 1))
        fields = iter(ffi.unpack(flat, _FIELDS * count))
        runs += [
            L2Run(first, clusters, _KINDS[kind], host, flags != 0, compressed)
            for first, clusters, kind, host, flags, compressed in zip(*[fields] * _FIELDS, strict=True)
        ]
        start = runs[-1].first + runs[-1].clusters
    return runs


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
