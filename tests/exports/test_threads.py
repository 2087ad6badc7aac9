# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Option `threads` of the NBD server."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from blockgraph.exports.nbd.server import start_server
from blockgraph.exports.options import NbdServerOptions
from tests.helpers.nbd import run_async


def options(path: Path, **more: Any) -> NbdServerOptions:
    return msgspec.convert({"addr": {"type": "unix", "path": str(path)}, **more}, NbdServerOptions)


def native_threads() -> int:
    found = 0
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread of another test that has just ended
            found += (task / "comm").read_text() == "bg-nbd\n"
    return found


@pytest.mark.parametrize("threads", [0, 1, 3])
@run_async
async def test_threads_as_many_are_started_and_ended(threads: int, tmp_path: Path) -> None:
    before = native_threads()
    server = await start_server(options(tmp_path / "s", threads=threads))
    assert native_threads() - before == threads
    await server.close()
    while native_threads() != before:  # a thread that has been joined may be listed a little longer
        os.sched_yield()


@run_async
async def test_threads_omitted_one_for_each_processor(tmp_path: Path) -> None:
    before = native_threads()
    server = await start_server(options(tmp_path / "s"))
    assert native_threads() - before == min(len(os.sched_getaffinity(0)), 8)
    await server.close()


@pytest.mark.parametrize("threads", [-1, 65, "2"])
def test_threads_out_of_range_is_refused(threads: object, tmp_path: Path) -> None:
    with pytest.raises(msgspec.ValidationError):
        options(tmp_path / "s", threads=threads)
