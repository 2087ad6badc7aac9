# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The alignment of direct I/O: what the kernel says, and what trying finds."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from blockgraph.protocols import direct
from blockgraph.protocols.direct import DirectAlignment, address_of, direct_alignment


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(65536))
    return path


def test_alignment_asked_works_for_real_reads(image: Path) -> None:
    fd = os.open(image, os.O_RDONLY | os.O_DIRECT)
    try:
        alignment = direct_alignment(fd)
        assert alignment is not None
        room = memoryview(bytearray(3 * 4096))
        start = -address_of(room) % 4096 + alignment.memory % 4096
        part = room[start : start + alignment.offset]
        assert address_of(part) % alignment.memory == 0
        assert os.preadv(fd, [part], alignment.offset) == alignment.offset
    finally:
        os.close(fd)


def test_alignment_probed_is_not_smaller_than_asked(image: Path) -> None:
    fd = os.open(image, os.O_RDONLY | os.O_DIRECT)
    try:
        probed, asked = direct._probe(fd), direct._ask(fd)
        assert probed is not None
        if asked is not None:
            assert probed.offset >= asked.offset
            assert probed.memory >= asked.memory
    finally:
        os.close(fd)


@pytest.mark.parametrize("block", [512, 1024, 4096])
def test_alignment_probed_is_first_that_reads(image: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        if len(buffers[0]) % block or address_of(buffers[0]) % block:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return len(buffers[0])

    monkeypatch.setattr(os, "preadv", preadv)
    with image.open("rb") as file:
        assert direct._probe(file.fileno()) == DirectAlignment(block, block)


def test_alignment_of_empty_file_is_the_most_careful(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    with path.open("rb") as file:
        assert direct._probe(file.fileno()) == DirectAlignment(4096, 4096)


def test_alignment_without_direct_io_is_none(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "preadv", preadv)
    with image.open("rb") as file:
        assert direct._probe(file.fileno()) is None
