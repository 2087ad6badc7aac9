# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""The disk of the demo: an ext4 file system with Python's library and some large files in it.

Where there is no mke2fs (package e2fsprogs) the disk holds a generated pattern instead, with holes in it.
"""

from __future__ import annotations

import os
import random
import shutil
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from blockgraph.demo.tools import find_tool, run_tool
from blockgraph.errors import BlockGraphError

#: Part of the disk that is filled with files.
_FILL = 0.45
#: Of which at most so many bytes are small, real files.
_MAX_SMALL = 48 << 20

_PIECE = 4 << 20


@dataclass(frozen=True)
class Disk:
    """A disk that was made.

    Attributes:
        path: of the raw image.
        size: bytes.
        contents: "ext4" or "pattern".
        files: number of files in it.
    """

    path: Path
    size: int
    contents: str
    files: int

    @property
    def stored(self) -> int:
        """Bytes of storage the image takes."""
        return self.path.stat().st_blocks * 512


async def make_disk(path: Path, size: int, seed: int) -> Disk:
    """Make the disk's image.

    Raises:
        BlockGraphError: mke2fs failed.
        OSError: no room.
    """
    rng = random.Random(seed)
    mke2fs = find_tool("mke2fs")
    if mke2fs is None:
        _fill_pattern(path, size, rng)
        return Disk(path, size, "pattern", 0)
    with tempfile.TemporaryDirectory(prefix="files-", dir=path.parent) as folder:
        files = _make_files(Path(folder), int(size * _FILL), rng)
        with path.open("wb") as image:
            image.truncate(size)
        # A fixed block size, no reserved blocks: nothing that depends on the machine's mke2fs.conf.
        command = [mke2fs, "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-L", "demo", "-d", folder, str(path)]
        status, output = await run_tool(command)
        if status:
            raise BlockGraphError(f"mke2fs failed: {output.strip()[:400]}", op="demo", hint="try another --size")
    return Disk(path, size, "ext4", files)


def _make_files(folder: Path, budget: int, rng: random.Random) -> int:
    """Python's library, then large files of random bytes, `budget` bytes in all. Returns their number."""
    count = 0
    small = min(_MAX_SMALL, budget // 3)
    library = Path(sysconfig.get_paths()["stdlib"])
    for directory, names, files in os.walk(library):
        names[:] = sorted(
            name for name in names if name not in ("site-packages", "dist-packages", "test", "__pycache__")
        )
        for name in sorted(files):
            source = Path(directory, name)
            length = source.lstat().st_size
            if source.is_symlink() or length > small:
                continue
            target = folder / "python" / source.relative_to(library)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            small -= length
            budget -= length
            count += 1
    while budget > 0:
        length = min(budget, rng.randrange(1 << 20, 16 << 20))
        with (folder / f"large-{count}.bin").open("wb") as file:
            for start in range(0, length, _PIECE):
                file.write(rng.randbytes(min(_PIECE, length - start)))
        budget -= length
        count += 1
    return count


def _fill_pattern(path: Path, size: int, rng: random.Random) -> None:
    """Runs of random bytes and holes in turn, all over the disk."""
    with path.open("wb") as image:
        image.truncate(size)
        offset = 0
        while offset < size:
            length = min(size - offset, rng.randrange(1 << 16, 4 << 20))
            image.seek(offset)
            image.write(rng.randbytes(length))
            offset += length + rng.randrange(1 << 16, 4 << 20)
