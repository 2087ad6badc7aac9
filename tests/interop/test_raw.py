# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""A raw window shows the bytes that QEMU's raw driver shows."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.harness import opened, read, write


@pytest.mark.parametrize("offset, size", [(0, 65536), (512, 4096), (4096, None)], ids=["head", "middle", "rest"])
def test_raw_window_agrees_with_qemu(
    tmp_path: Path, require_tool: Callable[[str], str], offset: int, size: int | None
) -> None:
    image, theirs = tmp_path / "image", tmp_path / "theirs"
    image.write_bytes(os.urandom(1 << 20))
    window: dict[str, Any] = {"offset": offset} if size is None else {"offset": offset, "size": size}

    async def run() -> bytes:
        async with (
            opened("file", "below", filename=str(image)) as below,
            opened("raw", file="below", children={"file": below.node}, **window) as disk,
        ):
            await write(disk, 100, b"written here")
            await disk.flush()
            return await read(disk, 0, disk.node.size())

    ours = asyncio.run(run())
    described = {"driver": "raw", "file": {"driver": "file", "filename": str(image)}, **window}
    command = [require_tool("qemu-img"), "convert", "-O", "raw", f"json:{json.dumps(described)}", str(theirs)]
    subprocess.run(command, check=True, timeout=60)
    assert theirs.read_bytes() == ours
