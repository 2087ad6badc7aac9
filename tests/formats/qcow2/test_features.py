# SPDX-FileCopyrightText: blockgraph contributors
# SPDX-License-Identifier: MIT
"""Feature bits that this version does not know."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path

import pytest
from helpers.qcow2 import create, disk, get_field, set_field

from blockgraph.errors import Unsupported
from blockgraph.formats.qcow2.header import Extension


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("bit", [5, 31, 40, 63])
def test_open_with_unknown_incompatible_bit_is_refused(tmp_path: Path, bit: int, read_only: bool) -> None:
    path = tmp_path / "disk.qcow2"

    async def main() -> None:
        await create(path, 1 << 20)
        set_field(path, "incompatible_features", 1 << bit)
        before = path.read_bytes()
        with pytest.raises(Unsupported, match=f"unknown incompatible feature bit {bit}, which is not supported"):
            async with disk(path, **{"read-only": read_only}):
                pass
        assert path.read_bytes() == before

    asyncio.run(main())


def test_unknown_bit_that_the_image_names_is_refused_by_that_name(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"

    async def main() -> None:
        await create(path, 1 << 20)
        set_field(path, "incompatible_features", 1 << 40)
        names = bytes((0, 40)) + b"time travel".ljust(46, b"\0")
        image = bytearray(path.read_bytes())
        struct.pack_into(">II48s8x", image, get_field(image, "header_length"), Extension.FEATURE_NAMES, 48, names)
        path.write_bytes(image)
        with pytest.raises(Unsupported, match="uses 'time travel', which is not supported"):
            async with disk(path):
                pass

    asyncio.run(main())


def test_unknown_compatible_bit_is_kept_and_autoclear_bit_cleared(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"

    async def main() -> None:
        await create(path, 1 << 20)
        set_field(path, "compatible_features", 1 << 40)
        set_field(path, "autoclear_features", 1 << 41)
        async with disk(path) as backend:
            await backend.pwrite(0, b"x")
        image = path.read_bytes()
        assert int.from_bytes(image[80:88], "big") == 1 << 40
        assert int.from_bytes(image[88:96], "big") == 0

    asyncio.run(main())
