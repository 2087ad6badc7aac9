# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""fio as a client: many requests in flight, every byte verified."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.nbd import run_async, run_tool, serving


@pytest.mark.parametrize("jobs", [1, 4])
@run_async
async def test_fio_random_writes_are_verified(
    require_tool: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    fio = require_tool("fio")
    if "nbd" not in await run_tool(fio, "--enghelp"):
        require_tool("fio with its nbd engine")
    monkeypatch.chdir(tmp_path)  # fio keeps the state of the verification there
    async with serving(size=64 << 20) as served:
        output = await run_tool(
            fio,
            "--name=verify",
            "--ioengine=nbd",
            f"--uri={served.uri()}",
            "--rw=randrw",
            "--bssplit=512/10:4k/60:64k/25:1m/5",
            "--iodepth=16",
            f"--numjobs={jobs}",
            "--size=8m",
            f"--offset_increment={16 if jobs > 1 else 0}m",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--do_verify=1",
        )
        assert "err= 0" in output
        assert any(call.op == "pwrite" for call in served.disk.calls)
