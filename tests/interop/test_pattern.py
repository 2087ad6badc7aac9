# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""pattern gives the bytes of nbdkit's pattern plugin."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.harness import READ, opened, read


@pytest.mark.parametrize("size", [3 << 20, (1 << 17) + 5], ids=["even", "odd"])
def test_pattern_agrees_with_nbdkit(tmp_path: Path, require_tool: Callable[[str], str], size: int) -> None:
    theirs = tmp_path / "theirs"
    nbdcopy = require_tool("nbdcopy")
    command = [require_tool("nbdkit"), "-U", "-", "pattern", str(size), "--run", f'{nbdcopy} "$uri" {theirs}']
    subprocess.run(command, check=True, timeout=60)

    async def run() -> bytes:
        async with opened("pattern", size=size, need=READ) as child:
            return await read(child, 0, size)

    assert asyncio.run(run()) == theirs.read_bytes()[:size]
