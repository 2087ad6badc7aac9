# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The proof: plain reads of two files, compared byte by byte. blockgraph only turns a qcow2 backup into a raw file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from blockgraph.api import aopen
from blockgraph.native import is_zero

_PIECE = 1 << 20


@dataclass(frozen=True)
class Difference:
    """Outcome of a comparison.

    Attributes:
        clusters: of 64 KiB, that differ.
        first: offset of the first byte that differs; None: none does.
        same_size: the files are of one size.
    """

    clusters: int
    first: int | None
    same_size: bool

    @property
    def equal(self) -> bool:
        """The files are the same, byte by byte."""
        return self.same_size and self.first is None


CLUSTER = 64 << 10


def compare(one: Path, other: Path) -> Difference:
    """Compare two files."""
    clusters, first = 0, None
    with one.open("rb", buffering=0) as a, other.open("rb", buffering=0) as b:
        same_size = os.fstat(a.fileno()).st_size == os.fstat(b.fileno()).st_size
        offset = 0
        while True:
            left, right = a.read(_PIECE), b.read(_PIECE)
            if left != right:
                for start in range(0, max(len(left), len(right)), CLUSTER):
                    x, y = left[start : start + CLUSTER], right[start : start + CLUSTER]
                    if x != y:
                        clusters += 1
                        if first is None:
                            pairs = enumerate(zip(x, y, strict=False))
                            first = offset + start + next((i for i, (p, q) in pairs if p != q), min(len(x), len(y)))
            if not left and not right:
                return Difference(clusters, first, same_size)
            offset += max(len(left), len(right))


def copy_file(source: Path, target: Path) -> None:
    """Copy a file and its holes."""
    with source.open("rb", buffering=0) as a, target.open("wb", buffering=0) as b:
        size = os.fstat(a.fileno()).st_size
        b.truncate(size)
        offset = 0
        while offset < size:
            try:
                offset = os.lseek(a.fileno(), offset, os.SEEK_DATA)
            except OSError:  # ENXIO: holes only from here on
                return
            end = os.lseek(a.fileno(), offset, os.SEEK_HOLE)
            while offset < end:
                data = os.pread(a.fileno(), min(_PIECE, end - offset), offset)
                os.pwrite(b.fileno(), data, offset)
                offset += len(data)


async def restore(backup: Path, backup_format: str, target: Path) -> None:
    """Write what a backup contains into a raw file."""
    nodes = [{"node-name": "backup", "driver": backup_format, "read-only": True}]
    nodes[0]["file"] = {"driver": "file", "filename": str(backup)}
    async with await aopen({"nodes": nodes}) as graph:
        backend = await graph.backend("backup")
        buf = memoryview(bytearray(_PIECE))
        with target.open("wb", buffering=0) as file:
            file.truncate(backend.size())
            for offset in range(0, backend.size(), _PIECE):
                part = buf[: backend.size() - offset]
                await backend.pread_into(offset, part)
                if not is_zero(part):
                    os.pwrite(file.fileno(), part, offset)
