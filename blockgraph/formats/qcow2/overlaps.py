# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Overlaps: which host clusters hold metadata, so that guest data never lands on it, whatever a damaged image says."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable
from itertools import pairwise


class Overlaps:
    """Clusters of the header, the L1 table, the L2 tables, the refcount table and its blocks.

    A sorted array: 8 bytes a table, a look-up costs two bisections whatever the length asked about.

    Args:
        cluster_bits: of the image.
    """

    def __init__(self, cluster_bits: int) -> None:
        self._bits = cluster_bits
        self._clusters = array("Q")

    @property
    def clusters(self) -> array[int]:
        """Their numbers, sorted; to be looked at only, and not kept."""
        return self._clusters

    def fill(self, offsets: Iterable[int]) -> int | None:
        """Begin with clusters at these host offsets; returns one that came twice, None if there is none."""
        clusters = sorted(offset >> self._bits for offset in offsets)
        self._clusters = array("Q", clusters)
        for before, after in pairwise(clusters):
            if before == after:
                return before << self._bits
        return None

    def find(self, offset: int, length: int) -> int | None:
        """Host offset of the first metadata cluster that [offset, offset + length) touches."""
        at = bisect_left(self._clusters, offset >> self._bits)
        if at < len(self._clusters) and self._clusters[at] << self._bits < offset + length:
            return self._clusters[at] << self._bits
        return None

    def add(self, offset: int, clusters: int) -> None:
        """These clusters hold metadata now."""
        first = offset >> self._bits
        at = bisect_left(self._clusters, first)
        self._clusters[at:at] = array("Q", range(first, first + clusters))

    def remove(self, offset: int, clusters: int = 1) -> None:
        """These clusters no longer hold metadata."""
        first = offset >> self._bits
        low = bisect_left(self._clusters, first)
        high = bisect_left(self._clusters, first + clusters)
        del self._clusters[low:high]
