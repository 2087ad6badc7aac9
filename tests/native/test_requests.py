# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Requests of an extent map without cffi (native/python/requests.c): codes, bytes, and nothing kept."""

from __future__ import annotations

import errno
import gc
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blockgraph.native import ExtentMap, MapExtent
from blockgraph.native.requests import Requests

SIZE = 8192
MISS = 1
DATA = bytes(range(256)) * (SIZE // 256)


@pytest.fixture
def image(tmp_path: Path) -> Iterator[int]:
    """A descriptor."""
    path = tmp_path / "image"
    path.write_bytes(DATA)
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.fixture
def extents(image: int) -> ExtentMap:
    """A map of which the second half is a miss."""
    made = ExtentMap(SIZE)
    made.insert(made.generation(), [MapExtent(0, SIZE // 2, made.add_slot(image), 0, writable=True)])
    return made


@pytest.fixture
def requests(extents: ExtentMap) -> Requests:
    return extents.requests


def test_reads_and_writes_what_is_mapped(requests: Requests, image: int) -> None:
    buf = bytearray(100)
    assert requests.pread_into(7, buf) == 0
    assert buf == DATA[7:107]
    assert requests.pread(7, 100) == DATA[7:107]
    assert requests.pread(7, 0) == b""
    assert requests.pwrite(7, b"new") == 0
    assert os.pread(image, 4, 6) == DATA[6:7] + b"new"


@pytest.mark.parametrize(
    "offset, length, code",
    [
        (SIZE // 2, 1, MISS),
        (SIZE // 2 - 1, 2, MISS),
        (SIZE, 1, -errno.EINVAL),
        (-1, 1, -errno.EINVAL),
        (-2, 1, -errno.EINVAL),
        (1 << 62, 1, -errno.EINVAL),
        (1 << 63, 1, -errno.EINVAL),
        (-(1 << 63), 1, -errno.EINVAL),
        (1 << 200, 1, -errno.EINVAL),
        (-(1 << 200), 1, -errno.EINVAL),
    ],
)
def test_what_was_not_done_has_a_code(requests: Requests, image: int, offset: int, length: int, code: int) -> None:
    buf = bytearray(b"x" * length)
    assert requests.pread_into(offset, buf) == code
    assert requests.pread(offset, length) == code
    assert requests.pwrite(offset, buf) == code
    assert buf == b"x" * length
    assert os.pread(image, SIZE, 0) == DATA


def test_system_s_error_is_the_code(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(DATA)
    fd = os.open(tmp_path / "image", os.O_RDONLY)
    extents = ExtentMap(SIZE)
    extents.insert(extents.generation(), [MapExtent(0, SIZE, extents.add_slot(fd), 0, writable=True)])
    assert extents.requests.pwrite(0, b"x") == -errno.EBADF
    os.close(fd)


class Index:
    def __index__(self) -> int:
        return 7


def test_offset_may_be_anything_that_is_an_integer(requests: Requests) -> None:
    assert requests.pread(Index(), 2) == DATA[7:9]  # type: ignore[arg-type]
    assert requests.pread(True, 2) == DATA[1:3]


@pytest.mark.parametrize("offset", [None, "0", 0.0, b"\0"])
def test_offset_that_is_none_is_refused(requests: Requests, offset: Any) -> None:
    for call in (lambda: requests.pread(offset, 1), lambda: requests.pread_into(offset, bytearray(1))):
        with pytest.raises(TypeError, match="integer"):
            call()
    with pytest.raises(TypeError, match="integer"):
        requests.pwrite(offset, b"x")


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("name", ["pread", "pread_into", "pwrite"])
def test_wrong_number_of_arguments_is_refused(requests: Requests, name: str, count: int) -> None:
    with pytest.raises(TypeError, match=f"not {count} arguments"):
        getattr(requests, name)(*([0] * count))


@pytest.mark.parametrize(
    "buf", [b"read-only", memoryview(b"read-only"), memoryview(bytearray(8))[::2], "text", 5, None]
)
def test_buffer_that_can_not_be_filled_is_refused(requests: Requests, buf: Any) -> None:
    with pytest.raises((BufferError, TypeError)):
        requests.pread_into(0, buf)


@pytest.mark.parametrize("buf", [memoryview(b"12345678")[::2], "text", 5, None])
def test_buffer_that_has_no_bytes_in_a_row_is_refused(requests: Requests, buf: Any) -> None:
    with pytest.raises((BufferError, TypeError)):
        requests.pwrite(0, buf)


@pytest.mark.parametrize("length", [-1, 1 << 70])
def test_length_that_is_none_is_refused(requests: Requests, length: int) -> None:
    with pytest.raises((SystemError, OverflowError)):
        requests.pread(0, length)


@pytest.mark.parametrize("offset", [0, SIZE // 2, SIZE, "0"])
def test_nothing_is_kept_of_a_request(requests: Requests, offset: Any) -> None:
    buf = bytearray(10)
    place = (1 << 40) + 1 if offset == SIZE else offset
    before = sys.getrefcount(buf), sys.getrefcount(place), sys.getrefcount(requests)
    for _ in range(1000):
        for call, argument in ((requests.pread_into, buf), (requests.pwrite, buf), (requests.pread, 10)):
            try:
                call(place, argument)  # type: ignore[operator]
            except TypeError:
                assert offset == "0"
    del call
    buf.append(0)  # BufferError while something exports it
    assert (sys.getrefcount(buf), sys.getrefcount(place), sys.getrefcount(requests)) == before


def test_map_lives_as_long_as_its_requests(image: int) -> None:
    extents = ExtentMap(SIZE)
    extents.insert(extents.generation(), [MapExtent(0, SIZE, extents.add_slot(image), 0)])
    native, pread = extents.native, extents.requests.pread
    held = sys.getrefcount(native)
    del extents
    gc.collect()
    assert sys.getrefcount(native) == held - 1  # the map object's own
    assert pread(0, 10) == DATA[:10]
    del pread
    gc.collect()
    assert sys.getrefcount(native) == held - 2


@pytest.mark.parametrize("op", ["pread_into", "pwrite", "pread"])
def test_other_threads_go_on_meanwhile(tmpfs: Path, op: str) -> None:
    size = 64 << 20
    with (tmpfs / "image").open("w+b") as file:
        file.truncate(size)
        extents = ExtentMap(size)
        extents.insert(extents.generation(), [MapExtent(0, size, extents.add_slot(file.fileno()), 0, writable=True)])
        argument: Any = size if op == "pread" else bytearray(size)
        ticks: list[float] = []
        over = threading.Event()

        def tick() -> None:
            while not over.wait(0.0001):
                ticks.append(time.perf_counter())

        other = threading.Thread(target=tick)
        other.start()
        try:
            for _ in range(100):  # the processors may be at something else
                ticks.clear()
                start = time.perf_counter()
                getattr(extents.requests, op)(0, argument)
                end = time.perf_counter()
                edge = (end - start) / 4
                if any(start + edge < at < end - edge for at in list(ticks)):
                    return
        finally:
            over.set()
            other.join()
    pytest.fail("none did")
