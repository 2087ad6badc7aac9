# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Zero detection, and buffers fit for O_DIRECT."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from blockgraph._native import ffi, lib

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BATCH = 256


class ZeroRun(NamedTuple):
    """Bytes [offset, offset + length) of a buffer: all zero, or no block of them all zero."""

    offset: int
    length: int
    is_zero: bool


def is_zero(buf: Buffer) -> bool:
    """Whether every byte of `buf` (contiguous) is zero; an empty buffer is. Stops at the first that is not."""
    view = ffi.from_buffer(buf)
    return bool(lib.bg_is_zero(view, len(view)))


def zero_runs(buf: Buffer, granularity: int) -> Iterator[ZeroRun]:
    """Split `buf` into maximal runs of zero and non-zero blocks.

    Args:
        buf: contiguous; must not change while the iterator is in use.
        granularity: bytes of a block, counted from the buffer's start, at least 1; the last block may be short.
    Raises:
        ValueError: granularity below 1.
    """
    if granularity < 1:
        raise ValueError(f"granularity must be at least 1, not {granularity}")
    view = ffi.from_buffer(buf)
    runs = ffi.new("bg_zero_run[]", _BATCH)
    start = 0
    while count := lib.bg_zero_runs(view, len(view), granularity, start, runs, _BATCH):
        for offset, length, zero in _triples(ffi.unpack(ffi.cast("uint64_t *", runs), 3 * count)):
            yield ZeroRun(offset, length, bool(zero))
            start = offset + length


def _triples(values: list[int]) -> Iterator[tuple[int, int, int]]:
    each = iter(values)
    return zip(each, each, each, strict=True)


def allocate_aligned(length: int, alignment: int = 4096) -> memoryview:
    """A zeroed writable buffer at a multiple of `alignment`, for O_DIRECT. Freed with the last view of it.

    Args:
        length: bytes, at least 0.
        alignment: a power of two, at most the page size.
    Raises:
        ValueError: an argument is out of range.
        MemoryError: no memory.
    """
    if length < 0:
        raise ValueError(f"length must not be negative: {length}")
    if alignment < 1 or alignment & (alignment - 1) or alignment > mmap.PAGESIZE:
        raise ValueError(f"alignment must be a power of two up to {mmap.PAGESIZE}, not {alignment}")
    try:
        # An anonymous mapping starts at a page.
        return memoryview(mmap.mmap(-1, max(length, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))[:length]
    except (OSError, OverflowError) as error:
        raise MemoryError(f"can not allocate {length} bytes") from error
