# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Images with the dirty bit: left behind by QEMU with lazy refcounts, or made."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.loop import in_loop
from helpers.qcow2 import QEMU, check, contents, create, disk, get_field, qemu_img, raw_of, set_field

from blockgraph.errors import CorruptImage

pytestmark = QEMU


def crash(image: Path, *commands: str) -> None:
    """Run qemu-io commands and then let it abort."""
    program = shutil.which("qemu-io")
    assert program is not None
    arguments = [word for command in (*commands, "abort") for word in ("-c", command)]
    subprocess.run([program, "-f", "qcow2", *arguments, image], capture_output=True, check=False)


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
@in_loop
async def test_image_that_qemu_left_dirty_is_rebuilt_before_the_first_write(tmpfs: Path, cluster_size: int) -> None:
    image = tmpfs / "d.qcow2"
    options = f"lazy_refcounts=on,cluster_size={cluster_size}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, "6M")
    crash(image, "write -P 1 0 1M", "write -P 2 3M 300k", "write -z 64k 64k", "discard 3M 128k")
    assert get_field(image, "incompatible_features") & 1
    async with disk(image) as backend:
        before = await contents(backend)
    assert get_field(image, "incompatible_features") & 1
    async with disk(image) as backend:
        await backend.pwrite(2 << 20, b"x" * 100_000)
        expected = await contents(backend)
    assert expected == before[: 2 << 20] + b"x" * 100_000 + before[(2 << 20) + 100_000 :]
    assert not get_field(image, "incompatible_features") & 1
    check(image)
    assert raw_of(image) == expected


@in_loop
async def test_dirty_compressed_image_with_shared_clusters_is_rebuilt(tmpfs: Path) -> None:
    raw, image = tmpfs / "d.raw", tmpfs / "d.qcow2"
    raw.write_bytes(b"".join(bytes([i % 251]) * 1000 for i in range(2000)))
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4096,lazy_refcounts=on", raw, image)
    set_field(image, "incompatible_features", 1)
    blocks = get_field(image, "refcount_table_offset")
    data = bytearray(image.read_bytes())
    block = int.from_bytes(data[blocks : blocks + 8], "big")
    data[block : block + 4096] = b"\0\0" * 1024 + b"\0\7" * 1024
    image.write_bytes(data)
    async with disk(image) as backend:
        await backend.pwrite(100_000, b"x" * 10_000)
    check(image)


@in_loop
async def test_dirty_image_with_lost_refcount_blocks_gets_new_ones(tmpfs: Path) -> None:
    image = tmpfs / "d.qcow2"
    await create(image, 4 << 20, cluster_size=1024, lazy_refcounts=True)
    async with disk(image) as backend:
        await backend.pwrite(0, b"a" * (2 << 20))
    data = bytearray(image.read_bytes())
    table = get_field(data, "refcount_table_offset")
    data[table + 8 : table + 24] = bytes(16)
    set_field(data, "incompatible_features", 1)
    image.write_bytes(data)
    async with disk(image) as backend:
        await backend.pwrite(3 << 20, b"b" * 5000)
        assert await backend.pread(0, 2 << 20) == b"a" * (2 << 20)
    check(image)


@in_loop
async def test_dirty_image_with_a_cluster_used_twice_is_refused_and_unchanged(tmpfs: Path) -> None:
    image = tmpfs / "d.qcow2"
    await create(image, 1 << 20, lazy_refcounts=True)
    async with disk(image) as backend:
        await backend.pwrite(0, b"a" * (256 << 10))
    data = bytearray(image.read_bytes())
    l1 = get_field(data, "l1_table_offset")
    l2 = int.from_bytes(data[l1 + 1 : l1 + 8], "big")
    data[l2 + 8 : l2 + 16] = data[l2 : l2 + 8]
    set_field(data, "incompatible_features", 1)
    image.write_bytes(data)
    async with disk(image) as backend:
        with pytest.raises(CorruptImage, match=r"used twice.*qemu-img check -r all"):
            await backend.pwrite(0, b"x")
        assert await backend.pread(0, 4) == b"aaaa"
    assert image.read_bytes() == bytes(data)
