# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Write logs: what QEMU's blklogwrites wrote is read here, and the reverse."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.loop import graph_of, in_loop

from blockgraph.filters.log_format import LogFlag
from blockgraph.testing import WriteLog

SIZE = 1 << 20


def qemu_io(tool: str, folder: Path, *commands: str, **members: str) -> None:
    """Run commands of qemu-io on `disk` through blklogwrites with `log`."""
    options = ",".join(f"{key.replace('_', '-')}={value}" for key, value in members.items())
    image = f"driver=blklogwrites,file.filename={folder / 'disk'},log.filename={folder / 'log'},{options}"
    run = [tool, "--image-opts", image.rstrip(",")]
    for command in commands:
        run += ["-c", command]
    subprocess.run(run, check=True, capture_output=True, timeout=60)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    (tmp_path / "log").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize("sector", [512, 4096])
def test_log_written_by_qemu_is_read(require_tool: Callable[[str], str], folder: Path, sector: int) -> None:
    qemu_io(
        require_tool("qemu-io"),
        folder,
        "write -P 1 0 64k",
        "write -z 4k 8k",
        "flush",
        "write -P 2 128k 12k",
        "flush",
        log_sector_size=str(sector),
    )
    log = WriteLog((folder / "log").read_bytes())
    assert log.sector_size == sector
    assert sum(bool(entry.flags & LogFlag.FLUSH) for entry in log.entries) >= 2
    assert log.replay(base=bytes(SIZE)) == (folder / "disk").read_bytes()


@in_loop
async def test_log_begun_here_is_continued_by_qemu(require_tool: Callable[[str], str], folder: Path) -> None:
    tool = require_tool("qemu-io")
    files = [{"node-name": name, "driver": "file", "filename": str(folder / name)} for name in ("disk", "log")]
    async with graph_of(*files, {"node-name": "it", "driver": "log-writes", "file": "disk", "log": "log"}) as graph:
        disk = await graph.backend("it", writable=True)
        await disk.pwrite(4096, b"a" * 8192)
        await disk.discard(65536, 65536)
        await disk.write_zeroes(4096, 512)
        await disk.flush()
    ours = len(WriteLog((folder / "log").read_bytes()))
    qemu_io(tool, folder, "write -P 98 512k 4k", "flush", log_append="on")
    log = WriteLog((folder / "log").read_bytes())
    assert len(log) > ours
    assert log.replay(base=bytes(SIZE)) == (folder / "disk").read_bytes()
