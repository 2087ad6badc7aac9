# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""RunList: the runs of one L2 table, decoded once and then kept up to date with the entries."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from blockgraph.native import L2Kind, L2Run

_PLACED = (L2Kind.DATA, L2Kind.ZERO_ALLOCATED)
_PLAIN = (L2Kind.UNALLOCATED, L2Kind.ZERO)


class RunList:
    """Runs that cover a table without gaps, ordered; neighbours that belong together are one run.

    Args:
        runs: as decode_l2 returns them for a whole table.
        cluster_bits: of the image.
    """

    __slots__ = ("_bits", "_runs", "_starts")

    def __init__(self, runs: list[L2Run], cluster_bits: int) -> None:
        self._runs = runs
        self._starts = [run.first for run in runs]
        self._bits = cluster_bits

    def __len__(self) -> int:
        return len(self._runs)

    def find(self, index: int) -> L2Run:
        """The run that entry `index` belongs to."""
        return self._runs[bisect_right(self._starts, index) - 1]

    def replace(self, new: L2Run) -> None:
        """The entries of `new` were changed to what it says."""
        end = new.first + new.clusters
        low = bisect_right(self._starts, new.first) - 1
        high = bisect_left(self._starts, end)
        first, last = self._runs[low], self._runs[high - 1]
        parts = []
        if first.first < new.first:
            parts.append(cut(first, first.first, new.first, self._bits))
        elif low:
            low -= 1
            parts.append(self._runs[low])
        parts.append(new)
        if end < last.first + last.clusters:
            parts.append(cut(last, end, last.first + last.clusters, self._bits))
        elif high < len(self._runs):
            parts.append(self._runs[high])
            high += 1
        merged = [parts[0]]
        for run in parts[1:]:
            if continues(merged[-1], run, self._bits):
                merged[-1] = merged[-1]._replace(clusters=merged[-1].clusters + run.clusters)
            else:
                merged.append(run)
        self._runs[low:high] = merged
        self._starts[low:high] = [run.first for run in merged]


def cut(run: L2Run, start: int, end: int, cluster_bits: int) -> L2Run:
    """Entries [start, end) of a run."""
    host = run.host_offset
    if run.kind in _PLACED:
        host += (start - run.first) << cluster_bits
    return run._replace(first=start, clusters=end - start, host_offset=host)


def continues(run: L2Run, after: L2Run, cluster_bits: int) -> bool:
    """Whether `after`, which follows `run`, is one run with it."""
    if run.kind != after.kind or run.copied != after.copied:
        return False
    if run.kind in _PLACED:
        return after.host_offset == run.host_offset + (run.clusters << cluster_bits)
    return run.kind in _PLAIN
