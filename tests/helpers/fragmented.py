# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""A fragmented qcow2 image, all of which is allocated, in a moment: only its tables take room."""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Mapping
from pathlib import Path

COPIED = 1 << 63


def fragmented(path: Path, size: int, cluster_bits: int, content: Mapping[int, bytes] | None = None) -> Path:
    """Make it. No two neighbours of the disk are neighbours in the file.

    Args:
        size: a power of two.
        content: the first bytes of clusters of the disk, by number; the rest are zeroes.
    Source: QEMU docs/interop/qcow2.rst.
    """
    cluster, entries = 1 << cluster_bits, 1 << (cluster_bits - 3)
    clusters = size >> cluster_bits
    tables = clusters // entries
    l1_clusters = -(-tables // entries)
    counts = cluster // 2
    blocks = -(-(clusters + tables + l1_clusters + 2) // (counts - 1))  # which are counted, too
    l1_at = (2 + blocks) * cluster
    l2_at = l1_at + l1_clusters * cluster
    data_at = l2_at + tables * cluster
    head = (b"QFI\xfb", 3, 0, 0, cluster_bits, size, 0, tables, l1_at, cluster, 1, 0, 0, 0, 0, 0, 4, 104)
    refcounts = array("Q", [(2 + i) * cluster for i in range(blocks)])
    l1 = array("Q", [COPIED | (l2_at + i * cluster) for i in range(tables)])
    # An odd factor permutes the clusters.
    places = [data_at + i * 0x9E3779B1 % clusters * cluster for i in range(clusters)]
    l2 = array("Q", [COPIED | place for place in places])
    for table in (refcounts, l1, l2):
        table.byteswap()
    with path.open("wb") as file:
        file.write(struct.pack(">4sIQIIQIIQQIIQQQQII", *head).ljust(cluster, b"\0"))
        file.write(refcounts.tobytes().ljust(cluster, b"\0"))
        file.write((b"\0\1" * (data_at // cluster + clusters)).ljust(blocks * cluster, b"\0"))
        file.write(l1.tobytes().ljust(l1_clusters * cluster, b"\0") + l2.tobytes())
        file.truncate(data_at + size)
        for number, data in (content or {}).items():
            os.pwrite(file.fileno(), data, places[number])
    return path
