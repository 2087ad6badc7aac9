# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Native requests that are under way for as long as a test wants."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from blockgraph._native import ffi, lib
from blockgraph.native import ExtentMap


@contextmanager
def native_request(
    extents: ExtentMap, offset: int, length: int, *, write: bool = False
) -> Iterator[list[tuple[int, int, int]]]:
    """A request of native code that has begun and does not end before the block does; its pieces (slot, offset in the
    storage, length). It moves no bytes; a write marks what it would have written."""
    pieces, held = ffi.new("bg_map_piece[8]"), ffi.new("bg_map_request *")
    assert lib.bg_map_begin(extents.native, offset, length, write, pieces, 8, held) == 0
    try:
        yield [(p.slot, p.storage_offset, p.length) for p in pieces[0 : held.count]]
    finally:
        lib.bg_map_end(extents.native, held, 1)
