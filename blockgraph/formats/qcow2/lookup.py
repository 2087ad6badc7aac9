# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Looking up many scattered runs at once, for extent maps.

```
    runs    [.]      [.]            [...]           what somebody is going to read
    tables   | L2 5   | L2 9, cached  | none        of tables on disk only the entries wanted are read, all by one call;
    parts   [e]      [e]             [ ]            those in memory are taken from there
```

Loading each table for one of its entries would cost thousands of times the bytes, and push out what the guest uses.

The entries are read beside the cache: so a table that has come to be in memory meanwhile, or has moved, is looked at
there. What changes afterwards, or did so while it was being read, is revoked, so the map refuses it.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blockgraph import debug
from blockgraph.driver import Lookup
from blockgraph.errors import CorruptImage
from blockgraph.native import L2Part, L2Parts, L2Places, read_l2_parts

if TYPE_CHECKING:
    from blockgraph.formats.qcow2.driver import Qcow2


async def look_up(driver: Qcow2, runs: Sequence[tuple[int, int]]) -> Lookup | None:
    """See `Format.look_up`."""
    storage = driver.file.node
    fd = storage.driver.fd()
    if fd is None or storage.driver.request_alignment != 1 or driver.image.damaged is not None or debug.enabled:
        return None
    image, mapping = driver.image, driver.mapping
    changes = mapping.l1_changes
    found = _parts(driver, runs)
    table = bytearray(8 * sum(part.entries for part in found if part.position >= 0))
    if any(part.host >= 0 for part in found):
        try:
            await asyncio.to_thread(read_l2_parts, fd, found, table)
        except OSError:
            return None  # who reads the table will tell
    parts = []
    for part in found:
        index = part.first >> image.cluster_bits + image.l2_bits
        first = (part.first >> image.cluster_bits) & (image.l2_entries - 1)
        cached = mapping.tables.get(index)
        if cached is not None and part.position >= 0:
            mapping.catch_up(cached)
            table[part.position : part.position + 8 * part.entries] = cached.buf[8 * first : 8 * (first + part.entries)]
        elif cached is not None or mapping.is_behind(index):
            continue
        if cached is None and mapping.l1_changes != changes and _host(driver, index, first) != part.host:
            continue
        parts.append(part)
    places = L2Places(table, 0, image.cluster_bits, image.header.version, image.file_end(), array("Q"))
    return Lookup(L2Parts(places, parts, driver.cow() is None), storage)


def _parts(driver: Qcow2, runs: Sequence[tuple[int, int]]) -> list[L2Part]:
    """The parts of the tables that say where the runs are; those in memory need not be read."""
    bits, l2_bits = driver.image.cluster_bits, driver.image.l2_bits
    parts, position = [], 0
    for offset, end in runs:
        cluster, stop = offset >> bits, ((end - 1) >> bits) + 1
        while cluster < stop:
            index = cluster >> l2_bits
            count = min(stop, (index + 1) << l2_bits) - cluster
            try:
                host = _host(driver, index, cluster & (driver.image.l2_entries - 1))
            except CorruptImage:
                pass  # who looks at the run alone will tell
            else:
                if driver.mapping.tables.get(index) is not None:
                    parts.append(L2Part(cluster << bits, position, count, -1))
                    position += 8 * count
                elif driver.mapping.is_behind(index):
                    pass  # by the time the entries have been read the table may be up to date again, unlike these
                elif host < 0:
                    parts.append(L2Part(cluster << bits, -1, count, -1))
                else:
                    parts.append(L2Part(cluster << bits, position, count, host))
                    position += 8 * count
            cluster += count
    return parts


def _host(driver: Qcow2, index: int, entry: int) -> int:
    """Where an entry of a table is in the file; -1: there is no such table."""
    host = driver.mapping.l1_entry(index)
    return host + 8 * entry if host else -1
