# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""RunList against a fresh decoding of the table after every change."""

from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from blockgraph.formats.qcow2.overlaps import Overlaps
from blockgraph.formats.qcow2.runs import RunList
from blockgraph.native import L2Kind, L2Run, decode_l2

BITS = 9
ENTRIES = 64
KINDS = [L2Kind.UNALLOCATED, L2Kind.ZERO, L2Kind.ZERO_ALLOCATED, L2Kind.DATA]
PLACED = (L2Kind.DATA, L2Kind.ZERO_ALLOCATED)

changes = st.tuples(
    st.integers(0, ENTRIES - 1), st.integers(1, ENTRIES), st.sampled_from(KINDS), st.integers(1, 40), st.booleans()
)


def entries(run: L2Run) -> list[int]:
    if run.kind not in PLACED:
        return [1 if run.kind == L2Kind.ZERO else 0] * run.clusters
    flags = (1 << 63 if run.copied else 0) | (run.kind == L2Kind.ZERO_ALLOCATED)
    return [run.host_offset + (i << BITS) | flags for i in range(run.clusters)]


@settings(max_examples=200, deadline=None)
@given(st.lists(changes, max_size=12))
def test_replaced_runs_equal_a_fresh_decoding(steps: list[tuple[int, int, L2Kind, int, bool]]) -> None:
    table = [0] * ENTRIES
    runs = RunList(decode_l2(struct.pack(f">{ENTRIES}Q", *table), BITS, 3), BITS)
    for first, count, kind, host, copied in steps:
        count = min(count, ENTRIES - first)
        placed = kind in PLACED
        new = L2Run(first, count, kind, (host << BITS) * placed, copied and placed, 0)
        table[first : first + count] = entries(new)
        runs.replace(new)
        fresh = decode_l2(struct.pack(f">{ENTRIES}Q", *table), BITS, 3)
        assert [runs.find(i) for i in range(ENTRIES)] == [
            next(run for run in fresh if run.first <= i < run.first + run.clusters) for i in range(ENTRIES)
        ]
        assert len(runs) == len(fresh)


ranges = st.tuples(st.booleans(), st.integers(0, 60), st.integers(1, 8))


@settings(deadline=None)
@given(st.lists(ranges, max_size=20), st.integers(0, 70 << BITS), st.integers(1, 10 << BITS))
def test_overlaps_equal_a_set(steps: list[tuple[bool, int, int]], offset: int, length: int) -> None:
    overlaps, model = Overlaps(BITS), set[int]()
    for add, first, count in steps:
        clusters = set(range(first, first + count))
        if add and not model & clusters:
            overlaps.add(first << BITS, count)
            model |= clusters
        elif not add:
            overlaps.remove(first << BITS, count)
            model -= clusters
    hit = [c for c in sorted(model) if c << BITS < offset + length and offset < (c + 1) << BITS]
    assert overlaps.find(offset, length) == (hit[0] << BITS if hit else None)
