# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""`blockgraph restore` onto block devices and past the page cache; the disk's end lies inside a block of the target."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.chains import MIB, chained_disk
from helpers.qcow2 import qemu_img, raw_of

from blockgraph.cli import main

#: Of the disk: its end is inside a block of 4096 bytes.
SIZE = 6 * MIB + 512


def backed_up(directory: Path, image_format: str) -> list[bytes]:
    """A chain of a full backup and two increments; what the disk was at each."""

    async def run() -> list[bytes]:
        source = random.Random(image_format)
        async with chained_disk(directory, image_format, SIZE) as disk:
            await disk.guest.pwrite(SIZE - 1000, source.randbytes(1000))
            for _ in range(3):
                await disk.write(source, 8)
                await disk.backup()
            return disk.references

    return asyncio.run(run())


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
@pytest.mark.parametrize("sector", [512, 4096])
def test_restored_to_a_device(
    tmp_path: Path,
    loop_device: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    sector: int,
    direct: bool,
    image_format: str,
) -> None:
    references = backed_up(tmp_path, image_format)
    device = loop_device(SIZE - SIZE % 4096 + MIB, "--sector-size", str(sector))
    old = os.urandom(SIZE - SIZE % 4096 + MIB)
    Path(device).write_bytes(old)
    chain = str(tmp_path / "chain")
    assert main(["restore", chain, device]) == 1
    assert f"'{device}' exists; give another name, or --force" in capsys.readouterr().err
    assert Path(device).read_bytes() == old
    for number, reference in enumerate(references, 1):
        options = ["--force", "--at", str(number), *(["--direct"] if direct else [])]
        assert main(["restore", *options, chain, device]) == 0, capsys.readouterr().err
        there = Path(device).read_bytes()
        assert there[:SIZE] == reference
        assert there[SIZE:] == old[SIZE:], "what lies behind the disk is nobody's to write"


def test_device_that_is_too_small_is_left_alone(
    tmp_path: Path, loop_device: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    backed_up(tmp_path, "raw")
    device = loop_device(4 * MIB)
    old = os.urandom(4 * MIB)
    Path(device).write_bytes(old)
    assert main(["restore", "--force", str(tmp_path / "chain"), device]) == 1
    assert f"'{device}' has {4 * MIB} bytes, the disk has {SIZE}" in capsys.readouterr().err
    assert main(["restore", "--force", "-O", "qcow2", str(tmp_path / "chain"), device]) == 1
    assert "is a block device, which is written raw" in capsys.readouterr().err
    assert Path(device).read_bytes() == old


@pytest.mark.parametrize("target_format", ["raw", "qcow2"])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_restored_past_the_page_cache(
    tmp_path: Path, require_tool: Callable[[str], str], image_format: str, target_format: str
) -> None:
    require_tool("qemu-img")
    references = backed_up(tmp_path, image_format)
    for number, reference in enumerate(references, 1):
        target = tmp_path / f"restored-{number}"
        options = ["--direct", "--at", str(number), "-O", target_format]
        assert main(["restore", *options, str(tmp_path / "chain"), str(target)]) == 0
        if target_format == "qcow2":
            qemu_img("check", "-q", target)
            assert raw_of(target)[:SIZE] == reference
        else:
            assert target.read_bytes() == reference
