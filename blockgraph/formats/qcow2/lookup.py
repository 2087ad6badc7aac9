# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Looking up many scattered runs at once, for extent maps.

```
    runs    [.]      [.]            [...]           what somebody is going to read or write
    tables   | L2 5   | L2 9, cached  | none        of tables on disk only the entries wanted are read, all by one call;
    parts   [e]      [e]             [ ]            those in memory are taken from there
```

Loading each table for one of its entries would cost thousands of times the bytes, and push out what the guest uses.

The entries are read beside the cache: so, where that had to wait for a device, a table that has come to be in memory
meanwhile, or has moved, is looked at there. What changes afterwards, or did so while it was being read, is revoked, so
the map refuses it.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blockgraph import debug
from blockgraph.driver import Lookup
from blockgraph.errors import CorruptImage
from blockgraph.native import L2Places

if TYPE_CHECKING:
    from blockgraph.formats.qcow2.driver import Qcow2
    from blockgraph.formats.qcow2.mapping import Mapping
    from blockgraph.native import L2Parts

_NO_METADATA = array("Q")


async def look_up(driver: Qcow2, runs: Sequence[tuple[int, int]], *, write: bool) -> Lookup | None:
    """See `Format.look_up`."""
    storage = driver.file.node
    fd = storage.driver.fd()
    if fd is None or storage.options.cache.direct or driver.image.damaged is not None or debug.enabled:
        return None
    image = driver.image
    parts = driver.mapping.parts(runs)
    _take_cached(driver.mapping, parts)
    try:
        if not parts.read_now(fd):
            await _read(driver.mapping, parts, fd)
    except OSError:
        return None  # who reads the table will tell
    writable = write and driver.writes_in_place(parts.indexes)
    end, metadata = image.file_end(), _NO_METADATA
    if writable:
        end, metadata = image.whole_end(), driver.refcounts.overlaps.clusters
    places = L2Places(parts.table, 0, image.cluster_bits, image.header.version, end, metadata, 0)
    return Lookup(parts, places, driver.cow() is None, storage, writable)


async def _read(mapping: Mapping, parts: L2Parts, fd: int) -> None:
    """Read them, and leave out what may have changed meanwhile."""
    changes = mapping.l1_changes
    await asyncio.to_thread(parts.read, fd)
    _take_cached(mapping, parts)
    if mapping.l1_changes != changes:
        for number, index in enumerate(parts.indexes):
            if mapping.tables.get(index) is None and _host(mapping, index, parts.entry(number)) != parts.host(number):
                parts.drop(number)


def _host(mapping: Mapping, index: int, entry: int) -> int:
    """Where an entry of a table is in the file; -1: there is no such table."""
    try:
        host = mapping.l1_entry(index)
    except CorruptImage:
        return 0  # who looks at it alone will tell
    return host + 8 * entry if host else -1


def _take_cached(mapping: Mapping, parts: L2Parts) -> None:
    """Tables in memory need not be read. One that lacks native writes may be up to date again by the time its entries
    have been read, unlike these."""
    for number, index in enumerate(parts.indexes):
        table = mapping.tables.get(index)
        if table is not None:
            mapping.catch_up(table)
            parts.take(number, table.buf)
        elif mapping.is_behind(index):
            parts.drop(number)
