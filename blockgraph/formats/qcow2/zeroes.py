# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Zeroing and discard: entries rewritten, table by table, without touching data.

What becomes of a cluster (version 3; "keep": its host cluster stays, for the next write):

| cluster        | discard        | write zeroes | with MAY_UNMAP | cut off by truncate: EMPTY, then CUT_OFF |
|----------------|----------------|--------------|----------------|------------------------------------------|
| data           | zero           | zero, keep   | zero           | zero, then unallocated                   |
| zero, reserved | zero           | as it is     | zero           | same                                     |
| compressed     | zero           | zero         | zero           | same                                     |
| zero           | as it is       | as it is     | as it is       | as it is, then unallocated               |
| unallocated    | zero if backed | same         | same           | as it is                                 |

A discarded cluster becomes zero, not unallocated: what a backing file has there must not come back. Version 2 has no
zero clusters: without a backing file they become unallocated, with one these operations are not supported.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from blockgraph.native import L2Kind, L2Run

if TYPE_CHECKING:
    from blockgraph.formats.qcow2.driver import Qcow2


class Mode(enum.Enum):
    """See the module's table."""

    DISCARD = enum.auto()
    ZERO = enum.auto()
    ZERO_UNMAP = enum.auto()
    EMPTY = enum.auto()
    CUT_OFF = enum.auto()


_CUTTING = (Mode.EMPTY, Mode.CUT_OFF)
_PLACED = (L2Kind.DATA, L2Kind.ZERO_ALLOCATED)


async def rewrite(driver: Qcow2, first: int, end: int, mode: Mode) -> None:
    """Apply `mode` to guest clusters [first, end), in order; after an error those before it are done.

    Raises:
        NoSpace: no room for an L2 table.
    """
    image, mapping = driver.image, driver.mapping
    bits = image.l2_bits
    fill = driver.backed and mode not in _CUTTING
    while first < end:
        image.check_writable()
        await driver.writeback.relieve()
        index = first >> bits
        if not fill and not mapping.has_table(index):
            # An allocation under way may be about to link its clusters here, but has a table already.
            first = mapping.next_table(index) << bits
            if index >= mapping.l1_size:
                return
            continue
        stop = min(end, (index + 1) << bits)
        async with driver.busy.hold(first, stop):
            table = await mapping.table_for_write(index)
            start = first & (image.l2_entries - 1)
            for run in mapping.runs(table, start, start + stop - first):
                new = _new_run(driver, run, mode)
                if new is not None:
                    mapping.set_run(table, new)
                    if new.kind != L2Kind.ZERO_ALLOCATED:
                        driver.unlink_run(run, discard=mode not in _CUTTING)
        first = stop


def _new_run(driver: Qcow2, run: L2Run, mode: Mode) -> L2Run | None:
    """What the entries become; None: they stay."""
    plain = L2Run(run.first, run.clusters, L2Kind.ZERO, 0, False, 0)
    if mode is Mode.CUT_OFF or driver.image.header.version < 3:
        return None if run.kind == L2Kind.UNALLOCATED else plain._replace(kind=L2Kind.UNALLOCATED)
    if run.kind == L2Kind.ZERO:
        return None
    if run.kind == L2Kind.UNALLOCATED:
        return plain if driver.backed and mode is not Mode.EMPTY else None
    if mode is Mode.ZERO and run.kind in _PLACED and run.copied:
        return None if run.kind == L2Kind.ZERO_ALLOCATED else run._replace(kind=L2Kind.ZERO_ALLOCATED)
    return plain
