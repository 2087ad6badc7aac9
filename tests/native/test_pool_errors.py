# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""What a failed transfer keeps of the caller's buffer: nothing.

The traceback of an error lives as long as the error. CPython up to 3.12 crashes when its garbage collector finds, in
one cycle, a memoryview and something that still exports it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.loop import in_loop

from blockgraph.native import ExtentMap, MapExtent, get_pool
from blockgraph.native.pool import INLINE_MAX


@pytest.mark.parametrize("length", [4096, 4 * INLINE_MAX], ids=["inline", "on-a-thread"])
@pytest.mark.parametrize("op", ["pread", "pwrite"])
def test_transfer_failing_gives_the_buffer_back(tmp_path: Path, op: str, length: int) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(length))

    @in_loop
    async def run() -> None:
        fd = os.open(path, os.O_WRONLY if op == "pread" else os.O_RDONLY)
        buf = memoryview(bytearray(length))
        try:
            with pytest.raises(OSError, match="Bad file descriptor") as caught:
                await getattr(get_pool(), op)(fd, 0, buf)
            buf.release()  # BufferError while something exports it
            assert caught.value.__traceback__ is not None
        finally:
            os.close(fd)

    run()


@pytest.mark.parametrize("op", ["pread_into", "pwrite"])
def test_mapped_request_failing_gives_the_buffer_back(tmp_path: Path, op: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(4096))
    fd = os.open(path, os.O_WRONLY if op == "pread_into" else os.O_RDONLY)
    buf = memoryview(bytearray(4096))
    try:
        extents = ExtentMap(4096)
        extents.insert(extents.generation(), [MapExtent(0, 4096, extents.add_slot(fd), 0, writable=True)])
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            getattr(extents, op)(0, buf)
        buf.release()
        assert caught.value.__traceback__ is not None
    finally:
        os.close(fd)
