# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Disks to measure on, and their descriptions, which blockgraph and QEMU read alike."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import blockgraph
from blockgraph.create import create_file

MIB = 1 << 20
GIB = 1 << 30


def dense(path: Path, size: int) -> None:
    """A file of random bytes."""
    block = random.Random(1).randbytes(16 * MIB)
    with path.open("wb") as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])


def sparse(path: Path, size: int, percent: int, run: int = MIB) -> None:
    """A file of which `percent` is data, in runs at random places."""
    rng = random.Random(2)
    block = rng.randbytes(run)
    with path.open("wb") as file:
        file.truncate(size)
        for index in rng.sample(range(size // run), size // run * percent // 100):
            file.seek(index * run)
            file.write(block)


def empty(path: Path, size: int, driver: str = "raw", **options: Any) -> None:
    """An image that reads as zeroes, or as its backing file; it replaces what was there."""
    path.unlink(missing_ok=True)
    asyncio.run(create_file(str(path), size, driver, replace=False, **options))


def dense_qcow2(path: Path, size: int) -> None:
    """An image of random bytes, its clusters in the order of the disk."""
    empty(path, size, "qcow2")
    block = random.Random(1).randbytes(16 * MIB)
    with blockgraph.open({"nodes": [node("disk", path, "qcow2")]}) as graph:
        disk = graph.backend("disk", writable=True)
        for start in range(0, size, len(block)):
            disk.pwrite(start, block[: size - start])


def touch_memory(directory: Path, size: int) -> None:
    """Have the memory at hand that files in a tmpfs are about to take.

    What a virtual machine has not used for some seconds may be its host's again, and costs many times as much; which
    side meets that is chance.
    """
    path = directory / "touched"
    dense(path, size)
    path.unlink()


def make(path: Path, size: int, driver: str) -> None:
    """A fully allocated image of random bytes."""
    (dense_qcow2 if driver == "qcow2" else dense)(path, size)


def node(name: str, path: Path, driver: str = "raw", **file: Any) -> dict[str, Any]:
    """The description of an image; `file` are further members of its protocol node, with "_" for "-"."""
    members = {key.replace("_", "-"): value for key, value in file.items()}
    return {"driver": driver, "node-name": name, "file": {"driver": "file", "filename": str(path), **members}}
