# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Holes of files in memory: which are found, and whether every page was looked at for that."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from helpers.loop import in_loop

from blockgraph.extent import Status
from blockgraph.native import get_pool, is_dense
from blockgraph.protocols import holes
from blockgraph.protocols.descriptor import KEEP_SIZE, PUNCH_HOLE
from blockgraph.protocols.holes import find_run

MIB = 1 << 20
PAGE = 4096
SIZE = 64 * MIB + 100
MIDDLE = 32 * MIB


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where a region's end has been looked for."""
    found: list[int] = []
    lseek = os.lseek

    def counted(fd: int, offset: int, whence: int) -> int:
        if whence == os.SEEK_HOLE:
            found.append(offset)
        return lseek(fd, offset, whence)

    monkeypatch.setattr(os, "lseek", counted)
    return found


@pytest.fixture
def dense(tmpfs: Path) -> Iterator[int]:
    """A file of SIZE bytes without holes."""
    path = tmpfs / "disk"
    path.write_bytes(b"d" * SIZE)
    with path.open("r+b") as file:
        yield file.fileno()


@pytest.mark.parametrize("offset", [0, 1, 5 * MIB, SIZE - 16 * MIB])
def test_where_there_are_none_nothing_is_walked_over(dense: int, walks: list[int], offset: int) -> None:
    assert find_run(dense, offset, SIZE) == (SIZE - offset, Status.DATA)
    assert find_run(dense, offset, 16 * MIB) == (16 * MIB, Status.DATA)
    assert is_dense(dense, offset, SIZE - offset) is not bool(walks)  # kernels before 6.5 can not tell


def test_no_question_takes_long(dense: int, walks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holes, "_MOST", 20 * MIB)
    told = is_dense(dense, 0, SIZE)
    assert find_run(dense, MIB, SIZE) == (20 * MIB if told else SIZE - MIB, Status.DATA)


def test_short_runs_are_not_worth_the_question(dense: int, walks: list[int]) -> None:
    assert find_run(dense, SIZE - MIB, SIZE) == (MIB, Status.DATA)
    assert find_run(dense, 0, MIB) == (SIZE, Status.DATA)
    assert walks == [SIZE - MIB, 0]


async def allocated(fd: int) -> None:
    """The second half is allocated, and was never written."""
    os.ftruncate(fd, MIDDLE)
    os.posix_fallocate(fd, 0, SIZE)


async def hole(fd: int) -> None:
    """A page is missing."""
    await get_pool().fallocate(fd, PUNCH_HOLE | KEEP_SIZE, MIDDLE, PAGE)


async def behind_the_end(fd: int) -> None:
    """One is missing, and another there behind the end."""
    await hole(fd)
    await get_pool().fallocate(fd, KEEP_SIZE, SIZE + PAGE, PAGE)


@pytest.mark.parametrize("change", [allocated, hole, behind_the_end])
@in_loop
async def test_holes_are_found(dense: int, change: Callable[[int], Awaitable[None]]) -> None:
    await change(dense)
    assert find_run(dense, 0, SIZE) == (MIDDLE, Status.DATA)
    assert find_run(dense, MIDDLE, SIZE) == (None if change is allocated else (PAGE, Status.ZERO))
    if change is not allocated:
        assert find_run(dense, MIDDLE + PAGE, SIZE) == (SIZE - MIDDLE - PAGE, Status.DATA)


def test_elsewhere_the_file_system_is_asked(tmp_path: Path, walks: list[int]) -> None:
    """Pages in the page cache say nothing about storage."""
    path = tmp_path / "disk"
    with path.open("w+b") as file:
        file.truncate(SIZE)
        while file.read(MIB):
            pass
        fd = file.fileno()
        assert find_run(fd, 0, SIZE) is None
        os.pwrite(fd, b"d" * MIB, 0)
        assert find_run(fd, 0, SIZE) == (MIB, Status.DATA)
        assert walks == [0]
